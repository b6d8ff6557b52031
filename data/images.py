"""Reading image files as a person sees them, their views, and the batches of a training step."""
import contextlib
import io
import math
import multiprocessing
import os
import random
import sys
import traceback
import warnings
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from operator import length_hint
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from .errors import UserError, brief

# the mean and standard deviation of CLIP's training images
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def read_image(path):
    """The RGB image in a file, as `read_pixels` reads it, as a PIL image."""
    return as_pil(read_pixels(path))


def read_pixels(path):
    """The RGB image in a file, or in a member of a zip file: (zip file, member), as a person sees
    it, uint8 [3, H, W].

    EXIF orientation is applied, transparency becomes white, 16-bit, 32-bit and float images are
    scaled by their range, and animations give their first frame. Raises UserError with the path if
    the file cannot be decoded.
    """
    try:
        with opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")             # Pillow warns before it raises an error
            with Image.open(file) as image:
                pixels = plain_jpeg(file, image)
                if pixels is None:
                    image.load()
                    pixels = as_pixels(rgb(upright(image), image.format))
                return pixels
    except Exception as error:      # Pillow's decoders raise RuntimeError, TypeError and others
        raise UserError(f"{shown(path)} cannot be decoded as an image ({brief(error)}): replace it "
                        "or remove it") from error


def opened(path):
    """The open file of an image."""
    if isinstance(path, tuple):
        archive, member = path
        return io.BytesIO(_zip_file(archive, os.getpid()).read(member))
    return open(path, "rb")


@lru_cache(maxsize=128)
def _zip_file(path, process):
    """A zip file, opened once per process: a worker that shared its parent's file handle would move
    the parent's position in the file."""
    return zipfile.ZipFile(path)


def shown(item):
    """An image's path, or `train.zip@member` for a member of a zip file."""
    return "@".join(map(str, item)) if isinstance(item, tuple) else str(item)


def plain_jpeg(file, image):
    """The pixels of an RGB or grey JPEG without EXIF orientation, by torchvision's decoder, which
    is faster than Pillow's and gives the same result. None for any other image, for one that this
    decoder rejects, and if torchvision has no decoder."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or is_turned(image):
        return None
    file.seek(0)
    content = torch.frombuffer(file.read(), dtype=torch.uint8)      # warns that it is read-only
    try:
        with silent():
            return torchvision.io.decode_jpeg(content, torchvision.io.ImageReadMode.RGB)
    except Exception:
        return None


@contextlib.contextmanager
def silent():
    """Discard the process's stderr, to which libjpeg writes a line per damaged image."""
    with open(os.devnull, "wb") as null:
        kept = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def is_turned(image):
    """Whether an image has an EXIF orientation; damaged EXIF data count as none."""
    try:
        return image.getexif().get(0x0112, 1) != 1
    except Exception:
        return False


def upright(image):
    """An image with its EXIF orientation applied; damaged EXIF data count as none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:       # Pillow raises SyntaxError, struct.error, TypeError and others for them
        return image


def rgb(image, file_format=None):
    """A PIL image of any mode in RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow opens 16-bit PPM files, and before 10.3 also PNG files, as 32-bit
        wide = image.mode == "I" and file_format not in ("PNG", "PPM")
        return Image.fromarray(eight_bits(np.asarray(image), wide)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def eight_bits(values, wide=False):
    """Grey values of 16 bits, of 32 bits (wide) or floats as uint8.

    Floats in 0..1 are multiplied by 255, and values in 0..255 are left unchanged. 16-bit values are
    divided by 257. Any other range of 32-bit or float values is stretched to 0..255.
    """
    floats = values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64))
    low, high = values.min(), values.max()
    if floats and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 255:
        if floats or wide:
            values = (values - low) * (255 / max(high - low, 1e-12))
        else:
            values = values / 257
    return np.round(values).clip(0, 255).astype(np.uint8)


