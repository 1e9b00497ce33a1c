"""Code and pickles that came with a model, a checkpoint or a data set do not run."""

import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT, TINY_AST, TONES, tone, write_tones
from safetensors.torch import save_file
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

import predict
import train
from audio_dendrites.data.clips import load_clips
from audio_dendrites.errors import UserError
from audio_dendrites.models import convert_panns
from audio_dendrites.models.dendritic import DendriticASTConfig, DendriticASTForAudioClassification
from audio_dendrites.models.loading import load_extractor, load_model, load_teacher
from audio_dendrites.publishing import formats
from audio_dendrites.publishing.hub import fetch_checkpoint
from audio_dendrites.recipes import DataArguments, FeatureArguments, ModelArguments, parse_recipe

LABELS = ["high", "low"]
CODE = """
open({trace!r}, "w").close()
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

class Config(ASTConfig):
    model_type = {kind!r}

class ModelForAudioClassification(ASTForAudioClassification):
    config_class = Config

class FeatureExtractor(ASTFeatureExtractor):
    pass
"""


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A file that planted code writes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "trace"


@pytest.fixture
def planted(tmp_path, trace):
    """Makes the folder of a model of a type. Its configurations name code in the folder."""

    def make(kind):
        fields = TINY_AST | {"max_length": 48, "id2label": dict(enumerate(LABELS))}
        grown = kind == DendriticASTConfig.model_type
        folder = tmp_path / "planted"
        model_class = DendriticASTForAudioClassification if grown else ASTForAudioClassification
        model_class(model_class.config_class(**fields)).save_pretrained(folder)
        ASTFeatureExtractor(max_length=48).save_pretrained(folder)
        (folder / "code.py").write_text(CODE.format(trace=str(trace), kind=kind))
        names = ("Config", "ModelForAudioClassification", "FeatureExtractor")
        own = {"auto_map": {f"Auto{name}": f"code.{name}" for name in names}}
        for file, changes in {"config.json": own | {"model_type": kind}, "preprocessor_config.json": own}.items():
            (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
        return folder

    return make


def classify(folder, *options):
    soundfile.write(folder.parent / "clip.wav", tone(440), 16000)
    predict.main([str(folder), str(folder.parent / "clip.wav"), *options])


def export(folder):
    formats.main([str(folder), "--format", "safetensors"])


def start_from(folder):
    arguments = ModelArguments(model=str(folder))
    load_model(LABELS, arguments, load_extractor(arguments, FeatureArguments()))


def distil_from(folder):
    extractor = load_extractor(ModelArguments(), FeatureArguments(max_length=48))
    load_teacher(str(folder), LABELS, extractor, "cross_entropy")


@pytest.mark.parametrize("load", [classify, export, start_from, distil_from])
def test_no_code_of_a_model_folder_runs(planted, trace, load):
    load(planted(ASTConfig.model_type))
    if load is not start_from:  # a training does not start from dendrites
        load(planted(DendriticASTConfig.model_type))
    with pytest.raises(UserError, match="planted needs code of its own, .*planted/code.py. It was not run"):
        load(planted("stranger"))
    assert not trace.exists()


def test_trusted_code_runs_and_is_named(planted, trace, caplog):
    classify(planted("stranger"), "--trust_remote_code")
    assert trace.exists() and "planted may run its own code: " in caplog.text and "planted/code.py" in caplog.text


class Bomb:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_of_a_model_runs(planted, trace, tmp_path):
    folder = planted(ASTConfig.model_type)
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    torch.save({"classifier.dense.weight": Bomb(trace)}, weights)
    for load in (classify, export, start_from, distil_from):
        with pytest.raises(UserError, match="planted could not be loaded: its weights hold objects other than tensors"):
            load(folder)
    with pytest.raises(SystemExit, match="error: .*pytorch_model.bin must be .*, got objects other than tensors"):
        convert_panns.main([str(weights), str(tmp_path / "cnn14")])
    assert not trace.exists()
    torch.load(weights, weights_only=False)
    assert trace.exists()  # it could have


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth"])
def test_no_pickle_of_a_checkpoint_runs(tones, tmp_path, trace, name):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    fields = {"model_config": TINY_AST, "max_length": 48, "precision": "fp32", "report_to": ["none"]}
    fields |= {"dataset": str(tones), "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": str(checkpoint)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TONES | fields))
    save_file({"weight": torch.zeros(1)}, checkpoint / "model.safetensors")
    (checkpoint / "trainer_state.json").write_text("{}")
    states = {"python": (3, (1, 2), None), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": states}, checkpoint / file)
    recipe = parse_recipe([str(tmp_path / "recipe.yaml")])
    with pytest.raises(FileNotFoundError, match="config.json"):  # whole but for what comes next
        train.main(recipe)
    for planted in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        planted({"state": Bomb(trace)}, checkpoint / name)
        with pytest.raises(UserError, match=f"from_checkpoint: .*checkpoint-2: {name} (holds objects|is missing)"):
            train.main(recipe)
    assert not trace.exists()


def test_a_checkpoint_of_the_hub_stays_in_the_run_folder(online, tmp_path):
    (tmp_path / "victim").mkdir()
    state = {"global_step": "/../../victim", "best_global_step": None, "best_model_checkpoint": None}
    online.commit("me/evil", {"last-checkpoint/trainer_state.json": json.dumps(state)})
    with pytest.raises(UserError, match="trainer_state.json of me/evil has the step '/../../victim', not a number"):
        fetch_checkpoint("me/evil", tmp_path / "run")
    assert list((tmp_path / "victim").iterdir()) == []


def test_no_script_of_a_data_set_runs(tmp_path, trace):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "clips.py").write_text(CODE.format(trace=str(trace), kind="data set"))
    parquet = write_tones(folder / "tones.parquet")
    with pytest.raises(UserError, match="scripts are no longer supported, but found clips.py"):
        load_clips(DataArguments(dataset=str(folder), **TONES))
    parquet.unlink()
    (folder / "dog").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "dog")
    for clip in range(4):
        soundfile.write(folder / "dog" / f"{clip}.wav", tone(440), 16000)
    clips, _ = load_clips(DataArguments(dataset=str(folder), split_shares=[0.5, 0.25, 0.25]))
    assert len(clips) == 4 and not trace.exists()
