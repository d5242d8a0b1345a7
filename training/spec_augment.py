"""SpecAugment (Park et al. 2019, arXiv:1904.08779) with a step schedule: masks over time and over feature bands.

The schedule and the numbers are those of the RWTH recipes: no masks at first, then more of them at three steps.
Waveforms, which have no feature axis, get the time masks alone.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SpecAugmentOptions:
    """How much is masked.

    Attributes:
        schedule_steps: Training steps at which masking begins, grows and reaches its full strength.
        max_time_mask_s: Longest time mask.
        seconds_per_time_mask: One more time mask for each so many seconds of audio, in each phase of the schedule.
        max_feature_mask_share: Widest feature mask, as a share of the features.
    """

    schedule_steps: tuple[int, int, int] = (5_000, 15_000, 25_000)
    max_time_mask_s: float = 0.2
    seconds_per_time_mask: float = 1.0
    max_feature_mask_share: float = 0.2

    def __post_init__(self) -> None:
        steps = self.schedule_steps
        if len(steps) != 3 or list(steps) != sorted(steps):
            raise ValueError(f"schedule_steps: expected three steps in order, got {steps}.")
        for name in ("max_time_mask_s", "seconds_per_time_mask"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number of seconds, got {getattr(self, name)}.")
        if not 0 <= self.max_feature_mask_share <= 1:
            raise ValueError(f"max_feature_mask_share: expected 0 to 1, got {self.max_feature_mask_share}.")

    def time_mask_counts(self, duration_s: float, step: int) -> tuple[int, int]:
        """Smallest and largest number of time masks in audio of this duration at this training step."""
        begun, grown, full = (int(step >= each) for each in self.schedule_steps)
        return grown + full, max(int(duration_s / self.seconds_per_time_mask), 2) * (begun + grown + 2 * full)

    def feature_mask_counts(self, step: int) -> tuple[int, int]:
        """Smallest and largest number of feature masks at this training step."""
        begun, grown, full = (int(step >= each) for each in self.schedule_steps)
        return grown + full, 2 * begun + grown + 2 * full


def spec_augment(
    features: torch.Tensor,
    lens: list[int],
    steps_per_s: float,
    step: int,
    options: SpecAugmentOptions,
    generator: torch.Generator,
    time_axis: int = 1,
) -> torch.Tensor:
    """Features with masked parts set to zero, as transformers' encoders do in their own SpecAugment.

    Args:
        features: Waveforms `[B, S]` or frames `[B, S, F]`, `[B, F, S]`.
        lens: Valid steps of each utterance; masks begin there.
        steps_per_s: Rate of S.
        step: Training step, for the schedule.
        options: How much is masked.
        generator: On the CPU; the same state gives the same masks.
        time_axis: Axis of S.
    """
    time_mask = torch.zeros(features.shape[0], features.shape[time_axis], dtype=torch.bool)  # B, S
    longest = max(1, round(options.max_time_mask_s * steps_per_s))
    for row, length in enumerate(lens):
        counts = options.time_mask_counts(length / steps_per_s, step)
        _mask_spans(time_mask[row], length, counts, longest, generator)
    if features.dim() == 2:
        return features.masked_fill(time_mask.to(features.device), 0.0)
    num_features = features.shape[3 - time_axis]
    feature_mask = torch.zeros(features.shape[0], num_features, dtype=torch.bool)  # B, F
    widest = int(options.max_feature_mask_share * num_features)
    if widest > 0:
        for row in range(len(lens)):
            _mask_spans(feature_mask[row], num_features, options.feature_mask_counts(step), widest, generator)
    mask = time_mask.unsqueeze(3 - time_axis) | feature_mask.unsqueeze(time_axis)
    return features.masked_fill(mask.to(features.device), 0.0)


def _mask_spans(
    mask: torch.Tensor, length: int, counts: tuple[int, int], longest: int, generator: torch.Generator
) -> None:
    """Set a random number of random spans of `mask` [S] within its first `length` places; spans may overlap."""
    number = int(torch.randint(counts[0], counts[1] + 1, (), generator=generator))
    starts = torch.randint(0, max(1, length), (number,), generator=generator).tolist()
    widths = torch.randint(1, longest + 1, (number,), generator=generator).tolist()
    for start, width in zip(starts, widths, strict=True):
        mask[start : min(start + width, length)] = True
