"""What MVLPT takes from outside a run: transfer matrices, source prompts, source tasks. `common` passes these names on."""
import copy
import csv
import io
import json
from pathlib import Path

import torch

import common

MEASURED = "prompt clip split shots".split()            # a matrix of transfer serves a run that has the same


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


def check_transfer(args, names, size, n_text):
    """Refuse words that contradict each other, and groups, a matrix and source tasks that do not fit; returns what the latter are.

    names: of the target tasks. size: of a group. n_text: as in `run_seeds`.
    """
    n, group = len(names), f"--group-size {args.group_size}"
    choice = f"--transfer {args.transfer}" if args.transfer else f"--grouping {args.grouping}"
    for wrong, line in [
            (args.adapt_epochs < 0, f"--adapt-epochs {args.adapt_epochs} is too small: give 0 or more"),
            (size < 1, f"{group} is too small: give 1 or more, or all"),
            (size > n, f"{group} is more than the {n} tasks of --data {args.data}: give fewer, or all"),
            (args.init and args.source, "--init gives the source prompt that --source would train: give one of them"),
            (args.transferability and (args.source != "none" or args.init or args.transfer or args.group_size != 1),
             "--transferability trains a prompt a task alone, from a random start: leave out --source, --init, --transfer, --group-size"),
            (size in (1, n) and (args.transfer or args.grouping == "worst"),
             f"{choice} chooses partners, and {group} of {n} tasks leaves no choice: give a --group-size between 1 and {n}"),
            (args.adapt_epochs == 0 and (args.group_size != 1 or args.source == "none"),
             "--adapt-epochs 0 leaves only the source prompt of stage 1: leave out --group-size, --transferability and --source none")]:
        if wrong:
            raise common.UserError(line)
    if args.transfer and not (args.eval or args.resume):
        read_transfer(args, names)
    return {} if args.eval or args.source in (None, "none", args.data) else check_sources(args, n_text)


def check_sources(args, n_text):
    """Refuse tasks of `--source` that cannot be trained on, or are of images that the targets test on.

    n_text: as in `run_seeds`. Returns their classes and numbers of images, for the run to find again.
    """
    files = lambda images: {Path(item).resolve() for item in images.items} if images.read is common.read_image else set()
    found = {}
    for seed, sources in common.checked_tasks(args, args.source, n_text).items():
        tested = set().union(*(files(task.test) for task in common.divided_tasks(args, args.data, seed)))
        for task in sources:
            both = files(task.train) & tested
            if both:
                raise common.UserError(f"--source {args.source} trains on images that --data {args.data} tests on, such as {min(both)}: "
                                       "take them out of one, or give the folder the same name in both")
            found[f"{seed} --source {task.name}"] = [*task.class_names, len(task.train)]
    return found
