"""Score several runs as one classifier, by the mean of their probabilities."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame
from scipy.special import log_expit, log_softmax, logsumexp

from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole
from audio_dendrites.results.runs import read_same_tests
from audio_dendrites.results.scores import score, score_names, with_predictions
from audio_dendrites.results.tables import markdown_table


def ensemble(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, Any], DataFrame]:
    """Score run folders and their ensemble.

    Returns:
        metrics.json of each run, with `test` scored from its predictions; metrics.json of the ensemble, with the sums
        of parameters and steps; and predictions.parquet of the ensemble.

    Raises:
        UserError: A folder is not a finished run, or the runs did not test the same clips of the same classes.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError(f"the runs must be two folders or more, each given once, got {', '.join(map(str, folders))}")
    members, tables = read_same_tests(folders, ("dataset", "labels", "loss"))
    labels, loss = members[0]["labels"], members[0]["loss"]
    logits = np.stack([np.stack(table["logits"]) for table in tables])
    predictions = with_predictions(tables[0], mean_logits(logits, loss), labels).reset_index()
    members = [run | {"test": score(table, labels, loss)} for run, table in zip(members, tables, strict=True)]
    metrics = {
        "dataset": members[0]["dataset"], "labels": labels, "members": [folder.name for folder in folders],
        "loss": loss, "test": score(predictions, labels, loss), "train_steps_per_second": None,
        **{name: sum(run[name] for run in members) for name in ("parameters", "steps")},
    }  # fmt: skip
    return members, metrics, predictions


def mean_logits(logits: np.ndarray, loss: str) -> np.ndarray:
    """Logits of the mean of the members' probabilities.

    The AST authors also take the mean of probabilities (github.com/YuanGongND/ast, egs/audioset/ensemble.py). A member
    counts by how sure it is, and the scale of its logits does not matter.

    Args:
        logits: (members, clips, classes).
        loss: cross_entropy, where the probabilities are the softmax, or bce, where they are the sigmoids.

    Returns:
        (clips, classes), float32. The softmax, or sigmoid, of them is the mean.
    """
    logits = logits.astype(np.float64)
    if loss == "bce":
        mean = logsumexp(log_expit(logits), axis=0) - logsumexp(log_expit(-logits), axis=0)
    else:
        mean = logsumexp(log_softmax(logits, axis=2), axis=0) - np.log(len(logits))
    return mean.astype(np.float32)


def summary(folders: Sequence[Path], members: Sequence[dict[str, Any]], metrics: dict[str, Any]) -> str:
    """The scores of each run, their mean, and the scores of the ensemble, as a Markdown table."""
    rows = [(str(folder), run["parameters"], run["test"]) for folder, run in zip(folders, members, strict=True)]
    scores = score_names(metrics["test"])
    mean = {name: float(np.mean([run["test"][name] for run in members])) for name in scores}
    rows += [("mean of the runs", "", mean), ("ensemble", metrics["parameters"], metrics["test"])]
    cells = [[name, f"{size:,}" if size else "", *(test[score] for score in scores)] for name, size, test in rows]
    return markdown_table([["run", "parameters", *scores], *cells])


def write_ensemble(folders: Sequence[Path], output: Path) -> str:
    """Write ensemble.md and, so that compare.py accepts the folder, metrics.json and predictions.parquet.

    Returns:
        The table of ensemble.md.

    Raises:
        UserError: The runs make no ensemble, or the output is the folder of a run.
    """
    if (output / "config.yaml").exists():
        raise UserError(f"output: {output} is the folder of a run; choose another --output")
    members, metrics, predictions = ensemble(folders)
    table = summary(folders, members, metrics)
    tested = f"{metrics['dataset']}: {len(predictions)} test clips. The probabilities are the mean over the runs."
    output.mkdir(parents=True, exist_ok=True)
    with written_whole(output / "ensemble.md") as path:
        path.write_text(f"# Ensemble of {len(members)} runs\n\n{table}\n\n{tested}\n", encoding="utf-8")
    with written_whole(output / "predictions.parquet") as path:
        predictions.to_parquet(path, index=False)
    with written_whole(output / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return table
