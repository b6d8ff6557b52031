"""JSCPT: selection, the schedule, both levels of the optimization, the ablations, and what can go wrong."""
import copy
import csv
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Log, make_tree, run_script, small_tasks
from torch.nn.attention import SDPBackend, sdpa_kernel

import common

jscpt = common.load_method("jscpt")
shared_of = lambda grads: torch.cat([grads[k].flatten(1) for k in ("P_l_shared", "P_v_shared")], dim=1)
SETTINGS = dict(n_ctx=2, epochs=1, lr=0.05, batch_size=6, views=1, min_crop=0.6, upper_every=2, upper_lr=0.1, terms=3, scale=0.05,
                no_selection=False, no_prompt_schedule=False, no_task_schedule=False, cagrad=False)


def settings(**changes):
    return types.SimpleNamespace(**dict(SETTINGS, **changes))


def count(tensors):
    return sum(x.numel() for x in tensors)


@pytest.fixture
def three(small):
    """(model, tasks, prompts away from their start, a step's batches), in doubles; the third task has class names of its own."""
    tasks = small_tasks("a", "b", "c")
    tasks[2].class_names = ["tree", "house", "very long name"]
    common.seed_everything(1)
    prompts = jscpt.build(settings(), small, tasks)
    prompts.m.data.normal_()
    prompts.alpha.copy_(torch.tensor([1.5, -0.5, 0.3])), prompts.beta.normal_()
    model = copy.deepcopy(small).double()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = torch.nn.LayerNorm                               # CLIP's own computes in float32
    return model, tasks, prompts.double(), doubles(small, tasks, seed=1)


def doubles(model, tasks, seed):
    return [(x.double(), y) for x, y in next(iter(common.image_batches(model, tasks, settings(batch_size=4), seed)))]


def plain_losses(model, tasks, prompts, batches):
    """(selected [N], original [N]) a task at a time, from the module's own parameters and layers of torch.nn."""
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    mlp = lambda x: torch.func.functional_call(second, dict(weight=prompts.W_2[0], bias=prompts.b_2[0]), torch.func.functional_call(
        first, dict(weight=prompts.W_1[0], bias=prompts.b_1[0]), x).relu())
    selected, original = [], []
    for i, (task, (images, labels)) in enumerate(zip(tasks, batches)):
        text = torch.cat([prompts.P_l_shared[0], prompts.P_l[i]])[None]
        image = torch.cat([prompts.P_v_shared[0], prompts.P_v[i]], dim=1)
        w = common.encode_text(model, common.tokenize(task.class_names, text.shape[1]), text)
        x = common.encode_image(model, images, image)
        masked = prompts.m[i].sigmoid() * x
        selected.append(F.cross_entropy(common.logits(model, mlp(masked + mlp(masked)), w), labels))
        original.append(F.cross_entropy(common.logits(model, x, w), labels))
    return torch.stack(selected), torch.stack(original)


# ------------------------------------------------------------------------------------------------ prompts and Eq. (2), (3)

def test_parameters_at_vit_b16(vit_b16):
    prompts = jscpt.build(settings(n_ctx=16), vit_b16, small_tasks(*"abcd"))
    assert count(prompts.parameters()) == 813_600                               # 0.2034 M a task: the paper's 0.203 M
    assert count(jscpt.omega_of(settings(), prompts).values()) == 4 + 16        # alpha and beta, counted apart
    assert not prompts.alpha.requires_grad and prompts.alpha.eq(1).all() and prompts.beta.eq(1).all()
    assert (torch.sigmoid(prompts.m) == 0.5).all()


def test_selection_by_hand():
    """D = 2 with an MLP that is z -> 2 relu(z) + (1, 0): masked (1, -2) -> inner (3, 0) -> sum (4, -2) -> (9, 0)."""
    eye = torch.eye(2)[None]
    theta = dict(m=torch.zeros(1, 2), W_1=eye, b_1=torch.zeros(1, 2), W_2=2 * eye, b_2=torch.tensor([[1.0, 0.0]]))
    assert jscpt.select(theta, torch.tensor([[2.0, -4.0]]), 0).tolist() == [[9.0, 0.0]]


