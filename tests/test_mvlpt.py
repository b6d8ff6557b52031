"""MVLPT: the three kinds of prompts, transferability and groups, the two stages, the checkpoint
that is kept, files from other runs, and what is rejected."""

import copy
import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, make_tree, numbers, random_clip, run_script, small_tasks

import common
import data

mvlpt = common.load_method("mvlpt")
KINDS = ["coop", "vpt", "upt"]
SETTINGS = dict(
    n_ctx=2,
    epochs=2,
    batch_size=5,
    views=1,
    min_crop=0.6,
    workers=0,
    device="cpu",
    data="here",
    clip="random",
)


def settings(**changes):
    return mvlpt.Args(**dict(SETTINGS, **changes))


class Killed(Exception):
    pass


class Stopping(common.Run):
    """A run that is killed when its checkpoints hold `stop` epochs; `parts` of every phase."""

    def epochs(self, phase, n, **parts):
        self.parts[phase] = parts
        for epoch in super().epochs(phase, n, **parts):
            if self.passed == self.stop:
                raise Killed
            self.passed += 1
            yield epoch


def new_run(folder, args, tasks, stop=None):
    args = replace(args, out=str(folder))
    run = Stopping(args, dict(asdict(args), method="mvlpt", variant=None))
    run.stop, run.passed, run.parts = stop, 0, {}
    run.open({1: common.contents(tasks)})
    run.start_seed(args.seeds[0])
    run.seed_phase("prompts")
    return run


@pytest.fixture
def trained(small, tmp_path):
    """Train on tasks in a folder of its own: (tasks, settings) -> prompts; `.run`: the last run."""
    folders = (tmp_path / f"trained-{i}" for i in itertools.count())

    def train(tasks, folder=None, stop=None, **changes):
        args = settings(**changes)
        train.run = new_run(folder or next(folders), args, tasks, stop)
        return mvlpt.train(args, small, tasks, train.run)

    return train


def phases(run):
    """[(phase, epochs)] of a run's log."""
    names = [row["phase"] for row in run.rows()]
    return [(name, len(list(group))) for name, group in itertools.groupby(names)]


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def matrix_file(path, names, accuracy, **changes):
    """A study's transfer.json of seed 1, measured as `settings` are."""
    about = {key: getattr(settings(), key) for key in mvlpt.MEASURED}
    about.update(images="held-out", tasks=names, accuracy_of_seed={"1": accuracy})
    path.write_text(json.dumps(about | changes))
    return str(path)


def new_prompt(small, kind, **changes):
    """A prompt away from its small start."""
    prompt = mvlpt.build(settings(prompt=kind, **changes), small, small_tasks("a")).targets[0]
    for p in prompt.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return prompt


@pytest.fixture
def three():
    """Three tasks; the first and the last have the same class names."""
    tasks = small_tasks("a", "b", "c")
    tasks[1].class_names = ["tree", "house", "very long name"]
    return tasks


def one_image_per_class(tasks):
    for task in tasks:
        task.train = task.train.subset([0, 1, 2])
    return tasks


# -------------------------------------------------------------------------- Eq. (2), (3) and (4)


@pytest.mark.parametrize(
    "kind, n_ctx, count", [("coop", 16, 8_192), ("vpt", 16, 147_456), ("upt", 4, 566_400)]
)
def test_parameters_of_a_prompt_at_vit_b16(vit_b16, kind, n_ctx, count):
    def trainable(**changes):
        prompts = mvlpt.build(
            settings(prompt=kind, n_ctx=n_ctx, **changes), vit_b16, small_tasks("a", "b")
        )
        return sum(p.numel() for p in prompts.parameters() if p.requires_grad)

    assert trainable() == 2 * count  # one per target
    assert trainable(adapt_epochs=0) == count


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x, w, name):
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return unit * w[f"{name}.weight"] + w[f"{name}.bias"]


def block_by_hand(U, w, name, heads):
    """A pre-norm residual block with CLIP's QuickGELU."""
    x = norm(U, w, f"{name}.ln_1")
    x = x @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
    size, found = U.shape[1] // heads, []
    for h in range(heads):
        q, k, v = (part[:, h * size : (h + 1) * size] for part in x.chunk(3, dim=1))
        e = (q @ k.T / math.sqrt(size)).exp()
        found.append(e / e.sum(1, keepdim=True) @ v)
    U = U + linear(torch.cat(found, dim=1), w, f"{name}.attn.out_proj")
    h = linear(norm(U, w, f"{name}.ln_2"), w, f"{name}.mlp.c_fc")
    assert h.shape[1] == 4 * U.shape[1]
    return U + linear(h / (1 + (-1.702 * h).exp()), w, f"{name}.mlp.c_proj")


@pytest.mark.parametrize(
    "shape", [dict(), dict(heads=4), dict(layers=2), dict(width=32, heads=2)], ids=str
)
def test_the_unified_prompt_equals_a_forward_pass_written_out(small, shape):
    """Maps in, blocks over all 2 + 3 * 2 vectors at once, maps out; Figure 6's shapes."""
    prompt = new_prompt(small, "upt", **shape)
    w = {name: p.detach().double() for name, p in prompt.named_parameters()}
    U = torch.cat([linear(w["U_T"], w, "text_in"), linear(w["U_V"].reshape(6, 64), w, "image_in")])
    assert U.shape == (8, shape.get("width", 128))
    for i in range(shape.get("layers", 1)):
        U = block_by_hand(U, w, f"blocks.{i}", shape.get("heads", 1))
    assert f"blocks.{shape.get('layers', 1)}.ln_1.weight" not in w
    text, image = prompt()
    expected = linear(U[:2], w, "text_out")[None], linear(U[2:], w, "image_out").reshape(3, 2, 64)
    for half, by_hand in zip((text, image), expected):
        assert half.shape == by_hand.shape
        assert (half - by_hand).abs().max() < 1e-5 * by_hand.abs().max()


def test_either_half_of_a_unified_prompt_depends_on_both(small):
    prompt = new_prompt(small, "upt")
    for half in (0, 1):
        grads = torch.autograd.grad(prompt()[half].square().sum(), [prompt.U_T, prompt.U_V])
        assert all(g.abs().max() > 1e-6 for g in grads)


