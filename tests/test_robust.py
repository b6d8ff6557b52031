"""What happens to a run from outside: Ctrl-C, SIGKILL at any moment, a full disk, a full GPU,
damaged files; what phases save; and how long an import takes.

Undecodable images, wrong flags and --out folders that are in use are in test_bad_input.py.
"""
import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import weakref
from unittest import mock

import pytest
import torch
from conftest import ROOT, killed, make_tree, numbers, process_of, run

import common


@pytest.fixture(scope="module")
def line(tmp_path_factory, random_pt):
    """The flags of a small training run on enough files for worker processes."""
    folders = [f"{d}/{c}" for d in ("drawn", "painted") for c in ("cup", "hat")]
    data = make_tree(tmp_path_factory.mktemp("data") / "shapes", dict.fromkeys(folders, 110))
    return f"--data {data} --clip {random_pt} --n-ctx 2 --device cpu"


SMALL = "--shots 8 --views 1 --epochs 2 --batch-size 8"


def started(line):
    return subprocess.Popen(**process_of(line), start_new_session=True)


def is_line(err, *says):
    return err.startswith("coop_mt.py: ") and err.count("\n") == 1 and all(x in err for x in says)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


# ----------------------------------------------------------------------------------------- stopped

def test_ctrl_c_prints_one_line_that_says_how_to_resume(line, tmp_path):
    """The terminal sends it to the process and to its workers."""
    out = tmp_path / "run"
    process = started(f"vpt_mt.py {line} --shots 102 --batch-size 100 --epochs 500 --out {out}")
    wait_for(out / "checkpoint.pt", process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    *before, last = err.splitlines()
    assert process.returncode == 130
    assert last == f"vpt_mt.py: stopped; continue with --resume --out {out}"
    assert all(line.startswith("warning: --shots") for line in before)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] >= 1
    assert not (out / "result.json").exists()


def test_a_ctrl_c_that_python_swallowed_stops_after_the_epoch(tmp_path, monkeypatch):
    """Python ignores exceptions in a destructor, such as that of a DataLoader with workers."""
    monkeypatch.setattr(common.Run, "interrupted", False)
    one, part = run_in(tmp_path / "run"), torch.nn.Linear(1, 1)
    with pytest.raises(KeyboardInterrupt):
        for epoch in one.epochs("one", 3, part=part):
            one.log(loss=epoch)
            common.Run.interrupted = True
    assert [row["epoch"] for row in one.rows()] == [1]


