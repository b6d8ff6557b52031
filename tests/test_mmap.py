"""MmAP: every equation, the grouping, the two phases, and a file name that the standard library
also has."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Phases, make_tree, small_tasks

import common

mmap, hipro = common.load_method("mmap"), common.load_method("hipro")


def settings(**changes):
    usual = dict(n_ctx=4, grouping="all", epochs=1, lr=0.1, batch_size=6, min_crop=0.6, workers=0)
    return mmap.Args(**dict(usual, **changes))


def count(module):
    return sum(p.numel() for p in module.parameters())


def randomised(module):
    """Random values in place of the initial ones, where scaling matrices are one."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return module


# -------------------------------------------------------------------------------- Eq. (6) and (7)

def test_a_kronecker_product_by_hand():
    M = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    P = torch.tensor([[[5.0, 6.0, 7.0]]])
    assert mmap.kronecker(M, P).tolist() == [[[5, 6, 7, 10, 12, 14], [15, 18, 21, 20, 24, 28]]]


@pytest.mark.parametrize("source", [(4, 32), (2, 16)], ids=str)
def test_both_prompts_are_kronecker_products_in_every_layer(source):
    m, n = source
    one = randomised(mmap.MmAP(4, 128, 192, 3, source)).double()
    assert one.P_s.shape == (3, m, n) and one.M_l.shape == (3, 4 // m, 128 // n)
    text, image = one.text_prompts(), one.image_prompts()
    assert text.shape == (3, 4, 128) and image.shape == (3, 4, 192)
    for k in range(3):
        assert torch.allclose(text[k], torch.kron(one.M_l[k], one.P_s[k]), atol=1e-12)
        assert torch.allclose(image[k], torch.kron(one.M_v[k], one.P_s[k]), atol=1e-12)


def test_the_kronecker_product_of_ones_repeats_the_source_prompt():
    """By default [b, gcd / 2] = [4, 32]: the prompts start as 4 and 6 copies of it side by side."""
    one = mmap.MmAP(4, 128, 192, 3)
    assert torch.equal(one.text_prompts(), torch.cat([one.P_s] * 4, dim=2))
    assert torch.equal(one.image_prompts(), torch.cat([one.P_s] * 6, dim=2))


def test_parameters_at_vit_b16():
    assert count(mmap.MmAP(16, 512, 768, 12)) == 24_696
    assert count(mmap.MLP(4, 512, 768, 12)) == 3_959_808                # the paper's 3.96 M
    assert count(mmap.Joint(16, 512, 768, 12)) == 12 * 16 * (512 + 768)


# ------------------------------------------------------------------------- Eq. (8) and grouping


BOTH = pytest.mark.parametrize("method", [mmap, hipro], ids=["mmap", "hipro"])


def symmetric(n, seed):
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) + (seed - 3) / 3
    return x + x.t()


def total(similarity, label):
    """The sum over tasks of the mean similarity to the other tasks with the same label."""
    result, tasks = 0.0, range(len(label))
    for i in tasks:
        others = [float(similarity[i][j]) for j in tasks if j != i and label[j] == label[i]]
        result += sum(others) / max(len(others), 1)
    return result


@BOTH
@pytest.mark.parametrize("N, n_groups", [(1, 2), (2, 2), (4, 2), (4, 4), (6, 3)])
def test_groups_are_the_best_of_all_ways_to_label_the_tasks(N, n_groups, method):
    for seed in range(6):
        similarity = symmetric(N, seed)
        groups = method.group_tasks(similarity, n_groups)
        assert sorted(sum(groups, [])) == list(range(N)) and 1 <= len(groups) <= n_groups
        label = [next(g for g, group in enumerate(groups) if i in group) for i in range(N)]
        every = itertools.product(range(n_groups), repeat=N)
        best = max(total(similarity, labels) for labels in every)
        assert total(similarity, label) == pytest.approx(best, abs=1e-6)
        assert all(groups)


