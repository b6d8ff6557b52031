"""Tasks: found, split into training and test images, with a part held out."""
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import benchmarks
from .errors import UserError, warn_once
from .images import Images
from .seen import reject_both_sides

BUILT_IN = dict(emoji=6, emoji24=6)         # the built-in data and their default shots


def built_in_shots(data):
    """The default shots of `--data` if all of it is built in, else None."""
    names = {name.split(":")[0] for name in benchmarks.names_of(data)}
    return min(BUILT_IN[name] for name in names) if names <= BUILT_IN.keys() else None


@dataclass
class Task:
    """One task: images of a domain or a dataset, and the names of their classes in label order."""

    name: str
    class_names: list
    template: str               # for zero-shot CLIP and fixed texts, without a full stop
    train: Images
    test: Images
    val: Images = None          # None if the dataset has no validation part of its own
    metric: str | Callable = "accuracy"     # "mean per class", "11-point mAP"
    augment: bool = True        # False: training images are only resized
    unused: Images = None       # training images outside the split, if there is a test set


def load_tasks(data, split=None, shots=None, seed=1, root="data"):
    """The tasks of a benchmark, a list of Task.

    data: the name of a benchmark (data/README.md lists them) under `root`, `name:PATTERN+PATTERN`
    for some of its tasks, the path of a tree `domain/class/images`, `name=path` for a tree
    `class/images` that is one task, or several of these joined by commas. split: the fraction of
    each class to train on, max(1, round(split * n)) images; or shots: that many per class. If a
    dataset has no test set, the remaining images are its test set, and with `shots` each class
    keeps at least a fifth of its images, and at least one, for it. With neither: every training
    image, if the dataset has a test set. The choice depends only on the data and the seed. Raises
    UserError for wrong data or numbers; warns of what is not as published or asked for.
    """
    check_size(split, shots)
    listings = find_listings(data, root)
    tasks = [divide(listing, split, shots, seed) for listing in listings]
    if shots != built_in_shots(data):       # at its default, small classes are expected
        warn_of_few(listings, shots)
    for listing in listings:
        for note in listing.remarks + listing.notes:
            warn_once(note)
    reject_both_sides(tasks)
    return tasks


def check_size(split, shots):
    """Raise UserError if the numbers for `load_tasks` are out of range, or if both are given."""
    if split is not None and shots is not None:
        raise UserError("--split and --shots both say how much to train on: give one of them")
    if split is not None and not 0 < split <= 1:
        raise UserError(f"--split {split} is not a fraction: give a number above 0 and up to 1, "
                        "such as 0.1")
    if shots is not None and shots < 1:
        raise UserError(f"--shots {shots} leaves nothing to train on: give 1 or more")


def find_listings(data, root="data", download=False):
    """All images of every task in `data`, before they are split, as a list of Listing."""
    names, root = benchmarks.names_of(data), Path(os.path.expanduser(root))
    if download:
        benchmarks.download(names, root)
    listings = []
    for name in names:
        found = benchmarks.find(name, root)
        for listing in found:
            listing.published = name.split(":")[0] in benchmarks.BENCHMARKS
        listings += found
    seen = set()
    for listing in listings:
        if listing.name in seen:
            raise UserError(f"two tasks are called '{listing.name}' in --data {data}: give them "
                            "different names, as in name=path")
        if listing.name.lower() == "average":
            raise UserError(f"a task of --data {data} is called '{listing.name}', like the last "
                            "row of every table: rename its folder, or give name=path")
        seen.add(listing.name)
        note_doubles(listing)
    return listings


def note_doubles(listing):
    """Add a remark on labels that share a class name, such as ImageNet's two of "missile": in a
    published list of names they are kept. Folders with the same name are rejected before this."""
    twice = [name for name, n in Counter(listing.class_names).items() if n > 1]
    if twice:
        listing.remarks.append(
            f"{listing.name} has two classes called {' and two called '.join(twice[:5])}, as "
            "published: the second of each pair can never be predicted")


