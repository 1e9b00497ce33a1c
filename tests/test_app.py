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
    # A clip with more than 60 windows, and wav2vec 2.0, have no rollout.
    for name, look in {"siren": ["ast: where it looked (attention rollout)"], "all 10 in turn": []}.items():
        table, figure = demo.hear(models, str(examples[name]), gr.Progress())
        found = table.set_index("class").astype(np.float32)
        truth = expected(runs, examples[name], tmp_path).loc[found.index]
        assert np.array_equal(found, truth, equal_nan=True) and found["ast"].notna().all() and len(found) == 3
        drawn = [axes for axes in figure.axes if axes.get_title()]
        titles = ["log-mel spectrogram at 16 kHz", *look, "ast: score of each window"]
        assert [axes.get_title() for axes in drawn] == titles
        seconds = soundfile.info(examples[name]).duration
        assert {axes.get_xlim() for axes in drawn} == {(0, seconds)}


def test_a_clip_of_one_window_has_no_timeline(models, tmp_path):
    (tmp_path / "short.wav").write_bytes(wav(tone(440, 0.4)))
    figure = demo.hear(models, str(tmp_path / "short.wav"), gr.Progress())[1]
    spectrogram, look = figure.axes
    assert look.get_title() == "ast: where it looked (attention rollout)" and look.get_xlim() == (0, 0.4)
    grey, looked = look.images
    assert looked.get_extent() == [0, pytest.approx(0.4, abs=0.01), 0, 128]
    # The model pads the clip to 48 frames, (47 · 160 + 400) / 16000 = 0.495 s, of which 39 begin before 0.4 s.
    assert looked.get_array().shape == (128, 39) and len(np.unique(looked.get_array())) > 4  # patches that overlap


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


@pytest.fixture(scope="module")
def address(models, examples, tmp_path_factory):
    """The address of the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = demo.build(models, examples)
        try:
            _, address, public = page.launch(server_name="127.0.0.1", **demo.LAUNCH)
            assert public is None and not page.analytics_enabled
            yield address
        finally:
            page.close()


def test_the_page_answers_on_this_machine(runs, address, examples, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False)
    table, picture = client.predict(handle_file(str(examples["dog bark"])), api_name="/classify")
    truth = expected(runs, examples["dog bark"], tmp_path)
    for label, *scores in table["data"]:
        assert np.float32(scores[0]) == truth.loc[label, "ast"]
    assert 'src="data:image/png' in picture


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_a_browser(address, models, examples, browser, tmp_path, width):
    said, tab = [], browser.new_page(viewport={"width": width, "height": 900})
    tab.set_default_timeout(10_000)
    tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(address)
    tab.get_by_text("all 10 in turn").click()
    tab.get_by_label("Play").first.wait_for()
    tab.get_by_role("button", name="Classify").click()
    picture, sound = tab.locator(".picture"), tab.locator("audio[src^=gradio_api]")
    picture.locator("img").wait_for()
    scores = demo.hear(models, str(examples["all 10 in turn"]), gr.Progress())[0]
    for score in scores["ast"].dropna():
        tab.get_by_role("gridcell", name=f"{score:.4f}").first.wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    left, right, seconds = (float(picture.get_attribute(f"data-{name}")) for name in ("left", "right", "seconds"))
    place, half = picture.bounding_box(), (left + right) / 2
    assert place["width"] >= 600  # so that the text can be read. A narrow screen scrolls it
    picture.click(position={"x": half * place["width"], "y": 50})
    played = "({played}) => played.length && played.end(0) > played.start(0)"
    tab.wait_for_function(played, arg=sound.element_handle())
    assert seconds / 2 - 0.2 < sound.evaluate("audio => audio.currentTime") < seconds / 2 + 3
    assert sound.evaluate("audio => audio.duration") == pytest.approx(seconds, abs=0.1)
    sound.evaluate("audio => { audio.pause(); audio.currentTime = 0 }")
    tab.wait_for_function("left => document.querySelector('.picture i').style.left == left", arg=f"{100 * left:.6g}%")
    for content, message in ((wav(np.zeros(16000)), "silent"), (b"no sound", "cannot decode")):
        tab.get_by_label("Clear").first.click()
        (tmp_path / "clip.wav").write_bytes(content)
        tab.locator("input[type=file]").first.set_input_files(tmp_path / "clip.wav")
        tab.get_by_label("Clear").first.wait_for()
        tab.get_by_role("button", name="Classify").click()
        tab.get_by_test_id("toast-body").filter(has_text=message).wait_for()
    assert said in ([], ["Waveform load error: MediaError"])  # gradio's own, of the corrupt file
    tab.close()
