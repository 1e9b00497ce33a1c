"""Dendrites grow in tiny models of four kinds, with real perforatedai, real checkpoints and real processes.

As a program, `test_pai_callback.py FOLDER SCENARIO`, this file is what the tests start under torchrun, or kill.
"""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY_AST, TONES
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    AutoModelForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import pai_callback
import train
from audio_dendrites.recipes import parse_recipe, read_yaml
from audio_dendrites.training.trainer import AudioTrainer
from pai_callback import (
    STATE_FILE,
    PAICallback,
    PAIConfig,
    PAIError,
    PAITrainer,
    PAITrainerMixin,
    choose_layers,
    perforated_layers,
    structure_of,
)

pytest.importorskip("perforatedai", reason="perforatedai has no wheel for this Python; 3.11 and 3.12 have one")


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes that tests start: sums depend on the threads, and small models wait for each other's."""
    torch.set_num_threads(1)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
AST_LAYERS = [f"audio_spectrogram_transformer.layers.1.mlp.fc{n}" for n in (1, 2)] + ["classifier.dense"]


class SmallCNN(nn.Module):
    """A convolutional network of no library, with batch statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2))
        self.head = nn.Linear(8, 3)

    def forward(self, input_values, labels=None):
        logits = self.head(self.body(input_values[:, None]).amax((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


class Examples(Dataset):
    """24 noisy examples of 3 classes, for any of the models."""

    def __init__(self, kind: str, count: int = 24):
        noise = torch.randn(count, 16, 16, generator=torch.Generator().manual_seed(7))
        self.labels = torch.arange(count) % 3
        clips = noise + 4 * nn.functional.one_hot(self.labels * 2, 16)[:, None, :]
        self.inputs = {
            "ast": {"input_values": clips},
            "vit": {"pixel_values": clips[:, None]},
            "cnn": {"input_values": clips},
            "bert": {"input_ids": (clips[:, 0, :8] * 2).long().clamp(0, 9)},
        }[kind]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {name: values[row] for name, values in self.inputs.items()} | {"labels": int(self.labels[row])}


def build(kind: str = "ast", **changes) -> nn.Module:
    """A tiny model with weights from seed 0."""
    set_seed(0)
    if kind == "cnn":
        return SmallCNN()
    if kind == "vit":
        config = ViTConfig(image_size=16, patch_size=8, num_channels=1, **SIZES, **QUIET | changes)
        return ViTForImageClassification(config)
    if kind == "bert":
        config = BertConfig(vocab_size=10, max_position_embeddings=8, **SIZES, **QUIET | changes)
        return BertForSequenceClassification(config)
    strides = {"patch_size": 8, "time_stride": 8, "frequency_stride": 8, "num_mel_bins": 16, "max_length": 16}
    return ASTForAudioClassification(ASTConfig(**SIZES, **strides, **QUIET | changes))


LAYERS = {
    "ast": {},
    "vit": {"modules": ["layers.-1.mlp.*", "classifier"]},
    "bert": {"modules": ["layer.-1.intermediate.dense", "layer.-1.output.dense", "classifier"]},
    "cnn": {"modules": ["Conv2d", "head"]},
}


def compute_metrics(evaluations, prediction) -> dict[str, float]:
    """Accuracy; `count`, which improves at every evaluation; `second`, which is best at the second."""
    count = next(evaluations)
    accuracy = (np.argmax(prediction.predictions, -1) == prediction.label_ids).mean()
    return {"accuracy": float(accuracy), "count": float(count), "second": -abs(count - 2)}


def trainer_for(
    folder, kind="ast", pai=None, model=None, trainer=PAITrainer, callbacks=(), options=None, **changes
) -> Trainer:
    """A trainer that evaluates every other of 10 steps, and by default grows at every evaluation."""
    arguments = {
        "max_steps": 10, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 24, "learning_rate": 1e-2,
        "weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "logging_steps": 100,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3,
    } | changes  # fmt: skip
    model = build(kind) if model is None else model
    grower = (
        [] if pai is None else [PAICallback(PAIConfig(**{"schedule": "fixed", "interval": 1} | LAYERS[kind] | pai))]
    )
    return trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=Examples(kind),
        eval_dataset=Examples(kind),
        compute_metrics=functools.partial(compute_metrics, itertools.count(1)),
        callbacks=[*grower, *callbacks],
        **options or {},
    )


def run(*args, resume=None, **kwargs) -> Trainer:
    trainer = trainer_for(*args, **kwargs)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def history(trainer: Trainer) -> list[dict[str, Any]]:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, PAICallback)).history


def events(trainer: Trainer) -> list[str]:
    return [entry["event"] for entry in history(trainer)]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a wrapped model's tensors those it had before, by their old names."""
    scaffolding = ("dendrite", "this_output", "this_node", "candidate")
    own = {name: tensor for name, tensor in state.items() if not any(word in name for word in scaffolding)}
    return {name.replace(".main_module", ""): tensor for name, tensor in own.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_optimizer_holds_what_is_trained(trainer: Trainer):
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained)


