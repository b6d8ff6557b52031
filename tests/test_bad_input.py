"""A user's mistakes: one line on stderr with the culprit and the remedy, exit code 2, not a byte
written or lost."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, make_tree, random_clip, run_script
from PIL import Image

import common

coop = common.load_method("coop_mt")
CLASSES = ("Red_Ball", "cup", "hat")
SILENT = (
    DeprecationWarning,
    PendingDeprecationWarning,
    ImportWarning,
    ResourceWarning,
)  # what Python does not show


@pytest.fixture
def method(tmp_path, tmp_path_factory, monkeypatch, here):
    """A method file as a command in `tmp_path`, without a process: words -> (exit code, stderr,
    stdout)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))

    def call(*words, script="coop_mt"):
        with warnings.catch_warnings(record=True) as told:
            code, out, err = here(f"{script}.py", *words)
        return (
            code,
            "".join(f"{w.message}\n" for w in told if not issubclass(w.category, SILENT)) + err,
            out,
        )

    return call


@pytest.fixture
def refused(method, tmp_path):
    """Call a method file and see it refuse with one line that says all of `says`, and change
    nothing. Returns the line."""

    def call(*words, says, script="coop_mt"):
        before = contents(tmp_path)
        code, err, out = method(*words, script=script)
        check_line(code, err, out, says, script)
        assert contents(tmp_path) == before
        return err

    return call


