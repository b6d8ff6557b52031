"""The shipped backbone and benchmark: what they are, that there is something to learn, and that they can be made again."""
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

DATA = ROOT / "data"


def test_the_unmodified_clip_package_loads_the_shipped_backbone(tiny):
    model, preprocess = clip.load(str(DATA / "tiny_clip.pt"), device="cpu")
    assert 9e6 < sum(p.numel() for p in model.parameters()) < 12e6
    assert len(model.transformer.resblocks) == len(model.visual.transformer.resblocks) and model.context_length == 77
    assert model.vocab_size == 49408 and all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny[0].parameters()))
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in tiny[0].parameters()) and not tiny[0].training


def test_what_ships_stays_under_30_mb_and_names_its_licences():
    shipped = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")[:-1]
    assert not shipped or sum((ROOT / f).stat().st_size for f in shipped) < 30e6
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for owner in ("Google", "Twitter", "Microsoft", "OpenMoji", "CC BY 4.0", "Apache", "CC BY-SA 4.0"):
        assert owner in text


def test_no_test_style_nor_another_edition_of_one_was_pretrained_on():
    collect = common.load_file(DATA / "collect_drawings.py", "collect_drawings")
    make = common.load_file(DATA / "make_emoji.py", "make_emoji")
    learned = set(collect.EMOJI_SETS + collect.ICON_SETS)
    assert not learned & set(make.STYLES.values()) and collect.HELD_OUT not in learned
    assert not [name for name in learned if re.match("noto|twemoji|fluent", name)]


def test_a_torchscript_archive_loads_as_openais_downloads_do(tmp_path):
    model = random_clip(**TINY)
    example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.trace(model, example, check_trace=False).save(str(tmp_path / "archive.pt"))
    loaded, preprocess = common.load_clip(str(tmp_path / "archive.pt"))
    tokens = clip.tokenize(["a cup."])
    half = random_clip(**TINY)
    clip.model.convert_weights(half)                                            # clip.load stores the weights in half precision
    assert (loaded.encode_text(tokens) - half.float().encode_text(tokens)).abs().max() < 1e-5
    assert preprocess(common.load_tasks("emoji", 0.1)[0].test[0][0]).shape == (3, 32, 32)


@pytest.fixture(scope="module")
def features(tiny):
    """The benchmark's image features, computed once for all divisions of it: Images -> (features [n, D], labels [n])."""
    known = {}
    for task in common.load_tasks("emoji", split=0.1):
        for images in (task.train, task.test):
            known.update(zip(images.items, common.image_features(tiny[0], images, tiny[1])[0]))
    return lambda images: (torch.stack([known[item] for item in images.items]), torch.tensor(images.labels))


def test_zero_shot_is_far_above_chance_in_every_style(tiny, features):
    tasks = common.load_tasks("emoji", split=0.1)
    scores = [common.evaluate(*tiny, task, text, features=features(task.test)) for task, text in zip(tasks, common.zero_shot(tiny[0], tasks))]
    print("zero-shot", [round(s, 1) for s in scores])
    assert sum(scores) / 4 > 51 and min(scores) > 41            # chance is under 2


def linear_probe(model, preprocess, tasks, features):
    """(zero-shot, probe) a task: one linear classifier for all styles, on the frozen image features of the training drawings.

    It starts as the zero-shot text features; full-batch Adam at 0.0005 for 30 steps, chosen on held-out training drawings.
    """
    text = common.zero_shot(model, tasks)[0]
    weight = F.normalize(text, dim=-1).clone().requires_grad_()
    data = [features(task.train) for task in tasks]
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    optimizer = torch.optim.Adam([weight], lr=5e-4)
    for _ in range(30):
        loss = F.cross_entropy(common.logits(model, x, weight), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = []
    for task in tasks:
        known = features(task.test)
        scores.append([common.evaluate(model, preprocess, task, w, features=known) for w in (text, weight.detach())])
    return scores


def test_a_linear_probe_gains_so_there_is_something_to_learn(tiny, features):
    """`python -m pytest -s -k linear_probe` prints the numbers of the README."""
    gains = []
    for seed in (1, 2, 3):
        scores = linear_probe(*tiny, common.load_tasks("emoji", split=0.1, seed=seed), features)
        gains.append(sum(after - before for before, after in scores) / 4)
        print(f"\nseed {seed}: zero-shot and linear probe a style", [(round(a, 1), round(b, 1)) for a, b in scores])
    print(f"gain on the average {np.mean(gains):.1f} ± {np.std(gains, ddof=1):.1f}")
    assert min(gains) > 2


@pytest.mark.slow
def test_two_minutes_of_pretraining_lower_the_loss_and_write_a_clip(tmp_path):
    """On the benchmark's own drawings, which is no way to make a backbone and a fair way to see the script work."""
    classes = json.loads((DATA / "emoji" / "classes.json").read_text(encoding="utf-8"))
    concepts = [dict(key=code, label=label, tags=[name], group=name) for name, members in classes.items() for code, label in members]
    tasks = common.load_file(DATA / "domains.py", "domains").emoji(None)
    images, concept, sets = [], [], []
    for style in tasks:
        for number, item in enumerate(item for items in style.items for item in items):
            images.append(np.asarray(style.read(item)))
            concept.append(number)
            sets.append(style.name)
    images, concept, sets = images + images[:1], concept + [len(concepts)], np.array(sets + ["icons"])
    np.savez(tmp_path / "drawings.npz", images=np.stack(images), concept=np.array(concept), sets=sets, held_out=sets == "Noto",
             concepts=json.dumps(concepts + [dict(key="icon", label="icon", tags=[], group="")]))
    words = [sys.executable, "data/pretrain_tiny.py", "--drawings", tmp_path / "drawings.npz", "--state", tmp_path / "state.pt"]
    run = lambda *more: subprocess.run([*map(str, [*words, *more])], cwd=ROOT, capture_output=True, text=True,
                                       env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))
    first = run("--minutes", 2, "--score-minutes", 0.4)
    assert first.returncode == 0, first.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", first.stdout)]
    assert losses[-1] < losses[0] - 0.03, losses
    second = run("--minutes", 0, "--export", tmp_path / "clip.pt")              # takes up the state and goes no further
    assert second.returncode == 0, second.stderr
    model, _ = common.load_clip(str(tmp_path / "clip.pt"))
    assert common.encode_text(model, common.tokenize(["cup"])).shape == (1, 192)
