"""What a training step and an evaluation cost, against the `clip` package's own encoders.

    python tests/bench_speed.py                                     # all methods, ViT-B/16
    python tests/bench_speed.py --method coop_mt mmap --step-only --classes 65 345 1000
    python tests/bench_speed.py --method coop_mt mmap --step-only --tasks 4 10 20

A ViT-B/16 with random weights (or --clip tiny), 4 tasks of Office-Home's 65 class names, 4 images
per task on a CPU and 16 on a GPU. One row per method: milliseconds per training step, images per
second in an evaluation, the memory that a step adds to the model's, and each as a ratio to its
floor. The floor is the `clip` package's own layers on as many rows and tokens as the method's
encoders get, with prompts counted and nothing shared, measured alternately in the same process:
forward, and for a training step also backward to the input of the first layer where the method
trains through that encoder. The best of --repeats counts, in CPU time on a CPU, so that other
processes do not affect the ratio. Text-only methods get image features, as with fixed views
(`--views`). On a CPU the memory is the peak of a separate process.
"""
import argparse
import copy
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from conftest import METHODS, VIT_B16, Phases, random_clip  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402

ALONE = ["cocoop", "proda"]                     # of coop_mt.py, trained on one task
FROZEN = {"coop_mt", "hipro", *ALONE}           # no gradients pass through the image encoder
ONE_PHASE = dict(
    cocoop=dict(conditional=True, single_task=True),
    proda=dict(proda=2, single_task=True),
    mmap=dict(grouping="random"),
    hipro=dict(grouping="random"),
    mvlpt=dict(source="none", group_size="all"),
    jscpt=dict(upper_every=10**6),
)
NAMES = ROOT / "data" / "class_names" / "officehome.txt"


def tasks_of(model, n_tasks, n_classes, batch):
    """Tasks with the same classes and with images in memory."""
    lines = NAMES.read_text(encoding="utf-8").splitlines()
    names = [line.split("\t")[-1] for line in lines if line]
    names = [f"{names[i % 65]}{f' {i // 65}' * (i >= 65)}" for i in range(n_classes)]
    size = model.visual.input_resolution

    def picture(number):
        draw = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=draw)
        return Image.fromarray(pixels.numpy())

    tasks = []
    for t in range(n_tasks):
        numbers = range(5 * batch * t, 5 * batch * (t + 1))
        images = common.Images(numbers, [i % n_classes for i in range(5 * batch)], picture)
        test = images.subset(range(batch))
        tasks.append(common.Task(f"task {t}", names, "a photo of a {}", images, test))
    return tasks


class OneEpoch(Phases):
    """Stands in for a run: one epoch of every phase, and nothing is kept."""

    def epochs(self, phase, n, **parts):
        return super().epochs(phase, 1, **parts)

    def log(self, **values):
        pass


def clock(device):
    """Seconds: CPU time on a CPU; on a GPU, wall time once it has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Bench:
    """A method's training step: `train` runs on one batch again and again."""

    def __init__(self, words, name, n_tasks, n_classes):
        common.seed_everything(1)
        self.words, self.name = words, name
        if words.clip == "ViT-B/16":
            self.model = random_clip(**VIT_B16).to(words.device)
        else:
            self.model = common.load_clip("tiny", words.device)[0]
        self.method = common.method_of("coop_mt" if name in ALONE else name)
        batch = 16 if words.device.startswith("cuda") else 4
        self.tasks = tasks_of(self.model, n_tasks, n_classes, batch)
        args = self.method.Args(**ONE_PHASE.get(name, {}))
        self.args = replace(args, device=words.device, views=0, workers=0)
        size, D = self.model.visual.input_resolution, self.model.text_projection.shape[1]
        B = n_tasks * batch
        self.task = torch.arange(n_tasks, device=words.device).repeat_interleave(batch)
        self.labels = torch.arange(B, device=words.device) % n_classes
        images = torch.randn(B, D) if name in FROZEN else torch.randn(B, 3, size, size)
        self.images = images.to(words.device)

    def train(self, steps, between=None):
        """Run `train` for some steps: (the trained prompts, the seconds of each step)."""
        seconds = []

        def batches(*_, **__):
            for _ in range(steps):
                start = clock(self.words.device)
                yield self.images, self.labels, self.task
                seconds.append(clock(self.words.device) - start)
                if between:
                    between()

        with mock.patch.object(common, "batches", batches):
            prompts = self.method.train(self.args, self.model, self.tasks, OneEpoch())
        return prompts, seconds

    def evaluate(self, prompts):
        """Score all tasks; pixels are cached, features are not, since the model is a new copy."""
        model = copy.copy(self.model)
        how = self.method.classify(self.args, model, self.tasks, prompts)
        return common.evaluate(self.args, model, self.tasks, **how)

    def passes(self, function):
        """The encoders' work in function(): (kind, rows, tokens, whether it has a backward pass).
        """
        seen, text, image = [], common.encode_text, common.encode_image

        def trained(prompts):
            return prompts is not None and prompts.requires_grad and torch.is_grad_enabled()

        def spy_text(model, tokens, prompts=None, sets=None):
            seen.append(("text", *tokens.shape, trained(prompts)))
            return text(model, tokens, prompts, sets)

        def spy_image(model, images, prompts=None, sets=None):
            if images.ndim == 4:
                n = len(model.visual.positional_embedding)
                n += 0 if prompts is None else prompts.shape[-2]
                seen.append(("image", len(images), n, trained(prompts)))
            return image(model, images, prompts, sets)

        with mock.patch.multiple(common, encode_text=spy_text, encode_image=spy_image):
            function()
        return seen


