"""Compare sides of finished runs, by what their run folders hold; --help explains the options.

    python compare.py BASELINE DENDRITIC [--output FOLDER]
    python compare.py --side plain RUN ... --side wide RUN ... --side dendrites RUN ... [--output FOLDER]

The first side is the reference. Several runs of a side have other seeds or other test folds, and all sides have the
same test folds. The score of a side is the mean of its runs' scores. Differences have intervals in which recordings
and, with several runs a side, seeds are drawn at random. Writes comparison.md, comparison.csv, comparison.png and
comparison.json. With one run in each of two sides, comparison.json is also written into their run folders, for their
model cards.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
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
from audio_dendrites.results.metrics import ranking
from audio_dendrites.results.runs import check_same_clips, check_same_task, read_run, refuse
from audio_dendrites.results.statistics import SCORES, Runs, difference, error_reduction, holm, mcnemar_exact
from audio_dendrites.results.tables import differences_table, sides_table, span

matplotlib.use("agg")

SIGNIFICANT = 0.05
METHOD = """Intervals are at 95 %. With one run a side they hold for these two models on other recordings (jackknife
over source recordings). With several runs they also hold for other runs (Student's t, in pairs where both sides have
the same seeds and folds). Over several sides, p is corrected by Holm's method, and the intervals are widened to match.
The effect size is the difference in standard deviations of runs (Hedges' g)."""


@dataclass
class Side:
    """The runs of one side.

    Attributes:
        name: What the reports call it.
        folders: Run folders.
        metrics: metrics.json of each, with `seed` and `loss`.
        tables: predictions.parquet of each.
        clips: One row a test clip, sorted by its name: `label` and `group` (source recording).
    """

    name: str
    folders: list[Path]
    metrics: list[dict[str, Any]]
    tables: list[DataFrame]
    clips: DataFrame

    @property
    def folds(self) -> list[frozenset[str]]:
        """The test clips of each run."""
        return [frozenset(table["clip"]) for table in self.tables]

    @property
    def step_seconds(self) -> float | None:
        """Median over the runs. The time of a run is its whole training, evaluations included, divided by its steps.

        None if no run took a step since it was last resumed.
        """
        speeds = [metrics["train_steps_per_second"] for metrics in self.metrics if metrics["train_steps_per_second"]]
        return 1 / statistics.median(speeds) if speeds else None

    def mean(self, field: str) -> float | None:
        """Mean over the runs of a number in metrics.json; None if a run does not have it."""
        values = [metrics.get(field) for metrics in self.metrics]
        return None if None in values else statistics.mean(values)

    def to_dict(self, tested: Mapping[str, Runs]) -> dict[str, Any]:
        """The side's entry in comparison.json, without its differences."""
        scores = {name: one.scores for name, one in tested.items()}
        return {
            "name": self.name,
            "runs": [folder.name for folder in self.folders],
            "seeds": sorted({metrics["seed"] for metrics in self.metrics} - {None}),
            **{
                name: {"mean": float(np.mean(one)), "deviation": float(np.std(one, ddof=1)) if len(one) > 1 else None}
                for name, one in scores.items()
            },
            "parameters": self.mean("parameters"),
            "steps": sorted({metrics["steps"] for metrics in self.metrics}),
            "seconds_a_step": self.step_seconds,
        }


def read_side(name: str, folders: Sequence[Path]) -> Side:
    """Read the run folders of one side.

    Raises:
        UserError: A folder is no finished run, or the runs do not fit together.
    """
    metrics, tables = zip(*map(read_run, folders), strict=True)
    by_clip = pandas.concat(tables).groupby("clip")
    runs = by_clip.size()
    for column in ("label", "group"):
        refuse(runs[by_clip[column].nunique() > 1], f"the runs of {name} differ in the {column} of")
    refuse(runs[runs < runs.max()], f"{name}: all clips must have {runs.max()} runs, got fewer for")
    clips = by_clip.agg(label=("label", "first"), group=("group", "first"))
    return Side(name, list(folders), list(metrics), list(tables), clips)


def compare(sides: Sequence[Side]) -> dict[str, Any]:
    """Compare sides with the first one, the reference.

    Returns:
        comparison.json. Scores, differences and the ends of intervals are from -1 to 1. Over several sides, p is
        corrected by Holm's method, and the intervals have the levels that belong to it.

    Raises:
        UserError: The sides were not tested on the same clips of one data set, by the same test folds.
    """
    _check(sides)
    reference, *others = sides
    tested = [_runs(side, reference) for side in sides]
    first, *entries = [side.to_dict(scores) for side, scores in zip(sides, tested, strict=True)]
    for name in tested[0]:
        found = [difference(tested[0][name], scores[name]) for scores in tested[1:]]
        for entry, one, (p, level) in zip(entries, found, holm([one.p for one in found]), strict=True):
            low, high = one.interval(level)
            numbers = {"difference": one.value, "low": low, "high": high, "p": p, "effect_size": one.effect_size}
            entry[name] |= numbers
            entry["over_runs"] = one.over_runs
    for side, entry in zip(others, entries, strict=True):
        if "accuracy" in entry:
            entry["error_reduction_percent"] = error_reduction(first["accuracy"]["mean"], entry["accuracy"]["mean"])
            if len(side.folders) == len(reference.folders) == 1:
                lost, won, p = mcnemar_exact(_right(reference), _right(side))
                entry["mcnemar"] = {"lost": lost, "won": won, "p": p}
        entry["verdict"] = verdict(first, entry, next(iter(tested[0])), len(others))
    return {
        "dataset": reference.metrics[0]["dataset"],
        "clips": len(reference.clips),
        "recordings": reference.clips["group"].nunique(),
        "scores": list(tested[0]),
        "sides": [first, *entries],
    }


def _check(sides: Sequence[Side]) -> None:
    reference = sides[0]
    folders = [folder for side in sides for folder in side.folders]
    if twice := [str(folder) for folder, count in Counter(map(Path.resolve, folders)).items() if count > 1]:
        raise UserError(f"a run must stand in one side, once, got {twice[0]} more than once")
    check_same_task(folders, [metrics for side in sides for metrics in side.metrics])
    for other in sides[1:]:
        check_same_clips(reference.clips, other.clips, reference.name, other.name)
        if set(reference.folds) != set(other.folds):
            raise UserError(
                f"{other.name}: the test folds must be those of {reference.name}, got the same clips in other folds"
            )
    for folder, table in zip(reference.folders, reference.tables, strict=True):
        if (count := table["group"][table["label"].map(len) > 0].nunique()) < 2:
            raise UserError(
                f"{folder}: test clips with a class must come from two source recordings or more, got {count}"
            )


def _runs(side: Side, reference: Side) -> dict[str, Runs]:
    """The side's runs by the name of the score, which for multi-label clips is mAP alone."""
    labels, multi_label = side.metrics[0]["labels"], is_multi_label(side.clips["label"])
    names, codes = np.unique(reference.clips["group"], return_inverse=True)
    recordings = pandas.Series(codes, reference.clips.index)
    folds = {fold: str(number) for number, fold in enumerate(dict.fromkeys(reference.folds))}
    runs: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in SCORES if name == "mAP" or not multi_label}
    for metrics, table in zip(side.metrics, side.tables, strict=True):
        references = encode_labels(table["label"], labels)
        references = references if multi_label else np.eye(len(labels))[references]
        logits = ranking(np.stack(table["logits"]), metrics["loss"])
        for name, found in runs.items():
            found.append(SCORES[name](logits, references, recordings[table["clip"]].to_numpy(), len(names)))
    seeds = [metrics["seed"] for metrics in side.metrics]
    return {
        name: Runs(
            np.array([score for score, _ in found]), np.stack([effects for _, effects in found], axis=1),
            [folds[fold] for fold in side.folds], seeds,
        )
        for name, found in runs.items()
    }  # fmt: skip


