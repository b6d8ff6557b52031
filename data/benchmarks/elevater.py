"""Datasets as tasks: ELEVATER's twenty (Li et al., NeurIPS 2022), `elevater20`, and `elevater12`,
those that are not among CoOp's eleven.

They are read as the toolkit of ELEVATER stores them, `root/classification/FOLDER/`: an index per
part, either `train.txt` with lines `train.zip@path label[,label]`, whose labels count the lines of
`labels.txt`, or a JSON file in COCO's format; and the images in zip files, or the same unpacked.
Zip files are read in place, without unpacking. If that folder is missing but torchvision's exists,
torchvision's split is used.

Class names (data/class_names/elevater), templates (the first of several) and metrics are the
toolkit's, except that HatefulMemes is scored by accuracy (the toolkit: ROC AUC), as in MVLPT's
tables, whose cells are multiples of 1/15 %, and in the last version of its program. The toolkit's
validation parts are not used: MVLPT holds out 20% of the few-shot set. Images are resized to a
square in training and test, neither cropped nor augmented: MVLPT's program has `CENTER_CROP: False`
for all twenty. In VOC 2007 an image has several classes; it is sampled for the rarest of them, so
that `--shots k` finds k images per class.

Every text here ends in one full stop. As published, two datasets' texts do not: PatchCamelyon's
template has none, and KITTI's class names end in one already, so with learned prompts there are
two.
"""
import json
import os
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from torchvision import datasets as tv

from ..errors import UserError, brief
from ..images import read_image, rgb
from . import coop
from .lists import check_folder, compared, elsewhere, read_lines, read_text, split_listing

CLASS_NAMES = Path(__file__).resolve().parents[1] / "class_names" / "elevater"


@dataclass
class Dataset:
    """Where a dataset is, and how it is read."""

    title: str                  # as data/paper_results.json has it
    template: str
    folder: str                 # in the toolkit's `classification`
    train: tuple                # index file, and the published number of images
    test: tuple
    labels: str | None = "labels.txt"       # None: the index has the categories
    metric: str = "accuracy"
    several: bool = False       # whether an image may have several classes
    own: str | None = None      # torchvision's folder, if torchvision has such a split
    coop: str | None = None     # the name of the dataset among CoOp's


