"""`cache` says what the disk has of each clip. It changes no batch, what it costs is known, and many can fill it."""

import logging
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RECIPE, TINY_CNN14, data_of, encoder_checkpoint, recipe_of, trained
from datasets import Dataset
from safetensors.torch import load_file

from audio_dendrites.data import cache, features
from audio_dendrites.data.__main__ import main
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.features import BatchedASTFeatureExtractor, extract_features, parts_of
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_extractor
from audio_dendrites.recipes import CACHES, write_yaml
from audio_dendrites.training.checkpoints import check_run_folder

SIX_STEPS = {  # four in the first epoch
    "max_steps": 6, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9,
    "load_best_model_at_end": False, "report_to": "none",
}  # fmt: skip
EXTRACT_BATCH = features._extract_batch
KINDS = {
    "spectrograms": {},
    "waveforms": {"architecture": "cnn14", "model_config": TINY_CNN14, "waveform": True},
    "clips": {"model_config": {}, "time_mask": 0},
}


def recipe(dataset: Path, **fields):
    """RECIPE on the tones, with windows that cut the longer clips."""
    return recipe_of(RECIPE | SIX_STEPS | {"max_length": 50, "dataset": str(dataset)} | fields)


def train_run(run, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    """The weights at the end of a training."""
    trained(run, checkpoint)
    return load_file(Path(run.training.output_dir, "checkpoint-6", "model.safetensors"))


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def files(*data: Dataset) -> dict[Path, int]:
    """The files in the cache folders of data sets, and the time at which each was written."""
    folders = {Path(file["filename"]).parent for one in data for file in one.cache_files}
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_without_a_cache_has_the_same_batches_and_weights(kind, shared_tones, tmp_path):
    fields = KINDS[kind] | ({"model": str(encoder_checkpoint(tmp_path, "wav2vec2"))} if kind == "clips" else {})
    cached = recipe(shared_tones, **fields, output_dir=tmp_path / "cached")
    without = fields | {"cache": "none", "dataloader_num_workers": 2}
    computed = recipe(shared_tones, **without, output_dir=tmp_path / "computed")
    one, other = data_of(cached), pickle.loads(pickle.dumps(data_of(computed)))  # as a worker that is spawned gets it
    for these, those in [(one.clips("train"), other.clips("train"))] + [
        (one.windows("test", exact), other.windows("test", exact)) for exact in (False, True)
    ]:
        rows = range(len(these))
        assert len(those) == len(rows) and these[0]["input_values"].dtype == those[0]["input_values"].dtype
        for example, same in zip(these.__getitems__(rows), those.__getitems__(rows), strict=True):
            assert torch.equal(example["input_values"], same["input_values"]) and example["labels"] == same["labels"]
    assert len(one.windows("test")) > len(one.splits["test"])

    weights = train_run(cached)
    assert equal(train_run(computed), weights)
    resumed = recipe(shared_tones, **without, output_dir=tmp_path / "resumed")
    assert equal(train_run(resumed, tmp_path / "computed" / "checkpoint-3"), weights)


def test_a_run_continues_without_its_cache_but_not_with_rounded_samples(shared_tones, tmp_path):
    (tmp_path / "metrics.json").touch()
    write_yaml(recipe(shared_tones, output_dir=tmp_path), tmp_path / "config.yaml")
    check_run_folder(recipe(shared_tones, output_dir=tmp_path, cache="none"))
    with pytest.raises(UserError, match="cache was 'features' and is 'waveforms'"):
        check_run_folder(recipe(shared_tones, output_dir=tmp_path, cache="waveforms"))


def test_cached_waveforms_give_almost_the_same_log_mel(shared_tones):
    exact, rounded = (data_of(recipe(shared_tones, cache=choice)).windows("train") for choice in CACHES[:2])
    assert len(exact) == len(rounded)
    for row in range(len(exact)):
        values, close = (windows[row]["input_values"] for windows in (exact, rounded))
        assert close.dtype == torch.float16 and not torch.equal(values, close)
        difference = (values.float() - close.float()).abs()
        assert difference.mean() < 2e-3 and difference.max() < 0.2  # in a band that is almost silent


def test_without_a_cache_the_disk_has_a_few_bytes_of_each_clip(tones):
    run = recipe(tones, cache="none")
    clips, _ = load_clips(run.data)
    before = files(clips).keys()
    data = data_of(run)
    (written,) = files(clips).keys() - before
    assert written == Path(data.cached.cache_files[0]["filename"]) and data.cached.data.nbytes < 24 * 50
    assert written.stat().st_size < 5000 < 10 * sum(len(clip["audio"]["bytes"]) for clip in clips)


def test_a_damaged_clip_is_the_same_error_whatever_the_cache(tones):
    clips = Dataset.from_parquet(str(tones)).to_list()
    clips[3]["audio"]["bytes"] = b"not a sound file"
    Dataset.from_list(clips).to_parquet(tones)
    errors = set()
    for choice in CACHES:
        with pytest.raises(UserError, match="1 clips cannot be used .*\n  clip-3: cannot decode") as error:
            data_of(recipe(tones, cache=choice))
        errors.add(str(error.value))
        data = data_of(recipe(tones, cache=choice, on_bad_clip="skip"))
        assert data.splits["train"].tolist() == [0, 1, 2, 4, 5, 6, 7]
        assert len(data.clips("train")) == 7 and [*data.skipped] == ["train"]
        assert data.windows("train").clips.max() == 6
    assert len(errors) == 1


@pytest.mark.parametrize("fields", [KINDS["spectrograms"], KINDS["waveforms"]], ids=["spectrograms", "waveforms"])
def test_the_estimate_counts_the_bytes_that_each_choice_writes(fields, shared_tones):
    run = recipe(shared_tones, **fields)
    clips, _ = load_clips(run.data)
    extractor = load_extractor(run.model, run.features)
    costs = cache.estimate(clips, extractor, run.data)
    for choice, cost in costs.items():
        cached = cache.fill_cache(clips, cache.stored_form(extractor, choice), run.data)
        assert cost.size == pytest.approx(cached.data.nbytes, rel=0.02)
    whole, waveforms, none = costs.values()
    assert whole.each_epoch == 0 and none.each_epoch == pytest.approx(whole.once)  # each time what is done once
    assert 0 < waveforms.each_epoch < none.each_epoch if not fields else waveforms.each_epoch == 0


def test_stats_of_a_model_with_a_feature_extractor_of_its_own(tones, tmp_path, capsys):
    main(["stats", *words(tones), *SPLITS, f"--model={encoder_checkpoint(tmp_path, 'wav2vec2')}"])
    told = capsys.readouterr().out
    assert "16000 Hz, 128 bands:\nmean: " in told and re.search("features +.* kB .*\nwaveforms .*\nnone ", told)


def test_a_large_data_set_shows_its_costs_once_and_needs_room_on_the_disk(tones, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "audio_dendrites")
    monkeypatch.setattr(cache, "LARGE", 23)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=12_345))
        wanted = "features needs about .* [kM]B in .*, got a disk with 12.3 kB left.*HF_DATASETS_CACHE.*--cache none"
        with pytest.raises(UserError, match=wanted):
            data_of(recipe(tones))
        data_of(recipe(tones, cache="none"))
        monkeypatch.setattr(cache, "LARGE", 24)
        data_of(recipe(tones, mean=0))
    lines = [line.split() for line in caplog.text.splitlines()]
    assert [line[0] for line in lines if line[0] in CACHES] == 2 * list(CACHES)
    monkeypatch.setattr(cache, "LARGE", 23)
    data_of(recipe(tones))
    assert caplog.text.count("What each choice of cache costs for 24 clips, estimated from 24 of them") == 3
    data_of(recipe(tones))  # from the cache
    assert caplog.text.count("What each choice") == 3


