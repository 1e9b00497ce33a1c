"""Whether two classifiers that were tested on the same clips differ."""

import numpy as np
from scipy.stats import binomtest

CHUNK = 1000  # bootstrap draws at a time: so many times the groups are in memory


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
    draws: int = 10_000,
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
    if len(groups) != len(baseline):
        raise ValueError(f"found {len(groups)} groups for {len(baseline)} clips")
    _, number = np.unique(groups, return_inverse=True)
    differences, clips = np.bincount(number, other - baseline), np.bincount(number)
    random, count = np.random.default_rng(seed), len(clips)
    drawn = []
    for start in range(0, draws, CHUNK):
        picked = random.integers(count, size=(min(CHUNK, draws - start), count))
        drawn.append(differences[picked].sum(axis=1) / clips[picked].sum(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _paired(baseline: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    baseline, other = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    if baseline.shape != other.shape or not len(baseline):
        raise ValueError(f"found {baseline.shape} and {other.shape}, wanted the same clips, at least one")
    return baseline, other
