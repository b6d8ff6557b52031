"""HiPro: the affinity, the tree, nodes that are trained together and do not touch each other, and the classifiers."""
import itertools
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import RN50, Log, noise, random_clip, run_script, small_tasks

import common

hipro = common.load_method("hipro")
SETTINGS = dict(n_ctx=3, grouping="tree", epochs=1, lr=0.1, batch_size=12, views=1, min_crop=0.6)


def settings(**changes):
    return types.SimpleNamespace(**dict(SETTINGS, **changes))


@pytest.fixture
def three():
    """Three tasks; the first and the last have the same class names."""
    tasks = small_tasks("a", "b", "c")
    tasks[1].class_names = ["tree", "house", "very long name"]
    return tasks


def symmetric(n, seed):
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return x + x.t()


# -------------------------------------------------------------------------------------------------- Eq. (4) and the tree

def slow_tree(affinity):
    """The paper's words as a list of states, on frozensets, with means taken over explicit pairs."""
    n = len(affinity)
    remaining, waiting, tree = {frozenset([i]) for i in range(n)}, set(), [frozenset([i]) for i in range(n)]
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
        assert len(nodes) == 2 * n - 1 and nodes[:n] == [(i,) for i in range(n)] and nodes[-1] == tuple(range(n))


def test_a_tree_drawn_by_hand():
    """0-1 are closest, then 3-4 among the rest; 2 is left over, all return, and 2 joins the pair that it is nearer to on average."""
    d = [[0, 9, 4, 0, 0],
         [9, 0, 0, 0, 0],
         [4, 0, 0, 3, 2],
         [0, 0, 3, 0, 8],
         [0, 0, 2, 8, 0]]
    assert hipro.task_tree(torch.tensor(d)) == [(0,), (1,), (2,), (3,), (4,), (0, 1), (3, 4), (2, 3, 4), (0, 1, 2, 3, 4)]


def test_a_new_cluster_sits_out_where_plain_average_linkage_would_take_it():
    """Plain linkage chains 0-1, then 2 onto it (mean 5 > 1); here 0-1 waits, so 2 and 3 have to merge."""
    d = torch.tensor([[0., 9, 5, 0], [9, 0, 5, 0], [5, 5, 0, 1], [0, 0, 1, 0]])
    assert hipro.task_tree(d) == [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)]
    groups = [frozenset([i]) for i in range(4)]
    chain = []
    while len(groups) > 1:                                                      # plain average linkage
        a, b = max(itertools.combinations(groups, 2), key=lambda ab: hipro.group_affinity(d.tolist(), *map(sorted, ab)))
        groups = [g for g in groups if g not in (a, b)] + [a | b]
        chain.append(sorted(a | b))
    assert chain == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


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
        nodes = hipro.task_tree(hipro.gradient_affinity(grads[None]))
        for f in range(5):
            assert tuple(torch.where(order % 5 == f)[0].tolist()) in nodes


def test_affinity_is_not_changed_by_the_tree():
    d = symmetric(6, 0)
    before = d.clone()
    hipro.task_tree(d)
    assert torch.equal(d, before)


def test_group_affinity_is_the_mean_over_pairs():
    assert hipro.group_affinity([[0, 1, 2], [1, 0, 6], [2, 6, 0]], (0, 1), (2,)) == 4


# ------------------------------------------------------------------------------------------------------- Eq. (1), (2), (3)

def one_loss(model, task, vectors, x, y):
    """Eq. (1) for one prompt on one task, by itself."""
    w = common.encode_text(model, common.tokenize(task.class_names, len(vectors)), vectors[None])
    return F.cross_entropy(model.logit_scale.exp() * F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).t(), y)


def batch_of(model, tasks):
    views = [common.view_features(model, task.train, 1) for task in tasks]
    return [(features[0, :4], labels[:4]) for features, labels in views]


