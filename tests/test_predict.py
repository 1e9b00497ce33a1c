"""predict.py: scores, files, and memory."""

import tracemalloc

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import TINY_AST, TINY_CNN14, TINY_VIT, tone
from huggingface_hub import HfApi
from transformers import pipeline

import predict
from audio_dendrites.data.audio import load_waveform
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.data.windows import window_layout, windows
from audio_dendrites.errors import UserError
from audio_dendrites.models.finished import load_finished
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.recipes import FeatureArguments, ModelArguments
from audio_dendrites.results.inference import Batches

FAMILIES = {
    "ast": {"model_config": TINY_AST},
    "vit": {"architecture": "vit", "model_config": TINY_VIT},
    "cnn14": {"architecture": "cnn14", "model_config": TINY_CNN14},
    "waveform": {"model_config": TINY_AST, "waveform": True},
    "librosa": {"architecture": "cnn14", "model_config": TINY_CNN14, "waveform": True},
}
LENGTHS = (0.3, 0.5, 1.4, 0.3, 2.0)  # seconds; windows have 0.5


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of stereo files at 44.1 kHz, of one window and of several."""
    folder = tmp_path_factory.mktemp("sounds")
    for row, seconds in enumerate(LENGTHS):
        samples = np.stack([tone(300 * (row + 1), seconds, 44100), tone(500, seconds, 44100, seed=1)], axis=1)
        soundfile.write(folder / f"{row}.flac", samples, 44100)
    return folder


@pytest.fixture
def save(tmp_path):
    """A function that saves a model of random weights and its extractor, and returns the folder."""

    def write(family, **fields):
        torch.manual_seed(0)
        arguments = ModelArguments(**FAMILIES[family])
        extractor = load_extractor(arguments, FeatureArguments(max_length=48))
        model = load_model(["high", "low", "none"], arguments, extractor)
        model.config.update({"window_overlap": 0.25} | fields)
        for parameter in model.parameters():  # so that the classes differ
            parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / "run")
        extractor.stock().save_pretrained(tmp_path / "run")
        return tmp_path / "run"

    return write


def by_pipeline(folder, path):
    """The spans and logits of the windows of a file, one at a time, by the pipeline of transformers alone."""
    model, extractor = load_finished(folder)
    classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
    waveform = load_waveform({"bytes": None, "path": str(path)})
    cuts, logits = windows(len(waveform), **window_layout(extractor, model.config)), []
    for cut in cuts:
        found = {one["label"]: one["score"] for one in classify(waveform[cut], top_k=3, function_to_apply="none")}
        logits.append([found[name] for name in ("high", "low", "none")])
    return [(cut.start / 16000, min(cut.stop, len(waveform)) / 16000) for cut in cuts], torch.tensor(logits)


@pytest.mark.parametrize(
    ("family", "fields"),
    [(family, {}) for family in FAMILIES] + [("ast", {"problem_type": "multi_label_classification"})],
)
def test_scores_timeline_and_embeddings_are_those_of_pipeline_window_by_window(
    save, sounds, tmp_path, monkeypatch, family, fields
):
    monkeypatch.setattr("audio_dendrites.results.inference._CLIPS_A_WORKER", 2)  # so that workers decode
    monkeypatch.setattr("audio_dendrites.data.audio._BLOCK", 10000)  # so that the files have several blocks
    folder, (scores, timeline, embeddings) = (
        save(family, **fields),
        (tmp_path / name for name in ("s.csv", "t.csv", "e.parquet")),
    )
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    files = [str(path) for path in (tmp_path / "bad.wav", *sorted(sounds.iterdir()))]
    options = ["--batch_size", "2", "--output", scores, "--timeline", timeline, "--embeddings", embeddings]
    with pytest.raises(UserError, match="^1 of 6 files .*\n.*bad.wav: cannot decode"):
        predict.main([str(folder), *files, *map(str, options)])

    scores, timeline = pandas.read_csv(scores), pandas.read_csv(timeline)
    table = pyarrow.parquet.read_table(embeddings)
    assert scores["file"].tolist() == table["file"].to_pylist() == files[1:]
    assert table.schema.metadata == {b"model": str(folder).encode(), b"revision": b""}
    hidden = torch.tensor(table["embedding"].to_pylist())
    model, _ = load_finished(folder)
    head = getattr(getattr(model, "backbone", model).classifier, "dense", getattr(model, "backbone", model).classifier)
    for row, path in enumerate(files[1:]):
        spans, logits = by_pipeline(folder, path)
        assert (len(spans) > 1) == (LENGTHS[row] > 0.5)
        activate = torch.sigmoid if fields else lambda logits: logits.softmax(-1)
        windows = timeline[timeline["file"] == path]
        assert np.abs(windows[["start", "end"]].to_numpy() - spans).max() <= 0.0005
        assert np.abs(windows.iloc[:, 3:].to_numpy() - activate(logits).numpy()).max() < 1e-4
        assert np.abs(scores.iloc[row, 1:].to_numpy(float) - activate(logits.mean(0)).numpy()).max() < 1e-4
        assert (head(hidden[row]) - logits.mean(0)).abs().max() < 1e-4


def test_audacity_labels_name_the_class_of_each_window(save, sounds, tmp_path):
    folder, labels = save("ast"), tmp_path / "new" / "labels.txt"
    predict.main([str(folder), str(sounds / "2.flac"), "--timeline", str(labels)])
    spans, logits = by_pipeline(folder, sounds / "2.flac")
    lines = [line.split("\t") for line in labels.read_text().splitlines()]
    assert [(float(start), float(end)) for start, end, _ in lines] == spans
    best = logits.softmax(-1).max(-1)
    for (*_, label), score, place in zip(lines, best.values, best.indices, strict=True):
        assert label == f"{('high', 'low', 'none')[place]} {score:.2f}"
    with pytest.raises(UserError, match=r"--timeline must be a .csv file for 5 files"):
        predict.main([str(folder), str(sounds), "--timeline", str(labels)])
    with pytest.raises(UserError, match=r"--batch_size must be in \[1, inf\), got 0"):
        predict.main([str(folder), str(sounds), "--batch_size", "0"])


def test_embeddings_of_a_model_of_the_hub_name_its_commit(save, sounds, online, tmp_path):
    api = HfApi()
    api.create_repo("me/tiny")
    api.upload_folder(repo_id="me/tiny", folder_path=save("ast"))
    api.upload_file(repo_id="me/tiny", path_in_repo="notes.txt", path_or_fileobj=b"newer")
    newest, pinned, _ = online.commits("me/tiny")
    for name, commit in {"me/tiny": newest, f"me/tiny@{pinned}": pinned}.items():
        predict.main([name, str(sounds / "0.flac"), "--embeddings", str(tmp_path / "e.parquet")])
        metadata = pyarrow.parquet.read_schema(tmp_path / "e.parquet").metadata
        assert metadata == {b"model": b"me/tiny", b"revision": commit.encode()}


def test_a_long_file_and_many_files_need_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("audio_dendrites.data.audio._BLOCK", 2**16)
    soundfile.write(tmp_path / "long.wav", np.tile(tone(440, 10, 8000), 60), 8000)  # 38 MB at 16 kHz
    extractor = BatchedASTFeatureExtractor(max_length=100)
    layout = {"max_length": 100, "overlap": 0.5, "window_length": 400, "hop_length": 160}
    clips = [{"bytes": None, "path": str(tmp_path / "long.wav")}]
    tracemalloc.start()
    count = sum(len(windows) for _, windows in Batches(clips, extractor, layout, "mean", 4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count > 1000 and peak < 4e6
