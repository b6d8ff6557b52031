r"""MVLPT: a prompt learned on many source tasks starts the prompts of the target tasks.

Shen, Yang, Zhang, Zhai, Gonzalez, Keutzer and Darrell, "Multitask Vision-Language Prompt Tuning",
WACV 2024.

The idea: (1) A prompt learned on all source tasks together is a better start for every target task
than random numbers. (2) A target also learns from tasks that resemble it: those whose own prompts,
used as they are, do best on it. (3) So each target adapts the source prompt alone or together with
its best partners, and keeps the checkpoint that is best on its own held-out images. A prompt is a
text context (`coop`), image prompts in every layer (`vpt`), or both, tied by a small transformer
(`upt`); with these, MVLPT is called MCoOp, MVPT and MUPT.

    python mvlpt.py                                                     # built-in benchmark, CPU
    python mvlpt.py --data elevater12 --source coop11 --shots 20 --seeds 1 2 3      # Table 1, MUPT
                        # 1, 5, 20 shots; --prompt coop or vpt; --source none: CoOp, VPT, UPT;
                        # Figure 1: --clip ViT-B/32, ViT-B/16, ViT-L/14; Figure 5: --n-ctx 4, 8, 16
    python mvlpt.py --data elevater20 --shots 20 --seeds 1 2 3 --group-size best    # Table 2, M/M
                        # --source none: -/M; --source none --group-size 1: -/S
    python mvlpt.py --data elevater20 --shots 20 --seeds 1 2 3 --group-size 2 --grouping worst
                        # Table 3, Worst M, also --group-size 3; M/S: --group-size 1
    python mvlpt.py --data elevater12 --source coop10 --shots 20 --seeds 1 2 3      # Table 4
                        # also --source imagenet and coop11
    python mvlpt.py --data elevater20 --shots 20 --transferability --plot           # Figure 4
    python mvlpt.py --data elevater12 --source coop11 --shots 20 --seeds 1 2 3 --heads 4
                        # Figure 6; also --layers 2 and --width 256
    python mvlpt.py --data officehome --split 0.1 --seeds 1 2 3 --adapt-epochs 0 --epochs 50 \
        --lr 0.0015 --batch-size 16 --n-ctx 16                      # JSCPT, Table 1, column MVLPT
                        # (there by SGD at a fixed rate, here by Adam, warm-up and cosine)

`--init DIR/prompts.pt` takes another run's source prompt instead of stage 1, `--transfer
DIR/transfer.json` the matrix that a study or a run with partners has measured.

paper           code                            paper           code
P, Eq. (2)      Prompt.U_T under `coop`         U_T, U_V        Prompt.U_T, Prompt.U_V
V, Eq. (3)      Prompt.U_V under `vpt`          theta, Eq. (4)  Prompt.blocks and the maps around it
source prompt   Prompts.source                  Figure 4        transferability(Prompts.accuracy)
target prompts  Prompts.targets                 Table 5         Prompts.groups

Choices the paper leaves open
- UPT: text context and image prompts of all layers pass, each modality through a linear map, to
  width 128, as one sequence through the block, and back through two maps: 566,400 parameters at
  ViT-B/16 (the paper: 0.45% of CLIP). The block is CLIP's own pre-norm residual block, which the
  authors ran: U' = U + SA(LN(U)), U^ = U' + FFN(LN(U')). Eq. (4) prints U' = SA(U) + LN(U),
  U^ = FFN(LN(U')) + LN(U').
- Prompts start at N(0, 0.02), the text's as in CoOp, the images' too (the authors' program:
  uniform, 1.8 times as wide); maps and block as PyTorch makes them. Without stage 1 all targets
  start from the same random prompt. Under `vpt` the text is "a photo of a [class]" on all datasets.
- Adam without weight decay. The warm-up epoch has CoOp's constant rate, 1e-5.
- A step takes a batch (of 32) of every task, and the loss is the sum of the tasks', each over its
  own classes; an epoch is as long as the largest task needs.
- Held-out part: 20% of the few-shot set, spread over the classes; up to 4 images per class of a
  dataset's own validation part (CoOp's protocol; of ELEVATER's datasets none is used). At 1 shot
  without one the training images serve. The first of equally good epochs is kept, as in CoOp's
  program; for the source prompt by the mean over the source tasks.
- Each task has its dataset's metric, also on the held-out part. In VOC 2007 an image has several
  classes: the loss is the cross-entropy with their uniform distribution, as the authors train it.
- Source tasks default to the targets, and have as many shots, or the same split (Sec. 4.1). Tasks
  that train on images which a target tests on are rejected, also where `--init` has seen them.
- Transfer is measured on held-out images, one seed at a time, so that no test image chooses a
  group. Only the study (`--transferability`) measures it on test images, as Figure 4 does; its
  prompts are the single-task baselines, and train as long as an adaptation does.
- Partners are the sources of the largest transfer to a target (Sec. 4.3), the worst those of the
  smallest. Targets that have the same group train once and keep a checkpoint each. `--group-size
  best` takes the size among 1, 2 and 3 whose checkpoint is best on the target's held-out part, of
  equally good ones the smallest. The paper's "Worst M" is below single-task adaptation, so it has
  partners: sizes 2 and 3.
- Fresh views every epoch; ELEVATER's images are only resized and cropped at the centre. At the
  built-in backbone `coop` draws 8 views per image once instead, so that the frozen encoder sees
  each of them once, and all views show at least 0.6 of the area, because `tiny` was never trained
  on small crops.
- Where the authors' program departs from the paper, this follows the paper. The program runs SGD,
  mixes the tasks' images under one softmax over all tasks' classes, and feeds UPT's block a tensor
  [1, n, 128] where it expects [n, 1, 128], so that no prompt attends to another.
"""
import argparse
import copy
import csv
import filecmp
import io
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import common
import data

