"""Dendrites grow in tiny models of four kinds, with real perforatedai, checkpoints, processes and pushes."""

import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from conftest import ROOT, TINY_AST, TONES, Examples, SmallCNN, build
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import pai_callback
import train
from audio_dendrites.models.dendritic import growth_fault, perforated_layers, structure_of
from audio_dendrites.recipes import parse_recipe, read_yaml
from audio_dendrites.results.dendrites import measure_use, use_sentence
from pai_callback import (
    STATE_FILE,
    PAICallback,
    PAIConfig,
    PAIError,
    PAITrainer,
    choose_layers,
)

pytest.importorskip("perforatedai", reason="perforatedai has no wheel for this Python; 3.11 and 3.12 have one")


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes that tests start: sums depend on the threads, and small models wait for each other's."""
    torch.set_num_threads(1)


AST_LAYERS = [f"audio_spectrogram_transformer.layers.1.mlp.fc{n}" for n in (1, 2)] + ["classifier.dense"]


def examples(kind: str) -> Examples:
    """24 noisy examples of 3 classes, for any of the models."""
    noise = torch.randn(24, 16, 16, generator=torch.Generator().manual_seed(7))
    clips = noise + 4 * nn.functional.one_hot(torch.arange(24) % 3 * 2, 16)[:, None, :]
    if kind == "bert":
        return Examples("input_ids", (clips[:, 0, :8] * 2).long().clamp(0, 9))
    return Examples("pixel_values", clips[:, None]) if kind == "vit" else Examples("input_values", clips)


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


# Growth at every evaluation, with three dendrites per layer at most and the other defaults.
OFTEN = {"schedule": "fixed", "interval": 1, "max_dendrites": 3, "last_growth": 1, "tries": 9}
EARLY = {"schedule": "early", "first_growth": 0.25, "max_dendrites": 2}  # after steps 2.5 and 5 of 10


def trainer_for(
    folder, kind="ast", pai=None, model=None, trainer=PAITrainer, callbacks=(), options=None, **changes
) -> Trainer:
    """A trainer that takes 10 steps and evaluates after every other."""
    arguments = {
        "max_steps": 10, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 24, "learning_rate": 1e-2,
        "weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "logging_steps": 100,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3,
    } | changes  # fmt: skip
    model = build(kind) if model is None else model
    grower = [] if pai is None else [PAICallback(LAYERS[kind] | pai)]
    return trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=examples(kind),
        eval_dataset=examples(kind),
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


def logits(model: nn.Module, kind: str = "ast", count: int = 8) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        outputs = model(**{name: values[:count] for name, values in examples(kind).inputs.items()})
    return outputs["logits"]


class At(TrainerCallback):
    """Calls a function at an event."""

    def __init__(self, event: str, act: Callable):
        self.trainer = None
        setattr(
            self, event, lambda args, state, control, **kwargs: act(state, control, kwargs | {"trainer": self.trainer})
        )


# Growth


@pytest.mark.parametrize("pai", [EARLY, OFTEN], ids=["early", "often"])
@pytest.mark.parametrize("kind", LAYERS)
def test_any_model_grows_in_a_plain_trainer_with_the_callback_alone(kind, pai, tmp_path):
    seen = []

    def compare(state, control, kwargs):
        trained = kwargs["model"].training
        seen.append((events(kwargs["trainer"]), logits(kwargs["model"], kind)))
        kwargs["model"].train(trained)

    look = [At("on_step_end", compare), At("on_step_begin", compare)]  # the second sees the model after growth
    trainer = trainer_for(tmp_path, kind, pai, trainer=Trainer, callbacks=look, lr_scheduler_type="cosine")
    for callback in look:
        callback.trainer = trainer
    trainer.train()
    grown = [(one, other) for one, other in itertools.pairwise(seen) if one[0].count("grown") < other[0].count("grown")]
    assert grown and all(torch.equal(one[1], other[1]) for one, other in grown if pai is EARLY or one[0] == [])
    assert_dendrites_learned(trainer.model)
    assert_optimizer_holds_what_is_trained(trainer)


def test_growth_adds_the_parameters_that_the_logs_say(tmp_path, capsys):
    before = sum(p.numel() for p in build().parameters())
    trainer = run(tmp_path, pai=OFTEN | {"max_dendrites": 2})
    dendrites = structure_of(trainer.model)["classifier.dense"]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    added = dendrites * (544 + 32 + 528 + 16 + 51 + 3) + dendrites * (dendrites - 1) // 2 * (32 + 16 + 3)
    assert dendrites >= 1 and history(trainer)[-1]["parameters"] == trained == before + added
    out = capsys.readouterr().out
    assert f"Dendrites, step 2: dendrites grew; 0 -> 1 per layer, {before + 1174:,} parameters, metric" in out


