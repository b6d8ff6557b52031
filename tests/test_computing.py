"""Optimisations of time and memory change no result: passes, views, images, precision."""
import multiprocessing
import re
import sys
import types

import bench_speed
import pytest
import torch
from conftest import METHODS, ROOT, TINY, make_tree, random_clip

import common
import data

SETTINGS = types.SimpleNamespace(clip="tiny", device="cpu", repeats=1)
TEXTS = dict(coop_mt=5, maple_mt=5, mvlpt=5, hipro=25, mmap=15, jscpt=15)   # 3 tasks of 5 classes


@pytest.fixture
def model():
    """A random CLIP that a test may modify."""
    return random_clip(**TINY)


@pytest.fixture(params=METHODS)
def bench(request):
    return bench_speed.Bench(SETTINGS, request.param, 3, 5)


def test_a_step_is_one_pass_of_all_texts_and_one_of_all_images(bench):
    """Tasks with the same prompts and names share rows; texts are cut to the longest row."""
    passes = [job for job in bench.passes(lambda: bench.train(1)) if job[3]]
    wanted = [("text", TEXTS[bench.name])] if bench.name in TEXTS else []
    if bench.name not in ("coop_mt", "hipro"):
        wanted = [("image", 12), *wanted]
    assert sorted(job[:2] for job in passes) == wanted
    assert all(tokens < 45 for kind, _, tokens, _ in passes if kind == "text")


def test_gradients_stop_where_the_first_prompt_enters(bench):
    """Layers before it need none: their outputs require no gradient, CLIP's weights get none."""
    before = []
    for module in (bench.model.token_embedding, bench.model.visual.conv1):
        module.register_forward_hook(lambda module, given, made: before.append(made.requires_grad))
    bench.train(1)
    assert before and not any(before)
    assert all(p.grad is None and not p.requires_grad for p in bench.model.parameters())


def test_texts_are_encoded_once_per_evaluation_and_images_once_per_prompt(bench):
    prompts, _ = bench.train(1)
    passes = bench.passes(lambda: bench.evaluate(prompts))
    texts = [job for job in passes if job[0] == "text"]
    assert len(texts) <= (4 if bench.name == "mvlpt" else 2)        # mvlpt has a prompt per target
    images = sum(rows for kind, rows, _, _ in passes if kind == "image")
    assert images == 12 * (1 if bench.name in ("coop_mt", "hipro") else 2)  # zero-shot, prompted


@pytest.mark.parametrize("device, bf16, asked, grad, dtype", [
    ("cpu", True, "auto", True, None),
    ("cpu", True, "bf16", True, torch.bfloat16),
    ("cuda", True, "auto", True, torch.bfloat16),
    ("cuda", False, "auto", True, None),
    ("cuda", False, "auto", False, torch.float16),
    ("cuda", True, "fp32", True, None),
    ("cuda", True, "fp16", True, torch.float16)])
def test_the_precision_is_bfloat16_on_a_gpu_that_supports_it_unless_set(
        monkeypatch, device, bf16, asked, grad, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    prompts = torch.zeros(1, requires_grad=grad)
    scale = types.SimpleNamespace(device=torch.device(device))
    model = types.SimpleNamespace(logit_scale=scale, precision=asked, parameters=lambda: [])
    with common._encoding(model, prompts):
        found = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    assert found == dtype


def test_bfloat16_on_a_cpu_is_close_and_returns_float32_features(model):
    prompts, tokens = torch.randn(2, 2, 64).requires_grad_(), common.tokenize(["cup", "hat"], 2)
    whole = common.encode_text(model, tokens, prompts)
    model.precision = "bf16"
    half = common.encode_text(model, tokens, prompts)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.05 * whole.abs().max()
    half.sum().backward()
    assert prompts.grad.dtype == torch.float32 and prompts.grad.isfinite().all()


def test_a_training_run_has_one_loader_and_keeps_its_images_in_memory(model, tmp_path):
    """Files are not read again, and worker processes live until `close_loader` or until other tasks
    are trained on."""
    folder = make_tree(tmp_path / "shapes", {f"{d}/{c}": 4 for d in "ab" for c in "xy"})
    tasks, args = common.load_tasks(str(folder), split=0.5), common.Args(batch_size=4, workers=2)

    def epoch(*chosen, **how):
        common.seed_everything(1)
        return [images for images, _, _ in common.batches(args, model, list(chosen), **how)]

    def workers():
        return {process.pid for process in multiprocessing.active_children()}

    read = epoch(*tasks)
    first = workers()
    data.keep_all([task.train for task in tasks], 10**6, workers=0)
    assert all(map(torch.equal, epoch(*tasks), read)) and workers() == first and first
    common.close_loader()
    assert not workers()
    for path in tasks[0].train.items + tasks[1].train.items:
        path.write_bytes(b"gone")
    assert all(map(torch.equal, epoch(*tasks), read))
    second = workers()
    epoch(tasks[1])
    assert second and not workers() & second
    args.views = 1
    epoch(*tasks, frozen=True)
    assert not workers()                                # the features of all views are in memory


def test_imports_go_one_way_and_shared_names_are_one_object():
    assert data.Task is common.Task and data.load_tasks is common.load_tasks
    found = {}
    for path in (ROOT / "data").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found[path] = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", text)) & {"common", "clip"}
        if path.parent.name == "build":             # `tiny` is made of CLIP's own layers
            found[path].discard("clip")
    assert len(found) > 15 and not any(found.values()), found


@pytest.mark.slow
def test_the_benchmark_prints_a_row_per_method(monkeypatch, capsys):
    words = "--method coop_mt --clip tiny --classes 9 --repeats 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["bench_speed.py", *words.split()])
    bench_speed.main()
    name, tasks, classes, *numbers = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, tasks, classes) == ("coop_mt", "4", "9")
    assert len(numbers) == 6 and all(float(x) > 0 for x in numbers)
