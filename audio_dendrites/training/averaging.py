"""Average weights over the last checkpoints of a training, or over all of its steps (EMA)."""

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

EMA_FILE = "ema.safetensors"  # the moving average in a checkpoint, beside the trained weights


def average_weights(folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean weights of checkpoints, as AST's authors average the last epochs.

    Args:
        folders: At least one checkpoint, oldest first. All have the same structure.

    Returns:
        Tensors by live name with their own dtype. Sums are in float64. Tensors that are not floating point are those
        of the last checkpoint.

    Raises:
        UserError: The checkpoints do not have the same tensors.
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
                f"average_checkpoints: {folder} and {last} must have the same tensors, got differences in "
                f"{', '.join(different[:3])} ({len(different)} tensors)"
            )
        for name in averaged:
            sums[name] += tensors[name].double()
    return mean | {name: (total / len(folders)).to(mean[name].dtype) for name, total in sums.items()}


class MovingAverage(TrainerCallback):
    """An exponential moving average of the weights over the optimizer steps (EMA), by torch.optim.swa_utils.

    It starts with the weights after the first step: mean = decay · mean + (1 - decay) · weights. Buffers, such as the
    statistics of a batch normalisation, are averaged in the same way. The average does not change the training. The
    model gets it when the training ends.

    Args:
        decay: Between 0 and 1. The average covers about 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: AveragedModel | None = None  # during a training
        self.resumed: Path | None = None  # the checkpoint whose average continues

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Give the model the average for a `with` block during the training, and then its own weights again."""
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
        """Continue from the average of a checkpoint.

        Raises:
            UserError: The checkpoint has no average.
        """
        path = Path(folder, EMA_FILE)
        if not path.exists():
            raise UserError(f"ema_decay: {folder} must have {EMA_FILE}, but it is from a training without ema_decay")
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
