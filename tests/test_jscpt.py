"""JSCPT: selection, the schedule, both levels of the optimization, and the ablations."""

import copy
import math
import types

import pytest
import torch
import torch.nn.functional as F
from bench_memory import Memory, prepared
from conftest import TINY, Phases, small_tasks
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import data as datasets

jscpt = common.load_method("jscpt")


def settings(**changes):
    usual = dict(
        n_ctx=2,
        epochs=1,
        lr=0.05,
        batch_size=6,
        views=1,
        min_crop=0.6,
        upper_every=2,
        upper_lr=0.1,
        terms=3,
        scale=0.05,
        workers=0,
    )
    return jscpt.Args(**dict(usual, **changes))


def count(tensors):
    return sum(x.numel() for x in tensors)


def batch_of(model, tasks, seed):
    """(images, labels, task) of a step with 4 images per task."""
    common.seed_everything(seed)
    return next(iter(common.batches(settings(batch_size=4), model, tasks)))


def world(small, n):
    """(model, n tasks, prompts away from their initial values, a batch) in float64; 3 to 6 classes.
    """
    tasks = small_tasks(*"abcdefghij"[:n])
    for t, task in enumerate(tasks):
        task.class_names = [f"{'very ' * t}long name {k}" for k in range(3 + t % 4)]
    common.seed_everything(1)
    prompts = jscpt.build(settings(), small, tasks)
    for parameter in (prompts.m, prompts.W_2, prompts.b_1, prompts.b_2):
        parameter.data.normal_(std=0.1)
    prompts.alpha.normal_()
    prompts.beta.normal_()
    model = copy.deepcopy(small).double()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = torch.nn.LayerNorm  # CLIP's own computes in float32
    images, labels, task = batch_of(small, tasks, seed=1)
    return model, tasks, prompts.double(), (images.double(), labels, task)


@pytest.fixture
def three(small):
    return world(small, 3)


def plain_losses(model, tasks, prompts, batch):
    """(selected [N], original [N]), task by task, from the module's own parameters."""

    def mlp(z):
        hidden = (z @ prompts.W_1[0].t() + prompts.b_1[0]).relu()
        return z + hidden @ prompts.W_2[0].t() + prompts.b_2[0]

    selected, original, (images, labels, task) = [], [], batch
    for i, one in enumerate(tasks):
        text = torch.cat([prompts.P_l_shared[0], prompts.P_l[i]])[None]
        image = torch.cat([prompts.P_v_shared[0], prompts.P_v[i]], dim=1)
        w = common.encode_text(model, common.tokenize(one.class_names, text.shape[1]), text)
        x, y = common.encode_image(model, images[task == i], image), labels[task == i]
        masked = prompts.m[i].sigmoid() * x
        x_bar = mlp(masked + mlp(masked))
        selected.append(F.cross_entropy(common.logits(model, x_bar, w), y))
        original.append(F.cross_entropy(common.logits(model, x, w), y))
    return torch.stack(selected), torch.stack(original)


# ------------------------------------------------------------------------- prompts and Eq. (2), (3)

def test_parameters_at_vit_b16_and_their_start(vit_b16):
    """At the start, selection leaves the features unchanged."""
    prompts = jscpt.build(settings(n_ctx=16), vit_b16, small_tasks(*"abcd"))
    assert count(prompts.parameters()) == 813_600  # 0.2034 M per task: the paper's 0.203 M
    assert count(jscpt.omega_of(settings(), prompts).values()) == 4 + 16    # counted separately
    assert not prompts.alpha.requires_grad and not prompts.beta.requires_grad
    assert prompts.alpha.eq(1).all() and prompts.beta.eq(1).all()
    assert (torch.sigmoid(prompts.m) == 0.5).all()
    x = torch.randn(4, 512)
    assert torch.equal(jscpt.select(prompts.copies(), x, torch.arange(4)), x)


def test_selection_by_hand():
    """MLP(z) = z + 2 relu(z) + (1, 0): masked (1, -2) -> (4, -2) -> sum (5, -4) -> (16, -4)."""
    eye = torch.eye(2)[None]
    theta = dict(m=torch.zeros(1, 2), W_1=eye, b_1=torch.zeros(1, 2), W_2=2 * eye,
                 b_2=torch.tensor([[1.0, 0.0]]))
    x = torch.tensor([[2.0, -4.0]])
    assert jscpt.select(theta, x, 0).tolist() == [[16.0, -4.0]]


