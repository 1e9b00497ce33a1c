"""PerforatedAI dendrites in any Hugging Face Trainer: copy this one file beside your training script.

    callback = PAICallback(PAIConfig(modules=["classifier.dense", "layers.-1.mlp.*"], max_dendrites=3))
    trainer = PAITrainer(model=model, args=args, ..., callbacks=[callback])
    trainer.train()

A dendrite is a fresh copy of a layer whose activated output is added to the layer's own, neuron by neuron, through
weights that start at zero: growth leaves the logits as they are, and training goes on with more parameters.

The callback chooses layers, watches a validation metric, grows, keeps the optimizer right, and says what it does. A
plain `Trainer` in one process needs no more. `PAITrainer`, or `PAITrainerMixin` before a Trainer of yours, adds what
only a Trainer can do: several processes, `load_best_model_at_end`, exact resumption, and growth in TensorBoard.

Needs torch, transformers, accelerate and perforatedai (tested with 3.2.9). perforatedai keeps its state in module
variables, so one training at a time grows dendrites in a process; one after the other is fine.
"""

import contextlib
import dataclasses
import difflib
import fnmatch
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import pdb
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)

STATE_FILE = "pai_state.json"  # in a checkpoint: structure, schedule, the score that waits to be acted on
BEST_FILE = "pai_best.safetensors"  # in a checkpoint: the weights that growth goes back to
PLOT_FILE = "dendrites.png"
AST_MODULES = ["classifier.dense", "layers.-1.mlp.*"]
ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu}
LABELS = ("labels", "label", "label_ids")
WRAPPED_BY = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


class PAIError(RuntimeError):
    """Dendrites cannot be grown as asked; the message says what was found and what to change."""


