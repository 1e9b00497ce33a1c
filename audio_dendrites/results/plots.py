"""Figures of a run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas
from matplotlib.figure import Figure
from pandas import DataFrame
from sklearn.metrics import ConfusionMatrixDisplay

from audio_dendrites.data.splits import is_multi_label
from audio_dendrites.files import written_whole
from audio_dendrites.results.dendrites import use_sentence
from audio_dendrites.results.scores import score
from audio_dendrites.results.tables import MOST, best_and_worst

matplotlib.use("agg")


def plot_classes(predictions: DataFrame, labels: Sequence[str], title: str, folder: Path, suffix: str = "") -> Path:
    """Plot confusion_matrix<suffix>.png or, for multi-label clips, average_precision<suffix>.png. Returns the path.

    Args:
        predictions: As `predictions_table` returns it.
        labels: Class names in the order of the logits.
        title: Title of the figure.
        folder: Where to write.
        suffix: End of the file name.
    """
    name, plot = "confusion_matrix", plot_confusion
    if is_multi_label(predictions["label"]):
        name, plot = "average_precision", plot_average_precision
    path = folder / f"{name}{suffix}.png"
    save_figure(plot(predictions, labels, title), path)
    return path


def plot_average_precision(predictions: DataFrame, labels: Sequence[str], title: str) -> Figure:
    """A bar for each class that has clips, the best on top; see `best_and_worst`."""
    per_class = DataFrame(score(predictions, labels)["per_class"]).loc["average_precision"]
    per_class = per_class[best_and_worst(per_class.to_dict())].sort_values(kind="stable")
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(per_class)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(per_class.index, per_class)
    axes.set(title=title, xlabel="average precision", xlim=(0, 1))
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_confusion(predictions: DataFrame, labels: Sequence[str], title: str) -> Figure:
    """Confusion matrix in clips, rows the true class, shaded by the share of the row.

    Of more than `MOST` classes, it has those with the most mistakes, and then those with the most clips.
    """
    if len(labels) > MOST:
        wrong = predictions[predictions["label"] != predictions["predicted"]]
        mistakes = pandas.concat([wrong["label"], wrong["predicted"]]).value_counts()
        ranked = dict.fromkeys([*mistakes.index, *predictions["label"].value_counts().index])
        shown = {*list(ranked)[:MOST]}
        labels = [label for label in labels if label in shown]
        title = f"{title}: the {len(labels)} classes with the most mistakes"
        predictions = predictions[predictions["label"].isin(labels) & predictions["predicted"].isin(labels)]
    size = 2.5 + 0.5 * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay.from_predictions(
        predictions["label"], predictions["predicted"], labels=list(labels), normalize="true", ax=axes,
        cmap="Blues", include_values=False, colorbar=False, xticks_rotation=45,
    )  # fmt: skip
    display.im_.set_clim(0, 1)
    counts = pandas.crosstab(predictions["label"], predictions["predicted"]).reindex(
        index=labels, columns=labels, fill_value=0
    )
    for (row, column), count in np.ndenumerate(counts.to_numpy()):
        if count:
            colour = "white" if display.confusion_matrix[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    axes.set_xticklabels(labels, rotation=45, ha="right")
    axes.set(title=title, xlabel="predicted", ylabel="true")
    return figure


def plot_learning_curves(log_history: Sequence[dict[str, Any]], metric: str) -> Figure:
    """The losses, the validation metric of this name (without "eval_"), and the learning rate, by epoch."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, scores, rates = figure.subplots(1, 3)
    for axes, key, label in (
        (losses, "loss", "training"),
        (losses, "eval_loss", "validation"),
        (scores, f"eval_{metric}", "validation"),
        (rates, "learning_rate", None),
    ):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if key.startswith("eval") else None, label=label)
    for axes, title in ((losses, "loss"), (scores, metric), (rates, "learning rate")):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    losses.legend()
    return figure


def plot_dendrites(log_history: Sequence[dict[str, Any]], metric: str, dendrites: Mapping[str, Any]) -> Figure:
    """The validation metric with a line where dendrites grew, and the share of dendrites in the output of each layer.

    `log_history` is that of the Trainer's state, and `dendrites` is an entry of metrics.json.
    """
    use = dendrites.get("use")
    figure = Figure(figsize=(12 if use else 7, 4.5), layout="constrained")
    axes, *others = figure.subplots(1, 2 if use else 1, squeeze=False)[0]
    points = [(entry["step"], entry[f"eval_{metric}"]) for entry in log_history if f"eval_{metric}" in entry]
    axes.plot(*zip(*points, strict=True), marker=".")
    for entry in dendrites["growth"]:
        axes.axvline(entry["step"], color="tab:green" if entry["event"] == "grown" else "tab:gray", linestyle="--")
        label = f"{entry['event']}: {entry['dendrites']}"
        top = ("data", "axes fraction")
        axes.annotate(label, (entry["step"], 1), xycoords=top, va="bottom", fontsize=8, rotation=30)
    axes.set(xlabel="step", ylabel=f"{metric} (dashed: dendrites per layer)")
    for bars in others:
        bars.barh(list(use["layers"]), list(use["layers"].values()))
        bars.invert_yaxis()
        bars.set(xlim=(0, 1), xlabel="dendrites' share of the spread")
        bars.set_title(use_sentence(dendrites), loc="right", fontsize=10)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file whole."""
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=150, format="png")
