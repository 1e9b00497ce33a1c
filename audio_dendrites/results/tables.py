"""Scores as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from audio_dendrites.results.scores import score_names

MOST = 60  # classes in a table or a figure


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """An aligned Markdown table of rows, the first of which is the header. Floats have four digits."""
    cells = [
        [f"{cell:.4f}" if isinstance(cell, float) else str(cell).replace("|", r"\|") for cell in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [not isinstance(cell, str) for cell in rows[-1]]
    rule = ["-" * (width - is_right) + ":" * is_right for width, is_right in zip(widths, right, strict=True)]
    cells.insert(1, rule)
    sides = [str.rjust if is_right else str.ljust for is_right in right]
    lines = [[side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scores_table(metrics: Mapping[str, Any]) -> str | None:
    """The scores of the splits that were scored, as a Markdown table; None if there are none."""
    splits = [split for split in ("validation", "test") if metrics.get(split)]
    if not splits:
        return None
    names = score_names(metrics[splits[0]])
    found = [(split, metrics[split]) for split in splits]
    rows = [[split, " ".join(one["folds"]), one["clips"], *(one[name] for name in names)] for split, one in found]
    return markdown_table([["split", "folds", "clips", *names], *rows])


def skipped_list(skipped: Mapping[str, Sequence[str]]) -> str:
    """The number of clips that were left out of each split, and its first three reasons, as Markdown.

    Args:
        skipped: For each split that lacks clips, what was wrong with each of them. At least one split.
    """
    counts = ", ".join(f"{len(reasons)} {split}" for split, reasons in skipped.items())
    lines = [f"Clips that could not be used and were left out: {counts}.", ""]
    for reasons in skipped.values():
        lines += [f"- {reason}" for reason in reasons[:3]]
        lines += [f"- and {len(reasons) - 3} more"] * (len(reasons) > 3)
    return "\n".join(lines)


def best_and_worst(scores: Mapping[str, float]) -> list[str]:
    """The classes that a table or a figure shows: all of them, or half of `MOST` with the best and the worst scores."""
    if len(scores) <= MOST:
        return list(scores)
    ranked = sorted(scores, key=scores.get, reverse=True)
    return ranked[: MOST // 2] + ranked[-MOST // 2 :]


def classes_table(test: Mapping[str, Any]) -> str:
    """The scores of the classes in the test, as a Markdown table; see `best_and_worst`."""
    columns = ("clips", "accuracy", "f1") if "accuracy" in test else ("positives", "average_precision")
    per_class = test["per_class"]
    shown = best_and_worst({label: scores[columns[1]] for label, scores in per_class.items()})
    rows = [[label, *(per_class[label][column] for column in columns)] for label in shown]
    rest = f"\n\nThe best and the worst of {len(per_class)} classes. metrics.json has all of them."
    return markdown_table([["class", *columns], *rows]) + rest * (len(shown) < len(per_class))


def sides_table(comparison: Mapping[str, Any]) -> str:
    """Scores, steps and size of the sides in comparison.json, as a Markdown table."""
    sides, scores = comparison["sides"], comparison["scores"]
    sizes = {"parameters": ",.0f", "multiply_adds": ",.0f", "seconds_a_step": ".4f"}
    known = [name for name in sizes if all(side.get(name) for side in sides)]
    rows = [["side", "runs", *scores, "steps", *(name.replace("_", " ") for name in known)]]
    for side in sides:
        row = [side["name"], str(len(side["runs"]))]
        for name in scores:
            mean, deviation = side[name]["mean"], side[name]["deviation"]
            row.append(f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}")
        row.append(span(side["steps"]))
        for name in known:
            ratio = "" if side is sides[0] else f" (× {side[name] / sides[0][name]:.3f})"
            row.append(f"{side[name]:{sizes[name]}}{ratio}")
        rows.append(row)
    return markdown_table(rows)


def differences_table(comparison: Mapping[str, Any]) -> str:
    """Differences of the sides in comparison.json from the first side, as a Markdown table without empty columns."""
    reference, *others = comparison["sides"]
    rows = [[f"against {reference['name']}", "score", "points", "interval", "p", "effect size", "error reduction"]]
    for other in others:
        for name in comparison["scores"]:
            found, errors = other[name], other.get("error_reduction_percent") if name == "accuracy" else None
            rows.append(
                [
                    other["name"],
                    name,
                    f"{100 * found['difference']:+.2f}",
                    f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}",
                    f"{found['p']:.2g}",
                    "" if found["effect_size"] is None else f"{found['effect_size']:+.2f}",
                    "" if errors is None else f"{errors:.1f} %",
                ]
            )
    filled = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return markdown_table(list(zip(*filled, strict=True)))


def span(values: Sequence[Any]) -> str:
    """One value, or the first and the last."""
    return " to ".join(map(str, values[:1] if len(values) == 1 else [values[0], values[-1]]))
