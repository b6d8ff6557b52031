"""The papers' benchmarks on disk: each real layout in miniature, read by the same code as the full
dataset."""

import io
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import counts, edit, make_tree, says, table
from PIL import Image
from scipy.io import savemat

from data import UserError, find_listings, load_tasks
from data.benchmarks import coop as module

MINI = ["clipart", "painting", "real", "sketch"]
ALL = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
buffer = io.BytesIO()
Image.new("RGB", (8, 8), "green").save(buffer, "JPEG")
GREEN = buffer.getvalue()


def put(path, content=GREEN):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def items(images):
    return {(str(path), label) for path, label in zip(images.items, images.labels)}


def same_at_a_seed(data, root, **size):
    """The same seed gives the same images, another seed others; training and test images do not
    overlap. Returns the tasks of seed 1."""
    first, again, other = (load_tasks(data, seed=s, root=root, **size) for s in (1, 1, 2))
    for one, two, third in zip(first, again, other):
        assert items(one.train) == items(two.train) != items(third.train)
        assert items(one.test) == items(two.test)
        paths = one.train.items + one.test.items + (one.val.items if one.val else [])
        assert len(paths) == len(set(paths))
    return first


def refused(data, root, *words, **size):
    """Check that a benchmark is rejected with these words in one line."""
    with pytest.raises(UserError) as error:
        load_tasks(data, root=root, **(size or dict(shots=1)))
    assert str(error.value).isprintable()
    says(str(error.value), *words)


# ------------------------------------------------------------ DomainNet

CLASSES = {7: "The_Eiffel_Tower", 20: "alarm_clock", 327: "t-shirt"}


def domainnet(folder, domains, lists, train=8, test=3):
    """`train` and `test` images of each class; infograph has two more training images."""
    for domain in domains:
        for part, count in (("train", train + 2 * (domain == "infograph")), ("test", test)):
            lines = [f"{domain}/{name}/{domain}_{part}_{label}_{i}.jpg {label}"
                     for label, name in CLASSES.items() for i in range(count)]
            for line in lines:
                put(folder / line.split()[0])
            put(folder / lists / f"{domain}_{part}.txt", "\n".join(lines) + "\n")
    return folder


def without(path, words):
    path.write_text("".join(line for line in path.open() if words not in line))


@pytest.mark.parametrize("place, lists", [("domainnet", "splits"), (".", ".")],
                         ids=["Dassl's lists", "official flat lists in the root itself"])
def test_domainnet_is_a_task_per_domain_with_its_own_test_images(tmp_path, place, lists):
    domainnet(tmp_path / place, ALL, lists)
    tasks = same_at_a_seed("domainnet", tmp_path, split=0.25)
    assert [t.name.lower() for t in tasks] == ALL
    for t in tasks:
        assert t.class_names == ["the eiffel tower", "alarm clock", "t-shirt"]
        assert (t.template, t.metric, t.val) == ("a photo of a {}", "accuracy", None)
        assert counts(t.train) == [2, 2, 2]
        assert counts(t.test) == [3, 3, 3]
        for part, images in (("train", t.train), ("test", t.test)):
            for path, label in items(images):
                assert f"/{t.name.lower()}_{part}_{list(CLASSES)[label]}_" in path
        image, _ = t.train[0]
        assert image.size == (8, 8)
    whole = load_tasks("domainnet", root=tmp_path)
    assert [len(t.train) for t in whole] == [24, 30, 24, 24, 24, 24]


def test_minidomainnet_draws_from_both_lists_and_tests_on_the_rest(tmp_path, capsys):
    """1% of 200 training and 78 test images per class is 3; the other 275 are test images."""
    domainnet(tmp_path / "domainnet", MINI, "splits_mini", 200, 78)
    tasks = same_at_a_seed("minidomainnet", tmp_path, split=0.01)
    assert [t.name.lower() for t in tasks] == MINI
    for t in tasks:
        assert counts(t.train) == [3, 3, 3]
        assert counts(t.test) == [275, 275, 275]
        for path, label in items(t.train) | items(t.test):
            assert f"/{t.name.lower()}/{list(CLASSES.values())[label]}/" in path
    refused("minidomainnet", tmp_path, "leaves none to test on", split=1.0)
    lists = tmp_path / "domainnet/splits_mini"
    with (lists / "real_test.txt").open("a") as file:
        file.write((lists / "real_train.txt").read_text().splitlines()[0])
    real = load_tasks("minidomainnet", shots=2, root=tmp_path)[2]
    assert len(real.train) + len(real.test) == 3 * 278
    says(capsys.readouterr().err, lists / "real_*.txt", "lists 1 image twice: counted once")


