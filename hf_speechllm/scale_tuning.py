"""Scales of rescoring and fusion: the ones with the fewest word errors on N-best lists of development data.

Shape legend: B utterances, K hypotheses per utterance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hypothesis import Hypothesis
from .metrics import word_errors
from .rescoring import texts_of


@dataclass(frozen=True)
class ScaleChoice:
    """What `tune_scales` found; the scales are the arguments of `rescore_nbest` of the same names.

    Attributes:
        lm_weight: scale of the language model.
        prior_weight: scale of the prior.
        length_reward: nats per token.
        wer: word error rate with these scales on the lists they were tuned on, as a fraction.
    """

    lm_weight: float
    prior_weight: float
    length_reward: float
    wer: float


def tune_scales(
    nbests: Sequence[Sequence[Hypothesis]],
    references: Sequence[str],
    *,
    lm_weights: Sequence[float],
    prior_weights: Sequence[float],
    length_rewards: Sequence[float],
    normalize: Callable[[str], str] | None = None,
) -> ScaleChoice:
    """Finds the scales with the fewest word errors on fixed N-best lists, without any model.

    All combinations are tried, then once more around the best one, half-way to its neighbours in each grid. Of equal
    ones the smaller language-model weight wins, then the smaller prior weight, then the smaller reward (absolute). Use
    lists of development data: the WER found is optimistic.

    Args:
        nbests: per utterance a list of at least one hypothesis with text and all its scores, as from `rescore_nbest`.
        references: what was said, one per utterance.
        lm_weights: values to try, at least one.
        prior_weights: values to try, at least one; [0.0] without prior.
        length_rewards: values to try, at least one; [0.0] for none.
        normalize: applied to both sides before words are compared, such as `metrics.normalize_english`.

    Raises:
        ValueError: lengths differ, a list or grid is empty, a hypothesis has no text or a score that is not finite, or
            the references have no word.
    """
    grids = []
    for name, grid in (
        ("lm_weights", lm_weights),
        ("prior_weights", prior_weights),
        ("length_rewards", length_rewards),
    ):
        if not grid or not all(math.isfinite(value) for value in grid):
            raise ValueError(f"{name}: expected at least one finite value to try, got {list(grid)}.")
        grids.append(sorted(set(grid)))
    errors, num_words = _error_table(nbests, references, normalize)
    scores = _ScoreTable.from_nbests(nbests)

    def best_of(points: Iterator[tuple[float, float, float]]) -> tuple[int, tuple[float, float, float]]:
        counted = ((int(errors.gather(1, scores.best(point)).sum()), point) for point in points)
        return min(counted, key=lambda entry: (entry[0], *(abs(value) for value in entry[1])))

    _, coarse = best_of(itertools.product(*grids))
    finer = [_around(grid, value) for grid, value in zip(grids, coarse, strict=True)]
    num_errors, (lm_weight, prior_weight, length_reward) = best_of(itertools.product(*finer))
    return ScaleChoice(lm_weight, prior_weight, length_reward, num_errors / num_words)


@dataclass(frozen=True, eq=False)
class _ScoreTable:
    """The separate scores of N-best lists, [B, K] float64 each; -inf in `am` where a list is shorter."""

    am: Tensor
    lm: Tensor
    prior: Tensor
    num_tokens: Tensor

    @classmethod
    def from_nbests(cls, nbests: Sequence[Sequence[Hypothesis]]) -> _ScoreTable:
        def column(name: str, padding: float) -> Tensor:
            rows = [torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64) for rows in nbests]
            for index, row in enumerate(rows):
                if not bool(row.isfinite().all()):
                    raise ValueError(f"nbests: expected finite {name}, got {row.tolist()} in utterance {index}.")
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

        return cls(
            am=column("am_log_prob", -math.inf),
            lm=column("lm_log_prob", 0.0),
            prior=column("prior_log_prob", 0.0),
            num_tokens=column("num_tokens", 0.0),
        )

    def best(self, scales: tuple[float, float, float]) -> Tensor:
        """[B, 1] the hypothesis of each utterance that `rescore_nbest` would put first."""
        lm_weight, prior_weight, length_reward = scales
        score = self.am + length_reward * self.num_tokens + lm_weight * self.lm - prior_weight * self.prior
        return score.argmax(1, keepdim=True)


def _error_table(
    nbests: Sequence[Sequence[Hypothesis]], references: Sequence[str], normalize: Callable[[str], str] | None
) -> tuple[Tensor, int]:
    """Word errors [B, K] of every hypothesis, each distinct one aligned once, and the number of reference words."""
    if len(nbests) != len(references):
        raise ValueError(f"references: expected one per N-best list ({len(nbests)}), got {len(references)}.")
    normalized: dict[str, str] = {}

    def normal(text: str) -> str:
        if text not in normalized:
            normalized[text] = text if normalize is None else normalize(text)
        return normalized[text]

    table, num_words = [], 0
    for index, (rows, reference) in enumerate(zip(nbests, references, strict=True)):
        if not rows:
            raise ValueError(f"nbests: expected at least one hypothesis per utterance, got none for utterance {index}.")
        texts = [normal(text) for text in texts_of(rows, "nbests")]
        counts = {text: word_errors([normal(reference)], [text]) for text in set(texts)}
        num_words += counts[texts[0]].reference_words
        errors = {text: count.substitutions + count.deletions + count.insertions for text, count in counts.items()}
        table.append(torch.tensor([errors[text] for text in texts]))
    if num_words == 0:
        raise ValueError("references: expected at least one word in all references together, got none.")
    return torch.nn.utils.rnn.pad_sequence(table, batch_first=True), num_words


def _around(grid: list[float], value: float) -> list[float]:
    """`value` and the points half-way to its neighbours in the sorted `grid`."""
    place = grid.index(value)
    neighbours = grid[max(0, place - 1) : place + 2]
    return sorted({value, *((value + neighbour) / 2 for neighbour in neighbours)})
