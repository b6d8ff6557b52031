"""The commands in the lists for the papers and the built-in results, in docstrings and in the
README are accepted; the README's code runs."""
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import ROOT

import common
from data import benchmarks

NAMES = ["coop_mt", "vpt_mt", "maple_mt", "mvlpt", "hipro", "mmap", "jscpt"]
OTHERS = dict(check=common.CheckArgs, table=common.TableArgs, predict=common.PredictArgs,
              show=common.ShowArgs)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COLUMNS = json.loads((ROOT / "data" / "paper_results.json").read_text("utf-8"))["columns"]


def commands_of(file):
    """The lines of a list that are commands."""
    lines = (ROOT / "tests" / file).read_text(encoding="utf-8").splitlines()
    assert all(line.startswith(("#", "python ")) for line in lines)
    return [line for line in lines if not line.startswith("#")]


def settings_of(line):
    """The settings that a command's own parser reads from it; touches no data."""
    python, file, *words = shlex.split(line, comments=True)
    assert python == "python", line
    name = file.removesuffix(".py")
    if name == "common":
        name, *words = words
    if name in OTHERS:
        return dict(asdict(common.command_line(name, OTHERS[name], words)), method=name)
    method = common.method_of(name.replace("-", "_"))
    args = common.parse(method, words)
    return dict(asdict(args), method=method.name, variant=common.variant_of(method, args))


@pytest.fixture(scope="module")
def listed():
    """Every command of the papers' list and its settings."""
    return {line: settings_of(line) for line in commands_of("paper_commands.txt")}


def test_the_commands_of_the_results_run_at_the_built_in_defaults():
    """Three seeds or more, test images, no training settings; each with its own folder."""
    live = commands_of("builtin_commands.txt")
    assert len(live) > 30 and len({line.split("--out ")[1] for line in live}) == len(live)
    for line in live:
        found = settings_of(line)
        assert len(found["seeds"]) >= 3 and found["clip"] == "tiny", line
        assert found["data"].startswith("emoji"), line
        assert not set(line.split()) & {"--validate", "--lr", "--epochs", "--batch-size"}, line


def test_every_papers_command_has_its_own_folder_and_settings(listed):
    for line, found in listed.items():
        assert found["seeds"] == (1, 2, 3) and (found["split"] or found["shots"]), line
        assert re.fullmatch(r"python [\w ./+-]+ --out runs/papers/[\w ./+-]+", line)    # no quotes
    shown = [{key: value for key, value in found.items() if key not in ("out", "plot")}
             for found in listed.values()]
    folders = {found["out"] for found in listed.values()}
    assert len(folders) == len(set(map(repr, shown))) == len(listed) > 200


def test_every_papers_command_names_benchmarks_and_sources_that_exist(listed):
    for line, found in listed.items():
        names = benchmarks.names_of(found["data"])
        if found.get("source") not in (None, "none"):
            names += benchmarks.names_of(found["source"])
        assert all(name in benchmarks.BENCHMARKS for name in names), line


def test_the_commands_fill_every_column_of_the_papers_tables(listed):
    """Every column of data/paper_results.json appears in the closing table of a command."""
    shown = []
    for settings in listed.values():
        shown += common.paper_columns(dict(settings=settings))[0]
    left = [column for column in COLUMNS if column not in shown]
    assert [[column[key] for key in ("paper", "table", "column", "data")] for column in left] == []


def test_the_filter_for_mmaps_table_1_gives_its_lines_and_no_others(listed):
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^ +(grep .* \| grep [^|]*) \| sed", text, re.MULTILINE)
    lines = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    shown = [column for one in lines.splitlines()
             for column in common.paper_columns(dict(settings=listed[one]))[0]]
    table = [c for c in COLUMNS if (c["paper"], c["table"]) == ("MmAP", "Table 1")]
    assert len(lines.splitlines()) == len(table) and all(c in shown for c in table)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_docstring_are_accepted(name):
    found = commands_in(common.load_method(name).__doc__)
    assert len(found) > 2
    for line in found:
        settings_of(line)


def commands_in(text):
    """The commands of a text: indented lines; a backslash continues a command."""
    return re.findall(r"^    (python \w+\.py.*)$", text.replace("\\\n", " "), re.MULTILINE)


def test_the_commands_of_the_readme_are_accepted():
    found = commands_in(README)
    assert len(found) > 8
    for line in found:
        if "--eval" not in line:                # of a run that the README made before
            settings_of(line)


def test_the_readmes_links_lead_to_files_and_to_functions_that_exist():
    links = re.findall(r"\[([^\]]*)\]\(([^)]+)\)", README)
    assert len(links) > 20
    for words, target in links:
        target, _, anchor = target.partition("#")
        assert (ROOT / target).exists(), target
        if anchor:
            text = (ROOT / target).read_text(encoding="utf-8").lower().replace("'", "")
            assert f"# {anchor.replace('-', ' ')}\n" in text, anchor
        for module, name in re.findall(r"`(\w+)\.(\w+)`", words):
            assert target == f"{module}.py"
            source = (ROOT / target).read_text(encoding="utf-8")
            found = re.search(rf"^(def|class) {name}\b", source, re.MULTILINE)
            assert found or name == "py", words


def test_the_readmes_own_method_trains_reports_and_scores_again(tmp_path):
    """As processes, in another folder, with the project on Python's path."""
    (tmp_path / "deep_mt.py").write_text(BLOCKS[0])
    env = dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    tables = []
    for words in ("--data 'emoji24:Noto Food' --shots 1 --epochs 1 --out run",
                  "--eval run/prompts.pt"):
        done = subprocess.run([sys.executable, "deep_mt.py", *shlex.split(words)], cwd=tmp_path,
                              env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tables.append(re.search(r"zero-shot +deep_mt\nNoto Food .*\n", done.stdout)[0])
    assert tables[0] == tables[1]


def test_the_readmes_lines_of_python_name_a_class(tmp_path, monkeypatch, capsys):
    """With the prompts of a smaller run."""
    monkeypatch.chdir(tmp_path)
    words = "--shots 1 --epochs 1 --views 1 --out runs/coop_mt-emoji-6-1"
    coop = common.load_method("coop_mt").METHOD
    common.main(coop, ["--data", "emoji24:Noto Food", *words.split()])
    capsys.readouterr()
    exec(BLOCKS[1], {})
    guess, label = capsys.readouterr().out.strip().removeprefix("predicted ").split(", true ")
    task = common.load_tasks("emoji", shots=6)[0]
    assert guess in task.class_names and label == task.class_names[task.test.labels[0]]
