"""Features of clips: log-mel equal to `ASTFeatureExtractor`, or the samples themselves, and their cache on disk."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Audio, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from scipy.sparse import csr_array, issparse
from torch.utils.data import Dataset
from torchaudio.compliance.kaldi import get_mel_banks
from transformers import ASTFeatureExtractor, BatchFeature, SequenceFeatureExtractor, Wav2Vec2FeatureExtractor

from audio_dendrites.data.audio import HAS_AV, BadClip, load_waveform, window_samples

# Part of the cache's key. Raise it when the same clip and settings give other numbers than before.
FEATURES_VERSION = 1
# Rows of a data set that are computed, cached and found again together.
PART_ROWS = 10_000
# Batches that are stored as one block of a cache file. An open file takes about 2.7 kB of memory for each block.
_BATCHES_OF_A_BLOCK = 8
# Frames that are computed at once. On a CPU, they and all intermediate results fit into the second-level cache of a
# core. On a GPU, they are 11 minutes of sound and take half a GiB.
_FRAMES_ON_CPU = 384
_FRAMES_ON_GPU = 2**16


class BatchedASTFeatureExtractor(ASTFeatureExtractor):
    """`ASTFeatureExtractor` for batches on any device, with the same settings and the same numbers.

    It holds only its settings, so that pickles and hashes are stable. It saves itself as the stock extractor, so that a
    published model loads without this package.
    """

    stored_as = "float16"  # of the features in the cache
    input = "spectrograms"
    model_settings: ClassVar[dict[str, Any]] = {}

    @property
    def cache_key(self) -> dict[str, Any]:
        """The settings that change a number."""
        return {name: getattr(self, name) for name in ("sampling_rate", "num_mel_bins", "do_normalize", "mean", "std")}

    @property
    def row_width(self) -> int:
        """Numbers in a row of the features. A row is a frame."""
        return self.num_mel_bins

    @property
    def window_layout(self) -> dict[str, int]:
        """The arguments of `windows` for these features."""
        return {"max_length": self.max_length}

    @property
    def batch_layout(self) -> dict[str, Any]:
        """The arguments of `SpectrogramCollator` for these features."""
        return {"max_length": self.max_length, "padding_value": self.padding_level}

    @property
    def padding_level(self) -> float:
        """The value of a padded frame. The stock extractor pads with 0 and then normalises."""
        return (0.0 - self.mean) / (2 * self.std) if self.do_normalize else 0.0

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The number of frames of clips with these numbers of samples."""
        return 1 + (samples - window_samples(self.sampling_rate)) // self._hop

    @property
    def _hop(self) -> int:
        """Samples from one frame to the next: 10 ms, rounded as `torchaudio.compliance.kaldi` does."""
        return int(self.sampling_rate * 10.0 * 0.001)

    def stock(self) -> ASTFeatureExtractor:
        """The plain extractor with the same settings."""
        settings = self.to_dict()
        settings.pop("feature_extractor_type")
        return ASTFeatureExtractor(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings under the name of the stock extractor, so that `AutoFeatureExtractor` finds it."""
        return {**super().to_dict(), "feature_extractor_type": ASTFeatureExtractor.__name__}

    def log_mel(
        self,
        waveforms: Sequence[np.ndarray],
        device: str | torch.device = "cpu",
    ) -> list[torch.Tensor]:
        """Log-mel filter bank energies of each clip at its own length.

        The formula is `torchaudio.compliance.kaldi.fbank(window_type="hanning", num_mel_bins=num_mel_bins)`:
        25 ms windows every 10 ms, without padding at the ends.

        Args:
            waveforms: Mono clips of shape (samples,) at `sampling_rate`. Each has at least one window.
            device: Where to compute.

        Returns:
            For each clip a tensor (frames, num_mel_bins), float32 on `device`, normalised by
            `(x - mean) / (2 * std)` if `do_normalize`. The tensors are slices of one tensor.

        Raises:
            ValueError: A clip is not one-dimensional, or it is shorter than one window.
        """
        window, hop = window_samples(self.sampling_rate), self._hop
        for waveform in waveforms:
            if waveform.ndim != 1 or len(waveform) < window:
                raise ValueError(
                    f"a clip must have the shape (samples,) and at least {window} samples, got {waveform.shape}"
                )
        if not len(waveforms):
            return []
        # Each clip is padded to whole hops. The frames of all clips are then rows of one strided view, without a copy.
        # Two or three rows of each clip reach into padding or into the next clip. They are not used.
        hops = [-(-len(waveform) // hop) for waveform in waveforms]
        signal = np.zeros(sum(hops) * hop + window, dtype=np.float32)
        starts = np.cumsum([0, *hops[:-1]])
        for start, waveform in zip(starts, waveforms, strict=True):
            signal[start * hop : start * hop + len(waveform)] = waveform
        energies = _log_mel_energies(
            torch.from_numpy(signal).to(device).unfold(0, window, hop), self.sampling_rate, self.num_mel_bins
        )
        if self.do_normalize:
            energies.sub_(self.mean).div_(self.std * 2)
        frames = self.rows(np.array([len(waveform) for waveform in waveforms])).tolist()
        return [energies[start : start + count] for start, count in zip(starts, frames, strict=True)]

    features = log_mel  # `extract_features` stores them

    def __call__(
        self,
        raw_speech: np.ndarray | list[float] | list[np.ndarray] | list[list[float]],
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> BatchFeature:
        """Make `input_values` of one clip or a batch, padded or cut to `max_length`, as the stock extractor does.

        Args:
            raw_speech: One mono clip or several, at `sampling_rate`.
            sampling_rate: Rate of the clips in Hz. It must be the rate of the extractor.
            return_tensors: "pt" (on `device`), "np", or None for a list of arrays.
            device: Where to compute.
            **kwargs: Ignored, as by the stock extractor.

        Returns:
            `input_values` (batch, max_length, num_mel_bins), float32.

        Raises:
            ValueError: The sampling rate is not that of the extractor, or `log_mel` refuses a clip.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"sampling_rate must be {self.sampling_rate}, got {sampling_rate}")
        batched = np.ndim(raw_speech[0]) > 0
        clips = [np.asarray(clip, dtype=np.float32) for clip in (raw_speech if batched else [raw_speech])]
        shape = (len(clips), self.max_length, self.num_mel_bins)
        values = torch.full(shape, self.padding_level, dtype=torch.float32, device=device)
        for row, energies in zip(values, self.log_mel(clips, device), strict=True):
            row[: len(energies)] = energies[: self.max_length]
        if return_tensors == "pt":
            return BatchFeature({"input_values": values})
        return BatchFeature({"input_values": list(values.cpu().numpy())}).convert_to_tensors(return_tensors)


