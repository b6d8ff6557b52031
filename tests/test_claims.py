"""The controlled experiments of claims.py: how their tasks are made, and that the claims hold."""
import contextlib
import json
import statistics

import claims
import pytest
import torch


def test_family_b_has_the_drawings_of_a_under_shifted_names():
    tasks = claims.families(1)
    for a, b in zip(tasks[:4], tasks[4:]):
        assert b.name == f"B {a.name[2:]}" and a.train.items == b.train.items
        for label in range(4):
            assert b.class_names[label] == a.class_names[(label + 1) % 4]
        assert set(a.train.labels) == set(a.test.labels) == {0, 1, 2, 3}
        assert not set(map(str, a.train.items)) & set(map(str, a.test.items))


def test_what_two_tasks_share_is_counted_by_name():
    tasks, agree = claims.sharing(1)
    assert agree[0].tolist() == [1, 0.5, 0.5, 0, 1, 0.5, 0.5, 0]


def test_a_shuffled_task_keeps_its_images_and_the_number_of_each_label():
    [task, *_] = claims.styles(1, 4)
    noisy = claims.shuffled(task, 1)
    assert noisy.train.items == task.train.items and noisy.test is task.test
    assert sorted(noisy.train.labels) == sorted(task.train.labels) != noisy.train.labels
    agree = [a == b for a, b in zip(noisy.train.labels, task.train.labels)]
    assert statistics.mean(agree) < 0.6


def test_a_patch_has_the_colour_of_its_class_and_is_only_on_training_images():
    [task, *_] = claims.styles(1, 4)
    patched = claims.patched(task)
    for i in range(len(task.train)):
        (before, label), (after, same) = task.train[i], patched.train[i]
        assert label == same and after.size == before.size
        assert after.getpixel((2, 2)) == [(255, 0, 0), (0, 255, 0), (0, 0, 255),
                                          (255, 255, 0)][label]
        assert after.getpixel((60, 60)) == before.getpixel((60, 60))
    assert patched.test is task.test


def test_spearmans_correlation_by_hand():
    """Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15); ties share their mean rank."""
    x = torch.tensor([1.0, 2.0, 5.0, 9.0])
    assert claims.spearman(x, torch.tensor([3.0, 1.0, 8.0, 7.0])) == pytest.approx(0.6)
    assert claims.spearman(x, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.894, abs=1e-3)


def test_help_is_the_docstring_and_one_seed_has_no_standard_error(capsys, monkeypatch):
    monkeypatch.setitem(claims.CLAIMS, "mmap", lambda seed, model: dict(gain=2.0))
    for words in (["--help"], ["mmap", "--seeds", "1"]):
        monkeypatch.setattr("sys.argv", ["claims.py", *words])
        with contextlib.suppress(SystemExit):
            claims.main()
    told = capsys.readouterr().out
    assert told.startswith(claims.__doc__) and told.endswith("  2.000   (2)\n")


def test_the_figure_has_a_panel_for_every_claim_that_was_measured(tmp_path, monkeypatch):
    """Bars are means and error bars standard errors: 2 ± 1 for the values 1 and 3."""
    plt = claims.common.pyplot()
    monkeypatch.setattr(plt, "close", lambda *figures: None)
    for claim in ("mmap", "jscpt-noise"):
        found = {name: [1.0, 3.0] for name in claims.PANELS[claim][2].values()}
        (tmp_path / f"{claim}.json").write_text(json.dumps(found))
    claims.plot(tmp_path)
    assert (tmp_path / "claims.png").stat().st_size > 1000
    axes = plt.gcf().axes
    assert [axis.get_title().split(":")[0] for axis in axes] == ["MmAP", "JSCPT"]
    assert [len(axis.patches) for axis in axes] == [3, 2]
    assert {bar.get_height() for axis in axes for bar in axis.patches} == {2.0}
    lines = axes[0].collections[0].get_segments()
    assert [(float(low), float(high)) for (_, low), (_, high) in lines] == [(1.0, 3.0)] * 3
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("claim, gains, share", [
    ("mmap", ["gradient - all", "gradient - random"], "groups are families"),
    ("hipro", ["tree - shared+individual", "tree - random"], "top split is families"),
    ("mvlpt", ["rank correlation"], None),
    ("jscpt-noise", ["phi of the others - noisy one"], None)])
def test_a_claim_holds_over_five_seeds(claim, gains, share):
    """Each gain is above 0 by more than two standard errors, and most groups are the families."""
    found = claims.measured(claim, (1, 2, 3, 4, 5))
    for gain in gains:
        assert statistics.mean(found[gain]) > 2 * claims.standard_error(found[gain])
    assert share is None or statistics.mean(found[share]) > 0.7
