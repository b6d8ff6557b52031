"""ELEVATER's twenty datasets: each layout of the toolkit in miniature, read by the same code as the
full dataset; their metrics; damaged files; and MVLPT on them."""

import contextlib
import io
import json
import math
import re
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import counts, edit, make_cifar, numbers, rendered, says, table
from PIL import Image
from torchvision import datasets as tv

import common
import data
from data import UserError, find_listings, load_tasks
from data.benchmarks import elevater
from data.check import report

MEAN, VOC = "mean per class", "11-point mAP"
# As published with the toolkit. Task: number of classes, metric, template
FACTS = table("""
    Caltech101     102  mean per class  a photo of a {}
    CIFAR10        10   accuracy        a photo of a {}
    CIFAR100       100  accuracy        a photo of a {}
    Country211     211  accuracy        a photo i took in {}
    DTD            47   accuracy        a photo of a {} texture
    EuroSAT        10   accuracy        a centered satellite photo of {}
    FER2013        7    accuracy        a photo of a {} looking face
    FGVCAircraft   100  mean per class  a photo of a {}, a type of aircraft
    Flowers102     102  mean per class  a photo of a {}, a type of flower
    Food101        101  accuracy        a photo of {}, a type of food
    GTSRB          43   accuracy        a zoomed in photo of a "{}" traffic sign
    HatefulMemes   2    accuracy        a {}
    KITTI          4    accuracy        {}
    MNIST          10   accuracy        a photo of the number: "{}"
    OxfordPets     37   mean per class  a photo of a {}, a type of pet
    PatchCamelyon  2    accuracy        this is a photo of {}
    RenderedSST2   2    accuracy        a {} review of a movie
    RESISC45       45   accuracy        satellite imagery of {}
    StanfordCars   196  accuracy        a photo of a {}
    VOC2007        20   11-point mAP    a photo of a {}
    """)
CLASSES = {title: int(n) for title, (n, *_) in FACTS.items()}
# Task: how the first and the last class name end, folder, and --data if that is not the folder
NAMES = table("""
    Caltech101     accordion      yin and yang symbol    caltech_101_20211007
    CIFAR10        airplane       truck                  cifar_10_20211007         cifar-10
    CIFAR100       chimpanzee     bicycle                cifar100_20200721         cifar-100
    Country211     Andorra        Zimbabwe               country211_20210924       country211
    DTD            banded         zigzagged              dtd_20211007
    EuroSAT        annual crop land    lake or sea       eurosat_clip_20210930
    FER2013        angry          surprised              fer_2013_20211008         fer-2013
    FGVCAircraft   707-320        Yak-42                 fgvc_aircraft_2013b_variants102_20211007
    Flowers102     pink primrose  blackberry lily        oxford_flower_102_20211007
    Food101        apple pie      waffles                food_101_20211007
    GTSRB          20 kph speed limit  for trucks has ended   gtsrb_20210923       gtsrb
    HatefulMemes   meme           hatespeech meme        hateful_memes_20211014    hateful-memes
    KITTI          left or right side    took with no car   kitti_distance_20210923  kitti-distance
    MNIST          0              9                      mnist_20211008            mnist
    OxfordPets     Abyssinian     yorkshire terrier      oxford_iiit_pets_20211007
    PatchCamelyon  lymph node     metastatic tumor tissue   patch_camelyon_20211007  patch-camelyon
    RenderedSST2   negative       positive               rendered_sst2_20210924    rendered-sst2
    RESISC45       airplane       wetland                resisc45_clip_20210924    resisc45_clip
    StanfordCars   Acura Integra Type R 2001   Volvo XC90 SUV 2007   stanford_cars_20211007
    VOC2007        aeroplane      tvmonitor    voc2007_20211007          voc-2007-classification
    """)
