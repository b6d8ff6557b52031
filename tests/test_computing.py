"""What makes the methods fast and small changes no result: passes, views, images, precision."""

import re
import subprocess
import sys
import types

import pytest
import torch
from bench_speed import METHODS, Bench
from conftest import ROOT, TINY, make_tree, random_clip

import common

WORDS = types.SimpleNamespace(clip="tiny", device="cpu", repeats=1)
TEXTS = dict(coop_mt=5, maple_mt=5, mvlpt=5, hipro=25, mmap=15, jscpt=15)  # 3 tasks of 5 classes


@pytest.fixture
def model():
    """A random CLIP that a test may write on."""
    return random_clip(**TINY)


def bench_of(name):
    return Bench(WORDS, name, 3, 5)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_one_pass_of_all_texts_and_one_of_all_images(name):
    """Tasks that agree in prompts and names share rows; a text is as long as its longest row."""
    seen = bench_of(name)
    passes = [job for job in seen.passes(lambda: seen.train(1)) if job[3]]
    wanted = [("text", TEXTS[name])] if name in TEXTS else []
    if name not in ("coop_mt", "hipro"):
        wanted.append(("image", 12))
    assert sorted(job[:2] for job in passes) == sorted(wanted, reverse=False)
    assert all(tokens < 45 for kind, _, tokens, _ in passes if kind == "text")


@pytest.mark.parametrize("name", METHODS)
def test_gradients_stop_where_the_first_prompt_enters(name):
    """What comes before needs none: its outputs ask for no gradient, and CLIP's weights get
    none."""
    bench, before = bench_of(name), []
    for module in (bench.model.token_embedding, bench.model.visual.conv1):
        module.register_forward_hook(lambda module, given, made: before.append(made.requires_grad))
    bench.train(1)
    assert before and not any(before)
    assert all(p.grad is None and not p.requires_grad for p in bench.model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_texts_are_encoded_once_an_evaluation_and_images_once_per_prompt(name):
    bench = bench_of(name)
    prompts, _ = bench.train(1)
    common._kept.clear()
    common._plain.clear()
    passes = bench.passes(lambda: bench.evaluate(prompts))
    texts = [job for job in passes if job[0] == "text"]
    assert len(texts) <= (4 if name == "mvlpt" else 2)  # mvlpt has a prompt per target
    images = sum(rows for kind, rows, _, _ in passes if kind == "image")
    assert images == 12 * (1 if name in ("coop_mt", "hipro") else 2)  # zero-shot's, and prompted


@pytest.mark.parametrize(
    "device, bf16, asked, grad, dtype",
    [
        ("cpu", True, "auto", True, None),
        ("cpu", True, "bf16", True, torch.bfloat16),
        ("cuda", True, "auto", True, torch.bfloat16),
        ("cuda", False, "auto", True, None),
        ("cuda", False, "auto", False, torch.float16),
        ("cuda", True, "fp32", True, None),
        ("cuda", True, "fp16", True, torch.float16),
    ],
)
def test_the_precision_is_bfloat16_where_a_gpu_has_it_or_what_is_asked(
    monkeypatch, device, bf16, asked, grad, dtype
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    scale = types.SimpleNamespace(device=torch.device(device))
    model = types.SimpleNamespace(logit_scale=scale, precision=asked)
    with torch.set_grad_enabled(grad):
        context = common._precision(model)
    found = context.fast_dtype if isinstance(context, torch.autocast) else None
    assert found == dtype


def test_bfloat16_on_a_cpu_is_near_and_leaves_features_in_float32(model):
    prompts, tokens = torch.randn(2, 2, 64).requires_grad_(), common.tokenize(["cup", "hat"], 2)
    whole = common.encode_text(model, tokens, prompts)
    model.precision = "bf16"
    half = common.encode_text(model, tokens, prompts)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.05 * whole.abs().max()
    half.sum().backward()
    assert prompts.grad.dtype == torch.float32 and prompts.grad.isfinite().all()


def test_training_images_are_held_in_memory_and_are_the_same(model, tmp_path):
    folder = make_tree(tmp_path / "shapes", {f"{d}/{c}": 4 for d in "ab" for c in "xy"})
    tasks, args = common.load_tasks(str(folder), split=0.5), common.Args(batch_size=4, workers=0)

    def epoch():
        common.seed_everything(1)
        return [images for images, _, _ in common.batches(args, model, tasks)]

    read, room = epoch(), 6 * 4 * 24 * 24 + 100
    for task in tasks:
        for i in range(len(task.train)):
            room = task.train.keep(i, room)
    assert room == 100 and [len(task.train.kept) for task in tasks] == [4, 2]  # six fit
    for path in tasks[0].train.items + list(tasks[1].train.kept):
        path.write_bytes(b"gone")
    assert all(torch.equal(one, other) for one, other in zip(epoch(), read))
    part = tasks[0].train.subset([1, 0])
    assert part[1][0].tobytes() == tasks[0].train[0][0].tobytes()  # a part finds them, too
    tasks[0].train[0][0].putpixel((0, 0), (1, 2, 3))  # what is handed out is a copy
    assert all(torch.equal(one, other) for one, other in zip(epoch(), read))


def test_imports_are_ordinary_and_every_name_is_one():
    code = "import common, data; assert data.Task is common.Task"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for path in (ROOT / "data").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found[path] = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", text)) & {"common", "clip"}
        if path.parent.name == "build":             # `tiny` is made of CLIP's own layers
            found[path].discard("clip")
    assert len(found) > 15 and not any(found.values()), found


def test_the_benchmark_prints_a_row_per_method():
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(ROOT / "tests" / "bench_speed.py"),
            "--method",
            "coop_mt",
            "--clip",
            "tiny",
            "--classes",
            "9",
            "--repeats",
            "1",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    name, tasks, classes, *numbers = done.stdout.splitlines()[-1].split()
    assert (name, tasks, classes) == ("coop_mt", "4", "9") and all(float(x) > 0 for x in numbers)
