"""The peak memory of one training step of every method, computed without a GPU.

    python tests/bench_memory.py                                # Office-Home: 4 tasks, 65 classes
    python tests/bench_memory.py --method jscpt --classes 37 196 102 101 100 47 397 100 101 10
    python tests/bench_memory.py --tasks 20 --classes 5 --batch-size 32 --precision bf16
    python tests/bench_memory.py --real --tasks 2 --classes 10 --batch-size 2 --precision fp32

The step runs on fake tensors, which have shapes but no values, and the bytes of all live storages
are added up: weights, prompts, optimizer, images, activations. ViT-B/16, RN50 for HiPro, fresh
views, fused attention as on a GPU. With one number in --classes, all tasks have the same classes;
with one number per task, each task has its own. --batch-size: images per task, or per step with
mixed batches (default: the method's).

The peak is computed, not measured. It leaves out the CUDA context, the allocator's rounding, kernel
workspaces, and softmax in float32 under a GPU's autocast. "Fits" allows for these: 1.2 times the
peak plus 0.5 GiB must fit into the 15, 23 or 79 GiB that are available on a GPU of 16, 24 or 80 GB.
--real runs the same step on real CPU tensors, each in a separate process, and prints by how much
its resident memory exceeds the computed one (glibc is set to return every block at once; by
default, freed blocks that stay in its heap would add up to 60%).
"""
import argparse
import contextlib
import io
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from bench_speed import OneEpoch, megabytes, tasks_of  # noqa: E402
from conftest import RN50, VIT_B16, random_clip  # noqa: E402

import common  # noqa: E402

# the step of each phase: its method, and settings that make this phase the first
STEPS = {
    "coop_mt": {},
    "vpt_mt": {},
    "maple_mt": {},
    "mvlpt": {},
    "hipro affinity": {},
    "hipro": dict(grouping="random"),
    "mmap grouping": {},
    "mmap": dict(grouping="random"),
    "jscpt": {},
    "jscpt upper": dict(terms=1),       # more Hessian products need no more memory
}
CARDS = {16: 15, 24: 23, 80: 79}        # nominal GB: GiB available to a process


class Memory(TorchDispatchMode):
    """The bytes of all live storages made under this mode: `now`, and the maximum so far, `peak`.

    On top of a FakeTensorMode, values that the code reads stay real: integers, booleans, and draws
    from a generator (a random tree).
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, given=(), named=None):
        made = self.run(function, given, named or {})
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return made

    def run(self, function, given, named):
        tensors = [x for x in tree_leaves((given, named)) if isinstance(x, torch.Tensor)]
        if not tensors and named.get("generator") is None:
            made = function(*given, **named)
            if not isinstance(made, FakeTensor) or made.is_floating_point():
                return made
        elif any(isinstance(x, FakeTensor) for x in tensors):
            return function(*given, **named)
        with unset_fake_temporarily():
            return function(*given, **named)

    def count(self, storage):
        if storage._cdata in self.alive:
            return
        self.alive.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, mark, size):
        self.alive.remove(mark)
        self.now -= size


class Done(Exception):
    """A step has been taken."""


def prepared(name, shape, classes, batch_size=None, precision="fp32"):
    """A function that takes the step `name` of STEPS once.

    shape: of the CLIP; classes: how many each task has; if they differ, no two tasks share names.
    """
    method = common.load_method(name.split()[0])
    args = replace(method.Args(**STEPS[name]), device="cpu", views=0, workers=0)
    args.batch_size = batch_size or args.batch_size
    model = random_clip(**shape)
    model.precision = precision
    tasks = [tasks_of(model, 1, n, 5)[0] for n in classes]
    for t, task in enumerate(tasks):
        task.name = f"task {t}"
        if len(set(classes)) > 1:
            task.class_names = [f"{one} {t}" for one in task.class_names]
    N, size = len(tasks), model.visual.input_resolution

    def batch():
        """(images, labels, task): a batch per task, or one mixed batch."""
        task = torch.arange(N).repeat_interleave(args.batch_size)
        if args.batches == "mixed":
            task = torch.arange(args.batch_size) % N
        return torch.randn(len(task), 3, size, size), torch.zeros_like(task), task

    def step():
        """Run `train` until its first step is done."""
        with (
            mock.patch.object(common, "batches", batches),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(Done),
        ):
            method.train(args, model, tasks, OneEpoch())

    def batches(*_, **__):
        yield batch()
        raise Done

    def upper_step():
        prompts = method.build(args, model, tasks)
        upper = torch.optim.Adam([prompts.alpha, prompts.beta])
        method.upper_step(args, model, method.texts_of(args, tasks), prompts, batch(), batch(),
                          torch.rand(N), torch.rand(N, N), upper)

    return upper_step if name == "jscpt upper" else step


def computed(name, shape, classes, batch_size=None, precision="fp32"):
    """(the bytes of the model, the peak of a step), on fake tensors."""
    with (
        mock.patch.object(torch.nn.Module, "_apply", lambda module, *_: module),
        FakeTensorMode(allow_non_fake_inputs=True),
        Memory() as memory,
    ):      # fake parameters cannot be moved; they are already float32 on the CPU
        step = prepared(name, shape, classes, batch_size, precision)
        weights = memory.now
        step()
        return weights, memory.peak


def shape_of(name):
    """The method's backbone."""
    return RN50 if name.startswith("hipro") else VIT_B16


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = list(dict.fromkeys(name.split()[0] for name in STEPS))
    parser.add_argument("--method", choices=methods, nargs="+", default=methods)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--classes", type=int, nargs="+", default=[65])
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"],
                        default=["fp32", "bf16"])
    parser.add_argument("--real", action="store_true", help="also on real CPU tensors")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    classes = words.classes if len(words.classes) > 1 else words.classes * words.tasks
    if words.step:                      # in a separate process, for the memory of real tensors
        step = prepared(words.step, shape_of(words.step), classes, words.batch_size,
                        words.precision[0])
        print(megabytes("cpu", step))
        return
    print(f"{len(classes)} tasks of {' '.join(map(str, sorted(set(classes))))} classes, batch size "
          f"{words.batch_size or 'of each method'}; GiB, computed\n")
    print(f"{'':16}{'':6}{'weights':>8}{'step':>8}{'peak':>8}  fits 16 / 24 / 80 GB (computed)"
          + ("   real step" if words.real else ""))
    for name in STEPS:
        for precision in words.precision if name.split()[0] in words.method else []:
            weights, peak = computed(name, shape_of(name), classes, words.batch_size, precision)
            fits = " / ".join(
                "yes" if 1.2 * peak / 2**30 + 0.5 < room else "no" for room in CARDS.values()
            )
            row = f"{name:16}{precision:6}{weights / 2**30:8.2f}{(peak - weights) / 2**30:8.2f}"
            row += f"{peak / 2**30:8.2f}  {fits:22}"
            if words.real:
                call = [sys.executable, "-W", "ignore", __file__, "--step", name, "--precision",
                        precision, "--classes", *map(str, classes)]
                if words.batch_size:
                    call += ["--batch-size", str(words.batch_size)]
                done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True,
                                      env=dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"))
                real = float(done.stdout.split()[-1]) * 2**20
                row += f"{real / 2**30:18.2f} ({real / (peak - weights) - 1:+.0%})"
            print(row, flush=True)


if __name__ == "__main__":
    main()
