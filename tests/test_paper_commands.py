"""The list of the papers' commands, and what docstrings and the README show, are accepted and run.
"""
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import common
from data import benchmarks

METHODS = ["coop_mt", "vpt_mt", "maple_mt", "mvlpt", "hipro", "mmap", "jscpt", "finetune"]
COMMANDS = {
    "check": common.CheckArgs,
    "zero-shot": common.ZeroShotArgs,
    "probe": common.BaselineArgs,
    "table": common.TableArgs,
    "predict": common.PredictArgs,
}
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIST = (ROOT / "tests" / "paper_commands.txt").read_text(encoding="utf-8").splitlines()
LIVE = [line for line in LIST if not line.startswith("#")]
BUILTIN = (ROOT / "tests" / "builtin_commands.txt").read_text(encoding="utf-8").splitlines()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def settings_of():
    """A command -> (method, settings), as its own parser and checks read it; touches no data."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run_seeds", lambda args, *rest, **named: found.append(args))

        def read(line):
            python, file, *words = shlex.split(line, comments=True)
            assert python == "python", line
            if words[:1] == ["finetune"]:
                common.commands(words)
                return "finetune", found.pop()
            if file == "common.py":
                return words[0], common._command(words[0], COMMANDS[words[0]], words[1:])
            common.load_method(file.removesuffix(".py")).main(words)
            return found[-1].method, found.pop()

        yield read


@pytest.fixture(scope="module")
def listed(settings_of):
    """Every command of the list: (line, method, settings)."""
    return [(line, *settings_of(line)) for line in LIVE]


def test_the_commands_of_the_results_run_at_the_built_in_defaults(settings_of):
    """Three seeds or more, test images, no setting of training; each to a folder of its own."""
    live = [line for line in BUILTIN if not line.startswith("#")]
    assert len(live) > 30 and len({line.split("--out ")[1] for line in live}) == len(live)
    for line in live:
        method, args = settings_of(line)
        assert len(args.seeds) >= 3, line
        if method not in ("zero-shot", "probe"):
            assert args.clip == "tiny" and args.data.startswith("emoji"), line
        assert not set(line.split()) & {"--validate", "--lr", "--epochs", "--batch-size"}, line


def commands_in(text):
    """The commands of a text: indented lines; after a backslash a command goes on."""
    return re.findall(r"^    (python \w+\.py.*)$", text.replace("\\\n", " "), re.MULTILINE)


def test_every_command_is_accepted_and_has_a_folder_and_settings_of_its_own(listed):
    folders = {args.out for _, _, args in listed}
    settings = set()
    for line, method, args in listed:
        assert args.seeds == (1, 2, 3) and (args.split or args.shots), line
        assert " --out runs/papers/" in line
        shown = {key: value for key, value in vars(args).items() if key not in ("out", "plot")}
        settings.add(repr((method, shown)))
    assert len(folders) == len(settings) == len(listed) > 250


def test_every_command_names_benchmarks_and_sources_that_exist(listed):
    for line, _, args in listed:
        names = benchmarks.names_of(args.data)
        if getattr(args, "source", None) not in (None, "none"):
            names += benchmarks.names_of(args.source)
        assert all(name in benchmarks.BENCHMARKS for name in names), line


def test_a_line_needs_no_quotes_and_a_line_number_finds_a_command():
    assert all(re.fullmatch(r"python [\w ./+-]+", line) for line in LIVE)
    assert all(line.startswith(("#", "python ")) for line in LIST)


def columns_without_a_command(listed, of_zero_shot):
    """The columns of data/paper_results.json that no command's closing table prints."""
    shown = []
    for _, method, args in listed:
        if method == "probe":
            continue
        settings = dict(vars(args), validate=False)
        if method in METHODS:
            settings.update(method=method, variant=common.variant_of(args))
        else:
            settings.update(method="zero_shot", clip=args.clip or "ViT-B/16", batches="tasks")
        keys = (*common.SETTINGS, "validate")
        shown += common.paper_columns({key: settings.get(key) for key in keys})
    text = (ROOT / "data" / "paper_results.json").read_text(encoding="utf-8")
    return [
        [column[key] for key in ("paper", "table", "column", "data")]
        for column in json.loads(text)["columns"]
        if (column["method"] == "zero_shot") == of_zero_shot and column not in shown
    ]


def test_the_commands_fill_every_column_of_a_method_in_the_papers_tables(listed):
    assert columns_without_a_command(listed, of_zero_shot=False) == []


def test_the_commands_fill_every_column_of_zero_shot_clip_in_the_papers_tables(listed):
    assert columns_without_a_command(listed, of_zero_shot=True) == []


@pytest.mark.parametrize("method", METHODS[:-1])
def test_the_commands_of_a_docstring_are_accepted(method, settings_of):
    found = commands_in(common.load_method(method).__doc__)
    assert len(found) > 2
    for line in found:
        settings_of(line)


def test_the_commands_of_the_readme_are_accepted(settings_of):
    found = commands_in(README)
    assert len(found) > 8
    for line in found:
        settings_of(line)


def test_the_readmes_links_lead_to_files_and_to_functions_that_exist():
    links = re.findall(r"\[([^\]]*)\]\(([^)]+)\)", README)
    assert len(links) > 30
    for words, target in links:
        assert (ROOT / target).exists(), target
        for module, name in re.findall(r"`(\w+)\.(\w+)`", words):
            assert target == f"{module}.py"
            source = (ROOT / target).read_text(encoding="utf-8")
            found = re.search(rf"^(def|class) {name}\b", source, re.MULTILINE)
            assert found or name == "py", words


def run(folder, *words):
    """Python as a process, in a folder, with the project on its path."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=""),
    )


def test_the_readmes_own_method_trains_reports_and_scores_again(tmp_path):
    (tmp_path / "deep_mt.py").write_text(BLOCKS[0])
    words = ["--data", "emoji24:Noto Food", "--epochs", "1", "--out", "run"]
    done = run(tmp_path, "deep_mt.py", *words)
    assert done.returncode == 0 and "deep_mt" in done.stdout, done.stderr
    again = run(tmp_path, "deep_mt.py", "--eval", "run/prompts.pt")
    assert again.returncode == 0, again.stderr
    assert [x for x in done.stdout.splitlines() if x.startswith("Noto Food")] == [
        x for x in again.stdout.splitlines() if x.startswith("Noto Food")
    ]


def test_the_readmes_lines_of_python_name_a_class(tmp_path):
    out = ["--out", "runs/coop_mt-emoji-6-1"]
    trained = run(tmp_path, str(ROOT / "coop_mt.py"), "--epochs", "1", "--views", "1", *out)
    assert trained.returncode == 0, trained.stderr
    done = run(tmp_path, "-c", BLOCKS[1])
    assert done.returncode == 0, done.stderr
    guess, label = done.stdout.strip().split(" is ")
    task = common.load_tasks("emoji", shots=6)[0]
    assert guess in task.class_names and label == task.class_names[task.test.labels[0]]