def check_line(code, err, out, says, script="coop_mt"):
    assert code == 2 and not out
    if "For full helptext" in err:  # tyro refuses a flag or its value in a box of its own
        assert "Traceback" not in err and f"{script}.py --help" in err
        words = " ".join(err.translate(str.maketrans("", "", "│╭╮╰╯─")).split())
        assert [word for word in map(str, says) if word not in words] == [], err
        return
    assert (
        err.startswith(f"{script}.py: ")
        and err.endswith("\n")
        and err[:-1].isprintable()
        and "Traceback" not in err
    ), err
    assert [word for word in map(str, says) if word not in err] == [], err


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A random CLIP as a file for --clip."""
    path = tmp_path_factory.mktemp("backbone") / "random.pt"
    torch.save(random_clip(**TINY).state_dict(), path)
    return path


@pytest.fixture
def small_run(backbone):
    """The words of the smallest training."""
    return [
        "--clip",
        backbone,
        "--split",
        0.4,
        "--epochs",
        1,
        "--views",
        1,
        "--n-ctx",
        2,
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbone):
    """The folder of a finished run of seed 1."""
    folder = tmp_path_factory.mktemp("trained")
    data = make_tree(
        folder / "shapes", {f"{d}/{c}": 5 for d in ("drawn", "painted") for c in CLASSES}
    )
    words = [
        "--data",
        data,
        "--split",
        0.4,
        "--clip",
        backbone,
        "--epochs",
        1,
        "--views",
        1,
        "--n-ctx",
        2,
        "--device",
        "cpu",
    ]
    coop.main([*map(str, words), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def finished(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def stopped(finished):
    """A run that was stopped before its end."""
    (finished / "result.json").unlink()
    return finished


# --------------------------------------------------------------------------------------------------
# -------------- data


@pytest.mark.parametrize(
    "word, meant", [("officehom", "officehome"), ("emojy", "emoji"), ("PACS", "pacs")]
)
@pytest.mark.parametrize("more", [["--split", 0.1], []], ids=["with a split", "without"])
def test_a_misspelt_dataset_suggests_the_nearest(refused, word, meant, more):
    refused("--data", word, *more, says=[f"--data {word} ", f"did you mean '{meant}'?"])


def test_a_dataset_like_no_other_is_answered_with_the_list(refused):
    refused(
        "--data", "zzz", "--split", 0.1, says=["--data zzz ", "emoji, emoji24, officehome, pacs"]
    )


def test_a_mistake_is_one_line_in_a_real_process_too(tmp_path):
    done = run_script("coop_mt.py", "--data", "officehom", "--split", 0.1, cwd=tmp_path)
    check_line(
        done.returncode,
        done.stderr,
        done.stdout,
        ["--data officehom ", "did you mean 'officehome'?"],
    )
    assert not contents(tmp_path)


def test_a_root_that_does_not_exist_is_named(refused, tmp_path):
    refused(
        "--data",
        "officehome",
        "--split",
        0.1,
        "--root",
        tmp_path / "nowhere",
        says=["there is no folder", tmp_path / "nowhere"],
    )


def test_a_missing_folder_points_to_its_flag(refused):
    refused(
        "--data", "things=nowhere", "--split", 0.1, says=["there is no folder", "nowhere", "--data"]
    )
    refused("--data", "officehome", "--split", 0.1, says=["there is no folder", "data", "--root"])


@pytest.mark.parametrize(
    "there",
    [[], ["Art/Bed", "Clipart/Bed"], ["office_home/Art/Bed"]],
    ids=["empty", "two domains", "one domain"],
)
def test_an_incomplete_root_says_what_belongs_where(refused, tmp_path, there):
    root = tmp_path / "sets"
    root.mkdir()
    make_tree(root, {folder: 2 for folder in there})
    refused(
        "--data",
        "officehome",
        "--split",
        0.1,
        "--root",
        root,
        says=[
            "Office-Home",
            root / "OfficeHomeDataset_10072016",
            "Art, Clipart, Product, Real World",
            "--root",
        ],
    )


@pytest.mark.parametrize(
    "words",
    [["--data", "FILE"], ["--data", "things=FILE"], ["--data", "officehome", "--root", "FILE"]],
    ids=" ".join,
)
def test_a_file_where_a_folder_belongs_is_named(refused, tmp_path, words):
    (tmp_path / "notes.txt").write_text("a list")
    words = [word.replace("FILE", str(tmp_path / "notes.txt")) for word in words]
    refused(*words, "--split", 0.1, says=[tmp_path / "notes.txt", "is a file", "folder"])


@pytest.mark.parametrize(
    "start, says",
    [
        ("..", ["too high", "try", "SHAPES"]),
        ("../..", ["too high", "try"]),
        ("drawn", ["domain/class/*.jpg", "one level up", "name="]),
        ("drawn/cup", ["domain/class/*.jpg", "two levels up"]),
    ],
    ids=["one too high", "two too high", "one too low", "in the images"],
)
def test_a_folder_at_the_wrong_level_says_where_to_go(refused, tmp_path, start, says):
    shapes = make_tree(
        tmp_path / "a" / "b" / "shapes",
        {f"{d}/{c}": 5 for d in ("drawn", "painted") for c in CLASSES},
    )
    data = (shapes / start).resolve()
    refused(
        "--data",
        data,
        "--split",
        0.4,
        says=[data, *(word.replace("SHAPES", str(shapes)) for word in says)],
    )


@pytest.mark.parametrize(
    "start, says",
    [("", ["too high", "class/*.jpg"]), ("drawn/cup", ["one level up", "class/*.jpg"])],
    ids=["too high", "too low"],
)
def test_a_single_task_at_the_wrong_level_says_so(refused, tree, start, says):
    refused("--data", f"things={tree / start}", "--split", 0.4, says=[tree / start, *says])


@pytest.mark.parametrize(
    "others", [[], ["notes.txt", ".hidden.png"]], ids=["nothing in it", "no images in it"]
)
def test_an_empty_class_folder_is_named(refused, tree, others):
    shutil.rmtree(tree / "painted" / "cup")
    (tree / "painted" / "cup").mkdir()
    for name in others:
        (tree / "painted" / "cup" / name).write_text("a list")
    refused(
        "--data",
        tree,
        "--split",
        0.4,
        says=[tree / "painted" / "cup", "holds no images", "add some or take it away"],
    )


def test_an_empty_domain_folder_and_an_empty_tree_are_named(refused, tree, tmp_path):
    (tree / "traced").mkdir()
    refused("--data", tree, "--split", 0.4, says=[tree / "traced", "holds no images"])
    (tmp_path / "void").mkdir()
    refused(
        "--data",
        tmp_path / "void",
        "--split",
        0.4,
        says=[tmp_path / "void", "holds no images", "domain/class/*.jpg"],
    )


def test_a_class_in_one_domain_only_is_named_with_both_domains(refused, tree):
    make_tree(tree, {"drawn/sock": 5})
    refused(
        "--data",
        tree,
        "--split",
        0.4,
        says=[tree, "class 'sock'", "drawn", "not in painted", "name=path"],
    )


@pytest.mark.parametrize("split", [1, 0.95])
def test_a_split_without_test_images_is_refused(refused, tree, split):
    refused("--data", tree, "--split", split, says=["drawn", "none to test on", "smaller --split"])


def test_shots_from_a_class_with_one_image_name_the_class(refused, tree):
    for image in sorted((tree / "painted" / "Red_Ball").iterdir())[1:]:
        image.unlink()
    refused(
        "--data",
        tree,
        "--shots",
        1,
        says=["'red ball'", "painted", "1 image", "add images"],
    )


@pytest.mark.parametrize(
    "data", ["TREE,TREE", "a=TREE/drawn,a=TREE/painted", "drawn=TREE/drawn,TREE", "emoji,emoji"]
)
def test_two_tasks_of_the_same_name_are_refused(refused, tree, data):
    data = data.replace("TREE", str(tree))
    refused(
        "--data", data, "--split", 0.4, says=["two tasks are called", f"--data {data}", "name=path"]
    )


def test_a_folder_of_ones_own_needs_a_split_or_shots(refused, tree):
    refused("--data", tree, says=[f"--data {tree}", "--split 0.1", "--shots 4"])


def picture(ending="PNG"):
    buffer = io.BytesIO()
    Image.effect_noise((24, 24), 60).convert("RGB").save(buffer, ending)
    return buffer.getvalue()


SPOILT = {
    "text": b"not a picture",
    "empty": b"",
    "a truncated PNG": picture()[:-300],
    "a truncated JPEG": picture("JPEG")[:200],
    "a PNG header": picture()[:20],
    "a truncated TIFF": picture("TIFF")[:-40],
}


@pytest.mark.parametrize("kind", SPOILT)
def test_an_undecodable_training_image_is_found_before_anything_is_written(
    refused, tree, tmp_path, small_run, kind
):
    path = common.load_tasks(str(tree), split=0.4)[1].train.items[3]
    path.write_bytes(SPOILT[kind])
    refused(
        "--data",
        tree,
        *small_run,
        "--out",
        tmp_path / "run",
        says=[path, "cannot be decoded", "replace it or take it away"],
    )


@pytest.mark.parametrize("again", ["--eval", "--resume"])
def test_an_undecodable_test_image_is_named_and_the_prompts_are_kept(
    method, tree, tmp_path, small_run, again
):
    path, out = common.load_tasks(str(tree), split=0.4)[1].test.items[3], tmp_path / "run"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    code, err, printed = method("--data", tree, *small_run, "--out", out)
    check_line(code, err, printed, [path, "cannot be decoded", "replace it or take it away"])
    assert (out / "prompts.pt").exists() and not (out / "result.json").exists()

    path.write_bytes(whole)
    code, err, printed = method(
        *(["--eval", out / "prompts.pt"] if again == "--eval" else ["--resume", "--out", out])
    )
    assert code == 0 and not err and "painted" in printed and "average" in printed


def test_a_class_name_too_long_for_clip_is_named_before_anything_is_written(
    refused, tree, small_run, tmp_path
):
    """72 words fit behind two context vectors, and not behind the template of the zero-shot row."""
    for words in (72, 90):
        name = " ".join("ab"[i % 2] for i in range(words))
        data = make_tree(
            tmp_path / f"{words} words",
            {f"{d}/{c}": 5 for d in ("drawn", "painted") for c in ("cup", name)},
        )
        line = refused("--data", data, *small_run, "--out", tmp_path / "run", says=[name, "77"])
        assert "at most -" not in line and "at most 0" not in line


# --------------------------------------------------------------------------------------------------
# ----------- numbers


@pytest.mark.parametrize("split", ["0", "-0.1", "1.5", "nan", "inf"])
def test_a_split_that_is_no_fraction_is_refused(refused, split):
    refused("--split", split, says=["--split", float(split), "above 0 and up to 1"])


def test_split_and_shots_together_are_refused(refused):
    refused("--split", 0.1, "--shots", 4, says=["--split and --shots", "give one of them"])


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_start_at_one(refused, shots):
    refused("--shots", shots, says=[f"--shots {shots}", "give 1 or more"])


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--n-ctx"])
@pytest.mark.parametrize("number", [0, -3])
def test_counts_start_at_one(refused, flag, number):
    refused(flag, number, says=[f"{flag} {number}", "give 1 or more"])


def test_views_start_at_zero(refused):
    refused("--views", -1, says=["--views -1", "give 0 or more"])


@pytest.mark.parametrize("rate", ["0", "-0.1", "nan", "inf"])
def test_a_learning_rate_is_finite_and_above_zero(refused, rate):
    refused("--lr", rate, says=[f"--lr {float(rate)}", "above 0"])


@pytest.mark.parametrize("seeds", [["1", "1"], ["3", "1", "3"], ["-1"], ["1", "-2"]], ids=" ".join)
def test_seeds_are_natural_numbers_each_once(refused, seeds):
    refused("--seeds", *seeds, says=[f"--seeds {' '.join(seeds)}", "from 0 up, each once"])


@pytest.mark.parametrize(
    "flag", ["--epochs", "--batch-size", "--n-ctx", "--views", "--seeds", "--shots"]
)
@pytest.mark.parametrize("word", ["many", "nan", "inf", "2.5", ""])
def test_counts_are_whole_numbers(refused, flag, word):
    refused(flag, word, says=[flag, f"'{word}'", "--help"])


@pytest.mark.parametrize("flag", ["--lr", "--split"])
@pytest.mark.parametrize("word", ["fast", "0,1", ""])
def test_rates_are_numbers(refused, flag, word):
    refused(flag, word, says=[flag, f"'{word}'", "--help"])


@pytest.mark.parametrize("n_ctx", [77, 500])
def test_more_context_vectors_than_text_positions_are_refused_with_the_most_that_fit(
    refused, tree, small_run, n_ctx
):
    """[SOS] red ball . [EOS] takes 5 of the 77."""
    refused(
        "--data",
        tree,
        *small_run,
        "--n-ctx",
        n_ctx,
        says=[f"{n_ctx} context vectors", "red ball", "77", "at most 72"],
    )


@pytest.mark.parametrize(
    "words",
    ["--precision fp8", "--batches both", "--schedule linear", "--surgery scalpel"],
)
def test_a_choice_that_there_is_not_is_answered_with_the_list(refused, words):
    flag, choice = words.split()
    field = coop.Args.__dataclass_fields__[flag.removeprefix("--")]
    refused(flag, choice, says=[flag, choice, *re.findall(r"'(\w+)'", str(field.type))])


@pytest.mark.parametrize(
    "words", ["--amp", "--compile", "--max-mem 4", "--predict a.png", "--task drawn"]
)
def test_a_flag_that_was_dropped_is_unknown(refused, words):
    refused(*words.split(), says=["Unrecognized options", words.split()[0]])


def test_a_number_of_workers_starts_at_zero(refused):
    refused("--workers", -1, says=["--workers -1", "give 0 or more"])


@pytest.mark.parametrize("part", ["0", "-1", "1.5", "nan", "inf"])
def test_a_view_shows_a_part_of_an_image(refused, part):
    refused("--min-crop", part, says=["--min-crop", float(part), "above 0 and up to 1"])


@pytest.mark.parametrize(
    "words", [["--epoch", "3"], ["--nctx", "4"], ["emoji"], ["--seeds"], ["--data"]], ids=" ".join
)
def test_words_that_mean_nothing_point_to_the_help(refused, words):
    refused(*words, says=[words[0]])


# ----------------------------------------------------------------------------------------------
# backbones and devices


@pytest.mark.parametrize(
    "word, meant", [("ViT-B/61", "ViT-B/16"), ("RN5", "RN50"), ("Tiny", "tiny")]
)
def test_an_unknown_backbone_suggests_the_nearest(refused, word, meant):
    refused(
        "--clip",
        word,
        says=[
            f"unknown backbone '{word}'",
            f"did you mean '{meant}'?",
            "ViT-L/14",
            "path of a file",
        ],
    )


def test_a_backbone_file_that_is_not_there_is_an_unknown_backbone(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "lost.pt", tmp_path / "folder"):
        refused("--clip", path, says=[f"unknown backbone '{path}'", "path of a file"])


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(
    refused, tree, tmp_path, tmp_path_factory, monkeypatch
):
    def unreachable(url, *args, **kwargs):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    refused(
        "--data",
        tree,
        "--split",
        0.4,
        "--clip",
        "ViT-B/16",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
        says=["ViT-B/16", "Name or service not known", "https://", "ViT-B-16.pt", "~/.cache/clip"],
    )


@pytest.mark.parametrize(
    "device",
    [
        "warp",
        "meta",
        "cuda:99",
        "",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(refused, device):
    refused("--device", device, says=[f"--device {device}", "use --device cpu"])


# -------------------------------------------------------------------------------------------------
# files to be loaded


class Trap:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def torch_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


FOREIGN = {
    "truncated": lambda good, trap: good[: len(good) // 2],
    "cut by a byte": lambda good, trap: good[:-1],
    "empty": lambda good, trap: b"",
    "text": lambda good, trap: b"dear diary\n" * 50,
    "a picture": lambda good, trap: picture(),
    "a pickle": lambda good, trap: pickle.dumps({"a": 1}),
    "a list": lambda good, trap: torch_file([1, 2]),
    "a dict": lambda good, trap: torch_file({"weights": torch.zeros(3)}),
    "a malicious pickle": lambda good, trap: pickle.dumps(Trap(trap)),
    "a malicious archive": lambda good, trap: torch_file(
        dict(method="coop_mt", settings={}, prompts={}, more=Trap(trap))
    ),
}


def spoil(kind, path, good, trap):
    path.write_bytes(FOREIGN[kind](good, trap))


def test_the_trap_of_the_next_tests_works(tmp_path):
    spoil("a malicious pickle", tmp_path / "bad.pt", b"", tmp_path / "trap")
    pickle.loads((tmp_path / "bad.pt").read_bytes()).close()
    assert (tmp_path / "trap").exists()
    (tmp_path / "trap").unlink()
    spoil("a malicious archive", tmp_path / "bad.pt", b"", tmp_path / "trap")
    torch.load(tmp_path / "bad.pt", weights_only=False)["more"].close()
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_backbone_file_that_is_no_clip_is_refused_and_runs_no_code(
    refused, tree, backbone, small_run, tmp_path, kind
):
    path, trap = tmp_path / "backbone.pt", tmp_path / "trap"
    spoil(kind, path, backbone.read_bytes(), trap)
    line = refused(
        "--data",
        tree,
        *small_run,
        "--clip",
        path,
        "--out",
        tmp_path / "run",
        says=[path, "not a CLIP checkpoint", "give a TorchScript archive"],
    )
    assert not trap.exists() and "still be loaded" not in line


@pytest.mark.parametrize("kind", FOREIGN)
def test_prompts_that_are_none_are_refused_and_run_no_code(refused, finished, tmp_path, kind):
    path, trap = finished / "prompts.pt", tmp_path / "trap"
    spoil(kind, path, path.read_bytes(), trap)
    line = refused("--eval", path, says=[path, "is not a prompts.pt", "give"])
    assert not trap.exists() and "still be loaded" not in line


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_that_is_none_is_refused_and_runs_no_code(refused, stopped, tmp_path, kind):
    path, trap = stopped / "checkpoint.pt", tmp_path / "trap"
    spoil(kind, path, path.read_bytes(), trap)
    line = refused(
        "--resume", "--out", stopped, says=[path, "is not a checkpoint", "another --out"]
    )
    assert not trap.exists() and "still be loaded" not in line


def test_prompts_that_are_not_there_are_named(refused, tmp_path):
    refused(
        "--eval", tmp_path / "prompts.pt", says=[tmp_path / "prompts.pt", "No such file", "give"]
    )


def test_the_checkpoint_instead_of_the_prompts_is_refused(refused, finished):
    refused("--eval", finished / "checkpoint.pt", says=[finished / "checkpoint.pt", "prompts.pt"])


def test_the_prompts_instead_of_the_checkpoint_are_refused(refused, stopped):
    shutil.copy(stopped / "prompts.pt", stopped / "checkpoint.pt")
    refused(
        "--resume",
        "--out",
        stopped,
        says=[stopped / "checkpoint.pt", "is not a checkpoint", "another --out"],
    )


def test_prompts_of_another_method_name_its_file(refused, finished):
    path = finished / "prompts.pt"
    torch.save(dict(torch.load(path), method="mmap"), path)
    refused(
        "--eval", path, says=[path, "prompts of mmap, not of coop_mt", f"mmap.py --eval {path}"]
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (["--clip", "ViT-B/16"], ["--clip ViT-B/16", "leave the flag out"]),
        (["--seeds", "1", "5"], ["seeds 1", "not of 5"]),
        (["--n-ctx", "3"], ["--n-ctx", "leave"]),
        (["--single-task"], ["--single-task", "leave"]),
    ],
    ids=["backbone", "seed", "prompt length", "variant"],
)
def test_prompts_are_not_scored_with_words_that_contradict_them(refused, finished, words, says):
    refused("--eval", finished / "prompts.pt", *words, says=[finished / "prompts.pt", *says])


# --------------------------------------------------------------------------------------------------
# ---------- run folders


def test_resume_needs_out(refused):
    refused("--resume", says=["--resume needs --out"])


@pytest.mark.parametrize("place", ["nowhere", "empty", "notes.txt", "notes.txt/run"])
def test_resume_without_a_run_says_how_to_start_one(refused, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a list")
    refused(
        "--resume",
        "--out",
        tmp_path / place,
        says=[tmp_path / place, "no run to resume", "leave out --resume"],
    )


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 9",
        "--lr 0.5",
        "--seeds 2",
        "--seeds 1 2",
        "--split 0.2",
        "--data emoji",
        "--clip tiny",
        "--n-ctx 3",
        "--shots 4",
        "--views 0",
        "--epochs 0",
        "--single-task",
    ],
)
def test_resume_refuses_words_that_contradict_the_run(refused, stopped, words):
    flag = words.split()[0]
    line = refused(
        "--resume",
        "--out",
        stopped,
        *words.split(),
        says=[stopped, "started with", flag, "leave the flag out", "another --out"],
    )
    assert not {"None,", "False,"} & set(line.split())


def test_resume_of_another_method_s_run_names_its_file(refused, stopped):
    settings = json.loads((stopped / "settings.json").read_text())
    (stopped / "settings.json").write_text(json.dumps(dict(settings, method="mmap")))
    refused("--resume", "--out", stopped, says=[stopped, "mmap.py"])


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "{}"])
def test_resume_with_spoilt_settings_names_the_file(refused, stopped, text):
    (stopped / "settings.json").write_text(text)
    refused("--resume", "--out", stopped, says=[stopped / "settings.json", "another --out"])


DAMAGED = [
    ("seeds", None),
    ("seeds", 1),
    ("seeds", ["one"]),
    ("lr", "fast"),
    ("split", []),
    ("precision", "fp8"),
    ("workers", {}),
    ("single_task", 7),
]


@pytest.mark.parametrize("key, value", DAMAGED, ids=str)
def test_a_saved_setting_that_no_flag_takes_is_named(refused, stopped, key, value):
    path, prompts = stopped / "settings.json", stopped / "prompts.pt"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **{key: value})))
    refused("--resume", "--out", stopped, says=[stopped, "is damaged", key, "another --out"])
    saved = torch.load(prompts, weights_only=True)
    saved["settings"][key] = value
    torch.save(saved, prompts)
    refused("--eval", prompts, says=[prompts, "is damaged", key])


@pytest.mark.parametrize("seen", [{}, {1: None}, {1: [1, 2]}], ids=str)
def test_prompts_that_do_not_say_what_they_were_trained_on_are_refused(refused, finished, seen):
    path = finished / "prompts.pt"
    torch.save(dict(torch.load(path, weights_only=True), trained_on=seen), path)
    refused("--eval", path, says=[path, "is damaged", "seed 1"])


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"method": "coop_mt"}'])
def test_a_spoilt_result_of_a_finished_run_is_named(refused, finished, text):
    (finished / "result.json").write_text(text)
    refused("--resume", "--out", finished, says=[finished / "result.json", "another --out"])


def test_of_two_runs_that_begin_in_one_folder_one_is_refused(
    method, tree, tmp_path, small_run, monkeypatch
):
    """The other's settings come between the check and the first write."""
    out, opened = tmp_path / "run", common.Run.open

    def late(run, found):
        out.mkdir()
        (out / "settings.json").write_text("another's")
        opened(run, found)

    monkeypatch.setattr(common.Run, "open", late)
    code, err, printed = method("--data", tree, *small_run, "--out", out)
    check_line(code, err, printed, [f"--out {out}", "another run", "another folder"])
    assert contents(out) == {out / "settings.json": b"another's"}


