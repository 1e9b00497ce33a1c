"""Claims about the generated data set: deterministic, shaped like UrbanSound8K, various, and labelled as synthetic."""

import io
from collections import Counter, defaultdict

import numpy as np
import pytest
import soundfile

from audio_dendrites.data.synthetic import LABELS, generate_clips, load_synthetic


@pytest.fixture(scope="module")
def rows():
    return list(generate_clips(clips_per_class=10))


@pytest.fixture(scope="module")
def rows_in_two_folds():
    return list(generate_clips(clips_per_class=11, folds=2, labels=LABELS[:4]))


@pytest.fixture(scope="module")
def infos(rows):
    return [soundfile.info(io.BytesIO(row["audio"]["bytes"])) for row in rows]


def test_two_processes_generate_the_same_bytes_and_the_data_set_says_what_it_is(rows, tmp_path):
    # The rows are seconds old by now, so a time of writing in a file would show.
    dataset = load_synthetic(clips_per_class=10, cache_dir=tmp_path, num_proc=2)
    assert list(dataset) == rows and dataset.features["audio"].decode is False
    assert "No real recordings" in dataset.info.description
    assert all(audio["path"].startswith("synthetic/") for audio in dataset["audio"])
    columns = {"string": ["slice_file_name", "class"], "int64": ["fsID", "salience", "fold", "classID"],
               "float64": ["start", "end"]}  # fmt: skip
    assert all(dataset.features[name].dtype == kind for kind, names in columns.items() for name in names)


def test_another_seed_gives_other_bytes(rows):
    first = next(generate_clips(seed=1, clips_per_class=10))
    assert first["audio"]["bytes"] != rows[0]["audio"]["bytes"]


def test_labels_are_the_classes_of_urbansound8k_in_its_order():
    assert LABELS == (
        "air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling", "engine_idling", "gun_shot",
        "jackhammer", "siren", "street_music",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "folds"), [("rows", 10), ("rows_in_two_folds", 2)])
def test_every_class_has_its_clips_and_folds_are_equal(name, folds, request):
    rows = request.getfixturevalue(name)
    for field in ("class", "fold"):
        assert len(set(Counter(row[field] for row in rows).values())) == 1
    assert {row["fold"] for row in rows} == set(range(1, folds + 1))
    assert all(LABELS[row["classID"]] == row["class"] for row in rows)


def test_a_source_recording_has_several_slices_in_one_fold_and_class(rows_in_two_folds):
    homes = defaultdict(set)
    for row in rows_in_two_folds:
        homes[row["fsID"]].add((row["fold"], row["classID"]))
    assert all(len(home) == 1 for home in homes.values())
    assert 2 * 2 * 4 <= len(homes) <= len(rows_in_two_folds) / 1.5  # of four classes


def test_names_lengths_and_formats_are_various_and_true(rows, infos):
    assert len({row["slice_file_name"] for row in rows}) == len(rows)
    lengths = [row["end"] - row["start"] for row in rows]
    assert (min(lengths), max(lengths)) == pytest.approx((0.054, 4.0), abs=1e-3)
    assert 0.04 < np.mean(np.less(lengths, 1)) < 0.12
    for row, info, length in zip(rows, infos, lengths, strict=True):
        name, container = row["slice_file_name"].split(".")
        source, class_id, _, _ = name.split("-")
        assert (int(source), int(class_id), container) == (row["fsID"], row["classID"], info.format.lower())
        padding = 0.1 if info.subtype == "IMA_ADPCM" else 1e-4  # ADPCM fills its last block
        assert length - 1e-4 <= info.duration <= length + padding
    assert len({info.samplerate for info in infos}) >= 5 and {info.channels for info in infos} == {1, 2}
    assert {info.subtype for info in infos} >= {"PCM_16", "PCM_24", "PCM_U8", "IMA_ADPCM", "FLOAT"}
    assert {info.format for info in infos} == {"WAV", "FLAC"} and {row["salience"] for row in rows} == {1, 2}


def test_every_clip_decodes_to_sound(rows):
    for row in rows:
        wave, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        assert np.isfinite(wave).all() and wave.std() > 1e-4, row["slice_file_name"]
        assert np.mean(np.abs(wave) > 0.999) < 0.01, row["slice_file_name"]
