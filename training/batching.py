"""Batches of utterances of similar duration, bounded in seconds after padding."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

_CLASS_RATIO = 1.1


class HasEpoch(Protocol):
    """A data set that augments anew in every epoch."""

    epoch: int

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch."""


def duration_classes(durations_s: np.ndarray, batch_duration_s: float) -> list[tuple[np.ndarray, int]]:
    """Utterances in classes whose durations differ by a tenth at most, shortest first: (members, how many fit).

    Raises:
        ValueError: If the longest utterance does not fit into a batch.
    """
    durations_s = np.asarray(durations_s, float)
    if len(durations_s) == 0:
        return []
    if durations_s.max() > batch_duration_s:
        raise ValueError(
            f"batch_duration_s must hold the longest utterance ({durations_s.max():.1f} s), got {batch_duration_s}."
        )
    keys = np.floor(np.log(durations_s) / np.log(_CLASS_RATIO)).astype(int)
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]] - 1))
    return [(members, int(batch_duration_s // durations_s[members].max())) for members in np.split(order, starts[1:])]


def plan_batches(
    classes: list[tuple[np.ndarray, int]], rng: np.random.Generator, multiple_of: int = 1
) -> list[list[int]]:
    """Batches of the members of all classes, each once, in random order.

    The number of batches depends on the number of members of each class only.

    Args:
        classes: From [`duration_classes`]; a member may occur several times.
        rng: Of the shuffling.
        multiple_of: The number of batches is made a multiple of this (one for each process) by dividing the fullest
            ones, as far as they hold several utterances.
    """
    batches: list[list[int]] = []
    rest: list[int] = []
    for members, size in classes:
        # What does not fill a batch joins the next longer class.
        rest += rng.permutation(members).tolist()
        full = len(rest) // size * size
        batches += [rest[start : start + size] for start in range(0, full, size)]
        rest = rest[full:]
    if rest:
        batches.append(rest)
    while len(batches) % multiple_of and max(map(len, batches)) > 1:
        fullest = max(range(len(batches)), key=lambda index: len(batches[index]))
        half = len(batches[fullest]) // 2
        batches.append(batches[fullest][half:])
        batches[fullest] = batches[fullest][:half]
    return [batches[index] for index in rng.permutation(len(batches))]


class DurationBatchSampler(Sampler[list[int]]):
    """Batches of utterances of similar duration, shuffled anew every epoch.

    Args:
        durations_s: Of each utterance.
        batch_duration_s: Bound on (number of utterances) * (longest of them).
        dataset: Told the epoch, and asked for it: after a restart accelerate tells the data set alone.
        seed: Of the shuffling.
        repeats: How often each utterance is drawn in an epoch, on average; by default once. Fractions of utterances
            that are alike in this and in duration are drawn in turn: at least one of them, and in each epoch as many.
        num_processes: The number of batches is a multiple of it, so that no process has to repeat some.
    """

    def __init__(
        self,
        durations_s: list[float] | np.ndarray,
        batch_duration_s: float,
        dataset: HasEpoch,
        seed: int = 0,
        repeats: np.ndarray | None = None,
        num_processes: int = 1,
    ):
        self.batch_duration_s = batch_duration_s
        self.dataset = dataset
        self.seed = seed
        self.num_processes = num_processes
        self._repeats = repeats
        self.total_s = float(np.sum(durations_s))
        self._classes = duration_classes(np.asarray(durations_s, float), batch_duration_s)
        self._planned_epoch: int | None = None
        self._batches: list[list[int]] = []

    def set_epoch(self, epoch: int) -> None:
        """Shuffle; the number of batches is that of any epoch, which the Trainer relies on to resume a run."""
        self.dataset.set_epoch(epoch)

    @property
    def batches(self) -> list[list[int]]:
        """Those of the epoch that the data set is in."""
        if self._planned_epoch != self.dataset.epoch:
            self._planned_epoch = self.dataset.epoch
            rng = np.random.default_rng([self.seed, self._planned_epoch])
            classes = [(self._draw(members, rng), size) for members, size in self._classes]
            self._batches = plan_batches(classes, rng, self.num_processes)
        return self._batches

    def _draw(self, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self._repeats is None:
            return members
        drawn = []
        for factor in np.unique(self._repeats[members]):
            alike = members[self._repeats[members] == factor]
            copies, rest = divmod(max(1, round(factor * len(alike))), len(alike))
            drawn += [alike] * copies + [rng.permutation(alike)[:rest]]
        return np.concatenate(drawn)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