def test_losses_of_all_tasks_in_one_pass_equal_those_computed_one_by_one(three):
    model, tasks, prompts, batch = three
    losses = jscpt.losses_at(model, jscpt.texts_of(settings(), tasks), prompts.copies(), batch)
    selected, plain = plain_losses(model, tasks, prompts, batch)
    assert torch.allclose(losses, selected, atol=1e-10)
    assert not torch.allclose(losses, plain, atol=1e-3)


# ----------------------------------------------------------------------------------- Eq. (4) to (6)

def test_causal_effect_by_hand():
    """No gain: sigma(1); a gain of ln 2: sigma(2); a loss of ln 2: sigma(1/2); hopeless: 1/2."""
    gain = torch.tensor([0.0, math.log(2), -math.log(2), -200.0, 200.0], dtype=torch.double)
    effect = jscpt.causal_effect(1 + gain, torch.ones(5, dtype=torch.double))
    assert effect.tolist() == pytest.approx([0.7310586, 0.8807971, 0.6224593, 0.5, 1.0])


def test_a_task_weighs_more_where_selection_lowers_its_loss():
    """Task 0's loss falls by ln 2: sigma(2). Task 1's rises by as much: sigma(1/2)."""
    losses = torch.tensor([1.0, 2.0])
    original = losses + math.log(2) * torch.tensor([1.0, -1.0])
    ones, grads = torch.ones(2, 2), torch.zeros(2, 5)
    effect, A, phi = jscpt.weigh(original, losses, grads, ones[0], ones)
    assert effect.tolist() == pytest.approx([0.8807971, 0.6224593])
    assert not A.any()
    assert phi.tolist() == pytest.approx([0.7069874 / 2, 0.6507777 / 2])


def test_affinity_by_hand():
    """g = (2, 0), (1, 1), (-1, 0).

    A[0, 1] = 2 / 2, A[1, 0] = 2 / 4, A[0, 2] = -2 / 1 -> -1, A[2, 0] = -2 / 4, A[2, 1] = -1 / 2.
    """
    grads = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    assert jscpt.affinity(grads).tolist() == [[0.0, 1.0, -1.0], [0.5, 0.0, -1.0], [-0.5, -0.5, 0.0]]
    assert jscpt.affinity(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).eq(0).all()


def test_schedule_by_hand():
    """A row of beta, a column of the affinity: phi_0 = sigma(2 * 0.5) sigma(3 * 0.25 + 0),
    phi_1 = sigma(-1 * 1) sigma(4 * -0.5 + 0)."""
    sigma = lambda x: 1 / (1 + math.exp(-x))
    alpha = torch.tensor([2.0, -1.0])
    beta = torch.tensor([[9.0, 3.0], [4.0, 9.0]])
    effect = torch.tensor([0.5, 1.0])
    A = torch.tensor([[0.0, -0.5], [0.25, 0.0]])
    phi = jscpt.schedule(alpha, beta, effect, A)
    assert phi.tolist() == pytest.approx([sigma(1) * sigma(0.75), sigma(-1) * sigma(-2)])


# ------------------------------------------------------------------------- the lower level, Eq. (9)

def test_one_backward_pass_gives_every_tasks_gradient(three):
    model, tasks, prompts, batch = three
    copies, texts = prompts.copies(), jscpt.texts_of(settings(), tasks)
    names, theta = zip(*prompts.named_parameters())
    total = jscpt.losses_at(model, texts, copies, batch).sum()
    grads = torch.autograd.grad(total, [copies[name] for name in names])
    losses, _ = plain_losses(model, tasks, prompts, batch)
    for i in range(3):
        alone = torch.autograd.grad(losses[i], theta, retain_graph=True)
        for g, own in zip(grads, alone):
            assert (g[i] - own[0 if len(own) == 1 else i]).abs().max() < 1e-9
    assert not torch.allclose(grads[0][0], grads[0][1])


