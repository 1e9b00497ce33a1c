"""Networks whose listed layers carry artificial dendrites, among them an AST; needs torch and transformers only.

This file is copied into every exported model folder, where `trust_remote_code=True` runs it: it imports nothing of the
project it comes from. With n dendrites a layer computes what perforatedai's training forward computes, to the bit,

    h_i = f(dendrite_i(x) + d2d[i, 0] · h_0 + … + d2d[i, i−1] · h_(i−1))        i = 0 … n−1
    out = neuron(x) + top[0] · h_0 + … + top[n−1] · h_(n−1)

summed left to right (Brenner and Itti 2025, arXiv:2501.18018). Neuron and dendrites share one weight matrix, the
neuron's rows first: a class that knows no dendrites finds the wrong shape and refuses it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import ASTConfig, ASTForAudioClassification
from transformers import initialization as init

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "gelu": functional.gelu}
FRESH_STD = 0.01  # of a dendrite that has learned nothing, as perforatedai draws it


class DendriticLayer(nn.Module):
    """A layer with dendrites: what linear and convolution have in common.

    Args:
        plain: The layer to grow on. Its weights become the neuron's; dendrites are drawn, `top` and `d2d` are 0, so
            that the outputs stay what they were.
        count: Dendrites, at least 1.
        activation: Their activation, a key of `ACTIVATIONS`.
        one_product: Whether, in evaluation and in float32 or float64, neuron and dendrites are one matrix product: less
            overhead where a layer is narrow, and outputs that differ by at most about 1e-6 of the largest one. In
            training, under autocast and in half precision, where another order of summation may flip the last of few
            bits, each keeps its own product.

    Raises:
        ValueError: `count` or `activation` is none of these.
    """

    channel_axis: int  # of the outputs, from the end

    def __init__(self, plain: nn.Module, count: int, activation: str, one_product: bool = False):
        super().__init__()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count: found {count!r}, wanted a number of dendrites, 1 or more")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: found {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
        self.count, self.activation, self.one_product = count, activation, one_product
        self.channels = len(plain.weight)
        self.weight = _with_dendrites(plain.weight, count)
        self.bias = None if plain.bias is None else _with_dendrites(plain.bias, count)
        self.top = nn.Parameter(plain.weight.new_zeros(count, self.channels))
        pairs = count * (count - 1) // 2  # rows (1, 0), (2, 0), (2, 1), (3, 0), …
        self.d2d = nn.Parameter(plain.weight.new_zeros(pairs, self.channels)) if pairs else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The neuron's output with those of its dendrites.

        Args:
            inputs: As the plain layer takes them.

        Returns:
            As the plain layer gives them; under autocast float32, because `top` is.
        """
        activate = ACTIVATIONS[self.activation]
        out, *currents = self._products(inputs)
        activated: list[torch.Tensor] = []
        for i, current in enumerate(currents):
            for j, earlier in enumerate(activated):
                current = current + self._by_channel(self.d2d[i * (i - 1) // 2 + j]) * earlier
            activated.append(activate(current))
            out = out + self._by_channel(self.top[i]) * activated[i]
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, count={self.count}, activation={self.activation}"

    def _products(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of the neuron and of each dendrite before activation."""
        if self.one_product and self._is_exact_in_one(inputs):
            return list(self._multiply(inputs, self.weight, self.bias).split(self.channels, self.channel_axis))
        weights = self.weight.split(self.channels)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(self.channels)
        return [self._multiply(inputs, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def _is_exact_in_one(self, inputs: torch.Tensor) -> bool:
        whole = self.weight.dtype in (torch.float32, torch.float64)
        return whole and not self.training and not torch.is_autocast_enabled(inputs.device.type)

    def _by_channel(self, row: torch.Tensor) -> torch.Tensor:
        """One value a channel, (channels,), in a shape that multiplies the outputs."""
        return row if self.channel_axis == -1 else row.view(-1, *[1] * (-1 - self.channel_axis))

    def _multiply(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


class DendriticLinear(DendriticLayer):
    """`nn.Linear` with dendrites: (…, in) to (…, out)."""

    channel_axis = -1

    def __init__(self, plain: nn.Linear, count: int, activation: str, one_product: bool = False):
        super().__init__(plain, count, activation, one_product)
        self.in_features, self.out_features = plain.in_features, plain.out_features

    def _multiply(self, inputs, weight, bias):
        return functional.linear(inputs, weight, bias)


class DendriticConv2d(DendriticLayer):
    """`nn.Conv2d` with dendrites: (batch, in, height, width) to (batch, out, height, width)."""

    channel_axis = -3

    def __init__(self, plain: nn.Conv2d, count: int, activation: str, one_product: bool = False):
        if plain.padding_mode != "zeros":
            raise ValueError(f"padding_mode: found {plain.padding_mode!r}, wanted 'zeros'")
        super().__init__(plain, count, activation, one_product)
        # Model code reads and sets `stride` on its convolution, so the names stay those of nn.Conv2d.
        self.stride, self.padding, self.dilation, self.groups = (
            plain.stride,
            plain.padding,
            plain.dilation,
            plain.groups,
        )

    def _multiply(self, inputs, weight, bias):
        return functional.conv2d(inputs, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _is_exact_in_one(self, inputs):
        # Groups divide the rows of the whole matrix, so dendrites would read the wrong inputs.
        return self.groups == 1 and super()._is_exact_in_one(inputs)


LAYERS = {nn.Linear: DendriticLinear, nn.Conv2d: DendriticConv2d}


def add_dendrites(model: nn.Module, structure: dict[str, dict[str, Any]], one_product: bool = False) -> None:
    """Put dendritic layers in the place of plain ones.

    Args:
        model: Changed in place.
        structure: Module name to `{"count": dendrites, "activation": name}`.
        one_product: As in `DendriticLayer`.

    Raises:
        ValueError: A module does not exist, is neither Linear nor Conv2d, or its entry makes no sense.
    """
    modules = dict(model.named_modules())
    for name, dendrites in structure.items():
        plain = modules.get(name)
        if type(plain) not in LAYERS:
            found = "no such module" if plain is None else type(plain).__name__
            raise ValueError(f"dendrites: {name!r}: found {found}, wanted an nn.Linear or nn.Conv2d of the model")
        try:
            layer = LAYERS[type(plain)](plain, **dendrites, one_product=one_product)
        except (TypeError, ValueError) as error:
            raise ValueError(f"dendrites: {name!r}: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer.train(plain.training))


class DendriticASTConfig(ASTConfig):
    """`ASTConfig` and the dendrites.

    Args:
        dendrites: Module name to `{"count": dendrites, "activation": name}`.
        one_product: As in `DendriticLayer`; off, the logits are those of the training to the bit. A keyword of
            `from_pretrained` sets it like any other field.
    """

    model_type = "dendritic-audio-spectrogram-transformer"

    dendrites: dict | None = None
    one_product: bool = False


class DendriticMixin:
    """For a PreTrainedModel whose configuration has the fields `dendrites` and `one_product`."""

    def add_dendrites(self) -> None:
        """Put dendrites on the layers that the configuration lists; the last of the model's `__init__`."""
        add_dendrites(self, self.config.dendrites or {}, self.config.one_product)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """`PreTrainedModel.from_pretrained`, where with dendrites a tensor missing or left over is an error.

        transformers draws what is missing and warns: a model could lose its dendrites and still answer. What
        `ignore_mismatched_sizes=True` lets pass, such as a head for other classes, begins fresh as it does there.

        Raises:
            ValueError: Weights and configuration differ.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if model.config.dendrites and (info["missing_keys"] or info["unexpected_keys"]):
            raise ValueError(
                f"the weights are not those of this configuration: missing {_some(info['missing_keys'])}, left over "
                f"{_some(info['unexpected_keys'])}; config.json and model.safetensors must come from one export"
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DendriticLayer):
            init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
            for parameter in _others(module):
                init.zeros_(parameter)


class DendriticASTForAudioClassification(DendriticMixin, ASTForAudioClassification):
    """`ASTForAudioClassification` with dendrites on the layers that its configuration lists."""

    config_class = DendriticASTConfig

    def __init__(self, config: DendriticASTConfig):
        super().__init__(config)
        self.add_dendrites()


def _with_dendrites(parameter: nn.Parameter, count: int) -> nn.Parameter:
    """The neuron's rows and, below them, freshly drawn ones of `count` dendrites."""
    rows, *rest = parameter.shape
    fresh = FRESH_STD * torch.randn(count * rows, *rest, dtype=parameter.dtype, device=parameter.device)
    return nn.Parameter(torch.cat([parameter.detach(), fresh]), requires_grad=parameter.requires_grad)


def _others(layer: DendriticLayer) -> Iterator[nn.Parameter]:
    return (parameter for parameter in (layer.bias, layer.top, layer.d2d) if parameter is not None)


def _some(keys) -> str:
    keys = sorted(keys)
    return f"{', '.join(keys[:3]) or 'none'}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


# So that `save_pretrained` copies this file into the folder and names it in config.json's auto_map, every time.
DendriticASTConfig.register_for_auto_class()
DendriticASTForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
