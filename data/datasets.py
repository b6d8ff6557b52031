"""Datasets as tasks: the eleven of CoOp (Zhou et al., IJCV 2022), each by name, and `coop10` (without ImageNet) and `coop11`.

They are read in CoOp's `$DATA` layout, with CoOp's split and class names (`split_zhou_*.json`) where that file is there, and else
with torchvision's loader in torchvision's layout: its official split, with the class names published with CLIP (data/class_names).
SUN397, Caltech101 and EuroSAT have no official split in torchvision; what --split or --shots leaves is their test set then.
FGVC-Aircraft has an official split in both layouts; ImageNet is tested on its validation images.

Templates are CoOp's, and so is the metric: plain accuracy for all eleven. (CLIP's own paper scores OxfordPets, Flowers102,
FGVCAircraft and Caltech101 by the mean over classes.)
"""
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torchvision import datasets as tv

from common import UserError
from multitask_prompt_files import (ENDINGS, check_folder, compared, elsewhere, folders, images_in, label_names, read_lines,
                                    split_listing)


class Dataset(NamedTuple):
    """Where a dataset is, and how it is read."""
    title: str
    template: str
    classes: int                # published; in CoOp's split for those that have one
    folder: str                 # in CoOp's $DATA
    images: str = "."           # folder in `folder` that the paths of CoOp's split start from
    split: str = None           # CoOp's split in `folder`
    loader: type = None         # torchvision's
    own: str = None             # torchvision's folder
    parts: dict = {"train": None}                       # our parts -> torchvision's `split`; None: it has no split


TWO, THREE = dict(train="train", test="test"), dict(train="train", val="val", test="test")
DATASETS = {
    "oxford_pets": Dataset("OxfordPets", "a photo of a {}, a type of pet", 37, "oxford_pets", "images", "split_zhou_OxfordPets.json",
                           tv.OxfordIIITPet, "oxford-iiit-pet", dict(train="trainval", test="test")),
    "stanford_cars": Dataset("StanfordCars", "a photo of a {}", 196, "stanford_cars", ".", "split_zhou_StanfordCars.json",
                             tv.StanfordCars, "stanford_cars", TWO),
    "oxford_flowers": Dataset("Flowers102", "a photo of a {}, a type of flower", 102, "oxford_flowers", "jpg",
                              "split_zhou_OxfordFlowers.json", tv.Flowers102, "flowers-102", THREE),
    "food101": Dataset("Food101", "a photo of {}, a type of food", 101, "food-101", "images", "split_zhou_Food101.json",
                       tv.Food101, "food-101", TWO),
    "fgvc_aircraft": Dataset("FGVCAircraft", "a photo of a {}, a type of aircraft", 100, "fgvc_aircraft", "images", None,
                             tv.FGVCAircraft, "fgvc-aircraft-2013b/data"),
    "dtd": Dataset("DTD", "{} texture", 47, "dtd", "images", "split_zhou_DescribableTextures.json", tv.DTD, "dtd/dtd", THREE),
    "sun397": Dataset("SUN397", "a photo of a {}", 397, "sun397", "SUN397", "split_zhou_SUN397.json", tv.SUN397, "SUN397"),
    "caltech101": Dataset("Caltech101", "a photo of a {}", 100, "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json",
                          tv.Caltech101, "caltech101/101_ObjectCategories"),
    "ucf101": Dataset("UCF101", "a photo of a person doing {}", 101, "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
    "eurosat": Dataset("EuroSAT", "a centered satellite photo of {}", 10, "eurosat", "2750", "split_zhou_EuroSAT.json",
                       tv.EuroSAT, "eurosat/2750"),
    "imagenet": Dataset("ImageNet", "a photo of a {}", 1000, "imagenet", "images"),
}


def dataset(name, root):
    """The one listing of a dataset, in a list."""
    check_folder(root, "--root")
    data = DATASETS[name]
    folder, notes = root / data.folder, []
    classes = data.classes
    if data.split and (folder / data.split).is_file():
        source, parts = folder / data.split, coop_split(folder / data.split, folder / data.images)
    elif name == "fgvc_aircraft" and (folder := next((root / p for p in (data.folder, data.own) if (root / p).is_dir()), None)):
        source, parts = folder, aircraft(folder)
    elif name == "imagenet" and folder.is_dir():
        source, parts = folder, imagenet(folder)
    elif data.loader and (root / data.own).is_dir() and name != "fgvc_aircraft":
        source, parts = root / data.own, official(name, root)
        classes += name == "caltech101"                                         # CoOp leaves "Faces_easy" out
        if data.parts == {"train": None}:
            notes = [f"{data.title} has no test set in {source}, so its tests are on what the training leaves: CoOp's is in "
                     f"{folder / data.split}"]
    else:
        raise missing(name, root)
    names = label_names(parts, source)
    listing = split_listing(data.title, data.template, parts, names, source, name)
    listing.notes = notes
    return compared([listing], data.title, source, classes)


def missing(name, root):
    """The UserError that says what belongs where."""
    data = DATASETS[name]
    needs = {"fgvc_aircraft": "variants.txt", "imagenet": "classnames.txt"}.get(name, data.split)
    marks = [mark for mark in (data.split, None if data.images in (".", "images", "jpg") else data.images) if mark]
    line = f"{data.title} needs {root / data.folder / needs}, with its images in {root / data.folder / data.images}"
    if name in DOWNLOADS:
        line += f" (or torchvision's {root / data.own}, which --download fetches)"
    return UserError(f"{line}: {elsewhere(root, data.folder, marks) or 'put them there or give another --root'}")


def coop_split(path, folder):
    """{"train", "val", "test": [(path, label, class name)]} of a `split_zhou_*.json`."""
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        return {part: [(f"{folder}/{image.lstrip('/')}", int(label), named(name)) for image, label, name in split[part]]
                for part in ("train", "val", "test")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a split of CoOp's (train, val and test, each a list of [image, label, class name]): "
                        "get the file anew") from error


def named(name):
    """A class name of CoOp's files with spaces; letters stay as they are, CLIP's tokenizer lowers them."""
    return " ".join(name.replace("_", " ").split())


def aircraft(folder):
    """FGVC-Aircraft's own lists: `variants.txt` names the classes, a line of `images_variant_*.txt` is `1025794 707-320`."""
    label = {name.strip(): i for i, name in enumerate(read_lines(folder / "variants.txt"))}
    parts = {}
    for part in THREE:
        path = folder / f"images_variant_{part}.txt"
        rows = [line.strip().partition(" ") for line in read_lines(path)]
        unknown = [variant for _, _, variant in rows if variant not in label]
        if unknown:
            raise UserError(f"{path} has the variant '{unknown[0]}', which is not in {folder / 'variants.txt'}: get the files anew")
        parts[part] = [(f"{folder}/images/{image}.jpg", label[variant], variant) for image, _, variant in rows]
    return parts


def imagenet(folder):
    """ImageNet's `images/{train,val}/n01440764/*.JPEG`; a line of `classnames.txt` is `n01440764 tench`."""
    names = dict(line.strip().split(" ", 1) for line in read_lines(folder / "classnames.txt") if " " in line.strip())
    parts = {}
    for part, place in dict(train=folder / "images" / "train", test=folder / "images" / "val").items():
        check_folder(place)
        classes = folders(place)
        if not classes:
            holds = "images themselves" if images_in(place) else "nothing"
            raise UserError(f"{place} holds {holds}: sort its images into folders such as {place / 'n01440764'}")
        unknown = [p for p in classes if p.name not in names]
        if unknown:
            raise UserError(f"{unknown[0]} has no line in {folder / 'classnames.txt'}: get that file anew or take the folder away")
        parts[part] = [(f"{p}/{file}", p.name, names[p.name]) for p in classes for file in sorted(os.listdir(p))
                       if Path(file).suffix.lower() in ENDINGS and not file.startswith(".")]
    return parts


def official(name, root):
    """{"train", "test", "val": [(path, label, class name)]} by torchvision's loader; no image is opened."""
    data, published = DATASETS[name], published_names(name)
    try:
        parts = {part: data.loader(root, split=split) if split else data.loader(root) for part, split in data.parts.items()}
    except Exception as error:              # damaged lists fail in many ways, those of scipy's .mat reader among them
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:120]
        raise UserError(f"{data.title} in {root / data.own} is incomplete or damaged ({reason}): get it anew") from error
    return {part: [(str(path), label, published.get(plain(key), named(key))) for path, label, key in images(name, loaded)]
            for part, loaded in parts.items()}


