"""The page of app.py, made with gradio."""

import base64
import html
import io
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it while it is imported

import gradio as gr
import numpy as np
import soundfile
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame
from transformers import ASTFeatureExtractor, FeatureExtractionMixin, PreTrainedModel

from audio_dendrites.data.audio import BadClip, load_waveform, window_samples
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.data.synthetic import generate_clips
from audio_dendrites.errors import UserError
from audio_dendrites.models.finished import load_finished, split_revision
from audio_dendrites.results.inference import Answer, batches_of, classify_clips
from audio_dendrites.results.rollout import attention_rollout, body_of

SHOWN_CLASSES = 5  # the best of each model
MEL_BANDS = 128  # of the spectrogram for a model that has none of its own
RANGE = 16  # of the spectrogram in nats, about 70 dB
COLUMNS = 800  # the most that a spectrogram has
BLOCK = 6000  # frames whose spectrogram is computed at a time, one minute
MOST_ROLLOUTS = 60  # windows of a clip for which the page shows where a model looks
PLAYER_CSS = """
.scroll { overflow-x: auto; }
.picture { position: relative; cursor: pointer; line-height: 0; min-width: 40rem; }
.picture img { width: 100%; }
.picture i { position: absolute; top: 0; bottom: 0; width: 2px; background: #2ca02c; pointer-events: none; }
audio { width: 100%; }
"""
# A click on the picture plays the sound from there. The line follows the sound.
PLAYER_JS = """
const scale = picture => [Number(picture.dataset.left), Number(picture.dataset.right), Number(picture.dataset.seconds)];
element.addEventListener("click", event => {
  const picture = event.target.closest(".picture");
  if (!picture) return;
  const [left, right, seconds] = scale(picture), box = picture.getBoundingClientRect();
  const share = ((event.clientX - box.left) / box.width - left) / (right - left);
  const audio = element.querySelector("audio");
  audio.currentTime = Math.min(1, Math.max(0, share)) * seconds;
  audio.play();
});
element.addEventListener("timeupdate", event => {
  const picture = element.querySelector(".picture"), [left, right, seconds] = scale(picture);
  const line = picture.querySelector("i");
  line.hidden = false;
  line.style.left = `${100 * (left + (right - left) * event.target.currentTime / seconds)}%`;
}, true);
"""
LAUNCH = {
    "theme": gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
    "footer_links": [],
    "run_history": False,
    "share": False,
    "ssr_mode": False,
    "prevent_thread_lock": True,
    "quiet": True,
}


Model = tuple[PreTrainedModel, FeatureExtractionMixin]


def load_models(runs: Sequence[str], trust_remote_code: bool = False) -> dict[str, Model]:
    """Run folders or models of the Hub (`load_finished`), by short name, or by what was given if short names repeat.

    Raises:
        UserError: A model cannot be loaded.
    """
    names = [Path(split_revision(run)[0]).resolve().name for run in runs]
    names = names if len(set(names)) == len(names) else runs
    return {name: load_finished(run, trust_remote_code) for name, run in zip(names, runs, strict=True)}


def hear(models: dict[str, Model], file: str | None, progress: gr.Progress) -> tuple[DataFrame, Figure]:
    """Classify a sound file with all models.

    Returns:
        The scores as a table with a row for each class that is among the best of a model and a column for each model,
        and a figure with the spectrograms, where each model with a `body_of` looked and, for long clips, the scores
        over time.

    Raises:
        gr.Error: There is no file, or it cannot be used. The page shows the message.
    """
    if file is None:
        raise gr.Error("Record, upload or choose a sound first.", print_exception=False)
    clip, waveforms, columns, panels = {"bytes": None, "path": file}, {}, {}, {}
    for name, (model, extractor) in models.items():
        labels, rate = list(model.config.id2label.values()), extractor.sampling_rate
        channel = getattr(model.config, "channel", "mean")
        if (rate, channel) not in waveforms:
            progress(None, desc="decoding")
            try:
                waveforms[rate, channel] = load_waveform({"path": file}, rate, Path(file).name, channel)
            except BadClip as error:
                raise gr.Error(str(error), print_exception=False) from error
        progress(None, desc=name)
        found = next(classify_clips(model, extractor, [clip]))
        columns[name] = dict(zip(labels, found.scores, strict=True))
        bands = extractor.num_mel_bins if isinstance(extractor, ASTFeatureExtractor) else MEL_BANDS
        sound = waveforms[rate, channel], rate, bands
        panels.setdefault((rate, channel, bands), (draw_spectrogram, *sound))
        if body_of(model) and len(found.spans) <= MOST_ROLLOUTS:
            progress(None, desc=f"{name}: where it looks")
            panels[name, "rollout"] = (draw_rollouts, name, *sound, found.spans, rollouts(model, extractor, clip))
        if len(found.spans) > 1:
            panels[name, "timeline"] = (draw_timeline, name, labels, found)
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for one, (draw, *content) in zip(axes, panels.values(), strict=True):
        draw(one, *content)
    axes[-1].set(xlabel="seconds")
    return scores_table(columns), figure