WARM_UP = 1e-5                  # CoOp's learning rate in its one epoch of warm-up
PHOTO = "a photo of a {}"       # "the fixed prompt 'a photo of a [CLASS]'", the text under `vpt`


@dataclass
class Args(common.Args):
    """Sec. 4, "Training Details"; the defaults of UPT."""

    method = "mvlpt"
    PATHS = ("init", "transfer")
    clip: str = "ViT-B/16"  # "ViT-B/16 for all the experiments except for the scaling ablation"
    epochs: int = 200  # of stage 1: "trained with a batch size of 32 for 200 epochs"
    lr: float = 0.002  # "Adam optimizer and cosine learning rate schedule. [...] 2e-3"
    batch_size: int = 32  # images per task
    n_ctx: int = 4  # "4 contexts for UPT only", 16 for --prompt coop and vpt
    prompt: Literal["coop", "vpt", "upt"] = "upt"  # text context, image prompts, or both tied
    source: str | None = None  # tasks of stage 1, as in --data, or none (default: the targets)
    init: str | None = None  # the prompts.pt of a run whose source prompt replaces stage 1
    adapt_epochs: int | None = None  # of stage 2 (default: --epochs); 0: the source prompt as it is
    group_size: int | Literal["all", "best"] = 1  # tasks adapted together; best: Table 2
    grouping: Literal["best", "worst"] = "best"  # partners by transferability; worst: Table 3
    transfer: str | None = None  # the transfer.json of a run, instead of measuring it
    transferability: bool = False  # the study of Figure 4: each task's prompt scored on all tasks
    heads: int = 1  # UPT: "a one-layer one-head Transformer block"; others: Figure 6
    layers: int = 1  # UPT's blocks; others: Figure 6
    width: int = 128  # UPT: "whose hidden dimension is cut to be 128"; others: Figure 6

    def __post_init__(self):
        if self.source not in (None, "none"):
            self.source = data.absolute(self.source)


@dataclass
class LongArgs(Args):
    """The defaults of CoOp and VPT."""

    n_ctx: int = 16  # "a context length of 16 for both CoOp and VPT"


# how they were chosen: data/README.md, "Settings for `tiny`"
TINY = dict(epochs=10, batch_size=8, min_crop=0.6)
TINY_OF = dict(coop=dict(views=8), vpt=dict(n_ctx=4))


# ---------------------------------------------------------------------------- prompts (Sec. 3.1)

