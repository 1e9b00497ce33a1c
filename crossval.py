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
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from pandas import DataFrame, MultiIndex

import train
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments, Recipe, parse_recipe
from audio_dendrites.results.folds import collect
from audio_dendrites.results.report import is_finished
from audio_dendrites.training.checkpoints import check_run_folder
from pai_callback import PAIConfig, PAIError


def follows_score(pai: Mapping[str, Any] | None) -> bool:
    """Whether the growth of a `pai` block depends on the scores of evaluations. Early growth does not."""
    return pai is not None and PAIConfig.from_dict(pai).schedule != "early"


def split_arms(words: Sequence[str]) -> tuple[Path, dict[str, list[str]]]:
    """Divide a command line into the arguments of its recipes, the arms.

    Args:
        words: `[recipe.yaml ...] [--field value ...]`.

    Returns:
        The folder of the results, and the arguments of `parse_recipe` by the arm's name, which is that of its file.

    Raises:
        UserError: Two arms have the same name.
    """
    paths = list(takewhile(lambda word: not word.startswith("-"), words))
    fields = words[len(paths) :]
    folder, names = Path(parse_recipe([*paths[:1], *fields]).training.output_dir), [Path(path).stem for path in paths]
    if len(paths) < 2:
        return folder, {(names or ["default"])[0]: list(words)}
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the files of the recipes must have different names, got {twice[0]}.yaml more than once")
    return folder, {
        name: [path, "--weights_by_name", "true", *fields, "--baseline", "false", "--output_dir", str(folder / name)]
        for name, path in zip(names, paths, strict=True)
    }


def fold_recipes(
    arguments: Sequence[str], folds: Sequence[str] | None, seeds: Sequence[int], last: bool = False
) -> dict[tuple[str, int], Recipe]:
    """The recipe for each test fold and seed.

    Args:
        arguments: The arguments of `parse_recipe`.
        folds: Test folds. None means all folds of the recipe.
        seeds: Seeds.
        last: Whether all folds but the test fold train, and the last weights are tested.

    Returns:
        By test fold and seed. The run folders are `fold-<fold>-seed-<seed>` in the recipe's output_dir, or
        `seed-<seed>` if the recipe divides the data set without folds. Then the fold is "".

    Raises:
        UserError: The recipe does not have the folds that this takes, or `last` is set and a score steers the training.
    """
    recipe = parse_recipe(list(arguments))
    if last:
        check_last(recipe)
    found = {}
    for fold, split in _splits(recipe.data, folds, last).items():
        for seed in seeds:
            name = f"fold-{fold}-seed-{seed}" if fold else f"seed-{seed}"
            own = ["--seed", str(seed), "--output_dir", str(Path(recipe.training.output_dir, name))]
            own += ["--run_name", f"{recipe.training.run_name}-{name}"]
            found[fold, seed] = parse_recipe([*arguments, *split, *own])
    return found


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


def _splits(data: DataArguments, folds: Sequence[str] | None, last: bool) -> dict[str, list[str]]:
    """The fields that divide the data set for each test fold."""
    if data.train_folds is None:
        if folds or last:
            raise UserError(
                f"{'--folds' if folds else '--last'} must be left out, because the recipe divides the data set without "
                f"folds, got {' '.join(folds or ['--last'])}"
            )
        return {"": []}
    present = sorted({*data.train_folds, *data.validation_folds, *data.test_folds}, key=lambda fold: (len(fold), fold))
    least, uses = (2, "train and test") if last else (3, "train, choose and test")
    if len(present) < least:
        raise UserError(f"the recipe must name at least {least} folds ({uses}), got {', '.join(present)}")
    if strangers := sorted(set(folds or []) - set(present)):
        raise UserError(f"--folds must be folds of the recipe ({', '.join(present)}), got {', '.join(strangers)}")
    found = {}
    for fold in folds or present:
        after = fold if last else present[(present.index(fold) + 1) % len(present)]
        rest = [one for one in present if one not in (fold, after)]
        found[fold] = ["--train_folds", *rest, "--validation_folds", after, "--test_folds", fold]
        found[fold] += ["--load_best_model_at_end", "false"] if last else []
    return found


def check_arms(arms: Mapping[str, Recipe]) -> None:
    """Check that arms use the same clips, and print in which fields they differ from the first one.

    Args:
        arms: A run of each arm, of the same fold and seed.

    Raises:
        UserError: A field that chooses or divides the clips differs.
    """
    (reference, first), *others = arms.items()
    for name, recipe in others:
        one, other = first.to_dict(), recipe.to_dict()
        fields = [field for field in one | other if one.get(field) != other.get(field)]
        if alien := [field for field in fields if field in asdict(first.data) and field != "preprocessing_num_workers"]:
            field = alien[0]
            raise UserError(
                f"{field} must be the same in all recipes, got {one.get(field)} in {reference} and {other.get(field)} "
                f"in {name}"
            )
        own = sorted(set(fields) - {"output_dir", "run_name", "hub_model_id"})
        if first.training.process_index == 0:
            print(f"{name} differs from {reference} in {', '.join(own) or 'nothing'}.", flush=True)


def sides_of(arms: Mapping[str, Mapping[tuple[str, int], Recipe]]) -> DataFrame:
    """The run folders that `collect` takes: a column for each arm, or one for each kind of run if there is one arm."""
    found = {}
    for name, recipes in arms.items():
        for runs in zip(*(recipe.runs() for recipe in recipes.values()), strict=True):
            kind = "dendritic" if runs[0].dendrites.pai else "baseline"
            found[kind if len(arms) == 1 else name] = [Path(run.training.output_dir) for run in runs]
    return DataFrame(found, MultiIndex.from_tuples(next(iter(arms.values())), names=["fold", "seed"]))


def main(arguments: Sequence[str]) -> None:
    """Train the runs that no other command trains, and put together those that are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", metavar="FOLD", help="Test folds. Default: all of the recipe.")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="Default: that of the first recipe.")
    parser.add_argument("--last", action="store_true", help="No fold chooses: train on all others, test the last step.")
    parser.add_argument("--collect", action="store_true", help="Do not train. Put together what is finished.")
    options, rest = parser.parse_known_args(arguments)
    folder, arms = split_arms(rest)
    seeds = options.seeds or [parse_recipe(next(iter(arms.values()))).training.seed]
    arms = {name: fold_recipes(words, options.folds, seeds, options.last) for name, words in arms.items()}
    check_arms({name: next(iter(recipes.values())) for name, recipes in arms.items()})
    recipes = [recipe for runs in zip(*(recipes.values() for recipes in arms.values()), strict=True) for recipe in runs]
    if options.collect:
        for run in (run for recipe in recipes for run in recipe.runs()):
            if is_finished(Path(run.training.output_dir)):
                check_run_folder(run)
    else:
        train.main(*recipes)
    if recipes[0].training.process_index == 0:
        collect(sides_of(arms), folder, ["python", *sys.argv])


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audio_dendrites").setLevel(logging.INFO)
    try:
        main(sys.argv[1:])
    except (UserError, PAIError) as error:
        sys.exit(f"error: {error}")
