"""User mistakes: one line on stderr with the cause and the remedy, exit code 2, and nothing written
or lost."""

import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import RESNET, ROOT, TINY, Trap, edit, make_tree, noise, random_clip, run_script

import common

COOP, MMAP = (common.load_method(name).METHOD for name in ("coop_mt", "mmap"))
CLASSES = ("Red_Ball", "cup", "hat")
SHAPES = {f"{domain}/{name}": 5 for domain in ("drawn", "painted") for name in CLASSES}
# Python does not show the ignored ones by default
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning", "ignore::PendingDeprecationWarning",
    "ignore::ImportWarning", "ignore::ResourceWarning")

# the flags of the smallest training run
SMALL = "--data shapes --clip random.pt --shots 2 --epochs 1 --n-ctx 2 --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which the table's commands run, with all files that they name."""
    place, few = tmp_path_factory.mktemp("place"), dict.fromkeys(SHAPES, 2)
    torch.save(random_clip(**TINY).state_dict(), place / "random.pt")
    torch.save(random_clip(**RESNET).state_dict(), place / "resnet.pt")
    (place / "notes.txt").write_text("a list")
    (place / "empty").mkdir()
    for tree, layout in {
        "shapes": SHAPES,
        "deep/er/shapes": few,
        "gap": few,
        "hole": dict(few, **{"painted/cup": 0}),
        "lone": dict(few, **{"painted/Red_Ball": 1}),
        "sock": dict(few, **{"drawn/sock": 2}),
        "one class": {"drawn/cup": 2, "painted/cup": 2},
        "72 words": {f"drawn/{' '.join('ab' * 36)}": 2, "drawn/cup": 2},
        "90 words": {f"drawn/{' '.join('ab' * 45)}": 2, "drawn/cup": 2},
        "spoilt": few,
        "partly": {"Art/Bed": 2, "Clipart/Bed": 2},
        "inside/office_home": {"Art/Bed": 2},
    }.items():
        make_tree(place / tree, layout)
    (place / "gap" / "traced").mkdir()
    (place / "hole" / "painted" / "cup" / "notes.txt").write_text("a list")
    for image in (place / "spoilt" / "painted" / "cup").iterdir():
        image.write_bytes(image.read_bytes()[:-300])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for method, more in ((COOP, "run"), (COOP, "alone --single-task"), (MMAP, "grouped")):
            common.main(method, f"{SMALL} --out {more}".split())
        patch.setattr(common.Run, "interrupted", True)          # Ctrl-C in the first of two epochs
        with pytest.raises(KeyboardInterrupt):
            common.main(COOP, f"{SMALL} --epochs 2 --out stopped".split())
    return place


@pytest.fixture
def refused(here, tmp_path_factory, monkeypatch):
    """Check that a command in a folder is rejected with one line that has all parts of `says` in
    order, and that nothing changes."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))

    def call(folder, script, words, says):
        monkeypatch.chdir(folder)
        before = contents(folder)
        code, out, err = here(f"{script}.py", *shlex.split(words))
        is_refusal(script, code, out, err, says)
        assert contents(folder) == before

    return call


def is_refusal(script, code, out, err, says):
    """One line, or tyro's box if it rejects a flag or its value, and exit code 2."""
    out = re.sub("^.* tasks?, .* -> .*\n(.*: epoch .*\n)*", "", out)        # a run that has started
    assert code == 2 and not out and "Traceback" not in err, err
    if "For full helptext" in err:
        assert f"{script}.py" in err
        err = " ".join(err.translate(str.maketrans("", "", "│╭╮╰╯─")).split())
    else:
        assert err.startswith(f"{script}.py: ") and err.endswith("\n") and err[:-1].isprintable()
    assert re.search(".*".join(map(re.escape, says.split(" ... "))), err), err


def contents(folder):
    """The contents of a folder's files; for a backbone, its size."""
    sizes = {path: path.stat().st_size for path in folder.rglob("*")}
    return {path: path.read_bytes() if path.is_file() and size < 10**6 else size
            for path, size in sizes.items()}


