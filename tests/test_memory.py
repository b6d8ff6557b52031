"""Memory and the GPU, as far as they can be tested without one."""
import sys
import types

import bench_memory
import pytest
import torch
from bench_speed import Bench
from conftest import TINY, random_clip, small_tasks

import common


@pytest.fixture
def model():
    """A random CLIP that a test may modify."""
    return random_clip(**TINY)


def test_a_frozen_encoder_runs_without_gradients(model):
    """So it can use float16 on a GPU without bfloat16. It has gradients if prompts, weights or
    images require them."""
    seen = []
    for part in (model.visual.ln_post, model.ln_final):
        part.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    images, tokens = torch.randn(2, 3, 32, 32), common.tokenize(["cup", "hat"], 2)

    def gradients(prompts=None):
        seen.clear()
        common.encode_image(model, images, prompts)
        common.encode_text(model, tokens, prompts)
        assert torch.is_grad_enabled()
        return seen

    fixed, trained = torch.randn(2, 2, 64), torch.randn(2, 2, 64, requires_grad=True)
    assert gradients() == gradients(fixed) == [False, False]
    assert gradients(trained) == [True, True]
    images.requires_grad_()
    assert gradients() == [True, False]
    model.visual.proj.requires_grad_()              # as in a copy of CLIP that is trained
    assert gradients() == [True, True]


SCORES, LABELS = torch.rand(4, 2), torch.tensor([0, 1, 1, 0])
DOUBLES = {
    "imtl": lambda: common.imtl(SCORES),
    "cagrad": lambda: common.cagrad(SCORES),
    "accuracy": lambda: common.apply_metric("accuracy", SCORES, LABELS),
    "mAP": lambda: common.apply_metric("11-point mAP", SCORES, SCORES > 0.5),
    "groups": lambda: common.load_method("mmap").group_tasks(SCORES @ SCORES.t(), 2),
    "TAG's groups": lambda: common.load_method("hipro").group_tasks(SCORES @ SCORES.t(), 2),
    "tree": lambda: common.load_method("hipro").task_tree(SCORES @ SCORES.t()),
}


@pytest.mark.parametrize("name", DOUBLES)
def test_double_precision_is_used_only_on_the_cpu(name, monkeypatch):
    """A GPU may not support it (Apple's): only what `.cpu()` returned is converted."""
    there, cpu, double = [], torch.Tensor.cpu, torch.Tensor.double

    def moved(x):
        there.append(cpu(x).clone())
        return there[-1]

    def doubled(x):
        assert any(x is one for one in there)
        return double(x)

    monkeypatch.setattr(torch.Tensor, "cpu", moved)
    monkeypatch.setattr(torch.Tensor, "double", doubled)
    DOUBLES[name]()
    assert there


def test_new_tensors_are_not_filled_with_nan():
    """Deterministic mode would fill every one: 724 times in this step of MmAP."""
    bench = Bench(types.SimpleNamespace(clip="tiny", device="cpu", repeats=1), "mmap", 3, 5)
    with torch.profiler.profile() as profile:
        bench.train(1)
    assert torch.are_deterministic_algorithms_enabled()
    assert sum(row.count for row in profile.key_averages() if row.key == "aten::fill_") <= 320


@pytest.mark.parametrize("batch_size, of_tasks, mixed", [(1, 6, 18), (4, 2, 5), (20, 1, 1)])
def test_every_epoch_has_the_same_number_of_steps(small, batch_size, of_tasks, mixed):
    """Three tasks of six images: as many steps as one task needs, or as their union needs."""
    tasks = small_tasks("a", "b", "c")
    for batches, n in (("tasks", of_tasks), ("mixed", mixed)):
        args = common.Args(batch_size=batch_size, batches=batches, workers=0)
        assert common.steps_per_epoch(args, tasks) == n
        assert len(list(common.batches(args, small, tasks))) == n


def test_the_computed_memory_is_that_of_real_tensors(monkeypatch, capsys):
    """To the byte: the same code creates and frees fake and real tensors."""
    words = "--method mmap --tasks 2 --classes 3 --batch-size 2 --precision fp32".split()
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", *words])
    monkeypatch.setattr(bench_memory, "shape_of", lambda name: TINY)
    found, computed = [], bench_memory.computed
    monkeypatch.setattr(
        bench_memory, "computed", lambda *words: found.append(computed(*words)) or found[0]
    )
    monkeypatch.setattr(bench_memory, "STEPS", dict(mmap=bench_memory.STEPS["mmap"]))
    bench_memory.main()
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:2] == ["mmap", "fp32"] and row[5:] == "yes / yes / yes".split()
    with bench_memory.Memory() as memory:
        bench_memory.prepared("mmap", TINY, [3, 3], 2)()
    assert found[0][1] == memory.peak > 2**20
