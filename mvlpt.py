r"""MVLPT: a prompt learned on many source tasks initialises the prompts of the target tasks.

Shen, Yang, Zhang, Zhai, Gonzalez, Keutzer and Darrell, "Multitask Vision-Language Prompt Tuning",
WACV 2024.

The idea: (1) A prompt learned on all source tasks together is a better initialisation for every
target task than random values. (2) A target also learns from similar tasks: those whose own
prompts, used unchanged, score best on it. (3) So each target adapts the source prompt alone or
together with its best partners, and keeps the checkpoint that is best on its own held-out images. A
prompt is a text context (`coop`), image prompts in every layer (`vpt`), or both, tied by a small
transformer (`upt`); with these, MVLPT is called MCoOp, MVPT and MUPT.

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
        --lr 0.0015 --batches tasks --batch-size 16 --n-ctx 16      # JSCPT, Table 1, column MVLPT
                        # (there by SGD at a fixed rate, here by Adam, warm-up and cosine)

`--init DIR/prompts.pt` replaces stage 1 with another run's source prompt; `--transfer
DIR/result.json` reuses the transfer matrix of a `--transferability` study or a run with partners.

paper           code                            paper           code
P, Eq. (2)      Prompt.U_T under `coop`         U_T, U_V        Prompt.U_T, Prompt.U_V
V, Eq. (3)      Prompt.U_V under `vpt`          theta, Eq. (4)  Prompt.blocks and the maps around it
source prompt   Prompts.source                  Figure 4        transferability(Prompts.accuracy)
target prompts  Prompts.targets                 Table 5         Prompts.groups

Choices the paper leaves open
- UPT: one linear map per modality takes the text context and the image prompts of all layers to
  width 128, they pass through the block as one sequence, and two more maps take them back: 566,400
  parameters at ViT-B/16 (the paper: 0.45% of CLIP). The block is CLIP's own pre-norm residual
  block, which the authors ran: U' = U + SA(LN(U)), U^ = U' + FFN(LN(U')). Eq. (4) prints
  U' = SA(U) + LN(U), U^ = FFN(LN(U')) + LN(U').
- Text prompts are initialised from N(0, 0.02), as in CoOp, and so are image prompts (the authors'
  program: uniform, 1.8 times as wide); maps and block as PyTorch does. Without stage 1 all targets
  start from the same random prompt. With `vpt` the text is "a photo of a [class]" on all datasets.
- Adam without weight decay. The warm-up epoch, the first of each stage, has CoOp's constant rate,
  1e-5 (`common.scheduled`).
- "Trained with a batch size of 32": a step takes 32 images from the shuffled union of the tasks
  that are trained together, and an epoch uses every image once. The loss is the mean over the
  step's images, each over its own task's classes, so a task's weight is its few-shot size. For
  JSCPT's column a step takes a batch from every task (`--batches tasks`), as in its other columns.
- Held-out part: 20% of the few-shot set, spread over the classes, or up to 4 images per class of a
  dataset's own validation part (CoOp's protocol; ELEVATER's validation parts are not used). At 1
  shot without one, the training images are used. The first of equally good epochs is kept, as in
  CoOp's program; the source prompt is judged by the mean over the source tasks.
- Each task is scored by its dataset's metric, on the held-out part too. In VOC 2007 an image has
  several classes: the loss is the cross-entropy with their uniform distribution, as the authors do.
- Source tasks default to the targets, and have the same shots or split (Sec. 4.1). Source tasks
  that train on a target's test images are rejected, and so is an `--init` run that did.
- Transfer is measured on held-out images, one seed at a time, so that test images never decide the
  groups. Only the study (`--transferability`) measures it on test images, as Figure 4 does; its
  prompts are the single-task baselines, trained for as long as an adaptation.
- Partners are the sources with the largest transfer to a target (Sec. 4.3); the worst partners have
  the smallest. Targets with the same group are trained once, and each keeps its own checkpoint.
  `--group-size best` takes the size among 1, 2 and 3 whose checkpoint is best on the target's
  held-out part, and the smallest of equally good ones. The paper's "Worst M" is below single-task
  adaptation, so it has partners: sizes 2 and 3.
- Fresh views every epoch; ELEVATER's images are only resized. For the built-in backbone `coop`
  draws 8 views per image once instead, so that the frozen encoder encodes each of them once, and
  all views show at least 0.6 of the area, because `tiny` was never trained on small crops.
- Where the authors' program departs from the paper, this file follows the paper. The program uses
  SGD; has one softmax over all tasks' classes; puts the class name in the middle of the context,
  where Eq. (2) has it at the end; initialises targets with the average of three seeds' source
  prompts; and feeds UPT's block a tensor [1, n, 128] where it expects [n, 1, 128], so that no
  prompt attends to another.
"""
import copy
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
import data

