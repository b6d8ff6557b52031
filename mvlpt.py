"""MVLPT: a prompt learned on many source tasks starts the prompts of the target tasks, which adapt alone or in groups.

Shen, Yang, Zhang, Zhai, Gonzalez, Keutzer and Darrell, "Multitask Vision-Language Prompt Tuning", WACV 2024.

The idea: prompt learning starts from random numbers and forgets what other tasks know. (1) One prompt learned on all source
tasks together is a better start for every target task. (2) A target also learns from tasks that resemble it: those whose own
prompts, used as they are, do best on it. (3) So a target adapts the source prompt together with its best partners, and keeps
the checkpoint that is best on its own validation images. A prompt is a text context (`coop`), image prompts in every layer
(`vpt`), or both, tied by a small transformer (`upt`); what CLIP has learned stays frozen.

    python mvlpt.py                                                             # built-in benchmark and backbone
    python mvlpt.py --transferability --plot                                    # the study: transfer.csv, transfer.json, transfer-1.png
    python mvlpt.py --data elevater12 --source coop11 --shots 20 --seeds 1 2 3  # Table 1, MUPT (--prompt coop: MCoOp; vpt: MVPT)
    python mvlpt.py --data elevater12 --source none --shots 20 --seeds 1 2 3    # ... UPT (CoOp, VPT) from random prompts
    python mvlpt.py --data elevater20 --shots 20 --transferability --plot       # Figure 4
    python mvlpt.py --data elevater20 --shots 20 --seeds 1 2 3 --group-size 2   # Table 2, MUPT; Table 3, Best M
    python mvlpt.py --data elevater20 --shots 20 --seeds 1 2 3 --group-size 2 --grouping worst      # ... Worst M
    python mvlpt.py --data officehome --split 0.1 --adapt-epochs 0 --epochs 50 --lr 0.0015 --batch-size 16 --n-ctx 16   # JSCPT, Table 1

`--init DIR/prompts.pt` takes another run's source prompt instead of stage 1, `--transfer DIR/transfer.json` the matrix of a study
or of another run's groups. `elevater12` and `elevater20` are not among the benchmarks yet. (Table 4: `--source imagenet`, `coop10`.)

Choices the paper leaves open
- UPT: the text context and all image prompts pass, each modality through a linear map, to width 128, as one sequence through one
  block, and back through two maps: 566,400 numbers at ViT-B/16 (the paper: 0.45 per cent of CLIP). The block is CLIP's own, as in
  the authors' program: U' = U + SA(LN(U)), U^ = U' + FFN(LN(U')). Eq. (4) prints U' = SA(U) + LN(U), U^ = FFN(LN(U')) + LN(U').
- Prompts start at N(0, 0.02), the text's as in CoOp, the images' too (VPT and the authors' program: uniform, 1.8 times as wide);
  the maps and the block as PyTorch makes them. Adam has no weight decay. The warm-up epoch has CoOp's constant rate 1e-5.
- A step takes a batch (of 32) of every task, and the loss is the sum of the tasks', each over its own classes; an epoch is as
  long as the largest task needs. Stage 2 does not repeat the batches of stage 1.
- The validation part is the dataset's own, whole, where it has one (CoOp's files; so even 1 shot has one there), and else 20% of
  the few-shot set, as in the paper. The first of equally good epochs is kept, as in CoOp's program, for the source prompt by the
  mean over the source tasks. Where nothing can be held out (1 shot) the last is kept.
- Source tasks default to the targets. They have as many shots, or the same split, as the targets (Sec. 4.1). With `--data emoji
  --source fxemoji`, or the reverse, an emoji that is tested on may have been trained on in another style.
- Transfer is measured on validation images (or else training images), a seed at a time, so that no test image chooses a group.
  Only the study measures it on test images, as Figure 4 does; `--validate` keeps it to training images, for a later `--transfer`.
  Its prompts train as long as an adaptation.
- The worst partners are those of the smallest transfer. Targets that have the same group train once and keep two checkpoints.
  `--group-size` is one for all targets, where Table 2 seems to take the best of 1, 2 and 3 for each.
- Features of `--views` random views an image are computed once for `coop`; the other prompts see fresh views every epoch.
- The paper stands above the authors' program, which runs SGD, mixes the tasks' images, with a softmax over all tasks' classes,
  and gives UPT's block a [1, n, 128] where that takes [n, 1, 128], so that no prompt sees another.
"""
import copy
import math
import statistics

