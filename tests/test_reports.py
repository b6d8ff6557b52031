"""The papers' numbers, the tables of finished runs, zero-shot CLIP and the linear probe, and
predictions with saved prompts."""

import csv
import json
import math
import os
import re
import shutil
from dataclasses import asdict, replace
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, Phases, make_tree, noise, random_clip, says, small_tasks

import common

COLUMNS = json.loads((ROOT / "data" / "paper_results.json").read_text("utf-8"))["columns"]
NAMES = ["coop_mt", "vpt_mt", "maple_mt", "mvlpt", "hipro", "mmap", "jscpt"]
METHODS = {name: common.load_method(name).METHOD for name in NAMES}


# ------------------------------------------------------------------------------ the papers' numbers

N_TASKS = dict(officehome=4, minidomainnet=4, domainnet=6, elevater20=20)
INCONSISTENT = {
    ("HiPro", "Table 2", "IMTL", 0.01): "51.01",  # the mean of the rows
    ("JSCPT", "Table 1", "VPT, multi", 0.2): "85.425",
    ("MmAP", "Table 1", "BitFit", 0.2): "81.3",
}


def test_every_printed_average_is_that_of_its_rows_except_three():
    """Rows and average are each rounded, so the average may be off by one unit in the last digit,
    but no more."""
    found, checked = {}, 0
    for c in COLUMNS:
        rows = {task: Decimal(text.split(" ± ")[0]) for task, text in c["results"].items()}
        average = rows.pop("average")
        if rows and c["data"] == "elevater12":      # MVLPT prints 11 of its 12 tasks
            assert len(rows) == 11
            assert 80 < 12 * average - sum(rows.values()) < 100     # what is left for CIFAR-10
        elif rows:
            assert len(rows) == N_TASKS[c["data"]]
            checked += 1
            mean = sum(rows.values()) / len(rows)
            if abs(mean - average) > Decimal(1).scaleb(average.as_tuple().exponent):
                found[c["paper"], c["table"], c["column"], c["split"]] = str(mean.normalize())
    assert found == INCONSISTENT and checked > 90


def printed(capsys, name, words, tasks):
    """The closing table of a run of a method on Office-Home with some flags."""
    method = METHODS.get(name, common.ZERO_SHOT)
    args = common.parse(method, f"--data officehome {words}".split())
    settings = dict(asdict(args), method=name, variant=common.variant_of(method, args))
    common.print_table(dict(
        method=name, settings=settings, seeds=[1], tasks=tasks, average=[81.0], seconds=[1.0],
        zero_shot=dict.fromkeys(tasks, 80.0), accuracy=dict.fromkeys(tasks, [81.0]),
        metrics=dict.fromkeys(tasks, "accuracy"), trainable_parameters=1, clip_parameters=2))
    return capsys.readouterr().out


@pytest.mark.parametrize("name, words, shown", [
    ("zero_shot", "", r"MmAP, Table 1, Zero +JSCPT, .*\n(.*\n)+Real World +80.0 +90.1 +89.8"),
    ("mmap", "", r"MmAP, Table 1, .*\n(.*\n)+average +80.0 +81.0 +86.5 ± 0.6"),
    ("mmap", "--epochs 50 --lr 0.0015", "JSCPT, Table 1, MmAP: the paper keeps its learning rate"),
    ("coop_mt", "", r"MmAP, Table 1, .*\n(.*\n)+average +80.0 +81.0 +85.2 ± 0.4"),
    ("vpt_mt", "", r"MmAP, Table 1, .*\n(.*\n)+average +80.0 +81.0 +84.7 ± 0.4"),
    ("maple_mt", "", r"MmAP, Table 1, .*\n"),
    ("hipro", "", r"HiPro, Table 1, .*\n(.*\n)+Real .* 85.8 ± 0.1\naverage .* 78.5 ± 0.2"),
    ("jscpt", "--dev-shots 4", r"JSCPT, Table 1, .*\n(.*\n)+average +80.0 +81.0 +86.5 ± 0.3"),
    ("jscpt", "--dev-shots 4 --cagrad", r"JSCPT, Table 4, .*\n(.*\n)+average +80.0 +81.0 +85.6"),
    *[("jscpt", words, r"^(?!(.*\n)*.*, Table)") for words in
      ("--scale 1", "--lr 0.01", "--n-ctx 4", "--batch-size 4", "--batches mixed", "--validate",
       "--views 2", "--min-crop 0.5")]])
