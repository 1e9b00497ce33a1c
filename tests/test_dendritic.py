"""Exported models against live perforatedai, which none of this mocks."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZES, TINY_AST, TINY_VIT, Examples, SmallCNN, build, tone
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForAudioClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.dendritic import (
    ACTIVATIONS,
    LAYERS,
    DendriticASTConfig,
    DendriticASTForAudioClassification,
    add_dendrites,
    export_dendritic,
)
from audio_dendrites.models.vit import MelViTConfig, MelViTForAudioClassification
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification
from pai_callback import (
    PAICallback,
    PAIConfig,
    PAIError,
    PAITrainer,
    _grow_to,
    _perforate,
    choose_layers,
    probe_layers,
)

pytest.importorskip("perforatedai", reason="perforatedai has no wheel for this Python; 3.11 and 3.12 have one")

FC1, FC2 = "audio_spectrogram_transformer.layers.1.mlp.fc1", "audio_spectrogram_transformer.layers.1.mlp.fc2"
O_PROJ = "audio_spectrogram_transformer.layers.0.attention.o_proj"
PATCHES = "audio_spectrogram_transformer.embeddings.patch_embeddings.projection"
HEAD = "classifier.dense"
EVERYWHERE = (HEAD, FC1, FC2, O_PROJ, PATCHES)
FRAMES = 48


def grow(model, batch, counts, activation="sigmoid"):
    """Put dendrites of perforatedai, `counts` by layer, on a model, and random numbers in every parameter of it."""
    config, layers = PAIConfig(activation=activation), probe_layers(model, batch, list(counts))
    _perforate(model, layers, config)
    for layer in layers:
        _grow_to(model, [layer], config, counts[layer.name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def inputs(batch=2):
    return torch.randn(batch, FRAMES, 128, generator=torch.Generator().manual_seed(1))


def tiny_ast(**fields):
    return ASTForAudioClassification(ASTConfig(max_length=FRAMES, num_labels=3, **TINY_AST, **fields))


def live_ast(counts, activation="sigmoid"):
    """A tiny AST with dendrites of perforatedai, in evaluation mode."""
    model = tiny_ast()
    grow(model, {"input_values": inputs()}, counts, activation)
    return model.eval()


@pytest.fixture
def exported(tmp_path):
    """A live model and the folder it was exported to."""
    live, folder = live_ast({HEAD: 2, FC1: 1, FC2: 3, O_PROJ: 2, PATCHES: 1}), tmp_path / "exported"
    export_dendritic(live).save_pretrained(folder)
    return live, folder


def logits(model, values=None):
    with torch.no_grad():
        return model(inputs() if values is None else values).logits


def difference(first, second):
    """Largest difference as a share of the largest value."""
    return ((first - second).abs().max() / second.abs().max()).item()


KINDS = {
    "linear": (lambda: nn.Linear(33, 5), (4, 7, 33)),
    "linear without bias": (lambda: nn.Linear(64, 48, bias=False), (4, 7, 64)),
    "linear on a batch of vectors": (lambda: nn.Linear(32, 3), (4, 32)),
    "transposed linear": (lambda: Conv1D(8, 32), (4, 7, 32)),
    "convolution over time": (lambda: nn.Conv1d(3, 8, 3, padding=1, padding_mode="reflect"), (2, 3, 12)),
    "convolution": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 12, 9)),
    "convolution in groups": (lambda: nn.Conv2d(4, 8, (3, 2), groups=2, dilation=2), (2, 4, 12, 9)),
    "convolution in space": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
}


def live_layer(layer, count, activation="sigmoid"):
    """A layer of perforatedai with dendrites, the exported one, and inputs."""
    plain, shape = KINDS[layer]
    model, values = nn.Sequential(plain()), torch.randn(shape)
    kind = LAYERS[type(model[0])]
    grow(model, {"input": values}, {"0": count}, activation)
    ours = export_dendritic(model)[0]
    assert type(ours) is kind
    return model[0], ours, values


@pytest.mark.parametrize(
    ("layer", "count", "activation"),
    [
        *[(layer, count, "sigmoid") for layer in KINDS for count in (1, 2, 3)],
        *[("linear", 3, activation) for activation in ACTIVATIONS],
    ],
)
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


@pytest.mark.parametrize(("count", "activation"), [(1, "sigmoid"), (2, "gelu"), (3, "tanh")])
def test_an_exported_model_gives_the_logits_of_the_live_one_to_the_bit(count, activation):
    live = live_ast(dict.fromkeys(EVERYWHERE, count), activation)
    copy = export_dendritic(live, activation)
    assert torch.equal(logits(copy), logits(live)) and copy.config.dendrites[HEAD] == {
        "count": count, "activation": activation,
    }  # fmt: skip
    assert torch.equal(copy.train()(inputs()).logits, live.train()(inputs()).logits)


def test_copying_touches_neither_the_live_model_nor_the_random_state():
    live = live_ast({HEAD: 1, FC1: 0})
    before, state = logits(live), torch.get_rng_state()
    copy = export_dendritic(live)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(copy.config.dendrites) == {HEAD} and type(copy.get_submodule(FC1)) is nn.Linear  # nothing grew there
    for parameter in copy.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(live), before)


def test_a_folder_holds_the_model_its_code_and_nothing_else(exported):
    _, folder = exported
    assert {path.name for path in folder.iterdir()} == {"config.json", "dendritic.py", "model.safetensors"}
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


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "barks", "loud", "far"]


def wav2vec2():
    network = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4}
    groups = {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SIZES, **network, **groups, num_feat_extract_layers=2))


def whisper():
    encoder = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "vocab_size": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 3}
    frames = {"num_mel_bins": 8, "max_source_positions": 20, "classifier_proj_size": 8}
    return WhisperForAudioClassification(WhisperConfig(**encoder, **decoder, **tokens, **frames))


def tokenizer():
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=16)


SOUND = tone(440, 0.05).tolist()
# Model, layers, what prepares its inputs, task, Auto class, and what `pipeline` gets.
STOCK = {
    "wav2vec2": (
        wav2vec2, ["conv_layers.-1.conv", "layers.-1.feed_forward.*", "projector", "classifier"],
        Wav2Vec2FeatureExtractor, "audio-classification", "AutoModelForAudioClassification", SOUND,
    ),
    "whisper": (
        whisper, ["conv1", "layers.-1.fc1", "projector"],
        lambda: WhisperFeatureExtractor(feature_size=8, hop_length=400, chunk_length=1),
        "audio-classification", "AutoModelForAudioClassification", SOUND,
    ),
    "bert": (
        partial(build, "bert"), ["layer.-1.intermediate.dense", "classifier"],
        tokenizer, "text-classification", "AutoModelForSequenceClassification", "a dog barks",
    ),
    "vit": (
        partial(build, "vit", num_channels=3), ["projection", "layers.-1.mlp.*", "classifier"],
        lambda: ViTImageProcessor(size={"height": 16, "width": 16}),
        "image-classification", "AutoModelForImageClassification", "picture.png",
    ),
}  # fmt: skip
EXAMPLES = {
    "wav2vec2": {"input_values": (12, 800)}, "whisper": {"input_features": (12, 8, 40)},
    "bert": {"input_ids": (12, 8)}, "vit": {"pixel_values": (12, 3, 16, 16)}, "cnn": {"input_values": (12, 20, 40)},
}  # fmt: skip


def examples(name):
    """Twelve random examples of three classes for a model of `STOCK`."""
    ((field, shape),) = EXAMPLES[name].items()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Examples(field, values.mul(3).long().abs().clamp(max=9) if name == "bert" else values)


def fit(model, data, folder, modules, trainer=PAITrainer, grower=PAICallback, **options):
    """A short training in which two dendrites per layer grow."""
    arguments = TrainingArguments(
        str(folder), max_steps=6, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="steps", save_steps=6, logging_steps=100,
    )  # fmt: skip
    callback = grower({"modules": modules, "first_growth": 0.2, "max_dendrites": 2})
    trained = trainer(model, arguments, train_dataset=data, callbacks=[callback], **options)
    trained.train()
    return trained


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Models of transformers that grew in a `PAITrainer`, and folders that `save_model` wrote; by name."""
    root, found = tmp_path_factory.mktemp("stock"), {}
    for name, (make, modules, prepare, *_) in STOCK.items():
        set_seed(0)
        trainer = fit(make(), examples(name), root / f"{name}-run", modules, processing_class=prepare())
        trainer.save_model(root / name)
        found[name] = trainer.model.eval(), root / name, root / f"{name}-run" / "checkpoint-6"
    return found


