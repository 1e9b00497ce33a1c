"""Load the data of runs: the clips, their features and their splits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import datasets
import numpy as np
from pandas import DataFrame
from scipy.sparse import csr_array

from audio_dendrites.data.cache import check_cost, fill_cache, stored_form
from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.features import (
    ClipFeatures,
    ClipWaveforms,
    ComputedFeatures,
    Inputs,
    Stored,
    feature_lengths,
)
from audio_dendrites.data.splits import class_names, drop_bad_clips, encode_labels, is_multi_label, split_by_fold
from audio_dendrites.data.stats import log_mel_moments, with_statistics
from audio_dendrites.data.stream import ClipStream, stream_labels
from audio_dendrites.data.windows import ClipWindows
from audio_dendrites.models.loading import load_extractor, match_parameters
from audio_dendrites.recipes import Recipe
from audio_dendrites.training.losses import check_metrics, resolve_loss
from audio_dendrites.training.process import one_process_first


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        recipe: The recipe of the run.
        extractor: The feature extractor of the model.
        sound: All clips of the data set, not decoded.
        index: The index of these clips that `load_clips` returns, in the same order.
        stored: What the cache has of each clip: its features, its samples or its length.
        cached: What `fill_cache` returns for these clips, in the same order.
        splits: Row numbers of `train`, `validation` and `test`, without the clips that cannot be read.
        skipped: The errors of the clips that cannot be read, by split.
        labels: Class names in the order of the logits.
        loss: cross_entropy or bce.
        stream: The training clips if they are streamed. Then `splits` has no `train`.
    """

    recipe: Recipe
    extractor: Inputs
    sound: datasets.Dataset
    index: DataFrame
    stored: Stored
    cached: datasets.Dataset
    splits: dict[str, np.ndarray]
    skipped: dict[str, list[str]]
    labels: list[str]
    loss: str
    stream: ClipStream | None = None

    @property
    def model_settings(self) -> dict[str, Any]:
        """Fields of the model's configuration that `pipeline` and predict.py need to score clips."""
        args = self.recipe.training
        settings = {"window_overlap": args.window_overlap, "window_aggregation": args.window_aggregation}
        settings |= {"channel": self.recipe.data.channel} | self.extractor.model_settings  # for predict.py
        return settings | ({"problem_type": "multi_label_classification"} if self.loss == "bce" else {})

    def targets(self, split: str) -> np.ndarray | csr_array:
        """Class numbers (clips,) of a split. If clips have lists of labels: 0 and 1, (clips, classes), sparse."""
        return encode_labels(self.index["label"].iloc[self.splits[split]], self.labels, sparse=True)

    def clips(self, split: str, exact: bool = False) -> ClipFeatures | ComputedFeatures:
        """The clips of a split at their own length.

        Args:
            split: train, validation or test.
            exact: Compute the features from the sound files in float32, as `pipeline` does. Otherwise they are in
                float16, from the cache or computed from what it has.
        """
        rows, labels, data = self.splits[split], self.targets(split), self.recipe.data
        if self.stored is self.extractor and not exact:
            return ClipFeatures(self.cached.select(rows), labels, self.extractor.row_width)
        if exact or data.cache == "none":
            sound, rate = self.sound.select(rows), self.extractor.sampling_rate
            waveforms = ClipWaveforms(sound, labels, rate, data.audio_column, data.channel)
        else:
            waveforms = ClipFeatures(self.cached.select(rows), labels, self.stored.row_width)
        return ComputedFeatures(waveforms, self.extractor, "float32" if exact else self.extractor.stored_as)

    def windows(self, split: str, exact: bool = False) -> ClipWindows:
        """The windows of the clips that `clips` returns."""
        args, layout = self.recipe.training, self.extractor.window_layout
        lengths = feature_lengths(self.cached, self.stored, self.extractor)[self.splits[split]]
        return ClipWindows(self.clips(split, exact), lengths, layout, args.window_overlap, args.window_aggregation)


def load_data(recipes: Sequence[Recipe]) -> dict[str, RunData]:
    """Load the data of runs on one data set.

    Args:
        recipes: Recipes that may differ in their folds, features, models, dendrites and trainings only.

    Returns:
        The data of each run by its `output_dir`.

    Raises:
        UserError: The data set cannot be loaded, or does not fit one of the recipes.
    """
    if not recipes:
        return {}
    with one_process_first(recipes[0].training, "loading the data"):
        sound, index = load_clips(recipes[0].data)
    found = {}

    def inputs(recipe: Recipe) -> str:
        return repr((recipe.model, recipe.features))

    for _, same in groupby(sorted(recipes, key=inputs), key=inputs):
        found |= _with_features(list(same), sound, index)
    return found


def _with_features(recipes: Sequence[Recipe], sound: datasets.Dataset, index: DataFrame) -> dict[str, RunData]:
    """The data of runs with one feature extractor and one model, by `output_dir`."""
    data, args = recipes[0].data, recipes[0].training
    extractor = load_extractor(recipes[0].model, recipes[0].features)
    multi_label = is_multi_label(index["label"])
    divided = []
    for recipe in recipes:
        splits = split_by_fold(index, recipe.data, recipe.training.load_best_model_at_end)
        check_metrics(recipe, multi_label)
        known = replace(recipe.data, labels=stream_labels(recipe.data)) if recipe.data.streaming else recipe.data
        divided.append((splits, class_names(index, splits, known), resolve_loss(recipe.training, multi_label)))
    extractors = [extractor] * len(recipes)
    with one_process_first(args, "computing the features"):
        if recipes[0].features.needs_statistics:
            moments = log_mel_moments(sound, data, extractor)
            recipes = [
                with_statistics(one, moments, rows["train"]) for one, (rows, _, _) in zip(recipes, divided, strict=True)
            ]
            extractors = [load_extractor(recipe.model, recipe.features) for recipe in recipes]
        forms = [stored_form(extractor, data.cache) for extractor in extractors]
        different = {str(form.cache_key): form for form in forms}
        check_cost(sound, extractors[0], list(different.values()), recipes[0])
        caches = {key: fill_cache(sound, form, data) for key, form in different.items()}
    found, models = {}, {}
    for recipe, extractor, form, (splits, labels, loss) in zip(recipes, extractors, forms, divided, strict=True):
        if tuple(labels) not in models:
            models[tuple(labels)] = match_parameters(labels, recipe.model, extractor)
        recipe = replace(recipe, model=models[tuple(labels)])
        cached = caches[str(form.cache_key)]
        errors = cached.select_columns("error").to_pandas()["error"]
        splits, skipped = drop_bad_clips(splits, errors, recipe.data.on_bad_clip)
        stream = None
        if recipe.data.streaming:
            stream = ClipStream(recipe.data, extractor, labels, multi_label, recipe.training.seed)
        run = RunData(recipe, extractor, sound, index, form, cached, splits, skipped, labels, loss, stream)
        found[recipe.training.output_dir] = run
    return found
