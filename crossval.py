"""Run a recipe once for every fold, resumably, and put the results together; with dendrites, also compare.

    accelerate launch crossval.py configs/quickstart.yaml [--folds 1 2 3] [--seeds 42 43] [--last] [--field value ...]

Each of the data set's folds, those of the recipe's train_folds, validation_folds and test_folds, is the test fold once;
the fold after it chooses the checkpoint and the others train. With --last none chooses: all others train, and the last
weights are tested. Every run has a folder below the recipe's output_dir, a
finished one is not repeated, and the same command goes on where it was interrupted. Writes crossval.md, crossval.json
and a confusion matrix (multi-label: average precisions) there and, if the recipe has `baseline: true`, what compare.py
writes.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

import train
from audio_dendrites.errors import UserError
from audio_dendrites.files import written_whole
from audio_dendrites.recipes import Recipe, parse_recipe
from audio_dendrites.results.comparison import write_comparison
from audio_dendrites.results.plots import plot_classes
from audio_dendrites.results.scores import score, score_names
from audio_dendrites.results.tables import markdown_table
from pai_callback import PAIError


def fold_recipes(
    arguments: Sequence[str], folds: Sequence[str] | None, seeds: Sequence[int], last: bool = False
) -> list[Recipe]:
    """The recipe once for each test fold and seed, with run folders `fold-<fold>-seed-<seed>`.

    Args:
        arguments: As `parse_recipe` takes them.
        folds: Test folds; none means all.
        seeds: Seeds; none means the recipe's.
        last: Whether all but the test fold train, and the last weights are tested.

    Raises:
        UserError: There are fewer folds than that takes, a fold is not one of the recipe's, or `last` and a score
            steers the training.
    """
    recipe = parse_recipe(list(arguments))
    data, folder = recipe.data, Path(recipe.training.output_dir)
    if data.train_folds is None:
        raise UserError("folds: the recipe divides the data set otherwise, wanted a fold_column with folds")
    present = sorted({*data.train_folds, *data.validation_folds, *data.test_folds}, key=lambda fold: (len(fold), fold))
    if len(present) < (2 if last else 3):
        wanted = "two or more: train, test" if last else "three or more: train, choose, test"
        raise UserError(f"folds: the recipe names {', '.join(present)}, wanted {wanted}")
    steering = {
        "early_stopping_patience": recipe.training.early_stopping_patience,
        "pai": recipe.dendrites.pai,
        "lr_scheduler_type": "reduce_lr_on_plateau" if "plateau" in recipe.training.lr_scheduler_type else None,
    }
    for field, value in steering.items() if last else ():
        if value is not None:
            raise UserError(
                f"{field}: found {value} with --last, wanted none: a validation score steers it, and the test fold is "
                f"the only one left to take it from"
            )
    if strangers := sorted(set(folds or []) - set(present)):
        raise UserError(f"--folds: found {', '.join(strangers)}, wanted some of the recipe's: {', '.join(present)}")
    found = []
    for fold in folds or present:
        after = fold if last else present[(present.index(fold) + 1) % len(present)]
        rest = [one for one in present if one not in (fold, after)]
        split = ["--train_folds", *rest, "--validation_folds", after, "--test_folds", fold]
        split += ["--load_best_model_at_end", "false"] if last else []
        for seed in seeds or [recipe.training.seed]:
            name = f"fold-{fold}-seed-{seed}"
            own = ["--seed", str(seed), "--output_dir", str(folder / name)]
            own += ["--run_name", f"{recipe.training.run_name}-{name}"]
            found.append(parse_recipe([*arguments, *split, *own]))
    return found


def summary(folders: Sequence[Path]) -> tuple[str, dict[str, Any], pandas.DataFrame]:
    """All runs of one kind together.

    Args:
        folders: Finished run folders.

    Returns:
        A Markdown table; crossval.json's entry: mean and standard deviation of each score over the runs, and of all
        clips pooled the scores that the scale of a model's logits does not change; and the predictions of all runs.
    """
    runs = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    predictions = pandas.concat([pandas.read_parquet(folder / "predictions.parquet") for folder in folders])
    scores = score_names(runs[0]["test"])
    rows: list[list[Any]] = [["test fold", "run", "clips", *scores]]
    for folder, metrics in zip(folders, runs, strict=True):
        test = metrics["test"]
        rows.append([" ".join(test["folds"]), folder.name, test["clips"], *(test[name] for name in scores)])
    means = {name: statistics.mean(run["test"][name] for run in runs) for name in scores}
    deviations = {name: statistics.stdev(run["test"][name] for run in runs) if runs[1:] else 0.0 for name in scores}
    rows.append(["mean", "", "", *means.values()])
    rows.append(["standard deviation", "", "", *deviations.values()])
    pooled = score(predictions, runs[0]["labels"])
    parameters = statistics.mean(run["parameters"] for run in runs)
    found = {
        "runs": [folder.name for folder in folders],
        "mean": means,
        "standard_deviation": deviations,
        "pooled": {name: pooled[name] for name in ("accuracy", "macro_f1") if name in pooled},
        "parameters": parameters,
        "minutes": sum(run["train_runtime"] for run in runs) / 60,
    }
    return markdown_table(rows), found, predictions


def write(folder: Path, kinds: dict[str, list[Path]], command: Sequence[str]) -> None:
    """crossval.md, crossval.json and a confusion matrix of all test clips.

    Args:
        folder: Where to.
        kinds: Name of a kind of run ("baseline", "dendritic") to its run folders.
        command: What made them.
    """
    page, numbers = [f"# Cross-validation\n\n```bash\n{' '.join(command)}\n```"], {}
    for kind, folders in kinds.items():
        table, numbers[kind], predictions = summary(folders)
        labels = json.loads((folders[0] / "metrics.json").read_text(encoding="utf-8"))["labels"]
        picture = plot_classes(predictions, labels, f"{kind}, all test folds", folder, f"_{kind}")
        line = f"{numbers[kind]['parameters']:,.0f} parameters, {numbers[kind]['minutes']:.1f} minutes of training."
        page.append(f"## {kind}\n\n{table}\n\n{line}\n\n![by class]({picture.name})")
        print(f"\n{kind}\n\n{table}\n\n{line}", flush=True)
    with written_whole(folder / "crossval.md") as path:
        path.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    with written_whole(folder / "crossval.json") as path:
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {folder}/crossval.md", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Every run, then what they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", nargs="+", metavar="FOLD", help="Test folds; default: all of the recipe's.")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="Default: the recipe's one.")
    parser.add_argument("--last", action="store_true", help="No fold chooses: train on all others, test what is last.")
    options, rest = parser.parse_known_args(arguments)
    recipes = fold_recipes(rest, options.folds, options.seeds, options.last)
    train.main(*recipes)
    if recipes[0].training.process_index:
        return
    folder = Path(recipes[0].training.output_dir).parent
    runs = [Path(recipe.training.output_dir) for recipe in recipes]
    if not recipes[0].dendrites.baseline:
        return write(folder, {"dendritic" if recipes[0].dendrites.pai else "baseline": runs}, sys.argv)
    baselines = [Path(recipe.baseline().training.output_dir) for recipe in recipes]
    kinds = {"baseline": baselines, "dendritic": runs}
    write(folder, kinds, sys.argv)
    write_comparison(kinds, folder)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audio_dendrites").setLevel(logging.INFO)
    try:
        main(sys.argv[1:])
    except (UserError, PAIError) as error:
        sys.exit(f"error: {error}")
