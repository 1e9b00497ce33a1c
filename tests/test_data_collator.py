import ast
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader

from data_collator import AugmentedClips, BalancedSampler, SpectrogramCollator

BANDS = 128


def clips(lengths, seed=0):
    """Examples whose every value is their own frame number + 1, so that a place can be read off."""
    return [
        {"input_values": torch.arange(1, n + 1, dtype=torch.float16)[:, None].expand(n, BANDS), "labels": n % 3}
        for n in lengths
    ]


def noise(count, frames=60, seed=0):
    draws = np.random.default_rng(seed)
    return [
        {"input_values": draws.standard_normal((frames, BANDS)).astype(np.float16), "labels": i % 3}
        for i in range(count)
    ]


def drawn(examples, seed=0, epoch=0):
    examples = AugmentedClips(examples, seed)
    examples.set_epoch(epoch)
    return [examples[row] for row in range(len(examples))]


def test_evaluation_pads_and_cuts_at_the_end():
    batch = SpectrogramCollator(50, padding_value=0.4, time_roll=9, time_mask=30)(clips([20, 50, 80]))
    assert batch["input_values"].shape == (3, 50, BANDS) and batch["input_values"].dtype == torch.float32
    frames = batch["input_values"][:, :, 0]
    assert torch.equal(frames[0], torch.cat([torch.arange(1.0, 21), torch.full((30,), 0.4)]))
    assert torch.equal(frames[1], torch.arange(1.0, 51))
    assert torch.equal(frames[2], torch.arange(1.0, 51))
    assert batch["labels"].tolist() == [2, 2, 2] and batch["labels"].dtype == torch.int64


def test_training_crops_and_places_at_random_without_losing_or_tearing_a_frame():
    frames = SpectrogramCollator(50)(drawn(clips([20, 80] * 200)))["input_values"][:, :, 0]
    short, long = frames[0::2], frames[1::2]
    assert all(torch.equal(row[row != 0], torch.arange(1.0, 21)) for row in short)
    assert torch.equal(long.diff(), torch.ones(200, 49))
    assert {int(row.nonzero()[0]) for row in short} == set(range(31)) == set((long[:, 0].int() - 1).tolist())


def test_random_crop_can_be_switched_off():
    plain = SpectrogramCollator(50)(clips([20, 80]))["input_values"]
    assert torch.equal(plain, SpectrogramCollator(50, random_crop=False)(drawn(clips([20, 80])))["input_values"])


def test_time_roll_is_circular_and_bounded():
    frames = SpectrogramCollator(50, time_roll=3)(drawn(clips([50] * 200)))["input_values"][:, :, 0]
    offsets = (frames[:, 0].int() - 1).tolist()
    for row, offset in zip(frames, offsets, strict=True):
        assert torch.equal(row, torch.arange(1.0, 51).roll(-offset))
    assert set(offsets) == {47, 48, 49, 0, 1, 2, 3}


def test_masks_hold_the_mean_span_the_other_axis_and_reach_their_longest():
    masked = SpectrogramCollator(60, time_mask=10, frequency_mask=6)(drawn(noise(1) * 300))["input_values"] == 0
    frames, bands = masked.all(2), masked.all(1)
    assert torch.equal(masked, frames[:, :, None] | bands[:, None, :])
    for mask, longest in ((frames, 10), (bands, 6)):
        assert mask.diff().sum(1).max() <= 2  # one stretch
        assert set(mask.sum(1).tolist()) == set(range(longest + 1))
    masked = SpectrogramCollator(60, time_mask=2, time_masks=8)(drawn(noise(1) * 50))["input_values"] == 0
    assert 2 < masked.all(2).sum(1).max() <= 16


def test_a_filter_is_one_smooth_curve_over_the_bands_that_spares_the_padding():
    examples = drawn(noise(1, frames=40) * 200)
    settings = {"max_length": 60, "random_crop": False, "padding_value": 9.0}
    plain = SpectrogramCollator(**settings)(examples)["input_values"]
    filtered = SpectrogramCollator(**settings, filter_gain=0.3)(examples)["input_values"]
    curves = (filtered - plain)[:, :40]
    assert torch.equal(filtered[:, 40:], plain[:, 40:]) and curves.std(1).max() < 1e-5
    bends = curves[:, 0].diff().diff().abs() > 1e-4  # five points: the curve bends at the three inner ones
    assert bends.sum(1).max() <= 6
    points = curves[:, 0, [0, -1]]
    assert -0.3 <= points.min() < -0.28 and 0.28 < points.max() <= 0.3
    assert abs(np.corrcoef(points.T)[0, 1]) < 0.2


def test_a_frequency_shift_moves_bands_and_repeats_the_outermost():
    examples = noise(1)
    plain = torch.from_numpy(examples[0]["input_values"]).float()
    moved = {s: plain[:, (torch.arange(BANDS) + s).clamp(0, BANDS - 1)] for s in range(-2, 3)}
    shifted = SpectrogramCollator(60, frequency_shift=2)(drawn(examples * 100))["input_values"]
    found = [[s for s in moved if torch.equal(one, moved[s])] for one in shifted]
    assert sorted({s for (s,) in found}) == [-2, -1, 0, 1, 2]


