"""Load clips from the Hub, a folder, a file or the embedded data set: their sound, and an index of their columns."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    LargeList,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import EmptyDatasetError
from datasets.fingerprint import Hasher
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from huggingface_hub.utils import httpx
from pandas import DataFrame, Series
from pandas.arrays import ArrowExtensionArray

from audio_dendrites.data.audio import SUFFIXES
from audio_dendrites.data.splits import (
    drawn_splits,
    flat_labels,
    folder_of,
    is_multi_label,
    listed_splits,
    lists_of,
    loaded_splits,
    without_labels,
)
from audio_dendrites.data.synthetic import load_synthetic
from audio_dendrites.errors import UserError
from audio_dendrites.files import try_writing
from audio_dendrites.recipes import DataArguments

FILES = {".parquet": "parquet", ".csv": "csv"}
ARCHIVES = {  # the table by which an unpacked archive is recognised: the `audio_path` of its clips
    "metadata/UrbanSound8K.csv": "audio/fold{fold}/{slice_file_name}",
    "meta/esc50.csv": "audio/{filename}",
}


def load_clips(arguments: DataArguments, more: Sequence[str] = ()) -> tuple[Dataset, DataFrame]:
    """All clips of a data set: their sound, and an index of them.

    Args:
        arguments: Name the data set and its columns.
        more: Other columns that the index gets as text if the data set has them.

    Returns:
        The sound, not decoded, in `audio_column` (and the names in `clip_column`, if there is one); and an index with
        the same rows. The columns of the index are text: `clip`, `fold`, `label` (a class name, or a list of them if
        the data set has lists) and `group` (the source recording, or the clip itself if no column names a recording).
        They are Arrow arrays. A clip is not a Python object anywhere.

    Raises:
        UserError: The data set is unknown or unreachable, lacks a column or a file, or has a clip in two rows; or the
            cache cannot be written.
    """
    _check_cache()
    template = _path_template(arguments)
    clips, splits = _load(arguments)
    if template:
        clips = _with_paths(clips, template, arguments)
    for field in ("audio_column", "label_column", "fold_column", "clip_column", "group_column"):
        column = getattr(arguments, field)
        if column is not None and column not in clips.column_names:
            raise _no_column(field, column, clips, arguments)
        if column is not None and field != "label_column" and _has_lists(clips, column):
            raise UserError(f"{field} must hold one value in each row, got lists in {column!r} of {arguments.dataset}")
    index = DataFrame({"label": _labels(clips, arguments)})
    clips, paths = _with_sound(clips, arguments)
    index["clip"] = _texts(clips, arguments.clip_column) if arguments.clip_column else paths.to_pandas()
    index["group"] = index["clip"]  # also that of a clip without a source recording
    if arguments.group_column:
        missing = pc.is_null(_values(clips, arguments.group_column), nan_is_null=True).to_numpy()
        index["group"] = _texts(clips, arguments.group_column).mask(missing, index["clip"])
    for column in (name for name in more if name in clips.column_names):
        index[column] = _texts(clips, column)
    if arguments.fold_column:
        splits = _texts(clips, arguments.fold_column)
    elif arguments.test_list:
        splits = listed_splits(index["clip"], arguments)
    index.insert(0, "fold", splits)
    if arguments.drop_labels:
        index = without_labels(index, arguments)
    _check_unique(clips, index, arguments)
    if arguments.drop_labels:
        clips, index = clips.select(index.index), index.reset_index(drop=True)
    if arguments.split_shares:
        index["fold"] = drawn_splits(index, arguments)
    sound = [arguments.audio_column] + [arguments.clip_column] * bool(arguments.clip_column)
    return clips.select_columns(sound), index


def is_local(name: str | None) -> bool:
    """Whether a data set or a model is a file or folder of this machine. Such a path takes precedence over a Hub id."""
    return name not in (None, "synthetic") and Path(name).expanduser().exists()


def _check_cache() -> None:
    """Check that the cache of the datasets library can be written. The library locks a file there for each data set."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        try_writing(cache)
    except OSError as error:
        raise UserError(
            f"HF_DATASETS_CACHE must be a folder that can be written, got {cache} ({error.strerror}); set it to "
            f"another folder"
        ) from error


