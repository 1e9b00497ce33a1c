"""Clips from the Hub, a folder, a file or the embedded set, divided by folds, by splits of their own, or by chance.

    python -m audio_dendrites.data download configs/urbansound8k/ast.yaml [--field value ...]
    python -m audio_dendrites.data stats configs/urbansound8k/ast.yaml [--field value ...]

The first fetches what a recipe trains on ahead of time, for a machine without network; the second tells what it is.
"""

import argparse
import glob
import io
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import soundfile
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import EmptyDatasetError
from datasets.fingerprint import Hasher
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from huggingface_hub.utils import filter_repo_objects, httpx
from pandas import DataFrame, Series, crosstab
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import MultiLabelBinarizer

from audio_dendrites.audio import BadClip, load_waveform
from audio_dendrites.config import SPLITS, DataArguments, ModelArguments, Recipe, RecipeError, parse_recipe
from audio_dendrites.features import BatchedASTFeatureExtractor
from audio_dendrites.synth import load_synthetic

logger = logging.getLogger(__name__)

# What `from_pretrained` reads of a model and of its feature extractor.
CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
OLD_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
FILES = {".parquet": "parquet", ".csv": "csv"}
DOWNLOAD_NEEDS_IT = "the download needs it"


def load_clips(arguments: DataArguments) -> tuple[Dataset, DataFrame]:
    """All clips of a data set: their sound, and what is known of them.

    Returns:
        The sound, not decoded, in `audio_column` (and the names in `clip_column`, if there is one); and an index, row
        by row the same clips, with the text columns `clip`, `fold`, `label` (class name, or a list of them where the
        data set has lists) and `group` (source recording, or the clip itself where no column names one).

    Raises:
        RecipeError: The data set is unknown or unreachable, or lacks a column.
    """
    clips, splits = _load(arguments)
    fields = ("audio_column", "label_column", "fold_column", "clip_column", "group_column")
    for field in fields:
        column = getattr(arguments, field)
        if column is not None and column not in clips.column_names:
            raise RecipeError(
                f"{field}: {arguments.dataset} has no column {column!r}; it has {', '.join(clips.column_names)}"
            )
    clips, paths = _with_sound(clips, arguments)
    index = DataFrame({"label": _labels(clips, arguments)})
    index["clip"] = _texts(clips, arguments.clip_column) if arguments.clip_column else paths
    index["group"] = _texts(clips, arguments.group_column) if arguments.group_column else index["clip"]
    if arguments.fold_column:
        splits = _texts(clips, arguments.fold_column)
    elif arguments.test_list:
        splits = _listed_splits(index["clip"], arguments)
    index.insert(0, "fold", splits)
    if arguments.drop_labels:
        index = _without_labels(index, arguments)
        clips, index = clips.select(index.index), index.reset_index(drop=True)
    if arguments.split_shares:
        index["fold"] = _drawn_splits(index, arguments)
    sound = [arguments.audio_column] + [arguments.clip_column] * bool(arguments.clip_column)
    return clips.select_columns(sound), index


def split_by_fold(index: DataFrame, arguments: DataArguments) -> dict[str, np.ndarray]:
    """Divide clips into train, validation and test, and look for source recordings on both sides.

    Args:
        index: As `load_clips` gives it.

    Returns:
        The row numbers of the splits `train`, `validation` and `test`, in the order of the clips' names: the same data
        in another order gives the same model.

    Raises:
        RecipeError: A fold is empty.
    """
    asked = arguments.folds
    present = index["fold"].value_counts().sort_index()
    for split, folds in asked.items():
        if missing := [fold for fold in folds if fold not in present]:
            counts = ", ".join(f"{fold} ({count} clips)" for fold, count in present.items())
            raise RecipeError(f"{split}_folds: no clip in fold {', '.join(missing)}; {arguments.dataset} has {counts}")
    if both := sorted(set(asked["validation"]) & set(asked["test"])):
        logger.warning(
            "Fold %s is in validation and in test: if it chooses the checkpoint, its score is optimistic.",
            ", ".join(both),
        )
    by_name = index["clip"].argsort(kind="stable").to_numpy()
    splits = {split: by_name[index["fold"].iloc[by_name].isin(folds)] for split, folds in asked.items()}
    return splits | {"train": _check_leaks(index["group"], splits, arguments)}


