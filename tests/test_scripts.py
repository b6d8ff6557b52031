"""Every method file as a user runs it: a process that trains, reports, is killed and resumed, and
scores its prompts again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_tree, numbers, run_script

# a method's own words; after how many epochs it is killed; its numbers for 2 tasks at `tiny` with b
# = 4
METHODS = {
    "coop_mt": ([], [7], 4 * 128),
    "vpt_mt": ([], [7], 6 * 4 * 192),
    "maple_mt": ([], [7], 6 * (4 * 128 + 128 * 192 + 192)),
    "hipro": ([], [1, 14], 3 * 4 * 128),
    "mvlpt": (
        [],
        [2, 18],
        2 * (4 * 128 + 6 * 4 * 192 + 2 * 128 * 128 + 256 + 2 * 128 * 192 + 320 + 198_272),
    ),  # in stage 1, in stage 2
    "mmap": (
        ["--groups", 1],
        [1, 10],
        3 * 6 * (4 * 32 + 4 + 6),
    ),  # in the grouping phase of seed 1, in the training of seed 2
    "jscpt": (
        ["--upper-every", 3],
        [2, 5],
        3 * (4 * 128 + 6 * 4 * 192) + 2 * 192 + 2 * 32 * 192 + 32 + 192,
    ),
}
OWN_KEYS = {
    "mmap": {"groups", "similarity"},
    "hipro": {"nodes", "affinity"},
    "mvlpt": {"groups"},
    "jscpt": {"alpha", "beta", "effect", "affinity", "phi", "schedule_parameters"},
}
SECONDS = {
    "coop_mt": 180,
    "vpt_mt": 300,
    "maple_mt": 300,
    "mvlpt": 300,
    "hipro": 300,
    "mmap": 300,
    "jscpt": 480,
    "mvlpt --transferability": 900,
}  # what a script may take on the built-in benchmark


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_tree(
        tmp_path_factory.mktemp("data") / "shapes",
        {f"{d}/{c}": 12 for d in ("drawn", "painted") for c in ("cup", "hat")},
    )


@pytest.fixture(scope="module", params=METHODS)
def whole(request, shapes, tmp_path_factory):
    """(method, its words, folder of a finished run, what it printed)"""
    words = [
        "--data",
        shapes,
        "--shots",
        8,
        "--clip",
        "tiny",
        "--epochs",
        4,
        "--seeds",
        1,
        2,
        "--n-ctx",
        4,
        "--batch-size",
        4,
        *METHODS[request.param][0],
    ]
    out = tmp_path_factory.mktemp(request.param) / "run"
    done = run_script(f"{request.param}.py", *words, "--out", out, "--plot", cwd=out.parent)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return request.param, words, out, done.stdout


def test_a_run_reports_in_its_own_folder(whole):
    method, _, out, printed = whole
    result = json.loads((out / "result.json").read_text())
    assert (
        result["method"] == method
        and result["tasks"] == ["drawn", "painted"]
        and result["clip"] == "tiny"
    )
    assert (result["split"], result["shots"], result["seeds"]) == (None, 8, [1, 2])
    assert all(
        0 <= result["zero_shot"][t] <= 100 and len(result["accuracy"][t]) == 2
        for t in result["tasks"]
    )
    assert result["average"] == pytest.approx(
        [(result["accuracy"]["drawn"][i] + result["accuracy"]["painted"][i]) / 2 for i in range(2)]
    )
    assert result["trainable_parameters"] == METHODS[method][2] and len(result["seconds"]) == 2
    assert OWN_KEYS.get(method, set()) <= result.keys()
    rows = list(csv.DictReader((out / "log.csv").open()))
    phases = {(r["seed"], r["phase"]): [] for r in rows}
    for r in rows:
        phases[r["seed"], r["phase"]].append(int(r["epoch"]))
    assert all(epochs == [i + 1 for i in range(len(epochs))] for epochs in phases.values())
    assert all(1 <= len(json.loads(r["losses"])) <= 2 for r in rows if r["losses"])
    assert (out / "accuracy.png").stat().st_size > 5000 and (out / "loss.png").stat().st_size > 5000
    assert (out / "losses.png").stat().st_size > 5000
    assert "average" in printed and f"{METHODS[method][2]:,} trainable parameters" in printed
    assert [p.name for p in out.parent.iterdir()] == ["run"]


def test_saved_prompts_score_as_the_run_did_and_nothing_is_written(whole, here):
    method, _, out, printed = whole
    before = {p: p.read_bytes() for p in out.iterdir()}
    again = run_script(f"{method}.py", "--eval", out / "prompts.pt", cwd=out.parent)
    assert again.returncode == 0, again.stderr
    table = lambda text: text[text.index("drawn  ") :].split("; trained in")[0]
    assert table(again.stdout[again.stdout.index("zero-shot") :]) == table(
        printed[printed.index("zero-shot") :]
    )
    (out / "loss.png").unlink()
    code, finished, _ = here(f"{method}.py", "--resume", "--out", out, "--plot")
    assert code == 0 and "had finished" in finished and (out / "loss.png").exists()
    changed = {p.name for p in out.iterdir() if p.read_bytes() != before[p]}
    assert all(name.endswith(".png") for name in changed) and set(before) == set(out.iterdir())
    assert [p.name for p in out.parent.iterdir()] == ["run"]


def test_killed_and_resumed_ends_where_it_would_have_ended(whole, tmp_path):
    method, words, out, _ = whole
    for epochs in METHODS[method][1]:
        broken = tmp_path / f"killed-{epochs}"
        process = subprocess.Popen(
            [sys.executable, str(ROOT / f"{method}.py"), *map(str, words), "--out", str(broken)],
            env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
            stdout=subprocess.DEVNULL,
        )
        while (
            not (broken / "log.csv").exists()
            or (broken / "log.csv").read_text().count("\n") <= epochs
        ):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (broken / "result.json").exists()
        resumed = run_script(f"{method}.py", "--resume", "--out", broken)
        assert resumed.returncode == 0, resumed.stderr
        assert numbers(broken) == numbers(out)
        assert (broken / "log.csv").read_text() == (out / "log.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", SECONDS)
def test_the_built_in_defaults_end_in_time_and_within_2_gb_or_jscpts_3(command, tmp_path):
    method, *words = command.split()
    out, start = tmp_path / "run", time.time()
    code = (            # the resource module would count what pytest had before the fork, too
        "import re, runpy, sys; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "status = open('/proc/self/status').read(); "
        "print('peak', int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"{method}.py", *words, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert time.time() - start < SECONDS[command] and int(done.stdout.split("peak")[1]) < (
        3072 if method == "jscpt" else 2048
    )
    assert (
        json.loads((out / "result.json").read_text())["average"][0] > 48
    )  # zero-shot is 53, chance under 2
