"""The dataclasses a recipe fills, and how YAML and command line become one resolved configuration.

A recipe is a flat YAML file: `TrainingArguments` fields by their own names beside ours. `inherits: other.yaml` starts
from another recipe. Every value, from YAML or command line, passes through the same parser, so both give the same
types and the same errors.
"""

import copy
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import HubStrategy

from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole

SPLITS = ("train", "validation", "test")
LISTS = ("validation_list", "test_list")
SCORES = ("accuracy", "macro_f1", "mAP")  # of an evaluation; of multi-label clips mAP alone


@dataclass
class DataArguments:
    """Which clips, and how they are divided."""

    _argument_group_name = "data"

    dataset: str = field(
        default="synthetic",
        metadata={
            "help": "Hub id, Parquet or CSV file, folder of Parquet files or of class folders, or 'synthetic' "
            "(generated, embedded)."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of the Hub data set, where it has several."}
    )
    dataset_dir: str | None = field(
        default=None, metadata={"help": "Folder in the data set's, where each of several data sets has its own."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of the Hub data set; ignored for local data."}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split that holds all clips to be divided; left out: train."}
    )
    audio_column: str = field(
        default="audio", metadata={"help": "Column with the audio (bytes), or with paths relative to the file."}
    )
    label_column: str = field(
        default="label", metadata={"help": "Column with class names or ids; with lists of them, clips are multi-label."}
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "What stands between the class names of a multi-label clip, where no lists do."}
    )
    clip_column: str | None = field(
        default=None,
        metadata={"help": "Column that names a clip; left out: its path where there is one, or row number."},
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column with the source recording; one that stands in two splits is a leak."},
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "Class names in the model's order; default: all found, sorted."}
    )
    drop_labels: list[str] | None = field(
        default=None, metadata={"help": "Classes to leave out, with their clips; of a clip of several, just the label."}
    )
    fold_column: str | None = field(default=None, metadata={"help": "Column with the official fold; left out: fold."})
    train_folds: list[str] | None = field(default=None, metadata={"help": "Folds to train on; left out: 1 to 8."})
    validation_folds: list[str] | None = field(
        default=None, metadata={"help": "Folds that choose the checkpoint; left out: 9."}
    )
    test_folds: list[str] | None = field(
        default=None, metadata={"help": "Folds scored once, at the end; left out: 10."}
    )
    train_split: str | None = field(
        default=None, metadata={"help": "In place of folds: the data set's own split to train on."}
    )
    validation_split: str | None = field(default=None, metadata={"help": "Its split that chooses the checkpoint."})
    test_split: str | None = field(default=None, metadata={"help": "Its split scored once, at the end."})
    split_shares: list[float] | None = field(
        default=None,
        metadata={
            "help": "In place of folds: shares of train, validation and test, as 0.8 0.1 0.1; whole source recordings "
            "are drawn, stratified by class."
        },
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "With split_shares: its seed, apart from that of the training; left out: 0."}
    )
    validation_list: str | None = field(
        default=None,
        metadata={
            "help": "In place of folds: text file with the name of a validation clip a line; its path is relative to "
            "the folder of a local data set."
        },
    )
    test_list: str | None = field(
        default=None, metadata={"help": "The same of the test clips; those in neither list are trained on."}
    )
    drop_leaks: bool = field(
        default=False,
        metadata={"help": "Drop training clips whose source recording also stands in validation or test."},
    )
    on_bad_clip: Literal["error", "skip"] = field(
        default="error", metadata={"help": "What to do with damaged, empty, silent or NaN-bearing clips."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that compute features; default: one a core."}
    )

    def __post_init__(self):
        if self.label_separator == "":
            raise UserError("label_separator: found '', wanted a character or more, or none")
        if self.dataset_dir and self.dataset_config:
            raise UserError(f"dataset_config: found {self.dataset_config} beside dataset_dir, wanted one of them")
        ways = {
            way: [name for name in names if getattr(self, name) is not None]
            for way, names in (
                ("folds", ("fold_column", *(f"{split}_folds" for split in SPLITS))),
                ("splits of its own", tuple(f"{split}_split" for split in SPLITS)),
                ("drawn shares", ("split_shares", "split_seed")),
                ("lists of clips", LISTS),
            )
        }
        if len(found := {way: names for way, names in ways.items() if names}) > 1:
            told = "; ".join(f"{', '.join(names)} ({way})" for way, names in found.items())
            raise UserError(f"found {told}: wanted one way to divide the data set")
        if ways["splits of its own"]:
            self._check_own_splits()
        elif ways["drawn shares"]:
            self._check_shares()
            self.split_seed = self.split_seed or 0
        elif lists := ways["lists of clips"]:
            if missing := [name for name in LISTS if name not in lists]:
                raise UserError(f"{missing[0]}: found none beside {lists[0]}, wanted a file with names of clips")
        else:
            self.fold_column = self.fold_column or "fold"
            self.train_folds = self.train_folds or [str(fold) for fold in range(1, 9)]
            self.validation_folds = self.validation_folds or ["9"]
            self.test_folds = self.test_folds or ["10"]
        if not self.train_split:
            self.dataset_split = self.dataset_split or "train"
        self._check_overlap()

    def _check_own_splits(self) -> None:
        for split in SPLITS:
            if getattr(self, f"{split}_split") is None:
                raise UserError(f"{split}_split: found none, wanted the name of a split, as for the other two")
        if self.dataset_split is not None:
            raise UserError(f"dataset_split: found {self.dataset_split} beside train_split, wanted one of them")

    def _check_shares(self) -> None:
        shares = self.split_shares or []
        if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(
                f"split_shares: found {' '.join(map(str, shares)) or 'none'}, wanted three numbers above 0 that sum "
                "to 1: the shares of train, validation and test"
            )

    def _check_overlap(self) -> None:
        way = "split" if self.train_split else "folds"
        for split in ("validation", "test"):
            if both := sorted(set(self.folds["train"]) & set(self.folds[split])):
                raise UserError(
                    f"fold {', '.join(both)} stands in train_{way} and in {split}_{way}: the score would be worthless"
                )

    @property
    def folds(self) -> dict[str, list[str]]:
        """What the clips of `train`, `validation` and `test` have in the index's column `fold`."""
        if self.train_split:
            return {split: [getattr(self, f"{split}_split")] for split in SPLITS}
        if self.split_shares or self.test_list:
            return {split: [split] for split in SPLITS}
        return {split: getattr(self, f"{split}_folds") for split in SPLITS}


@dataclass
class FeatureArguments:
    """ASTFeatureExtractor's settings; those left out come from the pretrained model, or its defaults."""

    _argument_group_name = "features"

    sampling_rate: int | None = field(default=None, metadata={"help": "Rate in Hz to resample to."})
    num_mel_bins: int | None = field(default=None, metadata={"help": "Mel bands."})
    max_length: int | None = field(
        default=None, metadata={"help": "Frames of 10 ms the model sees: 400 for 4 s, 1024 for 10.24 s."}
    )
    mean: float | None = field(default=None, metadata={"help": "Log-mel mean, of training folds only."})
    std: float | None = field(default=None, metadata={"help": "Log-mel standard deviation, of training folds only."})


@dataclass
class AugmentationArguments:
    """What a collator of `data_collator` does to a training batch; evaluation gets none of it."""

    _argument_group_name = "augmentation"

    random_crop: bool = field(
        default=True, metadata={"help": "Random window of longer clips, random place of shorter."}
    )
    time_roll: int = field(default=0, metadata={"help": "Roll each clip by up to so many frames, either way."})
    filter_gain: float = field(
        default=0.0,
        metadata={"help": "Random filter of up to so much gain, normalised; 10 dB are ln(10) / (2 * std), about 0.25."},
    )
    frequency_shift: int = field(default=0, metadata={"help": "Up or down by up to so many mel bands."})
    time_mask: int = field(default=0, metadata={"help": "SpecAugment: longest time mask in frames; 0: none."})
    time_masks: int = field(default=1, metadata={"help": "SpecAugment: time masks a clip."})
    frequency_mask: int = field(default=0, metadata={"help": "SpecAugment: widest mask in mel bands; 0: none."})
    frequency_masks: int = field(default=1, metadata={"help": "SpecAugment: frequency masks a clip."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Mixup weights come from Beta(alpha, alpha); 0: none."})
    mixup_probability: float = field(default=1.0, metadata={"help": "Share of clips that are mixed with another."})
    gain: float = field(
        default=0.0, metadata={"help": "Louder or softer by up to so many decibels; waveform models only."}
    )
    noise: float = field(
        default=0.0,
        metadata={
            "help": "White noise of up to so much: of a waveform's RMS or, on spectrograms, in the units of the "
            "model's input, where AST has 0.1."
        },
    )

    def settings(self, waveform: bool) -> dict[str, Any]:
        """The collator's settings.

        Raises:
            UserError: One is asked for that only the other kind of input has.
        """
        alien = ("filter_gain", "frequency_shift") if waveform else ("gain",)
        for name in alien:
            if value := getattr(self, name):
                raise UserError(
                    f"{name}: found {value}, wanted none with waveform: {str(waveform).lower()}; it changes "
                    f"{'spectrograms' if waveform else 'waveforms'} before the model gets them"
                )
        return {name: value for name, value in vars(self).items() if name not in alien}


@dataclass
class ModelArguments:
    """Which network, what of it is trained, and how fast."""

    _argument_group_name = "model"

    architecture: Literal["ast", "vit", "cnn14"] | None = field(
        default=None,
        metadata={"help": "Family of the network; left out: that of `model`, or ast. An ast also starts from a ViT."},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a pretrained AST, DeiT, ViT or CNN14; left out: random weights."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the Hub model."})
    model_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Configuration fields to set, as JSON on the command line: '{\"time_stride\": 16}'."},
    )
    waveform: bool = field(
        default=False, metadata={"help": "The model gets waveforms and computes the spectrogram on its device."}
    )
    trainable_filters: bool = field(
        default=False, metadata={"help": "With `waveform`: the mel filters are trained with the rest."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2 …; left out: the library chooses."}
    )
    unfreeze_last_layers: int | None = field(
        default=None, metadata={"help": "Train only the last N layers and the head; left out: everything."}
    )
    patchout_time: int = field(
        default=0, metadata={"help": "Patchout: in training, drop so many columns of patches from a batch."}
    )
    patchout_frequency: int = field(
        default=0, metadata={"help": "Patchout: in training, drop so many rows of patches from a batch."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the classification head; left out: learning_rate."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Each layer below the head learns at this share of the one above."}
    )

    def __post_init__(self):
        self.model_config = _mapping("model_config", self.model_config)


@dataclass
class DendriteArguments:
    """Whether dendrites grow; the fields of the block are `PAIConfig`'s, in pai_callback.py."""

    _argument_group_name = "dendrites"

    pai: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Grow dendrites: PAIConfig fields, as JSON on the command line: '{\"max_dendrites\": 2}'; "
            "left out: the plain model."
        },
    )
    baseline: bool = field(
        default=False,
        metadata={"help": "Train the recipe without dendrites first, into <output_dir>_baseline, and compare the two."},
    )

    def __post_init__(self):
        self.pai = _mapping("pai", self.pai)
        if self.baseline and self.pai is None:
            raise UserError("baseline: found true without a `pai` block, wanted dendrites to compare a baseline with")