STRANGER = """
import sys

class Blocked:  # also where the environment has them installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("perforatedai", "audio_dendrites", "pai_callback", "dendritic"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import json
from functools import partial
import numpy, torch, transformers
from transformers import pipeline

answers = {}
for name, (folder, task, auto, sample) in json.load(open("cases.json")).items():
    load = getattr(transformers, auto).from_pretrained
    for trust in ({}, {"trust_remote_code": False}):
        for start in (load, partial(pipeline, task)):
            try:
                start(folder, **trust)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError("loaded without trust_remote_code")
    inputs = {key: torch.from_numpy(values) for key, values in numpy.load(name + ".npz").items()}
    model = load(folder, trust_remote_code=True).eval()
    model.save_pretrained(name + "-again")
    again = load(name + "-again", trust_remote_code=True).eval()
    with torch.no_grad():
        answers[name + ".logits"] = model(**inputs).logits.numpy()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    loss = again(**inputs, labels=torch.tensor([0, 1])).loss  # without LayerDrop, which may leave out a layer
    loss.backward()
    grown = [parameter for name, parameter in again.named_parameters() if name.endswith(".top")]
    assert grown and all(parameter.grad.abs().sum() > 0 for parameter in grown)
    classify = pipeline(task, model=folder, trust_remote_code=True)
    sample = numpy.array(sample, dtype=numpy.float32) if isinstance(sample, list) else sample
    scores = {found["label"]: found["score"] for found in classify(sample, top_k=3)}
    answers[name + ".scores"] = [scores[f"LABEL_{number}"] for number in range(3)]
assert not {"perforatedai", "audio_dendrites"} & set(sys.modules)
numpy.savez("answers.npz", **answers)
"""


