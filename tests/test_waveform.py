"""Models that compute their spectrogram: equal to the extractor's, trained by train.py, loaded by a stranger."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import TINY_AST, TINY_CNN14, TINY_VIT, TONES, tone
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, Wav2Vec2FeatureExtractor

import train
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.models.waveform import LogMel, WaveformConfig
from audio_dendrites.recipes import FeatureArguments, ModelArguments, parse_recipe
from data_collator import AugmentedClips, WaveformCollator

NETWORKS = {"ast": TINY_AST, "vit": TINY_VIT, "cnn14": TINY_CNN14}
FEATURES = FeatureArguments(max_length=48, mean=-5.0, std=3.0)
LENGTHS = (400, 3000, 7929, 8000, 20000)


def load(architecture="ast", **arguments):
    arguments = ModelArguments(
        architecture=architecture, model_config=NETWORKS[architecture], waveform=True, **arguments
    )
    return load_model(["a", "b"], arguments, load_extractor(arguments, FEATURES)).eval()


def clips():
    return [np.random.default_rng(n).standard_normal(n).astype(np.float32) / 5 for n in LENGTHS]


@pytest.mark.parametrize("rate", [16000, 32000])
def test_the_front_end_is_the_feature_extractor(rate):
    settings = {"sampling_rate": rate, "mean": -5.0, "std": 3.0, "max_length": 48}
    stock = BatchedASTFeatureExtractor(**settings).stock()
    clips_ = [tone(440, 1.0, rate), *(clip for clip in clips() if len(clip) >= rate // 40)]
    longest = max(map(len, clips_))
    waveforms = torch.from_numpy(np.stack([np.pad(clip, (0, longest - len(clip))) for clip in clips_]))
    inside = torch.arange(longest) < torch.tensor([len(clip) for clip in clips_])[:, None]
    front_end = LogMel(
        WaveformConfig(window_length=rate // 40, hop_length=rate // 100, high_frequency=rate / 2, **settings)
    )
    found = front_end(waveforms, inside)[:, :48]
    expected = torch.from_numpy(np.stack(stock(clips_, sampling_rate=rate)["input_values"]))[:, : found.shape[1]]
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", NETWORKS)
def test_waveforms_give_the_logits_of_their_spectrograms(architecture):
    model = load(architecture)
    log_mel = BatchedASTFeatureExtractor(max_length=48, mean=-5.0, std=3.0)(clips(), return_tensors="pt")[
        "input_values"
    ]
    with torch.no_grad():
        expected = model.backbone(log_mel).logits
        alone = torch.cat([model(torch.from_numpy(clip)[None]).logits for clip in clips()])
        extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
        batch = model(**extractor(clips(), sampling_rate=16000, padding=True, return_tensors="pt")).logits
    assert torch.allclose(alone, expected, atol=1e-4) and torch.allclose(batch, expected, atol=1e-4)


def test_trainable_filters_learn_and_fixed_ones_do_not():
    waveforms, labels = torch.from_numpy(np.stack([tone(300), tone(3000)])), torch.tensor([0, 1])
    fixed, trained = load(), load(trainable_filters=True)
    for model in (fixed, trained):
        model(waveforms, labels=labels).loss.backward()
    assert not any(name.startswith("front_end") for name, _ in fixed.named_parameters())
    gradient = trained.front_end.filters.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert fixed.state_dict().keys() == trained.state_dict().keys()


def test_half_precision_leaves_the_front_end_whole(tmp_path):
    model = load("cnn14")
    model.save_pretrained(tmp_path / "model")
    waveforms = torch.from_numpy(np.stack([tone(300), tone(3000)]))
    half = AutoModelForAudioClassification.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.front_end.filters.dtype == torch.float32 and half.backbone.dtype == torch.bfloat16
    # No file holds the window, so that older folders load too.
    assert "front_end.window" not in load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(half.front_end.window, torch.hann_window(400, periodic=False))
    with torch.no_grad():
        expected = model(waveforms).logits
        assert (half(waveforms).logits - expected).abs().max() < 0.1 * expected.abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.ones_like(waveforms, dtype=torch.bool)
            assert torch.equal(model.front_end(waveforms, inside), half.front_end(waveforms, inside))


def test_masks_hold_the_mean_of_the_spectrogram():
    seen, model = [], load()
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frames, bands = torch.zeros(1, 48, dtype=torch.bool), torch.zeros(1, 128, dtype=torch.bool)
    frames[0, 3:7], bands[0, 100:] = True, True
    waveform = torch.from_numpy(tone(440))[None]
    model(waveform), model(waveform, masked_frames=frames, masked_bands=bands)
    masked = (frames[:, :, None] | bands[:, None]).expand(1, 48, 128)
    assert (seen[1][masked] == 0).all() and torch.equal(seen[1][~masked], seen[0][~masked])


def drawn(lengths, epoch=0):
    examples = AugmentedClips(
        [{"input_values": torch.arange(1.0, n + 1).half() / 4096, "labels": i % 2} for i, n in enumerate(lengths)]
    )
    examples.set_epoch(epoch)
    return [examples[row] for row in range(len(lengths))]


def test_the_collator_pads_rolls_and_masks_waveforms_in_frames():
    collator = WaveformCollator(
        5, 2, window_length=40, hop_length=16, num_mel_bins=8, time_roll=2, time_mask=3, frequency_mask=4, gain=6.0
    )
    plain = collator([{key: example[key] for key in ("input_values", "labels")} for example in drawn([50, 200])])
    assert plain["input_values"].shape == (2, 104) and plain.keys() == {"input_values", "labels", "attention_mask"}
    assert plain["attention_mask"].sum(1).tolist() == [50, 104] and not plain["input_values"][0, 50:].any()
    rolls, gains, most = set(), [], 0
    for epoch in range(60):
        batch = collator(drawn([104, 50], epoch))
        ramp = batch["input_values"][0]
        rolls.add((int(ramp.argmax()) + 1) % 104)
        gains.append(20 * np.log10(float(ramp.max()) / (104 / 4096)))
        assert batch["attention_mask"].sum(1).tolist() == [104, 50]
        assert batch["masked_frames"].shape == (2, 5) and batch["masked_bands"].shape == (2, 8)
        most = max(most, int(batch["masked_frames"].sum(1).max()))
    assert len(rolls) > 30 and all(roll <= 32 or roll >= 72 for roll in rolls) and most == 3
    assert -6.01 < min(gains) < -4 and 4 < max(gains) < 6.01


def test_noise_is_a_share_of_the_clips_level_and_repeats_with_its_draw():
    examples = AugmentedClips([{"input_values": torch.from_numpy(tone(440, 1.0)), "labels": 0}] * 8)
    collator = WaveformCollator(98, 2, noise=0.1)
    clean = WaveformCollator(98, 2)([examples[row] for row in range(8)])["input_values"]
    first, again = (collator([examples[row] for row in range(8)])["input_values"] for _ in range(2))
    assert torch.equal(first, again)
    shares = (first - clean).square().mean(1).sqrt() / clean.square().mean(1).sqrt()
    assert (shares < 0.101).all() and shares.max() > 0.04 and len(set(shares.tolist())) == 8


def test_mixup_adds_waveforms_and_their_labels():
    collator = WaveformCollator(98, 2, mixup_alpha=0.5)
    batch = collator(drawn([16000, 8000]))
    plain = WaveformCollator(98, 2)(drawn([16000, 8000]))
    weight = batch["labels"][0, 0]
    mixed = weight * plain["input_values"][0] + (1 - weight) * plain["input_values"][1]
    assert torch.allclose(batch["input_values"][0], mixed, atol=1e-6)
    assert torch.equal(batch["attention_mask"][1], plain["attention_mask"][0] | plain["attention_mask"][1])


def test_a_filter_on_waveforms_is_an_error():
    with pytest.raises(ValueError, match="filter_gain, frequency_shift, roll_padded: need spectrograms"):
        WaveformCollator(98, 2, filter_gain=0.3)


RECIPE = TONES | {
    "max_length": 80, "waveform": True, "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3,
    "precision": "fp32", "preprocessing_num_workers": 1, "time_roll": 5, "time_mask": 8, "frequency_mask": 8,
    "mixup_alpha": 0.5, "gain": 6.0, "noise": 0.1, "mean": -5.0, "std": 3.0,
}  # fmt: skip


@pytest.fixture
def run(tones, tmp_path):
    """Trains as the recipe and these changes say; gives the folder."""

    def train_(**changes):
        recipe = RECIPE | {"dataset": str(tones), "output_dir": str(tmp_path / "run")} | changes
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        train.main(parse_recipe([str(tmp_path / "recipe.yaml")]))
        return tmp_path / "run"

    return train_


STRANGER = """
import sys

