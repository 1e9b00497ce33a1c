"""Set up a process that trains: its logging, its threads and its arithmetic."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import joblib
import torch
from filelock import FileLock, Timeout
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import distributed
from transformers import TrainingArguments
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from audio_dendrites.errors import UserError

logger = logging.getLogger(__name__)


def prepare_process(args: TrainingArguments) -> None:
    """Set up the log, check how the processes were started, and use all cores of a CPU.

    Every launcher gives a process on the CPU one thread. If `OMP_NUM_THREADS` is above 1, it is kept.

    Raises:
        UserError: A launcher started several processes, but each of them sees only itself; or one process sees several
            GPUs.
    """
    _set_up_log(args)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > args.world_size:
        raise UserError(
            f"{started} processes were started, but each of them sees only itself and would write the same run "
            f"folder. On the CPU of a machine with a GPU, add --use_cpu"
        )
    if args.n_gpu > 1:  # the Trainer would wrap the model in nn.DataParallel and add up the losses of the GPUs
        script = Path(sys.argv[0]).name
        raise UserError(
            f"one process sees {args.n_gpu} GPUs. Start one process for each GPU with `torchrun --standalone "
            f"--nproc_per_node {args.n_gpu} {script} …`, or train on one GPU with `CUDA_VISIBLE_DEVICES=0 python "
            f"{script} …`"
        )
    if args.world_size == 1 and _several_were_requested():
        logger.warning(
            "Several processes were requested, but only one is running. On the CPU, start them with `torchrun "
            "--standalone --nproc_per_node 2 train.py …` or `accelerate launch --config_file "
            "configs/accelerate/two_cpu.yaml train.py …`."
        )
    if args.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _set_up_log(args: TrainingArguments) -> None:
    """Show what `log_level` asks for. All processes but the first log errors only.

    By default, the libraries log errors only, and the bars are those of steps, data and downloads.
    """
    if args.process_index:
        logging.getLogger("audio_dendrites").setLevel(logging.ERROR)
    elif args.log_level in ("debug", "info"):
        for name in ("", "audio_dendrites"):
            logging.getLogger(name).setLevel(args.log_level.upper())
        return
    if args.log_level == "passive":
        set_verbosity_error()  # of transformers
    if not are_progress_bars_disabled():
        disable_progress_bar()  # of each model that is read and each checkpoint that is written
        enable_progress_bars()  # of downloads, which the line above has disabled, too
    if args.process_index or not sys.stderr.isatty():
        datasets.disable_progress_bars()


@contextmanager
def locked(args: TrainingArguments) -> Iterator[bool]:
    """Lock a run folder for a `with` block, so that no other command trains the same run.

    The lock belongs to the first process. The operating system releases it when the process ends, however it ends.

    Yields:
        False if another command has locked the folder. All processes but the first always get True.
    """
    lock, free = FileLock(Path(args.output_dir, ".lock")), True
    try:
        if args.process_index == 0:
            lock.acquire(blocking=False)
    except Timeout:
        free = False
    try:
        yield free
    finally:
        lock.release()


@contextmanager
def connected(args: TrainingArguments) -> Iterator[None]:
    """Show in one line that the connection to another process is lost in a `with` block, such as when it was killed.

    Raises:
        UserError: The connection is lost.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo/transport" not in str(error):
            raise
        raise UserError(
            f"process {args.process_index} has lost the connection to another process, whose own message says why. The "
            "same command resumes from the last checkpoint"
        ) from error


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply float32 numbers in full precision.

    On Ampere and newer GPUs, cuDNN convolutions use TF32 by default, which rounds the factors to 10 bits of mantissa.
    """
    operations = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def _several_were_requested() -> bool:
    """Whether the environment asks for several processes.

    `accelerate launch --cpu --num_processes 2` sets an address for the processes but no WORLD_SIZE, and starts one
    process. Each task of srun is a process of its own.
    """
    found = os.environ.keys()
    by_accelerate = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= found and "WORLD_SIZE" not in found
    by_srun = "SLURM_PROCID" in found and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return by_accelerate or by_srun


@contextmanager
def one_process_first(args: TrainingArguments, doing: str) -> Iterator[None]:
    """Run a `with` block in one process of each machine, and then in the other processes, which can use its cache.

    All processes leave the block together, however long it takes. `TrainingArguments.main_process_first` has a barrier
    that fails after `ddp_timeout`.

    Args:
        args: The training arguments, for `output_dir` and the numbers of the processes.
        doing: What the block does, such as "loading the data". A run uses each text once.

    Raises:
        UserError: The block failed in another process.
    """
    if args.world_size == 1:
        yield
        return
    # Unlike a collective, the store that connects the processes has no timeout between two calls.
    store, key = distributed.distributed_c10d._get_default_store(), f"{args.output_dir}: {doing}"
    own, first = args.process_index, args.process_index - args.local_process_index
    if own != first:
        _wait_for(store, key, f"process {first}", 1)
    try:
        yield
    except BaseException as error:
        store.set(f"{key}: failure", f"process {own} failed while {doing}: {str(error) or type(error).__name__}")
        raise
    for counter in (f"process {own}", "all"):
        store.add(f"{key}: {counter}", 1)
    _wait_for(store, key, "all", args.world_size)


def _wait_for(store: distributed.Store, key: str, counter: str, count: int) -> None:
    """Wait until a counter of `one_process_first` reaches `count`. Raises a UserError if a process fails."""
    try:
        while store.add(f"{key}: {counter}", 0) < count:
            if store.check([f"{key}: failure"]):
                raise UserError(store.get(f"{key}: failure").decode())
            time.sleep(0.2)
    except distributed.DistNetworkError as error:
        raise UserError(f"{key}: the process that connects the others has ended; its own message says why") from error
