"""Benchmarks on disk become tasks: layouts, names, splits, held-out images."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from clip.clip import _transform
from conftest import counts, make_cifar, make_tree, small_tasks
from torchvision.datasets import CIFAR100

import common
from data import (
    Images,
    UserError,
    find_listings,
    hold_out,
    load_tasks,
    plan,
    read_image,
    with_held_out,
)


def sides(task):
    return set(task.train.items), set(task.test.items)


def drawings(task):
    """The numbers of the drawings in training and test, whatever their style."""
    return [{number for _, number in side} for side in sides(task)]


def test_emoji_is_four_styles_of_the_same_classes():
    """Each emoji's drawings fall on the same side; no drawing is blank, and one task is grey."""
    tasks = load_tasks("emoji", shots=6)
    assert [t.name for t in tasks] == ["Noto", "Twemoji", "Fluent", "High Contrast"]
    for t in tasks:
        assert t.class_names == tasks[0].class_names
        assert (t.val, t.metric, len(t.class_names)) == (None, "accuracy", 58)
        train, test = sides(t)
        assert len(train | test) == len(t.train) + len(t.test) == 910
        assert {*counts(t.train)} == {4, 5, 6}          # of 6 drawings, two are left to test on
        assert drawings(t) == drawings(tasks[0])
        few = t.test.subset(range(0, len(t.test), 29))
        pixels = np.stack([np.asarray(image) for image, _ in few])
        assert (pixels.min(axis=(1, 2, 3)) < 200).all()
        is_grey = (pixels.min(axis=3) == pixels.max(axis=3)).all()
        assert is_grey == (t.name == "High Contrast")


def test_emoji24_is_four_styles_times_six_topics_of_the_same_drawings():
    tasks, emoji = load_tasks("emoji24", shots=6, seed=2), load_tasks("emoji", shots=6)
    assert len(tasks) == 24 and tasks[2].name == "Noto Food"
    for style, whole in enumerate(emoji):
        names = []
        for task in tasks[6 * style:6 * style + 6]:
            assert task.name.startswith(whole.name)
            assert len(task.class_names) >= 6
            names += task.class_names
        assert sorted(names) == sorted(whole.class_names)


@pytest.mark.parametrize("shots, split", [(6, None), (None, 0.1)])
def test_a_drawing_is_on_the_same_side_in_emoji24_as_in_emoji(shots, split):
    whole, parts = (load_tasks(name, split, shots, seed=2) for name in ("emoji", "emoji24"))
    for side in (0, 1):
        found = [set().union(*(sides(t)[side] for t in tasks)) for tasks in (whole, parts)]
        assert found[0] == found[1]


def test_some_tasks_of_a_benchmark_can_be_selected():
    food = ["Noto Food", "Twemoji Food", "Fluent Food", "High Contrast Food"]
    for given, names in (("emoji24:*food+Noto Things", [*food, "Noto Things"]),
                         ("emoji:Noto,emoji24:Fluent Food", ["Noto", "Fluent Food"])):
        assert [task.name for task in load_tasks(given, shots=6)] == names
    with pytest.raises(UserError, match="emoji has no task 'Nato': its tasks are Noto, Twe"):
        load_tasks("emoji:Nato", shots=6)
    with pytest.raises(UserError, match="emoji24 has no task 'Noto Thing': its tasks are Noto Peo"):
        load_tasks("emoji24:*Food+Noto Thing", shots=6)
    both = load_tasks("emoji24:*Food+Noto*", shots=6)
    assert len(both) == 4 + 5               # Noto Food matches both, and comes once
    alone = both[2]                         # the same split, alone and among others
    assert [sides(t) for t in load_tasks("emoji24", shots=6) if t.name == alone.name] == [
        sides(alone)]


def settings(words):
    return common.parse(common.load_method("coop_mt").METHOD, words.split())


def test_defaults_of_a_benchmark_also_hold_for_some_of_its_tasks(tmp_path):
    folder = make_tree(tmp_path, {"a/cup": 2, "a/hat": 2})
    for data in ("emoji", "emoji,emoji24", "emoji:Noto,emoji24:*Food"):
        args = settings(f"--data {data}")
        assert (args.clip, args.shots, args.lr) == ("tiny", 6, 0.03)
    with pytest.raises(UserError, match="needs --split, such as"):
        settings(f"--data emoji:Noto,{folder}")
    for data in ("minidomainnet", "minidomainnet:Real+Sketch"):         # a paper's setting
        assert settings(f"--data {data} --split 0.01").batch_size == 4