@dataclass
class PAIConfig:
    """Which layers grow dendrites, when, and what growth does to the optimizer."""

    modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers by name, whole or its end, with wildcards; -1 is the last block: 'layers.-1.mlp.*'. "
            "With no layer chosen by name, type or block: AST's classifier and the last block's MLP."
        },
    )
    module_types: list[str] | None = field(
        default=None, metadata={"help": "Layers by class name, for example Conv2d; added to `modules`."}
    )
    last_blocks: int | None = field(
        default=None,
        metadata={"help": "Every linear and convolutional layer of the last N blocks; added to `modules`."},
    )
    max_dendrites: int = field(default=3, metadata={"help": "Dendrites a layer may grow; 0 trains the model as it is."})
    max_added_parameters: int | str | None = field(
        default=None, metadata={"help": "Growth stops before it adds more: a number, or a share like '10%'."}
    )
    schedule: Literal["history", "fixed", "every", "never"] = field(
        default="history",
        metadata={
            "help": "history: grow when the metric has not improved for `patience` evaluations; fixed: after every "
            "`interval` evaluations; every: at every evaluation; never."
        },
    )
    patience: int = field(default=5, metadata={"help": "history: evaluations without improvement before growth."})
    interval: int = field(
        default=10, metadata={"help": "fixed: evaluations (epochs, with eval_strategy=epoch) from growth to growth."}
    )
    tries: int = field(
        default=2, metadata={"help": "Fresh dendrites tried where the last did not improve the metric, before the end."}
    )
    metric: str | None = field(
        default=None, metadata={"help": "Metric of the evaluation; default: metric_for_best_model, else eval_loss."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Default: yes, unless the metric's name ends in loss."}
    )
    improvement: float = field(
        default=0.001, metadata={"help": "An evaluation is better if it is so by this share of the best (and by 1e-5)."}
    )
    stop_when_complete: bool = field(
        default=True,
        metadata={"help": "End the training when growth helps no more; else train on, from the best weights."},
    )
    activation: Literal["sigmoid", "tanh", "relu", "gelu"] = field(
        default="sigmoid", metadata={"help": "Activation of the dendrites."}
    )
    initial_scale: float = field(default=0.01, metadata={"help": "Standard deviation of a new dendrite's weights."})
    learning_rate: Literal["keep", "restart"] = field(
        default="keep",
        metadata={"help": "At growth: keep the schedule, or run its warm-up and decay again over the steps left."},
    )
    optimizer_state: Literal["keep", "reset"] = field(
        default="keep", metadata={"help": "At growth: the optimizer's moments of what survives."}
    )
    plot: bool = field(default=True, metadata={"help": f"Draw {PLOT_FILE}: the metric, and where dendrites grew."})
    perforated_backpropagation: bool = field(
        default=False,
        metadata={"help": "Allow the licensed perforatedbp package, if installed, to be active; untested."},
    )

    def __post_init__(self):
        for name in ("modules", "module_types"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                setattr(self, name, list(value))
            elif not (value is None or isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
                self._refuse(name, "a list of names")
        for name in ("schedule", "activation", "learning_rate", "optimizer_state"):
            choices = get_args(self.__dataclass_fields__[name].type)
            if getattr(self, name) not in choices:
                self._refuse(name, f"one of {', '.join(choices)}")
        for name, least in (("max_dendrites", 0), ("patience", 1), ("interval", 1), ("tries", 1)):
            if not _is_int(getattr(self, name)) or getattr(self, name) < least:
                self._refuse(name, f"a whole number from {least} on")
        if self.last_blocks is not None and (not _is_int(self.last_blocks) or self.last_blocks < 1):
            self._refuse("last_blocks", "a whole number from 1 on, or nothing")
        for name in ("improvement", "initial_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
                self._refuse(name, "a number from 0 to 1")
        for name in ("stop_when_complete", "plot", "perforated_backpropagation"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "true or false")
        self.added_parameters(1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PAIConfig":
        """A configuration from a mapping, such as a block of YAML.

        Raises:
            PAIError: An unknown field, or a value that does not fit its field.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise PAIError(f"pai: unknown field {name!r}{_near(name, known)}; wanted one of {', '.join(known)}")
        return cls(**values)

    def added_parameters(self, parameters: int) -> int | None:
        """`max_added_parameters` as a number, for a model of so many parameters; None is no limit."""
        limit = self.max_added_parameters
        if limit is None:
            return None
        if isinstance(limit, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*%\s*", limit):
            return int(parameters * float(limit.strip(" %")) / 100)
        if isinstance(limit, str) and limit.strip().isdigit():
            return int(limit)
        if not _is_int(limit) or limit < 0:
            self._refuse("max_added_parameters", "a whole number, or a share such as '10%'")
        return limit

    def _refuse(self, name: str, wanted: str):
        raise PAIError(f"pai: {name}: found {getattr(self, name)!r}, wanted {wanted}")


class Layer(NamedTuple):
    """A layer that grows dendrites.

    Attributes:
        name: Live module name.
        shape: Of its output for a batch.
        axis: Which dimension of the output counts the neurons.
        parameters: Of the layer itself.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    parameters: int

    def added_by(self, dendrites: int) -> int:
        """Parameters that so many dendrites add: copies of the layer, weights to the neuron and to each other."""
        neurons = self.shape[self.axis]
        return dendrites * (self.parameters + neurons) + neurons * dendrites * (dendrites - 1) // 2


class _DendriteParameter(NamedTuple):
    parameter: nn.Parameter
    source: nn.Parameter  # the layer's own parameter whose learning rate and weight decay it takes
    number: int  # of the newest dendrite it has to do with


# perforatedai, contained


class _Prompted(BaseException):
    """perforatedai wanted a person; not an Exception, or it would catch it itself."""


class _NoTerminal(io.StringIO):
    def readline(self, *args):
        raise _Prompted


def _perforatedai():
    """perforatedai's modules: globals, utils, modules; imported where they are first used, as it prints and is slow."""
    with contextlib.redirect_stdout(io.StringIO()):
        from perforatedai import globals_perforatedai, modules_perforatedai, utils_perforatedai
    return globals_perforatedai, utils_perforatedai, modules_perforatedai


@contextlib.contextmanager
def _contained(doing: str) -> Iterator[None]:
    """What perforatedai prints goes to the log; where it would open a debugger, ask or exit, it raises.

    Raises:
        PAIError: It gave up, with what it printed.
    """
    output = io.StringIO()

    def prompted(*args, **kwargs):
        raise _Prompted

    stdin, set_trace = sys.stdin, pdb.set_trace
    sys.stdin, pdb.set_trace = _NoTerminal(), prompted
    try:
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            warnings.catch_warnings(record=True) as warned,
        ):
            yield
    except PAIError:
        raise
    except (_Prompted, SystemExit, Exception) as error:
        reason = {_Prompted: "it wanted to ask", SystemExit: "it wanted to end the process"}.get(
            type(error), repr(error)
        )
        said = output.getvalue().strip()[-2000:] or "nothing"
        raise PAIError(f"perforatedai failed while {doing}: {reason}. It said: {said}") from error
    finally:
        sys.stdin, pdb.set_trace = stdin, set_trace
    for line in [*filter(None, output.getvalue().splitlines()), *(str(one.message) for one in warned)]:
        logger.debug("perforatedai: %s", line)


@contextlib.contextmanager
def _private_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`, after which all generators stand where they stood."""
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


class _UseActivation:
    """Forward pre-hook of a model: perforatedai reads the activation from a variable all models share."""

    def __init__(self, name: str):
        self.name = name

    @torch._dynamo.disable
    def __call__(self, module, args):
        globals_pai = _perforatedai()[0]
        if globals_pai.pc.get_pai_forward_function() is not ACTIVATIONS[self.name]:
            globals_pai.pc.set_pai_forward_function(ACTIVATIONS[self.name])


# Choosing layers


def choose_layers(model: nn.Module, config: PAIConfig) -> list[str]:
    """The live names of the layers that `config` chooses, in the model's order.

    Raises:
        PAIError: A pattern, type or number of blocks that the model has not, or layers inside each other.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = config.modules
    if patterns is None and config.module_types is None and config.last_blocks is None:
        patterns = AST_MODULES
    chosen: set[str] = set()
    for pattern in patterns or []:
        chosen |= _matching(pattern, modules)
    for kind in config.module_types or []:
        found = {name for name, module in modules.items() if type(module).__name__ == kind}
        if not found:
            kinds = sorted({type(module).__name__ for module in modules.values()})
            raise PAIError(f"pai: module_types: found {kind!r}{_near(kind, kinds)}; the model has {', '.join(kinds)}")
        chosen |= found
    if config.last_blocks is not None:
        chosen |= _in_last_blocks(modules, config.last_blocks)
    if not chosen:
        raise PAIError("pai: modules: found an empty list, wanted at least one layer")
    for name in chosen:
        inside = [other for other in chosen if other.startswith(name + ".")]
        if inside:
            raise PAIError(f"pai: modules: {inside[0]} is inside {name}; choose one of them")
    return [name for name in modules if name in chosen]


def _grows(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd, Conv1D))


def _matching(pattern: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names that end in the pattern. What a wildcard matches beside linear and convolutional layers is left out."""
    aliases = {name: {name, _from_the_end(name, modules)} for name in modules}
    named = {
        name
        for name, both in aliases.items()
        if any(fnmatch.fnmatchcase(alias, pattern) or fnmatch.fnmatchcase(alias, f"*.{pattern}") for alias in both)
    }
    found = {name for name in named if _grows(modules[name])} if set("*?[") & set(pattern) else named
    if found:
        return found
    if named:
        kinds = sorted({type(modules[name]).__name__ for name in named})
        raise PAIError(
            f"pai: modules: {pattern!r} names only {', '.join(kinds)}, wanted linear or convolutional layers"
        )
    parts = pattern.count(".") + 1
    ends = {".".join(alias.split(".")[-parts:]) for both in aliases.values() for alias in both}
    raise PAIError(f"pai: modules: found {pattern!r}, which names no layer of the model{_near(pattern, sorted(ends))}")


def _from_the_end(name: str, modules: Mapping[str, nn.Module]) -> str:
    """layers.-1.mlp.fc1 for layers.11.mlp.fc1 of twelve blocks."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        parent = modules.get(".".join(name.split(".")[:place]))
        if part.isdigit() and parent is not None:
            parts[place] = str(int(part) - len(parent._modules))
    return ".".join(parts)


def _in_last_blocks(modules: Mapping[str, nn.Module], count: int) -> set[str]:
    """Growing layers of the last blocks; the blocks are the longest list of modules of one class."""
    lists = {
        name: module
        for name, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len({type(block) for block in module}) == 1
        and any(_grows(layer) for layer in module.modules())
    }
    if not lists:
        raise PAIError("pai: last_blocks: the model has no list of equal blocks; name the layers in `modules`")
    blocks = max(lists, key=lambda name: len(lists[name]))
    if count > len(lists[blocks]):
        raise PAIError(f"pai: last_blocks: found {count}, but {blocks} has {len(lists[blocks])} blocks")
    last = [f"{blocks}.{block}" for block in list(lists[blocks]._modules)[-count:]]
    return {
        name
        for name, module in modules.items()
        if _grows(module) and any(name == block or name.startswith(block + ".") for block in last)
    }


def _near(found: str, known: list[str]) -> str:
    near = difflib.get_close_matches(found, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def probe_layers(model: nn.Module, batch: Mapping[str, Any], names: list[str]) -> list[Layer]:
    """See by one pass what the layers give and whether dendrites on them would learn; changes nothing.

    Args:
        model: Before dendrites.
        batch: A few examples, as the model's forward takes them.
        names: Live names of layers.

    Raises:
        PAIError: A layer that is never called, gets no gradient, or whose output is not one tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    probes: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Callable:
        def add_zeros(module, args, output):
            if not isinstance(output, torch.Tensor):
                raise PAIError(
                    f"pai: modules: {name} ({type(module).__name__}) gives a {type(output).__name__}, wanted one "
                    f"tensor; choose the layers inside it"
                )
            if len(shapes.setdefault(name, tuple(output.shape))) != output.dim():
                raise PAIError(f"pai: modules: {name} gives tensors of different rank, wanted one rank")
            probes[name].append(torch.zeros_like(output, requires_grad=True))
            return output + probes[name][-1]

        return add_zeros

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    training = model.training
    model.eval()  # batch statistics and dropout stay out of it
    try:
        with torch.enable_grad():
            target = _scalar(model(**batch))
            inputs = list(itertools.chain.from_iterable(probes.values()))
            grads = torch.autograd.grad(target, inputs, allow_unused=True) if inputs and target.requires_grad else []
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    reached = {id(probe) for probe, grad in zip(inputs, grads, strict=False) if grad is not None}
    for name in names:
        if name not in shapes:
            raise PAIError(f"pai: modules: {name} is never called in the model's forward; leave it out")
        if not any(id(probe) in reached for probe in probes[name]):
            raise PAIError(f"pai: modules: {name} gets no gradient from the model's output; leave it out")
    return [_layer(model.get_submodule(name), name, shapes[name]) for name in names]


def _layer(module: nn.Module, name: str, shape: tuple[int, ...]) -> Layer:
    last = [inner for inner in module.modules() if _grows(inner)][-1:] or [module]
    is_image = isinstance(last[0], (_ConvNd, nn.modules.batchnorm._BatchNorm)) and len(shape) > 2
    return Layer(name, shape, 1 if is_image else len(shape) - 1, sum(p.numel() for p in module.parameters()))


def _scalar(outputs: Any) -> torch.Tensor:
    """The loss, else the sum of the logits, else of everything a model gives."""
    if isinstance(outputs, Mapping):
        outputs = next((outputs[key] for key in ("loss", "logits") if outputs.get(key) is not None), outputs)
    return sum((tensor.float().sum() for tensor in _float_tensors(outputs)), torch.zeros(()))


def _float_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _float_tensors(inner)


def _few_examples(dataloader, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """A batch of the first two examples without labels, read past the loader, whose order stays as it is."""
    data = dataloader.dataset
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        examples = [data[row] for row in range(min(2, len(data)))]
    else:
        examples = list(itertools.islice(iter(data), 2))
    batch = dataloader.collate_fn(examples)
    if not isinstance(batch, Mapping):
        raise PAIError(f"the data collator gives a {type(batch).__name__}, wanted a mapping of the model's inputs")
    wanted = inspect.signature(model.forward).parameters
    optional = {name for name in LABELS if name in wanted and wanted[name].default is not inspect.Parameter.empty}
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in optional
    }


# The structure of a live model


def perforated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """perforatedai's wrappers in a model, by live name."""
    wrapper = _perforatedai()[2].PAINeuronModule
    return {name: module for name, module in model.named_modules() if type(module) is wrapper}


def structure_of(model: nn.Module) -> dict[str, int]:
    """How many dendrites each perforated layer of a live model has."""
    return {name: module.dendrite_modules_added for name, module in perforated_layers(model).items()}


def _perforate(model: nn.Module, layers: list[Layer], config: PAIConfig, greater_is_better: bool, folder: Path) -> None:
    """Wrap the layers, still without dendrites: parameters keep their identity, the model computes what it did."""
    globals_pai, utils, _ = _perforatedai()
    first = next(model.get_submodule(layers[0].name).parameters())
    settings = {
        "configuration_confirmed": True,
        "unwrapped_modules_confirmed": True,
        "weight_decay_accepted": True,
        "testing_dendrite_capacity": False,
        "silent": True,
        "test_saves": False,
        "find_best_lr": False,
        "dont_give_up_unless_learning_rate_lowered": False,
        "modules_to_perforate": [],
        "module_names_to_perforate": [],
        "module_names_to_not_save": [],
        "module_ids_to_perforate": [f".{layer.name}" for layer in layers],
        "output_dimensions": [-1, -1, 0],
        "device": first.device,
        "use_cuda": first.device.type == "cuda",
        "d_type": first.dtype,
        "switch_mode": {"every": 0, "history": 1, "fixed": 2, "never": 3}[config.schedule],
        "n_epochs_to_switch": config.patience,
        "fixed_switch_num": config.interval,
        "max_dendrites": config.max_dendrites,
        "max_dendrite_tries": config.tries,
        "improvement_threshold": config.improvement,
        "initial_history_after_switches": -1,  # with 0 the first evaluation could never be the best
        "candidate_weight_initialization_multiplier": config.initial_scale,
        "pai_forward_function": ACTIVATIONS[config.activation],
    }
    with _contained("wrapping the layers"), tempfile.TemporaryDirectory(dir=folder, prefix="wrap-") as empty:
        # It reads stray settings from, and writes its own into, the working directory.
        with contextlib.chdir(empty):
            globals_pai.pc.__init__()
            globals_pai.pai_tracker = []
            for name, value in settings.items():
                getattr(globals_pai.pc, f"set_{name}")(value)
            utils.perforate_model(model, save_name="PAI", maximizing_score=greater_is_better, making_graphs=False)
        globals_pai.pai_tracker.making_graphs = False
        globals_pai.pc.set_save_name(str(folder))
        globals_pai.pai_tracker.save_name = str(folder)
        wrapped = perforated_layers(model)
        for layer in layers:
            if layer.name not in wrapped:
                raise PAIError(f"pai: modules: perforatedai did not wrap {layer.name}, perhaps a layer with two names")
            wrapped[layer.name].set_this_output_dimensions(
                [0 if place == layer.axis else -1 for place in range(len(layer.shape))]
            )
            _set_up_arrays(wrapped[layer.name], layer)
    model.to(first.device)
    model.register_forward_pre_hook(_UseActivation(config.activation))
    _tidy(model)


def _set_up_arrays(module: nn.Module, layer: Layer) -> None:
    """What perforatedai would do, and check, in the first backward pass."""
    storage = [size if place == layer.axis else 1 for place, size in enumerate(layer.shape)]
    for values in module.dendrite_module.dendrite_values:
        values.setup_arrays(storage)
        values.current_d_init[0] = 1
    module._fb_init_done = True


def _rebuild(model: nn.Module, layers: list[Layer], structure: Mapping[str, int]) -> None:
    """Give each layer as many dendrites as `structure` says; their weights are then still to be loaded."""
    globals_pai, utils, _ = _perforatedai()
    wrapped = perforated_layers(model)
    with _contained("rebuilding the dendrites"):
        for layer in layers:
            module = wrapped[layer.name]
            if module.dendrite_modules_added != structure[layer.name]:
                module.clear_dendrites()
                _set_up_arrays(module, layer)
                utils.simulate_cycles(module, 2 * structure[layer.name], True)
        if globals_pai.pai_tracker:
            globals_pai.pai_tracker.reset_module_vector(model, False)
    model.to(next(model.parameters()).device)
    _tidy(model)


def _tidy(model: nn.Module) -> None:
    """Train just what the forward pass uses, and drop the tracker's buffer, whose length changes.

    Scaffolding left trainable makes DDP wait for gradients that never come.
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


def _dendrite_parameters(model: nn.Module) -> dict[str, _DendriteParameter]:
    """The trained parameters of all dendrites by live name."""
    found = {}
    for name, module in perforated_layers(model).items():
        main = dict(module.main_module.named_parameters())
        weight = next((parameter for parameter in main.values() if parameter.dim() > 1), next(iter(main.values())))
        for number, layer in enumerate(module.dendrite_module.layers):
            for key, parameter in layer.named_parameters():
                place = f"{name}.dendrite_module.layers.{number}.{key}"
                found[place] = _DendriteParameter(parameter, main[key], number)
        for number, parameter in enumerate(module.dendrite_module.dendrites_to_dendrites):
            if number > 0:
                place = f"{name}.dendrite_module.dendrites_to_dendrites.{number}"
                found[place] = _DendriteParameter(parameter, weight, number)
        if module.dendrites_to_top:
            number = len(module.dendrites_to_top) - 1
            found[f"{name}.dendrites_to_top.{number}"] = _DendriteParameter(module.dendrites_to_top[-1], weight, number)
    return found


# Optimizer, schedule, DDP


def _inner_optimizer(optimizer) -> torch.optim.Optimizer:
    """torch's optimizer inside accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _check_optimizer(optimizer, model: nn.Module) -> None:
    """Raises PAIError where parameters cannot be added to the groups of the same optimizer object."""
    inner = _inner_optimizer(optimizer)
    kind = type(inner).__name__
    advice = "use one whose state is kept per parameter, such as adamw_torch"
    if not isinstance(inner, torch.optim.Optimizer) or isinstance(inner, torch.optim.LBFGS):
        raise PAIError(f"the optimizer {kind} cannot take new parameters; {advice}")
    held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        raise PAIError(
            f"the optimizer {kind} does not hold {left_out[0]} and {len(left_out) - 1} more of the model's trained "
            f"parameters, so it cannot be rebuilt when dendrites grow; {advice}, or freeze what is not trained"
        )


def _sync_optimizer(
    optimizer, model: nn.Module, before: Mapping[str, dict], weight_decay: float, keep_state: bool, newest: int | None
) -> None:
    """Put the dendrites there are now into the groups, inside the same object, which scheduler and accelerate refer to.

    A dendrite's parameter joins the group of the layer's own, that is its learning rate and weight decay; in a group
    the model's own parameters come first, as they were, then dendrites: the same order after a resume.

    Args:
        before: Optimizer state of dendrites by name, before growth.
        weight_decay: Of the run, for dendrites on frozen layers.
        keep_state: Keep the state of what survives.
        newest: Number of the dendrite that just grew and has no past; None where none grew.
    """
    inner = _inner_optimizer(optimizer)
    dendrites = _dendrite_parameters(model)
    grown = {id(entry.parameter) for entry in dendrites.values()}
    own = {id(parameter) for parameter in model.parameters()} - grown
    home = {id(p): place for place, group in enumerate(inner.param_groups) for p in group["params"]}
    for group in inner.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]
    for entry in dendrites.values():
        place = home.get(id(entry.source))
        if place is None:
            place = _group_of_frozen(inner.param_groups, weight_decay if entry.parameter.dim() > 1 else 0.0)
        inner.param_groups[place]["params"].append(entry.parameter)
    for parameter in list(inner.state):
        if not keep_state or id(parameter) not in own:
            del inner.state[parameter]
    for name, entry in dendrites.items():
        if keep_state and name in before and entry.number != newest:
            inner.state[entry.parameter] = before[name]
    inner.zero_grad(set_to_none=True)


def _group_of_frozen(groups: list[dict], weight_decay: float) -> int:
    """The last group with that weight decay, in the usual order the one nearest the head; else the last."""
    fitting = [place for place, group in enumerate(groups) if group.get("weight_decay") == weight_decay]
    return (fitting or [len(groups) - 1])[-1]


def _dendrite_states(optimizer, model: nn.Module) -> dict[str, dict]:
    state = _inner_optimizer(optimizer).state
    return {
        name: state[entry.parameter] for name, entry in _dendrite_parameters(model).items() if entry.parameter in state
    }


def _from(function: Callable[[int], float], start: int, total: int) -> Callable[[int], float]:
    """The whole schedule again, in the steps from `start` on.

    A plain function: LambdaLR would write any other callable into scheduler.pt, which the Trainer then cannot read.
    """

    def restarted(step: int) -> float:
        return function((step - start) * total / max(1, total - start))

    restarted.function = function
    return restarted


def _restart_schedule(scheduler, start: int, total: int) -> None:
    """Run warm-up and decay again from step `start`; optimizer and scheduler stay the same objects."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    scheduler.lr_lambdas = [_from(getattr(one, "function", one), start, total) for one in scheduler.lr_lambdas]
    rates = [
        base * one(scheduler.last_epoch) for base, one in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _rewrap(wrapper: nn.Module) -> None:
    """Start DDP again inside the same wrapper, to which the Trainer's loop refers; all ranks get rank 0's weights."""
    wrapper = getattr(wrapper, "_orig_mod", wrapper)  # torch.compile's
    if not isinstance(wrapper, DistributedDataParallel):
        raise PAIError(f"several processes train a {type(wrapper).__name__}, wanted DistributedDataParallel")
    settings = {
        name: getattr(wrapper, name)
        for name in (
            "device_ids", "output_device", "dim", "broadcast_buffers", "process_group", "find_unused_parameters",
            "gradient_as_bucket_view", "static_graph", "mixed_precision",
        )
    }  # fmt: skip
    training = wrapper.training
    wrapper.reducer._remove_autograd_hooks()
    DistributedDataParallel.__init__(
        wrapper, wrapper.module, bucket_cap_mb=wrapper.bucket_bytes_cap // 2**20 or None, **settings
    )
    wrapper.train(training)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed when done: `path` is never seen half-written."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# The callback


class PAICallback(TrainerCallback, ExportableState):
    """Grows dendrites while a Trainer trains.

    Args:
        config: What to grow and when; a mapping is taken for its fields.

    Attributes:
        history: One entry an evaluation: step, metric, dendrites, parameters, and what followed ("", "grown",
            "retried", "complete").
        complete: Growth has come to its end.
    """

    def __init__(self, config: PAIConfig | Mapping[str, Any] | None = None):
        self.config = PAIConfig.from_dict(config) if isinstance(config, Mapping) else config or PAIConfig()
        if self.grows:
            _check_installed(self.config)
        self.trainer: Trainer | None = None  # set by PAITrainerMixin
        self.history: list[dict[str, Any]] = []
        self.complete = False
        self._layers: list[Layer] = []
        self._pending: float | None = None  # a score that is known and not yet acted on
        self._evaluated: tuple[int, int] = (0, 0)  # dendrites and parameters of the model that got it
        self._before_growth: float | None = None
        self._restarted_at: int | None = None
        self._names_seen: set[str] = set()
        self._folder: tempfile.TemporaryDirectory | None = None
        self._tracker = None
        self._best: dict[str, torch.Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """What trainer_state.json tells of the growth; STATE_FILE holds what a resume needs."""
        return {"args": {"config": dataclasses.asdict(self.config)}, "attributes": {"history": list(self.history)}}

    @property
    def grows(self) -> bool:
        """Whether the configuration can grow anything at all."""
        return self.config.max_dendrites > 0 and self.config.schedule != "never"

    @property
    def active(self) -> bool:
        """Whether the model is wrapped."""
        return bool(self._layers)

    # Trainer's events

    def on_init_end(self, args, state, control, **kwargs):
        if self.grows:
            _refuse_parallelism(args)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        if not self.active:
            if not self.grows:
                return
            self._check_run(args, state)
            self._start(args, model, kwargs["train_dataloader"])
        _check_optimizer(optimizer, model)
        if self.config.learning_rate == "restart":
            inner = getattr(lr_scheduler, "scheduler", lr_scheduler)
            if not isinstance(inner, LambdaLR):
                raise PAIError(
                    f"pai: learning_rate: found 'restart', but the scheduler {type(inner).__name__} cannot be started "
                    f"again; use a lr_scheduler_type such as cosine or linear, or learning_rate: keep"
                )
            if self._restarted_at is not None:
                _restart_schedule(lr_scheduler, self._restarted_at, state.max_steps)

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if not self.active or self.complete or state.global_step == 0 or self._folder is None:
            return
        name = self._metric(args)
        self._names_seen |= set(metrics)
        if name in metrics:
            self._pending = float(metrics[name])
            self._evaluated = self._dendrites(model), self.parameters(model)

    def on_save(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        # The checkpoint just written holds the weights that were evaluated, and the score: a resume grows the same.
        if self.trainer is None and args.should_save and self.active:
            self.write_checkpoint(Path(args.output_dir, f"checkpoint-{state.global_step}"), model)
        self._act(args, state, control, model, optimizer, lr_scheduler)
        self._best = None

    def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self._act(args, state, control, model, optimizer, lr_scheduler)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._best is not None:  # the loop looks at should_training_stop only after one more step
            model.load_state_dict(self._best)
            self._best = None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not self.active:
            return
        if self._pending is not None:
            self._note(state, model, self._pending, "")
        elif self._names_seen and not self.history:
            logger.warning("pai: metric: no evaluation reported %s", self._metric(args))
        self._draw(args, state)
        self.release()

    # Starting

    def _check_run(self, args, state) -> None:
        """What this training asks for and cannot have, with dendrites."""
        _refuse_parallelism(args)
        needs = "needs PAITrainer (or PAITrainerMixin before your own Trainer class) in the place of Trainer"
        if self.trainer is None:
            if args.load_best_model_at_end:
                raise PAIError(
                    f"load_best_model_at_end: the best model may have another number of dendrites; it {needs}"
                )
            if state.global_step > 0:
                raise PAIError(f"resume_from_checkpoint: a checkpoint with dendrites {needs}")
            if _world() > 1:
                raise PAIError(f"training with {_world()} processes {needs}")
        if args.auto_find_batch_size:
            raise PAIError("auto_find_batch_size starts the training twice; with dendrites set the batch size yourself")
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise PAIError(
                f"eval_strategy: found 'no', wanted steps or epoch: growth follows {self._metric(args)}, or set pai: "
                f"max_dendrites: 0"
            )

    def _start(self, args, model: nn.Module, dataloader) -> None:
        if "PAINeuronModule" in {type(module).__name__ for module in model.modules()}:
            raise PAIError("the model already has dendrites from another training; start from a plain one, or resume")
        names = choose_layers(model, self.config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        with _private_random_state(args.seed, args.device):
            layers = probe_layers(model, _few_examples(dataloader, model, args.device), names)
        self._wrap(args, model, layers, parameters)
        if args.should_save:
            _say(self._table(parameters))

    def _wrap(self, args, model: nn.Module, layers: list[Layer], parameters: int) -> None:
        """Take perforatedai over for this model."""
        dendrites = self._dendrites_within_budget(layers, parameters)
        output_dir = Path(args.output_dir).absolute()
        output_dir.mkdir(parents=True, exist_ok=True)
        mine = f".pai-{_rank()}-"
        for left_over in output_dir.glob(f"{mine}*"):  # of a run that was killed
            shutil.rmtree(left_over)
        self._folder = tempfile.TemporaryDirectory(dir=output_dir, prefix=mine)
        with _private_random_state(args.seed, args.device):
            _perforate(model, layers, self.config, self._is_greater_better(args), Path(self._folder.name))
        globals_pai = _perforatedai()[0]
        globals_pai.pc.set_max_dendrites(dendrites)
        self._tracker = globals_pai.pai_tracker
        self._layers = layers

    def _dendrites_within_budget(self, layers: list[Layer], parameters: int) -> int:
        limit = self.config.added_parameters(parameters)
        if limit is None:
            return self.config.max_dendrites
        added = [sum(layer.added_by(n) for layer in layers) for n in range(1, self.config.max_dendrites + 1)]
        if added and added[0] > limit:
            raise PAIError(
                f"pai: max_added_parameters: found {self.config.max_added_parameters} ({limit:,} of {parameters:,}), "
                f"but one dendrite on the chosen layers adds {added[0]:,}: choose fewer layers or allow more"
            )
        return sum(total <= limit for total in added)

    def _table(self, parameters: int) -> str:
        added = sum(layer.added_by(1) for layer in self._layers)
        limit = _perforatedai()[0].pc.get_max_dendrites()
        rows = [("layer", "output", "a dendrite adds")]
        rows += [(one.name, " x ".join(map(str, one.shape[1:])), f"{one.added_by(1):,}") for one in self._layers]
        rows.append(("together", "", f"{added:,} ({added / parameters:.2%} of {parameters:,})"))
        wide = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"  {row[0]:<{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]}" for row in rows]
        return "\n".join(
            [f"Up to {_counted(limit)} ({self.config.schedule}, {self.config.activation}) may grow on:", *lines]
        )

    def _metric(self, args) -> str:
        name = self.config.metric or args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    def _best_score(self, args) -> float:
        """Of the weights that growth started from."""
        scores = [entry["metric"] for entry in self.history if not np.isnan(entry["metric"])] or [float("nan")]
        return max(scores) if self._is_greater_better(args) else min(scores)

    def _is_greater_better(self, args) -> bool:
        asked = self.config.greater_is_better
        return not self._metric(args).endswith("loss") if asked is None else asked

    # Acting on a score

    def _act(self, args, state, control, model, optimizer, lr_scheduler) -> None:
        """Give the pending score to perforatedai, and put right what growth disturbs."""
        if not self.active or self.complete or self._folder is None:
            return
        if self._pending is None:
            if self._names_seen and not self.history:
                name = self._metric(args)
                names = sorted(self._names_seen)
                raise PAIError(
                    f"pai: metric: found {name!r}, which no evaluation reports{_near(name, names)}; the evaluation "
                    f"gave {', '.join(names)}"
                )
            return
        if control.should_training_stop or state.global_step >= state.max_steps:
            return  # nothing would train what grows now
        score, self._pending = self._pending, None
        if np.isnan(score):
            logger.warning(
                "pai: %s is nan at step %d, which counts as no improvement", self._metric(args), state.global_step
            )
        states = _dendrite_states(optimizer, model)
        restructured, complete, structure = self._decide(args, state, model, optimizer, score)
        event = "complete" if complete else "" if not restructured else "grown"
        if event == "grown" and max(structure.values()) <= self._evaluated[0]:
            event = "retried"
        self._note(state, model, score, event)
        if restructured:
            newest = None if complete else max(structure.values()) - 1
            keep_state = self.config.optimizer_state == "keep"
            _sync_optimizer(optimizer, model, states, args.weight_decay, keep_state, newest)
            if _world() > 1:
                _rewrap(self.trainer.model_wrapped)
            if args.torch_compile:
                torch._dynamo.reset()
        self._before_growth = self._best_score(args) if event in ("grown", "retried") else None
        if event in ("grown", "retried") and self.config.learning_rate == "restart":
            self._restarted_at = getattr(lr_scheduler, "scheduler", lr_scheduler).last_epoch
            _restart_schedule(lr_scheduler, self._restarted_at, state.max_steps)
        if event:
            self._draw(args, state)
        if complete:
            self.complete = True
            if self.config.stop_when_complete:
                control.should_training_stop = True
                self._best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def _decide(self, args, state, model, optimizer, score: float) -> tuple[bool, bool, dict[str, int]]:
        """Rank 0 asks perforatedai; the others build what it built. DDP then gives all of them its weights."""
        answer: list[Any] = [None]
        with _private_random_state(args.seed * 1_000_003 + state.global_step, args.device):
            if _rank() == 0:
                try:
                    answer = [self._ask(model, optimizer, score)]
                except PAIError as error:
                    if _world() == 1:
                        raise
                    answer = [str(error)]
            if _world() > 1:
                dist.broadcast_object_list(answer, 0, device=args.device)
                if isinstance(answer[0], str):
                    raise PAIError(answer[0])
                if _rank() > 0 and answer[0][0]:
                    _rebuild(model, self._layers, answer[0][2])
        return answer[0]

    def _ask(self, model, optimizer, score: float) -> tuple[bool, bool, dict[str, int]]:
        globals_pai = _perforatedai()[0]
        if globals_pai.pai_tracker is not self._tracker:
            raise PAIError("another training in this process has taken perforatedai over; train one after the other")
        with _contained("adding a score"):
            self._tracker.set_optimizer_instance(_inner_optimizer(optimizer))
            # To the tracker exactly 0 means that there is no score yet.
            _, restructured, complete = self._tracker.add_validation_score(score or 1e-12, model)
        _tidy(model)
        for path in Path(self._folder.name).glob("switch_*"):
            path.unlink()
        return bool(restructured), bool(complete), structure_of(model)

    # Saying

    def _dendrites(self, model: nn.Module) -> int:
        return max(structure_of(model).values(), default=0)

    def parameters(self, model: nn.Module) -> int:
        """Parameters of the model as it computes now, perforatedai's scaffolding left out."""
        structure = structure_of(model)
        wrapped = perforated_layers(model).values()
        inside = {id(p) for module in wrapped for p in module.parameters()}
        inside -= {id(p) for module in wrapped for p in module.main_module.parameters()}
        own = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
        return own + sum(layer.added_by(structure[layer.name]) for layer in self._layers)

    def summary(self, model: nn.Module) -> dict[str, Any]:
        """Dendrites of each layer, their activation, and the evaluations that something followed."""
        growth = [entry for entry in self.history if entry["event"]]
        return {"layers": structure_of(model), "activation": self.config.activation, "growth": growth}

    def _note(self, state, model, score: float, event: str) -> None:
        """An evaluation and what followed: history, the Trainer's logs, and a line where there was growth."""
        evaluated = self._evaluated[0]
        dendrites, parameters = (self._dendrites(model), self.parameters(model)) if event else self._evaluated
        step = state.global_step
        self.history.append(
            {
                "step": step,
                "metric": score,
                "evaluated_dendrites": evaluated,
                "dendrites": dendrites,
                "parameters": parameters,
                "event": event,
            }
        )
        logs = {"pai/dendrites": dendrites, "pai/parameters": parameters}
        lines = []
        if self._before_growth is not None:
            logs |= {"pai/metric_before_growth": self._before_growth, "pai/metric_after_growth": score}
            lines.append(f"the metric was {self._before_growth:.5g} before growth and is {score:.5g} after")
        if event in ("grown", "retried"):
            how = "grew" if event == "grown" else "did not help, fresh ones grew"
            lines.append(
                f"dendrites {how}: {evaluated} -> {dendrites} a layer, {parameters:,} parameters; metric {score:.5g}"
            )
        if event == "complete":
            lines.append(
                f"growth is complete: the best weights are back, with {_counted(dendrites)} a layer and "
                f"{parameters:,} parameters"
            )
        if self.trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": step})
        else:
            self.trainer.log(logs)
        if state.is_world_process_zero:
            for line in lines:
                _say(f"Dendrites, step {step}: {line}")

    def _draw(self, args, state) -> None:
        if not (self.config.plot and self.history and state.is_world_process_zero):
            return
        with _written_whole(Path(args.output_dir, PLOT_FILE)) as path:
            draw_growth(self.history, self._metric(args), path)

    # Keeping

    def write_checkpoint(self, folder: Path, model: nn.Module) -> None:
        """Write beside a model's weights what rebuilds its structure and goes on with its growth."""
        structure = structure_of(model)
        tracker = None
        if self._tracker is not None and self._folder is not None:
            with _contained("writing its state"):
                tracker = self._tracker.to_string()
            best = Path(self._folder.name, "best_model.pt")
            if best.exists():
                with _written_whole(folder / BEST_FILE) as beside:
                    shutil.copyfile(best, beside)
        values = {
            "layers": [{**layer._asdict(), "dendrites": structure[layer.name]} for layer in self._layers],
            "activation": self.config.activation,
            "base_parameters": self.parameters(model)
            - sum(layer.added_by(structure[layer.name]) for layer in self._layers),
            "tracker": tracker,
            "pending": self._pending,
            "before_growth": self._before_growth,
            "restarted_at": self._restarted_at,
            "complete": self.complete,
            "history": self.history,
        }
        with _written_whole(folder / STATE_FILE) as beside:
            beside.write_text(json.dumps(values, indent=1), encoding="utf-8")

    def restore(self, folder: Path, args, model: nn.Module, optimizer) -> None:
        """Make a plain model's structure, its optimizer's groups, and the schedule those of a checkpoint.

        Weights and optimizer state are then loaded by the Trainer.

        Raises:
            PAIError: The checkpoint has no dendrites' state, or one of another configuration.
        """
        values = _read_state(folder)
        layers = [Layer(one["name"], tuple(one["shape"]), one["axis"], one["parameters"]) for one in values["layers"]]
        chosen, found = choose_layers(model, self.config), [layer.name for layer in layers]
        if chosen != found:
            raise PAIError(
                f"{folder / STATE_FILE}: the checkpoint has dendrites on {found}, the configuration on {chosen}"
            )
        if values["activation"] != self.config.activation:
            raise PAIError(
                f"{folder / STATE_FILE}: the checkpoint's activation is {values['activation']}, the configuration's "
                f"{self.config.activation}"
            )
        self._wrap(args, model, layers, values["base_parameters"])
        structure = {one["name"]: one["dendrites"] for one in values["layers"]}
        with _private_random_state(args.seed, args.device):
            _rebuild(model, layers, structure)
        _sync_optimizer(optimizer, model, {}, args.weight_decay, True, None)
        if _rank() == 0 and values["tracker"] is not None:
            with _contained("reading its state"):
                self._tracker.from_string(values["tracker"])
                self._tracker.loaded = True
            if (folder / BEST_FILE).exists():
                shutil.copyfile(folder / BEST_FILE, Path(self._folder.name, "best_model.pt"))
        self._pending, self._before_growth = values["pending"], values["before_growth"]
        self._restarted_at, self.complete = values["restarted_at"], values["complete"]
        self.history = values["history"]
        self._evaluated = self._dendrites(model), self.parameters(model)

    def restructure(self, folder: Path, model: nn.Module) -> None:
        """Give a live model the structure of a checkpoint, before its weights are loaded."""
        structure = {one["name"]: one["dendrites"] for one in _read_state(folder)["layers"]}
        _rebuild(model, self._layers, structure)

    def release(self) -> None:
        """Hand perforatedai back as if just imported and delete temporary files; the model keeps its dendrites."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        if self._tracker is not None:
            globals_pai = _perforatedai()[0]
            if globals_pai.pai_tracker is self._tracker:
                with _contained("resetting its settings"):
                    globals_pai.pc.__init__()
                globals_pai.pai_tracker = []
            self._tracker = None


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PAIError(
            f"{path}: {error.strerror}: the checkpoint was written without dendrites; resume it with max_dendrites 0, "
            f"or start a new training from its weights"
        ) from error
    except ValueError as error:
        raise PAIError(f"{path} is not JSON ({error}); resume from another checkpoint") from error


def _refuse_parallelism(args) -> None:
    """Raises PAIError for what holds parameters in a way that growth cannot follow."""
    if args.n_gpu > 1:
        raise PAIError(
            f"nn.DataParallel ({args.n_gpu} devices, one process) cannot follow growth: start one process a device "
            f"with torchrun --nproc_per_node {args.n_gpu}, or show one with CUDA_VISIBLE_DEVICES=0"
        )
    kind = AcceleratorState._shared_state.get("distributed_type", DistributedType.NO)
    named = "FSDP" if args.fsdp else "DeepSpeed" if args.deepspeed else None
    if named or kind not in WRAPPED_BY:
        raise PAIError(
            f"{named or kind.value}: dendrites need whole parameters on every process; use DistributedDataParallel "
            f"(torchrun without it)"
        )


def _check_installed(config: PAIConfig) -> None:
    """Raises PAIError if perforatedai is missing, or perforatedbp is there unasked, or asked for and missing."""
    if importlib.util.find_spec("perforatedai") is None:
        raise PAIError("perforatedai is not installed: pip install perforatedai==3.2.9 (Python 3.11 or 3.12)")
    installed = importlib.util.find_spec("perforatedbp") is not None
    if installed and not config.perforated_backpropagation:
        raise PAIError(
            "perforatedbp is installed and switches perforated backpropagation on as soon as perforatedai is imported: "
            "uninstall it, or ask for it with pai: perforated_backpropagation: true"
        )
    if config.perforated_backpropagation and not installed:
        raise PAIError("pai: perforated_backpropagation: found True, but perforatedbp is not installed")


def _counted(count: int) -> str:
    return f"{count} dendrite{'' if count == 1 else 's'}"


def _say(text: str) -> None:
    """A line in the log or, where nobody has set logging up, on the terminal."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(text)
    else:
        print(text, flush=True)


def draw_growth(history: list[dict[str, Any]], metric: str, path: Path) -> None:
    """The metric over the steps, with a line where dendrites grew."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["step"] for entry in history], [entry["metric"] for entry in history], marker=".")
    for entry in history:
        if entry["event"]:
            axes.axvline(entry["step"], color="tab:green" if entry["event"] == "grown" else "tab:gray", linestyle="--")
            axes.annotate(
                f"{entry['event']}: {entry['dendrites']}",
                (entry["step"], 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
                rotation=30,
            )
    axes.set(xlabel="step", ylabel=f"{metric} (dashed: dendrites a layer)")
    figure.savefig(path, dpi=120)


class PAITrainerMixin:
    """What only a Trainer can do for its `PAICallback`: `class Mine(PAITrainerMixin, YourTrainer)`.

    Checkpoints hold live tensor names and the structure, which is rebuilt before weights are loaded; a tensor missing
    or left over is an error. Without a `PAICallback`, or with one that grows nothing, training is the plain one.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._resumed_folder: Path | None = None
        if self.pai_callback is not None:
            self.pai_callback.trainer = self

    @property
    def pai_callback(self) -> PAICallback | None:
        """The first `PAICallback` among the callbacks."""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, PAICallback)), None)

    def add_callback(self, callback) -> None:
        super().add_callback(callback)
        if self.pai_callback is not None:
            self.pai_callback.trainer = self

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.pai_callback is not None:
                self.pai_callback.release()

    def create_optimizer(self, model: nn.Module | None = None):
        optimizer = super().create_optimizer(model)
        if self._resumed_folder is not None:
            # Only now, so that the optimizer's groups were made of the plain model, as in the interrupted run.
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

    def _load_callback_state(self) -> None:
        ours = self.pai_callback  # it holds the live model and restores itself
        super()._load_callback_state()
        self.callback_handler.callbacks = [
            ours if isinstance(callback, PAICallback) else callback for callback in self.callback_handler.callbacks
        ]

    def _load_best_model(self) -> None:
        if self.pai_callback is not None and self.pai_callback.active:
            self.pai_callback.restructure(Path(self.state.best_model_checkpoint), self.model)
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with _live_names(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super()._save(output_dir, state_dict)
        if self.args.should_save and self.pai_callback is not None and self.pai_callback.active:
            self.pai_callback.write_checkpoint(Path(output_dir or self.args.output_dir), self.model)

    def _issue_warnings_after_load(self, load_result) -> None:
        tensors = self.model.state_dict()
        loaded = {tensor.data_ptr() for name, tensor in tensors.items() if name not in load_result.missing_keys}
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or [])
        missing = [
            name
            for name in load_result.missing_keys
            if name not in ignored and (name not in tensors or tensors[name].data_ptr() not in loaded)  # else tied
        ]
        if missing or load_result.unexpected_keys:
            raise PAIError(
                f"the checkpoint is not of this model: it lacks {missing[:5]} ({len(missing)} tensors) and has "
                f"{load_result.unexpected_keys[:5]} ({len(load_result.unexpected_keys)}) that the model has not"
            )


@contextlib.contextmanager
def _live_names(model: nn.Module) -> Iterator[None]:
    """Let `save_pretrained` write live names: the Trainer resumes by them, and misses the Hub's old ones in silence."""
    if hasattr(model, "save_pretrained"):
        save = model.save_pretrained
        model.save_pretrained = lambda *args, **kwargs: save(*args, **{"save_original_format": False, **kwargs})
    try:
        yield
    finally:
        model.__dict__.pop("save_pretrained", None)


class PAITrainer(PAITrainerMixin, Trainer):
    """The Trainer with exact checkpoints of models that grow."""
