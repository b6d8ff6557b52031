"""The papers' numbers, the tables of finished runs, zero-shot CLIP and the linear probe, and predictions with saved prompts."""
import csv
import itertools
import json
import os
import re
import sys
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tree, noise, small_tasks

import common

DATA = ROOT / "data"
COLUMNS = json.loads((DATA / "paper_results.json").read_text(encoding="utf-8"))["columns"]
tables = common.load_file(DATA / "tables.py", "multitask_prompt_tables")
baselines = common.load_file(DATA / "baselines.py", "multitask_prompt_baselines")


# ---------------------------------------------------------------------------------------------------- the papers' numbers

N_TASKS = dict(officehome=4, minidomainnet=4, domainnet=6, elevater20=20)
INCONSISTENT = {("HiPro", "Table 2", "IMTL", 0.01): "51.01",                    # the mean of the rows
                ("JSCPT", "Table 1", "VPT, multi", 0.2): "85.425"}


def test_a_printed_average_is_that_of_its_rows_but_for_two_that_the_papers_print_so():
    """Rows and average are rounded each, so the average may be off by a unit of the last digit, and no more."""
    found, checked = {}, 0
    for c in COLUMNS:
        numbers = {task: Decimal(printed.split(" ± ")[0]) for task, printed in c["results"].items()}
        average, rows = numbers.pop("average"), list(numbers.values())
        if rows and c["data"] != "elevater12":                                  # MVLPT prints 11 of its 12 tasks
            assert len(rows) == N_TASKS[c["data"]]
            checked += 1
            unit = Decimal(1).scaleb(average.as_tuple().exponent)
            if abs(sum(rows) / len(rows) - average) > unit:
                found[c["paper"], c["table"], c["column"], c["split"]] = str((sum(rows) / len(rows)).normalize())
        elif rows:
            assert len(rows) == 11 and 80 < 12 * average - sum(rows) < 100      # what is left for CIFAR-10
    assert found == INCONSISTENT and checked > 90


def expand(line):
    """Every command that a line of the README stands for: {a,b} is one of them, [a] may be left out."""
    line = re.sub(r"\[(.*?)\]", lambda m: "{" + (m[1][1:-1] if m[1].startswith("{") else m[1]) + ",}", line)
    parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"\{(.*?)\}", line))]
    return ["".join(choice) for choice in itertools.product(*parts)]


def settings_of(command, monkeypatch):
    """The settings that a command's result.json would have."""
    _, script, *words = command.split()
    seen = []
    with monkeypatch.context() as patch:
        if script == "common.py":
            patch.setattr(common, "load_tasks", lambda *args: [])
            patch.setattr(common, "load_clip", lambda *args: (None, None))
            patch.setattr(common, "zero_shot", lambda *args: [])
            keep = lambda args, method, variant, *more: seen.append(dict(vars(args), method=method, variant=variant))
            patch.setattr(baselines, "report", keep)
            common.commands(words)
        else:
            patch.setattr(common, "run_seeds", lambda args, *more, **other: seen.append(vars(args)))
            common.load_method(script.removesuffix(".py")).main(words)
    return dict(seen[0], validate=False)


def test_every_command_of_the_readme_has_its_papers_number_and_every_number_a_command(monkeypatch):
    reports, reached = common.load_file(DATA / "reports.py", "multitask_prompt_reports"), []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (python .*?) +# ((?:MmAP|HiPro|JSCPT|MVLPT), Table .*)$", readme, re.M)
    for line, named in lines:
        for command in expand(line):
            columns = reports.papers_columns(settings_of(command, monkeypatch))
            assert {f"{c['paper']}, {c['table']}" for c in columns} == set(named.split("; ")), command
            reached += columns
    assert len(reached) == len(COLUMNS) and all(c in reached for c in COLUMNS)