def test_a_papers_number_stands_beside_a_run_with_its_settings_and_no_other(capsys, name, words,
                                                                           shown):
    """HiPro prints 85.81 ± 0.14 and 78.54 ± 0.20; without flags the settings are the paper's."""
    table = printed(capsys, name, f"--split 0.1 {words}",
                    ["Art", "Clipart", "Product", "Real World"])
    assert re.search(shown, table), table


# -------------------------------------------------------------------------- tables of finished runs


def write_run(folder, seeds=(1, 2), zero_shot=None, method="coop_mt", **changes):
    """Write a run's result.json; accuracy 60 and 62 on A, 40 and 41 on B, zero-shot 50 and 30."""
    settings = dict(method=method, variant=None, data="pets", split=None, shots=4, clip="tiny",
                    epochs=15, n_ctx=16, precision="auto", validate=False)
    settings.update({key: changes.pop(key) for key in list(changes) if key in settings})
    accuracy = changes.pop("accuracy", dict(A=[60.0, 62.0], B=[40.0, 41.0]))
    usual = dict(A=[50.0] * len(seeds), B=[30.0] * len(seeds))
    result = dict({key: settings[key] for key in ("method", "data", "split", "shots", "clip")},
                  seeds=seeds, tasks=["A", "B"], accuracy=accuracy,
                  parameters_by_seed=[1234] * len(seeds), settings=settings,
                  seconds=[90.0, 110.0, 130.0][:len(seeds)],
                  zero_shot_by_seed=zero_shot or usual,
                  tests=changes.pop("tests", [f"of seed {seed}" for seed in seeds]))
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(dict(result, **changes)))


def table(capsys, *words):
    """What `common.py table` prints: its rows of cells, and its stderr."""
    common.commands(["table", *map(str, words)])
    out, err = capsys.readouterr()
    return [re.split("  +", line.strip()) for line in out.strip().splitlines()], err


