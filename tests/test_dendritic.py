"""The exported form against live perforatedai, which none of this mocks."""

import contextlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
from conftest import TINY_AST, TINY_VIT, tone
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForAudioClassification,
)

from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.dendritic import (
    ACTIVATIONS,
    DendriticASTConfig,
    DendriticASTForAudioClassification,
    DendriticConv2d,
    DendriticLinear,
)
from audio_dendrites.models.vit import MelViTConfig, MelViTForAudioClassification
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification
from audio_dendrites.publishing.export import (
    ExportError,
    current_activation,
    dendritic_copy,
    dendritic_tensors,
    export_dendritic,
)

with contextlib.redirect_stdout(io.StringIO()):
    GPA = pytest.importorskip("perforatedai.globals_perforatedai")
    UPA = pytest.importorskip("perforatedai.utils_perforatedai")

FC1, FC2 = "audio_spectrogram_transformer.layers.1.mlp.fc1", "audio_spectrogram_transformer.layers.1.mlp.fc2"
O_PROJ = "audio_spectrogram_transformer.layers.0.attention.o_proj"
PATCHES = "audio_spectrogram_transformer.embeddings.patch_embeddings.projection"
HEAD = "classifier.dense"
EVERYWHERE = (HEAD, FC1, FC2, O_PROJ, PATCHES)
FRAMES = 48


@contextlib.contextmanager
def perforatedai(activation="sigmoid"):
    """perforatedai as new, silent, in a folder of its own."""
    GPA.pc.__init__()
    GPA.pai_tracker = []
    settings = {
        "configuration_confirmed": True, "unwrapped_modules_confirmed": True, "weight_decay_accepted": True,
        "testing_dendrite_capacity": False, "silent": True, "test_saves": False, "drawing_pai": False,
        "device": torch.device("cpu"), "use_cuda": False, "module_names_to_perforate": [],
        "pai_forward_function": ACTIVATIONS[activation],
    }  # fmt: skip
    for name, value in settings.items():
        getattr(GPA.pc, f"set_{name}")(value)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def grow(model, forward, counts, activation="sigmoid", tracked=()):
    """Put dendrites, `counts` by module name, on a model, and random numbers in every parameter of it.

    Args:
        forward: Runs the model and gives a scalar.
        tracked: Modules that perforatedai wraps without dendrites.
    """
    axes = {name: 1 if isinstance(model.get_submodule(name), nn.Conv2d) else -1 for name in counts}
    ranks, hooks = {}, []
    for name in counts:
        note = lambda module, inputs, output, name=name: ranks.update({name: output.dim()})  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_hook(note))
    forward()
    for hook in hooks:
        hook.remove()
    with perforatedai(activation):
        GPA.pc.set_module_ids_to_perforate([f".{name}" for name in counts])
        GPA.pc.set_module_ids_to_track([f".{name}" for name in tracked])
        UPA.perforate_model(model, save_name="PAI", making_graphs=False)
        modules = {name: model.get_submodule(name) for name in counts}
        for name, module in modules.items():
            dimensions = [-1] * ranks[name]
            dimensions[axes[name]] = 0
            module.set_this_output_dimensions(dimensions)
        forward().backward()
        for name, module in modules.items():
            # perforatedai forgets this one: a second dendrite then fails on all but (batch, tokens, neurons).
            module.dendrite_module.this_node_index.copy_(module.this_node_index)
            for values in module.dendrite_module.dendrite_values:
                shape = values.dendrite_storage_shape.tolist()
                values.setup_arrays(shape)
                values.current_d_init[0] = 1
            if counts[name]:
                UPA.simulate_cycles(module, 2 * counts[name], True)
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return modules


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where perforatedai writes
    torch.manual_seed(0)


def inputs(batch=2):
    return torch.randn(batch, FRAMES, 128, generator=torch.Generator().manual_seed(1))


def tiny_ast(**fields):
    return ASTForAudioClassification(ASTConfig(max_length=FRAMES, num_labels=3, **TINY_AST, **fields))


def live_ast(counts, activation="sigmoid", tracked=()):
    """A tiny AST with dendrites of perforatedai, in evaluation mode."""
    model = tiny_ast()
    grow(model, lambda: model(inputs(), labels=torch.tensor([0, 1])).loss, counts, activation, tracked)
    return model.eval()


