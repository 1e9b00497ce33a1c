"""report.py: its page is read as a browser reads it, and its sounds and pictures are decoded."""

import base64
import io
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import TONES, recording, tone_of, write_run
from datasets import Dataset
from pandas import DataFrame
from PIL import Image

from audio_dendrites.errors import UserError
from audio_dendrites.publishing.content import stage_run
from audio_dendrites.results.listen import calibration, choose, graded, seconds_of
from audio_dendrites.results.scores import with_predictions
from report import main

HOSTILE = '<script>alert("1")</script>'


class Page(HTMLParser):
    """The elements of a page, as (name, attributes), and its text without style and script."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.text, self.inside = [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] for name, attributes in self.elements if name == tag and attribute in attributes]

    def shown(self, token: str) -> int:
        """How many clips a filter shows."""
        return sum(token in tokens.split() for tokens in self.all("article", "data-tokens"))


def content(uri: str, kind: str) -> io.BytesIO:
    before, _, encoded = uri.partition(",")
    assert before == f"data:{kind};base64"
    return io.BytesIO(base64.b64decode(encoded))


def write(*arguments) -> None:
    main([str(argument) for argument in arguments])


def by_hand(folder: Path, dataset: Path, labels: list[str], truth: list, logits: np.ndarray, **fields) -> Path:
    """A run folder that tested clips c00, c01, … of a data set."""
    write_run(folder, labels, range(len(truth)), truth, logits, **fields)
    recipe = TONES | {"dataset": str(dataset), "group_column": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def named_tones(tones: Path, kinds: list, **columns: list) -> Path:
    """`tones` with clips c00, c01, … of other kinds."""
    rows = Dataset.from_parquet(str(tones)).to_list()[: len(kinds)]
    for row, clip in enumerate(rows):
        clip |= {"name": f"c{row:02}", "kind": kinds[row]} | {name: values[row] for name, values in columns.items()}
    path = tones.with_name("named.parquet")
    Dataset.from_list(rows).to_parquet(path)
    return path


def test_a_run_gets_a_page_that_plays_and_that_no_push_sends(finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    write(run, "--clips", 5)
    page = Page(run / "report.html")
    assert len(page.all("article", "data-tokens")) == 5 and "5 of 8 test clips" in page.text
    sounds, pictures, alts = page.all("audio", "src"), page.all("img", "src"), page.all("img", "alt")
    for sound, picture, alt in zip(sounds, pictures, alts[:5], strict=False):
        row = int(alt.rpartition("-")[2])
        samples, rate = soundfile.read(content(sound, "audio/mpeg"))
        assert rate == 16000 and samples.ndim == 1 and len(samples) == pytest.approx(len(tone_of(row)), abs=2400)
        peak = np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples)
        assert peak == pytest.approx(3000 if row % 2 else 300, rel=0.02)
        bands = np.asarray(Image.open(content(picture, "image/png"))).mean(axis=1)
        assert (bands.argmax() < 32) == (row % 2 == 1)  # high tones are above
    assert len(pictures) == 5 + 2 and alts[5:] == ["Reliability diagram", "Learning curves"]
    assert all(uri.startswith("data:") for uri in sounds + pictures) and not page.all("script", "src")
    (tmp_path / "staged").mkdir()
    stage_run(run, tmp_path / "staged")
    assert (tmp_path / "staged" / "metrics.json").exists() and not list(tmp_path.glob("staged/*.html"))


def test_several_runs_share_a_page_and_cells_count_what_they_filter(finished_pair, tmp_path):
    runs = [shutil.copytree(finished_pair / name, tmp_path / name) for name in ("run_baseline", "run")]
    write(*runs)
    page = Page(tmp_path / "report.html")
    assert "Growth of the dendrites" in page.all("img", "alt") and len(page.all("article", "data-tokens")) == 8
    cells = page.all("button", "data-token")
    assert {token[0] for token in cells} == {"0", "1"} and "runs disagree" in page.text
    # All clips are on the page, so each filter shows as many as the cell, or the option, counts.
    for token, text in zip(cells, page.all("button", "data-text"), strict=True):
        assert f", {page.shown(token)} test clips)" in text
    assert f"{page.shown('wrong')} of 8 test clips have a mistake" in page.text
    assert f"the runs disagree on {page.shown('differ')}." in page.text


def test_the_page_of_a_file_on_a_phone(tones, tmp_path, browser):
    labels, kinds = ["low", "high_tone"], ["low", "high_tone"] * 3
    dataset = named_tones(tones, kinds, salience=[1, 2] * 3)
    logits = np.eye(2)[[0, 1, 0, 1, 0, 0]], np.eye(2)[[0, 1, 0, 1, 1, 1]]
    names = ("ast_from_random_weights_with_dendrites_in_the_last_attention", "cnn14")
    write(*(by_hand(tmp_path / name, dataset, labels, kinds, rows) for name, rows in zip(names, logits, strict=True)))
    said, tab = [], browser.new_page(viewport={"width": 360, "height": 800})
    tab.set_default_timeout(10_000)
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    # A word of a name is in one line.
    box = "node => { const r = document.createRange(); r.selectNodeContents(node); return r.getClientRects().length }"
    words = "n => [...n.childNodes].filter(c => c.nodeType === 3 && c.data.trim()).map(" + box + ")"
    assert set(tab.locator("tbody th").first.evaluate(words)) == {1}

    def shown() -> list[str]:
        return tab.locator("article:visible h3").all_inner_texts()

    choose_class, choose_mistake, choose_clips = (
        tab.get_by_label(name, exact=True) for name in ("class", "mistake", "clips")
    )
    assert sorted(shown()) == [f"c{row:02}" for row in range(6)]
    choose_clips.select_option("runs disagree")
    assert sorted(shown()) == ["c04", "c05"]
    choose_mistake.select_option("m0-1")  # low → high_tone
    assert shown() == ["c04"]
    tab.get_by_role("button", name="Show all").click()
    choose_class.select_option("high_tone")
    tab.get_by_text("4 of the 6 clips").wait_for()
    tab.locator("[data-token='0/1-0']").click()  # high_tone → low by the first run
    assert shown() == ["c05"] and choose_class.input_value() == ""
    tab.locator("[data-token='0/1-0']").click()
    sound = tab.locator("article:visible audio").first
    sound.evaluate("audio => audio.play()")
    tab.wait_for_function("audio => audio.currentTime > 0", arg=sound.element_handle())
    assert sound.evaluate("audio => audio.duration") == pytest.approx(0.35, abs=0.2)
    assert not said
    tab.close()


def test_names_of_strangers_are_text(tones, tmp_path):
    labels, kinds = ["low", HOSTILE], ["low", HOSTILE, "low", HOSTILE]
    dataset = named_tones(tones, kinds, salience=[1, 1, 2, 2])
    run = by_hand(tmp_path / '"><script>x', dataset, labels, kinds, [[2, 0], [3, 0], [1, 0], [0, 1]])
    write(run, "--output", tmp_path / "new" / "page.html")
    page = Page(tmp_path / "new" / "page.html")
    assert page.all("option", "value").count("m1-0") == 1 and page.shown("m1-0") == 1
    assert [tag for tag, _ in page.elements].count("script") == 1 and HOSTILE in page.text
    assert "Accuracy by salience" in page.text and "Accuracy by source recording" in page.text
    assert "1250.0 %" in page.text.split("Accuracy by salience")[1]  # salience 1: two clips, one right


def test_a_class_of_a_multi_label_clip_is_found_missed_or_a_false_alarm(chords, tmp_path):
    labels, kinds = ["high", "low"], [["low"], ["high"], ["high", "low"], []]
    logits = [[-2, 2], [2, 2], [-2, -2], [-2, -2]]
    run = by_hand(tmp_path / "run", tmp_path / "moved", labels, kinds, logits, loss="bce")
    write(run, "--dataset", named_tones(chords, kinds))
    page = Page(run / "report.html")
    assert [page.shown(token) for token in ("0/0-0", "0/1-0", "0/0-1", "0/1-1", "0/1-2", "0/0-2")] == [1, 1, 1, 1, 1, 0]
    assert page.shown("wrong") == 2 and "mAP" in page.text and "true: no class" in page.text


def run_of(truth: list, logits: list, labels=("a", "b", "c"), loss="cross_entropy"):
    table = with_predictions(DataFrame({"label": truth}), np.float32(logits), labels)
    return graded("run", {"labels": list(labels), "loss": loss}, table)


def test_rare_mistakes_have_space_beside_a_frequent_one():
    # Nine times a → b with a high loss, once b → c with a low loss, and two right clips.
    logits = [[0, 9 + row, 0] for row in range(9)] + [[0, 0, 0.1], [0, 0, 5], [0, 0, 1]]
    run = run_of(["a"] * 9 + ["b", "c", "c"], logits)
    assert choose([run], 3) == [8, 7, 9]
    assert choose([run], 11) == [*range(8, -1, -1), 9, 11]  # all mistakes, then the less sure of the right clips


def test_calibration_by_hand():
    # Scores 0.9 (two clips, one right) and 0.6 (one clip, right): 2/3 · |0.5 - 0.9| + 1/3 · |1 - 0.6|.
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    error, confidence, share = calibration(run_of(["a", "b", "b"], logits, "ab"))
    assert error == pytest.approx(0.4) and confidence == pytest.approx([0.6, 0.9]) and share.tolist() == [1, 0.5]
    # Sigmoids of each class: 0.8 twice (one positive), 0.3 twice (no positive).
    logits = np.log([[4, 3 / 7], [3 / 7, 4]])
    error, confidence, share = calibration(run_of([["a"], []], logits, "ab", "bce"))
    assert error == pytest.approx(0.3) and confidence == pytest.approx([0.3, 0.8]) and share.tolist() == [0, 0.5]


def test_errors_name_what_to_do(finished, tmp_path, tones):
    with pytest.raises(UserError, match="--clips must be 1 or more, got 0"):
        write(finished / "run", "--clips", 0)
    ensemble = write_run(tmp_path / "ensemble", ["a", "b"], [0, 1], ["a", "b"], np.eye(2))
    with pytest.raises(UserError, match="one of the runs must have a config.yaml"):
        write(ensemble)
    run = by_hand(tmp_path / "run", tones, ["a", "b"], ["a", "b"], np.eye(2))
    with pytest.raises(UserError, match=r"lacks 2 clips \(c00, c01\)"):
        write(run)


def test_the_length_of_a_format_that_libsndfile_does_not_know(tmp_path):
    sound = recording(np.float32([np.sin(np.arange(32000))]).T, 16000, "mp4", "aac")
    assert seconds_of({"bytes": sound, "path": None}, "mean") == pytest.approx(2, abs=0.15)  # the codec pads
