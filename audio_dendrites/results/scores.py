"""Scores of the predictions of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pandas import DataFrame
from sklearn.metrics import precision_recall_fscore_support
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from audio_dendrites.data.splits import encode_labels, is_multi_label
from audio_dendrites.recipes import SCORES
from audio_dendrites.results.metrics import average_precisions, compute_metrics

NAMES = (*SCORES, "AUC", "d_prime")  # all scores of a split, in the order of the tables


def score(predictions: DataFrame, labels: Sequence[str], loss: str = "cross_entropy") -> dict[str, Any]:
    """Accuracy, macro F1, mAP, and accuracy, F1 and clips of each class.

    For multi-label clips: mAP, AUC, d', and average precision and positives of each class. Classes without clips are
    left out.

    Args:
        predictions: As `predictions_table` returns it.
        labels: Class names in the order of the logits.
        loss: See `compute_metrics`.
    """
    logits = np.stack(predictions["logits"])
    references = encode_labels(predictions["label"], labels)
    if references.ndim == 2:
        columns = {"average_precision": average_precisions(logits, references), "positives": references.sum(0)}
    else:
        _, recalls, f1, counts = precision_recall_fscore_support(
            references, logits.argmax(1), labels=range(len(labels)), zero_division=0
        )
        columns = {"accuracy": recalls, "f1": f1, "clips": counts}
    classes = DataFrame(columns, index=labels)
    classes = classes[classes.iloc[:, -1] > 0].astype({list(columns)[-1]: int})
    scores = compute_metrics(EvalPrediction(logits, references), loss)
    return scores | {"clips": len(predictions), "per_class": classes.to_dict("index")}


def predictions_table(index: DataFrame, output: PredictionOutput, labels: Sequence[str]) -> DataFrame:
    """One row for each clip: `clip`, `fold`, `group`, `label`, `predicted` (class names) and `logits` (float32).

    For multi-label clips `label` is a list, and `predicted` lists the classes whose sigmoid is above 0.5.

    Args:
        index: Rows with `clip`, `fold`, `group` (source recording) and `label`, in the order of the predictions.
        output: Return value of `Trainer.predict`.
        labels: Class names in the order of the logits.
    """
    table = index[["clip", "fold", "group", "label"]].reset_index(drop=True)
    if is_multi_label(table["label"]):
        table["label"] = table["label"].astype(object)  # pandas cannot read the type of Arrow's lists from a file
    return with_predictions(table, output.predictions.astype(np.float32), labels)


def with_predictions(table: DataFrame, logits: np.ndarray, labels: Sequence[str]) -> DataFrame:
    """Add the columns `predicted` and `logits`; see `predictions_table`."""
    if is_multi_label(table["label"]):
        predicted = [[labels[i] for i in np.flatnonzero(row > 0)] for row in logits]
    else:
        predicted = [labels[i] for i in logits.argmax(1)]
    return table.assign(predicted=predicted, logits=list(logits))


def score_names(scores: Mapping[str, Any]) -> list[str]:
    """The scores that a split has: accuracy, macro_f1 and mAP or, for multi-label clips, mAP, AUC and d_prime."""
    return [name for name in NAMES if name in scores]
