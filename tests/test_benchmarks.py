"""The papers' benchmarks on disk: each real layout in miniature, read through the code path of the
full dataset."""

import io
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_tree, noise, run_script
from PIL import Image

import common
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
    """Same seed, same images; another seed, others; training and test images apart. Returns the
    tasks of seed 1."""
    first, again, other = (load_tasks(data, seed=s, root=root, **size) for s in (1, 1, 2))
    assert [(items(t.train), items(t.test)) for t in first] == [
        (items(t.train), items(t.test)) for t in again
    ]
    assert [items(t.train) for t in first] != [items(t.train) for t in other]
    for t in first:
        paths = [{str(path) for path in part.items} for part in (t.train, t.val, t.test) if part]
        assert sum(map(len, paths)) == len(set().union(*paths)) and min(map(len, paths)) > 0
    return first


# ------------------------------------------------------------ DomainNet

CLASSES = {7: "The_Eiffel_Tower", 20: "alarm_clock", 327: "t-shirt"}


def domainnet(folder, domains, lists, train=8, test=3):
    """`train` and `test` images of each class in each domain; infograph has two more to train
    on."""
    for domain in domains:
        for part, count in (("train", train + 2 * (domain == "infograph")), ("test", test)):
            lines = []
            for label, name in CLASSES.items():
                for i in range(count):
                    path = f"{domain}/{name}/{domain}_{part}_{label}_{i}.jpg"
                    put(folder / path)
                    lines.append(f"{path} {label}\n")
            put(folder / lists / f"{domain}_{part}.txt", "".join(lines))
    return folder


@pytest.mark.parametrize(
    "data, place, lists, domains, root",
    [
        ("minidomainnet", "domainnet", "splits_mini", MINI, ""),
        ("domainnet", "domainnet", "splits", ALL, ""),
        ("domainnet", "domainnet", ".", ALL, ""),
        ("domainnet", "my copy", "splits", ALL, "my copy"),
    ],
    ids=["Dassl's mini lists", "Dassl's lists", "official flat lists", "root itself"],
)
def test_domainnet_is_a_task_a_domain_with_its_own_test_images(
    tmp_path, data, place, lists, domains, root
):
    domainnet(tmp_path / place, domains, lists)
    tasks = same_at_a_seed(data, tmp_path / root, split=0.25)
    assert [t.name for t in tasks] == [d.capitalize() for d in domains]
    for t in tasks:
        assert (
            t.class_names == ["the eiffel tower", "alarm clock", "t-shirt"]
            and t.template == "a photo of a {}"
        )
        assert Counter(t.train.labels) == dict.fromkeys(range(3), 2) and Counter(
            t.test.labels
        ) == dict.fromkeys(range(3), 3)
        assert t.val is None and t.metric == "accuracy" and t.train[0][0].size == (8, 8)
        for part, images in (("train", t.train), ("test", t.test)):
            for path, label in items(images):
                assert f"/{t.name.lower()}/" in path and f"_{part}_{[7, 20, 327][label]}_" in path
    assert [len(t.train) for t in load_tasks(data, root=tmp_path / root)] == [
        30 if d == "infograph" else 24 for d in domains
    ]


def without(path, words):
    path.write_text("".join(line for line in path.open() if words not in line))


@pytest.mark.parametrize("size", [dict(split=0.25), dict(shots=2)], ids=["split", "shots"])
def test_painting_has_no_t_shirt_to_train_on_as_published(tmp_path, size):
    domainnet(tmp_path / "domainnet", ALL, "splits")
    for part in ("train", "test"):
        without(tmp_path / "domainnet" / "splits" / f"painting_{part}.txt", "t-shirt")
        painting = load_tasks("domainnet", root=tmp_path, **size)[2]
        assert painting.class_names[2] == "t-shirt" and set(painting.train.labels) == {0, 1}
    without(tmp_path / "domainnet" / "splits" / "real_train.txt", "t-shirt")
    with pytest.raises(
        UserError, match="class 't-shirt' of Real has no training image in .*real"
    ):
        load_tasks("domainnet", root=tmp_path, **size)


def line_of(data, root, **size):
    """The line with which a benchmark is refused."""
    with pytest.raises(UserError) as refused:
        load_tasks(data, root=root, **(size or dict(shots=1)))
    line = str(refused.value)
    assert line.isprintable()
    return line


