"""ELEVATER's twenty datasets: each layout of the toolkit in miniature, read through the code path
of the full dataset; their metrics; damaged files; and MVLPT on them."""

import csv
import io
import json
import math
import re
import sys
import time
import zipfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import numbers, run_script
from PIL import Image

import common
import data
from data import UserError, find_listings, load_tasks
from data.benchmarks import elevater

MEAN, ROC, VOC = "mean per class", "ROC AUC", "11-point mAP"
# name: (task, folder, indices, their zip files, file of labels, classes, the first and the last
# name, template, metric), as published with the toolkit
TOOLKIT = {
    "caltech-101": (
        "Caltech101", "caltech_101_20211007", ["train.txt", "test.txt"],
        ["train.zip", "test.zip"], "labels.txt", 102, "accordion", "yin and yang symbol",
        "a photo of a {}", MEAN),
    "cifar-10": (
        "CIFAR10", "cifar_10_20211007", ["train.txt", "test.txt"], ["train.zip", "val.zip"],
        "labels.txt", 10, "airplane", "truck", "a photo of a {}", "accuracy"),
    "cifar-100": (
        "CIFAR100", "cifar100_20200721", ["train_images.txt", "test_images.txt"],
        ["train_images.zip", "test_images.zip"], "labels.txt", 100, "chimpanzee", "bicycle",
        "a photo of a {}", "accuracy"),
    "country211": (
        "Country211", "country211_20210924", ["train.txt", "test.txt"],
        ["train.zip", "test.zip"], "labels.txt", 211, "Andorra", "Zimbabwe",
        "a photo i took in {}", "accuracy"),
    "dtd": (
        "DTD", "dtd_20211007", ["train.txt", "test.txt"], ["train.zip", "test.zip"],
        "labels.txt", 47, "banded", "zigzagged", "a photo of a {} texture", "accuracy"),
    "eurosat_clip": (
        "EuroSAT", "eurosat_clip_20210930", ["train.txt", "test.txt"], ["2750.zip", "2750.zip"],
        "labels.txt", 10, "annual crop land", "lake or sea", "a centered satellite photo of {}",
        "accuracy"),
    "fer-2013": (
        "FER2013", "fer_2013_20211008", ["train.txt", "test.txt"], ["train.zip", "test.zip"],
        "labels.txt", 7, "angry", "surprised", "a photo of a {} looking face", "accuracy"),
    "fgvc-aircraft-2013b-variants102": (
        "FGVCAircraft", "fgvc_aircraft_2013b_variants102_20211007", ["train.txt", "test.txt"],
        ["train.zip", "test.zip"], "labels.txt", 100, "707-320", "Yak-42",
        "a photo of a {}, a type of aircraft", MEAN),
    "oxford-flower-102": (
        "Flowers102", "oxford_flower_102_20211007", ["train.txt", "test.txt"],
        ["train.zip", "test.zip"], "labels.txt", 102, "pink primrose", "blackberry lily",
        "a photo of a {}, a type of flower", MEAN),
    "food-101": (
        "Food101", "food_101_20211007", ["train.txt", "test.txt"], ["train.zip", "val.zip"],
        "labels.txt", 101, "apple pie", "waffles", "a photo of {}, a type of food", "accuracy"),
    "gtsrb": (
        "GTSRB", "gtsrb_20210923", ["train.txt", "test.txt"], ["train.zip", "final_test.zip"],
        "labelmap.txt", 43, "red and white circle 20 kph speed limit",
        "white circle with gray strike bar indicating no passing for trucks has ended",
        'a zoomed in photo of a "{}" traffic sign', "accuracy"),
    "hateful-memes": (
        "HatefulMemes", "hateful_memes_20211014", ["train_meta.json", "test_meta.json"],
        ["img.zip", "img.zip"], None, 2, "meme", "hatespeech meme", "a {}", ROC),
    "kitti-distance": (
        "KITTI", "kitti_distance_20210923", ["train_meta.json", "test_meta.json"],
        ["train_images.zip", "test_images.zip"], None, 4,
        "a photo i took of a car on my left or right side", "a photo i took with no car", "{}",
        "accuracy"),
    "mnist": (
        "MNIST", "mnist_20211008", ["train.txt", "test.txt"], ["train.zip", "val.zip"],
        "labels.txt", 10, "0", "9", 'a photo of the number: "{}"', "accuracy"),
    "oxford-iiit-pets": (
        "OxfordPets", "oxford_iiit_pets_20211007", ["train.txt", "test.txt"],
        ["train.zip", "val.zip"], "labels.txt", 37, "Abyssinian", "yorkshire terrier",
        "a photo of a {}, a type of pet", MEAN),
    "patch-camelyon": (
        "PatchCamelyon", "patch_camelyon_20211007", ["train.txt", "test.txt"],
        ["train.zip", "test.zip"], "labels.txt", 2, "lymph node",
        "lymph node containing metastatic tumor tissue", "this is a photo of {}", "accuracy"),
    "rendered-sst2": (
        "RenderedSST2", "rendered_sst2_20210924", ["train.txt", "test.txt"],
        ["train.zip", "test.zip"], "labels.txt", 2, "negative", "positive",
        "a {} review of a movie", "accuracy"),
    "resisc45_clip": (
        "RESISC45", "resisc45_clip_20210924", ["train.json", "test.json"],
        ["images.zip", "images.zip"], None, 45, "airplane", "wetland",
        "satellite imagery of {}", "accuracy"),
    "stanford-cars": (
        "StanfordCars", "stanford_cars_20211007", ["train.txt", "test.txt"],
        ["train.zip", "val.zip"], "labels.txt", 196, "Acura Integra Type R 2001",
        "Volvo XC90 SUV 2007", "a photo of a {}", "accuracy"),
    "voc-2007-classification": (
        "VOC2007", "voc2007_20211007", ["train_ic.txt", "test_ic.txt"],
        ["train.zip", "test.zip"], "labels.txt", 20, "aeroplane", "tvmonitor",
        "a photo of a {}", VOC),
}
IN_COOP = ["caltech-101", "dtd", "eurosat_clip", "fgvc-aircraft-2013b-variants102",
           "oxford-flower-102", "food-101", "oxford-iiit-pets", "stanford-cars"]