def test_numbers_of_two_papers_stand_side_by_side_with_one_decimal_and_a_note(capsys):
    settings = dict(data="officehome", split=0.1, shots=None, validate=False, tasks=["Real World"], zero_shot={"Real World": 80.0},
                    accuracy={"Real World": [81.0]}, average=[81.0], trainable_parameters=1, clip_parameters=2, seconds=[1.0],
                    seeds=[1], variant=None)
    common.print_table(dict(settings, method="zero_shot", clip="ViT-B/16", epochs=None, lr=None, batch_size=None, n_ctx=None))
    printed = capsys.readouterr().out
    assert re.search(r"MmAP, Table 1 +JSCPT, Table 1\n", printed) and re.search(r"Real World +80.0 +81.0 +90.1 +89.8\n", printed)
    common.print_table(dict(settings, method="hipro", clip="RN50", epochs=100, lr=0.001, batch_size=20, n_ctx=16))
    assert re.search(r"Real World .* 85.8 ± 0.1\n", capsys.readouterr().out)    # printed: 85.81 ± 0.14
    common.print_table(dict(settings, method="vpt_mt", clip="ViT-B/16", epochs=50, lr=0.0015, batch_size=16, n_ctx=16))
    assert "JSCPT, Table 1: the paper keeps its learning rate" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- tables of finished runs

def write_run(folder, **changes):
    result = dict(method="coop_mt", variant=None, data="pets", split=None, shots=4, clip="tiny", epochs=5, lr=0.1, batch_size=4,
                  n_ctx=4, validate=False, seeds=[1, 2], tasks=["A", "B"], zero_shot=dict(A=50.0, B=30.0),
                  accuracy=dict(A=[60.0, 62.0], B=[40.0, 41.0]), trainable_parameters=1234, clip_parameters=10, seconds=[1.0, 1.0])
    result.update(changes)
    result["average"] = [sum(x) / 2 for x in zip(*result["accuracy"].values())]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_runs_become_columns_and_their_seeds_are_joined(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b", seeds=[3], accuracy=dict(A=[64.0], B=[45.0]))
    write_run(tmp_path / "runs" / "c", epochs=9)
    write_run(tmp_path / "runs" / "d", method="mmap", variant="with --no-specific", seeds=[7], accuracy=dict(A=[1.0], B=[3.0]))
    write_run(tmp_path / "runs" / "e", validate=True, accuracy=dict(A=[99.0, 99.0], B=[99.0, 99.0]))
    write_run(tmp_path / "runs" / "f", split=0.1, shots=None)
    common.commands(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "left out: 1 run of --validate" in printed.err and "99.0" not in printed.out
    markdown = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert re.findall(r"\*\*(.*)\*\*", markdown) == ["pets, 4 shots, tiny", "pets, split 0.1, tiny"]
    head, _, first, second, average = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.split("\n")[2:7]]
    assert head == ["", "zero-shot", "coop_mt, --epochs 5", "coop_mt, --epochs 9", "mmap (with --no-specific)"]
    assert first == ["A", "50.0", "62.0 ± 2.0", "61.0 ± 1.4", "1.0"] and second == ["B", "30.0", "42.0 ± 2.6", "40.5 ± 0.7", "3.0"]
    assert average == ["average", "40.0", "52.0 ± 2.3", "50.8 ± 1.1", "2.0"]    # of 50, 51.5, 54.5 and of 50, 51.5
    assert "62.0 ± 2.0" in printed.out and "1 2 3" in printed.out and "1,234" in printed.out
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open(encoding="utf-8")))
    mine = [row for row in rows if [row[k] for k in ("method", "epochs", "shots", "task")] == ["coop_mt", "5", "4", "average"]]
    assert len(rows) == 12 and len(mine) == 1 and (mine[0]["mean"], mine[0]["std"], mine[0]["seeds"]) == ("52.0", "2.2913", "1 2 3")


def test_of_two_runs_of_a_seed_the_later_counts_and_a_line_says_so(tmp_path, capsys):
    write_run(tmp_path / "z", seeds=[1], accuracy=dict(A=[10.0], B=[10.0]))
    write_run(tmp_path / "a", seeds=[1], accuracy=dict(A=[20.0], B=[20.0]))
    os.utime(tmp_path / "z" / "result.json", (1, 1))
    common.commands(["table", str(tmp_path)])
    printed = capsys.readouterr()
    assert "20.0" in printed.out and "10.0" not in printed.out and f"{tmp_path / 'a'} counts" in printed.err


