"""The page of report.py: the mistakes of runs, to hear and to see."""

import base64
import io
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import soundfile
import yaml
from datasets import Audio
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.figure import Figure
from pandas import DataFrame, Series
from PIL import Image
from scipy.special import expit, log_softmax, softmax
from sklearn.calibration import calibration_curve
from torch.nn.functional import adaptive_avg_pool1d

from audio_dendrites.data.audio import BadClip, load_waveform
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.data.splits import encode_labels, is_multi_label
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments
from audio_dendrites.results.runs import read_same_tests, refuse
from audio_dendrites.results.scores import score_names

TEMPLATE = Path(__file__).with_name("listen.html.jinja")
RATE = 16000  # Hz
LONGEST = 30  # seconds of a clip that the page plays
BINS = 15  # of the expected calibration error, as Guo et al. (2017) have
SHOWN_CLASSES = 3  # of each run and clip
SHOWN_RECORDINGS = 10
LENGTHS = (0, 1, 2, 3, 5, 10, 30, np.inf)  # seconds
MEL_BANDS, FRAMES, LEVELS, RANGE = 64, 400, 64, 16  # of a spectrogram; the range is in nats, about 70 dB
FIGURES = ("learning_curves.png", "dendrites.png")  # the second one marks the growth
OUTCOMES = ("found", "missed", "false alarm")  # of a class of a multi-label clip