def test_a_stranger_loads_any_model_with_pipeline_and_gets_the_training_models_logits(stock, exported, tmp_path):
    """In a process that has neither perforatedai nor this repository."""
    Image.fromarray((np.random.default_rng(0).random((20, 20, 3)) * 255).astype(np.uint8)).save(
        tmp_path / "picture.png"
    )
    ASTFeatureExtractor(max_length=FRAMES).save_pretrained(exported[1])
    models = {"ast": exported} | {name: (live, folder) for name, (live, folder, _) in stock.items()}
    cases, expected = {}, {}
    for name, (live, folder) in models.items():
        *_, task, auto, sample = STOCK.get(name, ("audio-classification", "AutoModelForAudioClassification", SOUND))
        cases[name] = str(folder), task, auto, sample
        values = (
            {"input_values": inputs()}
            if name == "ast"
            else {key: rows[:2] for key, rows in examples(name).inputs.items()}
        )
        np.savez(tmp_path / f"{name}.npz", **{key: tensor.numpy() for key, tensor in values.items()})
        with torch.no_grad():
            expected[name] = live(**values).logits
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "stranger.py").write_text(STRANGER)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-P", tmp_path / "stranger.py"], cwd=tmp_path, stdin=subprocess.DEVNULL,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")}, capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = np.load(tmp_path / "answers.npz")
    for name, values in expected.items():
        assert np.array_equal(found[f"{name}.logits"], values.numpy()), name
        assert found[f"{name}.scores"].sum() == pytest.approx(1) and found[f"{name}.scores"].shape == (3,)


