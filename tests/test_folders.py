"""Folders of your own: which are classes, domains, parts of a split or runs; and the messages."""

import os
import re
import shutil

import pytest
from conftest import make_tree

from data import UserError, absolute, check, load_tasks

CLASSES = ("cup", "hat")


def of_parts(root, *parts):
    return make_tree(root, {f"{part}/{c}": 3 for part in parts for c in CLASSES})


@pytest.mark.parametrize("train, test, other", [
    ("training_set", "test_set", "photos"),
    ("seg_train/seg_train", "seg_test/seg_test", "seg_pred"),   # each unpacked into a folder
    ("train", "validate", "test tube"),
    ("cifar_train", "cifar_test", "mnist_test"),
    ("Train2017", "Val2017", "train-station"),
])
def test_parts_of_a_split_are_one_task_whatever_they_are_called(tmp_path, train, test, other):
    """As separate tasks, the parts would share a prompt, also with a third folder beside them."""
    of_parts(tmp_path / "t", train, test)
    [task] = load_tasks(str(tmp_path / "t"))
    assert task.name == "t" and task.class_names == [*CLASSES]
    for images, part in ((task.train, train), (task.test, test)):
        assert len(images) == 6 and all(f"/{part}/" in str(path) for path in images.items)
    of_parts(tmp_path / "t", other)
    with pytest.raises(UserError, match=f"parts of a split, and beside them {other}: remove"):
        load_tasks(str(tmp_path / "t"))


@pytest.mark.parametrize("domains", [
    ("train station", "test tube"), ("training", "drawn"), ("a_train", "b_test"), ("val", "test")])
def test_names_that_are_not_parts_of_one_split_are_domains(tmp_path, domains):
    of_parts(tmp_path / "t", *domains)
    assert {task.name for task in load_tasks(str(tmp_path / "t"), shots=1)} == {*domains}


def test_a_split_does_not_depend_on_the_order_in_which_a_folder_is_listed(tmp_path, monkeypatch):
    root, found = make_tree(tmp_path / "t", {"d/cup": 9, "d/hat": 9}), []
    for backwards in (False, True):
        def listed(path):
            return iter(sorted(map(path.joinpath, os.listdir(path)), reverse=backwards))

        monkeypatch.setattr("pathlib.Path.iterdir", listed)
        [task] = load_tasks(str(root), shots=3)
        found.append((task.train.items, task.test.items))
    assert found[0] == found[1]


def test_domains_with_splits_of_their_own_say_how_to_name_them(tmp_path):
    of_parts(tmp_path / "t", "art/train", "art/test", "photo/train", "photo/test")
    with pytest.raises(UserError, match="art has its own split .*: give --data ") as refused:
        load_tasks(str(tmp_path / "t"), shots=1)
    tasks = load_tasks(str(refused.value).rpartition(" ")[2], shots=1)
    assert [(t.name, len(t.train), len(t.test)) for t in tasks] == [("art", 2, 6), ("photo", 2, 6)]


def test_a_task_cannot_have_the_name_of_a_tables_last_row(tmp_path):
    of_parts(tmp_path / "t", "average", "b")
    for name, given in (("average", tmp_path / "t"), ("Average", f"Average={tmp_path}/t/b")):
        with pytest.raises(UserError, match=f"is called '{name}', like the last row"):
            load_tasks(str(given), shots=1)


@pytest.mark.parametrize("folders, names", [
    ("0_to_9 10_to_19 20_to_29", "0 to 9,10 to 19,20 to 29"),
    ("10_euro 20_cent", "10 euro,20 cent"),                     # the same width, no leading zero
    ("1_euro 2_euro", "1 euro,2 euro"),                         # the same without the numbers
    ("001.Black_footed_Albatross 017.Cardinal", "black footed albatross,cardinal"),
    ("001.Laysan_Albatross AnnualCrop", "001.laysan albatross,annual crop"),
    ("0_cat 1_dog 2_fox", "cat,dog,fox"),
    ("2_cat 3_dog 4_fox", "2 cat,3 dog,4 fox"),
    ("n02085620-Chihuahua 3d_printer n02", "3d printer,chihuahua,n02"),
    ("0 1 10", "0,1,10"),
])
def test_numbers_are_dropped_if_all_classes_have_one_and_they_count_or_are_padded(
        tmp_path, folders, names):
    make_tree(tmp_path / "t" / "d", dict.fromkeys(folders.split(), 2))
    [task] = load_tasks(str(tmp_path / "t"), shots=1)
    assert ",".join(task.class_names) == names
    spelt = [re.sub("[^a-z]", "", path.parent.name.lower()) for path in task.test.items]
    for own, label in zip(spelt, task.test.labels):             # each folder has its own name
        assert own.endswith(re.sub("[^a-z]", "", task.class_names[label]))


