"""Compare runs with dendrites to their baseline, by what their run folders hold; --help explains the options.

    python compare.py BASELINE DENDRITIC [--output FOLDER]
    python compare.py --baseline FOLDER ... --dendritic FOLDER ... [--output FOLDER]

Several folders a side are runs with other seeds or other test folds. The score is accuracy or, where clips are
multi-label, mAP: of a side the mean of its runs'. Writes comparison.md, comparison.png and
comparison.json; the last also into the run folders of both sides where each is one run, for their model cards.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas
from matplotlib.figure import Figure
from pandas import DataFrame

from audio_dendrites.data.splits import encode_labels, is_multi_label
from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole
from audio_dendrites.results.metrics import average_precisions
from audio_dendrites.results.runs import check_same_clips, check_same_task, read_run, refuse
from audio_dendrites.results.statistics import (
    DRAWS,
    MAP_DRAWS,
    average_precision_interval,
    bootstrap_interval,
    error_reduction,
    mcnemar_exact,
)
from audio_dendrites.results.tables import markdown_table

matplotlib.use("agg")

SIGNIFICANT = 0.05


@dataclass
class Side:
    """The runs of one side.

    Attributes:
        folders: Run folders.
        metrics: metrics.json of each.
        tables: predictions.parquet of each.
        clips: One row a test clip, sorted by it: `label`, `group` (source recording) and `runs` (how many tested it).
    """

    folders: list[Path]
    metrics: list[dict[str, Any]]
    tables: list[DataFrame]
    clips: DataFrame

    @property
    def parameters(self) -> float:
        """Mean over the runs: with dendrites each may have grown another number."""
        return statistics.mean(metrics["parameters"] for metrics in self.metrics)

    @property
    def step_seconds(self) -> float | None:
        """Median over the runs; a run's own is its whole training, evaluations included, by its steps.

        None where no run took a step since it was last resumed.
        """
        speeds = [metrics["train_steps_per_second"] for metrics in self.metrics if metrics["train_steps_per_second"]]
        return 1 / statistics.median(speeds) if speeds else None

    @property
    def steps(self) -> list[int]:
        return sorted({metrics["steps"] for metrics in self.metrics})

    def to_dict(self, **score: float) -> dict[str, Any]:
        return {
            "runs": [folder.name for folder in self.folders],
            **score,
            "parameters": self.parameters,
            "steps": self.steps,
            "seconds_a_step": self.step_seconds,
        }


@dataclass
class Score:
    """What both sides are compared by; each pair is the baseline's and the dendritic side's, from 0 to 1.

    Attributes:
        name: As metrics.json has it.
        values: Of the sides.
        runs: Of the runs of each.
        by_class: One row a class, columns `baseline` and `dendritic`.
        class_score: What that holds.
        interval: 95 % bootstrap interval of the difference by source recording, from -1 to 1.
        draws: Of the bootstrap.
        method: How to read interval and tests, for comparison.md.
        p: McNemar's; none where a clip is not right or wrong.
        error_reduction_percent: Likewise; none too where the baseline makes no errors.
        rows: What the table has of this score alone.
    """

    name: str
    values: tuple[float, float]
    runs: tuple[Sequence[float], Sequence[float]]
    by_class: DataFrame
    class_score: str
    interval: tuple[float, float]
    draws: int
    method: str
    p: float | None = None
    error_reduction_percent: float | None = None
    rows: Sequence[Sequence[str]] = ()

    @property
    def difference(self) -> float:
        return self.values[1] - self.values[0]

    @property
    def tests(self) -> dict[str, bool]:
        """Whether each test calls the difference significant."""
        mcnemar = {} if self.p is None else {"McNemar's test": self.p < SIGNIFICANT}
        return mcnemar | {"the interval": not self.interval[0] <= 0 <= self.interval[1]}

    @property
    def is_significant(self) -> bool:
        """All tests must say so: McNemar's takes clips as independent, the interval knows their recordings."""
        return all(self.tests.values())