def by_hand(model, tasks, args):
    """One epoch of one step: the initial prompts, and the quantities in Eq. (9)."""
    common.seed_everything("start")
    start = jscpt.build(args, model, tasks)
    common.seed_everything("test", "train", 0)
    [batch] = common.batches(args, model, datasets.with_held_out(tasks, 1))
    losses, original = plain_losses(model, tasks, start, batch)
    theta = list(start.parameters())
    rows = []
    for loss in losses:
        rows.append(torch.autograd.grad(loss, theta, retain_graph=True, allow_unused=True))
    shared = torch.stack([torch.cat([row[0].flatten(), row[1].flatten()]) for row in rows])
    effect = 1 / (1 + torch.exp(-torch.exp(original - losses).detach()))
    return start, theta, rows, shared, effect, losses


def test_training_takes_the_step_of_eq_9(small):
    args, tasks, run = settings(), small_tasks("a", "b"), Phases()
    common.seed_everything("start")
    trained = list(jscpt.train(args, small, tasks, run).parameters())
    start, theta, rows, g, effect, losses = by_hand(small, tasks, args)
    dot = g[0] @ g[1]
    A = torch.tensor([[0, dot / (g[1] @ g[1])], [dot / (g[0] @ g[0]), 0]]).clamp(-1, 1)
    phi = torch.sigmoid(effect) * torch.sigmoid(A.sum(0))
    for k, p in enumerate(theta):
        direction = sum(f * row[k] for f, row in zip(phi, rows)) + 5e-4 * p
        close = 1e-5 * max(1, direction.abs().max())
        assert (trained[k] - (p - 0.05 * direction)).abs().max() < close
    assert run.logged[0]["loss"].item() == pytest.approx(losses.sum().item(), rel=1e-5)
    assert torch.allclose(run.logged[0]["phi"], phi, atol=1e-4)


def test_cagrad_replaces_the_sum_on_shared_parameters_and_the_task_factor(small):
    args, tasks = settings(cagrad=True), small_tasks("a", "b")
    common.seed_everything("start")
    trained = list(jscpt.train(args, small, tasks, Phases()).parameters())
    start, theta, rows, _, effect, _ = by_hand(small, tasks, args)
    phi, names = torch.sigmoid(effect) / 2, [name for name, _ in start.named_parameters()]
    shared = [k for k, name in enumerate(names) if name not in ("P_l", "P_v", "m")]
    rows = [[f * g for g in row] for f, row in zip(phi, rows)]
    flat = torch.stack([torch.cat([row[k].flatten() for k in shared]) for row in rows])
    parts = (2 * common.cagrad(flat)).split([theta[k].numel() for k in shared])
    direction = dict(zip(shared, parts))
    for k, p in enumerate(theta):
        d = direction[k].view_as(p) if k in direction else rows[0][k] + rows[1][k]
        d = d + 5e-4 * p
        assert (trained[k] - (p - 0.05 * d)).abs().max() < 1e-4 * max(1, d.abs().max())


# ------------------------------------------------------------------ the upper level, Eq. (10), (11)

def test_neumann_converges_to_the_inverse_and_stops_after_the_given_terms():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 6, dtype=torch.double, generator=generator)
    H = x @ x.t() / 6 + 0.3 * torch.eye(6, dtype=torch.double)
    v = torch.randn(6, dtype=torch.double, generator=generator)
    split = [v[:2].clone(), v[2:].reshape(2, 2).clone()]
    flat = lambda parts: torch.cat([q.flatten() for q in parts])

    def hvp(u):
        parts = (H @ flat(u)).split([2, 4])
        return [part.view(p.shape) for part, p in zip(parts, u)]

    limit = flat(jscpt.neumann(hvp, split, 4000, 0.2))
    assert torch.allclose(limit, torch.linalg.solve(H, v), atol=1e-9)
    step = torch.eye(6, dtype=torch.double) - 0.2 * H
    series = 0.2 * (v + step @ v + step @ step @ v + step @ step @ step @ v)
    assert torch.allclose(flat(jscpt.neumann(hvp, split, 3, 0.2)), series, atol=1e-12)
    assert torch.equal(flat(jscpt.neumann(hvp, split, 0, 0.2)), 0.2 * v)
    assert torch.equal(flat(split), v)


