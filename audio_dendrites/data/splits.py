"""Divide clips into train, validation and test: by folds, by the data set's own splits, by lists, or at random."""

import logging
import warnings
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain
from math import lcm
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute as pc
from pandas import DataFrame, Series
from pandas.arrays import ArrowExtensionArray, ArrowStringArray
from scipy.sparse import csr_array
from sklearn.model_selection import StratifiedGroupKFold

from audio_dendrites.errors import UserError, listed
from audio_dendrites.recipes import SPLITS, DataArguments

logger = logging.getLogger(__name__)


def folder_of(arguments: DataArguments) -> Path:
    """The folder to which the paths of a local data set are relative: its own, or that of its table."""
    path = Path(arguments.dataset).expanduser()
    return (path if path.is_dir() else path.parent) / (arguments.dataset_dir or "")


def loaded_splits(arguments: DataArguments) -> tuple[str, ...]:
    """The splits that are in the index. With `streaming`, the training clips are not."""
    return SPLITS[1:] if arguments.streaming else SPLITS


def split_by_fold(index: DataFrame, arguments: DataArguments, chooses: bool = True) -> dict[str, np.ndarray]:
    """Divide clips into train, validation and test, and warn of source recordings in train and in another split.

    Args:
        index: The index that `load_clips` returns.
        arguments: Name the folds.
        chooses: Whether a validation score chooses the checkpoint.

    Returns:
        The row numbers of the splits that `loaded_splits` names, in the order of the names of the clips. The same
        data in another order therefore gives the same model.

    Raises:
        UserError: A fold is empty.
    """
    asked = {split: arguments.folds[split] for split in loaded_splits(arguments)}
    present = index["fold"].value_counts().sort_index()
    for split, folds in asked.items():
        if missing := [fold for fold in folds if fold not in present]:
            counts = listed(f"{fold} ({count} clips)" for fold, count in present.items())
            raise UserError(f"{split}_folds: no clip in fold {', '.join(missing)}; {arguments.dataset} has {counts}")
    if chooses and (both := sorted(set(asked["validation"]) & set(asked["test"]))):
        logger.warning(
            "Fold %s is in validation and in test. It chooses the checkpoint, so its test score is optimistic.",
            ", ".join(both),
        )
    by_name = index["clip"].argsort(kind="stable").to_numpy()
    inside = {split: index["fold"].isin(folds).to_numpy() for split, folds in asked.items()}
    splits = {split: by_name[chosen[by_name]] for split, chosen in inside.items()}
    if arguments.streaming:
        return splits
    return splits | {"train": _check_leaks(index["group"], splits, arguments)}


def class_names(index: DataFrame, splits: dict[str, np.ndarray], arguments: DataArguments) -> list[str]:
    """The classes in the order of the model's outputs: those of the recipe, or those of the training clips, sorted.

    Sorting makes the model independent of the order of the rows.

    Raises:
        UserError: A clip has a label that is not one of these classes, or there are fewer than two classes.
    """
    found = {split: _class_set(index["label"].iloc[rows]) for split, rows in splits.items()}
    labels = arguments.labels or sorted(found["train"])
    for split, names in found.items():
        if strangers := sorted(names - set(labels)):
            source = "of the recipe" if arguments.labels else "of the training clips"
            raise UserError(
                f"labels: the labels of the {split} clips must be labels {source} ({listed(labels)}), got "
                f"{listed(map(repr, strangers))}; add them to labels or to drop_labels"
            )
    if "train" in found and (unseen := sorted(set(labels) - found["train"])):
        logger.warning("labels: no training clip has the label %s, so the model cannot learn it.", listed(unseen))
    if len(labels) < 2:
        raise UserError(f"labels: the training clips must have at least two classes, got {', '.join(labels) or 'none'}")
    return labels


def is_multi_label(names: Series) -> bool:
    """Whether clips have lists of class names."""
    return not isinstance(names.iloc[0], str)


def flat_labels(names: Series) -> tuple[np.ndarray, pa.Array]:
    """The class names of all clips one after another.

    Args:
        names: The class name of each clip, or a list of names.

    Returns:
        For each name the number of its clip, from 0, ascending; and the names.
    """
    column = pa.array(names)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_nested(column.type):
        return np.arange(len(column)), column.cast(pa.large_string())
    return pc.list_parent_indices(column).to_numpy(), pc.list_flatten(column).cast(pa.large_string())


