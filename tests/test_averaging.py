"""Averages of weights against those made by hand from the checkpoints, in runs of train.py."""

import json
import shutil

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import TINY_AST, TONES, tone
from safetensors.torch import load_file, save_file
from transformers import ASTForAudioClassification, pipeline

import train
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import parse_recipe
from audio_dendrites.training.averaging import EMA_FILE, average_weights

RECIPE = TONES | {  # two epochs of two steps
    "max_length": 80, "model_config": TINY_AST | {"num_hidden_layers": 1}, "per_device_train_batch_size": 4,
    "num_train_epochs": 2, "learning_rate": 1e-2, "precision": "fp32", "preprocessing_num_workers": 1,
    "mixup_alpha": 0.5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "save_total_limit": 99, "report_to": ["none"],
}  # fmt: skip


@pytest.fixture
def run(tones, tmp_path):
    """Trains `tones` with changes to RECIPE; gives the run folder."""

    def train_it(name="run", **changes):
        folder = tmp_path / name
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(RECIPE | {"dataset": str(tones), "output_dir": str(folder)} | changes))
        train.main(parse_recipe([str(path)]))
        return folder

    return train_it


def checkpoint(folder, step, name="model.safetensors"):
    return load_file(folder / f"checkpoint-{step}" / name)


def final_weights(folder):
    return ASTForAudioClassification.from_pretrained(folder).state_dict()


def assert_close(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= tolerance


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_mean_is_taken_in_float64_and_the_rest_from_the_last(tmp_path):
    values = [1.0, 2.0**-24, 2.0**-24]  # in float32 the small ones would vanish one after the other
    for number, value in enumerate(values):
        (tmp_path / str(number)).mkdir()
        tensors = {"weight": torch.tensor([value, number]), "half": torch.tensor([number], dtype=torch.bfloat16)}
        save_file(tensors | {"counter": torch.tensor([number])}, tmp_path / str(number) / "model.safetensors")
    mean = average_weights([tmp_path / str(number) for number in range(3)])
    assert mean["weight"].dtype == torch.float32 and mean["weight"].tolist() == [np.float32(sum(values) / 3), 1.0]
    assert mean["half"].dtype == torch.bfloat16 and mean["half"].item() == 1.0
    assert mean["counter"].item() == 2
    save_file({"weight": torch.ones(3), "counter": torch.ones(1)}, tmp_path / "0" / "model.safetensors")
    with pytest.raises(UserError, match="0 and .*2 must have the same tensors, got differences in half, weight"):
        average_weights([tmp_path / "0", tmp_path / "2"])


def test_a_run_ends_with_the_mean_of_its_last_checkpoints_also_if_it_was_killed_before(run):
    fields = {"average_checkpoints": 3, "save_total_limit": 4}  # just enough of them
    folder = run(**fields)
    steps = [2, 3, 4]
    states = [checkpoint(folder, step) for step in steps]
    expected = {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}
    assert_close(final_weights(folder), expected)
    assert metrics_of(folder)["averaged_steps"] == steps and not (folder / ".average").exists()
    assert not torch.equal(states[0]["classifier.dense.weight"], states[2]["classifier.dense.weight"])
    # The scores are those of the average.
    prediction = pandas.read_parquet(folder / "predictions.parquet").iloc[0]
    waveform = np.round(tone(300, 0.3 + 0.02 * 16, seed=16) * 32767) / 32768
    scores = {one["label"]: one["score"] for one in pipeline("audio-classification", model=str(folder))(waveform)}
    assert prediction["clip"] == "clip-16"
    assert abs(scores["high"] - torch.tensor(prediction["logits"]).softmax(-1)[0]) < 1e-5
    (folder / "metrics.json").unlink()
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / ".average").mkdir()
    assert_close(final_weights(run(**fields)), expected)


def test_fewer_checkpoints_than_asked_for_are_a_warning(run, caplog):
    folder = run(average_checkpoints=3, save_strategy="epoch", eval_strategy="epoch")
    assert "average_checkpoints: 3 requested, 2 saved." in caplog.text
    assert metrics_of(folder)["averaged_steps"] == [2, 4]