@pytest.mark.parametrize(
    "name", ["settings.json", "checkpoint.pt", "prompts.pt", "log.csv", "result.json"]
)
def test_an_out_that_holds_another_run_is_left_as_it_is(refused, tree, small_run, finished, name):
    for path in finished.iterdir():
        if path.name != name:
            path.unlink()
    refused(
        "--data",
        tree,
        *small_run,
        "--out",
        finished,
        says=[f"--out {finished}", "another run", name, "another folder", "--resume"],
    )


def test_an_out_that_holds_a_whole_run_is_left_as_it_is(refused, tree, small_run, finished):
    refused(
        "--data",
        tree,
        *small_run,
        "--out",
        finished,
        says=[f"--out {finished}", "another run", "another folder", "--resume"],
    )


@pytest.mark.parametrize("place", ["notes.txt", "notes.txt/run", "notes.txt/deeper/run"])
def test_an_out_that_is_a_file_or_lies_below_one_is_refused(
    refused, tree, tmp_path, small_run, place
):
    (tmp_path / "notes.txt").write_text("a list")
    refused(
        "--data",
        tree,
        *small_run,
        "--out",
        tmp_path / place,
        says=[tmp_path / place, tmp_path / "notes.txt", "is a file", "another folder"],
    )


@pytest.mark.parametrize("flag", ["--data", "--root", "--clip", "--eval", "--out"])
def test_a_name_longer_than_a_file_s_may_be_is_refused(refused, tree, small_run, flag):
    name = "x" * 300
    more = (
        ["--data", "officehome"]
        if flag == "--root"
        else ["--data", tree]
        if flag != "--data"
        else []
    )
    refused(*more, *small_run, flag, name, says=[name])


