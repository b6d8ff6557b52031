r"""HiPro: a prompt for every node of a tree of tasks; a task uses those on its path to the root.

Liu, Lu, Liu, An, Xu, Yao, Zhang, Xiong and Gui, "Hierarchical Prompt Learning for Multi-Task
Learning", CVPR 2023.

The idea: a prompt shared by all tasks is too coarse, a prompt for a single task overfits. So tasks
whose gradients on a shared prompt agree, Eq. (3), are merged pair by pair into a balanced tree,
Eq. (4). Every node, whether a leaf (one task), the root (all tasks) or a group in between, learns a
text prompt on its tasks, Eq. (2). A task's classifier is the mean of its nodes' classifiers,
Eq. (5).

    python hipro.py                                                     # built-in benchmark, CPU
    python hipro.py --data officehome --split 0.1 --seeds 1 2 3         # Table 1, also --split 0.2
    python hipro.py --data domainnet --split 0.01 --seeds 1 2 3         # Table 2, also --split 0.02
    python hipro.py --data cifar100 --split 0.04 --seeds 1 2 3 --plot   # Table 3, also 0.08;
                        # Figure 4 (affinity-SEED.png) and Figure 5 (tree-SEED.png)
    python hipro.py --data officehome --split 0.1 --seeds 1 2 3 --grouping random       # Table 4,
                        # also shared+individual and tag, --split 0.2, and domainnet
    python hipro.py --data officehome --split 0.1 --seeds 1 2 3 --grouping tag-groups   # Tables 1
                        # and 2, column TAG
    python hipro.py --data coop10 --shots 1 --seeds 1 2 3               # Figure 6, shots 1 2 4 8 16
    python coop_mt.py --data coop10 --shots 1 --seeds 1 2 3 --clip RN50 --epochs 100 --lr 0.001 \
        --batches mixed --batch-size 20 --single-task                   # ... CoOp
    python common.py probe --data coop10 --shots 1 --seeds 1 2 3 --clip RN50    # ... linear probe
    python common.py zero-shot --data coop10 --shots 1 --clip RN50              # ... CLIP

paper       code                                paper           code
G_i         nodes, tuples of task numbers       I(T in G)       NodePrompts.members [M, N]
p_G         NodePrompts.vectors, M of [b, d_l]  p_all           SharedPrompts.vectors [8, b, d_l]
L_T(p_G)    losses [pairs], by (node, task)     d_T,T           affinity [N, N]
w(p_G)      node_weights [M, K, D]              d(G_a, G_b)     group_affinity

Choices the paper leaves open
- "Images from all tasks are combined together in a mini-batch": batches of 20 from the shuffled
  union of the tasks, every image once per epoch. L_T in Eq. (2) is the mean over the task's images
  in the step. A task without images in it adds nothing to its nodes' losses, and a node without
  images keeps its prompt and momentum: every prompt is trained as if alone, on its own batches.
- The 8 task-shared prompts are trained as long as the nodes' prompts, with the same settings. They
  have their own seed, so `tag` and `tag-groups` measure the same affinity, and the nodes see the
  same views with every `--grouping`. A snapshot has a value for each pair of tasks that both have
  images in the step; a pair's affinity is the mean of its values.
- A classifier is the text features at unit length; the mean of several is not normalised again.
- Random groups are the tree of random affinities, drawn from the seed.
- TAG's affinity of i on j is 1 - L_j(after a step on i alone) / L_j (Fifty et al., NeurIPS 2021),
  averaged over both directions; also at every 5th step, with that step's learning rate.
- `--grouping tag-groups` is TAG as a baseline: at most `--groups` disjoint groups (TAG's may
  overlap), chosen to maximize the sum of the tasks' mean affinities to the others in their group,
  0 for a task on its own. A task is classified by its group's prompt alone.
- SGD and its cosine: `common.sgd`; the paper states no warm-up. Fresh views every epoch. For the
  built-in backbone 8 views per image are drawn once instead, so that the frozen image encoder
  encodes each of them once; they show at least 0.6 of the area, because `tiny` was never trained on
  small crops.
"""
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common

SHARED_PROMPTS, EVERY = 8, 5            # "the inter-task affinity every 5 steps with 8 task-shared
                                        # prompts"


