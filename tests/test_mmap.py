"""MmAP: every equation, the grouping, the two phases, and a file name that the standard library has
too."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Phases, run_script, small_tasks

import common

mmap = common.load_method("mmap")


def settings(**changes):
    usual = dict(n_ctx=4, grouping="all", epochs=1, lr=0.1, batch_size=6, min_crop=0.6, workers=0)
    return mmap.Args(**dict(usual, **changes))


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomised(module):
    """Values away from their start, where scaling matrices are one."""
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return module


# --------------------------------------------------------------------------------------------------
# ---- Eq. (6) and (7)


def test_a_kronecker_product_by_hand():
    M, P = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0, 6.0, 7.0]]])
    assert mmap.kronecker(M, P).tolist() == [[[5, 6, 7, 10, 12, 14], [15, 18, 21, 20, 24, 28]]]


@pytest.mark.parametrize("source", [(4, 32), (2, 16), (1, 64), (4, 8)])
def test_both_prompts_are_kronecker_products_in_every_layer(source):
    prompts = randomised(mmap.MmAP(4, 128, 192, 3, source=source)).double()
    assert prompts.P_s.shape == (3, *source) and prompts.M_l.shape == (
        3,
        4 // source[0],
        128 // source[1],
    )
    for k in range(3):
        assert torch.allclose(
            prompts.text_prompts()[k], torch.kron(prompts.M_l[k], prompts.P_s[k]), atol=1e-12
        )
        assert torch.allclose(
            prompts.image_prompts()[k], torch.kron(prompts.M_v[k], prompts.P_s[k]), atol=1e-12
        )
    assert prompts.text_prompts().shape == (3, 4, 128) and prompts.image_prompts().shape == (
        3,
        4,
        192,
    )


def test_a_source_that_does_not_divide_the_prompts_is_refused():
    for source in [(3, 32), (4, 48)]:
        with pytest.raises(ValueError, match="does not divide"):
            mmap.MmAP(4, 128, 192, 3, source=source)


def test_parameters_at_vit_b16():
    assert count(mmap.MmAP(16, 512, 768, 12)) == 24_696
    assert count(mmap.MLP(4, 512, 768, 12)) == 3_959_808  # the paper's 3.96 M
    assert count(mmap.Joint(16, 512, 768, 12)) == 12 * 16 * (512 + 768)


# --------------------------------------------------------------------------------------------------
# Eq. (8) and grouping


def test_similarity_is_the_dot_product_of_gradients_on_a_quadratic():
    """L_i(x) = |A_i x - c_i|^2 / 2 has the gradient A_i^T (A_i x - c_i)."""
    torch.manual_seed(0)
    A, c = torch.randn(3, 5, 7, dtype=torch.double), torch.randn(3, 5, dtype=torch.double)
    x = torch.randn(7, dtype=torch.double, requires_grad=True)
    grads = torch.stack(
        [torch.autograd.grad((A[i] @ x - c[i]).pow(2).sum() / 2, x)[0] for i in range(3)]
    )
    result = mmap.similarity(grads)
    for i, j in itertools.product(range(3), repeat=2):
        by_hand = (A[i].T @ (A[i] @ x - c[i])) @ (A[j].T @ (A[j] @ x - c[j]))
        assert result[i, j].item() == pytest.approx(by_hand.item(), rel=1e-10)
    assert result.dtype == torch.double


def best_by_enumeration(similarity, n_groups):
    """The best total over all ways to number the tasks with groups."""
    N, best = len(similarity), -math.inf
    for numbers in itertools.product(range(n_groups), repeat=N):
        total = 0.0
        for i in range(N):
            others = [
                float(similarity[i][j]) for j in range(N) if j != i and numbers[j] == numbers[i]
            ]
            total += sum(others) / len(others) if others else 0
        best = max(best, total)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "N, n_groups", [(1, 1), (2, 2), (3, 2), (4, 2), (4, 4), (5, 3), (6, 2), (6, 4)]
)
def test_groups_are_the_best_of_all(N, n_groups, seed):
    x = torch.randn(N, N, generator=torch.Generator().manual_seed(seed)) + (seed - 3) / 3
    similarity = x + x.t()
    groups = mmap.group_tasks(similarity, n_groups)
    assert (
        sorted(sum(groups, [])) == list(range(N)) and 1 <= len(groups) <= n_groups and all(groups)
    )
    total = sum(
        sum(float(similarity[i][j]) for j in g if j != i) / (len(g) - 1)
        for g in groups
        if len(g) > 1
        for i in g
    )
    assert total == pytest.approx(best_by_enumeration(similarity, n_groups), abs=1e-6)


def test_two_blocks_of_tasks_are_found_also_by_the_greedy_way():
    for N in (4, 24):
        side = torch.arange(N) % 2
        similarity = torch.where(side[:, None] == side[None], 1.0, -0.5)
        assert mmap.group_tasks(similarity, 2) == [list(range(0, N, 2)), list(range(1, N, 2))]


@pytest.mark.parametrize("n_groups", [1, 2, 5, 24])
def test_twenty_four_tasks_get_a_valid_partition(n_groups):
    x = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    groups = mmap.group_tasks(x + x.t(), n_groups)
    assert sorted(sum(groups, [])) == list(range(24)) and 1 <= len(groups) <= n_groups


def test_grouping_does_not_change_its_input():
    x = torch.ones(4, 4)
    mmap.group_tasks(x, 2)
    assert torch.equal(x, torch.ones(4, 4))


def task_losses(model, tasks, batch, text_prompts, image_prompts):
    """Every task's cross-entropy through encoders of its own; prompts [K, n, d] per task."""
    losses, (images, labels, task) = [], batch
    for t, (one, text, image) in enumerate(zip(tasks, text_prompts, image_prompts)):
        w = common.encode_text(model, common.tokenize(one.class_names, text.shape[1]), text)
        x = common.encode_image(model, images[task == t], image)
        scores = common.logits(model, x, w)
        losses.append(torch.nn.functional.cross_entropy(scores, labels[task == t]))
    return losses


