"""Copy the files that may be published to a folder, without local paths, and search them for secrets."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas
import yaml
from huggingface_hub import get_token
from pandas import DataFrame
from transformers.dynamic_module_utils import get_relative_import_files

from audio_dendrites.data.clips import is_local
from audio_dendrites.data.download import WEIGHT_FILES
from audio_dendrites.errors import UserError
from audio_dendrites.results.report import is_finished

MODEL_FILES = (*WEIGHT_FILES, "config.json", "preprocessor_config.json")
FIGURES = (
    "confusion_matrix.png", "average_precision.png", "learning_curves.png", "dendrites.png", "comparison.png",
)  # fmt: skip
# The files that resume a training. The .pt and .pth files are pickles, so only `hub_strategy: checkpoint` sends them.
CHECKPOINT_FILES = (
    *MODEL_FILES, "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "stream_*.json", "pai_state.json",
    "pai_best.safetensors",
)  # fmt: skip
BEST_FILES = (*MODEL_FILES, "pai_state.json")
LAST_CHECKPOINT, BEST_CHECKPOINT = "last-checkpoint", "best-checkpoint"  # folders of a repository
FIELDS = {"base_model": "model", "teacher": "distill_from"}  # keys of metrics.json → fields of the recipe
# The folders of a path that starts at the root, the home folder or another local folder. Web addresses do not match.
LOCAL_FOLDERS = re.compile(
    r"""(?<![\w:/.\\-])(?:~\w*|\.{1,2}|[A-Za-z]:)?[/\\](?:[^\s"'`=:,;(){}\[\]/\\]+[/\\])*(?=\w)"""
)
LOCAL_PATH = re.compile(r"(?:~\w*|\.{1,2}|[A-Za-z]:)?[/\\][^:\n]*")
SECRET_NAME = re.compile("TOKEN(?!IZER)|KEY|SECRET|PASSW", re.IGNORECASE)
TEXT = {".json", ".md", ".py", ".yaml", ".csv", ".parquet"}
PIECE, OVERLAP = 1 << 24, 1 << 12  # bytes; no pattern matches more than the overlap


class PublishError(UserError):
    """A run was not published. The message says why, and what to do."""


def check_finished(run: Path) -> None:
    """Check that a folder is that of a finished run.

    Raises:
        PublishError: If it is not.
    """
    if not is_finished(run):
        raise PublishError(
            f"{run} has no metrics.json, so it is not a finished run. Run the same train.py command again to finish "
            f"it, or set push_to_hub: true to publish while it trains"
        )


def stage_run(run: Path, folder: Path) -> None:
    """Copy everything of a finished run that may be published, except its card, to an empty folder.

    Raises:
        PublishError: If the run is not finished or has no complete model.
    """
    check_finished(run)
    metrics, recipe, comparison = read_reports(run)
    _link(run, MODEL_FILES + FIGURES + tuple(code_files(run)), folder)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise PublishError(f"{run} has no {name}, so its model is not complete. Train again")
    write_json(metrics, folder / "metrics.json")
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if comparison is not None:
        write_json(comparison, folder / "comparison.json")
    for path in files_named(run, ("comparison.md", "comparison.csv")):
        (folder / path.name).write_text(without_paths(path.read_text(encoding="utf-8")), encoding="utf-8")
    table = pandas.read_parquet(run / "predictions.parquet")
    table.assign(**_texts(table).map(without_paths)).to_parquet(folder / "predictions.parquet", index=False)


def stage_checkpoints(last: Path, best: Path | None, folder: Path) -> None:
    """Add the last checkpoint and, if it is another one, the best checkpoint to the folder of the staged model.

    The files are linked or copied, because the training deletes its own checkpoints while they are uploaded.
    """
    staged = {LAST_CHECKPOINT: (last, CHECKPOINT_FILES)}
    if best not in (None, last):
        staged[BEST_CHECKPOINT] = best, BEST_FILES
    for name, (checkpoint, patterns) in staged.items():
        (folder / name).mkdir()
        _link(checkpoint, patterns, folder / name)
        state = read_json(checkpoint / "trainer_state.json")
        write_json(without_paths(state), folder / name / "trainer_state.json")


def code_files(folder: Path) -> list[str]:
    """The Python files that `trust_remote_code` runs: the modules that configurations name, and their imports."""
    found = set()
    for path in files_named(folder, ("config.json", "preprocessor_config.json")):
        for name in read_json(path).get("auto_map", {}).values():
            module = folder / f"{name.split('--')[-1].split('.')[0]}.py"
            found |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
    return sorted(found)


def read_reports(run: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Return metrics.json, config.yaml and, if it exists, comparison.json, without local paths."""
    metrics = read_json(run / "metrics.json")
    metrics.setdefault("local", [name for name in ("dataset", "base_model") if is_local(metrics[name])])
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    comparison = read_comparison(run)
    metrics, recipe = without_paths_of(metrics, recipe)
    return metrics, recipe, comparison and without_paths(comparison | {"dataset": metrics["dataset"]})


def without_paths_of(metrics: dict[str, Any], recipe: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Remove local paths from the metrics and the recipe of a run. A local data set or model keeps only its name."""
    names = {name: Path(metrics[name]).name for name in metrics["local"]}
    fields = {FIELDS.get(name, name): value for name, value in names.items()}
    return without_paths(metrics | names), without_paths(recipe | fields)


def without_paths(value: Any) -> Any:
    """Return a JSON or YAML value in which each local path is reduced to its last part."""
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


def check_staged(folder: Path, token: str | None = None) -> None:
    """Search every byte of a staged folder for tokens, secrets from the environment, and names of user and host.

    Raises:
        PublishError: If something is found. The message says what and in which file, but not its value.
    """
    patterns = _forbidden(token)
    for path in staged_files(folder):
        is_text = path.suffix in TEXT
        for piece in _pieces(path):
            for what, pattern, in_text_only in patterns:
                if (is_text or not in_text_only) and re.search(pattern, piece):
                    raise PublishError(
                        f"{path.relative_to(folder)} holds {what}, so nothing was sent. Remove it and publish again"
                    )


def staged_files(folder: Path) -> list[Path]:
    """All files of a staged folder, sorted."""
    return files_named(folder, ("**/*",))


def files_named(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder that match one of the glob patterns, sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _forbidden(token: str | None) -> list[tuple[str, bytes, bool]]:
    """What must not be published: a description, a pattern, and whether it counts in text files only.

    The name of a host may be an ordinary word or random bytes of the weights. It counts only in text, and only if it is
    long or has a digit.
    """
    home_folder = rb"(?<![\w.:/-])(?:/[\w.-]+)*/(?:home/[\w.-]+|Users/[\w.-]+|root)/|[A-Za-z]:\\+Users\\+"
    found = [
        ("what looks like a token of the Hub", rb"hf_[A-Za-z0-9]{20,}", False),
        ("a path in a home folder", home_folder, True),
    ]
    secrets = {"the token of the Hub": token or get_token()}
    secrets |= {
        f"the value of the environment variable {name}": value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= 8
    }
    found += [(what, re.escape(value.encode()), False) for what, value in secrets.items() if value]
    if len(home := str(Path.home())) > 1:
        found.append(("a path in the home folder of this user", re.escape(home.encode()) + rb"[/\\]", False))
    host = socket.gethostname().split(".")[0]
    if len(host) >= 8 or (len(host) >= 4 and not host.isalpha()):
        found.append(("the name of this machine", rb"(?<![\w-])" + re.escape(host.encode()) + rb"(?![\w-])", True))
    return found


def _pieces(path: Path) -> Iterator[bytes]:
    """The content of a file in overlapping pieces and, because a Parquet file is compressed, the text of a table."""
    if path.suffix == ".parquet":
        table = pandas.read_parquet(path)
        yield "\n".join(map(str, [*table.columns, *_texts(table).to_numpy().ravel()])).encode()
    with open(path, "rb") as file:
        before = b""
        while piece := file.read(PIECE):
            yield before + piece
            before = piece[-OVERLAP:]


def read_comparison(run: Path) -> dict[str, Any] | None:
    """Read comparison.json, if it exists.

    Raises:
        PublishError: If an older compare.py wrote it.
    """
    path = run / "comparison.json"
    comparison = read_json(path) if path.is_file() else None
    if comparison is not None and "sides" not in comparison:
        raise PublishError(f"{path} must list `sides`. An older compare.py wrote it: compare the runs again")
    return comparison


def _texts(table: DataFrame) -> DataFrame:
    return table.select_dtypes(include=["object", "string"]).drop(columns="logits", errors="ignore")


def _link(source: Path, patterns: Sequence[str], folder: Path) -> None:
    """Link files into a folder, or copy them if the file systems differ."""
    for path in files_named(source, patterns):
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)
