"""Statistics against SciPy, scikit-learn and counts by hand, and compare.py on run folders made for it."""

import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pandas
import pytest
from conftest import ROOT, write_run
from matplotlib.image import imread
from scipy import stats
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from audio_dendrites.errors import UserError
from audio_dendrites.results import statistics
from audio_dendrites.results.comparison import write_comparison
from audio_dendrites.results.statistics import Difference, Runs, difference, error_reduction, holm, mcnemar_exact
from benchmarks.false_alarms import rates
from compare import main


def test_small_statistics_by_hand():
    assert error_reduction(0.90, 0.92) == pytest.approx(20) and error_reduction(0.90, 0.85) == pytest.approx(-50)
    assert error_reduction(1.0, 0.9) is None
    # Of 6 clips, 1 is right only for the reference, 3 only for the other. P(at most 1 of 4) twice: 2 · (1 + 4) / 16.
    reference, other = np.array([1, 0, 1, 0, 0, 0], bool), np.array([1, 0, 0, 1, 1, 1], bool)
    assert mcnemar_exact(reference, other) == (1, 3, pytest.approx(10 / 16))
    assert mcnemar_exact(other, other) == (0, 0, 1.0)
    # Holm: 0.01 · 3 and 0.03 · 2; 0.04 · 1 is raised to the one before it.
    p, levels = zip(*holm([0.01, 0.04, 0.03]), strict=True)
    assert p == pytest.approx([0.03, 0.06, 0.06]) and levels == pytest.approx([1 - 0.05 / 3, 1 - 0.05 / 1.5, 0.975])
    assert holm([0.7, 0.04])[0][0] == 0.7 and holm([0.2]) == [(0.2, pytest.approx(0.95))]
    for value in (0.02, 0.04, 0.06):
        one = Difference(value, [(1e-4, 3), (3e-4, 50)], None)
        corrected, level = holm([one.p, 0.012])[0]
        assert (one.interval(level)[0] > 0) == (corrected < 0.05)