def rollouts(
    model: PreTrainedModel, extractor: FeatureExtractionMixin, clip: dict[str, str | None]
) -> list[tuple[float, np.ndarray]]:
    """For each window of a clip, the seconds that the input of the model covers, and its `attention_rollout`."""
    batches = batches_of(model, extractor, [clip], 1)
    layout, found = batches.layout, []
    for inputs, [window] in batches:
        samples = window.length
        if layout["max_length"] < sys.maxsize:  # a shorter clip is padded
            samples = (layout["max_length"] - 1) * layout["hop_length"] + layout["window_length"]
        found.append((samples / extractor.sampling_rate, attention_rollout(model, inputs)[0].numpy()))
    return found


def scores_table(columns: dict[str, dict[str, float]]) -> DataFrame:
    """The best classes of each model, the highest mean score first, and their scores by each model."""
    best = {label for scores in columns.values() for label in sorted(scores, key=scores.get)[-SHOWN_CLASSES:]}
    table = DataFrame(columns).loc[sorted(best)]
    order = table.mean(axis=1).sort_values(ascending=False, kind="stable").index
    return table.loc[order].rename_axis("class").reset_index()


def log_mel(waveform: np.ndarray, rate: int, bands: int) -> np.ndarray:
    """The log-mel energies (bands, columns) of a waveform (samples,), as `ASTFeatureExtractor` computes them.

    Frames are averaged so that there are at most `COLUMNS`. They are computed in blocks, so that memory does not grow
    with the length of the clip.
    """
    extractor = BatchedASTFeatureExtractor(num_mel_bins=bands, sampling_rate=rate, do_normalize=False)
    window, hop = window_samples(rate), rate // 100
    frames = 1 + (len(waveform) - window) // hop
    pooled = -(-frames // COLUMNS)
    block, columns = pooled * -(-BLOCK // pooled), []
    for start in range(0, frames, block):
        last = min(start + block, frames) - 1
        energies = extractor.log_mel([waveform[start * hop : last * hop + window]])[0].T
        columns.append(torch.nn.functional.avg_pool1d(energies, pooled, ceil_mode=True))
    return torch.cat(columns, dim=1).numpy()


def draw_spectrogram(axes: Axes, waveform: np.ndarray, rate: int, bands: int, colours: str = "magma") -> None:
    """Draw the log-mel spectrogram of a waveform (samples,)."""
    levels = log_mel(waveform, rate, bands)
    extent, highest = (0, len(waveform) / rate, 0, bands), levels.max()
    axes.imshow(levels, colours, aspect="auto", origin="lower", extent=extent, vmin=highest - RANGE, vmax=highest)
    axes.set(title=f"log-mel spectrogram at {rate / 1000:g} kHz", ylabel="mel band")


def edges_of(spans: np.ndarray) -> list[float]:
    """Where to draw windows (windows, 2) that overlap: each one from halfway to the centre of the window before it."""
    centres = spans.mean(axis=1)
    return [0, *(centres[1:] + centres[:-1]) / 2, spans[-1, 1]]


def draw_rollouts(
    axes: Axes,
    name: str,
    waveform: np.ndarray,
    rate: int,
    bands: int,
    spans: np.ndarray,
    found: Sequence[tuple[float, np.ndarray]],
) -> None:
    """Draw where a model looked in each window, over the spectrogram in grey. `found` is that of `rollouts`."""
    draw_spectrogram(axes, waveform, rate, bands, "gray")
    for (start, _), (left, right), (seconds, shares) in zip(spans, pairwise(edges_of(spans)), found, strict=True):
        places = np.linspace(start, start + seconds, shares.shape[1] + 1)
        inside = np.flatnonzero((places[1:] > left) & (places[:-1] < right))
        low, high = np.nanpercentile(shares, (0, 99))  # one patch may have much more than all others
        looked = np.nan_to_num((shares[:, inside] - low) / max(high - low, 1e-12)).clip(0, 1)
        extent = (places[inside[0]], places[inside[-1] + 1], 0, bands)
        axes.imshow(looked, "inferno", aspect="auto", origin="lower", extent=extent, alpha=0.8 * looked, vmin=0, vmax=1)
    axes.set(title=f"{name}: where it looked (attention rollout)", xlim=(0, len(waveform) / rate))


def draw_timeline(axes: Axes, name: str, labels: Sequence[str], found: Answer) -> None:
    """Draw the scores of the windows of a clip, for the classes that score highest in a window."""
    best = np.argsort(found.window_scores.max(axis=0))[-SHOWN_CLASSES:]
    edges = edges_of(found.spans)
    mesh = axes.pcolormesh(edges, np.arange(len(best) + 1), found.window_scores.T[best], vmin=0, vmax=1, cmap="Blues")
    axes.set(
        title=f"{name}: score of each window",
        yticks=np.arange(len(best)) + 0.5,
        yticklabels=[labels[one] for one in best],
    )
    axes.figure.colorbar(mesh, ax=axes, label="score")


def player(figure: Figure, file: str) -> str:
    """A figure, whose panels share the axis of seconds, and a player of the sound, as HTML for `PLAYER_JS`."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    box, (_, seconds) = figure.axes[0].get_position(), figure.axes[0].get_xlim()
    address = html.escape(f"gradio_api/file={quote(file)}")
    titles = html.escape("; ".join(axes.get_title() for axes in figure.axes if axes.get_title()))
    picture = base64.b64encode(content.getvalue()).decode()
    return (
        f'<div class="scroll"><div class="picture" data-left="{box.x0}" data-right="{box.x1}" data-seconds="{seconds}">'
        f'<img alt="{titles}" src="data:image/png;base64,{picture}"><i hidden></i></div></div>'
        f'<audio controls preload="metadata" src="{address}"></audio><p>Click the picture to play from there.</p>'
    )


def write_examples(folder: Path) -> dict[str, Path]:
    """Write a generated sound of each class, and all of them in turn, as wav files that browsers play."""
    rate, sounds = 16_000, {}
    for clip in generate_clips(clips_per_class=1, folds=1):
        sounds[clip["class"].replace("_", " ")] = load_waveform(clip["audio"], rate)
    sounds[f"all {len(sounds)} in turn"] = np.concatenate(list(sounds.values()))
    files = {name: folder / f"{name.replace(' ', '_')}.wav" for name in sounds}
    for name, file in files.items():
        soundfile.write(file, sounds[name], rate, subtype="PCM_16")
    return files


def build(models: dict[str, Model], examples: dict[str, Path]) -> gr.Blocks:
    """The page. Launch it with `LAUNCH`."""

    def classify(file: str | None, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008  gradio's own way
        table, figure = hear(models, file, progress)
        return table.style.format("{:.4f}", subset=list(models), na_rep="–"), player(figure, file)

    with gr.Blocks(title="audio-dendrites", analytics_enabled=False) as page:
        gr.Markdown(f"# {' and '.join(models)}\nRecord, upload or choose a sound.")
        with gr.Row():
            with gr.Column(min_width=320):
                sound = gr.Audio(type="filepath", label="Sound", sources=["upload", "microphone"], buttons=["download"])
                button = gr.Button("Classify", variant="primary")
                gr.Examples(
                    [[str(file)] for file in examples.values()], sound, example_labels=list(examples),
                    label="Generated sounds", examples_per_page=len(examples),
                )  # fmt: skip
            with gr.Column(min_width=320):
                table = gr.Dataframe(label="Best classes", headers=["class", *models], interactive=False)
        picture = gr.HTML(css_template=PLAYER_CSS, js_on_load=PLAYER_JS)
        button.click(classify, sound, [table, picture], api_name="classify", concurrency_limit=1)
    return page


def serve(runs: Sequence[str], port: int | None, server_name: str, trust_remote_code: bool) -> None:
    """Load the models, and serve the page until Ctrl-C.

    Args:
        runs: Run folders, Hub ids, or Hub ids@revision.
        port: The port, or None for the first free one from 7860.
        server_name: The address to listen at.
        trust_remote_code: Whether the code of a model may run.

    Raises:
        UserError: A model cannot be loaded, or the port is not free.
    """
    models = load_models(runs, trust_remote_code)
    with TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where gradio keeps uploads
        page = build(models, write_examples(Path(folder)))
        try:
            _, address, _ = page.launch(server_name=server_name, server_port=port, **LAUNCH)
        except OSError as error:
            raise UserError(f"--port: {error}") from error
        print(f"The demo is at {address}. Press Ctrl-C to end it.", flush=True)
        page.block_thread()
