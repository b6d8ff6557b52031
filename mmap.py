"""MmAP: multi-modal alignment prompts, with tasks grouped by their gradients.

Xin, Du, Wang, Yan and Ding, "MmAP: Multi-Modal Alignment Prompt for Cross-Domain Multi-Task Learning", AAAI 2024.

The idea: (1) a small source prompt a layer makes both the text and the image prompts, as Kronecker products with a scaling
matrix each, so that the two encoders adapt in step and few numbers are trained, Eq. (6)-(7). (2) A first training of one
MmAP on all tasks shows whose gradients point the same way, Eq. (8), and tasks are grouped by it. (3) Every group trains an
MmAP of its own, freshly started, together with one of each task; both stand side by side in every layer, Eq. (9)-(12).

    python mmap.py                                                              # built-in benchmark and backbone
    python mmap.py --data officehome --split 0.1 --seeds 1 2 3                  # Table 1
    python mmap.py --data minidomainnet --split 0.01 --batch-size 4 --seeds 1 2 3   # Table 2
    python mmap.py --data officehome --split 0.1 --seeds 1 2 3 --grouping none  # Table 3, task-specific only; its other rows:
                                                            # --no-specific, --grouping random, --grouping all
    python mmap.py --data officehome --shots 6 --seeds 1 2 3                    # Figure 4 (1, 3, 6, 12 shots)
    python mmap.py --data officehome --split 0.1 --seeds 1 2 3 --prompt mlp --n-ctx 4   # Figure 5 (also: joint)

Choices the paper leaves open
- b = 16, m = b and n = gcd(d_l, d_v) / 2: 24,696 numbers an MmAP at ViT-B/16, 0.12 M for four tasks in one group and 0.15 M
  in two (the paper: 0.13 M). Eq. (9)-(10) write the factors the other way round than Eq. (6)-(7); this follows (6)-(7).
- P_s starts at N(0, 0.02), the scaling matrices at one: both modalities start as copies of one source.
- The global MmAP is trained for half of the epochs (rounded up) before the main training, with the same settings; Eq. (8) is
  taken at every step and averaged.
- Sec. 3.3 speaks of cosine similarity and prints a dot product, Eq. (8); this follows the equation.
- "Groups that maximize the total inter-task similarity": at most `--groups` (2) of them, a task's similarity to its group
  being the mean over the others in it, and 0 for a task alone. With sums, one group of all wins whenever nothing conflicts;
  TAG, which the paper follows, averages.
- Where the two encoders differ in depth (ViT-L/14), the first min(depths) layers have prompts.
- Random groups are as even as can be. `--prompt` replaces every MmAP (data/prompts.py): `joint` trains text and image prompts without a link,
  `mlp` makes them of a [b, 256] source by a linear map a modality and layer (3.96 M at b = 4, the paper's number, is one such
  set; the command trains one a task and one a group).
- SGD with momentum 0.9 and weight decay 5e-4 (Dassl's defaults, on which the authors' programs run), and a cosine that steps
  once an epoch, without the warm-up epoch that MaPLe's and CoOp's configurations have.
- A step takes a batch of every task; an epoch is as long as the largest task needs. Views are fresh every epoch.
"""
import importlib.machinery
import importlib.util
import os
import sys

if __name__ == "mmap":
    # `import mmap`, which torch and numpy say too, means the standard library's module; run from this folder, Python finds
    # this file first. So hand over the standard one. What follows is then defined once more for nobody, while torch itself may
    # be half imported: hence no imports then, and nothing below may touch torch outside a function.
    _elsewhere = [p for p in sys.path if os.path.realpath(p or os.curdir) != os.path.dirname(os.path.realpath(__file__))]
    _spec = importlib.machinery.PathFinder.find_spec("mmap", _elsewhere)
    sys.modules["mmap"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["mmap"])
    nn = type("nn", (), dict(Module=object))
else:
    import math
    import random

    import torch
    from torch import nn

    import common

PAPER = dict(                       # Sec. 4.1, "Implementation Details"
    clip="ViT-B/16",                # "with CLIP (ViT-B/16) chosen as our default model"
    epochs=5,                       # "train for 5 epochs for Office-Home/MiniDomainNet"
    lr=0.0035,                      # "We employ the SGD optimizer with a learning rate of 0.0035"
    batch_size=16,                  # "a batch size of 16/4"
    n_ctx=16,                       # ours
    views=0,                        # fresh views every epoch
    min_crop=0.08,                  # Dassl's random resized crop
    groups=2,                       # ours: at most so many
    grouping="gradient",            # Sec. 3.3; the other values are Table 3's
    prompt="mmap")                  # Sec. 3.2; the other values are Figure 5's
