"""Attention rollout against a direct computation."""

import numpy as np
import pytest
import torch
from conftest import TINY_AST, TINY_CNN14, TINY_VIT
from transformers import ASTConfig, ASTForAudioClassification

from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.dendritic import DendriticLinear
from audio_dendrites.models.vit import MelViTConfig, MelViTForAudioClassification
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification
from audio_dendrites.results.rollout import attention_rollout, body_of

AST = TINY_AST | {"num_mel_bins": 32, "max_length": 48}
OVERLAPPING = AST | {"frequency_stride": 10, "time_stride": 12}
VIT = TINY_VIT | {"patch_size": 8}


def make(family: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    if family == "ast":
        model = ASTForAudioClassification(ASTConfig(**config))
    elif family == "vit":
        model = MelViTForAudioClassification(MelViTConfig(**config))
    else:
        backbone = {"model_type": "audio-spectrogram-transformer", **config}
        model = WaveformForAudioClassification(WaveformConfig(backbone=backbone, num_mel_bins=32, max_length=48))
    for parameter in body_of(model).parameters():  # so that no two tokens get the same attention
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def with_dendrites(model: torch.nn.Module) -> torch.nn.Module:
    """The model with dendrites in an attention projection, which change what it attends to."""
    attention = body_of(model).layers[-1].attention
    attention.q_proj = DendriticLinear(attention.q_proj, 2, "gelu")
    for parameter in attention.q_proj.parameters():
        parameter.data += torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("family", "config", "special", "grid", "patch", "stride"),
    [
        ("ast", AST, 2, (2, 3), 16, (16, 16)),
        ("ast", OVERLAPPING, 2, (2, 3), 16, (10, 12)),
        ("vit", VIT, 1, (4, 4), 8, (8, 8)),
        ("waveform", AST, 2, (2, 3), 16, (16, 16)),
    ],
    ids=["ast", "overlapping patches", "vit", "ast behind a front end"],
)
@pytest.mark.parametrize("grown", [False, True], ids=["plain", "dendrites in the attention"])
def test_rollout_is_the_product_of_the_layers_at_the_place_of_each_patch(
    family, config, special, grid, patch, stride, grown
):
    model = make(family, **config)
    model = with_dendrites(model) if grown else model
    inputs = {"input_values": torch.randn(2, 48, 32) if family != "waveform" else 0.1 * torch.randn(2, 7920)}
    before = model(**inputs).logits
    found = attention_rollout(model, inputs).double().numpy()
    assert torch.equal(model(**inputs).logits, before) and body_of(model).config._attn_implementation == "sdpa"

    body = body_of(model)
    body.set_attn_implementation("eager")
    seen = []  # what the body gets
    body.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args or tuple(kwargs.values())), with_kwargs=True
    )
    model(**inputs)
    layers = body(seen[0][0], output_attentions=True).attentions
    product = np.eye(special + grid[0] * grid[1])
    for layer in layers:
        product = (0.5 * layer.detach().double().mean(1).numpy() + 0.5 * np.eye(product.shape[-1])) @ product
    flow = product[:, :special, special:].mean(1).reshape(2, *grid)
    total, count = np.zeros(found.shape), np.zeros(found.shape)
    for row, column in np.ndindex(grid):
        low, start = row * stride[0], column * stride[1]
        total[:, low : low + patch, start : start + patch] += flow[:, row, column, None, None]
        count[:, low : low + patch, start : start + patch] += 1
    assert np.isnan(found).any() == (count == 0).any() == (stride == (10, 12))
    assert np.nanmax(np.abs(found - np.where(count, total, np.nan) / count.clip(1))) < 1e-6
    assert np.nanmax(found) > 1.2 * np.nanmin(found)  # otherwise every place would be right


def test_a_model_without_patches_has_no_rollout():
    assert body_of(CNN14ForAudioClassification(CNN14Config(**TINY_CNN14))) is None