def test_painting_has_no_t_shirt_to_train_on_as_published(tmp_path):
    lists = domainnet(tmp_path / "domainnet", ALL, "splits") / "splits"
    for part in ("train", "test"):
        without(lists / f"painting_{part}.txt", "t-shirt")
        for size in (dict(split=0.25), dict(shots=2)):
            painting = load_tasks("domainnet", root=tmp_path, **size)[2]
            assert painting.class_names[2] == "t-shirt"
            assert counts(painting.train) == [2, 2]
    without(lists / "real_train.txt", "t-shirt")
    line = "class 't-shirt' of Real has no training image in"
    refused("domainnet", tmp_path, line, lists / "real")


def test_an_incomplete_domainnet_is_rejected(tmp_path):
    folder = domainnet(tmp_path / "domainnet", MINI, "splits_mini")
    lists, test = folder / "splits_mini", folder / "splits_mini/sketch_test.txt"
    (folder / "real/alarm_clock/real_test_20_1.jpg").unlink()
    refused("minidomainnet", tmp_path, lists / "real_*.txt", "names missing images (1 of 33)",
            "alarm_clock/real_test_20_1.jpg", "unpack")
    for part in ("train", "test"):
        without(lists / f"sketch_{part}.txt", "alarm_clock")
    refused("minidomainnet", tmp_path, "class 'alarm clock' is in", lists, "same classes",
            "lists of clipart but not in those of sketch")
    put(test, "sketch/tiger/1.jpg 20\n")
    refused("minidomainnet", tmp_path, lists, "label 20 'tiger'", "alarm clock")
    put(test, "sketch/tiger/1.jpg\n")
    refused("minidomainnet", tmp_path, test, "'sketch/tiger/1.jpg'", "a label")
    test.unlink()
    refused("minidomainnet", tmp_path, test, "cannot be read")


# ------------------------------------------------------------ CoOp's $DATA

# task, folder of the images, split_zhou_*.json, template
COOP = table("""
    oxford_pets     OxfordPets  oxford_pets/images  OxfordPets  a photo of a {}, a type of pet
    stanford_cars   StanfordCars  stanford_cars  StanfordCars  a photo of a {}
    oxford_flowers  Flowers102  oxford_flowers/jpg  OxfordFlowers  a photo of a {}, a type of flower
    food101         Food101  food-101/images  Food101  a photo of {}, a type of food
    dtd             DTD  dtd/images  DescribableTextures  {} texture
    sun397          SUN397  sun397/SUN397  SUN397  a photo of a {}
    caltech101      Caltech101  caltech-101/101_ObjectCategories  Caltech101  a photo of a {}
    ucf101          UCF101  ucf101/UCF-101-midframes  UCF101  a photo of a person doing {}
    eurosat         EuroSAT  eurosat/2750  EuroSAT  a centered satellite photo of {}
    """)
TWO = ["red_ball", "Alarm Clock"]
SIZES = dict(train=6, val=2, test=3)


def coop(root, name):
    """Write one of the nine datasets with a split_zhou_*.json, with two classes; returns that file.
    """
    _, folder, split, _ = COOP[name]
    content = {part: [] for part in SIZES}
    for part, count in SIZES.items():
        for k, c in enumerate(TWO * count):
            content[part].append([f"{c}/{part}{k}.jpg", k % 2, c])
            put(root / folder / content[part][-1][0])
    path = root / folder.split("/")[0] / f"split_zhou_{split}.json"
    put(path, json.dumps(content))
    return path