class Prompt(nn.Module):
    """A prompt: `coop` (text), `vpt` (image, every layer) or `upt` (both, via a transformer)."""

    def __init__(self, kind, n_ctx, n_layers, d_text, d_image, heads=1, layers=1, width=128):
        """n_layers: of the image encoder; heads, layers, width: of UPT's transformer."""
        super().__init__()
        self.U_T = self.U_V = None
        if kind in ("coop", "upt"):
            self.U_T = nn.Parameter(0.02 * torch.randn(n_ctx, d_text))
        if kind in ("vpt", "upt"):
            self.U_V = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_image))
        if kind == "upt":
            block = common.clip.model.ResidualAttentionBlock
            self.text_in, self.text_out = nn.Linear(d_text, width), nn.Linear(width, d_text)
            self.image_in, self.image_out = nn.Linear(d_image, width), nn.Linear(width, d_image)
            self.blocks = nn.Sequential(*[block(width, heads) for _ in range(layers)])

    def forward(self):
        """Text prompts [1, b, d_l] and image prompts [K, b, d_v]; None for what a kind lacks."""
        if self.U_V is None:
            return self.U_T[None], None                                         # Eq. (2)
        if self.U_T is None:
            return None, self.U_V                                               # Eq. (3)
        b = len(self.U_T)
        U = torch.cat([self.text_in(self.U_T), self.image_in(self.U_V.flatten(0, 1))])
        U = self.blocks(U[:, None])[:, 0]       # [b + K b, width], Eq. (4), batches of one
        return self.text_out(U[:b])[None], self.image_out(U[b:]).view_as(self.U_V)


class Prompts(nn.Module):
    """The source prompt, what it has seen, a prompt per target, the transfer, and the groups."""

    def __init__(self, prompt, n_tasks, adapted):
        """adapted: whether the targets have prompts of their own (not with `--adapt-epochs 0`)."""
        super().__init__()
        self.source = prompt.requires_grad_(not adapted)    # what is trained last is what counts
        self.targets = nn.ModuleList(copy.deepcopy(prompt) for _ in range(n_tasks) if adapted)
        self.targets.requires_grad_()
        self.register_buffer("seen", torch.zeros(0, dtype=torch.long))  # fingerprints of images
        self.register_buffer("accuracy", torch.zeros(n_tasks, n_tasks))   # %, source i, target j
        groups = torch.full((n_tasks, n_tasks), -1)             # of each target: itself comes first
        groups[:, 0] = torch.arange(n_tasks)
        self.register_buffer("groups", groups)

    def load_state_dict(self, saved, **how):
        """As always, with room for as many fingerprints as were saved."""
        self.seen = self.seen.new_zeros(len(saved["seen"]))
        return super().load_state_dict(saved, **how)

    def of_targets(self):
        """The targets' prompts, or the one that serves them all."""
        return list(self.targets) or [self.source]

    def group_lists(self):
        """Each target's group as a list of task numbers, its own first."""
        return [[i for i in row if i >= 0] for row in self.groups.tolist()]


def build(args, model, tasks):
    """The untrained prompts of the source and of the targets."""
    n_layers = d_image = 0
    if args.prompt != "coop":
        visual = model.visual
        n_layers, d_image = len(visual.transformer.resblocks), len(visual.class_embedding)
    prompt = Prompt(args.prompt, args.n_ctx, n_layers, len(model.ln_final.weight), d_image,
                    args.heads, args.layers, args.width)
    if args.init and not (args.eval or args.resume):
        for seed in args.seeds:
            read_source(args, copy.deepcopy(prompt), seed)      # rejects what does not fit
    prompts = Prompts(prompt, len(tasks), adapted=epochs_of_stage_2(args) > 0)
    return prompts.to(model.logit_scale.device)


def epochs_of_stage_2(args):
    """`--adapt-epochs`, by default as many as stage 1 has."""
    return args.epochs if args.adapt_epochs is None else args.adapt_epochs


def texts_of(args, tasks):
    """The tasks' texts: a context before the class name, or under `vpt` "a photo of a [class]."."""
    if args.prompt == "vpt":
        return common.Texts([replace(task, template=PHOTO) for task in tasks], templates=True)
    return common.Texts(tasks, args.n_ctx)


# --------------------------------------------------------------------- transferability (Sec. 4.3)

def transferability(accuracy):
    """Accuracies [N, N] (row = source, column = target), each divided by the best of its column.

    A column of zeros stays zero (Figure 4).
    """
    return accuracy / accuracy.amax(dim=0).clamp(min=torch.finfo(accuracy.dtype).tiny)


