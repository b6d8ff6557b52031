"""MVLPT: a prompt learned on many source tasks starts the prompts of the target tasks, which adapt alone or in groups.

Shen, Yang, Zhang, Zhai, Gonzalez, Keutzer and Darrell, "Multitask Vision-Language Prompt Tuning", WACV 2024.

The idea: prompt learning starts from random numbers and forgets what other tasks know. (1) One prompt learned on all source
tasks together is a better start for every target task. (2) A target also learns from tasks that resemble it: those whose own
prompts, used as they are, do best on it. (3) So a target adapts the source prompt together with its best partners, and keeps
the checkpoint that is best on its own validation images. A prompt is a text context (`coop`), image prompts in every layer
(`vpt`), or both, tied by a small transformer (`upt`); what CLIP has learned stays frozen.

    python mvlpt.py                                                             # built-in benchmark and backbone
    python mvlpt.py --transferability --plot                                    # the study: transfer.csv, transfer.json, transfer-1.png
    (elevater12 and elevater20 are not among the benchmarks yet)
    python mvlpt.py --data elevater12 --source coop11 --shots 20 --seeds 1 2 3  # Table 1, MUPT (--prompt coop: MCoOp; vpt: MVPT)
    python mvlpt.py --data elevater12 --source none --shots 20 --seeds 1 2 3    # ... UPT (CoOp, VPT) from random prompts
    python mvlpt.py --data elevater20 --shots 20 --transferability --plot       # Figure 4
    python mvlpt.py --data elevater20 --shots 20 --seeds 1 2 3 --group-size 2   # Table 2, MUPT; Table 3, Best M (1: S)
    python mvlpt.py --data elevater20 --shots 20 --seeds 1 2 3 --group-size 2 --grouping worst      # ... Worst M
    python mvlpt.py --data officehome --split 0.1 --seeds 1 2 3 --adapt-epochs 0        # JSCPT, Table 1, column MVLPT

A run's prompts.pt has the source prompt in it, so stage 1 runs once for many targets: `--init DIR/prompts.pt`. In the same way
`--transfer DIR/transfer.json` gives a matrix back.

Choices the paper leaves open
- UPT: the text context and the image prompts of all layers pass, each modality through a linear map, to width 128, there as one
  sequence through one block, and back through two more maps: 566,400 numbers at ViT-B/16 (the paper: 0.45 per cent of CLIP). The
  block is CLIP's own, which the authors ran: U' = U + SA(LN(U)), U^ = U' + FFN(LN(U')). Eq. (4) prints U' = SA(U) + LN(U), U^ =
  FFN(LN(U')) + LN(U').
- Prompts start at N(0, 0.02), the maps and the block as PyTorch makes them. Adam has no weight decay. The warm-up epoch has the
  constant rate 1e-5, which is CoOp's, and the cosine follows.
- A step takes a batch of every task, and the loss is the sum of the tasks', each over its own classes; an epoch is as long as
  the largest task needs. (The authors' program mixes the tasks' images.)
- The validation part is the dataset's own where it has one. The first of equally good epochs is kept, as in CoOp's program, for
  the source prompt by the mean over the source tasks. Without validation images the last epoch is kept.
- Source tasks default to the targets. They have as many shots, or the same split, as the targets (Sec. 4.1).
- Transfer is measured on validation images (or else training images), so that no test image chooses a group. The study alone
  measures it on test images, as Figure 4 does; given back as `--transfer`, those do choose, unless the study ran with
  `--validate`. Its prompts train as long as an adaptation. The study's files average the seeds.
- The worst partners are those of the smallest transfer. Targets that have the same group train once and keep two checkpoints.
- Features of `--views` random views an image are computed once for `coop`; the other prompts see fresh views every epoch.
"""
import copy
import csv
import dataclasses
import io
import json
import math
import statistics
from collections import Counter
from pathlib import Path

import torch
from torch import nn

import common

PAPER = dict(                       # Sec. 4, "Training Details"
    clip="ViT-B/16",                # "ViT-B/16 for all the experiments except for the scaling ablation"
    epochs=200,                     # "trained with a batch size of 32 for 200 epochs": of stage 1
    adapt_epochs=None,              # ... and of stage 2: as many as stage 1 unless said
    lr=0.002,                       # "We use Adam optimizer and cosine learning rate schedule. All the learning rate is set as 2e-3"
    batch_size=32,
    n_ctx=4,                        # "we use 4 contexts for UPT only"
    views=0,                        # fresh views every epoch
    min_crop=0.08,                  # Dassl's random resized crop
    prompt="upt",                   # Sec. 3.1
    group_size=1,                   # Table 1; 2 and 3 are Table 2's and 3's
    grouping="best")                # Sec. 4.3; worst is Table 3's