PHOTO = "a photo of a {}"       # Sec. 3.1: "a fixed prompt 'a photo of a [CLASS]'"
IMAGES = ("test", "held-out", "training")       # what a transfer matrix can be measured on


@dataclass
class Args(common.Args):
    """Sec. 4, "Training Details"; the defaults of UPT."""

    PATHS = ("init", "transfer")
    epochs: common.Count = 200  # of stage 1: "trained with a batch size of 32 for 200 epochs"
    lr: common.Rate = 0.002  # "Adam optimizer and cosine learning rate schedule. [...] 2e-3"
    # "the warmup period is set as 1 epoch"
    warm_up: Annotated[int, common.AtLeast(0)] = 1
    batch_size: common.Count = 32  # images in a step; with --batches tasks, per task
    # a batch from every task, or from the shuffled union of the tasks
    batches: Literal["tasks", "mixed"] = "mixed"
    n_ctx: common.Count = 4  # "4 contexts for UPT only", 16 for --prompt coop and vpt
    prompt: Literal["coop", "vpt", "upt"] = "upt"  # text context, image prompts, or both tied
    source: str | None = None  # tasks of stage 1, as in --data, or none; None: the targets
    init: str | None = None  # the prompts.pt of a run whose source prompt replaces stage 1
    # epochs of stage 2; None: as --epochs; 0: use the source prompt unchanged
    adapt_epochs: Annotated[int, common.AtLeast(0)] | None = None
    # tasks adapted together; best: Table 2
    group_size: common.Count | Literal["all", "best"] = 1
    grouping: Literal["best", "worst"] = "best"  # partners by transferability; worst: Table 3
    transfer: str | None = None  # a run's result.json with the transfer matrix to use
    transferability: bool = False  # the study of Figure 4: each task's prompt scored on all tasks
    heads: common.Count = 1  # UPT: "a one-layer one-head Transformer block"; others: Figure 6
    layers: common.Count = 1  # UPT's blocks; others: Figure 6
    width: common.Count = 128  # UPT: "whose hidden dimension is cut to be 128"; others: Figure 6

    def __post_init__(self):
        if self.source not in (None, "none"):
            self.source = data.absolute(self.source)


def defaults(args):
    """CoOp's and VPT's prompt length, and settings for `tiny` (data/README.md)."""
    usual = dict(n_ctx=4 if args.prompt == "upt" else 16)
    if args.clip == "tiny":
        usual.update(epochs=10, min_crop=0.6)
        if args.prompt == "coop":
            usual["views"] = 8
        elif args.prompt == "vpt":
            usual["n_ctx"] = 4
    return usual


def epochs_of_stage_2(args):
    """`--adapt-epochs`, by default as many as in stage 1."""
    return args.epochs if args.adapt_epochs is None else args.adapt_epochs


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
            self.text_in = nn.Linear(d_text, width)
            self.text_out = nn.Linear(width, d_text)
            self.image_in = nn.Linear(d_image, width)
            self.image_out = nn.Linear(width, d_image)
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
    """The source prompt, a prompt per target, the transfer between targets, and their groups."""

    def __init__(self, prompt, n_tasks, adapted):
        """adapted: whether the targets have their own prompts (not with `--adapt-epochs 0`)."""
        super().__init__()
        self.source = prompt.requires_grad_(not adapted)    # trainable only without targets
        self.targets = nn.ModuleList(copy.deepcopy(prompt) for _ in range(n_tasks) if adapted)
        self.targets.requires_grad_()
        self.register_buffer("accuracy", torch.zeros(n_tasks, n_tasks))   # %, source i, target j
        self.register_buffer("measured_on", torch.zeros(len(IMAGES), dtype=torch.bool))
        groups = torch.full((n_tasks, n_tasks), -1)             # a row per target, itself first
        groups[:, 0] = torch.arange(n_tasks)
        self.register_buffer("groups", groups)

    def group_lists(self):
        """Each target's group as a list of task numbers, the target first."""
        return [[i for i in row if i >= 0] for row in self.groups.tolist()]