def test_a_split_takes_its_fraction_of_every_class_rounded_and_at_least_one():
    """The smallest class has 6 images, and 3% of 6 are 0.18."""
    for split in (0.1, 0.03):
        for t in load_tasks("emoji", split=split):
            whole = Counter(t.train.labels + t.test.labels)
            taken = {k: max(1, round(split * n)) for k, n in whole.items()}
            assert Counter(t.train.labels) == taken


def test_the_split_depends_on_the_seed_and_a_larger_one_contains_the_smaller(tree):
    for data in ("emoji", str(tree)):
        first, again, other = (load_tasks(data, split=0.4, seed=s) for s in (1, 1, 2))
        larger = load_tasks(data, split=0.6, seed=1)
        for a, same, b, more in zip(first, again, other, larger):
            train, test = sides(a)
            assert (train, test) == sides(same) != sides(b)
            assert not train & test
            assert train < sides(more)[0]


def test_shots_leave_a_fifth_of_a_class_and_at_least_one_image_for_testing(tmp_path):
    make_tree(tmp_path, {"a/big": 20, "a/small": 3, "b/big": 6, "b/small": 2})
    a, b = load_tasks(str(tmp_path), shots=100)
    assert counts(a.test) == [4, 1]
    assert counts(b.test) == [2, 1]
    a, b = load_tasks(str(tmp_path), shots=2)
    assert counts(a.train) == [2, 2]
    assert counts(b.train) == [2, 1]


def test_a_class_of_one_image_has_none_to_test_on(tmp_path):
    make_tree(tmp_path, {"a/big": 9, "a/small": 1})
    for size in (dict(shots=2), dict(split=0.1)):
        with pytest.raises(UserError, match="class 'small' of a has 1 image, .* add images or"):
            load_tasks(str(tmp_path), **size)


def test_a_datasets_own_validation_part_gives_at_most_four_images_per_class(tmp_path):
    """min(k, 4) under `shots` k, as in CoOp."""
    root = make_tree(tmp_path / "t", {"train/a": 20, "train/b": 20, "val/a": 6, "val/b": 2,
                                      "test/a": 3, "test/b": 3})
    for shots, train, val in ((1, 1, [1, 1]), (3, 3, [3, 2]), (4, 4, [4, 2]), (16, 16, [4, 2]),
                              (None, 20, [6, 2])):
        [task] = load_tasks(str(root), shots=shots)
        assert counts(task.val) == val
        assert counts(task.train) == [train, train]
        assert counts(task.test) == [3, 3]
    drawn = [load_tasks(str(root), shots=3, seed=s)[0].val.items for s in range(6)]
    assert any(items != drawn[0] for items in drawn)


def test_classes_that_can_give_fewer_than_shots_are_named_once(tmp_path, capsys):
    make_tree(tmp_path, {"a/x": 5, "a/y": 12, "a/z": 7})
    load_tasks(f"few={tmp_path / 'a'}", shots=4)
    assert not capsys.readouterr().err
    for seed in (1, 2):
        load_tasks(f"few={tmp_path / 'a'}", shots=9, seed=seed)
    assert capsys.readouterr().err == (
        "warning: --shots 9: 2 of 3 classes train on fewer images, the smallest on 4, because a "
        "fifth of each is kept to test on\n"
    )


@pytest.mark.parametrize("place, domains, classes", [
    ("OfficeHomeDataset_10072016", "Art,Clipart,Product,Real World", "Alarm_Clock,TV,ToothBrush"),
    ("office_home", "art,clipart,product,real_world", "alarm_clock,tv,toothbrush"),
])
def test_office_home_is_read_in_every_layout_with_spoken_class_names(
        tmp_path, place, domains, classes):
    """The official archive has a list beside the folders, and one made on a Mac has extra files."""
    folders = [f"{d}/{c}" for d in domains.split(",") for c in classes.split(",")]
    make_tree(tmp_path / place, dict.fromkeys(folders, 6))
    for path in (folders[0] + "/._000.jpg", "ImageInfo.csv"):
        (tmp_path / place / path).write_text("no image")
    tasks = load_tasks("officehome", split=0.34, root=tmp_path)
    assert [t.name for t in tasks] == ["Art", "Clipart", "Product", "Real World"]
    for t in tasks:
        assert t.class_names == ["alarm clock", "toothbrush", "tv"]
        assert t.template == "a photo of a {}"
        assert counts(t.train) == [2, 2, 2]
        assert counts(t.test) == [4, 4, 4]
        for path, label in zip(t.train.items + t.test.items, t.train.labels + t.test.labels):
            assert path.parent.name.replace("_", " ").lower() == t.class_names[label]


