"""What `load_waveform` reads, how exactly, and what it refuses."""

import io

import av
import numpy as np
import pytest
import soundfile
from conftest import recording

from audio_dendrites.data.audio import BadClip, load_waveform, waveform_blocks

PITCH, LEVEL = 1000.0, 0.25
FORMATS = {
    "WAV": [
        "PCM_U8",
        "PCM_16",
        "PCM_24",
        "PCM_32",
        "FLOAT",
        "DOUBLE",
        "ULAW",
        "ALAW",
        "IMA_ADPCM",
        "MS_ADPCM",
        "GSM610",
    ],
    "WAVEX": ["PCM_24"],
    "AIFF": ["PCM_16"],
    "FLAC": ["PCM_S8", "PCM_16", "PCM_24"],
    "OGG": ["VORBIS", "OPUS"],
    "MP3": ["MPEG_LAYER_III"],
}


def tone(rate: int, pitch: float = PITCH, seconds: float = 0.5) -> np.ndarray:
    """Sine of amplitude LEVEL, (samples,), float32."""
    return (LEVEL * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encode(samples: np.ndarray, rate: int, file_format: str = "WAV", subtype: str | None = None) -> bytes:
    """A sound file with these samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format, subtype=subtype)
    return file.getvalue()


def load(content: bytes, **options) -> np.ndarray:
    """`load_waveform` of a file in memory."""
    return load_waveform({"bytes": content, "path": None}, **options)


def middle(waveform: np.ndarray) -> np.ndarray:
    """Without the ends, where filters and codecs fade in and out."""
    return waveform[len(waveform) // 8 : -len(waveform) // 8]


def amplitude(waveform: np.ndarray) -> float:
    """Amplitude of a sine of this power."""
    return float(np.sqrt(2 * np.mean(middle(waveform) ** 2)))


def pitch_of(waveform: np.ndarray, rate: int = 16000) -> float:
    """Frequency in Hz at which the spectrum peaks."""
    part = middle(waveform)
    return np.abs(np.fft.rfft(part * np.hanning(len(part)), 2**16)).argmax() * rate / 2**16


@pytest.mark.parametrize(("file_format", "subtype"), [(kind, one) for kind in FORMATS for one in FORMATS[kind]])
def test_every_format_keeps_pitch_and_level(file_format, subtype):
    rate = 48000 if subtype == "OPUS" else 44100
    waveform = load(encode(tone(rate), rate, file_format, subtype))
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert pitch_of(waveform) == pytest.approx(PITCH, abs=1)
    assert amplitude(waveform) == pytest.approx(LEVEL, rel=0.05)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000, 88200, 96000, 192000])
def test_every_rate_becomes_the_same_tone_at_the_models_rate(rate):
    waveform = load(encode(tone(rate), rate, subtype="FLOAT"))
    assert len(waveform) == pytest.approx(8000, abs=1)
    np.testing.assert_allclose(waveform[1000:7000], tone(16000)[1000:7000], atol=1e-4)


RECORDINGS = {  # container, codec, rate, channels, whether there is a picture
    "m4a": ("ipod", "aac", 44100, 2, False),
    "lossless m4a": ("ipod", "alac", 48000, 1, False),
    "movie": ("mp4", "aac", 44100, 2, True),
    "browser": ("webm", "libopus", 48000, 1, False),
    "16 bit": ("mov", "pcm_s16le", 16000, 2, False),
    "aac": ("adts", "aac", 32000, 1, False),
}


@pytest.mark.parametrize(("container", "codec", "rate", "channels", "video"), RECORDINGS.values(), ids=RECORDINGS)
def test_what_phones_and_browsers_record_holds_the_same_tone(container, codec, rate, channels, video):
    samples = np.repeat(tone(rate)[:, None], channels, axis=1)
    waveform = load(recording(samples, rate, container, codec, video))
    assert waveform.dtype == np.float32 and len(waveform) == pytest.approx(8000, abs=0.1 * 16000)
    waveform = waveform[:8000]
    assert pitch_of(waveform) == pytest.approx(PITCH, abs=1) and amplitude(waveform) == pytest.approx(LEVEL, rel=0.05)


def test_without_pyav_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("audio_dendrites.data.audio.HAS_AV", False)
    with pytest.raises(BadClip, match="^dog.m4a: cannot decode: format not recognised.*pip install av$"):
        load(recording(tone(16000)[:, None], 16000, "ipod", "aac"), name="dog.m4a")


def test_decoding_in_blocks_changes_no_number(monkeypatch):
    samples = np.stack([noise(50000), tone(44100, seconds=50000 / 44100)], axis=1)
    files = [encode(samples, 44100, container) for container in ("WAV", "FLAC", "MP3", "OGG")]
    files.append(recording(samples, 44100, "ipod", "aac"))
    whole = [load(file) for file in files]
    monkeypatch.setattr("audio_dendrites.data.audio._BLOCK", 7001)
    for file, expected in zip(files, whole, strict=True):
        assert len(list(waveform_blocks({"bytes": file, "path": None}))) > 5
        np.testing.assert_allclose(load(file), expected, rtol=0, atol=1e-6)


def test_a_file_that_names_another_one_does_not_open_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.wav").write_bytes(encode(tone(16000), 16000))
    playlist = b"ffconcat version 1.0\nfile private.wav\n"
    with av.open(io.BytesIO(playlist)) as file:  # FFmpeg does, unless it is told not to
        assert sum(frame.samples for frame in file.decode(audio=0)) == 8000
    with pytest.raises(BadClip, match="^dog.m4a: cannot decode"):
        load(playlist, name="dog.m4a")


def test_the_rate_of_the_model_is_free():
    waveform = load(encode(tone(44100), 44100), sampling_rate=32000)
    assert len(waveform) == 16000 and pitch_of(waveform, 32000) == pytest.approx(PITCH, abs=1)


def test_resampling_removes_what_is_above_the_new_nyquist_frequency():
    assert amplitude(load(encode(tone(96000, pitch=20000), 96000, subtype="FLOAT"))) < 1e-4 * LEVEL


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG"])
def test_mono_is_the_mean_over_channels(file_format, channels):
    gains = np.linspace(0.2, 1.0, channels, dtype=np.float32)
    waveform = load(encode(tone(16000)[:, None] * gains, 16000, file_format))
    assert amplitude(waveform) == pytest.approx(LEVEL * gains.mean(), rel=0.05)


def test_a_path_is_read_if_there_are_no_bytes_and_samples_at_the_rate_of_the_model_do_not_change(tmp_path):
    path = tmp_path / "tone.wav"
    path.write_bytes(encode(tone(16000), 16000, subtype="FLOAT"))
    np.testing.assert_array_equal(load_waveform({"bytes": None, "path": str(path)}), tone(16000))
    path.unlink()
    with pytest.raises(BadClip, match=r"tone.wav: cannot read .*tone.wav: No such file"):
        load_waveform({"bytes": None, "path": str(path)})
    with pytest.raises(BadClip, match="clip: the clip has neither bytes nor a path"):
        load_waveform({"bytes": None, "path": None})


def test_neither_a_header_without_a_size_nor_a_clip_of_one_window_is_damaged():
    content = bytearray(encode(tone(16000), 16000, subtype="PCM_16"))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"  # as a program writes to a pipe
    assert len(load(bytes(content))) == 8000
    assert len(load(encode(tone(16000, seconds=0.025), 16000))) == 400


def noise(shape: int | tuple[int, ...]) -> np.ndarray:
    """White noise that no codec can shrink, float32."""
    return (0.1 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def with_sample(value: float) -> np.ndarray:
    """A tone with one sample replaced."""
    samples = tone(16000)
    samples[100] = value
    return samples


def overwritten(content: bytes) -> bytes:
    """A file whose middle was overwritten."""
    third = len(content) // 3
    return content[:third] + bytes(third) + content[2 * third :]


def without_length(flac: bytes) -> bytes:
    """A FLAC file whose header leaves the number of samples open."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


ANTIPHASE = np.stack([tone(16000), -tone(16000)], axis=1)
BAD_CLIPS = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404 Not Found</html>" * 9, "cannot decode: Invalid data found"),
    "header alone": (encode(tone(16000), 16000)[:40], "cannot decode: .*No 'data' chunk"),
    "no samples": (encode(np.zeros(0), 16000), "has no samples"),
    "nan": (encode(with_sample(np.nan), 16000, subtype="FLOAT"), "NaN or infinite"),
    "infinite": (encode(with_sample(-np.inf), 16000, subtype="FLOAT"), "NaN or infinite"),
    "zeros": (encode(np.zeros(8000), 16000), "silent, all of its 8000 samples are 0"),
    "constant": (encode(np.full(8000, 0.5), 16000), "silent, .* are 0.5"),
    "silent mp3": (encode(np.zeros(16000), 16000, "MP3"), "silent"),
    "antiphase": (encode(ANTIPHASE, 16000, subtype="FLOAT"), "silent"),
    "short": (
        encode(tone(16000)[:399], 16000),
        "too short, must have at least 400 samples at 16000 Hz .25 ms., got 399",
    ),
    "short after resampling": (encode(tone(48000)[:1190], 48000), "too short, .* got 397"),
    "cut flac": (encode(noise(16000), 16000, "FLAC")[:16000], "cannot decode: .*lost sync"),
    "overwritten flac": (overwritten(encode(noise(16000), 16000, "FLAC")), "cannot decode"),
    "open flac": (without_length(encode(noise(16000), 16000, "FLAC")), "declares an impossible length"),
    "cut wav": (encode(noise(16000), 16000)[:16000], "truncated, the file has 15956 of 32000 bytes"),
    "cut adpcm": (encode(noise(16000), 16000, "WAV", "IMA_ADPCM")[:4000], "truncated"),
    "cut aiff": (encode(noise(16000), 16000, "AIFF", "PCM_16")[:16000], "truncated"),
    "cut ogg": (encode(noise(64000), 16000, "OGG")[:20000], "truncated, the Ogg stream has no last page"),
    "cut mp3": (encode(noise(64000), 16000, "MP3")[:8000], "truncated, .* of 64000 samples"),
    "cut m4a": (recording(noise((16000, 1)), 16000, "ipod", "alac")[:9000], "cannot decode: Invalid data found"),
    "cut webm": (recording(noise((48000, 1)), 48000, "webm", "libopus")[:6000], "truncated, .* of 48672 samples"),
    "movie without sound": (recording(None, 0, "mp4", "", video=True), "has no sound track"),
    "silent m4a": (recording(np.zeros((16000, 1), dtype=np.float32), 16000, "ipod", "alac"), "silent"),
}


@pytest.mark.parametrize(("content", "cause"), BAD_CLIPS.values(), ids=BAD_CLIPS)
def test_a_bad_clip_is_refused_with_its_name_and_cause(content, cause):
    with pytest.raises(BadClip, match=f"^dog.wav: .*{cause}"):
        load(content, name="dog.wav")