def build(args, model, tasks):
    """The untrained prompts of the source and of the targets."""
    n_layers = d_image = 0
    if args.prompt != "coop":
        visual = model.visual
        n_layers, d_image = len(visual.transformer.resblocks), len(visual.class_embedding)
    prompt = Prompt(args.prompt, args.n_ctx, n_layers, len(model.ln_final.weight), d_image,
                    args.heads, args.layers, args.width)
    prompts = Prompts(prompt, len(tasks), adapted=epochs_of_stage_2(args) > 0)
    return prompts.to(model.logit_scale.device)


def n_text(args):
    """How many vectors precede a class name."""
    return 0 if args.prompt == "vpt" else args.n_ctx


def texts_of(args, tasks, sets=None):
    """The tasks' texts: a context before the class name, or with `vpt` "a photo of a [class]."."""
    if args.prompt == "vpt":
        return common.Texts([replace(task, template=PHOTO) for task in tasks], templates=True)
    return common.Texts(tasks, args.n_ctx, sets)


# --------------------------------------------------------------------- transferability (Sec. 4.3)

def transferability(accuracy):
    """Accuracies [N, N] (row = source, column = target), each divided by the best of its column.

    A column of zeros stays zero (Figure 4).
    """
    return accuracy / accuracy.amax(dim=0).clamp(min=torch.finfo(accuracy.dtype).tiny)


def group_by_transfer(transfer, size):
    """For each target, itself and then its `size` - 1 best sources, the best first (Sec. 4.3).

    transfer: [N, N], row = source, column = target. Ties go to the first source.
    Returns lists of task numbers.
    """
    groups = []
    for target, column in enumerate(torch.as_tensor(transfer).t().tolist()):
        others = [i for i in range(len(column)) if i != target]
        others.sort(key=lambda i: -column[i])
        groups.append([target, *others[:size - 1]])
    return groups


def group_sizes(args, n_tasks):
    """The possible sizes of a target's group."""
    if args.group_size == "best":
        return [size for size in (1, 2, 3) if size <= n_tasks]      # Table 5: up to two partners
    return [n_tasks if args.group_size == "all" else args.group_size]


def chooses_partners(args, n_tasks):
    """Whether there is a choice of partners."""
    return any(1 < size < n_tasks for size in group_sizes(args, n_tasks))


def candidate_groups(args, accuracy):
    """Every target's possible groups, by size: a list, over sizes, of lists over targets."""
    transfer = transferability(accuracy)
    if args.grouping == "worst":
        transfer = -transfer
    return [group_by_transfer(transfer, size) for size in group_sizes(args, len(accuracy))]


@torch.no_grad()
def accuracies(args, model, tasks, images, prompt):
    """The accuracy of one prompt on images[t] of every task t, in %: [N]."""
    text_prompts, image_prompts = prompt()
    texts = texts_of(args, tasks)
    w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)       # [C, D]
    found = []
    for task, part, classifier in zip(tasks, images, texts.classifiers(w)):
        _, x, labels = common.image_features(model, part, image_prompts, args.workers)
        logits = common.logits(model, x, classifier)
        found.append(common.apply_metric(task.metric, logits, labels))
    return torch.tensor(found)


def measure_transfer(args, model, tasks, prompts, run):
    """Train a prompt on each task alone, from a random start, and score it on every task."""
    for i, task in enumerate(tasks):
        best = learn(args, model, run, f"alone {task.name}", [task], prompts.source,
                     epochs_of_stage_2(args), keep=[[0]])
        prompts.targets[i].load_state_dict(best.prompts[0].state_dict())
    images, kinds = zip(*[transfer_images(args, task) for task in tasks])
    for i in run.epochs("transfer", len(tasks), prompts=prompts):               # a row per "epoch"
        prompts.accuracy[i] = accuracies(args, model, tasks, images, prompts.targets[i])
        prompts.measured_on.copy_(torch.tensor([kind in kinds for kind in IMAGES]))


def transfer_images(args, task):
    """The images on which transfer to a task is measured, and their kind, one of IMAGES."""
    if args.transferability:
        return task.test, "held-out" if args.validate else "test"
    return validation_images(task), "held-out" if task.val else "training"


# ------------------------------------------------------------------------- training (Sec. 3.2)