def as_pixels(image):
    """uint8 [3, H, W] of an RGB PIL image; stored as [H, W, 3], the layout resizing prefers."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_pil(pixels):
    """The PIL image of pixels [3, H, W]."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def read_tile(item):
    """A drawing of the built-in benchmark: (sheet of 40 in a row, number) -> 64 x 64 image."""
    sheet, number = item
    left, top = number % 40 * 64, number // 40 * 64
    return _sheet(sheet).crop((left, top, left + 64, top + 64))


@lru_cache
def _sheet(path):
    return Image.open(path).convert("RGB")


class Images(Dataset):
    """A list of (PIL image, label). `items` are paths, or anything that `read` turns into an RGB
    image.

    A label is a class number, or a tuple of them if the image has several classes; the first is the
    one it was sampled for. crop: whether an image that is not augmented is cropped at its centre,
    as CLIP does, or resized to a square. kept: {item: its pixels}, see `keep_all`.
    """

    def __init__(self, items, labels, read=read_image, kept=None, crop=True):
        self.items, self.labels, self.read = list(items), list(labels), read
        self.kept = {} if kept is None else kept
        self.crop = crop

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return as_pil(self.pixels(index)), self.labels[index]

    def __getstate__(self):
        return dict(self.__dict__, kept={})         # too much to send to a worker process

    def pixels(self, index):
        """An image as uint8 [3, H, W], from memory if it is kept there. Read-only."""
        item = self.items[index]
        if self.kept and item in self.kept:
            return self.kept[item]
        if self.read is read_image:
            return read_pixels(item)
        return as_pixels(self.read(item))

    @property
    def classes(self):
        """A class number per image; if it has several, the one that it was sampled for."""
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


def label_tensor(labels):
    """Labels as a tensor [B]; if one of them is a tuple of classes, the uniform distribution over
    each image's classes, [B, largest class + 1]."""
    if not any(isinstance(label, tuple) for label in labels):
        return torch.tensor(labels)
    several = [label if isinstance(label, tuple) else (label,) for label in labels]
    rows = torch.zeros(len(labels), 1 + max(max(classes) for classes in several))
    for row, classes in zip(rows, several):
        row[list(classes)] = 1 / len(classes)
    return rows


# ------------------------------------------------------------------------------- worker processes

class Loader:
    """Computes dataset[job] for the jobs of each epoch, in order; worker processes start once.

    dataset[job] is a tuple that can be pickled, or the message of a UserError; dataset.lists
    are the Images that it reads. workers: how many processes; None: one per CPU core, at most 8,
    for more than 400 files, else 0; 0 works everywhere.
    Workers start with the first epoch, see the dataset as it is then, and end with `close`. On
    Linux they are forked and share the images in memory (unless the program has set another start
    method); with spawn and forkserver they don't have these images and read the files again.
    """

    def __init__(self, dataset, workers=None):
        if workers is None:
            files = sum(len(images) for images in dataset.lists if images.read is read_image)
            may_use = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
            workers = min(8, len(may_use(0))) if files > 400 else 0
        self.dataset, self.workers = dataset, workers
        self.loader, self.jobs, self.epoch = None, _Jobs(), 0

    def load(self, jobs):
        """Yield dataset[job] for each job, in order, with its arrays as tensors. Raises UserError
        if a job or a worker process fails."""
        self.epoch += 1
        epoch = self.epoch
        try:
            items = map(self.dataset.__getitem__, jobs)
            if self.workers and length_hint(jobs, 1):
                items = self.by_workers(jobs)
            for item in items:
                if isinstance(item, str):
                    raise UserError(item)
                yield tuple(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in item)
                if self.workers and self.epoch != epoch:
                    raise RuntimeError("another epoch of this loader has started meanwhile")
        except (RuntimeError, OSError) as error:
            self.close()
            if self.workers and is_of_workers(error):
                raise UserError(f"the processes that read images died ({brief(error)}): give "
                                "--workers 0") from error
            raise

    def by_workers(self, jobs):
        """The DataLoader's iterator for an epoch; the first one starts the worker processes."""
        self.jobs.of_epoch = jobs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # torch warns of more workers than CPU cores
            if self.loader is None:
                self.loader = DataLoader(
                    self.dataset,
                    batch_size=None,
                    sampler=self.jobs,
                    num_workers=min(self.workers, length_hint(jobs, self.workers)),
                    collate_fn=unchanged,
                    persistent_workers=True,
                    multiprocessing_context=start_method(),
                    generator=torch.Generator(),    # so that nothing draws from the global one
                )
            try:
                return iter(self.loader)
            except (RuntimeError, OSError) as error:
                forget(error)
                raise

    def close(self):
        """End the worker processes; the next epoch would start new ones."""
        self.loader = None