def images(name, loaded):
    """(path, label, the dataset's own class name) of every image of a torchvision dataset. Labels sort the classes.

    Food101, DTD: the class name is the label, because torchvision numbers the classes of each part by itself.
    """
    if name == "caltech101":
        top = f"{loaded.root}/101_ObjectCategories"
        return [(f"{top}/{loaded.categories[k]}/image_{i:04d}.jpg", k, loaded.categories[k]) for i, k in zip(loaded.index, loaded.y)]
    if name == "oxford_pets":
        return [(path, label, path.stem.rpartition("_")[0]) for path, label in zip(loaded._images, loaded._labels)]
    if name in ("stanford_cars", "eurosat"):
        pairs = loaded._samples if name == "stanford_cars" else loaded.samples
    else:
        pairs = zip(loaded._image_files, loaded._labels)
    by_name = name in ("food101", "dtd")
    return [(path, loaded.classes[k] if by_name else int(k), loaded.classes[k]) for path, k in pairs]


def published_names(name):
    """{plain key: class name} of data/class_names: CLIP's names, behind a tab where the dataset's own name is another."""
    lines = read_lines(Path(__file__).with_name("class_names") / f"{name}.txt")
    return {plain(line.split("\t")[0]): line.split("\t")[-1] for line in lines}


def plain(name):
    return re.sub("[^a-z0-9]", "", name.lower())


def download(name, root):
    """Let torchvision fetch a dataset into `root`; nothing is fetched where it is there already, in CoOp's layout or torchvision's."""
    data = DATASETS[name]
    if (root / data.folder / (data.split or "variants.txt")).is_file():
        return
    try:
        for split in data.parts.values():
            data.loader(root, split=split, download=True) if split else data.loader(root, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{data.title} cannot be downloaded ({' '.join(str(error).split())[:120]}): put it into {root / data.own} "
                        "yourself, data/README.md says where it is") from error


def several(names, root):
    return [listing for name in names for listing in dataset(name, root)]


ELEVEN = list(DATASETS)
BENCHMARKS = {**{name: partial(dataset, name) for name in ELEVEN}, "coop10": partial(several, ELEVEN[:10]),
              "coop11": partial(several, ELEVEN)}
DOWNLOADS = {name: partial(download, name) for name, data in DATASETS.items() if data.loader and name != "stanford_cars"}
