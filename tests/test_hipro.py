"""HiPro: the affinity, the tree, nodes that train side by side as if alone, and the classifiers."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import RN50, Phases, noise, numbers, random_clip, run_script, small_tasks

import common

hipro = common.load_method("hipro")


def settings(**changes):
    usual = dict(
        n_ctx=3, epochs=1, lr=0.1, batch_size=18, views=1, min_crop=0.6, seeds=(1,), workers=0
    )
    return hipro.Args(**dict(usual, **changes))


@pytest.fixture
def three():
    """Three tasks; the first and the last have the same class names."""
    tasks = small_tasks("a", "b", "c")
    tasks[1].class_names = ["tree", "house", "very long name"]
    return tasks


def rare(n=1):
    """Two tasks of 6 and of n images."""
    tasks = small_tasks("a", "b")
    tasks[1].train = tasks[1].train.subset(range(n))
    return tasks


def symmetric(n, seed):
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return x + x.t()


class Watched(Phases):
    """Phases that call `look(phase)` after every step."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def log(self, **values):
        super().log(**values)
        self.look(self.parts)


@pytest.fixture
def drawn(monkeypatch):
    """The batches that a training draws, in order."""
    seen, batches = [], common.batches

    def spy(*given, **how):
        for batch in batches(*given, **how):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(common, "batches", spy)
    return seen


# ------------------------------------------------------------------------- Eq. (4) and the tree


def slow_tree(affinity):
    """The paper's words as a list of states, on frozensets, with means over explicit pairs."""
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


@pytest.mark.parametrize("n", range(2, 21))
def test_the_tree_equals_an_independent_slow_version(n):
    for seed in range(3):
        affinity = symmetric(n, seed)
        nodes = hipro.task_tree(affinity)
        assert nodes == [tuple(sorted(group)) for group in slow_tree(affinity)]
        assert len(nodes) == 2 * n - 1
        assert nodes[:n] == [(i,) for i in range(n)] and nodes[-1] == tuple(range(n))


def test_a_tree_drawn_by_hand():
    """0-1 are closest, then 3-4 among the rest; 2 is left over, all return, and 2 joins the pair
    that it is nearer to on average."""
    d = [[0, 9, 4, 0, 0], [9, 0, 0, 0, 0], [4, 0, 0, 3, 2], [0, 0, 3, 0, 8], [0, 0, 2, 8, 0]]
    leaves = [(0,), (1,), (2,), (3,), (4,)]
    assert hipro.task_tree(torch.tensor(d)) == [*leaves, (0, 1), (3, 4), (2, 3, 4), (0, 1, 2, 3, 4)]


def test_a_new_cluster_sits_out_where_plain_average_linkage_would_take_it():
    """Plain linkage chains 0-1, then 2 onto it (mean 5 > 1); here 0-1 waits, so 2 and 3 merge."""
    d = torch.tensor([[0.0, 9, 5, 0], [9, 0, 5, 0], [5, 5, 0, 1], [0, 0, 1, 0]])
    assert hipro.task_tree(d) == [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)]


def test_one_and_two_tasks():
    assert hipro.task_tree(torch.zeros(1, 1)) == [(0,)]
    assert hipro.task_tree(torch.zeros(2, 2)) == [(0,), (1,), (0, 1)]


def test_twenty_tasks_of_five_families_are_recovered():
    """Four tasks a family; gradients are a family's direction plus as much noise again."""
    generator = torch.Generator().manual_seed(0)
    family = torch.randn(5, 400, generator=generator)
    for _ in range(5):
        order = torch.randperm(20, generator=generator)
        grads = family[order % 5] + torch.randn(20, 400, generator=generator)
        affinity = hipro.gradient_affinity(grads[None])
        families = [torch.where(order % 5 == f)[0].tolist() for f in range(5)]
        assert {tuple(group) for group in families} <= set(hipro.task_tree(affinity))
        assert hipro.group_tasks(affinity, 5) == sorted(families)