def class_names(index: DataFrame, splits: dict[str, np.ndarray], arguments: DataArguments) -> list[str]:
    """The classes in the model's order: as the recipe lists them, else those of the training clips, sorted by name.

    Sorting makes the model independent of the order of the rows.

    Raises:
        RecipeError: A clip has a label that is not listed or, in validation and test, that training has none of.
    """
    found = {split: set(index["label"].iloc[rows].explode().dropna()) for split, rows in splits.items()}
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


def is_multi_label(names: Series) -> bool:
    """Whether clips have lists of class names."""
    return not isinstance(names.iloc[0], str)


def encode_labels(names: Series, labels: Sequence[str]) -> np.ndarray:
    """What a model is trained on.

    Args:
        names: The class name of each clip, or a list of them.
        labels: All of them in the order of the logits.

    Returns:
        Class numbers (clips,), int64, or for lists (clips, classes), float32, 1 for each of a clip's classes.
    """
    if not is_multi_label(names):
        return names.map(list(labels).index).to_numpy()
    return MultiLabelBinarizer(classes=list(labels)).fit_transform(names).astype(np.float32)


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
        raise RecipeError(f"none of the {len(splits[empty[0]])} {empty[0]} clips can be used; the first: {bad[0]}")
    return good, bad


def is_local(name: str | None) -> bool:
    """Whether a data set or a model is a file or folder of this machine, which then comes before one of the Hub."""
    return name not in (None, "synthetic") and Path(name).expanduser().exists()


def download(recipe: Recipe) -> None:
    """Fetch the data set, the base model and the teacher of a recipe, so that it trains with HF_HUB_OFFLINE=1.

    Prints how many bytes come from where, and where they lie then. What is there already is not fetched again, and of
    a model only the files that `from_pretrained` reads.

    Raises:
        RecipeError: The Hub has not got them, or is not reachable.
    """
    _download_dataset(recipe.data)
    _download_model(recipe.model)
    if recipe.training.distill_from:
        _download_model(ModelArguments(model=recipe.training.distill_from))


def _download_dataset(arguments: DataArguments) -> None:
    name, revision = arguments.dataset, arguments.dataset_revision
    if (kind := _kind(name)) != "hub":
        return print(f"dataset {name}: {kind}, nothing to download")
    with _hub_errors("dataset", name, revision, DOWNLOAD_NEEDS_IT):
        info = HfApi().dataset_info(name, revision=revision)
        commit = info.sha
        if arguments.dataset_dir:
            files = [file.rfilename for file in info.siblings]
            wanted = list(filter_repo_objects(files, allow_patterns=_below(arguments)))
            if not wanted:
                raise _no_folder(arguments)
            return _fetch("dataset", name, revision, wanted)
        builder = load_dataset_builder(name, arguments.dataset_config, revision=commit)
        prepared = Path(builder.cache_dir)
        if prepared.is_dir():
            print(f"dataset {name} (revision {commit}): nothing to download")
        else:
            urls = [url for urls in builder.config.data_files.values() for url in urls]
            _fetch("dataset", name, commit, [url.removeprefix(f"hf://datasets/{name}@{commit}/") for url in urls])
            builder.download_and_prepare()
    size = sum(file.stat().st_size for file in prepared.iterdir())
    print(f"dataset {name} (revision {commit}): prepared for training, {size:,} bytes in {prepared}")


def _download_model(arguments: ModelArguments) -> None:
    name, revision = arguments.model, arguments.model_revision
    if name is None:
        return print("model: random weights, nothing to download")
    if Path(name).expanduser().is_dir():
        return print(f"model {name}: local, nothing to download")
    with _hub_errors("model", name, revision, DOWNLOAD_NEEDS_IT):
        present = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings]
        weights = list(filter_repo_objects(present, allow_patterns=WEIGHT_FILES))
        weights = weights or list(filter_repo_objects(present, allow_patterns=OLD_WEIGHT_FILES))
        if not weights:
            raise RecipeError(f"model: {name} has no weights, wanted one of {', '.join(WEIGHT_FILES)}")
        _fetch("model", name, revision, [*filter_repo_objects(present, allow_patterns=CONFIG_FILES), *weights])


def _fetch(repo_type: str, name: str, revision: str | None, files: Iterable[str]) -> None:
    """Bring files of a repository into the Hub's cache, and say what that takes."""
    files = list(files)
    info = HfApi().repo_info(name, repo_type=repo_type, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings if file.rfilename in files}
    missing = {
        file: size
        for file, size in sizes.items()
        if not isinstance(try_to_load_from_cache(name, file, revision=info.sha, repo_type=repo_type), str)
    }
    source = f"{repo_type} {name} (revision {info.sha})"
    if missing:
        print(f"{source}: downloading {sum(missing.values()):,} bytes, {len(missing)} files, from {constants.ENDPOINT}")
    # The revision as the recipe has it, because the cache finds a branch or a tag by its name alone.
    folder = Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=files))
    fetched = sum((folder / file).stat().st_size for file in missing)
    total = sum((folder / file).stat().st_size for file in sizes)
    print(f"{source}: {f'{fetched:,} bytes downloaded' if missing else 'nothing to download'}, {total:,} in {folder}")


