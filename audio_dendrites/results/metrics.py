"""`evaluate.Metric` classes that need no network. All take scores, so that `evaluate.combine` can hold them together.

metrics = evaluate.combine([Accuracy(), MacroF1(), MeanAveragePrecision()])
metrics.compute(predictions=logits, references=labels)
"""

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax
from scipy.stats import norm, rankdata
from sklearn import metrics as sklearn_metrics
from transformers.trainer_utils import EvalPrediction

_CITATION = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011"


class _ScoreMetric(evaluate.Metric):
    """A metric over `predictions`, logits (clips, classes), and `references`, class numbers (clips,).

    Under the configuration name "multilabel" the references are 0 or 1 for each class, (clips, classes). Under
    "sigmoid" they are class numbers, of a model that was trained with the binary cross-entropy.
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
    """mAP: area under the precision-recall curve of each class against the rest, averaged over those that occur."""

    def _compute(self, predictions, references) -> dict[str, float]:
        scores = ranking(np.asarray(predictions), "cross_entropy" if self.config_name == "default" else "bce")
        references = np.asarray(references)
        if references.ndim == 1:
            references = np.eye(scores.shape[1], dtype=int)[references]
        return {"mAP": float(np.nanmean(average_precisions(scores, references)))}


class MultiLabelScores(MeanAveragePrecision):
    """mAP; AUC, the area under the ROC curve of each class, averaged over those that occur; and d' of the AUC.

    d' = √2 Φ⁻¹(AUC), as Gemmeke et al. (2017) have it for AudioSet, and AST and PANNs after them. For an AUC of 1 it
    would be infinite, so that 1 counts as 1 - 1e-6.
    """

    def _compute(self, predictions, references) -> dict[str, float]:
        scores, positive = np.asarray(predictions), np.asarray(references) > 0
        counts = positive.sum(axis=0)
        pairs = counts * (len(scores) - counts)
        # Mann and Whitney (1947): the share of pairs in which the positive clip has the higher score.
        wins = (rankdata(scores, axis=0) * positive).sum(axis=0) - counts * (counts + 1) / 2
        auc = float(np.mean(wins[pairs > 0] / pairs[pairs > 0]))
        d_prime = float(np.sqrt(2) * norm.ppf(min(auc, 1 - 1e-6)))
        return super()._compute(predictions, references) | {"AUC": auc, "d_prime": d_prime}


class PerClassAccuracy(_ScoreMetric):
    """Accuracy among the clips of each class (its recall), by class number; classes without clips are left out."""

    def _compute(self, predictions, references) -> dict[str, dict[int, float]]:
        predicted, references = np.argmax(predictions, axis=1), np.asarray(references)
        hits = {int(label): float(np.mean(predicted[references == label] == label)) for label in np.unique(references)}
        return {"per_class_accuracy": hits}


# Each evaluation logs these, by the loss of the training; PerClassAccuracy is for the final report.
EVALUATIONS = {
    "cross_entropy": evaluate.combine([Accuracy(), MacroF1(), MeanAveragePrecision()]),
    "bce": evaluate.combine([Accuracy(), MacroF1(), MeanAveragePrecision("sigmoid")]),
}
MULTI_LABEL_EVALUATION = MultiLabelScores("multilabel")


def ranking(logits: np.ndarray, loss: str) -> np.ndarray:
    """Scores that rank clips as the probabilities of `pipeline` do, without their rounding near 1.

    Args:
        logits: (clips, classes).
        loss: cross_entropy, where the probabilities are the softmax, or bce, where they are the sigmoids.

    Returns:
        (clips, classes).
    """
    return logits if loss == "bce" else log_softmax(logits, axis=1)


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


def evaluate_scores(predictions: np.ndarray, references: np.ndarray, loss: str = "cross_entropy") -> dict[str, float]:
    """Accuracy, macro F1 and mAP or, for multi-label clips, mAP, AUC and d'.

    Args:
        predictions: Logits (clips, classes).
        references: Class numbers (clips,) or 0 and 1, (clips, classes).
        loss: Of the training, cross_entropy or bce; that of multi-label clips is always bce.
    """
    metric = EVALUATIONS[loss] if references.ndim == 1 else MULTI_LABEL_EVALUATION
    return metric.compute(predictions=predictions, references=references)


def compute_metrics(prediction: EvalPrediction, loss: str = "cross_entropy") -> dict[str, float]:
    """What the Trainer calls: `evaluate_scores` of its predictions."""
    return evaluate_scores(prediction.predictions, prediction.label_ids, loss)