class Best(nn.Module):
    """S checkpoints, each the best so far by its own accuracy on held-out images."""

    def __init__(self, prompt, n):
        super().__init__()
        self.prompts = nn.ModuleList(copy.deepcopy(prompt) for _ in range(n))
        self.register_buffer("accuracy", torch.full((n,), -1.0))

    def update(self, prompt, accuracy):
        """Copy a prompt to every place s where its accuracy[s] is the best so far."""
        for place, value in enumerate(accuracy):
            if value > self.accuracy[place]:
                self.accuracy[place] = value
                self.prompts[place].load_state_dict(prompt.state_dict())


def validation_images(task):
    """The images that choose a checkpoint: the held-out part; at 1 shot, which leaves none, the
    training images."""
    return task.val or task.train


def with_held_out(tasks, seed):
    """The tasks with their held-out parts set; prints which tasks have none."""
    tasks = data.with_held_out(tasks, seed)
    bare = [task.name for task in tasks if not task.val]
    if bare:
        print(f"no image of {', '.join(bare)} can be held out: the checkpoint is chosen on the "
              "training images", flush=True)
    return tasks


def learn(args, model, run, phase, tasks, start, epochs, keep):
    """Train a copy of the prompt `start` jointly on tasks, and keep its best checkpoints.

    keep: for each checkpoint, a list of task numbers; the checkpoint with the best mean accuracy on
    these tasks' held-out parts is kept. Returns a `Best`.
    """
    prompt = copy.deepcopy(start).requires_grad_()
    best = Best(start, len(keep)).to(model.logit_scale.device)
    texts = texts_of(args, tasks).to(model.logit_scale.device)
    fixed = common.encode_text(model, texts.tokens) if args.prompt == "vpt" else None   # [C, D]
    optimizer = torch.optim.Adam(prompt.parameters(), lr=args.lr)
    schedule = common.scheduled(replace(args, epochs=epochs), optimizer)
    frozen = args.prompt == "coop"              # the image encoder: it has no prompts
    for _ in run.epochs(phase, epochs, prompt=prompt, best=best, optimizer=optimizer,
                        schedule=schedule):
        for images, labels, task in common.batches(args, model, tasks, frozen):
            text_prompts, image_prompts = prompt()                              # Eq. (2), (3), (4)
            x = common.encode_image(model, images, image_prompts)               # [B, D]
            w = fixed
            if text_prompts is not None:
                w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)   # [C, D]
            losses = common.task_losses(model, x, w, labels, task, texts)       # [N]
            share = F.one_hot(task, len(tasks)).to(losses.dtype).mean(dim=0)    # [N], sums to 1
            loss = share @ losses               # the mean over the step's images
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss, losses=common.nan_where_absent(losses, task))
        schedule.step()
        accuracy = accuracies(args, model, tasks, list(map(validation_images, tasks)), prompt)
        wanted = torch.stack([accuracy[numbers].mean() for numbers in keep])
        best.update(prompt, wanted)
        run.log(val=wanted.mean())
    return best


# --------------------------------------------------------------------- the two stages (Sec. 3.2)

def train(args, model, tasks, run):
    """Choose partners by transferability (Sec. 4.3), then the two stages of Sec. 3.2."""
    prompts = build(args, model, tasks)
    targets = with_held_out(tasks, args.seeds[0])
    if args.transfer:
        run.once("transfer", partial(take_transfer, args, tasks, prompts), prompts=prompts)
    elif args.transferability or chooses_partners(args, len(tasks)):
        measure_transfer(args, model, targets, prompts, run)
    if args.init:
        run.once("init", partial(take_source, args, prompts.source), source=prompts.source)
    elif has_stage_1(args):
        learn_source(args, model, targets, prompts, run)
    if prompts.targets and not args.transferability:
        adapt(args, model, targets, prompts, run)
    return prompts


def has_stage_1(args):
    """Whether a source prompt is trained."""
    return not (args.init or args.transferability or args.source == "none")


def sources(args, seed):
    """The tasks of stage 1, if they are not the targets."""
    if not has_stage_1(args) or args.source in (None, args.data):
        return []
    if args.download:
        data.find_listings(args.source, args.root, download=True)
    return common.divided_tasks(args, args.source, seed)


