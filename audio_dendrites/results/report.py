"""The files of a run beside its model: metrics.json, predictions.parquet and figures."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from audio_dendrites.data.clips import is_local
from audio_dendrites.files import written_whole
from audio_dendrites.recipes import Recipe
from audio_dendrites.results.dendrites import use_sentence
from audio_dendrites.results.plots import plot_classes, plot_dendrites, plot_learning_curves, save_figure
from audio_dendrites.results.scores import NAMES, score
from audio_dendrites.results.tables import classes_table, scores_table, skipped_list
from audio_dendrites.training.process import without_tf32

TOKEN_OPTION = r"--\w+[_-]token"
PACKAGES = ("torch", "torchaudio", "transformers", "datasets", "accelerate", "evaluate")


def write_run(
    folder: Path,
    recipe: Recipe,
    trainer: Trainer,
    labels: Sequence[str],
    predictions: dict[str, DataFrame],
    skipped: Mapping[str, Sequence[str]],
    use: Mapping[str, Any] | None,
    throughput: Mapping[str, float] | None,
) -> None:
    """Write figures, predictions.parquet and, last, metrics.json. A folder that has metrics.json is complete.

    Args:
        folder: The run folder.
        recipe: The resolved recipe.
        trainer: After the training.
        labels: Class names in the order of the logits.
        predictions: `predictions_table` of the splits validation and test.
        skipped: For each split that lacks clips, what was wrong with each of them.
        use: The result of `measure_use`.
        throughput: The result of `Throughput.measure`.
    """
    state, splits = trainer.state, {}
    timing = next(log for log in reversed(state.log_history) if "train_runtime" in log)
    for split, table in predictions.items():
        splits[split] = score(table, labels, trainer.loss) | {"folds": recipe.data.folds[split]}
    metrics = run_facts(recipe, trainer, labels) | splits | {
        "best_step": state.best_global_step if recipe.training.load_best_model_at_end else None,
        "averaged_steps": getattr(trainer, "averaged_steps", []),  # if empty, the weights are those of the best step
        "steps": state.global_step,
        "epochs": state.epoch,
        "multiply_adds": multiply_adds(trainer),
        # If the run was resumed, these cover the time since.
        **{key: timing[key] for key in ("train_runtime", "train_steps_per_second", "train_samples_per_second")},
        "throughput": throughput,
        "skipped": dict(skipped),
    }  # fmt: skip
    if use is not None:
        metrics["dendrites"]["use"] = use
    # The figure may be published, so it shows only the name of a local data set.
    dataset = Path(recipe.data.dataset).name if "dataset" in metrics["local"] else recipe.data.dataset
    title = f"{dataset}, test fold {' '.join(recipe.data.folds['test'])}"
    plot_classes(predictions["test"], labels, title, folder)
    log, metric = state.log_history, str(trainer.args.metric_for_best_model).removeprefix("eval_")
    save_figure(plot_learning_curves(log, metric), folder / "learning_curves.png")
    if metrics["dendrites"] is not None:
        save_figure(plot_dendrites(log, metric, metrics["dendrites"]), folder / "dendrites.png")
    with written_whole(folder / "predictions.parquet") as path:
        predictions["test"].to_parquet(path, index=False)
    with written_whole(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def is_finished(folder: Path) -> bool:
    """Whether the run folder is complete."""
    return (folder / "metrics.json").exists()


def print_summary(folder: Path) -> None:
    """Print the scores of a finished run, the clips that were left out, and whether the dendrites are used."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    print(f"\n{scores_table(metrics)}\n\n{classes_table(metrics['test'])}")
    if metrics["skipped"]:
        print(f"\n{skipped_list(metrics['skipped'])}")
    if sentence := use_sentence(metrics.get("dendrites")):
        print(f"\n{sentence}")
    if throughput := metrics.get("throughput"):
        print(f"\n{throughput_sentence(throughput, metrics['processes'])}")
    print(f"\nRun folder: {folder}", flush=True)


def throughput_sentence(found: Mapping[str, float], processes: int) -> str:
    """How fast a run trained, and what it waited for. `found` is the result of `Throughput.measure`."""
    each = f" in each of {processes} processes" if processes > 1 else ""
    waits = {"data_wait": "for data", "communication_wait": "for other processes"}
    shares = " and ".join(f"{found[name]:.1%} {what}" for name, what in waits.items() if name in found)
    return f"Training steps: {found['clips_per_second']:.4g} clips a second{each}. Of their time, they waited {shares}."