# script, flags, what the line says
DATA = [
    ("coop_mt", "--data officehom --split 0.1", "--data officehom ... did you mean 'officehome'?"),
    ("coop_mt", "--data emojy", "--data emojy ... did you mean 'emoji'?"),
    ("coop_mt", "--data PACS", "--data PACS ... did you mean 'pacs'?"),
    ("coop_mt", "--data zzz --split 0.1", "--data zzz ... emoji, emoji24, officehome, pacs"),
    ("coop_mt", "--data officehome --split 0.1", "there is no folder ... data ... --root"),
    ("coop_mt", "--data officehome --split 0.1 --root no", "there is no folder ... no ... --root"),
    ("coop_mt", "--data things=no --split 0.1", "there is no folder ... no ... --data"),
    *[("coop_mt", f"--data officehome --split 0.1 --root {root}",
       "Art, Clipart, Product, Real World ... OfficeHomeDataset_10072016 ... --root")
      for root in ("empty", "partly", "inside")],
    *[("coop_mt", f"{words} --split 0.1", "notes.txt is a file ... folder") for words in
      ("--data notes.txt", "--data things=notes.txt", "--data officehome --root notes.txt")],
    ("coop_mt", "--data deep/er --split 0.4", "too high ... try ... er/shapes"),
    ("coop_mt", "--data deep --split 0.4", "too high ... try"),
    ("coop_mt", "--data shapes/drawn --split 0.4", "domain/class/*.jpg ... one level up ... name="),
    ("coop_mt", "--data shapes/drawn/cup --split 0.4", "domain/class/*.jpg ... two levels up"),
    ("coop_mt", "--data x=shapes --split 0.4", "too high ... class/*.jpg"),
    ("coop_mt", "--data x=shapes/drawn/cup --split 0.4", "one level up ... class/*.jpg"),
    ("coop_mt", "--data hole --split 0.4", "painted/cup holds no images ... add some or remove it"),
    ("coop_mt", "--data gap --split 0.4", "gap/traced holds no images"),
    ("coop_mt", "--data empty --split 0.4", "empty holds no images ... domain/class/*.jpg"),
    ("coop_mt", "--data sock --split 0.5", "class 'sock' ... drawn ... not in painted ... name="),
    ("coop_mt", "--data shapes --split 1", "drawn ... none to test on ... smaller --split"),
    ("coop_mt", "--data shapes --split 0.95", "drawn ... none to test on ... smaller --split"),
    ("coop_mt", "--data lone --shots 1", "'red ball' of painted has 1 image ... add images"),
    *[("coop_mt", f"--data {data} --split 0.4", f"two tasks are called '{name}' ... name=path")
      for data, name in (("shapes,shapes", "drawn"), ("a=shapes/drawn,a=shapes/painted", "a"),
                         ("drawn=shapes/drawn,shapes", "drawn"), ("emoji,emoji", "Noto"))],
    ("coop_mt", "--data shapes", "shapes needs --split, such as --split 0.1 ... --shots 4"),
    ("coop_mt", f"{SMALL} --data spoilt --shots 1", "painted/cup/ ... cannot be decoded"),
    ("coop_mt", f"{SMALL} --shots 1 --data '90 words'", "a b a b ... 77 text positions: give the"),
    # these fit after two context vectors, but not after zero-shot CLIP's "a photo of a"
    ("coop_mt", f"{SMALL} --shots 1 --data '72 words'", "'a photo of a a b ... give the class a"),
    ("coop_mt", f"{SMALL} --data 'one class' --shots 1 --validate", "--validate finds no image of"),
    ("common", "probe --data 'one class' --shots 1", "drawn has fewer than 2 classes"),
    ("common", "check --data x=no", "there is no folder ... no"),
    ("common", "check", "--data"),
]
NUMBERS = [
    *[("coop_mt", f"--data cifar100 --download {words}", says) for words, says in (
        ("--split 5", "--split 5.0 ... up to 1"), ("--shots 0", "--shots 0 ... give 1 or more"),
        ("--split 0.1 --shots 4", "--split and --shots ... give one of them"))],
    *[("coop_mt", f"--split={split}", f"--split {float(split)} ... above 0 and up to 1")
      for split in ("0", "-0.1", "1.5", "nan", "inf")],
    ("coop_mt", "--split 0.1 --shots 4", "--split and --shots ... give one of them"),
    ("coop_mt", "--shots 0", "--shots 0 ... give 1 or more"),
    *[("coop_mt", f"{flag}={n}", f"{flag} must be at least 1, not {n}")
      for flag in ("--epochs", "--batch-size", "--n-ctx") for n in (0, -3)],
    ("coop_mt", "--views=-1", "--views must be at least 0, not -1"),
    ("coop_mt", "--warm-up 2 --epochs 2", "--warm-up must be below --epochs 2, not 2"),
    ("coop_mt", "--workers=-1", "--workers must be at least 0, not -1"),
    *[("coop_mt", f"--lr={rate}", f"--lr must be above 0, not {float(rate)}")
      for rate in ("0", "-0.1", "nan", "inf")],
    *[("coop_mt", f"--min-crop={part}", f"must be above 0 and at most 1, not {float(part)}")
      for part in ("0", "-1", "1.5", "nan", "inf")],
    *[("coop_mt", f"--seeds {seeds}", f"--seeds must be distinct integers ... not {seeds}")
      for seeds in ("1 1", "3 1 3", "-1", "1 -2", "4294967296")],
    *[("coop_mt", f"{flag} '{word}'", f"{flag} ... '{word}' ... --help") for flag, word in
      (("--epochs", "many"), ("--seeds", "2.5"), ("--shots", ""), ("--lr", "fast"))],
    # [SOS] red ball . [EOS] takes 5 of the 77
    *[("coop_mt", f"{SMALL} --n-ctx {n}", f"{n} context vectors and 'red ball' ... at most 72")
      for n in (77, 500)],
    ("maple_mt", f"{SMALL} --n-ctx 74", "74 context vectors ... 77 text positions"),
    ("hipro", f"{SMALL} --n-ctx 75", "75 context vectors ... 77 text positions"),
    ("mmap", f"{SMALL} --n-ctx 40", "80 context vectors ... 77 text positions"),
    ("jscpt", f"{SMALL} --n-ctx 40", "80 context vectors ... 77 text positions"),
]
FLAGS = [
    ("coop_mt", "--precision fp8", "'fp8' for argument '--precision'. Expected ... 'bf16'"),
    ("coop_mt", "--surgery scalpel", "'--surgery'. Expected ... 'pcgrad', 'imtl', 'cagrad'"),
    ("mmap", "--grouping colour", "'--grouping'. Expected ... 'gradient', 'random', 'all'"),
    ("hipro", "--grouping forest", "'--grouping'. Expected ... 'tree', 'shared+individual'"),
    ("common", "finetune --train biases", "'--train'. Expected one of ('all', 'bias', 'adapter')"),
    *[("coop_mt", words, f"Unrecognized options: {words.split()[0]}") for words in
      ("--epoch 3", "emoji", "--checkpoint")],
    ("common", "finetune --n-ctx 4", "Unrecognized options: --n-ctx"),
    ("common", "probe --epochs 4", "Unrecognized options: --epochs"),
    ("common", "zero-shot --lr 1", "Unrecognized options: --lr"),
    ("coop_mt", "--data", "--data"),
    ("coop_mt", "--clip ViT-B/61", "unknown backbone 'ViT-B/61' (did you mean 'ViT-B/16'?)"),
    ("coop_mt", "--clip RN5", "unknown backbone 'RN5' (did you mean 'RN50'?)"),
    ("coop_mt", "--clip Tiny", "'Tiny' (did you mean 'tiny'?) ... ViT-L/14 ... path of a file"),
    ("coop_mt", "--clip lost.pt", "unknown backbone 'lost.pt' ... path of a file"),
    ("coop_mt", "--clip empty", "unknown backbone 'empty'"),
    ("common", "zero-shot --clip ViT", "unknown backbone 'ViT'"),
    *[("coop_mt", f"--device '{device}'", f"--device {device} ... use --device cpu")
      for device in ("warp", "meta", "cuda:99")],
    *[(script, f"--data shapes --shots 2 --clip {clip}", f"{clip} has a ResNet ... ViT-B/16")
      for script in ("vpt_mt", "maple_mt", "mmap", "jscpt") for clip in ("RN50", "resnet.pt")],
    *[("coop_mt", f"{SMALL} {flag} {'x' * 300}", "x" * 300)
      for flag in ("--data", "--clip", "--eval", "--out")],
    ("coop_mt", f"--data officehome --split 0.1 --root {'x' * 300}", "x" * 300),
    ("common", "", "usage: python common.py check|zero-shot"),
    ("common", "tabel", "unknown command 'tabel' (did you mean 'table'?)"),
]
METHODS = [
    ("coop_mt", "--surgery imtl --single-task", "--surgery ... --single-task ... leave one"),
    ("coop_mt", "--conditional", "--conditional ... add --single-task"),
    ("coop_mt", "--proda 4", "--proda ... add --single-task"),
    ("coop_mt", "--proda 1 --single-task", "--proda must be at least 2, not 1"),
    ("coop_mt", "--conditional --proda 2 --single-task", "leave one of them out"),
    ("coop_mt", "--conditional --single-task --views 2", "leave out --views"),
    ("coop_mt", "--conditional --single-task --surgery imtl", "leave one of them out"),
    ("maple_mt", "--depth 0", "--depth must be at least 1, not 0"),
    ("maple_mt", f"{SMALL} --depth 4", "--depth 4 does not fit the 3 layers ... give 1 to 3"),
    ("mmap", "--groups 0", "--groups must be at least 1, not 0"),
    ("mmap", f"{SMALL} --groups 3", "--groups 3 is more than the 2 tasks"),
    ("mmap", "--groups 3 --grouping all", "--groups 3 has no effect with --grouping all"),
    ("mmap", "--no-specific --grouping none", "leaves no prompts: leave one of them out"),
    *[("mmap", f"{SMALL} --source-shape 3 7 {more}", "--source-shape: ... 3 x 7 does not divide")
      for more in ("", "--no-specific", "--prompt joint")],
    ("mmap", "--source-shape 4 32 --prompt joint --grouping all", "--source-shape has no effect"),
    ("hipro", f"{SMALL} --grouping tag-groups --groups 3", "--groups 3 is more than the 2 tasks"),
    ("hipro", "--grouping tag-groups --groups 0", "--groups must be at least 1, not 0"),
    ("hipro", "--groups 3", "--groups 3 is for --grouping tag-groups"),
    ("jscpt", "--upper-every 0", "--upper-every must be at least 1, not 0"),
    ("jscpt", "--terms=-1", "--terms must be at least 0, not -1"),
    ("jscpt", "--upper-lr 0", "--upper-lr must be above 0, not 0.0"),
    ("jscpt", "--upper-lr nan", "--upper-lr must be above 0, not nan"),
    ("jscpt", "--scale=-1", "--scale must be above 0, not -1.0"),
    ("jscpt", "--dev-shots 0", "--dev-shots must be at least 1, not 0"),
    ("jscpt", "--cagrad --no-task-schedule", "--cagrad ... leave out --no-task-schedule"),
    ("common", "finetune --ratio 0.5", "--ratio are for --train adapter"),
    ("common", "finetune --train bias --adapters shared", "--adapters ... are for --train adapter"),
    ("common", "finetune --train adapter --ratio 0", "--ratio must be above 0 and at most 1"),
    ("common", "finetune --schedule constant", "--schedule is for --train bias and adapter"),
    ("common", "finetune --train adapter --adapters shared --single-task", "leave one of them out"),
]
RUNS = [
    ("coop_mt", "--resume", "--resume needs --out"),
    ("coop_mt", "--resume --out run --eval run/prompts.pt", "give one of them"),
    *[("coop_mt", f"--resume --out {out}", f"no run in ... {out} ... leave out --resume")
      for out in ("no", "empty", "notes.txt", "notes.txt/run")],
    *[("coop_mt", f"--resume --out stopped {words}", f"stopped was started with ... not "
       f"with {words} ... leave the flag out ... another --out") for words in
      ("--epochs 9", "--lr 0.5", "--seeds 2", "--seeds 1 2", "--clip tiny", "--n-ctx 3",
       "--shots 4", "--views 1", "--data emoji")],
    ("coop_mt", "--resume --out stopped --split 0.2", "without --split, not with --split 0.2"),
    ("coop_mt", "--resume --out stopped --single-task", "without --single-task, not with --sing"),
    ("coop_mt", "--resume --out stopped --epochs 0", "--epochs must be at least 1, not 0"),
    ("mmap", "--resume --out stopped", "stopped belongs to coop_mt: use coop_mt.py"),
    ("mmap", "--resume --out grouped --no-specific", "with --specific, not with --no-specific"),
    ("coop_mt", f"{SMALL} --out run", "--out ... run holds another run ... --resume to continue"),
    ("coop_mt", f"{SMALL} --out stopped", "stopped holds another run ... choose another folder"),
    ("common", "zero-shot --out run", "run holds another run"),
    *[("coop_mt", f"{SMALL} --out {out}", f"{out} cannot be written ... notes.txt is a file")
      for out in ("notes.txt", "notes.txt/run", "notes.txt/deeper/run")],
    ("common", "zero-shot --out notes.txt/run", "notes.txt is a file or read-only"),
    ("coop_mt", "--eval no.pt", "no.pt ... No such file ... give the prompts.pt"),
    ("coop_mt", "--eval run", "run is a folder: give a run's prompts.pt, such as"),
    ("coop_mt", "--eval stopped/checkpoint.pt", "checkpoint.pt cannot be used"),
    ("coop_mt", "--eval run/prompts.pt --clip ViT-B/16", "not with --clip ViT-B/16: leave the"),
    ("coop_mt", "--eval run/prompts.pt --clip tiny", "random.pt, not with --clip tiny: leave the"),
    ("coop_mt", "--eval run/prompts.pt --seeds 1 5", "prompts of the seeds 1, not of 5"),
    ("coop_mt", "--eval run/prompts.pt --n-ctx 3", "with --n-ctx 2, not with --n-ctx 3"),
    ("coop_mt", "--eval run/prompts.pt --single-task", "without --single-task, not with --single"),
    *[(script, "--eval run/prompts.pt", "holds prompts of coop_mt ... use coop_mt.py --eval")
      for script in ("vpt_mt", "maple_mt", "mmap", "hipro", "jscpt")],
    ("common", "finetune --eval run/prompts.pt", "holds prompts of coop_mt, not of finetune"),
    # test images other than those of the training run
    ("coop_mt", "--eval run/prompts.pt --split 0.2", "(seed 1) were trained on ... test images"),
    ("coop_mt", "--eval run/prompts.pt --shots 1", "(seed 1) were trained on ... test images"),
    ("coop_mt", "--eval run/prompts.pt --data a=shapes/drawn", "trained on ... test images of a"),
    # tied to their tasks
    *[(script, f"--eval {run}/prompts.pt --data {data}", "of other tasks ... or in another order")
      for script, run in (("mmap", "grouped"), ("coop_mt", "alone")) for data in
      ("drawn=shapes/drawn", "painted=shapes/painted,drawn=shapes/drawn")],
    ("common", "predict run/prompts.pt shapes/drawn/cup/000.png", "2 tasks ... --task: drawn, p"),
    ("common", "predict run/prompts.pt x.png --task paint", "no task 'paint' (did you mean 'paint"),
    ("common", "predict run/prompts.pt x.png --task drawn", "there is no image ... x.png"),
    ("common", "predict run/prompts.pt notes.txt --task drawn", "notes.txt cannot be decoded"),
    ("common", "predict no.pt notes.txt", "no.pt ... No such file"),
    ("common", "table no", "there is no folder ... no: give the folder of a run"),
    ("common", "table empty", "no finished run on test images in empty"),
    ("common", "table stopped", "no finished run on test images in stopped"),
    ("common", "table run --plot", "--plot needs --out"),
    ("common", "table run --baseline mmap", "'mmap' is not a column: give one of 'zero-shot', 'C"),
    ("common", "table run --out notes.txt", "notes.txt is a file or read-only"),
]
MVLPT = [("mvlpt", f"{SMALL} --prompt coop {words}", says) for words, says in (
    ("--group-size 3", "--group-size 3 is more than the 2 tasks"),
    ("--group-size 0", "--group-size must be at least 1"),
    ("--group-size many", "--group-size"),
    ("--grouping worst", "--grouping worst chooses partners, but --group-size 1 of 2 tasks"),
    ("--group-size all --transfer x.json", "x.json chooses partners, but --group-size all"),
    ("--group-size best --transfer x.json", "leaves no choice: leave it out"),
    ("--adapt-epochs=-1", "--adapt-epochs must be at least 0"),
    ("--adapt-epochs 0 --source none", "--adapt-epochs 0 leaves only the source prompt"),
    ("--adapt-epochs 0 --group-size 2", "--adapt-epochs 0 leaves only the source prompt"),
    *[(f"--transferability {more}", "--transferability trains a prompt on each task")
      for more in ("--group-size 2", "--source emoji", "--init x.pt", "--grouping worst")],
    ("--source emoji --init x.pt", "--init provides the source prompt that --source would train"),
    ("--source emojy", "did you mean 'emoji'"),
    ("--heads 2", "--heads, --layers and --width are for --prompt upt, not coop"),
    ("--prompt upt --heads 3", "--width 128 is not a multiple of --heads 3"),
    ("--prompt upt --layers 0", "--layers must be at least 1"),
    ("--prompt tpu", "'--prompt'. Expected one of ('coop', 'vpt', 'upt')"),
    ("--n-ctx 75", "75 context vectors"),
    *[(f"--prompt {kind} --clip RN50", "RN50 has a ResNet ... ViT-B/16") for kind in ("vpt", "upt")]
)]
TABLE = DATA + NUMBERS + FLAGS + METHODS + RUNS + MVLPT


