"""Models for transformers.js: published by publish.py --web, run under Node, and by the page in Chromium."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import pytest
import soundfile
import torch
from conftest import ROOT, TINY_CNN14, encoder_checkpoint, log_in, tone_of
from hub.server import Hub
from safetensors.torch import load_file, save_file
from transformers import ASTFeatureExtractor, pipeline

import predict
import publish
from audio_dendrites.errors import UserError
from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.finished import load_finished
from audio_dendrites.publishing import web

PACKAGES = Path(__file__).parent / "web" / "node_modules"
MODELS = {"me/tones-baseline-web": "run_baseline", "me/tones-web": "run"}
ON_PAGE = MODELS | {"me/many-web": "many"}
MANY = {"problem_type": "multi_label_classification", "window_aggregation": "max"}
TOLERANCE = 1e-3  # of a score; with fp32 it is about 1e-6
INT8_TOLERANCE = 0.05
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/(@?[^@]+)@([^/]+)/?(.*)")
HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/main/(.+)")

MICROPHONE = """
navigator.mediaDevices.getUserMedia = async () => {
  const context = new AudioContext(), tone = context.createOscillator();
  const microphone = context.createMediaStreamDestination();
  tone.connect(microphone);
  tone.start();
  return microphone.stream;
};
"""

needs_packages = pytest.mark.skipif(
    not (PACKAGES / ".installed").exists() or shutil.which("node") is None,
    reason="needs Node and the packages of tests/web: make tests/web/node_modules/.installed",
)


class Published(NamedTuple):
    """The runs `run`, `run_baseline` and, multi-label, `many` in a folder, and the Hub that they were published to."""

    folder: Path
    hub: Hub


@pytest.fixture(scope="module")
def published(finished_pair, tmp_path_factory) -> Iterator[Published]:
    """A pair of runs whose weights are so large that the classes differ, published."""
    folder = shutil.copytree(finished_pair, tmp_path_factory.mktemp("web") / "runs")
    for run in MODELS.values():
        torch.manual_seed(1)
        weights = folder / run / "model.safetensors"
        tensors = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in sorted(load_file(weights).items())}
        save_file(tensors, weights, metadata={"format": "pt"})
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        log_in(hub, folder / "home", patch)
        publish.main([str(folder / "run"), "--repo_id", "tones", "--web"])
        shutil.copytree(folder / "run", folder / "many")
        files = hub.files("me/tones-web")
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | MANY)
        hub.commit("me/many-web", files)
        config = folder / "many" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | MANY))
        yield Published(folder, hub)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, Path]:
    """A sound that fits into the window of the models, and one that takes four windows."""
    folder, time = tmp_path_factory.mktemp("sounds"), np.arange(32000) / 16000
    chirp = 0.3 * np.sin(600 * np.pi * time * (1 + time)) + np.random.default_rng(0).normal(0, 0.05, len(time))
    for name, samples in {"short": chirp[:8000], "long": chirp}.items():
        soundfile.write(folder / f"{name}.wav", samples.astype(np.float32), 16000, subtype="FLOAT")
    return {name: folder / f"{name}.wav" for name in ("short", "long")}


def test_a_repository_has_what_transformers_js_reads_and_figures_of_both_files(published):
    folder, hub = published
    rows = range(16, 24)  # the test clips of the runs
    for name, run in MODELS.items():
        files = hub.files(name)
        assert files.keys() == {"README.md", "config.json", "preprocessor_config.json", *web.FILES.values()}
        assert len(hub.commits(name)) == 2  # the first one creates the repository
        config, text = json.loads(files["config.json"]), b"".join(files.values())
        assert config["model_type"] == "audio-spectrogram-transformer" and not {"auto_map", "dendrites"} & config.keys()
        assert config["windows"] == {"length": 79 * 160 + 400, "step": 40 * 160, "hop": 160}
        assert len(files[web.FILES["int8"]]) < 0.3 * len(files[web.FILES["fp32"]])
        for local in (str(folder), "home-of-jo", str(ROOT)):
            assert local.encode() not in text
        card = files["README.md"].decode()
        assert f"base_model: me/{name.removeprefix('me/').removesuffix('-web')}\n" in card
        assert ("dendrites are part" in card) == (run == "run")
        model, extractor = load_finished(folder / run)
        classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
        sounds = [np.float32(np.round(tone_of(row) * 32767) / 32768) for row in rows]
        right = [
            classify(sound)[0]["label"] == ("high" if row % 2 else "low")
            for row, sound in zip(rows, sounds, strict=True)
        ]
        assert re.search(rf"\| accuracy \| {np.mean(right):.4f}  ", card)
        assert "Both files classified 8 test clips. They agree on" in card and "times as long as fp32" in card
    assert {path.name for path in (folder / "run" / "export").iterdir()} == {"web"}


def test_without_the_test_clips_the_card_says_that_nothing_was_measured(published, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(published.folder / "run_baseline", tmp_path / "run")
    recipe = run / "config.yaml"
    recipe.write_text(re.sub(r"(?m)^dataset: .*", f"dataset: {tmp_path}/gone.parquet", recipe.read_text()))
    exported = shutil.copyfile(run / "export" / "web" / web.FILES["fp32"], tmp_path / "model.onnx")
    monkeypatch.setattr(web, "export_run", lambda run, format, output: shutil.copyfile(exported, output))  # in no time
    publish.main([str(run), "--repo_id", "me/x", "--web", "--dry_run"])
    assert "Nothing was sent" in capsys.readouterr().out and "models/me/x-web" not in published.hub.repos
    card = (run / "export" / "web" / "README.md").read_text()
    assert "was not measured" in card and "| accuracy" not in card


def test_a_model_that_transformers_js_cannot_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere has no metrics.json, so it is not a finished run"):
        publish.main([str(tmp_path / "nowhere"), "--web", "--dry_run"])
    whisper = encoder_checkpoint(tmp_path, "whisper")
    (whisper / "metrics.json").touch()
    with pytest.raises(UserError, match="can run models of the types audio-spec.*got whisper in"):
        publish.main([str(whisper), "--web", "--dry_run"])
    CNN14ForAudioClassification(CNN14Config(**TINY_CNN14)).save_pretrained(tmp_path / "cnn14")
    ASTFeatureExtractor(sampling_rate=8000, num_mel_bins=64).save_pretrained(tmp_path / "cnn14")
    (tmp_path / "cnn14" / "metrics.json").touch()
    with pytest.raises(UserError, match="sampling_rate must be 16000, .*got 8000 in .*waveform: true"):
        publish.main([str(tmp_path / "cnn14"), "--web", "--dry_run"])


@needs_packages
def test_transformers_js_gives_the_features_and_scores_of_python(published, sounds, tmp_path):
    samples, _ = soundfile.read(sounds["short"], dtype="float32")
    asked = {
        "host": published.hub.url, "cacheDir": str(tmp_path / "cache"), "models": list(MODELS),
        "dtypes": ["fp32", "q8"], "samples": samples.tolist(),
    }  # fmt: skip
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    program = [shutil.which("node"), str(PACKAGES.parent / "classify.mjs"), str(tmp_path / "asked.json")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        model, extractor = load_finished(published.folder / MODELS[name])
        features = extractor(samples, sampling_rate=16000, return_tensors="np")["input_values"].ravel()
        assert np.abs(np.array(found["features"]) - features).max() < TOLERANCE  # 48 frames, padded to 80
        classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
        scores = {one["label"]: one["score"] for one in classify(samples)}
        assert scores.keys() == found["fp32"].keys() == found["q8"].keys() and max(scores.values()) > 0.6
        for label, score in scores.items():
            assert abs(found["fp32"][label] - score) < TOLERANCE and abs(found["q8"][label] - score) < INT8_TOLERANCE


class Files(SimpleHTTPRequestHandler):
    """Files for pages of every origin."""

    def end_headers(self):
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture(scope="module")
def page(browser, published):
    """A browser page, and the address of the page in web/. Its CDN and Hub are on this machine."""

    def serve(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=folder))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def package(route):
        name, version, file = CDN.fullmatch(route.request.url).groups()
        assert json.loads((PACKAGES / name / "package.json").read_text())["version"] == version
        file = file or "dist/transformers.min.js"  # what the CDN gives for the package as a whole
        headers = {"Location": f"{packages}/{name}/{file}", "Access-Control-Allow-Origin": "*"}
        route.fulfill(status=302, headers=headers)

    def model(route):
        name, file = HUB.fullmatch(route.request.url).groups()
        content = published.hub.files(name).get(file) if name in ON_PAGE else None
        headers = {"Access-Control-Allow-Origin": "*"}
        route.fulfill(status=404 if content is None else 200, body=content or b"", headers=headers)

    servers: list[ThreadingHTTPServer] = []
    address, packages = serve(ROOT / "web"), serve(PACKAGES)
    page = browser.new_page()
    page.route(CDN, package)
    page.route(HUB, model)
    yield page, address
    page.close()
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(page) -> dict[str, dict[str, float]]:
    """The scores on the page, by model and class."""
    page.wait_for_selector("article:nth-child(3)")
    cards = [one.inner_text().splitlines() for one in page.query_selector_all("article")]
    cards = [[line for line in card if line] for card in cards]
    return {name: dict(zip(rows[::2], map(float, rows[1::2]), strict=True)) for name, _, *rows in cards}


@needs_packages
def test_the_page_shows_the_scores_of_predict(page, published, sounds, tmp_path):
    page, address = page
    errors = []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(MICROPHONE)
    page.goto(address)
    page.wait_for_selector("text=Enter the models that")
    for width, dtype, tolerance in ((1200, "fp32", TOLERANCE), (360, "q8", INT8_TOLERANCE)):
        page.set_viewport_size({"width": width, "height": 800})
        page.get_by_label("Models").fill(", ".join(ON_PAGE))
        page.get_by_label("Weights").select_option(dtype)
        page.get_by_role("button", name="Load").click()
        page.wait_for_selector("#sound:enabled")
        for sound, windows in {"short": "1 window,", "long": "4 windows,"}.items():
            page.get_by_label("Sound file").set_input_files(sounds[sound])
            found = answers(page)
            assert page.inner_text("#results").count(windows) == 3
            for name, scores in found.items():
                predict.main(
                    [str(published.folder / ON_PAGE[name]), str(sounds[sound]), "--output", str(tmp_path / "x")]
                )
                expected = pandas.read_csv(tmp_path / "x").drop(columns="file").iloc[0]
                assert next(iter(scores)) == expected.idxmax()
                assert (pandas.Series(scores) - expected).abs().max() < tolerance
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)

    page.get_by_role("button", name="Record").click()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Stop").click()
    assert answers(page).keys() == ON_PAGE.keys()
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    for name, said in {"silent": "The sound is silent", "broken": "cannot read the file as sound"}.items():
        page.get_by_label("Sound file").set_input_files(tmp_path / f"{name}.wav")
        page.wait_for_selector(f"text={said}")
    assert errors == []
    page.goto(f"{address}?models=me/nothing")
    page.wait_for_selector("text=A model could not be loaded")
