"""Spectrogram batches with SpecAugment, mixup and time roll, for any Trainer: copy this one file into your project.

    collator = SpectrogramCollator(max_length=1024, num_labels=50, time_mask=96, frequency_mask=24, mixup_alpha=0.5)
    trainer = Trainer(..., train_dataset=AugmentedClips(train), data_collator=collator, callbacks=[SetEpoch()])

Examples are dictionaries with `input_values`, a log-mel spectrogram of shape (frames, mel bands) and any length,
normalised to mean 0, and `labels`, a class number or, for clips of several classes, 0 or 1 for each class.
`AugmentedClips` gives each training example a `draw`. The collator augments only examples that have one, so the same
collator serves evaluation. Set `remove_unused_columns=False`, because otherwise the Trainer removes the `draw`.
`WaveformCollator` is for models that compute their spectrogram themselves, and `ExtractorCollator` for models with a
feature extractor of transformers. `BalancedSampler` draws rare classes more often.

Needs NumPy, SciPy, torch and transformers.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import issparse, sparray
from scipy.special import betaincinv
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import SequenceFeatureExtractor, TrainerCallback

# Columns of the random numbers of a clip, one for each decision. Each mask has two more, and the last column is the
# level of the noise of a spectrogram.
ROLL, PLACE, SHIFT, MIX, MIX_WEIGHT = range(5)
FILTER = slice(5, 10)
MASKS = 10
GAIN, NOISE = 5, 6  # columns of the filter, which waveforms do not have


class AugmentedClips(Dataset):
    """Training examples with `draw` = (seed, epoch, row), the key of their random numbers.

    The augmentation of a clip depends on these three numbers only. It is the same in any worker, rank or batch, and
    after a resume.

    Args:
        examples: Any map-style data set of dictionaries.
        seed: Seed of the augmentation.
    """

    def __init__(self, examples: Dataset, seed: int = 0):
        self.examples = examples
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int | tuple[int, int]) -> dict[str, Any]:
        return self._with_draw(self.examples[_row(row)], row)

    def __getitems__(self, rows: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        fetch = getattr(self.examples, "__getitems__", lambda rows: [self.examples[row] for row in rows])
        examples = fetch([_row(row) for row in rows])
        return [self._with_draw(example, row) for example, row in zip(examples, rows, strict=True)]

    def _with_draw(self, example: Mapping[str, Any], row: int | tuple[int, int]) -> dict[str, Any]:
        return {**example, "draw": (self.seed, int(self.epoch), *(row if isinstance(row, tuple) else (row,)))}


class BalancedSampler(Sampler):
    """Draws clips with replacement, and clips of rare classes more often, as AST's authors train AudioSet.

    The weight of a clip is the sum of 1000 / (clips + 0.01) over its classes (github.com/YuanGongND/ast,
    egs/audioset/gen_weight_file.py). An epoch has one draw for each clip. The draws depend on the seed and the epoch of
    the data set only, so they are the same in any rank and after a resume. The sampler yields (row, number of earlier
    draws of this row), so a clip never has the same augmentation twice.

    Args:
        clips: The training clips.
        labels: Class numbers (clips,) or 0 and 1, (clips, classes). The matrix may be sparse.
    """

    def __init__(self, clips: AugmentedClips, labels: np.ndarray | sparray):
        labels = labels if issparse(labels) else np.asarray(labels)
        counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels)
        rarity = 1000 / (counts + 0.01)
        weights = labels @ rarity if labels.ndim == 2 else rarity[labels]
        self.clips, self.probabilities = clips, weights / weights.sum()

    def __len__(self) -> int:
        return len(self.clips)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng((self.clips.seed, int(self.clips.epoch)))
        rows = random.choice(len(self), len(self), p=self.probabilities)
        order = rows.argsort(kind="stable")
        starts = np.searchsorted(rows, rows[order], sorter=order)  # where the draws of the same row begin in the order
        earlier = np.empty_like(rows)
        earlier[order] = np.arange(len(rows)) - starts
        for start in range(0, len(rows), 10_000):  # few draws at a time are Python objects
            block = slice(start, start + 10_000)
            yield from zip(rows[block].tolist(), earlier[block].tolist(), strict=True)


class SetEpoch(TrainerCallback):
    """Tells `AugmentedClips` the epoch. accelerate does so only if there is one process."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))


