"""Datasets as tasks: the eleven of CoOp (Zhou et al., IJCV 2022), `coop10` (without ImageNet) and
`coop11`.

They are read in CoOp's `$DATA` layout, with CoOp's split and class names, if `split_zhou_*.json`
exists, otherwise with torchvision's loader in torchvision's layout: its official split, with the
class names published with CLIP (data/class_names). SUN397, Caltech101 and EuroSAT have no official
split in torchvision; their test set is then what --split or --shots leaves. FGVC-Aircraft has an
official split in both layouts; ImageNet is tested on its validation images.

Templates are CoOp's, and so is the metric: plain accuracy for all eleven. (CLIP's own paper scores
OxfordPets, Flowers102, FGVCAircraft and Caltech101 by the mean over classes.)
"""
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchvision import datasets as tv

from ..errors import UserError, brief
from ..images import is_image
from .lists import (
    check_folder,
    compared,
    elsewhere,
    folders,
    images_in,
    label_names,
    plain,
    read_lines,
    read_text,
    split_listing,
)

CLASS_NAMES = Path(__file__).resolve().parents[1] / "class_names"
NO_SPLIT = {"train": None}                  # our parts -> torchvision's `split`
TWO = dict(train="train", test="test")
THREE = dict(train="train", val="val", test="test")
PETS = dict(train="trainval", test="test")


@dataclass
class Dataset:
    """Where a dataset is, and how it is read."""

    title: str
    template: str
    classes: int                # published number; in CoOp's split if there is one
    folder: str                 # in CoOp's $DATA
    images: str = "."           # folder in `folder` that the paths in CoOp's split are relative to
    split: str | None = None    # CoOp's split in `folder`
    loader: type | None = None  # torchvision's
    own: str | None = None      # torchvision's folder
    parts: dict | None = None


DATASETS = {
    "oxford_pets": Dataset(
        "OxfordPets", "a photo of a {}, a type of pet", 37, "oxford_pets", "images",
        "split_zhou_OxfordPets.json", tv.OxfordIIITPet, "oxford-iiit-pet", PETS),
    "stanford_cars": Dataset(
        "StanfordCars", "a photo of a {}", 196, "stanford_cars", ".",
        "split_zhou_StanfordCars.json", tv.StanfordCars, "stanford_cars", TWO),
    "oxford_flowers": Dataset(
        "Flowers102", "a photo of a {}, a type of flower", 102, "oxford_flowers", "jpg",
        "split_zhou_OxfordFlowers.json", tv.Flowers102, "flowers-102", THREE),
    "food101": Dataset(
        "Food101", "a photo of {}, a type of food", 101, "food-101", "images",
        "split_zhou_Food101.json", tv.Food101, "food-101", TWO),
    "fgvc_aircraft": Dataset(
        "FGVCAircraft", "a photo of a {}, a type of aircraft", 100, "fgvc_aircraft", "images",
        None, tv.FGVCAircraft, "fgvc-aircraft-2013b/data", NO_SPLIT),
    "dtd": Dataset(
        "DTD", "{} texture", 47, "dtd", "images", "split_zhou_DescribableTextures.json", tv.DTD,
        "dtd/dtd", THREE),
    "sun397": Dataset(
        "SUN397", "a photo of a {}", 397, "sun397", "SUN397", "split_zhou_SUN397.json", tv.SUN397,
        "SUN397", NO_SPLIT),
    "caltech101": Dataset(
        "Caltech101", "a photo of a {}", 100, "caltech-101", "101_ObjectCategories",
        "split_zhou_Caltech101.json", tv.Caltech101, "caltech101/101_ObjectCategories", NO_SPLIT),
    "ucf101": Dataset(
        "UCF101", "a photo of a person doing {}", 101, "ucf101", "UCF-101-midframes",
        "split_zhou_UCF101.json"),
    "eurosat": Dataset(
        "EuroSAT", "a centered satellite photo of {}", 10, "eurosat", "2750",
        "split_zhou_EuroSAT.json", tv.EuroSAT, "eurosat/2750", NO_SPLIT),
    "imagenet": Dataset("ImageNet", "a photo of a {}", 1000, "imagenet", "images"),
}


def dataset(name, root):
    """The one listing of a dataset, in a list."""
    check_folder(root, "--root")
    data = DATASETS[name]
    folder, remarks, classes = root / data.folder, [], data.classes
    if data.split and (folder / data.split).is_file():
        source, parts = folder / data.split, coop_split(folder / data.split, folder / data.images)
    elif name == "fgvc_aircraft":
        places = [root / p for p in (data.folder, data.own) if (root / p).is_dir()]
        if not places:
            raise missing(name, root)
        source, parts = places[0], aircraft(places[0])
    elif name == "imagenet" and folder.is_dir():
        source, parts = folder, imagenet(folder)
    elif data.loader and (root / data.own).is_dir():
        source, parts = root / data.own, official(name, root)
        classes += name == "caltech101"                         # CoOp leaves "Faces_easy" out
        if data.parts == NO_SPLIT:
            remarks = [f"{data.title} has no test set in {source}, so it is tested on the images "
                       f"not trained on: CoOp's test set is in {folder / data.split}"]
    else:
        raise missing(name, root)
    names = label_names(parts, source)
    listing = split_listing(data.title, data.template, parts, names, source, name)
    listing.remarks += remarks
    return compared([listing], data.title, source, classes)


