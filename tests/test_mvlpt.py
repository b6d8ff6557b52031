"""MVLPT: the three kinds of prompts, transferability and groups, the two stages, the checkpoint that is kept, and what is refused."""
import copy
import csv
import itertools
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Log, make_tree, random_clip, small_tasks

import common

mvlpt = common.load_method("mvlpt")
KINDS = ["coop", "vpt", "upt"]
SETTINGS = dict(prompt="upt", n_ctx=2, resume=False, epochs=2, adapt_epochs=2, lr=0.002, batch_size=5, views=1, min_crop=0.6, source=None, init=None,
                transfer=None, transferability=False, group_size=1, grouping="best", data="here", split=None, shots=None, validate=False,
                seeds=[1], clip="random", root="data", eval=None)


def settings(**changes):
    return types.SimpleNamespace(**dict(SETTINGS, **changes))


class Killed(Exception):
    pass


class Memory(Log):
    """A run whose checkpoints stay in memory, and which is killed right after epoch `stop`."""

    def __init__(self, folder=None, stop=None):
        self.folder, self.stop, self.saved, self.rows, self.state = folder, stop, None, [], dict(finished={})

    def restore(self, seed, **parts):
        if self.saved is None:
            return 0
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(self.saved[1][name]))
        return self.saved[0]

    def checkpoint(self, seed, epoch, row, **parts):
        self.saved = epoch, copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
        self.rows.append(dict(row, epoch=epoch))
        if epoch == self.stop:
            raise Killed


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def trained(small, tasks, run=None, **changes):
    return mvlpt.train(settings(**changes), small, tasks, run or Memory(), seed=1)


def matrix_file(path, names, accuracy, **changes):
    """A study's transfer.json of seed 1, measured as `settings` are."""
    about = dict({key: SETTINGS[key] for key in ("prompt", "n_ctx", "clip", "split", "shots")}, images="validation")
    path.write_text(json.dumps(dict(about, tasks=names, accuracy_of_seed={"1": accuracy}) | changes))
    return str(path)


def new_prompt(small, kind, **changes):
    """A prompt away from its small start."""
    prompt = mvlpt.build(settings(prompt=kind, **changes), small, small_tasks("a")).source
    for p in prompt.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return prompt.requires_grad_()


@pytest.fixture
def three():
    """Three tasks; the first and the last have the same class names."""
    tasks = small_tasks("a", "b", "c")
    tasks[1].class_names = ["tree", "house", "very long name"]
    return tasks


# ------------------------------------------------------------------------------------------------- Eq. (2), (3) and (4)

@pytest.mark.parametrize("kind, n_ctx, count", [("coop", 16, 8_192), ("vpt", 16, 147_456), ("upt", 4, 566_400)])
def test_parameters_of_a_prompt_at_vit_b16(vit_b16, kind, n_ctx, count):
    prompts = mvlpt.build(settings(prompt=kind, n_ctx=n_ctx), vit_b16, small_tasks("a", "b"))
    assert sum(p.numel() for p in prompts.source.parameters()) == count
    assert sum(p.numel() for p in prompts.parameters() if p.requires_grad) == 2 * count     # one a target
    shared = mvlpt.build(settings(prompt=kind, n_ctx=n_ctx, adapt_epochs=0), vit_b16, small_tasks("a", "b"))
    assert sum(p.numel() for p in shared.parameters() if p.requires_grad) == count


