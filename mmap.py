"""MmAP: multi-modal alignment prompts, with tasks grouped by their gradients.

Xin, Du, Wang, Yan and Ding, "MmAP: Multi-Modal Alignment Prompt for Cross-Domain Multi-Task
Learning", AAAI 2024.

The idea: (1) in each layer, Kronecker products of one small source prompt with two scaling matrices
give the text and the image prompts, so that both encoders adapt in step and few parameters are
trained, Eq. (6)-(7). (2) Training one MmAP on all tasks shows which tasks' gradients point the same
way, Eq. (8), and the tasks are grouped by that. (3) Each group trains a new MmAP together with one
per task; the two are concatenated in every layer of both encoders, Eq. (9)-(12).

    python mmap.py                                                      # built-in benchmark, CPU
    python mmap.py --data officehome --split 0.1 --seeds 1 2 3          # Table 1
    python mmap.py --data minidomainnet --split 0.01 --seeds 1 2 3      # Table 2
    python mmap.py --data officehome --split 0.1 --seeds 1 2 3 --grouping none      # Table 3: task-
                        # specific only; its other rows: --no-specific, --grouping random or all
    python mmap.py --data officehome --shots 6 --seeds 1 2 3           # Figure 4: 1, 3, 6, 12 shots
    python mmap.py --data officehome --split 0.1 --seeds 1 2 3 --prompt mlp --n-ctx 4   # Figure 5:
                        # also --prompt joint and mmap, with the same --n-ctx

paper       code                            paper       code
P_s         MmAP.P_s [K, m, n]              P_G         Prompts.shared, an MmAP per group
M_l, M_v    MmAP.M_l, MmAP.M_v              P_T         Prompts.specific, an MmAP per task
P_l, P_v    text_prompts(), image_prompts() P_glb       P_glb, in measure_similarity

Choices the paper leaves open
- b = 16, m = b and n = gcd(d_l, d_v) / 2: 24,696 parameters per MmAP at ViT-B/16, 0.12 M for four
  tasks in one group and 0.15 M in two (the paper: 0.13 M). `--source-shape M N` sets another shape.
  Together with the group's, each layer has 32 prompts; `--n-ctx 8 --source-shape 8 256` has about
  as many parameters (24,636) and 16 prompts in all: the first thing to try if 32 prompts hurt
  (untrained, they cost `tiny` 14 points, 8 cost 4; training recovers both).
- Sec. 3.2 counts one source prompt for all layers, Sec. 3.3 writes P^k: here there is one per
  layer, as in 3.3. Eq. (9)-(10) write the Kronecker factors in the opposite order to Eq. (6)-(7):
  this file follows (6)-(7).
- Text prompts follow the start token, as in CoOp and MaPLe; Eq. (9) prints them before all text
  tokens. Image prompts enter the first layer unchanged, after `ln_pre`.
- P_s is initialised from N(0, 0.02), the scaling matrices with ones: both modalities start as
  copies of P_s.
- P_glb is trained for half of the epochs (rounded up) before the main training, with the same
  settings; Eq. (8) is computed at every step and averaged. P_glb has its own seed and is an MmAP
  whatever `--prompt` says, so every ablation uses the same groups.
- Sec. 3.3 speaks of cosine similarity but prints a dot product, Eq. (8): this file follows the
  equation.
- "Groups that maximize the total inter-task similarity": at most `--groups` groups, where a task's
  similarity to its group is the mean over the group's other tasks, 0 for a task on its own. With
  plain sums one group of all tasks wins whenever nothing conflicts; TAG, which the paper follows,
  averages.
- If the encoders differ in depth (ViT-L/14), the first min(depths) layers have prompts.
- Random groups are as equal in size as possible. `--prompt` replaces the MmAPs of the main
  training: `joint` trains text and image prompts without a link, `mlp` computes both from a
  [b, 256] source by a linear map per modality and layer (3.96 M per set at b = 4, the paper's
  figure).
- SGD and its cosine: `common.sgd`. MmAP's settings are those of MaPLe's published config, where the
  first of the five epochs runs at 1e-5. No paper states this warm-up; `--warm-up 1` adds it. A step
  takes a batch from every task (`common.batches`), with fresh views.
"""
import math
import random
from dataclasses import dataclass, replace
from typing import Literal

