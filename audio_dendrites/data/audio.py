"""Bytes of a sound file → mono float32 waveform at the model's rate."""

import io
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

HAS_AV = find_spec("av") is not None
# PyAV reads these formats, libsndfile does not. FFmpeg recognises formats by their content, and some of its demuxers,
# such as those of playlists, open other files or addresses. So only these demuxers are allowed.
_AV_DEMUXERS = "mov,matroska,asf,aac,amr"
_AV_SUFFIXES = {
    ".3gp", ".aac", ".amr", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4", ".webm", ".wma", ".wmv",
}  # fmt: skip
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"} | _AV_SUFFIXES

# libsndfile reads as much of a cut file as there is, and only its log says that the header declares more.
_SHORT_DATA_CHUNK = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
# Programs that write to a pipe write a size of at least this into the header. It means "until the end of the file".
_UNKNOWN_SIZE = 0x7FFF_F000
# The sizes in the headers of whole files may be wrong by some bytes. A clip with a smaller share than this is damaged.
_COMPLETE = 0.99
# Codecs pad a track by some 10 ms. Some containers count the padding as length.
_PADDING = 0.1  # seconds, several times that
_UNRECOGNISED = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
_OGG_LAST_PAGE = 0x04


class BadClip(ValueError):
    """A clip whose features cannot be computed. The message names the clip and the cause."""


def window_samples(sampling_rate: int) -> int:
    """Length of Kaldi's 25 ms analysis window in samples, rounded as `torchaudio.compliance.kaldi` does."""
    return int(sampling_rate * 25.0 * 0.001)


def load_waveform(
    audio: Mapping[str, bytes | str | None],
    sampling_rate: int = 16000,
    name: str | None = None,
    channel: Literal["mean", "first"] = "mean",
) -> np.ndarray:
    """Decode one sound file, make it mono and resample it.

    Args:
        audio: A value of `datasets.Audio(decode=False)`: `bytes`, the content of a sound file, and `path`, which is
            read if `bytes` is None. The file may have any rate and any format of libsndfile (wav, flac, ogg, mp3, …).
            With PyAV, it may also be m4a, mp4, webm or another of the `SUFFIXES`.
        sampling_rate: Rate of the result in Hz.
        name: Name of the clip in error messages. Defaults to its path.
        channel: Take the mean over the channels, or the first channel as AST's authors do
            (`torchaudio.compliance.kaldi.fbank`).

    Returns:
        Waveform of shape (samples,), float32, full scale at ±1.

    Raises:
        BadClip: The file is missing, empty, damaged or cut, or its signal is unusable: it has no samples, NaN or
            infinite samples, silence, or less than one analysis window of 25 ms.
    """
    name = name or audio.get("path") or "clip"
    samples, rate = _decode(_content(audio, name), name)
    if channel == "first":
        waveform = np.ascontiguousarray(samples[:, 0])
    else:  # a product with the weights is several times faster than `mean(axis=1)`
        waveform = samples @ np.full(samples.shape[1], 1 / samples.shape[1], dtype=np.float32)
    if not waveform.size:
        raise BadClip(f"{name}: the file has no samples")
    lowest, highest = waveform.min(), waveform.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):  # NaN passes through min and max
        raise BadClip(f"{name}: the signal has NaN or infinite samples")
    if lowest == highest:
        raise BadClip(f"{name}: silent, all of its {waveform.size} samples are {lowest:g}")
    if rate != sampling_rate:
        # soxr takes 0.5 to 0.7 of the time of torchaudio's resample (44.1, 48 and 96 kHz → 16 kHz, one core,
        # benchmarks/features.py). From 44.1 kHz, it passes a tone of 7.3 kHz and attenuates a tone of 8.1 kHz, which
        # would alias, by 144 dB. torchaudio's default filter attenuates them by 2.8 and 7.3 dB.
        waveform = soxr.resample(waveform, rate, sampling_rate, quality="HQ")
    if waveform.size < window_samples(sampling_rate):
        raise BadClip(
            f"{name}: too short, must have at least {window_samples(sampling_rate)} samples at {sampling_rate} Hz (25 "
            f"ms), got {waveform.size}"
        )
    return waveform


def _content(audio: Mapping[str, bytes | str | None], name: str) -> bytes:
    """Bytes of the sound file, from memory or from its path."""
    content, path = audio.get("bytes"), audio.get("path")
    if content is None:
        if path is None:
            raise BadClip(f"{name}: the clip has neither bytes nor a path")
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise BadClip(f"{name}: cannot read {path}: {error.strerror}") from error
    if not content:
        raise BadClip(f"{name}: the file is empty (0 bytes)")
    return content


def _decode(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples (frames, channels) as float32 and their rate in Hz."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            samples = file.read(file.frames, dtype="float32", always_2d=True)  # GSM needs the number
            declared, log, rate, container = file.frames, file.extra_info, file.samplerate, file.format
    except soundfile.LibsndfileError as error:
        if error.code == _UNRECOGNISED:
            return _decode_with_av(content, name)
        raise BadClip(f"{name}: cannot decode: {error.error_string}") from error
    except (ValueError, MemoryError) as error:
        # The header is damaged, or it is a FLAC header without a length, which counts as 2^63 - 1 samples.
        raise BadClip(f"{name}: cannot decode: its header declares an impossible length") from error
    if len(samples) < _COMPLETE * declared:
        raise BadClip(f"{name}: truncated, {len(samples)} of {declared} samples could be decoded")
    if short := _SHORT_DATA_CHUNK.search(log):
        size, present = map(int, short.groups())
        if size < _UNKNOWN_SIZE and present < _COMPLETE * size:
            raise BadClip(f"{name}: truncated, the file has {present} of {size} bytes of audio")
    # An Ogg file declares no length, but marks its last page.
    if container == "OGG" and not content[content.rfind(b"OggS") + 5] & _OGG_LAST_PAGE:
        raise BadClip(f"{name}: truncated, the Ogg stream has no last page")
    return samples, rate


def _decode_with_av(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples (frames, channels) as float32 and their rate in Hz, of the first sound track of a file."""
    if not HAS_AV:
        raise BadClip(f"{name}: cannot decode: format not recognised. m4a, mp4 and webm need PyAV: pip install av")
    import av

    try:
        with av.open(io.BytesIO(content), options={"format_whitelist": _AV_DEMUXERS}) as file:
            if not file.streams.audio:
                raise BadClip(f"{name}: the file has no sound track")
            track = file.streams.audio[0]
            planar = av.AudioResampler(format="fltp")
            parts = [part for frame in file.decode(track) for part in planar.resample(frame)]
            declared = 0.0  # seconds; other containers only estimate it
            if file.format.name.startswith(("mov", "matroska")):
                declared = float((track.duration or 0) * track.time_base)
                if len(file.streams) == 1:
                    declared = declared or (file.duration or 0) / av.time_base
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise BadClip(f"{name}: cannot decode: {getattr(error, 'strerror', None) or error}") from error
    if not parts:
        raise BadClip(f"{name}: the file has no samples")
    samples, rate = np.concatenate([part.to_ndarray() for part in parts], axis=1).T, parts[0].sample_rate
    if len(samples) < (_COMPLETE * declared - _PADDING) * rate:
        raise BadClip(f"{name}: truncated, {len(samples)} of {declared * rate:.0f} samples could be decoded")
    return samples, rate
