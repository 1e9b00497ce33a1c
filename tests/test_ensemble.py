"""ensemble.py on run folders made for it, against means by hand."""

import json
import subprocess
import sys

import numpy as np
import pandas
import pytest
from conftest import ROOT, write_run
from scipy.special import expit, softmax
from sklearn.metrics import average_precision_score

import ensemble
from audio_dendrites.errors import UserError
from audio_dendrites.results.comparison import write_comparison
from audio_dendrites.results.ensemble import mean_logits

LABELS = ["cat", "dog", "owl"]
CLIPS = 30
TRUTH = np.arange(CLIPS) % 3


def noisy_run(folder, seed, order=range(CLIPS), **fields):
    """A run folder whose logits are the truth in noise. Returns its logits by clip."""
    logits = np.random.default_rng(seed).normal(size=(CLIPS, 3)).astype(np.float32)
    logits[np.arange(CLIPS), TRUTH] += 1.5
    rows = np.asarray(order)
    truth = [LABELS[TRUTH[row]] for row in rows]
    write_run(folder, LABELS, rows, truth, logits[rows], **{"parameters": 1000 + seed} | fields)
    return logits


def change(folder, **columns):
    """Replace columns of the predictions of a run."""
    path = folder / "predictions.parquet"
    pandas.read_parquet(path).assign(**columns).to_parquet(path)


def run(*arguments):
    ensemble.main([str(argument) for argument in arguments])


def test_the_mean_of_probabilities_by_hand():
    # Sure of class 0 against twice unsure of class 1: (0.9 + 0.4 + 0.4) / 3 for class 0.
    logits = np.log([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]]) + np.array([7, -3, 0])[:, None, None]
    mean = mean_logits(logits, "cross_entropy")
    assert mean.shape == (1, 2) and mean.dtype == np.float32
    assert softmax(mean) == pytest.approx(np.array([[1.7 / 3, 1.3 / 3]]), abs=1e-6)
    far = mean_logits(np.array([[[2000.0, 0.0]], [[0.0, 2000.0]]]), "cross_entropy")
    assert np.isfinite(far).all() and softmax(far) == pytest.approx(np.array([[0.5, 0.5]]))
    assert np.isfinite(mean_logits(np.array([[[2000.0, -2000.0]], [[2000.0, -1000.0]]]), "bce")).all()


def test_an_ensemble_leaves_a_table_and_a_folder_that_compare_takes(tmp_path, capsys):
    shuffled = np.random.default_rng(9).permutation(CLIPS)
    folders = [tmp_path / f"seed-{seed}" for seed in range(3)]
    logits = [noisy_run(folder, seed, shuffled if seed == 1 else range(CLIPS)) for seed, folder in enumerate(folders)]
    run(*folders)
    mean = np.mean([softmax(one, axis=1) for one in logits], axis=0)
    accuracy, *alone = [(scores.argmax(1) == TRUTH).mean() for scores in (mean, *logits)]
    out = tmp_path / "ensemble"
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [*zip(map(str, folders), alone, strict=True), ("mean of the runs", np.mean(alone)), ("ensemble", accuracy)]
    for line, (name, score) in zip(table[2:], rows, strict=True):
        assert line.startswith(f"| {name} ") and f" {score:.4f} |" in line
    assert "\n".join(table) in (out / "ensemble.md").read_text()
    predictions = pandas.read_parquet(out / "predictions.parquet")
    assert predictions["clip"].tolist() == [f"c{row:02}" for row in range(CLIPS)]
    assert softmax(np.stack(predictions["logits"]), axis=1) == pytest.approx(mean, abs=1e-6)
    assert predictions["predicted"].tolist() == [LABELS[i] for i in mean.argmax(1)]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == accuracy > max(alone)
    assert metrics["parameters"] == 3003 and metrics["test"]["mAP"] > 0.5 and metrics["members"][2] == "seed-2"
    write_comparison({"one": folders[:1], "all": [out]}, tmp_path / "compared")
    assert f"| all  | 1    | {accuracy:.4f} " in capsys.readouterr().out


@pytest.mark.parametrize("multi_label", [False, True])
def test_an_ensemble_of_sigmoids_has_their_mean(tmp_path, multi_label, capsys):
    logits = [noisy_run(tmp_path / str(seed), seed, loss="bce") for seed in (0, 1)]
    references, mean = np.eye(3)[TRUTH], expit(np.stack(logits)).mean(0)
    if multi_label:
        references[TRUTH == 2, 0] = 1
        for seed in (0, 1):
            change(tmp_path / str(seed), label=[[LABELS[i] for i in np.flatnonzero(row)] for row in references])
    run(tmp_path / "0", tmp_path / "1")
    found = pandas.read_parquet(tmp_path / "ensemble" / "predictions.parquet")
    assert expit(np.stack(found["logits"])) == pytest.approx(mean, abs=1e-6)
    metrics = json.loads((tmp_path / "ensemble" / "metrics.json").read_text())
    assert metrics["loss"] == "bce"
    assert metrics["test"]["mAP"] == pytest.approx(average_precision_score(references, mean))
    if multi_label:
        assert "accuracy" not in capsys.readouterr().out
        names = [[LABELS[i] for i in np.flatnonzero(row > 0.5)] for row in mean]
        assert [list(one) for one in found["predicted"]] == names


def test_runs_that_make_no_ensemble_are_refused(tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for seed, folder in enumerate((one, two, other)):
        noisy_run(folder, seed)
    change(other, label=[LABELS[TRUTH[row]] if row != 3 else "dog" for row in range(CLIPS)])
    noisy_run(tmp_path / "birds", 0, dataset="birds")
    noisy_run(tmp_path / "turned", 0, labels=LABELS[::-1])
    noisy_run(tmp_path / "short", 0, order=range(CLIPS - 2))
    noisy_run(tmp_path / "bce", 0, loss="bce")
    (two / "config.yaml").touch()
    for words, message in (
        ([one, tmp_path / "birds"], "dataset: the runs must have the same, got animals in .*one and birds in .*birds"),
        ([one, tmp_path / "turned"], "labels: the runs must have the same"),
        ([one, tmp_path / "bce"], "loss: the runs must have the same, got cross_entropy in .* and bce"),
        ([one, tmp_path / "short"], r"short did not test 2 clips \(c28, c29\)"),
        ([one, other], r"differ in the label of 1 clips \(c03\)"),
        ([one], "two folders or more, each given once, got .*one$"),
        ([one, two, one], "each given once, got .*one, .*two, .*one"),
        ([one, two, "--output", two], "two is the folder of a run; choose another --output"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words)
    assert not (tmp_path / "ensemble").exists()
    answer = subprocess.run([sys.executable, ROOT / "ensemble.py", "a", "b"], capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.startswith("error: a has no metrics.json")
