"""Folders of images and lists of them: what the modules that find benchmarks share."""
import json
import os
import re
import unicodedata

from ..errors import UserError, brief
from ..images import is_image, shown
from ..listing import Listing, images_of


def spoken(name):
    """A folder's name as words: `Alarm_Clock` gives "alarm clock", `AnnualCrop` "annual crop"."""
    name = re.sub(r"(?<=[a-z]{2})(?=[A-Z][a-z])", " ", printable(name))
    return " ".join(name.replace("_", " ").split()).lower()


def plain(name):
    """A name in lower-case letters and digits."""
    return re.sub("[^a-z0-9]", "", name.lower())


def printable(name):
    """A name from the file system in Unicode's form NFC; bytes that are not UTF-8 are replaced."""
    text = os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return unicodedata.normalize("NFC", text)


def counted(things, noun):
    """`1 image` or `1,234 images`."""
    return f"{len(things):,} {noun}{'s' if len(things) != 1 else ''}"


def folders(path):
    """The folders in a folder, sorted by name, except hidden ones, `__MACOSX` and those of this
    project's runs."""
    return [p for p in all_folders(path) if not holds_runs(p)]


def all_folders(path):
    """The folders in a folder, sorted by name, except hidden ones and `__MACOSX`."""
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    names = [name for name in names if not name.startswith((".", "__MACOSX"))]
    return [path / name for name in sorted(names, key=str.lower)]


def holds_runs(path):
    """Whether a folder is that of a run or a table of this project, or only holds such folders."""
    if os.path.isfile(path / "table.md") and os.path.isfile(path / "table.csv"):
        return True
    try:
        if os.path.isfile(path / "settings.json"):
            return "method" in json.loads((path / "settings.json").read_text(encoding="utf-8"))
        inside = all_folders(path)
        return bool(inside) and all(map(holds_runs, inside)) and not images_in(path)
    except (OSError, ValueError, TypeError):        # not ours, or not readable
        return False


def skipped_runs(path):
    """A list with a remark if a folder contains folders of runs, which are skipped."""
    runs = [p for p in all_folders(path) if holds_runs(p)]
    if not runs:
        return []
    return [f"skipped {counted(runs, 'folder')} of runs in {path}, such as {runs[0].name}"]


def images_in(path):
    """The images in a folder, sorted."""
    return sorted(p for p in path.iterdir() if is_image(p))


def skipped(path):
    """Notes on what a class folder holds beside images: other files, and images too deep."""
    other = [p for p in path.iterdir() if p.is_file() and not is_image(p)
             and not p.name.startswith((".", "Thumbs"))]
    deep = [p for p in path.glob("*/**/*") if is_image(p)]
    notes = []
    if other:
        notes.append(f"skipped {counted(other, 'file')} in {path} without an image extension, "
                     f"such as {other[0].name}")
    if deep:
        notes.append(f"skipped {counted(deep, 'image')} in folders below the class folder {path}, "
                     f"such as {deep[0]}")
    return notes


def image_depth(path, most=4):
    """How many folders below `path` most of its images lie (0: in it), or None.

    It shows if `path` is a level too high or too low; a few stray images do not matter.
    """
    level, best, count = [path], None, 0
    for depth in range(most + 1):
        found = sum(len(images_in(p)) for p in level)
        if found > count:
            best, count = depth, found
        level = [q for p in level for q in folders(p)]
    return best


def check_folder(path, flag="--data"):
    """Raise UserError if there is no such folder."""
    if not path.exists():
        raise UserError(f"there is no folder {path}: give {flag} an existing folder")
    if not path.is_dir():
        raise UserError(f"{path} is a file where a folder of images belongs: give {flag} a folder")


def elsewhere(root, folder, marks=()):
    """Which --root to give if `folder` is missing because `root` is a level or two off, else "".

    marks: files and folders that show that `root` is the folder itself.
    """
    here = root.resolve()
    if here.name == folder or any((root / mark).exists() for mark in marks):
        return f"{root} is that folder itself, so give --root {here.parent}"
    if here.parent.name == folder:
        return f"{root} is inside that folder, so give --root {here.parent.parent}"
    inside = [p for p in folders(root) if (p / folder).is_dir()]
    return f"it is in {inside[0]}, so give --root {inside[0]}" if inside else ""