class _Jobs:
    """A DataLoader's sampler: the jobs of the epoch."""

    def __iter__(self):
        return iter(self.of_epoch)


def unchanged(item):
    """A DataLoader's collate_fn that leaves arrays unchanged: they are sent through a pipe, while
    tensors would need shared memory, of which Docker gives 64 MB."""
    return item


def forget(error):
    """Free what the frames of an error hold, silently: a DataLoader iterator that could start only
    some of its processes ends those, and complains on stderr about the others."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    traceback.clear_frames(error.__traceback__)
    sys.unraisablehook = hook


def start_method():
    """How worker processes start: by fork on Linux, unless the program has set another method."""
    default = multiprocessing.get_all_start_methods()[0]
    chosen = multiprocessing.get_start_method(allow_none=True) or default
    return "fork" if sys.platform == "linux" and chosen == default else chosen


def is_of_workers(error):
    """Whether worker processes could not start or died, rather than raised an error themselves."""
    text = str(error)
    return not text.startswith("Caught ") and (isinstance(error, OSError) or "worker" in text)


class _Decoded(Dataset):
    """Job (list, indices, wanted) gives (list, indices, found), where found has for each image its
    array [H, W, 3], None if it is not wanted, or the error's message if decoding fails."""

    def __init__(self, lists):
        self.lists = lists

    def __getitem__(self, job):
        t, indices, wanted = job
        found = []
        for i in indices:
            try:
                pixels = self.lists[t].pixels(i)
                found.append(pixels.permute(1, 2, 0).numpy() if wanted else None)
            except UserError as error:
                found.append(str(error))
        return t, indices, found


def decoded(lists, workers=None, wanted=lambda t: False, text="check"):
    """Yield (list, index, pixels) of every image of some lists of Images, under a progress bar.

    pixels: uint8 [3, H, W]; None unless `wanted(list)` is True when the image's turn comes; the
    error's message if the image cannot be decoded.
    """
    def jobs():
        for t, images in enumerate(lists):
            for k in range(0, len(images), 8):
                yield t, range(k, min(k + 8, len(images))), wanted(t)

    loader = Loader(_Decoded(lists), workers)
    total = sum(map(len, lists))
    with tqdm(total=total, desc=text, delay=2, leave=False, disable=None) as bar:
        for t, indices, found in loader.load(jobs()):
            for i, pixels in zip(indices, found):
                if isinstance(pixels, np.ndarray):
                    pixels = torch.from_numpy(pixels).permute(2, 0, 1)
                yield t, i, pixels
            bar.update(len(indices))
    loader.close()


def keep_all(lists, room, workers=None):
    """Decode every image of some lists of Images, and keep those read from files in memory, as
    uint8 [3, H, W], until one does not fit into what is left of `room` bytes.

    What is already in memory (the built-in benchmark, CIFAR-100) is not kept twice. Raises
    UserError for the first image that cannot be decoded.
    """
    left = room

    def wanted(t):
        return left > 0 and lists[t].read is read_image

    for t, i, pixels in decoded(lists, workers, wanted):
        if isinstance(pixels, str):
            raise UserError(pixels)
        if pixels is None or not left:
            continue
        if pixels.nbytes > left:
            left = 0
        else:
            lists[t].kept[lists[t].items[i]] = pixels
            left -= pixels.nbytes


