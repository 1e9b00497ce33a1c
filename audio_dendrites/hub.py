"""Publishing a run: its model card, what of its folder may leave the machine, and the push to the Hub.

What is sent is named here file by file, paths of this machine are taken out of its text, and `check_outgoing` reads
every byte before the first one leaves.
"""

import json
import logging
import os
import re
import shlex
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import httpx2
import pandas
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from pandas import DataFrame
from transformers import TrainingArguments
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.trainer_utils import HubStrategy

from audio_dendrites import synth
from audio_dendrites.config import SCORES, RecipeError, written_whole
from audio_dendrites.data import WEIGHT_FILES, is_local
from audio_dendrites.report import classes_table, is_finished, markdown_table, score_names, scores_table

logger = logging.getLogger(__name__)

MODEL_FILES = (*WEIGHT_FILES, "config.json", "preprocessor_config.json")
REPORT_FILES = (
    "config.yaml",
    "metrics.json",
    "predictions.parquet",
    "confusion_matrix.png",
    "average_precision.png",
    "learning_curves.png",
    "dendrites.png",
    "comparison.json",
    "comparison.md",
    "comparison.png",
)
# What resumes a training, and is sent by the strategy `checkpoint` alone: the .pt and .pth files are pickles.
CHECKPOINT_FILES = (
    *MODEL_FILES,
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "pai_state.json",
    "pai_best.safetensors",
)
BEST_FILES = (*MODEL_FILES, "trainer_state.json", "pai_state.json")  # what ends a training with its best weights
LAST_CHECKPOINT, BEST_CHECKPOINT = "last-checkpoint", "best-checkpoint"  # folders of a repository
CARD_COMMIT = "Model card"

TEXT = {".json", ".md", ".py", ".yaml"}
LFS = {".parquet", ".pt", ".pth", ".safetensors", ".png"}

# The folders of a path that begins at the root, at home or at another folder of this machine; not those of an address.
LOCAL_FOLDERS = re.compile(
    r"""(?<![\w:/.\\-])(?:~\w*|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s"'`=:,;(){}\[\]/\\]+[/\\])*(?=\w)"""
)
LOCAL_PATH = re.compile(r"(?:~\w*|\.{1,2}|[A-Za-z]:)?[/\\][^:\n]*")
SECRET_NAME = re.compile("TOKEN(?!IZER)|KEY|SECRET|PASSW", re.IGNORECASE)

HOME_FOLDER = rb"(?<![\w.:/-])(?:/[\w.-]+)*/(?:home/[\w.-]+|Users/[\w.-]+|root)/|[A-Za-z]:\\+Users\\+"
FIELDS = {"base_model": "model", "teacher": "distill_from"}  # of a recipe, by what metrics.json calls their values
PIECE, OVERLAP = 1 << 24, 1 << 12  # bytes; nothing that is looked for is longer than the overlap

BUSY = {408, 429, 500, 502, 503, 504}
FULL = re.compile("quota|storage|limit|exceed|payment", re.IGNORECASE)

FAMILY_NAMES = {
    "audio-spectrogram-transformer": "Audio Spectrogram Transformer",
    "mel-vit": "Vision Transformer on mel spectrograms",
    "cnn14": "CNN14",
}
HYPERPARAMETERS = (
    "learning_rate", "head_learning_rate", "layer_decay", "lr_scheduler_type", "warmup_steps", "optim",
    "weight_decay", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "loss", "label_smoothing_factor", "distill_from", "balanced_sampling", "average_checkpoints", "ema_decay",
    "early_stopping_patience", "unfreeze_last_layers", "precision", "seed", "max_length", "random_crop", "time_roll",
    "filter_gain", "frequency_shift", "time_mask", "frequency_mask", "mixup_alpha", "noise", "patchout_time",
    "patchout_frequency", "model_config", "pai",
)  # fmt: skip


class PublishError(RuntimeError):
    """A run was not published; the message says why, and what to do."""


# What may leave the machine