def lists_of(names: pa.Array, rows: np.ndarray, count: int) -> Series:
    """Turn what `flat_labels` returns into a list for each of `count` clips."""
    offsets = np.searchsorted(rows, np.arange(count + 1)).astype(np.int32)
    return Series(ArrowExtensionArray(pa.ListArray.from_arrays(pa.array(offsets), names)))


def _class_set(names: Series) -> set[str]:
    return set(flat_labels(names)[1].unique().to_pylist())


def encode_labels(names: Series, labels: Sequence[str], sparse: bool = False) -> np.ndarray | csr_array:
    """Encode class names as training targets.

    Args:
        names: The class name of each clip, or a list of names.
        labels: All class names in the order of the logits.
        sparse: Whether a matrix is sparse. With 527 classes, it is a hundred times smaller.

    Returns:
        Class numbers (clips,), int64. For lists: (clips, classes), float32, 1 for each class of a clip and 0 elsewhere.
    """
    rows, values = flat_labels(names)
    numbers = pc.index_in(values, pa.array(labels, pa.large_string())).to_numpy()
    if not is_multi_label(names):
        return numbers.astype(np.int64)
    matrix = csr_array((np.ones(len(rows), np.float32), (rows, numbers)), shape=(len(names), len(labels)))
    matrix.data[:] = 1  # also where a clip has a class twice
    return matrix if sparse else matrix.toarray()


