"""Runs of train.py as its user starts them: results, resumption, two processes, bad folders."""

import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import ROOT, TINY_AST, tone_of, write_recipe, write_tones
from datasets import Audio, Dataset, load_dataset
from safetensors.torch import load_file, save_file
from sklearn.utils import compute_class_weight
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoFeatureExtractor,
    Trainer,
    TrainingArguments,
    pipeline,
)

import train
from audio_dendrites.data.__main__ import main
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_model
from audio_dendrites.publishing.check import check_pipeline
from audio_dendrites.recipes import ModelArguments, parse_recipe
from audio_dendrites.training.checkpoints import CheckpointError, last_checkpoint
from audio_dendrites.training.losses import balanced_class_weights, classification_loss
from audio_dendrites.training.process import prepare_process

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def run(path, *options):
    train.main(parse_recipe([str(path), *options]))


def save_each(steps: int) -> dict:
    """The fields that save and keep a checkpoint every few steps."""
    fields = {"eval_strategy": "steps", "eval_steps": steps, "save_strategy": "steps", "save_steps": steps}
    return fields | {"save_total_limit": 99}


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of the finished run, in the run folder of `recipe`. It has the checkpoints 4, the best, and 12."""
    return shutil.copytree(finished / "run", tmp_path / "run")


def interrupt(folder: Path) -> None:
    """Turn the copy of the finished run into a run that was interrupted after its first epoch."""
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "checkpoint-12")


def read_rows(clips: Path) -> list[dict]:
    return load_dataset("parquet", data_files=str(clips), split="train").to_list()


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    first, second = read_weights(first), read_weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_the_design_promises(finished):
    folder = finished / "run"
    found = {path.name for path in folder.iterdir() if path.is_file()} - {".lock"}
    assert found == {
        "README.md", "config.json", "config.yaml", "confusion_matrix.png", "learning_curves.png", "metrics.json",
        "model.safetensors", "predictions.parquet", "preprocessor_config.json",
    }  # fmt: skip
    metrics, predictions = read_metrics(folder), pandas.read_parquet(folder / "predictions.parquet")
    assert predictions.columns.tolist() == ["clip", "fold", "group", "label", "predicted", "logits"]
    assert predictions["clip"].tolist() == [f"clip-{row}" for row in range(16, 24)]
    assert predictions["group"].tolist() == [str(row // 2) for row in range(16, 24)]
    assert set(predictions["fold"]) == {"3"} and set(predictions["label"]) == {"high", "low"}
    logits = np.stack(predictions["logits"])
    assert predictions["predicted"].tolist() == [["high", "low"][i] for i in logits.argmax(1)]
    assert metrics["test"]["accuracy"] == (predictions["label"] == predictions["predicted"]).mean()
    assert metrics["steps"] == 12 and metrics["test"]["per_class"]["low"]["clips"] == 4
    assert "| test       | 3     |     8 |" in (finished / "printed.txt").read_text()
    assert list((folder / "tensorboard").glob("events.*"))
    assert "pipeline_tag: audio-classification" in (folder / "README.md").read_text()


def test_the_pipeline_gives_the_scores_of_predictions_parquet(finished):
    """Also after a training in bfloat16."""
    assert read_metrics(finished / "run")["precision"] == "bf16"
    predictions = pandas.read_parquet(finished / "run" / "predictions.parquet")
    classify = pipeline("audio-classification", model=str(finished / "run"))
    assert type(classify.feature_extractor) is ASTFeatureExtractor
    for row, prediction in zip(range(16, 24), predictions.itertuples(), strict=True):
        scores = {answer["label"]: answer["score"] for answer in classify(np.round(tone_of(row) * 32767) / 32768)}
        expected = torch.tensor(prediction.logits).softmax(-1)
        assert max(scores, key=scores.get) == prediction.predicted
        assert abs(scores["high"] - expected[0]) < 1e-4 and abs(scores["low"] - expected[1]) < 1e-4


def test_a_saved_model_with_other_scores_in_pipeline_is_an_error(finished, shared_tones):
    assert "Loaded by pipeline, scores within" in (finished / "printed.txt").read_text()
    clips = load_dataset("parquet", data_files=str(shared_tones), split="train[16:]")
    predictions = pandas.read_parquet(finished / "run" / "predictions.parquet")
    others = predictions.assign(logits=list(np.stack(predictions["logits"]) + [1, 0]))
    with pytest.raises(RuntimeError, match="pipeline's scores are 0"):
        check_pipeline(finished / "run", clips.cast_column("audio", Audio(decode=False)), "audio", others)


def test_final_scores_and_the_check_of_the_pipeline_use_no_tf32(recipe):
    def precisions():
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    def note(module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(precisions())

    seen, before = [], precisions()
    assert before[0] == "tf32"  # PyTorch's default
    with register_module_forward_pre_hook(note):
        run(recipe(num_train_epochs=1, max_length=48))  # long clips have two windows
    assert seen[:6] == [before] * 6  # four steps and an evaluation of two batches
    assert seen[6:] == [("ieee", "ieee")] * len(seen[6:])
    assert len(seen) > 6 + 5 + 1  # five batches of two folds, one to count multiplications, and the pipeline
    assert precisions() == before


def test_the_test_fold_is_scored_with_the_best_checkpoint(finished):
    folder = finished / "run"
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-4")
    saved = ASTForAudioClassification.from_pretrained(folder).state_dict()
    best, last = (read_weights(folder / f"checkpoint-{step}") for step in (4, 12))
    assert [all(torch.equal(saved[name], weights[name]) for name in saved) for weights in (best, last)] == [True, False]


@pytest.mark.parametrize(("trainer", "restored"), [(Trainer, False), (train.AudioTrainer, True)])
def test_the_stock_trainer_loses_the_encoder_and_ours_restores_it(tmp_path, trainer, restored):
    """If the first case fails, transformers has fixed the fault that our Trainer works around."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    model, extractor = ModelArguments(model_config=TINY_AST), BatchedASTFeatureExtractor(max_length=48)
    saved, fresh = (load_model(["high", "low"], model, extractor) for _ in range(2))
    trainer(saved, arguments, processing_class=ASTFeatureExtractor()).save_model(str(tmp_path / "checkpoint"))
    trainer(fresh, arguments)._load_from_checkpoint(str(tmp_path / "checkpoint"))
    query = "audio_spectrogram_transformer.layers.0.attention.q_proj.weight"
    assert torch.equal(saved.state_dict()[query], fresh.state_dict()[query]) == restored