@dataclass
class Args(common.Args):
    """Sec. 4, "Training Details"."""

    # "CLIP with ResNet-50 vision backbone as our default model"; tiny for built-in data
    clip: str = "RN50"
    epochs: common.Count = 100  # "trained by the SGD optimizer for 100 epochs"
    lr: common.Rate = 0.001  # "with a learning rate of 0.001 and the cosine decay scheduler"
    # "Batch size is 20": images of all tasks; per task with --batches tasks
    batch_size: common.Count = 20
    batches: Literal["tasks", "mixed"] = "mixed"  # "Images from all tasks are combined together"
    n_ctx: common.Count = 16  # "Prompt with 16 tokens"
    # tree: Sec. 3.3; tag-groups: column TAG of Tables 1, 2; others: Table 4
    grouping: Literal["tree", "shared+individual", "random", "tag", "tag-groups"] = "tree"
    # maximum number of task groups, for --grouping tag-groups (ours)
    groups: common.Count = 2


def defaults(args):
    """The settings of `tiny`; data/README.md says how they were chosen."""
    if args.clip == "tiny":
        return dict(epochs=15, lr=0.03, batch_size=64, min_crop=0.6, views=8)
    return {}


# ------------------------------------------------------------------------ prompts (Sec. 3.2, 3.3)

class NodePrompts(nn.Module):
    """What is trained: a text prompt per node, each a separate parameter."""

    def __init__(self, n_tasks, n_ctx, width):
        super().__init__()
        self.shape = n_ctx, width
        self.vectors = nn.ParameterList()                                           # p_G
        self.register_buffer("members", torch.zeros(0, n_tasks, dtype=torch.bool))  # I(T in G)
        self.register_buffer("affinity", torch.zeros(n_tasks, n_tasks))     # Eq. (3), averaged

    def set_nodes(self, nodes):
        """Give every node, a tuple of task numbers, a new prompt, N(0, 0.02)."""
        self.members = self.members.new_zeros(len(nodes), len(self.affinity))
        for m, node in enumerate(nodes):
            self.members[m, list(node)] = True
        device = self.members.device
        self.vectors = nn.ParameterList((0.02 * torch.randn(self.shape)).to(device) for _ in nodes)

    def load_state_dict(self, saved, **how):
        """The usual loading, after creating as many prompts as there are saved nodes."""
        if len(self.vectors) != len(saved["members"]):
            self.set_nodes([()] * len(saved["members"]))
        return super().load_state_dict(saved, **how)

    def nodes(self):
        """The nodes as tuples of task numbers."""
        return [tuple(torch.where(row)[0].tolist()) for row in self.members]

    def text_prompts(self, task=None):
        """The nodes' prompts [L=1, M, b, d_l].

        Given the tasks [B] of a step's images, prompts of nodes without any of these tasks are
        detached: they get no gradient, so SGD leaves them and their momentum alone.
        """
        if task is None:
            return torch.stack(list(self.vectors))[None]
        present = self.members[:, task].any(dim=1).tolist()
        prompts = [p if here else p.detach() for p, here in zip(self.vectors, present)]
        return torch.stack(prompts)[None]


class SharedPrompts(nn.Module):
    """Independently initialised prompts for all tasks, on which the affinity is measured."""

    def __init__(self, n_ctx, width):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(SHARED_PROMPTS, n_ctx, width))   # p_all


# -------------------------------------------------------------------- inter-task affinity, Eq. (3)

def gradient_affinity(grads):
    """The tasks' dot products [N, N], Eq. (3), from their gradients [S, N, P] at S prompts."""
    return (grads @ grads.transpose(1, 2)).mean(0)


def losses_at(model, w, batch, texts):
    """The losses [S, N] of all tasks at S shared prompts, Eq. (1), from text features w [C, D].

    batch: image features, labels and (prompt, task) pairs of a step, each image once per prompt.
    """
    x, labels, pair = batch
    return common.task_losses(model, x, w, labels, pair, texts).view(SHARED_PROMPTS, -1)


@torch.no_grad()
def tag_affinity(model, texts, batch, vectors, grads, losses, lr):
    """TAG's look-ahead affinity [N, N], symmetric and averaged over the shared prompts.

    vectors [S, b, d_l], with grads [S, N, b, d_l] and losses [S, N]. The rows and columns of tasks
    without images are 0.
    """
    rows = torch.zeros_like(losses[0]).repeat(losses.shape[1], 1)               # [N, N]
    for i in range(len(rows)):
        if grads[:, i].any():                   # else task i has no image, and would take no step
            stepped = vectors - lr * grads[:, i]
            w = common.encode_text(model, texts.tokens, stepped[None], texts.sets)
            after = losses_at(model, w, batch, texts)
            rows[i] = ((losses - after) / losses.clamp(min=1e-12)).mean(0)
    return (rows + rows.t()) / 2