@pytest.mark.parametrize(("pai", "growth_interval"), [(EARLY, 2000), (OFTEN, 3)])
def test_fp16s_loss_scaling_follows_growth(tmp_path, pai, growth_interval):
    """On a CPU, in fp32: a scale that is a power of two changes no bit, if every gradient is scaled back."""
    # Without clipping, before which accelerate scales back in fp16 alone.
    options = {"pai": pai, "max_grad_norm": 0.0}
    trainer = trainer_for(tmp_path / "scaled", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth_interval)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() == 2.0**10 * 2 ** (trainer.state.global_step // growth_interval)
    assert_dendrites_learned(trainer.model)
    assert_same(tensors(run(tmp_path / "plain", **options).model), tensors(trainer.model))


def test_a_step_that_overflows_is_left_out_and_growth_goes_on(tmp_path):
    trainer = trainer_for(tmp_path, pai=EARLY, max_steps=20, max_grad_norm=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)  # at first infinite gradients
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() < 2.0**127
    assert_dendrites_learned(trainer.model)
    assert all(tensor.isfinite().all() for tensor in tensors(trainer.model).values() if tensor.is_floating_point())


def test_until_it_grows_a_run_is_the_baseline_bit_for_bit(tmp_path):
    dropout = {"hidden_dropout_prob": 0.1}
    baseline = run(tmp_path / "0", trainer=Trainer, model=build(**dropout))
    trainer = run(tmp_path / "a", pai={"max_dendrites": 0}, model=build(**dropout))
    assert_same(tensors(baseline.model), tensors(trainer.model))
    trainer = run(tmp_path / "b", pai={"schedule": "history", "patience": 99}, model=build(**dropout))
    assert structure_of(trainer.model) == dict.fromkeys(AST_LAYERS, 0)
    assert_same(tensors(baseline.model), plain(tensors(trainer.model)))


# Choose


def test_layers_are_chosen_by_name_from_the_end_or_by_class():
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
        ({"schedule": "often"}, r"'schedule' expected one of \('early', 'history', 'fixed'\), got often"),
        ({"max_dendrites": -1}, r"max_dendrites must be in \[0, inf\), got -1"),
        ({"max_dendrites": True}, "'max_dendrites' expected int, got bool"),
        ({"modules": "classifier"}, "'modules' expected a list, got str"),
        ({"module": ["classifier"]}, "unknown field 'module' .did you mean 'modules'"),
        ({"initial_scale": 0}, r"initial_scale must be in \(0, inf\), got 0"),
        ({"last_growth": "1.5e0"}, r"last_growth must be in \(0, 1\], got 1.5"),  # YAML reads 1e-4 as a text
        (
            {"max_dendrites": 6},
            r"max_dendrites times first_growth must be at most last_growth, got 6 times 0.1, last_growth 0.5",
        ),
        ({"preset": "vendor"}, "preset must be perforatedai, got 'vendor'"),
        ({"modules": ["classifier.dens"]}, r"got 'classifier.dens' .did you mean 'classifier.dense'"),
        ({"modules": ["layers.1.mpl.*"]}, r"did you mean .*layers.1.mlp"),
        ({"modules": ["layers.5.mlp.*"]}, "must name layers of the model"),
        ({"modules": ["*.layernorm_*"]}, "linear or convolutional layers.*LayerNorm"),
        ({"modules": []}, "empty list"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_must_be(config, message):
    with pytest.raises(PAIError, match=message):
        choose_layers(build(), PAICallback(config).config)


def test_the_defaults_are_those_that_make_dendrites_learn_and_the_preset_perforatedais():
    names = ("schedule", "max_dendrites", "last_growth", "activation", "initial_scale", "top_learning_rate")
    for config, values in (
        (PAIConfig(), ("early", 1, 0.5, "gelu", "fan_in", 10)),
        (PAIConfig.from_dict({"preset": "perforatedai"}), ("history", 3, 1, "sigmoid", 0.01, 1)),
        (PAIConfig.from_dict({"preset": "perforatedai", "activation": "gelu"}), ("history", 3, 1, "gelu", 0.01, 1)),
    ):
        assert tuple(getattr(config, name) for name in names) == values
    assert all(one.metadata["help"] for one in PAIConfig.__dataclass_fields__.values())


# Schedule


def test_early_growth_follows_the_steps_and_needs_no_evaluation(tmp_path):
    trainer = run(tmp_path, pai=EARLY, eval_strategy="no")
    assert [(entry["step"], entry["event"], entry["metric"]) for entry in history(trainer)] == [
        (3, "grown", None), (5, "grown", None),
    ]  # fmt: skip
    trainer = run(tmp_path, pai={"first_growth": 0}, max_steps=12, eval_strategy="epoch")
    assert [(entry["step"], entry["event"]) for entry in history(trainer)] == [(0, "grown"), (6, ""), (12, "")]
    assert trainer.state.global_step == 12  # stop_when_complete is not for this schedule


def test_growth_follows_the_evaluations(tmp_path):
    fixed = run(tmp_path / "fixed", pai=OFTEN | {"interval": 2}, eval_steps=1)
    assert [entry["step"] for entry in history(fixed) if entry["event"]] == [2, 4, 6, 8]
    often = run(tmp_path / "often", pai=OFTEN | {"max_dendrites": 9}, eval_steps=1)
    assert all(events(often)[:-1])
    # Learning nothing, the first evaluation is the best; two later there is growth, and two after its first the end.
    waits = {"schedule": "history", "patience": 2, "tries": 1, "last_growth": 1}
    ends = run(tmp_path / "history", pai=waits, eval_steps=1, learning_rate=0.0)
    assert events(ends) == ["", "", "grown", "", "", "complete"]
    assert ends.state.global_step == 7  # without a checkpoint due, the loop takes one more step, which is undone
    late = run(tmp_path / "late", pai=waits | {"last_growth": 0.4}, eval_steps=1, learning_rate=0.0)
    assert events(late) == ["", "", "grown"] + 7 * [""] and late.state.global_step == 10


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("schedule", ["history", "fixed"])
def test_events_are_those_of_perforatedais_own_tracker(schedule, greater, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PAIConfig(schedule=schedule, patience=2, interval=3, tries=2, max_dendrites=3)
    for seed in range(4):
        model, scores = build("cnn"), 0.5 + 0.1 * np.random.default_rng(seed).standard_normal(25).round(1)
        layers = pai_callback.probe_layers(model, {"input_values": torch.zeros(2, 16, 16)}, ["head"])
        with pai_callback._contained("a test"):
            globals_pai, utils = pai_callback._perforatedai()
            pai_callback._configure(config, layers, model.head.weight)
            for name, value in {
                "switch_mode": {"history": 1, "fixed": 2}[schedule], "n_epochs_to_switch": 2, "fixed_switch_num": 3,
                "max_dendrite_tries": 2, "max_dendrites": 3, "improvement_threshold": 0.001, "test_saves": False,
                "initial_history_after_switches": -1, "find_best_lr": False,
                "dont_give_up_unless_learning_rate_lowered": False,
            }.items():  # fmt: skip
                getattr(globals_pai.pc, f"set_{name}")(value)
            utils.perforate_model(model, save_name="PAI", making_graphs=False, maximizing_score=greater)
            model.head.set_this_output_dimensions([-1, 0])
            pai_callback._set_up_arrays(model.head, layers[0])
            ours, theirs, dendrites = [], [], 0
            for score in scores:
                optimizer = torch.optim.SGD(model.parameters())
                globals_pai.pai_tracker.set_optimizer_instance(optimizer)
                _, changed, complete = globals_pai.pai_tracker.add_validation_score(float(score), model)
                ours.append({"metric": score, "evaluated_dendrites": dendrites, "event": ""})
                ours[-1]["event"] = pai_callback._judge(ours, config, greater)[1]
                now = model.head.dendrite_modules_added
                theirs.append(
                    "complete" if complete else "" if not changed else "grown" if now > dendrites else "retried"
                )
                dendrites = now
                if complete:
                    break
        assert [entry["event"] for entry in ours] == theirs
        assert "grown" in theirs


@pytest.mark.parametrize(
    "changes", [{}, {"save_strategy": "steps"}, {"save_strategy": "best", "metric_for_best_model": "loss"}]
)
def test_a_complete_training_stops_with_the_best_weights(tmp_path, changes):
    once = OFTEN | {"max_dendrites": 1, "tries": 1}
    trainer = run(tmp_path, pai=once, learning_rate=5e-2, max_steps=60, save_steps=2, **changes)
    assert events(trainer)[-1] == "complete" and trainer.state.global_step < 60
    best = min(entry["metric"] for entry in history(trainer))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    if not changes:
        trainer = run(tmp_path, pai=once | {"stop_when_complete": False}, max_steps=16)
        assert "complete" in events(trainer) and trainer.state.global_step == 16
        assert_optimizer_holds_what_is_trained(trainer)


# Learn


@pytest.mark.parametrize("kind", ["ast", "cnn"])
def test_new_dendrites_are_drawn_as_wide_as_their_inputs_ask_for(kind, tmp_path):
    for scale, expected in (("fan_in", None), (0.2, 0.2)):
        pai = {"initial_scale": scale, "first_growth": 0}
        model = run(tmp_path, kind, pai, learning_rate=0.0, max_steps=2, eval_strategy="no").model
        for module in perforated_layers(model).values():
            new = module.dendrite_module.layers[0]
            fan_in = new.weight[0].numel()
            assert new.weight.std().item() == pytest.approx(expected or fan_in**-0.5, rel=0.3)
            assert new.bias.any().item() == (scale != "fan_in")


def groups(trainer) -> list[tuple]:
    found = trainer.optimizer.param_groups
    return [(g["initial_lr"], g["weight_decay"], tuple(g.get("pai", ())), len(g["params"])) for g in found]


def test_top_learns_ten_times_as_fast_without_weight_decay_in_groups_that_exist_from_the_start(tmp_path):
    first = []
    look = At("on_step_begin", lambda state, control, kwargs: first.append(len(kwargs["optimizer"].param_groups)))
    settings = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "warmup_steps": 2}
    mixin = run(tmp_path / "a", pai=EARLY, callbacks=[look], **settings)
    assert first[0] == 4 and groups(mixin)[2:] == [(0.1, 0.0, ("top", 0), 3), (0.1, 0.0, ("top", 1), 0)]
    assert [rate for rate, *_ in groups(mixin)[:2]] == [0.01, 0.01]
    # The plain Trainer has made its scheduler before the groups.
    plain = run(tmp_path / "b", pai=EARLY, trainer=Trainer, **settings)
    assert groups(plain) == groups(mixin) and plain.lr_scheduler.state_dict() == mixin.lr_scheduler.state_dict()
    assert_same(tensors(plain.model), tensors(mixin.model))
    slow = run(tmp_path / "c", pai=EARLY | {"top_learning_rate": 1})
    assert len(slow.optimizer.param_groups) == 2
    assert_optimizer_holds_what_is_trained(slow)


def test_dendrites_may_have_a_learning_rate_of_their_own(tmp_path, caplog):
    slow = {"learning_rate": 1e-6, "max_steps": 20, "eval_strategy": "no"}
    run(tmp_path / "a", pai={}, **slow)
    assert "step 4: the newest dendrites of audio_spectrogram_transformer.layers.1.mlp.fc1, " in caplog.text
    caplog.clear()
    trainer = run(tmp_path / "b", pai={"dendrite_learning_rate": 1e-2}, **slow)
    assert "hardly used" not in caplog.text
    assert groups(trainer)[2:] == [
        (0.1, 0.0, ("top", 0), 3), (0.01, 0.1, ("dendrites", 0), 3),
        (0.1, 0.0, ("top", 1), 0), (0.01, 0.0, ("dendrites", 1), 3),
    ]  # fmt: skip


def test_growth_keeps_the_optimizers_state(tmp_path):
    ages = []

    def look(state, control, kwargs):
        by_id = {id(p): value["step"].item() for p, value in kwargs["optimizer"].state.items()}
        named = kwargs["model"].named_parameters()
        ages.append({name: by_id[id(p)] for name, p in named if id(p) in by_id})

    for pai in (OFTEN | {"metric": "count"}, EARLY):
        run(tmp_path, pai=pai, callbacks=[At("on_step_end", look)], max_steps=8 if pai is EARLY else 6)
        head, final = "classifier.dense.", ages[-1]
        older, newer = (final[f"{head}dendrite_module.layers.{number}.weight"] for number in (0, 1))
        assert (final[f"{head}main_module.weight"], older) == ((8, 6) if pai is EARLY else (6, 4))
        assert newer == final[f"{head}dendrites_to_top.1"] == (4 if pai is EARLY else 2)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "gelu", "identity"])
