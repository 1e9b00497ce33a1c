"""What the launchers leave undone in a process that trains."""

import logging
import os
from pathlib import Path

import joblib
import psutil
import torch
from transformers import TrainingArguments

from audio_dendrites.errors import UserError

logger = logging.getLogger(__name__)


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
        raise UserError(
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
