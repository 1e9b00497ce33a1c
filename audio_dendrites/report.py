"""What a run leaves beside its model: metrics.json, predictions.parquet, plots, tables.

Everything here is made from arrays and the Trainer's log; a run folder is enough to make it again.
"""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from pandas import DataFrame
from scipy.special import expit, softmax
from sklearn.metrics import ConfusionMatrixDisplay, f1_score
from transformers import AudioClassificationPipeline, Trainer, pipeline
from transformers.trainer_utils import PredictionOutput

from audio_dendrites.audio import load_waveform
from audio_dendrites.config import SCORES, Recipe, written_whole
from audio_dendrites.data import encode_labels, is_local, is_multi_label
from audio_dendrites.metrics import PerClassAccuracy, average_precisions, evaluate_scores
from audio_dendrites.windows import classify, pipeline_windows

matplotlib.use("agg")

TOKEN_OPTION = r"--\w+[_-]token"
PACKAGES = ("torch", "torchaudio", "transformers", "datasets", "accelerate", "evaluate")


def score(predictions: DataFrame, labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro F1, mAP, and accuracy, F1 and clips of each class.

    For multi-label clips: mAP, and average precision and positives of each class that has any.

    Args:
        predictions: As `predictions_table` makes it.
        labels: Class names in the order of the logits.
    """
    logits = np.stack(predictions["logits"])
    references = encode_labels(predictions["label"], labels)
    scores = evaluate_scores(logits, references) | {"clips": len(predictions)}
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


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows, the first one the header, as an aligned Markdown table; numbers to the right with four digits."""
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [not isinstance(cell, str) for cell in rows[-1]]
    rule = ["-" * (width - is_right) + ":" * is_right for width, is_right in zip(widths, right, strict=True)]
    lines = [
        [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def score_names(scores: Mapping[str, Any]) -> list[str]:
    """Those of accuracy, macro_f1 and mAP that a split has: mAP alone where clips are multi-label."""
    return [name for name in SCORES if name in scores]


def scores_table(metrics: Mapping[str, Any]) -> str | None:
    """The scores of the splits that there are, as a Markdown table."""
    splits = [split for split in ("validation", "test") if metrics.get(split)]
    if not splits:
        return None
    names = score_names(metrics[splits[0]])
    rows = [["split", "folds", "clips", *names]]
    for split in splits:
        scores = metrics[split]
        rows.append([split, " ".join(scores["folds"]), scores["clips"], *(scores[name] for name in names)])
    return markdown_table(rows)


def classes_table(test: Mapping[str, Any]) -> str:
    """The scores of each class in the test, as a Markdown table."""
    columns = ("clips", "accuracy", "f1") if "accuracy" in test else ("positives", "average_precision")
    rows = [[label, *(scores[column] for column in columns)] for label, scores in test["per_class"].items()]
    return markdown_table([["class", *columns], *rows])


def plot_classes(predictions: DataFrame, labels: Sequence[str], title: str, folder: Path, suffix: str = "") -> Path:
    """The picture of a test: a confusion matrix or, for multi-label clips, the average precision of each class.

    Args:
        predictions: As `predictions_table` makes it.
        labels: Class names in the order of the logits.
        title: Over the picture.
        folder: Where to.
        suffix: Of the file's name.

    Returns:
        confusion_matrix<suffix>.png or average_precision<suffix>.png there.
    """
    multi_label = is_multi_label(predictions["label"])
    path = folder / f"{'average_precision' if multi_label else 'confusion_matrix'}{suffix}.png"
    (plot_average_precision if multi_label else plot_confusion)(predictions, labels, title, path)
    return path


def plot_average_precision(predictions: DataFrame, labels: Sequence[str], title: str, path: Path) -> None:
    """A bar for each class that has clips, the best on top."""
    per_class = score(predictions, labels)["per_class"]
    ranked = sorted(per_class, key=lambda label: per_class[label]["average_precision"])
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(ranked)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(ranked, [per_class[label]["average_precision"] for label in ranked])
    axes.set(title=title, xlabel="average precision", xlim=(0, 1))
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    _save_figure(figure, path)


def plot_confusion(predictions: DataFrame, labels: Sequence[str], title: str, path: Path) -> None:
    """Confusion matrix in clips, rows the true class, shaded by the share of the row."""
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
    _save_figure(figure, path)


def plot_learning_curves(log_history: Sequence[dict[str, Any]], metric: str, path: Path) -> None:
    """Training and validation loss, the validation metric that chooses the checkpoint, and the learning rate, by epoch.

    Args:
        log_history: `trainer.state.log_history`.
        metric: Name of the metric, without "eval_".
        path: PNG file.
    """
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
    _save_figure(figure, path)


def write_run(
    folder: Path,
    recipe: Recipe,
    trainer: Trainer,
    labels: Sequence[str],
    predictions: dict[str, DataFrame],
    skipped: Sequence[str],
) -> None:
    """Write plots, predictions.parquet and, last, metrics.json: a folder that has it is complete.

    Args:
        folder: The run folder.
        recipe: As resolved.
        trainer: After the training.
        labels: Class names in the order of the logits.
        predictions: `predictions_table` of the splits validation and test.
        skipped: What was wrong with the clips that were left out.
    """
    metrics = run_metrics(recipe, trainer, labels, predictions, skipped)
    # The picture may be published: of a local data set it shows the name, not where it lies.
    dataset = Path(recipe.data.dataset).name if "dataset" in metrics["local"] else recipe.data.dataset
    title = f"{dataset}, test fold {' '.join(recipe.data.folds['test'])}"
    plot_classes(predictions["test"], labels, title, folder)
    plot_learning_curves(trainer.state.log_history, trainer.args.metric_for_best_model, folder / "learning_curves.png")
    with written_whole(folder / "predictions.parquet") as path:
        predictions["test"].to_parquet(path, index=False)
    with written_whole(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def check_pipeline(
    folder: Path, clips: Dataset, audio_column: str, predictions: DataFrame, loss: str = "cross_entropy"
) -> None:
    """Load the folder as its users will, and see that it says of some clips what the trained model said.

    Args:
        folder: With the model and its feature extractor.
        clips: Rows with the sound, not decoded, of `predictions`' clips; eight or so of them are heard.
        audio_column: Where it is.
        predictions: As `predictions_table` makes it.
        loss: What the model was trained with: of bce the scores are the sigmoid, else the softmax.

    Raises:
        RuntimeError: The scores differ by more than 1e-3.
    """
    loaded = pipeline("audio-classification", model=str(folder), trust_remote_code=True)
    rate, rows = loaded.feature_extractor.sampling_rate, range(0, len(clips), 1 + len(clips) // 9)
    expected = predictions.iloc[rows]
    names = list(loaded.model.config.id2label.values())
    waveforms = [load_waveform(audio, rate) for audio in clips.with_format("arrow")[rows][audio_column].to_pylist()]
    activate = expit if loss == "bce" else partial(softmax, axis=-1)
    scores = np.stack([_pipeline_scores(loaded, waveform, activate) for waveform in waveforms])
    difference = np.abs(scores - activate(np.stack(expected["logits"]))).max()
    if not difference < 1e-3:
        raise RuntimeError(f"{folder}: pipeline's scores are {difference:.2g} from those of the trained model")
    rows = [["clip", "class", "pipeline says", "score"]]
    rows += [
        [clip, label if isinstance(label, str) else ", ".join(label), names[found.argmax()], float(found.max())]
        for clip, label, found in zip(expected["clip"], expected["label"], scores, strict=True)
    ]
    print(f"\nLoaded by pipeline, scores within {difference:.1g}:\n{markdown_table(rows)}", flush=True)


def _pipeline_scores(loaded: AudioClassificationPipeline, waveform: np.ndarray, activate: Callable) -> np.ndarray:
    """Scores (classes,): of a clip that fits into the model's window those that the pipeline itself gives."""
    if len(pipeline_windows(loaded, len(waveform))) > 1:
        return activate(classify(loaded, waveform))
    found = {answer["label"]: answer["score"] for answer in loaded(waveform, top_k=loaded.model.config.num_labels)}
    return np.array([found[name] for name in loaded.model.config.id2label.values()])


def is_finished(folder: Path) -> bool:
    """Whether the run folder is complete."""
    return (folder / "metrics.json").exists()


def print_summary(folder: Path) -> None:
    """Show the scores of a finished run on the terminal."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print(f"\n{scores_table(metrics)}\n\n{classes_table(metrics['test'])}\n\nRun folder: {folder}", flush=True)


def run_metrics(
    recipe: Recipe, trainer: Trainer, labels: Sequence[str], predictions: dict[str, DataFrame], skipped: Sequence[str]
) -> dict[str, Any]:
    """What metrics.json holds: scores of both splits, size and length of the training, and where it ran."""
    state = trainer.state
    timing = next(log for log in reversed(state.log_history) if "train_runtime" in log)
    return {
        **run_facts(recipe, trainer, labels),
        **{split: score(table, labels) | {"folds": recipe.data.folds[split]} for split, table in predictions.items()},
        "best_step": state.best_global_step if recipe.training.load_best_model_at_end else None,
        "averaged_steps": getattr(trainer, "averaged_steps", []),  # else the best step's weights are the final ones
        "steps": state.global_step,
        "epochs": state.epoch,
        # Of the last stretch, if the run was interrupted.
        **{key: timing[key] for key in ("train_runtime", "train_steps_per_second", "train_samples_per_second")},
        "skipped": list(skipped),
    }


def running_metrics(recipe: Recipe, trainer: Trainer) -> dict[str, Any]:
    """What can be said of a training that is not over: its last evaluation, and how far it is."""
    state = trainer.state
    facts = run_facts(recipe, trainer, list(trainer.model.config.id2label.values()))
    found = facts | {"running": {"step": state.global_step, "max_steps": state.max_steps}}
    log = next((log for log in reversed(state.log_history) if "eval_mAP" in log), None)
    if log is not None:
        scores = {name: log[f"eval_{name}"] for name in SCORES if f"eval_{name}" in log}
        found["validation"] = scores | {"clips": len(trainer.eval_dataset), "folds": recipe.data.folds["validation"]}
    return found


def run_facts(recipe: Recipe, trainer: Trainer, labels: Sequence[str]) -> dict[str, Any]:
    """What is known of a run before it ends: where model and data come from, their size, and where it runs."""
    sources = {
        "dataset": recipe.data.dataset,
        "base_model": recipe.model.model,
        "teacher": recipe.training.distill_from,
    }
    parameters = list(trainer.model.parameters())
    config = trainer.model.config
    grower = getattr(trainer, "pai_callback", None)  # counts what the model computes with, without scaffolding
    return {
        **sources,
        "architecture": getattr(config, "backbone", config).model_type,
        "local": [name for name, source in sources.items() if is_local(source)],
        "labels": list(labels),
        "sampling_rate": trainer.processing_class.sampling_rate,
        "chosen_by": recipe.training.metric_for_best_model if recipe.training.load_best_model_at_end else None,
        "parameters": grower.parameters(trainer.model)
        if grower is not None and grower.active
        else sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "dendrites": grower.summary(trainer.model) if grower is not None and grower.active else None,
        "precision": recipe.training.precision,
        "processes": recipe.training.world_size,
        "command": ["train.py", *_without_tokens(sys.argv[1:])],
        "environment": environment(trainer.args.device),
    }


def environment(device: torch.device) -> dict[str, str]:
    """What the run computed with: versions, processor or GPU, and the commit of this code; no host or user name."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    found = {"hardware": hardware, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})


def _without_tokens(words: Sequence[str]) -> list[str]:
    """A command line where the values of options such as --hub_token are left out."""
    hidden, before = [], ""
    for word in words:
        option, equals, _ = word.partition("=")
        if re.fullmatch(TOKEN_OPTION, before) and not word.startswith("--"):
            hidden.append("…")
        else:
            hidden.append(f"{option}=…" if equals and re.fullmatch(TOKEN_OPTION, option) else word)
        before = word
    return hidden


def _save_figure(figure: Figure, path: Path) -> None:
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=150, format="png")