CALLED = {title: names[-1] for title, names in NAMES.items()}
IN_COOP = [title for title, names in NAMES.items() if len(names) == 3]
# task: index files of the training and test images, their zip files, label file; if these are not
# train.txt, test.txt, train.zip, test.zip and labels.txt
FILES = table("""
    CIFAR10       train.txt         test.txt         train.zip         val.zip          labels.txt
    CIFAR100      train_images.txt  test_images.txt  train_images.zip  test_images.zip  labels.txt
    EuroSAT       train.txt         test.txt         2750.zip          2750.zip         labels.txt
    Food101       train.txt         test.txt         train.zip         val.zip          labels.txt
    GTSRB         train.txt         test.txt         train.zip         final_test.zip   labelmap.txt
    HatefulMemes  train_meta.json   test_meta.json   img.zip           img.zip
    KITTI         train_meta.json   test_meta.json   train_images.zip  test_images.zip
    MNIST         train.txt         test.txt         train.zip         val.zip          labels.txt
    OxfordPets    train.txt         test.txt         train.zip         val.zip          labels.txt
    RESISC45      train.json        test.json        images.zip        images.zip
    StanfordCars  train.txt         test.txt         train.zip         val.zip          labels.txt
    VOC2007       train_ic.txt      test_ic.txt      train.zip         test.zip         labels.txt
    """)
USUAL = ["train.txt", "test.txt", "train.zip", "test.zip", "labels.txt"]
SIZES = (3, 2)                          # images per class to train and to test on


def picture(k, size=(8, 8)):
    """A PNG with grey level k, for class k."""
    buffer = io.BytesIO()
    Image.new("L", size, k).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def several(title, k, n):
    """The classes of an image of class k: in VOC 2007 most show a person (14) too."""
    return [k, 14] if title == "VOC2007" and k != 14 and n else [k]


def toolkit(root, title, sizes=SIZES, unpacked=False):
    """Write a dataset in the toolkit's layout: (its folder, {part: {path in zip: classes}})."""
    train, test, *zips = FILES.get(title, USUAL)
    folder, n = root / "classification" / NAMES[title][2], CLASSES[title]
    parts, files = {}, {}
    for labels in zips[2:]:
        put(folder / labels, "".join(f"raw_{k}\n" for k in range(n)).encode())
    for part, index, archive, count in zip(("train", "test"), (train, test), zips, sizes):
        parts[part] = {}
        for k in range(n):
            for i in range(count):
                parts[part][f"{k}/{part} {i}.png"] = several(title, k, i)
                # no two files are equal across datasets
                content = picture(k) + f"{title} {part} {i}".encode()
                files.setdefault(archive, {})[f"{k}/{part} {i}.png"] = content
        put(folder / index, written(index, archive, parts[part], n).encode())
    for archive, content in files.items():
        if not unpacked:
            write_zip(folder / archive, content)
            continue
        for path, image in content.items():
            put(folder / archive[:-4] / path, image)
    return folder, parts


def written(index, archive, images, n):
    """The text of an index of {path: classes}, .txt or .json; JSON counts from 1, as COCO does."""
    if index.endswith(".txt"):
        lines = [f"{archive}@{image} {','.join(map(str, k))}\n" for image, k in images.items()]
        return "".join(lines)
    listed, marks = [], []
    for i, (image, classes) in enumerate(images.items(), 1):
        file = dict(file_name=f"{archive}@{image}")
        if index.startswith("test"):
            file = dict(zip_file=archive, file_name=image)
        listed.append(dict(file, id=i, width=8, height=8))
        marks.append(dict(id=i, image_id=i, category_id=classes[0] + 1))
    names = [dict(id=k, name=f"raw {k}") for k in range(n, 0, -1)]
    return json.dumps(dict(images=listed, annotations=marks, categories=names))


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as file:
        for name, image in content.items():
            file.writestr(name, image)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """All twenty under one root, and the contents of each."""
    root = tmp_path_factory.mktemp("twenty")
    return root, {title: toolkit(root, title)[1] for title in NAMES}


# ------------------------------------------------------------------------- the toolkit's layout