def test_text_and_image_prompts_have_one_half_each(small):
    text, image = new_prompt(small, "coop")()
    assert text.shape == (1, 2, 64) and image is None
    text, image = new_prompt(small, "vpt")()
    assert text is None and image.shape == (3, 2, 64)
    assert [x.shape for x in new_prompt(small, "upt")()] == [(1, 2, 64), (3, 2, 64)]


def features_by_hand(model, task, prompt, x):
    """Text and image features of one task alone; CLIP's own encoders where a kind has no prompts.

    Under `vpt` the text is "a photo of a [class].", whatever the task's template.
    """
    text, image = prompt()
    if text is None:
        rows = common.tokenize([f"a photo of a {name}" for name in task.class_names])
        w = model.encode_text(F.pad(rows, (0, 77 - rows.shape[1])))
    else:
        w = common.encode_text(model, common.tokenize(task.class_names, 2), text)
    v = model.encode_image(x) if image is None else common.encode_image(model, x, image)
    return w, v


def one_loss(model, task, prompt, x, y):
    w, v = features_by_hand(model, task, prompt, x)
    cosine = (v / v.norm(dim=-1, keepdim=True)) @ (w / w.norm(dim=-1, keepdim=True)).T
    return F.cross_entropy(model.logit_scale.exp() * cosine, y)


def accuracy_by_hand(model, task, prompt, images):
    preprocess = common.clip.clip._transform(32)
    x = torch.stack([preprocess(image) for image, _ in images])
    with torch.no_grad():
        w, v = features_by_hand(model, task, prompt, x)
        best = (F.normalize(v, dim=-1) @ F.normalize(w, dim=-1).T).argmax(1)
    return 100 * best.eq(torch.tensor(images.labels)).double().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_run_on_cuda(three, kind):
    from clip.model import CLIP
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = settings(prompt=kind)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = CLIP(**TINY).eval()
            prompt = mvlpt.Prompt(kind, 2, 3, 64, 64)
            images = torch.randn(6, 32) if kind == "coop" else torch.randn(6, 3, 32, 32)
            labels = torch.zeros(6, dtype=torch.long)
            task = torch.zeros(6, dtype=torch.long)
        text_prompts, image_prompts = prompt()
        texts = mvlpt.texts_of(args, three).to("cuda")
        x = common.encode_image(model, images, image_prompts)
        w = common.encode_text(model, texts.tokens, text_prompts, texts.sets)
        losses = common.task_losses(model, x, w, labels, task, texts)
        assert losses.shape == (3,) and losses.device.type == "cuda"


# --------------------------------------------------------------------- transferability and groups


def test_transferability_by_hand():
    accuracy = torch.tensor([[80.0, 30.0, 0.0], [40.0, 60.0, 0.0], [20.0, 15.0, 0.0]])
    before = accuracy.clone()
    expected = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.25, 0.25, 0.0]]
    assert mvlpt.transferability(accuracy).tolist() == expected
    assert torch.equal(accuracy, before)
    assert mvlpt.transferability(accuracy.double()).dtype == torch.double


def test_groups_by_hand():
    """A target's partners are the best of its column, not of its row."""
    transfer = torch.tensor(
        [[1.0, 0.2, 0.9, 0.5], [0.3, 1.0, 0.1, 0.5], [0.8, 0.7, 1.0, 0.5], [0.4, 0.9, 0.2, 1.0]]
    )
    before = transfer.clone()
    assert mvlpt.group_by_transfer(transfer, 1) == [[0], [1], [2], [3]]
    assert mvlpt.group_by_transfer(transfer, 2) == [[0, 2], [1, 3], [2, 0], [3, 0]]
    assert mvlpt.group_by_transfer(transfer, 3) == [[0, 2, 3], [1, 3, 2], [2, 0, 3], [3, 0, 1]]
    groups = mvlpt.group_by_transfer(transfer, 4)
    assert [sorted(group) for group in groups] == [[0, 1, 2, 3]] * 4
    assert torch.equal(transfer, before)


def test_a_target_is_in_its_group_even_where_others_do_better_on_it():
    transfer = torch.tensor([[0.5, 1.0, 0.9], [1.0, 0.6, 1.0], [0.8, 0.9, 0.7]])
    assert mvlpt.group_by_transfer(transfer, 2) == [[0, 1], [1, 0], [2, 1]]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_partners_have_the_largest_transfer_of_all_choices(size):
    transfer = torch.rand(6, 6, generator=torch.Generator().manual_seed(size))
    for j, group in enumerate(mvlpt.group_by_transfer(transfer, size)):
        choices = itertools.combinations([i for i in range(6) if i != j], size - 1)
        best = max(choices, key=lambda others: sum(transfer[i, j] for i in others))
        assert group[0] == j and set(group[1:]) == set(best) and len(group) == size


