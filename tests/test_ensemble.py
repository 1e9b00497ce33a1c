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


def run(*arguments):
    ensemble.main([str(argument) for argument in arguments])


def test_the_mean_of_probabilities_by_hand():
    # Sure of class 0 against twice unsure of class 1: (0.9 + 0.4 + 0.4) / 3 for class 0.
    logits = np.log([[[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]]) + np.array([7, -3, 0])[:, None, None]
    mean = ensemble.mean_logits(logits)
    assert mean.shape == (1, 2) and mean.dtype == np.float32
    assert softmax(mean) == pytest.approx(np.array([[1.7 / 3, 1.3 / 3]]), abs=1e-6)
    far = ensemble.mean_logits(np.array([[[2000.0, 0.0]], [[0.0, 2000.0]]]))
    assert np.isfinite(far).all() and softmax(far) == pytest.approx(np.array([[0.5, 0.5]]))


def test_an_ensemble_leaves_a_table_and_a_folder_that_compare_takes(tmp_path, capsys):
    shuffled = np.random.default_rng(9).permutation(CLIPS)
    folders = [tmp_path / f"seed-{seed}" for seed in range(3)]
    logits = [noisy_run(folder, seed, shuffled if seed == 1 else range(CLIPS)) for seed, folder in enumerate(folders)]
    run(*folders)
    mean = np.mean([softmax(one, axis=1) for one in logits], axis=0)
    accuracy = (mean.argmax(1) == TRUTH).mean()
    printed, out = capsys.readouterr().out, tmp_path / "ensemble"
    for folder, one in zip(folders, logits, strict=True):
        alone = (one.argmax(1) == TRUTH).mean()
        assert f"| {folder} |" in printed.replace("  ", " ") and f"{alone:.4f}" in printed
    assert [line for line in printed.splitlines() if line.startswith("| ensemble ") and f"{accuracy:.4f}" in line]
    assert all(line in (out / "ensemble.md").read_text() for line in printed.splitlines() if line.startswith("|"))
    predictions = pandas.read_parquet(out / "predictions.parquet")
    assert predictions["clip"].tolist() == [f"c{row:02}" for row in range(CLIPS)]
    assert softmax(np.stack(predictions["logits"]), axis=1) == pytest.approx(mean, abs=1e-6)
    assert predictions["predicted"].tolist() == [LABELS[i] for i in mean.argmax(1)]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == accuracy > max((one.argmax(1) == TRUTH).mean() for one in logits)
    assert metrics["parameters"] == 3003 and metrics["test"]["mAP"] > 0.5 and metrics["members"][2] == "seed-2"
    write_comparison({"one": folders[:1], "all": [out]}, tmp_path / "compared")
    assert f"| all  | 1    | {accuracy:.4f} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "birds"}, "dataset: the runs must have the same, got animals in .*one and birds in .*two"),
        ({"labels": LABELS[::-1]}, "labels: the runs must have the same"),
        ({"order": range(CLIPS - 2)}, r"two did not test 2 clips \(c28, c29\)"),
    ],
)
def test_runs_of_other_tests_are_refused(tmp_path, fields, message):
    noisy_run(tmp_path / "one", 0)
    noisy_run(tmp_path / "two", 1, **fields)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "ensemble").exists()


def test_an_ensemble_of_multi_label_runs_has_the_mean_of_their_sigmoids(tmp_path, capsys):
    logits = []
    for seed in (0, 1):
        logits.append(noisy_run(tmp_path / str(seed), seed))
        path = tmp_path / str(seed) / "predictions.parquet"
        table = pandas.read_parquet(path)
        table.assign(label=[[label, "cat"] if label == "owl" else [label] for label in table["label"]]).to_parquet(path)
    run(tmp_path / "0", tmp_path / "1", "--output", tmp_path / "both")
    found = pandas.read_parquet(tmp_path / "both" / "predictions.parquet")
    mean = expit(np.stack(logits)).mean(0)
    assert expit(np.stack(found["logits"])) == pytest.approx(mean, abs=1e-6)
    assert [list(names) for names in found["predicted"]] == [[LABELS[i] for i in np.flatnonzero(p > 0.5)] for p in mean]
    references = np.eye(3)[TRUTH] + np.outer(TRUTH == 2, [1, 0, 0])
    metrics = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert metrics["test"]["mAP"] == pytest.approx(average_precision_score(references, mean))
    assert "accuracy" not in capsys.readouterr().out
    far = ensemble.mean_logits(np.array([[[2000.0, -2000.0]], [[2000.0, -1000.0]]]), loss="bce")
    assert np.isfinite(far).all()


def test_an_ensemble_of_single_label_runs_has_the_probabilities_of_their_loss(tmp_path):
    logits = [noisy_run(tmp_path / str(seed), seed, loss="bce") for seed in (0, 1)]
    run(tmp_path / "0", tmp_path / "1")
    found = np.stack(pandas.read_parquet(tmp_path / "ensemble" / "predictions.parquet")["logits"])
    assert expit(found) == pytest.approx(expit(np.stack(logits)).mean(0), abs=1e-6)
    metrics = json.loads((tmp_path / "ensemble" / "metrics.json").read_text())
    assert metrics["loss"] == "bce" and metrics["test"]["mAP"] == average_precision_score(np.eye(3)[TRUTH], found)
    noisy_run(tmp_path / "2", 2)
    with pytest.raises(UserError, match="loss: the runs must have the same, got bce in .* and cross_entropy"):
        run(tmp_path / "0", tmp_path / "2")


def test_labels_that_differ_by_clip_are_refused(tmp_path):
    for seed in (0, 1):
        noisy_run(tmp_path / str(seed), seed)
    table = pandas.read_parquet(tmp_path / "1" / "predictions.parquet")
    table.loc[3, "label"] = "dog"
    table.to_parquet(tmp_path / "1" / "predictions.parquet")
    with pytest.raises(UserError, match=r"differ in the label of 1 clips \(c03\)"):
        run(tmp_path / "0", tmp_path / "1")


def test_one_run_is_no_ensemble_and_no_run_is_overwritten(tmp_path):
    noisy_run(tmp_path / "one", 0)
    noisy_run(tmp_path / "two", 1)
    with pytest.raises(UserError, match="two folders or more, each named once, got .*one$"):
        run(tmp_path / "one")
    with pytest.raises(UserError, match="each named once, got .*one, .*two, .*one"):
        run(tmp_path / "one", tmp_path / "two", tmp_path / "one")
    (tmp_path / "two" / "config.yaml").touch()
    with pytest.raises(UserError, match="two is the folder of a run; choose another --output"):
        run(tmp_path / "one", tmp_path / "two", "--output", tmp_path / "two")
    answer = subprocess.run([sys.executable, ROOT / "ensemble.py", "a", "b"], capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.startswith("error: a has no metrics.json")
