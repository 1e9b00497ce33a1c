"""A finished run as one file for other runtimes, checked against the model it comes from.

    python -m audio_dendrites.publishing.formats RUN --format onnx|torch_export|safetensors [--output FILE]

onnx: for ONNX Runtime and what else reads ONNX. torch_export: for `torch.export.load`, with torch alone. Both take
`input_values` as the run's feature extractor makes them, any number of clips, and give `logits`. safetensors: the
weights alone, under the names of the model's `state_dict`. Each file carries what a reader without transformers needs,
as JSON by name: `labels` in the order of the logits, `sampling_rate`, `preprocessor_config` (the feature settings) and
`config`.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, FeatureExtractionMixin, PreTrainedModel

import audio_dendrites.models  # noqa: F401  so that transformers knows them, without the code in the run folder
from audio_dendrites.files import written_whole
from audio_dendrites.publishing.export import ExportError

TOLERANCE = 1e-5  # largest difference of a logit, as a share of the batch's largest logit
BATCHES = (1, 4)  # clips that are compared; traced with another number, so that a fixed one would show
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: a protobuf message ends at 2 GiB, and the graph needs some of it
Logits = Callable[[torch.Tensor], torch.Tensor]


class Format(NamedTuple):
    """How a format is written and read back.

    Attributes:
        suffix: Of its files.
        packages: Needed beside those of the project.
        write: Model, features (clips, frames, mel bands) of several clips, metadata, path.
        read: Path and the model written to it; gives what computes logits from the file.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[PreTrainedModel, torch.Tensor, dict[str, str], Path], None]
    read: Callable[[Path, PreTrainedModel], Logits]


def export_run(run: Path, format: str, output: Path | None = None) -> tuple[Path, float]:
    """Write a run's model in another format.

    Args:
        run: A finished run's folder, or any other that `from_pretrained` reads.
        format: A key of `FORMATS`.
        output: The file; left out, export/model with the format's suffix in the run folder.

    Returns:
        The file, and the largest difference between its logits and the model's, relative to the largest logit.

    Raises:
        ExportError: The folder holds no whole model, a package is missing, or the file's logits are not the model's; an
            older file then stays as it was.
    """
    kind = FORMATS[format]
    if missing := [package for package in kind.packages if find_spec(package) is None]:
        raise ExportError(f"format {format} needs {', '.join(missing)}: pip install {' '.join(kind.packages)}")
    output = output or run / "export" / f"model{kind.suffix}"
    if output.suffix != kind.suffix:
        raise ExportError(f"output: found {output}, wanted a file that ends in {kind.suffix}")
    if output.parent.resolve() == run.resolve() and output.name == "model.safetensors":
        raise ExportError(f"output: {output} holds the weights of the run itself; choose another file")
    model, extractor = load_run(run)
    features = example_features(extractor, max(BATCHES))
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as beside:
        kind.write(model, features[:2], metadata(run, model, extractor), beside)
        difference = check_parity(model, kind.read(beside, model), features)
    return output, difference


def load_run(folder: Path) -> tuple[PreTrainedModel, FeatureExtractionMixin]:
    """The model, float32, in evaluation mode, on the CPU, and its feature extractor.

    A dendritic model is loaded by the package's own class: no code of the folder is run.

    Raises:
        ExportError: There is none, or its weights are not those of its configuration.
    """
    if missing := [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]:
        raise ExportError(f"{folder} has no {' and no '.join(missing)}: wanted the folder of a finished run")
    try:
        model, loading = AutoModelForAudioClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ExportError(f"{folder}: {' '.join(str(error).split())}") from error
    if wrong := sorted(set(loading["missing_keys"]) | set(loading["unexpected_keys"])):
        raise ExportError(
            f"{folder}: the weights are not those of config.json, they differ in {', '.join(wrong[:3])} ({len(wrong)} "
            f"tensors): wanted a finished run; a checkpoint of a model that is growing dendrites is none"
        )
    return model.eval(), extractor


def example_features(extractor: FeatureExtractionMixin, clips: int) -> torch.Tensor:
    """Features of real size: the extractor's of 11 s of tones in noise, each clip at another pitch and level.

    Args:
        extractor: The run's.
        clips: How many.

    Returns:
        (clips, …) as the model takes them, float32; the same at every call.
    """
    random, time = np.random.default_rng(0), np.arange(11 * extractor.sampling_rate) / extractor.sampling_rate
    waveforms = [
        (0.5 ** (clip + 1) * (np.sin(2 * np.pi * 220 * 1.5**clip * time) + random.normal(0, 0.3, len(time)))) / 1.5
        for clip in range(clips)
    ]
    features = extractor(
        [waveform.astype(np.float32) for waveform in waveforms],
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
    )
    return features["input_values"].float()


def metadata(run: Path, model: PreTrainedModel, extractor: FeatureExtractionMixin) -> dict[str, str]:
    """What a file carries beside the weights: JSON by name."""
    values = {"labels": [model.config.id2label[i] for i in range(model.config.num_labels)]}
    values["sampling_rate"] = extractor.sampling_rate
    for name in ("preprocessor_config", "config"):
        values[name] = json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
        values[name].pop("_name_or_path", None)  # a path of this machine
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


@torch.no_grad()
def check_parity(model: PreTrainedModel, logits: Logits, features: torch.Tensor) -> float:
    """Compare the logits of a file with the model's.

    Args:
        model: The model, in evaluation mode.
        logits: Computes them from the file.
        features: At least as many clips as the largest of `BATCHES`.

    Returns:
        The largest difference, relative to the batch's largest logit.

    Raises:
        ExportError: It is above `TOLERANCE`, or not a number.
    """
    worst = 0.0
    for clips in BATCHES:
        expected, found = model(features[:clips]).logits, logits(features[:clips])
        if found.shape != expected.shape:
            raise ExportError(f"the file gives logits of shape {tuple(found.shape)}, the model {tuple(expected.shape)}")
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the file's logits differ from the model's by {difference:.1e} of the largest one, wanted at most "
                f"{TOLERANCE:.0e}; no file is left"
            )
        worst = max(worst, difference)
    return worst


class _Logits(nn.Module):
    """A model whose output is a tensor, so that a traced file needs none of transformers' classes."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return self.model(input_values).logits


def _traced(model: PreTrainedModel, features: torch.Tensor) -> torch.export.ExportedProgram:
    batch = {"input_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(_Logits(model).eval(), (), {"input_values": features}, dynamic_shapes=batch)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine, which both formats would keep
    return program


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
        raise ExportError(
            f"format onnx: the weights are {size / 1e9:.2f} GB, one ONNX file holds {LARGEST_ONNX / 1e9:.2f}; use "
            f"--format torch_export"
        )
    program = torch.onnx.export(
        _traced(model, features),
        output_names=["logits"],
        dynamic_shapes={"input_values": {0: "batch"}},
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(values)
    program.save(path, external_data=False)


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
    """Export, and say where to and how closely."""
    parser = argparse.ArgumentParser(
        prog="python -m audio_dendrites.publishing.formats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="Folder of a finished run.")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Default: RUN/export/model.<suffix>.")
    options = parser.parse_args(arguments)
    output, difference = export_run(options.run, options.format, options.output)
    print(
        f"Written to {output} ({output.stat().st_size / 1e6:.2f} MB). On batches of "
        f"{' and '.join(map(str, BATCHES))} clips its logits differ from the model's by at most {difference:.1e} of "
        f"the largest one (allowed: {TOLERANCE:.0e})."
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's exporters warn of what is theirs
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        main(sys.argv[1:])
    except (ExportError, OSError) as error:
        sys.exit(f"error: {error}")
