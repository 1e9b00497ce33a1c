import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_AST
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, AutoFeatureExtractor, BertConfig

from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.ast import resample_position_embeddings
from audio_dendrites.models.families import learning_rates
from audio_dendrites.models.loading import check_model, load_extractor, load_model, load_teacher
from audio_dendrites.recipes import FeatureArguments, ModelArguments, parse_recipe

LABELS = ["a", "b", "c"]


def load_ast(labels, arguments, frames):
    return load_model(labels, arguments, BatchedASTFeatureExtractor(max_length=frames))


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a small AST of 160 frames, strides 16, three classes, as the Hub would give it."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    model = ASTForAudioClassification(ASTConfig(**TINY_AST, max_length=160, **names))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    ASTFeatureExtractor(max_length=160, mean=-3.0, std=2.0).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), model


def positions(model):
    return model.audio_spectrogram_transformer.embeddings.position_embeddings


def test_a_pretrained_model_is_loaded_whole(pretrained):
    folder, original = pretrained
    model = load_ast(LABELS, ModelArguments(model=folder), 160)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("labels", [["a", "b"], ["c", "b", "a"]])
def test_other_classes_get_a_new_head_and_keep_the_rest(pretrained, labels):
    folder, original = pretrained
    model = load_ast(labels, ModelArguments(model=folder), 160)
    for name, tensor in model.state_dict().items():
        same = tensor.shape == original.state_dict()[name].shape and torch.equal(tensor, original.state_dict()[name])
        assert same != name.startswith("classifier."), name
    assert (model.classifier.layernorm.weight == 1).all() and (model.classifier.layernorm.bias == 0).all()
    assert model.config.id2label == dict(enumerate(labels)) and model.config.label2id[labels[0]] == 0
    assert model.classifier.dense.weight.std() > 0


@pytest.mark.parametrize(
    ("frames", "config"), [(100, {}), (400, {}), (160, {"time_stride": 10}), (160, {"frequency_stride": 10})]
)
def test_another_input_or_stride_adapts_position_embeddings_and_runs(pretrained, frames, config):
    folder, original = pretrained
    model = load_ast(LABELS, ModelArguments(model=folder, model_config=config), frames)
    assert positions(model).shape != positions(original).shape
    assert (positions(model).abs().sum(-1) > 0).all()
    assert torch.equal(positions(model)[:, :2], positions(original)[:, :2])
    assert model(torch.randn(2, frames, 128)).logits.shape == (2, 3)


def test_an_adapted_model_is_the_same_after_saving_and_loading(pretrained, tmp_path):
    model = load_ast(LABELS, ModelArguments(model=pretrained[0], model_config={"time_stride": 10}), 250)
    model.save_pretrained(tmp_path / "again")
    again = ASTForAudioClassification.from_pretrained(tmp_path / "again")
    inputs = torch.randn(2, 250, 128)
    assert torch.equal(model(inputs).logits, again(inputs).logits)


def grid(values):
    """Two token rows, then one row a patch, from a nested list over (frequency, time)."""
    patches = torch.tensor(values, dtype=torch.float32).flatten()[:, None]
    return torch.cat([torch.tensor([[-1.0], [-2.0]]), patches])[None]


def test_shorter_time_is_cut_from_the_centre_as_in_the_papers_code():
    # Of 5 columns 3 stay, from 5 // 2 - 3 // 2 = 1 on.
    cut = resample_position_embeddings(grid([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]), (2, 5), (2, 3), cut_time=True)
    assert torch.equal(cut, grid([[1, 2, 3], [6, 7, 8]]))
    # AudioSet's 101 columns for 4 s: the paper's code takes 50 - 39 // 2 = 31 to 69.
    wide = torch.arange(101.0).expand(12, 101)
    cut = resample_position_embeddings(grid(wide.tolist()), (12, 101), (12, 39), cut_time=True)
    assert torch.equal(cut, grid(wide[:, 31:70].tolist()))


def test_longer_time_is_interpolated_bilinearly():
    # Four points over two: the outer ones are clamped, the inner ones a quarter of the way in.
    longer = resample_position_embeddings(grid([[0, 4], [8, 12]]), (2, 2), (2, 4), cut_time=True)
    assert torch.allclose(longer, grid([[0, 1, 3, 4], [8, 9, 11, 12]]))