def aircraft(folder):
    put(folder / "variants.txt", "707-320\nA330-200\nF-16A/B\n")
    number = 1000000
    for part, count in SIZES.items():
        lines = []
        for variant in ["F-16A/B"] * count + ["707-320"] * count + ["A330-200"] * count:
            number += 1
            put(folder / f"images/{number}.jpg")
            lines.append(f"{number} {variant}\n")
        put(folder / f"images_variant_{part}.txt", "".join(lines))


def imagenet(folder):
    put(folder / "classnames.txt", "n01440764 tench\nn01443537 goldfish\nn01484850 white shark\n")
    for k, name in enumerate(("n01440764", "n01443537", "n01484850")):
        for i in range(6):
            put(folder / f"images/train/{name}/{name}_{i}.JPEG")
        for i in range(3):
            put(folder / f"images/val/{name}/ILSVRC2012_val_{k}{i}.JPEG")


@pytest.mark.parametrize("name", COOP)
def test_a_dataset_of_coops_has_its_split_names_and_template(tmp_path, name):
    content = json.loads(coop(tmp_path, name).read_text())
    title, folder, _, template = COOP[name]
    [task] = same_at_a_seed(name, tmp_path, shots=2)
    assert (task.name, task.template, task.metric) == (title, template, "accuracy")
    assert task.class_names == ["red ball", "Alarm Clock"]
    assert counts(task.train) == counts(task.val) == [2, 2]
    for part, images in (("val", task.val), ("test", task.test)):
        assert items(images) == {(f"{tmp_path / folder}/{x}", k) for x, k, _ in content[part]}
    [whole] = load_tasks(name, root=tmp_path)
    assert counts(whole.train) == [6, 6]


@pytest.mark.parametrize("place", ["fgvc_aircraft", "fgvc-aircraft-2013b/data"])
def test_aircraft_reads_its_own_lists_in_the_order_of_the_variants(tmp_path, place):
    aircraft(tmp_path / place)
    [task] = same_at_a_seed("fgvc_aircraft", tmp_path, shots=2)
    assert task.name == "FGVCAircraft"
    assert task.class_names == ["707-320", "A330-200", "F-16A/B"]
    assert task.template == "a photo of a {}, a type of aircraft"
    assert counts(task.train) == counts(task.val) == [2, 2, 2]
    assert counts(task.test) == [3, 3, 3]
    [whole] = load_tasks("fgvc_aircraft", root=tmp_path)
    assert (f"{tmp_path / place}/images/1000001.jpg", 2) in items(whole.train)
    put(tmp_path / place / "variants.txt", "707-320\nA330-200\n")
    refused("fgvc_aircraft", tmp_path, "images_variant_train.txt", "'F-16A/B'", "variants.txt")


def test_imagenet_is_tested_on_its_validation_images(tmp_path, capsys):
    imagenet(tmp_path / "imagenet")
    names, val = tmp_path / "imagenet/classnames.txt", tmp_path / "imagenet/images/val"
    [task] = same_at_a_seed("imagenet", tmp_path, shots=2)
    assert task.class_names == ["tench", "goldfish", "white shark"]
    assert task.template == "a photo of a {}"
    assert task.val is None
    assert counts(task.train) == [2, 2, 2]
    assert counts(task.test) == [3, 3, 3]
    assert all(path.startswith(f"{val}/") for path in task.test.items)
    put(names, "n01440764 tench\nn01443537 tench\nn01484850 shark\n")
    [task] = load_tasks("imagenet", shots=2, root=tmp_path)
    assert task.class_names == ["tench", "tench", "shark"]      # two with one name, as published
    assert counts(task.train) == [2, 2, 2]
    says(capsys.readouterr().err, "ImageNet has two classes called tench, as published",
         "the second of each pair can never be predicted")
    shutil.rmtree(val)
    put(val / "ILSVRC2012_val_1.JPEG")
    refused("imagenet", tmp_path, val, "images without class folders", "n01440764")
    put(val / "n09/1.JPEG")
    refused("imagenet", tmp_path, val / "n09", "classnames.txt")
    names.unlink()
    refused("imagenet", tmp_path, names, "cannot be read")


