"""The page of app.py, made with gradio."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

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
from audio_dendrites.models.finished import load_finished
from audio_dendrites.results.inference import Answer, classify_clips

SHOWN_CLASSES = 5  # the best of each model
MEL_BANDS = 128  # of the spectrogram for a model that has none of its own
RANGE = 16  # of the spectrogram in nats, about 70 dB
COLUMNS = 800  # the most that a spectrogram has
BLOCK = 6000  # frames whose spectrogram is computed at a time, one minute
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
    """Run folders or models of the Hub, by short name, or by what was given if short names repeat.

    Raises:
        UserError: A model cannot be loaded.
    """
    names = [Path(run).resolve().name for run in runs]
    names = names if len(set(names)) == len(names) else runs
    return {name: load_finished(run, trust_remote_code) for name, run in zip(names, runs, strict=True)}


def hear(models: dict[str, Model], file: str | None, progress: gr.Progress) -> tuple:
    """Classify a sound file with all models.

    Returns:
        The scores as a table with a row for each class that is among the best of a model and a column for each model,
        and a figure with the spectrograms and, for long clips, the scores over time.

    Raises:
        gr.Error: There is no file, or it cannot be used. The page shows the message.
    """
    if file is None:
        raise gr.Error("Record, upload or choose a sound first.", print_exception=False)
    waveforms, columns, panels = {}, {}, {}
    for name, (model, extractor) in models.items():
        labels, rate = list(model.config.id2label.values()), extractor.sampling_rate
        channel = getattr(model.config, "channel", "mean")
        if (rate, channel) not in waveforms:
            progress(None, desc="decoding")
            try:
                waveforms[rate, channel] = load_waveform({"path": file}, rate, Path(file).name, channel)
            except BadClip as error:
                raise gr.Error(str(error), print_exception=False) from error
        waveform = waveforms[rate, channel]
        progress(None, desc=name)
        found = next(classify_clips(model, extractor, [{"bytes": None, "path": file}]))
        columns[name] = dict(zip(labels, found.scores, strict=True))
        bands = extractor.num_mel_bins if isinstance(extractor, ASTFeatureExtractor) else MEL_BANDS
        if (rate, channel, bands) not in panels:
            panels[rate, channel, bands] = ("spectrogram", waveform, rate, bands)
        if len(found.spans) > 1:
            panels[name] = ("timeline", f"{name}: score of each window", labels, found)
    draw = {"spectrogram": draw_spectrogram, "timeline": draw_timeline}
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for one, (kind, *content) in zip(axes, panels.values(), strict=True):
        draw[kind](one, *content)
    axes[-1].set(xlabel="seconds")
    return scores_table(columns), figure


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


def draw_spectrogram(axes: Axes, waveform: np.ndarray, rate: int, bands: int) -> None:
    """Draw the log-mel spectrogram of a waveform (samples,)."""
    levels = log_mel(waveform, rate, bands)
    extent, highest = (0, len(waveform) / rate, 0, bands), levels.max()
    axes.imshow(levels, "magma", aspect="auto", origin="lower", extent=extent, vmin=highest - RANGE, vmax=highest)
    axes.set(title=f"log-mel spectrogram at {rate / 1000:g} kHz", ylabel="mel band")


def draw_timeline(axes: Axes, title: str, labels: Sequence[str], found: Answer) -> None:
    """Draw the scores of the windows of a clip, for the classes that score highest in a window.

    Windows overlap, so each one is drawn from halfway to the centre of the window before to halfway to the next one.
    """
    best = np.argsort(found.window_scores.max(axis=0))[-SHOWN_CLASSES:]
    centres = found.spans.mean(axis=1)
    edges = [0, *(centres[1:] + centres[:-1]) / 2, found.spans[-1, 1]]
    mesh = axes.pcolormesh(edges, np.arange(len(best) + 1), found.window_scores.T[best], vmin=0, vmax=1, cmap="Blues")
    axes.set(title=title, yticks=np.arange(len(best)) + 0.5, yticklabels=[labels[one] for one in best])
    axes.figure.colorbar(mesh, ax=axes, label="score")


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
        return table.style.format("{:.4f}", subset=list(models), na_rep="–"), figure

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
        plot = gr.Plot(show_label=False)
        button.click(classify, sound, [table, plot], api_name="classify", concurrency_limit=1)
    return page


def serve(runs: Sequence[str], port: int | None, server_name: str, trust_remote_code: bool) -> None:
    """Load the models, and serve the page until Ctrl-C.

    Args:
        runs: Run folders or Hub ids.
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
