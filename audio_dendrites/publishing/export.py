"""From a model that perforatedai grew to a folder that loads without perforatedai.

The vendor's own export is not used: it drops the dendrite where there is exactly one and forgets the activation.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import ASTForAudioClassification, FeatureExtractionMixin, PreTrainedModel

from audio_dendrites.errors import UserError
from audio_dendrites.files import set_default_mode
from audio_dendrites.models.dendritic import (
    ACTIVATIONS,
    LAYERS,
    DendriticASTForAudioClassification,
    DendriticMixin,
)

NEURON = "PAINeuronModule"  # perforatedai's classes by name: importing it prints, and it may not be installed


class ExportError(UserError):
    """The model cannot be exported. The message names the module and the reason."""


def export_dendritic(
    model: nn.Module,
    folder: str | Path,
    feature_extractor: FeatureExtractionMixin | None = None,
    activation: str | None = None,
) -> None:
    """Write a model with dendrites as a folder for `from_pretrained(..., trust_remote_code=True)` and `pipeline`.

    A model on which nothing has grown is written as a plain one. Every file is written to a temporary folder and then
    renamed, so that no half-written model replaces a whole one.

    Args:
        model: As in `dendritic_copy`.
        folder: Created if it is missing. Other files in it are kept.
        feature_extractor: Written beside the model, if given.
        activation: As in `dendritic_copy`.

    Raises:
        ExportError: As `dendritic_copy`.
    """
    exported = dendritic_copy(model, activation)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as beside:
        exported.save_pretrained(beside)
        if feature_extractor is not None:
            feature_extractor.save_pretrained(beside)
        set_default_mode(*Path(beside).iterdir())
        for path in Path(beside).iterdir():
            os.replace(path, folder / path.name)


def dendritic_copy(model: nn.Module, activation: str | None = None) -> PreTrainedModel:
    """The same function as a plain transformers model that holds nothing of perforatedai.

    Args:
        model: An ASTForAudioClassification, or a model of this project, with modules of perforatedai in it, also in DDP
            or torch.compile; it is left as it is, and so is the random state.
        activation: The dendrites' activation; left out, the one perforatedai is set to now.

    Returns:
        A `DendriticASTForAudioClassification` for an AST on which something has grown, else a model of the same class;
        on the same device, of the same dtype and in the same mode, with tensors of its own.

    Raises:
        ExportError: The model is none of these, dendrites are still growing, or sit on something that is neither Linear
            nor Conv2d.
    """
    model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
    if not isinstance(model, ASTForAudioClassification | DendriticMixin):
        raise ExportError(f"found a {type(model).__name__}, wanted an ASTForAudioClassification or one of this project")
    perforated = {name: module for name, module in model.named_modules() if type(module).__name__ == NEURON}
    grown = {name: module for name, module in perforated.items() if _checked_count(name, module)}
    structure = {
        _plain_name(name): {
            "count": module.dendrite_modules_added,
            "activation": activation or current_activation(),
        }
        for name, module in grown.items()
    }
    tensors = {_plain_name(name): tensor for name, tensor in model.state_dict().items() if name != "tracker_string"}
    for name, module in perforated.items():
        tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{_plain_name(name)}.")}
        own = dendritic_tensors(module) if name in grown else module.main_module.state_dict()
        tensors |= {f"{_plain_name(name)}.{key}": value for key, value in own.items()}

    with torch.device("meta"):  # draws nothing
        copy = _without_weights(model, structure)
    copy.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
    return copy.train(model.training)


def dendritic_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a `DendriticLayer` from a module of perforatedai with dendrites.

    perforatedai keeps the `top` of every number of dendrites it ever had, (n, channels) each; the last one is used. Its
    `d2d` is a list, (i, channels) for dendrite i.
    """
    dendrites, count = module.dendrite_module, module.dendrite_modules_added
    layers = [module.main_module, *dendrites.layers]
    tensors = {"weight": torch.cat([layer.weight for layer in layers]), "top": module.dendrites_to_top[count - 1]}
    if module.main_module.bias is not None:
        tensors["bias"] = torch.cat([layer.bias for layer in layers])
    if count > 1:
        tensors["d2d"] = torch.cat([dendrites.dendrites_to_dendrites[i] for i in range(1, count)])
    return tensors


def current_activation() -> str:
    """The name of the function that perforatedai applies now, in every live model of the process.

    Raises:
        ExportError: It is none that `models/dendritic.py` knows.
    """
    from perforatedai import globals_perforatedai  # imported before now, by the live model

    function = globals_perforatedai.pc.get_pai_forward_function()
    probe = torch.linspace(-4, 4, 101)  # tells an approximation from what it approximates; a name does not
    for name, known in ACTIVATIONS.items():
        if torch.equal(function(probe), known(probe)):
            return name
    raise ExportError(f"perforatedai's activation is {function}, wanted one of {', '.join(ACTIVATIONS)}")


def _without_weights(model: PreTrainedModel, structure: dict[str, Any]) -> PreTrainedModel:
    config = model.config.to_dict()
    if not structure:
        return type(model)(type(model.config).from_dict(config))
    config.pop("model_type")
    dendritic = type(model) if isinstance(model, DendriticMixin) else DendriticASTForAudioClassification
    return dendritic(dendritic.config_class.from_dict(config | {"dendrites": structure}))


def _checked_count(name: str, module: nn.Module) -> int:
    """Dendrites of a module of perforatedai.

    Raises:
        ExportError: It is growing, or is of a kind that the exported form has not.
    """
    kind, axis = type(module.main_module), module.this_output_dimensions.tolist().index(0)
    count, layers = module.dendrite_modules_added, len(module.dendrite_module.layers)
    if count == 0 and layers == 0:
        return 0
    if count != layers:
        raise ExportError(f"{name}: {layers} dendrites, {count} in use: it is growing; export before or after")
    if kind not in LAYERS or module.processor is not None:
        raise ExportError(f"{name}: dendrites on a {kind.__name__}, wanted nn.Linear or nn.Conv2d without a processor")
    if axis - len(module.this_output_dimensions) != LAYERS[kind].channel_axis:
        raise ExportError(
            f"{name}: the neurons are on axis {axis} of the outputs {module.this_output_dimensions.tolist()}, wanted "
            f"axis {LAYERS[kind].channel_axis} for a {kind.__name__}"
        )
    inner = int(module.dendrite_module.this_node_index)  # set_this_output_dimensions leaves it at the global default
    if count > 1 and inner != axis:
        raise ExportError(f"{name}: the neurons are on axis {axis}, its dendrites add to each other on axis {inner}")
    return count


def _plain_name(name: str) -> str:
    """A name without perforatedai's wrappers around modules that it only tracks."""
    return name.replace(".main_module", "")