def test_a_checkpoint_without_one_of_the_tensors_is_an_error(recipe, folder):
    interrupt(folder)
    weights = folder / "checkpoint-4" / "model.safetensors"
    tensors = load_file(weights)
    tensors["stranger"] = tensors.pop("classifier.dense.bias")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"lacks \['classifier.dense.bias'\].*\['stranger'\]"):
        run(recipe())


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        (save_each(2) | {"dataloader_num_workers": 1}, (2, 6)),
        (save_each(1) | {"gradient_accumulation_steps": 2}, (1,)),
        (save_each(2) | {"balanced_sampling": True}, (6,)),
    ],
    ids=["worker", "accumulated", "balanced"],
)
def test_a_run_resumed_within_an_epoch_has_the_same_tensors_as_the_whole_one(recipe, tmp_path, fields, steps):
    fields = fields | {
        "num_train_epochs": 2, "patchout_time": 1, "patchout_frequency": 2,
        "model_config": TINY_AST | {"hidden_dropout_prob": 0.1},
    }  # fmt: skip
    run(recipe(**fields))
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    last = f"checkpoint-{read_metrics(whole)['steps']}"
    for step in steps:
        shutil.copytree(whole, tmp_path / "run", ignore=lambda _, names, step=step: [
            name for name in names
            if name == "metrics.json" or name.startswith("checkpoint-") and int(name[11:]) > step
        ])  # fmt: skip
        run(recipe(**fields))
        assert_same_weights(whole, tmp_path / "run")
        assert_same_weights(whole / last, tmp_path / "run" / last)
        shutil.rmtree(tmp_path / "run")