def stats(recipe: Recipe) -> None:
    """Print what a recipe's data set holds: clips by class and fold, lengths, rates, leaks, and the log-mel's level.

    Mean and standard deviation are those of the log-mel energies (`ASTFeatureExtractor`'s, before normalisation) over
    all frames and bands of the training clips at their own length: what the fields `mean` and `std` want.

    Raises:
        RecipeError: The data set is unknown or unreachable, its folds do not fit, or no training clip can be read.
    """
    arguments = recipe.data
    clips, index = load_clips(arguments)
    splits = split_by_fold(index, arguments)
    print(f"{len(clips):,} clips of {arguments.dataset}\n")
    labelled = index.explode("label")
    counts = crosstab(labelled["label"], labelled["fold"], margins=True, margins_name="all")
    folds = sorted(set(index["fold"]), key=lambda fold: (len(fold), fold))
    print(counts.reindex(columns=[*folds, "all"]).to_string())

    settings = {name: getattr(recipe.features, name) for name in ("sampling_rate", "num_mel_bins")}
    chosen = {name: value for name, value in settings.items() if value is not None}
    extractor = BatchedASTFeatureExtractor(**chosen, do_normalize=False)
    sound = clips.select_columns(arguments.audio_column).cast_column(arguments.audio_column, Audio(decode=False))
    train, seconds, rates, bad = set(splits["train"].tolist()), [], Counter(), []
    count, total, squares = 0, 0.0, 0.0
    for row, name in enumerate(index["clip"]):
        audio = sound[row][arguments.audio_column]
        try:
            info = soundfile.info(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"])
            seconds.append(info.duration)
            rates[info.samplerate] += 1
            if row in train:
                energies = extractor.log_mel([load_waveform(audio, extractor.sampling_rate, name)])[0].double()
                count, total = count + energies.numel(), total + energies.sum().item()
                squares += energies.square().sum().item()
        except (BadClip, soundfile.LibsndfileError) as error:
            bad.append(f"{name}: {error}" if name not in str(error) else str(error))
    if not count:
        raise RecipeError(f"none of the {len(train)} training clips can be read; the first: {bad[0]}")

    low, middle, high = np.quantile(seconds, [0, 0.5, 1])
    print(f"\nseconds: {low:.3f} shortest, {middle:.3f} median, {high:.3f} longest, {sum(seconds):,.0f} in all")
    print("sampling rates: " + ", ".join(f"{rate} Hz ({clips} clips)" for rate, clips in sorted(rates.items())))
    print(f"unreadable clips: {len(bad)}" + "".join(f"\n  {error}" for error in bad[:20]))
    by_group = index.groupby("group")["fold"].unique()
    leaks = by_group[by_group.map(len) > 1]
    print(f"source recordings in several folds: {len(leaks)} of {len(by_group)}")
    for group, found in leaks.items():
        print(f"  {group}: folds {', '.join(sorted(found))}")
    mean = total / count
    print(f"log-mel of the training folds ({', '.join(arguments.folds['train'])}), {len(train):,} clips:")
    print(f"mean: {mean:.4f}\nstd: {(squares / count - mean**2) ** 0.5:.4f}")


def _load(arguments: DataArguments) -> tuple[Dataset, list[str]]:
    """All clips of the splits that are asked for, and for each clip the name of its split."""
    name, revision = arguments.dataset, arguments.dataset_revision
    kind, cache = _kind(name), datasets.config.HF_DATASETS_CACHE
    wanted = list(dict.fromkeys(split for folds in arguments.folds.values() for split in folds))
    wanted = wanted if arguments.train_split else [arguments.dataset_split]
    if arguments.train_split and kind in ("file", "synthetic"):
        raise RecipeError(f"train_split: {name} has no splits of its own: wanted folds (fold_column) or split_shares")
    if kind == "synthetic":
        clips = load_synthetic()
        return clips, ["train"] * len(clips)
    way_out = (
        f"{name!r} is not in the cache {cache}. Fetch it where there is a network with `python -m audio_dendrites.data "
        f"download RECIPE` and set HF_HOME to the same cache here, or give a local copy: --dataset FOLDER"
    )
    try:
        if kind == "file":
            if (suffix := Path(name).suffix.lower()) not in FILES:
                raise RecipeError(f"dataset: found the file {name}, wanted {' or '.join(FILES)}")
            loaded = load_dataset(FILES[suffix], data_files=str(Path(name).expanduser()), split=wanted)
        elif kind == "folder":
            folder = Path(name).expanduser() / (arguments.dataset_dir or "")
            if not folder.is_dir():
                raise _no_folder(arguments)
            loaded = _load_folder(folder, arguments, wanted)
        else:
            with _hub_errors("dataset", name, revision, way_out):
                place, options = _place(arguments)
                loaded = load_dataset(place, split=wanted, **options)
    except RecipeError:
        raise
    except (EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise RecipeError(f"dataset {name!r}: no audio and no Parquet file found ({error})") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:  # unknown split, broken file
        raise RecipeError(f"dataset {name!r}, split {', '.join(wanted)!r}: {error}") from error
    clips = loaded[0] if len(loaded) == 1 else concatenate_datasets(loaded)
    # Where the Hub is out of reach the library takes the revision that it prepared last, whichever was asked for.
    found = {Path(file["filename"]).parent.name for file in clips.cache_files}
    if (
        kind == "hub"
        and not arguments.dataset_dir
        and revision
        and REGEX_COMMIT_HASH.fullmatch(revision)
        and found - {revision}
    ):
        raise RecipeError(
            f"dataset_revision: found {', '.join(found)} of {name!r} in the cache {cache}, wanted {revision}, and the "
            f"Hub is not reachable"
        )
    return clips, [split for split, part in zip(wanted, loaded, strict=True) for _ in range(len(part))]


def _place(arguments: DataArguments) -> tuple[str, dict[str, Any]]:
    """What `load_dataset` wants to find a data set of the Hub.

    One that is a folder of its repository is fetched here, because without network the library does not find it again.
    """
    name, revision = arguments.dataset, arguments.dataset_revision
    if not arguments.dataset_dir:
        return name, {"name": arguments.dataset_config, "revision": revision}
    fetched = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=_below(arguments))
    folder = Path(fetched, arguments.dataset_dir)
    if not folder.is_dir():
        raise _no_folder(arguments)
    return str(folder), {}


def _no_folder(arguments: DataArguments) -> RecipeError:
    where = "" if is_local(arguments.dataset) else f" (revision {arguments.dataset_revision or 'main'})"
    return RecipeError(f"dataset_dir: {arguments.dataset}{where} has no folder {arguments.dataset_dir}")


def _below(arguments: DataArguments) -> str:
    return f"{arguments.dataset_dir.rstrip('/')}/*"


def _load_folder(folder: Path, arguments: DataArguments, wanted: list[str]) -> list[Dataset]:
    """A folder of Parquet files, or of class folders: <class>/<clip>, below <split>/ where splits are asked for."""
    if any(folder.rglob("*.parquet")):
        return load_dataset(str(folder), split=wanted)
    # Told by hand, because the library takes a class folder named "train" or "test" for a split.
    places = {split: folder / split if arguments.train_split else folder for split in wanted}
    if missing := [split for split, place in places.items() if not place.is_dir()]:
        raise RecipeError(f"dataset: found no folder {missing[0]} in {folder}, wanted {'/, '.join(wanted)}/ there")
    loaded = load_dataset(
        "audiofolder",
        data_files={split: f"{glob.escape(str(place))}/**" for split, place in places.items()},
        drop_labels=False,
        drop_metadata=True,
        # As text, because the library encodes Audio with torchcodec alone, which needs FFmpeg.
        features=Features({"audio": Value("string"), "label": Value("string")}),
        split=wanted,
    )
    for clips, place in zip(loaded, places.values(), strict=True):
        if strays := [path for path in clips["audio"] if Path(path).parent == place.resolve()]:
            raise RecipeError(f"dataset: found {strays[0]} in no class folder, wanted {place}/<class>/<clip>")
    return loaded


def _with_sound(clips: Dataset, arguments: DataArguments) -> tuple[Dataset, list[str]]:
    """Paths in text columns become audio; and a name for each clip: its path if all have different ones, or its row."""
    column, folder = arguments.audio_column, Path(arguments.dataset).expanduser().resolve()
    folder = folder if folder.is_dir() else folder.parent
    kind = clips.features[column]
    if isinstance(kind, Audio | dict):
        paths = [path for chunk in clips.data.column(column).chunks for path in chunk.field("path").to_pylist()]
    elif kind in (Value("string"), Value("large_string")):
        paths = clips.with_format("arrow")[:][column].to_pylist()
        if _kind(arguments.dataset) == "hub":
            raise RecipeError(f"audio_column: {column!r} of {arguments.dataset} holds text, wanted Audio")
        if missing := [row for row, path in enumerate(paths) if not path]:
            raise RecipeError(
                f"audio_column: {len(missing)} rows have no path in {column!r}, the first is {missing[0]}"
            )
        files = [str(folder / path) for path in paths]
        # The features are computed again where a file has changed.
        states = [(file, stat.st_mtime_ns, stat.st_size) for file in files if (stat := _stat(file))]
        clips = clips.with_format("arrow").map(
            _as_audio, fn_kwargs={"column": column, "folder": str(folder)}, batched=True,
            features=Features({**clips.features, column: Audio(decode=False)}),
            new_fingerprint=Hasher.hash([clips._fingerprint, files, states]), desc="Paths",
        ).with_format(None)  # fmt: skip
        paths = [
            Path(file).relative_to(folder).as_posix() if Path(file).is_relative_to(folder) else file for file in files
        ]
    elif kind == Value("binary"):
        paths = [None] * len(clips)
    else:
        raise RecipeError(f"audio_column: {column!r} of {arguments.dataset} holds {kind}, wanted Audio or paths")
    unique = None not in paths and len(set(paths)) == len(paths)
    return clips, paths if unique else [f"{row:06d}" for row in range(len(paths))]


def _stat(file: str) -> os.stat_result | None:
    return os.stat(file) if os.path.isfile(file) else None


def _as_audio(table: pa.Table, column: str, folder: str) -> pa.Table:
    """The column's paths, relative to a folder, as what `Audio` stores."""
    sounds = [{"bytes": None, "path": str(Path(folder, path))} for path in table[column].to_pylist()]
    stored = pa.array(sounds, Audio().pa_type)
    return table.set_column(table.column_names.index(column), column, stored)


def _drawn_splits(index: DataFrame, arguments: DataArguments) -> np.ndarray:
    """The name of each clip's split, drawn by source recording and stratified by class.

    The shares are multiples of 1 / k, and so many of the k folds of scikit-learn's `StratifiedGroupKFold`. A clip of
    several classes counts for the rarest of them.
    """
    shares = [Fraction(share).limit_denominator(20) for share in arguments.split_shares]
    parts = lcm(*(share.denominator for share in shares))
    if sum(shares) != 1 or parts > 60:
        raise RecipeError(
            f"split_shares: found {arguments.split_shares}, wanted multiples of 0.05, 1/3, 1/4 or the like"
        )
    if (groups := index["group"].nunique()) < parts:
        raise RecipeError(
            f"split_shares: found {groups} source recordings, wanted at least {parts} for {arguments.split_shares}"
        )
    rows = index.sort_values("clip", kind="stable").index.to_numpy()  # any order of the rows gives the same
    labels = index["label"]
    if is_multi_label(labels):
        counts = labels.explode().value_counts()
        labels = labels.map(lambda names: min(names, key=lambda name: (counts[name], name), default=""))
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=arguments.split_seed)
    bounds = np.cumsum([int(share * parts) for share in shares])
    splits = np.empty(len(index), dtype=object)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class in y has only")
        for fold, (_, held_out) in enumerate(splitter.split(rows, labels[rows], index["group"][rows])):
            splits[rows[held_out]] = SPLITS[np.searchsorted(bounds, fold, side="right")]
    if empty := [split for split in SPLITS if split not in splits]:
        raise RecipeError(f"split_shares: {empty[0]} got no clip of {groups} source recordings; try another split_seed")
    return splits


