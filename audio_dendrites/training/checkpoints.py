"""Find the checkpoint that resumes a training, and check the run folder and its disk."""

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from audio_dendrites.errors import UserError, listed
from audio_dendrites.files import try_writing
from audio_dendrites.publishing import hub
from audio_dendrites.recipes import SIZES, Recipe, parse_recipe
from audio_dendrites.training.process import one_process_first

logger = logging.getLogger(__name__)

# Fields that may differ between a run and its resumption.
CHANGE_NO_RESULT = {
    "dataloader_num_workers", "disable_tqdm", "logging_first_step", "logging_steps", "logging_strategy", "log_level",
    "output_dir", "preprocessing_num_workers", "report_to", "resume_from_checkpoint", "run_name", "save_total_limit",
    "push_to_hub", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "card_note",
}  # fmt: skip
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


class CheckpointError(RuntimeError):
    """The tensors of a checkpoint are not those of the model."""


def check_run_folder(recipe: Recipe) -> None:
    """Check that the run folder can be written and does not hold another run.

    Raises:
        UserError: The folder cannot be written, or it holds a run of another recipe.
    """
    folder = Path(recipe.training.output_dir)
    try:
        try_writing(folder)
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot be written ({error.strerror}); choose another --output_dir"
        ) from error
    is_over, checkpoint = (folder / "metrics.json").exists(), last_checkpoint(folder)
    if recipe.training.resume_from_checkpoint is not None or not (is_over or checkpoint):
        return
    if changed := _changes(recipe, folder / "config.yaml", None if is_over else processes_of(checkpoint)):
        raise UserError(
            f"output_dir: {folder} holds a run of another recipe: {'; '.join(changed)}. Choose another --output_dir, "
            f"delete the folder, or resume from it anyway with --resume_from_checkpoint {folder}/checkpoint-…"
        )


def check_disk(runs: Sequence[tuple[TrainingArguments, nn.Module]]) -> None:
    """Check that the disk has room for the checkpoints that are still to be written.

    Args:
        runs: The arguments and the model of each run. All run folders are on one disk.

    Raises:
        UserError: The disk is too full.
    """
    needed, largest = 0, 0
    for args, model in runs:
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        # A checkpoint holds the weights, their moving average if there is one, and Adam's two moments.
        checkpoint = weights * (1 if args.ema_decay is None else 2) + 2 * trained
        needed += max(0, weights + (args.save_total_limit or 1) * checkpoint - _bytes_in(args.output_dir))
        largest = max(largest, checkpoint)  # one more than the limit exists while the oldest is deleted
    folder = Path(runs[0][0].output_dir)
    if (free := shutil.disk_usage(folder).free) < needed + largest:
        raise UserError(
            f"output_dir: the disk of {folder} has {free / 1e9:.2f} GB left, and the checkpoints need about "
            f"{(needed + largest) / 1e9:.2f} GB (runs to train: {len(runs)}); free space, choose another --output_dir, "
            f"or keep fewer checkpoints with --save_total_limit 1"
        )


def _bytes_in(folder: str) -> int:
    """The size of all files of a folder. Another command may be writing to it."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.stat(os.path.join(parent, name)).st_size
    return found


def check_resumption(args: TrainingArguments) -> None:
    """Check that the checkpoint that the recipe names exists and is complete. Download it if it is on the Hub.

    Raises:
        UserError: It does not exist or is not complete.
    """
    if (name := args.resume_from_checkpoint) is None:
        return
    if _is_on_hub(name):
        with one_process_first(args, "downloading the checkpoint"):
            hub.download_checkpoint(name, args.hub_token)
    elif fault := _fault(Path(name)):
        raise UserError(f"resume_from_checkpoint: {name}: {fault}")


def find_checkpoint(args: TrainingArguments, labels: list[str]) -> str | None:
    """The checkpoint to resume from: the one that the recipe names, or the newest complete one of the run folder.

    A checkpoint on the Hub is downloaded into the run folder.

    Raises:
        UserError: The named checkpoint has other classes, does not exist, or is not complete.
    """
    if (name := args.resume_from_checkpoint) is None:
        folder = last_checkpoint(Path(args.output_dir))
        if folder is None:
            return None
        logger.info("Checkpoint found, resuming from %s.", folder)
        if (before := processes_of(folder)) != args.world_size:
            logger.info(
                "The number of processes changes from %d to %d. Dropout gets other random numbers.",
                before, args.world_size,
            )  # fmt: skip
        return str(folder)
    folder = Path(name)
    if _is_on_hub(name):
        with one_process_first(args, "fetching the checkpoint"):
            folder = hub.fetch_checkpoint(name, Path(args.output_dir), args.hub_token, args.local_process_index == 0)
    if fault := _fault(folder):
        raise UserError(f"resume_from_checkpoint: {folder}: {fault}")
    classes = list(json.loads((folder / "config.json").read_text())["id2label"].values())
    if classes != labels:
        raise UserError(
            f"resume_from_checkpoint: {folder} was trained on {len(classes)} classes ({listed(classes)}), "
            f"the recipe has {len(labels)} ({listed(labels)}). To start from its weights, use --model {folder}"
        )
    return str(folder)


def _is_on_hub(checkpoint: str) -> bool:
    return not Path(checkpoint).exists() and re.fullmatch(HUB_ID, checkpoint) is not None


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run folder. A warning names each incomplete one."""
    return next(whole_checkpoints(output_dir), None)


