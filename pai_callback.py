"""PerforatedAI dendrites in any Hugging Face Trainer. Copy this file and dendritic.py beside your training script.

    callback = PAICallback(PAIConfig(modules=["classifier.dense", "layers.-1.mlp.*"], max_dendrites=1))
    trainer = PAITrainer(model=model, args=args, ..., callbacks=[callback])
    trainer.train()
    trainer.save_model()  # a folder that from_pretrained and pipeline load, with trust_remote_code=True

A dendrite is a fresh copy of a layer. Its activated output is added to the output of the layer, neuron by neuron,
through weights that start at zero, called `top`. Growth therefore leaves the logits as they are, and the training
continues with more parameters.

`PAICallback` alone serves a plain `Trainer` in one process. `PAITrainer`, or `PAITrainerMixin` in front of your own
Trainer class, adds several processes, `load_best_model_at_end`, exact resumption, pushes of checkpoints, and growth in
TensorBoard. What any Trainer saves of a `PreTrainedModel` needs neither perforatedai nor this file. Of another module,
save `export_dendritic(trainer.model)`. Tested with perforatedai 3.2.9.
"""

import contextlib
import difflib
import fnmatch
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
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback

try:
    import dendritic
except ModuleNotFoundError:  # in the project that this file comes from
    from audio_dendrites.models import dendritic

logger = logging.getLogger(__name__)