@pytest.fixture
def three(small):
    """(model, tasks, a step's batch); the first two tasks share class names, the third does not."""
    tasks = small_tasks("a", "b", "c")
    tasks[2].class_names = ["tree", "house", "very long name"]
    common.seed_everything(1)
    return small, tasks, next(iter(common.batches(settings(batch_size=2), small, tasks)))


def test_the_first_phase_averages_the_snapshots_and_descends_on_the_sum(small):
    """Two epochs of one step each, walked by hand, task by task."""
    args, tasks = settings(epochs=3), small_tasks("a", "b")
    tasks[1].class_names = ["tree", "house", "very long name"]
    measured = mmap.measure_similarity(args, small, tasks, Phases())
    Phases().seed_phase("grouping")
    shared, snapshots, velocity, rates = mmap.MmAP(4, 64, 64, 3), [], None, [0.1, 0.05]
    for epoch in range(2):
        common.seed_everything("test", "grouping", epoch)
        [batch] = common.batches(args, small, tasks)
        losses = task_losses(
            small, tasks, batch, [shared.text_prompts()] * 2, [shared.image_prompts()] * 2
        )
        grads = [
            torch.autograd.grad(loss, list(shared.parameters()), retain_graph=True)
            for loss in losses
        ]
        flat = torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])
        snapshots.append(torch.tensor([[(a * b).sum() for b in flat] for a in flat]))
        descent = [a + b + 5e-4 * p.detach() for a, b, p in zip(*grads, shared.parameters())]
        if velocity is None:
            velocity = descent
        else:
            velocity = [0.9 * v + d for v, d in zip(velocity, descent)]
        for p, v in zip(shared.parameters(), velocity):
            p.data -= rates[epoch] * v
    assert torch.allclose(measured, (snapshots[0] + snapshots[1]) / 2, rtol=1e-3, atol=1e-5)
    assert (measured[0, 0] - measured[1, 1]).abs() > 1e-4