def assert_dendrites_learned(model: nn.Module):
    for module in perforated_layers(model).values():
        assert module.dendrite_modules_added > 0 and module.dendrites_to_top[-1].abs().min(1).values.max() > 0


def logits(model: nn.Module, kind: str = "ast") -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        outputs = model(**{name: values[:8] for name, values in Examples(kind).inputs.items()})
    return outputs["logits"]


class At(TrainerCallback):
    """Calls a function at an event."""

    def __init__(self, event: str, act: Callable):
        setattr(self, event, lambda args, state, control, **kwargs: act(state, control, kwargs))


# Growth


@pytest.mark.parametrize("kind", LAYERS)
def test_any_model_grows_in_a_plain_trainer_with_the_callback_alone(kind, tmp_path):
    at_growth = []

    def compare(state, control, kwargs):
        trained = kwargs["model"].training
        at_growth.append(logits(kwargs["model"], kind))
        kwargs["model"].train(trained)

    # The second callback sees the model after growth, the evaluation before it.
    look = [At("on_evaluate", compare), At("on_step_begin", compare)]
    trainer = run(tmp_path, kind, {"max_dendrites": 3, "tries": 9}, trainer=Trainer, callbacks=look, max_steps=9)
    assert {"grown"} < set(events(trainer)) | {""}
    assert events(trainer)[0] == "grown" and torch.equal(at_growth[2], at_growth[3])  # step 2: before, after
    assert_dendrites_learned(trainer.model)
    assert_optimizer_holds_what_is_trained(trainer)


def test_growth_adds_the_parameters_that_the_logs_say(tmp_path, capsys):
    before = sum(p.numel() for p in build().parameters())
    trainer = run(tmp_path, pai={"max_dendrites": 2, "tries": 9})
    dendrites = structure_of(trainer.model)["classifier.dense"]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    added = dendrites * (544 + 32 + 528 + 16 + 51 + 3) + dendrites * (dendrites - 1) // 2 * (32 + 16 + 3)
    assert dendrites >= 1 and history(trainer)[-1]["parameters"] == trained == before + added
    out = capsys.readouterr().out
    assert f"Dendrites, step 2: dendrites grew; 0 -> 1 per layer, {before + 1174:,} parameters" in out


