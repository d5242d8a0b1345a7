"""What a logits processor must know about beams: which hypothesis of the previous step each row continues.

Shape legend: N rows of `input_ids` (utterances times beams), W their width, M generated tokens of a row, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class TrackedRows(Generic[State]):
    """What one call leaves for the next.

    Attributes:
        ids: [N, W] the rows it saw.
        prompt_width: columns of `ids` that were there at the first call.
        is_finished: [N] bool, EOS is among the generated tokens.
        state: of the N hypotheses.
    """

    ids: Tensor
    prompt_width: int
    is_finished: Tensor
    state: State


class RowTrackingProcessor(LogitsProcessor, ABC, Generic[State]):
    """A logits processor that keeps a state per hypothesis through any `generate`: greedy, sampling, beam search.

    The state depends on nothing but the generated tokens up to EOS and, where there are several groups, on the group of
    the row. Columns that are there at the first call are the prompt, of which the state knows nothing.

    transformers does not tell processors which beams survived. Either the model's `_reorder_cache` calls
    `reorder(beam_idx)`, or parents are found by comparing `input_ids` with the previous call's rows of the same group.
    Both are exact: rows with the same tokens have the same state. "recompute" rebuilds every state from its tokens at
    each call, which is slow and serves as the reference.

    Args:
        eos_token_id: the id or ids that end a hypothesis, as in `generate`.
        parents: "auto" or "recompute".
        num_groups: rows belong, in order, to so many groups of equal size that have nothing in common.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        eos_token_id: int | list[int] | Tensor,
        parents: Literal["auto", "recompute"],
        num_groups: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if parents not in ("auto", "recompute"):
            raise ValueError(f'parents: expected "auto" or "recompute", got {parents!r}.')
        eos_token_ids = torch.as_tensor(eos_token_id, device=device).reshape(-1)
        if eos_token_ids.numel() == 0 or eos_token_ids.is_floating_point() or int(eos_token_ids.min()) < 0:
            raise ValueError(f"eos_token_id: expected one or more token ids, got {eos_token_id}.")
        self.eos_token_ids = eos_token_ids
        self._highest_eos = int(eos_token_ids.max())  # kept here: reading it from the device would wait for it
        self.parents = parents
        self._num_groups = num_groups
        self._step: TrackedRows[State] | None = None
        self._parent: Tensor | None = None

    @abstractmethod
    def _start(self, num_rows: int) -> State:
        """The state of `num_rows` empty hypotheses."""

    @abstractmethod
    def _extend(self, state: State, parent: Tensor, tokens: Tensor, num_tokens: Tensor) -> State:
        """The state of rows `parent` [N] followed by the first `num_tokens` [N] of `tokens` [N, M], 0 to M."""

    def reorder(self, beam_idx: Tensor) -> None:
        """Announces the parents of the next call's rows: call it from the model's `_reorder_cache`.

        Args:
            beam_idx: [N] flat row of the previous call that each row of the next one continues.
        """
        self._parent = beam_idx

    def reset(self) -> None:
        """Forgets the hypotheses: the next call is the first of a new `generate`."""
        self._step, self._parent = None, None

    def _track(self, input_ids: Tensor) -> State:
        """The state of the rows [N, W] of a call.

        Raises:
            ValueError: they do not continue those of the previous call.
        """
        self._step, self._parent = self._next_step(input_ids), None
        return self._step.state

    def _next_step(self, input_ids: Tensor) -> TrackedRows[State]:
        last = self._step
        num_rows, width = input_ids.shape
        if last is None or width <= last.prompt_width:
            return self._replay(input_ids, width)
        seen = last.ids.shape[1]
        if num_rows == last.ids.shape[0]:
            if width == seen + 1:
                if self.parents == "recompute":
                    return self._replay(input_ids, last.prompt_width)
                parent = self._match(last.ids, input_ids) if self._parent is None else self._parent.to(input_ids.device)
                if torch.equal(last.ids[parent], input_ids[:, :-1]):
                    return self._continue(last, parent, input_ids)
            # Speculative decoding steps back after a rejected draft.
            elif width <= seen and torch.equal(last.ids[:, : width - 1], input_ids[:, :-1]):
                return self._replay(input_ids, last.prompt_width)
        raise ValueError(
            f"input_ids: expected rows that continue the previous call's {tuple(last.ids.shape)} by one token (prompt "
            f"of {last.prompt_width}), got {tuple(input_ids.shape)} that do not; call reset() before a new generate, "
            "and build a new processor for other audio."
        )

    def _continue(self, last: TrackedRows[State], parent: Tensor, input_ids: Tensor) -> TrackedRows[State]:
        """One token more; `parent` [N] are rows of `last`."""
        is_finished = last.is_finished[parent] | self._is_eos(input_ids[:, -1])
        # EOS and the padding after it, which may be anything, are no part of a hypothesis.
        state = self._extend(last.state, parent, input_ids[:, -1:], (~is_finished).long())
        return TrackedRows(input_ids.clone(), last.prompt_width, is_finished, state)

    def _replay(self, input_ids: Tensor, prompt_width: int) -> TrackedRows[State]:
        """The step of `input_ids`, from the empty hypothesis."""
        generated = input_ids[:, prompt_width:]  # N, M
        num_tokens = (self._is_eos(generated).cumsum(1) == 0).sum(1)
        state = self._start(len(input_ids))
        if generated.shape[1] > 0:
            every_row = torch.arange(len(input_ids), device=input_ids.device)
            state = self._extend(state, every_row, generated, num_tokens)
        return TrackedRows(input_ids.clone(), prompt_width, num_tokens < generated.shape[1], state)

    def _match(self, last_ids: Tensor, input_ids: Tensor) -> Tensor:
        """[N] a row of `last_ids` [N, W-1] in the same group that each row of `input_ids` [N, W] continues.

        Equal rows have equal states, so any of them will do; without one, the result is arbitrary.
        """
        num_rows, width = last_ids.shape
        per_group = num_rows // self._num_groups
        before = last_ids.view(self._num_groups, 1, per_group, width)
        now = input_ids[:, :-1].reshape(self._num_groups, per_group, 1, width)
        place = (before == now).all(-1).int().argmax(-1)  # groups, rows of a group
        return (torch.arange(self._num_groups, device=place.device)[:, None] * per_group + place).flatten()

    def _is_eos(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, self.eos_token_ids.to(tokens.device))

    def _check_eos(self, vocab_size: int) -> None:
        if self._highest_eos >= vocab_size:
            raise ValueError(
                f"eos_token_id: expected ids below the vocabulary size {vocab_size}, got {self.eos_token_ids.tolist()}."
            )
