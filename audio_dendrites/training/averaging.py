"""Averages of a training's weights: over its last checkpoints, or over all its steps (EMA)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from audio_dendrites.errors import UserError

EMA_FILE = "ema.safetensors"  # in a checkpoint: the moving average, beside the weights that are trained


def average_weights(folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of the weights of checkpoints, as the AST authors take it over the last epochs.

    Args:
        folders: Checkpoints of one structure, oldest first; at least one.

    Returns:
        Tensors by live name, of their own dtype; summed in float64. What is not floating point is the last one's.

    Raises:
        UserError: The checkpoints have not the same tensors.
    """
    *others, last = folders
    mean = load_file(last / "model.safetensors")
    averaged = [name for name, tensor in mean.items() if tensor.is_floating_point()]
    sums = {name: mean[name].double() for name in averaged}
    shapes = {name: tensor.shape for name, tensor in mean.items()}
    for folder in others:
        tensors = load_file(folder / "model.safetensors")
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if different := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
            raise UserError(
                f"average_checkpoints: {folder} and {last} are models of different structure: they differ in "
                f"{', '.join(different[:3])} ({len(different)} tensors)"
            )
        for name in averaged:
            sums[name] += tensors[name].double()
    return mean | {name: (total / len(folders)).to(mean[name].dtype) for name, total in sums.items()}


class MovingAverage(TrainerCallback):
    """An exponential moving average of the weights after each optimizer step (EMA), by torch.optim.swa_utils.

    It starts with the weights after the first step: mean = decay · mean + (1 - decay) · weights, and the same of the
    buffers, such as the statistics of a batch normalisation, which have to fit the weights. The training itself is what
    it would be without; the model gets the average when the training ends.

    Args:
        decay: Between 0 and 1; the average looks back over about 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: AveragedModel | None = None  # while it trains
        self.resumed: Path | None = None  # the checkpoint whose average is gone on from

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """While the training goes on: the model with the average for its weights, which come back in the end."""
        if self.average is None:
            yield
            return
        trained = [tensor.detach().clone() for tensor in _tensors(model)]
        _copy(_tensors(self.average.module), model)
        try:
            yield
        finally:
            _copy(trained, model)

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint."""
        save_model(self.average, Path(folder, EMA_FILE))

    def load(self, folder: str | Path) -> None:
        """Go on from the average of a checkpoint.

        Raises:
            UserError: It has none.
        """
        path = Path(folder, EMA_FILE)
        if not path.exists():
            raise UserError(f"ema_decay: {folder} has no {EMA_FILE}: it was written by a training without ema_decay")
        load_model(self.average, path)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True)
        if self.resumed is not None:
            self.load(self.resumed)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        _copy(_tensors(self.average.module), model)
        self.average = None


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


@torch.no_grad()
def _copy(source: Iterable[torch.Tensor], model: nn.Module) -> None:
    for tensor, values in zip(_tensors(model), source, strict=True):
        tensor.copy_(values)
