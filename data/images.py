"""An image file read as a person sees it, its views, and the batches of a training step."""
import io
import math
import os
import random
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from .errors import UserError, brief

# the mean and standard deviation of CLIP's training images
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def read_image(path):
    """The RGB image in a file, or in a member of a zip file: (zip file, member), as a person sees
    it.

    EXIF orientation is applied, transparency is put on white, 16-bit and float images are scaled by
    their range, of an animation the first frame is taken. Raises UserError with the path where the
    file cannot be decoded.
    """
    try:
        file = path
        if isinstance(path, tuple):
            archive, member = path
            file = io.BytesIO(_zip_file(archive, os.getpid()).read(member))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # Pillow warns of damage first
            with Image.open(file) as image:
                image.load()
                return rgb(upright(image))
    except Exception as error:      # Pillow's decoders raise RuntimeError, TypeError and others
        raise UserError(f"{shown(path)} cannot be decoded as an image ({brief(error)}): replace it "
                        "or take it away") from error


@lru_cache(maxsize=128)
def _zip_file(path, process):
    """A zip file, open in this process alone: a worker that shared its parent's file handle would
    move the parent's position in the file."""
    return zipfile.ZipFile(path)


def shown(item):
    """An image's path; of a member of a zip file `train.zip@member`."""
    return "@".join(map(str, item)) if isinstance(item, tuple) else str(item)


def upright(image):
    """An image with its EXIF orientation applied; damaged EXIF data count as none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:       # Pillow raises SyntaxError, struct.error, TypeError and others for them
        return image


def rgb(image):
    """A PIL image of any mode in RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def eight_bits(values):
    """Grey values of 16 bits, 32 bits or floats as uint8, scaled by their range.

    Floats in 0..1 are multiplied by 255, values above 255 and up to 65535 divided by 257; any other
    range that leaves 0..255 is stretched from its minimum to its maximum.
    """
    floats = values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64))
    low, high = values.min(), values.max()
    if floats and low >= 0 and high <= 1:
        values = values * 255
    elif 0 <= low and 255 < high <= 65535:
        values = values / 257
    elif low < 0 or high > 65535:
        values = (values - low) * (255 / max(high - low, 1e-12))
    return np.round(values).clip(0, 255).astype(np.uint8)


def read_array(array):
    """An image that is an array [H, W, 3]."""
    return Image.fromarray(array)


def read_tile(item):
    """A drawing of the built-in benchmark: (sheet of 40 in a row, number) -> 64 x 64 image."""
    sheet, number = item
    left, top = number % 40 * 64, number // 40 * 64
    return _sheet(sheet).crop((left, top, left + 64, top + 64))


@lru_cache
def _sheet(path):
    return Image.open(path).convert("RGB")


class Images(torch.utils.data.Dataset):
    """A list of (PIL image, label). `items` are paths, or anything that `read` makes an image
    of.

    A label is a class number, or where an image may have several a tuple of them, the class that it
    was drawn for first. crop: whether an image that is not augmented is cropped at its centre, as
    CLIP does, or resized to a square.
    """

    def __init__(self, items, labels, read=read_image, kept=None, crop=True):
        self.items, self.labels, self.read = list(items), list(labels), read
        self.kept = {} if kept is None else kept                # decoded images by item, see `keep`
        self.crop = crop

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        if self.kept and item in self.kept:
            return self.kept[item].copy(), self.labels[index]
        return self.read(item), self.labels[index]

    def __getstate__(self):
        state = dict(self.__dict__, kept={})        # too much to send to a worker process
        state.pop("view_features", None)
        return state

    @property
    def classes(self):
        """A class number per image; of several, the one that it was drawn for."""
        return [label[0] if isinstance(label, tuple) else label for label in self.labels]

    def subset(self, indices):
        """The images at some indices, as Images."""
        return Images(
            [self.items[i] for i in indices],
            [self.labels[i] for i in indices],
            self.read,
            self.kept,
            self.crop,
        )

    def keep(self, index, room):
        """Decode an image, hold it if it takes at most `room` bytes; returns the room that is left.

        Images that are in memory already (the built-in benchmark, CIFAR-100) are not held twice.
        """
        image = self.read(self.items[index])
        size = 4 * image.width * image.height       # Pillow stores RGB in four bytes per pixel
        if self.read is not read_image or size > room:
            return room
        self.kept[self.items[index]] = image
        return room - size


def label_tensor(labels):
    """Labels as a tensor [B]; where one of them is a tuple of classes, the uniform distribution
    over each image's classes, [B, largest class + 1]."""
    if not any(isinstance(label, tuple) for label in labels):
        return torch.tensor(labels)
    several = [label if isinstance(label, tuple) else (label,) for label in labels]
    rows = torch.zeros(len(labels), 1 + max(max(classes) for classes in several))
    for row, classes in zip(rows, several):
        row[list(classes)] = 1 / len(classes)
    return rows


# ------------------------------------------------------------------------- the batches of a step