if __name__ == "mmap":
    # `import mmap`, also in torch and numpy, means the standard library's module, but Python finds
    # this file first: put that module in its place. The rest of this file still runs, on a module
    # that nobody sees and while torch may be half imported, so torch and common are stand-ins.
    import importlib.machinery
    import importlib.util
    import os
    import sys
    elsewhere = [path for path in sys.path if not os.path.isfile(os.path.join(path, "mmap.py"))]
    spec = importlib.machinery.PathFinder.find_spec("mmap", elsewhere)
    sys.modules["mmap"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["mmap"])

    class StandIn:
        """Whatever the top level of this file uses of `nn` and `common`."""

        Module = Args = object

        def __getattr__(self, name):
            return lambda *args, **settings: None

    nn = common = StandIn()
else:
    import torch
    from torch import nn

    import common


@dataclass
class Args(common.Args):
    """Sec. 4.1, "Implementation Details"."""

    clip: str = "ViT-B/16"  # "CLIP (ViT-B/16) chosen as our default model"; tiny for built-in data
    epochs: common.Count = 5  # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr: common.Rate = 0.0035  # "We employ the SGD optimizer with a learning rate of 0.0035"
    # images per task: "a batch size of 16/4" on Office-Home/MiniDomainNet
    batch_size: common.Count = 16
    n_ctx: common.Count = 16  # prompt length b (ours)
    groups: common.Count = 2  # maximum number of task groups (ours)
    grouping: Literal["gradient", "random", "all", "none"] = "gradient"  # Sec. 3.3; others: Table 3
    specific: common.Kept = True  # drop the task-specific MmAPs: Table 3
    prompt: Literal["mmap", "joint", "mlp"] = "mmap"  # Sec. 3.2; joint and mlp: Figure 5
    # shape M N of a source prompt; None: M = b, N = gcd(d_l, d_v) / 2
    source_shape: tuple[int, int] | None = None


def defaults(args):
    """The settings of `tiny` (data/README.md says how they were chosen), and the paper's on
    MiniDomainNet."""
    usual = {}
    if args.data.split(":")[0] == "minidomainnet":
        usual.update(batch_size=4)
    if args.clip == "tiny":
        usual.update(epochs=10, lr=0.1, n_ctx=4, min_crop=0.6)
    return usual


# ---------------------------------------------------------------------------- prompts (Sec. 3.2)

