"""Clips from the Hub, a folder, a Parquet file or the embedded set, divided by their own folds."""

import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pandas import DataFrame, Series

from audio_dendrites.config import DataArguments, RecipeError
from audio_dendrites.synth import load_synthetic

logger = logging.getLogger(__name__)

UNREACHABLE = (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError)


def load_clips(arguments: DataArguments) -> tuple[Dataset, DataFrame]:
    """All clips of a data set: their sound, and what is known of them.

    Returns:
        The sound, not decoded, in `audio_column` (and the names in `clip_column`, if there is one); and an index, row
        by row the same clips, with the text columns `clip`, `fold`, `label` (class name) and `group` (source
        recording, or the clip itself where no column names one).

    Raises:
        RecipeError: The data set is unknown or unreachable, or lacks a column.
    """
    clips = _load(arguments)
    fields = ("audio_column", "label_column", "fold_column", "clip_column", "group_column")
    for field in fields:
        column = getattr(arguments, field)
        if column is not None and column not in clips.column_names:
            raise RecipeError(
                f"{field}: {arguments.dataset} has no column {column!r}; it has {', '.join(clips.column_names)}"
            )
    index = DataFrame({"fold": _texts(clips, arguments.fold_column), "label": _texts(clips, arguments.label_column)})
    index["clip"] = _texts(clips, arguments.clip_column) if arguments.clip_column else index.index.map("{:06d}".format)
    index["group"] = _texts(clips, arguments.group_column) if arguments.group_column else index["clip"]
    sound = [arguments.audio_column] + [arguments.clip_column] * bool(arguments.clip_column)
    return clips.select_columns(sound), index


def split_by_fold(index: DataFrame, arguments: DataArguments) -> dict[str, np.ndarray]:
    """Divide clips into train, validation and test, and look for source recordings on both sides.

    Args:
        index: As `load_clips` gives it.

    Returns:
        The row numbers of the splits `train`, `validation` and `test`.

    Raises:
        RecipeError: A fold is empty, or stands in train and in another split.
    """
    asked = {
        "train": arguments.train_folds,
        "validation": arguments.validation_folds,
        "test": arguments.test_folds,
    }
    present = index["fold"].value_counts().sort_index()
    for split, folds in asked.items():
        if missing := [fold for fold in folds if fold not in present]:
            counts = ", ".join(f"{fold} ({count} clips)" for fold, count in present.items())
            raise RecipeError(f"{split}_folds: no clip in fold {', '.join(missing)}; {arguments.dataset} has {counts}")
    for split in ("validation", "test"):
        if both := sorted(set(asked["train"]) & set(asked[split])):
            raise RecipeError(
                f"fold {', '.join(both)} stands in train_folds and in {split}_folds: the score would be worthless"
            )
    if both := sorted(set(asked["validation"]) & set(asked["test"])):
        logger.warning("Fold %s chooses the checkpoint and tests it: the test score is optimistic.", ", ".join(both))
    splits = {split: np.flatnonzero(index["fold"].isin(folds)) for split, folds in asked.items()}
    return splits | {"train": _check_leaks(index["group"], splits, arguments)}


def class_names(index: DataFrame, splits: dict[str, np.ndarray], arguments: DataArguments) -> list[str]:
    """The classes in the model's order: as the recipe lists them, else those of the training clips, sorted by name.

    Sorting makes the model independent of the order of the rows.

    Raises:
        RecipeError: A clip has a label that is not listed or, in validation and test, that training has none of.
    """
    found = {split: set(index["label"].iloc[rows]) for split, rows in splits.items()}
    labels = arguments.labels or sorted(found["train"])
    for split, names in found.items():
        if strangers := sorted(names - set(labels)):
            raise RecipeError(
                f"labels: {split} clips have the label {', '.join(map(repr, strangers))}, which is not among "
                f"{', '.join(labels)} ({'as the recipe lists them' if arguments.labels else 'as found in training'})"
            )
    if len(labels) < 2:
        raise RecipeError(f"labels: found only {', '.join(labels)}, wanted two classes or more")
    return labels