def test_worst_partners_and_sizes():
    accuracy = torch.tensor([[90.0, 10.0, 20.0], [50.0, 80.0, 40.0], [10.0, 70.0, 60.0]])

    def choose(**changes):
        return mvlpt.candidate_groups(settings(**changes), accuracy)

    assert choose(group_size=2) == [[[0, 1], [1, 2], [2, 1]]]
    assert choose(group_size=2, grouping="worst") == [[[0, 2], [1, 0], [2, 0]]]
    assert choose(group_size=1) == [[[0], [1], [2]]]
    assert [sorted(group) for group in choose(group_size="all")[0]] == [[0, 1, 2]] * 3
    alone, pairs, triples = choose(group_size="best")
    assert (alone, pairs) == ([[0], [1], [2]], [[0, 1], [1, 2], [2, 1]])
    assert triples == [[0, 1, 2], [1, 2, 0], [2, 1, 0]]
    assert mvlpt.group_sizes(settings(group_size="best"), 2) == [1, 2]  # no third task
    assert mvlpt.group_sizes(settings(group_size="best"), 20) == [1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_study_scores_every_tasks_prompt_on_every_tasks_test_images(
    small, three, trained, kind
):
    prompts = trained(three, prompt=kind, transferability=True, lr=0.1)
    folder = trained.run.folder
    assert phases(trained.run) == [("alone a", 2), ("alone b", 2), ("alone c", 2), ("transfer", 3)]
    by_hand = torch.tensor(
        [
            [accuracy_by_hand(small, task, prompt, task.test) for task in three]
            for prompt in prompts.targets
        ]
    )
    assert torch.allclose(prompts.accuracy, by_hand)
    args = settings(prompt=kind, transferability=True)
    scores = mvlpt.score(args, small, three, prompts)
    assert scores["accuracy"] == pytest.approx(by_hand.diagonal().tolist())
    assert torch.allclose(torch.tensor(scores["transfer_accuracy"]), by_hand)
    saved = json.loads((folder / "transfer.json").read_text())
    assert saved["images"] == "test" and saved["tasks"] == ["a", "b", "c"]
    assert torch.allclose(torch.tensor(saved["accuracy"]), by_hand)
    head, *rows = csv.reader((folder / "transfer.csv").open())
    assert head == ["source", "a", "b", "c"] and [row[0] for row in rows] == ["a", "b", "c"]
    for i, j in itertools.product(range(3), repeat=2):
        share = by_hand[i, j].item() / max(1e-9, *by_hand[:, j].tolist())
        assert float(rows[i][j + 1]) == pytest.approx(share, abs=1e-6)
        assert saved["transfer"][i][j] == pytest.approx(share, abs=1e-6)


def test_groups_are_chosen_on_held_out_images_and_on_training_images_where_there_are_none(
    three, trained, monkeypatch
):
    one_image_per_class([three[2]])
    seen, accuracies = [], mvlpt.accuracies

    def noted(args, model, tasks, images, prompt):
        seen.append([part.items for part in images])
        return accuracies(args, model, tasks, images, prompt)

    monkeypatch.setattr(mvlpt, "accuracies", noted)
    trained(three, prompt="coop", group_size=2)
    held = [part.val.items for part in data.with_held_out(three[:2], 1)]
    assert seen[6:9] == [[*held, three[2].train.items]] * 3  # after 2 epochs of each alone
    saved = json.loads((trained.run.folder / "transfer.json").read_text())
    assert saved["images"] == "held-out and training"


def test_a_study_that_validates_says_that_no_test_image_was_scored(trained):
    """`common` has put held-out training images in place of the test images then."""
    trained(small_tasks("a", "b"), prompt="coop", transferability=True, validate=True, epochs=1)
    saved = json.loads((trained.run.folder / "transfer.json").read_text())
    assert saved["images"] == "held-out"


def test_a_studys_file_has_the_matrix_of_each_seed_and_their_mean(tmp_path):
    args = settings(seeds=(2,))
    run = new_run(tmp_path / "run", args, small_tasks("a", "b"))
    run.state["finished"][1] = dict(transfer_accuracy=[[80.0, 20.0], [40.0, 60.0]])
    accuracy = torch.tensor([[40.0, 20.0], [20.0, 20.0]])
    mvlpt.write_transfer(args, run, ["a", "b"], accuracy, ["test", "test"])
    saved = json.loads((run.folder / "transfer.json").read_text())
    of_seed = {"1": [[80.0, 20.0], [40.0, 60.0]], "2": accuracy.tolist()}
    assert saved["accuracy_of_seed"] == of_seed and saved["accuracy"] == [[60, 20], [30, 40]]
    assert saved["transfer"] == [[1.0, 0.5], [0.5, 1.0]]


def test_a_matrix_given_back_is_found_by_the_tasks_names(tmp_path):
    path = matrix_file(tmp_path / "t.json", ["a", "b", "c"], [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    found = mvlpt.read_transfer(settings(transfer=path), ["c", "a"], 1)
    assert found.tolist() == [[9, 7], [3, 1]]


def test_a_seed_takes_its_own_matrix_and_test_images_are_warned_of(
    three, trained, tmp_path, capsys
):
    """What one seed holds out another may test on."""
    found = {"1": [[9, 1, 8], [1, 9, 1], [2, 8, 9]], "2": [[9, 8, 1], [8, 9, 1], [1, 1, 9]]}
    names = ["a", "b", "c"]
    path = matrix_file(
        tmp_path / "transfer.json", names, None, accuracy_of_seed=found, prompt="coop"
    )
    args = dict(prompt="coop", source="none", group_size=2, transfer=path, epochs=1)
    groups = [trained(three, seeds=(seed,), **args).group_lists() for seed in (1, 2)]
    assert groups == [[[0, 2], [1, 2], [2, 0]], [[0, 1], [1, 0], [2, 0]]]
    with pytest.raises(common.UserError, match="is of the seeds 1, 2, not of 3: give those"):
        mvlpt.read_transfer(settings(transfer=path, prompt="coop"), names, 3)
    assert not capsys.readouterr().err
    path = matrix_file(tmp_path / "tested.json", names, found["1"], images="test")
    mvlpt.read_transfer(settings(transfer=path), names, 1)
    assert capsys.readouterr().err == (
        f"warning: --transfer {path} was measured on test images, so they choose the groups: a "
        "study with --validate keeps them out\n"
    )


# ---------------------------------------------------------------------------------- held-out part


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_is_not_trained_on(small, trained, kind, monkeypatch):
    tasks = small_tasks("a", "b")
    held = {item for part in data.with_held_out(tasks, 1) for item in part.val.items}
    used, batches = set(), common.batches

    def noted(args, model, tasks, frozen=False):
        used.update(item for task in tasks for item in task.train.items)
        return batches(args, model, tasks, frozen)

    monkeypatch.setattr(common, "batches", noted)
    trained(tasks, prompt=kind, group_size="all")
    assert len(held) == 2
    assert used == {item for task in tasks for item in task.train.items} - held


def test_a_datasets_own_validation_part_chooses_the_checkpoint(trained, monkeypatch):
    [task] = small_tasks("a")
    task.val = task.test.subset([0, 1])
    seen = []
    monkeypatch.setattr(
        mvlpt,
        "accuracies",
        lambda args, model, tasks, images, prompt: seen.append(images[0]) or torch.tensor([1.0]),
    )
    trained([task], prompt="vpt")
    assert len(seen) == 4 and all(images is task.val for images in seen)


def test_at_one_shot_the_training_images_choose_the_checkpoint_and_a_line_says_so(
    trained, monkeypatch, capsys
):
    tasks = small_tasks("few", "many")
    one_image_per_class(tasks[:1])
    seen = []
    monkeypatch.setattr(
        mvlpt,
        "accuracies",
        lambda args, model, tasks, images, prompt: (
            seen.append([part.items for part in images]) or torch.tensor([1.0, 1.0])
        ),
    )
    trained(tasks, prompt="vpt", epochs=1, adapt_epochs=0)
    held = data.with_held_out(tasks, 1)[1].val.items
    assert seen == [[tasks[0].train.items, held]]
    assert "no image of few can be held out: the training images" in capsys.readouterr().out


# -------------------------------------------------------------------- the checkpoint that is kept


def planted(monkeypatch, scripts):
    """Let the held-out parts say what `scripts` has: {tasks' names: a list of scores per epoch}.

    Returns the prompts seen, {tasks' names: a list of states}.
    """
    seen, counts = {}, {}

    def accuracies(args, model, tasks, images, prompt):
        names = "".join(task.name for task in tasks)
        counts[names] = counts.get(names, -1) + 1
        seen.setdefault(names, []).append(copy.deepcopy(prompt.state_dict()))
        return torch.tensor(scripts[names][counts[names]], dtype=torch.float32)

    monkeypatch.setattr(mvlpt, "accuracies", accuracies)
    return seen


def is_state(module, state):
    return all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_each_target_keeps_its_own_best_epoch_and_the_first_of_equals(trained, monkeypatch):
    """Stage 1 is best on average in its second epoch; then the targets in the third and first."""
    script = [[50, 10], [20, 60], [70, 5], [60, 20]] + [[30, 80], [10, 20], [40, 80], [40, 1]]
    seen = planted(monkeypatch, dict(ab=script))
    prompts = trained(small_tasks("a", "b"), prompt="vpt", group_size="all", epochs=4, lr=0.1)
    states = seen["ab"]
    assert is_state(prompts.source, states[1])
    assert is_state(prompts.targets[0], states[6]) and is_state(prompts.targets[1], states[4])
    assert len({float(state["U_V"].sum()) for state in states}) == 8
    rows = trained.run.rows()
    assert [row["val"] for row in rows] == [30, 40, 37.5, 40, 55, 15, 60, 20.5]


def test_a_group_of_two_keeps_a_checkpoint_for_its_target_only(trained, tmp_path, monkeypatch):
    """c's partner is a, whose own group is with b: a's score in c's group must not count."""
    path = matrix_file(
        tmp_path / "transfer.json", ["a", "b", "c"], [[9, 8, 5], [8, 9, 1], [1, 1, 9]], prompt="vpt"
    )
    seen = planted(monkeypatch, dict(ab=[[1, 5], [2, 4]], ac=[[100, 2], [100, 1]]))
    prompts = trained(
        small_tasks("a", "b", "c"), prompt="vpt", source="none", group_size=2, transfer=path, lr=0.1
    )
    assert prompts.group_lists() == [[0, 1], [1, 0], [2, 0]]
    assert phases(trained.run) == [("transfer", 1), ("target a + b", 2), ("target a + c", 2)]
    assert is_state(prompts.targets[0], seen["ab"][1])
    assert is_state(prompts.targets[1], seen["ab"][0])
    assert is_state(prompts.targets[2], seen["ac"][0])
    assert [row["val"] for row in trained.run.rows()[1:]] == [3, 3, 2, 1]  # of kept checkpoints


def test_group_size_best_takes_each_targets_best_size_and_of_equals_the_smallest(
    trained, tmp_path, monkeypatch
):
    """Table 2: groups of 1, 2 and 3; a does best alone, b in a pair, c with both, d like alone."""
    matrix = [[9, 8, 7, 1], [8, 9, 8, 1], [7, 7, 9, 1], [1, 1, 1, 9]]
    path = matrix_file(tmp_path / "transfer.json", ["a", "b", "c", "d"], matrix, prompt="vpt")
    scripts = dict(
        a=[[50], [60]],
        b=[[10], [20]],
        c=[[1], [1]],
        d=[[30], [20]],
        ab=[[60, 40], [55, 39]],
        bc=[[99, 2], [99, 3]],
        ad=[[99, 30], [99, 30]],
        abc=[[60, 40, 5], [60, 40, 6]],
        abd=[[99, 99, 30], [99, 99, 29]],
    )
    seen = planted(monkeypatch, scripts)
    prompts = trained(
        small_tasks("a", "b", "c", "d"),
        prompt="vpt",
        source="none",
        group_size="best",
        transfer=path,
        lr=0.1,
    )
    assert seen.keys() == scripts.keys()  # the partners of each, by hand
    assert prompts.group_lists() == [[0], [1, 0], [2, 1, 0], [3]]
    assert is_state(prompts.targets[0], seen["a"][1])
    assert is_state(prompts.targets[1], seen["ab"][0])
    assert is_state(prompts.targets[2], seen["abc"][1])
    assert is_state(prompts.targets[3], seen["d"][0])


def test_a_best_size_of_one_is_the_training_of_group_size_one(trained, tmp_path):
    """No phase's random numbers depend on what else is trained."""
    path = matrix_file(
        tmp_path / "transfer.json", ["a", "b", "c"], [[9, 8, 5], [8, 9, 1], [1, 1, 9]]
    )
    alone = trained(small_tasks("a", "b", "c"))
    trained(small_tasks("a", "b", "c"), group_size="best", transfer=path)
    for i, name in enumerate("abc"):
        best = trained.run.parts[f"target {name}"]["best"]
        assert same(best.prompts[0], alone.targets[i])


# -------------------------------------------------------------------------------- the two stages


def test_the_rate_warms_up_for_an_epoch_and_follows_a_cosine():
    rate = mvlpt.rate_of(settings(lr=0.002), 4)
    expected = [1e-5, 0.002, 0.001 * (1 + math.sqrt(0.5)), 0.001]
    assert [0.002 * rate(epoch) for epoch in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_adams_steps_on_the_sum_of_the_losses(small, three, trained, kind):
    """Stage 1, three epochs of one step, with every task's loss over its own classes and Adam
    written out. `coop` and `upt` train the text, `vpt` and `upt` the image side."""
    three[1].class_names = ["tree", "house", "very long name", "a fourth class"]
    changes = dict(prompt=kind, epochs=3, adapt_epochs=0, batch_size=6)
    trained(three, **changes)
    result = trained.run.parts["source"]["prompt"]
    args, parts = settings(**changes), data.with_held_out(three, 1)
    common.seed_everything(1, "", "prompts", "start")
    prompt = mvlpt.build(args, small, three).source
    moments = [
        (torch.zeros_like(p), torch.zeros_like(p), torch.ones_like(p, dtype=torch.bool))
        for p in prompt.parameters()
    ]
    for epoch, rate in enumerate([1e-5, 0.002, 0.001 * (1 + math.cos(math.pi / 3))]):
        common.seed_everything(1, "source", epoch)
        [(x, y, t)] = common.batches(args, small, parts)
        loss = sum(
            one_loss(small, task, prompt, x[t == i], y[t == i]) for i, task in enumerate(parts)
        )
        grads = torch.autograd.grad(loss, list(prompt.parameters()))
        assert trained.run.rows()[epoch]["loss"] == pytest.approx(loss.item(), rel=1e-3)
        for p, (m, v, sure), g in zip(prompt.parameters(), moments, grads):
            sure &= g.abs() > max(1e-5, 0.01 * g.abs().max())  # of about zero the sign is unsure
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            corrected = (v / (1 - 0.999 ** (epoch + 1))).sqrt() + 1e-8
            p.data -= rate * (m / (1 - 0.9 ** (epoch + 1))) / corrected
    for (name, p), q, (_, _, sure) in zip(result.named_parameters(), prompt.parameters(), moments):
        assert sure.float().mean() > 0.2 and (p - q)[sure].abs().max() < 2e-4, name


def test_a_prompt_adapted_for_zero_epochs_equals_its_source(small, three, trained):
    zero, some = trained(three, adapt_epochs=0, lr=0.05), trained(three, lr=0.05)
    assert same(zero.source, some.source) and not zero.targets
    assert not any(same(prompt, some.source) for prompt in some.targets)
    scores = mvlpt.score(settings(adapt_epochs=0), small, three, zero)
    by_hand = [accuracy_by_hand(small, task, some.source, task.test) for task in three]
    assert scores["accuracy"] == pytest.approx(by_hand)
    assert not any(p.requires_grad for p in some.source.parameters())
    assert all(p.requires_grad for p in zero.source.parameters())


def test_adaptation_starts_at_the_source_prompt_or_at_a_random_one(small, trained, monkeypatch):
    """A warm-up epoch that stands still leaves every target where it starts."""
    monkeypatch.setattr(mvlpt, "WARM_UP", 0)
    tasks = small_tasks("a", "b")
    common.seed_everything(1, "", "prompts", "start")
    random = mvlpt.build(settings(), small, tasks).source
    planted(monkeypatch, dict(ab=[[1, 1], [2, 2], [3, 3]], a=[[1], [1]], b=[[1], [1]]))
    moved = trained(tasks, epochs=3, adapt_epochs=1)
    none = trained(tasks, source="none", adapt_epochs=1)
    assert all(same(prompt, moved.source) for prompt in moved.targets)
    assert all(same(prompt, random) for prompt in none.targets)
    assert not same(moved.source, random)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_prompt_given_back_leads_to_the_same_targets(trained, kind, tmp_path):
    tasks, path = small_tasks("a", "b"), tmp_path / "prompts.pt"
    whole = trained(tasks, prompt=kind)
    trained.run.save_prompts(whole.state_dict(), tasks)
    os.replace(trained.run.folder / "prompts.pt", path)
    again = trained(tasks, prompt=kind, init=str(path))
    assert same(again, whole)
    assert phases(trained.run) == [("init", 1), ("target a", 2), ("target b", 2)]


def test_targets_adapt_alone_by_themselves(trained):
    """Another second task: the first ends where it would have ended, from the same start."""
    both = trained(small_tasks("a", "b"), source="none")
    other = trained([small_tasks("a")[0], small_tasks("x", "y", "z")[2]], source="none")
    assert same(both.targets[0], other.targets[0])
    assert not same(both.targets[1], other.targets[1])


@pytest.mark.parametrize(
    "changes",
    [
        dict(prompt="coop"),
        dict(prompt="coop", views=0),
        dict(prompt="vpt"),
        dict(),
        dict(source="none"),
        dict(group_size="all"),
        dict(group_size="best"),
    ],
    ids=str,
)
def test_every_kind_learns_and_leaves_clip_alone(small, trained, changes):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    trained(small_tasks("a", "b"), epochs=15, lr=0.01, **changes)
    curves = {}
    for row in trained.run.rows():
        curves.setdefault(row["phase"], []).append(row["loss"] / len(json.loads(row["losses"])))
    first = next(iter(curves.values()))[0]  # a target may start where the source ended
    assert all(len(one) == 15 and one[14] < 0.7 * first for one in curves.values())
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize(
    "changes", [dict(group_size=2), dict(group_size="best", source="none")], ids=str
)
def test_killed_after_any_epoch_a_training_ends_where_it_would_have_ended(
    three, trained, tmp_path, changes
):
    """Three tasks alone, the transfer row by row, the source, and groups: every epoch."""
    changes = dict(changes, prompt="coop", lr=0.05, epochs=2)
    expected = trained(three, **changes)
    rows, files = trained.run.rows(), ("transfer.json", "transfer.csv", "log.csv")
    written = [(trained.run.folder / name).read_bytes() for name in files]
    assert len(rows) >= 13 and phases(trained.run)[:4] == [
        ("alone a", 2),
        ("alone b", 2),
        ("alone c", 2),
        ("transfer", 3),
    ]
    for stop in range(1, len(rows)):
        folder = tmp_path / f"killed-{stop}"
        with pytest.raises(Killed):
            trained(three, folder, stop, **changes)
        assert same(trained(three, folder, resume=True, **changes), expected), stop
        assert trained.run.rows() == rows and trained.run.passed == len(rows) - stop
        assert [(folder / name).read_bytes() for name in files] == written


def test_a_resumed_run_reads_neither_file_again(trained, tmp_path):
    """Killed in stage 2, with both files gone before it goes on."""
    tasks, names = small_tasks("a", "b", "c"), ["a", "b", "c"]
    source = trained(tasks, prompt="coop", adapt_epochs=0)
    trained.run.save_prompts(source.state_dict(), tasks)
    path = matrix_file(
        tmp_path / "transfer.json", names, [[9, 8, 5], [8, 9, 1], [1, 1, 9]], prompt="coop"
    )
    init = tmp_path / "prompts.pt"
    (trained.run.folder / "prompts.pt").rename(init)
    changes = dict(prompt="coop", group_size=2, init=str(init), transfer=path)
    expected = trained(tasks, **changes)
    with pytest.raises(Killed):
        trained(tasks, tmp_path / "run", stop=3, **changes)
    init.write_bytes(b"")
    (tmp_path / "transfer.json").unlink()
    assert same(trained(tasks, tmp_path / "run", resume=True, **changes), expected)


# ------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "random.pt"
    torch.save(random_clip(**TINY).state_dict(), path)
    return path


def main(*words):
    mvlpt.main([str(word) for word in words])


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, backbone):
    """The folder of a finished run of coop on two tasks, and the words it was started with."""
    folder = tmp_path_factory.mktemp("finished")
    layout = {f"{d}/{c}": 7 for d in ("drawn", "painted") for c in ("cup", "hat")}
    words = [
        "--data",
        make_tree(folder / "shapes", layout),
        "--shots",
        5,
        "--clip",
        backbone,
        "--epochs",
        1,
        "--prompt",
        "coop",
        "--n-ctx",
        2,
        "--views",
        1,
    ]
    main(*words, "--out", folder / "run")
    return folder / "run", words


@pytest.fixture
def other(tmp_path):
    """Two source tasks of other images."""
    layout = {f"{d}/{c}": 6 for d in ("photo", "sketch") for c in ("dog", "cat", "cow")}
    return make_tree(tmp_path / "other", layout)


def refused(*words, says, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(common.UserError) as refusal:
        main(*words)
    line = str(refusal.value)
    assert line.isprintable() and all(str(word) in line for word in says), line
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words, n_ctx, views",
    [
        ([], 4, 0),
        (["--prompt", "coop"], 16, 8),
        (["--prompt=vpt"], 4, 0),
        (["--prompt", "vpt", "--clip", "ViT-B/16"], 16, 0),
        (["--prompt", "coop", "--clip", "ViT-B/16"], 16, 0),
        (["--prompt", "coop", "--n-ctx", "3", "--views", "0"], 3, 0),
    ],
)
def test_every_kind_has_its_own_length_and_views(monkeypatch, words, n_ctx, views):
    told = {}
    monkeypatch.setattr(common, "run_seeds", lambda args, *more, **how: told.update(args=args))
    main(*words)
    args = told["args"]
    assert (args.n_ctx, args.views) == (n_ctx, views)
    assert mvlpt.epochs_of_stage_2(args) == args.epochs
    assert common.variant_of(args, mvlpt.TINY) == (
        f"with --prompt {args.prompt}" if args.prompt != "upt" else None
    )


def test_the_papers_settings_are_the_defaults():
    upt, longer = mvlpt.Args(), mvlpt.LongArgs()
    for args, n_ctx in ((upt, 4), (longer, 16)):
        assert (args.clip, args.epochs, args.lr, args.batch_size) == ("ViT-B/16", 200, 0.002, 32)
        assert (args.n_ctx, args.views) == (n_ctx, 0)
        assert (args.heads, args.layers, args.width) == (1, 1, 128)


def test_other_source_tasks_and_the_prompt_given_back(finished, other, tmp_path, capsys):
    _, words = finished
    main(*words, "--source", other, "--out", tmp_path / "a", "--plot")
    main(*words, "--init", tmp_path / "a" / "prompts.pt", "--out", tmp_path / "b")
    rows = list(csv.DictReader((tmp_path / "a" / "log.csv").open()))
    assert [row["phase"] for row in rows] == ["source", "target drawn", "target painted"]
    assert all(row["val"] for row in rows)
    one, two = result_of(tmp_path / "a"), result_of(tmp_path / "b")
    assert one["accuracy"] == two["accuracy"] and one["groups"] == [[["drawn"], ["painted"]]]
    assert one["variant"] == f"with --prompt coop, with --source {other}"
    assert two["variant"] == f"with --prompt coop, with --init {tmp_path / 'a' / 'prompts.pt'}"
    seen = torch.load(tmp_path / "b" / "prompts.pt", weights_only=True)["prompts"][1]["seen"]
    expected = [mvlpt.fingerprints(task.train) for task in data.load_tasks(str(other), shots=5)]
    assert sorted(seen.tolist()) == sorted(torch.cat(expected).tolist())


def test_a_study_draws_its_matrix_and_gives_it_to_a_grouped_run(backbone, tmp_path, capsys):
    layout = {f"{d}/{c}": 7 for d in ("drawn", "painted", "photo") for c in ("cup", "hat")}
    words = [
        "--data",
        make_tree(tmp_path / "shapes", layout),
        "--shots",
        5,
        "--clip",
        backbone,
        "--epochs",
        1,
        "--prompt",
        "coop",
        "--n-ctx",
        2,
        "--views",
        1,
        "--plot",
    ]
    main(*words, "--transferability", "--out", tmp_path / "study")
    assert (tmp_path / "study" / "transfer-1.png").stat().st_size > 5000
    study, matrix = result_of(tmp_path / "study"), tmp_path / "study" / "transfer.json"
    grouped = [*words, "--group-size", 2]
    main(*grouped, "--grouping", "worst", "--transfer", matrix, "--out", tmp_path / "run")
    result = result_of(tmp_path / "run")
    assert result["transfer"] == study["transfer"]
    assert "transfer, seed 1 (rows are sources" in capsys.readouterr().out
    assert f"with --transfer {matrix}" in result["variant"]
    assert [group[0] for group in result["groups"][0]] == result["tasks"]
    assert all(len(group) == 2 for group in result["groups"][0])

    bad, right = tmp_path / "bad.json", json.loads(matrix.read_text())
    refused(
        *grouped,
        "--transfer",
        tmp_path / "study" / "log.csv",
        says=["log.csv", "transfer.json"],
        folder=tmp_path,
    )
    for accuracy in (
        [[1, 2], [3, 4]],
        [[1, 2, 3]] * 4,
        [["x"] * 3] * 3,
        [[float("nan")] * 3] * 3,
        [[-1.0] * 3] * 3,
        None,
    ):
        bad.write_text(json.dumps(dict(right, accuracy_of_seed={"1": accuracy})))
        refused(*grouped, "--transfer", bad, says=[bad, "no transfer matrix"], folder=tmp_path)
    bad.write_text(json.dumps(dict(right, tasks=["drawn", "painted", "carved"])))
    refused(*grouped, "--transfer", bad, says=[bad, "carved", "'photo'"], folder=tmp_path)
    for changes, says in [
        (dict(prompt="vpt"), "with --prompt vpt, not with --prompt coop"),
        (dict(clip="tiny"), "with --clip tiny"),
        (dict(heads=2), "with --heads 2, not with"),
        (dict(n_ctx=3), "with --n-ctx 3, not with --n-ctx 2"),
        (dict(shots=4), "with --shots 4, not with --shots 5"),
        (dict(split=0.1), "with --split 0.1, not without --split"),
    ]:
        bad.write_text(json.dumps(dict(right, **changes)))
        refused(*grouped, "--transfer", bad, says=[bad, says], folder=tmp_path)


def test_group_size_best_from_the_command_line(backbone, tmp_path):
    layout = {f"{d}/{c}": 7 for d in ("drawn", "painted", "photo", "ink") for c in ("cup", "hat")}
    words = [
        "--data",
        make_tree(tmp_path / "shapes", layout),
        "--shots",
        5,
        "--clip",
        backbone,
        "--epochs",
        2,
        "--n-ctx",
        2,
        "--lr",
        0.1,
        "--heads",
        2,
        "--out",
        tmp_path / "run",
    ]
    main(*words, "--group-size", "best")
    result = result_of(tmp_path / "run")
    assert result["variant"] == "with --group-size best, with --heads 2"
    assert all(
        group[0] == name and 1 <= len(group) <= 3
        for group, name in zip(result["groups"][0], result["tasks"])
    )
    assert len(result["transfer"][0]) == 4 and (tmp_path / "run" / "transfer.json").exists()
    main("--eval", tmp_path / "run" / "prompts.pt")


@pytest.mark.parametrize(
    "more, says",
    [
        (["--prompt", "upt"], ["with --prompt coop", "not with --prompt upt"]),
        (["--n-ctx", 3], ["with --n-ctx 2", "not with --n-ctx 3"]),
        (["--clip", "tiny"], ["not with --clip tiny"]),
        (["--seeds", 1, 2], ["seeds 1", "not of 2"]),
        (["--validate"], ["without --validate", "not with --validate"]),
        (["--shots", 4], ["with --shots 5", "not with --shots 4"]),
        (["--source", "emoji"], ["--init", "--source", "one of them"]),
    ],
)
def test_a_source_prompt_that_does_not_suit_is_refused(finished, tmp_path, more, says):
    run, words = finished
    refused(
        *words,
        "--init",
        run / "prompts.pt",
        "--out",
        tmp_path / "new",
        *more,
        says=says,
        folder=tmp_path,
    )


def test_a_source_prompt_of_no_source_or_of_another_shape_or_method_is_refused(finished, tmp_path):
    run, words = finished
    saved, path = torch.load(run / "prompts.pt", weights_only=True), tmp_path / "prompts.pt"
    words = [*words, "--init", path, "--out", tmp_path / "new"]
    for changes in (dict(source="none"), dict(transferability=True)):
        torch.save(dict(saved, settings=dict(saved["settings"], **changes)), path)
        refused(*words, says=[path, "without stage 1"], folder=tmp_path)
    seen = dict(seen=torch.zeros(0, dtype=torch.long))
    for state, says in [
        (dict(seen, **{"source.U_T": torch.zeros(2, 7)}), "does not fit"),
        (seen, "does not fit"),
        (None, "holds no source prompt"),
        (dict(seen="all"), "holds no source prompt"),
        ({"source.U_T": torch.zeros(2, 64)}, "holds no source prompt"),
    ]:
        torch.save(dict(saved, prompts={1: state}), path)
        refused(*words, says=[path, says], folder=tmp_path)
    torch.save(dict(saved, method="coop_mt"), path)
    refused(*words, says=[path, "coop_mt"], folder=tmp_path)
    path.unlink()
    refused(*words, says=[path], folder=tmp_path)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--group-size", 3], ["--group-size 3", "the 2 tasks"]),
        (["--group-size", 0], ["--group-size 0", "too small"]),
        (["--grouping", "worst"], ["--grouping worst", "no choice: leave it out"]),
        (["--group-size", "all", "--transfer", "x.json"], ["--transfer", "x.json", "no choice"]),
        (["--group-size", "best", "--transfer", "x.json"], ["--group-size best", "no choice"]),
        (["--adapt-epochs", -1], ["--adapt-epochs -1", "0 or more"]),
        (["--adapt-epochs", 0, "--source", "none"], ["--adapt-epochs 0"]),
        (["--adapt-epochs", 0, "--group-size", 2], ["--adapt-epochs 0"]),
        *[
            (["--transferability", *more], ["--transferability trains", more[0]])
            for more in (
                ["--group-size", 2],
                ["--source", "emoji"],
                ["--init", "x.pt"],
                ["--grouping", "worst"],
                ["--transfer", "x.json"],
            )
        ],
        (["--source", "emojy"], ["emojy", "did you mean 'emoji'"]),
        (["--heads", 2], ["--heads", "--prompt upt", "not coop"]),
        (["--prompt", "upt", "--heads", 3], ["--width 128", "--heads 3"]),
        (["--prompt", "upt", "--layers", 0], ["--layers", "1 or more"]),
        (["--n-ctx", 75], ["75 context vectors"]),
    ],
)
def test_settings_that_cannot_be(finished, tmp_path, more, says):
    _, words = finished
    refused(*words, *more, "--out", tmp_path / "new", says=says, folder=tmp_path)


@pytest.mark.parametrize("more", [["--group-size", "many"], ["--prompt", "tpu"], ["--prompt"]])
def test_choices_that_do_not_exist(finished, tmp_path, more, capsys):
    _, words = finished
    with pytest.raises(SystemExit) as stop:
        main(*words, "--out", tmp_path / "new", *more)
    assert stop.value.code == 2 and more[0] in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["vpt", "upt"])
