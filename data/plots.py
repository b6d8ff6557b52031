"""The pictures of a run, and those of HiPro's and JSCPT's figures. `common` passes these names on."""
import csv
import io
import itertools
import json
import statistics

import numpy as np

import common
from multitask_prompt_reports import MATRICES


def save_picture(figure, path, **how):
    """A matplotlib figure as a PNG file, which is there whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, **how)
    common.write_whole(path, buffer.getvalue())


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
    save_picture(figure, folder / "accuracy.png", bbox_inches="tight")
    figure, axes = plt.subplots(figsize=(6, 4))
    for seed in result["seeds"]:
        points = [(row["epoch"], row["loss"]) for row in rows if row["seed"] == seed and "loss" in row]
        axes.plot([x for x, _ in points], [y for _, y in points], label=f"seed {seed}")
    axes.set_xlabel("epoch"), axes.set_ylabel("training loss"), axes.legend()
    save_picture(figure, folder / "loss.png", bbox_inches="tight")
    for key in [key for key in MATRICES if key in result]:
        for seed, matrix in zip(result["seeds"], result[key]):
            figure, axes = plt.subplots(figsize=(1.5 + 0.8 * len(names), 1 + 0.8 * len(names)))
            figure.colorbar(axes.imshow(matrix))
            for i, j in np.ndindex(len(names), len(names)):
                axes.text(j, i, f"{matrix[i][j]:.3g}", ha="center", va="center", fontsize=7, color="white", backgroundcolor="#00000060")
            axes.set_xticks(range(len(names)), names, rotation=90), axes.set_yticks(range(len(names)), names)
            axes.set_title(f"{key}, seed {seed}")
            save_picture(figure, folder / f"{key}-{seed}.png", bbox_inches="tight")
    if plot:
        plot(folder, result)
    plt.close("all")


def plot_tree(folder, result):
    """tree-SEED.png: HiPro's task tree as a dendrogram (its Figure 5); `plot_run` draws the affinity (Figure 4)."""
    import matplotlib.pyplot as plt
    for seed, nodes in zip(result["seeds"], result["nodes"]):
        figure, axes = plt.subplots(figsize=(6, 1 + 0.35 * len(result["tasks"])))
        order, place = leaves(nodes[-1], nodes), {}
        for node in sorted(nodes, key=len):
            spots = [place[tuple(c)] for c in children(node, nodes)]
            height = max((x for x, _ in spots), default=-1) + 1
            place[tuple(node)] = height, sum(y for _, y in spots) / len(spots) if spots else order.index(node[0])
            for x, y in spots:
                axes.plot([x, height, height], [y, y, place[tuple(node)][1]], color="black")
        axes.set_yticks(range(len(order)), order), axes.set_xticks([]), axes.set_title(f"task tree, seed {seed}")
        save_picture(figure, folder / f"tree-{seed}.png", bbox_inches="tight")
        plt.close(figure)


def children(node, nodes):
    """The largest nodes inside a node."""
    inside = [other for other in nodes if set(other) < set(node)]
    return [c for c in inside if not any(set(c) < set(other) for other in inside)]


def leaves(node, nodes):
    """The tasks of a node in the order in which its tree is drawn without crossings."""
    return [leaf for child in children(node, nodes) for leaf in leaves(child, nodes)] or list(node)


def plot_schedule(folder, result):
    """JSCPT's causal-SEED.png (its Figure 4) and schedule-SEED.png (Figure 5; below it alpha, beta and phi by epoch), from log.csv."""
    import matplotlib.pyplot as plt
    names = result["tasks"]
    with open(folder / "log.csv", encoding="utf-8") as file:
        rows = [{key: json.loads(value) for key, value in row.items()} for row in csv.DictReader(file)]
    for seed in result["seeds"]:
        mine = [row for row in rows if row["seed"] == seed]
        at = lambda epoch: mine[min(epoch, len(mine)) - 1]                      # of a shorter training the last one
        figure, axes = plt.subplots(len(names), 2, figsize=(9, 2.2 * len(names)), squeeze=False, layout="tight")
        for (i, name), (k, key) in itertools.product(enumerate(names), enumerate(("batch_effect", "batch_phi"))):
            for row in (at(1), at(20)):
                axes[i, k].plot(range(1, len(row[key][i]) + 1), row[key][i], marker="o", label=f"epoch {row['epoch']}")
            axes[i, k].set(title=f"{name}: {('causal effect, Eq. (4)', 'weight, Eq. (6)')[k]}", xlabel="batch"), axes[i, k].legend()
        save_picture(figure, folder / f"causal-{seed}.png")
        figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="tight")
        for axis, key in zip(axes.flat[[0, 3, 4, 5]], ("losses", "alpha", "beta", "phi")):
            for i, name in enumerate(names):
                values = np.array([row[key][i] for row in mine])              # of beta a line each source task
                axis.plot([row["epoch"] for row in mine], values, color=f"C{i}", label=name if key == "losses" else None)
            axis.set(title=key, xlabel="epoch")
        axes[0, 0].legend()
        for axis, row in zip(axes[0, 1:], (at(5), at(10))):
            figure.colorbar(axis.imshow(row["affinity"], vmin=-1, vmax=1, cmap="RdBu"))
            axis.set_xticks(range(len(names)), names, rotation=30), axis.set_yticks(range(len(names)), names)
            axis.set_title(f"affinity of row on column, epoch {row['epoch']}")
        save_picture(figure, folder / f"schedule-{seed}.png")