def group_by_transfer(transfer, size):
    """For each target, itself and then its `size` - 1 best sources, the best first (Sec. 4.3).

    transfer: [N, N], row = source, column = target. Of equal sources the first is taken.
    Returns lists of task numbers.
    """
    groups = []
    for target, column in enumerate(torch.as_tensor(transfer).t().tolist()):
        others = [i for i in range(len(column)) if i != target]
        others.sort(key=lambda i: -column[i])
        groups.append([target, *others[:size - 1]])
    return groups


def group_sizes(args, n_tasks):
    """The sizes of the groups that a target may adapt in."""
    if args.group_size == "best":
        return [size for size in (1, 2, 3) if size <= n_tasks]      # Table 5: up to two partners
    return [n_tasks if args.group_size == "all" else args.group_size]


def needs_transfer(args, n_tasks):
    """Whether there are partners to choose, or the study is asked for."""
    return args.transferability or any(1 < size < n_tasks for size in group_sizes(args, n_tasks))


def candidate_groups(args, accuracy):
    """Every target's possible groups, by size: a list, over sizes, of lists over targets."""
    transfer = transferability(accuracy)
    if args.grouping == "worst":
        transfer = -transfer
    return [group_by_transfer(transfer, size) for size in group_sizes(args, len(accuracy))]


@torch.no_grad()
def accuracies(args, model, tasks, images, prompt):
    """What one prompt scores on images[t] of every task t, in %: [N]."""
    text_prompts, image_prompts = prompt()
    texts = texts_of(args, tasks)
    w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)       # [C, D]
    scores = []
    for task, part, own in zip(tasks, images, texts.classifiers(w)):
        _, x, labels = common.image_features(model, part, image_prompts, args.workers)
        scores.append(common.score(task.metric, common.logits(model, x, own), labels))
    return torch.tensor(scores)


def measure_transfer(args, model, tasks, prompts, run):
    """Train a prompt on each task alone, from a random start, and score it on every task."""
    for i, task in enumerate(tasks):
        best = learn(args, model, run, f"alone {task.name}", [task], prompts.source,
                     epochs_of_stage_2(args), keep=[[0]])
        prompts.targets[i].load_state_dict(best.prompts[0].state_dict())
    images, kinds = zip(*[scored_images(args, task) for task in tasks])
    for i in run.epochs("transfer", len(tasks), prompts=prompts):               # a row per "epoch"
        prompts.accuracy[i] = accuracies(args, model, tasks, images, prompts.targets[i])
    write_transfer(args, run, [task.name for task in tasks], prompts.accuracy, kinds)


def scored_images(args, task):
    """The images that transfer to a task is measured on, and what they are."""
    if args.transferability:
        return task.test, "held-out" if args.validate else "test"
    return held_out(task), "held-out" if has_held_out(task) else "training"


# ------------------------------------------------------------------------- training (Sec. 3.2)

class Best(nn.Module):
    """The checkpoints that are best so far, [S] of them, and their scores on held-out images."""

    def __init__(self, prompt, n):
        super().__init__()
        self.prompts = nn.ModuleList(copy.deepcopy(prompt) for _ in range(n))
        self.register_buffer("scores", torch.full((n,), -1.0))

    def keep(self, prompt, scores):
        """Copy a prompt to every place where its score (of scores [S]) is the best so far."""
        for place, score in enumerate(scores):
            if score > self.scores[place]:
                self.scores[place] = score
                self.prompts[place].load_state_dict(prompt.state_dict())


class SameTasks:
    """A part of a phase that rejects a checkpoint whose tasks, classes or images differ."""

    def __init__(self, tasks):
        self.contents = common.contents(tasks)

    def state_dict(self):
        return self.contents

    def load_state_dict(self, saved):
        if saved != self.contents:
            raise ValueError("other tasks, classes or images")


def has_held_out(task):
    """Whether a task has a held-out part: not at 1 shot, where a class gives its last image."""
    return task.val is not None and len(task.val) > 0


def held_out(task):
    """The images that choose a checkpoint: the held-out part, or else the training images."""
    return task.val if has_held_out(task) else task.train