def says(line, *words):
    assert [str(word) for word in words if str(word) not in line] == [], line


def test_domainnet_that_is_not_whole_is_refused(tmp_path):
    folder = domainnet(tmp_path / "domainnet", MINI, "splits_mini")
    lists = folder / "splits_mini"
    (folder / "real" / "alarm_clock" / "real_test_20_1.jpg").unlink()
    says(
        line_of("minidomainnet", tmp_path),
        lists / "real_*.txt",
        "1 of 33 images",
        "alarm_clock/real_test_20_1.jpg",
        "unpack",
    )
    shutil.rmtree(folder / "real")
    says(line_of("minidomainnet", tmp_path), "33 of 33 images")
    for part in ("train", "test"):
        without(lists / f"sketch_{part}.txt", "alarm_clock")
    says(
        line_of("minidomainnet", tmp_path),
        "class 'alarm clock'",
        lists,
        "clipart",
        "not in those of sketch",
        "same classes",
    )
    put(lists / "sketch_test.txt", "sketch/tiger/1.jpg 20\n")
    says(line_of("minidomainnet", tmp_path), lists, "label 20 'tiger'", "alarm clock")
    put(lists / "sketch_test.txt", "sketch/tiger/1.jpg\n")
    says(
        line_of("minidomainnet", tmp_path),
        lists / "sketch_test.txt",
        "'sketch/tiger/1.jpg'",
        "a label",
    )
    (lists / "sketch_test.txt").unlink()
    says(line_of("minidomainnet", tmp_path), lists / "sketch_test.txt", "cannot be read")


@pytest.mark.parametrize(
    "root, remedy",
    [
        ("a", "a/b"),
        ("a/b/domainnet/clipart", "a/b"),
        ("a/b/domainnet/splits_mini", "a/b"),
        ("empty", None),
        ("nowhere", None),
    ],
)
def test_a_root_at_the_wrong_level_of_domainnet_names_the_right_one(tmp_path, root, remedy):
    domainnet(tmp_path / "a" / "b" / "domainnet", MINI, "splits_mini", 1, 1)
    (tmp_path / "empty").mkdir()
    line = line_of("minidomainnet", tmp_path / root)
    says(line, tmp_path / root, f"give --root {tmp_path / remedy}" if remedy else "--root")
    if remedy:
        load_tasks("minidomainnet", shots=1, root=tmp_path / remedy)


# ------------------------------------------------------------ CoOp's $DATA

# name: (task, template, folder of the images, split, an image of class k, class names as in the
# split)
COOP = {
    "oxford_pets": (
        "OxfordPets",
        "a photo of a {}, a type of pet",
        "oxford_pets/images",
        "split_zhou_OxfordPets.json",
        "{c}_{i}.jpg",
        ["abyssinian", "american_bulldog"],
    ),
    "stanford_cars": (
        "StanfordCars",
        "a photo of a {}",
        "stanford_cars",
        "split_zhou_StanfordCars.json",
        "cars_train/{k}{i:04d}.jpg",
        ["2000 AM General Hummer SUV", "2012 Acura RL Sedan"],
    ),
    "oxford_flowers": (
        "Flowers102",
        "a photo of a {}, a type of flower",
        "oxford_flowers/jpg",
        "split_zhou_OxfordFlowers.json",
        "image_{k}{i:04d}.jpg",
        ["pink primrose", "hard-leaved pocket orchid"],
    ),
    "food101": (
        "Food101",
        "a photo of {}, a type of food",
        "food-101/images",
        "split_zhou_Food101.json",
        "{c}/{i}.jpg",
        ["apple_pie", "baby_back_ribs"],
    ),
    "dtd": (
        "DTD",
        "{} texture",
        "dtd/images",
        "split_zhou_DescribableTextures.json",
        "{c}/{c}_{i:04d}.jpg",
        ["banded", "blotchy"],
    ),
    "sun397": (
        "SUN397",
        "a photo of a {}",
        "sun397/SUN397",
        "split_zhou_SUN397.json",
        "a/{c}/sun_{i}.jpg",
        ["abbey", "airplane_cabin"],
    ),
    "caltech101": (
        "Caltech101",
        "a photo of a {}",
        "caltech-101/101_ObjectCategories",
        "split_zhou_Caltech101.json",
        "{c}/image_{i:04d}.jpg",
        ["face", "ceiling_fan"],
    ),
    "ucf101": (
        "UCF101",
        "a photo of a person doing {}",
        "ucf101/UCF-101-midframes",
        "split_zhou_UCF101.json",
        "{c}/v_{c}_g{i:02d}_c01.jpg",
        ["Apply_Eye_Makeup", "Archery"],
    ),
    "eurosat": (
        "EuroSAT",
        "a centered satellite photo of {}",
        "eurosat/2750",
        "split_zhou_EuroSAT.json",
        "{c}/{c}_{i}.jpg",
        ["Annual Crop Land", "Forest"],
    ),
}
SIZES = dict(train=6, val=2, test=3)


