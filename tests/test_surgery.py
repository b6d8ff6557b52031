"""PCGrad, IMTL-G and CAGrad against worked examples in the plane, and CAGrad's dual against a
grid."""

import itertools

import pytest
import torch
from conftest import Phases, small_tasks

import common

coop = common.load_method("coop_mt")
CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.double)
ALIGNED = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.double)


def test_pcgrad_projects_a_conflicting_pair():
    """g1 - (g1.g2 / |g2|^2) g2 = (1, 0) + (-1, 1) / 2 = (1/2, 1/2); g2 - (g1.g2 / |g1|^2) g1 = (0,
    1)."""
    assert common.pcgrad(CONFLICT).tolist() == [0.5, 1.5]


def test_pcgrad_leaves_an_aligned_pair_alone():
    assert common.pcgrad(ALIGNED).tolist() == [2, 1]


def test_pcgrad_compares_with_the_gradients_as_they_were():
    """Three in the plane: whatever the order, every projection is off an original gradient."""
    grads = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]], dtype=torch.double)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        seen.add(tuple(round(x, 6) for x in common.pcgrad(grads).tolist()))
    # g1: off g2 -> (.5, .5), off g3 -> (.5, 0); off g3 first: no conflict, then off g2 -> (.5, .5).
    # g2: off g1 -> (0, 1), off g3
    # -> (0, 0); or off g3 -> (-1, 0), off g1 -> (0, 0). g3: off g2 -> (-.5, -.5), off g1 -> (0,
    # -.5); or off g1 first: none -> (-.5, -.5)
    assert seen == {(0.5, -0.5), (0.0, 0.0), (0.5, 0.0), (0.0, -0.5)} & seen and len(seen) > 1


def test_imtl_has_equal_projections_on_both_gradients():
    """For two gradients the bisector: a1 |g1| = a2 |g2| up to the angle, so a1 = |g2| / (|g1| +
    |g2|)."""
    for grads in (CONFLICT, ALIGNED):
        a = 2**0.5 / (1 + 2**0.5)
        assert common.imtl(grads).tolist() == pytest.approx(
            (a * grads[0] + (1 - a) * grads[1]).tolist()
        )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_imtl_projects_equally_on_many(n):
    grads = torch.randn(n, 9, dtype=torch.double, generator=torch.Generator().manual_seed(n))
    projections = common.imtl(grads) @ (grads / grads.norm(dim=1, keepdim=True)).t()
    assert projections.tolist() == pytest.approx([projections[0].item()] * n)


def test_equal_gradients_are_summed_averaged_and_stretched_by_one_and_c():
    grads = torch.tensor([[1.0, 2.0]] * 3)
    assert common.pcgrad(grads).tolist() == [3, 6]
    assert common.imtl(grads).tolist() == pytest.approx([1, 2]) and common.cagrad(
        grads
    ).tolist() == pytest.approx([1.5, 3.0])


def test_cagrad_on_a_conflicting_pair_by_hand():
    """g0 = (0, 1/2), c |g0| = 1/4. g_w = (2w - 1, 1 - w); the d in the disc around g0 whose worse
    product is largest."""
    d = common.cagrad(CONFLICT)
    angles = torch.linspace(0, 2 * torch.pi, 100001, dtype=torch.double)
    disc = torch.stack([0.25 * angles.cos(), 0.5 + 0.25 * angles.sin()], dim=1)
    assert (CONFLICT @ d).min().item() == pytest.approx(
        (disc @ CONFLICT.t()).min(1).values.max().item(), abs=1e-4
    )
    assert (d - torch.tensor([0, 0.5])).norm().item() == pytest.approx(0.25)


@pytest.mark.parametrize("n, fine", [(2, 2000), (3, 120)])
def test_cagrads_dual_is_solved_as_a_grid_search_solves_it(n, fine):
    generator = torch.Generator().manual_seed(n)
    grid = (
        torch.tensor(
            [p for p in itertools.product(range(fine + 1), repeat=n - 1) if sum(p) <= fine],
            dtype=torch.double,
        )
        / fine
    )
    w = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], dim=1)
    for _ in range(10):
        grads = torch.randn(n, 6, dtype=torch.double, generator=generator)
        mean = grads.mean(0)
        dual = ((w @ grads) @ mean + 0.5 * mean.norm() * (w @ grads).norm(dim=1)).min().item()
        d = common.cagrad(grads)
        assert (d - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-6)
        assert (grads @ d).min().item() == pytest.approx(
            dual, abs=2e-3
        )  # no duality gap: the worst product is the dual


@pytest.mark.parametrize("surgery", [common.pcgrad, common.imtl, common.cagrad])
@pytest.mark.parametrize(
    "grads",
    [
        torch.zeros(3, 4),
        torch.randn(1, 4),
        torch.tensor([[1.0, 0], [0, 0]]),
        torch.tensor([[1.0, 0], [-1, 0]]),
    ],
    ids=str,
)
def test_surgeries_keep_dtype_and_input_and_stay_finite(surgery, grads):
    before = grads.clone()
    result = surgery(grads)
    assert (
        result.shape == grads[0].shape
        and result.dtype == grads.dtype
        and result.isfinite().all()
        and torch.equal(grads, before)
    )


@pytest.mark.parametrize("surgery", ["pcgrad", "imtl", "cagrad"])
def test_coop_descends_along_what_the_surgery_returns(small, surgery):
    args = coop.Args(n_ctx=3, surgery=surgery, epochs=1, lr=0.1, batch_size=6, workers=0)
    tasks = small_tasks("a", "b")
    common.seed_everything("start")
    trained = coop.train(args, small, tasks, Phases()).vectors.detach()
    common.seed_everything("start")
    start = coop.build(args, small, tasks)
    common.seed_everything("test", "train", 0)
    [(images, labels, task)] = common.batches(args, small, tasks)
    grads = []
    for t, one in enumerate(tasks):
        w = common.encode_text(small, common.tokenize(one.class_names, 3), start.text_prompts())
        scores = common.logits(small, common.encode_image(small, images[task == t]), w)
        loss = torch.nn.functional.cross_entropy(scores, labels[task == t])
        grads.append(torch.autograd.grad(loss, start.vectors)[0].flatten())
    direction = getattr(common, surgery)(torch.stack(grads)) * (1 if surgery == "pcgrad" else 2)
    v = start.vectors.detach()
    wanted = v - 0.1 * (direction.view_as(v) + 5e-4 * v)
    assert (trained - wanted).abs().max() < 1e-3 * max(1, direction.abs().max())


def test_imtl_of_nearly_parallel_gradients_in_single_precision_is_that_in_double():
    g = torch.randn(40, generator=torch.Generator().manual_seed(0))
    grads = torch.stack(
        [g, 1.3 * g + 1e-3 * torch.randn(40, generator=torch.Generator().manual_seed(1))]
    )
    assert common.imtl(grads).tolist() == pytest.approx(
        common.imtl(grads.double()).tolist(), rel=1e-3, abs=1e-4
    )


def test_cagrad_with_twenty_tasks_is_solved_to_a_hundredth():
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        grads = torch.randn(20, 30, dtype=torch.double, generator=generator) * (
            1 + 3 * torch.rand(20, 1, generator=generator)
        )
        worst = [(grads @ common.cagrad(grads, steps=steps)).min().item() for steps in (300, 5000)]
        assert worst[0] == pytest.approx(worst[1], abs=0.01 * abs(worst[1]) + 1e-3)
