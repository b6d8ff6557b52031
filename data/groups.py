"""Benchmarks whose tasks are groups of classes: CIFAR-100 as 20 coarse classes of 5."""
import pickle
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR100

from common import Listing, UserError


def download_cifar100(root):
    """Let torchvision fetch CIFAR-100 into `root`; nothing is fetched where it is there already."""
    try:
        CIFAR100(root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"CIFAR-100 cannot be downloaded ({' '.join(str(error).split())[:120]}): put {CIFAR100.url} into {root}, "
                        "unpacked") from error


def cifar100(root):
    """CIFAR-100's coarse classes as 20 tasks, each with its 5 fine classes, from `root/cifar-100-python`."""
    try:
        parts = [CIFAR100(root, train=train) for train in (True, False)]        # torchvision checks the files' hashes
    except (OSError, RuntimeError) as error:
        raise UserError(f"CIFAR-100 is not in {root}, or damaged: give --download to fetch it, or put the folder "
                        f"{CIFAR100.base_folder} there") from error
    folder, spoken = Path(root) / CIFAR100.base_folder, lambda name: name.replace("_", " ")
    coarse_names = _unpickled(folder / "meta")["coarse_label_names"]
    coarse = _unpickled(folder / "train")["coarse_labels"]
    members = [sorted({fine for fine, c in zip(parts[0].targets, coarse) if c == k}) for k in range(len(coarse_names))]
    images = [{}, {}]                                                           # fine label -> its images, as arrays
    for part, found in zip(parts, images):
        for array, fine in zip(part.data, part.targets):
            found.setdefault(fine, []).append(array)
    return [Listing(spoken(name), [spoken(parts[0].classes[f]) for f in fine], "a photo of a {}", [images[0][f] for f in fine],
                    draw=f"cifar100/{name}", test=[images[1].get(f, []) for f in fine], read=read_array)
            for name, fine in zip(coarse_names, members)]


def read_array(array):
    return Image.fromarray(array)


def _unpickled(path):
    """A file of the archive whose hash torchvision has checked."""
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")
