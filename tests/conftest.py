"""Shared fixtures: the folder on the import path, small random CLIPs, image trees, and no network
for any test."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clip.model import CLIP  # noqa: E402

import common  # noqa: E402

TINY = dict(
    embed_dim=32,
    image_resolution=32,
    vision_layers=3,
    vision_width=64,
    vision_patch_size=8,
    context_length=77,
    vocab_size=49408,
    transformer_width=64,
    transformer_heads=1,
    transformer_layers=3,
)
VIT_B16 = dict(
    embed_dim=512,
    image_resolution=224,
    vision_layers=12,
    vision_width=768,
    vision_patch_size=16,
    context_length=77,
    vocab_size=49408,
    transformer_width=512,
    transformer_heads=8,
    transformer_layers=12,
)
RN50 = dict(
    embed_dim=1024,
    image_resolution=224,
    vision_layers=(3, 4, 6, 3),
    vision_width=64,
    vision_patch_size=None,
    context_length=77,
    vocab_size=49408,
    transformer_width=512,
    transformer_heads=8,
    transformer_layers=12,
)


def random_clip(**shape):
    torch.manual_seed(0)
    return CLIP(**shape).float().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small():
    return random_clip(**TINY)


@pytest.fixture(scope="session")
def vit_b16():
    return random_clip(**VIT_B16)


@pytest.fixture(scope="session")
def rn50():
    return random_clip(**RN50)


@pytest.fixture(scope="session")
def tiny():
    return common.load_clip("tiny", "cpu")


NO_NETWORK = """
import socket
connect = socket.socket.connect
def refuse(self, *args):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise AssertionError("a test tried to use the network")
    return connect(self, *args)
socket.socket.connect = refuse
"""
exec(NO_NETWORK)  # every test fails that opens a connection; worker processes use local ones


def make_tree(root, layout, size=24):
    """Write images of noise: {"domain/class": count, ...} below root; no two are equal."""
    number = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            number += 1
            noise(number, size).save(root / folder / f"{i:03d}.png")
    return root


@pytest.fixture
def tree(tmp_path):
    """Your own data in miniature: 2 domains, 3 classes, 5 images each."""
    return make_tree(
        tmp_path / "shapes",
        {f"{d}/{c}": 5 for d in ("drawn", "painted") for c in ("Red_Ball", "cup", "hat")},
    )


def run_script(script, *words, cwd=ROOT, timeout=280, **kwargs):
    """A method file as a process, as a user would start it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(
            NO_NETWORK
        )  # Python runs this in the process first
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, words)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=folder),
            **kwargs,
        )


@pytest.fixture
def here(monkeypatch, capsys):
    """A method file as a command without a process of its own: (script, words) -> (exit code, what
    it printed, its stderr)."""

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.setattr(common.Run, "latest", None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            own = script == "common.py"
            common.script(common.commands if own else
                          common.load_method(script.removesuffix(".py")).main)
            sys.exit(0)
        return stop.value.code, *capsys.readouterr()

    return call


def numbers(folder):
    """result.json without the clock."""
    result = json.loads((folder / "result.json").read_text())
    result.pop("seconds")
    return result


class Phases:
    """Stands in for the run folder where a test calls `train` itself: nothing is written.

    steps: after how many calls of `log` in a phase the phase ends (None: all its epochs).
    """

    def __init__(self, n_epochs=None):
        self.n_epochs, self.logged, self.parts = n_epochs, [], {}

    def seed_phase(self, phase):
        common.seed_everything("test", phase)

    def epochs(self, phase, n, **parts):
        self.parts[phase] = parts
        for epoch in range(n if self.n_epochs is None else min(n, self.n_epochs)):
            common.seed_everything("test", phase, epoch)
            yield epoch

    def log(self, **values):
        self.logged.append(values)


def noise(number, size=32):
    return Image.frombytes("RGB", (size, size), random.Random(number).randbytes(3 * size * size))


def small_tasks(*names):
    """Tasks of 3 classes, with 6 training and 6 test images: noise in a colour of the class."""

    def read(number):
        colour = Image.new("RGB", (32, 32), ["red", "green", "blue"][number % 10 % 3])
        return Image.blend(noise(number), colour, 0.6)

    def images(first):
        return common.Images(range(first, first + 6), [0, 1, 2, 0, 1, 2], read)

    return [
        common.Task(name, ["cup", "hat", "red ball"], "a {}", images(10 * i), images(100 + 10 * i))
        for i, name in enumerate(names)
    ]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with `python -m pytest -m slow`")
    config.addinivalue_line("filterwarnings", "ignore:pkg_resources is deprecated")


def pytest_collection_modifyitems(config, items):
    """Plain `python -m pytest` leaves the slow tests out."""
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
