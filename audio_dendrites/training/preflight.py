"""Check the runs of a command before the first one trains."""

import logging
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, Trainer, get_scheduler

from audio_dendrites.data.features import ExtractorClips, Inputs
from audio_dendrites.errors import UserError
from audio_dendrites.models.dendritic import growth_fault
from audio_dendrites.models.loading import check_model, load_extractor, load_teacher
from audio_dendrites.models.waveform import WaveformForAudioClassification
from audio_dendrites.publishing import hub
from audio_dendrites.recipes import Recipe, RunArguments
from audio_dendrites.results.report import is_finished
from audio_dendrites.training.checkpoints import check_disk, check_resumption, check_run_folder
from audio_dendrites.training.losses import check_metrics, resolve_loss

logger = logging.getLogger(__name__)

# Fields that may differ between the runs of a command and do not change the checks of the model.
RUN_FIELDS = {
    "train_folds", "validation_folds", "test_folds", "seed", "output_dir", "hub_model_id", "run_name",
    "resume_from_checkpoint",
}  # fmt: skip


# Turns a `pai` block, a model and a batch into the configuration of the growth and the layers that grow.
FindGrowth = Callable[[Mapping[str, Any], PreTrainedModel, Mapping[str, torch.Tensor]], tuple[Any, Sequence[Any]]]


def preflight(recipes: Sequence[Recipe], find_growth: FindGrowth) -> list[Recipe]:
    """Find errors that would stop a run of a command, before the first run trains.

    The model is built on the meta device, where two clips pass through it without memory or arithmetic. Fields that
    several runs share are checked once.

    Args:
        recipes: One recipe for each run, in the order of the training.
        find_growth: Returns the `PAIConfig` and the `Layer`s of pai_callback, which the package does not import.

    Returns:
        The recipes of the runs that are not finished.

    Raises:
        UserError: A run cannot be trained as its recipe asks.
        PAIError: Dendrites cannot grow as a recipe asks.
    """
    models: dict[str, PreTrainedModel] = {}
    for recipe in recipes:
        if (shared := _shared_fields(recipe)) not in models:
            models[shared] = _check_model(recipe, find_growth)
    for recipe in recipes:
        check_run_folder(recipe)
        check_resumption(recipe.training)
    # Another command may finish a run meanwhile, so the first process decides for all.
    over = broadcast_object_list([[is_over(recipe.training) for recipe in recipes]])[0]
    waiting = [recipe for recipe, done in zip(recipes, over, strict=True) if not done]
    if waiting:
        check_disk([(recipe.training, models[_shared_fields(recipe)]) for recipe in waiting])
    for recipe in waiting:
        if recipe.training.push_to_hub and recipe.training.process_index == 0:
            hub.ask(recipe.training)
    return waiting


def _shared_fields(recipe: Recipe) -> str:
    return repr({name: value for name, value in recipe.to_dict().items() if name not in RUN_FIELDS})


def is_over(args: RunArguments) -> bool:
    """Whether a run has nothing left to train."""
    return is_finished(Path(args.output_dir)) and args.resume_from_checkpoint is None


def _check_model(recipe: Recipe, find_growth: FindGrowth) -> PreTrainedModel:
    """Check what does not depend on folds, seed and run folder. Returns the model on the meta device."""
    args, pai = recipe.training, recipe.dendrites.pai
    extractor = load_extractor(recipe.model, recipe.features)
    model = check_model(recipe, extractor)
    check_metrics(recipe, multi_label=False)
    if recipe.data.label_separator is not None:
        resolve_loss(args, multi_label=True)
    if args.distill_from and not recipe.features.needs_statistics:  # the teacher must have the same statistics
        load_teacher(args.distill_from, recipe.data.labels, extractor, None if args.loss == "auto" else args.loss)
    if args.early_stopping_patience is not None and args.metric_for_best_model is None:
        raise UserError("metric_for_best_model must be set with early_stopping_patience, got null")
    batch = two_clips(model, extractor)
    if isinstance(extractor, ExtractorClips):
        try:
            with torch.no_grad():
                model.eval()(**batch)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"model: {recipe.model.model} cannot take clips of its feature extractor: {error}"
            ) from error
    config, layers = (None, []) if pai is None else find_growth(pai, model, batch)
    if layers:
        _check_growth(args, config)
    _check_optimizer(args, model, grows=bool(layers))
    return model.to("meta")