@dataclass
class Tested:
    """The test of one run. Its rows are the clips of the first run.

    Attributes:
        name: Name on the page.
        metrics: metrics.json.
        multi_label: Whether clips have lists of classes.
        probabilities: (clips, classes), the softmax or, after a training with the loss bce, the sigmoids.
        losses: (clips,), cross-entropy or binary cross-entropy.
        targets: (clips, classes), whether the clip has the class.
        guesses: (clips, classes), whether the run predicts the class.
    """

    name: str
    metrics: dict[str, Any]
    multi_label: bool
    probabilities: np.ndarray
    losses: np.ndarray
    targets: np.ndarray
    guesses: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether all classes of a clip are right, (clips,)."""
        return (self.targets == self.guesses).all(axis=1)

    @property
    def columns(self) -> Sequence[str]:
        """The columns of the confusion matrix. Its rows are the classes."""
        return OUTCOMES if self.multi_label else self.metrics["labels"]

    def cells(self, row: int) -> list[tuple[int, int]]:
        """The cells of the confusion matrix that count a clip: (row, column)."""
        target, guess = self.targets[row], self.guesses[row]
        if not self.multi_label:
            return [(int(target.argmax()), int(guess.argmax()))]
        outcomes = (target & guess, target & ~guess, guess & ~target)
        return [(label, column) for column, found in enumerate(outcomes) for label in np.flatnonzero(found).tolist()]

    def mistakes(self, row: int) -> list[tuple[int, int]]:
        """Those of the cells that are mistakes."""
        return [cell for cell in self.cells(row) if (cell[1] if self.multi_label else cell[0] != cell[1])]


def graded(name: str, metrics: dict[str, Any], table: DataFrame) -> Tested:
    """The test of one run; see `Tested`."""
    labels, bce, multi_label = metrics["labels"], metrics["loss"] == "bce", is_multi_label(table["label"])
    logits = np.stack(table["logits"]).astype(np.float64)
    targets, guesses = (encode_labels(table[column], labels) for column in ("label", "predicted"))
    if not multi_label:
        targets, guesses = (np.eye(len(labels))[numbers] for numbers in (targets, guesses))
    targets, guesses = targets > 0, guesses > 0
    if bce:
        probabilities, losses = expit(logits), (np.logaddexp(0, logits) - targets * logits).mean(axis=1)
    else:
        probabilities, losses = softmax(logits, axis=1), -log_softmax(logits, axis=1)[targets]
    return Tested(name, metrics, multi_label, probabilities, losses, targets, guesses)


def choose(runs: Sequence[Tested], count: int) -> list[int]:
    """Choose clips for the page: mistakes before clips that all runs have right.

    The clips with the same mistakes take turns with the others, so that a frequent mistake leaves space for rare ones.
    Of the clips with the same mistakes, those with a higher loss come first.

    Returns:
        At most `count` row numbers, sorted by the highest loss of any run, the highest first.
    """
    table = DataFrame({"loss": np.max([run.losses for run in runs], axis=0)})
    table["mistakes"] = [str(sorted({one for run in runs for one in run.mistakes(row)})) for row in table.index]
    table["right"] = np.all([run.right for run in runs], axis=0)
    table = table.sort_values("loss", ascending=False, kind="stable")
    table["turn"] = table.groupby("mistakes").cumcount()
    chosen = table.sort_values(["right", "turn"], kind="stable").head(count)
    return chosen.sort_values("loss", ascending=False, kind="stable").index.tolist()


def calibration(run: Tested) -> tuple[float, np.ndarray, np.ndarray]:
    """The expected calibration error of a run, and the means of the bins that are not empty.

    For clips of one class, the confidence is the highest score of the clip. For multi-label clips, each score of each
    class counts. The error is the mean distance between confidence and share, weighted by the size of the bins.

    Returns:
        The error, the mean confidence of each bin, and the share of right predictions, or positives, in each bin.
    """
    if run.multi_label:
        confidence, outcome = run.probabilities.ravel(), run.targets.ravel()
    else:
        confidence, outcome = run.probabilities.max(axis=1), run.right
    share, mean = calibration_curve(outcome, confidence, n_bins=BINS)
    sizes = np.bincount(np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence))  # as calibration_curve does
    return float(np.average(np.abs(share - mean), weights=sizes[sizes > 0])), mean, share


def plot_calibration(runs: Sequence[Tested]) -> bytes:
    """The reliability diagram as a PNG file."""
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    for run in runs:
        _, mean, share = calibration(run)
        axes.plot(mean, share, marker="o", label=textwrap.fill(run.name, 45))
    what = "share of positives" if runs[0].multi_label else "share of right predictions"
    axes.set(xlabel="score", ylabel=what, xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside lower center")
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def accuracies(clips: DataFrame, runs: Sequence[Tested]) -> dict[str, DataFrame]:
    """Accuracy by length, salience and source recording, where the data set has them.

    Args:
        clips: Rows with `seconds`, `group` and, if the data set has it, `salience`.
        runs: The tests of these clips.

    Returns:
        Tables by title. Their columns are the number of clips and the accuracy of each run.
    """
    names = [f"{low} to {high} s" if high < np.inf else f"over {low} s" for low, high in pairwise(LENGTHS)]
    keys = {"length": pandas.cut(clips["seconds"], LENGTHS, labels=names)}
    if "salience" in clips:
        keys["salience"] = clips["salience"]
    if (clips["group"] != clips.index).any():
        keys["source recording"] = clips["group"]
    right = DataFrame({number: run.right for number, run in enumerate(runs)}, index=clips.index)
    found = {}
    for title, key in keys.items():
        by = right.groupby(key, observed=True)
        table = by.mean()
        table.insert(0, "clips", by.size())
        if title == "source recording" and len(table) > SHOWN_RECORDINGS:
            mistakes = ((1 - table.drop(columns="clips")).sum(axis=1) * table["clips"]).sort_values(ascending=False)
            title = f"source recording, the {SHOWN_RECORDINGS} of {len(table)} with the most mistakes"
            table = table.loc[mistakes.index[:SHOWN_RECORDINGS]]
        found[title] = table
    return found


def seconds_of(audio: dict[str, Any], channel: str) -> float:
    """Length of a sound file. The file is decoded only if libsndfile does not know its format."""
    try:
        return soundfile.info(io.BytesIO(audio["bytes"]) if audio["bytes"] else audio["path"]).duration
    except soundfile.LibsndfileError:
        return len(load_waveform(audio, RATE, channel=channel)) / RATE


def mp3(waveform: np.ndarray) -> bytes:
    """An MP3 file of a waveform (samples,) at `RATE`, about 4 kB per second.

    All browsers play MP3, also Safari on old phones. Opus is as small, but needs a recent Safari. FLAC is about six
    times as large.
    """
    content = io.BytesIO()
    soundfile.write(content, waveform, RATE, format="MP3")
    return content.getvalue()


def spectrogram(waveform: np.ndarray) -> bytes:
    """A PNG file with the log-mel energies of a waveform (samples,) at `RATE`: a pixel for each band and frame."""
    extractor = BatchedASTFeatureExtractor(num_mel_bins=MEL_BANDS, sampling_rate=RATE, do_normalize=False)
    bands = extractor.log_mel([waveform])[0].T
    if bands.shape[1] > FRAMES:
        bands = adaptive_avg_pool1d(bands, FRAMES)
    levels = ((bands - bands.max()) / RANGE + 1).clip(0, 1).mul(LEVELS - 1).round().flip(0).byte().numpy()
    image = Image.fromarray(levels)
    image.putpalette((colormaps["magma"](np.linspace(0, 1, LEVELS))[:, :3] * 255).astype(np.uint8).tobytes())
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def breakable(name: str) -> Markup:
    """A name that may break behind punctuation if the screen is narrow, as HTML."""
    return Markup(re.sub(r"(?<=[_/.-])(?=\w)", "<wbr>", str(escape(name))))


def data_uri(kind: str, content: bytes) -> str:
    """A file as the address of an element of the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def data_of(folders: Sequence[Path], dataset: str | None) -> DataArguments:
    """The data fields of the first run that has a recipe. An ensemble has none.

    Raises:
        UserError: No run has a recipe.
    """
    for folder in folders:
        if (path := folder / "config.yaml").is_file():
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
            known = {field.name: recipe[field.name] for field in fields(DataArguments) if field.name in recipe}
            data = DataArguments(**known)
            return replace(data, dataset=dataset) if dataset else data
    raise UserError(f"one of the runs must have a config.yaml, which names the data set, got {folders[0]} without one")


