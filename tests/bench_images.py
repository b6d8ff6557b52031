"""What it costs to turn an image file into a tensor, compared with Pillow.

    python tests/bench_images.py
    python tests/bench_images.py --images my/photographs

JPEGs of 500x500 to 1200x900, made from two photographs that come with scikit-learn (or the images
of a folder, unchanged). At every stage the two ways are timed alternately, in one process with one
thread, in CPU time, so that other processes hardly change the ratio; the best of --repeats counts.
Pillow's way is `Image.open`, `exif_transpose`, `convert("RGB")` and torchvision's transforms of PIL
images, as in the clip package. The last lines are the overhead of an epoch of two steps with two
worker processes, excluding its images.
"""
import argparse
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

SIZES = [(500, 500), (640, 480), (800, 600), (900, 900), (1024, 768), (1200, 900)]
MEGABYTES = 1000        # of images in memory when the worker processes start


def made(folder):
    """Twelve JPEGs of photographs."""
    from sklearn.datasets import load_sample_image
    for name in ("china.jpg", "flower.jpg"):
        photograph = Image.fromarray(load_sample_image(name))
        for size in SIZES:
            photograph.resize(size, Image.Resampling.BICUBIC).save(
                Path(folder) / f"{size[0]}x{size[1]} {name}", quality=90)


def pillows_file(path):
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def array(image):
    return np.asarray(image).transpose(2, 0, 1)


def stages(files, size):
    """[(a stage, Pillow's way, ours)], each a list of calls."""
    bicubic = InterpolationMode.BICUBIC
    whole = transforms.Compose([transforms.Resize(size, bicubic), transforms.CenterCrop(size)])
    augmented = transforms.Compose([
        transforms.RandomResizedCrop(size, (0.08, 1), interpolation=bicubic),
        transforms.RandomHorizontalFlip()])
    normalised = transforms.Compose([
        transforms.ToTensor(),
        transforms.Normalize(data.images.PIXEL_MEAN, data.images.PIXEL_STD)])
    open_images = [pillows_file(path) for path in files]

    def view(image, number):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"1/0/{number}/0").getrandbits(63))
            return array(augmented(image))

    from_files = data.Images(files, [0] * len(files))
    in_memory = from_files.subset(range(len(files)))
    in_memory.kept = {path: data.images.read_pixels(path) for path in files}
    tests = data.views([in_memory], size, 1, augment=[False], workers=0).dataset
    read_tests = data.views([from_files], size, 1, augment=[False], workers=0).dataset
    views = data.views([in_memory], size, 1, workers=0).dataset
    read_views = data.views([from_files], size, 1, workers=0).dataset
    n = range(len(files))
    step = [(0, i, 0) for i in n]
    pictures = [whole(image) for image in open_images]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return [
        ("a file decoded",
         lambda: [pillows_file(path) for path in files],
         lambda: [data.images.read_pixels(path) for path in files]),
        ("resized and cropped at the centre",
         lambda: [array(whole(image)) for image in open_images],
         lambda: tests[step]),
        ("a file to a test image",
         lambda: [array(whole(pillows_file(path))) for path in files],
         lambda: read_tests[step]),
        ("an image in memory to a training view",
         lambda: [view(open_images[i].copy(), i) for i in n],
         lambda: views[step]),
        ("a file to a training view",
         lambda: [view(pillows_file(files[i]), i) for i in n],
         lambda: read_views[step]),
        ("normalised, float32",
         lambda: torch.stack([normalised(picture) for picture in pictures]),
         lambda: data.normalise(pixels)),
    ]


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def epoch_starts(files):
    """The overhead of the first epoch and of each later one, excluding their images: milliseconds
    of CPU time of this process and its two workers, with MEGABYTES of images in memory."""
    pixels = data.images.read_pixels(files[0])
    images = data.Images(range(2), [0, 0])
    images.kept = {i: pixels[:, :8, :8].clone() for i in range(2)}
    for i in range(MEGABYTES * 2**20 // pixels.nbytes):
        images.kept[f"another {i}"] = pixels.clone()

    def used():
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + workers.ru_utime + workers.ru_stime

    def cost(epochs):
        start, views = used(), data.views([images], 8, 1, workers=2)
        for epoch in range(epochs):
            list(views.load([[(0, 0, epoch)], [(0, 1, epoch)]]))
        views.close()
        return used() - start

    cost(1)
    first = cost(1)
    return 1000 * first, 1000 * (cost(101) - first) / 100


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="a folder of images to use instead of the photographs")
    parser.add_argument("--size", type=int, default=224, help="the backbone's image size")
    parser.add_argument("--repeats", type=int, default=5)
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not words.images:
            made(folder)
        files = [path for path in sorted(Path(words.images or folder).iterdir())
                 if data.images.is_image(path)]
        print(f"{len(files)} images, to {words.size}x{words.size}: images per second and core\n")
        print(f"{'':40}{'Pillow':>10}{'here':>10}{'ratio':>8}")
        for name, *ways in stages(files, words.size):
            turns = [[seconds(way) for way in ways] for _ in range(words.repeats + 1)]
            pillow, here = map(min, zip(*turns[1:]))
            print(f"{name:40}{len(files) / pillow:10.0f}{len(files) / here:10.0f}"
                  f"{pillow / here:8.2f}", flush=True)
        if hasattr(resource, "RUSAGE_CHILDREN"):
            first, later = epoch_starts(files)
            print(f"\nan epoch of two steps with two workers, {MEGABYTES} MB of images in memory: "
                  f"{first:.0f} ms for the first,\n{later:.1f} ms for each later one")


if __name__ == "__main__":
    main()