import torch
from torch import nn

import common

PAPER = dict(                       # Sec. 4, "Training Details"
    clip="ViT-B/16",                # "ViT-B/16 for all the experiments except for the scaling ablation"
    epochs=200,                     # "trained with a batch size of 32 for 200 epochs": of either stage
    lr=0.002,                       # "We use Adam optimizer and cosine learning rate schedule. All the learning rate is set as 2e-3"
    batch_size=32,
    n_ctx=4,                        # "we use 4 contexts for UPT only"
    views=0,                        # fresh views every epoch
    min_crop=0.08,                  # Dassl's random resized crop
    prompt="upt",                   # Sec. 3.1
    group_size=1,                   # Table 1; 2 and 3 are Table 2's and 3's
    grouping="best")                # Sec. 4.3; worst is Table 3's
PAPER_OF = dict(coop=dict(n_ctx=16, views=8), vpt=dict(n_ctx=16), upt={})      # "16 for both CoOp and VPT"; the views are ours
TINY = dict(epochs=10, batch_size=8, min_crop=0.6)          # the built-in backbone's, chosen on fxemoji
TINY_OF = dict(coop={}, vpt=dict(n_ctx=4), upt={})
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
    if args.init and not (args.eval or args.resume):
        common.read_source(args, prompt)                                        # refuses what does not fit
    return Prompts(prompt, len(tasks), size_of(args, len(tasks)), adapted=args.adapt_epochs > 0).to(model.logit_scale.device)


# -------------------------------------------------------------------------------------- transferability (Sec. 4.3)

def transferability(accuracy):
    """Accuracies [N, N] (row = source, column = target), each divided by the best of its column (Figure 4); zeros stay zero."""
    return accuracy / accuracy.amax(dim=0).clamp(min=torch.finfo(accuracy.dtype).tiny)


def group_by_transfer(transfer, size):
    """For each target, itself and then its `size` - 1 best sources, the best first (Sec. 4.3), as lists of task numbers.

    transfer: [N, N], row = source, column = target. Of equal sources the first is taken.
    """
    groups = []
    for j, column in enumerate(torch.as_tensor(transfer).t().tolist()):
        sources = sorted((i for i in range(len(column)) if i != j), key=lambda i: -column[i])
        groups.append([j, *sources[:size - 1]])
    return groups


def size_of(args, n_tasks):
    return n_tasks if args.group_size == "all" else args.group_size


def has_matrix(args, n_tasks):
    """Whether a run measures (or is given) who transfers to whom: for the study, and where there are partners to choose."""
    return args.transferability or 1 < size_of(args, n_tasks) < n_tasks


def choose_groups(args, accuracy):
    """Each target's group as a list of task numbers, its own first, as `--group-size` and `--grouping` say."""
    transfer = transferability(accuracy)
    return group_by_transfer(transfer if args.grouping == "best" else -transfer, size_of(args, len(accuracy)))


# ------------------------------------------------------------------------------------------------------- tasks and batches

def source_tasks(args, tasks, seed):
    """The tasks of stage 1: those of `--source`, or the targets themselves."""
    if args.source == "none" or args.init:
        return []
    return tasks if args.source in (None, args.data) else common.divided_tasks(args, args.source, seed)


def scored_images(args, task):
    """The images that transfer to a task is measured on, and what they are."""
    if args.transferability:
        return task.test, "validation" if args.validate else "test"
    return (task.val, "validation") if len(task.val) else (task.train, "training")


