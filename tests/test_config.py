"""How YAML and the command line become a recipe, and which recipes are refused."""

import dataclasses
import math
import re
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import ROOT

from audio_dendrites.errors import UserError
from audio_dendrites.recipes import (
    INHERITED,
    PARTS,
    RunArguments,
    parse_recipe,
    range_of,
    resolve_precision,
    write_yaml,
)


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learning_rate: 1e-4", 1e-4),
        ("mean: -4.452", -4.452),
        ("test_folds: 11", ["11"]),
        ("random_crop: false", False),
        ("load_best_model_at_end: no", False),
        ("eval_strategy: no\nload_best_model_at_end: no", "no"),
        ("labels: [yes, no, on, true, a b]", ["yes", "no", "on", "true", "a b"]),
        ("drop_labels: []", []),
        ("model_config: {time_stride: 16}", {"time_stride": 16}),
        ("metric_for_best_model: eval_loss", "loss"),
        ("output_dir: runs//x/", "runs/x"),
        ("precision: fp32", "fp32"),
    ],
)
def test_a_value_of_yaml_gets_the_type_of_its_field(recipe, text, value):
    assert parse_recipe([recipe(text)]).to_dict()[text.split(":")[0]] == value


def test_the_command_line_overrides_yaml_and_yaml_overrides_the_inherited(recipe):
    recipe("seed: 1\nlearning_rate: 1.0\nweight_decay: 0.5\ntrain_folds: [1, 2]", "base.yaml")
    path = recipe("inherits: base.yaml\nlearning_rate: 2.0\nweight_decay: null")
    parsed = parse_recipe([path, "--seed", "3", "--train_folds", "4", "5"])
    assert (parsed.training.seed, parsed.training.learning_rate, parsed.training.weight_decay) == (3, 2.0, 0.0)
    assert parsed.data.train_folds == ["4", "5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1", r"recipe.yaml: unknown field 'learnig_rate'; did you mean 'learning_rate'\?"),
        ("zzzzzz: 1", "unknown field 'zzzzzz'"),
        ("learning_rate: fast", "recipe.yaml: learning_rate must be a number, got 'fast'"),
        ("learning_rate: [1, 2]", r"learning_rate must be one value, got the list \[1, 2\]"),
        ("learning_rate: nan", "^learning_rate must be in "),
        ("num_mel_bins: 12.5", "num_mel_bins must be an integer, got '12.5'"),
        ("mean: middling", "mean must be a number or auto, got 'middling'"),
        ("random_crop: perhaps", "random_crop must be true or false, got 'perhaps'"),
        ("on_bad_clip: ignore", "on_bad_clip must be one of .*error.*, got 'ignore'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type must be one of .*cosine.*, got 'cosin'"),
        ("model_config: '{x'", "model_config must be a JSON object, got '{x'"),
        ("model_config: [1]", "model_config must be one value, got the list"),
        ("lr_scheduler_kwargs: '{x'", "lr_scheduler_kwargs must be a JSON object, got '{x'"),
        ("label_separator: ''", "label_separator must be at least one character, got ''"),
        ("labels: [a, null]", "labels must be a list of plain values"),
        ("labels: []", r"labels must name at least two classes, got \[\]"),
        ("labels: [a, b, a]", "labels must name each class once, got a several times"),
        ("labels: [a, b]\ndrop_labels: [b]", "labels and drop_labels must not share a class, got b"),
        ("- a\n- b", "must consist of lines `field: value`, got list"),
        ("a: b: c", "is not valid YAML"),
        ("seed: 1\nseed: 2", "seed is set twice"),
        ("inherits: nowhere.yaml", "nowhere.yaml: No such file"),
        ("inherits: [a.yaml, b.yaml]", "inherits must be the path of one recipe, got"),
        ("metric_for_best_model: map", "metric_for_best_model must be accuracy, macro_f1, mAP or loss, got 'map'"),
        ("report_to: [tensorbord]", "report_to must be none or trackers .*tensorboard.*, got 'tensorbord'"),
        ("accelerator_config: {x: 1}", "TrainingArguments: AcceleratorConfig.* unexpected keyword argument 'x'"),
        ("eval_strategy: steps\nsave_strategy: epoch", "load_best_model_at_end requires"),
        ("greater_is_better: false", "greater_is_better must be true for metric_for_best_model: accuracy, got false"),
        # how to divide the data
        ("train_folds: []", r"train_folds must name at least one fold, got \[\]"),
        ("test_folds: 1", "train_folds and test_folds must not overlap, got 1, 2, 3, .* and 1;"),
        ("train_split: a\nvalidation_split: b\ntest_split: a", "train_split and test_split must not overlap, got a"),
        ("train_split: a\nvalidation_split: 'a[90%:]'\ntest_split: b", r"must not overlap, got a and a\[90%:\]"),
        ("train_split: 'a[:80%]+b'\nvalidation_split: 'a[70%:]'\ntest_split: c", "validation_split must not overlap"),
        ("train_split: a\ntest_split: b", "validation_split must be set together with train_split"),
        ("test_list: x", "validation_list must be set together with test_list"),
        ("test_list: x\ntrain_folds: 1", "got train_folds .folds.; test_list .lists of clips.; unset all but one"),
        ("split_seed: 1\ntrain_folds: 1", r"in one way only, got train_folds \(folds\); split_seed \(random shares\)"),
        ("train_split: a\nfold_column: x", "fold_column .folds.; train_split .own splits."),
        ("split_shares: [0.8, 0.1]", "split_shares must be three numbers that sum to 1 .*, got 0.8 0.1"),
        ("split_shares: [0.8, 0.3, -0.1]", r"split_shares must be in \(0, 1\), got \[0.8, 0.3, -0.1\]"),
        ("split_seed: 3", "split_shares must be three numbers .*, got none"),
        ("label_column: fold", "label_column and fold_column must be two columns, got 'fold' for both"),
        ("label_column: x\ngroup_column: x", "label_column and group_column must be two columns"),
        ("clip_column: fold", "fold_column and clip_column must be two columns"),
        # RULES
        ("dataset_dir: v2\ndataset_config: x", "dataset_config must not be set together with dataset_dir, got 'x'"),
        ("train_split: a\ndataset_split: b", "dataset_split must not be set together with train_split, got 'b'"),
        ("pai: {}\nema_decay: 0.9", "ema_decay must not be set together with pai, got 0.9 and {}; a moving average"),
        ("average_checkpoints: 2\nema_decay: 0.9", "ema_decay must not be set together with average_checkpoints"),
        ("baseline: true", "baseline must be false with pai: null, got true"),
        ("loss: bce\nlabel_smoothing_factor: 0.1", "label_smoothing_factor must be 0 with loss: bce, got 0.1"),
        ("bf16: true\nfp16: true", "fp16 must be false with bf16: true, got true; set one of them"),
        ("balanced_sampling: true\nclass_weights: auto", "class_weights must be left out with balanced_sampling: true"),
        ("balanced_sampling: true\ntrain_sampling_strategy: sequential", "must be random with balanced_sampling: true"),
        ("lr_step_decay: 0.5", "lr_scheduler_type must be constant_with_warmup with lr_step_decay: 0.5, got 'cosine'"),
        ("eval_strategy: no\nearly_stopping_patience: 3", "eval_strategy must be steps or epoch with early_stopping_p"),
        ("save_strategy: no\naverage_checkpoints: 3", "save_strategy must be steps or epoch or best with average"),
        ("average_checkpoints: 3\nsave_total_limit: 3", "save_total_limit must be at least 4 with average_check"),
        ("dataloader_persistent_workers: true", "must be false with dataloader_num_workers: 0, got true"),
        ("remove_unused_columns: true", "remove_unused_columns must be false, got true; augmentation needs"),
        ("hub_strategy: all_checkpoints", "hub_strategy must be end or every_save or checkpoint, got"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_an_error_that_names_the_field_and_the_value(recipe, text, message):
    with pytest.raises(UserError, match=message):
        parse_recipe([recipe(text)])


def numeric_fields():
    """Each field with numbers: its dataclass, the field, and the types of its values."""
    for part in PARTS:
        for entry in dataclasses.fields(part):
            hint = get_type_hints(part)[entry.name]
            kinds = {hint, *get_args(hint), *(kind for one in get_args(hint) for kind in get_args(one))}
            if kinds & {int, float}:
                yield pytest.param(part, entry, kinds, id=entry.name)


@pytest.mark.parametrize(("part", "entry", "kinds"), numeric_fields())
def test_a_number_outside_the_range_of_its_field_is_an_error(part, entry, kinds):
    interval = range_of(entry)
    assert interval is not None, f"{entry.name} has no range"
    low, high = (float(end) for end in interval[1:-1].split(","))
    outside = [low - (interval[0] == "["), high + (interval[-1] == "]")]
    outside[0] -= outside[0] == entry.default  # such as -1, which then stands for "not set"
    for value in outside + [math.nan] * (float in kinds):
        value = [value] if list[float] in kinds else value
        with pytest.raises(UserError, match=rf"^{entry.name} must be in {re.escape(interval)}, got "):
            part(**{entry.name: value} | ({"output_dir": "x"} if part is RunArguments else {}))


def test_every_range_of_training_arguments_belongs_to_a_field():
    assert set(INHERITED) <= {entry.name for entry in dataclasses.fields(RunArguments)}


@pytest.mark.parametrize(
    ("field", "value"),
    [("mixup_probability", 0.0), ("mixup_probability", 1.0), ("window_overlap", 0.0), ("layer_decay", 1.0),
     ("max_steps", -1), ("local_rank", -1), ("seed", 2**32 - 1), ("mean", -1e9)],
)  # fmt: skip
def test_the_ends_of_a_range_and_the_defaults_are_allowed(field, value):
    assert parse_recipe([f"--{field}={value}"]).to_dict()[field] == value


def test_null_unsets_any_field(recipe):
    path = recipe(
        "clip_column: a\nseed: 3\nsave_total_limit: null\ntest_folds: [9]\nreport_to: none\npai: {}\nnoise: 1"
    )
    names = ("clip_column", "seed", "test_folds", "report_to", "pai", "output_dir", "random_crop")
    parsed = parse_recipe([path, *(word for name in names for word in (f"--{name}", "null")), "--noise=null"])
    assert parsed.to_dict() == parse_recipe([]).to_dict() | {"output_dir": "runs/recipe"}
    assert parse_recipe([path, "--seed", "null", "--seed", "5"]).training.seed == 5


def test_inherited_mappings_are_merged_and_null_removes_a_key(recipe):
    recipe("pai: {patience: 3, interval: 2}\nmodel_config: {a: {b: 1, c: 2}}", "base.yaml")
    recipe("inherits: base.yaml\npai: {patience: 4}\nmodel_config: {a: {c: null}, d: 5}", "middle.yaml")
    parsed = parse_recipe([recipe("inherits: middle.yaml\npai: {interval: null}")])
    assert parsed.dendrites.pai == {"patience": 4} and parsed.model.model_config == {"a": {"b": 1}, "d": 5}
    assert parse_recipe([recipe("inherits: middle.yaml\npai: null")]).dendrites.pai is None


def test_a_circle_of_recipes_is_shown(recipe):
    recipe("inherits: a.yaml", "b.yaml")
    with pytest.raises(UserError, match=r"inherits must not lead in a circle, got \S*a.yaml → \S*b.yaml → \S*a.yaml"):
        parse_recipe([recipe("inherits: b.yaml", "a.yaml")])


def test_a_warm_up_as_long_as_the_training_is_a_warning(caplog):
    training = parse_recipe(["--warmup_steps", "10"]).training
    assert training.get_warmup_steps(11) == 10 and not caplog.records
    assert training.get_warmup_steps(10) == 10 and "less than the 10 steps of the training, got 10" in caplog.text


def test_a_wrong_option_is_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match="command line: unknown field '--learning-rat'; did you mean 'learning_rate'"):
        parse_recipe(["--learning-rat", "1"])
    with pytest.raises(UserError, match="unknown field 'stray'"):
        parse_recipe(["--seed", "1", "stray"])


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for entry in (entry for part in PARTS for entry in dataclasses.fields(part) if entry.init):
        words = " ".join(entry.metadata["help"].replace("%%", "%").split())
        assert f"--{entry.name} " in text and words[:30] in text, entry.name
    assert "Train only the last N layers and the head. Default: all layers. Range: [0, inf)." in text


