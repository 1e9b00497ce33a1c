"""CLAP's audio tower as a classifier: from a whole CLAP, by transformers' extractor, with dendrites."""

import json

import numpy as np
import pytest
import torch
from conftest import TONES, recipe_of, tone
from pandas import read_parquet
from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

import train
from audio_dendrites.errors import UserError
from audio_dendrites.models.families import layer_of
from audio_dendrites.models.finished import load_finished
from audio_dendrites.models.loading import load_extractor, load_model
from audio_dendrites.recipes import FeatureArguments, ModelArguments
from audio_dendrites.results.inference import classify_clips

AUDIO = {
    "spec_size": 128, "window_size": 4, "patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1],
    "num_attention_heads": [2, 2], "num_hidden_layers": 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20,
}  # fmt: skip


@pytest.fixture(scope="module", params=["rand_trunc", "fusion"])
def clap(request, tmp_path_factory):
    """The folder of a small CLAP with random weights, as transformers saves it."""
    folder, fusion = tmp_path_factory.mktemp("clap"), request.param == "fusion"
    torch.manual_seed(0)
    audio = ClapAudioConfig(**AUDIO, enable_fusion=fusion)
    model = ClapModel(ClapConfig(text_config=ClapTextConfig(**TEXT), audio_config=audio))
    with torch.no_grad():
        for name, parameter in model.audio_model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    ClapFeatureExtractor(max_length_s=1, truncation=request.param).save_pretrained(folder)
    return folder


def load(folder, **fields):
    arguments = ModelArguments(model=str(folder), **fields)
    extractor = load_extractor(arguments, FeatureArguments())
    return load_model(["high", "low"], arguments, extractor).eval(), extractor


def test_the_pooled_output_is_that_of_clap_and_the_layers_are_known(clap):
    model, extractor = load(clap, unfreeze_last_layers=1)
    assert (extractor.sampling_rate, extractor.max_length) == (48000, 100)
    inputs = extractor.stock()(tone(440, 0.7, 48000), sampling_rate=48000, return_tensors="pt")
    found = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(**inputs)
        expected = ClapModel.from_pretrained(clap).eval().audio_model(**inputs).pooler_output
    assert torch.equal(found[0], expected)
    heights = {name: layer_of(name, 2) for name, _ in model.named_parameters()}
    assert set(heights.values()) == {0, 1, 2, 3} and heights["audio_model.audio_encoder.batch_norm.weight"] == 0
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, height in heights.items() if height > 1}


def test_clap_grows_dendrites_and_pipeline_gives_its_predictions(clap, tones, tmp_path):
    values = TONES | {
        "dataset": str(tones), "model": str(clap), "max_length": 50, "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "eval_strategy": "steps",
        "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "precision": "fp32", "report_to": "none",
        "preprocessing_num_workers": 1, "noise": 0.1, "pai": {"first_growth": 0.25, "top_learning_rate": 100},
    }  # fmt: skip
    recipe = recipe_of(values)
    train.main(recipe)
    grown = set(json.loads((tmp_path / "run" / "metrics.json").read_text())["dendrites"]["layers"])
    block = "audio_model.audio_encoder.layers.1.blocks.0"
    assert grown == {f"{block}.intermediate.dense", f"{block}.output.dense", "classifier"}
    assert {path.name for path in (tmp_path / "run").glob("*.py")} == {"clap.py", "dendritic.py"}
    data = train.load_data([recipe])[recipe.training.output_dir]
    sounds = data.sound.select(data.splits["test"]).with_format("arrow")["audio"].to_pylist()
    answers = classify_clips(*load_finished(tmp_path / "run"), sounds)
    for answer, logits in zip(answers, read_parquet(tmp_path / "run" / "predictions.parquet")["logits"], strict=True):
        assert np.abs(answer.logits - logits).max() < 1e-4


def test_a_window_that_clap_would_cut_at_random_is_an_error(clap):
    with pytest.raises(UserError, match="max_length must be at most 100 for .*, got 101"):
        load_extractor(ModelArguments(model=str(clap)), FeatureArguments(max_length=101))