def test_a_resnet_takes_text_prompts_only(finished, tmp_path, kind):
    _, words = finished
    refused(
        *words,
        "--prompt",
        kind,
        "--clip",
        "RN50",
        "--out",
        tmp_path / "new",
        says=["RN50", "ResNet", "--clip ViT-B/16"],
        folder=tmp_path,
    )


def test_an_undecodable_source_image_is_found_before_anything_is_written(finished, other, tmp_path):
    _, words = finished
    path = data.load_tasks(str(other), shots=5)[0].train.items[1]
    path.write_bytes(b"not a picture")
    refused(
        *words,
        "--source",
        other,
        "--out",
        tmp_path / "new",
        says=[path, "cannot be decoded"],
        folder=tmp_path,
    )


def test_a_source_image_that_a_target_tests_on_is_refused_under_any_spelling(finished, tmp_path):
    """A link to a target's folder, as a task of another name: it is split at other places."""
    _, words = finished
    (tmp_path / "link").symlink_to(words[1] / "drawn", target_is_directory=True)
    source = f"sketched={tmp_path / 'link'}"
    refused(
        *words,
        "--source",
        source,
        "--out",
        tmp_path / "new",
        folder=tmp_path,
        says=["--source sketched=", "tests drawn on", words[1] / "drawn"],
    )


