"""Load a finished run folder with `pipeline` and compare its scores with the trained model's."""

from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from pandas import DataFrame
from scipy.special import expit, softmax
from transformers import pipeline

from audio_dendrites.data.audio import load_waveform
from audio_dendrites.models.finished import load_finished
from audio_dendrites.results.inference import classify_clips
from audio_dendrites.results.tables import markdown_table
from audio_dendrites.training.process import without_tf32


@without_tf32()
def check_pipeline(
    folder: Path, clips: Dataset, audio_column: str, predictions: DataFrame, loss: str = "cross_entropy"
) -> None:
    """Load the folder as its users will, and compare the scores of some clips with those of the trained model.

    The scores come from the pipeline, or from `classify_clips` if a clip is longer than the window of the model.

    Args:
        folder: The folder of the model and its feature extractor.
        clips: The clips of `predictions`, not decoded. About eight of them are classified.
        audio_column: Column of the audio.
        predictions: Table from `predictions_table`.
        loss: The loss of the training. The scores are sigmoids for bce, otherwise the softmax.

    Raises:
        RuntimeError: The scores differ by more than 1e-3.
    """
    model, extractor = load_finished(folder)
    loaded = pipeline("audio-classification", model=model, feature_extractor=extractor)
    rows, names = range(0, len(clips), 1 + len(clips) // 9), list(model.config.id2label.values())
    expected, channel = predictions.iloc[rows], getattr(model.config, "channel", "mean")
    heard = clips.with_format("arrow")[rows][audio_column].to_pylist()
    activate = expit if loss == "bce" else partial(softmax, axis=-1)
    answers = list(classify_clips(model, extractor, heard))
    for audio, answer in zip(heard, answers, strict=True):
        if len(answer.spans) == 1:
            found = loaded(load_waveform(audio, extractor.sampling_rate, channel=channel), top_k=len(names))
            by_name = {one["label"]: one["score"] for one in found}
            answer.scores = np.array([by_name[name] for name in names])
    scores = np.stack([answer.scores for answer in answers])
    difference = np.abs(scores - activate(np.stack(expected["logits"]))).max()
    if not difference < 1e-3:
        raise RuntimeError(f"{folder}: pipeline's scores are {difference:.2g} from those of the trained model")
    rows = [["clip", "class", "pipeline says", "score"]]
    for clip, label, found in zip(expected["clip"], expected["label"], scores, strict=True):
        label = label if isinstance(label, str) else ", ".join(label)
        rows.append([clip, label, names[found.argmax()], float(found.max())])
    print(f"\nLoaded by pipeline, scores within {difference:.1g}:\n{markdown_table(rows)}", flush=True)
