import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import ROOT, TONES, leave_macos_files, recording, tone, write_archives
from datasets import ClassLabel, Dataset, List
from pandas import DataFrame, Series
from transformers import ASTFeatureExtractor

from audio_dendrites.data.__main__ import main
from audio_dendrites.data.audio import load_waveform
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.splits import class_names, drawn_splits, drop_bad_clips, encode_labels, split_by_fold
from audio_dendrites.data.windows import ClipWindows
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments, parse_recipe
from data_collator import AugmentedClips, BalancedSampler


def arguments(dataset, **changes):
    return DataArguments(**{"dataset": str(dataset), **TONES, **changes})


def test_a_parquet_file_a_folder_and_the_index(tones):
    for dataset in (tones, tones.parent):
        clips, index = load_clips(arguments(dataset))
        assert clips.column_names == ["audio", "name"] and len(clips) == len(index) == 24
        assert index.iloc[9].to_dict() == {"fold": "2", "label": "high", "clip": "clip-9", "group": "4"}


def test_without_names_or_recordings_paths_or_rows_stand_for_themselves(tones):
    clips, index = load_clips(arguments(tones, clip_column=None, group_column=None))
    assert clips.column_names == ["audio"] and index.iloc[9][["clip", "group"]].tolist() == ["9.wav", "9.wav"]
    rows = [row | {"audio": row["audio"] | {"path": None}} for row in Dataset.from_parquet(str(tones)).to_list()]
    Dataset.from_list(rows).to_parquet(tones)
    _, index = load_clips(arguments(tones, clip_column=None))
    assert index["clip"].tolist()[9] == "000009"


def test_class_ids_get_the_names_the_data_set_has(tmp_path):
    labels = ClassLabel(names=["zebra", "ant"])
    Dataset.from_dict({"audio": [b""] * 2, "label": [0, 1], "fold": [1, 2]}).cast_column("label", labels).to_parquet(
        tmp_path / "x.parquet"
    )
    _, index = load_clips(DataArguments(dataset=str(tmp_path / "x.parquet")))
    assert index["label"].tolist() == ["zebra", "ant"]


def test_classes_are_sorted_whatever_the_order_of_the_rows(tones, caplog):
    _, index = load_clips(arguments(tones))
    splits = split_by_fold(index, arguments(tones))
    assert class_names(index, splits, arguments(tones)) == ["high", "low"]
    backwards = index.iloc[::-1].reset_index(drop=True)
    assert class_names(backwards, split_by_fold(backwards, arguments(tones)), arguments(tones)) == ["high", "low"]
    assert class_names(index, splits, arguments(tones, labels=["low", "high"])) == ["low", "high"]
    class_names(index, splits, arguments(tones, labels=["low", "high", "rare"]))
    assert "no training clip has the label rare" in caplog.text


def test_splits_are_the_folds_in_the_order_of_the_names(tones):
    _, index = load_clips(arguments(tones))
    splits = split_by_fold(index, arguments(tones))
    assert {split: rows.tolist() for split, rows in splits.items()} == {
        "train": list(range(8)),
        "validation": [*range(10, 16), 8, 9],
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
    assert "Fold 3 is in validation and in test" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "./nowhere"}, "dataset must be a file or a folder .*, a Hub id .* got './nowhere'"),
        ({"dataset": "urbansound"}, "a Hub id .owner/name. or 'synthetic', got 'urbansound'"),
        ({"dataset_split": "dev"}, "split 'dev'"),
        ({"label_column": "class"}, "label_column: .* has no column 'class'; it has audio, name, kind, fold, rec"),
        ({"audio_column": "sound"}, "audio_column: .* has no column 'sound'; it has .*; audio_path makes paths"),
        ({"group_column": "fsID"}, "group_column: .* has no column 'fsID'"),
        ({"train_folds": ["1", "7"]}, r"train_folds: no clip in fold 7; .* has 1 \(8 clips\), 2 \(8 clips\), 3"),
        ({"labels": ["low", "middle"]}, r"train clips must be labels of the recipe \(low, middle\), got 'high'"),
        ({"label_column": "recording", "group_column": None}, "validation clips must be .* got '4', '5', '6'"),
    ],
)  # fmt: skip
def test_bad_data_is_an_error_that_says_what_there_is(tones, changes, message):
    data = arguments(tones, **changes) if "dataset" not in changes else DataArguments(**changes)
    with pytest.raises(UserError, match=message):
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
    with pytest.raises(UserError, match="(?s)not reachable.*audio_dendrites.data download RECIPE.*--dataset FOLDER"):
        load_clips(DataArguments(dataset="a/b"))