def coop(root, name):
    """One of the nine datasets that have a split_zhou_*.json; returns that file."""
    _, _, folder, split, pattern, classes = COOP[name]
    content, number = {part: [] for part in SIZES}, 0
    for part, count in SIZES.items():
        for k, c in enumerate(classes):
            for _ in range(count):
                number += 1
                path = pattern.format(c=c, k=k, i=number)
                put(root / folder / path)
                content[part].append([path, k, c])
    path = root / folder.split("/")[0] / split
    put(path, json.dumps(content))
    return path


def aircraft(folder):
    number = 1000000
    put(folder / "variants.txt", "707-320\nA330-200\nF-16A/B\n")
    for part, count in SIZES.items():
        lines = []
        for variant in ("F-16A/B", "707-320", "A330-200"):
            for _ in range(count):
                number += 1
                put(folder / "images" / f"{number}.jpg")
                lines.append(f"{number} {variant}\n")
        put(folder / f"images_variant_{part}.txt", "".join(lines))


def imagenet(folder):
    put(
        folder / "classnames.txt",
        "n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n",
    )
    for part, count in (("train", 6), ("val", 3)):
        for k, name in enumerate(("n01440764", "n01443537", "n01484850")):
            for i in range(count):
                put(
                    folder
                    / "images"
                    / part
                    / name
                    / (f"ILSVRC2012_val_{k}{i}.JPEG" if part == "val" else f"{name}_{i}.JPEG")
                )


@pytest.mark.parametrize("name", COOP)
def test_a_dataset_of_coops_has_its_split_its_names_and_its_template(tmp_path, name):
    coop(tmp_path, name)
    (task,) = same_at_a_seed(name, tmp_path, shots=2)
    assert (task.name, task.template) == COOP[name][:2] and task.metric == "accuracy"
    assert task.class_names == [c.replace("_", " ") for c in COOP[name][5]]
    assert [Counter(part.labels) for part in (task.train, task.val, task.test)] == [
        {0: 2, 1: 2},
        {0: 2, 1: 2},
        {0: 3, 1: 3},
    ]
    content = json.loads((tmp_path / COOP[name][2].split("/")[0] / COOP[name][3]).read_text())
    for part, images in (("val", task.val), ("test", task.test)):
        assert items(images) == {
            (str(tmp_path / COOP[name][2] / path), k) for path, k, _ in content[part]
        }
    assert (
        task.test[0][0].size == (8, 8)
        and len(load_tasks(name, root=tmp_path)[0].train) == 12
    )


@pytest.mark.parametrize(
    "place", ["fgvc_aircraft", "fgvc-aircraft-2013b/data"], ids=["CoOp's folder", "the archive's"]
)
def test_aircraft_reads_its_own_lists_in_the_order_of_the_variants(tmp_path, place):
    aircraft(tmp_path / place)
    (task,) = same_at_a_seed("fgvc_aircraft", tmp_path, shots=2)
    assert task.name == "FGVCAircraft" and task.class_names == ["707-320", "A330-200", "F-16A/B"]
    assert task.template == "a photo of a {}, a type of aircraft" and [
        len(x) for x in (task.train, task.val, task.test)
    ] == [6, 6, 9]
    first = min(load_tasks("fgvc_aircraft", root=tmp_path)[0].train.items)
    assert first.endswith("/images/1000001.jpg") and (first, 2) in items(
        load_tasks("fgvc_aircraft", root=tmp_path)[0].train
    )


