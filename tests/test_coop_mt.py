"""CoOp-MT: what is learned, what the gradient is, and the script as a user runs it."""

import gc
import json
import weakref

import pytest
import torch
from conftest import TINY, VIT_B16, Phases, numbers, random_clip, run_script, small_tasks

import common

coop = common.load_method("coop_mt")


def settings(**changes):
    usual = dict(n_ctx=3, epochs=2, lr=0.1, batch_size=4, views=2, seeds=(1,), workers=0)
    return coop.Args(**dict(usual, **changes))


def test_the_context_has_8192_parameters_at_vit_b16():
    context = coop.Context(16, VIT_B16["transformer_width"])
    assert sum(p.numel() for p in context.parameters()) == 8192


def test_the_context_starts_at_a_standard_deviation_of_two_hundredths():
    torch.manual_seed(0)
    vectors = coop.Context(16, 512).vectors
    assert vectors.mean().abs() < 2e-3 and vectors.std().item() == pytest.approx(0.02, rel=0.03)


def test_the_first_step_descends_on_the_sum_of_the_tasks_cross_entropies(small):
    """One epoch of one step against the formula written out: v <- v - lr (sum_t grad L_t + 5e-4
    v)."""
    args, tasks, run = settings(epochs=1, batch_size=6, views=0), small_tasks("a", "b"), Phases()
    common.seed_everything("start")
    trained = coop.train(args, small, tasks, run).vectors.detach()
    common.seed_everything("start")
    start = (0.02 * torch.randn(1, 3, 64)).requires_grad_()
    common.seed_everything("test", "train", 0)
    [(images, labels, task)] = common.batches(args, small, tasks)
    losses = []
    for t, one in enumerate(tasks):
        x = common.encode_image(small, images[task == t])
        w = common.encode_text(small, common.tokenize(one.class_names, 3), start)
        cosine = (x[:, None] * w[None]).sum(-1) / x.norm(dim=-1)[:, None] / w.norm(dim=-1)
        p = (small.logit_scale.exp() * cosine).exp()
        y = labels[task == t]
        losses.append(-(p[range(len(y)), y] / p.sum(-1)).log().mean())  # MmAP, Eq. (5)
    (gradient,) = torch.autograd.grad(sum(losses), start)
    expected = start - 0.1 * (gradient + 5e-4 * start)
    assert (trained - expected).abs().max() < 1e-5 and (trained - start).abs().max() > 1e-3
    assert run.logged[0]["loss"].item() == pytest.approx(sum(losses).item(), rel=1e-5)
    assert run.logged[0]["losses"].tolist() == pytest.approx([x.item() for x in losses], rel=1e-5)


def test_training_lowers_the_loss_and_leaves_clip_alone(small):
    before, run = {k: v.clone() for k, v in small.state_dict().items()}, Phases()
    coop.train(settings(epochs=15, lr=0.01), small, small_tasks("a", "b"), run)
    assert run.logged[-1]["loss"] < 0.9 * run.logged[0]["loss"]
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_fixed_views_go_through_the_frozen_encoder_once_and_change_nothing(small):
    """The features of fixed views are those of the images that are drawn."""
    tasks, args = small_tasks("a", "b"), settings(views=2)
    for epoch in range(3):
        common.seed_everything(epoch)
        looked_up = list(common.batches(args, small, tasks, frozen=True))
        common.seed_everything(epoch)
        for (x, *rest), (images, *same) in zip(looked_up, common.batches(args, small, tasks)):
            assert x.ndim == 2 and all(torch.equal(a, b) for a, b in zip(rest, same))
            assert (x - common.encode_image(small, images)).abs().max() < 1e-5


def test_kept_features_are_never_those_of_another_backbone():
    """Each model is deleted before the next is made; the kept features hold theirs, so that no
    other can take its place in memory."""
    tasks, args = small_tasks("a"), settings(views=1)
    for scale in (1, 2):
        model, _ = common.load_clip("tiny", "cpu")
        model.visual.proj.data *= scale
        common.seed_everything(0)
        [(x, *_)] = list(common.batches(args, model, tasks, frozen=True))[:1]
        common.seed_everything(0)
        [(images, *_)] = list(common.batches(args, model, tasks))[:1]
        assert (x - common.encode_image(model, images)).abs().max() < 1e-4
        held = weakref.ref(model)
        del model
        gc.collect()
        assert held() is not None