@pytest.mark.parametrize("growth_interval", [2000, 3])
def test_fp16s_loss_scaling_follows_growth(tmp_path, growth_interval):
    """On a CPU, in fp32: a scale that is a power of two changes no bit, if every gradient is scaled back."""
    # Without clipping, before which accelerate scales back in fp16 alone.
    options = {"pai": {"max_dendrites": 2, "tries": 9}, "max_grad_norm": 0.0}
    trainer = trainer_for(tmp_path / "scaled", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth_interval)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() == 2.0**10 * 2 ** (trainer.state.global_step // growth_interval)
    assert_dendrites_learned(trainer.model)
    assert_same(tensors(run(tmp_path / "plain", **options).model), tensors(trainer.model))


def test_a_step_that_overflows_is_left_out_and_growth_goes_on(tmp_path):
    trainer = trainer_for(tmp_path, pai={"max_dendrites": 2, "tries": 9}, max_steps=20, max_grad_norm=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)  # at first infinite gradients
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() < 2.0**127
    assert_dendrites_learned(trainer.model)
    assert all(tensor.isfinite().all() for tensor in tensors(trainer.model).values() if tensor.is_floating_point())


def test_until_it_grows_a_run_is_the_baseline_bit_for_bit(tmp_path):
    dropout = {"hidden_dropout_prob": 0.1}
    baseline = run(tmp_path / "0", trainer=Trainer, model=build(**dropout))
    for number, pai in enumerate([{"max_dendrites": 0}]):
        trainer = run(tmp_path / f"a{number}", pai=pai, model=build(**dropout))
        assert_same(tensors(baseline.model), tensors(trainer.model))
    trainer = run(tmp_path / "b", pai={"schedule": "history", "patience": 99}, model=build(**dropout))
    assert structure_of(trainer.model) == dict.fromkeys(AST_LAYERS, 0)
    assert_same(tensors(baseline.model), plain(tensors(trainer.model)))


# Choose


def test_layers_are_chosen_by_name_from_the_end_by_type_or_by_block():
    model = build()
    assert choose_layers(model, PAIConfig()) == AST_LAYERS
    assert choose_layers(model, PAIConfig(modules=["layers.1.mlp.*", "dense"])) == AST_LAYERS
    assert choose_layers(model, PAIConfig(modules=["layers.-2.*.[qk]_proj"])) == [
        f"audio_spectrogram_transformer.layers.0.attention.{one}_proj" for one in "qk"
    ]
    assert choose_layers(build("cnn"), PAIConfig(modules=["Conv2d"])) == ["body.0", "body.3"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules": ["classifier.dens"]}, r"got 'classifier.dens' .did you mean 'classifier.dense'"),
        ({"modules": ["layers.1.mpl.*"]}, r"did you mean .*layers.1.mlp"),
        ({"modules": ["layers.5.mlp.*"]}, "must name layers of the model"),
        ({"modules": ["*.layernorm_*"]}, "linear or convolutional layers.*LayerNorm"),
        ({"modules": []}, "empty list"),
    ],
)
def test_what_names_no_layer_is_an_error_with_near_matches(config, message):
    with pytest.raises(PAIError, match=message):
        choose_layers(build(), PAIConfig(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"schedule": "often"}, r"'schedule' expected one of \('history', 'fixed'\), got often"),
        ({"max_dendrites": -1}, r"max_dendrites must be in \[0, inf\), got -1"),
        ({"max_dendrites": True}, "'max_dendrites' expected int, got bool"),
        ({"modules": "classifier"}, "'modules' expected a list, got str"),
        ({"module": ["classifier"]}, "unknown field 'module' .did you mean 'modules'"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_found_and_wanted(config, message):
    with pytest.raises(PAIError, match=message):
        PAICallback(config)


def test_every_field_says_what_it_is_for():
    assert all(one.metadata["help"] for one in PAIConfig.__dataclass_fields__.values())


# Schedule


def test_growth_follows_the_schedule(tmp_path):
    fixed = run(tmp_path / "fixed", pai={"schedule": "fixed", "interval": 2, "tries": 9}, eval_steps=1)
    assert [entry["step"] for entry in history(fixed) if entry["event"]] == [2, 4, 6, 8]
    every = run(tmp_path / "every", pai={"interval": 1, "tries": 9, "max_dendrites": 9}, eval_steps=1)
    assert all(events(every)[:-1])
    # Learning nothing, the first evaluation is the best; two later there is growth, and two after its first the end.
    waits = run(
        tmp_path / "history", pai={"schedule": "history", "patience": 2, "tries": 1}, eval_steps=1, learning_rate=0.0
    )
    assert events(waits) == ["", "", "grown", "", "", "complete"]
    assert (
        waits.state.global_step == 7
    )  # without a checkpoint due, the loop ends one step later, whose update is undone


def test_a_complete_training_stops_with_the_best_weights(tmp_path):
    for strategy in ("steps", "no", "best"):
        saving = {"save_strategy": strategy, "save_steps": 2, "metric_for_best_model": "loss"}
        trainer = run(
            tmp_path / strategy, pai={"max_dendrites": 1, "tries": 1}, learning_rate=5e-2, max_steps=60, **saving
        )
        assert events(trainer)[-1] == "complete" and trainer.state.global_step < 60
        best = min(entry["metric"] for entry in history(trainer))
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


def test_a_complete_training_may_go_on_to_its_last_step(tmp_path):
    trainer = run(tmp_path, pai={"max_dendrites": 1, "tries": 1, "stop_when_complete": False}, max_steps=16)
    assert "complete" in events(trainer) and trainer.state.global_step == 16
    assert_optimizer_holds_what_is_trained(trainer)


def test_growth_keeps_the_optimizers_state(tmp_path):
    ages = []

    def look(state, control, kwargs):
        by_id = {id(p): value["step"].item() for p, value in kwargs["optimizer"].state.items()}
        named = kwargs["model"].named_parameters()
        ages.append({name: by_id[id(p)] for name, p in named if id(p) in by_id})

    pai = {"metric": "count"}
    trainer = run(tmp_path, pai=pai, callbacks=[At("on_step_end", look)], max_steps=6, eval_steps=2)
    assert events(trainer)[:2] == ["grown", "grown"]
    head = "classifier.dense."
    older, newer = f"{head}dendrite_module.layers.0.weight", f"{head}dendrite_module.layers.1.weight"
    final = ages[-1]
    assert final[newer] == final[f"{head}dendrites_to_top.1"] == 2
    assert final[f"{head}main_module.weight"] == 6 and final[older] == 4


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "gelu"])
def test_dendrites_compute_what_the_mathematics_says(activation, tmp_path):
    trainer = run(tmp_path, pai={"activation": activation, "max_dendrites": 2, "tries": 9, "modules": ["dense"]})
    module = trainer.model.classifier.dense
    assert module.dendrite_modules_added == 2
    function = {"gelu": nn.functional.gelu}.get(activation) or getattr(torch, activation)
    inputs = torch.randn(5, 16)
    logits(trainer.model)  # the model's forward says which activation is meant
    first, second = (layer(inputs) for layer in module.dendrite_module.layers)
    first = function(first)
    second = function(second + module.dendrite_module.dendrites_to_dendrites[1][0] * first)
    top = module.dendrites_to_top[-1]
    assert torch.equal(module(inputs), module.main_module(inputs) + first * top[0] + second * top[1])


