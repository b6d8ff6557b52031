"""`common.py finetune`: what is trained, what stays frozen, parameter counts, the run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Phases, small_tasks

import common
from common import FINETUNE


def settings(train, **changes):
    usual = dict(train=train, epochs=1, lr=0.01, batch_size=6, seeds=(1,), workers=0)
    return common.FinetuneArgs(**dict(usual, **changes))


def scored(args, model, tasks, weights):
    return common.evaluate(args, model, tasks, **FINETUNE.classify(args, model, tasks, weights))


def trainable(weights):
    return sum(p.numel() for p in weights.parameters() if p.requires_grad)


@pytest.mark.parametrize("train, expected", [
    ("all", 149_620_737),                   # MmAP, Table 1: 149.62 M, times four in single-task
    ("bias", 171_008),                      # 0.17 M: every bias of both encoders
    ("adapter", 526_848)])                  # 0.53 M: four times 512 -> 128 -> 512 with biases
def test_parameters_at_vit_b16_are_the_papers(vit_b16, train, expected):
    weights = FINETUNE.build(settings(train), vit_b16, small_tasks(*"abcd"))
    assert trainable(weights) == expected
    assert sum(x.numel() for x in weights.state_dict().values()) == expected    # nothing else saved
    assert not any(p.requires_grad for p in vit_b16.parameters())


def test_a_shared_adapter_is_counted_once(vit_b16):
    args = settings("adapter", adapters="shared")
    assert trainable(FINETUNE.build(args, vit_b16, small_tasks(*"abcd"))) == 131_712


def first_step(model, args, tasks):
    """(weights before, weights after, run, batch) of one step; the frozen model does not change."""
    before, run = copy.deepcopy(model.state_dict()), Phases()
    common.seed_everything("start")
    after = FINETUNE.train(args, model, tasks, run)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    common.seed_everything("start")
    start = FINETUNE.build(args, model, tasks)
    common.seed_everything("test", "train", 0)
    [(images, labels, task)] = common.batches(args, model, tasks)
    return start, after, run, (images, labels, task)


@pytest.mark.parametrize("train", ["all", "bias"])
def test_the_first_step_follows_the_gradient_of_the_packages_own_encoders(small, train):
    """SGD for biases; AdamW for all weights: its first step is lr * sign(gradient) plus decay."""
    args, tasks = settings(train), small_tasks("a", "b")
    start, after, run, (images, labels, task) = first_step(small, args, tasks)
    tuned = copy.deepcopy(small)
    free = {name: p.requires_grad_() for name, p in tuned.named_parameters()
            if train == "all" or name.endswith("bias")}
    losses = []
    for t, one in enumerate(tasks):
        tokens = common.tokenize(one.class_names, template=one.template)
        tokens = F.pad(tokens, (0, 77 - tokens.shape[1]))
        x, w = tuned.encode_image(images[task == t]), tuned.encode_text(tokens)
        cosine = F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).t()
        losses.append(F.cross_entropy(tuned.logit_scale.exp() * cosine, labels[task == t]))
    sum(losses).backward()
    expected = [loss.item() for loss in losses]
    assert run.logged[0]["losses"].tolist() == pytest.approx(expected, rel=1e-4)
    moved = 0
    for name, p in free.items():
        key = name.replace(".", "/")
        before, now = start.parts[key], after.parts[key]
        if train == "bias":
            expected = before - 0.01 * (p.grad + 5e-4 * before)
            assert (now - expected).abs().max() < 1e-5, name
            moved += int((p.grad != 0).sum())
            continue
        sure = p.grad.abs() > 1e-4          # Adam divides by |gradient| + 1e-8
        step = before * (1 - 0.01 * 0.1) - now - 0.01 * p.grad.sign()
        assert not sure.any() or step[sure].abs().max() < 1e-5, name
        moved += int(sure.sum())
    assert moved > 0.2 * sum(p.numel() for n, p in free.items() if "embedding" not in n)


def test_an_adapters_feature_by_hand(small):
    """ratio * (W2 relu(W1 x + b1) + b2) + (1 - ratio) * x, with the adapter of the image's task."""
    weights = FINETUNE.build(settings("adapter", ratio=0.3), small, small_tasks("a", "b"))
    x, task = torch.randn(4, 32), torch.tensor([1, 0, 1, 1])
    found = weights.adapted(x, task)
    for i, t in enumerate(task):
        first, _, second = weights.adapters[t]
        hidden = (first.weight @ x[i] + first.bias).clamp(min=0)
        assert len(hidden) == 8                                 # a quarter of D
        expected = 0.3 * (second.weight @ hidden + second.bias) + 0.7 * x[i]
        assert (found[i] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("adapters", ["task", "shared"])
def test_adapters_train_on_top_of_a_frozen_clip(small, adapters):
    args, tasks = settings("adapter", adapters=adapters), small_tasks("a", "b")
    start, after, run, (images, labels, task) = first_step(small, args, tasks)
    losses = []
    texts = [common.tokenize(one.class_names, template=one.template) for one in tasks]
    for t in range(2):
        x = common.encode_image(small, images[task == t])
        x = 0.2 * start.adapters[t if adapters == "task" else 0](x) + 0.8 * x
        w = common.encode_text(small, texts[t])
        losses.append(F.cross_entropy(common.logits(small, x, w), labels[task == t]))
    sum(losses).backward()
    assert run.logged[0]["loss"].item() == pytest.approx(sum(losses).item(), rel=1e-5)
    for before, now in zip(start.parameters(), after.parameters()):
        expected = before - 0.01 * (before.grad + 5e-4 * before)
        assert before.grad.any() and (now - expected).abs().max() < 1e-6
    scores = scored(args, small, tasks, after)
    x, _, y = common.image_features(small, tasks[1].test)
    x = after.adapted(x, torch.ones(len(x), dtype=torch.long))
    w = common.encode_text(small, texts[1])
    hits = common.logits(small, x, w).argmax(-1) == y
    assert scores["accuracy"][1] == pytest.approx(100 * hits.double().mean().item())


def test_a_trained_temperature_is_used(small):
    """Full fine-tuning predicts with the logit scale that it trained."""
    weights = FINETUNE.build(settings("all"), small, small_tasks("a"))
    weights.parts["logit_scale"].data += 1.0
    [task], kept = small_tasks("a"), []
    task.metric = lambda scores, labels: kept.append(scores) or 0.0
    scored(settings("all"), small, [task], weights)
    assert (kept[1] / kept[0]).mean().item() == pytest.approx(2.718, rel=1e-3)


@pytest.mark.parametrize("words, expected", [
    ("--clip ViT-B/16 --train all", (1e-5, 4, 5)),
    ("--clip ViT-B/16 --train adapter", (0.0035, 4, 5)),
    ("--clip ViT-B/16 --train bias --lr 1", (1.0, 4, 5)),
    ("--clip tiny --train bias", (0.001, 16, 10))])
def test_default_settings_depend_on_what_is_trained(words, expected):
    args = common.parse(FINETUNE, f"--data minidomainnet --split 0.01 {words}".split())
    assert (args.lr, args.batch_size, args.epochs) == expected


def test_trained_weights_score_with_both_of_their_encoders(small):
    args, tasks = settings("all", lr=0.003), small_tasks("a", "b")
    weights = FINETUNE.train(args, small, tasks, Phases())
    scores = scored(args, small, tasks, weights)
    for t, task in enumerate(tasks):
        w = common.encode_text(weights.clip, common.tokenize(task.class_names, template="a {}"))
        x, _, labels = common.image_features(weights.clip, task.test)
        hits = common.logits(weights.clip, x, w).argmax(-1) == labels
        assert scores["accuracy"][t] == pytest.approx(100 * hits.double().mean().item())
    assert scores["zero_shot"] == common.evaluate(
        args, small, tasks, common.zero_shot_classifiers(small, tasks))["accuracy"]