@dataclass
class RunArguments(TrainingArguments):
    """`TrainingArguments` with `precision` and the defaults of this project."""

    _argument_group_name = "training"

    precision: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto",
        metadata={"help": "auto: bf16 where the hardware computes in it, else fp16 on CUDA, else fp32. "
                  "The flags bf16 and fp16 overrule it."},
    )  # fmt: skip
    loss: Literal["auto", "cross_entropy", "bce"] = field(
        default="auto",
        metadata={
            "help": "bce: binary cross-entropy, each class against the rest; auto: cross_entropy, or bce for clips of "
            "several classes."
        },
    )
    distill_from: str | None = field(
        default=None,
        metadata={"help": "Finished run folder or Hub id of a teacher, whose scores are mixed into the labels."},
    )
    distillation: float = field(default=0.5, metadata={"help": "With `distill_from`: share of the teacher's scores."})
    window_overlap: float = field(
        default=0.5,
        metadata={"help": "Clips longer than max_length are scored by windows; share of one that the next repeats."},
    )
    window_aggregation: Literal["mean", "max"] = field(
        default="mean", metadata={"help": "What the windows' logits become those of their clip by."}
    )
    balanced_sampling: bool = field(
        default=False, metadata={"help": "Draw training clips with replacement, those of rare classes more often."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better one; left out: never."},
    )
    average_checkpoints: int | None = field(
        default=None,
        metadata={"help": "End with the mean weights of the last N checkpoints, not with the best one's."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate, and end with, a moving average of the weights: 0.999 looks back 1,000 steps."},
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "no, steps, epoch or best."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; under 1: a share."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "Validation metric that chooses the checkpoint."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Any scheduler of transformers."})
    report_to: list[str] | None = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "tensorboard, wandb, …, none."}
    )
    # Without it early stopping forgets, on a resume, how long there was no better evaluation.
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Restore the early stopping's patience on a resume."}
    )
    # The collator needs the row's `draw`, which no model's forward names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave off: the collator needs all columns."})

    def __post_init__(self):
        if not 0 <= self.window_overlap < 1:
            raise UserError(f"window_overlap: found {self.window_overlap}, wanted 0 to under 1")
        if not 0 < self.distillation <= 1:
            raise UserError(f"distillation: found {self.distillation}, wanted above 0, up to 1")
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in (*SCORES, "loss"):
            raise UserError(f"metric_for_best_model: found {metric}, wanted {', '.join(SCORES)} or loss")
        self.check_loss(self.loss)
        if self.balanced_sampling and self.train_sampling_strategy != "random":
            raise UserError(
                f"train_sampling_strategy: found {self.train_sampling_strategy} beside balanced_sampling: wanted random"
            )
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else self.precision
        self.precision = resolve_precision(asked, self.use_cpu)
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        # TrainingArguments refuses bf16 without a GPU unless it is told that the CPU is meant.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.run_name = self.run_name or default_hub_model_id(self.output_dir)
        if self.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            raise UserError("hub_strategy: found all_checkpoints, wanted end, every_save or checkpoint")
        if self.push_to_hub and self.hub_model_id is None:
            self.hub_model_id = default_hub_model_id(self.output_dir)
        self._check_averages()

    def check_loss(self, loss: str) -> None:
        """Whether the other fields fit a loss; what `auto` stands for is only known with the data.

        Raises:
            UserError: They do not.
        """
        if loss == "bce" and self.label_smoothing_factor:
            raise UserError(
                f"label_smoothing_factor: found {self.label_smoothing_factor}, wanted none with the loss bce"
            )

    def _check_averages(self) -> None:
        count, limit = self.average_checkpoints, self.save_total_limit
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay: found {self.ema_decay}, wanted a number between 0 and 1")
        if count is None:
            return
        if count < 2:
            raise UserError(f"average_checkpoints: found {count}, wanted 2 or more")
        if self.ema_decay is not None:
            raise UserError("average_checkpoints and ema_decay both average the weights: choose one of them")
        if self.save_strategy == "no":
            raise UserError("average_checkpoints: save_strategy 'no' saves none; wanted epoch or steps")
        wanted = count + (self.metric_for_best_model is not None)  # the best checkpoint may be an older one
        if limit is not None and limit < wanted:
            raise UserError(
                f"average_checkpoints: found {count}, but only {limit} checkpoints are kept; wanted save_total_limit "
                f"{wanted} or more: the last {count}{' and the best' if wanted > count else ''}"
            )