def test_files_of_the_same_name_are_told_apart_by_their_content(finished, tmp_path):
    """The last parts of their paths agree, and with them their fingerprints."""
    _, words = finished
    layout = {f"drawn/{c}": 9 for c in ("hat", "cup")}
    twin = make_tree(tmp_path / "elsewhere", layout, size=25)
    main(*words, "--source", f"twin={twin / 'drawn'}", "--out", tmp_path / "new")
    assert (tmp_path / "new" / "result.json").exists()


def test_other_topics_of_the_built_in_drawings_are_sources_and_the_targets_own_are_not():
    args = settings(data="emoji24:*People", source="emoji24:*Food+*Nature", shots=6)
    mvlpt.check_sources(args)
    images = data.load_tasks(args.data, shots=6)[0].test
    seen = dict(zip(mvlpt.fingerprints(images).tolist(), images.items))
    with pytest.raises(common.UserError, match="tests Noto People on"):
        mvlpt.reject_seen(args, 1, seen, "--source")


def test_a_source_prompt_that_has_seen_what_a_target_tests_on_is_refused(finished, other, tmp_path):
    """A task of another name is split at other places. The source images need not be here."""
    run, words = finished
    renamed = ["--data", f"x={words[1] / 'drawn'}", *words[2:], "--init", run / "prompts.pt"]
    refused(
        *renamed,
        "--out",
        tmp_path / "new",
        folder=tmp_path,
        says=["the source prompt in", "prompts.pt", "tests x on"],
    )
    main("--data", other, *words[2:], "--init", run / "prompts.pt", "--out", tmp_path / "a")
    assert (tmp_path / "a" / "result.json").exists()