# ------------------------------------------------------------------------- the batches of a step

def plan(sizes, batch_size, mixed=False, views=0):
    """The steps of an epoch, each a list of (task, index, view).

    sizes: the number of training images of each task. mixed=False: a batch from every task in each
    step, in shuffled order; an epoch ends when the largest task has been seen once, smaller tasks
    and the last batch continue with a new shuffle. mixed=True: batches from the shuffled union of
    the tasks, every image once. views: how many views an image has; 0: unlimited (2**24, up to
    which all versions of torch draw the same). Draws from PyTorch's global generator, only here.
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
    numbers = iter(torch.randint(views or 2**24, (sum(map(len, steps)),)).tolist())
    return [[(t, i, next(numbers)) for t, i in step] for step in steps]


@dataclass
class Views(Dataset):
    """The views of a step of a `plan`: arrays (images uint8 [B, 3, size, size], labels, task [B]).

    lists: the tasks' Images; transforms: one per list. Each view is drawn with its own random seed,
    made from the run's seed, the task, the index and the view, so it depends neither on the worker
    process nor on other images. labels: as `label_tensor` returns them. A UserError is returned as
    its message, so that the worker process lives on.
    """

    lists: list
    transforms: list
    seed: int

    def __getitem__(self, step):
        pixels, labels = [], []
        try:
            with torch.random.fork_rng(devices=[]):
                for task, index, view in step:
                    image = self.lists[task].pixels(index)
                    name = f"{self.seed}/{task}/{index}/{view}"
                    torch.default_generator.manual_seed(random.Random(name).getrandbits(63))
                    pixels.append(self.transforms[task](image))
                    labels.append(self.lists[task].labels[index])
        except UserError as error:
            return str(error)
        tasks = np.array([task for task, _, _ in step])
        return torch.stack(pixels).numpy(), label_tensor(labels).numpy(), tasks


def views(lists, size, seed, min_crop=0.08, augment=None, workers=None):
    """A Loader of the Views of some lists of Images, whose jobs are the steps of a `plan`.

    A view is a random resized crop (min_crop to 1 of the area, bicubic) and a horizontal flip.
    If augment[task] is False, images are transformed as test images are.
    """
    augmented = v2.Compose([
        v2.RandomResizedCrop(size, (min_crop, 1), interpolation=InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip()])
    transforms = [augmented if augment is None or augment[t] else whole(size, images.crop)
                  for t, images in enumerate(lists)]
    return Loader(Views(lists, transforms, seed), workers)


def in_order(images, size, workers=None, batch=100):
    """Yield (images uint8 [B, 3, size, size], labels) of all images, as CLIP sees test images:
    resized to `size` (bicubic) and cropped at the centre, or whole if `images.crop` is False."""
    steps = [[(0, i, 0) for i in range(k, min(k + batch, len(images)))]
             for k in range(0, len(images), batch)]
    for pixels, labels, _ in views([images], size, 0, augment=[False], workers=workers).load(steps):
        yield pixels, labels


def whole(size, crop):
    """The transform of an image that is not augmented."""
    if not crop:
        return v2.Resize((size, size), InterpolationMode.BICUBIC)
    return v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.CenterCrop(size)])


def normalise(images):
    """Float images [B, 3, H, W] from uint8 ones: CLIP's ToTensor and Normalize."""
    x = images.float() / 255
    mean = torch.tensor(PIXEL_MEAN, device=x.device)[:, None, None]
    return (x - mean) / torch.tensor(PIXEL_STD, device=x.device)[:, None, None]


ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
# not images, or readable only on Windows
ENDINGS -= set(".pdf .eps .ps .mpg .mpeg .h5 .hdf .grib .bufr .fits .fit .emf .wmf".split())


def is_image(path):
    """Whether a file has an extension that Pillow reads."""
    path = Path(path)
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")