def two_clips(model: PreTrainedModel, extractor: Inputs) -> dict[str, torch.Tensor]:
    """A batch of two clips of the length that the model sees, on its device.

    Args:
        model: What `check_model` returns. If it has a front end, this function replaces its `forward`.
        extractor: The feature extractor of the model.
    """
    if isinstance(extractor, ExtractorClips):
        noise = np.random.default_rng(0).standard_normal((2, extractor.max_length * extractor.hop_length), np.float32)
        inputs = extractor.stock()(list(noise), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return {model.main_input_name: inputs[model.main_input_name]}
    spectrograms = torch.empty(2, extractor.max_length, extractor.num_mel_bins, device="meta")
    if not isinstance(model, WaveformForAudioClassification):
        return {"input_values": spectrograms}
    model.front_end.forward = lambda waveforms, inside: spectrograms  # autocast does not know the meta device
    return {"input_values": torch.empty(2, model.front_end.samples(extractor.max_length), device="meta")}


def evaluations(args: RunArguments) -> int | None:
    """The number of evaluations of a training, or None if it depends on the number of clips."""
    if args.eval_strategy == "no":
        return 0
    if args.eval_strategy == "epoch":
        return None if args.max_steps > 0 else ceil(args.num_train_epochs)
    if args.eval_steps < 1:
        return int(1 / args.eval_steps)
    return args.max_steps // int(args.eval_steps) if args.max_steps > 0 else None


def _check_growth(args: RunArguments, config: Any) -> None:
    """Check that the length of a training, its early stopping and its other arguments fit the schedule of the growth.

    The schedule `early` needs no evaluations. With the other schedules, there are at least `cycle` evaluations from one
    growth to the next. If no evaluation is better, growth is tried again until it has failed `tries` times. It is
    complete after `1 + tries` cycles.

    Raises:
        UserError: Dendrites cannot grow in this training, or early stopping would end it before growth is complete.
    """
    if args.fsdp or args.deepspeed:
        raise UserError("fsdp and deepspeed must be null with dendrites, which need whole parameters in every process")
    if args.auto_find_batch_size:
        raise UserError("auto_find_batch_size must be false with dendrites, because it starts the training again")
    if config.schedule == "early":
        return
    if args.eval_strategy == "no":
        raise UserError("eval_strategy must be steps or epoch with dendrites, which grow after evaluations, got no")
    cycle = {"history": config.patience + 1, "fixed": config.interval}[config.schedule]
    patience, shortest = args.early_stopping_patience, cycle * (1 + config.tries)
    if patience is not None and patience < shortest:
        raise UserError(
            f"early_stopping_patience must be at least {shortest} with dendrites, got {patience}: growth is complete "
            f"only after {shortest - 1} evaluations without a better one (pai: schedule {config.schedule}, tries "
            f"{config.tries}). Set it to null to let growth end the training (pai: stop_when_complete)"
        )
    count, needed = evaluations(args), 1 + cycle * config.max_dendrites
    if count is not None and int(count * config.last_growth) < needed:
        logger.warning(
            "pai: max_dendrites: growth to %d dendrites needs at least %d evaluations, and the training makes %d until "
            "last_growth (%s of its steps).", config.max_dendrites, needed, int(count * config.last_growth),
            config.last_growth,
        )  # fmt: skip


def _check_optimizer(args: RunArguments, model: PreTrainedModel, grows: bool) -> None:
    """Try the optimizer and the schedule of the learning rate on a small parameter.

    Args:
        args: The training arguments.
        model: The model on the meta device.
        grows: Whether parameters are added to the optimizer during the training.

    Raises:
        UserError: The optimizer or the schedule cannot be made, or the optimizer cannot take new parameters.
    """
    first = nn.Parameter(torch.ones(2, 2, device=args.device))
    try:
        get_scheduler(args.lr_scheduler_type, torch.optim.SGD([first]), 0, 1, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_type: {args.lr_scheduler_type.value}: {error}") from error
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        raise UserError(f"optim: {args.optim.value}: {error}") from error
    if not grows:
        return
    try:
        reason = growth_fault(kind([first], **settings | {"lr": 1.0}))
    except Exception as error:  # whatever the library of the optimizer raises
        reason = repr(error)
    if reason is not None:
        raise UserError(
            f"optim must be an optimizer that can take new parameters when dendrites grow, such as adamw_torch, got "
            f"{args.optim.value} ({reason})"
        )