def test_imagenet_is_tested_on_its_validation_images(tmp_path):
    imagenet(tmp_path / "imagenet")
    (task,) = same_at_a_seed("imagenet", tmp_path, shots=2)
    assert (
        task.class_names == ["tench", "goldfish", "great white shark"]
        and task.val is None
        and task.template == "a photo of a {}"
    )
    assert (
        len(task.train) == 6
        and {path.split("/")[-3] for path in task.test.items} == {"val"}
        and len(task.test) == 9
    )
    shutil.rmtree(tmp_path / "imagenet" / "images" / "val")
    put(tmp_path / "imagenet" / "images" / "val" / "ILSVRC2012_val_1.JPEG")
    says(
        line_of("imagenet", tmp_path),
        tmp_path / "imagenet" / "images" / "val",
        "images themselves",
        "n01440764",
    )
    put(tmp_path / "imagenet" / "images" / "val" / "n09" / "1.JPEG")
    says(
        line_of("imagenet", tmp_path),
        tmp_path / "imagenet" / "images" / "val" / "n09",
        "classnames.txt",
    )
    (tmp_path / "imagenet" / "classnames.txt").unlink()
    says(line_of("imagenet", tmp_path), tmp_path / "imagenet" / "classnames.txt", "cannot be read")


def test_coop10_and_coop11_are_all_of_them_and_a_list_joins_any(tmp_path):
    for name in COOP:
        coop(tmp_path, name)
    aircraft(tmp_path / "fgvc_aircraft")
    ten = load_tasks("coop10", shots=1, root=tmp_path)
    assert {t.name for t in ten} == {task for task, *_ in COOP.values()} | {"FGVCAircraft"} and len(
        ten
    ) == 10
    says(line_of("coop11", tmp_path), tmp_path / "imagenet" / "classnames.txt", "ImageNet")
    imagenet(tmp_path / "imagenet")
    assert [t.name for t in load_tasks("coop11", shots=1, root=tmp_path)] == [
        t.name for t in ten
    ] + ["ImageNet"]
    domainnet(tmp_path / "domainnet", MINI, "splits_mini", 2, 1)
    mixed = load_tasks("dtd, minidomainnet ,eurosat", shots=1, root=tmp_path)
    assert [t.name for t in mixed] == ["DTD", "Clipart", "Painting", "Real", "Sketch", "EuroSAT"]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_split_of_coops_that_is_wrong_is_refused(tmp_path):
    split = coop(tmp_path, "dtd")
    edit(split, lambda s: s["test"].append(["banded/gone.jpg", 0, "banded"]))
    says(
        line_of("dtd", tmp_path),
        split,
        "1 of 23 images",
        tmp_path / "dtd" / "images" / "banded" / "gone.jpg",
        "unpack",
    )
    edit(split, lambda s: s["test"].clear())
    says(line_of("dtd", tmp_path), split, "no test image")
    edit(split, lambda s: s["train"].append(["banded/gone.jpg", 0, "dotted"]))
    says(line_of("dtd", tmp_path), split, "label 0", "'banded'", "'dotted'")
    edit(split, lambda s: s.update(train=[x for x in s["train"] if x[1]]))
    says(line_of("dtd", tmp_path), split, "class 'banded'", "no training image")
    for content in ("{", "[]", '{"train": [], "val": []}', '{"train": [1], "val": [], "test": []}'):
        split.write_text(content)
        says(line_of("dtd", tmp_path), split, "not a split of CoOp's")


def test_lines_that_stand_twice_in_a_split_of_coops(tmp_path, capsys):
    """Twice on one side counts once and is told; on two sides or with two labels is refused."""
    split = coop(tmp_path, "dtd")
    edit(split, lambda s: s["train"].extend(s["train"][:2]))
    [task] = load_tasks("dtd", root=tmp_path)
    assert len(task.train) == len(set(task.train.items)) == 12
    says(capsys.readouterr().err, split, "lists 2 images twice: counted once")
    edit(split, lambda s: s["test"].append(s["train"][0]))
    says(line_of("dtd", tmp_path), split, "banded_0001.jpg twice, in train and test")
    edit(split, lambda s: s["test"].pop())
    edit(split, lambda s: s["train"].append([s["train"][0][0], 1, "blotchy"]))
    says(line_of("dtd", tmp_path), split, "banded_0001.jpg twice", "with two labels")


