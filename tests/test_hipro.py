"""HiPro: the affinity, the tree, nodes that train together as if alone, and the classifiers."""

import itertools
import math

import pytest
import torch
from conftest import Phases, small_tasks

import common

hipro = common.load_method("hipro")


def settings(**changes):
    usual = dict(n_ctx=3, epochs=1, lr=0.1, batch_size=18, views=1, min_crop=0.6, workers=0)
    return hipro.Args(**dict(usual, **changes))


@pytest.fixture
def three():
    """Three tasks; the first and the last have the same class names."""
    tasks = small_tasks("a", "b", "c")
    tasks[1].class_names = ["tree", "house", "very long name"]
    return tasks


def rare():
    """A task with 6 images and one with a single image."""
    tasks = small_tasks("a", "b")
    tasks[1].train = tasks[1].train.subset([0])
    return tasks


def symmetric(n, seed):
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return x + x.t()


class Watched(Phases):
    """Phases that call `look(parts)` after every step."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def log(self, **values):
        super().log(**values)
        self.look(self.parts)


@pytest.fixture
def drawn(monkeypatch):
    """The batches of a training run, in order."""
    seen, batches = [], common.batches

    def spy(*given, **how):
        for batch in batches(*given, **how):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(common, "batches", spy)
    return seen


# -------------------------------------------------------------------------- Eq. (4) and the tree

def slow_tree(affinity):
    """The paper's algorithm word by word, on frozensets, with means over explicit pairs."""
    n = len(affinity)
    remaining, waiting = {frozenset([i]) for i in range(n)}, set()
    tree = [frozenset([i]) for i in range(n)]
    while True:
        if len(remaining) < 2:
            remaining, waiting = remaining | waiting, set()
            if len(remaining) == 1:
                return tree
        similar = {}
        for a, b in itertools.combinations(remaining, 2):
            pairs = [float(affinity[i][j]) for i, j in itertools.product(a, b)]
            similar[a, b] = math.fsum(pairs) / len(pairs)
        a, b = max(similar, key=similar.get)
        remaining -= {a, b}
        waiting.add(a | b)
        tree.append(a | b)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 12, 20])
def test_the_tree_equals_an_independent_slow_version(n):
    for seed in range(3):
        affinity = symmetric(n, seed)
        nodes = hipro.task_tree(affinity)
        assert nodes == [tuple(sorted(group)) for group in slow_tree(affinity)]
        assert len(nodes) == 2 * n - 1


def test_a_new_cluster_waits_where_plain_average_linkage_would_merge_it():
    """Plain linkage merges 0-1, then adds 2 (mean 5 > 1); here 0-1 waits, so 2 and 3 merge."""
    d = torch.tensor([[0.0, 9, 5, 0], [9, 0, 5, 0], [5, 5, 0, 1], [0, 0, 1, 0]])
    assert hipro.task_tree(d) == [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)]


# ---------------------------------------------------------------------------- Eq. (1), (2), (3)

def one_loss(model, task, vectors, x, y):
    """Eq. (1) for one prompt on one task alone: the mean over its images, 0 without images."""
    w = common.encode_text(model, common.tokenize(task.class_names, len(vectors)), vectors[None])
    cosine = (x[:, None] * w).sum(-1) / x.norm(dim=-1)[:, None] / w.norm(dim=-1)
    p = (model.logit_scale.exp() * cosine).softmax(dim=-1)
    loss = 0 * vectors.sum()
    for i in range(len(y)):
        loss = loss - p[i, y[i]].log() / len(y)
    return loss


def losses_of(model, tasks, batch, vectors):
    """Eq. (1) for every task in a batch."""
    x, y, task = batch
    return [one_loss(model, one, vectors, x[task == t], y[task == t])
            for t, one in enumerate(tasks)]


def is_one_step(after, before, gradient):
    """v <- v - lr (gradient + 5e-4 v)"""
    expected = before - 0.1 * (gradient + 5e-4 * before)
    return (after - expected).abs().max() < 1e-5 * max(1, gradient.abs().max())


def test_the_first_step_descends_on_eq_2_of_every_node(small, three, drawn):
    """The gradient of the sum of L_T over the node's tasks; the log has each task's mean over its
    nodes."""
    run = Phases()
    trained = hipro.train(settings(grouping="random", batch_size=30), small, three, run)
    run.seed_phase("train")
    by_task = [[], [], []]
    for node, after in zip(trained.nodes(), trained.vectors):
        v = (0.02 * torch.randn(3, 64)).requires_grad_()
        losses = losses_of(small, three, drawn[0], v)
        (gradient,) = torch.autograd.grad(sum(losses[i] for i in node), v)
        assert is_one_step(after, v, gradient) and (after - v).abs().max() > 1e-3
        for i in node:
            by_task[i].append(losses[i].item())
    [logged] = run.logged
    assert logged["loss"].item() == pytest.approx(sum(map(sum, by_task)), rel=1e-5)
    means = [sum(values) / len(values) for values in by_task]
    assert logged["losses"].tolist() == pytest.approx(means, rel=1e-5)


