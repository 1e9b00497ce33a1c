"""The dataclasses that a recipe fills, and how YAML and the command line become one resolved configuration.

A recipe is a flat YAML file with the fields of `TrainingArguments` and of this project. `inherits: other.yaml` starts
from another recipe. Values from YAML and from the command line pass through the same parser, so both get the same types
and the same errors.

Each numeric field has a range in interval notation: in its metadata, or in `RANGES_OF_TRAINING_ARGUMENTS`. `RULES`
lists the values that a field may have because of another field. `check_values` is the only place that compares values
with ranges, and `check_rules` the only one that compares them with the rules.
"""

import argparse
import copy
import dataclasses
import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import distributed
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SchedulerType

from audio_dendrites.errors import UserError
from audio_dendrites.files import ROOT, written_whole

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
CACHES = ("features", "waveforms", "none")
SCORES = ("accuracy", "macro_f1", "mAP")  # of an evaluation; multi-label clips have mAP alone
SIZES = ("intermediate_size", "width")  # fields of `model_config` that `match_parameters` sets
WAYS_TO_DIVIDE = {
    "folds": ("fold_column", "train_folds", "validation_folds", "test_folds"),
    "own splits": ("train_split", "validation_split", "test_split"),
    "random shares": ("split_shares", "split_seed"),
    "lists of clips": ("validation_list", "test_list"),
}
DEFAULT_FOLDS = {"train_folds": list("12345678"), "validation_folds": ["9"], "test_folds": ["10"]}

# Augmentation that an input does not have. The inputs are log-mel spectrograms, waveforms for a model that computes its
# spectrogram, and clips for a model that has a feature extractor of its own.
ALIEN_AUGMENTATION = {
    "spectrograms": ("gain",),
    "waveforms": ("filter_gain", "frequency_shift", "roll_padded"),
    "clips": (
        "filter_gain", "frequency_shift", "roll_padded", "time_mask", "frequency_mask", "augment_after_norm",
    ),
}  # fmt: skip

SEEDS = "[0, 4294967295]"  # NumPy's
RANGES_OF_TRAINING_ARGUMENTS = {
    "(0, inf)": "adam_epsilon eval_steps num_train_epochs save_steps",
    "[0, inf)": "dataloader_num_workers eval_delay learning_rate local_rank max_grad_norm neftune_noise_alpha "
    "warmup_steps weight_decay",
    "[1, inf)": "dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout eval_accumulation_steps "
    "gradient_accumulation_steps max_steps per_device_eval_batch_size per_device_train_batch_size "
    "torch_empty_cache_steps",
    "[0, 1)": "adam_beta1 adam_beta2 label_smoothing_factor",
    SEEDS: "data_seed seed",
}
INHERITED = {name: interval for interval, names in RANGES_OF_TRAINING_ARGUMENTS.items() for name in names.split()}

ANY = "any value but null and false"
NEVER = ()  # the two fields must not be set together
RULES = (  # a field, the values that it may have, the field and its value that make this a rule, and the reason
    ("dataset_config", NEVER, "dataset_dir", ANY, "remove one of them"),
    ("dataset_split", NEVER, "train_split", ANY, "remove it"),
    ("match_parameters", NEVER, "model", ANY, "pretrained weights have a size of their own"),
    ("match_parameters", NEVER, "pai", ANY, "it sizes a model without dendrites"),
    ("lora", NEVER, "pai", ANY, "dendrites cannot grow on layers that LoRA changes"),
    ("lora", NEVER, "unfreeze_last_layers", ANY, "LoRA freezes all layers but the head"),
    ("ema_decay", NEVER, "pai", ANY, "a moving average cannot follow a model that grows; use average_checkpoints"),
    ("ema_decay", NEVER, "average_checkpoints", ANY, "both average the weights"),
    ("baseline", (False,), "pai", None, "without dendrites there is nothing to compare"),
    ("label_smoothing_factor", (0,), "loss", "bce", "it smooths the labels of the cross-entropy"),
    ("fp16", (False,), "bf16", True, "set one of them, or set precision instead"),
    ("train_sampling_strategy", ("random",), "balanced_sampling", True, "both choose the order of the clips"),
    ("class_weights", (None,), "balanced_sampling", True, "both make up for rare classes"),
    ("lr_scheduler_type", ("constant_with_warmup",), "lr_step_decay", ANY, "both change the learning rate"),
    ("eval_strategy", ("steps", "epoch"), "early_stopping_patience", ANY, "evaluations decide when to stop"),
    (
        "save_strategy",
        ("steps", "epoch", "best"),
        "average_checkpoints",
        ANY,
        "it averages the checkpoints that are saved",
    ),
    ("dataloader_persistent_workers", (False,), "dataloader_num_workers", 0, "there are no workers"),
    ("streaming", (False,), "train_split", None, "set train_split, validation_split and test_split"),
    ("streaming", (False,), "max_steps", -1, "set max_steps, because the number of clips is unknown"),
    ("streaming", (False,), "mean", "auto", "the training clips are not read before the training"),
    ("streaming", (False,), "std", "auto", "the training clips are not read before the training"),
    ("balanced_sampling", (False,), "streaming", True, "a stream has an order of its own"),
    ("class_weights", (None,), "streaming", True, "the number of clips of a class is unknown"),
    ("drop_leaks", (False,), "streaming", True, "the training clips are not read before the training"),
    ("drop_labels", (None,), "streaming", True, "the training clips are not read before the training"),
    ("label_separator", (None,), "streaming", True, "a stream has lists of labels"),
    ("audio_path", (None,), "streaming", True, "a stream has the sounds in its shards"),
    ("lr_step_decay", (None,), "streaming", True, "the number of steps of an epoch is unknown"),
    ("eval_strategy", ("steps", "no"), "streaming", True, "a stream has no end of an epoch"),
    ("save_strategy", ("steps", "best", "no"), "streaming", True, "a stream has no end of an epoch"),
    ("remove_unused_columns", (False,), None, None, "augmentation needs the column `draw`"),
    ("hub_strategy", ("end", "every_save", "checkpoint"), None, None, "the Hub gets one checkpoint at most"),
)