@torch.no_grad()
@without_tf32()  # as all that follows the training
def multiply_adds(trainer: Trainer) -> int:
    """Multiply-adds of a forward pass over one window of a validation clip, dendrites included, as torch counts them.

    An FFT counts as 0. Attention is computed without fused kernels, because torch does not count those of a CPU.
    """
    model, batch = trainer.model.eval(), trainer.data_collator([trainer.eval_dataset[0]])
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops() // 2


def running_metrics(recipe: Recipe, trainer: Trainer) -> dict[str, Any]:
    """The metrics of a training that is not over: its last evaluation and its progress."""
    state = trainer.state
    facts = run_facts(recipe, trainer, list(trainer.model.config.id2label.values()))
    found = facts | {"running": {"step": state.global_step, "max_steps": state.max_steps}}
    log = next((log for log in reversed(state.log_history) if "eval_mAP" in log), None)
    if log is not None:
        scores = {name: log[f"eval_{name}"] for name in NAMES if f"eval_{name}" in log}
        found["validation"] = scores | {"clips": len(trainer.eval_dataset), "folds": recipe.data.folds["validation"]}
    return found


def run_facts(recipe: Recipe, trainer: Trainer, labels: Sequence[str]) -> dict[str, Any]:
    """The facts of a run that are known before it ends: its model and data, their size, and where it runs."""
    sources = {
        "dataset": recipe.data.dataset,
        "base_model": recipe.model.model,
        "teacher": recipe.training.distill_from,
    }
    parameters, config = list(trainer.model.parameters()), trainer.model.config
    plain = [parameter for name, parameter in trainer.model.named_parameters() if "lora_" not in name]
    weights = getattr(trainer, "class_weights", None)
    grower = getattr(trainer, "pai_callback", None)
    grower = grower if grower is not None and grower.active else None
    return {
        **sources,
        "architecture": getattr(config, "backbone", config).model_type,
        "local": [name for name, source in sources.items() if is_local(source)],
        "labels": list(labels),
        "sampling_rate": trainer.processing_class.sampling_rate,
        "chosen_by": recipe.training.metric_for_best_model if recipe.training.load_best_model_at_end else None,
        "class_weights": None if weights is None else dict(zip(labels, weights.tolist(), strict=True)),
        # The tensors of perforatedai do not count, nor those of LoRA, which the finished model has merged.
        "parameters": grower.parameters(trainer.model) if grower else sum(one.numel() for one in plain),
        "trained_parameters": sum(one.numel() for one in parameters if one.requires_grad),
        "dendrites": grower.summary(trainer.model) if grower else None,
        "precision": recipe.training.precision,
        "processes": recipe.training.world_size,
        "command": ["train.py", *_without_tokens(sys.argv[1:])],
        "environment": environment(trainer.args.device),
    }


def environment(device: torch.device) -> dict[str, str]:
    """The device, the versions and the commit of this code, without the names of the host and the user."""
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)  # CPU and MPS have none
    hardware = name_of(device) if name_of else f"{device.type.upper()} ({platform.machine()})"
    found = {"hardware": hardware, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    commit = commit_of(Path(__file__).resolve().parents[2])
    return found | ({"commit": commit} if commit else {})


def commit_of(root: Path) -> str | None:
    """The commit of the code in a clone, or in site-packages after `pip install git+https://…`; None if unknown."""
    with contextlib.suppress(PackageNotFoundError):
        installed = distribution("audio-dendrites")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        if "vcs_info" in origin and Path(installed.locate_file("audio_dendrites")).resolve().parent == root:
            return origin["vcs_info"]["commit_id"]
    # A repository around site-packages belongs to another project.
    only_here = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, env=only_here, capture_output=True, text=True
        )
    except OSError:  # git is not installed
        return None
    return git.stdout.strip() or None


def _without_tokens(words: Sequence[str]) -> list[str]:
    """A command line without the values of options such as --hub_token."""
    hidden = []
    for before, word in pairwise(["", *words]):
        option, equals, _ = word.partition("=")
        if re.fullmatch(TOKEN_OPTION, before) and not word.startswith("--"):
            word = "…"
        elif equals and re.fullmatch(TOKEN_OPTION, option):
            word = f"{option}=…"
        hidden.append(word)
    return hidden
