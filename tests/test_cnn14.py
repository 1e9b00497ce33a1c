"""CNN14 against an independent reading of the published definition, and its converted checkpoints."""

import numpy as np
import pytest
import torch
from conftest import TINY_CNN14, tone
from torch import nn
from torch.nn import functional
from torchaudio.functional import melscale_fbanks
from transformers import AutoModelForAudioClassification, pipeline

from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.convert_panns import convert, main
from audio_dendrites.models.families import learning_rates
from audio_dendrites.models.loading import load_model
from audio_dendrites.recipes import ModelArguments

EXTRACTOR = BatchedASTFeatureExtractor(max_length=48, num_mel_bins=16)


class PublishedBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, (3, 3), (1, 1), (1, 1), bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, (3, 3), (1, 1), (1, 1), bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x, pool_size):
        x = functional.relu(self.bn1(self.conv1(x)))
        return functional.avg_pool2d(functional.relu(self.bn2(self.conv2(x))), kernel_size=pool_size)


class PublishedSTFT(nn.Module):
    """A Fourier transform as convolutions, the window in their weights."""

    def __init__(self, size):
        super().__init__()
        self.conv_real, self.conv_imag = (nn.Conv1d(1, size // 2 + 1, size, bias=False) for _ in range(2))
        angle = 2 * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
        if self.conv_real.weight.device.type != "meta":
            self.conv_real.weight.data = torch.tensor(window * np.cos(angle)).float()[:, None]
            self.conv_imag.weight.data = torch.tensor(window * -np.sin(angle)).float()[:, None]


class PublishedCNN14(nn.Module):
    """Kong et al. 2020, table I and section III, as the authors' Cnn14 names its tensors, in evaluation."""

    def __init__(self, channels=64, bands=64, classes=527, window=1024):
        super().__init__()
        self.spectrogram_extractor, self.logmel_extractor = nn.Module(), nn.Module()
        self.spectrogram_extractor.stft = PublishedSTFT(window)
        self.logmel_extractor.melW = nn.Parameter(torch.rand(window // 2 + 1, bands), requires_grad=False)
        self.bn0 = nn.BatchNorm2d(bands)
        widths = [1, *(channels * 2**block for block in range(6))]
        for block in range(6):
            self.add_module(f"conv_block{block + 1}", PublishedBlock(widths[block], widths[block + 1]))
        self.fc1, self.fc_audioset = nn.Linear(widths[6], widths[6]), nn.Linear(widths[6], classes)
        self.hop = window * 5 // 16

    def forward(self, waveforms):
        stft = self.spectrogram_extractor.stft
        window = stft.conv_real.weight.shape[-1]
        x = functional.pad(waveforms[:, None], (window // 2, window // 2), mode="reflect")
        real, imaginary = (functional.conv1d(x, c.weight, stride=self.hop) for c in (stft.conv_real, stft.conv_imag))
        mel = (real**2 + imaginary**2).transpose(1, 2) @ self.logmel_extractor.melW
        x = 10 * torch.log10(torch.clamp(mel, min=1e-10))[:, None]
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        for block in range(6):
            x = getattr(self, f"conv_block{block + 1}")(x, (1, 1) if block == 5 else (2, 2))
        x = torch.mean(x, dim=3)
        x = torch.max(x, dim=2)[0] + torch.mean(x, dim=2)
        return torch.sigmoid(self.fc_audioset(functional.relu(self.fc1(x))))


@pytest.fixture
def published(tmp_path):
    """A narrow network with random weights and statistics, and its checkpoint."""
    torch.manual_seed(0)
    model = PublishedCNN14(channels=4, classes=7).eval()
    for name, tensor in model.state_dict().items():
        if "bn" in name and tensor.dtype == torch.float32:
            tensor.uniform_(0.5, 1.5)
    torch.save({"model": model.state_dict()}, tmp_path / "Cnn14.pth")
    return model, tmp_path / "Cnn14.pth"


def test_a_converted_checkpoint_gives_the_published_outputs(published):
    model, path = published
    ours = convert(path, list("abcdefg"))
    waveforms = torch.from_numpy(np.stack([tone(440, 1, 32000), tone(3000, 1, 32000, seed=1)]))
    with torch.no_grad():
        assert torch.allclose(ours(waveforms).logits.sigmoid(), model(waveforms), atol=1e-5, rtol=0)
        assert torch.allclose(ours(waveforms).logits, torch.logit(model(waveforms)), atol=1e-4, rtol=1e-4)
    assert ours.config.id2label[0] == "a" and ours.config.sampling_rate == 32000


def test_the_published_sizes_are_those_of_the_default_configuration():
    with torch.device("meta"):
        published, ours = PublishedCNN14(), CNN14ForAudioClassification(CNN14Config(num_labels=527))
    shapes = {
        name.replace("fc_audioset", "classifier"): tensor.shape
        for name, tensor in published.state_dict().items()
        if "extractor" not in name
    }
    for block in range(6):
        shapes = {name.replace(f"conv_block{block + 1}", f"layers.{block}"): shape for name, shape in shapes.items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert round(sum(parameter.numel() for parameter in ours.parameters()) / 1e6, 1) == 80.8


def test_a_converted_folder_takes_raw_audio_in_the_pipeline(published, tmp_path):
    model, path = published
    (tmp_path / "labels.csv").write_text(
        "index,mid,display_name\n" + "".join(f'{i},/m/{i},"{i}, x"\n' for i in range(7))
    )
    main([str(path), str(tmp_path / "folder"), "--labels", str(tmp_path / "labels.csv")])
    waveform = tone(440, 0.7, 32000)
    answer = pipeline("audio-classification", model=str(tmp_path / "folder"))(waveform, top_k=7)
    with torch.no_grad():
        expected = model(torch.from_numpy(waveform)[None])[0]
    for found in answer:
        assert abs(found["score"] - expected[int(found["label"].split(",")[0])]) < 1e-5


def test_the_front_end_has_librosas_filters(published):
    ours = convert(published[1])
    fresh = type(ours)(ours.config)
    wanted = melscale_fbanks(513, 50.0, 14000.0, 64, 32000, norm="slaney", mel_scale="slaney")
    assert torch.allclose(fresh.front_end.filters, wanted, atol=1e-6)


@pytest.mark.parametrize("damage", ["no file", "no tensor", "another network", "another window", "labels"])
def test_what_is_no_cnn14_checkpoint_says_so(published, tmp_path, damage):
    path, labels = published[1], None
    tensors = torch.load(path)["model"]
    if damage == "no file":
        path = tmp_path / "nowhere.pth"
    elif damage == "no tensor":
        del tensors["fc1.weight"]
    elif damage == "another network":
        tensors = {"weight": torch.ones(3)}
    elif damage == "another window":
        tensors["spectrogram_extractor.stft.conv_real.weight"] = torch.ones(10, 1, 20)
    else:
        labels = ["one"]
    if damage != "no file":
        torch.save({"model": tensors}, path)
    message = {"no file": "No such file", "no tensor": "fc1.weight", "another network": "the tensors of Cnn14",
               "another window": "got windows of 20", "labels": "must be 7 names.*got 1"}[damage]  # fmt: skip
    with pytest.raises(UserError, match=message):
        convert(path, labels)


def test_the_slim_width_has_1_6_million_parameters():
    model = CNN14ForAudioClassification(CNN14Config(width=0.140625, num_mel_bins=128, num_labels=10))
    assert 1.55e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.65e6
    convolution, norm = model.layers[2].conv1.weight, model.layers[2].bn1
    bound = (6 / ((convolution.shape[0] + convolution.shape[1]) * 9)) ** 0.5  # Xavier's
    assert 0.95 * bound < convolution.abs().max() <= bound
    assert (norm.weight == 1).all() and (norm.bias == 0).all() and (model.fc1.bias == 0).all()


def slim(**arguments):
    return load_model(["a", "b"], ModelArguments(architecture="cnn14", model_config=TINY_CNN14, **arguments), EXTRACTOR)


def test_dropout_is_in_training_only_and_the_loss_has_gradients_everywhere():
    model, inputs = slim(), torch.randn(4, 48, 16)
    assert not torch.equal(model.train()(inputs).logits, model(inputs).logits)
    model(inputs, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model.eval()(inputs).logits, model(inputs).logits)


def test_frozen_blocks_keep_weights_and_statistics():
    model = slim(unfreeze_last_layers=1).train()
    trained = {name.split(".")[0] + name.split(".")[1][:1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"layers2", "fc1w", "fc1b", "classifierw", "classifierb"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(4, 48, 16))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("layers.2.bn") for name in moved)


def test_learning_rates_fall_towards_the_input():
    rates = learning_rates(slim(), 1.0, head_learning_rate=5.0, layer_decay=0.5)
    assert rates["classifier.weight"] == 5.0 and rates["fc1.weight"] == 1.0
    assert rates["layers.2.conv1.weight"] == 0.5 and rates["layers.0.bn1.weight"] == rates["bn0.weight"] * 2 == 0.125


def test_a_saved_model_is_loaded_whole_or_with_a_new_head(tmp_path):
    model = slim().eval()
    model.save_pretrained(tmp_path / "model")
    EXTRACTOR.save_pretrained(tmp_path / "model")
    again = AutoModelForAudioClassification.from_pretrained(tmp_path / "model")
    inputs = torch.randn(2, 48, 16)
    assert type(again) is CNN14ForAudioClassification and torch.equal(again(inputs).logits, model(inputs).logits)
    start = load_model(["a", "c", "b"], ModelArguments(model=str(tmp_path / "model")), EXTRACTOR)
    assert torch.equal(start.fc1.weight, model.fc1.weight) and start.classifier.weight.shape == (3, 16)


@pytest.mark.parametrize(
    ("arguments", "extractor", "message"),
    [
        (
            {"attn_implementation": "eager"},
            EXTRACTOR,
            "must be left out, got eager: CNN14.* has no choice of attention",
        ),
        ({"unfreeze_last_layers": 4}, EXTRACTOR, "unfreeze_last_layers must be at most 3"),
        (
            {},
            BatchedASTFeatureExtractor(max_length=3),
            "max_length must be at least 4, got 3: CNN14 halves it 2 times",
        ),
        ({}, BatchedASTFeatureExtractor(num_mel_bins=2), "num_mel_bins must be at least 4, got 2"),
    ],
)
def test_what_a_cnn14_cannot_do_is_an_error(arguments, extractor, message):
    with pytest.raises(UserError, match=message):
        load_model(["a", "b"], ModelArguments(architecture="cnn14", model_config=TINY_CNN14, **arguments), extractor)


def test_other_mel_bands_than_the_pretrained_ones_are_an_error(tmp_path):
    slim().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="differ in bn0"):
        load_model(
            ["a", "b"], ModelArguments(model=str(tmp_path / "model")), BatchedASTFeatureExtractor(num_mel_bins=32)
        )
    with pytest.raises(UserError, match="types mel-vit, vit, .*which is of type 'cnn14'"):
        load_model(["a", "b"], ModelArguments(model=str(tmp_path / "model"), architecture="vit"), EXTRACTOR)