def outgoing(run: Path) -> dict[str, Path | bytes]:
    """What is sent of a finished run, its card left out: files as they are, or content without paths of this machine.

    Raises:
        PublishError: The run is not finished, or its folder holds no model.
    """
    if not is_finished(run):
        raise PublishError(
            f"{run} has no metrics.json: it is no run folder, or its run has not finished; the same train.py command "
            f"goes on with it, and push_to_hub: true publishes while it trains"
        )
    metrics, recipe, comparison = read_reports(run)
    files = model_files(run) | {path.name: path for path in _named(run, REPORT_FILES)}
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        if name not in files:
            raise PublishError(f"{run} has no {name}: it is not whole; train again")
    files["metrics.json"] = _json(metrics)
    files["config.yaml"] = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    if comparison is not None:
        files["comparison.json"] = _json(comparison)
    if "comparison.md" in files:
        files["comparison.md"] = without_paths((run / "comparison.md").read_text(encoding="utf-8")).encode()
    if "predictions.parquet" in files:
        files["predictions.parquet"] = _table_without_paths(run / "predictions.parquet")
    return dict(sorted(files.items()))


def model_files(folder: Path) -> dict[str, Path | bytes]:
    """Weights, configuration, feature extractor and, of a dendritic model, its code."""
    return {path.name: path for path in _named(folder, (*MODEL_FILES, *code_files(folder)))}


def checkpoint_files(last: Path, best: Path | None, folder: Path) -> dict[str, Path | bytes]:
    """What resumes a training from its last checkpoint and ends it with its best, without paths of this machine.

    Args:
        last: The last checkpoint.
        best: The best one so far, if one is known.
        folder: Where the files are kept, as links where the disk can, so that the training may delete its own.
    """
    files: dict[str, Path | bytes] = {}
    for name, checkpoint, patterns in (
        (LAST_CHECKPOINT, last, CHECKPOINT_FILES),
        (BEST_CHECKPOINT, best, BEST_FILES),
    ):
        if checkpoint is None or (name == BEST_CHECKPOINT and best == last):
            continue
        (folder / name).mkdir()
        for path in _named(checkpoint, patterns):
            files[f"{name}/{path.name}"] = _kept(path, folder / name / path.name)
        files[f"{name}/trainer_state.json"] = _json(without_paths(_read_json(checkpoint / "trainer_state.json")))
    return files


def code_files(folder: Path) -> list[str]:
    """The Python files that `trust_remote_code` runs: those the configurations name, and those they import."""
    found = set()
    for path in _named(folder, ("config.json", "preprocessor_config.json")):
        for name in _read_json(path).get("auto_map", {}).values():
            module = folder / f"{name.split('--')[-1].split('.')[0]}.py"
            found |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
    return sorted(found)