# -------------------------------------------------------------------------------------------- the
# other methods' own words

WITH_IMAGE_PROMPTS = ["vpt_mt", "maple_mt", "mmap", "jscpt"]


@pytest.mark.parametrize("script", WITH_IMAGE_PROMPTS)
def test_a_resnet_cannot_take_image_prompts_and_is_not_downloaded(refused, tree, script):
    refused(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        "RN50",
        says=["RN50", "ResNet", "--clip ViT-B/16"],
        script=script,
    )


@pytest.mark.parametrize("script", WITH_IMAGE_PROMPTS)
def test_a_resnet_in_a_file_cannot_take_image_prompts(refused, tree, tmp_path_factory, script):
    shape = dict(
        TINY,
        vision_layers=(1, 1, 1, 1),
        vision_width=8,
        vision_patch_size=None,
        image_resolution=64,
        embed_dim=64,
    )
    path = tmp_path_factory.mktemp("resnet") / "resnet.pt"
    torch.save(random_clip(**shape).state_dict(), path)
    refused("--data", tree, "--shots", 2, "--clip", path, says=[path, "ResNet"], script=script)


@pytest.mark.parametrize(
    "script, words, most",
    [("maple_mt", [74], "74 context vectors"), ("mmap", [40], "80 context vectors")],
)
def test_prompts_that_do_not_fit_the_text_are_counted_together(refused, tree, script, words, most):
    line = refused(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        "tiny",
        "--n-ctx",
        *words,
        says=[most, "77 text positions"],
        script=script,
    )
    assert ("in all; a text has 2 prompts" in line) == (script == "mmap")


