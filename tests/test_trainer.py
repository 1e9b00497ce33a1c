"""Runs of train.py as its user starts them: results, resumption, two processes, bad folders."""

import json
import re
import shutil
import signal
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
from conftest import ROOT, TINY_AST, TONES, tone
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

RECIPE = TONES | {
    "max_length": 48,
    "model_config": TINY_AST,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "preprocessing_num_workers": 1,
    "time_roll": 5,
    "time_mask": 8,
    "mixup_alpha": 0.5,
    "logging_steps": 1,
}


@pytest.fixture
def recipe(tones, tmp_path):
    """Writes a recipe for `tones`; gives its path."""

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(RECIPE | {"dataset": str(tones), "output_dir": str(tmp_path / "run")} | changes))
        return path

    return write


def run(path, *options):
    train.main(parse_recipe([str(path), *options]))


def command(path, *options):
    return [sys.executable, str(ROOT / "train.py"), str(path), *options]


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_the_design_promises(recipe, tmp_path, capsys):
    run(recipe())
    folder = tmp_path / "run"
    found = {path.name for path in folder.iterdir() if path.is_file()} - {".lock"}
    assert found == {
        "README.md", "config.json", "config.yaml", "confusion_matrix.png", "learning_curves.png", "metrics.json",
        "model.safetensors", "predictions.parquet", "preprocessor_config.json",
    }  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = pandas.read_parquet(folder / "predictions.parquet")
    assert predictions.columns.tolist() == ["clip", "fold", "group", "label", "predicted", "logits"]
    assert predictions["clip"].tolist() == [f"clip-{row}" for row in range(16, 24)]
    assert predictions["group"].tolist() == [str(row // 2) for row in range(16, 24)]
    assert set(predictions["fold"]) == {"3"} and set(predictions["label"]) == {"high", "low"}
    logits = np.stack(predictions["logits"])
    assert predictions["predicted"].tolist() == [["high", "low"][i] for i in logits.argmax(1)]
    assert metrics["test"]["accuracy"] == (predictions["label"] == predictions["predicted"]).mean()
    assert metrics["steps"] == 12 and metrics["test"]["per_class"]["low"]["clips"] == 4
    assert "| test       | 3     |     8 |" in capsys.readouterr().out
    assert list((folder / "tensorboard").glob("events.*"))
    assert "pipeline_tag: audio-classification" in (folder / "README.md").read_text()


def test_the_pipeline_gives_the_scores_of_predictions_parquet(recipe, tmp_path):
    run(recipe(precision="bf16", num_train_epochs=8, max_length=80))  # which all clips fit into
    predictions = pandas.read_parquet(tmp_path / "run" / "predictions.parquet")
    classify = pipeline("audio-classification", model=str(tmp_path / "run"))
    assert type(classify.feature_extractor) is ASTFeatureExtractor
    for row, prediction in zip(range(16, 24), predictions.itertuples(), strict=True):
        waveform = tone(3000 if row % 2 else 300, 0.3 + 0.02 * row, seed=row)
        scores = {answer["label"]: answer["score"] for answer in classify(np.round(waveform * 32767) / 32768)}
        expected = torch.tensor(prediction.logits).softmax(-1)
        assert max(scores, key=scores.get) == prediction.predicted
        assert abs(scores["high"] - expected[0]) < 1e-4 and abs(scores["low"] - expected[1]) < 1e-4


def test_the_saved_model_is_loaded_by_pipeline_and_must_say_the_same(recipe, tmp_path, tones, capsys):
    run(recipe(num_train_epochs=1))
    assert "Loaded by pipeline, scores within" in capsys.readouterr().out
    clips = load_dataset("parquet", data_files=str(tones), split="train[16:]").cast_column("audio", Audio(decode=False))
    predictions = pandas.read_parquet(tmp_path / "run" / "predictions.parquet")
    others = predictions.assign(logits=list(np.stack(predictions["logits"]) + [1, 0]))
    with pytest.raises(RuntimeError, match="pipeline's scores are 0"):
        check_pipeline(tmp_path / "run", clips, "audio", others)


def test_final_scores_and_the_check_of_the_pipeline_use_no_tf32(recipe):
    def precisions():
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    def note(module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            seen.append(precisions())

    seen, before = [], precisions()
    assert before[0] == "tf32"  # PyTorch's default
    with register_module_forward_pre_hook(note):
        run(recipe(num_train_epochs=1))
    assert seen[:6] == [before] * 6  # four steps and an evaluation of two batches
    assert seen[6:] == [("ieee", "ieee")] * len(seen[6:])
    assert len(seen) > 6 + 5 + 8  # five batches of two folds, and eight clips in the pipeline
    assert precisions() == before


PAI = {"first_growth": 0.3}


@pytest.mark.skipif(find_spec("perforatedai") is None, reason="perforatedai has no wheel for this Python")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_recipe_with_a_baseline_ends_with_two_models_and_their_comparison(recipe, tmp_path, processes):
    path = recipe(baseline=True, pai=PAI, load_best_model_at_end=False)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    done = subprocess.run(
        [sys.executable, *launcher, *command(path)[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "dendrites grew; 0 -> 1" in done.stdout + done.stderr and "points of accuracy" in done.stdout
    kinds = [
        json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in ("run_baseline", "run")
    ]
    assert kinds == ["audio-spectrogram-transformer", "dendritic-audio-spectrogram-transformer"]
    plain, grown = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("run_baseline", "run"))
    assert plain["steps"] == grown["steps"] and plain["dendrites"] is None
    assert set(grown["dendrites"]["layers"].values()) == {1} and grown["dendrites"]["growth"][0]["event"] == "grown"
    found = json.loads((tmp_path / "run_baseline" / "comparison.json").read_text())
    assert found["sides"][1]["parameters"] == grown["parameters"] > plain["parameters"]
    assert (tmp_path / "run" / "comparison.png").exists()


def test_the_test_fold_is_scored_with_the_best_checkpoint(recipe, tmp_path):
    run(recipe(num_train_epochs=6, metric_for_best_model="loss", learning_rate=3e-3))
    state = json.loads(
        (
            max((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name[11:])) / "trainer_state.json"
        ).read_text()
    )
    best = Path(state["best_model_checkpoint"])
    saved = ASTForAudioClassification.from_pretrained(tmp_path / "run").state_dict()
    assert_same_tensors(saved, load_file(best / "model.safetensors"))


@pytest.mark.parametrize(("trainer", "restored"), [(Trainer, False), (train.AudioTrainer, True)])
def test_the_stock_trainer_loses_the_encoder_and_ours_restores_it(tmp_path, trainer, restored):
    """Where the first case fails, transformers has mended the fault that ours works around."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    model, extractor = ModelArguments(model_config=TINY_AST), BatchedASTFeatureExtractor(max_length=48)
    saved, fresh = (load_model(["high", "low"], model, extractor) for _ in range(2))
    trainer(saved, arguments, processing_class=ASTFeatureExtractor()).save_model(str(tmp_path / "checkpoint"))
    trainer(fresh, arguments)._load_from_checkpoint(str(tmp_path / "checkpoint"))
    query = "audio_spectrogram_transformer.layers.0.attention.q_proj.weight"
    assert torch.equal(saved.state_dict()[query], fresh.state_dict()[query]) == restored


def test_a_checkpoint_that_lacks_a_tensor_is_an_error(recipe, tmp_path):
    run(recipe(num_train_epochs=1))
    (tmp_path / "run" / "metrics.json").unlink()
    weights = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    tensors = load_file(weights)
    tensors["stranger"] = tensors.pop("classifier.dense.bias")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"lacks \['classifier.dense.bias'\].*\['stranger'\]"):
        run(recipe(num_train_epochs=1))


@pytest.mark.parametrize(("accumulation", "balanced"), [(1, False), (2, False), (1, True)])
def test_resume_in_the_middle_of_an_epoch_is_tensor_identical(recipe, tmp_path, accumulation, balanced):
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 99,
        "num_train_epochs": 2, "gradient_accumulation_steps": accumulation, "dataloader_num_workers": 1,
        "balanced_sampling": balanced,
        "model_config": TINY_AST | {"hidden_dropout_prob": 0.1}, "patchout_time": 1, "patchout_frequency": 2,
    }  # fmt: skip
    run(recipe(**options))
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    last = 8 // accumulation
    for step in (5, 6) if balanced else range(1, last):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(whole, tmp_path / "run", ignore=lambda _, names, step=step: [
            name for name in names
            if name == "metrics.json" or name.startswith("checkpoint-") and int(name[11:]) > step
        ])  # fmt: skip
        run(recipe(**options))
        for name in ("model.safetensors", f"checkpoint-{last}/model.safetensors"):
            assert_same_tensors(load_file(whole / name), load_file(tmp_path / "run" / name))


def test_a_killed_run_resumes_and_ends_as_the_uninterrupted_one(recipe, tmp_path):
    options = ("--num_train_epochs", "6", "--output_dir")
    path = recipe()
    run(path, *options, str(tmp_path / "whole"))
    process = subprocess.Popen(
        command(path, *options, str(tmp_path / "run")), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint-8" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "metrics.json").exists()
    again = subprocess.run(command(path, *options, str(tmp_path / "run")), capture_output=True, text=True, check=True)
    assert re.search(r"Checkpoint found, resuming from .*checkpoint-\d+", again.stderr)
    assert_same_tensors(
        load_file(tmp_path / "whole" / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    )
    whole, run_ = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "run"))
    assert whole["test"] == run_["test"] and whole["steps"] == run_["steps"]


def test_early_stopping_counts_on_after_a_resume(recipe, tmp_path):
    options = {"early_stopping_patience": 2, "num_train_epochs": 9, "learning_rate": 1e-9, "save_total_limit": None}
    run(recipe(**options))
    steps = json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"]
    assert steps == 12  # the first epoch is the best, two more are waited for
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    run(recipe(**options))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == steps


def test_a_finished_run_is_shown_not_repeated(recipe, tmp_path, capsys):
    run(recipe(num_train_epochs=1))
    shown = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    run(recipe(num_train_epochs=1))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert capsys.readouterr().out.strip() == shown[shown.index("| split") :].strip()


def test_a_half_written_checkpoint_is_passed_over(recipe, tmp_path, caplog):
    run(recipe(num_train_epochs=2))
    newest = tmp_path / "run" / "checkpoint-8"
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
        assert "checkpoint-8 is passed over" in caplog.text
        (newest / name).write_bytes(content)
    assert last_checkpoint(tmp_path / "run") == newest


def test_checkpoints_of_another_recipe_are_not_gone_on_from(recipe, tmp_path):
    run(recipe(num_train_epochs=1))
    with pytest.raises(UserError, match="learning_rate was 0.001 and is 0.5. Choose another --output_dir"):
        run(recipe(num_train_epochs=1), "--learning_rate", "0.5")
    run(recipe(num_train_epochs=1), "--logging_steps", "7")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match="its recipe is unknown, because .*run/config.yaml is missing. Choose another"):
        run(recipe(num_train_epochs=1))


def test_a_checkpoint_that_does_not_exist_is_said(recipe):
    with pytest.raises(UserError, match="resume_from_checkpoint: nowhere: there is no such folder"):
        run(recipe(num_train_epochs=1), "--resume_from_checkpoint", "nowhere")


def test_a_checkpoint_of_another_class_count_is_an_error(recipe, tmp_path):
    run(recipe(num_train_epochs=1))
    with pytest.raises(
        UserError,
        match=r"resume_from_checkpoint: .*checkpoint-4 was trained on 2 classes \(high, low\), the recipe has 3",
    ):
        run(
            recipe(num_train_epochs=2),
            "--labels",
            "high",
            "low",
            "middle",
            "--resume_from_checkpoint",
            str(tmp_path / "run" / "checkpoint-4"),
        )


def test_the_same_clips_in_another_order_give_the_same_model(recipe, tones, tmp_path):
    run(recipe(num_train_epochs=1))
    rows = load_dataset("parquet", data_files=str(tones), split="train").to_list()
    Dataset.from_list([rows[i] for i in np.random.default_rng(0).permutation(len(rows))]).to_parquet(tones)
    run(recipe(num_train_epochs=1), "--output_dir", str(tmp_path / "shuffled"))
    first, second = (tmp_path / name / "model.safetensors" for name in ("run", "shuffled"))
    assert_same_tensors(load_file(first), load_file(second))


@pytest.mark.parametrize(
    "fields", [{"class_weights": "auto", "mean": "auto", "std": "auto"}, {"balanced_sampling": True}], ids=str
)
def test_two_processes_train_as_one_with_the_same_total_batch(recipe, tones, tmp_path, fields):
    rows = load_dataset("parquet", data_files=str(tones), split="train").to_list()
    rows[0]["kind"] = "high"  # five clips of it, and three of low
    Dataset.from_list(rows).to_parquet(tones)
    # SGD, because Adam turns a rounding error in a gradient near zero into a step of the learning rate's size.
    path = recipe(
        num_train_epochs=2, mixup_alpha=0.0, optim="sgd", learning_rate=0.1, total_batch_size=4,
        per_device_train_batch_size=4, **fields,
    )  # fmt: skip
    run(path, "--output_dir", str(tmp_path / "one"))
    run(path, "--learning_rate", "0", "--output_dir", str(tmp_path / "start"))
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command(path)[1:]]
    done = subprocess.run([*two, "--output_dir", str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-2  # they did move
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["test"]["clips"] == 8


def test_one_process_instead_of_several_is_a_warning(recipe):
    launch = [shutil.which("accelerate", path=Path(sys.executable).parent), "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "train.py"), str(recipe()), "--max_steps", "1", "--eval_strategy", "no",
         "--save_strategy", "no", "--load_best_model_at_end", "false"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Several processes were requested, but only one is running." in done.stderr


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
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    prepare_process(args)
    assert ("Several processes were requested" in caplog.text) == warns


def test_processes_that_do_not_know_each_other_are_an_error(recipe, monkeypatch):
    args = parse_recipe([str(recipe())]).training
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but each of them sees only itself"):
        prepare_process(args)


def test_one_of_two_processes_shows_a_finished_run(recipe):
    path = recipe(num_train_epochs=1)
    run(path)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command(path)[1:]]
    done = subprocess.run(two, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder") == 1


def test_bad_input_is_one_line_without_a_traceback(recipe):
    done = subprocess.run(command(recipe(), "--train_folds", "8"), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: train_folds: no clip in fold 8")


def test_a_folder_that_cannot_be_written_is_an_error_before_any_training(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: .* cannot be written"):
        run(recipe(), "--output_dir", str(tmp_path / "file" / "run"))


def test_a_disk_too_small_is_an_error_before_any_training(recipe, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4096))
    with pytest.raises(UserError, match="has 0.00 GB left, and the checkpoints need about"):
        run(recipe())


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(recipe, tmp_path):
    """A file-size limit stands for the full disk: writing beyond it fails as on one."""
    limit = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv = sys.argv[1:]; "
    limit += f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    run(recipe(num_train_epochs=1))
    before = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", limit, "train.py", str(recipe(num_train_epochs=2)), "--resume_from_checkpoint",
         str(tmp_path / "run" / "checkpoint-4")], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: writing to" in done.stderr and "it continues from the last checkpoint" in done.stderr
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    assert_same_tensors(before, load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors"))


def test_bad_clips_are_skipped_counted_and_listed(recipe, tones, tmp_path, capsys):
    rows = load_dataset("parquet", data_files=str(tones), split="train").to_list()
    for row in (0, 1, 2, 3, 17):
        rows[row]["audio"]["bytes"] = rows[row]["audio"]["bytes"][:200]
    Dataset.from_list(rows).to_parquet(tones)
    with pytest.raises(UserError, match="(?s)5 clips cannot be used .*clip-3"):
        run(recipe())
    run(recipe(on_bad_clip="skip", num_train_epochs=1))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {split: len(reasons) for split, reasons in metrics["skipped"].items()} == {"train": 4, "test": 1}
    told = "Clips that could not be used and were left out: 4 train, 1 test.\n\n- clip-0: truncated"
    for text in (capsys.readouterr().out, (tmp_path / "run" / "README.md").read_text()):
        assert told in text and "- and 1 more\n- clip-17: truncated" in text and "clip-3" not in text


def test_mean_and_std_are_computed_from_the_training_folds_and_saved_as_numbers(recipe, tmp_path, capsys, caplog):
    path = recipe(mean="auto", std="auto", max_steps=2, eval_strategy="no", save_strategy="no",
                  load_best_model_at_end=False)  # fmt: skip
    with caplog.at_level("INFO"):
        run(path)
    assert re.search(r"log-mel of 24 clips was measured in \d+\.\d seconds", caplog.text)
    assert re.search(r"mean -\d+\.\d{4} and std \d\.\d{4} of the log-mel of 8 training clips", caplog.text)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "run").to_dict().items() >= {
        "mean": saved["mean"], "std": saved["std"], "do_normalize": True,
    }.items()  # fmt: skip
    main(["stats", str(path)])
    assert capsys.readouterr().out.endswith(f"mean: {saved['mean']:.4f}\nstd: {saved['std']:.4f}\n")
    run(path)  # is the same recipe, so that it has finished
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
    for loss, labels, wanted in (
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
        assert torch.allclose(sum(parts), wanted)


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
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    train = load_dataset("parquet", data_files=str(chords), split="train[:8]")
    counts = Counter(chain(*train["kinds"]) if label_column == "kinds" else train["kind"])
    assert metrics["class_weights"] == {name: counts.total() / 2 / counts[name] for name in ("high", "low")}
    assert given[0].tolist() == pytest.approx(list(metrics["class_weights"].values()))
    assert "| class_weights | auto |" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(UserError, match="class_weights must be left out with balanced_sampling: true"):
        run(path, "--balanced_sampling", "true")


def test_learning_rates_reach_the_optimizer(recipe, tmp_path):
    run(
        recipe(
            num_train_epochs=1,
            head_learning_rate=1e-2,
            layer_decay=0.5,
            lr_scheduler_type="constant",
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
        )
    )
    groups = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")["param_groups"]
    assert {round(group["lr"], 8) for group in groups} == {1e-2, 1e-3, 5e-4, 2.5e-4, 1.25e-4}
    trained = sum(len(group["params"]) for group in groups)
    model = ASTForAudioClassification.from_pretrained(tmp_path / "run")
    assert (
        trained == len(list(model.parameters()))
        and AutoFeatureExtractor.from_pretrained(tmp_path / "run").max_length == 48
    )


def test_frozen_layers_do_not_move(recipe, tmp_path):
    run(
        recipe(
            num_train_epochs=1,
            unfreeze_last_layers=1,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_total_limit=None,
        )
    )
    first, last = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (1, 4))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved and all(
        name.startswith(
            ("classifier", "audio_spectrogram_transformer.layernorm", "audio_spectrogram_transformer.layers.1")
        )
        for name in moved
    )


def test_a_run_of_an_older_train_goes_on_where_the_recipe_is_the_same(recipe, tmp_path, capsys):
    run(recipe(num_train_epochs=1))
    saved = tmp_path / "run" / "config.yaml"
    fields = yaml.safe_load(saved.read_text())
    saved.write_text(yaml.safe_dump({name: value for name, value in fields.items() if name != "window_overlap"}))
    capsys.readouterr()
    run(recipe(num_train_epochs=1))
    assert "Run folder" in capsys.readouterr().out
    with pytest.raises(UserError, match="window_overlap was 0.5 and is 0.25"):
        run(recipe(num_train_epochs=1, window_overlap=0.25))
