"""The Hugging Face Trainer with exact checkpoints, averages of weights, and a learning rate for each layer."""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import joblib
import psutil
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from audio_dendrites import hub
from audio_dendrites.averaging import MovingAverage, average_weights
from audio_dendrites.config import Recipe, RecipeError, RunArguments, parse_recipe
from audio_dendrites.export import ExportError, export_dendritic
from audio_dendrites.report import running_metrics
from audio_dendrites.windows import ClipWindows

logger = logging.getLogger(__name__)


# Fields that may differ between a run and its resumption.
CHANGE_NO_RESULT = {
    "dataloader_num_workers", "disable_tqdm", "logging_first_step", "logging_steps", "logging_strategy", "log_level",
    "output_dir", "preprocessing_num_workers", "report_to", "resume_from_checkpoint", "run_name", "save_total_limit",
    "push_to_hub", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy",
}  # fmt: skip
PUSH_FOLDER = ".push-"  # in the run folder, while a checkpoint is pushed
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


class CheckpointError(RuntimeError):
    """A checkpoint does not hold just the tensors of the model."""


class AudioTrainer(Trainer):
    """Trainer for clips. Where it evaluates `ClipWindows`, metrics and predictions are of whole clips.

    transformers 5 saves a model under the Hub's old tensor names, but its Trainer resumes and loads the best model by
    the live ones and passes over what it does not find: an AST's encoder stays as it was. Here checkpoints hold live
    names, and a tensor missing or left over is an error.

    With `push_to_hub` it sends what `hub.py` lets out, in the background, and a push that fails ends no training.

    Args:
        learning_rates: Learning rate of each parameter by name; none gives all `args.learning_rate`.
        loss: cross_entropy or bce, as in `classification_loss`.
        teacher: Its scores of each training batch, as augmented, take the share `distillation` of the labels.
        distillation: From 0 to 1.
        train_sampler: Draws the training clips; none shuffles them.
        average_checkpoints: End with the mean weights of so many last checkpoints in the place of the best one's.
        ema_decay: Evaluate, and end with, the moving average of the weights; see `MovingAverage`.
        recipe: As resolved, and
        card_template: the Jinja template of the model card; wanted where `args.push_to_hub`.

    Attributes:
        averaged_steps: Steps whose checkpoints the weights are the mean of; empty where they are not averaged.
        structure_since: Step since which a weight means what it means now. Checkpoints up to it are not averaged; a
            model that grows changes it.
    """

    structure_since = 0

    def __init__(
        self,
        *args,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        learning_rates: dict[str, float] | None = None,
        loss: str = "cross_entropy",
        teacher: nn.Module | None = None,
        distillation: float = 0.5,
        train_sampler: Sampler | None = None,
        average_checkpoints: int | None = None,
        ema_decay: float | None = None,
        recipe: Recipe | None = None,
        card_template: Path | None = None,
        **kwargs,
    ):
        self.clip_metrics = compute_metrics
        super().__init__(*args, compute_metrics=compute_metrics and self._score_clips, **kwargs)
        self.learning_rates, self.recipe, self.card_template = learning_rates, recipe, card_template
        self.train_sampler, self.loss = train_sampler, loss
        self.teacher, self.distillation = teacher and teacher.to(self.args.device), distillation
        self.averaged_steps: list[int] = []
        self.ema = None if ema_decay is None else MovingAverage(ema_decay)
        if self.ema is not None:
            self.add_callback(self.ema)
        if average_checkpoints is not None:  # before other callbacks end the training, such as one that grows the model
            self.callback_handler.callbacks.insert(0, _AverageAtEnd(self, average_checkpoints))
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is not None and model.training:
            labels, classes = inputs.pop("labels"), self.model.config.num_labels
            if labels.dim() == 1 and num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch * classes  # which the Trainer counts as it finds them
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.teacher(**inputs).logits
            inputs["labels"] = distilled_labels(labels, logits, self.distillation, self.loss)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs):
        self._evaluated = dataloader.dataset
        with self._averaged():
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

    def _averaged(self) -> contextlib.AbstractContextManager:
        """In which the model has the moving average of its weights, if there is one."""
        return contextlib.nullcontext() if self.ema is None else self.ema.in_place_of(self.model)

    def load_average(self, count: int) -> None:
        """Give the model the mean weights of the last checkpoints; where there are fewer than `count`, of those.

        Args:
            count: How many checkpoints.
        """
        steps = {int(folder.name.split("-")[-1]): folder for folder in whole_checkpoints(Path(self.args.output_dir))}
        usable = sorted(step for step in steps if self.structure_since < step <= self.state.global_step)
        self.averaged_steps = usable[-count:]
        if len(usable) < count:
            logger.warning(
                "average_checkpoints: %d asked for, %d saved%s.", count, len(usable),
                f" since the last growth (step {self.structure_since})" if self.structure_since else "",
            )  # fmt: skip
        if not usable:
            return
        folders = [steps[step] for step in self.averaged_steps]
        average = Path(self.args.output_dir, ".average")
        if self.args.should_save:
            with writing_to(average):
                average.mkdir(exist_ok=True)
                for path in folders[-1].glob("*.json"):  # among them, what rebuilds a model that has grown
                    shutil.copy(path, average)
                save_file(average_weights(folders), average / "model.safetensors")
        self.accelerator.wait_for_everyone()
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, str(average)
        self._load_best_model()  # the way by which any kind of model gets another's structure and weights
        self.state.best_model_checkpoint = best
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(average)
        logger.info(
            "The weights are the mean of the checkpoints of steps %s.", ", ".join(map(str, self.averaged_steps))
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.resumed = Path(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self.ema.load(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        with writing_to(self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
            self.processing_class.save_pretrained(output_dir)
            if self.ema is not None:
                self.ema.save(output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Ask the Hub before the training, so that what is wrong with it is said early."""
        self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None
        if self.is_world_process_zero():
            for left_over in Path(self.args.output_dir).glob(f"{PUSH_FOLDER}*"):  # of a run that was killed
                shutil.rmtree(left_over)
            hub.ask(self.args)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the card is `hub.model_card`'s, and the Trainer's own never takes its place."""

    def push_to_hub(self, *args, **kwargs) -> None:
        """Push the finished run folder."""
        self._finish_current_push()
        hub.publish_finished(self.args, self.card_template)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if (
            not self.is_world_process_zero()
            or self.args.hub_strategy == HubStrategy.END
            or (is_pushing and not self.args.hub_always_push)
        ):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with contextlib.ExitStack() as kept:
            try:
                folder = kept.enter_context(tempfile.TemporaryDirectory(dir=self.args.output_dir, prefix=PUSH_FOLDER))
                files = self._files_of_checkpoint(Path(checkpoint_folder), Path(folder))
            except (ExportError, OSError, SafetensorError) as error:
                logger.warning("Step %d is not pushed, and the training goes on: %s", self.state.global_step, error)
                return
            message = f"Training in progress, step {self.state.global_step}"
            job = hf_api().run_as_future(self._push, kept.pop_all(), files, message)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if is_pushing else []), job])

    def _push(self, kept: contextlib.ExitStack, files: dict[str, Path | bytes], message: str) -> None:
        with kept:
            hub.push_checkpoint(self.args, files, message)

    def _files_of_checkpoint(self, checkpoint: Path, folder: Path) -> dict[str, Path | bytes]:
        """The model as `pipeline` loads it, its card and, if the strategy says so, what resumes the training.

        All of it lies in `folder`, as the training goes on and deletes checkpoints while it is sent.
        """
        grower = getattr(self, "pai_callback", None)
        with self._averaged():
            export_dendritic(self.model, folder, self.processing_class, grower and grower.config.activation)
        files = hub.model_files(folder)
        metrics, recipe = hub.without_paths_of(running_metrics(self.recipe, self), self.recipe.to_dict())
        card = hub.model_card(metrics, recipe, self.card_template, self.args.hub_model_id, set(files))
        files |= {"README.md": card.encode()}
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            best = self.state.best_model_checkpoint
            files |= hub.checkpoint_files(checkpoint, best and Path(best), folder)
        return files

    def _issue_warnings_after_load(self, load_result) -> None:
        if load_result.missing_keys or load_result.unexpected_keys:
            raise CheckpointError(
                f"the checkpoint is not of this model: it lacks {load_result.missing_keys[:5]} "
                f"({len(load_result.missing_keys)} tensors) and has {load_result.unexpected_keys[:5]} "
                f"({len(load_result.unexpected_keys)}) that the model has not"
            )


class _AverageAtEnd(TrainerCallback):
    def __init__(self, trainer: AudioTrainer, count: int):
        self.trainer, self.count = trainer, count

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.load_average(self.count)


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
    args.check_loss(loss)
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    if multi_label and metric in ("accuracy", "macro_f1"):
        raise RecipeError(f"metric_for_best_model: found {metric}, wanted mAP or loss: the clips have lists of labels")
    return loss


def distilled_labels(labels: torch.Tensor, logits: torch.Tensor, share: float, loss: str) -> torch.Tensor:
    """Labels into which the scores of a teacher are mixed (Hinton et al. 2015, arXiv:1503.02531, at temperature 1).

    As the cross-entropies are linear in the labels, the loss is the mean of that of the labels and that of the scores.

    Args:
        labels: Class numbers (batch,), or 0 to 1 (batch, classes).
        logits: The teacher's, (batch, classes).
        share: Of the scores, from 0 to 1.
        loss: cross_entropy, where scores are the softmax, or bce, where they are the sigmoids.

    Returns:
        (batch, classes), float32.
    """
    logits = logits.float()
    scores = logits.sigmoid() if loss == "bce" else logits.softmax(-1)
    hard = nn.functional.one_hot(labels, logits.shape[1]) if labels.dim() == 1 else labels
    return torch.lerp(hard.float(), scores, share)


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


@contextlib.contextmanager
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
    # A checkpoint holds the weights, their moving average if there is one, and Adam's two moments; one more than the
    # limit exists while the oldest is deleted.
    checkpoint = weights * (1 if args.ema_decay is None else 2) + 2 * trained
    wanted = weights + ((args.save_total_limit or 1) + 1) * checkpoint
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

    One that is named by a Hub id is fetched into the run folder.

    Raises:
        RecipeError: The one named does not exist, is not complete, or is of other classes.
    """
    if args.resume_from_checkpoint is None:
        folder = last_checkpoint(Path(args.output_dir))
        if folder is None:
            return None
        logger.info("Checkpoint found, resuming from %s.", folder)
        return str(folder)
    folder = Path(args.resume_from_checkpoint)
    if not folder.exists() and re.fullmatch(HUB_ID, args.resume_from_checkpoint):
        with args.main_process_first(desc="fetching the checkpoint"):
            folder = hub.fetch_checkpoint(
                args.resume_from_checkpoint, Path(args.output_dir), args.hub_token, args.local_process_index == 0
            )
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
    return next(whole_checkpoints(output_dir), None)


def whole_checkpoints(output_dir: Path) -> Iterator[Path]:
    """The complete checkpoints of a run folder, newest first; others are passed over and named."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if fault := _fault(folder):
            logger.warning("Checkpoint %s is passed over: %s.", folder, fault)
        else:
            yield folder


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
    if not saved.exists():
        return [f"which one is not known, as {saved} is missing"]
    defaults = parse_recipe([]).to_dict()  # of what one of them leaves out, perhaps because it is older than the field
    then, now = defaults | yaml.safe_load(saved.read_text(encoding="utf-8")), defaults | recipe.to_dict()
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
