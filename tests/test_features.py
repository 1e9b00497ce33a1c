"""Our log-mel features are the stock extractor's, and their cache is used when it may be."""

import io
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ASTFeatureExtractor, AutoFeatureExtractor

from audio_dendrites.data import features
from audio_dendrites.data.features import (
    BatchedASTFeatureExtractor,
    ClipFeatures,
    ClipWaveforms,
    ComputedFeatures,
    extract_features,
)

RATE = 16000


def make_waveform(kind: str, length: int, level: float, seed: int) -> np.ndarray:
    """A test signal, (length,), float32."""
    random = np.random.default_rng(seed)
    if kind == "noise":
        signal = random.standard_normal(length)
    elif kind == "tone":
        signal = np.sin(2 * np.pi * random.uniform(20, 7900) * np.arange(length) / RATE)
    elif kind == "click":
        signal = np.zeros(length)
        signal[random.integers(length)] = 1
    else:
        signal = 1 + 1e-3 * random.standard_normal(length)
    return (level * signal).astype(np.float32)


waveforms = st.builds(
    make_waveform,
    kind=st.sampled_from(["noise", "tone", "click", "offset"]),
    length=st.integers(400, 4000) | st.integers(400, 80000),
    level=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 32768.0]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=60, deadline=None)
@given(
    clips=st.lists(waveforms, min_size=1, max_size=5),
    max_length=st.integers(1, 600),
    normalised=st.booleans(),
)
def test_a_batch_equals_the_stock_extractor(clips, max_length, normalised):
    ours = BatchedASTFeatureExtractor(max_length=max_length, do_normalize=normalised)
    wanted = ours.stock()(clips, sampling_rate=RATE, return_tensors="pt")["input_values"]
    got = ours(clips, sampling_rate=RATE, return_tensors="pt")["input_values"]
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(clips=st.lists(waveforms, min_size=1, max_size=5))
def test_log_mel_is_the_stock_result_before_padding(clips):
    ours = BatchedASTFeatureExtractor(max_length=500)
    wanted = ours.stock()(clips, sampling_rate=RATE)["input_values"]
    for clip, energies, padded in zip(clips, ours.log_mel(clips), wanted, strict=True):
        assert energies.shape == (1 + (len(clip) - 400) // 160, 128)
        np.testing.assert_allclose(energies, padded[: len(energies)], atol=1e-4, rtol=0)
        np.testing.assert_allclose(padded[len(energies) :], ours.padding_level, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_rate": 8000},
        {"sampling_rate": 22050},
        {"num_mel_bins": 64},
        {"num_mel_bins": 50},
        {"mean": 1.5},
    ],
    ids=str,
)
def test_other_settings_equal_the_stock_extractor(options):
    ours = BatchedASTFeatureExtractor(max_length=64, **options)
    clip = make_waveform("noise", 9000, 0.1, seed=0)
    call = {"raw_speech": clip, "sampling_rate": ours.sampling_rate, "return_tensors": "np"}
    wanted = ours.stock()(**call)["input_values"]
    np.testing.assert_allclose(ours(**call)["input_values"], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_length", [10, 98, 99, 1024])
@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_a_call_pads_truncates_and_returns_like_the_stock_extractor(max_length, return_tensors):
    ours = BatchedASTFeatureExtractor(max_length=max_length)
    clip = make_waveform("noise", RATE, 0.1, seed=0)
    for speech in (clip, clip.astype(np.float64), clip.tolist(), [clip, clip[:5000]], np.stack([clip, clip])):
        wanted = ours.stock()(speech, sampling_rate=RATE, return_tensors=return_tensors)["input_values"]
        got = ours(speech, sampling_rate=RATE, return_tensors=return_tensors)["input_values"]
        assert type(got) is type(wanted)
        np.testing.assert_allclose(np.stack([*got]), np.stack([*wanted]), atol=1e-4, rtol=0)


def test_another_sampling_rate_is_refused():
    with pytest.raises(ValueError, match="sampling_rate must be 16000, got 44100"):
        BatchedASTFeatureExtractor()(np.ones(800, np.float32), sampling_rate=44100)


@pytest.mark.parametrize("shape", [(399,), (2, 800)])
def test_a_clip_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="at least 400 samples, got"):
        BatchedASTFeatureExtractor().log_mel([np.ones(shape, np.float32)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_features():
    ours = BatchedASTFeatureExtractor()
    clips = [make_waveform("noise", length, 0.1, seed=length) for length in (400, 9000, 64000)]
    for cpu, gpu in zip(ours.log_mel(clips), ours.log_mel(clips, "cuda"), strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-4, rtol=0)


@pytest.mark.parametrize("save", [BatchedASTFeatureExtractor.stock, lambda ours: ours], ids=["stock", "ours"])
def test_a_saved_extractor_is_the_stock_one(tmp_path, save):
    ours = BatchedASTFeatureExtractor(max_length=400, mean=-4.452, std=3.936)
    ours.log_mel([np.ones(800, np.float32)])
    save(ours).save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is ASTFeatureExtractor
    plain = ASTFeatureExtractor(max_length=400, mean=-4.452, std=3.936)
    assert (tmp_path / "preprocessor_config.json").read_text() == plain.to_json_string()
    assert vars(loaded).keys() - vars(plain).keys() <= {"feature_extractor_type"}


def test_use_does_not_change_an_extractors_hash():
    ours = BatchedASTFeatureExtractor()
    before = Hasher.hash(ours)
    ours.log_mel([np.ones(800, np.float32)])
    assert Hasher.hash(ours) == before == Hasher.hash(pickle.loads(pickle.dumps(ours)))


def wav(row: int) -> dict[str, bytes | None]:
    """An audio cell: noise of 0.1 s and more, at 44.1 kHz in stereo."""
    file = io.BytesIO()
    samples = 0.1 * np.random.default_rng(row).standard_normal((4410 + 2000 * row, 2))
    soundfile.write(file, samples, 44100, format="WAV")
    return {"bytes": file.getvalue(), "path": None}


def load_clips(folder: Path, count: int = 6, broken: int = 3) -> datasets.Dataset:
    """Clips stored in a folder, one of them broken; a later call finds the caches of an earlier one."""
    if not folder.exists():
        audio = [wav(row) for row in range(count)]
        audio[broken]["bytes"] = b"not a sound file"
        labels, names = [row % 2 for row in range(count)], [f"{row}.wav" for row in range(count)]
        clips = datasets.Dataset.from_dict({"audio": audio, "label": labels, "file": names})
        clips = clips.cast_column("audio", Audio(decode=False))
        clips = clips.cast_column("label", ClassLabel(names=["cat", "dog"]))
        clips.save_to_disk(folder)
    return datasets.load_from_disk(folder)


def caches(folder: Path) -> dict[str, int]:
    """Cache files and the time each was written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("cache-*")}


@pytest.fixture
def clips(tmp_path) -> datasets.Dataset:
    return load_clips(tmp_path / "clips")


def test_features_take_the_place_of_the_audio_and_all_else_stays(clips):
    result = extract_features(clips, BatchedASTFeatureExtractor(), id_column="file")
    assert result.column_names == ["label", "file", "input_values", "error"]
    assert result.features["label"] == clips.features["label"]
    assert result["file"][:] == clips["file"][:]
    assert result.features["input_values"].feature.dtype == "float16"


def test_a_bad_clip_gets_its_cause_and_no_frames(clips):
    result = extract_features(clips, BatchedASTFeatureExtractor(), id_column="file", batch_size=2)
    assert [error.split(": ")[:2] for error in result["error"]] == [[""]] * 3 + [["3.wav", "cannot decode"]] + [
        [""]
    ] * 2
    assert [bool(values) for values in result["input_values"]] == [True, True, True, False, True, True]


def test_a_bad_clip_without_name_is_called_by_its_row(clips):
    result = extract_features(clips, BatchedASTFeatureExtractor(), batch_size=2, num_proc=2)
    assert result[3]["error"].startswith("row 3: ")


def test_a_block_of_the_cache_has_many_batches():
    clips = datasets.Dataset.from_dict({"audio": [wav(0)] * 11}).cast_column("audio", Audio(decode=False))
    result = extract_features(clips, BatchedASTFeatureExtractor(), batch_size=1)
    assert [len(block) for block in result.data.column("error").chunks] == [8, 3]


def test_a_missing_cell_is_a_bad_clip():
    clips = datasets.Dataset.from_dict({"audio": [wav(0), None]}).cast_column("audio", Audio(decode=False))
    result = extract_features(clips, BatchedASTFeatureExtractor())
    assert result["error"][:] == ["", "row 1: the clip has neither bytes nor a path"]


def test_stored_features_are_the_extractors_in_half_precision(clips):
    ours = BatchedASTFeatureExtractor()
    result = ClipFeatures(extract_features(clips, ours), clips["label"], 128)
    waveform = features.load_waveform(clips[5]["audio"])
    wanted = ours.log_mel([waveform])[0].half()
    torch.testing.assert_close(result[5]["input_values"], wanted, atol=0, rtol=0)
    assert result[3]["input_values"].shape == (0, 128)


def test_exact_features_are_the_extractors_in_full_precision(clips):
    ours = BatchedASTFeatureExtractor()
    exact = ComputedFeatures(ClipWaveforms(clips, clips["label"], RATE), ours, "float32")
    wanted = ours.log_mel([features.load_waveform(clips[5]["audio"])])[0]
    torch.testing.assert_close(exact[5]["input_values"], wanted, atol=0, rtol=0)
    assert exact[5]["labels"] == clips[5]["label"] and len(exact) == len(clips)


def test_computed_features_do_not_depend_on_the_number_of_threads(clips):
    extractor, before, found = (
        BatchedASTFeatureExtractor(sampling_rate=8000, num_mel_bins=50),
        torch.get_num_threads(),
        [],
    )
    exact = ComputedFeatures(ClipWaveforms(clips, clips["label"], 8000), extractor, "float32")
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append([example["input_values"] for example in exact.__getitems__([0, 1, 2, 4, 5])])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_audio_that_datasets_would_decode_gives_the_same_features(clips):
    decoding = clips.cast_column("audio", Audio(sampling_rate=RATE))
    ours = BatchedASTFeatureExtractor()
    assert extract_features(decoding, ours)[:] == extract_features(clips, ours)[:]


def test_a_missing_or_taken_column_is_named(clips):
    with pytest.raises(ValueError, match="no column 'sound'; the data set has .*'audio'"):
        extract_features(clips, BatchedASTFeatureExtractor(), audio_column="sound")
    with pytest.raises(ValueError, match="'error'.* exist already"):
        extract_features(clips.rename_column("file", "error"), BatchedASTFeatureExtractor())


@pytest.mark.parametrize("change", [{}, {"max_length": 400}, {"padding_value": 1.0}], ids=str)
def test_a_second_run_reads_the_cache_whatever_the_max_length(tmp_path, change):
    folder = tmp_path / "clips"
    first = extract_features(load_clips(folder), BatchedASTFeatureExtractor(max_length=1024), num_proc=2)
    written = caches(folder)
    second = extract_features(load_clips(folder), BatchedASTFeatureExtractor(**change))
    assert caches(folder) == written
    assert second[:] == first[:]


@pytest.mark.parametrize(
    "change",
    [{"sampling_rate": 8000}, {"num_mel_bins": 64}, {"mean": 0.0}, {"std": 1.0}, {"do_normalize": False}],
    ids=str,
)
def test_another_feature_setting_computes_anew(tmp_path, change):
    folder = tmp_path / "clips"
    first = extract_features(load_clips(folder), BatchedASTFeatureExtractor())
    written = caches(folder)
    second = extract_features(load_clips(folder), BatchedASTFeatureExtractor(**change))
    assert len(caches(folder)) == len(written) + 1
    assert second[0]["input_values"] != first[0]["input_values"]


def test_another_code_version_or_other_clips_compute_anew(tmp_path, monkeypatch):
    folder = tmp_path / "clips"
    extract_features(load_clips(folder), BatchedASTFeatureExtractor())
    extract_features(load_clips(folder).select(range(2)), BatchedASTFeatureExtractor())
    assert len(caches(folder)) == 2
    monkeypatch.setattr(features, "FEATURES_VERSION", features.FEATURES_VERSION + 1)
    extract_features(load_clips(folder), BatchedASTFeatureExtractor())
    assert len(caches(folder)) == 3


def test_extraction_leaves_the_callers_thread_count(clips):
    before = torch.get_num_threads()
    extract_features(clips, BatchedASTFeatureExtractor())
    assert torch.get_num_threads() == before


@pytest.fixture
def examples(clips) -> ClipFeatures:
    return ClipFeatures(extract_features(clips, BatchedASTFeatureExtractor()), clips["label"], 128)


def equal(one: dict, other: dict) -> bool:
    """Whether two examples are the same."""
    return torch.equal(one["input_values"], other["input_values"]) and one["labels"] == other["labels"]


def test_a_batch_of_examples_equals_its_single_rows(examples):
    rows = [4, 0, 3, 4, 5]
    batch = examples.__getitems__(rows)
    assert all(equal(example, examples[row]) for row, example in zip(rows, batch, strict=True))
    assert [examples[row]["labels"] for row in range(len(examples))] == [0, 1, 0, 1, 0, 1]


def test_examples_of_a_shuffled_data_set_follow_its_order(clips):
    result = extract_features(clips, BatchedASTFeatureExtractor())
    straight = ClipFeatures(result, result["label"], 128)
    shuffled = ClipFeatures(result.select([5, 1, 4]), result.select([5, 1, 4])["label"], 128)
    for place, row in enumerate([5, 1, 4]):
        torch.testing.assert_close(shuffled[place]["input_values"], straight[row]["input_values"])
        assert shuffled[place]["labels"] == straight[row]["labels"]


def test_examples_survive_pickling(examples):
    copy = pickle.loads(pickle.dumps(examples))
    assert all(equal(copy[row], examples[row]) for row in range(len(examples)))