def _load(arguments: DataArguments) -> tuple[Dataset, Series]:
    """All clips of the splits that the recipe uses, and the name of the split of each clip."""
    name, revision, kind = arguments.dataset, arguments.dataset_revision, kind_of(arguments.dataset)
    splits = [arguments.dataset_split]
    if arguments.train_split:
        folds = {split: names for split, names in arguments.folds.items() if split in loaded_splits(arguments)}
        splits = list(dict.fromkeys(chain(*folds.values())))
        if kind in ("file", "synthetic"):
            raise UserError(
                f"train_split must be left out for {name}, which has no splits of its own, got "
                f"{arguments.train_split!r}; set fold_column or split_shares instead"
            )
    if kind == "synthetic":
        workers = arguments.preprocessing_num_workers
        clips = load_synthetic(clips_per_class=arguments.synthetic_clips // 10, num_proc=workers)
        return clips, _repeated(["train"], [len(clips)])
    cache = datasets.config.HF_DATASETS_CACHE
    way_out = (
        f"{name!r} is not in the cache {cache}. Run `python -m audio_dendrites.data download RECIPE` where there is a "
        f"network and set HF_HOME to the same cache here, or use a local copy: --dataset FOLDER"
    )
    try:
        if arguments.streaming:
            loaded = load_dataset(split=splits, **shards_of(arguments, splits))
        elif kind == "file":
            if (suffix := Path(name).suffix.lower()) not in FILES:
                raise UserError(f"dataset must be a folder, a Hub id or a {' or '.join(FILES)} file, got {name}")
            loaded = load_dataset(FILES[suffix], data_files=str(Path(name).expanduser()), split=splits)
        elif kind == "folder":
            if not (folder := folder_of(arguments)).is_dir():
                raise no_folder(arguments)
            loaded = _load_folder(folder, arguments, splits)
        else:
            with hub_errors("dataset", name, revision, way_out):
                place, options = place_of(arguments)
                loaded = load_dataset(place, split=splits, **options)
    except UserError:
        raise
    except (EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise UserError(f"dataset {name!r}: no audio and no Parquet file found ({error})") from error
    # An unknown split, a broken file, or a script, which the library does not run.
    except (RuntimeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"dataset {name!r}, split {', '.join(splits)!r}: {error}") from error
    clips = loaded[0] if len(loaded) == 1 else concatenate_datasets(loaded)
    if kind == "hub" and not arguments.dataset_dir and REGEX_COMMIT_HASH.fullmatch(revision or ""):
        # Without the Hub, the library loads the revision that it prepared last, even if it is another one.
        found = {Path(file["filename"]).parent.name for file in clips.cache_files}
        if found - {revision}:
            raise UserError(
                f"dataset_revision must be in the cache {cache} if the Hub is not reachable, got {revision}; the cache "
                f"has {', '.join(found)} of {name!r}"
            )
    return clips, _repeated(splits, [len(part) for part in loaded])


def _repeated(texts: Sequence[str], counts: Sequence[int]) -> Series:
    """Each text as often as its count says."""
    return pa.chunked_array(map(pa.repeat, texts, counts), pa.string()).to_pandas()


def shards_of(arguments: DataArguments, splits: Sequence[str]) -> dict[str, Any]:
    """The arguments of `load_dataset` that load some splits of a data set in shards, and prepare no other split.

    Args:
        arguments: Name the data set.
        splits: Names of splits, or expressions such as test[:10%].

    Returns:
        `path` (parquet or webdataset), `data_files` by split, and `features` if the sounds would need torchcodec.

    Raises:
        UserError: The data set is not in such files, or lacks a split.
    """
    name, revision = arguments.dataset, arguments.dataset_revision
    place, options = name, {"name": arguments.dataset_config, "revision": revision, "data_dir": arguments.dataset_dir}
    if kind_of(name) == "folder":
        place, options = str(folder_of(arguments)), {}
    try:
        with hub_errors("dataset", name, revision, "streaming needs it; set streaming: false to use a cached copy"):
            builder = load_dataset_builder(place, **options)
    except UserError:
        raise
    except ValueError as error:  # an unknown configuration
        raise UserError(f"dataset {name!r}: {error}") from error
    form, found = builder.info.builder_name, {str(split): files for split, files in builder.config.data_files.items()}
    if form not in ("parquet", "webdataset"):
        raise UserError(
            f"streaming must be false for {name}, got true; only Parquet and WebDataset files can be read as a stream, "
            f"and it has {form}"
        )
    needed = list(dict.fromkeys(re.findall(r"(?:^|\+)\s*([\w.]+)", "+".join(splits))))
    if not found.keys() >= {*needed}:
        raise UserError(f"dataset {name!r} must have the splits {', '.join(needed)}, got {', '.join(found)}")
    shards = {"path": form, "data_files": {split: list(found[split]) for split in needed}}
    if form == "parquet":
        return shards
    features = load_dataset(split=needed[0], streaming=True, **shards).features
    plain = {name: Value("binary") if isinstance(kind, Audio) else kind for name, kind in features.items()}
    return shards | {"features": Features(plain)}


def place_of(arguments: DataArguments) -> tuple[str, dict[str, Any]]:
    """The path of a Hub data set, and the other arguments that `load_dataset` needs to find it.

    A subfolder of a repository is downloaded here, because `load_dataset` would not find it again without a network.
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
    """The pattern of the files of `dataset_dir`."""
    return f"{arguments.dataset_dir.rstrip('/')}/*"


def _load_folder(folder: Path, arguments: DataArguments, splits: list[str]) -> list[Dataset]:
    """Load an unpacked archive, a folder of Parquet files, or class folders: [<split>/]<class>/<clip>."""
    if table := _table_of_archive(folder):
        return load_dataset("csv", data_files=glob.escape(str(folder / table)), split=splits)
    if any(folder.rglob("[!.]*.parquet")):  # macOS leaves ._ files beside the real ones
        return load_dataset(str(folder), split=splits)
    places = {split: folder / split if arguments.train_split else folder for split in splits}
    if missing := [split for split, place in places.items() if not place.is_dir()]:
        raise UserError(f"dataset: {folder} must have the folders {'/, '.join(splits)}/, got no {missing[0]}/")
    # The library's own "audiofolder" ignores m4a files, and takes a class folder named "train" or "test" for a split.
    # Data sets in memory have no cache, so this one comes from a generator.
    features = Features({"audio": Value("string"), "label": Value("string")})
    return [
        Dataset.from_generator(_in_class_folders, features, gen_kwargs={"files": _sound_files(place.resolve())})
        for place in places.values()
    ]


def _sound_files(place: Path) -> list[str]:
    """The sound files in the class folders of a folder, sorted.

    Raises:
        UserError: There is no sound file, or one is not in a class folder.
    """
    found = sorted(glob.glob(f"{glob.escape(str(place))}/**", recursive=True))  # ignores hidden files
    files = [file for file in found if Path(file).suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"dataset: {place} must have sound files or Parquet files, got none")
    if strays := [file for file in files if Path(file).parent == place]:
        raise UserError(f"dataset: {strays[0]} must be in a class folder: {place}/<class>/<clip>")
    return files


def _in_class_folders(files: list[str]) -> Iterator[dict[str, str]]:
    for file in files:
        yield {"audio": file, "label": Path(file).parent.name}


def _table_of_archive(folder: Path) -> str | None:
    return next((table for table in ARCHIVES if (folder / table).is_file()), None)


def _path_template(arguments: DataArguments) -> str | None:
    """The recipe's `audio_path`, or that of an unpacked archive."""
    kind = kind_of(arguments.dataset)
    if arguments.audio_path and kind not in ("file", "folder"):
        raise UserError(f"audio_path must be left out for {arguments.dataset}, because it is for local tables")
    table = _table_of_archive(folder_of(arguments)) if kind == "folder" else None
    return arguments.audio_path or ARCHIVES.get(table)


def _with_paths(clips: Dataset, template: str, arguments: DataArguments) -> Dataset:
    """Fill `audio_column` with paths that are made from the other columns.

    A path may leave the folder with `..`: the table is a local file, and the paths are only read as sound.

    Args:
        clips: Rows of a table.
        template: A path for `str.format`, with columns and formats in braces: `{id:06d}.wav`.

    Raises:
        UserError: The template names a column that does not exist, or a value is missing or does not fit its format.
    """
    wrong = f"audio_path must be a path with columns in braces, such as 'audio/{{name}}.wav', got {template!r}"
    try:
        columns = {column for _, column, _, _ in Formatter().parse(template) if column is not None}
    except ValueError as error:
        raise UserError(f"{wrong}: {error}") from error
    if missing := sorted(columns - set(clips.column_names)):
        raise _no_column("audio_path", missing[0], clips, arguments)
    if not columns:
        raise UserError(wrong)
    rows = pa.table({column: _values(clips, column, "audio_path") for column in sorted(columns)})
    try:
        paths = _map_texts(lambda row: template.format(**row), rows)
    except ValueError as error:
        raise UserError(f"{wrong}: {error}") from error
    others = [column for column in clips.column_names if column != arguments.audio_column]
    return clips.select_columns(others).add_column(arguments.audio_column, paths, feature=Value("string"))


def _no_column(field: str, column: str, clips: Dataset, arguments: DataArguments) -> UserError:
    hint = "; audio_path makes paths from them" if field == "audio_column" and is_local(arguments.dataset) else ""
    present = ", ".join(clips.column_names)
    return UserError(f"{field}: {arguments.dataset} has no column {column!r}; it has {present}{hint}")


def _with_sound(clips: Dataset, arguments: DataArguments) -> tuple[Dataset, pa.ChunkedArray]:
    """Clips that have their sound in `audio_column`, even if the column held paths, and a name for each clip.

    The name is the path of the clip if all paths differ, and the number of its row otherwise.
    """
    column, folder = arguments.audio_column, folder_of(arguments).resolve()
    kind = clips.features[column]
    if isinstance(kind, Audio | dict):
        chunks = clips.data.column(column).chunks
        paths = pa.chunked_array([chunk.field("path").cast(pa.string()) for chunk in chunks], pa.string())
    elif kind in (Value("string"), Value("large_string")):
        if kind_of(arguments.dataset) == "hub":
            raise UserError(f"audio_column must be an Audio column of {arguments.dataset}, got text in {column!r}")
        files = _map_texts(lambda path: str(folder / path), _values(clips, column, "audio_column"))
        # If a file changes, its features are computed again.
        states = np.fromiter((_state(file.as_py()) for file in files), np.dtype((np.int64, 2)), len(files))
        missing = states[:, 0] == _NO_FILE[0]
        if missing.any() and arguments.on_bad_clip == "error":
            row = missing.argmax()
            clip = f" (clip {_texts(clips, arguments.clip_column)[row]})" if arguments.clip_column else ""
            raise UserError(
                f"dataset: {missing.sum()} of the {len(files)} files of {arguments.dataset} do not exist; the "
                f"first is {files[row]}{clip}. --on_bad_clip skip leaves such clips out"
            )
        clips = clips.with_format("arrow").map(
            _as_audio, fn_kwargs={"column": column, "folder": str(folder)}, batched=True,
            features=Features({**clips.features, column: Audio(decode=False)}),
            new_fingerprint=Hasher.hash([clips._fingerprint, files, states]), desc="Paths",
        ).with_format(None)  # fmt: skip
        paths = _map_texts(
            lambda file: Path(file).relative_to(folder).as_posix() if Path(file).is_relative_to(folder) else file, files
        )
    elif kind == Value("binary"):
        paths = pa.chunked_array([pa.nulls(len(clips), pa.string())])
    else:
        raise UserError(f"audio_column must hold Audio or paths, got {kind} in {column!r} of {arguments.dataset}")
    if pc.count_distinct(paths).as_py() < len(paths):  # it does not count missing paths
        rows = pa.array(np.arange(len(paths))).cast(pa.string())
        paths = pa.chunked_array([pc.utf8_lpad(rows, 6, "0")])
    return clips, paths


def _check_unique(clips: Dataset, index: DataFrame, arguments: DataArguments) -> None:
    """Check that no sound file and no clip name is in two rows. Embedded sounds may have the same path.

    Args:
        clips: All rows.
        index: The rows that are used.

    Raises:
        UserError: A file or a name is in two rows.
    """
    columns = {"clip_column": index["clip"]}
    if isinstance(clips.features[arguments.audio_column], Audio | dict):
        chunks = clips.data.column(arguments.audio_column).chunks
        on_disk = [pc.if_else(chunk.field("bytes").is_null(), chunk.field("path"), None) for chunk in chunks]
        files = pa.chunked_array([chunk.cast(pa.string()) for chunk in on_disk], pa.string()).to_pandas()
        columns = {"audio_column": files[index.index]} | columns
    for field, names in columns.items():
        names = names.dropna()
        if not names.is_unique:
            twice = names[names.duplicated(keep=False)]
            rows = twice.index[twice == twice.iloc[0]]
            labels = sorted({str(label) for label in index["label"][rows]})
            raise UserError(
                f"{field}: {arguments.dataset} must have each clip in one row only, got {twice.iloc[0]} in the rows "
                f"{', '.join(map(str, rows))} with the label {' and '.join(labels)}. Remove all but one of these rows; "
                "a clip of several classes needs all of them in its one cell"
            )


_NO_FILE = (-1, -1)


def _state(file: str) -> tuple[int, int]:
    """The time of the last change of a file, and its size; _NO_FILE if there is no such file."""
    return (os.stat(file).st_mtime_ns, os.stat(file).st_size) if os.path.isfile(file) else _NO_FILE


def _as_audio(table: pa.Table, column: str, folder: str) -> pa.Table:
    """Turn a column of paths, relative to a folder, into what `Audio` stores."""
    sounds = [{"bytes": None, "path": str(Path(folder, path))} for path in table[column].to_pylist()]
    stored = pa.array(sounds, Audio().pa_type)
    return table.set_column(table.column_names.index(column), column, stored)


def kind_of(dataset: str) -> str:
    """Tell whether a data set is "synthetic", a "file", a "folder" or on the "hub".

    Raises:
        UserError: It is none of these.
    """
    path = Path(dataset).expanduser()
    if dataset == "synthetic":
        return "synthetic"
    if path.exists():
        return "folder" if path.is_dir() else "file"
    if dataset.startswith((".", "/", "~")) or dataset.count("/") != 1:
        raise UserError(
            f"dataset must be a file or a folder that exists, a Hub id (owner/name) or 'synthetic', got {dataset!r}"
        )
    return "hub"


@contextmanager
def hub_errors(field: str, name: str, revision: str | None, way_out: str) -> Iterator[None]:
    """Turn an error of the Hub or of the connection into a UserError. `way_out` says what to do without the Hub."""
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        kind = "data set" if field == "dataset" else field
        raise UserError(
            f"{field}: the Hub has no {kind} {name!r} (revision {revision or 'main'}) that you may read; check the "
            f"name, or log in with `hf auth login` if it is private or gated"
        ) from error
    except (datasets.exceptions.DataFilesNotFoundError, EmptyDatasetError, RuntimeError) as error:
        raise UserError(f"{field}: {error}") from error
    except (HfHubHTTPError, httpx.TransportError, ConnectionError, FileNotFoundError) as error:
        cause = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):  # the libraries wrap it several times
            cause = cause.__cause__ or cause.__context__
        state = "is not reachable"
        if cause is not None:
            state = f"answers {cause.response.status_code} ({cause.server_message or 'without a message'})"
        raise UserError(f"{field}: the Hub {state}, and {way_out}") from error


def _labels(clips: Dataset, arguments: DataArguments) -> Series:
    """The class name of each clip, or a list of them."""
    column, separator = arguments.label_column, arguments.label_separator
    labels = _texts(clips, column, "label_column")
    if separator is None:
        return labels
    if is_multi_label(labels):
        raise UserError(f"label_separator must be left out if {column!r} already holds lists, got {separator!r}")
    rows, names = flat_labels(Series(ArrowExtensionArray(pc.split_pattern(pa.array(labels), separator))))
    names = pc.utf8_trim_whitespace(names)
    kept = pc.not_equal(names, "")
    return lists_of(names.filter(kept), rows[kept.to_numpy(zero_copy_only=False)], len(labels))


def _values(clips: Dataset, column: str, field: str | None = None) -> pa.ChunkedArray:
    """The values of a column. Class numbers become names if the data set has them.

    Args:
        clips: The data set.
        column: Name of the column.
        field: Field of the recipe that needs a value in each row, if there is one.

    Raises:
        UserError: A row has no value.
    """
    values = _named(clips.select_columns(column).with_format("arrow")[:][column], clips.features[column])
    missing = np.flatnonzero(pc.is_null(values, nan_is_null=True))
    if field and len(missing):
        raise UserError(
            f"{field}: {column!r} must have a value in each row, got {len(missing)} rows without one, the first is row "
            f"{missing[0]}"
        )
    return values


def _has_lists(clips: Dataset, column: str) -> bool:
    return isinstance(clips.features[column], List | LargeList)


def _named(values: pa.ChunkedArray, feature: Any) -> pa.ChunkedArray:
    """The names of class numbers. Other values are returned as they are. -1 stands for a missing class."""
    if not isinstance(feature, ClassLabel):
        return values
    return pc.take(pa.array(feature.names, pa.string()), pc.if_else(pc.less(values, 0), None, values))


def _texts(clips: Dataset, column: str, field: str | None = None) -> Series:
    """The values of a column as text or lists of text; see `_values`."""
    values = _values(clips, column, field)
    if not _has_lists(clips, column):
        return _as_text(values).to_pandas()
    lists = values.combine_chunks()
    rows = pc.list_parent_indices(lists).to_numpy()
    names = _named(pa.chunked_array([pc.list_flatten(lists)]), clips.features[column].feature)
    missing = np.unique(rows[pc.is_null(names, nan_is_null=True).to_numpy()])
    if field and len(missing):
        raise UserError(
            f"{field}: the lists in {column!r} must have no missing values, got {len(missing)} rows with one, the "
            f"first is row {missing[0]}"
        )
    return lists_of(_as_text(names).combine_chunks(), rows, len(lists))


def _as_text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values as `str` writes them."""
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values.cast(pa.large_string()).fill_null("None")
    return _map_texts(str, values)


def _map_texts(function: Callable[[Any], str], rows: pa.ChunkedArray | pa.Table) -> pa.ChunkedArray:
    """The text that a function makes of each row. Few rows at a time are Python objects."""
    blocks = (rows.slice(start, 10_000).to_pylist() for start in range(0, len(rows), 10_000))
    return pa.chunked_array(([function(row) for row in block] for block in blocks), pa.string())