def test_dendrites_compute_what_the_mathematics_says(activation, tmp_path):
    model = run(tmp_path, pai=EARLY | {"activation": activation, "modules": ["dense"]}, eval_strategy="no").model
    module = model.classifier.dense
    assert module.dendrite_modules_added == 2
    function = {"gelu": nn.functional.gelu, "identity": lambda x: x}.get(activation) or getattr(torch, activation)
    inputs = torch.randn(5, 16)
    logits(model)  # the model's forward says which activation is meant
    first, second = (layer(inputs) for layer in module.dendrite_module.layers)
    first = function(first)
    second = function(second + module.dendrite_module.dendrites_to_dendrites[1][0] * first)
    top = module.dendrites_to_top[-1]
    assert torch.equal(module(inputs), module.main_module(inputs) + first * top[0] + second * top[1])


def test_use_is_what_is_lost_without_the_features_of_dendrites(tmp_path):
    trainer = run(tmp_path, pai=EARLY | {"modules": ["dense"]}, max_steps=30, learning_rate=5e-2)
    use = measure_use(trainer)
    module, inputs, labels = trainer.model.classifier.dense, [], torch.tensor(trainer.eval_dataset.labels)
    hook = module.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    whole = logits(trainer.model, count=24)
    hook.remove()
    neurons = module.main_module(inputs[0])
    added = whole - neurons
    for name, scores in (
        ("score", whole), ("without_features", neurons + added.mean(0)), ("without_top", neurons),
    ):  # fmt: skip
        expected = nn.functional.cross_entropy(scores, labels).item()
        assert use[name] == pytest.approx(expected, rel=1e-4)
    assert use["lost"] == pytest.approx(use["without_features"] - use["score"]) and use["used"] == (
        use["lost"] > 0.01 * use["score"]
    )
    spreads = [part.var(0, correction=0).mean().sqrt() for part in (added, neurons)]
    assert use["layers"] == {"classifier.dense": pytest.approx((spreads[0] / sum(spreads)).item(), rel=1e-3)}
    assert torch.equal(logits(trainer.model, count=24), whole)  # the model is as before
    assert measure_use(run(tmp_path, pai={"max_dendrites": 0})) is None
    points = {"use": use | {"metric": "accuracy", "lost": 0.152, "used": True}}
    assert use_sentence(points) == "The dendrites are used: 15.2 points of accuracy are lost without their features."
    assert use_sentence(None) is None and "the loss rises by" in use_sentence({"use": use})