def range_of(entry: dataclasses.Field) -> str | None:
    """The range of a numeric field in interval notation, such as "[0, 1)"; None for other fields."""
    return entry.metadata.get("range") or INHERITED.get(entry.name)


def check_values(part: Any) -> None:
    """Check the ranges of the numbers of a dataclass, that no text is empty, and the rules among its fields.

    None and a field's default always pass. The range of a list holds for each of its elements. NaN is in no range.

    Raises:
        UserError: A value is not allowed.
    """
    for entry in dataclasses.fields(part):
        value, interval = getattr(part, entry.name), range_of(entry)
        if value == entry.default:
            continue
        if value == "":
            raise UserError(f"{entry.name} must be at least one character, got ''; null unsets it")
        if interval is not None:
            check_range(entry.name, value, interval)
    check_rules(vars(part))


def check_range(name: str, value: Any, interval: str) -> None:
    """Check that a number, or each number of a list, lies in a range. Other values pass.

    Raises:
        UserError: A number does not.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if not (above and below):
            raise UserError(f"{name} must be in {interval}, got {value}")


def check_rules(values: dict[str, Any]) -> None:
    """Check the rules whose fields are all among the given values.

    Raises:
        UserError: A field has a value that it may not have beside another one.
    """
    for name, allowed, other, case, reason in RULES:
        if name not in values or (other is not None and other not in values):
            continue
        value, beside = values[name], values.get(other)
        applies = beside not in (None, False) if case == ANY else beside == case
        if not applies or value in (allowed or (None,)):
            continue
        if allowed == NEVER:
            raise UserError(
                f"{name} must not be set together with {other}, got {_shown(value)} and {_shown(beside)}; {reason}"
            )
        choices = " or ".join("left out" if one is None else _shown(one).strip("'") for one in allowed)
        context = "" if other is None else f" with {other}: {_shown(beside).strip(chr(39))}"
        raise UserError(f"{name} must be {choices}{context}, got {_shown(value)}; {reason}")


def _shown(value: Any) -> str:
    """A value as a recipe has it, with quotation marks around text."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(getattr(value, "value", value))


def option(default: Any, text: str, interval: str | None = None) -> Any:
    """A dataclass field with its help and, if it is numeric, its range."""
    return field(default=default, metadata={"help": text, "range": interval})