def test_affinity_is_not_changed_by_the_tree():
    d = symmetric(6, 0)
    before = d.clone()
    hipro.task_tree(d)
    assert torch.equal(d, before)


def test_group_affinity_is_the_mean_over_pairs():
    assert hipro.group_affinity([[0, 1, 2], [1, 0, 6], [2, 6, 0]], (0, 1), (2,)) == 4


# ----------------------------------------------------------------------------- groups of TAG


def test_groups_by_hand():
    """Together: (1+2 + 1-4 + 2-4) / 2 = -1; {0,1},{2}: 2; {0,2},{1}: 4."""
    d = torch.tensor([[7.0, 1, 2], [1, 7, -4], [2, -4, 7]])
    assert hipro.group_tasks(d, 2) == [[0, 2], [1]]
    assert hipro.group_tasks(d, 1) == [[0, 1, 2]]


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_groups_are_the_best_of_all_labellings(n):
    """Brute force over labels instead of partitions."""
    for seed in range(3):
        d, best = symmetric(n, seed), -math.inf
        for labels in itertools.product(range(2), repeat=n):
            total = 0.0
            for i in range(n):
                others = [d[i, j].item() for j in range(n) if j != i and labels[j] == labels[i]]
                total += sum(others) / max(len(others), 1)
            best = max(best, total)
        groups, total = hipro.group_tasks(d, 2), 0.0
        for group in groups:
            for i in group:
                others = [d[i, j].item() for j in group if j != i]
                total += sum(others) / max(len(others), 1)
        assert sorted(i for group in groups for i in group) == list(range(n)) and len(groups) <= 2
        assert total == pytest.approx(best, rel=1e-5)


def test_groups_are_those_of_mmap():
    """The ten lines that both files have are the same method."""
    mmap = common.load_method("mmap")
    for n, seed in itertools.product((3, 7, 14), range(3)):
        d = symmetric(n, seed)
        assert hipro.group_tasks(d, 3) == mmap.group_tasks(d, 3)


# -------------------------------------------------------------------------- Eq. (1), (2), (3)


def one_loss(model, task, vectors, x, y):
    """Eq. (1) for one prompt on one task, by itself: the mean over its images, 0 without any."""
    w = common.encode_text(model, common.tokenize(task.class_names, len(vectors)), vectors[None])
    cosine = (x[:, None] * w).sum(-1) / x.norm(dim=-1)[:, None] / w.norm(dim=-1)
    p = (model.logit_scale.exp() * cosine).softmax(dim=-1)
    return sum((-p[i, y[i]].log() for i in range(len(y))), 0 * vectors.sum()) / max(len(y), 1)


def parts(batch):
    """(features, labels) of every task of a batch of three tasks."""
    x, labels, task = batch
    return [(x[task == t], labels[task == t]) for t in range(3)]


def test_the_first_step_descends_on_eq_2_of_every_node(small, three, drawn):
    """v <- v - lr (sum over the node's tasks of the gradient of L_T + 5e-4 v), node by node."""
    run = Phases()
    trained = hipro.train(settings(grouping="random", batch_size=30), small, three, run)
    nodes, [batch] = trained.nodes(), drawn
    run.seed_phase("train")
    by_task = [[], [], []]
    for m, node in enumerate(nodes):
        v = (0.02 * torch.randn(3, 64)).requires_grad_()
        losses = [one_loss(small, three[i], v, *parts(batch)[i]) for i in node]
        (gradient,) = torch.autograd.grad(sum(losses), v)
        expected = v - 0.1 * (gradient + 5e-4 * v)
        assert (trained.vectors[m] - expected).abs().max() < 1e-5 * max(1, gradient.abs().max())
        assert (trained.vectors[m] - v).abs().max() > 1e-3
        for i, loss in zip(node, losses):
            by_task[i].append(loss.item())
    logged = run.logged[0]
    assert logged["loss"].item() == pytest.approx(sum(map(sum, by_task)), rel=1e-5)
    means = [sum(values) / len(values) for values in by_task]
    assert logged["losses"].tolist() == pytest.approx(means, rel=1e-5)