def floor_of(model, seen):
    """The same numbers of rows and tokens through the package's own layers."""
    device, jobs = model.logit_scale.device, []
    for kind, rows, tokens, trained in seen:
        part = model.transformer if kind == "text" else model.visual.transformer
        x = torch.randn(tokens, rows, part.width, device=device, requires_grad=trained)
        mask = torch.full((tokens, tokens), float("-inf"), device=device).triu(1)
        jobs.append((part, x, kind, mask if kind == "text" else None))

    def floor():
        total = 0
        for part, x, kind, mask in jobs:
            x.grad = None
            for block in part.resblocks:
                block.attn_mask = mask
            with common._encoding(model, x):
                y = part(x)
                if kind == "text":
                    features = model.ln_final(y[-1]) @ model.text_projection
                else:
                    features = model.visual.ln_post(y[0]) @ model.visual.proj
                total = total + features.float().sum()
        if total.requires_grad:
            total.backward()

    return floor


def megabytes(device, function):
    """How much function() adds to the peak memory."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")  # only on Linux

    def peak():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024

    clear.write_text("5")  # reset the peak to the memory now in use
    before = peak()
    function()
    return peak() - before


def row_of(words, name, n_tasks, n_classes):
    """A method's numbers: [ms, ratio, images per second, ratio, MB, ratio]."""
    bench = Bench(words, name, n_tasks, n_classes)
    call = [sys.executable, __file__, "--method", name, "--clip", words.clip,
            "--device", words.device]
    call += ["--tasks", str(n_tasks), "--classes", str(n_classes), "--peak"]

    def peak(rows):
        """The megabytes in a separate process: of a step, or of the floor's rows."""
        done = subprocess.run([*call, json.dumps(rows)], stdout=subprocess.PIPE, text=True,
                              check=True)
        return float(done.stdout.split()[-1])

    if words.step_only:
        _, steps = bench.train(words.repeats + 1)
        none = float("nan")
        return [1000 * min(steps[1:]), none, none, none, peak([]), none]
    per_step = [job for job in bench.passes(lambda: bench.train(1)) if job[3]]
    floor, floors = floor_of(bench.model, per_step), []

    def between():
        start = clock(words.device)
        floor()
        floors.append(clock(words.device) - start)

    prompts, steps = bench.train(words.repeats + 1, between)
    evaluation = floor_of(bench.model, bench.passes(lambda: bench.evaluate(prompts)))
    times, plain = [], []
    for _ in range(words.repeats):
        start = clock(words.device)
        bench.evaluate(prompts)
        middle = clock(words.device)
        with torch.no_grad():
            evaluation()
        times.append(middle - start)
        plain.append(clock(words.device) - middle)
    if words.device.startswith("cuda"):
        peaks = megabytes(words.device, lambda: bench.train(1)), megabytes(words.device, floor)
    else:
        peaks = peak([]), peak(per_step)
    scored = sum(len(task.test) for task in bench.tasks)
    return [
        1000 * min(steps[1:]),
        min(steps[1:]) / min(floors[1:]),
        scored / min(times),
        min(times) / min(plain),
        peaks[0],
        peaks[0] / peaks[1] if peaks[1] else float("nan"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS + ALONE, nargs="+",
                        default=METHODS + ALONE)
    parser.add_argument("--clip", choices=["tiny", "ViT-B/16"], default="ViT-B/16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--classes", type=int, nargs="+", default=[65])
    parser.add_argument("--tasks", type=int, nargs="+", default=[4])
    parser.add_argument("--step-only", action="store_true", help="time and memory, no ratios")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.peak:  # in a separate process: the memory of a step, or of the floor's rows
        bench = Bench(words, words.method[0], words.tasks[0], words.classes[0])
        seen = json.loads(words.peak)
        work = floor_of(bench.model, seen) if seen else lambda: bench.train(1)
        print(megabytes(words.device, work))
        return
    print(f"{words.clip}, random weights, {words.device}, {torch.get_num_threads()} threads\n")
    print(f"{'':10}{'tasks':>6}{'classes':>9}{'ms per step':>12}{'ratio':>8}{'images/s':>12}"
          f"{'ratio':>8}{'MB per step':>12}{'ratio':>8}")
    for name in words.method:
        for n_tasks in [1] if name in ALONE else words.tasks:
            for n_classes in words.classes:
                row = row_of(words, name, n_tasks, n_classes)
                numbers = "{:12.0f}{:8.2f}{:12.1f}{:8.2f}{:12.0f}{:8.2f}".format(*row)
                print(f"{name:10}{n_tasks:6}{n_classes:9}{numbers}", flush=True)


if __name__ == "__main__":
    main()
