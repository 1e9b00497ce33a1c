"""Shared by the timing programs: a command line, a training step, and functions timed in turns."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def parser(description: str | None, rounds: int = 5, batch_size: int = 2) -> argparse.ArgumentParser:
    """A command line with the options that all programs have."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--batch_size", type=int, default=batch_size)
    found.add_argument("--device", default="cpu")
    return found


def seconds(function: Callable[[], Any], times: int = 1) -> float:
    """Wall-clock time of one of several calls, up to the end of their work on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - start) / times


def in_turns(functions: Mapping[str, Callable[[], Any]], rounds: int, shortest: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each function in each round (A B A B …), after calls to warm up.

    Args:
        functions: Functions by name.
        rounds: Number of rounds.
        shortest: Seconds. A shorter function is repeated within a round until it lasts as long.
    """
    warm_up = {name: seconds(function, 3 if shortest else 1) for name, function in functions.items()}
    times = {name: max(1, round(shortest / taken)) for name, taken in warm_up.items()}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(seconds(function, times[name]))
    return taken


def medians(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function; see `in_turns`."""
    return {name: statistics.median(taken) for name, taken in in_turns(functions, rounds).items()}


def train_step(model: nn.Module, dtype: torch.dtype | None = None) -> Callable[[Mapping[str, torch.Tensor]], None]:
    """A training step on a batch: forward under autocast to `dtype`, cross-entropy, backward and AdamW."""
    model.train()
    optimizer, device = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), next(model.parameters()).device

    def step(batch: Mapping[str, torch.Tensor]) -> None:
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        labels = inputs.pop("labels")
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
