"""Compare runs with dendrites to their baseline, by what their run folders hold; --help explains the options.

    python compare.py BASELINE DENDRITIC [--output FOLDER]
    python compare.py --baseline FOLDER ... --dendritic FOLDER ... [--output FOLDER]

Several folders a side are runs with other seeds or other test folds. Writes comparison.md, comparison.png and
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

from audio_dendrites.config import RecipeError, written_whole
from audio_dendrites.report import markdown_table
from audio_dendrites.runs import check_same_clips, check_same_task, read_run, refuse
from audio_dendrites.statistics import bootstrap_interval, error_reduction, mcnemar_exact

matplotlib.use("agg")

SIGNIFICANT = 0.05


@dataclass
class Side:
    """The runs of one side.

    Attributes:
        folders: Run folders.
        metrics: metrics.json of each.
        clips: One row a test clip, sorted by it: `label`, `group` (source recording), `right` (share of the runs that
            had it right) and `runs` (how many tested it).
    """

    folders: list[Path]
    metrics: list[dict[str, Any]]
    clips: DataFrame

    @property
    def accuracies(self) -> list[float]:
        return [metrics["test"]["accuracy"] for metrics in self.metrics]

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

    def to_dict(self) -> dict[str, Any]:
        return {
            "runs": [folder.name for folder in self.folders],
            "accuracy": float(self.clips["right"].mean()),
            "parameters": self.parameters,
            "steps": self.steps,
            "seconds_a_step": self.step_seconds,
        }


@dataclass
class Comparison:
    """What `compare` finds; accuracies from 0 to 1, the rest as named."""

    baseline: Side
    dendritic: Side
    accuracy: tuple[float, float]
    error_reduction_percent: float | None
    parameters_added_percent: float
    step_time_ratio: float | None
    lost: int
    won: int
    p: float
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        return self.accuracy[1] - self.accuracy[0]

    @property
    def is_significant(self) -> bool:
        """Both tests must say so: McNemar's takes clips as independent, the interval knows their recordings."""
        return self.p < SIGNIFICANT and not self.interval[0] <= 0 <= self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        """comparison.json; the interval is one of accuracy, from -1 to 1."""
        return {
            "dataset": self.baseline.metrics[0]["dataset"],
            "clips": len(self.baseline.clips),
            "baseline": self.baseline.to_dict(),
            "dendritic": self.dendritic.to_dict(),
            "error_reduction_percent": self.error_reduction_percent,
            "parameters_added_percent": self.parameters_added_percent,
            "step_time_ratio": self.step_time_ratio,
            "p": self.p,
            "interval": list(self.interval),
            "significant": self.is_significant,
            "verdict": verdict(self),
        }


def read_side(folders: Sequence[Path]) -> Side:
    """Read the run folders of one side.

    Raises:
        RecipeError: A folder is no finished run, or the runs do not fit together.
    """
    runs = [read_run(folder) for folder in folders]
    rows = pandas.concat([table for _, table in runs])
    by_clip = rows.assign(right=rows["label"] == rows["predicted"]).groupby("clip")
    clips = by_clip.agg(
        label=("label", "first"), group=("group", "first"), right=("right", "mean"), runs=("right", "size")
    )
    for column in ("label", "group"):
        refuse(by_clip.size()[by_clip[column].nunique() > 1], f"{_names(folders)} differ in the {column} of")
    few, many = clips["runs"].min(), clips["runs"].max()
    refuse(
        clips[clips["runs"] == few] if few < many else clips[:0],
        f"{_names(folders)}: wanted as many runs for every clip, but most have {many} and {few} tested",
    )
    return Side(list(folders), [metrics for metrics, _ in runs], clips)


def compare(baseline: Side, dendritic: Side) -> Comparison:
    """Compare two sides on the clips that both tested.

    Raises:
        RecipeError: They were not tested on the same clips of one data set.
    """
    check_same_task([*baseline.folders, *dendritic.folders], [*baseline.metrics, *dendritic.metrics])
    check_same_clips(baseline.clips, dendritic.clips, _names(baseline.folders), _names(dendritic.folders))
    before, after = baseline.clips["right"].to_numpy(), dendritic.clips["right"].to_numpy()
    lost, won, p = mcnemar_exact(before, after)
    return Comparison(
        baseline,
        dendritic,
        accuracy=(before.mean(), after.mean()),
        error_reduction_percent=error_reduction(before.mean(), after.mean()),
        parameters_added_percent=100 * (dendritic.parameters / baseline.parameters - 1),
        step_time_ratio=dendritic.step_seconds / baseline.step_seconds
        if baseline.step_seconds and dendritic.step_seconds
        else None,
        lost=lost,
        won=won,
        p=p,
        interval=bootstrap_interval(before, after, baseline.clips["group"].to_numpy()),
    )


