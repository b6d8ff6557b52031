"""What a run ends with: result.json's contents, the closing table, the pictures, MVLPT's files. `common` passes these names on."""
import copy
import csv
import io
import json
import re
import statistics
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import torch

import common

PAPERS = Path(__file__).with_name("paper_results.json")
MATRICES = ["similarity", "affinity", "transfer"]       # of the tasks: a row is a source, a column a target
SETTINGS = "method variant data split shots clip epochs lr batch_size n_ctx".split()     # a paper's number is shown where these agree
MEASURED = "prompt clip split shots".split()            # a matrix of transfer serves a run that has the same


def gather(settings, tasks, model, finished):
    """What result.json holds, from the scores of every seed. A key that a method adds becomes a list, an entry a seed."""
    names, done = [task.name for task in tasks], [finished[seed] for seed in settings["seeds"]]
    shared = ("zero_shot", "accuracy", "trainable_parameters", "seconds")
    return dict({key: settings.get(key) for key in (*SETTINGS, "seeds", "validate")}, tasks=names,
                zero_shot={n: statistics.mean(d["zero_shot"][i] for d in done) for i, n in enumerate(names)},
                accuracy={n: [d["accuracy"][i] for d in done] for i, n in enumerate(names)},
                average=[statistics.mean(d["accuracy"]) for d in done], trainable_parameters=done[0]["trainable_parameters"],
                clip_parameters=sum(p.numel() for p in model.parameters()), seconds=[d["seconds"] for d in done],
                **{key: [d[key] for d in done] for key in done[0] if key not in shared})


def mean_std(values):
    """`85.2 ± 0.4` from per cents over seeds (sample standard deviation), or `85.2` from one."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def papers_columns(result):
    """The columns of the papers' tables (paper_results.json) whose method, data and settings are those of a result."""
    papers = json.loads(PAPERS.read_text(encoding="utf-8"))["columns"]
    return [] if result["validate"] else [p for p in papers if all(p.get(key) == result.get(key) for key in SETTINGS)]


def one_decimal(printed):
    """`75.84 ± 0.50` as `75.8 ± 0.5`: HiPro and MVLPT print two decimals."""
    return re.sub(r"\d+\.\d+", lambda number: str(Decimal(number[0]).quantize(Decimal("0.1"), ROUND_HALF_UP)), printed)


def print_table(result):
    """The closing table: a row a task and the average; zero-shot CLIP, the method, the papers' numbers where there are some."""
    rows = [[name, f"{result['zero_shot'][name]:.1f}", mean_std(result["accuracy"][name])] for name in result["tasks"]]
    rows.append(["average", f"{statistics.mean(result['zero_shot'].values()):.1f}", mean_std(result["average"])])
    head = ["", "zero-shot", result["method"]]
    plain = lambda name: "".join(filter(str.isalnum, name)).lower()             # "CIFAR-100" and "CIFAR100" are one task
    papers = papers_columns(result)
    for paper in papers:
        head.append(f"{paper['paper']}, {paper['table']}")
        printed = {plain(name): one_decimal(number) for name, number in paper["results"].items()}
        for row in rows:
            row.append(printed.get(plain(row[0]), ""))
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print()
    for row in [head, *rows]:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))
    for paper in papers:
        if "note" in paper:
            print(f"\n{paper['paper']}, {paper['table']}: {paper['note']}")
    share = 100 * result["trainable_parameters"] / result["clip_parameters"]
    print(f"\n{result['trainable_parameters']:,} trainable parameters, {share:.2f} per cent of CLIP's; accuracy in per cent, "
          f"seeds {' '.join(map(str, result['seeds']))}; trained in {statistics.mean(result['seconds']):.0f} s a seed")
    for key in [key for key in MATRICES if key in result]:
        for seed, matrix in zip(result["seeds"], result[key]):
            print(f"\n{key}, seed {seed} (a row is a source, a column a target in the same order)")
            for name, row in zip(result["tasks"], matrix):
                print(name.ljust(widths[0]), "".join(f"{x:10.3g}" for x in row))


