"""The runs of a cross-validation: a recipe for each arm, test fold and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

from pandas import DataFrame, MultiIndex

from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments, Recipe, parse_recipe


def split_arms(words: Sequence[str]) -> tuple[Path, dict[str, list[str]]]:
    """Divide a command line into the arguments of its recipes, the arms.

    Args:
        words: `[recipe.yaml ...] [--field value ...]`.

    Returns:
        The folder of the results, and the arguments of `parse_recipe` for each arm. An arm has the name of its file.

    Raises:
        UserError: Two arms have the same name.
    """
    paths = list(takewhile(lambda word: not word.startswith("-"), words))
    fields, names = words[len(paths) :], [Path(path).stem for path in paths]
    folder = Path(parse_recipe([*paths[:1], *fields]).training.output_dir)
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
    """The recipe for each test fold and seed, from the arguments of `parse_recipe`.

    Args:
        arguments: The command line of a recipe.
        folds: Test folds. None means all folds of the recipe.
        seeds: Seeds.
        last: Whether all folds but the test fold train, and the last weights are tested.

    Returns:
        The run folders are `fold-<fold>-seed-<seed>` in the output_dir of the recipe. If the recipe divides the data
        set without folds, they are `seed-<seed>`, and the fold is "".

    Raises:
        UserError: The recipe does not have these folds.
    """
    recipe, found = parse_recipe(list(arguments)), {}
    for fold, split in _splits(recipe.data, folds, last).items():
        for seed in seeds:
            name = f"fold-{fold}-seed-{seed}" if fold else f"seed-{seed}"
            own = ["--seed", str(seed), "--output_dir", str(Path(recipe.training.output_dir, name))]
            own += ["--run_name", f"{recipe.training.run_name}-{name}"]
            found[fold, seed] = parse_recipe([*arguments, *split, *own])
    return found


def _splits(data: DataArguments, folds: Sequence[str] | None, last: bool) -> dict[str, list[str]]:
    """The fields that divide the data set for each test fold."""
    if data.train_folds is None:
        if folds or last:
            option = f"--folds {' '.join(folds)}" if folds else "--last"
            raise UserError(f"{option} must be left out, because the recipe divides the data set without folds")
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
    """Check that arms use the same clips, and print the fields in which they differ from the first arm.

    Args:
        arms: A run of each arm, with the same fold and seed.

    Raises:
        UserError: A field that chooses or divides the clips differs.
    """
    (reference, first), *others = arms.items()
    for name, recipe in others:
        one, other = first.to_dict(), recipe.to_dict()
        fields = {field for field in one | other if one.get(field) != other.get(field)}
        for field in sorted(fields & (asdict(first.data).keys() - {"preprocessing_num_workers"})):
            raise UserError(
                f"{field} must be the same in all recipes, got {one.get(field)} in {reference} and {other.get(field)} "
                f"in {name}"
            )
        own = sorted(fields - {"output_dir", "run_name", "hub_model_id"})
        if first.training.process_index == 0:
            print(f"{name} differs from {reference} in {', '.join(own) or 'nothing'}.", flush=True)


def sides_of(arms: Mapping[str, Mapping[tuple[str, int], Recipe]]) -> DataFrame:
    """The run folders that `collect` takes: a column for each arm or, with one arm, for baseline and dendritic runs."""
    found = {}
    for name, recipes in arms.items():
        for runs in zip(*(recipe.runs() for recipe in recipes.values()), strict=True):
            kind = "dendritic" if runs[0].dendrites.pai else "baseline"
            found[kind if len(arms) == 1 else name] = [Path(run.training.output_dir) for run in runs]
    return DataFrame(found, MultiIndex.from_tuples(next(iter(arms.values())), names=["fold", "seed"]))