STATE_FILE = "pai_state.json"  # in a checkpoint: the structure, and the score that has not been acted on
BEST_FILE = "pai_best.safetensors"  # in a checkpoint: the best weights so far, which growth starts from
TOP_MOVED = 0.01  # mean of |top| below which dendrites are hardly used: their outputs are smaller than those of neurons
AST_MODULES = ["classifier.dense", "layers.-1.mlp.*"]
# The settings of perforatedai itself, in YAML `preset: perforatedai`.
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

    The defaults make dendrites learn in small models that train from random weights. Each alone changes little.
    - `schedule: early`: growth in the first fifth of the steps, so that dendrites train for most of the schedule.
    - `activation: gelu` (Hendrycks and Gimpel 2016, arXiv:1606.08415) and `initial_scale: fan_in`, a standard deviation
      of 1/sqrt(inputs) with biases of 0 (LeCun et al. 1998, "Efficient BackProp"): a new dendrite is a nonlinear
      feature. With perforatedai's sigmoid and 0.01, its output is nearly constant.
    - `top_learning_rate: 10`: `top` learns faster than its layer, without weight decay, as in LoRA+ (Hayou et al. 2024,
      arXiv:2402.12354).
    - `last_growth: 0.5`: dendrites that grow later have too few steps to learn.

    The end of a name is enough for `modules`, and negative numbers count from the end: 'layers.-1.mlp.*'. A
    `dendrite_learning_rate` is for layers that are frozen or learn slowly; `top` learns at a multiple of it. The
    schedules `history` and `fixed` go back to the best weights before growth.
    `PERFORATEDAI` has perforatedai's own defaults (Brenner and Itti 2025, arXiv:2501.18018).
    """

    modules: list[str] | None = _option(None, "Names or classes of layers, with wildcards. Default: `AST_MODULES`.")
    max_dendrites: int = _option(1, "Dendrites that a layer may grow; 0 trains the plain model.", "[0, inf)")
    schedule: Literal["early", "history", "fixed"] = _option(
        "early",
        "early: at fixed steps. history: after `patience` evaluations without improvement. fixed: every `interval`.",
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
    dendrite_learning_rate: float | int | None = _option(None, "Default: the learning rate of the layer.", "(0, inf)")

    def __post_init__(self):
        for one in fields(self):
            value, interval = getattr(self, one.name), one.metadata["range"]
            if interval is not None and isinstance(value, (int, float)):
                low, high = map(float, interval[1:-1].split(","))
                ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
                if not (low < value < high or value in ends):
                    raise PAIError(f"pai: {one.name} must be in {interval}, got {value}")
        if self.schedule == "early" and self.max_dendrites * self.first_growth > self.last_growth:
            growth = f"{self.max_dendrites} times {self.first_growth}, last_growth {self.last_growth}"
            raise PAIError(f"pai: max_dendrites times first_growth must be at most last_growth, got {growth}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PAIConfig":
        """A configuration from fields by name. `preset: perforatedai` changes the defaults to `PERFORATEDAI`."""
        number = re.compile(r"[\d.]+e[-+]?\d+")  # YAML reads 1e-4 as a text
        values = {k: float(v) if isinstance(v, str) and number.fullmatch(v) else v for k, v in values.items()}
        preset = values.pop("preset", None)
        if preset not in (None, "perforatedai"):
            raise PAIError(f"pai: preset must be perforatedai, got {preset!r}")
        known = [one.name for one in fields(cls)]
        for name in values.keys() - set(known):
            raise PAIError(f"pai: unknown field {name!r}{_near(name, known)}; the fields are {', '.join(known)}")
        try:
            return cls(**(PERFORATEDAI if preset else {}) | values)
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
    """The live names of the layers that `config` chooses, in the order of the model. Each pattern must match one."""
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = AST_MODULES if config.modules is None else config.modules
    chosen = set().union(*(_matching(pattern, modules) for pattern in patterns))
    if not chosen:
        raise PAIError("pai: modules must name at least one layer, got an empty list")
    homes = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes[parameter].append(name)
    for names in homes.values():
        if len(names) > 1 and {name.rpartition(".")[0] for name in names} & chosen:
            raise PAIError(f"pai: modules must not share weights, but {' and '.join(names)} are one; leave them out")
    return [name for name in modules if name in chosen]


def _matching(pattern: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that a pattern matches. Other modules that it matches are left out."""
    aliases = {name: (name, _from_the_end(name, modules), type(module).__name__) for name, module in modules.items()}
    named = {n for n, known in aliases.items() if any(fnmatch.fnmatchcase(f".{one}", f"*.{pattern}") for one in known)}
    if found := {name for name in named if type(modules[name]) in dendritic.LAYERS}:
        return found
    if named:
        kinds = sorted({type(modules[name]).__name__ for name in named})
        raise PAIError(f"pai: modules must name linear or convolutional layers, got {pattern!r} ({', '.join(kinds)})")
    parts = pattern.count(".") + 1
    ends = sorted({".".join(one.split(".")[-parts:]) for known in aliases.values() for one in known})
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
    """Run the model once on a few examples to see what the layers output. The model stays as it is.

    Raises:
        PAIError: If the model never calls a layer.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as after:
        for name in names:
            note = lambda module, args, output, name=name: shapes.update({name: tuple(output.shape)})  # noqa: E731
            after.callback(model.get_submodule(name).register_forward_hook(note).remove)
        after.callback(model.train, model.training)
        model.eval()(**batch)
    if unused := [name for name in names if name not in shapes]:
        raise PAIError(f"pai: modules: the model's forward never calls {', '.join(unused)}; leave it out")
    axes = {name: dendritic.LAYERS[type(model.get_submodule(name))].channel_axis for name in names}
    return [Layer(name, shapes[name], len(shapes[name]) + axes[name]) for name in names]


def _few_examples(dataloader, device: torch.device) -> dict[str, Any]:
    """The first two examples as a batch without labels. The loader itself is not read, so that its order stays."""
    batch = dataloader.collate_fn(list(itertools.islice(iter(dataloader.dataset), 2)))
    without_labels = {key: value for key, value in batch.items() if key not in ("labels", "label", "label_ids")}
    return send_to_device(without_labels, device)


# ---- Room 3: perforatedai, contained. Everything that touches the library is here. ----


def _prompted(*args, **kwargs):
    raise SystemExit("it asked for input")  # no Exception, because perforatedai would catch it


def _perforatedai():
    """perforatedai's modules globals and utils. The import is slow and prints, so it happens at first use."""
    with contextlib.redirect_stdout(io.StringIO()):
        from perforatedai import globals_perforatedai, utils_perforatedai
    return globals_perforatedai, utils_perforatedai