def source_shape(n_ctx, d_text, d_image, source=None):
    """The shape (m, n) of a source prompt, by default (n_ctx, gcd / 2).

    Raises ValueError unless m divides n_ctx and n divides both widths.
    """
    gcd = math.gcd(d_text, d_image)
    m, n = source or (n_ctx, gcd // 2 if gcd % 2 == 0 else gcd)
    if min(m, n) < 1 or n_ctx % m or gcd % n:
        raise ValueError(f"a source prompt of {m} x {n} does not divide prompts of "
                         f"{n_ctx} x {d_text} and {n_ctx} x {d_image}")
    return m, n


class MmAP(nn.Module):
    """Text and image prompts of K layers from one source prompt per layer, Eq. (6)-(7)."""

    def __init__(self, n_ctx, d_text, d_image, n_layers, source=None):
        """source: the shape of a source prompt, as for `source_shape`."""
        super().__init__()
        m, n = source_shape(n_ctx, d_text, d_image, source)
        self.P_s = nn.Parameter(0.02 * torch.randn(n_layers, m, n))
        self.M_l = nn.Parameter(torch.ones(n_layers, n_ctx // m, d_text // n))
        self.M_v = nn.Parameter(torch.ones(n_layers, n_ctx // m, d_image // n))

    def text_prompts(self):
        """P_l = M_l (x) P_s in every layer, [K, b, d_l], Eq. (6)."""
        return kronecker(self.M_l, self.P_s)

    def image_prompts(self):
        """P_v = M_v (x) P_s in every layer, [K, b, d_v], Eq. (7)."""
        return kronecker(self.M_v, self.P_s)


def kronecker(M, P):
    """The Kronecker product of M [..., i, j] and P [..., m, n], [..., i m, j n]: blocks M_ij P."""
    return torch.einsum("...ij,...mn->...imjn", M, P).flatten(-2).flatten(-3, -2)


class Joint(nn.Module):
    """Figure 5a: text and image prompts trained jointly, without a link."""

    def __init__(self, n_ctx, d_text, d_image, n_layers):
        super().__init__()
        self.text = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_text))
        self.image = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, d_image))

    def text_prompts(self):
        """[K, b, d_l]"""
        return self.text

    def image_prompts(self):
        """[K, b, d_v]"""
        return self.image


class MLP(nn.Module):
    """Figure 5b: text and image prompts from one source by a linear map per modality and layer."""

    def __init__(self, n_ctx, d_text, d_image, n_layers, width=256):
        super().__init__()
        self.source = nn.Parameter(0.02 * torch.randn(n_layers, n_ctx, width))
        self.to_text = nn.ModuleList(nn.Linear(width, d_text) for _ in range(n_layers))
        self.to_image = nn.ModuleList(nn.Linear(width, d_image) for _ in range(n_layers))

    def text_prompts(self):
        """[K, b, d_l]"""
        return torch.stack([layer(source) for layer, source in zip(self.to_text, self.source)])

    def image_prompts(self):
        """[K, b, d_v]"""
        return torch.stack([layer(source) for layer, source in zip(self.to_image, self.source)])


class Prompts(nn.Module):
    """What is trained: an MmAP per group, one per task, or both side by side, Eq. (9)-(10)."""

    def __init__(self, make, n_tasks, specific):
        """make: a function that returns a new MmAP; specific: whether each task has its own."""
        super().__init__()
        self.make = make
        self.specific = nn.ModuleList(make() for _ in range(n_tasks) if specific)       # P_T
        self.shared = nn.ModuleList()                                                   # P_G
        self.register_buffer("group_of", torch.full((n_tasks,), -1))        # -1: no group
        self.register_buffer("similarity", torch.zeros(n_tasks, n_tasks))   # averaged Eq. (8)

    def set_groups(self, groups):
        """Give every group of tasks a new MmAP."""
        for number, group in enumerate(groups):
            self.group_of[group] = number
        self.shared = nn.ModuleList(self.make() for _ in groups).to(self.group_of.device)

    def load_state_dict(self, saved, **how):
        """The usual loading, after creating as many shared MmAPs as there are saved groups."""
        n_groups = int(saved["group_of"].max()) + 1
        if len(self.shared) != n_groups:
            self.set_groups([[]] * n_groups)
        return super().load_state_dict(saved, **how)

    def groups(self):
        """The groups as lists of task numbers."""
        return [torch.where(self.group_of == g)[0].tolist() for g in range(len(self.shared))]

    def sets(self):
        """The prompt set of each task: its own, or, without task-specific MmAPs, its group's."""
        return list(range(len(self.group_of))) if len(self.specific) else self.group_of.tolist()

    def text_prompts(self):
        """[P_G, P_T] of every prompt set, [K, S, b or 2b, d_l], Eq. (9)."""
        return self._concatenated([P_G.text_prompts() for P_G in self.shared],
                                  [P_T.text_prompts() for P_T in self.specific])

    def image_prompts(self):
        """[P_G, P_T] of every task, [K, N, b or 2b, d_v], Eq. (10)."""
        prompts = self._concatenated([P_G.image_prompts() for P_G in self.shared],
                                     [P_T.image_prompts() for P_T in self.specific])
        return prompts if len(self.specific) else prompts[:, self.group_of]

    def _concatenated(self, shared, specific):
        if not specific:
            return torch.stack(shared, dim=1)
        P_T = torch.stack(specific, dim=1)
        if not shared:
            return P_T
        return torch.cat([torch.stack(shared, dim=1)[:, self.group_of], P_T], dim=2)


# ----------------------------------------------------------------------- task grouping (Sec. 3.3)

def similarity(grads):
    """The dot products [N, N] of the tasks' gradients [N, P], Eq. (8)."""
    return grads @ grads.t()


def benefit(similarity, group):
    """The sum over a group's tasks of their mean similarity to the others; 0 for a single task."""
    if len(group) == 1:
        return 0.0
    return sum(similarity[i][j] for i in group for j in group if i != j) / (len(group) - 1)


def partitions(tasks, n_groups):
    """Every way to put a list of tasks into at most n_groups groups."""
    if not tasks:
        yield []
        return
    first, rest = tasks[0], tasks[1:]
    for groups in partitions(rest, n_groups):
        for i in range(len(groups)):
            yield [*groups[:i], [first, *groups[i]], *groups[i + 1:]]
        if len(groups) < n_groups:
            yield [[first], *groups]


def group_tasks(similarity, n_groups):
    """The partition of N tasks into at most n_groups groups with the largest total similarity.

    similarity: [N, N], symmetric. Up to 10 tasks, all partitions are tried; beyond that, the two
    groups whose union adds most (or costs least) are merged while there are too many groups or
    merging adds. Returns sorted lists of task numbers.
    """
    similarity = torch.as_tensor(similarity).cpu().double().tolist()
    tasks = list(range(len(similarity)))

    def total(groups):
        return sum(benefit(similarity, group) for group in groups)

    if len(tasks) <= 10:
        groups = max(partitions(tasks, n_groups), key=total)
    else:
        groups = [[i] for i in tasks]
        while len(groups) > 1:
            gain, i, j = max((total([groups[i] + groups[j]]) - total([groups[i], groups[j]]), i, j)
                             for i in range(len(groups)) for j in range(i))
            if len(groups) <= n_groups and gain < 0:
                break
            rest = [group for k, group in enumerate(groups) if k not in (i, j)]
            groups = [*rest, groups[i] + groups[j]]
    return sorted(sorted(group) for group in groups)


def measure_similarity(args, model, tasks, run):
    """Train a global shared MmAP on all tasks and average the snapshots of Eq. (8): [N, N].

    Each task gets its own copy of P_glb's parameters, by `expand`, so that one backward pass gives
    each task's gradient separately; P_glb descends along their sum. A pair's mean is over the steps
    in which both tasks have images: all steps, except with `--batches mixed`.
    """
    run.seed_phase("grouping")
    N, epochs, device = len(tasks), math.ceil(args.epochs / 2), model.logit_scale.device
    P_glb = MmAP(args.n_ctx, *widths(model), args.source_shape).to(device)
    snapshots = common.PairMean(N).to(device)
    texts = common.Texts(tasks, args.n_ctx, sets=range(N)).to(device)
    optimizer, schedule = common.sgd(replace(args, epochs=epochs), P_glb)
    for epoch in run.epochs("grouping", epochs, P_glb=P_glb, snapshots=snapshots,
                            optimizer=optimizer, schedule=schedule):
        for images, labels, task in common.batches(args, model, tasks):
            copies = [p.expand(N, *p.shape) for p in P_glb.parameters()]
            P_s, M_l, M_v = copies                                              # [N, K, ...]
            image_prompts = kronecker(M_v, P_s).transpose(0, 1)                 # [K, N, b, d_v]
            text_prompts = kronecker(M_l, P_s).transpose(0, 1)                  # [K, N, b, d_l]
            x = common.encode_image(model, images, image_prompts, task)         # [B, D]
            w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)   # [C, D]
            losses = common.task_losses(model, x, w, labels, task, texts)       # [N], Eq. (5)
            grads = torch.autograd.grad(losses.sum(), copies)                   # each [N, K, ...]
            g = torch.cat([part.flatten(1) for part in grads], dim=1)           # [N, P]
            snapshots.add(similarity(g), task)                                  # Eq. (8)
            for p, part in zip(P_glb.parameters(), grads):
                p.grad = part.sum(0)
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.nan_where_absent(losses, task))
        schedule.step()
    return snapshots.mean()


