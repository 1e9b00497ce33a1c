"""Put the runs of several test folds and seeds together: tables, figures and the comparison of their sides."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from pandas import DataFrame

from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole
from audio_dendrites.results.comparison import write_comparison
from audio_dendrites.results.plots import plot_classes
from audio_dendrites.results.report import is_finished
from audio_dendrites.results.scores import score, score_names
from audio_dendrites.results.tables import markdown_table


def collect(runs: DataFrame, folder: Path, command: Sequence[str]) -> None:
    """Write crossval.md and crossval.json of the finished runs, compare the sides, and print which runs are missing.

    A comparison needs the same runs of all sides. It takes the test folds that have a run in all sides, and the seeds
    that all of these folds have.

    Args:
        runs: Run folders. One column for each side, the reference first, and one row for each `fold` and `seed`.
        folder: Where to write.
        command: The command that made the runs.

    Raises:
        UserError: No run is finished.
    """
    finished = runs.map(is_finished)
    if not finished.any(axis=None):
        raise UserError(f"{folder}: at least one run must be finished to put results together, got none")
    _write(folder, {side: list(runs[side][finished[side]]) for side in runs if finished[side].any()}, command)
    common = finished.all(axis=1).unstack("seed", fill_value=False)
    common = common[common.any(axis=1)]
    seeds = common.columns[common.all()]
    compared = runs[[fold in common.index and seed in seeds for fold, seed in runs.index]]
    if runs.shape[1] > 1 and len(compared):
        write_comparison({side: list(compared[side]) for side in runs}, folder)
    if missing := list(runs.stack()[~finished.stack()]):
        print(f"\n{len(missing)} of {runs.size} runs are not finished: {', '.join(map(str, missing))}")
        if runs.shape[1] > 1:
            print(f"The comparison has {len(compared)} of {len(runs)} runs of each side.", flush=True)


def summary(folders: Sequence[Path]) -> tuple[str, dict[str, Any], DataFrame]:
    """Put the finished run folders of one side together.

    Returns:
        A Markdown table, the entry of crossval.json, and the predictions of all runs. The entry has the mean and the
        standard deviation of each score over the runs. It also has those scores of all clips pooled that do not depend
        on the scale of the logits.
    """
    runs = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    predictions = pandas.concat([pandas.read_parquet(folder / "predictions.parquet") for folder in folders])
    scores = score_names(runs[0]["test"])
    tests = [(folder.name, run["test"]) for folder, run in zip(folders, runs, strict=True)]
    rows = [[" ".join(test["folds"]), run, test["clips"], *(test[name] for name in scores)] for run, test in tests]
    means = {name: statistics.mean(run["test"][name] for run in runs) for name in scores}
    deviations = {name: statistics.stdev(run["test"][name] for run in runs) if runs[1:] else 0.0 for name in scores}
    rows += [["mean", "", "", *means.values()], ["standard deviation", "", "", *deviations.values()]]
    pooled = score(predictions, runs[0]["labels"])
    found = {
        "runs": [folder.name for folder in folders],
        "mean": means,
        "standard_deviation": deviations,
        "pooled": {name: pooled[name] for name in ("accuracy", "macro_f1") if name in pooled},
        "parameters": statistics.mean(run["parameters"] for run in runs),
        "minutes": sum(run["train_runtime"] for run in runs) / 60,
    }
    return markdown_table([["test fold", "run", "clips", *scores], *rows]), found, predictions


def _write(folder: Path, sides: dict[str, list[Path]], command: Sequence[str]) -> None:
    """Write crossval.md, crossval.json and, for each side, a figure of the scores by class. See `collect`."""
    page, numbers = [f"# Cross-validation\n\n```bash\n{' '.join(command)}\n```"], {}
    for side, folders in sides.items():
        table, numbers[side], predictions = summary(folders)
        labels = json.loads((folders[0] / "metrics.json").read_text(encoding="utf-8"))["labels"]
        picture = plot_classes(predictions, labels, f"{side}, all test folds", folder, f"_{side}")
        line = f"{numbers[side]['parameters']:,.0f} parameters, {numbers[side]['minutes']:.1f} minutes of training."
        page.append(f"## {side}\n\n{table}\n\n{line}\n\n![by class]({picture.name})")
        print(f"\n{side}\n\n{table}\n\n{line}", flush=True)
    with written_whole(folder / "crossval.md") as path:
        path.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    with written_whole(folder / "crossval.json") as path:
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {folder}/crossval.md", flush=True)