@dataclass
class DataArguments:
    """Which clips to use, and how to divide them into train, validation and test."""

    _argument_group_name = "data"

    dataset: str = option(
        "synthetic",
        "Hub id, Parquet or CSV file, folder of Parquet files or of class folders, unpacked archive of UrbanSound8K or "
        "ESC-50, or 'synthetic' for the generated data set.",
    )
    synthetic_clips: int = option(800, "Number of clips of the generated data set, a tenth per class.", "[100, inf)")
    dataset_config: str | None = option(None, "Configuration (subset) of the Hub data set, if it has several.")
    dataset_dir: str | None = option(None, "Subfolder of the repository, if it holds several data sets.")
    dataset_revision: str | None = option(None, "Commit, tag or branch of the Hub data set. Local data ignore it.")
    dataset_split: str | None = option(None, "Split whose clips folds, shares or lists divide. Default: train.")
    audio_column: str = option("audio", "Column with the sounds, or with paths of files relative to the table.")
    audio_path: str | None = option(
        None, "Path of each file, made from columns of a local table and relative to it: 'audio/fold{fold}/{name}.wav'."
    )
    label_column: str = option("label", "Column with class names or ids. Lists of them make the clips multi-label.")
    label_separator: str | None = option(None, "Text between the class names in a cell of multi-label clips.")
    clip_column: str | None = option(None, "Column with unique names of the clips. Default: paths or row numbers.")
    group_column: str | None = option(None, "Column with the source recording of a clip. Each should be in one split.")
    labels: list[str] | None = option(None, "Class names in the order of the outputs. Default: those in train, sorted.")
    drop_labels: list[str] | None = option(None, "Classes to leave out, and with them clips that have no other class.")
    fold_column: str | None = option(None, "Column with the official fold. Default: fold.")
    train_folds: list[str] | None = option(None, "Folds to train on. Default: 1 to 8.")
    validation_folds: list[str] | None = option(None, "Folds that choose the checkpoint. Default: 9.")
    test_folds: list[str] | None = option(None, "Folds to score once, at the end. Default: 10.")
    train_split: str | None = option(None, "Instead of folds: the data set's own split to train on.")
    validation_split: str | None = option(None, "Instead of folds: the own split that chooses the checkpoint.")
    test_split: str | None = option(None, "Instead of folds: the own split to score once, at the end.")
    split_shares: list[float] | None = option(
        None, "Instead of folds: random shares of train, validation and test, such as 0.8 0.1 0.1.", "(0, 1)"
    )
    split_seed: int | None = option(None, "Seed of split_shares, apart from that of the training. Default: 0.", SEEDS)
    validation_list: str | None = option(
        None, "Instead of folds: file with the name of a validation clip in each line, relative to a local data set."
    )
    test_list: str | None = option(None, "The same for the test clips. Clips that are in neither list are trained on.")
    drop_leaks: bool = option(False, "Leave out training clips whose source recording is also in validation or test.")
    on_bad_clip: Literal["error", "skip"] = option("error", "What to do with damaged, empty or silent clips.")
    channel: Literal["mean", "first"] = option("mean", "Mix channels to their mean, or take the first one.")
    cache: Literal[CACHES] = option(
        "features",
        "What the disk keeps of each clip. features: what the model gets. waveforms: samples in float16. The loader's "
        "workers compute log-mel from them, which differs a little because of the rounding. none: a length. The "
        "loader's workers decode the clip each time. The weights are those of `features` to the bit.",
    )
    streaming: bool = option(
        False,
        "Read the training clips from the Parquet or WebDataset shards of the data set during the training. The disk "
        "keeps nothing of them. `cache` is then for the validation and test clips only.",
    )
    shuffle_buffer: int = option(
        1000,
        "Streaming: number of undecoded clips among which each loader worker draws the next one. 1,000 FLAC files of "
        "10 s are about 300 MB, and shuffling takes up to three times that. They must take less than 2 GiB.",
        "[1, 100000]",
    )
    preprocessing_num_workers: int | None = option(None, "Processes that fill the cache. Default: cores.", "[1, inf)")

    def __post_init__(self):
        check_values(self)
        self._check_labels()
        self._choose_division()
        self._check_overlap()
        self._check_columns()

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if len(self.labels) < 2:
            raise UserError(f"labels must name at least two classes, got {self.labels}; null takes all classes found")
        if twice := sorted({label for label in self.labels if self.labels.count(label) > 1}):
            raise UserError(f"labels must name each class once, got {', '.join(twice)} several times")
        if dropped := sorted({*self.labels} & {*(self.drop_labels or [])}):
            raise UserError(f"labels and drop_labels must not share a class, got {', '.join(dropped)} in both")

    def _choose_division(self) -> None:
        """Check that the fields name one way to divide the data set, and fill in what that way leaves open."""
        found = {
            way: [name for name in names if getattr(self, name) is not None] for way, names in WAYS_TO_DIVIDE.items()
        }
        found = {way: names for way, names in found.items() if names}
        if len(found) > 1:
            listed = "; ".join(f"{', '.join(names)} ({way})" for way, names in found.items())
            raise UserError(f"the recipe must divide the data set in one way only, got {listed}; unset all but one way")
        way, names = next(iter(found.items()), ("folds", []))
        missing = [name for name in WAYS_TO_DIVIDE[way] if name not in names]
        if way in ("own splits", "lists of clips") and missing:
            raise UserError(f"{missing[0]} must be set together with {names[0]}, got null")
        if way == "random shares":
            shares = self.split_shares or []
            if len(shares) != 3 or abs(sum(shares) - 1) > 1e-6:
                raise UserError(
                    "split_shares must be three numbers that sum to 1 (the shares of train, validation and test), got "
                    f"{' '.join(map(str, shares)) or 'none'}"
                )
            self.split_seed = self.split_seed or 0
        elif way == "folds":
            self.fold_column = self.fold_column or "fold"
            for name, default in DEFAULT_FOLDS.items():
                if getattr(self, name) is None:
                    setattr(self, name, default)
                if not getattr(self, name):
                    raise UserError(f"{name} must name at least one fold, got []")
        if way != "own splits":
            self.dataset_split = self.dataset_split or "train"

    def _check_overlap(self) -> None:
        way = "split" if self.train_split else "folds"
        train = self.folds["train"]
        for split in ("validation", "test"):
            held_out = self.folds[split]
            if _share_rows(train[0], held_out[0]) if self.train_split else set(train) & set(held_out):
                raise UserError(
                    f"train_{way} and {split}_{way} must not overlap, got {', '.join(train)} and "
                    f"{', '.join(held_out)}; a score of training clips is worthless"
                )

    def _check_columns(self) -> None:
        for name in ("clip_column", "group_column"):
            if getattr(self, name) == self.audio_column:
                setattr(self, name, None)  # without a column, the path of the sound is used
        for one, others in (("label", ("audio", "fold", "clip", "group")), ("fold", ("audio", "clip"))):
            column = getattr(self, f"{one}_column")
            for other in others:
                if column is not None and column == getattr(self, f"{other}_column"):
                    raise UserError(f"{one}_column and {other}_column must be two columns, got {column!r} for both")

    @property
    def folds(self) -> dict[str, list[str]]:
        """The values in the index's column `fold` that make up `train`, `validation` and `test`."""
        if self.train_split:
            return {split: [getattr(self, f"{split}_split")] for split in SPLITS}
        if self.split_shares or self.test_list:
            return {split: [split] for split in SPLITS}
        return {split: getattr(self, f"{split}_folds") for split in SPLITS}


