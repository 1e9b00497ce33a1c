"""A recipe's data set and base model come from the Hub once, and train without it afterwards."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_AST
from datasets import Dataset
from hub.server import READ_TOKEN, Fault, Hub
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from audio_dendrites.data.__main__ import main
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.synthetic import LABELS, STORED, generate_clips
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments, read_yaml

RECIPE = "configs/urbansound8k/ast.yaml"
DATASET, COMMIT = (read_yaml(ROOT / RECIPE)[field] for field in ("dataset", "dataset_revision"))
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
---
"""
FEW_STEPS = {
    "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "preprocessing_num_workers": 1, "max_length": 400,
    "use_cpu": True, "precision": "fp32", "report_to": "none",
}  # fmt: skip
FIELDS = {"model": "me/tiny-ast", "time_mask": 16, "train_folds": 1, "validation_folds": 2, "test_folds": 3} | FEW_STEPS
BRANCH = {  # one of several data sets, with splits of its own, on a branch
    "dataset": "other/several", "dataset_revision": "refs/convert/parquet", "dataset_dir": "v0.02",
    "train_split": "train", "validation_split": "test", "test_split": "test",
}  # fmt: skip
BAD_LOADS = [
    {"dataset": DATASET, "dataset_revision": "b" * 40},
    {"dataset": "other/private"},
    {"dataset": "me/busy"},
    {"dataset": "me/cut"},
    {"dataset": "me/script"},
    BRANCH | {"dataset_dir": "v0.03"},
]
PROGRAM = """
import json, sys
from unittest.mock import patch
import train
from audio_dendrites.data.__main__ import main
from audio_dendrites.data.clips import load_clips
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments, parse_recipe

for command, argument in json.loads(sys.argv[1]):
    print("# " + command)
    try:
        with patch("huggingface_hub.utils._http.time.sleep"):  # between the client's retries
            if command == "load":
                load_clips(DataArguments(label_column="class", **argument))
            elif command == "train":
                train.main(parse_recipe(argument))
            else:
                main([command, *argument])
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("offline")


@pytest.fixture(scope="module")
def hub(folder) -> Hub:
    """UrbanSound8K's columns in two Parquet files under the id and the commit of the recipe, and a tiny base model."""
    clips = Dataset.from_list(list(generate_clips(clips_per_class=3, folds=3)), features=STORED)
    for part in range(2):
        clips.shard(2, part).to_parquet(folder / f"{part}.parquet")
    halves = {f"data/train-0000{part}-of-00002.parquet": folder / f"{part}.parquet" for part in range(2)}
    torch.manual_seed(0)
    ASTForAudioClassification(ASTConfig(**TINY_AST, max_length=400)).save_pretrained(folder / "model")
    ASTFeatureExtractor(max_length=400).save_pretrained(folder / "model")
    model = {path.name: path for path in (folder / "model").iterdir()}
    several = {
        f"v0.0{1 + part}/{split}/0000.parquet": folder / f"{part if split == 'train' else 1 - part}.parquet"
        for part in range(2)
        for split in ("train", "test")
    }
    with Hub() as hub:
        hub.commit(DATASET, {"README.md": CARD, "notes.txt": "unused"} | halves, "dataset", oid=COMMIT)
        hub.commit("me/tiny-ast", model | {"pytorch_model.bin": b"the same weights, never read"})
        hub.commit("other/private", halves, "dataset", private=True)
        hub.commit("me/script", {"script.py": "raise SystemExit('it runs')"}, "dataset")
        hub.commit("other/several", {"script.py": "no longer run"}, "dataset")
        hub.commit("other/several", several, "dataset", branch=BRANCH["dataset_revision"])
        hub.faults.append(Fault("me/busy", status=503, message="Down for an hour", times=float("inf")))
        hub.faults.append(Fault("me/cut", cut_after=0, times=float("inf")))
        yield hub