def test_a_killed_process_resumes_to_the_same_numbers(line, tmp_path):
    """SIGKILL while the first epochs are written; a half-written file is written again."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = f"{line} --shots 8 --batch-size 4 --epochs 4 --groups 1"
    process = started(f"mmap.py {settings} --out {out}")
    wait_for(out / "checkpoint.pt", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "result.json").exists()
    (out / "checkpoint.pt.part").write_bytes(b"half")
    assert run(f"mmap.py {settings} --out {whole}")[0] == 0
    code, _, err = run(f"mmap.py --resume --out {out}")
    assert code == 0 and numbers(out) == numbers(whole), err
    assert (out / "log.csv").read_text() == (whole / "log.csv").read_text()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_leaves_other_files_in_its_folder_alone(line, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    others = {"notes.txt": b"mine", "checkpoint-train.pt": b"mine", "other.part": b"mine"}
    for name, content in others.items():
        (out / name).write_bytes(content)
    assert run(f"coop_mt.py {line} {SMALL} --out {out}")[0] == 0
    assert {name: (out / name).read_bytes() for name in others} == others
    files = {"settings.json", "result.json", "prompts.pt", "log.csv", *others}
    assert {path.name for path in out.iterdir()} == files


# ------------------------------------------------------------------------------------ no room left

@contextlib.contextmanager
def files_of_at_most(size):
    """Limit every file to `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, left", [(1000, {"settings.json"}),
                                        (3000, {"settings.json", "finished.pt"})])
def test_a_full_disk_is_reported_in_one_line_and_the_run_resumes_once_there_is_space(
        size, left, line, tmp_path):
    """settings.json fits; finished.pt or the first checkpoint does not."""
    out = tmp_path / "run"
    with files_of_at_most(size):
        code, _, err = run(f"coop_mt.py {line} {SMALL} --out {out}")
    assert code == 2 and is_line(err, "the disk is full", f"--resume --out {out}"), err
    assert {path.name for path in out.iterdir()} == left
    code, _, err = run(f"coop_mt.py --resume --out {out}")
    assert code == 0 and (out / "result.json").exists(), err


@pytest.mark.parametrize("where, error, says", [
    ("plot_run", OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
    ("task_losses", torch.cuda.OutOfMemoryError("CUDA out of memory."), "with --recompute"),
], ids=["disk", "GPU"])
def test_the_errors_for_a_disk_full_while_plotting_and_a_full_gpu_point_to_resume(
        where, error, says, line, tmp_path):
    out = tmp_path / "run"
    with mock.patch.object(common, where, side_effect=error):
        code, _, err = run(f"coop_mt.py {line} {SMALL} --plot --out {out}")
    assert code == 2 and is_line(err, says, f"--resume --out {out}"), err
    code, _, err = run(f"coop_mt.py --resume --recompute --out {out}")
    assert code == 0 and (out / "loss.png").exists(), err


def test_a_gpu_too_small_for_second_derivatives_needs_a_smaller_batch(line, tmp_path):
    """JSCPT's upper step keeps what --recompute would compute again."""
    with mock.patch.object(common, "task_losses", side_effect=torch.cuda.OutOfMemoryError("full")):
        code, _, err = run(f"jscpt.py {line} {SMALL} --out {tmp_path / 'run'}")
    assert code == 2
    assert err == "jscpt.py: the GPU's memory is full: start again with a smaller --batch-size\n"


def test_an_out_that_cannot_be_written_is_rejected_before_anything_else(line, tmp_path):
    with mock.patch("os.access", return_value=False):
        code, _, err = run(f"coop_mt.py {line} {SMALL} --out {tmp_path / 'deep' / 'run'}")
    assert code == 2 and is_line(err, f"{tmp_path} is a file or read-only: choose another folder")
    assert not list(tmp_path.iterdir())


def test_prompts_damaged_while_a_run_was_stopped_are_reported_in_one_line(line, tmp_path):
    """The other files are in test_bad_input.py."""
    out = tmp_path / "run"
    with killed("result.json", 1):
        run(f"coop_mt.py {line} {SMALL} --out {out}")
    whole = (out / "prompts.pt").read_bytes()
    (out / "prompts.pt").write_bytes(whole[:len(whole) // 2])
    code, _, err = run(f"coop_mt.py --resume --out {out}")
    assert code == 2 and is_line(err, f"{out / 'prompts.pt'} cannot be used", "another --out"), err
    (out / "prompts.pt").write_bytes(whole)
    assert run(f"coop_mt.py --resume --out {out}")[0] == 0


# ------------------------------------------------------------------------------------------- phases

def run_in(folder, resume=False):
    """A Run without a method."""
    args = common.Args(shots=1, out=str(folder), resume=resume)
    settings = dict(out=args.out, data="emoji", method="coop_mt", shots=1, split=None)
    one = common.Run(args, settings)
    one.open({}, {})
    one.start(3)
    return one


def test_a_finished_phase_yields_nothing_and_leaves_its_modules_as_they_ended(tmp_path):
    """Epochs are seeded by seed, phase and number, whatever ran before."""
    first, part, drawn = run_in(tmp_path), torch.nn.Linear(1, 1), []
    for epoch in first.epochs("one", 3, part=part):
        torch.nn.init.constant_(part.weight, epoch + 5)
        drawn.append(torch.rand(()).item())
        first.log(loss=epoch, losses=torch.tensor([1.0, epoch]))
    again, fresh = run_in(tmp_path, resume=True), torch.nn.Linear(1, 1)
    assert list(again.epochs("one", 3, part=fresh)) == [] and fresh.weight.item() == 7
    assert [row["loss"] for row in again.rows()] == [0, 1, 2]
    assert again.rows()[2]["losses"] == "[1.0, 2.0]"
    for epoch in again.epochs("two", 1, part=fresh):
        other = torch.rand(()).item()
    common.seed_everything(3, "one", 1)
    assert drawn[1] == torch.rand(()).item() and other not in drawn


def test_what_is_done_once_is_not_repeated_by_a_resumed_run(tmp_path):
    part, calls = torch.nn.Linear(1, 1), []

    def change():
        calls.append(torch.nn.init.constant_(part.weight, 7))

    run_in(tmp_path).once("init", change, part=part)
    torch.nn.init.zeros_(part.weight)
    again = run_in(tmp_path, resume=True)
    again.once("init", change, part=part)
    assert len(calls) == 1 and part.weight.item() == 7 and again.rows() == []


def test_what_is_logged_does_not_keep_the_graph_of_its_step(tmp_path):
    """Otherwise memory would grow with the steps of an epoch."""
    one = run_in(tmp_path)
    for _ in one.epochs("one", 1):
        kept = torch.rand(3)
        one.log(loss=(kept * torch.rand(3, requires_grad=True)).sum())
        kept = weakref.ref(kept)
        assert kept() is None


def test_optimizers_are_only_in_the_file_of_the_running_phase(tmp_path):
    one, part = run_in(tmp_path), torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(part.parameters())
    for epoch in one.epochs("one", 1, part=part, optimizer=optimizer):
        part(torch.ones(1)).backward()
        optimizer.step()
    parts = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]
    assert len(parts["optimizer"]["state"]) == 2
    phases = torch.load(tmp_path / "finished.pt", weights_only=True)["phases"]
    assert phases["one"]["parts"].keys() == {"part"}


# ----------------------------------------------------------------------------- slow, and many times

SCRIPTS = ["coop_mt.py", "vpt_mt.py", "maple_mt.py", "hipro.py", "mvlpt.py", "mmap.py --groups 1",
           "jscpt.py --upper-every 3"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_twenty_random_moments_ends_with_the_same_numbers(script, line, tmp_path):
    """SIGKILL at random moments between the first file and the last, twenty times, each time
    resuming what is left."""
    line = f"{script} {line} --shots 8 --batch-size 4 --seeds 1 2 --epochs 3"
    whole, start = tmp_path / "whole", time.time()
    process = started(f"{line} --out {whole}")
    wait_for(whole / "settings.json", process)
    first = time.time() - start
    _, err = process.communicate()
    last, kills, ends, out = time.time() - start, 0, 0, tmp_path / "0"
    assert process.returncode == 0, err
    moments = random.Random(script)
    while kills < 20 or not (out / "result.json").exists():
        again = (out / "settings.json").exists()        # it may have died without a file
        process = started(f"{f'{script} --resume' if again else line} --out {out}")
        try:
            process.wait(moments.uniform(0.9 * first, last) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            assert numbers(out) == numbers(whole)
            assert (out / "log.csv").read_text() == (whole / "log.csv").read_text()
            ends += 1
            out = tmp_path / str(ends) if kills < 20 else out
    assert ends and json.loads((out / "result.json").read_text())["seeds"] == [1, 2]


@pytest.mark.slow
def test_importing_common_takes_little_longer_than_importing_its_packages():
    """Best of 3 each, alternately."""
    def seconds(code):
        code = f"import time; a = time.perf_counter(); {code}; print(time.perf_counter() - a)"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        return float(done.stdout)

    ours, theirs = zip(*[(seconds("import common"), seconds("import torch, torchvision"))
                         for _ in range(3)])
    print(f"\nimporting common takes {min(ours) / min(theirs):.2f} times what its packages take")
    assert min(ours) < 1.3 * min(theirs)
