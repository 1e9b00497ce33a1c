"""Spectrogram batches with SpecAugment, mixup and time roll, for any Trainer: copy this one file into your project.

    collator = SpectrogramCollator(max_length=1024, num_labels=50, time_mask=96, frequency_mask=24, mixup_alpha=0.5)
    trainer = Trainer(..., train_dataset=AugmentedClips(train), data_collator=collator, callbacks=[SetEpoch()])

Examples are dictionaries with `input_values`, a log-mel spectrogram of shape (frames, mel bands) and any length,
normalised to mean 0, and `labels`, a class number. `AugmentedClips` gives each training example a `draw`, and the
collator augments just those that have one: evaluation needs no second collator and never gets augmented.
Set `remove_unused_columns=False`, or the Trainer takes the `draw` away. Needs NumPy, SciPy, torch, transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import betaincinv
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

# One column of random numbers for each decision about a clip; masks take two more each.
ROLL, PLACE, SHIFT, MIX, MIX_WEIGHT = range(5)
FILTER = slice(5, 10)
MASKS = 10


class AugmentedClips(Dataset):
    """Training examples with `draw` = (seed, epoch, row): the key of their random numbers.

    The augmentation of a clip is then a function of these three alone: the same in any worker, rank or batch, and
    after a resume.

    Args:
        examples: Any map-style data set of dictionaries.
        seed: Another seed, other augmentations.
    """

    def __init__(self, examples: Dataset, seed: int = 0):
        self.examples = examples
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._with_draw(self.examples[row], row)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        fetch = getattr(self.examples, "__getitems__", lambda rows: [self.examples[row] for row in rows])
        return [self._with_draw(example, row) for example, row in zip(fetch(rows), rows, strict=True)]

    def _with_draw(self, example: Mapping[str, Any], row: int) -> dict[str, Any]:
        return {**example, "draw": (self.seed, int(self.epoch), row)}


class SetEpoch(TrainerCallback):
    """Tells `AugmentedClips` the epoch; accelerate does so itself only where there is one process."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))