def measure_affinity(args, model, tasks, run):
    """Train the task-shared prompts, each on all tasks, and average the snapshots: [N, N].

    A snapshot is taken at every 5th step, "without additional forwards": it uses the same task
    gradients that the step sums.
    """
    run.seed_phase("affinity")
    N, device = len(tasks), model.logit_scale.device
    shared = SharedPrompts(args.n_ctx, len(model.ln_final.weight)).to(device)
    snapshots = common.PairMean(N).to(device)
    pairs = list(product(range(SHARED_PROMPTS), range(N)))              # (prompt, task)
    task_of = torch.tensor([i for _, i in pairs], device=device)
    texts = common.Texts(tasks * SHARED_PROMPTS, args.n_ctx, [m for m, _ in pairs]).to(device)
    n_steps = common.steps_per_epoch(args, tasks)
    optimizer, schedule = common.sgd(args, shared)
    for epoch in run.epochs("affinity", args.epochs, shared=shared, snapshots=snapshots,
                            optimizer=optimizer, schedule=schedule):
        steps = common.batches(args, model, tasks, frozen=True)
        for step, (images, labels, task) in enumerate(steps, epoch * n_steps):
            x = common.encode_image(model, images)                              # [B, D], frozen
            w = common.encode_text(model, texts.tokens, shared.vectors[None], texts.sets)
            image, pair = torch.where(task[:, None] == task_of)     # each image once per prompt
            batch = x[image], labels[image], pair
            losses = losses_at(model, w, batch, texts)                          # [8, N], Eq. (1)
            optimizer.zero_grad()
            if step % EVERY == 0:
                grads = torch.stack([
                    torch.autograd.grad(loss, shared.vectors, retain_graph=True)[0]
                    for loss in losses.sum(0)], dim=1)                          # [8, N, b, d_l]
                if args.grouping == "tree":
                    snapshots.add(gradient_affinity(grads.flatten(2)), task)    # Eq. (3)
                else:
                    lr = optimizer.param_groups[0]["lr"]
                    snapshots.add(tag_affinity(model, texts, batch, shared.vectors, grads,
                                               losses.detach(), lr), task)
                shared.vectors.grad = grads.sum(1)                              # Eq. (2)
            else:
                losses.sum().backward()                                         # Eq. (2)
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.nan_where_absent(losses.mean(0), task))
        schedule.step()
    return snapshots.mean()


# ----------------------------------------------------------- hierarchical task clustering, Eq. (4)

def task_tree(affinity):
    """The 2N-1 nodes of a balanced tree: sorted tuples of task numbers, leaves first, root last.

    affinity: [N, N], symmetric. "We iteratively find the two most similar clusters and merge them
    to form a new cluster. To construct a balanced tree, new clusters are temporarily excluded, and
    clustering continues. All excluded clusters are returned when the remaining clusters are less
    than 2." (Sec. 3.3)
    """
    d = torch.as_tensor(affinity).cpu().double().tolist()
    nodes = [(i,) for i in range(len(d))]
    active, excluded = list(nodes), []
    while len(active) + len(excluded) > 1:
        if len(active) < 2:
            active, excluded = active + excluded, []
        pairs = [(a, b) for i, a in enumerate(active) for b in active[i + 1:]]
        a, b = max(pairs, key=lambda pair: group_affinity(d, *pair))
        active = [group for group in active if group not in (a, b)]
        excluded.append(tuple(sorted(a + b)))
        nodes.append(excluded[-1])
    return nodes


def group_affinity(d, a, b):
    """The mean affinity of the task pairs between two groups, Eq. (4)."""
    return sum(d[i][j] for i in a for j in b) / (len(a) * len(b))