def test_every_shared_prompt_descends_on_all_tasks(small, three, drawn):
    run = Phases()
    hipro.measure_affinity(settings(), small, three, run)
    run.seed_phase("affinity")
    trained = run.parts["affinity"]["shared"].vectors
    for after, v in zip(trained, 0.02 * torch.randn(8, 3, 64), strict=True):
        v.requires_grad_()
        (gradient,) = torch.autograd.grad(sum(losses_of(small, three, drawn[0], v)), v)
        assert is_one_step(after, v, gradient)


def test_tasks_with_the_same_class_names_share_rows_within_a_node(three):
    texts = hipro.node_texts(settings(), three, [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
    assert texts.sets.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 6


def snapshot_of(model, tasks, batch, vectors, lr=0.05):
    """A snapshot by hand, prompt by prompt and task by task: the dot products of Eq. (3), and TAG's
    1 - L_j(after a step on i alone) / L_j, symmetric."""
    N = len(tasks)
    D, Z = torch.zeros(N, N), torch.zeros(N, N)
    for v in vectors:
        v = v.detach().requires_grad_()
        before = losses_of(model, tasks, batch, v)
        grads = [torch.autograd.grad(loss, v, retain_graph=True)[0] for loss in before]
        after = [losses_of(model, tasks, batch, v - lr * g) for g in grads]
        for i, j in itertools.product(range(N), repeat=2):
            D[i, j] += (grads[i] * grads[j]).sum() / len(vectors)
            if grads[i].any() and grads[j].any():
                Z[i, j] += (1 - after[i][j] / before[j]).detach() / len(vectors)
    return D, (Z + Z.t()) / 2


@pytest.mark.parametrize("grouping", ["tree", "tag"])
def test_the_affinity_is_that_of_one_gradient_per_task(small, three, drawn, grouping):
    """One step, so one snapshot, at the 8 initial prompts, with the learning rate of that step."""
    run = Phases()
    affinity = hipro.measure_affinity(settings(grouping=grouping, lr=0.05), small, three, run)
    run.seed_phase("affinity")
    D, Z = snapshot_of(small, three, drawn[0], 0.02 * torch.randn(8, 3, 64))
    expected = D if grouping == "tree" else Z
    assert (affinity - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (affinity - affinity.t()).abs().max() < 1e-5 * expected.abs().max()


def test_snapshots_are_taken_every_fifth_step_and_averaged(small, three, monkeypatch):
    """11 steps, one per epoch: snapshots at 0, 5 and 10, which do not change the steps."""
    assert hipro.EVERY == 5
    seen, exact = [], hipro.gradient_affinity
    monkeypatch.setattr(hipro, "gradient_affinity", lambda g: seen.append(exact(g)) or seen[-1])
    run, other = Phases(), Phases()
    affinity = hipro.measure_affinity(settings(epochs=11, lr=0.01), small, three, run)
    assert len(run.logged) == 11 and len(seen) == 3
    assert torch.allclose(affinity, sum(seen) / 3, rtol=1e-4)
    monkeypatch.setattr(hipro, "EVERY", 10**6)
    hipro.measure_affinity(settings(epochs=11, lr=0.01, grouping="tag"), small, three, other)
    for one, same in zip(run.logged, other.logged):
        assert one["loss"].item() == pytest.approx(same["loss"].item(), rel=1e-4)


def test_a_pair_is_averaged_over_the_snapshots_with_both_tasks(small, drawn, monkeypatch):
    """Task b has one image and batches have two: it is in one step of four. Every step is a
    snapshot."""
    monkeypatch.setattr(hipro, "EVERY", 1)
    tasks, vectors = rare(), []
    run = Watched(lambda parts: vectors.append(parts["affinity"]["shared"].vectors.detach() + 0))
    args = settings(batch_size=2, epochs=2, lr=1e-3, grouping="tag")
    affinity = hipro.measure_affinity(args, small, tasks, run)
    run.seed_phase("affinity")
    before = [0.02 * torch.randn(8, 3, 64), *vectors]
    rates = [1e-3] * 4 + [5e-4] * 4             # a cosine over two epochs
    found, counts = torch.zeros(2, 2), torch.zeros(2, 2)
    for batch, start, rate in zip(drawn, before, rates):
        found += snapshot_of(small, tasks, batch, start, rate)[1]
        here = torch.tensor([t in batch[2] for t in (0, 1)])
        counts += here[:, None] & here
    assert len(drawn) == 8 and counts[1, 1] == 2
    expected = found / counts.clamp(min=1)
    assert (affinity - expected).abs().max() < 1e-3 * expected.abs().max()


# ----------------------------------------------------------------------------------- mixed batches


def test_a_node_without_images_keeps_its_prompt_and_its_momentum(small, drawn):
    """Task b is in one step of four. Its leaf ends where SGD on only the steps with b takes it."""
    states = []

    def look(parts):
        prompts, momentum = parts["train"]["prompts"], parts["train"]["optimizer"].state
        states.append([(v.detach().clone(), v.grad is not None,
                        momentum.get(v, {}).get("momentum_buffer", torch.zeros(())).clone())
                       for v in prompts.vectors])

    run, tasks = Watched(look), rare()
    args = settings(grouping="shared+individual", batch_size=2, epochs=3, lr=0.02)
    trained = hipro.train(args, small, tasks, run)
    assert len(drawn) == 12 and trained.nodes() == [(0,), (1,), (0, 1)]
    run.seed_phase("train")
    start = [0.02 * torch.randn(3, 64) for _ in range(3)]
    v, buffer, held = start[1], 0, 0
    earlier = [(vectors, False, torch.zeros(())) for vectors in start]
    for k, (batch, state) in enumerate(zip(drawn, states)):
        for node, before, after in zip(trained.nodes(), earlier, state):
            present = any(i in batch[2] for i in node)
            assert after[1] == present == (not torch.equal(after[0], before[0]))
            assert present or torch.equal(after[2], before[2])
            held += not present
        if 1 in batch[2]:                               # torch.optim.SGD by hand
            v.requires_grad_()
            (gradient,) = torch.autograd.grad(losses_of(small, tasks, batch, v)[1], v)
            buffer = 0.9 * buffer + gradient + 5e-4 * v.detach()
            v = v.detach() - 0.02 * (1 + math.cos(math.pi * (k // 4) / 3)) / 2 * buffer
        earlier = state
    assert held >= 9
    assert (trained.vectors[1] - v).abs().max() < 1e-4 * (v - start[1]).abs().max()


# --------------------------------------------------------------------------------- whole trainings

def test_nodes_do_not_influence_each_other(small):
    """The leaves of three groupings end at the same prompts."""
    tasks, ends = small_tasks("a", "b", "c"), []
    for grouping in ("shared+individual", "random", "tree"):
        args = settings(grouping=grouping, epochs=3, lr=0.02, batch_size=5)
        leaves = hipro.train(args, small, tasks, Phases()).vectors[:3]
        ends.append(torch.stack(list(leaves)).detach())
    for other in ends[1:]:
        assert (ends[0] - other).abs().max() < 1e-5


@pytest.mark.parametrize("grouping, n", [("tree", 5), ("tag", 5), ("random", 5),
                                         ("shared+individual", 4), ("tag-groups", 2)])
def test_every_grouping_has_its_nodes(small, three, grouping, n):
    prompts = hipro.train(settings(grouping=grouping, epochs=2, lr=0.003), small, three, Phases())
    nodes = prompts.nodes()
    assert len(nodes) == len(prompts.vectors) == n
    if grouping == "tag-groups":
        assert sorted(sum(nodes, ())) == [0, 1, 2]
        assert nodes == [tuple(g) for g in hipro.group_tasks(prompts.affinity, 2)]
    else:
        assert nodes[-1] == (0, 1, 2)
        assert nodes[:3] == [(0,), (1,), (2,)]
    assert prompts.affinity.any() == (grouping in ("tree", "tag", "tag-groups"))


def test_a_random_tree_depends_on_its_seed():
    def tree(seed):
        return hipro.choose_nodes(settings(grouping="random", seeds=(seed,)), torch.zeros(8, 8))

    assert tree(1) == tree(1) != tree(2)


def test_one_task_trains_its_one_prompt(small, capsys):
    prompts = hipro.train(settings(), small, small_tasks("a"), Phases())
    assert prompts.nodes() == [(0,)] and len(prompts.vectors) == 1
    assert "one task" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- Eq. (5)


@pytest.mark.parametrize("grouping", ["random", "tag-groups"])
def test_a_classifier_is_the_mean_of_the_nodes_unit_length_text_features(small, three, grouping):
    """The mean is not normalised again, so it is shorter than 1 if a task has several nodes."""
    args = settings(grouping=grouping)
    prompts = hipro.train(args, small, three, Phases())
    for i, found in enumerate(hipro.classify(args, small, three, prompts)["classifiers"]):
        mine = []
        for node, v in zip(prompts.nodes(), prompts.vectors):
            if i in node:
                w = common.encode_text(small, common.tokenize(three[i].class_names, 3), v[None])
                mine.append(w / w.norm(dim=-1, keepdim=True))
        assert (found - sum(mine) / len(mine)).abs().max() < 1e-5
        shorter = (found.norm(dim=-1) < 1 - 1e-4).all()
        assert shorter == (grouping == "random") == (len(mine) > 1)


def test_images_are_classified_without_normalising_the_classifier(small):
    """The class with the longest vector wins, which cosines would not allow."""
    [task] = small_tasks("a")
    x, _, _ = common.image_features(small, task.test)
    mean = torch.nn.functional.normalize(x, dim=-1).mean(0)
    classifiers = [torch.stack([3 * mean, mean, mean])]
    scores = common.evaluate(settings(), small, [task], classifiers)
    assert scores["accuracy"] == [pytest.approx(100 / 3)]
