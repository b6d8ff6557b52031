"""MVLPT: the three kinds of prompts, transferability and groups, mixed batches, the two stages, the
checkpoint that is kept, files from other runs, and what is rejected."""

import copy
import csv
import itertools
import json
import math
import shlex
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
import tyro
from conftest import Phases, killed, make_tree, small_tasks

import common
import data

mvlpt = common.load_method("mvlpt")
KINDS = ["coop", "vpt", "upt"]
SETTINGS = mvlpt.Args(n_ctx=2, epochs=2, batch_size=5, views=1, min_crop=0.6, workers=0,
                      device="cpu", data="here", clip="tiny")
every_kind = pytest.mark.parametrize("kind", KINDS)


def settings(words=""):
    """Small settings, and the flags in `words`."""
    return tyro.cli(mvlpt.Args, args=shlex.split(words), default=SETTINGS)


def matrix(text):
    """A matrix from numbers, with semicolons between rows."""
    return torch.tensor([[float(x) for x in row.split()] for row in text.split(";")])


def told(groups):
    """Groups of task numbers as text: "02 1 20"."""
    return " ".join("".join(map(str, group)) for group in groups)


@pytest.fixture
def trained(small, tmp_path):
    """Train on tasks, or on small tasks with given names: (tasks, flags) -> prompts.

    Each call has its own folder; `.run`: the last run, `.args`: its settings.
    """
    folders = (tmp_path / f"trained-{i}" for i in itertools.count())

    def train(tasks, words=""):
        if isinstance(tasks, str):
            tasks = small_tasks(*tasks.split())
        args = train.args = settings(f"--out {next(folders)} {words}")
        run = train.run = common.Run(args, dict(asdict(args), method="mvlpt", variant=None,
                                                backbone="tiny"))
        run.open({args.seeds[0]: tasks}, {args.seeds[0]: []})
        run.start(args.seeds[0])
        return mvlpt.train(args, small, tasks, run)

    return train


def phases(run):
    """The phases of a run's log, in order."""
    return list(dict.fromkeys(row["phase"] for row in run.rows()))


def same(one, other):
    """Whether two prompts, or a prompt and a state dict, are bitwise equal."""
    one = one.state_dict()
    other = getattr(other, "state_dict", lambda: other)()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def result_file(folder, names, words, *accuracy):
    """Write the result.json of a run on some tasks with flags `words`, with a matrix per seed."""
    seeds = list(range(1, 1 + len(accuracy)))
    result = dict(method="mvlpt", tasks=list(names), seeds=seeds, accuracy={})
    result["settings"] = dict(asdict(settings(words)), backbone="tiny")
    result["transfer_accuracy"] = [matrix(rows).tolist() for rows in accuracy]
    result["transfer_images"] = ["held-out and training"] * len(seeds)
    (folder / "result.json").write_text(json.dumps(result))
    return folder / "result.json"


def prompts_file(run, prompts, tasks):
    """Write the prompts.pt of a run with these prompts."""
    run.save_prompts({"": prompts}, tasks)
    return run.folder / "prompts.pt"


def new_prompt(small, words):
    """A prompt with larger values than its initial ones."""
    prompt = mvlpt.build(settings(words), small, small_tasks("a")).targets[0]
    for p in prompt.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return prompt


@pytest.fixture
def three():
    """Three tasks; the first and the last have the same class names."""
    tasks = small_tasks("a", "b", "c")
    tasks[1].class_names = ["tree", "house", "very long name"]
    return tasks


# -------------------------------------------------------------------------- Eq. (2), (3) and (4)

@pytest.mark.parametrize("kind, n_ctx, count",
                         [("coop", 16, 8_192), ("vpt", 16, 147_456), ("upt", 4, 566_400)])
