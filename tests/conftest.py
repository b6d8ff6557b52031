"""Shared by the tests: the import path, small random CLIPs, images, commands as a user types them,
and no network for any test."""
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import runpy
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import data  # noqa: E402

METHODS = "coop_mt vpt_mt maple_mt mvlpt hipro mmap jscpt".split()
TEXT = dict(context_length=77, vocab_size=49408)
TINY = dict(TEXT, embed_dim=32, image_resolution=32, vision_layers=3, vision_width=64,
            vision_patch_size=8, transformer_width=64, transformer_heads=1, transformer_layers=3)
FULL = dict(TEXT, image_resolution=224, transformer_width=512, transformer_heads=8,
            transformer_layers=12)
VIT_B16 = dict(FULL, embed_dim=512, vision_layers=12, vision_width=768, vision_patch_size=16)
RN50 = dict(FULL, embed_dim=1024, vision_layers=(3, 4, 6, 3), vision_width=64,
            vision_patch_size=None)


RESNET = dict(TINY, vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None,
              image_resolution=64, embed_dim=64)


class Trap:
    """An object that creates the file `trap` when it is unpickled."""

    def __reduce__(self):
        return open, ("trap", "w")


def random_clip(**shape):
    torch.manual_seed(0)
    return common.clip.model.CLIP(**shape).float().eval().requires_grad_(False)


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


@pytest.fixture(scope="session")
def random_pt(tmp_path_factory, small):
    """A checkpoint of `small`, for --clip."""
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    torch.save(small.state_dict(), path)
    return path


# -------------------------------------------------------------------------------- images and tasks

def noise(number, size=32):
    return Image.frombytes("RGB", (size, size), random.Random(number).randbytes(3 * size * size))


def coloured(number, label, size=32):
    """Noise tinted with the colour of its class, so that there is something to learn."""
    colour = Image.new("RGB", (size, size), ["red", "green", "blue"][label])
    return Image.blend(noise(number, size), colour, 0.6)


def make_tree(root, layout, size=24):
    """Write noise images below root, {"domain/class": count, ...}; no two are equal."""
    number = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            number += 1
            noise(number, size).save(root / folder / f"{i:03d}.png")
    return root


@pytest.fixture
def tree(tmp_path):
    """A user's own data in miniature: 2 domains, 3 classes, 5 images each."""
    folders = [f"{d}/{c}" for d in ("drawn", "painted") for c in ("Red_Ball", "cup", "hat")]
    return make_tree(tmp_path / "shapes", dict.fromkeys(folders, 5))


def rendered(lists, steps, size, seed, workers=0, **how):
    """What a loader of views yields for some steps."""
    yield from data.views(lists, size, seed, workers=workers, **how).load(steps)


def table(text):
    """{first cell: the other cells} of each line; two or more blanks separate cells."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()]
    return {name: rest for name, *rest in cells}


def says(text, *words):
    """Assert that a text contains all these words."""
    assert [str(word) for word in words if str(word) not in text] == [], text


def counts(images):
    """How many images each class has, in the order of the labels."""
    return [images.classes.count(k) for k in range(max(images.classes) + 1)]


def edit(path, change):
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_cifar(root, patch, kind, meta, **parts):
    """Write torchvision's CIFAR10 or CIFAR100 archive from the contents of its train and test parts
    and of its file of names; torchvision checks their hashes."""
    def write(name, content):
        path = root / kind.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    for part, content in parts.items():
        patch.setattr(kind, f"{part}_list", [[part, write(part, content)]])
    patch.setattr(kind, "meta", dict(kind.meta, md5=write(kind.meta["filename"], meta)))


def small_tasks(*names):
    """Tasks of 3 classes, with 6 training and 6 test images."""
    def read(number):
        return coloured(number, number % 10 % 3)

    def images(first):
        return common.Images(range(first, first + 6), [0, 1, 2, 0, 1, 2], read)

    return [common.Task(name, ["cup", "hat", "red ball"], "a {}", images(10 * i),
                        images(100 + 10 * i)) for i, name in enumerate(names)]


# ---------------------------------------------------------------------------------------- commands

OFFLINE = ROOT / "tests" / "offline"
runpy.run_path(str(OFFLINE / "sitecustomize.py"))       # a test that opens a connection fails


def words_of(*words):
    """The words of a command, given as one string or as separate words."""
    return shlex.split(words[0]) if len(words) == 1 else list(map(str, words))


def run(*words):
    """Run a command in this process, as a user types it: (exit code, stdout, stderr)."""
    argv, out, err = words_of(*words), io.StringIO(), io.StringIO()
    name = argv[0].removesuffix(".py")
    common.Run.latest, code = None, 0
    with (mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        try:
            common.script(common.commands if name == "common" else common.method_of(name))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def here():
    return run


def process_of(*words):
    """Arguments for `subprocess` that run a command without network or GPU."""
    script, *rest = words_of(*words)
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(OFFLINE))
    return dict(args=[sys.executable, str(ROOT / script), *rest], env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_script(*words, cwd=ROOT, timeout=280, **how):
    """Run a command as a process until it ends."""
    return subprocess.run(**process_of(*words), cwd=cwd, timeout=timeout, **how)


class Killed(BaseException):
    """A process has been killed."""


@contextlib.contextmanager
def killed(before, nth=1):
    """Kill the code inside when it is about to write a file of this name for the nth time."""
    replace, names = os.replace, []

    def stop(part, path):
        names.append(Path(path).name)
        if names.count(before) == nth:
            raise Killed
        replace(part, path)

    with mock.patch("os.replace", stop), pytest.raises(Killed):
        yield


def numbers(folder):
    """result.json without times, and without how and where the run was started."""
    result = json.loads((folder / "result.json").read_text())
    result.pop("seconds")
    for key in ("out", "resume", "root"):
        result["settings"].pop(key)
    return result


class Phases:
    """Stands in for a Run in tests that call `train` directly; nothing is written.

    logged: the values of each step; steps: the same by phase; parts: the parts of each phase.
    """

    def __init__(self, seed="test"):
        self.seed, self.logged, self.steps, self.parts = seed, [], {}, {}
        self.sources = defaultdict(list)

    def seed_phase(self, phase):
        common.seed_everything(self.seed, phase)

    def epochs(self, phase, n, **parts):
        self.parts[phase], self.steps[phase], self.phase = parts, [], phase
        for epoch in range(n):
            common.seed_everything(self.seed, phase, epoch)
            yield epoch

    def once(self, phase, function, **parts):
        for _ in self.epochs(phase, 1, **parts):
            function()

    def log(self, **values):
        values = {name: value.detach() if torch.is_tensor(value) else value
                  for name, value in values.items()}
        self.logged.append(values)
        self.steps[self.phase].append(values)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with `python -m pytest -m slow`")
    config.addinivalue_line("filterwarnings", "ignore:pkg_resources is deprecated")


def pytest_collection_modifyitems(config, items):
    """Plain `python -m pytest` leaves the slow tests out."""
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
