"""Load clips from the Hub, a folder, a file or the embedded set: their sound, and an index of what is known of them."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.data_files import EmptyDatasetError
from datasets.fingerprint import Hasher
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from huggingface_hub.utils import httpx
from pandas import DataFrame

from audio_dendrites.data.audio import SUFFIXES
from audio_dendrites.data.splits import drawn_splits, listed_splits, without_labels
from audio_dendrites.data.synthetic import load_synthetic
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments

FILES = {".parquet": "parquet", ".csv": "csv"}


def load_clips(arguments: DataArguments) -> tuple[Dataset, DataFrame]:
    """All clips of a data set: their sound, and what is known of them.

    Returns:
        The sound, not decoded, in `audio_column` (and the names in `clip_column`, if there is one); and an index, row
        by row the same clips, with the text columns `clip`, `fold`, `label` (class name, or a list of them where the
        data set has lists) and `group` (source recording, or the clip itself where no column names one).

    Raises:
        UserError: The data set is unknown or unreachable, or lacks a column.
    """
    clips, splits = _load(arguments)
    fields = ("audio_column", "label_column", "fold_column", "clip_column", "group_column")
    for field in fields:
        column = getattr(arguments, field)
        if column is not None and column not in clips.column_names:
            raise UserError(
                f"{field}: {arguments.dataset} has no column {column!r}; it has {', '.join(clips.column_names)}"
            )
    clips, paths = _with_sound(clips, arguments)
    index = DataFrame({"label": _labels(clips, arguments)})
    index["clip"] = _texts(clips, arguments.clip_column) if arguments.clip_column else paths
    index["group"] = _texts(clips, arguments.group_column) if arguments.group_column else index["clip"]
    if arguments.fold_column:
        splits = _texts(clips, arguments.fold_column)
    elif arguments.test_list:
        splits = listed_splits(index["clip"], arguments)
    index.insert(0, "fold", splits)
    if arguments.drop_labels:
        index = without_labels(index, arguments)
        clips, index = clips.select(index.index), index.reset_index(drop=True)
    if arguments.split_shares:
        index["fold"] = drawn_splits(index, arguments)
    sound = [arguments.audio_column] + [arguments.clip_column] * bool(arguments.clip_column)
    return clips.select_columns(sound), index


def is_local(name: str | None) -> bool:
    """Whether a data set or a model is a file or folder of this machine, which then comes before one of the Hub."""
    return name not in (None, "synthetic") and Path(name).expanduser().exists()


def _load(arguments: DataArguments) -> tuple[Dataset, list[str]]:
    """All clips of the splits that are asked for, and for each clip the name of its split."""
    name, revision = arguments.dataset, arguments.dataset_revision
    kind, cache = kind_of(name), datasets.config.HF_DATASETS_CACHE
    wanted = list(dict.fromkeys(split for folds in arguments.folds.values() for split in folds))
    wanted = wanted if arguments.train_split else [arguments.dataset_split]
    if arguments.train_split and kind in ("file", "synthetic"):
        raise UserError(f"train_split: {name} has no splits of its own: wanted folds (fold_column) or split_shares")
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
                raise UserError(f"dataset: found the file {name}, wanted {' or '.join(FILES)}")
            loaded = load_dataset(FILES[suffix], data_files=str(Path(name).expanduser()), split=wanted)
        elif kind == "folder":
            folder = Path(name).expanduser() / (arguments.dataset_dir or "")
            if not folder.is_dir():
                raise no_folder(arguments)
            loaded = _load_folder(folder, arguments, wanted)
        else:
            with hub_errors("dataset", name, revision, way_out):
                place, options = place_of(arguments)
                loaded = load_dataset(place, split=wanted, **options)
    except UserError:
        raise
    except (EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise UserError(f"dataset {name!r}: no audio and no Parquet file found ({error})") from error
    # An unknown split, a broken file, or a script, which the library does not run.
    except (RuntimeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"dataset {name!r}, split {', '.join(wanted)!r}: {error}") from error
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
        raise UserError(
            f"dataset_revision: found {', '.join(found)} of {name!r} in the cache {cache}, wanted {revision}, and the "
            f"Hub is not reachable"
        )
    return clips, [split for split, part in zip(wanted, loaded, strict=True) for _ in range(len(part))]


def place_of(arguments: DataArguments) -> tuple[str, dict[str, Any]]:
    """What `load_dataset` wants to find a data set of the Hub.

    One that is a folder of its repository is fetched here, because without network the library does not find it again.
    """
    name, revision = arguments.dataset, arguments.dataset_revision
    if not arguments.dataset_dir:
        return name, {"name": arguments.dataset_config, "revision": revision}
    fetched = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=below(arguments))
    folder = Path(fetched, arguments.dataset_dir)
    if not folder.is_dir():
        raise no_folder(arguments)
    return str(folder), {}


def no_folder(arguments: DataArguments) -> UserError:
    where = "" if is_local(arguments.dataset) else f" (revision {arguments.dataset_revision or 'main'})"
    return UserError(f"dataset_dir: {arguments.dataset}{where} has no folder {arguments.dataset_dir}")


def below(arguments: DataArguments) -> str:
    return f"{arguments.dataset_dir.rstrip('/')}/*"


def _load_folder(folder: Path, arguments: DataArguments, wanted: list[str]) -> list[Dataset]:
    """A folder of Parquet files, or of class folders: <class>/<clip>, below <split>/ where splits are asked for."""
    if any(folder.rglob("*.parquet")):
        return load_dataset(str(folder), split=wanted)
    places = {split: folder / split if arguments.train_split else folder for split in wanted}
    if missing := [split for split, place in places.items() if not place.is_dir()]:
        raise UserError(f"dataset: found no folder {missing[0]} in {folder}, wanted {'/, '.join(wanted)}/ there")
    # The library's own "audiofolder" passes over m4a, and takes a class folder named "train" or "test" for a split.
    # From a generator, because data sets in memory have no cache.
    features = Features({"audio": Value("string"), "label": Value("string")})
    return [
        Dataset.from_generator(_in_class_folders, features, gen_kwargs={"files": _sound_files(place.resolve())})
        for place in places.values()
    ]


def _sound_files(place: Path) -> list[str]:
    """The sound files in the class folders of a folder, sorted.

    Raises:
        UserError: There is none, or one is in no class folder.
    """
    found = sorted(glob.glob(f"{glob.escape(str(place))}/**", recursive=True))  # which passes over hidden files
    files = [file for file in found if Path(file).suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"dataset: {place} holds no sound file and no Parquet file")
    if strays := [file for file in files if Path(file).parent == place]:
        raise UserError(f"dataset: {strays[0]} must be in a class folder: {place}/<class>/<clip>")
    return files


def _in_class_folders(files: list[str]) -> Iterator[dict[str, str]]:
    for file in files:
        yield {"audio": file, "label": Path(file).parent.name}


def _with_sound(clips: Dataset, arguments: DataArguments) -> tuple[Dataset, list[str]]:
    """Paths in text columns become audio; and a name for each clip: its path if all have different ones, or its row."""
    column, folder = arguments.audio_column, Path(arguments.dataset).expanduser().resolve()
    folder = folder if folder.is_dir() else folder.parent
    kind = clips.features[column]
    if isinstance(kind, Audio | dict):
        paths = [path for chunk in clips.data.column(column).chunks for path in chunk.field("path").to_pylist()]
    elif kind in (Value("string"), Value("large_string")):
        paths = clips.with_format("arrow")[:][column].to_pylist()
        if kind_of(arguments.dataset) == "hub":
            raise UserError(f"audio_column: {column!r} of {arguments.dataset} holds text, wanted Audio")
        if missing := [row for row, path in enumerate(paths) if not path]:
            raise UserError(f"audio_column: {len(missing)} rows have no path in {column!r}, the first is {missing[0]}")
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
        raise UserError(f"audio_column: {column!r} of {arguments.dataset} holds {kind}, wanted Audio or paths")
    unique = None not in paths and len(set(paths)) == len(paths)
    return clips, paths if unique else [f"{row:06d}" for row in range(len(paths))]


def _stat(file: str) -> os.stat_result | None:
    return os.stat(file) if os.path.isfile(file) else None


def _as_audio(table: pa.Table, column: str, folder: str) -> pa.Table:
    """The column's paths, relative to a folder, as what `Audio` stores."""
    sounds = [{"bytes": None, "path": str(Path(folder, path))} for path in table[column].to_pylist()]
    stored = pa.array(sounds, Audio().pa_type)
    return table.set_column(table.column_names.index(column), column, stored)


