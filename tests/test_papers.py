"""What the recipes named after a paper share with its authors' code, by number against torchaudio, torch or a few lines
that do the same as that code (github.com/YuanGongND/ast, github.com/qiuqiangkong/audioset_tagging_cnn)."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, TINY_AST, TINY_CNN14, TONES, tone, tone_of, wav, write_tones
from datasets import Dataset
from safetensors.torch import load_file
from torch.optim.lr_scheduler import MultiStepLR
from torchaudio.compliance.kaldi import fbank
from torchaudio.functional import mask_along_axis, melscale_fbanks
from transformers import AutoConfig

import train
from audio_dendrites.data.audio import load_waveform
from audio_dendrites.data.features import BatchedASTFeatureExtractor, extract_features
from audio_dendrites.errors import UserError
from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.convert_panns import SETTINGS
from audio_dendrites.models.finished import load_finished
from audio_dendrites.models.loading import check_model, load_extractor, load_model
from audio_dendrites.recipes import FeatureArguments, ModelArguments, RunArguments, parse_recipe
from audio_dendrites.results.inference import classify_clips
from audio_dendrites.training.trainer import step_factor
from data_collator import MASKS, AugmentedClips, SpectrogramCollator, WaveformCollator

PAPERS = ["audioset/ast_balanced", "audioset/ast_full", "esc50/ast", "esc50/ast_imagenet", "speech_commands/ast"]


def drawn(shape=(60, 32), count=8, epoch=0):
    """Training examples of random numbers, with their draws."""
    random = np.random.default_rng(0)
    clips = [{"input_values": random.standard_normal(shape).astype(np.float32), "labels": i % 3} for i in range(count)]
    clips = AugmentedClips(clips, seed=1)
    clips.set_epoch(epoch)
    return [clips[row] for row in range(count)]


@pytest.mark.parametrize(("name", "level"), [("esc50/ast", 0.618), ("audioset/ast_full", 0.467)])
@pytest.mark.parametrize("waveform", [False, True])
def test_masks_hold_the_raw_log_mels_zero(name, level, waveform):
    recipe = parse_recipe([str(ROOT / f"configs/{name}.yaml")])
    mean, std = recipe.features.mean, recipe.features.std
    extractor = load_extractor(ModelArguments(waveform=waveform), recipe.features)
    collator = (WaveformCollator if waveform else SpectrogramCollator)(
        **extractor.batch_layout | {"max_length": 60}, mask_value=recipe.augmentation.mask_value, time_mask=20
    )
    batch = collator(drawn((9840,) if waveform else (60, 32)))
    if waveform:
        assert batch["mask_value"] == pytest.approx(level, abs=1e-3) and batch["masked_frames"].any()
        return
    plain = torch.from_numpy(np.stack([example["input_values"] for example in drawn()]))
    masked = (batch["input_values"] != plain).all(2)
    raw = (plain * 2 * std + mean).masked_fill(masked[:, :, None], 0.0)  # masked first, as src/dataloader.py does
    assert torch.allclose(batch["input_values"], (raw - mean) / (2 * std), atol=1e-5)
    assert batch["input_values"][masked].unique().item() == pytest.approx(level, abs=1e-3)


def test_the_models_masks_hold_what_the_collator_says():
    arguments = ModelArguments(waveform=True, model_config=TINY_AST)
    model = load_model(["a", "b"], arguments, load_extractor(arguments, FeatureArguments(max_length=48))).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frames, bands = torch.zeros(1, 48, dtype=torch.bool), torch.zeros(1, 128, dtype=torch.bool)
    frames[0, 3:7] = True
    model(torch.from_numpy(tone(440))[None], masked_frames=frames, masked_bands=bands, mask_value=0.25)
    assert (seen[0][frames] == 0.25).all() and (seen[0][~frames] != 0.25).all()


@pytest.mark.parametrize("name", PAPERS)
def test_mask_widths_are_torchaudios_for_the_same_random_numbers(name, monkeypatch):
    script = {"audioset": (192, 48), "esc50": (96, 24), "speech_commands": (48, 48)}[name.split("/")[0]]  # timem, freqm
    augmentation = parse_recipe([str(ROOT / f"configs/{name}.yaml")]).augmentation
    collator = SpectrogramCollator(
        512, time_mask=augmentation.time_mask, frequency_mask=augmentation.frequency_mask, random_crop=False
    )
    examples = drawn((1, 1), count=300)
    draws = collator._draw(examples)
    widths = set()
    for axis, (masks, parameter) in enumerate(zip(collator._masks(draws, 512, 128), script, strict=True)):
        for mask, numbers in zip(masks, draws[:, MASKS + 2 * axis :], strict=True):
            rand = iter(numbers[:2, None])
            monkeypatch.setattr(torch, "rand", lambda _, rand=rand: next(rand))
            theirs = mask_along_axis(torch.ones(1, len(mask), 1), parameter, 0.0, axis=1)[0, :, 0] == 0
            assert mask.sum() == theirs.sum()
            if mask.any():  # ours may reach the last frame, theirs not
                assert abs(int(mask.int().argmax()) - int(theirs.int().argmax())) <= 2
            widths.add((axis, int(mask.sum())))
    assert min(widths)[1] == 0 and max(width for axis, width in widths if axis == 0) > 0.9 * script[0]


def test_the_roll_turns_the_padded_window_with_masks_and_noise():
    settings = {"max_length": 70, "padding_value": 0.6, "time_mask": 20, "noise": 0.1, "random_crop": False}
    shifts = set()
    for epoch in range(40):
        examples = drawn(epoch=epoch)
        before = SpectrogramCollator(**settings)(examples)["input_values"]
        rolled = SpectrogramCollator(**settings, time_roll=10, roll_padded=True)(examples)["input_values"]
        for one, other in zip(before, rolled, strict=True):
            shifts |= {shift for shift in range(-35, 35) if torch.equal(torch.roll(one, shift, 0), other)}
    assert shifts == set(range(-10, 10))  # np.random.randint(-10, 10)


@pytest.mark.parametrize("collator", [SpectrogramCollator, WaveformCollator])
@pytest.mark.parametrize("count", [8, 7])
def test_mixup_after_the_norm_makes_one_clip_of_two(collator, count):
    examples = drawn((60, 32) if collator is SpectrogramCollator else (9840,), count=count)
    settings = {"max_length": 60, "num_labels": 3, "time_mask": 9, "augment_after_norm": True}
    batch = collator(**settings, mixup_alpha=1.0)(examples)
    plain = collator(60, 3)(examples + examples[:1] * (count % 2))
    assert torch.equal(batch["input_values"], plain["input_values"]) and batch["drop_frames"].any(1).sum() > 4
    labels, weights = torch.nn.functional.one_hot(plain["labels"], 3), batch["mixup_weights"][:, None]
    assert torch.equal(batch["labels"], weights * labels[0::2] + (1 - weights) * labels[1::2])
    assert len(weights) == 4 and ((weights > 0) & (weights < 1)).all()
    assert "mixup_weights" not in collator(**settings)(examples)


def test_cnn14_masks_and_mixes_after_its_first_batch_normalisation():
    torch.manual_seed(0)
    model = CNN14ForAudioClassification(CNN14Config(**TINY_CNN14, num_mel_bins=32, num_labels=3)).train()
    collator = SpectrogramCollator(60, 3, time_mask=9, frequency_mask=5, mixup_alpha=1.0, augment_after_norm=True)
    batch = collator(drawn())
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = model(**batch)
    # Cnn14.forward: bn0 of all clips as they are, stripes set to 0, do_mixup
    x = batch["input_values"]
    x = (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-5).sqrt()
    for clip, frames, bands in zip(x, batch["drop_frames"], batch["drop_bands"], strict=True):
        clip[frames], clip[:, bands] = 0, 0
    weights = torch.stack([batch["mixup_weights"], 1 - batch["mixup_weights"]], 1).flatten()
    x = (x[0::2].transpose(0, -1) * weights[0::2] + x[1::2].transpose(0, -1) * weights[1::2]).transpose(0, -1)
    assert torch.allclose(seen[0][:, 0], x, atol=1e-5) and output.logits.shape == (4, 3) and output.loss > 0
    assert torch.allclose(model.bn0.running_mean, 0.1 * batch["input_values"].mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("window", SETTINGS)
def test_a_cnn14_from_random_weights_has_panns_front_end(window):
    rate, highest = SETTINGS[window]
    arguments = ModelArguments(architecture="cnn14", waveform=True, model_config=TINY_CNN14)
    features = FeatureArguments(sampling_rate=rate, num_mel_bins=64, max_length=101, convention="librosa")
    model = load_model(["a", "b"], arguments, load_extractor(arguments, features))
    waveform = torch.from_numpy(tone(440, 1.0, rate))[None]
    spectra = torch.stft(
        waveform, window, rate // 100, window=torch.hann_window(window), center=True, pad_mode="reflect",
        return_complex=True,
    )  # fmt: skip
    filters = melscale_fbanks(window // 2 + 1, 50.0, highest, 64, rate, norm="slaney", mel_scale="slaney")
    expected = 10 * (spectra.abs().square().transpose(1, 2) @ filters).clamp(min=1e-10).log10()
    found = model.front_end(waveform, torch.ones_like(waveform, dtype=torch.bool))
    assert found.shape == (1, 101, 64) and torch.allclose(found, expected, atol=1e-2)
    with pytest.raises(UserError, match="convention must be kaldi with waveform: false, got librosa"):
        load_extractor(ModelArguments(architecture="cnn14"), features)


def test_cnn14s_recipes_are_those_of_their_authors():
    for name in ("urbansound8k/cnn14", "esc50/cnn14", "urbansound8k/cnn14_panns"):
        recipe = parse_recipe([str(ROOT / f"configs/{name}.yaml")])
        args, augmentation = recipe.training, recipe.augmentation
        assert augmentation.augment_after_norm and augmentation.mixup_alpha == 1.0 and not augmentation.random_crop
        assert (augmentation.time_mask, augmentation.frequency_mask) == (63, 7)  # torch.randint(0, 64) and (0, 8)
        assert (augmentation.time_masks, augmentation.frequency_masks) == (2, 2)
        assert args.total_batch_size == 64 and args.lr_scheduler_type == "constant" and args.get_warmup_steps(100) == 0
        assert args.max_grad_norm == args.weight_decay == 0


def test_augmenting_after_the_norm_is_refused_where_no_model_does_it():
    for options, message in (
        (["--architecture", "ast"], "augment_after_norm must be false, got true: AST.* is no CNN14"),
        (["--architecture", "cnn14", "--distill_from", "x"], "distill_from must be none with augment_after_norm"),
    ):
        recipe = parse_recipe(["--augment_after_norm", "true", "--max_length", "48", *options])
        with pytest.raises(UserError, match=message):
            check_model(recipe, load_extractor(recipe.model, recipe.features))
    with pytest.raises(ValueError, match="roll_padded: need spectrograms"):
        WaveformCollator(60, roll_padded=True)


def stereo(row: int) -> np.ndarray:
    """The sound of a clip of `tones` beside that of the other class."""
    return np.stack([tone_of(row), tone(300 if row % 2 else 3000, 0.3 + 0.02 * row)], axis=1)


def test_the_first_channel_is_the_one_that_torchaudios_filter_bank_takes():
    audio = {"bytes": wav(stereo(0)), "path": None}
    features = BatchedASTFeatureExtractor(do_normalize=False)
    ours = [features.log_mel([load_waveform(audio, channel=channel)])[0] for channel in ("first", "mean")]
    sound = torch.from_numpy(soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32")[0].T)
    theirs = fbank(sound, htk_compat=True, window_type="hanning", num_mel_bins=128, dither=0.0)
    assert torch.allclose(ours[0], theirs, atol=1e-2) and (ours[1] - theirs).abs().max() > 1


def test_another_channel_is_another_cache(tmp_path):
    Dataset.from_list([{"audio": {"bytes": wav(stereo(0)), "path": None}}]).save_to_disk(tmp_path)
    clips = Dataset.load_from_disk(tmp_path)
    mean, first = (extract_features(clips, BatchedASTFeatureExtractor(), channel=one) for one in ("mean", "first"))
    assert len(list(tmp_path.glob("cache-*"))) == 2 and mean[0]["input_values"] != first[0]["input_values"]


@pytest.mark.parametrize(
    ("name", "milestones", "gamma", "warmup"),
    [
        ("audioset/ast_balanced", range(10, 1000, 5), 0.5, 1000),
        ("audioset/ast_full", range(2, 1000, 1), 0.5, 1000),
        ("esc50/ast", range(5, 1000, 1), 0.85, 0),
        ("speech_commands/ast", range(5, 1000, 1), 0.85, 0),
    ],
)
def test_learning_rates_are_those_of_the_authors_scheduler(name, milestones, gamma, warmup):
    args, per_epoch = parse_recipe([str(ROOT / f"configs/{name}.yaml")]).training, 1500
    settings = {"start": args.lr_step_start, "every": args.lr_step_every, "decay": args.lr_step_decay}
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    scheduler = MultiStepLR(optimizer, list(milestones), gamma=gamma)
    for step in range(int(args.num_train_epochs) * per_epoch):
        if warmup and step <= 1000 and step % 50 == 0:  # src/traintest.py
            optimizer.param_groups[0]["lr"] = step / 1000 * args.learning_rate
        if step % 50 == 0:
            found = args.learning_rate * step_factor(step, args.get_warmup_steps(10**6), per_epoch, **settings)
            assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        if (step + 1) % per_epoch == 0:
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize(
    ("options", "processes", "expected"),
    [
        ({}, 1, (48, 1)),
        ({}, 4, (12, 1)),
        ({"per_device_train_batch_size": 12}, 1, (12, 4)),
        ({"per_device_train_batch_size": 12, "gradient_accumulation_steps": 2}, 2, (12, 2)),
        ({}, 5, "total_batch_size must be a multiple of the 5 processes, .* got 48"),
        ({"per_device_train_batch_size": 13}, 1, "a multiple of per_device_train_batch_size 13 .* got 48"),
        (
            {"gradient_accumulation_steps": 3},
            1,
            "gradient_accumulation_steps must be 1 for total_batch_size 48, .* got 3",
        ),
    ],
)
def test_the_total_batch_is_kept_whatever_the_number_of_processes(options, processes, expected, monkeypatch):
    monkeypatch.setattr(RunArguments, "world_size", processes)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            parse_recipe([str(ROOT / "configs/esc50/ast.yaml"), *words])
        return
    args = parse_recipe([str(ROOT / "configs/esc50/ast.yaml"), *words]).training
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected


@pytest.fixture
def run(tmp_path):
    """Trains on stereo clips by these fields, gives the folder."""
    rows = Dataset.from_parquet(str(write_tones(tmp_path / "tones.parquet"))).to_list()
    rows = [clip | {"audio": {"bytes": wav(stereo(row)), "path": f"{row}.wav"}} for row, clip in enumerate(rows)]
    Dataset.from_list(rows).to_parquet(tmp_path / "stereo.parquet")
    recipe = TONES | {
        "dataset": str(tmp_path / "stereo.parquet"), "output_dir": str(tmp_path / "run"), "max_length": 48,
        "num_train_epochs": 3, "learning_rate": 1e-3, "precision": "fp32", "preprocessing_num_workers": 1,
        "logging_steps": 1, "save_total_limit": 9, "time_mask": 8, "mixup_alpha": 1.0,
    }  # fmt: skip

    def train_(**changes) -> Path:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))
        train.main(parse_recipe([str(tmp_path / "recipe.yaml")]))
        return tmp_path / "run"

    return train_


AS_AST = {
    "model_config": TINY_AST, "channel": "first", "mask_value": "padding", "time_roll": 5, "roll_padded": True,
    "total_batch_size": 4, "per_device_train_batch_size": 2, "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2, "lr_step_start": 1, "lr_step_decay": 0.5, "card_note": "Trained as the paper.",
}  # fmt: skip


def test_a_run_as_asts_authors_train(run, tmp_path):
    folder = run(**AS_AST)
    log = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([0, 5e-4, 5e-4, 5e-4, 2.5e-4, 2.5e-4])  # two steps of 2 × 2 clips an epoch
    # the card and predict.py know how it was trained
    card = (folder / "README.md").read_text()
    assert all(f"| {field} |" in card for field in ("channel", "mask_value", "total_batch_size", "lr_step_start"))
    assert "\nTrained as the paper.\n" in card and AutoConfig.from_pretrained(folder).channel == "first"
    (tmp_path / "16.wav").write_bytes(wav(stereo(16)))
    (answer,) = classify_clips(*load_finished(folder), [{"bytes": None, "path": str(tmp_path / "16.wav")}])
    tested = pandas.read_parquet(folder / "predictions.parquet").set_index("clip").loc["clip-16"]
    expected = torch.tensor(np.array(tested["logits"])).softmax(0).numpy()
    assert np.allclose(answer.scores, expected, atol=1e-4)
    # a resume is exact
    whole = shutil.copytree(folder, tmp_path / "whole")
    (folder / "metrics.json").unlink()
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run(**AS_AST)
    first, again = (load_file(one / "checkpoint-6" / "model.safetensors") for one in (whole, folder))
    assert all(torch.equal(first[name], again[name]) for name in first)