@dataclass(frozen=True)
class Samples:
    """The features of a clip are its samples. What comes after the cache makes the inputs of the model.

    Attributes:
        sampling_rate: In Hz.
    """

    sampling_rate: int
    row_width = None
    stored_as = "float16"

    @property
    def cache_key(self) -> dict[str, Any]:
        """The settings that change a number."""
        return {"waveforms": True, "sampling_rate": self.sampling_rate}

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """The lengths of the features of clips with these numbers of samples."""
        return samples

    def features(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The clips as tensors (samples,), float32."""
        return [torch.from_numpy(waveform) for waveform in waveforms]


@dataclass(frozen=True)
class FramedSamples(Samples):
    """Samples for a model that sees a number of frames of them.

    Attributes:
        max_length: Frames that the model sees.
        window_length, hop_length: Samples of a frame, and from one frame to the next. A window of 0 means that frames
            are centred on every hop.
    """

    max_length: int
    window_length: int
    hop_length: int

    @property
    def window_layout(self) -> dict[str, int]:
        """The arguments of `windows` for these features."""
        return {name: getattr(self, name) for name in ("max_length", "window_length", "hop_length")}


@dataclass(frozen=True)
class Waveforms(FramedSamples):
    """Samples for a model that computes its spectrogram itself.

    Attributes:
        num_mel_bins: Mel bands of the model's spectrogram.
        mean, std: Its normalisation.
        convention: How the model computes it, as in `WaveformConfig`.
    """

    num_mel_bins: int
    mean: float
    std: float
    convention: str = "kaldi"
    input = "waveforms"
    model_settings: ClassVar[dict[str, Any]] = {}

    @property
    def batch_layout(self) -> dict[str, Any]:
        """The arguments of `WaveformCollator` for the model's spectrogram."""
        padding = (0.0 - self.mean) / (2 * self.std)
        return self.window_layout | {"num_mel_bins": self.num_mel_bins, "padding_value": padding}

    def stock(self) -> Wav2Vec2FeatureExtractor:
        """An extractor of transformers that only pads, for `pipeline`."""
        return Wav2Vec2FeatureExtractor(
            sampling_rate=self.sampling_rate, do_normalize=False, return_attention_mask=True
        )


@dataclass(frozen=True)
class ExtractorClips(FramedSamples):
    """Samples for a pretrained encoder with a feature extractor of its own, which computes the inputs of each batch.

    Attributes:
        extractor: The feature extractor of the pretrained model, unchanged.
    """

    extractor: SequenceFeatureExtractor
    input = "clips"

    @property
    def batch_layout(self) -> dict[str, Any]:
        """The arguments of `ExtractorCollator`."""
        return self.window_layout | {"extractor": self.extractor}

    @property
    def model_settings(self) -> dict[str, Any]:
        """What the configuration of the model needs, so that `window_layout` cuts long clips the same way."""
        return {"window_frames": self.max_length}

    def stock(self) -> SequenceFeatureExtractor:
        """The extractor itself."""
        return self.extractor


Inputs = BatchedASTFeatureExtractor | Waveforms | ExtractorClips  # what a model gets of a clip


@dataclass(frozen=True)
class ClipLengths:
    """Lengths for `extract_features`, which also finds the clips that cannot be read. They serve all models of a rate.

    Attributes:
        sampling_rate: In Hz.
    """

    sampling_rate: int
    stored_as = "int64"

    @property
    def cache_key(self) -> dict[str, Any]:
        """The settings that change a number."""
        return {"lengths": True, "sampling_rate": self.sampling_rate}

    def features(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """For each clip its number of samples, (1,), int64."""
        return [torch.tensor([len(waveform)]) for waveform in waveforms]


@dataclass(frozen=True)
class LogMelMoments:
    """Moments of the log-mel for `extract_features`. The mean and the standard deviation follow from them.

    Attributes:
        sampling_rate: In Hz.
        num_mel_bins: Mel bands.
    """

    sampling_rate: int
    num_mel_bins: int
    stored_as = "float64"

    @property
    def cache_key(self) -> dict[str, Any]:
        """The settings that change a number."""
        return {"moments": True, **vars(self)}

    def features(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """For each clip the count, the sum and the sum of squares of its log-mel before normalisation, float64."""
        extractor = BatchedASTFeatureExtractor(**vars(self), do_normalize=False)
        clips = [energies.double() for energies in extractor.log_mel(waveforms)]
        return [torch.stack([torch.ones_like(clip).sum(), clip.sum(), clip.square().sum()]) for clip in clips]


@lru_cache(maxsize=8)
def _window_and_mel_bands(
    sampling_rate: int, num_mel_bins: int, device: torch.device
) -> tuple[torch.Tensor, list[tuple[slice, slice, torch.Tensor]]]:
    """The Hann window (window,), and the mel filters of Kaldi in bands of 32, float32.

    A filter covers few bins of the spectrum. Each band is therefore multiplied with its own bins only, which is a
    quarter of the arithmetic. The filters are kept here and not in the extractor, because its pickle is part of the key
    of the cache.

    Returns:
        The window, and for each band the columns of its filters, its bins, and the weights (bins, filters).
    """
    window = window_samples(sampling_rate)
    # Kaldi's defaults: from 20 Hz to the Nyquist frequency; no vocal tract length warping.
    filters, _ = get_mel_banks(num_mel_bins, _fft_size(window), sampling_rate, 20.0, 0.0, 100.0, -500.0, 1.0)
    bands = []
    for first, band in zip(range(0, num_mel_bins, 32), filters.split(32), strict=True):
        used = band.any(0).nonzero().flatten().tolist() or [0]
        bins = slice(used[0], used[-1] + 1)
        bands.append((slice(first, first + len(band)), bins, band[:, bins].T.contiguous().to(device)))
    return torch.hann_window(window, periodic=False, device=device), bands


def _fft_size(window: int) -> int:
    """The smallest power of two that is at least the number of samples of the window."""
    return 1 << (window - 1).bit_length()


def _log_mel_energies(frames: torch.Tensor, sampling_rate: int, num_mel_bins: int) -> torch.Tensor:
    """The filter bank of Kaldi for rows of samples.

    Up to the spectrum, each step rounds as in `torchaudio.compliance.kaldi.fbank`. The rounding errors matter: for a
    pure tone they are the log-mel values of the silent bands.

    Args:
        frames: (frames, window), float32. It may be a view with overlapping rows.
        sampling_rate: In Hz.
        num_mel_bins: Number of filters.

    Returns:
        Natural log of the energies, floored at float32's epsilon, (frames, num_mel_bins), float32.
    """
    window, bands = _window_and_mel_bands(sampling_rate, num_mel_bins, frames.device)
    at_once = _FRAMES_ON_CPU if frames.device.type == "cpu" else _FRAMES_ON_GPU
    energies = frames.new_empty(len(frames), num_mel_bins)
    padded = frames.new_zeros(min(at_once, len(frames)), _fft_size(len(window)))
    for rows, out in zip(frames.split(at_once), energies.split(at_once), strict=True):
        centred = rows - rows.mean(1, keepdim=True)
        emphasised = padded[: len(rows), : len(window)]
        torch.mul(centred[:, :-1], 0.97, out=emphasised[:, 1:])
        torch.mul(centred[:, :1], 0.97, out=emphasised[:, :1])
        torch.sub(centred, emphasised, out=emphasised)
        emphasised *= window
        parts = torch.view_as_real(torch.fft.rfft(padded[: len(rows)]))
        parts *= parts  # |z|², without the square root in `abs`
        power = parts[..., 0] + parts[..., 1]
        for filters, bins, weights in bands:
            torch.mm(power[:, bins], weights, out=out[:, filters])
    return energies.clamp_(min=torch.finfo(torch.float32).eps).log_()


Stored = Inputs | Samples | ClipLengths | LogMelMoments  # what `extract_features` computes


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a data set, and the name of their features in the cache.

    Attributes:
        clips: The rows.
        first: The number of the first row in the data set.
        fingerprint: The fingerprint of the features.
    """

    clips: datasets.Dataset
    first: int
    fingerprint: str

    @property
    def path(self) -> Path:
        """The file in the cache, if one process computes it. Several processes add their numbers to its name."""
        return Path(self.clips._get_cache_file_path(self.fingerprint))

    @property
    def is_cached(self) -> bool:
        """Whether `Dataset.map` finds the features: one file, or one of each process that computed them."""
        pieces = self.path.parent.glob(f"{self.path.stem}_*_of_*.arrow")
        found = Counter(int(piece.stem.rsplit("_", 1)[1]) for piece in pieces)
        return self.path.exists() or any(count == present for count, present in found.items())


def parts_of(
    clips: datasets.Dataset,
    extractor: Stored,
    audio_column: str = "audio",
    id_column: str | None = None,
    channel: str = "mean",
) -> list[Part]:
    """The parts of at most `PART_ROWS` rows in which `extract_features` computes the features of a data set.

    Args:
        clips, extractor, audio_column, id_column, channel: As in `extract_features`.

    Raises:
        ValueError: The data set has no audio column, or has a column with the name of a new one.
    """
    if audio_column not in clips.column_names:
        raise ValueError(f"no column {audio_column!r}; the data set has {clips.column_names}")
    if taken := {"input_values", "error"} & set(clips.column_names):
        raise ValueError(f"the columns {sorted(taken)} exist already; rename them")
    if clips.features[audio_column] != Audio(decode=False):
        clips = clips.cast_column(audio_column, Audio(decode=False))
    settings = {
        "version": FEATURES_VERSION,
        "audio_column": audio_column,
        "id_column": id_column,
        "channel": channel,
        "HAS_AV": HAS_AV,  # so that clips that could not be read without PyAV are read again with it
        **extractor.cache_key,
    }
    rows = range(len(clips))
    starts = [*rows[::PART_ROWS]] or [0]
    # A range of rows is a slice of the table on the disk.
    parts = [clips.select(rows[start : start + PART_ROWS]) for start in starts] if len(starts) > 1 else [clips]
    fingerprints = [Hasher.hash([part._fingerprint, settings]) for part in parts]
    return [Part(*part) for part in zip(parts, starts, fingerprints, strict=True)]


def extract_features(
    clips: datasets.Dataset,
    extractor: Stored,
    audio_column: str = "audio",
    id_column: str | None = None,
    num_proc: int | None = None,
    batch_size: int = 32,
    channel: str = "mean",
    desc: str = "Features",
    shard: tuple[int, int] = (0, 1),
) -> datasets.Dataset:
    """Replace the audio of a data set by its features, and keep them in a cache on disk.

    The key of the cache is the fingerprint of the data set and the settings of the extractor that change a number.
    Another `max_length` or `num_proc` uses the same files. A data set that is made in memory has no cache.

    Each of the parts of `parts_of` has cache files of its own. Several machines with a shared disk can compute a shard
    each, and a call that is interrupted loses the part that it was computing at most.

    Args:
        clips: Rows with an audio column (bytes or paths).
        extractor: Computes the features.
        audio_column: The column to replace.
        id_column: Column with the name of a clip for error messages. Default: the path or the row number.
        num_proc: Number of processes. None means this process.
        batch_size: Clips in each call. More clips only take more memory.
        channel: As in `load_waveform`.
        desc: Title of the progress bar.
        shard: (i, n) computes the parts i, i + n, i + 2n, … only. There must be such a part.

    Returns:
        The other columns and two new ones. `input_values` has (frames * num_mel_bins,), frame by frame, or (samples,),
        float16, at the length of the clip; or the length (1,), int64, or moments (3,), float64. `error` is "", or the
        reason why the clip could not be read. Such a clip has no values.

    Raises:
        ValueError: The data set has no audio column, or has a column with the name of a new one.
    """
    parts, found = parts_of(clips, extractor, audio_column, id_column, channel), []
    kept = {name: kind for name, kind in parts[0].clips.features.items() if name != audio_column}
    # Flat lists of float16, through Arrow: Array2D took as long to write, but twenty times as long to read a random
    # clip; "binary" took as long as the lists and hides the numbers from every other reader.
    features = Features({**kept, "input_values": List(Value(extractor.stored_as)), "error": Value("string")})
    for number in range(shard[0], len(parts), shard[1]):
        part = parts[number]
        mapped = part.clips.with_format("arrow").map(
            partial(
                _extract_batch,
                first=part.first,
                extractor=extractor,
                audio_column=audio_column,
                id_column=id_column,
                channel=channel,
                batch_size=batch_size,
                caller=os.getpid(),
            ),
            with_indices=True,
            batched=True,
            batch_size=_BATCHES_OF_A_BLOCK * batch_size,
            features=features,
            num_proc=num_proc,
            new_fingerprint=part.fingerprint,
            desc=desc if len(parts) == 1 else f"{desc}, part {number + 1} of {len(parts)}",
        )
        found.append(mapped.with_format(None))
    return concatenate_datasets(found)  # of files that stay where they are


def _extract_batch(
    clips: pa.Table,
    rows: Sequence[int],
    first: int,
    extractor: Stored,
    audio_column: str,
    id_column: str | None,
    channel: str,
    batch_size: int,
    caller: int,
) -> pa.Table:
    """One block of `extract_features`: the table without its audio, with `input_values` and `error`."""
    if os.getpid() != caller:
        # Each core has a process. A forked process that starts threads would wait for those of its parent for ever.
        torch.set_num_threads(1)
    found = []
    for start in range(0, len(rows), batch_size):
        batch, numbers = clips.slice(start, batch_size), [first + row for row in rows[start : start + batch_size]]
        waveforms, errors = decode_batch(batch, numbers, extractor.sampling_rate, audio_column, id_column, channel)
        found.append(store_batch(batch.drop_columns([audio_column]), waveforms, errors, extractor))
    return pa.concat_tables(found)


def decode_batch(
    clips: pa.Table,
    rows: Sequence[int],
    sampling_rate: int,
    audio_column: str,
    id_column: str | None,
    channel: str,
) -> tuple[list[np.ndarray | None], list[str]]:
    """Decode clips.

    Args:
        clips: Clips with an audio column.
        rows: Their row numbers in the data set.
        sampling_rate: In Hz.
        audio_column: The column with the sound.
        id_column: Column with the names of the clips. Default: their paths or row numbers.
        channel: As in `load_waveform`.

    Returns:
        The waveform of each clip, or None if it cannot be read; and the reason why not, or "".
    """
    names = clips[id_column].to_pylist() if id_column else [None] * len(rows)
    waveforms, errors = [None] * len(rows), [""] * len(rows)
    for place, (cell, name) in enumerate(zip(clips[audio_column], names, strict=True)):
        audio = cell.as_py() or {"bytes": None, "path": None}
        name = str(name) if name is not None else audio["path"] or f"row {rows[place]}"
        try:
            waveforms[place] = load_waveform(audio, sampling_rate, name, channel)
        except BadClip as error:
            errors[place] = str(error)
    return waveforms, errors


def store_batch(
    others: pa.Table, waveforms: Sequence[np.ndarray | None], errors: Sequence[str], extractor: Stored
) -> pa.Table:
    """The rows of clips in the cache.

    Args:
        others: The other columns of the clips.
        waveforms, errors: What `decode_batch` returns.
        extractor: Computes the features.
    """
    features = extractor.features([waveform for waveform in waveforms if waveform is not None])
    sizes = np.zeros(len(waveforms) + 1, dtype=np.int32)
    sizes[1:][[waveform is not None for waveform in waveforms]] = [values.numel() for values in features]
    values = [np.empty(0, dtype=extractor.stored_as)]
    values += [rounded(clip, extractor.stored_as).ravel() for clip in features]
    lists = pa.ListArray.from_arrays(pa.array(np.cumsum(sizes, dtype=np.int32)), pa.array(np.concatenate(values)))
    return others.append_column("input_values", lists).append_column("error", pa.array(errors, pa.string()))


def rounded(values: torch.Tensor, dtype: str) -> np.ndarray:
    """Features in the type in which the cache stores them."""
    return values.numpy().astype(dtype, copy=False)


def feature_lengths(cached: datasets.Dataset, stored: Stored, extractor: Inputs) -> np.ndarray:
    """The number of rows of each clip's features, (clips,): frames or samples.

    Args:
        cached: What `extract_features` returns for `stored`.
        stored: What the cache has of each clip: the features, the samples or the length.
        extractor: The extractor of the features.
    """
    chunks = cached.data.column("input_values").chunks
    lengths = np.concatenate([pc.list_value_length(chunk).to_numpy() for chunk in chunks]).astype(np.int64)
    if stored is extractor:
        return lengths // (extractor.row_width or 1)
    if isinstance(stored, ClipLengths):  # clips that cannot be read have no length
        lengths[lengths == 1] = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    return extractor.rows(lengths)


def _labels_of(labels: np.ndarray | csr_array, rows: Sequence[int]) -> np.ndarray:
    found = labels[list(rows)]
    return found.toarray() if issparse(found) else found


class ClipFeatures(Dataset):
    """The result of `extract_features` as examples for a model.

    Args:
        features: Rows with `input_values`.
        labels: The class number of each row, or 0 or 1 for each class. The matrix may be sparse.
        num_mel_bins: Width of a frame. None for waveforms.
    """

    def __init__(self, features: datasets.Dataset, labels: Sequence[int] | csr_array, num_mel_bins: int | None):
        self._values = features.select_columns("input_values").with_format("arrow")
        self._labels = labels if issparse(labels) else np.asarray(labels)
        self._shape = (-1,) if num_mel_bins is None else (-1, num_mel_bins)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One example: `input_values`, float16 (frames, num_mel_bins) or (samples,), and `labels`."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of a batch, read from the disk at once. The data loader of torch calls this."""
        clips, labels = self._values[list(rows)]["input_values"], _labels_of(self._labels, rows)
        return [
            {
                # A copy, because the mapped file is read-only.
                "input_values": torch.from_numpy(clip.values.to_numpy().reshape(self._shape).copy()),
                "labels": label,
            }
            for clip, label in zip(clips, labels, strict=True)
        ]


class ClipWaveforms(Dataset):
    """Clips as examples with samples, which are decoded when they are read.

    Args:
        clips: Rows with an audio column (bytes or paths).
        labels: The class number of each row, or 0 or 1 for each class. The matrix may be sparse.
        sampling_rate: In Hz.
        audio_column: The column with the sound.
        channel: As in `load_waveform`.
    """

    def __init__(
        self,
        clips: datasets.Dataset,
        labels: Sequence[int] | csr_array,
        sampling_rate: int,
        audio_column: str = "audio",
        channel: str = "mean",
    ):
        sound = clips.select_columns(audio_column).cast_column(audio_column, Audio(decode=False))
        self._sound, self._labels = sound.with_format("arrow"), labels if issparse(labels) else np.asarray(labels)
        self._load = partial(load_waveform, sampling_rate=sampling_rate, channel=channel)

    def __len__(self) -> int:
        return len(self._sound)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of a batch: `input_values`, float32 (samples,), and `labels`."""
        cells, labels = self._sound[list(rows)].column(0), _labels_of(self._labels, rows)
        return [
            {"input_values": torch.from_numpy(self._load(cell.as_py())), "labels": label}
            for cell, label in zip(cells, labels, strict=True)
        ]


class ComputedFeatures(Dataset):
    """The examples of `ClipFeatures`, computed from waveforms whenever they are read.

    Rounded as the cache stores them, they equal the examples of `ClipFeatures` to the bit.

    Args:
        waveforms: Examples with samples.
        extractor: Computes the features.
        dtype: float32 for the numbers of `pipeline`, or `extractor.stored_as` for those of the cache.
    """

    def __init__(self, waveforms: ClipWaveforms | ClipFeatures, extractor: Inputs, dtype: str):
        self._waveforms, self._extractor, self._dtype = waveforms, extractor, dtype

    def __len__(self) -> int:
        return len(self._waveforms)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One example: `input_values` (frames, num_mel_bins) or (samples,), and `labels`."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of a batch."""
        examples = self._waveforms.__getitems__(rows)
        with one_thread():
            features = self._extractor.features([np.asarray(one["input_values"], dtype=np.float32) for one in examples])
        stored = [torch.from_numpy(rounded(values, self._dtype)) for values in features]
        return [example | {"input_values": values} for example, values in zip(examples, stored, strict=True)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute as the processes of `extract_features` do. With more threads, the last bits may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