def _share_rows(one: str, other: str) -> bool:
    """Whether two splits of a data set overlap, such as train and train[90%:]. Each split may have any length."""

    from datasets import ReadInstruction  # here, because the import takes a second that --help need not wait

    def parts(split: str) -> list[tuple[str, int, int]]:
        lengths = dict.fromkeys(re.findall(r"(?:^|\+)\s*([\w.]+)", split), 10**9)
        try:
            return [
                (part.splitname, part.from_, part.to) for part in ReadInstruction.from_spec(split).to_absolute(lengths)
            ]
        except ValueError:  # the name of a folder
            return [(split, 0, 10**9)]

    return any(
        name == other_name and start < other_end and other_start < end
        for name, start, end in parts(one)
        for other_name, other_start, other_end in parts(other)
    )


@dataclass
class FeatureArguments:
    """Settings of the feature extractor. The default of each is the pretrained model's, or ASTFeatureExtractor's."""

    _argument_group_name = "features"

    sampling_rate: int | None = option(None, "Sampling rate in Hz to which clips are resampled.", "[1000, inf)")
    num_mel_bins: int | None = option(None, "Number of mel bands.", "[4, inf)")
    max_length: int | None = option(None, "Frames of 10 ms that the model sees: 400 for 4 s.", "[1, inf)")
    # HfArgumentParser parses a union with `str` as text. __post_init__ makes it a number.
    mean: float | str | None = option(None, "Mean of the log-mel, or auto: that of the training clips.", "(-inf, inf)")
    std: float | str | None = option(None, "Their standard deviation, or auto: that of the training clips.", "(0, inf)")
    convention: Literal["kaldi", "povey", "librosa"] | None = option(
        None,
        "Log-mel of a model with `waveform`. kaldi: that of ASTFeatureExtractor. povey: that of BEATs, which differs "
        "in its windows and its floor. librosa: that of PANNs, with frames of 32 ms, mel filters from 50 Hz to 14 kHz, "
        "decibels, and no normalisation (mean 0, std 0.5). Default: that of the pretrained model, or kaldi.",
    )

    def __post_init__(self):
        for name in ("mean", "std"):
            value = getattr(self, name)
            try:
                setattr(self, name, value if value in (None, "auto") else float(value))
            except ValueError as error:
                raise UserError(f"{name} must be a number or auto, got {value!r}") from error
        check_values(self)

    @property
    def needs_statistics(self) -> bool:
        """Whether mean or std is still auto."""
        return "auto" in (self.mean, self.std)


@dataclass
class AugmentationArguments:
    """How a collator of `data_collator` changes training batches. Evaluation batches are left as they are."""

    _argument_group_name = "augmentation"

    random_crop: bool = option(True, "Take a random window of longer clips, and put shorter clips at a random place.")
    time_roll: int = option(0, "Roll each clip by a random number of frames up to this, either way.", "[0, inf)")
    roll_padded: bool = option(
        False, "Spectrograms: time_roll rolls the padded window with its masks and noise, as AST's authors do."
    )
    filter_gain: float = option(
        0.0,
        "Largest gain of a random filter in normalised units. 10 dB are ln(10) / (2 * std), about 0.25.",
        "[0, inf)",
    )
    frequency_shift: int = option(0, "Shift by a random number of mel bands up to this, up or down.", "[0, inf)")
    time_mask: int = option(0, "SpecAugment: longest time mask in frames. 0 turns it off.", "[0, inf)")
    time_masks: int = option(1, "SpecAugment: number of time masks in each clip.", "[0, inf)")
    frequency_mask: int = option(0, "SpecAugment: widest frequency mask in mel bands. 0 turns it off.", "[0, inf)")
    frequency_masks: int = option(1, "SpecAugment: number of frequency masks in each clip.", "[0, inf)")
    mask_value: Literal["mean", "padding"] = option(
        "mean", "SpecAugment: value of the masks, the mean or that of the padding. AST's authors use the padding."
    )
    augment_after_norm: bool = option(
        False,
        "CNN14: mask and mix after the first batch normalisation. Mixup makes one clip of two, as PANNs' authors do.",
    )
    mixup_alpha: float = option(0.0, "Mixup draws its weights from Beta(alpha, alpha). 0 turns it off.", "[0, inf)")
    mixup_probability: float = option(1.0, "Share of the clips that mixup mixes with another clip.", "[0, 1]")
    gain: float = option(0.0, "Waveform models: largest random change of loudness in dB, up or down.", "[0, 100]")
    noise: float = option(
        0.0, "Largest level of white noise: a share of a waveform's RMS, or in the units of a spectrogram.", "[0, inf)"
    )

    def __post_init__(self):
        check_values(self)

    def settings(self, input: str) -> dict[str, Any]:
        """The collator's settings.

        Args:
            input: What the collator makes batches of: a key of `ALIEN_AUGMENTATION`.

        Raises:
            UserError: A field is set that this kind of input does not have.
        """
        alien = ALIEN_AUGMENTATION[input]
        for name in alien:
            if value := getattr(self, name):
                own = {"time_mask": "mask_time_prob", "frequency_mask": "mask_feature_prob"}.get(name)
                own = f"; model_config: {own} masks inside the model" if own and input == "clips" else ""
                raise UserError(
                    f"{name} must be {type(value)()} for this model, got {value}: its batches are made of {input}{own}"
                )
        return {name: value for name, value in vars(self).items() if name not in alien}