def test_pacs_is_read_in_dassls_layout(tmp_path):
    domains = ("art_painting", "cartoon", "photo", "sketch")
    folders = [f"{d}/{c}" for d in domains for c in ("dog", "horse")]
    make_tree(tmp_path / "pacs/images", dict.fromkeys(folders, 4))
    tasks = load_tasks("pacs", shots=1, root=tmp_path)
    assert [t.name for t in tasks] == ["Art Painting", "Cartoon", "Photo", "Sketch"]
    assert len(tasks[0].train) == 2


def labelled(*sizes):
    """Images with the given number of items per class."""
    labels = [k for k, n in enumerate(sizes) for _ in range(n)]
    return Images(range(len(labels)), labels, read=None)


@pytest.mark.parametrize("sizes, held", [
    ([5] * 10, {1: 10}),
    ([2] * 10, {1: 4, 0: 6}),
    ([1] * 10, {0: 10}),
    ([6] * 10, {1: 8, 2: 2}),
    ([1] * 8 + [2, 10], {0: 8, 1: 1, 2: 1}),            # 3, not 4: no class gives more than a fifth
], ids=str)
def test_a_held_out_part_is_a_fifth_spread_over_the_classes(sizes, held):
    """{images given: number of classes that give so many}; no class gives its last image."""
    images = labelled(*sizes)
    (rest, part), *others = (hold_out(images, seed) for seed in (1, 1, 2, 3, 4))
    given = [part.labels.count(k) for k in range(len(sizes))]
    assert Counter(given) == held
    assert set(rest.labels) == set(images.labels)
    assert sorted(rest.items + part.items) == images.items
    again, *seeds = (other.items for _, other in others)
    assert part.items == again
    assert any(items != part.items for items in seeds) or not len(part)


def test_tasks_with_the_same_labels_hold_out_the_same_positions():
    """A drawing that one style holds out is not trained on in any other."""
    one, other = (Images(range(first, first + 60), [0, 1, 2] * 20) for first in (0, 500))
    for seed in (1, 2):
        [_, held], [_, others] = hold_out(one, seed), hold_out(other, seed)
        assert others.items == [500 + place for place in held.items]


def test_the_largest_classes_give_first():
    """6 of 28: always one from the class of 10, and 5 from the nine classes of two."""
    for seed in range(9):
        _, held = hold_out(labelled(*[2] * 9, 10), seed)
        assert (len(held), held.labels.count(9)) == (6, 1)


def test_with_held_out_keeps_a_datasets_own_validation_part():
    tasks = small_tasks("a", "b")
    tasks[0].val = tasks[0].test.subset([0, 1])
    own, held = with_held_out(tasks, 1)
    assert own.val is tasks[0].val and own.train is tasks[0].train
    assert (len(held.val), len(held.train)) == (1, 5)
    assert not set(held.val.items) & set(held.test.items)


def test_an_epoch_shows_the_largest_task_once_and_cycles_the_smaller():
    torch.manual_seed(0)
    steps = np.array(plan([10, 3], batch_size=4))
    first, second = steps[:, :4], steps[:, 4:]                              # (task, image, view)
    assert first.shape == second.shape == (3, 4, 3)
    assert (first[..., 0] == 0).all() and (second[..., 0] == 1).all()
    order = list(first[..., 1].flat)[:10]                                   # 2 more fill the batch
    assert sorted(order) == list(range(10)) != order
    assert set(second[..., 1].flat) == set(range(3))
    [step] = plan([3, 2], batch_size=16)
    assert len(step) == 6


def test_mixed_batches_show_every_image_of_the_union_once():
    torch.manual_seed(0)
    sizes = [900, 900, 900, 900, 30]
    steps = plan(sizes, batch_size=20, mixed=True, views=3)
    assert len(steps) == 182 and len(steps[-1]) == 10  # ceil(3630 / 20)
    seen = [(t, i) for step in steps for t, i, _ in step]
    assert sorted(seen) == [(t, i) for t, n in enumerate(sizes) for i in range(n)] != seen
    assert {view for step in steps for _, _, view in step} == {0, 1, 2}
    assert any(4 not in {t for t, _, _ in step} for step in steps)  # a small task is absent


def test_evaluation_in_batches_equals_one_image_at_a_time(small, tree):
    task, _ = load_tasks(str(tree), shots=1)
    preprocess, hits = _transform(32), 0
    [text] = common.zero_shot_classifiers(small, [task])
    for image, label in task.test:
        x = common.encode_image(small, preprocess(image)[None])
        hits += int(common.logits(small, x, text).argmax()) == label
    scores = common.evaluate(common.Args(workers=0), small, [task], [text])
    expected = pytest.approx(100 * hits / len(task.test))
    assert scores["accuracy"] == scores["zero_shot"] == [expected]


