"""Classify sound files with a finished model: decoded and batched in worker processes, long files window by window."""

import inspect
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import ASTFeatureExtractor, FeatureExtractionMixin, PreTrainedModel

from audio_dendrites.data.audio import BadClip, waveform_blocks
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.data.windows import aggregate, stream_windows, window_layout
from audio_dendrites.errors import UserError
from audio_dendrites.models.families import CLASSIFIER

_CLIPS_A_WORKER = 64  # for fewer clips, a process takes longer to start than it saves
_WORKERS = 4  # at most: what they prepare is in shared memory, of which a container has 64 MB by default
_LOOK_AHEAD = 8  # batches in which windows of equal length are looked for


@dataclass
class Window:
    """A window of a clip, or the fault of the clip.

    Attributes:
        clip: Number of the clip.
        start: First sample.
        samples: (samples,), float32. Removed when the inputs of the model are made.
        length: Number of samples.
        last: Whether the clip ends with this window.
        fault: What is wrong with the clip. Then there are no samples.
    """

    clip: int
    start: int = 0
    samples: np.ndarray | None = None
    length: int = 0
    last: bool = True
    fault: str = ""


@dataclass
class Answer:
    """What a model says of a clip.

    Attributes:
        fault: What is wrong with a clip that could not be read. Everything else is empty.
        spans: Start and end of each window in seconds, (windows, 2).
        window_scores: Sigmoids for a multi-label model, otherwise the softmax, (windows, classes), float32.
        logits: Of the clip, (classes,), float32: the mean or the maximum over the windows, as in the test of the run.
        scores: Of the clip, (classes,), from `logits`.
        embedding: The input of the last layer, (hidden size,), float32, mean over the windows. None without `embed`.
    """

    fault: str = ""
    spans: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    window_scores: np.ndarray | None = None
    logits: np.ndarray | None = None
    scores: np.ndarray | None = None
    embedding: np.ndarray | None = None


@dataclass
class Batches(IterableDataset):
    """Batches of the windows of clips: the inputs of the model, and the windows. Each worker decodes clips of its own.

    Attributes:
        clips: Values of `datasets.Audio(decode=False)`.
        extractor: Makes the inputs of the model.
        layout: Arguments of `stream_windows`.
        channel: As in `load_waveform`.
        batch_size: Windows in a batch, at most.
    """

    clips: Sequence[Mapping[str, Any]]
    extractor: FeatureExtractionMixin
    layout: Mapping[str, Any]
    channel: str
    batch_size: int

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], list[Window]]]:
        worker = get_worker_info()
        mine = range(worker.id, len(self.clips), worker.num_workers) if worker else range(len(self.clips))
        windows = (window for clip in mine for window in self._cut(clip))
        padding = inspect.signature(type(self.extractor).__call__).parameters.get("padding")
        # Some models give other logits to a padded clip. So only clips of equal length share a batch, unless the
        # extractor pads all clips to the same length.
        fixed = isinstance(self.extractor, ASTFeatureExtractor) or (padding and padding.default == "max_length")

        def sort_key(window: Window) -> tuple[bool, int]:
            return bool(window.fault), 0 if fixed else window.length

        while held := list(islice(windows, self.batch_size * (1 if fixed else _LOOK_AHEAD))):
            for _, group in groupby(sorted(held, key=sort_key), key=sort_key):
                while batch := list(islice(group, self.batch_size)):
                    yield self._inputs(batch), batch

    def _cut(self, clip: int) -> Iterator[Window]:
        try:
            blocks = waveform_blocks(self.clips[clip], self.extractor.sampling_rate, channel=self.channel)
            for start, samples, last in stream_windows(blocks, **self.layout):
                yield Window(clip, start, samples, len(samples), last)
        except BadClip as error:
            yield Window(clip, fault=str(error))

    def _inputs(self, batch: list[Window]) -> dict[str, torch.Tensor]:
        if batch[0].fault:
            return {}
        waveforms = [window.samples for window in batch]
        for window in batch:
            window.samples = None
        return dict(self.extractor(waveforms, sampling_rate=self.extractor.sampling_rate, return_tensors="pt"))


