"""A recipe's data set and base model come from the Hub once, and train without it afterwards."""

import json
import os
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
FIELDS = {
    "model": "me/tiny-ast",
    "max_length": 64,
    "time_mask": 16,
    "train_folds": 1,
    "validation_folds": 2,
    "test_folds": 3,
}
FEW_STEPS = {
    "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "preprocessing_num_workers": 1,
    "use_cpu": True, "precision": "fp32", "report_to": "none",
}  # fmt: skip
AGAIN_AND_ERRORS = """
import json, sys
from unittest.mock import patch
from audio_dendrites.data.__main__ import main
from audio_dendrites.data.clips import load_clips
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments

command, loads = json.loads(sys.argv[1])
main(command)
for fields in loads:
    try:
        with patch("huggingface_hub.utils._http.time.sleep"):  # between the client's retries
            load_clips(DataArguments(label_column="class", **fields))
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
    halves = {}
    for part in range(2):
        halves[f"data/train-0000{part}-of-00002.parquet"] = folder / f"{part}.parquet"
        clips.shard(2, part).to_parquet(folder / f"{part}.parquet")
    torch.manual_seed(0)
    ASTForAudioClassification(ASTConfig(**TINY_AST, max_length=64)).save_pretrained(folder / "model")
    ASTFeatureExtractor(max_length=64).save_pretrained(folder / "model")
    model = {path.name: path for path in (folder / "model").iterdir()}
    with Hub() as hub:
        hub.commit(DATASET, {"README.md": CARD, "notes.txt": "unused"} | halves, "dataset", oid=COMMIT)
        hub.commit("me/tiny-ast", model | {"pytorch_model.bin": b"the same weights, never read"})
        hub.commit("other/private", halves, "dataset", private=True)
        yield hub


def options(fields: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def python(hub: Hub, home: Path, *command: str, token: str | None = None, **more: str) -> subprocess.CompletedProcess:
    environment = hub.environment(home, token, PYTHONPATH=str(ROOT), HF_HUB_DISABLE_PROGRESS_BARS="1", **more)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def fetched(hub: Hub) -> dict[str, int]:
    """Files whose bytes went out, and how many did."""
    bytes_sent = Counter()
    for entry in hub.log:
        if entry.method == "GET" and "/resolve/" in entry.path:
            bytes_sent[entry.path.split("/resolve/")[1].split("/", 1)[1]] += entry.sent
    return dict(bytes_sent)


@pytest.fixture(scope="module")
def downloaded(hub, folder) -> Path:
    """HF_HOME after the command."""
    done = python(hub, folder / "home", "-m", "audio_dendrites.data", "download", RECIPE, *options(FIELDS))
    assert done.returncode == 0, done.stderr
    (folder / "told.txt").write_text(done.stdout)
    return folder / "home"


def test_download_fetches_what_training_reads_and_says_so(hub, downloaded, folder):
    got = fetched(hub)
    parquet = {f"data/train-0000{part}-of-00002.parquet": (folder / f"{part}.parquet") for part in range(2)}
    weights = {
        name: folder / "model" / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")
    }
    for files in (parquet, weights):
        assert {name: got.pop(name) for name in files} == {name: path.stat().st_size for name, path in files.items()}
    assert set(got) == {"README.md"}  # of the data set, where the library finds its splits

    told = (folder / "told.txt").read_text()
    model = f"model me/tiny-ast (revision {hub.commits('me/tiny-ast')[0]})"
    for source, files in ((f"dataset {DATASET} (revision {COMMIT})", parquet), (model, weights)):
        size = f"{sum(path.stat().st_size for path in files.values()):,}"
        assert f"{source}: downloading {size} bytes, {len(files)} files, from {hub.url}\n" in told
        assert f"{source}: {size} bytes downloaded, {size} in {downloaded / 'hub'}" in told
    assert f"dataset {DATASET} (revision {COMMIT}): prepared for training" in told
    assert told.rstrip().endswith(os.path.join("snapshots", hub.commits("me/tiny-ast")[0]))


def test_the_recipe_trains_offline_from_the_cache(hub, downloaded, tmp_path):
    hub.log.clear()
    command = ("train.py", RECIPE, *options(FIELDS | FEW_STEPS), f"--output_dir={tmp_path / 'run'}")
    done = python(hub, downloaded, *command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["clips"] == 10
    assert not hub.log


def test_a_second_download_fetches_nothing_and_errors_say_what_to_do(hub, downloaded):
    other, private, busy, cut = (
        {"dataset": DATASET, "dataset_revision": "b" * 40},
        {"dataset": "other/private"},
        {"dataset": "me/busy"},
        {"dataset": "me/cut"},
    )
    hub.commit("me/script", {"script.py": "raise SystemExit('it runs')"}, "dataset")
    hub.faults.append(Fault("me/busy", status=503, message="Down for an hour", times=float("inf")))
    hub.faults.append(Fault("me/cut", cut_after=0, times=float("inf")))
    hub.log.clear()
    command = ["download", RECIPE, *options(FIELDS)]
    loads = json.dumps([command, [other, private, busy, cut, {"dataset": "me/script"}]])
    done = python(hub, downloaded, "-c", AGAIN_AND_ERRORS, loads, token=READ_TOKEN)
    hub.faults.clear()
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.log and fetched(hub).keys() == {"script.py"}  # whose name alone is looked at
    *told, other, private, busy, cut, script = done.stdout.splitlines()
    assert len(told) == 3 and "bytes downloaded" not in done.stdout
    assert "nothing to download" in told[0] and "prepared" in told[1] and "nothing to download" in told[2]
    assert f"the Hub has no data set '{DATASET}' (revision {'b' * 40})" in other
    assert "dataset: Dataset scripts are no longer supported, but found script.py" in script
    assert "the Hub has no data set 'other/private'" in private and "hf auth login" in private
    for told, state in ((busy, "the Hub answers 503 (Down for an hour)"), (cut, "the Hub is not reachable")):
        assert state in told and "python -m audio_dendrites.data download RECIPE" in told and "--dataset FOLDER" in told


def test_the_cache_gives_the_revision_asked_for_or_none(downloaded, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", downloaded / "datasets")
    clips, index = load_clips(DataArguments(dataset=DATASET, dataset_revision=COMMIT, label_column="class"))
    assert len(clips) == 30 and set(index["fold"]) == {"1", "2", "3"}
    with pytest.raises(UserError, match=f"dataset_revision: found {COMMIT}.*wanted {'b' * 40}.*not reachable"):
        load_clips(DataArguments(dataset=DATASET, dataset_revision="b" * 40, label_column="class"))
    with pytest.raises(UserError, match="not reachable, and 'me/private' is not in the cache.*--dataset FOLDER"):
        load_clips(DataArguments(dataset="me/private"))


def test_one_of_several_data_sets_of_a_branch_is_downloaded_and_found_offline(hub, folder, tmp_path):
    branch, files = "refs/convert/parquet", {}
    for part in range(2):
        files[f"v0.0{part + 1}/train/0000.parquet"] = folder / f"{part}.parquet"
        files[f"v0.0{part + 1}/test/0000.parquet"] = folder / f"{1 - part}.parquet"
    hub.commit("other/several", {"script.py": "no longer run"}, "dataset")
    hub.commit("other/several", files, "dataset", branch=branch)
    splits = {"train_split": "train", "validation_split": "test", "test_split": "test"}
    chosen = {"dataset": "other/several", "dataset_revision": branch, "dataset_dir": "v0.02"} | splits
    hub.log.clear()
    done = python(hub, tmp_path / "home", "-m", "audio_dendrites.data", "download", *options(chosen))
    assert done.returncode == 0, done.stderr
    assert set(fetched(hub)) == {"v0.02/train/0000.parquet", "v0.02/test/0000.parquet"}
    fields = chosen | FEW_STEPS | {"label_column": "class", "max_length": 64, "model_config": json.dumps(TINY_AST)}
    command = ("train.py", *options(fields), "--labels", *LABELS, f"--output_dir={tmp_path / 'run'}")
    done = python(hub, tmp_path / "home", *command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["clips"] == 15
    command = ("train.py", *options(fields | {"dataset_dir": "v0.03"}), f"--output_dir={tmp_path / 'other'}")
    done = python(hub, tmp_path / "home", *command)
    assert "dataset_dir: other/several (revision refs/convert/parquet) has no folder v0.03" in done.stderr


def test_what_lies_here_needs_no_download(tones, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for arguments, told in (
        (["configs/quickstart.yaml"], ["dataset synthetic: synthetic, nothing", "model: random weights, nothing"]),
        (["--dataset", str(tones), "--model", str(model)], [f"{tones}: file, nothing", f"{model}: local, nothing"]),
    ):
        main(["download", *arguments])
        shown = capsys.readouterr().out.splitlines()
        assert all(part in line for part, line in zip(told, shown, strict=True))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (["--dataset", "nowhere"], "found 'nowhere', which is no folder"),
        (["--dataset", "a/b"], "dataset: the Hub is not reachable, and the download needs it"),
        (["--model", "a/b"], "model: the Hub is not reachable, and the download needs it"),
    ],
)
def test_a_download_that_cannot_be_says_why(fields, told, capsys):
    with pytest.raises(SystemExit, match=told):
        main(["download", *fields])
