"""BEATs against numbers of the authors' code, its converted checkpoints, its training and its padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_BEATS, TONES, recipe_of, tone
from transformers import AutoModelForAudioClassification, pipeline

import train
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.beats import BEATsConfig, BEATsForAudioClassification
from audio_dendrites.models.convert_beats import convert, main
from audio_dendrites.models.families import default_dendrites, layer_of
from audio_dendrites.models.finished import load_finished
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.recipes import FeatureArguments, ModelArguments

SETTINGS = {"activation_fn": "gelu", "deep_norm": True, "layer_norm_first": False, "max_distance": 10}
SETTINGS |= {"dropout": 0.1, "attention_dropout": 0.1}
SHAPES = {
    "patch_embedding.weight": (8, 1, 16, 16), "post_extract_proj.weight": (16, 8), "post_extract_proj.bias": (16,),
    "encoder.pos_conv.0.weight_g": (1, 1, 8), "encoder.pos_conv.0.weight_v": (16, 8, 8),
    "encoder.pos_conv.0.bias": (16,), "predictor.weight": (3, 16), "predictor.bias": (3,),
}  # fmt: skip
NORMS = {"layer_norm": 8, "encoder.layer_norm": 16}
for layer in ("encoder.layers.0", "encoder.layers.1"):
    NORMS |= {f"{layer}.self_attn_layer_norm": 16, f"{layer}.final_layer_norm": 16}
    SHAPES |= {f"{layer}.self_attn.grep_a": (1, 2, 1, 1), f"{layer}.self_attn.relative_attention_bias.weight": (8, 2)}
    linear = {f"self_attn.{name}_proj": (16, 16) for name in "qkv"} | {"self_attn.out_proj": (16, 16)}
    linear |= {"self_attn.grep_linear": (8, 8), "fc1": (32, 16), "fc2": (16, 32)}
    SHAPES |= {f"{layer}.{name}.weight": shape for name, shape in linear.items()}
    SHAPES |= {f"{layer}.{name}.bias": shape[:1] for name, shape in linear.items()}
SHAPES |= {f"{name}.{kind}": (size,) for name, size in NORMS.items() for kind in ("weight", "bias")}

# What the authors' BEATs.preprocess, TransformerEncoder and predictor give for `published` and `waveform()`
# (github.com/microsoft/unilm, beats, commit c68101b; torch 2.11, float32, CPU).
FRAMES, BANDS, PATCHES, CHANNELS = [0, 40, 62], [0, 50, 127], [0, 13, 31], [0, 9]
LOG_MEL = [
    [-0.528541, -0.019251, 0.264978], [-0.166704, 0.370941, 0.650837], [-2.391693, -2.391693, -2.391693],
]  # fmt: skip
HIDDEN = [  # before the first layer and after each
    [[0.774898, -0.985638], [0.376578, 1.765514], [-1.135395, 1.106818]],
    [[-1.419960, 0.122865], [-1.381717, 0.289040], [-2.188136, -0.492747]],
    [[0.464011, 0.286443], [0.476239, 0.270724], [0.475514, 0.318710]],
]
LOGITS = [-2.465960, -3.294155, -3.372747]


@pytest.fixture
def published(tmp_path):
    """A checkpoint as the authors save one, with weights that the numbers above come from."""
    tensors = {}
    for seed, name in enumerate(sorted(SHAPES)):
        weight = 0.5 * torch.from_numpy(np.random.RandomState(seed).standard_normal(SHAPES[name])).float()
        tensors[name] = weight + float("norm.weight" in name or name.endswith("grep_a"))
    bias = "self_attn.relative_attention_bias.weight"
    tensors[f"encoder.layers.1.{bias}"] = tensors[f"encoder.layers.0.{bias}"]
    torch.save(
        {"cfg": SETTINGS, "model": tensors, "label_dict": {0: "/m/a", 1: "/m/b", 2: "/m/c"}}, tmp_path / "BEATs.pt"
    )
    return tmp_path / "BEATs.pt"


def waveform():
    """Noise that grows from silence, and 0.1 s of zeros."""
    noise = np.random.RandomState(99).standard_normal(12000) * 0.1 * np.sin(np.arange(12000) / 3000)
    noise[9600:11200] = 0
    return torch.from_numpy(noise).float()


def test_log_mel_hidden_states_and_logits_are_those_of_the_authors_code(published):
    model, found = convert(published), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    model.backbone.layers[0].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda module, inputs, outputs: found.append(outputs))
    with torch.no_grad():
        logits = model(waveform()[None]).logits
    log_mel, *hidden = (values[0] for values in found)
    assert torch.allclose(log_mel[FRAMES][:, BANDS], torch.tensor(LOG_MEL), atol=1e-5, rtol=0)
    hidden = torch.stack(hidden)[:, PATCHES][..., CHANNELS]
    assert torch.allclose(hidden, torch.tensor(HIDDEN), atol=2e-5, rtol=0)
    assert torch.allclose(logits, torch.tensor([LOGITS]), atol=2e-5, rtol=0)


def test_the_published_sizes_are_those_of_the_default_configuration():
    with torch.device("meta"):
        model = BEATsForAudioClassification(BEATsConfig(num_labels=527))
    sizes = sum(parameter.numel() for name, parameter in model.named_parameters() if "classifier" not in name)
    assert round(sizes / 1e6) == 90  # the paper's table 1


def test_random_weights_are_drawn_as_published():
    torch.manual_seed(0)
    model = BEATsForAudioClassification(BEATsConfig(num_hidden_layers=1, intermediate_size=64))
    layer, position = model.layers[0], model.embeddings.position
    deviations = {
        layer.attention.q_proj.weight: (2 / 1536) ** 0.5, layer.attention.v_proj.weight: (2 / 1536) ** 0.5 * 8**-0.25,
        layer.fc1.weight: (2 / 832) ** 0.5 * 8**-0.25, position.weight: 2 / (128 * 768) ** 0.5,
        layer.attention.gate.weight: 0.02, model.embeddings.distances.weight: 0.02,
    }  # fmt: skip
    assert all(abs(float(weight.detach().std()) / expected - 1) < 0.1 for weight, expected in deviations.items())
    assert not position.bias.any() and (layer.attention.gate_scale == 1).all()


def test_a_converted_folder_takes_raw_audio_and_padded_batches(published, tmp_path):
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/c,C\n1,/m/b,B\n2,/m/a,A\n")
    main([str(published), str(tmp_path / "folder"), "--labels", str(tmp_path / "labels.csv")])
    assert {path.name for path in (tmp_path / "folder").glob("*.py")} >= {"beats.py", "waveform.py"}
    classify = pipeline("audio-classification", model=str(tmp_path / "folder"), function_to_apply="none")
    clips = [waveform().numpy(), tone(440, 1.3), tone(440, 0.05)]  # the last is shorter than a patch
    alone, batched = (classify(clips, top_k=3, batch_size=size) for size in (1, 3))
    scores = {found["label"]: found["score"] for found in alone[0]}
    assert np.allclose([scores[name] for name in "ABC"], LOGITS, atol=2e-5)
    for one, other in zip(alone, batched, strict=True):
        other = {found["label"]: found["score"] for found in other}
        assert all(abs(found["score"] - other[found["label"]]) < 1e-5 for found in one)


def test_a_checkpoint_without_classes_starts_a_model_with_a_new_head(published, tmp_path):
    tensors = {name: tensor for name, tensor in torch.load(published)["model"].items() if "predictor" not in name}
    torch.save({"cfg": SETTINGS, "model": tensors}, published)
    main([str(published), str(tmp_path / "start")])
    arguments = ModelArguments(model=str(tmp_path / "start"), waveform=True, unfreeze_last_layers=1)
    model = load_model(["x", "y"], arguments, load_extractor(arguments, FeatureArguments(max_length=100)))
    assert torch.equal(model.backbone.layers[1].fc2.weight, tensors["encoder.layers.1.fc2.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {layer_of(name, 2) for name, _ in model.named_parameters()} == {0, 1, 2, 3}
    assert {layer_of(name, 2) for name in trained} == {2, 3} and "backbone.classifier.weight" in trained
    assert default_dendrites(model) == [f"backbone.{name}" for name in ("layers.1.fc1", "layers.1.fc2", "classifier")]
    with pytest.raises(UserError, match="weights do not fit"):
        load_finished(tmp_path / "start")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": SETTINGS | {"layer_norm_first": True}}, "layer_norm_first must be False, got True"),
        ({"cfg": None}, "must be a published checkpoint, {'cfg': {...}, 'model': {...}}, got other contents"),
        ({"model": {"weight": torch.ones(3)}}, "must have the tensors of a BEATs, got others: 'embeddings"),
        ({"label_dict": {0: "/m/a"}}, "label_dict must name 3 classes, got 1"),
        ({"cfg": {**SETTINGS, "run": Path("x")}}, "got objects other than tensors"),
    ],
)
def test_what_is_no_beats_checkpoint_says_so(published, changes, message):
    torch.save(torch.load(published) | changes, published)
    with pytest.raises(UserError) as error:
        convert(published)
    assert message in str(error.value)


def test_a_beats_from_random_weights_trains_grows_dendrites_and_loads_by_pipeline(tones, tmp_path):
    values = TONES | {
        "dataset": str(tones), "output_dir": str(tmp_path / "run"), "architecture": "beats", "waveform": True,
        "convention": "povey", "max_length": 64, "per_device_train_batch_size": 4, "max_steps": 4,
        "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "precision": "fp32", "report_to": "none", "preprocessing_num_workers": 1, "time_mask": 8,
        "model_config": TINY_BEATS, "activation_checkpointing": True,
        "pai": {"first_growth": 0.25, "top_learning_rate": 100},
    }  # fmt: skip
    train.main(recipe_of(values))  # which compares `pipeline` with the model
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    grown = {"backbone.layers.1.fc1", "backbone.layers.1.fc2", "backbone.classifier"}
    assert set(metrics["dendrites"]["layers"]) == grown and metrics["architecture"] == "beats"
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "run").backbone.layers[1].fc1.count >= 1


def test_spectrograms_of_the_ast_extractor_and_fields_that_do_not_fit():
    arguments = ModelArguments(architecture="beats", model_config=TINY_BEATS)
    extractor = BatchedASTFeatureExtractor(max_length=48)
    model = load_model(["a", "b"], arguments, extractor).eval()
    assert model(extractor([tone(440)], return_tensors="pt")["input_values"]).logits.shape == (1, 2)
    for fields, message in (
        ({"position_groups": 3}, "hidden_size must be a multiple of position_groups, got 16 and 3"),
        ({"num_buckets": 3}, "num_buckets must be at least 4 and less than 4 times max_distance, got 3 and 10"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(["a"], ModelArguments(architecture="beats", model_config=TINY_BEATS | fields), extractor)
    with pytest.raises(UserError, match="max_length must be at least 16, got 15: a patch"):
        load_model(["a"], arguments, BatchedASTFeatureExtractor(max_length=15))
