"""What MVLPT takes from outside a run: transfer matrices, source prompts, source tasks. `common` passes these names on."""
import copy
import csv
import io
import json
import types
from pathlib import Path

import torch

import common

MEASURED = "prompt n_ctx clip split shots".split()            # a matrix of transfer serves a run that has the same


def write_transfer(args, run, names, seed, accuracy, normalise, images):
    """Write transfer.csv and transfer.json, accuracies [N, N] (row = source, column = target) of each seed so far and their mean.

    names: of the tasks. normalise(accuracy) -> transfer [N, N]. images: what was scored of each task: "test", "validation" or
    "training".
    """
    of_seed = {s: scores["transfer_accuracy"] for s, scores in run.state["finished"].items()} | {seed: accuracy.tolist()}
    mean, text = torch.tensor(list(of_seed.values())).mean(0), io.StringIO()
    transfer = normalise(mean).tolist()
    csv.writer(text, lineterminator="\n").writerows([["source", *names], *([name, *row] for name, row in zip(names, transfer))])
    about = dict({key: getattr(args, key) for key in MEASURED}, data=args.data, images=" and ".join(dict.fromkeys(images)))
    about.update(tasks=names, accuracy=mean.tolist(), transfer=transfer, accuracy_of_seed=of_seed)
    common.write_whole(run.folder / "transfer.csv", text.getvalue())
    common.write_whole(run.folder / "transfer.json", json.dumps(about, indent=1))


def read_transfer(args, names):
    """{seed: accuracies [N, N] (row = source, column = target) of the tasks `names`, as lists} from args.transfer, a transfer.json.

    A seed has its own, because what one validates on another may test on. Raises UserError where that is no such file, was
    measured with another prompt, backbone or split, or lacks a task or a seed.
    """
    path, found = args.transfer, {}
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        known, of_seed = list(saved["tasks"]), {int(seed): torch.tensor(m, dtype=torch.float32) for seed, m in saved["accuracy_of_seed"].items()}
        fits = set(MEASURED) <= saved.keys() and isinstance(saved["images"], str)
        fits = fits and all(m.shape == (len(known), len(known)) and m.isfinite().all() and m.min() >= 0 for m in of_seed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise common.UserError(f"--transfer {path} is no transfer matrix: give the transfer.json that a run of --transferability wrote")
    agree(args, saved, MEASURED, f"--transfer {path}")
    missing = [name for name in names if name not in known]
    if missing:
        raise common.UserError(f"--transfer {path} is of the tasks {', '.join(map(str, known))} and has no '{missing[0]}': measure one "
                               "on the same --data with --transferability")
    rows = [known.index(name) for name in names]
    for seed in args.seeds:
        if seed not in of_seed:
            raise common.UserError(f"--transfer {path} is of the seeds {', '.join(map(str, of_seed))}, not of {seed}: give those as --seeds")
        found[seed] = of_seed[seed][rows][:, rows].tolist()
    if "test" in saved["images"]:
        common.warn_once(f"--transfer {path} was measured on test images, so they choose the groups: a study with --validate keeps them out")
    return found


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
    remedy = f"give a --group-size from 2 to {n - 1}" if n > 2 else "leave it out"
    for wrong, line in [
            (args.adapt_epochs < 0, f"--adapt-epochs {args.adapt_epochs} is too small: give 0 or more"),
            (size < 1, f"{group} is too small: give 1 or more, or all"),
            (size > n, f"{group} is more than the {n} tasks of --data {args.data}: give fewer, or all"),
            (args.transferability and (args.source != "none" or args.init or args.transfer or size != 1 or args.grouping == "worst"),
             "--transferability trains a prompt a task alone, from a random start: leave out --source, --init, --transfer, --group-size, "
             "--grouping"),
            (args.init and args.source, "--init gives the source prompt that --source would train: give one of them"),
            (size in (1, n) and (args.transfer or args.grouping == "worst"),
             f"{choice} chooses partners, and {group} of {n} tasks leaves no choice: {remedy}"),
            (args.adapt_epochs == 0 and (size != 1 or args.source == "none"),
             "--adapt-epochs 0 leaves only the source prompt of stage 1: leave out --group-size, --transferability and --source none")]:
        if wrong:
            raise common.UserError(line)
    if args.transfer and not (args.eval or args.resume):
        read_transfer(args, names)
    if args.init and not (args.eval or args.resume):
        check_init(args)
    return {} if args.eval or args.source in (None, "none", args.data) else check_sources(args, n_text)


def check_init(args):
    """Refuse the source prompt of another run that has trained on images that the targets test on, as far as these are here."""
    before = common.load_prompts(args.init, "mvlpt")["settings"]
    data = before.get("source") or before.get("data")
    if data in (args.data, "none"):
        return
    for seed in args.seeds:
        try:
            sources = common.divided_tasks(types.SimpleNamespace(**dict(vars(args), root=before.get("root"))), data, seed)
        except common.UserError as error:
            return common.warn_once(f"whether {args.init} has seen images that --data tests on cannot be told, without its source tasks: {error}")
        refuse_seen(args, sources, seed, f"{args.init}, of --source {data},")


def check_sources(args, n_text):
    """Refuse tasks of `--source` that cannot be trained on, or are of images that the targets test on.

    n_text: as in `run_seeds`. Returns their classes and numbers of images, for the run to find again.
    """
    if args.download:
        common.find_listings(args.source, args.root, download=True)
    found = {}
    for seed, sources in common.checked_tasks(args, args.source, n_text).items():
        refuse_seen(args, sources, seed, f"--source {args.source}")
        found.update({f"{seed} --source {task.name}": [*task.class_names, len(task.train)] for task in sources})
    return found


def refuse_seen(args, sources, seed, owner):
    """Raise UserError where tasks train on image files that the targets test on. owner: says whose tasks they are."""
    files = lambda images: {Path(item).resolve() for item in images.items} if images.read is common.read_image else set()
    tested = set().union(*(files(task.test) for task in common.divided_tasks(args, args.data, seed)))
    both = set().union(*(files(task.train) for task in sources)) & tested
    if both:
        raise common.UserError(f"{owner} trains on images that --data {args.data} tests on, such as {min(both)}: "
                               "take them out of one, or give the folder the same name in both")
