"""What a recipe takes on paper: memory and FLOPs of its model, hours on GPUs, bytes on the disk, and CPU time.

    PYTHONPATH=. python benchmarks/estimate.py configs/audioset/ast_full.yaml --model null --classes 527 \\
        --clips 2.04e6 --seconds 10 --devices 8

Fields of the recipe can follow. `--model null` gives a model of the same size without a download. The model is the
real one, without weights: torch counts its FLOPs and the tensors that autograd keeps, under bf16 autocast. The bytes
and the CPU time of a clip are measured on generated clips and one core. Assumed are the GPU's limit, its memory, and
the share of the limit that a training reaches. Prints a table, and a last line of JSON.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil

import numpy as np
import soundfile
import torch
from features import RATE, make_clip
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from audio_dendrites.data.audio import load_waveform
from audio_dendrites.models.loading import check_model, load_extractor
from audio_dendrites.recipes import Recipe, parse_recipe
from audio_dendrites.training.preflight import two_clips
from data_collator import AugmentedClips
from train import COLLATORS

BYTES_OF_A_PARAMETER = 4 + 4 + 8 + 4  # weight, gradient, Adam's two moments and DDP's buckets, all in fp32
TIMED_CLIPS = 20


def model_costs(recipe: Recipe) -> dict[str, float]:
    """Parameters, and for one clip the FLOPs of a training step and the bytes that autograd keeps in bf16.

    `bytes_of_weights_in_bf16` are the copies of the weights that autocast keeps. They do not depend on the batch.
    """
    extractor = load_extractor(recipe.model, recipe.features)
    model = check_model(recipe, extractor).train()
    two = two_clips(model, extractor)
    one = {name: values[:1] for name, values in two.items()}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch counts no fused attention
        model(**one).logits.sum().backward()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        kept = [
            _kept_bytes(model, {name: torch.empty_like(t, device="cpu") for name, t in b.items()}) for b in (one, two)
        ]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_of_a_clip": counter.get_total_flops(),
        "activation_bytes_of_a_clip": kept[1] - kept[0],
        "bytes_of_weights_in_bf16": 2 * kept[0] - kept[1],
    }


def _kept_bytes(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """The bytes that autograd keeps for the backward pass, without parameters. A storage counts once."""
    storages, own = {}, {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = (tensor, storage.nbytes())  # the tensor keeps its storage alive
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(size for _, size in storages.values())


def clip_costs(recipe: Recipe, length: float) -> dict[str, float]:
    """For a clip of a length in seconds, the bytes of each way to store it and the seconds on one core to compute it.

    The clips are generated: noise and tones, 44.1 kHz stereo, FLAC of 16 bits.
    """
    features = load_extractor(recipe.model, recipe.features)
    files, rate = [], features.sampling_rate
    for row in range(TIMED_CLIPS):
        clip = np.resize(make_clip(row), (int(length * RATE), 2))
        soundfile.write(file := io.BytesIO(), clip, RATE, format="FLAC", subtype="PCM_16")
        files.append({"bytes": file.getvalue(), "path": None})
    waveforms = [load_waveform(file, rate) for file in files]
    mono = io.BytesIO()
    soundfile.write(mono, waveforms[0], rate, format="FLAC", subtype="PCM_16")
    cached = [features.features([waveform])[0].to(getattr(torch, features.stored_as)) for waveform in waveforms]
    clips = AugmentedClips([{"input_values": values, "labels": 0} for values in cached])
    augmentation = recipe.augmentation.settings(features.input)
    collate = COLLATORS[features.input](num_labels=len(recipe.data.labels), **features.batch_layout, **augmentation)
    return {
        "feature_bytes": features.features(waveforms[:1])[0].numel() * np.dtype(features.stored_as).itemsize,
        "waveform_bytes": 2 * len(waveforms[0]),
        "flac_bytes": len(mono.getvalue()),
        "source_bytes": float(np.mean([len(file["bytes"]) for file in files])),
        "decode_seconds": _core_seconds(lambda: [load_waveform(file, rate) for file in files]),
        "feature_seconds": _core_seconds(lambda: [features.features([waveform]) for waveform in waveforms]),
        "batch_seconds": _core_seconds(lambda: collate([clips[row] for row in range(TIMED_CLIPS)])),
    }


def _core_seconds(function: Callable[[], object]) -> float:
    """CPU time of a function for each of its clips, after a call to warm up."""
    function()
    start = time.process_time()
    for _ in range(3):
        function()
    return (time.process_time() - start) / 3 / TIMED_CLIPS


def estimate(model: Mapping[str, float], clip: Mapping[str, float], options: argparse.Namespace) -> dict[str, float]:
    """The costs of the whole training."""
    clips_a_second = options.devices * options.share * options.limit / model["flops_of_a_clip"]
    fixed = BYTES_OF_A_PARAMETER * model["parameters"] + model["bytes_of_weights_in_bf16"]
    cpu_seconds, batch_seconds = clip["decode_seconds"] + clip["feature_seconds"], clip["batch_seconds"]
    return {
        "gpu_gb_without_clips": fixed / 1e9,
        "clips_in_gpu_memory": int((options.memory - fixed) / model["activation_bytes_of_a_clip"]),
        "clips_a_second": clips_a_second,
        "hours": options.clips * options.epochs / clips_a_second / 3600,
        "features_gb": options.clips * clip["feature_bytes"] / 1e9,
        "waveforms_gb": options.clips * clip["waveform_bytes"] / 1e9,
        "mono_flac_gb": options.clips * clip["flac_bytes"] / 1e9,
        "read_gb_a_second": clips_a_second * clip["feature_bytes"] / 1e9,
        "core_hours_of_features": options.clips * cpu_seconds / 3600,
        "cores_with_cached_features": ceil(clips_a_second * batch_seconds),
        "cores_that_decode_in_training": ceil(clips_a_second * (cpu_seconds + batch_seconds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="Length of a clip.")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--limit", type=float, default=989e12, help="FLOP/s of a GPU. Default: H100 SXM, dense bf16.")
    parser.add_argument("--memory", type=float, default=80e9, help="Bytes of a GPU.")
    parser.add_argument("--share", type=float, default=0.4, help="Share of the limit that a training reaches.")
    options, words = parser.parse_known_args()
    torch.set_num_threads(1)
    recipe = parse_recipe(words)
    options.epochs = recipe.training.num_train_epochs
    recipe = replace(recipe, data=replace(recipe.data, labels=[f"class {i}" for i in range(options.classes)]))
    found = model_costs(recipe) | clip_costs(recipe, options.seconds)
    found |= estimate(found, found, options)
    print("| | |\n|---|---:|")
    for name, value in found.items():
        print(
            f"| {name.replace('_', ' ')} | {value:,.4g} |"
            if value < 1e4
            else f"| {name.replace('_', ' ')} | {value:,.0f} |"
        )
    print(json.dumps(vars(options) | found))


if __name__ == "__main__":
    main()
