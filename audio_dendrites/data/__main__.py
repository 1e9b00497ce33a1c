"""Download or describe the data set of a recipe.

python -m audio_dendrites.data download configs/urbansound8k/ast.yaml [--field value ...]
python -m audio_dendrites.data stats configs/urbansound8k/ast.yaml [--field value ...]
"""

import argparse
import logging
import sys

from audio_dendrites.data.download import download
from audio_dendrites.data.stats import stats
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_extractor
from audio_dendrites.recipes import parse_recipe

COMMANDS = {
    "download": download,
    "stats": lambda recipe: stats(recipe, load_extractor(recipe.model, recipe.features)),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m audio_dendrites.data",
        usage="%(prog)s {" + ",".join(COMMANDS) + "} RECIPE [--field value ...]",
        description="download: fetch the data set and the base model of a recipe, for machines without network. "
        "stats: print counts, lengths, rates, leaks, and mean and std of the log-mel.",
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    try:
        COMMANDS[command](parse_recipe(argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audio_dendrites").setLevel(logging.INFO)
    main(sys.argv[1:])
