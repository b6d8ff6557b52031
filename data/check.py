"""Is a benchmark complete, and can its images be read? The work of `python common.py check`."""
from pathlib import Path

from tqdm import tqdm

from .benchmarks.lists import counted
from .errors import UserError
from .images import Images, decoded, shown
from .listing import file_of, images_of
from .seen import digest
from .tasks import find_listings


def report(data, root="data", quick=False, workers=0):
    """(lines of a table of the tasks, remarks, problems, the number of images).

    quick: do not read the images. Raises UserError if there is nothing to check.
    """
    listings = find_listings(data, root)
    remarks, problems = [], []
    for x in listings:
        remarks += x.remarks
        problems += x.notes
        problems += gaps(x)
    if not quick:
        for x in listings:
            problems += undecoded(x, workers)
            (remarks if x.published else problems).extend(copies(x))
    images = sum(len(items) for x in listings for items in images_of(x).values())
    return table(listings), remarks, problems, images


def table(listings):
    """Lines, a row per task. train: the images a split draws from; "rest": what it doesn't draw."""
    rows = [["task", "classes", "train", "val", "test", "template", "metric"]]
    for x in listings:
        parts = {part: f"{len(items):,}" for part, items in images_of(x).items()}
        rows.append(
            [
                x.name,
                str(len(x.class_names)),
                parts["train"],
                parts["val"] if x.val else "-",
                parts["test"] if x.test else "rest",
                x.template,
                x.metric,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if 0 < i < 5 else cell.ljust(w)
                 for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def gaps(listing):
    """A line for each image that occurs twice in the lists, directly or by a link."""
    seen, found = {}, []
    for items in images_of(listing).values():
        for path in items:
            if isinstance(path, (str, Path)):
                file = file_of(path)
                if file in seen:
                    found.append(f"{path} of {listing.name} is the same image as {seen[file]}")
                seen.setdefault(file, path)
    return found


def copies(listing):
    """A list with a line if images of a task are exact copies of others; `gaps` finds links."""
    items = {}
    for part in images_of(listing).values():
        for item in part:
            is_path = isinstance(item, (str, Path))
            items.setdefault(file_of(item) if is_path else id(item), item)
    shown_items = tqdm(items.values(), desc=f"compare {listing.name}", delay=2, leave=False,
                       disable=None)
    seen, found = {}, []
    for item in shown_items:
        try:
            first = seen.setdefault(digest(item), item)
        except UserError:           # `undecoded` reports it
            continue
        if first is not item:
            found.append((item, first))
    if not found:
        return []
    are = "is an exact copy of another" if len(found) == 1 else "are exact copies of others"
    says = f"{counted(found, 'image')} of {listing.name} {are}"
    if isinstance(found[0][0], (str, Path, tuple)):
        says += ", such as {} of {}".format(*map(shown, found[0]))
    return [f"{says}: a split can train on one and test on the other"]


def undecoded(listing, workers=0):
    """A line for each image that cannot be decoded."""
    items = [item for part in images_of(listing).values() for item in part]
    images = Images(items, [0] * len(items), listing.read)
    read = decoded([images], workers, text=f"check {listing.name}")
    return [line for _, _, line in read if line]
