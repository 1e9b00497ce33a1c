"""Cut clips that are longer than the model's window into overlapping windows, and combine the logits of the windows."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax
from torch.utils.data import Dataset
from transformers import ASTFeatureExtractor, AudioClassificationPipeline

from audio_dendrites.data.audio import window_samples


def windows(length: int, max_length: int, overlap: float, window_length: int = 1, hop_length: int = 1) -> list[slice]:
    """Cut a clip into windows.

    Args:
        length: Length of the clip in samples, or in frames if `window_length` and `hop_length` are 1.
        max_length: Number of frames that the model sees.
        overlap: Share of a window that the next window repeats, in [0, 1).
        window_length: Samples of a frame. 0 means that frames are centred on every hop.
        hop_length: Samples from one frame to the next.

    Returns:
        The whole clip if it has at most `max_length` frames. Otherwise windows of `max_length` frames, of which the
        last one ends where the clip ends.
    """
    frames = 1 + (length - window_length) // hop_length
    if frames <= max_length:
        return [slice(0, length)]
    step = max(1, round(max_length * (1 - overlap)))
    samples = (max_length - 1) * hop_length + window_length
    starts = [*range(0, frames - max_length, step), frames - max_length]
    return [slice(start * hop_length, start * hop_length + samples) for start in starts]


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
        cuts = [windows(length, overlap=overlap, **layout) for length in lengths]
        self.examples, self.aggregation = examples, aggregation
        self.clips = np.repeat(np.arange(len(cuts)), [len(clip) for clip in cuts])
        self._cuts = [cut for clip in cuts for cut in clip]

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One window of a clip as an example."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of a batch. Each clip is read once for all of its windows in the batch."""
        clips = list(dict.fromkeys(self.clips[list(rows)].tolist()))
        fetch = getattr(self.examples, "__getitems__", lambda clips: [self.examples[clip] for clip in clips])
        read = dict(zip(clips, fetch(clips), strict=True))
        examples = [(read[self.clips[row]], self._cuts[row]) for row in rows]
        return [{**example, "input_values": example["input_values"][cut]} for example, cut in examples]

    def by_clip(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turn logits (windows, classes) and labels (windows, …) of windows into those of clips."""
        first = np.flatnonzero(np.diff(self.clips, prepend=-1))
        return aggregate(logits, self.clips, self.aggregation), labels[first]


def classify(pipeline: AudioClassificationPipeline, waveform: np.ndarray) -> np.ndarray:
    """Classify one clip of any length. Its windows are combined as the model's configuration says, or by their mean.

    Args:
        pipeline: A pipeline for audio classification.
        waveform: Samples (samples,) at the sampling rate of the pipeline.

    Returns:
        Logits (classes,), float32.
    """
    return combine(pipeline, window_logits(pipeline, waveform, pipeline_windows(pipeline, len(waveform))))


def window_logits(pipeline: AudioClassificationPipeline, waveform: np.ndarray, cuts: Iterable[slice]) -> np.ndarray:
    """Classify windows of a clip one after the other. Only one window at a time is in memory as features.

    Args:
        pipeline: A pipeline for audio classification.
        waveform: Samples (samples,) at the sampling rate of the pipeline.
        cuts: The windows, as `pipeline_windows` returns them. At least one.

    Returns:
        Logits (windows, classes), float32.
    """
    names = pipeline.model.config.id2label.values()
    answers = pipeline((waveform[cut] for cut in cuts), top_k=len(names), function_to_apply="none")
    found = ({one["label"]: one["score"] for one in window} for window in answers)
    return np.array([np.float32([window[name] for name in names]) for window in found])


def combine(pipeline: AudioClassificationPipeline, logits: np.ndarray) -> np.ndarray:
    """Combine the logits (windows, classes) of one clip to (classes,) as the configuration of the model says."""
    aggregation = getattr(pipeline.model.config, "window_aggregation", "mean")
    return aggregate(logits, np.zeros(len(logits), dtype=int), aggregation)[0]


def to_scores(pipeline: AudioClassificationPipeline, logits: np.ndarray) -> np.ndarray:
    """Scores of logits (…, classes): sigmoids for a multi-label model, otherwise the softmax over the classes."""
    multi_label = pipeline.model.config.problem_type == "multi_label_classification"
    return expit(logits) if multi_label else softmax(logits, axis=-1)


def pipeline_windows(pipeline: AudioClassificationPipeline, length: int) -> list[slice]:
    """Cut a clip with this number of samples for a pipeline. The overlap is 0.5 if the configuration has none."""
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
