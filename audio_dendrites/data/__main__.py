"""Prepare or describe the data set of a recipe.

python -m audio_dendrites.data download configs/urbansound8k/ast.yaml [--field value ...]
python -m audio_dendrites.data stats configs/urbansound8k/ast.yaml [--field value ...]
python -m audio_dendrites.data features configs/urbansound8k/ast.yaml [--field value ...] [--shard i/n]
"""

import argparse
import logging
import re
import sys

from audio_dendrites.data.cache import check_cost, columns, fill_cache, stored_form
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.download import download
from audio_dendrites.data.features import PART_ROWS, parts_of
from audio_dendrites.data.splits import split_by_fold
from audio_dendrites.data.stats import log_mel_moments, stats, with_statistics
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_extractor
from audio_dendrites.recipes import Recipe, parse_recipe

COMMANDS = {
    "download": "Fetch the data set and the base model of a recipe, for machines without network.",
    "stats": "Print counts, lengths, rates, leaks, mean and std of the log-mel, and what each choice of `cache` costs.",
    "features": "Fill the cache of a recipe before its training. Machines with a shared disk can share the work.",
}


def features(recipe: Recipe, shard: tuple[int, int]) -> None:
    """Fill the cache of a recipe, as its training would.

    Args:
        recipe: The recipe.
        shard: (i, n) computes the parts i, i + n, i + 2n, … of `parts_of` only.

    Raises:
        UserError: The data set cannot be loaded, the disk is too full, or the features of a shard need statistics of
            all clips.
    """
    clips, index = load_clips(recipe.data)
    extractor = load_extractor(recipe.model, recipe.features)
    stored = stored_form(extractor, recipe.data.cache)
    count = len(parts_of(clips, stored, **columns(recipe.data)))
    if shard[0] >= count:
        return print(f"nothing to do: the parts are 0 to {count - 1}")
    if recipe.features.needs_statistics:
        if shard[1] > 1 and "mean" in stored.cache_key:
            raise UserError(
                "mean and std must be numbers with --shard, got auto, which needs all clips; `python -m "
                "audio_dendrites.data stats RECIPE` prints them"
            )
        moments = log_mel_moments(clips, recipe.data, extractor, shard)
        if "mean" in stored.cache_key:
            recipe = with_statistics(recipe, moments, split_by_fold(index, recipe.data)["train"])
            extractor = load_extractor(recipe.model, recipe.features)
            stored = stored_form(extractor, recipe.data.cache)
    check_cost(clips, extractor, [stored], recipe)
    done = fill_cache(clips, stored, recipe.data, shard=shard)
    parts = range(shard[0], count, shard[1])
    print(f"{len(done):,} of {len(clips):,} clips are in the cache (parts: {len(parts)} of {count})")


def shard_of(text: str) -> tuple[int, int]:
    """The numbers of a shard i/n.

    Raises:
        UserError: They are not whole numbers with i < n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard must be i/n with i from 0 to n - 1, such as 0/4, got {text!r}")
    return int(found[1]), int(found[2])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m audio_dendrites.data", description="Prepare the data of a recipe.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, text in COMMANDS.items():
        usage = "%(prog)s RECIPE [--field value ...]" + " [--shard i/n]" * (name == "features")
        command = commands.add_parser(name, help=text, description=text, usage=usage, allow_abbrev=False)
        command.epilog = "train.py --help explains the fields."
    command.add_argument(
        "--shard",
        default="0/1",
        metavar="i/n",
        help=f"Compute one of n shares, with i from 0 to n - 1. Shares consist of parts of {PART_ROWS:,} clips. The "
        "training finds the parts of all shares, and computes those that are missing. Default: all clips.",
    )
    options, words = parser.parse_known_args(argv)
    try:
        recipe = parse_recipe(words)
        if recipe.data.streaming and options.command != "features":
            raise UserError(f"streaming must be false for {options.command}, got true; add --streaming false")
        if options.command == "download":
            download(recipe)
        elif options.command == "stats":
            stats(recipe, load_extractor(recipe.model, recipe.features))
        else:
            features(recipe, shard_of(options.shard))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audio_dendrites").setLevel(logging.INFO)
    main(sys.argv[1:])
