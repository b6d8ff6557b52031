"""CoOp-MT: what is learned, which views it sees, and its variants CoCoOp and ProDA written out."""

import csv
import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, VIT_B16, Phases, random_clip, small_tasks

import common

coop = common.load_method("coop_mt")


def settings(**changes):
    usual = dict(n_ctx=3, epochs=2, lr=0.1, batch_size=4, views=2, seeds=(1,), workers=0)
    return coop.Args(**dict(usual, **changes))


def test_the_context_has_8192_parameters_at_vit_b16_and_a_start_with_std_0_02():
    torch.manual_seed(0)
    context = coop.Context(16, VIT_B16["transformer_width"])
    [vectors] = context.parameters()
    assert vectors.numel() == 8192 and context.text_prompts().shape == (1, 1, 16, 512)
    assert vectors.mean().abs() < 2e-3 and vectors.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize("words, expected", [
    ("", ("tasks", 4, 5, 0.0035)),                          # MmAP's on MiniDomainNet
    ("--conditional", ("tasks", 1, 10, 0.002)),             # CoCoOp's
    ("--proda 2", ("mixed", 20, 100, 0.001)),               # HiPro's
    ("--proda 2 --lr 0.5", ("mixed", 20, 100, 0.5)),
])
def test_a_variants_own_settings_take_precedence_over_those_of_a_dataset(words, expected):
    line = f"--data minidomainnet --split 0.01 --single-task {words}"
    args = common.parse(coop.METHOD, line.split())
    assert (args.batches, args.batch_size, args.epochs, args.lr) == expected


def test_text_prompts_train_on_a_resnet_backbone():
    resnet = dict(TINY, vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None,
                  image_resolution=64, embed_dim=64)
    run = Phases()
    coop.train(settings(epochs=1), random_clip(**resnet), small_tasks("a", "b"), run)
    assert 0 < run.logged[-1]["loss"] < 100


# -------------------------------------------------------------------------------------------- views

def test_the_kept_features_of_fixed_views_are_those_of_the_images_drawn(small):
    tasks, args = small_tasks("a", "b"), settings(views=2)
    for epoch in range(3):
        common.seed_everything(epoch)
        looked_up = list(common.batches(args, small, tasks, frozen=True))
        common.seed_everything(epoch)
        for (x, *rest), (images, *same) in zip(looked_up, common.batches(args, small, tasks)):
            assert x.ndim == 2 and all(map(torch.equal, rest, same))
            assert (x - common.encode_image(small, images)).abs().max() < 1e-5


def test_kept_features_are_never_those_of_another_backbone():
    """Each model is deleted before the next is made. The kept features hold a reference to theirs,
    so no other model can take its address."""
    tasks, args = small_tasks("a"), settings(views=1)
    for scale in (1, 2):
        model = random_clip(**TINY)
        model.visual.proj.data *= scale
        common.seed_everything(0)
        x, *_ = next(common.batches(args, model, tasks, frozen=True))
        common.seed_everything(0)
        images, *_ = next(common.batches(args, model, tasks))
        assert (x - common.encode_image(model, images)).abs().max() < 1e-4
        held = weakref.ref(model)
        del model
        gc.collect()
        assert held() is not None


def test_single_task_trains_on_each_task_alone(tree, random_pt, tmp_path):
    """The results of a task are those of a run on that task alone, `name=path`."""
    words = f"--shots 2 --clip {random_pt} --epochs 2 --n-ctx 2 --batch-size 2 --lr 0.3"
    found, logs = {}, {}
    for out, data in {"both": tree, "alone": f"painted={tree}/painted"}.items():
        line = f"--data {data} {words} --single-task --device cpu --out {tmp_path}/{out}"
        common.main(coop.METHOD, line.split())
        found[out] = json.loads((tmp_path / out / "result.json").read_text())
        logs[out] = list(csv.DictReader((tmp_path / out / "log.csv").open()))
    phases = [row["phase"] for row in logs["both"]]
    assert phases == ["drawn: train"] * 2 + ["painted: train"] * 2
    assert found["both"]["accuracy"]["painted"] == found["alone"]["accuracy"]["painted"]
    assert [row["loss"] for row in logs["both"][2:]] == [row["loss"] for row in logs["alone"]]


# ------------------------------------------------------------------------------------------- CoCoOp

def conditional(model, prompts, x, names, n_ctx):
    """CoCoOp written out: each image's texts encoded in full, one image after another, [B, C]."""
    first, _, second = prompts.meta
    rows = []
    for one in x:
        unit = one / one.norm()
        pi = second.weight @ (first.weight @ unit + first.bias).clamp(min=0) + second.bias
        context = prompts.vectors[0] + pi[None]                                 # v_m(x) = v_m + pi
        tokens = F.pad(common.tokenize(names, n_ctx), (0, 60))[:, :77]
        w = []
        for row in tokens:                          # as the clip package encodes a text
            y = model.token_embedding(row)
            y = torch.cat([y[:1], context, y[1 + n_ctx:]]) + model.positional_embedding[:len(row)]
            mask = torch.full((len(row), len(row)), -torch.inf).triu(1)
            for block in model.transformer.resblocks:
                z = block.ln_1(y)
                y = y + block.attn(z, z, z, need_weights=False, attn_mask=mask)[0]
                y = y + block.mlp(block.ln_2(y))
            w.append(model.ln_final(y)[row.argmax()] @ model.text_projection)
        w = torch.stack(w)
        rows.append(model.logit_scale.exp() * (w @ unit) / w.norm(dim=-1))
    return torch.stack(rows)