def plot_run(folder, result, rows, plot=None):
    """accuracy.png (zero-shot and method by task), loss.png (training loss by epoch) and a picture of each matrix of tasks."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names, width = result["tasks"], 0.4
    figure, axes = plt.subplots(figsize=(1.5 + 1.3 * len(names), 4))
    means = [statistics.mean(result["accuracy"][n]) for n in names]
    spreads = [statistics.stdev(result["accuracy"][n]) if len(result["seeds"]) > 1 else 0 for n in names]
    axes.bar([i - width / 2 for i in range(len(names))], [result["zero_shot"][n] for n in names], width, label="zero-shot CLIP")
    axes.bar([i + width / 2 for i in range(len(names))], means, width, yerr=spreads, label=result["method"])
    axes.set_xticks(range(len(names)), names, rotation=20), axes.set_ylabel("accuracy (%)"), axes.legend()
    figure.savefig(folder / "accuracy.png", dpi=150, bbox_inches="tight")
    figure, axes = plt.subplots(figsize=(6, 4))
    for seed in result["seeds"]:
        points = [(row["epoch"], row["loss"]) for row in rows if row["seed"] == seed and "loss" in row]
        axes.plot([x for x, _ in points], [y for _, y in points], label=f"seed {seed}")
    axes.set_xlabel("epoch"), axes.set_ylabel("training loss"), axes.legend()
    figure.savefig(folder / "loss.png", dpi=150, bbox_inches="tight")
    for key in [key for key in MATRICES if key in result]:
        for seed, matrix in zip(result["seeds"], result[key]):
            figure, axes = plt.subplots(figsize=(1.5 + 0.8 * len(names), 1 + 0.8 * len(names)))
            figure.colorbar(axes.imshow(matrix))
            for i, j in np.ndindex(len(names), len(names)):
                axes.text(j, i, f"{matrix[i][j]:.3g}", ha="center", va="center", fontsize=7, color="white", backgroundcolor="#00000060")
            axes.set_xticks(range(len(names)), names, rotation=90), axes.set_yticks(range(len(names)), names)
            axes.set_title(f"{key}, seed {seed}")
            figure.savefig(folder / f"{key}-{seed}.png", dpi=150, bbox_inches="tight")
    if plot:
        plot(folder, result)
    plt.close("all")


# --------------------------------------------------------------------------------- what MVLPT writes for another run and reads back

def write_transfer(args, run, names, seed, accuracy, normalise, images):
    """Write transfer.csv and transfer.json, accuracies [N, N] (row = source, column = target) averaged over the seeds so far.

    names: of the tasks. normalise(accuracy) -> transfer [N, N]. images: what was scored of each task: "test", "validation" or
    "training".
    """
    done = {s: torch.tensor(scores["transfer_accuracy"]) for s, scores in run.state["finished"].items()}
    mean, text = torch.stack([*done.values(), accuracy.cpu()]).mean(0), io.StringIO()
    transfer = normalise(mean).tolist()
    csv.writer(text, lineterminator="\n").writerows([["source", *names], *([name, *row] for name, row in zip(names, transfer))])
    about = dict({key: getattr(args, key) for key in MEASURED}, data=args.data, images=" and ".join(dict.fromkeys(images)))
    about.update(seeds=[*done, seed], tasks=names)
    common.write_whole(run.folder / "transfer.csv", text.getvalue())
    common.write_whole(run.folder / "transfer.json", json.dumps(dict(about, accuracy=mean.tolist(), transfer=transfer), indent=1))


def read_transfer(args, names):
    """The accuracies [N, N] (row = source, column = target) of the tasks `names` from args.transfer, a study's transfer.json.

    Raises UserError where that is no such file, was measured with another prompt, backbone or split, or lacks a task.
    """
    path = args.transfer
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        known, accuracy = list(saved["tasks"]), torch.tensor(saved["accuracy"], dtype=torch.float32)
        fits = accuracy.shape == (len(known), len(known)) and accuracy.isfinite().all() and accuracy.min() >= 0
        fits = fits and set(MEASURED) <= saved.keys()
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise common.UserError(f"--transfer {path} is no transfer matrix: give the transfer.json that a run of --transferability wrote")
    agree(args, saved, MEASURED, f"--transfer {path}")
    missing = [name for name in names if name not in known]
    if missing:
        raise common.UserError(f"--transfer {path} is of the tasks {', '.join(map(str, known))} and has no '{missing[0]}': measure one "
                               "on the same --data with --transferability")
    rows = [known.index(name) for name in names]
    return accuracy[rows][:, rows]


def read_source(args, prompt):
    """The source prompts in args.init as {seed: state dict}; UserError where they do not suit this run or do not fit `prompt`."""
    saved, states = common.load_prompts(args.init, "mvlpt"), {}
    shared = ["prompt", "n_ctx", "clip", "split", "shots", "validate"]          # of another split, it has seen what is tested on here
    agree(args, saved["settings"], shared, f"the source prompt in {args.init}")
    if saved["settings"].get("source") == "none":
        raise common.UserError(f"{args.init} is of a run without stage 1 and has no source prompt: give one of a run that had a --source")
    for seed in args.seeds:
        if seed not in saved["prompts"]:
            seeds = ", ".join(map(str, saved["prompts"]))
            raise common.UserError(f"{args.init} has source prompts of the seeds {seeds}, not of {seed}: give those as --seeds")
        try:
            states[seed] = {k.removeprefix("source."): v for k, v in saved["prompts"][seed].items() if k.startswith("source.")}
            copy.deepcopy(prompt).load_state_dict(states[seed])
        except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise common.UserError(f"the source prompt in {args.init} does not fit {args.clip} as it is: give one of this "
                                   "--clip") from error
    return states


def agree(args, saved, keys, owner):
    """Raise UserError where the settings `saved` with `owner`, which tells what that is, are not those of this run."""
    for key in keys:
        if saved.get(key) != getattr(args, key):
            raise common.UserError(f"{owner} is of a run {common.said(key, saved.get(key))}, not {common.said(key, getattr(args, key))}: "
                                   "use the same, or leave the file out")
