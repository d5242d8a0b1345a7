"""training.spec_augment: the schedule, the extent and the place of the masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.spec_augment import SpecAugmentOptions, spec_augment

OPTIONS = SpecAugmentOptions(schedule_steps=(10, 20, 30))


def masked(shape, lens, step, options=OPTIONS, seed=0, steps_per_s=100.0, time_axis=1) -> torch.Tensor:
    """Where ones are set to zero."""
    generator = torch.Generator().manual_seed(seed)
    return spec_augment(torch.ones(shape), lens, steps_per_s, step, options, generator, time_axis) == 0.0


def spans(line: torch.Tensor) -> list[int]:
    """Lengths of the runs of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], line.int().numpy(), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_the_number_of_masks_follows_the_schedule_of_the_recipes():
    # RETURNN's specaugment: min = step1 + step2, max = max(len // 100, 2) * (step0 + step1 + 2 step2) over time and
    # 2 step0 + step1 + 2 step2 over features.
    assert [OPTIONS.time_mask_counts(12.3, step) for step in (0, 9, 10, 20, 30)] == [
        (0, 0),
        (0, 0),
        (0, 12),
        (1, 24),
        (2, 48),
    ]
    assert OPTIONS.time_mask_counts(0.5, 30) == (2, 8)
    assert [OPTIONS.feature_mask_counts(step) for step in (0, 10, 20, 30)] == [(0, 0), (0, 2), (1, 3), (2, 5)]


def test_nothing_is_masked_before_the_schedule_begins():
    assert not masked((2, 300, 80), [300, 200], step=9).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 400))
def test_masks_are_bands_in_time_and_features_within_their_limits(seed, length):
    mask = masked((1, 400, 80), [length], 30, seed=seed)[0]
    in_time = mask.all(1)
    in_features = mask[~in_time].all(0) if not in_time.all() else torch.zeros(80, dtype=torch.bool)
    assert torch.equal(mask, in_time[:, None] | in_features[None])
    assert not in_time[length:].any()
    # Five bands of at most 16 features, as many time masks as there may be, of at most 20 frames.
    assert in_features.sum() <= 5 * 16
    assert in_time.sum() <= max(length // 100, 2) * 4 * 20


def test_a_single_mask_is_no_longer_than_its_limit_and_reaches_it():
    options = SpecAugmentOptions(schedule_steps=(0, 5, 5), max_time_mask_s=0.2, max_feature_mask_share=0.0)
    lengths = [length for seed in range(300) for length in spans(masked((1, 4000), [4000], 0, options, seed)[0])]
    assert min(lengths) == 1 and max(lengths) >= 20
    alone = SpecAugmentOptions(schedule_steps=(0, 0, 5), seconds_per_time_mask=100.0, max_feature_mask_share=0.0)
    counts = {int(masked((1, 4000), [4000], 0, alone, seed)[0].sum()) for seed in range(300)}
    assert max(counts) <= 4 * 20


def test_waveforms_get_time_masks_alone():
    mask = masked((2, 32_000), [32_000, 8_000], 30, steps_per_s=16_000.0)
    assert mask[0].any() and mask[1, :8_000].any() and not mask[1, 8_000:].any()
    assert all(length <= 8 * 3_200 for length in spans(mask[0]))


def test_the_time_axis_may_be_the_last():
    first = masked((2, 300, 80), [300, 120], 30)
    last = masked((2, 80, 300), [300, 120], 30, time_axis=2)
    assert torch.equal(first.transpose(1, 2), last) and first.any()


def test_the_same_generator_gives_the_same_masks_and_another_others():
    assert torch.equal(masked((2, 300, 80), [300, 300], 30), masked((2, 300, 80), [300, 300], 30))
    assert not torch.equal(masked((2, 300, 80), [300, 300], 30), masked((2, 300, 80), [300, 300], 30, seed=1))
    mask = masked((2, 300, 80), [300, 300], 30)
    assert not torch.equal(mask[0], mask[1]), "all utterances of a batch are masked alike"


def test_what_is_not_masked_stays():
    features = torch.randn(2, 300, 80)
    found = spec_augment(features, [300, 300], 100.0, 30, OPTIONS, torch.Generator().manual_seed(0))
    kept = found != 0.0
    assert torch.equal(found[kept], features[kept]) and kept.float().mean() > 0.2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule_steps": (1, 2)}, "schedule_steps: expected three steps in order, got .1, 2."),
        ({"schedule_steps": (3, 2, 4)}, "schedule_steps: expected three steps in order"),
        ({"max_time_mask_s": 0.0}, "max_time_mask_s: expected a positive number of seconds, got 0.0"),
        ({"seconds_per_time_mask": -1.0}, "seconds_per_time_mask: expected a positive number"),
        ({"max_feature_mask_share": 1.5}, "max_feature_mask_share: expected 0 to 1, got 1.5"),
    ],
)
def test_options_are_verified(values, message):
    with pytest.raises(ValueError, match=message):
        SpecAugmentOptions(**values)