@pytest.mark.parametrize("surgery", ["pcgrad", "imtl", "cagrad"])
def test_every_surgery_sees_the_views_that_the_sum_sees(small, surgery):
    """The first loss is the same, and later views too: nothing else draws from their generator."""
    seen = []
    for kind in ("none", surgery):
        run, shown, kept = Phases(), [], common.batches

        def spy(*given, shown=shown, kept=kept, **how):
            for batch in kept(*given, **how):
                shown.append(batch)
                yield batch

        common.batches = spy
        try:
            coop.train(settings(surgery=kind, views=0), small, small_tasks("a", "b", "c"), run)
        finally:
            common.batches = kept
        seen.append(shown)
    assert len(seen[0]) == len(seen[1]) > 2
    assert all(torch.equal(a, b) for one, other in zip(*seen) for a, b in zip(one, other))


def test_pcgrads_order_is_its_own():
    grads = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = common.pcgrad(grads, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, common.pcgrad(grads, torch.Generator().manual_seed(1)))


def test_the_loss_runs_on_cuda():
    """A forward pass of the training loss on fake CUDA tensors: nothing is left on the CPU."""
    from clip.model import CLIP
    from torch._subclasses.fake_tensor import FakeTensorMode

    texts = common.Texts(small_tasks("a", "b"), 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, prompts = CLIP(**TINY).eval(), coop.Context(3, 64)
            x, labels = torch.randn(4, 32), torch.zeros(4, dtype=torch.long)
            task = torch.zeros(4, dtype=torch.long)
        w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
        losses = common.task_losses(model, common.encode_image(model, x), w, labels, task, texts)
        assert losses.device.type == "cuda" and losses.shape == (2,)


@pytest.mark.parametrize("relative", ["conditional", "proda"])
def test_the_relatives_losses_run_on_cuda(relative):
    from clip.model import CLIP
    from torch._subclasses.fake_tensor import FakeTensorMode

    texts = common.Texts(small_tasks("a"), 3)
    K, D = dict(conditional=(1, 32), proda=(4, None))[relative]
    tokens, sets = coop.copies(texts.tokens, 4)                 # of 4 images, or of 4 contexts
    sets = sets.tolist()                                        # before tensors are fake
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model, x = CLIP(**TINY).eval(), torch.randn(4, 32)
        labels = torch.zeros(4, dtype=torch.long)
        context = coop.Context(3, 64, K, D).text_prompts(x)
        w = common.encode_text(model, tokens, context, sets).unflatten(0, (-1, 3))
        if relative == "proda":
            loss = coop.proda_loss(model, x, w, w[:, 0], labels)
        else:
            loss = common.task_losses(model, x, w, labels, labels, texts)
        assert loss.device.type == "cuda" and loss.shape == (1,)


@pytest.mark.parametrize("words, batch, batches, epochs, lr", [
    (["--conditional"], 1, "tasks", 10, 0.002), (["--proda", "2"], 20, "mixed", 100, 0.001),
    ([], 4, "tasks", 5, 0.0035)])
def test_a_relatives_own_settings_come_before_those_of_a_dataset(words, batch, batches, epochs, lr):
    words = ["--data", "minidomainnet", "--split", "0.01", "--single-task", *words]
    args = common.parse(coop.Args, "", words, coop.tiny, coop.OF_DATA, coop.own)
    assert (args.batch_size, args.batches, args.epochs, args.lr) == (batch, batches, epochs, lr)


def test_text_prompts_train_on_a_resnet_backbone():
    shape = dict(
        embed_dim=64,
        image_resolution=64,
        vision_layers=(1, 1, 1, 1),
        vision_width=8,
        vision_patch_size=None,
        context_length=77,
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=2,
    )
    run = Phases()
    coop.train(settings(epochs=1), random_clip(**shape), small_tasks("a", "b"), run)
    assert 0 < run.logged[-1]["loss"] < 100


def conditional(model, prompts, x, names, n_ctx):
    """CoCoOp written out: every image's texts encoded whole, one image after another, [B, C]."""
    first, relu, second = prompts.meta
    rows = []
    for one in x:
        unit = one / one.norm()
        pi = second.weight @ (first.weight @ unit + first.bias).clamp(min=0) + second.bias
        context = prompts.vectors[0] + pi[None]                                 # v_m(x) = v_m + pi
        tokens = torch.nn.functional.pad(common.tokenize(names, n_ctx), (0, 60))[:, :77]
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


def test_cocoop_adds_what_the_network_makes_of_the_image_to_every_context_vector(small):
    """The loss and gradients of the first step against every image's texts encoded whole."""
    args = settings(epochs=1, batch_size=6, views=0, conditional=True, single_task=True)
    tasks, run = small_tasks("a"), Phases()
    common.seed_everything("start")
    trained = coop.train(args, small, tasks, run)
    common.seed_everything("start")
    start = coop.build(args, small, tasks)
    assert [p.shape for p in start.meta.parameters()] == [(2, 32), (2,), (64, 2), (64,)]  # D/16 = 2
    common.seed_everything("test", "train", 0)
    [(images, labels, _)] = common.batches(args, small, tasks)
    scores = conditional(small, start, common.encode_image(small, images), tasks[0].class_names, 3)
    loss = torch.nn.functional.cross_entropy(scores, labels)
    loss.backward()
    assert run.logged[0]["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, before), after in zip(start.named_parameters(), trained.parameters()):
        expected = before - 0.1 * (before.grad + 5e-4 * before)
        assert (after - expected).abs().max() < 1e-5, name
        assert (after - before).abs().max() > 1e-6, name


def test_cocoop_classifies_each_test_image_by_its_own_texts(small):
    """More test images than a chunk has; the accuracy is that of the scores written out."""
    args = settings(conditional=True, single_task=True, views=0, n_ctx=3)
    torch.manual_seed(2)
    [task] = small_tasks("a")
    task.test = common.Images([100 + i for i in range(20)], [i % 3 for i in range(20)],
                              task.test.read)
    prompts = coop.build(args, small, [task])
    prompts.vectors.data *= 20
    for p in prompts.meta.parameters():
        p.data *= 5
    x, _, labels = common.image_features(small, task.test)
    with torch.no_grad():
        expected = conditional(small, prompts, x, task.class_names, 3)
    kept = []
    task.metric = lambda scores, labels: kept.append(scores) or 0.0
    coop.score(args, small, [task], prompts)
    assert (kept[-1] - expected).abs().max() < 1e-3 and len(kept[-1]) == 20
    assert expected.std(dim=0).max() > 0.01         # the images' own texts make a difference


def test_prodas_bound_is_that_of_the_covariance_written_out():
    """L_upper with the full covariance of the classifiers, of all pairs of classes."""
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


def test_prodas_bound_is_above_the_expected_loss_and_equal_without_spread():
    torch.manual_seed(1)
    mean, labels = torch.randn(1, 2, 3), torch.tensor([0, 2])
    logits = mean + 0.7 * torch.randn(4000, 2, 3)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.repeat(4000), reduction="none").view(4000, 2).mean(0)
    assert (coop.upper_bound(logits, labels) > expected).all()
    same = torch.nn.functional.cross_entropy(mean[0], labels, reduction="none")
    assert torch.allclose(coop.upper_bound(mean.expand(3, 2, 3), labels), same)


def test_prodas_orthogonality_by_hand():
    """Cosines 0.6, 0 and -0.8 of three texts: (0.6 + 0 + 0.8) * 2 / 6."""
    w = torch.tensor([[2.0, 0, 0], [0.6, 0.8, 0], [0, -5.0, 0]])
    assert coop.orthogonality(w).item() == pytest.approx(1.4 / 3)


def test_proda_trains_all_its_contexts_by_both_losses(small):
    args = settings(epochs=1, batch_size=6, views=0, proda=3, single_task=True, lr=0.1)
    [task], run = small_tasks("a"), Phases()
    common.seed_everything("start")
    trained = coop.train(args, small, [task], run).vectors.detach()
    common.seed_everything("start")
    start = (0.02 * torch.randn(3, 3, 64)).requires_grad_()
    common.seed_everything("test", "train", 0)
    [(images, labels, _)] = common.batches(args, small, [task])
    x = common.encode_image(small, images)
    logits, bare = [], []
    for context in start:
        w = common.encode_text(small, common.tokenize(task.class_names, 3), context[None])
        logits.append(common.logits(small, x, w))
        bare.append(common.encode_text(small, common.tokenize([""], 3), context[None])[0])
    loss = coop.upper_bound(torch.stack(logits), labels).mean()
    loss = loss + 0.1 * coop.orthogonality(torch.stack(bare))
    (gradient,) = torch.autograd.grad(loss, start)
    assert run.logged[0]["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert (trained - (start - 0.1 * (gradient + 5e-4 * start))).abs().max() < 1e-5
    assert ((trained - start).abs().amax(dim=(1, 2)) > 1e-4).all()


@pytest.mark.parametrize("words", [["--conditional"], ["--proda", "2"]])
def test_the_relatives_run_resume_and_score_again(words, tree, tmp_path, here):
    torch.save(random_clip(**TINY).state_dict(), tmp_path / "random.pt")
    shared = ["--data", tree, "--clip", tmp_path / "random.pt", "--shots", 2, "--n-ctx", 2,
              "--batch-size", 2, "--epochs", 2, "--device", "cpu"]
    code, out, err = here("coop_mt.py", *shared, "--single-task", *words, "--out", tmp_path / "a")
    assert code == 0, err
    result = numbers(tmp_path / "a")
    assert result["variant"] == "with --single-task, with " + " ".join(words)
    code, again, err = here("coop_mt.py", "--eval", tmp_path / "a" / "prompts.pt")
    assert code == 0 and again.split("\n\n")[0] == out.split("\n\n")[0], err
    for context in torch.load(tmp_path / "a" / "prompts.pt")["prompts"][1].values():
        assert sum(p.numel() for p in context.values()) * 2 == result["trainable_parameters"]
    (tmp_path / "a" / "result.json").unlink()
    (tmp_path / "a" / "checkpoint.pt").unlink()
    code, _, err = here("coop_mt.py", "--resume", "--out", tmp_path / "a")
    assert code == 0 and numbers(tmp_path / "a") == result, err
    code, out, err = here("common.py", "predict", tmp_path / "a" / "prompts.pt",
                          tree / "drawn" / "cup" / "000.png", "--task", "drawn")
    assert code == 0 and "cup" in out, err


@pytest.mark.parametrize("words, says", [
    (["--conditional"], "add --single-task"),
    (["--proda", "4"], "add --single-task"),
    (["--proda", "1", "--single-task"], "give 2 or more"),
    (["--conditional", "--proda", "2", "--single-task"], "leave one of them out"),
    (["--conditional", "--single-task", "--views", "2"], "leave out --views"),
    (["--conditional", "--single-task", "--surgery", "imtl"], "leave one of them out")])
def test_settings_of_the_relatives_that_contradict_each_other(words, says, here, tmp_path):
    code, out, err = here("coop_mt.py", *words, "--out", tmp_path / "run")
    assert code == 2 and not out and err.count("\n") == 1 and says in err
    assert not (tmp_path / "run").exists()


def test_killed_before_the_first_checkpoint_starts_again(tmp_path):
    """On the built-in benchmark, its training drawings alone."""
    words = ["--validate", "--views", 1, "--n-ctx", 4, "--batch-size", 32, "--epochs", 1]
    assert run_script("coop_mt.py", *words, "--out", tmp_path / "whole").returncode == 0
    (tmp_path / "early").mkdir()
    settings = json.loads((tmp_path / "whole" / "settings.json").read_text())
    (tmp_path / "early" / "settings.json").write_text(json.dumps(settings))
    resumed = run_script("coop_mt.py", "--resume", "--out", tmp_path / "early")
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(tmp_path / "early") == numbers(tmp_path / "whole")


def test_single_task_is_one_training_after_another_on_one_task_alone(tree, tmp_path, here):
    """The numbers of each task are those of a run on that task alone, `name=path`."""
    words = ["--shots", 3, "--clip", "tiny", "--epochs", 2, "--n-ctx", 2, "--batch-size", 2]
    code, _, err = here(
        "coop_mt.py", "--data", tree, *words, "--single-task", "--out", tmp_path / "both"
    )
    assert code == 0, err
    both = json.loads((tmp_path / "both" / "result.json").read_text())
    assert both["variant"] == "with --single-task" and both["trainable_parameters"] == 2 * 2 * 128
    log = (tmp_path / "both" / "log.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in log[1:]] == ["drawn: train"] * 2 + ["painted: train"] * 2
    code, _, err = here("coop_mt.py", "--eval", tmp_path / "both" / "prompts.pt")
    assert code == 0, err


def test_a_folder_of_your_own_trains_and_reports(tree, tmp_path):
    done = run_script(
        "coop_mt.py", "--data", tree, "--shots", 2, "--clip", "tiny", "--epochs", 1, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "drawn" in done.stdout and "painted" in done.stdout
    [out] = (tmp_path / "runs").iterdir()
    assert json.loads((out / "result.json").read_text())["method"] == "coop_mt"


def test_help_names_the_paper_and_shows_the_defaults():
    done = run_script("coop_mt.py", "--help")
    assert done.returncode == 0 and "Learning to Prompt" in done.stdout
    assert "learning rate of 0.0035" in " ".join(done.stdout.split()) and "0.0035)" in done.stdout