@BOTH
def test_two_blocks_of_tasks_are_also_found_by_the_greedy_search(method):
    for N in (4, 24):
        side = torch.arange(N) % 2
        similarity = torch.where(side[:, None] == side[None], 1.0, -0.5)
        assert method.group_tasks(similarity, 2) == [list(range(0, N, 2)), list(range(1, N, 2))]


def test_twenty_four_tasks_get_a_valid_partition_the_same_in_both_files():
    for n_groups in (1, 2, 5, 24):
        groups = mmap.group_tasks(symmetric(24, 1), n_groups)
        assert sorted(sum(groups, [])) == list(range(24)) and 1 <= len(groups) <= n_groups
        assert groups == hipro.group_tasks(symmetric(24, 1), n_groups)


def test_groupings():
    def choose(seed=3, **changes):
        return mmap.choose_groups(settings(seeds=(seed,), **changes), 5, torch.eye(5))

    assert choose(grouping="all") == [[0, 1, 2, 3, 4]] and choose(grouping="none") == []
    random = choose(grouping="random")
    assert sorted(map(len, random)) == [2, 3]
    assert sorted(sum(random, [])) == [0, 1, 2, 3, 4]
    assert random == choose(grouping="random")
    assert len({str(choose(seed, grouping="random")) for seed in range(9)}) > 2
    assert len(choose(grouping="random", groups=3)) == 3


def task_losses(model, tasks, batch, text_prompts, image_prompts):
    """Every task's cross-entropy from separate encoder passes; prompts [K, n, d] per task."""
    losses, (images, labels, task) = [], batch
    for t, (one, text, image) in enumerate(zip(tasks, text_prompts, image_prompts)):
        w = common.encode_text(model, common.tokenize(one.class_names, text.shape[1]), text)
        x = common.encode_image(model, images[task == t], image)
        scores = common.logits(model, x, w)
        losses.append(torch.nn.functional.cross_entropy(scores, labels[task == t]))
    return losses


def test_the_first_phase_averages_the_snapshots_and_descends_on_the_sum(small):
    """Half of three epochs, rounded up, of one step each, computed by hand task by task."""
    args, tasks, run = settings(epochs=3), small_tasks("a", "b"), Phases()
    tasks[1].class_names = ["tree", "house", "very long name"]
    measured = mmap.measure_similarity(args, small, tasks, run)
    Phases().seed_phase("grouping")
    P_glb = mmap.MmAP(4, 64, 64, 3)
    snapshots, velocity = [], [0, 0, 0]
    for epoch, rate in enumerate([0.1, 0.05]):
        common.seed_everything("test", "grouping", epoch)
        [batch] = common.batches(args, small, tasks)
        prompts = [P_glb.text_prompts()] * 2, [P_glb.image_prompts()] * 2
        grads = []
        for loss in task_losses(small, tasks, batch, *prompts):
            grads.append(torch.autograd.grad(loss, list(P_glb.parameters()), retain_graph=True))
        flat = [torch.cat([part.flatten() for part in one]) for one in grads]
        snapshots.append(torch.tensor([[(a * b).sum() for b in flat] for a in flat]))
        descent = [a + b + 5e-4 * p.detach() for a, b, p in zip(*grads, P_glb.parameters())]
        velocity = [0.9 * v + d for v, d in zip(velocity, descent)]
        for p, v in zip(P_glb.parameters(), velocity):
            p.data -= rate * v
    assert torch.allclose(measured, sum(snapshots) / 2, rtol=1e-3, atol=1e-5)
    assert (measured[0, 0] - measured[1, 1]).abs() > 1e-4
    for p, expected in zip(run.parts["grouping"]["P_glb"].parameters(), P_glb.parameters()):
        assert torch.allclose(p, expected, rtol=1e-4, atol=1e-5)


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
        assert measured[i, j].item() == pytest.approx(sum(both) / max(len(both), 1), rel=1e-5)
    absent = [[not there for there in step] for step in seen]
    assert [row["losses"].isnan().tolist() for row in run.logged] == absent


