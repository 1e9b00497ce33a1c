"""`evaluate.Metric` classes that need no network. All take scores, so that `evaluate.combine` can hold them together.

metrics = evaluate.combine([Accuracy(), MacroF1(), MeanAveragePrecision()])
metrics.compute(predictions=logits, references=labels)
"""

import datasets
import evaluate
import numpy as np
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics

_CITATION = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011"


class _ScoreMetric(evaluate.Metric):
    """A metric over `predictions`, logits (clips, classes), and `references`, class numbers (clips,).

    Under the configuration name "multilabel" the references are 0 or 1 for each class, (clips, classes).
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        features = {
            "predictions": datasets.List(datasets.Value("float32")),
            "references": datasets.List(number) if self.config_name == "multilabel" else number,
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION,
            inputs_description="predictions: logits, one list a clip; references: class numbers",
            features=datasets.Features(features),
        )

    def __init__(self, config_name: str | None = None, **kwargs):
        # Nothing is written: evaluation of two runs, or ranks, cannot meet in one cache file.
        super().__init__(config_name=config_name, keep_in_memory=True, **kwargs)


class Accuracy(_ScoreMetric):
    """Share of clips whose highest score is their class's."""

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.argmax(predictions, axis=1) == references))}


class MacroF1(_ScoreMetric):
    """F1 of each class, averaged over the classes that occur in labels or predictions."""

    def _compute(self, predictions, references) -> dict[str, float]:
        predicted = np.argmax(predictions, axis=1)
        return {"macro_f1": float(sklearn_metrics.f1_score(references, predicted, average="macro", zero_division=0))}


class MeanAveragePrecision(_ScoreMetric):
    """mAP: area under the precision-recall curve of each class against the rest, averaged over those that occur.

    The scores are the softmax; under "multilabel" the logits, which have the order of their sigmoids.
    """

    def _compute(self, predictions, references) -> dict[str, float]:
        scores, references = np.asarray(predictions), np.asarray(references)
        if self.config_name != "multilabel":
            scores, references = softmax(scores, axis=1), np.eye(scores.shape[1], dtype=int)[references]
        return {"mAP": float(np.nanmean(average_precisions(scores, references)))}


class PerClassAccuracy(_ScoreMetric):
    """Accuracy among the clips of each class (its recall), by class number; classes without clips are left out."""

    def _compute(self, predictions, references) -> dict[str, dict[int, float]]:
        predicted, references = np.argmax(predictions, axis=1), np.asarray(references)
        hits = {int(label): float(np.mean(predicted[references == label] == label)) for label in np.unique(references)}
        return {"per_class_accuracy": hits}


# Each evaluation logs these; PerClassAccuracy is for the final report.
EVALUATION = evaluate.combine([Accuracy(), MacroF1(), MeanAveragePrecision()])
MULTI_LABEL_EVALUATION = MeanAveragePrecision("multilabel")


def average_precisions(scores: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Average precision of each class.

    Args:
        scores: (clips, classes), higher where a class is likelier.
        references: (clips, classes), 0 or 1.

    Returns:
        (classes,), NaN for those that do not occur.
    """
    return np.array(
        [
            sklearn_metrics.average_precision_score(references[:, label], scores[:, label])
            if references[:, label].any()
            else np.nan
            for label in range(scores.shape[1])
        ]
    )


def evaluate_scores(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and mAP, or mAP alone for multi-label clips.

    Args:
        predictions: Logits (clips, classes).
        references: Class numbers (clips,) or 0 and 1, (clips, classes).
    """
    metric = EVALUATION if references.ndim == 1 else MULTI_LABEL_EVALUATION
    return metric.compute(predictions=predictions, references=references)


def compute_metrics(prediction) -> dict[str, float]:
    """What the Trainer calls: `evaluate_scores` of an `EvalPrediction`."""
    return evaluate_scores(prediction.predictions, prediction.label_ids)