CALLED = {name: facts[1] if name in IN_COOP else name for name, facts in TOOLKIT.items()}
SIZES = (3, 2)                          # images per class to train and to test on


def picture(k, size=(8, 8)):
    """A PNG in the grey of class k."""
    buffer = io.BytesIO()
    Image.new("L", size, k).save(buffer, "PNG")
    return buffer.getvalue()


def several(name, k, n):
    """The classes of an image of class k: in VOC 2007 most show a person (14) too."""
    return [k, 14] if name == "voc-2007-classification" and k != 14 and n else [k]


def toolkit(root, name, sizes=SIZES, unpacked=False, size=(8, 8)):
    """A dataset in the toolkit's layout; returns its folder and {part: {path in zip: classes}}."""
    _, folder, indices, zips, labels, n, *_ = TOOLKIT[name]
    folder, parts = root / "classification" / folder, {}
    folder.mkdir(parents=True)
    if labels:
        (folder / labels).write_text("".join(f"raw_{k}\n" for k in range(n)))
    files = {}                                                  # zip file -> {path: content}
    for part, index, archive, count in zip(("train", "test"), indices, zips, sizes):
        parts[part] = {f"{k}/{part} {i}.png": several(name, k, i)
                       for k in range(n) for i in range(count)}
        for path in parts[part]:
            files.setdefault(archive, {})[path] = picture(int(path.split("/")[0]), size)
        write_index(folder / index, archive, parts[part], n)
    for archive, content in files.items():
        if unpacked:
            for path, image in content.items():
                (folder / archive[:-4] / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / archive[:-4] / path).write_bytes(image)
        else:
            write_zip(folder / archive, content)
    return folder, parts