def test_in_mixed_batches_a_pair_is_averaged_over_the_steps_with_both_tasks(small, monkeypatch):
    """Batches of two images from tasks of 6, 4 and 2 images; absent tasks are NaN in the log."""
    tasks, seen, grams = small_tasks("a", "b", "c"), [], []
    for task, n in zip(tasks, (6, 4, 2)):
        task.train = task.train.subset(range(n))
    batches, similarity = common.batches, mmap.similarity

    def shown(*given, **how):
        for batch in batches(*given, **how):
            seen.append([bool((batch[2] == t).any()) for t in range(3)])
            yield batch

    def kept(grads):
        grams.append(similarity(grads))
        return grams[-1]

    monkeypatch.setattr(common, "batches", shown)
    monkeypatch.setattr(mmap, "similarity", kept)
    run = Phases()
    measured = mmap.measure_similarity(settings(batches="mixed", batch_size=2), small, tasks, run)
    assert len(seen) == 6 and not all(map(all, seen))
    for i, j in itertools.product(range(3), repeat=2):
        both = [gram[i, j].item() for gram, there in zip(grams, seen) if there[i] and there[j]]
        mean = sum(both) / len(both) if both else 0
        assert measured[i, j].item() == pytest.approx(mean, rel=1e-5)
    absent = [[not there for there in step] for step in seen]
    assert [row["losses"].isnan().tolist() for row in run.logged] == absent


@pytest.mark.parametrize(
    "changes", [dict(specific=False), dict(prompt="mlp"), dict(prompt="joint")], ids=str
)
def test_no_ablation_changes_the_groups(small, changes):
    """The first phase has random numbers of its own: the same similarity to the bit."""
    found = []
    for settings_of in (dict(), changes):
        common.seed_everything("elsewhere", len(found))
        args = settings(grouping="gradient", epochs=2, **settings_of)
        prompts = mmap.train(args, small, small_tasks("a", "b", "c"), Phases())
        found.append((prompts.similarity, prompts.groups()))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[0][0].abs().sum() > 0


# -----------------------------------------------------------------------------------------------
# Eq. (9), (10), (11), (12)


def test_group_and_task_prompts_stand_side_by_side_in_every_layer(small):
    prompts = mmap.build(settings(), small, small_tasks("a", "b", "c"))
    prompts.set_groups([[0, 2], [1]])
    randomised(prompts)
    for task, group in [(0, 0), (1, 1), (2, 0)]:
        for both, half in [
            (prompts.text_prompts(), "text_prompts"),
            (prompts.image_prompts(), "image_prompts"),
        ]:
            assert torch.equal(both[:, task, :4], getattr(prompts.shared[group], half)())
            assert torch.equal(both[:, task, 4:], getattr(prompts.specific[task], half)())
    assert prompts.groups() == [[0, 2], [1]] and prompts.sets() == [0, 1, 2]
    assert count(prompts) == 5 * 3 * (4 * 32 + 2 + 2)


def test_without_specific_prompts_tasks_of_a_group_share_their_texts(small):
    prompts = mmap.build(settings(specific=False), small, small_tasks("a", "b", "c"))
    prompts.set_groups([[0, 2], [1]])
    assert prompts.sets() == [0, 1, 0] and prompts.text_prompts().shape == (3, 3, 4, 64)
    assert common.Texts(small_tasks("a", "b", "c"), 4, prompts.sets()).tokens.shape[0] == 6