PAPER_OF = dict(
    coop=dict(n_ctx=16, views=8),   # "a context length of 16 for both CoOp and VPT"; the views are ours
    vpt=dict(n_ctx=16),
    upt=dict())
TINY = dict(epochs=10, batch_size=8, min_crop=0.6)          # the built-in backbone's, chosen on fxemoji
TINY_OF = dict(coop=dict(), vpt=dict(n_ctx=4), upt=dict())
WIDTH = 128                         # "a one-layer one-head Transformer block whose hidden dimension is cut to be 128"
WARM_UP = 1e-5                      # CoOp's rate in its one epoch of warm-up


# ------------------------------------------------------------------------------------------------- prompts (Sec. 3.1)

class Prompt(nn.Module):
    """A prompt of a kind: `coop` (text), `vpt` (image, every layer) or `upt` (both, by way of a small transformer)."""

    def __init__(self, kind, n_ctx, n_layers, d_text, d_image):
        super().__init__()
        self.U_T = nn.Parameter(0.02 * torch.randn(n_ctx, d_text)) if kind != "vpt" else None               # P in Eq. (2)
        self.U_V = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_image)) if kind != "coop" else None   # V in Eq. (3)
        if kind == "upt":
            self.text_in, self.text_out = nn.Linear(d_text, WIDTH), nn.Linear(WIDTH, d_text)
            self.image_in, self.image_out = nn.Linear(d_image, WIDTH), nn.Linear(WIDTH, d_image)
            self.block = common.clip.model.ResidualAttentionBlock(WIDTH, 1)

    def forward(self):
        """Text prompts [1, b, d_l] and image prompts [K, b, d_v], None for what the kind does not have."""
        if self.U_T is None or self.U_V is None:
            return None if self.U_T is None else self.U_T[None], self.U_V
        U = torch.cat([self.text_in(self.U_T), self.image_in(self.U_V.flatten(0, 1))])      # [b + K b, 128]
        U = self.block(U[:, None])[:, 0]                                        # Eq. (4); CLIP's blocks take [tokens, batch, width]
        b = len(self.U_T)
        return self.text_out(U[:b])[None], self.image_out(U[b:]).view_as(self.U_V)


class Prompts(nn.Module):
    """The source prompt, a prompt a target that came of it (none with `--adapt-epochs 0`), the matrix and the groups."""

    def __init__(self, prompt, n_tasks, group_size, adapted):
        super().__init__()
        self.source = prompt
        self.targets = nn.ModuleList(copy.deepcopy(prompt) for _ in range(n_tasks) if adapted)
        self.source.requires_grad_(not adapted)                                 # what is trained last is what counts
        self.register_buffer("accuracy", torch.zeros(n_tasks, n_tasks))         # per cent: of source i's prompt (row) on target j
        self.register_buffer("groups", torch.arange(n_tasks)[:, None].repeat(1, group_size))    # a target's own number comes first

    def of(self, target):
        return self.targets[target] if self.targets else self.source


def build(args, model, tasks):
    """The untrained prompts of the source and the targets."""
    visual, d_text = model.visual, model.ln_final.weight.shape[0]
    shape = (0, d_text, 0) if args.prompt == "coop" else (len(visual.transformer.resblocks), d_text, visual.class_embedding.shape[0])
    prompt = Prompt(args.prompt, args.n_ctx, *shape)
    for seed in args.seeds if args.init and not args.eval else []:
        load_source(args, seed, copy.deepcopy(prompt))                          # refuses what does not fit
    return Prompts(prompt, len(tasks), size_of(args, len(tasks)), adapted=args.adapt_epochs > 0).to(model.logit_scale.device)


# -------------------------------------------------------------------------------------- transferability (Sec. 4.3)

def transferability(accuracy):
    """Every column of accuracy [N, N] divided by its best: row = source, column = target (Sec. 4.3, Figure 4).

    "We normalized the scores to [0, 1] by dividing the transfer performance with the best one on that task"; a column of
    zeros stays zero.
    """
    return accuracy / accuracy.amax(dim=0).clamp(min=torch.finfo(accuracy.dtype).tiny)