def test_coop10_and_coop11_are_all_of_them_and_a_list_combines_any(tmp_path):
    for name in COOP:
        coop(tmp_path, name)
    aircraft(tmp_path / "fgvc_aircraft")
    ten = [t.name for t in load_tasks("coop10", shots=1, root=tmp_path)]
    assert set(ten) == {title for title, *_ in COOP.values()} | {"FGVCAircraft"}
    assert len(ten) == 10
    refused("coop11", tmp_path, tmp_path / "imagenet/classnames.txt", "ImageNet")
    imagenet(tmp_path / "imagenet")
    eleven = load_tasks("coop11", shots=1, root=tmp_path)
    assert [t.name for t in eleven] == [*ten, "ImageNet"]
    domainnet(tmp_path / "domainnet", MINI, "splits_mini", 2, 1)
    mixed = load_tasks("dtd, minidomainnet ,eurosat", shots=1, root=tmp_path)
    assert [t.name for t in mixed] == ["DTD", "Clipart", "Painting", "Real", "Sketch", "EuroSAT"]


def test_a_wrong_split_of_coops_is_rejected(tmp_path):
    split = coop(tmp_path, "dtd")
    edit(split, lambda s: s["test"].append(["gone.jpg", 0, "red ball"]))
    refused("dtd", tmp_path, split, "(1 of 23)", tmp_path / "dtd/images/gone.jpg", "unpack")
    edit(split, lambda s: s["test"].clear())
    refused("dtd", tmp_path, split, "no test image")
    edit(split, lambda s: s["train"].append(["gone.jpg", 0, "dotted"]))
    refused("dtd", tmp_path, split, "label 0", "'red ball'", "'dotted'")
    edit(split, lambda s: s.update(train=[x for x in s["train"] if x[1]]))
    refused("dtd", tmp_path, split, "class 'red ball'", "no training image")
    for content in ("{", '{"train": [1], "val": [], "test": []}'):
        split.write_text(content)
        refused("dtd", tmp_path, split, "not a split in CoOp's format")


def test_duplicate_lines_in_a_split_of_coops(tmp_path, capsys):
    split = coop(tmp_path, "dtd")
    edit(split, lambda s: s["train"].extend(s["train"][:2]))
    [task] = load_tasks("dtd", root=tmp_path)
    assert len(set(task.train.items)) == len(task.train) == 12
    says(capsys.readouterr().err, split, "lists 2 images twice: counted once")
    edit(split, lambda s: s["test"].append(s["train"][0]))
    refused("dtd", tmp_path, split, "red_ball/train0.jpg twice, in train and test")
    edit(split, lambda s: s["test"].pop())
    edit(split, lambda s: s["train"].append([s["train"][0][0], 1, "Alarm Clock"]))
    refused("dtd", tmp_path, split, "red_ball/train0.jpg twice", "with two labels")


def test_a_link_in_another_part_of_a_split_is_rejected(tmp_path):
    split, folder = coop(tmp_path, "dtd"), tmp_path / "dtd/images"
    (folder / "link.jpg").symlink_to(folder / json.loads(split.read_text())["train"][0][0])
    edit(split, lambda s: s["val"].append(["link.jpg", 0, "red ball"]))
    refused("dtd", tmp_path, "link.jpg", "both a training and a validation image", split=1.0)


def dos(path):
    """Rewrite a list as Windows programs save it: byte order mark, backslashes, CRLF line ends."""
    text = path.read_text()
    if "variant" not in path.name:
        text = text.replace("/", "\\\\" if path.suffix == ".json" else "\\")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())


def test_lists_from_windows_are_read(tmp_path):
    coop(tmp_path, "dtd")
    imagenet(tmp_path / "imagenet")
    domainnet(tmp_path / "domainnet", MINI, "splits_mini")
    aircraft(tmp_path / "fgvc_aircraft")
    for path in [*tmp_path.rglob("*.txt"), *tmp_path.rglob("*.json")]:
        dos(path)
    tasks = load_tasks("dtd,imagenet,minidomainnet,fgvc_aircraft", shots=1, root=tmp_path)
    lasts = ["Alarm Clock", "white shark", *["t-shirt"] * 4, "F-16A/B"]
    assert [task.class_names[-1] for task in tasks] == lasts
    for task in tasks:
        image, _ = task.test[0]
        assert image.size == (8, 8)