@dataclass
class ModelArguments:
    """Which network to train, which of its parts, and how fast each part learns."""

    _argument_group_name = "model"

    architecture: Literal["ast", "vit", "cnn14", "beats"] | None = option(
        None, "Family of the network. Default: that of `model`, or ast."
    )
    model: str | None = option(
        None,
        "Hub id or folder of a pretrained AST, DeiT, ViT, CNN14, BEATs or CLAP, or of any other model with an audio "
        "classifier in transformers: wav2vec 2.0, HuBERT, WavLM, Whisper, … Default: none.",
    )
    model_revision: str | None = option(None, "Commit, tag or branch of the Hub model.")
    model_config: dict[str, Any] | str | None = option(
        None, "Fields of the model's configuration, as JSON on the command line: '{\"time_stride\": 16}'."
    )
    waveform: bool = option(False, "The model takes waveforms and computes the spectrogram on its device.")
    trainable_filters: bool = option(False, "Train the mel filters with the rest of the model. Needs `waveform`.")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, … Default: transformers chooses.")
    unfreeze_last_layers: int | None = option(
        None, "Train only the last N layers and the head. Default: all layers.", "[0, inf)"
    )
    freeze_stem: bool = option(True, "Do not train the convolutions of wav2vec 2.0 and its relatives.")
    lora: dict[str, Any] | str | None = option(
        None,
        "LoRA or DoRA: train low-rank changes of the layers, and the head. Fields of peft.LoraConfig, as JSON on the "
        "command line: '{\"r\": 8}'. target_modules is by default all linear layers of the blocks.",
    )
    patchout_time: int = option(0, "Patchout: columns of patches to drop from each training batch.", "[0, inf)")
    patchout_frequency: int = option(0, "Patchout: rows of patches to drop from each training batch.", "[0, inf)")
    head_learning_rate: float | None = option(None, "Learning rate of the head. Default: learning_rate.", "[0, inf)")
    layer_decay: float = option(1.0, "Ratio of a layer's learning rate to that of the layer above it.", "(0, 1]")
    match_parameters: int | str | None = option(
        None,
        "Size a model with random weights to this number of parameters, or to that of a finished run folder. Sets "
        "intermediate_size of an AST, ViT or BEATs, or width of a CNN14, in model_config.",
        "[1, inf)",
    )
    weights_by_name: bool = option(
        False,
        "Draw each random weight by the seed and its name, so that models of different sizes have equal weights where "
        "names and shapes are equal. crossval.py sets this if it compares recipes.",
    )

    def __post_init__(self):
        self.match_parameters = _number_of_parameters(self.match_parameters)
        self.model_config, self.lora = _mapping("model_config", self.model_config), _mapping("lora", self.lora)
        check_values(self)


@dataclass
class DendriteArguments:
    """Whether dendrites grow. The fields of the block `pai` are those of `PAIConfig` in pai_callback.py."""

    _argument_group_name = "dendrites"

    pai: dict[str, Any] | str | None = option(
        None, "Grow dendrites: fields of PAIConfig, as JSON on the command line: '{\"max_dendrites\": 2}'."
    )
    baseline: bool = option(False, "Also train without dendrites, in <output_dir>_baseline, and compare the two runs.")

    def __post_init__(self):
        self.pai = _mapping("pai", self.pai)
        check_values(self)


