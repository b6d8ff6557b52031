"""HiPro: a prompt for every node of a tree of tasks, trained on the node's tasks and averaged along the way to a leaf.

Liu, Lu, Liu, An, Xu, Yao, Zhang, Xiong and Gui, "Hierarchical Prompt Learning for Multi-Task Learning", CVPR 2023.

The idea: a prompt shared by all tasks is too coarse, a prompt of one task overfits. So tasks whose gradients on a shared
prompt agree, Eq. (3), are merged pair by pair into a balanced tree, Eq. (4). Every node of it, a leaf (one task), the root
(all tasks) and the groups between, learns a text prompt on its own tasks, Eq. (2), and a task is classified by the mean of
the classifiers of the nodes that contain it, Eq. (5). Nodes share nothing but the batch that their texts are encoded in.

    python hipro.py                                                             # built-in benchmark and backbone
    python hipro.py --data officehome --split 0.1 --seeds 1 2 3                 # Table 1
    python hipro.py --data cifar100 --download --split 0.04 --seeds 1 2 3       # Table 3 (Table 2: --data domainnet --split 0.01)
    python hipro.py --data officehome --split 0.1 --seeds 1 2 3 --grouping shared+individual    # Table 4, Shr+Ind
    python hipro.py --data officehome --split 0.1 --seeds 1 2 3 --grouping random       # ... random groups
    python hipro.py --data officehome --split 0.1 --seeds 1 2 3 --grouping tag  # ... the tree from TAG's affinity

Choices the paper leaves open
- A batch of 20 mixes the tasks: floor(20 / N) images from each and at least one. An epoch has as many steps as the union of
  the tasks needs at that batch; smaller tasks cycle.
- The 8 task-shared prompts that affinity is measured on train as long as the node prompts, with the same settings.
- A node's classifier is the unit-length text features; their mean is not normalised again. Images are unit length.
- Random groups are a tree of random affinities. The node prompts see the same batches whatever the grouping.
- TAG's affinity of i on j is 1 - L_j(after a step on i alone) / L_j (Fifty et al., NeurIPS 2021), made symmetric by the mean
  of both directions; taken at the same steps and prompts, with the current learning rate.
- SGD with momentum 0.9 and weight decay 5e-4 (Dassl's defaults), and a cosine that steps once an epoch, without warm-up.
- The image features of `--views` random views an image are computed once for both trainings (0: fresh views every epoch).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import common

PAPER = dict(                       # Sec. 4, "Training Details"
    clip="RN50",                    # "CLIP with ResNet-50 vision backbone as our default model"
    epochs=100,                     # "trained by the SGD optimizer for 100 epochs"
    lr=0.001,                       # "with a learning rate of 0.001 and the cosine decay scheduler"
    batch_size=20,                  # "Batch size is 20": of all tasks together
    n_ctx=16,                       # "Prompt with 16 tokens are randomly initialized with Gaussian distribution of 0.02"
    views=8,                        # ours
    min_crop=0.08,                  # Dassl's random resized crop
    grouping="tree")                # Sec. 3.3; the other values are Table 4's
TINY = dict(epochs=15, lr=0.03, batch_size=64, min_crop=0.6)        # as CoOp-MT's; tried on fxemoji
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # Dassl's defaults
SHARED_PROMPTS, EVERY = 8, 5        # "We estimate the inter-task affinity every 5 steps with 8 task-shared prompts"


# ------------------------------------------------------------------------------------------------------------- the tree

def task_tree(affinity):
    """The groups of a balanced task tree: all 2N-1 nodes as sorted tuples of task numbers, leaves first, root last (Sec. 3.3).

    affinity: [N, N], symmetric. "We iteratively find the two most similar clusters and merge them to form a new cluster. To
    construct a balanced tree, new clusters are temporarily excluded, and clustering continues. All excluded clusters are
    returned when the remaining clusters are less than 2."
    """
    d = torch.as_tensor(affinity).double().tolist()
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


def choose_nodes(args, affinity, seed):
    """The groups of tasks that get a prompt, as `--grouping` says."""
    n = len(affinity)
    if args.grouping == "shared+individual" and n > 1:
        return [(i,) for i in range(n)] + [tuple(range(n))]
    if args.grouping == "random":
        x = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
        affinity = x + x.t()
    return task_tree(affinity)


# -------------------------------------------------------------------------------------------------- prompts and losses

class NodePrompts(nn.Module):
    """One text prompt a node, and what came of the training: the nodes, the affinity, the tasks' classifiers."""

    def __init__(self, n_nodes, n_ctx, width, tasks, dim):
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(n_nodes, n_ctx, width))
        self.register_buffer("members", torch.zeros(n_nodes, len(tasks), dtype=torch.bool))
        self.register_buffer("affinity", torch.zeros(len(tasks), len(tasks)))
        for i, task in enumerate(tasks):
            self.register_buffer(f"classifier_{i}", torch.zeros(len(task.class_names), dim))    # Eq. (5), [K, D]

    def nodes(self):
        return [tuple(torch.where(row)[0].tolist()) for row in self.members]