def test_pictures_against_parameters_and_shots_show_what_the_runs_had(tmp_path, monkeypatch):
    for shots, low in ((1, 50.0), (4, 60.0)):
        write_run(tmp_path / "runs" / f"{shots}", shots=shots, accuracy=dict(A=[low, low + 2], B=[low, low]))
    drawn = {}
    plt = tables.pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)
    common.commands(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--plot"])
    for number in plt.get_fignums():
        for axis in plt.figure(number).axes:
            drawn[axis.get_xlabel(), axis.get_title()] = [(list(x), list(y)) for x, y in (line.get_data() for line in axis.lines)]
    monkeypatch.undo()
    plt.close("all")
    first = drawn["images a class", "pets, tiny: A"]
    assert ([1, 4], [51.0, 61.0]) in first and ([1, 4], [50.0, 50.0]) in first  # the method and zero-shot CLIP
    assert ([1, 4], [50.5, 60.5]) in drawn["images a class", "pets, tiny: average"]
    assert ([1234], [50.5]) in drawn["trainable parameters", "pets, 1 shots, tiny"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"table.md", "table.csv", "parameters.png", "shots.png"}


@pytest.mark.parametrize("words, says", [
    (["table", "nowhere"], ["no folder nowhere"]), (["table", "empty"], ["no finished run", "empty"]),
    (["table", "broken"], ["result.json", "take it away"]), (["table", "good", "--plot"], ["--plot needs --out"]),
    (["tabel"], ["'tabel'", "did you mean 'table'"]), ([], ["zero-shot"]),
    (["probe", "--seeds", "1", "1"], ["--seeds 1 1"]), (["zero-shot", "--clip", "ViT"], ["unknown backbone 'ViT'"]),
    (["zero-shot", "--out", "good"], ["good holds another result"])])
def test_bad_words_are_met_with_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir(), write_run(tmp_path / "good"), write_run(tmp_path / "broken", accuracy=dict(A=[1.0], B=[1.0]))
    monkeypatch.setattr(sys, "argv", ["common.py", *words])
    with pytest.raises(SystemExit) as stopped:
        common.script(common.commands)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and all(word in line for word in says)


# ---------------------------------------------------------------------------------------------- zero-shot CLIP and the probe

def test_an_ensemble_is_the_mean_of_unit_length_text_features(small):
    names, templates = ["cup", "red ball"], ["a photo of a {}.", "i love my {}!"]
    single = [F.normalize(small.encode_text(common.clip.tokenize([t.format(n) for n in names])), dim=-1) for t in templates]
    mean = (single[0] + single[1]) / 2
    assert (baselines.ensemble(small, names, templates) - mean / mean.norm(dim=1, keepdim=True)).abs().max() < 1e-5


def test_a_task_has_the_templates_of_its_name_or_benchmark_or_the_general_ones():
    known, task = baselines.read_templates(), small_tasks("Oxford Pets")[0]
    assert baselines.templates_of(task, "coop10") == ["a photo of a {}, a type of pet."]
    task.name = "aquatic mammals"
    assert baselines.templates_of(task, "cifar100") == known["cifar100"] and len(known["cifar100"]) == 18
    assert baselines.templates_of(task, "some/folder") == known["other"] != known["emoji"]
    assert len(known["ucf101"]) == 48 and known["dtd"] == known["describabletextures"]
    assert all("{}" in template for templates in known.values() for template in templates)


def test_logistic_regression_is_where_its_gradient_vanishes_and_a_strong_penalty_keeps_the_start():
    torch.manual_seed(0)
    x, y, start = F.normalize(torch.randn(12, 5), dim=-1), torch.arange(12) % 3, torch.randn(3, 5)
    weights, bias = baselines.fit(x, y, start, 0.1, scale=7.0)
    error = (7 * x @ weights.t() + bias).softmax(1) - F.one_hot(y, 3)           # by hand: dL/dV = 7 error^T x / n + 0.1 V, dL/db = mean
    assert (7 * error.t() @ x / 12 + 0.1 * (weights - start)).abs().max() < 1e-3 and error.mean(0).abs().max() < 1e-3
    assert (weights - start).abs().max() > 0.1 and (baselines.fit(x, y, start, 1e6, 7.0)[0] - start).abs().max() < 1e-3


def test_the_probes_strength_comes_from_held_out_training_images(small, monkeypatch):
    """Every test image is read once, at the end, and what is held out is not fitted on."""
    task, seen = small_tasks("drawn")[0], []
    fit = baselines.fit
    monkeypatch.setattr(baselines, "fit", lambda x, *more: seen.append(len(x)) or fit(x, *more))
    train = baselines.unit_features(small, task.train, common.clip.clip._transform(32))
    task.test = None
    strength = baselines.choose_strength(small, None, task, 1, torch.zeros(3, 32), 10.0, train)
    assert strength in baselines.STRENGTHS and set(seen) == {5}                 # of 6, a fifth held out
    task.train = task.train.subset([0, 1, 2])                                   # an image a class: none can be spared
    assert baselines.choose_strength(small, None, task, 1, torch.zeros(3, 32), 10.0, train) is None


def test_zero_shot_and_probe_end_with_the_closing_table_and_a_result(tmp_path, tiny, monkeypatch, capsys):
    data = make_tree(tmp_path / "shapes", {f"{d}/{c}": 6 for d in ("drawn", "painted") for c in ("cup", "hat")})
    monkeypatch.setattr(common, "load_clip", lambda *args: tiny)
    for name, words in (("zero-shot", ["--templates", "ensemble"]), ("probe", ["--start", "zero-shot"])):
        out = ["--out", str(tmp_path / "runs" / name)]
        common.commands([name, "--data", str(data), "--clip", "tiny", "--shots", "3", "--seeds", "1", "2", *words, *out])
        printed = capsys.readouterr().out
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        assert re.search(rf"zero-shot +{name.replace('-', '_')}\n", printed)
        assert re.search(r"average +\d+\.\d +\d+\.\d ± \d+\.\d\n", printed)
        assert result["variant"] == "with " + " ".join(words) and len(result["accuracy"]["drawn"]) == 2
    assert result["trainable_parameters"] == 2 * 2 * (192 + 1) and len(result["l2"]) == 2
    common.commands(["table", str(tmp_path / "runs")])
    assert "probe (with --start zero-shot)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- predictions

NAMES = ["cup", "hat", "red ball", "dog", "cat", "bird"]


def saved_run(method, tmp_path, model, monkeypatch):
    """(module, random prompts, path of the prompts.pt that they are saved in) of two tasks; the dataset does not exist."""
    module, seen = common.load_method(method), []
    with monkeypatch.context() as patch:
        patch.setattr(common, "run_seeds", lambda args, *more, **other: seen.append(args))
        module.main(["--data", str(tmp_path / "gone"), "--shots", "1", "--clip", "tiny", "--n-ctx", "4", "--out", str(tmp_path / "run")])
    tasks = [common.Task(name, NAMES, "a drawing of a {}", [], []) for name in ("drawn", "painted")]
    torch.manual_seed(3)
    prompts = module.build(seen[0], model, tasks)
    if method == "mmap":
        prompts.set_groups([[0], [1]])
    with torch.no_grad():
        for p in [*prompts.parameters(), *(b for name, b in prompts.named_buffers() if name.startswith("classifier"))]:
            p.add_(0.3 * torch.randn_like(p))
    run = common.Run(seen[0])
    run.folder.mkdir()
    run.save_prompts(1, prompts, tasks)
    return module, prompts, run.folder / "prompts.pt"


def by_hand(method, model, prompts, x):
    """Probabilities [B, C] of the task "painted", the second, from the encoders alone; x: images [B, 3, H, W]."""
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    classify = lambda image, text: (model.logit_scale.exp() * unit(image) @ unit(text).t()).softmax(-1)
    if method == "coop_mt":
        return classify(common.encode_image(model, x), common.encode_text(model, common.tokenize(NAMES, 4), prompts.vectors))
    if method == "vpt_mt":
        words = common.encode_text(model, common.clip.tokenize([f"a drawing of a {name}." for name in NAMES]))
        return classify(common.encode_image(model, x, prompts.vectors[:, 0]), words)
    if method == "maple_mt":
        one = prompts.sets[0]
        return classify(common.encode_image(model, x, one.image_prompts()),
                        common.encode_text(model, common.tokenize(NAMES, 4), one.text_prompts()))
    if method == "mvlpt":
        text, image = prompts.targets[1]()
        return classify(common.encode_image(model, x, image), common.encode_text(model, common.tokenize(NAMES, 4), text))
    if method == "mmap":
        both = prompts.shared[1], prompts.specific[1]
        text = common.encode_text(model, common.tokenize(NAMES, 8), torch.cat([one.text_prompts() for one in both], dim=1))
        return classify(common.encode_image(model, x, torch.cat([one.image_prompts() for one in both], dim=1)), text)
    if method == "hipro":
        return (model.logit_scale.exp() * unit(common.encode_image(model, x)) @ prompts.classifier_1.t()).softmax(-1)
    p = prompts
    text = common.encode_text(model, common.tokenize(NAMES, 8), torch.cat([p.P_l_shared[0], p.P_l[1]])[None])
    image = common.encode_image(model, x, torch.cat([p.P_v_shared[0], p.P_v[1]], dim=1))
    mlp = lambda x: F.relu(x @ p.W_1[0].t() + p.b_1[0]) @ p.W_2[0].t() + p.b_2[0]
    masked = torch.sigmoid(p.m[1]) * image
    return classify(mlp(masked + mlp(masked)), text)


@pytest.mark.parametrize("method", ["coop_mt", "vpt_mt", "maple_mt", "mvlpt", "hipro", "mmap", "jscpt"])
def test_predictions_are_the_probabilities_computed_by_hand_and_need_no_dataset(method, tmp_path, tiny, monkeypatch, capsys):
    model, preprocess = tiny
    monkeypatch.setattr(common, "load_clip", lambda *args: tiny)
    module, prompts, path = saved_run(method, tmp_path, model, monkeypatch)
    images = [noise(1), noise(2)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    module.main(["--eval", str(path), "--task", "painted", "--predict", str(tmp_path / "0.png"), str(tmp_path / "1.png")])
    head, *blocks = capsys.readouterr().out.strip().split("\n\n")
    assert head == "painted, seed 1, per cent" and len(blocks) == 2
    with torch.no_grad():
        expected = by_hand(method, model, prompts, torch.stack([preprocess(image) for image in images]))
    for i, (block, row) in enumerate(zip(blocks, expected)):
        name, *lines = block.split("\n")
        best = row.argsort(descending=True)[:5].tolist()
        assert name == str(tmp_path / f"{i}.png") and [line[6:].strip() for line in lines] == [NAMES[k] for k in best]
        assert [float(line[:6]) for line in lines] == pytest.approx([100 * row[k].item() for k in best], abs=0.06)


@pytest.mark.parametrize("words, says", [
    (["--predict", "0.png"], ["2 tasks", "--task", "drawn, painted"]),
    (["--predict", "0.png", "--task", "painter"], ["no task 'painter'", "did you mean 'painted'"]),
    (["--predict", "none.png", "--task", "drawn"], ["no image none.png"]),
    (["--predict", "0.png", "text.png", "--task", "drawn"], ["text.png cannot be decoded"]),
    (["--task", "drawn"], ["--task belongs to --predict"]),
    (["--predict", "0.png", "--task", "drawn", "--seeds", "4"], ["seeds 1, not of 4"])])
def test_what_cannot_be_predicted_is_refused_in_one_line(words, says, tmp_path, tiny, monkeypatch, capsys):
    module, _, path = saved_run("coop_mt", tmp_path, tiny[0], monkeypatch)
    monkeypatch.chdir(tmp_path)
    noise(1).save("0.png"), (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(sys, "argv", ["coop_mt.py", "--eval", str(path), *words])
    with pytest.raises(SystemExit) as stopped:
        common.script(module.main)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and all(word in line for word in says)


def test_a_file_without_templates_takes_them_from_the_dataset(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(common, "load_clip", lambda *args: tiny)
    module, _, path = saved_run("vpt_mt", tmp_path, tiny[0], monkeypatch)
    saved = torch.load(path, weights_only=True)
    del saved["templates"]
    torch.save(saved, path)
    noise(1).save(tmp_path / "0.png")
    words = ["--eval", str(path), "--task", "drawn", "--predict", str(tmp_path / "0.png")]
    with pytest.raises(common.UserError, match="gone"):
        module.main(words)
    make_tree(tmp_path / "gone", {f"{d}/{c}": 2 for d in ("drawn", "painted") for c in NAMES})
    module.main(words)
    assert "drawn, seed 1" in capsys.readouterr().out
