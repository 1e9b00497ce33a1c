"""crossval.py: every fold once, several recipes in a fair comparison, and commands that share the runs."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import ROOT, TINY_AST, TINY_CNN14, TINY_VIT, TONES, write_run
from filelock import FileLock, Timeout
from pandas import DataFrame, MultiIndex
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import set_seed

import crossval
import train
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_extractor, load_model, match_parameters
from audio_dendrites.recipes import ModelArguments, parse_recipe
from audio_dendrites.results.folds import collect
from data_collator import SpectrogramCollator

FAMILIES = {"ast": TINY_AST, "vit": TINY_VIT, "cnn14": TINY_CNN14}
EXTRACTOR = BatchedASTFeatureExtractor(max_length=48)
SHARES = {name: None for name in TONES if name.endswith("folds")} | {"split_shares": [0.5, 0.25, 0.25]}
needs_perforatedai = pytest.mark.skipif(
    find_spec("perforatedai") is None, reason="perforatedai has no wheel for this Python"
)


@pytest.fixture
def recipe(tones, tmp_path):
    """Writes a recipe for `tones` and returns its path."""

    def write(name="recipe", **changes):
        fields = TONES | {
            "dataset": str(tones), "output_dir": str(tmp_path / "runs"), "max_length": 48, "model_config": TINY_AST,
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "precision": "fp32", "time_mask": 8,
            "preprocessing_num_workers": 1, "report_to": ["none"],
        }  # fmt: skip
        fields = {field: value for field, value in (fields | changes).items() if value is not None}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        return str(tmp_path / f"{name}.yaml")

    return write


def read_json(path):
    return json.loads(path.read_text())


def test_every_fold_is_tested_once_and_a_finished_run_is_kept(recipe, tmp_path, capsys):
    crossval.main([recipe()])
    folders = [tmp_path / "runs" / f"fold-{fold}-seed-42" for fold in "123"]
    runs = [read_json(folder / "metrics.json") for folder in folders]
    folds = [(*run["validation"]["folds"], *run["test"]["folds"]) for run in runs]
    assert folds == [("2", "1"), ("3", "2"), ("1", "3")]
    clips = pandas.concat(pandas.read_parquet(folder / "predictions.parquet") for folder in folders)
    assert sorted(clips["clip"]) == sorted({f"clip-{row}" for row in range(24)})
    found = read_json(tmp_path / "runs" / "crossval.json")["baseline"]
    for name in ("accuracy", "mAP"):
        assert found["mean"][name] == pytest.approx(sum(run["test"][name] for run in runs) / 3)
    assert found["pooled"].keys() == {"accuracy", "macro_f1"}  # logits of other runs are on other scales
    assert found["pooled"]["accuracy"] == (clips["label"] == clips["predicted"]).mean()
    block = 26 * (4 * 32**2 + 2 * 32 * 64) + 2 * 26**2 * 32  # 24 patches and two tokens: attention and MLP
    assert runs[0]["multiply_adds"] == 24 * 32 * 16**2 + 2 * block + 32 * 2
    written = [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders]
    capsys.readouterr()
    crossval.main([recipe()])
    assert [(folder / "model.safetensors").stat().st_mtime_ns for folder in folders] == written
    row = f"| mean               |                |       |   {found['mean']['accuracy']:.4f} |"
    assert row in capsys.readouterr().out and (tmp_path / "runs" / "confusion_matrix_baseline.png").exists()


def test_every_run_has_its_own_run_in_each_tracker(recipe, tmp_path, monkeypatch):
    for package in ("wandb", "trackio"):
        pytest.importorskip(package, reason=f"{package} is not installed; `pip install {package}` brings it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    for module in ("trackio.utils", "trackio.run", "trackio.media.media"):
        monkeypatch.setattr(f"{module}.MEDIA_DIR", tmp_path / "trackio" / "media")
    path = recipe(report_to=["wandb", "trackio", "tensorboard"], output_dir=str(tmp_path / "runs" / "tones"))
    crossval.main([path, "--folds", "1", "2"])
    names = ["tones-fold-1-seed-42", "tones-fold-2-seed-42"]
    records = [file.read_bytes() for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]
    assert [[name for name in names if name.encode() in record] for record in records] == [[name] for name in names]
    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as database:
        rows = database.execute("SELECT DISTINCT run_name, run_id FROM metrics ORDER BY run_name").fetchall()
        scores = database.execute("SELECT metrics FROM metrics WHERE run_name = ?", names[:1]).fetchall()
    assert [name for name, _ in rows] == names
    assert sum("test/accuracy" in json.loads(row) for (row,) in scores) == 1
    for name in names:
        board = EventAccumulator(
            str(tmp_path / "runs" / "tones" / name[6:] / "tensorboard"), size_guidance={"images": 0}
        )
        assert {"figures/learning_curves", "figures/confusion_matrix"} <= {*board.Reload().Tags()["images"]}
    for folder in ("wandb", "trackio"):
        assert len(list((tmp_path / folder).rglob("*.png"))) == 4, folder


def test_with_last_all_other_folds_train_and_none_chooses(recipe, tmp_path, caplog):
    crossval.main([recipe(num_train_epochs=2), "--last", "--folds", "2"])
    folder = tmp_path / "runs" / "fold-2-seed-42"
    metrics = read_json(folder / "metrics.json")
    assert metrics["validation"]["folds"] == metrics["test"]["folds"] == ["2"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train_folds"] == ["1", "3"]
    assert metrics["chosen_by"] is None and metrics["best_step"] is None and metrics["steps"] == 8
    assert "The weights are those of the last step" in (folder / "README.md").read_text()
    assert "in validation and in test" not in caplog.text
    last, saved = (load_file(path / "model.safetensors") for path in (folder / "checkpoint-8", folder))
    assert all(torch.equal(last[name], saved[name]) for name in last if name in saved)


@pytest.mark.parametrize(
    ("pai", "follows"),
    [(None, False), ({}, False), ({"schedule": "early"}, False), ({"schedule": "history"}, True),
     ({"preset": "perforatedai"}, True)],
)  # fmt: skip
def test_last_accepts_early_growth_and_refuses_growth_that_follows_the_score(recipe, pai, follows):
    assert crossval.follows_score(pai) == follows
    if follows:
        with pytest.raises(UserError, match="pai must not follow a validation score with --last, got "):
            crossval.main([recipe(pai=pai), "--last"])
    else:
        crossval.check_last(parse_recipe([recipe(pai=pai)]))


@needs_perforatedai
def test_with_a_baseline_both_sides_are_compared_over_all_runs(recipe, tmp_path, capsys):
    crossval.main([recipe(baseline=True, pai={"first_growth": 0.3}), "--folds", "1", "--seeds", "1", "2"])
    printed = capsys.readouterr().out
    assert "| baseline  | 2    |" in printed and "The dendrites of `dendritic` are " in printed
    found = read_json(tmp_path / "runs" / "comparison.json")
    plain, grown = found["sides"]
    assert grown["runs"] == ["fold-1-seed-1", "fold-1-seed-2"] and grown["seeds"] == [1, 2] and found["clips"] == 8
    assert grown["over_runs"] and grown["multiply_adds"] > plain["multiply_adds"]
    assert set(read_json(tmp_path / "runs" / "crossval.json")) == {"baseline", "dendritic"}


@needs_perforatedai
def test_arms_have_equal_data_order_and_weights_and_are_compared(recipe, tmp_path, monkeypatch, capsys):
    weights, draws = [], []

    def load(*arguments):
        model = load_model(*arguments)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        draws.append([])
        return model

    collate = SpectrogramCollator.__call__

    def collate_and_note(self, examples):
        draws[-1].extend(example["draw"] for example in examples if "draw" in example)
        return collate(self, examples)

    monkeypatch.setattr(train, "load_model", load)
    monkeypatch.setattr(SpectrogramCollator, "__call__", collate_and_note)
    changes = {"plain": {}, "wide": {"match_parameters": 30000}, "grown": {"pai": {"max_dendrites": 1}}}
    paths = [recipe(name, num_train_epochs=2, **one) for name, one in changes.items()]
    crossval.main([*paths, "--folds", "1", "--seeds", "7"])

    plain, wide, grown = weights
    same = [name for name in plain if plain[name].shape == wide[name].shape]
    assert plain.keys() == wide.keys() == grown.keys() and 0 < len(same) < len(plain)
    assert all(torch.equal(plain[name], wide[name]) for name in same)
    assert all(torch.equal(plain[name], grown[name]) for name in plain)
    rows = [row for *_, row in draws[0]]
    assert len(rows) == 16 and rows[:8] != rows[8:]
    assert draws[0] == draws[1] == draws[2][-16:]  # dendrites are set up with a batch of their own

    runs = tmp_path / "runs"
    assert abs(read_json(runs / "wide" / "fold-1-seed-7" / "metrics.json")["parameters"] - 30000) < 600
    saved = yaml.safe_load((runs / "wide" / "fold-1-seed-7" / "config.yaml").read_text())
    assert saved["match_parameters"] == 30000 and saved["model_config"]["intermediate_size"] > 64
    assert [side["name"] for side in read_json(runs / "comparison.json")["sides"]] == list(changes)
    assert list(read_json(runs / "crossval.json")) == list(changes)
    assert all((runs / f"comparison.{kind}").exists() for kind in ("md", "csv", "png"))
    assert "wide differs from plain in match_parameters." in capsys.readouterr().out
    crossval.main([*paths, "--folds", "1", "--seeds", "7"])  # the folder of a sized run is recognised
    assert len(weights) == 3


def test_runs_that_make_no_fair_fight_are_refused(recipe):
    plain = recipe("plain")
    for words, message in (
        ([plain, recipe("few", drop_labels=["rare"])],
         "drop_labels must be the same in all recipes, got None in plain and .* in few"),
        ([plain, plain], "must have different names, got plain.yaml more than once"),
        ([recipe("shares", **SHARES), "--last"], "--last must be left out, because the recipe divides the data set wi"),
        ([plain, "--folds", "7"], r"--folds must be folds of the recipe \(1, 2, 3\), got 7"),
        ([recipe("two", test_folds=["2"])], r"must name at least 3 folds \(train, choose and test\), got 1, 2"),
        ([recipe("stop", early_stopping_patience=2), "--last"], "early_stopping_patience must not follow a validation"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            crossval.main(words)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_weights_by_name_depend_on_seed_name_and_shape_alone(architecture):
    def weights(seed, by_name=True, **changes):
        set_seed(seed)
        config = FAMILIES[architecture] | changes
        arguments = ModelArguments(architecture=architecture, model_config=config, weights_by_name=by_name)
        return dict(load_model(["a", "b"], arguments, EXTRACTOR).named_parameters())

    layers = FAMILIES[architecture]["num_hidden_layers"]
    plain, other, deep = weights(1), weights(2), weights(1, num_hidden_layers=layers + 1)
    same = [name for name in plain if name in deep and plain[name].shape == deep[name].shape]
    assert len(same) > 5 and all(torch.equal(plain[name], deep[name]) for name in same)
    drawn = [name for name in plain if plain[name].std() > 0]
    assert len(drawn) > 5 and not any(torch.equal(plain[name], other[name]) for name in drawn)
    values = {tuple(plain[name].flatten()[:4].tolist()) for name in drawn}
    assert len(values) == len(drawn)  # no two parameters have the same numbers
    for name, parameter in weights(1, by_name=False).items():
        assert parameter.numel() < 500 or (plain[name].std() / parameter.std() - 1).abs() < 0.15, name


@pytest.mark.parametrize(
    ("architecture", "field", "target"),
    [("ast", "intermediate_size", 60000), ("vit", "intermediate_size", 60000), ("cnn14", "width", 20000)],
)
@pytest.mark.parametrize("waveform", [False, True])
def test_a_model_is_sized_to_a_number_of_parameters(architecture, field, target, waveform):
    fields = {"architecture": architecture, "waveform": waveform}
    arguments = ModelArguments(**fields, model_config=FAMILIES[architecture], match_parameters=target)
    extractor = load_extractor(arguments, parse_recipe(["--max_length", "48"]).features) if waveform else EXTRACTOR
    labels = [str(label) for label in range(10)]
    sized = match_parameters(labels, arguments, extractor)

    def count(value):
        model = ModelArguments(**fields, model_config=sized.model_config | {field: value})
        return sum(parameter.numel() for parameter in load_model(labels, model, extractor).parameters())

    value = sized.model_config[field]
    step = 1 if field == "intermediate_size" else 1 / 256  # one channel of the last of three blocks
    distance = abs(count(value) - target)
    assert distance <= 0.02 * target
    assert all(abs(count(near) - target) >= distance for near in (value - step, value + step))


def test_match_parameters_takes_a_finished_run_and_names_what_is_wrong(tmp_path):
    folder = write_run(tmp_path / "run", ["a", "b"], range(4), ["a", "b"] * 2, np.eye(4, 2), parameters=54321)
    options = ["--match_parameters", str(folder)]
    assert parse_recipe(options).to_dict()["match_parameters"] == 54321
    for more, message in (
        (["--pai", "{}"], "match_parameters must not be set together with pai, got 54321"),
        (["--model", "x"], "match_parameters must not be set together with model, got 54321 and 'x'"),
        (["--match_parameters", "nowhere"], "must be a number of parameters or a finished run folder, got 'nowhere'"),
        (["--match_parameters", "0"], r"match_parameters must be in \[1, inf\), got 0"),
    ):
        with pytest.raises(UserError, match=message):
            parse_recipe([*options, *more])
    tiny = ModelArguments(model_config=TINY_AST, match_parameters=100)
    with pytest.raises(UserError, match="within 2 % by its intermediate_size, got 100; the nearest is 18,212, with"):
        match_parameters(["a", "b"], tiny, EXTRACTOR)


def is_locked(path):
    try:
        with FileLock(path, blocking=False):
            return False
    except (FileNotFoundError, Timeout) as error:
        return isinstance(error, Timeout)


def test_commands_share_the_runs_and_a_killed_one_leaves_no_lock(recipe, tmp_path, capsys):
    path, folder = recipe("shares", **SHARES, report_to=["tensorboard"]), tmp_path / "runs"
    command = [sys.executable, str(ROOT / "crossval.py"), path, "--seeds", "1", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not is_locked(folder / "seed-1" / ".lock"):
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 0, second.stderr
    assert f"{folder / 'seed-1'}: another command is training this run." in second.stdout
    assert f"1 of 2 runs are not finished: {folder / 'seed-1'}" in second.stdout
    assert read_json(folder / "crossval.json")["baseline"]["runs"] == ["seed-2"]
    crossval.main([path, "--seeds", "1", "2", "--collect"])
    assert "1 of 2 runs are not finished" in capsys.readouterr().out
    crossval.main([path, "--seeds", "1", "2"])
    assert "not finished" not in capsys.readouterr().out and not is_locked(folder / "seed-1" / ".lock")
    events = sorted(path.suffix for path in folder.glob("seed-2/tensorboard/events.*"))
    assert len(events) == 2 and events.count(".figures") == 1  # trained once


def test_unfinished_runs_are_named_and_the_others_are_compared(tmp_path, capsys):
    rng, names = np.random.default_rng(0), [(fold, seed) for fold in "12" for seed in (1, 2)]
    runs = {side: [tmp_path / side / f"fold-{fold}-seed-{seed}" for fold, seed in names] for side in ("plain", "wide")}
    table = DataFrame(runs, MultiIndex.from_tuples(names, names=["fold", "seed"]))
    with pytest.raises(UserError, match="at least one run must be finished to put results together, got none"):
        collect(table, tmp_path, [])
    for (fold, seed), folder in [*zip(names * 2, runs["plain"] + runs["wide"], strict=True)][:-1]:
        clips = range(8) if fold == "1" else range(8, 16)
        fields = {"seed": seed, "loss": "cross_entropy", "train_runtime": 1.0}
        write_run(folder, ["a", "b"], clips, ["a", "b"] * 4, rng.normal(size=(8, 2)), **fields)
        metrics = read_json(folder / "metrics.json")
        metrics["test"]["folds"] = [fold]
        (folder / "metrics.json").write_text(json.dumps(metrics))
    collect(table, tmp_path, ["crossval.py"])
    printed = capsys.readouterr().out
    assert f"1 of 8 runs are not finished: {runs['wide'][3]}" in printed
    assert "The comparison has 2 of 4 runs of each side." in printed
    found = read_json(tmp_path / "comparison.json")["sides"]
    assert [side["runs"] for side in found] == [["fold-1-seed-1", "fold-2-seed-1"]] * 2
    assert len(read_json(tmp_path / "crossval.json")["plain"]["runs"]) == 4
