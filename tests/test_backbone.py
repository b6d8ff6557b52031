"""The shipped backbone and benchmark: what they are, that there is something to learn, and that
they can be made again."""

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
from conftest import ROOT, TINY, random_clip

import common
import data as datasets

DATA = ROOT / "data"


def script(name):
    """The module of one of the scripts that made the shipped files."""
    return importlib.import_module(f"data.build.{name}")


def test_the_unmodified_clip_package_loads_the_shipped_backbone(tiny):
    model, preprocess = clip.load(str(DATA / "tiny_clip.pt"), device="cpu")
    assert 9e6 < sum(p.numel() for p in model.parameters()) < 12e6
    assert (
        len(model.transformer.resblocks) == len(model.visual.transformer.resblocks)
        and model.context_length == 77
    )
    assert model.vocab_size == 49408 and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), tiny[0].parameters())
    )
    assert (
        all(p.dtype == torch.float32 and not p.requires_grad for p in tiny[0].parameters())
        and not tiny[0].training
    )


def test_what_ships_stays_under_30_mb_and_names_its_licences():
    shipped = subprocess.run(
        ["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")[:-1]
    assert not shipped or sum((ROOT / f).stat().st_size for f in shipped) < 30e6
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for owner in (
        "Google",
        "Twitter",
        "Microsoft",
        "OpenMoji",
        "CC BY 4.0",
        "Apache",
        "CC BY-SA 4.0",
    ):
        assert owner in text


def test_no_test_style_nor_another_edition_of_one_was_pretrained_on():
    collect = script("collect_drawings")
    make = script("make_emoji")
    learned = set(collect.EMOJI_SETS + collect.ICON_SETS)
    assert not learned & set(make.STYLES.values()) and collect.HELD_OUT not in learned
    assert not [name for name in learned if re.match("noto|twemoji|fluent", name)]


def test_a_torchscript_archive_loads_as_openais_downloads_do(tmp_path):
    model = random_clip(**TINY)
    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.trace(model, example, check_trace=False).save(str(tmp_path / "archive.pt"))
    loaded, preprocess = common.load_clip(str(tmp_path / "archive.pt"))
    tokens = clip.tokenize(["a cup."])
    wanted = random_clip(**TINY).encode_text(tokens)
    assert (loaded.encode_text(tokens) - wanted).abs().max() < 1e-5
    assert preprocess(common.load_tasks("emoji", shots=6)[0].test[0][0]).shape == (3, 32, 32)


def test_zero_shot_is_far_above_chance_in_every_style(tiny):
    args = common.Args(workers=0)
    tasks = common.load_tasks("emoji", shots=6)
    scores = common.evaluate(args, tiny[0], tasks, common.zero_shot_classifiers(tiny[0], tasks))
    assert scores["zero_shot"] == scores["accuracy"]
    assert sum(scores["zero_shot"]) / 4 > 51 and min(scores["zero_shot"]) > 41  # chance is under 2


def test_a_linear_probe_gains_so_there_is_something_to_learn(tiny):
    """One linear classifier for all styles on the frozen features, started at the zero-shot one."""
    model, gains = tiny[0], []
    for seed in (1, 2, 3):
        tasks = common.load_tasks("emoji", shots=6, seed=seed)
        start = common.zero_shot_classifiers(model, tasks)[0]
        weight = start.clone().requires_grad_()
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
        gains.append(sum(scores["accuracy"]) / 4 - sum(scores["zero_shot"]) / 4)
    assert min(gains) > 2


def test_pretraining_reads_short_texts_as_common_does(small):
    pretrain = script("pretrain_tiny")
    tokens = pretrain.tokenize(["a drawing of a cup.", "a hat"], 20)
    found = pretrain.encode_text(small, tokens)
    assert found.shape == (2, 32)
    assert (found - common.encode_text(small, tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("change", ["another family", "inside of a dict"])
def test_a_checkpoint_of_another_family_is_refused_with_what_is_accepted(tmp_path, change):
    state = random_clip(**TINY).state_dict()
    other = dict(state_dict=state, epoch=3)
    if change == "another family":
        other = {f"vision_model.{key}": value for key, value in state.items()}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(common.UserError, match="not called as those of OpenAI's.* give a"):
        common.load_clip(str(tmp_path / "other.pt"))


def test_weights_in_float32_stay_float32(tmp_path):
    """clip.load rounds a file's weights to half precision on their way."""
    model = random_clip(**TINY)
    torch.save(model.state_dict(), tmp_path / "full.pt")
    loaded, _ = common.load_clip(str(tmp_path / "full.pt"))
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters()))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.slow
def test_two_minutes_of_pretraining_lower_the_loss_and_write_a_clip(tmp_path):
    """On the benchmark's own drawings, which is no way to make a backbone and a fair way to see the
    script work."""
    classes = json.loads((DATA / "emoji" / "classes.json").read_text(encoding="utf-8"))
    concepts = [
        dict(key=code, label=label, tags=[name], group=name)
        for name, members in classes.items()
        for code, label in members
    ]
    tasks = datasets.find_listings("emoji")
    images, concept, sets = [], [], []
    for style in tasks:
        for number, item in enumerate(item for items in style.items for item in items):
            images.append(np.asarray(style.read(item)))
            concept.append(number)
            sets.append(style.name)
    images, concept, sets = (
        images + images[:1],
        concept + [len(concepts)],
        np.array(sets + ["icons"]),
    )
    np.savez(
        tmp_path / "drawings.npz",
        images=np.stack(images),
        concept=np.array(concept),
        sets=sets,
        held_out=sets == "Noto",
        concepts=json.dumps(concepts + [dict(key="icon", label="icon", tags=[], group="")]),
    )
    words = [
        sys.executable,
        "data/build/pretrain_tiny.py",
        "--drawings",
        tmp_path / "drawings.npz",
        "--state",
        tmp_path / "state.pt",
    ]
    run = lambda *more: subprocess.run(
        [*map(str, [*words, *more])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
    )
    first = run("--minutes", 2, "--score-minutes", 0.4)
    assert first.returncode == 0, first.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", first.stdout)]
    assert losses[-1] < losses[0] - 0.03, losses
    second = run(
        "--minutes", 0, "--export", tmp_path / "clip.pt"
    )  # takes up the state and goes no further
    assert second.returncode == 0, second.stderr
    model, _ = common.load_clip(str(tmp_path / "clip.pt"))
    assert common.encode_text(model, common.tokenize(["cup"])).shape == (1, 192)
