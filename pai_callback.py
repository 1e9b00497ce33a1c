"""PerforatedAI dendrites in any Hugging Face Trainer. Copy this file and dendritic.py beside your training script.

    callback = PAICallback(PAIConfig(modules=["classifier.dense", "layers.-1.mlp.*"], max_dendrites=1))
    trainer = PAITrainer(model=model, args=args, ..., callbacks=[callback])
    trainer.train()
    trainer.save_model()  # a folder that from_pretrained and pipeline load, with trust_remote_code=True

A dendrite is a fresh copy of a layer. Its activated output is added to the output of the layer, neuron by neuron,
through weights that start at zero, called `top`. Growth therefore leaves the logits as they are, and the training
continues with more parameters.

The callback chooses the layers, grows dendrites, updates the optimizer, and reports what it does. A plain `Trainer` in
one process needs nothing else. `PAITrainer`, or `PAITrainerMixin` in front of your own Trainer class, adds several
processes, `load_best_model_at_end`, exact resumption, and growth in TensorBoard. What any Trainer saves of a
`PreTrainedModel` needs neither perforatedai nor this file; of another module, save `export_dendritic(trainer.model)`.

The file has five rooms: configuration; choosing layers; perforatedai, contained; structure, optimizer, DDP; callback
and Trainer mixin. It needs torch, transformers, accelerate and perforatedai (tested with 3.2.9).
"""

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import importlib.util
import io
import itertools
import json
import logging
import pdb
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.state import AcceleratorState
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback

try:
    from dendritic import ACTIVATIONS, LAYERS, draw_dendrites, export_dendritic
except ModuleNotFoundError:  # in the project that this file comes from
    from audio_dendrites.models.dendritic import ACTIVATIONS, LAYERS, draw_dendrites, export_dendritic

logger = logging.getLogger(__name__)
say = functools.partial(print, flush=True)

STATE_FILE = "pai_state.json"  # in a checkpoint: the structure, and the score that has not been acted on
BEST_FILE = "pai_best.safetensors"  # in a checkpoint: the best weights so far, which growth starts from
TOP_MOVED = 0.01  # mean of |top| below which dendrites are hardly used: their outputs are smaller than those of neurons
AST_MODULES = ["classifier.dense", "layers.-1.mlp.*"]
# The settings of perforatedai itself and of older versions of this file, in YAML `preset: perforatedai`.
PERFORATEDAI = {
    "schedule": "history", "max_dendrites": 3, "last_growth": 1, "activation": "sigmoid", "initial_scale": 0.01,
    "top_learning_rate": 1,
}  # fmt: skip
UNSPLIT = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU")  # ways to train with whole parameters


class PAIError(RuntimeError):
    """Dendrites cannot grow as requested. The message says what to change."""


# ---- Room 1: configuration ----


def _option(default: Any, text: str, interval: str | None = None) -> Any:
    return field(default=default, metadata={"help": text, "range": interval})