def test_tasks_with_the_same_class_names_share_rows_within_a_node(three):
    texts = hipro.node_texts(settings(), three, [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
    assert len(texts.tokens) == 3 * (1 + 1 + 1 + 1 + 2)
    assert texts.sets.tolist() == [m for m, n in enumerate((1, 1, 1, 1, 2)) for _ in range(3 * n)]


def snapshot_of(model, tasks, batch, vectors, lr=0.05):
    """One step at lr 0 with a snapshot in it, Eq. (3) and TAG's, by hand: two [N, N] matrices."""
    N = len(tasks)
    own = [(batch[0][batch[2] == t], batch[1][batch[2] == t]) for t in range(N)]
    Z, D = torch.zeros(N, N), torch.zeros(N, N)
    for v in vectors:
        v = v.detach().requires_grad_()
        before = [one_loss(model, task, v, *own[t]) for t, task in enumerate(tasks)]
        grads = [torch.autograd.grad(loss, v)[0] for loss in before]
        for i, j in itertools.product(range(N), repeat=2):
            D[i, j] += (grads[i] * grads[j]).sum() / len(vectors)
            if len(own[i][1]) and len(own[j][1]):
                after = one_loss(model, tasks[j], v - lr * grads[i], *own[j])
                Z[i, j] += (1 - after / before[j]).detach() / len(vectors)
    return D, (Z + Z.t()) / 2


@pytest.mark.parametrize("grouping", ["tree", "tag", "tag-groups"])
def test_the_affinity_is_that_of_the_gradients_of_autograd(small, three, drawn, grouping):
    """One step, so one snapshot, at the 8 prompts as they start; the learning rate of its step."""
    run = Phases()
    affinity = hipro.measure_affinity(settings(grouping=grouping, lr=0.05), small, three, run)
    run.seed_phase("affinity")
    start = 0.02 * torch.randn(8, 3, 64)
    D, Z = snapshot_of(small, three, drawn[0], start)
    expected = D if grouping == "tree" else Z
    assert (affinity - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (affinity - affinity.t()).abs().max() < 1e-5 * expected.abs().max()


def test_every_shared_prompt_descends_on_all_tasks(small, three, drawn):
    run = Phases()
    hipro.measure_affinity(settings(), small, three, run)
    trained = run.parts["affinity"]["shared"].vectors
    run.seed_phase("affinity")
    start = 0.02 * torch.randn(8, 3, 64)
    for m in range(8):
        v = start[m].clone().requires_grad_()
        losses = [one_loss(small, three[i], v, *parts(drawn[0])[i]) for i in range(3)]
        (gradient,) = torch.autograd.grad(sum(losses), v)
        expected = v - 0.1 * (gradient + 5e-4 * v)
        assert (trained[m] - expected).abs().max() < 1e-5 * max(1, gradient.abs().max())


@pytest.mark.parametrize("every", [1, 5])
def test_snapshots_are_taken_every_fifth_step_and_averaged(small, three, monkeypatch, every):
    """11 steps, one an epoch: at 0, 5 and 10. The steps are those of a training with a snapshot in
    each of them, and the same views are seen whichever affinity is wanted."""
    seen, exact = [], hipro.gradient_affinity
    monkeypatch.setattr(hipro, "gradient_affinity", lambda g: seen.append(exact(g)) or seen[-1])
    monkeypatch.setattr(hipro, "EVERY", every)
    run = Phases()
    affinity = hipro.measure_affinity(settings(epochs=11, lr=0.01), small, three, run)
    assert len(run.logged) == 11 and len(seen) == (11 if every == 1 else 3)
    assert torch.allclose(affinity, sum(seen) / len(seen), rtol=1e-4)
    other = Phases()
    monkeypatch.setattr(hipro, "EVERY", 10**6)
    hipro.measure_affinity(settings(epochs=11, lr=0.01, grouping="tag"), small, three, other)
    for a, b in zip(run.logged, other.logged):
        assert a["loss"].item() == pytest.approx(b["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("grouping", ["tree", "tag"])
def test_a_pair_is_averaged_over_the_snapshots_with_both_tasks(small, drawn, monkeypatch, grouping):
    """Task b has one image and batches have two: it is in one step of four, all snapshots."""
    monkeypatch.setattr(hipro, "EVERY", 1)
    tasks, vectors = rare(), []
    run = Watched(lambda parts: vectors.append(parts["affinity"]["shared"].vectors.detach() + 0))
    args = settings(batch_size=2, epochs=2, lr=1e-3, grouping=grouping)
    affinity = hipro.measure_affinity(args, small, tasks, run)
    counts = run.parts["affinity"]["shared"].snapshots
    both = [k for k, (_, _, task) in enumerate(drawn) if len(task.unique()) == 2]
    alone = sum(1 in task for _, _, task in drawn)
    assert len(drawn) == 8 and alone == 2
    assert counts[0, 1] == counts[1, 0] == len(both) and counts[1, 1] == 2
    run.seed_phase("affinity")
    before = [0.02 * torch.randn(8, 3, 64), *vectors]
    rates = [1e-3] * 4 + [5e-4] * 4  # a cosine over two epochs
    found = torch.zeros(2, 2)
    for k in range(8):
        found += snapshot_of(small, tasks, drawn[k], before[k], rates[k])[grouping == "tag"]
    expected = found / counts.clamp(min=1)
    assert (affinity - expected).abs().max() < 1e-3 * expected.abs().max()


# --------------------------------------------------------------------------------- mixed batches


def test_mixed_batches_are_the_default_and_show_every_image_once(small):
    tasks = small_tasks(*"abcde")
    for t, n in enumerate([90, 90, 90, 90, 3]):
        images = tasks[t].train
        items, labels = [k % 6 + 10 * t for k in range(n)], [k % 3 for k in range(n)]
        tasks[t].train = common.Images(items, labels, images.read)
    args = hipro.Args(views=1, seeds=(1,), workers=0)
    common.seed_everything(1)
    batches = list(common.batches(args, small, tasks, frozen=True))
    assert args.batches == "mixed" and args.batch_size == 20
    assert len(batches) == math.ceil(363 / 20)
    assert all(len(task) == 20 for _, _, task in batches[:-1])
    shown = torch.cat([task for _, _, task in batches])
    assert shown.bincount().tolist() == [90, 90, 90, 90, 3]
    labels = torch.cat([labels for _, labels, _ in batches])
    assert labels[shown == 0].bincount().tolist() == [30, 30, 30]


def test_a_node_without_images_keeps_its_prompt_and_its_momentum(small, drawn):
    """Task b is in one step of four. Its leaf ends where SGD on the steps with b alone takes it."""
    states = []

    def look(parts):
        prompts, optimizer = parts["train"]["prompts"], parts["train"]["optimizer"]
        states.append(
            [
                (
                    v.detach().clone(),
                    None if v.grad is None else v.grad.clone(),
                    optimizer.state.get(v, {}).get("momentum_buffer", torch.zeros(())).clone(),
                )
                for v in prompts.vectors
            ]
        )

    run = Watched(look)
    args = settings(grouping="shared+individual", batch_size=2, epochs=3, lr=0.02)
    tasks = rare()
    trained = hipro.train(args, small, tasks, run)
    assert len(drawn) == 12 and trained.nodes() == [(0,), (1,), (0, 1)]
    run.seed_phase("train")
    start = [0.02 * torch.randn(3, 64) for _ in range(3)]
    v, buffer, rate = start[1].clone(), None, None
    held = 0
    for k, (x, labels, task) in enumerate(drawn):
        before = [(s, None, torch.zeros(())) for s in start] if k == 0 else states[k - 1]
        for m, node in enumerate([(0,), (1,), (0, 1)]):
            present = any(i in task for i in node)
            now, gradient, momentum = states[k][m]
            assert torch.equal(now, before[m][0]) == (not present)
            assert (gradient is None) == (not present)
            if not present:
                held += 1
                assert torch.equal(momentum, before[m][2])
        if 1 in task:  # torch.optim.SGD by hand
            rate = 0.02 * (1 + math.cos(math.pi * (k // 4) / 3)) / 2
            v.requires_grad_()
            (gradient,) = torch.autograd.grad(
                one_loss(small, tasks[1], v, x[task == 1], labels[task == 1]), v
            )
            step = (gradient + 5e-4 * v).detach()
            buffer = step if buffer is None else 0.9 * buffer + step
            v = (v - rate * buffer).detach()
    assert held >= 9
    assert (trained.vectors[1] - v).abs().max() < 1e-4 * (v - start[1]).abs().max()


def test_a_task_without_images_adds_nothing_to_its_nodes(small, drawn):
    """The root's gradient in a step without b is that of task a alone."""
    grads = []
    run = Watched(
        lambda parts: grads.append(
            [None if v.grad is None else v.grad.clone() for v in parts["train"]["prompts"].vectors]
        )
    )
    args, tasks = settings(grouping="shared+individual", batch_size=2, lr=1e-9), rare()
    hipro.train(args, small, tasks, run)
    run.seed_phase("train")
    root = [0.02 * torch.randn(3, 64) for _ in range(3)][2].requires_grad_()
    for (x, labels, task), (_, _, found) in zip(drawn, grads):
        losses = [one_loss(small, tasks[t], root, x[task == t], labels[task == t]) for t in (0, 1)]
        (gradient,) = torch.autograd.grad(sum(losses), root)
        assert (found - gradient).abs().max() < 1e-4 * gradient.abs().max()


# ----------------------------------------------------------------------------- whole trainings


def test_nodes_do_not_influence_each_other(small):
    """The leaves of three groupings end at the same prompts."""
    tasks, ends = small_tasks("a", "b", "c"), []
    for grouping in ("shared+individual", "random", "tree"):
        args = settings(grouping=grouping, epochs=3, lr=0.02, batch_size=5)
        leaves = hipro.train(args, small, tasks, Phases()).vectors[:3]
        ends.append(torch.stack(list(leaves)).detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-5 and (ends[0] - ends[2]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "grouping, n",
    [("tree", 5), ("tag", 5), ("random", 5), ("shared+individual", 4), ("tag-groups", 2)],
)
def test_every_grouping_trains(small, three, grouping, n):
    run = Phases()
    args = settings(grouping=grouping, epochs=20, lr=0.003)
    prompts = hipro.train(args, small, three, run)
    nodes = prompts.nodes()
    assert len(nodes) == len(prompts.vectors) == n
    if grouping == "tag-groups":
        assert sorted(i for node in nodes for i in node) == [0, 1, 2]
        assert nodes == [tuple(g) for g in hipro.group_tasks(prompts.affinity, 2)]
    else:
        assert nodes[-1] == (0, 1, 2) and nodes[:3] == [(0,), (1,), (2,)]
    assert (prompts.affinity.abs().max() > 0) == (grouping in ("tree", "tag", "tag-groups"))
    train = run.logged[-20:]
    assert train[-1]["loss"] < 0.7 * train[0]["loss"]


def test_every_grouping_sees_the_same_views(small, drawn):
    shown = []
    for grouping in ("tree", "tag-groups", "random"):
        args = settings(grouping=grouping, epochs=2, lr=0.01, batch_size=5)
        hipro.train(args, small, small_tasks("a", "b", "c"), Phases())
        shown.append(drawn[:])
        drawn.clear()
    whole, tag, random = shown
    assert len(whole) == len(tag) == 2 * len(random) == 2 * 2 * 4
    assert all(torch.equal(a, b) for one, two in zip(whole, tag) for a, b in zip(one, two))
    assert all(torch.equal(a, b) for one, two in zip(whole[8:], random) for a, b in zip(one, two))


def test_one_task_trains_its_one_prompt(small, capsys):
    prompts = hipro.train(settings(), small, small_tasks("a"), Phases())
    assert prompts.nodes() == [(0,)] and len(prompts.vectors) == 1
    assert "one task" in capsys.readouterr().out


def test_saved_prompts_come_back_without_making_those_in_use_anew():
    """An optimizer that holds the parameters goes on with them after a restore."""
    prompts, other = hipro.NodePrompts(2, 3, 64), hipro.NodePrompts(2, 3, 64)
    prompts.set_nodes([(0,), (1,), (0, 1)])
    other.load_state_dict(prompts.state_dict())
    assert other.nodes() == [(0,), (1,), (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(prompts.vectors, other.vectors))
    held = list(other.vectors)
    other.load_state_dict(prompts.state_dict())
    assert all(a is b for a, b in zip(held, other.vectors))


# -------------------------------------------------------------------------------------- Eq. (5)


def test_fuse_by_hand():
    weights = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 5.0]]])
    assert hipro.fuse(weights, [(0,), (1,), (0, 1)], 0).tolist() == [[2.0, 2.5]]
    assert hipro.fuse(weights, [(0,), (1,), (0, 1)], 1).tolist() == [[1.5, 3.0]]


@pytest.mark.parametrize("grouping", ["random", "tag-groups"])
def test_a_classifier_is_the_mean_of_the_nodes_unit_length_text_features(small, three, grouping):
    args = settings(grouping=grouping)
    prompts = hipro.train(args, small, three, Phases())
    for i, found in enumerate(hipro.classifiers_of(args, small, three, prompts)):
        total, count = 0, 0
        for node, v in zip(prompts.nodes(), prompts.vectors):
            if i in node:
                w = common.encode_text(small, common.tokenize(three[i].class_names, 3), v[None])
                total, count = total + w / w.norm(dim=-1, keepdim=True), count + 1
        assert (found - total / count).abs().max() < 1e-5
        short = (found.norm(dim=-1) < 1 - 1e-4).all()  # not normalised again
        assert short == (grouping == "random") == (count > 1)


def test_images_are_told_apart_by_the_classifier_as_it_is(small, monkeypatch):
    """A classifier whose first class is long wins, which cosines would not allow."""
    [task] = small_tasks("a")
    prompts = hipro.build(settings(), small, [task])
    prompts.set_nodes([(0,)])
    x, _, _ = common.image_features(small, task.test)
    mean = F.normalize(x, dim=-1).mean(0)
    monkeypatch.setattr(hipro, "classifiers_of", lambda *_: [torch.stack([3 * mean, mean, mean])])
    scores = hipro.score(settings(grouping="random"), small, [task], prompts)
    assert scores["accuracy"] == [pytest.approx(100 / 3)]


def test_the_losses_run_on_cuda(three):
    """A forward pass of a step on fake CUDA tensors: nothing is left on the CPU."""
    from clip.model import CLIP
    from conftest import TINY
    from torch._subclasses.fake_tensor import FakeTensorMode

    texts = hipro.node_texts(settings(), three, [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, vectors = CLIP(**TINY).eval(), torch.randn(1, 5, 3, 64)
            x, labels = torch.randn(6, 32), torch.zeros(6, dtype=torch.long)
            pair = torch.zeros(6, dtype=torch.long)
        w = common.encode_text(model, texts.tokens, vectors, texts.sets)
        losses = common.task_losses(model, x, w, labels, pair, texts)
        assert losses.device.type == "cuda" and losses.shape == (8,)


# -------------------------------------------------------------------------------- as a command

SHORT = ("--shots", 2, "--clip", "tiny", "--n-ctx", 2, "--batch-size", 5)


def test_the_script_trains_scores_and_draws_the_affinity_and_the_tree(tree, tmp_path):
    out = tmp_path / "run"
    done = run_script("hipro.py", "--data", tree, *SHORT, "--epochs", 1, "--plot", "--out", out)
    assert done.returncode == 0, done.stderr
    assert all((out / f"{name}-1.png").stat().st_size > 3000 for name in ("affinity", "tree"))
    result = json.loads((out / "result.json").read_text())
    assert result["nodes"] == [[["drawn"], ["painted"], ["drawn", "painted"]]]
    assert len(result["affinity"][0]) == 2 and result["batches"] == "mixed"
    assert result["trainable_parameters"] == 3 * 2 * 128 and result["variant"] is None
    again = run_script("hipro.py", "--eval", out / "prompts.pt")
    assert again.returncode == 0, again.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith(("drawn ", "average"))]
    assert table[0] in again.stdout and table[-1] in again.stdout


@pytest.mark.parametrize("grouping", ["tree", "tag-groups"])
def test_killed_in_either_phase_it_resumes_to_the_same_numbers(
    tree, tmp_path, here, monkeypatch, grouping
):
    words = ["--data", tree, *SHORT, "--epochs", 2, "--grouping", grouping]
    code, _, err = here("hipro.py", *words, "--out", tmp_path / "whole")
    assert code == 0, err
    log = (tmp_path / "whole" / "log.csv").read_text()
    assert [line.split(",")[1] for line in log.splitlines()[1:]] == ["affinity"] * 2 + ["train"] * 2
    save_whole = common.save_whole
    for kill in (1, 2, 3, 4):
        saves = []

        def killed(path, content, saves=saves, kill=kill):
            save_whole(path, content)
            saves.append(path)
            if len(saves) == kill:
                raise KeyboardInterrupt

        out = tmp_path / f"killed-{kill}"
        monkeypatch.setattr(common, "save_whole", killed)
        assert here("hipro.py", *words, "--out", out)[0] == 130
        monkeypatch.setattr(common, "save_whole", save_whole)
        code, _, err = here("hipro.py", "--resume", "--out", out)
        assert code == 0, err
        assert numbers(out) == numbers(tmp_path / "whole") and (out / "log.csv").read_text() == log


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--grouping", "tag-groups", "--groups", 3], "--groups 3 is more than the 2 tasks"),
        (["--grouping", "tag-groups", "--groups", 0], "--groups 0 is too small"),
        (["--groups", 3], "is for --grouping tag-groups"),
        (["--n-ctx", 75], "text positions"),
        (["--grouping", "forest"], "forest"),
    ],
)
def test_bad_input_is_one_error_and_exit_code_2(tree, tmp_path, here, words, complaint):
    out = tmp_path / "run"
    code, _, err = here("hipro.py", "--data", tree, *SHORT, *words, "--out", out)
    assert code == 2 and complaint in err and "Traceback" not in err and not out.exists()
    assert "forest" in words or len(err.strip().splitlines()) == 1


def test_the_prompts_of_other_tasks_are_rejected(tree, tmp_path, here):
    out = tmp_path / "run"
    words = ["--epochs", 1, "--grouping", "random", "--out", out]
    assert here("hipro.py", "--data", tree, *SHORT, *words)[0] == 0
    code, _, err = here("hipro.py", "--eval", out / "prompts.pt", "--data", f"one={tree / 'drawn'}")
    assert code == 2 and "other tasks" in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_rn50_at_full_size_trains():
    model = random_clip(**RN50)
    images = common.Images(range(4), [0, 20, 40, 64], lambda i: noise(i, 224))
    names = [f"class number {i}" for i in range(65)]
    tasks = [common.Task(t, names, "a photo of a {}", images, images) for t in "abcd"]
    run = Phases()
    hipro.train(settings(n_ctx=16, batch_size=20, grouping="random"), model, tasks, run)
    assert 0 < run.logged[-1]["loss"] < 400