@pytest.mark.parametrize("script, words, says", TABLE, ids=[row[1][-60:] for row in TABLE])
def test_a_mistake_gives_one_line_and_changes_nothing(script, words, says, place, refused):
    refused(place, script, words, says)


@pytest.mark.parametrize("script, words, says", [
    ("mmap", "--grouping colour", "'--grouping'. Expected one of"),
    ("common", "finetune --ratio 0.5 --out run", "--ratio are for --train adapter")])
def test_a_mistake_gives_one_line_in_a_separate_process(script, words, says, tmp_path):
    done = run_script(f"{script}.py", *words.split(), cwd=tmp_path)
    is_refusal(script, done.returncode, done.stdout, done.stderr, says)
    assert not contents(tmp_path)


# -------------------------------------------------------------------------------- damaged files


def torch_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


KINDS = {
    "truncated": lambda good: good[:len(good) // 2],
    "cut by a byte": lambda good: good[:-3],
    "empty": lambda good: b"",
    "a picture": lambda good: picture(),
    "another dict": lambda good: torch_file({"weights": torch.zeros(3)}),
    "a malicious pickle": lambda good: pickle.dumps(Trap()),
    "a malicious archive": lambda good: torch_file(dict(method="coop_mt", prompts=Trap())),
}


def picture():
    buffer = io.BytesIO()
    noise(1).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind, load", [
    ("a malicious pickle", pickle.load),
    ("a malicious archive", lambda file: torch.load(file, weights_only=False))])
