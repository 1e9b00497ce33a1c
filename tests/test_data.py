import io
import logging

import numpy as np
import pytest
import soundfile
from conftest import TONES
from datasets import ClassLabel, Dataset
from transformers import ASTFeatureExtractor

from audio_dendrites import data as data_module
from audio_dendrites.config import DataArguments, RecipeError
from audio_dendrites.data import class_names, drop_bad_clips, load_clips, split_by_fold


def arguments(dataset, **changes):
    return DataArguments(**{"dataset": str(dataset), **TONES, **changes})


def test_a_parquet_file_a_folder_and_the_index(tones):
    for dataset in (tones, tones.parent):
        clips, index = load_clips(arguments(dataset))
        assert clips.column_names == ["audio", "name"] and len(clips) == len(index) == 24
        assert index.iloc[9].to_dict() == {"fold": "2", "label": "high", "clip": "clip-9", "group": "4"}


def test_without_names_or_recordings_rows_stand_for_themselves(tones):
    clips, index = load_clips(arguments(tones, clip_column=None, group_column=None))
    assert clips.column_names == ["audio"] and index.iloc[9][["clip", "group"]].tolist() == ["000009", "000009"]


def test_class_ids_get_the_names_the_data_set_has(tmp_path):
    labels = ClassLabel(names=["zebra", "ant"])
    Dataset.from_dict({"audio": [b""] * 2, "label": [0, 1], "fold": [1, 2]}).cast_column("label", labels).to_parquet(
        tmp_path / "x.parquet"
    )
    _, index = load_clips(DataArguments(dataset=str(tmp_path / "x.parquet")))
    assert index["label"].tolist() == ["zebra", "ant"]


def test_classes_are_sorted_whatever_the_order_of_the_rows(tones):
    _, index = load_clips(arguments(tones))
    splits = split_by_fold(index, arguments(tones))
    assert class_names(index, splits, arguments(tones)) == ["high", "low"]
    backwards = index.iloc[::-1].reset_index(drop=True)
    assert class_names(backwards, split_by_fold(backwards, arguments(tones)), arguments(tones)) == ["high", "low"]
    assert class_names(index, splits, arguments(tones, labels=["low", "high"])) == ["low", "high"]


def test_splits_are_the_folds(tones):
    _, index = load_clips(arguments(tones))
    splits = split_by_fold(index, arguments(tones))
    assert {split: rows.tolist() for split, rows in splits.items()} == {
        "train": list(range(8)),
        "validation": list(range(8, 16)),
        "test": list(range(16, 24)),
    }


@pytest.mark.parametrize("drop", [False, True])
def test_a_recording_on_both_sides_is_reported_and_dropped_if_asked(tones, caplog, drop):
    _, index = load_clips(arguments(tones))
    index.loc[[2, 3, 20], "group"] = "shared"
    rows = split_by_fold(index, arguments(tones, drop_leaks=drop))["train"]
    assert "2 training clips share a source recording (recording shared)" in caplog.text
    assert rows.tolist() == ([0, 1, 4, 5, 6, 7] if drop else list(range(8)))


def test_choosing_on_the_test_fold_is_said(tones, caplog):
    _, index = load_clips(arguments(tones))
    split_by_fold(index, arguments(tones, validation_folds=["3"]))
    assert "Fold 3 chooses the checkpoint and tests it" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "./nowhere"}, "found './nowhere', which is no folder, no file, no Hub id"),
        ({"dataset": "urbansound"}, "no folder, no file, no Hub id"),
        ({"dataset_split": "dev"}, "split 'dev'"),
        (
            {"label_column": "class"},
            "label_column: .* has no column 'class'; it has audio, name, kind, fold, recording",
        ),
        ({"audio_column": "sound"}, "audio_column: .* has no column 'sound'"),
        ({"group_column": "fsID"}, "group_column: .* has no column 'fsID'"),
        ({"train_folds": ["1", "7"]}, r"train_folds: no clip in fold 7; .* has 1 \(8 clips\), 2 \(8 clips\), 3"),
        ({"test_folds": ["1"]}, "fold 1 stands in train_folds and in test_folds"),
        ({"validation_folds": ["1"]}, "fold 1 stands in train_folds and in validation_folds"),
        ({"labels": ["low", "middle"]}, "train clips have the label 'high', which is not among low, middle"),
        ({"label_column": "fold"}, "validation clips have the label '2', which is not among 1"),
    ],
)
def test_bad_data_is_an_error_that_says_what_there_is(tones, changes, message):
    data = arguments(tones, **changes) if "dataset" not in changes else DataArguments(**changes)
    with pytest.raises(RecipeError, match=message):
        _, index = load_clips(data)
        class_names(index, split_by_fold(index, data), data)


