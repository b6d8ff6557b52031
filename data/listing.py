"""All images of a task before they are split."""
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from .images import read_image


@dataclass
class Listing:
    """items[k] lists the images of class k; so do test and val, if the dataset has them."""

    name: str
    class_names: list
    template: str
    items: list
    draw: str                   # listings with the same draw (and sizes) are split the same way
    test: list = None
    val: list = None
    metric: str = "accuracy"
    augment: bool = True        # False: training images are only resized
    crop: bool = True           # False: images that are not augmented are resized to a square
    labels: dict = None         # {image: its classes, its list's first}, if images have several
    read: Callable = read_image
    taken: list = field(default_factory=list)       # how many images of each class are trained on
    notes: list = field(default_factory=list)       # what is not as published or asked for
    remarks: list = field(default_factory=list)     # how it was read, if there was a choice
    numbers: list = None        # the classes' numbers in the draw; None: 0, 1, 2, ...
    published: bool = True      # False: a folder of the user's own

    def draw_of(self, label):
        """The text that, with the seed, determines how the images of a class are drawn."""
        return f"{self.draw}/{label if self.numbers is None else self.numbers[label]}"


def file_of(path):
    """What identifies a file, whichever links lead to it."""
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
