"""Training clips that are read from the shards of a data set while the model trains. The disk keeps nothing of them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch
from datasets import Audio, ClassLabel, List, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from audio_dendrites.data.clips import shards_of
from audio_dendrites.data.features import Inputs, decode_batch, one_thread, rounded
from audio_dendrites.errors import UserError, listed
from audio_dendrites.recipes import DataArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a reader is in its stream.

    Attributes:
        epoch: How often it has read its shards.
        row: The number of rows of its shards that it has read in this epoch.
    """

    epoch: int = 0
    row: int = 0


class ClipStream:
    """The training clips of a data set, in shards.

    Each loader worker of each process reads shards of its own. Together, they read each clip once in an epoch. A reader
    that has read all its shards goes on with the next epoch at once, so no process runs out of clips. Each epoch has
    another order of the shards, another division of them among the readers, and another order of the clips.

    Args:
        arguments: Name the data set, its training split and its columns.
        extractor: Computes the features.
        labels: Class names in the order of the logits.
        multi_label: Whether the clips have lists of labels.
        seed: Seed of the order and of the augmentation.

    Raises:
        UserError: The data set has no such split or column, or is not in shards that can be read as a stream.
    """

    def __init__(
        self, arguments: DataArguments, extractor: Inputs, labels: Sequence[str], multi_label: bool, seed: int
    ):
        self.rows, self.arguments, self.extractor, self.seed = open_stream(arguments), arguments, extractor, seed
        self.numbers, self.multi_label = {label: number for number, label in enumerate(labels)}, multi_label
        kind = self.rows.features[arguments.label_column]
        self.names = getattr(getattr(kind, "feature", kind), "names", None)  # of class numbers

    def sharded(self, readers: int) -> "ClipStream":
        """Divide the files into more shards if there are more readers than files.

        Raises:
            UserError: There are fewer shards than readers.
        """
        if self.rows.num_shards < readers:
            self.rows = self.rows.reshard()  # row groups of Parquet files
        if (found := self.rows.num_shards) < readers:
            raise UserError(
                f"dataloader_num_workers × processes must be at most {found} with streaming: true, got {readers}; each "
                f"worker reads shards of its own, and {self.arguments.dataset} has {found} to train on (files, or row "
                "groups of Parquet files)"
            )
        return self

    def read(self, reader: int, readers: int, start: Position) -> Iterator[tuple[pa.Table, Position]]:
        """The rows of one reader, without end: a table of one row, and its position.

        The order depends on the seed and the number of readers only. Rows before `start` are read, but not decoded.
        """
        epoch, first = start.epoch, start.row
        while True:
            order = np.random.default_rng((self.seed, epoch))
            rows = self.rows.shuffle(generator=order, buffer_size=self.arguments.shuffle_buffer).with_format("arrow")
            rows = split_dataset_by_node(rows, reader, readers, strategy="shards")
            number = -1
            for number, row in enumerate(rows.iter(batch_size=1)):
                if number >= first:
                    yield row, Position(epoch, number)
            if number < 0:
                raise UserError(f"dataset: a training shard of {self.arguments.dataset} has no rows; remove it")
            epoch, first = epoch + 1, 0

    def target(self, value: Any, name: str) -> int | np.ndarray:
        """The class number of a clip, or 0 or 1 for each class, float32.

        Args:
            value: The cell of `label_column`.
            name: The clip, for errors.

        Raises:
            UserError: The clip has no label, or one that is not among the labels.
        """
        found = value if self.multi_label else [value]
        if not isinstance(found, list) or None in found or isinstance(value, list) != self.multi_label:
            expected = "a list of labels" if self.multi_label else "one label"
            raise UserError(f"label_column: each clip must have {expected}, got {value!r} for {name}")
        names = [self.names[one] if self.names else str(one) for one in found]
        if strangers := [one for one in names if one not in self.numbers]:
            raise UserError(
                f"labels: the labels of the train clips must be labels of the recipe ({listed(self.numbers)}), got "
                f"{listed(strangers)} for {name}; add them to labels"
            )
        if not self.multi_label:
            return self.numbers[names[0]]
        present = np.zeros(len(self.numbers), np.float32)
        present[[self.numbers[one] for one in names]] = 1
        return present


def open_stream(arguments: DataArguments) -> datasets.IterableDataset:
    """The rows of the training split, with the sound not decoded and the columns that the training needs.

    Raises:
        UserError: The data set has no such split or column, or is not in shards that can be read as a stream.
    """
    shards = shards_of(arguments, [arguments.train_split])
    rows = load_dataset(split=arguments.train_split, streaming=True, **shards)
    wanted = {"audio_column", "label_column"} | ({"clip_column"} if arguments.clip_column else set())
    for field in sorted(wanted):
        if (column := getattr(arguments, field)) not in rows.features:
            raise UserError(
                f"{field}: the training clips of {arguments.dataset} have no column {column!r}; they have "
                f"{', '.join(rows.features)}"
            )
    sound = rows.features[arguments.audio_column]
    if not isinstance(sound, Audio | dict) and sound != datasets.Value("binary"):
        raise UserError(f"audio_column must hold sounds with streaming: true, got {sound} in {arguments.audio_column}")
    rows = rows.select_columns([getattr(arguments, field) for field in sorted(wanted)])
    return rows.cast_column(arguments.audio_column, Audio(decode=False))


