"""The papers' numbers, the tables of finished runs, zero-shot CLIP and the linear probe, and
predictions with saved prompts."""

import csv
import json
import math
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


# --------------------------------------------------------------------------------------------------
# -- the papers' numbers

N_TASKS = dict(officehome=4, minidomainnet=4, domainnet=6, elevater20=20)
INCONSISTENT = {
    ("HiPro", "Table 2", "IMTL", 0.01): "51.01",  # the mean of the rows
    ("JSCPT", "Table 1", "VPT, multi", 0.2): "85.425",
    ("MmAP", "Table 1", "BitFit", 0.2): "81.3",
}


def test_a_printed_average_is_that_of_its_rows_but_for_three_that_the_papers_print_so():
    """Rows and average are rounded each, so the average may be off by a unit of the last digit, and
    no more."""
    found, checked = {}, 0
    for c in COLUMNS:
        numbers = {
            task: Decimal(printed.split(" ± ")[0]) for task, printed in c["results"].items()
        }
        average, rows = numbers.pop("average"), list(numbers.values())
        if rows and c["data"] != "elevater12":  # MVLPT prints 11 of its 12 tasks
            assert len(rows) == N_TASKS[c["data"]]
            checked += 1
            unit = Decimal(1).scaleb(average.as_tuple().exponent)
            if abs(sum(rows) / len(rows) - average) > unit:
                found[c["paper"], c["table"], c["column"], c["split"]] = str(
                    (sum(rows) / len(rows)).normalize()
                )
        elif rows:
            assert (
                len(rows) == 11 and 80 < 12 * average - sum(rows) < 100
            )  # what is left for CIFAR-10
    assert found == INCONSISTENT and checked > 90


def test_a_papers_number_stands_beside_a_run_with_its_settings_and_no_other(capsys):
    tasks = ["Art", "Clipart", "Product", "Real World"]
    result = dict(
        method="jscpt",
        variant=None,
        data="officehome",
        split=0.1,
        shots=None,
        clip="ViT-B/16",
        epochs=50,
        lr=0.0015,
        batch_size=16,
        batches="tasks",
        n_ctx=16,
        validate=False,
        seeds=[1],
        tasks=tasks,
        zero_shot=dict.fromkeys(tasks, 80.0),
        accuracy=dict.fromkeys(tasks, [81.0]),
        average=[81.0],
        trainable_parameters=1,
        clip_parameters=2,
        seconds=[1.0],
    )
    shown = [
        ({}, ("JSCPT, Table 1", "86.5 ± 0.3")),
        (dict(variant="with --cagrad"), ("JSCPT, Table 4", "85.6")),
        (dict(method="mmap", epochs=5, lr=0.0035), ("MmAP, Table 1", "86.5 ± 0.6")),
        (
            dict(method="hipro", clip="RN50", epochs=100, lr=0.001, batch_size=20, batches="mixed"),
            ("HiPro, Table 1", "78.5 ± 0.2"),
        ),
    ]
    for changes, words in shown:
        common.print_table(dict(result, **changes))
        printed = capsys.readouterr().out
        assert all(word in printed for word in words), changes
    for changes in (
        dict(variant="with --scale 1"),
        dict(lr=0.01),
        dict(n_ctx=4),
        dict(batch_size=4),
        dict(batches="mixed"),
        dict(validate=True),
    ):
        common.print_table(dict(result, **changes))
        assert "Table" not in capsys.readouterr().out, changes


def test_the_default_settings_of_a_method_are_those_of_its_papers_column():
    """The variant is empty, and the paper's column is found, with nothing but the data given."""
    for name, paper in dict(
        mmap="MmAP", coop_mt="MmAP", vpt_mt="MmAP", maple_mt="MmAP", hipro="HiPro", jscpt="JSCPT"
    ).items():
        args = common.load_method(name).Args(data="officehome", split=0.1)
        settings = dict(vars(args), method=name, variant=common.variant_of(args), validate=False)
        assert settings["variant"] is None
        assert paper in {column["paper"] for column in common.paper_columns(settings)}, name