@dataclass
class SpectrogramCollator:
    """Makes one batch of examples of any length, in one vectorised pass.

    An example with a `draw`, a tuple of integers that keys its random numbers, is rolled, placed, filtered, shifted,
    mixed, masked and made noisy, in this order. `roll_padded` and `augment_after_norm` change the order. An example
    without a `draw` is padded or cut at its end, as ASTFeatureExtractor does.

    Attributes:
        max_length: Number of frames of a batch.
        num_labels: Number of classes. Mixup needs it, because its labels are soft.
        padding_value: Value of padded frames. For AST it is (0 - mean) / (2 * std), because its extractor pads before
            it normalises.
        random_crop: Take a random window of a longer clip, and put a shorter clip at a random place.
        time_roll: Largest number of frames to roll by, either way (circular).
        roll_padded: Roll the padded window with its masks and noise, as the last step, by -time_roll to time_roll - 1
            frames, as AST's authors do for Speech Commands (github.com/YuanGongND/ast, src/dataloader.py). By default
            only the clip is rolled, as the first step.
        filter_gain: Largest gain or loss of a random filter, in the units of the spectrogram. The filter is piecewise
            linear over the mel bands between five points (after FilterAugment, Nam et al. 2022, arXiv:2110.03282). It
            imitates other rooms and microphones. With AST's normalisation, 10 dB are ln(10) / (2 * std), which is 0.25
            for AudioSet.
        frequency_shift: Largest number of mel bands to shift by, up or down. The outermost band fills the gap.
        time_mask, time_masks: Longest time mask in frames, and number of time masks of each clip (SpecAugment, Park et
            al. 2019, arXiv:1904.08779). A width is drawn from 0 to `time_mask`. For the masks of
            `torchaudio.transforms.TimeMasking(48)` and PANNs' SpecAugmentation, `time_mask` is 47.
        frequency_mask, frequency_masks: The same over mel bands.
        mask_value: Value of the masks: mean (0) or padding (`padding_value`). AST's authors mask before they normalise,
            so their masks have the value of their padding.
        augment_after_norm: For models that mask and mix their input themselves, after their first batch normalisation,
            as PANNs (github.com/qiuqiangkong/audioset_tagging_cnn, pytorch/models.py). The batch then holds
            `drop_frames`, `drop_bands` and `mixup_weights` for the model. Mixup makes one clip of the two clips 0 and
            1, of 2 and 3, and so on: a batch of 64 clips has 32 rows of labels.
        mixup_alpha: Mixup (Zhang et al. 2018, arXiv:1710.09412) draws weights from Beta(alpha, alpha). 0 turns it off.
        mixup_probability: Share of clips that are mixed with another clip of the batch.
        noise: Highest level of the noise. The noise of a clip is uniform from 0 to a level, which is drawn from 0 to
            `noise`. It also covers padding and masks. AST's authors train Speech Commands with 0.1.
    """

    max_length: int
    num_labels: int | None = None
    padding_value: float = 0.0
    random_crop: bool = True
    time_roll: int = 0
    roll_padded: bool = False
    filter_gain: float = 0.0
    frequency_shift: int = 0
    time_mask: int = 0
    time_masks: int = 1
    frequency_mask: int = 0
    frequency_masks: int = 1
    mask_value: Literal["mean", "padding"] = "mean"
    augment_after_norm: bool = False
    mixup_alpha: float = 0.0
    mixup_probability: float = 1.0
    noise: float = 0.0

    def __post_init__(self):
        if self.mixup_alpha and self.num_labels is None:
            raise ValueError("num_labels must be set with mixup_alpha, because mixup makes soft labels")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            examples: Examples with `input_values` (frames, mel bands), and optionally `labels` (int, or (num_labels,)
                for clips of several classes) and `draw`.

        Returns:
            `input_values` (batch, max_length, mel bands), float32, and, if the examples have labels, `labels`: (batch,)
            int64, or (batch, num_labels) float32 for vectors of labels or with mixup. With `augment_after_norm` also
            the entries that `_after_norm` returns.
        """
        examples = self._in_pairs(examples)
        clips = [torch.as_tensor(example["input_values"]) for example in examples]
        draws = self._draw(examples) if "draw" in examples[0] else None
        batch = {"input_values": self._fit(clips, draws)}
        if "labels" in examples[0]:
            batch["labels"] = _labels(examples)
        if draws is None:
            return batch
        if self.mixup_alpha and not self.augment_after_norm:
            batch = self._mixup(batch, draws)
        values = batch["input_values"]
        frames, bands = self._masks(draws, values.shape[1], values.shape[2])
        if self.augment_after_norm:
            batch |= self._after_norm(batch, draws, frames, bands)
        else:
            values.masked_fill_(frames[:, :, None] | bands[:, None, :], self.mask_level)
        if self.noise:
            generators = (np.random.default_rng((*example["draw"], 1)) for example in examples)
            white = np.stack([generator.random(values.shape[1:], np.float32) for generator in generators])
            values += (self.noise * draws[:, -1]).float()[:, None, None] * torch.from_numpy(white)
        if self.roll_padded:
            roll = _below(draws[:, ROLL], 2 * self.time_roll) - self.time_roll
            frame = (torch.arange(self.max_length) - roll[:, None]) % self.max_length
            batch["input_values"] = values.take_along_dim(frame[:, :, None], dim=1)
        return batch

    @property
    def mask_level(self) -> float:
        """The value of masked frames and bands."""
        return self.padding_value if self.mask_value == "padding" else 0.0

    def _in_pairs(self, examples: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The examples, and the first one again if mixup makes one clip of two and their number is odd."""
        odd = self.augment_after_norm and self.mixup_alpha and "draw" in examples[0] and len(examples) % 2
        return [*examples, examples[0]] if odd else examples

    def _draw(self, examples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Uniform random numbers in [0, 1), (batch, decisions) float64."""
        count = MASKS + 2 * (self.time_masks + self.frequency_masks) + 1
        return torch.from_numpy(
            np.stack([np.random.default_rng(example["draw"]).random(count) for example in examples])
        )

    def _fit(self, clips: list[torch.Tensor], draws: torch.Tensor | None) -> torch.Tensor:
        """Roll, pad or crop to (batch, max_length, bands), then filter and shift."""
        batch, inside = self._place(clips, draws, self.max_length, 0 if self.roll_padded else self.time_roll)
        if draws is not None and self.filter_gain:
            points = self.filter_gain * (2 * draws[:, None, FILTER] - 1)
            batch += nn.functional.interpolate(points, batch.shape[2], mode="linear", align_corners=True).float()
        if draws is not None and self.frequency_shift:
            shift = _below(draws[:, SHIFT], 2 * self.frequency_shift + 1) - self.frequency_shift
            bands = torch.arange(batch.shape[2])
            batch = batch.take_along_dim((bands + shift[:, None]).clamp(0, len(bands) - 1)[:, None, :], dim=2)
        return batch.masked_fill_(~inside[:, :, None], self.padding_value)

    def _place(
        self, clips: list[torch.Tensor], draws: torch.Tensor | None, max_length: int, time_roll: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather windows (batch, max_length, …), float32, of all clips; and (batch, max_length), True inside a clip."""
        lengths = torch.tensor([len(clip) for clip in clips])
        spare = lengths - max_length  # frames to cut, or to pad if negative
        start = torch.zeros_like(spare)
        roll = torch.zeros_like(spare)
        if draws is not None:
            if self.random_crop:
                # The frame of the clip with which the window starts: 0..spare, or spare..0 for a short clip.
                start = torch.where(spare < 0, -_below(draws[:, PLACE], 1 - spare), _below(draws[:, PLACE], spare + 1))
            roll = _below(draws[:, ROLL], 2 * time_roll + 1) - time_roll
        frame = start[:, None] + torch.arange(max_length)
        inside = (frame >= 0) & (frame < lengths[:, None])
        first = torch.cumsum(lengths, 0) - lengths
        source = first[:, None] + (frame - roll[:, None]) % lengths[:, None]
        return torch.cat(clips)[source].float(), inside

    def _mixup(self, batch: dict[str, torch.Tensor], draws: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mix each chosen clip with its neighbour in the batch. The sampler has shuffled the order."""
        weight, values = self._weights(draws), batch["input_values"]
        return {
            "input_values": _blend(values, weight.view(-1, *[1] * (values.dim() - 1))),
            "labels": _blend(self._soft(batch["labels"]), weight[:, None]),
        }

    def _after_norm(
        self, batch: dict[str, torch.Tensor], draws: torch.Tensor, frames: torch.Tensor, bands: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Masks and weights that the model applies to its input after the first batch normalisation.

        Returns:
            `drop_frames` (batch, frames) and `drop_bands` (batch, bands), bool, to be set to 0. With mixup,
            `mixup_weights` (batch / 2,), float32, the weights of the clips 0, 2, …, and `labels` (batch / 2,
            num_labels), mixed by them.
        """
        masks = {"drop_frames": frames, "drop_bands": bands}
        if not self.mixup_alpha:
            return masks
        weight, labels = self._weights(draws[0::2]), self._soft(batch["labels"])
        mixed = weight[:, None] * labels[0::2] + (1 - weight[:, None]) * labels[1::2]
        return masks | {"mixup_weights": weight, "labels": mixed}

    def _weights(self, draws: torch.Tensor) -> torch.Tensor:
        """Mixup's weight of each clip, (batch,), float32. It is 1 for a clip that is not mixed."""
        weight = torch.from_numpy(betaincinv(self.mixup_alpha, self.mixup_alpha, draws[:, MIX_WEIGHT].numpy()))
        return torch.where(draws[:, MIX] < self.mixup_probability, weight, 1.0).float()

    def _soft(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (batch, num_labels), float32."""
        return nn.functional.one_hot(labels, self.num_labels).float() if labels.dim() == 1 else labels

    def _masks(self, draws: torch.Tensor, frames: int, bands: int) -> tuple[torch.Tensor, torch.Tensor]:
        """SpecAugment: (batch, frames) and (batch, bands), True where masked. Width and place are drawn."""
        masks = tuple(torch.zeros(len(draws), size, dtype=torch.bool) for size in (frames, bands))
        axes = [(0, self.time_mask)] * self.time_masks + [(1, self.frequency_mask)] * self.frequency_masks
        for number, (axis, longest) in enumerate(axes):
            if longest == 0:
                continue
            size = masks[axis].shape[1]
            width = _below(draws[:, MASKS + 2 * number], min(longest, size) + 1)
            start = _below(draws[:, MASKS + 2 * number + 1], size - width + 1)
            place = torch.arange(size)
            masks[axis].logical_or_((place >= start[:, None]) & (place < (start + width)[:, None]))
        return masks


@dataclass
class WaveformCollator(SpectrogramCollator):
    """The collator for waveforms (samples,), of which the model computes the spectrogram.

    Lengths, rolls and masks count in frames of that spectrogram, as in SpectrogramCollator. The model gets the masks
    and applies them. A filter, a shift of mel bands and a roll of the padded window are errors.

    Attributes:
        padding_value: Value of padded frames of the spectrogram, for `mask_value`. Waveforms are padded with 0.
        window_length, hop_length: Samples of a frame, and from one frame to the next. A window of 0 means that frames
            are centred on every hop.
        num_mel_bins: Number of mel bands of the spectrogram.
        gain: Largest change of the loudness in decibels, up or down.
        noise: Highest level of white Gaussian noise, as a share of the clip's RMS: 0.1 is 20 dB below it.
    """

    window_length: int = 400
    hop_length: int = 160
    num_mel_bins: int = 128
    gain: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.filter_gain or self.frequency_shift or self.roll_padded:
            raise ValueError("filter_gain, frequency_shift, roll_padded: need spectrograms, and these are waveforms")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            examples: Examples with `input_values` (samples,), and optionally `labels` and `draw` as for
                SpectrogramCollator.

        Returns:
            `input_values` (batch, samples), float32, and `attention_mask`, int64. Both are 0 in the padding. `labels`
            are those of SpectrogramCollator. With a `draw` and masks: `masked_frames` (batch, max_length) and
            `masked_bands` (batch, num_mel_bins), bool, and their `mask_value`, float. With `augment_after_norm`, the
            entries that `_after_norm` returns replace these three.
        """
        examples = self._in_pairs(examples)
        clips = [torch.as_tensor(example["input_values"]) for example in examples]
        draws = self._draw(examples) if "draw" in examples[0] else None
        samples = (self.max_length - 1) * self.hop_length + self.window_length
        values, inside = self._place(clips, draws, samples, self.time_roll * self.hop_length)
        values.masked_fill_(~inside, 0.0)
        batch = {"input_values": values}
        if "labels" in examples[0]:
            batch["labels"] = _labels(examples)
        if draws is None:
            return batch | {"attention_mask": inside.long()}
        if self.gain:
            decibels = self.gain * (2 * draws[:, GAIN, None] - 1)
            values *= (10 ** (decibels / 20)).float()
        if self.noise:
            rms = (values.square().sum(1) / inside.sum(1)).sqrt()
            keys = [(*example["draw"], 1) for example in examples]
            white = np.stack([np.random.default_rng(key).standard_normal(samples, np.float32) for key in keys])
            values += (self.noise * draws[:, NOISE] * rms).float()[:, None] * torch.from_numpy(white) * inside
        frames, bands = self._masks(draws, self.max_length, self.num_mel_bins)
        if self.augment_after_norm:
            return batch | self._after_norm(batch, draws, frames, bands) | {"attention_mask": inside.long()}
        if self.mixup_alpha:
            batch = self._mixup(batch, draws)
            inside = inside | inside.roll(1, 0) & (draws[:, MIX] < self.mixup_probability)[:, None]
        if self.time_mask or self.frequency_mask:
            batch |= {"masked_frames": frames, "masked_bands": bands, "mask_value": self.mask_level}
        return batch | {"attention_mask": inside.long()}


@dataclass
class ExtractorCollator(WaveformCollator):
    """Batches for a pretrained encoder with a feature extractor of its own, such as wav2vec 2.0 or Whisper.

    Clips are cropped, rolled, mixed and changed in loudness as waveforms. Then the extractor makes the inputs of the
    model, as `pipeline` does. Masks are errors: such models mask their hidden states themselves (`mask_time_prob`).

    Attributes:
        extractor: The feature extractor of the pretrained model.
    """

    extractor: SequenceFeatureExtractor = field(kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.time_mask or self.frequency_mask:
            raise ValueError("time_mask, frequency_mask: need spectrograms, and the model makes its own")
        # Whisper's extractor pads to 30 s and those of wav2vec 2.0 not at all, if nothing else is asked of them.
        self._padding = inspect.signature(type(self.extractor).__call__).parameters["padding"].default or True

    @property
    def pads_to_longest(self) -> bool:
        """Whether what a clip is padded to, and with some models its logits, depend on the other clips of its batch."""
        return self._padding != "max_length"

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            examples: As WaveformCollator's.

        Returns:
            What the extractor gives, float32, and `labels` as SpectrogramCollator's.
        """
        batch = super().__call__(examples)
        inside = batch.pop("attention_mask").bool()
        clips = [values[here].numpy() for values, here in zip(batch.pop("input_values"), inside, strict=True)]
        rate = self.extractor.sampling_rate
        return {**self.extractor(clips, sampling_rate=rate, padding=self._padding, return_tensors="pt"), **batch}


def _row(key: int | tuple[int, int]) -> int:
    return key[0] if isinstance(key, tuple) else key


def _labels(examples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    labels = torch.from_numpy(np.array([example["labels"] for example in examples]))
    return labels.long() if labels.dim() == 1 else labels.float()


def _below(uniform: torch.Tensor, bound: torch.Tensor | int) -> torch.Tensor:
    """Turn uniform numbers in [0, 1) into whole numbers 0 .. bound - 1."""
    return (uniform * bound).long()


def _blend(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * values + (1 - weight) * values.roll(1, 0)