def test_all_nodes_in_one_batch_equal_node_by_node(small, three):
    nodes, batch = [(0,), (1,), (2,), (0, 2), (0, 1, 2)], batch_of(small, three)
    texts = hipro.NodeTexts(three, nodes, 3)
    vectors = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    losses = hipro.losses_of(small, texts, vectors[texts.node_of], batch)
    assert set(losses) == {(m, i) for m, node in enumerate(nodes) for i in node}
    assert texts.texts.tokens.shape[0] == 3 * (3 + 1 + 2)       # tasks a and c share their rows in the nodes that hold both
    for (m, i), loss in losses.items():
        assert loss.item() == pytest.approx(one_loss(small, three[i], vectors[m], *batch[i]).item(), rel=1e-5)
    gradient, = torch.autograd.grad(sum(losses.values()), vectors)
    for m, node in enumerate(nodes):
        alone, = torch.autograd.grad(sum(one_loss(small, three[i], vectors[m], *batch[i]) for i in node), vectors)      # Eq. (2)
        assert (gradient[m] - alone[m]).abs().max() < 1e-5 * max(1, alone.abs().max())


def test_task_gradients_and_their_dot_products_are_those_of_autograd(small, three):
    batch, vectors = batch_of(small, three), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    texts = hipro.NodeTexts(three, [(0, 1, 2)] * 2, 3)
    copies = vectors[texts.node_of]
    grads = hipro.task_gradients(hipro.losses_of(small, texts, copies, batch), texts, copies, 2, 3)
    by_hand = torch.stack([torch.stack([torch.autograd.grad(one_loss(small, task, vectors[m], *batch[i]), vectors)[0][m].flatten()
                                        for i, task in enumerate(three)]) for m in range(2)])
    assert (grads - by_hand).abs().max() < 1e-5 * by_hand.abs().max()
    affinity = hipro.gradient_affinity(grads)
    for i, j in itertools.product(range(3), repeat=2):
        assert affinity[i, j].item() == pytest.approx(((by_hand[0, i] * by_hand[0, j]).sum() + (by_hand[1, i] * by_hand[1, j]).sum()).item() / 2, rel=1e-3, abs=1e-5)


def test_tag_affinity_is_the_relative_change_of_a_loss_after_anothers_step(small, three):
    batch, vectors = batch_of(small, three), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    texts = hipro.NodeTexts(three, [(0, 1, 2)] * 2, 3)
    copies = vectors[texts.node_of]
    losses = hipro.losses_of(small, texts, copies, batch)
    grads = hipro.task_gradients(losses, texts, copies, 2, 3)
    Z = torch.zeros(3, 3)
    for m, i, j in itertools.product(range(2), range(3), range(3)):
        step, = torch.autograd.grad(one_loss(small, three[i], vectors[m], *batch[i]), vectors)
        after = one_loss(small, three[j], vectors[m] - 0.05 * step[m], *batch[j])
        Z[i, j] += (1 - after / one_loss(small, three[j], vectors[m], *batch[j])).item() / 2
    result = hipro.tag_affinity(small, texts, vectors, grads, losses, batch, lr=0.05)
    assert torch.allclose(result, (Z + Z.t()) / 2, atol=1e-4) and torch.equal(result, result.t())


def test_the_affinity_is_that_of_every_fifth_step_averaged_over_the_training(small, three, monkeypatch):
    """11 steps: snapshots at steps 0, 5 and 10."""
    seen, steps = [], []
    plain, losses_of = hipro.gradient_affinity, hipro.losses_of
    monkeypatch.setattr(hipro, "losses_of", lambda *words: steps.append(1) or losses_of(*words))
    monkeypatch.setattr(hipro, "gradient_affinity", lambda grads: seen.append((len(steps) - 1, grads.shape, plain(grads))) or seen[-1][2])
    common.seed_everything(1)
    views = [common.view_features(small, task.train, 1) for task in three]
    args = settings(epochs=11, batch_size=18)                                   # one step an epoch
    affinity = hipro.measure_affinity(args, small, three, lambda epoch: views, Log(), seed=1)
    assert [(step, shape) for step, shape, _ in seen] == [(s, (8, 3, 192)) for s in (0, 5, 10)] and len(steps) == 11
    assert torch.allclose(affinity, sum(x for _, _, x in seen) / 3, rtol=1e-4)