@pytest.mark.parametrize(
    ("text", "folds"),
    [
        ("learning_rate: 1e-4\nmodel_config: {hidden_size: 8}\nlr_scheduler_type: linear", {"test": ["10"]}),
        ("split_shares: [0.8, 0.1, 0.1]\nsplit_seed: 3", {"train": ["train"], "test": ["test"]}),
        ("train_split: a\nvalidation_split: b\ntest_split: b", {"train": ["a"], "validation": ["b"]}),
        ("fold_column: part\ntrain_folds: [x, y]", {"train": ["x", "y"], "validation": ["9"], "test": ["10"]}),
    ],
)
def test_the_saved_recipe_is_the_same_run_and_has_no_token(recipe, tmp_path, text, folds):
    first = parse_recipe([recipe(text), "--seed", "5", "--hub_token", "hf_secret"])
    write_yaml(first, tmp_path / "config.yaml")
    second = parse_recipe([str(tmp_path / "config.yaml")])
    assert second.to_dict() == first.to_dict() and second.data == first.data and second.training.seed == 5
    assert folds.items() <= second.data.folds.items() and "hf_secret" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["quickstart", "urbansound8k/ast_tiny"])
def test_each_recipe_has_a_run_folder_of_its_own(name):
    parsed = parse_recipe([str(ROOT / f"configs/{name}.yaml"), "--pai", "{}"])
    assert (
        parsed.training.output_dir == f"runs/{name}"
        and parsed.baseline().training.output_dir == f"runs/{name}_baseline"
    )


@pytest.mark.parametrize(
    ("asked", "gpu", "fast_bf16", "found"),
    [
        ("auto", False, False, "fp32"),
        ("auto", False, True, "bf16"),
        ("bf16", False, False, "bf16"),
        ("fp16", False, False, "precision must be bf16, fp32 or auto on a CPU, got 'fp16'"),
        ("auto", True, False, "fp16"),
        ("auto", True, True, "bf16"),
        ("bf16", True, False, "precision must be fp16, fp32 or auto on Tesla V100, got 'bf16'"),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, asked, gpu, fast_bf16, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    if not found.startswith("precision"):
        assert resolve_precision(asked) == found
        return
    with pytest.raises(UserError, match=found):
        resolve_precision(asked)


def test_the_flag_bf16_overrides_precision(recipe):
    assert parse_recipe([recipe("precision: fp32"), "--bf16", "true"]).training.precision == "bf16"
