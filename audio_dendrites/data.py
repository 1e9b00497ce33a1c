"""Clips from the Hub, a folder, a Parquet file or the embedded set, divided by their own folds.

    python -m audio_dendrites.data download configs/urbansound8k/ast.yaml [--field value ...]
    python -m audio_dendrites.data stats configs/urbansound8k/ast.yaml [--field value ...]

The first fetches what a recipe trains on ahead of time, for a machine without network; the second tells what it is.
"""

import argparse
import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import soundfile
from datasets import Audio, ClassLabel, Dataset, load_dataset, load_dataset_builder
from datasets.data_files import EmptyDatasetError
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from huggingface_hub.utils import filter_repo_objects, httpx
from pandas import DataFrame, Series, crosstab

from audio_dendrites.audio import BadClip, load_waveform
from audio_dendrites.config import DataArguments, ModelArguments, Recipe, RecipeError, parse_recipe
from audio_dendrites.features import BatchedASTFeatureExtractor
from audio_dendrites.synth import load_synthetic

logger = logging.getLogger(__name__)

# What `from_pretrained` reads of a model and of its feature extractor.
CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
OLD_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
DOWNLOAD_NEEDS_IT = "the download needs it"


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


def download(recipe: Recipe) -> None:
    """Fetch the data set and the base model of a recipe, so that it trains with HF_HUB_OFFLINE=1.

    Prints how many bytes come from where, and where they lie then. What is there already is not fetched again, and of
    a model only the files that `from_pretrained` reads.

    Raises:
        RecipeError: The Hub has not got them, or is not reachable.
    """
    _download_dataset(recipe.data)
    _download_model(recipe.model)


def _download_dataset(arguments: DataArguments) -> None:
    name, revision = arguments.dataset, arguments.dataset_revision
    if (kind := _kind(name)) != "hub":
        return print(f"dataset {name}: {kind}, nothing to download")
    with _hub_errors("dataset", name, revision, DOWNLOAD_NEEDS_IT):
        commit = HfApi().dataset_info(name, revision=revision).sha
        builder = load_dataset_builder(name, revision=commit)
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


def _fetch(repo_type: str, name: str, revision: str | None, files: Sequence[str]) -> None:
    """Bring files of a repository into the Hub's cache, and say what that takes."""
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
    counts = crosstab(index["label"], index["fold"], margins=True, margins_name="all")
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
        raise RecipeError(f"train_folds: none of the {len(train)} clips can be read; the first: {bad[0]}")

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
    print(f"log-mel of the training folds ({', '.join(arguments.train_folds)}), {len(train):,} clips:")
    print(f"mean: {mean:.4f}\nstd: {(squares / count - mean**2) ** 0.5:.4f}")


def _load(arguments: DataArguments) -> Dataset:
    name, split, revision = arguments.dataset, arguments.dataset_split, arguments.dataset_revision
    kind, cache = _kind(name), datasets.config.HF_DATASETS_CACHE
    if kind == "synthetic":
        return load_synthetic()
    way_out = (
        f"{name!r} is not in the cache {cache}. Fetch it where there is a network with `python -m audio_dendrites.data "
        f"download RECIPE` and set HF_HOME to the same cache here, or give a local copy: --dataset FOLDER"
    )
    try:
        if kind == "file":
            return load_dataset("parquet", data_files=str(Path(name).expanduser()), split=split)
        if kind == "folder":
            return load_dataset(str(Path(name).expanduser()), split=split)
        with _hub_errors("dataset", name, revision, way_out):
            clips = load_dataset(name, revision=revision, split=split)
    except RecipeError:
        raise
    except ValueError as error:  # unknown split, no data files
        raise RecipeError(f"dataset {name!r}, split {split!r}: {error}") from error
    # Where the Hub is out of reach the library takes the revision that it prepared last, whichever was asked for.
    found = {Path(file["filename"]).parent.name for file in clips.cache_files}
    if revision and REGEX_COMMIT_HASH.fullmatch(revision) and found - {revision}:
        raise RecipeError(
            f"dataset_revision: found {', '.join(found)} of {name!r} in the cache {cache}, wanted {revision}, and the "
            f"Hub is not reachable"
        )
    return clips


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