def read_reports(run: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """metrics.json, config.yaml and, if there is one, comparison.json, without paths of this machine."""
    metrics = _read_json(run / "metrics.json")
    metrics.setdefault("local", [name for name in ("dataset", "base_model") if is_local(metrics[name])])
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    comparison = _read_json(run / "comparison.json") if (run / "comparison.json").is_file() else None
    metrics, recipe = without_paths_of(metrics, recipe)
    return metrics, recipe, comparison and without_paths(comparison | {"dataset": metrics["dataset"]})


def without_paths_of(metrics: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and recipe of a run without paths of this machine; a local data set or model is its name alone."""
    names = {name: Path(metrics[name]).name for name in metrics["local"]}
    fields = {FIELDS.get(name, name): value for name, value in names.items()}
    return without_paths(metrics | names), without_paths(recipe | fields)


def without_paths(value: Any) -> Any:
    """A value as JSON and YAML have them, where the paths of this machine are only their last part."""
    if isinstance(value, dict):
        return {name: without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    option, equals, rest = value.partition("=") if value.startswith("--") else ("", "", value)
    if LOCAL_PATH.fullmatch(rest):
        return option + equals + re.split(r"[/\\]", rest.rstrip("/\\"))[-1]
    return option + equals + LOCAL_FOLDERS.sub("", rest)


def check_outgoing(files: Mapping[str, Path | bytes], token: str | None = None) -> None:
    """Look into every byte for what must not leave the machine: tokens, secrets of the environment, user, host.

    Raises:
        PublishError: Something was found; the message says what and where, but not its value.
    """
    anywhere, in_text = _forbidden(token)
    for name, content in files.items():
        is_table, is_text = Path(name).suffix == ".parquet", Path(name).suffix in TEXT
        patterns = anywhere | in_text if is_table or is_text else anywhere
        for piece in chain(_pieces(content), [_table_text(content)] if is_table else []):
            for what, pattern in patterns.items():
                if re.search(pattern, piece):
                    raise PublishError(f"{name} holds {what}; nothing was sent. Take it out, and publish again")


def _forbidden(token: str | None) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Patterns by what they are: those that no file may hold, and those that no text may hold.

    A user's or host's name may be any word, so they count only where nothing else is meant.
    """
    anywhere = {"what looks like a token of the Hub": rb"hf_[A-Za-z0-9]{20,}"}
    for used in filter(None, (token, get_token())):
        anywhere["the token of the Hub"] = re.escape(used.encode())
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            anywhere[f"the value of the environment variable {name}"] = re.escape(value.encode())
    home = str(Path.home())
    if len(home) > 1:
        anywhere["a path in the home folder of this user"] = re.escape(home.encode()) + rb"[/\\]"
    in_text = {"a path in a home folder": HOME_FOLDER}
    host = socket.gethostname().split(".")[0]
    if len(host) >= 8 or (len(host) >= 4 and not host.isalpha()):
        in_text["the name of this machine"] = rb"(?<![\w-])" + re.escape(host.encode()) + rb"(?![\w-])"
    return anywhere, in_text


def _kept(path: Path, kept: Path) -> Path:
    try:
        os.link(path, kept)
    except OSError:  # the file system has no links
        shutil.copyfile(path, kept)
    return kept


def _named(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _table_without_paths(path: Path) -> Path | bytes:
    """A table as it is or, where its text holds paths of this machine, a copy without them."""
    table = pandas.read_parquet(path)
    cleaned = _texts(table).map(without_paths)
    if cleaned.equals(_texts(table)):
        return path
    return table.assign(**cleaned).to_parquet(index=False)


def _table_text(content: Path | bytes) -> bytes:
    """The text of a table, which its file holds compressed."""
    table = pandas.read_parquet(BytesIO(content) if isinstance(content, bytes) else content)
    return "\n".join(map(str, chain(table.columns, _texts(table).to_numpy().ravel()))).encode()


def _texts(table: DataFrame) -> DataFrame:
    return table.select_dtypes(include=["object", "string"]).drop(columns="logits", errors="ignore")


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    """Content in pieces that overlap, short enough for a training to go on between two of them."""
    with BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        before = b""
        while piece := file.read(PIECE):
            yield before + piece
            before = piece[-OVERLAP:]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# The model card


def write_card(run: Path, template: Path) -> None:
    """README.md of a finished run's folder, from what the folder holds."""
    with written_whole(run / "README.md") as path:
        path.write_bytes(run_card(run, str(run), template, files_of(run)))


def run_card(
    run: Path,
    name: str,
    template: Path,
    files: Iterable[str],
    other: str | None = None,
    revision: str | None = None,
) -> bytes:
    """README.md of a finished run; beside the run the arguments are those of `model_card`."""
    metrics, recipe, comparison = read_reports(run)
    return model_card(metrics, recipe, template, name, {*files}, comparison, other, revision).encode()


def files_of(run: Path) -> set[str]:
    """Names of what a finished run's folder holds and may be published."""
    return {path.name for path in _named(run, (*MODEL_FILES, *REPORT_FILES, *code_files(run)))}


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
    """README.md: what was measured, by a Jinja template; what was not measured is left out.

    Args:
        metrics: As in metrics.json; of a running training without `test`, and with `running`.
        recipe: As in config.yaml.
        template: Jinja template.
        name: What `pipeline` loads: a Hub id, or the run folder.
        files: Names of the files beside the card.
        comparison: As in comparison.json.
        other: Hub id of the checkpoint that this one is compared with.
        revision: Commit that the example pins.
    """
    local = metrics.get("local", [])
    dataset = None if metrics["dataset"] == "synthetic" or "dataset" in local else metrics["dataset"]
    base_model = None if "base_model" in local else metrics["base_model"]
    dendrites = metrics.get("dendrites")
    remote_code = any(file.endswith(".py") for file in files)
    urbansound8k = metrics["dataset"] != "synthetic" and (
        "urbansound8k" in metrics["dataset"].lower() or set(metrics["labels"]) == set(synth.LABELS)
    )
    is_synthetic = metrics["dataset"] == "synthetic" and metrics["base_model"] is None
    grown = any(dendrites["layers"].values()) if dendrites else False
    architecture = metrics.get("architecture", "audio-spectrogram-transformer")
    data = ModelCardData(
        license="cc-by-nc-4.0" if urbansound8k else "apache-2.0" if is_synthetic else None,
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["audio-classification", architecture] + ["dendrites", "perforatedai"] * grown,
        base_model=base_model,
        datasets=None if dataset is None else [dataset],
        metrics=["accuracy", "f1"] if not metrics.get("test") or "accuracy" in metrics["test"] else None,
        model_name=Path(name).name if metrics.get("test") else None,  # belongs to the results
        eval_results=_eval_results(metrics, recipe, "UrbanSound8K" if urbansound8k else metrics["dataset"]),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(template),
        **{"test": None, "running": None} | dict(metrics),
        code=sorted(file for file in files if file.endswith(".py")),
        name=name,
        title=Path(name).name,
        files=files,
        dataset_id=dataset,
        base_model_id=base_model,
        remote_code=remote_code,
        urbansound8k=urbansound8k,
        dendritic=dendrites,
        grown=grown,
        family=FAMILY_NAMES.get(architecture, architecture),
        recipe=recipe,
        results=scores_table(metrics),
        classes=classes_table(metrics["test"]) if metrics.get("test") else None,
        beside=_beside(comparison),
        comparison=comparison,
        other=other,
        revision=revision,
        hyperparameters={
            field: recipe[field] for field in HYPERPARAMETERS if recipe.get(field) not in (None, False, 0)
        },
        duration=_duration(metrics["train_runtime"]) if "train_runtime" in metrics else None,
        command_line=shlex.join(metrics["command"]) if "command" in metrics else None,
        growth=_growth(dendrites),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"


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
        )
        if key in score_names(test)
    ]


def _beside(comparison: Mapping[str, Any] | None) -> str | None:
    if comparison is None:
        return None
    sides = [comparison["baseline"], comparison["dendritic"]]
    rows = [["", "baseline", "dendritic"]]
    rows += [
        [label, *(write(side[key]) for side in sides)]
        for label, key, write in (
            *((name, name, "{:.4f}".format) for name in SCORES),
            ("parameters", "parameters", "{:,.0f}".format),
            ("steps", "steps", lambda steps: " ".join(map(str, steps))),
            ("seconds a step", "seconds_a_step", "{:.4f}".format),
        )
        if all(side.get(key) is not None for side in sides)
    ]
    return markdown_table(rows)


def _growth(dendrites: Mapping[str, Any] | None) -> str | None:
    if not dendrites or not dendrites["growth"]:
        return None
    rows = [
        [entry["event"], entry["step"], f"{entry['metric']:.4f}", entry["dendrites"], f"{entry['parameters']:,}"]
        for entry in dendrites["growth"]
    ]
    return markdown_table([["event", "step", "validation metric", "dendrites a layer", "parameters"], *rows])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# The push


def publish(
    run: Path,
    repo_id: str,
    template: Path,
    other: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    command: str | None = None,
) -> str | None:
    """Push a finished run: weights, figures and code, then the card, which pins that commit where code is run.

    Args:
        run: The run folder; it is only read.
        repo_id: owner/name; without an owner the token's.
        template: Jinja template of the card.
        other: Hub id of the checkpoint that the run is compared with, if it is published too.
        private: Whether a repository that does not exist yet is private; none leaves it to the Hub.
        revision: Branch to push to, made if it is missing.
        token: Left out: that of `hf auth login` or HF_TOKEN.
        command: What a failure says to try again with; left out: publish.py with this run.

    Returns:
        The address of the repository, or None if the Hub had everything.

    Raises:
        PublishError: Nothing or not everything was sent; the folder is as it was, and the same call tries again.
    """
    files = outgoing(run)
    check_outgoing({"README.md": run_card(run, repo_id, template, files, other)} | files, token)
    with _explained(run, repo_id, private, revision, command):
        repo_id = create_repo(repo_id, private, revision, token)
        other = other and (other if "/" in other else f"{repo_id.split('/')[0]}/{other}")
        if not code_files(run):
            card = run_card(run, repo_id, template, files, other)
            commit = push({"README.md": card} | files, repo_id, "Model, figures and card", revision, token)
        else:
            sent = push(files, repo_id, "Model, code and figures", revision, token)
            commits = _patiently(HfApi(token=token).list_repo_commits, repo_id, revision=revision)
            pinned = next(commit.commit_id for commit in commits if commit.title != CARD_COMMIT)
            card = run_card(run, repo_id, template, files, other, pinned)
            commit = push({"README.md": card}, repo_id, CARD_COMMIT, revision, token) or sent
    return commit and f"{HfApi().endpoint}/{repo_id}"


def publish_finished(args: TrainingArguments, template: Path, other: str | None = None) -> None:
    """Push a run when its training has ended, if the recipe asks for it; a failure is said and raises nothing.

    Args:
        args: The training's.
        template: Jinja template of the card.
        other: Hub id of the checkpoint that the run is compared with.
    """
    if not args.push_to_hub or args.process_index > 0:
        return
    try:
        address = publish(
            Path(args.output_dir),
            args.hub_model_id,
            template,
            other,
            is_private(args),
            args.hub_revision,
            args.hub_token,
        )
    except PublishError as error:
        logger.warning("%s", error)
    else:
        logger.info("%s", f"Published: {address}" if address else f"{args.hub_model_id}: the Hub has everything.")


def ask(args: TrainingArguments) -> None:
    """Make the repository of a training that begins; a failure is said and raises nothing."""
    if args.hub_strategy == HubStrategy.CHECKPOINT:
        logger.info(
            "hub_strategy checkpoint also sends what resumes the training, and its optimizer.pt, scheduler.pt and "
            "rng_state.pth are pickles: a new repository is %s.",
            "private, unless hub_private_repo is false" if is_private(args) else "public, as hub_private_repo says",
        )
    try:
        with _explained(Path(args.output_dir), args.hub_model_id, is_private(args), args.hub_revision):
            create_repo(args.hub_model_id, is_private(args), args.hub_revision, args.hub_token)
    except PublishError as error:
        logger.warning("%s", error)


def push_checkpoint(args: TrainingArguments, files: Mapping[str, Path | bytes], message: str) -> None:
    """Push what a running training has; a failure is said and raises nothing."""
    repo_id, private, revision, token = args.hub_model_id, is_private(args), args.hub_revision, args.hub_token
    try:
        check_outgoing(files, token)
        with _explained(Path(args.output_dir), repo_id, private, revision):
            push(files, create_repo(repo_id, private, revision, token), message, revision, token)
    except PublishError as error:
        logger.warning("%s", error)


def is_private(args: TrainingArguments) -> bool | None:
    """As the recipe says; where it says nothing, a repository that gets pickles is private."""
    is_checkpoint = args.hub_strategy == HubStrategy.CHECKPOINT
    return True if args.hub_private_repo is None and is_checkpoint else args.hub_private_repo


def create_repo(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Make a repository for a model, and a branch, where they do not exist yet; gives the id with its owner."""
    if token is None and get_token() is None:
        raise LocalTokenNotFoundError
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{_patiently(api.whoami)['name']}/{repo_id}"
    _patiently(api.create_repo, repo_id, private=private, exist_ok=True)
    if revision is not None:
        _patiently(api.create_branch, repo_id, branch=revision, exist_ok=True)
    return repo_id


def push(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    message: str,
    revision: str | None = None,
    token: str | None = None,
) -> str | None:
    """One commit with what the Hub lacks of the files, and without checkpoints that are not among them.

    Returns:
        The commit id, or None if there was nothing to send.
    """
    api = HfApi(token=token)
    before = _patiently(api.model_info, repo_id, revision=revision)
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    there = [
        file.rfilename for file in before.siblings if file.rfilename.startswith((LAST_CHECKPOINT, BEST_CHECKPOINT))
    ]
    stale = [CommitOperationDelete(path) for path in there if path not in files and "config.json" in files]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        # Tries again by itself, but where the connection is lost its threads close each other's client: so one thread.
        api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False, num_threads=1)
        commit = _patiently(api.create_commit, repo_id, [*additions, *stale], commit_message=message, revision=revision)
    return None if commit.oid == before.sha else commit.oid


def fetch_checkpoint(repo_id: str, output_dir: Path, token: str | None = None, is_first: bool = True) -> Path:
    """Fetch the last checkpoint of a training, and its best one, from the Hub into a run folder.

    Args:
        repo_id: owner/name.
        output_dir: The run folder.
        token: Left out: that of `hf auth login` or HF_TOKEN.
        is_first: Whether this process writes into the run folder, or only finds out what another has written.

    Returns:
        The folder of the last one, output_dir/checkpoint-<step>.

    Raises:
        RecipeError: There is no such repository, or none of its checkpoints.
    """
    try:
        patterns = [f"{LAST_CHECKPOINT}/*", f"{BEST_CHECKPOINT}/*"]
        snapshot = Path(snapshot_download(repo_id, allow_patterns=patterns, token=token, max_workers=1))  # as in `push`
    except (HfHubHTTPError, httpx2.HTTPError, HFValidationError, OSError) as error:
        raise RecipeError(
            f"resume_from_checkpoint: {repo_id} is no folder, and not to be had from the Hub: {reason(error)}"
        ) from error
    if not (snapshot / LAST_CHECKPOINT / "trainer_state.json").is_file():
        raise RecipeError(
            f"resume_from_checkpoint: {repo_id} has no {LAST_CHECKPOINT}/ on the Hub; hub_strategy: checkpoint puts it "
            f"there, and it goes when the training has ended"
        )
    state = _read_json(snapshot / LAST_CHECKPOINT / "trainer_state.json")
    last, best = (output_dir / f"checkpoint-{state[step] or 0}" for step in ("global_step", "best_global_step"))
    if is_first and (snapshot / BEST_CHECKPOINT).is_dir() and best != last:
        _copy_checkpoint(snapshot / BEST_CHECKPOINT, best, best)
    if is_first:
        _copy_checkpoint(snapshot / LAST_CHECKPOINT, last, best)
    return last


def _copy_checkpoint(source: Path, target: Path, best: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetched-") as beside:
        copied = shutil.copytree(source, Path(beside, target.name))
        state = _read_json(copied / "trainer_state.json")
        if state["best_model_checkpoint"] is not None:
            state["best_model_checkpoint"] = str(best)
        (copied / "trainer_state.json").write_bytes(_json(state))
        if target.exists():
            shutil.rmtree(target)
        os.replace(copied, target)


def reason(error: BaseException) -> str:
    """What went wrong with the Hub, in words of one line."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's "Error while uploading"
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return f"{error} Wanted owner/name"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, " ".join((error.server_message or "").split())
        what = {
            400: "the Hub does not accept it",
            401: "the Hub does not know the token, or not this repository; log in again with `hf auth login`",
            402: "the storage of the account is full",
            403: "the storage of the account is full" if FULL.search(said) else "the token may not write there",
            404: "there is no such repository, or the token may not see it",
            409: "the name is taken",
            413: "the storage of the account is full",
            429: "the Hub answers no more requests for now",
            507: "the Hub has no room left",
        }.get(status, "the Hub is out of order" if status >= 500 else "the Hub refuses")
        return f"{what} ({status}{f': {said}' if said else ''})"
    if isinstance(error, httpx2.HTTPError):
        return f"the connection to the Hub was lost, or there is none ({type(error).__name__}: {error})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return str(error)


@contextmanager
def _explained(
    run: Path, repo_id: str, private: bool | None, revision: str | None, command: str | None = None
) -> Iterator[None]:
    """Turn whatever the client raises into what happened and the command that tries again."""
    try:
        yield
    except PublishError:
        raise
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        options = f" --revision {revision}" * (revision is not None) + " --private" * bool(private)
        command = command or f"python publish.py {shlex.quote(str(run))} --repo_id {repo_id}{options}"
        next_step = (
            f"The folder is as it was; this tries again and sends what is missing: {command}"
            if is_finished(run)
            else f"The training goes on and its next push tries again; when it has ended, so does: {command}"
        )
        raise PublishError(f"{run} was not published as {repo_id}: {reason(error)}. {next_step}") from error


def _patiently(call: Callable, *args, **options) -> Any:
    """A call of the client that it does not repeat by itself, again where the Hub was busy or the connection lost."""
    for seconds in (1, 2, 4, 8, None):
        try:
            return call(*args, **options)
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY or seconds is None:
                raise
            asked = error.response.headers.get("Retry-After", "")
            seconds, problem = int(asked) if asked.isdigit() else seconds, reason(error)
        except httpx2.TransportError as error:
            if seconds is None:
                raise
            problem = reason(error)
        logger.warning("%s; trying again in %d s.", problem[0].upper() + problem[1:], seconds)
        time.sleep(seconds)
