"""Layers and models with artificial dendrites. Needs torch and transformers only.

`export_dendritic` turns a model that perforatedai grew into ordinary torch layers. This file is copied into the
folder of every model with dendrites, where `trust_remote_code=True` runs it. It imports nothing of the project that it
comes from. Beside pai_callback.py it is the second file to copy into another project.

With n dendrites a layer computes what perforatedai's training forward computes, to the bit:

    h_i = f(dendrite_i(x) + d2d[i, 0] · h_0 + … + d2d[i, i−1] · h_(i−1))        i = 0 … n−1
    out = neuron(x) + top[0] · h_0 + … + top[n−1] · h_(n−1)

summed from left to right (Brenner and Itti 2025, arXiv:2501.18018). Neuron and dendrites share one weight, the neuron
first. A class that knows no dendrites finds the wrong shape and refuses it.
"""

import copy
import functools
import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

ACTIVATIONS = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "gelu": functional.gelu,
    "identity": nn.Identity(),
}  # fmt: skip


class DendriticLayer(nn.Module):
    """A layer with dendrites.

    Args:
        plain: The layer to grow on. Its weights become the neuron's. The dendrites, `top` and `d2d` are 0, so the
            outputs stay the same.
        count: Number of dendrites, at least 1.
        activation: Their activation, a key of `ACTIVATIONS`.

    Raises:
        ValueError: If `count` or `activation` is neither.
    """

    neuron_axis = 0  # of the weight
    channel_axis = -1  # of the outputs

    def __init__(self, plain: nn.Module, count: int, activation: str):
        super().__init__()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a number of dendrites, 1 or more, got {count!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        # Model code reads and sets attributes such as `stride`.
        vars(self).update({name: value for name, value in vars(plain).items() if name not in vars(nn.Module())})
        self.count, self.activation = count, activation
        self.channels = plain.weight.shape[self.neuron_axis]
        self.weight = self._with_dendrites(plain.weight, self.neuron_axis)
        self.bias = None if plain.bias is None else self._with_dendrites(plain.bias, 0)
        self.top = nn.Parameter(plain.weight.new_zeros(count, self.channels))
        pairs = count * (count - 1) // 2  # rows (1, 0), (2, 0), (2, 1), (3, 0), …
        self.d2d = nn.Parameter(plain.weight.new_zeros(pairs, self.channels)) if pairs else None

    def _with_dendrites(self, parameter: nn.Parameter, axis: int) -> nn.Parameter:
        parts = [parameter.detach(), *[torch.zeros_like(parameter) for _ in range(self.count)]]
        return nn.Parameter(torch.cat(parts, axis), requires_grad=parameter.requires_grad)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The output of the neuron with those of its dendrites.

        Args:
            inputs: As the plain layer takes them.

        Returns:
            As the plain layer returns them. Under autocast float32, because `top` is.
        """
        weights = self.weight.split(self.channels, self.neuron_axis)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(self.channels)
        out, *currents = (self._multiply(inputs, *pair) for pair in zip(weights, biases, strict=True))
        activated: list[torch.Tensor] = []
        for i, current in enumerate(currents):
            for j, earlier in enumerate(activated):
                current = current + self._by_channel(self.d2d[i * (i - 1) // 2 + j]) * earlier
            activated.append(ACTIVATIONS[self.activation](current))
            out = out + self._by_channel(self.top[i]) * activated[i]
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, count={self.count}, activation={self.activation}"

    def _by_channel(self, row: torch.Tensor) -> torch.Tensor:
        """One value per channel, (channels,), in a shape that multiplies the outputs."""
        return row.view(-1, *[1] * (-1 - self.channel_axis))

    def _multiply(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(inputs, weight, bias)


class DendriticLinear(DendriticLayer):
    """`nn.Linear` with dendrites: (…, in) to (…, out)."""


class DendriticConv1D(DendriticLayer):
    """transformers' `Conv1D`, a linear layer with a transposed weight, with dendrites."""

    neuron_axis = 1

    def _multiply(self, inputs, weight, bias):
        outputs = torch.addmm(bias, inputs.view(-1, inputs.size(-1)), weight)
        return outputs.view(*inputs.shape[:-1], self.channels)


class DendriticConv1d(DendriticLayer):
    """`nn.Conv1d` with dendrites: (batch, in, time) to (batch, out, time)."""

    channel_axis = -2
    plain = nn.Conv1d

    def _multiply(self, inputs, weight, bias):
        return self.plain._conv_forward(self, inputs, weight, bias)


class DendriticConv2d(DendriticConv1d):
    """`nn.Conv2d` with dendrites: (batch, in, height, width) to (batch, out, height, width)."""

    channel_axis = -3
    plain = nn.Conv2d


class DendriticConv3d(DendriticConv1d):
    """`nn.Conv3d` with dendrites: (batch, in, depth, height, width) to (batch, out, depth, height, width)."""

    channel_axis = -4
    plain = nn.Conv3d


LAYERS = {
    nn.Linear: DendriticLinear, Conv1D: DendriticConv1D, nn.Conv1d: DendriticConv1d, nn.Conv2d: DendriticConv2d,
    nn.Conv3d: DendriticConv3d,
}  # fmt: skip


def draw_dendrites(weight: torch.Tensor, neuron_axis: int = 0) -> None:
    """Draw weights with a standard deviation of 1/sqrt(inputs of a neuron)."""
    inputs = weight.numel() // weight.shape[neuron_axis]
    weight.data.copy_(torch.randn(weight.shape) * inputs**-0.5)


def add_dendrites(model: nn.Module, structure: dict[str, dict[str, Any]]) -> None:
    """Replace plain layers by layers with new dendrites. The outputs of the model stay the same.

    Args:
        model: Changed in place.
        structure: Module name to `{"count": dendrites, "activation": name}`.

    Raises:
        ValueError: If a module does not exist, is of no class in `LAYERS`, or its entry makes no sense.
    """
    modules = dict(model.named_modules())
    for name, dendrites in structure.items():
        plain = modules.get(name)
        if type(plain) not in LAYERS:
            found = "no such module" if plain is None else type(plain).__name__
            raise ValueError(f"dendrites: {name!r} must be a linear or convolutional layer of the model, got {found}")
        try:
            layer = LAYERS[type(plain)](plain, **dendrites)
        except (TypeError, ValueError) as error:
            raise ValueError(f"dendrites: {name!r}: {error}") from error
        for weight in layer.weight.split(layer.channels, layer.neuron_axis)[1:]:
            draw_dendrites(weight, layer.neuron_axis)
        model.set_submodule(name, layer.train(plain.training))


class DendriticMixin:
    """For a `PreTrainedModel` whose configuration may list dendrites in a field `dendrites`."""

    def add_dendrites(self) -> None:
        """Put dendrites on the layers that the configuration lists; the last call in the model's `__init__`."""
        add_dendrites(self, getattr(self.config, "dendrites", None) or {})

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """`PreTrainedModel.from_pretrained`, where a tensor that is missing or left over is an error.

        transformers draws missing tensors and warns, so a model could lose its dendrites and still answer. What
        `ignore_mismatched_sizes=True` allows, such as a head for other classes, starts from new weights as usual.

        Raises:
            ValueError: If the weights do not fit the configuration.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if getattr(model.config, "dendrites", None) and (info["missing_keys"] or info["unexpected_keys"]):
            raise ValueError(
                f"the weights do not fit the configuration: missing {_some(info['missing_keys'])}, left over "
                f"{_some(info['unexpected_keys'])}; config.json and model.safetensors must come from one export"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DendriticLayer):
            init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
            for parameter in (module.bias, module.top, module.d2d):
                if parameter is not None:
                    init.zeros_(parameter)


def _some(keys) -> str:
    keys = sorted(keys)
    return f"{', '.join(keys[:3]) or 'none'}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


@functools.cache
def __getattr__(name: str) -> type:
    """`Dendritic<class>` for any configuration or model class of transformers, made when it is first asked for.

    config.json names it in `auto_map`, so that the Auto classes find it in this file. The configuration has the type
    `dendritic-<stock type>` and the field `dendrites`, and the model has the dendrites that the field lists.
    """
    stock = getattr(transformers, name.removeprefix("Dendritic"), None) if name.startswith("Dendritic") else None
    settings = {"__module__": __name__, "__doc__": f"`{name.removeprefix('Dendritic')}` with dendrites."}
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        fields = {"__annotations__": {"dendrites": dict | None}, "dendrites": None}
        made = type(name, (stock,), settings | fields | {"model_type": f"dendritic-{stock.model_type}"})
        made.register_for_auto_class()
        return made
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):

        def build(self, config, *args, **kwargs):
            stock.__init__(self, config, *args, **kwargs)
            self.add_dendrites()

        config_class = __getattr__(f"Dendritic{stock.config_class.__name__}")
        made = type(name, (DendriticMixin, stock), settings | {"config_class": config_class, "__init__": build})
        made.register_for_auto_class(_auto_classes(stock)[0])
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _auto_classes(stock: type[PreTrainedModel]) -> list[str]:
    """The names of transformers' Auto classes that load a model class."""
    found = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and auto._model_mapping is not None:
            classes = auto._model_mapping.get(stock.config_class, ())
            if stock in (classes if isinstance(classes, (list, tuple)) else [classes]):
                found.append(name)
    return found or ["AutoModel"]


def perforated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that perforatedai has wrapped, by name."""
    # perforatedai is not imported, because it prints, and because it need not be installed.
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "PAINeuronModule"}


def structure_of(model: nn.Module) -> dict[str, int]:
    """The number of dendrites of each layer that perforatedai has wrapped."""
    return {name: module.dendrite_modules_added for name, module in perforated_layers(model).items()}


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model without dendrites and perforatedai's scaffolding."""
    added = re.compile(r"\.(dendrite_module|dendrites_to_top)\.")
    return [parameter for name, parameter in model.named_parameters() if not added.search(name)]


def dendrite_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter, int]]:
    """The parameters of all dendrites that are trained, by name.

    Each comes with the parameter of the layer that has its learning rate, and with the number of the newest dendrite
    that it belongs to.
    """
    found = {}
    for name, module in perforated_layers(model).items():
        main = dict(module.main_module.named_parameters())
        for key, parameter in module.named_parameters():
            if parameter.requires_grad and not key.startswith("main_module."):
                number, own = re.search(r"\.(\d+)\.?(\w*)$", key).groups()  # of layers.0.bias or dendrites_to_top.0
                found[f"{name}.{key}"] = (parameter, main[own or "weight"], int(number))
    return found


