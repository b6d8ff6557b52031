"""Images of a task, before and after the split into training and test images. `common` passes these names on."""
import math
import random
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import torch
from PIL import Image

from common import UserError


def read_image(path):
    """The RGB image in a file; UserError with its path where it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                     # PIL tells of damage twice
            with Image.open(path) as image:
                return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be decoded as an image ({reason}): replace it or take it away") from error


def read_tile(item):
    """One drawing of the `emoji` benchmark: (picture file, number) -> a 64 x 64 image; 40 drawings a row."""
    sheet, number = item
    left, top = number % 40 * 64, number // 40 * 64
    return _sheet(sheet).crop((left, top, left + 64, top + 64))


@lru_cache
def _sheet(path):
    return Image.open(path).convert("RGB")


class Images(torch.utils.data.Dataset):
    """A list of (PIL image, label). `items` are paths, or anything that `read` turns into a PIL image."""

    def __init__(self, items, labels, read=read_image):
        self.items, self.labels, self.read = list(items), list(labels), read

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.read(self.items[index]), self.labels[index]

    def subset(self, indices):
        return Images([self.items[i] for i in indices], [self.labels[i] for i in indices], self.read)


@dataclass
class Listing:
    """All images of a task before the split: items[k] lists those of class k; test and val too where the dataset has them."""
    name: str
    class_names: list
    template: str
    items: list
    draw: str                   # listings with the same `draw` (and as many images) are split at the same places
    test: list = None
    val: list = None
    metric: str = "accuracy"
    read: Callable = read_image


def divide(listing, split, shots, seed):
    """(training, test, validation) Images of a listing, drawn class by class from the seed and the listing's `draw`.

    `split` takes max(1, round(split * n)) of a class's n images, `shots` that many. Where the dataset has no test set the
    rest is it, and `shots` leaves at least a fifth of a class, and one image, for it.
    """
    train, test = [], []
    for label, items in enumerate(listing.items):
        order = list(range(len(items)))
        random.Random(f"{seed}/{listing.draw}/{label}").shuffle(order)
        take = len(items)
        if split is not None:
            take = max(1, round(split * len(items)))
        elif shots is not None:
            take = min(shots, len(items) - (0 if listing.test else max(1, math.ceil(len(items) / 5))))
            if take < 1:
                raise UserError(f"class '{listing.class_names[label]}' of {listing.name} has {len(items)} image, and --shots "
                                "needs one to train and one to test on: add images or take the class away")
        train += [(items[i], label) for i in sorted(order[:take])]
        test += [(items[i], label) for i in sorted(order[take:])]
    if listing.test:
        test = [(item, label) for label, items in enumerate(listing.test) for item in items]
    if not test:
        raise UserError(f"this split trains on every image of {listing.name} and leaves none to test on: use a smaller --split")
    val = [(item, label) for label, items in enumerate(listing.val or []) for item in items]
    make = lambda pairs: Images([item for item, _ in pairs], [label for _, label in pairs], listing.read)
    return make(train), make(test), make(val) if val else None


def hold_out(images, seed, fraction=0.2):
    """Split training images into (rest, held out): `fraction` of the task's images by seed, never a class's last one.

    With one image a class nothing can be held out, and the second list is empty. Lists of equal length are divided at the
    same places, so that an emoji is held out in all styles or in none.
    """
    order = list(range(len(images)))
    random.Random(f"{seed}/hold out/{len(images)}").shuffle(order)
    left, held = Counter(images.labels), set()
    for i in order:
        if len(held) < round(fraction * len(images)) and left[images.labels[i]] > 1:
            held.add(i)
            left[images.labels[i]] -= 1
    return images.subset([i for i in range(len(images)) if i not in held]), images.subset(sorted(held))


class Prepared(torch.utils.data.Dataset):
    """Images as tensors [copies, 3, H, W]; random transforms depend on the seed and the image's place, on no worker.

    A UserError is returned, not raised, so that it leaves a worker process as the line it is.
    """

    def __init__(self, images, transform, copies, seed):
        self.images, self.transform, self.copies, self.seed = images, transform, copies, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            image, label = self.images[index]
        except UserError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + index)
            return torch.stack([self.transform(image) for _ in range(self.copies)]), label


def collate(items):
    """Stack a batch, or pass on the line of its first error."""
    errors = [item for item in items if isinstance(item, UserError)]
    return str(errors[0]) if errors else (torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items]))
