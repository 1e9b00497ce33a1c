"""Whether two sides of runs differ, if both the test recordings and the seeds of the runs are drawn at random.

Leaving out one recording at a time shows how scores scatter with other recordings (jackknife, Tukey 1958). The runs
themselves show how scores scatter with other seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, t

LEVEL = 0.95  # of an interval
SMALLEST = 1e-100  # p
Score = tuple[float, np.ndarray]  # of a run, and the effect of each recording on it


@dataclass
class Runs:
    """The runs of one side. The runs of the other side are tested on the same recordings."""

    scores: np.ndarray  # (runs,)
    effects: np.ndarray  # (recordings, runs), how much higher the score is with the recording than without it
    folds: Sequence[str]  # (runs,), test folds
    seeds: Sequence[int | None]  # (runs,), None if not known

    @property
    def keys(self) -> list[tuple[str, int | None]]:
        """Fold and seed of each run."""
        return list(zip(self.folds, self.seeds, strict=True))


@dataclass
class Difference:
    """Mean score of a side minus that of the reference.

    Attributes:
        value: The difference, from -1 to 1.
        parts: Variances of `value` with degrees of freedom: from runs, if they show how they scatter, and recordings.
        effect_size: The difference in standard deviations of runs (Hedges' g), None if the runs do not show these.
    """

    value: float
    parts: Sequence[tuple[float, float]]
    effect_size: float | None

    @property
    def over_runs(self) -> bool:
        """Whether the variance includes the scatter of runs."""
        return len(self.parts) > 1

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Confidence interval, within -1 to 1."""
        half = self._half_width(1 - level)
        return max(-1.0, self.value - half), min(1.0, self.value + half)

    @property
    def p(self) -> float:
        """Two-sided p: the error probability of the interval that ends at 0."""
        if self.value == 0:
            return 1.0
        if self._half_width(SMALLEST) <= abs(self.value):
            return SMALLEST
        return 10 ** brentq(lambda power: self._half_width(10**power) - abs(self.value), math.log10(SMALLEST), 0)

    def _half_width(self, error: float) -> float:
        """Root of the summed squares of the half-widths that the parts have alone (Howe 1974).

        Satterthwaite's degrees of freedom for the sum would give 8 % false alarms at 5 % with three runs on each side.
        """
        return math.sqrt(sum(variance * t.isf(error / 2, freedom) ** 2 for variance, freedom in self.parts))


def difference(reference: Runs, other: Runs) -> Difference:
    """The difference of two sides, if runs and recordings are both drawn at random.

    Obuchowski and Rockette (1995) do this for readers and cases. The scatter of the runs includes a part that comes
    from the recordings. Added to it is what the recordings change in all runs alike. Runs take Student's t, because a
    bootstrap of two to five runs scatters too little.

    Runs are paired if both sides have the same folds and seeds, each once. Otherwise the scatter is that of the runs of
    one side and fold (Welch 1947) or, if a side has one run for each fold, that of the differences between folds.
    """
    counts = len(reference.scores), len(other.scores)
    weights = np.repeat([-1 / counts[0], 1 / counts[1]], counts)
    scores = np.concatenate([reference.scores, other.scores])
    effects = np.hstack([reference.effects, other.effects])
    recordings = len(effects)
    effects = effects - effects.mean(axis=0)
    covariance = (recordings - 1) / recordings * effects.T @ effects
    value, from_recordings = float(weights @ scores), weights @ covariance @ weights
    scatters = _scatters(reference, other)
    if not scatters:
        return Difference(value, [(float(from_recordings), recordings - 1)], None)
    squares = [((contrast @ scores) ** 2).sum() / freedom for contrast, freedom, _ in scatters]
    variances = [square / count for square, (_, _, count) in zip(squares, scatters, strict=True)]
    known = sum(np.trace(contrast @ covariance @ contrast.T) / freedom / count for contrast, freedom, count in scatters)
    spread = sum(variance**2 / freedom for variance, (_, freedom, _) in zip(variances, scatters, strict=True))
    freedoms = sum(freedom for _, freedom, _ in scatters)
    runs = (float(sum(variances)), float(sum(variances) ** 2 / spread) if spread else freedoms)
    deviation = math.sqrt(np.mean(squares))
    return Difference(
        value,
        [runs, (float(max(0.0, from_recordings - known)), recordings - 1)],
        value / deviation * (1 - 3 / (4 * freedoms - 1)) if deviation else None,
    )


def _scatters(reference: Runs, other: Runs) -> list[tuple[np.ndarray, int, int]]:
    """How runs scatter, for `difference`; empty if the runs do not show it.

    Returns:
        Matrices that turn the scores of all runs into deviations, each with its degrees of freedom and number of
        deviations. The sum of squared deviations, divided by both, is a part of the variance of the difference.
    """
    folds = [np.asarray(side.folds) for side in (reference, other)]
    if sorted(map(str, reference.keys)) == sorted(map(str, other.keys)) and len(set(other.keys)) == len(other.keys):
        units = [np.array([f"{fold} {seed}" for fold, seed in side.keys]) for side in (reference, other)]
    elif min(np.unique(one, return_counts=True)[1].min() for one in folds) > 1:
        counts = [len(one) for one in folds]
        return [
            (np.pad(np.eye(count) - _means(one, one), ((0, 0), pad)), count - len(set(one)), count)
            for one, count, pad in zip(folds, counts, [(0, counts[1]), (counts[0], 0)], strict=True)
        ]
    else:
        units = folds
    names = np.unique(units[0])
    pairs = np.hstack([-_means(names, units[0]), _means(names, units[1])])
    return [(pairs - pairs.mean(axis=0), len(names) - 1, len(names))] if len(names) > 1 else []


def _means(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(rows, columns) matrix that takes the mean of the columns of the same name as the row."""
    same = (rows[:, None] == columns).astype(float)
    return same / same.sum(axis=1, keepdims=True)


def holm(p: Sequence[float]) -> list[tuple[float, float]]:
    """Holm's correction (1979) for several tests.

    Returns:
        For each test the corrected p, and the level of its interval. The interval excludes 0 exactly if the corrected p
        is below 5 %.
    """
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    return [(min(1.0, float(one)), float(1 - (1 - LEVEL) * raw / one)) for raw, one in zip(p, corrected, strict=True)]


def error_reduction(reference: float, other: float) -> float | None:
    """How much smaller the error rate of the other is, in %, from accuracies; None if the reference makes no error."""
    return None if reference == 1 else 100 * (other - reference) / (1 - reference)


def mcnemar_exact(reference: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test (1947): if two models are equal, each wins half of the clips on which they differ.

    Args:
        reference, other: (clips,), whether the model is right.

    Returns:
        Number of clips that only the reference has right, number that only the other has right, and the two-sided p.
    """
    lost, won = int((reference & ~other).sum()), int((other & ~reference).sum())
    return lost, won, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def accuracy(scores: np.ndarray, references: np.ndarray, recordings: np.ndarray, count: int) -> Score:
    """Accuracy of a run, and the effects of the recordings.

    Args:
        scores: (clips, classes), higher where a class is likelier.
        references: (clips, classes), 0 or 1.
        recordings: (clips,) number of the recording.
        count: Number of recordings.

    Returns:
        The score, and (count,) how much higher it is with each recording than without it.
    """
    right = np.take_along_axis(references, scores.argmax(axis=1)[:, None], axis=1)
    return _ratio(*(_by_recording(values, recordings, count) for values in (right, np.ones_like(right))))


def macro_f1(scores: np.ndarray, references: np.ndarray, recordings: np.ndarray, count: int) -> Score:
    """F1, averaged over the classes that occur in labels or predictions; see `accuracy`."""
    predicted = np.eye(references.shape[1])[scores.argmax(axis=1)]
    values = 2 * predicted * references, predicted + references
    return _ratio(*(_by_recording(one, recordings, count) for one in values))


def mean_average_precision(scores: np.ndarray, references: np.ndarray, recordings: np.ndarray, count: int) -> Score:
    """mAP, averaged over the classes that occur; see `accuracy`. The effects are of first order."""
    values, above, classes = [], np.zeros(count), np.zeros(count)  # the last two: without each recording
    for label in np.flatnonzero(references.any(axis=0)):
        positive = references[:, label] > 0
        value, influence = average_precision(scores[:, label], positive)
        # As in a mean, leaving out a share of the clips of a class moves the rest by one over what is left of them.
        left = positive.sum() - np.bincount(recordings, positive, count)
        moved = np.bincount(recordings, influence, count) * positive.sum()
        above += np.divide(value * left - moved, left, where=left > 0, out=np.zeros(count))
        classes += left > 0
        values.append(value)
    return float(np.mean(values)), np.mean(values) - above / classes


def _by_recording(values: np.ndarray, recordings: np.ndarray, count: int) -> np.ndarray:
    """Sums of (clips, columns) over the clips of each recording, (count, columns)."""
    return np.stack([np.bincount(recordings, column, count) for column in values.T], axis=1)


def _ratio(above: np.ndarray, below: np.ndarray) -> Score:
    """Mean ratio of the sums over (recordings, columns), and the effects of the recordings on it."""
    value = _mean_ratio(above.sum(axis=0), below.sum(axis=0))
    return float(value), value - _mean_ratio(above.sum(axis=0) - above, below.sum(axis=0) - below)


def _mean_ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Mean of the ratios over the last axis, without those whose denominator is 0."""
    return np.divide(above, below, where=below > 0, out=np.zeros(below.shape)).sum(axis=-1) / (below > 0).sum(axis=-1)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray]:
    """Average precision of a class, and its derivative by the weight of each clip.

    It is the mean, over the positive clips, of hits / clips, both counted among the clips that score no lower.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive_ranked = -scores[order], positive[order]
    last = np.searchsorted(ranked, ranked, side="right")  # of the clips that score the same
    first = np.searchsorted(ranked, ranked, side="left")
    hits = positive_ranked.cumsum()[last - 1]
    precision = hits / last
    value = precision[positive_ranked].mean()
    # A clip counts among the hits and the clips of the positive clips that score no higher.
    as_hit, as_clip = ((positive_ranked * part)[::-1].cumsum()[::-1][first] for part in (1 / last, precision / last))
    influence = np.empty(len(scores))
    influence[order] = (positive_ranked * (precision - value + as_hit) - as_clip) / positive.sum()
    return float(value), influence


SCORES = {"accuracy": accuracy, "macro_f1": macro_f1, "mAP": mean_average_precision}
