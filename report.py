"""Write a page with the mistakes of finished runs: sounds, spectrograms, scores, confusions and calibration.

    python report.py RUN [RUN ...] [--clips 60] [--output FILE]

Several runs must have tested the same clips. The sounds come from the data set of the first run, so the data set must
be on this machine. The page is one file that needs no network. It holds sounds, so publish.py does not send it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folders of finished runs.")
PARSER.add_argument("--clips", type=int, default=60, help="The most clips that the page has. Default: 60.")
PARSER.add_argument("--dataset", help="The data set, if it is not where the recipe says.")
PARSER.add_argument("--output", type=Path, metavar="FILE", help="Default: report.html in RUN, or beside several.")
if __name__ == "__main__":
    PARSER.parse_args()  # here, so that --help does not wait for the imports below

from audio_dendrites.errors import UserError, run_program
from audio_dendrites.files import written_whole
from audio_dendrites.results.listen import page


def main(arguments: Sequence[str]) -> None:
    """Read the command line, write the page and say where it is."""
    options = PARSER.parse_args(arguments)
    if options.clips < 1:
        raise UserError(f"--clips must be 1 or more, got {options.clips}")
    first = options.runs[0]
    output = options.output or (first.resolve().parent if options.runs[1:] else first) / "report.html"
    html = page(options.runs, options.clips, options.dataset)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as path:
        path.write_text(html, encoding="utf-8")
    size = output.stat().st_size / 1e6
    print(f"Written to {output} ({size:.1f} MB). The page holds sounds, so publish.py does not send it.")


if __name__ == "__main__":
    run_program(main)