def facts(task):
    """What the tables list for a task."""
    first, last, *_ = NAMES[task.name]
    assert task.class_names[0].endswith(first)
    assert task.class_names[-1].endswith(last)
    return [str(len(task.class_names)), task.metric, task.template]


def checked(title, root, parts):
    """Load the task of a dataset and check its names, images and labels."""
    [task] = load_tasks(CALLED[title], root=root)
    assert task.name == title
    assert facts(task) == FACTS[title]
    assert task.val is None
    assert not (task.augment or task.train.crop or task.test.crop)
    for images, part in ((task.train, "train"), (task.test, "test")):
        found = {}
        for item, label in zip(images.items, images.labels):
            place = item if isinstance(item, str) else item[1]
            path = "/".join(place.split("/")[-2:])
            found[path] = list(label) if title == "VOC2007" else [label]
        assert found == parts[part]
        assert len(found) == len(images)
        for i in (0, CLASSES[title], -1):
            image, _ = images[i]
            assert set(image.tobytes()) == {images.classes[i]}
    return task


@pytest.mark.parametrize("title", NAMES)
def test_a_dataset_in_the_toolkits_layout_has_its_names_images_and_labels(twenty, title):
    root, parts = twenty
    checked(title, root, parts[title])
    first, again, other = (load_tasks(CALLED[title], shots=2, seed=seed, root=root)[0].train.items
                           for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("title, into", [
    ("EuroSAT", "a folder per zip file"), ("KITTI", "the dataset's folder"),
    ("MNIST", "folders that the index names")])
def test_unpacked_images_work_too(tmp_path, title, into):
    folder, parts = toolkit(tmp_path, title, unpacked=True)
    if title == "KITTI":
        for path in sorted(folder.rglob("*.png")):
            (folder / path.parent.name).mkdir(exist_ok=True)
            path.rename(folder / path.parent.name / path.name)
    for index in folder.glob("*.txt") if title == "MNIST" else ():
        index.write_text(index.read_text().replace(".zip@", "\\"))
    task = checked(title, tmp_path, parts)
    assert all(isinstance(item, str) for item in task.train.items)


def test_elevater20_are_the_tasks_of_mvlpts_table_and_elevater12_those_that_coop_lacks(twenty):
    root, _ = twenty
    twelve = [title for title in NAMES if title not in IN_COOP]
    for given, titles in (("elevater20", list(NAMES)), ("elevater12", twelve),
                          ("mnist,dtd_20211007", ["MNIST", "DTD"])):
        tasks = load_tasks(given, shots=1, root=root)
        assert [task.name for task in tasks] == titles
        for task in tasks:
            ensemble = common.templates_of(task, given)
            assert task.template in [template.removesuffix(".") for template in ensemble]
    columns = json.loads((common.HERE / "data/paper_results.json").read_text())["columns"]
    printed = {column["data"]: column["results"].keys() - {"average"} for column in columns
               if column["paper"] == "MVLPT" and len(column["results"]) > 1}
    assert printed["elevater20"] == NAMES.keys() and printed["elevater12"] < NAMES.keys()


def test_check_reads_all_images_and_compares_the_counts_with_the_published_ones(twenty):
    lines, _, problems, images = report("mnist,voc-2007-classification", twenty[0])
    assert images == 5 * 30
    assert lines[1].split()[:5] == ["MNIST", "10", "30", "-", "20"]
    assert lines[1].endswith("accuracy") and lines[2].endswith("11-point mAP")
    folder = twenty[0] / "classification/mnist_20211008"
    assert problems[0] == (f"MNIST in {folder} has 50 images instead of the published 70,000 "
                           "(69,950 missing)")


def test_a_label_file_with_other_classes_than_the_published_gives_the_names(tmp_path, capsys):
    folder, _ = toolkit(tmp_path, "MNIST")
    for file in (folder / "train.txt", folder / "test.txt"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line for line in lines if line[-1] in "012"))
    (folder / "labels.txt").write_text("zero\none_two\nthree\n")
    [task] = load_tasks("mnist", shots=1, root=tmp_path)
    assert task.class_names == ["zero", "one two", "three"]
    says(capsys.readouterr().err, "3 classes instead of the published 10")


