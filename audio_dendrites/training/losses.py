"""The losses of single-label, multi-label and distilled training."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.utils import compute_class_weight
from torch import nn

from audio_dendrites.errors import UserError
from audio_dendrites.recipes import SCORES, Recipe, RunArguments, check_rules


def resolve_loss(args: RunArguments, multi_label: bool) -> str:
    """The loss of a run: cross_entropy or bce.

    Args:
        args: The training arguments. Their `loss` may be auto.
        multi_label: Whether clips have lists of labels.

    Raises:
        UserError: The loss does not fit the labels, or label smoothing does not fit the loss.
    """
    loss = args.loss if args.loss != "auto" else "bce" if multi_label else "cross_entropy"
    if multi_label and loss == "cross_entropy":
        raise UserError("loss must be bce or auto for clips with lists of labels, got cross_entropy")
    check_rules({"loss": loss, "label_smoothing_factor": args.label_smoothing_factor})
    return loss


def balanced_class_weights(targets: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """The weight of each class by its inverse frequency, as scikit-learn's `compute_class_weight("balanced")`.

    The weight of a class is `n / (classes * n_class)`, where `n_class` counts the clips with this class and `n` is the
    sum of these counts. The mean weight over all labels is 1.

    Args:
        targets: Class numbers (clips,) of the training clips, or 0 and 1 (clips, classes).
        labels: Class names in the order of the logits.

    Returns:
        The weights (classes,), float64.

    Raises:
        UserError: A class has no training clip.
    """
    found = targets if targets.ndim == 1 else targets.nonzero()[1]
    if len(missing := np.setdiff1d(np.arange(len(labels)), found)):
        raise UserError(
            f"class_weights: no training clip has the label {labels[missing[0]]!r}, so its weight would be infinite; "
            f"take the label out of `labels`, or leave class_weights out"
        )
    return compute_class_weight("balanced", classes=np.arange(len(labels)), y=found)


def check_metrics(recipe: Recipe, multi_label: bool) -> None:
    """Check that evaluations report the metrics that choose the checkpoint and that growth follows.

    Args:
        recipe: The recipe of the run.
        multi_label: Whether clips have lists of labels. False if that is not known yet.

    Raises:
        UserError: A metric is not reported.
    """
    reported = [*(["mAP"] if multi_label else SCORES), "loss"]
    growth = (recipe.dendrites.pai or {}).get("metric")
    for field, metric in (("metric_for_best_model", recipe.training.metric_for_best_model), ("pai: metric", growth)):
        if metric is not None and str(metric).removeprefix("eval_") not in reported:
            clips = " for clips with lists of labels" if multi_label else ""
            raise UserError(f"{field} must be one of {', '.join(reported)}{clips}, got {metric}")


def distilled_labels(labels: torch.Tensor, logits: torch.Tensor, share: float, loss: str) -> torch.Tensor:
    """Mix the scores of a teacher into the labels (Hinton et al. 2015, arXiv:1503.02531, at temperature 1).

    Cross-entropies are linear in the labels. The loss is therefore the weighted mean of the loss with the labels and
    the loss with the scores.

    Args:
        labels: Class numbers (batch,), or 0 to 1 (batch, classes).
        logits: Logits of the teacher (batch, classes).
        share: Share of the scores, from 0 to 1.
        loss: cross_entropy for softmax scores, bce for sigmoids.

    Returns:
        The labels (batch, classes), float32.
    """
    logits = logits.float()
    scores = logits.sigmoid() if loss == "bce" else logits.softmax(-1)
    hard = nn.functional.one_hot(labels, logits.shape[1]) if labels.dim() == 1 else labels
    return torch.lerp(hard.float(), scores, share)


def classification_loss(
    outputs,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    loss: str = "cross_entropy",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy, or binary cross-entropy averaged over the classes. The mean over the clips of an optimizer step.

    With class weights, the sum is divided by the number of clips. `torch.nn.CrossEntropyLoss` divides it by the sum of
    the weights, so that the loss would depend on how a step is divided into micro-batches.

    Args:
        outputs: The outputs of the model, with `logits` (batch, classes).
        labels: Class numbers (batch,) or, after mixup or for multi-label clips, 0 to 1 (batch, classes).
        num_items_in_batch: Number of entries of `labels` in all micro-batches and processes of the step, as the Trainer
            counts them. None averages over this batch.
        label_smoothing: Share of the probability that is spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567), for the cross-entropy only.
        loss: cross_entropy, or bce: each class against the rest, as AST's authors train AudioSet and Speech Commands.
        class_weights: Weights (classes,), float32. In the binary cross-entropy, a weight multiplies the term of its
            class in all clips, also in those without the class (torch's `weight`, not `pos_weight`).

    Returns:
        The loss, a float32 scalar.
    """
    logits = outputs.logits.float()
    if class_weights is not None:
        class_weights = class_weights.to(logits.device)  # the loss of whole clips is computed on the CPU
    clips = len(labels) if num_items_in_batch is None else num_items_in_batch / labels[0].numel()
    if loss == "bce":
        targets = nn.functional.one_hot(labels, logits.shape[1]).float() if labels.dim() == 1 else labels
        summed = nn.functional.binary_cross_entropy_with_logits(logits, targets, class_weights, reduction="sum")
        summed = summed / logits.shape[1]
    else:
        summed = nn.functional.cross_entropy(
            logits, labels, class_weights, label_smoothing=label_smoothing, reduction="sum"
        )
    return summed / clips