def learn_source(args, model, targets, prompts, run):
    """Stage 1, "multitask prompt initialization": one prompt on all source tasks together."""
    seed = args.seeds[0]
    tasks = with_held_out(run.sources[seed], seed) or targets
    best = learn(args, model, run, "source", tasks, prompts.source, args.epochs,
                 keep=[list(range(len(tasks)))])
    prompts.source.load_state_dict(best.prompts[0].state_dict())


def adapt(args, model, targets, prompts, run):
    """Stage 2, "multitask prompt adaptation": train each group, starting at the source prompt."""
    names = [task.name for task in targets]
    owners = {}                             # tasks trained together -> {target: its group}
    for groups in candidate_groups(args, prompts.accuracy):
        for target, group in enumerate(groups):
            owners.setdefault(tuple(sorted(group)), {})[target] = group
    accuracy = [-1.0] * len(targets)
    for members, group_of in owners.items():                    # the smallest groups come first
        together = " + ".join(names[i] for i in members)
        best = learn(args, model, run, f"target {together}", [targets[i] for i in members],
                     prompts.source, epochs_of_stage_2(args),
                     keep=[[members.index(target)] for target in group_of])
        for place, (target, group) in enumerate(group_of.items()):
            if best.accuracy[place] > accuracy[target]:
                accuracy[target] = best.accuracy[place].item()
                prompts.targets[target].load_state_dict(best.prompts[place].state_dict())
                prompts.groups[target] = -1
                prompts.groups[target, :len(group)] = torch.tensor(group)
    if args.group_size != 1:
        told = ["[" + ", ".join(names[i] for i in group) + "]" for group in prompts.group_lists()]
        print(f"groups ({args.grouping} partners), target first: {'  '.join(told)}", flush=True)


# ------------------------------------------------- transfer matrices and source prompts from files

# a matrix or a source prompt can be reused with the same backbone and the same
SAME = ("prompt", "n_ctx", "split", "shots", "heads", "layers", "width")


def read_transfer(args, tasks, seed):
    """The accuracies [N, N] between tasks in args.transfer, and what images they were measured on.

    Each seed has its own, because images held out at one seed may be test images at another. Raises
    UserError if the file lacks these tasks or this seed, or has another prompt, backbone or split.
    """
    owner, result = f"--transfer {args.transfer}", common.load_result(args.transfer)
    if "transfer_accuracy" not in result:
        raise common.UserError(f"{owner} has no transfer matrix: give the result.json of a run of "
                               "mvlpt.py --transferability")
    common.agree(args, result["settings"], SAME, owner)
    names = [task.name for task in tasks]
    for key, wanted in (("tasks", names), ("seeds", [seed])):
        missing = [str(one) for one in wanted if one not in result[key]]
        if missing:
            raise common.UserError(f"{owner} has the {key} {', '.join(map(str, result[key]))}, "
                                   f"not {missing[0]}: measure it with the same --data and "
                                   "--seeds")
    with common.usable(args.transfer):
        rows = [result["tasks"].index(name) for name in names]
        place = result["seeds"].index(seed)
        accuracy = torch.tensor(result["transfer_accuracy"][place])[rows][:, rows]
        return accuracy, result["transfer_images"][place]


def take_transfer(args, tasks, prompts):
    """Copy the matrix of args.transfer into prompts."""
    accuracy, kinds = read_transfer(args, tasks, args.seeds[0])
    prompts.accuracy.copy_(accuracy)
    prompts.measured_on.copy_(torch.tensor([kind in kinds for kind in IMAGES]))


def read_source(args, seed):
    """A seed's source prompt in args.init, a state dict, and the hashes of its training images.

    Raises UserError if the file has no source prompt of this seed, or one of another kind, backbone
    or split.
    """
    saved = common.load_prompts(args.init, "mvlpt")
    with common.usable(args.init):
        settings, states = saved["settings"], saved["prompts"]
        common.agree(args, settings, (*SAME, "validate"), f"the source prompt in {args.init}")
        if settings["init"] or settings["transferability"] or settings["source"] == "none":
            raise common.UserError(f"{args.init} is from a run without stage 1 and has no source "
                                   "prompt of its own: give one from a run with stage 1")
        if seed not in states:
            raise common.UserError(f"{args.init} has source prompts of the seeds "
                                   f"{', '.join(map(str, states))}, not of {seed}: give those as "
                                   "--seeds")
        state = {key.removeprefix("source."): value for key, value in states[seed].items()
                 if key.startswith("source.")}
        return state, set(saved["trained_on"][seed].tolist())


