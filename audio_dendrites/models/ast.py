"""Audio Spectrogram Transformer (Gong et al. 2021, arXiv:2104.01778): its grid of patches and position embeddings."""

import logging

import torch
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification
from transformers.initialization import trunc_normal_

from audio_dendrites.config import RecipeError

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = 2  # class and distillation token come before the patches


def draw_embeddings(model: ASTForAudioClassification) -> None:
    """Draw token and position embeddings, which transformers starts at zero, where patches cannot be told apart."""
    embeddings = model.audio_spectrogram_transformer.embeddings
    for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        trunc_normal_(parameter, std=0.02)  # ViT's and the paper's own


def resample_embeddings(model: ASTForAudioClassification, pretrained: ASTConfig) -> None:
    """Fit the position embeddings and the strides of a model with pretrained weights to its configuration.

    Args:
        model: Changed in place.
        pretrained: The configuration that its weights are of.
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