@dataclass
class RunArguments(TrainingArguments):
    """`TrainingArguments` with the fields and the defaults of this project."""

    _argument_group_name = "training"

    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 if the hardware computes in it, else fp16 on CUDA, else fp32. bf16 and fp16 override it."
    )
    loss: Literal["auto", "cross_entropy", "bce"] = option(
        "auto", "auto: bce, the binary cross-entropy of each class, for multi-label clips, else cross_entropy."
    )
    distill_from: str | None = option(None, "Run folder or Hub id of a teacher. Its scores are mixed into the labels.")
    distillation: float = option(0.5, "Share of the teacher's scores in the labels.", "(0, 1]")
    window_overlap: float = option(0.5, "Share of a window that the next window of a long clip overlaps.", "[0, 1)")
    window_aggregation: Literal["mean", "max"] = option("mean", "How the logits of a clip's windows are combined.")
    balanced_sampling: bool = option(False, "Draw training clips with replacement, clips of rare classes more often.")
    class_weights: Literal["auto"] | None = option(None, "auto: weight classes by their inverse frequency.")
    total_batch_size: int | None = option(
        None,
        "Clips of an optimizer step, over all processes. A process takes at most per_device_train_batch_size at once "
        "and accumulates gradients. Default: processes × per_device_train_batch_size × gradient_accumulation_steps.",
        "[1, inf)",
    )
    lr_step_decay: float | None = option(
        None, "Factor of the learning rate after lr_step_start epochs and every lr_step_every epochs.", "(0, 1]"
    )
    lr_step_start: int = option(1, "Epochs before the first step of lr_step_decay.", "[1, inf)")
    lr_step_every: int = option(1, "Epochs between two steps of lr_step_decay.", "[1, inf)")
    early_stopping_patience: int | None = option(None, "Stop after N evaluations without improvement.", "[1, inf)")
    average_checkpoints: int | None = option(None, "End with the mean weights of the last N checkpoints.", "[2, inf)")
    ema_decay: float | None = option(None, "Evaluate, and end with, a moving average of the weights.", "(0, 1)")
    eval_strategy: Literal["no", "steps", "epoch"] = option("epoch", "When to evaluate.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = option("epoch", "When to save a checkpoint.")
    logging_steps: float = option(10, "Log every N steps. A number below 1 is a share of the training.", "(0, inf)")
    save_total_limit: int | None = option(2, "Number of checkpoints to keep. The best one is always kept.", "[1, inf)")
    load_best_model_at_end: bool = option(True, "End with the best checkpoint.")
    metric_for_best_model: str | None = option(
        "accuracy", f"Metric that chooses the checkpoint: {', '.join(SCORES)} or loss."
    )
    lr_scheduler_type: SchedulerType = option("cosine", "How the learning rate changes over the training.")
    card_note: str | None = option(None, "Text for the model card, such as the differences from a published training.")
    report_to: list[str] | None = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Experiment trackers: tensorboard, wandb, …, or none."},
    )
    # Otherwise early stopping forgets, when a run resumes, how many evaluations brought no improvement.
    restore_callback_states_from_checkpoint: bool = option(
        True, "Resume callbacks, such as early stopping, with their state."
    )
    # The collator needs a row's `draw`, which is not an argument of any model's forward.
    remove_unused_columns: bool = option(False, "Must stay false, because the collator needs all columns.")

    def __post_init__(self):
        check_values(self)
        self._check_metric()
        self._check_save_limit()
        self._check_trackers()
        for name in self._VALID_DICT_FIELDS:
            if str(getattr(self, name)).startswith("{"):
                setattr(self, name, _mapping(name, getattr(self, name)))
        if self.output_dir is not None:
            self.output_dir = str(Path(self.output_dir).expanduser())  # without a slash at the end
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else self.precision
        self.precision = resolve_precision(asked, self.use_cpu)
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        # TrainingArguments refuses bf16 without a GPU unless use_cpu is set.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self._connect_after_restart()
        try:
            super().__post_init__()
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise UserError(f"TrainingArguments: {error}") from error
        self.run_name = self.run_name or default_hub_model_id(self.output_dir)
        if self.push_to_hub and self.hub_model_id is None:
            self.hub_model_id = default_hub_model_id(self.output_dir)
        if self.total_batch_size is not None:
            self._divide_total_batch()

    def _connect_after_restart(self) -> None:
        """Connect the processes that torchrun has restarted, before transformers does.

        The store of torchrun still has the addresses of the processes that have ended
        (github.com/pytorch/pytorch/issues/135712). A prefix for each attempt hides them. On several machines, the
        attempts have no common number; see docs/clusters.md.
        """
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        if attempt == "0" or not (shares_store and on_one_machine) or distributed.is_initialized():
            return
        timeout = timedelta(seconds=self.ddp_timeout)
        store, rank, world_size = next(distributed.rendezvous("env://", timeout=timeout))
        store = distributed.PrefixStore(f"attempt {attempt}", store)
        distributed.init_process_group(self.ddp_backend, store=store, rank=rank, world_size=world_size, timeout=timeout)

    def _check_metric(self) -> None:
        if self.metric_for_best_model is None:
            return
        self.metric_for_best_model = metric = self.metric_for_best_model.removeprefix("eval_")
        if metric not in (*SCORES, "loss"):
            raise UserError(f"metric_for_best_model must be {', '.join(SCORES)} or loss, got {metric!r}")
        if self.greater_is_better not in (None, metric != "loss"):
            raise UserError(
                f"greater_is_better must be {_shown(metric != 'loss')} for metric_for_best_model: {metric}, got "
                f"{_shown(self.greater_is_better)}; leave it out"
            )

    def _check_save_limit(self) -> None:
        count, limit = self.average_checkpoints, self.save_total_limit
        if count is None or limit is None:
            return
        needed = count + (self.metric_for_best_model is not None)  # the best checkpoint may be an older one
        if limit < needed:
            raise UserError(
                f"save_total_limit must be at least {needed} with average_checkpoints: {count}, got {limit}; the run "
                f"keeps the last {count} checkpoints{' and the best one' if needed > count else ''}"
            )

    def _check_trackers(self) -> None:
        from transformers.integrations import get_available_reporting_integrations  # takes two seconds, as above

        trackers = get_available_reporting_integrations()
        asked = self.report_to if self.report_to not in (["all"], ["none"], None) else []
        if missing := [name for name in asked if name not in trackers]:
            raise UserError(
                f"report_to must be none or trackers that are installed here ({', '.join(trackers)}), got "
                f"{missing[0]!r}; install it or remove it"
            )

    def _divide_total_batch(self) -> None:
        """Set the batch of a process and the accumulation so that an optimizer step takes `total_batch_size`."""
        total, most, processes = self.total_batch_size, self.per_device_train_batch_size, self.world_size
        share, rest = divmod(total, processes)
        size = min(most, share)
        if rest or size < 1 or share % size:
            raise UserError(
                f"total_batch_size must be a multiple of the {processes} processes, and the share of each a multiple "
                f"of per_device_train_batch_size {most} if it is larger, got {total}: change one of the three"
            )
        steps = share // size
        if self.gradient_accumulation_steps not in (1, steps):
            raise UserError(
                f"gradient_accumulation_steps must be {steps} for total_batch_size {total}, {processes} processes and "
                f"per_device_train_batch_size {size}, got {self.gradient_accumulation_steps}: leave it out"
            )
        self.per_device_train_batch_size, self.gradient_accumulation_steps = size, steps

    def get_warmup_steps(self, num_training_steps: int) -> int:
        steps = super().get_warmup_steps(num_training_steps)
        if steps >= num_training_steps:
            logger.warning(
                "warmup_steps should be less than the %d steps of the training, got %d: the learning rate never "
                "reaches its full value.", num_training_steps, steps,
            )  # fmt: skip
        return steps


