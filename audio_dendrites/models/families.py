"""The model families: their classes, what sets each apart when it is loaded, and which layer a parameter belongs to."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    ASTConfig,
    ASTForAudioClassification,
    ClapAudioConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from audio_dendrites.errors import UserError
from audio_dendrites.models.ast import IMAGE_MODELS, draw_embeddings, patch_grid, resample_embeddings, weights_of_images
from audio_dendrites.models.beats import BEATsConfig, BEATsForAudioClassification
from audio_dendrites.models.clap import ClapClassifierConfig, ClapForAudioClassification
from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.vit import MelViTConfig, MelViTForAudioClassification
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification

# Names of parameters and modules, in all families.
CLASSIFIER = re.compile(r"(^|\.)classifier(\.|$)")  # new for other classes
HEAD = re.compile(r"(^|\.)(classifier|projector|layer_weights)(\.|$)")
STEM = re.compile(
    r"(^|\.)((rel_)?embeddings|bn0|front_end|feature_extractor|feature_projection|masked_spec_embed|pos_conv_embed)(\.|$)"
    r"|(^|\.)encoder\.(conv[12]|embed_positions)\.|(^|\.)audio_encoder\.(patch_embed|batch_norm)\."
)
LAYER = re.compile(r"(^|\.)layers?\.(\d+)\.")
ATTENTION = re.compile(r"attention|attn")
MAY_BE_MISSING = re.compile(rf"{HEAD.pattern}|(^|\.)masked_spec_embed$")  # in a pretrained model


def _check_smallest(config: CNN14Config | BEATsConfig, max_length: int) -> None:
    cnn14 = isinstance(config, CNN14Config)
    reason = f"CNN14 halves it {config.num_hidden_layers - 1} times" if cnn14 else "a patch of BEATs has that size"
    for field, found in (("num_mel_bins", config.num_mel_bins), ("max_length", max_length)):
        if found < config.smallest_input:
            raise UserError(f"{field} must be at least {config.smallest_input}, got {found}: {reason}")


def _check_beats(config: BEATsConfig, max_length: int) -> None:
    _check_smallest(config, max_length)
    if config.hidden_size % config.position_groups:
        raise UserError(
            f"model_config: hidden_size must be a multiple of position_groups, got {config.hidden_size} and "
            f"{config.position_groups}"
        )
    if not 4 <= config.num_buckets < 4 * config.max_distance:
        raise UserError(
            f"model_config: num_buckets must be at least 4 and less than 4 times max_distance, got "
            f"{config.num_buckets} and {config.max_distance}"
        )


def _check_backbone(config: WaveformConfig, max_length: int) -> None:
    fixed = getattr(config.backbone, "max_length", max_length)
    if fixed != max_length:
        raise UserError(f"max_length must be {fixed}, which the AST behind the front end takes, got {max_length}")
    if isinstance(config.backbone, CNN14Config | BEATsConfig):
        _check_smallest(config.backbone, max_length)


def field_names(config: type[PreTrainedConfig]) -> set[str]:
    """The names of the fields of a configuration."""
    return {field.name for field in dataclasses.fields(config)}


@dataclass(frozen=True)
class Family:
    """An architecture: its classes, and what sets it apart when it is loaded.

    Attributes:
        config, model: The classes.
        starts_from: Model types of the Hub. Their weights fit the family.
        input_fields: Fields of its configuration that belong to the feature extractor, not to `model_config`.
        fixed: Fields that no recipe sets.
        shape_free: Fields that change no shape of a pretrained weight, except where `adapt` fits the weight.
        has_extractor: Whether its pretrained models have a feature extractor of their own kind.
        check: Raises a UserError if a configuration does not fit a number of frames.
        begin: Completes random weights.
        adapt: Fits pretrained weights to the configuration of the model. It gets the pretrained configuration.
        from_images: Makes weights for the base of the model from a model of images and a configuration.
        resize: Gives the fields for a size of 1, 2, 3, …. A larger size never has fewer parameters.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    starts_from: tuple[str, ...]
    input_fields: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset({"dendrites"})
    shape_free: tuple[str, ...] = ()
    has_extractor: bool = False
    check: Callable[[Any, int], None] = lambda config, max_length: None
    begin: Callable[[Any], None] = lambda model: None
    adapt: Callable[[Any, Any], None] = lambda model, pretrained: None
    from_images: Callable[[Any, Any], dict[str, torch.Tensor]] | None = None
    resize: Callable[[Any, int], dict[str, Any]] = lambda config, size: {"intermediate_size": size}