def build(args, model, tasks):
    """The untrained prompts of all nodes."""
    n, (dim, width) = len(tasks), model.text_projection.t().shape
    n_nodes = n + 1 if args.grouping == "shared+individual" and n > 1 else 2 * n - 1
    return NodePrompts(n_nodes, args.n_ctx, width, tasks, dim).to(model.logit_scale.device)


class NodeTexts:
    """The texts of all nodes as one batch: each node with its tasks' class names; tasks with the same names share rows."""

    def __init__(self, tasks, nodes, n_ctx):
        names = [tuple(task.class_names) for task in tasks]
        first = [names.index(x) for x in names]                                 # the first task with the same names
        pairs = list(dict.fromkeys((m, first[i]) for m, node in enumerate(nodes) for i in node))
        self.place = {(m, i): pairs.index((m, first[i])) for m, node in enumerate(nodes) for i in node}
        self.node_of = [m for m, _ in pairs]
        self.turn = [names[:i].count(x) for i, x in enumerate(names)]           # a task's number among those with its names
        self.texts = common.Texts([tasks[i] for _, i in pairs], n_ctx, owners=list(range(len(pairs))))

    def encode(self, model, copies):
        """Text features [K, D] of every (node, class names) pair, from a prompt a pair, [pairs, b, d_l]."""
        return [x.float() for x in self.texts.encode(model, copies[None])]


def losses_of(model, texts, copies, batch):
    """{(node, task): mean cross-entropy}, Eq. (1), of all nodes from one pass through the text encoder.

    batch: (image features [b, D], labels [b]) a task.
    """
    with common.autocast(model):
        weights = texts.encode(model, copies)
    return {(m, i): F.cross_entropy(common.logits(model, batch[i][0], weights[place]), batch[i][1])
            for (m, i), place in texts.place.items()}


