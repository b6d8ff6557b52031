"""CoOp-MT: what is learned, what the gradient is, and the script as a user runs it."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, VIT_B16, random_clip, run_script

import common

coop = common.load_method("coop_mt")
SHORT = ["--shots", 2, "--views", 1, "--n-ctx", 4, "--batch-size", 32]


def numbers(folder):
    """result.json without the clock."""
    result = json.loads((folder / "result.json").read_text())
    result.pop("seconds")
    return result


class Settings:
    def __init__(self, **settings):
        self.__dict__ = dict(dict(n_ctx=3, single_task=False, epochs=2, lr=0.1, batch_size=4, views=2, min_crop=0.08), **settings)


class Log:
    """Stands in for the run folder where a test calls `train` itself."""

    def restore(self, seed, **parts):
        return 0

    def checkpoint(self, seed, epoch, row, **parts):
        self.last = row


def small_tasks(*names):
    generator = torch.Generator().manual_seed(5)
    from PIL import Image

    def read(number):
        return Image.frombytes("RGB", (32, 32), torch.randint(0, 256, (3072,), generator=generator.manual_seed(number)).byte().numpy().tobytes())
    images = lambda first: common.Images(range(first, first + 6), [0, 1, 2, 0, 1, 2], read)
    return [common.Task(name, ["cup", "hat", "red ball"], "a {}", images(10 * i), images(100 + 10 * i)) for i, name in enumerate(names)]


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
        assert coop.loss_of(model, texts, prompts, views, batches).device.type == "cuda"


def test_text_prompts_train_on_a_resnet_backbone():
    shape = dict(embed_dim=64, image_resolution=64, vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None,
                 context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=2)
    log = Log()
    coop.train(Settings(epochs=1), random_clip(**shape), small_tasks("a", "b"), log, seed=1)
    assert 0 < log.last["loss"] < 100


def test_the_script_trains_reports_and_scores_its_prompts_again(tmp_path):
    out = tmp_path / "run"
    done = run_script("coop_mt.py", *SHORT, "--epochs", 2, "--seeds", 1, 2, "--out", out, "--plot", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    tasks = ["Noto", "Twemoji", "Fluent", "High Contrast"]
    assert result["method"] == "coop_mt" and result["tasks"] == tasks and result["data"] == "emoji" and result["clip"] == "tiny"
    assert (result["split"], result["shots"], result["seeds"]) == (None, 2, [1, 2])
    assert set(result["zero_shot"]) == set(tasks) and all(len(result["accuracy"][t]) == 2 for t in tasks)
    assert result["average"] == pytest.approx([sum(result["accuracy"][t][i] for t in tasks) / 4 for i in range(2)])
    assert result["trainable_parameters"] == 4 * 128 and len(result["seconds"]) == 2
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [(r["seed"], r["epoch"]) for r in rows] == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert (out / "accuracy.png").stat().st_size > 5000 and (out / "loss.png").stat().st_size > 5000
    assert "average" in done.stdout and "512 trainable parameters" in done.stdout and not done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]

    before = {p: p.read_bytes() for p in out.iterdir()}
    again = run_script("coop_mt.py", "--eval", out / "prompts.pt", cwd=tmp_path)
    table = lambda text: text.split("\n\n")[0]
    assert again.returncode == 0 and table(again.stdout) == table(done.stdout)
    assert before == {p: p.read_bytes() for p in out.iterdir()} and sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    finished = run_script("coop_mt.py", "--resume", "--out", out, cwd=tmp_path)
    assert finished.returncode == 0 and "had finished" in finished.stdout


def test_killed_in_the_middle_and_resumed_ends_where_it_would_have_ended(tmp_path):
    words = [*SHORT, "--epochs", 5, "--seeds", 1, 2]
    assert run_script("coop_mt.py", *words, "--out", tmp_path / "whole").returncode == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen([sys.executable, str(ROOT / "coop_mt.py"), *map(str, words), "--out", str(broken)],
                               env=dict(os.environ, CUDA_VISIBLE_DEVICES=""), stdout=subprocess.DEVNULL)
    for _ in range(2000):
        if (broken / "log.csv").exists() and (broken / "log.csv").read_text().count("\n") > 7:      # seed 2, after its epoch 2
            break
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "result.json").exists()
    resumed = run_script("coop_mt.py", "--resume", "--out", broken)
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(broken) == numbers(tmp_path / "whole")
    assert (broken / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_killed_before_the_first_checkpoint_starts_again(tmp_path):
    words = [*SHORT, "--epochs", 1]
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


@pytest.mark.slow
def test_the_built_in_defaults_train_within_three_minutes_and_2_gb(tmp_path):
    out, start = tmp_path / "run", time.time()
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); " \
           "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    done = subprocess.run([sys.executable, "-c", code, "coop_mt.py", "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["average"][0] > 38                                            # 58 classes: chance is under 2
    assert time.time() - start < 180 and int(done.stdout.split("peak")[1]) < 2048


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="measured: 43.8 ± 0.7 against 44.7; the backbone needs a longer pretraining")
def test_the_built_in_defaults_gain_a_point_over_zero_shot(tmp_path):
    done = run_script("coop_mt.py", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["average"][0] > sum(result["zero_shot"].values()) / 4 + 1