def test_a_killed_run_resumes_and_ends_as_the_uninterrupted_one(recipe, finished, tmp_path, caplog):
    folder, command = tmp_path / "run", [sys.executable, str(ROOT / "train.py"), str(recipe())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-4" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (folder / "metrics.json").exists()
    with caplog.at_level("INFO"):
        run(recipe())
    assert re.search(r"Checkpoint found, resuming from .*checkpoint-\d+", caplog.text)
    assert_same_weights(finished / "run", folder)
    first, second = read_metrics(finished / "run"), read_metrics(folder)
    assert first["test"] == second["test"] and first["steps"] == second["steps"]


def test_early_stopping_counts_on_after_a_resume(recipe, tmp_path):
    fields = {"early_stopping_patience": 2, "num_train_epochs": 9, "learning_rate": 1e-9, "save_total_limit": None}
    run(recipe(**fields))
    assert read_metrics(tmp_path / "run")["steps"] == 12  # the first epoch is the best one
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    run(recipe(**fields))  # from the second epoch, which was no better
    assert read_metrics(tmp_path / "run")["steps"] == 12


def test_metrics_json_has_the_share_of_the_steps_time_that_waited_for_data(recipe, tmp_path, monkeypatch, capsys):
    make_batch = train.SpectrogramCollator.__call__

    def slowly(self, examples):
        time.sleep(0.2 if "draw" in examples[0] else 1)  # an evaluation does not count
        return make_batch(self, examples)

    monkeypatch.setattr(train.SpectrogramCollator, "__call__", slowly)
    run(recipe(num_train_epochs=1))  # four steps of two clips
    found = read_metrics(tmp_path / "run")["throughput"]
    assert found.keys() == {"clips_per_second", "data_wait"}
    assert found["clips_per_second"] < 2 / 0.2 and 0.5 < found["data_wait"] < 1
    shown = re.search(
        r"Training steps: (\S+) clips a second. Of their time, they waited (\S+)%", capsys.readouterr().out
    )
    assert [float(number) for number in shown.groups()] == pytest.approx(
        [found["clips_per_second"], 100 * found["data_wait"]], rel=0.01
    )


def test_a_finished_run_is_shown_and_not_repeated(recipe, finished, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(recipe())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    printed = (finished / "printed.txt").read_text().replace(str(finished), str(folder.parent))
    assert capsys.readouterr().out.strip() == printed[printed.index("| split") :].strip()


def test_a_half_written_checkpoint_is_passed_over(folder, caplog):
    newest = folder / "checkpoint-12"
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        assert last_checkpoint(folder).name == "checkpoint-4"
        assert "checkpoint-12 is passed over" in caplog.text
        caplog.clear()
        (newest / name).write_bytes(content)
    assert last_checkpoint(folder) == newest


def test_a_run_folder_of_another_recipe_is_an_error(recipe, folder, capsys):
    with pytest.raises(UserError, match="learning_rate was 0.003 and is 0.5. Choose another --output_dir"):
        run(recipe(), "--learning_rate", "0.5")
    run(recipe(), "--logging_steps", "7")
    saved = folder / "config.yaml"
    fields = yaml.safe_load(saved.read_text())
    del fields["window_overlap"]  # as an older train.py wrote it
    saved.write_text(yaml.safe_dump(fields))
    run(recipe())
    assert capsys.readouterr().out.count("Run folder") == 2
    with pytest.raises(UserError, match="window_overlap was 0.5 and is 0.25"):
        run(recipe(window_overlap=0.25))
    saved.unlink()
    with pytest.raises(UserError, match="its recipe is unknown, because .*run/config.yaml is missing. Choose another"):
        run(recipe())


def test_a_named_checkpoint_must_exist_and_have_the_classes_of_the_recipe(recipe, finished):
    with pytest.raises(UserError, match="resume_from_checkpoint: nowhere: there is no such folder"):
        run(recipe(), "--resume_from_checkpoint", "nowhere")
    checkpoint = str(finished / "run" / "checkpoint-4")
    with pytest.raises(UserError, match=r"checkpoint-4 was trained on 2 classes \(high, low\), the recipe has 3"):
        run(recipe(labels=["high", "low", "middle"]), "--resume_from_checkpoint", checkpoint)


def test_the_same_clips_in_another_order_give_the_same_model(recipe, finished, tmp_path):
    rows = read_rows(write_tones(tmp_path / "tones.parquet"))
    shuffled = Dataset.from_list([rows[i] for i in np.random.default_rng(0).permutation(len(rows))])
    shuffled.to_parquet(tmp_path / "shuffled.parquet")
    run(recipe(dataset=str(tmp_path / "shuffled.parquet")))
    assert_same_weights(finished / "run", tmp_path / "run")


IN_TWO_PROCESSES = ({"class_weights": "auto", "mean": "auto", "std": "auto"}, {"balanced_sampling": True})
LAUNCHED = """
import logging, sys, train
from audio_dendrites.recipes import parse_recipe
logging.basicConfig(level="INFO")
for path in sys.argv[1:]:
    train.main(parse_recipe([path]))
"""


def to_first_step(folder: Path) -> None:
    """Turn a finished run with a checkpoint at each step into one that was interrupted after its first step."""
    (folder / "metrics.json").unlink()
    for path in folder.glob("checkpoint-*"):
        if path.name != "checkpoint-1":
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, finished):
    """Two processes on the CPU after one launch, which train several recipes and show a finished run.

    Returns:
        The folder with their runs, 0/run and 1/run of IN_TWO_PROCESSES, resumed/run, which is 0/run after a first step
        in one process, and pair/run, and what was printed.
    """
    folder = tmp_path_factory.mktemp("two")
    rows = read_rows(write_tones(folder / "tones.parquet"))
    rows[0]["kind"] = "high"  # then five training clips are high and three are low
    Dataset.from_list(rows).to_parquet(folder / "tones.parquet")
    recipes = {"finished": {"dataset": yaml.safe_load((finished / "run" / "config.yaml").read_text())["dataset"]}}
    # SGD, because Adam turns a rounding error in a gradient near zero into a step of the learning rate's size.
    same = {"num_train_epochs": 2, "precision": "fp32", "mixup_alpha": 0.0, "optim": "sgd", "learning_rate": 0.1}
    same |= {"total_batch_size": 4, "per_device_train_batch_size": 4} | save_each(1)
    recipes |= {str(number): same | fields for number, fields in enumerate(IN_TWO_PROCESSES)}
    recipes["resumed"] = recipes["0"]
    if find_spec("perforatedai"):
        recipes["pair"] = {"baseline": True, "pai": {"first_growth": 0.3}, "load_best_model_at_end": False}
        recipes["pair"] |= {"num_train_epochs": 1}
    for name in recipes:
        (folder / name).mkdir()
    shutil.copytree(finished / "run", folder / "finished" / "run")
    paths = [write_recipe(folder / name, folder / "tones.parquet", **fields) for name, fields in recipes.items()]
    run(folder / "resumed" / "recipe.yaml")
    to_first_step(folder / "resumed" / "run")
    (folder / "program.py").write_text(LAUNCHED)
    config = ["--config_file", ROOT / "configs" / "accelerate" / "two_cpu.yaml", "--main_process_port", "0"]
    done = subprocess.run(
        [*ACCELERATE, *config, folder / "program.py", *paths], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_one_of_two_processes_shows_each_run(two_processes):
    folder, printed = two_processes
    assert [printed.count(f"Run folder: {folder / name / 'run'}\n") for name in ("finished", "0", "1", "resumed")] == [
        1
    ] * 4


def test_two_processes_train_as_one_with_the_same_total_batch(two_processes, tmp_path):
    folder, weights = two_processes[0], []
    for number in range(len(IN_TWO_PROCESSES)):
        run(folder / str(number) / "recipe.yaml", "--output_dir", str(tmp_path / "one"))
        one, two = map(read_weights, (tmp_path / "one", folder / str(number) / "run"))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
        metrics = read_metrics(folder / str(number) / "run")
        assert metrics["processes"] == 2
        tables = [
            pandas.read_parquet(path / "predictions.parquet")
            for path in (tmp_path / "one", folder / str(number) / "run")
        ]
        assert tables[0]["clip"].equals(tables[1]["clip"])
        assert np.allclose(*(np.stack(table["logits"]) for table in tables), atol=1e-5)
        assert 0 <= metrics["throughput"]["data_wait"] < 1 and 0 < metrics["throughput"]["communication_wait"] < 1
        weights.append(one)
        shutil.rmtree(tmp_path / "one")
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in one) > 1e-2  # they did move


def test_a_run_resumed_by_another_number_of_processes_keeps_its_steps(two_processes, tmp_path, caplog):
    folder, printed = two_processes
    whole, resumed = folder / "0" / "run", folder / "resumed" / "run"
    shutil.copytree(whole, fewer := tmp_path / "fewer")
    to_first_step(fewer)
    words = [folder / "0" / "recipe.yaml", "--output_dir", str(fewer)]
    with pytest.raises(UserError, match=r"total_batch_size was 4 and is 2 on 1 processes \(set it to 4 to resume\)"):
        run(*words, "--total_batch_size", "null", "--per_device_train_batch_size", "2")
    with caplog.at_level("INFO"):
        run(*words)
    told = "The number of processes changes from"
    assert f"{told} 1 to 2" in printed and f"{told} 2 to 1" in caplog.text
    weights = [read_weights(one / "checkpoint-4") for one in (whole, resumed, fewer)]
    assert all(float((weights[0][name] - other[name]).abs().max()) < 1e-5 for other in weights[1:] for name in other)
    assert all(read_metrics(one)["steps"] == 4 for one in (whole, resumed, fewer))


KILLED = """
import os, signal, sys, train
from transformers import TrainerCallback

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if args.process_index == 1 and state.global_step == int(sys.argv[1]) and first:
            os.kill(os.getpid(), signal.SIGKILL)

make_trainer = train.make_trainer
def with_killer(data, model):
    trainer = make_trainer(data, model)
    trainer.add_callback(Killer)
    return trainer

train.make_trainer = with_killer
train.run_program(lambda words: train.main(train.parse_recipe(words[1:])))
"""


def test_if_a_process_is_killed_the_other_ends_and_torchrun_restarts_and_resumes(two_processes, tmp_path):
    (program := tmp_path / "program.py").write_text(KILLED)
    recipe = [two_processes[0] / "0" / "recipe.yaml", "--output_dir", tmp_path / "run"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "TORCHELASTIC_RESTART_COUNT": 0}
    processes = []
    for rank in range(2):  # without torchrun, which ends the others on its machine
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": ROOT}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, program, "2", *recipe]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    assert processes[1].wait(90) == -signal.SIGKILL
    processes[1].stderr.close()
    _, told = processes[0].communicate(timeout=20)
    assert processes[0].returncode == 1
    assert "error: process 0 has lost the connection to another process" in told and "Traceback" not in told
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".lock", "checkpoint-1", "config.yaml", "tensorboard"}

    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    done = subprocess.run(
        [sys.executable, *several, program, "3", *recipe], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(f"resuming from {tmp_path / 'run' / f'checkpoint-{step}'}" in done.stderr for step in (1, 2))
    assert_same_weights(two_processes[0] / "0" / "run", tmp_path / "run")


@pytest.mark.skipif(find_spec("perforatedai") is None, reason="perforatedai has no wheel for this Python")
def test_a_recipe_with_a_baseline_ends_with_two_models_and_their_comparison(two_processes, finished_pair):
    assert "dendrites grew; 0 -> 1" in two_processes[1]
    for folder, layers in ((two_processes[0] / "pair", None), (finished_pair, {"classifier.dense": 1})):
        runs = [folder / "run_baseline", folder / "run"]
        kinds = [json.loads((path / "config.json").read_text())["model_type"] for path in runs]
        assert kinds == ["audio-spectrogram-transformer", "dendritic-audio-spectrogram-transformer"]
        plain, grown = map(read_metrics, runs)
        assert plain["steps"] == grown["steps"] and plain["dendrites"] is None
        assert layers in (None, grown["dendrites"]["layers"])
        assert set(grown["dendrites"]["layers"].values()) == {1}
        assert grown["dendrites"]["growth"][0]["event"] == "grown"
        found = json.loads((runs[0] / "comparison.json").read_text())
        assert found["sides"][1]["parameters"] == grown["parameters"] > plain["parameters"]
        assert (runs[1] / "comparison.png").exists()
    for printed in (two_processes[1], (finished_pair / "printed.txt").read_text()):
        assert "points of accuracy" in printed


def test_one_process_instead_of_several_is_a_warning(recipe, tmp_path, monkeypatch, caplog):
    """Here the environment is the one that `accelerate launch` gives a program."""
    program = tmp_path / "program.py"
    program.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 1  # there is one process
    args = parse_recipe([str(recipe())]).training
    for name, value in json.loads(printed[0]).items():
        monkeypatch.setenv(name, value)
    prepare_process(args)
    assert "Several processes were requested, but only one is running." in caplog.text


@pytest.mark.parametrize(
    ("variables", "warns"),
    [
        ({}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        ({"MASTER_ADDR": "127.0.0.1"}, False),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "1"}, False),
    ],
)
def test_the_environment_tells_whether_several_processes_were_requested(recipe, monkeypatch, caplog, variables, warns):
    args = parse_recipe([str(recipe())]).training
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    prepare_process(args)
    assert ("Several processes were requested" in caplog.text) == warns


