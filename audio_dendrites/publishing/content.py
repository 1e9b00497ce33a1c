"""What of a run may leave the machine: an allow-list of files, without paths, tokens and names."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import pandas
import yaml
from huggingface_hub import (
    get_token,
)
from pandas import DataFrame
from transformers.dynamic_module_utils import get_relative_import_files

from audio_dendrites.data.clips import is_local
from audio_dendrites.data.download import WEIGHT_FILES
from audio_dendrites.results.report import is_finished

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
LAST_CHECKPOINT, BEST_CHECKPOINT = "last-checkpoint", "best-checkpoint"  # folders of a repository
BEST_FILES = (*MODEL_FILES, "trainer_state.json", "pai_state.json")  # what ends a training with its best weights
TEXT = {".json", ".md", ".py", ".yaml"}
# The folders of a path that begins at the root, at home or at another folder of this machine; not those of an address.
LOCAL_FOLDERS = re.compile(
    r"""(?<![\w:/.\\-])(?:~\w*|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s"'`=:,;(){}\[\]/\\]+[/\\])*(?=\w)"""
)
LOCAL_PATH = re.compile(r"(?:~\w*|\.{1,2}|[A-Za-z]:)?[/\\][^:\n]*")
SECRET_NAME = re.compile("TOKEN(?!IZER)|KEY|SECRET|PASSW", re.IGNORECASE)
HOME_FOLDER = rb"(?<![\w.:/-])(?:/[\w.-]+)*/(?:home/[\w.-]+|Users/[\w.-]+|root)/|[A-Za-z]:\\+Users\\+"
PIECE, OVERLAP = 1 << 24, 1 << 12  # bytes; nothing that is looked for is longer than the overlap
FIELDS = {"base_model": "model", "teacher": "distill_from"}  # of a recipe, by what metrics.json calls their values


class PublishError(RuntimeError):
    """A run was not published; the message says why, and what to do."""


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
    files = model_files(run) | {path.name: path for path in files_named(run, REPORT_FILES)}
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        if name not in files:
            raise PublishError(f"{run} has no {name}: it is not whole; train again")
    files["metrics.json"] = json_bytes(metrics)
    files["config.yaml"] = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    if comparison is not None:
        files["comparison.json"] = json_bytes(comparison)
    if "comparison.md" in files:
        files["comparison.md"] = without_paths((run / "comparison.md").read_text(encoding="utf-8")).encode()
    if "predictions.parquet" in files:
        files["predictions.parquet"] = _table_without_paths(run / "predictions.parquet")
    return dict(sorted(files.items()))


def model_files(folder: Path) -> dict[str, Path | bytes]:
    """Weights, configuration, feature extractor and, of a dendritic model, its code."""
    return {path.name: path for path in files_named(folder, (*MODEL_FILES, *code_files(folder)))}


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
        for path in files_named(checkpoint, patterns):
            files[f"{name}/{path.name}"] = _kept(path, folder / name / path.name)
        files[f"{name}/trainer_state.json"] = json_bytes(without_paths(read_json(checkpoint / "trainer_state.json")))
    return files


def code_files(folder: Path) -> list[str]:
    """The Python files that `trust_remote_code` runs: those the configurations name, and those they import."""
    found = set()
    for path in files_named(folder, ("config.json", "preprocessor_config.json")):
        for name in read_json(path).get("auto_map", {}).values():
            module = folder / f"{name.split('--')[-1].split('.')[0]}.py"
            found |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
    return sorted(found)


def read_reports(run: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """metrics.json, config.yaml and, if there is one, comparison.json, without paths of this machine."""
    metrics = read_json(run / "metrics.json")
    metrics.setdefault("local", [name for name in ("dataset", "base_model") if is_local(metrics[name])])
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    comparison = read_json(run / "comparison.json") if (run / "comparison.json").is_file() else None
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


def files_named(folder: Path, patterns: Sequence[str]) -> list[Path]:
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


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