# Say


def test_tensorboard_shows_growth(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = run(tmp_path / "run", pai={"tries": 9}, report_to="tensorboard")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    shown = {point.step: point.value for point in board.Scalars("train/pai/dendrites")}
    assert shown == {entry["step"]: entry["dendrites"] for entry in history(trainer)}
    assert "train/pai/parameters" in board.Tags()["scalars"]


def test_perforatedai_prints_nothing_and_writes_only_into_output_dir(tmp_path, capfd, monkeypatch):
    for name in ("here", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    run(tmp_path / "run", pai={"tries": 1, "max_dendrites": 2}, max_steps=20)
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if not line.startswith("{")]
    ours = ("Dendrites: up to 2 per layer", "Dendrites, step")
    assert lines and [line for line in lines if not line.startswith(ours)] == []
    assert "PAI" not in captured.out + captured.err and "perforat" not in (captured.out + captured.err).lower()
    assert list((tmp_path / "here").iterdir()) == list((tmp_path / "tmp").iterdir()) == []
    assert list((tmp_path / "run").iterdir()) == []


def test_where_perforatedai_would_ask_or_exit_it_raises_with_its_words():
    with pai_callback._contained("a test"):
        from perforatedai import globals_perforatedai, utils_perforatedai
    globals_perforatedai.pai_tracker = []
    for act, message in (
        (lambda: utils_perforatedai.perforate_model(build(), save_name="a/b"), "SystemExit.*'a/b' contains '/'"),
        (lambda: utils_perforatedai.load_net_from_dict(build("cnn"), {}), "(?s)asked.*does not have any pai_modules"),
        (lambda: input("Really? "), "asked for input"),
    ):
        with pytest.raises(PAIError, match=message), pai_callback._contained("a test"):
            act()


# Hold


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ast", {"bf16": True}),
        ("cnn", {"bf16": True}),
        ("ast", {"gradient_accumulation_steps": 2}),
        ("vit", {"activation_checkpointing": True}),
        ("cnn", {"torch_compile": True, "torch_compile_backend": "eager"}),
        ("ast", {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 18, "load_best_model_at_end": True}),
        ("ast", {"save_strategy": "best", "metric_for_best_model": "loss", "load_best_model_at_end": True}),
        ("ast", {"optim": "sgd", "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}),
        ("ast", {"optim": "adafactor"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_growth_holds_with(kind, changes, tmp_path):
    trainer = run(tmp_path, kind, {"tries": 9}, **{"learning_rate": 3e-2} | changes)
    assert "grown" in events(trainer)
    if not changes.get("load_best_model_at_end"):
        assert_dendrites_learned(trainer.model)
        assert_optimizer_holds_what_is_trained(trainer)


def test_accumulated_gradients_grow_what_a_larger_batch_grows(tmp_path):
    whole = run(tmp_path / "1", pai={"tries": 9}, optim="sgd")
    parts = run(
        tmp_path / "2", pai={"tries": 9}, optim="sgd", per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert events(whole) == events(parts)
    for name, tensor in tensors(whole.model).items():
        assert torch.allclose(tensor, parts.model.state_dict()[name], atol=1e-5), name


SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
RESUMED = {
    "ast, state kept": ("ast", {"tries": 9}, {}),
    "cnn": ("cnn", {"tries": 9}, {"warmup_steps": 2}),
    "bert, tries over, dropout, bf16": (
        "bert",
        {"tries": 1, "max_dendrites": 2},
        {"bf16": True, "learning_rate": 5e-2},
    ),
    "vit, eval between saves": (
        "vit",
        {"schedule": "fixed", "interval": 2, "tries": 9},
        {"eval_steps": 1, "save_steps": 3},
    ),
    "saved when best": ("ast", {"tries": 9}, {"save_strategy": "best", "metric_for_best_model": "loss"}),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resume_from_any_checkpoint_is_tensor_identical(case, tmp_path):
    kind, pai, changes = RESUMED[case]
    changes = SAVED | {"max_steps": 7} | changes
    noise = {"hidden_dropout_prob": 0.1} if "dropout" in case else {}
    whole = run(tmp_path / "whole", kind, pai, model=build(kind, **noise), **changes)
    assert "grown" in events(whole)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[:-1]
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        again = run(
            tmp_path / f"from-{checkpoint.name}", kind, pai, model=build(kind, **noise), resume=checkpoint, **changes
        )
        assert_same(tensors(whole.model), tensors(again.model))
        assert events(again) == events(whole)
        if "complete" not in events(whole):
            assert_same_optimizer(whole, again)


def assert_same_optimizer(first: Trainer, second: Trainer):
    one, other = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for key, values in one["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other["state"][key][n])) for n, v in values.items())


def test_a_resume_after_a_kill_on_the_switch_itself_is_tensor_identical(tmp_path):
    whole = run(tmp_path / "whole", pai={"tries": 9}, **SAVED | {"save_steps": 2})
    killed = subprocess.run(program(tmp_path / "killed", "killed"), env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    assert json.loads((checkpoint / STATE_FILE).read_text())["pending"]["metric"] == history(whole)[1]["metric"]
    again = run(tmp_path / "killed", pai={"tries": 9}, resume=checkpoint, **SAVED | {"save_steps": 2})
    assert_same(tensors(whole.model), tensors(again.model))
    assert_same_optimizer(whole, again)


def test_the_best_model_is_loaded_exactly_whatever_its_number_of_dendrites(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    pai = {"metric": "count", "max_dendrites": 4}
    trainer = run(tmp_path, pai=pai, metric_for_best_model="second", greater_is_better=True, **saving)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4" and history(trainer)[-1]["dendrites"] == 4
    assert set(structure_of(trainer.model).values()) == {1}
    assert_same(tensors(trainer.model), load_file(best / "model.safetensors"))


def test_a_tensor_missing_or_left_over_is_an_error(tmp_path):
    run(tmp_path, pai={"tries": 9}, **SAVED | {"max_steps": 4, "save_steps": 2})
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    state = load_file(weights)
    state["stray"] = state.pop("classifier.dense.dendrites_to_top.0")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(PAIError, match=r"lacks \['classifier.dense.dendrites_to_top.0'\].*has \['stray'\]"):
        run(tmp_path, pai={"tries": 9}, resume=tmp_path / "checkpoint-4", **SAVED)


def test_a_checkpoint_of_other_layers_or_without_dendrites_is_refused(tmp_path):
    run(tmp_path / "a", pai={"tries": 9}, **SAVED | {"max_steps": 2})
    with pytest.raises(PAIError, match="the checkpoint has dendrites on .* the configuration has"):
        run(tmp_path / "b", pai={"modules": ["dense"]}, resume=tmp_path / "a" / "checkpoint-2", **SAVED)
    with pytest.raises(PAIError, match="the activation sigmoid, the configuration has tanh"):
        run(tmp_path / "b", pai={"activation": "tanh"}, resume=tmp_path / "a" / "checkpoint-2", **SAVED)
    run(tmp_path / "c", **SAVED | {"max_steps": 2})
    with pytest.raises(PAIError, match="cannot be resumed with dendrites.*pai_state.json"):
        run(tmp_path / "d", pai={}, resume=tmp_path / "c" / "checkpoint-2", **SAVED)


class AudioTrainerWithDendrites(PAITrainerMixin, AudioTrainer):
    pass


class NoProcessor:
    def save_pretrained(self, folder):
        pass


def test_dendrites_learn_at_the_rate_of_their_layer_in_a_trainer_with_many_groups(tmp_path):
    def options(model):
        rates = {name: 1e-2 if name.startswith("classifier") else 1e-3 for name, _ in model.named_parameters()}
        return {"model": model, "options": {"learning_rates": rates, "processing_class": NoProcessor()}}

    common = {"pai": {"tries": 9}, "trainer": AudioTrainerWithDendrites, **SAVED, "max_steps": 6, "save_steps": 2}
    whole = run(tmp_path, **common, **options(build()))
    names = {id(p): name for name, p in whole.model.named_parameters()}
    groups = whole.optimizer.param_groups
    assert len(groups) == 4
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["initial_lr"] == (1e-2 if name.startswith("classifier") else 1e-3)
            if "dendrite" in name:
                assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.1)
    assert any("dendrites_to_top" in name for name in names.values())
    again = run(tmp_path / "again", resume=tmp_path / "checkpoint-4", **common, **options(build()))
    assert_same(tensors(whole.model), tensors(again.model))


def test_dendrites_grow_on_frozen_layers(tmp_path):
    model = build()
    model.audio_spectrogram_transformer.requires_grad_(False)
    before = tensors(model)
    trainer = run(tmp_path, pai={"tries": 9}, model=model)
    assert_dendrites_learned(trainer.model)
    after = plain(tensors(trainer.model))
    assert_same(*({name: t for name, t in state.items() if name.startswith("audio")} for state in (before, after)))


# Two processes

DISTRIBUTED = {"optim": "sgd", "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
               "metric_for_best_model": "loss", "learning_rate": 5e-2, "save_total_limit": None}  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """One start of two gloo ranks: a run, and its resume from a checkpoint at a switch."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, *program(folder, "distributed")[1:]], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def test_two_processes_equal_one_with_twice_the_batch(two_processes, tmp_path):
    one = run(tmp_path, pai={"tries": 9}, **DISTRIBUTED | {"per_device_train_batch_size": 8})
    told = json.loads((two_processes / "told.json").read_text())
    assert told["events"] == events(one) and "grown" in events(one)
    two = load_file(two_processes / "whole-0.safetensors")
    for name, tensor in tensors(one.model).items():
        assert torch.allclose(tensor, two[name], atol=1e-5), name


def test_ranks_are_identical_and_a_resume_is_tensor_identical(two_processes):
    whole = load_file(two_processes / "whole-0.safetensors")
    assert any("dendrites_to_top" in name and tensor.abs().sum() > 0 for name, tensor in whole.items())
    assert_same(whole, load_file(two_processes / "whole-1.safetensors"))
    assert_same(whole, load_file(two_processes / "again-0.safetensors"))
    assert_same(whole, load_file(two_processes / "again-1.safetensors"))


# Recipes


def test_a_recipe_with_a_pai_block_grows_and_resumes(tones, tmp_path):
    recipe = TONES | {
        "dataset": str(tones), "max_length": 48, "model_config": TINY_AST, "per_device_train_batch_size": 2,
        "num_train_epochs": 3, "learning_rate": 1e-2, "precision": "fp32", "preprocessing_num_workers": 1,
        "head_learning_rate": 2e-2, "mixup_alpha": 0.5, "save_total_limit": None, "load_best_model_at_end": False,
        "pai": {"schedule": "fixed", "interval": 1, "metric": "loss", "tries": 9},
    }  # fmt: skip
    for name in ("whole", "again"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / name)}))
    train.main(parse_recipe([str(tmp_path / "whole.yaml")]))
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    exported = AutoModelForAudioClassification.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert exported.config.model_type == "dendritic-audio-spectrogram-transformer"
    assert metrics["parameters"] == sum(parameter.numel() for parameter in exported.parameters())
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    train.main(parse_recipe([str(tmp_path / "again.yaml"), "--resume_from_checkpoint", str(checkpoint)]))
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again")))


def test_the_dendritic_recipes_are_their_baselines_with_a_pai_block():
    for name in ("ast", "ast_tiny"):
        baseline, grown = (read_yaml(ROOT / f"configs/urbansound8k/{name}{end}.yaml") for end in ("", "_pai"))
        PAIConfig.from_dict(grown["pai"])
        assert (
            grown.keys() - baseline.keys() == {"pai"}
            and {k: baseline[k] for k in grown if k != "pai"} | {"pai": grown["pai"]} == grown
        )


# Refuse


class Unused(SmallCNN):
    """With a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(2, 2)


def test_a_layer_that_is_never_called_is_refused(tmp_path):
    with pytest.raises(PAIError, match="never calls never"):
        run(tmp_path, "cnn", {"modules": ["never"]}, model=Unused())


@pytest.mark.parametrize(
    ("pai", "changes", "message"),
    [
        ({"metric": "acuracy"}, {}, "got 'eval_acuracy' .did you mean 'eval_accuracy'"),
        ({}, {"eval_strategy": "no"}, "eval_strategy must be steps or epoch"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_settings_that_cannot_work_are_refused(pai, changes, message, tmp_path):
    with pytest.raises(PAIError, match=message):
        run(tmp_path, pai=pai, **changes)


def test_a_plain_trainer_refuses_what_only_paitrainer_can_do(tmp_path):
    saving = SAVED | {"save_steps": 2, "max_steps": 4, "trainer": Trainer}
    with pytest.raises(PAIError, match="load_best_model_at_end.*need PAITrainer"):
        run(tmp_path, pai={}, load_best_model_at_end=True, **saving)
    run(tmp_path, "bert", {}, **saving)
    with pytest.raises(PAIError, match="resume_from_checkpoint.*need PAITrainer"):
        run(tmp_path, "bert", {}, resume=tmp_path / "checkpoint-2", **saving | {"max_steps": 6})


def test_an_optimizer_that_cannot_be_rebuilt_is_refused(tmp_path):
    for make, message in (
        (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS cannot take new parameters"),
        (lambda model: torch.optim.SGD(model.classifier.parameters()), "SGD .* does not hold audio"),
    ):
        model = build()
        with pytest.raises(PAIError, match=message):
            run(tmp_path, pai={}, model=model, options={"optimizers": (make(model), None)})


def test_data_parallel_fsdp_and_deepspeed_are_refused(tmp_path, monkeypatch):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    for field, value, message in (
        ("_n_gpu", 2, "nn.DataParallel"),
        ("fsdp", ["full_shard"], "FSDP"),
        ("deepspeed", {"zero_optimization": {}}, "DeepSpeed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(arguments, field, value)
            with pytest.raises(PAIError, match=message):
                pai_callback._refuse_parallelism(arguments)


def test_perforatedbp_is_refused(tmp_path, monkeypatch):
    (tmp_path / "perforatedbp").mkdir()
    (tmp_path / "perforatedbp" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PAIError, match="pip uninstall perforatedbp"):
        run(tmp_path / "run", pai={})


# Clean up


def test_two_trainings_one_after_the_other_do_not_touch_each_other(tmp_path):
    alone = run(tmp_path / "0", "vit", {"tries": 9, "activation": "tanh"})
    first = run(tmp_path / "1", pai={"tries": 9, "activation": "relu"})
    before = logits(first.model)
    second = run(tmp_path / "2", "vit", {"tries": 9, "activation": "tanh"})
    assert_same(tensors(alone.model), tensors(second.model))
    assert torch.equal(before, logits(first.model))
    assert first.evaluate()["eval_loss"] > 0


def test_a_training_that_fails_leaves_nothing_behind(tmp_path):
    def fail(state, control, kwargs):
        if state.global_step == 5:
            raise KeyError("from the user's own callback")

    with pytest.raises(KeyError):
        run(tmp_path / "run", pai={"tries": 9}, callbacks=[At("on_step_end", fail)])
    assert list((tmp_path / "run").iterdir()) == []


# The program


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def program(folder: Path, scenario: str) -> list[str]:
    return [sys.executable, __file__, str(folder), scenario]


def killed(folder: Path) -> None:
    """The switch of step 4 is in progress, the new structure stands, the optimizer is the old one: SIGKILL."""

    def kill(state, control, kwargs):
        if state.global_step == 4 and "pai/dendrites" in kwargs["logs"]:
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, pai={"tries": 9}, callbacks=[At("on_log", kill)], **SAVED | {"save_steps": 2})


def distributed(folder: Path) -> None:
    """Both ranks write what they ended with."""
    rank = os.environ["RANK"]
    whole = run(folder / "whole", pai={"tries": 9}, **DISTRIBUTED)
    save_file(tensors(whole.model), folder / f"whole-{rank}.safetensors")
    again = run(folder / "again", pai={"tries": 9}, resume=folder / "whole" / "checkpoint-4", **DISTRIBUTED)
    save_file(tensors(again.model), folder / f"again-{rank}.safetensors")
    if rank == "0":
        (folder / "told.json").write_text(json.dumps({"events": events(whole)}))


if __name__ == "__main__":
    {"killed": killed, "distributed": distributed}[sys.argv[2]](Path(sys.argv[1]))