def _listed_splits(names: Series, arguments: DataArguments) -> np.ndarray:
    """The name of each clip's split, by the two lists of clips."""
    folder = Path(arguments.dataset).expanduser()
    folder = folder if folder.is_dir() else folder.parent if folder.exists() else Path()
    splits = np.full(len(names), "train", dtype=object)
    for split in ("validation", "test"):
        path = folder / getattr(arguments, f"{split}_list")
        try:
            listed = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
        except OSError as error:
            raise RecipeError(f"{split}_list: {path}: {error.strerror}, wanted a name of a clip a line") from error
        if strangers := sorted(listed - set(names)):
            raise RecipeError(
                f"{split}_list: {path} names {len(strangers)} clips that {arguments.dataset} has not, the first is "
                f"{strangers[0]}; its own are named as {names[0]}"
            )
        chosen = names.isin(listed)
        if twice := sorted(names[chosen & (splits != "train")]):
            raise RecipeError(f"{split}_list: {path} names {len(twice)} clips of validation_list, as {twice[0]}")
        splits[chosen] = split
    return splits


def _without_labels(index: DataFrame, arguments: DataArguments) -> DataFrame:
    """The clips without those of the classes that are to be dropped."""
    dropped, labels = set(arguments.drop_labels), index["label"]
    if strangers := sorted(dropped - set(labels.explode())):
        raise RecipeError(
            f"drop_labels: {arguments.dataset} has no clip of {', '.join(strangers)}; it has "
            f"{', '.join(sorted(set(labels.explode().dropna())))}"
        )
    if is_multi_label(labels):
        kept = labels.map(lambda names: [name for name in names if name not in dropped])
        return index.assign(label=kept)[(kept.map(len) > 0) | (labels.map(len) == 0)]
    return index[~labels.isin(dropped)]


