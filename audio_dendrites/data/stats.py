"""Print what the data set of a recipe holds."""

import io
from collections import Counter

import numpy as np
import soundfile
from datasets import (
    Audio,
)
from pandas import crosstab

from audio_dendrites.data.audio import BadClip, load_waveform
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.data.splits import split_by_fold
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import Recipe


def stats(recipe: Recipe) -> None:
    """Print what a recipe's data set holds: clips by class and fold, lengths, rates, leaks, and the log-mel's level.

    Mean and standard deviation are those of the log-mel energies (`ASTFeatureExtractor`'s, before normalisation) over
    all frames and bands of the training clips at their own length: what the fields `mean` and `std` want.

    Raises:
        UserError: The data set is unknown or unreachable, its folds do not fit, or no training clip can be read.
    """
    arguments = recipe.data
    clips, index = load_clips(arguments)
    splits = split_by_fold(index, arguments)
    print(f"{len(clips):,} clips of {arguments.dataset}\n")
    labelled = index.explode("label")
    counts = crosstab(labelled["label"], labelled["fold"], margins=True, margins_name="all")
    folds = sorted(set(index["fold"]), key=lambda fold: (len(fold), fold))
    print(counts.reindex(columns=[*folds, "all"]).to_string())

    settings = {name: getattr(recipe.features, name) for name in ("sampling_rate", "num_mel_bins")}
    chosen = {name: value for name, value in settings.items() if value is not None}
    extractor = BatchedASTFeatureExtractor(**chosen, do_normalize=False)
    sound = clips.select_columns(arguments.audio_column).cast_column(arguments.audio_column, Audio(decode=False))
    train, seconds, rates, bad = set(splits["train"].tolist()), [], Counter(), []
    count, total, squares = 0, 0.0, 0.0
    for row, name in enumerate(index["clip"]):
        audio = sound[row][arguments.audio_column]
        try:
            info = soundfile.info(io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"])
            seconds.append(info.duration)
            rates[info.samplerate] += 1
            if row in train:
                waveform = load_waveform(audio, extractor.sampling_rate, name, arguments.channel)
                energies = extractor.log_mel([waveform])[0].double()
                count, total = count + energies.numel(), total + energies.sum().item()
                squares += energies.square().sum().item()
        except (BadClip, soundfile.LibsndfileError) as error:
            bad.append(f"{name}: {error}" if name not in str(error) else str(error))
    if not count:
        raise UserError(f"none of the {len(train)} training clips can be read; the first: {bad[0]}")

    low, middle, high = np.quantile(seconds, [0, 0.5, 1])
    print(f"\nseconds: {low:.3f} shortest, {middle:.3f} median, {high:.3f} longest, {sum(seconds):,.0f} in all")
    print("sampling rates: " + ", ".join(f"{rate} Hz ({clips} clips)" for rate, clips in sorted(rates.items())))
    print(f"unreadable clips: {len(bad)}" + "".join(f"\n  {error}" for error in bad[:20]))
    by_group = index.groupby("group")["fold"].unique()
    leaks = by_group[by_group.map(len) > 1]
    print(f"source recordings in several folds: {len(leaks)} of {len(by_group)}")
    for group, found in leaks.items():
        print(f"  {group}: folds {', '.join(sorted(found))}")
    mean = total / count
    print(f"log-mel of the training folds ({', '.join(arguments.folds['train'])}), {len(train):,} clips:")
    print(f"mean: {mean:.4f}\nstd: {(squares / count - mean**2) ** 0.5:.4f}")