@pytest.fixture
def exported(tmp_path):
    """A live model and the folder it was exported to."""
    live, folder = live_ast({HEAD: 2, FC1: 1, FC2: 3, O_PROJ: 2, PATCHES: 1}), tmp_path / "exported"
    export_dendritic(live, folder, ASTFeatureExtractor(max_length=FRAMES))
    return live, folder


def logits(model, values=None):
    with torch.no_grad():
        return model(inputs() if values is None else values).logits


def difference(first, second):
    """Largest difference as a share of the largest value."""
    return ((first - second).abs().max() / second.abs().max()).item()


LAYERS = {
    "linear": (lambda: nn.Linear(33, 5), (4, 7, 33), DendriticLinear),
    "linear without bias": (lambda: nn.Linear(64, 48, bias=False), (4, 7, 64), DendriticLinear),
    "linear on a batch of vectors": (lambda: nn.Linear(32, 3), (4, 32), DendriticLinear),
    "convolution": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 12, 9), DendriticConv2d),
    "convolution in groups": (lambda: nn.Conv2d(4, 8, (3, 2), groups=2, dilation=2), (2, 4, 12, 9), DendriticConv2d),
}


def live_layer(layer, count, activation="sigmoid"):
    """A layer of perforatedai with dendrites, the exported one, and inputs."""
    plain, shape, kind = LAYERS[layer]
    model, values = nn.Sequential(plain()), torch.randn(LAYERS[layer][1])
    ours = kind(model[0], count, activation)
    grow(model, lambda: model(values).sum(), {"0": count}, activation)
    ours.load_state_dict(dendritic_tensors(model[0]))
    return model[0], ours, values


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_gives_what_perforatedai_gives_to_the_bit(layer, count, activation):
    live, ours, values = live_layer(layer, count, activation)
    assert torch.equal(ours(values), live(values))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(values), live(values)) and ours(values).dtype == live(values).dtype
    ours.top.data.zero_()
    assert not torch.equal(ours(values), live(values))  # the dendrites weigh something


def test_gradients_are_those_of_perforatedai():
    live, ours, values = live_layer("linear", 3, "tanh")
    for layer in (live, ours):
        layer(values).square().sum().backward()
    layers = [live.main_module, *live.dendrite_module.layers]
    torch.testing.assert_close(ours.weight.grad, torch.cat([layer.weight.grad for layer in layers]))
    torch.testing.assert_close(ours.top.grad, live.dendrites_to_top[2].grad)
    d2d = live.dendrite_module.dendrites_to_dendrites
    torch.testing.assert_close(ours.d2d.grad, torch.cat([d2d[1].grad, d2d[2].grad]))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_product_is_exact_to_1e_6_in_evaluation(layer, count):
    live, ours, values = live_layer(layer, count)
    ours.one_product = True
    assert difference(ours.eval()(values), live(values)) < 1e-6


def test_one_product_is_left_where_it_would_not_be_exact():
    live, ours, values = live_layer("linear", 2)
    ours.one_product = True
    products = []
    ours._multiply = lambda *arguments: products.append(0) or functional.linear(*arguments)
    ways = {}
    for name, mode, autocast, dtype in (
        ("evaluation", False, False, torch.float32), ("training", True, False, torch.float32),
        ("autocast", False, True, torch.float32), ("bfloat16", False, False, torch.bfloat16),
    ):  # fmt: skip
        products.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours.train(mode).to(dtype)(values.to(dtype))
        ways[name] = len(products)
    assert ways == {"evaluation": 1, "training": 3, "autocast": 3, "bfloat16": 3}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_exported_model_gives_the_logits_of_the_live_one_to_the_bit(count, activation):
    live = live_ast(dict.fromkeys(EVERYWHERE, count), activation)
    copy = dendritic_copy(live)
    assert torch.equal(logits(copy), logits(live)) and copy.config.dendrites[HEAD] == {
        "count": count, "activation": activation,
    }  # fmt: skip
    assert torch.equal(copy.train()(inputs()).logits, live.train()(inputs()).logits)