TINY = dict(epochs=10, lr=0.1, n_ctx=4, min_crop=0.6)       # the built-in backbone's, chosen on fxemoji; 36 patches want fewer prompts
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # Dassl's defaults


# ------------------------------------------------------------------------------------------------- prompts (Sec. 3.2)

class MmAP(nn.Module):
    """Text and image prompts of K layers from one source prompt a layer, Eq. (6)-(7)."""

    def __init__(self, n_ctx, d_text, d_image, n_layers, source=None):
        """source: (m, n), the shape of a source prompt; m divides n_ctx, n both widths. Default (n_ctx, gcd / 2)."""
        super().__init__()
        gcd = math.gcd(d_text, d_image)
        m, n = source or (n_ctx, gcd // 2 if gcd % 2 == 0 else gcd)
        if n_ctx % m or gcd % n:
            raise ValueError(f"a source prompt of {m} x {n} does not divide prompts of {n_ctx} x {d_text} and {n_ctx} x {d_image}")
        self.P_s = nn.Parameter(0.02 * torch.randn(n_layers, m, n))
        self.M_l = nn.Parameter(torch.ones(n_layers, n_ctx // m, d_text // n))
        self.M_v = nn.Parameter(torch.ones(n_layers, n_ctx // m, d_image // n))

    def text_prompts(self):
        """P_l [K, b, d_l] = M_l (x) P_s in every layer, Eq. (6)."""
        return kronecker(self.M_l, self.P_s)

    def image_prompts(self):
        """P_v [K, b, d_v] = M_v (x) P_s in every layer, Eq. (7)."""
        return kronecker(self.M_v, self.P_s)


def kronecker(M, P):
    """The Kronecker product of M [K, i, j] and P [K, m, n] layer by layer: [K, i m, j n], blocks M_ij P."""
    return torch.einsum("kij,kmn->kimjn", M, P).flatten(3, 4).flatten(1, 2)


class Prompts(nn.Module):
    """What is trained in the end: an MmAP for each group, one for each task, or both side by side, Eq. (9)-(10)."""

    def __init__(self, make, n_tasks, specific):
        """make: a function that returns a new MmAP; specific: whether the tasks have their own."""
        super().__init__()
        self.make = make
        self.specific = nn.ModuleList(make() for _ in range(n_tasks) if specific)
        self.shared = nn.ModuleList()
        self.register_buffer("group_of", torch.full((n_tasks,), -1))            # task -> group, or -1 for none
        self.register_buffer("similarity", torch.zeros(n_tasks, n_tasks))       # averaged Eq. (8), where it was measured

    def set_groups(self, groups):
        """Give every group of tasks a fresh MmAP."""
        for number, group in enumerate(groups):
            self.group_of[group] = number
        self.shared = nn.ModuleList(self.make() for _ in groups)

    def load_state_dict(self, saved, **how):
        """As ever, after making as many shared MmAPs as the saved groups need."""
        self.set_groups([[]] * (int(saved["group_of"].max()) + 1))
        return super().load_state_dict(saved, **how)

    def groups(self):
        """The groups as lists of task numbers."""
        return [torch.where(self.group_of == g)[0].tolist() for g in range(len(self.shared))]

    def owners(self):
        """For each task, the first one that has the same prompts."""
        return list(range(len(self.group_of))) if self.specific else [int(torch.where(self.group_of == g)[0][0]) for g in self.group_of]

    def text_prompts(self):
        """[P_G, P_T] of every task, [K, N, b or 2b, d_l]."""
        return self._join([one.text_prompts() for one in self.shared], [one.text_prompts() for one in self.specific])

    def image_prompts(self):
        """[P_G, P_T] of every task, [K, N, b or 2b, d_v]."""
        return self._join([one.image_prompts() for one in self.shared], [one.image_prompts() for one in self.specific])

    def _join(self, shared, specific):
        parts = [torch.stack(shared, dim=1)[:, self.group_of]] if shared else []
        parts += [torch.stack(specific, dim=1)] if specific else []
        return torch.cat(parts, dim=2)


# ------------------------------------------------------------------------------------------- task grouping (Sec. 3.3)

def similarity(grads):
    """The dot products [N, N] of the tasks' gradients [N, P], Eq. (8)."""
    return grads @ grads.t()


def benefit(similarity, group):
    """The sum over the tasks of a group of their mean similarity to the others in it; 0 for a task alone."""
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
    """The partition of N tasks into at most n_groups groups that "maximize[s] the total inter-task similarity", Sec. 3.3.

    similarity: [N, N], symmetric. Up to 10 tasks all partitions are tried; beyond, the two groups whose union adds most (or
    costs least) are joined while there are too many groups or joining pays. Returns sorted lists of task numbers.
    """
    similarity = torch.as_tensor(similarity).double().tolist()
    tasks = list(range(len(similarity)))
    if len(tasks) <= 10:
        groups = max(partitions(tasks, n_groups), key=lambda groups: sum(benefit(similarity, g) for g in groups))
    else:
        groups = [[i] for i in tasks]
        while len(groups) > 1:
            gain = lambda a, b: benefit(similarity, a + b) - benefit(similarity, a) - benefit(similarity, b)
            best, i, j = max((gain(groups[i], groups[j]), i, j) for i in range(len(groups)) for j in range(i))
            if len(groups) <= n_groups and best < 0:
                break
            groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [groups[i] + groups[j]]
    return sorted(sorted(group) for group in groups)


def task_gradients(model, texts, shared, batches):
    """The gradient of every task's loss at one shared MmAP: ([N, P], losses [N]), from one pass through CLIP.

    Each task gets its own copy of the prompts, so one backward pass leaves each copy with its task's gradient; the chain rule
    takes it on through the Kronecker product, which is cheap.
    """
    made = [shared.text_prompts(), shared.image_prompts()]                      # [K, b, d_l], [K, b, d_v]
    copies = [x.detach()[:, None].repeat(1, len(batches), 1, 1).requires_grad_() for x in made]
    losses = common.prompted_losses(model, texts, *copies, batches)
    grads = torch.autograd.grad(losses.sum(), copies)                           # [K, N, b, d_l], [K, N, b, d_v]
    rows = [torch.autograd.grad(made, list(shared.parameters()), [g[:, i] for g in grads], retain_graph=True)
            for i in range(len(batches))]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), losses.detach()


def measure_similarity(args, model, tasks, run, seed, epochs):
    """Train a global shared MmAP on all tasks, "concurrently", and average the snapshots of Eq. (8): [N, N]."""
    shared, texts = maker(args, model)(), common.Texts(tasks, args.n_ctx, owners=list(range(len(tasks))))
    shared.register_buffer("snapshots", torch.zeros(len(tasks), len(tasks), device=model.logit_scale.device))
    optimizer, schedule = optimizer_of(args, shared, epochs)
    start = run.restore(seed, prompts=shared, optimizer=optimizer, schedule=schedule)
    for epoch in common.progress(range(start, epochs), "group"):
        common.seed_everything(seed, args.epochs + epoch + 1)                   # other batches than the second phase's
        losses, snapshots = [], []
        for batches in common.image_batches(model, tasks, args, seed):
            grads, loss = task_gradients(model, texts, shared, batches)
            snapshots.append(similarity(grads))
            for p, g in zip(shared.parameters(), grads.sum(0).split([p.numel() for p in shared.parameters()])):
                p.grad = g.view_as(p)                                           # the sum of the tasks' gradients
            optimizer.step()
            losses.append(loss.sum().item())
        schedule.step()
        shared.snapshots += torch.stack(snapshots).mean(0) / epochs
        row = dict(phase="grouping", loss=sum(losses) / len(losses))
        run.checkpoint(seed, epoch + 1, row, prompts=shared, optimizer=optimizer, schedule=schedule)
    return shared.snapshots


# ------------------------------------------------------------------------------- multi-task prompt learning (Sec. 3.3)

def maker(args, model):
    """A function that returns a new MmAP (or what `--prompt` names) for this backbone."""
    layers = min(len(model.transformer.resblocks), len(model.visual.transformer.resblocks))
    d_text, d_image = model.ln_final.weight.shape[0], model.visual.class_embedding.shape[0]
    kind = dict(mmap=MmAP, joint=common.Joint, mlp=common.MLP)[args.prompt]
    return lambda: kind(args.n_ctx, d_text, d_image, layers).to(model.logit_scale.device)


def build(args, model, tasks):
    """The untrained prompts of the tasks; those of the groups come with `set_groups` or with a saved state."""
    return Prompts(maker(args, model), len(tasks), specific=not args.no_specific).to(model.logit_scale.device)


def check(args, tasks):
    """Refuse more groups than tasks."""
    if args.groups > len(tasks) > 1:
        raise common.UserError(f"--groups {args.groups} is more than the {len(tasks)} tasks of --data {args.data}: give fewer")


def optimizer_of(args, prompts, epochs):
    optimizer = torch.optim.SGD(prompts.parameters(), lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def n_text(args):
    """How many prompts stand before a class name: the group's, the task's, or both."""
    return args.n_ctx * ((args.grouping != "none") + (not args.no_specific))


def choose_groups(args, tasks, similarity, seed):
    """The groups of tasks, as `--grouping` says."""
    n_groups, order = min(args.groups, len(tasks)), list(range(len(tasks)))
    if args.grouping == "none":
        return []
    if args.grouping == "all":
        return [order]
    if args.grouping == "random":
        random.Random(f"{seed}/groups").shuffle(order)
        return sorted(sorted(order[i::n_groups]) for i in range(n_groups))
    return group_tasks(similarity, n_groups)


def train(args, model, tasks, run, seed):
    """Group the tasks, then train the groups' and the tasks' MmAPs together; returns the trained prompts."""
    common.seed_everything(seed)
    first = math.ceil(args.epochs / 2) if args.grouping == "gradient" and len(tasks) > 1 else 0    # epochs of the first phase
    done, prompts = run.restore(seed), build(args, model, tasks)
    if done <= first:
        if first:
            prompts.similarity = measure_similarity(args, model, tasks, run, seed, first)
        common.seed_everything(seed, 2 * args.epochs + 2)                       # the start of the second phase, resumed or not
        prompts.set_groups(choose_groups(args, tasks, prompts.similarity, seed))
    else:
        run.restore(seed, prompts=prompts)
    optimizer, schedule = optimizer_of(args, prompts, args.epochs)
    if done > first:
        run.restore(seed, optimizer=optimizer, schedule=schedule)
    tell_groups(args, tasks, prompts)
    texts = common.Texts(tasks, n_text(args), prompts.owners())
    for epoch in common.progress(range(max(done, first), first + args.epochs), "train"):
        common.seed_everything(seed, epoch - first + 1)                         # the same batches whatever the grouping
        losses = []
        for batches in common.image_batches(model, tasks, args, seed):
            loss = common.prompted_losses(model, texts, prompts.text_prompts(), prompts.image_prompts(), batches).sum()
            optimizer.zero_grad()
            loss.backward()                 # Eq. (11): a group's MmAP gets the sum of its tasks' gradients; Eq. (12): a task's its own
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        row = dict(phase="training", loss=sum(losses) / len(losses))
        run.checkpoint(seed, epoch + 1, row, prompts=prompts, optimizer=optimizer, schedule=schedule)
    return prompts


def tell_groups(args, tasks, prompts):
    named = "  ".join("[" + ", ".join(tasks[i].name for i in group) + "]" for group in prompts.groups())
    if len(tasks) == 1:
        return print("one task: there is nothing to group")
    print(f"groups ({args.grouping}): {named or 'none'}", flush=True)


def score(args, model, preprocess, tasks, prompts):
    """Zero-shot CLIP's and the method's accuracy on every task, in per cent; the groups, and the similarity if measured."""
    with torch.no_grad():
        text_features = common.Texts(tasks, n_text(args), prompts.owners()).encode(model, prompts.text_prompts())
        image_prompts = prompts.image_prompts()
    scores = dict(common.score_tasks(model, preprocess, tasks, text_features, image_prompts),
                  groups=[[tasks[i].name for i in group] for group in prompts.groups()])
    measured = args.grouping == "gradient" and len(tasks) > 1
    return dict(scores, similarity=prompts.similarity.tolist()) if measured else scores


def main(argv=None):
    parser = common.arguments("mmap", __doc__, PAPER, TINY)
    parser.add_argument("--groups", type=int, help="at most so many groups of tasks (default 2)")
    parser.add_argument("--grouping", choices=["gradient", "random", "all", "none"],
                        help="how tasks are grouped (default gradient); none: task-specific prompts only")
    parser.add_argument("--no-specific", action="store_true", help="no task-specific prompts, only the groups'")
    parser.add_argument("--prompt", choices=["mmap", "joint", "mlp"], help="what makes the prompts (default mmap)")
    args = common.parse(parser, argv)
    if args.groups < 1:
        raise common.UserError(f"--groups {args.groups} is too small: give 1 or more")
    if args.no_specific and args.grouping == "none":
        raise common.UserError("--no-specific with --grouping none leaves no prompts: leave one of them out")
    usual = dict(groups=2, grouping="gradient", no_specific=False, prompt="mmap")
    args.variant = ", ".join(common.said(key, getattr(args, key)) for key in usual if getattr(args, key) != usual[key]) or None
    common.run_seeds(args, build, train, score, n_text(args), image_prompts=True, check=check)


if __name__ == "__main__":
    common.script(main)