def group_by_transfer(transfer, size):
    """For each target, itself and then its `size` - 1 best sources, the best first (Sec. 4.3).

    transfer: [N, N], row = source, column = target. Of equal sources the first is taken. Returns N lists of task numbers.
    """
    columns = torch.as_tensor(transfer).t().tolist()
    others = [sorted((i for i in range(len(column)) if i != j), key=lambda i: -column[i]) for j, column in enumerate(columns)]
    return [[j, *best[:size - 1]] for j, best in enumerate(others)]


def size_of(args, n_tasks):
    return n_tasks if args.group_size == "all" else args.group_size


def has_matrix(args, n_tasks):
    """Whether a run measures (or is given) who transfers to whom: for the study, and where there are partners to choose."""
    return args.transferability or 1 < size_of(args, n_tasks) < n_tasks


def choose_groups(args, accuracy):
    """Each target's group as a list of task numbers, its own first, as `--group-size` and `--grouping` say."""
    transfer = transferability(accuracy)
    return group_by_transfer(transfer if args.grouping == "best" else -transfer, size_of(args, len(accuracy)))


def read_transfer(path, names):
    """The accuracies [N, N] of the tasks `names` from the transfer.json of a study; UserError where they are not in there."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        known, accuracy = list(saved["tasks"]), torch.tensor(saved["accuracy"], dtype=torch.float32)
        fits = accuracy.shape == (len(known), len(known)) and accuracy.isfinite().all() and accuracy.min() >= 0
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise common.UserError(f"--transfer {path} is no transfer matrix: give the transfer.json that a run with --transferability wrote")
    missing = [name for name in names if name not in known]
    if missing:
        raise common.UserError(f"--transfer {path} is of the tasks {', '.join(map(str, known))} and has no '{missing[0]}': measure one "
                               "on the same --data with --transferability")
    rows = [known.index(name) for name in names]
    return accuracy[rows][:, rows]


def write_transfer(args, run, tasks, seed, accuracy):
    """Write transfer.csv (row = source, column = target) and transfer.json into the run folder, averaged over the seeds so far."""
    done = {s: torch.tensor(scores["transfer_accuracy"]) for s, scores in run.state["finished"].items()}
    mean, names = torch.stack([*done.values(), accuracy.cpu()]).mean(0), [task.name for task in tasks]
    transfer, text = transferability(mean), io.StringIO()
    csv.writer(text).writerows([["source", *names], *([name, *row] for name, row in zip(names, transfer.tolist()))])
    settings = {key: getattr(args, key) for key in ("prompt", "clip", "data", "split", "shots")}
    content = dict(settings, seeds=[*done, seed], tasks=names, accuracy=mean.tolist(), transfer=transfer.tolist())
    common.write_whole(run.folder / "transfer.csv", text.getvalue())
    common.write_whole(run.folder / "transfer.json", json.dumps(content, indent=1))


# ------------------------------------------------------------------------------------------------------- tasks and batches

def source_tasks(args, tasks, seed):
    """The tasks of stage 1: those of `--source`, or the targets themselves."""
    if args.source == "none" or args.init:
        return []
    if args.source in (None, args.data):
        return tasks
    sources = common.load_tasks(args.source, args.split, args.shots, seed, args.root)
    for task in sources if args.validate else []:
        task.train, task.test = common.hold_out(task.train, seed)               # what a target holds out, a source must not see
    return sources


def with_validation(tasks, seed):
    """The tasks with `val` set: the dataset's own, or "20% splits from the few-shot sampled training set", taken from `train`."""
    parts = [(task.train, task.val) if task.val is not None else common.hold_out(task.train, seed) for task in tasks]
    return [dataclasses.replace(task, train=train, val=val) for task, (train, val) in zip(tasks, parts)]


def batches_of(args, model, tasks, seed, epoch, seen):
    """Yield an epoch's steps: (images [b, 3, H, W], or their features [b, D] under `coop`, and labels [b]) a task.

    The same for every training of a seed. seen: where features of fixed views are kept.
    """
    if args.prompt != "coop":
        common.seed_everything(seed, epoch + 1)
        return (yield from common.image_batches(model, tasks, args, seed))
    views = []
    for task in tasks:
        key = (task.train, 0 if args.views else epoch)
        if key not in seen:
            seen.pop((task.train, epoch - 1), None)                             # fresh views are for one epoch
            common.seed_everything(seed, 2 * key[1])
            seen[key] = common.view_features(model, task.train, args.views or 1, args.min_crop)
        views.append(seen[key])
    common.seed_everything(seed, 2 * epoch + 1)
    for picks in common.epoch_batches([len(task.train) for task in tasks], args.batch_size):
        yield [(x[torch.randint(len(x), p.shape), p], labels[p]) for (x, labels), p in zip(views, picks)]