def test_one_step_with_all_tasks_batched_equals_one_step_task_by_task(three):
    """Eq. (11)-(12): a group's MmAP gets the sum of its tasks' gradients, a task's its own."""
    model, tasks, (images, labels, task) = three
    prompts = mmap.build(settings(), model, tasks)
    prompts.set_groups([[0, 2], [1]])
    randomised(prompts)
    texts = common.Texts(tasks, 8, prompts.sets())
    x = common.encode_image(model, images, prompts.image_prompts(), task)
    w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
    common.task_losses(model, x, w, labels, task, texts).sum().backward()
    together = {name: p.grad.clone() for name, p in prompts.named_parameters()}
    by_task = []
    for t in range(3):
        prompts.zero_grad()
        alone = images[task == t], labels[task == t], torch.zeros(2, dtype=torch.long)
        text, image = prompts.text_prompts()[:, t], prompts.image_prompts()[:, t]
        task_losses(model, [tasks[t]], alone, [text], [image])[0].backward()
        by_task.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in prompts.named_parameters()
            }
        )
    for name, g in together.items():
        kind, number = name.split(".")[:2]
        members = prompts.groups()[int(number)] if kind == "shared" else [int(number)]
        expected = sum(by_task[t][name] for t in members)
        assert (g - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        assert all(by_task[t][name].abs().max() == 0 for t in range(3) if t not in members)


def test_training_takes_that_step(small):
    """A whole training of one epoch of one step against plain gradient descent on the sum."""
    args, tasks, run = settings(), small_tasks("a", "b"), Phases()
    common.seed_everything("start")
    trained = mmap.train(args, small, tasks, run)
    common.seed_everything("start")
    start = mmap.build(args, small, tasks)
    run.seed_phase("train")
    start.set_groups([[0, 1]])
    common.seed_everything("test", "train", 0)
    [batch] = common.batches(args, small, tasks)
    losses = task_losses(
        small, tasks, batch, start.text_prompts().unbind(1), start.image_prompts().unbind(1)
    )
    grads = torch.autograd.grad(sum(losses), list(start.parameters()))
    for p, q, g in zip(trained.parameters(), start.parameters(), grads):
        assert (p - (q - 0.1 * (g + 5e-4 * q))).abs().max() < 1e-4 * max(1, g.abs().max())
    assert run.logged[0]["loss"].item() == pytest.approx(sum(losses).item(), rel=1e-5)
    assert not torch.equal(start.shared[0].P_s, start.specific[0].P_s)  # each drawn afresh


def test_one_step_enters_few_functions_of_the_project(small):
    """A stranger's walk: train -> batches -> encode_image -> encode_text -> task_losses, and the
    method's own prompts."""
    args, tasks, entered = settings(grouping="all"), small_tasks("a", "b"), []
    prompts = mmap.build(args, small, tasks)
    prompts.set_groups([[0, 1]])
    texts = common.Texts(tasks, 8, prompts.sets())
    [(images, labels, task)] = common.batches(args, small, tasks)

    def trace(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(ROOT)) and "tests" not in file:
            entered.append(frame.f_code.co_name)

    sys.setprofile(trace)
    x = common.encode_image(small, images, prompts.image_prompts(), task)
    w = common.encode_text(small, texts.tokens, prompts.text_prompts(), texts.sets)
    common.task_losses(small, x, w, labels, task, texts).sum().backward()
    sys.setprofile(None)
    functions = {name for name in entered if not name.startswith("<")}
    assert {"encode_image", "encode_text", "task_losses", "kronecker"} <= functions
    assert len(functions) <= 15, functions


@pytest.mark.parametrize(
    "changes",
    [
        dict(grouping="gradient"),
        dict(grouping="random"),
        dict(grouping="none"),
        dict(specific=False),
        dict(prompt="joint"),
        dict(prompt="mlp"),
    ],
    ids=str,
)
def test_every_ablation_trains_and_leaves_clip_alone(small, changes):
    before, run = {k: v.clone() for k, v in small.state_dict().items()}, Phases()
    mmap.train(settings(epochs=30, lr=0.01, **changes), small, small_tasks("a", "b"), run)
    assert run.logged[-1]["loss"] < 0.8 * run.logged[0]["loss"]
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_groupings():
    def choose(seed=3, **changes):
        return mmap.choose_groups(settings(seeds=(seed,), **changes), 5, torch.eye(5))

    assert choose(grouping="all") == [[0, 1, 2, 3, 4]] and choose(grouping="none") == []
    random = choose(grouping="random")
    assert sorted(map(len, random)) == [2, 3] and sorted(sum(random, [])) == [0, 1, 2, 3, 4]
    assert random == choose(grouping="random")
    assert len({str(choose(seed, grouping="random")) for seed in range(9)}) > 2
    assert len(choose(grouping="random", groups=3)) == 3


def test_one_task_says_that_there_is_nothing_to_group_and_goes_on(small, capsys):
    prompts = mmap.train(settings(grouping="gradient"), small, small_tasks("a"), Phases())
    assert "one task: there is nothing to group" in capsys.readouterr().out
    assert prompts.groups() == [[0]]


def test_the_losses_run_on_cuda():
    from clip.model import CLIP
    from conftest import TINY
    from torch._subclasses.fake_tensor import FakeTensorMode

    texts = common.Texts(small_tasks("a", "b"), 8, [0, 1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = CLIP(**TINY).eval()
            prompts = mmap.Prompts(lambda: mmap.MmAP(4, 64, 64, 3), 2, specific=True)
            prompts.shared = torch.nn.ModuleList([mmap.MmAP(4, 64, 64, 3)])
            prompts.group_of = torch.zeros(2, dtype=torch.long)
            images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
            task = torch.zeros(4, dtype=torch.long)
        x = common.encode_image(model, images, prompts.image_prompts(), task)
        w = common.encode_text(model, texts.tokens, prompts.text_prompts(), texts.sets)
        losses = common.task_losses(model, x, w, labels, task, texts)
        assert losses.device.type == "cuda" and losses.shape == (2,)


# ------------------------------------------------------------------------- the name that the
# standard library has too


def in_the_folder(*words):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_numpy_and_the_standard_mmap_import_from_this_folder():
    assert (
        in_the_folder("-c", "import torch, numpy; print(torch.nn.Linear(1, 1).weight.numel())")
        == "1\n"
    )
    assert (
        in_the_folder(
            "-c",
            "import mmap; m = mmap.mmap(-1, 1); m[0] = 7; "
            "print(m[0], mmap.__file__.endswith('mmap.py'))",
        )
        == "7 False\n"
    )
    assert (
        in_the_folder(
            "-c",
            "import mmap; from mmap import ACCESS_READ; import torch, numpy; print(ACCESS_READ)",
        )
        == "1\n"
    )
    assert (
        in_the_folder(
            "-c", "import numpy, common; print(common.load_method('mmap').similarity.__module__)"
        )
        == "method_mmap\n"
    )


@pytest.mark.parametrize("script", ["mmap.py", "coop_mt.py"])
def test_scripts_start_in_this_folder(script):
    assert "--data" in in_the_folder(script, "--help")


def test_pytest_starts_in_this_folder():
    assert "test_similarity" in in_the_folder(
        "-m", "pytest", "--collect-only", "-q", "tests/test_mmap.py"
    )


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_worker_processes_start_from_this_folder(start, tmp_path):
    """A script in this folder, run as `mmap.py` is, whose workers import everything again."""
    code = f"""
import runpy, sys, torch, multiprocessing
if __name__ == "__main__":
    multiprocessing.set_start_method({start!r})
    loader = torch.utils.data.DataLoader(list(range(6)), batch_size=2, num_workers=2)
    import mmap
    print(sorted(x for batch in loader for x in batch.tolist()), mmap.mmap(-1, 1)[0])
"""
    (tmp_path / "loader.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "loader.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0 and done.stdout == "[0, 1, 2, 3, 4, 5] 0\n", done.stderr


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_mmap_itself_reads_images_with_workers(start, tmp_path):
    """mmap.py as the main program, more than 400 image files, so that it starts workers itself."""
    from conftest import make_tree

    data = make_tree(
        tmp_path / "shapes",
        {f"{d}/{c}": 120 for d in ("drawn", "painted") for c in ("cup", "hat")},
        size=12,
    )
    code = (
        f"import multiprocessing, runpy, sys; multiprocessing.set_start_method({start!r}); "
        "sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [
        "mmap.py",
        "--data",
        data,
        "--split",
        0.9,
        "--clip",
        "tiny",
        "--epochs",
        1,
        "--n-ctx",
        2,
        "--batch-size",
        60,
        "--out",
        tmp_path / "run",
        "--grouping",
        "all",
    ]
    if start == "fork":
        done = run_script(*words, cwd=ROOT)
    else:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["groups"] == [
        [["drawn", "painted"]]
    ]