def test_numbers_of_two_papers_stand_side_by_side_with_one_decimal_and_a_note(capsys):
    settings = dict(
        data="officehome",
        split=0.1,
        shots=None,
        validate=False,
        tasks=["Real World"],
        zero_shot={"Real World": 80.0},
        accuracy={"Real World": [81.0]},
        average=[81.0],
        trainable_parameters=1,
        clip_parameters=2,
        seconds=[1.0],
        seeds=[1],
        variant=None,
    )
    common.print_table(
        dict(
            settings,
            method="zero_shot",
            clip="ViT-B/16",
            epochs=None,
            lr=None,
            batch_size=None,
            n_ctx=None,
            batches="tasks",
        )
    )
    printed = capsys.readouterr().out
    assert re.search(r"MmAP, Table 1 +JSCPT, Table 1\n", printed) and re.search(
        r"Real World +80.0 +81.0 +90.1 +89.8\n", printed
    )
    common.print_table(
        dict(
            settings,
            method="hipro",
            clip="RN50",
            epochs=100,
            lr=0.001,
            batch_size=20,
            n_ctx=16,
            batches="mixed",
        )
    )
    assert re.search(
        r"Real World .* 85.8 ± 0.1\n", capsys.readouterr().out
    )  # printed: 85.81 ± 0.14
    common.print_table(
        dict(
            settings,
            method="mmap",
            clip="ViT-B/16",
            epochs=50,
            lr=0.0015,
            batch_size=16,
            n_ctx=16,
            batches="tasks",
        )
    )
    assert "JSCPT, Table 1: the paper keeps its learning rate" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# - tables of finished runs


def write_run(folder, **changes):
    result = dict(
        method="coop_mt",
        variant=None,
        data="pets",
        split=None,
        shots=4,
        clip="tiny",
        epochs=5,
        lr=0.1,
        batch_size=4,
        batches="tasks",
        n_ctx=4,
        validate=False,
        seeds=[1, 2],
        tasks=["A", "B"],
        zero_shot=dict(A=50.0, B=30.0),
        accuracy=dict(A=[60.0, 62.0], B=[40.0, 41.0]),
        trainable_parameters=1234,
        clip_parameters=10,
        seconds=[1.0, 1.0],
    )
    result.update(changes)
    result["average"] = [sum(x) / 2 for x in zip(*result["accuracy"].values())]
    plain = {task: [value] * len(result["seeds"]) for task, value in result["zero_shot"].items()}
    result.setdefault("zero_shot_by_seed", plain)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_runs_become_columns_and_their_seeds_are_joined(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b", seeds=[3], accuracy=dict(A=[64.0], B=[45.0]))
    write_run(tmp_path / "runs" / "c", epochs=9)
    write_run(
        tmp_path / "runs" / "d",
        method="mmap",
        variant="with --no-specific",
        seeds=[7],
        accuracy=dict(A=[1.0], B=[3.0]),
    )
    write_run(tmp_path / "runs" / "e", validate=True, accuracy=dict(A=[99.0, 99.0], B=[99.0, 99.0]))
    write_run(tmp_path / "runs" / "f", split=0.1, shots=None)
    common.commands(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "left out: 1 run of --validate" in printed.err and "99.0" not in printed.out
    markdown = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert re.findall(r"\*\*(.*)\*\*", markdown) == ["pets, 4 shots, tiny", "pets, split 0.1, tiny"]
    head, _, first, second, average = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.split("\n")[2:7]
    ]
    assert head == [
        "",
        "zero-shot",
        "coop_mt, --epochs 5",
        "coop_mt, --epochs 9",
        "mmap (with --no-specific)",
    ]
    assert first == ["A", "50.0", "62.0 ± 2.0", "61.0 ± 1.4", "1.0"] and second == [
        "B",
        "30.0",
        "42.0 ± 2.6",
        "40.5 ± 0.7",
        "3.0",
    ]
    assert average == [
        "average",
        "40.0",
        "52.0 ± 2.3",
        "50.8 ± 1.1",
        "2.0",
    ]  # of 50, 51.5, 54.5 and of 50, 51.5
    assert "62.0 ± 2.0" in printed.out and "1 2 3" in printed.out and "1,234" in printed.out
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open(encoding="utf-8")))
    mine = {
        row["seed"]: float(row["accuracy"])
        for row in rows
        if [row[k] for k in ("label", "task")] == ["coop_mt, --epochs 5", "average"]
        and row["shots"] == "4.0"
    }
    assert len(rows) == 24 and mine == {"1": 50.0, "2": 51.5, "3": 54.5}


