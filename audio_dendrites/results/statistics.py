"""Whether two classifiers that were tested on the same clips differ."""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import binomtest

DRAWS = 10_000  # of a bootstrap
MAP_DRAWS = 1_000  # of one of mAP, which ranks all clips anew for each class and draw
CHUNK = 1000  # bootstrap draws at a time: so many times the groups, of mAP the clips, are in memory


def error_reduction(baseline: float, other: float) -> float | None:
    """Share of the baseline's errors that the other does not make, in %; none where the baseline makes none.

    Args:
        baseline: Accuracy, 0 to 1.
        other: Accuracy, 0 to 1.
    """
    return None if baseline == 1 else 100 * (other - baseline) / (1 - baseline)


def mcnemar_exact(baseline: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """McNemar's test (1947) in its exact form: of the clips on which the two differ, half should go either way.

    With several runs a side it is the sign test over clips: a clip goes to the side whose runs got it right more often.
    It takes clips as independent, which those cut from one recording are not: `bootstrap_interval` has that in view.

    Args:
        baseline: (clips,) right or wrong, or the share of runs that were right.
        other: (clips,) the same of the other classifier, clip by clip.

    Returns:
        Clips that go to the baseline, clips that go to the other, and the two-sided p.

    Raises:
        ValueError: The two are not of one length.
    """
    baseline, other = _paired(baseline, other)
    lost, won = int((baseline > other).sum()), int((other > baseline).sum())
    return lost, won, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def bootstrap_interval(
    baseline: np.ndarray,
    other: np.ndarray,
    groups: np.ndarray,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of the difference in accuracy, other − baseline.

    Clips stay in pairs, and whole source recordings are drawn with replacement (cluster bootstrap, Field and Welsh
    2007), so that many clips of one recording do not count as many observations.

    Args:
        baseline: (clips,) right or wrong, or the share of runs that were right.
        other: (clips,) the same of the other classifier.
        groups: (clips,) source recording.
        level: Share of the draws inside.
        draws: How often the recordings are drawn.
        seed: Of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: The three are not of one length.
    """
    baseline, other = _paired(baseline, other)
    number = _numbered(groups, len(baseline))
    differences, clips = np.bincount(number, other - baseline), np.bincount(number)
    drawn = [differences[picked].sum(axis=1) / clips[picked].sum(axis=1) for picked in _drawn(len(clips), draws, seed)]
    return _ends(drawn, level)


def average_precision_interval(
    baseline: np.ndarray,
    other: np.ndarray,
    references: np.ndarray,
    groups: np.ndarray,
    level: float = 0.95,
    draws: int = MAP_DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of `bootstrap_interval` for the difference in mAP, other − baseline.

    A draw gives all runs of both sides the same recordings. The mAP of a run is that of its own clips among them,
    averaged over the classes that occur there, and the mAP of a side the mean over its runs. Draws in which no class
    occurs are left out.

    Args:
        baseline: (runs, clips, classes) scores, NaN for the clips that a run did not test.
        other: (runs, clips, classes) the same of the other classifier; its runs may be more or fewer.
        references: (clips, classes), 0 or 1.
        groups, level, draws, seed: As there.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: They are not of the same clips and classes, or no clip has a class.
    """
    references = np.asarray(references, dtype=bool)
    if not baseline.shape[1:] == other.shape[1:] == references.shape or not references.any():
        raise ValueError(
            f"found scores {baseline.shape[1:]} and {other.shape[1:]} for references {references.shape}, wanted the "
            "same clips and classes, at least one that occurs"
        )
    number = _numbered(groups, len(references))
    count, drawn = number.max() + 1, []
    for picked in _drawn(count, draws, seed):
        cells = picked + count * np.arange(len(picked))[:, None]
        times = np.bincount(cells.ravel(), minlength=picked.size).reshape(picked.shape)
        weights = times.T[number].astype(float)  # (clips, draws)
        before, after = (
            _mean([_mean_average_precision(run, references, weights) for run in side]) for side in (baseline, other)
        )
        drawn.append(after - before)
    return _ends(drawn, level)


def _mean_average_precision(scores: np.ndarray, references: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws,) mAP of a run; NaN where no class occurs."""
    tested = ~np.isnan(scores[:, 0])
    scores, references, weights = scores[tested], references[tested], weights[tested]
    precisions = np.full((references.shape[1], weights.shape[1]), np.nan)
    for label in np.flatnonzero(references.any(axis=0)):
        precisions[label] = _average_precision(scores[:, label], references[:, label], weights)
    return _mean(precisions)


def _average_precision(scores: np.ndarray, references: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision, as scikit-learn's `average_precision_score`, under many weights at once.

    Args:
        scores: (clips,).
        references: (clips,) bool, at least one true.
        weights: (clips, draws), how often each clip counts.

    Returns:
        (draws,), NaN where no clip of the class counts.
    """
    order = np.argsort(-scores)
    found = order[references[order]]
    # Precision is taken where a clip of the class is found, over all clips whose score is not lower.
    ends, first = np.unique(np.searchsorted(-scores[order], -scores[found], side="right"), return_index=True)
    clips = np.add.reduceat(weights[order[: ends[-1]]], np.append(0, ends[:-1])).cumsum(axis=0)
    hits = np.add.reduceat(weights[found], first)
    precision = hits.cumsum(axis=0) / np.maximum(clips, 1)
    with np.errstate(invalid="ignore"):
        return (hits * precision).sum(axis=0) / hits.sum(axis=0)


def _mean(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(draws,) mean of the rows (draws,) that are not NaN; NaN where all are."""
    known = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(known, rows, 0).sum(axis=0) / known.sum(axis=0)


def _numbered(groups: np.ndarray, clips: int) -> np.ndarray:
    if len(groups) != clips:
        raise ValueError(f"found {len(groups)} groups for {clips} clips")
    return np.unique(groups, return_inverse=True)[1]


def _drawn(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of recordings (draws, count), drawn with replacement, in chunks."""
    random = np.random.default_rng(seed)
    for start in range(0, draws, CHUNK):
        yield random.integers(count, size=(min(CHUNK, draws - start), count))


def _ends(drawn: list[np.ndarray], level: float) -> tuple[float, float]:
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _paired(baseline: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    baseline, other = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    if baseline.shape != other.shape or not len(baseline):
        raise ValueError(f"found {baseline.shape} and {other.shape}, wanted the same clips, at least one")
    return baseline, other