def test_mixup_blends_neighbours_and_their_labels_alike():
    examples = drawn(noise(5))
    plain = SpectrogramCollator(60, num_labels=3)(examples)
    mixed = SpectrogramCollator(60, num_labels=3, mixup_alpha=0.8)(examples)
    labels = torch.nn.functional.one_hot(plain["labels"], 3).float()
    neighbours = labels.roll(1, 0)
    weight = ((mixed["labels"] - neighbours) / (labels - neighbours)).nanmean(1)
    assert torch.allclose(mixed["labels"].sum(1), torch.ones(5))
    assert ((weight > 0) & (weight < 1)).all() and len(set(weight.tolist())) == 5
    expected = weight[:, None, None] * plain["input_values"]
    expected += (1 - weight[:, None, None]) * plain["input_values"].roll(1, 0)
    assert torch.allclose(mixed["input_values"], expected, atol=1e-5)


def test_mixup_probability_leaves_the_others_whole():
    examples = noise(1000, frames=4)
    labels = SpectrogramCollator(4, num_labels=3, mixup_alpha=0.8, mixup_probability=0.3)(drawn(examples))["labels"]
    assert 0.25 < (labels.max(1).values < 1).float().mean() < 0.35


def test_mixup_weights_follow_beta():
    labels = SpectrogramCollator(1, num_labels=3, mixup_alpha=0.4)(drawn(noise(3000, frames=1)))["labels"]
    own = labels[torch.arange(3000), torch.arange(3000) % 3]
    assert abs(own.mean() - 0.5) < 0.02
    assert abs(own.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # variance of Beta(a, a)


def test_noise_is_uniform_up_to_a_level_that_is_drawn_and_lies_over_masks_and_padding():
    examples = drawn(noise(300, frames=8))
    settings = {"max_length": 12, "time_mask": 4}
    plain, noisy = (SpectrogramCollator(**settings, noise=level)(examples)["input_values"] for level in (0, 0.1))
    added = (noisy - plain).reshape(300, -1)
    highest = added.max(1).values
    assert (added > -1e-6).all() and 0.098 < highest.max() <= 0.1001 and 0.04 < highest.mean() < 0.06
    assert torch.allclose(added.mean(1) / highest, torch.tensor(0.5), atol=0.05)
    again = SpectrogramCollator(**settings, noise=0.1)(examples[:1])["input_values"]
    assert torch.equal(again[0], noisy[0])


def test_balanced_sampling_weighs_a_clip_by_the_rarity_of_its_classes():
    labels = np.array([[1, 0, 0]] * 90 + [[0, 1, 0]] * 8 + [[0, 1, 1]] * 2)
    clips = AugmentedClips([{"input_values": torch.zeros(1, 1), "labels": 0}] * 100)
    sampler = BalancedSampler(clips, labels)
    weights = np.array([1000 / 90.01] * 90 + [1000 / 10.01] * 8 + [1000 / 10.01 + 1000 / 2.01] * 2)
    assert np.allclose(sampler.probabilities, weights / weights.sum())
    counts = np.zeros(100)
    for epoch in range(300):
        clips.set_epoch(epoch)
        np.add.at(counts, [row for row, _ in sampler], 1)
    assert counts.sum() == 30_000 and abs(counts[98:].mean() / counts[90:98].mean() - weights[99] / weights[90]) < 0.4
    assert np.allclose(BalancedSampler(clips, [0] * 75 + [1] * 25).probabilities[[0, 99]], [1 / 150, 1 / 50], rtol=1e-3)


def test_a_clip_that_is_drawn_again_is_augmented_otherwise_and_all_the_same_in_every_process():
    clips = AugmentedClips(noise(6), seed=4)
    keys = list(BalancedSampler(clips, [0, 0, 0, 0, 0, 1]))
    assert len(set(keys)) == len(keys) == 6 and keys == list(BalancedSampler(clips, [0, 0, 0, 0, 0, 1]))
    clips.set_epoch(1)
    assert list(BalancedSampler(clips, [0, 0, 0, 0, 0, 1])) != keys
    collator = SpectrogramCollator(50, time_roll=9, time_mask=9)
    first, again, plain = collator(clips.__getitems__([(2, 0), (2, 1), 2]))["input_values"]
    assert torch.equal(first, plain) and not torch.equal(first, again)


def test_mixup_without_num_labels_is_an_error():
    with pytest.raises(ValueError, match="num_labels must be set with mixup_alpha"):
        SpectrogramCollator(50, mixup_alpha=0.5)


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    collator = SpectrogramCollator(50, time_roll=9, time_mask=9, frequency_mask=9)
    examples = noise(6, 80)
    whole = collator(drawn(examples, seed=1, epoch=2))["input_values"]
    halves = [collator(drawn(examples, seed=1, epoch=2)[part])["input_values"] for part in (slice(3), slice(3, 6))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, collator(drawn(examples, seed=1, epoch=3))["input_values"])
    assert not torch.equal(whole, collator(drawn(examples, seed=2, epoch=2))["input_values"])


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_draw_the_same_numbers_and_see_the_epoch_change(workers):
    examples = AugmentedClips(noise(6, 80), seed=3)
    collator = SpectrogramCollator(50, time_roll=9, time_mask=9)
    loader = DataLoader(examples, batch_size=2, collate_fn=collator, **workers)
    epochs = []
    for epoch in range(2):
        examples.set_epoch(epoch)
        epochs.append(torch.cat([batch["input_values"] for batch in loader]))
        assert torch.equal(epochs[-1], collator(drawn(noise(6, 80), seed=3, epoch=epoch))["input_values"])
    assert not torch.equal(*epochs)


def test_the_file_can_be_copied_into_another_project():
    tree = ast.parse((ROOT / "data_collator.py").read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    libraries = {"numpy", "scipy", "torch", "transformers"}
    assert {name.split(".")[0] for name in imported} <= libraries | sys.stdlib_module_names