@dataclass
class Recipe:
    """A resolved configuration: the contents of `config.yaml` in the run folder."""

    data: DataArguments
    features: FeatureArguments
    augmentation: AugmentationArguments
    model: ModelArguments
    dendrites: DendriteArguments
    training: RunArguments
    chosen: frozenset[str] = frozenset()  # names of the fields that YAML or the command line set

    def __post_init__(self):
        parts = (self.data, self.features, self.augmentation, self.model, self.dendrites, self.training)
        check_rules({name: value for part in parts for name, value in vars(part).items()})

    def baseline(self) -> "Recipe":
        """The same recipe without dendrites, with a run folder of its own next to this one's."""
        training = copy.copy(self.training)
        training.output_dir = f"{training.output_dir}_baseline"
        training.run_name = f"{training.run_name}_baseline"
        training.resume_from_checkpoint = None  # that checkpoint has dendrites
        training.hub_model_id = training.hub_model_id and f"{training.hub_model_id}-baseline"
        return dataclasses.replace(self, dendrites=DendriteArguments(), training=training)

    def runs(self) -> list["Recipe"]:
        """The trainings that the recipe asks for, in their order."""
        return [self.baseline(), self] if self.dendrites.baseline else [self]

    def to_dict(self) -> dict[str, Any]:
        """All fields of this project and each chosen field of `TrainingArguments`, as plain YAML types."""
        values = {}
        for part in (self.data, self.features, self.augmentation, self.model, self.dendrites):
            values |= dataclasses.asdict(part)
        elsewhere = set(values) | {"bf16", "fp16", "hub_token"}  # `precision` stands for the first two
        for name in sorted((set(RunArguments.__annotations__) | self.chosen | {"seed", "output_dir"}) - elsewhere):
            value = getattr(self.training, name)
            values[name] = value.value if isinstance(value, Enum) else value
        values["report_to"] = values["report_to"] or ["none"]
        return {name: value for name, value in values.items() if value is not None}


def resolve_precision(asked: str, use_cpu: bool = False) -> str:
    """The precision to train in on this machine: fp32, bf16 or fp16.

    Args:
        asked: auto, fp32, bf16 or fp16.
        use_cpu: Whether to train on the CPU even if there is a GPU.

    Raises:
        UserError: The hardware does not have this precision.
    """
    cuda = torch.cuda.is_available() and not use_cpu
    if cuda:
        hardware, fast_bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # any CPU runs bf16 autocast, but it is faster than fp32 only with these instructions
        hardware = "a CPU"
        fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if asked == "auto":
        return "bf16" if fast_bf16 else "fp16" if cuda else "fp32"
    allowed = ["bf16"] * (fast_bf16 or not cuda) + ["fp16"] * cuda + ["fp32"]
    if asked not in allowed:
        raise UserError(
            f"precision must be {', '.join(allowed)} or auto on {hardware}, got {asked!r}; fp16 needs a CUDA GPU, and "
            f"bf16 needs an Ampere GPU or a newer one"
        )
    return asked


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The value of a field that is a block in YAML and JSON on the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{name} must be a JSON object, got {value!r} ({error})") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} must be a mapping of fields to values, got {value!r}")
    return value


def _number_of_parameters(value: int | str | None) -> int | None:
    """The value of `match_parameters` as a number. For a run folder, metrics.json has it.

    Raises:
        UserError: The value is neither a number nor a finished run folder.
    """
    if not isinstance(value, str):
        return value
    if value.isdigit():
        return int(value)
    try:
        return json.loads(Path(value, "metrics.json").read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"match_parameters must be a number of parameters or a finished run folder, got {value!r} ({error!r})"
        ) from error


PARTS = (DataArguments, FeatureArguments, AugmentationArguments, ModelArguments, DendriteArguments, RunArguments)
WORDINGS = (  # argparse's, and this project's
    (r"argument --(\w+)\S*:", r"\1:"),
    (": invalid int value: ", " must be an integer, got "),
    (": invalid float value: ", " must be a number, got "),
    (r": invalid choice: (.*) \(choose from (.*)\)", r" must be one of \2, got \1"),
    (": Truthy value expected: got (.*) but .*", r" must be true or false, got '\1'"),
    (": expected one argument", " must have a value"),
)


