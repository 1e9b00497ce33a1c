"""Export a finished run as one file for other runtimes, and compare the file with the model.

    python -m audio_dendrites.publishing.formats RUN --format onnx|torch_export|safetensors [--output FILE]

onnx is for ONNX Runtime and other readers of ONNX. torch_export is for `torch.export.load`, which needs torch alone.
Both take `input_values` from the run's feature extractor, for any number of clips, and give `logits`. A waveform model
takes clips of any length, but the clips of a batch must have the same length. safetensors holds the weights alone,
under the names of the model's `state_dict`. Each file also holds, as JSON by name, what a reader without transformers
needs: `labels` in the order of the logits, `sampling_rate`, `preprocessor_config` (the feature settings) and `config`.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import FeatureExtractionMixin, PreTrainedModel

from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole
from audio_dendrites.models.finished import load_finished

TOLERANCE = 1e-5  # largest difference of a logit, as a share of the batch's largest logit
BATCHES = (1, 4)  # clips that are compared. The model is traced with two, so a fixed number of clips would fail.
SHORTER = (3, 7, 9, 19)  # Waveforms are compared whole and cut to these parts, so a graph for some lengths would fail.
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights. A protobuf message has at most 2 GiB, and the graph needs some of it.
Logits = Callable[[torch.Tensor], torch.Tensor]


class Format(NamedTuple):
    """How a format is written and read back."""

    suffix: str
    packages: tuple[str, ...]  # that only this format needs
    write: Callable[[PreTrainedModel, torch.Tensor, dict[str, str], Path], None]  # takes features, metadata and path
    read: Callable[[Path, PreTrainedModel], Logits]  # returns a function from features to logits


def export_run(run: Path, format: str, output: Path | None = None) -> tuple[Path, float]:
    """Write the model of a run, or of another model folder, in another format.

    Args:
        run: The folder.
        format: A key of `FORMATS`.
        output: The file. Defaults to export/model with the suffix of the format, in the folder.

    Returns:
        The file, and the largest difference between its logits and the model's, relative to the largest logit.

    Raises:
        UserError: The folder holds no complete model, a package is missing, the format does not support the model, or
            the logits of the file differ from those of the model. An older file then stays as it was.
    """
    kind = FORMATS[format]
    if missing := [package for package in kind.packages if find_spec(package) is None]:
        raise UserError(f"format {format} needs {', '.join(missing)}: pip install {' '.join(kind.packages)}")
    output = output or run / "export" / f"model{kind.suffix}"
    if output.suffix != kind.suffix:
        raise UserError(f"output: the file must end in {kind.suffix}, got {output}")
    if output.parent.resolve() == run.resolve() and output.name == "model.safetensors":
        raise UserError(f"output: {output} holds the weights of the run itself; choose another file")
    if missing := [name for name in ("config.json", "preprocessor_config.json") if not (run / name).is_file()]:
        raise UserError(f"{run} has no {' and no '.join(missing)}; give the folder of a finished run")
    model, extractor = load_finished(run)
    features = example_features(extractor, max(BATCHES))
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as beside, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn about their own code
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        kind.write(model, features[:2], metadata(run, model, extractor), beside)
        difference = check_parity(model, kind.read(beside, model), features)
    return output, difference


def example_features(extractor: FeatureExtractionMixin, clips: int) -> torch.Tensor:
    """Features of 11 s of tones in noise, each clip at another pitch and level, the same in every call.

    Returns:
        (clips, frames, mel bands) or (clips, samples), as the model takes them, float32.
    """
    random, time = np.random.default_rng(0), np.arange(11 * extractor.sampling_rate) / extractor.sampling_rate
    waveforms = [
        (0.5 ** (clip + 1) * (np.sin(2 * np.pi * 220 * 1.5**clip * time) + random.normal(0, 0.3, len(time)))) / 1.5
        for clip in range(clips)
    ]
    waveforms = [waveform.astype(np.float32) for waveform in waveforms]
    features = extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    return features[extractor.model_input_names[0]].float()


def metadata(run: Path, model: PreTrainedModel, extractor: FeatureExtractionMixin) -> dict[str, str]:
    """The metadata of a file: JSON by name."""
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    values: dict[str, Any] = {"labels": labels, "sampling_rate": extractor.sampling_rate}
    for name in ("preprocessor_config", "config"):
        values[name] = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        values[name].pop("_name_or_path", None)  # a path of this machine
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


@torch.no_grad()
def check_parity(model: PreTrainedModel, logits: Logits, features: torch.Tensor) -> float:
    """Compare the logits of a file with those of a model in evaluation mode.

    Returns:
        The largest difference, relative to the largest logit of the batch.

    Raises:
        UserError: The difference is above `TOLERANCE`, or not a number.
    """
    worst = 0.0
    batches = [features[:clips] for clips in BATCHES]
    if features.dim() == 2:
        batches += [batch[:, : features.shape[1] // part].contiguous() for batch in batches for part in SHORTER]
    for batch in batches:
        expected, found = model(batch).logits, logits(batch)
        if found.shape != expected.shape:
            shapes = tuple(expected.shape), tuple(found.shape)
            raise UserError(f"the logits of the file must have the shape {shapes[0]}, got {shapes[1]}")
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            raise UserError(
                f"the logits of the file must be those of the model within {TOLERANCE:.0e} of the largest one, got a "
                f"difference of {difference:.1e}. The file was deleted"
            )
        worst = max(worst, difference)
    return worst


class _Logits(nn.Module):
    """A model whose output is a tensor, so that a traced file needs no class of transformers."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return self.model(input_values).logits


