"""crossval.py: every fold once, finished runs kept, results put together."""

import json
import sqlite3
from importlib.util import find_spec

import pandas
import pytest
import torch
import yaml
from conftest import PAI
from safetensors.torch import load_file

import crossval
from audio_dendrites.errors import UserError


@pytest.fixture
def write(recipe, tmp_path):
    """A function that writes a recipe for short runs in tmp_path/runs and returns the path of the file."""

    def write(**changes) -> str:
        fields = {"output_dir": str(tmp_path / "runs"), "per_device_train_batch_size": 4, "num_train_epochs": 1}
        return str(recipe(**fields | {"max_length": 48, "precision": "fp32", "report_to": ["none"]} | changes))

    return write


def test_every_fold_is_tested_once_and_a_finished_run_is_kept(write, tmp_path, capsys):
    crossval.main([write()])
    folders = [tmp_path / "runs" / f"fold-{fold}-seed-42" for fold in "123"]
    runs = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [(run["validation"]["folds"], run["test"]["folds"]) for run in runs] == [
        (["2"], ["1"]), (["3"], ["2"]), (["1"], ["3"])
    ]  # fmt: skip
    tables = [pandas.read_parquet(folder / "predictions.parquet") for folder in folders]
    clips = pandas.concat(tables)
    assert sorted(clips["clip"]) == sorted({f"clip-{row}" for row in range(24)})
    found = json.loads((tmp_path / "runs" / "crossval.json").read_text())["baseline"]
    accuracies = [run["test"]["accuracy"] for run in runs]
    assert found["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert found["pooled"].keys() == {"accuracy", "macro_f1"}  # logits of other runs are on other scales
    assert found["pooled"]["accuracy"] == (clips["label"] == clips["predicted"]).mean()
    assert found["mean"]["mAP"] == pytest.approx(sum(run["test"]["mAP"] for run in runs) / 3)
    written = [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]
    capsys.readouterr()
    crossval.main([write()])
    assert [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders] == written
    assert (
        f"| mean               |                |       |   {found['mean']['accuracy']:.4f} |"
        in capsys.readouterr().out
    )
    assert (tmp_path / "runs" / "confusion_matrix_baseline.png").exists()


def test_every_run_has_its_own_run_in_each_tracker(write, tmp_path, monkeypatch):
    for package in ("wandb", "trackio"):
        pytest.importorskip(package, reason=f"{package} is not installed; `pip install {package}` brings it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    path = write(report_to=["wandb", "trackio", "tensorboard"], output_dir=str(tmp_path / "runs" / "tones"))
    crossval.main([path, "--folds", "1", "2"])
    names = ["tones-fold-1-seed-42", "tones-fold-2-seed-42"]
    records = [file.read_bytes() for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert [[name for name in names if name.encode() in record] for record in records] == [[name] for name in names]
    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as database:
        rows = database.execute("SELECT DISTINCT run_name, run_id FROM metrics ORDER BY run_name").fetchall()
        scores = database.execute("SELECT metrics FROM metrics WHERE run_name = ?", names[:1]).fetchall()
    assert [name for name, _ in rows] == names
    assert sum("test/accuracy" in json.loads(row) for (row,) in scores) == 1
    assert all(len(list(tmp_path.glob(f"runs/tones/{name[6:]}/tensorboard/events.*"))) == 1 for name in names)


def test_with_last_all_other_folds_train_and_none_chooses(write, tmp_path):
    crossval.main([write(num_train_epochs=2), "--last", "--folds", "2"])
    folder = tmp_path / "runs" / "fold-2-seed-42"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["validation"]["folds"] == metrics["test"]["folds"] == ["2"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train_folds"] == ["1", "3"]
    assert metrics["chosen_by"] is None and metrics["best_step"] is None and metrics["steps"] == 8
    assert "The weights are those of the last step" in (folder / "README.md").read_text()
    last, saved = (load_file(path / "model.safetensors") for path in (folder / "checkpoint-8", folder))
    assert all(torch.equal(last[name], saved[name]) for name in last if name in saved)
    for field, value in {"early_stopping_patience": 2, "pai": {"schedule": "history"}}.items():
        with pytest.raises(UserError, match=f"{field} must not follow a validation score with --last, got "):
            crossval.main([write(**{field: value}), "--last"])


@pytest.mark.skipif(find_spec("perforatedai") is None, reason="perforatedai has no wheel for this Python")
def test_with_a_baseline_both_sides_are_compared_over_all_runs(write, tmp_path, capsys):
    path = write(baseline=True, pai=PAI)
    crossval.main([path, "--folds", "1", "--seeds", "1", "2"])
    assert "| baseline  | 2    |" in capsys.readouterr().out
    page = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert page["sides"][1]["runs"] == ["fold-1-seed-1", "fold-1-seed-2"] and page["clips"] == 8
    assert page["sides"][1]["seeds"] == [1, 2] and page["sides"][1]["over_runs"]
    assert set(json.loads((tmp_path / "runs" / "crossval.json").read_text())) == {"baseline", "dendritic"}


def test_folds_that_do_not_exist_are_named(write):
    with pytest.raises(UserError, match=r"--folds must be folds of the recipe \(1, 2, 3\), got 7"):
        crossval.main([write(), "--folds", "7"])
    with pytest.raises(UserError, match=r"must name at least 3 folds \(train, choose and test\), got 1, 2"):
        crossval.main([write(test_folds=["2"])])
