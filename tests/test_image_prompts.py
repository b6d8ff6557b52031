"""VPT-MT and MaPLe-MT: parameters, gradients by the formula, and batches that mix tasks without mixing them up."""
import types

import pytest
import torch
from conftest import VIT_B16, Log, random_clip, small_tasks

import common

vpt, maple = common.load_method("vpt_mt"), common.load_method("maple_mt")
SETTINGS = dict(n_ctx=3, depth=None, single_task=False, epochs=1, lr=0.1, batch_size=6, views=1, min_crop=0.6)


def settings(**changes):
    return types.SimpleNamespace(**dict(SETTINGS, **changes))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_at_vit_b16():
    assert count(vpt.ImagePrompts(12, 1, 16, 768)) == 147_456
    assert count(maple.CoupledPrompts(12, 16, 512, 768)) == 4_826_112
    assert count(maple.CoupledPrompts(9, 2, 512, 768)) == 3_555_072


def test_build_takes_depth_length_and_number_of_sets_from_the_settings(small):
    tasks = small_tasks("a", "b")
    assert vpt.build(settings(), small, tasks).image_prompts().shape == (3, 1, 3, 64)
    assert vpt.build(settings(single_task=True), small, tasks).image_prompts().shape == (3, 2, 3, 64)
    assert maple.build(settings(depth=2), small, tasks).image_prompts().shape == (2, 1, 3, 64)
    assert maple.build(settings(single_task=True), small, tasks).text_prompts().shape == (3, 2, 3, 64)


def test_short_maple_prompts_start_at_the_words_a_photo_of_a(small):
    prompts = maple.build(settings(n_ctx=2), small, small_tasks("a"))
    words = common.tokenize(["a photo"])[0, 1:3]
    assert torch.equal(prompts.text_prompts()[0, 0], small.token_embedding.weight[words])
    assert maple.build(settings(n_ctx=5), small, small_tasks("a")).text_prompts()[0].std().item() == pytest.approx(0.02, rel=0.2)


def test_maple_couples_every_layer_and_normalises_the_first(small):
    """F_k(P_k) = P_k W_k^T + c_k by hand; the first layer's through CLIP's ln_pre."""
    one = maple.build(settings(), small, small_tasks("a")).sets[0]
    for k, (made, coupling, source) in enumerate(zip(one.image_prompts(), one.F, one.P)):
        by_hand = (source[:, None] * coupling.weight[None]).sum(-1) + coupling.bias
        if k == 0:
            centred = by_hand - by_hand.mean(-1, keepdim=True)
            by_hand = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * small.visual.ln_pre.weight + small.visual.ln_pre.bias
        assert (made - by_hand).abs().max() < 1e-5
    assert not any("ln_pre" in name for name, _ in one.named_parameters())


def cross_entropy_by_hand(model, task, batch, text_prompts, image_prompts):
    """MmAP's Eq. (5) for one task alone."""
    x, y = batch
    n = 0 if text_prompts is None else text_prompts.shape[-2]
    w = common.encode_text(model, common.tokenize(task.class_names, n, task.template if n == 0 else "{}"), text_prompts)
    x = common.encode_image(model, x, image_prompts)
    cosine = (x[:, None] * w[None]).sum(-1) / x.norm(dim=-1)[:, None] / w.norm(dim=-1)
    p = (model.logit_scale.exp() * cosine).exp()
    return -(p[range(len(y)), y] / p.sum(-1)).log().mean()


@pytest.mark.parametrize("method", [vpt, maple], ids=["vpt_mt", "maple_mt"])
@pytest.mark.parametrize("single", [False, True], ids=["multi-task", "single-task"])
def test_the_first_step_is_gradient_descent_on_the_sum_of_the_tasks_losses_computed_one_by_one(small, method, single):
    args, tasks, log = settings(single_task=single), small_tasks("a", "b"), Log()
    trained = torch.cat([p.detach().flatten() for p in method.train(args, small, tasks, log, seed=1).parameters()])
    common.seed_everything(1)
    start = method.build(args, small, tasks)
    common.seed_everything(1, 1)
    [batches] = common.image_batches(small, tasks, args, seed=1)
    text = start.text_prompts() if method is maple else None
    losses = [cross_entropy_by_hand(small, task, batch, None if text is None else text[:, i * single], start.image_prompts()[:, i * single])
              for i, (task, batch) in enumerate(zip(tasks, batches))]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses), list(start.parameters()))])
    before = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert (trained - (before - 0.1 * (gradient + 5e-4 * before))).abs().max() < 1e-5
    assert (trained - before).abs().max() > 1e-3
    assert log.last["loss"] == pytest.approx(sum(losses).item(), rel=1e-5)


