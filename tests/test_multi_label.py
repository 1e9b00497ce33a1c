"""Clips with lists of labels: from the column of lists to the pipeline's sigmoid."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import TINY_AST, TINY_CNN14, TONES, write_run
from matplotlib.image import imread
from pandas import DataFrame, Series
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import pipeline
from transformers.trainer_utils import EvalPrediction

import crossval
import train
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.splits import class_names, drawn_splits, encode_labels, split_by_fold
from audio_dendrites.errors import UserError
from audio_dendrites.publishing.content import stage_run
from audio_dendrites.recipes import DataArguments, RunArguments, parse_recipe
from audio_dendrites.results.comparison import write_comparison
from audio_dendrites.results.folds import summary
from audio_dendrites.results.metrics import compute_metrics
from audio_dendrites.results.scores import score
from audio_dendrites.results.tables import scores_table
from audio_dendrites.training.losses import classification_loss, resolve_loss
from compare import main as compare
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
    with pytest.raises(UserError, match=r"must be labels of the recipe \(high, middle\), got 'low'"):
        class_names(index, split_by_fold(index, data), arguments(chords, labels=["high", "middle"]))


def test_drawn_shares_spread_the_rare_classes():
    names = [["a"] * (row % 2 == 0) + ["b"] * (row % 3 == 0) + ["rare"] * (row % 20 == 0) for row in range(200)]
    index = DataFrame({"label": names, "clip": [f"{row:03}" for row in range(200)]})
    index["group"] = index["clip"]
    splits = Series(drawn_splits(index, DataArguments(split_shares=[0.6, 0.2, 0.2])))
    assert splits[index["label"].map(lambda found: "rare" in found)].value_counts().to_dict() == {
        "train": 6, "validation": 2, "test": 2,
    }  # fmt: skip


@pytest.mark.parametrize("hard", [False, True])
def test_binary_cross_entropy_is_the_mean_over_clips_and_classes(hard):
    logits, labels = torch.randn(6, 4), (torch.rand(6, 4) > 0.5).float()
    targets = torch.eye(4)[labels.argmax(1)] if hard else labels  # hard: one class each, against the rest
    labels = labels.argmax(1) if hard else labels

    def loss(rows, entries=None):
        return classification_loss(SimpleNamespace(logits=logits[rows]), labels[rows], entries, loss="bce")

    whole = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert torch.allclose(loss(slice(6)), whole)
    assert torch.allclose(loss(slice(2), labels.numel()) + loss(slice(2, 6), labels.numel()), whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--loss", "cross_entropy"], "loss must be bce or auto for clips with lists of labels, got cross_entropy"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor must be 0 with loss: bce"),
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


def test_mean_average_precision_and_auc_are_those_of_scikit_learn_over_the_classes_that_occur():
    random = np.random.default_rng(0)
    scores, references = random.standard_normal((50, 5)).astype(np.float32), random.random((50, 5)) > 0.7
    references[:, 3] = False
    scores = scores.round(1)  # some are equal
    found = compute_metrics(EvalPrediction(scores, references.astype(np.float32)))
    sigmoids, there = 1 / (1 + np.exp(-scores.astype(float))), [0, 1, 2, 4]
    truth, sigmoids = references[:, there], sigmoids[:, there]
    auc = roc_auc_score(truth, sigmoids)
    assert found == pytest.approx(
        {"mAP": average_precision_score(truth, sigmoids), "AUC": auc, "d_prime": 2**0.5 * norm.ppf(auc)}
    )
    perfect = compute_metrics(EvalPrediction(references.astype(np.float32), references.astype(np.float32)))
    assert perfect["AUC"] == 1 and 6 < perfect["d_prime"] < 7


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
    assert metrics["test"].keys() == {"mAP", "AUC", "d_prime", "clips", "per_class", "folds"}
    assert metrics["chosen_by"] == "mAP"
    truth = np.array([["high" in found, "low" in found] for found in predictions["label"]])
    assert metrics["test"]["mAP"] == pytest.approx(average_precision_score(truth, logits))
    assert metrics["test"]["per_class"]["low"]["positives"] == truth[:, 1].sum()
    assert (folder / "average_precision.png").exists() and "average_precision.png" in (folder / "README.md").read_text()
    assert "average_precision" in capsys.readouterr().out and score(predictions, ["high", "low"]) == {
        name: value for name, value in metrics["test"].items() if name != "folds"
    }
    classify = pipeline("audio-classification", model=str(folder))
    assert classify.model.config.problem_type == "multi_label_classification"
    table, found, _ = summary([folder, folder])
    assert found["mean"] == {name: metrics["test"][name] for name in ("mAP", "AUC", "d_prime")} and not found["pooled"]
    assert "| mean " in table and "AUC" in scores_table(metrics)


def test_one_class_against_the_rest_is_the_sigmoid_too(recipe, tmp_path, capsys):
    train.main(
        parse_recipe(
            [recipe, "--label_column", "kind", "--loss", "bce", "--metric_for_best_model", "accuracy", "--architecture",
             "cnn14", "--model_config", json.dumps(TINY_CNN14)]
        )
    )  # fmt: skip
    assert "Loaded by pipeline, scores within" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    predictions = pandas.read_parquet(tmp_path / "run" / "predictions.parquet")
    assert metrics["test"] == score(predictions, ["high", "low"], "bce") | {"folds": ["3"]}
    assert "accuracy" in metrics["test"] and (tmp_path / "run" / "confusion_matrix.png").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


PAI = {"first_growth": 0.3}
NEEDS_PAI = pytest.mark.skipif(find_spec("perforatedai") is None, reason="perforatedai has no wheel for this Python")


@NEEDS_PAI
def test_a_multi_label_recipe_with_a_baseline_ends_with_a_comparison_by_mAP(recipe, tmp_path, capsys):
    options = ["--num_train_epochs", "3", "--load_best_model_at_end", "false"]  # the best may be one without dendrites
    train.main(parse_recipe([recipe, "--baseline", "true", "--pai", json.dumps(PAI), *options]))
    printed = capsys.readouterr().out
    folders = [tmp_path / "run_baseline", tmp_path / "run"]
    scores = [json.loads((folder / "metrics.json").read_text())["test"]["mAP"] for folder in folders]
    found = json.loads((folders[0] / "comparison.json").read_text())
    baseline, dendritic = found["sides"]
    assert [side["mAP"]["mean"] for side in found["sides"]] == pytest.approx(scores)
    assert dendritic["parameters"] > baseline["parameters"] and "points of mAP (95 %" in printed
    page = (folders[1] / "comparison.md").read_text()
    assert f"| baseline  | 1    | {scores[0]:.4f} " in page and "8 test clips of 4 source recordings" in page
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert dendritic["verdict"] in card and "8 clips of 4 source recordings" in card and "McNemar" not in card
        (staged := tmp_path / f"staged-{folder.name}").mkdir()
        stage_run(folder, staged)
        assert '"mAP"' in (staged / "comparison.json").read_text()


@NEEDS_PAI
def test_cross_validation_compares_multi_label_runs_over_all_folds(recipe, tmp_path, capsys):
    crossval.main([recipe, "--baseline", "true", "--pai", json.dumps(PAI), "--folds", "1", "2"])
    runs = [json.loads(path.read_text())["test"]["mAP"] for path in sorted(tmp_path.glob("run/*/metrics.json"))]
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    baseline, dendritic = (side["mAP"]["mean"] for side in found["sides"])
    assert len(runs) == 4 and baseline == pytest.approx(np.mean(runs[1::2]))  # their names end longer
    assert dendritic == pytest.approx(np.mean(runs[::2])) and found["clips"] == 16
    assert found["sides"][1]["over_runs"] and "| dendritic | 2 " in capsys.readouterr().out


CLIPS = [["high"], ["low"], ["low", "high"], [], ["high"], ["low"]]  # two a source recording


def chord_run(folder, high, low, clips=range(6), **fields):
    """A run folder with these logits of the classes."""
    truth = fields.pop("label", [CLIPS[clip % 6] for clip in clips])
    return write_run(folder, fields.pop("labels", ["high", "low"]), clips, truth, np.transpose([high, low]), **fields)


def test_two_multi_label_runs_are_compared_by_mAP_alone(tmp_path, capsys):
    # The baseline has the clips of high at ranks 1, 2 and 4, those of low at 1, 3 and 6, the other side at 1 to 3.
    baseline = chord_run(tmp_path / "base", high=[6, 4, 5, 2, 3, 1], low=[5, 6, 4, 3, 2, 1])
    dendritic = chord_run(tmp_path / "dend", high=[6, 1, 5, 2, 4, 3], low=[1, 6, 5, 2, 3, 4], parameters=1055)
    compare([str(baseline), str(dendritic)])
    before = ((1 + 1 + 3 / 4) / 3 + (1 + 2 / 3 + 3 / 6) / 3) / 2
    printed, page = capsys.readouterr().out, (tmp_path / "dend" / "comparison.md").read_text()
    sides = json.loads((tmp_path / "base" / "comparison.json").read_text())["sides"]
    assert sides[0]["mAP"]["mean"] == pytest.approx(before) and sides[1]["mAP"]["mean"] == 1
    for row in ("| baseline  | 1    | 0.8194 | 20 ", "| dendritic        | mAP   | +18.06 | "):
        assert row in printed and row in page
    found = sides[1]["mAP"]
    assert (found["low"] > 0) == (found["p"] < 0.05) and "points of mAP (95 % interval" in sides[1]["verdict"]
    # The order of a clip's classes does not matter.
    turned = chord_run(
        tmp_path / "turned", high=[6, 4, 5, 2, 3, 1], low=[5, 6, 4, 3, 2, 1], label=[c[::-1] for c in CLIPS]
    )
    compare([str(baseline), str(turned)])
    same = json.loads((tmp_path / "turned" / "comparison.json").read_text())["sides"][1]["mAP"]
    assert same["low"] == same["high"] == 0 and same["p"] == 1
    assert "accuracy" not in sides[1] and "McNemar" not in page
    picture = imread(tmp_path / "dend" / "comparison.png")
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05


def test_the_mAP_of_a_side_is_the_mean_of_its_runs_each_over_its_own_clips(tmp_path):
    sides = {"base": [], "dend": []}
    for fold in (range(0, 4), range(4, 8)):
        for seed in (0, 1):
            logits = np.random.default_rng(seed).standard_normal((2, len(fold))) + 1000 * fold.start
            sides["base"].append(chord_run(tmp_path / f"base-{fold.start}-{seed}", *logits, clips=fold))
        right = [[name in CLIPS[clip % 6] for clip in fold] for name in ("high", "low")]
        # Rightly ordered in each fold, but in another scale: of all clips together, they would not be.
        logits = np.array(right) - 1000.0 * fold.start
        sides["dend"].append(chord_run(tmp_path / f"dend-{fold.start}", *logits, clips=fold))
    write_comparison(sides, tmp_path)
    base, dend = json.loads((tmp_path / "comparison.json").read_text())["sides"]
    runs = [json.loads((folder / "metrics.json").read_text())["test"]["mAP"] for folder in sides["base"]]
    assert base["mAP"]["mean"] == pytest.approx(np.mean(runs)) and dend["mAP"]["mean"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [["high"], ["low"], ["high"], [], ["high"], ["low"]]}, r"differ in the label of 1 clips \(c02\)"),
        ({"label": ["high", "low", "high", "low", "high", "low"]}, "differ in the label of 6 clips"),
        ({"labels": ["low", "high"]}, "labels: the runs must have the same"),
    ],
)
def test_multi_label_runs_that_cannot_be_compared_say_why(tmp_path, changes, message):
    base = chord_run(tmp_path / "base", high=range(6), low=range(6))
    other = chord_run(tmp_path / "dend", high=range(6), low=range(6), **changes)
    with pytest.raises(UserError, match=message):
        compare([str(base), str(other)])


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")  # of the run without classes
def test_sides_that_were_tested_by_other_folds_have_no_score_in_common(tmp_path):
    whole = chord_run(tmp_path / "whole", high=range(6), low=range(6))
    parts = [chord_run(tmp_path / str(n), high=range(3), low=range(3), clips=range(n, n + 3)) for n in (0, 3)]
    with pytest.raises(UserError, match="parts: the test folds must be those of whole"):
        write_comparison({"whole": [whole], "parts": parts}, tmp_path)
    silent = [chord_run(tmp_path / name, range(6), range(6), label=[[]] * 6, test={}) for name in ("one", "two")]
    with pytest.raises(
        UserError, match="one: test clips with a class must come from two source recordings or more, got 0"
    ):
        compare([str(folder) for folder in silent])