def test_a_test_image_is_decoded_once_per_process_whatever_is_scored(small, tree):
    [task, _], seen = load_tasks(str(tree), shots=1, seed=5), []

    def spy(path):
        seen.append(path)
        return read_image(path)

    task.test.read = spy
    prompts = torch.randn(1, 2, 64)
    for _ in range(2):
        plain, prompted, _ = common.image_features(small, task.test, prompts, workers=0)
        common.image_features(small, task.test.subset([0, 1]), workers=0)
    assert sorted(seen) == sorted(task.test.items) and not torch.equal(plain, prompted)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_views_do_not_depend_on_how_worker_processes_start(start, tree):
    """In a process that starts workers, from the repository's folder. Forked ones share the images
    in memory; others read the files again."""
    code = f"""
import multiprocessing, torch, data
if __name__ == "__main__":
    multiprocessing.set_start_method({start!r})
    lists = [task.train for task in data.load_tasks({str(tree)!r}, split=0.8)]
    torch.manual_seed(0)
    steps = data.plan([len(x) for x in lists], 4)
    alone = list(data.views(lists, 16, 1, workers=0).load(steps))
    data.keep_all(lists, 10**6, workers=0)
    views = data.views(lists, 16, 1, workers=2)
    found = list(views.load(steps))
    print(all(torch.equal(a, b) for one, two in zip(found, alone) for a, b in zip(one, two)))
    for path in lists[0].items:
        path.write_bytes(b"gone")
    try:
        print(len(list(views.load(steps))))
    except data.UserError:
        print("read again")
"""
    (tree.parent / "load.py").write_text(code)
    done = subprocess.run([sys.executable, tree.parent / "load.py"], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(common.HERE)), timeout=280)
    wanted = ["True", "3" if start == "fork" else "read again"]
    assert done.stdout.splitlines() == wanted, done.stderr


# ------------------------------------------------------------ class groups


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-100's archive in miniature: 3 coarse classes of 2 fine ones, 10 training and 2 test
    images per fine class. The grey of an image is its number, plus 100 for a test image."""
    def part(each, first):
        fine = np.arange(6).repeat(each)
        grey = (first + np.arange(6 * each)).astype(np.uint8)
        coarse = np.array([0, 2, 1, 1, 0, 2])[fine]
        return dict(data=grey.repeat(3072).reshape(-1, 3072), fine_labels=fine.tolist(),
                    coarse_labels=coarse.tolist())

    fine_names = ["apple", "bus", "maple_tree", "oak_tree", "pear", "pickup_truck"]
    names = dict(fine_label_names=fine_names, coarse_label_names=["fruit", "trees", "vehicles_1"])
    make_cifar(tmp_path, monkeypatch, CIFAR100, names, train=part(10, 0), test=part(2, 100))
    return tmp_path


def greys(images):
    return [image.getpixel((0, 0))[0] for image, _ in images]


def test_cifar100_is_a_task_per_coarse_class(cifar):
    tasks, again, other = (load_tasks("cifar100", split=0.2, seed=s, root=cifar) for s in (1, 1, 2))
    assert {t.name: t.class_names for t in tasks} == {
        "fruit": ["apple", "pear"], "trees": ["maple tree", "oak tree"],
        "vehicles 1": ["bus", "pickup truck"]}
    for t, same, third in zip(tasks, again, other):
        assert t.template == "a photo of a {}"
        assert counts(t.train) == counts(t.test) == [2, 2]
        assert greys(t.train) == greys(same.train) != greys(third.train)
    vehicles = tasks[2]
    image, _ = vehicles.test[0]
    assert image.size == (32, 32)
    for grey, label in zip(greys(vehicles.train), vehicles.train.labels):
        assert grey // 10 == [1, 5][label]
    assert greys(vehicles.test) == [102, 103, 110, 111] and vehicles.test.labels == [0, 0, 1, 1]


def test_cifar100_that_is_missing_or_damaged_is_named(cifar):
    (cifar / "cifar-100-python/test").write_bytes(b"damaged")
    with pytest.raises(UserError, match="CIFAR-100 is not in .*, or is damaged: give --download"):
        load_tasks("cifar100", split=0.2, root=cifar)


def test_download_fetches_only_what_is_missing_and_available(cifar, monkeypatch):
    assert len(find_listings("cifar100", cifar, download=True)) == 3    # all there: no connection
    with pytest.raises(UserError, match="--download cannot fetch pacs, only cifar100"):
        find_listings("pacs", cifar, download=True)
    (cifar / "cifar-100-python/train").unlink()

    def unreachable(*words, **more):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    line = f"cannot be downloaded .no route to host.: get {CIFAR100.url}"
    with pytest.raises(UserError, match=line):
        find_listings("cifar100", cifar, download=True)
