"""Tasks and their images: found, split into training and test images, read, and put into batches. `common` passes these names on."""
import math
import os
import random
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Callable

import torch
from PIL import Image
from torchvision import transforms

import common
from common import UserError, autocast, encode_image, load_file, seed_everything

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # of CLIP's images


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


KEEP = 2 * 2**30            # bytes of decoded training images that a run holds in memory


class Images(torch.utils.data.Dataset):
    """A list of (PIL image, label). `items` are paths, or anything that `read` turns into a PIL image."""

    def __init__(self, items, labels, read=read_image, kept=None):
        self.items, self.labels, self.read = list(items), list(labels), read
        self.kept = {} if kept is None else kept                                # decoded images by item, see `keep`

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        return self.kept[item].copy() if self.kept and item in self.kept else self.read(item), self.labels[index]

    def __getstate__(self):
        return dict(self.__dict__, kept={})                                     # too much to send to a worker process that is not forked

    def subset(self, indices):
        return Images([self.items[i] for i in indices], [self.labels[i] for i in indices], self.read, self.kept)

    def keep(self, index, room):
        """Decode an image, hold it in memory if it takes at most `room` bytes, and return the room that is left."""
        image = self.read(self.items[index])
        size = 4 * image.width * image.height                                   # PIL stores RGB in four bytes a pixel
        if self.read is not read_image or size > room:                          # the built-in benchmark, CIFAR-100: in memory already
            return room
        self.kept[self.items[index]] = image
        return room - size


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
    notes: list = field(default_factory=list)       # what is not as published, or not as asked for, a line each


@dataclass
class Task:
    """One task: images of a domain or a dataset, and the names of their classes in label order."""
    name: str
    class_names: list
    template: str               # for zero-shot CLIP and for methods with fixed text, without a full stop
    train: Images
    test: Images
    val: Images = None          # None where the dataset has no validation set of its own
    metric: str = "accuracy"    # or "mean per class"


def load_tasks(data, split=None, shots=None, seed=1, root="data"):
    """The tasks of a benchmark, as a list of Task.

    data: the name of a benchmark (data/README.md lists them) under `root`, the path of a `domain/class/images` tree, `name=path`
    for a `class/images` tree that makes one task, or several of these joined by commas.
    split: the fraction of each class of each task to train on, max(1, round(split * n)) images; or shots: that many a
    class. Where a dataset has no test set of its own the rest is the test set, and with `shots` a class keeps at least a
    fifth of its images, and one, for it. Neither: every image of the training set (for a dataset with a test set).
    The choice depends on the data and the seed only. Raises UserError for whatever is wrong with the data or the numbers; that a
    published dataset is not whole, or has classes too small for `shots`, is one line on stderr.
    """
    if split is not None and shots is not None:
        raise UserError("--split and --shots say the same thing in two ways: give one of them")
    if split is not None and not 0 < split <= 1:
        raise UserError(f"--split {split} is not a fraction: give a number above 0 and up to 1, such as 0.1")
    if shots is not None and shots < 1:
        raise UserError(f"--shots {shots} leaves nothing to train on: give 1 or more")
    listings, seen = find_listings(data, root), set()
    for listing in listings:
        if listing.name in seen:
            raise UserError(f"two tasks are called '{listing.name}' in --data {data}: name them apart, as in name=path")
        seen.add(listing.name)
    parts = [divide(listing, split, shots, seed) for listing in listings]
    for note in (note for listing in listings for note in listing.notes):
        warn_once(note)
    return [Task(x.name, x.class_names, x.template, train, test, val, x.metric) for x, (train, test, val) in zip(listings, parts)]


@lru_cache
def warn_once(note):
    """One line on stderr, and not again for another seed or load."""
    print(f"warning: {note}", file=sys.stderr)


def find_listings(data, root="data", download=False):
    """All images of every task in `data`, before they are split; UserError where a name or a folder is not right."""
    domains = load_file(Path(__file__).with_name("domains.py"), "multitask_prompt_domains")
    names = [str(data)] if Path(data).is_dir() else [name.strip() for name in str(data).split(",")]
    if download:
        domains.download(names, Path(root))
    return [listing for name in names for listing in domains.find(name, Path(root))]


def images_of(listing):
    """All images of a listing, a list a part: train (before the split), val and test."""
    return {part: [item for items in lists or [] for item in items]
            for part, lists in dict(train=listing.items, val=listing.val, test=listing.test).items()}


