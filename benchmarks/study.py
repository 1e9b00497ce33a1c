"""The study of results/dendrites.md: where dendrites are used, and where they help.

    PYTHONPATH=. python benchmarks/study.py OUT [--only NAME ...] [--urbansound8k FOLDER] [--esc10 FOLDER] [--table]

Each experiment is a `crossval.py --last` of several arms. Nothing is chosen by the folds that are tested: the last
weights count, and the dendrites have the defaults of pai_callback.py. The wider model gets the number of parameters of
the first dendritic run, so it trains last. Finished runs are not repeated. The same command, started twice, shares the
runs. Writes the recipes and run folders to OUT/<experiment>. --table trains nothing and prints the comparisons.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import yaml

import crossval
from audio_dendrites.results.tables import markdown_table

SEEDS = ["11", "12", "13", "14", "15"]
FOLD = "5"  # of the generated data; the quickstart tests fold 10
PLAIN = Path(__file__).parent.parent / "configs" / "quickstart" / "plain.yaml"
TWO_DENSE, ALL = ["classifier.dense", "layers.-1.mlp.*"], ["*"]

GENERATED = {"eval_steps": 500, "save_steps": 500}
REAL = GENERATED | {
    "time_roll": 200, "filter_gain": 0.3, "time_mask": 24, "frequency_mask": 4, "weight_decay": 0.05,
    "label_smoothing_factor": 0.1,
}  # fmt: skip
ESC10 = {"dataset": "esc10", "label_column": "category", "clip_column": "filename", "group_column": "src_file"}
ESC10 = REAL | ESC10 | {"train_folds": [1, 2, 3], "validation_folds": [4], "test_folds": [5], "max_steps": 300}
URBANSOUND8K = REAL | {"dataset": "urbansound8k", "max_steps": 400}
URBANSOUND8K |= {"train_folds": [1], "validation_folds": [2], "test_folds": [2]}
FINE_TUNING = {"model": "generated_32/plain/fold-5-seed-11", "model_config": None, "learning_rate": 3e-4}


def ast(width: int, layers: int) -> dict[str, Any]:
    """The quickstart's AST with another width and number of blocks."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width}
    return {"model_config": sizes | {"initializer_range": round(width**-0.5, 3)}}


NO_AST = dict.fromkeys(
    yaml.safe_load((PLAIN.parents[1] / "quickstart.yaml").read_text())["model_config"]
)  # fields that a CNN14 does not have
CNN14 = {
    "architecture": "cnn14",
    "model_config": NO_AST | {"width": 0.03125, "block_dropout": 0.0, "head_dropout": 0.0},
    "attn_implementation": None,
    "learning_rate": 2e-3,
    "max_steps": 500,
}