def test_another_stride_squeezes_instead_of_cutting():
    squeezed = resample_position_embeddings(grid([[0, 2, 4, 6]]), (1, 4), (1, 2), cut_time=False)
    assert torch.allclose(squeezed, grid([[1, 5]]))


def test_random_weights_have_no_zero_embeddings():
    embeddings = load_ast(LABELS, ModelArguments(model_config=TINY_AST), 160).audio_spectrogram_transformer.embeddings
    for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
        assert 0.01 < parameter.std() < 0.03


@pytest.mark.parametrize(
    ("arguments", "frames", "message"),
    [
        (
            {"model_config": {"width": 3}},
            160,
            "must have fields of ASTConfig only, got width; the fields are attention",
        ),
        ({"model_config": {"max_length": 3}}, 160, "max_length and num_mel_bins are fields of the recipe"),
        ({"model_config": {"hidden_size": "big"}}, 160, "model_config: .*'hidden_size'.*expected int, got str"),
        ({"model_config": {"num_attention_heads": 7}}, 160, "multiple of num_attention_heads, got 768 and 7"),
        ({"model_config": {"num_attention_heads": 0}}, 160, r"num_attention_heads must be in \[1, inf\), got 0"),
        ({"model_config": {"hidden_dropout_prob": 1.0}}, 160, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"model_config": {"initializer_range": -0.1}}, 160, r"initializer_range must be in \(0, inf\), got -0.1"),
        ({"model_config": {"hidden_act": "tahn"}}, 160, "hidden_act must be one of .*tanh.*, got 'tahn'"),
        ({"architecture": "vit", "model_config": {"image_size": 8}}, 160, "at least patch_size, got 8 and 16"),
        ({}, 12, "max_length must be at least one patch, 16, got 12"),
        ({"model": "nowhere"}, 160, "(?s)'nowhere'.*audio_dendrites.data download RECIPE.*--model FOLDER"),
        ({"unfreeze_last_layers": 13}, 160, "unfreeze_last_layers must be at most 12, the number of layers, got 13"),
    ],
)
def test_a_model_that_cannot_be_is_an_error(arguments, frames, message):
    with pytest.raises(UserError, match=message):
        load_ast(LABELS, ModelArguments(**arguments), frames)


@pytest.mark.parametrize("config", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_weights_that_do_not_fit_are_an_error_not_a_warning(pretrained, config):
    with pytest.raises(UserError, match="differ in audio_spectrogram_transformer"):
        load_ast(LABELS, ModelArguments(model=pretrained[0], model_config=config), 160)


def test_a_model_of_another_kind_is_an_error(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="types mel-vit, vit, audio-spectrogram.*wav2vec2.*, which is of type 'bert'"):
        load_ast(LABELS, ModelArguments(model=str(tmp_path)), 160)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_only_the_last_layers_and_the_head_are_trained(layers):
    model = load_ast(LABELS, ModelArguments(model_config=TINY_AST, unfreeze_last_layers=layers), 160)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("classifier", "audio_spectrogram_transformer.layernorm"))
    }
    last = {name for name, _ in model.named_parameters() for i in range(2 - layers, 2) if f".layers.{i}." in name}
    assert trained == head | last


def test_learning_rates_fall_towards_the_input():
    model = load_ast(LABELS, ModelArguments(model_config=TINY_AST), 160)
    assert learning_rates(model, 1.0) is None
    rates = learning_rates(model, 1.0, head_learning_rate=5.0, layer_decay=0.5)
    trunk = "audio_spectrogram_transformer."
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates["classifier.dense.weight"] == rates["classifier.layernorm.bias"] == 5.0
    assert rates[trunk + "layernorm.weight"] == 1.0
    assert rates[trunk + "layers.1.mlp.fc1.weight"] == 0.5 and rates[trunk + "layers.0.mlp.fc1.bias"] == 0.25
    assert rates[trunk + "embeddings.position_embeddings"] == 0.125


