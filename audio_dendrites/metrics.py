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
    """A metric over `predictions`, logits (clips, classes), and `references`, class numbers (clips,)."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.List(datasets.Value("float32")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=_CITATION,
            inputs_description="predictions: logits, one list a clip; references: class numbers",
            features=datasets.Features(features),
        )

    def __init__(self, **kwargs):
        # Nothing is written: evaluation of two runs, or ranks, cannot meet in one cache file.
        super().__init__(keep_in_memory=True, **kwargs)


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
    """mAP: area under the precision-recall curve of each class against the rest, averaged over those that occur."""

    def _compute(self, predictions, references) -> dict[str, float]:
        scores, references = softmax(np.asarray(predictions), axis=1), np.asarray(references)
        precisions = [
            sklearn_metrics.average_precision_score(references == label, scores[:, label])
            for label in np.unique(references)
        ]
        return {"mAP": float(np.mean(precisions))}


class PerClassAccuracy(_ScoreMetric):
    """Accuracy among the clips of each class (its recall), by class number; classes without clips are left out."""

    def _compute(self, predictions, references) -> dict[str, dict[int, float]]:
        predicted, references = np.argmax(predictions, axis=1), np.asarray(references)
        hits = {int(label): float(np.mean(predicted[references == label] == label)) for label in np.unique(references)}
        return {"per_class_accuracy": hits}


# Each evaluation logs these; PerClassAccuracy is for the final report.
EVALUATION = evaluate.combine([Accuracy(), MacroF1(), MeanAveragePrecision()])


def compute_metrics(prediction) -> dict[str, float]:
    """What the Trainer calls: accuracy, macro F1 and mAP of an `EvalPrediction`."""
    return EVALUATION.compute(predictions=prediction.predictions, references=prediction.label_ids)