def rate_of(args, epochs):
    """Epoch -> factor of the learning rate: one epoch of warm-up, then a cosine."""
    def factor(epoch):
        if epoch == 0:
            return WARM_UP / args.lr
        return (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
    return factor


def learn(args, model, run, phase, tasks, start, epochs, keep):
    """Train a copy of the prompt `start` on tasks together, and keep its best checkpoints.

    keep: a list of task numbers per checkpoint wanted, which is then the best on the mean score of
    these tasks' held-out parts. Returns a `Best` of them.
    """
    prompt = copy.deepcopy(start).requires_grad_()
    best = Best(start, len(keep)).to(model.logit_scale.device)
    texts = texts_of(args, tasks).to(model.logit_scale.device)
    fixed = common.encode_text(model, texts.tokens) if args.prompt == "vpt" else None   # [C, D]
    optimizer = torch.optim.Adam(prompt.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of(args, epochs))
    for epoch in run.epochs(phase, epochs, prompt=prompt, best=best, optimizer=optimizer,
                            schedule=schedule, tasks=SameTasks(tasks)):
        frozen = args.prompt == "coop"          # the image encoder: it has no prompts
        for images, labels, task in common.batches(args, model, tasks, frozen):
            text_prompts, image_prompts = prompt()                              # Eq. (2), (3), (4)
            x = common.encode_image(model, images, image_prompts)               # [B, D]
            w = fixed
            if text_prompts is not None:
                w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)   # [C, D]
            losses = common.task_losses(model, x, w, labels, task, texts)       # [N]
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.of_present(losses, task))
        schedule.step()
        scores = accuracies(args, model, tasks, [held_out(task) for task in tasks], prompt)
        wanted = torch.stack([scores[numbers].mean() for numbers in keep])
        best.keep(prompt, wanted)
        run.log(val=wanted.mean())
    return best


def train(args, model, tasks, run):
    """Choose partners by transferability (Sec. 4.3), then the two stages of Sec. 3.2."""
    seed, names = args.seeds[0], [task.name for task in tasks]
    prompts = build(args, model, tasks)
    targets = with_held_out(tasks, seed)
    if args.transfer:
        for _ in run.epochs("transfer", 1, prompts=prompts):    # once, also where a run is resumed
            prompts.accuracy.copy_(read_transfer(args, names, seed))
    elif needs_transfer(args, len(tasks)):
        measure_transfer(args, model, targets, prompts, run)
    if args.init:
        for _ in run.epochs("init", 1, prompts=prompts):
            prompts.seen = read_source(args, prompts.source, seed).to(prompts.seen.device)
    elif stage_1(args):
        learn_source(args, model, targets, prompts, run)
    if prompts.targets and not args.transferability:
        adapt(args, model, targets, prompts, run)
    return prompts


def with_held_out(tasks, seed):
    """The tasks with their held-out parts set; says where there are none."""
    tasks = data.with_held_out(tasks, seed)
    bare = [task.name for task in tasks if not has_held_out(task)]
    if bare:
        print(f"no image of {', '.join(bare)} can be held out: the training images choose the "
              "checkpoint", flush=True)
    return tasks


def stage_1(args):
    """Whether a source prompt is trained."""
    return not (args.init or args.transferability or args.source == "none")


def learn_source(args, model, targets, prompts, run):
    """Stage 1, "multitask prompt initialization": one prompt on all source tasks together."""
    sources = targets
    if other_sources(args):
        seed = args.seeds[0]
        sources = with_held_out(common.divided_tasks(args, args.source, seed), seed)
    best = learn(args, model, run, "source", sources, prompts.source, args.epochs,
                 keep=[list(range(len(sources)))])
    prompts.source.load_state_dict(best.prompts[0].state_dict())
    seen = torch.cat([fingerprints(images) for images in parts_seen(sources)])
    prompts.seen = seen.to(prompts.seen.device)


def other_sources(args):
    """Whether stage 1 has tasks of its own, not the targets."""
    return stage_1(args) and args.source not in (None, args.data)