@pytest.mark.parametrize(
    "groups, says",
    [(3, "the 2 tasks"), (0, "too small"), (-1, "too small"), ("many", "invalid literal")],
)
def test_groups_that_cannot_be(refused, tree, groups, says):
    refused(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        "tiny",
        "--groups",
        groups,
        says=[f"{groups}", says],
        script="mmap",
    )


def test_an_ablation_of_everything_leaves_nothing(refused, tree):
    refused(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        "tiny",
        "--no-specific",
        "--grouping",
        "none",
        says=["leaves no prompts"],
        script="mmap",
    )
    refused("--data", tree, "--shots", 2, "--grouping", "colour", says=["colour"], script="mmap")


@pytest.mark.parametrize(
    "words, says",
    [
        ("--source 3 7", "3 x 7 does not divide"),
        ("--source 3 7 --no-specific", "3 x 7 does not divide"),
        ("--source 3 7 --prompt joint", "3 x 7 does not divide"),
        ("--source 4 32 --prompt joint --grouping all", "--source has no effect"),
        ("--groups 3 --grouping all", "--groups 3 is not for --grouping all"),
    ],
)
def test_a_source_prompt_or_groups_that_cannot_be(refused, tree, words, says):
    refused("--data", tree, "--shots", 2, "--clip", "tiny", *words.split(), says=[says],
            script="mmap")


