"""The cost of dendrites: live perforatedai, the exported form and the plain layer, on AST-base.

    PYTHONPATH=. python benchmarks/dendrites.py [--dendrites 1 2 3] [--batch_size 1] [--rounds 15] [--device cuda]

Times single layers and the whole model, in turns (A B A B …), in evaluation and without gradients, and prints medians
of the ratios within a round. "share" is the multiplications of the dendritic layer or model divided by those of the
plain one. A ratio of time divided by the share is the cost beside the products. It should be at most 1.10 for the
export. The last line is JSON. The whole model has dendrites where the recipe grows them: classifier and last MLP.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from pandas import DataFrame
from timing import in_turns, parser
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification

from audio_dendrites.models.dendritic import export_dendritic

BLOCK = "audio_spectrogram_transformer.layers.11.mlp"
CLASSES = 10
GROWN = ("classifier.dense", f"{BLOCK}.fc1", f"{BLOCK}.fc2")


def perforate(model: nn.Module, names: tuple[str, ...], ranks: dict[str, int], forward: Callable, count: int) -> None:
    """Put `count` dendrites of perforatedai on the named layers, with random weights, without its messages.

    Args:
        ranks: Number of dimensions of the output of each layer, the neurons in the last one.
        forward: Runs the model and returns a scalar.
    """
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        from perforatedai import globals_perforatedai as GPA
        from perforatedai import utils_perforatedai as UPA

        GPA.pc.__init__()
        GPA.pai_tracker = []
        device = next(model.parameters()).device
        settings = {
            "configuration_confirmed": True, "unwrapped_modules_confirmed": True, "weight_decay_accepted": True,
            "testing_dendrite_capacity": False, "silent": True, "test_saves": False, "drawing_pai": False,
            "device": device, "use_cuda": device.type == "cuda", "module_names_to_perforate": [],
            "module_ids_to_perforate": [f".{name}" for name in names],
        }  # fmt: skip
        for name, value in settings.items():
            getattr(GPA.pc, f"set_{name}")(value)
        UPA.perforate_model(model, save_name="PAI", making_graphs=False)
        modules = [model.get_submodule(name) for name in names]
        for name, module in zip(names, modules, strict=True):
            module.set_this_output_dimensions([-1] * (ranks[name] - 1) + [0])
        forward().backward()
        for module in modules:
            module.dendrite_module.this_node_index.copy_(module.this_node_index)
            for values in module.dendrite_module.dendrite_values:
                values.setup_arrays(values.dendrite_storage_shape.tolist())
                values.current_d_init[0] = 1
            UPA.simulate_cycles(module, 2 * count, True)
        model.to(device).zero_grad()
        with torch.no_grad():
            for module in modules:
                for parameter in module.parameters():
                    parameter.normal_(0, 0.02)


def layer_variants(inputs: int, outputs: int, rows: tuple[int, ...], count: int, device: str) -> dict[str, Callable]:
    """Plain layer, live perforatedai and the export, on the same inputs (*rows, inputs)."""
    values = torch.randn(*rows, inputs, device=device)
    plain = nn.Linear(inputs, outputs).to(device)
    live = nn.Sequential(nn.Linear(inputs, outputs)).to(device)
    perforate(live, ("0",), {"0": values.dim()}, lambda: live(values).sum(), count)
    variants = {"plain": plain, "live": live[0], "export": export_dendritic(live, "sigmoid")[0]}
    assert torch.equal(variants["export"](values), live(values))
    return {name: partial(layer.eval(), values) for name, layer in variants.items()}


def model_variants(arguments: argparse.Namespace, count: int) -> tuple[dict[str, Callable], float]:
    """The same for AST-base, and its share of multiplications."""
    config = ASTConfig(max_length=arguments.frames, num_labels=CLASSES)
    plain, live = (ASTForAudioClassification(config).to(arguments.device) for _ in range(2))
    values = torch.randn(arguments.batch_size, arguments.frames, config.num_mel_bins, device=arguments.device)
    labels = torch.zeros(arguments.batch_size, dtype=torch.long, device=arguments.device)
    ranks = {name: 2 if name == "classifier.dense" else 3 for name in GROWN}
    perforate(live, GROWN, ranks, lambda: live(values, labels=labels).loss, count)
    variants = {"plain": plain, "live": live, "export": export_dendritic(live, "sigmoid")}
    tokens = plain.audio_spectrogram_transformer.embeddings.position_embeddings.shape[1]
    whole = multiplications(config, tokens)
    added = count * (2 * tokens * config.hidden_size * config.intermediate_size + config.hidden_size * CLASSES)
    return {name: partial(model.eval(), values) for name, model in variants.items()}, 1 + added / whole


def multiplications(config: ASTConfig, tokens: int) -> int:
    """Multiplications of a forward pass of AST over a clip: patches, attention, MLPs and head."""
    width, inner = config.hidden_size, config.intermediate_size
    layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    return tokens * width * config.patch_size**2 + config.num_hidden_layers * layer + width * config.num_labels


def cases(arguments: argparse.Namespace, count: int) -> dict[str, tuple[dict[str, Callable], float]]:
    """Variants and share of multiplications of each case, by its name."""
    clips, tokens = arguments.batch_size, 12 * ((arguments.frames - 16) // 10 + 1) + 2
    layers = {
        f"fc1 768 → 3072, {clips} × {tokens} tokens": (768, 3072, (clips, tokens)),
        f"fc2 3072 → 768, {clips} × {tokens} tokens": (3072, 768, (clips, tokens)),
        f"classifier 768 → {CLASSES}, {clips} clips": (768, CLASSES, (clips,)),
    }
    found = {name: (layer_variants(*layer, count, arguments.device), 1.0 + count) for name, layer in layers.items()}
    return found | {"whole AST-base": model_variants(arguments, count)}


def main() -> None:
    options = parser(__doc__, rounds=15, batch_size=1)
    options.add_argument("--dendrites", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--frames", type=int, default=400)
    arguments = options.parse_args()
    torch.manual_seed(0)
    results = []
    for count in arguments.dendrites:
        for name, (variants, share) in cases(arguments, count).items():
            with torch.no_grad():
                seconds = DataFrame(in_turns(variants, arguments.rounds, shortest=0.005))
            plain = seconds["plain"].median()
            print(f"{count} dendrites, {name}: plain {1000 * plain:.3f} ms, share × {share:.3f}")
            ratios = seconds.drop(columns="plain").div(seconds["plain"], axis=0).median().to_dict()
            for variant, ratio in ratios.items():
                print(f"    {variant:20} × {ratio:.3f}, {ratio / share:.3f} of its share", flush=True)
            results.append({"dendrites": count, "case": name, "share": share, "plain_s": plain, **ratios})
    print(json.dumps(vars(arguments) | {"threads": torch.get_num_threads(), "results": results}))


if __name__ == "__main__":
    main()