def test_shared_prompts_take_the_same_steps_with_and_without_a_snapshot(small, three, monkeypatch):
    common.seed_everything(1)
    views = [common.view_features(small, task.train, 1) for task in three]
    last = []
    for every in (1, 10**6):
        monkeypatch.setattr(hipro, "EVERY", every)
        log = Log()
        common.seed_everything(1)
        hipro.measure_affinity(settings(epochs=3, lr=0.01), small, three, lambda epoch: views, log, seed=1)
        last.append(log.last["loss"])
    assert last[0] == pytest.approx(last[1], rel=1e-4)


def test_an_epoch_is_as_long_as_the_union_of_the_tasks_needs():
    tasks = small_tasks("a", "b", "c")
    sizes = [20, 5, 2]
    views = [(torch.zeros(1, n, 4), torch.arange(n)) for n in sizes]
    for task, n in zip(tasks, sizes):
        task.train = task.train.subset([0] * n)
    batches = list(hipro.epoch_of(settings(batch_size=10), tasks, views))       # floor(10 / 3) = 3 of each
    assert len(batches) == 3 and all(len(y) == 3 for batch in batches for _, y in batch)
    assert len(torch.cat([batch[0][1] for batch in batches]).unique()) == 9     # no image of the largest twice
    assert set(torch.cat([batch[2][1] for batch in batches]).tolist()) == {0, 1}
    assert all(len(y) == 1 for batch in hipro.epoch_of(settings(batch_size=2), tasks, views) for _, y in batch)


# ---------------------------------------------------------------------------------------------------------- whole trainings

def test_training_takes_plain_gradient_steps_on_every_node(small):
    args, tasks = settings(grouping="shared+individual"), small_tasks("a", "b")
    trained = hipro.train(args, small, tasks, Log(), seed=1)
    common.seed_everything(1)
    start = hipro.build(args, small, tasks).vectors.detach()
    common.seed_everything(1, 0)
    views = [common.view_features(small, task.train, 1, 0.6) for task in tasks]
    common.seed_everything(1, 1)
    [batch] = hipro.epoch_of(args, tasks, views)
    for m, node in enumerate([(0,), (1,), (0, 1)]):
        v = start[m].clone().requires_grad_()
        gradient, = torch.autograd.grad(sum(one_loss(small, tasks[i], v, *batch[i]) for i in node), v)
        assert (trained.vectors[m] - (v - 0.1 * (gradient + 5e-4 * v))).abs().max() < 1e-4 * max(1, gradient.abs().max())


def test_nodes_do_not_influence_each_other(small, monkeypatch):
    """One node is frozen: the others end where they would have ended."""
    args, tasks = settings(grouping="shared+individual", epochs=3, lr=0.02), small_tasks("a", "b")
    together = hipro.train(args, small, tasks, Log(), seed=1).vectors.detach()
    losses_of = hipro.losses_of

    def frozen(model, texts, copies, batch):
        return losses_of(model, texts, torch.stack([c.detach() if m == 1 else c for m, c in zip(texts.node_of, copies)]), batch)
    monkeypatch.setattr(hipro, "losses_of", frozen)
    other = hipro.train(args, small, tasks, Log(), seed=1).vectors.detach()
    assert torch.equal(together[[0, 2]], other[[0, 2]]) and (together[1] - other[1]).abs().max() > 1e-4


@pytest.mark.parametrize("grouping, names", [("tree", 5), ("tag", 5), ("random", 5), ("shared+individual", 4)])
def test_every_grouping_trains(small, three, grouping, names):
    first, last = Log(), Log()
    hipro.train(settings(grouping=grouping, epochs=1, lr=0.003), small, three, first, seed=1)
    prompts = hipro.train(settings(grouping=grouping, epochs=20, lr=0.003), small, three, last, seed=1)
    assert len(prompts.nodes()) == names and prompts.nodes()[-1] == (0, 1, 2) and prompts.nodes()[:3] == [(0,), (1,), (2,)]
    assert last.last["loss"] < 0.7 * first.last["loss"]
    assert (prompts.affinity.abs().max() > 0) == (grouping in ("tree", "tag"))


