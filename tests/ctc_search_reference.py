"""Time-synchronous CTC beam search written with dictionaries, one hypothesis at a time, and a language model for it.

Shares no code with the library's search. Hypotheses are tuples of labels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

Labels = tuple[int, ...]

BLANK, DELIMITER = 0, 3
CHARACTERS = ["", "a", "b", " "]  # of labels 0 to 3


def spell(labels: Labels) -> str:
    return "".join(CHARACTERS[label] for label in labels)


@dataclass(frozen=True)
class HistoryState:
    histories: list[Labels]
    next_log_probs: torch.Tensor  # N, V
    token_log_prob: torch.Tensor  # N

    def __len__(self) -> int:
        return len(self.histories)


class HistoryLM:
    """A language model with the protocol of `CausalLMScorer`: each history has another random distribution.

    Tokens 1 to 6 are letters: those of a at the start of a word and within one, the same for b; 0 is EOS.
    """

    vocab_size = 7
    eos_token_id = 0

    def __init__(self, spread: float = 2.0) -> None:
        self.spread = spread
        self.calls: list[int] = []  # rows with tokens, of each advance that had any

    def log_probs(self, history: Labels) -> list[float]:
        draw = random.Random(repr(history))
        logits = torch.tensor([draw.gauss(0.0, self.spread) for _ in range(self.vocab_size)], dtype=torch.float64)
        return logits.log_softmax(0).tolist()

    def tokenize(self, text: str) -> list[int]:
        return [1 + 2 * "ab".index(c) + (i > 0) for word in text.split() for i, c in enumerate(word)]

    def log_prob(self, tokens: Labels, *, eos: bool) -> float:
        tokens = (*tokens, self.eos_token_id) if eos else tokens
        return math.fsum(self.log_probs(tokens[:i])[token] for i, token in enumerate(tokens))

    def score(self, token_ids: list[list[int]], *, include_eos: bool = True) -> torch.Tensor:
        return torch.tensor([self.log_prob(tuple(ids), eos=include_eos) for ids in token_ids], dtype=torch.float64)

    def start(self, num_rows: int) -> HistoryState:
        return self._state([()] * num_rows, [0.0] * num_rows)

    def advance(
        self, state: HistoryState, parent: torch.Tensor, tokens: torch.Tensor, num_tokens: torch.Tensor
    ) -> HistoryState:
        histories, gained = [], []
        for p, row, count in zip(parent.tolist(), tokens.tolist(), num_tokens.tolist(), strict=True):
            histories.append((*state.histories[p], *row[:count]))
            gained.append(self.log_prob(histories[-1], eos=False) - self.log_prob(state.histories[p], eos=False))
        if int(num_tokens.sum()):
            self.calls.append(int((num_tokens > 0).sum()))
        return self._state(histories, gained)

    def _state(self, histories: list[Labels], gained: list[float]) -> HistoryState:
        next_log_probs = torch.tensor([self.log_probs(history) for history in histories])
        return HistoryState(histories, next_log_probs, torch.tensor(gained, dtype=torch.float64))


@dataclass(frozen=True)
class Reference:
    """The search; `bonus_of` scores the converted part of a hypothesis, `start_bonus` a label after a hypothesis.

    `is_due` says after which frames (counted from 1) `bonus_of` is asked.
    """

    beam_size: int
    top_k: int
    sums: bool = True
    start_bonus: Callable[[Labels, int], float] = lambda labels, label: 0.0
    bonus_of: Callable[[Labels], float] | None = None
    is_due: Callable[[int], bool] = lambda frame: False

    def __call__(self, log_probs: torch.Tensor) -> dict[Labels, float]:
        """The CTC log-prob of each hypothesis that is in the beam at the end; `log_probs` is [T, A], blank 0."""
        beam: dict[Labels, tuple[float, float]] = {(): (0.0, -math.inf)}  # ends in blank, in a label
        bonus = {(): 0.0}
        for t, frame in enumerate(log_probs.double().tolist(), start=1):
            top = sorted(range(1, len(frame)), key=lambda label: -frame[label])[: self.top_k]
            longer: dict[Labels, tuple[float, float]] = {}
            new_bonus = {}

            def add(labels: Labels, blank: float, label: float, extra: float, longer=longer, new_bonus=new_bonus):
                old = longer.get(labels, (-math.inf, -math.inf))
                longer[labels] = (self.join(old[0], blank), self.join(old[1], label))
                new_bonus[labels] = extra

            for labels, (blank, label) in beam.items():
                total = self.join(blank, label)
                stay = label + frame[labels[-1]] if labels else -math.inf
                add(labels, total + frame[BLANK], stay, bonus[labels])
                for c in range(1, len(frame)):
                    new = (*labels, c)
                    if c in top or new in beam:
                        before = blank if labels and labels[-1] == c else total
                        extra = bonus[new] if new in beam else bonus[labels] + self.start_bonus(labels, c)
                        add(new, -math.inf, before + frame[c], extra)
            ranked = sorted(longer, key=lambda labels: -self.join(*longer[labels]) - new_bonus[labels])
            beam = {labels: longer[labels] for labels in ranked[: self.beam_size]}
            beam = {labels: scores for labels, scores in beam.items() if max(scores) > -math.inf}
            bonus = new_bonus
            if self.is_due(t):
                bonus = {labels: self.bonus_of(labels) for labels in beam}
        return {labels: self.join(*scores) for labels, scores in beam.items()}

    def join(self, one: float, other: float) -> float:
        high, low = max(one, other), min(one, other)
        return high + math.log1p(math.exp(low - high)) if self.sums and low > -math.inf else high