def test_the_implicit_gradient_agrees_with_finite_differences_where_the_inner_optimum_is_exact():
    """L_i = |A_i (s, o_i) - c_i|^2 / 2 with shared s, per-task o_i: theta* solves a linear system.
    """
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.double, generator=generator)
    N, S, Q = 3, 3, 2
    A, c = draw(N, 40, S + Q), draw(N, 40)
    E, f = draw(N, 40, S + Q), draw(N, 40)
    omega = [draw(N), draw(N, N)]
    effect = torch.rand(N, dtype=torch.double, generator=generator)
    affinity = jscpt.affinity(draw(N, 4))

    def losses(s, o, A, c):
        theta = torch.cat([s.expand(N, S), o], dim=1)
        return (torch.einsum("nkp,np->nk", A, theta) - c).pow(2).sum(1) / 2

    def optimum(omega):
        """theta* of sum_i phi_i L_i from its normal equations, in one vector (s, o_1, .., o_N)."""
        place = torch.zeros(N, S + Q, S + N * Q, dtype=torch.double)  # (s, o_i) = place_i theta
        for i in range(N):
            place[i, :S, :S] = torch.eye(S)
            place[i, S:, S + i * Q : S + (i + 1) * Q] = torch.eye(Q)
        phi, B = jscpt.schedule(*omega, effect, affinity), A @ place
        solved = torch.linalg.solve(
            torch.einsum("n,nkp,nkq->pq", phi, B, B), torch.einsum("n,nkp,nk->p", phi, B, c)
        )
        return solved[:S][None], solved[S:].view(N, Q)

    s, o = (x.requires_grad_() for x in optimum(omega))
    leaves = [x.clone().requires_grad_() for x in omega]
    found = jscpt.implicit_gradient(
        [s, o],
        [lambda i=i: losses(s, o, A, c)[i] for i in range(N)],
        [lambda i=i: losses(s, o, E, f)[i] for i in range(N)],
        jscpt.schedule(*leaves, effect, affinity),
        leaves,
        steps=300,
        scale=0.02,
    )
    dev = lambda omega: losses(*optimum(omega), E, f).sum().item()
    for k, x in enumerate(omega):
        for index in torch.cartesian_prod(*map(torch.arange, x.shape)).view(-1, x.dim()).tolist():
            both = []
            for step in (1e-5, -1e-5):
                changed = [y.clone() for y in omega]
                changed[k][tuple(index)] += step
                both.append(dev(changed))
            assert found[k][tuple(index)].item() == pytest.approx(
                (both[0] - both[1]) / 2e-5, rel=1e-5, abs=1e-7
            )
    assert max(x.abs().max() for x in found) > 1e-3


@pytest.mark.parametrize("n", [2, 4, 10])
def test_the_upper_step_follows_the_truncated_series_written_out(small, n):
    """Against plain autograd on the graph of all tasks; the derivative of sigma by hand."""
    dtype = torch.double
    model, tasks, prompts, batch = world(small, n)
    images, labels, task = batch_of(small, tasks, seed=2)
    args, dev = settings(), (images.to(dtype), labels, task)
    effect, A = torch.rand(n, dtype=dtype), torch.rand(n, n, dtype=dtype).mul(2).sub(1)
    A.fill_diagonal_(0)
    alpha, theta = prompts.alpha.clone(), list(prompts.parameters())
    p_w = torch.sigmoid(alpha * effect)
    t_w = torch.sigmoid(torch.stack([prompts.beta[i] @ A[:, i] for i in range(n)]))
    with sdpa_kernel(SDPBackend.MATH):
        losses, _ = plain_losses(model, tasks, prompts, batch)
    g = torch.autograd.grad((p_w * t_w * losses).sum(), theta, create_graph=True)
    term = total = torch.autograd.grad(plain_losses(model, tasks, prompts, dev)[0].sum(), theta)
    for _ in range(3):
        products = torch.autograd.grad(g, theta, term, retain_graph=True)
        term = [t - 0.05 * h for t, h in zip(term, products)]
        total = [a + t for a, t in zip(total, term)]
    rows = [torch.autograd.grad(loss, theta, retain_graph=True) for loss in losses]
    dots = torch.stack([sum((0.05 * a * x).sum() for a, x in zip(total, row)) for row in rows])
    expected_alpha = -dots * p_w * (1 - p_w) * effect * t_w
    expected_beta = -(dots * p_w * t_w * (1 - t_w))[:, None] * A.t()
    upper = torch.optim.Adam([prompts.alpha, prompts.beta], lr=0.1)
    before = [p.clone() for p in theta]
    texts = jscpt.texts_of(args, tasks)
    jscpt.upper_step(args, model, texts, prompts, batch, dev, effect, A, upper)
    for x, expected in ((prompts.alpha, expected_alpha), (prompts.beta, expected_beta)):
        assert (x.grad - expected).norm() < 1e-10 * expected.norm()
    adam = alpha - 0.1 * expected_alpha.sign()      # its first step
    assert torch.allclose(prompts.alpha, adam, atol=1e-3)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(theta, before))