def whole_checkpoints(output_dir: Path) -> Iterator[Path]:
    """The complete checkpoints of a run folder, newest first. A warning names each incomplete one."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if fault := _fault(folder):
            logger.warning("Checkpoint %s is passed over: %s.", folder, fault)
        else:
            yield folder


def processes_of(checkpoint: Path) -> int:
    """The number of processes that wrote a checkpoint. If there were several, each has its own random states."""
    return len(list(checkpoint.glob("rng_state_*.pth"))) or 1


def _changes(recipe: Recipe, saved: Path, processes: int | None) -> list[str]:
    """How the recipe differs from the saved one in the fields that change a result.

    Args:
        recipe: The recipe.
        saved: The config.yaml of the run folder.
        processes: The number of processes that trained so far, or None if the run is over.
    """
    if not saved.exists():
        return [f"its recipe is unknown, because {saved} is missing"]
    defaults = parse_recipe([]).to_dict()  # for fields that one of them lacks, such as a recipe of an older version
    then, now = defaults | yaml.safe_load(saved.read_text(encoding="utf-8")), defaults | recipe.to_dict()
    if now.get("match_parameters") is not None:  # the saved recipe has the size that was found
        for fields in (then, now):
            settings = fields.get("model_config") or {}
            fields["model_config"] = {name: value for name, value in settings.items() if name not in SIZES}
    for fields in (then, now):
        if fields["cache"] == "none":
            fields["cache"] = "features"  # the same training
    same = CHANGE_NO_RESULT - ({"dataloader_num_workers"} if recipe.data.streaming else set())  # each has its shards
    if recipe.training.total_batch_size is not None:  # each process takes its share
        same = same | {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if processes is not None:
        then["total_batch_size"] = _clips_of_a_step(then, processes)
        now["total_batch_size"] = _clips_of_a_step(now, recipe.training.world_size)
    changed = [
        key
        for key in sorted((then.keys() | now.keys()) - same)
        # The saved recipe has a number where the recipe has `auto`.
        if then.get(key) != now.get(key) and (now.get(key), type(then.get(key))) != ("auto", float)
    ]
    found = [f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in changed]
    if changed == ["total_batch_size"] and recipe.training.total_batch_size is None:
        found[0] += f" on {recipe.training.world_size} processes (set it to {then['total_batch_size']} to resume)"
    return found


def _clips_of_a_step(fields: Mapping[str, Any], processes: int) -> int:
    """The clips of an optimizer step over all processes, from the fields of a recipe."""
    size = fields.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
    steps = fields.get("gradient_accumulation_steps", TrainingArguments.gradient_accumulation_steps)
    return fields.get("total_batch_size") or size * steps * processes


def _fault(folder: Path) -> str | None:
    """Why a training cannot resume from a checkpoint, or None. The Trainer writes `trainer_state.json` last.

    The optimizer, the schedule and the random states are pickles. `torch.load` reads them as the Trainer does, with
    `weights_only`. It refuses a checkpoint with objects that are neither tensors nor plain values.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / "trainer_state.json").read_text())
        with safe_open(folder / "model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        return f"it is incomplete ({error})"
    random_states = list(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
    for path in (folder / "optimizer.pt", folder / "scheduler.pt", *random_states):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # leaves the tensors on the disk
        except pickle.UnpicklingError:
            return f"{path.name} holds objects that are neither tensors nor plain values, and such objects can run code"
        except (OSError, RuntimeError) as error:
            return f"{path.name} is missing or damaged ({shorten(str(error), 200)})"
    return None