def test_the_trap_of_the_next_tests_works(kind, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(io.BytesIO(KINDS[kind](b"")))
    assert (tmp_path / "trap").exists()


READ_BY = pytest.mark.parametrize("file, script, words", [
    ("stopped/settings.json", "coop_mt", "--resume --out stopped"),
    ("stopped/checkpoint.pt", "coop_mt", "--resume --out stopped"),
    ("stopped/finished.pt", "coop_mt", "--resume --out stopped"),
    ("run/prompts.pt", "coop_mt", "--eval run/prompts.pt"),
    ("run/prompts.pt", "common", "predict run/prompts.pt x.png --task drawn"),
    ("run/result.json", "coop_mt", "--resume --out run"),
    ("run/result.json", "common", "table run")])
UNUSABLE = "cannot be used, it is damaged or not the expected kind"


@pytest.fixture
def runs(place, tmp_path):
    """Copies of a finished and a stopped run, and an image, in tmp_path."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "stopped", tmp_path / "stopped")
    noise(1).save(tmp_path / "x.png")
    return tmp_path


@READ_BY
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_and_runs_no_code(file, script, words, kind, runs, refused):
    (runs / file).write_bytes(KINDS[kind]((runs / file).read_bytes()))
    refused(runs, script, words, f"{file.removesuffix('settings.json')} ... {UNUSABLE}")


@READ_BY
def test_a_file_with_values_of_another_shape_is_named(file, script, words, runs, here, monkeypatch):
    """A saved prompt with another width, settings and results with other types."""
    monkeypatch.chdir(runs)
    path, wrong = runs / file, {"vectors": torch.zeros(1, 2, 5)}
    if path.suffix == ".json":
        saved = json.loads(path.read_text())
        path.write_text(json.dumps(dict(saved, lr="fast", accuracy={})))
    else:
        saved = torch.load(path, weights_only=True)
        changes = dict(prompts={1: wrong}, parts=dict(saved.get("parts", {}), prompts=wrong),
                       phases={"train": dict(seconds=1.0, parts=dict(prompts=wrong))})
        torch.save(dict(saved, **changes), path)
    code, out, err = here(f"{script}.py", *words.split())
    is_refusal(script, code, out, err, f"{file.removesuffix('/settings.json')} {UNUSABLE}")


@pytest.mark.parametrize("key, value", [
    ("seeds", None), ("views", []), ("precision", "fp8"), ("surgery", 3), ("epochs", 2.5)])
def test_a_saved_setting_that_no_flag_accepts_is_named(key, value, runs, refused):
    path = runs / "stopped" / "settings.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **{key: value})))
    refused(runs, "coop_mt", "--resume --out stopped", f"stopped {UNUSABLE} ... {key}")


def test_an_error_while_plotting_is_not_a_damaged_file(runs, here, monkeypatch):
    line = f"coop_mt.py --resume --plot --out {runs}/run"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="^a fault$"):
        patch.setattr(common, "plot_run", mock.Mock(side_effect=ValueError("a fault")))
        here(line)
    assert here(line)[0] == 0 and (runs / "run" / "accuracy.png").exists()


@pytest.mark.parametrize("key", ["trained_on", "contents"])
@pytest.mark.parametrize("seen", [{}, {1: None}, {1: 1}], ids=str)
def test_prompts_that_do_not_say_what_they_were_trained_on_are_not_scored(key, seen, runs, refused):
    path = runs / "run" / "prompts.pt"
    torch.save(dict(torch.load(path, weights_only=True), **{key: seen}), path)
    refused(runs, "coop_mt", "--eval run/prompts.pt", f"prompts.pt {UNUSABLE}")


@pytest.mark.parametrize("kind", [*KINDS, "another family"])
def test_a_backbone_that_is_not_a_clip_is_named_and_runs_no_code(kind, place, tmp_path, refused):
    good = torch.load(place / "random.pt", weights_only=True)
    content = torch_file({f"encoder.{name}": value for name, value in good.items()})
    if kind in KINDS:
        content = KINDS[kind]((place / "random.pt").read_bytes())
    (tmp_path / "backbone.pt").write_bytes(content)
    refused(tmp_path, "coop_mt", f"{SMALL} --data {place}/shapes --clip backbone.pt",
            "backbone.pt is not a usable CLIP checkpoint ... give a TorchScript archive")


@pytest.mark.parametrize("script, words", [
    ("coop_mt", "--resume --out stopped"), ("coop_mt", "--eval run/prompts.pt"),
    ("common", "predict run/prompts.pt x.png --task drawn")])
def test_a_backbone_that_has_moved_is_recognised_by_its_content(script, words, place, runs, here,
                                                                refused):
    edit(runs / "stopped" / "settings.json", lambda settings: settings.update(clip="/gone.pt"))
    saved = torch.load(runs / "run" / "prompts.pt", weights_only=True)
    saved["settings"]["clip"] = "/gone.pt"
    torch.save(saved, runs / "run" / "prompts.pt")
    good = torch.load(place / "random.pt", weights_only=True)
    torch.save(dict(good, logit_scale=good["logit_scale"] + 1), runs / "other.pt")
    shutil.copy(place / "random.pt", runs / "same.pt")
    refused(runs, script, f"{words} --clip other.pt", "other.pt is not the backbone that")
    assert here(f"{script}.py {words} --clip same.pt")[0] == 0


def test_no_file_that_a_prompts_pt_names_is_run(runs, refused):
    path = runs / "run" / "prompts.pt"
    (runs / "other.py").write_text("open('trap', 'w')")
    for name in (str(runs / "other"), os.path.relpath(runs / "other", ROOT), "common"):
        torch.save(dict(torch.load(path, weights_only=True), method=name), path)
        says = f"prompts.pt {UNUSABLE}" if name == "common" else "there is no method file"
        refused(runs, "common", "predict run/prompts.pt x.png --task drawn", says)
        refused(runs, "coop_mt", "--eval run/prompts.pt", says)


# --------------------------------------------------------------------- what a rejected run leaves


@pytest.mark.parametrize("name", [
    "settings.json", "result.json", "prompts.pt", "log.csv", "checkpoint.pt", "finished.pt",
    "accuracy.png", "tree-1.png", "result.json.part", "loss.png.part"])
def test_an_out_that_holds_any_file_of_a_run_is_left_as_it_is(name, place, tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("another's")
    says = f"run holds another run or figures ({name}) ... --resume"
    refused(tmp_path, "coop_mt", "--out run", says)


@pytest.mark.parametrize("name", ["table.csv", "table.md", "parameters.png", "table.md.part"])
def test_a_table_replaces_its_own_files_and_no_others(name, place, runs, here, refused):
    (runs / "out").mkdir()
    (runs / "out" / name).write_text("another's")
    refused(runs, "common", "table run --out out", f"did not write ({name}): choose another")
    (runs / "out" / name).unlink()
    for more in ("", "--plot"):
        assert here(f"common.py table run --out out {more}")[0] == 0
    assert (runs / "out" / "parameters.png").exists()


def test_one_of_two_runs_that_start_in_the_same_folder_is_rejected(place, tmp_path, monkeypatch):
    """The other run's settings appear between the check and the first write."""
    monkeypatch.chdir(place)
    out = tmp_path / "run"

    def late(args, tasks):
        if tasks:
            out.mkdir()
            (out / "settings.json").write_text("another's")

    with pytest.raises(common.UserError, match="another run, which has just started: choose"):
        common.main(replace(COOP, check=late), f"{SMALL} --out {out}".split())
    assert contents(out) == {out / "settings.json": b"another's"}


def test_an_undecodable_test_image_is_named_and_the_prompts_are_kept(place, tmp_path, here,
                                                                     monkeypatch):
    shutil.copytree(place / "shapes", tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    path = common.load_tasks("shapes", shots=2)[1].test.items[3]
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    words = f"{SMALL} --clip {place}/random.pt --out run"
    code, out, err = here("coop_mt.py", *words.split())
    is_refusal("coop_mt", code, out, err, f"{path} cannot be decoded ... replace it or remove it")
    assert (tmp_path / "run/prompts.pt").exists() and not (tmp_path / "run/result.json").exists()
    path.write_bytes(whole)
    for again in ("--eval run/prompts.pt", "--resume --out run"):
        code, out, err = here("coop_mt.py", *again.split())
        assert code == 0 and not err and "average" in out


def test_an_undecodable_image_of_the_second_seed_is_found_before_the_first_trains(
        place, tmp_path, refused):
    shutil.copytree(place / "shapes", tmp_path / "shapes")
    first, second = (common.load_tasks(str(tmp_path / "shapes"), shots=2, seed=seed)[0].train.items
                     for seed in (1, 2))
    path = next(path for path in second if path not in first)
    path.write_bytes(path.read_bytes()[:-30])
    words = f"{SMALL} --clip {place}/random.pt --seeds 1 2 --out run"
    refused(tmp_path, "coop_mt", words, f"{path} cannot be decoded")


def test_data_that_changed_since_a_run_was_stopped_is_noticed(place, tmp_path, here, refused,
                                                              monkeypatch):
    """A renamed image gives another split of the same size. The run resumes once it is back."""
    images = shutil.copytree(place / "shapes", tmp_path / "shapes") / "drawn" / "cup"
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "interrupted", True)
        common.main(COOP, f"{SMALL} --clip {place}/random.pt --epochs 2 --out run".split())
    (images / "000.png").rename(images / "zzz.png")
    says = "finished.pt does not match the data as it is now ... another --out"
    refused(tmp_path, "coop_mt", "--resume --out run", says)
    (images / "zzz.png").unlink()
    refused(tmp_path, "coop_mt", "--resume --out run", says)
    shutil.copy(place / "shapes" / "drawn" / "cup" / "000.png", images)
    code, out, err = here("coop_mt.py", "--resume", "--out", "run")
    assert code == 0 and not err and "average" in out


def test_a_training_run_that_diverges_says_so(place, tmp_path, here, monkeypatch):
    monkeypatch.chdir(place)
    code, _, err = here("coop_mt.py", *f"{SMALL} --lr 1e30 --epochs 3 --out {tmp_path}/a".split())
    assert code == 2 and "the training diverged in epoch" in err and err.count("\n") == 1

    def exploding(args, model, tasks, run):
        prompts = COOP.build(args, model, tasks)
        for _ in run.epochs("train", 1, prompts=prompts):
            run.log(loss=1.0)
            prompts.vectors.data[0] = float("nan")          # an update after the last finite loss

    with pytest.raises(common.UserError, match="diverged in epoch 1 .* use a smaller --lr"):
        common.main(replace(COOP, train=exploding), f"{SMALL} --out {tmp_path}/b".split())
    assert not list(tmp_path.glob("*/result.json"))


# ------------------------------------------------------------------------ what is not a mistake


def test_a_switch_may_be_given_again_with_the_value_it_has(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for word in ("--specific", "--no-validate", "--no-plot"):
        assert common.parse(MMAP, ["--resume", "--out", "grouped", word]).specific
    common.main(COOP, ["--eval", "run/prompts.pt", "--no-validate"])
    assert "average" in capsys.readouterr().out


def test_a_prompt_that_tasks_share_works_in_any_order_of_the_tasks(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    tables = []
    for data in ("shapes", "painted=shapes/painted,drawn=shapes/drawn"):
        common.main(COOP, f"--eval run/prompts.pt --data {data}".split())
        tables.append(capsys.readouterr().out.splitlines()[2:4])
    assert sorted(tables[0]) == sorted(tables[1]) and tables[0] != tables[1]


def test_saved_paths_are_absolute_and_a_run_is_scored_from_anywhere(place, tmp_path, monkeypatch,
                                                                    capsys):
    """A home folder is expanded, also in --out=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(place)
    common.main(COOP, f"{SMALL} --out=~/run".split())
    saved = json.loads((tmp_path / "home" / "run" / "settings.json").read_text())
    assert saved["clip"] == str(place / "random.pt") and saved["data"] == str(place / "shapes")
    assert saved["out"] == str(tmp_path / "home/run") and saved["root"] == str(place / "data")
    monkeypatch.chdir(tmp_path)
    common.main(COOP, ["--eval", "home/run/prompts.pt"])
    assert "average" in capsys.readouterr().out and not (tmp_path / "~").exists()


@pytest.mark.parametrize("then, code", [
    (f"&& {sys.executable} {ROOT}/common.py table ru\u0301n --out t\u00fc --plot", 0),
    ("| true", 141)])
def test_names_that_an_ascii_locale_lacks_and_a_pipe_that_closes_early(then, code, place, tmp_path):
    """As processes; the written table keeps the names as they are."""
    shutil.copytree(place / "shapes" / "drawn", tmp_path / "gezeichnet \u00fc")
    words = f"{SMALL} --data '\u00fc=gezeichnet \u00fc' --clip {place}/random.pt --out ru\u0301n"
    line = f"set -o pipefail; {sys.executable} {ROOT}/coop_mt.py {words} {then}"
    env = dict(os.environ, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
               CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=env, cwd=tmp_path)
    assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr
    if code == 0:
        assert b"/gezeichnet ?, 2 shots" in done.stdout and b"parameters.png" in done.stdout
        text = (tmp_path / "t\u00fc" / "table.md").read_text(encoding="utf-8")
        assert "/gezeichnet \u00fc, 2 shots" in text and "| \u00fc |" in text
