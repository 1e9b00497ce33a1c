import json
import platform
import shutil
import subprocess

import evaluate
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from pandas import DataFrame
from transformers.trainer_utils import PredictionOutput

from audio_dendrites.results.metrics import Accuracy, MacroF1, MeanAveragePrecision, PerClassAccuracy
from audio_dendrites.results.plots import plot_confusion, plot_learning_curves
from audio_dendrites.results.report import commit_of, environment
from audio_dendrites.results.scores import predictions_table, score
from audio_dendrites.results.tables import markdown_table

LOGITS = [[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 2.0, 0.0], [0.0, 1.0, 4.0]]
LABELS = [0, 1, 0, 2]  # the third clip is taken for class 1


def test_metrics_agree_with_a_count_by_hand():
    answers = [
        metric().compute(predictions=LOGITS, references=LABELS) for metric in (Accuracy, MacroF1, PerClassAccuracy)
    ]
    assert answers[0] == {"accuracy": 0.75}
    assert answers[1]["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert answers[2] == {"per_class_accuracy": {0: 0.5, 1: 1.0, 2: 1.0}}


def test_mean_average_precision_by_hand():
    # Class 0 ranks its clips first and second: 1. So do the others their one clip.
    assert MeanAveragePrecision().compute(predictions=LOGITS, references=LABELS) == {"mAP": 1.0}
    # Class 0 has its clips at ranks 1 and 3 of 3: (1 + 2/3) / 2; class 1 its clip at rank 2: 1/2.
    scores = [[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]
    found = MeanAveragePrecision().compute(predictions=scores, references=[0, 1, 0])["mAP"]
    assert found == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)


@pytest.mark.parametrize(("loss", "expected"), [("cross_entropy", 1), ("bce", 3 / 4)])
def test_clips_are_ranked_by_the_probabilities_of_the_loss(loss, expected):
    # By the softmax both classes have their clip first. By the sigmoid that of class 0 comes second: (1/2 + 1) / 2.
    predictions = DataFrame({"label": ["cat", "dog"], "logits": [[1.0, 0.0], [2.0, 3.0]]})
    assert score(predictions, ["cat", "dog"], loss)["mAP"] == expected


def test_metrics_combine_and_are_evaluates_own_kind():
    both = evaluate.combine([Accuracy(), MacroF1()])
    assert both.compute(predictions=LOGITS, references=LABELS).keys() == {"accuracy", "macro_f1"}
    assert isinstance(Accuracy(), evaluate.Metric) and "highest score" in Accuracy().description


def table():
    names = ["cat", "dog", "owl"]
    return DataFrame(
        {
            "clip": list("abcd"),
            "fold": ["1"] * 4,
            "group": list("aabb"),
            "label": [names[i] for i in LABELS],
            "predicted": [names[np.argmax(row)] for row in LOGITS],
            "logits": [np.array(row, dtype=np.float32) for row in LOGITS],
        }
    )


def test_predictions_keep_the_source_recording():
    index = table().drop(columns=["predicted", "logits"])
    found = predictions_table(index, PredictionOutput(np.array(LOGITS), None, None), ["cat", "dog", "owl"])
    assert found.columns.tolist() == ["clip", "fold", "group", "label", "predicted", "logits"]
    assert found.drop(columns="logits").equals(table().drop(columns="logits"))


def test_scores_by_class_have_names_and_counts():
    scores = score(table(), ["cat", "dog", "owl"])
    assert scores["accuracy"] == 0.75 and scores["clips"] == 4
    assert scores["per_class"]["cat"] == {"accuracy": 0.5, "f1": pytest.approx(2 / 3), "clips": 2}
    assert json.loads(json.dumps(scores)) == scores


def test_a_class_without_clips_is_left_out_rather_than_scored():
    assert score(table(), ["cat", "dog", "owl", "yak"])["per_class"].keys() == {"cat", "dog", "owl"}


def test_tables_align():
    assert markdown_table([["class", "clips"], ["air", 10], ["gun_shot", 3]]).splitlines() == [
        "| class    | clips |",
        "| -------- | ----: |",
        "| air      |    10 |",
        "| gun_shot |     3 |",
    ]


def test_plots_are_pictures_with_something_on_them(tmp_path):
    plot_confusion(table(), ["cat", "dog", "owl"], "title", tmp_path / "confusion.png")
    log = [{"epoch": e, "loss": 1 / e, "learning_rate": 0.1} for e in (1, 2)]
    log += [{"epoch": e, "eval_loss": 2 / e, "eval_accuracy": e / 3} for e in (1, 2)]
    plot_learning_curves(log, "accuracy", tmp_path / "curves.png")
    for name in ("confusion.png", "curves.png"):
        picture = imread(tmp_path / name)
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.05
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written is left


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_the_device_is_named_truthfully(device):
    assert environment(torch.device(device))["hardware"] == f"{device.upper()} ({platform.machine()})"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_clone_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "--quiet"], [*identity, "commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert len(found := commit_of(tmp_path)) >= 7 and head.startswith(found)
    assert commit_of(tmp_path / "site-packages") is None
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) is None


def test_the_commit_of_an_installation_is_known_without_git(tmp_path, monkeypatch):
    notes = tmp_path / "audio_dendrites-0.1.0.dist-info"  # as pip writes it after `pip install git+https://…`
    notes.mkdir()
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: audio-dendrites\nVersion: 0.1.0\n")
    origin = {"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
    (notes / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) == "0123abc"
    assert commit_of(tmp_path / "clone") is None