def test_the_network_starts_as_a_projection_onto_the_class_names_features(tiny):
    tasks = common.load_tasks("fxemoji", split=0.25)
    model, preprocess = tiny
    prompts, words = jscpt.build(settings(), model, tasks[:1]), F.normalize(common.zero_shot(model, tasks)[0], dim=-1)
    theta = {name: x.detach() for name, x in prompts.copies().items()}
    V = torch.linalg.svd(words).Vh[:32]
    for task in tasks:                                                          # images as they come: ReLU cuts nothing off
        x, _ = common.image_features(model, task.test.subset(range(0, 240, 8)), preprocess)
        assert torch.allclose(jscpt.select(theta, x, 0), x @ V.t() @ V, atol=1e-3)
    assert (words @ V.t()).norm(dim=1).pow(2).mean() > 0.9                      # and most of a class name's feature is passed on


def test_losses_of_all_tasks_in_one_pass_equal_those_computed_one_by_one(three):
    model, tasks, prompts, batches = three
    losses, original = jscpt.losses_of(model, jscpt.texts_of(settings(), tasks), prompts.copies(), batches)
    selected, plain = plain_losses(model, tasks, prompts, batches)
    assert torch.allclose(losses, selected, atol=1e-10) and torch.allclose(original, plain, atol=1e-10)
    assert not original.requires_grad and not torch.allclose(losses, original, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------- Eq. (4) to (6)

def test_causal_effect_by_hand():
    """No gain: sigma(1) = 0.7311; a gain of ln 2: sigma(2) = 0.8808; a loss of ln 2: sigma(1/2) = 0.6225; hopeless: 1/2."""
    gain = torch.tensor([0.0, math.log(2), -math.log(2), -200.0, 200.0], dtype=torch.double)
    effect = jscpt.causal_effect(1 + gain, torch.ones(5, dtype=torch.double))
    assert effect.tolist() == pytest.approx([0.7310586, 0.8807971, 0.6224593, 0.5, 1.0]) and effect.dtype == torch.double


def test_affinity_by_hand():
    """g = (2, 0), (1, 1), (-1, 0): A[0, 1] = 2 / 2, A[1, 0] = 2 / 4, A[0, 2] = -2 / 1 -> -1, A[2, 0] = -2 / 4, A[2, 1] = -1 / 2."""
    grads = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    before = grads.clone()
    assert jscpt.affinity(grads).tolist() == [[0.0, 1.0, -1.0], [0.5, 0.0, -1.0], [-0.5, -0.5, 0.0]]
    assert torch.equal(grads, before) and jscpt.affinity(grads.double()).dtype == torch.double


def test_a_gradient_of_zero_has_no_affinity():
    assert jscpt.affinity(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_schedule_by_hand():
    """phi_0 = sigma(2 * 0.5) sigma(3 * 0.25 + 0), phi_1 = sigma(-1 * 1) sigma(4 * -0.5 + 0): beta's row, the affinity's column."""
    sigma = lambda x: 1 / (1 + math.exp(-x))
    alpha, beta = torch.tensor([2.0, -1.0]), torch.tensor([[9.0, 3.0], [4.0, 9.0]])
    phi = jscpt.schedule(alpha, beta, torch.tensor([0.5, 1.0]), torch.tensor([[0.0, -0.5], [0.25, 0.0]]))
    assert phi.tolist() == pytest.approx([sigma(1) * sigma(0.75), sigma(-1) * sigma(-2)])


def test_the_task_that_conflicts_with_the_others_gets_the_smallest_weight():
    grads = torch.tensor([[1.0, 0.2, 0.0], [1.0, -0.2, 0.0], [-1.0, 0.0, 0.5]])
    phi = jscpt.schedule(torch.ones(3), torch.ones(3, 3), torch.full((3,), 0.7), jscpt.affinity(grads))
    assert phi.argmin() == 2 and phi[2] < 0.6 * phi[:2].min()


def test_with_one_task_the_schedule_changes_nothing_but_the_size_of_the_step(small):
    """phi = sigma(alpha effect) / 2, whatever beta is, and the gradient is phi times the plain one."""
    task = small_tasks("a")
    common.seed_everything(1)
    prompts = jscpt.build(settings(), small, task)
    batches = next(iter(common.image_batches(small, task, settings(), seed=1)))
    grads, losses, original = jscpt.task_gradients(small, jscpt.texts_of(settings(), task), prompts, batches)
    A = jscpt.affinity(shared_of(grads))
    phi = jscpt.schedule(prompts.alpha, 7 * prompts.beta, jscpt.causal_effect(original, losses), A)
    assert A.tolist() == [[0.0]] and phi.item() == pytest.approx(torch.sigmoid(jscpt.causal_effect(original, losses)).item() / 2)
    theta = list(prompts.parameters())
    plain = torch.autograd.grad(plain_losses(small, task, prompts, batches)[0].sum(), theta)
    for combine in (jscpt.scheduled_gradient, jscpt.cagrad_gradient):
        for g, p in zip(combine(phi, grads.values(), theta), plain):
            assert (g - phi * p).abs().max() < 1e-5 * max(1, p.abs().max())


# ------------------------------------------------------------------------------------------------- the lower level, Eq. (9)

def test_the_lower_step_is_autograds_gradient_of_the_weighted_losses_with_constant_weights(three):
    model, tasks, prompts, batches = three
    grads, losses, original = jscpt.task_gradients(model, jscpt.texts_of(settings(), tasks), prompts, batches)
    phi = jscpt.schedule(prompts.alpha, prompts.beta, jscpt.causal_effect(original, losses), jscpt.affinity(shared_of(grads)))
    theta = list(prompts.parameters())
    expected = torch.autograd.grad((phi.detach() * plain_losses(model, tasks, prompts, batches)[0]).sum(), theta)
    for g, e in zip(jscpt.scheduled_gradient(phi, grads.values(), theta), expected):
        assert g.shape == e.shape and (g - e).abs().max() < 1e-9


def test_one_backward_pass_gives_every_tasks_gradient(three):
    model, tasks, prompts, batches = three
    grads, *_ = jscpt.task_gradients(model, jscpt.texts_of(settings(), tasks), prompts, batches)
    losses, _ = plain_losses(model, tasks, prompts, batches)
    for i in range(3):
        alone = dict(zip(grads, torch.autograd.grad(losses[i], list(prompts.parameters()), retain_graph=True)))
        for name, g in grads.items():
            own = alone[name][0 if len(alone[name]) == 1 else i]
            assert (g[i] - own).abs().max() < 1e-9
    shared = torch.cat([grads["P_l_shared"].flatten(1), grads["P_v_shared"].flatten(1)], dim=1)
    assert torch.equal(shared_of(grads), shared) and not torch.allclose(shared[0], shared[1])


def by_hand(model, tasks, args, seed=1):
    """A whole training of one epoch of one step: the first batches, the start, and the direction that Eq. (9) gives."""
    common.seed_everything(seed)
    start = jscpt.build(args, model, tasks)
    rest = [common.hold_out(task.train, seed)[0] for task in tasks]
    common.seed_everything(seed, 1)
    lists = [types.SimpleNamespace(train=images) for images in rest]
    [batches] = common.image_batches(model, lists, args, seed)
    losses, original = plain_losses(model, tasks, start, batches)
    theta = list(start.parameters())
    rows = [torch.autograd.grad(loss, theta, retain_graph=True) for loss in losses]
    shared = torch.stack([torch.cat([row[0].flatten(), row[1].flatten()]) for row in rows])
    effect = 1 / (1 + torch.exp(-torch.exp(original - losses.detach())))
    return start, theta, rows, shared, effect, losses


def test_training_takes_that_step(small):
    args, tasks, log = settings(), small_tasks("a", "b"), Log()
    trained = jscpt.train(args, small, tasks, log, seed=1)
    start, theta, rows, g, effect, losses = by_hand(small, tasks, args)
    A = torch.tensor([[0, (g[0] @ g[1]) / (g[1] @ g[1])], [(g[0] @ g[1]) / (g[0] @ g[0]), 0]]).clamp(-1, 1)
    phi = torch.sigmoid(effect) * torch.sigmoid(A.sum(0))
    for k, p in enumerate(theta):
        direction = sum(f * row[k] for f, row in zip(phi, rows)) + 5e-4 * p
        assert (list(trained.parameters())[k] - (p - 0.05 * direction)).abs().max() < 1e-5 * max(1, direction.abs().max())
    assert log.last["loss"] == pytest.approx(losses.sum().item(), rel=1e-5)
    assert json.loads(log.last["phi"]) == pytest.approx(phi.tolist(), abs=1e-4) and torch.allclose(trained.phi, phi, atol=1e-4)


def test_cagrad_replaces_the_sum_on_shared_numbers_and_the_task_factor(small):
    args, tasks = settings(cagrad=True), small_tasks("a", "b")
    trained = jscpt.train(args, small, tasks, Log(), seed=1)
    start, theta, rows, _, effect, _ = by_hand(small, tasks, args)
    phi, names = torch.sigmoid(effect), [name for name, _ in start.named_parameters()]
    shared = [k for k, name in enumerate(names) if name not in ("P_l", "P_v", "m")]
    rows = [[f * g for g in row] for f, row in zip(phi, rows)]
    flat = torch.stack([torch.cat([row[k].flatten() for k in shared]) for row in rows])
    direction = dict(zip(shared, (2 * common.cagrad(flat)).split([theta[k].numel() for k in shared])))
    for k, p in enumerate(theta):
        d = (direction[k].view_as(p) if k in direction else rows[0][k] + rows[1][k]) + 5e-4 * p
        assert (list(trained.parameters())[k] - (p - 0.05 * d)).abs().max() < 1e-4 * max(1, d.abs().max())


# --------------------------------------------------------------------------------------- the upper level, Eq. (10), (11)

def test_neumann_tends_to_the_inverse_and_stops_where_it_is_told():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 6, dtype=torch.double, generator=generator)
    H, v = x @ x.t() / 6 + 0.3 * torch.eye(6, dtype=torch.double), torch.randn(6, dtype=torch.double, generator=generator)
    hvp = lambda u: [part.view(p.shape) for part, p in zip((H @ torch.cat([q.flatten() for q in u])).split([2, 4]), u)]
    split = [v[:2].clone(), v[2:].reshape(2, 2).clone()]
    flat = lambda parts: torch.cat([q.flatten() for q in parts])
    assert torch.allclose(flat(jscpt.neumann(hvp, split, 4000, 0.2)), torch.linalg.solve(H, v), atol=1e-9)
    step = torch.eye(6, dtype=torch.double) - 0.2 * H
    series = 0.2 * (v + step @ v + step @ step @ v + step @ step @ step @ v)
    assert torch.allclose(flat(jscpt.neumann(hvp, split, 3, 0.2)), series, atol=1e-12)
    assert torch.equal(flat(jscpt.neumann(hvp, split, 0, 0.2)), 0.2 * v) and torch.equal(flat(split), v)


def test_the_hessian_product_of_the_real_model_agrees_with_central_differences(tiny):
    """Through both encoders of the built-in CLIP, in float32."""
    model, tasks = tiny[0], small_tasks("a", "b")
    common.seed_everything(3)
    prompts, texts = jscpt.build(settings(), model, tasks), jscpt.texts_of(settings(), tasks)
    batches = next(iter(common.image_batches(model, tasks, settings(batch_size=3), seed=1)))
    theta, phi = list(prompts.parameters()), torch.tensor([0.3, 0.6])
    v = [torch.randn_like(p) * p.detach().abs().mean().clamp(min=0.1) for p in theta]

    def gradient():
        return jscpt.scheduled_gradient(phi, jscpt.task_gradients(model, texts, prompts, batches)[0].values(), theta)

    def moved(step):
        with torch.no_grad():
            for p, direction in zip(theta, v):
                p += step * direction
    with sdpa_kernel(SDPBackend.MATH):
        grads, *_ = jscpt.task_gradients(model, texts, prompts, batches, create_graph=True)
    exact = torch.cat([h.flatten() for h in torch.autograd.grad(jscpt.scheduled_gradient(phi, grads.values(), theta), theta, v)])
    eps = 1e-4                                                                  # ten times that crosses a kink of the ReLU
    moved(eps)
    plus = gradient()
    moved(-2 * eps)
    difference = torch.cat([((a - b) / (2 * eps)).flatten() for a, b in zip(plus, gradient())])
    assert exact.norm() > 1e-3 and (exact - difference).norm() / exact.norm() < 1e-2


def test_the_implicit_gradient_agrees_with_finite_differences_where_the_inner_optimum_is_exact():
    """L_i = |A_i (s, o_i) - c_i|^2 / 2 of shared s and own o_i: theta* solves a linear system. The series is long."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.double, generator=generator)
    N, S, Q = 3, 3, 2
    A, c, E, f = draw(N, 8, S + Q), draw(N, 8), draw(N, 8, S + Q), draw(N, 8)
    omega = [draw(N), draw(N, N)]
    effect, affinity = torch.rand(N, dtype=torch.double, generator=generator), jscpt.affinity(draw(N, 4))
    losses = lambda s, o, A, c: (torch.einsum("nkp,np->nk", A, torch.cat([s.expand(N, S), o], dim=1)) - c).pow(2).sum(1) / 2

    def optimum(omega):
        """theta* of sum_i phi_i L_i from its normal equations, in one vector (s, o_1, .., o_N)."""
        place = torch.zeros(N, S + Q, S + N * Q, dtype=torch.double)            # (s, o_i) = place_i theta
        for i in range(N):
            place[i, :S, :S] = torch.eye(S)
            place[i, S:, S + i * Q:S + (i + 1) * Q] = torch.eye(Q)
        phi, B = jscpt.schedule(*omega, effect, affinity), A @ place
        solved = torch.linalg.solve(torch.einsum("n,nkp,nkq->pq", phi, B, B), torch.einsum("n,nkp,nk->p", phi, B, c))
        return solved[:S][None], solved[S:].view(N, Q)

    s, o = (x.requires_grad_() for x in optimum(omega))
    copies = [s.expand(N, S), o.expand(N, Q)]
    grads = torch.autograd.grad(losses(*copies, A, c).sum(), copies, create_graph=True)
    dev_grads = torch.autograd.grad(losses(s, o, E, f).sum(), [s, o])
    leaves = [x.clone().requires_grad_() for x in omega]
    found = jscpt.implicit_gradient([s, o], grads, dev_grads, jscpt.schedule(*leaves, effect, affinity), leaves, steps=20000, scale=0.02)
    dev = lambda omega: losses(*optimum(omega), E, f).sum().item()
    for k, x in enumerate(omega):
        for index in torch.cartesian_prod(*map(torch.arange, x.shape)).view(-1, x.dim()).tolist():
            both = []
            for step in (1e-5, -1e-5):
                changed = [y.clone() for y in omega]
                changed[k][tuple(index)] += step
                both.append(dev(changed))
            assert found[k][tuple(index)].item() == pytest.approx((both[0] - both[1]) / 2e-5, rel=1e-5, abs=1e-7)
    assert max(x.abs().max() for x in found) > 1e-3


def test_the_upper_step_follows_the_truncated_series_written_out(three):
    """Against plain autograd on losses computed a task at a time, and the derivative of sigma by hand."""
    model, tasks, prompts, batches = three
    args, dev = settings(), doubles(model, tasks, seed=2)
    effect = torch.tensor([0.6, 0.9, 0.7], dtype=torch.double)
    A = torch.tensor([[0.0, 0.3, -0.5], [0.8, 0.0, 0.1], [-1.0, 0.4, 0.0]], dtype=torch.double)
    alpha, beta, theta = prompts.alpha.clone(), prompts.beta.clone(), list(prompts.parameters())
    p_w, t_w = torch.sigmoid(alpha * effect), torch.sigmoid(torch.stack([beta[i] @ A[:, i] for i in range(3)]))
    with sdpa_kernel(SDPBackend.MATH):
        losses, _ = plain_losses(model, tasks, prompts, batches)
    g = torch.autograd.grad((p_w * t_w * losses).sum(), theta, create_graph=True)
    term = torch.autograd.grad(plain_losses(model, tasks, prompts, dev)[0].sum(), theta)
    total = term
    for _ in range(3):
        term = [t - 0.05 * h for t, h in zip(term, torch.autograd.grad(g, theta, term, retain_graph=True))]
        total = [a + t for a, t in zip(total, term)]
    dots = torch.stack([sum((0.05 * a * x).sum() for a, x in zip(total, torch.autograd.grad(loss, theta, retain_graph=True)))
                        for loss in losses])
    expected_alpha = -dots * p_w * (1 - p_w) * effect * t_w
    expected_beta = -(dots * p_w * t_w * (1 - t_w))[:, None] * A.t()
    upper = torch.optim.Adam([prompts.alpha, prompts.beta], lr=0.1)
    before = [p.clone() for p in theta]
    dev_losses = jscpt.upper_step(args, model, jscpt.texts_of(args, tasks), prompts, batches, dev, effect, A, upper)
    assert torch.allclose(prompts.alpha.grad, expected_alpha, rtol=1e-8)
    assert torch.allclose(prompts.beta.grad, expected_beta, rtol=1e-8)
    assert torch.allclose(prompts.alpha, alpha - 0.1 * expected_alpha.sign(), atol=1e-3)        # Adam's first step
    assert torch.allclose(dev_losses, plain_losses(model, tasks, prompts, dev)[0], atol=1e-10)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(theta, before))


def test_alpha_and_beta_move_every_m_steps_across_epochs(small, monkeypatch):
    """Epochs of 3 steps and M = 4: after steps 4, 8 and 12 of the training, in epochs 2, 3 and 4."""
    seen, upper_step = [], jscpt.upper_step
    monkeypatch.setattr(jscpt, "upper_step", lambda *words: seen.append(int(words[3].steps)) or upper_step(*words))
    prompts = jscpt.train(settings(upper_every=4, batch_size=2, epochs=4), small, small_tasks("a", "b"), Log(), seed=1)
    assert seen == [4, 8, 12] and prompts.steps == 12
    assert (prompts.alpha != 1).all() and (prompts.beta != 1).tolist() == [[False, True], [True, False]]


# ------------------------------------------------------------------------------------------------------ development images

def test_development_images_are_a_fifth_of_the_training_images_by_seed_and_never_test_images(small):
    tasks = small_tasks("a", "b")
    rest, held = jscpt.development(tasks, seed=1)
    for task, less, dev in zip(tasks, rest, held):
        assert len(dev.train) == 1 and sorted(less.train.items + dev.train.items) == sorted(task.train.items)
        assert not set(dev.train.items) & set(task.test.items)
    assert jscpt.development(tasks, seed=1)[1][0].train.items == held[0].train.items
    assert len({tuple(jscpt.development(tasks, seed)[1][0].train.items) for seed in range(9)}) > 1


def test_a_datasets_own_validation_images_serve_where_there_are_any(small):
    [task] = small_tasks("a")
    task.val = task.test.subset([0, 1])
    [rest], [dev] = jscpt.development([task], seed=1)
    assert rest.train is task.train and dev.train is task.val


def test_where_no_image_can_be_held_out_the_training_images_serve_and_one_line_says_so(small, capsys):
    tasks = small_tasks("a", "b")
    tasks[0].train = tasks[0].train.subset([0, 1, 2])                           # one a class
    rest, held = jscpt.development(tasks, seed=1)
    assert held[0].train.items == rest[0].train.items == tasks[0].train.items and len(held[1].train) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("a: no training image can be held out")
    assert math.isfinite(trained_log(small, tasks)["loss"])


def trained_log(model, tasks, **changes):
    log = Log()
    jscpt.train(settings(**changes), model, tasks, log, seed=1)
    return log.last


# ---------------------------------------------------------------------------------------------------------------- ablations

ABLATIONS = {"": (0, 2 + 4), "no_selection": (2 * 32, 2 + 4), "no_prompt_schedule": (0, 4), "no_task_schedule": (0, 2), "cagrad": (0, 2)}


@pytest.mark.parametrize("flag", ABLATIONS)
def test_an_ablation_removes_exactly_what_it_names(small, flag):
    """Counted: the masks, alpha or beta, and nothing else; the others start at the same values."""
    args, tasks = settings(**({flag: True} if flag else {}), batch_size=2), small_tasks("a", "b")
    common.seed_everything(1)
    whole = jscpt.build(settings(), small, tasks)
    common.seed_everything(1)
    prompts = jscpt.build(args, small, tasks)
    fewer, omega = ABLATIONS[flag]
    assert count(whole.parameters()) - count(prompts.parameters()) == fewer
    assert count(jscpt.omega_of(args, prompts).values()) == omega
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in prompts.named_parameters())
    trained = jscpt.train(args, small, tasks, Log(), seed=1)                    # 3 steps, an upper one after the second
    assert (trained.alpha == 1).all() == (flag == "no_prompt_schedule")
    assert (trained.beta == 1).all() == (flag in ("no_task_schedule", "cagrad"))
    assert (trained.m == 0).all() == (flag == "no_selection")


def test_a_factor_left_out_is_one():
    alpha, beta, effect, A = torch.tensor([0.3, 2.0]), torch.ones(2, 2), torch.tensor([0.6, 0.9]), torch.tensor([[0.0, -0.5], [0.25, 0.0]])
    def weights(**flags):
        omega = jscpt.omega_of(settings(**flags), types.SimpleNamespace(alpha=alpha, beta=beta))
        return jscpt.schedule(omega.get("alpha"), omega.get("beta"), effect, A)
    assert torch.equal(weights(), jscpt.schedule(alpha, beta, effect, A)) and torch.equal(weights(no_selection=True), weights())
    assert torch.equal(weights(no_prompt_schedule=True), torch.sigmoid(torch.tensor([0.25, -0.5])))
    assert all(torch.equal(weights(**{flag: True}), torch.sigmoid(alpha * effect)) for flag in ("no_task_schedule", "cagrad"))
    assert weights(no_prompt_schedule=True, no_task_schedule=True).tolist() == [1.0, 1.0]


def test_without_any_schedule_there_is_no_upper_step(small, monkeypatch):
    monkeypatch.setattr(jscpt, "upper_step", None)
    jscpt.train(settings(no_prompt_schedule=True, no_task_schedule=True, upper_every=1), small, small_tasks("a", "b"), Log(), seed=1)


@pytest.mark.parametrize("flag", ABLATIONS)
def test_every_ablation_trains_and_leaves_clip_alone(small, flag):
    before, flags = {k: v.clone() for k, v in small.state_dict().items()}, {flag: True} if flag else {}
    first = trained_log(small, small_tasks("a", "b"), lr=0.02, scale=0.02, **flags)["loss"]
    last = trained_log(small, small_tasks("a", "b"), lr=0.02, scale=0.02, epochs=30, upper_every=20, **flags)["loss"]
    assert last < 0.7 * first
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


# ------------------------------------------------------------------------------------------------------ what can go wrong

def test_one_task_says_what_the_schedule_does_and_trains(small, capsys):
    prompts = jscpt.train(settings(upper_every=1), small, small_tasks("a"), Log(), seed=1)
    assert "one task: the schedule" in capsys.readouterr().out and prompts.alpha != 1 and prompts.beta == 1


def test_nan_in_a_loss_stops_at_once_and_names_the_task_and_the_step(small, monkeypatch):
    losses_of, calls, log = jscpt.losses_of, [], Log()

    def spoilt(*words):
        losses, original = losses_of(*words)
        calls.append(1)
        return losses * torch.tensor([1.0, math.nan if len(calls) == 5 else 1.0]), original
    monkeypatch.setattr(jscpt, "losses_of", spoilt)
    with pytest.raises(common.UserError, match="the loss of b is nan at step 2 of epoch 2.*smaller --lr"):
        jscpt.train(settings(batch_size=2, epochs=4, upper_every=10), small, small_tasks("a", "b"), log, seed=1)
    assert len(calls) == 5 and math.isfinite(log.last["loss"])                  # the first epoch's checkpoint stays


def test_nan_on_the_development_images_stops_too(small, monkeypatch):
    monkeypatch.setattr(jscpt, "upper_step", lambda *words: torch.tensor([math.inf, 1.0]))
    with pytest.raises(common.UserError, match="the loss of a is inf on the development images after step 2 of epoch 1"):
        jscpt.train(settings(batch_size=2), small, small_tasks("a", "b"), Log(), seed=1)


@pytest.mark.parametrize("words, says", [
    (["--upper-every", 0], "--upper-every 0"), (["--terms", -1], "--terms -1"), (["--upper-lr", 0], "--upper-lr 0.0"),
    (["--upper-lr", "nan"], "--upper-lr nan"), (["--scale", -1], "--scale -1.0"),
    (["--cagrad", "--no-task-schedule"], "--no-task-schedule"), (["--clip", "RN50"], "RN50"),
    (["--n-ctx", 40], "80 context vectors")], ids=str)
def test_words_that_cannot_be_are_refused_before_anything_is_written(tree, tmp_path, words, says):
    out = tmp_path / "run"
    with pytest.raises(common.UserError, match=says):
        jscpt.main(["--data", str(tree), "--shots", "2", "--clip", "tiny", "--out", str(out), *map(str, words)])
    assert not out.exists()


def test_the_losses_run_on_cuda():
    from clip.model import CLIP
    from torch._subclasses.fake_tensor import FakeTensorMode
    tasks = small_tasks("a", "b")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, prompts = CLIP(**TINY).eval(), jscpt.MTVLP(2, 2, 64, 64, 3, torch.eye(32))
            batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)) for _ in "ab"]
        losses, original = jscpt.losses_of(model, jscpt.texts_of(settings(), tasks), prompts.copies(), batches)
        assert losses.device.type == original.device.type == "cuda" and losses.shape == (2,)
        A = jscpt.affinity(torch.randn(2, 5, device="cuda"))
        phi = jscpt.schedule(prompts.alpha, prompts.beta, jscpt.causal_effect(original, losses), A)
        assert phi.device.type == "cuda"


def test_figures_and_log_show_the_schedule(tmp_path):
    data = make_tree(tmp_path / "shapes", {f"{d}/{c}": 5 for d in ("drawn", "painted", "cut") for c in ("cup", "hat")})
    done = run_script("jscpt.py", "--data", data, "--shots", 3, "--clip", "tiny", "--epochs", 2, "--n-ctx", 2, "--batch-size", 2,
                      "--upper-every", 2, "--plot", "--out", tmp_path / "run")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "12 more numbers, alpha and beta" in done.stdout
    assert all((tmp_path / "run" / f"{name}-1.png").stat().st_size > 3000 for name in ("causal", "schedule", "affinity"))
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    steps = len(json.loads(rows[0]["batch_effect"])[0])
    assert [len(json.loads(rows[1][key])) for key in ("losses", "effect", "phi", "affinity", "alpha", "beta", "batch_phi")] == [3] * 7
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["schedule_parameters"] == [12] and steps == 3
    assert result["alpha"][0] == pytest.approx(json.loads(rows[-1]["alpha"]), abs=1e-4) != [1.0, 1.0, 1.0]
    assert sum(json.loads(rows[0]["losses"])) == pytest.approx(float(rows[0]["loss"]), abs=1e-3)
