"""Training runs of the authors' programs, replayed step by step with our training loops in float64
(tests/golden/README.md says how they were recorded)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common
from data.benchmarks import emoji
from data.images import PIXEL_MEAN, PIXEL_STD, read_tile

SHEETS = ["noto", "twemoji", "fluent", "high_contrast"]
STEPS = 6  # per epoch


class Golden:
    """A recorded training run: its images, texts, learning rates, initial and final parameters."""

    def __init__(self, name):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
            self.arrays = {key: torch.from_numpy(file[key]) for key in file}
        self.model = common.load_clip("tiny")[0].double()
        in_pytorch(self.model)
        names = list(emoji.drawings())
        self.names = [names[k] for k in self["classes"]]
        sheets = [next((ROOT / "data" / "emoji").glob(f"{sheet}.*")) for sheet in SHEETS]
        places = zip(self["sheets"].tolist(), self["numbers"].tolist())
        items = [(str(sheets[sheet]), number) for sheet, number in places]
        self.images = common.Images(items, self["labels"].tolist(), read_tile)
        size = self.model.visual.input_resolution
        resized = [image.resize((size, size), Image.Resampling.BICUBIC) for image, _ in self.images]
        pixels = torch.stack([pil_to_tensor(image) for image in resized])       # as clip does
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None]
                     for x in (PIXEL_MEAN, PIXEL_STD))
        self.pixels = (pixels.double() / 255 - mean) / std
        sums = self.pixels.sum(dim=(1, 2, 3))
        assert torch.allclose(sums, self["pixel_sums"], rtol=0, atol=1e-6)

    def __getitem__(self, key):
        found = self.arrays[key]
        return found.double() if found.dtype == torch.float16 else found

    def task(self, template="{}"):
        return common.Task("golden", self.names, template, self.images, self.images)

    def epochs(self, phase, n, **parts):
        """Stands in for `Run.epochs`."""
        self.parts, self.losses, self.lrs = parts, [], []
        for epoch in range(n):
            self.epoch = epoch
            yield epoch

    def log(self, loss=None, **values):
        if loss is not None:
            self.losses.append(loss.item())
            self.lrs.append(self.lr)

    def batches(self, args, model, tasks, frozen=False):
        """Stands in for `common.batches`."""
        self.lr = self.parts["optimizer"].param_groups[0]["lr"]
        for batch in self["batches"][STEPS * self.epoch : STEPS * (self.epoch + 1)].long():
            task = torch.zeros(len(batch), dtype=torch.long)
            yield self.pixels[batch], self["labels"][batch].long(), task

    def start(self, module, names):
        """Give a module the recorded start; names: {its parameter: names of the recorded parts}."""
        with torch.no_grad():
            for name, parameter in module.double().named_parameters():
                parts = [self[f"init/{part}"] for part in names[name]]
                parameter.copy_(torch.cat(parts).view_as(parameter))
        in_pytorch(module)
        return module

    def agrees(self, module, names):
        """Losses, learning rates and final parameters equal the recorded ones."""
        assert self.losses == pytest.approx(self["losses"].tolist(), abs=1e-10)
        assert self.lrs == pytest.approx(self["lrs"].tolist(), rel=1e-12)
        for name, parameter in module.named_parameters():
            ours = parameter.detach()
            wanted = torch.cat([self[f"final/{part}"] for part in names[name]])
            if f"rows/{names[name][0]}" in self.arrays:
                ours = ours[self[f"rows/{names[name][0]}"].long()]
            if name.endswith("in_proj_bias"):  # the keys' true gradient is zero: rounding noise
                ours, wanted = (x.view(3, -1)[[0, 2]] for x in (ours, wanted))
            assert torch.allclose(ours, wanted.view_as(ours), rtol=0, atol=1e-9), name


def in_pytorch(module):
    """Use PyTorch's LayerNorm; CLIP's computes in float32."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.__class__ = nn.LayerNorm