def test_bad_clips_are_all_named_or_skipped_and_listed(caplog):
    splits = {"train": np.array([0, 1, 2]), "validation": np.array([3]), "test": np.array([4, 5])}
    errors = Series(["", "b.wav: silent", "", "", "", "f.wav: empty"])
    with pytest.raises(UserError, match="(?s)2 clips cannot be used .*--on_bad_clip skip.*b.wav: silent.*f.wav: empty"):
        drop_bad_clips(splits, errors, "error")
    with caplog.at_level(logging.WARNING):
        good, bad = drop_bad_clips(splits, errors, "skip")
    assert {split: rows.tolist() for split, rows in good.items()} == {"train": [0, 2], "validation": [3], "test": [4]}
    assert bad == {"train": ["b.wav: silent"], "test": ["f.wav: empty"]}
    assert "2 clips cannot be used and are left out:\n  b.wav: silent\n  f.wav: empty" in caplog.text
    with pytest.raises(UserError, match="none of the 1 validation clips can be used; the first: d.wav: silent"):
        drop_bad_clips(splits, Series(["", "", "", "d.wav: silent", "", ""]), "skip")


def test_features_do_not_depend_on_how_clips_are_labelled(tones):
    by_kind, _ = load_clips(arguments(tones))
    by_fold, _ = load_clips(arguments(tones, label_column="recording", group_column=None))
    assert by_kind._fingerprint == by_fold._fingerprint