def texts_of(args, model, tasks):
    """The tasks' texts: tokens that take a learned context, or under `vpt` the fixed features [C, D] of the templates."""
    return common.zero_shot(model, tasks) if args.prompt == "vpt" else common.Texts(tasks, args.n_ctx)


def classifiers(model, texts, text_prompts):
    """The text features [C, D] of every task."""
    return texts if text_prompts is None else texts.encode(model, text_prompts[:, None])


# ------------------------------------------------------------------------------------------------------------- training

def losses_of(model, texts, prompt, batches):
    """Every task's mean cross-entropy over its own classes, [N].

    texts: from `texts_of`. batches: (images [b, 3, H, W], or features [b, D] where the prompt has no image part, labels [b]) a task.
    """
    text_prompts, image_prompts = prompt()
    with common.autocast(model):
        weights = classifiers(model, texts, text_prompts)                       # [C, D] a task
        features = [x for x, _ in batches] if image_prompts is None else common.encode_batches(model, batches, image_prompts[:, None])
    return common.task_losses(model, features, weights, batches)


@torch.no_grad()
def accuracies(model, preprocess, tasks, texts, prompt, images, seen):
    """Per cent right of images[i] of every task i under one prompt, None where there are none.

    seen: Images -> features, where they are kept for the next prompt if no prompt reaches the image encoder.
    """
    text_prompts, image_prompts = prompt()
    right = []
    for task, w, part in zip(tasks, classifiers(model, texts, text_prompts), images):
        if image_prompts is None and part not in seen and len(part):
            seen[part] = common.image_features(model, part, preprocess)
        features = seen[part] if image_prompts is None and len(part) else None
        right.append(common.evaluate(model, preprocess, task, w, image_prompts, part, features) if len(part) else None)
    return right


def keep_best(prompt, right, keep, best):
    """Copy a prompt to where it is the best so far on validation images; without any, always, so that the last one stays.

    right: validation accuracy a task, or None. keep: (module, numbers of tasks) pairs, judged by the mean over those tasks.
    best: [len(keep)], the best means so far, moved along.
    """
    for k, (module, members) in enumerate(keep):
        known = [right[i] for i in members if right[i] is not None]
        score = statistics.mean(known) if known else math.inf
        if score > best[k] or not known:
            best[k] = score
            module.load_state_dict(prompt.state_dict())


@dataclasses.dataclass
class Place:
    """Where a seed is in its trainings, one after another: their epochs are counted through, so that a killed run can go on."""
    run: common.Run
    seed: int
    prompts: Prompts
    done: int                       # epochs in the checkpoint that the run goes on from
    first: int = 0                  # epochs before the present training


