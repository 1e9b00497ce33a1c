"""Scores against counts by hand, tables, figures, and the facts of a run."""

import json
import platform
import shutil
import subprocess
import tracemalloc

import evaluate
import numpy as np
import pytest
import torch
from pandas import DataFrame
from transformers.trainer_utils import PredictionOutput

from audio_dendrites.results.metrics import Scores
from audio_dendrites.results.plots import (
    plot_average_precision,
    plot_confusion,
    plot_dendrites,
    plot_learning_curves,
    save_figure,
)
from audio_dendrites.results.report import commit_of, environment
from audio_dendrites.results.scores import predictions_table, score
from audio_dendrites.results.tables import classes_table, markdown_table

NAMES = ["cat", "dog", "owl"]
LOGITS = np.array([[2, 1, 0], [0, 3, 1], [1, 2, 0], [0, 1, 4]], np.float32)
LABELS = [0, 1, 0, 2]  # the third clip is taken for class 1
INDEX = DataFrame({"clip": list("abcd"), "fold": "1", "group": list("aabb"), "label": [NAMES[i] for i in LABELS]})
TABLE = predictions_table(INDEX, PredictionOutput(LOGITS, None, None), NAMES)


def test_scores_by_hand():
    assert isinstance(Scores(), evaluate.Metric)
    found = Scores().compute(predictions=LOGITS, references=LABELS)
    # Every class ranks its own clips first.
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3), "mAP": 1.0}
    # Class 0 has its clips at ranks 1 and 3 of 3: (1 + 2/3) / 2. Class 1 has its clip at rank 2: 1/2.
    found = Scores().compute(predictions=[[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]], references=[0, 1, 0])
    assert found["mAP"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)


def test_scores_of_batches_are_those_of_all_clips_and_a_logit_is_no_python_object():
    random = np.random.default_rng(0)
    logits, references = random.standard_normal((2000, 100), np.float32), random.random((2000, 100)) > 0.9
    metric = Scores("multilabel")
    tracemalloc.start()
    found = metric.compute(predictions=logits, references=references)
    assert tracemalloc.get_traced_memory()[1] < 20 * logits.size  # 81 through an Arrow table
    tracemalloc.stop()
    for rows in (slice(5), slice(5, 1000)):
        metric.add_batch(predictions=logits[rows], references=references[rows])
    assert metric.compute(predictions=logits[1000:], references=references[1000:]) == found


@pytest.mark.parametrize(("loss", "expected"), [("cross_entropy", 1), ("bce", 3 / 4)])
def test_clips_are_ranked_by_the_probabilities_of_the_loss(loss, expected):
    # By the softmax both classes have their clip first. By the sigmoid that of class 0 comes second: (1/2 + 1) / 2.
    predictions = DataFrame({"label": ["cat", "dog"], "logits": [[1.0, 0.0], [2.0, 3.0]]})
    assert score(predictions, ["cat", "dog"], loss)["mAP"] == expected


def test_predictions_and_scores_have_names():
    assert TABLE.columns.tolist() == ["clip", "fold", "group", "label", "predicted", "logits"]
    assert TABLE["predicted"].tolist() == ["cat", "dog", "dog", "owl"] and TABLE["group"].tolist() == list("aabb")
    scores = score(TABLE, [*NAMES, "yak"])
    assert scores["clips"] == 4 and scores["per_class"].keys() == set(NAMES)  # the yak has no clips
    assert scores["per_class"]["cat"] == {"accuracy": 0.5, "f1": pytest.approx(2 / 3), "clips": 2}
    assert json.loads(json.dumps(scores)) == scores


def test_tables_align():
    assert markdown_table([["class"], ["a|b"]]).splitlines()[-1] == r"| a\|b  |"
    assert markdown_table([["class", "clips"], ["air", 10], ["gun_shot", 3]]).splitlines() == [
        "| class    | clips |",
        "| -------- | ----: |",
        "| air      |    10 |",
        "| gun_shot |     3 |",
    ]


def test_figures_show_the_numbers_of_the_run(tmp_path):
    log = [{"epoch": e, "step": e, "loss": 1 / e, "learning_rate": 0.1} for e in (1, 2)]
    log += [{"epoch": e, "step": e, "eval_loss": 2 / e, "eval_accuracy": e / 3} for e in (1, 2)]
    curves = plot_learning_curves(log, "accuracy").axes
    lines = [[line.get_ydata().tolist() for line in axes.lines] for axes in curves]
    assert lines == [[[1.0, 0.5], [2.0, 1.0]], [[1 / 3, 2 / 3]], [[0.1, 0.1]]]
    use = {"metric": "accuracy", "lost": 0.2, "used": True, "layers": {"fc": 0.3, "head": 0.4}}
    growth = [{"event": "grown", "step": 1, "dendrites": 1}]
    scores, shares = plot_dendrites(log, "accuracy", {"growth": growth, "use": use}).axes
    assert [line.get_xdata()[0] for line in scores.lines] == [1, 1] and "used: 20.0 points" in shares.get_title("right")
    assert [bar.get_width() for bar in shares.patches] == [0.3, 0.4]
    figure = plot_confusion(TABLE, NAMES, "title")
    assert [(*text.get_position(), text.get_text()) for text in figure.axes[0].texts] == [
        (0, 0, "1"), (1, 0, "1"), (1, 1, "1"), (2, 2, "1")
    ]  # fmt: skip
    save_figure(figure, tmp_path / "confusion.png")
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]  # nothing half-written is left


def test_tables_and_figures_of_many_classes_stay_small():
    names = [f"class {number:03}" for number in range(527)]
    per_class = {name: {"positives": 3, "average_precision": row / 527} for row, name in enumerate(names)}
    table = classes_table({"per_class": per_class}).splitlines()
    assert len(table) == 64 and "class 526" in table[2] and "class 000" in table[61] and "of 527 classes" in table[-1]
    wrong = DataFrame({"label": names, "predicted": names[:1] * 527, "logits": list(np.eye(527))})
    axes = plot_confusion(wrong, names, "title").axes[0]
    assert len(axes.get_yticklabels()) == 60 and "60 classes with the most mistakes" in axes.get_title()
    right = wrong.assign(predicted=names)[-3:]
    axes = plot_confusion(right, names, "title").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == names[-3:]
    several = wrong.assign(label=[[name] for name in names])
    assert len(plot_average_precision(several, names, "title").axes[0].patches) == 60


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