DATASETS = {
    "caltech-101": Dataset(
        "Caltech101", "a photo of a {}", "caltech_101_20211007", ("train.txt", 3060),
        ("test.txt", 6084), metric="mean per class", coop="caltech101"),
    "cifar-10": Dataset(
        "CIFAR10", "a photo of a {}", "cifar_10_20211007", ("train.txt", 50000),
        ("test.txt", 10000), own="cifar-10-batches-py"),
    "cifar-100": Dataset(
        "CIFAR100", "a photo of a {}", "cifar100_20200721", ("train_images.txt", 50000),
        ("test_images.txt", 10000), own="cifar-100-python"),
    "country211": Dataset(
        "Country211", "a photo i took in {}", "country211_20210924", ("train.txt", 31650),
        ("test.txt", 21100), own="country211"),
    "dtd": Dataset(
        "DTD", "a photo of a {} texture", "dtd_20211007", ("train.txt", 1880), ("test.txt", 1880),
        own="dtd/dtd", coop="dtd"),
    "eurosat_clip": Dataset(
        "EuroSAT", "a centered satellite photo of {}", "eurosat_clip_20210930",
        ("train.txt", 5000), ("test.txt", 5000), coop="eurosat"),
    "fer-2013": Dataset(
        "FER2013", "a photo of a {} looking face", "fer_2013_20211008", ("train.txt", 28709),
        ("test.txt", 3589), own="fer2013"),
    "fgvc-aircraft-2013b-variants102": Dataset(
        "FGVCAircraft", "a photo of a {}, a type of aircraft",
        "fgvc_aircraft_2013b_variants102_20211007", ("train.txt", 3334), ("test.txt", 3333),
        metric="mean per class", own="fgvc-aircraft-2013b/data", coop="fgvc_aircraft"),
    "oxford-flower-102": Dataset(
        "Flowers102", "a photo of a {}, a type of flower", "oxford_flower_102_20211007",
        ("train.txt", 1020), ("test.txt", 6149), metric="mean per class",
        own="flowers-102", coop="oxford_flowers"),
    "food-101": Dataset(
        "Food101", "a photo of {}, a type of food", "food_101_20211007", ("train.txt", 75750),
        ("test.txt", 25250), own="food-101", coop="food101"),
    "gtsrb": Dataset(
        "GTSRB", 'a zoomed in photo of a "{}" traffic sign', "gtsrb_20210923",
        ("train.txt", 26640), ("test.txt", 12630), labels="labelmap.txt", own="gtsrb"),
    "hateful-memes": Dataset(
        "HatefulMemes", "a {}", "hateful_memes_20211014", ("train_meta.json", 8500),
        ("test_meta.json", 500), labels=None),
    "kitti-distance": Dataset(
        "KITTI", "{}", "kitti_distance_20210923", ("train_meta.json", 6347),
        ("test_meta.json", 711), labels=None),
    "mnist": Dataset(
        "MNIST", 'a photo of the number: "{}"', "mnist_20211008", ("train.txt", 60000),
        ("test.txt", 10000), own="MNIST"),
    "oxford-iiit-pets": Dataset(
        "OxfordPets", "a photo of a {}, a type of pet", "oxford_iiit_pets_20211007",
        ("train.txt", 3680), ("test.txt", 3669), metric="mean per class", own="oxford-iiit-pet",
        coop="oxford_pets"),
    "patch-camelyon": Dataset(
        "PatchCamelyon", "this is a photo of {}", "patch_camelyon_20211007",
        ("train.txt", 262144), ("test.txt", 32768), own="pcam"),
    "rendered-sst2": Dataset(
        "RenderedSST2", "a {} review of a movie", "rendered_sst2_20210924", ("train.txt", 6920),
        ("test.txt", 1821), own="rendered-sst2"),
    "resisc45_clip": Dataset(
        "RESISC45", "satellite imagery of {}", "resisc45_clip_20210924", ("train.json", 3150),
        ("test.json", 25200), labels=None),
    "stanford-cars": Dataset(
        "StanfordCars", "a photo of a {}", "stanford_cars_20211007", ("train.txt", 8144),
        ("test.txt", 8041), own="stanford_cars", coop="stanford_cars"),
    "voc-2007-classification": Dataset(
        "VOC2007", "a photo of a {}", "voc2007_20211007", ("train_ic.txt", 2501),
        ("test_ic.txt", 4952), metric="11-point mAP", several=True, own="VOCdevkit/VOC2007"),
}
NOT_FETCHED = ("fer-2013", "stanford-cars")     # torchvision reads but cannot download them


def dataset(name, root):
    """The one listing of a dataset, in a list."""
    check_folder(root, "--root")
    data = DATASETS[name]
    source, read = root / "classification" / data.folder, read_image
    if source.is_dir():
        names, parts = toolkit(name, source)
    elif data.own and (root / data.own).is_dir():
        source = root / data.own
        names, parts = official(name, root)
        if name in IN_MEMORY:
            read = read_official
    else:
        raise missing(name, root)
    listing = as_listing(name, names, parts, source)
    listing.read = read
    published = len(published_names(name))
    images = data.train[1] + data.test[1]
    return compared([listing], data.title, source, published, images)


