"""Score several runs as one classifier, by the mean of their probabilities.

    python ensemble.py RUN RUN ... [--output FOLDER]

The runs must have tested the same clips. They may differ in their seeds, strides or training folds. Writes ensemble.md
and, so that compare.py accepts the folder as a run, metrics.json and predictions.parquet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folders of finished runs.")
PARSER.add_argument("--output", type=Path, metavar="FOLDER", help="Default: ensemble, beside the first run.")
if __name__ == "__main__":
    PARSER.parse_args()  # here, so that --help does not wait for the imports below

from audio_dendrites.errors import run_program
from audio_dendrites.results.ensemble import write_ensemble


def main(arguments: Sequence[str]) -> None:
    """Read the command line, put the runs together and print."""
    options = PARSER.parse_args(arguments)
    output = options.output or options.runs[0].resolve().parent / "ensemble"
    table = write_ensemble(options.runs, output)
    print(f"{table}\n\nWritten to {output}/ensemble.md, metrics.json and predictions.parquet")


if __name__ == "__main__":
    run_program(main)
