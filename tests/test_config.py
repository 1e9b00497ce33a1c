import pytest
import torch
from conftest import ROOT

from audio_dendrites.errors import UserError
from audio_dendrites.recipes import parse_recipe, resolve_precision, write_yaml


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
        ("learning_rate: fast", "recipe.yaml: learning_rate: found 'fast', wanted float"),
        ("learning_rate: [1, 2]", "learning_rate: found the list .* wanted one value"),
        ("num_mel_bins: 12.5", "num_mel_bins: found '12.5', wanted int"),
        ("random_crop: perhaps", "random_crop: Truthy value expected: got perhaps"),
        ("on_bad_clip: ignore", "on_bad_clip: invalid choice: 'ignore'"),
        ("model_config: '{x'", "model_config: found '{x', wanted a JSON object"),
        ("- a\n- b", "found list, wanted lines of `field: value`"),
        ("a: b: c", "is not YAML"),
        ("inherits: nowhere.yaml", "nowhere.yaml: No such file"),
        ("eval_strategy: steps\nsave_strategy: epoch", "load_best_model_at_end requires"),
        ("test_folds: 1", "fold 1 stands in train_folds and in test_folds"),
        ("validation_folds: [8, 9]", "fold 8 stands in train_folds and in validation_folds"),
        ("train_split: a\nvalidation_split: b\ntest_split: a", "fold a stands in train_split and in test_split"),
        ("loss: bce\nlabel_smoothing_factor: 0.1", "label_smoothing_factor: found 0.1, wanted none with the loss bce"),
        ("mean: middling", "mean must be a number or auto, got 'middling'"),
        ("metric_for_best_model: map", "metric_for_best_model: found map, wanted accuracy, macro_f1, mAP or loss"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_field_value_and_wanted(recipe, text, message):
    with pytest.raises(UserError, match=message):
        parse_recipe([recipe(text)])


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
    assert "Train only the last N layers" in text


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
    with pytest.raises(UserError, match="split_shares .drawn shares.: wanted one way to divide"):
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
    with pytest.raises(UserError, match="found fp16, which needs a CUDA GPU; this is a CPU: use bf16, fp32 or auto"):
        resolve_precision("fp16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert resolve_precision("auto") == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    assert resolve_precision("auto") == "fp16"
    with pytest.raises(UserError, match="found bf16, which Tesla V100 lacks"):
        resolve_precision("bf16")


def test_the_precision_flags_of_training_arguments_overrule_ours(recipe):
    assert parse_recipe([recipe("precision: fp32"), "--bf16", "true"]).training.precision == "bf16"
    parsed = parse_recipe([recipe("precision: fp32")])
    assert not parsed.training.bf16 and parsed.to_dict()["precision"] == "fp32"
