"""A training step of AST-base at 400 frames against the stock 1,024, and the share of time spent waiting for data.

    PYTHONPATH=. python benchmarks/train_step.py [--batch_size 2] [--rounds 5] [--device cuda --batch_size 48]

Steps are forward, backward and AdamW on random batches, timed A B A B … in one run; medians and ratios are printed, and
a last line of JSON. The wait for data is that of this project's loader: cached features, augmentation, collation.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from torch.utils.data import DataLoader
from transformers import ASTConfig, ASTForAudioClassification

from audio_dendrites.data.features import ClipFeatures
from data_collator import AugmentedClips, SpectrogramCollator

CLASSES, BANDS = 10, 128
VARIANTS = {  # name: frames, dtype of autocast (None: fp32)
    "1024 frames fp32": (1024, None),
    "1024 frames bf16": (1024, torch.bfloat16),
    "400 frames fp32": (400, None),
    "400 frames bf16": (400, torch.bfloat16),
}


def make_step(frames: int, dtype: torch.dtype | None, arguments: argparse.Namespace):
    """A training step of a model of its own on (batch, frames, 128) inputs; returns its seconds."""
    device = torch.device(arguments.device)
    config = ASTConfig(max_length=frames, num_labels=CLASSES, attn_implementation=arguments.attn_implementation)
    model = ASTForAudioClassification(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(inputs: torch.Tensor, labels: torch.Tensor) -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(inputs.to(device), labels=labels.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        return time.perf_counter() - start

    return step


def compare_steps(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds a step of each variant, one after the other in each round."""
    steps = {name: make_step(*variant, arguments) for name, variant in VARIANTS.items()}
    inputs = {name: torch.randn(arguments.batch_size, frames, BANDS) for name, (frames, _) in VARIANTS.items()}
    labels = torch.randint(0, CLASSES, (arguments.batch_size,))
    seconds = {name: [] for name in VARIANTS}
    for round_ in range(arguments.rounds + 1):
        for name, step in steps.items():
            taken = step(inputs[name], labels)
            if round_:  # the first one warms up
                seconds[name].append(taken)
                print(f"round {round_}  {name}  {taken:.3f} s", flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}


def data_wait(arguments: argparse.Namespace, folder: Path) -> float:
    """Share of an epoch's time in which the step waits for the next batch of cached features."""
    draws = np.random.default_rng(0)
    clips = arguments.batch_size * arguments.steps
    values = [draws.standard_normal(398 * BANDS).astype(np.float16) for _ in range(clips)]
    columns = Features({"input_values": List(Value("float16"))})
    Dataset.from_dict({"input_values": values}, features=columns).save_to_disk(folder)
    features = ClipFeatures(load_from_disk(folder), draws.integers(0, CLASSES, clips), BANDS)
    examples = AugmentedClips(features)
    collator = SpectrogramCollator(400, CLASSES, time_roll=50, time_mask=96, frequency_mask=24, mixup_alpha=0.5)
    loader = DataLoader(
        examples, arguments.batch_size, shuffle=True, collate_fn=collator, num_workers=arguments.num_workers
    )
    step = make_step(400, torch.bfloat16, arguments)
    batches, waited, worked = iter(loader), [], []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - start)
        worked.append(step(batch["input_values"], batch["labels"]))
    return sum(waited[1:]) / (sum(waited[1:]) + sum(worked[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of the epoch that measures the wait for data")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attn_implementation", default="sdpa")
    arguments = parser.parse_args()
    seconds = compare_steps(arguments)
    ours = seconds["400 frames bf16"]
    ratios = {name: taken / ours for name, taken in seconds.items()}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times the time of 400 frames bf16")
    with tempfile.TemporaryDirectory() as folder:
        share = data_wait(arguments, Path(folder))
    print(f"waiting for data: {share:.1%} of an epoch")
    print(json.dumps({"seconds": seconds, "ratios": ratios, "data_wait": share, **vars(arguments)}))


if __name__ == "__main__":
    main()