def divide(listing, split, shots, seed):
    """(training, test, validation) Images of a listing, drawn class by class from the seed and the listing's `draw`.

    `split` takes max(1, round(split * n)) of a class's n images, `shots` that many. Where the dataset has no test set the
    rest is it, and `shots` leaves at least a fifth of a class, and one image, for it; what it cannot have, a note says.
    """
    train, test, taken = [], [], []
    for label, items in enumerate(listing.items):
        order = list(range(len(items)))
        random.Random(f"{seed}/{listing.draw}/{label}").shuffle(order)
        take = len(items)
        if split is not None:
            take = max(1, round(split * len(items)))
        elif shots is not None:
            take = min(shots, len(items) - (0 if listing.test else max(1, math.ceil(len(items) / 5))))
            if take < 1 and not listing.test:
                raise UserError(f"class '{listing.class_names[label]}' of {listing.name} has {len(items)} image, and --shots "
                                "needs one to train and one to test on: add images or take the class away")
        train += [(items[i], label) for i in sorted(order[:take])]
        test += [(items[i], label) for i in sorted(order[take:])]
        taken.append(take)
    if shots is not None and min(taken) < shots:
        few = f"{sum(take < shots for take in taken)} of {listing.name}'s {len(taken)} classes can give fewer, at least {min(taken)}"
        listing.notes.append(f"--shots {shots}: {few}{'' if listing.test else ', with some left to test on'}")
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


def divided_tasks(args, data, seed):
    """The tasks of `data` as the command line divides them: under `--validate` held-out training images are the test images."""
    tasks = load_tasks(data, args.split, args.shots, seed, args.root)
    for task in tasks if args.validate else []:
        task.train, task.test = hold_out(task.train, seed)
    return tasks