def drop_bad_clips(
    splits: dict[str, np.ndarray], errors: Sequence[str], on_bad_clip: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Leave out the clips that could not be read.

    Args:
        splits: Row numbers of each split.
        errors: For each row what is wrong with its clip, or "".
        on_bad_clip: error or skip.

    Returns:
        The splits without them, and their errors.

    Raises:
        RecipeError: There are bad clips and `on_bad_clip` is error, or a split has no other.
    """
    errors = np.asarray(errors)
    bad = [errors[row] for rows in splits.values() for row in rows if errors[row]]
    if bad and on_bad_clip == "error":
        listed = "".join(f"\n  {error}" for error in bad[:20]) + f"\n  and {len(bad) - 20} more" * (len(bad) > 20)
        raise RecipeError(f"{len(bad)} clips cannot be used (--on_bad_clip skip leaves them out):{listed}")
    for error in bad:
        logger.warning("Skipped %s", error)
    good = {split: rows[errors[rows] == ""] for split, rows in splits.items()}
    if empty := [split for split, rows in good.items() if not len(rows)]:
        raise RecipeError(
            f"{empty[0]}_folds: none of the {len(splits[empty[0]])} clips can be used; the first: {bad[0]}"
        )
    return good, bad


def is_local(name: str | None) -> bool:
    """Whether a data set or a model is a file or folder of this machine, which then comes before one of the Hub."""
    return name not in (None, "synthetic") and Path(name).expanduser().exists()


def _load(arguments: DataArguments) -> Dataset:
    name, split = arguments.dataset, arguments.dataset_split
    if name == "synthetic":
        return load_synthetic()
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return load_dataset("parquet", data_files=str(path), split=split)
        if path.is_dir():
            return load_dataset(str(path), split=split)
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise RecipeError(
                f"dataset: found {name!r}, which is no folder, no file, no Hub id (owner/name), and not 'synthetic'"
            )
        return load_dataset(name, revision=arguments.dataset_revision, split=split)
    except (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise RecipeError(
            f"dataset: the Hub has no data set {name!r} (revision {arguments.dataset_revision or 'main'}) that you may "
            f"read; check the name, or log in with `hf auth login` if it is private or gated"
        ) from error
    except UNREACHABLE as error:
        raise RecipeError(
            f"dataset: the Hub is not reachable, and {name!r} is not in the cache {datasets.config.HF_DATASETS_CACHE}. "
            f"Fetch it where there is a network with `hf download --repo-type dataset {name}` and set HF_HOME to the "
            f"same cache here, or give a local copy: --dataset FOLDER"
        ) from error
    except ValueError as error:  # unknown split, no data files
        raise RecipeError(f"dataset {name!r}, split {split!r}: {error}") from error


def _texts(clips: Dataset, column: str) -> list[str]:
    """A column as text; class numbers by their names where the data set has them."""
    feature = clips.features[column]
    values = clips.with_format("arrow")[:][column].to_pylist()
    if isinstance(feature, ClassLabel):
        return [feature.names[value] for value in values]
    return [str(value) for value in values]


def _check_leaks(groups: Series, splits: dict[str, np.ndarray], arguments: DataArguments) -> np.ndarray:
    held_out = set(groups.iloc[splits["validation"]]) | set(groups.iloc[splits["test"]])
    train = splits["train"]
    leaks = groups.iloc[train].isin(held_out).to_numpy()
    if not leaks.any():
        return train
    logger.warning(
        "%d training clips share a source recording (%s %s) with validation or test clips: %s.",
        leaks.sum(),
        arguments.group_column,
        ", ".join(sorted(set(groups.iloc[train[leaks]]))),
        "dropped from training" if arguments.drop_leaks else "kept; --drop_leaks drops them from training",
    )
    return train[~leaks] if arguments.drop_leaks else train