@strict
@dataclass
class PAIConfig:
    """Which layers grow dendrites, when, and how they learn.

    The defaults make dendrites learn. They were found in small models that train from random weights. Each of them
    alone changes little. Together they help where a small model lacks capacity.

    - Growth in the first fifth of the steps (`schedule: early`), so that dendrites train for most of the schedule.
    - A nonlinear feature to begin with: `activation: gelu` (Hendrycks and Gimpel 2016, arXiv:1606.08415) and
      `initial_scale: fan_in`, a standard deviation of 1/sqrt(inputs) with biases of 0 (LeCun et al. 1998, "Efficient
      BackProp"). With perforatedai's sigmoid and 0.01 the output of a new dendrite is nearly constant.
    - `top_learning_rate: 10`: the weights that start at zero learn faster than the layer, without weight decay, as in
      LoRA+ (Hayou et al. 2024, arXiv:2402.12354).
    - `last_growth: 0.5`: dendrites that grow later have too few steps to learn.

    `PERFORATEDAI` has perforatedai's own defaults (Brenner and Itti 2025, arXiv:2501.18018).
    """

    modules: list[str] | None = _option(
        None,
        "Layers by name, by the end of their name, or by class, with wildcards. A negative number counts blocks from "
        "the end: 'layers.-1.mlp.*'. Default: AST's classifier and the MLP of the last block.",
    )
    max_dendrites: int = _option(1, "Dendrites that a layer may grow; 0 trains the plain model.", "[0, inf)")
    schedule: Literal["early", "history", "fixed"] = _option(
        "early",
        "early: grow at fixed steps, without a metric. history: grow when the metric has not improved for `patience` "
        "evaluations. fixed: grow every `interval` evaluations. The last two go back to the best weights first.",
    )
    first_growth: float | int = _option(0.1, "early: share of the steps before each dendrite of a layer.", "[0, 1)")
    last_growth: float | int = _option(0.5, "Share of the steps after which nothing grows.", "(0, 1]")
    patience: int = _option(5, "history: evaluations without improvement before growth.", "[1, inf)")
    interval: int = _option(10, "fixed: evaluations between growth.", "[1, inf)")
    tries: int = _option(2, "history, fixed: growth ends when dendrites did not help this many times.", "[1, inf)")
    metric: str | None = _option(None, "history, fixed: what decides. Default: metric_for_best_model, or eval_loss.")
    improvement: float | int = _option(0.001, "history, fixed: share by which the metric must improve.", "[0, 1)")
    stop_when_complete: bool = _option(True, "history, fixed: stop the training when growth has ended.")
    activation: Literal["sigmoid", "tanh", "relu", "gelu", "identity"] = _option("gelu", "identity is a control.")
    initial_scale: float | int | Literal["fan_in"] = _option("fan_in", "Standard deviation of new weights.", "(0, inf)")
    top_learning_rate: float | int = _option(10, "Learning rate of `top`, as a multiple of its layer's.", "(0, inf)")
    dendrite_learning_rate: float | int | None = _option(
        None,
        "Learning rate of dendrites, for layers that are frozen or learn slowly. `top` learns at `top_learning_rate` "
        "times this. Default: the learning rate of the layer.",
        "(0, inf)",
    )

    def __post_init__(self):
        for one in dataclasses.fields(self):
            value, interval = getattr(self, one.name), one.metadata["range"]
            if interval is not None and isinstance(value, (int, float)):
                low, high = map(float, interval[1:-1].split(","))
                ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
                if not (low < value < high or value in ends):
                    raise PAIError(f"pai: {one.name} must be in {interval}, got {value}")
        if self.schedule == "early" and self.max_dendrites * self.first_growth > self.last_growth:
            raise PAIError(
                f"pai: max_dendrites times first_growth must be at most last_growth ({self.last_growth}), got "
                f"{self.max_dendrites} times {self.first_growth}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PAIConfig":
        """A configuration from a mapping, for example from a block of YAML.

        Args:
            values: Fields by name. `preset: perforatedai` gives the others the defaults of `PERFORATEDAI`.

        Raises:
            PAIError: If a field is unknown or a value does not fit its field.
        """
        number = re.compile(r"[\d.]+e[-+]?\d+")  # YAML reads 1e-4 as a text
        values = {k: float(v) if isinstance(v, str) and number.fullmatch(v) else v for k, v in values.items()}
        if (preset := values.pop("preset", None)) is not None:
            if preset != "perforatedai":
                raise PAIError(f"pai: preset must be perforatedai, got {preset!r}")
            values = PERFORATEDAI | values
        known = [one.name for one in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise PAIError(f"pai: unknown field {name!r}{_near(name, known)}; the fields are {', '.join(known)}")
        try:
            return cls(**values)
        except StrictDataclassError as error:
            raise PAIError(f"pai: {' '.join(str(error).split())}") from error


def _near(found: str, known: list[str]) -> str:
    near = difflib.get_close_matches(found, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


# ---- Room 2: choosing layers ----


class Layer(NamedTuple):
    """A layer that can grow dendrites: its live name, the shape of its output, and the axis that counts the neurons."""

    name: str
    shape: tuple[int, ...]
    axis: int


def choose_layers(model: nn.Module, config: PAIConfig) -> list[str]:
    """The live names of the layers that `config` chooses, in the order of the model.

    Raises:
        PAIError: If a pattern matches no layer of the model.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = AST_MODULES if config.modules is None else config.modules
    chosen = set().union(*(_matching(pattern, modules) for pattern in patterns))
    if not chosen:
        raise PAIError("pai: modules must name at least one layer, got an empty list")
    homes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)
    for names in homes.values():
        if len(names) > 1 and {name.rpartition(".")[0] for name in names} & chosen:
            raise PAIError(f"pai: modules must not share weights, but {' and '.join(names)} are one; leave them out")
    return [name for name in modules if name in chosen]


def _matching(pattern: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that a pattern matches. Other modules that it matches are left out."""
    aliases = {name: (name, _from_the_end(name, modules), type(module).__name__) for name, module in modules.items()}
    named = {
        name
        for name, all_names in aliases.items()
        if any(fnmatch.fnmatchcase(alias, end) for alias in all_names for end in (pattern, f"*.{pattern}"))
    }
    if found := {name for name in named if type(modules[name]) in LAYERS}:
        return found
    if named:
        kinds = sorted({type(modules[name]).__name__ for name in named})
        raise PAIError(f"pai: modules must name linear or convolutional layers, got {pattern!r} ({', '.join(kinds)})")
    parts = pattern.count(".") + 1
    ends = sorted({".".join(alias.split(".")[-parts:]) for all_names in aliases.values() for alias in all_names})
    raise PAIError(f"pai: modules must name layers of the model, got {pattern!r}{_near(pattern, ends)}")


def _from_the_end(name: str, modules: Mapping[str, nn.Module]) -> str:
    """'layers.-1.mlp.fc1' for 'layers.11.mlp.fc1' in a model with twelve blocks."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        parent = modules.get(".".join(name.split(".")[:place]))
        if part.isdigit() and parent is not None:
            parts[place] = str(int(part) - len(parent._modules))
    return ".".join(parts)


@torch.no_grad()
def probe_layers(model: nn.Module, batch: Mapping[str, Any], names: list[str]) -> list[Layer]:
    """Run the model once to see what the layers output. The model stays as it is.

    Args:
        model: A model without dendrites.
        batch: A few examples, as keyword arguments of the model's forward.
        names: Live names of layers.

    Raises:
        PAIError: If the model never calls a layer.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: shapes.update({name: tuple(output.shape)})
        )
        for name in names
    ]
    training = model.training
    model.eval()  # batch statistics stay as they are
    try:
        model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if unused := [name for name in names if name not in shapes]:
        raise PAIError(f"pai: modules: the model's forward never calls {', '.join(unused)}; leave it out")
    spatial = {name: len(getattr(model.get_submodule(name), "kernel_size", ())) for name in names}
    return [Layer(name, shapes[name], len(shapes[name]) - 1 - spatial[name]) for name in names]


def _few_examples(dataloader, device: torch.device) -> dict[str, Any]:
    """The first two examples as a batch without labels. The loader itself is not read, so that its order stays."""
    batch = dataloader.collate_fn(list(itertools.islice(iter(dataloader.dataset), 2)))
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", "label", "label_ids")
    }


