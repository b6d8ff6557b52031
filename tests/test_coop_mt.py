"""CoOp-MT: what is learned, what the gradient is, and the script as a user runs it."""
import json

import pytest
import torch
from conftest import VIT_B16, Log, numbers, random_clip, run_script, small_tasks

import common

coop = common.load_method("coop_mt")


class Settings:
    def __init__(self, **settings):
        self.__dict__ = dict(dict(n_ctx=3, single_task=False, surgery="none", epochs=2, lr=0.1, batch_size=4, views=2, min_crop=0.08), **settings)


def test_the_shared_context_has_8192_numbers_at_vit_b16_and_single_task_one_set_a_task():
    assert sum(p.numel() for p in coop.Context(1, 16, VIT_B16["transformer_width"]).parameters()) == 8192
    assert sum(p.numel() for p in coop.Context(4, 16, VIT_B16["transformer_width"]).parameters()) == 4 * 8192


def test_the_context_starts_at_a_standard_deviation_of_two_hundredths():
    torch.manual_seed(0)
    vectors = coop.Context(1, 16, 512).vectors
    assert vectors.mean().abs() < 1e-3 and vectors.std().item() == pytest.approx(0.02, rel=0.03)


def test_the_first_step_is_gradient_descent_on_the_sum_of_the_tasks_cross_entropies(small):
    """One epoch of one step against the formula written out: v <- v - lr (sum_t grad L_t + 5e-4 v)."""
    args, tasks, log = Settings(epochs=1, batch_size=6, views=1), small_tasks("a", "b"), Log()
    trained = coop.train(args, small, tasks, log, seed=1).vectors.detach()
    common.seed_everything(1)
    start = (0.02 * torch.randn(1, 3, 64)).requires_grad_()
    common.seed_everything(1)
    losses = []
    for task in tasks:
        x, y = common.view_features(small, task.train, 1)
        w = common.encode_text(small, common.tokenize(task.class_names, 3), start)
        cosine = (x[0][:, None] * w[None]).sum(-1) / x[0].norm(dim=-1)[:, None] / w.norm(dim=-1)
        p = (small.logit_scale.exp() * cosine).exp()
        losses.append(-(p[range(len(y)), y] / p.sum(-1)).log().mean())          # MmAP, Eq. (5)
    gradients = [torch.autograd.grad(loss, start, retain_graph=True)[0] for loss in losses]
    expected = start - 0.1 * (gradients[0] + gradients[1] + 5e-4 * start)
    assert (trained - expected).abs().max() < 1e-5 and (trained - start).abs().max() > 1e-3
    assert log.last["loss"] == pytest.approx(sum(losses).item(), rel=1e-5)


def test_training_lowers_the_loss_and_leaves_clip_alone(small):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    first, last = Log(), Log()
    coop.train(Settings(epochs=1, lr=0.01), small, small_tasks("a", "b"), first, seed=1)
    coop.train(Settings(epochs=15, lr=0.01), small, small_tasks("a", "b"), last, seed=1)
    assert last.last["loss"] < 0.9 * first.last["loss"]
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_single_task_contexts_trained_in_one_pass_do_not_touch_each_other(small):
    """Task a's context is the same whatever task b's images are, and differs from the shared one."""
    args, tasks = Settings(single_task=True), small_tasks("a", "b")
    together = coop.train(args, small, tasks, Log(), seed=1).vectors.detach()
    tasks[1].train.labels = [2, 2, 2, 0, 0, 0]
    other = coop.train(args, small, tasks, Log(), seed=1).vectors.detach()
    assert torch.equal(together[0], other[0]) and not torch.equal(together[1], other[1])


def test_the_loss_runs_on_cuda():
    """A forward pass of the training loss on fake CUDA tensors: nothing is left on the CPU."""
    from clip.model import CLIP
    from conftest import TINY
    from torch._subclasses.fake_tensor import FakeTensorMode
    texts, batches = coop.texts_of(Settings(), small_tasks("a", "b")), [torch.tensor([0, 2, 1])] * 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model, prompts = CLIP(**TINY).eval(), coop.Context(1, 3, 64)
            views = [(torch.randn(2, 4, 32), torch.zeros(4, dtype=torch.long)) for _ in range(2)]
        assert coop.losses_of(model, texts, prompts, views, batches).device.type == "cuda"


def test_text_prompts_train_on_a_resnet_backbone():
    shape = dict(embed_dim=64, image_resolution=64, vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None,
                 context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=2)
    log = Log()
    coop.train(Settings(epochs=1), random_clip(**shape), small_tasks("a", "b"), log, seed=1)
    assert 0 < log.last["loss"] < 100


def test_killed_before_the_first_checkpoint_starts_again(tmp_path):
    """On the built-in benchmark, its training drawings alone."""
    words = ["--shots", 5, "--validate", "--views", 1, "--n-ctx", 4, "--batch-size", 32, "--epochs", 1]
    assert run_script("coop_mt.py", *words, "--out", tmp_path / "whole").returncode == 0
    (tmp_path / "early").mkdir()
    settings = json.loads((tmp_path / "whole" / "settings.json").read_text())
    (tmp_path / "early" / "settings.json").write_text(json.dumps(settings))
    assert run_script("coop_mt.py", "--resume", "--out", tmp_path / "early").returncode == 0
    assert numbers(tmp_path / "early") == numbers(tmp_path / "whole")           # so the same command twice gives the same, too


def test_a_folder_of_your_own_trains_and_reports(tree, tmp_path):
    done = run_script("coop_mt.py", "--data", tree, "--shots", 2, "--clip", "tiny", "--epochs", 1, "--single-task", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "drawn" in done.stdout and "painted" in done.stdout
    [out] = (tmp_path / "runs").iterdir()
    assert json.loads((out / "result.json").read_text())["variant"] == "single-task"


def test_help_names_the_paper_and_shows_the_defaults():
    done = run_script("coop_mt.py", "--help")
    assert done.returncode == 0 and "Learning to Prompt" in done.stdout and "default 0.0035" in done.stdout