@contextlib.contextmanager
def _contained(doing: str) -> Iterator[None]:
    """What perforatedai prints goes to the log. Where it would open a debugger, ask or exit, this raises a PAIError."""
    output, stdin, set_trace = io.StringIO(), sys.stdin, pdb.set_trace
    sys.stdin, pdb.set_trace = io.StringIO(), _prompted
    sys.stdin.readline = _prompted
    silence = warnings.catch_warnings(action="ignore")
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), silence:
            yield
    except (SystemExit, Exception) as error:
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
    _perforatedai()[0].pc.set_pai_forward_function(dendritic.ACTIVATIONS[module.activation])


def _configure(config: PAIConfig, layers: list[Layer], parameter: nn.Parameter) -> None:
    """Give perforatedai its settings. They are module variables, so another training may have changed them."""
    settings = {
        "configuration_confirmed": True, "unwrapped_modules_confirmed": True, "weight_decay_accepted": True,
        "testing_dendrite_capacity": False, "silent": True, "modules_to_perforate": [],
        "module_names_to_perforate": [], "module_ids_to_perforate": [f".{layer.name}" for layer in layers],
        "output_dimensions": [-1, -1, 0],
        "device": parameter.device, "use_cuda": parameter.device.type == "cuda", "d_type": parameter.dtype,
        "candidate_weight_initialization_multiplier": 1.0 if config.initial_scale == "fan_in" else config.initial_scale,
        "pai_forward_function": dendritic.ACTIVATIONS[config.activation],
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
        _configure(config, layers, first)
        # perforate_model would write into the working directory, which threads such as TensorBoard's writer use.
        globals_pai.pai_tracker = utils.TPA.PAINeuronModuleTracker(True, "PAI", making_graphs=False)
        utils.convert_network(model)
        globals_pai.pai_tracker = []
        for layer in layers:
            module = model.get_submodule(layer.name)
            module.set_this_output_dimensions([0 if place == layer.axis else -1 for place in range(len(layer.shape))])
            _set_up_arrays(module, layer)
            module.activation = config.activation
            module.register_forward_pre_hook(_use_activation)
    model.to(first.device)
    _tidy(model)
    dendritic.export_when_saved(model)


def _set_up_arrays(module: nn.Module, layer: Layer) -> None:
    """Do what perforatedai would do, and check, in the first backward pass."""
    module.dendrite_module.this_node_index.fill_(layer.axis)
    for values in module.dendrite_module.dendrite_values:
        values.setup_arrays([size if place == layer.axis else 1 for place, size in enumerate(layer.shape)])
        values.current_d_init[0] = 1
    module._fb_init_done = True


def _grow_to(model: nn.Module, layers: list[Layer], config: PAIConfig, dendrites: int, anew: bool = False) -> None:
    """Add dendrites until each layer has this number. `anew` first removes the present ones; their weights are lost."""
    parameter = next(model.parameters())
    with _contained("adding dendrites"):
        _configure(config, layers, parameter)
        for layer in layers:
            module = model.get_submodule(layer.name)
            if anew:
                module.clear_dendrites()
                _set_up_arrays(module, layer)
            present = module.dendrite_modules_added
            _perforatedai()[1].simulate_cycles(module, 2 * (dendrites - present), True)
            for new in module.dendrite_module.layers[present:] if config.initial_scale == "fan_in" else []:
                dendritic.draw_dendrites(new.weight, dendritic.LAYERS[type(new)].neuron_axis)
                if new.bias is not None:
                    nn.init.zeros_(new.bias)
    model.to(parameter.device)
    _tidy(model)


def _tidy(model: nn.Module) -> None:
    """Train only what the forward pass uses: DDP would wait for the gradients of the scaffolding forever."""
    for module in dendritic.perforated_layers(model).values():
        inner, tops = module.dendrite_module, module.dendrites_to_top
        for unused in (inner.parent_module, inner.dendrites_to_candidates, inner.dendrites_to_dendrites[:1], tops[:-1]):
            unused.requires_grad_(False)
        for used in (inner.layers, inner.dendrites_to_dendrites[1:], tops[-1:]):
            used.requires_grad_(True)
    model._buffers.pop("tracker_string", None)
    model.__dict__.pop("member_vars", None)


# ---- Room 4: optimizer and DDP ----


def _add_groups(optimizer, config: PAIConfig, scheduler=None) -> None:
    """Add empty groups to the optimizer for what learns at a rate of its own: for each group one for its `top`.

    They exist from the first step, so that the scheduler and the checkpoints always have the same number of groups.
    """
    own_rate = config.dendrite_learning_rate
    kinds = {"top": config.top_learning_rate} | ({} if own_rate is None else {"dendrites": 1})
    groups = list(optimizer.param_groups)
    if any("pai" in group for group in groups) or kinds == {"top": 1}:
        return
    for (place, group), kind in itertools.product(enumerate(groups), kinds):
        initial = group.get("initial_lr", group["lr"])
        rate = kinds[kind] * (initial if own_rate is None else own_rate)
        now = rate * group["lr"] / initial if initial else rate
        new = {**group, "params": [], "lr": now, "pai": [kind, place]}
        if "initial_lr" in group:
            new["initial_lr"] = rate
        if kind == "top":
            new["weight_decay"] = 0.0
        optimizer.add_param_group(new)
        for name in ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs"):  # a scheduler that was made before
            if values := getattr(scheduler, name, None):
                values.append({"base_lrs": rate, "_last_lr": now}.get(name, values[place]))


def _sync_optimizer(optimizer, model: nn.Module, weight_decay: float, before: dict[str, dict], newest: int | None):
    """Put the present dendrites into the groups of the same optimizer object. Scheduler and accelerate refer to it.

    A parameter of a dendrite joins the group of the layer's own parameter, or the group that `_add_groups` made for it.
    In a group the model's own parameters come first, in their order, and then the dendrites, so that a resume finds the
    same order. The state `before` is kept, except that of the `newest` dendrites, which have no past.
    """
    own, state = set(dendritic.own_parameters(model)), optimizer.state
    plain = [group for group in optimizer.param_groups if "pai" not in group]
    special = {tuple(group["pai"]): group for group in optimizer.param_groups if "pai" in group}
    home = {parameter: place for place, group in enumerate(plain) for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in own]
    for parameter in state.keys() - own:
        del state[parameter]
    for name, (parameter, source, number) in dendritic.dendrite_parameters(model).items():
        decay = weight_decay if parameter.dim() > 1 else 0.0
        fitting = [place for place, group in enumerate(plain) if group.get("weight_decay") == decay] or [len(plain) - 1]
        # The layer may be frozen. The last group is in the usual order the nearest to the head.
        place, kind = home.get(source, fitting[-1]), "top" if ".dendrites_to_top." in name else "dendrites"
        special.get((kind, place), plain[place])["params"].append(parameter)
        if name in before and number != newest:
            state[parameter] = before[name]
    model.zero_grad()


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
    """Whether the last evaluated model is the best, and the event that follows, as perforatedai's tracker decides.

    The event is "grown" (the best model gets one more dendrite), "retried" (the same, because the newest dendrites did
    not help), "complete" (the best model stays), or "".
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
        config: What grows and when, as a `PAIConfig` or a mapping of its fields.

    Attributes:
        history: An entry for each evaluation or growth, with its event: "", "grown", "retried" or "complete".
        complete: Whether growth has ended.
        grows: Whether the configuration lets anything grow.
        active: Whether the model is wrapped.
    """

    def __init__(self, config: PAIConfig | Mapping[str, Any] | None = None):
        self.config = PAIConfig.from_dict(config) if isinstance(config, Mapping) else config or PAIConfig()
        self.grows = self.config.max_dendrites > 0
        installed = [importlib.util.find_spec(name) is not None for name in ("perforatedai", "perforatedbp")]
        if self.grows and installed != [True, False]:
            raise PAIError("dendrites need perforatedai (pip install perforatedai==3.2.9) without perforatedbp")
        self.trainer: Trainer | None = None  # set by PAITrainerMixin
        self.history: list[dict[str, Any]] = []
        self.complete = self.active = False
        self._layers: list[Layer] = []
        self._pending: dict[str, Any] | None = None  # an evaluation that has not been acted on
        self._names_seen: set[str] = set()  # of metrics
        self._best: dict[str, torch.Tensor] = {}  # weights of the best model so far
        self._until_training = contextlib.ExitStack()

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if self.grows:
            self._until_training.callback(model.register_load_state_dict_pre_hook(_refuse_dendrites).remove)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self._until_training.close()
        if not self.grows and not self.active:
            return
        self._check_run(args, state, model, getattr(optimizer, "optimizer", optimizer))
        _add_groups(optimizer, self.config, lr_scheduler)
        if self.active:
            return
        if dendritic.perforated_layers(model):
            raise PAIError("the model has dendrites of another training; start from a plain model, or resume")
        names = choose_layers(model, self.config)
        with _private_random_state(args.seed, args.device):
            self._layers = probe_layers(model, _few_examples(kwargs["train_dataloader"], args.device), names)
            _perforate(model, self._layers, self.config)
        self.active = True
        if args.should_save:
            how = f"{self.config.schedule}, {self.config.activation}"
            tqdm.write(f"Dendrites: up to {self.config.max_dendrites} per layer ({how}) on {', '.join(names)}")

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if self.active and not self.complete and state.global_step > 0:
            self._names_seen |= set(metrics)
            if self._metric(args) in metrics:
                self._pending = self._entry(state.global_step, metrics[self._metric(args)], model)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Deal with the pending score, and grow if it is time."""
        if not self.active or self.complete or control.should_training_stop or state.global_step >= state.max_steps:
            return  # nothing would train what grows now
        entry, event, early = self._pending, "", self.config.schedule == "early"
        if self._names_seen and self._metric(args) not in self._names_seen and not early:
            name, names = self._metric(args), sorted(self._names_seen)
            raise PAIError(f"pai: metric must be one of {', '.join(names)}, got {name!r}{_near(name, names)}")
        if early:
            dendrites = max(dendritic.structure_of(model).values())
            due = (dendrites + 1) * self.config.first_growth * state.max_steps
            if dendrites < self.config.max_dendrites and state.global_step >= due:
                entry, event = entry or self._entry(state.global_step, None, model), "grown"
        elif entry is not None and state.global_step <= self.config.last_growth * state.max_steps:
            is_best, event = _judge([*self.history, entry], self.config, self._is_greater_better(args))
            if is_best:
                self._best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        if event:
            self._change(args, state, model, optimizer, event)
            entry |= self._entry(state.global_step, entry["metric"], model, event)
        if entry is not None:
            self._settle(state, entry)
        if event == "complete":
            self.complete = True
            control.should_training_stop |= self.config.stop_when_complete

    on_save = on_step_begin  # the checkpoint just written holds the evaluated weights, so that a resume grows the same

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.complete and self.config.stop_when_complete:
            model.load_state_dict(self._best)  # the loop looks at should_training_stop only after one more step
        grown = [entry["step"] for entry in self.history if entry["event"] in ("grown", "retried")]
        if grown and state.global_step == grown[-1] + max(1, state.max_steps // 10):
            self._check_top(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._pending is not None:
            self._settle(state, self._pending)
        if self.active and self.trainer is None and not isinstance(model, PreTrainedModel):
            logger.warning("The model has layers of perforatedai. To save it, use export_dendritic(trainer.model).")

    def _check_run(self, args, state, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raise a PAIError if the training asks for something that dendrites do not allow."""
        plain, sharded = self.trainer is None, AcceleratorState().distributed_type.value not in UNSPLIT
        pushed = args.hub_strategy.value if args.push_to_hub else "end"
        pushes_checkpoints = not plain and self.trainer.stock_push and pushed not in ("end", "every_save")
        beyond_plain = args.load_best_model_at_end or state.global_step > 0 or args.world_size > 1 or pushed != "end"
        unscored = self.config.schedule != "early" and args.eval_strategy == "no"
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        fault = dendritic.growth_fault(optimizer)
        if any(parameter.requires_grad and parameter not in held for parameter in model.parameters()):
            fault = "it does not hold all trained parameters"
        faults = {
            "nn.DataParallel, FSDP and DeepSpeed cannot follow growth: start one process per device with torchrun "
            "--nproc_per_node, or use one device": sharded or args.n_gpu > 1 or args.fsdp or args.deepspeed,
            "load_best_model_at_end, resume_from_checkpoint, several processes and pushes while it trains need "
            "PAITrainer instead of Trainer, or PAITrainerMixin in front of your own class": plain and beyond_plain,
            f"hub_strategy must be end or every_save, which push models that load, got {pushed}": pushes_checkpoints,
            "auto_find_batch_size starts the training twice: set the batch size yourself": args.auto_find_batch_size,
            f"eval_strategy must be steps or epoch, because growth follows {self._metric(args)}, got no": unscored,
            f"the optimizer {type(optimizer).__name__} cannot take new parameters ({fault}): use adamw_torch, or one "
            f"with a state per parameter": fault is not None,
        }
        for sentence, found in faults.items():
            if found:
                raise PAIError(f"with dendrites, {sentence}")

    def _metric(self, args) -> str:
        return "eval_" + (self.config.metric or args.metric_for_best_model or "loss").removeprefix("eval_")

    def _is_greater_better(self, args) -> bool:
        if self.config.metric in (None, args.metric_for_best_model) and args.greater_is_better is not None:
            return args.greater_is_better
        return not self._metric(args).endswith("loss")

    def _change(self, args, state, model, optimizer, event: str) -> None:
        """Go back to the best weights if the schedule says so. Unless growth is complete, add dendrites to the layers.

        All ranks do the same with the same random numbers. Then DDP starts again with the weights of rank 0.
        """
        held, newest = optimizer.state, None
        before = {name: held[one] for name, (one, *_) in dendritic.dendrite_parameters(model).items() if one in held}
        with _private_random_state(args.seed * 1_000_003 + state.global_step, args.device):
            if self.config.schedule != "early":
                dendrites = sum(".dendrites_to_top." in name for name in self._best) // len(self._layers)
                _grow_to(model, self._layers, self.config, dendrites, anew=True)
                model.load_state_dict(self._best)
            if event != "complete":
                newest = max(dendritic.structure_of(model).values())
                _grow_to(model, self._layers, self.config, newest + 1)
        _sync_optimizer(optimizer, model, args.weight_decay, before, newest)
        if args.world_size > 1:
            _rewrap(self.trainer.model_wrapped)
        if args.torch_compile:
            torch._dynamo.reset()

    def parameters(self, model: nn.Module) -> int:
        """Number of parameters that the model computes with, without perforatedai's scaffolding."""
        dendrites = [parameter for parameter, *_ in dendritic.dendrite_parameters(model).values()]
        return sum(parameter.numel() for parameter in [*dendritic.own_parameters(model), *dendrites])

    def summary(self, model: nn.Module) -> dict[str, Any]:
        """The dendrites of each layer, their activation, and the events of growth."""
        found = {"layers": dendritic.structure_of(model), "activation": self.config.activation}
        return found | {"growth": [entry for entry in self.history if entry["event"]]}

    def _entry(self, step: int, score: float | None, model: nn.Module, event: str = "") -> dict[str, Any]:
        """An entry of the history, as the model is now."""
        count = max(dendritic.structure_of(model).values())
        changed = {"dendrites": count, "parameters": self.parameters(model), "event": event}
        return changed if event else {"step": step, "metric": score, "evaluated_dendrites": count} | changed

    def _settle(self, state, entry: dict[str, Any]) -> None:
        """Add an entry to the history, send it to the Trainer's logs, and report growth in a line."""
        self._pending = None
        self.history.append(entry)
        if self.trainer is not None:
            self.trainer.log({"pai/dendrites": entry["dendrites"], "pai/parameters": entry["parameters"]})
        if entry["event"] and state.is_world_process_zero:
            what = {"grown": "dendrites grew", "retried": "new dendrites grew", "complete": "growth is complete"}
            counts = f"{entry['evaluated_dendrites']} -> {entry['dendrites']} per layer"
            size = f"{entry['parameters']:,} parameters"
            metric = "" if entry["metric"] is None else f", metric {entry['metric']:.5g}"
            tqdm.write(f"Dendrites, step {entry['step']}: {what[entry['event']]}; {counts}, {size}{metric}")

    def _check_top(self, state, model: nn.Module) -> None:
        """Warn if the weights from dendrites to neurons have hardly moved from zero."""
        layers = dendritic.perforated_layers(model)
        top = {name: module.dendrites_to_top[-1][-1].abs().mean() for name, module in layers.items()}
        still = [name for name, mean in top.items() if mean < TOP_MOVED]
        if still and state.is_world_process_zero:
            logger.warning(
                f"Dendrites, step {state.global_step}: the newest dendrites of {', '.join(still)} are hardly used: "
                f"`top` is {max(map(top.get, still)):.2g} on average. Raise its learning rate, or grow earlier."
            )

    def write_checkpoint(self, folder: Path, model: nn.Module) -> None:
        """Write, beside the weights of a model, what rebuilds its structure and continues its growth."""
        values = {
            "layers": [layer._asdict() for layer in self._layers],
            "dendrites": max(dendritic.structure_of(model).values()),
            "config": asdict(self.config), "pending": self._pending, "complete": self.complete, "history": self.history,
        }  # fmt: skip
        (folder / STATE_FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if self._best:
            save_file(self._best, folder / BEST_FILE)
        if (config := folder / "config.json").exists():
            # from_pretrained reads this name of the weights, refuses it, and shows it.
            sentence = "This checkpoint resumes a training with dendrites. Load the folder that save_model() wrote."
            values = json.loads(config.read_text(encoding="utf-8")) | {"transformers_weights": sentence}
            config.write_text(json.dumps(values, indent=2), encoding="utf-8")

    def restore(self, folder: Path, args, model: nn.Module, optimizer) -> None:
        """Give a plain model and its optimizer the structure of a checkpoint. The Trainer then loads the weights."""
        values = _read_state(folder)
        self._layers = [Layer(**one) for one in values["layers"]]
        then = values["config"] | {"modules": [layer.name for layer in self._layers]}
        now = asdict(self.config) | {"modules": choose_layers(model, self.config)}
        for name in ("modules", "activation", "top_learning_rate", "dendrite_learning_rate"):
            if then[name] != now[name]:
                raise PAIError(f"pai: {name} must be {then[name]}, as {folder} was written with it, got {now[name]}")
        with _private_random_state(args.seed, args.device):
            _perforate(model, self._layers, self.config)
            self.restructure(folder, model)
        self.active = True
        _sync_optimizer(optimizer, model, args.weight_decay, {}, None)
        self._best = load_file(folder / BEST_FILE) if (folder / BEST_FILE).exists() else {}
        self._pending, self.complete, self.history = values["pending"], values["complete"], values["history"]

    def restructure(self, folder: Path, model: nn.Module) -> None:
        """Give a live model the structure of a checkpoint, before its weights are loaded."""
        _grow_to(model, self._layers, self.config, _read_state(folder)["dendrites"], anew=True)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return {key: values[key] for key in ("layers", "dendrites", "config", "pending", "complete", "history")}
    except (OSError, ValueError, KeyError) as error:
        found = f"{folder} cannot be resumed by this pai_callback.py ({error!r})"
        raise PAIError(f"{found}: use a checkpoint that it wrote with dendrites, or set max_dendrites: 0") from error


def _refuse_dendrites(model: nn.Module, state_dict: Mapping[str, Any], *args) -> None:
    """Before weights are loaded: those that Trainer saved of a model with dendrites do not fit a plain model."""
    if any(name.endswith(".top") for name in state_dict.keys() - model.state_dict().keys()):
        raise PAIError("Trainer cannot resume a checkpoint with dendrites: train and resume with PAITrainer")


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

    @property
    def stock_push(self) -> bool:
        """Whether checkpoints are pushed as transformers does it, which copies their model to the repository's root."""
        return super()._push_from_checkpoint.__func__ is Trainer._push_from_checkpoint

    def create_optimizer(self, model: nn.Module | None = None):
        optimizer, callback = super().create_optimizer(model), self.pai_callback
        if callback is not None:
            callback.trainer = self
            if callback.grows:
                _add_groups(optimizer, callback.config, self.lr_scheduler)
        if self._resumed_folder is not None:
            # Only now, so that the groups of the optimizer are those of the plain model, as in the interrupted run.
            folder, self._resumed_folder = self._resumed_folder, None
            callback.restore(folder, self.args, self.model, optimizer)
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._in_checkpoint = _internal_call and output_dir is not None  # so does `_save_checkpoint` call it
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        callback, model = self.pai_callback, self.model
        active = callback is not None and callback.active
        if not self._in_checkpoint:
            if active and not isinstance(model, PreTrainedModel):
                state_dict = dendritic.export_dendritic(model).state_dict()
            return super()._save(output_dir, state_dict)
        if isinstance(model, PreTrainedModel):  # by live names: the Trainer ignores the Hub's names silently
            live = type(model).save_pretrained
            model.save_pretrained = lambda *args, **kw: live(model, *args, **kw | {"save_original_format": False})
        super()._save(output_dir, state_dict)
        vars(model).pop("save_pretrained", None)
        if active:
            dendritic.export_when_saved(model)
            if self.args.should_save:
                callback.write_checkpoint(Path(output_dir), model)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        callback = self.pai_callback
        if callback is None or not callback.active or not self.stock_push or self.args.hub_strategy == "end":
            return super()._push_from_checkpoint(checkpoint_folder)
        self._in_checkpoint = False
        with tempfile.TemporaryDirectory() as exported:  # a model that loads, for the root of the repository
            self._save(exported)
            for code in Path(exported).glob("*.py"):
                Path(self.args.output_dir, code.name).write_bytes(code.read_bytes())
            super()._push_from_checkpoint(exported)

    def _issue_warnings_after_load(self, load_result) -> None:
        absent = getattr(self.model, "_keys_to_ignore_on_save", None) or []
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in {*absent, *tied}]
        if missing or load_result.unexpected_keys:
            left = load_result.unexpected_keys
            found = f"missing {missing[:5]} ({len(missing)} tensors), left over {left[:5]} ({len(left)} tensors)"
            raise PAIError(f"the checkpoint does not fit the model: {found}")


class PAITrainer(PAITrainerMixin, Trainer):
    """The Trainer with exact checkpoints of models that grow."""
