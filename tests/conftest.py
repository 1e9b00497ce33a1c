"""Small models, spectrograms and data sets that the tests share; nothing here needs a network or leaves its folder."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

# Before the first import of a Hugging Face library: the tests never reach for the network or the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import av
import numpy as np
import pytest
import soundfile
from datasets import ClassLabel, Dataset, List
from hub.server import WRITE_TOKEN, Hub
from pandas import DataFrame

from audio_dendrites.recipes import Recipe, parse_recipe
from audio_dendrites.results.scores import score, with_predictions

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """A cache of data sets for the tests, and for the processes they start, that is theirs alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def tone(frequency: float, seconds: float = 0.5, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A noisy sine, float32."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * frequency * time) + 0.01 * noise).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    """The bytes of a 16-bit wav file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def recording(samples: np.ndarray | None, rate: int, container: str, codec: str, video: bool = False) -> bytes:
    """The bytes of a file as phones and browsers write them: (samples, channels) float32, and a picture on request."""
    content = io.BytesIO()
    with av.open(content, "w", format=container) as file:
        tracks = []
        if samples is not None:
            layout = "mono" if samples.shape[1] == 1 else "stereo"
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), "fltp", layout)
            sound.sample_rate = rate
            tracks.append((file.add_stream(codec, rate=rate, layout=layout), sound))
        if video:
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), dtype=np.uint8))
            tracks.append((file.add_stream("mpeg4", rate=1, width=32, height=32, pix_fmt="yuv420p"), picture))
        for track, frame in tracks:
            for packet in [*track.encode(frame), *track.encode(None)]:
                file.mux(packet)
    return content.getvalue()


@pytest.fixture
def online(hub, tmp_path, monkeypatch) -> Hub:
    """The same Hub, and this process logged in to it."""
    environment = hub.environment(tmp_path / "home", WRITE_TOKEN)
    for name in [*environment, *os.environ]:
        if name.startswith("HF_") and name != "HF_DATASETS_CACHE":
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    return hub


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    """A Hub on this machine; `hub.environment(home, token)` is what a process needs to have it as its only one."""
    with Hub(tmp_path / "hub") as server:
        yield server


def write_archives(folder: Path) -> dict[str, Path]:
    """UrbanSound8K and ESC-50 as unpacked, two clips a fold, with what macOS leaves in folders; by their Hub id."""
    urbansound8k, esc50 = [], []
    for row in range(20):
        kind, sound = row % 2, wav(tone(3000 if row % 2 else 300, 0.5, 22050, row), 22050)
        urbansound8k.append(
            {"slice_file_name": f"{row}-{kind}-0-0.wav", "fsID": row, "start": 0.0, "end": 0.5, "salience": 1,
             "fold": 1 + row // 2, "classID": kind, "class": ("air_conditioner", "siren")[kind]}
        )  # fmt: skip
        esc50.append(
            {"filename": f"{1 + row // 4}-{row}-A-{kind}.wav", "fold": 1 + row // 4, "target": kind,
             "category": ("dog", "rain")[kind], "esc10": True, "src_file": row, "take": "A"}
        )  # fmt: skip
        for path in (
            folder / "UrbanSound8K" / "audio" / f"fold{1 + row // 2}" / urbansound8k[-1]["slice_file_name"],
            folder / "ESC-50-master" / "audio" / esc50[-1]["filename"],
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sound)
            leave_macos_files(path)
    for table, rows in (
        ("UrbanSound8K/metadata/UrbanSound8K.csv", urbansound8k),
        ("ESC-50-master/meta/esc50.csv", esc50),
    ):
        (folder / table).parent.mkdir()
        DataFrame(rows).to_csv(folder / table, index=False)
    return {"danavery/urbansound8K": folder / "UrbanSound8K", "ashraq/esc50": folder / "ESC-50-master"}


def leave_macos_files(path: Path) -> None:
    """What macOS leaves beside a file that it copied."""
    path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    path.with_name(".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def tone_of(row: int) -> np.ndarray:
    """The sound of a clip of `tones`."""
    return tone(3000 if row % 2 else 300, 0.3 + 0.02 * row, seed=row)


def write_tones(path: Path) -> Path:
    """A Parquet file of 24 clips: three folds, the classes high and low, two clips a source recording."""
    rows = [
        {
            "audio": {"bytes": wav(tone_of(row)), "path": f"{row}.wav"},
            "name": f"clip-{row}",
            "kind": "high" if row % 2 else "low",
            "fold": 1 + row // 8,
            "recording": row // 2,
        }
        for row in range(24)
    ]
    Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture
def tones(tmp_path) -> Path:
    """The file of `write_tones`."""
    return write_tones(tmp_path / "tones.parquet")


@pytest.fixture
def chords(tones) -> Path:
    """`tones` with two columns of lists: `kinds`, high, low, both or neither, and `numbers`, the same as numbers."""
    rows = Dataset.from_parquet(str(tones)).to_list()
    kinds = [["low"], ["high"], ["high", "low"], [], ["low"], ["low", "high"]]
    for row, clip in enumerate(rows):
        clip["kinds"] = kinds[row % 6]
        parts = [tone({"low": 300, "high": 3000}[kind], 0.3 + 0.02 * row, seed=row) for kind in clip["kinds"]]
        clip["audio"]["bytes"] = wav(sum(parts) if parts else 0.1 * tone(1000, 0.3, seed=row))
        clip["numbers"] = [("high", "low").index(kind) for kind in clip["kinds"]]
    clips = Dataset.from_list(rows)
    clips = clips.cast_column("numbers", List(ClassLabel(names=["high", "low"])))
    path = tones.with_name("chords.parquet")
    clips.to_parquet(path)
    tones.unlink()
    return path


def write_run(
    folder: Path, labels: Sequence[str], clips: Sequence[int], truth: Sequence, logits: np.ndarray, /, **fields
) -> Path:
    """The folder of a finished run without its model; two clips a source recording. `fields` are of metrics.json."""
    table = DataFrame({"clip": [f"c{clip:02}" for clip in clips], "fold": "1", "label": list(truth)})
    table = with_predictions(table.assign(group=[str(clip // 2) for clip in clips]), np.float32(logits), labels)
    folder.mkdir(parents=True)
    table.to_parquet(folder / "predictions.parquet", index=False)
    metrics = {
        "dataset": "animals", "labels": list(labels), "test": score(table, labels), "parameters": 1000, "steps": 20,
        "train_steps_per_second": 2.0,
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics | fields))
    return folder


TONES = {  # recipe fields for `tones`
    "audio_column": "audio",
    "label_column": "kind",
    "clip_column": "name",
    "group_column": "recording",
    "train_folds": ["1"],
    "validation_folds": ["2"],
    "test_folds": ["3"],
}


def recipe_of(values: dict) -> Recipe:
    """The recipe of the command line with these fields; those of a mapping are JSON."""
    words = [[f"--{key}", *(value if isinstance(value, list) else [value])] for key, value in values.items()]
    return parse_recipe([json.dumps(w) if isinstance(w, dict) else str(w) for option in words for w in option])


TINY_AST = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "time_stride": 16,
    "frequency_stride": 16,
}
TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
}
TINY_CNN14 = {"width": 0.0625, "num_hidden_layers": 3}
TINY_BEATS = {
    "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "position_kernel": 8, "position_groups": 2, "num_buckets": 8, "max_distance": 10,
}  # fmt: skip