def test_runs_become_columns_and_their_seeds_are_joined(tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    write_run(runs / "a")
    write_run(runs / "b", seeds=[3], accuracy=dict(A=[64.0], B=[45.0]), parameters_by_seed=[1230])
    write_run(runs / "c", epochs=9, n_ctx=4)
    write_run(runs / "d", method="mmap", variant="with --no-specific", seeds=[7], n_ctx=4,
              epochs=10, accuracy=dict(A=[1.0], B=[3.0]))
    write_run(runs / "e", validate=True, accuracy=dict(A=[99.0, 99.0], B=[99.0, 99.0]))
    write_run(runs / "f", split=0.1, shots=None)
    rows, err = table(capsys, runs, "--out", out)
    assert "left out: 1 run with --validate" in err
    assert rows[:9] == [
        ["pets, 4 shots, tiny"],
        ["zero-shot", "CoOp-MT", "CoOp-MT, --epochs 9, --n-ctx 4", "MmAP, --no-specific"],
        ["A", "50.0 ± 0.0", "62.0 ± 2.0", "61.0 ± 1.4", "1.0"],
        ["B", "30.0 ± 0.0", "42.0 ± 2.6", "40.5 ± 0.7", "3.0"],
        ["average", "40.0 ± 0.0", "52.0 ± 2.3", "50.8 ± 1.1", "2.0"],
        ["seeds", "1 2 3 7", "1 2 3", "1 2", "7"],
        ["parameters", "0", "1,230 to 1,234", "1,234", "1,234"],
        ["training, s per seed", "0", "97", "100", "90"],
        [""]]
    assert rows[9] == ["pets, split 0.1, tiny"]
    markdown = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert markdown[0] == "**pets, 4 shots, tiny**"
    assert markdown[4] == "| A | 50.0 ± 0.0 | 62.0 ± 2.0 | 61.0 ± 1.4 | 1.0 |"
    rows = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    first = ("CoOp-MT", "average", "4.0")
    mine = {row["seed"]: float(row["accuracy"]) for row in rows
            if (row["label"], row["task"], row["shots"]) == first}
    assert len(rows) == 24 and mine == {"1": 50.0, "2": 51.5, "3": 54.5}


@pytest.mark.parametrize("data, validate, name", [
    ("emoji", True, "mmap-emoji-4-validate"), ("birds=/a/x,cars=/b/x", False, "mmap-birds-cars-4"),
    ("/a/birds,emoji:Noto+Fluent", False, "mmap-birds-emoji-Noto-Fluent-4")])
def test_a_runs_own_folder_is_named_after_its_tasks_and_what_it_scores(data, validate, name):
    settings = dict(method="mmap", data=data, shots=4, split=None, validate=validate)
    run = common.Run(common.DataArgs(data=data), settings)
    assert run.folder.name == name


def test_runs_on_other_test_images_or_in_another_precision_are_kept_apart(tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seeds=[2, 3], accuracy=dict(A=[1.0, 1.0], B=[1.0, 1.0]),
              tests=["others", "of seed 3"])
    write_run(tmp_path / "c", precision="bf16", seeds=[4], accuracy=dict(A=[2.0], B=[2.0]))
    rows, _ = table(capsys, tmp_path)
    titles = [row[0] for row in rows if row[0].startswith("pets")]
    assert titles == ["pets, 4 shots, tiny", "pets, 4 shots, tiny, other test images (2)"]
    assert rows[1] == ["zero-shot", "CoOp-MT", "CoOp-MT, --precision bf16"]
    assert rows[4][1:] == ["40.0 ± 0.0", "50.8 ± 1.1", "2.0"]


def test_differences_to_a_baseline_are_paired_by_seed(tmp_path, capsys):
    """Averages 50 and 51.5 of two seeds against 53, 52.5 and a third seed: +3 and +1."""
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="mmap", seeds=[1, 2, 3],
              accuracy=dict(A=[66.0, 65.0, 9.0], B=[40.0, 40.0, 9.0]))
    write_run(tmp_path / "c", method="hipro", seeds=[2], accuracy=dict(A=[50.0], B=[50.0]))
    write_run(tmp_path / "d", method="jscpt", seeds=[9], accuracy=dict(A=[50.0], B=[50.0]))
    rows, _ = table(capsys, tmp_path, "--baseline", "coop_mt")
    assert rows[-1][:1] + rows[-1][2:] == ["minus CoOp-MT", "+2.0 ± 1.0", "-1.5"]
    rows, _ = table(capsys, tmp_path, "--baseline", "zero-shot")
    assert rows[-1][2:] == ["-1.8 ± 14.6", "+10.0", "+10.0"]        # 13, 12.5 and -31


