"""Statistics of a data set: a summary to print, and the numbers for `mean: auto` and `std: auto`."""

import dataclasses
import io
import logging
import time
from collections import Counter
from math import sqrt

import datasets
import numpy as np
import pyarrow.compute as pc
import soundfile
from datasets import Audio
from pandas import crosstab

from audio_dendrites.data.cache import cost_table, estimate, fill_cache
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.features import BatchedASTFeatureExtractor, ExtractorClips, Inputs, LogMelMoments, Waveforms
from audio_dendrites.data.splits import split_by_fold
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments, Recipe

logger = logging.getLogger(__name__)


def log_mel_moments(
    clips: datasets.Dataset,
    arguments: DataArguments,
    extractor: BatchedASTFeatureExtractor | Waveforms,
    shard: tuple[int, int] = (0, 1),
) -> datasets.Dataset:
    """Compute the sums over the log-mel of each clip that `mean_and_std` needs. They are cached on disk.

    Args:
        clips: The clips that `load_clips` returns.
        arguments: The data arguments of the recipe.
        extractor: The feature extractor of the run, for its sampling rate and its number of mel bands.
        shard: As in `extract_features`.
    """
    start = time.perf_counter()
    stored = LogMelMoments(extractor.sampling_rate, extractor.num_mel_bins)
    moments = fill_cache(clips, stored, arguments, desc="Mean and std", shard=shard)
    logger.info("The log-mel of %d clips was measured in %.1f seconds.", len(moments), time.perf_counter() - start)
    return moments


def mean_and_std(moments: datasets.Dataset, train: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of the log-mel over all frames and bands of the training clips, to four digits.

    The clips have their own length and no augmentation. Clips that cannot be read are left out.

    Args:
        moments: The result of `log_mel_moments`.
        train: Row numbers of the training clips.

    Raises:
        UserError: No training clip can be read.
    """
    errors = moments.select_columns("error").to_pandas()["error"].iloc[train]
    if not (good := train[errors == ""]).size:
        raise UserError(f"none of the {len(train)} training clips can be read; the first: {errors.iloc[0]}")
    sums = pc.list_flatten(moments.with_format("arrow")[good]["input_values"]).to_numpy().reshape(-1, 3)
    count, total, squares = sums.sum(axis=0)
    mean = total / count
    return {"mean": round(float(mean), 4), "std": round(sqrt(squares / count - mean**2), 4)}


def with_statistics(recipe: Recipe, moments: datasets.Dataset, train: np.ndarray) -> Recipe:
    """Replace `mean: auto` and `std: auto` of a recipe by the numbers of `mean_and_std`."""
    found = mean_and_std(moments, train)
    logger.info("mean %.4f and std %.4f of the log-mel of %d training clips.", *found.values(), len(train))
    numbers = {name: value for name, value in found.items() if getattr(recipe.features, name) == "auto"}
    return dataclasses.replace(recipe, features=dataclasses.replace(recipe.features, **numbers))


def stats(recipe: Recipe, extractor: Inputs) -> None:
    """Print a summary of a data set.

    It has the clips by class and fold, lengths, rates, leaks, mean and std of the log-mel, and what each choice of
    `cache` costs.

    Args:
        recipe: The recipe of the data set.
        extractor: The feature extractor of the recipe.

    Raises:
        UserError: The data set cannot be loaded, its folds do not fit, or no training clip can be read.
    """
    arguments = recipe.data
    clips, index = load_clips(arguments)
    train = split_by_fold(index, arguments)["train"]
    print(f"{len(clips):,} clips of {arguments.dataset}\n")
    labelled = index.explode("label")
    counts = crosstab(labelled["label"], labelled["fold"], margins=True, margins_name="all")
    folds = sorted(set(index["fold"]), key=lambda fold: (len(fold), fold))
    print(counts.reindex(columns=[*folds, "all"]).to_string())

    log_mel = extractor
    if isinstance(extractor, ExtractorClips):  # it has no mel bands
        log_mel = BatchedASTFeatureExtractor(sampling_rate=extractor.sampling_rate)
    moments = log_mel_moments(clips, arguments, log_mel)
    errors = np.asarray(moments["error"])
    bad = errors[errors != ""]
    found = mean_and_std(moments, train)
    seconds, rates = _lengths_and_rates(clips.select(np.flatnonzero(errors == "")), arguments.audio_column)

    low, middle, high = np.quantile(seconds, [0, 0.5, 1])
    print(f"\nseconds: {low:.3f} shortest, {middle:.3f} median, {high:.3f} longest, {sum(seconds):,.0f} in all")
    print("sampling rates: " + ", ".join(f"{rate} Hz ({clips} clips)" for rate, clips in sorted(rates.items())))
    print(f"clips that cannot be used: {len(bad)}" + "".join(f"\n  {error}" for error in bad[:20]))
    by_group = index.groupby("group")["fold"].unique()
    leaks = by_group[by_group.map(len) > 1]
    print(f"source recordings in several folds: {len(leaks)} of {len(by_group)}")
    for group, present in leaks.items():
        print(f"  {group}: folds {', '.join(sorted(present))}")
    print(
        f"log-mel of the training folds ({', '.join(arguments.folds['train'])}), {len(train):,} clips, "
        f"{log_mel.sampling_rate} Hz, {log_mel.num_mel_bins} bands:"
    )
    print("".join(f"{name}: {value:.4f}\n" for name, value in found.items()))
    print(cost_table(estimate(clips, extractor, arguments), clips, recipe))


def _lengths_and_rates(clips: datasets.Dataset, audio_column: str) -> tuple[list[float], Counter[int]]:
    """The length of each clip in seconds, and the number of clips by sampling rate, from the headers of the files."""
    sound = clips.select_columns(audio_column).cast_column(audio_column, Audio(decode=False))
    files = (row[audio_column] for row in sound)
    headers = [soundfile.info(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"])) for file in files]
    return [header.duration for header in headers], Counter(header.samplerate for header in headers)
