"""Every shipped recipe runs: two steps from the YAML as it is, on generated clips in its data set's own columns."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import (
    ROOT,
    TINY_AST,
    TINY_BEATS,
    TINY_CNN14,
    TINY_VIT,
    encoder_checkpoint,
    leave_macos_files,
    tone,
    wav,
    write_archives,
)
from datasets import Audio, ClassLabel, Dataset, DatasetInfo, Features, Value
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTModel,
)

import train
from audio_dendrites.data.features import Waveforms
from audio_dendrites.models.beats import BEATsConfig
from audio_dendrites.models.cnn14 import CNN14Config
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification
from audio_dendrites.recipes import parse_recipe

TINY = {None: TINY_AST, "ast": TINY_AST, "vit": TINY_VIT, "cnn14": TINY_CNN14}
FRAMES = 48
SPEECH_COMMANDS = ("google/speech_commands", "speech_commands_v0.02")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Each data set as unpacked, or in the Hub's files: two clips a fold, and one that is silent where some are."""
    folder = tmp_path_factory.mktemp("data")
    files = write_archives(folder)
    # With splits of its own: a folder with a file for each, which its card names as on the Hub.
    audioset = files["agkphysics/AudioSet"] = folder / "AudioSet"
    audioset.mkdir()
    splits = ("train", "test", "bal_train", "unbal_train", "eval")
    listed = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n"
    (audioset / "README.md").write_text(card)
    for split in splits:
        clips = [_audioset_clip(split, row) for row in range(100 if "unbal" in split else 40)]
        Dataset.from_list(clips).to_parquet(audioset / f"{split}.parquet")
    return files | _speech_commands(folder) | {"synthetic": files["danavery/urbansound8K"]}  # which has its columns


def _speech_commands(folder: Path) -> dict[str, Path]:
    """The Hub's Parquet files, by split, with pieces of noise; and the archive as it is unpacked."""
    hub, archive = folder / "speech_commands" / "v0.02", folder / "speech_commands_v0.02"
    features = Features(
        {"file": Value("string"), "audio": Audio(), "label": ClassLabel(names=["yes", "no", "_silence_"]),
         "is_unknown": Value("bool"), "speaker_id": Value("string"), "utterance_id": Value("int8")}
    )  # fmt: skip
    for split in ("train", "validation", "test"):
        rows = []
        for row in range(6):
            word, speaker = ("yes", "no", "_silence_")[row % 3], None if row % 3 == 2 else f"{split}{row}"
            name = f"{word}/{speaker}_nohash_0.wav" if speaker else f"_background_noise_/{split}{row}.wav"
            silent = split == "train" and row == 4
            sound = wav(tone(300 * (1 + row % 3), 0.4, 16000, row) * (not silent))
            rows.append(
                {"file": name, "audio": {"bytes": sound, "path": Path(name).name}, "label": word, "is_unknown": False,
                 "speaker_id": speaker, "utterance_id": 0}
            )  # fmt: skip
            (archive / name).parent.mkdir(parents=True, exist_ok=True)
            (archive / name).write_bytes(sound)
            leave_macos_files(archive / name)
        (hub / split).mkdir(parents=True)
        table = pa.table({column: pa.array([row[column] for row in rows]) for column in features})
        table = table.set_column(2, "label", pa.array([features["label"].str2int(row["label"]) for row in rows]))
        Dataset(table.cast(features.arrow_schema), info=DatasetInfo(features=features)).to_parquet(
            hub / split / "0000.parquet"
        )
        words = [row["file"] for row in rows if row["speaker_id"]]
        if split != "train":
            (archive / f"{split.replace('test', 'testing')}_list.txt").write_text("\n".join(words) + "\n")
    (archive / "README.md").write_text("Speech Commands")
    return {"google/speech_commands": hub.parent, "speech_commands_v0.02": archive}


def _audioset_clip(split: str, row: int) -> dict:
    kind, name = row % 2, f"{split}-{row}"
    names = [["Speech"], ["Speech", "Dog"]][kind]
    silent = (split, row) in (("train", 0), ("unbal_train", 50))
    audio = {"bytes": wav(tone(3000 if kind else 300, 0.3, 16000, row) * (not silent)), "path": f"{name}.wav"}
    return {"video_id": name, "audio": audio, "labels": [f"/m/{n}" for n in names], "human_labels": names}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small model of the kind of each one that the recipes start from."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    ASTForAudioClassification(ASTConfig(**TINY_AST, max_length=160)).save_pretrained(folder / "ast")
    ASTFeatureExtractor(max_length=160).save_pretrained(folder / "ast")
    ViTModel(ViTConfig(**TINY_VIT)).save_pretrained(folder / "vit")
    DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY_VIT)).save_pretrained(folder / "deit")
    panns = {
        "convention": "librosa", "sampling_rate": 32000, "window_length": 1024, "hop_length": 320, "num_mel_bins": 64,
        "low_frequency": 50, "high_frequency": 14000, "mean": 0.0, "std": 0.5, "max_length": None,
    }  # fmt: skip
    config = WaveformConfig(backbone=CNN14Config(**TINY_CNN14), **panns)
    WaveformForAudioClassification(config).save_pretrained(folder / "panns")
    Waveforms(32000, 0, 0, 320, 64, 0.0, 0.5).stock().save_pretrained(folder / "panns")
    config = WaveformConfig(backbone=BEATsConfig(**TINY_BEATS), convention="povey", max_length=None)
    WaveformForAudioClassification(config).save_pretrained(folder / "beats")
    Waveforms(16000, 0, 0, 160, 128, 0.0, 0.5).stock().save_pretrained(folder / "beats")
    return {
        "MIT/ast-finetuned-audioset-10-10-0.4593": folder / "ast",
        "facebook/deit-base-distilled-patch16-384": folder / "deit",
        "google/vit-base-patch16-224-in21k": folder / "vit",
        "pretrained/cnn14_panns": folder / "panns",
        "facebook/wav2vec2-base": encoder_checkpoint(folder, "wav2vec2"),
        "microsoft/wavlm-base": encoder_checkpoint(folder, "wavlm"),
        "pretrained/beats": folder / "beats",
    }


RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_recipe_runs(path, data, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where perforatedai writes
    recipe = parse_recipe([str(path)])
    assert path.read_text().startswith("# ")  # says what it is
    if recipe.dendrites.pai:
        pytest.importorskip("perforatedai")
    options = {
        "dataset": data[recipe.data.dataset], "output_dir": tmp_path / "run", "max_length": FRAMES, "max_steps": 2,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "precision": "fp32", "report_to": "none",
        "preprocessing_num_workers": 1, "dataloader_num_workers": 0,
        "time_mask": min(recipe.augmentation.time_mask, FRAMES),
    }  # fmt: skip
    if recipe.model.model:
        options["model"] = pretrained[recipe.model.model]
    else:
        options |= {"model_config": json.dumps(TINY[recipe.model.architecture]), "match_parameters": "null"}
    train.main(
        parse_recipe([str(path), *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    clips = {"ashraq/esc50": 4, "agkphysics/AudioSet": 40} | dict.fromkeys(SPEECH_COMMANDS, 4)
    assert metrics["steps"] == 2 and metrics["test"]["clips"] == clips.get(recipe.data.dataset, 2)
    reasons = metrics["skipped"].get("train", [])
    assert len(reasons) == (recipe.data.dataset in ("agkphysics/AudioSet", *SPEECH_COMMANDS))
    card = (tmp_path / "run" / "README.md").read_text()  # names a file without its folder
    assert all("silent" in reason and f"{Path(reason).name}\n" in card for reason in reasons)
