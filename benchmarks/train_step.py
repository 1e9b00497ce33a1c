"""A training step of AST-base at 400 frames against the stock 1,024, and the share of time spent waiting for data.

    PYTHONPATH=. python benchmarks/train_step.py [--batch_size 2] [--rounds 5] [--device cuda --batch_size 48]

Steps are forward, backward and AdamW on random batches, timed A B A B …. Prints medians and ratios, and a last line of
JSON. The wait for data is that of the loader of this project: cached features, augmentation, collation.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from timing import medians, parser, seconds, train_step
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
    """A training step of a new model on (batch, frames, 128) inputs."""
    config = ASTConfig(max_length=frames, num_labels=CLASSES, attn_implementation=arguments.attn_implementation)
    return train_step(ASTForAudioClassification(config).to(arguments.device), dtype)


def compare_steps(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of each variant."""
    labels = torch.randint(0, CLASSES, (arguments.batch_size,))
    steps = {}
    for name, (frames, dtype) in VARIANTS.items():
        batch = {"input_values": torch.randn(arguments.batch_size, frames, BANDS), "labels": labels}
        steps[name] = partial(make_step(frames, dtype, arguments), batch)
    return medians(steps, arguments.rounds)


def data_wait(arguments: argparse.Namespace, folder: Path) -> float:
    """Share of an epoch's time in which the step waits for the next batch of cached features."""
    draws = np.random.default_rng(0)
    clips = arguments.batch_size * arguments.steps
    values = [draws.standard_normal(398 * BANDS).astype(np.float16) for _ in range(clips)]
    columns = Features({"input_values": List(Value("float16"))})
    Dataset.from_dict({"input_values": values}, features=columns).save_to_disk(folder)
    features = ClipFeatures(load_from_disk(folder), draws.integers(0, CLASSES, clips), BANDS)
    collator = SpectrogramCollator(400, CLASSES, time_roll=50, time_mask=96, frequency_mask=24, mixup_alpha=0.5)
    options = {"shuffle": True, "collate_fn": collator, "num_workers": arguments.num_workers}
    loader = DataLoader(AugmentedClips(features), arguments.batch_size, **options)
    step, batches, fetched = make_step(400, torch.bfloat16, arguments), iter(loader), []
    times = []
    for _ in range(arguments.steps):
        waited = seconds(lambda: fetched.append(next(batches)))
        times.append((waited, seconds(lambda: step(fetched[-1]))))
    waited, worked = np.sum(times[1:], axis=0)
    return float(waited / (waited + worked))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=10, help="Steps of the epoch that measures the wait for data.")
    options.add_argument("--num_workers", type=int, default=0)
    options.add_argument("--attn_implementation", default="sdpa")
    arguments = options.parse_args()
    taken = compare_steps(arguments)
    ratios = {name: one / taken["400 frames bf16"] for name, one in taken.items()}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} times the time of 400 frames bf16")
    with tempfile.TemporaryDirectory() as folder:
        share = data_wait(arguments, Path(folder))
    print(f"waiting for data: {share:.1%} of an epoch")
    print(json.dumps({"seconds": taken, "ratios": ratios, "data_wait": share, **vars(arguments)}))


if __name__ == "__main__":
    main()
