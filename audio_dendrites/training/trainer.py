"""The Hugging Face Trainer with exact checkpoints, averages of weights, and a learning rate for each layer."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, HubStrategy, PredictionOutput
from transformers.utils.hub import PushInProgress, hf_api

from audio_dendrites.data.stream import ClipStream, StreamLoader
from audio_dendrites.data.windows import ClipWindows
from audio_dendrites.errors import UserError
from audio_dendrites.files import set_default_mode, writing_to, written_whole
from audio_dendrites.models.lora import merged
from audio_dendrites.publishing import hub
from audio_dendrites.publishing.card import model_card
from audio_dendrites.publishing.content import code_files, stage_checkpoints, without_paths_of
from audio_dendrites.recipes import Recipe
from audio_dendrites.results.report import running_metrics
from audio_dendrites.training.averaging import MovingAverage, average_weights
from audio_dendrites.training.checkpoints import CheckpointError, whole_checkpoints
from audio_dendrites.training.losses import classification_loss, distilled_labels
from audio_dendrites.training.process import without_tf32
from audio_dendrites.training.progress import EvaluationLines, Throughput

logger = logging.getLogger(__name__)

PUSH_FOLDER = ".push-"  # in the run folder, while a checkpoint is pushed


def step_factor(step: int, warmup: int, steps_per_epoch: int, start: int, every: int, decay: float) -> float:
    """The factor of the learning rate at an optimizer step, for a schedule that transformers does not have.

    After a linear warm-up, the learning rate falls as in `torch.optim.lr_scheduler.MultiStepLR` at the epochs `start`,
    `start + every`, …, as AST's authors train (github.com/YuanGongND/ast, src/traintest.py).

    Args:
        step: Number of optimizer steps so far.
        warmup: Number of steps of the warm-up.
        steps_per_epoch: Number of optimizer steps of an epoch.
        start: Epochs before the learning rate first falls.
        every: Epochs until it falls again.
        decay: Factor of the learning rate each time.
    """
    passed = max(0, step // steps_per_epoch - start + every) // every
    return (step / warmup if step < warmup else 1.0) * decay**passed


class AudioTrainer(Trainer):
    """Trainer for clips. If it evaluates `ClipWindows`, loss, metrics and predictions are those of whole clips.

    transformers 5 saves a model under the Hub's old tensor names, but its Trainer resumes and loads the best model by
    the live names and ignores the tensors that it does not find. The encoder of an AST is then not restored. Here,
    checkpoints hold live names, and a missing or unexpected tensor is an error.

    With `push_to_hub`, it sends the files that `hub.py` allows in the background. A failed push does not end the
    training.

    Args:
        args: `RunArguments`, or `TrainingArguments` if none of the options of `RunArguments` is needed.
        learning_rates: Learning rate of each parameter by name. Defaults to `args.learning_rate` for all.
        loss: cross_entropy or bce, see `classification_loss`.
        teacher: Model that scores each augmented training batch. Its scores are mixed into the labels.
        train_sampler: Draws the training clips. By default they are shuffled.
        class_weights: Weight of each class in the loss, (classes,). By default all weigh the same.
        recipe: The resolved recipe. Required if `args.push_to_hub`.
        card_template: Jinja template of the model card. Required if `args.push_to_hub`.

    Attributes:
        averaged_steps: Steps of the checkpoints that were averaged, if any.
        throughput: What the training steps since the start or the resumption took.
        structure_since: Last step that changed the structure of the model. Only later checkpoints are averaged.
    """

    structure_since = 0

    def __init__(
        self,
        *args,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        learning_rates: dict[str, float] | None = None,
        loss: str = "cross_entropy",
        teacher: nn.Module | None = None,
        train_sampler: Sampler | None = None,
        class_weights: np.ndarray | None = None,
        recipe: Recipe | None = None,
        card_template: Path | None = None,
        **kwargs,
    ):
        self.clip_metrics = compute_metrics
        super().__init__(*args, compute_metrics=compute_metrics and self._score_clips, **kwargs)
        self.learning_rates, self.recipe, self.card_template = learning_rates, recipe, card_template
        self.train_sampler, self.loss, self.class_weights = train_sampler, loss, class_weights
        self.teacher = teacher and teacher.to(self.args.device)
        self.averaged_steps: list[int] = []
        self.stream_loader: StreamLoader | None = None
        if isinstance(self.train_dataset, ClipStream):
            self.add_callback(_ShareAsEpoch)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        self.add_callback(EvaluationLines)
        self.throughput = Throughput()
        self.add_callback(self.throughput)
        self.ema = None
        if (decay := getattr(self.args, "ema_decay", None)) is not None:
            self.ema = MovingAverage(decay)
            self.add_callback(self.ema)
        if (
            getattr(self.args, "average_checkpoints", None) is not None
        ):  # before a callback that grows the model at the end
            self.callback_handler.callbacks.insert(0, _AverageAtEnd(self))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # the name of its default folder contains the host's
                callback.logging_dir = os.path.join(self.args.output_dir, "tensorboard")
        self.compute_loss_func = partial(
            classification_loss,
            label_smoothing=self.args.label_smoothing_factor,
            loss=loss,
            class_weights=None if class_weights is None else torch.tensor(class_weights).float().to(self.args.device),
        )

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the Trainer, or that of a `ClipStream`, which accelerate must not divide among processes."""
        if not isinstance(self.train_dataset, ClipStream):
            return super().get_train_dataloader()
        args = self.args
        self.stream_loader = StreamLoader(
            self.train_dataset, self._train_batch_size, self.data_collator, (args.process_index, args.world_size),
            num_workers=args.dataloader_num_workers, prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory, multiprocessing_context=args.dataloader_multiprocessing_context,
        )  # fmt: skip
        return self.stream_loader

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.stream_loader is None or resume_from_checkpoint is None:
            return found
        path = Path(resume_from_checkpoint, self._stream_file)
        if not path.exists():
            raise UserError(
                f"resume_from_checkpoint: {path} is missing. It says how far this process has read the stream, and a "
                "checkpoint has it for each process that trained with streaming: true"
            )
        self.stream_loader.state = json.loads(path.read_text(encoding="utf-8"))
        return found[0], 0  # the loader skips what was read, and the Trainer need not

    @property
    def _stream_file(self) -> str:
        """The file of a checkpoint that says how far this process has read the stream."""
        return f"stream_{self.args.process_index}_of_{self.args.world_size}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.stream_loader is not None:
            with written_whole(Path(output_dir, self._stream_file)) as path:
                path.write_text(json.dumps(self.stream_loader.state), encoding="utf-8")

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

    def set_initial_training_values(self, args, dataloader):
        values = super().set_initial_training_values(args, dataloader)
        self.steps_per_epoch = values[1]
        # A stream has no end. The whole training is one epoch of the Trainer.
        return values if self.stream_loader is None else (1, *values[1:])

    def create_scheduler(self, num_training_steps, optimizer=None):
        if getattr(self.args, "lr_step_decay", None) is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        factor = partial(
            step_factor, warmup=self.args.get_warmup_steps(num_training_steps), steps_per_epoch=self.steps_per_epoch,
            start=self.args.lr_step_start, every=self.args.lr_step_every, decay=self.args.lr_step_decay,
        )  # fmt: skip
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self.throughput.fetch(epoch_iterator), num_batches, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is not None and model.training:
            labels, classes = inputs.pop("labels"), self.model.config.num_labels
            if labels.dim() == 1 and num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch * classes  # the Trainer has counted class numbers
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.teacher(**inputs).logits
            inputs["labels"] = distilled_labels(labels, logits, self.args.distillation, self.loss)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs) -> EvalLoopOutput:
        self._evaluated = dataloader.dataset
        with self._averaged():
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        if output.predictions is None or not isinstance(self._evaluated, ClipWindows):
            return output
        logits, labels = self._evaluated.by_clip(output.predictions, output.label_ids)
        clips = SequenceClassifierOutput(logits=torch.from_numpy(logits))
        loss = self.compute_loss_func(clips, torch.from_numpy(labels)).item()
        metrics = {name: loss if name.endswith("_loss") else value for name, value in output.metrics.items()}
        return output._replace(predictions=logits, label_ids=labels, metrics=metrics)

    def _score_clips(self, windows: EvalPrediction) -> dict[str, float]:
        if isinstance(self._evaluated, ClipWindows):
            windows = EvalPrediction(*self._evaluated.by_clip(windows.predictions, windows.label_ids))
        return self.clip_metrics(windows)

    def predict_in_fp32(self, dataset: Dataset, metric_key_prefix: str) -> PredictionOutput:
        """`predict` without autocast and TF32, so that the scores are those that `pipeline` gives."""
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        batch_size = self.args.per_device_eval_batch_size
        if getattr(self.data_collator, "pads_to_longest", False):
            self.args.per_device_eval_batch_size = 1  # `pipeline` does not pad
        with without_tf32():
            output = self.predict(dataset, metric_key_prefix=metric_key_prefix)
        self.args.per_device_eval_batch_size = batch_size
        return output

    def _averaged(self) -> contextlib.AbstractContextManager:
        """A context in which the model has the moving average of its weights, if there is one."""
        return contextlib.nullcontext() if self.ema is None else self.ema.in_place_of(self.model)

    def load_average(self) -> None:
        """Give the model the mean weights of its last `args.average_checkpoints` checkpoints, or of all if fewer."""
        count = self.args.average_checkpoints
        self.accelerator.wait_for_everyone()  # all processes list the checkpoints after the last one is written
        steps = {int(folder.name.split("-")[-1]): folder for folder in whole_checkpoints(Path(self.args.output_dir))}
        usable = sorted(step for step in steps if self.structure_since < step <= self.state.global_step)
        self.averaged_steps = usable[-count:]
        if len(usable) < count:
            logger.warning(
                "average_checkpoints: %d requested, %d saved%s.", count, len(usable),
                f" since the last growth (step {self.structure_since})" if self.structure_since else "",
            )  # fmt: skip
        if not usable:
            return
        folders = [steps[step] for step in self.averaged_steps]
        average = Path(self.args.output_dir, ".average")
        if self.args.should_save:
            with writing_to(average):
                average.mkdir(exist_ok=True)
                for path in folders[-1].glob("*.json"):  # one of them rebuilds a model that has grown
                    shutil.copy(path, average)
                save_file(average_weights(folders), average / "model.safetensors")
        self.accelerator.wait_for_everyone()
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, str(average)
        self._load_best_model()  # restores the structure and weights of any kind of model
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
            set_default_mode(*Path(output_dir).glob("*.safetensors"))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Delete the push folders of a killed run. `preflight` has already created the repository."""
        self.hub_model_id, self.push_in_progress = self.args.hub_model_id, None
        if self.is_world_process_zero():
            for left_over in Path(self.args.output_dir).glob(f"{PUSH_FOLDER}*"):
                shutil.rmtree(left_over)

    def create_model_card(self, *args, **kwargs) -> None:
        """Do nothing, so that the Trainer's card does not overwrite that of `model_card`."""

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
                folder = Path(
                    kept.enter_context(tempfile.TemporaryDirectory(dir=self.args.output_dir, prefix=PUSH_FOLDER))
                )
                self._stage_checkpoint(Path(checkpoint_folder), folder)
            except (ValueError, OSError, SafetensorError) as error:
                logger.warning("Step %d was not pushed. The training continues. %s", self.state.global_step, error)
                return
            message = f"Training in progress, step {self.state.global_step}"
            job = hf_api().run_as_future(self._push, kept.pop_all(), folder, message)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if is_pushing else []), job])

    def _push(self, kept: contextlib.ExitStack, folder: Path, message: str) -> None:
        with kept:
            hub.push_checkpoint(self.args, folder, message)

    def _stage_checkpoint(self, checkpoint: Path, folder: Path) -> None:
        """Write the model as `pipeline` loads it, its card and, for `hub_strategy: checkpoint`, the checkpoint."""
        with self._averaged():
            merged(self.model).save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        metrics, recipe = without_paths_of(running_metrics(self.recipe, self), self.recipe.to_dict())
        card = model_card(metrics, recipe, self.card_template, self.args.hub_model_id, set(code_files(folder)))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            best = self.state.best_model_checkpoint
            stage_checkpoints(checkpoint, best and Path(best), folder)

    def _issue_warnings_after_load(self, load_result) -> None:
        if load_result.missing_keys or load_result.unexpected_keys:
            raise CheckpointError(
                f"the checkpoint is not of this model: it lacks {load_result.missing_keys[:5]} "
                f"({len(load_result.missing_keys)} tensors) and has {load_result.unexpected_keys[:5]} "
                f"({len(load_result.unexpected_keys)} tensors) that the model does not have"
            )


class _ShareAsEpoch(TrainerCallback):
    """Counts the share of a streamed training as its epoch. The Trainer would begin with 0 after a resumption."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class _AverageAtEnd(TrainerCallback):
    def __init__(self, trainer: AudioTrainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.load_average()