def test_parameters_of_a_prompt_at_vit_b16(vit_b16, kind, n_ctx, count):
    def trainable(words):
        args = settings(f"--prompt {kind} --n-ctx {n_ctx} {words}")
        prompts = mvlpt.build(args, vit_b16, small_tasks("a", "b"))
        return sum(p.numel() for p in prompts.parameters() if p.requires_grad)

    assert trainable("") == 2 * count               # one per target
    assert trainable("--adapt-epochs 0") == count


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
    size = U.shape[1] // heads
    found = []
    for h in range(heads):
        q, k, v = (part[:, h * size:(h + 1) * size] for part in x.chunk(3, dim=1))
        e = (q @ k.T / math.sqrt(size)).exp()
        found.append(e / e.sum(1, keepdim=True) @ v)
    U = U + linear(torch.cat(found, dim=1), w, f"{name}.attn.out_proj")
    h = linear(norm(U, w, f"{name}.ln_2"), w, f"{name}.mlp.c_fc")
    assert h.shape[1] == 4 * U.shape[1]
    return U + linear(h / (1 + (-1.702 * h).exp()), w, f"{name}.mlp.c_proj")


@pytest.mark.parametrize("heads, layers, width", [(1, 1, 128), (2, 2, 32)])
def test_the_unified_prompt_equals_a_forward_pass_written_out(small, heads, layers, width):
    """Input maps, blocks over all 2 + 3 * 2 vectors at once, output maps; Figure 6's shapes."""
    prompt = new_prompt(small, f"--heads {heads} --layers {layers} --width {width}")
    w = {name: p.detach().double() for name, p in prompt.named_parameters()}
    U = torch.cat([linear(w["U_T"], w, "text_in"), linear(w["U_V"].reshape(6, 64), w, "image_in")])
    assert U.shape == (8, width)
    for i in range(layers):
        U = block_by_hand(U, w, f"blocks.{i}", heads)
    assert f"blocks.{layers}.ln_1.weight" not in w
    text, image = prompt()
    assert text.shape == (1, 2, 64) and image.shape == (3, 2, 64)
    expected = torch.cat([linear(U[:2], w, "text_out"), linear(U[2:], w, "image_out")])
    found = torch.cat([text, image]).flatten(0, 1)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def features_by_hand(model, task, prompt, x):
    """Unit-length text and image features of one task alone; CLIP's own encoders if a kind has
    no prompts. Under `vpt` the text is "a photo of a [class].", whatever the task's template."""
    text, image = prompt()
    if text is None:
        rows = common.tokenize([f"a photo of a {name}" for name in task.class_names])
        w = model.encode_text(F.pad(rows, (0, 77 - rows.shape[1])))
    else:
        w = common.encode_text(model, common.tokenize(task.class_names, 2), text)
    if image is None:
        v = model.encode_image(x)
    else:
        v = common.encode_image(model, x, image)
    return F.normalize(w, dim=-1), F.normalize(v, dim=-1)


def losses_by_hand(model, task, prompt, x, y):
    """The cross-entropy of each image of one task, [B]."""
    w, v = features_by_hand(model, task, prompt, x)
    return F.cross_entropy(model.logit_scale.exp() * v @ w.T, y, reduction="none")


def accuracy_by_hand(model, task, prompt):
    """On a task's test images, in %."""
    preprocess = common.clip.clip._transform(32)
    x = torch.stack([preprocess(image) for image, _ in task.test])
    with torch.no_grad():
        w, v = features_by_hand(model, task, prompt, x)
    hits = (v @ w.T).argmax(1) == torch.tensor(task.test.labels)
    return 100 * hits.double().mean().item()


# --------------------------------------------------------------------- transferability and groups

def test_transferability_by_hand():
    accuracy = matrix("80 30 0; 40 60 0; 20 15 0")
    expected = matrix("1 .5 0; .5 1 0; .25 .25 0")
    assert torch.equal(mvlpt.transferability(accuracy), expected)


def groups(transfer, size):
    return told(mvlpt.group_by_transfer(transfer, size))