def drop_bad_clips(
    splits: dict[str, np.ndarray], errors: Series, on_bad_clip: str
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Leave out the clips that cannot be used, such as silent or damaged ones.

    Args:
        splits: Row numbers of each split.
        errors: What is wrong with the clip of each row, or "".
        on_bad_clip: error or skip.

    Returns:
        The splits without these clips, and the errors of each split that has errors.

    Raises:
        UserError: There are bad clips and `on_bad_clip` is error, or a split has no other clips.
    """
    faulty = (errors != "").to_numpy()
    bad = {split: errors.iloc[rows[faulty[rows]]].tolist() for split, rows in splits.items()}
    faults = list(chain(*bad.values()))
    told = "".join(f"\n  {error}" for error in faults[:20]) + f"\n  and {len(faults) - 20} more" * (len(faults) > 20)
    if faults and on_bad_clip == "error":
        raise UserError(f"{len(faults)} clips cannot be used (--on_bad_clip skip leaves them out):{told}")
    good = {split: rows[~faulty[rows]] for split, rows in splits.items()}
    if empty := [split for split, rows in good.items() if not len(rows)]:
        raise UserError(
            f"none of the {len(splits[empty[0]])} {empty[0]} clips can be used; the first: {bad[empty[0]][0]}"
        )
    if faults:
        logger.warning("%d clips cannot be used and are left out:%s", len(faults), told)
    return good, {split: found for split, found in bad.items() if found}


def drawn_splits(index: DataFrame, arguments: DataArguments) -> ArrowStringArray:
    """Draw the split of each clip at random, by source recording and stratified by class.

    The shares must be multiples of some 1 / k. Each split gets its share of the k folds of scikit-learn's
    `StratifiedGroupKFold`. A clip of several classes counts as a clip of the rarest one.
    """
    shares = [Fraction(share).limit_denominator(20) for share in arguments.split_shares]
    parts = lcm(*(share.denominator for share in shares))
    if sum(shares) != 1 or parts > 60:
        raise UserError(
            f"split_shares must be multiples of one fraction such as 0.05, 1/3 or 1/4, got {arguments.split_shares}"
        )
    if (count := index["group"].nunique()) < parts:
        raise UserError(
            f"split_shares: {arguments.split_shares} need at least {parts} source recordings, got {count}; choose "
            f"coarser shares"
        )
    rows = index.sort_values("clip", kind="stable").index.to_numpy()  # so that the order of the rows does not matter
    labels, groups = _rarest_class(index["label"]), index["group"].factorize(sort=True)[0]
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=arguments.split_seed)
    bounds = np.cumsum([int(share * parts) for share in shares])
    numbers = np.empty(len(index), dtype=np.int8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class in y has only")
        for fold, (_, held_out) in enumerate(splitter.split(rows, labels[rows], groups[rows])):
            numbers[rows[held_out]] = np.searchsorted(bounds, fold, side="right")
    if empty := [split for number, split in enumerate(SPLITS) if number not in numbers]:
        raise UserError(f"split_shares: {empty[0]} got no clip of {count} source recordings; try another split_seed")
    return _split_names(numbers)


def _rarest_class(names: Series) -> np.ndarray:
    """A number for the rarest class of each clip, in the order of the names of the classes. -1: no class."""
    rows, values = flat_labels(names)
    classes = pc.index_in(values, values.unique().sort()).to_numpy()
    order = np.argsort(np.bincount(classes), kind="stable")
    rarity = np.append(order.argsort(), len(order))
    rarest = np.full(len(names), len(order))
    np.minimum.at(rarest, rows, rarity[classes])
    return np.append(order, -1)[rarest]


def _split_names(numbers: np.ndarray) -> ArrowStringArray:
    """The names of the splits with these numbers, as text."""
    return pandas.array(pa.array(SPLITS).take(pa.array(numbers)), dtype="str")


def listed_splits(names: Series, arguments: DataArguments) -> ArrowStringArray:
    """The split of each clip according to `validation_list` and `test_list`."""
    folder = folder_of(arguments) if Path(arguments.dataset).expanduser().exists() else Path()
    numbers = np.zeros(len(names), dtype=np.int8)
    for number, split in enumerate(SPLITS[1:], 1):
        path = folder / getattr(arguments, f"{split}_list")
        try:
            lines = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
        except OSError as error:
            raise UserError(
                f"{split}_list must be a file with the name of a clip in each line, got {path}: {error.strerror}"
            ) from error
        members = Series(sorted(lines), dtype="str")
        if strangers := members[~members.isin(names)].tolist():
            raise UserError(
                f"{split}_list: {path} must name clips of {arguments.dataset}, such as {names[0]}, got "
                f"{len(strangers)} other names, the first is {strangers[0]}"
            )
        chosen = names.isin(members).to_numpy()
        if twice := sorted(names[chosen & (numbers > 0)]):
            raise UserError(
                f"{split}_list: {path} must not name clips of validation_list, got {len(twice)} of them, "
                f"the first is {twice[0]}"
            )
        numbers[chosen] = number
    return _split_names(numbers)


def without_labels(index: DataFrame, arguments: DataArguments) -> DataFrame:
    """The index without the classes in `drop_labels`."""
    dropped, labels = set(arguments.drop_labels), index["label"]
    rows, names = flat_labels(labels)
    present = set(names.unique().to_pylist())
    if strangers := sorted(dropped - present):
        raise UserError(
            f"drop_labels must be classes of {arguments.dataset} ({listed(sorted(present))}), got {listed(strangers)}"
        )
    kept = pc.invert(pc.is_in(names, pa.array(sorted(dropped), pa.large_string())))
    kept_rows = rows[kept.to_numpy(zero_copy_only=False)]
    emptied = np.setdiff1d(rows, kept_rows)  # clips that had classes and have none left
    if is_multi_label(labels):
        index = index.assign(label=lists_of(names.filter(kept), kept_rows, len(labels)))
    return index.drop(emptied)


def _check_leaks(groups: Series, splits: dict[str, np.ndarray], arguments: DataArguments) -> np.ndarray:
    held_out = groups.iloc[np.concatenate([splits["validation"], splits["test"]])].unique()
    train = splits["train"]
    leaks = groups.isin(held_out).to_numpy()[train]
    if not leaks.any():
        return train
    logger.warning(
        "%d training clips share a source recording (%s %s) with validation or test clips: %s.",
        leaks.sum(),
        arguments.group_column,
        listed(sorted(set(groups.iloc[train[leaks]]))),
        "dropped from training" if arguments.drop_leaks else "kept; --drop_leaks drops them from training",
    )
    return train[~leaks] if arguments.drop_leaks else train
