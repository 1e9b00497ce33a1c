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

RECIPE = TONES | {
    "max_length": 80,
    "model_config": TINY_AST | {"num_hidden_layers": 1},
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,  # of 2 steps
    "learning_rate": 1e-2,
    "precision": "fp32",
    "preprocessing_num_workers": 1,
    "mixup_alpha": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 99,
    "report_to": ["none"],
}


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


def test_a_run_ends_with_the_mean_of_its_last_checkpoints(run, caplog):
    folder = run(average_checkpoints=3)
    steps = [2, 3, 4]
    states = [checkpoint(folder, step) for step in steps]
    expected = {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}
    assert_close(final_weights(folder), expected)
    assert metrics_of(folder)["averaged_steps"] == steps
    assert not (folder / ".average").exists()
    assert not torch.equal(states[0]["classifier.dense.weight"], states[2]["classifier.dense.weight"])
    # The scores are those of the average.
    prediction = pandas.read_parquet(folder / "predictions.parquet").iloc[0]
    classify = pipeline("audio-classification", model=str(folder))
    waveform = np.round(tone(300, 0.3 + 0.02 * 16, seed=16) * 32767) / 32768
    scores = {answer["label"]: answer["score"] for answer in classify(waveform)}
    assert prediction["clip"] == "clip-16"
    assert abs(scores["high"] - torch.tensor(prediction["logits"]).softmax(-1)[0]) < 1e-5


def test_a_run_killed_before_its_average_ends_with_the_same(run):
    whole = final_weights(run(average_checkpoints=3))
    folder = run(average_checkpoints=3)  # shown, not repeated
    (folder / "metrics.json").unlink()
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / ".average").mkdir()
    assert_close(final_weights(run(average_checkpoints=3)), whole)


def test_fewer_checkpoints_than_asked_for_are_said(run, caplog):
    folder = run(average_checkpoints=3, save_strategy="epoch", eval_strategy="epoch")
    assert "average_checkpoints: 3 requested, 2 saved." in caplog.text
    assert metrics_of(folder)["averaged_steps"] == [2, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"average_checkpoints": 1}, r"average_checkpoints must be in \[2, inf\), got 1"),
        (
            {"average_checkpoints": 3, "save_total_limit": 3},
            "save_total_limit must be at least 4 with average_checkpoints: 3, got 3",
        ),
        (
            {"average_checkpoints": 2, "save_strategy": "no", "load_best_model_at_end": False},
            "save_strategy must be epoch or steps",
        ),
        ({"average_checkpoints": 2, "ema_decay": 0.9}, "average_checkpoints and ema_decay must not both be set"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\), got 1.0"),
        ({"ema_decay": 0.9, "pai": {"max_dendrites": 1}}, "ema_decay must not be set together with pai"),
    ],
)
def test_what_cannot_be_averaged_is_an_error_before_any_data_is_read(run, fields, message):
    with pytest.raises(UserError, match=message):
        run(dataset="nowhere", **fields)


def test_just_enough_checkpoints_are_kept(run):
    folder = run(average_checkpoints=3, save_total_limit=4)
    assert metrics_of(folder)["averaged_steps"] == [2, 3, 4]


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


def test_the_moving_average_is_that_of_all_steps_and_leaves_the_training_alone(run):
    plain, averaged = run("plain"), run("averaged", ema_decay=0.6, load_best_model_at_end=False)
    mean = checkpoint(plain, 1)
    for step in range(1, 5):
        state = checkpoint(plain, step)
        assert_close(checkpoint(averaged, step), state)
        mean = {name: mean[name] + 0.4 * (state[name] - mean[name]) for name in mean}
        kept = checkpoint(averaged, step, EMA_FILE)
        assert kept.pop("n_averaged") == step
        assert_close({name.removeprefix("module."): tensor for name, tensor in kept.items()}, mean, 1e-6)
    assert_close(final_weights(averaged), mean, 1e-6)
    assert float((mean["classifier.dense.weight"] - state["classifier.dense.weight"]).abs().max()) > 1e-4


def test_evaluation_sees_the_moving_average(run):
    folds = {"validation_folds": ["3"], "test_folds": ["3"]}
    averaged = run(ema_decay=0.6, load_best_model_at_end=False, **folds)
    predictions = pandas.read_parquet(averaged / "predictions.parquet")
    logits = torch.tensor(np.stack(predictions["logits"]))
    labels = torch.tensor([metrics_of(averaged)["labels"].index(label) for label in predictions["label"]])
    loss = float(torch.nn.functional.cross_entropy(logits, labels))

    def last_loss(folder):
        history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        return next(entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry)

    raw = last_loss(run("raw", load_best_model_at_end=False, **folds))
    assert abs(last_loss(averaged) - loss) < 1e-3 < abs(raw - loss)


def test_the_best_moving_average_is_kept(run):
    folder = run(ema_decay=0.6, metric_for_best_model="loss", learning_rate=0.1)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    best = checkpoint(folder, state["best_global_step"], EMA_FILE)
    best.pop("n_averaged")
    assert_close(final_weights(folder), {name.removeprefix("module."): tensor for name, tensor in best.items()})


def test_the_moving_average_goes_on_exactly_after_a_resume(run, tmp_path):
    folder = run(ema_decay=0.6)
    whole, last = final_weights(folder), checkpoint(folder, 4, EMA_FILE)
    (folder / "metrics.json").unlink()
    for step in range(3, 5):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run(ema_decay=0.6)
    assert_close(final_weights(folder), whole)
    assert_close(checkpoint(folder, 4, EMA_FILE), last)
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