@pytest.mark.parametrize("mode", ["offline", "refused"])
def test_an_unreachable_hub_names_the_ways_out(monkeypatch, mode):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    if mode == "refused":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RecipeError, match="(?s)not reachable.*audio_dendrites.data download RECIPE.*--dataset FOLDER"):
        load_clips(DataArguments(dataset="a/b"))


def test_bad_clips_are_all_named_or_skipped_and_listed(caplog):
    splits = {"train": np.array([0, 1, 2]), "validation": np.array([3]), "test": np.array([4, 5])}
    errors = ["", "b.wav: silent", "", "", "", "f.wav: empty"]
    with pytest.raises(
        RecipeError, match="(?s)2 clips cannot be used .*--on_bad_clip skip.*b.wav: silent.*f.wav: empty"
    ):
        drop_bad_clips(splits, errors, "error")
    with caplog.at_level(logging.WARNING):
        good, bad = drop_bad_clips(splits, errors, "skip")
    assert {split: rows.tolist() for split, rows in good.items()} == {"train": [0, 2], "validation": [3], "test": [4]}
    assert bad == ["b.wav: silent", "f.wav: empty"] and "Skipped b.wav: silent" in caplog.text
    with pytest.raises(RecipeError, match="validation_folds: none of the 1 clips"):
        drop_bad_clips(splits, ["", "", "", "d.wav: silent", "", ""], "skip")


def test_features_do_not_depend_on_how_clips_are_labelled(tones):
    by_kind, _ = load_clips(arguments(tones))
    by_fold, _ = load_clips(arguments(tones, label_column="fold", group_column=None))
    assert by_kind._fingerprint == by_fold._fingerprint


def test_stats_tell_what_a_recipe_trains_on(tones, tmp_path, capsys):
    clips = Dataset.from_parquet(str(tones), cache_dir=str(tmp_path)).to_list()
    clips[23]["audio"]["bytes"] = b"broken"
    clips[2]["recording"] = clips[23]["recording"]
    Dataset.from_list(clips).to_parquet(tmp_path / "clips.parquet")
    fields = [f"--{name}={value if isinstance(value, str) else value[0]}" for name, value in TONES.items()]
    data_module.main(["stats", "--dataset", str(tmp_path / "clips.parquet"), *fields])
    told = capsys.readouterr().out
    table = [line.split() for line in told.splitlines()]
    for row in (["high", "4", "4", "4", "12"], ["low", "4", "4", "4", "12"], ["all", "8", "8", "8", "24"]):
        assert row in table
    assert "seconds: 0.300 shortest, 0.520 median, 0.740 longest, 12 in all" in told
    assert "sampling rates: 16000 Hz (23 clips)" in told
    assert "unreadable clips: 1\n  clip-23: " in told
    assert "source recordings in several folds: 1 of 12\n  11: folds 1, 3\n" in told

    extractor = ASTFeatureExtractor(do_normalize=False, max_length=1024)
    energies = []
    for clip in clips[:8]:
        waveform, _ = soundfile.read(io.BytesIO(clip["audio"]["bytes"]), dtype="float32")
        frames = 1 + (len(waveform) - 400) // 160
        energies.append(extractor(waveform, sampling_rate=16000)["input_values"][0][:frames])
    energies = np.concatenate(energies)
    mean, std = (float(line[1]) for line in table if line and line[0] in ("mean:", "std:"))
    assert (mean, std) == (pytest.approx(energies.mean(), abs=1e-3), pytest.approx(energies.std(), abs=1e-3))
