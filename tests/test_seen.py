"""Whether an image was trained on is decided by its content, whatever its name is now."""

import os
import shutil
import zipfile

import numpy as np
import pytest
from conftest import make_tree

from data import Images, UserError, check, load_tasks, seen
from data.benchmarks import emoji


def test_a_digest_is_the_beginning_of_the_sha1_of_the_bytes(tmp_path):
    """SHA-1 of nothing begins with da39a3ee5e6b4b0d, and of "abc" with a9993e364706816a."""
    for content, start in ((b"", 0xDA39A3EE5E6B4B0D), (b"abc", 0xA9993E364706816A)):
        (tmp_path / "x").write_bytes(content)
        assert seen.digest(tmp_path / "x") == start - 2**64
    [one] = seen.digests(Images([str(tmp_path / "x")], [0])).tolist()
    assert one == 0xA9993E364706816A - 2**64


def test_another_name_folder_link_or_zip_file_does_not_make_another_image(tmp_path):
    root = make_tree(tmp_path, {"a/cup": 2})
    first, second = (root / "a" / "cup" / f"00{i}.png" for i in range(2))
    (root / "b").mkdir()
    shutil.copy(first, root / "b" / "renamed.png")
    os.symlink(first, root / "b" / "001.png")
    for name in ("train.zip", "b/train.zip"):                   # same name, other content
        with zipfile.ZipFile(root / name, "w") as file:
            file.write(first if name == "train.zip" else second, "0/x.png")
    same = [str(first), root / "b" / "renamed.png", root / "b" / "001.png",
            (str(root / "train.zip"), "0/x.png")]
    assert len({seen.digest(item) for item in same}) == 1
    assert seen.digest(second) == seen.digest((str(root / "b" / "train.zip"), "0/x.png"))
    assert seen.digest(first) != seen.digest(second)


def test_an_array_is_identified_by_its_pixels_and_a_drawing_by_its_number():
    """Drawings 47 and 56 of Fluent look alike, and their sheet may lie elsewhere."""
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert seen.digest(black) == seen.digest(black.copy()) != seen.digest(white)
    one, two = ((str(emoji.FOLDER / "fluent.webp"), number) for number in (47, 56))
    assert emoji.read_tile(one).tobytes() == emoji.read_tile(two).tobytes()
    assert seen.digest(one) != seen.digest(two)
    assert seen.digest(one) == seen.digest(("/elsewhere/fluent.webp", 47))
    assert seen.digest(one) != seen.digest(("/elsewhere/noto.webp", 47))


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_trained_images_are_found_among_the_test_images_of_a_renamed_domain(tmp_path, how):
    """Another name gives another split. Checked by brute force over the files' bytes."""
    [task] = load_tasks(str(make_tree(tmp_path / "one", {"a/cup": 8, "a/hat": 8})), shots=6)
    known = {path.read_bytes() for path in task.train.items}
    new = tmp_path / "two" / "another"
    new.parent.mkdir()
    if how == "linked":
        new.symlink_to(tmp_path / "one" / "a")
    else:
        shutil.copytree(tmp_path / "one" / "a", new)
        for path in list(new.rglob("*.png")):
            path.rename(path.with_name(f"{9 - int(path.stem)} copy.png"))
    [again] = load_tasks(str(tmp_path / "two"), shots=6)
    trained = set(seen.trained_on([task]).tolist())
    both = [str(path) for path in again.test.items if path.read_bytes() in known]
    assert seen.tested(again, trained) == both and len(both) > 0
    assert not seen.tested(task, trained)


def test_prompts_are_scored_on_their_own_split_and_on_no_other(tmp_path, here, random_pt):
    """Training accepts a test image that is a copy of a training image, and a test image may become
    one later. Once an image is deleted, the split is another one."""
    root, run = make_tree(tmp_path / "t", {"a/cup": 12, "a/hat": 12}), tmp_path / "run"
    words = f"--data {root} --shots 4 --clip {random_pt} --epochs 1 --workers 0 --out {run}"
    assert here(f"coop_mt.py {words}")[0] == 0
    again = f"coop_mt.py --eval {run}/prompts.pt --workers 0"
    assert here(again)[::2] == (0, "")
    [task] = load_tasks(str(root), shots=4)
    shutil.copy(task.train.items[0], task.test.items[0])
    code, out, err = here(again)
    assert code == 0 and "scored from" in out
    assert "1 of the 16 test images of a are exact copies of images trained on" in err
    (root / "a/cup/000.png").unlink()
    code, out, err = here(again)
    assert (code, out) == (2, "") and " test images of a, such as " in err