class _RecipeParser(HfArgumentParser):
    """A parser with short errors that name the field, with ranges in the help, and with `--field null`."""

    source = "command line"

    @staticmethod
    def _parse_dataclass_field(parser: HfArgumentParser, entry: dataclasses.Field) -> None:
        entry = copy.copy(entry)
        text = {name: value for name, value in entry.metadata.items() if name != "range"}
        if interval := range_of(entry):
            text["help"] += f" Range: {interval}."
        entry.metadata = text
        HfArgumentParser._parse_dataclass_field(parser, entry)
        if parser._actions[-1].nargs == "+":
            parser._actions[-1].nargs = "*"  # a list may be empty

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        return action.default if arg_strings == ["null"] else super()._get_values(action, arg_strings)

    def error(self, message: str):
        for found, wording in WORDINGS:
            message = re.sub(found, wording, message)
        raise UserError(f"{self.source}: {message}")


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, so that `eval_strategy: no` is a word, and no key is repeated."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if first in "tTfF" or not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_recipe(argv: list[str]) -> Recipe:
    """Read a recipe and the changes that the command line makes to it.

    Args:
        argv: `[recipe] [--field value ...]`, as `sys.argv[1:]`. The recipe is a file, or the name of one in configs/
            without its suffix, such as urbansound8k/ast. The value null unsets a field.

    Raises:
        UserError: A file is missing, a field is unknown, or a value is not allowed.
    """
    parser = _RecipeParser(
        PARTS,
        usage="accelerate launch train.py [recipe] [--field value ...]",
        description="Fine-tune an audio classifier. A recipe is a YAML file with any of the fields below.",
        allow_abbrev=False,
    )
    path = find_recipe(argv[0]) if argv and not argv[0].startswith("-") else None
    parser.set_defaults(output_dir=default_output_dir(path))
    recipe = read_yaml(path) if path else {}
    tokens = list(_as_tokens(recipe, parser, path))
    parser.source = path or parser.source
    parser.parse_args(tokens)  # so that errors in the file name the file
    parser.source = _RecipeParser.source
    overrides = argv[bool(path) :]
    *parts, unknown = parser.parse_args_into_dataclasses(
        [*tokens, *overrides], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UserError(f"command line: unknown field {unknown[0]!r}{_nearest(unknown[0].lstrip('-'), parser)}")
    named = {re.sub("^--(no[_-])?", "", word.split("=")[0]).replace("-", "_") for word in overrides}
    known = {name.name for part in PARTS for name in dataclasses.fields(part)}
    return Recipe(*parts, chosen=frozenset((named | set(recipe)) & known))


def find_recipe(name: str) -> Path:
    """The file of a recipe: the file `name` if it exists, else `configs/<name>.yaml` of this project if that exists."""
    own = ROOT / "configs" / f"{name}.yaml"
    return own if own.is_file() and not Path(name).is_file() else Path(name)


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a recipe and of the recipes that it inherits from.

    Nested mappings are merged with the inherited ones. A field or a key that is set to null is removed.

    Args:
        path: The recipe.
        heirs: The recipes that inherit from it, the first one first.

    Raises:
        UserError: The file is missing, is not YAML, is not a mapping, or inherits from itself.
    """
    chain = (*heirs, path)
    if path.resolve() in [heir.resolve() for heir in heirs]:
        raise UserError(f"inherits must not lead in a circle, got {' → '.join(map(str, chain))}")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}; the recipes are in {ROOT / 'configs'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path} must consist of lines `field: value`, got {type(recipe).__name__}")
    base = recipe.pop("inherits", None)
    if not isinstance(base, str | None):
        raise UserError(f"{path}: inherits must be the path of one recipe, got {base!r}")
    return _merged(read_yaml(path.parent / base, chain) if base else {}, recipe)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the changes: mappings are merged key by key, and null removes a key."""
    merged = dict(base)
    for key, value in changes.items():
        inherited = base.get(key) if isinstance(base.get(key), dict) else {}
        merged[key] = _merged(inherited, value) if isinstance(value, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


def default_output_dir(path: Path | None) -> str:
    """The run folder of a recipe: runs/urbansound8k/ast for configs/urbansound8k/ast.yaml."""
    if path is None:
        return "runs/default"
    parts = path.with_suffix("").parts
    below = parts[len(parts) - 1 - parts[::-1].index("configs") + 1 :] if "configs" in parts else parts[-1:]
    return str(Path("runs", *below))


def default_hub_model_id(output_dir: str) -> str:
    """The name of a run for the Hub and for trackers: urbansound8k-ast for runs/urbansound8k/ast."""
    parts = Path(output_dir).parts
    name = "-".join(parts[parts.index("runs") + 1 :] if "runs" in parts[:-1] else parts[-1:])
    return re.sub(r"[^\w.]+", "-", re.sub(r"\.{2,}", ".", name)).strip("-.")


def write_yaml(recipe: Recipe, path: Path) -> None:
    """Save the resolved recipe. `train.py <path>` is then the same run."""
    with written_whole(path) as beside:
        beside.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _as_tokens(recipe: dict[str, Any], parser: HfArgumentParser, path: Path | None) -> Iterator[str]:
    """The fields of a YAML file as the words of a command line."""
    actions = {action.dest: action for action in parser._actions}
    for key, value in recipe.items():
        if key not in actions or key == "help":
            raise UserError(f"{path}: unknown field {key!r}{_nearest(str(key), parser)}")
        if not isinstance(value, list):
            yield f"--{key}={_as_word(value)}"
        elif actions[key].nargs != "*":
            raise UserError(f"{path}: {key} must be one value, got the list {value}")
        elif any(one is None or isinstance(one, list | dict) for one in value):
            raise UserError(f"{path}: {key} must be a list of plain values, got {value}")
        else:
            yield from (f"--{key}", *map(_as_word, value))


def _as_word(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | bool) else str(value)


def _nearest(key: str, parser: HfArgumentParser) -> str:
    near = difflib.get_close_matches(key, [action.dest for action in parser._actions], n=1)
    return f"; did you mean {near[0]!r}?" if near else " (train.py --help lists all fields)"
