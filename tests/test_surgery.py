"""PCGrad, IMTL-G and CAGrad against worked examples in the plane, and CAGrad's dual against a grid;
the learning rates of SGD by hand."""

import itertools
import math

import pytest
import torch
from conftest import Phases, small_tasks

import common

coop = common.load_method("coop_mt")
CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.double)
ALIGNED = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.double)


def test_pcgrad_projects_a_conflicting_pair_and_leaves_an_aligned_one_alone():
    """g1 - (g1.g2 / |g2|^2) g2 = (1, 0) + (-1, 1) / 2 = (1/2, 1/2);
    g2 - (g1.g2 / |g1|^2) g1 = (0, 1)."""
    assert common.pcgrad(CONFLICT).tolist() == [0.5, 1.5]
    assert common.pcgrad(ALIGNED).tolist() == [2, 1]


def test_pcgrad_compares_with_the_original_gradients():
    """Three gradients in the plane. Projected off g2 first, g1 is (.5, .5), then off g3 (.5, 0);
    with g3 first there is no conflict, and it ends at (.5, .5). Likewise g2 ends at (0, 0) either
    way, and g3 at (-.5, -.5) or (0, -.5)."""
    grads = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]], dtype=torch.double)
    seen = set()
    for seed in range(20):
        direction = common.pcgrad(grads, torch.Generator().manual_seed(seed))
        seen.add(tuple(round(x, 6) for x in direction.tolist()))
    possible = {(0.5, -0.5), (0.0, 0.0), (0.5, 0.0), (0.0, -0.5)}
    assert seen <= possible and len(seen) > 1


def test_imtl_has_equal_projections_on_both_gradients():
    """For two gradients the bisector: a1 |g1| = a2 |g2|, so a1 = |g2| / (|g1| + |g2|)."""
    a = 2**0.5 / (1 + 2**0.5)
    for grads in (CONFLICT, ALIGNED):
        expected = a * grads[0] + (1 - a) * grads[1]
        assert common.imtl(grads).tolist() == pytest.approx(expected.tolist())


def test_imtl_projects_equally_on_many():
    grads = torch.randn(5, 9, dtype=torch.double, generator=torch.Generator().manual_seed(5))
    projections = common.imtl(grads) @ (grads / grads.norm(dim=1, keepdim=True)).t()
    assert projections.tolist() == pytest.approx([projections[0].item()] * 5)


def test_imtl_of_nearly_parallel_gradients_is_the_same_in_single_and_double_precision():
    g, other = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    grads = torch.stack([g, 1.3 * g + 1e-3 * other])
    expected = common.imtl(grads.double()).tolist()
    assert common.imtl(grads).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_equal_gradients_are_summed_averaged_and_stretched_by_one_and_c():
    grads = torch.tensor([[1.0, 2.0]] * 3)
    assert common.pcgrad(grads).tolist() == [3, 6]
    assert common.imtl(grads).tolist() == pytest.approx([1, 2])
    assert common.cagrad(grads).tolist() == pytest.approx([1.5, 3])


@pytest.mark.parametrize("n, fine", [(2, 2000), (3, 120)])
def test_cagrads_dual_solution_agrees_with_a_grid_search(n, fine):
    generator = torch.Generator().manual_seed(n)
    points = [p for p in itertools.product(range(fine + 1), repeat=n - 1) if sum(p) <= fine]
    grid = torch.tensor(points, dtype=torch.double) / fine
    w = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], dim=1)
    for _ in range(10):
        grads = torch.randn(n, 6, dtype=torch.double, generator=generator)
        mean, d = grads.mean(0), common.cagrad(grads)
        dual = ((w @ grads) @ mean + 0.5 * mean.norm() * (w @ grads).norm(dim=1)).min().item()
        assert (d - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-6)
        assert (grads @ d).min().item() == pytest.approx(dual, abs=2e-3)    # no duality gap


