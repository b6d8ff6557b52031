"""What happens to a run from outside: Ctrl-C, a full disk, a card without memory, SIGKILL at any
moment; and what an import costs.

Damaged and malicious files, undecodable images and folders that are taken are in test_bad_input.py.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, make_tree, numbers, random_clip, run_script

import common

coop = common.load_method("coop_mt")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The words of a small training on files enough for worker processes."""
    folder = tmp_path_factory.mktemp("given")
    torch.save(random_clip(**TINY).state_dict(), folder / "random.pt")
    data = make_tree(
        folder / "shapes", {f"{d}/{c}": 110 for d in ("drawn", "painted") for c in ("cup", "hat")}
    )
    return [
        "--data",
        data,
        "--shots",
        102,
        "--clip",
        folder / "random.pt",
        "--n-ctx",
        2,
        "--batch-size",
        100,
        "--device",
        "cpu",
    ]


def started(script, *words, **more):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, words)],
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def is_line(err):
    return err.startswith("coop_mt.py: ") and err.endswith("\n") and err[:-1].isprintable()


def test_ctrl_c_is_answered_with_a_line_and_the_way_to_go_on(words, tmp_path):
    """The terminal sends it to the process and to its workers."""
    process = started(
        "vpt_mt.py", *words, "--epochs", 500, "--out", tmp_path / "run", start_new_session=True
    )
    while not list((tmp_path / "run").glob("checkpoint-*.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    *before, last = err.splitlines()
    assert (
        process.returncode == 130
        and last == f"vpt_mt.py: stopped; go on with --resume --out {tmp_path / 'run'}"
    )
    assert all(line.startswith("warning: --shots") for line in before)
    [path] = (tmp_path / "run").glob("checkpoint-*.pt")
    assert torch.load(path, weights_only=True)["epoch"] >= 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_full_disk_is_told_in_a_line_and_the_run_goes_on_when_it_is_free(words, tmp_path, here):
    """The system refuses to write more than 2 kB into a file: settings.json fits, the checkpoint
    does not."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    small = [*words, "--views", 1, "--epochs", 1, "--shots", 8]
    full = run_script("coop_mt.py", *small, "--out", tmp_path / "run", preexec_fn=limit)
    assert full.returncode == 2 and is_line(full.stderr), full.stderr
    assert (
        "checkpoint-train" in full.stderr and "free the disk or choose another --out" in full.stderr
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["settings.json"]
    code, _, err = here("coop_mt.py", "--resume", "--out", tmp_path / "run")
    assert code == 0 and (tmp_path / "run" / "result.json").exists(), err


def test_a_disk_that_fills_under_a_picture_or_a_card_without_memory_points_to_resume(
    words, tmp_path, monkeypatch, here
):
    small = [*words, "--views", 1, "--epochs", 1, "--shots", 8]

    def no_room(*_):
        raise OSError(
            errno.ENOSPC, "No space left on device"
        )  # as matplotlib passes it on: without a name

    with monkeypatch.context() as patch:
        patch.setattr(common, "plot_run", no_room)
        code, _, err = here("coop_mt.py", *small, "--plot", "--out", tmp_path / "pictures")
    assert (
        code == 2
        and is_line(err)
        and "disk is full" in err
        and f"--resume --out {tmp_path / 'pictures'}" in err
    )

    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(common, "task_losses", no_memory)
        code, _, err = here("coop_mt.py", *small, "--out", tmp_path / "card")
    assert (
        code == 2
        and is_line(err)
        and f"--resume --out {tmp_path / 'card'} with --checkpoint" in err
        and "--batch-size" in err
    )
    code, _, err = here("coop_mt.py", "--resume", "--out", tmp_path / "card", "--checkpoint")
    assert code == 0, err


def test_an_out_that_cannot_be_written_is_refused_before_anything_else(
    words, tmp_path, monkeypatch, here
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, err = here("coop_mt.py", *words, "--out", tmp_path / "deep" / "run")
    assert (
        code == 2
        and is_line(err)
        and f"{tmp_path} is a file or read-only: choose another folder" in err
    )
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_had_begun_to_write_goes_and_anothers_stays(
    words, tmp_path, here, monkeypatch
):
    small, out = [*words, "--views", 1, "--epochs", 1, "--shots", 8], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "finish_seed", lambda *_, **parts: [][0])
        with pytest.raises(IndexError):
            here("coop_mt.py", *small, "--out", out)
    (out / "checkpoint.pt.123.part").write_bytes(b"half")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "settings.json.123.part").write_bytes(b"another's")
    assert here("coop_mt.py", *small, "--out", tmp_path / "new")[0] == 0  # it may be writing
    assert (tmp_path / "new" / "settings.json.123.part").exists()
    code, _, err = here("coop_mt.py", "--resume", "--out", out)
    assert code == 0 and not list(out.glob("*.part")) and not list(out.glob("checkpoint-*.pt")), err


@pytest.mark.parametrize("content", ["text", "list", "other", "code"])
def test_a_phases_checkpoint_that_is_spoilt_is_refused_and_runs_no_code(
    words, tmp_path, here, monkeypatch, content
):
    small, out = [*words, "--views", 1, "--epochs", 2, "--shots", 8], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save_prompts", lambda *_: [][0])
        with pytest.raises(IndexError):
            here("coop_mt.py", *small, "--out", out)
    [path] = out.glob("checkpoint-*.pt")
    if content == "text":
        path.write_text("no checkpoint")
    elif content == "list":
        torch.save([1], path)
    elif content == "other":
        torch.save(dict(torch.load(path, weights_only=True), parts=dict(prompts={})), path)
    else:
        torch.save(dict(seed=1, x=Spoiling(tmp_path / "ran")), path)
    code, _, err = here("coop_mt.py", "--resume", "--out", out)
    assert code == 2 and is_line(err) and path.name in err and "another --out" in err
    assert not (tmp_path / "ran").exists()


class Spoiling:
    """What a malicious file holds: unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_ctrl_c_that_python_swallowed_stops_after_the_epoch(tmp_path, monkeypatch):
    """An exception inside a destructor, such as that of a DataLoader with workers, is ignored."""
    monkeypatch.setattr(common.Run, "interrupted", False)
    args = coop.Args(data="emoji", shots=1, out=str(tmp_path / "run"))
    run = common.Run(args, dict(out=args.out, data="emoji", method="coop_mt"))
    part = torch.nn.Linear(1, 1)
    run.open({})
    run.start_seed(1)
    with pytest.raises(KeyboardInterrupt):
        for _ in run.epochs("one", 3, part=part):
            common.Run.interrupted = True
    assert [row["epoch"] for row in run.rows()] == [1]


def test_a_finished_phase_yields_nothing_and_leaves_its_parts_as_they_ended(tmp_path):
    """Epochs are seeded by seed, phase and number, whatever ran before."""

    def run(resume):
        args = coop.Args(data="emoji", shots=1, out=str(tmp_path / "run"), resume=resume)
        one = common.Run(args, dict(out=args.out, data="emoji", method="coop_mt"))
        if not resume:
            one.open({})
        one.start_seed(3)
        return one

    first, part, drawn = run(False), torch.nn.Linear(1, 1), []
    for epoch in first.epochs("one", 3, part=part):
        torch.nn.init.constant_(part.weight, epoch + 5)
        drawn.append(torch.rand(()).item())
        first.log(loss=epoch, losses=torch.tensor([1.0, epoch]))
    again, fresh = run(True), torch.nn.Linear(1, 1)
    assert list(again.epochs("one", 3, part=fresh)) == [] and fresh.weight.item() == 7
    assert [row["loss"] for row in again.rows()] == [0, 1, 2]
    assert again.rows()[2]["losses"] == "[1.0, 2.0]"
    for epoch in again.epochs("two", 1, part=fresh):
        other = torch.rand(()).item()
    common.seed_everything(3, "one", 1)
    assert drawn[1] == torch.rand(()).item() and other not in drawn


def test_killed_in_the_second_task_of_single_task_ends_with_the_same_numbers(words, tmp_path, here):
    """SIGKILL when the first task has its checkpoint and the second one its first."""
    small = [*words, "--shots", 8, "--batch-size", 4, "--epochs", 3, "--single-task"]
    code, _, err = here("coop_mt.py", *small, "--out", tmp_path / "whole")
    assert code == 0, err
    process = started("coop_mt.py", *small, "--out", tmp_path / "run")
    while len(list((tmp_path / "run").glob("checkpoint-*.pt"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run" / "result.json").exists()
    code, _, err = here("coop_mt.py", "--resume", "--out", tmp_path / "run")
    assert code == 0, err
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    log, whole = ((tmp_path / name / "log.csv").read_text() for name in ("run", "whole"))
    assert log == whole and log.count("\n") == 1 + 2 * 3


# ------------------------------------------------------------------------- slow, and many times

SCRIPTS = {
    "coop_mt": [],
    "vpt_mt": [],
    "maple_mt": [],
    "hipro": [],
    "mvlpt": [],
    "mmap": ["--groups", 1],
    "jscpt": ["--upper-every", 3],
}


@pytest.mark.slow
@pytest.mark.parametrize("method", SCRIPTS)
def test_killed_at_twenty_random_moments_ends_with_the_same_numbers(method, words, tmp_path):
    """SIGKILL at a moment between the first file and the last, again and again on what was left,
    until there were twenty."""
    words = [
        *words,
        "--shots",
        8,
        "--batch-size",
        4,
        "--seeds",
        1,
        2,
        "--epochs",
        3,
        *SCRIPTS[method],
    ]
    start, first = time.time(), None
    process = started(f"{method}.py", *words, "--out", tmp_path / "whole")
    while process.poll() is None:
        first = first or ((tmp_path / "whole" / "settings.json").exists() and time.time() - start)
        time.sleep(0.02)
    last, kills, ends, out = time.time() - start, 0, 0, tmp_path / "0"
    assert process.returncode == 0, process.stderr.read()
    moments = random.Random(method)
    while kills < 20 or not (out / "result.json").exists():
        again = (out / "settings.json").exists()
        process = started(
            f"{method}.py", *(["--resume"] if again else words), "--out", out
        )  # it may have died before a file
        try:
            process.wait(moments.uniform(0.9 * first, last) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            assert numbers(out) == numbers(tmp_path / "whole")
            assert (out / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
            ends += 1
            out = tmp_path / str(ends) if kills < 20 else out
    assert ends and json.loads((out / "result.json").read_text())["method"] == method


@pytest.mark.slow
def test_importing_common_takes_little_longer_than_what_it_stands_on():
    """Best of 3 each, in turns."""

    def seconds(code):
        code = f"import time; a = time.perf_counter(); {code}; print(time.perf_counter() - a)"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    ours, theirs = zip(
        *[(seconds("import common"), seconds("import torch, torchvision, clip")) for _ in range(3)]
    )
    print(f"\nimporting common takes {min(ours) / min(theirs):.2f} times what its packages take")
    assert min(ours) < 1.3 * min(theirs)
