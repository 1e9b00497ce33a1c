"""Cut clips that are longer than the model's window into overlapping windows, and combine the logits of the windows."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import ASTFeatureExtractor, FeatureExtractionMixin, PreTrainedConfig

from audio_dendrites.data.audio import window_samples


def windows(length: int, max_length: int, overlap: float, window_length: int = 1, hop_length: int = 1) -> list[slice]:
    """Cut a clip into windows; see `windows_of_clips`."""
    _, starts, ends = windows_of_clips([length], max_length, overlap, window_length, hop_length)
    return list(map(slice, starts.tolist(), ends.tolist()))


def windows_of_clips(
    lengths: Sequence[int], max_length: int, overlap: float, window_length: int = 1, hop_length: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut clips into windows.

    A clip of at most `max_length` frames is one window. A longer one has windows of `max_length` frames, of which the
    last one ends where the clip ends.

    Args:
        lengths: Length of each clip in samples, or in frames if `window_length` and `hop_length` are 1, (clips,).
        max_length: Number of frames that the model sees.
        overlap: Share of a window that the next window repeats, in [0, 1).
        window_length: Samples of a frame. 0 means that frames are centred on every hop.
        hop_length: Samples from one frame to the next.

    Returns:
        For each window the number of its clip, its start and its end, (windows,) each, int64, clip by clip.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    max_length = min(max_length, 1 + int(lengths.max(initial=0)))  # a limit that no clip reaches may be sys.maxsize
    spare = 1 + (lengths - window_length) // hop_length - max_length  # frames after the first window
    step = max(1, round(max_length * (1 - overlap)))
    counts = 1 + np.maximum(0, -(-spare // step))
    clips = np.repeat(np.arange(len(lengths)), counts)
    numbers = np.arange(len(clips)) - np.repeat(counts.cumsum() - counts, counts)
    starts = np.maximum(0, np.minimum(numbers * step, spare[clips])) * hop_length
    samples = (max_length - 1) * hop_length + window_length
    return clips, starts, np.where(spare[clips] > 0, starts + samples, lengths[clips])


def aggregate(logits: np.ndarray, clips: np.ndarray, aggregation: str) -> np.ndarray:
    """Combine the logits of the windows of each clip.

    Args:
        logits: Logits of the windows, (windows, classes), clip by clip.
        clips: Number of the clip of each window, (windows,), ascending.
        aggregation: mean or max over the windows, for each class.

    Returns:
        Logits of the clips, (clips, classes), of the same dtype. Logits of a single window do not change.
    """
    first = np.flatnonzero(np.diff(clips, prepend=clips[0] - 1))
    if aggregation == "max":
        return np.maximum.reduceat(logits, first)
    counts = np.diff(first, append=len(clips)).astype(logits.dtype)
    return np.add.reduceat(logits, first) / counts[:, None]


class ClipWindows(Dataset):
    """The windows of clips as examples for a model. `AudioTrainer` combines their logits.

    Args:
        examples: The clips, each with `input_values`.
        lengths: Length of the `input_values` of each clip.
        layout: Arguments of `windows` that depend on the model: `max_length`, and for waveforms also `window_length`
            and `hop_length`.
        overlap: Share of a window that the next window repeats.
        aggregation: mean or max.
    """

    def __init__(
        self, examples: Dataset, lengths: Sequence[int], layout: dict[str, int], overlap: float, aggregation: str
    ):
        self.examples, self.aggregation = examples, aggregation
        self.clips, self._starts, self._ends = windows_of_clips(lengths, overlap=overlap, **layout)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One window of a clip as an example."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of a batch. Each clip is read once for all of its windows in the batch."""
        clips = list(dict.fromkeys(self.clips[list(rows)].tolist()))
        fetch = getattr(self.examples, "__getitems__", lambda clips: [self.examples[clip] for clip in clips])
        read = dict(zip(clips, fetch(clips), strict=True))
        examples = [(read[self.clips[row]], slice(self._starts[row], self._ends[row])) for row in rows]
        return [{**example, "input_values": example["input_values"][cut]} for example, cut in examples]

    def by_clip(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn logits (windows, classes) and labels (windows, …) of windows into those of clips."""
        first = np.flatnonzero(np.diff(self.clips, prepend=-1))
        return aggregate(logits, self.clips, self.aggregation), labels[first]


def stream_windows(
    blocks: Iterable[np.ndarray], max_length: int, overlap: float, window_length: int, hop_length: int
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """Cut a clip that comes in blocks of samples, as `windows` does, and hold little more than a window of it.

    Args:
        blocks: Parts of a waveform, (samples,) each.
        max_length, overlap, window_length, hop_length: As those of `windows`.

    Yields:
        The first sample of a window, its samples, and whether it is the last window.
    """
    samples = (max_length - 1) * hop_length + window_length
    step = max(1, round(max_length * (1 - overlap))) * hop_length
    parts, start, ahead = [], 0, 0  # the parts begin at sample `start`, and the next window `ahead` samples later
    for block in blocks:
        parts.append(block)
        if sum(map(len, parts)) - ahead < samples + hop_length:
            continue
        held = np.concatenate(parts)
        while len(held) - ahead >= samples + hop_length:  # more than `max_length` frames: this is not the last window
            held, start = held[ahead:], start + ahead
            yield start, held[:samples], False
            ahead = step
        parts = [held]
    held = np.concatenate(parts)
    if not ahead:
        yield 0, held, True
        return
    last = (1 + (len(held) - window_length) // hop_length - max_length) * hop_length
    yield start + last, held[last : last + samples], True


def window_layout(extractor: FeatureExtractionMixin, config: PreTrainedConfig) -> dict[str, int | float]:
    """The arguments of `windows` for a clip in samples and a finished model. The overlap is 0.5 if it has none."""
    hop = extractor.sampling_rate // 100
    frame = {"window_length": hop, "hop_length": hop}
    if isinstance(extractor, ASTFeatureExtractor):
        frame, max_length = frame | {"window_length": window_samples(extractor.sampling_rate)}, extractor.max_length
    elif config.model_type == "waveform-classifier":
        kaldi, max_length = config.convention != "librosa", config.max_length
        frame = {"window_length": config.window_length if kaldi else 0, "hop_length": config.hop_length}
    else:
        max_length = getattr(config, "window_frames", None)
    # A model without a limit takes clips of any length.
    return {"max_length": max_length or sys.maxsize, "overlap": getattr(config, "window_overlap", 0.5), **frame}