def test_a_switch_that_was_turned_off_may_be_said_again(tmp_path):
    """As `--no-specific --resume` of a run of `--no-specific`; the other way is a contradiction."""
    mmap, out = common.load_method("mmap"), str(tmp_path / "run")
    args = common.parse(mmap.Args, "", ["--no-specific", "--out", out])
    (tmp_path / "run").mkdir()
    saved = json.dumps(dict(vars(args), method="mmap"))
    (tmp_path / "run" / "settings.json").write_text(saved)
    for words in ([], ["--no-specific"]):
        assert not common.parse(mmap.Args, "", ["--resume", "--out", out, *words]).specific
    with pytest.raises(common.UserError, match="started with --no-specific, not with --spe"):
        common.parse(mmap.Args, "", ["--resume", "--out", out, "--specific"])


def test_prompts_may_be_scored_with_validation_off_in_so_many_words(method, finished):
    code, err, printed = method("--eval", finished / "prompts.pt", "--no-validate")
    assert code == 0 and not err and "average" in printed


@pytest.mark.parametrize("depth", [0, 7, -1])
def test_a_depth_that_the_backbone_does_not_have(refused, tree, depth):
    refused(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        "tiny",
        "--depth",
        depth,
        says=[f"--depth {depth}", "6 layers" if depth > 0 else "1 or more"],
        script="maple_mt",
    )


