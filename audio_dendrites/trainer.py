"""The Hugging Face Trainer with checkpoints that restore every tensor and a learning rate for each layer."""

import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import joblib
import psutil
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction

from audio_dendrites.config import Recipe, RecipeError, RunArguments
from audio_dendrites.windows import ClipWindows

logger = logging.getLogger(__name__)


# Fields that may differ between a run and its resumption.
CHANGE_NO_RESULT = {
    "dataloader_num_workers", "disable_tqdm", "logging_first_step", "logging_steps", "logging_strategy", "log_level",
    "output_dir", "preprocessing_num_workers", "report_to", "resume_from_checkpoint", "run_name", "save_total_limit",
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint does not hold just the tensors of the model."""


class AudioTrainer(Trainer):
    """Trainer for clips. Where it evaluates `ClipWindows`, metrics and predictions are of whole clips.

    transformers 5 saves a model under the Hub's old tensor names, but its Trainer resumes and loads the best model by
    the live ones and passes over what it does not find: an AST's encoder stays as it was. Here checkpoints hold live
    names, and a tensor missing or left over is an error.

    Args:
        learning_rates: Learning rate of each parameter by name; none gives all `args.learning_rate`.
        loss: cross_entropy or bce, as in `classification_loss`.
        train_sampler: Draws the training clips; none shuffles them.
    """

    def __init__(
        self,
        *args,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        learning_rates: dict[str, float] | None = None,
        loss: str = "cross_entropy",
        train_sampler: Sampler | None = None,
        **kwargs,
    ):
        self.clip_metrics = compute_metrics
        super().__init__(*args, compute_metrics=compute_metrics and self._score_clips, **kwargs)
        self.learning_rates = learning_rates
        self.train_sampler = train_sampler
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # its default folder is named after the host
                callback.logging_dir = os.path.join(self.args.output_dir, "tensorboard")
        self.compute_loss_func = partial(
            classification_loss, label_smoothing=self.args.label_smoothing_factor, loss=loss
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.learning_rates is None or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (self.learning_rates[name], self.args.weight_decay if name in decayed else 0.0)
                groups.setdefault(key, []).append(parameter)
        optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer(
            [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
            **settings,
        )
        return self.optimizer

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs):
        self._evaluated = dataloader.dataset
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if output.predictions is None or not isinstance(self._evaluated, ClipWindows):
            return output
        logits, labels = self._evaluated.by_clip(output.predictions, output.label_ids)
        return output._replace(predictions=logits, label_ids=labels)

    def _score_clips(self, windows: EvalPrediction) -> dict[str, float]:
        if isinstance(self._evaluated, ClipWindows):
            windows = EvalPrediction(*self._evaluated.by_clip(windows.predictions, windows.label_ids))
        return self.clip_metrics(windows)

    def predict_in_fp32(self, dataset):
        """`predict` without autocast, so that the scores are those `pipeline` will give."""
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        return self.predict(dataset, metric_key_prefix="test")

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        with writing_to(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
            self.processing_class.save_pretrained(output_dir)

    def _issue_warnings_after_load(self, load_result) -> None:
        if load_result.missing_keys or load_result.unexpected_keys:
            raise CheckpointError(
                f"the checkpoint is not of this model: it lacks {load_result.missing_keys[:5]} "
                f"({len(load_result.missing_keys)} tensors) and has {load_result.unexpected_keys[:5]} "
                f"({len(load_result.unexpected_keys)}) that the model has not"
            )


def resolve_loss(args: RunArguments, multi_label: bool) -> str:
    """The loss that `auto` stands for.

    Args:
        args: With `loss`.
        multi_label: Whether clips have lists of labels.

    Returns:
        cross_entropy or bce.

    Raises:
        RecipeError: The loss cannot be had for such labels or with label smoothing, or the metric that chooses the
            checkpoint cannot.
    """
    loss = args.loss if args.loss != "auto" else "bce" if multi_label else "cross_entropy"
    if multi_label and loss == "cross_entropy":
        raise RecipeError("loss: found cross_entropy, but the clips have lists of labels: wanted bce or auto")
    if loss == "bce" and args.label_smoothing_factor:
        raise RecipeError(f"label_smoothing_factor: found {args.label_smoothing_factor}, wanted none with the loss bce")
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    if multi_label and metric in ("accuracy", "macro_f1"):
        raise RecipeError(f"metric_for_best_model: found {metric}, wanted mAP or loss: the clips have lists of labels")
    return loss


def classification_loss(
    outputs,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    loss: str = "cross_entropy",
) -> torch.Tensor:
    """Cross-entropy, or the binary one averaged over the classes; averaged over the clips of an optimizer step.

    Args:
        outputs: With `logits`, (batch, classes).
        labels: Class numbers (batch,) or, after mixup or for multi-label clips, 0 to 1 (batch, classes).
        num_items_in_batch: Entries of `labels` in all micro-batches and processes of the step, as the Trainer counts
            them; none averages over this batch.
        label_smoothing: Share of the probability spread over all classes (Szegedy et al. 2016, arXiv:1512.00567); of
            the cross-entropy alone.
        loss: cross_entropy, or bce: each class against the rest, as AST's authors train AudioSet and Speech Commands.

    Returns:
        The loss, a float32 scalar.
    """
    logits = outputs.logits.float()
    clips = len(labels) if num_items_in_batch is None else num_items_in_batch / labels[0].numel()
    if loss == "bce":
        targets = nn.functional.one_hot(labels, logits.shape[1]).float() if labels.dim() == 1 else labels
        summed = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]
    else:
        summed = nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    return summed / clips


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Turn what libraries raise when the disk is full or fails into an error that says how to go on.

    Raises:
        RecipeError: Something could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "PytorchStreamWriter" not in str(error):  # torch.save's way to say so
            raise
        raise RecipeError(
            f"writing to {folder} failed: {error}. Free some of the disk; the same command goes on from the last "
            f"checkpoint"
        ) from error


def check_run_folder(recipe: Recipe, model: nn.Module) -> None:
    """Find out before the training whether the run folder is this run's, can be written and will hold the checkpoints.

    Raises:
        RecipeError: The folder holds a run of another recipe, there is no permission to write, or the disk is too full.
    """
    folder, args = Path(recipe.training.output_dir), recipe.training
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            disk = shutil.disk_usage(folder)
    except OSError as error:
        raise RecipeError(
            f"output_dir: {folder} cannot be written ({error.strerror}); choose another --output_dir"
        ) from error
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # A checkpoint holds the weights and Adam's two moments; one more than the limit exists while the oldest is deleted.
    wanted = weights + ((args.save_total_limit or 1) + 1) * (weights + 2 * trained)
    if disk.free < wanted:
        raise RecipeError(
            f"output_dir: the disk of {folder} has {disk.free / 1e9:.2f} GB left, the run needs about "
            f"{wanted / 1e9:.2f} GB; free some, choose another --output_dir, or keep fewer with --save_total_limit 1"
        )
    holds_run = (folder / "metrics.json").exists() or last_checkpoint(folder)
    if holds_run and args.resume_from_checkpoint is None and (changed := _changes(recipe, folder / "config.yaml")):
        raise RecipeError(
            f"output_dir: {folder} holds a run of another recipe: {'; '.join(changed)}. Choose another --output_dir, "
            f"delete that one, or go on from it all the same with --resume_from_checkpoint {folder}/checkpoint-…"
        )


def find_checkpoint(args: TrainingArguments, labels: list[str]) -> str | None:
    """The checkpoint to go on from: the one the recipe names, else the newest complete one of its run folder.

    Raises:
        RecipeError: The one named is not complete, or is of other classes.
    """
    if args.resume_from_checkpoint is None:
        folder = last_checkpoint(Path(args.output_dir))
        if folder is None:
            return None
        logger.info("Checkpoint found, resuming from %s.", folder)
        return str(folder)
    folder = Path(args.resume_from_checkpoint)
    if fault := _fault(folder):
        raise RecipeError(f"resume_from_checkpoint: {folder}: {fault}")
    classes = list(json.loads((folder / "config.json").read_text())["id2label"].values())
    if classes != labels:
        raise RecipeError(
            f"resume_from_checkpoint: {folder} was trained on {len(classes)} classes ({', '.join(classes)}), "
            f"the recipe has {len(labels)} ({', '.join(labels)}); --model {folder} starts from its weights"
        )
    return str(folder)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run folder; one that a kill left half-written is passed over and named."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if fault := _fault(folder):
            logger.warning("Checkpoint %s is passed over: %s.", folder, fault)
        else:
            return folder
    return None


def prepare_process(args: TrainingArguments) -> None:
    """What the launchers leave undone: say where fewer processes run than were asked for; on the CPU, use its cores.

    `accelerate launch --cpu --num_processes 2` starts one process without a word, and any launch on the CPU gives a
    process one thread. `OMP_NUM_THREADS` above 1 is somebody's wish and stays.
    """
    if args.process_index:
        logging.getLogger("audio_dendrites").setLevel(logging.ERROR)  # the first process says it for all
    asked = int(os.environ["SLURM_NTASKS"]) if "SLURM_PROCID" in os.environ else 1
    for process in psutil.Process().parents():
        command = process.cmdline()
        if "launch" in command and any(Path(word).name.startswith("accelerate") for word in command[:3]):
            asked = max([asked, *_num_processes(command)])
    if (started := int(os.environ.get("WORLD_SIZE", 1))) > args.world_size:
        raise RecipeError(
            f"{started} processes were started, but each takes itself for the only one and would write the same run "
            f"folder; on the CPU of a machine with a GPU add --use_cpu"
        )
    if asked > args.world_size:
        logger.warning(
            "%d processes were asked for, %d runs: on the CPU start them with `torchrun --standalone --nproc_per_node "
            "%d train.py …` or `accelerate launch --config_file configs/accelerate/two_cpu.yaml train.py …`.",
            asked, args.world_size, asked,
        )  # fmt: skip
    if args.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _num_processes(command: list[str]) -> list[int]:
    words = [part for word in command for part in word.split("=", 1)]
    return [
        int(words[i + 1]) for i, word in enumerate(words[:-1]) if word.lstrip("-").replace("-", "_") == "num_processes"
    ]


def _changes(recipe: Recipe, saved: Path) -> list[str]:
    """What the recipe has otherwise than the saved one, of the fields that change a result."""
    then, now = yaml.safe_load(saved.read_text(encoding="utf-8")), recipe.to_dict()
    return [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted((then.keys() | now.keys()) - CHANGE_NO_RESULT)
        if then.get(key) != now.get(key)
    ]


def _fault(folder: Path) -> str | None:
    """What a checkpoint lacks to be resumed from; the Trainer writes `trainer_state.json` last."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
        with safe_open(folder / "model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        return f"it was not written to its end ({error})"
    random_states = list(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
    for path in (folder / "optimizer.pt", folder / "scheduler.pt", *random_states):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is missing or not whole"
    return None