def test_cagrad_with_twenty_tasks_is_solved_to_one_percent():
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(20, 30, dtype=torch.double, generator=generator)
    grads *= 1 + 3 * torch.rand(20, 1, generator=generator)
    found, best = ((grads @ common.cagrad(grads, steps=n)).min().item() for n in (300, 5000))
    assert found == pytest.approx(best, abs=0.01 * abs(best) + 1e-3)


@pytest.mark.parametrize("surgery", [common.pcgrad, common.imtl, common.cagrad])
@pytest.mark.parametrize("grads", [
    [[0, 0], [0, 0]],
    [[3, -1]],
    [[1, 0], [-1, 0]]], ids=str)
def test_surgeries_keep_dtype_and_input_and_stay_finite(surgery, grads):
    given = torch.tensor(grads, dtype=torch.float)
    result = surgery(given)
    assert result.shape == (2,) and result.dtype == torch.float and result.isfinite().all()
    assert given.tolist() == grads


@pytest.mark.parametrize("batches", ["tasks", "mixed"])
@pytest.mark.parametrize("surgery", ["pcgrad", "imtl", "cagrad"])
def test_coop_descends_along_what_the_surgery_returns(small, surgery, batches):
    """The averages of IMTL-G and CAGrad are multiplied by the number of tasks with images in the
    step; one of the four mixed steps has both tasks."""
    args = coop.Args(n_ctx=3, surgery=surgery, epochs=1, lr=0.01, batches=batches, workers=0,
                     batch_size=dict(tasks=6, mixed=2)[batches])
    tasks = small_tasks("a", "b")
    tasks[1].train = tasks[1].train.subset(range(dict(tasks=6, mixed=1)[batches]))
    common.seed_everything("start")
    trained = coop.train(args, small, tasks, Phases()).vectors
    common.seed_everything("start")
    start = 0.02 * torch.randn(1, 3, 64)
    v, momentum, order = start, 0, torch.Generator().manual_seed(1_000_003)
    common.seed_everything("test", "train", 0)
    steps = list(common.batches(args, small, tasks))
    assert len(steps) == dict(tasks=1, mixed=4)[batches]
    for images, labels, task in steps:
        v, grads = v.detach().requires_grad_(), []
        for t in task.unique():
            w = common.encode_text(small, common.tokenize(tasks[t].class_names, 3), v)
            scores = common.logits(small, common.encode_image(small, images[task == t]), w)
            loss = torch.nn.functional.cross_entropy(scores, labels[task == t])
            grads.append(torch.autograd.grad(loss, v)[0].flatten())
        if surgery == "pcgrad":
            direction = common.pcgrad(torch.stack(grads), order)
        else:
            direction = len(grads) * getattr(common, surgery)(torch.stack(grads))
        momentum = 0.9 * momentum + direction.view_as(v) + 5e-4 * v
        v = v - 0.01 * momentum
    assert (trained - v).abs().max() < 1e-3 * (v - start).abs().max()


# ----------------------------------------------------------------------------------- learning rates

def rates(method, **changes):
    """The learning rate of every epoch of a training run."""
    args = common.load_method(method).Args(epochs=4, lr=0.2, **changes)
    optimizer, schedule = common.sgd(args, torch.nn.Linear(1, 1))
    found = []
    for _ in range(args.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("method", ["coop_mt", "vpt_mt", "maple_mt"])
def test_the_rate_is_a_cosine_that_starts_after_the_warm_up(method):
    """0.2 (1 + cos(k pi / 4)) / 2 for k = 0..3; CoOp's 1e-5 in each warm-up epoch; a constant rate
    for the baselines in JSCPT's tables."""
    cosine = [0.2, 0.1 + 0.1 * math.sqrt(0.5), 0.1, 0.1 - 0.1 * math.sqrt(0.5)]
    assert rates(method) == pytest.approx(cosine)
    assert rates(method, warm_up=1) == pytest.approx([1e-5, *cosine[:3]])
    assert rates(method, warm_up=3) == pytest.approx([1e-5, 1e-5, 1e-5, 0.2])
    assert rates(method, schedule="constant") == [0.2] * 4
