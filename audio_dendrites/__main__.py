"""The command `audio-dendrites PROGRAM ...` runs PROGRAM.py, from any folder and without a clone.

It runs the file as `python PROGRAM.py ...` does. `accelerate launch -m audio_dendrites train ...` uses several devices.
"""

import argparse
import runpy
import sys

from audio_dendrites.files import ROOT

PROGRAMS = ("train", "crossval", "compare", "ensemble", "report", "predict", "publish", "app")


def main() -> None:
    """Run the program that the first word of the command line names, with the words after it."""
    parser = argparse.ArgumentParser(
        prog="audio-dendrites",
        usage="%(prog)s {" + ",".join(PROGRAMS) + "} ...",
        description="Fine-tune audio classifiers with dendrites. `%(prog)s PROGRAM --help` explains each program.",
    )
    parser.add_argument("program", choices=PROGRAMS, help=argparse.SUPPRESS)
    file = str(ROOT / f"{parser.parse_args(sys.argv[1:2]).program}.py")
    sys.argv[:2] = [file]
    sys.path.insert(0, str(ROOT))  # the programs import each other, and no other program sees their names
    runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    main()