# ---- Room 3: perforatedai, contained. Everything that touches the library is here. ----


class _Prompted(BaseException):
    """perforatedai asked for input. This is no Exception, because perforatedai would catch it."""


def _prompted(*args, **kwargs):
    raise _Prompted("it asked for input")


def _perforatedai():
    """perforatedai's modules globals and utils. The import is slow and prints, so it happens at first use."""
    with contextlib.redirect_stdout(io.StringIO()):
        from perforatedai import globals_perforatedai, utils_perforatedai
    return globals_perforatedai, utils_perforatedai


@contextlib.contextmanager
def _contained(doing: str) -> Iterator[None]:
    """What perforatedai prints goes to the log. Where it would open a debugger, ask or exit, this raises an error.

    Raises:
        PAIError: If perforatedai gives up. The message has what it printed.
    """
    output, stdin, set_trace = io.StringIO(), sys.stdin, pdb.set_trace
    sys.stdin, pdb.set_trace = io.StringIO(), _prompted
    sys.stdin.readline = _prompted
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PAIError:
        raise
    except (_Prompted, SystemExit, Exception) as error:
        printed = output.getvalue().strip()[-2000:] or "nothing"
        raise PAIError(f"perforatedai failed while {doing}: {error!r}. It printed: {printed}") from error
    finally:
        sys.stdin, pdb.set_trace = stdin, set_trace
    logger.debug("perforatedai: %s", output.getvalue())


