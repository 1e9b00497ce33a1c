"""A small AST that learns from a CNN14: the labels it gets, and the errors of a teacher that does not fit."""

import pytest
import torch
from conftest import TINY_AST, TINY_CNN14, train_finished_run
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForAudioClassification, set_seed

import train
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_model
from audio_dendrites.recipes import RunArguments, parse_recipe
from audio_dendrites.training.losses import distilled_labels
from audio_dendrites.training.trainer import AudioTrainer

FIELDS = {
    "model_config": TINY_AST | {"num_hidden_layers": 1}, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
    "precision": "fp32", "report_to": ["none"], "max_steps": 2, "eval_strategy": "steps", "save_strategy": "steps",
    "eval_steps": 2, "save_steps": 2,
}  # fmt: skip
CNN14 = {"architecture": "cnn14", "model_config": TINY_CNN14}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, shared_tones) -> str:
    """The run folder of a trained CNN14."""
    folder = tmp_path_factory.mktemp("teacher")
    train_finished_run(folder, shared_tones, **FIELDS | CNN14)
    return str(folder / "run")


@pytest.fixture
def run(recipe, monkeypatch):
    """A function that trains a recipe with changed fields. `run.given` has the inputs and the loss of each step."""
    given = []
    compute_loss = AudioTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        before = dict(inputs)
        found = compute_loss(self, model, inputs, *args, **kwargs)
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            given.append((before, float(loss.detach())))
        return found

    def run(**changes):
        train.main(parse_recipe([str(recipe(**FIELDS | changes))]))

    monkeypatch.setattr(AudioTrainer, "compute_loss", watched)
    run.given = given
    return run


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_loss_of_mixed_labels_is_the_mean_of_both_losses(loss):
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    hard = torch.eye(3)[labels]
    measure = cross_entropy if loss == "cross_entropy" else binary_cross_entropy_with_logits
    scores = teacher.softmax(1) if loss == "cross_entropy" else teacher.sigmoid()
    expected = 0.7 * measure(logits, hard) + 0.3 * measure(logits, scores)
    for given in (labels, hard):
        assert torch.isclose(measure(logits, distilled_labels(given, teacher, 0.3, loss)), expected)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_the_student_is_trained_on_the_teachers_scores_of_the_same_batch(run, teacher, tmp_path, mixup):
    run(distill_from=teacher, distillation=0.75, mixup_alpha=mixup)
    first, loss = run.given[0]
    labels, inputs = first["labels"], first["input_values"]
    assert labels.dim() == (2 if mixup else 1)
    recipe = parse_recipe([str(tmp_path / "run" / "config.yaml")])
    set_seed(recipe.training.seed)
    untrained = load_model(["high", "low"], recipe.model, BatchedASTFeatureExtractor(max_length=80))
    model = AutoModelForAudioClassification.from_pretrained(teacher, trust_remote_code=True).eval()
    with torch.no_grad():
        scores, logits = model(inputs).logits.softmax(-1), untrained(inputs).logits
    hard = labels if mixup else torch.eye(2)[labels]
    assert abs(float(cross_entropy(logits, 0.25 * hard + 0.75 * scores)) - loss) < 1e-5
    assert abs(float(cross_entropy(logits, hard)) - loss) > 1e-4


def test_a_teacher_that_does_not_fit_is_an_error_before_the_features(run, teacher, tmp_path):
    waves = {"waveform": True, "max_length": 80}
    run(**CNN14 | waves, output_dir=str(tmp_path / "waves"))
    for changes, message in (
        ({"distill_from": "nowhere"}, "distill_from: nowhere could not be loaded: "),
        (
            {"distill_from": teacher, "max_length": 96},
            "a model with the features of the recipe, got .*: max_length must be 96, got 80",
        ),
        ({"distill_from": teacher, "loss": "bce"}, "a model of the recipe's loss, bce, got .* with cross_entropy"),
        ({"distill_from": teacher, "labels": ["low", "high"]}, "the classes low, high, got .* with high, low"),
        (
            {"distill_from": str(tmp_path / "waves")} | waves | {"max_length": 96},
            "a model with the features of the recipe, got .*: max_length must be 96, got 80",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(**changes)
    with pytest.raises(UserError, match=r"distillation must be in \(0, 1\], got 0.0"):
        RunArguments("x", distillation=0.0)