def test_the_unified_prompt_equals_a_forward_pass_written_out(small):
    """Linear maps in, one pre-norm residual block with one head and CLIP's QuickGELU over all 2 + 3 * 2 vectors, linear maps out."""
    prompt = new_prompt(small, "upt")
    w = {name: p.detach().double() for name, p in prompt.named_parameters()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    U = torch.cat([linear(w["U_T"], "text_in"), linear(w["U_V"].reshape(6, 64), "image_in")])
    assert U.shape == (8, 128)
    q, k, v = (norm(U, "block.ln_1") @ w["block.attn.in_proj_weight"].T + w["block.attn.in_proj_bias"]).split(128, dim=1)
    e = (q @ k.T / math.sqrt(128)).exp()
    U = U + linear(e / e.sum(1, keepdim=True) @ v, "block.attn.out_proj")
    h = linear(norm(U, "block.ln_2"), "block.mlp.c_fc")
    assert h.shape == (8, 512)
    U = U + linear(h / (1 + (-1.702 * h).exp()), "block.mlp.c_proj")
    text, image = prompt()
    for half, by_hand in [(text, linear(U[:2], "text_out")[None]), (image, linear(U[2:], "image_out").reshape(3, 2, 64))]:
        assert half.shape == by_hand.shape and (half - by_hand).abs().max() < 1e-5 * by_hand.abs().max()


def test_either_half_of_a_unified_prompt_depends_on_both(small):
    prompt = new_prompt(small, "upt")
    for half in (0, 1):
        assert all(g.abs().max() > 1e-6 for g in torch.autograd.grad(prompt()[half].square().sum(), [prompt.U_T, prompt.U_V]))


def test_text_and_image_prompts_have_one_half_each(small):
    text, image = new_prompt(small, "coop")()
    assert text.shape == (1, 2, 64) and image is None
    text, image = new_prompt(small, "vpt")()
    assert text is None and image.shape == (3, 2, 64)
    assert [x.shape for x in new_prompt(small, "upt")()] == [(1, 2, 64), (3, 2, 64)]


def images_of(task):
    transform = common.train_transform(random_clip(**TINY), 0.99)
    common.seed_everything(0)
    return torch.stack([transform(task.train[i][0]) for i in range(4)]), torch.tensor(task.train.labels[:4])


def one_loss(model, task, prompt, x, y):
    """Cross-entropy of one task by itself; CLIP's own encoders where the kind has no prompts."""
    text, image = prompt()
    if text is None:
        rows = common.tokenize(task.class_names, template=task.template)
        w = model.encode_text(F.pad(rows, (0, 77 - rows.shape[1])))
    else:
        w = common.encode_text(model, common.tokenize(task.class_names, 2), text)
    v = model.encode_image(x) if image is None else common.encode_image(model, x, image)
    cosine = (v / v.norm(dim=-1, keepdim=True)) @ (w / w.norm(dim=-1, keepdim=True)).T
    return F.cross_entropy(model.logit_scale.exp() * cosine, y)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_the_tasks_one_by_one_over_their_own_classes(small, three, kind):
    """Text prompts leave CLIP's image features as they are, image prompts its text features."""
    three[1].class_names += ["a fourth class"]
    prompt, batches = new_prompt(small, kind), [images_of(task) for task in three]
    given = batches if kind != "coop" else [(small.encode_image(x), y) for x, y in batches]
    losses = mvlpt.losses_of(small, mvlpt.texts_of(settings(prompt=kind), small, three), prompt, given)
    alone = torch.stack([one_loss(small, task, prompt, *batch) for task, batch in zip(three, batches)])
    assert torch.allclose(losses, alone, rtol=1e-4, atol=1e-5)
    g, h = torch.autograd.grad(losses.sum(), list(prompt.parameters())), torch.autograd.grad(alone.sum(), list(prompt.parameters()))
    assert all((a - b).abs().max() < 1e-4 * max(1e-3, b.abs().max()) for a, b in zip(g, h))


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_run_on_cuda(three, kind):
    from clip.model import CLIP
    from torch._subclasses.fake_tensor import FakeTensorMode
    args = settings(prompt=kind)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = CLIP(**TINY).eval()
            prompt = mvlpt.Prompt(kind, 2, 3, 64, 64)
            x, y = torch.randn(2, 32) if kind == "coop" else torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
        losses = mvlpt.losses_of(model, mvlpt.texts_of(args, model, three), prompt, [(x, y)] * 3)
        assert losses.shape == (3,) and losses.device.type == "cuda"


# ----------------------------------------------------------------------------------------- transferability and groups

def test_transferability_by_hand():
    accuracy = torch.tensor([[80.0, 30.0, 0.0], [40.0, 60.0, 0.0], [20.0, 15.0, 0.0]])
    before = accuracy.clone()
    assert mvlpt.transferability(accuracy).tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.25, 0.25, 0.0]]
    assert torch.equal(accuracy, before) and mvlpt.transferability(accuracy.double()).dtype == torch.double


def test_groups_by_hand():
    """A target's partners are the best of its column, not of its row."""
    transfer = torch.tensor([[1.0, 0.2, 0.9, 0.5],
                             [0.3, 1.0, 0.1, 0.5],
                             [0.8, 0.7, 1.0, 0.5],
                             [0.4, 0.9, 0.2, 1.0]])
    before = transfer.clone()
    assert mvlpt.group_by_transfer(transfer, 1) == [[0], [1], [2], [3]]
    assert mvlpt.group_by_transfer(transfer, 2) == [[0, 2], [1, 3], [2, 0], [3, 0]]
    assert mvlpt.group_by_transfer(transfer, 3) == [[0, 2, 3], [1, 3, 2], [2, 0, 3], [3, 0, 1]]
    assert [sorted(group) for group in mvlpt.group_by_transfer(transfer, 4)] == [[0, 1, 2, 3]] * 4
    assert torch.equal(transfer, before)


def test_a_target_is_in_its_group_even_where_others_do_better_on_it():
    assert mvlpt.group_by_transfer(torch.tensor([[0.5, 1.0, 0.9], [1.0, 0.6, 1.0], [0.8, 0.9, 0.7]]), 2) == [[0, 1], [1, 0], [2, 1]]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_partners_have_the_largest_transfer_of_all_choices(size):
    transfer = torch.rand(6, 6, generator=torch.Generator().manual_seed(size))
    for j, group in enumerate(mvlpt.group_by_transfer(transfer, size)):
        choices = itertools.combinations([i for i in range(6) if i != j], size - 1)
        best = max(choices, key=lambda others: sum(transfer[i, j] for i in others))
        assert group[0] == j and set(group[1:]) == set(best) and len(group) == size


def test_worst_partners_and_sizes():
    accuracy = torch.tensor([[90.0, 10.0, 20.0], [50.0, 80.0, 40.0], [10.0, 70.0, 60.0]])
    choose = lambda **changes: mvlpt.choose_groups(settings(**changes), accuracy)
    assert choose(group_size=2) == [[0, 1], [1, 2], [2, 1]]
    assert choose(group_size=2, grouping="worst") == [[0, 2], [1, 0], [2, 0]]
    assert choose(group_size=1) == [[0], [1], [2]]
    assert [sorted(group) for group in choose(group_size="all")] == [[0, 1, 2]] * 3