@contextlib.contextmanager
def _private_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`. Afterwards all generators continue as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@torch._dynamo.disable
def _use_activation(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook: perforatedai reads the activation from a variable that all layers of all models share."""
    _perforatedai()[0].pc.set_pai_forward_function(ACTIVATIONS[module.activation])


def perforated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that perforatedai has wrapped, by live name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "PAINeuronModule"}


def structure_of(model: nn.Module) -> dict[str, int]:
    """The number of dendrites of each perforated layer of a live model."""
    return {name: module.dendrite_modules_added for name, module in perforated_layers(model).items()}


def _configure(config: PAIConfig, layers: list[Layer], parameter: nn.Parameter) -> None:
    """Give perforatedai its settings. They are module variables, so another training may have changed them."""
    settings = {
        "configuration_confirmed": True, "unwrapped_modules_confirmed": True, "weight_decay_accepted": True,
        "testing_dendrite_capacity": False, "silent": True, "modules_to_perforate": [],
        "module_names_to_perforate": [], "module_ids_to_perforate": [f".{layer.name}" for layer in layers],
        "output_dimensions": [-1, -1, 0],
        "device": parameter.device, "use_cuda": parameter.device.type == "cuda", "d_type": parameter.dtype,
        "candidate_weight_initialization_multiplier": 1.0 if config.initial_scale == "fan_in" else config.initial_scale,
        "pai_forward_function": ACTIVATIONS[config.activation],
    }  # fmt: skip
    globals_pai = _perforatedai()[0]
    globals_pai.pc.__init__()
    for name, value in settings.items():
        getattr(globals_pai.pc, f"set_{name}")(value)


def _perforate(model: nn.Module, layers: list[Layer], config: PAIConfig) -> None:
    """Wrap the layers, without dendrites so far. Parameters keep their identity, and the model computes the same."""
    globals_pai, utils = _perforatedai()
    first = next(model.get_submodule(layers[0].name).parameters())
    with _contained("wrapping the layers"):
        # perforatedai reads settings from the working directory, and writes its own there.
        with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
            _configure(config, layers, first)
            globals_pai.pai_tracker = []
            utils.perforate_model(model, save_name="PAI", making_graphs=False)
            globals_pai.pai_tracker = []
        wrapped = perforated_layers(model)
        for layer in layers:
            module = wrapped[layer.name]
            module.set_this_output_dimensions([0 if place == layer.axis else -1 for place in range(len(layer.shape))])
            _set_up_arrays(module, layer)
            module.activation = config.activation
            module.register_forward_pre_hook(_use_activation)
    model.to(first.device)
    _tidy(model)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = functools.partial(_save_pretrained, model)


def _save_pretrained(model: PreTrainedModel, folder: str | Path, state_dict: Mapping | None = None, **kwargs) -> None:
    """`save_pretrained` of a live model: writes a folder that needs neither perforatedai nor this file."""
    export_dendritic(model).save_pretrained(folder, **kwargs)


def _set_up_arrays(module: nn.Module, layer: Layer) -> None:
    """Do what perforatedai would do, and check, in the first backward pass."""
    module.dendrite_module.this_node_index.fill_(layer.axis)
    for values in module.dendrite_module.dendrite_values:
        values.setup_arrays([size if place == layer.axis else 1 for place, size in enumerate(layer.shape)])
        values.current_d_init[0] = 1
    module._fb_init_done = True


def _grow_to(model: nn.Module, layers: list[Layer], config: PAIConfig, dendrites: int, anew: bool = False) -> None:
    """Add dendrites until each layer has this number. `anew` first removes the present ones; their weights are lost."""
    utils, wrapped = _perforatedai()[1], perforated_layers(model)
    parameter = next(model.parameters())
    with _contained("adding dendrites"):
        _configure(config, layers, parameter)
        for layer in layers:
            module = wrapped[layer.name]
            if anew:
                module.clear_dendrites()
                _set_up_arrays(module, layer)
            present = module.dendrite_modules_added
            utils.simulate_cycles(module, 2 * (dendrites - present), True)
            if config.initial_scale == "fan_in":
                for new in module.dendrite_module.layers[present:]:
                    draw_dendrites(new.weight, LAYERS[type(new)].neuron_axis)
                    if new.bias is not None:
                        new.bias.data.zero_()
    model.to(parameter.device)
    _tidy(model)


def _tidy(model: nn.Module) -> None:
    """Train only what the forward pass uses, and remove the tracker from the model.

    perforatedai leaves scaffolding trainable. DDP would wait for its gradients forever.
    """
    for module in perforated_layers(model).values():
        inner = module.dendrite_module
        inner.parent_module.requires_grad_(False)
        inner.dendrites_to_candidates.requires_grad_(False)
        inner.layers.requires_grad_(True)
        for number, weights in enumerate(inner.dendrites_to_dendrites):
            weights.requires_grad_(number > 0)
        for number, weights in enumerate(module.dendrites_to_top):
            weights.requires_grad_(number == len(module.dendrites_to_top) - 1)
    model._buffers.pop("tracker_string", None)
    model.__dict__.pop("member_vars", None)


# ---- Room 4: structure, optimizer, DDP ----


def _dendrite_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter, int]]:
    """The trained parameters of all dendrites by live name.

    Each comes with the parameter of the layer that has its learning rate, and with the number of the newest dendrite
    that it belongs to.
    """
    found = {}
    for name, module in perforated_layers(model).items():
        main, inner = dict(module.main_module.named_parameters()), module.dendrite_module
        for number, layer in enumerate(inner.layers):
            for key, parameter in layer.named_parameters():
                found[f"{name}.dendrite_module.layers.{number}.{key}"] = (parameter, main[key], number)
        for number, weights in list(enumerate(inner.dendrites_to_dendrites))[1:]:
            found[f"{name}.dendrite_module.dendrites_to_dendrites.{number}"] = (weights, main["weight"], number)
        for number, weights in list(enumerate(module.dendrites_to_top))[-1:]:
            found[f"{name}.dendrites_to_top.{number}"] = (weights, main["weight"], number)
    return found


def _own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a live model without dendrites and perforatedai's scaffolding."""
    ours = re.compile(r"\.(dendrite_module|dendrites_to_top)\.")
    return [parameter for name, parameter in model.named_parameters() if not ours.search(name)]


def _inner_optimizer(optimizer) -> torch.optim.Optimizer:
    """torch's optimizer inside accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _add_groups(optimizer, config: PAIConfig, scheduler=None) -> None:
    """Add empty groups to the optimizer for what learns at a rate of its own: for each group one for its `top`.

    They exist from the first step, so that the scheduler and the checkpoints always have the same number of groups.
    """
    inner, own_rate = _inner_optimizer(optimizer), config.dendrite_learning_rate
    kinds = {"top": config.top_learning_rate} | ({} if own_rate is None else {"dendrites": 1})
    if any("pai" in group for group in inner.param_groups) or kinds == {"top": 1}:
        return
    for place, kind in itertools.product(range(len(inner.param_groups)), kinds):
        group = inner.param_groups[place]
        initial = group.get("initial_lr", group["lr"])
        rate = kinds[kind] * (initial if own_rate is None else own_rate)
        now = rate * group["lr"] / initial if initial else rate
        new = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        new |= {"params": [], "lr": now, "pai": [kind, place]} | ({"initial_lr": rate} if "initial_lr" in group else {})
        inner.add_param_group(new | ({"weight_decay": 0.0} if kind == "top" else {}))
        for name in ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs"):  # a scheduler that was made before
            if values := getattr(scheduler, name, None):
                values.append({"base_lrs": rate, "_last_lr": now}.get(name, values[place]))


def _sync_optimizer(
    optimizer, model: nn.Module, weight_decay: float, before: Mapping[str, dict], newest: int | None
) -> None:
    """Put the present dendrites into the groups of the same optimizer object. Scheduler and accelerate refer to it.

    A parameter of a dendrite joins the group of the layer's own parameter, or the group that `_add_groups` made for it.
    In a group the model's own parameters come first, in their order, and then the dendrites, so that a resume finds the
    same order. The state `before` is kept, except that of the `newest` dendrites, which have no past.
    """
    inner, dendrites = _inner_optimizer(optimizer), _dendrite_parameters(model)
    own = {id(parameter) for parameter in _own_parameters(model)}
    plain = [group for group in inner.param_groups if "pai" not in group]
    special = {tuple(group["pai"]): group for group in inner.param_groups if "pai" in group}
    home = {id(p): place for place, group in enumerate(plain) for p in group["params"]}
    for group in inner.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]
    for parameter in [parameter for parameter in inner.state if id(parameter) not in own]:
        del inner.state[parameter]
    for name, (parameter, source, number) in dendrites.items():
        decay = weight_decay if parameter.dim() > 1 else 0.0
        fitting = [place for place, group in enumerate(plain) if group.get("weight_decay") == decay] or [len(plain) - 1]
        # The layer may be frozen. The last group is in the usual order the nearest to the head.
        place, kind = home.get(id(source), fitting[-1]), "top" if ".dendrites_to_top." in name else "dendrites"
        special.get((kind, place), plain[place])["params"].append(parameter)
        if name in before and number != newest:
            inner.state[parameter] = before[name]
    inner.zero_grad(set_to_none=True)


def _rewrap(wrapper: nn.Module) -> None:
    """Start DDP again inside the same wrapper, which the Trainer's loop refers to. All ranks get rank 0's weights."""
    wrapper = getattr(wrapper, "_orig_mod", wrapper)  # torch.compile's
    names = (
        "device_ids", "output_device", "dim", "broadcast_buffers", "process_group", "find_unused_parameters",
        "gradient_as_bucket_view", "static_graph", "mixed_precision",
    )  # fmt: skip
    settings = {name: getattr(wrapper, name) for name in names}
    training, bucket_cap_mb = wrapper.training, wrapper.bucket_bytes_cap // 2**20 or None
    wrapper.reducer._remove_autograd_hooks()
    DistributedDataParallel.__init__(wrapper, wrapper.module, bucket_cap_mb=bucket_cap_mb, **settings)
    wrapper.train(training)


# ---- Room 5: callback and Trainer mixin ----


def _judge(history: list[dict[str, Any]], config: PAIConfig, greater_is_better: bool) -> tuple[bool, str]:
    """What follows from the evaluations in `history`. perforatedai's own tracker comes to the same decisions.

    Returns:
        Whether the last model is the best so far, and the event: "grown" (the best model gets one more dendrite),
        "retried" (the same, because the newest dendrites did not help), "complete" (the best model stays) or "".
    """
    sign = 1 if greater_is_better else -1

    def beats(score: float, other: float | None) -> bool:
        better = other is None or sign * (score * (1 - sign * config.improvement) - other) > 0
        return better and not np.isnan(score) and (other is None or sign * (score - sign * 1e-5 - other) > 0)

    best = best_since_growth = None
    is_best = helped = False
    waited = retried = 0
    for entry in history:
        waited, is_best = waited + 1, False
        if beats(entry["metric"], best_since_growth):
            waited, best_since_growth, is_best = 0, entry["metric"], beats(entry["metric"], best)
        if is_best:
            best, helped = entry["metric"], True
        if entry["event"] in ("grown", "retried"):
            retried += entry["event"] == "retried"
            waited, best_since_growth, helped = 0, None, False
    if waited < config.patience if config.schedule == "history" else len(history) % config.interval:
        return is_best, ""
    if helped:
        return is_best, "complete" if history[-1]["evaluated_dendrites"] == config.max_dendrites else "grown"
    return is_best, "retried" if retried + 1 < config.tries else "complete"


class PAICallback(TrainerCallback):
    """Grows dendrites while a Trainer trains.

    Args:
        config: What grows and when. A mapping must have the fields of `PAIConfig`.

    Attributes:
        history: One entry per evaluation: step, metric, dendrites, parameters, and the event that followed ("",
            "grown", "retried", "complete").
        complete: Whether growth has ended.
    """

    def __init__(self, config: PAIConfig | Mapping[str, Any] | None = None):
        self.config = PAIConfig.from_dict(config) if isinstance(config, Mapping) else config or PAIConfig()
        installed = [importlib.util.find_spec(name) is not None for name in ("perforatedai", "perforatedbp")]
        if self.grows and installed != [True, False]:
            raise PAIError("dendrites need perforatedai (pip install perforatedai==3.2.9) without perforatedbp")
        self.trainer: Trainer | None = None  # set by PAITrainerMixin
        self.history: list[dict[str, Any]] = []
        self.complete = False
        self._layers: list[Layer] = []
        self._pending: dict[str, Any] | None = None  # an evaluation that has not been acted on
        self._names_seen: set[str] = set()  # of metrics
        self._best: dict[str, torch.Tensor] = {}  # weights of the best model so far

    @property
    def grows(self) -> bool:
        """Whether the configuration lets anything grow."""
        return self.config.max_dendrites > 0

    @property
    def active(self) -> bool:
        """Whether the model is wrapped."""
        return bool(self._layers)

    # Events of the Trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if not self.grows and not self.active:
            return
        self._check_run(args, state, model, _inner_optimizer(optimizer))
        if not self.active:
            self._start(args, model, kwargs["train_dataloader"])
        _add_groups(optimizer, self.config, lr_scheduler)

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if self.active and not self.complete and state.global_step > 0:
            self._names_seen |= set(metrics)
            if self._metric(args) in metrics:
                self._pending = self._entry(state.global_step, metrics[self._metric(args)], model)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._act(args, state, control, model, optimizer)

    on_save = on_step_begin  # the checkpoint just written holds the evaluated weights, so that a resume grows the same

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.complete and self.config.stop_when_complete:
            model.load_state_dict(self._best)  # the loop looks at should_training_stop only after one more step
        grown = [entry["step"] for entry in self.history if entry["event"] in ("grown", "retried")]
        if grown and state.global_step == grown[-1] + max(1, state.max_steps // 10):
            self._check_top(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._pending is not None:
            self.history.append(self._pending)
            self._log(state, self._pending)
            self._pending = None
        if self.active and self.trainer is None and not isinstance(model, PreTrainedModel):
            logger.warning(
                "The model has layers of perforatedai. Save a model of torch: export_dendritic(trainer.model)"
            )

    # Start

    def _check_run(self, args, state, model: nn.Module, optimizer) -> None:
        """Raises PAIError if the training asks for something that dendrites do not allow."""
        kind = str(getattr(AcceleratorState._shared_state.get("distributed_type"), "value", "NO"))
        split = args.n_gpu > 1 or args.fsdp or args.deepspeed
        groups = [] if isinstance(optimizer, torch.optim.LBFGS) else getattr(optimizer, "param_groups", [])
        held = {id(parameter) for group in groups for parameter in group["params"]}
        faults = {
            "nn.DataParallel, FSDP and DeepSpeed cannot follow growth: start one process per device with torchrun "
            "--nproc_per_node, or use one device with CUDA_VISIBLE_DEVICES=0": split or kind not in UNSPLIT,
            "load_best_model_at_end, resume_from_checkpoint and several processes need PAITrainer instead of Trainer, "
            "or PAITrainerMixin in front of your own Trainer class": self.trainer is None
            and (args.load_best_model_at_end or state.global_step > 0 or args.world_size > 1),
            "auto_find_batch_size starts the training twice: set the batch size yourself": args.auto_find_batch_size,
            f"eval_strategy must be steps or epoch, because growth follows {self._metric(args)}, got no": (
                self.config.schedule != "early" and args.eval_strategy == "no"
            ),
            f"the optimizer {type(optimizer).__name__} cannot take new parameters, or does not hold all trained ones: "
            "use adamw_torch, or another one with a state per parameter": any(
                parameter.requires_grad and id(parameter) not in held for parameter in model.parameters()
            ),
        }
        for fault, found in faults.items():
            if found:
                raise PAIError(f"with dendrites, {fault}")

    def _start(self, args, model: nn.Module, dataloader) -> None:
        if perforated_layers(model):
            raise PAIError("the model has dendrites of another training; start from a plain model, or resume")
        names = choose_layers(model, self.config)
        with _private_random_state(args.seed, args.device):
            self._layers = probe_layers(model, _few_examples(dataloader, args.device), names)
            _perforate(model, self._layers, self.config)
        if args.should_save:
            how = f"{self.config.schedule}, {self.config.activation}"
            say(f"Dendrites: up to {self.config.max_dendrites} per layer ({how}) on {', '.join(names)}")

    def _metric(self, args) -> str:
        name = self.config.metric or args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    def _is_greater_better(self, args) -> bool:
        if self.config.metric in (None, args.metric_for_best_model) and args.greater_is_better is not None:
            return args.greater_is_better
        return not self._metric(args).endswith("loss")

    # Growth

    def _act(self, args, state, control, model, optimizer) -> None:
        """Deal with the pending score, and grow if it is time."""
        if not self.active or self.complete:
            return
        if self._pending is None and self._names_seen and not self.history and self.config.schedule != "early":
            name, names = self._metric(args), sorted(self._names_seen)
            raise PAIError(f"pai: metric must be one of {', '.join(names)}, got {name!r}{_near(name, names)}")
        if control.should_training_stop or state.global_step >= state.max_steps:
            return  # nothing would train what grows now
        entry, self._pending, event = self._pending, None, ""
        if entry is not None:
            self.history.append(entry)
        if self.config.schedule == "early":
            dendrites = max(structure_of(model).values())
            due = (dendrites + 1) * self.config.first_growth * state.max_steps
            if dendrites < self.config.max_dendrites and state.global_step >= due:
                event = "grown"
        elif entry is not None and state.global_step <= self.config.last_growth * state.max_steps:
            is_best, event = _judge(self.history, self.config, self._is_greater_better(args))
            if is_best:
                self._best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        if event:
            if entry is None:
                entry = self._entry(state.global_step, None, model)
                self.history.append(entry)
            self._change(args, state, model, optimizer, event)
            entry |= self._entry(state.global_step, entry["metric"], model, event)
        if entry is not None:
            self._log(state, entry)
        if event == "complete":
            self.complete = True
            control.should_training_stop |= self.config.stop_when_complete

    def _change(self, args, state, model, optimizer, event: str) -> None:
        """Go back to the best weights if the schedule says so. Unless growth is complete, add dendrites to the layers.

        All ranks do the same with the same random numbers. Then DDP starts again with the weights of rank 0.
        """
        held, newest = _inner_optimizer(optimizer).state, None
        before = {name: held[one] for name, (one, *_) in _dendrite_parameters(model).items() if one in held}
        with _private_random_state(args.seed * 1_000_003 + state.global_step, args.device):
            if self.config.schedule != "early":
                self._load_best(model)
            if event != "complete":
                newest = max(structure_of(model).values())
                _grow_to(model, self._layers, self.config, newest + 1)
        _sync_optimizer(optimizer, model, args.weight_decay, before, newest)
        if args.world_size > 1:
            _rewrap(self.trainer.model_wrapped)
        if args.torch_compile:
            torch._dynamo.reset()

    def _load_best(self, model: nn.Module) -> None:
        dendrites = sum(".dendrites_to_top." in name for name in self._best) // len(self._layers)
        _grow_to(model, self._layers, self.config, dendrites, anew=True)
        model.load_state_dict(self._best)

    # Reports

    def parameters(self, model: nn.Module) -> int:
        """Number of parameters that the model computes with, without perforatedai's scaffolding."""
        dendrites = [parameter for parameter, *_ in _dendrite_parameters(model).values()]
        return sum(parameter.numel() for parameter in [*_own_parameters(model), *dendrites])

    def summary(self, model: nn.Module) -> dict[str, Any]:
        """The dendrites of each layer, their activation, and the events of growth."""
        growth = [entry for entry in self.history if entry["event"]]
        return {"layers": structure_of(model), "activation": self.config.activation, "growth": growth}

    def _entry(self, step: int, score: float | None, model: nn.Module, event: str = "") -> dict[str, Any]:
        """An entry of the history, as the model is now."""
        count = max(structure_of(model).values())
        changed = {"dendrites": count, "parameters": self.parameters(model), "event": event}
        return changed if event else {"step": step, "metric": score, "evaluated_dendrites": count} | changed

    def _log(self, state, entry: dict[str, Any]) -> None:
        """Send an evaluation to the Trainer's logs, and report growth in a line."""
        if self.trainer is not None:
            self.trainer.log({"pai/dendrites": entry["dendrites"], "pai/parameters": entry["parameters"]})
        if entry["event"] and state.is_world_process_zero:
            what = {
                "grown": "dendrites grew",
                "retried": "the dendrites did not help, new ones grew",
                "complete": "growth is complete, the best weights are back",
            }
            metric = "" if entry["metric"] is None else f", metric {entry['metric']:.5g}"
            say(
                f"Dendrites, step {entry['step']}: {what[entry['event']]}; {entry['evaluated_dendrites']} -> "
                f"{entry['dendrites']} per layer, {entry['parameters']:,} parameters{metric}"
            )

    def _check_top(self, state, model: nn.Module) -> None:
        """Warn if the weights from dendrites to neurons have hardly moved from zero."""
        top = {name: module.dendrites_to_top[-1][-1].abs().mean() for name, module in perforated_layers(model).items()}
        still = [name for name, mean in top.items() if mean < TOP_MOVED]
        if still and state.is_world_process_zero:
            logger.warning(
                f"Dendrites, step {state.global_step}: the newest dendrites of {', '.join(still)} are hardly used. "
                f"Their weights to the neurons (`top`) began at 0 and are {max(map(top.get, still)):.2g} on average. "
                f"Raise top_learning_rate or dendrite_learning_rate, or grow earlier."
            )

    # Checkpoints

    def write_checkpoint(self, folder: Path, model: nn.Module) -> None:
        """Write, beside the weights of a model, what rebuilds its structure and continues its growth."""
        structure = structure_of(model)
        values = {
            "layers": [{**layer._asdict(), "dendrites": structure[layer.name]} for layer in self._layers],
            "config": dataclasses.asdict(self.config),
            "pending": self._pending,
            "complete": self.complete,
            "history": self.history,
        }
        (folder / STATE_FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if self._best:
            save_file(self._best, folder / BEST_FILE)
        if (config := folder / "config.json").exists():
            # from_pretrained reads this name of the weights, refuses it, and shows it.
            sentence = "This checkpoint resumes a training with dendrites. Load the folder that save_model() wrote."
            values = json.loads(config.read_text(encoding="utf-8")) | {"transformers_weights": sentence}
            config.write_text(json.dumps(values, indent=2), encoding="utf-8")

    def restore(self, folder: Path, args, model: nn.Module, optimizer) -> None:
        """Give a plain model and its optimizer the structure of a checkpoint. The Trainer then loads the weights.

        Raises:
            PAIError: If the checkpoint was written without dendrites or with another configuration.
        """
        values = _read_state(folder)
        layers = [Layer(one["name"], tuple(one["shape"]), one["axis"]) for one in values["layers"]]
        then = values.get("config") or PERFORATEDAI | {"activation": values["activation"]}  # else of an older version
        chosen, found = choose_layers(model, self.config), [layer.name for layer in layers]
        if chosen != found:
            raise PAIError(f"{folder}: the checkpoint has dendrites on {found}, the configuration on {chosen}")
        for name in ("activation", "top_learning_rate", "dendrite_learning_rate"):
            if then.get(name) != getattr(self.config, name):
                raise PAIError(
                    f"{folder} was written with {name}: {then.get(name)}, the configuration has "
                    f"{getattr(self.config, name)}. Set the former value. If an older pai_callback.py wrote the "
                    f"checkpoint, set preset: perforatedai"
                )
        self._layers = layers
        with _private_random_state(args.seed, args.device):
            _perforate(model, layers, self.config)
            _grow_to(model, layers, self.config, values["layers"][0]["dendrites"])
        _sync_optimizer(optimizer, model, args.weight_decay, {}, None)
        if (folder / BEST_FILE).exists():
            self._best = load_file(folder / BEST_FILE)
            self._best.pop("tracker_string", None)  # of an older version
        self._pending, self.complete, self.history = values["pending"], values["complete"], values["history"]
        if isinstance(self._pending, float):  # of an older version
            self._pending = self._entry(self.trainer.state.global_step, self._pending, model)

    def restructure(self, folder: Path, model: nn.Module) -> None:
        """Give a live model the structure of a checkpoint, before its weights are loaded."""
        _grow_to(model, self._layers, self.config, _read_state(folder)["layers"][0]["dendrites"], anew=True)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PAIError(
            f"{folder} cannot be resumed with dendrites ({error}): use a checkpoint that was written with them, or set "
            f"max_dendrites: 0"
        ) from error


class PAITrainerMixin:
    """What only a Trainer can do for its `PAICallback`: `class MyTrainer(PAITrainerMixin, YourTrainer)`.

    Checkpoints hold live tensor names and the structure, which is rebuilt before the weights are loaded. A tensor that
    is missing or left over is an error, and so is loading a checkpoint as a model. Without a `PAICallback`, or with one
    that grows nothing, the training is plain.
    """

    _resumed_folder: Path | None = None
    _in_checkpoint = False

    @property
    def pai_callback(self) -> PAICallback | None:
        """The first `PAICallback` among the callbacks."""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, PAICallback)), None)

    def train(self, *args, **kwargs):
        if self.pai_callback is not None:
            self.pai_callback.trainer = self
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None):
        optimizer = super().create_optimizer(model)
        if self.pai_callback is not None and self.pai_callback.grows:
            _add_groups(optimizer, self.pai_callback.config, self.lr_scheduler)
        if self._resumed_folder is not None:
            # Only now, so that the groups of the optimizer are those of the plain model, as in the interrupted run.
            folder, self._resumed_folder = self._resumed_folder, None
            self.pai_callback.restore(folder, self.args, self.model, optimizer)
            super()._load_from_checkpoint(str(folder))
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        callback = self.pai_callback
        if callback is not None and (callback.grows or Path(resume_from_checkpoint, STATE_FILE).exists()):
            self._resumed_folder = Path(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.pai_callback is not None and self.pai_callback.active:
            self.pai_callback.restructure(Path(self.state.best_model_checkpoint), self.model)
        super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        callback = self.pai_callback
        active = callback is not None and callback.active
        if active and not self._in_checkpoint:
            if not isinstance(self.model, PreTrainedModel):
                state_dict = export_dendritic(self.model).state_dict()
            return super()._save(output_dir, state_dict)
        with _live_names(self.model):
            super()._save(output_dir, state_dict)
        if active and self.args.should_save:
            callback.write_checkpoint(Path(output_dir), self.model)

    def _issue_warnings_after_load(self, load_result) -> None:
        absent = getattr(self.model, "_keys_to_ignore_on_save", None) or []
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in {*absent, *tied}]
        if missing or load_result.unexpected_keys:
            raise PAIError(
                f"the checkpoint does not fit the model: it lacks {missing[:5]} ({len(missing)} tensors) and has "
                f"{load_result.unexpected_keys[:5]} ({len(load_result.unexpected_keys)}) that the model does not have"
            )


@contextlib.contextmanager
def _live_names(model: nn.Module) -> Iterator[None]:
    """Let `save_pretrained` write live names. The Trainer resumes by them, and ignores the Hub's names silently."""
    patched = vars(model).get("save_pretrained")
    if isinstance(model, PreTrainedModel):
        model.save_pretrained = functools.partial(type(model).save_pretrained, model, save_original_format=False)
    try:
        yield
    finally:
        vars(model).pop("save_pretrained", None)
        if patched is not None:
            model.save_pretrained = patched


class PAITrainer(PAITrainerMixin, Trainer):
    """The Trainer with exact checkpoints of models that grow."""
