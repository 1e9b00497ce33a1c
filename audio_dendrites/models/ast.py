"""Audio Spectrogram Transformer (Gong et al. 2021, arXiv:2104.01778): loading, position embeddings, what is trained."""

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification, AutoConfig
from transformers.initialization import trunc_normal_

from audio_dendrites.config import FeatureArguments, ModelArguments, RecipeError
from audio_dendrites.features import BatchedASTFeatureExtractor

logger = logging.getLogger(__name__)

HEAD = "classifier."
SPECIAL_TOKENS = 2  # class and distillation token come before the patches


def load_extractor(model: ModelArguments, features: FeatureArguments) -> BatchedASTFeatureExtractor:
    """The feature extractor of the pretrained model, or ASTFeatureExtractor's defaults, as the recipe changes it.

    Raises:
        RecipeError: The pretrained model has none, or a setting makes no sense.
    """
    settings = {name: value for name, value in vars(features).items() if value is not None}
    for name in settings.keys() - {"mean"}:
        if settings[name] <= 0:
            raise RecipeError(f"{name}: found {settings[name]}, wanted a number above 0")
    if model.model is None:
        return BatchedASTFeatureExtractor(**settings)
    try:
        return BatchedASTFeatureExtractor.from_pretrained(model.model, revision=model.model_revision, **settings)
    except (OSError, ValueError) as error:
        raise _not_found(model, error) from error


def load_ast(
    labels: Sequence[str],
    arguments: ModelArguments,
    max_length: int,
    num_mel_bins: int = 128,
) -> ASTForAudioClassification:
    """An AST for these classes and this input, with pretrained weights or random ones.

    The head is kept where the pretrained classes are the same by name and order, and is new otherwise. Another input
    length, stride or number of mel bands resamples the pretrained position embeddings.

    Args:
        labels: Class names in the order of the logits.
        arguments: Which weights, which fields of `ASTConfig` to set, and how many layers to train.
        max_length: Frames of the input.
        num_mel_bins: Mel bands of the input.

    Returns:
        The model, float32, on the CPU.

    Raises:
        RecipeError: The model is no AST, lacks weights, or a field of `model_config` does not exist or does not fit.
    """
    config = dict(arguments.model_config or {})
    settable = set(ASTConfig.__annotations__) - {"model_type", "max_length", "num_mel_bins"}
    if strangers := sorted(set(config) - settable):
        raise RecipeError(
            f"model_config: found {', '.join(strangers)}, wanted fields of ASTConfig: {', '.join(sorted(settable))} "
            "(max_length and num_mel_bins are fields of the recipe)"
        )
    config |= {"max_length": max_length, "num_mel_bins": num_mel_bins}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    try:
        if arguments.model is None:
            model = _random_ast(ASTConfig(**config, **names))
        else:
            model = _pretrained_ast(arguments, config, names)
    except StrictDataclassError as error:
        raise RecipeError(f"model_config: {' '.join(str(error).split())}") from error
    if arguments.attn_implementation is not None:
        try:
            model.set_attn_implementation(arguments.attn_implementation)
        except (ImportError, ValueError) as error:
            raise RecipeError(f"attn_implementation: {error}") from error
    if arguments.unfreeze_last_layers is not None:
        freeze_all_but_last(model, arguments.unfreeze_last_layers)
    if arguments.patchout_frequency or arguments.patchout_time:
        add_patchout(model, arguments.patchout_frequency, arguments.patchout_time)
    return model


