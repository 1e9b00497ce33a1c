"""Files of other formats, each read by the runtime it is for."""

import json
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, TINY_AST, TINY_BEATS, TINY_CNN14, TINY_VIT, tone
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, Wav2Vec2FeatureExtractor

from audio_dendrites.errors import UserError
from audio_dendrites.models.beats import BEATsConfig
from audio_dendrites.models.cnn14 import CNN14Config
from audio_dendrites.models.dendritic import DendriticASTConfig, DendriticASTForAudioClassification
from audio_dendrites.models.vit import MelViTConfig
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification
from audio_dendrites.publishing import formats as export_formats
from audio_dendrites.publishing.formats import FORMATS, TOLERANCE, check_parity, export_run, main
from audio_dendrites.publishing.web import quantize

LABELS = ["siren", "dog", "drill"]
DENDRITES = {
    "classifier.dense": {"count": 1, "activation": "sigmoid"},
    "audio_spectrogram_transformer.layers.0.mlp.fc1": {"count": 2, "activation": "gelu"},
}
EXTRACTOR = ASTFeatureExtractor(max_length=48, mean=-4.0, std=3.5)


def write_run(folder, dendrites=None):
    """The folder of a model as train.py leaves it, with random numbers in every parameter."""
    fields = TINY_AST | {"num_hidden_layers": 1, "max_length": 48, "id2label": dict(enumerate(LABELS))}
    torch.manual_seed(1)
    model = DendriticASTForAudioClassification(DendriticASTConfig(**fields, dendrites=dendrites))
    if dendrites is None:
        model = ASTForAudioClassification(ASTConfig(**fields))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    EXTRACTOR.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return (folder := tmp_path_factory.mktemp("plain")), write_run(folder)


@pytest.fixture(scope="module")
def dendritic(tmp_path_factory):
    return (folder := tmp_path_factory.mktemp("dendritic")), write_run(folder, DENDRITES)


@pytest.fixture(params=["plain", "dendritic"])
def either(request):
    return request.getfixturevalue(request.param)


def tones(clips):
    return [tone(300 * (clip + 1), seed=clip) for clip in range(clips)]


def features(clips):
    return EXTRACTOR(tones(clips), sampling_rate=16000, return_tensors="pt")["input_values"]