def test_zero_shot_clip_is_paired_by_seed_too(tmp_path, capsys):
    """Averages 50 and 51.5 over zero-shot's 44 and 45.5 of the same seeds: 6 each."""
    write_run(tmp_path / "a", zero_shot=dict(A=[54.0, 55.0], B=[34.0, 36.0]))
    rows, _ = table(capsys, tmp_path, "--baseline", "zero-shot")
    assert rows[-1] == ["minus zero-shot", "+6.0 ± 0.0"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_the_zero_shot_column_is_the_mean_over_all_seeds_of_the_table(tmp_path, capsys, first):
    """One run with seeds 1, 2 and one with 2, 3: each seed counts once, in the rows and in the
    average, whichever run finished first."""
    write_run(tmp_path / "a", zero_shot=dict(A=[10.0, 40.0], B=[30.0, 30.0]))
    write_run(tmp_path / "b", method="mmap", seeds=[2, 3],
              zero_shot=dict(A=[40.0, 70.0], B=[30.0, 90.0]))
    os.utime(tmp_path / first / "result.json", (1, 1))
    rows, _ = table(capsys, tmp_path)
    found = [row[1].split(" ±")[0] for row in rows if row[0] in ("A", "B", "average")]
    assert found == ["40.0", "50.0", "45.0"]


def test_the_settings_of_another_benchmark_do_not_change_a_label(tmp_path, capsys):
    """A method may have other epochs on other data; labels only distinguish runs on one benchmark.
    """
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", data="minidomainnet", clip="ViT-B/16", epochs=5)
    rows, _ = table(capsys, tmp_path)
    assert rows.count(["zero-shot", "CoOp-MT"]) == 2


def test_of_two_runs_with_the_same_seed_the_later_counts_and_a_line_says_so(tmp_path, capsys):
    write_run(tmp_path / "z", seeds=[1], accuracy=dict(A=[10.0], B=[10.0]))
    write_run(tmp_path / "a", seeds=[1], accuracy=dict(A=[20.0], B=[20.0]))
    os.utime(tmp_path / "z" / "result.json", (1, 1))
    rows, err = table(capsys, tmp_path)
    assert rows[2] == ["A", "50.0", "20.0"] and f"{tmp_path / 'z'} has a seed" in err


def test_figures_over_parameters_and_shots_show_the_runs_results(tmp_path, monkeypatch):
    """Zero-shot CLIP has 50 and 30, so A gains 1 and 11, B 20 and 30; methods are side by side, a
    method and its variant have one colour."""
    for shots, low in ((1, 50.0), (4, 60.0)):
        accuracy = dict(A=[low, low + 2], B=[low, low])
        write_run(tmp_path / f"{shots}", shots=shots, accuracy=accuracy)
        write_run(tmp_path / f"{shots}-single", shots=shots, variant="with --single-task")
        write_run(tmp_path / f"{shots}-mmap", shots=shots, method="mmap", n_ctx=4, epochs=10)
    drawn, axes = {}, {}
    plt = common.pyplot()
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", lambda figure: None)
        common.commands(f"table {tmp_path} --out {tmp_path}/out --plot".split())
    for number in plt.get_fignums():
        for axis in plt.figure(number).axes:
            lines = [line.get_data() for line in axis.lines]
            lines = [(list(x), list(y)) for x, y in lines]
            drawn[axis.get_xlabel(), axis.get_title()] = lines
            axes[axis.get_title()] = axis
    plt.close("all")
    panels = [axes[name] for name in ("average", "A", "B")]
    gains = [panel.lines[0].get_ydata().tolist() for panel in panels]
    assert gains == [[10.5, 20.5], [1.0, 11.0], [20.0, 30.0]]
    places = torch.tensor([line.get_xdata().tolist() for line in panels[1].lines[:3]])
    wanted = torch.tensor([[-4 / 15], [0], [4 / 15]]) + torch.arange(2)
    assert (places - wanted).abs().max() < 1e-6
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["1", "4"]
    widths = [panel.get_position().width for panel in panels]
    assert widths[0] > 1.9 * widths[1]
    names = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert names == ["CoOp-MT", "CoOp-MT, --single-task", "MmAP"]
    colours = [line.get_color() for line in panels[0].lines[:3]]
    assert colours[0] == colours[1] != colours[2]
    assert ([1234], [50.5]) in drawn["trainable parameters", "pets, 1 shot, tiny"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"table.md", "table.csv", "parameters.png", "shots.png"}


@pytest.mark.parametrize("changes", [
    dict(zero_shot=[50.0, 30.0]),
    dict(zero_shot=dict(A=[50.0, 50.0], B=[30.0])),
    dict(parameters_by_seed=None),
    dict(seeds=[1, 2, 3], zero_shot=dict(A=[50.0] * 3, B=[30.0] * 3)),
    dict(settings={})], ids=str)
def test_a_damaged_result_is_named(changes, tmp_path):
    write_run(tmp_path / "run", **changes)
    with pytest.raises(common.UserError, match="run/result.json cannot be used"):
        common.commands(["table", str(tmp_path)])


# --------------------------------------------------------------------- zero-shot CLIP and the probe


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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(a folder with a tree of two tasks and a random backbone, the flags for both, the backbone,
    its preprocessing)"""
    place = tmp_path_factory.mktemp("place")
    torch.save(random_clip(**TINY).state_dict(), place / "random.pt")
    make_tree(place / "shapes", {f"{domain}/{name}": 9 for domain in ("drawn", "painted")
                                 for name in ("cup", "hat", "dog")})
    words = f"--data {place}/shapes --clip {place}/random.pt --device cpu --workers 0"
    return place, words, *common.load_clip(str(place / "random.pt"))


def test_the_probe_is_scikit_learns_regression_with_c_chosen_on_held_out_images(place, tmp_path,
                                                                                capsys):
    """By hand: unit-length features, C chosen on the held-out part, then fitted on all images."""
    from sklearn.linear_model import LogisticRegression

    folder, words, model, _ = place
    common.commands(f"probe {words} --shots 5 --out {tmp_path}/run".split())
    result = json.loads((tmp_path / "run" / "result.json").read_text())

    def unit(images):
        x, _, y = common.image_features(model, images, workers=0)
        return F.normalize(x, dim=-1).numpy(), y.numpy()

    for i, task in enumerate(common.load_tasks(f"{folder}/shapes", shots=5)):
        rest, held = common.hold_out(task.train, 1)
        assert len(held) == 3
        losses, (x, y) = {}, unit(held)
        for C in (0.01, 0.1, 1, 10, 100, 1000, 10_000, 100_000):
            fitted = LogisticRegression(C=C, max_iter=1000).fit(*unit(rest))
            chance = fitted.predict_proba(x)[range(len(y)), y]
            losses[C] = -sum(math.log(max(p, 1e-20)) for p in chance)
        best = min(losses, key=losses.get)
        assert result["C"][0][i] == pytest.approx(best)
        fitted = LogisticRegression(C=best, max_iter=1000).fit(*unit(task.train))
        hits = fitted.score(*unit(task.test))
        assert result["accuracy"][task.name] == [100 * hits]
    assert result["trainable_parameters"] == 2 * 3 * (32 + 1)
    table = capsys.readouterr().out.split("\n\n")[1]
    common.commands(["probe", "--eval", f"{tmp_path}/run/prompts.pt"])
    assert capsys.readouterr().out.strip("\n").startswith(table + "\n")


def test_with_two_classes_the_probe_has_scikit_learns_probabilities_and_0_for_a_third(small):
    from sklearn.linear_model import LogisticRegression

    [task] = small_tasks("a")
    task.train = task.train.subset([0, 1, 3, 4])            # no image of class 2
    args = common.ProbeArgs(seeds=(1,), workers=0)
    probe = common.PROBE.train(args, small, [task], Phases())
    x, _, y = common.image_features(small, task.train, workers=0)
    x = F.normalize(x, dim=-1)
    [classifier] = common.PROBE.classify(args, small, [task], probe)["classifiers"]
    found = classifier(x).softmax(-1)
    x, y, C = x.numpy(), y.numpy(), probe.C.item()
    expected = LogisticRegression(C=C, max_iter=1000).fit(x, y).predict_proba(x)
    assert found[:, :2].tolist() == pytest.approx(expected, abs=1e-5)
    assert (found[:, 2] == 0).all()


def test_zero_shot_ends_with_the_closing_table_and_a_result(place, tmp_path, capsys):
    """The ensemble's accuracy in the second column is that of classifiers made here."""
    folder, words, model, _ = place
    run = tmp_path / "runs" / "z"
    common.commands(f"zero-shot {words} --shots 3 --seeds 1 2 --templates ensemble --out {run}"
                    .split())
    out = capsys.readouterr().out
    assert re.search(r"average +\d+\.\d +\d+\.\d ± \d+\.\d\n", out) and "seeds 1 2" in out
    result = json.loads((run / "result.json").read_text())
    assert result["trainable_parameters"] == 0
    assert result["settings"]["variant"] == "with --templates ensemble"
    for i, seed in enumerate((1, 2)):
        task = common.load_tasks(f"{folder}/shapes", shots=3, seed=seed)[1]
        w = common.ensemble(model, task.class_names, common.templates_of(task, "no benchmark"))
        x, _, y = common.image_features(model, task.test)
        hits = common.logits(model, x, w).argmax(-1) == y
        expected = 100 * hits.double().mean().item()
        assert result["accuracy"]["painted"][i] == pytest.approx(expected)
    common.commands(f"zero-shot {words} --shots 3 --seeds 1 2 --out {tmp_path}/runs/y".split())
    capsys.readouterr()
    rows, _ = table(capsys, tmp_path / "runs")          # "zero-shot" is the column of run y
    assert rows[1] == ["zero-shot", "Zero-shot CLIP, --templates ensemble"]


# --------------------------------------------------------------------------- the figures of a run

@pytest.mark.parametrize("name, drawn", [
    ("mmap", "similarity-1"), ("hipro", "affinity-1 tree-1"),
    ("jscpt", "affinity-1 beta-1 causal-1 schedule-1")])
def test_every_figure_of_a_run_of_one_epoch_shows_something(name, drawn, place, tmp_path,
                                                            monkeypatch):
    """Points have markers, epochs are whole numbers, and legends are beside the axes."""
    figures = {}
    monkeypatch.setattr(common, "save_figure",
                        lambda figure, path: figures.update({path.stem: figure}))
    common.main(METHODS[name], f"{place[1]} --shots 1 --n-ctx 2 --epochs 1 --plot "
                               f"--out {tmp_path}/run".split())
    assert sorted(figures) == sorted(["accuracy", "loss", "losses", *drawn.split()])
    for title, figure in figures.items():
        figure.canvas.draw()
        for axis in figure.axes:
            assert axis.lines or axis.images or axis.patches or axis.get_label() == "<colorbar>"
            if axis.get_xlabel() == "epoch":
                assert [line.get_marker() for line in axis.lines] == list("os"[:len(axis.lines)])
                low, high = axis.get_xlim()
                assert [x for x in axis.get_xticks() if low < x < high] == [1]
            if axis.get_legend():
                assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1
            for image in axis.images:               # the diagonal is outside the colour scale
                assert image.get_array().mask.tolist() == [[True, False], [False, True]]
    bars = [text.get_text() for text in figures["accuracy"].axes[0].get_legend().get_texts()]
    assert bars == ["zero-shot CLIP", METHODS[name].title]
    result = json.loads((tmp_path / "run/result.json").read_text())
    if name == "hipro":
        texts = [text.get_text() for text in figures["tree-1"].axes[0].texts]
        assert texts == [f"{result['affinity'][0][0][1]:.3g}", "root: all 2 tasks"]
    if name == "jscpt":                     # the number of row i, column j is at x = j, y = i
        texts = figures["affinity-1"].axes[0].texts
        texts = {text.get_position(): text.get_text() for text in texts}
        assert texts == {(j, i): f"{x:.3g}" for i, row in enumerate(result["affinity"][0])
                         for j, x in enumerate(row)}
        assert texts[0, 1] != texts[1, 0]


# -------------------------------------------------------------------------------------- predictions

CLASSES = ["cat", "cup", "dog", "hat", "owl", "red ball"]


def randomised(method):
    """A method with random prompts in place of trained ones."""
    def train(args, model, tasks, run):
        prompts = method.build(args, model, tasks)
        if method.name == "mmap":
            prompts.set_groups([[0], [1]])
        if method.name == "hipro":
            prompts.set_nodes([(0,), (1,), (0, 1)])
        torch.manual_seed(3)
        for _ in run.epochs("train", 1, prompts=prompts):
            for p in prompts.parameters():
                p.data.add_(0.3 * torch.randn_like(p))
        return prompts

    return replace(method, train=train)


def by_hand(method, model, state, x):
    """Probabilities [B, C] of the second task from the encoders alone; x: images [B, 3, H, W]."""

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    def text(prompts, n=4):
        return common.encode_text(model, common.tokenize(CLASSES, n), prompts)

    def probabilities(image, text):
        return (model.logit_scale.exp() * unit(image) @ unit(text).t()).softmax(-1)

    def kronecker(name, factor):
        return torch.stack([torch.kron(a, b) for a, b in zip(state[f"{name}.{factor}"],
                                                             state[f"{name}.P_s"])])

    if method == "coop_mt":
        return probabilities(common.encode_image(model, x), text(state["vectors"]))
    if method == "mvlpt":
        return probabilities(common.encode_image(model, x), text(state["targets.1.U_T"][None]))
    if method == "vpt_mt":
        words = common.clip.tokenize([f"a photo of a {name}." for name in CLASSES])
        image = common.encode_image(model, x, state["vectors"])
        return probabilities(image, model.encode_text(words))
    if method == "maple_mt":
        image = [P @ state[f"F.{k}.weight"].t() + state[f"F.{k}.bias"]
                 for k, P in enumerate(state["P"])]
        image = torch.stack([model.visual.ln_pre(image[0]), *image[1:]])
        return probabilities(common.encode_image(model, x, image), text(state["P"]))
    if method == "hipro":
        alone, both = text(state["vectors.1"][None]), text(state["vectors.2"][None])
        mean = (unit(alone) + unit(both)) / 2
        image = unit(common.encode_image(model, x))
        return (model.logit_scale.exp() * image @ mean.t()).softmax(-1)
    if method == "mmap":
        image, words = (torch.cat([kronecker(name, factor) for name in ("shared.1", "specific.1")],
                                  dim=1) for factor in ("M_v", "M_l"))
        return probabilities(common.encode_image(model, x, image), text(words, 8))
    image = torch.cat([state["P_v_shared"][0], state["P_v"][1]], dim=1)
    image = common.encode_image(model, x, image)
    words = text(torch.cat([state["P_l_shared"][0], state["P_l"][1]])[None], 8)

    def mlp(z):
        hidden = F.relu(z @ state["W_1"][0].t() + state["b_1"][0])
        return z + hidden @ state["W_2"][0].t() + state["b_2"][0]

    masked = torch.sigmoid(state["m"][1]) * image
    return probabilities(mlp(masked + mlp(masked)), words)


@pytest.mark.parametrize("name", METHODS)
def test_predictions_are_the_probabilities_computed_by_hand_and_need_no_dataset(name, place,
                                                                                tmp_path, capsys):
    _, words, model, preprocess = place
    data = make_tree(tmp_path / "gone", {f"{domain}/{name.replace(' ', '_')}": 2
                                         for domain in ("drawn", "painted") for name in CLASSES})
    words += " --prompt coop" if name == "mvlpt" else ""
    common.main(randomised(METHODS[name]),
                f"{words} --data {data} --shots 1 --n-ctx 4 --out {tmp_path}/run".split())
    shutil.rmtree(data)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, file in enumerate(files):
        noise(i + 1).save(file)
    capsys.readouterr()
    common.commands(["predict", f"{tmp_path}/run/prompts.pt", *files, "--task", "painted"])
    head, *blocks = capsys.readouterr().out.strip().split("\n\n")
    state = torch.load(tmp_path / "run" / "prompts.pt", weights_only=True)["prompts"][1]
    images = torch.stack([preprocess(noise(1)), preprocess(noise(2))])
    expected = by_hand(name, model, state, images)
    assert head == "painted, seed 1, %" and len(blocks) == 2
    for file, block, row in zip(files, blocks, expected):
        path, *lines = block.split("\n")
        best = row.argsort(descending=True)[:5].tolist()
        assert path == file
        assert [line[6:].strip() for line in lines] == [CLASSES[k] for k in best]
        chances = [100 * row[k].item() for k in best]
        assert [float(line[:6]) for line in lines] == pytest.approx(chances, abs=0.06)
    common.commands(["show", f"{tmp_path}/run"])
    result, told = json.loads((tmp_path / "run/result.json").read_text()), capsys.readouterr().out
    says(told, f"{METHODS[name].title}, --", f"{data}, 1 shot, ", "painted  6 classes", "seeds 1\n",
         f" {result['average'][0]:.1f}\n\nseeds", f"{result['trainable_parameters']:,}")
    groups = dict(mmap="groups, seed 1: [drawn]  [painted]",
                  hipro="nodes, seed 1: [drawn]  [painted]  [drawn, painted]")
    says(told, groups.get(name, ""))


def test_the_prompts_of_single_tasks_predict_their_own_task(place, tmp_path, capsys):
    _, words, model, preprocess = place
    words = f"{words} --shots 1 --n-ctx 4 --single-task --out {tmp_path}/run"
    common.main(randomised(METHODS["coop_mt"]), words.split())
    path = tmp_path / "run" / "prompts.pt"
    saved = torch.load(path, weights_only=True)
    saved["prompts"][1]["painted"]["vectors"] += 1.0
    torch.save(saved, path)
    noise(1).save(tmp_path / "0.png")
    text = common.encode_text(model, common.tokenize(["cup", "dog", "hat"], 4),
                              saved["prompts"][1]["painted"]["vectors"])
    image = common.encode_image(model, preprocess(noise(1))[None])
    expected = common.logits(model, image, text).softmax(-1)[0]
    capsys.readouterr()
    common.commands(["predict", str(path), f"{tmp_path}/0.png", "--task", "painted"])
    first = capsys.readouterr().out.split("\n")[3]
    assert first == f"{100 * expected.max():6.1f}  {['cup', 'dog', 'hat'][expected.argmax()]}"
