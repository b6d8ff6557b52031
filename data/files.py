"""Folders of images and lists of them: what the modules that find benchmarks share."""
import os
from dataclasses import replace

from common import Listing, UserError
from multitask_prompt_listings import images_of

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def spoken(name):
    """A folder's name as people say it: `Alarm_Clock` is "alarm clock"."""
    return " ".join(name.replace("_", " ").split()).lower()


def folders(path):
    """The folders in a folder, sorted by name, hidden ones left out."""
    return sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name.lower())


def images_in(path):
    return sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))


def image_depth(path, most=4):
    """How many folders below `path` its first images lie (0: in it), or None: it tells a level too high or too low."""
    level = [path]
    for depth in range(most + 1):
        if any(images_in(p) for p in level):
            return depth
        level = [q for p in level for q in folders(p)]
    return None


def check_folder(path, flag="--data"):
    if not path.exists():
        raise UserError(f"there is no folder {path}: give {flag} one that is there")
    if not path.is_dir():
        raise UserError(f"{path} is a file where a folder of images belongs: give {flag} a folder")


def elsewhere(root, folder, marks=()):
    """What --root to give where `folder` is missing in `root` because that is a level or two off; "" where it is not.

    marks: files and folders that tell that `root` is the folder itself, whatever its name.
    """
    here = root.resolve()
    if here.name == folder or any((root / mark).exists() for mark in marks):
        return f"{root} is that folder itself, so give --root {here.parent}"
    if here.parent.name == folder:
        return f"{root} is inside of that folder, so give --root {here.parent.parent}"
    inside = [p for p in folders(root) if (p / folder).is_dir()]
    return f"it is in {inside[0]}, so give --root {inside[0]}" if inside else ""


def read_lines(path):
    """The lines of a text file that are not empty; UserError where there is no such file or it is no text."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}): put the file of the dataset "
                        "there") from error


def check_there(paths, source):
    """Refuse a list that names absent images; every folder is read once, and no image is touched."""
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
        raise UserError(f"{source} names {len(absent):,} of {len(paths):,} images that are not there, such as {absent[0]}: "
                        "unpack the images there")


def label_names(parts, source, names=None):
    """{label: class name} of the lists in `parts`, added to `names`; UserError where a label has two names."""
    names = {} if names is None else names
    for path, label, name in (item for items in parts.values() for item in items):
        if names.setdefault(label, name) != name:
            raise UserError(f"{source} calls label {label} '{name}' ({path}), and elsewhere that is '{names[label]}': get the file anew")
    return names


def split_listing(name, template, parts, names, source, draw, lacking=()):
    """A Listing from a dataset's own split.

    parts: "train", "test" and "val" (as many as it has) -> a list of (path, label, class name); names: label -> class name, in any
    labels that sort; source: the file or folder to name in errors; lacking: classes that may do without training images.
    Raises UserError for absent images, a class without training images, and an empty test set.
    """
    labels = sorted(names)
    place = {label: i for i, label in enumerate(labels)}
    lists = {part: [[] for _ in labels] for part in parts}
    for part, items in parts.items():
        for path, label, _ in items:
            lists[part][place[label]].append(path)
    empty = [names[label] for label, images in zip(labels, lists["train"]) if not images and names[label] not in lacking]
    if empty:
        raise UserError(f"class '{empty[0]}' of {name} has no training image in {source}: get the file anew")
    if not labels or "test" in parts and not parts["test"]:
        raise UserError(f"{source} leaves no image to {'test' if labels else 'train'} on: get the file anew")
    check_there([path for items in parts.values() for path, _, _ in items], source)
    return Listing(name, [names[label] for label in labels], template, lists["train"], draw, test=lists.get("test"), val=lists.get("val"))


def compared(listings, title, place, classes, images=None, names=()):
    """The listings, with a note on the first where they are not as many classes (a task) or images (in all) as were published.

    names: the published class names, so that the missing ones can be named.
    """
    found = len(listings[0].class_names), sum(len(items) for x in listings for items in images_of(x).values())
    says = [f"{have:,} {what} where {published:,} were published ({abs(published - have):,} {'missing' if have < published else 'too many'})"
            for have, what, published in zip(found, ("classes", "images"), (classes, images)) if published and have != published]
    missing = [name for name in names if name not in listings[0].class_names]
    if missing:
        says.append(f"no {', '.join(missing[:10])}{' and so on' * (len(missing) > 10)}")
    if says:
        listings[0] = replace(listings[0], notes=[*listings[0].notes, f"{title} in {place} has {' and '.join(says)}"])
    return listings