def test_stats_tell_what_a_recipe_trains_on(tones, tmp_path, capsys):
    clips = Dataset.from_parquet(str(tones), cache_dir=str(tmp_path)).to_list()
    clips[23]["audio"]["bytes"] = b"broken"
    clips[2]["recording"] = clips[23]["recording"]
    Dataset.from_list(clips).to_parquet(tmp_path / "clips.parquet")
    fields = [f"--{name}={value if isinstance(value, str) else value[0]}" for name, value in TONES.items()]
    main(["stats", "--dataset", str(tmp_path / "clips.parquet"), *fields])
    told = capsys.readouterr().out
    table = [line.split() for line in told.splitlines()]
    for row in (["high", "4", "4", "4", "12"], ["low", "4", "4", "4", "12"], ["all", "8", "8", "8", "24"]):
        assert row in table
    assert "seconds: 0.300 shortest, 0.520 median, 0.740 longest, 12 in all" in told
    assert "sampling rates: 16000 Hz (23 clips)" in told
    assert "clips that cannot be used: 1\n  clip-23: " in told
    assert "source recordings in several folds: 1 of 12\n  11: folds 1, 3\n" in told

    extractor = ASTFeatureExtractor(do_normalize=False, max_length=1024)
    waveforms = [load_waveform(clip["audio"]) for clip in clips[:8]]
    frames = [1 + (len(waveform) - 400) // 160 for waveform in waveforms]
    energies = extractor(waveforms, sampling_rate=16000)["input_values"]
    energies = np.concatenate([values[:count] for values, count in zip(energies, frames, strict=True)])
    mean, std = (float(line[1]) for line in table if line and line[0] in ("mean:", "std:"))
    assert (mean, std) == (pytest.approx(energies.mean(), abs=1e-3), pytest.approx(energies.std(), abs=1e-3))
    assert "log-mel of the training folds (1), 8 clips, 16000 Hz, 128 bands:\nmean: " in told
    assert "What each choice of cache costs for 24 clips, estimated from 24 of them" in told


@pytest.fixture
def class_folders(tmp_path):
    """Clips of the classes dog and train, at several depths, once as they are and once below two splits."""
    for split in ("", "fit", "held_out"):
        for row in range(8):
            folder = tmp_path / ("splits" if split else "plain") / split / ("dog/near", "train")[row % 2]
            folder.mkdir(parents=True, exist_ok=True)
            folder = folder.parent if row == 2 else folder
            soundfile.write(folder / f"{row}.flac", tone(500), 16000)
    return tmp_path


SHARES = {"split_shares": [0.5, 0.25, 0.25]}


def test_a_folder_of_class_folders(class_folders):
    data = DataArguments(dataset=str(class_folders / "plain"), **SHARES)
    with pytest.raises(UserError, match="'near'"):  # the nearest folder names the class
        class_names(load_clips(data)[1], {"train": np.arange(8)}, DataArguments(labels=["dog", "train"]))
    for path in (class_folders / "plain" / "dog" / "near").iterdir():
        path.rename(path.parent.parent / path.name)
    clips, index = load_clips(data)
    assert dict(zip(index["clip"], index["label"], strict=True)) == {
        f"{kind}/{row}.flac": kind for row in range(8) for kind in [("dog", "train")[row % 2]]
    }
    assert load_waveform(clips[0]["audio"]).shape == (8000,)
    before = clips._fingerprint
    soundfile.write(class_folders / "plain" / "train" / "1.flac", tone(900), 16000)
    assert load_clips(data)[0]._fingerprint != before
    (class_folders / "plain" / "dog" / "phone.m4a").write_bytes(recording(tone(900)[:, None], 16000, "ipod", "aac"))
    clips, index = load_clips(data)
    assert index["label"].value_counts().to_dict() == {"dog": 5, "train": 4}
    assert len(load_waveform(clips[4]["audio"])) >= 8000 and index["clip"][4] == "dog/phone.m4a"
    soundfile.write(class_folders / "plain" / "stray.wav", tone(900), 16000)
    with pytest.raises(UserError, match="stray.wav must be in a class folder"):
        load_clips(data)


def test_what_macos_leaves_in_class_folders_is_neither_a_clip_nor_a_class(class_folders):
    data = DataArguments(dataset=str(class_folders / "plain"), **SHARES)
    expected = load_clips(data)[1]
    for path in sorted((class_folders / "plain").rglob("*.flac")):
        leave_macos_files(path)
        leave_macos_files(path.parent)
    (class_folders / "plain" / "dog" / "._clips.parquet").write_bytes(b"\0\5\26\7")
    (class_folders / "plain" / "__MACOSX" / "dog").mkdir(parents=True)
    (class_folders / "plain" / "__MACOSX" / "dog" / "._0.flac").write_bytes(b"\0\5\26\7")
    assert load_clips(data)[1].equals(expected)


@pytest.mark.parametrize(
    ("recipe", "name", "path"),
    [
        ("urbansound8k/ast.yaml", "7-1-0-0.wav", "audio/fold4/7-1-0-0.wav"),
        ("esc50/ast.yaml", "2-7-A-1.wav", "audio/2-7-A-1.wav"),
    ],
)
def test_an_unpacked_archive_is_divided_by_its_own_folds(tmp_path, recipe, name, path):
    archives = write_archives(tmp_path)
    parsed = parse_recipe([str(ROOT / "configs" / recipe)])
    folder = archives[parsed.data.dataset]
    data = parse_recipe([str(ROOT / "configs" / recipe), "--dataset", str(folder)]).data
    clips, index = load_clips(data)
    row = index.index[index["clip"] == name].item()
    assert len(index) == 20 and index["group"][row] == "7" and index["label"][row] in ("siren", "rain")
    assert clips[row]["audio"]["path"] == str(folder / path) and load_waveform(clips[row]["audio"]).shape == (8000,)
    assert {split: set(index["fold"][rows]) for split, rows in split_by_fold(index, data).items()} == {
        split: set(folds) for split, folds in parsed.data.folds.items()
    }
    assert load_clips(data)[0]._fingerprint == clips._fingerprint  # so that the cached features are found again
    (folder / path).unlink()
    with pytest.raises(
        UserError, match=rf"1 of the 20 files of .* do not exist; the first is .*{path} \(clip {name}\)"
    ):
        load_clips(data)
    data.on_bad_clip = "skip"
    assert len(load_clips(data)[1]) == 20  # the features say which cannot be read


def test_a_template_makes_the_paths_of_any_table(class_folders):
    table = class_folders / "tables" / "clips.csv"
    table.parent.mkdir()
    rows = [{"id": row, "kind": "train", "split": name} for row in (1, 3, 5) for name in ("fit", "held_out")]
    DataFrame(rows).to_csv(table, index=False)
    told = {"dataset": str(table), "label_column": "kind", "fold_column": "split"}

    def load(template):
        return load_clips(DataArguments(**told, audio_path=template))

    clips, index = load("../splits/{split}/{kind}/{id:.0f}.flac")
    assert index["clip"][5] == "../splits/held_out/train/5.flac" and load_waveform(clips[5]["audio"]).shape == (8000,)
    for template, message in (
        ("../{split}/{name}.flac", "audio_path: .*clips.csv has no column 'name'; it has id, kind, split"),
        ("../{split", "audio_path must be a path with columns in braces, .*got '../{split': expected '}'"),
        ("../{split:d}", "audio_path must be .*Unknown format code 'd'"),
        ("clip.wav", "audio_path must be a path with columns in braces, .*got 'clip.wav'"),
        ("{split}/{id}.flac", "dataset: 6 of the 6 files of .*clips.csv do not exist; the first is .*/fit/1.flac"),
    ):
        with pytest.raises(UserError, match=message):
            load(template)
    with pytest.raises(UserError, match="audio_path must be left out for synthetic, because it is for local tables"):
        load_clips(DataArguments(dataset="synthetic", audio_path="{id}.wav"))
    rows[1]["id"] = None
    DataFrame(rows).to_csv(table, index=False)
    with pytest.raises(UserError, match="audio_path: 'id' must have a value in each row, got 1 rows .* first is row 1"):
        load("../splits/{split}/{kind}/{id:.0f}.flac")


def test_splits_of_its_own(class_folders):
    splits = {"train_split": "fit", "validation_split": "held_out", "test_split": "held_out"}
    data = DataArguments(dataset=str(class_folders / "splits"), **splits)
    _, index = load_clips(data)
    rows = split_by_fold(index, data)
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [8, 8, 8]
    assert set(index["fold"].iloc[rows["train"]]) == {"fit"} and len(index) == 16
    with pytest.raises(UserError, match="splits must have the folders fit/, dev/, held_out/, got no dev/"):
        load_clips(DataArguments(dataset=str(class_folders / "splits"), **splits | {"validation_split": "dev"}))


def test_paths_in_a_csv_or_parquet_file_are_relative_to_it(class_folders):
    rows = DataFrame({"file": [f"plain/train/{row}.flac" for row in (1, 3, 5, 7)], "kind": "low", "part": [1, 0, 2, 1]})
    rows.to_csv(class_folders / "clips.csv", index=False)
    rows.to_parquet(class_folders / "clips.parquet")
    columns = {"audio_column": "file", "label_column": "kind", "fold_column": "part"}
    for name in ("clips.csv", "clips.parquet"):
        clips, index = load_clips(DataArguments(dataset=str(class_folders / name), **columns))
        assert load_waveform(clips[3]["file"]).shape == (8000,)
        assert index.iloc[3][["fold", "label", "clip", "group"]].tolist() == ["1", "low", *["plain/train/7.flac"] * 2]


def test_one_of_several_data_sets_of_a_folder(tones, tmp_path):
    for name in ("v1", "v2"):
        (tmp_path / "all" / name).mkdir(parents=True)
    shutil.copy(tones, tmp_path / "all" / "v1" / "train.parquet")
    Dataset.from_parquet(str(tones)).select(range(6)).to_parquet(tmp_path / "all" / "v2" / "train.parquet")
    assert len(load_clips(arguments(tmp_path / "all", dataset_dir="v2"))[1]) == 6
    with pytest.raises(UserError, match="dataset_dir: .*all has no folder v3"):
        load_clips(arguments(tmp_path / "all", dataset_dir="v3"))


def test_class_names_in_one_cell_are_a_list(class_folders):
    rows = [{"audio": f"plain/train/{row}.flac", "label": ("dog; bark", "cat")[row // 4], "fold": 1} for row in (1, 5)]
    DataFrame(rows).to_csv(class_folders / "clips.csv", index=False)
    _, index = load_clips(DataArguments(dataset=str(class_folders / "clips.csv"), label_separator=";"))
    assert index["label"].tolist() == [["dog", "bark"], ["cat"]]
    DataFrame(rows).assign(label=[["dog"], ["cat"]]).to_parquet(class_folders / "clips.parquet")
    with pytest.raises(UserError, match="label_separator must be left out if 'label' already holds lists, got ';'"):
        load_clips(DataArguments(dataset=str(class_folders / "clips.parquet"), label_separator=";"))


def drawn(index, **changes):
    data = DataArguments(dataset="x", split_shares=[0.6, 0.2, 0.2], **changes)
    return Series(drawn_splits(index, data), index["clip"]).sort_index()


def test_drawn_shares_keep_recordings_together_and_classes_apart():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), random.integers(1, 6, 200))
    index = DataFrame({"group": groups.astype(str), "label": [f"class {group % 4}" for group in groups]})
    index["clip"] = [f"{row:04}" for row in range(len(index))]
    splits = drawn(index)
    table = index.assign(split=splits.to_numpy())
    assert table.groupby("group")["split"].nunique().max() == 1
    shares = table.groupby("label")["split"].value_counts(normalize=True).unstack()
    assert np.abs(shares[["train", "validation", "test"]] - [0.6, 0.2, 0.2]).max().max() < 0.06
    assert drawn(index.sample(frac=1, random_state=1).reset_index(drop=True)).equals(splits)
    assert not drawn(index, split_seed=1).equals(splits)
    with pytest.raises(UserError, match="need at least 5 source recordings, got 4"):
        drawn(index[index["group"].astype(int) < 4].reset_index(drop=True))


def test_lists_of_clips_and_classes_that_are_dropped(class_folders):
    folder = class_folders / "plain"
    for path in (folder / "dog" / "near").iterdir():
        path.rename(folder / "dog" / path.name)
    (folder / "dog" / "near").rmdir()
    (folder / "noise").mkdir()
    soundfile.write(folder / "noise" / "9.flac", tone(900), 16000)
    lists = {"validation_list": "dev.txt", "test_list": "test.txt", "drop_labels": ["noise"]}
    data = DataArguments(dataset=str(folder), **lists)
    with pytest.raises(UserError, match="validation_list must be a file .*, got .*dev.txt: No such file"):
        load_clips(data)
    (folder / "dev.txt").write_text("dog/0.flac\ntrain/1.flac\n")
    (folder / "test.txt").write_text("dog/2.flac\ntrain/3.flac\n")
    clips, index = load_clips(data)
    rows = split_by_fold(index, data)
    assert index["clip"].iloc[rows["validation"]].tolist() == ["dog/0.flac", "train/1.flac"]
    assert index["clip"].iloc[rows["test"]].tolist() == ["dog/2.flac", "train/3.flac"]
    assert len(rows["train"]) == 4 and class_names(index, rows, data) == ["dog", "train"]
    assert [Path(clips[row]["audio"]["path"]).name for row in rows["test"]] == ["2.flac", "3.flac"]
    (folder / "test.txt").write_text("dog/0.flac\n")
    with pytest.raises(
        UserError, match="test_list: .*test.txt must not name clips of validation_list, got 1 .* dog/0.flac"
    ):
        load_clips(data)
    (folder / "test.txt").write_text("dog/2.flac\nnoise/9.flac\n")
    assert split_by_fold(load_clips(data)[1], data)["test"].tolist() == [rows["test"][0]]
    (folder / "test.txt").write_text("dog/9.flac\n")
    with pytest.raises(UserError, match="must name clips of .*plain, such as .* got 1 other names, the first is dog/9"):
        load_clips(data)
    with pytest.raises(UserError, match=r"drop_labels must be classes of .*plain \(dog, noise, train\), got cat"):
        load_clips(DataArguments(dataset=str(folder), drop_labels=["cat"], **SHARES))


def test_clips_without_a_label_or_a_path_are_an_error(tmp_path):
    (tmp_path / "x.csv").write_text("audio,label,fold\na.wav,dog,1\nb.wav,,1\n")
    with pytest.raises(UserError, match="label_column: 'label' must have a value in each row, got 1 .* row 1"):
        load_clips(DataArguments(dataset=str(tmp_path / "x.csv")))
    (tmp_path / "x.csv").write_text("audio,label,fold\n,dog,1\nb.wav,cat,1\n")
    with pytest.raises(UserError, match="audio_column: 'audio' must have a value in each row, got 1 .* row 0"):
        load_clips(DataArguments(dataset=str(tmp_path / "x.csv")))
    with pytest.raises(UserError, match="dataset must be .* a .parquet or .csv file, got .*x.txt"):
        (tmp_path / "x.txt").write_text("a.wav dog")
        load_clips(DataArguments(dataset=str(tmp_path / "x.txt")))
    with pytest.raises(UserError, match="train_split must be left out for .*x.csv, which has no splits of its own"):
        splits = {"train_split": "a", "validation_split": "b", "test_split": "c"}
        load_clips(DataArguments(dataset=str(tmp_path / "x.csv"), **splits))


@pytest.mark.parametrize("missing", [None, -1])
def test_lists_are_for_labels_only_and_have_no_missing_class(tmp_path, missing):
    names = List(ClassLabel(names=["zebra", "ant"]))
    lists = {"audio": [b"0", b"1"], "fold": [1, 2], "kind": ["a", "b"], "label": [[0], [1, missing]]}
    Dataset.from_dict(lists).cast_column("label", names).to_parquet(tmp_path / "x.parquet")
    data = {"dataset": str(tmp_path / "x.parquet")}
    with pytest.raises(UserError, match="label_column: the lists in 'label' must have no missing .* got 1 .* row 1"):
        load_clips(DataArguments(**data))
    for field in ("fold_column", "clip_column", "group_column"):
        with pytest.raises(UserError, match=f"{field} must hold one value in each row, got lists in 'label'"):
            load_clips(DataArguments(**data | {"label_column": "kind", field: "label"}))


def test_a_cache_that_cannot_be_written_is_an_error(tones, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tones / "cache")  # below a file
    with pytest.raises(UserError, match="HF_DATASETS_CACHE must be a folder that can .*, got .*Not a directory"):
        load_clips(arguments(tones))


@pytest.fixture
def table(tmp_path):
    """Writes a table of the given rows, and gives what loads it; `filename` is the path of a sound."""
    rows = [
        {"filename": f"{row}.wav", "name": f"n{row}", "category": "dog" if row % 2 else "rain", "fold": 1 + row // 2}
        for row in range(6)
    ]

    def write(*more, **fields):
        DataFrame(rows + list(more)).to_csv(tmp_path / "clips.csv", index=False)
        columns = {"audio_column": "filename", "label_column": "category", "clip_column": None, "group_column": None}
        return arguments(tmp_path / "clips.csv", on_bad_clip="skip", **columns | fields)

    return write


def test_the_column_of_paths_may_also_name_the_clips_and_the_recordings(table):
    for field in ("clip_column", "group_column"):
        clips, index = load_clips(table(**{field: "filename"}))
        assert clips.column_names == ["filename"] and index["clip"].tolist() == [f"{row}.wav" for row in range(6)]
        assert index["group"].equals(index["clip"])


def test_a_clip_without_a_recording_is_one_of_its_own(table):
    more = [
        {"filename": f"{row}.wav", "category": "dog", "fold": 1, "origin": origin} for row, origin in ((6, 3), (7, 3))
    ]
    _, index = load_clips(table(*more, group_column="origin"))
    assert index["group"].tolist() == [f"{row}.wav" for row in range(6)] + ["3.0", "3.0"]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"filename": "1.wav", "category": "rain"}, {}, "audio_column: .*/1.wav in the rows 1, 6 .*label dog and rain"),
        ({"filename": "./1.wav", "category": "dog"}, {}, "audio_column: .*/1.wav in the rows 1, 6 .*label dog[.]"),
        ({"filename": "6.wav", "name": "n1"}, {"clip_column": "name"}, "clip_column: .* got n1 in the rows 1, 6"),
    ],
)
def test_a_clip_in_two_rows_is_an_error_that_names_it(table, row, fields, message):
    with pytest.raises(UserError, match=message):
        load_clips(table({"category": "dog", "fold": 3} | row, **fields))