@dataclass
class Comparison:
    """What `compare` finds."""

    baseline: Side
    dendritic: Side
    score: Score
    parameters_added_percent: float
    step_time_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """comparison.json; the interval is from -1 to 1, and what multi-label clips have no meaning for is left out."""
        score = self.score
        found = {
            "dataset": self.baseline.metrics[0]["dataset"],
            "clips": len(self.baseline.clips),
            "baseline": self.baseline.to_dict(**{score.name: score.values[0]}),
            "dendritic": self.dendritic.to_dict(**{score.name: score.values[1]}),
            "error_reduction_percent": score.error_reduction_percent,
            "parameters_added_percent": self.parameters_added_percent,
            "step_time_ratio": self.step_time_ratio,
            "p": score.p,
            "interval": list(score.interval),
            "significant": score.is_significant,
            "verdict": verdict(self),
        }
        meaningless = {"error_reduction_percent", "p"} if score.p is None else set()
        return {name: value for name, value in found.items() if name not in meaningless}


def read_side(folders: Sequence[Path]) -> Side:
    """Read the run folders of one side.

    Raises:
        UserError: A folder is no finished run, or the runs do not fit together.
    """
    metrics, tables = zip(*map(read_run, folders), strict=True)
    by_clip = pandas.concat(tables).groupby("clip")
    clips = by_clip.agg(label=("label", "first"), group=("group", "first"), runs=("label", "size"))
    for column in ("label", "group"):
        refuse(by_clip.size()[by_clip[column].nunique() > 1], f"{_names(folders)} differ in the {column} of")
    few, many = clips["runs"].min(), clips["runs"].max()
    refuse(
        clips[clips["runs"] == few] if few < many else clips[:0],
        f"{_names(folders)}: wanted as many runs for every clip, but most have {many} and {few} tested",
    )
    return Side(list(folders), list(metrics), list(tables), clips)


def compare(baseline: Side, dendritic: Side) -> Comparison:
    """Compare two sides on the clips that both tested.

    Raises:
        UserError: They were not tested on the same clips of one data set or, where the score is mAP, not by the same
            test folds.
    """
    check_same_task([*baseline.folders, *dendritic.folders], [*baseline.metrics, *dendritic.metrics])
    check_same_clips(baseline.clips, dendritic.clips, _names(baseline.folders), _names(dendritic.folders))
    score = mean_average_precision if is_multi_label(baseline.clips["label"]) else accuracy
    return Comparison(
        baseline,
        dendritic,
        score(baseline, dendritic),
        parameters_added_percent=100 * (dendritic.parameters / baseline.parameters - 1),
        step_time_ratio=dendritic.step_seconds / baseline.step_seconds
        if baseline.step_seconds and dendritic.step_seconds
        else None,
    )


def accuracy(baseline: Side, dendritic: Side) -> Score:
    """Of clips with one class each: of all clips, each by the share of its runs that had it right."""
    before, after = rights = [_right(side) for side in (baseline, dendritic)]
    values = (before.mean(), after.mean())
    lost, won, p = mcnemar_exact(before, after)
    reduction = error_reduction(*values)
    labels = baseline.clips["label"].to_numpy()
    return Score(
        name="accuracy",
        values=values,
        runs=tuple([metrics["test"]["accuracy"] for metrics in side.metrics] for side in (baseline, dendritic)),
        by_class=DataFrame({"baseline": before, "dendritic": after}).groupby(labels).mean(),
        class_score="accuracy",
        interval=bootstrap_interval(before, after, baseline.clips["group"].to_numpy()),
        draws=DRAWS,
        method=f"""clips in pairs. McNemar's test takes clips
as independent. With several runs a side, a clip goes to the side that had it right in the larger share of its runs.
A difference is called significant where the test's p is below {SIGNIFICANT} and the interval excludes 0.""",
        p=p,
        error_reduction_percent=reduction,
        rows=[
            [
                "errors a run",
                *(f"{(1 - right).sum():.1f} of {len(right)}" for right in rights),
                "no errors to reduce" if reduction is None else f"{reduction:.1f} % error reduction",
            ],
            ["clips it alone has right", str(lost), str(won), f"McNemar's exact p = {p:.2g}"],
        ],
    )