FAMILIES = {  # a model that two can start from is the first one's, unless the recipe says which
    "vit": Family(
        MelViTConfig, MelViTForAudioClassification, starts_from=(MelViTConfig.model_type, ViTConfig.model_type)
    ),
    "ast": Family(
        ASTConfig,
        ASTForAudioClassification,
        starts_from=(ASTConfig.model_type, *IMAGE_MODELS),
        input_fields=("max_length", "num_mel_bins"),
        shape_free=("frequency_stride", "time_stride", "max_length", "num_mel_bins"),
        check=lambda config, max_length: patch_grid(config) and None,
        begin=draw_embeddings,
        adapt=resample_embeddings,
        from_images=weights_of_images,
    ),
    "cnn14": Family(
        CNN14Config,
        CNN14ForAudioClassification,
        starts_from=(CNN14Config.model_type,),
        input_fields=("num_mel_bins",),
        check=_check_smallest,
        # One size more is one channel more in the last block.
        resize=lambda config, size: {"width": size / (config.first_channels * 2 ** (config.num_hidden_layers - 1))},
    ),
    "beats": Family(
        BEATsConfig,
        BEATsForAudioClassification,
        starts_from=(BEATsConfig.model_type,),
        input_fields=("num_mel_bins",),
        check=_check_beats,
    ),
    "clap": Family(
        ClapClassifierConfig,
        ClapForAudioClassification,
        starts_from=(ClapClassifierConfig.model_type, ClapAudioConfig.model_type),
        has_extractor=True,
    ),
    "waveform": Family(  # saved by this project, with any of the others inside
        WaveformConfig,
        WaveformForAudioClassification,
        starts_from=(WaveformConfig.model_type,),
        input_fields=("max_length",),
        fixed=frozenset(field_names(WaveformConfig)),
        shape_free=("max_length",),
        check=_check_backbone,
    ),
}


def family_of(architecture: str | None, pretrained: PreTrainedConfig | None, name: str | None = None) -> Family:
    """The family of a recipe's model.

    Args:
        architecture: The family that the recipe asks for, if it does.
        pretrained: The configuration of the pretrained model, if there is one.
        name: Name of the pretrained model, for errors.

    Raises:
        UserError: No family starts from the pretrained model.
    """
    if pretrained is None:
        return FAMILIES[architecture or "ast"]
    for key, family in FAMILIES.items():
        if pretrained.model_type in family.starts_from and architecture in (None, key):
            return family
    encoders = {} if architecture else {config.model_type: config for config in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING}
    if type(pretrained) is encoders.get(pretrained.model_type) and not hasattr(pretrained, "dendrites"):
        model = MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING[type(pretrained)]
        return Family(type(pretrained), model, starts_from=(pretrained.model_type,), has_extractor=True)
    types = [kind for key, family in FAMILIES.items() if architecture in (None, key) for kind in family.starts_from]
    types += [kind for kind in encoders if not kind.startswith("dendritic-")]
    raise UserError(
        f"model must be of one of the types {', '.join(dict.fromkeys(types))}, got {name}, which is of type "
        f"{pretrained.model_type!r}"
    )


def learning_rates(
    model: nn.Module, learning_rate: float, head_learning_rate: float | None = None, layer_decay: float = 1.0
) -> dict[str, float] | None:
    """The learning rate of each parameter by name, or None if all have the same.

    Layer-wise decay is that of BEiT (Bao et al. 2021, arXiv:2106.08254): parameters behind the last layer learn at
    `learning_rate`, those of each layer at `layer_decay` times the rate of the layer above it, and the head at
    `head_learning_rate`.
    """
    if head_learning_rate is None and layer_decay == 1.0:
        return None
    depth = model.config.num_hidden_layers
    rates = {
        name: learning_rate * layer_decay ** (depth + 1 - layer_of(name, depth)) for name, _ in model.named_parameters()
    }
    head = learning_rate if head_learning_rate is None else head_learning_rate
    return {name: head if HEAD.search(name) else rate for name, rate in rates.items()}


def freeze_all_but_last(model: PreTrainedModel, layers: int) -> None:
    """Train only the last `layers` layers, the parameters behind them, and the head.

    Raises:
        UserError: The model has fewer layers.
    """
    depth = model.config.num_hidden_layers
    if layers > depth:
        raise UserError(f"unfreeze_last_layers must be at most {depth}, the number of layers, got {layers}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_of(name, depth) > depth - layers)


def layer_of(parameter: str, depth: int) -> int:
    """Height of a parameter: 0 below the layers, 1 to `depth` in a layer, and `depth` + 1 behind them."""
    if STEM.search(parameter):
        return 0
    layer = LAYER.search(parameter)
    return int(layer[2]) + 1 if layer else depth + 1


def default_dendrites(model: PreTrainedModel) -> list[str]:
    """Names of the layers that grow dendrites by default: the head, and the last block without its attention."""
    depth = model.config.num_hidden_layers
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    last = [name for name in names if layer_of(f"{name}.", depth) == depth and not ATTENTION.search(name)]
    return last + [name for name in names if HEAD.search(name)]
