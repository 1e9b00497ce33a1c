"""AST from transformers of images, and any length, size and stride of the paper."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    ASTModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.ast import resample_position_embeddings, weights_of_images
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.models.vit import MelViTForAudioClassification
from audio_dendrites.recipes import FeatureArguments, ModelArguments

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "layer_norm_eps": 0.01,  # another than AST's, and large enough to show
}
NO_OVERLAP = {"time_stride": 16, "frequency_stride": 16}
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads


def from_images(folder, bands, frames, **model_config):
    arguments = ModelArguments(architecture="ast", model=str(folder), model_config=model_config)
    return load_model(["a", "b"], arguments, BatchedASTFeatureExtractor(max_length=frames, num_mel_bins=bands)).eval()


def drawn(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def grey(spectrogram):
    """The image a spectrogram is: low bands on top, time to the right, the same in three colours."""
    return spectrogram.transpose(1, 2)[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("kind", [DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher])
def test_of_a_grey_image_an_ast_makes_what_the_deit_makes_of_it(kind, tmp_path):
    original = drawn(kind(DeiTConfig(**TINY, image_size=32, num_labels=5)))
    original.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("encoder.layer.0.attention.attention.query" in name for name in names)  # as on the Hub
    model, spectrogram = from_images(tmp_path, 32, 32, **NO_OVERLAP), torch.randn(2, 32, 32)
    expected = getattr(original, "deit", original)(grey(spectrogram)).last_hidden_state
    assert torch.allclose(model.base_model(spectrogram).last_hidden_state, expected, atol=1e-6)
    pooled = (expected[:, 0] + expected[:, 1]) / 2
    assert torch.allclose(model(spectrogram).logits, model.classifier(pooled), atol=1e-6)
    assert model.classifier.dense.weight.shape == (2, 32) and 0.01 < model.classifier.dense.weight.std() < 0.03


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
def test_of_a_grey_image_an_ast_makes_what_a_vit_with_two_class_tokens_makes_of_it(kind, tmp_path):
    original = drawn(kind(ViTConfig(**TINY, image_size=32, num_labels=5)))
    original.save_pretrained(tmp_path)
    model, spectrogram = from_images(tmp_path, 32, 32, **NO_OVERLAP), torch.randn(2, 32, 32)
    vit = getattr(original, "vit", original)
    hidden = vit.embeddings(grey(spectrogram))
    hidden = torch.cat([hidden[:, :1], hidden], dim=1)
    for layer in vit.layers:
        hidden = layer(hidden)
    expected = vit.layernorm(hidden)
    assert torch.allclose(model.base_model(spectrogram).last_hidden_state, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["deit", "vit"])
def test_patch_kernel_and_position_embeddings_by_hand(kind, tmp_path):
    original = (
        DeiTModel(DeiTConfig(**TINY, image_size=64)) if kind == "deit" else ViTModel(ViTConfig(**TINY, image_size=64))
    )
    embeddings, tokens = original.embeddings, 2 if kind == "deit" else 1
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight[:] = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
        embeddings.patch_embeddings.projection.bias[:] = 8.0
        embeddings.position_embeddings[:] = torch.arange(-tokens, 16.0)[:, None]  # patches: 4 · row + column
        embeddings.cls_token[:] = 16.0
        if kind == "deit":
            embeddings.distillation_token[:] = 32.0
    original.save_pretrained(tmp_path)
    # Frequency: 3 of the image's 4 rows stay, from 4 // 2 - 3 // 2 = 1 on. Time: 8 points over 4, half a patch apart.
    ours = from_images(tmp_path, 48, 128, **NO_OVERLAP).base_model.embeddings
    kernel = ours.patch_embeddings.projection
    assert kernel.weight.shape == (32, 1, 16, 16) and (kernel.weight == 7).all() and (kernel.bias == 8).all()
    time = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    patches = torch.cat([4 * row + time for row in (1, 2, 3)])
    expected = torch.cat([torch.tensor([-2.0, -1.0] if kind == "deit" else [-1.0, -1.0]), patches])
    assert torch.equal(ours.position_embeddings, expected[None, :, None].expand(1, 26, 32))
    assert (ours.cls_token == 16).all() and (ours.distillation_token == (32 if kind == "deit" else 16)).all()


def test_more_patches_on_both_axes_are_interpolated_bilinearly():
    grid, points = torch.randn(2, 2), torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    embeddings = torch.cat([torch.zeros(2), grid.flatten()])[None, :, None]
    larger = resample_position_embeddings(embeddings, (2, 2), (4, 4), cut_time=True, cut_frequency=True)
    assert torch.allclose(larger[0, 2:, 0].reshape(4, 4), points @ grid @ points.T)


@pytest.mark.parametrize(
    ("stride", "patches"), [(10, 1212), (12, 850), (14, 657), (16, 512)]
)  # as the paper counts them
@pytest.mark.parametrize("image", [224, 384])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [(DeiTModel, DeiTConfig), (ViTModel, ViTConfig)], ids=["deit", "vit"])
def test_every_size_and_stride_of_the_paper_has_its_shapes(kind, size, image, stride, patches):
    width, heads = SIZES[size]
    shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    config = ASTConfig(**shape, time_stride=stride, frequency_stride=stride)
    with torch.device("meta"):  # shapes without numbers
        images, wanted = kind[0](kind[1](**shape, image_size=image), add_pooling_layer=False), ASTModel(config)
        weights = weights_of_images(images, config)
    assert weights["embeddings.position_embeddings"].shape == (1, 2 + patches, width)
    wanted = {name: tensor.shape for name, tensor in wanted.state_dict().items()}
    assert {name: tensor.shape for name, tensor in weights.items()} == wanted


@pytest.mark.parametrize("start", ["random", "deit", "ast"])
@pytest.mark.parametrize("stride", [10, 12, 14, 16])
def test_any_length_and_stride_runs(start, stride, tmp_path):
    model = {
        "deit": lambda: DeiTModel(DeiTConfig(**TINY, image_size=224)),
        "ast": lambda: ASTForAudioClassification(ASTConfig(**TINY, max_length=1024)),
        "random": lambda: None,
    }[start]()
    if model:
        drawn(model).save_pretrained(tmp_path)
    config = {"time_stride": stride, "frequency_stride": stride} | ({} if model else TINY)
    for frames in (128, 400, 512, 1024, 2048):
        arguments = ModelArguments(model=str(tmp_path) if model else None, model_config=config)
        loaded = load_model(["a", "b"], arguments, BatchedASTFeatureExtractor(max_length=frames)).eval()
        positions = loaded.base_model.embeddings.position_embeddings
        assert positions.shape == (1, 2 + (112 // stride + 1) * ((frames - 16) // stride + 1), 32)
        assert (positions.abs().sum(-1) > 0).all()
        with torch.no_grad():
            logits = loaded(torch.randn(1, frames, 128)).logits
        assert logits.shape == (1, 2) and logits.isfinite().all()


def test_a_vit_is_a_mel_vit_unless_the_recipe_says_ast_and_a_deit_is_an_ast(tmp_path):
    ViTModel(ViTConfig(**TINY, image_size=32)).save_pretrained(tmp_path / "vit")
    DeiTModel(DeiTConfig(**TINY, image_size=32)).save_pretrained(tmp_path / "deit")
    extractor = BatchedASTFeatureExtractor(max_length=32, num_mel_bins=32)
    for model, architecture, kind in (
        ("vit", None, MelViTForAudioClassification),
        ("vit", "ast", ASTForAudioClassification),
        ("deit", None, ASTForAudioClassification),
    ):
        arguments = ModelArguments(model=str(tmp_path / model), architecture=architecture)
        assert type(load_model(["a", "b"], arguments, extractor)) is kind
    with pytest.raises(UserError, match="types mel-vit, vit, got .*, which is of type 'deit'$"):
        load_model(["a", "b"], ModelArguments(model=str(tmp_path / "deit"), architecture="vit"), extractor)


def test_the_features_are_log_mel_not_the_images(tmp_path):
    DeiTModel(DeiTConfig(**TINY, image_size=32)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"do_resize": true, "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "DeiTImageProcessor", "size": 32}'
    )
    extractor = load_extractor(ModelArguments(model=str(tmp_path)), FeatureArguments(max_length=48))
    assert (extractor.max_length, extractor.num_mel_bins) == (48, 128) and not hasattr(extractor, "image_mean")


@pytest.mark.parametrize("config", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"patch_size": 8}])
def test_weights_of_images_that_do_not_fit_are_an_error(config, tmp_path):
    DeiTModel(DeiTConfig(**TINY, image_size=32)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit the recipe's model_config. They differ in (embeddings|layers)"):
        from_images(tmp_path, 32, 32, **config)


def test_images_weights_with_a_tensor_missing_are_an_error(tmp_path):
    DeiTModel(DeiTConfig(**TINY, image_size=32)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: t for k, t in weights.items() if "distillation" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="differ in embeddings.distillation_token .1 tensors"):
        from_images(tmp_path, 32, 32)