def as_listing(name, names, parts, source):
    """The Listing of {"train", "test": [(image, classes)]}, its images drawn class by class."""
    data = DATASETS[name]
    counts = Counter(k for _, classes in parts["train"] for k in classes)
    labels, lists = {}, {}
    for part, images in parts.items():
        lists[part] = []
        for image, classes in images:
            labels[image] = tuple(sorted(set(classes), key=lambda k: (counts[k], k)))
            first = labels[image][0]
            lists[part].append((image, first, names[first]))
    # a class may occur only in images that are sampled for a rarer one
    held = [{k for _, classes in images for k in classes} for images in parts.values()]
    lacking = {names[k] for k in set.intersection(*held)}
    found = split_listing(data.title, data.template, lists, dict(enumerate(names)), source,
                          f"elevater/{name}", lacking)
    found.metric, found.augment, found.crop = data.metric, False, False
    if data.several:
        found.labels = labels
    return found


def missing(name, root):
    """The UserError that says what belongs where."""
    data = DATASETS[name]
    line = f"{data.title} needs {root / 'classification' / data.folder / data.train[0]} and so on"
    if data.own and name not in NOT_FETCHED:
        line += f" (or torchvision's {root / data.own}, which --download fetches)"
    remedy = elsewhere(root, "classification", [data.folder])
    return UserError(f"{line}: {remedy or 'put them there or give another --root'}")


def published_names(name):
    """The class names of the toolkit in label order."""
    return read_lines(CLASS_NAMES / f"{name}.txt")


# ----------------------------------------------------------------------------- the toolkit's layout

def toolkit(name, folder):
    """(class names, {"train", "test": [(image, classes)]}) of a folder of the toolkit."""
    data, parts = DATASETS[name], {}
    for part, (index, _) in dict(train=data.train, test=data.test).items():
        path = folder / index
        if data.labels:
            own = [line.strip() for line in read_lines(folder / data.labels)]
            entries = read_index(path, len(own), folder / data.labels)
        else:
            own, entries = read_coco(path)
        for place, image, classes in entries:
            if not classes:
                raise UserError(f"{place} has no label ('{image}'): download the file again")
            if len(set(classes)) > 1 and not data.several:
                raise UserError(f"{place} has {len(classes)} labels, but an image of {data.title} "
                                "has one: download the file again")
        parts[part] = located(folder, entries)
    published = published_names(name)
    return published if len(own) == len(published) else list(map(coop.named, own)), parts


def read_index(path, n_classes, labels):
    """[(file and line, image, classes)] of an index with lines `train.zip@path label[,label]`.

    labels: the file that names the classes, of which there are n_classes.
    """
    entries, numbered = [], re.compile(r"\d{1,9}(,\d{1,9})*", re.ASCII)
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number},"
        image, _, numbers = line.strip().rpartition(" ")
        if not image or not numbered.fullmatch(numbers):
            raise UserError(f"{place} has no label ('{line.strip()[:80]}'), but a line should be "
                            "an image, a space and its labels: download the file again")
        classes = [int(k) for k in numbers.split(",")]
        if max(classes) >= n_classes:
            raise UserError(f"{place} has the label {max(classes)}, but the {n_classes} classes of "
                            f"{labels} have the labels 0 to {n_classes - 1}: download the files "
                            "again")
        entries.append((place, image, classes))
    return entries


def read_coco(path):
    """(class names, [(file and image, image, classes)]) of an index in COCO's format."""
    text = read_text(path)
    try:
        content = json.loads(text)
        categories = sorted((c["id"], c["name"]) for c in content["categories"])
        images = {x["id"]: f"{x['zip_file']}@{x['file_name']}" if x.get("zip_file")
                  else x["file_name"] for x in content["images"]}
        pairs = [(x["image_id"], x["category_id"]) for x in content["annotations"]]
        own = [name.strip() for _, name in categories]
        whole = (all(isinstance(image, str) and image.isprintable() for image in images.values())
                 and all(isinstance(key, int) for pair in pairs for key in pair)
                 and len(images) == len(content["images"])
                 and len(dict(categories)) == len(categories))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise not_coco(path) from error
    if not whole:
        raise not_coco(path)
    number, classes = {key: k for k, (key, _) in enumerate(categories)}, {}
    for image, category in pairs:
        if category not in number:
            raise UserError(f"{path}, annotation of image {image}, has the label {category}, which "
                            "is not one of its categories: download the file again")
        if image not in images:
            raise UserError(f"{path} has an annotation of image {image}, which it does not list: "
                            "download the file again")
        classes.setdefault(image, []).append(number[category])
    return own, [(f"{path}, image {key},", file, classes.get(key, []))
                 for key, file in images.items()]