@dataclass
class SpectrogramCollator:
    """Examples of any length → one batch, in one vectorised pass.

    Examples with a `draw`, a tuple of integers that keys their random numbers, are rolled, placed, filtered, shifted,
    mixed and masked, in this order. Without it short clips are padded at the end and long ones cut
    there, as ASTFeatureExtractor does.

    Attributes:
        max_length: Frames of a batch.
        num_labels: Classes; needed for mixup, whose labels are soft.
        padding_value: What a padded frame holds: (0 - mean) / (2 * std) for AST, whose extractor pads before it
            normalises.
        random_crop: Random window of longer clips, random place of shorter ones.
        time_roll: Roll by up to so many frames, either way (circular).
        filter_gain: A random filter of up to so much gain or loss, in the units of the spectrogram: piecewise linear
            over the mel bands between five points (after FilterAugment, Nam et al. 2022, arXiv:2110.03282). It stands
            for other rooms and microphones. With AST's normalisation 10 dB are ln(10) / (2 * std), 0.25 for AudioSet's.
        frequency_shift: Up or down by up to so many mel bands; the outermost band fills the gap.
        time_mask, time_masks: Longest time mask in frames and masks a clip (SpecAugment, Park et al. 2019,
            arXiv:1904.08779). Masks hold 0, the mean.
        frequency_mask, frequency_masks: The same over mel bands.
        mixup_alpha: Mixup (Zhang et al. 2018, arXiv:1710.09412) with weights from Beta(alpha, alpha); 0: none.
        mixup_probability: Share of clips that are mixed with another clip of the batch.
    """

    max_length: int
    num_labels: int | None = None
    padding_value: float = 0.0
    random_crop: bool = True
    time_roll: int = 0
    filter_gain: float = 0.0
    frequency_shift: int = 0
    time_mask: int = 0
    time_masks: int = 1
    frequency_mask: int = 0
    frequency_masks: int = 1
    mixup_alpha: float = 0.0
    mixup_probability: float = 1.0

    def __post_init__(self):
        if self.mixup_alpha and self.num_labels is None:
            raise ValueError("mixup_alpha: mixup makes soft labels and needs num_labels")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            examples: Each with `input_values` (frames, mel bands), and optionally `labels` (int) and `draw`.

        Returns:
            `input_values` (batch, max_length, mel bands) float32 and, if the examples have them, `labels`: (batch,)
            int64, or (batch, num_labels) float32 that sum to 1 where mixup is on.
        """
        clips = [torch.as_tensor(example["input_values"]) for example in examples]
        draws = self._draw(examples) if "draw" in examples[0] else None
        batch = {"input_values": self._fit(clips, draws)}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([int(example["labels"]) for example in examples])
        if draws is not None:
            if self.mixup_alpha:
                batch = self._mixup(batch, draws)
            self._mask(batch["input_values"], draws)
        return batch

    def _draw(self, examples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Uniform random numbers in [0, 1), (batch, decisions) float64."""
        count = MASKS + 2 * (self.time_masks + self.frequency_masks)
        return torch.from_numpy(
            np.stack([np.random.default_rng(example["draw"]).random(count) for example in examples])
        )

    def _fit(self, clips: list[torch.Tensor], draws: torch.Tensor | None) -> torch.Tensor:
        """Roll, pad or crop to (batch, max_length, bands) by one gather over all frames, then filter and shift."""
        lengths = torch.tensor([len(clip) for clip in clips])
        spare = lengths - self.max_length  # over 0: frames to cut; under 0: frames to pad
        start = torch.zeros_like(spare)
        roll = torch.zeros_like(spare)
        if draws is not None:
            if self.random_crop:
                # From `start` on, counted from the clip's first frame: 0..spare, or spare..0 where it is short.
                start = torch.where(spare < 0, -_below(draws[:, PLACE], 1 - spare), _below(draws[:, PLACE], spare + 1))
            roll = _below(draws[:, ROLL], 2 * self.time_roll + 1) - self.time_roll
        frame = start[:, None] + torch.arange(self.max_length)
        inside = (frame >= 0) & (frame < lengths[:, None])
        first = torch.cumsum(lengths, 0) - lengths
        source = first[:, None] + (frame - roll[:, None]) % lengths[:, None]
        batch = torch.cat(clips)[source].float()
        if draws is not None and self.filter_gain:
            points = self.filter_gain * (2 * draws[:, None, FILTER] - 1)
            batch += nn.functional.interpolate(points, batch.shape[2], mode="linear", align_corners=True).float()
        if draws is not None and self.frequency_shift:
            shift = _below(draws[:, SHIFT], 2 * self.frequency_shift + 1) - self.frequency_shift
            bands = torch.arange(batch.shape[2])
            batch = batch.take_along_dim((bands + shift[:, None]).clamp(0, len(bands) - 1)[:, None, :], dim=2)
        return batch.masked_fill_(~inside[:, :, None], self.padding_value)

    def _mixup(self, batch: dict[str, torch.Tensor], draws: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each chosen clip with its neighbour in the batch, whose order the sampler has shuffled."""
        weight = torch.from_numpy(betaincinv(self.mixup_alpha, self.mixup_alpha, draws[:, MIX_WEIGHT].numpy()))
        weight = torch.where(draws[:, MIX] < self.mixup_probability, weight, 1.0).float()
        labels = nn.functional.one_hot(batch["labels"], self.num_labels).float()
        return {
            "input_values": _blend(batch["input_values"], weight[:, None, None]),
            "labels": _blend(labels, weight[:, None]),
        }

    def _mask(self, spectrograms: torch.Tensor, draws: torch.Tensor) -> None:
        """SpecAugment in place: width 0..mask, then a place where it fits."""
        axes = [(1, self.time_mask)] * self.time_masks + [(2, self.frequency_mask)] * self.frequency_masks
        for number, (axis, longest) in enumerate(axes):
            if longest == 0:
                continue
            size = spectrograms.shape[axis]
            width = _below(draws[:, MASKS + 2 * number], min(longest, size) + 1)
            start = _below(draws[:, MASKS + 2 * number + 1], size - width + 1)
            place = torch.arange(size)
            masked = (place >= start[:, None]) & (place < (start + width)[:, None])
            spectrograms.masked_fill_(masked.unsqueeze(3 - axis), 0.0)


def _below(uniform: torch.Tensor, bound: torch.Tensor | int) -> torch.Tensor:
    """Whole numbers 0 .. bound - 1 from uniform ones in [0, 1)."""
    return (uniform * bound).long()


def _blend(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * values + (1 - weight) * values.roll(1, 0)