def adapt(args, model, targets, prompts, run):
    """Stage 2, "multitask prompt adaptation": each group of targets from the source prompt."""
    names = [task.name for task in targets]
    owners = {}                             # tasks trained together -> {target: its group}
    for groups in candidate_groups(args, prompts.accuracy):
        for target, group in enumerate(groups):
            owners.setdefault(tuple(sorted(group)), {})[target] = group
    scores = [-1.0] * len(targets)
    for members, owned in owners.items():                       # the smallest groups come first
        together = " + ".join(names[i] for i in members)
        best = learn(args, model, run, f"target {together}", [targets[i] for i in members],
                     prompts.source, epochs_of_stage_2(args),
                     keep=[[members.index(target)] for target in owned])
        for place, (target, group) in enumerate(owned.items()):
            if best.scores[place] > scores[target]:
                scores[target] = best.scores[place].item()
                prompts.targets[target].load_state_dict(best.prompts[place].state_dict())
                prompts.groups[target] = -1
                prompts.groups[target, :len(group)] = torch.tensor(group)
    if args.group_size != 1:
        told = ["[" + ", ".join(names[i] for i in group) + "]" for group in prompts.group_lists()]
        print(f"groups ({args.grouping} partners), a target first: {'  '.join(told)}", flush=True)


def score(args, model, tasks, prompts):
    """The accuracies of zero-shot CLIP and of MVLPT, the groups, and the transfer if measured."""
    names, own = [task.name for task in tasks], prompts.of_targets()
    with torch.no_grad():
        text_prompts, image_prompts = zip(*[prompt() for prompt in own])
        if args.prompt == "vpt":
            texts = texts_of(args, tasks)
            w = common.encode_text(model, texts.tokens)
        else:
            sets = [t % len(own) for t in range(len(tasks))]
            texts = common.Texts(tasks, args.n_ctx, sets)
            text_prompts = torch.stack(text_prompts, dim=1)                     # [1, N, b, d_l]
            w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)
        image_prompts = None if args.prompt == "coop" else torch.stack(image_prompts, dim=1)
        scores = common.evaluate(args, model, tasks, texts.classifiers(w), image_prompts)
    scores["groups"] = [[names[i] for i in group] for group in prompts.group_lists()]
    if args.transfer or needs_transfer(args, len(tasks)):
        scores["transfer_accuracy"] = prompts.accuracy.tolist()
        scores["transfer"] = transferability(prompts.accuracy).tolist()
    return scores


# ------------------------------------------------- transfer matrices and source prompts from files

UPT = ("heads", "layers", "width")
MEASURED = ("prompt", "n_ctx", "clip", "split", "shots", *UPT)  # a matrix serves runs with the same


def write_transfer(args, run, names, accuracy, kinds):
    """Write transfer.csv and transfer.json: the accuracies of each seed so far and their mean.

    accuracy [N, N] (row = source, column = target), of args.seeds[0]; names: of the tasks; kinds:
    what images of each task were scored, "test", "held-out" or "training".
    """
    of_seed = {seed: scores["transfer_accuracy"] for seed, scores in run.state["finished"].items()}
    of_seed[args.seeds[0]] = accuracy.tolist()
    mean = torch.tensor(list(of_seed.values())).mean(dim=0)
    transfer = transferability(mean).tolist()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", *names])
    writer.writerows([name, *row] for name, row in zip(names, transfer))
    about = {key: getattr(args, key) for key in MEASURED}
    about.update(data=args.data, images=" and ".join(dict.fromkeys(kinds)), tasks=names,
                 accuracy=mean.tolist(), transfer=transfer, accuracy_of_seed=of_seed)
    common.write_whole(run.folder / "transfer.csv", text.getvalue())
    common.write_whole(run.folder / "transfer.json", json.dumps(about, indent=1))