def test_no_ablation_changes_the_groups(small):
    """The first phase has its own seed, so the similarity is bitwise the same."""
    found = []
    for changes in ({}, dict(specific=False), dict(prompt="mlp")):
        common.seed_everything("elsewhere", len(found))
        args = settings(grouping="gradient", epochs=2, **changes)
        prompts = mmap.train(args, small, small_tasks("a", "b", "c"), Phases())
        assert prompts.similarity.any()
        found.append((prompts.similarity.tolist(), prompts.groups()))
    assert found[0] == found[1] == found[2]


# --------------------------------------------------------------------- Eq. (9), (10), (11), (12)

def test_group_and_task_prompts_stand_side_by_side_in_every_layer(small):
    prompts = mmap.build(settings(), small, small_tasks("a", "b", "c"))
    prompts.set_groups([[0, 2], [1]])
    all_of_them = (*prompts.shared, *prompts.specific)
    assert len({str(one.P_s) for one in all_of_them}) == 5      # each has its own start
    randomised(prompts)
    text, image = prompts.text_prompts(), prompts.image_prompts()
    for task, group in [(0, 0), (1, 1), (2, 0)]:
        P_G, P_T = prompts.shared[group], prompts.specific[task]
        assert torch.equal(text[:, task, :4], P_G.text_prompts())
        assert torch.equal(text[:, task, 4:], P_T.text_prompts())
        assert torch.equal(image[:, task, :4], P_G.image_prompts())
        assert torch.equal(image[:, task, 4:], P_T.image_prompts())
    assert prompts.groups() == [[0, 2], [1]] and prompts.sets() == [0, 1, 2]
    assert count(prompts) == 5 * 3 * (4 * 32 + 2 + 2)


def test_without_specific_prompts_a_group_has_one_set_of_texts(small):
    """Tasks 0 and 2 with the same class names are encoded once; images have the group's prompts."""
    tasks = small_tasks("a", "b", "c")
    prompts = mmap.build(settings(specific=False), small, tasks)
    prompts.set_groups([[0, 2], [1]])
    randomised(prompts)
    first, second = prompts.shared
    text, image = prompts.text_prompts(), prompts.image_prompts()
    assert torch.equal(text, torch.stack([first.text_prompts(), second.text_prompts()], 1))
    by_task = [one.image_prompts() for one in (first, second, first)]
    assert prompts.sets() == [0, 1, 0] and torch.equal(image, torch.stack(by_task, 1))
    assert common.Texts(tasks, 4, prompts.sets()).sets.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("specific", [True, False])
