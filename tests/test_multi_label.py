"""Clips with lists of labels: from the column of lists to the pipeline's sigmoid."""

import json
from importlib.util import find_spec

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import TINY_AST, TINY_CNN14, TONES
from matplotlib.image import imread
from pandas import DataFrame, Series
from sklearn.metrics import average_precision_score
from transformers import pipeline
from transformers.trainer_utils import EvalPrediction

import compare
import crossval
import train
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.splits import class_names, drawn_splits, encode_labels, split_by_fold
from audio_dendrites.errors import UserError
from audio_dendrites.publishing.content import outgoing
from audio_dendrites.recipes import DataArguments, RunArguments, parse_recipe
from audio_dendrites.results.metrics import compute_metrics
from audio_dendrites.results.scores import score
from audio_dendrites.results.tables import scores_table
from audio_dendrites.training.losses import classification_loss, resolve_loss
from data_collator import AugmentedClips, SpectrogramCollator, WaveformCollator


def arguments(dataset, **changes):
    return DataArguments(**{"dataset": str(dataset), **TONES, "label_column": "kinds", **changes})


@pytest.mark.parametrize("column", ["kinds", "numbers"])
def test_a_column_of_lists_gives_a_number_for_each_class(chords, column):
    data = arguments(chords, label_column=column)
    _, index = load_clips(data)
    labels = class_names(index, split_by_fold(index, data), data)
    assert labels == ["high", "low"] and index["label"][5] in (["low", "high"], ["high", "low"])
    encoded = encode_labels(index["label"], labels)
    assert encoded.dtype == np.float32
    assert encoded[:6].tolist() == [[0, 1], [1, 0], [1, 1], [0, 0], [0, 1], [1, 1]]
    with pytest.raises(UserError, match="'low', which is not among high, middle"):
        class_names(index, split_by_fold(index, data), arguments(chords, labels=["high", "middle"]))


def test_drawn_shares_spread_the_rare_classes():
    names = [["a"] * (row % 2 == 0) + ["b"] * (row % 3 == 0) + ["rare"] * (row % 20 == 0) for row in range(200)]
    index = DataFrame({"label": names, "clip": [f"{row:03}" for row in range(200)]})
    index["group"] = index["clip"]
    splits = Series(drawn_splits(index, DataArguments(split_shares=[0.6, 0.2, 0.2])))
    assert splits[index["label"].map(lambda found: "rare" in found)].value_counts().to_dict() == {
        "train": 6, "validation": 2, "test": 2,
    }  # fmt: skip


def test_binary_cross_entropy_is_the_mean_over_clips_and_classes():
    logits, labels = torch.randn(6, 4), (torch.rand(6, 4) > 0.5).float()
    whole = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def loss(rows, labels, entries=None):
        return classification_loss(type("Outputs", (), {"logits": logits[rows]}), labels[rows], entries, loss="bce")

    assert torch.allclose(loss(slice(6), labels), whole)
    assert torch.allclose(loss(slice(2), labels, 24) + loss(slice(2, 6), labels, 24), whole)
    hard = labels.argmax(1)  # one class each, against the rest
    whole = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(4)[hard])
    assert torch.allclose(loss(slice(2), hard, 6) + loss(slice(2, 6), hard, 6), whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--loss", "cross_entropy"], "loss must be bce or auto for clips with lists of labels, got cross_entropy"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor: found 0.1"),
        (["--metric_for_best_model", "eval_accuracy"], "metric_for_best_model must be one of mAP, loss for clips with"),
        (["--pai", '{"metric": "macro_f1"}'], "pai: metric must be one of mAP, loss for clips .* got macro_f1"),
    ],
)
def test_what_multi_label_clips_cannot_have_is_an_error_before_the_features(recipe, fields, message):
    with pytest.raises(UserError, match=message):
        train.main(parse_recipe([recipe, *fields]))


def test_auto_is_the_loss_of_the_labels():
    assert resolve_loss(RunArguments("x"), False) == "cross_entropy"
    assert resolve_loss(RunArguments("x", metric_for_best_model="mAP"), True) == "bce"
    assert resolve_loss(RunArguments("x", loss="bce"), False) == "bce"


