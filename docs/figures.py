"""Draw the picture of README.md from two finished runs, one without and one with dendrites.

python docs/figures.py RUN_WITHOUT RUN_WITH [--output docs/overview.png]
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from audio_dendrites.data.audio import load_waveform
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.data.synthetic import generate_clips
from audio_dendrites.files import written_whole

GREEN, BLUE, GREY = "#2a9d5c", "#3b6ea8", "#8a8a8a"


def log_mel() -> np.ndarray:
    """The log-mel spectrogram (mel bands, frames) of a generated siren, normalised."""
    clip = next(clip for clip in generate_clips(clips_per_class=1) if clip["class"] == "siren")
    waveform = load_waveform(clip["audio"], 16000)
    return BatchedASTFeatureExtractor().features([waveform])[0].numpy().T


def box(axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A rounded box with text in its middle."""
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, alpha=0.14, edgecolor="none")
    )
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="none", edgecolor=colour, linewidth=1.6)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY, style: str = "-") -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, linewidth=1.5, linestyle=style)
    )


def draw_model(axes) -> None:
    """The way from a clip to its class, with a dendrite on one layer."""
    axes.set(xlim=(0, 10), ylim=(0, 5.6))
    axes.axis("off")
    inset = axes.inset_axes((0.0, 0.36, 0.22, 0.3))
    inset.imshow(log_mel(), origin="lower", aspect="auto", cmap="magma")
    inset.set(xticks=[], yticks=[], xlabel="time", ylabel="mel bands", title="log-mel of a clip")
    box(axes, 3.2, 1.7, 2.6, 1.0, "layer of the model\n$W x + b$", BLUE)
    box(axes, 3.2, 3.6, 2.6, 1.0, "dendrite\n$h = \\mathrm{gelu}(V x + c)$", GREEN)
    box(axes, 7.0, 2.35, 0.9, 0.9, "+", BLUE)
    axes.text(8.6, 2.8, "scores of\nthe classes", va="center", fontsize=10)
    arrow(axes, (2.3, 2.7), (3.15, 2.25))
    arrow(axes, (2.3, 3.1), (3.15, 4.0), GREEN)
    arrow(axes, (5.85, 2.2), (6.95, 2.65))
    arrow(axes, (5.85, 4.0), (6.95, 3.1), GREEN, "--")
    arrow(axes, (7.95, 2.8), (8.5, 2.8))
    axes.text(6.75, 3.85, "× $top$, which starts at 0", color=GREEN, fontsize=9)
    text = "A dendrite grows beside a layer while the model trains.\nGrowth leaves the scores as they are."
    axes.text(4.5, 0.75, text, ha="center", va="center", fontsize=10)
    axes.set_title("a layer with a dendrite", fontsize=12)


def curve(run: Path) -> tuple[list[int], list[float], list[int]]:
    """Steps and accuracy of the evaluations of a run, and the steps at which dendrites grew."""
    last = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    logs = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    points = [(log["step"], log["eval_accuracy"]) for log in logs if "eval_accuracy" in log]
    dendrites = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["dendrites"] or {"growth": []}
    return *map(list, zip(*points, strict=True)), [
        entry["step"] for entry in dendrites["growth"] if entry["event"] == "grown"
    ]


def draw_growth(axes, plain: Path, dendritic: Path) -> None:
    """The accuracy of both runs while they train, with a line where dendrites grew."""
    for run, name, colour in ((plain, "without dendrites", BLUE), (dendritic, "with dendrites", GREEN)):
        steps, scores, grown = curve(run)
        axes.plot(steps, scores, marker=".", color=colour, label=name)
        for step in grown:
            axes.axvline(step, color=GREEN, linestyle="--", linewidth=1)
            axes.annotate(" growth", (step, 0.94), xycoords=("data", "axes fraction"), color=GREEN, fontsize=9)
    axes.set(xlabel="step", ylabel="accuracy of the clips that do not train")
    axes.set_title("one run of the quickstart", fontsize=12)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.25)


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path, help="Finished run without dendrites.")
    parser.add_argument("dendritic", type=Path, help="Finished run with dendrites.")
    parser.add_argument("--output", type=Path, default=Path("docs/overview.png"))
    options = parser.parse_args()
    figure = Figure(figsize=(11, 4), layout="constrained")
    model, growth = figure.subplots(1, 2, width_ratios=[1.35, 1])
    draw_model(model)
    draw_growth(growth, options.plain, options.dendritic)
    with written_whole(options.output) as path:
        figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    main()
