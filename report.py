"""Write the page of mistakes: `python report.py --help`. The program is in audio_dendrites/results/listen.py."""

import sys

from audio_dendrites.errors import UserError
from audio_dendrites.results.listen import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