def multi_class(clips=60, classes=4, seed=0):
    """Scores, some of them equal, and references of clips of a class each."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=clips)
    return np.round(random.standard_normal((clips, classes)) + np.eye(classes)[labels], 1), np.eye(classes)[labels]


@pytest.mark.parametrize(
    ("name", "theirs", "error"),
    [
        ("accuracy", lambda truth, scores: accuracy_score(truth.argmax(1), scores.argmax(1)), 1e-12),
        ("macro_f1", lambda truth, scores: f1_score(truth.argmax(1), scores.argmax(1), average="macro"), 1e-12),
        ("mAP", lambda truth, scores: average_precision_score(truth, scores), 2e-3),
    ],
)
def test_scores_with_and_without_each_recording_are_those_of_scikit_learn(name, theirs, error):
    scores, truth = multi_class(200)
    recordings = np.random.default_rng(4).integers(40, size=200)
    value, effects = statistics.SCORES[name](scores, truth, recordings, 42)
    assert value == pytest.approx(theirs(truth, scores)) and effects[40:].tolist() == [0, 0]  # no clips of theirs
    for recording in range(40):
        kept = recordings != recording
        assert effects[recording] == pytest.approx(value - theirs(truth[kept], scores[kept]), abs=error)


def test_a_class_of_one_recording_is_gone_without_it():
    # Clip 1 takes class 0 before clip 0: accuracy 2/3, then 1/2. Both F1 are 2/3, then 0 and 2/3. The average
    # precisions are 1/2 and 1, then 1.
    scores, truth = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, 2.0]]), np.array([[1, 0], [0, 1], [0, 1]])
    found = [score(scores, truth, np.arange(3), 3) for score in statistics.SCORES.values()]
    assert [value for value, _ in found] == pytest.approx([2 / 3, 2 / 3, 3 / 4])
    assert [effects[0] for _, effects in found] == pytest.approx([1 / 6, 1 / 3, -1 / 4])


def runs_of(scores, effects=None, folds=None, seeds=None):
    runs = len(scores)
    effects = np.zeros((50, runs)) if effects is None else np.asarray(effects, float)
    return Runs(np.asarray(scores, float), effects, folds or ["1"] * runs, seeds or list(range(runs)))


@pytest.mark.parametrize("name", ["accuracy", "mAP"])
def test_for_two_models_the_interval_is_that_of_a_bootstrap_of_recordings(name):
    (first, truth), (second, _) = multi_class(400, seed=1), multi_class(400, seed=2)
    second = np.round(second - truth + 2 * truth, 1) + 0.5 * first
    recording = np.repeat(np.arange(100), 4)
    score = statistics.SCORES[name]
    sides = []
    for scores in (first, second):
        value, effects = score(scores, truth, recording, 100)
        sides.append(runs_of([value], effects[:, None]))
    found = difference(*sides)

    def resampled(recordings):
        rows = (4 * recordings[:, None] + np.arange(4)).ravel()
        return np.subtract(*(score(scores[rows], truth[rows], recording[rows], 100)[0] for scores in (second, first)))

    theirs = stats.bootstrap(
        (np.arange(100),), resampled, n_resamples=1500, vectorized=False, method="percentile", rng=0
    )
    assert found.interval() == pytest.approx(theirs.confidence_interval, abs=0.006) and not found.over_runs
    assert found.value == pytest.approx(sides[1].scores[0] - sides[0].scores[0]) and found.effect_size is None
    assert found.interval(1 - found.p)[0] == pytest.approx(0, abs=1e-9) and found.p < 0.05


def test_runs_alone_are_compared_by_students_t():
    first, second, folds = [0.70, 0.74, 0.69], [0.75, 0.77, 0.78], ["1", "2", "3"]
    for reference, other, theirs in (
        (runs_of(first), runs_of(second[::-1], seeds=[2, 1, 0]), stats.ttest_rel(second, first)),
        (runs_of(first), runs_of(second, seeds=[7, 8, 9]), stats.ttest_ind(second, first, equal_var=False)),
        (runs_of(first), runs_of([*second, 0.71]), stats.ttest_ind([*second, 0.71], first, equal_var=False)),
        (runs_of(first, folds=folds), runs_of(second, folds=folds, seeds=[7, 8, 9]), stats.ttest_rel(second, first)),
    ):
        found = difference(reference, other)
        assert found.p == pytest.approx(theirs.pvalue) and found.over_runs
        assert found.interval() == pytest.approx(theirs.confidence_interval())
    # Two folds, of two seeds each: what lies between folds is not scatter. By hand: each fold of a side has a variance
    # of 0.02² / 2, and a side has four runs and two degrees of freedom.
    scores, folds = np.array([0.5, 0.52, 0.8, 0.82]), list("1122")
    sides = runs_of(scores, folds=folds, seeds=[0, 1, 0, 1]), runs_of(scores + 0.03, folds=folds, seeds=[2, 3, 2, 3])
    assert difference(*sides).parts[0] == pytest.approx((2 * 0.0002 / 4, 4))
    assert difference(runs_of([0.5]), runs_of([0.6, 0.8])).over_runs is False


def test_what_recordings_move_in_all_runs_alike_is_added_to_the_scatter_of_runs():
    # Two pairs of runs, three recordings. By hand: the differences are 0.1 and 0.3, their variance 0.02, of the mean
    # 0.01. Recordings have the effects (a, -a, 0) and (b, 0, -b) on them.
    a, b = 0.06, 0.03
    reference, other = runs_of([0.5, 0.5], np.zeros((3, 2))), runs_of([0.6, 0.8], [[a, b], [-a, 0], [0, -b]])
    both = 2 / 3 * ((a + b) ** 2 + a**2 + b**2) / 4
    apart = 2 / 3 * ((a - b) ** 2 + a**2 + b**2) / 4
    found = difference(reference, other)
    assert found.parts == [pytest.approx((0.01, 1)), pytest.approx((both - apart, 2))]
    assert found.effect_size == pytest.approx(0.2 / 0.02**0.5 * (1 - 3 / (4 * 1 - 1)))
    half = np.sqrt(0.01 * stats.t.ppf(0.9, 1) ** 2 + (both - apart) * stats.t.ppf(0.9, 2) ** 2)
    assert found.interval(0.8) == pytest.approx((0.2 - half, 0.2 + half))
    opposite = runs_of([0.6, 0.8], [[a, -a], [-a, a], [0, 0]])
    assert difference(reference, opposite).parts[1][0] == 0  # nothing is moved alike


def test_seeds_do_not_make_false_alarms():
    options = Namespace(comparisons=100, score="accuracy")
    bootstrap, hierarchical, *alarms, _, _ = map(float, rates(np.random.default_rng(0), 0.06, 1, 3, options)[3:])
    assert bootstrap > 30 and hierarchical > 8 and max(alarms) < 8


def animals(folder, wrong, clips=range(40), labels=("cat", "dog"), seed=None, **fields):
    """A run folder in which the classifier is wrong on the clips `wrong`; two clips for each recording."""
    truth = [0 if clip % 3 else 1 for clip in clips]
    logits = [np.eye(2)[label ^ (clip in wrong)] * 2 for clip, label in zip(clips, truth, strict=True)]
    folder = write_run(folder, labels, clips, [("cat", "dog")[label] for label in truth], logits, **fields)
    if seed is not None:
        (folder / "config.yaml").write_text(f"seed: {seed}\nloss: auto\n")
    return folder


def compare(*arguments):
    main([str(argument) for argument in arguments])


def compared(folder):
    """The sides of comparison.json."""
    return json.loads((folder / "comparison.json").read_text())["sides"]


def test_two_runs_leave_tables_a_page_a_figure_and_the_numbers_for_their_cards(tmp_path, capsys):
    baseline = animals(tmp_path / "base", wrong=range(0, 24), multiply_adds=2000)
    dendritic = animals(
        tmp_path / "dend", wrong=range(0, 6), parameters=1055, multiply_adds=3000, train_steps_per_second=1.6
    )
    compare(baseline, dendritic, "--output", tmp_path / "out")
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text()
    for row in (
        "| side      | runs | accuracy | macro_f1 | mAP    | steps | parameters      | multiply adds   | sec",
        "| baseline  | 1    | 0.4000   |",
        "| 20    | 1,055 (× 1.055) | 3,000 (× 1.500) | 0.6250 (× 1.250) |",
        "| dendritic        | accuracy | +45.00 | +2",
        "| 75.0 %",
    ):
        assert row in printed and row in page
    assert "`dendritic` is better than `baseline` by 45.00 points of accuracy (95 % interval +2" in printed
    assert "over recordings, p = " in printed and "Other seeds may give another difference." in printed
    assert "40 test clips of 20 source recordings" in page and str(dendritic) in page
    assert "Only `baseline` has 0 clips right, only `dendritic` has 18: McNemar's exact p = 7.6e-06" in page
    picture = imread(tmp_path / "out" / "comparison.png")
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05
    assert compared(dendritic) == compared(baseline) == compared(tmp_path / "out")
    assert compared(dendritic)[0]["accuracy"]["mean"] == 0.4 and compared(dendritic)[1]["runs"] == ["dend"]
    assert compared(dendritic)[1]["error_reduction_percent"] == pytest.approx(75)


def used(lost):
    return {"dendrites": {"use": {"metric": "accuracy", "lost": lost, "used": lost >= 0.01}}}


def test_any_number_of_sides_is_compared_with_the_first(tmp_path, capsys):
    wrong = {
        "plain": [range(0, 16), range(1, 17), range(0, 18)],
        "wide": [range(1, 17), range(0, 16), range(2, 19)],
        "dendrites": [range(0, 4), range(0, 5), range(2, 5)],
    }
    uses = [{"plain": {}, "wide": {}, "dendrites": used(lost)} for lost in (0.2, 0.0, 0.1)]
    sides = {
        name: [
            animals(tmp_path / f"{name}-{seed}", one, seed=seed, parameters=1000 + 10 * seed, **uses[seed][name])
            for seed, one in enumerate(runs)
        ]
        for name, runs in wrong.items()
    }
    compare(*(word for name, runs in sides.items() for word in ("--side", name, *runs)), "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    plain, wide, dendrites = compared(tmp_path / "out")
    assert "`dendrites` is better than `plain` by 31.67 points of accuracy (95 % interval +" in printed
    assert "over runs and recordings" in printed and "corrected for 2 comparisons" in printed
    assert "`wide` is not significantly different from `plain`: +0.83 points of accuracy (95 % interval -" in printed
    assert (
        "The dendrites of `dendrites` are used: 10.0 points of accuracy are lost without their features, on average "
        "over 3 runs (2 of them use their dendrites)."
    ) in printed
    assert plain["accuracy"] == {"mean": pytest.approx(0.5833, abs=1e-4), "deviation": pytest.approx(0.0289, abs=1e-4)}
    assert plain["seeds"] == [0, 1, 2] and wide["accuracy"]["p"] > 0.3 and dendrites["accuracy"]["effect_size"] > 3
    rows = pandas.read_csv(tmp_path / "out" / "comparison.csv")
    assert rows["name"].tolist() == list(wrong) and rows["accuracy.mean"][2] == dendrites["accuracy"]["mean"]
    assert rows["parameters"].tolist() == [1010] * 3
    assert {"macro_f1.deviation", "mAP.low", "mAP.effect_size", "error_reduction_percent", "steps"} <= set(rows)
    assert not list(tmp_path.glob("plain-*/comparison.json"))
    compare("--side", "plain", *sides["plain"], "--side", "dendrites", *sides["dendrites"])
    alone = compared(tmp_path / "comparison")[1]["accuracy"]
    assert dendrites["accuracy"]["p"] == pytest.approx(2 * alone["p"])  # the smaller of two p
    assert dendrites["accuracy"]["low"] < alone["low"] and dendrites["accuracy"]["difference"] == alone["difference"]
    compare("--side", "plain", *sides["plain"], "--side", "one", sides["wide"][0])
    one = compared(tmp_path / "comparison")[1]
    assert one["verdict"].endswith("Other seeds may give another difference.") and "mcnemar" not in one


def test_folds_and_seeds_are_put_together(tmp_path, capsys):
    sides = {"plain": {0, 1, 21}, "dendritic": {1}}
    for name, wrong in sides.items():
        runs = [(seed, fold) for seed in (0, 1) for fold in (range(0, 20), range(20, 40))]
        sides[name] = [animals(tmp_path / f"{name}-{seed}-{fold.start}", wrong, fold, seed=seed) for seed, fold in runs]
    write_comparison(sides, tmp_path)
    printed = capsys.readouterr().out
    assert "| plain     | 4    | 0.9250 ± 0.0289 |" in printed and "| dendritic | 4    | 0.9750 ± 0.0289 |" in printed


def test_the_verdict_says_what_qualifies_the_difference(tmp_path, capsys):
    base, slow = animals(tmp_path / "base", {1}), animals(tmp_path / "slow", {2}, steps=30, train_steps_per_second=0)
    compare(base, slow)
    printed = capsys.readouterr().out
    assert "The trainings are not the same: `baseline` took 20 steps, `dendritic` took 30." in printed
    assert "seconds a step" not in printed  # it took none since it was resumed
    compare(animals(tmp_path / "some", {1, 5, 9, 30}), animals(tmp_path / "few", {1, 5, 12}, **used(0.152)))
    printed = capsys.readouterr().out
    assert "`dendritic` is not significantly different from `baseline`: +2.50 points" in printed
    assert "The dendrites of `dendritic` are used: 15.2 points of accuracy are lost without their features." in printed
    assert (tmp_path / "few" / "comparison.md").exists()  # the default folder
    # 8 clips won and none lost, but in 4 clips of each of 2 recordings of 12.
    folders = [animals(tmp_path / "lost", range(8)), animals(tmp_path / "won", ())]
    for folder in folders:
        table = pandas.read_parquet(folder / "predictions.parquet")
        table.assign(group=[f"{row // 4}" for row in range(40)]).to_parquet(folder / "predictions.parquet", index=False)
    compare(*folders)
    assert "is not significantly different" in capsys.readouterr().out
    bad = {
        "plain": [animals(tmp_path / f"plain-{seed}", range(seed)) for seed in (0, 1)],
        "harmed": [animals(tmp_path / f"harmed-{seed}", range(24 + seed)) for seed in (0, 1)],
    }
    write_comparison(bad, tmp_path)
    assert "`plain` is better than `harmed` by 60.00 points of accuracy (95 % interval +" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "birds"}, "dataset: the runs must have the same, got animals in .*base and birds in .*dend"),
        ({"labels": ["dog", "cat"]}, "labels: the runs must have the same"),
        ({"clips": range(38)}, r"dendritic did not test 2 clips \(c38, c39\)"),
        ({"clips": range(45)}, r"baseline did not test 5 clips \(c40, c41, c42, …\)"),
    ],
)
def test_runs_that_cannot_be_compared_say_why(tmp_path, changes, message):
    folders = [animals(tmp_path / "base", ()), animals(tmp_path / "dend", (), **changes)]
    with pytest.raises(UserError, match=message):
        compare(*folders)
    assert not (tmp_path / "dend" / "comparison.md").exists()


def test_sides_that_cannot_be_compared_say_why(tmp_path):
    one, half = animals(tmp_path / "one", ()), animals(tmp_path / "half", (), clips=range(20))
    few = [animals(tmp_path / name, (), clips=range(2)) for name in ("two", "three")]
    old = animals(tmp_path / "old", ())
    table = pandas.read_parquet(old / "predictions.parquet")
    table.drop(columns="group").to_parquet(old / "predictions.parquet")
    for sides, message in (
        ({"a": [one], "b": [one]}, "a run must be given once, got .*one more than once"),
        ({"a": [one, half], "b": [one]}, "a: all clips must have 2 runs, got fewer for 20 clips"),
        (
            {"a": few[:1], "b": few[1:]},
            "two: test clips .* must come from two source recordings or more, got 1",
        ),
        ({"a": [one], "b": [tmp_path]}, "has no metrics.json: it is not a run folder, or its run has not finished"),
        ({"a": [one], "b": [old]}, "old/predictions.parquet must have a column 'group'.*train again"),
    ):
        with pytest.raises(UserError, match=message):
            write_comparison(sides, tmp_path / "out")


def test_the_command_line_is_checked(capsys):
    for line in ("", "one", "--side a one", "one two --side b x", "--side a x --side a y", "--side a --side b x"):
        with pytest.raises(SystemExit):
            compare(*line.split())
        assert "expected two run folders, or --side NAME RUN" in capsys.readouterr().err
    answer = subprocess.run([sys.executable, ROOT / "compare.py", "one", "two"], capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.startswith("error: one has no metrics.json")