@pytest.mark.parametrize("name", STOCK)
def test_no_class_loads_a_stock_model_with_random_layers(stock, name):
    live, folder, checkpoint = stock[name]
    for source, error in ((folder, "ignore_mismatched_sizes"), (checkpoint, "checkpoint resumes a training")):
        with pytest.raises((RuntimeError, ValueError), match=error):
            STOCK[name][0]().from_pretrained(source)
    assert json.loads((folder / "config.json").read_text())["model_type"] == f"dendritic-{live.config.model_type}"
    assert {path.name for path in folder.glob("*.py")} == {"dendritic.py"}


def test_a_plain_trainer_saves_the_same_folder(tmp_path):
    set_seed(0)
    trainer = fit(build("bert"), examples("bert"), tmp_path / "run", ["classifier"], Trainer)
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-6"):
        if folder.name == "saved":
            trainer.save_model(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
        values = examples("bert").inputs["input_ids"][:2]
        with torch.no_grad():
            assert torch.equal(model.eval()(values).logits, trainer.model.eval()(values).logits)


@pytest.mark.parametrize("trainer", [Trainer, PAITrainer])
def test_a_network_of_no_library_becomes_one_of_ordinary_layers(trainer, tmp_path, caplog):
    set_seed(0)
    trained = fit(SmallCNN(), examples("cnn"), tmp_path / "run", ["Conv2d", "head"], trainer)
    assert ("export_dendritic(trainer.model)" in caplog.text) == (trainer is Trainer)
    live, values = trained.model.eval(), examples("cnn").inputs["input_values"][:2]
    copy = export_dendritic(live)
    assert type(copy) is SmallCNN and "perforatedai" not in {type(module).__module__ for module in copy.modules()}
    assert torch.equal(copy(values)["logits"], live(values)["logits"])
    if trainer is PAITrainer:
        trained.save_model(tmp_path / "saved")
        plain = SmallCNN().eval()
        with pytest.raises(RuntimeError, match="size mismatch"):
            plain.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
        two = {"count": 2, "activation": "gelu"}
        add_dendrites(plain, {"body.0": two, "body.3": two, "head": two})
        plain.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
        assert torch.equal(plain(values)["logits"], live(values)["logits"])


def test_a_class_of_ones_own_is_saved_with_a_warning(tmp_path, caplog):
    class Mine(BertForSequenceClassification):
        pass

    set_seed(0)
    trained = fit(Mine(build("bert").config), examples("bert"), tmp_path / "run", ["classifier"])
    trained.save_model(tmp_path / "saved")
    assert "Mine is no class of transformers" in caplog.text and "DendriticMixin" in caplog.text
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Mine.from_pretrained(tmp_path / "saved")


def test_two_copied_files_are_all_that_another_project_needs(tmp_path, monkeypatch):
    for source in ("pai_callback.py", "audio_dendrites/models/dendritic.py"):
        shutil.copy(ROOT / source, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "pai_callback.py")
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied", copied)
    spec.loader.exec_module(copied)
    set_seed(0)
    trained = fit(
        build("bert"), examples("bert"), tmp_path / "run", ["classifier"], copied.PAITrainer, copied.PAICallback
    )
    trained.save_model(tmp_path / "saved")
    assert sys.modules.pop("dendritic").__file__ == str(tmp_path / "dendritic.py")
    assert (tmp_path / "saved" / "dendritic.py").read_bytes() == (tmp_path / "dendritic.py").read_bytes()


def test_layers_that_share_their_weights_are_refused():
    model = BertForMaskedLM(BertConfig(vocab_size=10, max_position_embeddings=16, **SIZES))
    with pytest.raises(PAIError, match="must not share weights, but .*word_embeddings.weight and .*decoder.weight"):
        choose_layers(model, PAIConfig(modules=["decoder"]))


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
    model = AutoModelForAudioClassification.from_pretrained(folder)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    program = torch.export.export(model, (inputs(),)).module()
    with torch.no_grad():
        assert difference(compiled(inputs()).logits, logits(live)) < 1e-5
        assert difference(program(inputs()).logits, logits(live)) < 1e-5
    torch.compile(model.train(), fullgraph=True, backend="eager")(inputs(), labels=torch.tensor([0, 1]))


def test_with_no_dendrites_the_plain_model_is_written(tmp_path):
    for number, model in enumerate([tiny_ast().eval(), live_ast({HEAD: 0, FC1: 0})]):
        folder = tmp_path / f"plain-{number}"
        export_dendritic(model).save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "audio-spectrogram-transformer" and "auto_map" not in config
        plain = AutoModelForAudioClassification.from_pretrained(folder)
        assert type(plain) is ASTForAudioClassification and torch.equal(logits(plain), logits(model))


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
        {"beats.py", "cnn14.py", "dendritic.py", "vit.py", "waveform.py"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_this_project_are_exported_as_what_they_are(family, tmp_path):
    make, counts, files = FAMILIES[family]
    live = make()
    values = torch.randn(2, 8000) if family == "waveform" else inputs()
    grow(live, {"input_values": values}, counts)
    live.eval()
    export_dendritic(live).save_pretrained(tmp_path / "exported")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == files | {"config.json", "model.safetensors"}
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "exported")
    assert type(model) is type(live) and {name: d["count"] for name, d in model.config.dendrites.items()} == counts
    assert torch.equal(logits(model, values), logits(live, values))
    again = export_dendritic(make().eval())
    assert type(again) is type(live) and not again.config.dendrites
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(".top"))]
    save_file(tensors, tmp_path / "exported" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the weights do not fit the configuration"):
        AutoModelForAudioClassification.from_pretrained(tmp_path / "exported")


def test_what_cannot_be_exported_says_why():
    live = live_ast({HEAD: 1})
    live.get_submodule(HEAD).dendrite_module.layers.append(nn.Linear(32, 3))
    with pytest.raises(ValueError, match="classifier.dense: Linear cannot be exported, or is growing now"):
        export_dendritic(live)
    live.get_submodule(HEAD).main_module = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="classifier.dense: Bilinear cannot be exported"):
        export_dendritic(live)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"classifier.dens": {"count": 1, "activation": "relu"}}, "'classifier.dens' must be a .* got no such module"),
        ({"classifier": {"count": 1, "activation": "relu"}}, "'classifier' must be a linear .* got ASTMLPHead"),
        ({HEAD: {"count": 0, "activation": "relu"}}, "'classifier.dense': count must be .* got 0"),
        ({HEAD: {"count": 1, "activation": "rely"}}, "activation must be one of sigmoid, tanh, .* got 'rely'"),
        ({HEAD: {"count": 1}}, "'classifier.dense': .*activation"),
    ],
)
def test_a_configuration_that_makes_no_sense_says_why(structure, message):
    config = DendriticASTConfig(max_length=FRAMES, num_labels=3, dendrites=structure, **TINY_AST)
    with pytest.raises(ValueError, match=message):
        DendriticASTForAudioClassification(config)


@pytest.mark.parametrize("layer", KINDS)
def test_new_dendrites_leave_the_outputs_as_they_are(layer):
    plain, shape = KINDS[layer]
    model, values = nn.Sequential(plain()), torch.randn(shape)
    before, channels = model(values), len(model[0].weight.T if layer == "transposed linear" else model[0].weight)
    add_dendrites(model, {"0": {"count": 2, "activation": "gelu"}})
    assert torch.equal(model(values), before)
    drawn = model[0].weight.split(channels, model[0].neuron_axis)[1]
    assert drawn.std().item() == pytest.approx((drawn.numel() / channels) ** -0.5, rel=0.4)
