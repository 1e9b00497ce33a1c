"""Clips longer than the model's window: overlapping windows of them, and one answer from all windows of a clip."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import ASTFeatureExtractor, AudioClassificationPipeline

from audio_dendrites.data.audio import window_samples


def windows(length: int, max_length: int, overlap: float, window_length: int = 1, hop_length: int = 1) -> list[slice]:
    """Where to cut a clip.

    Args:
        length: Of the clip, in samples, or in frames with the defaults of the last two.
        max_length: Frames that the model sees.
        overlap: Share of a window that the next one repeats, 0 to under 1.
        window_length, hop_length: Samples of a frame, and from one to the next; a window of 0 stands for frames centred
            on every hop.

    Returns:
        The whole clip where its frames fit; else windows of `max_length` frames, the last one at the clip's end.
    """
    frames = 1 + (length - window_length) // hop_length
    if frames <= max_length:
        return [slice(0, length)]
    step = max(1, round(max_length * (1 - overlap)))
    samples = (max_length - 1) * hop_length + window_length
    starts = [*range(0, frames - max_length, step), frames - max_length]
    return [slice(start * hop_length, start * hop_length + samples) for start in starts]


def aggregate(logits: np.ndarray, clips: np.ndarray, aggregation: str) -> np.ndarray:
    """One row a clip.

    Args:
        logits: (windows, classes), those of a clip one after the other.
        clips: (windows,) the number of each window's clip, ascending.
        aggregation: mean or max, of each class.

    Returns:
        (clips, classes), of the same dtype; a single window's as they are.
    """
    first = np.flatnonzero(np.diff(clips, prepend=clips[0] - 1))
    if aggregation == "max":
        return np.maximum.reduceat(logits, first)
    counts = np.diff(first, append=len(clips)).astype(logits.dtype)
    return np.add.reduceat(logits, first) / counts[:, None]


class ClipWindows(Dataset):
    """The windows of clips as examples for a model; `AudioTrainer` puts their logits together again.

    Args:
        examples: The clips, with `input_values`.
        lengths: Of each clip's `input_values`.
        layout: What `windows` has to know of the model: `max_length`, and for waveforms the frame's lengths.
        overlap: Share of a window that the next one repeats.
        aggregation: mean or max.
    """

    def __init__(
        self, examples: Dataset, lengths: Sequence[int], layout: dict[str, int], overlap: float, aggregation: str
    ):
        cuts = [windows(length, overlap=overlap, **layout) for length in lengths]
        self.examples, self.aggregation = examples, aggregation
        self.clips = np.repeat(np.arange(len(cuts)), [len(clip) for clip in cuts])
        self._cuts = [cut for clip in cuts for cut in clip]

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One example, `input_values` being those of the window."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of a batch; a clip is read once for all its windows there."""
        wanted = list(dict.fromkeys(self.clips[list(rows)].tolist()))
        fetch = getattr(self.examples, "__getitems__", lambda clips: [self.examples[clip] for clip in clips])
        read = dict(zip(wanted, fetch(wanted), strict=True))
        examples = [(read[self.clips[row]], self._cuts[row]) for row in rows]
        return [{**example, "input_values": example["input_values"][cut]} for example, cut in examples]

    def by_clip(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits (windows, classes) and labels (windows, …) as those of the clips."""
        first = np.flatnonzero(np.diff(self.clips, prepend=-1))
        return aggregate(logits, self.clips, self.aggregation), labels[first]


def classify(pipeline: AudioClassificationPipeline, waveform: np.ndarray) -> np.ndarray:
    """The logits (classes,) of one clip of any length, its windows put together as the model's configuration says.

    A model of another origin says nothing: the mean is taken then.

    Args:
        pipeline: For audio classification.
        waveform: (samples,) at the pipeline's rate.
    """
    names = pipeline.model.config.id2label.values()
    cuts = pipeline_windows(pipeline, len(waveform))
    answers = pipeline([waveform[cut] for cut in cuts], top_k=len(names), function_to_apply="none")
    found = [{one["label"]: one["score"] for one in window} for window in answers]
    logits = np.array([[window[name] for name in names] for window in found], dtype=np.float32)
    aggregation = getattr(pipeline.model.config, "window_aggregation", "mean")
    return aggregate(logits, np.zeros(len(logits), dtype=int), aggregation)[0]


def pipeline_windows(pipeline: AudioClassificationPipeline, length: int) -> list[slice]:
    """Where to cut a clip of so many samples for a pipeline; without an overlap in the configuration it is 0.5."""
    extractor, config = pipeline.feature_extractor, pipeline.model.config
    if isinstance(extractor, ASTFeatureExtractor):
        frame = {"window_length": window_samples(extractor.sampling_rate), "hop_length": extractor.sampling_rate // 100}
        max_length = extractor.max_length
    elif config.model_type == "waveform-classifier" and config.max_length is not None:
        kaldi = config.convention != "librosa"
        frame = {"window_length": config.window_length if kaldi else 0, "hop_length": config.hop_length}
        max_length = config.max_length
    elif (frames := getattr(config, "window_frames", None)) is not None:
        hop = extractor.sampling_rate // 100
        frame, max_length = {"window_length": hop, "hop_length": hop}, frames
    else:  # takes clips of any length
        return [slice(0, length)]
    return windows(length, max_length, getattr(config, "window_overlap", 0.5), **frame)
