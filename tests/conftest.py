"""What the tests share: sounds, data sets, finished runs and a Hub. Nothing here needs a network."""

import gc
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

# These variables must be set before the first import of NumPy, PyTorch or a Hugging Face library.
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests use neither the network nor the user's caches
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# `make test` runs one process per core. More threads than cores would slow all of them down.
os.environ["OMP_NUM_THREADS"] = os.environ["LOKY_MAX_CPU_COUNT"] = "1"

import av
import numpy as np
import pytest
import soundfile
import torch
import yaml
from datasets import ClassLabel, Dataset, List
from hub.server import WRITE_TOKEN, Hub
from pandas import DataFrame
from playwright.sync_api import Browser, sync_playwright
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    SeamlessM4TFeatureExtractor,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    set_seed,
)

import train
from audio_dendrites.models.loading import load_model
from audio_dendrites.recipes import Recipe, parse_recipe
from audio_dendrites.results.scores import score, with_predictions
from audio_dendrites.training.trainer import AudioTrainer

ROOT = Path(__file__).parent.parent


def pytest_collection_finish():
    """Exclude the imported modules from garbage collection, which every training starts at its end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """Give the tests, and the processes that they start, a cache of data sets of their own."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        yield


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


class SmallCNN(nn.Module):
    """A convolutional network of no library, with batch statistics. It takes (batch, height, width), 8 by 8 or more."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2))
        self.head = nn.Linear(8, 3)

    def forward(self, input_values, labels=None):
        logits = self.head(self.body(input_values[:, None]).amax((2, 3)))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return loss | {"logits": logits}


class Examples(torch.utils.data.Dataset):
    """Examples of a model's input with the classes 0, 1, 2, 0, …"""

    def __init__(self, field: str, values: torch.Tensor):
        self.inputs, self.labels = {field: values}, [row % 3 for row in range(len(values))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.inputs.items()} | {"labels": self.labels[row]}


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(kind: str = "ast", **changes) -> nn.Module:
    """A tiny model of three classes with weights from seed 0, without dropout: ast, vit, bert or cnn."""
    set_seed(0)
    fields = SIZES | QUIET | changes
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**{"image_size": 16, "patch_size": 8, "num_channels": 1} | fields))
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=10, max_position_embeddings=16, **fields))
    strides = {"patch_size": 8, "time_stride": 8, "frequency_stride": 8, "num_mel_bins": 16, "max_length": 16}
    return SmallCNN() if kind == "cnn" else ASTForAudioClassification(ASTConfig(**strides, **fields))


def log_in(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log this process in to a Hub, with caches in the folder `home`."""
    for name in list(os.environ):
        if name.startswith("HF_") and name != "HF_DATASETS_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the endpoint
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


@pytest.fixture
def online(hub, tmp_path, monkeypatch) -> Hub:
    """The Hub of `hub`. This process is logged in to it."""
    log_in(hub, tmp_path / "home", monkeypatch)
    return hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub on this machine. A process that runs with `hub.environment(home, token)` uses no other one."""
    with Hub() as server:
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system. Without one, its tests are skipped."""
    found = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium-headless-shell")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found)
        yield chromium
        chromium.close()


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


def data_of(run: Recipe) -> train.RunData:
    return train.load_data([run])[run.training.output_dir]


def trained(run: Recipe, checkpoint: Path | None = None) -> AudioTrainer:
    """The trainer of a run after its training, which may continue from a checkpoint."""
    data = data_of(run)
    train.set_seed(run.training.seed)
    trainer = train.make_trainer(data, load_model(data.labels, run.model, data.extractor))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


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
RECIPE = TONES | {
    "max_length": 80,  # which all clips fit into
    "model_config": TINY_AST,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 3,
    "learning_rate": 3e-3,
    "precision": "bf16",
    "preprocessing_num_workers": 1,
    "time_roll": 5,
    "time_mask": 8,
    "mixup_alpha": 0.5,
    "logging_steps": 1,
}
PAI = {"modules": ["classifier.dense"], "first_growth": 0.25, "max_dendrites": 2}


def write_recipe(folder: Path, dataset: Path, /, **changes) -> Path:
    """Write RECIPE with changes to a file in a folder."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"dataset": str(dataset), "output_dir": str(folder / "run")} | changes))
    return path


def train_finished_run(folder: Path, dataset: Path, /, **changes) -> None:
    """Train RECIPE as `train.py recipe.yaml --hub_token …` does, and write what it prints to printed.txt."""
    import train  # not at the top: the process of xdist that distributes the tests would import it, too
    from audio_dendrites.recipes import parse_recipe

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        recipe = str(write_recipe(folder, dataset, **changes))
        patch.setattr("sys.argv", ["train.py", recipe, "--hub_token", "hf_PlantedOnTheCommandLine"])
        train.main(parse_recipe([recipe, "--hub_token", "hf_PlantedOnTheCommandLine"]))
    (folder / "printed.txt").write_text(printed.getvalue())


@pytest.fixture(scope="session")
def shared_tones(tmp_path_factory) -> Path:
    """The file of `write_tones` that all tests share. Use `tones` to change it."""
    return write_tones(tmp_path_factory.mktemp("home-of-jo") / "tones.parquet")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, shared_tones) -> Path:
    """A folder with a finished run of RECIPE on `shared_tones`, `run`, and printed.txt. Copy it before a change."""
    folder = tmp_path_factory.mktemp("finished")
    train_finished_run(folder, shared_tones)
    return folder


