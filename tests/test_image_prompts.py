"""VPT-MT and MaPLe-MT: parameters, gradients by the formula, and batches of several tasks."""

import pytest
import torch
from conftest import VIT_B16, Phases, noise, random_clip, small_tasks

import common

vpt, maple = common.load_method("vpt_mt"), common.load_method("maple_mt")
METHODS = pytest.mark.parametrize("method", [vpt, maple], ids=["vpt_mt", "maple_mt"])


def settings(method, **changes):
    usual = dict(n_ctx=3, epochs=1, lr=0.1, batch_size=6, min_crop=0.6, workers=0)
    return method.Args(**dict(usual, **changes))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_at_vit_b16():
    assert count(vpt.ImagePrompts(12, 16, 768)) == 147_456
    assert count(maple.CoupledPrompts(12, 16, 512, 768)) == 4_826_112
    assert count(maple.CoupledPrompts(9, 2, 512, 768)) == 3_555_072


def test_build_takes_depth_and_length_from_the_settings(small):
    tasks = small_tasks("a", "b")
    assert vpt.build(settings(vpt), small, tasks).image_prompts().shape == (3, 3, 64)
    prompts = maple.build(settings(maple, depth=2), small, tasks)
    assert prompts.image_prompts().shape == prompts.text_prompts().shape == (2, 3, 64)


def test_short_maple_prompts_start_at_the_words_a_photo_of_a(small):
    prompts = maple.build(settings(maple, n_ctx=2), small, small_tasks("a"))
    words = common.tokenize(["a photo"])[0, 1:3]
    assert torch.equal(prompts.text_prompts()[0], small.token_embedding.weight[words])
    longer = maple.build(settings(maple, n_ctx=5), small, small_tasks("a")).text_prompts()
    assert longer[0].std().item() == pytest.approx(0.02, rel=0.2)


def test_maple_couples_every_layer_and_normalises_the_first(small):
    """F_k(P_k) = P_k W_k^T + c_k by hand; the first layer's through CLIP's ln_pre."""
    one = maple.build(settings(maple), small, small_tasks("a"))
    for k, (made, coupling, source) in enumerate(zip(one.image_prompts(), one.F, one.P)):
        by_hand = (source[:, None] * coupling.weight[None]).sum(-1) + coupling.bias
        if k == 0:
            centred = by_hand - by_hand.mean(-1, keepdim=True)
            by_hand = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            by_hand = by_hand * small.visual.ln_pre.weight + small.visual.ln_pre.bias
        assert (made - by_hand).abs().max() < 1e-5
    assert not any("ln_pre" in name for name, _ in one.named_parameters())


def cross_entropy_by_hand(model, task, x, y, text_prompts, image_prompts):
    """MmAP's Eq. (5) for one task alone."""
    n = 0 if text_prompts is None else text_prompts.shape[-2]
    tokens = common.tokenize(task.class_names, n, "{}" if n else task.template)
    w = common.encode_text(model, tokens, text_prompts)
    x = common.encode_image(model, x, image_prompts)
    cosine = (x[:, None] * w[None]).sum(-1) / x.norm(dim=-1)[:, None] / w.norm(dim=-1)
    p = (model.logit_scale.exp() * cosine).exp()
    return -(p[range(len(y)), y] / p.sum(-1)).log().mean()


@METHODS
def test_the_first_step_descends_on_the_sum_of_the_tasks_losses_computed_one_by_one(small, method):
    args, tasks, run = settings(method), small_tasks("a", "b"), Phases()
    common.seed_everything("start")
    trained = list(method.train(args, small, tasks, run).parameters())
    common.seed_everything("start")
    start = method.build(args, small, tasks)
    common.seed_everything("test", "train", 0)
    [(images, labels, task)] = common.batches(args, small, tasks)
    text = start.text_prompts() if method is maple else None
    losses = [
        cross_entropy_by_hand(
            small, one, images[task == t], labels[task == t], text, start.image_prompts()
        )
        for t, one in enumerate(tasks)
    ]
    grads = torch.autograd.grad(sum(losses), list(start.parameters()))
    for p, q, g in zip(trained, start.parameters(), grads):
        assert (p - (q - 0.1 * (g + 5e-4 * q))).abs().max() < 1e-5
    assert max((p - q).abs().max() for p, q in zip(trained, start.parameters())) > 1e-3
    assert run.logged[0]["losses"].tolist() == pytest.approx([x.item() for x in losses], rel=1e-5)


@METHODS
def test_training_lowers_the_loss_and_leaves_clip_alone(small, method):
    before, run = {k: v.clone() for k, v in small.state_dict().items()}, Phases()
    method.train(settings(method, epochs=25, lr=0.03), small, small_tasks("a", "b"), run)
    assert run.logged[-1]["loss"] < 0.9 * run.logged[0]["loss"]
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@METHODS
def test_the_loss_runs_on_cuda(method):
    from clip.model import CLIP
    from conftest import TINY
    from torch._subclasses.fake_tensor import FakeTensorMode

    texts = common.Texts(small_tasks("a", "b"), 3 * (method is maple), templates=method is vpt)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, text_prompts = CLIP(**TINY).eval(), None
            if method is vpt:
                prompts = vpt.ImagePrompts(3, 3, 64)
            else:
                prompts = maple.CoupledPrompts(3, 3, 64, 64)
                text_prompts = prompts.text_prompts()
            images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
            task = torch.zeros(4, dtype=torch.long)
        x = common.encode_image(model, images, prompts.image_prompts())
        w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)
        losses = common.task_losses(model, x, w, labels, task, texts)
        assert losses.device.type == "cuda" and losses.shape == (2,)


def test_views_are_fixed_by_number_or_fresh(small):
    tasks = small_tasks("a", "b")
    tasks[0].train = tasks[0].train.subset([0])  # one image, so that every step shows it

    def shown(views, epochs=8):
        seen = []
        for epoch in range(epochs):
            common.seed_everything(1, epoch)
            args = settings(vpt, views=views, batch_size=2)
            seen += [images[0] for images, _, _ in common.batches(args, small, tasks)]
        return torch.stack(seen).unique(dim=0)

    assert len(shown(1)) == 1 and 2 <= len(shown(3)) <= 3 and len(shown(0)) == 24
    assert torch.equal(shown(3), shown(3))
    three = {tuple(view.flatten()[:50].tolist()) for view in shown(3)}
    assert {tuple(view.flatten()[:50].tolist()) for view in shown(1)} <= three  # view 0 is view 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vpt_mt", "maple_mt", "mmap", "jscpt"])
def test_a_step_at_vit_b16_with_65_classes_and_four_tasks_runs_on_a_cpu(name):
    model, method = random_clip(**VIT_B16), common.load_method(name)
    names = [f"class number {i}" for i in range(65)]

    def picture(number):
        return noise(number, 224)

    images = common.Images(range(5), [0, 20, 40, 64, 64], picture)
    tasks = [common.Task(t, names, "a photo of a {}", images, images) for t in "abcd"]
    run = Phases()
    method.train(method.Args(epochs=1, batch_size=5, workers=0), model, tasks, run)
    losses = [values["loss"] for values in run.logged if "loss" in values]
    assert losses and all(0 < loss < 400 for loss in losses)