def read_transfer(args, names, seed):
    """The accuracies [N, N] of the tasks `names` from args.transfer, a transfer.json.

    A seed has its own, because what one seed holds out another may test on. Raises UserError where
    the file is no transfer matrix, was measured with another prompt, backbone or split, or lacks a
    task or a seed.
    """
    path, of_seed = args.transfer, {}
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        known, images = list(saved["tasks"]), str(saved["images"])
        for number, rows in saved["accuracy_of_seed"].items():
            of_seed[int(number)] = matrix = torch.tensor(rows, dtype=torch.float32)
            if matrix.shape != (len(known), len(known)) or not (0 <= matrix).all():    # also NaN
                raise ValueError("no accuracies of these tasks")
        if not all(key in saved for key in MEASURED):
            raise KeyError("settings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise common.UserError(f"--transfer {path} is no transfer matrix: give the transfer.json "
                               "that a run of --transferability wrote") from None
    agree(args, saved, MEASURED, f"--transfer {path}")
    missing = [name for name in names if name not in known]
    if missing:
        raise common.UserError(f"--transfer {path} is of the tasks {', '.join(map(str, known))}, "
                               f"without '{missing[0]}': measure one on the same --data with "
                               "--transferability")
    if seed not in of_seed:
        raise common.UserError(f"--transfer {path} is of the seeds {', '.join(map(str, of_seed))}, "
                               f"not of {seed}: give those as --seeds")
    if "test" in images:
        print(f"warning: --transfer {path} was measured on test images, so they choose the groups: "
              "a study with --validate keeps them out", file=sys.stderr)
    rows = [known.index(name) for name in names]
    return of_seed[seed][rows][:, rows]


def saved_source(args, seed):
    """A seed's source prompt in args.init: its state dict, fingerprints of the images it has seen.

    Raises UserError where the file is of another kind of prompt, backbone or split, or has no
    source prompt of this seed.
    """
    saved = common.load_prompts(args.init, "mvlpt")
    before, state = saved["settings"], saved["prompts"].get(seed)
    same = ("prompt", "n_ctx", "clip", "split", "shots", "validate", *UPT)
    agree(args, before, same, f"the source prompt in {args.init}")
    if before.get("source") == "none" or before.get("transferability"):
        raise common.UserError(f"{args.init} is of a run without stage 1 and has no source prompt: "
                               "give one of a run that had a --source")
    if seed not in saved["prompts"]:
        seeds = ", ".join(map(str, saved["prompts"]))
        raise common.UserError(f"{args.init} has source prompts of the seeds {seeds}, not of "
                               f"{seed}: give those as --seeds")
    try:
        source = {key.removeprefix("source."): value for key, value in state.items()
                  if key.startswith("source.")}
        return source, state["seen"].long()
    except (TypeError, KeyError, AttributeError) as error:
        raise common.UserError(f"{args.init} holds no source prompt: give the prompts.pt that a "
                               "run of mvlpt wrote") from error


def read_source(args, prompt, seed):
    """Load a seed's source prompt from args.init into `prompt`; returns what it has seen.

    Raises UserError as `saved_source`, and where it does not fit.
    """
    source, seen = saved_source(args, seed)
    try:
        prompt.load_state_dict(source)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise common.UserError(f"the source prompt in {args.init} does not fit {args.clip} as it "
                               "is: give one of this --clip") from error
    return seen


def agree(args, saved, keys, owner):
    """Raise UserError where the settings `saved` with `owner` are not those of this run."""
    for key in keys:
        if saved.get(key) != getattr(args, key):
            raise common.UserError(f"{owner} is of a run {common.said(key, saved.get(key))}, not "
                                   f"{common.said(key, getattr(args, key))}: use the same, or "
                                   "leave the file out")


# -------------------------------------------------------------------- checks before training

def check_settings(args):
    """Reject settings that contradict each other, whatever the tasks are."""
    adapted, alone = epochs_of_stage_2(args) > 0, args.group_size == 1
    upt = (args.heads, args.layers, args.width)
    if epochs_of_stage_2(args) < 0:
        raise common.UserError(f"--adapt-epochs {args.adapt_epochs} is too small: give 0 or more")
    if isinstance(args.group_size, int) and args.group_size < 1:
        raise common.UserError(f"--group-size {args.group_size} is too small: give 1 or more, all, "
                               "or best")
    if min(upt) < 1:
        raise common.UserError(f"--heads, --layers and --width cannot be {min(upt)}: give 1 or "
                               "more")
    if args.width % args.heads:
        raise common.UserError(f"--width {args.width} is not a multiple of --heads {args.heads}: "
                               "give one that is")
    if args.prompt != "upt" and upt != (Args.heads, Args.layers, Args.width):
        raise common.UserError(f"--heads, --layers and --width are of --prompt upt, not "
                               f"{args.prompt}: leave them out")
    if args.init and args.source:
        raise common.UserError("--init gives the source prompt that --source would train: give one "
                               "of them")
    given = args.source or args.init or args.transfer or args.grouping == "worst" or not alone
    if args.transferability and given:
        raise common.UserError("--transferability trains a prompt per task alone, from a random "
                               "start: leave out --source, --init, --transfer, --group-size and "
                               "--grouping")
    if not adapted and (args.transferability or args.source == "none" or not alone):
        raise common.UserError("--adapt-epochs 0 leaves only the source prompt of stage 1: leave "
                               "out --group-size, --transferability and --source none")


