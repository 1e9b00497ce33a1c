"""Several recipes in one comparison: equal beginnings, equal sizes, and commands that share the runs."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_AST, TINY_CNN14, TINY_VIT, TONES, write_run
from filelock import FileLock, Timeout
from pandas import DataFrame, MultiIndex
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


@pytest.fixture
def recipe(tones, tmp_path):
    """Writes a recipe for `tones`; gives its path."""

    def write(name, **changes):
        fields = TONES | {
            "dataset": str(tones), "output_dir": str(tmp_path / "runs"), "max_length": 48, "model_config": TINY_AST,
            "per_device_train_batch_size": 4, "num_train_epochs": 2, "precision": "fp32", "time_mask": 8,
            "preprocessing_num_workers": 1, "report_to": ["none"],
        }  # fmt: skip
        fields = {field: value for field, value in (fields | changes).items() if value is not None}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(fields))
        return str(tmp_path / f"{name}.yaml")

    return write


def test_arms_have_equal_data_order_and_weights_and_are_compared(recipe, tmp_path, monkeypatch, capsys):
    pytest.importorskip("perforatedai", reason="perforatedai has no wheel for this Python")
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
    paths = [recipe("plain"), recipe("wide", match_parameters=30000), recipe("grown", pai={"max_dendrites": 1})]
    crossval.main([*paths, "--folds", "1", "--seeds", "7"])

    plain, wide, grown = weights
    same = [name for name in plain if plain[name].shape == wide[name].shape]
    assert plain.keys() == wide.keys() == grown.keys() and 0 < len(same) < len(plain)
    assert all(torch.equal(plain[name], wide[name]) for name in same)
    assert all(torch.equal(plain[name], grown[name]) for name in plain)
    rows = [row for *_, row in draws[0]]
    assert len(rows) == 16 and rows[:8] != rows[8:]
    assert draws[0] == draws[1] == draws[2][-16:]  # dendrites are set up with a batch of their own

    folders = [tmp_path / "runs" / arm / "fold-1-seed-7" for arm in ("plain", "wide", "grown")]
    assert abs(json.loads((folders[1] / "metrics.json").read_text())["parameters"] - 30000) < 600
    saved = yaml.safe_load((folders[1] / "config.yaml").read_text())
    assert saved["match_parameters"] == 30000 and saved["model_config"]["intermediate_size"] > 64
    found = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [side["name"] for side in found["sides"]] == ["plain", "wide", "grown"]
    assert list(json.loads((tmp_path / "runs" / "crossval.json").read_text())) == ["plain", "wide", "grown"]
    assert all((tmp_path / "runs" / f"comparison.{kind}").exists() for kind in ("md", "csv", "png"))
    assert "wide differs from plain in match_parameters." in capsys.readouterr().out
    crossval.main([*paths, "--folds", "1", "--seeds", "7"])  # the folder of a sized run is recognised
    assert len(weights) == 3


def test_arms_that_are_no_fair_fight_are_refused(recipe):
    with pytest.raises(UserError, match="drop_labels must be the same in all recipes, got None in plain and .* in few"):
        crossval.main([recipe("plain"), recipe("few", drop_labels=["rare"])])
    with pytest.raises(UserError, match="must have different names, got plain.yaml more than once"):
        crossval.main([recipe("plain"), recipe("plain")])
    with pytest.raises(UserError, match="--last must be left out, because the recipe divides the data set without"):
        crossval.main([recipe("shares", **SHARES), "--last"])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_weights_by_name_depend_on_seed_name_and_shape_alone(architecture):
    def weights(seed, **changes):
        set_seed(seed)
        arguments = ModelArguments(
            architecture=architecture, model_config=FAMILIES[architecture] | changes, weights_by_name=True
        )
        model = load_model(["a", "b"], arguments, EXTRACTOR)
        following = torch.rand(1)
        return dict(model.named_parameters()), following

    layers = FAMILIES[architecture]["num_hidden_layers"]
    (plain, _), (other, _), (deep, _) = weights(1), weights(2), weights(1, num_hidden_layers=layers + 1)
    same = [name for name in plain if name in deep and plain[name].shape == deep[name].shape]
    assert len(same) > 5 and all(torch.equal(plain[name], deep[name]) for name in same)
    drawn = [name for name in plain if plain[name].std() > 0]
    assert len(drawn) > 5 and not any(torch.equal(plain[name], other[name]) for name in drawn)
    values = {tuple(plain[name].flatten()[:4].tolist()) for name in drawn}
    assert len(values) == len(drawn)  # no two parameters have the same numbers
    set_seed(1)
    usual = ModelArguments(architecture=architecture, model_config=FAMILIES[architecture])
    for name, parameter in load_model(["a", "b"], usual, EXTRACTOR).named_parameters():
        assert parameter.numel() < 500 or (plain[name].std() / parameter.std() - 1).abs() < 0.15, name


@pytest.mark.parametrize(
    ("architecture", "field", "target"),
    [("ast", "intermediate_size", 60000), ("vit", "intermediate_size", 60000), ("cnn14", "width", 20000)],
)
@pytest.mark.parametrize("waveform", [False, True])
def test_a_model_is_sized_to_a_number_of_parameters(architecture, field, target, waveform):
    extractor = EXTRACTOR
    arguments = ModelArguments(
        architecture=architecture, model_config=FAMILIES[architecture], match_parameters=target, waveform=waveform
    )
    if waveform:
        extractor = load_extractor(arguments, parse_recipe(["--max_length", "48"]).features)
    labels = [str(label) for label in range(10)]
    sized = match_parameters(labels, arguments, extractor)

    def count(value):
        model = ModelArguments(
            architecture=architecture, model_config=sized.model_config | {field: value}, waveform=waveform
        )
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
    with pytest.raises(
        UserError, match="reaches within 2 % by its intermediate_size, got 100; the nearest is 18,212, with"
    ):
        match_parameters(["a", "b"], tiny, EXTRACTOR)


def test_commands_share_the_runs_and_a_killed_one_leaves_no_lock(recipe, tmp_path, capsys):
    path, folder = recipe("shares", **SHARES, num_train_epochs=1, report_to=["tensorboard"]), tmp_path / "runs"
    command = [sys.executable, str(ROOT / "crossval.py"), path, "--seeds", "1", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not _is_locked(folder / "seed-1" / ".lock"):
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
    assert list(json.loads((folder / "crossval.json").read_text())["baseline"]["runs"]) == ["seed-2"]
    crossval.main([path, "--seeds", "1", "2", "--collect"])
    assert "1 of 2 runs are not finished" in capsys.readouterr().out
    crossval.main([path, "--seeds", "1", "2"])
    assert "not finished" not in capsys.readouterr().out and not _is_locked(folder / "seed-1" / ".lock")
    assert len(list(folder.glob("seed-2/tensorboard/events.*"))) == 1  # trained once


def _is_locked(path):
    try:
        with FileLock(path, blocking=False):
            return False
    except (FileNotFoundError, Timeout) as error:
        return isinstance(error, Timeout)


def test_unfinished_runs_are_named_and_the_others_are_compared(tmp_path, capsys):
    rng, names = np.random.default_rng(0), [(fold, seed) for fold in "12" for seed in (1, 2)]
    runs = {side: [tmp_path / side / f"fold-{fold}-seed-{seed}" for fold, seed in names] for side in ("plain", "wide")}
    table = DataFrame(runs, MultiIndex.from_tuples(names, names=["fold", "seed"]))
    with pytest.raises(UserError, match="at least one run must be finished to put results together, got none"):
        collect(table, tmp_path, [])
    for side, folders in runs.items():
        for (fold, seed), folder in zip(names, folders, strict=True):
            if (side, fold, seed) != ("wide", "2", 2):
                clips = range(8) if fold == "1" else range(8, 16)
                fields = {"seed": seed, "loss": "cross_entropy", "train_runtime": 1.0}
                write_run(folder, ["a", "b"], clips, ["a", "b"] * 4, rng.normal(size=(8, 2)), **fields)
                metrics = json.loads((folder / "metrics.json").read_text())
                metrics["test"]["folds"] = [fold]
                (folder / "metrics.json").write_text(json.dumps(metrics))
    collect(table, tmp_path, ["crossval.py"])
    printed = capsys.readouterr().out
    assert f"1 of 8 runs are not finished: {runs['wide'][3]}" in printed
    assert "The comparison has 2 of 4 runs of each side." in printed
    found = json.loads((tmp_path / "comparison.json").read_text())["sides"]
    assert [side["runs"] for side in found] == [["fold-1-seed-1", "fold-2-seed-1"]] * 2
    assert len(json.loads((tmp_path / "crossval.json").read_text())["plain"]["runs"]) == 4
