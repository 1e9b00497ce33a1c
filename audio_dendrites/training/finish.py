"""Finish a run: score the test fold once and write the run folder."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from audio_dendrites.files import set_default_mode, writing_to
from audio_dendrites.models.lora import merged
from audio_dendrites.publishing.card import write_card
from audio_dendrites.publishing.check import check_pipeline
from audio_dendrites.results.dendrites import measure_use
from audio_dendrites.results.report import print_summary, write_run
from audio_dendrites.results.scores import predictions_table
from audio_dendrites.results.trackers import end_tracking
from audio_dendrites.training.data import RunData
from audio_dendrites.training.trainer import AudioTrainer


def finish(trainer: AudioTrainer, data: RunData, card_template: Path) -> None:
    """Score the validation and test clips, and write the model, the figures and the card into the run folder.

    Features and weights are in float32, as in `pipeline`. Only the first process writes.

    Args:
        trainer: The trainer after the training.
        data: The data of the run.
        card_template: Jinja template of the model card.
    """
    recipe, folder = data.recipe, Path(trainer.args.output_dir)
    throughput, predictions = trainer.throughput.measure(trainer), {}
    for split, prefix in {"validation": "eval", "test": "test"}.items():
        output = trainer.predict_in_fp32(data.windows(split, exact=True), prefix)
        predictions[split] = predictions_table(data.index.iloc[data.splits[split]], output, data.labels)
    use = measure_use(trainer)
    if not trainer.is_world_process_zero():
        return
    with writing_to(folder):
        with TemporaryDirectory(dir=folder, prefix=".model-") as beside:  # no half-written model replaces a whole one
            merged(trainer.model).save_pretrained(beside)  # with dendrites in the form that needs no perforatedai
            trainer.processing_class.save_pretrained(beside)
            set_default_mode(*Path(beside).iterdir())
            for path in Path(beside).iterdir():
                os.replace(path, folder / path.name)
        heard = data.sound.select(data.splits["test"])
        check_pipeline(folder, heard, recipe.data.audio_column, predictions["test"], data.loss)
        write_run(folder, recipe, trainer, data.labels, predictions, data.skipped, use, throughput)
        end_tracking(trainer, folder)
        write_card(folder, card_template)
    print_summary(folder)