def test_a_clip_in_two_rows_may_have_one_of_them_dropped(table):
    twice = {"filename": "1.wav", "category": "unsure", "fold": 3}
    assert len(load_clips(table(twice, drop_labels=["unsure"]))[1]) == 6


@pytest.mark.parametrize("classes", [[], ["dog", "rain"]])
def test_a_clip_is_no_python_object(tmp_path, classes):
    count = 20_000
    names = pa.array([f"clip-{row}" for row in range(count)])
    audio = pa.StructArray.from_arrays([pa.repeat(pa.scalar(b"RIFF"), count), names], ["bytes", "path"])
    labels = pa.array([classes or ("dog", "rain")[row % 2] for row in range(count)])
    folds = pa.array([1 + row % 3 for row in range(count)])
    table = pa.table({"audio": audio, "name": names, "kind": labels, "fold": folds, "recording": names})
    pq.write_table(table, tmp_path / "clips.parquet")
    data = arguments(tmp_path / "clips.parquet")
    load_clips(data)
    before = sys.getallocatedblocks()
    clips, index = load_clips(data)
    splits, _ = drop_bad_clips(split_by_fold(index, data), Series("", index.index, dtype="str"), "error")
    targets = encode_labels(index["label"], class_names(index, splits, data), sparse=True)
    cut = ClipWindows(clips, np.full(count, 130), {"max_length": 100}, 0.5, "mean")
    sampler = BalancedSampler(AugmentedClips(clips), targets)
    assert sys.getallocatedblocks() - before < count / 10
    assert index.memory_usage(deep=True).sum() < 120 * count
    assert len(cut) == 2 * count == 2 * len(sampler)
