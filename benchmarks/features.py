"""From sound files to cached log-mel features: this project against the stock path, on generated clips.

    python benchmarks/features.py

The stock path is a batched `datasets.map` that decodes with soundfile, takes the mean over the channels, resamples with
`torchaudio.functional.resample` (as the transformers pipeline does) and calls `ASTFeatureExtractor`. Both run in turns,
A B A B, on the same clips and processes, each time with an empty cache. Prints medians, and a last line of JSON. Two
parts are measured alone, on one core: resampling, and the filter bank (`--device cuda` computes ours there).
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import soxr
import torch
import torchaudio
from timing import medians, seconds
from transformers import ASTFeatureExtractor

from audio_dendrites.data.features import BatchedASTFeatureExtractor, extract_features

SECONDS, RATE, MODEL_RATE = 4, 44100, 16000


def make_clip(row: int, rate: int = RATE) -> np.ndarray:
    """Coloured noise that swells, and five tones, (samples, 2), float32."""
    random = np.random.default_rng(row)
    time_axis = np.arange(SECONDS * rate) / rate
    noise = np.cumsum(random.standard_normal((len(time_axis), 2)), axis=0)
    noise = np.diff(noise - 0.9 * np.roll(noise, 1, axis=0), axis=0, prepend=0)
    tones = sum(np.sin(2 * np.pi * pitch * time_axis) for pitch in random.uniform(50, 8000, 5))
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * random.uniform(0.1, 2) * time_axis)
    clip = 0.1 * (swell[:, None] * noise / noise.std() + tones[:, None] / 5)
    return clip.clip(-1, 1).astype(np.float32)


def wav_bytes(row: int) -> bytes:
    """A clip as a 16-bit stereo wav file."""
    file = io.BytesIO()
    soundfile.write(file, make_clip(row), RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def stock_batch(batch: dict[str, list], extractor: ASTFeatureExtractor) -> dict[str, Any]:
    """One batch of the stock path."""
    torch.set_num_threads(1)  # as ours: one process for each core
    waveforms = []
    for audio in batch["audio"]:
        samples, rate = soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32", always_2d=True)
        waveform = torch.from_numpy(samples.mean(axis=1))
        waveforms.append(torchaudio.functional.resample(waveform, rate, MODEL_RATE).numpy())
    return {"input_values": extractor(waveforms, sampling_rate=MODEL_RATE)["input_values"]}


def map_stock(clips: datasets.Dataset, num_proc: int) -> datasets.Dataset:
    """The cache of the stock path."""
    stock = partial(stock_batch, extractor=ASTFeatureExtractor(max_length=1024))
    return clips.map(stock, batched=True, batch_size=32, remove_columns=["audio"], num_proc=num_proc)


def map_ours(clips: datasets.Dataset, num_proc: int) -> datasets.Dataset:
    """Our cache."""
    return extract_features(clips, BatchedASTFeatureExtractor(), num_proc=num_proc)


def measure_mapping(clip_count: int, num_proc: int, repeats: int) -> dict[str, float]:
    """Seconds and cache bytes of both paths over whole files."""
    times = {map_stock: [], map_ours: []}
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        files = [{"bytes": wav_bytes(row), "path": None} for row in range(clip_count)]
        clips = datasets.Dataset.from_dict({"audio": files, "label": [row % 10 for row in range(clip_count)]})
        clips.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(source)
        for repeat in range(repeats):
            for path in times:
                fresh = Path(folder, f"{path.__name__}-{repeat}")
                shutil.copytree(source, fresh)
                clips = datasets.load_from_disk(fresh)
                times[path].append(seconds(partial(path, clips, num_proc)))
                sizes[path] = sum(file.stat().st_size for file in fresh.glob("cache-*"))
                shutil.rmtree(fresh)
    found = {f"{path.__name__.removeprefix('map_')}_s": statistics.median(taken) for path, taken in times.items()}
    return found | {"stock_bytes": sizes[map_stock], "ours_bytes": sizes[map_ours]}


def measure_filter_bank(device: str, rounds: int, clip_count: int = 32) -> list[float]:
    """Milliseconds for a 4 s clip with the stock extractor and ours, features at the clip's own length."""
    waveforms = [make_clip(row, MODEL_RATE)[:, 0] for row in range(clip_count)]
    ours = BatchedASTFeatureExtractor(max_length=398)
    stock = partial(ours.stock(), waveforms, sampling_rate=MODEL_RATE)
    taken = medians({"stock": stock, "ours": partial(ours.log_mel, waveforms, device)}, rounds)
    return [1000 * value / clip_count for value in taken.values()]


def measure_resampling(rate: int, rounds: int) -> list[float]:
    """Milliseconds for a 4 s clip with torchaudio and soxr."""
    waveform = make_clip(0, rate)[:, 0].copy()
    stock = partial(torchaudio.functional.resample, torch.from_numpy(waveform), rate, MODEL_RATE)
    ours = partial(soxr.resample, waveform, rate, MODEL_RATE, quality="HQ")
    return [1000 * value for value in medians({"stock": stock, "ours": ours}, rounds).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="Device of our filter bank.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()

    mapping = measure_mapping(options.clips, options.num_proc, options.repeats)
    filter_bank = measure_filter_bank(options.device, 4 * options.repeats)
    resampling = {rate: measure_resampling(rate, 4 * options.repeats) for rate in (44100, 48000, 96000)}

    print(f"{options.clips} clips of {SECONDS} s, {RATE} Hz stereo wav, {options.num_proc} processes")
    print("  files to cache, s     ", compare(mapping["stock_s"], mapping["ours_s"]))
    print("  size of the cache, MB ", compare(mapping["stock_bytes"] / 1e6, mapping["ours_bytes"] / 1e6))
    print(f"a clip of {SECONDS} s on one core; ours: filter bank on {options.device}, soxr for torchaudio")
    print("  filter bank, ms       ", compare(*filter_bank))
    for rate, times in resampling.items():
        print(f"  resample {rate:>6} Hz, ms", compare(*times))
    result = {
        **vars(options), **mapping, "speed_up": mapping["stock_s"] / mapping["ours_s"],
        "cache_ratio": mapping["stock_bytes"] / mapping["ours_bytes"], "filter_bank_ms": filter_bank,
        "resample_ms": resampling,
    }  # fmt: skip
    print(json.dumps(result))


def compare(stock: float, ours: float) -> str:
    """The columns of one line: both numbers, and their ratio."""
    return f" stock {stock:8.2f}  ours {ours:8.2f}  ratio {stock / ours:5.2f}"


if __name__ == "__main__":
    main()
