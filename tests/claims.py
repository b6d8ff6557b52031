"""Test each paper's claim on tasks where it must hold if the mechanism works.

    python tests/claims.py mmap             # or hipro, mvlpt, jscpt-noise, jscpt-patch
    python tests/claims.py mmap --seeds 1 2 3 4 5 --out figures     # also mmap.json and claims.png

The tasks are parts of the built-in benchmark: its four styles, the classes with the most drawings,
6 training images per class unless stated otherwise, scored on all test drawings of these classes.
Prints the mean over the seeds and the standard error of every quantity. The results are in
tests/RESULTS.md.

mmap, hipro: two families of tasks whose gradients conflict. Family A is the four styles, family B
    the same drawings under class names that are shifted by one. The groups found must be the
    families, and prompts shared within them must beat those of one group or of random groups. MmAP
    has no task-specific prompts here, because they would make up for a wrong group.
mvlpt: eight tasks, two styles by four namings: in each half of the classes the names are true or
    shifted by one. The more class names two tasks share, the better the prompt of one must transfer
    to the other: Spearman's rank correlation between the share and transferability.
jscpt-noise: the training labels of one task are shuffled. Its weight phi must fall below that of
    the other tasks, and these must lose less with the schedule than without. The development set
    has correct labels: 4 images per class that are neither trained nor tested on (`--dev-shots 4`).
    8 classes with 12 images each, because with 4 classes a quarter of the shuffled labels are
    correct, and the task's gradient helps the development loss as often as not.
jscpt-patch: on all training and development images, a patch in a colour specific to the class gives
    the class away; no test image has one. The causal effect, Eq. (4), must rise more than without
    the patches.
"""
import json
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import Phases  # noqa: E402

import common  # noqa: E402
from data import Images, load_tasks  # noqa: E402

COLOURS = "red lime blue yellow magenta cyan orange black".split()


# ------------------------------------------------------------------------------------------- tasks

def largest_classes(n):
    """The n class names of `emoji` with the most drawings."""
    task = load_tasks("emoji", shots=6)[0]
    labels = task.train.labels + task.test.labels
    order = sorted(range(len(task.class_names)), key=lambda k: -labels.count(k))
    return [task.class_names[k] for k in order[:n]]


def restricted(task, names):
    """A task restricted to some of its classes."""
    numbers = {task.class_names.index(name): k for k, name in enumerate(names)}

    def part(images):
        own = images.subset([i for i, k in enumerate(images.labels) if k in numbers])
        own.labels = [numbers[k] for k in own.labels]
        return own

    return replace(task, class_names=list(names), train=part(task.train), test=part(task.test))


def styles(seed, n_classes, shots=6):
    """The four styles as tasks of the n largest classes."""
    names = largest_classes(n_classes)
    return [restricted(task, names) for task in load_tasks("emoji", shots=shots, seed=seed)]


def families(seed, n_classes=4):
    """[A's four tasks, B's four tasks]: B has the drawings of A under shifted class names."""
    tasks = styles(seed, n_classes)
    names = tasks[0].class_names
    shifted = [replace(task, name=f"B {task.name}", class_names=names[1:] + names[:1],
                       train=task.train.subset(range(len(task.train))))
               for task in tasks]
    return [replace(task, name=f"A {task.name}") for task in tasks] + shifted


def sharing(seed, n_classes=8):
    """(eight tasks, the share of class names that each pair has in common).

    Two styles; in each half of the classes, the names are true or shifted by one.
    """
    names, half = largest_classes(n_classes), n_classes // 2
    halves = [(part, part[1:] + part[:1]) for part in (names[:half], names[half:])]
    found = []
    for task in load_tasks("emoji:Noto+Fluent", shots=6, seed=seed):
        task = restricted(task, names)
        for one in halves[0]:
            for other in halves[1]:
                found.append(replace(task, name=f"{task.name} {len(found)}",
                                     class_names=one + other))
    agree = [[sum(x == y for x, y in zip(a.class_names, b.class_names)) / n_classes for b in found]
             for a in found]
    return found, torch.tensor(agree)


def shuffled(task, seed):
    """A task with shuffled training labels."""
    labels = list(task.train.labels)
    random.Random(seed).shuffle(labels)
    return replace(task, train=Images(task.train.items, labels, task.train.read))


