"""From a recipe to a model: families, feature extractors, pretrained weights, what is trained and how fast."""

import dataclasses
import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    ASTForAudioClassification,
    AutoConfig,
    AutoFeatureExtractor,
    ClapConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from audio_dendrites.data.audio import window_samples
from audio_dendrites.data.features import BatchedASTFeatureExtractor, ExtractorClips, Inputs, Waveforms
from audio_dendrites.errors import UserError, listed
from audio_dendrites.models.ast import IMAGE_MODELS, add_patchout
from audio_dendrites.models.cnn14 import CNN14ForAudioClassification
from audio_dendrites.models.families import (
    CLASSIFIER,
    MAY_BE_MISSING,
    Family,
    family_of,
    field_names,
    freeze_all_but_last,
)
from audio_dendrites.models.finished import LOADING_ERRORS, NEEDS_OWN_CODE, load_finished, loading_error
from audio_dendrites.models.lora import add_lora
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification
from audio_dendrites.recipes import FeatureArguments, ModelArguments, Recipe, check_range

logger = logging.getLogger(__name__)

TOLERANCE = 0.02  # of `match_parameters`


def load_extractor(model: ModelArguments, features: FeatureArguments) -> Inputs:
    """The feature extractor of the pretrained model, or of ASTFeatureExtractor's defaults, with the recipe's settings.

    With `waveform` the settings become those of the model's front end, and the features are waveforms. A setting that
    is still auto is left out.

    Raises:
        UserError: The pretrained model has no feature extractor, or a setting is not allowed.
    """
    settings = {name: value for name, value in vars(features).items() if value is not None}
    pretrained = None if model.model is None else _pretrained_config(model)
    if isinstance(pretrained, WaveformConfig):
        return _waveforms_of(model, pretrained, settings)
    if pretrained is not None and family_of(model.architecture, pretrained, model.model).has_extractor:
        return _clips_of(model, settings)
    settings = {name: value for name, value in settings.items() if value != "auto"}
    convention = settings.pop("convention", "kaldi")
    if convention != "kaldi" and not model.waveform:
        raise UserError(f"convention must be kaldi with waveform: false, got {convention}, which the model computes")
    if convention == "librosa":
        settings = {"mean": 0.0, "std": 0.5} | settings
    if pretrained is None or pretrained.model_type in IMAGE_MODELS:  # its extractor is for pictures
        log_mel = BatchedASTFeatureExtractor(**settings)
    else:
        try:
            log_mel = BatchedASTFeatureExtractor.from_pretrained(model.model, revision=model.model_revision, **settings)
        except (OSError, ValueError) as error:
            raise _not_found(model, error) from error
    if not model.waveform:
        return log_mel
    rate = log_mel.sampling_rate
    return Waveforms(
        rate, log_mel.max_length, window_samples(rate) if convention != "librosa" else 0, rate // 100,
        log_mel.num_mel_bins, mean=log_mel.mean if log_mel.do_normalize else 0.0,
        std=log_mel.std if log_mel.do_normalize else 0.5, convention=convention,
    )  # fmt: skip


def check_model(recipe: Recipe, extractor: Inputs) -> PreTrainedModel:
    """Check, before any data is read, that the model can do what the recipe asks for.

    Returns:
        The model on the meta device, that is without weights, or on the CPU if it has a feature extractor. Its classes
        are those of the pretrained model or of the recipe. If neither lists them, they are two.

    Raises:
        UserError: As `load_model`, an augmentation needs another kind of input, or the model has no gradient
            checkpointing.
    """
    augmentation = recipe.augmentation.settings(extractor.input)
    sizes = {"time_mask": "max_length", "frequency_mask": "num_mel_bins", "frequency_shift": "num_mel_bins"}
    for name, axis in sizes.items():
        if (value := augmentation.get(name, 0)) > (size := getattr(extractor, axis, 0)):
            raise UserError(f"{name} must be at most {size}, the {axis} of the model's input, got {value}")
    if recipe.model.trainable_filters and not recipe.model.waveform:
        raise UserError("trainable_filters must be false with waveform: false, got true: the model has no filters")
    if recipe.model.trainable_filters and recipe.model.unfreeze_last_layers is not None:
        raise UserError(
            f"unfreeze_last_layers must be left out with trainable_filters: true, got "
            f"{recipe.model.unfreeze_last_layers}: it freezes the mel filters"
        )
    pretrained = None if recipe.model.model is None else _pretrained_config(recipe.model)
    labels = recipe.data.labels or ["", " "] if pretrained is None else list(pretrained.id2label.values())
    arguments = match_parameters(labels, recipe.model, extractor, inexact=recipe.data.labels is None)
    model = _without_weights(labels, arguments, extractor)
    network = getattr(model, "backbone", model)
    if recipe.augmentation.augment_after_norm and not isinstance(network, CNN14ForAudioClassification):
        raise UserError(f"augment_after_norm must be false, got true: {type(network).__name__} is no CNN14")
    if recipe.augmentation.augment_after_norm and recipe.training.distill_from is not None:
        raise UserError("distill_from must be none with augment_after_norm, which the teacher would not follow")
    if recipe.training.activation_checkpointing and not network.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing must be false, got true: {type(network).__name__} does not support it"
        )
    if pretrained is not None:
        whole = load_model(labels, recipe.model, extractor)
        model = whole if isinstance(extractor, ExtractorClips) else model  # not all of them run on the meta device
    return model


