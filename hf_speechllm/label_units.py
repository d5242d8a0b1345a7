"""How CTC labels correspond to LLM tokens.

Shape legend: A = U + 1 label axis of the CTC output (U labels and the blank), V vocabulary of the LLM. A label is an
index into the label axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NONE = -1  # no token for this label, no label for this token


@dataclass(frozen=True, eq=False)
class LabelUnits:
    """One LLM token per CTC label: the same ids (`identical`) or a subset of the vocabulary (`from_token_ids`).

    Attributes:
        blank_id: position of the blank on the label axis.
        label_to_token: [A] int64 token of each label, -1 for the blank.
        token_to_label: [V] int64 label of each token, -1 for a token CTC does not know.
    """

    blank_id: int
    label_to_token: Tensor
    token_to_label: Tensor

    @classmethod
    def identical(cls, num_labels: int, vocab_size: int, blank_id: int) -> LabelUnits:
        """Label i is token i, for all A = `num_labels` positions of the label axis but the blank.

        Raises:
            ValueError: the axis has no label, `blank_id` is off the axis, or a label exceeds the vocabulary.
        """
        if num_labels < 2:
            raise ValueError(f"num_labels: expected at least 2 (one label and the blank), got {num_labels}.")
        if not 0 <= blank_id < num_labels:
            raise ValueError(f"blank_id: expected 0 to {num_labels - 1} (label axis), got {blank_id}.")
        labels = torch.arange(num_labels)
        tokens = labels[labels != blank_id]
        if int(tokens.max()) >= vocab_size:
            raise ValueError(
                f"vocab_size: expected at least {int(tokens.max()) + 1} so that every CTC label is a token, got "
                f"{vocab_size}; if labels and tokens differ, use from_token_ids."
            )
        return cls._build(tokens, labels, vocab_size, blank_id)

    @classmethod
    def from_token_ids(cls, token_ids: Tensor, vocab_size: int, blank_id: int) -> LabelUnits:
        """The labels, in order and with the blank left out, are the tokens `token_ids`.

        Args:
            token_ids: [U] distinct token ids. With the blank last (`blank_id` = U) label i is `token_ids[i]`; with the
                blank first (0) label i is `token_ids[i - 1]`.
            vocab_size: V of the LLM.
            blank_id: 0 to U, the position of the blank on the label axis.

        Raises:
            TypeError: `token_ids` is not an integer tensor.
            ValueError: ids are not 1-D, out of range or repeated, or `blank_id` is off the axis.
        """
        if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
            raise TypeError(f"token_ids: expected an integer tensor, got {token_ids.dtype}.")
        if token_ids.dim() != 1 or token_ids.shape[0] < 1:
            raise ValueError(f"token_ids: expected shape (U,) with at least one label, got {tuple(token_ids.shape)}.")
        num_labels = token_ids.shape[0] + 1
        if not 0 <= blank_id < num_labels:
            raise ValueError(
                f"blank_id: expected 0 to {num_labels - 1} (the {num_labels - 1} labels of token_ids and the blank), "
                f"got {blank_id}."
            )
        return cls._build(token_ids.detach().cpu().long(), torch.arange(num_labels), vocab_size, blank_id)

    @classmethod
    def _build(cls, token_ids: Tensor, label_axis: Tensor, vocab_size: int, blank_id: int) -> LabelUnits:
        """`token_ids` [U] belong to the positions of `label_axis` [A] other than the blank, in order."""
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab_size:
            raise ValueError(
                f"token_ids: expected ids from 0 to {vocab_size - 1} (vocab_size {vocab_size}), got "
                f"{int(token_ids.min())} to {int(token_ids.max())}; is the tokenizer that of the LLM?"
            )
        ids, counts = token_ids.unique(return_counts=True)
        if bool((counts > 1).any()):
            raise ValueError(f"token_ids: expected distinct ids, got {int(ids[counts > 1][0])} more than once.")
        labels = label_axis[label_axis != blank_id]
        label_to_token = torch.full(label_axis.shape, _NONE)
        label_to_token[labels] = token_ids
        token_to_label = torch.full((vocab_size,), _NONE)
        token_to_label[token_ids] = labels
        return cls(blank_id, label_to_token, token_to_label)

    @property
    def num_labels(self) -> int:
        """A, blank included."""
        return self.label_to_token.shape[0]

    def to(self, device: torch.device) -> LabelUnits:
        """Returns the same correspondence with its tables on `device`."""
        if self.label_to_token.device == device:
            return self
        return LabelUnits(self.blank_id, self.label_to_token.to(device), self.token_to_label.to(device))

    def tokens_to_labels(self, ids: Tensor) -> Tensor:
        """Labels of the tokens `ids`, any shape; -1 where CTC has no label, ids outside the vocabulary included."""
        is_known = (ids >= 0) & (ids < self.token_to_label.shape[0])
        return self.token_to_label[torch.where(is_known, ids, 0)].masked_fill(~is_known, _NONE)

    def labels_to_tokens(self, labels: Tensor) -> Tensor:
        """Tokens of the labels, any shape; -1 for the blank. Labels must lie on the label axis."""
        return self.label_to_token[labels]

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raises ValueError if some label's token does not fit a vocabulary of this size."""
        if vocab_size >= self.token_to_label.shape[0]:
            return
        highest = int(self.label_to_token.max())
        if highest >= vocab_size:
            raise ValueError(
                f"vocab_size: expected at least {highest + 1}, since a CTC label stands for token {highest}, got "
                f"{vocab_size}; pass the label_units of this LLM."
            )
