"""Errors of the disk, and the permissions of what is written."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from audio_dendrites.errors import UserError
from audio_dendrites.files import set_default_mode, writing_to, written_whole


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_an_error_of_the_disk_says_how_to_continue(error):
    with pytest.raises(UserError, match="writing to runs/x failed: .* Free space on the disk"), writing_to("runs/x"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "git"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("not a local folder and not a model identifier"),
        SafetensorError("Error while serializing: I/O error: No such file or directory (os error 2)"),
        RuntimeError("pipeline's scores are 0.1 from those of the trained model"),
        ValueError("no disk"),
    ],
)
def test_every_other_error_passes_unchanged(error):
    with pytest.raises(type(error)) as caught, writing_to("runs/x"):
        raise error
    assert caught.value is error


def test_torch_save_to_a_full_disk_is_an_error_of_the_disk():
    with pytest.raises(UserError, match="writing to /dev failed"), writing_to("/dev"):
        torch.save({"weight": torch.ones(3)}, "/dev/full")


@pytest.fixture(params=[0o022, 0o027])
def mode(request):
    """The mode of a new file under a umask, which is in force during the test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_the_umask_decides_who_can_read_a_file(tmp_path, mode):
    weights, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(3)}, weights)
    assert weights.stat().st_mode & 0o777 == 0o600
    set_default_mode(weights)
    with written_whole(other) as beside:
        save_file({"weight": torch.ones(3)}, beside)
    assert [path.stat().st_mode & 0o777 for path in (weights, other)] == [mode, mode]
    assert sorted(tmp_path.iterdir()) == [weights, other]