def accuracy_by_hand(model, task, prompt, images):
    text, image = prompt()
    preprocess = common.clip.clip._transform(32)
    x, y = torch.stack([preprocess(image) for image, _ in images]), torch.tensor(images.labels)
    with torch.no_grad():
        rows = common.tokenize(task.class_names, 2) if text is not None else common.tokenize(task.class_names, template=task.template)
        w, v = common.encode_text(model, rows, text), common.encode_image(model, x, image)
        return 100 * (F.normalize(v, dim=-1) @ F.normalize(w, dim=-1).T).argmax(1).eq(y).double().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_study_scores_every_tasks_prompt_on_every_tasks_test_images(small, three, tmp_path, kind):
    run = Memory(tmp_path)
    args = settings(prompt=kind, transferability=True, source="none", lr=0.1)
    prompts = mvlpt.train(args, small, three, run, seed=1)
    by_hand = torch.tensor([[accuracy_by_hand(small, task, prompt, task.test) for task in three] for prompt in prompts.targets])
    assert torch.allclose(prompts.accuracy, by_hand) and [row["phase"] for row in run.rows] == ["alone"] * 6
    alone = trained(small, three, prompt=kind, source="none", lr=0.1)
    assert all(same(a, b) for a, b in zip(prompts.targets, alone.targets))      # the single-task baseline
    scores = mvlpt.score(args, small, common.clip.clip._transform(32), three, prompts)
    assert scores["accuracy"] == pytest.approx(by_hand.diagonal().tolist())
    assert torch.allclose(torch.tensor(scores["transfer_accuracy"]), by_hand)
    saved = json.loads((tmp_path / "transfer.json").read_text())
    assert saved["images"] == "test" and saved["tasks"] == ["a", "b", "c"] and torch.allclose(torch.tensor(saved["accuracy"]), by_hand)
    head, *rows = csv.reader((tmp_path / "transfer.csv").open())
    assert head == ["source", "a", "b", "c"] and [row[0] for row in rows] == ["a", "b", "c"]
    for i, j in itertools.product(range(3), repeat=2):
        share = by_hand[i, j].item() / max(1e-9, *by_hand[:, j].tolist())
        assert float(rows[i][j + 1]) == pytest.approx(share) and saved["transfer"][i][j] == pytest.approx(share)


def test_groups_are_chosen_on_validation_images_and_on_training_images_where_there_are_none(small, three, tmp_path, monkeypatch):
    three[2].train = three[2].train.subset([0, 1, 2])                           # one image a class
    seen, accuracies = [], mvlpt.accuracies
    monkeypatch.setattr(mvlpt, "accuracies", lambda *words: seen.append(words[5]) or accuracies(*words))
    trained(small, three, Memory(tmp_path), prompt="coop", group_size=2)
    held = [part.val.items for part in common.with_validation(three[:2], 1)]
    for images in seen[6:9]:                                                    # after two epochs of each task alone
        assert [part.items for part in images] == [*held, three[2].train.items]
    assert json.loads((tmp_path / "transfer.json").read_text())["images"] == "validation and training"


def test_a_study_that_validates_says_that_no_test_image_was_scored(small, tmp_path):
    """`common` has put held out training images in place of the test images then."""
    args = settings(prompt="coop", transferability=True, source="none", validate=True, epochs=1, adapt_epochs=1)
    mvlpt.train(args, small, small_tasks("a", "b"), Memory(tmp_path), seed=1)
    assert json.loads((tmp_path / "transfer.json").read_text())["images"] == "validation"


def test_a_studys_file_has_the_matrix_of_each_seed_and_their_mean(tmp_path):
    run = Memory(tmp_path)
    run.state["finished"][1] = dict(transfer_accuracy=[[80.0, 20.0], [40.0, 60.0]])
    accuracy = torch.tensor([[40.0, 20.0], [20.0, 20.0]])
    common.write_transfer(settings(), run, ["a", "b"], 2, accuracy, mvlpt.transferability, ["test", "test"])
    saved = json.loads((tmp_path / "transfer.json").read_text())
    assert saved["accuracy_of_seed"] == {"1": [[80.0, 20.0], [40.0, 60.0]], "2": accuracy.tolist()}
    assert saved["accuracy"] == [[60.0, 20.0], [30.0, 40.0]] and saved["transfer"] == [[1.0, 0.5], [0.5, 1.0]]


