"""Statistics against counts by hand, and compare.py on run folders made for it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread
from pandas import DataFrame
from sklearn.metrics import average_precision_score

import compare
from audio_dendrites.errors import UserError
from audio_dendrites.results.statistics import (
    average_precision_interval,
    bootstrap_interval,
    error_reduction,
    mcnemar_exact,
)


def test_error_reduction_is_the_share_of_errors_that_went():
    assert error_reduction(0.90, 0.92) == pytest.approx(20)
    assert error_reduction(0.90, 0.85) == pytest.approx(-50)
    assert error_reduction(1.0, 0.9) is None


def test_mcnemar_is_a_fair_coin_over_the_clips_on_which_the_two_differ():
    # 6 clips: both right, both wrong, 1 the baseline's, 3 the other's. P(at most 1 of 4) twice: 2 · (1 + 4) / 16.
    baseline, other = [1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 1]
    assert mcnemar_exact(baseline, other) == (1, 3, pytest.approx(10 / 16))
    # 0 of 6: 2 / 2^6.
    assert mcnemar_exact([0] * 6, [1] * 6) == (0, 6, pytest.approx(2 / 64))
    assert mcnemar_exact([1, 0], [1, 0]) == (0, 0, 1.0)


def test_of_several_runs_the_larger_share_has_the_clip():
    assert mcnemar_exact([1 / 3, 2 / 3, 1], [2 / 3, 1 / 3, 1])[:2] == (1, 1)


def test_statistics_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="wanted the same clips"):
        mcnemar_exact([1, 0], [1])
    with pytest.raises(ValueError, match="found 3 groups for 2 clips"):
        bootstrap_interval([1, 0], [1, 1], np.arange(3))
    scores = np.zeros((1, 2, 3))
    with pytest.raises(ValueError, match=r"scores \(2, 3\) and \(1, 3\) for references \(2, 3\), wanted the same"):
        average_precision_interval(scores, scores[:, :1], np.ones((2, 3)), np.arange(2))
    with pytest.raises(ValueError, match="at least one that occurs"):
        average_precision_interval(scores, scores, np.zeros((2, 3)), np.arange(2))
    with pytest.raises(ValueError, match="found 3 groups for 2 clips"):
        average_precision_interval(scores, scores, np.ones((2, 3)), np.arange(3))


def test_the_bootstrap_draws_recordings_not_clips():
    # Two recordings, one all won, one all lost: a draw has twice the one, one of each, or twice the other.
    baseline, other = np.repeat([0, 1], 50), np.repeat([1, 0], 50)
    assert bootstrap_interval(baseline, other, np.repeat([0, 1], 50)) == (-1, 1)
    low, high = bootstrap_interval(baseline, other, np.arange(100))
    assert -0.25 < low < -0.15 and 0.15 < high < 0.25  # 1.96 / √100


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_recordings():
    random = np.random.default_rng(0)
    baseline, other = random.random(2000) < 0.8, random.random(2000) < 0.83
    difference = other.astype(float) - baseline
    low, high = bootstrap_interval(baseline, other, np.arange(2000))
    half = 1.96 * difference.std() / np.sqrt(2000)
    assert low == pytest.approx(difference.mean() - half, abs=0.003)
    assert high == pytest.approx(difference.mean() + half, abs=0.003)
    assert bootstrap_interval(baseline, baseline, np.arange(2000)) == (0, 0)
    assert bootstrap_interval(baseline, other, np.arange(2000), seed=0) == (low, high)


def test_the_bootstrap_of_average_precision_by_hand():
    # One class, recordings a and b of a positive and a negative clip each. The other side ranks all rightly. Of the
    # baseline's draws aa has average precision 1, ab (1 + 2/3) / 2, and bb, positives below as many negatives, 1/2.
    references, groups = np.array([[1], [0], [1], [0]]), ["a", "a", "b", "b"]
    baseline, other = np.array([[[4.0], [1], [2], [3]]]), np.array([[[4.0], [1], [3], [2]]])
    assert average_precision_interval(baseline, other, references, groups) == (0, 0.5)
    assert average_precision_interval(other, baseline, references, groups) == (-0.5, 0)
    middle = average_precision_interval(baseline, other, references, groups, level=0.4)
    assert middle == pytest.approx((1 / 6, 1 / 6))
    # A third recording has no clip of the class: draws of it alone are left out.
    references, groups = np.vstack([references, [[0]]]), [*groups, "c"]
    baseline, other = (np.concatenate([side, [[[0.0]]]], axis=1) for side in (baseline, other))
    assert average_precision_interval(baseline, other, references, groups) == (0, 0.5)


@pytest.mark.parametrize("seeds", [(1, 1), (2, 3)])
def test_the_bootstrap_of_average_precision_is_that_of_scikit_learn_in_a_loop(seeds):
    random, clips, draws = np.random.default_rng(3), 40, 150
    references = random.random((clips, 4)) < [0.4, 0.2, 0.05, 0]  # one rare, one that does not occur
    groups, fold = random.integers(12, size=clips), np.arange(clips) % 2
    sides = []
    for count in seeds:
        scores = np.round(random.standard_normal((count, clips, 4)) + references, 1)  # some are equal
        sides.append(np.concatenate([np.where((fold == one)[:, None], scores, np.nan) for one in (0, 1)]))

    def score(run, rows):
        rows = rows[~np.isnan(run[rows, 0])]
        found = [label for label in range(4) if references[rows, label].any()]
        precisions = [average_precision_score(references[rows, label], run[rows, label]) for label in found]
        return np.mean(precisions) if precisions else np.nan

    names, differences = np.unique(groups), []
    for picked in np.random.default_rng(5).integers(len(names), size=(draws, len(names))):
        rows = np.concatenate([np.flatnonzero(groups == names[number]) for number in picked])
        before, after = (np.nanmean([score(run, rows) for run in side]) for side in sides)
        differences.append(after - before)
    found = average_precision_interval(*sides, references, groups, draws=draws, seed=5)
    assert found == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=1e-9) and found[0] < found[1]


def write_run(folder, wrong, clips=range(40), parameters=1000, seconds=10.0, **fields):
    """A run folder in which the classifier is wrong on the clips `wrong`; two clips a recording."""
    labels = ["cat" if clip % 3 else "dog" for clip in clips]
    swap = {"cat": "dog", "dog": "cat"}
    predicted = [swap[label] if clip in wrong else label for clip, label in zip(clips, labels, strict=True)]
    folder.mkdir(parents=True)
    DataFrame(
        {
            "clip": [f"c{clip:02}" for clip in clips], "fold": "1", "group": [str(clip // 2) for clip in clips],
            "label": labels, "predicted": predicted, "logits": [[0.0, 1.0]] * len(labels),
        }
    ).to_parquet(folder / "predictions.parquet", index=False)  # fmt: skip
    accuracy = np.mean([label == guess for label, guess in zip(labels, predicted, strict=True)])
    metrics = {
        "dataset": "animals", "labels": ["cat", "dog"], "test": {"accuracy": accuracy}, "parameters": parameters,
        "steps": 20, "train_steps_per_second": 20 / seconds,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics | fields))
    return folder


def run(*arguments):
    compare.main([str(argument) for argument in arguments])


def test_two_runs_leave_a_table_a_page_and_a_picture(tmp_path, capsys):
    baseline = write_run(tmp_path / "base", wrong=range(0, 24))
    dendritic = write_run(tmp_path / "dend", wrong=range(0, 6), parameters=1055, seconds=15.0)
    run(baseline, dendritic, "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    for row in (
        "| accuracy                 | 0.4000     | 0.8500    | +45.00 points",
        "| errors a run             | 24.0 of 40 | 6.0 of 40 | 75.0 % error reduction",
        "| clips it alone has right | 0          | 18        | McNemar's exact p = 7.6e-06",
        "| parameters               | 1,000      | 1,055     | +5.50 %",
        "| seconds a step           | 0.5000     | 0.7500    | × 1.500",
    ):
        assert row in printed
    assert "Dendrites raise the accuracy: +45.00 points of accuracy (95 % interval +2" in printed
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "40 test clips of 20 source recordings" in page and str(dendritic) in page
    assert all(line in page for line in printed.splitlines() if line.startswith("|"))
    picture = imread(tmp_path / "out" / "comparison.png")
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05


def test_the_numbers_lie_in_both_run_folders_for_their_cards(tmp_path):
    baseline, dendritic = write_run(tmp_path / "base", wrong=range(24)), write_run(tmp_path / "dend", wrong=range(6))
    run(baseline, dendritic)
    found = json.loads((dendritic / "comparison.json").read_text())
    assert found == json.loads((baseline / "comparison.json").read_text())
    assert found["baseline"]["accuracy"] == 0.4 and found["dendritic"]["runs"] == ["dend"]
    assert found["error_reduction_percent"] == pytest.approx(75) and found["significant"] is True
    assert found["verdict"].startswith("Dendrites raise the accuracy")


def test_unequal_trainings_are_part_of_the_verdict(tmp_path, capsys):
    run(write_run(tmp_path / "base", wrong={1}), write_run(tmp_path / "dend", wrong={2}, steps=30))
    assert "Not the same training: the baseline took 20 steps, the dendritic model 30." in capsys.readouterr().out


def test_a_run_that_took_no_step_since_it_was_resumed_has_no_step_time(tmp_path, capsys):
    run(write_run(tmp_path / "base", wrong={1}), write_run(tmp_path / "dend", wrong={2}, train_steps_per_second=0))
    assert "seconds a step" not in capsys.readouterr().out
    assert json.loads((tmp_path / "dend" / "comparison.json").read_text())["step_time_ratio"] is None


def test_a_difference_that_is_not_significant_is_called_so(tmp_path, capsys):
    run(write_run(tmp_path / "base", wrong={1, 5, 9, 30}), write_run(tmp_path / "dend", wrong={1, 5, 12}))
    assert "The difference is not significant: +2.50 points" in capsys.readouterr().out
    assert (tmp_path / "dend" / "comparison.md").exists()  # the default folder


def test_many_clips_of_few_recordings_are_not_significant(tmp_path, capsys):
    # 8 clips won and none lost, but in 4 clips of each of 2 recordings … of which the bootstrap sees only 3.
    groups = DataFrame({"group": ["a"] * 4 + ["b"] * 4 + ["c"] * 32})
    sides = [write_run(tmp_path / "base", wrong=range(8)), write_run(tmp_path / "dend", wrong=())]
    for folder in sides:
        table = compare.pandas.read_parquet(folder / "predictions.parquet")
        table.assign(group=groups["group"]).to_parquet(folder / "predictions.parquet", index=False)
    run(*sides)
    assert "not significant, McNemar's test says otherwise but the interval does not" in capsys.readouterr().out


def test_dendrites_that_harm_are_said_to(tmp_path, capsys):
    run(write_run(tmp_path / "base", wrong=()), write_run(tmp_path / "dend", wrong=range(0, 24)))
    printed = capsys.readouterr().out
    assert "Dendrites lower the accuracy: -60.00 points" in printed and "no errors to reduce" in printed


def test_sets_of_runs_pool_seeds_and_folds(tmp_path, capsys):
    folds = [range(0, 20), range(20, 40)]
    sides = {"--baseline": {0, 1, 21}, "--dendritic": {1}}
    arguments = []
    for side, wrong in sides.items():
        arguments.append(side)
        for seed in (0, 1):
            for fold in folds:
                arguments.append(write_run(tmp_path / f"{side}-{seed}-{fold.start}", wrong=wrong, clips=fold))
    run(*arguments, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert "| runs                     | 4                | 4" in printed
    assert "| accuracy of the runs     | 0.9000 to 0.9500 | 0.9500 to 1.0000 |" in printed
    assert "| clips it alone has right | 0                | 2 " in printed  # clips, not clips times seeds


@pytest.mark.parametrize(
    ("dendritic", "message"),
    [
        ({"dataset": "birds"}, "dataset: .*base was tested on animals, .*dend on birds"),
        ({"labels": ["dog", "cat"]}, "labels: .*base was tested on"),
        ({"clips": range(38)}, r"dend did not test 2 clips \(c38, c39\)"),
        ({"clips": range(45)}, r"base did not test 5 clips \(c40, c41, c42, …\)"),
    ],
)
def test_runs_that_cannot_be_compared_say_why(tmp_path, dendritic, message):
    write_run(tmp_path / "base", wrong=())
    write_run(tmp_path / "dend", wrong=(), **dendritic)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "base", tmp_path / "dend")
    assert not (tmp_path / "dend" / "comparison.md").exists()


def test_a_folder_that_is_no_finished_run_says_so(tmp_path):
    base = write_run(tmp_path / "base", wrong=())
    for missing in ("metrics.json", "predictions.parquet"):
        broken = write_run(tmp_path / missing, wrong=())
        (broken / missing).unlink()
        with pytest.raises(UserError, match=f"has no {missing}: it is no run folder, or its run has not finished"):
            run(base, broken)
    old = write_run(tmp_path / "old", wrong=())
    table = compare.pandas.read_parquet(old / "predictions.parquet")
    table.drop(columns="group").to_parquet(old / "predictions.parquet")
    with pytest.raises(UserError, match="old/predictions.parquet has no column 'group'.*train again"):
        run(base, old)


def test_runs_of_one_side_that_do_not_fit_together_say_why(tmp_path):
    one = write_run(tmp_path / "one", wrong=())
    two = write_run(tmp_path / "two", wrong=(), clips=range(20))
    with pytest.raises(UserError, match="as many runs for every clip, but most have 2 and 1 tested 20 clips"):
        run("--baseline", one, two, "--dendritic", one)


def test_the_command_line_is_checked(capsys):
    for arguments in ([], ["one"], ["--baseline", "one"], ["one", "two", "--baseline", "three"]):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert "wanted two run folders, BASELINE DENDRITIC, or both" in capsys.readouterr().err
    answer = subprocess.run([sys.executable, ROOT / "compare.py", "one", "two"], capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.startswith("error: one has no metrics.json")
