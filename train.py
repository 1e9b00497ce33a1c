"""Fine-tune an audio classifier by a recipe. --help explains every field.

    accelerate launch train.py configs/quickstart.yaml [--learning_rate 1e-4 ...]

The same command resumes a run that was interrupted. With `baseline: true`, a recipe with dendrites is first trained
without them, and the two runs are compared.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # here, so that it does not wait for the imports below
    sys.modules["peft"] = None  # TrainingArguments imports it if it is installed, which takes as long as all the rest
    from audio_dendrites.recipes import parse_recipe

    parse_recipe(["--help"])

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed

from audio_dendrites.errors import run_program
from audio_dendrites.models.families import default_dendrites, learning_rates
from audio_dendrites.models.loading import load_model, load_teacher
from audio_dendrites.publishing import hub
from audio_dendrites.publishing.card import write_card
from audio_dendrites.recipes import Recipe, parse_recipe, write_yaml
from audio_dendrites.results.comparison import write_comparison
from audio_dendrites.results.metrics import compute_metrics
from audio_dendrites.results.report import is_finished, print_summary
from audio_dendrites.training.checkpoints import find_checkpoint
from audio_dendrites.training.data import RunData, load_data
from audio_dendrites.training.finish import finish
from audio_dendrites.training.losses import balanced_class_weights
from audio_dendrites.training.preflight import is_over, preflight
from audio_dendrites.training.process import connected, locked, one_process_first, prepare_process
from audio_dendrites.training.trainer import AudioTrainer
from data_collator import (
    AugmentedClips,
    BalancedSampler,
    ExtractorCollator,
    SetEpoch,
    SpectrogramCollator,
    WaveformCollator,
)
from pai_callback import Layer, PAICallback, PAIConfig, PAIError, PAITrainerMixin, choose_layers, probe_layers

COLLATORS = {"spectrograms": SpectrogramCollator, "waveforms": WaveformCollator, "clips": ExtractorCollator}
CARD = Path(__file__).parent / "model_cards" / "model.md.jinja"


class DendriticAudioTrainer(PAITrainerMixin, AudioTrainer):
    """AudioTrainer whose checkpoints follow a model that grows."""

    @property
    def structure_since(self) -> int:
        return max((entry["step"] for entry in self.pai_callback.history if entry["event"]), default=0)


def find_growth(pai: Mapping[str, Any], model: nn.Module, batch: Mapping[str, Any]) -> tuple[PAIConfig, list[Layer]]:
    """The configuration of a `pai` block and the layers of the model that grow, for `preflight`."""
    callback = PAICallback({"modules": default_dendrites(model)} | pai)
    names = choose_layers(model, callback.config) if callback.grows else []
    return callback.config, probe_layers(model, batch, names)


def main(*recipes: Recipe) -> None:
    """Train the runs of the recipes. Runs that another command is training are left out.

    A recipe with `baseline: true` has two runs, which are compared. All runs are checked before the first one trains.

    Args:
        recipes: Recipes with the same data set.
    """
    prepare_process(recipes[0].training)
    data = load_data(preflight([run for recipe in recipes for run in recipe.runs()], find_growth))
    for recipe in recipes:
        runs, is_first = recipe.runs(), recipe.training.process_index == 0
        for run in runs:
            train_unless_locked(run, data.get(run.training.output_dir))
        with one_process_first(recipe.training, "comparing and publishing"):
            if is_first and all(is_finished(Path(run.training.output_dir)) for run in runs):
                conclude(*runs)


def train_unless_locked(run: Recipe, data: RunData | None) -> None:
    """Train a run, show it if it is finished, or leave it to the command that is training it.

    Args:
        run: The recipe of the run.
        data: The data of the run, or None if it was finished when this command started.
    """
    folder = Path(run.training.output_dir)
    with locked(run.training) as free, connected(run.training):
        found = "finished" if data is None or is_over(run.training) else "to train" if free else "locked"
        found = broadcast_object_list([found])[0]
        if found == "to train":
            train(data)
        elif run.training.process_index == 0 and found == "finished":
            print_summary(folder)
        elif run.training.process_index == 0:
            print(f"\n{folder}: another command is training this run.", flush=True)


def conclude(run: Recipe, dendritic: Recipe | None = None) -> None:
    """Publish a finished run, or compare and publish a baseline and the run with dendrites."""
    if dendritic is None:
        return hub.publish_finished(run.training, CARD)
    folders = [Path(one.training.output_dir) for one in (run, dendritic)]
    write_comparison({"baseline": folders[:1], "dendritic": folders[1:]}, folders[1])
    for folder in folders:
        write_card(folder, CARD)
    for one, other in ((run, dendritic), (dendritic, run)):
        hub.publish_finished(one.training, CARD, other.training.hub_model_id)


def train(data: RunData) -> None:
    """Train one run, score its test fold once, and write its run folder."""
    recipe, args = data.recipe, data.recipe.training
    set_seed(args.seed)
    model = load_model(data.labels, recipe.model, data.extractor)
    model.config.update(data.model_settings)
    trainer = make_trainer(data, model)
    checkpoint = find_checkpoint(args, data.labels)
    if trainer.is_world_process_zero():
        write_yaml(recipe, Path(args.output_dir, "config.yaml"))
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, data, CARD)


def make_trainer(data: RunData, model: PreTrainedModel) -> AudioTrainer:
    """The trainer of a run, with the callbacks, the collator and the samplers of its recipe."""
    recipe, args = data.recipe, data.recipe.training
    grows, callbacks = recipe.dendrites.pai is not None, []
    if (clips := data.stream) is None:
        clips = AugmentedClips(data.clips("train"), args.seed)
        callbacks.append(SetEpoch())
    if grows:
        callbacks.append(PAICallback({"modules": default_dendrites(model)} | recipe.dendrites.pai))
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    return (DendriticAudioTrainer if grows else AudioTrainer)(
        model,
        args,
        data_collator=COLLATORS[data.extractor.input](
            num_labels=len(data.labels),
            **data.extractor.batch_layout,
            **recipe.augmentation.settings(data.extractor.input),
        ),
        train_dataset=clips,
        eval_dataset=data.windows("validation"),
        processing_class=data.extractor.stock(),
        compute_metrics=partial(compute_metrics, loss=data.loss),
        callbacks=callbacks,
        loss=data.loss,
        teacher=args.distill_from and load_teacher(args.distill_from, data.labels, data.extractor, data.loss),
        train_sampler=BalancedSampler(clips, data.targets("train")) if args.balanced_sampling else None,
        class_weights=balanced_class_weights(data.targets("train"), data.labels) if args.class_weights else None,
        learning_rates=learning_rates(
            model, args.learning_rate, recipe.model.head_learning_rate, recipe.model.layer_decay
        ),
        recipe=recipe,
        card_template=CARD,
    )


if __name__ == "__main__":
    run_program(lambda words: main(parse_recipe(words)), PAIError)