def missing(name, root):
    """The UserError that says what belongs where."""
    data = DATASETS[name]
    own = {"fgvc_aircraft": "variants.txt", "imagenet": "classnames.txt"}
    needs = own.get(name, data.split)
    marks = [data.split] if data.split else []
    if data.images not in (".", "images", "jpg"):
        marks.append(data.images)
    line = (f"{data.title} needs {root / data.folder / needs}, with its images in "
            f"{root / data.folder / data.images}")
    if name in DOWNLOADS:
        line += f" (or torchvision's {root / data.own}, which --download fetches)"
    remedy = elsewhere(root, data.folder, marks) or "put them there or give another --root"
    return UserError(f"{line}: {remedy}")


def coop_split(path, folder):
    """{"train", "val", "test": [(path, label, class name)]} of a `split_zhou_*.json`."""
    text, parts = read_text(path), {}
    try:
        split = json.loads(text)
        for part in ("train", "val", "test"):
            parts[part] = []
            for image, label, name in split[part]:
                image = image.replace("\\", "/").lstrip("/")
                parts[part].append((f"{folder}/{image}", int(label), named(name)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a split in CoOp's format (train, val and test, each a list "
                        "of [image, label, class name]): download the file again") from error
    return parts


def named(name):
    """A class name of CoOp's files with spaces; CLIP's tokenizer makes it lower-case."""
    return " ".join(name.replace("_", " ").split())


def aircraft(folder):
    """FGVC-Aircraft's own lists: `variants.txt` names the classes; lines of
    `images_variant_*.txt` look like `1025794 707-320`."""
    label = {name.strip(): i for i, name in enumerate(read_lines(folder / "variants.txt"))}
    parts = {}
    for part in THREE:
        path, parts[part] = folder / f"images_variant_{part}.txt", []
        for line in read_lines(path):
            image, _, variant = line.strip().partition(" ")
            if variant not in label:
                raise UserError(f"{path} has the variant '{variant}', which is not in "
                                f"{folder / 'variants.txt'}: download the files again")
            parts[part].append((f"{folder}/images/{image}.jpg", label[variant], variant))
    return parts


def imagenet(folder):
    """ImageNet: `images/{train,val}/n01440764/*.JPEG`, `classnames.txt` with `n01440764 tench`."""
    lines = [line.strip().split(" ", 1) for line in read_lines(folder / "classnames.txt")]
    names, parts = dict(line for line in lines if len(line) == 2), {}
    for part, place in dict(train="train", test="val").items():
        place = folder / "images" / place
        check_folder(place)
        classes = folders(place)
        if not classes:
            holds = "images without class folders" if images_in(place) else "nothing"
            raise UserError(f"{place} holds {holds}: sort its images into folders such as "
                            f"{place / 'n01440764'}")
        parts[part] = []
        for p in classes:
            if p.name not in names:
                raise UserError(
                    f"{p} has no line in {folder / 'classnames.txt'}: download that file again "
                    "or remove the folder"
                )
            files = sorted(q.name for q in p.iterdir() if is_image(q))
            parts[part] += [(f"{p}/{file}", p.name, names[p.name]) for file in files]
    return parts


def official(name, root):
    """{"train", "test", "val": [(path, label, class name)]} from torchvision's loader."""
    data, published, parts = DATASETS[name], published_names(name), {}
    try:
        for part, split in data.parts.items():
            loaded = data.loader(root, split=split) if split else data.loader(root)
            parts[part] = [(str(path), label, published.get(plain(key), named(key)))
                           for path, label, key in images(name, loaded)]
    except Exception as error:     # damaged lists fail in many ways, scipy's .mat reader among them
        raise UserError(f"{data.title} in {root / data.own} is incomplete or damaged "
                        f"({brief(error)}): download it again") from error
    return parts


def images(name, loaded):
    """(path, label, the dataset's own class name) of every image of a torchvision dataset.

    Food101, DTD: the class name is the label, because torchvision numbers the classes of each part
    separately.
    """
    if name == "caltech101":
        top, found = f"{loaded.root}/101_ObjectCategories", []
        for i, k in zip(loaded.index, loaded.y):
            category = loaded.categories[k]
            found.append((f"{top}/{category}/image_{i:04d}.jpg", k, category))
        return found
    if name == "oxford_pets":
        pairs = zip(loaded._images, loaded._labels)
        return [(path, label, path.stem.rpartition("_")[0]) for path, label in pairs]
    if name == "stanford_cars":
        pairs = loaded._samples
    elif name == "eurosat":
        pairs = loaded.samples
    else:
        pairs = zip(loaded._image_files, loaded._labels)
    by_name = name in ("food101", "dtd")
    return [
        (path, loaded.classes[k] if by_name else int(k), loaded.classes[k]) for path, k in pairs
    ]


def published_names(name):
    """{plain key: class name} of data/class_names: CLIP's names, after a tab if the dataset's own
    name is different."""
    lines = read_lines(CLASS_NAMES / f"{name}.txt")
    return {plain(line.split("\t")[0]): line.split("\t")[-1] for line in lines}


def download(name, root):
    """Let torchvision download a dataset into `root`, unless it is already there."""
    data = DATASETS[name]
    if (root / data.folder / (data.split or "variants.txt")).is_file():
        return
    try:
        for split in data.parts.values():
            how = dict(split=split) if split else {}
            data.loader(root, download=True, **how)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{data.title} cannot be downloaded ({brief(error)}): put it into "
                        f"{root / data.own} yourself; data/README.md says where it is") from error


def several(names, root):
    """The listings of several datasets."""
    return [listing for name in names for listing in dataset(name, root)]


ELEVEN = list(DATASETS)
BENCHMARKS = {name: partial(dataset, name) for name in ELEVEN}
BENCHMARKS.update(coop10=partial(several, ELEVEN[:10]), coop11=partial(several, ELEVEN))
DOWNLOADS = {name: partial(download, name) for name, data in DATASETS.items()
             if data.loader and name != "stanford_cars"}