@torch.no_grad()
def assert_same_logits(model, logits, batches):
    for batch in batches:
        expected = model(batch).logits
        assert len(batch) == 1 or expected.std(0).min() > 1e-3  # the clips can be told apart
        assert (torch.as_tensor(logits(batch)) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def onnx_logits(path, axes):
    """A function from features to logits in ONNX Runtime, for a file whose input has these axes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == axes and session.get_outputs()[0].shape == ["batch", 3]
    return lambda batch: session.run(None, {"input_values": batch.numpy()})[0], session


def assert_carries_what_a_reader_needs(values):
    values = {name: json.loads(value) for name, value in values.items()}
    assert values["labels"] == LABELS and values["sampling_rate"] == 16000
    preprocessor = {"max_length": 48, "mean": -4.0, "std": 3.5, "num_mel_bins": 128}
    assert preprocessor.items() <= values["preprocessor_config"].items()
    assert values["config"]["hidden_size"] == TINY_AST["hidden_size"]


def assert_names_no_path(content):
    for path in (ROOT, sys.prefix, torch.__path__[0]):
        assert str(path).encode() not in content


def test_onnx_runtime_gives_the_logits_of_the_model_for_any_batch(either):
    folder, model = either
    path, difference = export_run(folder, "onnx")
    assert path == folder / "export" / "model.onnx" and 0 <= difference <= TOLERANCE
    logits, session = onnx_logits(path, ["batch", 48, 128])
    assert_same_logits(model, logits, map(features, (1, 2, 5)))
    assert_carries_what_a_reader_needs(session.get_modelmeta().custom_metadata_map)
    assert [file.name for file in path.parent.glob("*onnx*")] == ["model.onnx"]  # weights included
    assert_names_no_path(path.read_bytes())


KALDI, LIBROSA = (
    {"max_length": 48, "mean": -5.0, "std": 3.0},
    {"convention": "librosa", "window_length": 512, "num_mel_bins": 64, "mean": 0.0, "std": 0.5},
)
WAVEFORM_MODELS = {  # front end, backbone, a layer with dendrites
    "kaldi": (KALDI, ASTConfig(**TINY_AST, max_length=48), "backbone.classifier.dense"),
    "kaldi trained": (KALDI | {"trainable_filters": True}, MelViTConfig(**TINY_VIT), None),
    "librosa": (LIBROSA | {"max_length": 48}, CNN14Config(**TINY_CNN14), None),
    "librosa trained, any length": (
        LIBROSA | {"max_length": None, "trainable_filters": True}, CNN14Config(**TINY_CNN14), "backbone.layers.0.conv1",
    ),
    "povey, any length": (KALDI | {"convention": "povey", "max_length": None}, BEATsConfig(**TINY_BEATS), None),
}  # fmt: skip


@pytest.mark.parametrize(("front_end", "backbone", "grown"), WAVEFORM_MODELS.values(), ids=WAVEFORM_MODELS)
def test_waveform_models_are_exported_for_any_batch_and_any_length(front_end, backbone, grown, tmp_path):
    dendrites = grown and {grown: {"count": 2, "activation": "gelu"}}
    torch.manual_seed(0)
    config = WaveformConfig(backbone=backbone.to_dict(), dendrites=dendrites, num_labels=3, **front_end)
    model = WaveformForAudioClassification(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "filters" not in name:
            nn.init.normal_(parameter, 0, 0.3)  # dendrites too: a fresh one has no effect
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(tmp_path)
    path, _ = export_run(tmp_path, "onnx")
    runtimes = [onnx_logits(path, ["batch", "samples"])[0]]
    if config.max_length is None:
        program = torch.export.load(export_run(tmp_path, "torch_export")[0]).module()
        runtimes.append(lambda waveforms: program(input_values=waveforms).detach())
    # Shorter and longer than the window of the model.
    waveforms = [torch.randn(shape) / 5 for shape in ((1, 500), (3, 7999), (2, 40000))]
    for logits in runtimes:
        assert_same_logits(model, logits, waveforms)
    quantize(path, tmp_path / "small.onnx")  # int8 cannot hold the range of a power spectrum
    small, _ = onnx_logits(tmp_path / "small.onnx", ["batch", "samples"])
    for clips in (1, 2):
        batch = torch.from_numpy(np.stack(tones(clips)))
        expected = model(batch).logits.detach()
        assert (torch.from_numpy(small(batch)) - expected).abs().max() < 0.1 * expected.abs().max()


def test_an_exported_file_can_be_quantized(dendritic, tmp_path):
    folder, model = dendritic
    path, _ = export_run(folder, "onnx", tmp_path / "model.onnx")
    quantize(path, tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 0.5 * path.stat().st_size
    expected = model(features(4)).logits.detach()
    found = torch.from_numpy(onnx_logits(tmp_path / "small.onnx", ["batch", 48, 128])[0](features(4)))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_torch_export_files_need_torch_alone(plain, dendritic, tmp_path):
    np.save(tmp_path / "features.npy", features(5).numpy())
    runs = {"plain": plain, "dendritic": dendritic}
    for name, (folder, _) in runs.items():
        path, difference = export_run(folder, "torch_export", tmp_path / "new" / f"{name}.pt2")
        assert difference <= TOLERANCE
        with zipfile.ZipFile(path) as archive:
            extra = {name.split("/")[-1]: archive.read(name) for name in archive.namelist() if "/extra/" in name}
            assert_carries_what_a_reader_needs({name.removesuffix(".json"): text for name, text in extra.items()})
            for member in archive.namelist():
                assert_names_no_path(archive.read(member))
    code = """
import sys, numpy as np, torch
features = torch.from_numpy(np.load("features.npy"))
for name in ("plain", "dendritic"):
    program = torch.export.load(f"new/{name}.pt2").module()
    np.save(f"{name}.npy", program(input_values=features).detach().numpy())
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    for name, (_, model) in runs.items():
        assert_same_logits(model, lambda batch, name=name: np.load(tmp_path / f"{name}.npy"), [features(5)])


def test_safetensors_holds_the_live_state_dict(either):
    folder, model = either
    path, difference = export_run(folder, "safetensors")
    assert difference == 0
    tensors, expected = load_file(path), model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with safe_open(path, "pt") as file:
        assert_carries_what_a_reader_needs(file.metadata())


def test_a_difference_above_the_tolerance_leaves_no_file_and_keeps_the_old_one(plain, tmp_path, monkeypatch):
    folder, model = plain
    read = FORMATS["safetensors"].read
    output = tmp_path / "model.safetensors"

    def off_by(share):
        shifted = lambda path, model: lambda batch: (lambda x: x + share * x.abs().max())(read(path, model)(batch))  # noqa: E731
        monkeypatch.setitem(FORMATS, "safetensors", FORMATS["safetensors"]._replace(read=shifted))

    off_by(TOLERANCE / 10)
    assert 0 < export_run(folder, "safetensors", output)[1] <= TOLERANCE
    before = output.read_bytes()
    for share in (TOLERANCE * 10, float("nan")):
        off_by(share)
        with pytest.raises(UserError, match="must be those of the model within 1e-05 of the largest one, got a"):
            export_run(folder, "safetensors", output)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"] and output.read_bytes() == before
    with pytest.raises(UserError, match=r"must have the shape \(1, 3\), got \(1, 2\)"):
        check_parity(model, lambda batch: torch.zeros(len(batch), 2), features(4))
    model = lambda batch: SimpleNamespace(logits=batch[:, :3])  # noqa: E731
    for wrong in (2, 4):  # a graph that is right for some lengths only, as that of SEW
        with pytest.raises(UserError, match="must be those of the model"):
            check_parity(model, lambda batch, wrong=wrong: batch[:, :3] + batch.shape[1] % wrong, torch.ones(4, 176000))


def test_a_folder_without_a_whole_model_is_an_error(tmp_path):
    def refuse(message):
        with pytest.raises(UserError, match=message):
            export_run(tmp_path, "safetensors")

    refuse("has no config.json and no preprocessor_config.json; give the folder of")
    write_run(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file({"stranger": torch.ones(1)} | load_file(weights), weights, metadata={"format": "pt"})
    refuse("the weights do not fit config.json: 1 tensors are missing or left over, among them stranger")
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(str(tmp_path))
    write_run(tmp_path, DENDRITES)  # dendrites without their configuration are not dropped in silence
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dendrites": {}}))
    refuse("(?s)size|weights")
    assert not list(tmp_path.glob("export/*"))


def test_what_cannot_be_exported_is_an_error_that_says_what_to_do(plain, tmp_path, monkeypatch):
    for format, output, message in (
        ("onnx", plain[0] / "model.pt", "output: the file must end in .onnx, got .*model.pt"),
        ("safetensors", plain[0] / "model.safetensors", "model.safetensors holds the weights of the run itself"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(plain[0], format, output)
    monkeypatch.setattr(export_formats, "LARGEST_ONNX", 10_000)
    with pytest.raises(UserError, match="format onnx: the weights must be at most.*Use --format torch_export"):
        export_run(plain[0], "onnx", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match="format onnx needs onnxscript: pip install onnx onnxruntime onnxscript"):
        export_run(plain[0], "onnx")


def test_the_command_says_where_the_file_is_and_how_close(plain, tmp_path, capsys):
    main([str(plain[0]), "--format", "safetensors", "--output", str(tmp_path / "x.safetensors")])
    assert "x.safetensors (0.0" in (said := capsys.readouterr().out) and "by at most 0.0e+00" in said
    command = [sys.executable, "-m", "audio_dendrites.publishing.formats", str(tmp_path), "--format", "onnx"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stderr.startswith(f"error: {tmp_path} has no config.json")