def resample_position_embeddings(
    embeddings: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], cut_time: bool
) -> torch.Tensor:
    """Fit pretrained position embeddings to another grid of patches, as the AST paper's code does.

    Args:
        embeddings: (1, 2 + frequency · time, width), the first two rows those of class and distillation token.
        old_grid: Patches over (frequency, time) they were trained for.
        new_grid: Patches wanted.
        cut_time: Whether a shorter time axis is cut from the centre, right where patches keep their spacing, instead
            of being squeezed. All other changes interpolate bilinearly.

    Returns:
        (1, 2 + new frequency · new time, width), same dtype; the two tokens' rows unchanged.
    """
    tokens, patches = embeddings[:, :SPECIAL_TOKENS], embeddings[:, SPECIAL_TOKENS:]
    grid = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if cut_time and new_grid[1] < old_grid[1]:
        start = old_grid[1] // 2 - new_grid[1] // 2
        grid = grid[..., start : start + new_grid[1]]
    if grid.shape[2:] != new_grid:
        grid = nn.functional.interpolate(grid.float(), size=new_grid, mode="bilinear").to(grid.dtype)
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], dim=1)


def patch_grid(config: ASTConfig) -> tuple[int, int]:
    """Patches over (frequency, time).

    Raises:
        RecipeError: The input is smaller than one patch.
    """
    for field in ("num_mel_bins", "max_length"):
        if getattr(config, field) < config.patch_size:
            raise RecipeError(
                f"{field}: found {getattr(config, field)}, wanted at least one patch, {config.patch_size}"
            )
    return (
        (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1,
        (config.max_length - config.patch_size) // config.time_stride + 1,
    )


def freeze_all_but_last(model: ASTForAudioClassification, layers: int) -> None:
    """Train only the last `layers` transformer layers, the norm behind them and the head.

    Raises:
        RecipeError: The model has fewer layers.
    """
    depth = model.config.num_hidden_layers
    if not 0 <= layers <= depth:
        raise RecipeError(f"unfreeze_last_layers: found {layers}, wanted 0 to {depth}, the layers of the model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_of(name, depth) > depth - layers)


def add_patchout(model: ASTForAudioClassification, frequency: int, time: int) -> None:
    """Drop rows and columns of patches while training: less to compute, and a regulariser.

    This is the structured patchout of PaSST (Koutini et al. 2022, arXiv:2110.05069): behind the position embeddings,
    the same patches in all clips of a batch. They are drawn from torch's own random state, which checkpoints hold, as
    dropout's are. Evaluation sees every patch, and a saved model knows nothing of it.

    Args:
        model: Changed in place, by a hook.
        frequency: Rows of the grid to drop.
        time: Columns of the grid to drop.

    Raises:
        RecipeError: Nothing would be left.
    """
    grid = patch_grid(model.config)
    for field, dropped, count in (("patchout_frequency", frequency, grid[0]), ("patchout_time", time, grid[1])):
        if not 0 <= dropped < count:
            raise RecipeError(f"{field}: found {dropped}, wanted 0 to {count - 1}: the model has {count} patches there")
    model.audio_spectrogram_transformer.embeddings.register_forward_hook(partial(_patchout, grid, (frequency, time)))


def _patchout(
    grid: tuple[int, int], dropped: tuple[int, int], embeddings: nn.Module, inputs: tuple, tokens: torch.Tensor
) -> torch.Tensor:
    """Tokens (batch, 2 + kept frequency · kept time, width) of (batch, 2 + frequency · time, width)."""
    if not embeddings.training:
        return tokens
    rows, columns = (torch.randperm(n)[: n - less].sort().values for n, less in zip(grid, dropped, strict=True))
    patches = SPECIAL_TOKENS + (rows[:, None] * grid[1] + columns).flatten()
    return tokens[:, torch.cat([torch.arange(SPECIAL_TOKENS), patches]).to(tokens.device)]


def layer_of(parameter: str, depth: int) -> int:
    """Height of a parameter: 0 for the embeddings, 1 to depth for the layers, depth + 1 for final norm and head."""
    if ".embeddings." in parameter:
        return 0
    layer = re.search(r"\.layers\.(\d+)\.", parameter)
    return int(layer[1]) + 1 if layer else depth + 1


def learning_rates(
    model: nn.Module, learning_rate: float, head_learning_rate: float | None = None, layer_decay: float = 1.0
) -> dict[str, float] | None:
    """The learning rate of each parameter by name; none where all have the same.

    Layer-wise decay (as in BEiT, Bao et al. 2021, arXiv:2106.08254): the final norm learns at `learning_rate`, each
    layer below at `layer_decay` times the one above, the head at `head_learning_rate`.
    """
    if head_learning_rate is None and layer_decay == 1.0:
        return None
    depth = model.config.num_hidden_layers
    rates = {
        name: learning_rate * layer_decay ** (depth + 1 - layer_of(name, depth)) for name, _ in model.named_parameters()
    }
    head = learning_rate if head_learning_rate is None else head_learning_rate
    return {name: head if name.startswith(HEAD) else rate for name, rate in rates.items()}


def _random_ast(config: ASTConfig) -> ASTForAudioClassification:
    patch_grid(config)
    model = ASTForAudioClassification(config)
    embeddings = model.audio_spectrogram_transformer.embeddings
    # transformers starts these at zero, where patches cannot be told apart; 0.02 is ViT's and the paper's own.
    for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        trunc_normal_(parameter, std=0.02)
    return model


def _pretrained_ast(
    arguments: ModelArguments, settings: dict[str, Any], labels: dict[str, dict]
) -> ASTForAudioClassification:
    name, revision = arguments.model, arguments.model_revision
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_found(arguments, error) from error
    if config.model_type != ASTConfig.model_type:
        raise RecipeError(f"model: {name} is of type {config.model_type!r}, wanted {ASTConfig.model_type!r}")
    old_grid, old_time_stride = patch_grid(config), config.time_stride
    same_classes = config.id2label == labels["id2label"]
    # Strides and input size leave every weight but the position embeddings alone; those are resampled below.
    shape_free = {"frequency_stride", "time_stride", "max_length", "num_mel_bins"}
    weights = {key: value for key, value in settings.items() if key not in shape_free}
    try:
        model, loading = ASTForAudioClassification.from_pretrained(
            name,
            revision=revision,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **weights,
            **labels,
        )
    except OSError as error:
        raise RecipeError(f"model: the weights of {name!r} could not be loaded: {error}") from error
    fresh = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    if lost := sorted(key for key in fresh | set(loading["unexpected_keys"]) if not key.startswith(HEAD)):
        raise RecipeError(
            f"model: {name} and the recipe's model_config differ in {', '.join(lost[:5])} ({len(lost)} tensors)"
        )
    if not same_classes:
        logger.info(
            "New head for %d classes; %s was trained on %d others.",
            len(labels["id2label"]),
            name,
            config.num_labels,
        )
        # A new layer, because transformers never initialises a tensor again that it has loaded.
        model.classifier.dense = nn.Linear(model.config.hidden_size, len(labels["id2label"]))
        model._init_weights(model.classifier.dense)
    for key in shape_free & settings.keys():
        setattr(model.config, key, settings[key])
    new_grid = patch_grid(model.config)
    if new_grid != old_grid:
        embeddings = model.audio_spectrogram_transformer.embeddings
        cut_time = model.config.time_stride == old_time_stride
        resampled = resample_position_embeddings(embeddings.position_embeddings.data, old_grid, new_grid, cut_time)
        embeddings.position_embeddings = nn.Parameter(resampled)
        embeddings.patch_embeddings.projection.stride = (
            model.config.frequency_stride,
            model.config.time_stride,
        )
        logger.info("Position embeddings: %s → %s patches (frequency, time).", old_grid, new_grid)
    return model


def _not_found(arguments: ModelArguments, error: Exception) -> RecipeError:
    name = arguments.model
    return RecipeError(
        f"model: {name!r} (revision {arguments.model_revision or 'main'}) is no model folder, and neither the Hub nor "
        f"the cache gave it. Without network, fetch it elsewhere with `hf download {name}` and set HF_HOME to the same "
        f"cache, or give a folder: --model FOLDER. ({str(error).splitlines()[0]})"
    )
