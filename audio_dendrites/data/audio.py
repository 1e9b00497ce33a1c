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
# What PyAV reads and libsndfile does not. FFmpeg has demuxers that open other files or addresses, such as those of
# playlists, and tells formats by their content. So only these demuxers are allowed.
_AV_DEMUXERS = "mov,matroska,asf,aac,amr"
_AV_SUFFIXES = {
    ".3gp", ".aac", ".amr", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4", ".webm", ".wma", ".wmv",
}  # fmt: skip
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"} | _AV_SUFFIXES

# libsndfile reads a cut file as far as it goes and only notes in its log that the header promised more.
_SHORT_DATA_CHUNK = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
# Programs that write to a pipe leave one of these sizes in the header: "until the end of the file".
_UNKNOWN_SIZE = 0x7FFF_F000
# Headers are off by some bytes in files that play to their end. A clip that misses more than this is damaged.
_COMPLETE = 0.99
# Codecs pad a track by some 10 ms. Some containers count the padding as length.
_PADDING = 0.1  # seconds, with room
_UNRECOGNISED = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
_OGG_LAST_PAGE = 0x04


class BadClip(ValueError):
    """A clip that no features can be made of; the message names the clip and the cause."""


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
        audio: What `datasets.Audio(decode=False)` yields: `bytes`, the content of a sound file, and `path`, which is
            read if `bytes` is None. Every rate and every format of libsndfile (wav, flac, ogg, mp3, ...) is accepted,
            and with PyAV installed also the sound of m4a, mp4, webm and the other `SUFFIXES`.
        sampling_rate: Rate of the result in Hz.
        name: Name of the clip in error messages. Defaults to its path.
        channel: Whether the result is the mean over the channels or the first one, as AST's authors take it
            (`torchaudio.compliance.kaldi.fbank`).

    Returns:
        Waveform of shape (samples,), float32, full scale at ±1.

    Raises:
        BadClip: There is no file, it is empty, damaged or cut short, or its signal is unusable: no samples,
            NaN or infinite ones, silence, or less than one analysis window of 25 ms.
    """
    name = name or audio.get("path") or "clip"
    samples, rate = _decode(_content(audio, name), name)
    if channel == "first":
        waveform = np.ascontiguousarray(samples[:, 0])
    else:  # a product with the weights is several times faster than `mean(axis=1)`
        waveform = samples @ np.full(samples.shape[1], 1 / samples.shape[1], dtype=np.float32)
    if not waveform.size:
        raise BadClip(f"{name}: the file holds no samples")
    lowest, highest = waveform.min(), waveform.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):  # NaN passes through min and max
        raise BadClip(f"{name}: the signal has NaN or infinite samples")
    if lowest == highest:
        raise BadClip(f"{name}: silent, every one of its {waveform.size} samples is {lowest:g}")
    if rate != sampling_rate:
        # soxr takes 0.5 to 0.7 of the time of torchaudio's resample (44.1, 48 and 96 kHz → 16 kHz, one core,
        # benchmarks/features.py). From 44.1 kHz it keeps a tone of 7.3 kHz whole and takes 144 dB off one of
        # 8.1 kHz, which would fold back; torchaudio's default filter takes 2.8 and 7.3 dB off them.
        waveform = soxr.resample(waveform, rate, sampling_rate, quality="HQ")
    if waveform.size < window_samples(sampling_rate):
        raise BadClip(
            f"{name}: too short, {waveform.size} samples at {sampling_rate} Hz, "
            f"one analysis window takes {window_samples(sampling_rate)} (25 ms)"
        )
    return waveform


def _content(audio: Mapping[str, bytes | str | None], name: str) -> bytes:
    """Bytes of the sound file, from memory or from its path.

    Raises:
        BadClip: The clip has neither, the file cannot be read, or it is empty.
    """
    content, path = audio.get("bytes"), audio.get("path")
    if content is None:
        if path is None:
            raise BadClip(f"{name}: neither bytes nor a path")
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise BadClip(f"{name}: cannot read {path}: {error.strerror}") from error
    if not content:
        raise BadClip(f"{name}: the file is empty (0 bytes)")
    return content


def _decode(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples (frames, channels) as float32 and their rate in Hz.

    Raises:
        BadClip: The file cannot be decoded, or holds less than its header declares.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            samples = file.read(file.frames, dtype="float32", always_2d=True)  # GSM must be told how many
            declared, log, rate, container = file.frames, file.extra_info, file.samplerate, file.format
    except soundfile.LibsndfileError as error:
        if error.code == _UNRECOGNISED:
            return _decode_with_av(content, name)
        raise BadClip(f"{name}: cannot decode: {error.error_string}") from error
    except (ValueError, MemoryError) as error:
        # No array is that large: a damaged header, or FLAC's open one, which counts as 2^63 - 1 samples.
        raise BadClip(f"{name}: cannot decode: its header declares no possible length") from error
    if len(samples) < _COMPLETE * declared:
        raise BadClip(f"{name}: truncated, {len(samples)} of {declared} samples could be decoded")
    if short := _SHORT_DATA_CHUNK.search(log):
        wanted, present = map(int, short.groups())
        if wanted < _UNKNOWN_SIZE and present < _COMPLETE * wanted:
            raise BadClip(f"{name}: truncated, {present} of {wanted} bytes of audio are there")
    # An Ogg file declares no length, but marks its last page.
    if container == "OGG" and not content[content.rfind(b"OggS") + 5] & _OGG_LAST_PAGE:
        raise BadClip(f"{name}: truncated, the Ogg stream has no last page")
    return samples, rate


def _decode_with_av(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples (frames, channels) as float32 and their rate in Hz, of the first sound track of a file.

    Raises:
        BadClip: PyAV is not installed or cannot decode the file, or the file holds less than its header declares.
    """
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
        raise BadClip(f"{name}: the file holds no samples")
    samples, rate = np.concatenate([part.to_ndarray() for part in parts], axis=1).T, parts[0].sample_rate
    if len(samples) < (_COMPLETE * declared - _PADDING) * rate:
        raise BadClip(f"{name}: truncated, {len(samples)} of {declared * rate:.0f} samples could be decoded")
    return samples, rate