def test_groups_by_hand():
    """A target's partners are the best of its column, not of its row; the target is in its group
    even if other tasks do better on it."""
    transfer = matrix("1 .2 .9 .5; .3 1 .1 .5; .8 .7 1 .5; .4 .9 .2 1")
    assert groups(transfer, 1) == "0 1 2 3"
    assert groups(transfer, 2) == "02 13 20 30"
    assert groups(transfer, 3) == "023 132 203 301"
    assert groups(transfer, 4) == "0231 1320 2031 3012"
    assert groups(matrix(".5 1 .9; 1 .6 1; .8 .9 .7"), 2) == "01 10 21"


def test_worst_partners_and_sizes():
    accuracy = matrix("90 10 20; 50 80 40; 10 70 60")

    def choose(words):
        return " / ".join(map(told, mvlpt.candidate_groups(settings(words), accuracy)))

    assert choose("--group-size 1") == "0 1 2"
    assert choose("--group-size 2") == "01 12 21"
    assert choose("--group-size 2 --grouping worst") == "02 10 20"
    assert choose("--group-size all") == "012 120 210"
    assert choose("--group-size best") == "0 1 2 / 01 12 21 / 012 120 210"
    best = settings("--group-size best")
    assert mvlpt.group_sizes(best, 2) == [1, 2]                 # no third task
    assert mvlpt.group_sizes(best, 20) == [1, 2, 3]


@every_kind
def test_the_study_scores_every_tasks_prompt_on_every_tasks_test_images(
        small, three, trained, kind):
    prompts = trained(three, f"--prompt {kind} --transferability --lr 0.1")
    assert phases(trained.run) == ["alone a", "alone b", "alone c"]
    by_hand = torch.tensor([[accuracy_by_hand(small, task, prompt) for task in three]
                            for prompt in prompts.targets])
    found = mvlpt.report(trained.args, three, prompts)
    assert torch.allclose(torch.tensor(found["transfer_accuracy"]), by_hand)
    best = by_hand.max(dim=0).values.clamp(min=1e-9)
    assert torch.allclose(torch.tensor(found["transfer"]), by_hand / best)
    assert found["transfer_images"] == "test"
    held_out = settings("--transferability --validate")     # common.py made these the test images
    assert mvlpt.transfer_images(held_out, three[0]) == (three[0].test, "held-out")
    assert found["groups"] == [["a"], ["b"], ["c"]]
    how = mvlpt.classify(trained.args, small, three, prompts)
    scores = common.evaluate(trained.args, small, three, **how)
    assert scores["accuracy"] == pytest.approx(by_hand.diagonal().tolist())


def scored_on(monkeypatch):
    """The items of the images that every call of `accuracies` scores, a list per task."""
    seen, accuracies = [], mvlpt.accuracies

    def noted(args, model, tasks, images, prompt):
        seen.append([part.items for part in images])
        return accuracies(args, model, tasks, images, prompt)

    monkeypatch.setattr(mvlpt, "accuracies", noted)
    return seen


def test_held_out_images_choose_groups_and_checkpoints_and_at_one_shot_the_training_images(
        three, trained, monkeypatch, capsys):
    three[2].train = three[2].train.subset([0, 1, 2])           # an image per class
    seen = scored_on(monkeypatch)
    prompts = trained(three, "--prompt coop --group-size 2")
    held = [part.val.items for part in data.with_held_out(three[:2], 1)]
    everywhere = [*held, three[2].train.items]
    assert seen[:6:2] == [[items] for items in everywhere]      # each alone, 2 epochs
    assert seen[6:11] == [everywhere] * 5                       # the transfer, and the source
    found = mvlpt.report(trained.args, three, prompts)
    assert found["transfer_images"] == "held-out and training"
    assert "no image of c can be held out: the checkpoint is chosen on" in capsys.readouterr().out


def test_a_datasets_own_validation_part_chooses_the_checkpoint(trained, monkeypatch):
    [task] = small_tasks("a")
    task.val = task.test.subset([0, 1])
    seen = scored_on(monkeypatch)
    trained([task], "--prompt vpt")
    assert seen == [[task.val.items]] * 4