def choose_groups(args, n_tasks, similarity):
    """The groups of tasks, according to `--grouping`."""
    n_groups, order = min(args.groups, n_tasks), list(range(n_tasks))
    if args.grouping == "none":
        return []
    if args.grouping == "all":
        return [order]
    if args.grouping == "random":
        random.Random(f"{args.seeds[0]}/groups").shuffle(order)
        return sorted(sorted(order[i::n_groups]) for i in range(n_groups))
    return group_tasks(similarity, n_groups)


# ---------------------------------------------------------- multi-task prompt learning (Sec. 3.3)

def widths(model):
    """d_l, d_v and the number of layers that have prompts in both encoders."""
    visual = model.visual
    layers = min(len(model.transformer.resblocks), len(visual.transformer.resblocks))
    return len(model.ln_final.weight), len(visual.class_embedding), layers


def build(args, model, tasks):
    """The untrained prompts of the tasks; `set_groups` or a saved state adds the groups'."""
    def make():
        kind = dict(mmap=MmAP, joint=Joint, mlp=MLP)[args.prompt]
        shape = [args.source_shape] if args.prompt == "mmap" else []
        return kind(args.n_ctx, *widths(model), *shape)
    try:
        source_shape(args.n_ctx, *widths(model)[:2], args.source_shape)
    except ValueError as error:
        raise common.UserError(f"--source-shape: {error}") from error
    return Prompts(make, len(tasks), args.specific).to(model.logit_scale.device)