@dataclass
class Recipe:
    """A resolved configuration: what `config.yaml` in the run folder holds."""

    data: DataArguments
    features: FeatureArguments
    augmentation: AugmentationArguments
    model: ModelArguments
    dendrites: DendriteArguments
    training: RunArguments
    # Names of the fields that YAML or command line set, beside those of the project's own dataclasses.
    chosen: frozenset[str] = frozenset()

    def __post_init__(self):
        if self.training.ema_decay is not None and self.dendrites.pai is not None:
            raise UserError(
                "ema_decay: a moving average cannot follow a model that grows dendrites; average_checkpoints can"
            )

    def baseline(self) -> "Recipe":
        """The same recipe without dendrites, in a run folder beside."""
        training = copy.copy(self.training)
        training.output_dir = f"{training.output_dir}_baseline"
        training.run_name = f"{training.run_name}_baseline"
        training.resume_from_checkpoint = None  # the one named has dendrites
        training.hub_model_id = training.hub_model_id and f"{training.hub_model_id}-baseline"
        return dataclasses.replace(self, dendrites=DendriteArguments(), training=training)

    def runs(self) -> list["Recipe"]:
        """The trainings that the recipe asks for, in their order."""
        return [self.baseline(), self] if self.dendrites.baseline else [self]

    def to_dict(self) -> dict[str, Any]:
        """All fields of ours and each field of `TrainingArguments` that was chosen, as plain YAML types."""
        values = {}
        for part in (self.data, self.features, self.augmentation, self.model, self.dendrites):
            values |= dataclasses.asdict(part)
        elsewhere = set(values) | {"bf16", "fp16", "hub_token"}  # `precision` says the first two
        for name in sorted((set(RunArguments.__annotations__) | self.chosen | {"seed", "output_dir"}) - elsewhere):
            value = getattr(self.training, name)
            values[name] = value.value if isinstance(value, Enum) else value
        values["report_to"] = values["report_to"] or ["none"]
        return {name: value for name, value in values.items() if value is not None}