def test_copying_touches_neither_the_live_model_nor_the_random_state():
    live = live_ast({HEAD: 1, FC1: 2})
    before, state = logits(live), torch.get_rng_state()
    copy = dendritic_copy(torch.compile(live, backend="eager"))
    assert torch.equal(torch.get_rng_state(), state)
    for parameter in copy.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(live), before)


def test_a_folder_holds_the_model_its_code_and_nothing_else(exported):
    _, folder = exported
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "dendritic.py", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "dendritic-audio-spectrogram-transformer"
    assert config["dendrites"][FC2] == {"count": 3, "activation": "sigmoid"}
    assert config["auto_map"] == {
        "AutoConfig": "dendritic.DendriticASTConfig",
        "AutoModelForAudioClassification": "dendritic.DendriticASTForAudioClassification",
    }


@pytest.mark.parametrize("old_names", [True, False])
def test_save_pretrained_goes_round_under_old_and_new_tensor_names(exported, tmp_path, old_names):
    live, folder = exported
    for again in ("first", "second"):
        model = AutoModelForAudioClassification.from_pretrained(folder)
        assert type(model) is DendriticASTForAudioClassification
        assert torch.equal(logits(model), logits(live))
        folder = tmp_path / again
        model.save_pretrained(folder, save_original_format=old_names)
        assert {path.name for path in folder.iterdir()} == {"config.json", "dendritic.py", "model.safetensors"}
    prefix = "audio_spectrogram_transformer."
    name = f"{prefix}encoder.layer.1.output.dense.d2d" if old_names else f"{FC2}.d2d"
    assert torch.equal(load_file(folder / "model.safetensors")[name], model.get_submodule(FC2).d2d)


STRANGER = """
import sys

class Blocked:  # also where the environment has them installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("perforatedai", "audio_dendrites", "pai_callback"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from functools import partial
import numpy, torch
from transformers import AutoModelForAudioClassification, pipeline

folder, waveform, values, answer = sys.argv[1:]
for trust in ({}, {"trust_remote_code": False}):
    for load in (AutoModelForAudioClassification.from_pretrained, partial(pipeline, "audio-classification")):
        try:
            load(folder, **trust)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("loaded without trust_remote_code")

classify = pipeline("audio-classification", model=folder, trust_remote_code=True)
scores = {found["label"]: found["score"] for found in classify(numpy.load(waveform))}
with torch.no_grad():
    logits = classify.model(torch.from_numpy(numpy.load(values))).logits
classify.model.save_pretrained(folder + "-again")
again = AutoModelForAudioClassification.from_pretrained(folder + "-again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(torch.from_numpy(numpy.load(values))).logits, logits)
loss = again.train()(torch.from_numpy(numpy.load(values)), labels=torch.tensor([0, 1])).loss
loss.backward()
assert all(parameter.grad is not None for parameter in again.parameters())
assert not {"perforatedai", "audio_dendrites"} & set(sys.modules)
numpy.savez(answer, logits=logits.numpy(), labels=list(scores), scores=list(scores.values()))
"""