def test_workers_read_from_one_zip_file_at_a_time(tmp_path):
    """The file is first opened in this process: if workers used that handle, each would move the
    position for the others."""
    images = {f"{i}.png": picture(i % 251, (60, 60)) for i in range(600)}
    write_zip(tmp_path / "x.zip", images)
    items = [(str(tmp_path / "x.zip"), name) for name in images]
    lists = data.Images(items, [i % 251 for i in range(600)])
    first, _ = lists[0]
    assert not any(first.tobytes())
    found = []
    for pixels, _ in data.in_order(lists, 8, workers=2, batch=10):
        found += pixels[:, 0, 0, 0].tolist()
    assert found == lists.labels


# ---------------------------------------------------------------------------------- protocol

def test_images_are_resized_to_a_square_in_training_and_test(tmp_path):
    """A 24 x 8 image whose left third is black: a centre crop would miss it."""
    wide = Image.new("RGB", (24, 8), "white")
    wide.paste("black", (0, 0, 8, 8))
    folder, _ = toolkit(tmp_path, "KITTI", unpacked=True)
    for path in folder.rglob("*.png"):
        wide.save(path)
    [task] = load_tasks("kitti-distance", shots=1, root=tmp_path)
    [[test, _]] = data.in_order(task.test.subset([0]), 8, workers=0)
    left, right = test[0, :, :, 0], test[0, :, :, 7]
    assert left.max() < 20
    assert right.min() > 235
    steps = [[(0, 0, view)] for view in (1, 2, 3)]
    for train, _, _ in rendered([task.train], steps, 8, 1, augment=[False]):
        assert torch.equal(train, test)


def test_a_fifth_is_held_out_by_the_class_that_an_image_was_sampled_for():
    labels = [(k, *others) for k in (0, 1) for others in ((), (2,), (3,), (4,), (2, 3))]
    rest, held = data.hold_out(data.Images(range(10), labels), 1)
    assert counts(held) == [1, 1]
    assert counts(rest) == [4, 4]


# ------------------------------------------------------------------------------- several labels

def test_an_image_of_several_classes_is_sampled_for_the_rarest(tmp_path):
    """20 classes with 3 images each, 2 of them with a person (14): 2 * 19 + 3 show a person."""
    toolkit(tmp_path, "VOC2007")
    [task] = load_tasks("voc-2007-classification", shots=2, root=tmp_path)
    assert counts(task.train) == [2] * 20
    assert (14,) in task.train.labels
    assert {(0, 14), (19, 14)} <= set(task.test.labels)
    assert (14, 19) not in task.test.labels


def test_labels_of_a_batch_are_numbers_or_a_distribution_per_image():
    assert data.label_tensor([2, 0]).tolist() == [2, 0]
    assert data.label_tensor([(3, 1), 2]).tolist() == [[0, 0.5, 0, 0.5], [0, 0, 1, 0]]


def test_the_loss_of_several_labels_is_the_mean_over_them_by_hand(small):
    """Two tasks of 2 and 3 classes, so that the first one's rows have more entries than classes."""
    tasks = [SimpleNamespace(class_names=names.split(), template="{}")
             for names in ("dog cat", "cup hat ball")]
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


# --------------------------------------------------------------------------------------- metrics

def column(*values):
    return torch.tensor(values, dtype=torch.float)[:, None]


def test_11_point_average_precision_by_hand():
    """Ranks +, -, +, -, -: precision 1 up to recall 1/2 (6 points), 2/3 beyond (5 points)."""
    scores, labels = column(5, 4, 3, 2, 1), column(1, 0, 1, 0, 0)
    assert common.apply_metric(VOC, scores, labels) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    last = column(0, 0, 0, 0, 1)                                # only the last one is right
    assert common.apply_metric(VOC, scores, last) == pytest.approx(20)
    tie = column(0, 0, 0, 0, 0)                                 # all tie: 2 of 5 are right
    assert common.apply_metric(VOC, tie, labels) == pytest.approx(40)