@pytest.mark.parametrize("script", WITH_IMAGE_PROMPTS)
def test_prompts_of_another_method_are_sent_to_their_own_script(refused, finished, script):
    refused(
        "--eval",
        finished / "prompts.pt",
        says=["prompts of coop_mt", "use coop_mt.py --eval"],
        script=script,
    )


@pytest.mark.parametrize("script", WITH_IMAGE_PROMPTS)
def test_prompts_of_another_backbone_are_refused(method, refused, tree, backbone, tmp_path, script):
    code, err, _ = method(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        backbone,
        "--epochs",
        1,
        "--n-ctx",
        2,
        "--out",
        tmp_path / "run",
        script=script,
    )
    assert code == 0, err
    refused(
        "--eval",
        tmp_path / "run" / "prompts.pt",
        "--clip",
        "tiny",
        says=["started with --clip", "not with --clip tiny"],
        script=script,
    )
    saved = torch.load(tmp_path / "run" / "prompts.pt", weights_only=True)
    saved["settings"]["clip"] = "tiny"
    torch.save(saved, tmp_path / "run" / "prompts.pt")
    refused(
        "--eval", tmp_path / "run" / "prompts.pt", says=["prompts.pt", "do not fit"], script=script
    )


def test_damaged_prompts_of_the_right_method_are_refused(method, refused, tree, backbone, tmp_path):
    run = tmp_path / "run"
    code, err, _ = method(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        backbone,
        "--epochs",
        1,
        "--n-ctx",
        2,
        "--out",
        run,
        script="mmap",
    )
    assert code == 0, err
    saved = torch.load(run / "prompts.pt", weights_only=True)
    for damaged in ({}, {"group_of": 1}, {**saved["prompts"][1], "group_of": None}):
        torch.save(dict(saved, prompts={1: damaged}), run / "prompts.pt")
        refused("--eval", run / "prompts.pt", says=["prompts.pt", "do not fit"], script="mmap")


def test_a_training_that_diverges_says_so(method, tree, tmp_path):
    code, err, out = method(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        "tiny",
        "--epochs",
        3,
        "--lr",
        1e30,
        "--out",
        tmp_path / "run",
    )
    assert code == 2 and "diverged" in err and "--lr" in err and err.count("\n") == 1


def test_words_of_hipro_and_of_surgery_that_cannot_be(refused, tree):
    refused(
        "--data",
        tree,
        "--shots",
        2,
        "--grouping",
        "forest",
        says=["forest", "tree"],
        script="hipro",
    )
    refused("--data", tree, "--shots", 2, "--surgery", "scalpel", says=["scalpel", "pcgrad"])
    refused(
        "--data",
        tree,
        "--shots",
        2,
        "--surgery",
        "imtl",
        "--single-task",
        says=["--surgery", "--single-task"],
    )
    refused(
        "--data",
        tree,
        "--shots",
        2,
        "--clip",
        "tiny",
        "--n-ctx",
        75,
        says=["75 context vectors", "77 text positions"],
        script="hipro",
    )


def test_data_that_changed_since_the_checkpoint_is_noticed(refused, stopped):
    shapes = json.loads((stopped / "settings.json").read_text())["data"]
    image = next(Path(shapes).rglob("*.png"))
    kept = image.read_bytes()
    image.unlink()
    try:
        refused("--resume", "--out", stopped, says=["checkpoint.pt", "does not fit the data"])
    finally:
        image.write_bytes(kept)


@pytest.mark.parametrize(
    "script, words",
    [
        ("hipro", []),
        ("mmap", []),
        ("mvlpt", []),
        ("jscpt", []),
        ("coop_mt", ["--single-task"]),
        ("vpt_mt", ["--single-task"]),
        ("maple_mt", ["--single-task"]),
        ("coop_mt", []),
        ("vpt_mt", []),
    ],
)
def test_prompts_of_tasks_are_not_scored_on_others_or_in_another_order(
    method, refused, tmp_path, backbone, script, words
):
    one, two = (make_tree(tmp_path / d, {c: 5 for c in CLASSES}) for d in ("one", "two"))
    run = tmp_path / "run"
    code, err, _ = method(
        "--data",
        f"a={one},b={two}",
        "--shots",
        2,
        "--clip",
        backbone,
        "--epochs",
        1,
        "--n-ctx",
        2,
        "--out",
        run,
        *words,
        script=script,
    )
    assert code == 0, err
    for data in (f"b={two},a={one}", f"a={one},c={two}"):
        if words or script not in ("coop_mt", "vpt_mt"):
            refused(
                "--eval",
                run / "prompts.pt",
                "--data",
                data,
                says=["prompts.pt", "of other tasks", "--data"],
                script=script,
            )
        elif "c=" in data:  # under another name it has another split
            refused(
                "--eval",
                run / "prompts.pt",
                "--data",
                data,
                script=script,
                says=["were trained on", "of c's 9 test images", "--shots"],
            )
        else:  # a prompt that all tasks share serves others, too
            assert method("--eval", run / "prompts.pt", "--data", data, script=script)[0] == 0


# ------------------------------------------------------------------------------------------ leaks
# and paths


