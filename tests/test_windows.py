"""Clips that are longer than the model's window: in evaluation, in the final scores and in predict.py."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, TINY_AST, TONES, recording, tone
from scipy.special import softmax
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import ASTFeatureExtractor, pipeline

import predict
import train
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.data.windows import ClipWindows, aggregate, stream_windows, windows, windows_of_clips
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_model
from audio_dendrites.recipes import ModelArguments, RunArguments, parse_recipe
from audio_dendrites.results.metrics import compute_metrics
from audio_dendrites.training.trainer import AudioTrainer
from data_collator import SpectrogramCollator


def test_windows_overlap_and_end_with_the_clip():
    assert windows(100, 100, 0.5) == [slice(0, 100)]
    assert windows(40, 100, 0.5) == [slice(0, 40)]
    assert windows(101, 100, 0.5) == [slice(0, 100), slice(1, 101)]
    assert windows(230, 100, 0.5) == [slice(s, s + 100) for s in (0, 50, 100, 130)]
    assert windows(200, 100, 0) == [slice(0, 100), slice(100, 200)]
    assert len(windows(12, 10, 0.99)) == 3
    assert windows(230, sys.maxsize, 0) == [slice(0, 230)]
    clips, starts, ends = windows_of_clips([40, 230, 100], 100, 0.5)
    assert clips.tolist() == [0, 1, 1, 1, 1, 2]
    assert starts.tolist() == [0, 0, 50, 100, 130, 0] and ends.tolist() == [40, 100, 150, 200, 230, 100]


@pytest.mark.parametrize("window_length", [400, 0])
def test_windows_of_samples_hold_whole_frames(window_length):
    size = 9 * 160 + window_length
    for extra in (0, 159):  # less than one frame more
        assert windows(size + extra, 10, 0.5, window_length, 160) == [slice(0, size + extra)]
    assert windows(size + 7 * 160 + 5, 10, 0.5, window_length, 160) == [
        slice(start * 160, start * 160 + size) for start in (0, 5, 7)
    ]


@pytest.mark.parametrize("window_length", [400, 0])
@pytest.mark.parametrize("overlap", [0, 0.5, 0.99])
def test_windows_of_a_stream_are_those_of_the_whole_clip(window_length, overlap):
    layout = {"max_length": 10, "overlap": overlap, "window_length": window_length, "hop_length": 160}
    clip = np.arange(12345)
    for length in (400, 1839, 1840, 1999, 2000, 2001, 5000, 12345):
        for block in (100, 3000, 20000):
            found = list(stream_windows([clip[i : min(i + block, length)] for i in range(0, length, block)], **layout))
            cuts = windows(length, **layout)
            assert [start for start, _, _ in found] == [cut.start for cut in cuts]
            assert all(np.array_equal(part, clip[:length][cut]) for (_, part, _), cut in zip(found, cuts, strict=True))
            assert [last for _, _, last in found] == [False] * (len(cuts) - 1) + [True]


def test_mean_and_max_of_each_clip():
    logits, clips = np.float32([[1, 5], [3, 1], [7, 7]]), np.array([4, 4, 9])
    assert aggregate(logits, clips, "mean").tolist() == [[2, 3], [7, 7]]
    assert aggregate(logits, clips, "max").tolist() == [[3, 5], [7, 7]]


@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_for_clips_that_fit_nothing_changes(aggregation):
    random = np.random.default_rng(0)
    clips = [{"input_values": torch.randn(frames, 128), "labels": frames % 3} for frames in (5, 50, 49)]
    cut = ClipWindows(clips, [5, 50, 49], {"max_length": 50}, 0.5, aggregation)
    assert len(cut) == 3
    collator = SpectrogramCollator(50)
    for name, values in collator(clips).items():
        assert torch.equal(values, collator(cut.__getitems__([0, 1, 2]))[name])
    logits = random.standard_normal((3, 7)).astype(np.float32)
    found, labels = cut.by_clip(logits, np.arange(3))
    assert found.dtype == np.float32 and np.array_equal(found, logits) and labels.tolist() == [0, 1, 2]


def test_a_window_of_frames_is_what_the_extractor_makes_of_its_samples():
    extractor = BatchedASTFeatureExtractor(max_length=30)
    waveform = tone(700, 0.8)
    frames = extractor.log_mel([waveform])[0]
    clips = ClipWindows([{"input_values": frames}], [len(frames)], extractor.window_layout, 0.5, "mean")
    cuts = windows(len(waveform), 30, 0.5, 400, 160)
    assert len(clips) == len(cuts) == 5
    for row, cut in enumerate(cuts):
        stock = ASTFeatureExtractor(max_length=30)(waveform[cut], sampling_rate=16000)["input_values"][0]
        assert np.abs(clips[row]["input_values"].numpy() - stock).max() < 1e-5


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_loss_of_an_evaluation_is_that_of_whole_clips(tmp_path, loss):
    extractor = BatchedASTFeatureExtractor(max_length=20)
    model = load_model(["high", "low"], ModelArguments(model_config=TINY_AST), extractor)
    lengths = [50, 20, 33]
    clips = [{"input_values": 3 * torch.randn(length, 128), "labels": length % 2} for length in lengths]
    dataset = ClipWindows(clips, lengths, extractor.window_layout, 0.5, "max")
    trainer = AudioTrainer(
        model, RunArguments(str(tmp_path), use_cpu=True, report_to=["none"], per_device_eval_batch_size=2, loss=loss),
        data_collator=SpectrogramCollator(20), eval_dataset=dataset, compute_metrics=compute_metrics, loss=loss,
    )  # fmt: skip
    output = trainer.predict(dataset)
    logits, labels = torch.tensor(output.predictions), torch.eye(2)[[0, 0, 1]]
    assert logits.shape == (3, 2) and len(dataset) > 3
    expected = (cross_entropy if loss == "cross_entropy" else binary_cross_entropy_with_logits)(logits, labels)
    assert output.metrics["test_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.fixture
def recipe(tones, tmp_path):
    fields = TONES | {
        "dataset": str(tones), "output_dir": str(tmp_path / "run"), "max_length": 20, "model_config": TINY_AST,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "num_train_epochs": 1,
        "learning_rate": 3e-3, "precision": "fp32", "preprocessing_num_workers": 1, "report_to": ["none"],
        "window_aggregation": "max",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return str(tmp_path / "recipe.yaml")


def test_long_clips_are_scored_whole_alike_by_the_run_by_three_processes_and_by_predict(
    recipe, tmp_path, capsys, monkeypatch
):
    train.main(parse_recipe([recipe]))
    predictions = pandas.read_parquet(tmp_path / "run" / "predictions.parquet").set_index("clip")
    logits = np.stack(predictions["logits"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(predictions) == metrics["test"]["clips"] == 8
    assert "Loaded by pipeline, scores within" in capsys.readouterr().out

    files = tmp_path / "sounds"
    files.mkdir()
    for row in range(16, 24):  # 62 frames and more: five windows at least
        waveform = tone(3000 if row % 2 else 300, 0.3 + 0.02 * row, seed=row)
        soundfile.write(files / f"clip-{row}.wav", waveform, 16000, subtype="PCM_16")
    classify = pipeline("audio-classification", model=str(tmp_path / "run"))
    waveform, _ = soundfile.read(files / "clip-16.wav", dtype="float32")
    by_window = []
    for start in (*range(0, 60 - 20, 10), 60 - 20):  # the frames of 0.62 s are 60
        answers = classify(waveform[start * 160 : start * 160 + 19 * 160 + 400], function_to_apply="none")
        by_window.append([answer["score"] for answer in sorted(answers, key=lambda answer: answer["label"])])
    assert np.abs(np.max(by_window, axis=0) - logits[0]).max() < 1e-4

    predict.main([str(tmp_path / "run"), str(files), "--output", str(tmp_path / "new" / "scores.csv")])
    scores = pandas.read_csv(tmp_path / "new" / "scores.csv")
    assert scores["file"].tolist() == [str(files / f"clip-{row}.wav") for row in range(16, 24)]
    assert np.abs(scores[["high", "low"]].to_numpy() - softmax(logits, axis=1)).max() < 1e-4

    options = ["--model", str(tmp_path / "run"), "--learning_rate", "0", "--output_dir", str(tmp_path / "three")]
    options += ["--model_config", "{}", "--max_steps", "1", "--eval_strategy", "no"]
    options += ["--load_best_model_at_end", "false"]
    count = sum(len(windows(frames, 20, 0.5)) for frames in range(60, 76, 2))
    assert count % 3 and count % 9 > 3  # the last batches of three processes are not full, and one has a clip less
    three = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", ROOT / "train.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*three, recipe, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    again = pandas.read_parquet(tmp_path / "three" / "predictions.parquet").set_index("clip")
    assert again.index.equals(predictions.index) and np.abs(np.stack(again["logits"]) - logits).max() < 1e-5
    other = json.loads((tmp_path / "three" / "metrics.json").read_text())
    assert other["processes"] == 3 and other["validation"]["mAP"] == metrics["validation"]["mAP"]

    capsys.readouterr()
    (files / "broken.flac").write_bytes(b"no sound")
    (files / "notes.txt").write_text("no sound either")
    soundfile.write(files / "loud.ogg", tone(300, 0.1, 44100), 44100)
    (files / "phone.m4a").write_bytes(recording(tone(300, 1.0)[:, None], 16000, "ipod", "aac"))
    with pytest.raises(UserError, match="(?s)^2 of 12 files could not be classified:.*broken.flac.*nowhere.wav"):
        predict.main([str(tmp_path / "run"), str(files), str(tmp_path / "nowhere.wav"), "--top_k", "1"])
    told = capsys.readouterr().out
    assert "loud.ogg" in told and "phone.m4a" in told and "broken" not in told
    assert "class 1" in told and "class 2" not in told
    monkeypatch.setattr("audio_dendrites.data.audio.HAS_AV", False)
    with pytest.raises(UserError, match="^2 of 11 files .*\n.*broken.flac.*\n.*phone.m4a: .* need PyAV"):
        predict.main([str(tmp_path / "run"), str(files)])


def test_predict_says_what_is_no_model_and_where_no_sound_is(tmp_path):
    with pytest.raises(UserError, match="no sound file in"):
        predict.main([str(tmp_path), str(tmp_path)])
    with pytest.raises(UserError, match=f"^{tmp_path} could not be loaded: .*config.json"):
        predict.main([str(tmp_path), str(ROOT / "predict.py")])