def read_text(path):
    """The text of a file, without a byte order mark; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"{path} cannot be read ({reason}): put the dataset's file "
                        "there") from error


def read_lines(path):
    """The lines of a text file that are not empty."""
    return [line for line in read_text(path).splitlines() if line.strip()]


def check_there(paths, source):
    """Reject a list that names missing images; reads every folder once and opens no image."""
    wanted = {}
    for path in paths:
        folder, _, file = path.rpartition("/")
        wanted.setdefault(folder, []).append(file)
    absent = []
    for folder, files in wanted.items():
        try:
            there = set(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            there = ()
        absent += [f"{folder}/{file}" for file in files if file not in there]
    if absent:
        raise UserError(
            f"{source} names missing images ({len(absent):,} of {len(paths):,}), "
            f"such as {absent[0]}: unpack the images there"
        )


def label_names(parts, source, names=None):
    """{label: class name} of the lists in `parts`, added to `names`.

    Raises UserError if a label has two names.
    """
    names = {} if names is None else names
    for items in parts.values():
        for path, label, name in items:
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{source} calls label {label} '{name}' ({path}), but elsewhere "
                    f"'{names[label]}': download the file again"
                )
    return names


def split_listing(name, template, parts, names, source, draw, lacking=()):
    """A Listing from a dataset's own split.

    parts: "train", "test" and "val" (those it has) -> a list of (path, label, class name), or of
    (item, label, class name) for images that the caller has checked to exist;
    names: label -> class name; source: the file or folder to name in errors; lacking: classes that
    may have no training images. An image that is listed twice in one part counts once.
    Raises UserError for missing images, an image in two parts, or a class without training or test
    images.
    """
    labels = sorted(names)
    place = {label: i for i, label in enumerate(labels)}
    lists, owner = {part: [[] for _ in labels] for part in parts}, {}
    notes, twice = [], []
    for part, items in parts.items():
        for path, label, _ in items:
            if path not in owner:
                owner[path] = part, label
                lists[part][place[label]].append(path)
            elif owner[path] == (part, label):
                twice.append(path)
            else:
                raise UserError(f"{source} lists {shown(path)} twice, in {owner[path][0]} and "
                                f"{part} or with two labels: remove one of the lines")
    if twice:
        notes.append(f"{source} lists {counted(twice, 'image')} twice: counted once")
    for part, what in dict(train="training", test="test").items():
        for label, images in zip(labels, lists.get(part, ())):
            if not images and names[label] not in lacking:
                raise UserError(
                    f"class '{names[label]}' of {name} has no {what} image in {source}: "
                    "download the file again"
                )
    if not labels:
        raise UserError(f"{source} has no image to train on: download the file again")
    files = [path for items in parts.values() for path, _, _ in items if isinstance(path, str)]
    check_there(files, source)
    return Listing(name, [names[label] for label in labels], template, lists["train"], draw,
                   test=lists.get("test"), val=lists.get("val"), notes=notes)


def compared(listings, title, place, classes, images=None, names=()):
    """The listings, with a note on the first if they differ from what was published.

    classes: per task; images: in all; names: the published class names, to name the missing ones.
    """
    found = sum(len(items) for x in listings for items in images_of(x).values())
    says = []
    for have, what, published in ((len(listings[0].class_names), "classes", classes),
                                  (found, "images", images)):
        if published and have != published:
            off = "missing" if have < published else "too many"
            says.append(f"{have:,} {what} instead of the published {published:,} "
                        f"({abs(published - have):,} {off})")
    missing = [name for name in names if name not in listings[0].class_names]
    if missing:
        says.append(f"no {', '.join(missing[:10])}{' and so on' * (len(missing) > 10)}")
    if says:
        listings[0].notes.append(f"{title} in {place} has {' and '.join(says)}")
    return listings


def unreadable(path, error, what, remedy="download the file again"):
    """The UserError for a file that is not what it should be."""
    return UserError(f"{path} is not {what} ({brief(error)}): {remedy}")
