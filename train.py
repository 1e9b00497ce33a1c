"""Fine-tune an audio classifier as a recipe says; --help explains every field.

    accelerate launch train.py configs/quickstart.yaml [--learning_rate 1e-4 ...]

The same command again goes on where the run was interrupted. With `baseline: true` a recipe with dendrites is trained
without them first, and the two are compared.
"""

import logging
import sys
from functools import partial
from pathlib import Path

from joblib import cpu_count
from transformers import EarlyStoppingCallback, set_seed

from audio_dendrites.data.clips import load_clips
from audio_dendrites.data.features import ClipFeatures, ExactFeatures, extract_features, feature_lengths
from audio_dendrites.data.splits import class_names, drop_bad_clips, encode_labels, is_multi_label, split_by_fold
from audio_dendrites.data.stats import log_mel_moments, with_statistics
from audio_dendrites.data.windows import ClipWindows
from audio_dendrites.errors import UserError
from audio_dendrites.files import writing_to
from audio_dendrites.models.loading import check_model, learning_rates, load_extractor, load_model, load_teacher
from audio_dendrites.publishing import hub
from audio_dendrites.publishing.card import write_card
from audio_dendrites.publishing.check import check_pipeline
from audio_dendrites.publishing.export import export_dendritic
from audio_dendrites.recipes import Recipe, parse_recipe, write_yaml
from audio_dendrites.results.comparison import write_comparison
from audio_dendrites.results.metrics import compute_metrics
from audio_dendrites.results.report import is_finished, print_summary, write_run
from audio_dendrites.results.scores import predictions_table
from audio_dendrites.training.checkpoints import check_run_folder, find_checkpoint
from audio_dendrites.training.losses import balanced_class_weights, resolve_loss
from audio_dendrites.training.process import prepare_process
from audio_dendrites.training.trainer import AudioTrainer
from data_collator import AugmentedClips, BalancedSampler, SetEpoch, SpectrogramCollator, WaveformCollator
from pai_callback import PAICallback, PAIError, PAITrainerMixin

CARD = Path(__file__).parent / "model_cards" / "model.md.jinja"


class DendriticAudioTrainer(PAITrainerMixin, AudioTrainer):
    """AudioTrainer whose checkpoints follow a model that grows."""

    @property
    def structure_since(self) -> int:
        return max((entry["step"] for entry in self.pai_callback.history if entry["event"]), default=0)


