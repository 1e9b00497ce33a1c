"""A training step of an AST with patchout against one without.

    PYTHONPATH=. python benchmarks/patchout.py [--batch_size 2] [--rounds 5] [--device cuda] [--frames 400]

Steps are forward, backward and AdamW on one random batch in fp32, timed in turns in one run; medians and ratios are
printed, and a last line of JSON. The model is AST-base; --model_config '{"hidden_size": 192}' makes it another.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import ASTForAudioClassification

from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.models.ast import patch_grid
from audio_dendrites.models.loading import load_model
from audio_dendrites.recipes import ModelArguments

CLASSES, BANDS = 10, 128
SHARES = (0.0, 0.25, 0.5)  # of rows, and of columns, that are dropped


def load_variants(frames: int, model_config: str) -> dict[str, ASTForAudioClassification]:
    """A model for each share, by what it drops."""
    labels, extractor = [str(number) for number in range(CLASSES)], BatchedASTFeatureExtractor(max_length=frames)
    rows, columns = patch_grid(load_model(labels, ModelArguments(model_config=model_config), extractor).config)
    variants = {}
    for share in SHARES:
        frequency, time_ = int(share * rows), int(share * columns)
        arguments = ModelArguments(model_config=model_config, patchout_frequency=frequency, patchout_time=time_)
        variants[f"{frequency} of {rows} rows, {time_} of {columns} columns"] = load_model(labels, arguments, extractor)
    return variants


def step_seconds(model: ASTForAudioClassification, optimizer, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    loss = model(inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits for the GPU
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model_config", default="{}")
    arguments = parser.parse_args()
    models = load_variants(arguments.frames, arguments.model_config)
    inputs = torch.randn(arguments.batch_size, arguments.frames, BANDS, device=arguments.device)
    labels = torch.randint(0, CLASSES, (arguments.batch_size,), device=arguments.device)
    optimizers = {}
    for name, model in models.items():
        model.to(arguments.device).train()
        optimizers[name] = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds = {name: [] for name in models}
    for round_ in range(arguments.rounds + 1):
        for name, model in models.items():
            taken = step_seconds(model, optimizers[name], inputs, labels)
            if round_:  # the first one allocates
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:<40} {median:8.4f} s a step  {whole / median:5.2f} x as fast")
    print(json.dumps({"seconds": medians, **vars(arguments)}))


if __name__ == "__main__":
    main()