def _kind(dataset: str) -> str:
    """Whether a data set is synthetic, a file, a folder, or on the hub.

    Raises:
        RecipeError: It can be none of these.
    """
    path = Path(dataset).expanduser()
    if dataset == "synthetic":
        return "synthetic"
    if path.exists():
        return "folder" if path.is_dir() else "file"
    if dataset.startswith((".", "/", "~")) or dataset.count("/") != 1:
        raise RecipeError(
            f"dataset: found {dataset!r}, which is no folder, no file, no Hub id (owner/name), and not 'synthetic'"
        )
    return "hub"


@contextmanager
def _hub_errors(field: str, name: str, revision: str | None, way_out: str) -> Iterator[None]:
    """What goes wrong between here and the Hub becomes a RecipeError; `way_out` is what to do without the Hub."""
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise RecipeError(
            f"{field}: the Hub has no {'data set' if field == 'dataset' else field} {name!r} (revision "
            f"{revision or 'main'}) that you may read; check the name, or log in with `hf auth login` if it is private "
            f"or gated"
        ) from error
    except (datasets.exceptions.DataFilesNotFoundError, EmptyDatasetError) as error:
        raise RecipeError(f"{field}: {error}") from error
    except (HfHubHTTPError, httpx.TransportError, ConnectionError, FileNotFoundError) as error:
        cause = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):  # the libraries wrap it several times
            cause = cause.__cause__ or cause.__context__
        state = "is not reachable"
        if cause is not None:
            state = f"answers {cause.response.status_code} ({cause.server_message or 'without a word'})"
        raise RecipeError(f"{field}: the Hub {state}, and {way_out}") from error