def resolve_precision(asked: str, use_cpu: bool = False) -> str:
    """What the hardware here computes in.

    Args:
        asked: auto, fp32, bf16 or fp16.
        use_cpu: Whether a GPU, if there is one, is left alone.

    Returns:
        fp32, bf16 or fp16.

    Raises:
        UserError: The hardware lacks the precision asked for.
    """
    cuda = torch.cuda.is_available() and not use_cpu
    if cuda:
        bf16, fp16 = torch.cuda.is_bf16_supported(including_emulation=False), True
        hardware = torch.cuda.get_device_name()
    else:
        # bf16 autocast runs on any CPU; only with these instructions is it faster than fp32.
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fp16, hardware = False, "a CPU"
    if asked == "auto":
        return "bf16" if bf16 else "fp16" if fp16 else "fp32"
    if asked == "fp16" and not fp16:
        raise UserError(f"precision: found fp16, which needs a CUDA GPU; this is {hardware}: use bf16, fp32 or auto")
    if asked == "bf16" and cuda and not bf16:
        raise UserError(
            f"precision: found bf16, which {hardware} lacks (Ampere or newer has it): use fp16, fp32 or auto"
        )
    return asked


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A field that is a block in YAML and JSON on the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: found {value!r}, wanted a JSON object ({error})") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name}: found {value!r}, wanted a mapping of its fields")
    return value