def with_sounds(clips: DataFrame, data: DataArguments) -> tuple[DataFrame, Any]:
    """Add `seconds` and, if the data set has it, `salience`, to the tested clips. Also returns their sounds.

    Raises:
        UserError: The data set cannot be loaded, or lacks a clip.
    """
    sound, index = load_clips(data, more=("salience",))
    rows = Series(index.index, index=index["clip"])
    refuse(clips.loc[clips.index.difference(rows.index)], f"{data.dataset} must have the clips of the runs, but lacks")
    sound = sound.select(rows[clips.index]).cast_column(data.audio_column, Audio(decode=False))[data.audio_column]
    found, index = clips.assign(seconds=[seconds_of(audio, data.channel) for audio in sound]), index.set_index("clip")
    return found.join(index[[column for column in ("salience",) if column in index]]), sound


def tokens(row: int, runs: Sequence[Tested]) -> list[str]:
    """What the filters of the page look for: c<class>, m<mistake>, <run>/<cell>, and the state of a clip."""
    seen = np.any([run.targets[row] | run.guesses[row] for run in runs], axis=0)
    found = [f"c{one}" for one in np.flatnonzero(seen)]
    found += sorted({f"m{true}-{other}" for run in runs for true, other in run.mistakes(row)})
    found += [f"{number}/{true}-{other}" for number, run in enumerate(runs) for true, other in run.cells(row)]
    found += ["wrong"] * any(run.mistakes(row) for run in runs)
    return found + ["differ"] * (len({run.guesses[row].tobytes() for run in runs}) > 1)


def filters(rows: Sequence[int], runs: Sequence[Tested]) -> dict[str, list[tuple[str, str]]]:
    """The choices of each filter of the page: a token and its text. `rows` are the clips of the page."""
    labels, columns = runs[0].metrics["labels"], runs[0].columns
    mistakes = Counter(one for row in rows for one in {one for run in runs for one in run.mistakes(row)})
    seen = {token for row in rows for token in tokens(row, runs)}
    return {
        "class": [(f"c{one}", label) for one, label in enumerate(labels) if f"c{one}" in seen],
        "mistake": [
            (f"m{row}-{column}", f"{labels[row]} → {columns[column]} ({count})")
            for (row, column), count in mistakes.most_common()
        ],
        "clips": [("wrong", "mistakes only"), *[("differ", "runs disagree")] * (len(runs) > 1)],
    }


