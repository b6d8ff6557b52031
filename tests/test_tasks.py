"""Benchmarks on disk become tasks: layouts, names, splits, held-out images."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import make_tree

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

OFFICE_CLASSES = ["Alarm_Clock", "TV", "Table", "ToothBrush"]


def sides(task):
    return set(task.train.items), set(task.test.items)


def test_emoji_is_four_styles_of_the_same_classes():
    tasks = load_tasks("emoji", shots=6)
    assert [t.name for t in tasks] == ["Noto", "Twemoji", "Fluent", "High Contrast"]
    assert all(
        t.class_names == tasks[0].class_names and 50 <= len(t.class_names) <= 65 for t in tasks
    )
    for t in tasks:
        counts = Counter(t.train.labels) + Counter(t.test.labels)
        assert (
            min(counts.values()) >= 6
            and max(counts.values()) <= 80
            and len(counts) == len(t.class_names)
        )
        assert t.val is None and t.metric == "accuracy"
    image, label = tasks[0].train[0]
    assert image.mode == "RGB" and label == 0


def test_one_task_of_emoji_is_black_and_white_and_no_drawing_is_empty():
    tasks = load_tasks("emoji", shots=6)
    for t in tasks:
        pixels = [
            torch.frombuffer(bytearray(t.test[i][0].tobytes()), dtype=torch.uint8).view(-1, 3)
            for i in range(0, len(t.test), 29)
        ]
        assert all(p.min() < 200 for p in pixels)
        grey = all((p.max(1).values == p.min(1).values).all() for p in pixels)
        assert grey == (t.name == "High Contrast")


def test_all_drawings_of_one_emoji_fall_on_the_same_side():
    tasks = load_tasks("emoji", shots=6, seed=3)
    numbers = [tuple({i for _, i in side} for side in sides(t)) for t in tasks]
    assert all(n == numbers[0] for n in numbers) and not numbers[0][0] & numbers[0][1]


def test_emoji24_is_four_styles_times_six_topics_of_the_same_drawings():
    tasks, emoji = (
        load_tasks("emoji24", shots=6, seed=2),
        load_tasks("emoji", shots=6),
    )
    assert len(tasks) == 24 and tasks[2].name == "Noto Food"
    for style, whole in enumerate(emoji):
        mine = tasks[6 * style : 6 * style + 6]
        names = [name for task in mine for name in task.class_names]
        assert sorted(names) == sorted(whole.class_names)
        assert all(task.name.startswith(whole.name) for task in mine)
        drawings = set().union(*(set(task.train.items) | set(task.test.items) for task in mine))
        assert drawings == set(whole.train.items) | set(whole.test.items)
    for topic in range(6):
        for side in ("train", "test"):
            numbers = []
            for style in range(4):
                numbers.append({i for _, i in getattr(tasks[6 * style + topic], side).items})
            assert all(n == numbers[0] for n in numbers)
    assert min(len(task.class_names) for task in tasks) >= 6


@pytest.mark.parametrize("how", [dict(shots=6), dict(split=0.1), dict(split=0.5)], ids=str)
def test_a_drawing_is_on_the_same_side_in_emoji24_as_in_emoji(how):
    """Otherwise prompts of one benchmark have been trained on what the other tests."""
    whole, parts = (load_tasks(name, seed=2, **how) for name in ("emoji", "emoji24"))
    for side in ("train", "test"):
        drawings = [{x for t in tasks for x in getattr(t, side).items} for tasks in (whole, parts)]
        assert drawings[0] == drawings[1]


def test_some_tasks_of_a_benchmark_can_be_named():
    tasks = load_tasks("emoji24:*food+Noto Things", shots=6)
    assert [task.name for task in tasks] == [
        "Noto Food",
        "Twemoji Food",
        "Fluent Food",
        "High Contrast Food",
        "Noto Things",
    ]
    assert [task.name for task in load_tasks("emoji:Noto,emoji24:Fluent Food", shots=6)] == [
        "Noto",
        "Fluent Food",
    ]
    with pytest.raises(UserError, match="emoji has no task 'Nato': its tasks are Noto, Twe"):
        load_tasks("emoji:Nato", shots=6)
    with pytest.raises(UserError, match="emoji24 has no task 'Noto Thing': its tasks are Noto Peo"):
        load_tasks("emoji24:*Food+Noto Thing", shots=6)
    both = load_tasks("emoji24:*Food+Noto*", shots=6)
    assert len(both) == 4 + 5               # Noto Food is one of each, and comes once


def test_the_built_in_defaults_are_those_of_data_that_all_come_along(tmp_path):
    folder = make_tree(tmp_path, {"a/cup": 2, "a/hat": 2})
    Coop = common.load_method("coop_mt").Args
    for words in ("emoji", "emoji,emoji24", "emoji:Noto,emoji24:*Food"):
        args = common.parse(Coop, "", ["--data", words], tiny=dict(lr=0.5))
        assert (args.clip, args.shots, args.lr) == ("tiny", 6, 0.5)
    with pytest.raises(UserError, match="needs --split, such as"):
        common.parse(Coop, "", ["--data", f"emoji:Noto,{folder}"])


def test_a_papers_setting_for_a_dataset_is_that_of_some_of_its_tasks_too():
    Coop, rules = common.load_method("coop_mt").Args, dict(minidomainnet=dict(batch_size=4))
    for words in ("minidomainnet", "minidomainnet:Real+Sketch"):
        args = common.parse(Coop, "", ["--data", words, "--split", "0.01"], of_data=rules)
        assert args.batch_size == 4


def test_a_task_of_a_benchmark_has_the_same_split_alone_and_among_others():
    [alone] = load_tasks("emoji24:Fluent Food", shots=6, seed=2)
    among = [task for task in load_tasks("emoji24", shots=6, seed=2) if task.name == alone.name]
    assert sides(alone) == sides(among[0])


def test_a_split_takes_its_fraction_of_every_class_rounded_and_at_least_one():
    whole = {
        t.name: Counter(t.train.labels) + Counter(t.test.labels)
        for t in load_tasks("emoji", split=0.5)
    }
    for t in load_tasks("emoji", split=0.1):
        taken = Counter(t.train.labels)
        assert all(taken[k] == max(1, round(0.1 * n)) for k, n in whole[t.name].items())


def test_the_split_depends_on_the_seed_and_a_larger_one_contains_the_smaller(tree):
    for data in ("emoji", str(tree)):
        first, again, other = (load_tasks(data, split=0.4, seed=s) for s in (1, 1, 2))
        assert [sides(t) for t in first] == [sides(t) for t in again]
        assert [sides(t) for t in first] != [sides(t) for t in other]
        larger = load_tasks(data, split=0.6, seed=1)
        assert all(sides(a)[0] < sides(b)[0] for a, b in zip(first, larger))
        assert all(not train & test for train, test in map(sides, first))


def test_shots_leave_a_fifth_of_a_class_and_one_image_for_testing(tmp_path):
    make_tree(tmp_path, {"a/big": 20, "a/small": 3, "b/big": 6, "b/small": 2})
    a, b = load_tasks(str(tmp_path), shots=100)
    assert Counter(a.test.labels) == {0: 4, 1: 1} and Counter(b.test.labels) == {0: 2, 1: 1}
    a, b = load_tasks(str(tmp_path), shots=2)
    assert Counter(a.train.labels) == {0: 2, 1: 2} and Counter(b.train.labels) == {0: 2, 1: 1}


def test_a_class_of_one_image_has_none_to_test_on(tmp_path):
    make_tree(tmp_path, {"a/big": 9, "a/small": 1})
    for size in (dict(shots=2), dict(split=0.1)):
        with pytest.raises(UserError, match="class 'small' of a has 1 image, .* add images or"):
            load_tasks(str(tmp_path), **size)
    make_tree(tmp_path, {"a/small": 2})
    with pytest.raises(UserError, match="none to test on: give --shots or a smaller --split"):
        load_tasks(str(tmp_path), split=1)


@pytest.mark.parametrize("shots, validation", [(1, 1), (3, 3), (4, 4), (16, 4), (None, 6)])
def test_a_datasets_own_validation_part_gives_at_most_four_images_a_class(
    tmp_path, shots, validation
):
    """min(k, 4) of 6 under `shots` k (CoOp), all without; a class of 2 gives what it has."""
    root = make_tree(
        tmp_path / "t", {"train/a": 20, "train/b": 20, "val/a": 6, "val/b": 2, "test/a": 3,
                         "test/b": 3}
    )
    [task] = load_tasks(str(root), shots=shots)
    assert Counter(task.val.labels) == {0: validation, 1: min(validation, 2)}
    assert len(task.train) == 2 * min(shots or 20, 20) and len(task.test) == 6
    if shots == 3:
        drawn = {tuple(load_tasks(str(root), shots=3, seed=s)[0].val.items) for s in range(6)}
        assert len(drawn) > 1


def test_classes_that_can_give_fewer_than_shots_are_named_once(tmp_path, capsys):
    """Classes of 5, 12 and 7 images with 9 wanted; another seed says nothing new."""
    make_tree(tmp_path, {"a/x": 5, "a/y": 12, "a/z": 7})
    load_tasks(f"few={tmp_path / 'a'}", shots=4)
    assert not capsys.readouterr().err
    for seed in (1, 2):
        load_tasks(f"few={tmp_path / 'a'}", shots=9, seed=seed)
    assert capsys.readouterr().err == (
        "warning: --shots 9: 2 of 3 classes have too few images and train on fewer, at least 4, so "
        "that some are left to test on\n"
    )


@pytest.mark.parametrize(
    "place, domains, lower",
    [
        ("OfficeHomeDataset_10072016", ["Art", "Clipart", "Product", "Real World"], False),
        ("office_home", ["art", "clipart", "product", "real_world"], True),
        (".", ["Art", "Clipart", "Product", "Real World"], False),
    ],
)
def test_office_home_is_read_in_every_layout_with_spoken_class_names(
    tmp_path, place, domains, lower
):
    make_tree(
        tmp_path / place,
        {f"{d}/{c.lower() if lower else c}": 6 for d in domains for c in OFFICE_CLASSES},
    )
    next((tmp_path / place / domains[0]).iterdir()).joinpath("._000.jpg").write_text(
        "a macOS archive leaves these"
    )
    (tmp_path / place / "ImageInfo.csv").write_text(
        "the official archive has this beside the folders"
    )
    tasks = load_tasks("officehome", split=0.34, root=tmp_path)
    assert [t.name for t in tasks] == ["Art", "Clipart", "Product", "Real World"]
    for t in tasks:
        assert (
            t.class_names == ["alarm clock", "table", "toothbrush", "tv"]
            and t.template == "a photo of a {}"
        )
        assert Counter(t.train.labels) == dict.fromkeys(range(4), 2) and Counter(
            t.test.labels
        ) == dict.fromkeys(range(4), 4)
        for path, label in zip(t.train.items + t.test.items, t.train.labels + t.test.labels):
            assert path.parent.name.replace("_", " ").lower() == t.class_names[label]


def test_pacs_is_read_in_dassls_layout(tmp_path):
    make_tree(
        tmp_path / "pacs" / "images",
        {
            f"{d}/{c}": 4
            for d in ("art_painting", "cartoon", "photo", "sketch")
            for c in ("dog", "horse")
        },
    )
    tasks = load_tasks("pacs", shots=1, root=tmp_path)
    assert [t.name for t in tasks] == ["Art Painting", "Cartoon", "Photo", "Sketch"] and len(
        tasks[0].train
    ) == 2


def test_a_folder_of_your_own_and_class_trees_with_classes_of_their_own(tree):
    drawn, painted = load_tasks(str(tree), split=0.4)
    assert (drawn.name, painted.name) == ("drawn", "painted") and drawn.class_names == [
        "cup",
        "hat",
        "red ball",
    ]
    one, two = load_tasks(f"first={tree / 'drawn'},second={tree / 'painted'}", shots=1)
    assert (one.name, two.name, len(one.train), len(one.test)) == ("first", "second", 3, 12)


def labelled(*counts):
    """Images of so many items per class."""
    labels = [k for k, n in enumerate(counts) for _ in range(n)]
    return Images(range(len(labels)), labels, read=None)


@pytest.mark.parametrize(
    "counts, held",
    [
        ([5] * 10, {1: 10}),
        ([2] * 10, {1: 4, 0: 6}),
        ([20] * 10, {4: 10}),
        ([1] * 10, {0: 10}),
        ([6] * 10, {1: 8, 2: 2}),
        ([1, 1, 1, 7], {0: 3, 2: 1}),
        ([1] * 8 + [2, 10], {0: 8, 1: 1, 2: 1}),        # 3, not 4: no class gives more than a fifth
    ],
    ids=str,
)
def test_a_held_out_part_is_a_fifth_spread_over_the_classes(counts, held):
    """How many classes give so many images; no class its last one."""
    images = labelled(*counts)
    rest, part = hold_out(images, seed=1)
    given = Counter(part.labels)
    assert Counter(given[k] for k in range(len(counts))) == held
    assert set(rest.labels) == set(images.labels) and not set(rest.items) & set(part.items)
    assert sorted(rest.items + part.items) == images.items
    if len(part):
        assert part.items == hold_out(images, seed=1)[1].items
        assert len({tuple(hold_out(images, s)[1].items) for s in range(9)}) > 1


def test_with_held_out_keeps_a_datasets_own_validation_part(small):
    from conftest import small_tasks

    tasks = small_tasks("a", "b")
    tasks[0].val = tasks[0].test.subset([0, 1])
    own, held = with_held_out(tasks, 1)
    assert own.val is tasks[0].val and own.train is tasks[0].train
    assert (
        len(held.val) == 1
        and len(held.train) == 5
        and not set(held.val.items) & set(held.test.items)
    )


def test_an_epoch_shows_the_largest_task_once_and_cycles_the_smaller():
    torch.manual_seed(0)
    steps = plan([10, 4], batch_size=5)
    assert len(steps) == 2 and all([t for t, _, _ in step] == [0] * 5 + [1] * 5 for step in steps)
    assert sorted(i for step in steps for t, i, _ in step if t == 0) == list(range(10))
    assert {i for step in steps for t, i, _ in step if t == 1} == set(range(4))
    assert [len(step) for step in plan([3, 2], batch_size=16)] == [6]


def test_mixed_batches_show_every_image_of_the_union_once():
    torch.manual_seed(0)
    sizes = [900, 900, 900, 900, 30]
    steps = plan(sizes, batch_size=20, mixed=True, views=3)
    assert len(steps) == 182 and len(steps[-1]) == 10  # ceil(3630 / 20)
    seen = [(t, i) for step in steps for t, i, _ in step]
    assert sorted(seen) == [(t, i) for t, n in enumerate(sizes) for i in range(n)] != seen
    assert {view for step in steps for _, _, view in step} == {0, 1, 2}
    assert any(len({t for t, _, _ in step}) < 5 for step in steps)  # small tasks are absent


def test_accuracy_and_mean_per_class_by_hand():
    """Three images of class 0, all right, one of class 1, wrong: 75% of images, 50% over
    classes."""
    scores, labels = torch.eye(2)[[0, 0, 0, 0]], torch.tensor([0, 0, 0, 1])
    assert common.score("accuracy", scores, labels) == 75
    assert common.score("mean per class", scores, labels) == 50


def test_evaluation_in_batches_equals_one_image_at_a_time(small, tree):
    from clip.clip import _transform

    task, preprocess, hits = load_tasks(str(tree), shots=1)[0], _transform(32), 0
    [text] = common.zero_shot_classifiers(small, [task])
    for image, label in task.test:
        x = common.encode_image(small, preprocess(image)[None])
        hits += int(common.logits(small, x, text).argmax()) == label
    scores = common.evaluate(common.Args(workers=0), small, [task], [text])
    assert scores["accuracy"] == scores["zero_shot"] == [pytest.approx(100 * hits / len(task.test))]


def test_a_test_image_is_decoded_once_a_process_whatever_is_scored(small, tree, monkeypatch):
    [task, _], read = load_tasks(str(tree), shots=1, seed=5), []

    def spy(path):
        read.append(path)
        return read_image(path)

    task.test.read = spy
    prompts = torch.randn(1, 2, 64)
    for _ in range(2):
        plain, prompted, _ = common.image_features(small, task.test, prompts, workers=0)
        common.image_features(small, task.test.subset([0, 1]), workers=0)
    assert sorted(read) == sorted(task.test.items) and not torch.equal(plain, prompted)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_views_do_not_depend_on_worker_processes(start, tree):
    """In a process that starts workers, from the repository's folder."""
    code = f"""
import multiprocessing, torch, data
if __name__ == "__main__":
    multiprocessing.set_start_method({start!r})
    lists = [task.train for task in data.load_tasks({str(tree)!r}, split=0.8)]
    torch.manual_seed(0)
    steps = data.plan([len(x) for x in lists], 4)
    found = [list(data.rendered(lists, steps, 16, 1, workers=n)) for n in (0, 2)]
    print(all(torch.equal(a, b) for one, two in zip(*found) for a, b in zip(one, two)), len(steps))
"""
    (tree.parent / "load.py").write_text(code)
    environment = dict(os.environ, PYTHONPATH=str(common.HERE))
    done = subprocess.run(
        [sys.executable, tree.parent / "load.py"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout == "True 3\n", done.stderr


def test_the_class_table_of_the_benchmark_is_what_is_shipped():
    classes = json.loads(
        (common.HERE / "data" / "emoji" / "classes.json").read_text(encoding="utf-8")
    )
    codes = [code for members in classes.values() for code, _ in members]
    assert len(codes) == len(set(codes))
    readme = (common.HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name, members in classes.items():
        assert f"| {name} | {len(members)} |" in readme


# ------------------------------------------------------------ class groups


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-100's archive in miniature: 3 coarse classes of 2, 10 training and 2 test images a fine
    class, all of one grey."""
    import hashlib
    import pickle

    import numpy as np
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    fine_names, coarse_of = (
        ["apple", "bus", "maple_tree", "oak_tree", "pear", "pickup_truck"],
        [0, 2, 1, 1, 0, 2],
    )

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def part(each, first):
        fine = [k for k in range(6) for _ in range(each)]
        grey = [first + i for i in range(len(fine))]
        return dict(
            data=np.repeat(np.array(grey, dtype=np.uint8)[:, None], 3072, axis=1),
            fine_labels=fine,
            coarse_labels=[coarse_of[k] for k in fine],
        )

    monkeypatch.setattr(CIFAR100, "train_list", [["train", write("train", part(10, 0))]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write("test", part(2, 100))]])
    names = dict(fine_label_names=fine_names, coarse_label_names=["fruit", "trees", "vehicles_1"])
    monkeypatch.setattr(CIFAR100, "meta", dict(CIFAR100.meta, md5=write("meta", names)))
    return tmp_path


def test_cifar100_is_a_task_a_coarse_class(cifar):
    tasks = load_tasks("cifar100", split=0.2, seed=1, root=cifar)
    assert [(t.name, t.class_names) for t in tasks] == [
        ("fruit", ["apple", "pear"]),
        ("trees", ["maple tree", "oak tree"]),
        ("vehicles 1", ["bus", "pickup truck"]),
    ]
    assert all(
        len(t.train) == 4 and len(t.test) == 4 and t.template == "a photo of a {}" for t in tasks
    )
    for images, first, each in [(tasks[2].train, 0, 10), (tasks[2].test, 100, 2)]:
        for image, label in images:
            grey, fine = image.getpixel((0, 0))[0], [1, 5][label]
            assert (
                image.size == (32, 32) and first + fine * each <= grey < first + (fine + 1) * each
            )
    again = load_tasks("cifar100", split=0.2, seed=1, root=cifar)

    def grey(task):
        return [image.getpixel((0, 0))[0] for image, _ in task.train]

    assert [grey(t) for t in tasks] == [grey(t) for t in again]
    assert [grey(t) for t in tasks] != [
        grey(t) for t in load_tasks("cifar100", split=0.2, seed=2, root=cifar)
    ]


def test_cifar100_that_is_missing_or_damaged_is_named(cifar):
    (cifar / "cifar-100-python" / "test").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match="CIFAR-100 is not in .*, or damaged: give --download"
    ):
        load_tasks("cifar100", split=0.2, root=cifar)


def test_download_fetches_only_what_is_missing_and_can_be_had(cifar, monkeypatch):
    assert (
        len(find_listings("cifar100", cifar, download=True)) == 3
    )  # there already: no connection
    with pytest.raises(UserError, match="--download cannot fetch pacs, only cifar100"):
        find_listings("pacs", cifar, download=True)
    tree = make_tree(cifar / "tree", {f"{d}/{c}": 1 for d in "ab" for c in "cd"})
    assert (
        len(find_listings(str(tree), cifar, download=True)) == 2
    )  # what is here need not be fetched
    (cifar / "cifar-100-python" / "train").unlink()
    from torchvision.datasets import CIFAR100

    def unreachable(*words, **more):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(
        UserError, match=f"cannot be downloaded .no route to host.: put {CIFAR100.url}"
    ):
        find_listings("cifar100", cifar, download=True)
