"""Every audio classifier of transformers from a checkpoint: batches, training, dendrites, LoRA, and `pipeline`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    ENCODERS,
    TINY_ENCODER,
    TINY_WAV2VEC2,
    TONES,
    encoder_checkpoint,
    recipe_of,
    tone,
    wav,
    write_tones,
)
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoFeatureExtractor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import train
from audio_dendrites.data.features import ExtractorClips
from audio_dendrites.errors import UserError
from audio_dendrites.models.families import default_dendrites, layer_of
from audio_dendrites.models.finished import load_finished
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.models.lora import merged
from audio_dendrites.results.inference import classify_clips
from data_collator import AugmentedClips, ExtractorCollator


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data set `tones.parquet` and, made when asked for, a checkpoint of each type."""
    folder = tmp_path_factory.mktemp("encoders")
    write_tones(folder / "tones.parquet")
    return folder


def recipe(home, kind, name, **fields):
    """A recipe for the tones; `fields` are YAML's. Windows of 0.5 s cut some clips."""
    values = TONES | {
        "dataset": str(home / "tones.parquet"), "model": str(encoder_checkpoint(home, kind)), "max_length": 50,
        "output_dir": str(home / name), "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "precision": "fp32",
        "report_to": "none", "preprocessing_num_workers": 1,
    } | fields  # fmt: skip
    return recipe_of(values)


def weights(folder):
    return load_file(folder / "model.safetensors")


