"""Was this image trained on? Checked in three places: `load_tasks` checks its own lists, a resumed
run the data it was started on, and scoring saved prompts the images that they were trained on.

The first compares files, links resolved, without reading them. The others compare contents: the
same image under another name, in another folder or behind a link is still the same image.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .errors import UserError, brief, warn_once
from .images import opened, shown
from .listing import file_of


def digest(item):
    """A hash (int64) of an image of an `Images` list: of the bytes of its file, or of its member of
    a zip file; of the pixels of an array.

    Any other item is identified by its place, such as the number of a drawing in a sheet: eight of
    the built-in drawings look like another one. Raises UserError if a file cannot be read.
    """
    if isinstance(item, np.ndarray):
        return hashed(item.tobytes())
    in_zip_file = isinstance(item, tuple) and isinstance(item[-1], str)
    if not (in_zip_file or isinstance(item, (str, Path))):
        return hashed(repr(name_of(item)).encode())
    try:
        with opened(item) as file:
            return hashed(file.read())
    except Exception as error:                  # zipfile raises zlib.error, RuntimeError and others
        raise UserError(f"{shown(item)} cannot be read ({brief(error)}): replace it or "
                        "remove it") from error


def hashed(content):
    """The first 64 bits of the SHA-1 of some bytes, as a signed integer."""
    return int.from_bytes(hashlib.sha1(content).digest()[:8], "big", signed=True)


def name_of(item):
    """The name of an image in its folder, zip file or sheet, wherever that is."""
    if isinstance(item, (str, Path)):
        return Path(item).name
    if isinstance(item, tuple):
        folder, *place = item
        return Path(folder).name, *place
    return digest(item) if isinstance(item, np.ndarray) else item


def digests(images):
    """The digest of each image of an `Images` list, int64 [n]."""
    items = tqdm(images.items, desc="compare", delay=2, leave=False, disable=None)
    return torch.tensor([digest(item) for item in items], dtype=torch.long)


def trained_on(tasks):
    """The digests, int64 [n], of all images that training on tasks uses, including held-out images,
    because they choose the checkpoint."""
    lists = [images for task in tasks for images in (task.train, task.val) if images]
    return torch.cat([torch.zeros(0, dtype=torch.long), *map(digests, lists)])


def tested(task, seen):
    """The names of a task's test images that are among `seen`, a set of digests."""
    found = digests(task.test).tolist()
    return [f"image {i}" if isinstance(item, np.ndarray) else shown(item)
            for i, item in enumerate(task.test.items) if found[i] in seen]


def contents(task):
    """What must not change before a run is resumed: the class names and a hash of the images,
    training images by content, test images by name, wherever they are."""
    names = [name_of(item) for item in task.test.items]
    images = [trained_on([task]).tolist(), task.train.labels, names, task.test.labels]
    return [*task.class_names, hashlib.sha1(repr(images).encode()).hexdigest()]


def tests_of(tasks):
    """A hash of what is scored: the tasks' classes and test images, by name, wherever they are."""
    found = [[task.name, task.class_names, task.test.labels, *map(name_of, task.test.items)]
             for task in tasks]
    return hashlib.sha1(repr(found).encode()).hexdigest()[:12]


def reject_both_sides(tasks):
    """Raise UserError if a task trains and tests on the same file, links resolved. Warn if a test
    image is a training image of another task."""
    trained, tested = {}, []
    for task in tasks:
        sides_of = {}
        sides = dict(training=task.train, test=task.test, validation=task.val)
        for side, images in sides.items():
            for item in images.items if images else ():
                if not isinstance(item, (str, Path, tuple)):
                    break
                image = item if isinstance(item, tuple) else file_of(item)
                if sides_of.setdefault(image, side) != side:
                    raise UserError(f"{shown(item)} of {task.name} is both a {sides_of[image]} and "
                                    f"a {side} image: remove it from one")
                if side == "training":
                    trained.setdefault(image, task.name)
                elif side == "test":
                    tested.append((image, task.name))
    shared = [(name, trained[image]) for image, name in tested if trained.get(image, name) != name]
    if shared:
        warn_once(f"{len(shared):,} test images are training images of another task, such as one "
                  f"of {shared[0][0]} in {shared[0][1]}: shared prompts are trained on them")
