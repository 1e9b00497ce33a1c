"""The losses of single-label, multi-label and distilled training."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.utils import compute_class_weight
from torch import nn

from audio_dendrites.errors import UserError
from audio_dendrites.recipes import SCORES, Recipe, RunArguments


def resolve_loss(args: RunArguments, multi_label: bool) -> str:
    """The loss that `auto` stands for.

    Args:
        args: With `loss`.
        multi_label: Whether clips have lists of labels.

    Returns:
        cross_entropy or bce.

    Raises:
        UserError: The loss does not fit such labels, or label smoothing does not fit the loss.
    """
    loss = args.loss if args.loss != "auto" else "bce" if multi_label else "cross_entropy"
    if multi_label and loss == "cross_entropy":
        raise UserError("loss must be bce or auto for clips with lists of labels, got cross_entropy")
    args.check_loss(loss)
    return loss


def balanced_class_weights(targets: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Inverse frequency of each class, as scikit-learn's `compute_class_weight("balanced")`.

    The weight of a class is `n / (classes * n_class)`, where `n_class` counts the clips with this class and `n` is the
    sum of these counts. The mean weight over all labels is 1.

    Args:
        targets: Of the training clips, class numbers (clips,) or 0 and 1 (clips, classes).
        labels: Class names in the order of the logits.

    Returns:
        (classes,), float64.

    Raises:
        UserError: No training clip has one of the classes.
    """
    found = targets if targets.ndim == 1 else targets.nonzero()[1]
    if missing := sorted(set(range(len(labels))) - set(found.tolist())):
        raise UserError(
            f"class_weights: no training clip has the label {labels[missing[0]]!r}, so its weight would be infinite; "
            f"take the label out of `labels`, or leave class_weights out"
        )
    return compute_class_weight("balanced", classes=np.arange(len(labels)), y=found)


def check_metrics(recipe: Recipe, multi_label: bool) -> None:
    """Find out whether evaluations report the metrics that choose the checkpoint and the moments of growth.

    Args:
        recipe: The run's.
        multi_label: Whether clips have lists of labels; False also where this is not known yet.

    Raises:
        UserError: They do not.
    """
    reported = [*(["mAP"] if multi_label else SCORES), "loss"]
    growth = (recipe.dendrites.pai or {}).get("metric")
    for field, metric in (("metric_for_best_model", recipe.training.metric_for_best_model), ("pai: metric", growth)):
        if metric is not None and str(metric).removeprefix("eval_") not in reported:
            clips = " for clips with lists of labels" if multi_label else ""
            raise UserError(f"{field} must be one of {', '.join(reported)}{clips}, got {metric}")


def distilled_labels(labels: torch.Tensor, logits: torch.Tensor, share: float, loss: str) -> torch.Tensor:
    """Labels into which the scores of a teacher are mixed (Hinton et al. 2015, arXiv:1503.02531, at temperature 1).

    As the cross-entropies are linear in the labels, the loss is the mean of that of the labels and that of the scores.

    Args:
        labels: Class numbers (batch,), or 0 to 1 (batch, classes).
        logits: The teacher's, (batch, classes).
        share: Of the scores, from 0 to 1.
        loss: cross_entropy, where scores are the softmax, or bce, where they are the sigmoids.

    Returns:
        (batch, classes), float32.
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
    """Cross-entropy, or the binary one averaged over the classes; averaged over the clips of an optimizer step.

    With class weights the sum is divided by the number of clips, not by the sum of their weights as in
    `torch.nn.CrossEntropyLoss`, which would make the loss depend on how a step is cut into micro-batches.

    Args:
        outputs: With `logits`, (batch, classes).
        labels: Class numbers (batch,) or, after mixup or for multi-label clips, 0 to 1 (batch, classes).
        num_items_in_batch: Entries of `labels` in all micro-batches and processes of the step, as the Trainer counts
            them; none averages over this batch.
        label_smoothing: Share of the probability spread over all classes (Szegedy et al. 2016, arXiv:1512.00567); of
            the cross-entropy alone.
        loss: cross_entropy, or bce: each class against the rest, as AST's authors train AudioSet and Speech Commands.
        class_weights: (classes,), float32. In the binary cross-entropy a weight multiplies the whole term of its class,
            of clips with the class and of those without (torch's `weight`, not `pos_weight`).

    Returns:
        The loss, a float32 scalar.
    """
    logits = outputs.logits.float()
    if class_weights is not None:
        class_weights = class_weights.to(logits.device)  # whole clips are scored on the CPU
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