@pytest.fixture(scope="session")
def finished_pair(tmp_path_factory, shared_tones, finished) -> Path:
    """A folder with the runs of RECIPE with dendrites, `run`, and without, `run_baseline`, compared with each other."""
    pytest.importorskip("perforatedai", reason="perforatedai has no wheel for this Python; 3.11 and 3.12 have one")
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(finished / "run", folder / "run_baseline")
    train_finished_run(folder, shared_tones, baseline=True, pai=PAI)
    return folder


@pytest.fixture
def recipe(shared_tones, tmp_path):
    """A function that writes RECIPE with changes and returns the path of the file. Its run folder is tmp_path/run."""

    def write(**changes) -> Path:
        return write_recipe(tmp_path, shared_tones, **changes)

    return write


TINY_BEATS = {
    "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "position_kernel": 8, "position_groups": 2, "num_buckets": 8, "max_distance": 10,
}  # fmt: skip
TINY_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY_WAV2VEC2 = TINY_ENCODER | {
    "conv_dim": (8, 8, 8), "conv_stride": (10, 8, 4), "conv_kernel": (10, 8, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
    "mask_time_length": 2, "initializer_range": 0.2,
}  # fmt: skip
ENCODERS = {kind: TINY_WAV2VEC2 for kind in ("wav2vec2", "hubert", "wavlm", "unispeech-sat", "data2vec-audio")}
ENCODERS |= {"unispeech": TINY_WAV2VEC2 | {"num_ctc_classes": 4}, "wav2vec2-conformer": TINY_WAV2VEC2}
ENCODERS |= {"sew": TINY_WAV2VEC2, "sew-d": TINY_WAV2VEC2 | {"position_buckets": 8, "max_position_embeddings": 64}}
ENCODERS["wav2vec2-bert"] = TINY_ENCODER | {
    "classifier_proj_size": 8, "output_hidden_size": 16, "conv_depthwise_kernel_size": 3, "initializer_range": 0.2,
}  # fmt: skip
ENCODERS["whisper"] = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_source_positions": 50, "classifier_proj_size": 8,
    "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "init_std": 0.2,
}  # fmt: skip
ENCODER_EXTRACTORS = {
    "wav2vec2-bert": SeamlessM4TFeatureExtractor(),
    "whisper": WhisperFeatureExtractor(chunk_length=1),
    # base models normalise over time and were trained without masks
    "wav2vec2": Wav2Vec2FeatureExtractor(return_attention_mask=False),
}


def encoder_checkpoint(home: Path, kind: str, labels: Sequence[str] = ("high", "low")) -> Path:
    """The folder of a small checkpoint with random weights, as transformers saves it."""
    folder = home / kind
    if not folder.exists():
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](**ENCODERS[kind], id2label=dict(enumerate(labels)))
        MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING[type(config)](config).save_pretrained(folder)
        ENCODER_EXTRACTORS.get(kind, Wav2Vec2FeatureExtractor(return_attention_mask=True)).save_pretrained(folder)
    return folder
