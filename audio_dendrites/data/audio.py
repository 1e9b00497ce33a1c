"""Bytes of a sound file → mono float32 waveform at the model's rate."""

import io
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal

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
_OGG_LONGEST_PAGE = 65307  # bytes
_UNKNOWN_LENGTH = 2**63 - 1  # of a FLAC header without a length
_BLOCK = 2**20  # frames that are decoded at once, 24 s at 44.1 kHz


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
    return np.concatenate([*waveform_blocks(audio, sampling_rate, name, channel)])


def waveform_blocks(
    audio: Mapping[str, bytes | str | None],
    sampling_rate: int = 16000,
    name: str | None = None,
    channel: Literal["mean", "first"] = "mean",
) -> Iterator[np.ndarray]:
    """Yield the waveform of `load_waveform` in parts, which need little memory even if the file is long.

    Args and Raises as `load_waveform`. Some faults are found only at the end of the file, after all parts.
    """
    name = name or audio.get("path") or "clip"
    resampler, lowest, highest, count, size = None, np.inf, -np.inf, 0, 0
    for samples, rate in _decode(audio, name):
        if channel == "first":
            waveform = np.ascontiguousarray(samples[:, 0])
        else:  # a product with the weights is several times faster than `mean(axis=1)`
            waveform = samples @ np.full(samples.shape[1], 1 / samples.shape[1], dtype=np.float32)
        low, high = waveform.min(), waveform.max()
        if not (np.isfinite(low) and np.isfinite(high)):  # NaN passes through min and max
            raise BadClip(f"{name}: the signal has NaN or infinite samples")
        lowest, highest, count = min(lowest, low), max(highest, high), count + len(waveform)
        if rate != sampling_rate:
            # soxr takes 0.5 to 0.7 of the time of torchaudio's resample (44.1, 48 and 96 kHz → 16 kHz, one core,
            # benchmarks/features.py). From 44.1 kHz, it passes a tone of 7.3 kHz and attenuates a tone of 8.1 kHz,
            # which would alias, by 144 dB. torchaudio's default filter attenuates them by 2.8 and 7.3 dB.
            resampler = resampler or soxr.ResampleStream(rate, sampling_rate, 1, quality="HQ")
            waveform = resampler.resample_chunk(waveform)
        size += len(waveform)
        yield waveform
    if not count:
        raise BadClip(f"{name}: the file has no samples")
    if lowest == highest:
        raise BadClip(f"{name}: silent, all of its {count} samples are {lowest:g}")
    if resampler is not None:
        rest = resampler.resample_chunk(np.empty(0, dtype=np.float32), last=True)
        size += len(rest)
        yield rest
    if size < window_samples(sampling_rate):
        raise BadClip(
            f"{name}: too short, must have at least {window_samples(sampling_rate)} samples at {sampling_rate} Hz (25 "
            f"ms), got {size}"
        )


def _open(audio: Mapping[str, bytes | str | None], name: str) -> BinaryIO:
    """The sound file, in memory or at its path."""
    content, path = audio.get("bytes"), audio.get("path")
    if content is None and path is None:
        raise BadClip(f"{name}: the clip has neither bytes nor a path")
    try:
        file = Path(path).open("rb") if content is None else io.BytesIO(content)  # noqa: SIM115  the caller closes it
    except OSError as error:
        raise BadClip(f"{name}: cannot read {path}: {error.strerror}") from error
    if not file.seek(0, io.SEEK_END):
        raise BadClip(f"{name}: the file is empty (0 bytes)")
    file.seek(0)
    return file


def _decode(audio: Mapping[str, bytes | str | None], name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yield samples (frames, channels) as float32, at most `_BLOCK` frames and a little more, and their rate in Hz."""
    with _open(audio, name) as file:
        try:
            with soundfile.SoundFile(file) as sound:
                declared, rate, container, count = sound.frames, sound.samplerate, sound.format, 0
                if declared == _UNKNOWN_LENGTH:
                    raise BadClip(f"{name}: cannot decode: its header declares an impossible length")
                # GSM needs the number of frames.
                while len(samples := sound.read(min(_BLOCK, declared - count), dtype="float32", always_2d=True)):
                    count += len(samples)
                    yield samples, rate
                log = sound.extra_info
        except soundfile.LibsndfileError as error:
            if error.code != _UNRECOGNISED:
                raise BadClip(f"{name}: cannot decode: {error.error_string}") from error
            file.seek(0)
            yield from _decode_with_av(file, name)
            return
        _check_complete(file, name, container, count, declared, log)


def _check_complete(file: BinaryIO, name: str, container: str, count: int, declared: int, log: str) -> None:
    """Raise `BadClip` if a file holds less than it declares."""
    if count < _COMPLETE * declared:
        raise BadClip(f"{name}: truncated, {count} of {declared} samples could be decoded")
    if short := _SHORT_DATA_CHUNK.search(log):
        size, present = map(int, short.groups())
        if size < _UNKNOWN_SIZE and present < _COMPLETE * size:
            raise BadClip(f"{name}: truncated, the file has {present} of {size} bytes of audio")
    if container == "OGG":  # declares no length, but marks its last page
        file.seek(max(0, file.seek(0, io.SEEK_END) - _OGG_LONGEST_PAGE))
        end = file.read()
        if not end[end.rfind(b"OggS") + 5] & _OGG_LAST_PAGE:
            raise BadClip(f"{name}: truncated, the Ogg stream has no last page")


def _decode_with_av(file: BinaryIO, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yield samples (frames, channels) as float32 and their rate in Hz, of the first sound track of a file."""
    if not HAS_AV:
        raise BadClip(f"{name}: cannot decode: format not recognised. m4a, mp4 and webm need PyAV: pip install av")
    import av

    try:
        with av.open(file, options={"format_whitelist": _AV_DEMUXERS}) as opened:
            if not opened.streams.audio:
                raise BadClip(f"{name}: the file has no sound track")
            track = opened.streams.audio[0]
            planar = av.AudioResampler(format="fltp")
            parts, held, count, rate = [], 0, 0, 0
            for frame in opened.decode(track):
                for part in planar.resample(frame):
                    parts.append(part.to_ndarray())
                    held, rate = held + part.samples, part.sample_rate
                if held >= _BLOCK:
                    yield np.concatenate(parts, axis=1).T, rate
                    parts, held, count = [], 0, count + held
            if held:
                yield np.concatenate(parts, axis=1).T, rate
            declared = 0.0  # seconds; other containers only estimate it
            if opened.format.name.startswith(("mov", "matroska")):
                declared = float((track.duration or 0) * track.time_base)
                if len(opened.streams) == 1:
                    declared = declared or (opened.duration or 0) / av.time_base
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise BadClip(f"{name}: cannot decode: {getattr(error, 'strerror', None) or error}") from error
    if 0 < count + held < (_COMPLETE * declared - _PADDING) * rate:
        raise BadClip(f"{name}: truncated, {count + held} of {declared * rate:.0f} samples could be decoded")