@pytest.mark.parametrize("place, figures", [
    ("run", 5), ("runs/a/b/mmap-1", 0), ("d/run", 0), ("d/cup/run", 5)])
def test_the_folder_of_a_run_inside_the_data_is_neither_domain_nor_class(
        tmp_path, capsys, place, figures):
    of_parts(tmp_path / "t", "d", "e")
    before = [(t.name, *t.train.items) for t in load_tasks(str(tmp_path / "t"), shots=1)]
    run = make_tree(tmp_path / "t" / place, {".": figures})
    (run / "settings.json").write_text('{"method": "mmap"}')
    after = load_tasks(str(tmp_path / "t"), shots=1)
    assert [(t.name, *t.train.items) for t in after] == before
    assert [len(t.test) for t in after] == [4, 4]
    if place != "d/cup/run":
        assert f"skipped 1 folder of runs in {tmp_path / 't'}" in capsys.readouterr().err


def test_a_table_beside_runs_is_skipped_but_not_folders_with_other_settings_files(tmp_path):
    of_parts(tmp_path / "t", "d", "e", "f")
    for file in ("settings.json", "table.md", "table.csv"):
        path = make_tree(tmp_path / "t" / "runs", {"table": 3}) / "table" / file
        path.write_text('{"method": 1}' if file == "settings.json" else "")
    (tmp_path / "t" / "f" / "settings.json").write_text('{"camera": 1}')
    assert [task.name for task in load_tasks(str(tmp_path / "t"), shots=1)] == ["d", "e", "f"]


def test_data_may_be_longer_than_a_file_name(tmp_path, monkeypatch):
    of_parts(tmp_path, "d")
    monkeypatch.chdir(tmp_path)
    given = ",".join(f"task{i}=d" for i in range(60))
    assert [task.name for task in load_tasks(given, shots=1)] == [f"task{i}" for i in range(60)]
    assert absolute(given).split(",")[59] == f"task59={tmp_path}/d"
    with pytest.raises(UserError, match="xx is unknown: it is not a folder"):
        load_tasks("x" * 5000, shots=1)
    with pytest.raises(UserError, match="^there is no folder own/shapes: --data takes"):
        load_tasks("own/shapes", shots=1)


def test_a_deleted_working_folder_gives_one_line(tmp_path, monkeypatch, here):
    data = of_parts(tmp_path / "t", "d", "e")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    for command in ("coop_mt.py", f"coop_mt.py --data {data} --shots 1 --root {tmp_path}",
                    "common.py check --data x=t", "common.py table", "common.py predict p.pt x"):
        code, out, err = here(command)
        assert code == 2 and not out and err.count("\n") == 1
        assert "is relative to the working directory, which no longer exists: change to" in err


def test_a_run_inside_its_own_data_can_be_started_again(tmp_path, monkeypatch, here, random_pt):
    monkeypatch.chdir(of_parts(tmp_path / "t", "d", "e"))
    line = f"coop_mt.py --data . --clip {random_pt} --shots 1 --epochs 1 --n-ctx 2 --plot"
    one, two = (here(line)[1].split("\n\n")[1] for _ in range(2))
    assert one == two and (tmp_path / "t/runs/coop_mt-t-1-2/accuracy.png").exists()


def test_check_finds_exact_copies_that_a_split_can_put_on_both_sides(tmp_path):
    root = of_parts(tmp_path / "t", "d", "e")
    assert not check.report(str(root))[2]
    shutil.copy(root / "d/cup/000.png", root / "d/cup/000 copy.png")
    os.link(root / "e/cup/000.png", root / "e/cup/link.png")
    link, copy = check.report(str(root))[2]
    assert re.match(".*(link|000).png of e is the same image as ", link)
    assert re.match("1 image of d is an exact copy of another, such as .*000.*.png of .*: a", copy)
    assert load_tasks(str(root), shots=1)                       # only `check` looks for them
    shutil.copy(root / "d/cup/000.png", root / "d/hat/third.png")
    (root / "d/hat/000.png").write_bytes(b"no image")
    problems = "\n".join(check.report(str(root))[2])
    assert "2 images of d are exact copies of others" in problems
    assert problems.count("cannot be decoded") == 1
    assert len(check.report(str(root), quick=True)[2]) == 1