PARTS = (DataArguments, FeatureArguments, AugmentationArguments, ModelArguments, DendriteArguments, RunArguments)


class _RecipeParser(HfArgumentParser):
    """Errors name the field, the value found and the type wanted, instead of printing two hundred options."""

    source = "command line"

    def error(self, message: str):
        message = re.sub(r"argument --([\w]+)\S*:", r"\1:", message)
        message = re.sub(r"invalid (\w+) value: (.*)", r"found \2, wanted \1", message)
        raise UserError(f"{self.source}: {message}")


def parse_recipe(argv: list[str]) -> Recipe:
    """Read a recipe and what the command line changes of it.

    Args:
        argv: `[recipe.yaml] [--field value ...]`, as `sys.argv[1:]`.

    Raises:
        UserError: Unknown or mistyped fields, a missing file.
    """
    parser = _RecipeParser(
        PARTS,
        usage="accelerate launch train.py [recipe.yaml] [--field value ...]",
        description="Fine-tune an audio classifier. A recipe is a YAML file with any of the fields below.",
        allow_abbrev=False,
    )
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    recipe = read_yaml(path) if path else {}
    tokens = list(_as_tokens(recipe, parser, path))
    parser.source = path or parser.source
    parser.parse_args(tokens)  # so that what the file has wrong is said of the file
    parser.source = _RecipeParser.source
    overrides = argv[bool(path) :]
    try:
        *parts, unknown = parser.parse_args_into_dataclasses(
            ["--output_dir", default_output_dir(path), *tokens, *overrides],
            return_remaining_strings=True,
            look_for_args_file=False,
        )
    except ValueError as error:  # TrainingArguments' own checks
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"command line: unknown field {unknown[0]!r}{_nearest(unknown[0].lstrip('-'), parser)}")
    named = {re.sub("^--(no[_-])?", "", word.split("=")[0]).replace("-", "_") for word in overrides}
    known = {name.name for part in PARTS for name in dataclasses.fields(part)}
    return Recipe(*parts, chosen=frozenset((named | set(recipe)) & known))


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's fields, those it inherits included; a field set to null is as one left out.

    Raises:
        UserError: The file is missing, is not YAML, or is not one mapping.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}; the recipes are in configs/") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"recipe {path}: found {type(recipe).__name__}, wanted lines of `field: value`")
    if base := recipe.pop("inherits", None):
        recipe = read_yaml(path.parent / base) | recipe
    return {key: value for key, value in recipe.items() if value is not None}


def default_output_dir(path: Path | None) -> str:
    """runs/urbansound8k/ast for configs/urbansound8k/ast.yaml: a recipe has a run folder of its own."""
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
    """Save the resolved recipe, such that `train.py <path>` is the same run."""
    with written_whole(path) as beside:
        beside.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _as_tokens(recipe: dict[str, Any], parser: HfArgumentParser, path: Path | None) -> Iterator[str]:
    actions = {action.dest: action for action in parser._actions}
    for key, value in recipe.items():
        if key not in actions or key == "help":
            raise UserError(f"{path}: unknown field {key!r}{_nearest(key, parser)}")
        if isinstance(value, list):
            if actions[key].nargs != "+":
                raise UserError(f"{path}: {key}: found the list {value}, wanted one value")
            yield from (f"--{key}", *map(str, value))
        else:
            yield f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"


def _nearest(key: str, parser: HfArgumentParser) -> str:
    near = difflib.get_close_matches(key, [action.dest for action in parser._actions], n=1)
    return f"; did you mean {near[0]!r}?" if near else " (train.py --help names them all)"
