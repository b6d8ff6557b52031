"""Is a benchmark complete, and can its images be read? The work of `python common.py check`."""
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from .errors import UserError
from .images import Images
from .listing import file_of, images_of
from .tasks import find_listings


def report(data, root="data", quick=False, workers=0):
    """(lines of a table of the tasks, remarks, problems, the number of images).

    quick: do not decode the images. Raises UserError where there is nothing to check.
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
    images = sum(len(items) for x in listings for items in images_of(x).values())
    return table(listings), remarks, problems, images


def table(listings):
    """A row per task; the training images are those to choose from, "rest": what a split leaves."""
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
    """What is odd about the lists: an image that is there twice, by a link or in two lists."""
    seen, found = {}, []
    for items in images_of(listing).values():
        for path in items:
            if isinstance(path, (str, Path)):
                file = file_of(path)
                if file in seen:
                    found.append(f"{path} of {listing.name} is the image {seen[file]} once more")
                seen.setdefault(file, path)
    return found


class _Decoded(Images):
    """Item i is None, or the line that says why image i cannot be decoded."""

    def __getitem__(self, index):
        try:
            super().__getitem__(index)
        except UserError as error:
            return str(error)


def undecoded(listing, workers=0):
    """A line for each image that cannot be decoded."""
    items = [item for part in images_of(listing).values() for item in part]
    jobs = _Decoded(items, [0] * len(items), listing.read)
    loader = DataLoader(jobs, batch_size=64, num_workers=workers, collate_fn=list)
    shown = tqdm(loader, desc=f"check {listing.name}", delay=2, leave=False, disable=None)
    return [line for batch in shown for line in batch if line]