def test_the_peak_of_an_upper_step_does_not_grow_with_the_tasks():
    """Five times the tasks, each with as many classes and images: one graph is alive at a time."""
    peaks = []
    for n in (2, 10):
        with Memory() as memory:
            step = prepared("jscpt upper", dict(TINY, image_resolution=16), [20] * n, 6)
            weights = memory.peak = memory.now
            step()
        peaks.append(memory.peak - weights)
    assert peaks[1] < 1.15 * peaks[0]


def test_a_task_without_images_takes_no_part_in_an_upper_step(three):
    """Its alpha and its row of beta have no gradient; those of the other tasks have one."""
    model, tasks, prompts, (images, labels, task) = three
    there = task < 2
    batch = images[there], labels[there], task[there]
    upper = torch.optim.Adam([prompts.alpha, prompts.beta])
    texts, effect = jscpt.texts_of(settings(), tasks), torch.full((3,), 0.7, dtype=torch.double)
    jscpt.upper_step(settings(), model, texts, prompts, batch, batch, effect,
                     torch.rand(3, 3, dtype=torch.double), upper)
    assert (prompts.alpha.grad != 0).tolist() == [True, True, False]
    assert (prompts.beta.grad != 0).any(dim=1).tolist() == [True, True, False]


def test_alpha_and_beta_move_every_m_steps_across_epochs(small, monkeypatch):
    """Epochs of 3 steps and M = 4: after steps 4, 8 and 12, in epochs 2, 3 and 4."""
    seen, run, upper_step = [], Phases(), jscpt.upper_step
    before = lambda: sum("phi" in row for row in run.logged)

    def noted(*given):
        seen.append(before() + 1)
        upper_step(*given)

    monkeypatch.setattr(jscpt, "upper_step", noted)
    args = settings(upper_every=4, batch_size=2, epochs=4)
    prompts = jscpt.train(args, small, small_tasks("a", "b"), run)
    assert seen == [4, 8, 12] and before() == 12
    assert (prompts.alpha != 1).all()
    assert (prompts.beta != 1).tolist() == [[False, True], [True, False]]


# ------------------------------------------------------------------------------- development images

def test_development_images_are_held_out_and_are_not_augmented(small):
    tasks = datasets.with_held_out(small_tasks("a", "b"), 1)
    development = jscpt.Development(settings(), small, tasks)
    images, labels, task = development.batch()
    assert task.tolist() == [0, 1] and labels.tolist() == [t.val.labels[0] for t in tasks]
    plain = [pixels for t in tasks for pixels, _ in datasets.in_order(t.val, 32)]
    assert torch.equal(images, datasets.normalise(torch.cat(plain)))


def test_if_no_image_can_be_held_out_training_images_are_used_and_a_line_says_so(small, capsys):
    tasks = small_tasks("a", "b")
    tasks[0].train = tasks[0].train.subset([0, 1, 2])  # one per class
    development = jscpt.Development(settings(), small, datasets.with_held_out(tasks, 1))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("a: no training image can be held out")
    assert sorted(development.labels[0]) == [0, 1, 2]


def test_dev_shots_come_from_outside_the_training_split_and_leave_the_test_set():
    tasks = small_tasks("a")
    [task] = jscpt.set_aside(settings(dev_shots=1), tasks, 1)
    assert sorted(task.val.labels) == [0, 1, 2]
    assert len(task.test) == 3
    assert sorted(task.val.items + task.test.items) == sorted(tasks[0].test.items)
    assert task.train is tasks[0].train and jscpt.set_aside(settings(), tasks, 1) is tasks
    others = [jscpt.set_aside(settings(dev_shots=1), tasks, seed)[0] for seed in range(9)]
    assert len({tuple(other.val.items) for other in others}) > 1
    [held_out] = jscpt.set_aside(settings(dev_shots=1, validate=True), tasks, 1)
    assert held_out is tasks[0]                     # under --validate no other images are used
    tasks[0].unused = tasks[0].train.subset([0, 1, 2])
    [unused] = jscpt.set_aside(settings(dev_shots=1), tasks, 1)
    assert sorted(unused.val.items) == sorted(tasks[0].unused.items)
    assert unused.test is tasks[0].test
    tasks[0].unused = None
    [most] = jscpt.set_aside(settings(dev_shots=4), tasks, 1)
    assert len(most.test) == 3 and sorted(most.test.labels) == [0, 1, 2]  # each class keeps one


