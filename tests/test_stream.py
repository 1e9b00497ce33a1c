"""`streaming: true` trains on shards that no cache copies, and continues in the middle of an epoch."""

import io
import shutil
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, TONES, data_of, recipe_of, tone, trained, wav
from datasets import ClassLabel, Dataset, List
from safetensors.torch import load_file

from audio_dendrites.data.stream import StreamLoader
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import write_yaml
from audio_dendrites.training.checkpoints import check_run_folder

OWN_SPLITS = {name: None for name in TONES if name.endswith("_folds")} | {
    f"{split}_split": split for split in ("train", "validation", "test")
}
STREAM = RECIPE | OWN_SPLITS | {
    "streaming": True, "labels": ["high", "low"], "shuffle_buffer": 4, "max_steps": 6, "eval_strategy": "no",
    "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "load_best_model_at_end": False,
    "report_to": "none", "num_train_epochs": None,
    "model_config": RECIPE["model_config"] | {"hidden_dropout_prob": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(shared_tones, tmp_path_factory) -> Path:
    """The tones as Parquet files: 8 to train in files of 2, 1, 3 and 2 rows, 8 to validate and 8 to test."""
    folder, clips = tmp_path_factory.mktemp("shards"), Dataset.from_parquet(str(shared_tones))
    sizes = [
        ("train", 0, 2),
        ("train", 2, 3),
        ("train", 3, 6),
        ("train", 6, 8),
        ("validation", 8, 16),
        ("test", 16, 24),
    ]
    for number, (split, start, end) in enumerate(sizes):
        clips.select(range(start, end)).to_parquet(folder / f"{split}-{number:05}-of-00006.parquet")
    return folder


def recipe(dataset: Path, **fields):
    return recipe_of(
        {key: "null" if value is None else value for key, value in (STREAM | {"dataset": dataset} | fields).items()}
    )


def train_run(run, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    """The weights after six steps."""
    trainer = trained(run, checkpoint)
    assert trainer.state.global_step == 6 and trainer.state.epoch == 1
    return load_file(Path(run.training.output_dir, "checkpoint-6", "model.safetensors"))


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    """`datasets` waits five seconds at the end of an epoch for the threads that read the shards."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_in_the_middle_of_an_epoch(workers, shards, tmp_path):
    fields = {
        "dataloader_num_workers": workers, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 1 + workers // 2,
    }  # fmt: skip
    weights = train_run(recipe(shards, **fields, output_dir=tmp_path / "whole"))
    assert equal(train_run(recipe(shards, **fields, output_dir=tmp_path / "again")), weights)
    for step in (1, 5, 6):
        resumed = recipe(shards, **fields, output_dir=tmp_path / f"from {step}")
        shutil.copytree(tmp_path / "whole" / "checkpoint-6", Path(resumed.training.output_dir, "checkpoint-6"))
        if step < 6:
            shutil.rmtree(Path(resumed.training.output_dir, "checkpoint-6"))
        assert equal(train_run(resumed, tmp_path / "whole" / f"checkpoint-{step}"), weights)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (2, 2), (1, 3)])
def test_all_readers_together_read_each_clip_once_in_an_epoch(processes, workers, shards):
    read, stream = Counter(), data_of(recipe(shards, labels=["high", "low"])).stream
    readers = processes * max(1, workers)
    for process in range(processes):
        loader = StreamLoader(stream, 1, lambda found: found, (process, processes), num_workers=workers)
        ended = set()
        for (example,) in loader:
            _, epoch, reader, _ = example["draw"]
            read[epoch, len(example["input_values"])] += epoch < 2
            if epoch == 2:
                ended.add(reader)
            if len(ended) == readers // processes:
                break
    assert +read == Counter({key: 1 for key in +read}) and len(+read) == 16  # all clips have different lengths


def test_other_workers_or_processes_cannot_resume_a_stream(shards, tmp_path):
    run = recipe(shards, dataloader_num_workers=2, output_dir=tmp_path)
    loader = StreamLoader(data_of(run).stream, 2, None, (0, 1), num_workers=2)
    with pytest.raises(UserError, match="dataloader_num_workers must be 3, as in the checkpoint, got 2"):
        loader.state = {"workers": 3, "batches": 0, "positions": {}}
    write_yaml(run, tmp_path / "config.yaml")
    (tmp_path / "metrics.json").touch()
    check_run_folder(run)
    with pytest.raises(UserError, match="dataloader_num_workers was 2 and is 1"):
        check_run_folder(recipe(shards, dataloader_num_workers=1, output_dir=tmp_path))
    with pytest.raises(UserError, match=r"processes must be at most 4 with streaming: true, got 6"):
        StreamLoader(data_of(run).stream, 2, None, (0, 3), num_workers=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_steps": -1}, "streaming must be false with max_steps: -1, got true; set max_steps"),
        (TONES | {f"{split}_split": None for split in ("train", "validation", "test")}, "with train_split: null"),
        ({"mean": "auto"}, "streaming must be false with mean: auto"),
        ({"balanced_sampling": True}, "balanced_sampling must be false with streaming: true"),
        ({"class_weights": "auto"}, "class_weights must be left out with streaming: true"),
        ({"drop_leaks": True}, "drop_leaks must be false with streaming: true"),
        ({"eval_strategy": "epoch"}, "eval_strategy must be steps or no with streaming: true"),
        (
            {"lr_step_decay": 0.5, "lr_scheduler_type": "constant_with_warmup"},
            "lr_step_decay must be left out with streaming: true",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_an_error_of_the_recipe(fields, message):
    with pytest.raises(UserError, match=message):
        recipe("nobody/nothing", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": None}, "labels must name the classes with streaming: true, got null"),
        ({"label_column": "sort"}, "no column 'sort'"),
        ({"train_split": "training"}, "must have the splits training, got train, validation, test"),
    ],
)
def test_what_the_data_set_lacks_is_an_error_before_the_training(fields, message, shards):
    with pytest.raises(UserError, match=message):
        data_of(recipe(shards, **fields))


def test_only_shards_can_be_streamed(tmp_path):
    for split in ("train", "validation", "test"):
        for kind in ("high", "low"):
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "a.wav").write_bytes(wav(tone(300)))
    with pytest.raises(UserError, match="streaming must be false for .*, got true; only Parquet and WebDataset"):
        data_of(recipe(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_clip_of_a_stream_ends_the_training_or_is_left_out(workers, shards, tmp_path, caplog):
    folder = shutil.copytree(shards, tmp_path / "shards")
    file = next(folder.glob("train-00001*"))
    rows = Dataset.from_parquet(str(file)).to_list()
    rows[0]["audio"]["bytes"] = b"not a sound file"
    Dataset.from_list(rows).to_parquet(file)

    def batches(on_bad_clip: str):
        stream = data_of(recipe(folder, on_bad_clip=on_bad_clip)).stream
        return iter(StreamLoader(stream, 7, lambda found: found, (0, 1), num_workers=workers))

    with pytest.raises(UserError, match=r"^a training clip cannot be used \(--on_bad_clip skip .*\): clip-2: cannot"):
        next(batches("error"))
    first = next(batches("skip"))
    assert {example["draw"][1] for example in first} == {0} and len({example["draw"][3] for example in first}) == 7
    assert workers or "clip-2: cannot decode" in caplog.text


def test_a_damaged_shard_and_shards_without_a_usable_clip_end_the_training(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    stream = data_of(recipe(folder, on_bad_clip="skip")).stream
    for path in folder.glob("train-*"):
        rows = Dataset.from_parquet(str(path)).to_list()
        Dataset.from_list([row | {"audio": {"bytes": b"", "path": None}} for row in rows]).to_parquet(path)
    with pytest.raises(UserError, match="none of the training clips of a loader worker can be used; the last: clip-"):
        next(iter(StreamLoader(stream, 2, list, (0, 1))))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot read a training shard of .*shards: Could not open Parquet"):
        next(iter(StreamLoader(stream, 2, list, (0, 1))))


def test_the_disk_keeps_nothing_of_the_training_clips(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    data = data_of(recipe(shards))
    assert {*data.splits} == {"validation", "test"} and len(data.sound) == 16
    next(iter(StreamLoader(data.stream, 7, lambda found: found, (0, 1))))
    tables = [Dataset.from_file(str(path)) for path in cache.rglob("*.arrow")]
    assert tables and all(len(table) in (8, 16) for table in tables) and not list(cache.rglob("*train*.arrow"))
    names = {name for table in tables if "name" in table.column_names for name in table["name"]}
    assert names == {f"clip-{row}" for row in range(8, 24)}


def test_webdataset_shards_and_classes_of_the_data_set(shards, tmp_path):
    for path in shards.glob("*.parquet"):
        with tarfile.open(tmp_path / path.with_suffix(".tar").name, "w") as archive:
            for row in Dataset.from_parquet(str(path)).to_list():
                label = str(int(row["kind"] == "low")).encode()
                for suffix, content in (("wav", row["audio"]["bytes"]), ("cls", label)):
                    entry = tarfile.TarInfo(f"{row['name']}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    columns = {"audio_column": "wav", "label_column": "cls", "clip_column": "__key__", "group_column": None}
    data = data_of(recipe(tmp_path, **columns, labels=["0", "1"]))
    (batch,) = (next(iter(StreamLoader(data.stream, 8, lambda found: found, (0, 1)))),)
    same = next(iter(StreamLoader(data_of(recipe(shards)).stream, 8, lambda found: found, (0, 1))))

    def content(examples):
        return sorted((len(one["input_values"]), one["labels"], one["input_values"].sum().item()) for one in examples)

    assert content(batch) == content(same) and len(data.splits["test"]) == 8


def test_a_data_set_of_the_hub_is_streamed(shards, online, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", online.url)
    online.commit("me/tones", {f"data/{path.name}": path.read_bytes() for path in shards.iterdir()}, "dataset")
    streams = [data_of(recipe(place)).stream for place in (shards, "me/tones")]
    loaders = [StreamLoader(stream, 3, list, (0, 1), num_workers=2) for stream in streams]
    for one, other in islice(zip(*loaders, strict=True), 8):
        assert [clip["draw"] for clip in one] == [clip["draw"] for clip in other]
        assert all(torch.equal(a["input_values"], b["input_values"]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("several", [False, True])
def test_class_names_come_from_the_data_set(several, shards, tmp_path):
    for path in shards.glob("*.parquet"):
        rows = Dataset.from_parquet(str(path))
        kinds = ClassLabel(names=["low", "high"])
        if several:
            rows = rows.map(lambda row: {"kind": [row["kind"]]}).cast_column("kind", List(kinds))
        else:
            rows = rows.cast_column("kind", kinds)
        rows.to_parquet(tmp_path / path.name)
    fields = {"metric_for_best_model": "mAP"} if several else {}
    data = data_of(recipe(tmp_path, labels=None, **fields))
    assert data.labels == ["high", "low"] and data.loss == ("bce" if several else "cross_entropy")
    for example in next(iter(StreamLoader(data.stream, 8, lambda found: found, (0, 1)))):
        row = round((len(example["input_values"]) - 28) / 2)
        assert torch.as_tensor(example["labels"]).tolist() == ([row % 2, 1 - row % 2] if several else 1 - row % 2)