def test_one_task_trains_its_one_prompt(small, capsys):
    prompts = hipro.train(settings(), small, small_tasks("a"), Log(), seed=1)
    assert prompts.nodes() == [(0,)] and len(prompts.vectors) == 1 and "one task" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- Eq. (5)

def test_fuse_by_hand():
    weights = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 5.0]]])
    assert hipro.fuse(weights, [(0,), (1,), (0, 1)], 0).tolist() == [[2.0, 2.5]]
    assert hipro.fuse(weights, [(0,), (1,), (0, 1)], 1).tolist() == [[1.5, 3.0]]


def test_a_tasks_classifier_is_the_mean_of_its_nodes_unit_length_text_features(small, three):
    prompts = hipro.train(settings(), small, three, Log(), seed=1)
    for i, task in enumerate(three):
        mine = [m for m, node in enumerate(prompts.nodes()) if i in node]
        features = [common.encode_text(small, common.tokenize(task.class_names, 3), prompts.vectors[[m]]) for m in mine]
        expected = sum(w / w.norm(dim=-1, keepdim=True) for w in features) / len(mine)
        classifier = getattr(prompts, f"classifier_{i}")
        assert (classifier - expected).abs().max() < 1e-5 and (classifier.norm(dim=-1) < 1 - 1e-4).all()


def test_images_are_told_apart_by_the_classifier_as_it_is(small):
    """Not normalised again: a classifier whose first class is long wins, which cosines would not allow."""
    [task] = small_tasks("a")
    prompts = hipro.build(settings(), small, [task])
    prompts.members[:] = True
    x, _ = common.image_features(small, task.test, common.train_transform(small))
    mean = F.normalize(x, dim=-1).mean(0)
    prompts.classifier_0.copy_(torch.stack([3 * mean, mean, mean]))
    preprocess = common.train_transform(small, 0.99)
    assert hipro.score(settings(grouping="random"), small, preprocess, [task], prompts)["accuracy"] == [pytest.approx(100 / 3)]


def test_the_losses_run_on_cuda(three):
    from clip.model import CLIP
    from conftest import TINY
    from torch._subclasses.fake_tensor import FakeTensorMode
    texts = hipro.NodeTexts(three, [(0,), (1,), (2,), (0, 2), (0, 1, 2)], 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, vectors = CLIP(**TINY).eval(), torch.randn(5, 3, 64)
            batch = [(torch.randn(2, 32), torch.zeros(2, dtype=torch.long)) for _ in three]
        losses = hipro.losses_of(model, texts, vectors[texts.node_of], batch)
        assert len(losses) == 8 and all(loss.device.type == "cuda" for loss in losses.values())


def test_plots_of_the_affinity_and_the_tree(tree, tmp_path):
    done = run_script("hipro.py", "--data", tree, "--shots", 2, "--clip", "tiny", "--epochs", 1, "--n-ctx", 2, "--plot", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "run" / f"{name}-1.png").stat().st_size > 3000 for name in ("affinity", "tree"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["nodes"] == [[["drawn"], ["painted"], ["drawn", "painted"]]] and len(result["affinity"][0]) == 2


@pytest.mark.slow
def test_rn50_at_full_size_trains():
    model, images = random_clip(**RN50), common.Images(range(4), [0, 20, 40, 64], lambda i: noise(i, 224))
    tasks = [common.Task(t, [f"class number {i}" for i in range(65)], "a photo of a {}", images, images) for t in "abcd"]
    log = Log()
    hipro.train(settings(n_ctx=16, batch_size=20, grouping="random"), model, tasks, log, seed=1)
    assert 0 < log.last["loss"] < 400
