"""Scores of a run's predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pandas import DataFrame
from sklearn.metrics import f1_score
from transformers.trainer_utils import PredictionOutput

from audio_dendrites.data.splits import encode_labels, is_multi_label
from audio_dendrites.recipes import SCORES
from audio_dendrites.results.metrics import PerClassAccuracy, average_precisions, evaluate_scores

NAMES = (*SCORES, "AUC", "d_prime")  # of all scores of a split, in the order of the tables


def score(predictions: DataFrame, labels: Sequence[str], loss: str = "cross_entropy") -> dict[str, Any]:
    """Accuracy, macro F1, mAP, and accuracy, F1 and clips of each class.

    For multi-label clips: mAP, AUC, d', and average precision and positives of each class that has any.

    Args:
        predictions: As `predictions_table` makes it.
        labels: Class names in the order of the logits.
        loss: Of the training, cross_entropy or bce; that of multi-label clips is always bce.
    """
    logits = np.stack(predictions["logits"])
    references = encode_labels(predictions["label"], labels)
    scores = evaluate_scores(logits, references, loss) | {"clips": len(predictions)}
    if references.ndim == 2:
        per_class = {
            label: {"average_precision": float(precision), "positives": int(positives)}
            for label, precision, positives in zip(
                labels, average_precisions(logits, references), references.sum(0), strict=True
            )
            if positives
        }
        return scores | {"per_class": per_class}
    recalls = PerClassAccuracy().compute(predictions=logits, references=references)["per_class_accuracy"]
    f1 = f1_score(references, logits.argmax(1), labels=range(len(labels)), average=None, zero_division=0)
    counts = np.bincount(references, minlength=len(labels))
    per_class = {
        labels[i]: {"accuracy": recalls[i], "f1": float(f1[i]), "clips": int(counts[i])} for i in sorted(recalls)
    }
    return scores | {"per_class": per_class}


def predictions_table(index: DataFrame, output: PredictionOutput, labels: Sequence[str]) -> DataFrame:
    """One row a clip: `clip`, `fold`, `group`, `label`, `predicted` (class names) and `logits`, a list of float32.

    For multi-label clips `label` is a list, and `predicted` lists the classes whose sigmoid is above 0.5.

    Args:
        index: Rows with `clip`, `fold`, `group` (source recording) and `label`, in the order of the predictions.
        output: What `Trainer.predict` gives.
        labels: Class names in the order of the logits.
    """
    logits = output.predictions.astype(np.float32)
    table = index[["clip", "fold", "group", "label"]].reset_index(drop=True)
    return with_predictions(table, logits, labels)


def with_predictions(table: DataFrame, logits: np.ndarray, labels: Sequence[str]) -> DataFrame:
    """Clips with `logits`, and with what these say as `predicted`; see `predictions_table`."""
    if is_multi_label(table["label"]):
        predicted = [[labels[i] for i in np.flatnonzero(row > 0)] for row in logits]
    else:
        predicted = [labels[i] for i in logits.argmax(1)]
    return table.assign(predicted=predicted, logits=list(logits))


def score_names(scores: Mapping[str, Any]) -> list[str]:
    """The scores that a split has: accuracy, macro_f1 and mAP or, for multi-label clips, mAP, AUC and d_prime."""
    return [name for name in NAMES if name in scores]
