"""The shipped backbone and benchmark: what they are, that there is something to learn, and that
they can be rebuilt."""
import importlib
import json
import os
import re
import subprocess
import sys

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import common
import data as datasets

DATA = ROOT / "data"


def script(name):
    """The module of one of the scripts that made the shipped files."""
    return importlib.import_module(f"data.build.{name}")


def test_the_unmodified_clip_package_loads_the_shipped_backbone(tiny):
    model, preprocess = clip.load(str(DATA / "tiny_clip.pt"), device="cpu")
    assert 9e6 < sum(p.numel() for p in model.parameters()) < 12e6
    assert len(model.transformer.resblocks) == len(model.visual.transformer.resblocks)
    assert (model.context_length, model.vocab_size) == (77, 49408) and not tiny[0].training
    for theirs, ours in zip(model.parameters(), tiny[0].parameters()):
        assert torch.equal(theirs, ours) and ours.dtype == torch.float32 and not ours.requires_grad


def test_what_ships_stays_under_30_mb_and_names_its_licences():
    done = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True)
    shipped = done.stdout.splitlines()
    assert not shipped or sum((ROOT / path).stat().st_size for path in shipped) < 30e6
    files = (DATA / "README.md", DATA / "LICENSES.md")
    text = " ".join(path.read_text(encoding="utf-8") for path in files)
    owners = "Google, Twitter, Microsoft, OpenMoji, CC BY 4.0, Apache, CC BY-SA 4.0"
    assert all(owner in text for owner in owners.split(", "))


def test_no_test_style_was_pretrained_on_in_any_edition():
    collect, make = script("collect_drawings"), script("make_emoji")
    learned = set(collect.EMOJI_SETS + collect.ICON_SETS)
    assert not learned & set(make.STYLES.values()) and collect.HELD_OUT not in learned
    assert not [name for name in learned if re.match("noto|twemoji|fluent", name)]


def test_zero_shot_is_far_above_chance_and_a_linear_probe_gains(tiny):
    """So there is something to learn. The probe is one linear classifier for all styles on frozen
    features, initialised with the zero-shot one. Chance is under 2%."""
    model, tasks = tiny[0], common.load_tasks("emoji", shots=3, seed=3)
    for task in tasks:
        task.test = task.test.subset(range(0, len(task.test), 4))
    weight = common.zero_shot_classifiers(model, tasks)[0].clone().requires_grad_()
    parts = [common.image_features(model, task.train, workers=0) for task in tasks]
    x, y = torch.cat([x for x, _, _ in parts]), torch.cat([y for _, _, y in parts])
    optimizer = torch.optim.Adam([weight], lr=5e-4)
    for _ in range(30):
        loss = F.cross_entropy(common.logits(model, x, weight), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = [F.normalize(weight.detach(), dim=-1)] * 4
    scores = common.evaluate(common.Args(workers=0), model, tasks, learned)
    assert min(scores["zero_shot"]) > 41
    assert sum(scores["zero_shot"]) / 4 > 51
    assert sum(scores["accuracy"]) / 4 - sum(scores["zero_shot"]) / 4 > 2


def test_pretraining_reads_short_texts_as_common_does(small):
    pretrain, names = script("pretrain_tiny"), ["a drawing of a cup", "a hat"]
    found = pretrain.encode_text(small, pretrain.tokenize([f"{name}." for name in names], 20))
    assert found.shape == (2, 32)
    assert (found - common.encode_text(small, common.tokenize(names))).abs().max() < 1e-5


@pytest.mark.slow
def test_two_minutes_of_pretraining_lower_the_loss_and_write_a_clip(tmp_path):
    """On the benchmark's own drawings: not the way to make a backbone, but enough to test the
    script."""
    classes = json.loads((DATA / "emoji" / "classes.json").read_text(encoding="utf-8"))
    concepts = [dict(key=code, label=label, tags=[name], group=name)
                for name, members in classes.items() for code, label in members]
    images, concept, sets = [], [], []
    for style in datasets.find_listings("emoji"):
        for number, item in enumerate(item for items in style.items for item in items):
            images.append(np.asarray(style.read(item)))
            concept.append(number)
            sets.append(style.name)
    images.append(images[0])
    concept.append(len(concepts))
    concepts.append(dict(key="icon", label="icon", tags=[], group=""))
    sets = np.array([*sets, "icons"])
    np.savez(tmp_path / "drawings.npz", images=np.stack(images), concept=np.array(concept),
             sets=sets, held_out=sets == "Noto", concepts=json.dumps(concepts))

    def pretrained(*more):
        words = [sys.executable, "data/build/pretrain_tiny.py", "--drawings",
                 tmp_path / "drawings.npz", "--state", tmp_path / "state.pt", *more]
        done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True,
                              env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = pretrained("--minutes", 2, "--score-minutes", 0.4)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0] - 0.03, losses
    pretrained("--minutes", 0, "--export", tmp_path / "clip.pt")    # from the saved state alone
    model, _ = common.load_clip(str(tmp_path / "clip.pt"))
    assert common.encode_text(model, common.tokenize(["cup"])).shape == (1, 192)
