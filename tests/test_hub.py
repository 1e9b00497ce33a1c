"""The model card, and what of a run folder may leave the machine."""

import copy
import json
import socket
from pathlib import Path

import pandas
import pytest
import yaml
from conftest import ROOT
from hub.server import WRITE_TOKEN
from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from audio_dendrites.errors import UserError
from audio_dendrites.publishing.card import model_card
from audio_dendrites.publishing.content import PublishError, check_staged, read_reports, stage_run, without_paths
from audio_dendrites.recipes import default_hub_model_id, parse_recipe

TEMPLATE = ROOT / "model_cards" / "model.md.jinja"
CARDS = Path(__file__).parent / "cards"

SCORES = {"accuracy": 0.75, "macro_f1": 0.7333333, "mAP": 0.9, "clips": 4}
PER_CLASS = {
    "cat": {"accuracy": 0.5, "f1": 0.6666667, "clips": 2}, "dog": {"accuracy": 1.0, "f1": 0.8, "clips": 2},
}  # fmt: skip
METRICS = {
    "dataset": "synthetic", "base_model": None, "local": [], "labels": ["cat", "dog"], "sampling_rate": 16000,
    "chosen_by": "accuracy", "parameters": 1234567, "trained_parameters": 1234567, "dendrites": None,
    "precision": "bf16", "processes": 1, "command": ["train.py", "configs/quickstart.yaml", "--seed", "7"],
    "environment": {
        "hardware": "CPU (x86_64)", "python": "3.12.1", "torch": "2.11.0", "transformers": "5.23.0",
        "commit": "329a8dd",
    },
    "validation": SCORES | {"folds": ["9"]}, "test": SCORES | {"folds": ["10"], "per_class": PER_CLASS},
    "best_step": 60, "steps": 70, "epochs": 7.0, "train_runtime": 3725.2, "train_steps_per_second": 0.5,
    "train_samples_per_second": 5.0, "skipped": {},
}  # fmt: skip
RECIPE = {
    "dataset": "synthetic", "dataset_split": "train", "train_folds": ["1", "2"], "validation_folds": ["9"],
    "test_folds": ["10"], "drop_leaks": False, "learning_rate": 0.001, "num_train_epochs": 7.0, "precision": "bf16",
    "seed": 7, "time_mask": 0,
}  # fmt: skip
BASE, DEND = (
    {
        "name": name, "runs": [name[:4]], "seeds": [7], "accuracy": {"mean": accuracy, "deviation": None},
        "parameters": parameters, "steps": [70], "seconds_a_step": seconds,
    }
    for name, accuracy, parameters, seconds in (("baseline", 0.5, 1000000, 0.5), ("dendritic", 0.75, 1234567, 0.6))
)  # fmt: skip
DIFFERENCE = {"difference": 0.25, "low": -0.25, "high": 0.75, "p": 0.25, "effect_size": None}
VERDICT = "These two models do not differ significantly: `dendritic` has +25.00 points of accuracy."
DEND |= {"accuracy": DEND["accuracy"] | DIFFERENCE, "error_reduction_percent": 50.0, "verdict": VERDICT}
COMPARISON = {"dataset": "synthetic", "clips": 4, "recordings": 3, "scores": ["accuracy"], "sides": [BASE, DEND]}
GROWN = {"event": "grown", "metric": 0.5, "evaluated_dendrites": 0}
DENDRITES = {
    "layers": {"classifier.dense": 1, "layers.1.mlp.fc1": 2},
    "activation": "sigmoid",
    "growth": [
        GROWN | {"step": 20, "dendrites": 1, "parameters": 1100000},
        GROWN | {"step": 40, "dendrites": 2, "parameters": 1234567, "metric": 0.625, "evaluated_dendrites": 1},
    ],
}
US8K = {
    "dataset": "danavery/urbansound8K",
    "base_model": "MIT/ast-finetuned-audioset-10-10-0.4593",
    "labels": ["air_conditioner", "car_horn"],
}
FIGURES = {"confusion_matrix.png", "learning_curves.png"}


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def card_of(kind: str) -> str:
    """The card of a run of each kind."""
    if kind == "baseline":
        return model_card(METRICS, RECIPE, TEMPLATE, "me/quickstart-baseline", FIGURES, COMPARISON, "me/quickstart")
    if kind == "dendritic":
        files = FIGURES | {"dendritic.py", "dendrites.png", "comparison.png"}
        metrics = METRICS | {"dendrites": DENDRITES}
        other, commit = "me/quickstart-baseline", "0123456789abcdef0123456789abcdef01234567"
        return model_card(metrics, RECIPE, TEMPLATE, "me/quickstart", files, COMPARISON, other, commit)
    if kind == "running":
        metrics = without(METRICS, "test", "best_step", "steps", "epochs", "train_runtime", "skipped")
        metrics |= {"running": {"step": 40, "max_steps": 70}, "dendrites": DENDRITES}
        return model_card(metrics, RECIPE, TEMPLATE, "me/quickstart", {"dendritic.py"})
    recipe = RECIPE | {"dataset": US8K["dataset"], "dataset_revision": "8aa9177", "drop_leaks": True}
    metrics = METRICS | US8K | {"trained_parameters": 1000, "processes": 2, "skipped": {"train": ["a.wav: empty"]}}
    return model_card(metrics, recipe, TEMPLATE, "me/ast-urbansound8k", FIGURES)