def _labels(clips: Dataset, arguments: DataArguments) -> list[str] | list[list[str]]:
    """The class name of each clip, or a list of them."""
    column = arguments.label_column
    values = clips.with_format("arrow")[:][column].to_pylist()
    if missing := [row for row, value in enumerate(values) if value is None or value != value]:
        raise RecipeError(f"label_column: {len(missing)} rows have nothing in {column!r}, the first is {missing[0]}")
    labels = _texts(clips, column)
    if (separator := arguments.label_separator) is None:
        return labels
    if isinstance(labels[0], list):
        raise RecipeError(f"label_separator: found {separator!r}, but {column!r} holds lists already: wanted none")
    return [[name.strip() for name in text.split(separator) if name.strip()] for text in labels]


def _texts(clips: Dataset, column: str) -> list[Any]:
    """A column as text, lists as lists of it; class numbers by their names where the data set has them."""
    feature = clips.features[column]
    values = clips.with_format("arrow")[:][column].to_pylist()
    if isinstance(feature, List):
        return [[_text(feature.feature, value) for value in row] for row in values]
    return [_text(feature, value) for value in values]


def _text(feature: Any, value: Any) -> str:
    return feature.names[value] if isinstance(feature, ClassLabel) else str(value)


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


COMMANDS = {"download": download, "stats": stats}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m audio_dendrites.data",
        usage="%(prog)s {" + ",".join(COMMANDS) + "} RECIPE [--field value ...]",
        description="download: fetch the data set and the base model of a recipe, for machines without network. "
        "stats: print counts, lengths, rates, leaks, and mean and std of the log-mel.",
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    try:
        COMMANDS[command](parse_recipe(argv[1:]))
    except RecipeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
