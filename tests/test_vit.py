import pytest
import torch
from conftest import TINY_VIT
from transformers import (
    ASTConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.families import learning_rates
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.models.vit import MelViTForAudioClassification
from audio_dendrites.recipes import FeatureArguments, ModelArguments

EXTRACTOR = BatchedASTFeatureExtractor(max_length=48)


@pytest.fixture(params=["ViTModel", "ViTForImageClassification"])
def pretrained(request, tmp_path):
    """A small ViT of pictures with both kinds of files the Hub has, random everywhere."""
    torch.manual_seed(0)
    model = {"ViTModel": ViTModel, "ViTForImageClassification": ViTForImageClassification}[request.param](
        ViTConfig(**TINY_VIT, num_labels=7)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"do_resize": true, "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "ViTImageProcessor", "size": 32}'
    )
    return str(tmp_path / "vit"), getattr(model, "vit", model)


def test_pictures_weights_are_taken_whole_with_a_new_head(pretrained):
    folder, original = pretrained
    model = load_model(["a", "b"], ModelArguments(model=folder), EXTRACTOR)
    assert type(model) is MelViTForAudioClassification and model.config.model_type == "mel-vit"
    theirs = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith("pooler")}
    assert theirs.keys() == model.vit.state_dict().keys()
    assert all(torch.equal(tensor, model.vit.state_dict()[name]) for name, tensor in theirs.items())
    assert model.classifier.weight.shape == (2, 32) and model.config.id2label == {0: "a", 1: "b"}


def test_the_image_is_the_spectrogram_bands_by_frames_in_three_colours(pretrained):
    folder, original = pretrained
    model = load_model(["a", "b"], ModelArguments(model=folder), EXTRACTOR).eval()
    spectrogram = torch.randn(1, 32, 32)  # as large as the image: nothing is resized
    image = spectrogram[0].T.expand(1, 3, 32, 32)
    expected = model.classifier(original.eval()(image).last_hidden_state[:, 0])
    assert torch.allclose(model(spectrogram).logits, expected, atol=1e-6)
    doubled = spectrogram.repeat_interleave(2, 1)[:, 1:-1]  # another length is resized, not refused
    assert model(doubled).logits.shape == (1, 2) and not torch.equal(model(doubled).logits, expected)


def test_the_features_are_log_mel_not_the_pictures(pretrained):
    extractor = load_extractor(ModelArguments(model=pretrained[0]), FeatureArguments(max_length=48))
    assert (extractor.max_length, extractor.num_mel_bins) == (48, 128) and not hasattr(extractor, "image_mean")


@pytest.mark.parametrize("pretrained", ["ViTModel"], indirect=True)
def test_a_saved_model_goes_round_and_starts_another(pretrained, tmp_path):
    model = load_model(["a", "b"], ModelArguments(model=pretrained[0]), EXTRACTOR).eval()
    model.save_pretrained(tmp_path / "saved")
    EXTRACTOR.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json", "dendritic.py", "model.safetensors", "preprocessor_config.json", "vit.py",
    }  # fmt: skip
    again, inputs = AutoModelForAudioClassification.from_pretrained(tmp_path / "saved"), torch.randn(2, 48, 128)
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "saved").max_length == 48
    start = load_model(["a", "b"], ModelArguments(model=str(tmp_path / "saved")), EXTRACTOR).eval()
    assert torch.equal(start(inputs).logits, model(inputs).logits)


def test_the_last_layers_and_the_head_are_trained_each_at_its_rate():
    arguments = ModelArguments(
        architecture="vit", model_config=TINY_VIT, unfreeze_last_layers=2, attn_implementation="eager"
    )
    model = load_model(["a", "b"], arguments, EXTRACTOR)
    assert model.vit.config._attn_implementation == "eager"
    trained = {
        name.replace("vit.", "").split(".attention")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert {name for name in trained if "layers" not in name} == {
        "classifier.weight", "classifier.bias", "layernorm.weight", "layernorm.bias",
    }  # fmt: skip
    assert {"layers.1", "layers.2"} <= trained and not any(name.startswith("layers.0") for name in trained)
    rates = learning_rates(model, 3e-5, head_learning_rate=3e-4)
    assert rates["classifier.bias"] == 3e-4 and rates["vit.layers.2.mlp.fc1.weight"] == 3e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model_config": {"time_stride": 3}},
            "model_config must have fields of MelViTConfig only, got time_stride; the fields are attention",
        ),
        ({"unfreeze_last_layers": 13}, "unfreeze_last_layers must be at most 12"),
    ],
)
def test_what_a_vit_cannot_do_is_an_error(arguments, message):
    with pytest.raises(UserError, match=message):
        load_model(["a", "b"], ModelArguments(architecture="vit", **arguments), EXTRACTOR)


def test_weights_of_another_family_are_an_error(tmp_path):
    ASTConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="types mel-vit, vit, got .*, which is of type 'audio-spectrogram-transformer'"):
        load_model(["a", "b"], ModelArguments(architecture="vit", model=str(tmp_path)), EXTRACTOR)