def stream_labels(arguments: DataArguments) -> list[str]:
    """The class names of the recipe, or those of the data set, sorted.

    Raises:
        UserError: Neither has class names.
    """
    if arguments.labels is not None:
        return arguments.labels
    kind = open_stream(arguments).features[arguments.label_column]
    kind = kind.feature if isinstance(kind, List) else kind
    if not isinstance(kind, ClassLabel):
        raise UserError(
            f"labels must name the classes with streaming: true, got null; {arguments.dataset} has no class names for "
            f"the column {arguments.label_column!r}, and the training clips are not read before the training"
        )
    return sorted(kind.names)


class _Batches(IterableDataset):
    """The batches of the readers of one process: lists of examples with their `draw`, and where each reader is."""

    def __init__(
        self, stream: ClipStream, batch_size: int, process: tuple[int, int], workers: int, turn: int,
        positions: Mapping[int, Position],
    ):  # fmt: skip
        self.stream, self.batch_size, self.process, self.workers = stream, batch_size, process, workers
        self.turn, self.positions, self.bad = turn, positions, 0

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any]], tuple[int, Position]] | UserError]:
        """Yields an error instead of a batch, because a worker would wrap an exception in its traceback."""
        number = 0
        if (worker := get_worker_info()) is not None:
            number = worker.id
            fsspec.asyn.reset_lock()  # a forked process would wait for a thread of its parent
        number = (number + self.turn) % self.workers  # the loader asks worker 0 first
        (rank, processes), found = self.process, []
        reader = rank * self.workers + number
        start = self.positions.get(number, Position())
        rows, self.usable = self.stream.read(reader, processes * self.workers, start), start.epoch
        try:
            for row, position in rows:
                if (clip := self._clip(row, position)) is not None:
                    found.append(clip | {"draw": (self.stream.seed, position.epoch, reader, position.row)})
                if len(found) == self.batch_size:
                    yield self._with_features(found), (number, Position(position.epoch, position.row + 1))
                    found = []
        except UserError as error:
            yield error
        except pa.ArrowInvalid as error:
            overflow = "; lower shuffle_buffer: its clips must take less than 2 GiB" * ("overflow" in str(error))
            yield UserError(
                f"dataset: cannot read a training shard of {self.stream.arguments.dataset}: {error}{overflow}"
            )

    def _clip(self, row: pa.Table, position: Position) -> dict[str, Any] | None:
        """The samples of a clip as `input_values`, and its `labels`; None for a clip that is left out."""
        data, rate = self.stream.arguments, self.stream.extractor.sampling_rate
        (samples,), (error,) = decode_batch(
            row, [position.row], rate, data.audio_column, data.clip_column, data.channel
        )
        if not error:
            self.usable = position.epoch
            sound = row[data.audio_column][0].as_py()
            name = row[data.clip_column][0].as_py() if data.clip_column else sound["path"]
            value = row[data.label_column][0].as_py()
            return {"input_values": samples, "labels": self.stream.target(value, f"the clip {name}")}
        if data.on_bad_clip == "error":
            raise UserError(f"a training clip cannot be used (--on_bad_clip skip leaves it out): {error}")
        self.bad += 1
        if position.epoch > self.usable + 1:
            raise UserError(f"none of the training clips of a loader worker can be used; the last: {error}")
        logger.warning("A training clip cannot be used and is left out (%d so far): %s", self.bad, error)
        return None

    def _with_features(self, clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
        extractor = self.stream.extractor
        with one_thread():
            features = extractor.features([clip["input_values"] for clip in clips])
        values = [torch.from_numpy(rounded(one, extractor.stored_as)) for one in features]
        return [clip | {"input_values": one} for clip, one in zip(clips, values, strict=True)]


class StreamLoader(DataLoader):
    """Endless batches of a `ClipStream` for one process. `state` continues exactly after the last batch.

    Worker 0 makes the first batch, worker 1 the second one, and so on.

    Args:
        stream: The training clips.
        batch_size: Clips in a batch.
        collator: Makes a batch of examples.
        process: The number of this process, and the number of processes.
        state: What the loader of an interrupted training had as `state`.
        settings: Further arguments of `DataLoader`.

    Attributes:
        batches: Number of batches that were taken.
    """

    def __init__(self, stream: ClipStream, batch_size: int, collator, process: tuple[int, int], **settings):
        self.readers = max(1, settings.get("num_workers", 0))
        self.batches, self.positions = 0, {}
        own = _Batches(stream.sharded(process[1] * self.readers), batch_size, process, self.readers, 0, {})
        super().__init__(
            own, batch_size=None, collate_fn=_Collate(collator),
            # The loader draws a seed for its workers. It must not come from the generator that dropout uses.
            generator=torch.Generator().manual_seed(stream.seed), **settings,
        )  # fmt: skip

    @property
    def state(self) -> dict[str, Any]:
        """The position in the stream, as JSON can hold it."""
        positions = {str(number): [position.epoch, position.row] for number, position in self.positions.items()}
        return {"workers": self.readers, "batches": self.batches, "positions": positions}

    @state.setter
    def state(self, saved: Mapping[str, Any]) -> None:
        if saved["workers"] != self.readers:
            raise UserError(
                f"dataloader_num_workers must be {saved['workers']}, as in the checkpoint, got {self.readers}: with "
                "streaming: true, each worker continues to read its own shards"
            )
        self.batches = saved["batches"]
        self.positions = {int(number): Position(*place) for number, place in saved["positions"].items()}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.dataset.turn, self.dataset.positions = self.batches % self.readers, dict(self.positions)
        for made in super().__iter__():
            if isinstance(made, UserError):
                raise made
            batch, (number, position) = made
            self.batches += 1
            self.positions[number] = position
            yield batch


@dataclass
class _Collate:
    collator: Any

    def __call__(self, made):
        return made if isinstance(made, UserError) else (self.collator(made[0]), made[1])