def test_the_extractor_comes_from_the_model_and_the_recipe_changes_it(pretrained, tmp_path):
    extractor = load_extractor(ModelArguments(model=pretrained[0]), FeatureArguments(std=5.0))
    assert (extractor.max_length, extractor.mean, extractor.std) == (160, -3.0, 5.0)
    extractor.save_pretrained(tmp_path / "saved")
    stock = AutoFeatureExtractor.from_pretrained(tmp_path / "saved")
    assert type(stock) is ASTFeatureExtractor and stock.std == 5.0
    waveform = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    ours, theirs = (e(waveform, sampling_rate=16000, return_tensors="np")["input_values"] for e in (extractor, stock))
    assert np.abs(ours - theirs).max() < 1e-4
    assert load_extractor(ModelArguments(), FeatureArguments()).max_length == 1024


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_damaged_file_of_a_model_folder_is_named(pretrained, file):
    path = Path(pretrained[0], file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    arguments = ModelArguments(model=pretrained[0])
    with pytest.raises(UserError, match=f"model: .*{file} is damaged"):
        load_model(LABELS, arguments, load_extractor(arguments, FeatureArguments()))
    with pytest.raises(UserError, match=f"distill_from: .*{file} is damaged"):
        load_teacher(pretrained[0], LABELS, BatchedASTFeatureExtractor(max_length=160), "cross_entropy")


def test_a_folder_without_a_model_is_said(tmp_path):
    with pytest.raises(UserError, match="model: .* could not be loaded: it has no config.json"):
        load_extractor(ModelArguments(model=str(tmp_path)), FeatureArguments())


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("time_mask", "time_mask must be at most 80, the max_length of the model's input, got 129"),
        ("frequency_mask", "frequency_mask must be at most 128, the num_mel_bins"),
        ("frequency_shift", "frequency_shift must be at most 128, the num_mel_bins"),
    ],
)
def test_an_augmentation_wider_than_the_input_is_an_error(field, message):
    recipe = parse_recipe([f"--{field}=129", "--model_config", json.dumps(TINY_AST)])
    with pytest.raises(UserError, match=message):
        check_model(recipe, BatchedASTFeatureExtractor(max_length=80))


def test_patchout_drops_whole_rows_and_columns_behind_the_position_embeddings():
    model = load_ast(LABELS, ModelArguments(model_config=TINY_AST, patchout_time=2, patchout_frequency=3), 160)
    embeddings, inputs = model.audio_spectrogram_transformer.embeddings, torch.randn(4, 160, 128)
    whole = embeddings.eval()(inputs)
    assert whole.shape[1] == 2 + 8 * 10  # evaluation sees every patch
    drawn = set()
    for _ in range(5):
        kept = embeddings.train()(inputs)
        assert kept.shape[1] == 2 + 5 * 8 and torch.equal(kept[:, :2], whole[:, :2])
        at = [int((whole[0] - token).abs().sum(1).argmin()) for token in kept[0]]
        assert torch.equal(kept, whole[:, at])  # the same patches of every clip, with their position
        rows, columns = {(i - 2) // 10 for i in at[2:]}, {(i - 2) % 10 for i in at[2:]}
        assert len(rows) == 5 and len(columns) == 8 and at[2:] == sorted(at[2:])
        drawn.add((*rows, *columns))
    assert len(drawn) > 1
    model.train()(inputs, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
    torch.manual_seed(1)
    first = embeddings.train()(inputs)
    torch.manual_seed(1)
    assert torch.equal(embeddings(inputs), first)  # torch's random state, which a checkpoint holds, is the only one


def test_a_model_trained_with_patchout_is_saved_as_any_other(tmp_path):
    model = load_ast(LABELS, ModelArguments(model_config=TINY_AST, patchout_time=2), 160).eval()
    model.save_pretrained(tmp_path)
    inputs = torch.randn(2, 160, 128)
    again = ASTForAudioClassification.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(inputs).logits, model(inputs).logits)
    assert torch.equal(again.train()(inputs).logits, model(inputs).logits)  # nothing is dropped, there is no dropout
    assert again.config.to_diff_dict().keys().isdisjoint({"patchout_time", "patchout_frequency"})


@pytest.mark.parametrize(("field", "count"), [("patchout_time", 10), ("patchout_frequency", 8)])
def test_patchout_leaves_something(field, count):
    with pytest.raises(UserError, match=f"{field} must be at most {count - 1}, got {count}"):
        load_ast(LABELS, ModelArguments(model_config=TINY_AST, **{field: count}), 160)