def _right(side: Side) -> np.ndarray:
    """(clips,) whether the side's one run has each clip right."""
    table = side.tables[0].set_index("clip").loc[side.clips.index]
    return (table["label"] == table["predicted"]).to_numpy()


def verdict(reference: Mapping[str, Any], other: Mapping[str, Any], score: str, comparisons: int) -> str:
    """Whether a side differs from the reference, how sure that is, and whether the trainings were equal.

    Args:
        reference, other: Entries of comparison.json.
        score: What decides.
        comparisons: How many sides are compared with the reference.
    """
    found, name, beside = other[score], f"`{other['name']}`", f"`{reference['name']}`"
    numbers = (
        f"{100 * found['difference']:+.2f} points of {score} (95 % interval {100 * found['low']:+.2f} to "
        f"{100 * found['high']:+.2f} over {'runs and ' if other['over_runs'] else ''}recordings, p = {found['p']:.2g}"
        f"{f', corrected for {comparisons} comparisons' if comparisons > 1 else ''})"
    )
    significant = found["p"] < SIGNIFICANT
    if not other["over_runs"]:
        two = "two " if len(reference["runs"]) == len(other["runs"]) == 1 else ""
        text = (
            f"These {two}models {'differ' if significant else 'do not differ significantly'}: {name} has {numbers} "
            f"against {beside}. Other seeds may give another difference."
        )
    elif significant:
        text = f"{name} {'raises' if found['difference'] > 0 else 'lowers'} the {score} of {beside}: {numbers}."
    else:
        text = f"{name} does not change the {score} of {beside} significantly: {numbers}."
    if reference["steps"] != other["steps"]:
        steps = f"{beside} took {span(reference['steps'])} steps, {name} took {span(other['steps'])}"
        text += f" The trainings are not the same: {steps}."
    return text