def batches_of(
    model: PreTrainedModel, extractor: FeatureExtractionMixin, clips: Sequence[Mapping[str, Any]], batch_size: int
) -> Batches:
    """The batches that `classify_clips` gives to the model."""
    if type(extractor) is ASTFeatureExtractor:  # the same numbers, much faster
        extractor = BatchedASTFeatureExtractor.from_dict(extractor.to_dict())
    layout, channel = window_layout(extractor, model.config), getattr(model.config, "channel", "mean")
    return Batches(clips, extractor, layout, channel, batch_size)


def classify_clips(
    model: PreTrainedModel,
    extractor: FeatureExtractionMixin,
    clips: Sequence[Mapping[str, Any]],
    batch_size: int = 16,
    embed: bool = False,
) -> Iterator[Answer]:
    """Classify clips of any number and any length. The memory depends on neither.

    Args:
        model, extractor: From `load_finished`. The model moves to the accelerator, if there is one.
        clips: Values of `datasets.Audio(decode=False)`: `bytes`, or None, and `path`.
        batch_size: Windows in a batch.
        embed: Whether the answers have embeddings.

    Yields:
        The answers, in the order of the clips.

    Raises:
        UserError: `embed` is set, and the model has no layer named classifier.
    """
    config = model.config
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    workers = min(_WORKERS, os.cpu_count() or 1, len(clips) // _CLIPS_A_WORKER)
    batches = batches_of(model, extractor, clips, batch_size)
    waiting, found, following = {}, defaultdict(list), 0
    loader = DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=1 if workers else None)
    for inputs, windows in loader:
        results = _run(model, inputs, embed) if inputs else [()] * len(windows)
        for window, result in zip(windows, results, strict=True):
            found[window.clip].append((window, *result))
            if window.last:
                waiting[window.clip] = _answer(found.pop(window.clip), config, extractor.sampling_rate)
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], embed: bool) -> list[tuple[np.ndarray, ...]]:
    """The logits of each window of a batch, (classes,), and with `embed` what the last layer gets, (hidden size,)."""
    hidden = []
    hook = last_layer(model).register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0])) if embed else None
    with torch.inference_mode():
        logits = model(**{name: values.to(model.device) for name, values in inputs.items()}).logits
    if hook:
        hook.remove()
    return list(zip(*(values.float().cpu().numpy() for values in (logits, *hidden)), strict=True))


def last_layer(model: nn.Module) -> nn.Module:
    """The layer of the classification head that computes the logits.

    Raises:
        UserError: The model has no layer named classifier.
    """
    layers = [module for name, module in model.named_modules() if CLASSIFIER.search(name)]
    layers = [layer for layer in layers if getattr(getattr(layer, "weight", None), "ndim", 0) == 2]
    if not layers:
        raise UserError(
            f"embeddings need a model with a linear layer named classifier, {type(model).__name__} has none"
        )
    return layers[-1]


def _answer(found: list[tuple[Any, ...]], config: Any, sampling_rate: int) -> Answer:
    """The answer to a clip from its windows and their results."""
    if fault := found[-1][0].fault:
        return Answer(fault)
    windows, logits, *hidden = zip(*found, strict=True)
    logits = np.stack(logits)
    activate = expit if config.problem_type == "multi_label_classification" else lambda x: softmax(x, axis=-1)
    clip = aggregate(logits, np.zeros(len(logits), dtype=int), getattr(config, "window_aggregation", "mean"))[0]
    spans = np.array([(window.start, window.start + window.length) for window in windows]) / sampling_rate
    embedding = np.mean(hidden[0], axis=0) if hidden else None
    return Answer("", spans, activate(logits), clip, activate(clip), embedding)