def test_a_class_without_a_positive_does_not_count_in_the_mean():
    scores = torch.cat([column(1, 0), column(1, 2), column(5, 5)], dim=1)
    labels = torch.cat([column(0.5, 1), column(0.5, 0), column(0, 0)], dim=1)
    assert common.apply_metric(VOC, scores, labels) == pytest.approx((100 + 50) / 2)
    assert common.apply_metric(VOC, scores, torch.zeros(2, 3)) == 0
    assert common.apply_metric(VOC, column(1, 0), column(0.5, 1)) == 100           # one class only


def test_the_mean_per_class_leaves_out_a_class_without_images():
    scores = torch.eye(4)[[0, 0, 1, 3]]
    for labels, accuracy, mean in (([0, 0, 0, 1], 50, 100 / 3), ([0, 0, 0, 0], 50, 50)):
        labels = torch.tensor(labels)
        assert common.apply_metric("accuracy", scores, labels) == accuracy
        assert common.apply_metric(MEAN, scores, labels) == pytest.approx(mean)


# -------------------------------------------------------------------------------- damaged files

def refused(title, root, *words):
    """Check that a dataset is rejected with these words in one line, and that nothing is written.
    """
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError) as error:
        load_tasks(CALLED[title], shots=1, root=root)
    assert sorted(root.rglob("*")) == before and str(error.value).isprintable()
    says(str(error.value), *words)


WRONG = table(r"""
    train.zip@0/train 1.png               no label ('train.zip@0/train 1.png')
    train.zip@0/train 1.png 0,x           no label
    train.zip@0/train 1.png 10            label 10,  the 10 classes of  labels.txt  0 to 9
    train.zip@0/train 1.png 0,3           2 labels
    train.zip@0/gone.png 0                names 0/gone.png  is not in  mnist_20211008/train.zip
    train.zip@../../x.png 0               'train.zip@../../x.png'  leads out
    /etc/x.png 0                          leads out
    C:\x.png 0                            leads out
    """)


def test_a_wrong_line_of_an_index_is_named(tmp_path):
    folder, _ = toolkit(tmp_path, "MNIST")
    first, _, rest = (folder / "train.txt").read_text().split("\n", 2)
    for line, words in WRONG.items():
        (folder / "train.txt").write_text(f"{first}\n{line}\n{rest}")
        refused("MNIST", tmp_path, "mnist_20211008/train.txt, line 2,", *words)


def test_files_of_the_toolkit_that_are_damaged_or_missing_are_named(tmp_path):
    folder, _ = toolkit(tmp_path, "MNIST")
    train, index = folder / "train.zip", folder / "train.txt"
    whole, lines = train.read_bytes(), index.read_text()
    train.unlink()
    refused("MNIST", tmp_path, "train.txt, line 1,", train, "which is not there")
    train.write_bytes(whole[:-200])
    refused("MNIST", tmp_path, "train.txt, line 1,", train, "not a complete zip file")
    write_zip(train, {"../evil.png": picture(0)})
    refused("MNIST", tmp_path, train, "'../evil.png'", "leads out")
    train.write_bytes(whole)
    (folder / "test.txt").write_text(lines)
    refused("MNIST", tmp_path, folder, "lists", "train.zip@0/train 0.png twice, in train and test")
    index.write_text("")
    refused("MNIST", tmp_path, "class '0' of MNIST", "no training image")
    (folder / "labels.txt").unlink()
    refused("MNIST", tmp_path, folder / "labels.txt", "cannot be read")