def test_one_step_with_all_tasks_batched_equals_one_step_task_by_task(small, specific):
    """Eq. (11)-(12): a group's MmAP gets the sum of its tasks' gradients, a task's MmAP only its
    own. The first two tasks share class names, the third does not."""
    tasks, args = small_tasks("a", "b", "c"), settings(batch_size=2, specific=specific)
    tasks[2].class_names = ["tree", "house", "very long name"]
    common.seed_everything(1)
    images, labels, task = next(common.batches(args, small, tasks))
    prompts = mmap.build(args, small, tasks)
    prompts.set_groups([[0, 2], [1]])
    randomised(prompts)
    texts = common.Texts(tasks, 4 + 4 * specific, prompts.sets())
    x = common.encode_image(small, images, prompts.image_prompts(), task)
    w = common.encode_text(small, texts.tokens, prompts.text_prompts(), texts.sets)
    common.task_losses(small, x, w, labels, task, texts).sum().backward()
    together, by_task = [p.grad.clone() for p in prompts.parameters()], []
    for t in range(3):
        alone = images[task == t], labels[task == t], torch.zeros(2, dtype=torch.long)
        text = prompts.text_prompts()[:, prompts.sets()[t]]
        [loss] = task_losses(small, [tasks[t]], alone, [text], [prompts.image_prompts()[:, t]])
        by_task.append(torch.autograd.grad(loss, list(prompts.parameters()), allow_unused=True,
                                           materialize_grads=True))
    for (name, _), g, *own in zip(prompts.named_parameters(), together, *by_task):
        kind, number = name.split(".")[:2]
        members = prompts.groups()[int(number)] if kind == "shared" else [int(number)]
        expected = sum(own[t] for t in members)
        assert (g - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        assert all(own[t].any() == (t in members) for t in range(3))


@pytest.mark.parametrize("changes", [dict(grouping="none"), dict(prompt="joint"),
                                     dict(prompt="mlp")], ids=str)
def test_an_ablation_trains(small, changes):
    run, args = Phases(), settings(epochs=15, lr=0.02, **changes)
    mmap.train(args, small, small_tasks("a", "b"), run)
    assert run.logged[-1]["loss"] < 0.8 * run.logged[0]["loss"]


def test_with_one_task_a_line_says_that_there_is_nothing_to_group(small, capsys):
    prompts = mmap.train(settings(grouping="gradient"), small, small_tasks("a"), Phases())
    assert "one task: there is nothing to group" in capsys.readouterr().out
    assert prompts.groups() == [[0]]


# ------------------------------------------------------ the name that the standard library also has

def in_the_folder(*words, **more):
    """The output of a Python process in this folder."""
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env=dict(os.environ, CUDA_VISIBLE_DEVICES="", **more))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_numpy_and_the_standard_mmap_import_from_this_folder():
    """The standard module is imported before torch here, and after it in every script."""
    standard = "import mmap; from mmap import ACCESS_READ; print(mmap.mmap(-1, 1)[0], ACCESS_READ)"
    method = "import numpy, torch, common; print(common.load_method('mmap').similarity.__module__)"
    assert in_the_folder("-c", f"{standard}; {method}") == "0 1\nmethod_mmap\n"


def test_torch_imports_where_two_copies_of_the_folder_are_on_the_path(tmp_path):
    """Each copy passes over the other, too, on its way to the standard module."""
    shutil.copy(ROOT / "mmap.py", tmp_path)
    code = "import torch, mmap; print(mmap.mmap(-1, 1)[0])"
    assert in_the_folder("-c", code, PYTHONPATH=str(tmp_path)) == "0\n"


@pytest.mark.parametrize("start", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_worker_processes_start_from_this_folder(start, tmp_path):
    """A script that runs like `mmap.py`, whose workers import everything again."""
    (tmp_path / "loader.py").write_text(f"""
import runpy, sys, torch, multiprocessing
if __name__ == "__main__":
    multiprocessing.set_start_method({start!r})
    loader = torch.utils.data.DataLoader(list(range(6)), batch_size=2, num_workers=2)
    import mmap
    print(sorted(x for batch in loader for x in batch.tolist()), mmap.mmap(-1, 1)[0])
""")
    printed = in_the_folder(tmp_path / "loader.py", PYTHONPATH=str(ROOT))
    assert printed == "[0, 1, 2, 3, 4, 5] 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_mmap_itself_reads_images_with_workers(start, tmp_path):
    """mmap.py as the main program; with more than 400 image files it starts workers by itself."""
    folders = [f"{domain}/{name}" for domain in ("drawn", "painted") for name in ("cup", "hat")]
    data = make_tree(tmp_path / "shapes", dict.fromkeys(folders, 120), size=12)
    code = (f"import multiprocessing, runpy, sys; multiprocessing.set_start_method({start!r}); "
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    words = (f"mmap.py --data {data} --split 0.9 --clip tiny --epochs 1 --n-ctx 2 --batch-size 60 "
             f"--grouping all --out {tmp_path}/run")
    in_the_folder("-c", code, *words.split())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["groups"] == [[["drawn", "painted"]]]