@pytest.mark.parametrize("words", [["--split", 0.2], ["--shots", 1], ["--seeds", 2]], ids=str)
def test_prompts_are_not_scored_on_images_that_they_were_trained_on(refused, finished, words):
    """Another split or seed tests on other images; a seed that was not trained is refused first."""
    says = (
        ["seeds 1, not of 2"] if "--seeds" in words else ["seed 1) were trained on", "test images"]
    )
    refused("--eval", finished / "prompts.pt", *words, says=says)


def test_a_renamed_image_is_noticed_when_a_run_goes_on(refused, method, tree, tmp_path, small_run):
    """As many images, another split."""
    out = tmp_path / "run"
    assert method("--data", tree, *small_run, "--out", out)[0] == 0
    (out / "result.json").unlink()
    (tree / "drawn" / "cup" / "000.png").rename(tree / "drawn" / "cup" / "zzz.png")
    refused("--resume", "--out", out, says=["does not fit the data as it is now", "another --out"])


def test_a_renamed_image_is_noticed_in_the_middle_of_a_seed(
    method, tree, tmp_path, small_run, monkeypatch
):
    """Only a phase has been saved."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save_prompts", lambda *_: [][0])
        with pytest.raises(IndexError):
            method("--data", tree, *small_run, "--out", out)
    [phase] = out.glob("checkpoint-*.pt")
    assert not (out / "checkpoint.pt").exists()
    (tree / "drawn" / "cup" / "000.png").rename(tree / "drawn" / "cup" / "zzz.png")
    code, err, printed = method("--resume", "--out", out)
    check_line(code, err, printed, [phase, "does not fit the data as it is now", "another --out"])
    (tree / "drawn" / "cup" / "zzz.png").rename(tree / "drawn" / "cup" / "000.png")
    code, err, _ = method("--resume", "--out", out)
    assert code == 0, err


def test_a_worker_that_dies_in_a_run_names_the_flag_that_works_without(
    method, tree, tmp_path, small_run, monkeypatch
):
    read = common.Images.__getitem__

    def die(images, index):
        if torch.utils.data.get_worker_info():
            os._exit(1)
        return read(images, index)

    monkeypatch.setattr(common.Images, "__getitem__", die)
    out = tmp_path / "run"
    code, err, printed = method("--data", tree, *small_run, "--workers", 1, "--out", out)
    check_line(code, err, printed, ["died", "give --workers 0"])
    code, err, _ = method("--resume", "--out", out, "--workers", 0)
    assert code == 0, err


def test_saved_paths_are_absolute_and_a_run_is_scored_from_anywhere(
    method, tree, tmp_path, small_run, backbone, monkeypatch
):
    shutil.copy(backbone, tmp_path / "my.pt")
    words = ["--clip" if word == "--clip" else word for word in small_run]
    words[words.index("--clip") + 1] = "my.pt"
    code, err, _ = method("--data", tree.name, *words, "--out", "run")
    assert code == 0, err
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert saved["clip"] == str(tmp_path / "my.pt") and saved["data"] == str(tree)
    assert saved["out"] == str(tmp_path / "run") and saved["root"] == str(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, err, _ = method("--eval", "../run/prompts.pt")
    assert code == 0, err


def test_a_home_folder_is_expanded_in_out_however_it_is_given(
    method, tree, tmp_path, small_run, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, err, _ = method("--data", tree, *small_run, "--out=~/x")
    assert code == 0, err
    assert (tmp_path / "home" / "x" / "result.json").exists() and not (tmp_path / "~").exists()


def test_an_update_that_explodes_after_the_last_loss_is_refused(
    refused, tree, small_run, monkeypatch, method, tmp_path
):
    kept = common.sgd

    def exploding(args, prompts, *more):
        optimizer, schedule = kept(args, prompts, *more)
        step = optimizer.step

        def spoilt(*words):
            step(*words)
            prompts.vectors.data[0] = float("nan")

        optimizer.step = spoilt
        return optimizer, schedule

    monkeypatch.setattr(common, "sgd", exploding)
    code, err, out = method(
        "--data", tree, *small_run, "--out", tmp_path / "run", "--batch-size", 90
    )
    assert code == 2 and "a parameter is no longer finite" in err and "--lr" in err
    assert not (tmp_path / "run" / "result.json").exists()


def test_names_that_a_terminal_cannot_show_and_a_pipe_that_closes_early(tree, tmp_path, small_run):
    """As a process: ASCII output, and `| head -1`."""
    (tree / "drawn").rename(tree / "gezeichnet \u00fc")
    words = [
        sys.executable,
        "-P",
        str(ROOT / "coop_mt.py"),
        "--data",
        str(tree),
        *map(str, small_run),
    ]
    environment = dict(
        os.environ, PYTHONIOENCODING="ascii", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT)
    )
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "a")], capture_output=True, env=environment
    )
    assert done.returncode == 0 and b"gezeichnet ?" in done.stdout, done.stderr
    line = " ".join(f"'{word}'" for word in [*words, "--out", str(tmp_path / "b")])
    piped = subprocess.run(
        ["bash", "-c", f"{line} | head -1"], capture_output=True, env=environment
    )
    assert piped.returncode == 0 and b"Traceback" not in piped.stderr, piped.stderr