def group_tasks(affinity, n_groups):
    """The partition of N tasks into at most n_groups groups with the largest total affinity.

    affinity: [N, N], symmetric. A group's total is the sum of its tasks' mean affinities to the
    others in it, 0 for a task on its own. Up to 10 tasks, all partitions are tried; beyond that,
    the two groups whose union adds most (or costs least) are merged while there are too many groups
    or merging adds. Returns sorted lists of task numbers.
    """
    d = torch.as_tensor(affinity).cpu().double().tolist()
    tasks = list(range(len(d)))

    def total(groups):
        return sum(sum(d[i][j] for i in group for j in group if i != j) / max(len(group) - 1, 1)
                   for group in groups)

    if len(tasks) <= 10:
        return sorted(sorted(group) for group in max(partitions(tasks, n_groups), key=total))
    groups = [[i] for i in tasks]
    while len(groups) > 1:
        gain, i, j = max((total([groups[i] + groups[j]]) - total([groups[i], groups[j]]), i, j)
                         for i in range(len(groups)) for j in range(i))
        if len(groups) <= n_groups and gain < 0:
            break
        groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [groups[i] + groups[j]]
    return sorted(sorted(group) for group in groups)


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


def choose_nodes(args, affinity):
    """The groups of tasks that get a prompt each, according to `--grouping`."""
    N = len(affinity)
    if args.grouping == "shared+individual" and N > 1:
        return [*((i,) for i in range(N)), tuple(range(N))]
    if args.grouping == "tag-groups":
        return [tuple(group) for group in group_tasks(affinity, args.groups)]
    if args.grouping == "random":
        x = torch.rand(N, N, generator=torch.Generator().manual_seed(args.seeds[0]))
        affinity = x + x.t()
    return task_tree(affinity)


# ---------------------------------------------------------------------- prompt learning, Eq. (2)

def build(args, model, tasks):
    """The prompts, still without nodes: `set_nodes` or a saved state adds them."""
    prompts = NodePrompts(len(tasks), args.n_ctx, len(model.ln_final.weight))
    return prompts.to(model.logit_scale.device)


def measured(args, tasks):
    """Whether the grouping needs the affinity of the tasks."""
    return args.grouping in ("tree", "tag", "tag-groups") and len(tasks) > 1


def pairs_of(nodes):
    """Every (node number, number of a task in the node)."""
    return [(m, i) for m, node in enumerate(nodes) for i in node]


def node_texts(args, tasks, nodes):
    """The texts of all nodes as one batch: each (node, task) pair is treated as a task with the
    node's prompt. Tasks with the same class names share rows within a node."""
    pairs = pairs_of(nodes)
    return common.Texts([tasks[i] for _, i in pairs], args.n_ctx, [m for m, _ in pairs])


def train(args, model, tasks, run):
    """Measure the affinity, build the tree, and train the prompts of all nodes side by side."""
    prompts, device = build(args, model, tasks), model.logit_scale.device
    if measured(args, tasks):
        prompts.affinity = measure_affinity(args, model, tasks, run)
    run.seed_phase("train")
    prompts.set_nodes(choose_nodes(args, prompts.affinity))
    nodes = prompts.nodes()
    tell_nodes(args, tasks, nodes)
    texts = node_texts(args, tasks, nodes).to(device)
    task_of = torch.tensor([i for _, i in pairs_of(nodes)], device=device)      # of every pair
    over_nodes = F.normalize(F.one_hot(task_of).t().float(), p=1)               # [N, pairs]: a mean
    optimizer, schedule = common.sgd(args, prompts)
    for epoch in run.epochs("train", args.epochs, prompts=prompts, optimizer=optimizer,
                            schedule=schedule):
        for images, labels, task in common.batches(args, model, tasks, frozen=True):
            x = common.encode_image(model, images)                              # [B, D], frozen
            w = common.encode_text(model, texts.tokens, prompts.text_prompts(task), texts.sets)
            image, pair = torch.where(task[:, None] == task_of)     # each image once per node
            losses = common.task_losses(model, x[image], w, labels[image], pair, texts)  # Eq. (1)
            optimizer.zero_grad()
            losses.sum().backward()     # Eq. (2) of every node: no loss depends on two prompts
            optimizer.step()
            run.log(loss=losses.sum(), losses=common.nan_where_absent(over_nodes @ losses, task))
        schedule.step()
    return prompts


def tell_nodes(args, tasks, nodes):
    """Print the groups of tasks."""
    if len(tasks) == 1:
        print("one task: there is no tree, only its own prompt")
        return
    if args.grouping == "tag-groups":
        groups, what = nodes, ""
    else:
        groups = [node for node in nodes if 1 < len(node) < len(tasks)]
        what = " between the leaves and the root"
    named = ["[" + ", ".join(tasks[i].name for i in group) + "]" for group in groups]
    print(f"groups ({args.grouping}){what}: {'  '.join(named) or 'none'}", flush=True)


