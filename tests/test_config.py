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


def test_yaml_numbers_in_scientific_notation_are_numbers(recipe):
    assert parse_recipe([recipe("learning_rate: 1e-4")]).training.learning_rate == 1e-4


def test_the_command_line_overrides_yaml_and_yaml_overrides_the_inherited(recipe):
    recipe("seed: 1\nlearning_rate: 1.0\nweight_decay: 0.5\ntrain_folds: [1, 2]", "base.yaml")
    path = recipe("inherits: base.yaml\nlearning_rate: 2.0\nweight_decay: null")
    parsed = parse_recipe([path, "--seed", "3", "--train_folds", "4", "5"])
    assert (parsed.training.seed, parsed.training.learning_rate, parsed.training.weight_decay) == (3, 2.0, 0.0)
    assert parsed.data.train_folds == ["4", "5"]


def test_negative_numbers_lists_flags_and_mappings_pass_through_yaml(recipe):
    parsed = parse_recipe(
        [recipe("mean: -4.452\nlabels: [a b, c]\nrandom_crop: false\nmodel_config: {time_stride: 16}\ntest_folds: 11")]
    )
    assert parsed.features.mean == -4.452 and parsed.data.labels == ["a b", "c"]
    assert parsed.augmentation.random_crop is False and parsed.model.model_config == {"time_stride": 16}
    assert parsed.data.test_folds == ["11"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1", r"recipe.yaml: unknown field 'learnig_rate'; did you mean 'learning_rate'\?"),
        ("zzzzzz: 1", "unknown field 'zzzzzz'"),
        ("learning_rate: fast", "recipe.yaml: learning_rate must be a number, got 'fast'"),
        ("learning_rate: [1, 2]", r"learning_rate must be one value, got the list \[1, 2\]"),
        ("learning_rate: nan", "^learning_rate must be in "),
        ("num_mel_bins: 12.5", "num_mel_bins must be an integer, got '12.5'"),
        ("random_crop: perhaps", "random_crop must be true or false, got 'perhaps'"),
        ("on_bad_clip: ignore", "on_bad_clip must be one of .*error.*, got 'ignore'"),
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
        ("eval_strategy: steps\nsave_strategy: epoch", "load_best_model_at_end requires"),
        ("eval_strategy: no\nearly_stopping_patience: 3", "eval_strategy must be steps or epoch with early_stopping_p"),
        ("train_folds: []", r"train_folds must name at least one fold, got \[\]"),
        ("test_folds: 1", "train_folds and test_folds must not overlap, got 1, 2, 3, .* and 1;"),
        ("validation_folds: [8, 9]", "train_folds and validation_folds must not overlap, got .*8 and 8, 9;"),
        (
            "train_split: a\nvalidation_split: b\ntest_split: a",
            "train_split and test_split must not overlap, got a and a",
        ),
        ("train_split: a\nvalidation_split: 'a[90%:]'\ntest_split: b", r"must not overlap, got a and a\[90%:\]"),
        (
            "train_split: 'a[:80%]+b'\nvalidation_split: 'a[70%:90%]'\ntest_split: c",
            "validation_split must not overlap",
        ),
        ("label_column: fold", "label_column and fold_column must be two columns, got 'fold' for both"),
        ("label_column: x\ngroup_column: x", "label_column and group_column must be two columns"),
        ("clip_column: fold", "fold_column and clip_column must be two columns"),
        ("loss: bce\nlabel_smoothing_factor: 0.1", "label_smoothing_factor must be 0 with loss: bce, got 0.1"),
        ("metric_for_best_model: map", "metric_for_best_model must be accuracy, macro_f1, mAP or loss, got 'map'"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type must be one of .*cosine.*, got 'cosin'"),
        ("accelerator_config: {x: 1}", "TrainingArguments: AcceleratorConfig.* unexpected keyword argument 'x'"),
        ("dataloader_persistent_workers: true", "must be false with dataloader_num_workers: 0, got true"),
        ("greater_is_better: false", "greater_is_better must be true for metric_for_best_model: accuracy, got false"),
        ("bf16: true\nfp16: true", "bf16 and fp16 must not both be true"),
        ("remove_unused_columns: true", "remove_unused_columns must be false, got true"),
        ("report_to: [tensorbord]", "report_to must be none or trackers .*tensorboard.*, got 'tensorbord'"),
        ("mean: middling", "mean must be a number or auto, got 'middling'"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_the_field_and_the_value(recipe, text, message):
    with pytest.raises(UserError, match=message):
        parse_recipe([recipe(text)])


def numeric_fields():
    """Each field with numbers: its dataclass, the field, and the types of its values."""
    hints = [(part, entry, get_type_hints(part)[entry.name]) for part in PARTS for entry in dataclasses.fields(part)]
    found = [
        (part, entry, {hint, *get_args(hint), *(a for one in get_args(hint) for a in get_args(one))})
        for part, entry, hint in hints
    ]
    return [pytest.param(*one, id=one[1].name) for one in found if one[2] & {int, float}]


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
    path = recipe("inherits: b.yaml", "a.yaml")
    recipe("inherits: c.yaml", "b.yaml")
    recipe("inherits: a.yaml", "c.yaml")
    with pytest.raises(
        UserError, match=r"inherits must not lead in a circle, got \S*a.yaml → \S*b.yaml → \S*c.yaml → \S*a.yaml"
    ):
        parse_recipe([path])


def test_words_of_yaml_stay_words_and_an_empty_list_is_a_list(recipe):
    parsed = parse_recipe(
        [recipe("labels: [yes, no, on, true]\neval_strategy: no\nload_best_model_at_end: no\ndrop_labels: []")]
    )
    assert parsed.data.labels == ["yes", "no", "on", "true"] and parsed.data.drop_labels == []
    assert parsed.training.eval_strategy == "no" and parsed.training.load_best_model_at_end is False


def test_a_warm_up_as_long_as_the_training_is_said(caplog):
    training = parse_recipe(["--warmup_steps", "10"]).training
    assert training.get_warmup_steps(11) == 10 and not caplog.records
    assert training.get_warmup_steps(10) == 10 and "less than the 10 steps of the training, got 10" in caplog.text


def test_a_metric_and_a_run_folder_have_one_spelling():
    parsed = parse_recipe(["--metric_for_best_model", "eval_loss", "--output_dir", "runs//x/", "--pai", "{}"])
    assert parsed.training.metric_for_best_model == "loss" and parsed.training.output_dir == "runs/x"
    assert parsed.baseline().training.output_dir == "runs/x_baseline"


def test_a_wrong_option_is_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match="command line: unknown field '--learning-rat'; did you mean 'learning_rate'"):
        parse_recipe(["--learning-rat", "1"])
    with pytest.raises(UserError, match="unknown field 'stray'"):
        parse_recipe(["--seed", "1", "stray"])


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    text = capsys.readouterr().out
    for field in ("train_folds", "max_length", "time_mask", "unfreeze_last_layers", "precision", "learning_rate"):
        assert f"--{field}" in text
    assert "Train only the last N layers and the head. Default: all layers. Range: [0, inf)." in " ".join(text.split())


def test_the_saved_recipe_is_the_same_run(recipe, tmp_path):
    first = parse_recipe(
        [recipe("learning_rate: 1e-4\nmodel_config: {hidden_size: 8}"), "--seed", "5", "--lr_scheduler_type", "linear"]
    )
    write_yaml(first, tmp_path / "config.yaml")
    second = parse_recipe([str(tmp_path / "config.yaml")])
    assert second.to_dict() == first.to_dict()
    assert second.to_dict()["seed"] == 5 and second.to_dict()["lr_scheduler_type"] == "linear"


def test_each_way_to_divide_the_data_survives_the_saved_recipe(recipe, tmp_path):
    for text, folds in (
        ("split_shares: [0.8, 0.1, 0.1]\nsplit_seed: 3", {"train": ["train"], "test": ["test"]}),
        ("train_split: a\nvalidation_split: b\ntest_split: b", {"train": ["a"], "validation": ["b"]}),
        ("fold_column: part\ntrain_folds: [x, y]", {"train": ["x", "y"], "validation": ["9"], "test": ["10"]}),
    ):
        write_yaml(parse_recipe([recipe(text)]), tmp_path / "config.yaml")
        data = parse_recipe([str(tmp_path / "config.yaml")]).data
        assert folds.items() <= data.folds.items() and data == parse_recipe([recipe(text)]).data
    with pytest.raises(UserError, match=r"in one way only, got train_folds \(folds\); split_shares \(rand"):
        parse_recipe([recipe("split_shares: [0.8, 0.1, 0.1]"), "--train_folds", "1"])


def test_no_token_is_saved(recipe, tmp_path):
    write_yaml(parse_recipe([recipe("seed: 1"), "--hub_token", "hf_secret"]), tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()


def test_each_recipe_has_a_run_folder_of_its_own():
    assert parse_recipe([str(ROOT / "configs/quickstart.yaml")]).training.output_dir == "runs/quickstart"
    tiny = parse_recipe([str(ROOT / "configs/urbansound8k/ast_tiny.yaml")])
    assert tiny.training.output_dir == "runs/urbansound8k/ast_tiny"


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").glob("[!a]*/**/*.yaml")) + [ROOT / "configs/quickstart.yaml"],
    ids=lambda path: path.name,
)
def test_shipped_recipes_parse_and_say_what_they_are(path):
    assert parse_recipe([str(path)]).data.dataset
    assert path.read_text().startswith("# ")


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto") == "fp32"
    assert resolve_precision("bf16") == "bf16"
    with pytest.raises(UserError, match="precision must be bf16, fp32 or auto on a CPU, got 'fp16'"):
        resolve_precision("fp16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert resolve_precision("auto") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    assert resolve_precision("auto") == "fp16"
    with pytest.raises(UserError, match="precision must be fp16, fp32 or auto on Tesla V100, got 'bf16'"):
        resolve_precision("bf16")


def test_the_precision_flags_of_training_arguments_overrule_ours(recipe):
    assert parse_recipe([recipe("precision: fp32"), "--bf16", "true"]).training.precision == "bf16"
    parsed = parse_recipe([recipe("precision: fp32")])
    assert not parsed.training.bf16 and parsed.to_dict()["precision"] == "fp32"
