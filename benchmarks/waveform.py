"""The log-mel in the model against features computed before: time and memory of a training step, and the cache's size.

    PYTHONPATH=. python benchmarks/waveform.py [--device cuda --batch_size 48 --precision bf16] [--family cnn14]

Steps are collation with augmentation, forward, backward and AdamW on random clips, timed A B C A B C …. Prints medians,
and a last line of JSON. Peak memory is that of the GPU or, on a CPU, of a process of its own.
"""

import argparse
import json
import multiprocessing
import resource
from collections.abc import Callable

import numpy as np
import torch
from timing import medians, parser, train_step

from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.recipes import FeatureArguments, ModelArguments
from data_collator import AugmentedClips, SpectrogramCollator, WaveformCollator

LABELS = [f"class {number}" for number in range(10)]
VARIANTS = {  # name: fields of the recipe
    "features computed before": {},
    "waveform, fixed filters": {"waveform": True},
    "waveform, trained filters": {"waveform": True, "trainable_filters": True},
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_step(variant: str, arguments: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A training step, and the bytes of a clip in the cache."""
    fields = {"architecture": arguments.family, "model_config": arguments.model_config}
    model_arguments = ModelArguments(**fields, **VARIANTS[variant])
    extractor = load_extractor(model_arguments, FeatureArguments(max_length=arguments.frames))
    draws, samples = np.random.default_rng(0), 160 * arguments.frames + 240
    clips = [draws.standard_normal(samples).astype(np.float32) / 8 for _ in range(arguments.batch_size)]
    examples = [{"input_values": clip.half(), "labels": i % 10} for i, clip in enumerate(extractor.features(clips))]
    size, examples = examples[0]["input_values"].numel() * 2, AugmentedClips(examples)
    collate = (WaveformCollator if model_arguments.waveform else SpectrogramCollator)(
        num_labels=len(LABELS), **extractor.batch_layout, time_roll=50, time_mask=48, frequency_mask=24, mixup_alpha=0.5
    )
    step = train_step(load_model(LABELS, model_arguments, extractor).to(arguments.device), DTYPES[arguments.precision])
    return lambda: step(collate([examples[row] for row in range(len(examples))])), size


def peak_memory(variant: str, arguments: argparse.Namespace) -> int:
    """Peak memory of two steps in bytes, of the GPU or of this process, which should do nothing else."""
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step, _ = make_step(variant, arguments)
    step(), step()
    return torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    options = parser(__doc__, batch_size=8)
    options.add_argument("--family", default="ast", choices=["ast", "vit", "cnn14"])
    options.add_argument("--model_config", type=json.loads, default={}, help="As in a recipe.")
    options.add_argument("--frames", type=int, default=400)
    options.add_argument("--precision", default="fp32", choices=DTYPES)
    arguments = options.parse_args()
    memory = {}
    for variant in VARIANTS:  # in a new process each, so that the peaks do not add up
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[variant] = pool.apply(peak_memory, (variant, arguments))
    steps, sizes = {}, {}
    for variant in VARIANTS:
        steps[variant], sizes[variant] = make_step(variant, arguments)
    seconds = medians(steps, arguments.rounds)
    print(f"{arguments.family}, {arguments.frames} frames, batch {arguments.batch_size}, {arguments.precision}")
    for variant, size in sizes.items():
        print(
            f"  {variant:26} {1000 * seconds[variant]:9.1f} ms a step  {memory[variant] / 2**20:9.0f} MiB peak  "
            f"{size / 1000:7.1f} kB a clip in the cache"
        )
    print(json.dumps({"seconds": seconds, "peak_bytes": memory, "cache_bytes": sizes, **vars(arguments)}))


if __name__ == "__main__":
    main()