def test_a_link_in_another_part_of_a_split_is_refused(tmp_path):
    split = coop(tmp_path, "dtd")
    folder = tmp_path / "dtd" / "images"
    (folder / "link.jpg").symlink_to(folder / json.loads(split.read_text())["train"][0][0])
    edit(split, lambda s: s["val"].append(["link.jpg", 0, "banded"]))
    says(line_of("dtd", tmp_path, split=1.0), "link.jpg", "both a training and a validation image")


def dos(path):
    """A list as Windows programs save it: a byte order mark, backslashes, two-byte line ends."""
    text = path.read_text()
    text = text.replace("/", "\\\\" if path.suffix == ".json" else "\\")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())


def test_lists_from_windows_are_read(tmp_path):
    dos(coop(tmp_path, "dtd"))
    imagenet(tmp_path / "imagenet")
    dos(tmp_path / "imagenet" / "classnames.txt")
    for path in domainnet(tmp_path / "domainnet", MINI, "splits_mini").rglob("*.txt"):
        dos(path)
    aircraft(tmp_path / "fgvc_aircraft")
    for path in (tmp_path / "fgvc_aircraft").glob("images_*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    tasks = load_tasks("dtd,imagenet,minidomainnet,fgvc_aircraft", shots=1, root=tmp_path)
    assert tasks[0].class_names == ["banded", "blotchy"] and tasks[1].class_names[0] == "tench"
    assert tasks[2].class_names == ["the eiffel tower", "alarm clock", "t-shirt"]
    assert tasks[-1].class_names == ["707-320", "A330-200", "F-16A/B"]
    for task in tasks:
        assert task.test[0][0].size == (8, 8)


@pytest.mark.parametrize("name", [*COOP, "fgvc_aircraft", "imagenet"])
def test_a_missing_dataset_says_what_belongs_where(tmp_path, name):
    needs = {"fgvc_aircraft": "fgvc_aircraft/variants.txt", "imagenet": "imagenet/classnames.txt"}
    needs = needs.get(name) or f"{COOP[name][2].split('/')[0]}/{COOP[name][3]}"
    root = tmp_path / "sets"
    folder = root / needs.split("/")[0]
    root.mkdir()
    line = line_of(name, root)
    says(line, root / needs, "put them there or give another --root")
    assert ("--download" in line) == (name not in ("stanford_cars", "ucf101", "imagenet"))
    folder.mkdir()
    says(line_of(name, folder), f"that folder itself, so give --root {root}")
    says(line_of(name, tmp_path), f"it is in {root}, so give --root {root}")


def test_variants_and_lists_of_aircraft_that_disagree_are_named(tmp_path):
    aircraft(tmp_path / "fgvc_aircraft")
    put(tmp_path / "fgvc_aircraft" / "variants.txt", "707-320\nA330-200\n")
    says(
        line_of("fgvc_aircraft", tmp_path), "images_variant_train.txt", "'F-16A/B'", "variants.txt"
    )


# ------------------------------------------------------------ torchvision


def tv_pets(root):
    folder, number = root / "oxford-iiit-pet", 0
    for part, count in (("trainval", 6), ("test", 3)):
        lines = []
        for label, species, name in (
            (1, 1, "Abyssinian"),
            (2, 2, "american_bulldog"),
            (34, 2, "staffordshire_bull_terrier"),
        ):
            for _ in range(count):
                number += 1
                put(folder / "images" / f"{name}_{number}.jpg")
                lines.append(f"{name}_{number} {label} {species} 1\n")
        put(folder / "annotations" / f"{part}.txt", "".join(lines))
    return ["Abyssinian", "american bulldog", "staffordshire bull terrier"], dict(train=18, test=9)


def tv_cars(root):
    from scipy.io import savemat

    folder, names = root / "stanford_cars", ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    (folder / "devkit").mkdir(parents=True)
    cells = np.empty((1, 2), dtype=object)
    cells[0] = names
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": cells})
    fields = [(f, object) for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for part, count, mat in (
        ("train", 6, "devkit/cars_train_annos.mat"),
        ("test", 3, "cars_test_annos_withlabels.mat"),
    ):
        rows = [
            (1, 1, 8, 8, k + 1, f"{count * k + i + 1:05d}.jpg")
            for k in range(2)
            for i in range(count)
        ]
        for row in rows:
            put(folder / f"cars_{part}" / row[-1])
        savemat(folder / mat, {"annotations": np.array(rows, dtype=fields)[None]})
    return names, dict(train=12, test=6)


def tv_flowers(root, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = root / "flowers-102"
    labels = [1] * 11 + [60] * 11 + [98] * 11
    ids = {
        part: [11 * k + i + 1 for k in range(3) for i in range(*span)]
        for part, span in dict(trnid=(0, 6), valid=(6, 8), tstid=(8, 11)).items()
    }
    for i in range(33):
        put(folder / "jpg" / f"image_{i + 1:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(folder / "setid.mat", {part: np.array([x]) for part, x in ids.items()})
    unhashed = {key: (file, None) for key, (file, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(
        Flowers102, "_file_dict", unhashed
    )  # it knows the full files by their hashes
    return ["pink primrose", "pink and yellow dahlia", "mexican petunia"], dict(
        train=18, val=6, test=9
    )


def tv_food(root):
    for part, count in (("train", 6), ("test", 3)):
        meta = {
            c: [f"{c}/{part}{i}" for i in range(count)] for c in ("baby_back_ribs", "apple_pie")
        }
        for path in [path for paths in meta.values() for path in paths]:
            put(root / "food-101" / "images" / f"{path}.jpg")
        put(root / "food-101" / "meta" / f"{part}.json", json.dumps(meta))
    return ["apple pie", "baby back ribs"], dict(train=12, test=6)


def tv_dtd(root):
    for part, count in SIZES.items():
        paths = [f"{c}/{c}_{part}{i}.jpg" for c in ("polka-dotted", "banded") for i in range(count)]
        for path in paths:
            put(root / "dtd" / "dtd" / "images" / path)
        put(
            root / "dtd" / "dtd" / "labels" / f"{part}1.txt", "".join(f"{path}\n" for path in paths)
        )
    return ["banded", "polka-dotted"], dict(train=12, val=4, test=6)


def tv_sun(root):
    put(
        root / "SUN397" / "ClassName.txt",
        "/a/abbey\n/a/apartment_building/outdoor\n/y/youth_hostel\n",
    )
    for c in ("a/abbey", "a/apartment_building/outdoor", "y/youth_hostel"):
        for i in range(6):
            put(root / "SUN397" / c / f"sun_{c.replace('/', '_')}{i}.jpg")
    return ["abbey", "apartment building outdoor", "youth hostel"], dict(train=18)


def tv_caltech(root):
    for c in ("BACKGROUND_Google", "Faces", "Faces_easy", "ant", "yin_yang"):
        for i in range(6):
            put(root / "caltech101" / "101_ObjectCategories" / c / f"image_{i + 1:04d}.jpg")
    return ["off-center face", "centered face", "ant", "yin and yang symbol"], dict(train=24)


def tv_eurosat(root):
    for c in ("AnnualCrop", "HerbaceousVegetation", "SeaLake"):
        for i in range(6):
            put(root / "eurosat" / "2750" / c / f"{c}_{i + 1}.jpg")
    return ["annual crop land", "brushland or shrubland", "lake or sea"], dict(train=18)


TORCHVISION = dict(
    oxford_pets=tv_pets,
    stanford_cars=tv_cars,
    oxford_flowers=tv_flowers,
    food101=tv_food,
    dtd=tv_dtd,
    sun397=tv_sun,
    caltech101=tv_caltech,
    eurosat=tv_eurosat,
)


@pytest.fixture(params=TORCHVISION)
def official(request, tmp_path, monkeypatch):
    """A dataset in torchvision's layout: (name, root, class names, images a part)."""
    make = TORCHVISION[request.param]
    return (
        request.param,
        tmp_path,
        *(make(tmp_path, monkeypatch) if make is tv_flowers else make(tmp_path)),
    )


def test_a_dataset_in_torchvisions_layout_has_its_official_split_and_clips_names(official):
    name, root, names, sizes = official
    (task,) = same_at_a_seed(name, root, split=0.5)
    assert task.class_names == names and (task.name, task.template) == COOP[name][:2]
    pool = find_listings(name, root)[0]
    assert [len(x) for x in pool.items] == [sizes["train"] // len(names)] * len(names)
    assert (len(task.val) if task.val else 0) == sizes.get("val", 0)
    assert len(task.train) == sizes["train"] // 2 and len(task.test) == sizes.get(
        "test", sizes["train"] // 2
    )
    assert task.train[0][0].size == task.test[0][0].size == (8, 8)  # every path is that of an image
    assert len({*map(str, (path for x in pool.items for path in x))}) == sizes["train"]


def test_labels_of_torchvisions_layouts_are_those_of_the_files(tmp_path):
    """A label against the folder or the name of its image, where these tell."""
    for name in ("oxford_pets", "dtd", "food101", "eurosat"):
        TORCHVISION[name](tmp_path)
        (task,) = load_tasks(name, split=0.5, root=tmp_path)
        for path, label in items(task.train) | items(task.test):
            own = (
                path.split("/")[-1].rpartition("_")[0]
                if name == "oxford_pets"
                else path.split("/")[-2]
            )
            expected = {"AnnualCrop": 0, "HerbaceousVegetation": 1, "SeaLake": 2}.get(own, None)
            assert label == (
                task.class_names.index(own.replace("_", " ")) if expected is None else expected
            )


def test_damaged_lists_in_torchvisions_layout_are_named(official):
    name, root, _, _ = official
    lists = [p for p in root.rglob("*") if p.suffix in (".txt", ".mat", ".json")]
    assert bool(lists) == (name not in ("caltech101", "eurosat"))  # there the folders are the list
    for path in lists:
        path.write_text("damaged")
        says(line_of(name, root, split=0.5), root, "incomplete or damaged", "get it anew")


def test_lists_in_torchvisions_layout_without_their_images_are_refused(official):
    name, root, _, _ = official
    for path in root.rglob("*.jpg"):
        path.unlink()
    says(
        line_of(name, root, split=0.5),
        root,
        "anew" if name in ("sun397", "caltech101", "eurosat") else "unpack",
    )


def test_coops_split_comes_before_torchvisions(tmp_path):
    tv_food(tmp_path)
    coop(tmp_path, "food101")
    assert len(load_tasks("food101", shots=1, root=tmp_path)[0].val) == 2


def test_download_lets_torchvision_fetch_what_is_not_there(tmp_path, monkeypatch):
    from torchvision.datasets import DTD

    def fetch(self):
        if not self._check_exists():
            tv_dtd(tmp_path)

    monkeypatch.setattr(DTD, "_download", fetch)
    assert len(find_listings("dtd", tmp_path, download=True)) == 1
    with pytest.raises(UserError, match="--download cannot fetch stanford_cars"):
        find_listings("food101,stanford_cars", tmp_path, download=True)
    assert not (tmp_path / "food-101").exists()

    def unreachable(self):
        raise OSError("no route to host")

    monkeypatch.setattr(DTD, "_download", unreachable)
    with pytest.raises(
        UserError, match="DTD cannot be downloaded .no route to host.: put it into"
    ):
        find_listings("dtd", tmp_path, download=True)
    coop(tmp_path, "dtd")
    assert (
        len(find_listings("dtd", tmp_path, download=True)) == 1
    )  # CoOp's layout: nothing to fetch


# ------------------------------------------------------------ counts, and `check`


def test_what_is_missing_of_a_published_dataset_is_one_line_on_stderr(tmp_path, capsys):
    for domain in ("Art", "Clipart", "Product", "Real World"):
        for i in range(5):
            put(tmp_path / domain / "Alarm_Clock" / f"{i}.jpg")
    for seed in (1, 2):
        load_tasks("officehome", split=0.5, seed=seed, root=tmp_path)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: ")
    says(
        err[:-1],
        "Office-Home",
        tmp_path,
        "1 classes where 65",
        "20 images where 15,588",
        "15,568 missing",
        "no backpack, batteries, bed, bike, bottle, bucket, calculator, calendar, candles, "
        "chair and so on",
    )
    domainnet(tmp_path / "domainnet", MINI, "splits_mini", 2, 1)
    load_tasks("minidomainnet", split=0.5, root=tmp_path)
    says(
        capsys.readouterr().err[:-1],
        "miniDomainNet",
        "3 classes where 126 were published (123 missing)",
    )


def test_a_whole_dataset_brings_no_warning(tmp_path, capsys, monkeypatch):
    coop(tmp_path, "dtd")
    monkeypatch.setitem(module.DATASETS, "dtd", replace(module.DATASETS["dtd"], classes=2))
    load_tasks("dtd", shots=1, root=tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "name, classes",
    [
        ("oxford_pets", 37),
        ("stanford_cars", 196),
        ("oxford_flowers", 102),
        ("food101", 101),
        ("fgvc_aircraft", 100),
        ("dtd", 47),
        ("sun397", 397),
        ("caltech101", 101),
        ("ucf101", 101),
        ("eurosat", 10),
    ],
)
def test_the_class_names_that_are_shipped_are_all_and_differ(name, classes):
    find_listings("emoji")
    names = module.published_names(name)
    assert len(names) == len(set(names.values())) == classes and module.DATASETS[
        name
    ].classes == classes - (name == "caltech101")


@pytest.fixture
def command(monkeypatch, capsys):
    """`python common.py WORDS` without a process: (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["common.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            common.script(common.commands)
            sys.exit(0)
        return stop.value.code, *capsys.readouterr()

    return call


def test_check_lists_a_whole_benchmark_and_exits_with_0(command, tree):
    code, out, err = command("check", "--data", tree)
    rows = [line.split() for line in out.splitlines()]
    assert (
        code == 0
        and not err
        and rows[0] == ["task", "classes", "train", "val", "test", "template", "metric"]
    )
    assert (
        rows[1] == ["drawn", "3", "15", "-", "rest", "a", "photo", "of", "a", "{}", "accuracy"]
        and rows[2][0] == "painted"
    )
    assert out.endswith("2 tasks, 30 images: all is well\n")


def test_check_counts_the_images_of_each_part_and_names_every_problem(command, tmp_path):
    split = coop(tmp_path, "eurosat")
    content = json.loads(split.read_text())
    bad = [tmp_path / "eurosat" / "2750" / content[part][0][0] for part in ("train", "val", "test")]
    for path in bad:
        path.write_bytes(GREEN[:40])
    code, out, err = command("check", "--data", "eurosat", "--root", tmp_path)
    assert (
        code == 1
        and not err
        and out.splitlines()[1].split()[:5] == ["EuroSAT", "2", "12", "4", "6"]
    )
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 4 and out.endswith("1 task, 22 images: 4 problems\n")
    says(problems[0], "EuroSAT", "2 classes where 10 were published (8 missing)")
    for path, line in zip(bad, problems[1:]):
        says(line, path, "cannot be decoded")
    code, out, _ = command("check", "--data", "eurosat", "--root", tmp_path, "--quick")
    assert code == 1 and out.endswith("none of them decoded: 1 problem\n")


def test_check_of_a_tree_with_its_own_split_is_well_and_says_how_it_is_taken(command, tmp_path):
    layout = {f"{part}/{c}": 3 for part in ("train", "test") for c in ("cup", "hat")}
    make_tree(tmp_path / "shapes", layout)
    code, out, err = command("check", "--data", tmp_path / "shapes")
    assert code == 0 and not err and "note: " in out and "is taken as one task, shapes" in out
    assert out.endswith("1 task, 12 images: all is well\n")


def test_check_says_the_first_problems_and_the_number_of_the_rest(command, tree):
    for path in list(tree.rglob("*.png"))[:12]:
        path.write_text("no image")
    code, out, _ = command("check", "--data", tree)
    assert (
        code == 1
        and out.count("problem: ") == 10
        and "... and 2 more" in out
        and "12 problems" in out
    )


@pytest.mark.parametrize(
    "words, says_what",
    [
        (["check", "--data", "domainet"], "did you mean 'domainnet'"),
        (["check", "--data", "minidomainet"], "did you mean 'minidomainnet'"),
        (["check", "--data", "OxfordPets"], "did you mean 'oxford_pets'"),
        (["check", "--data", "coop12"], "did you mean 'coop1"),
        (["chek"], "did you mean 'check'"),
        ([], "python common.py check"),
        (["check", "--data", "dtd", "--root", "nowhere"], "there is no folder nowhere"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(command, words, says_what):
    code, out, err = command(*words)
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("common.py: ")
    says(err[:-1], says_what)


def test_check_as_a_process(tree):
    noise(1).save(tree / "drawn" / "cup" / "more.jpg")
    done = run_script("common.py", "check", "--data", tree)
    assert done.returncode == 0 and "31 images: all is well" in done.stdout, done.stderr