def test_a_model_that_grows_is_averaged_since_its_last_growth(run, caplog):
    pytest.importorskip("perforatedai")
    pai = {"modules": ["classifier.dense"], "max_dendrites": 1, "schedule": "fixed", "interval": 2}
    folder = run(average_checkpoints=4, pai=pai)
    state = json.loads((folder / "checkpoint-4" / "pai_state.json").read_text())
    growth = max(entry["step"] for entry in state["history"] if entry["event"])
    assert 0 < growth < 3
    steps = list(range(growth + 1, 5))
    assert metrics_of(folder)["averaged_steps"] == steps
    assert f"4 requested, {len(steps)} saved since the last growth (step {growth})" in caplog.text
    exported = load_file(folder / "model.safetensors")
    states = [checkpoint(folder, step) for step in steps]
    norm = "audio_spectrogram_transformer.layernorm.weight"
    expected = torch.stack([state[norm].double() for state in states]).mean(0).float()
    assert torch.equal(exported[norm], expected)
    classes, width = 2, TINY_AST["hidden_size"]
    assert exported["classifier.dense.weight"].shape == (2 * classes, width)  # the neuron's rows and one dendrite's
    neuron = torch.stack([state["classifier.dense.main_module.weight"].double() for state in states]).mean(0).float()
    assert torch.equal(exported["classifier.dense.weight"][:classes], neuron)


def average_of(folder, step):
    kept = checkpoint(folder, step, EMA_FILE)
    assert kept.pop("n_averaged") == step
    return {name.removeprefix("module."): tensor for name, tensor in kept.items()}


def last_loss(folder):
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry)


def test_evaluation_sees_the_moving_average_of_all_steps_and_the_training_does_not(run):
    fields = {"validation_folds": ["3"], "test_folds": ["3"], "load_best_model_at_end": False}
    plain, averaged = run("plain", **fields), run("averaged", ema_decay=0.6, **fields)
    mean = checkpoint(plain, 1)
    for step in range(1, 5):
        state = checkpoint(plain, step)
        assert_close(checkpoint(averaged, step), state)
        mean = {name: mean[name] + 0.4 * (state[name] - mean[name]) for name in mean}
        assert_close(average_of(averaged, step), mean, 1e-6)
    assert_close(final_weights(averaged), mean, 1e-6)
    assert float((mean["classifier.dense.weight"] - state["classifier.dense.weight"]).abs().max()) > 1e-4

    predictions = pandas.read_parquet(averaged / "predictions.parquet")
    labels = torch.tensor([metrics_of(averaged)["labels"].index(label) for label in predictions["label"]])
    loss = float(torch.nn.functional.cross_entropy(torch.tensor(np.stack(predictions["logits"])), labels))
    assert abs(last_loss(averaged) - loss) < 1e-3 < abs(last_loss(plain) - loss)


def test_the_best_moving_average_is_kept_and_continues_exactly_after_a_resume(run):
    fields = {"ema_decay": 0.6, "metric_for_best_model": "loss", "learning_rate": 0.1}
    folder = run(**fields)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    whole, last = final_weights(folder), average_of(folder, 4)
    assert_close(whole, average_of(folder, state["best_global_step"]))
    (folder / "metrics.json").unlink()
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run(**fields)
    assert_close(final_weights(folder), whole)
    assert_close(average_of(folder, 4), last)
    (folder / "checkpoint-2" / EMA_FILE).unlink()
    with pytest.raises(UserError, match="checkpoint-2 must have ema.safetensors, but it is from a training without"):
        run("other", ema_decay=0.6, resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_statistics_of_a_batch_normalisation_are_averaged_with_its_weights(run):
    cnn14 = {"architecture": "cnn14", "model_config": {"first_channels": 2, "num_hidden_layers": 2}}
    folder = run(ema_decay=0.6, load_best_model_at_end=False, **cnn14)
    name = "layers.0.bn1.running_var"
    mean = checkpoint(folder, 1)[name]
    for step in range(2, 5):
        mean = mean + 0.4 * (checkpoint(folder, step)[name] - mean)
    found = load_file(folder / "model.safetensors")[name]
    assert torch.allclose(found, mean, atol=1e-6)
    assert not torch.allclose(found, checkpoint(folder, 4)[name], atol=1e-3)