# Say


def test_tensorboard_shows_growth(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = run(tmp_path / "run", pai=EARLY, report_to="tensorboard")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    shown = {point.step: point.value for point in board.Scalars("train/pai/dendrites")}
    assert shown == {entry["step"]: entry["dendrites"] for entry in history(trainer)}
    assert set(shown.values()) == {0, 1, 2} and "train/pai/parameters" in board.Tags()["scalars"]


def test_perforatedai_prints_nothing_and_writes_nothing(tmp_path, capfd, monkeypatch):
    for name in ("here", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    moves = []  # other threads, such as TensorBoard's writer, use the working directory
    monkeypatch.setattr("os.chdir", moves.append)
    run(tmp_path / "run", pai=OFTEN, max_steps=20)
    assert moves == []
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if not line.startswith("{")]
    ours = ("Dendrites: up to 3 per layer (fixed, gelu) on audio", "Dendrites, step")
    assert len(lines) > 2 and [line for line in lines if not line.startswith(ours)] == []
    assert "PAI" not in captured.out + captured.err and "perforat" not in (captured.out + captured.err).lower()
    assert [path for path in tmp_path.glob("*/*") if path.name != "run"] == []


def test_where_perforatedai_would_ask_or_exit_it_raises_with_its_words():
    globals_pai, utils = pai_callback._perforatedai()
    globals_pai.pai_tracker = []
    for act, message in (
        (lambda: utils.perforate_model(build(), save_name="a/b"), "SystemExit.*'a/b' contains '/'"),
        (lambda: utils.load_net_from_dict(build("cnn"), {}), "(?s)asked.*does not have any pai_modules"),
        (lambda: input("Really? "), "asked for input"),
    ):
        with pytest.raises(PAIError, match=message), pai_callback._contained("a test"):
            act()


# Hold


@pytest.mark.parametrize(
    ("kind", "pai", "changes"),
    [
        ("ast", OFTEN, {"bf16": True}),
        ("cnn", EARLY, {"bf16": True}),
        ("vit", EARLY, {"activation_checkpointing": True}),
        ("cnn", OFTEN, {"torch_compile": True, "torch_compile_backend": "eager"}),
        ("ast", EARLY, {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}),
        ("ast", OFTEN, {"save_strategy": "best", "metric_for_best_model": "loss", "load_best_model_at_end": True}),
        ("ast", EARLY, {"optim": "sgd", "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}),
        ("ast", EARLY, {"optim": "adafactor"}),
    ],
    ids=lambda value: "" if isinstance(value, dict) and "schedule" in value else "-".join(value)[:40],
)
def test_growth_holds_with(kind, pai, changes, tmp_path):
    trainer = run(tmp_path, kind, pai, **{"learning_rate": 3e-2, "max_steps": 12} | changes)
    assert "grown" in events(trainer)
    if not changes.get("load_best_model_at_end"):
        assert_dendrites_learned(trainer.model)
        assert_optimizer_holds_what_is_trained(trainer)


def test_accumulated_gradients_grow_what_a_larger_batch_grows(tmp_path):
    settings = {"pai": EARLY, "optim": "sgd"}
    whole = run(tmp_path / "1", **settings)
    parts = run(tmp_path / "2", **settings, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert events(whole) == events(parts)
    for name, tensor in tensors(whole.model).items():
        assert torch.allclose(tensor, parts.model.state_dict()[name], atol=1e-5), name


SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
RESUMED = {
    "early, between evaluations": ("ast", EARLY | {"dendrite_learning_rate": 5e-3}, {"eval_steps": 3, "max_steps": 5}),
    "early, saved when best": (
        "ast",
        EARLY,
        {"save_strategy": "best", "metric_for_best_model": "loss", "eval_steps": 1},
    ),
    "cnn, often": ("cnn", OFTEN, {"warmup_steps": 2, "max_steps": 5}),
    "bert, tries over, dropout, bf16": (
        "bert",
        OFTEN | {"tries": 1, "max_dendrites": 2},
        {"bf16": True, "learning_rate": 5e-2},
    ),
    "vit, eval between saves": ("vit", OFTEN | {"interval": 2}, {"eval_steps": 1, "save_steps": 3}),
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
        assert history(again) == history(whole)
        if "complete" not in events(whole):
            assert_same_optimizer(whole, again)


def assert_same_optimizer(first: Trainer, second: Trainer):
    one, other = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for key, values in one["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other["state"][key][n])) for n, v in values.items())


def test_a_resume_after_a_kill_in_the_middle_of_growth_is_tensor_identical(tmp_path):
    def kill(state, control, kwargs):
        if state.global_step == 4 and "pai/dendrites" in kwargs["logs"]:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = {"pai": OFTEN} | SAVED | {"save_steps": 2}
    whole = run(tmp_path / "whole", **settings)
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(tmp_path / "killed",), kwargs={"callbacks": [At("on_log", kill)]} | settings
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    assert json.loads((checkpoint / STATE_FILE).read_text())["pending"]["metric"] == history(whole)[1]["metric"]
    again = run(tmp_path / "killed", resume=checkpoint, **settings)
    assert_same(tensors(whole.model), tensors(again.model))
    assert_same_optimizer(whole, again)


def test_the_best_model_is_loaded_exactly_whatever_its_number_of_dendrites(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    pai = OFTEN | {"metric": "count", "max_dendrites": 4}
    trainer = run(tmp_path, pai=pai, metric_for_best_model="second", greater_is_better=True, **saving)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4" and history(trainer)[-1]["dendrites"] == 4
    assert set(structure_of(trainer.model).values()) == {1}
    assert_same(tensors(trainer.model), load_file(best / "model.safetensors"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of a run with perforatedai's own settings."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, pai=OLD, **SAVED | {"max_steps": 4, "save_steps": 4})
    return folder / "checkpoint-4"


OLD = {"preset": "perforatedai", "schedule": "fixed", "interval": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": ["dense"]}, "modules must be .*mlp.fc1.* was written with it, got .'classifier.dense'."),
        ({"activation": "tanh"}, "activation must be sigmoid, as .* was written with it, got tanh"),
        ({"top_learning_rate": 10}, "top_learning_rate must be 1, .* got 10"),
        ("a tensor less", r"missing \['classifier.dense.dendrites_to_top.0'\].*left over \['stray'\]"),
        ("an older version", "cannot be resumed by this pai_callback.py .KeyError.'config'.*or set max_dendrites: 0"),
        ("no dendrites", "cannot be resumed by this pai_callback.py .*No such file"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, tmp_path, changes, message):
    checkpoint = shutil.copytree(saved, tmp_path / "checkpoint-4")
    if changes == "a tensor less":
        state = load_file(checkpoint / "model.safetensors")
        state["stray"] = state.pop("classifier.dense.dendrites_to_top.0")
        save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    elif changes == "an older version":
        state = json.loads((checkpoint / STATE_FILE).read_text())
        (checkpoint / STATE_FILE).write_text(json.dumps({key: state[key] for key in state if key != "config"}))
    elif changes == "no dendrites":
        (checkpoint / STATE_FILE).unlink()
    with pytest.raises(PAIError, match=message):
        run(tmp_path, pai=OLD | (changes if isinstance(changes, dict) else {}), resume=checkpoint, max_steps=6)


class NoProcessor:
    def save_pretrained(self, folder):
        pass


def test_dendrites_learn_at_the_rate_of_their_layer_in_a_trainer_with_many_groups(tmp_path):
    def options(model):
        rates = {name: 1e-2 if name.startswith("classifier") else 1e-3 for name, _ in model.named_parameters()}
        return {"model": model, "options": {"learning_rates": rates, "processing_class": NoProcessor()}}

    common = {"pai": EARLY, "trainer": train.DendriticAudioTrainer, **SAVED, "max_steps": 6, "save_steps": 2}
    whole = run(tmp_path, **common, **options(build()))
    names = {id(p): name for name, p in whole.model.named_parameters()}
    assert len(whole.optimizer.param_groups) == 8
    for group in whole.optimizer.param_groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            top = "dendrites_to_top" in name
            rate = 1e-2 if name.startswith("classifier") else 1e-3
            assert group["initial_lr"] == pytest.approx(10 * rate if top else rate)
            if "dendrite" in name:
                assert group["weight_decay"] == (0.0 if name.endswith("bias") or top else 0.1)
    assert any("dendrites_to_top" in name for name in names.values())
    again = run(tmp_path / "again", resume=tmp_path / "checkpoint-2", **common, **options(build()))
    assert_same(tensors(whole.model), tensors(again.model))


def test_dendrites_grow_on_frozen_layers(tmp_path):
    model = build()
    model.audio_spectrogram_transformer.requires_grad_(False)
    before = tensors(model)
    trainer = run(tmp_path, pai=EARLY, model=model)
    assert_dendrites_learned(trainer.model)
    after = plain(tensors(trainer.model))
    assert_same(*({name: t for name, t in state.items() if name.startswith("audio")} for state in (before, after)))


# Two processes

SCHEDULES = {"early": EARLY, "often": OFTEN}
DISTRIBUTED = {"optim": "sgd", "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
               "metric_for_best_model": "loss", "learning_rate": 5e-2, "save_total_limit": None}  # fmt: skip


def train_rank(rank: int, folder: Path, port: int) -> None:
    """What a rank does: for each schedule a run, and its resume from a checkpoint at which it grows."""
    for state in (AcceleratorState, PartialState):
        state._shared_state.clear()  # of the process that was forked
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    for name, pai in SCHEDULES.items():
        whole = run(folder / name, pai=pai, **DISTRIBUTED)
        assert whole.args.world_size == 2
        again = run(folder / f"{name}-again", pai=pai, resume=folder / name / "checkpoint-4", **DISTRIBUTED)
        for which, trainer in (("whole", whole), ("again", again)):
            save_file(tensors(trainer.model), folder / f"{name}-{which}-{rank}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(events(whole)))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder in which two gloo ranks left what they trained."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("two")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [multiprocessing.get_context("fork").Process(target=train_rank, args=(n, folder, port)) for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return folder


@pytest.mark.parametrize("schedule", ["early", "often"])
def test_two_processes_equal_one_with_twice_the_batch(two_processes, schedule, tmp_path):
    one = run(tmp_path, pai=SCHEDULES[schedule], **DISTRIBUTED | {"per_device_train_batch_size": 8})
    told = json.loads((two_processes / f"{schedule}.json").read_text())
    assert told == events(one) and "grown" in told
    two = load_file(two_processes / f"{schedule}-whole-0.safetensors")
    for name, tensor in tensors(one.model).items():
        assert torch.allclose(tensor, two[name], atol=1e-5), name


@pytest.mark.parametrize("schedule", ["early", "often"])
def test_ranks_are_identical_and_a_resume_is_tensor_identical(two_processes, schedule):
    whole, *others = (
        load_file(two_processes / f"{schedule}-{which}.safetensors")
        for which in ("whole-0", "whole-1", "again-0", "again-1")
    )
    assert any("dendrites_to_top" in name and tensor.abs().sum() > 0 for name, tensor in whole.items())
    for other in others:
        assert_same(whole, other)


# Recipes


def test_a_recipe_with_a_pai_block_grows_and_resumes(tones, tmp_path):
    recipe = TONES | {
        "dataset": str(tones), "max_length": 48, "model_config": TINY_AST, "per_device_train_batch_size": 2,
        "num_train_epochs": 3, "learning_rate": 1e-2, "precision": "fp32", "preprocessing_num_workers": 1,
        "head_learning_rate": 2e-2, "mixup_alpha": 0.5, "save_total_limit": None, "load_best_model_at_end": False,
        "pai": {"first_growth": 0.34},
    }  # fmt: skip
    for name in ("whole", "again"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(tmp_path / name)}))
    train.main(parse_recipe([str(tmp_path / "whole.yaml")]))
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    exported = AutoModelForAudioClassification.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    assert exported.config.model_type == "dendritic-audio-spectrogram-transformer"
    assert metrics["parameters"] == sum(parameter.numel() for parameter in exported.parameters())
    assert set(metrics["dendrites"]["layers"].values()) == {1}
    assert metrics["dendrites"]["use"]["metric"] == "accuracy" and len(metrics["dendrites"]["use"]["layers"]) == 3
    assert "**The dendrites are " in (tmp_path / "whole" / "README.md").read_text()
    assert (tmp_path / "whole" / "dendrites.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    train.main(parse_recipe([str(tmp_path / "again.yaml"), "--resume_from_checkpoint", str(checkpoint)]))
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again")))


def test_the_dendritic_recipes_are_their_baselines_with_a_pai_block():
    for path in ROOT.glob("configs/*/*_pai.yaml"):
        baseline, grown = read_yaml(path.with_name(path.name.replace("_pai", ""))), read_yaml(path)
        PAIConfig.from_dict(grown["pai"])
        assert grown.keys() - baseline.keys() == {"pai"} and baseline | {"pai": grown["pai"]} == grown


# Refuse


class Unused(SmallCNN):
    """With a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(2, 2)


def optimized(kind: type, parameters: Callable) -> Callable:
    """A change of a trainer: an optimizer of its own."""
    return lambda trainer: setattr(trainer, "optimizer", kind(parameters(trainer.model), lr=0.1))


def argument(name: str, value: Any) -> Callable:
    """A change of a trainer: an argument that would need several devices."""
    return lambda trainer: setattr(trainer.args, name, value)


SPLIT = "nn.DataParallel, FSDP and DeepSpeed cannot follow growth"
BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"pai": OFTEN | {"metric": "acuracy"}}, None, "got 'eval_acuracy' .did you mean 'eval_accuracy'"),
        ({"pai": OFTEN, "eval_strategy": "no"}, None, "eval_strategy must be steps or epoch"),
        ({"auto_find_batch_size": True}, None, "auto_find_batch_size"),
        ({"pai": {"modules": ["never"]}, "kind": "cnn", "model": Unused()}, None, "never calls never"),
        ({}, optimized(torch.optim.LBFGS, nn.Module.parameters), "optimizer LBFGS cannot take new parameters .Type"),
        (
            {},
            optimized(torch.optim.Adagrad, nn.Module.parameters),
            "Adagrad cannot take new parameters .KeyError.'sum'",
        ),
        ({"optim": "adagrad"}, None, "the optimizer Adagrad cannot take new parameters"),
        (
            {},
            optimized(torch.optim.SGD, lambda m: m.classifier.parameters()),
            "it does not hold all trained parameters",
        ),
        ({}, argument("_n_gpu", 2), SPLIT),
        ({}, argument("fsdp", ["full_shard"]), SPLIT),
        ({}, argument("deepspeed", {"zero_optimization": {}}), SPLIT),
        ({"trainer": Trainer} | BEST, None, "load_best_model_at_end.*need PAITrainer"),
        ({"trainer": Trainer}, argument("push_to_hub", True), "pushes while it trains need PAITrainer"),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(settings, change, message, tmp_path):
    trainer = trainer_for(tmp_path, **{"pai": {}} | settings)
    if change is not None:
        change(trainer)
    with pytest.raises(PAIError, match=message):
        trainer.train()


def test_an_optimizer_whose_state_is_sharded_cannot_follow_growth():
    """accelerate refuses it before, because it reads the state of each optimizer."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer(build().parameters(), torch.optim.AdamW, lr=0.1)
        assert growth_fault(optimizer) == "they stay as they are"
    finally:
        distributed.destroy_process_group()


def test_a_plain_trainer_says_that_it_cannot_resume_dendrites(tmp_path):
    """Its checkpoints are models, as `save_model` writes them."""
    saving = SAVED | {"save_steps": 2, "max_steps": 4, "trainer": Trainer}
    run(tmp_path, "bert", {}, **saving)
    with pytest.raises(PAIError, match="Trainer cannot resume a checkpoint with dendrites: .* with PAITrainer"):
        run(tmp_path, "bert", {}, resume=tmp_path / "checkpoint-2", **saving | {"max_steps": 6})


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_what_is_pushed_while_it_trains_loads_as_a_model(strategy, online, tmp_path):
    pushed = []

    def load(state, control, kwargs):
        kwargs["trainer"]._finish_current_push()
        model = AutoModelForSequenceClassification.from_pretrained("me/bert", trust_remote_code=True)
        pushed.append(len(getattr(model.config, "dendrites", {})))
        assert torch.equal(logits(model, "bert"), logits(kwargs["model"], "bert"))  # growth has changed no score

    look = At("on_save", load)
    settings = SAVED | {"push_to_hub": True, "hub_model_id": "me/bert", "hub_strategy": strategy, "save_steps": 3}
    look.trainer = trainer_for(tmp_path / "bert", "bert", EARLY, callbacks=[look], max_steps=7, **settings)
    if strategy == "checkpoint":
        with pytest.raises(PAIError, match="hub_strategy must be end or every_save, .* got checkpoint"):
            look.trainer.train()
    else:
        look.trainer.train()
        assert pushed == [3, 3, 3]


def test_perforatedbp_is_refused(tmp_path, monkeypatch):
    (tmp_path / "perforatedbp").mkdir()
    (tmp_path / "perforatedbp" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PAIError, match="without perforatedbp"):
        PAICallback()


# Clean up


def test_two_trainings_at_the_same_time_do_not_touch_each_other(tmp_path):
    alone = run(tmp_path / "0", "vit", EARLY | {"activation": "tanh"})
    other = trainer_for(tmp_path / "1", pai=EARLY | {"activation": "relu"})

    def train_another(state, control, kwargs):
        if state.global_step == 4:  # between the first and the second dendrite
            other.train()

    whole = run(tmp_path / "2", "vit", EARLY | {"activation": "tanh"}, callbacks=[At("on_step_end", train_another)])
    assert_same(tensors(alone.model), tensors(whole.model))
    assert other.evaluate()["eval_loss"] > 0 and "grown" in events(other)
