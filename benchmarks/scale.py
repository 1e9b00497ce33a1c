"""Memory and time against the number of clips, on generated Parquet files with few sounds and many rows (Linux only).

    PYTHONPATH=. python benchmarks/scale.py --clips 1000 10000 100000 [--multi_label]
    PYTHONPATH=. python benchmarks/scale.py --evaluation

The first command trains a tiny AST on half-second clips. Each size runs in processes of its own: one fills the cache of
features, one starts again and trains, and one resumes in the middle of an epoch. `--evaluation` scores 20,000 clips of
527 classes: an evaluation by the Trainer, and a comparison of two sides of three runs.

Times are seconds of the processor, which other programs hardly change. Memory is anonymous memory, which cannot be
evicted. Pages of the mapped cache do not count. Prints a line of JSON for each process.
"""

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SOUNDS, RATE, CLASSES, RECORDING = 50, 8000, 10, 4  # RECORDING: clips of each source recording
MANY = 527  # classes of multi-label clips
FIELDS = {
    "clip_column": "clip", "group_column": "group", "train_folds": "1", "validation_folds": "2", "test_folds": "3",
    "sampling_rate": RATE, "num_mel_bins": 8, "max_length": 48, "precision": "fp32", "report_to": "none",
    "model_config": '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, '
                    '"patch_size": 8, "time_stride": 8, "frequency_stride": 8}',
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "preprocessing_num_workers": 1,
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false", "disable_tqdm": "true",
    "metric_for_best_model": "mAP", "max_steps": 1_000_000, "dataloader_num_workers": 0,
}  # fmt: skip


