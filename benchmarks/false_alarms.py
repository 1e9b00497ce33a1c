"""How often compare.py finds a significant difference, if both sides are equally good and if they are not.

    PYTHONPATH=. python benchmarks/false_alarms.py [--comparisons 4000] [--score accuracy]

Simulates runs of ten classes on 150 source recordings of 1 to 11 clips. The expected accuracy of a run is 70 %, plus
seed noise with a standard deviation of 0, 3 or 6 points. Its logits add up noise of the recording, of side and
recording, of run and recording, and of run and clip. Prints a Markdown table of the share of comparisons that are
significant at 5 %, in %, for each number of folds and of seeds on a side:

- paired, unpaired: false alarms of compare.py, with equal or different seeds on both sides. The expected accuracies are
  equal. With one run on each side, they are those of the two models, because the claim is about two models. With
  several runs, they are those of the two recipes, and seeds scatter the models.
- power: the same if the other side is 5 points better.
- bootstrap, hierarchical: for contrast, false alarms about recipes if the percentiles of a bootstrap decide, either of
  recordings alone, or of runs and recordings.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import ndtr
from scipy.stats import norm

from audio_dendrites.results.statistics import SCORES, Runs, difference
from audio_dendrites.results.tables import markdown_table

CLASSES, RECORDINGS, ACCURACY, GAIN = 10, 150, 0.70, 0.05
# Variances of the logits' noise; their sum is 1.
SHARES = {"recording": 0.4, "side and recording": 0.1, "run and recording": 0.2, "run and clip": 0.3}
DRAWS = 1000
COLUMNS = ("bootstrap", "hierarchical", "paired", "unpaired", "power, paired", "power, unpaired")

STRENGTHS = np.linspace(-3, 8, 1101)
NODES = np.linspace(-6, 6, 241)
EXPECTED = (ndtr(NODES + STRENGTHS[:, None]) ** (CLASSES - 1) * norm.pdf(NODES)).sum(axis=1) * (NODES[1] - NODES[0])


def strengths(accuracies: np.ndarray) -> np.ndarray:
    """How much higher the logit of the right class must be for a run to have this expected accuracy."""
    return np.interp(accuracies, EXPECTED, STRENGTHS)


class Study:
    """Clips of recordings, and runs that classify them."""

    def __init__(self, random: np.random.Generator, folds: int, seeds: int):
        self.random = random
        sizes = random.integers(1, 12, RECORDINGS)
        self.group = np.repeat(np.arange(RECORDINGS), sizes)
        self.labels = random.integers(CLASSES, size=RECORDINGS)[self.group]
        self.fold = (np.arange(RECORDINGS) % folds)[self.group]
        self.references = np.eye(CLASSES)[self.labels]
        self.cells = [(fold, seed) for fold in range(folds) for seed in range(seeds)]

    def noise(self, share: str, rows: int) -> np.ndarray:
        return self.random.standard_normal((rows, CLASSES), dtype=np.float32) * np.float32(np.sqrt(SHARES[share]))

    def sides(self, accuracies: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Logits of each run of each side, of the clips of its fold."""
        common, found = self.noise("recording", RECORDINGS), []
        for side in accuracies:
            base = common + self.noise("side and recording", RECORDINGS)
            found.append([])
            for (fold, _), strength in zip(self.cells, strengths(side), strict=True):
                logits = (base + self.noise("run and recording", RECORDINGS))[self.group]
                logits += self.noise("run and clip", len(self.group)) + strength * self.references
                found[-1].append(logits[self.fold == fold])
        return found

    def runs_of(self, logits: Sequence[np.ndarray], score: str) -> Runs:
        """The side in the form of compare.py."""
        found = []
        for (fold, _), one in zip(self.cells, logits, strict=True):
            mine = self.fold == fold
            found.append(SCORES[score](one, self.references[mine], self.group[mine], RECORDINGS))
        scores, effects = zip(*found, strict=True)
        folds, seeds = zip(*self.cells, strict=True)
        return Runs(np.array(scores), np.stack(effects, axis=1), list(map(str, folds)), seeds)


def bootstraps(study: Study, sides: Sequence[Sequence[np.ndarray]], times: np.ndarray) -> tuple[bool, bool]:
    """Whether the 95 % of draws exclude 0: of recordings, and of recordings and runs. For accuracy and one fold.

    Args:
        study, sides: The clips, and the result of `Study.sides`.
        times: (draws, recordings), how often a draw has each recording.
    """
    clips = times @ np.bincount(study.group, minlength=RECORDINGS)
    recordings, hierarchical = 0.0, 0.0
    for sign, logits in zip((-1, 1), sides, strict=True):
        right = [np.bincount(study.group, one.argmax(1) == study.labels, minlength=RECORDINGS) for one in logits]
        drawn = times @ np.stack(right, axis=1).astype(np.float32) / clips[:, None]
        picked = study.random.integers(len(logits), size=drawn.shape)
        recordings += sign * drawn.mean(axis=1)
        hierarchical += sign * np.take_along_axis(drawn, picked, axis=1).mean(axis=1)
    ends = [np.quantile(drawn, [0.025, 0.975]) for drawn in (recordings, hierarchical)]
    return tuple(bool(low > 0 or high < 0) for low, high in ends)


def rates(random: np.random.Generator, noise: float, folds: int, seeds: int, options: argparse.Namespace) -> list[str]:
    """A row of the table."""
    found: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    times = random.multinomial(RECORDINGS, np.full(RECORDINGS, 1 / RECORDINGS), size=DRAWS).astype(np.float32)
    for _ in range(options.comparisons):
        study = Study(random, folds, seeds)
        scattered = ACCURACY + noise * random.standard_normal((2, folds * seeds))
        if folds == 1 and options.score == "accuracy":
            for name, alarm in zip(COLUMNS[:2], bootstraps(study, study.sides(scattered), times), strict=True):
                found[name].append(alarm)
        equal = scattered[[0, 0]] if folds * seeds == 1 else scattered
        for gain, columns in ((0.0, COLUMNS[2:4]), (GAIN, COLUMNS[4:])):
            reference, other = (study.runs_of(side, options.score) for side in study.sides(equal + [[0.0], [gain]]))
            others = other, replace(other, seeds=[seed + seeds for seed in other.seeds])
            for one, column in zip(others, columns, strict=True):
                low, high = difference(reference, one).interval()
                found[column].append(low > 0 or high < 0)
    shares = [f"{100 * np.mean(hits):.1f}" if hits else "" for hits in found.values()]
    return [f"{100 * noise:.0f}", str(folds), str(seeds), *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=4000, help="Number for each cell of the table.")
    parser.add_argument("--score", choices=list(SCORES), default="accuracy")
    options = parser.parse_args()
    rows = [["seed noise, points", "folds", "seeds", *COLUMNS]]
    for folds, seeds in ((1, 1), (1, 3), (1, 5), (5, 1), (2, 3)):
        for noise in (0.0, 0.03, 0.06):
            rows.append(rates(np.random.default_rng([folds, seeds, int(100 * noise)]), noise, folds, seeds, options))
            print(rows[-1], flush=True)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