def report(found: Mapping[str, Any], sides: Sequence[Side]) -> str:
    """comparison.md."""
    reference, *others = found["sides"]
    verdicts = "\n\n".join(f"**{other['verdict']}**" for other in others)
    listed = "\n".join(f"- {side.name}: {', '.join(map(str, side.folders))}" for side in sides)
    alone = "".join(
        f"\n\n`{reference['name']}` alone has {test['lost']} clips right, `{other['name']}` alone {test['won']}: "
        f"McNemar's exact p = {test['p']:.2g}. It takes clips as independent, even those of one recording."
        for other in others
        if (test := other.get("mcnemar"))
    )
    return f"""# Comparison with {reference["name"]}

{verdicts}

{sides_table(found)}

{differences_table(found)}{alone}

![Differences, and scores by class](comparison.png)

{found["dataset"]}: {found["clips"]} test clips of {found["recordings"]} source recordings. ± is the standard deviation
over runs. {METHOD}

{listed}
"""


def plot(found: Mapping[str, Any], sides: Sequence[Side], path: Path) -> None:
    """The differences with their intervals, and the score of each side by class."""
    reference, *others = found["sides"]
    score = found["scores"][0]
    by_class = DataFrame({side.name: _by_class(side) for side in sides})
    figure = Figure(figsize=(11, 2 + 0.35 * max(len(by_class), len(others))), layout="constrained")
    differences, classes = figure.subplots(1, 2, width_ratios=[1, 2])
    differences.axvline(0, color="grey", linewidth=1)
    for row, other in enumerate(others):
        low, value, high = (100 * other[score][key] for key in ("low", "difference", "high"))
        differences.plot([low, high], [row, row], linewidth=3, color=f"C{row + 1}")
        differences.plot(value, row, "o", markersize=9, color=f"C{row + 1}")
    names = [other["name"] for other in others]
    differences.set(
        title=f"against {reference['name']}, 95 % interval", xlabel=f"points of {score}", yticks=range(len(names)),
        yticklabels=names, ylim=(len(names) - 0.5, -0.5),
    )  # fmt: skip
    rows = np.arange(len(by_class))
    classes.hlines(rows, by_class.min(axis=1), by_class.max(axis=1), color="lightgrey", linewidth=3, zorder=0)
    for number, name in enumerate(by_class):
        classes.scatter(by_class[name], rows, s=160 / (number + 1), label=name, color=f"C{number}")
    what = "accuracy" if score == "accuracy" else "average precision"
    classes.set(title=f"{what} by class", xlim=(-0.03, 1.03), yticks=rows, yticklabels=by_class.index)
    classes.invert_yaxis()
    classes.legend(loc="lower left")
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def _by_class(side: Side) -> pandas.Series:
    """Accuracy or average precision of each class, the mean over the runs that were tested on it."""
    tests = [metrics["test"]["per_class"] for metrics in side.metrics]
    key = "average_precision" if is_multi_label(side.clips["label"]) else "accuracy"
    found = DataFrame([{label: scores[key] for label, scores in test.items()} for test in tests]).mean()
    return found.reindex([label for label in side.metrics[0]["labels"] if label in found])


def write_comparison(sides: Mapping[str, Sequence[Path]], folder: Path) -> None:
    """Compare, print, and write comparison.md, .csv, .png and .json.

    Args:
        sides: Run folders by the name of the side, the reference first.
        folder: Where to.

    Raises:
        UserError: The sides cannot be compared.
    """
    read = [read_side(name, folders) for name, folders in sides.items()]
    found = compare(read)
    folder.mkdir(parents=True, exist_ok=True)
    plot(found, read, folder / "comparison.png")
    with written_whole(folder / "comparison.md") as path:
        path.write_text(report(found, read), encoding="utf-8")
    with written_whole(folder / "comparison.csv") as path:
        rows = pandas.json_normalize(found["sides"])
        rows.map(lambda cell: " ".join(map(str, cell)) if isinstance(cell, list) else cell).to_csv(path, index=False)
    runs = [run for side in read for run in side.folders]
    for where in {folder, *(runs if len(runs) == len(read) == 2 else [])}:
        with written_whole(where / "comparison.json") as path:
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    verdicts = "\n\n".join(other["verdict"] for other in found["sides"][1:])
    print(f"\n{sides_table(found)}\n\n{differences_table(found)}\n\n{verdicts}\n\nWritten to {folder}/comparison.md")


def main(arguments: Sequence[str]) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="BASELINE DENDRITIC", help="Two run folders.")
    parser.add_argument(
        "--side",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "RUN"),
        help="A side's name and run folders.",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="Default: DENDRITIC, or comparison beside the last runs."
    )
    options = parser.parse_args(arguments)
    named = {name: [Path(run) for run in runs] for name, *runs in options.side}
    if len(options.runs) == 2 and not named:
        named = {name: [run] for name, run in zip(("baseline", "dendritic"), options.runs, strict=True)}
    elif options.runs or len(named) < max(2, len(options.side)) or not all(named.values()):
        parser.error("expected two run folders, or --side NAME RUN ... twice or more, each with a name of its own")
    last = list(named.values())[-1][0]
    write_comparison(named, options.output or (last if options.runs else last.resolve().parent / "comparison"))
