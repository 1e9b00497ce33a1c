"""A training step of an AST with patchout against one without.

    PYTHONPATH=. python benchmarks/patchout.py [--batch_size 2] [--rounds 5] [--device cuda] [--frames 400]

Steps are forward, backward and AdamW on one random batch in fp32, timed in turns. Prints medians and ratios, and a last
line of JSON. The model is AST-base unless --model_config changes it: '{"hidden_size": 192}'.
"""

import json
from functools import partial

import torch
from timing import medians, parser, train_step
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
        frequency, time = int(share * rows), int(share * columns)
        arguments = ModelArguments(model_config=model_config, patchout_frequency=frequency, patchout_time=time)
        variants[f"{frequency} of {rows} rows, {time} of {columns} columns"] = load_model(labels, arguments, extractor)
    return variants


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--frames", type=int, default=400)
    options.add_argument("--model_config", default="{}")
    arguments = options.parse_args()
    inputs = torch.randn(arguments.batch_size, arguments.frames, BANDS)
    batch = {"input_values": inputs, "labels": torch.randint(0, CLASSES, (arguments.batch_size,))}
    models = load_variants(arguments.frames, arguments.model_config)
    steps = {name: partial(train_step(model.to(arguments.device)), batch) for name, model in models.items()}
    seconds = medians(steps, arguments.rounds)
    whole = next(iter(seconds.values()))
    for name, median in seconds.items():
        print(f"{name:<40} {median:8.4f} s a step  {whole / median:5.2f} x as fast")
    print(json.dumps({"seconds": seconds, **vars(arguments)}))


if __name__ == "__main__":
    main()
