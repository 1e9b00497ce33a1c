"""A small AST that learns from a CNN14: the labels it gets, and what it says of a teacher it cannot learn from."""

import pytest
import torch
import yaml
from conftest import TINY_AST, TINY_CNN14, TONES
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForAudioClassification, set_seed

import train
from audio_dendrites.data.features import BatchedASTFeatureExtractor
from audio_dendrites.errors import UserError
from audio_dendrites.models.loading import load_model
from audio_dendrites.recipes import RunArguments, parse_recipe
from audio_dendrites.training.losses import distilled_labels
from audio_dendrites.training.trainer import AudioTrainer

RECIPE = TONES | {
    "max_length": 80,
    "model_config": TINY_AST | {"num_hidden_layers": 1},
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "preprocessing_num_workers": 1,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "report_to": ["none"],
}


@pytest.fixture
def run(tones, tmp_path, monkeypatch):
    """Trains `tones` with changes to RECIPE, and keeps what its loss was given; gives the run folder."""
    given = []
    compute_loss = AudioTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        before = dict(inputs)
        found = compute_loss(self, model, inputs, *args, **kwargs)
        if model.training:
            loss = found[0] if isinstance(found, tuple) else found
            given.append((before, float(loss.detach())))
        return found

    monkeypatch.setattr(AudioTrainer, "compute_loss", watched)

    def train_it(name, **changes):
        path = tmp_path / f"{name}.yaml"
        fields = RECIPE | {"dataset": str(tones), "output_dir": str(tmp_path / name)} | changes
        path.write_text(yaml.safe_dump(fields))
        given.clear()
        train.main(parse_recipe([str(path)]))
        return tmp_path / name

    train_it.given = given
    return train_it


CNN14 = {"architecture": "cnn14", "model_config": TINY_CNN14}


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
def test_the_student_is_trained_on_the_teachers_scores_of_the_same_batch(run, mixup):
    teacher_folder = run("teacher", **CNN14)
    folder = run("student", distill_from=str(teacher_folder), distillation=0.75, mixup_alpha=mixup)
    first, loss = run.given[0]
    labels, inputs = first["labels"], first["input_values"]
    assert labels.dim() == (2 if mixup else 1)
    teacher = AutoModelForAudioClassification.from_pretrained(teacher_folder, trust_remote_code=True).eval()
    recipe = parse_recipe([str(folder / "config.yaml")])
    set_seed(recipe.training.seed)
    untrained = load_model(["high", "low"], recipe.model, BatchedASTFeatureExtractor(max_length=80))
    with torch.no_grad():
        scores, logits = teacher(inputs).logits.softmax(-1), untrained(inputs).logits
    hard = labels if mixup else torch.eye(2)[labels]
    assert abs(float(cross_entropy(logits, 0.25 * hard + 0.75 * scores)) - loss) < 1e-5
    assert abs(float(cross_entropy(logits, hard)) - loss) > 1e-4


def test_a_teacher_that_does_not_fit_is_an_error_before_the_features(run):
    teacher = str(run("teacher", **CNN14))
    for changes, message in (
        ({"distill_from": "nowhere"}, "distill_from: nowhere could not be loaded: "),
        ({"distill_from": teacher, "max_length": 96}, "hears other features than the recipe's: max_length is 80, wan"),
        ({"distill_from": teacher, "loss": "bce"}, "was trained with the loss cross_entropy, wanted bce"),
        ({"distill_from": teacher, "labels": ["low", "high"]}, "has the classes high, low, but the recipe low, high"),
    ):
        with pytest.raises(UserError, match=message):
            run("student", **changes)
    waves = {"waveform": True, "max_length": 80}
    teacher = str(run("waves", **CNN14, **waves))
    with pytest.raises(UserError, match="hears other features than the recipe's: max_length is 80, wanted 96"):
        run("student", distill_from=teacher, **waves | {"max_length": 96})
    with pytest.raises(UserError, match=r"distillation must be in \(0, 1\], got 0.0"):
        RunArguments("x", distillation=0.0)