def epoch_of(args, tasks, views):
    """The batches of an epoch: (image features [b, D], labels [b]) a task; each image drawn shows one of its views."""
    sizes = [len(task.train) for task in tasks]
    batch_size = max(1, args.batch_size // len(tasks))
    for picks in common.epoch_batches(sizes, batch_size, steps=math.ceil(sum(sizes) / (batch_size * len(tasks)))):
        yield [(features[torch.randint(len(features), p.shape), p], labels[p]) for (features, labels), p in zip(views, picks)]


# ------------------------------------------------------------------------------------------------------------- affinity

def task_gradients(losses, texts, copies, n_nodes, n_tasks):
    """The gradient of every task's loss at every shared prompt, [n_nodes, N, P].

    Tasks with their own class names have their own copies of a prompt, so one backward pass tells their gradients apart;
    tasks that share texts take turns.
    """
    grads = copies.new_zeros(n_nodes, n_tasks, copies[0].numel())
    for turn in range(max(texts.turn) + 1):
        mine = {(m, i): loss for (m, i), loss in losses.items() if texts.turn[i] == turn}
        g = torch.autograd.grad(sum(mine.values()), copies, retain_graph=turn < max(texts.turn))[0].flatten(1)
        for m, i in mine:
            grads[m, i] = g[texts.place[m, i]]
    return grads


def gradient_affinity(grads):
    """The dot products of the tasks' gradients, Eq. (3), averaged over the shared prompts: [prompts, N, P] -> [N, N]."""
    return (grads @ grads.transpose(1, 2)).mean(0)


def tag_affinity(model, texts, vectors, grads, losses, batch, lr):
    """TAG's look-ahead affinity, symmetric and averaged over the shared prompts: [N, N]."""
    Z = grads.new_zeros(grads.shape[1], grads.shape[1])
    for i in range(len(Z)):
        with torch.no_grad():                                                   # every shared prompt takes a step on task i alone
            after = losses_of(model, texts, (vectors - lr * grads[:, i].view_as(vectors))[texts.node_of], batch)
            for (m, j), before in losses.items():
                Z[i, j] += (1 - after[m, j] / before) / len(vectors)
    return (Z + Z.t()) / 2


def measure_affinity(args, model, tasks, views_of, run, seed):
    """Train 8 task-shared prompts, each on all tasks, and average the affinity of every 5th step: [N, N]."""
    n, shared = len(tasks), nn.Module()
    shared.vectors = nn.Parameter(0.02 * torch.randn(SHARED_PROMPTS, args.n_ctx, model.text_projection.shape[0]))
    shared.register_buffer("total", torch.zeros(n, n))                          # of the snapshots
    shared.register_buffer("steps", torch.zeros(()))
    shared.to(model.logit_scale.device)
    texts = NodeTexts(tasks, [tuple(range(n))] * SHARED_PROMPTS, args.n_ctx)    # each on all tasks
    optimizer, schedule = optimizer_of(args, shared)
    start = run.restore(seed, prompts=shared, optimizer=optimizer, schedule=schedule)
    for epoch in common.progress(range(start, args.epochs), "affinity"):
        number = args.epochs + epoch                                            # other batches than the second phase's
        views, losses_seen = views_of(number), []
        common.seed_everything(seed, 2 * number + 1)
        for batch in epoch_of(args, tasks, views):
            copies = shared.vectors[texts.node_of]
            losses = losses_of(model, texts, copies, batch)
            if shared.steps % EVERY == 0:
                grads = task_gradients(losses, texts, copies, SHARED_PROMPTS, n)
                if args.grouping == "tag":
                    shared.total += tag_affinity(model, texts, shared.vectors, grads, losses, batch, optimizer.param_groups[0]["lr"])
                else:
                    shared.total += gradient_affinity(grads)
                shared.vectors.grad = grads.sum(1).view_as(shared.vectors)      # Eq. (2)
            else:
                shared.vectors.grad, = torch.autograd.grad(sum(losses.values()), shared.vectors)
            optimizer.step()
            shared.steps += 1
            losses_seen.append(sum(losses.values()).item() / len(losses))
        schedule.step()
        row = dict(phase="affinity", loss=sum(losses_seen) / len(losses_seen))
        run.checkpoint(seed, epoch + 1, row, prompts=shared, optimizer=optimizer, schedule=schedule)
    return shared.total / (shared.steps / EVERY).ceil()


# ------------------------------------------------------------------------------------------------------------- training

def optimizer_of(args, prompts):
    optimizer = torch.optim.SGD(prompts.parameters(), lr=args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)


def train(args, model, tasks, run, seed):
    """Measure the affinity, build the tree, and learn the prompts of all its nodes; returns them with the classifiers."""
    kept = {}

    def views_of(epoch):
        """(features [V, n, D], labels [n]) a task: the frozen encoder sees an image once, or in every epoch with `--views 0`."""
        number = 0 if args.views else epoch
        if number not in kept:
            kept.clear()
            common.seed_everything(seed, 2 * number)
            kept[number] = [common.view_features(model, task.train, args.views or 1, args.min_crop) for task in tasks]
        return kept[number]

    common.seed_everything(seed)
    first = args.epochs if args.grouping in ("tree", "tag") and len(tasks) > 1 else 0               # epochs of the first phase
    done, prompts = run.restore(seed), build(args, model, tasks)
    optimizer, schedule = optimizer_of(args, prompts)
    if done <= first:
        if first:
            prompts.affinity = measure_affinity(args, model, tasks, views_of, run, seed)
        for m, node in enumerate(choose_nodes(args, prompts.affinity, seed)):
            prompts.members[m, list(node)] = True
    else:
        run.restore(seed, prompts=prompts, optimizer=optimizer, schedule=schedule)
    tell_nodes(args, tasks, prompts.nodes())
    texts = NodeTexts(tasks, prompts.nodes(), args.n_ctx)
    for epoch in common.progress(range(max(done, first), first + args.epochs), "train"):
        views, losses_seen = views_of(epoch - first), []
        common.seed_everything(seed, 2 * (epoch - first) + 1)
        for batch in epoch_of(args, tasks, views):
            losses = losses_of(model, texts, prompts.vectors[texts.node_of], batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()                                     # Eq. (2): no term has two nodes' prompts in it
            optimizer.step()
            losses_seen.append(sum(losses.values()).item() / len(losses))
        schedule.step()
        row = dict(phase="training", loss=sum(losses_seen) / len(losses_seen))
        run.checkpoint(seed, epoch + 1, row, prompts=prompts, optimizer=optimizer, schedule=schedule)
    set_classifiers(model, tasks, prompts, texts)
    return prompts


# ------------------------------------------------------------------------------------------------------------ inference

def fuse(node_weights, nodes, task):
    """The classifier [K, D] of a task: the mean of its nodes' weights [M, K, D], Eq. (5)."""
    mine = [m for m, node in enumerate(nodes) if task in node]
    return node_weights[mine].mean(0)


@torch.no_grad()
def set_classifiers(model, tasks, prompts, texts):
    """Compute every task's classifier once, and keep it with the prompts."""
    features, nodes = texts.encode(model, prompts.vectors[texts.node_of]), prompts.nodes()
    for i in range(len(tasks)):
        classifier = getattr(prompts, f"classifier_{i}")
        weights = classifier.new_zeros(len(nodes), *classifier.shape)           # [M, K, D]
        for m, node in enumerate(nodes):
            if i in node:
                weights[m] = F.normalize(features[texts.place[m, i]], dim=-1)
        classifier.copy_(fuse(weights, nodes, i))


def score(args, model, preprocess, tasks, prompts):
    """Zero-shot CLIP's and the method's accuracy on every task, in per cent; the nodes, and the affinity if measured."""
    scores = dict(zero_shot=[], accuracy=[], nodes=[[tasks[i].name for i in node] for node in prompts.nodes()])
    for i, (task, plain) in enumerate(zip(tasks, common.zero_shot(model, tasks))):
        x, labels = common.image_features(model, task.test, preprocess)
        scores["zero_shot"].append(common.evaluate(model, preprocess, task, plain, features=(x, labels)))
        fused = model.logit_scale.exp() * F.normalize(x, dim=-1) @ getattr(prompts, f"classifier_{i}").t()  # [n, K]
        scores["accuracy"].append(common.per_cent_right(fused, labels, task.metric))
    measured = args.grouping in ("tree", "tag") and len(tasks) > 1
    return dict(scores, affinity=prompts.affinity.tolist()) if measured else scores


def check(args, tasks):
    """Classifiers are of their tasks: refuse to score them on others."""
    if args.eval and common.load_prompts(args.eval, "hipro")["tasks"] != {task.name: list(task.class_names) for task in tasks}:
        raise common.UserError(f"the classifiers in {args.eval} are of other tasks or classes than those of --data {args.data}: give the "
                               "--data they were trained on")


def tell_nodes(args, tasks, nodes):
    if len(tasks) == 1:
        return print("one task: there is no tree, only its own prompt")
    groups = [node for node in nodes if 1 < len(node) < len(tasks)]
    print(f"groups ({args.grouping}) between the leaves and the root:",
          "  ".join("[" + ", ".join(tasks[i].name for i in group) + "]" for group in groups) or "none", flush=True)


def main(argv=None):
    parser = common.arguments("hipro", __doc__, PAPER, TINY, batch="images of all tasks in a step")
    parser.add_argument("--grouping", choices=["tree", "shared+individual", "random", "tag"],
                        help="which groups of tasks get a prompt beside the tasks themselves (default tree)")
    args = common.parse(parser, argv)
    args.variant = None if args.grouping == "tree" else f"with --grouping {args.grouping}"
    common.run_seeds(args, build, train, score, n_text=args.n_ctx, check=check, plot=common.plot_tree)


if __name__ == "__main__":
    common.script(main)
