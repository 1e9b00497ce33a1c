"""The scores of logits, as an `evaluate.Metric` that needs no network.

Scores("bce").compute(predictions=logits, references=labels)
"""

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax
from scipy.stats import norm
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from transformers.trainer_utils import EvalPrediction

from audio_dendrites.results.statistics import average_precision


class Scores(evaluate.Metric):
    """Accuracy, macro F1 and mAP or, for multi-label clips, mAP, AUC and d'.

    Accuracy is the share of clips whose highest score is that of their class. Macro F1 is averaged over the classes
    that occur in labels or predictions. mAP is the area under the precision-recall curve and AUC the area under the ROC
    curve of each class against the rest, averaged over the classes that occur. d' = √2 Φ⁻¹(AUC), as Gemmeke et al.
    (2017) define it for AudioSet. An AUC of 1 counts as 1 - 1e-6, because its d' would be infinite.

    Args:
        config_name: The loss of the training, cross_entropy or bce, if the references are class numbers, (clips,). Or
            multilabel, if they are 0 or 1 for each class, (clips, classes).
    """

    def __init__(self, config_name: str = "cross_entropy"):
        super().__init__(config_name=config_name, keep_in_memory=True)  # two processes cannot meet in one cache file

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        features = {
            "predictions": datasets.List(datasets.Value("float32")),
            "references": datasets.List(number) if self.config_name == "multilabel" else number,
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011",
            inputs_description="predictions: logits of each clip; references: class numbers",
            features=datasets.Features(features),
        )

    def compute(self, *, predictions=None, references=None) -> dict[str, float]:
        """The scores of these clips, or of those of `add` and `add_batch`.

        `evaluate` would turn each logit into a Python float, which is 700 MB for 20,000 clips of 527 classes.
        """
        if predictions is None:
            return super().compute()
        if self.writer is not None:
            return super().compute(predictions=predictions, references=references)
        return self._compute(predictions, references)

    def _compute(self, predictions, references) -> dict[str, float]:
        logits, references = np.asarray(predictions, dtype=np.float32), np.asarray(references)
        if self.config_name == "multilabel":
            references = references > 0
            count = references.sum(axis=0)
            both = (count > 0) & (count < len(references))  # an ROC curve needs clips with and without the class
            # `compress` keeps the rows contiguous. scikit-learn copies other arrays once for each class.
            parts = (values.compress(both, axis=1) for values in (references, logits))
            auc = roc_auc_score(*parts, average=None) if both.any() else np.nan
            auc = float(np.mean(auc))
            d_prime = float(np.sqrt(2) * norm.ppf(min(auc, 1 - 1e-6)))
            return {"mAP": float(np.nanmean(average_precisions(logits, references))), "AUC": auc, "d_prime": d_prime}
        predicted, positive = logits.argmax(axis=1), np.eye(logits.shape[1], dtype=int)[references]
        return {
            "accuracy": float(accuracy_score(references, predicted)),
            "macro_f1": float(f1_score(references, predicted, average="macro", zero_division=0)),
            "mAP": float(np.nanmean(average_precisions(ranking(logits, self.config_name), positive))),
        }


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
        (classes,), NaN for classes that do not occur.
    """
    occurs, found = np.flatnonzero(references.any(axis=0)), np.full(scores.shape[1], np.nan)
    found[occurs] = [average_precision(scores[:, label], references[:, label] > 0)[0] for label in occurs]
    return found


def compute_metrics(prediction: EvalPrediction, loss: str = "cross_entropy") -> dict[str, float]:
    """The `Scores` of predictions, in the form that the Trainer calls.

    Args:
        prediction: Logits (clips, classes), and class numbers (clips,) or 0 and 1 for each class, (clips, classes).
        loss: Loss of the training, cross_entropy or bce. The loss of multi-label clips is always bce.
    """
    metric = Scores("multilabel" if prediction.label_ids.ndim == 2 else loss)
    return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