def divide(listing, split, shots, seed):
    """The Task of a listing; images are drawn per class, from the seed and the listing's draw."""
    train, test, taken = [], [], []
    for label, items in enumerate(listing.items):
        order = list(range(len(items)))
        random.Random(f"{seed}/{listing.draw_of(label)}").shuffle(order)
        take = len(items)
        if split is not None:
            take = max(1, round(split * len(items)))
        elif shots is not None:
            spare = 0 if listing.test else max(1, math.ceil(len(items) / 5))
            take = min(shots, len(items) - spare)
        name = f"class '{listing.class_names[label]}' of {listing.name}"
        if not listing.test and len(items) < 2:
            raise UserError(f"{name} has {len(items)} image, but one is needed to train on and one "
                            "to test on: add images or remove the class")
        if not listing.test and take == len(items):
            raise UserError(f"{name} has {len(items)} images, and training on all of them leaves "
                            "none to test on: give --shots or a smaller --split")
        train += [(items[i], label) for i in sorted(order[:take])]
        test += [(items[i], label) for i in sorted(order[take:])]
        taken.append(take)
    listing.taken = taken
    unused = None
    if listing.test:
        unused = as_images(test, listing)
        test = [(item, label) for label, items in enumerate(listing.test) for item in items]
    val = validation(listing, shots, seed)
    return Task(listing.name, listing.class_names, listing.template, as_images(train, listing),
                as_images(test, listing), as_images(val, listing) if val else None, listing.metric,
                listing.augment, unused)


def warn_of_few(listings, shots):
    """Warn if classes have fewer than `shots` images to train on."""
    few = [take for x in listings for take in x.taken if shots is not None and take < shots]
    if few:
        classes = sum(len(x.taken) for x in listings)
        tested = all(x.test for x in listings)
        tail = "" if tested else ", because a fifth of each is kept to test on"
        warn_once(f"--shots {shots}: {len(few):,} of {classes:,} classes train on fewer images, "
                  f"the smallest on {min(few)}{tail}")


def as_images(pairs, listing):
    """Images from pairs of (item, label)."""
    labels = [label for _, label in pairs]
    if listing.labels:
        labels = [listing.labels[item] for item, _ in pairs]
    return Images([item for item, _ in pairs], labels, listing.read, crop=listing.crop)


def validation(listing, shots, seed):
    """The dataset's own validation part; with `shots` at most 4 images per class of it (CoOp)."""
    pairs = []
    for label, items in enumerate(listing.val or []):
        chosen = list(range(len(items)))
        if shots is not None:
            random.Random(f"{seed}/{listing.draw_of(label)}/val").shuffle(chosen)
            chosen = sorted(chosen[:min(shots, 4)])
        pairs += [(items[i], label) for i in chosen]
    return pairs


def hold_out(images, seed, fraction=0.2):
    """Split training images into (rest, held out): `fraction` of them, spread over the classes.

    No class gives more than `fraction` of its images, rounded up, or its last one: with 5 images
    per class each gives one, with 2 images 40% of the classes give one. The choice depends only on
    the seed and the labels, so tasks with the same labels are split the same way. With one image
    per class nothing can be held out, and the second list is empty.
    """
    wanted, places = round(fraction * len(images)), defaultdict(list)
    for i, label in enumerate(images.classes):
        places[label].append(i)
    draw = random.Random(f"{seed}/hold out/{len(images)}")
    queues = {}
    for label in sorted(places):
        most = min(math.ceil(fraction * len(places[label])), len(places[label]) - 1)
        queues[label] = draw.sample(places[label], most)
    held = []
    while len(held) < wanted and any(queues.values()):
        turn = [label for label in queues if queues[label]]
        draw.shuffle(turn)
        turn.sort(key=lambda label: -len(queues[label]))        # the largest classes give first
        held += [queues[label].pop() for label in turn[:wanted - len(held)]]
    held = set(held)
    rest = [i for i in range(len(images)) if i not in held]
    return images.subset(rest), images.subset(sorted(held))


def with_held_out(tasks, seed):
    """The tasks with `val` set: the dataset's own, or 20% of the training images, held out."""
    found = []
    for task in tasks:
        train, val = (task.train, task.val) if task.val else hold_out(task.train, seed)
        found.append(replace(task, train=train, val=val))
    return found