def test_what_is_held_out_is_not_trained_on(trained, monkeypatch):
    tasks, used, batches = small_tasks("a", "b"), set(), common.batches

    def noted(args, model, tasks, frozen=False):
        used.update(item for task in tasks for item in task.train.items)
        return batches(args, model, tasks, frozen)

    monkeypatch.setattr(common, "batches", noted)
    trained(tasks, "--prompt coop --group-size all")
    held = {item for part in data.with_held_out(tasks, 1) for item in part.val.items}
    assert len(held) == 2
    assert used == {item for task in tasks for item in task.train.items} - held


# -------------------------------------------------------------------- the checkpoint that is kept

def planted(monkeypatch, **scripts):
    """Replace held-out scores by those in `scripts`: tasks' names = rows of scores, one per epoch.

    Returns the prompts scored, {tasks' names: a list of states}.
    """
    seen = {}

    def accuracies(args, model, tasks, images, prompt):
        names = "".join(task.name for task in tasks)
        states = seen.setdefault(names, [])
        states.append(copy.deepcopy(prompt.state_dict()))
        return matrix(scripts[names])[len(states) - 1]

    monkeypatch.setattr(mvlpt, "accuracies", accuracies)
    return seen


def test_each_target_keeps_its_own_best_epoch_and_of_ties_the_first(trained, monkeypatch):
    """Stage 1 is best on average in its second epoch; then the targets in the third and first."""
    seen = planted(monkeypatch, ab="50 10; 20 60; 70 5; 60 20; 30 80; 10 20; 40 80; 40 1")
    prompts = trained("a b", "--prompt vpt --group-size all --epochs 4 --lr 0.1")
    states = seen["ab"]
    assert same(prompts.source, states[1])
    assert same(prompts.targets[0], states[6])
    assert same(prompts.targets[1], states[4])
    assert len({float(state["U_V"].sum()) for state in states}) == 8
    assert [row["val"] for row in trained.run.rows()] == [30, 40, 37.5, 40, 55, 15, 60, 20.5]


def test_group_size_best_takes_each_targets_best_size_and_of_ties_the_smallest(
        trained, tmp_path, monkeypatch):
    """Table 2: groups of 1, 2 and 3; a does best alone, b in a pair, c with both, d ties."""
    transfer = "9 8 7 1; 8 9 8 1; 7 7 9 1; 1 1 1 9"
    path = result_file(tmp_path, "abcd", "--prompt vpt", transfer)
    seen = planted(monkeypatch, a="50; 60", b="10; 20", c="1; 1", d="30; 20",
                   ab="60 40; 55 39", bc="99 2; 99 3", ad="99 30; 99 30",
                   abc="60 40 5; 60 40 6", abd="99 99 30; 99 99 29")
    words = f"--prompt vpt --source none --group-size best --transfer {path} --lr 0.1"
    prompts = trained("a b c d", words)
    assert " ".join(seen) == "a b c d ab bc ad abc abd"         # the partners of each, by hand
    assert told(prompts.group_lists()) == "0 10 210 3"
    best = [seen["a"][1], seen["ab"][0], seen["abc"][1], seen["d"][0]]
    assert all(map(same, prompts.targets, best))


# ------------------------------------------------------------------------- batches and the losses

def learned(small, tasks, words):
    """Train on tasks together for three epochs: (settings, initial prompt, each step's log)."""
    run, args = Phases(), settings(f"--epochs 3 --lr 0.05 {words}")
    common.seed_everything("start")
    start = mvlpt.build(args, small, tasks).source
    mvlpt.learn(args, small, run, "together", tasks, start, 3, [[0]])
    return args, start.requires_grad_(), [one for one in run.logged if "loss" in one]


