"""The log-mel in the model against features computed before: time and memory of a training step, and the cache's size.

    PYTHONPATH=. python benchmarks/waveform.py [--device cuda --batch_size 48 --precision bf16] [--family cnn14]

Steps are collation with augmentation, forward, backward and AdamW on random clips, timed A B C A B C … in one run; the
medians are printed, and a last line of JSON. Peak memory is that of the GPU, or of a process of its own on a CPU.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

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


def make_step(variant: str, arguments: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """A training step that returns its seconds, and the bytes of a clip in the cache."""
    model_arguments = ModelArguments(
        architecture=arguments.family, model_config=arguments.model_config, **VARIANTS[variant]
    )
    extractor = load_extractor(model_arguments, FeatureArguments(max_length=arguments.frames))
    model = load_model(LABELS, model_arguments, extractor).to(arguments.device).train()
    draws, samples = np.random.default_rng(0), 160 * arguments.frames + 240
    clips = [draws.standard_normal(samples).astype(np.float32) / 8 for _ in range(arguments.batch_size)]
    examples = [{"input_values": clip.half(), "labels": i % 10} for i, clip in enumerate(extractor.features(clips))]
    size = examples[0]["input_values"].numel() * 2
    examples = AugmentedClips(examples)
    collate = (WaveformCollator if model_arguments.waveform else SpectrogramCollator)(
        num_labels=len(LABELS), **extractor.batch_layout, time_roll=50, time_mask=48, frequency_mask=24, mixup_alpha=0.5
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    dtype, device = DTYPES[arguments.precision], torch.device(arguments.device)

    def step() -> float:
        start = time.perf_counter()
        batch = collate([examples[row] for row in range(len(examples))])
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}).logits
            loss = torch.nn.functional.cross_entropy(loss.float(), batch["labels"].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        return time.perf_counter() - start

    return step, size


def peak_memory(variant: str, arguments: argparse.Namespace) -> int:
    """Bytes at the height of two steps, of the GPU or of this process, which should do nothing else."""
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    step, _ = make_step(variant, arguments)
    step(), step()
    if arguments.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="ast", choices=["ast", "vit", "cnn14"])
    parser.add_argument("--model_config", type=json.loads, default={}, help="as in a recipe")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    arguments = parser.parse_args()
    memory = {}
    for variant in VARIANTS:  # a fresh process each, so that the peaks do not add
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory[variant] = pool.apply(peak_memory, (variant, arguments))
    steps = {variant: make_step(variant, arguments) for variant in VARIANTS}
    seconds = {variant: [] for variant in VARIANTS}
    for round_ in range(arguments.rounds + 1):
        for variant, (step, _) in steps.items():
            taken = step()
            if round_:  # the first one warms up
                seconds[variant].append(taken)
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    print(f"{arguments.family}, {arguments.frames} frames, batch {arguments.batch_size}, {arguments.precision}")
    for variant, (_, size) in steps.items():
        print(
            f"  {variant:26} {1000 * medians[variant]:9.1f} ms a step  {memory[variant] / 2**20:9.0f} MiB peak  "
            f"{size / 1000:7.1f} kB a clip in the cache"
        )
    sizes = {variant: size for variant, (_, size) in steps.items()}
    print(json.dumps({"seconds": medians, "peak_bytes": memory, "cache_bytes": sizes, **vars(arguments)}))


if __name__ == "__main__":
    main()