def n_text(args):
    """How many prompts precede a class name: the group's, the task's, or both."""
    return args.n_ctx * ((args.grouping != "none") + args.specific)


def train(args, model, tasks, run):
    """Group the tasks, then train the groups' and the tasks' MmAPs together."""
    prompts = build(args, model, tasks)
    if args.grouping == "gradient" and len(tasks) > 1:
        prompts.similarity = measure_similarity(args, model, tasks, run)
    run.seed_phase("train")
    prompts.set_groups(choose_groups(args, len(tasks), prompts.similarity))
    tell_groups(args, tasks, prompts)
    texts = common.Texts(tasks, n_text(args), prompts.sets()).to(model.logit_scale.device)
    optimizer, schedule = common.sgd(args, prompts)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, optimizer=optimizer,
                            schedule=schedule):
        for images, labels, task in common.batches(args, model, tasks):         # [B, 3, H, W]
            x = common.encode_image(model, images, prompts.image_prompts(), task)           # [B, D]
            w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
            losses = common.task_losses(model, x, w, labels, task, texts)       # [N], Eq. (5)
            optimizer.zero_grad()
            losses.sum().backward()    # P_G: its tasks' gradients, Eq. (11); P_T: its own, Eq. (12)
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.nan_where_absent(losses, task))
        schedule.step()
    return prompts


def tell_groups(args, tasks, prompts):
    """Print the groups."""
    if len(tasks) == 1:
        print("one task: there is nothing to group")
        return
    named = ["[" + ", ".join(tasks[i].name for i in group) + "]" for group in prompts.groups()]
    print(f"groups ({args.grouping}): {'  '.join(named) or 'none'}", flush=True)


def classify(args, model, tasks, prompts):
    """The tasks' classifiers and their image prompts."""
    with torch.no_grad():
        texts = common.Texts(tasks, n_text(args), prompts.sets())
        w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
        return dict(classifiers=texts.classifiers(w), image_prompts=prompts.image_prompts())


def report(args, tasks, prompts):
    """The groups, and the similarity if it was measured."""
    found = dict(groups=[[tasks[i].name for i in group] for group in prompts.groups()])
    if args.grouping == "gradient" and len(tasks) > 1:
        found["similarity"] = prompts.similarity.tolist()
    return found


def check(args, tasks):
    """Raise UserError for settings that contradict each other, and more groups than tasks."""
    if args.groups != Args.groups and args.grouping in ("all", "none"):
        raise common.UserError(f"--groups {args.groups} has no effect with --grouping "
                               f"{args.grouping}: leave one of them out")
    if args.source_shape and args.prompt != "mmap" and args.grouping != "gradient":
        raise common.UserError(f"--source-shape has no effect with --prompt {args.prompt} and "
                               f"--grouping {args.grouping}: leave it out")
    if not args.specific and args.grouping == "none":
        raise common.UserError("--no-specific with --grouping none leaves no prompts: leave one of "
                               "them out")
    if tasks and args.groups > len(tasks) > 1:
        raise common.UserError(f"--groups {args.groups} is more than the {len(tasks)} tasks of "
                               f"--data {args.data}: give fewer")


METHOD = common.Method("mmap", Args, __doc__, build, train, classify, defaults=defaults,
                       check=check, report=report, n_text=n_text, image_prompts=True, bound=True)

if __name__ == "__main__":
    common.script(METHOD)