def take_source(args, prompt):
    """Copy the source prompt of args.init into a prompt."""
    state, _ = read_source(args, args.seeds[0])
    with common.usable(args.init):
        prompt.load_state_dict(state)


# ------------------------------------------------------------------ what common.main asks for

@torch.no_grad()
def classify(args, model, tasks, prompts):
    """Each task's classifier and image prompts, from its own prompt or from the source prompt."""
    trained = list(prompts.targets) or [prompts.source]
    text_prompts, image_prompts = zip(*[prompt() for prompt in trained])
    texts = texts_of(args, tasks, sets=[t % len(trained) for t in range(len(tasks))])
    text_prompts = None if args.prompt == "vpt" else torch.stack(text_prompts, dim=1)
    image_prompts = None if args.prompt == "coop" else torch.stack(image_prompts, dim=1)
    w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)       # [C, D]
    return dict(classifiers=texts.classifiers(w), image_prompts=image_prompts)


def report(args, tasks, prompts):
    """The groups, and the transfer if there is one, with the images that it was measured on."""
    names = [task.name for task in tasks]
    found = dict(groups=[[names[i] for i in group] for group in prompts.group_lists()])
    if prompts.measured_on.any():
        found["transfer_accuracy"] = prompts.accuracy.tolist()
        found["transfer"] = transferability(prompts.accuracy).tolist()
        kinds = [kind for kind, there in zip(IMAGES, prompts.measured_on) if there]
        found["transfer_images"] = " and ".join(kinds)
    return found


def check(args, tasks):
    """Reject contradictions, and groups, a matrix and a source prompt that do not fit the tasks."""
    if tasks is None:
        check_settings(args)
        return
    n = len(tasks)
    if isinstance(args.group_size, int) and args.group_size > n:
        raise common.UserError(f"--group-size {args.group_size} is more than the {n} tasks of "
                               f"--data {args.data}: give fewer, or all")
    if (args.transfer or args.grouping == "worst") and not chooses_partners(args, n):
        remedy = f"give a --group-size from 2 to {n - 1}" if n > 2 else "leave it out"
        choice = f"--transfer {args.transfer}" if args.transfer else "--grouping worst"
        raise common.UserError(f"{choice} chooses partners, but --group-size {args.group_size} of "
                               f"{n} tasks leaves no choice: {remedy}")
    texts_of(args, tasks)                                       # rejects texts that are too long
    if args.eval or args.resume:
        return                                                  # the files have been read
    for seed in args.seeds:
        if args.transfer:
            _, kinds = read_transfer(args, tasks, seed)
            if "test" in kinds:
                print(f"warning: --transfer {args.transfer} was measured on test images, so they "
                      "decide the groups: a study with --validate would not use them",
                      file=sys.stderr)
        if args.init:
            _, seen = read_source(args, seed)
            targets = common.divided_tasks(args, args.data, seed)
            common.reject_seen(targets, seen, f"the source prompt in {args.init} (seed {seed}) was")


def check_settings(args):
    """Reject settings that contradict each other, whatever the tasks are."""
    alone, upt = args.group_size == 1, (args.heads, args.layers, args.width)
    if args.width % args.heads:
        raise common.UserError(f"--width {args.width} is not a multiple of --heads {args.heads}: "
                               "give one that is")
    if args.prompt != "upt" and upt != (Args.heads, Args.layers, Args.width):
        raise common.UserError(f"--heads, --layers and --width are for --prompt upt, not "
                               f"{args.prompt}: leave them out")
    if args.init and args.source:
        raise common.UserError("--init provides the source prompt that --source would train: give "
                               "one of them")
    given = args.source or args.init or args.transfer or args.grouping == "worst" or not alone
    if args.transferability and given:
        raise common.UserError("--transferability trains a prompt on each task alone, from random "
                               "values: leave out --source, --init, --transfer, --group-size and "
                               "--grouping")
    if epochs_of_stage_2(args) == 0:
        if args.transferability or args.source == "none" or not alone:
            raise common.UserError("--adapt-epochs 0 leaves only the source prompt of stage 1: "
                                   "leave out --group-size, --transferability and --source none")


METHOD = common.Method("mvlpt", Args, __doc__, build, train, classify, defaults=defaults,
                       check=check, sources=sources, report=report, n_text=n_text,
                       image_prompts=lambda args: args.prompt != "coop", bound=True)

if __name__ == "__main__":
    common.script(METHOD)