def checked_tasks(args, data, n_text):
    """The tasks of every seed, with all refused that a training would stumble over later; training images are held in memory."""
    tasks = {seed: divided_tasks(args, data, seed) for seed in args.seeds}
    for task in tasks[args.seeds[0]]:
        try:
            common.tokenize(task.class_names, n_text)                           # longer than 77 positions
        except UserError as error:
            raise error if n_text <= args.n_ctx else UserError(f"{error} in all; a text has {n_text // args.n_ctx} prompts") from None
        common.tokenize(task.class_names, template=task.template)
    room = dict.fromkeys(args.seeds, KEEP // len(args.seeds))                   # bytes
    for seed, task in [(seed, task) for seed in args.seeds for task in tasks[seed]]:
        if not len(task.test):
            raise UserError(f"--validate finds no image of {task.name} to hold out: a class keeps its last one, so train on more")
        for i in common.progress(range(0 if args.eval else len(task.train)), f"check {task.name}"):
            room[seed] = task.train.keep(i, room[seed])                         # refuses an image that cannot be decoded
    return tasks


def with_validation(tasks, seed):
    """The tasks with `val` set: the dataset's own, or 20% of the training images, held out by seed and taken from `train`."""
    parts = [(task.train, task.val) if task.val else hold_out(task.train, seed) for task in tasks]
    return [replace(task, train=train, val=val) for task, (train, val) in zip(tasks, parts)]


def train_transform(model, min_crop=0.08):
    """The augmentation of the authors' programs: random resized crop (`min_crop` to 1 of the area, bicubic), horizontal flip."""
    return transforms.Compose([
        transforms.RandomResizedCrop(model.visual.input_resolution, (min_crop, 1), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(PIXEL_MEAN, PIXEL_STD)])


def workers(lists):
    """How many processes read images: none for few, nor for those that are in memory (the built-in benchmark, CIFAR-100)."""
    return min(8, os.cpu_count() or 1) if any(x.read is read_image for x in lists) and sum(map(len, lists)) > 400 else 0


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


def epoch_batches(sizes, batch_size, steps=None):
    """Yield one list of index tensors a step, a tensor a task: every task in shuffled order, in batches of equal size.

    An epoch is `steps` long, or as long as the largest task needs to be seen once. Smaller tasks, and the last batch of
    each, go on with a fresh shuffle. Draws from PyTorch's global generator.
    """
    batch_size = min(batch_size, max(sizes))
    steps = steps or math.ceil(max(sizes) / batch_size)
    streams = [torch.cat([torch.randperm(n) for _ in range(math.ceil(steps * batch_size / n))]) for n in sizes]
    for step in range(steps):
        yield [stream[step * batch_size:(step + 1) * batch_size] for stream in streams]


class Steps(torch.utils.data.Dataset):
    """The steps of an epoch: item k is a list of (images [b, 3, H, W], labels [b]), a pair a list of images.

    `n_views` fixed views an image, of which a step shows one; 0: a fresh one every time. A view is what the random
    `transform` makes under a seed of its own, so no worker process and no other image has a part in it.
    """

    def __init__(self, lists, batch_size, transform, n_views, seed):
        self.lists, self.transform, self.seed = lists, transform, seed
        self.plan = [[(picked.tolist(), torch.randint(n_views or 2**31, picked.shape).tolist()) for picked in batches]
                     for batches in epoch_batches([len(images) for images in lists], batch_size)]

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, step):
        try:
            return [self._batch(task, *picks) for task, picks in enumerate(self.plan[step])]
        except UserError as error:
            return str(error)

    def _batch(self, task, picked, views):
        pairs = [self.lists[task][i] for i in picked]
        with torch.random.fork_rng(devices=[]):
            x = []
            for i, view, (image, _) in zip(picked, views, pairs):
                torch.manual_seed(random.Random(f"{self.seed}/{task}/{i}/{view}").getrandbits(63))
                x.append(self.transform(image))
        return torch.stack(x), torch.tensor([label for _, label in pairs])


def image_batches(model, tasks, args, seed):
    """Yield one list of (images [b, 3, H, W], labels [b]) a step, a pair a task: `epoch_batches` of augmented images.

    args: batch_size, min_crop, and views: so many fixed views an image, or 0 for fresh ones. Draws from PyTorch's global
    generator which images and which of their views come; how a view looks depends on `seed` alone.
    """
    lists = [task.train for task in tasks]
    steps = Steps(lists, args.batch_size, train_transform(model, args.min_crop), args.views, seed)
    for batches in torch.utils.data.DataLoader(steps, batch_size=None, num_workers=workers(lists)):
        if isinstance(batches, str):
            raise UserError(batches)
        yield [(x.to(model.logit_scale.device), y.to(model.logit_scale.device)) for x, y in batches]


@torch.no_grad()
def image_features(model, images, transform, prompts=None, copies=1):
    """Features [copies, len(images), D] (float32, not normalised) of all images under a transform, and labels [len(images)].

    With the default `copies=1` the features are [len(images), D]. Files are read by worker processes where there are many.
    """
    device, features, labels = model.logit_scale.device, [], []
    prepared = Prepared(images, transform, copies, seed=int(torch.randint(2**31, ())))
    for batch in torch.utils.data.DataLoader(prepared, max(1, 100 // copies), num_workers=workers([images]), collate_fn=collate):
        if isinstance(batch, str):
            raise UserError(batch)
        x, y = batch[0].to(device), batch[1].to(device)                         # [B, copies, 3, H, W], [B]
        with autocast(model):
            features.append(encode_image(model, x.flatten(0, 1), prompts).float().unflatten(0, x.shape[:2]))
        labels.append(y)
    features = torch.cat(features).transpose(0, 1)
    return features[0] if copies == 1 else features, torch.cat(labels)


def view_features(model, images, n_views, min_crop=0.08):
    """Features [n_views, len(images), D] of random views (`train_transform`) under the frozen encoder, and the labels.

    Draws from PyTorch's global generator: call `seed_everything` first.
    """
    features, labels = image_features(model, images, train_transform(model, min_crop), copies=n_views)
    return features.reshape(n_views, len(images), -1), labels


def view_batches(model, tasks, args, seed, epoch, seen):
    """Yield one list of (features [b, D], labels [b]) a step, a pair a task: `image_batches` under a frozen encoder.

    args.views: so many views an image, of which a step shows one, or 0 for fresh ones every epoch. seen: a dict that keeps the
    features of all views for the next call, by (Images, epoch). Seeds PyTorch itself, from `seed` and `epoch`.
    """
    views = []
    for task in tasks:
        key = (task.train, 0 if args.views else epoch)
        if key not in seen:
            for old in [old for old in seen if isinstance(old, tuple) and old[0] is task.train]:
                del seen[old]                                                   # fresh views are for one epoch
            seed_everything(seed, 2 * key[1])
            seen[key] = view_features(model, task.train, args.views or 1, args.min_crop)
        views.append(seen[key])
    seed_everything(seed, 2 * epoch + 1)
    for picks in epoch_batches([len(task.train) for task in tasks], args.batch_size):
        yield [(x[torch.randint(len(x), p.shape), p], labels[p]) for (x, labels), p in zip(views, picks)]


def encode_batches(model, batches, prompts):
    """Image features [b, D] of every task's batch, as a list; all images go through the encoder as one batch.

    batches: (images [b, 3, H, W], labels [b]) a task. prompts: [L, P, n, d], one set for all tasks (P = 1) or one a task.
    """
    sizes = [len(labels) for _, labels in batches]
    if prompts.shape[1] == 1:
        rows = prompts[:, 0]                                                    # [L, n, d], the same for every image
    else:
        rows = torch.cat([prompts[:, i:i + 1].expand(-1, size, -1, -1) for i, size in enumerate(sizes)], dim=1)     # [L, images, n, d]
    return encode_image(model, torch.cat([images for images, _ in batches]), rows).split(sizes)
