"""Files to scores: predict.py's `classify_clips` against `pipeline`, file by file, on generated clips.

    PYTHONPATH=. python benchmarks/predict.py [--clips 300] [--rounds 5] [--batch_size 16] [--family ast]

`pipeline` gets what soundfile reads, the mean over the channels, and resamples it itself. Both classify the same wav
files of 4 s, 44.1 kHz, stereo, in turns (A B A B …) with the same model of random weights, in one process, after a call
to warm up. The scores are compared on the waveforms of this project, because torchaudio's resampling lets the band
above 7 kHz pass differently. Prints medians and their ratio, and a last line of JSON.
"""

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from features import wav_bytes
from timing import medians, parser
from transformers import AudioClassificationPipeline, pipeline

from audio_dendrites.data.audio import load_waveform
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.recipes import FeatureArguments, ModelArguments
from audio_dendrites.results.inference import classify_clips


def read(file: Path) -> dict[str, Any]:
    """What the pipeline gets of a file."""
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return {"array": samples.mean(axis=1), "sampling_rate": rate}


def file_by_file(
    classify: AudioClassificationPipeline, files: list[Path], load: Callable[[Path], Any] = read
) -> np.ndarray:
    """Scores (files, classes) of a pipeline."""
    names, scores = classify.model.config.label2id, []
    for file in files:
        found = classify(load(file), top_k=len(names))
        scores.append([one["score"] for one in sorted(found, key=lambda one: names[one["label"]])])
    return np.array(scores)


def our_scores(*arguments: Any) -> np.ndarray:
    """Scores (files, classes) of `classify_clips`."""
    return np.array([answer.scores for answer in classify_clips(*arguments)])


def main() -> None:
    options = parser(__doc__, batch_size=16)
    options.add_argument("--clips", type=int, default=300)
    options.add_argument("--family", default="ast", choices=["ast", "vit", "cnn14"])
    options.add_argument("--frames", type=int, default=400, help="At least 398, so that a clip is one window.")
    options.add_argument("--num_mel_bins", type=int, default=128)
    options.add_argument("--model_config", default="{}")
    arguments = options.parse_args()
    fields = ModelArguments(architecture=arguments.family, model_config=arguments.model_config)
    features = FeatureArguments(max_length=arguments.frames, num_mel_bins=arguments.num_mel_bins)
    extractor = load_extractor(fields, features)
    model = load_model([f"class {number}" for number in range(10)], fields, extractor).eval()
    extractor = extractor.stock()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{row}.wav") for row in range(arguments.clips)]
        for row, file in enumerate(files):
            file.write_bytes(wav_bytes(row))
        clips = [{"bytes": None, "path": str(file)} for file in files]
        classify = pipeline("audio-classification", model=model, feature_extractor=extractor)
        stock = partial(file_by_file, classify, files)
        ours = partial(our_scores, model, extractor, clips, arguments.batch_size)
        exact = file_by_file(classify, files, lambda file: load_waveform({"bytes": None, "path": str(file)}))
        difference = float(np.abs(exact - ours()).max())
        seconds = medians({"pipeline": stock, "predict.py": ours}, arguments.rounds)
    for name, taken in seconds.items():
        print(f"{name:<12} {taken:8.2f} s  {arguments.clips / taken:8.1f} files a second")
    ratio = seconds["pipeline"] / seconds["predict.py"]
    print(f"ratio {ratio:.2f}, scores within {difference:.1g}")
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({**vars(arguments), "cores": cores, "seconds": seconds, "ratio": ratio, "difference": difference}))


if __name__ == "__main__":
    main()