def replayed(monkeypatch, golden, name, start, names, task=None, **settings):
    """Run a method's `train` on the golden batches from the golden start."""
    method = common.load_method(name)
    settings = dict(clip="tiny", epochs=5, warm_up=1, lr=golden["lrs"].max().item(), **settings)
    args = replace(method.Args(), **settings)
    prompts = golden.start(start(method, args), names)
    monkeypatch.setattr(common, "batches", golden.batches)
    monkeypatch.setattr(method, "build", lambda *_: prompts)
    golden.agrees(method.train(args, golden.model, [task or golden.task()], golden), names)


def widths(model):
    return len(model.ln_final.weight), len(model.visual.class_embedding)


def test_coop_matches_its_authors_training(monkeypatch):
    golden = Golden("coop")
    replayed(monkeypatch, golden, "coop_mt", lambda m, args: m.Context(16, 128),
             {"vectors": ["ctx"]})


def test_cocoop_matches_its_authors_training(monkeypatch):
    golden = Golden("cocoop")
    names = {f"meta.{i}.{kind}": [f"meta_net.linear{k}.{kind}"]
             for i, k in ((0, 1), (2, 2)) for kind in ("weight", "bias")}
    replayed(monkeypatch, golden, "coop_mt", lambda m, args: m.Context(16, 128, n_features=192),
             {"vectors": ["ctx"], **names}, conditional=True, single_task=True)


@pytest.mark.parametrize("n_ctx", [2, 4])
def test_maple_matches_its_authors_training(monkeypatch, n_ctx):
    """With 2 prompts the text is "[v1] [v2] of a [class].". The deeper maps start as copies."""
    golden = Golden(f"maple{n_ctx}")
    names = {"P": ["ctx", "compound_prompts_text.0", "compound_prompts_text.1"]}
    maps = ["proj", "compound_prompt_projections.0", "compound_prompt_projections.1"]
    names |= {f"F.{k}.{kind}": [f"{one}.{kind}"] for k, one in enumerate(maps)
              for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        copied = golden[f"init/compound_prompt_projections.0.{kind}"]
        golden.arrays[f"init/compound_prompt_projections.1.{kind}"] = copied

    def start(method, args):
        return method.CoupledPrompts(3, n_ctx, *widths(golden.model), golden.model.visual.ln_pre)

    maple = common.load_method("maple_mt")
    tokens = maple.texts_of(maple.Args(n_ctx=n_ctx), [golden.task()]).tokens
    assert torch.equal(tokens[:, 1 + n_ctx :], golden["tokens"].long()[:, 1 + n_ctx :])
    replayed(monkeypatch, golden, "maple_mt", start, names, golden.task(), depth=3, n_ctx=n_ctx)


def test_vpt_matches_its_authors_training(monkeypatch):
    golden = Golden("mvlpt_vpt")
    replayed(monkeypatch, golden, "vpt_mt", lambda m, args: m.ImagePrompts(6, 4, 192),
             {"vectors": ["vpt_embeddings", "vpt_embeddings_deep"]}, golden.task("a photo of a {}"),
             n_ctx=4)


def test_upt_matches_its_authors_training(monkeypatch):
    """With Adam, and with the block given the prompts as one sequence, as in the paper."""
    golden, method = Golden("mvlpt_upt_sequence_adam"), common.load_method("mvlpt")
    maps = dict(text_in="ctx_coop_pre", text_out="ctx_coop_post", image_in="ctx_vpt_pre",
                image_out="ctx_vpt_post")
    prompt = method.Prompt("upt", 4, 6, *widths(golden.model), 1, 1, 64)
    names = {"U_T": ["ctx"], "U_V": ["vpt_embeddings", "vpt_embeddings_deep"]}
    for name, _ in prompt.named_parameters():
        first, _, rest = name.partition(".")
        if first in maps:
            names[name] = [f"mvlpt_proj_{maps[first]}.{rest}"]
        elif first == "blocks":
            names[name] = [f"mvlpt_proj.resblocks.{rest}"]
    args = replace(method.Args(), clip="tiny", epochs=5, n_ctx=4, width=64,
                   lr=golden["lrs"].max().item())
    monkeypatch.setattr(common, "batches", golden.batches)
    method.learn(args, golden.model, golden, "source", [golden.task()],
                 golden.start(prompt, names), 5, [[0]])
    golden.agrees(golden.parts["prompt"], names)