def mean_average_precision(baseline: Side, dendritic: Side) -> Score:
    """mAP, of clips with any number of classes: of a side the mean of its runs', each over the clips that it tested.

    Logits of two models are on scales of their own, so clips are ranked only among those of the same run (Forman and
    Scholz 2010, "Apples-to-apples in cross-validation studies", on averages over folds). An mAP depends on the clips
    that are ranked: both sides must have the same test folds.

    Raises:
        UserError: They have not, or no test clip has a class.
    """
    sides = (baseline, dendritic)
    names = [_names(side.folders) for side in sides]
    tests = [{frozenset(table["clip"]) for table in side.tables} for side in sides]
    if tests[0] != tests[1]:
        raise UserError(
            f"{names[0]} and {names[1]} were not tested by the same folds, and an mAP is one of all clips of a test: "
            "wanted the same test folds on both sides"
        )
    labels = baseline.metrics[0]["labels"]
    references = encode_labels(baseline.clips["label"], labels)
    if not references.any():
        raise UserError(f"{names[0]}: no test clip has a class, wanted some to compute mAP from")
    before, after = (_average_precisions(side, labels) for side in sides)  # means are of the classes that occur
    runs = (before.mean(axis=1).dropna(), after.mean(axis=1).dropna())
    return Score(
        name="mAP",
        values=(runs[0].mean(), runs[1].mean()),
        runs=runs,
        by_class=DataFrame({"baseline": before.mean(), "dendritic": after.mean()}).dropna(),
        class_score="average precision",
        interval=average_precision_interval(
            *(_logits(side, len(labels)) for side in sides), references, baseline.clips["group"].to_numpy()
        ),
        draws=MAP_DRAWS,
        method="""both sides and all runs by
the same draw. mAP is the mean of the average precisions of the classes that occur; of a side it is the mean of its
runs', each over the clips that it tested. A clip of several classes is not right or wrong, so there is no McNemar's
test. A difference is called significant where the interval excludes 0.""",
    )


def _right(side: Side) -> np.ndarray:
    """(clips,) share of the runs that had each clip right."""
    rows = pandas.concat(side.tables)
    return (rows["label"] == rows["predicted"]).groupby(rows["clip"]).mean().to_numpy()


def _average_precisions(side: Side, labels: Sequence[str]) -> DataFrame:
    """(runs, classes), NaN for the classes that do not occur among a run's clips."""
    found = [
        average_precisions(np.stack(table["logits"]), encode_labels(table["label"], labels)) for table in side.tables
    ]
    return DataFrame(found, columns=labels)


def _logits(side: Side, classes: int) -> np.ndarray:
    """(runs, clips, classes), NaN for the clips that a run did not test."""
    logits = np.full((len(side.tables), len(side.clips), classes), np.nan, dtype=np.float32)
    for run, table in zip(logits, side.tables, strict=True):
        run[side.clips.index.get_indexer(table["clip"])] = np.stack(table["logits"])
    return logits


def verdict(found: Comparison) -> str:
    """One line: whether dendrites changed the score, how sure that is, and whether the trainings were equal."""
    unequal = ""
    if found.baseline.steps != found.dendritic.steps:
        steps = [_span([str(count) for count in side.steps]) for side in (found.baseline, found.dendritic)]
        unequal = f" Not the same training: the baseline took {steps[0]} steps, the dendritic model {steps[1]}."
    return _finding(found.score) + unequal


def _finding(score: Score) -> str:
    low, high = (100 * end for end in score.interval)
    mcnemar = "" if score.p is None else f", McNemar p = {score.p:.2g}"
    numbers = (
        f"{100 * score.difference:+.2f} points of {score.name} (95 % interval {low:+.2f} to {high:+.2f} by source "
        f"recording{mcnemar})"
    )
    if score.is_significant:
        return f"Dendrites {'raise' if score.difference > 0 else 'lower'} the {score.name}: {numbers}."
    if any(score.tests.values()):
        no, yes = sorted(score.tests, key=score.tests.get)
        return f"The difference is not significant, {yes} says otherwise but {no} does not: {numbers}."
    return f"The difference is not significant: {numbers}."