def sound(number: int) -> bytes:
    """A short click of a pitch of its own in half a second of silence, as a FLAC file of a few hundred bytes."""
    import soundfile

    waveform, file = np.zeros(RATE // 2, dtype=np.float32), io.BytesIO()
    waveform[1000:1200] = 0.5 * np.sin(2 * np.pi * (100 + 60 * number) * np.arange(200) / RATE)
    soundfile.write(file, waveform, RATE, format="FLAC")
    return file.getvalue()


def write_clips(path: Path, count: int, multi_label: bool) -> None:
    """A Parquet file with row groups of 10,000 clips. Folds 2 and 3 have a tenth, at most 1,000, each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sounds, random = pa.array([sound(number) for number in range(SOUNDS)]), np.random.default_rng(0)
    held_out = min(count // 10, 1000)
    writer = None
    for start in range(0, count, 10_000):
        rows = np.arange(start, min(start + 10_000, count))
        names = pa.array([f"clip-{row:08d}" for row in rows])
        if multi_label:
            classes = random.integers(MANY, size=(len(rows), 2))
            classes[:, 0] = rows % MANY  # so that each class occurs
            labels = pa.array([[f"class {one:03d}" for one in sorted({*row})] for row in classes.tolist()])
        else:
            labels = pa.array([f"class {row % CLASSES}" for row in rows])
        audio = pa.StructArray.from_arrays([sounds.take(pa.array(rows % SOUNDS)), names], ["bytes", "path"])
        folds = pa.array(np.where(rows < held_out, 2, np.where(rows < 2 * held_out, 3, 1)))
        groups = pa.array([f"recording-{row // RECORDING}" for row in rows])
        table = pa.table({"audio": audio, "clip": names, "label": labels, "fold": folds, "group": groups})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def anonymous_bytes(settled: bool = False) -> int:
    """Resident memory of this process that is not a page of a file; `settled`: without what Arrow keeps for later."""
    if settled:
        import pyarrow as pa

        gc.collect()
        pa.default_memory_pool().release_unused()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@contextmanager
def measured(found: dict[str, Any], name: str) -> Iterator[None]:
    """Add to `found` the seconds of the processor that a block takes, and the memory that it adds, in MB."""
    before, peak, over = anonymous_bytes(settled=True), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.01):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.process_time()
    yield
    found[f"{name}_s"] = round(time.process_time() - start, 3)
    over.set()
    thread.join()
    after = anonymous_bytes(settled=True)
    found[f"{name}_peak_mb"] = round((max(peak, after) - before) / 1e6, 1)
    found[f"{name}_kept_mb"] = round((after - before) / 1e6, 1)


def load(folder: Path, **fields: Any) -> tuple[dict[str, Any], Any]:
    """Load the data of the clips in a folder. Returns what that took, and the `RunData`."""
    from audio_dendrites.recipes import parse_recipe
    from audio_dendrites.training.data import load_data
    from audio_dendrites.training.preflight import preflight
    from audio_dendrites.training.process import prepare_process
    from train import find_growth

    fields = FIELDS | {"dataset": folder / "clips.parquet", "output_dir": folder / "run"} | fields
    recipe = parse_recipe([word for name, value in fields.items() for word in (f"--{name}", str(value))])
    prepare_process(recipe.training)
    found: dict[str, Any] = {}
    recipes = preflight([recipe], find_growth)
    with measured(found, "start"):
        data = load_data(recipes)
    return found, data[recipe.training.output_dir]


def train_steps(folder: Path, count: int) -> tuple[dict[str, Any], Any, Any]:
    """Load the data and make some steps. Returns the trainer, the data, and what was measured.

    `first_step_s` is the time before the end of the first step. `step_ms` is the median of the later ones.
    """
    from transformers import TrainerCallback

    from audio_dendrites.models.loading import load_model
    from audio_dendrites.recipes import write_yaml
    from audio_dendrites.training.checkpoints import find_checkpoint
    from train import make_trainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.times = []

        def on_step_end(self, args, state, control, **_):
            self.times.append(time.process_time())
            control.should_training_stop = len(self.times) > count

    found, data = load(folder)
    write_yaml(data.recipe, folder / "run" / "config.yaml")
    with measured(found, "train"):
        trainer = make_trainer(data, load_model(data.labels, data.recipe.model, data.extractor))
        trainer.add_callback(clock := Clock())
        start = time.process_time()
        trainer.train(resume_from_checkpoint=find_checkpoint(data.recipe.training, data.labels))
    found["first_step_s"] = round(clock.times[0] - start, 3)
    found["step_ms"] = round(1000 * float(np.median(np.diff(clock.times))), 2)
    return found, data, trainer


def stage_cache(folder: Path) -> dict[str, Any]:
    """The first start: the Parquet file becomes a mapped table, and the features are computed."""
    found, data = load(folder)
    files = sum(path.stat().st_size for path in Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow"))
    return found | {"disk_mb": round(files / 1e6, 1), "clips": len(data.index)}


def stage_train(folder: Path) -> dict[str, Any]:
    """A later start, and 60 steps. Leaves a checkpoint whose state says that it is in the middle of the first epoch."""
    found, data, trainer = train_steps(folder, 60)
    trainer._save_checkpoint(trainer.model, None)
    state = next((folder / "run").glob("checkpoint-*")) / "trainer_state.json"
    middle = max(1, len(data.splits["train"]) // FIELDS["per_device_train_batch_size"] // 2)
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": middle}))
    return found


def stage_resume(folder: Path) -> dict[str, Any]:
    """Resume in the middle of an epoch. The time before the first step includes the skipped batches."""
    return train_steps(folder, 10)[0]


def stage_evaluate(folder: Path) -> dict[str, Any]:
    """Evaluate the clips of fold 2, and score them as the end of a run does."""
    from audio_dendrites.models.loading import load_model
    from audio_dendrites.results.scores import predictions_table, score
    from train import make_trainer

    found, data = load(folder, validation_folds="1", train_folds="2")
    trainer = make_trainer(data, load_model(data.labels, data.recipe.model, data.extractor))
    with measured(found, "evaluate"):
        trainer.evaluate()
    output = trainer.predict(data.windows("validation"))
    with measured(found, "metrics"):
        trainer.clip_metrics(output)
    with measured(found, "score"):
        table = predictions_table(data.index.iloc[data.splits["validation"]], output, data.labels)
        score(table, data.labels, data.loss)
    return found | {"clips": len(table), "classes": len(data.labels)}


def stage_compare(folder: Path) -> dict[str, Any]:
    """Compare two sides of three simulated runs that tested the clips of fold 1."""
    import pyarrow.parquet as pq

    from audio_dendrites.results.comparison import write_comparison
    from audio_dendrites.results.scores import score, with_predictions

    clips = pq.read_table(folder / "clips.parquet", columns=["clip", "fold", "group", "label"]).to_pandas()
    clips = clips[clips["fold"] == 1].astype({"fold": str}).assign(group=clips["clip"])
    labels = [f"class {number:03d}" for number in range(MANY)]
    truth = np.array([np.isin(labels, names) for names in clips["label"]])
    sides: dict[str, list[Path]] = {"baseline": [], "dendritic": []}
    for number, side in enumerate(["baseline", "dendritic"] * 3):
        random, path = np.random.default_rng(number), folder / f"{side}-{number}"
        logits = (random.standard_normal(truth.shape) + truth - 3).astype(np.float32)
        table = with_predictions(clips.reset_index(drop=True), logits, labels)
        path.mkdir()
        table.to_parquet(path / "predictions.parquet", index=False)
        facts = {"dataset": "generated", "labels": labels, "parameters": 1, "steps": 1, "train_steps_per_second": 1.0}
        path.joinpath("metrics.json").write_text(json.dumps(facts | {"test": score(table, labels, "bce")}))
        path.joinpath("config.yaml").write_text(f"seed: {number // 2}\nloss: bce\n")
        sides[side].append(path)
    found: dict[str, Any] = {}
    with measured(found, "compare"):
        write_comparison(sides, folder / "comparison")
    side = json.loads((folder / "comparison" / "comparison.json").read_text())["sides"][1]
    return found | {"clips": len(clips), "verdict": side["verdict"]}


STAGES = {"cache": stage_cache, "train": stage_train, "resume": stage_resume}
EVALUATION = {"cache": stage_cache, "evaluate": stage_evaluate, "compare": stage_compare}


def run(stages: list[str], count: int, multi_label: bool, within: str | None) -> None:
    """Run the stages on `count` clips, each in a process of its own, and print what each of them measures."""
    with tempfile.TemporaryDirectory(dir=within) as folder:
        write_clips(Path(folder, "clips.parquet"), count, multi_label)
        environment = os.environ | {"HF_DATASETS_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        for stage in stages:
            command = [sys.executable, __file__, "--stage", stage, "--folder", folder]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            line = json.loads(done.stdout.strip().splitlines()[-1])
            print(json.dumps({"clips": count, "multi_label": multi_label, "stage": stage} | line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--multi_label", action="store_true", help=f"Clips have one or two of {MANY} classes.")
    parser.add_argument("--evaluation", action="store_true", help="Score 20,000 clips instead.")
    parser.add_argument("--folder", help="Where the files are written and removed again. Default: the temporary one.")
    parser.add_argument("--stage", choices=STAGES | EVALUATION, help="Used by the program itself.")
    options = parser.parse_args()
    if options.stage:
        found = (STAGES | EVALUATION)[options.stage](Path(options.folder))
        print(json.dumps(found))
    elif options.evaluation:
        run(list(EVALUATION), 22_000, True, options.folder)
    else:
        for count in options.clips:
            run(list(STAGES), count, options.multi_label, options.folder)


if __name__ == "__main__":
    main()
