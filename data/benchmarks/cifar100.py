"""Class groups as tasks: CIFAR-100's 20 coarse classes, of 5 classes each."""
import pickle
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR100

from ..errors import UserError, brief
from ..listing import Listing


def download(root):
    """Let torchvision download CIFAR-100 into `root`, unless it is already there."""
    try:
        CIFAR100(root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"CIFAR-100 cannot be downloaded ({brief(error)}): get {CIFAR100.url} "
                        f"yourself and unpack it into {root}") from error


def cifar100(root):
    """The coarse classes as 20 tasks, each with its 5 classes, from `root/cifar-100-python`."""
    try:
        train, test = (CIFAR100(root, train=part) for part in (True, False))    # checks the hashes
    except (OSError, RuntimeError) as error:
        raise UserError(f"CIFAR-100 is not in {root}, or is damaged: give --download to fetch it, "
                        f"or put the folder {CIFAR100.base_folder} there") from error
    folder = Path(root) / CIFAR100.base_folder
    coarse_names = unpickled(folder / "meta")["coarse_label_names"]
    coarse = unpickled(folder / "train")["coarse_labels"]
    pairs = sorted(set(zip(coarse, train.targets)))
    members = [[fine for c, fine in pairs if c == k] for k in range(len(coarse_names))]
    arrays = [{}, {}]                                           # fine label -> its images
    for part, found in zip((train, test), arrays):
        for array, fine in zip(part.data, part.targets):
            found.setdefault(fine, []).append(array)
    listings = []
    for name, fine in zip(coarse_names, members):
        listings.append(Listing(
            name.replace("_", " "), [train.classes[f].replace("_", " ") for f in fine],
            "a photo of a {}", [arrays[0][f] for f in fine], draw=f"cifar100/{name}",
            test=[arrays[1].get(f, []) for f in fine], read=Image.fromarray))
    return listings


def unpickled(path):
    """A file of the archive, whose hash torchvision has checked."""
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


BENCHMARKS = dict(cifar100=cifar100)
DOWNLOADS = dict(cifar100=download)
