"""The demo: its scores, its messages and its page."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import encoder_checkpoint, tone, wav
from pandas import DataFrame, read_csv
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

gr = pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")

import predict  # noqa: E402
from audio_dendrites.data.features import BatchedASTFeatureExtractor  # noqa: E402
from audio_dendrites.results import demo  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """An AST with windows of 48 frames and a wav2vec 2.0 model, which takes whole clips."""
    home = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ASTConfig(**sizes, max_length=48, initializer_range=0.5, id2label={0: "high", 1: "low", 2: "rain"})
    ASTForAudioClassification(config).save_pretrained(home / "ast")
    ASTFeatureExtractor(max_length=48).save_pretrained(home / "ast")
    return [str(home / "ast"), str(encoder_checkpoint(home, "wav2vec2"))]


@pytest.fixture(scope="module")
def models(runs):
    return demo.load_models(runs)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> dict[str, Path]:
    return demo.write_examples(tmp_path_factory.mktemp("examples"))


def expected(runs: list[str], file: Path, folder: Path) -> DataFrame:
    """The scores of predict.py, a row for each class, float32."""
    columns = {}
    for run in runs:
        predict.main([run, str(file), "--output", str(folder / "scores.csv")])
        columns[Path(run).name] = read_csv(folder / "scores.csv").drop(columns="file").iloc[0]
    return DataFrame(columns).astype(np.float32)


def test_scores_are_those_of_predict_to_the_digit(runs, models, examples, tmp_path):
    assert len(examples) == 11
    for name, panels in {"siren": 2, "all 10 in turn": 2}.items():
        table, figure = demo.hear(models, str(examples[name]), gr.Progress())
        found = table.set_index("class").astype(np.float32)
        truth = expected(runs, examples[name], tmp_path).loc[found.index]
        assert np.array_equal(found, truth, equal_nan=True) and found["ast"].notna().all() and len(found) == 3
        drawn = [axes for axes in figure.axes if axes.get_title()]
        assert len(drawn) == panels and drawn[1].get_title() == "ast: score of each window"
        assert drawn[0].get_xlim() == drawn[1].get_xlim() == (0, pytest.approx(soundfile.info(examples[name]).duration))


def test_a_clip_of_one_window_has_no_timeline(models, tmp_path):
    (tmp_path / "short.wav").write_bytes(wav(tone(440, 0.4)))
    figure = demo.hear(models, str(tmp_path / "short.wav"), gr.Progress())[1]
    assert [axes.get_title() for axes in figure.axes] == ["log-mel spectrogram at 16 kHz"]


def test_spectrogram_is_that_of_the_extractor_also_in_blocks(monkeypatch):
    waveform = tone(700, 3.0)
    whole = BatchedASTFeatureExtractor(do_normalize=False).log_mel([waveform])[0].T
    assert np.array_equal(demo.log_mel(waveform, 16000, 128), whole)
    monkeypatch.setattr(demo, "BLOCK", 70)
    monkeypatch.setattr(demo, "COLUMNS", 100)
    means = np.stack([part.mean(1) for part in whole.split(3, dim=1)], axis=1)  # 298 frames, the last column has one
    assert np.abs(demo.log_mel(waveform, 16000, 128) - means).max() < 1e-4


@pytest.mark.parametrize(
    "content, message",
    [(None, "first"), (wav(np.zeros(16000)), "silent"), (b"no sound", "cannot decode"), (b"", "empty")],
    ids=["nothing", "silence", "corrupt", "empty"],
)
def test_a_sound_that_cannot_be_used_gives_a_message(models, tmp_path, content, message):
    file = tmp_path / "clip.wav"
    file.write_bytes(content or b"")
    with pytest.raises(gr.Error, match=message) as caught:
        demo.hear(models, None if content is None else str(file), gr.Progress())
    assert str(tmp_path) not in str(caught.value)


def test_the_page_answers_on_this_machine(runs, models, examples, monkeypatch, tmp_path):
    from gradio_client import Client, handle_file

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = demo.build(models, examples)
    try:
        _, address, public = page.launch(server_name="127.0.0.1", **demo.LAUNCH)
        assert public is None and not page.analytics_enabled
        client = Client(address, verbose=False, analytics_enabled=False)
        table, figure = client.predict(handle_file(str(examples["dog bark"])), api_name="/classify")
        truth = expected(runs, examples["dog bark"], tmp_path)
        for label, *scores in table["data"]:
            assert np.float32(scores[0]) == truth.loc[label, "ast"]
        assert figure["plot"].startswith("data:image/")
        (tmp_path / "silent.wav").write_bytes(wav(np.zeros(16000)))
        with pytest.raises(Exception, match="silent.wav: silent, all of its 16000 samples are 0"):
            client.predict(handle_file(str(tmp_path / "silent.wav")), api_name="/classify")
    finally:
        page.close()
