"""Compare sides of finished runs.

    python compare.py BASELINE DENDRITIC [--output FOLDER]
    python compare.py --side plain RUN ... --side wide RUN ... --side dendrites RUN ... [--output FOLDER]

The first side is the reference. The runs of a side differ in their seeds or test folds. All sides must have the same
test folds. The score of a side is the mean over its runs. The intervals of the differences cover other recordings and,
with several runs on each side, other seeds. Writes comparison.md, comparison.csv, comparison.png and comparison.json.
If each of two sides has one run, comparison.json is also written into both run folders, for their model cards.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("runs", nargs="*", type=Path, metavar="BASELINE DENDRITIC", help="Two run folders.")
PARSER.add_argument(
    "--side",
    nargs="+",
    action="append",
    default=[],
    metavar=("NAME", "RUN"),
    help="Name of a side, and its run folders.",
)
PARSER.add_argument("--output", type=Path, help="Default: DENDRITIC, or `comparison` beside the last runs.")
if __name__ == "__main__":
    PARSER.parse_args()  # here, so that --help does not wait for the imports below

from audio_dendrites.errors import run_program
from audio_dendrites.results.comparison import write_comparison


def main(arguments: Sequence[str]) -> None:
    """Read the command line, compare and print."""
    options = PARSER.parse_args(arguments)
    named = {name: [Path(run) for run in runs] for name, *runs in options.side}
    if len(options.runs) == 2 and not named:
        named = {name: [run] for name, run in zip(("baseline", "dendritic"), options.runs, strict=True)}
    elif options.runs or len(named) < max(2, len(options.side)) or not all(named.values()):
        PARSER.error("expected two run folders, or --side NAME RUN ... twice or more, each with a name of its own")
    last = list(named.values())[-1][0]
    write_comparison(named, options.output or (last if options.runs else last.resolve().parent / "comparison"))


if __name__ == "__main__":
    run_program(main)