# ---------------------------------------------------------------------------------------- ablations

ABLATIONS = {
    "": (0, 2 + 4),
    "selection": (2 * 32, 2 + 4),
    "prompt_schedule": (0, 4),
    "task_schedule": (0, 2),
    "cagrad": (0, 2),
}


def ablated(flag, **changes):
    """The settings of an ablation: `cagrad` is switched on, the others off."""
    return settings(**({flag: flag == "cagrad"} if flag else {}), **changes)


@pytest.mark.parametrize("flag", ABLATIONS)
def test_an_ablation_removes_exactly_what_it_names(small, flag):
    """By count: the masks, alpha or beta, and nothing else; the rest has the same initial values.
    """
    args, tasks = ablated(flag, batch_size=2, epochs=2), small_tasks("a", "b")
    common.seed_everything(1)
    whole = jscpt.build(settings(), small, tasks)
    common.seed_everything(1)
    prompts = jscpt.build(args, small, tasks)
    fewer, omega = ABLATIONS[flag]
    assert count(whole.parameters()) - count(prompts.parameters()) == fewer
    assert count(jscpt.omega_of(args, prompts).values()) == omega
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in prompts.named_parameters())
    trained = jscpt.train(args, small, tasks, Phases())  # an upper step every second step
    assert (trained.alpha == 1).all() == (flag == "prompt_schedule")
    assert (trained.beta == 1).all() == (flag in ("task_schedule", "cagrad"))
    assert (trained.m == 0).all() == (flag == "selection")


def test_an_ablated_factor_is_fixed_at_its_initial_value():
    """At the start, with the effect sigma(1) and no affinity yet, no ablation changes phi."""
    effect, A = torch.full((2,), 1 / (1 + math.exp(-1))), torch.zeros(2, 2)
    state = types.SimpleNamespace(alpha=torch.ones(2), beta=torch.ones(2, 2))
    for flag in ABLATIONS:
        omega = jscpt.omega_of(ablated(flag), state)
        phi = jscpt.schedule(omega.get("alpha"), omega.get("beta"), effect, A)
        assert phi.tolist() == pytest.approx([0.5 / (1 + math.exp(-effect[0].item()))] * 2)


def test_without_any_schedule_there_is_no_upper_step(small, monkeypatch):
    monkeypatch.setattr(jscpt, "upper_step", None)
    args = settings(prompt_schedule=False, task_schedule=False, upper_every=1)
    jscpt.train(args, small, small_tasks("a", "b"), Phases())


# -------------------------------------------------------------------- one task, and absent tasks

def test_one_task_alone_trains(small):
    """There is no affinity: alpha moves, beta has no gradient, CAGrad has nothing to combine."""
    for changes in ({}, dict(cagrad=True)):
        args = settings(upper_every=1, epochs=2, **changes)
        prompts = jscpt.train(args, small, small_tasks("a"), Phases())
        assert prompts.alpha != 1 and prompts.beta == 1 and prompts.affinity.eq(0).all()
        assert all(p.isfinite().all() for p in prompts.parameters())


def test_a_task_without_images_in_a_mixed_batch_is_left_out_of_the_log(small):
    run = Phases()
    args = settings(batches="mixed", batch_size=1, upper_every=100)
    jscpt.train(args, small, small_tasks("a", "b"), run)
    for key in ("losses", "effect", "phi"):
        rows = [row[key] for row in run.logged if key in row]
        assert all(row.isfinite().sum() == 1 for row in rows)
        assert torch.stack(rows).isnan().any(0).all()
    prompts = run.parts["train"]["prompts"]
    assert torch.allclose(prompts.phi, torch.stack(rows).nanmean(0))