@pytest.mark.parametrize("name, file", [
    ("dtd", "dtd/split_zhou_DescribableTextures.json"), ("ucf101", "ucf101/split_zhou_UCF101.json"),
    ("fgvc_aircraft", "fgvc_aircraft/variants.txt"), ("imagenet", "imagenet/classnames.txt")])
def test_a_missing_dataset_says_what_belongs_where(tmp_path, name, file):
    root = tmp_path / "sets"
    root.mkdir()
    fetch = "which --download fetches" if name in ("dtd", "fgvc_aircraft") else ""
    refused(name, root, root / file, "put them there or give another --root", fetch)
    folder = (root / file).parent
    folder.mkdir()
    refused(name, folder, f"that folder itself, so give --root {root}")
    refused(name, tmp_path, f"it is in {root}, so give --root {root}")


# ------------------------------------------------------------ torchvision
# Each writes a dataset in torchvision's layout, in which an image of class k has grey level 10 k;
# returns its class names and the number of images per part.


def grey(k):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * k,) * 3).save(file, "PNG")
    return file.getvalue()


def tv_pets(root):
    names = ["Abyssinian", "american_bulldog", "staffordshire_bull_terrier"]
    for part, count in (("trainval", 6), ("test", 3)):
        lines = []
        for k, name in enumerate(names):
            for i in range(count):
                put(root / f"oxford-iiit-pet/images/{name}_{part}{i}.jpg", grey(k))
                lines.append(f"{name}_{part}{i} {[1, 2, 34][k]} 1 1\n")
        put(root / f"oxford-iiit-pet/annotations/{part}.txt", "".join(lines))
    return [name.replace("_", " ") for name in names], dict(train=18, test=9)