def patched(task):
    """A task with a patch in the colour of its class on every training image."""
    colour = {i: COLOURS[label] for i, label in enumerate(task.train.labels)}

    def read(i):
        image = task.train.read(task.train.items[i]).copy()
        w, h = image.size
        image.paste(colour[i], (0, 0, w // 3, h // 3))
        return image

    return replace(task, train=Images(range(len(task.train)), task.train.labels, read))


# ---------------------------------------------------------------------------------------- training

class Training(Phases):
    """Stands in for a Run; `rows` has the mean logged values of each epoch."""

    def __init__(self, seed):
        super().__init__(seed)
        self.rows = []

    def epochs(self, phase, n, **parts):
        text = f"seed {self.seed}, {phase}"
        bar = common.progress(super().epochs(phase, n, **parts), text)
        bar.total = n
        for epoch in bar:
            before = len(self.logged)
            yield epoch
            values = {}
            for step in self.logged[before:]:
                for name, value in step.items():
                    values.setdefault(name, []).append(torch.as_tensor(value))
            self.rows.append({name: torch.stack(x).double().mean(0) for name, x in values.items()})
            common.tell_epoch(text, epoch, n, self.rows[-1]["loss"])


def settings(method, seed, **changes):
    """A method's settings at `tiny`."""
    args = method.Args(clip="tiny", shots=6, seeds=(seed,), device="cpu", workers=0)
    return replace(args, **dict(method.defaults(args), **changes))


def trained(name, seed, model, tasks, **changes):
    """Train a method on tasks: (scores and the method's own results, rows of epochs)."""
    method, run = common.method_of(name), Training(seed)
    args = settings(method, seed, **changes)
    prompts = method.train(args, model, tasks, run)
    scores = common.evaluate(args, model, tasks, **method.classify(args, model, tasks, prompts))
    return dict(scores, **method.report(args, tasks, prompts)), run.rows


def mean(scores, which=slice(None)):
    return statistics.mean(scores["accuracy"][which])


# ------------------------------------------------------------------- claims: seed -> {name: number}

def mmap(seed, model):
    """Accuracy by grouping, and 1 if the groups are the families."""
    found = {}
    for grouping in ("gradient", "all", "random"):
        scores, _ = trained("mmap", seed, model, families(seed), grouping=grouping, specific=False)
        found[grouping] = mean(scores)
        if grouping == "gradient":
            groups = {frozenset(name[0] for name in group) for group in scores["groups"]}
            found["groups are families"] = float(groups == {frozenset("A"), frozenset("B")})
    found["gradient - all"] = found["gradient"] - found["all"]
    found["gradient - random"] = found["gradient"] - found["random"]
    return found


def hipro(seed, model):
    """Accuracy by tree, and 1 if the top split of the tree is the families."""
    found = {}
    for grouping in ("tree", "shared+individual", "random"):
        scores, _ = trained("hipro", seed, model, families(seed), grouping=grouping, epochs=30)
        found[grouping] = mean(scores)
        if grouping == "tree":
            top = {frozenset(name[0] for name in node) for node in scores["nodes"][-3:-1]}
            found["top split is families"] = float(top == {frozenset("A"), frozenset("B")})
    found["tree - shared+individual"] = found["tree"] - found["shared+individual"]
    found["tree - random"] = found["tree"] - found["random"]
    return found


def mvlpt(seed, model):
    """Spearman's rank correlation between the names that two tasks share and transferability."""
    method, (tasks, shared) = common.load_method("mvlpt"), sharing(seed)
    args, run = settings(method.METHOD, seed, epochs=20, source="none"), Training(seed)
    prompts = method.build(args, model, tasks)
    tasks = method.with_held_out(tasks, seed)
    rows = []
    for i, task in enumerate(tasks):
        best = method.learn(args, model, run, f"alone {i}", [task], prompts.source, args.epochs,
                            keep=[[0]])
        rows.append(method.accuracies(args, model, tasks, [one.test for one in tasks],
                                      best.prompts[0]))
    transfer = method.transferability(torch.stack(rows))
    pairs = ~torch.eye(len(tasks), dtype=torch.bool)
    found = {"rank correlation": spearman(shared[pairs], transfer[pairs])}
    for level in sorted(set(shared[pairs].tolist())):
        found[f"transfer, sharing {level:.1f}"] = transfer[pairs & (shared == level)].mean().item()
    return found


def spearman(x, y):
    """The correlation of ranks; equal values share their mean rank."""
    def ranks(values):
        values = values.double()
        below = (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
        return below - below.mean()
    a, b = ranks(x), ranks(y)
    return (a @ b / (a.norm() * b.norm())).item()


def jscpt_noise(seed, model):
    """phi of the task with shuffled labels and of the other tasks, and the accuracy of the latter.
    """
    off = dict(prompt_schedule=False, task_schedule=False)
    method, own = common.load_method("jscpt"), dict(epochs=15, upper_every=3, dev_shots=4)
    tasks = styles(seed, 8, shots=12)
    tasks = method.set_aside(settings(method.METHOD, seed, **own), tasks, seed)
    noisy = [shuffled(tasks[0], seed), *tasks[1:]]
    scores, _ = trained("jscpt", seed, model, noisy, **own)
    plain, _ = trained("jscpt", seed, model, noisy, **own, **off)
    clean, _ = trained("jscpt", seed, model, tasks, **own, **off)
    phi, others = scores["phi"], slice(1, None)
    found = {"phi, noisy": phi[0], "phi, others": statistics.mean(phi[others])}
    found["phi of the others - noisy one"] = found["phi, others"] - found["phi, noisy"]
    found["others, schedule"] = mean(scores, others)
    found["others, no schedule"] = mean(plain, others)
    found["others, no schedule, no noise"] = mean(clean, others)
    found["others, with - without schedule"] = mean(scores, others) - mean(plain, others)
    found["others, what the noise costs"] = mean(clean, others) - mean(plain, others)
    return found


def jscpt_patch(seed, model):
    """How much the causal effect rises from the first to the last epoch, with and without patches.
    """
    tasks, found = styles(seed, 4), {}
    for name, own in dict(patched=[patched(task) for task in tasks], plain=tasks).items():
        scores, rows = trained("jscpt", seed, model, own, epochs=20, upper_every=2)
        effects = [row["effect"].mean().item() for row in rows if "effect" in row]
        found[f"rise, {name}"] = effects[-1] - effects[0]
        found[f"accuracy, {name}"] = mean(scores)
    found["rise, patched - plain"] = found["rise, patched"] - found["rise, plain"]
    return found


CLAIMS = {"mmap": mmap, "hipro": hipro, "mvlpt": mvlpt, "jscpt-noise": jscpt_noise,
          "jscpt-patch": jscpt_patch}


def measured(claim, seeds):
    """{quantity: a number per seed} of a claim."""
    model, _ = common.load_clip("tiny")
    rows = [CLAIMS[claim](seed, model) for seed in seeds]
    return {name: [row[name] for row in rows] for name in rows[0]}


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


PANELS = {          # claim: the title of its panel, what its bars show, and {bar: quantity}
    "mmap": ("MmAP: two families", "accuracy (%)",
             {"gradient\ngroups": "gradient", "random\ngroups": "random", "one\ngroup": "all"}),
    "hipro": ("HiPro: two families", "accuracy (%)",
              {"tree": "tree", "random\ntree": "random", "no\ntree": "shared+individual"}),
    "mvlpt": ("MVLPT: shared class names", "transferability",
              {f"{share:.0%}": f"transfer, sharing {share:.1f}" for share in (0, 0.5, 1)}),
    "jscpt-noise": ("JSCPT: shuffled labels", "weight of a task",
                    {"shuffled\ntask": "phi, noisy", "other\ntasks": "phi, others"}),
    "jscpt-patch": ("JSCPT: hints on the images", "rise of the causal effect",
                    {"hints": "rise, patched", "no hints": "rise, plain"}),
}


def plot(out):
    """claims.png: a panel of means ± standard errors for every CLAIM.json in a folder."""
    shown = [claim for claim in PANELS if (out / f"{claim}.json").exists()]
    figure, axes = common.pyplot().subplots(1, len(shown), figsize=(3 * len(shown), 3),
                                            squeeze=False, layout="tight")
    for axis, claim in zip(axes[0], shown):
        found = json.loads((out / f"{claim}.json").read_text())
        title, unit, bars = PANELS[claim]
        values = [found[name] for name in bars.values()]
        axis.bar(list(bars), [statistics.mean(x) for x in values], color="0.8", edgecolor="0.2",
                 yerr=[standard_error(x) for x in values], capsize=4)
        axis.set(title=title, ylabel=unit)
        axis.title.set_size(10)
    common.save_figure(figure, out / "claims.png")


@dataclass
class Claim:
    """One controlled experiment."""

    # which experiment
    claim: tyro.conf.Positional[Literal["mmap", "hipro", "mvlpt", "jscpt-noise", "jscpt-patch"]]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one experiment per seed
    out: str | None = None  # folder for CLAIM.json, and for claims.png of all claims in it


def main():
    common.show_help(sys.argv, __doc__)
    args = tyro.cli(Claim, description="")
    found = measured(args.claim, args.seeds)
    for name, values in found.items():
        numbers = " ".join(f"{x:.3g}" for x in values)
        spread = f" ± {standard_error(values):.3f}" if len(values) > 1 else ""
        print(f"{name:32} {statistics.mean(values):8.3f}{spread}   ({numbers})")
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        common.write_json(out / f"{args.claim}.json", found)
        plot(out)


if __name__ == "__main__":
    main()