def write_index(path, archive, images, n):
    """An index of {path: classes}, by its ending; in JSON with numbers from 1, as COCO's are."""
    if path.suffix == ".txt":
        lines = [f"{archive}@{image} {','.join(map(str, k))}\n" for image, k in images.items()]
        path.write_text("".join(lines))
        return
    listed = [dict(id=i + 1, file_name=f"{archive}@{image}", width=8, height=8)
              for i, image in enumerate(images)]
    if path.name.startswith("test"):
        listed = [dict(id=i + 1, zip_file=archive, file_name=image)
                  for i, image in enumerate(images)]
    marks = [dict(id=i + 1, image_id=i + 1, category_id=k[0] + 1)
             for i, k in enumerate(images.values())]
    names = [dict(id=k + 1, name=f"raw {k}") for k in reversed(range(n))]
    path.write_text(json.dumps(dict(images=listed, annotations=marks, categories=names)))


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as file:
        for name, image in content.items():
            file.writestr(name, image)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """All twenty in one root, and what is in each."""
    root = tmp_path_factory.mktemp("twenty")
    return root, {name: toolkit(root, name) for name in TOOLKIT}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Datasets of few classes, 5 images each to train on."""
    root = tmp_path_factory.mktemp("few")
    for name in ("cifar-10", "eurosat_clip", "fer-2013", "hateful-memes", "kitti-distance", "mnist",
                 "voc-2007-classification"):
        toolkit(root, name, sizes=(5, 2))
    return root


def classes_of(images):
    """{path in the zip file or folder: classes}."""
    found = {}
    for item, label in zip(images.items, images.labels):
        path = item[1] if isinstance(item, tuple) else "/".join(item.split("/")[-2:])
        found[path] = sorted(label) if isinstance(label, tuple) else [label]
    return found


# ------------------------------------------------------------------------- the toolkit's layout

def checked(name, root, parts):
    """The task of a dataset, after a look at its names, its images and their labels."""
    title, _, _, _, _, n, first, last, template, metric = TOOLKIT[name]
    [task] = load_tasks(CALLED[name], root=root)
    assert (task.name, task.template, task.metric, task.augment) == (title, template, metric, False)
    assert len(task.class_names) == n and len(set(task.class_names)) == n
    assert (task.class_names[0], task.class_names[-1]) == (first, last)
    for images, part, count in zip((task.train, task.test), ("train", "test"), SIZES):
        assert len(images) == n * count
        assert classes_of(images) == {path: sorted(k) for path, k in parts[part].items()}
    assert not set(task.train.items) & set(task.test.items) and task.val is None
    for images in (task.train, task.test):
        for i in (0, n, len(images) - 1):
            assert set(images[i][0].tobytes()) == {images.classes[i]}
    return task


@pytest.mark.parametrize("name", TOOLKIT)
def test_a_dataset_in_the_toolkits_layout_has_its_names_images_and_labels(twenty, name):
    root, made = twenty
    checked(name, root, made[name][1])
    drawn = [load_tasks(CALLED[name], shots=2, seed=s, root=root)[0].train.items for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["mnist", "kitti-distance", "eurosat_clip"])
@pytest.mark.parametrize("into", ["folders of their own", "the dataset's folder"])
def test_unpacked_images_serve_too(tmp_path, name, into):
    folder, parts = toolkit(tmp_path, name, unpacked=True)
    if into == "the dataset's folder":
        for archive in dict.fromkeys(TOOLKIT[name][3]):
            for path in sorted((folder / archive[:-4]).rglob("*.png")):
                (folder / path.parent.name).mkdir(exist_ok=True)
                path.rename(folder / path.parent.name / path.name)
    task = checked(name, tmp_path, parts)
    assert all(isinstance(item, str) for item in task.train.items)


def test_an_index_may_name_files_that_were_never_in_a_zip_file(tmp_path):
    folder, parts = toolkit(tmp_path, "mnist", unpacked=True)
    for part, archive in (("train", "train"), ("test", "val")):
        index = folder / f"{part}.txt"
        index.write_text(index.read_text().replace(".zip@", "\\"))
        assert f"{archive}\\0" in index.read_text()
    checked("mnist", tmp_path, parts)


def test_elevater20_are_all_and_elevater12_those_that_coop_lacks(twenty):
    root, _ = twenty
    names = [task.name for task in load_tasks("elevater20", shots=1, root=root)]
    assert names == [facts[0] for facts in TOOLKIT.values()]
    twelve = [task.name for task in load_tasks("elevater12", shots=1, root=root)]
    assert twelve == [facts[0] for name, facts in TOOLKIT.items() if name not in IN_COOP]
    both = load_tasks("mnist,dtd_20211007", shots=1, root=root)
    assert [task.name for task in both] == ["MNIST", "DTD"]


def test_the_tasks_are_those_of_mvlpts_tables():
    columns = json.loads((common.HERE / "data" / "paper_results.json").read_text())["columns"]
    known = {facts[0] for facts in TOOLKIT.values()}
    printed = {c["data"]: c["results"].keys() - {"average"} for c in columns
               if c["paper"] == "MVLPT" and len(c["results"]) > 1}
    assert printed["elevater20"] == known and printed["elevater12"] < known


def test_every_task_has_an_ensemble_of_templates_that_begins_with_its_own(twenty):
    for task in load_tasks("elevater20", shots=1, root=twenty[0]):
        ensemble = common.templates_of(task, "elevater20")
        assert task.template in [template.removesuffix(".") for template in ensemble], task.name


def test_check_reads_all_images_and_compares_the_counts_with_the_published_ones(twenty):
    from data.check import report

    lines, _, problems, images = report("elevater20", twenty[0])
    assert images == 5 * sum(facts[5] for facts in TOOLKIT.values())
    assert len(lines) == 21 and lines[14].split()[:5] == ["MNIST", "10", "30", "-", "20"]
    assert lines[12].split()[-2:] == ["ROC", "AUC"] and lines[20].endswith("11-point mAP")
    assert len(problems) == 20
    folder = twenty[0] / "classification" / "mnist_20211008"
    assert problems[13] == (f"MNIST in {folder} has 50 images where 70,000 were published (69,950 "
                            "missing)")


def test_a_file_of_labels_with_other_classes_than_the_published_gives_the_names(tmp_path, capsys):
    folder, _ = toolkit(tmp_path, "mnist")
    for file in ("train.txt", "test.txt"):
        lines = (folder / file).read_text().splitlines()
        keep = [line for line in lines if int(line.split()[-1]) < 3]
        (folder / file).write_text("\n".join(keep))
    (folder / "labels.txt").write_text("zero\none_two\nthree\n")
    [task] = load_tasks("mnist", shots=1, root=tmp_path)
    assert task.class_names == ["zero", "one two", "three"]
    assert "3 classes where 10 were published" in capsys.readouterr().err


def test_an_index_of_30_000_lines_is_listed_in_seconds(tmp_path):
    folder, _ = toolkit(tmp_path, "mnist")
    images = {f"{i % 10}/train {i}.png": [i % 10] for i in range(30_000)}
    write_zip(folder / "train.zip", dict.fromkeys(images, picture(0)))
    write_index(folder / "train.txt", "train.zip", images, 10)
    start = time.process_time()
    [listing] = find_listings("mnist", tmp_path)
    assert sum(map(len, listing.items)) == 30_000 and time.process_time() - start < 4


def test_workers_read_from_one_zip_file_at_a_time(tmp_path):
    """The file is open in this process first: a worker that went on with that handle would move its
    position under the others."""
    images = {f"{i}.png": picture(i % 251, (60, 60)) for i in range(600)}
    write_zip(tmp_path / "x.zip", images)
    items = [(str(tmp_path / "x.zip"), name) for name in images]
    lists = data.Images(items, [i % 251 for i in range(600)])
    assert lists[5][0].getpixel((0, 0)) == (5, 5, 5)
    found = [x for x, _ in data.in_order(lists, 8, workers=2, batch=10)]
    assert torch.cat(found)[:, 0, 0, 0].tolist() == lists.labels


# ---------------------------------------------------------------------------------- protocol

def test_images_are_resized_and_cropped_at_the_centre_and_kittis_only_resized(tmp_path):
    """An image of 24 x 8 whose left third is black: the crop at its centre does not see it."""
    wide = Image.new("RGB", (24, 8), "white")
    wide.paste("black", (0, 0, 8, 8))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    for name, black in (("kitti-distance", True), ("mnist", False)):
        folder, parts = toolkit(tmp_path, name)
        for archive, part in zip(TOOLKIT[name][3], ("train", "test")):
            write_zip(folder / archive, dict.fromkeys(parts[part], buffer.getvalue()))
        [task] = load_tasks(name, shots=1, root=tmp_path)
        [(test, _)] = data.in_order(task.test.subset([0]), 8, workers=0)
        for view in (1, 2, 3):
            [(train, _, _)] = data.rendered([task.train], [[(0, 0, view)]], 8, 1, augment=[False],
                                            workers=0)
            assert torch.equal(train, test)
        assert (test[0, :, :, 0].max() < 20) == black and test[0, :, :, -1].min() > 235


def test_a_fifth_of_the_few_shot_set_is_held_out(few):
    for task in load_tasks("mnist,hateful-memes,voc-2007-classification", shots=5, root=few):
        [part] = data.with_held_out([task], 1)
        held, n = Counter(part.val.classes), len(task.class_names)
        assert held == dict.fromkeys(range(n), 1)
        assert Counter(part.train.classes) == dict.fromkeys(range(n), 4)


def test_a_fifth_is_held_out_by_the_class_that_an_image_was_drawn_for():
    labels = [(k, *other) for k in (0, 1) for other in ((), (2,), (3,), (4,), (2, 3))]
    rest, held = data.hold_out(data.Images(range(10), labels), 1)
    assert sorted(held.classes) == [0, 1] and Counter(rest.classes) == {0: 4, 1: 4}


# ------------------------------------------------------------------------------- several labels

def test_an_image_of_several_classes_is_drawn_for_the_rarest(tmp_path):
    """Of 20 classes with 3 images each, 2 of them with a person (14), who is in 2 * 19 + 3."""
    toolkit(tmp_path, "voc-2007-classification")
    [task] = load_tasks("voc-2007-classification", shots=2, root=tmp_path)
    assert Counter(task.train.classes) == dict.fromkeys(range(20), 2)
    assert (14,) in task.train.labels and (0, 14) in task.test.labels
    assert (19, 14) in task.test.labels and (14, 19) not in task.test.labels


def test_labels_of_a_batch_are_numbers_or_a_distribution_per_image():
    assert data.label_tensor([2, 0]).tolist() == [2, 0]
    assert data.label_tensor([(3, 1), 2]).tolist() == [[0, 0.5, 0, 0.5], [0, 0, 1, 0]]


def test_the_loss_of_several_labels_is_the_mean_over_them_by_hand(small):
    """Two tasks of 2 and 3 classes, so that the rows of the first are longer than its classes."""
    tasks = [SimpleNamespace(class_names=["dog", "cat"], template="{}"),
             SimpleNamespace(class_names=["cup", "hat", "ball"], template="{}")]
    texts = common.Texts(tasks)
    torch.manual_seed(0)
    image, text = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    labels, task = data.label_tensor([(2, 0), (1,), 1]), torch.tensor([1, 1, 0])
    losses = common.task_losses(small, image, text, labels, task, texts)
    scale = small.logit_scale.exp().item()
    x = (image / image.norm(dim=1, keepdim=True)).tolist()
    w = (text / text.norm(dim=1, keepdim=True)).tolist()
    z = [[scale * sum(a * b for a, b in zip(i, c)) for c in w] for i in x]

    def loss(row, own, wanted):
        log_sum = math.log(sum(math.exp(z[row][k]) for k in own))
        return sum(log_sum - z[row][k] for k in wanted) / len(wanted)

    second = (loss(0, (2, 3, 4), [4, 2]) + loss(1, (2, 3, 4), [3])) / 2
    assert losses.tolist() == pytest.approx([loss(2, (0, 1), [1]), second], rel=1e-5)
    losses.sum().backward()
    assert image.grad.isfinite().all() and image.grad.norm() > 0


def test_one_label_as_a_distribution_is_the_ordinary_loss(small):
    texts = common.Texts([SimpleNamespace(class_names=["a", "b"], template="{}")] * 2)
    image, text = torch.randn(4, 8), torch.randn(2, 8)
    labels, task = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    rows = torch.nn.functional.one_hot(labels, 5).float()       # more columns than classes
    ordinary = common.task_losses(small, image, text, labels, task, texts)
    assert torch.allclose(ordinary, common.task_losses(small, image, text, rows, task, texts))


# --------------------------------------------------------------------------------------- metrics

def auc(second, labels):
    scores = torch.tensor([[0.0, s] for s in second])
    return common.score(ROC, scores, torch.tensor(labels))


def test_roc_auc_by_hand():
    """The part of the pairs of a positive and a negative that are in order; a tie counts half."""
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(75)
    assert auc([1, 1, 2, 0], [1, 0, 1, 0]) == pytest.approx(100 * 3.5 / 4)
    assert auc([3, 3, 3], [0, 1, 0]) == 50
    assert auc([1, 2, 3], [1, 1, 1]) == auc([1, 2, 3], [0, 0, 0]) == 50     # one class only


def test_roc_auc_ranks_by_the_probability_of_the_second_class():
    """Class 1 has the larger logit in image 0, and the larger probability in image 1."""
    scores = torch.tensor([[9.0, 5.0], [0.0, 4.0]])
    assert common.score(ROC, scores, torch.tensor([0, 1])) == 100


def test_11_point_average_precision_by_hand():
    """Ranks +, -, +, -, -: precision 1 up to recall 1/2 (6 points), 2/3 beyond (5 points)."""
    scores = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
    labels = torch.tensor([[1.0], [0], [1], [0], [0]])
    assert common.score(VOC, scores, labels) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    last = torch.tensor([[0.0], [0], [0], [0], [1]])            # nothing is right before the last
    assert common.score(VOC, scores, last) == pytest.approx(20)
    tie = torch.zeros(5, 1)                                     # all tie: 2 of 5 are right
    assert common.score(VOC, tie, labels) == pytest.approx(40)


def test_a_class_without_a_positive_does_not_count_in_the_mean():
    scores = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
    labels = torch.tensor([[0.5, 0.5, 0], [1, 0, 0]])           # class 0: both, class 1: the first
    assert common.score(VOC, scores, labels) == pytest.approx((100 + 50) / 2)
    assert common.score(VOC, scores, torch.zeros(2, 3)) == 0
    assert common.score(VOC, scores[:, :1], labels[:, :1]) == 100       # one class only


def test_the_mean_per_class_leaves_out_a_class_without_images():
    scores = torch.eye(4)[[0, 0, 1, 3]]
    assert common.score(MEAN, scores, torch.tensor([0, 0, 1, 1])) == 75
    assert common.score(MEAN, scores, torch.tensor([0, 0, 0, 0])) == 50     # one class only


# -------------------------------------------------------------------------------- damaged files

def first_line(path, change):
    lines = path.read_text().splitlines()
    lines[1] = change(lines[1])
    path.write_text("\n".join(lines) + "\n")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def add(path, name):
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, picture(0))


def lose(path, name):
    with zipfile.ZipFile(path) as file:
        content = {n: file.read(n) for n in file.namelist() if n != name}
    write_zip(path, content)


def one_part(folder):
    (folder / "test.txt").write_text((folder / "train.txt").read_text())


INDEX = "mnist_20211008/train.txt, line 2,"
BAD = {
    "missing zip": (
        lambda f: (f / "train.zip").unlink(),
        ["train.txt, line 1,", "mnist_20211008/train.zip, which is not there"]),
    "lost member": (
        lambda f: lose(f / "train.zip", "0/train 1.png"),
        [INDEX, "names 0/train 1.png", "mnist_20211008/train.zip lacks"]),
    "truncated zip": (
        lambda f: truncate(f / "train.zip"),
        ["train.txt, line 1,", "mnist_20211008/train.zip", "no whole zip file"]),
    "no label": (
        lambda f: first_line(f / "train.txt", lambda line: line.rpartition(" ")[0]),
        [INDEX, "no label", "train.zip@0/train"]),
    "no number": (
        lambda f: first_line(f / "train.txt", lambda line: f"{line},x"), [INDEX, "no label"]),
    "endless label": (
        lambda f: first_line(f / "train.txt", lambda line: line + "9" * 5000), [INDEX, "no label"]),
    "label beyond": (
        lambda f: first_line(f / "train.txt", lambda line: f"{line[:-1]}10"),
        [INDEX, "label 10", "the 10 classes of", "labels.txt", "0 to 9"]),
    "two labels": (
        lambda f: first_line(f / "train.txt", lambda line: f"{line},3"), [INDEX, "2 labels"]),
    "member outside": (
        lambda f: first_line(f / "train.txt", lambda line: "train.zip@../../x.png 0"),
        [INDEX, "'train.zip@../../x.png'", "leads out"]),
    "archive outside": (
        lambda f: first_line(f / "train.txt", lambda line: "../other/train.zip@x.png 0"),
        [INDEX, "leads out"]),
    "absolute": (
        lambda f: first_line(f / "train.txt", lambda line: "/etc/x.png 0"), [INDEX, "leads out"]),
    "backslashes": (
        lambda f: first_line(f / "train.txt", lambda line: "..\\x.png 0"), [INDEX, "leads out"]),
    "drive": (
        lambda f: first_line(f / "train.txt", lambda line: "C:\\x.png 0"), [INDEX, "leads out"]),
    "outside in the zip": (
        lambda f: add(f / "train.zip", "../evil.png"),
        ["mnist_20211008/train.zip", "'../evil.png'", "leads out"]),
    "lost file": (
        lambda f: first_line(f / "train.txt", lambda line: "plain/x.png 0"),
        [INDEX, "names x.png", "mnist_20211008/plain lacks"]),
    "on both sides": (
        one_part, ["mnist_20211008 lists", "train.zip@0/train 0.png twice, in train and test"]),
    "no index": (
        lambda f: (f / "test.txt").unlink(), ["mnist_20211008/test.txt cannot be read"]),
    "no labels": (
        lambda f: (f / "labels.txt").unlink(), ["mnist_20211008/labels.txt cannot be read"]),
    "empty index": (
        lambda f: (f / "train.txt").write_text(""), ["class '0' of MNIST", "no training image"]),
}


def line_of(name, root):
    """The line with which a dataset is rejected, after which nothing new is on the disk."""
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError) as rejected:
        load_tasks(name, shots=1, root=root)
    assert sorted(root.rglob("*")) == before and str(rejected.value).isprintable()
    return str(rejected.value)


@pytest.mark.parametrize("bad", BAD)
def test_damage_of_the_toolkits_files_is_named(tmp_path, bad):
    folder, _ = toolkit(tmp_path, "mnist")
    damage, words = BAD[bad]
    damage(folder)
    line = line_of("mnist", tmp_path)
    assert [word for word in words if word not in line] == [], line


COCO = {
    "image without annotation": (
        lambda c: c["annotations"].pop(1), ["train_meta.json, image 2,", "no label", "0/train 1"]),
    "label beyond": (
        lambda c: c["annotations"][0].update(category_id=9),
        ["train_meta.json, annotation of image 1,", "label 9"]),
    "two labels": (
        lambda c: c["annotations"].append(dict(id=99, image_id=1, category_id=2)),
        ["train_meta.json, image 1,", "2 labels"]),
    "annotation of no image": (
        lambda c: c["annotations"][0].update(image_id=77), ["train_meta.json", "image 77"]),
    "member outside": (
        lambda c: c["images"][0].update(file_name="img.zip@../x.png"),
        ["train_meta.json, image 1,", "leads out"]),
    "lost member": (
        lambda c: c["images"][0].update(file_name="img.zip@x.png"),
        ["train_meta.json, image 1,", "names x.png", "img.zip lacks"]),
    "no categories": (lambda c: c.pop("categories"), ["train_meta.json is no index in COCO's"]),
    "no name": (
        lambda c: c["images"][0].update(file_name=7), ["train_meta.json is no index in COCO's"]),
    "a name of two lines": (
        lambda c: c["images"][0].update(file_name="img.zip@a\nb"), ["is no index in COCO's"]),
    "no number": (
        lambda c: c["annotations"][0].update(category_id=[]), ["is no index in COCO's"]),
    "two images of one number": (
        lambda c: c["images"][0].update(id=2), ["train_meta.json is no index in COCO's"]),
    "two categories of one number": (
        lambda c: c["categories"][0].update(id=1), ["train_meta.json is no index in COCO's"]),
}


@pytest.mark.parametrize("bad", COCO)
def test_damage_of_a_coco_index_is_named(tmp_path, bad):
    folder, _ = toolkit(tmp_path, "hateful-memes")
    damage, words = COCO[bad]
    edit(folder / "train_meta.json", damage)
    line = line_of("hateful-memes", tmp_path)
    assert [word for word in words if word not in line] == [], line


def test_an_image_damaged_inside_a_zip_file_is_named(tmp_path):
    folder, _ = toolkit(tmp_path, "mnist")
    content = bytearray((folder / "val.zip").read_bytes())
    content[60] ^= 255                                          # in the first member
    (folder / "val.zip").write_bytes(content)
    [task] = load_tasks("mnist", shots=1, root=tmp_path)
    with pytest.raises(UserError, match=f"^{folder}/val.zip@0/test 0.png cannot be decoded.*CRC"):
        list(data.in_order(task.test, 8, workers=0))


def test_a_missing_dataset_says_what_belongs_where(tmp_path):
    toolkit(tmp_path, "mnist")
    for name in TOOLKIT:
        if name != "mnist":
            line = line_of(CALLED[name], tmp_path)
            assert f"{TOOLKIT[name][0]} needs {tmp_path}/classification/{TOOLKIT[name][1]}" in line
    inside = tmp_path / "classification"
    assert f"give --root {tmp_path}" in line_of("mnist", inside)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, here):
    folder, _ = toolkit(tmp_path, "mnist")
    (folder / "val.zip").unlink()
    words = ["--data", "mnist", "--root", tmp_path, "--shots", "1", "--clip", "tiny"]
    code, out, err = here("mvlpt.py", *words)
    assert code == 2 and err.count("\n") == 1 and not out
    assert "test.txt, line 1," in err and "val.zip, which is not there" in err


# ----------------------------------------------------------------------------- torchvision's layout

def idx(path, array):
    """A file of MNIST: two zeros, the type of its numbers, the dimensions, the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def tv_mnist(root, patch):
    for part, count in (("train", 3), ("t10k", 2)):
        labels = np.repeat(np.arange(10), count)
        pixels = np.broadcast_to(labels[:, None, None], (10 * count, 28, 28))
        idx(root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", pixels)
        idx(root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)


def tv_cifar(root, patch, name="CIFAR10", n=10):
    from torchvision import datasets

    kind = getattr(datasets, name)
    labels = {"train": [k for k in range(n) for _ in range(3)], "test": list(range(n)) * 2}

    def init(self, root, train):
        self.targets = labels["train" if train else "test"]
        self.data = np.stack([np.full((32, 32, 3), k, dtype=np.uint8) for k in self.targets])
        self.classes = ["airplane", "apple"] if n == 10 else self.names
        self.transform = self.target_transform = None

    kind.names = sorted(name.replace(" ", "_") for name in elevater.published_names("cifar-100"))
    patch.setattr(kind, "__init__", init)
    (root / kind.base_folder).mkdir()


def tv_gtsrb(root, patch):
    folder, rows = root / "gtsrb", ["Filename;ClassId"]
    for k in range(43):
        for i in range(3):
            save(folder / "GTSRB" / "Training" / f"{k:05d}" / f"{i}.ppm", k)
        for i in range(2):
            save(folder / "GTSRB" / "Final_Test" / "Images" / f"{k}_{i}.ppm", k)
            rows.append(f"{k}_{i}.ppm;{k}")
    (folder / "GT-final_test.csv").write_text("\n".join(rows))


def save(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (k, k, k)).save(path)


def tv_country(root, patch):
    for k in range(211):
        code = chr(65 + k // 26) + chr(65 + k % 26)
        for part, count in (("train", 3), ("test", 2)):
            for i in range(count):
                save(root / "country211" / part / code / f"{i}.png", k)


def tv_sst2(root, patch):
    for k, name in enumerate(("negative", "positive")):
        for part, count in (("train", 3), ("test", 2)):
            for i in range(count):
                save(root / "rendered-sst2" / part / name / f"{i}.png", k)


def tv_voc(root, patch):
    folder = root / "VOCdevkit" / "VOC2007"
    names, marks = elevater.published_names("voc-2007-classification"), {}
    for k in range(20):
        for part, count in (("train", 3), ("test", 2)):
            for i in range(count):
                image = f"{part}{k:02d}{i}"
                save(folder / "JPEGImages" / f"{image}.jpg", k)
                marks[part, image] = several("voc-2007-classification", k, i)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for k, name in enumerate(names):
        for part in ("train", "test"):
            lines = [f"{image} {' 1' if k in own else '-1'}\n" for (p, image), own in marks.items()
                     if p == part]
            (folder / "ImageSets" / "Main" / f"{name}_{part}.txt").write_text("".join(lines))


def tv_fer(root, patch):
    """The file's order is angry, disgust, fear, happy, sad, surprise, neutral."""
    from torchvision.datasets import FER2013

    known = {key: (file, None) for key, (file, _) in FER2013._RESOURCES.items()}
    patch.setattr(FER2013, "_RESOURCES", known)
    own = [0, 1, 2, 3, 5, 6, 4]                 # their places among the toolkit's names
    (root / "fer2013").mkdir()
    with (root / "fer2013" / "fer2013.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for k in range(7):
            pixels = " ".join([str(own[k])] * 48 * 48)
            writer.writerows([[k, pixels, "Training"]] * 3)
            writer.writerows([[k, pixels, use] for use in ("PublicTest", "PrivateTest")])


def tv_pcam(root, patch):
    """Its files are read by h5py, which need not be there: a stand-in holds the arrays."""
    from torchvision.datasets import PCAM

    arrays = {}
    (root / "pcam").mkdir()
    for part, count in (("train", 3), ("test", 2)):
        labels = np.repeat([0, 1], count)
        pixels = np.stack([np.full((96, 96, 3), k, dtype=np.uint8) for k in labels])
        for key, array in (("images", pixels), ("targets", labels.reshape(-1, 1, 1, 1))):
            file = root / "pcam" / PCAM._FILES[part][key][0]
            file.touch()
            arrays[str(file)] = array

    class File(dict):
        def __init__(self, path):
            super().__init__(x=arrays[str(path)], y=arrays[str(path)])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    patch.setitem(sys.modules, "h5py", SimpleNamespace(File=File))


OFFICIAL = {
    "mnist": tv_mnist,
    "cifar-10": tv_cifar,
    "cifar-100": lambda root, patch: tv_cifar(root, patch, "CIFAR100", 100),
    "gtsrb": tv_gtsrb,
    "country211": tv_country,
    "rendered-sst2": tv_sst2,
    "voc-2007-classification": tv_voc,
    "fer-2013": tv_fer,
    "patch-camelyon": tv_pcam,
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_dataset_in_torchvisions_layout_has_its_split(tmp_path, name, monkeypatch, capsys):
    """The grey of an image is its label, for CIFAR-100 the place of its name in the alphabet."""
    OFFICIAL[name](tmp_path, monkeypatch)
    [task] = load_tasks(name, root=tmp_path)
    title, _, _, _, _, n, first, last, template, metric = TOOLKIT[name]
    assert (task.name, task.template, task.metric) == (title, template, metric)
    assert (len(task.class_names), task.class_names[0], task.class_names[-1]) == (n, first, last)
    assert f"{5 * n:,} images where" in capsys.readouterr().err
    alphabet = sorted(task.class_names)
    for images, count in ((task.train, 3), (task.test, 2)):
        assert Counter(images.classes) == dict.fromkeys(range(n), count)
        for i in range(0, len(images), 7):
            grey = np.asarray(images[i][0]).mean()
            if name == "cifar-100":
                assert alphabet[round(grey)] == task.class_names[images.classes[i]]
            else:
                assert round(grey) == images.classes[i]
    assert not set(task.train.items) & set(task.test.items)
    if name == "voc-2007-classification":
        assert (0, 14) in task.test.labels and (14,) in task.test.labels


def test_the_toolkits_layout_comes_before_torchvisions(tmp_path, monkeypatch):
    tv_mnist(tmp_path, monkeypatch)
    _, parts = toolkit(tmp_path, "mnist")
    checked("mnist", tmp_path, parts)


def test_a_dataset_of_coops_in_torchvisions_layout_has_elevaters_metric(tmp_path):
    for part in ("train", "test"):
        paths = [f"{c}/{c}_{part}{i}.png" for c in ("polka-dotted", "banded") for i in range(3)]
        for path in paths:
            save(tmp_path / "dtd" / "dtd" / "images" / path, 0)
        (tmp_path / "dtd" / "dtd" / "labels").mkdir(exist_ok=True)
        (tmp_path / "dtd" / "dtd" / "labels" / f"{part}1.txt").write_text("\n".join(paths))
    (tmp_path / "dtd" / "dtd" / "labels" / "val1.txt").write_text("")
    [task] = load_tasks("dtd_20211007", root=tmp_path)
    assert task.class_names == ["banded", "polka-dotted"] and not task.augment
    assert task.template == "a photo of a {} texture" and len(task.train) == len(task.test) == 6


def test_damage_in_torchvisions_layout_is_named(tmp_path, monkeypatch):
    tv_gtsrb(tmp_path, monkeypatch)
    (tmp_path / "gtsrb" / "GT-final_test.csv").unlink()
    line = line_of("gtsrb", tmp_path)
    assert line.startswith(f"GTSRB in {tmp_path}/gtsrb is incomplete or damaged")


def test_download_lets_torchvision_fetch_what_is_not_there(tmp_path, monkeypatch):
    from torchvision.datasets import GTSRB

    monkeypatch.setattr(GTSRB, "download", lambda self: tv_gtsrb(tmp_path, monkeypatch))
    assert len(find_listings("gtsrb", tmp_path, download=True)) == 1
    with pytest.raises(UserError, match="--download cannot fetch hateful-memes"):
        find_listings("hateful-memes,mnist", tmp_path, download=True)
    assert not (tmp_path / "MNIST").exists()

    def unreachable(self):
        raise OSError("no route to host")

    monkeypatch.setattr(GTSRB, "download", unreachable)
    with pytest.raises(UserError, match="^GTSRB cannot be downloaded .no route to host.: put it"):
        find_listings("gtsrb", tmp_path, download=True)


# --------------------------------------------------------------------------------------- methods

def test_images_of_two_datasets_with_one_name_have_fingerprints_of_their_own():
    """Every dataset has its train.zip; where a dataset lies does not count."""
    items = [(f"{root}/classification/{folder}/train.zip", "0/1.png")
             for root in ("/a", "/b") for folder in ("mnist_20211008", "gtsrb_20210923")]
    one, two, three, four = common.fingerprints(data.Images(items, [0] * 4)).tolist()
    assert one == three != two == four


def test_mvlpt_from_three_source_tasks_to_four_targets_in_groups_of_two(few, tmp_path, here):
    sources, out = "cifar-10,eurosat_clip_20210930,fer-2013", tmp_path / "run"
    targets = "voc-2007-classification,hateful-memes,kitti-distance,mnist"
    words = ["--root", few, "--clip", "tiny", "--shots", "2", "--epochs", "1", "--workers", "0"]
    done = run_script("mvlpt.py", "--data", targets, "--source", sources, "--group-size", "2",
                      *words, "--out", out)
    assert done.returncode == 0, done.stderr
    result, names = numbers(out), ["VOC2007", "HatefulMemes", "KITTI", "MNIST"]
    assert result["tasks"] == names
    assert result["metrics"] == dict(zip(names, (VOC, ROC, "accuracy", "accuracy")))
    assert "accuracy (VOC2007: 11-point mAP, HatefulMemes: ROC AUC) in %" in done.stdout
    for name in names:
        assert 0 <= result["zero_shot"][name] <= 100 and 0 <= result["accuracy"][name][0] <= 100
    groups = result["groups"][0]
    assert [group[0] for group in groups] == names
    assert all(len(set(group)) in (1, 2) for group in groups)
    with (out / "transfer.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["source", *names] and len(rows) == 5
    matrix = torch.tensor([[float(x) for x in row[1:]] for row in rows[1:]])
    best = matrix.amax(dim=0).tolist()                          # a column of zeros stays zero
    assert best[:2] == [1, 1] and set(best) <= {0, 1} and matrix.min() >= 0
    logged = {row["phase"] for row in csv.DictReader((out / "log.csv").open())}
    assert {"source", "alone VOC2007", "transfer"} <= logged
    code, again, err = here("mvlpt.py", "--eval", out / "prompts.pt", "--workers", "0")
    rows_of = [re.findall(r"^(?:VOC2007|KITTI) .*$", text, re.M) for text in (done.stdout, again)]
    assert code == 0 and rows_of[0] == rows_of[1] and rows_of[0], err


@pytest.mark.parametrize("method", ["coop_mt", "jscpt"])
def test_a_method_trains_on_tasks_with_one_and_with_several_labels(few, tmp_path, here, method):
    words = ["--data", "voc-2007-classification,hateful-memes", "--root", few, "--clip", "tiny",
             "--shots", "2", "--epochs", "1", "--workers", "0", "--out", tmp_path / "run"]
    code, out, err = here(f"{method}.py", *words)
    assert code == 0, err
    assert numbers(tmp_path / "run")["metrics"]["VOC2007"] == VOC


def test_the_probe_takes_an_image_once_for_each_of_its_classes(few, monkeypatch, capsys):
    words = ["--data", "voc-2007-classification", "--root", few, "--clip", "tiny", "--shots", "2"]
    common.probe([*map(str, words), "--workers", "0"])
    assert "VOC2007" in capsys.readouterr().out
