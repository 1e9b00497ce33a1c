"""Training steps of AST-base: 400 frames against the stock 1,024, and the share of time spent waiting for data.

    PYTHONPATH=. python benchmarks/train_step.py [--batch_size 2] [--rounds 5]
    PYTHONPATH=. python benchmarks/train_step.py --device cuda --batch_size 48 --num_workers 8 --all

Steps are forward, backward and AdamW on random batches, timed A B A B …. Prints a table of medians, and a last line of
JSON. --all adds fp16, dendrites, `torch.compile`, and each --attention. On a GPU, the table has the share of its limit
in bf16, --limit. The wait for data is that of the loader of this project: cached features, augmentation, collation.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from dendrites import GROWN, perforate
from timing import medians, parser, seconds, train_step
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import ASTConfig, ASTForAudioClassification

from audio_dendrites.data.features import ClipFeatures
from data_collator import AugmentedClips, SpectrogramCollator

CLASSES, BANDS = 10, 128
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


@dataclass(frozen=True)
class Variant:
    """A training step. `dendrites` is their number on the classifier and the last MLP."""

    frames: int = 400
    precision: str = "bf16"
    dendrites: int = 0
    compiled: bool = False
    attention: str = "sdpa"

    def __str__(self) -> str:
        changes = ["1 dendrite"] * self.dendrites + ["compiled"] * self.compiled
        changes += [f"{self.attention} attention"] * (self.attention != "sdpa")
        return ", ".join([f"{self.frames:,} frames", self.precision, *changes])


def list_variants(arguments: argparse.Namespace) -> list[Variant]:
    """The variants to time. The first one is what the others are compared with."""
    found = [Variant(), Variant(1024, "fp32"), Variant(1024), Variant(precision="fp32")]
    if arguments.all:
        found.append(Variant(precision="fp16"))
        changes = product((0, 1), (False, True), arguments.attention)
        found += [Variant(400, "bf16", *change) for change in changes]
    return list(dict.fromkeys(found))


def make_model(variant: Variant, arguments: argparse.Namespace) -> nn.Module:
    """An AST with random weights."""
    settings = {"max_length": variant.frames, "attn_implementation": variant.attention} | arguments.model_config
    config = ASTConfig(num_labels=CLASSES, **settings)
    model = ASTForAudioClassification(config).to(arguments.device)
    if variant.dendrites:
        clip = torch.randn(1, variant.frames, BANDS, device=arguments.device)
        ranks = {name: 2 if name == "classifier.dense" else 3 for name in GROWN}
        perforate(model, GROWN, ranks, lambda: model(clip).logits.sum(), variant.dendrites)
    return model.train()


def flops_of_a_clip(model: nn.Module, frames: int) -> int:
    """FLOPs of the forward and the backward pass of a clip, as torch counts them. It counts no fused attention."""
    clip = torch.randn(1, frames, BANDS, device=next(model.parameters()).device)
    attention, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(clip).logits.sum().backward()
    model.config._attn_implementation = attention
    model.zero_grad()
    return counter.get_total_flops()


def compare_steps(arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    """For each variant, the median seconds of a step, and what follows from it."""
    labels = torch.randint(0, CLASSES, (arguments.batch_size,))
    steps, flops = {}, {}
    for variant in list_variants(arguments):
        batch = {"input_values": torch.randn(arguments.batch_size, variant.frames, BANDS), "labels": labels}
        model = make_model(variant, arguments)
        flops[str(variant)] = flops_of_a_clip(model, variant.frames)
        model = torch.compile(model) if variant.compiled else model
        steps[str(variant)] = step = partial(train_step(model, DTYPES[variant.precision]), batch)
        if variant.compiled:
            step()  # the second call, after the first step of AdamW, may compile again
    taken = medians(steps, arguments.rounds)
    first = next(iter(taken.values()))
    rows = []
    for name, one in taken.items():
        speed = arguments.batch_size / one
        share = flops[name] * speed / arguments.limit
        rows.append({"step": name, "seconds": one, "clips_a_second": speed, "times": one / first, "share": share})
    return rows


def print_table(rows: list[dict[str, float | str]], on_gpu: bool) -> None:
    """Print the variants as a table in Markdown. A share of a limit means nothing on a CPU."""
    print(f"| step | clips a second | time against the first |{' share of the bf16 limit |' if on_gpu else ''}")
    print(f"|---|---:|---:|{'---:|' if on_gpu else ''}")
    for row in rows:
        share = f" {row['share']:.1%} |" if on_gpu else ""
        print(f"| {row['step']} | {row['clips_a_second']:.4g} | {row['times']:.2f} |{share}")


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
    step, batches, fetched = train_step(make_model(Variant(), arguments), torch.bfloat16), iter(loader), []
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
    options.add_argument("--all", action="store_true", help="Also time fp16, dendrites, torch.compile and --attention.")
    options.add_argument(
        "--attention", nargs="+", default=["sdpa", "eager"], help="flash_attention_2 needs flash-attn."
    )
    options.add_argument("--limit", type=float, default=989e12, help="FLOP/s of the GPU. Default: H100 SXM and H200.")
    options.add_argument("--model_config", type=json.loads, default={}, help="As in a recipe. Default: AST-base.")
    arguments = options.parse_args()
    rows = compare_steps(arguments)
    print_table(rows, on_gpu=arguments.device != "cpu")
    with tempfile.TemporaryDirectory() as folder:
        share = data_wait(arguments, Path(folder))
    print(f"waiting for data: {share:.1%} of an epoch")
    print(json.dumps({"variants": rows, "data_wait": share, **vars(arguments)}))


if __name__ == "__main__":
    main()