@pytest.mark.parametrize("method", [vpt, maple], ids=["vpt_mt", "maple_mt"])
def test_training_lowers_the_loss_and_leaves_clip_alone(small, method):
    before, first, last = {k: v.clone() for k, v in small.state_dict().items()}, Log(), Log()
    method.train(settings(epochs=1, lr=0.03), small, small_tasks("a", "b"), first, seed=1)
    method.train(settings(epochs=25, lr=0.03), small, small_tasks("a", "b"), last, seed=1)
    assert last.last["loss"] < 0.9 * first.last["loss"]
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize("method", [vpt, maple], ids=["vpt_mt", "maple_mt"])
def test_single_task_prompts_trained_in_one_pass_do_not_touch_each_other(small, method):
    args, tasks = settings(single_task=True, epochs=2), small_tasks("a", "b")
    together = method.train(args, small, tasks, Log(), seed=1).image_prompts().detach()
    tasks[1].train.labels = [2, 2, 2, 0, 0, 0]
    other = method.train(args, small, tasks, Log(), seed=1).image_prompts().detach()
    assert (together[:, 0] - other[:, 0]).abs().max() < 1e-6 and (together[:, 1] - other[:, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("method", [vpt, maple], ids=["vpt_mt", "maple_mt"])
def test_the_loss_runs_on_cuda(method):
    from clip.model import CLIP
    from conftest import TINY
    from torch._subclasses.fake_tensor import FakeTensorMode
    args, tasks = settings(single_task=True), small_tasks("a", "b")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = CLIP(**TINY).eval()
            prompts = vpt.ImagePrompts(3, 2, 3, 64) if method is vpt else maple.Prompts([maple.CoupledPrompts(3, 3, 64, 64) for _ in "ab"])
            batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)) for _ in "ab"]
        texts = maple.texts_of(args, tasks) if method is maple else common.zero_shot(model, tasks)
        assert method.loss_of(model, texts, prompts, batches).device.type == "cuda"


def test_views_are_fixed_by_number_or_fresh_and_depend_on_nothing_else(small):
    tasks = small_tasks("a", "b")
    tasks[0].train = tasks[0].train.subset([0])             # one image, so that every step shows it

    def shown(views, epochs=8):
        seen = []
        for epoch in range(epochs):
            common.seed_everything(1, epoch)
            seen += [batches[0][0][0] for batches in common.image_batches(small, tasks, settings(views=views, batch_size=2), seed=1)]
        return torch.stack(seen).unique(dim=0)
    assert len(shown(1)) == 1 and 2 <= len(shown(3)) <= 3 and len(shown(0)) == 24
    assert torch.equal(shown(3), shown(3))
    fixed = {tuple(view.flatten()[:50].tolist()) for view in shown(1)}
    assert fixed <= {tuple(view.flatten()[:50].tolist()) for view in shown(3)}       # view 0 is view 0


def test_a_batch_of_two_tasks_equals_each_task_alone(small):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(2, 2, 3, 64, generator=generator)
    batches = [(torch.randn(n, 3, 32, 32, generator=generator), torch.zeros(n)) for n in (2, 3)]
    together = common.encode_batches(small, batches, prompts)
    for i, (x, _) in enumerate(batches):
        assert (together[i] - common.encode_image(small, x, prompts[:, i])).abs().max() < 1e-5
    shared = common.encode_batches(small, batches, prompts[:, :1])
    assert (shared[1] - common.encode_image(small, batches[1][0], prompts[:, 0])).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vpt_mt", "maple_mt", "mmap"])
def test_a_step_at_vit_b16_with_65_classes_and_four_tasks_runs_on_a_cpu(name):
    from conftest import noise
    model, method = random_clip(**VIT_B16), common.load_method(name)
    names = [f"class number {i}" for i in range(65)]
    images = common.Images(range(4), [0, 20, 40, 64], lambda i: noise(i, 224))
    tasks = [common.Task(t, names, "a photo of a {}", images, images) for t in "abcd"]
    args = settings(n_ctx=16, batch_size=4, views=0, grouping="gradient", prompt="mmap", groups=2, no_specific=False)
    log = Log()
    method.train(args, model, tasks, log, seed=1)
    assert 0 < log.last["loss"] < 400