@pytest.mark.parametrize("change, words", [
    (lambda c: c["annotations"].pop(1), "image 2, has no label ('img.zip@0/train 1.png')"),
    (lambda c: c["annotations"][0].update(category_id=9), "annotation of image 1, has the label 9"),
    (lambda c: c["annotations"].append(dict(image_id=1, category_id=2)), "image 1, has 2 labels"),
    (lambda c: c["annotations"][0].update(image_id=77), "has an annotation of image 77"),
    (lambda c: c["images"][0].update(id=2), "train_meta.json is not an index in COCO's format"),
    (lambda c: c.pop("categories"), "train_meta.json is not an index in COCO's format"),
])
def test_damage_in_a_coco_index_is_named(tmp_path, change, words):
    folder, _ = toolkit(tmp_path, "HatefulMemes")
    edit(folder / "train_meta.json", change)
    refused("HatefulMemes", tmp_path, "train_meta.json", words)


def test_an_image_damaged_inside_a_zip_file_is_named(tmp_path):
    folder, _ = toolkit(tmp_path, "MNIST")
    content = bytearray((folder / "val.zip").read_bytes())
    content[60] ^= 255                                          # in the first member
    (folder / "val.zip").write_bytes(content)
    [task] = load_tasks("mnist", shots=1, root=tmp_path)
    with pytest.raises(UserError, match=f"^{folder}/val.zip@0/test 0.png cannot be decoded.*CRC"):
        list(data.in_order(task.test, 8, workers=0))


def test_a_missing_dataset_says_what_belongs_where(tmp_path):
    toolkit(tmp_path, "MNIST")
    for title in ("DTD", "KITTI"):
        folder = tmp_path / "classification" / NAMES[title][2]
        refused(title, tmp_path, f"{title} needs {folder}")
    refused("MNIST", tmp_path / "classification", f"give --root {tmp_path}")


# ----------------------------------------------------------------------------- torchvision's layout
# Each writes a dataset whose images have their label as grey level, 3 training and 2 test images
# per class.

def parts_of(n):
    """The parts and the labels of their images."""
    labels = np.arange(n)
    return [("train", labels.repeat(3)), ("test", labels.repeat(2))]


def tv_mnist(root, patch):
    for part, labels in parts_of(10):
        part = part.replace("test", "t10k")
        for kind, array in (("images-idx3", grey(labels, 28, 28)), ("labels-idx1", grey(labels))):
            # two zeros, the data type, the dimensions, the values
            head = bytes([0, 0, 8, array.ndim])
            shape = np.array(array.shape, dtype=">i4").tobytes()
            put(root / f"MNIST/raw/{part}-{kind}-ubyte", head + shape + array.tobytes())


def tv_cifar10(root, patch):
    parts = {}
    for part, labels in parts_of(10):
        parts[part] = dict(data=grey(labels, 3072), labels=labels.tolist())
    make_cifar(root, patch, tv.CIFAR10, dict(label_names=["airplane"]), **parts)


def tv_cifar100(root, patch):
    """Its labels are in alphabetical order, the toolkit's are not; the grey is the toolkit's label.
    """
    published, parts = elevater.published_names("cifar-100"), {}
    place = np.argsort(published)
    names = [published[k].replace(" ", "_") for k in place]
    for part, labels in parts_of(100):
        parts[part] = dict(data=grey(place[labels], 3072), fine_labels=labels.tolist())
    make_cifar(root, patch, tv.CIFAR100, dict(fine_label_names=names), **parts)


def grey(labels, *shape):
    """A constant array for each label, filled with the label."""
    arrays = [np.full(shape, k, dtype=np.uint8) for k in labels]
    return np.stack(arrays)


def save(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), k).convert("RGB").save(path)


def tv_gtsrb(root, patch):
    rows = ["Filename;ClassId"]
    for k in range(43):
        for i in range(3):
            save(root / f"gtsrb/GTSRB/Training/{k:05d}/{i}.ppm", k)
        for i in range(2):
            save(root / f"gtsrb/GTSRB/Final_Test/Images/{k}_{i}.ppm", k)
            rows.append(f"{k}_{i}.ppm;{k}")
    (root / "gtsrb/GT-final_test.csv").write_text("\n".join(rows))