def test_processes_that_do_not_know_each_other_are_an_error(recipe, monkeypatch):
    args = parse_recipe([str(recipe())]).training
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but each of them sees only itself"):
        prepare_process(args)


def test_bad_input_is_one_line_without_a_traceback(recipe, monkeypatch, caplog):
    caplog.set_level("INFO", "audio_dendrites")  # train.py sets it, and this test resets it
    monkeypatch.setattr(sys, "argv", ["train.py", str(recipe()), "--train_folds", "8"])
    with pytest.raises(SystemExit, match="error: train_folds: no clip in fold 8") as error:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert "\n" not in error.value.code


def test_a_folder_that_cannot_be_written_is_an_error_before_any_training(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: .* cannot be written"):
        run(recipe(), "--output_dir", str(tmp_path / "file" / "run"))


def test_a_disk_too_small_is_an_error_before_any_training(recipe, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(UserError, match="has 0.00 GB left, and the checkpoints need about"):
        run(recipe())


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(recipe, finished, folder):
    """A limit on the size of files stands for the full disk: a write beyond it fails in the same way."""
    interrupt(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(UserError, match="writing to .* it continues from the last checkpoint"):
            run(recipe())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_checkpoint(folder).name == "checkpoint-4"
    assert_same_weights(finished / "run" / "checkpoint-4", folder / "checkpoint-4")


def test_bad_clips_are_skipped_counted_and_listed(recipe, tones, tmp_path, capsys):
    rows = read_rows(tones)
    for row in (0, 1, 2, 3, 17):
        rows[row]["audio"]["bytes"] = rows[row]["audio"]["bytes"][:200]
    Dataset.from_list(rows).to_parquet(tones)
    with pytest.raises(UserError, match="(?s)5 clips cannot be used .*clip-3"):
        run(recipe(dataset=str(tones)))
    run(recipe(dataset=str(tones), on_bad_clip="skip", num_train_epochs=1))
    skipped = read_metrics(tmp_path / "run")["skipped"]
    assert {split: len(reasons) for split, reasons in skipped.items()} == {"train": 4, "test": 1}
    told = "Clips that could not be used and were left out: 4 train, 1 test.\n\n- clip-0: truncated"
    for text in (capsys.readouterr().out, (tmp_path / "run" / "README.md").read_text()):
        assert told in text and "- and 1 more\n- clip-17: truncated" in text and "clip-3" not in text


def test_mean_and_std_are_computed_from_the_training_folds_and_saved_as_numbers(recipe, tmp_path, capsys, caplog):
    path = recipe(
        mean="auto", std="auto", max_steps=2, eval_strategy="no", save_strategy="no", load_best_model_at_end=False
    )
    with caplog.at_level("INFO"):
        run(path)
    assert re.search(r"log-mel of 24 clips was measured in \d+\.\d seconds", caplog.text)
    assert re.search(r"mean -\d+\.\d{4} and std \d\.\d{4} of the log-mel of 8 training clips", caplog.text)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "run").to_dict().items() >= {
        "mean": saved["mean"], "std": saved["std"], "do_normalize": True,
    }.items()  # fmt: skip
    main(["stats", str(path)])
    assert f"\nmean: {saved['mean']:.4f}\nstd: {saved['std']:.4f}\n" in capsys.readouterr().out
    run(path)  # the same recipe, so it has finished
    with pytest.raises(UserError, match="train_folds was"):
        run(path, "--train_folds", "3", "--test_folds", "1", "--std", str(saved["std"]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_accumulated_soft_labels_is_that_of_the_whole_batch(smoothing):
    logits, labels = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    whole = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)

    def loss(rows, labels, entries=None):
        return classification_loss(type("Outputs", (), {"logits": logits[rows]}), labels[rows], entries, smoothing)

    assert torch.allclose(loss(slice(6), labels), whole)
    assert torch.allclose(loss(slice(2), labels, 24) + loss(slice(2, 6), labels, 24), whole)
    hard = labels.argmax(1)
    whole = torch.nn.functional.cross_entropy(logits, hard, label_smoothing=smoothing)
    assert torch.allclose(loss(slice(2), hard, 6) + loss(slice(2, 6), hard, 6), whole)


def test_class_weights_are_scikit_learns_and_exact_over_micro_batches():
    targets, names = np.array([0, 0, 0, 1, 1, 2]), ["a", "b", "c"]
    weights = balanced_class_weights(targets, names)
    assert np.allclose(weights, compute_class_weight("balanced", classes=np.arange(3), y=targets))
    several = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])  # the same six labels
    assert np.allclose(balanced_class_weights(several, names), weights)
    with pytest.raises(UserError, match="class_weights: no training clip has the label 'd'"):
        balanced_class_weights(targets, [*names, "d"])

    weights, logits, numbers = torch.tensor(weights).float(), torch.randn(6, 3), torch.tensor(targets)
    soft, hard = torch.rand(6, 3), torch.eye(3)[numbers]
    log_p, log_not_p = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    for loss, labels, expected in (
        ("cross_entropy", numbers, -(hard * weights * logits.log_softmax(1)).sum() / 6),
        ("cross_entropy", soft, -(soft * weights * logits.log_softmax(1)).sum() / 6),
        ("bce", numbers, -(weights * (hard * log_p + (1 - hard) * log_not_p)).mean()),
        ("bce", soft, -(weights * (soft * log_p + (1 - soft) * log_not_p)).mean()),
    ):
        parts = [
            classification_loss(
                SimpleNamespace(logits=logits[rows]), labels[rows], labels.numel(), loss=loss, class_weights=weights
            )
            for rows in (slice(2), slice(2, 6))
        ]
        assert torch.allclose(sum(parts), expected)


@pytest.mark.parametrize("label_column", ["kind", "kinds"])
def test_class_weights_reach_the_loss_and_metrics_json(recipe, chords, tmp_path, label_column, monkeypatch):
    given = []
    monkeypatch.setattr(
        "audio_dendrites.training.trainer.classification_loss",
        lambda *args, **settings: given.append(settings["class_weights"]) or classification_loss(*args, **settings),
    )
    path = recipe(
        dataset=str(chords), label_column=label_column, metric_for_best_model="mAP", class_weights="auto", max_steps=1
    )
    run(path)
    metrics = read_metrics(tmp_path / "run")
    train = load_dataset("parquet", data_files=str(chords), split="train[:8]")
    counts = Counter(chain(*train["kinds"]) if label_column == "kinds" else train["kind"])
    assert metrics["class_weights"] == {name: counts.total() / 2 / counts[name] for name in ("high", "low")}
    assert given[0].tolist() == pytest.approx(list(metrics["class_weights"].values()))
    assert "| class_weights | auto |" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(UserError, match="class_weights must be left out with balanced_sampling: true"):
        run(path, "--balanced_sampling", "true")


def test_learning_rates_reach_the_optimizer(recipe, tmp_path):
    rates = {"learning_rate": 1e-3, "head_learning_rate": 1e-2, "layer_decay": 0.5, "lr_scheduler_type": "constant"}
    run(recipe(**rates, num_train_epochs=1))
    groups = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")["param_groups"]
    assert {round(group["lr"], 8) for group in groups} == {1e-2, 1e-3, 5e-4, 2.5e-4, 1.25e-4}
    model = ASTForAudioClassification.from_pretrained(tmp_path / "run")
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "run").max_length == 80


def test_frozen_layers_do_not_move(recipe, tmp_path):
    run(recipe(**save_each(1), max_steps=2, unfreeze_last_layers=1))
    first, last = (read_weights(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    encoder = "audio_spectrogram_transformer"
    assert moved
    assert all(name.startswith(("classifier", f"{encoder}.layernorm", f"{encoder}.layers.1")) for name in moved)