def test_a_matrix_given_back_is_found_by_the_tasks_names(tmp_path):
    path = matrix_file(tmp_path / "transfer.json", ["a", "b", "c"], [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert common.read_transfer(settings(transfer=path, seeds=[1]), ["c", "a"]) == {1: [[9, 7], [3, 1]]}


def test_a_seed_takes_its_own_matrix_from_a_file_and_test_images_are_warned_of(small, three, tmp_path, capsys):
    """What one seed validates on another may test on."""
    found = {"1": [[9, 1, 8], [1, 9, 1], [2, 8, 9]], "2": [[9, 8, 1], [8, 9, 1], [1, 1, 9]]}
    path = matrix_file(tmp_path / "transfer.json", ["a", "b", "c"], None, accuracy_of_seed=found, prompt="coop")
    words = dict(prompt="coop", source="none", group_size=2, transfer=path, seeds=[1, 2], epochs=1, adapt_epochs=1)
    groups = [mvlpt.train(settings(**words), small, three, Memory(tmp_path), seed=seed).groups.tolist() for seed in (1, 2)]
    assert groups == [[[0, 2], [1, 2], [2, 0]], [[0, 1], [1, 0], [2, 0]]]
    with pytest.raises(common.UserError, match="is of the seeds 1, 2, not of 3: give those as --seeds"):
        common.read_transfer(settings(transfer=path, seeds=[2, 3], prompt="coop"), ["a", "b", "c"])
    assert not capsys.readouterr().err
    path = matrix_file(tmp_path / "tested.json", ["a", "b", "c"], found["1"], images="test", prompt="coop")
    common.read_transfer(settings(transfer=path, seeds=[1], prompt="coop"), ["a", "b", "c"])
    assert capsys.readouterr().err == f"warning: --transfer {path} was measured on test images, so they choose the groups: a study with " \
        "--validate keeps them out\n"


def test_frozen_image_features_are_computed_once_for_the_whole_study(small, three, tmp_path, monkeypatch):
    calls = []
    plain = common.image_features
    for module in (common, sys.modules["multitask_prompt_listings"]):           # of the latter, `view_features` calls it
        monkeypatch.setattr(module, "image_features", lambda model, images, *words, **more:
                            calls.append(images) or plain(model, images, *words, **more))
    trained(small, three, Memory(tmp_path), prompt="coop", transferability=True, source="none")
    assert len(calls) == len(set(calls)) == 9                                   # views, validation and test images of three tasks


# ------------------------------------------------------------------------------------------------------- validation part

def test_validation_images_are_never_among_the_training_or_test_images():
    tasks = common.load_tasks("emoji", shots=5, seed=1)
    for task, part in zip(tasks, common.with_validation(tasks, 1)):
        train, val, test = set(part.train.items), set(part.val.items), set(part.test.items)
        assert not train & val and not val & test and not train & test and train | val == set(task.train.items)
        assert len(val) == round(0.2 * len(task.train)) and set(part.train.labels) == set(task.train.labels)
    held = [[number for _, number in part.val.items] for part in common.with_validation(tasks, 1)]
    assert all(numbers == held[0] for numbers in held)                          # in all styles or in none


def test_a_datasets_own_validation_part_is_taken():
    [task] = small_tasks("a")
    task.val = task.test.subset([0, 1])
    [part] = common.with_validation([task], 1)
    assert part.val is task.val and part.train is task.train


@pytest.mark.parametrize("kind", ["coop", "upt"])
def test_what_is_held_out_is_not_trained_on(small, kind, monkeypatch):
    """Held out images that cannot be read while a training epoch draws its batches."""
    tasks, held = small_tasks("a", "b"), []
    for part in common.with_validation(tasks, 1):
        held += part.val.items
    used, plain = set(), tasks[0].train.read
    for task in tasks:
        task.train.read = lambda item: used.add(item) or plain(item)
    args, parts = settings(prompt=kind), common.with_validation(tasks, 1)
    list(mvlpt.batches_of(args, small, parts, 1, 0, {}))
    assert len(held) == 2 and used == {item for task in tasks for item in task.train.items} - set(held)


# ------------------------------------------------------------------------------------------- the checkpoint that is kept

def planted(monkeypatch, scripts):
    """Let validation say what `scripts` has: {tasks' names: a list of accuracies an epoch}; returns the prompts seen, by phase."""
    seen, counts = {}, {}

    def accuracies(model, preprocess, tasks, texts, prompt, images, cache):
        names = tuple(task.name for task in tasks)
        counts[names] = counts.get(names, -1) + 1
        seen.setdefault(names, []).append(copy.deepcopy(prompt.state_dict()))
        return scripts[names][counts[names]]
    monkeypatch.setattr(mvlpt, "accuracies", accuracies)
    return seen


def is_state(module, state):
    return all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_each_target_keeps_its_own_best_epoch_and_the_first_of_equals(small, monkeypatch):
    """Stage 1 is best on average in its second epoch; then one joint training serves the targets best in its third and first."""
    tasks = small_tasks("a", "b")
    script = [[50, 10], [20, 60], [70, 5], [60, 20]] + [[30, 80], [10, 20], [40, 80], [40, 1]]
    seen, run = planted(monkeypatch, {("a", "b"): script}), Memory()
    prompts = trained(small, tasks, run, prompt="vpt", group_size="all", epochs=4, adapt_epochs=4, lr=0.1)
    states = seen["a", "b"]
    assert is_state(prompts.source, states[1])
    assert is_state(prompts.targets[0], states[6]) and is_state(prompts.targets[1], states[4])
    assert len({float(state["U_V"].sum()) for state in states}) == 8
    assert [row["val"] for row in run.rows] == [30, 40, 37.5, 40, 55, 15, 60, 20.5]


def test_a_group_of_two_keeps_a_checkpoint_for_the_target_only(small, tmp_path, monkeypatch):
    """c's partner is a, whose own group is with b: a's score in c's group must not count."""
    tasks = small_tasks("a", "b", "c")
    path = matrix_file(tmp_path / "transfer.json", ["a", "b", "c"], [[9, 8, 5], [8, 9, 1], [1, 1, 9]], prompt="vpt")
    seen = planted(monkeypatch, {("a", "b"): [[1, 5], [2, 4]], ("a", "c"): [[100, 2], [100, 1]]})
    run = Memory()
    prompts = trained(small, tasks, run, prompt="vpt", source="none", group_size=2, transfer=path, lr=0.1)
    assert prompts.groups.tolist() == [[0, 1], [1, 0], [2, 0]] and [row["tasks"] for row in run.rows] == ["a + b"] * 2 + ["a + c"] * 2
    assert is_state(prompts.targets[0], seen["a", "b"][1]) and is_state(prompts.targets[1], seen["a", "b"][0])
    assert is_state(prompts.targets[2], seen["a", "c"][0]) and [row["val"] for row in run.rows] == [3, 3, 2, 1]     # of kept modules


def test_without_validation_images_the_last_epoch_is_kept(small, monkeypatch):
    seen = planted(monkeypatch, {("a", "b"): [[None, 30], [None, 20]], ("a",): [[None]] * 3, ("b",): [[50], [60], [55]]})
    run = Memory()
    prompts = trained(small, small_tasks("a", "b"), run, prompt="vpt", adapt_epochs=3, lr=0.1)
    assert [row["val"] for row in run.rows] == [30, 20, None, None, None, 50, 60, 55]
    assert is_state(prompts.source, seen["a", "b"][0])                          # b alone decides
    assert is_state(prompts.targets[0], seen["a",][2]) and is_state(prompts.targets[1], seen["b",][1])


# ---------------------------------------------------------------------------------------------------------- the two stages

def test_the_rate_warms_up_for_an_epoch_and_follows_a_cosine():
    rate = mvlpt.rate_of(settings(lr=0.002), 4)
    assert [0.002 * rate(epoch) for epoch in range(4)] == pytest.approx([1e-5, 0.002, 0.001 * (1 + math.sqrt(0.5)), 0.001])


@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_adams_steps_on_the_sum_of_the_losses(small, three, kind):
    """Stage 1, three epochs of one step, with Adam written out; the last is kept, since nothing can be held out."""
    for task in three:
        task.train = task.train.subset([0, 1, 2])
    args = settings(prompt=kind, epochs=3, adapt_epochs=0)
    result = mvlpt.train(args, small, three, Memory(), seed=1).source
    common.seed_everything(1)
    prompt = mvlpt.build(args, small, three).source
    parts = common.with_validation(three, 1)
    seen, moments = {}, [(torch.zeros_like(p), torch.zeros_like(p), torch.ones_like(p, dtype=torch.bool)) for p in prompt.parameters()]
    for epoch, rate in enumerate([1e-5, 0.002, 0.001 * (1 + math.cos(math.pi / 3))]):
        [batches] = mvlpt.batches_of(args, small, parts, 1, epoch, seen)
        if kind == "coop":
            w = [common.encode_text(small, common.tokenize(task.class_names, 2), prompt()[0]) for task in three]
            loss = sum(F.cross_entropy(common.logits(small, x, row), y) for (x, y), row in zip(batches, w))
        else:
            loss = sum(one_loss(small, task, prompt, *batch) for task, batch in zip(three, batches))
        for p, (m, v, sure), g in zip(prompt.parameters(), moments, torch.autograd.grad(loss, list(prompt.parameters()))):
            sure &= g.abs() > max(1e-5, 0.01 * g.abs().max())                   # a gradient of about zero has no certain sign
            m.mul_(0.9).add_(0.1 * g), v.mul_(0.999).add_(0.001 * g * g)
            p.data -= rate * (m / (1 - 0.9 ** (epoch + 1))) / ((v / (1 - 0.999 ** (epoch + 1))).sqrt() + 1e-8)
    for (name, p), q, (_, _, sure) in zip(result.named_parameters(), prompt.parameters(), moments):
        assert sure.float().mean() > 0.3 and (p - q)[sure].abs().max() < 2e-4, name


def test_the_loss_in_the_log_is_the_mean_over_the_tasks(small, three, monkeypatch):
    """Steps of three tasks in stage 1, of one in stage 2: both are a task's loss."""
    losses_of, seen = mvlpt.losses_of, []
    monkeypatch.setattr(mvlpt, "losses_of", lambda *words: seen.append(losses_of(*words)) or seen[-1])
    run = Memory()
    trained(small, three, run, prompt="coop", epochs=1, adapt_epochs=1)
    assert [len(x) for x in seen] == [3, 1, 1, 1]
    assert [row["loss"] for row in run.rows] == pytest.approx([x.mean().item() for x in seen])


@pytest.mark.parametrize("changes", [dict(prompt="coop"), dict(prompt="coop", views=0), dict(prompt="vpt")], ids=str)
def test_stage_2_has_other_batches_than_stage_1(small, monkeypatch, changes):
    """All together: the same tasks in both stages."""
    tasks, seen, losses_of = small_tasks("a", "b"), [], mvlpt.losses_of

    def noted(model, texts, prompt, batches):
        seen.append(torch.cat([x.flatten() for x, _ in batches]))
        return losses_of(model, texts, prompt, batches)
    monkeypatch.setattr(mvlpt, "losses_of", noted)
    trained(small, tasks, group_size="all", **changes)
    assert len(seen) == 4 and not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_a_prompt_adapted_for_zero_epochs_equals_its_source(small, three):
    args = settings(adapt_epochs=0)
    zero, some = mvlpt.train(args, small, three, Memory(), seed=1), trained(small, three)
    assert same(zero.source, some.source) and all(same(zero.of(i), some.source) and not same(some.of(i), some.source) for i in range(3))
    scores = mvlpt.score(args, small, common.clip.clip._transform(32), three, zero)
    assert scores["accuracy"] == pytest.approx([accuracy_by_hand(small, task, some.source, task.test) for task in three])
    assert not any(p.requires_grad for p in some.source.parameters()) and all(p.requires_grad for p in zero.source.parameters())


def test_adaptation_starts_at_the_source_prompt_or_at_a_random_one(small, monkeypatch):
    """A warm-up epoch that stands still leaves every target where it starts; without validation images the last epoch is kept."""
    monkeypatch.setattr(mvlpt, "WARM_UP", 0)
    tasks = small_tasks("a", "b")
    for task in tasks:
        task.train = task.train.subset([0, 1, 2])
    common.seed_everything(1)
    random = mvlpt.build(settings(), small, tasks).source
    moved, none = trained(small, tasks, epochs=4, adapt_epochs=1), trained(small, tasks, source="none", adapt_epochs=1)
    assert all(same(moved.of(i), moved.source) and same(none.of(i), random) for i in range(2)) and not same(moved.source, random)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_prompt_given_back_leads_to_the_same_targets(small, kind, tmp_path):
    tasks, path = small_tasks("a", "b"), tmp_path / "prompts.pt"
    whole = trained(small, tasks, prompt=kind)
    state = dict(method="mvlpt", settings=dict(SETTINGS, prompt=kind), prompts={1: whole.state_dict()}, tasks={})
    torch.save(state, path)
    run = Memory()
    again = trained(small, tasks, run, prompt=kind, init=str(path))
    assert same(again, whole) and [row["phase"] for row in run.rows] == ["target"] * 4


def test_targets_adapt_alone_by_themselves(small):
    """Another second task: the first ends where it would have ended, from the same start."""
    both = trained(small, small_tasks("a", "b"), source="none")
    other = trained(small, [small_tasks("a")[0], small_tasks("x", "y", "z")[2]], source="none")
    assert same(both.targets[0], other.targets[0]) and not same(both.targets[1], other.targets[1])


@pytest.mark.parametrize("changes", [dict(prompt="coop"), dict(prompt="coop", views=0), dict(prompt="vpt"), dict(), dict(source="none"),
                                     dict(group_size="all")], ids=str)
def test_every_kind_learns_and_leaves_clip_alone(small, changes):
    before, run = {k: v.clone() for k, v in small.state_dict().items()}, Memory()
    trained(small, small_tasks("a", "b"), run, epochs=15, adapt_epochs=15, lr=0.01, **changes)
    losses = {row["phase"]: [r["loss"] for r in run.rows if r["phase"] == row["phase"]] for row in run.rows}
    assert all(one[14] < 0.7 * losses[min(losses)][0] for one in losses.values())       # a target may start where the source ended
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_killed_after_any_epoch_a_training_ends_where_it_would_have_ended(small, three, tmp_path):
    """Three tasks alone, the source, and the groups of two: every epoch of every stage."""
    words = dict(prompt="coop", group_size=2, lr=0.05)
    whole = Memory(tmp_path)
    expected = trained(small, three, whole, **words)
    phases = [row["phase"] for row in whole.rows]
    assert phases[:8] == ["alone"] * 6 + ["source"] * 2 and set(phases[8:]) == {"target"} and len(phases) >= 12
    for stop in range(1, len(phases)):
        run = Memory(tmp_path, stop)
        with pytest.raises(Killed):
            trained(small, three, run, **words)
        run.stop = None
        assert same(trained(small, three, run, **words), expected) and run.rows == whole.rows, stop


def test_a_resumed_run_asks_neither_file_again(small, tmp_path):
    """Killed in its first epoch, with both files changed before it goes on: the matrix and the source prompts are in the checkpoint."""
    tasks, names = small_tasks("a", "b", "c"), ["a", "b", "c"]
    source = trained(small, tasks, prompt="coop", adapt_epochs=0)
    state = dict(method="mvlpt", settings=dict(SETTINGS, prompt="coop"), prompts={1: source.state_dict(), 2: source.state_dict()}, tasks={})
    words = dict(prompt="coop", group_size=2, init=str(tmp_path / "prompts.pt"), transfer=str(tmp_path / "transfer.json"))

    def run_of(run, seed=1):
        torch.save(state, words["init"])
        matrix = [[9, 8, 5], [8, 9, 1], [1, 1, 9]]
        matrix_file(tmp_path / "transfer.json", names, matrix, prompt="coop", accuracy_of_seed={"1": matrix, "2": matrix[::-1]})
        return mvlpt.train(settings(seeds=[1, 2], **words), small, tasks, run, seed)
    expected, other, run = run_of(Memory()), run_of(Memory(), 2), Memory(stop=1)
    with pytest.raises(Killed):
        run_of(run)
    (tmp_path / "prompts.pt").write_bytes(b""), (tmp_path / "transfer.json").write_text("{}")
    run.stop = None
    args = settings(seeds=[1, 2], resume=True, **words)
    assert same(mvlpt.train(args, small, tasks, run, 1), expected)
    run.saved = None                                                            # the next seed begins
    assert same(mvlpt.train(args, small, tasks, run, 2), other)


# --------------------------------------------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "random.pt"
    torch.save(random_clip(**TINY).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, backbone):
    """The folder of a finished run of coop on two tasks, and the words it was started with."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_tree(folder / "shapes", {f"{d}/{c}": 7 for d in ("drawn", "painted") for c in ("cup", "hat")})
    words = ["--data", data, "--shots", 5, "--clip", backbone, "--epochs", 1, "--prompt", "coop", "--n-ctx", 2, "--views", 1]
    mvlpt.main([str(word) for word in [*words, "--out", folder / "run"]])
    return folder / "run", words


def refused(*words, says, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(common.UserError) as refusal:
        mvlpt.main([str(word) for word in words])
    line = str(refusal.value)
    assert line.isprintable() and all(str(word) in line for word in says), line
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words, n_ctx, views", [
    ([], 4, 0), (["--prompt", "coop"], 16, 8), (["--prompt", "vpt"], 4, 0), (["--prompt", "vpt", "--clip", "ViT-B/16"], 16, 0),
    (["--prompt", "coop", "--n-ctx", "3", "--views", "0"], 3, 0)])
def test_every_kind_has_its_own_length_and_views(monkeypatch, words, n_ctx, views):
    told = {}
    monkeypatch.setattr(common, "run_seeds", lambda args, *more, **how: told.update(vars(args)))
    mvlpt.main(words)
    assert (told["n_ctx"], told["views"], told["adapt_epochs"]) == (n_ctx, views, told["epochs"])


def test_other_source_tasks_and_the_prompt_given_back(finished, tmp_path, capsys):
    run, words = finished
    data = make_tree(tmp_path / "other", {f"{d}/{c}": 6 for d in ("photo", "sketch") for c in ("dog", "cat", "cow")})
    mvlpt.main([str(word) for word in [*words, "--source", data, "--out", tmp_path / "a", "--plot"]])
    assert [row["tasks"] for row in csv.DictReader((tmp_path / "a" / "log.csv").open())] == ["photo + sketch", "drawn", "painted"]
    mvlpt.main([str(word) for word in [*words, "--init", tmp_path / "a" / "prompts.pt", "--out", tmp_path / "b"]])
    one, other = [json.loads((tmp_path / name / "result.json").read_text()) for name in "ab"]
    assert all(row["val"] for row in csv.DictReader((tmp_path / "a" / "log.csv").open()))
    assert one["accuracy"] == other["accuracy"] and one["groups"] == [[["drawn"], ["painted"]]] and one["variant"] != other["variant"]


def test_a_study_draws_its_matrix_and_gives_it_to_a_grouped_run(backbone, tmp_path, capsys):
    data = make_tree(tmp_path / "shapes", {f"{d}/{c}": 7 for d in ("drawn", "painted", "photo") for c in ("cup", "hat")})
    words = ["--data", data, "--shots", 5, "--clip", backbone, "--epochs", 1, "--prompt", "coop", "--n-ctx", 2, "--views", 1, "--plot"]
    mvlpt.main([str(word) for word in [*words, "--transferability", "--out", tmp_path / "study"]])
    assert (tmp_path / "study" / "transfer-1.png").stat().st_size > 5000
    study = json.loads((tmp_path / "study" / "result.json").read_text())
    matrix = tmp_path / "study" / "transfer.json"
    mvlpt.main([str(word) for word in [*words, "--group-size", 2, "--grouping", "worst", "--transfer", matrix, "--out", tmp_path / "run"]])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["transfer"] == study["transfer"] and "transfer, seed 1 (a row is a source" in capsys.readouterr().out
    assert f"with --transfer {matrix}" in result["variant"] and "--transfer" not in study["variant"]
    assert [group[0] for group in result["groups"][0]] == result["tasks"] and all(len(group) == 2 for group in result["groups"][0])
    refused(*words, "--group-size", 2, "--transfer", tmp_path / "study" / "log.csv", says=["log.csv", "transfer.json"], folder=tmp_path)
    broken = json.loads(matrix.read_text())
    for accuracy in ([[1, 2], [3, 4]], [[1, 2, 3]] * 3 + [[1, 2, 3]], [["x"] * 3] * 3, [[float("nan")] * 3] * 3, None):
        (tmp_path / "bad.json").write_text(json.dumps(dict(broken, accuracy_of_seed={"1": accuracy})))
        refused(*words, "--group-size", 2, "--transfer", tmp_path / "bad.json", says=["bad.json", "no transfer matrix"], folder=tmp_path)
    (tmp_path / "bad.json").write_text(json.dumps(dict(broken, tasks=["drawn", "painted", "carved"])))
    refused(*words, "--group-size", 2, "--transfer", tmp_path / "bad.json", says=["bad.json", "carved", "'photo'"], folder=tmp_path)
    for changes, says in [(dict(prompt="vpt"), "with --prompt vpt, not with --prompt coop"), (dict(clip="tiny"), "with --clip tiny"),
                          (dict(n_ctx=3), "with --n-ctx 3, not with --n-ctx 2"), (dict(shots=4), "with --shots 4, not with --shots 5"), (dict(split=0.1), "with --split 0.1, not without --split")]:
        (tmp_path / "bad.json").write_text(json.dumps(dict(broken, **changes)))
        refused(*words, "--group-size", 2, "--transfer", tmp_path / "bad.json", says=["bad.json", says], folder=tmp_path)


def test_only_tasks_whose_last_checkpoint_is_kept_are_named(small, capsys):
    few, many = small_tasks("few", "many")
    few.train = few.train.subset([0, 1, 2])                                     # one image a class
    trained(small, [few, many], prompt="coop", epochs=1, adapt_epochs=0)
    assert "no validation" not in capsys.readouterr().out                       # the source prompt is chosen on the other's
    trained(small, [few, many], prompt="coop", epochs=1, adapt_epochs=1)
    assert "no validation images of few: the last" in capsys.readouterr().out


def test_one_shot_has_no_validation_part_and_says_so(finished, tmp_path, capsys):
    _, words = finished
    mvlpt.main([str(word) for word in [*words, "--shots", 1, "--out", tmp_path / "run"]])
    assert "no validation images of drawn, painted: the last checkpoint is kept" in capsys.readouterr().out


@pytest.mark.parametrize("more, says", [
    (["--prompt", "upt"], ["with --prompt coop", "not with --prompt upt"]),
    (["--n-ctx", 3], ["with --n-ctx 2", "not with --n-ctx 3"]),
    (["--clip", "tiny"], ["not with --clip tiny"]),
    (["--seeds", 1, 2], ["seeds 1", "not of 2"]), (["--validate"], ["without --validate", "not with --validate"]),
    (["--shots", 4], ["with --shots 5", "not with --shots 4"]),
    (["--source", "emoji"], ["--init", "--source", "one of them"])])
def test_a_source_prompt_that_does_not_fit_is_refused(finished, tmp_path, more, says):
    run, words = finished
    refused(*words, "--init", run / "prompts.pt", "--out", tmp_path / "new", *more, says=says, folder=tmp_path)


def test_a_source_prompt_of_no_source_or_of_another_shape_or_method_is_refused(finished, tmp_path):
    run, words = finished
    saved, path = torch.load(run / "prompts.pt", weights_only=True), tmp_path / "prompts.pt"
    torch.save(dict(saved, settings=dict(saved["settings"], source="none")), path)
    refused(*words, "--init", path, "--out", tmp_path / "new", says=[path, "without stage 1"], folder=tmp_path)
    for state in ({"source.U_T": torch.zeros(2, 7)}, {}, {"source.U_T": None}, None):
        torch.save(dict(saved, prompts={1: state}), path)
        refused(*words, "--init", path, "--out", tmp_path / "new", says=[path, "does not fit"], folder=tmp_path)
    torch.save(dict(saved, method="coop_mt"), path)
    refused(*words, "--init", path, "--out", tmp_path / "new", says=[path, "coop_mt"], folder=tmp_path)
    refused(*words, "--init", tmp_path / "nowhere.pt", "--out", tmp_path / "new", says=["nowhere.pt"], folder=tmp_path)


@pytest.mark.parametrize("more, says", [
    (["--group-size", 3], ["--group-size 3", "the 2 tasks"]), (["--group-size", 0], ["--group-size 0", "too small"]),
    (["--group-size", "many"], ["many"]), (["--grouping", "worst"], ["--grouping worst", "no choice: leave it out"]),
    (["--group-size", "all", "--transfer", "x.json"], ["--transfer x.json", "no choice"]),
    (["--adapt-epochs", -1], ["--adapt-epochs -1", "0 or more"]),
    (["--adapt-epochs", 0, "--source", "none"], ["--adapt-epochs 0"]), (["--adapt-epochs", 0, "--group-size", 2], ["--adapt-epochs 0"]),
    *[(["--transferability", *more], ["--transferability trains", more[0]]) for more in (
        ["--group-size", 2], ["--source", "emoji"], ["--init", "x.pt"], ["--grouping", "worst"], ["--transfer", "x.json"])],
    (["--source", "emojy"], ["emojy", "did you mean 'emoji'"]), (["--prompt", "tpu"], ["tpu"]),
    (["--n-ctx", 75], ["75 context vectors"])])
def test_words_that_cannot_be(finished, tmp_path, more, says):
    _, words = finished
    refused(*words, *more, "--out", tmp_path / "new", says=says, folder=tmp_path)


@pytest.mark.parametrize("kind", ["vpt", "upt"])
def test_a_resnet_takes_text_prompts_only(finished, tmp_path, kind):
    _, words = finished
    says = ["RN50", "ResNet", "--clip ViT-B/16"]
    refused(*words, "--prompt", kind, "--clip", "RN50", "--out", tmp_path / "new", says=says, folder=tmp_path)


def test_an_undecodable_source_image_is_found_before_anything_is_written(finished, tmp_path):
    _, words = finished
    data = make_tree(tmp_path / "other", {f"{d}/{c}": 3 for d in ("photo", "sketch") for c in ("dog", "cat")})
    path = common.load_tasks(str(data), shots=5)[0].train.items[1]
    path.write_bytes(b"not a picture")
    refused(*words, "--source", data, "--out", tmp_path / "new", says=[path, "cannot be decoded"], folder=tmp_path)


def test_source_images_that_a_target_tests_on_are_refused_under_any_spelling(finished, tmp_path):
    """A link to one of the target's folders, as a task of another name: it is split at other places."""
    _, words = finished
    (tmp_path / "link").symlink_to(words[1] / "drawn", target_is_directory=True)
    refused(*words, "--source", f"sketched={tmp_path / 'link'}", "--out", tmp_path / "new", folder=tmp_path,
            says=["--source sketched=", words[1] / "drawn", "tests on"])
    refused(*words, "--source", f"drawn={tmp_path / 'link'}", "--n-ctx", 75, "--out", tmp_path / "new", folder=tmp_path,
            says=["75 context vectors"])                                        # of the same name it is split at the same places


def test_a_source_prompt_that_has_seen_what_a_target_tests_on_is_refused(finished, tmp_path, capsys):
    """A task of another name is split at other places; where the source images are gone, a line says that nobody can tell."""
    run, words = finished
    data = ["--data", f"x={words[1] / 'drawn'}", *words[2:], "--init", run / "prompts.pt"]
    refused(*data, "--out", tmp_path / "new", folder=tmp_path, says=["prompts.pt, of --source", words[1] / "drawn", "tests on"])
    other = make_tree(tmp_path / "other", {f"{d}/{c}": 6 for d in ("photo", "sketch") for c in ("dog", "cat")})
    mvlpt.main([str(word) for word in ["--data", other, *words[2:], "--init", run / "prompts.pt", "--out", tmp_path / "a"]])
    assert "cannot be told" not in capsys.readouterr().err
    (words[1]).rename(tmp_path / "gone")
    try:
        mvlpt.main([str(word) for word in ["--data", other, *words[2:], "--init", run / "prompts.pt", "--out", tmp_path / "b"]])
    finally:
        (tmp_path / "gone").rename(words[1])
    assert "has seen images that --data tests on cannot be told" in capsys.readouterr().err


def test_prompts_are_scored_on_the_tasks_that_they_were_trained_on(finished, tmp_path, capsys):
    run, words = finished
    mvlpt.main(["--eval", str(run / "prompts.pt")])
    assert "drawn" in capsys.readouterr().out
    swapped = f"painted={words[1] / 'painted'},drawn={words[1] / 'drawn'}"
    for data in (swapped, f"a={words[1] / 'drawn'},b={words[1] / 'painted'}"):
        refused("--eval", run / "prompts.pt", "--data", data, says=["prompts.pt", data, "another order"], folder=tmp_path)


def test_a_run_goes_on_with_the_source_tasks_that_it_began_with(finished, tmp_path, monkeypatch):
    _, words = finished
    data = make_tree(tmp_path / "other", {f"{d}/{c}": 6 for d in ("photo", "sketch") for c in ("dog", "cat")})
    checkpoint, words = common.Run.checkpoint, [*words, "--source", data, "--epochs", 2, "--out", tmp_path / "run"]

    def killed(*args, **parts):
        checkpoint(*args, **parts)
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "checkpoint", killed)
        with pytest.raises(Killed):
            mvlpt.main([str(word) for word in words])
    (data / "photo" / "cat").rename(data / "photo" / "cow"), (data / "sketch" / "cat").rename(data / "sketch" / "cow")
    refused("--resume", "--out", tmp_path / "run", says=["checkpoint.pt", "does not fit the data"], folder=tmp_path)
    (data / "photo" / "cow").rename(data / "photo" / "cat"), (data / "sketch" / "cow").rename(data / "sketch" / "cat")
    mvlpt.main(["--resume", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "result.json").exists()
