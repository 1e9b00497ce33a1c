"""Whether the dendrites of a trained model are used."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from audio_dendrites.models.dendritic import perforated_layers

USED = 0.01  # a score that loses a point, or a loss that rises by a hundredth, without the features of the dendrites


def measure_use(trainer: Trainer) -> dict[str, Any] | None:
    """What the validation score loses without dendrites, and how much of the output of each layer they make.

    The dendrites of a layer add `top[i] · h_i` to its neurons. Two models without them are scored. In the first each
    h_i is replaced by its mean over the validation clips, so that the features are lost and the bias stays. In the
    second `top` is 0. The second alone would mislead, because it loses the bias as well.

    Args:
        trainer: After the training, with the live model of a `PAICallback`. All processes must call this.

    Returns:
        `metric`, its value as `score`, `without_features` and `without_top`; `lost`, what is lost without the features;
        `used`; and `layers`, by name the share of the dendrites in the spread (standard deviation) of the output, which
        is the sum of theirs and that of the neurons. None if nothing has grown.
    """
    layers = perforated_layers(trainer.model)
    grown = {name: module for name, module in layers.items() if module.dendrite_modules_added}
    if not grown:
        return None
    metric = str(trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    moments = {name: Moments() for name in grown}
    scores = {}
    for name, change in (("score", _measured), ("without_features", _with_means), ("without_top", _without)):
        with _hooked(grown, moments, change):
            # Trackers log the metrics of `predict` under their prefix.
            output = trainer.predict(trainer.eval_dataset, metric_key_prefix=f"dendrites_{name}")
            scores[name] = float(output.metrics[f"dendrites_{name}_{metric}"])
        for one in moments.values() if name == "score" else []:
            one.sums = trainer.accelerator.reduce(one.sums, "sum")
    lost = scores["score"] - scores["without_features"]
    least = USED
    if metric.endswith("loss"):
        lost, least = -lost, USED * scores["score"]
    shares = {name: one.share for name, one in moments.items()}
    return {"metric": metric, **scores, "lost": lost, "used": lost >= least, "layers": shares}


def use_sentence(dendrites: Mapping[str, Any] | None) -> str | None:
    """The verdict as a sentence, of the entry `dendrites` of metrics.json."""
    use = (dendrites or {}).get("use")
    if use is None:
        return None
    if use["metric"].endswith("loss"):
        lost = f"without their features the {use['metric']} rises by {use['lost']:.3f}"
    else:
        lost = f"{100 * use['lost']:.1f} points of {use['metric']} are lost without their features"
    return f"The dendrites are {'used' if use['used'] else 'not used'}: {lost}."


class Moments:
    """Count, sums and sums of squares of the neurons' outputs and of what dendrites add to them, by channel."""

    def __init__(self):
        self.sums: torch.Tensor | None = None  # (5, channels), float64

    def add(self, neurons: torch.Tensor, added: torch.Tensor) -> None:
        """Take in the outputs of a batch, (…, channels) both."""
        rows = [values.flatten(0, -2).double() for values in (neurons, added)]
        counts = torch.full_like(rows[0][0], len(rows[0]))
        sums = torch.stack([counts, *(part for row in rows for part in (row.sum(0), row.square().sum(0)))])
        self.sums = sums if self.sums is None else self.sums + sums

    @property
    def mean(self) -> torch.Tensor:
        """(channels,) of what the dendrites add."""
        return self.sums[3] / self.sums[0]

    @property
    def share(self) -> float:
        """Standard deviation of what the dendrites add, by its sum with that of the neurons, each over all channels."""
        count, *sums = self.sums
        spreads = [(square / count - (total / count).square()).mean().clamp(min=0).sqrt() for total, square in
                   ((sums[0], sums[1]), (sums[2], sums[3]))]  # fmt: skip
        return float(spreads[1] / sum(spreads).clamp(min=1e-300))


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], moments: Mapping[str, Moments], change: Callable) -> Iterator[None]:
    """The layers output what `change` makes of their neurons and of what the dendrites add."""

    def hook(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        axis = int(module.this_node_index)
        neurons = module.main_module(*args).to(output.dtype)
        added = (output - neurons).movedim(axis, -1)
        return change(moments[name], neurons.movedim(axis, -1), added).movedim(-1, axis)

    hooks = [module.register_forward_hook(partial(hook, name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _measured(moments: Moments, neurons: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    moments.add(neurons, added)
    return neurons + added


def _with_means(moments: Moments, neurons: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return neurons + moments.mean.to(neurons.dtype)


def _without(moments: Moments, neurons: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return neurons
