"""All images of a task before they are split."""
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from .images import read_image


@dataclass
class Listing:
    """items[k] lists the images of class k; test and val too, where the dataset has them."""

    name: str
    class_names: list
    template: str
    items: list
    draw: str                   # listings with the same draw (and sizes) split at the same places
    test: list = None
    val: list = None
    metric: str = "accuracy"
    augment: bool = True        # False: training images are only resized
    crop: bool = True           # False: images that are not augmented are resized to a square
    labels: dict = None         # {image: its classes, that of its list first} where it has several
    read: Callable = read_image
    taken: list = field(default_factory=list)       # training images of each class, once divided
    notes: list = field(default_factory=list)       # what is not as published or asked for
    remarks: list = field(default_factory=list)     # how it was taken, where that is a choice
    numbers: list = None        # the classes' numbers in the draw; None: 0, 1, 2, ...
    published: bool = True      # False: a folder of the user's own

    def draw_of(self, label):
        """What the images of a class are drawn by, beside the seed."""
        return f"{self.draw}/{label if self.numbers is None else self.numbers[label]}"


def file_of(path):
    """What tells one file from another, whichever links lead to it."""
    try:
        found = os.stat(path)
    except OSError:
        return os.fspath(path)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def images_of(listing):
    """All images of a listing, a list per part: train (before the split), val and test."""
    parts = dict(train=listing.items, val=listing.val, test=listing.test)
    return {
        part: [item for items in lists or [] for item in items] for part, lists in parts.items()
    }
