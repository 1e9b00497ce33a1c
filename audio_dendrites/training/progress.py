"""What a training shows: a line for each evaluation, bars, and its throughput at the end."""

import time
from collections.abc import Iterator, Mapping

import torch
from accelerate.utils import find_batch_size
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from audio_dendrites.models.dendritic import structure_of


class EvaluationLines(ProgressCallback):
    """Prints an aligned line for each evaluation, in place of the dictionaries of transformers.

    The bars appear only in a terminal. With `--log_level info` or `debug`, the dictionaries appear, too.
    """

    def __init__(self):
        super().__init__()
        self.widths: dict[str, int] = {}  # of the columns of the table that is being printed, by their names

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step, self.current_step, self.widths = time.monotonic(), state.global_step, 0, {}
        if state.is_world_process_zero:
            self.training_bar = self._bar(args, state.max_steps)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.prediction_bar is None and state.is_world_process_zero:
            self.prediction_bar = self._bar(args, len(eval_dataloader))
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if not state.is_world_process_zero or self.training_bar is None:
            return
        cells = self._cells(args, state, model)
        lines = [cells]
        if self.widths.keys() != cells.keys():  # at the first evaluation
            self.widths = {name: max(8, len(name), len(cell)) for name, cell in cells.items()}
            lines = [dict(zip(cells, cells, strict=True)), cells]
        with tqdm.external_write_mode():  # above the bars
            for line in lines:
                print("  ".join(cell.rjust(self.widths[name]) for name, cell in line.items()), flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if args.log_level in ("debug", "info"):
            super().on_log(args, state, control, logs=logs, **kwargs)

    def _bar(self, args: TrainingArguments, total: int) -> tqdm:
        """A bar that disappears at its end. tqdm shows none if `disable` is None and there is no terminal."""
        return tqdm(total=total, leave=False, dynamic_ncols=True, disable=args.disable_tqdm or None)

    def _cells(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> dict[str, str]:
        """The cells of a line by the names of their columns. `best` is the best score of the training so far."""
        log = state.log_history
        scores = [entry for entry in log if "eval_loss" in entry]
        train_loss = next((entry["loss"] for entry in reversed(log) if "loss" in entry), None)
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if name == "loss":
            name = "accuracy" if "eval_accuracy" in scores[-1] else "mAP"
        done, seconds = state.global_step - self.first_step, time.monotonic() - self.started
        left = (state.max_steps - state.global_step) * seconds / done if done else None
        cells = {
            "step": f"{state.global_step:{len(str(state.max_steps))}}/{state.max_steps}",
            "epoch": f"{state.epoch or 0:.2f}",
            "train loss": "" if train_loss is None else f"{train_loss:.4f}",
            "loss": f"{scores[-1]['eval_loss']:.4f}",
        }
        if (key := f"eval_{name}") in scores[-1]:
            cells |= {name: f"{scores[-1][key]:.4f}", "best": f"{max(entry[key] for entry in scores):.4f}"}
        counts = structure_of(model).values()
        cells |= {"dendrites": str(max(counts))} if counts else {}
        return cells | {"time left": "" if left is None else tqdm.format_interval(left)}


class Throughput(TrainerCallback):
    """Counts the clips and the time of the training steps of this process. Evaluations and checkpoints do not count.

    The Trainer reads the loss of each step, so a GPU has finished the gradients before the next batch is fetched.

    Attributes:
        steps: Number of optimizer steps since the training started or resumed.
        clips: Number of clips in them.
        seconds: Wall-clock time of them, from the fetch of a batch to the end of the optimizer's step.
        waited: The part of it in which the data loader had no batch ready.
    """

    def __init__(self):
        self.steps = self.clips = 0
        self.seconds = self.waited = self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.__init__()

    def fetch(self, batches: Iterator[Mapping[str, torch.Tensor]]) -> Iterator[Mapping[str, torch.Tensor]]:
        """The batches of the next step. Call it when the step starts."""
        self._started = time.perf_counter()
        return self._fetch(batches)

    def _fetch(self, batches: Iterator[Mapping[str, torch.Tensor]]) -> Iterator[Mapping[str, torch.Tensor]]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self.clips += find_batch_size(batch)
            yield batch

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self.seconds += time.perf_counter() - self._started

    def measure(self, trainer: Trainer) -> dict[str, float] | None:
        """The throughput of a training after its end, as the mean of all processes. All processes must call this.

        Returns:
            `clips_per_second` of one process, `data_wait`, the share of the time of the steps that waited for data,
            and, if there are several processes, `communication_wait`, the share that waited for the gradients of other
            processes while nothing was computed. DDP measures it in the first ten steps and then in every hundredth.
            None if no step was trained.
        """
        waited = _exposed_communication(trainer.model_wrapped) * self.steps
        counts = torch.tensor([self.clips, self.seconds, self.waited, waited], device=trainer.args.device)
        clips, seconds, data, communication = trainer.accelerator.reduce(counts).tolist()
        if not seconds:
            return None
        found = {"clips_per_second": clips / seconds, "data_wait": data / seconds}
        return found | ({"communication_wait": communication / seconds} if trainer.args.world_size > 1 else {})


def _exposed_communication(model: nn.Module) -> float:
    """Seconds of a step in which DDP waits for gradients after the backward pass has ended; 0 without DDP."""
    wrapped = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
    if (module := next(wrapped, None)) is None:
        return 0.0
    found = module._get_ddp_logging_data()  # nanoseconds, or nothing before the first step
    return (found.get("avg_backward_comm_time", 0) - found.get("avg_backward_compute_comm_overlap_time", 0)) / 1e9