class Blocked:  # also where the environment has them installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("perforatedai", "audio_dendrites", "data_collator"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import json, numpy
from transformers import pipeline

answers = []
for folder, batch_size in zip(sys.argv[2:], (1, 3, 2)):
    classify = pipeline("audio-classification", model=folder, trust_remote_code=True)
    clips = list(numpy.load(sys.argv[1], allow_pickle=True).values())
    answers.append(classify(clips, batch_size=batch_size, num_workers=0))
print("answers", json.dumps(answers))
"""


def test_a_stranger_gets_the_training_models_scores_from_raw_audio(run, tmp_path):
    """In one process without this repository: a trained waveform model, and both other families on spectrograms."""
    folders = [run(architecture="cnn14", model_config=TINY_CNN14, trainable_filters=True)]
    assert {path.name for path in folders[0].glob("*.py")} == {
        "beats.py", "cnn14.py", "dendritic.py", "vit.py", "waveform.py",
    }  # fmt: skip
    assert type(AutoFeatureExtractor.from_pretrained(folders[0])) is Wav2Vec2FeatureExtractor
    wave = [tone(3000 if row % 2 else 300, 0.3 + 0.02 * row, seed=row) for row in range(16, 24)]
    wave = [np.round(clip * 32767).astype(np.float32) / 32768 for clip in wave]
    expected = [np.stack(pandas.read_parquet(folders[0] / "predictions.parquet")["logits"])]
    extractor = BatchedASTFeatureExtractor(max_length=48)
    for architecture in ("vit", "cnn14"):
        arguments = ModelArguments(architecture=architecture, model_config=NETWORKS[architecture])
        model = load_model(["high", "low"], arguments, extractor).eval()
        folders.append(tmp_path / architecture)
        model.save_pretrained(folders[-1])
        extractor.stock().save_pretrained(folders[-1])
        with torch.no_grad():
            expected.append(model(extractor(wave, return_tensors="pt")["input_values"]).logits.numpy())
    np.savez(tmp_path / "clips.npz", *wave)
    (tmp_path / "stranger.py").write_text(STRANGER)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", tmp_path / "stranger.py", tmp_path / "clips.npz", *folders], cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "modules")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for logits, found in zip(expected, json.loads(done.stdout.split("answers", 1)[1]), strict=True):
        clips_ = [{answer["label"]: answer["score"] for answer in clip} for clip in found]
        scores = np.array([[clip[name] for name in ("high", "low")] for clip in clips_])
        assert np.abs(scores - torch.from_numpy(logits).softmax(-1).numpy()).max() < 1e-5


def test_a_saved_waveform_model_starts_another(tmp_path):
    model = load("cnn14")
    model.save_pretrained(tmp_path / "model")
    arguments = {"model": str(tmp_path / "model"), "waveform": True}
    extractor = load_extractor(ModelArguments(**arguments), FeatureArguments(max_length=64))
    start = load_model(["x", "y", "z"], ModelArguments(**arguments, unfreeze_last_layers=1), extractor)
    assert (
        start.config.max_length == 64
        and start.config.mean == -5.0
        and start(torch.randn(1, 9000)).logits.shape == (1, 3)
    )
    assert torch.equal(start.backbone.fc1.weight, model.backbone.fc1.weight)
    assert not start.backbone.bn0.weight.requires_grad and start.backbone.layers[2].conv1.weight.requires_grad
    for wrong, features, message in (
        ({"model": arguments["model"]}, {}, "waveform must be true for .*, which takes waveforms, got false"),
        (arguments, {"mean": 1.0}, "mean must be -5.0, as in the front end of"),
    ):
        with pytest.raises(UserError, match=message):
            load_extractor(ModelArguments(**wrong), FeatureArguments(**features))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter_gain": 0.3}, "filter_gain must be 0.0 for this model, got 0.3: its batches are made of waveforms"),
        ({"waveform": False}, "gain must be 0.0 for this model, got 6.0: its batches are made of spectrograms"),
        (
            {"waveform": False, "gain": 0, "noise": 0, "trainable_filters": True},
            "trainable_filters must be false with",
        ),
        (
            {"trainable_filters": True, "unfreeze_last_layers": 1},
            "unfreeze_last_layers must be left out with trainable_filters: true, got 1",
        ),
        (
            {"architecture": "cnn14", "activation_checkpointing": True},
            "activation_checkpointing must be false, got true: CNN14",
        ),
        (
            {"architecture": "cnn14", "attn_implementation": "sdpa"},
            "must be left out, got sdpa: CNN14",
        ),
    ],
)
def test_what_a_recipe_cannot_have_is_said_before_any_data_is_read(run, changes, message):
    with pytest.raises(UserError, match=message):
        run(dataset="/nowhere", **changes)