def test_held_out_images_count_as_seen(tmp_path):
    parts = ("train/cup", "val/cup", "test/cup", "train/hat", "val/hat", "test/hat")
    [task] = load_tasks(str(make_tree(tmp_path / "t", dict.fromkeys(parts, 2))), shots=1)
    trained = seen.trained_on([task])
    assert sorted(trained.tolist()) == sorted(
        seen.digest(path) for path in task.train.items + task.val.items)
    task.test = task.val
    assert len(seen.tested(task, set(trained.tolist()))) == 2
    assert seen.trained_on([]).tolist() == []


def test_a_run_recognises_its_data_after_a_move_but_not_after_a_change(tmp_path):
    def contents():
        return [seen.contents(task) for task in load_tasks(str(root), shots=2)]

    root = make_tree(tmp_path / "here", {"a/cup": 4, "a/hat": 4})
    before = contents()
    assert before[0][:2] == ["cup", "hat"] and len(before[0]) == 3
    root = root.rename(tmp_path / "there")
    assert contents() == before
    [task] = load_tasks(str(root), shots=2)
    trained, test = task.train.items[0], task.test.items[0]
    content = trained.read_bytes()
    trained.write_bytes(task.train.items[1].read_bytes())
    assert contents() != before
    trained.write_bytes(content)
    assert contents() == before
    test.rename(test.with_suffix(".PNG"))
    assert contents() != before


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip file")
    for item in (tmp_path / "gone.png", (str(tmp_path / "x.zip"), "1.png")):
        with pytest.raises(UserError, match="(gone.png|x.zip@1.png) cannot be read .*: replace"):
            seen.digest(item)


@pytest.mark.parametrize("link", [os.symlink, os.link, "of the folder"])
def test_an_image_that_is_linked_on_both_sides_is_noticed(tmp_path, link):
    """By a run, and by `check` before anything is trained."""
    root = make_tree(tmp_path / "t", {"train/cup": 3, "test/cup": 2, "train/hat": 3, "test/hat": 2})
    assert not [line for line in check.report(str(root))[2] if "is the same image as" in line]
    if link == "of the folder":
        shutil.rmtree(root / "test/cup")
        os.symlink(root / "train/cup", root / "test/cup")
    else:
        link(root / "train/cup/000.png", root / "test/cup/link.png")
    with pytest.raises(UserError, match="both a training and a test image: remove it"):
        load_tasks(str(root), split=1.0)
    assert [line for line in check.report(str(root))[2] if "is the same image as" in line]


def test_an_image_that_is_linked_twice_in_a_class_is_noticed(tmp_path):
    """By every seed that puts the two on different sides."""
    root, refused = make_tree(tmp_path / "t", {"d/cup": 2, "d/hat": 2}), 0
    for i in range(2):
        os.symlink(root / f"d/cup/00{i}.png", root / f"d/cup/link{i}.png")
    for seed in range(8):
        try:
            [task] = load_tasks(str(root), split=0.5, seed=seed)
            train, test = ({os.path.realpath(p) for p in x.items} for x in (task.train, task.test))
            assert not train & test
        except UserError:
            refused += 1
    assert refused > 0


def test_another_tasks_training_images_among_the_test_images_are_reported(tree, capsys):
    """Two tasks on one tree have different splits because their names differ."""
    load_tasks(f"one={tree / 'drawn'},two={tree / 'painted'}", split=0.4)
    assert not capsys.readouterr().err
    load_tasks(f"one={tree / 'drawn'},two={tree / 'drawn'}", split=0.4)
    said = capsys.readouterr().err
    assert "test images are training images of another task" in said
    assert said.count("\n") == 1
