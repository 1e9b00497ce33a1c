"""Classify sound files, and all files in folders, with a finished run or a model of the Hub.

    python predict.py RUN PATH [PATH ...] [--top_k 3] [--output predictions.csv] [--timeline windows.csv]

Files may have any rate and any format of libsndfile (wav, flac, ogg, mp3, ...). With PyAV installed (pip install av)
it also reads the sound of m4a, mp4, webm and other files. Clips longer than the window of the model are classified in
overlapping windows, as in the test of the run. If files cannot be read, their names are printed at the end, and the
exit code is 1.
"""

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("run", metavar="RUN", help="Run folder, Hub id, or Hub id@revision.")
PARSER.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="Sound files, or folders of them.")
PARSER.add_argument("--top_k", type=int, default=3, help="Number of classes to show for each file. Default: 3.")
PARSER.add_argument("--batch_size", type=int, default=16, help="Windows in a batch. Default: 16.")
PARSER.add_argument("--output", type=Path, metavar="FILE", help="CSV file for the scores of all classes.")
PARSER.add_argument(
    "--timeline",
    type=Path,
    metavar="FILE",
    help="File for the scores of each window: CSV, or labels for Audacity if the name ends in .txt.",
)
PARSER.add_argument(
    "--embeddings",
    type=Path,
    metavar="FILE",
    help="Parquet file for what the last layer gets of each file, the mean over its windows.",
)
PARSER.add_argument(
    "--trust_remote_code",
    action="store_true",
    help="Run the Python code in the repository of a model that needs it. Read the code first.",
)
if __name__ == "__main__":
    PARSER.parse_args()  # here, so that --help does not wait for the imports below

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm
from transformers import PreTrainedConfig

from audio_dendrites.data.audio import SUFFIXES
from audio_dendrites.errors import UserError, run_program
from audio_dendrites.files import written_whole
from audio_dendrites.models.finished import load_finished, revision_of, split_revision
from audio_dendrites.recipes import check_range
from audio_dendrites.results.inference import Answer, classify_clips
from audio_dendrites.results.tables import markdown_table

RANGES = {"top_k": "[1, inf)", "batch_size": "[1, inf)"}
ROWS = 1000  # of the Parquet file that are written at once
Write = Callable[[Path, Answer], object]


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder by the sound files in it and below it, sorted."""
    found = []
    for path in paths:
        below = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        found += sorted(below) if path.is_dir() else [path]
    return found


@contextmanager
def scores_file(path: Path, config: PreTrainedConfig, run: str) -> Iterator[Write]:
    """A CSV file with a row for each file: its name, and the score of each class."""
    with written_whole(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        write(["file", *config.id2label.values()])
        yield lambda name, answer: write([name, *map(str, answer.scores)])


@contextmanager
def timeline_file(path: Path, config: PreTrainedConfig, run: str) -> Iterator[Write]:
    """A row for each window: file, start and end in seconds, and the score of each class, as CSV.

    A .txt file has Audacity's labels: the class of each window and its score, or all classes above 0.5 if the model is
    multi-label.
    """
    names, many = list(config.id2label.values()), config.problem_type == "multi_label_classification"

    def windows(name: Path, answer: Answer) -> None:
        for span, scores in zip(answer.spans, answer.window_scores, strict=True):
            write([name, *(f"{second:.3f}" for second in span), *map(str, scores)])

    def labels(name: Path, answer: Answer) -> None:
        for span, scores in zip(answer.spans, answer.window_scores, strict=True):
            for label in np.flatnonzero(scores > 0.5) if many else [scores.argmax()]:
                write([*(f"{second:.6f}" for second in span), f"{names[label]} {scores[label]:.2f}"])

    audacity = path.suffix.lower() == ".txt"
    with written_whole(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file, "excel-tab" if audacity else "excel", lineterminator="\n").writerow
        if not audacity:
            write(["file", "start", "end", *names])
        yield labels if audacity else windows


@contextmanager
def embeddings_file(path: Path, config: PreTrainedConfig, run: str) -> Iterator[Write]:
    """A Parquet file with a row for each file: its name, and its embedding, a list of float32.

    The metadata of the file name the model and, if it came from the Hub, its revision.
    """
    metadata = {"model": split_revision(run)[0], "revision": revision_of(run) or ""}
    schema = pa.schema({"file": pa.string(), "embedding": pa.list_(pa.float32())}, metadata)
    rows = []

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(rows, schema))
        rows.clear()

    def write(name: Path, answer: Answer) -> None:
        rows.append({"file": str(name), "embedding": answer.embedding})
        if len(rows) == ROWS:
            flush()

    with written_whole(path) as beside, pyarrow.parquet.ParquetWriter(beside, schema) as writer:
        yield write
        flush()


def best_classes(answer: Answer, names: Sequence[str], top_k: int) -> list[str | float]:
    """The names and scores of the classes with the highest scores, alternating."""
    best = np.argsort(answer.scores)[::-1][:top_k]
    return [cell for label in best for cell in (names[label], float(answer.scores[label]))]


FILES = {"output": scores_file, "timeline": timeline_file, "embeddings": embeddings_file}  # by option


def main(arguments: Sequence[str]) -> None:
    """Read the command line, classify, print, and write the files."""
    options = PARSER.parse_args(arguments)
    for name, interval in RANGES.items():
        check_range(f"--{name}", getattr(options, name), interval)
    files = find_files(options.paths)
    if not files:
        raise UserError(f"no sound file in {', '.join(map(str, options.paths))}")
    if options.timeline and options.timeline.suffix.lower() == ".txt" and len(files) > 1:
        raise UserError(f"--timeline must be a .csv file for {len(files)} files: Audacity's labels are of one file")
    paths = {option: path for option in FILES if (path := getattr(options, option))}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    model, extractor = load_finished(options.run, options.trust_remote_code)
    names, faults = list(model.config.id2label.values()), []
    places = range(1, 1 + min(options.top_k, len(names)))
    best = [["file", *(text for place in places for text in (f"class {place}", "score"))]]
    clips = [{"bytes": None, "path": str(file)} for file in files]
    answers = classify_clips(model, extractor, clips, options.batch_size, "embeddings" in paths)
    with ExitStack() as opened:
        writers = [
            opened.enter_context(FILES[option](path, model.config, options.run)) for option, path in paths.items()
        ]
        for file, answer in zip(files, tqdm(answers, total=len(files), unit=" files", disable=None), strict=True):
            if answer.fault:
                faults.append(answer.fault)
                continue
            best.append([str(file), *best_classes(answer, names, len(places))])
            for write in writers:
                write(file, answer)
    if len(best) > 1:
        print(markdown_table(best))
    for path in paths.values():
        print(f"Written to {path}")
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} of {len(files)} files could not be classified:", *faults]))


if __name__ == "__main__":
    run_program(main)
