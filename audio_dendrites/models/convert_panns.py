"""The published CNN14 checkpoints of PANNs (Kong et al. 2020, arXiv:1912.10211) as models of this project.

    python -m audio_dendrites.models.convert_panns Cnn14_mAP=0.431.pth FOLDER [--labels class_labels_indices.csv]

`pipeline("audio-classification", model=FOLDER, trust_remote_code=True)` loads the folder, takes raw audio, and returns
the published clip-wise probabilities. A recipe starts from it with `model: FOLDER` and `waveform: true`.
"""

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import torch

from audio_dendrites.data.features import Waveforms
from audio_dendrites.errors import UserError
from audio_dendrites.files import set_default_mode
from audio_dendrites.models.cnn14 import CNN14Config
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification

SETTINGS = {1024: (32000, 14000), 512: (16000, 8000), 256: (8000, 4000)}  # window: sampling rate, highest frequency
BLOCKS = 6
STFT = ("spectrogram_extractor.stft.conv_real.weight", "spectrogram_extractor.stft.conv_imag.weight")  # fixed


def read_checkpoint(path: Path, *kinds: str) -> dict[str, Any]:
    """What a file of torch holds, read without running code that it may bring.

    Args:
        path: The file.
        kinds: Names that the file must have, each with a dictionary.

    Raises:
        UserError: The file cannot be read, holds objects other than tensors, or lacks a name.
    """
    layout = ", ".join(f"{kind!r}: {{...}}" for kind in kinds)
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
        found = "other contents"
    except (OSError, RuntimeError, EOFError) as error:
        published, found = None, str(error).strip().partition("\n")[0]
    except pickle.UnpicklingError:
        published, found = None, "objects other than tensors"
    if not isinstance(published, dict) or not all(isinstance(published.get(kind), dict) for kind in kinds):
        raise UserError(f"{path} must be a published checkpoint, {{{layout}}}, got {found}")
    return published


def read_labels(path: Path) -> dict[str, str]:
    """AudioSet's classes in order, mid to display name, from class_labels_indices.csv."""
    rows = pandas.read_csv(path, keep_default_na=False).sort_values("index")
    return dict(zip(rows["mid"], rows["display_name"], strict=True))


def write_folder(model: WaveformForAudioClassification, folder: Path) -> None:
    """Save a model that takes clips of any length, with the feature extractor that `pipeline` needs."""
    config = model.config
    waveforms = Waveforms(config.sampling_rate, 0, 0, config.hop_length, config.num_mel_bins, config.mean, config.std)
    model.save_pretrained(folder)
    waveforms.stock().save_pretrained(folder)
    set_default_mode(*folder.glob("*.safetensors"))


def convert(checkpoint: Path, labels: Sequence[str] | None = None) -> WaveformForAudioClassification:
    """Convert a published checkpoint to the same network of this project, front end included.

    Args:
        checkpoint: `Cnn14_mAP=0.431.pth`, `Cnn14_16k_mAP=0.438.pth` or `Cnn14_8k_mAP=0.416.pth`.
        labels: Class names in the order of the outputs.

    Returns:
        A model in evaluation mode. The sigmoid of its logits is the published clip-wise output for clips of any length.

    Raises:
        UserError: The file cannot be read, or its tensors are not those of a CNN14 and of these classes.
    """
    published = read_checkpoint(checkpoint, "model")["model"]
    tensors = {_our_name(name): tensor for name, tensor in published.items() if name not in STFT}
    needed = ("front_end.filters", *(f"backbone.{name}.weight" for name in ("bn0", "layers.0.conv1", "classifier")))
    if missing := [name for name in (*STFT, *needed) if name not in published and name not in tensors]:
        raise UserError(f"{checkpoint} must hold the tensors of Cnn14, but it lacks {', '.join(missing)}")
    window = published[STFT[0]].shape[-1]
    if window not in SETTINGS:
        raise UserError(
            f"{checkpoint} must have windows of {', '.join(map(str, SETTINGS))} samples, got windows of {window}"
        )
    rate, highest = SETTINGS[window]
    bands, classes = len(tensors["backbone.bn0.weight"]), len(tensors["backbone.classifier.weight"])
    if labels is not None and len(labels) != classes:
        raise UserError(f"labels must be {classes} names, one for each output of {checkpoint}, got {len(labels)}")
    names = {}
    if labels is not None:
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = WaveformConfig(
        backbone=CNN14Config(
            num_mel_bins=bands, num_hidden_layers=BLOCKS, first_channels=len(tensors["backbone.layers.0.conv1.weight"])
        ),
        convention="librosa", sampling_rate=rate, window_length=window, hop_length=rate // 100, num_mel_bins=bands,
        low_frequency=50, high_frequency=highest, mean=0.0, std=0.5, max_length=None,  # as it is
        problem_type="multi_label_classification", num_labels=classes, **names,
    )  # fmt: skip
    model = WaveformForAudioClassification(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: {' '.join(str(error).split())}") from error
    return model.eval()


def _our_name(name: str) -> str:
    """The name of a published tensor in this project."""
    if name == "logmel_extractor.melW":
        return "front_end.filters"
    for block in range(BLOCKS):
        name = name.replace(f"conv_block{block + 1}.", f"layers.{block}.")
    return "backbone." + name.replace("fc_audioset.", "classifier.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a file and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labels", type=Path, help="class_labels_indices.csv of AudioSet: index and display_name.")
    options = parser.parse_args(arguments)
    labels = None if options.labels is None else list(read_labels(options.labels).values())
    try:
        model = convert(options.checkpoint, labels)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_folder(model, options.folder)
    print(f"{options.folder}: CNN14, {model.config.sampling_rate} Hz, {model.config.num_labels} classes")


if __name__ == "__main__":
    main()