def test_a_stranger_loads_it_with_pipeline_and_gets_the_training_models_logits(exported, tmp_path):
    """In a process that has neither perforatedai nor this repository, and with its trust."""
    live, folder = exported
    script, waveform = tmp_path / "stranger.py", tone(440).astype(np.float32)
    script.write_text(STRANGER)
    np.save(tmp_path / "waveform.npy", waveform)
    np.save(tmp_path / "values.npy", inputs().numpy())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    files = [tmp_path / name for name in ("waveform.npy", "values.npy", "answer.npz")]
    answer = subprocess.run(
        [sys.executable, "-P", script, folder, *files],
        cwd=tmp_path, env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    found = np.load(tmp_path / "answer.npz")
    assert np.array_equal(found["logits"], logits(live).numpy())
    extractor = ASTFeatureExtractor.from_pretrained(folder)
    values = extractor(waveform, sampling_rate=16000, return_tensors="pt")["input_values"]
    expected = pandas.Series(logits(live, values).softmax(-1)[0].tolist(), ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert expected[found["labels"]].tolist() == found["scores"].tolist()


def test_a_class_without_dendrites_refuses_the_folder(exported):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ASTForAudioClassification.from_pretrained(exported[1])


@pytest.mark.parametrize("change", ["a tensor fewer", "a dendrite fewer in the configuration", "one layer less listed"])
def test_weights_that_are_not_the_configurations_are_an_error(exported, change):
    _, folder = exported
    if change == "a tensor fewer":
        tensors = load_file(folder / "model.safetensors")
        del tensors["classifier.dense.top"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        if change == "one layer less listed":
            del config["dendrites"][HEAD]
        else:
            config["dendrites"][HEAD]["count"] = 1
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match="missing classifier.dense.top|ignore_mismatched_sizes"):
        AutoModelForAudioClassification.from_pretrained(folder)


def test_a_head_for_other_classes_begins_fresh_and_the_other_dendrites_stay(exported):
    live, folder = exported
    model = AutoModelForAudioClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    head = model.get_submodule(HEAD)
    assert head.top.shape == (2, 5) and not head.top.any() and not head.d2d.any() and head.weight.std() > 0.01
    assert torch.equal(model.get_submodule(FC2).top, live.get_submodule(FC2).dendrites_to_top[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_goes_round(exported, tmp_path, dtype):
    live, folder = exported
    model = AutoModelForAudioClassification.from_pretrained(folder, dtype=dtype)
    found = logits(model, inputs().to(dtype))
    assert found.dtype == dtype and difference(found.float(), logits(live)) < 0.05
    model.save_pretrained(tmp_path / "half")
    again = AutoModelForAudioClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype and torch.equal(logits(again, inputs().to(dtype)), found)
    with torch.autocast("cpu", dtype):
        whole = AutoModelForAudioClassification.from_pretrained(folder)
        assert torch.equal(logits(whole), logits(live))


def test_the_whole_model_compiles_as_one_graph_and_exports(exported):
    live, folder = exported
    for one_product in (False, True):
        model = AutoModelForAudioClassification.from_pretrained(folder, one_product=one_product)
        assert model.get_submodule(FC1).one_product == one_product
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        program = torch.export.export(model, (inputs(),)).module()
        with torch.no_grad():
            assert difference(compiled(inputs()).logits, logits(live)) < 1e-5
            assert difference(program(inputs()).logits, logits(live)) < 1e-5
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    compiled(inputs(), labels=torch.tensor([0, 1])).loss.backward()


def test_it_fine_tunes_further(exported):
    model = AutoModelForAudioClassification.from_pretrained(exported[1]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for _ in range(5):
        loss = model(inputs(), labels=torch.tensor([0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # The keys' biases cancel in the softmax of attention: all else has learned.
    same = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert all(name.endswith("k_proj.bias") for name in same)


def test_with_no_dendrites_the_plain_model_is_written(tmp_path):
    for number, model in enumerate([tiny_ast().eval(), live_ast({HEAD: 0, FC1: 0})]):
        folder = tmp_path / f"plain-{number}"
        export_dendritic(model, folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "audio-spectrogram-transformer" and "auto_map" not in config
        plain = AutoModelForAudioClassification.from_pretrained(folder)
        assert type(plain) is ASTForAudioClassification and torch.equal(logits(plain), logits(model))


def test_a_layer_on_which_nothing_grew_is_written_as_the_plain_layer():
    live = live_ast({HEAD: 1, FC1: 0})
    copy = dendritic_copy(live)
    assert set(copy.config.dendrites) == {HEAD} and type(copy.get_submodule(FC1)) is nn.Linear
    assert torch.equal(logits(copy), logits(live))


def test_modules_that_perforatedai_only_tracks_come_out_as_they_were():
    live = live_ast({HEAD: 1, FC1: 2}, tracked=["audio_spectrogram_transformer.layers.0", "classifier.layernorm"])
    assert any("main_module.attention" in name for name, _ in live.named_parameters())
    copy = dendritic_copy(live)
    assert torch.equal(logits(copy), logits(live)) and not any("main_module" in name for name in copy.state_dict())


FAMILIES = {
    "cnn14": (
        lambda: CNN14ForAudioClassification(CNN14Config(width=0.0625, num_hidden_layers=3, num_mel_bins=128)),
        {"classifier": 2, "layers.2.conv2": 1, "layers.0.conv1": 2, "fc1": 3},
        {"cnn14.py", "dendritic.py"},
    ),
    "vit": (
        lambda: MelViTForAudioClassification(MelViTConfig(**TINY_VIT)),
        {"classifier": 2, "vit.layers.1.mlp.fc1": 1, "vit.embeddings.patch_embeddings.projection": 1},
        {"vit.py", "dendritic.py"},
    ),
    "waveform": (
        lambda: WaveformForAudioClassification(
            WaveformConfig(backbone=ASTConfig(max_length=FRAMES, **TINY_AST), max_length=FRAMES)
        ),
        {f"backbone.{HEAD}": 2, f"backbone.{FC1}": 1},
        {"cnn14.py", "dendritic.py", "vit.py", "waveform.py"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_this_project_are_exported_as_what_they_are(family, tmp_path):
    make, counts, files = FAMILIES[family]
    live = make()
    values = torch.randn(2, 8000) if family == "waveform" else inputs()
    grow(live, lambda: live(values, labels=torch.tensor([0, 1])).loss, counts)
    live.eval()
    export_dendritic(live, tmp_path / "exported")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == files | {"config.json", "model.safetensors"}
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "exported")
    assert type(model) is type(live) and {name: d["count"] for name, d in model.config.dendrites.items()} == counts
    assert torch.equal(logits(model, values), logits(live, values))
    again = dendritic_copy(make().eval())
    assert type(again) is type(live) and not again.config.dendrites
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".top"))]
    save_file(tensors, tmp_path / "exported" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the weights are not those of this configuration"):
        AutoModelForAudioClassification.from_pretrained(tmp_path / "exported")


def test_an_export_over_an_older_one_replaces_it_and_leaves_other_files(exported):
    _, folder = exported
    (folder / "metrics.json").write_text("{}")
    other = live_ast({HEAD: 1})
    export_dendritic(other, folder)
    assert (folder / "metrics.json").read_text() == "{}" and not list(folder.glob(".model-*"))
    assert torch.equal(logits(AutoModelForAudioClassification.from_pretrained(folder)), logits(other))


def test_what_cannot_be_exported_says_why():
    with pytest.raises(ExportError, match="found a Linear, wanted an ASTForAudioClassification"):
        dendritic_copy(nn.Linear(2, 2))
    live = live_ast({"classifier": 1})
    with pytest.raises(ExportError, match="classifier: dendrites on a ASTMLPHead, wanted nn.Linear or nn.Conv2d"):
        dendritic_copy(live)
    live = live_ast({HEAD: 1})
    live.get_submodule(HEAD).dendrite_module.layers.append(nn.Linear(32, 3))
    with pytest.raises(ExportError, match="classifier.dense: 2 dendrites, 1 in use: it is growing"):
        dendritic_copy(live)
    live = live_ast({PATCHES: 2})
    live.get_submodule(PATCHES).dendrite_module.this_node_index.fill_(2)
    with pytest.raises(ExportError, match="neurons are on axis 1, its dendrites add to each other on axis 2"):
        dendritic_copy(live)
    GPA.pc.set_pai_forward_function(nn.GELU(approximate="tanh"))
    with pytest.raises(ExportError, match=r"activation is GELU.*wanted one of sigmoid, tanh, relu, gelu"):
        current_activation()


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"classifier.dens": {"count": 1, "activation": "relu"}}, "'classifier.dens': found no such module"),
        ({"classifier": {"count": 1, "activation": "relu"}}, "'classifier': found ASTMLPHead, wanted an nn.Linear"),
        ({HEAD: {"count": 0, "activation": "relu"}}, "'classifier.dense': count: found 0"),
        ({HEAD: {"count": 1, "activation": "rely"}}, "activation: found 'rely', wanted one of sigmoid, tanh, relu"),
        ({HEAD: {"count": 1}}, "'classifier.dense': .*activation"),
    ],
)
def test_a_configuration_that_makes_no_sense_says_why(structure, message):
    config = DendriticASTConfig(max_length=FRAMES, num_labels=3, dendrites=structure, **TINY_AST)
    with pytest.raises(ValueError, match=message):
        DendriticASTForAudioClassification(config)


def test_fresh_dendrites_leave_the_outputs_as_they_are():
    plain, values = nn.Linear(8, 4), torch.randn(3, 8)
    fresh = DendriticLinear(plain, 2, "gelu")
    assert torch.equal(fresh(values), plain(values)) and fresh.weight[4:].abs().max() < 0.1
