"""Classify sound files, and all in folders, with a finished run or a model of the Hub; --help explains the options.

    python predict.py RUN PATH [PATH ...] [--top_k 3] [--output predictions.csv]

Takes any format and rate that libsndfile reads. Clips longer than the model's window are classified by overlapping
windows, as the run was tested. A file that cannot be read is named and passed over; the exit code is 1 then.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
from pandas import DataFrame
from scipy.special import expit, softmax
from transformers import pipeline

from audio_dendrites.data.audio import BadClip, load_waveform
from audio_dendrites.data.windows import classify
from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole
from audio_dendrites.results.tables import markdown_table

# In folders; a file that is named is read whatever it is called.
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}


def find_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Files as they are, and of folders all sound files below them, sorted."""
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        else:
            yield path


def predict(run: str, files: Sequence[Path]) -> tuple[DataFrame, list[str]]:
    """The scores of files.

    Args:
        run: Run folder or Hub id.
        files: Sound files.

    Returns:
        A row for each file that could be read, `file` and a score for each class, softmax or, of a multi-label model,
        sigmoid; and what is wrong with the others.

    Raises:
        UserError: There is no such model.
    """
    try:
        classifier = pipeline("audio-classification", model=run, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run!r} is no finished run folder and no model of the Hub: {str(error).splitlines()[0]}"
        ) from error
    config, rows, faults = classifier.model.config, [], []
    rate, channel = classifier.feature_extractor.sampling_rate, getattr(config, "channel", "mean")
    scores = expit if config.problem_type == "multi_label_classification" else softmax
    for file in files:
        try:
            waveform = load_waveform({"bytes": None, "path": str(file)}, rate, channel=channel)
        except BadClip as error:
            faults.append(str(error))
        else:
            rows.append([str(file), *scores(classify(classifier, waveform))])
    return DataFrame(rows, columns=["file", *config.id2label.values()]), faults


def summary(predictions: DataFrame, top_k: int) -> str:
    """The highest scores of each file, as a Markdown table."""
    names = predictions.columns[1:]
    rows = [["file", *(text for place in range(1, top_k + 1) for text in (f"class {place}", "score"))]]
    for file, *scores in predictions.itertuples(index=False):
        best = np.argsort(scores)[::-1][:top_k]
        rows.append([file, *(cell for label in best for cell in (names[label], scores[label]))])
    return markdown_table(rows)


def main(arguments: Sequence[str]) -> None:
    """Classify, print, and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="Run folder or Hub id.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="Sound files, or folders of them.")
    parser.add_argument("--top_k", type=int, default=3, help="Classes shown of each file; default: 3.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="CSV file for the scores of all classes.")
    options = parser.parse_args(arguments)
    if options.top_k < 1:
        raise UserError(f"--top_k: found {options.top_k}, wanted 1 or more")
    files = list(find_files(options.paths))
    if not files:
        raise UserError(f"no sound file in {', '.join(map(str, options.paths))}")
    predictions, faults = predict(options.run, files)
    if len(predictions):
        print(summary(predictions, min(options.top_k, predictions.shape[1] - 1)))
    if options.output is not None:
        with written_whole(options.output) as beside:
            predictions.to_csv(beside, index=False)
        print(f"\nWritten to {options.output}")
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} of {len(files)} files could not be classified:", *faults]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