@pytest.mark.parametrize("kind, batches", [*[(kind, "mixed") for kind in KINDS], ("coop", "tasks")])
def test_the_loss_is_the_mean_over_the_images_of_a_step(small, kind, batches):
    """Two tasks, of 6 images and 4 classes and of 2 images and 3 classes; five images per step.

    Mixed: an epoch is ceil(8 / 5) = 2 steps, and two of six steps have no image of the second task.
    The losses of later steps show that Adam took the same steps, at the rates written here.
    """
    tasks = small_tasks("one", "two")
    tasks[0].class_names = ["tree", "house", "very long name", "a fourth class"]
    tasks[1].train = tasks[1].train.subset([0, 4])
    args, prompt, steps = learned(small, tasks, f"--prompt {kind} --batches {batches}")
    assert len(steps) == 6
    optimizer = torch.optim.Adam(prompt.parameters())
    absent, steps = 0, iter(steps)
    for epoch, rate in enumerate([1e-5, 0.05, 0.025 * (1 + math.cos(math.pi / 3))]):
        common.seed_everything("test", "together", epoch)
        optimizer.param_groups[0]["lr"] = rate
        seen = 0
        for x, y, t in common.batches(args, small, tasks):
            parts = {i: losses_by_hand(small, tasks[i], prompt, x[t == i], y[t == i])
                     for i in t.unique().tolist()}
            loss = torch.cat(list(parts.values())).mean()
            logged = next(steps)
            assert logged["loss"].item() == pytest.approx(loss.item(), rel=2e-3)
            for i, found in enumerate(logged["losses"].tolist()):
                if i in parts:
                    assert found == pytest.approx(parts[i].mean().item(), rel=2e-3)
                else:
                    assert math.isnan(found)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(x)
            absent += 2 - len(parts)
        assert seen == dict(mixed=8, tasks=20)[batches]
    assert absent == dict(mixed=2, tasks=0)[batches]


def test_an_image_of_several_classes_counts_as_one_image(small):
    """VOC 2007 beside a task of one class per image: cross-entropy with a uniform distribution."""
    tasks = small_tasks("voc", "other")
    tasks[0].metric = "11-point mAP"
    tasks[0].train.labels = [(0,), (1, 2), (2,), (0, 1, 2), (1,), (2, 0)]
    tasks[1].class_names = ["tree", "house", "very long name", "a fourth class"]
    tasks[1].train = tasks[1].train.subset([0, 1, 2, 4])
    args, prompt, steps = learned(small, tasks, "--prompt coop --batch-size 12")
    common.seed_everything("test", "together", 0)
    [(x, y, t)] = common.batches(args, small, tasks)
    total = 0
    for i, task in enumerate(tasks):
        w, v = features_by_hand(small, task, prompt, x[t == i])
        log_p = (small.logit_scale.exp() * v @ w.T).log_softmax(dim=1)
        total -= (y[t == i] * log_p[:, :3]).sum().item()
    assert sorted(y.max(dim=1).values.tolist()) == pytest.approx([1 / 3, 0.5, 0.5] + [1] * 7)
    assert steps[0]["loss"].item() == pytest.approx(total / 10, rel=1e-4)


# -------------------------------------------------------------------------------- the two stages

def test_a_prompt_adapted_for_zero_epochs_equals_its_source(small, three, trained):
    some = trained(three, "--lr 0.05")
    zero = trained(three, "--lr 0.05 --adapt-epochs 0")
    assert same(zero.source, some.source) and not zero.targets
    assert not any(same(prompt, some.source) for prompt in some.targets)
    how = mvlpt.classify(trained.args, small, three, zero)
    scores = common.evaluate(trained.args, small, three, **how)
    by_hand = [accuracy_by_hand(small, task, some.source) for task in three]
    assert scores["accuracy"] == pytest.approx(by_hand)
    assert not any(p.requires_grad for p in some.source.parameters())
    assert all(p.requires_grad for p in zero.source.parameters())