def plan(sizes, batch_size, mixed=False, views=0):
    """The steps of an epoch, each a list of (task, index, view).

    sizes: the number of training images of each task. mixed=False: a batch of every task in each
    step, in shuffled order; an epoch ends when the largest task has been seen once, smaller tasks
    and the last batch go on with a fresh shuffle. mixed=True: batches of the shuffled union of the
    tasks, every image once. views: how many views an image has, 0: any. Draws from PyTorch's global
    generator, and only here.
    """
    if mixed:
        union = [(t, i) for t, n in enumerate(sizes) for i in range(n)]
        order = [union[k] for k in torch.randperm(len(union)).tolist()]
        steps = [order[k:k + batch_size] for k in range(0, len(order), batch_size)]
    else:
        batch_size = min(batch_size, max(sizes))
        n_steps = math.ceil(max(sizes) / batch_size)
        streams = []
        for n in sizes:
            shuffles = math.ceil(n_steps * batch_size / n)
            streams.append(torch.cat([torch.randperm(n) for _ in range(shuffles)]).tolist())
        steps = []
        for k in range(0, n_steps * batch_size, batch_size):
            steps.append([(t, i) for t, stream in enumerate(streams)
                          for i in stream[k:k + batch_size]])
    drawn = torch.randint(views or 2**31, (sum(map(len, steps)),)).tolist()
    numbers = iter(drawn)
    return [[(t, i, next(numbers)) for t, i in step] for step in steps]


def rendered(lists, steps, size, seed, min_crop=0.08, augment=None, workers=None):
    """Yield (images uint8 [B, 3, size, size], labels, task [B]) for each step of a `plan`.

    A view is a random resized crop (min_crop to 1 of the area, bicubic) and a horizontal flip,
    under a random state of its own, from the seed, the task, the index and the view: no worker
    process and no other image has a part in it. Where augment[task] is False an image is what it is
    for a test. labels: as `label_tensor` has them. workers: how many processes read; None chooses,
    0 works everywhere.
    """
    augmented = transforms.Compose([
        transforms.RandomResizedCrop(size, (min_crop, 1), interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip()])
    kinds = [augmented if augment is None or augment[t] else whole(size, images.crop)
             for t, images in enumerate(lists)]
    jobs = _Rendered(lists, steps, kinds, seed)
    for pixels, labels, tasks in _loaded(jobs, lists, workers):
        yield torch.from_numpy(pixels), label_tensor(labels), torch.tensor(tasks)


def in_order(images, size, workers=None, batch=100):
    """Yield (images uint8 [B, 3, size, size], labels) of all images, as CLIP sees test images:
    resized to `size` (bicubic) and cropped at the centre, or whole where `images.crop` is False."""
    steps = [[(0, i, 0) for i in range(k, min(k + batch, len(images)))]
             for k in range(0, len(images), batch)]
    jobs = _Rendered([images], steps, [whole(size, images.crop)], 0)
    for pixels, labels, _ in _loaded(jobs, [images], workers):
        yield torch.from_numpy(pixels), label_tensor(labels)


def whole(size, crop):
    """The view of an image that is not augmented: CLIP's, or without its centre crop."""
    if not crop:
        return transforms.Resize((size, size), InterpolationMode.BICUBIC)
    return transforms.Compose([transforms.Resize(size, InterpolationMode.BICUBIC),
                               transforms.CenterCrop(size)])


def normalise(images):
    """Float images [B, 3, H, W] from uint8 ones: CLIP's ToTensor and Normalize."""
    x = images.float() / 255
    mean = torch.tensor(PIXEL_MEAN, device=x.device)[:, None, None]
    return (x - mean) / torch.tensor(PIXEL_STD, device=x.device)[:, None, None]


class _Rendered(torch.utils.data.Dataset):
    """Item k is step k as arrays. A UserError is returned as its line, to leave a worker whole."""

    def __init__(self, lists, steps, kinds, seed):
        self.lists, self.steps, self.kinds, self.seed = lists, steps, kinds, seed

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, step):
        pixels, labels = [], []
        try:
            for task, index, view in self.steps[step]:
                image, label = self.lists[task][index]
                name = f"{self.seed}/{task}/{index}/{view}"
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(random.Random(name).getrandbits(63))
                    image = self.kinds[task](image)
                pixels.append(np.asarray(image).transpose(2, 0, 1))
                labels.append(label)
        except UserError as error:
            return str(error)
        # numpy arrays travel through a pipe, tensors would need shared memory (Docker has 64 MB)
        return np.stack(pixels), labels, [task for task, _, _ in self.steps[step]]


def _first(items):
    return items[0]


def _loaded(jobs, lists, workers):
    """The items of `jobs` in order, by worker processes where there are many files to read."""
    if workers is None:
        many = sum(map(len, lists)) > 400 and any(x.read is read_image for x in lists)
        workers = min(8, os.cpu_count() or 1) if many else 0
    workers = min(workers, len(jobs))
    loader = torch.utils.data.DataLoader(jobs, batch_size=1, num_workers=workers, collate_fn=_first)
    try:
        for item in loader:
            if isinstance(item, str):
                raise UserError(item)
            yield item
    except (RuntimeError, OSError) as error:
        if workers and (isinstance(error, OSError) or "worker" in str(error)):
            raise UserError(f"the processes that read images died ({brief(error)}): give "
                            "--workers 0") from error
        raise


ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
# no pictures, or readable on Windows alone
ENDINGS -= set(".pdf .eps .ps .mpg .mpeg .h5 .hdf .grib .bufr .fits .fit .emf .wmf".split())


def is_image(path):
    """Whether a file's ending is one that Pillow reads."""
    path = Path(path)
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")