def match_parameters(
    labels: Sequence[str],
    arguments: ModelArguments,
    extractor: Inputs,
    inexact: bool = False,
) -> ModelArguments:
    """Size a model to the number of parameters that `match_parameters` asks for, if it does.

    Args:
        labels: Class names.
        arguments: The recipe's.
        extractor: The recipe's.
        inexact: Whether to accept any distance, because the number of classes is not known yet.

    Returns:
        The arguments with the nearest size in their `model_config`.

    Raises:
        UserError: No size comes within 2 % of the number.
    """
    if (target := arguments.match_parameters) is None:
        return arguments
    family, _, config = _resolve(labels, arguments, extractor)

    def resized(size: int) -> ModelArguments:
        settings = (arguments.model_config or {}) | family.resize(config, size)
        return dataclasses.replace(arguments, model_config=settings)

    def count(size: int) -> int:
        return sum(parameter.numel() for parameter in _without_weights(labels, resized(size), extractor).parameters())

    high = 1
    while count(high) < target:
        high *= 2
    size = bisect_left(range(high), target, lo=max(1, high // 2), key=count)
    size = min((max(1, size - 1), size), key=lambda near: abs(count(near) - target))
    found, (field, value) = count(size), *family.resize(config, size).items()
    if inexact:
        return resized(size)
    if abs(found - target) > TOLERANCE * target:
        raise UserError(
            f"match_parameters must be a number that {family.model.__name__} reaches within 2 % by its {field}, got "
            f"{target:,}; the nearest is {found:,}, with {field} {value}. Change other fields of model_config"
        )
    logger.info("match_parameters: %s %s gives %s parameters for %s.", field, value, f"{found:,}", f"{target:,}")
    return resized(size)


def load_model(labels: Sequence[str], arguments: ModelArguments, extractor: Inputs) -> PreTrainedModel:
    """A model for these classes and features, with pretrained weights or random ones.

    The head is kept where the pretrained classes are the same by name and order, and is new otherwise: of an AST both
    its layer normalisation and its linear layer, as in the authors' code (github.com/YuanGongND/ast,
    src/models/ast_models.py). Another input length, stride or number of mel bands resamples an AST's position
    embeddings.

    Args:
        labels: Class names in the order of the logits.
        arguments: Which family and weights, which fields of the configuration to set, and how many layers to train.
        extractor: Whose features it gets.

    Returns:
        The model, float32, on the CPU.

    Raises:
        UserError: The pretrained model is of another family or lacks weights, or a field of `model_config` does not
            exist or does not fit.
    """
    family, pretrained, config = _resolve(labels, arguments, extractor)
    if pretrained is None:
        model = family.model(config)
        family.begin(model)
        if arguments.weights_by_name:
            for module in model.modules():
                module._is_hf_initialized = False  # so that transformers draws the weights again
            with torch.random.fork_rng(devices=[]), _SeededByName(model):
                model.initialize_weights()
                family.begin(model)
    elif family.from_images and pretrained.model_type in IMAGE_MODELS:
        model = _with_weights_of_images(arguments, family, pretrained, config)
    else:
        model = _with_weights(arguments, family, pretrained, config)
    return _set_up(model, arguments, extractor)


def load_teacher(
    name: str,
    labels: Sequence[str] | None,
    extractor: Inputs,
    loss: str | None,
) -> PreTrainedModel:
    """A trained model whose scores another one learns from.

    Args:
        name: Finished run folder or Hub id.
        labels: Class names in the order of the logits; None accepts any.
        extractor: What the batches are made with.
        loss: cross_entropy or bce, of the training; a teacher of the other has no scores for it. None accepts both.

    Returns:
        The model, float32, on the CPU, for evaluation, without gradients.

    Raises:
        UserError: There is no such model, or it has other classes, another loss or hears other features.
    """
    try:
        teacher, heard = load_finished(name)
    except UserError as error:
        raise UserError(f"distill_from: {error}") from error
    found = list(teacher.config.id2label.values())
    if labels is not None and found != list(labels):
        raise UserError(f"distill_from must have the classes {listed(labels)}, got {name} with {listed(found)}")
    own = "bce" if teacher.config.problem_type == "multi_label_classification" else "cross_entropy"
    if loss not in (None, own):
        raise UserError(f"distill_from must be a model of the recipe's loss, {loss}, got {name} with {own}")
    given, own = heard.to_dict(), extractor.stock().to_dict()
    given.pop("auto_map", None)  # names code, which did not run
    if isinstance(teacher.config, WaveformConfig):
        for field in ("max_length", "hop_length", "num_mel_bins"):
            given[field], own[field] = getattr(teacher.config, field), getattr(extractor, field)
    if other := sorted(field for field in given.keys() | own.keys() if given.get(field) != own.get(field)):
        told = "; ".join(f"{field} must be {own.get(field)}, got {given.get(field)}" for field in other)
        raise UserError(f"distill_from must be a model with the features of the recipe, got {name}: {told}")
    return teacher


class _SeededByName(TorchFunctionMode):
    """Seeds the random numbers of each parameter by torch's seed and the parameter's name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.seed = torch.initial_seed()

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = args[0] if args else (kwargs or {}).get("tensor")  # functions of nn.init name it
        if name := self.names.get(id(drawn)):
            torch.default_generator.manual_seed(crc32(f"{self.seed} {name}".encode()))
        return function(*args, **(kwargs or {}))


def _without_weights(labels: Sequence[str], arguments: ModelArguments, extractor: Inputs) -> PreTrainedModel:
    """The model of the arguments on the meta device."""
    family, _, config = _resolve(labels, arguments, extractor)
    with torch.device("meta"):
        return _set_up(family.model(config), arguments, extractor)


def _resolve(
    labels: Sequence[str], arguments: ModelArguments, extractor: Inputs
) -> tuple[Family, PreTrainedConfig | None, PreTrainedConfig]:
    """The family, the configuration of the pretrained model or None, and the configuration of the new model."""
    pretrained = None if arguments.model is None else _pretrained_config(arguments)
    family = family_of(arguments.architecture, pretrained, arguments.model)
    settings = dict(arguments.model_config or {})
    settable = field_names(family.config) - field_names(PreTrainedConfig) - {*family.input_fields, *family.fixed}
    if strangers := sorted(set(settings) - settable):
        own = f" ({' and '.join(family.input_fields)} are fields of the recipe)" if family.input_fields else ""
        raise UserError(
            f"model_config must have fields of {family.config.__name__} only, got {', '.join(strangers)}; the "
            f"fields are {', '.join(sorted(settable)) or 'none'}{own}"
        )
    settings |= {field: getattr(extractor, field) for field in family.input_fields}
    settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if pretrained is not None:
        kept = field_names(family.config) - {"architectures", "dtype", "problem_type"}
        settings = {name: value for name, value in pretrained.to_dict().items() if name in kept} | settings
    if family.config is WaveformConfig:
        settings["trainable_filters"] = arguments.trainable_filters
    try:
        config = family.config(**settings)
    except StrictDataclassError as error:
        raise UserError(f"model_config: {' '.join(str(error).split())}") from error
    _check_network(arguments.model_config or {}, config)
    family.check(config, extractor.max_length)
    return family, pretrained, config


def _check_network(settings: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Check that a network can be built of the recipe's settings and that it can learn.

    Raises:
        UserError: A setting is out of range, or two do not fit each other.
    """
    for name, value in settings.items():
        default = getattr(type(config), name, None)
        interval = "[0, 1)" if "dropout" in name else "[1, inf)" if isinstance(default, int) else "(0, inf)"
        check_range(f"model_config: {name}", value, interval)
    activation = getattr(config, "hidden_act", None)
    if isinstance(activation, str) and activation not in ACT2FN:
        raise UserError(f"model_config: hidden_act must be one of {', '.join(ACT2FN)}, got {activation!r}")
    heads, patch, image = (getattr(config, name, None) for name in ("num_attention_heads", "patch_size", "image_size"))
    if isinstance(heads, int) and config.hidden_size % heads:
        raise UserError(
            f"model_config: hidden_size must be a multiple of num_attention_heads, got {config.hidden_size} and {heads}"
        )
    if isinstance(image, int) and image < patch:
        raise UserError(f"model_config: image_size must be at least patch_size, got {image} and {patch}")


def _pretrained_config(arguments: ModelArguments) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(arguments.model, revision=arguments.model_revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_found(arguments, error) from error
    return config.audio_config if isinstance(config, ClapConfig) else config  # without its text tower


def _with_weights(
    arguments: ModelArguments, family: Family, pretrained: PreTrainedConfig, config: PreTrainedConfig
) -> PreTrainedModel:
    """The pretrained model, fitted to another configuration."""
    name, asked = arguments.model, {field: getattr(config, field) for field in family.shape_free}
    for field in family.shape_free:
        setattr(config, field, getattr(pretrained, field))
    model, loading = _from_pretrained(family.model, arguments, config)
    fresh = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    parts, prefix = dict(model.base_model.named_children()), f"{model.base_model_prefix}."
    left = {key for key in loading["unexpected_keys"] if key.removeprefix(prefix).split(".")[0] in parts}
    _refuse(name, {key for key in fresh | left if not MAY_BE_MISSING.search(key)})
    if pretrained.id2label != config.id2label:
        logger.info(
            "New head for %d classes; %s was trained on %d others.", config.num_labels, name, pretrained.num_labels
        )
        for key, module in list(model.named_modules()):
            if CLASSIFIER.search(key) and isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif CLASSIFIER.search(key) and type(module) is nn.Linear:
                # A new layer, because transformers never initialises a tensor again that it has loaded.
                model.set_submodule(key, nn.Linear(module.in_features, config.num_labels))
                model._init_weights(model.get_submodule(key))
    for field, value in asked.items():
        setattr(model.config, field, value)
    family.adapt(model, pretrained)
    return model


def _with_weights_of_images(
    arguments: ModelArguments, family: Family, pretrained: PreTrainedConfig, config: PreTrainedConfig
) -> PreTrainedModel:
    """A model whose base has learned from images, with a new head."""
    kind = IMAGE_MODELS[pretrained.model_type]
    images, loading = _from_pretrained(kind, arguments, pretrained, add_pooling_layer=False)
    weights, model = family.from_images(images, config), family.model(config)
    found, needed = (
        {(key, tensor.shape) for key, tensor in part.items()} for part in (weights, model.base_model.state_dict())
    )
    _refuse(arguments.model, {*loading["missing_keys"], *(key for key, _ in found ^ needed)})
    model.base_model.load_state_dict(weights)
    return model


def _from_pretrained(
    model: type[PreTrainedModel], arguments: ModelArguments, config: PreTrainedConfig, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, float32, and the names of tensors that are missing, unexpected, or of another shape."""
    try:
        return model.from_pretrained(
            arguments.model, config=config, revision=arguments.model_revision, dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True, **settings,
        )  # fmt: skip
    except LOADING_ERRORS as error:
        raise UserError(f"model: {loading_error(arguments.model, error)}") from error


def _refuse(name: str, lost: set[str]) -> None:
    if lost:
        raise UserError(
            f"model: {name} does not fit the recipe's model_config. They differ in "
            f"{', '.join(sorted(lost)[:5])} ({len(lost)} tensors)"
        )


def _waveforms_of(model: ModelArguments, pretrained: WaveformConfig, settings: dict[str, Any]) -> Waveforms:
    """What a saved model with a front end gets; of the recipe's settings only `max_length` may differ from its own."""
    if not model.waveform:
        raise UserError(f"waveform must be true for {model.model}, which takes waveforms, got false")
    for name, value in settings.items():
        if name != "max_length" and value != getattr(pretrained, name):
            raise UserError(
                f"{name} must be {getattr(pretrained, name)}, as in the front end of {model.model}, got {value}"
            )
    max_length = settings.get("max_length", pretrained.max_length)
    if max_length is None:
        raise UserError(f"max_length must be set to a number of frames, got null; {model.model} takes any")
    return Waveforms(
        max_length=max_length,
        window_length=pretrained.window_length if pretrained.convention != "librosa" else 0,
        **{
            name: getattr(pretrained, name)
            for name in ("sampling_rate", "hop_length", "num_mel_bins", "mean", "std", "convention")
        },
    )


def _clips_of(model: ModelArguments, settings: dict[str, Any]) -> ExtractorClips:
    """The feature extractor of a pretrained encoder. A recipe only says how long its clips are.

    Raises:
        UserError: The recipe sets something else, or the model has no feature extractor.
    """
    if model.waveform:
        raise UserError(f"waveform must be false, got true: {model.model} has a feature extractor of its own")
    try:
        extractor = AutoFeatureExtractor.from_pretrained(
            model.model, revision=model.model_revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _not_found(model, error) from error
    rate, most = extractor.sampling_rate, 100 * getattr(extractor, "chunk_length", 10)
    if (seconds := getattr(extractor, "max_length_s", None)) is not None:  # of longer clips CLAP takes random parts
        most = 100 * seconds
        if settings.get("max_length", most) > most:
            raise UserError(f"max_length must be at most {most} for {model.model}, got {settings['max_length']}")
    own = {"sampling_rate": rate, "max_length": settings.get("max_length", most)}
    if other := {name: value for name, value in settings.items() if own.get(name) != value}:
        name, value = next(iter(other.items()))
        raise UserError(
            f"{name} must be {own.get(name, 'left out')}, as {model.model} was trained, got {value}: its feature "
            f"extractor decides"
        )
    return ExtractorClips(rate, own["max_length"], rate // 100, rate // 100, extractor)


def _behind_front_end(model: PreTrainedModel, arguments: ModelArguments, waveforms: Waveforms) -> PreTrainedModel:
    """A model of spectrograms as one of waveforms."""
    rate = waveforms.sampling_rate
    front_end = vars(waveforms) | {"high_frequency": rate / 2}
    if waveforms.convention == "librosa":  # at 32, 16 and 8 kHz what PANNs' authors have there
        front_end |= {"window_length": rate * 32 // 1000, "low_frequency": 50, "high_frequency": min(14000, rate // 2)}
    config = WaveformConfig(
        backbone=model.config.to_dict(), **front_end, trainable_filters=arguments.trainable_filters,
        id2label=model.config.id2label, label2id=model.config.label2id,
    )  # fmt: skip
    with torch.device("meta"):  # where the network is drawn in vain
        whole = WaveformForAudioClassification(config)
    whole.backbone = model
    config.backbone = model.config
    return whole


def _set_up(model: PreTrainedModel, arguments: ModelArguments, extractor: Inputs) -> PreTrainedModel:
    """Attention, front end and frozen layers, as the recipe says."""
    if arguments.attn_implementation is not None:
        network = getattr(model, "backbone", model)
        if not network._supports_sdpa:
            raise UserError(
                f"attn_implementation must be left out, got {arguments.attn_implementation}: {type(network).__name__} "
                f"has no choice of attention"
            )
        try:
            network.set_attn_implementation(arguments.attn_implementation)
        except (ImportError, ValueError) as error:
            raise UserError(f"attn_implementation: {error}") from error
    if arguments.patchout_frequency or arguments.patchout_time:
        network = getattr(model, "backbone", model)
        if not isinstance(network, ASTForAudioClassification):
            raise UserError(
                f"patchout_frequency and patchout_time must be 0 for {type(network).__name__}: they drop patches of AST"
            )
        add_patchout(network, arguments.patchout_frequency, arguments.patchout_time)
    if arguments.waveform and not isinstance(model, WaveformForAudioClassification):
        model = _behind_front_end(model, arguments, extractor)
    if arguments.freeze_stem and hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()
    if arguments.unfreeze_last_layers is not None:
        freeze_all_but_last(model, arguments.unfreeze_last_layers)
    if arguments.lora is not None:
        add_lora(model, arguments.lora)
    return model


def _not_found(arguments: ModelArguments, error: Exception) -> UserError:
    name = arguments.model
    if NEEDS_OWN_CODE in str(error) or Path(name).is_dir():
        return UserError(f"model: {loading_error(name, error)}")
    return UserError(
        f"model: {name!r} (revision {arguments.model_revision or 'main'}) is not a folder, and neither the Hub nor the "
        f"cache has it. Without a network, download it elsewhere with `python -m audio_dendrites.data download RECIPE` "
        f"and set HF_HOME to that cache, or name a folder: --model FOLDER. ({str(error).splitlines()[0]})"
    )