def test_adaptation_starts_at_the_source_prompt_or_at_a_random_one(small, trained, monkeypatch):
    """One epoch of warm-up, a step of 1e-5, leaves every target about where it starts."""
    common.seed_everything(1, "", "prompts", "start")
    random = mvlpt.build(settings(), small, small_tasks("a", "b")).source
    planted(monkeypatch, ab="1 1; 2 2; 3 3", a="1; 1", b="1; 1")
    moved = trained("a b", "--epochs 3 --adapt-epochs 1")
    none = trained("a b", "--source none --adapt-epochs 1")

    def apart(one, other):
        pairs = zip(one.parameters(), other.parameters())
        return max((p - q).abs().max().item() for p, q in pairs)

    assert all(apart(prompt, moved.source) < 1.1e-5 for prompt in moved.targets)
    assert all(apart(prompt, random) < 1.1e-5 for prompt in none.targets)
    assert apart(moved.source, random) > 1e-3


def test_a_saved_source_prompt_leads_to_the_same_targets(trained):
    whole = trained("a b")
    path = prompts_file(trained.run, whole, small_tasks("a", "b"))
    assert same(trained("a b", f"--init {path}"), whole)
    assert phases(trained.run) == ["target a", "target b"]


def test_training_killed_in_every_epoch_ends_where_it_would_have_ended(three, trained):
    """Three tasks alone, the transfer row by row, the source, and groups of 1, 2 and 3."""
    words = "--prompt coop --lr 0.05 --group-size best"
    expected, whole = trained(three, words), trained.run.folder
    n = len(trained.run.rows()) + 3                             # the transfer logs nothing
    words += f" --out {whole.parent}/killed"
    for _ in range(n - 1):                      # each keeps one more epoch and loses the next
        with killed(before="checkpoint.pt", nth=2):
            trained(three, words)
        words = words.removesuffix(" --resume") + " --resume"
    assert same(trained(three, words), expected)
    assert (trained.run.folder / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


# --------------------------------------------------------------------------- files of other runs

def test_a_seed_takes_its_own_matrix_and_from_it_only_its_tasks(three, trained, tmp_path):
    """One seed may test on images that another holds out. The file has the tasks in another order.
    """
    path = result_file(tmp_path, "xcab", "--prompt coop", "0 0 0 0; 0 9 2 8; 0 8 9 1; 0 1 1 9",
                       "0 0 0 0; 0 9 1 1; 0 1 9 8; 0 1 8 9")
    words = f"--prompt coop --source none --group-size 2 --transfer {path} --epochs 1"
    second = trained(three, f"{words} --seeds 2")
    assert told(second.group_lists()) == "01 10 20"
    first = trained(three, f"{words} --seeds 1")
    assert told(first.group_lists()) == "02 12 20"
    found = mvlpt.report(trained.args, three, first)
    assert found["transfer_accuracy"] == matrix("9 1 8; 1 9 1; 2 8 9").tolist()
    assert found["transfer_images"] == "held-out and training"


def test_a_resumed_run_reads_neither_file_again(trained, tmp_path):
    """Killed in stage 2; both files are deleted before it resumes."""
    source = trained("a b c", "--prompt coop --adapt-epochs 0")
    init = prompts_file(trained.run, source, small_tasks("a", "b", "c"))
    path = result_file(tmp_path, "abc", "--prompt coop", "9 8 5; 8 9 1; 1 1 9")
    words = f"--prompt coop --group-size 2 --init {init} --transfer {path}"
    expected = trained("a b c", words)
    with killed(before="checkpoint.pt", nth=4):
        trained("a b c", words)
    init.unlink()
    path.unlink()
    assert same(trained("a b c", f"{words} --resume --out {trained.run.folder}"), expected)


# ------------------------------------------------------------------------------- the command line

def main(words):
    common.main(mvlpt.METHOD, shlex.split(words))


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, random_pt):
    """A tree of four domains, and the flags of a short run on the first two of them."""
    folder = tmp_path_factory.mktemp("shapes")
    domains = ("drawn", "painted", "photo", "ink")
    make_tree(folder, {f"{d}/{c}": 7 for d in domains for c in ("cup", "hat")})
    words = f"--shots 5 --clip {random_pt} --epochs 1 --n-ctx 2 --views 1 --workers 0"
    return folder, f"--data drawn={folder}/drawn,painted={folder}/painted {words}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes):
    """The folder of a finished run of coop on two tasks."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(f"{shapes[1]} --prompt coop --out {folder}")
    return folder


@pytest.fixture
def other(tmp_path):
    """Two source tasks of other images."""
    layout = {f"{d}/{c}": 6 for d in ("photo", "sketch") for c in ("dog", "cat", "cow")}
    return make_tree(tmp_path / "other", layout, size=26)


@pytest.fixture
def refused(tmp_path):
    """Check that flags are rejected with these words in one line, and that nothing is written."""
    def refused(words, *says):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(common.UserError) as refusal:
            main(f"{words} --out {tmp_path}/new")
        line = str(refusal.value)
        assert line.isprintable() and all(str(word) in line for word in says), line
        assert sorted(tmp_path.rglob("*")) == before

    return refused


@pytest.mark.parametrize("words, n_ctx, views", [
    ("", 4, 0),
    ("--prompt coop", 16, 8),
    ("--prompt=vpt", 4, 0),
    ("--prompt vpt --clip ViT-B/16", 16, 0),
    ("--prompt coop --clip ViT-B/16", 16, 0)])
def test_every_kind_has_its_own_length_and_views(words, n_ctx, views):
    args = common.parse(mvlpt.METHOD, shlex.split(words))
    assert (args.n_ctx, args.views) == (n_ctx, views)
    assert (args.lr, args.batch_size, args.batches) == (0.002, 32, "mixed")
    assert (args.heads, args.layers, args.width) == (1, 1, 128)
    assert args.epochs == mvlpt.epochs_of_stage_2(args) == (10 if args.clip == "tiny" else 200)
    variant = None if args.prompt == "upt" else f"with --prompt {args.prompt}"
    assert common.variant_of(mvlpt.METHOD, args) == variant


def test_other_source_tasks_train_the_source_prompt(shapes, other, tmp_path):
    main(f"{shapes[1]} --prompt coop --source {other} --out {tmp_path}/run")
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [row["phase"] for row in rows] == ["source", "target drawn", "target painted"]
    assert all(row["val"] for row in rows)
    result = result_of(tmp_path / "run")
    assert result["groups"] == [[["drawn"], ["painted"]]] and "transfer" not in result
    assert result["settings"]["source"] == str(other)


def test_a_study_plots_its_matrix_and_gives_it_to_a_grouped_run(
        shapes, tmp_path, capsys, refused):
    folder, words = shapes
    words = f"{words} --data {folder} --prompt coop"
    main(f"{words} --transferability --seeds 1 2 --plot --out {tmp_path}/study")
    assert (tmp_path / "study" / "transfer-2.png").stat().st_size > 5000
    study, path = result_of(tmp_path / "study"), tmp_path / "study" / "result.json"
    assert study["transfer_images"] == ["test", "test"]
    capsys.readouterr()
    grouped = f"{words} --group-size best --transfer {path}"
    main(f"{grouped} --seeds 2 --grouping worst --out {tmp_path}/run")
    out, err = capsys.readouterr()
    assert f"warning: --transfer {path} was measured on test images" in err
    assert "transfer, seed 2" in out
    result = result_of(tmp_path / "run")
    assert result["transfer"] == study["transfer"][1:]
    assert result["transfer_images"] == ["test"]
    assert [group[0] for group in result["groups"][0]] == result["tasks"]
    assert {len(group) for group in result["groups"][0]} <= {1, 2, 3}

    refused(f"{grouped} --seeds 1 3", path, "the seeds 1, 2, not 3")
    refused(f"{grouped} --prompt vpt", path, "not with --prompt vpt")
    refused(f"{grouped} --n-ctx 3", path, "--n-ctx 2, not with --n-ctx 3")
    refused(f"{grouped} --shots 4", path, "--shots 5, not with --shots 4")
    refused(f"{grouped} --clip tiny", path, "tiny is not the backbone that")
    refused(f"{grouped} --data {folder},new={folder}/ink", path, "not new")


@pytest.mark.parametrize("words, says", [
    ("--init RUN/prompts.pt --prompt upt", "with --prompt coop, not with --prompt upt"),
    ("--init RUN/prompts.pt --clip tiny", "tiny is not the backbone that"),
    ("--init RUN/prompts.pt --seeds 1 2", "the seeds 1, not of 2"),
    ("--init RUN/prompts.pt --validate", "without --validate, not with --validate"),
    ("--init RUN/prompts.pt --shots 4", "with --shots 5, not with --shots 4"),
    ("--group-size 2 --data ALL --transfer RUN/result.json", "no transfer matrix: give the"),
    ("--group-size 2 --data ALL --transfer RUN/log.csv", "log.csv"),
    ("--eval RUN/prompts.pt --data a=ALL/drawn,b=ALL/ink", "another order")])
def test_files_of_other_runs_that_do_not_fit_are_rejected(shapes, finished, refused, words, says):
    words = words.replace("RUN", str(finished)).replace("ALL", str(shapes[0]))
    prompt = "" if "--eval" in words else f"{shapes[1]} --prompt coop"
    refused(f"{prompt} {words}", says)


@pytest.mark.parametrize("accuracy", [[[[1, 2], [3, 4]]], [[["x"] * 4] * 4]])
def test_a_damaged_transfer_matrix_is_rejected(shapes, finished, tmp_path, refused, accuracy):
    changed = dict(tasks=["drawn", "painted", "photo", "ink"], transfer_accuracy=accuracy)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result_of(finished) | changed))
    words = f"{shapes[1]} --data {shapes[0]} --prompt coop --group-size 2 --transfer {path}"
    refused(words, path, "cannot be used")


@pytest.mark.parametrize("key, value, says", [
    ("settings", dict(source="none"), "without stage 1"),
    ("prompts", {1: None}, "cannot be used"),
    ("method", "coop_mt", "coop_mt")])
def test_a_file_without_a_source_prompt_is_rejected(
        shapes, finished, tmp_path, refused, key, value, says):
    saved, path = torch.load(finished / "prompts.pt", weights_only=True), tmp_path / "prompts.pt"
    saved[key] = value if key == "method" else saved[key] | value
    torch.save(saved, path)
    refused(f"{shapes[1]} --prompt coop --init {path}", path, says)


def test_an_undecodable_source_image_is_found_before_anything_is_written(shapes, other, refused):
    path = data.load_tasks(str(other), shots=5)[0].train.items[1]
    path.write_bytes(b"not a picture")
    refused(f"{shapes[1]} --source {other}", path, "cannot be decoded")


def test_a_source_image_that_a_target_tests_on_is_rejected(shapes, tmp_path, refused):
    """A link to a target's folder, as a task with another name, so it is split differently."""
    (tmp_path / "link").symlink_to(shapes[0] / "drawn", target_is_directory=True)
    refused(f"{shapes[1]} --source sketched={tmp_path}/link", "drawn")


def test_a_source_prompt_trained_on_a_targets_test_images_is_rejected(
        shapes, finished, refused):
    """A task with another name is split differently."""
    words = f"{shapes[1]} --prompt coop --init {finished}/prompts.pt"
    refused(f"{words} --data x={shapes[0]}/drawn", "the source prompt in", "test images of x")


def test_a_run_resumes_only_with_the_source_tasks_it_started_with(shapes, other, tmp_path):
    def rename(old, new):
        for domain in ("photo", "sketch"):
            (other / domain / old).rename(other / domain / new)

    with killed(before="checkpoint.pt", nth=2):
        main(f"{shapes[1]} --source {other} --epochs 2 --out {tmp_path}/run")
    rename("cat", "lion")
    with pytest.raises(common.UserError, match="does not match the data"):
        main(f"--resume --out {tmp_path}/run")
    rename("lion", "cat")
    main(f"--resume --out {tmp_path}/run --source {other}")
    assert (tmp_path / "run" / "result.json").exists()
