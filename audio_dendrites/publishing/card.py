"""The model card of a run."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from audio_dendrites.data import synthetic
from audio_dendrites.files import written_whole
from audio_dendrites.publishing.content import FIGURES, code_files, files_named, read_reports
from audio_dendrites.results import tables
from audio_dendrites.results.dendrites import use_sentence
from audio_dendrites.results.scores import score_names

FAMILY_NAMES = {
    "audio-spectrogram-transformer": "Audio Spectrogram Transformer",
    "mel-vit": "Vision Transformer on mel spectrograms",
    "cnn14": "CNN14",
    "hubert": "HuBERT",
    "wav2vec2": "wav2vec 2.0",
    "wavlm": "WavLM",
    "whisper": "Whisper encoder",
    "beats": "BEATs",
}
HYPERPARAMETERS = (
    "learning_rate", "head_learning_rate", "layer_decay", "lr_scheduler_type", "lr_step_decay", "lr_step_start",
    "lr_step_every", "warmup_steps", "optim", "weight_decay", "num_train_epochs", "max_steps", "total_batch_size",
    "per_device_train_batch_size", "gradient_accumulation_steps", "loss", "label_smoothing_factor", "distill_from",
    "balanced_sampling", "class_weights", "average_checkpoints", "ema_decay", "early_stopping_patience",
    "unfreeze_last_layers", "lora", "precision", "seed", "channel", "max_length", "random_crop", "time_roll",
    "roll_padded", "filter_gain", "frequency_shift", "time_mask", "frequency_mask", "mask_value", "mixup_alpha",
    "augment_after_norm", "noise", "patchout_time", "patchout_frequency", "model_config", "pai",
)  # fmt: skip


def write_card(run: Path, template: Path) -> None:
    """Write README.md of a finished run from the other files of its folder."""
    with written_whole(run / "README.md") as path:
        path.write_text(run_card(run, str(run), template), encoding="utf-8")


def run_card(run: Path, name: str, template: Path, other: str | None = None, revision: str | None = None) -> str:
    """The README.md of a finished run; see `model_card` for the arguments."""
    metrics, recipe, comparison = read_reports(run)
    files = {path.name for path in files_named(run, (*FIGURES, *code_files(run)))}
    return model_card(metrics, recipe, template, name, files, comparison, other, revision)


def model_card(
    metrics: Mapping[str, Any],
    recipe: Mapping[str, Any],
    template: Path,
    name: str,
    files: set[str],
    comparison: Mapping[str, Any] | None = None,
    other: str | None = None,
    revision: str | None = None,
) -> str:
    """Render README.md. Sections without measurements are left out.

    Args:
        metrics: metrics.json. Those of a running training have `running` instead of `test`.
        recipe: config.yaml.
        template: Jinja template.
        name: The name that `pipeline` loads: a Hub id, or the run folder.
        files: Names of the files beside the card.
        comparison: comparison.json.
        other: Hub id of the checkpoint that this one is compared with.
        revision: Commit that the example pins.
    """
    local = metrics.get("local", [])
    dataset = None if metrics["dataset"] == "synthetic" or "dataset" in local else metrics["dataset"]
    base_model = None if "base_model" in local else metrics["base_model"]
    dendrites, test = metrics.get("dendrites"), metrics.get("test")
    code = sorted(file for file in files if file.endswith(".py"))
    urbansound8k = learned_from_urbansound8k(metrics)
    grown = any(dendrites["layers"].values()) if dendrites else False
    architecture = metrics.get("architecture", "audio-spectrogram-transformer")
    data = ModelCardData(
        license=licence_of(metrics),
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["audio-classification", architecture] + ["dendrites", "perforatedai"] * grown,
        base_model=base_model,
        datasets=None if dataset is None else [dataset],
        metrics=["accuracy", "f1"] if not test or "accuracy" in test else None,
        model_name=Path(name).name if test else None,  # belongs to the results
        eval_results=_eval_results(metrics, recipe, "UrbanSound8K" if urbansound8k else metrics["dataset"]),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        **{"test": None, "running": None} | dict(metrics),
        code=code,
        name=name,
        title=Path(name).name,
        files=files,
        dataset_id=dataset,
        base_model_id=base_model,
        remote_code=bool(code),
        urbansound8k=urbansound8k,
        dendritic=dendrites,
        grown=grown,
        family=FAMILY_NAMES.get(architecture, architecture),
        recipe=recipe,
        results=tables.scores_table(metrics),
        classes=tables.classes_table(test) if test else None,
        left_out=tables.skipped_list(metrics["skipped"]) if metrics.get("skipped") else None,
        comparison=comparison,
        beside=comparison and f"{tables.sides_table(comparison)}\n\n{tables.differences_table(comparison)}",
        other=other,
        revision=revision,
        hyperparameters={
            field: recipe[field]
            for field in HYPERPARAMETERS
            if recipe.get(field) not in (None, False, 0) and ("lr_step_decay" in recipe or "lr_step" not in field)
        },
        duration=_duration(metrics["train_runtime"]) if "train_runtime" in metrics else None,
        command_line=shlex.join(metrics["command"]) if "command" in metrics else None,
        growth=_growth(dendrites),
        use=use_sentence(dendrites),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"


def learned_from_urbansound8k(metrics: Mapping[str, Any]) -> bool:
    """Whether a model learned from UrbanSound8K, to judge by the name of its data set or by its classes."""
    return metrics["dataset"] != "synthetic" and (
        "urbansound8k" in metrics["dataset"].lower() or set(metrics["labels"]) == set(synthetic.LABELS)
    )


def licence_of(metrics: Mapping[str, Any]) -> str | None:
    """The licence of a model, if its data have one that this project knows."""
    if learned_from_urbansound8k(metrics):
        return "cc-by-nc-4.0"
    return "apache-2.0" if metrics["dataset"] == "synthetic" and metrics["base_model"] is None else None


def _eval_results(metrics: Mapping[str, Any], recipe: Mapping[str, Any], dataset_name: str) -> list[EvalResult] | None:
    """The `model-index`: the scores of the test folds."""
    if (test := metrics.get("test")) is None:
        return None
    return [
        EvalResult(
            task_type="audio-classification",
            task_name="Audio classification",
            dataset_type=metrics["dataset"],
            dataset_name=dataset_name,
            dataset_split=recipe.get("dataset_split") or recipe["test_split"],
            dataset_revision=None if "dataset" in metrics.get("local", []) else recipe.get("dataset_revision"),
            dataset_args={"test_folds": test["folds"], "cross_validation": False},
            metric_type=kind,
            metric_name=metric_name,
            metric_value=test[key],
            metric_args=arguments,
        )
        for key, kind, metric_name, arguments in (
            ("accuracy", "accuracy", "Accuracy", None),
            ("macro_f1", "f1", "Macro F1", {"average": "macro"}),
            ("mAP", "mAP", "Mean average precision", {"average": "macro"}),
            ("AUC", "roc_auc", "Area under the ROC curve", {"average": "macro"}),
        )
        if key in score_names(test)
    ]


def _growth(dendrites: Mapping[str, Any] | None) -> str | None:
    if not dendrites or not dendrites["growth"]:
        return None
    rows = [["event", "step", "validation metric", "dendrites a layer", "parameters"]]
    for event in dendrites["growth"]:
        metric = "" if event["metric"] is None else f"{event['metric']:.4f}"  # early growth needs no metric
        rows.append([event["event"], event["step"], metric, event["dendrites"], f"{event['parameters']:,}"])
    return tables.markdown_table(rows)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