def tv_folders(root, *names):
    """A folder of images for each part and class."""
    for part, labels in parts_of(len(names)):
        for i, k in enumerate(labels.tolist()):
            save(root / part / names[k] / f"{i}.png", k)


def tv_country(root, patch):
    tv_folders(root / "country211", *(f"{chr(65 + k // 26)}{chr(65 + k % 26)}" for k in range(211)))


def tv_sst2(root, patch):
    tv_folders(root / "rendered-sst2", "negative", "positive")


def tv_voc(root, patch):
    """The only class of the first test image is marked difficult; the third one has a difficult
    class beside its own."""
    folder, marks, hard = root / "VOCdevkit/VOC2007", {}, {("test0", 0), ("test2", 5)}
    for part, labels in parts_of(20):
        marks[part] = {}
        for i, k in enumerate(labels.tolist()):
            save(folder / f"JPEGImages/{part}{i}.jpg", k)
            marks[part][f"{part}{i}"] = several("VOC2007", k, i % (len(labels) // 20))
    for k, name in enumerate(elevater.published_names("voc-2007-classification")):
        for part, images in marks.items():
            lines = []
            for image, own in images.items():
                mark = "1" if k in own else "-1"
                lines.append(f"{image} {'0' if (image, k) in hard else mark:>2}\n")
            put(folder / f"ImageSets/Main/{name}_{part}.txt", "".join(lines).encode())


def tv_fer(root, patch):
    """The file's order is angry, disgust, fear, happy, sad, surprise, neutral."""
    patch.setattr("torchvision.datasets.fer2013.check_integrity", lambda path, md5: True)
    lines = ["emotion,pixels,Usage\n"]
    for k, own in enumerate([0, 1, 2, 3, 5, 6, 4]):             # positions in the toolkit's names
        for use in ["Training"] * 3 + ["PublicTest", "PrivateTest"]:
            lines.append(f"{k},{' '.join([str(own)] * 48 * 48)},{use}\n")
    put(root / "fer2013/fer2013.csv", "".join(lines).encode())


def tv_pcam(root, patch):
    """h5py reads its files and may not be installed, so a stand-in holds the arrays."""
    arrays = {}
    for part, labels in parts_of(2):
        for key, shape in (("x", (96, 96, 3)), ("y", (1, 1, 1))):
            file = root / f"pcam/camelyonpatch_level_2_split_{part}_{key}.h5"
            put(file, b"")
            arrays[file] = {key: grey(labels, *shape)}
    opened = SimpleNamespace(File=lambda path: contextlib.nullcontext(arrays[path]))
    patch.setitem(sys.modules, "h5py", opened)


OFFICIAL = dict(
    MNIST=tv_mnist, CIFAR10=tv_cifar10, CIFAR100=tv_cifar100, GTSRB=tv_gtsrb, Country211=tv_country,
    RenderedSST2=tv_sst2, VOC2007=tv_voc, FER2013=tv_fer, PatchCamelyon=tv_pcam)


@pytest.mark.parametrize("title", OFFICIAL)
def test_a_dataset_in_torchvisions_layout_has_its_split(tmp_path, title, monkeypatch, capsys):
    OFFICIAL[title](tmp_path, monkeypatch)
    [task] = load_tasks(CALLED[title], root=tmp_path)
    assert task.name == title
    assert facts(task) == FACTS[title]
    says(capsys.readouterr().err, f"{5 * CLASSES[title]:,} images instead of")
    assert not set(task.train.items) & set(task.test.items)
    for images, count in ((task.train, 3), (task.test, 2)):
        assert counts(images) == [count] * CLASSES[title]
        for i in range(0, len(images), 7):
            image, _ = images[i]
            assert round(np.asarray(image).mean()) == images.classes[i]
    if title == "VOC2007":
        assert task.test.labels[:3] == [(0,), (0, 14), (1,)]
    if title == "MNIST":                                        # the toolkit's layout comes first
        checked(title, tmp_path, toolkit(tmp_path, title)[1])


def test_a_dataset_of_coops_in_torchvisions_layout_has_elevaters_metric(tmp_path):
    for part in ("train", "test", "val"):
        paths = [f"{c}/{c}_{part}{i}.png" for c in ("polka-dotted", "banded") for i in range(3)]
        for path in paths:
            save(tmp_path / "dtd/dtd/images" / path, 0)
        put(tmp_path / f"dtd/dtd/labels/{part}1.txt", "\n".join(paths).encode())
    [task] = load_tasks("dtd_20211007", root=tmp_path)
    assert task.class_names == ["banded", "polka-dotted"]
    assert task.template == "a photo of a {} texture"
    assert task.val is None and not task.augment
    assert counts(task.train) == counts(task.test) == [3, 3]


def test_damage_in_torchvisions_layout_is_named(tmp_path, monkeypatch):
    tv_gtsrb(tmp_path, monkeypatch)
    (tmp_path / "gtsrb/GT-final_test.csv").unlink()
    refused("GTSRB", tmp_path, f"GTSRB in {tmp_path}/gtsrb is incomplete or damaged")


def test_download_lets_torchvision_fetch_what_is_missing(tmp_path, monkeypatch):
    def unreachable(self):
        raise OSError("no route to host")

    with pytest.raises(UserError, match="--download cannot fetch hateful-memes"):
        find_listings("hateful-memes,mnist", tmp_path, download=True)
    monkeypatch.setattr(tv.GTSRB, "download", unreachable)
    with pytest.raises(UserError, match="^GTSRB cannot be downloaded .no route to host.: put it"):
        find_listings("gtsrb", tmp_path, download=True)
    monkeypatch.setattr(tv.GTSRB, "download", lambda self: tv_gtsrb(tmp_path, monkeypatch))
    assert len(find_listings("gtsrb", tmp_path, download=True)) == 1
    monkeypatch.setattr(tv.GTSRB, "download", unreachable)
    toolkit(tmp_path, "GTSRB")                                  # nothing to fetch
    assert len(find_listings("gtsrb", tmp_path, download=True)) == 1


# --------------------------------------------------------------------------------------- methods

def test_mvlpt_from_a_source_task_to_three_targets_in_groups_of_two(twenty, tmp_path, here,
                                                                    random_pt):
    out, names = tmp_path / "run", ["VOC2007", "HatefulMemes", "KITTI"]
    data = ",".join(CALLED[name] for name in names)
    code, told, err = here(f"mvlpt.py --data {data} --group-size 2 --root {twenty[0]} --shots 2 "
                           f"--clip {random_pt} --source eurosat_clip_20210930 --epochs 1 "
                           f"--workers 0 --out {out}")
    assert code == 0, err
    result = numbers(out)
    assert result["tasks"] == names
    assert result["metrics"] == {name: FACTS[name][1] for name in names}
    says(told, "accuracy (VOC2007: 11-point mAP) in %")
    [groups] = result["groups"]
    for name, group in zip(names, groups, strict=True):
        assert group[0] == name
        assert len(set(group)) == len(group) <= 2
    code, again, err = here(f"mvlpt.py --eval {out}/prompts.pt --workers 0")
    assert code == 0, err
    first, second = (re.findall("^(?:VOC2007|KITTI) .*", x, re.M) for x in (told, again))
    assert first == second != []


@pytest.mark.parametrize("script", ["coop_mt.py --epochs 1", "jscpt.py --epochs 1",
                                    "common.py probe"])
def test_methods_train_on_tasks_with_one_and_with_several_labels(twenty, tmp_path, here, random_pt,
                                                                 script):
    code, _, err = here(f"{script} --data voc-2007-classification,hateful-memes --shots 2 "
                        f"--root {twenty[0]} --clip {random_pt} --workers 0 --out {tmp_path}/run")
    assert code == 0, err
    assert numbers(tmp_path / "run")["metrics"]["VOC2007"] == VOC