def trainer_of(run):
    """The data and the trainer of a run, as train.py makes them."""
    data = train.load_data([run])[run.training.output_dir]
    train.set_seed(0)
    return data, train.make_trainer(data, load_model(data.labels, run.model, data.extractor))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_grows_dendrites_and_resumes_to_the_bit(home, kind):
    fields = {"pai": {"first_growth": 0.25, "top_learning_rate": 100}, "noise": 0.1, "time_roll": 5}
    fields |= {
        "mixup_alpha": 0.5,
        "max_steps": 3,
        "save_steps": 1,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    data, trainer = trainer_of(recipe(home, kind, f"{kind}-whole", **fields))
    trainer.train()
    grown = set(trainer.pai_callback.summary(trainer.model)["layers"])
    assert {"projector", "classifier"} < grown and not any("attention" in name or "attn" in name for name in grown)

    exported = home / f"{kind}-exported"
    trainer.model.save_pretrained(exported)
    trainer.processing_class.save_pretrained(exported)
    model, extractor = load_finished(exported)
    assert model.config.model_type == f"dendritic-{kind}"
    model.config.update(data.model_settings)
    predictions = trainer.predict_in_fp32(data.windows("test", exact=True), "test").predictions
    sounds = data.sound.select(data.splits["test"]).with_format("arrow")["audio"].to_pylist()
    sounds += [{"bytes": wav(tone(300, 0.4)), "path": None}]  # of one window
    *answers, short = classify_clips(model, extractor, sounds, batch_size=3, embed=True)
    assert np.abs(np.stack([answer.logits for answer in answers]) - predictions).max() < 1e-4
    with torch.no_grad():
        head = model.classifier(torch.from_numpy(short.embedding))
    assert len(short.spans) == 1 < len(answers[0].spans) and np.abs(head - short.logits).max() < 1e-4

    _, again = trainer_of(recipe(home, kind, f"{kind}-again", **fields))
    again.train(resume_from_checkpoint=str(home / f"{kind}-whole" / "checkpoint-2"))
    assert equal(*(weights(home / f"{kind}-{name}" / "checkpoint-3") for name in ("whole", "again")))


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_a_run_of_an_encoder_ends_with_a_folder_that_pipeline_loads(home, kind):
    train.main(recipe(home, kind, f"{kind}-run", max_steps=2))
    assert json.loads((home / f"{kind}-run" / "metrics.json").read_text())["architecture"] == kind
    card = (home / f"{kind}-run" / "README.md").read_text()
    assert "Citation" not in card and "Audio Spectrogram" not in card


def test_a_multi_label_encoder_has_sigmoids(chords, tmp_path):
    run = recipe(
        tmp_path, "hubert", "run", dataset=str(chords), label_column="kinds", max_steps=2, metric_for_best_model="mAP"
    )
    train.main(run)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert 0 < json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["mAP"] <= 1


@pytest.mark.parametrize(("kind", "settings"), [("wav2vec2", {"r": 2}), ("whisper", {"r": 2, "use_dora": True})])
def test_lora_trains_few_weights_and_leaves_a_plain_model(home, kind, settings):
    name = f"{kind}-{'dora' if 'use_dora' in settings else 'lora'}"
    run = recipe(home, kind, name, lora=settings, save_total_limit=9)
    train.main(run)
    metrics = json.loads((home / name / "metrics.json").read_text())
    plain = weights(encoder_checkpoint(home, kind))
    finished = weights(home / name)
    assert (
        finished.keys() == plain.keys() and json.loads((home / name / "config.json").read_text())["model_type"] == kind
    )
    changed = {key for key in plain if not torch.equal(plain[key], finished[key])}
    linear = {key for key in plain if "layers." in key and key.endswith("weight") and plain[key].dim() == 2}
    assert linear <= changed and all(key in linear or key.startswith(("projector", "classifier")) for key in changed)
    assert metrics["parameters"] == sum(tensor.numel() for tensor in plain.values())
    assert metrics["trained_parameters"] < metrics["parameters"] / 2

    data, trainer = trainer_of(run)
    trainer.args.output_dir = str(home / f"{name}-again")
    trainer.train(resume_from_checkpoint=str(home / name / "checkpoint-2"))
    assert equal(*(weights(home / folder / "checkpoint-4") for folder in (name, f"{name}-again")))
    batch = data.windows("test", exact=True)
    inputs = trainer.data_collator([batch[0]])
    labels = inputs.pop("labels")
    with torch.no_grad():
        difference = trainer.model.eval()(**inputs).logits - merged(trainer.model)(**inputs).logits
    assert len(labels) == 1 and difference.abs().max() < 1e-5


def test_the_extractor_makes_the_inputs_of_augmented_and_of_plain_batches(home):
    run = recipe(home, "hubert", "batches")
    clips = load_extractor(run.model, run.features)
    assert isinstance(clips, ExtractorClips) and clips.cache_key == {"waveforms": True, "sampling_rate": 16000}
    collator = ExtractorCollator(num_labels=2, noise=0.1, time_roll=9, **clips.batch_layout)
    sounds = [{"input_values": torch.randn(size), "labels": 0} for size in (4000, 9000)]
    stock = AutoFeatureExtractor.from_pretrained(run.model.model)
    cut = [sound["input_values"][:8000].numpy() for sound in sounds]
    expected = stock(cut, sampling_rate=16000, padding=True)
    found = collator(sounds)
    assert torch.equal(found["input_values"], torch.tensor(np.stack(expected["input_values"])))
    augmented = [AugmentedClips(sounds, seed=0)[row] for row in range(2)]
    first, second = collator(augmented), collator(augmented)
    assert torch.equal(first["input_values"], second["input_values"])
    assert first["input_values"].shape == (2, 8000) and not torch.equal(first["input_values"], found["input_values"])
    assert not first["input_values"][0, 4000:].any() and first["input_values"][0, :4000].all()


def test_pretraining_checkpoints_get_a_new_head_and_lose_what_is_not_of_the_encoder(home):
    raw = Wav2Vec2Config(**TINY_WAV2VEC2, num_codevectors_per_group=4, codevector_dim=8, proj_codevector_dim=8)
    whisper = WhisperConfig(**ENCODERS["whisper"])
    for name, model in (("raw", Wav2Vec2ForPreTraining(raw)), ("sequences", WhisperForConditionalGeneration(whisper))):
        model.save_pretrained(home / name)
    Wav2Vec2FeatureExtractor().save_pretrained(home / "raw")
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(home / "sequences")
    for name, layer in (("raw", "wav2vec2.encoder.layers.1."), ("sequences", "encoder.layers.1.")):
        run = recipe(home, "wav2vec2", "unused", model=home / name)
        model = load_model(["a", "b", "c"], run.model, load_extractor(run.model, run.features))
        stored = {key.removeprefix("model."): tensor for key, tensor in weights(home / name).items()}
        own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(layer)}
        assert own and all(torch.equal(tensor, stored[key]) for key, tensor in own.items())
        assert model.classifier.out_features == 3
    with pytest.raises(UserError, match=r"model_config\. They differ in wav2vec2\.encoder\.layers\.1"):
        run = recipe(home, "wav2vec2", "unused", model=home / "raw", model_config={"num_hidden_layers": 1})
        load_model(["a", "b"], run.model, load_extractor(run.model, run.features))


