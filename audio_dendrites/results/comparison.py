"""Compare sides of finished runs: tables, intervals and a figure. See compare.py."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.figure import Figure
from pandas import DataFrame

from audio_dendrites.data.splits import encode_labels, is_multi_label
from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole
from audio_dendrites.results.dendrites import use_sentence
from audio_dendrites.results.metrics import ranking
from audio_dendrites.results.plots import save_figure
from audio_dendrites.results.runs import check_same_clips, check_same_task, read_run, refuse
from audio_dendrites.results.statistics import SCORES, Runs, difference, error_reduction, holm, mcnemar_exact
from audio_dendrites.results.tables import best_and_worst, differences_table, sides_table, span

SIGNIFICANT = 0.05
METHOD = """Intervals are at 95 %. With one run on each side, they describe these two models on other recordings
(jackknife over source recordings). With several runs, they also cover other runs (Student's t, paired if both sides
have the same seeds and folds). With more than two sides, p is corrected by Holm's method, and the intervals are widened
to match. The effect size is the difference in standard deviations of runs (Hedges' g)."""


@dataclass
class Side:
    """The runs of one side."""

    name: str
    folders: list[Path]
    metrics: list[dict[str, Any]]  # metrics.json of each run, with `seed` and `loss`
    tables: list[DataFrame]  # predictions.parquet of each run
    clips: DataFrame  # a row for each test clip, sorted by its name: `label` and `group` (source recording)

    @property
    def folds(self) -> list[frozenset[str]]:
        """The test clips of each run."""
        return [frozenset(table["clip"]) for table in self.tables]

    @property
    def use(self) -> str | None:
        """A sentence that says whether the dendrites are used, on average over the runs; None without dendrites."""
        uses = [use for run in self.metrics if (use := (run.get("dendrites") or {}).get("use"))]
        if not uses:
            return None
        used = sum(use["used"] for use in uses)
        lost = statistics.mean(use["lost"] for use in uses)
        sentence = use_sentence({"use": uses[0] | {"lost": lost, "used": 2 * used > len(uses)}})
        runs = f", on average over {len(uses)} runs ({used} of them use their dendrites)." if uses[1:] else "."
        return sentence.replace("dendrites", f"dendrites of `{self.name}`", 1).removesuffix(".") + runs

    def mean(self, field: str) -> float | None:
        """Mean over the runs of a number in metrics.json; None if a run does not have it."""
        values = [metrics.get(field) for metrics in self.metrics]
        return None if None in values else statistics.mean(values)

    def to_dict(self, tested: Mapping[str, Runs]) -> dict[str, Any]:
        """The entry of comparison.json, without differences from another side."""
        # Evaluations are part of the time. A run that took no step since it was last resumed has no speed.
        speeds = [speed for metrics in self.metrics if (speed := metrics["train_steps_per_second"])]
        scores = {name: pandas.Series(one.scores) for name, one in tested.items()}
        return {
            "name": self.name,
            "runs": [folder.name for folder in self.folders],
            "seeds": sorted({metrics["seed"] for metrics in self.metrics} - {None}),
            **{
                name: {"mean": float(one.mean()), "deviation": float(one.std()) if len(one) > 1 else None}
                for name, one in scores.items()
            },
            "parameters": self.mean("parameters"),
            "multiply_adds": self.mean("multiply_adds"),
            "steps": sorted({metrics["steps"] for metrics in self.metrics}),
            "seconds_a_step": 1 / statistics.median(speeds) if speeds else None,
            "use": self.use,
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
        comparison.json. Scores, differences and the ends of intervals are from -1 to 1. With more than two sides, p is
        corrected by Holm's method, and the levels of the intervals match.

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
            entry[name] |= {"difference": one.value, "low": low, "high": high, "p": p, "effect_size": one.effect_size}
            entry["over_runs"] = one.over_runs
    for side, entry in zip(others, entries, strict=True):
        if "accuracy" in entry:
            entry["error_reduction_percent"] = error_reduction(first["accuracy"]["mean"], entry["accuracy"]["mean"])
            if len(side.folders) == len(reference.folders) == 1:
                right = [
                    (table["label"] == table["predicted"]).loc[reference.clips.index].to_numpy()
                    for table in (one.tables[0].set_index("clip") for one in (reference, side))
                ]
                entry["mcnemar"] = dict(zip(("lost", "won", "p"), mcnemar_exact(*right), strict=True))
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
        raise UserError(f"a run must be given once, got {twice[0]} more than once")
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
    """The runs of a side for each score. Multi-label clips have mAP alone."""
    labels, multi_label = side.metrics[0]["labels"], is_multi_label(side.clips["label"])
    names, codes = np.unique(reference.clips["group"], return_inverse=True)
    recordings = pandas.Series(codes, reference.clips.index)
    numbers = {fold: str(number) for number, fold in enumerate(dict.fromkeys(reference.folds))}
    folds, seeds = [numbers[fold] for fold in side.folds], [metrics["seed"] for metrics in side.metrics]
    runs: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in SCORES if name == "mAP" or not multi_label}
    for metrics, table in zip(side.metrics, side.tables, strict=True):
        references = encode_labels(table["label"], labels)
        references = references if multi_label else np.eye(len(labels))[references]
        logits = ranking(np.stack(table["logits"]), metrics["loss"])
        for name, found in runs.items():
            found.append(SCORES[name](logits, references, recordings[table["clip"]].to_numpy(), len(names)))
    columns = {name: tuple(zip(*found, strict=True)) for name, found in runs.items()}
    return {
        name: Runs(np.array(scores), np.stack(effects, axis=1), folds, seeds)
        for name, (scores, effects) in columns.items()
    }


def verdict(reference: Mapping[str, Any], other: Mapping[str, Any], score: str, comparisons: int) -> str:
    """Which side is better and by how much, whether the trainings were equal, and whether dendrites are used.

    Args:
        reference, other: Entries of comparison.json.
        score: The score that decides.
        comparisons: Number of sides that are compared with the reference.
    """
    found, better, worse = other[score], f"`{other['name']}`", f"`{reference['name']}`"
    difference, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    significant = found["p"] < SIGNIFICANT
    if significant and difference < 0:
        better, worse, difference, low, high = worse, better, -difference, -high, -low
    runs = "runs and recordings" if other["over_runs"] else "recordings"
    corrected = f", corrected for {comparisons} comparisons" if comparisons > 1 else ""
    certainty = f"(95 % interval {low:+.2f} to {high:+.2f} over {runs}, p = {found['p']:.2g}{corrected})"
    if significant:
        text = f"{better} is better than {worse} by {difference:.2f} points of {score} {certainty}."
    else:
        text = f"{better} is not significantly different from {worse}: {difference:+.2f} points of {score} {certainty}."
    if not other["over_runs"]:
        text += " Other seeds may give another difference."
    if reference["steps"] != other["steps"]:
        steps = [f"`{side['name']}` took {span(side['steps'])}" for side in (reference, other)]
        text += f" The trainings are not the same: {steps[0]} steps, {steps[1]}."
    return " ".join([text, *(side["use"] for side in (reference, other) if side["use"])])


def report(found: Mapping[str, Any], sides: Sequence[Side]) -> str:
    """comparison.md."""
    reference, *others = found["sides"]
    verdicts = "\n\n".join(f"**{other['verdict']}**" for other in others)
    listed = "\n".join(f"- {side.name}: {', '.join(map(str, side.folders))}" for side in sides)
    alone = "".join(
        f"\n\nOnly `{reference['name']}` has {test['lost']} clips right, only `{other['name']}` has {test['won']}: "
        f"McNemar's exact p = {test['p']:.2g}. This test treats all clips as independent, even those of one recording."
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


def plot(found: Mapping[str, Any], sides: Sequence[Side]) -> Figure:
    """Plot the differences with their intervals, and the score of each side by class; see `best_and_worst`."""
    reference, *others = found["sides"]
    score = found["scores"][0]
    what, key = ("accuracy",) * 2 if score == "accuracy" else ("average precision", "average_precision")
    by_class = DataFrame()
    for side in sides:
        runs = [DataFrame(metrics["test"]["per_class"]).loc[key] for metrics in side.metrics]
        by_class[side.name] = DataFrame(runs).mean()  # over the runs that were tested on the class
    by_class = by_class.reindex([label for label in sides[0].metrics[0]["labels"] if label in by_class.index])
    by_class = by_class.loc[best_and_worst(by_class[reference["name"]].to_dict())]
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
    classes.set(title=f"{what} by class", xlim=(-0.03, 1.03), yticks=rows, yticklabels=by_class.index)
    classes.invert_yaxis()
    classes.legend(loc="lower left")
    return figure


def write_comparison(sides: Mapping[str, Sequence[Path]], folder: Path) -> None:
    """Compare, print, and write comparison.md, .csv, .png and .json.

    Args:
        sides: Run folders by the name of the side, the reference first.
        folder: Where to write.

    Raises:
        UserError: The sides cannot be compared.
    """
    read = [read_side(name, folders) for name, folders in sides.items()]
    found = compare(read)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(plot(found, read), folder / "comparison.png")
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
