"""Write whole files with the permissions of the umask, report errors of the disk, and find damaged files."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from audio_dendrites.errors import UserError

INSTALLED = Path(__file__).parent / "programs"  # in a wheel
ROOT = INSTALLED if INSTALLED.is_dir() else Path(__file__).parent.parent  # has the programs, configs and model_cards
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# torch.save reports a failed write without its cause.
TORCH_SAVE_ERRORS = ("PytorchStreamWriter", "unexpected pos", "iostream error")


def try_writing(folder: Path) -> None:
    """Create a folder if there is none, and write a temporary file in it. Raises an OSError if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Turn an error of the disk into a UserError that says how to continue. Other exceptions pass unchanged.

    Raises:
        UserError: The disk is full, read-only or broken, or a quota is used up.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_disk_error(error):
            raise
        raise UserError(
            f"writing to {folder} failed: {error}. Free space on the disk or repair it, then run the same command "
            f"again: it continues from the last checkpoint"
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and rename it in the end: `path` is never half-written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        set_default_mode(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def damaged_file(folder: Path) -> str | None:
    """The first JSON or safetensors file of a folder that cannot be read, and why. None if all can be read."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            else:
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            return f"{path.name} is damaged ({error})"
    return None


def set_default_mode(*paths: Path) -> None:
    """Give files the permissions that the umask gives a new file. safetensors creates files with mode 0600."""
    for path in paths:
        probe = path.with_name(f".mode.{os.getpid()}")  # os.umask would change the umask of all threads
        try:
            probe.touch()
            path.chmod(probe.stat().st_mode)
        finally:
            probe.unlink(missing_ok=True)


def _is_disk_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    if isinstance(error, SafetensorError):
        code = re.search(r"os error (\d+)", str(error))
        return code is not None and int(code[1]) in DISK_ERRORS
    return type(error) is RuntimeError and any(text in str(error) for text in TORCH_SAVE_ERRORS)
