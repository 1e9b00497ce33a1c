"""Compare sides of finished runs: `python compare.py --help`. The program is audio_dendrites/results/comparison.py."""

import sys

from audio_dendrites.errors import UserError
from audio_dendrites.results.comparison import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
