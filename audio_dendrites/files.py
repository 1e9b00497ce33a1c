"""Write files whole, and say what to do when the disk fails."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from audio_dendrites.errors import UserError


@contextlib.contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Turn what libraries raise when the disk is full or fails into an error that says how to go on.

    Raises:
        UserError: Something could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "PytorchStreamWriter" not in str(error):  # torch.save's way to say so
            raise
        raise UserError(
            f"writing to {folder} failed: {error}. Free some of the disk; the same command goes on from the last "
            f"checkpoint"
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed when done: `path` is never seen half-written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
