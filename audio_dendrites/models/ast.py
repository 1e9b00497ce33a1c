"""Audio Spectrogram Transformer (Gong et al. 2021, arXiv:2104.01778): patches, position embeddings, ImageNet start."""

import logging
from functools import partial

import torch
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification, DeiTConfig, DeiTModel, ViTConfig, ViTModel
from transformers.initialization import trunc_normal_

from audio_dendrites.errors import UserError

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = 2  # class and distillation token come before the patches
IMAGE_MODELS = {DeiTConfig.model_type: DeiTModel, ViTConfig.model_type: ViTModel}


def draw_embeddings(model: ASTForAudioClassification) -> None:
    """Draw token and position embeddings. transformers sets them to zero, so that all patches would look the same."""
    embeddings = model.audio_spectrogram_transformer.embeddings
    for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        trunc_normal_(parameter, std=0.02)  # ViT's and the paper's own


def weights_of_images(images: DeiTModel | ViTModel, config: ASTConfig) -> dict[str, torch.Tensor]:
    """The weights of a transformer that was trained on images, as the weights of an AST, as in the paper's code.

    The patch kernel is summed over the colours, because a spectrogram is a grey image. (The paper says average, its
    code in src/models/ast_models.py sums.) Each axis of the position embeddings is cut at the centre if the spectrogram
    has fewer patches than the image, and interpolated bilinearly if it has more. Class and distillation token are kept.
    A ViT without a distillation token gets its class token twice: an AST averages the two tokens, and two class tokens
    do as well as one (Touvron et al. 2021, arXiv:2012.12877).

    Args:
        images: The pretrained model without a pooling layer. It has any width, depth and size of image.
        config: The configuration of the AST. Its bands, frames and strides give the grid of patches.

    Returns:
        The weights by name. They are those of an `ASTModel` if `config` has the width, depth and patches of `images`.
    """
    patches = images.embeddings.patch_embeddings
    old_grid = tuple(size // patch for size, patch in zip(patches.image_size, patches.patch_size, strict=True))
    new_grid = patch_grid(config)
    weights = images.state_dict()
    kernel, positions = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
    weights[kernel] = weights[kernel].sum(dim=1, keepdim=True)
    if "embeddings.distillation_token" not in weights:
        weights["embeddings.distillation_token"] = weights["embeddings.cls_token"]
        weights[positions] = torch.cat([weights[positions][:, :1], weights[positions]], dim=1)
    weights[positions] = resample_position_embeddings(
        weights[positions], old_grid, new_grid, cut_time=True, cut_frequency=True
    )
    logger.info("Position embeddings: %s patches of an image → %s (frequency, time).", old_grid, new_grid)
    return weights


def resample_embeddings(model: ASTForAudioClassification, pretrained: ASTConfig) -> None:
    """Fit the position embeddings and the strides of a model with pretrained weights to its configuration.

    Args:
        model: Changed in place.
        pretrained: The configuration of the pretrained weights.
    """
    old_grid, new_grid = patch_grid(pretrained), patch_grid(model.config)
    if new_grid == old_grid:
        return
    embeddings = model.audio_spectrogram_transformer.embeddings
    cut_time = model.config.time_stride == pretrained.time_stride
    resampled = resample_position_embeddings(embeddings.position_embeddings.data, old_grid, new_grid, cut_time)
    embeddings.position_embeddings = nn.Parameter(resampled)
    embeddings.patch_embeddings.projection.stride = (model.config.frequency_stride, model.config.time_stride)
    logger.info("Position embeddings: %s → %s patches (frequency, time).", old_grid, new_grid)


def resample_position_embeddings(
    embeddings: torch.Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    cut_time: bool,
    cut_frequency: bool = False,
) -> torch.Tensor:
    """Fit pretrained position embeddings to another grid of patches, as the AST paper's code does.

    Args:
        embeddings: (1, 2 + frequency · time, width). The first two rows are those of class and distillation token.
        old_grid: Number of patches over (frequency, time) in training.
        new_grid: Number of patches of the result.
        cut_time: Whether a shorter time axis is cut at the centre. This is right if the patches keep their spacing. All
            other changes interpolate bilinearly.
        cut_frequency: The same over frequency.

    Returns:
        (1, 2 + new frequency · new time, width), same dtype. The rows of the two tokens are unchanged.
    """
    tokens, patches = embeddings[:, :SPECIAL_TOKENS], embeddings[:, SPECIAL_TOKENS:]
    grid = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    for axis, cut in ((2, cut_frequency), (3, cut_time)):
        old, new = old_grid[axis - 2], new_grid[axis - 2]
        if cut and new < old:
            grid = grid.narrow(axis, old // 2 - new // 2, new)
    if grid.shape[2:] != new_grid:
        grid = nn.functional.interpolate(grid.float(), size=new_grid, mode="bilinear").to(grid.dtype)
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], dim=1)


def patch_grid(config: ASTConfig) -> tuple[int, int]:
    """Patches over (frequency, time).

    Raises:
        UserError: The input is smaller than one patch.
    """
    for field in ("num_mel_bins", "max_length"):
        if getattr(config, field) < config.patch_size:
            raise UserError(f"{field} must be at least one patch, {config.patch_size}, got {getattr(config, field)}")
    return (
        (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1,
        (config.max_length - config.patch_size) // config.time_stride + 1,
    )


def add_patchout(model: ASTForAudioClassification, frequency: int, time: int) -> None:
    """Drop rows and columns of patches in training. This saves computation and regularises.

    This is the structured patchout of PaSST (Koutini et al. 2022, arXiv:2110.05069). It drops the same patches in all
    clips of a batch, behind the position embeddings. They are drawn from torch's random state, which checkpoints hold.
    Evaluation sees every patch. A saved model does not have the hook.

    Args:
        model: Changed in place, by a hook.
        frequency: Rows of the grid to drop.
        time: Columns of the grid to drop.

    Raises:
        UserError: No patch would be left.
    """
    grid = patch_grid(model.config)
    for field, dropped, count in (("patchout_frequency", frequency, grid[0]), ("patchout_time", time, grid[1])):
        if not 0 <= dropped < count:
            raise UserError(f"{field} must be at most {count - 1}, got {dropped}: the model has {count} patches there")
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