def test_prompts_are_scored_on_the_tasks_that_they_were_trained_on(finished, tmp_path, capsys):
    run, words = finished
    main("--eval", run / "prompts.pt")
    assert "drawn" in capsys.readouterr().out
    for names in ("painted={1},drawn={0}", "a={0},b={1}"):
        swapped = names.format(words[1] / "drawn", words[1] / "painted")
        refused(
            "--eval",
            run / "prompts.pt",
            "--data",
            swapped,
            says=["prompts.pt", swapped, "another order"],
            folder=tmp_path,
        )


def killed_after(monkeypatch, n, *words):
    """Run main until `n` epochs are in checkpoints."""
    epochs, passed = common.Run.epochs, []

    def stopping(self, *words, **parts):
        for epoch in epochs(self, *words, **parts):
            if len(passed) == n:
                raise Killed
            passed.append(epoch)
            yield epoch

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "epochs", stopping)
        with pytest.raises(Killed):
            main(*words)


@pytest.mark.parametrize("n", [1, 3])
def test_a_run_goes_on_with_the_source_tasks_that_it_began_with(
    finished, other, tmp_path, monkeypatch, n
):
    """Killed in stage 1 or in stage 2."""
    _, words = finished
    killed_after(
        monkeypatch, n, *words, "--source", other, "--epochs", 2, "--out", tmp_path / "run"
    )
    for domain in ("photo", "sketch"):
        (other / domain / "cat").rename(other / domain / "lion")
    with pytest.raises(common.UserError, match="does not fit the data"):
        main("--resume", "--out", tmp_path / "run")
    for domain in ("photo", "sketch"):
        (other / domain / "lion").rename(other / domain / "cat")
    main("--resume", "--out", tmp_path / "run", "--source", other)
    assert (tmp_path / "run" / "result.json").exists()