def check(args, tasks):
    """Reject groups, a matrix, a source prompt and source tasks that do not fit the tasks."""
    n, choice = len(tasks), f"--grouping {args.grouping}"
    if isinstance(args.group_size, int) and args.group_size > n:
        raise common.UserError(f"--group-size {args.group_size} is more than the {n} tasks of "
                               f"--data {args.data}: give fewer, or all")
    if args.transfer:
        choice = f"--transfer {args.transfer}"
    if (args.transfer or args.grouping == "worst") and not needs_transfer(args, n):
        remedy = f"give a --group-size from 2 to {n - 1}" if n > 2 else "leave it out"
        raise common.UserError(f"{choice} chooses partners, and --group-size {args.group_size} of "
                               f"{n} tasks leaves no choice: {remedy}")
    texts_of(args, tasks)                                       # rejects texts that are too long
    if args.eval:
        return
    if not args.resume:
        for seed in args.seeds:
            if args.transfer:
                read_transfer(args, [task.name for task in tasks], seed)
            if args.init:
                _, seen = saved_source(args, seed)
                reject_seen(args, seed, dict.fromkeys(seen.tolist()),
                            f"the source prompt in {args.init}")
    if other_sources(args):
        check_sources(args)


def check_sources(args):
    """Reject source tasks that cannot be trained on, or that train on the targets' test images."""
    if args.download:
        data.find_listings(args.source, args.root, download=True)
    for seed, sources in common.checked_tasks(args, args.source, n_text(args)).items():
        texts_of(args, sources)                                 # rejects texts that are too long
        seen = {}
        for images in parts_seen(sources):
            seen.update(zip(fingerprints(images).tolist(), images.items))
        reject_seen(args, seed, seen, f"--source {args.source}")


def parts_seen(tasks):
    """The image lists that a training on tasks sees: also held-out ones choose its checkpoint."""
    return [images for task in tasks for images in (task.train, task.val) if images]


def fingerprints(images):
    """A hash (int64) of each image, as common.fingerprints, with links in paths resolved."""
    items = [Path(item).resolve() if isinstance(item, (str, Path)) else item
             for item in images.items]
    return common.fingerprints(data.Images(items, images.labels))


def reject_seen(args, seed, seen, owner):
    """Raise UserError where a target tests on images that were trained on.

    seen: {fingerprint: item of an image list, or None where that is not known}.
    """
    for task in common.divided_tasks(args, args.data, seed):
        prints = fingerprints(task.test).tolist()
        both = [item for item, found in zip(task.test.items, prints)
                if found in seen and same_image(item, seen[found])]
        if both:
            raise common.UserError(f"{owner} trains on {len(both)} of the {len(task.test)} images "
                                   f"that --data {args.data} tests {task.name} on (seed {seed}), "
                                   f"such as {both[0]}: take them out of one of the two")


def same_image(item, other):
    """Whether two items of one fingerprint are one image: files of one name may differ."""
    if isinstance(item, (str, Path)) and isinstance(other, (str, Path)):
        return filecmp.cmp(item, other, shallow=False)
    return True


def n_text(args):
    """How many vectors stand before a class name."""
    return 0 if args.prompt == "vpt" else args.n_ctx


def kind_of(argv):
    """The `--prompt` of a command line: the kinds differ in their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt", nargs="?", default=Args.prompt)
    return parser.parse_known_args(argv)[0].prompt


def main(argv=None):
    kind = kind_of(argv)
    own = LongArgs if kind in ("coop", "vpt") else Args
    args = common.parse(own, __doc__, argv, dict(TINY, **TINY_OF.get(kind, {})))
    check_settings(args)
    common.run_seeds(args, build, train, score, n_text(args), image_prompts=args.prompt != "coop",
                     own=True, check=check, tiny=TINY)


if __name__ == "__main__":
    common.script(main)
