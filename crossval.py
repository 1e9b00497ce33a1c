"""Train recipes on every fold and seed, and put the results together. Several recipes are compared with the first one.

    python crossval.py configs/quickstart.yaml [--folds 1 2 3] [--seeds 42 43] [--last] [--field value ...]
    python crossval.py plain.yaml wide.yaml dendrites.yaml --seeds 1 2 3 [--collect] [--field value ...]

Each fold of the data set is the test fold once. The fold after it chooses the checkpoint, and the others train. With
--last no fold chooses: all others train, and the last weights are tested. A recipe that divides the data set without
folds is trained once for each seed.

A finished run is not repeated, and an interrupted one continues. If the same command runs several times at once, the
commands share the runs. Writes crossval.md, crossval.json and figures into the output_dir of the first recipe. With
several recipes, or with `baseline: true` in a single one, it also writes comparison.md, .csv, .png and .json.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--folds", nargs="+", metavar="FOLD", help="Test folds. Default: all folds of the recipe.")
PARSER.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="Default: the seed of the first recipe.")
PARSER.add_argument("--last", action="store_true", help="No fold chooses: train on all others, test the last step.")
PARSER.add_argument("--collect", action="store_true", help="Do not train. Put together what is finished.")
if __name__ == "__main__":
    PARSER.parse_known_args()  # here, so that --help does not wait for the imports below

import train
from audio_dendrites.errors import UserError, run_program
from audio_dendrites.recipes import Recipe, parse_recipe
from audio_dendrites.results.arms import check_arms, fold_recipes, sides_of, split_arms
from audio_dendrites.results.folds import collect
from audio_dendrites.results.report import is_finished
from audio_dendrites.training.checkpoints import check_run_folder
from pai_callback import PAIConfig, PAIError


def follows_score(pai: Mapping[str, Any] | None) -> bool:
    """Whether the growth of a `pai` block depends on the scores of evaluations. Early growth does not."""
    return pai is not None and PAIConfig.from_dict(pai).schedule != "early"


def check_last(recipe: Recipe) -> None:
    """Check that no score steers a training with --last.

    Raises:
        UserError: A score does.
    """
    args, pai = recipe.training, recipe.dendrites.pai
    steering = {
        "early_stopping_patience": args.early_stopping_patience,
        "pai": pai if follows_score(pai) else None,
        "lr_scheduler_type": "reduce_lr_on_plateau" if "plateau" in args.lr_scheduler_type else None,
    }
    for field, value in steering.items():
        if value is not None:
            raise UserError(
                f"{field} must not follow a validation score with --last, got {value}; the test fold is the only one "
                f"that could give the score. Unset {field} or leave out --last"
            )


def main(arguments: Sequence[str]) -> None:
    """Train the runs that no other command trains, and put the finished runs together."""
    options, rest = PARSER.parse_known_args(arguments)
    folder, words = split_arms(rest)
    bases = [parse_recipe(own) for own in words.values()]
    seeds = options.seeds or [bases[0].training.seed]
    for recipe in bases if options.last else []:
        check_last(recipe)
    arms = {name: fold_recipes(own, options.folds, seeds, options.last) for name, own in words.items()}
    check_arms({name: next(iter(recipes.values())) for name, recipes in arms.items()})
    recipes = [recipe for runs in zip(*(recipes.values() for recipes in arms.values()), strict=True) for recipe in runs]
    if options.collect:
        for run in (run for recipe in recipes for run in recipe.runs()):
            if is_finished(Path(run.training.output_dir)):
                check_run_folder(run)
    else:
        train.main(*recipes)
    if recipes[0].training.process_index == 0:
        collect(sides_of(arms), folder, ["python", "crossval.py", *arguments])


if __name__ == "__main__":
    run_program(main, PAIError)