@pytest.mark.parametrize("kind", ENCODERS)
def test_stem_blocks_and_head_are_known_in_every_family(home, kind):
    run = recipe(home, kind, "unused", unfreeze_last_layers=1)
    model = load_model(["high", "low"], run.model, load_extractor(run.model, run.features))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "projector.weight"} < trained
    assert not any(word in name for name in trained for word in ("r.0.", "rs.0.", "conv_layers", "feature_proj"))
    names = [name for name, _ in model.named_parameters()]
    assert {layer_of(name, 2) for name in names} == {0, 1, 2, 3}
    assert {layer_of(name, 2) for name in default_dendrites(model)} == {2, 3}
    assert any(layer_of(name, 2) == 2 for name in trained)

    run = recipe(home, kind, "unused")
    model = load_model(["high", "low"], run.model, load_extractor(run.model, run.features))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all("feature_extractor" in name for name in frozen)
    assert bool(frozen) == (kind not in ("wav2vec2-bert", "whisper"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling_rate": 32000}, "sampling_rate must be 16000, as .* was trained, got 32000"),
        ({"num_mel_bins": 64}, "num_mel_bins must be left out, as .* was trained, got 64"),
        ({"mean": "auto"}, "mean must be left out"),
        ({"waveform": True}, "waveform must be false, got true: .* feature extractor of its own"),
        ({"architecture": "ast"}, "model must be of one of the types audio-spectrogram-transformer.*'wav2vec2'"),
        ({"time_mask": 10}, "time_mask must be 0 .* got 10: .* clips; model_config: mask_time_prob"),
        ({"filter_gain": 0.1}, "filter_gain must be 0.0 for this model"),
        ({"max_length": 1}, "cannot take clips of its feature extractor"),
        ({"lora": {"rank": 8}}, "lora: .*rank"),
        ({"lora": {"target_modules": "nothing"}}, "lora: .*nothing"),
        ({"lora": {"r": 2}, "pai": {}}, "lora must not be set together with pai"),
        ({"lora": {"r": 2}, "unfreeze_last_layers": 1}, "lora must not be set together with unfreeze_last_layers"),
    ],
)
def test_what_an_encoder_cannot_do_is_an_error_before_data_are_read(home, fields, message):
    with pytest.raises(UserError, match=message):
        train.main(recipe(home, "wav2vec2", "refused", **fields | {"dataset": str(home / "not-there.parquet")}))


def test_a_model_of_another_task_or_without_extractor_is_an_error(home):
    run = recipe(home, "wav2vec2", "refused", model=str(home / "bert"))
    CONFIG_MAPPING["bert"](**TINY_ENCODER).save_pretrained(home / "bert")
    with pytest.raises(UserError, match=r"types mel-vit, .*wav2vec2.*, got .*bert, which is of type 'bert'"):
        train.main(run)
    encoder_checkpoint(home, "hubert")
    (home / "bare").mkdir()
    for path in (home / "hubert").glob("*"):
        if path.name != "preprocessor_config.json":
            (home / "bare" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="bare .*preprocessor_config"):
        train.main(replace(run, model=replace(run.model, model=str(home / "bare"))))