def summary(found: Comparison) -> str:
    """The table of both sides, as Markdown."""
    sides, score = (found.baseline, found.dendritic), found.score
    rows = [
        ["", "baseline", "dendritic", "change"],
        ["runs", *(str(len(side.folders)) for side in sides), ""],
        [score.name, *(f"{value:.4f}" for value in score.values), f"{100 * score.difference:+.2f} points"],
        [f"{score.name} of the runs", *(_span([f"{value:.4f}" for value in runs]) for runs in score.runs), ""],
        *score.rows,
        ["parameters", *(f"{side.parameters:,.0f}" for side in sides), f"{found.parameters_added_percent:+.2f} %"],
        ["steps", *(_span([str(steps) for steps in side.steps]) for side in sides), ""],
    ]
    if found.step_time_ratio is not None:
        seconds = (f"{side.step_seconds:.4f}" for side in sides)
        rows.append(["seconds a step", *seconds, f"× {found.step_time_ratio:.3f}"])
    return markdown_table(rows)


def report(found: Comparison) -> str:
    """comparison.md."""
    clips = found.baseline.clips
    return f"""# Dendrites against the baseline

**{verdict(found)}**

{summary(found)}

![Difference and {found.score.class_score} by class](comparison.png)

{found.baseline.metrics[0]["dataset"]}: {len(clips)} test clips of {clips["group"].nunique()} source recordings. The
interval is the 2.5 to 97.5 % of {found.score.draws:,} bootstrap draws of whole recordings, {found.score.method}

- baseline: {_names(found.baseline.folders)}
- dendritic: {_names(found.dendritic.folders)}
"""


def plot(found: Comparison, path: Path) -> None:
    """The difference with its interval, and the score of both by class."""
    score, by_class = found.score, found.score.by_class
    figure = Figure(figsize=(11, 2 + 0.35 * len(by_class)), layout="constrained")
    difference, classes = figure.subplots(1, 2, width_ratios=[1, 2])
    low, high = (100 * end for end in score.interval)
    difference.axvline(0, color="grey", linewidth=1)
    difference.plot([low, high], [0, 0], linewidth=3, color="C1")
    difference.plot([100 * score.difference], [0], "o", markersize=9, color="C1")
    difference.set(title="dendritic − baseline, 95 % interval", xlabel=f"points of {score.name}", yticks=[])
    rows = np.arange(len(by_class))
    classes.hlines(rows, by_class.min(axis=1), by_class.max(axis=1), color="lightgrey", linewidth=3, zorder=0)
    classes.scatter(
        by_class["baseline"], rows, label="baseline", s=120, facecolors="none", edgecolors="C0", linewidths=2
    )
    classes.scatter(by_class["dendritic"], rows, label="dendritic", color="C1")
    classes.set(title=f"{score.class_score} by class", xlim=(-0.03, 1.03), yticks=rows, yticklabels=by_class.index)
    classes.invert_yaxis()
    classes.legend(loc="lower left")
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def main(arguments: Sequence[str]) -> None:
    """Compare, print, and write into the output folder."""
    options = parse(arguments)
    found = compare(read_side(options.baseline), read_side(options.dendritic))
    options.output.mkdir(parents=True, exist_ok=True)
    plot(found, options.output / "comparison.png")
    with written_whole(options.output / "comparison.md") as path:
        path.write_text(report(found), encoding="utf-8")
    pair = options.baseline + options.dendritic
    for folder in {options.output, *(pair if len(pair) == 2 else [])}:
        with written_whole(folder / "comparison.json") as path:
            path.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(f"\n{summary(found)}\n\n{verdict(found)}\n\nWritten to {options.output}/comparison.md and comparison.png")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line: `baseline` and `dendritic`, lists of folders, and `output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="BASELINE DENDRITIC", help="One run folder a side.")
    parser.add_argument("--baseline", nargs="+", type=Path, metavar="FOLDER", help="Run folders without dendrites.")
    parser.add_argument("--dendritic", nargs="+", type=Path, metavar="FOLDER", help="Run folders with dendrites.")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="Default: the (first) dendritic run folder.")
    options = parser.parse_args(arguments)
    if len(options.runs) == 2 and options.baseline is None and options.dendritic is None:
        options.baseline, options.dendritic = [options.runs[0]], [options.runs[1]]
    elif options.runs or options.baseline is None or options.dendritic is None:
        parser.error("wanted two run folders, BASELINE DENDRITIC, or both --baseline and --dendritic")
    options.output = options.output or options.dendritic[0]
    return options


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))


def _span(values: Sequence[str]) -> str:
    """One value, or the lowest and the highest."""
    ordered = sorted(set(values), key=float)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