# ---------------------------------------------------------------------------- inference, Eq. (5)

def fuse(node_weights, nodes, task):
    """The classifier [K, D] of a task: the mean of its nodes' weights [M, K, D], Eq. (5)."""
    mine = [m for m, node in enumerate(nodes) if task in node]
    return node_weights[mine].mean(0)


@torch.no_grad()
def classify(args, model, tasks, prompts):
    """Every task's classifier: the fused unit-length text features of its nodes."""
    nodes = prompts.nodes()
    texts = node_texts(args, tasks, nodes)
    w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
    weights = dict(zip(pairs_of(nodes), texts.classifiers(w)))                  # each [K, D]
    fused = []
    for i, task in enumerate(tasks):
        node_weights = w.new_zeros(len(nodes), len(task.class_names), w.shape[1])   # [M, K, D]
        for m, node in enumerate(nodes):
            if i in node:
                node_weights[m] = weights[m, i]
        fused.append(fuse(node_weights, nodes, i))
    return dict(classifiers=fused)


def report(args, tasks, prompts):
    """The nodes, and the affinity if it was measured."""
    found = dict(nodes=[[tasks[i].name for i in node] for node in prompts.nodes()])
    if measured(args, tasks):
        found["affinity"] = prompts.affinity.tolist()
    return found


# ----------------------------------------------------------------------------------------- figures

def plot(folder, result, rows):
    """tree-SEED.png: the task tree as a dendrogram, Figure 5 (`affinity-SEED.png` is Figure 4);
    each merge shows the affinity of its two groups, Eq. (4), if it was measured."""
    names = result["tasks"]
    for k, (seed, nodes) in enumerate(zip(result["seeds"], result["nodes"])):
        single = all([name] in nodes for name in names)
        if len(names) == 1 or len(nodes[-1]) < len(names) or not single:    # TAG's are not a tree
            continue
        figure, axes = common.pyplot().subplots(figsize=(6, 1 + 0.35 * len(names)))
        order, place = leaves(nodes[-1], nodes), {}
        for node in sorted(nodes, key=len):
            below = children(node, nodes)
            spots = [place[tuple(child)] for child in below]
            if not spots:                               # a leaf
                place[tuple(node)] = 0, order.index(node[0])
                continue
            height, middle = max(x for x, _ in spots) + 1, sum(y for _, y in spots) / len(spots)
            place[tuple(node)] = height, middle
            for x, y in spots:
                axes.plot([x, height, height], [y, y, middle], "-", color="black", marker="")
            if "affinity" in result:
                a, b = ([names.index(name) for name in child] for child in below)
                mean = group_affinity(result["affinity"][k], a, b)
                axes.text(height - 0.05, middle, f"{mean:.3g}", ha="right", va="center", fontsize=7)
        axes.text(height + 0.05, middle, f"root: all {len(names)} tasks", va="center")
        axes.set(xticks=[], yticks=range(len(order)), yticklabels=order,
                 title=f"task tree, seed {seed}")
        axes.spines[:].set_visible(False)
        common.save_figure(figure, folder / f"tree-{seed}.png")


def children(node, nodes):
    """The largest nodes inside a node."""
    inside = [other for other in nodes if set(other) < set(node)]
    return [child for child in inside if not any(set(child) < set(other) for other in inside)]


def leaves(node, nodes):
    """The tasks of a node in an order that draws its tree without crossings."""
    below = [leaf for child in children(node, nodes) for leaf in leaves(child, nodes)]
    return below or list(node)


def check(args, tasks):
    """Raise UserError for --groups without tag-groups, and for more groups than tasks."""
    if args.groups != Args.groups and args.grouping != "tag-groups":
        raise common.UserError(f"--groups {args.groups} is for --grouping tag-groups, not for "
                               f"--grouping {args.grouping}: leave one of them out")
    if tasks and args.grouping == "tag-groups" and args.groups > len(tasks) > 1:
        raise common.UserError(f"--groups {args.groups} is more than the {len(tasks)} tasks of "
                               f"--data {args.data}: give fewer")


METHOD = common.Method("hipro", Args, __doc__, build, train, classify, defaults=defaults,
                       check=check, report=report, plot=plot, bound=True,
                       n_text=lambda args: args.n_ctx)

if __name__ == "__main__":
    common.script(METHOD)
