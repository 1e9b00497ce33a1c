"""What experiment trackers get at the end of a run, beside the metrics that their callbacks log."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def end_tracking(trainer: Trainer, folder: Path) -> None:
    """Send the figures of a run folder to TensorBoard, W&B and Trackio, and close the open run of the last two.

    The callbacks of transformers leave their run open, because `predict` logs after the training. The next training in
    this process gets its own.

    Args:
        trainer: After the last `predict`, on the first process.
        folder: The run folder, with its figures.
    """
    step = trainer.state.global_step
    figures = {f"figures/{path.stem}": path for path in sorted(folder.glob("*.png"))}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            with callback._SummaryWriter(callback.logging_dir, filename_suffix=".figures") as writer:
                for name, path in figures.items():
                    writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback | TrackioCallback):
            tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
            tracker.log({name: tracker.Image(str(path)) for name, path in figures.items()})
            tracker.finish()