def shown_clip(row: int, clips: DataFrame, runs: Sequence[Tested], sound: Any, data: DataArguments) -> dict[str, Any]:
    """What the template shows of a clip."""
    labels, truth = runs[0].metrics["labels"], runs[0].targets[row]
    waveform = load_waveform(sound[row], RATE, channel=data.channel)[: LONGEST * RATE]
    best = np.concatenate([run.probabilities[row].argsort()[::-1][:SHOWN_CLASSES] for run in runs])
    classes = sorted({*np.flatnonzero(truth), *best}, key=lambda one: (not truth[one], one))
    return {
        "name": clips.index[row],
        "facts": clips.iloc[row].to_dict(),
        "heard": len(waveform) / RATE,
        "tokens": " ".join(tokens(row, runs)),
        "sound": data_uri("audio/mpeg", mp3(waveform)),
        "spectrogram": data_uri("image/png", spectrogram(waveform)),
        "truth": [labels[one] for one in np.flatnonzero(truth)],
        "answers": [
            ([labels[one] for one in np.flatnonzero(run.guesses[row])], bool(run.right[row]), run.losses[row])
            for run in runs
        ],
        "scores": [(labels[one], truth[one], [run.probabilities[row, one] for run in runs]) for one in classes],
    }


def shown_run(folder: Path, run: Tested) -> dict[str, Any]:
    """What the template shows of a run."""
    counts = np.zeros((len(run.metrics["labels"]), len(run.columns)), int)
    for row in range(len(run.targets)):
        for cell in run.cells(row):
            counts[cell] += 1
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    figures = [path for name in FIGURES if (path := folder / name).is_file()]
    return {
        "name": run.name,
        "scores": {name: run.metrics["test"][name] for name in score_names(run.metrics["test"])},
        "loss": run.losses.mean(),
        "ece": calibration(run)[0],
        "matrix": [list(zip(*each, strict=True)) for each in zip(counts, shares, strict=True)],
        "figures": [data_uri("image/png", path.read_bytes()) for path in figures],
    }


def page(folders: Sequence[Path], count: int, dataset: str | None = None) -> str:
    """The page as HTML.

    Args:
        folders: Run folders that tested the same clips.
        count: The most clips that the page has.
        dataset: The data set, if it is not where the recipe says.

    Raises:
        UserError: The runs do not fit together, or a sound cannot be loaded.
    """
    metrics, tables = read_same_tests(folders)
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else list(map(str, folders))
    runs = [graded(*each) for each in zip(names, metrics, tables, strict=True)]
    data, clips = data_of(folders, dataset), tables[0]
    try:
        clips, sound = with_sounds(clips, data)
        rows = choose(runs, count)
        shown = [shown_clip(row, clips, runs, sound, data) for row in rows]
    except BadClip as error:
        raise UserError(f"dataset: {data.dataset} must have the clips that the runs tested, got {error}") from error
    states = [tokens(row, runs) for row in range(len(clips))]
    templates = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    templates.filters["breakable"] = breakable
    return templates.get_template(TEMPLATE.name).render(
        dataset=Path(data.dataset).name,
        runs=[shown_run(*each) for each in zip(folders, runs, strict=True)],
        labels=runs[0].metrics["labels"],
        columns=runs[0].columns,
        multi_label=runs[0].multi_label,
        clips=shown,
        total=len(clips),
        wrong=sum("wrong" in found for found in states),
        differ=sum("differ" in found for found in states),
        tables=accuracies(clips, runs),
        reliability=data_uri("image/png", plot_calibration(runs)),
        filters=filters(rows, runs),
        longest=LONGEST,
        bins=BINS,
    )