def kind_of(dataset: str) -> str:
    """Whether a data set is synthetic, a file, a folder, or on the hub.

    Raises:
        UserError: It can be none of these.
    """
    path = Path(dataset).expanduser()
    if dataset == "synthetic":
        return "synthetic"
    if path.exists():
        return "folder" if path.is_dir() else "file"
    if dataset.startswith((".", "/", "~")) or dataset.count("/") != 1:
        raise UserError(
            f"dataset: found {dataset!r}, which is no folder, no file, no Hub id (owner/name), and not 'synthetic'"
        )
    return "hub"


@contextmanager
def hub_errors(field: str, name: str, revision: str | None, way_out: str) -> Iterator[None]:
    """What goes wrong between here and the Hub becomes a UserError; `way_out` is what to do without the Hub."""
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"{field}: the Hub has no {'data set' if field == 'dataset' else field} {name!r} (revision "
            f"{revision or 'main'}) that you may read; check the name, or log in with `hf auth login` if it is private "
            f"or gated"
        ) from error
    except (datasets.exceptions.DataFilesNotFoundError, EmptyDatasetError, RuntimeError) as error:
        raise UserError(f"{field}: {error}") from error
    except (HfHubHTTPError, httpx.TransportError, ConnectionError, FileNotFoundError) as error:
        cause = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):  # the libraries wrap it several times
            cause = cause.__cause__ or cause.__context__
        state = "is not reachable"
        if cause is not None:
            state = f"answers {cause.response.status_code} ({cause.server_message or 'without a word'})"
        raise UserError(f"{field}: the Hub {state}, and {way_out}") from error


def _labels(clips: Dataset, arguments: DataArguments) -> list[str] | list[list[str]]:
    """The class name of each clip, or a list of them."""
    column = arguments.label_column
    values = clips.with_format("arrow")[:][column].to_pylist()
    if missing := [row for row, value in enumerate(values) if value is None or value != value]:
        raise UserError(f"label_column: {len(missing)} rows have nothing in {column!r}, the first is {missing[0]}")
    labels = _texts(clips, column)
    if (separator := arguments.label_separator) is None:
        return labels
    if isinstance(labels[0], list):
        raise UserError(f"label_separator: found {separator!r}, but {column!r} holds lists already: wanted none")
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