def rate_of(args, epochs):
    """Epoch -> factor of the learning rate: one epoch of warm-up, then a cosine."""
    return lambda epoch: WARM_UP / args.lr if epoch == 0 else (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def learn(args, model, tasks, start, keep, epochs, phase, place, seen):
    """Train one prompt from `start` on tasks together, and fill the modules of `keep` with its best checkpoints (`keep_best`)."""
    prompt, best = copy.deepcopy(start).requires_grad_(), nn.Module()
    best.register_buffer("scores", torch.full((len(keep),), -1.0, dtype=torch.double))
    optimizer = torch.optim.Adam(prompt.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of(args, epochs))
    parts = dict(prompt=prompt, best=best, optimizer=optimizer, schedule=schedule)
    begin = min(max(place.done - place.first, 0), epochs)
    if 0 < begin < epochs:                                                      # killed in this training
        place.run.restore(place.seed, **parts)
    texts, preprocess, names = texts_of(args, model, tasks), test_transform(model), [task.name for task in tasks]
    for epoch in common.progress(range(begin, epochs), phase):
        losses = []
        for batches in batches_of(args, model, tasks, place.seed, epoch, seen):
            loss = losses_of(model, texts, prompt, batches).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        keep_best(prompt, accuracies(model, preprocess, tasks, texts, prompt, [task.val for task in tasks], seen), keep, best.scores)
        row = dict(phase=phase, tasks=" + ".join(names), loss=sum(losses) / len(losses))
        place.run.checkpoint(place.seed, place.first + epoch + 1, row, prompts=place.prompts, **parts)
    place.first += epochs


def test_transform(model):
    return common.clip.clip._transform(model.visual.input_resolution)           # what clip.load returns beside the model


def train(args, model, tasks, run, seed):
    """Measure transfer where it is asked for, learn the source prompt, and adapt it to the targets; returns all prompts."""
    common.seed_everything(seed)
    prompts, others, seen = build(args, model, tasks), source_tasks(args, tasks, seed), {}
    start, place = copy.deepcopy(prompts.source), Place(run, seed, prompts, done=run.restore(seed))
    if place.done:
        run.restore(seed, prompts=prompts)
    targets = with_validation(tasks, seed)
    sources = targets if others is tasks else with_validation(others, seed)
    tell_tasks(args, *((tasks, targets) if others is tasks else (others + tasks, sources + targets)))
    if args.transfer:
        prompts.accuracy.copy_(read_transfer(args.transfer, [task.name for task in tasks]))
    elif has_matrix(args, len(tasks)):                                          # Sec. 4.3
        for task, prompt in zip(targets, prompts.targets):
            learn(args, model, [task], start, [(prompt, [0])], args.adapt_epochs, "alone", place, seen)
        if place.done <= place.first:                                           # else the checkpoint has it
            images = [task.test if args.transferability else task.val if len(task.val) else task.train for task in targets]
            words = model, test_transform(model), tasks, texts_of(args, model, tasks)
            prompts.accuracy.copy_(torch.tensor([accuracies(*words, prompt, images, seen) for prompt in prompts.targets]))
        write_transfer(args, run, tasks, seed, prompts.accuracy)
    if sources:                                                                 # stage 1: "multitask source prompt initialization"
        learn(args, model, sources, start, [(prompts.source, range(len(sources)))], args.epochs, "source", place, seen)
    if args.init:
        load_source(args, seed, prompts.source)
    prompts.groups.copy_(torch.tensor(choose_groups(args, prompts.accuracy)))
    tell_groups(args, tasks, prompts)
    groups = [tuple(sorted(group)) for group in prompts.groups.tolist()]
    for members in dict.fromkeys(groups) if args.adapt_epochs and not args.transferability else []:
        keep = [(prompts.targets[i], [members.index(i)]) for i in members if groups[i] == members]
        together = [targets[i] for i in members]                                # stage 2: "multitask target prompt adaptation"
        learn(args, model, together, prompts.source, keep, args.adapt_epochs, "target", place, seen)
    return prompts


def load_source(args, seed, prompt):
    """Fill `prompt` with a seed's source prompt from `--init`; UserError where it is of another kind, length or backbone."""
    saved = common.load_prompts(args.init, "mvlpt")
    for key in ("prompt", "n_ctx", "clip"):
        if saved["settings"].get(key) != getattr(args, key):
            raise common.UserError(f"the source prompt in {args.init} was trained {common.said(key, saved['settings'].get(key))}, not "
                                   f"{common.said(key, getattr(args, key))}: use the same, or leave out --init to train one")
    if saved["settings"].get("source") == "none":
        raise common.UserError(f"{args.init} is of a run without stage 1 and has no source prompt: give one of a run that had a --source")
    if seed not in saved["prompts"]:
        seeds = ", ".join(map(str, saved["prompts"]))
        raise common.UserError(f"{args.init} has source prompts of the seeds {seeds}, not of {seed}: give those as --seeds")
    try:
        prompt.load_state_dict({k.removeprefix("source."): v for k, v in saved["prompts"][seed].items() if k.startswith("source.")})
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise common.UserError(f"the source prompt in {args.init} does not fit {args.clip} as it is: give one of this --clip") from error


# ------------------------------------------------------------------------------------------------------- what a run tells

def tell_tasks(args, tasks, parts):
    """Say which classes have fewer images than `--shots`, and which tasks have no validation images."""
    for task in tasks if args.shots and not args.validate else []:
        counts = Counter(task.train.labels).values()
        if min(counts) < args.shots:
            print(f"--shots {args.shots}: {sum(n < args.shots for n in counts)} of {task.name}'s {len(counts)} classes can give fewer (at "
                  f"least {min(counts)}), with some left to test on")
    bare = [part.name for part in parts if not len(part.val)]
    if bare:
        print(f"no validation images of {', '.join(bare)}: the last checkpoint is kept", flush=True)


def tell_groups(args, tasks, prompts):
    """Print the groups."""
    names = [task.name for task in tasks]
    if size_of(args, len(tasks)) > 1:
        groups = "  ".join("[" + ", ".join(names[i] for i in group) + "]" for group in prompts.groups.tolist())
        print(f"groups ({args.grouping}), a target first: {groups}", flush=True)


def score(args, model, preprocess, tasks, prompts):
    """Zero-shot CLIP's and the method's accuracy on every task, in per cent; the groups, and the transfer matrix if there is one."""
    scores, names = dict(zero_shot=[], accuracy=[]), [task.name for task in tasks]
    for i, (task, plain) in enumerate(zip(tasks, common.zero_shot(model, tasks))):
        seen = {task.test: common.image_features(model, task.test, preprocess)}
        scores["zero_shot"].append(common.evaluate(model, preprocess, task, plain, features=seen[task.test]))
        scores["accuracy"] += accuracies(model, preprocess, [task], texts_of(args, model, [task]), prompts.of(i), [task.test], seen)
    scores["groups"] = [[names[i] for i in group] for group in prompts.groups.tolist()]
    if has_matrix(args, len(tasks)):
        scores.update(transfer_accuracy=prompts.accuracy.tolist(), transfer=transferability(prompts.accuracy).tolist())
    return scores


# ------------------------------------------------------------------------------------------------------- command line

def check(args, tasks):
    """Refuse words that contradict each other, and groups, a matrix and source tasks that do not fit."""
    n, size, group = len(tasks), size_of(args, len(tasks)), f"--group-size {args.group_size}"
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
    if args.transfer and not args.eval:
        read_transfer(args.transfer, [task.name for task in tasks])
    for task in [] if args.eval else [task for seed in args.seeds for task in source_tasks(args, [], seed)]:
        common.tokenize(task.class_names, n_text(args), "{}" if n_text(args) else task.template)
        for i in range(len(task.train)):
            task.train[i]                                                       # an image that cannot be decoded


def n_text(args):
    return 0 if args.prompt == "vpt" else args.n_ctx


def group_size(word):
    return word if word == "all" else int(word)


def main(argv=None):
    parser = common.arguments("mvlpt", __doc__, PAPER, TINY)
    add = parser.add_argument
    add("--prompt", choices=["coop", "vpt", "upt"], help="text context, image prompts in every layer, or both through a transformer "
        "(default upt; coop has --n-ctx 16 --views 8, vpt --n-ctx 16)")
    add("--source", metavar="NAMES", help="source tasks of stage 1, as in --data, or none: a random start (default: those of --data)")
    add("--init", metavar="FILE", help="the prompts.pt of another run, whose source prompt is taken instead of stage 1")
    add("--adapt-epochs", type=int, help="epochs of stage 2; 0: the source prompt serves every target as it is (default as --epochs)")
    add("--group-size", type=group_size, metavar="N|all", help="how many tasks adapt together: a target and its partners (default 1)")
    add("--grouping", choices=["best", "worst"], help="partners of the highest or of the lowest transferability (default best)")
    add("--transfer", metavar="FILE", help="the transfer.json of a study, instead of measuring it")
    add("--transferability", action="store_true", help="the study: train a prompt on each task alone and score it on all")
    kind = parser.parse_args(argv).prompt or PAPER["prompt"]
    parser.set_defaults(paper=dict(PAPER, **PAPER_OF[kind]), tiny=dict(TINY, **TINY_OF[kind]))
    args = common.parse(parser, argv)
    args.adapt_epochs = args.epochs if args.adapt_epochs is None else args.adapt_epochs
    if args.transferability and args.source is None:
        args.source = "none"
    usual = dict(prompt="upt", source=None, init=None, adapt_epochs=args.epochs, group_size=1, grouping="best")
    args.variant = ", ".join(common.said(key, getattr(args, key)) for key in usual if getattr(args, key) != usual[key]) or None
    common.run_seeds(args, build, train, score, n_text(args), image_prompts=args.prompt != "coop", check=check)


if __name__ == "__main__":
    common.script(main)
