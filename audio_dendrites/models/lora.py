"""Low-rank adaptation of any family (LoRA, Hu et al. 2021, arXiv:2106.09685; DoRA, Liu et al. 2024, arXiv:2402.09353).

The layers are those of the peft library. They live inside the model, so that checkpoints hold all weights and resume
like those of any other model. The finished model has its changes merged and is a plain one.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from audio_dendrites.errors import UserError
from audio_dendrites.models.families import HEAD, LAYER


def add_lora(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Put LoRA layers on a model and freeze everything else but the head.

    Args:
        model: Changed in place. Its outputs stay the same, because LoRA starts at zero.
        settings: Fields of `peft.LoraConfig`. Without `target_modules`, all linear layers of the blocks are changed.

    Raises:
        UserError: peft is not installed, or does not accept the settings.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("lora needs the library peft: pip install peft") from error
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear and LAYER.search(name)]
    try:
        inject_adapter_in_model(LoraConfig(**{"target_modules": linear} | dict(settings)), model)
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {error}") from error
    for name, parameter in model.named_parameters():
        if HEAD.search(name):
            parameter.requires_grad_(True)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A model without LoRA layers: a copy with their changes in its weights, or the model itself if it has none."""
    layers = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if not layers:
        return model
    model = copy.deepcopy(model)
    for name in layers:
        layer = model.get_submodule(name)
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    return model