@pytest.mark.parametrize("kind", ["baseline", "dendritic", "running", "urbansound8k"])
def test_the_whole_card(kind):
    assert card_of(kind) == (CARDS / f"{kind}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["baseline", "dendritic", "running", "urbansound8k"])
def test_the_metadata_are_what_the_hub_takes(kind, online, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(card_of(kind), encoding="utf-8")
    ModelCard.load(path).validate()
    assert online.log[-1].path == "/api/validate-yaml" and online.log[-1].status == 200
    metadata = metadata_load(path)
    assert metadata["pipeline_tag"] == "audio-classification" and metadata["library_name"] == "transformers"
    assert (
        ("dendrites" in metadata["tags"]) == ("perforatedai" in metadata["tags"]) == (kind in ("dendritic", "running"))
    )
    if kind == "running":
        assert "model-index" not in metadata
        return
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == {"urbansound8k": "ast-urbansound8k", "dendritic": "quickstart"}.get(kind, "quickstart-baseline")
    assert [result.metric_value for result in results] == [0.75, 0.7333333, 0.9]
    assert all(isinstance(result, EvalResult) and result.dataset_split == "train" for result in results)
    assert results[0].dataset_args == {"test_folds": ["10"], "cross_validation": False}
    if kind == "urbansound8k":
        assert metadata["datasets"] == [US8K["dataset"]] and metadata["base_model"] == US8K["base_model"]
        assert results[0].dataset_revision == "8aa9177" and results[0].dataset_name == "UrbanSound8K"


@pytest.mark.parametrize(
    ("architecture", "family", "paper"),
    [("cnn14", "A CNN14 that takes waveforms and tells", "kong2020panns"),
     ("mel-vit", "A Vision Transformer on mel spectrograms that takes waveforms and tells", "dosovitskiy2021image")],
)  # fmt: skip
def test_other_architectures_bring_code_and_no_dendrites(architecture, family, paper):
    files = {"waveform.py", "cnn14.py"}
    metrics = METRICS | {"architecture": architecture}
    card = ModelCard(model_card(metrics, RECIPE | {"waveform": True}, TEMPLATE, "me/x", files))
    assert card.data.tags == ["audio-classification", architecture]
    assert family in card.content and paper in card.content and "gong2021" not in card.content
    assert "The model is code of this repository, `cnn14.py`, `waveform.py`" in card.content
    assert "trust_remote_code=True)" in card.content and "dendrites" not in card.content.split("audio-dendrites")[0]


@pytest.mark.parametrize(
    ("changes", "license"),
    [
        ({}, "apache-2.0"),
        ({"base_model": "a/b"}, None),
        ({"dataset": "a/b"}, None),
        ({"dataset": "danavery/urbansound8K"}, "cc-by-nc-4.0"),
        ({"dataset": "my_UrbanSound8K", "local": ["dataset"]}, "cc-by-nc-4.0"),
    ],
)
def test_the_licence_is_that_of_the_data_or_left_out(changes, license):
    card = ModelCard(model_card(METRICS | changes, RECIPE, TEMPLATE, "me/x", FIGURES))
    assert card.data.license == license
    assert ("CC BY-NC 4.0" in card.content) == ("salamon2014urbansound" in card.content) == (license == "cc-by-nc-4.0")


def test_what_is_local_is_no_id_of_the_hub():
    metrics = METRICS | {"dataset": "tones.parquet", "base_model": "my-ast", "local": ["dataset", "base_model"]}
    card = ModelCard(model_card(metrics, RECIPE, TEMPLATE, "me/x", FIGURES))
    assert card.data.datasets is None and card.data.base_model is None
    assert "the local model `my-ast` on the local data set `tones.parquet`" in card.content


def test_the_card_of_a_multi_label_pair_has_no_accuracy_and_no_test_of_right_clips():
    per_class = {"cat": {"average_precision": 0.8, "positives": 2}, "dog": {"average_precision": 1.0, "positives": 3}}
    metrics = METRICS | {"test": {"mAP": 0.9, "clips": 4, "per_class": per_class, "folds": ["10"]}}
    metrics |= {"validation": {"mAP": 0.8, "clips": 4, "folds": ["9"]}, "dendrites": DENDRITES}
    base, dend = (without(side, "accuracy", "error_reduction_percent") for side in COMPARISON["sides"])
    base["mAP"], dend["mAP"] = {"mean": 0.65, "deviation": None}, {"mean": 0.9, "deviation": None} | DIFFERENCE
    comparison = COMPARISON | {"scores": ["mAP"], "sides": [base, dend]}
    card = ModelCard(model_card(metrics, RECIPE, TEMPLATE, "me/x", {"comparison.png"}, comparison))
    beside = card.content.split("## Beside")[1].split("## ")[0]
    assert "| dendritic | 1    | 0.9000 | 70    | 1,234,567 (× 1.235) |" in beside
    assert "| dendritic        | mAP   | +25.00 | -25.00 to +75.00 |" in beside
    assert "tested on 4 clips of 3 source recordings" in beside and "](comparison.png)" in beside
    assert "accuracy |" not in beside


def test_the_card_says_how_the_clips_were_divided_and_what_chose_the_weights():
    lists = without(RECIPE, "train_folds", "validation_folds", "test_folds")
    lists |= {"validation_list": "dev.txt", "test_list": "test.txt"}
    card = model_card(METRICS, lists, TEMPLATE, "me/x", set())
    assert "those in `dev.txt` to choose the checkpoint, those in `test.txt` to test, the others to train." in card
    last = RECIPE | {"validation_folds": ["3"], "test_folds": ["3"]}
    card = model_card(METRICS | {"chosen_by": None}, last, TEMPLATE, "me/x", set())
    assert "3 to watch the training, 3 to test." in card and "those of the last step, which no score chose" in card
    assert "were scored while it trained and at the end, in fp32" in card and "to choose" not in card


def test_figures_that_were_not_measured_are_left_out():
    comparison = copy.deepcopy(COMPARISON)
    comparison["sides"][0]["seconds_a_step"] = comparison["sides"][1]["error_reduction_percent"] = None
    card = model_card(without(METRICS, "train_runtime"), RECIPE, TEMPLATE, "me/x", set(), comparison)
    assert "nan" not in card.lower().replace("finance", "") and "None" not in card and ".png" not in card
    assert "seconds a step" not in card and " min" not in card and "50.0 %" not in card


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/data/us8k", "us8k"),
        ("/home/jo smith/my runs/x/", "x"),
        ("~/data/us8k.parquet", "us8k.parquet"),
        ("../data/us8k", "us8k"),
        ("--dataset=/data/my set/us8k", "--dataset=us8k"),
        (r"C:\Users\jo\us8k", "us8k"),
        ('{"path": "/data/x"}', '{"path": "x"}'),
        ("- baseline: /data/runs/a_baseline", "- baseline: a_baseline"),
        ("/data/a.wav: empty", "a.wav: empty"),
        ("damaged (/data/a.wav)", "damaged (a.wav)"),
        ("danavery/urbansound8K", "danavery/urbansound8K"),
        ("configs/quickstart.yaml", "configs/quickstart.yaml"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("samples/s and 1 / 2", "samples/s and 1 / 2"),
    ],
)
def test_paths_of_this_machine_become_their_last_part(text, published):
    assert without_paths(text) == published
    assert without_paths({"a": [text, 1, None]}) == {"a": [published, 1, None]}


SECRET = "correct-horse-battery"
LEAKS = {
    "what looks like a token": b"x hf_AbCdEfGhIjKlMnOpQrStUv",
    "the token of the Hub": WRITE_TOKEN.encode(),
    "the value of the environment variable WANDB_API_KEY": SECRET.encode(),
    "a path in the home folder": b"/nowhere/jo/data",
    "a path in a home folder": b"see /gpfs/home/alice/data",
    "the name of this machine": b"ran on node-17",
}


@pytest.mark.parametrize("what", LEAKS)
@pytest.mark.parametrize("name", ["config.yaml", "README.md", "predictions.parquet", "model.safetensors"])
def test_whatever_must_not_leave_is_found(what, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HOME", "/nowhere/jo")
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17.cluster")
    content = LEAKS[what]
    if name == "predictions.parquet":
        content = pandas.DataFrame({"clip": ["a", content.decode()], "logits": [[0.0], [1.0]]}).to_parquet()
    (tmp_path / "metrics.json").write_text("{}")
    is_weights = name == "model.safetensors"
    (tmp_path / name).write_bytes(b"\0\1\2" * 5 + content if is_weights else content)
    if is_weights and what in ("a path in a home folder", "the name of this machine"):
        check_staged(tmp_path)  # weights may hold any bytes
        return
    with pytest.raises(PublishError, match=f"{name} holds {what}.*nothing was sent") as error:
        check_staged(tmp_path)
    assert SECRET not in str(error.value) and "hf_" not in str(error.value)


def test_a_secret_between_two_pieces_of_a_large_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr("audio_dendrites.publishing.content.PIECE", 1000)
    monkeypatch.setattr("audio_dendrites.publishing.content.OVERLAP", 50)
    (tmp_path / "model.safetensors").write_bytes(bytes(1990) + SECRET.encode() + bytes(5000))
    with pytest.raises(PublishError, match="model.safetensors holds the value of the environment variable WANDB"):
        check_staged(tmp_path)


def test_ordinary_words_of_the_environment_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "accuracy")
    monkeypatch.setattr(socket, "gethostname", lambda: "audio")
    (tmp_path / "README.md").write_text("audio accuracy")
    check_staged(tmp_path)


def test_an_unfinished_or_broken_run_is_not_published(tmp_path):
    (stage := tmp_path / "stage").mkdir()
    with pytest.raises(PublishError, match="has no metrics.json"):
        stage_run(tmp_path, stage)
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(PublishError, match="has no model.safetensors"):
        stage_run(tmp_path, stage)


def test_an_older_run_folder_says_by_its_paths_what_is_local(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(without(METRICS, "local") | {"dataset": str(tmp_path)}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(RECIPE | {"dataset": str(tmp_path)}))
    metrics, recipe, comparison = read_reports(tmp_path)
    assert metrics["local"] == ["dataset"] and metrics["dataset"] == recipe["dataset"] == tmp_path.name
    assert comparison is None
    (tmp_path / "comparison.json").write_text(json.dumps({"baseline": {"runs": ["a"]}}))
    with pytest.raises(PublishError, match="comparison.json must list `sides`.*compare the runs again"):
        read_reports(tmp_path)


def test_a_run_folder_has_a_repository_of_its_own():
    folders = ("runs/quickstart", "runs/urbansound8k/ast_pai", "/data/my runs/x (2)", "/data/runs/a/b/")
    assert [default_hub_model_id(folder) for folder in folders] == ["quickstart", "urbansound8k-ast_pai", "x-2", "a-b"]


def test_all_checkpoints_is_no_strategy_here():
    with pytest.raises(UserError, match="hub_strategy must be end or every_save or checkpoint, got 'all_ch"):
        parse_recipe(["--hub_strategy", "all_checkpoints"])


def test_runs_for_the_trackers_are_named_after_their_folders():
    recipe = parse_recipe(["--output_dir", "runs/esc50/ast", "--pai", "{}"])
    assert [one.training.run_name for one in (recipe, recipe.baseline())] == ["esc50-ast", "esc50-ast_baseline"]
    recipe = parse_recipe(["--run_name", "mine", "--pai", "{}"])
    assert [one.training.run_name for one in (recipe, recipe.baseline())] == ["mine", "mine_baseline"]
