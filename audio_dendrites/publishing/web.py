"""Publish a model for transformers.js: as ONNX files in fp32 and int8, measured on the test clips of the run.

transformers.js computes the features and takes everything else from the graph in the ONNX file. So it also runs models
that it has no class for, and models with dendrites, if config.json names a type that it knows.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import FeatureExtractionMixin, PreTrainedConfig

from audio_dendrites.data.audio import BadClip
from audio_dendrites.data.windows import window_layout, windows
from audio_dendrites.errors import UserError
from audio_dendrites.models.finished import load_finished
from audio_dendrites.publishing.card import licence_of
from audio_dendrites.publishing.content import (
    check_finished,
    check_staged,
    read_json,
    read_reports,
    staged_files,
    write_json,
)
from audio_dendrites.publishing.formats import example_features, export_run
from audio_dendrites.publishing.hub import Target, create_repo, explained, push, with_owner
from audio_dendrites.results.inference import classify_clips
from audio_dendrites.results.listen import data_of, with_sounds
from audio_dendrites.results.runs import read_same_tests
from audio_dendrites.results.scores import score, score_names, with_predictions
from audio_dendrites.results.tables import markdown_table

AST, WAV2VEC2 = "audio-spectrogram-transformer", "wav2vec2"
# For each type of model, a type that transformers.js knows and whose features are the same.
TYPES = {
    **dict.fromkeys((AST, "mel-vit", "cnn14", "beats"), AST),
    **dict.fromkeys((WAV2VEC2, "data2vec-audio", "waveform-classifier"), WAV2VEC2),
    **{kind: kind for kind in ("hubert", "wavlm", "unispeech", "unispeech-sat")},
}
AST_RATE = 16000  # Hz; transformers.js computes spectrograms with windows of 400 samples
CODE_FIELDS = ("auto_map", "architectures", "dendrites", "_name_or_path")  # of config.json, which the graph replaces
FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}  # as transformers.js names them
MOST_CLIPS = 1000  # that are classified to measure int8
ROUNDS = 11  # of the comparison of speed


class OnnxModel:
    """An ONNX file for `classify_clips`, on the CPU.

    Args:
        path: File from `export_run`.
        config: Configuration of the model.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, config: PreTrainedConfig):
        import onnxruntime

        self.config = config
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, input_values: torch.Tensor, **_: Any) -> SimpleNamespace:
        """The output of the model, as transformers names it. The clips have one length, so a mask has no effect."""
        (logits,) = self.session.run(["logits"], {"input_values": input_values.numpy()})
        return SimpleNamespace(logits=torch.from_numpy(logits))

    def to(self, device: torch.device) -> None:
        """Stay on the CPU."""


def publish_web(run: Path, target: Target, template: Path, source: str, command: str) -> str | None:
    """Write the files for transformers.js to export/web of a finished run, and push them in one commit.

    Args:
        run: The run folder.
        target: Where to push.
        template: Jinja template of the card.
        source: Repository of the model itself, which the card names.
        command: The command that error messages show to try again.

    Returns:
        The address of the repository, or None if it had every file.

    Raises:
        UserError: See `write_web`.
        PublishError: If not everything was sent.
    """
    with explained(run, target, command):
        target = with_owner(target)
    source = source if "/" in source else f"{target.repo_id.split('/')[0]}/{source}"
    folder = write_web(run, target.repo_id, template, source)
    check_staged(folder, target.token)
    with explained(run, target, command):
        commit = push(folder, staged_files(folder), create_repo(target), "Model for transformers.js")
    return commit and f"{HfApi().endpoint}/{target.repo_id}"