def growth_fault(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer cannot take the parameters of new dendrites while it trains. None if it can.

    A copy of the optimizer takes two steps on small parameters. One that it has not seen joins the second.
    """
    old = next(parameter for group in optimizer.param_groups for parameter in group["params"])
    first, joining = (nn.Parameter(torch.ones(2, 2, dtype=old.dtype, device=old.device)) for _ in range(2))
    first.grad, joining.grad = torch.ones_like(first), torch.ones_like(first)
    group, trial = {**optimizer.param_groups[0], "lr": 1.0}, object.__new__(type(optimizer))
    vars(trial).update(vars(optimizer), state=defaultdict(dict), param_groups=[group])
    try:
        getattr(trial, "train", bool)()  # a schedule-free optimizer steps in this mode only
        for parameters in ([first], [first, joining]):
            group["params"] = parameters
            type(optimizer).step(trial)  # a scheduler has replaced `step` of the object
    except Exception as error:  # whatever the library of the optimizer raises
        return repr(error)
    return "they stay as they are" if (joining == 1).all() else None


def export_dendritic(model: nn.Module, activation: str | None = None) -> nn.Module:
    """A copy of a model that perforatedai grew, made of ordinary torch layers. It computes the same, to the bit.

    Of a `PreTrainedModel` of transformers the copy is a `Dendritic<class>`. Its `save_pretrained` writes a folder that
    `from_pretrained(..., trust_remote_code=True)` and `pipeline` load without perforatedai and without this project.
    Any other module is of its own class. A model on which nothing has grown is a plain one.

    Args:
        model: Left as it is.
        activation: Activation of the dendrites. Needed only if no `PAICallback` grew them.

    Raises:
        ValueError: If dendrites are growing, or a layer is of no class in `LAYERS`.
    """
    copies: dict[int, nn.Module] = {}
    structure = {}
    for name, module in perforated_layers(model).items():
        count = module.dendrite_modules_added
        if type(module.main_module) not in LAYERS or len(module.dendrite_module.layers) != count:
            raise ValueError(f"{name}: {type(module.main_module).__name__} cannot be exported, or is growing now")
        copies[id(module)] = copy.deepcopy(module.main_module)
        if count:
            structure[name] = {"count": count, "activation": activation or module.activation}
            copies[id(module)] = _exported(module, structure[name])
    exported = copy.deepcopy(model, copies)
    exported.__dict__.pop("save_pretrained", None)  # of a live model
    exported._buffers.pop("tracker_string", None)  # perforatedai's
    if isinstance(exported, PreTrainedModel) and structure:
        exported.config.dendrites = structure
        stock = type(exported)
        if getattr(transformers, stock.__name__, None) is stock:
            exported.__class__ = __getattr__(f"Dendritic{stock.__name__}")
            exported.config.__class__ = exported.config_class  # shared with the model's parts
            exported.config.auto_map = {
                auto: f"{__name__.split('.')[-1]}.{type(exported).__name__}" for auto in _auto_classes(stock)
            }
        elif not isinstance(exported, DendriticMixin):
            logger.warning(
                f"{stock.__name__} is no class of transformers: from_pretrained does not know its dendrites. Give it "
                f"{__name__}.DendriticMixin, or build the model and call add_dendrites(model, config.dendrites)"
            )
    return exported


def export_when_saved(model: nn.Module) -> None:
    """Let `save_pretrained` of a model that perforatedai grows write the model that `export_dendritic` makes of it."""

    def save_pretrained(folder: str | Path, state_dict: dict | None = None, **kwargs) -> None:
        export_dendritic(model).save_pretrained(folder, **kwargs)

    if isinstance(model, PreTrainedModel):
        model.save_pretrained = save_pretrained


def _exported(module: nn.Module, dendrites: dict[str, Any]) -> DendriticLayer:
    """A layer of perforatedai with dendrites as a `DendriticLayer`.

    perforatedai keeps the `top` of every number of dendrites it ever had, (n, channels) each, and uses the last one.
    Its `d2d` is a list with (i, channels) for dendrite i.
    """
    layers, inner = [module.main_module, *module.dendrite_module.layers], module.dendrite_module
    layer = LAYERS[type(module.main_module)](module.main_module, **dendrites)
    tensors = {
        "weight": torch.cat([one.weight for one in layers], layer.neuron_axis),
        "top": module.dendrites_to_top[-1],
    }
    if layer.bias is not None:
        tensors["bias"] = torch.cat([one.bias for one in layers])
    if layer.d2d is not None:
        tensors["d2d"] = torch.cat(list(inner.dendrites_to_dendrites)[1 : layer.count])
    layer.load_state_dict(tensors)
    return layer.train(module.training)
