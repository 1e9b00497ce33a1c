"""Write the page of mistakes: `python report.py --help`. The program is in audio_dendrites/results/listen.py."""

from audio_dendrites.errors import run_program
from audio_dendrites.results.listen import main

if __name__ == "__main__":
    run_program(main)
