"""What the cache on the disk has of each clip, and what that costs."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from datasets import Audio
from joblib import cpu_count
from pandas import DataFrame

from audio_dendrites.data.features import (
    ClipLengths,
    Inputs,
    Samples,
    Stored,
    decode_batch,
    extract_features,
    one_thread,
    parts_of,
    store_batch,
)
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import CACHES, DataArguments, Recipe

logger = logging.getLogger(__name__)

SAMPLE = 200  # clips that are measured
LARGE = 5000  # clips; the features of fewer take little time and room
_BATCH = 20  # clips that are held in memory at once


def stored_form(extractor: Inputs, cache: str) -> Inputs | Samples | ClipLengths:
    """What the cache has of each clip.

    Args:
        extractor: Computes the features.
        cache: features, waveforms or none.
    """
    if cache == "none":
        return ClipLengths(extractor.sampling_rate)
    return extractor if cache == "features" or isinstance(extractor, Samples) else Samples(extractor.sampling_rate)


def columns(arguments: DataArguments) -> dict[str, str | None]:
    """The arguments of `extract_features` that say how a recipe reads a clip."""
    names = {"audio_column": arguments.audio_column, "id_column": arguments.clip_column}
    return names | {"channel": arguments.channel}


def fill_cache(
    clips: datasets.Dataset,
    stored: Stored,
    arguments: DataArguments,
    desc: str = "Features",
    shard: tuple[int, int] = (0, 1),
) -> datasets.Dataset:
    """`extract_features` with the data arguments of a recipe."""
    workers = arguments.preprocessing_num_workers or cpu_count()
    return extract_features(clips, stored, num_proc=workers, desc=desc, shard=shard, **columns(arguments))


@dataclass(frozen=True)
class Cost:
    """What a choice of `cache` costs for a whole data set.

    Attributes:
        size: Bytes on the disk.
        once: Seconds of one process, before the training.
        each_epoch: Seconds of one process, in each epoch.
    """

    size: float
    once: float
    each_epoch: float


def estimate(clips: datasets.Dataset, extractor: Inputs, arguments: DataArguments) -> dict[str, Cost]:
    """Estimate what each choice of `cache` costs, from `SAMPLE` clips at even distances.

    Args:
        clips: The clips that `load_clips` returns.
        extractor: Computes the features.
        arguments: The data arguments of the recipe.
    """
    rows = np.unique(np.linspace(0, len(clips) - 1, SAMPLE).astype(int)).tolist()
    forms = {cache: stored_form(extractor, cache) for cache in CACHES}
    decoding, seconds, sizes = 0.0, dict.fromkeys(CACHES, 0.0), dict.fromkeys(CACHES, 0)
    source = clips.cast_column(arguments.audio_column, Audio(decode=False)).with_format("arrow")
    with one_thread():
        for first in range(0, len(rows), _BATCH):
            start = time.perf_counter()
            table = source[rows[first : first + _BATCH]]
            decoded = decode_batch(table, rows[first : first + _BATCH], extractor.sampling_rate, **columns(arguments))
            decoding += time.perf_counter() - start
            others = table.drop_columns([arguments.audio_column])
            for cache, form in forms.items():
                start = time.perf_counter()
                sizes[cache] += store_batch(others, *decoded, form).nbytes
                seconds[cache] += time.perf_counter() - start
    again = {"features": 0.0, "waveforms": seconds["features"], "none": decoding + seconds["features"]}
    if forms["waveforms"] is extractor:
        again["waveforms"] = 0.0
    scale = len(clips) / len(rows)
    return {
        cache: Cost(scale * sizes[cache], scale * (decoding + seconds[cache]), scale * again[cache]) for cache in CACHES
    }


def cost_table(costs: Mapping[str, Cost], clips: datasets.Dataset, recipe: Recipe) -> str:
    """What `estimate` found, as text."""
    workers = recipe.data.preprocessing_num_workers or cpu_count()
    loaders = recipe.training.dataloader_num_workers
    processes = max(1, loaders) * recipe.training.world_size
    rows = {
        cache: {
            "disk": _size(cost.size),
            "minutes once": f"{cost.once / workers / 60:,.2f}",
            "minutes each epoch": f"{cost.each_epoch / processes / 60:,.2f}",
        }
        for cache, cost in costs.items()
    }
    return (
        f"What each choice of cache costs for {len(clips):,} clips, estimated from {min(SAMPLE, len(clips))} of them "
        f"(this recipe has cache: {recipe.data.cache}):\n"
        f"{DataFrame.from_dict(rows, orient='index').to_string()}\n"
        f"Processes: {workers} once (preprocessing_num_workers), {processes} in each epoch (dataloader_num_workers: "
        f"{loaders})."
    )


def _size(size: float) -> str:
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:,.1f} {name}"


def check_cost(clips: datasets.Dataset, extractor: Inputs, forms: Sequence[Stored], recipe: Recipe) -> None:
    """Show what each choice of `cache` costs before a large cache is written, and check that the disk has room for it.

    Args:
        clips: The clips that `load_clips` returns.
        extractor: Computes the features.
        forms: What will be written of each clip.
        recipe: A recipe of these clips.

    Raises:
        UserError: The disk has too little room.
    """
    parts = [part for form in forms for part in parts_of(clips, form, **columns(recipe.data)) if not part.is_cached]
    if len(clips) <= LARGE or not parts:
        return
    costs, cache, folder = estimate(clips, extractor, recipe.data), recipe.data.cache, parts[0].path.parent
    logger.info("%s", cost_table(costs, clips, recipe))
    needed = costs[cache].size * sum(len(part.clips) for part in parts) / len(clips)
    if (free := shutil.disk_usage(folder).free) < needed:
        smaller = "" if cache == "none" else f", or choose --cache none, which needs {_size(costs['none'].size)}"
        raise UserError(
            f"cache: {cache} needs about {_size(needed)} in {folder}, got a disk with {_size(free)} left; free space, "
            f"set HF_DATASETS_CACHE to a folder on a larger disk{smaller}"
        )