def options(fields: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def python(hub: Hub, home: Path, commands: list, **environment: str) -> list[str]:
    """What each command prints, in one process that has this Hub."""
    environment = hub.environment(
        home, READ_TOKEN, PYTHONPATH=str(ROOT), HF_HUB_DISABLE_PROGRESS_BARS="1", **environment
    )
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [told.split("\n", 1)[1] for told in done.stdout.split("# ")[1:] if "\n" in told]


def fetched(hub: Hub) -> dict[str, int]:
    """Files whose bytes went out, and how many did."""
    bytes_sent = Counter()
    for entry in hub.log:
        if entry.method == "GET" and "/resolve/" in entry.path:
            bytes_sent[entry.path.split("/resolve/")[1].split("/", 1)[1]] += entry.sent
    return dict(bytes_sent)


@pytest.fixture(scope="module")
def told(hub, folder) -> list[str]:
    """What one process prints that downloads a recipe twice, loads what it cannot, and downloads a branch."""
    download = ["download", [RECIPE, *options(FIELDS)]]
    loads = [["load", fields] for fields in BAD_LOADS]
    return python(hub, folder / "home", [download, download, *loads, ["download", options(BRANCH)]])


def test_download_fetches_what_training_reads_once_and_says_so(hub, told, folder):
    got = fetched(hub)
    parquet = {f"data/train-0000{part}-of-00002.parquet": (folder / f"{part}.parquet") for part in range(2)}
    weights = {
        name: folder / "model" / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")
    }
    for files in (parquet, weights):
        assert {name: got.pop(name) for name in files} == {name: path.stat().st_size for name, path in files.items()}
    assert got.pop("script.py") >= 0  # its name alone is looked at
    assert set(got) == {"README.md", "v0.02/train/0000.parquet", "v0.02/test/0000.parquet"}

    first, second = told[:2]
    model = f"model me/tiny-ast (revision {hub.commits('me/tiny-ast')[0]})"
    for source, files in ((f"dataset {DATASET} (revision {COMMIT})", parquet), (model, weights)):
        size = f"{sum(path.stat().st_size for path in files.values()):,}"
        assert f"{source}: downloading {size} bytes, {len(files)} files, from {hub.url}\n" in first
        assert f"{source}: {size} bytes downloaded, {size} in {folder / 'home' / 'hub'}" in first
    assert f"dataset {DATASET} (revision {COMMIT}): prepared for training" in first
    assert first.rstrip().endswith(f"snapshots/{hub.commits('me/tiny-ast')[0]}")
    assert second.count("nothing to download") == 2 and "downloading" not in second


def test_errors_of_the_hub_say_what_to_do(told):
    other, private, busy, cut, script, no_folder = told[2:8]
    assert f"the Hub has no data set '{DATASET}' (revision {'b' * 40})" in other
    assert "the Hub has no data set 'other/private'" in private and "hf auth login" in private
    for message, state in ((busy, "the Hub answers 503 (Down for an hour)"), (cut, "the Hub is not reachable")):
        assert state in message and "audio_dendrites.data download RECIPE" in message and "--dataset FOLDER" in message
    assert "dataset: Dataset scripts are no longer supported, but found script.py" in script
    assert "dataset_dir: other/several (revision refs/convert/parquet) has no folder v0.03" in no_folder


def test_what_was_downloaded_trains_offline(hub, told, folder):
    hub.log.clear()
    branch = BRANCH | FEW_STEPS | {"label_column": "class", "model_config": json.dumps(TINY_AST)}
    one = [RECIPE, *options(FIELDS), f"--output_dir={folder / 'one'}"]
    other = [*options(branch), "--labels", *LABELS, f"--output_dir={folder / 'other'}"]
    python(hub, folder / "home", [["train", one], ["train", other]], HF_HUB_OFFLINE="1")
    for name, clips in (("one", 10), ("other", 15)):
        assert json.loads((folder / name / "metrics.json").read_text())["test"]["clips"] == clips
    assert not hub.log


def test_the_cache_gives_the_revision_asked_for_or_none(told, folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "home" / "datasets")
    clips, index = load_clips(DataArguments(dataset=DATASET, dataset_revision=COMMIT, label_column="class"))
    assert len(clips) == 30 and set(index["fold"]) == {"1", "2", "3"}
    with pytest.raises(UserError, match=f"dataset_revision must be in the cache .*, got {'b' * 40}; .* {COMMIT} of"):
        load_clips(DataArguments(dataset=DATASET, dataset_revision="b" * 40, label_column="class"))
    with pytest.raises(UserError, match="not reachable, and 'me/private' is not in the cache.*--dataset FOLDER"):
        load_clips(DataArguments(dataset="me/private"))


def test_local_data_and_models_need_no_download(tones, tmp_path, capsys):
    for arguments, lines in (
        (["configs/quickstart.yaml"], ["dataset synthetic: synthetic, nothing", "model: random weights, nothing"]),
        (
            ["--dataset", str(tones), "--model", str(tmp_path)],
            [f"{tones}: file, nothing", f"{tmp_path}: local, nothing"],
        ),
    ):
        main(["download", *arguments])
        shown = capsys.readouterr().out.splitlines()
        assert all(part in line for part, line in zip(lines, shown, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["--dataset", "nowhere"], "dataset must be a file or a folder that exists, .* got 'nowhere'"),
        (["--dataset", "a/b"], "dataset: the Hub is not reachable, and the download needs it"),
        (["--model", "a/b"], "model: the Hub is not reachable, and the download needs it"),
    ],
)
def test_a_download_that_fails_says_why(fields, message, capsys):
    with pytest.raises(SystemExit, match=message):
        main(["download", *fields])