def train(recipe: Recipe) -> None:
    """One run: data, features, model, training, the test fold once, the run folder."""
    args, folder = recipe.training, Path(recipe.training.output_dir)
    grower = None if recipe.dendrites.pai is None else PAICallback(recipe.dendrites.pai)
    prepare_process(args)
    set_seed(args.seed)

    extractor = load_extractor(recipe.model, recipe.features)
    check_model(recipe, extractor)
    with args.main_process_first(desc="loading the data"):
        clips, index = load_clips(recipe.data)
    splits = split_by_fold(index, recipe.data)
    labels = class_names(index, splits, recipe.data)
    if recipe.features.needs_statistics:
        with args.main_process_first(desc="computing mean and std"):
            moments = log_mel_moments(clips, recipe.data, extractor)
        recipe = with_statistics(recipe, moments, splits["train"])
        extractor = load_extractor(recipe.model, recipe.features)
    loss = resolve_loss(args, is_multi_label(index["label"]))

    model = load_model(labels, recipe.model, extractor)
    model.config.update({"window_overlap": args.window_overlap, "window_aggregation": args.window_aggregation})
    model.config.update({"channel": recipe.data.channel})  # for predict.py
    if loss == "bce":
        model.config.problem_type = "multi_label_classification"  # so that `pipeline` takes the sigmoid
    check_run_folder(recipe, model)
    if is_finished(folder) and args.resume_from_checkpoint is None:
        return print_summary(folder) if args.process_index == 0 else None
    checkpoint = find_checkpoint(args, labels)
    teacher = args.distill_from and load_teacher(args.distill_from, labels, extractor, loss)

    with args.main_process_first(desc="computing the features"):
        features = extract_features(
            clips,
            extractor,
            recipe.data.audio_column,
            recipe.data.clip_column,
            num_proc=recipe.data.preprocessing_num_workers or cpu_count(),
            channel=recipe.data.channel,
        )
    splits, skipped = drop_bad_clips(splits, features["error"], recipe.data.on_bad_clip)
    targets = {split: encode_labels(index["label"].iloc[rows], labels) for split, rows in splits.items()}
    lengths = feature_lengths(features, extractor.row_width)
    in_windows = {
        split: partial(
            ClipWindows, lengths=lengths[rows], layout=extractor.window_layout, overlap=args.window_overlap,
            aggregation=args.window_aggregation,
        )
        for split, rows in splits.items()
    }  # fmt: skip
    examples = {
        split: ClipFeatures(features.select(rows), targets[split], extractor.row_width)
        for split, rows in splits.items()
    }

    callbacks = [SetEpoch()] if grower is None else [SetEpoch(), grower]
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    train_clips = AugmentedClips(examples["train"], args.seed)
    trainer = (AudioTrainer if grower is None else DendriticAudioTrainer)(
        model,
        args,
        data_collator=(WaveformCollator if recipe.model.waveform else SpectrogramCollator)(
            num_labels=len(labels), **extractor.batch_layout, **recipe.augmentation.settings(recipe.model.waveform)
        ),
        train_dataset=train_clips,
        eval_dataset=in_windows["validation"](examples["validation"]),
        processing_class=extractor.stock(),
        compute_metrics=partial(compute_metrics, loss=loss),
        callbacks=callbacks,
        loss=loss,
        teacher=teacher,
        distillation=args.distillation,
        train_sampler=BalancedSampler(train_clips, targets["train"]) if args.balanced_sampling else None,
        class_weights=balanced_class_weights(targets["train"], labels) if args.class_weights else None,
        learning_rates=learning_rates(
            model, args.learning_rate, recipe.model.head_learning_rate, recipe.model.layer_decay
        ),
        average_checkpoints=args.average_checkpoints,
        ema_decay=args.ema_decay,
        recipe=recipe,
        card_template=CARD,
    )
    if trainer.is_world_process_zero():
        write_yaml(recipe, folder / "config.yaml")
    trainer.train(resume_from_checkpoint=checkpoint)

    predictions = {}
    for split, prefix in {"validation": "eval", "test": "test"}.items():
        rows = splits[split]
        exact = ExactFeatures(
            clips.select(rows), targets[split], extractor, recipe.data.audio_column, recipe.data.channel
        )
        output = trainer.predict_in_fp32(in_windows[split](exact), prefix)
        predictions[split] = predictions_table(index.iloc[rows], output, labels)
    trainer.end_tracking()
    if trainer.is_world_process_zero():
        with writing_to(folder):
            export_dendritic(model, folder, extractor.stock(), grower and grower.config.activation)
            heard = clips.select(splits["test"])
            check_pipeline(folder, heard, recipe.data.audio_column, predictions["test"], loss)
            write_run(folder, recipe, trainer, labels, predictions, skipped)
            write_card(folder, CARD)
        print_summary(folder)


def main(recipe: Recipe) -> None:
    """The recipe's run, after that of its baseline if it asks for one, and then their comparison; each is published."""
    if not recipe.dendrites.baseline:
        train(recipe)
        return hub.publish_finished(recipe.training, CARD)
    PAICallback(recipe.dendrites.pai)  # what is wrong with it shows before the baseline is trained
    pair = [recipe.baseline(), recipe]
    for one in pair:
        train(one)
    if recipe.training.process_index == 0:
        folders = [Path(one.training.output_dir) for one in pair]
        write_comparison({"baseline": folders[:1], "dendritic": folders[1:]}, folders[1])
        for one in pair:
            write_card(Path(one.training.output_dir), CARD)
    for one, other in zip(pair, reversed(pair), strict=True):
        hub.publish_finished(one.training, CARD, other.training.hub_model_id)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("audio_dendrites").setLevel(logging.INFO)
    try:
        main(parse_recipe(sys.argv[1:]))
    except (UserError, PAIError) as error:
        sys.exit(f"error: {error}")