def test_cocoop_adds_the_meta_networks_output_to_every_context_vector(small):
    """The loss and gradients of the first step against each image's texts encoded in full."""
    args = settings(epochs=1, batch_size=6, views=0, conditional=True, single_task=True)
    [task], run = small_tasks("a"), Phases()
    common.seed_everything("start")
    trained = coop.train(args, small, [task], run)
    common.seed_everything("start")
    start = coop.build(args, small, [task])
    assert [p.shape for p in start.meta.parameters()] == [(2, 32), (2,), (64, 2), (64,)]  # D/16 = 2
    common.seed_everything("test", "train", 0)
    [(images, labels, _)] = common.batches(args, small, [task])
    scores = conditional(small, start, common.encode_image(small, images), task.class_names, 3)
    loss = F.cross_entropy(scores, labels)
    loss.backward()
    assert run.logged[0]["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for before, after in zip(start.parameters(), trained.parameters()):
        expected = before - 0.1 * (before.grad + 5e-4 * before)
        assert (after - expected).abs().max() < 1e-5 and (after - before).abs().max() > 1e-6


def test_cocoop_classifies_each_test_image_by_its_own_texts(small):
    """More test images than are encoded at once."""
    args = settings(conditional=True, single_task=True, views=0)
    torch.manual_seed(2)
    [task], kept = small_tasks("a"), []
    items, labels = [100 + i for i in range(20)], [i % 3 for i in range(20)]
    task.test = common.Images(items, labels, task.test.read)
    task.metric = lambda scores, labels: kept.append(scores) or 0.0
    prompts = coop.build(args, small, [task])
    prompts.vectors.data *= 20
    for p in prompts.meta.parameters():
        p.data *= 5
    x, _, _ = common.image_features(small, task.test)
    with torch.no_grad():
        expected = conditional(small, prompts, x, task.class_names, 3)
        common.evaluate(args, small, [task], **coop.classify(args, small, [task], prompts))
    assert len(kept[-1]) == 20 and (kept[-1] - expected).abs().max() < 1e-3
    assert expected.std(dim=0).max() > 0.01         # the images' own texts make a difference


# -------------------------------------------------------------------------------------------- ProDA

def test_prodas_bound_equals_the_formula_with_the_full_covariance():
    """L_upper with the full covariance of the classifiers, for all pairs of classes."""
    torch.manual_seed(0)
    K, B, C, D, scale = 4, 5, 3, 6, 2.5
    w, x = torch.randn(K, C, D).double(), torch.randn(B, D).double()
    labels = torch.tensor([0, 2, 1, 1, 0])
    found = coop.upper_bound(scale * torch.einsum("bd,kcd->kbc", x, w), labels)
    mu, off = w.mean(0), w - w.mean(0)
    S = torch.einsum("kcd,kef->cedf", off, off) / K                             # [C, C, D, D]
    for i, y in enumerate(labels):
        terms = []
        for c in range(C):
            A = S[c, c] + S[y, y] - S[c, y] - S[y, c]
            terms.append(scale * x[i] @ mu[c] + scale ** 2 * x[i] @ A @ x[i] / 2)
        expected = -scale * x[i] @ mu[y] + torch.stack(terms).logsumexp(0)
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-10)


def test_proda_trains_all_its_contexts_by_both_losses(small):
    """L_upper with the variance over the contexts, plus 0.1 times the mean |cosine| between the
    contexts' texts without a class name."""
    args = settings(epochs=1, batch_size=6, views=0, proda=3, single_task=True)
    [task], run = small_tasks("a"), Phases()
    common.seed_everything("start")
    trained = coop.train(args, small, [task], run).vectors.detach()
    common.seed_everything("start")
    start = (0.02 * torch.randn(3, 3, 64)).requires_grad_()
    common.seed_everything("test", "train", 0)
    [(images, labels, _)] = common.batches(args, small, [task])
    x, logits, bare = common.encode_image(small, images), [], []
    for context in start:
        w = common.encode_text(small, common.tokenize(task.class_names, 3), context[None])
        logits.append(common.logits(small, x, w))
        [nameless] = common.encode_text(small, common.tokenize([""], 3), context[None])
        bare.append(nameless / nameless.norm())
    mean = sum(logits) / 3
    right = [one[range(6), labels][:, None] for one in (mean, *logits)]
    off = [(one - r) - (mean - right[0]) for one, r in zip(logits, right[1:])]
    bound = F.cross_entropy(mean + sum(o ** 2 for o in off) / 3 / 2, labels)
    cosines = [bare[0] @ bare[1], bare[0] @ bare[2], bare[1] @ bare[2]]
    loss = bound + 0.1 * sum(c.abs() for c in cosines) / 3
    (gradient,) = torch.autograd.grad(loss, start)
    assert run.logged[0]["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert (trained - (start - 0.1 * (gradient + 5e-4 * start))).abs().max() < 1e-5
    assert ((trained - start).abs().amax(dim=(1, 2)) > 1e-4).all()


def test_proda_classifies_by_the_mean_of_its_unit_length_text_features(small):
    args, [task] = settings(proda=2, single_task=True), small_tasks("a")
    prompts = coop.build(args, small, [task])
    prompts.vectors.data *= 20
    [found] = coop.classify(args, small, [task], prompts)["classifiers"]
    tokens = common.tokenize(task.class_names, 3)
    w = torch.stack([common.encode_text(small, tokens, v[None]) for v in prompts.vectors])
    expected = F.normalize(w, dim=-1).mean(0)
    assert (found - expected).abs().max() < 1e-5
    assert (found.norm(dim=-1) < 1 - 1e-4).all()