@pytest.mark.parametrize("collator", [SpectrogramCollator, WaveformCollator])
def test_mixup_mixes_vectors_of_labels(collator):
    shape = (4000,) if collator is WaveformCollator else (40, 128)
    vectors = [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    examples = [{"input_values": torch.randn(shape), "labels": np.float32(vector)} for vector in vectors]
    plain = collator(max_length=24)(examples)["labels"]
    assert torch.equal(plain, torch.tensor(vectors).float())
    draws = [AugmentedClips(examples, seed=1)[row] for row in range(3)]
    mixed = collator(max_length=24, num_labels=3, mixup_alpha=10)(draws)["labels"]
    weights = mixed[0, 0]  # of the first; the last one's too has the class 0
    assert mixed[0, 0] == 1 and 0 < mixed[0, 1] < 1 and mixed[0, 2] == 0 and weights.dtype == torch.float32
    assert torch.isclose(mixed[1, 0] + mixed[1, 2], torch.tensor(1.0)) and mixed[1, 0] == mixed[1, 1]


def test_mean_average_precision_is_that_of_scikit_learn_over_the_classes_that_occur():
    random = np.random.default_rng(0)
    scores, references = random.standard_normal((50, 5)).astype(np.float32), random.random((50, 5)) > 0.7
    references[:, 3] = False
    there = [0, 1, 2, 4]
    found = compute_metrics(EvalPrediction(scores, references.astype(np.float32)))
    sigmoids = 1 / (1 + np.exp(-scores.astype(float)))
    assert found == {
        "mAP": pytest.approx(average_precision_score(references[:, there], sigmoids[:, there], average="macro"))
    }


@pytest.fixture
def recipe(chords, tmp_path):
    fields = TONES | {
        "dataset": str(chords), "label_column": "kinds", "output_dir": str(tmp_path / "run"), "max_length": 48,
        "model_config": TINY_AST, "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 3e-3,
        "precision": "fp32", "preprocessing_num_workers": 1, "mixup_alpha": 0.5, "metric_for_best_model": "mAP",
        "report_to": ["none"],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return str(tmp_path / "recipe.yaml")


def test_a_multi_label_run_ends_with_a_model_whose_pipeline_gives_sigmoids(recipe, tmp_path, capsys):
    train.main(parse_recipe([recipe]))
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = pandas.read_parquet(folder / "predictions.parquet")
    assert [sorted(found) for found in predictions["label"]][:3] == [["low"], ["high", "low"], ["low"]]
    logits = np.stack(predictions["logits"])
    assert [list(found) for found in predictions["predicted"]] == [
        [name for name, logit in zip(("high", "low"), row, strict=True) if logit > 0] for row in logits
    ]
    assert metrics["test"].keys() == {"mAP", "clips", "per_class", "folds"} and metrics["chosen_by"] == "mAP"
    truth = np.array([["high" in found, "low" in found] for found in predictions["label"]])
    assert metrics["test"]["mAP"] == pytest.approx(average_precision_score(truth, logits))
    assert metrics["test"]["per_class"]["low"]["positives"] == truth[:, 1].sum()
    assert (folder / "average_precision.png").exists() and "average_precision.png" in (folder / "README.md").read_text()
    assert "average_precision" in capsys.readouterr().out and score(predictions, ["high", "low"]) == {
        name: value for name, value in metrics["test"].items() if name != "folds"
    }
    classify = pipeline("audio-classification", model=str(folder))
    assert classify.model.config.problem_type == "multi_label_classification"
    table, found, _ = crossval.summary([folder, folder])
    assert found["mean"] == {"mAP": metrics["test"]["mAP"]} and "| mean " in table and "mAP" in scores_table(metrics)


def test_one_class_against_the_rest_is_the_sigmoid_too(recipe, tmp_path, capsys):
    train.main(
        parse_recipe(
            [recipe, "--label_column", "kind", "--loss", "bce", "--metric_for_best_model", "accuracy", "--architecture",
             "cnn14", "--model_config", json.dumps(TINY_CNN14)]
        )
    )  # fmt: skip
    assert "Loaded by pipeline, scores within" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "accuracy" in metrics["test"] and (tmp_path / "run" / "confusion_matrix.png").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


PAI = {"max_dendrites": 1, "schedule": "every", "stop_when_complete": False}
NEEDS_PAI = pytest.mark.skipif(find_spec("perforatedai") is None, reason="perforatedai has no wheel for this Python")


@NEEDS_PAI
def test_a_multi_label_recipe_with_a_baseline_ends_with_a_comparison_by_mAP(recipe, tmp_path, capsys):
    options = ["--num_train_epochs", "3", "--load_best_model_at_end", "false"]  # the best may be one without dendrites
    train.main(parse_recipe([recipe, "--baseline", "true", "--pai", json.dumps(PAI), *options]))
    printed = capsys.readouterr().out
    folders = [tmp_path / "run_baseline", tmp_path / "run"]
    scores = [json.loads((folder / "metrics.json").read_text())["test"]["mAP"] for folder in folders]
    found = json.loads((folders[0] / "comparison.json").read_text())
    assert [found["baseline"]["mAP"], found["dendritic"]["mAP"]] == pytest.approx(scores)
    assert found["dendritic"]["parameters"] > found["baseline"]["parameters"] and "points of mAP (95 %" in printed
    page = (folders[1] / "comparison.md").read_text()
    assert f"| mAP             | {scores[0]:.4f} " in page and "8 test clips of 4 source recordings" in page
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert found["verdict"] in card and "- test clips: 8" in card and "McNemar" not in card
        assert b'"mAP"' in outgoing(folder)["comparison.json"]


@NEEDS_PAI
def test_cross_validation_compares_multi_label_runs_over_all_folds(recipe, tmp_path, capsys):
    crossval.main([recipe, "--baseline", "true", "--pai", json.dumps(PAI), "--folds", "1", "2"])
    runs = [json.loads(path.read_text())["test"]["mAP"] for path in sorted(tmp_path.glob("run/*/metrics.json"))]
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert len(runs) == 4 and found["baseline"]["mAP"] == pytest.approx(np.mean(runs[1::2]))  # their names end longer
    assert found["dendritic"]["mAP"] == pytest.approx(np.mean(runs[::2])) and found["clips"] == 16
    assert "| runs            | 2 " in capsys.readouterr().out


CLIPS = [["high"], ["low"], ["low", "high"], [], ["high"], ["low"]]  # two a source recording


def write_run(folder, high, low, clips=range(6), **fields):
    """A run folder with these logits of the classes."""
    folder.mkdir(parents=True)
    labels = fields.pop("label", [CLIPS[clip] for clip in clips])
    DataFrame(
        {
            "clip": [f"c{clip}" for clip in clips], "fold": "1", "group": [str(clip // 2) for clip in clips],
            "label": labels, "predicted": [[]] * len(labels), "logits": list(np.float32([high, low]).T),
        }
    ).to_parquet(folder / "predictions.parquet", index=False)  # fmt: skip
    metrics = {
        "dataset": "chords", "labels": ["high", "low"], "test": {}, "parameters": 1000, "steps": 20,
        "train_steps_per_second": 2.0,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics | fields))
    return str(folder)


def test_two_multi_label_runs_leave_a_table_a_page_and_a_picture(tmp_path, capsys):
    # The baseline has the clips of high at ranks 1, 2 and 4, those of low at 1, 3 and 6, the other side at 1 to 3.
    baseline = write_run(tmp_path / "base", high=[6, 4, 5, 2, 3, 1], low=[5, 6, 4, 3, 2, 1])
    dendritic = write_run(tmp_path / "dend", high=[6, 1, 5, 2, 4, 3], low=[1, 6, 5, 2, 3, 4], parameters=1055)
    compare.main([baseline, dendritic])
    before = ((1 + 1 + 3 / 4) / 3 + (1 + 2 / 3 + 3 / 6) / 3) / 2
    printed, page = capsys.readouterr().out, (tmp_path / "dend" / "comparison.md").read_text()
    found = json.loads((tmp_path / "base" / "comparison.json").read_text())
    assert found["baseline"]["mAP"] == pytest.approx(before) and found["dendritic"]["mAP"] == 1
    for row in (
        "| mAP             | 0.8194   | 1.0000    | +18.06 points |",
        "| mAP of the runs | 0.8194   | 1.0000    | ",
        "| parameters      | 1,000    | 1,055     | +5.50 % ",
    ):
        assert row in printed and row in page
    low_end, high_end = (100 * end for end in found["interval"])
    assert f"points of mAP (95 % interval {low_end:+.2f} to {high_end:+.2f} by source recording)." in found["verdict"]
    assert found["significant"] == (low_end > 0) and found["verdict"] in page and "interval excludes 0" in page
    assert "6 test clips of 3 source recordings" in page and "both sides and all runs by\nthe same draw" in page
    assert not {"p", "error_reduction_percent"} & found.keys() and "rror" not in page + printed
    picture = imread(tmp_path / "dend" / "comparison.png")
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05


def test_the_mAP_of_a_side_is_the_mean_of_its_runs_each_over_its_own_clips(tmp_path):
    folds, sides = [range(0, 2), range(2, 6)], {"base": [], "dend": []}
    for fold in folds:
        for seed in (0, 1):
            logits = np.random.default_rng(seed).standard_normal((2, len(fold))) + 1000 * fold.start
            sides["base"].append(write_run(tmp_path / f"base-{fold.start}-{seed}", *logits, clips=fold))
        right = [[name in CLIPS[clip] for clip in fold] for name in ("high", "low")]
        # Rightly ordered in each fold, but in another scale: of all clips together, they would not be.
        logits = np.array(right) - 1000.0 * fold.start
        sides["dend"].append(write_run(tmp_path / f"dend-{fold.start}", *logits, clips=fold))
    compare.main(["--baseline", *sides["base"], "--dendritic", *sides["dend"], "--output", str(tmp_path)])
    found = json.loads((tmp_path / "comparison.json").read_text())
    runs = [score(pandas.read_parquet(f"{folder}/predictions.parquet"), ["high", "low"]) for folder in sides["base"]]
    assert found["baseline"]["mAP"] == pytest.approx(np.mean([run["mAP"] for run in runs]))
    assert found["dendritic"]["mAP"] == 1 and found["interval"][0] >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [["high"], ["low"], ["high"], [], ["high"], ["low"]]}, r"differ in the label of 1 clips \(c2\)"),
        ({"label": ["high", "low", "high", "low", "high", "low"]}, "differ in the label of 6 clips"),
        ({"labels": ["low", "high"]}, "labels: .*base was tested on"),
    ],
)
def test_multi_label_runs_that_cannot_be_compared_say_why(tmp_path, changes, message):
    base = write_run(tmp_path / "base", high=range(6), low=range(6))
    other = write_run(tmp_path / "dend", high=range(6), low=range(6), **changes)
    with pytest.raises(UserError, match=message):
        compare.main([base, other])


def test_sides_that_were_tested_by_other_folds_have_no_mAP_in_common(tmp_path):
    whole = write_run(tmp_path / "whole", high=range(6), low=range(6))
    parts = [write_run(tmp_path / str(n), high=range(3), low=range(3), clips=range(n, n + 3)) for n in (0, 3)]
    with pytest.raises(UserError, match="wanted the same test folds on both sides"):
        compare.main(["--baseline", whole, "--dendritic", *parts])
    empty = [write_run(tmp_path / name, high=[0], low=[0], clips=[3]) for name in ("one", "two")]
    with pytest.raises(UserError, match="no test clip has a class"):
        compare.main(empty)


def test_the_order_of_a_clips_classes_does_not_matter(tmp_path):
    base = write_run(tmp_path / "base", high=range(6), low=range(6))
    turned = write_run(tmp_path / "dend", high=range(6), low=range(6), label=[names[::-1] for names in CLIPS])
    compare.main([base, turned])
    found = json.loads((tmp_path / "dend" / "comparison.json").read_text())
    assert found["interval"] == [0, 0] and found["verdict"].startswith("The difference is not significant: +0.00")