def not_coco(path):
    """The UserError of an index that is not what it should be."""
    return UserError(f"{path} is not an index in COCO's format (images, annotations and "
                     "categories): download the file again")


def located(folder, entries):
    """[(image, classes)]: images as read_image takes them, from the entries of an index."""
    found, known = [], {}               # known: what is in a zip file, or in an unpacked folder
    for place, image, classes in entries:
        archive, member = "", image.replace("\\", "/")
        if ".zip@" in member:
            archive, _, member = member.partition(".zip@")
            archive += ".zip"
        if leads_out(archive) or leads_out(member):
            raise UserError(f"{place} names '{image}', which leads out of the dataset's folder: "
                            "download the file again")
        if archive not in known:
            known[archive] = opened(folder, archive, member, place)
        path, members = known[archive]
        item = (str(path), member)
        if members is None:
            item = f"{path}/{member}"
            path, _, member = item.rpartition("/")
            if path not in known:
                known[path] = path, set(os.listdir(path)) if os.path.isdir(path) else ()
            members = known[path][1]
        if member not in members:
            raise UserError(f"{place} names {member}, which is not in {path}: download the images "
                            "again")
        found.append((item, classes))
    return found


def leads_out(path):
    """Whether a path with slashes is absolute (`/x`, `C:/x`) or contains `..`."""
    return path.startswith("/") or path[1:2] == ":" or ".." in path.split("/")


def opened(folder, archive, member, place):
    """(zip file, its members), or if it is unpacked (the folder of its members, None).

    member: the first member needed, named at `place`.
    """
    path = folder / archive
    if not archive:
        return folder, None
    if not path.is_file():
        for unpacked in (path.with_suffix(""), path.parent):
            if (unpacked / member).is_file():
                return unpacked, None
        raise UserError(f"{place} names {path}, which is not there: put it there, or unpack it "
                        f"into {path.with_suffix('')}")
    try:
        with zipfile.ZipFile(path) as file:
            members = set(file.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"{place} names {path}, which is not a complete zip file "
                        f"({brief(error)}): download it again") from error
    for name in members:
        if leads_out(name.replace("\\", "/")):
            raise UserError(f"{path} has a member {name!r} that leads out of its folder: download "
                            "the zip file again")
    return path, members


# ----------------------------------------------------------------------------- torchvision's layout

LOADERS = {"cifar-10": tv.CIFAR10, "cifar-100": tv.CIFAR100, "country211": tv.Country211,
           "fer-2013": tv.FER2013, "gtsrb": tv.GTSRB, "mnist": tv.MNIST, "patch-camelyon": tv.PCAM,
           "rendered-sst2": tv.RenderedSST2}
IN_MEMORY = ("cifar-10", "cifar-100", "fer-2013", "mnist", "patch-camelyon")
# the labels of torchvision's angry, disgust, fear, happy, sad, surprise and neutral
FER2013 = [0, 1, 2, 3, 5, 6, 4]


def official(name, root):
    """(class names, {"train", "test": [(image, classes)]}) from torchvision's loader."""
    data = DATASETS[name]
    folder = root / data.own
    if data.coop:
        if data.coop == "fgvc_aircraft":
            lists = coop.aircraft(folder)
        else:
            lists = coop.official(data.coop, root)
        names = sorted({called for items in lists.values() for _, _, called in items})
        return names, {part: [(path, [names.index(called)]) for path, _, called in lists[part]]
                       for part in ("train", "test")}
    names = published_names(name)
    try:
        if name == "voc-2007-classification":
            return names, {part: voc(folder, names, part) for part in ("train", "test")}
        return names, {part: pairs(name, root, names, part) for part in ("train", "test")}
    except Exception as error:      # damaged files fail in many ways
        raise UserError(f"{data.title} in {folder} is incomplete or damaged "
                        f"({brief(error)}): download it again") from error