def batches_of(args, model, tasks, seed, epoch, seen):
    """Yield the steps of an epoch, which with the seed decides them: (images, or under `coop` features, and labels [b]) a task.

    seen: keeps what a frozen encoder made, of validation and test images by Images, of training views by (Images, epoch).
    """
    if args.prompt == "coop":
        return common.view_batches(model, tasks, args, seed, epoch, seen)
    common.seed_everything(seed, epoch + 1)
    return common.image_batches(model, tasks, args, seed)


def texts_of(args, model, tasks):
    """The tasks' texts: tokens that take a learned context, or under `vpt` the fixed features [C, D] of the templates."""
    return common.zero_shot(model, tasks) if args.prompt == "vpt" else common.Texts(tasks, args.n_ctx)


# ------------------------------------------------------------------------------------------------------------- training

def losses_of(model, texts, prompt, batches):
    """Every task's mean cross-entropy over its own classes, [N]. texts, batches: from `texts_of` and `batches_of`."""
    text_prompts, image_prompts = prompt()
    with common.autocast(model):
        weights = texts if text_prompts is None else texts.encode(model, text_prompts[:, None])     # [C, D] a task
        features = [x for x, _ in batches] if image_prompts is None else common.encode_batches(model, batches, image_prompts[:, None])
    return common.task_losses(model, features, weights, batches)


@torch.no_grad()
def accuracies(model, preprocess, tasks, texts, prompt, images, seen):
    """Per cent right of images[i] of every task i under one prompt, None where there are none. seen: as in `batches_of`."""
    text_prompts, image_prompts = prompt()
    weights, right = texts if text_prompts is None else texts.encode(model, text_prompts[:, None]), []
    for task, w, part in zip(tasks, weights, images):
        if image_prompts is None and len(part) and part not in seen:
            seen[part] = common.image_features(model, part, preprocess)
        features = seen.get(part) if image_prompts is None else None
        right.append(common.evaluate(model, preprocess, task, w, image_prompts, part, features) if len(part) else None)
    return right


def keep_best(prompt, right, keep, best):
    """Copy a prompt into every module of keep, [(module, numbers of tasks)], that it is the best for so far, by those tasks' mean.

    right: validation accuracy a task, or None; where a module has none at all the last prompt stays. best: [len(keep)], moved
    along. Returns the mean over the modules that have some, or None.
    """
    values = []
    for k, (module, members) in enumerate(keep):
        known = [right[i] for i in members if right[i] is not None]
        values += [statistics.mean(known)] if known else []
        if not known or values[-1] > best[k]:
            best[k] = values[-1] if known else math.inf
            module.load_state_dict(prompt.state_dict())
    return statistics.mean(values) if values else None