def arms(modules: list[str], **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The five arms of every experiment that starts from random weights, and more.

    Args:
        modules: Layers that grow dendrites.
        more: Fields of a `pai` block by arm.
    """
    blocks = {"dendrites": {}, "identity": {"activation": "identity"}, "from_start": {"first_growth": 0}} | more
    return {"plain": {}} | {arm: {"pai": {"modules": modules} | block} for arm, block in blocks.items()} | {"wide": {}}


TUNED = {
    "plain": {},
    "faster_head": {"head_learning_rate": 3e-3},
    "dendrites": {"pai": {"modules": TWO_DENSE}},
    "faster_dendrites": {"pai": {"modules": TWO_DENSE, "dendrite_learning_rate": 3e-3}},
    "frozen": {"unfreeze_last_layers": 0, "head_learning_rate": 3e-3},
    "frozen_dendrites": {
        "unfreeze_last_layers": 0,
        "head_learning_rate": 3e-3,
        "pai": {"modules": TWO_DENSE, "dendrite_learning_rate": 3e-3},
    },
}
VENDOR = {"preset": "perforatedai", "schedule": "early", "first_growth": 0.2, "max_dendrites": 1}
CONVOLUTIONS = ["layers.*.conv2", "classifier"]

# By name: the fields of all arms, the arms, and the options of crossval.py.
EXPERIMENTS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]] = {
    "generated_16": (
        GENERATED | ast(16, 1), arms(ALL, three={"max_dendrites": 3}, perforatedai=VENDOR), ["--folds", FOLD]
    ),
    "generated_32": (GENERATED | ast(32, 1), arms(ALL), ["--folds", FOLD]),
    "generated_64": (GENERATED | ast(64, 2), arms(ALL), ["--folds", FOLD]),
    "generated_cnn14": (GENERATED | CNN14, arms(CONVOLUTIONS), ["--folds", FOLD]),
    "urbansound8k_ast": (URBANSOUND8K | ast(32, 1), arms(ALL), ["--folds", "1", "2"]),
    "urbansound8k_cnn14": (CNN14 | URBANSOUND8K, arms(CONVOLUTIONS), ["--folds", "1", "2"]),
    "esc10_ast": (ESC10 | ast(32, 1), arms(ALL), []),
    "urbansound8k_tuned": (URBANSOUND8K | FINE_TUNING, TUNED, ["--folds", "1", "2"]),
    "esc10_tuned": (ESC10 | FINE_TUNING, TUNED, []),
}  # fmt: skip


def run(name: str, out: Path, folders: dict[str, str]) -> None:
    """Train and compare the arms of an experiment.

    Args:
        name: Key of `EXPERIMENTS`.
        out: Folder of the study.
        folders: Of the real data sets, by name.
    """
    fields, found, options = EXPERIMENTS[name]
    folder = out / name
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    first = folder / "dendrites" / f"fold-{(options or ['', '1'])[1]}-seed-{SEEDS[0]}"
    dataset = fields.get("dataset", "synthetic")
    common = {"inherits": str(PLAIN), "output_dir": str(folder)} | fields
    common |= {"dataset": folders.get(dataset, dataset)}
    common |= {"model": str(out / fields["model"])} if "model" in fields else {}
    paths = []
    for arm, own in found.items():
        paths.append(folder / "recipes" / f"{arm}.yaml")
        own = own | ({"match_parameters": str(first)} if arm == "wide" else {})
        paths[-1].write_text(yaml.safe_dump(common | own, sort_keys=False))
    rest = ["--last", *options, "--seeds", *SEEDS]
    if "wide" in found:
        crossval.main([*map(str, paths[:-1]), *rest])
    crossval.main([*map(str, paths), *rest])


def table(name: str, out: Path) -> str:
    """The comparison of an experiment as Markdown: accuracies, differences from the plain model, use of dendrites."""
    comparison = json.loads((out / name / "comparison.json").read_text())
    rows = [["arm", "parameters", "accuracy, %", "points against plain", "p", "points lost without the features"]]
    for side in comparison["sides"]:
        score, folder = side["accuracy"], out / name / side["name"]
        metrics = [json.loads((folder / run / "metrics.json").read_text()) for run in side["runs"]]
        lost = [100 * one["dendrites"]["use"]["lost"] for one in metrics if one["dendrites"]]
        cells = [side["name"], f"{side['parameters']:,}", f"{100 * score['mean']:.2f} ± {100 * score['deviation']:.2f}"]
        if "difference" in score:
            difference, low, high = (100 * score[key] for key in ("difference", "low", "high"))
            cells += [f"{difference:+.2f} ({low:+.2f} to {high:+.2f})", f"{score['p']:.2g}"]
        rows.append([*cells, *[""] * (5 - len(cells)), f"{min(lost):.1f} to {max(lost):.1f}" if lost else ""])
    runs = len(comparison["sides"][0]["runs"])
    return f"### {name}\n\n{runs} runs of each arm, {comparison['clips']} test clips.\n\n{markdown_table(rows)}\n"


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audio_dendrites").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--urbansound8k", default="danavery/urbansound8K", help="Folder or Hub id.")
    parser.add_argument("--esc10", help="Folder with ESC-10 in the columns of ashraq/esc50.")
    parser.add_argument("--table", action="store_true", help="Print what is finished.")
    arguments = parser.parse_args()
    for name in arguments.only:
        if not arguments.table:
            run(name, arguments.out, vars(arguments))
        elif (arguments.out / name / "comparison.json").exists():
            print(table(name, arguments.out))
