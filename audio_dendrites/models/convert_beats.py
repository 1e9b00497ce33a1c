"""The published BEATs checkpoints (Chen et al. 2022, arXiv:2212.09058) as models of this project.

    python -m audio_dendrites.models.convert_beats BEATs_iter3_plus_AS2M.pt FOLDER [--labels class_labels_indices.csv]

A recipe's `model` starts from the folder, with `waveform: true`. The folder of a checkpoint that was fine-tuned on
AudioSet also takes raw audio in `pipeline("audio-classification", model=FOLDER, trust_remote_code=True)`, which gives
the published probabilities. A checkpoint without classes has no head, so its folder is only a start.
"""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audio_dendrites.errors import UserError
from audio_dendrites.models.beats import BEATsConfig
from audio_dendrites.models.convert_panns import read_checkpoint, read_labels, write_folder
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification

# The authors scale samples by 2^15, which adds a constant to the log of the energies, and normalise then.
MEAN, STD = 15.41663 - 30 * math.log(2), 6.55582
SETTINGS = {"activation_fn": "gelu", "deep_norm": True, "layer_norm_first": False}  # which no tensor tells
RENAMED = {
    r"^patch_embedding\.": "embeddings.patches.",
    r"^layer_norm\.": "embeddings.patch_norm.",
    r"^post_extract_proj\.": "embeddings.projection.",
    r"^encoder\.pos_conv\.0\.weight_g$": "embeddings.position.parametrizations.weight.original0",
    r"^encoder\.pos_conv\.0\.weight_v$": "embeddings.position.parametrizations.weight.original1",
    r"^encoder\.pos_conv\.0\.": "embeddings.position.",
    r"^encoder\.layer_norm\.": "embeddings.norm.",
    r"^encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.": "embeddings.distances.",  # one for all layers
    r"^encoder\.": "",
    r"\.self_attn_layer_norm\.": ".attention_norm.",
    r"\.final_layer_norm\.": ".norm.",
    r"\.self_attn\.": ".attention.",
    r"\.grep_linear\.": ".gate.",
    r"\.grep_a$": ".gate_scale",
    r"^predictor\.": "classifier.",
}


def convert(checkpoint: Path, names: Mapping[str, str] | None = None) -> WaveformForAudioClassification:
    """The network of a published checkpoint, with its front end.

    Args:
        checkpoint: `BEATs_iter3_plus_AS2M.pt` or another of the authors' files.
        names: The name of each class by its AudioSet mid. Default: the mids are the names.

    Returns:
        A model in evaluation mode that takes clips of any length. The sigmoid of its logits is the published output.
        Without a head in the checkpoint the logits are the features, averaged over the patches.

    Raises:
        UserError: The file cannot be read, or its tensors are not those of a BEATs and of these classes.
    """
    published = read_checkpoint(checkpoint, "cfg", "model")
    settings = published["cfg"]
    for name, value in SETTINGS.items():
        if settings.get(name) != value:
            raise UserError(f"{checkpoint}: {name} must be {value}, got {settings.get(name)}")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in published["model"].items():
        if not torch.equal(tensors.setdefault(_our_name(name), tensor), tensor):
            raise UserError(f"{checkpoint}: {name} must be the same in all layers, got another one")
    try:
        network = _network(settings, tensors)
    except (KeyError, ValueError) as error:
        raise UserError(f"{checkpoint} must have the tensors of a BEATs, got others: {error}") from error
    head = tensors.get("classifier.weight")
    labels = {} if head is None else _labels(checkpoint, published.get("label_dict"), len(head), names)
    config = WaveformConfig(
        backbone=network, convention="povey", mean=MEAN, std=STD, max_length=None,
        problem_type="multi_label_classification", **labels,
    )  # fmt: skip
    model = WaveformForAudioClassification(config)
    if head is None:
        model.backbone.classifier = nn.Identity()
    try:
        model.backbone.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: {' '.join(str(error).split())}") from error
    return model.eval()


def _our_name(name: str) -> str:
    """The name of a published tensor here."""
    for pattern, ours in RENAMED.items():
        name = re.sub(pattern, ours, name)
    return name


def _network(settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> BEATsConfig:
    """The configuration of a network, from the shapes of its tensors."""
    width, _, patch, _ = tensors["embeddings.patches.weight"].shape
    hidden, _ = tensors["embeddings.projection.weight"].shape
    _, group, kernel = tensors["embeddings.position.parametrizations.weight.original1"].shape
    buckets, heads = tensors["embeddings.distances.weight"].shape
    return BEATsConfig(
        patch_size=patch, embedding_size=width, hidden_size=hidden, num_attention_heads=heads,
        num_hidden_layers=sum(name.endswith(".attention.gate_scale") for name in tensors),
        intermediate_size=len(tensors["layers.0.fc1.weight"]), position_kernel=kernel, position_groups=hidden // group,
        num_buckets=buckets, max_distance=settings["max_distance"], hidden_dropout_prob=settings["dropout"],
        attention_probs_dropout_prob=settings["attention_dropout"],
    )  # fmt: skip


def _labels(
    checkpoint: Path, mids: Mapping[int, str] | None, classes: int, names: Mapping[str, str] | None
) -> dict[str, Any]:
    """The fields of the configuration that name the classes."""
    if mids is None or set(mids) != set(range(classes)):
        raise UserError(f"{checkpoint}: label_dict must name {classes} classes, got {mids and len(mids)}")
    ordered = [mids[index] for index in range(classes)]
    if names is not None and (unknown := [mid for mid in ordered if mid not in names]):
        raise UserError(f"labels must name every class of {checkpoint}, got none for {', '.join(unknown[:3])}")
    labels = [mid if names is None else names[mid] for mid in ordered]
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a file and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--labels", type=Path, help="AudioSet's class_labels_indices.csv, columns index, mid and display_name"
    )
    options = parser.parse_args(arguments)
    names = None if options.labels is None else read_labels(options.labels)
    try:
        model = convert(options.checkpoint, names)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_folder(model, options.folder)
    classes = f"{model.config.num_labels} classes" if "backbone.classifier.weight" in model.state_dict() else "no head"
    print(f"{options.folder}: BEATs, {model.config.sampling_rate} Hz, {classes}")


if __name__ == "__main__":
    main()