def write_web(run: Path, name: str, template: Path, source: str) -> Path:
    """Write the files for transformers.js to export/web of a finished run, in place of older ones.

    Args:
        run: The run folder.
        name: Hub id of the files.
        template, source: See `publish_web`.

    Returns:
        The folder.

    Raises:
        UserError: The run is not finished, transformers.js cannot compute the features of the model, or see
            `export_run`.
    """
    check_finished(run)
    model, extractor = load_finished(run)
    config = web_config(run, model.config, extractor)
    folder = run / "export" / "web"
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".web-") as beside:
        new = Path(beside, "web")
        (new / "onnx").mkdir(parents=True)
        export_run(run, "onnx", new / FILES["fp32"])
        quantize(new / FILES["fp32"], new / FILES["int8"])
        write_json(config, new / "config.json")
        shutil.copyfile(run / "preprocessor_config.json", new / "preprocessor_config.json")
        figures = measure(run, {kind: OnnxModel(new / file, model.config) for kind, file in FILES.items()}, extractor)
        sizes = {kind: (new / file).stat().st_size / 1e6 for kind, file in FILES.items()}
        card = web_card(run, config, figures, sizes, template, name, source, extractor.sampling_rate)
        (new / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    return folder


def web_config(run: Path, config: PreTrainedConfig, extractor: FeatureExtractionMixin) -> dict[str, Any]:
    """config.json for transformers.js.

    Its type is that of the model without dendrites or, if transformers.js does not know this type, one with the same
    features. `windows` has what a program needs to cut long clips as predict.py does: the samples of a window, from
    one window to the next, and of a hop. It is None if the model takes clips of any length.

    Raises:
        UserError: transformers.js cannot compute the features of the model.
    """
    kind, rate = config.model_type.removeprefix("dendritic-"), extractor.sampling_rate
    if kind not in TYPES:
        raise UserError(f"--web: transformers.js can run models of the types {', '.join(TYPES)}, got {kind} in {run}")
    if TYPES[kind] == AST and rate != AST_RATE:
        raise UserError(
            f"--web: sampling_rate must be {AST_RATE}, for which transformers.js computes spectrograms, got {rate} in "
            f"{run}. Models that were trained with `waveform: true` may have any rate"
        )
    fields = {name: value for name, value in read_json(run / "config.json").items() if name not in CODE_FIELDS}
    layout = window_layout(extractor, config)
    hop, frames, cut = layout["hop_length"], layout["max_length"], None
    if frames < sys.maxsize:
        first, second, *_ = windows(3 * frames * hop + layout["window_length"], **layout)
        cut = {"length": first.stop, "step": second.start, "hop": hop}
    return fields | {"model_type": TYPES[kind], "windows": cut}


def quantize(path: Path, output: Path) -> None:
    """Write an ONNX file with int8 weights, by ONNX Runtime's dynamic quantization, after the steps that it advises.

    Every output channel has its own scale. The weights are unsigned: on many CPUs, ONNX Runtime adds signed ones with
    saturation, and its convolutions with signed weights are slow. The mel filters of a waveform model stay in fp32,
    because eight bits cannot hold the range of a power spectrum.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    nodes = onnx.load(path, load_external_data=False).graph.node
    front_end = [node.name for node in nodes if any(".front_end" in entry.value for entry in node.metadata_props)]
    # Without shapes, which quantization does not need. It also folds the weights of dendrites into constants.
    quant_pre_process(path, output, skip_symbolic_shape=True, skip_onnx_shape=True)
    quantize_dynamic(output, output, per_channel=True, weight_type=QuantType.QUInt8, nodes_to_exclude=front_end)


def measure(run: Path, models: dict[str, OnnxModel], extractor: FeatureExtractionMixin) -> dict[str, Any]:
    """Compare the fp32 and the int8 file on the test clips of a run.

    Returns:
        `speed`, the time of int8 as a share of the time of fp32, for one window. If the test clips are on this machine,
        also `clips`, their number; `scores` of each file; `agreement`, the share of clips with the same predicted
        class; and `difference`, the largest one of a score.
    """
    features = example_features(extractor, 1)
    figures = {"speed": time_ratio(*(lambda model=model: model(features) for model in models.values()))}
    try:
        (metrics,), (clips,) = read_same_tests([run])
        clips = clips.iloc[:: -(-len(clips) // MOST_CLIPS)]
        clips, sound = with_sounds(clips, data_of([run], None))
    except (UserError, BadClip, OSError):
        return figures  # the clips are not on this machine
    # The scale of a dynamic activation is that of the batch, and a browser has batches of one.
    answers = {kind: [*classify_clips(model, extractor, sound, batch_size=1)] for kind, model in models.items()}
    if any(answer.fault for answer in answers["fp32"]):
        return figures  # other clips than the run tested
    scores = {kind: np.stack([answer.scores for answer in found]) for kind, found in answers.items()}
    tables = {
        kind: with_predictions(clips, np.stack([answer.logits for answer in found]), metrics["labels"])
        for kind, found in answers.items()
    }
    results = {kind: score(table, metrics["labels"], metrics["loss"]) for kind, table in tables.items()}
    return figures | {
        "clips": len(clips),
        "scores": {kind: {name: found[name] for name in score_names(found)} for kind, found in results.items()},
        "agreement": float(np.mean([a == b for a, b in zip(*(t["predicted"] for t in tables.values()), strict=True)])),
        "difference": float(np.abs(scores["fp32"] - scores["int8"]).max()),
    }


def time_ratio(one: Callable[[], Any], other: Callable[[], Any]) -> float:
    """The median time of the second call as a share of that of the first. They take turns."""
    times = np.zeros((ROUNDS, 2))
    for row in times:
        for column, call in enumerate((one, other)):
            start = time.perf_counter()
            call()
            row[column] = time.perf_counter() - start
    first, second = np.median(times[1:], axis=0)  # the first round is slower
    return float(second / first)


def web_card(
    run: Path,
    config: dict[str, Any],
    figures: dict[str, Any],
    sizes: dict[str, float],
    template: Path,
    name: str,
    source: str,
    sampling_rate: int,
) -> str:
    """The README.md of the files for transformers.js.

    Args:
        run, template, name, source: See `write_web`.
        config: From `web_config`.
        figures: From `measure`.
        sizes: Megabytes of each file.
        sampling_rate: Of the model, in Hz.
    """
    metrics = read_reports(run)[0]
    rows = [["", *FILES], ["file", *(f"`{file}`" for file in FILES.values())]]
    rows.append(["MB", *(f"{size:.2f}" for size in sizes.values())])
    scores = figures.get("scores")
    rows += [[one, *(f"{scores[kind][one]:.4f}" for kind in FILES)] for one in scores["fp32"]] if scores else []
    data = ModelCardData(
        license=licence_of(metrics),
        library_name="transformers.js",
        pipeline_tag="audio-classification",
        base_model=source,
        base_model_relation="quantized",
    )
    card = ModelCard.from_template(
        data, template_path=str(template), name=name, title=name.split("/")[-1], source=source, config=config,
        dendrites=metrics.get("dendrites"), labels=metrics["labels"], table=markdown_table(rows), figures=figures,
        tested=metrics["test"]["clips"], rate=sampling_rate,
    )  # fmt: skip
    return str(card).strip() + "\n"