def tv_cars(root):
    folder, names = root / "stanford_cars", ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    fields = [(f, object) for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    for part, count, file in (("train", 6, "devkit/cars_train_annos.mat"),
                              ("test", 3, "cars_test_annos_withlabels.mat")):
        rows = []
        for i in range(2 * count):
            rows.append((1, 1, 8, 8, 1 + i // count, f"{i:05d}.jpg"))
            put(folder / f"cars_{part}/{i:05d}.jpg", grey(i // count))
        savemat(folder / file, {"annotations": np.array(rows, dtype=fields)[None]})
    return names, dict(train=12, test=6)


def tv_flowers(root):
    folder, labels = root / "flowers-102", []
    ids = dict(trnid=[], valid=[], tstid=[])
    for number in range(1, 34):
        put(folder / f"jpg/image_{number:05d}.jpg", grey(number % 3))
        labels.append([1, 60, 98][number % 3])
        part = "trnid" if number <= 18 else "valid" if number <= 24 else "tstid"
        ids[part].append(number)
    savemat(folder / "imagelabels.mat", dict(labels=labels))
    savemat(folder / "setid.mat", ids)
    names = ["pink primrose", "pink and yellow dahlia", "mexican petunia"]
    return names, dict(train=18, val=6, test=9)


def tv_food(root):
    for part, count in (("train", 6), ("test", 3)):
        meta = {}
        for k, c in ((1, "baby_back_ribs"), (0, "apple_pie")):
            meta[c] = [f"{c}/{part}{i}" for i in range(count)]
            for path in meta[c]:
                put(root / f"food-101/images/{path}.jpg", grey(k))
        put(root / f"food-101/meta/{part}.json", json.dumps(meta))
    return ["apple pie", "baby back ribs"], dict(train=12, test=6)


def tv_dtd(root):
    """Its validation part lacks a class; torchvision numbers the classes of each part separately.
    """
    for part, count in SIZES.items():
        classes = ["polka-dotted"] if part == "val" else ["polka-dotted", "banded"]
        paths = [f"{c}/{c}_{part}{i}.jpg" for c in classes for i in range(count)]
        for path in paths:
            put(root / f"dtd/dtd/images/{path}", grey(path.startswith("polka")))
        put(root / f"dtd/dtd/labels/{part}1.txt", "\n".join(paths))
    return ["banded", "polka-dotted"], dict(train=12, val=2, test=6)


def tv_sun(root):
    classes = ["a/abbey", "a/apartment_building/outdoor", "y/youth_hostel"]
    put(root / "SUN397/ClassName.txt", "".join(f"/{c}\n" for c in classes))
    for i, c in enumerate(classes * 6):
        put(root / f"SUN397/{c}/sun_{i}.jpg", grey(i % 3))
    return ["abbey", "apartment building outdoor", "youth hostel"], dict(train=18)


def tv_caltech(root):
    for k, c in enumerate(["Faces", "Faces_easy", "ant", "yin_yang", "BACKGROUND_Google"]):
        for i in range(6):
            put(root / f"caltech101/101_ObjectCategories/{c}/image_{i + 1:04d}.jpg", grey(k))
    return ["off-center face", "centered face", "ant", "yin and yang symbol"], dict(train=24)


def tv_eurosat(root):
    for k, c in enumerate(["AnnualCrop", "HerbaceousVegetation", "SeaLake"]):
        for i in range(6):
            put(root / f"eurosat/2750/{c}/{c}_{i + 1}.jpg", grey(k))
    return ["annual crop land", "brushland or shrubland", "lake or sea"], dict(train=18)


TORCHVISION = dict(
    oxford_pets=tv_pets, stanford_cars=tv_cars, oxford_flowers=tv_flowers, food101=tv_food,
    dtd=tv_dtd, sun397=tv_sun, caltech101=tv_caltech, eurosat=tv_eurosat)


@pytest.fixture(params=TORCHVISION)
def official(request, tmp_path, monkeypatch):
    """A dataset in torchvision's layout: (name, root, class names, number of images per part)."""
    # torchvision checks the hashes of Flowers102's files
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity",
                        lambda path, md5: os.path.isfile(path))
    return request.param, tmp_path, *TORCHVISION[request.param](tmp_path)


def test_a_dataset_in_torchvisions_layout_has_its_official_split_and_clips_names(official, capsys):
    name, root, names, sizes = official
    [task] = same_at_a_seed(name, root, split=0.5)
    [pool] = find_listings(name, root)
    half = sizes["train"] // 2
    assert task.class_names == names
    assert [task.name, task.template] == COOP[name][::3]
    for paths in pool.items:
        assert len(set(paths)) == sizes["train"] // len(names)
    assert len(task.train) == half
    assert len(task.val or ()) == sizes.get("val", 0)
    assert len(task.test) == sizes.get("test", half)
    for image, label in [*task.train, *task.test, *(task.val or ())]:
        assert image.getpixel((0, 0)) == (10 * label,) * 3
    said = capsys.readouterr().err
    assert ("has no test set in" in said) == ("test" not in sizes)
    if name == "caltech101":                            # CoOp leaves a class out
        says(said, "4 classes instead of the published 101")
    if name == "food101":                               # CoOp's split comes first
        coop(root, name)
        [task] = load_tasks(name, shots=1, root=root)
        assert len(task.val) == 2


def test_damage_in_torchvisions_layout_is_named(official):
    name, root, _, _ = official
    lists = [p for p in root.rglob("*") if p.suffix in (".txt", ".mat", ".json")]
    assert bool(lists) == (name not in ("caltech101", "eurosat"))   # there the folders are the list
    for path in lists:
        content = path.read_bytes()
        path.write_text("damaged")
        refused(name, root, root, "incomplete or damaged", "download it again", split=0.5)
        path.write_bytes(content)
    for path in root.rglob("*.jpg"):
        path.unlink()
    remedy = "again" if name in ("sun397", "caltech101", "eurosat") else "unpack"
    refused(name, root, root, remedy, split=0.5)


def test_download_lets_torchvision_fetch_what_is_missing(tmp_path, monkeypatch):
    fetch = "torchvision.datasets.dtd.download_and_extract_archive"

    def unreachable(*words, **more):
        raise OSError("no route to host")

    with pytest.raises(UserError, match="--download cannot fetch stanford_cars"):
        find_listings("food101,stanford_cars", tmp_path, download=True)
    assert not (tmp_path / "food-101").exists()
    monkeypatch.setattr(fetch, unreachable)
    with pytest.raises(UserError, match="DTD cannot be downloaded .no route to host.: put it into"):
        find_listings("dtd", tmp_path, download=True)
    monkeypatch.setattr(fetch, lambda *words, **more: tv_dtd(tmp_path))
    assert len(find_listings("dtd", tmp_path, download=True)) == 1
    monkeypatch.setattr(fetch, unreachable)                     # it is there, in either layout
    assert len(find_listings("dtd", tmp_path, download=True)) == 1
    shutil.rmtree(tmp_path / "dtd")
    coop(tmp_path, "dtd")
    assert len(find_listings("dtd", tmp_path, download=True)) == 1


# ------------------------------------------------------------ counts, and `check`


def test_missing_parts_of_a_published_dataset_give_one_line_on_stderr(tmp_path, capsys,
                                                                      monkeypatch):
    for i in range(20):
        domain = ("Art", "Clipart", "Product", "Real World")[i % 4]
        put(tmp_path / f"{domain}/Alarm_Clock/{i}.jpg")
    for seed in (1, 2):
        load_tasks("officehome", split=0.5, seed=seed, root=tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    says(line, "warning: Office-Home", tmp_path, "1 classes instead of the published 65",
         "20 images instead of the published 15,588 (15,568 missing)",
         "no backpack, batteries, bed, bike, bottle, bucket,", "chair and so on")
    coop(tmp_path, "dtd")
    monkeypatch.setitem(module.DATASETS, "dtd", replace(module.DATASETS["dtd"], classes=2))
    load_tasks("dtd", shots=1, root=tmp_path)
    assert not capsys.readouterr().err                                          # nothing is missing


def test_the_shipped_class_names_are_complete_and_distinct():
    published = dict(oxford_pets=37, stanford_cars=196, oxford_flowers=102, food101=101, dtd=47,
                     fgvc_aircraft=100, sun397=397, caltech101=101, ucf101=101, eurosat=10)
    for name, classes in published.items():
        names = list(module.published_names(name).values())
        assert len(names) == len(set(names)) == classes, name
        # CoOp leaves "Faces_easy" out
        assert module.DATASETS[name].classes == classes - (name == "caltech101"), name


def test_check_lists_a_whole_benchmark_and_exits_with_0(here, tree):
    code, out, err = here("common.py", "check", "--data", tree)
    assert (code, err) == (0, "")
    assert " ".join(out.split()) == (
        "task classes train val test template metric drawn 3 15 - rest a photo of a {} accuracy "
        "painted 3 15 - rest a photo of a {} accuracy 2 tasks, 30 images: all is well")
    make_tree(tree.parent / "own", dict.fromkeys(("train/cup", "test/cup"), 3))
    code, out, _ = here("common.py", "check", "--data", tree.parent / "own")
    assert code == 0 and out.endswith("1 task, 6 images: all is well\n")
    says(out, "note: ", "is taken as one task, own")


def test_check_counts_the_images_of_each_part_and_names_every_problem(here, tmp_path):
    content = json.loads(coop(tmp_path, "eurosat").read_text())
    bad = [tmp_path / f"eurosat/2750/{content[part][0][0]}" for part in ("train", "val", "test")]
    for path in bad:
        path.write_bytes(GREEN[:40])
    code, out, err = here("common.py", *f"check --data eurosat --root {tmp_path}".split())
    assert (code, err) == (1, "")
    first, *problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    says(" ".join(out.split()), "EuroSAT 2 12 4 6")
    assert out.endswith("1 task, 22 images: 4 problems\n")
    says(first, "EuroSAT", "2 classes instead of the published 10 (8 missing)")
    for path, line in zip(bad, problems, strict=True):
        says(line, path, "cannot be decoded")
    code, out, _ = here("common.py", *f"check --data eurosat --root {tmp_path} --quick".split())
    assert code == 1 and out.endswith("none of them decoded: 1 problem\n")


def test_check_lists_the_first_problems_and_counts_the_rest(here, tree):
    for path in list(tree.rglob("*.png"))[:12]:
        path.write_text(f"no image: {path}")
    code, out, _ = here("common.py", "check", "--data", tree)
    assert code == 1 and out.count("problem: ") == 10
    says(out, "... and 2 more", "12 problems")