def rate_of(args, epochs):
    """Epoch -> factor of the learning rate: one epoch of warm-up, then a cosine."""
    return lambda epoch: WARM_UP / args.lr if epoch == 0 else (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def train(args, model, tasks, run, seed):
    """Measure transfer where it is asked for, learn the source prompt, and adapt it to the targets; returns all prompts."""
    done, before = run.restore(seed), 0                                         # epochs in the checkpoint, of the trainings so far
    seen, preprocess = {}, common.clip.clip._transform(model.visual.input_resolution)       # the latter as clip.load returns it

    def learn(phase, together, start, keep, epochs, age=0):
        """Train a copy of `start`, a prompt `age` epochs old, on tasks together; its best checkpoints fill `keep` (`keep_best`).

        The epochs of all trainings of a seed are counted through, so that a killed run finds the one that it was in.
        """
        nonlocal before
        prompt, best = copy.deepcopy(start).requires_grad_(), nn.Module()
        best.register_buffer("scores", torch.full((len(keep),), -1.0, dtype=torch.double))
        optimizer = torch.optim.Adam(prompt.parameters(), lr=args.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_of(args, epochs))
        parts = dict(prompt=prompt, best=best, optimizer=optimizer, schedule=schedule)
        begin = min(max(done - before, 0), epochs)
        if 0 < begin < epochs:                                                  # killed in this training
            run.restore(seed, **parts)
        texts, held_out = texts_of(args, model, together), [task.val for task in together]
        for epoch in common.progress(range(begin, epochs), phase):
            losses = []
            for batches in batches_of(args, model, together, seed, age + epoch, seen):
                of_task = losses_of(model, texts, prompt, batches)
                optimizer.zero_grad()
                of_task.sum().backward()
                optimizer.step()
                losses.append(of_task.mean().item())
            schedule.step()
            val = keep_best(prompt, accuracies(model, preprocess, together, texts, prompt, held_out, seen), keep, best.scores)
            row = dict(phase=phase, tasks=" + ".join(task.name for task in together), loss=statistics.mean(losses), val=val)
            run.checkpoint(seed, before + epoch + 1, row, prompts=prompts, **parts)
        before += epochs

    common.seed_everything(seed)
    prompts, others, names = build(args, model, tasks), source_tasks(args, tasks, seed), [task.name for task in tasks]
    start, targets = copy.deepcopy(prompts.source), common.with_validation(tasks, seed)
    sources = targets if others is tasks else common.with_validation(others, seed)
    bare = [task.name for task in sources if not any(len(task.val) for task in sources)]
    bare += [task.name for task in targets if args.adapt_epochs and not len(task.val)]
    if bare:
        print(f"no validation images of {', '.join(dict.fromkeys(bare))}: the last checkpoint is kept", flush=True)
    given = run.state.setdefault("given", {})                                   # in the checkpoint: the files are read once a run
    if args.transfer:
        given["transfer"] = given.get("transfer") or common.read_transfer(args, names)
        prompts.accuracy.copy_(torch.tensor(given["transfer"][seed]))
    if args.init:
        given["init"] = given.get("init") or common.read_source(args, start)
        prompts.source.load_state_dict(given["init"][seed])
    if done:
        run.restore(seed, prompts=prompts)
    if has_matrix(args, len(tasks)) and not args.transfer:                      # Sec. 4.3
        for task, prompt in zip(targets, prompts.targets):
            learn("alone", [task], start, [(prompt, [0])], args.adapt_epochs)
        images, kinds = zip(*(scored_images(args, task) for task in targets))
        if done <= before:                                                      # else the checkpoint has it
            texts = texts_of(args, model, tasks)
            rows = [accuracies(model, preprocess, tasks, texts, prompt, images, seen) for prompt in prompts.targets]
            prompts.accuracy.copy_(torch.tensor(rows))
        common.write_transfer(args, run, names, seed, prompts.accuracy, transferability, kinds)
    if sources:                                                                 # stage 1: "multitask source prompt initialization"
        learn("source", sources, start, [(prompts.source, range(len(sources)))], args.epochs)
    prompts.groups.copy_(torch.tensor(choose_groups(args, prompts.accuracy)))
    if prompts.groups.shape[1] > 1:
        told = ["[" + ", ".join(names[i] for i in group) + "]" for group in prompts.groups.tolist()]
        print(f"groups ({args.grouping}), a target first: {'  '.join(told)}", flush=True)
    groups, age = [tuple(sorted(group)) for group in prompts.groups.tolist()], args.epochs if sources or args.init else 0
    for members in dict.fromkeys(groups) if args.adapt_epochs and not args.transferability else []:
        together = [targets[i] for i in members]                                # stage 2: "multitask target prompt adaptation"
        keep = [(prompts.targets[i], [members.index(i)]) for i in members if groups[i] == members]
        learn("target", together, prompts.source, keep, args.adapt_epochs, age)
    return prompts


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
    args.source = args.source or ("none" if args.transferability else None)
    usual = dict(prompt="upt", source=None, init=None, adapt_epochs=args.epochs, group_size=1, grouping="best", transfer=None)
    args.variant = ", ".join(common.said(key, getattr(args, key)) for key in usual if getattr(args, key) != usual[key]) or None
    n_text = 0 if args.prompt == "vpt" else args.n_ctx
    check = lambda args, tasks: common.check_transfer(args, [task.name for task in tasks], size_of(args, len(tasks)), n_text)
    common.run_seeds(args, build, train, score, n_text, image_prompts=args.prompt != "coop", check=check)


if __name__ == "__main__":
    common.script(main)
