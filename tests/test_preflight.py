"""Errors show before the first run of a command trains, and processes wait for each other without a timeout."""

import multiprocessing
import socket
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, TINY_AST, TINY_CNN14, TINY_VIT, TONES
from datasets import Dataset
from torch import distributed
from transformers import ASTConfig, ASTFeatureExtractor

import crossval
import train
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import parse_recipe
from audio_dendrites.training import preflight
from audio_dendrites.training.process import one_process_first
from pai_callback import PAIConfig, PAIError

RECIPE = TONES | {
    "dataset": "nowhere.parquet", "max_length": 48, "model_config": TINY_AST, "per_device_train_batch_size": 4,
    "num_train_epochs": 20, "precision": "fp32", "preprocessing_num_workers": 1, "report_to": ["none"],
    "baseline": True, "pai": {"max_dendrites": 1},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe with a baseline and dendrites. Its data set does not exist, so that nothing can train."""
    pytest.importorskip("perforatedai", reason="perforatedai has no wheel for this Python")
    monkeypatch.chdir(tmp_path)

    def write(**changes) -> str:
        fields = RECIPE | {"output_dir": str(tmp_path / "runs")} | changes
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pai": {"modules": ["clasifier.dense"]}}, "'clasifier.dense'.*did you mean 'classifier.dense'"),
        ({"pai": {"modules": ["layers.-1.mlp"]}}, "ASTMLP"),
        ({"pai": {"max_dendrite": 1}}, "unknown field 'max_dendrite'.*did you mean 'max_dendrites'"),
        ({"pai": None}, "baseline must be false with pai: null"),
        ({"pai": {"metric": "acuracy"}}, "pai: metric must be one of accuracy, macro_f1, mAP, loss, got acuracy"),
        ({"optim": "adagrad"}, "optim must be an optimizer that can take new parameters .* got adagrad"),
        ({"optim": "lomo", "pai": None, "baseline": None}, "optim: lomo: You need to install `lomo_optim`"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr: One of min_lr or min_lr_rate"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"eval_strategy": "no", "load_best_model_at_end": False, "pai": {"schedule": "fixed"}}, "steps or epoch"),
        ({"label_separator": ",", "loss": "cross_entropy"}, "loss must be bce or auto for clips with lists of labels"),
        ({"distill_from": "nowhere"}, "distill_from: nowhere could not be loaded"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint: nowhere: there is no such folder"),
        ({"output_dir": "recipe.yaml/run"}, "output_dir: recipe.yaml/run_baseline cannot be written"),
        ({"early_stopping_patience": 11, "pai": {"schedule": "history", "patience": 3}}, "at least 12 .* got 11"),
        ({"early_stopping_patience": 8, "pai": {"schedule": "fixed", "interval": 3}}, "at least 9 with dend.* got 8"),
    ],
)  # fmt: skip
def test_what_is_wrong_shows_before_data_are_read(recipe, changes, message):
    with pytest.raises((UserError, PAIError), match=message):
        train.main(parse_recipe([recipe(**changes)]))


def test_pretrained_weights_that_are_missing_show_before_data_are_read(recipe, tmp_path):
    ASTConfig(**TINY_AST).save_pretrained(tmp_path / "model")
    ASTFeatureExtractor().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model: .* could not be loaded: .*no file named model.safetensors"):
        train.main(parse_recipe([recipe(model=str(tmp_path / "model"), model_config=None)]))


@pytest.mark.parametrize("waveform", [False, True])
@pytest.mark.parametrize(
    ("architecture", "fields", "modules", "layers"),
    [
        ("ast", TINY_AST, ["layers.-1.mlp.*", "embeddings.*.projection"], 3),
        ("vit", TINY_VIT, ["layers.*.attention.*", "classifier"], 13),
        ("cnn14", TINY_CNN14, ["layers.-1.conv2", "fc1"], 2),
    ],
)
def test_two_clips_pass_through_every_family_without_memory(recipe, waveform, architecture, fields, modules, layers):
    path = recipe(architecture=architecture, model_config=fields, pai={"modules": modules}, waveform=waveform)
    found = []

    def find_growth(pai, model, batch):
        assert batch["input_values"].is_meta and all(parameter.is_meta for parameter in model.parameters())
        found.extend(train.find_growth(pai, model, batch)[1])
        return train.find_growth(pai, model, batch)

    assert len(preflight.preflight(parse_recipe([path]).runs(), find_growth)) == 2
    assert len(found) == layers and all(layer.shape[0] == 2 for layer in found)


def test_all_folds_seeds_and_kinds_are_checked_first_and_the_model_once_a_kind(recipe, tones, tmp_path, monkeypatch):
    checked = []
    check_model = preflight.check_model
    monkeypatch.setattr(preflight, "check_model", lambda *given: checked.append(given) or check_model(*given))
    other = tmp_path / "runs" / "fold-3-seed-1"
    other.mkdir(parents=True)
    (other / "metrics.json").write_text("{}")
    (other / "config.yaml").write_text("learning_rate: 0.5")
    with pytest.raises(UserError, match="fold-3-seed-1 holds a run of another recipe"):
        crossval.main([recipe(), "--seeds", "0", "1"])
    assert len(checked) == 2
    (other / "metrics.json").unlink()
    rows = Dataset.from_parquet(str(tones)).to_list()
    Dataset.from_list([*rows[:-1], rows[-1] | {"kind": "rare"}]).to_parquet(tones)  # in fold 3 alone
    with pytest.raises(
        UserError, match="labels of the validation clips must be .*, got 'rare'"
    ):  # when fold 2 is tested
        crossval.main([recipe(dataset=str(tones))])
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_several_gpus_in_one_process_are_refused_with_the_command_that_uses_them(recipe, monkeypatch):
    parsed = parse_recipe([recipe(pai=None, baseline=None)])
    assert parsed.training.n_gpu == 0
    parsed.training._n_gpu = 2
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe.yaml"])
    alternatives = "`torchrun --standalone --nproc_per_node 2 train.py …`.* `CUDA_VISIBLE_DEVICES=0 python train.py …`"
    with pytest.raises(UserError, match=alternatives):
        train.main(parsed)


GROWING = sorted((ROOT / "configs").glob("*/*_pai.yaml")) + [ROOT / "configs" / "quickstart.yaml"]


@pytest.mark.parametrize("path", GROWING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_growth_fits_into_the_length_of_a_training(path, caplog):
    args, pai = parse_recipe([str(path)]).training, yaml.safe_load(path.read_text())["pai"]
    preflight._check_growth(args, PAIConfig.from_dict(pai))  # early growth needs no evaluations
    assert caplog.text == "" and preflight.evaluations(args) >= 10
    args.num_train_epochs, args.eval_steps = 2, 0.5
    preflight._check_growth(args, PAIConfig(schedule="fixed", interval=1, tries=1, max_dendrites=2))
    assert "growth to 2 dendrites needs at least 3 evaluations, and the training makes 1 until" in caplog.text


def process(rank, port, told):
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=2), 2, rank)
    args = SimpleNamespace(output_dir="x", world_size=2, process_index=rank, local_process_index=rank)
    with one_process_first(args, "loading the data"):
        time.sleep(4 * (rank == 0))
        told.put((rank, time.monotonic()))
    distributed.barrier()
    try:
        with one_process_first(args, "computing the features"):
            if rank == 0:
                raise UserError("a clip is damaged")
            told.put((rank, "went on"))
    except UserError as error:
        told.put((rank, str(error)))
        time.sleep(rank == 0)  # the process that connects them ends last


def test_processes_wait_longer_than_ddp_timeout_and_end_with_the_error_of_the_first():
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=process, args=(rank, port, told)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(60)
    first, second, *errors = [told.get() for _ in range(4) if not told.empty()]
    assert (first[0], second[0]) == (0, 1) and first[1] < second[1]
    message = "process 0 failed while computing the features: a clip is damaged"
    assert sorted(errors) == [(0, "a clip is damaged"), (1, message)]