def interrupted(table, rows, first, **arguments):
    if first == 10:
        raise KeyboardInterrupt
    return EXTRACT_BATCH(table, rows, first, **arguments)


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Parts of 10 rows: three parts for the tones."""
    monkeypatch.setattr(features, "PART_ROWS", 10)


SPLITS = ["--train_folds=1", "--validation_folds=2", "--test_folds=3"]


def words(dataset: Path) -> list[str]:
    fields = {name: RECIPE[name] for name in ("label_column", "clip_column", "max_length", "preprocessing_num_workers")}
    return [f"--{name}={value}" for name, value in (fields | {"dataset": dataset}).items()]


def test_two_tasks_fill_a_cache_that_the_training_finds(tones, small_parts, capsys):
    run = recipe(tones)
    clips, _ = load_clips(run.data)
    for shard, told in (("0/2", "14 of 24 clips"), ("1/2", "10 of 24 clips"), ("3/4", "nothing to do: .* 0 to 2")):
        main(["features", *words(tones), "--shard", shard])
        assert re.search(told, capsys.readouterr().out)
    written = files(clips)
    data = data_of(run)
    assert files(clips) == written and len(data.cached.cache_files) == 3
    main(["features", *words(tones), "--cache=none"])
    assert "24 of 24 clips are in the cache (parts: 3 of 3)" in capsys.readouterr().out


def test_a_killed_task_loses_the_part_that_it_was_computing(tones, small_parts, monkeypatch):
    clips, _ = load_clips(recipe(tones).data)
    before = files(clips)
    with monkeypatch.context() as patch:
        patch.setattr(features, "_extract_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract_features(clips, BatchedASTFeatureExtractor(), id_column="name")
    kept = files(clips)
    assert len(kept) == len(before) + 1
    result = extract_features(clips, BatchedASTFeatureExtractor(), id_column="name")
    assert len(files(clips)) == len(before) + 3 and kept.items() <= files(clips).items() and len(result) == 24


def test_parts_have_the_rows_of_the_whole_and_are_not_copied(tones, monkeypatch):
    rows = Dataset.from_parquet(str(tones)).to_list()
    rows[13]["audio"] = {"bytes": b"not a sound file", "path": None}
    Dataset.from_list(rows).to_parquet(tones)
    clips, _ = load_clips(recipe(tones, clip_column="null", on_bad_clip="skip").data)
    whole = extract_features(clips, BatchedASTFeatureExtractor())
    monkeypatch.setattr(features, "PART_ROWS", 10)
    parts = parts_of(clips, BatchedASTFeatureExtractor())
    for part in parts:
        assert part.clips._indices is None and part.clips.cache_files == clips.cache_files and not part.is_cached
    assembled = extract_features(clips, BatchedASTFeatureExtractor(), num_proc=2)
    assert assembled[:] == whole[:] and assembled[13]["error"].startswith("row 13: ")
    assert assembled._indices is None and all(part.is_cached for part in parts)
    assert len(assembled.cache_files) == 2 * len(parts)
    a_piece = Path(assembled.cache_files[0]["filename"])
    a_piece.unlink()
    assert [part.is_cached for part in parts] == [False, True, True]


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_a_shard_that_does_not_exist_is_refused(shard, tones):
    with pytest.raises(SystemExit, match=rf"--shard must be i/n with i from 0 to n - 1, such as 0/4, got '{shard}'"):
        main(["features", *words(tones), f"--shard={shard}"])


def test_a_shard_cannot_have_statistics_of_all_clips(tones, capsys):
    with pytest.raises(SystemExit, match="mean and std must be numbers with --shard, got auto"):
        main(["features", *words(tones), "--mean=auto", "--shard=0/2"])
    main(["features", *words(tones), "--mean=auto", "--shard=0/2", "--cache=none"])
    assert "24 of 24 clips" in capsys.readouterr().out