@lru_cache(maxsize=16)
def loaded(name, root, part):
    """Torchvision's dataset of a part."""
    if name in ("cifar-10", "cifar-100", "mnist"):
        return LOADERS[name](root, train=part == "train")
    return LOADERS[name](root, split=part)


def read_official(item):
    """The image of an item (folder, name of the dataset, part, number) of torchvision's."""
    folder, name, part, number = item
    return rgb(loaded(name, str(Path(folder).parent), part)[number][0])


def pairs(name, root, names, part):
    """[(image, classes)] of a part of torchvision's dataset."""
    data = loaded(name, str(root), part)
    if name == "patch-camelyon":
        with data.h5py.File(root / "pcam" / data._FILES[part]["targets"][0]) as file:
            labels = file["y"][:].reshape(-1).tolist()
    elif name in ("cifar-10", "cifar-100", "mnist"):
        labels = [int(k) for k in data.targets]
    elif name == "country211":
        return [(path, [k]) for path, k in data.samples]
    else:
        labels = [k for _, k in data._samples]
    if name == "cifar-100":
        labels = [names.index(data.classes[k].replace("_", " ")) for k in labels]
    if name == "fer-2013":
        labels = [FER2013[k] for k in labels]
    if name in IN_MEMORY:
        folder = str(root / DATASETS[name].own)
        return [((folder, name, part, i), [k]) for i, k in enumerate(labels)]
    return [(path, [k]) for (path, _), k in zip(data._samples, labels)]


def voc(folder, names, part):
    """[(image, classes)] of VOC 2007's `ImageSets/Main/CLASS_PART.txt`, with lines `000005 1`.

    1: has the class, 0: hard to see (counts only if the image has no other class), -1: absent.
    """
    seen = {}
    for k, name in enumerate(names):
        for line in read_lines(folder / "ImageSets" / "Main" / f"{name}_{part}.txt"):
            image, mark = line.split()
            seen.setdefault(image, {}).setdefault(int(mark), []).append(k)
    return [(f"{folder}/JPEGImages/{image}.jpg", marks.get(1) or marks[0])
            for image, marks in seen.items()]


def download(name, root):
    """Let torchvision download a dataset into `root`, unless it is already there."""
    data = DATASETS[name]
    if (root / "classification" / data.folder).is_dir():
        return
    try:
        if data.coop:
            own = coop.DATASETS[data.coop]
            for split in own.parts.values():
                own.loader(root, download=True, **(dict(split=split) if split else {}))
        elif name == "voc-2007-classification":
            for part in ("train", "test"):
                tv.VOCDetection(root, year="2007", image_set=part, download=True)
        elif name in ("cifar-10", "cifar-100", "mnist"):
            LOADERS[name](root, download=True)
        else:
            for part in ("train", "test"):
                LOADERS[name](root, split=part, download=True)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"{data.title} cannot be downloaded ({brief(error)}): put it into "
                        f"{root / data.own} yourself") from error


def several(names, root):
    """The listings of several datasets."""
    return [listing for name in names for listing in dataset(name, root)]


NAMES = {data.folder if data.coop else name: name for name, data in DATASETS.items()}
BENCHMARKS = {called: partial(dataset, name) for called, name in NAMES.items()}
BENCHMARKS["elevater12"] = partial(several, [n for n in DATASETS if not DATASETS[n].coop])
BENCHMARKS["elevater20"] = partial(several, list(DATASETS))
DOWNLOADS = {called: partial(download, name) for called, name in NAMES.items()
             if DATASETS[name].own and name not in NOT_FETCHED}