def _traced(model: PreTrainedModel, features: torch.Tensor) -> torch.export.ExportedProgram:
    """The model as a graph for any number of clips and, if it takes waveforms, of samples."""
    free = {"batch": torch.export.Dim("batch"), "samples": torch.export.Dim.DYNAMIC}
    axes = {"input_values": _free_axes(features, free.get)}
    # Pooling and memory layouts make torch assume that the number of frames is odd, or even, as in the trace. The graph
    # is the same for all lengths (`check_parity` tries two), so these assertions are deferred, and dropped below.
    program = torch.export.export(
        _Logits(model).eval(), (), {"input_values": features}, dynamic_shapes=axes,
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in list(module.graph.nodes):
                node.meta.pop("stack_trace", None)  # paths of this machine, which both formats would keep
                if node.target is torch.ops.aten._assert_scalar.default:
                    module.graph.erase_node(node)
            module.graph.eliminate_dead_code()
            module.recompile()
    return program


def _free_axes(features: torch.Tensor, kind: Callable) -> dict[int, Any]:
    """The axes of the features that may have any size: the clips and, for waveforms, the samples."""
    names = ("batch", "samples") if features.dim() == 2 else ("batch",)
    return {axis: kind(name) for axis, name in enumerate(names)}


def _write_torch_export(model, features, values, path):
    with path.open("w+b") as file:  # a path would have to end in .pt2
        torch.export.save(_traced(model, features), file, extra_files={f"{key}.json": values[key] for key in values})


def _read_torch_export(path, model):
    with path.open("rb") as file:
        program = torch.export.load(file).module()
    return lambda features: program(input_values=features)


def _write_onnx(model, features, values, path):
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > LARGEST_ONNX:
        raise UserError(
            f"format onnx: the weights must be at most {LARGEST_ONNX / 1e9:.2f} GB, got {size / 1e9:.2f} GB. Use "
            f"--format torch_export"
        )
    try:
        axes = {"input_values": _free_axes(features, str)}
        program = torch.onnx.export(
            _traced(model, features), output_names=["logits"], dynamic_shapes=axes, dynamo=True, verbose=False
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"format onnx: torch cannot write this {type(model).__name__} as ONNX: "
            f"{shorten(str(error.__cause__ or error), 300)}. Use --format torch_export"
        ) from error
    program.model.metadata_props.update(values)
    proto = program.model_proto
    # No runtime needs the shapes between the layers. onnxruntime's `quantize_dynamic` transposes weights and then
    # refuses the file because their recorded shapes differ.
    proto.graph.ClearField("value_info")
    path.write_bytes(proto.SerializeToString())


def _read_onnx(path, model):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda features: torch.from_numpy(session.run(["logits"], {"input_values": features.numpy()})[0])


def _write_safetensors(model, features, values, path):
    save_file(model.state_dict(), path, metadata=values)


def _read_safetensors(path, model):
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(load_file(path), assign=True)
    return lambda features: copy.eval()(features).logits


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime", "onnxscript"), _write_onnx, _read_onnx),
    "torch_export": Format(".pt2", (), _write_torch_export, _read_torch_export),
    "safetensors": Format(".safetensors", (), _write_safetensors, _read_safetensors),
}


def main(arguments: Sequence[str]) -> None:
    """Read the command line, export, and print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="Folder of a finished run.")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Default: RUN/export/model.<suffix>.")
    options = parser.parse_args(arguments)
    output, difference = export_run(options.run, options.format, options.output)
    print(
        f"Written to {output} ({output.stat().st_size / 1e6:.2f} MB). On batches of "
        f"{' and '.join(map(str, BATCHES))} clips its logits differ from those of the model by at most "
        f"{difference:.1e} of the largest one (allowed: {TOLERANCE:.0e})."
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
