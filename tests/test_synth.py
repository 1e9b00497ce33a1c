"""Claims about the embedded data set: deterministic, shaped like UrbanSound8K, various, and honest about what it is."""

import io
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile

from audio_dendrites.data.synthetic import LABELS, generate_clips, load_synthetic

CLIPS_PER_CLASS = 10


@pytest.fixture(scope="module")
def rows():
    return list(generate_clips(clips_per_class=CLIPS_PER_CLASS))


@pytest.fixture(scope="module")
def rows_in_two_folds():
    return list(generate_clips(clips_per_class=11, folds=2))


@pytest.fixture(scope="module")
def infos(rows):
    return [soundfile.info(io.BytesIO(row["audio"]["bytes"])) for row in rows]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return load_synthetic(clips_per_class=CLIPS_PER_CLASS, cache_dir=tmp_path_factory.mktemp("cache"))


def test_same_seed_gives_same_bytes(rows):
    # The first generation is seconds old by now, so a time of writing in a file would show.
    assert list(generate_clips(clips_per_class=CLIPS_PER_CLASS)) == rows


def test_other_seed_gives_other_bytes(rows):
    first = next(generate_clips(seed=1, clips_per_class=CLIPS_PER_CLASS))
    assert first["audio"]["bytes"] != rows[0]["audio"]["bytes"]


def test_labels_are_urbansound8k_classes_in_its_order():
    assert LABELS == (
        "air_conditioner",
        "car_horn",
        "children_playing",
        "dog_bark",
        "drilling",
        "engine_idling",
        "gun_shot",
        "jackhammer",
        "siren",
        "street_music",
    )


def test_columns_and_types_are_urbansound8k_ones(dataset):
    columns = {name: feature.dtype for name, feature in dataset.features.items() if name != "audio"}
    assert columns == {
        "slice_file_name": "string",
        "fsID": "int64",
        "start": "float64",
        "end": "float64",
        "salience": "int64",
        "fold": "int64",
        "classID": "int64",
        "class": "string",
    }
    assert dataset.features["audio"].decode is False


def test_loaded_data_set_is_what_was_generated(dataset, rows):
    assert list(dataset) == rows


def test_data_set_says_that_it_is_synthetic(dataset):
    assert "synthetic" in dataset.info.description.lower()
    assert all(audio["path"].startswith("synthetic/") for audio in dataset["audio"])


@pytest.mark.parametrize("name", ["rows", "rows_in_two_folds"])
def test_every_class_has_its_clips_and_folds_are_equal(name, request):
    rows = request.getfixturevalue(name)
    assert set(Counter(row["class"] for row in rows).values()) == {len(rows) // len(LABELS)}
    assert len(set(Counter(row["fold"] for row in rows).values())) == 1
    assert all(LABELS[row["classID"]] == row["class"] for row in rows)


def test_folds_are_counted_from_one(rows, rows_in_two_folds):
    assert {row["fold"] for row in rows} == set(range(1, 11))
    assert {row["fold"] for row in rows_in_two_folds} == {1, 2}


def test_no_source_recording_stands_in_two_folds_or_classes(rows_in_two_folds):
    homes = defaultdict(set)
    for row in rows_in_two_folds:
        homes[row["fsID"]].add((row["fold"], row["classID"]))
    assert all(len(home) == 1 for home in homes.values())
    # Several sources a class and fold, several slices a source.
    assert 2 * 2 * len(LABELS) <= len(homes) <= len(rows_in_two_folds) / 1.5


def test_file_names_are_unique_and_name_source_and_class(rows):
    assert len({row["slice_file_name"] for row in rows}) == len(rows)
    for row in rows:
        source, class_id, _, _ = row["slice_file_name"].split(".")[0].split("-")
        assert (int(source), int(class_id)) == (row["fsID"], row["classID"])


def test_lengths_run_from_54_ms_to_4_s(rows, infos):
    lengths = [row["end"] - row["start"] for row in rows]
    assert min(lengths) == pytest.approx(0.054, abs=1e-3)
    assert max(lengths) == pytest.approx(4.0, abs=1e-3)
    assert 0.04 < np.mean(np.less(lengths, 1)) < 0.12
    for info, length in zip(infos, lengths, strict=True):
        padding = 0.1 if info.subtype == "IMA_ADPCM" else 1e-4  # ADPCM fills its last block
        assert length - 1e-4 <= info.duration <= length + padding


def test_formats_are_various(rows, infos):
    assert len({info.samplerate for info in infos}) >= 5
    assert {info.channels for info in infos} == {1, 2}
    assert {info.subtype for info in infos} >= {"PCM_16", "PCM_24", "PCM_U8", "IMA_ADPCM", "FLOAT"}
    assert {info.format for info in infos} == {"WAV", "FLAC"}
    assert {row["salience"] for row in rows} == {1, 2}
    assert all(row["slice_file_name"].endswith(info.format.lower()) for row, info in zip(rows, infos, strict=True))


def test_every_clip_decodes_to_sound(rows):
    for row in rows:
        wave, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        assert np.isfinite(wave).all(), row["slice_file_name"]
        assert wave.std() > 1e-4, row["slice_file_name"]
        assert np.mean(np.abs(wave) > 0.999) < 0.01, row["slice_file_name"]