def test_differences_to_a_baseline_are_paired_by_seed(tmp_path, capsys):
    """Averages 50, 51.5 of two seeds against 53, 52.5 and one seed more: +3 and +1."""
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b", method="mmap", seeds=[1, 2, 3],
              accuracy=dict(A=[66.0, 65.0, 9.0], B=[40.0, 40.0, 9.0]))
    write_run(tmp_path / "runs" / "c", method="hipro", seeds=[2], accuracy=dict(A=[50.0], B=[50.0]))
    write_run(tmp_path / "runs" / "d", method="jscpt", seeds=[9], accuracy=dict(A=[50.0], B=[50.0]))
    common.commands(["table", str(tmp_path / "runs"), "--baseline", "coop_mt"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.split("  +", last) == ["minus coop_mt", "+2.0 ± 1.0", "-1.5"]
    common.commands(["table", str(tmp_path / "runs"), "--baseline", "zero-shot"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.split("  +", last)[2:] == ["-1.8 ± 14.6", "+10.0", "+10.0"]   # 13, 12.5 and -31


def test_zero_shot_clip_is_paired_by_seed_too(tmp_path, capsys):
    """Averages 50 and 51.5 over zero-shot's 44 and 45.5 of the same seeds: 6 each."""
    write_run(tmp_path / "a", zero_shot_by_seed=dict(A=[54.0, 55.0], B=[34.0, 36.0]))
    common.commands(["table", str(tmp_path), "--baseline", "zero-shot"])
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("  +6.0 ± 0.0")


def test_the_zero_shot_column_is_the_mean_over_all_seeds_of_the_table(tmp_path, capsys):
    """One run with seeds 1, 2 and one with 2, 3: each seed counts once, in the rows and on average,
    whichever run finished first."""
    write_run(tmp_path / "a", zero_shot_by_seed=dict(A=[10.0, 40.0], B=[30.0, 30.0]))
    write_run(tmp_path / "b", method="mmap", seeds=[2, 3],
              zero_shot_by_seed=dict(A=[40.0, 70.0], B=[30.0, 90.0]))
    for first in ("a", "b"):
        os.utime(tmp_path / first / "result.json", (1, 1))
        common.commands(["table", str(tmp_path)])
        rows = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
        plain = {row[0]: row[1] for row in rows if row[0] in ("A", "B", "average")}
        assert plain == dict(A="40.0", B="50.0", average="45.0")
        os.utime(tmp_path / first / "result.json")


def test_the_settings_of_another_benchmark_do_not_change_a_label(tmp_path, capsys):
    """A method runs with other epochs on other data; only twins on one benchmark are told apart."""
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", data="animals", epochs=15)
    common.commands(["table", str(tmp_path), "--baseline", "coop_mt"])
    assert "--epochs" not in capsys.readouterr().out


def test_of_two_runs_of_a_seed_the_later_counts_and_a_line_says_so(tmp_path, capsys):
    write_run(tmp_path / "z", seeds=[1], accuracy=dict(A=[10.0], B=[10.0]))
    write_run(tmp_path / "a", seeds=[1], accuracy=dict(A=[20.0], B=[20.0]))
    os.utime(tmp_path / "z" / "result.json", (1, 1))
    common.commands(["table", str(tmp_path)])
    printed = capsys.readouterr()
    assert (
        "20.0" in printed.out
        and "10.0" not in printed.out
        and f"{tmp_path / 'z'} has a seed" in printed.err
    )


def test_pictures_against_parameters_and_shots_show_what_the_runs_had(tmp_path, monkeypatch):
    for shots, low in ((1, 50.0), (4, 60.0)):
        write_run(
            tmp_path / "runs" / f"{shots}",
            shots=shots,
            accuracy=dict(A=[low, low + 2], B=[low, low]),
        )
    drawn = {}
    plt = common.pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)
    common.commands(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--plot"])
    for number in plt.get_fignums():
        for axis in plt.figure(number).axes:
            lines = [line.get_data() for line in axis.lines]
            drawn[axis.get_xlabel(), axis.get_title()] = [(list(x), list(y)) for x, y in lines]
    monkeypatch.undo()
    plt.close("all")
    first = drawn["images per class", "pets, tiny: A"]
    assert ([1, 4], [51.0, 61.0]) in first and (
        [1, 4],
        [50.0, 50.0],
    ) in first  # the method and zero-shot CLIP
    assert ([1, 4], [50.5, 60.5]) in drawn["images per class", "pets, tiny: average"]
    assert ([1234], [50.5]) in drawn["trainable parameters", "pets, 1 shots, tiny"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "table.md",
        "table.csv",
        "parameters.png",
        "shots.png",
    }


@pytest.mark.parametrize(
    "words, says",
    [
        (["table", "nowhere"], ["no folder", "nowhere"]),
        (["table", "empty"], ["no finished run", "empty"]),
        (["table", "broken"], ["result.json", "take it away"]),
        (["table", "good", "--plot"], ["--plot needs --out"]),
        (["table", "good", "--baseline", "mmap"], ["'mmap' is no column", "zero-shot, coop_mt"]),
        (["tabel"], ["'tabel'", "did you mean 'table'"]),
        ([], ["usage: python common.py check|zero-shot"]),
        (["table", "good", "--out", "file"], ["file is a file or read-only"]),
        (["probe", "--seeds", "1", "1"], ["--seeds 1 1"]),
        (["zero-shot", "--clip", "ViT"], ["unknown backbone 'ViT'"]),
        (["zero-shot", "--out", "good"], ["good holds another result"]),
        (["zero-shot", "--out=~/good"], ["good holds another result"]),
        (["zero-shot", "--out", "file/run"], ["file is a file or read-only"]),
        (["probe", "--data", "a=tree/a,b=tree/b", "--shots", "1", "--clip", "tiny"], ["task b"]),
    ],
)
def test_bad_words_are_met_with_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    make_tree(tmp_path / "tree", {"a/cup": 2, "a/hat": 2, "b/cup": 2})
    write_run(tmp_path / "good")
    write_run(tmp_path / "broken", accuracy=dict(A=[1.0], B=[1.0]))
    monkeypatch.setattr(sys, "argv", ["common.py", *words])
    with pytest.raises(SystemExit) as stopped:
        common.script(common.commands)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and all(word in line for word in says)


@pytest.mark.parametrize(
    "changes",
    [
        dict(zero_shot_by_seed=[50.0, 30.0]),
        dict(zero_shot_by_seed=dict(A=[50.0, 50.0])),
        dict(zero_shot_by_seed=dict(A=[50.0, 50.0], B=[30.0])),
        dict(average=[50.0]),
        dict(trainable_parameters=None),
        dict(seeds=3),
        dict(tasks=[]),
    ],
)
def test_a_damaged_result_is_named(changes, tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **changes)))
    with pytest.raises(common.UserError, match="run/result.json does not hold the result"):
        common.commands(["table", str(tmp_path)])


# ----------------------------------------------------------------------------------------------
# zero-shot CLIP and the probe


def test_an_ensemble_is_the_mean_of_unit_length_text_features(small):
    names, templates = ["cup", "red ball"], ["a photo of a {}.", "i love my {}!"]
    single = []
    for template in templates:
        tokens = common.clip.tokenize([template.format(name) for name in names])
        single.append(F.normalize(small.encode_text(tokens), dim=-1))
    mean = (single[0] + single[1]) / 2
    wanted = mean / mean.norm(dim=1, keepdim=True)
    assert (common.ensemble(small, names, templates) - wanted).abs().max() < 1e-5


def test_a_task_has_the_templates_of_its_name_or_benchmark_or_the_general_ones():
    task = small_tasks("Oxford Pets")[0]
    assert common.templates_of(task, "coop10") == ["a photo of a {}, a type of pet."]
    task.name = "aquatic mammals"
    other = common.templates_of(task, "some/folder")
    assert len(common.templates_of(task, "cifar100")) == 18 and all("{}" in x for x in other)
    assert other != common.templates_of(task, "emoji")


def test_the_probe_is_scikit_learns_regression_with_a_strength_from_held_out_images(tmp_path, tiny):
    """By hand: features at unit length, C chosen on the held-out part, then fitted on all."""
    from sklearn.linear_model import LogisticRegression

    data = make_tree(
        tmp_path / "shapes",
        {f"{d}/{c}": 9 for d in ("drawn", "painted") for c in ("cup", "hat", "dog")},
    )
    common.commands(
        [
            "probe",
            "--data",
            str(data),
            "--shots",
            "5",
            "--clip",
            "tiny",
            "--workers",
            "0",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for i, task in enumerate(common.load_tasks(str(data), shots=5)):

        def unit(images):
            x, _, y = common.image_features(tiny[0], images, workers=0)
            return F.normalize(x, dim=-1).numpy(), y.numpy()

        rest, held = common.hold_out(task.train, 1)
        assert len(held) == 3
        losses, (x, y) = {}, unit(held)
        for k in range(-2, 6):
            chance = LogisticRegression(C=10.0**k, max_iter=1000).fit(*unit(rest)).predict_proba(x)
            losses[10.0**k] = -sum(math.log(max(p[k], 1e-20)) for p, k in zip(chance, y))
        best = min(losses, key=losses.get)
        assert result["C"][0][i] == pytest.approx(best)
        hits = (
            LogisticRegression(C=best, max_iter=1000).fit(*unit(task.train)).score(*unit(task.test))
        )
        assert result["accuracy"][task.name] == [pytest.approx(100 * hits)]
    assert result["trainable_parameters"] == 2 * 3 * (192 + 1)


def test_zero_shot_ends_with_the_closing_table_and_a_result(tmp_path, capsys):
    data = make_tree(
        tmp_path / "shapes", {f"{d}/{c}": 6 for d in ("drawn", "painted") for c in ("cup", "hat")}
    )
    common.commands(
        [
            "zero-shot",
            "--data",
            str(data),
            "--clip",
            "tiny",
            "--shots",
            "3",
            "--seeds",
            "1",
            "2",
            "--templates",
            "ensemble",
            "--out",
            str(tmp_path / "runs" / "z"),
        ]
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "runs" / "z" / "result.json").read_text())
    assert re.search(r"average +\d+\.\d +\d+\.\d ± \d+\.\d\n", printed)
    assert (
        result["variant"] == "with --templates ensemble" and len(result["accuracy"]["drawn"]) == 2
    )
    common.commands(["table", str(tmp_path / "runs")])
    assert "zero_shot (with --templates ensemble)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# ----------- predictions

NAMES = ["cup", "hat", "red ball", "dog", "cat", "bird"]


def saved_run(method, tmp_path, model):
    """(module, random prompts, path of their prompts.pt) of two tasks; the dataset does not
    exist."""
    module = common.load_method(method)
    args = module.Args(
        data=str(tmp_path / "gone"),
        shots=1,
        clip="tiny",
        n_ctx=4,
        device="cpu",
        out=str(tmp_path / "run"),
    )
    tasks = [
        common.Task(name, NAMES, "a drawing of a {}", common.Images([], []), None)
        for name in ("drawn", "painted")
    ]
    torch.manual_seed(3)
    prompts = module.build(args, model, tasks)
    if method == "mmap":
        prompts.set_groups([[0], [1]])
    if method == "hipro":
        prompts.set_nodes([(0,), (1,), (0, 1)])
    with torch.no_grad():
        for p in prompts.parameters():
            p.add_(0.3 * torch.randn_like(p))
    run = common.Run(args, dict(common.asdict(args), method=method))
    run.folder.mkdir()
    run.seed = 1
    run.save_prompts({k: v.detach() for k, v in prompts.state_dict().items()}, tasks)
    return module, prompts, run.folder / "prompts.pt"


def by_hand(method, model, prompts, x):
    """Probabilities [B, C] of the second task from the encoders alone; x: images [B, 3, H, W]."""

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def text(prompts, n=4):
        return common.encode_text(model, common.tokenize(NAMES, n), prompts)

    def classify(image, text):
        return (model.logit_scale.exp() * unit(image) @ unit(text).t()).softmax(-1)

    p = prompts
    if method == "coop_mt":
        return classify(common.encode_image(model, x), text(p.vectors[None]))
    if method == "vpt_mt":
        words = common.clip.tokenize([f"a drawing of a {name}." for name in NAMES])
        return classify(common.encode_image(model, x, p.vectors), common.encode_text(model, words))
    if method == "maple_mt":
        return classify(common.encode_image(model, x, p.image_prompts()), text(p.text_prompts()))
    if method == "mvlpt":
        text_prompts, image_prompts = p.targets[1]()
        return classify(common.encode_image(model, x, image_prompts), text(text_prompts))
    if method == "mmap":
        both = p.shared[1], p.specific[1]
        image = torch.cat([one.image_prompts() for one in both], dim=1)
        words = torch.cat([one.text_prompts() for one in both], dim=1)
        return classify(common.encode_image(model, x, image), text(words, 8))
    if method == "hipro":
        mean = (unit(text(p.vectors[1][None])) + unit(text(p.vectors[2][None]))) / 2
        scores = model.logit_scale.exp() * unit(common.encode_image(model, x)) @ mean.t()
        return scores.softmax(-1)
    image = common.encode_image(model, x, torch.cat([p.P_v_shared[0], p.P_v[1]], dim=1))
    words = text(torch.cat([p.P_l_shared[0], p.P_l[1]])[None], 8)

    def mlp(z):
        return z + F.relu(z @ p.W_1[0].t() + p.b_1[0]) @ p.W_2[0].t() + p.b_2[0]

    masked = torch.sigmoid(p.m[1]) * image
    return classify(mlp(masked + mlp(masked)), words)


@pytest.mark.parametrize(
    "method", ["coop_mt", "vpt_mt", "maple_mt", "mvlpt", "hipro", "mmap", "jscpt"]
)
def test_predictions_are_the_probabilities_computed_by_hand_and_need_no_dataset(
    method, tmp_path, tiny, capsys
):
    model, preprocess = tiny
    _, prompts, path = saved_run(method, tmp_path, model)
    images = [noise(1), noise(2)]
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for image, file in zip(images, files):
        image.save(file)
    capsys.readouterr()
    common.commands(["predict", str(path), *files, "--task", "painted", "--device", "cpu"])
    head, *blocks = capsys.readouterr().out.strip().split("\n\n")
    assert head == "painted, seed 1, %" and len(blocks) == 2
    with torch.no_grad():
        pictures = torch.stack([preprocess(image) for image in images])
        expected = by_hand(method, model, prompts, pictures)
    for file, block, row in zip(files, blocks, expected):
        name, *lines = block.split("\n")
        best = row.argsort(descending=True)[:5].tolist()
        assert name == file and [line[6:].strip() for line in lines] == [NAMES[k] for k in best]
        wanted = [100 * row[k].item() for k in best]
        assert [float(line[:6]) for line in lines] == pytest.approx(wanted, abs=0.06)


@pytest.mark.parametrize(
    "words, says",
    [
        (["0.png"], ["2 tasks", "--task", "drawn, painted"]),
        (["0.png", "--task", "painter"], ["no task 'painter'", "did you mean 'painted'"]),
        (["none.png", "--task", "drawn"], ["no image", "none.png"]),
        (["0.png", "text.png", "--task", "drawn"], ["text.png cannot be decoded"]),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_one_line(
    words, says, tmp_path, tiny, monkeypatch, capsys
):
    _, _, path = saved_run("coop_mt", tmp_path, tiny[0])
    monkeypatch.chdir(tmp_path)
    noise(1).save("0.png")
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.setattr(sys, "argv", ["common.py", "predict", str(path), *words])
    with pytest.raises(SystemExit) as stopped:
        common.script(common.commands)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and all(word in line for word in says)


def change(path, **changes):
    """Save a prompts.pt again, with some of its values replaced."""
    torch.save(dict(torch.load(path, weights_only=True), **changes), path)


def test_the_prompts_of_single_tasks_predict_their_own_task(tmp_path, tiny, capsys):
    model, preprocess = tiny
    _, prompts, path = saved_run("coop_mt", tmp_path, model)
    saved = torch.load(path, weights_only=True)
    apart = dict(drawn={"vectors": torch.zeros(4, 128)}, painted=saved["prompts"][1])
    change(path, settings=dict(saved["settings"], single_task=True), prompts={1: apart})
    noise(1).save(tmp_path / "0.png")
    capsys.readouterr()
    words = ["predict", str(path), str(tmp_path / "0.png"), "--device", "cpu"]
    common.commands([*words, "--task", "painted"])
    with torch.no_grad():
        expected = by_hand("coop_mt", model, prompts, preprocess(noise(1))[None])[0]
    first = capsys.readouterr().out.split("\n")[3]
    assert first == f"{100 * expected.max():6.1f}  {NAMES[expected.argmax()]}"


def test_no_file_that_a_prompts_pt_names_is_run(tmp_path, tiny):
    _, _, path = saved_run("coop_mt", tmp_path, tiny[0])
    noise(1).save(tmp_path / "0.png")
    (tmp_path / "other.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for method in (str(tmp_path / "other"), os.path.relpath(tmp_path / "other", ROOT), "common"):
        change(path, method=method)
        with pytest.raises(common.UserError, match="no method file|is damaged"):
            common.commands(["predict", str(path), str(tmp_path / "0.png"), "--task", "drawn"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(prompts={}),
        dict(prompts={1: 3}),
        dict(prompts={1: {}}),
        dict(prompts={1: {"vectors": torch.zeros(3, 128)}}),
        dict(templates={}),
        dict(templates=dict(drawn=5, painted=5)),
        dict(tasks=dict(drawn=3, painted=NAMES)),
        dict(settings={}),
        dict(settings=dict(clip=None)),
        dict(settings=dict(clip="tiny", shots=1, n_ctx="4")),
    ],
)
def test_a_damaged_prompts_pt_is_named(changes, tmp_path, tiny):
    _, _, path = saved_run("coop_mt", tmp_path, tiny[0])
    change(path, **changes)
    noise(1).save(tmp_path / "0.png")
    with pytest.raises(common.UserError, match="prompts.pt (is damaged|do not fit tiny)"):
        common.commands(["predict", str(path), str(tmp_path / "0.png"), "--task", "drawn"])