# ---------------------------------------------------------------------- the script as a process


def test_a_killed_process_goes_on_to_the_same_numbers(backbone, tmp_path):
    """SIGKILL in stage 1, then in stage 2; two seeds."""
    layout = {f"{d}/{c}": 7 for d in ("drawn", "painted") for c in ("cup", "hat")}
    words = [
        "--data",
        make_tree(tmp_path / "shapes", layout),
        "--shots",
        5,
        "--clip",
        backbone,
        "--epochs",
        15,
        "--n-ctx",
        2,
        "--group-size",
        "all",
        "--seeds",
        1,
        2,
    ]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    done = run_script("mvlpt.py", *words, "--out", whole)
    assert done.returncode == 0, done.stderr
    for start, phase in ((words, "source"), (["--resume"], "target")):
        command = [sys.executable, ROOT / "mvlpt.py", *start, "--out", out]
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.DEVNULL,
            env=dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        )
        until = time.time() + 60
        while not list(out.glob(f"checkpoint-{phase}*.pt")) and time.time() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "result.json").exists()
    done = run_script("mvlpt.py", "--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    assert numbers(out) == numbers(whole)


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = run_script("mvlpt.py", "--group-size", "0", "--out", tmp_path / "new")
    assert done.returncode == 2 and not (tmp_path / "new").exists()
    assert done.stderr.startswith("mvlpt.py: --group-size 0 is too small")
    assert done.stderr.count("\n") == 1