def verdict(found: Comparison) -> str:
    """One line: whether dendrites changed the accuracy, how sure that is, and whether the trainings were equal."""
    unequal = ""
    if found.baseline.steps != found.dendritic.steps:
        steps = [_span([str(count) for count in side.steps]) for side in (found.baseline, found.dendritic)]
        unequal = f" Not the same training: the baseline took {steps[0]} steps, the dendritic model {steps[1]}."
    return _finding(found) + unequal


def _finding(found: Comparison) -> str:
    low, high = (100 * end for end in found.interval)
    numbers = (
        f"{100 * found.difference:+.2f} points of accuracy (95 % interval {low:+.2f} to {high:+.2f} by source "
        f"recording, McNemar p = {found.p:.2g})"
    )
    if found.is_significant:
        return f"Dendrites {'raise' if found.difference > 0 else 'lower'} the accuracy: {numbers}."
    excludes_zero = not low <= 0 <= high
    if found.p < SIGNIFICANT or excludes_zero:
        yes, no = ("McNemar's test", "the interval")[:: -1 if excludes_zero else 1]
        return f"The difference is not significant, {yes} says otherwise but {no} does not: {numbers}."
    return f"The difference is not significant: {numbers}."


def summary(found: Comparison) -> str:
    """The table of both sides, as Markdown."""
    sides = (found.baseline, found.dendritic)
    reduction = found.error_reduction_percent
    rows = [
        ["", "baseline", "dendritic", "change"],
        ["runs", *(str(len(side.folders)) for side in sides), ""],
        ["accuracy", *(f"{accuracy:.4f}" for accuracy in found.accuracy), f"{100 * found.difference:+.2f} points"],
        ["accuracy of the runs", *(_span([f"{a:.4f}" for a in side.accuracies]) for side in sides), ""],
        [
            "errors a run",
            *(f"{(1 - side.clips['right']).sum():.1f} of {len(side.clips)}" for side in sides),
            "no errors to reduce" if reduction is None else f"{reduction:.1f} % error reduction",
        ],
        ["clips it alone has right", str(found.lost), str(found.won), f"McNemar's exact p = {found.p:.2g}"],
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

![Difference and accuracy by class](comparison.png)

{found.baseline.metrics[0]["dataset"]}: {len(clips)} test clips of {clips["group"].nunique()} source recordings. The
interval is the 2.5 to 97.5 % of 10,000 bootstrap draws of whole recordings, clips in pairs. McNemar's test takes clips
as independent. With several runs a side, a clip goes to the side that had it right in the larger share of its runs.
A difference is called significant where the test's p is below {SIGNIFICANT} and the interval excludes 0.

- baseline: {_names(found.baseline.folders)}
- dendritic: {_names(found.dendritic.folders)}
"""


def plot(found: Comparison, path: Path) -> None:
    """The difference with its interval, and the accuracy of both by class."""
    by_class = DataFrame(
        {
            name: side.clips.groupby("label")["right"].mean()
            for name, side in (("baseline", found.baseline), ("dendritic", found.dendritic))
        }
    )
    figure = Figure(figsize=(11, 2 + 0.35 * len(by_class)), layout="constrained")
    difference, classes = figure.subplots(1, 2, width_ratios=[1, 2])
    low, high = (100 * end for end in found.interval)
    difference.axvline(0, color="grey", linewidth=1)
    difference.plot([low, high], [0, 0], linewidth=3, color="C1")
    difference.plot([100 * found.difference], [0], "o", markersize=9, color="C1")
    difference.set(title="dendritic − baseline, 95 % interval", xlabel="points of accuracy", yticks=[])
    rows = np.arange(len(by_class))
    classes.hlines(rows, by_class.min(axis=1), by_class.max(axis=1), color="lightgrey", linewidth=3, zorder=0)
    classes.scatter(
        by_class["baseline"], rows, label="baseline", s=120, facecolors="none", edgecolors="C0", linewidths=2
    )
    classes.scatter(by_class["dendritic"], rows, label="dendritic", color="C1")
    classes.set(title="accuracy by class", xlim=(-0.03, 1.03), yticks=rows, yticklabels=by_class.index)
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
    except RecipeError as error:
        sys.exit(f"error: {error}")
