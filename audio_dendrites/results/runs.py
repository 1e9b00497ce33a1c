"""Read finished run folders, and check that several of them belong to the same test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import yaml
from pandas import DataFrame, Series

from audio_dendrites.data.splits import is_multi_label
from audio_dendrites.errors import UserError


def read_run(folder: Path) -> tuple[dict[str, Any], DataFrame]:
    """Read metrics.json and predictions.parquet of one run.

    Returns:
        The metrics with `seed` (None for an ensemble) and `loss` (cross_entropy or bce) from config.yaml, and the
        predictions. For multi-label clips `label` is a sorted tuple.

    Raises:
        UserError: The folder is not a finished run, or an older train.py wrote it.
    """
    for name in ("metrics.json", "predictions.parquet"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}: it is not a run folder, or its run has not finished. The same train.py "
                "command continues the run"
            )
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    predictions = pandas.read_parquet(folder / "predictions.parquet")
    if "group" not in predictions:
        raise UserError(
            f"{folder}/predictions.parquet must have a column 'group' (source recording), got "
            f"{', '.join(predictions.columns)}. An older train.py wrote it: train again"
        )
    if is_multi_label(predictions["label"]):
        predictions["label"] = predictions["label"].map(lambda names: tuple(sorted(names)))
    path = folder / "config.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {"seed": recipe.get("seed"), "loss": recipe.get("loss", "auto")} | metrics
    if found["loss"] == "auto":
        found["loss"] = "bce" if is_multi_label(predictions["label"]) else "cross_entropy"
    return found, predictions


def read_same_tests(
    folders: Sequence[Path], fields: Sequence[str] = ("dataset", "labels")
) -> tuple[tuple[dict[str, Any], ...], list[DataFrame]]:
    """Read runs that tested the same clips.

    Returns:
        The metrics of each run, and its predictions, indexed by `clip` in the order of the first run; see `read_run`.

    Raises:
        UserError: A folder is not a finished run, or the runs differ in their clips or in one of the fields.
    """
    metrics, tables = zip(*map(read_run, folders), strict=True)
    check_same_task(folders, metrics, fields)
    first, *others = (table.set_index("clip") for table in tables)
    for folder, table in zip(folders[1:], others, strict=True):
        check_same_clips(first, table, str(folders[0]), str(folder))
    return metrics, [first, *(table.loc[first.index] for table in others)]


def check_same_task(
    folders: Sequence[Path], metrics: Sequence[dict[str, Any]], fields: Sequence[str] = ("dataset", "labels")
) -> None:
    """Raise a UserError if runs differ in their data set, in their classes and their order, or in other fields."""
    for folder, other in zip(folders[1:], metrics[1:], strict=True):
        for field in fields:
            if other[field] != metrics[0][field]:
                raise UserError(
                    f"{field}: the runs must have the same, got {metrics[0][field]} in {folders[0]} and {other[field]} "
                    f"in {folder}"
                )


def check_same_clips(first: DataFrame, other: DataFrame, first_name: str, other_name: str) -> None:
    """Raise a UserError if two tests differ in their clips, indexed in any order, or in their `label` or `group`."""
    refuse(first.loc[first.index.difference(other.index)], f"{other_name} did not test")
    refuse(other.loc[other.index.difference(first.index)], f"{first_name} did not test")
    other = other.loc[first.index]
    for column in ("label", "group"):
        refuse(first[first[column] != other[column]], f"{first_name} and {other_name} differ in the {column} of")


def refuse(clips: DataFrame | Series, fault: str) -> None:
    """Raise a UserError that names the clips, if there are any."""
    if len(clips):
        names = ", ".join(map(str, clips.index[:3]))
        raise UserError(f"{fault} {len(clips)} clips ({names}{', …' if len(clips) > 3 else ''})")
