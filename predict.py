"""Classify sound files, and all files in folders, with a finished run or a model of the Hub.

    python predict.py RUN PATH [PATH ...] [--top_k 3] [--output predictions.csv]

Files may have any rate and any format of libsndfile (wav, flac, ogg, mp3, ...). With PyAV installed (pip install av)
it also reads the sound of m4a, mp4, webm and other files. Clips longer than the window of the model are classified in
overlapping windows, as in the test of the run. If files cannot be read, their names are printed at the end, and the
exit code is 1.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("run", metavar="RUN", help="Run folder or Hub id.")
PARSER.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="Sound files, or folders of them.")
PARSER.add_argument("--top_k", type=int, default=3, help="Number of classes to show for each file. Default: 3.")
PARSER.add_argument("--output", type=Path, metavar="FILE", help="CSV file for the scores of all classes.")
PARSER.add_argument(
    "--trust_remote_code",
    action="store_true",
    help="Run the Python code in the repository of a model that needs it. Read the code first.",
)
if __name__ == "__main__":
    PARSER.parse_args()  # here, so that --help does not wait for the imports below

import numpy as np
from pandas import DataFrame
from transformers import pipeline

from audio_dendrites.data.audio import SUFFIXES, BadClip, load_waveform
from audio_dendrites.data.windows import classify, to_scores
from audio_dendrites.errors import UserError, run_program
from audio_dendrites.files import written_whole
from audio_dendrites.models.finished import load_finished
from audio_dendrites.results.tables import markdown_table


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder by the sound files in it and below it, sorted."""
    found = []
    for path in paths:
        below = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        found += sorted(below) if path.is_dir() else [path]
    return found


def predict(run: str, files: Sequence[Path], trust_remote_code: bool = False) -> tuple[DataFrame, list[str]]:
    """Classify sound files with a run folder or a model of the Hub.

    Returns:
        A table with a row for each file that could be read: `file` and a score for each class, which is a sigmoid for
        a multi-label model, otherwise the softmax. And what is wrong with each of the other files.

    Raises:
        UserError: The model cannot be loaded.
    """
    model, extractor = load_finished(run, trust_remote_code)
    classifier = pipeline("audio-classification", model=model, feature_extractor=extractor)
    rows, faults, channel = [], [], getattr(model.config, "channel", "mean")
    for file in files:
        try:
            waveform = load_waveform({"bytes": None, "path": str(file)}, extractor.sampling_rate, channel=channel)
        except BadClip as error:
            faults.append(str(error))
        else:
            rows.append([str(file), *to_scores(classifier, classify(classifier, waveform))])
    return DataFrame(rows, columns=["file", *model.config.id2label.values()]), faults


def summary(predictions: DataFrame, top_k: int) -> str:
    """The highest scores of each file, as a Markdown table."""
    names = predictions.columns[1:]
    rows = [["file", *(text for place in range(1, top_k + 1) for text in (f"class {place}", "score"))]]
    for file, *scores in predictions.itertuples(index=False):
        best = np.argsort(scores)[::-1][:top_k]
        rows.append([file, *(cell for label in best for cell in (names[label], scores[label]))])
    return markdown_table(rows)


def main(arguments: Sequence[str]) -> None:
    """Read the command line, classify, print, and write the CSV file."""
    options = PARSER.parse_args(arguments)
    if options.top_k < 1:
        raise UserError(f"--top_k must be 1 or more, got {options.top_k}")
    files = find_files(options.paths)
    if not files:
        raise UserError(f"no sound file in {', '.join(map(str, options.paths))}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    predictions, faults = predict(options.run, files, options.trust_remote_code)
    if len(predictions):
        print(summary(predictions, min(options.top_k, predictions.shape[1] - 1)))
    if options.output is not None:
        with written_whole(options.output) as beside:
            predictions.to_csv(beside, index=False)
        print(f"\nWritten to {options.output}")
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} of {len(files)} files could not be classified:", *faults]))


if __name__ == "__main__":
    run_program(main)
