"""Texts as rows of tokens for a causal language model: several in a row, or one.

Texts that share a row do not see each other: their positions begin anew, by which transformers tells them apart.

Shape legend: B rows, L tokens of the longest row.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hf_speechllm.processing_speechllm import IGNORE_INDEX

_MAX_DIFFERENCE = 1e-3


class PackedTexts(Dataset):
    """Rows of texts.

    Args:
        sequences: Token ids of each text, beginning and end included.
        num_start: How many of them are its beginning, which is not predicted.
        max_tokens: Most tokens of a row.
        packing: Put as many texts into a row as fit, in random order; else one.
        seed: Of the order.

    Raises:
        ValueError: If a text is longer than `max_tokens`.
    """

    def __init__(
        self, sequences: list[list[int]], num_start: int, max_tokens: int, *, packing: bool = True, seed: int = 0
    ):
        longest = max(map(len, sequences))
        if longest > max_tokens:
            raise ValueError(f"max_tokens must hold the longest text ({longest} tokens), got {max_tokens}.")
        lens = np.array([len(ids) for ids in sequences])
        # Flat: millions of small lists take much more memory.
        self._tokens = np.fromiter(chain.from_iterable(sequences), np.int32, int(lens.sum()))
        self._ends = lens.cumsum()
        self.num_start = num_start
        self.rows = _pack(lens, max_tokens, np.random.default_rng(seed)) if packing else np.arange(len(lens))[:, None]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`input_ids`, `labels` and `position_ids` of a row, `[L]` each."""
        texts = [self._tokens[self._ends[text - 1] if text else 0 : self._ends[text]] for text in self.rows[index]]
        labels = [np.concatenate([np.full(self.num_start, IGNORE_INDEX), ids[self.num_start :]]) for ids in texts]
        return {
            "input_ids": np.concatenate(texts).astype(np.int64),
            "labels": np.concatenate(labels).astype(np.int64),
            "position_ids": np.concatenate([np.arange(len(ids)) for ids in texts]),
        }


def _pack(lens: np.ndarray, max_tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Texts of each row: in random order, a row as long as the next text fits."""
    rows, first, total = [], 0, 0
    order = rng.permutation(len(lens))
    for place, text in enumerate(order):
        if total + lens[text] > max_tokens:
            rows.append(order[first:place])
            first, total = place, 0
        total += lens[text]
    return [*rows, order[first:]]


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Rows to `[B, L]`, padded on the right.

    Padding needs no mask: a causal model does not look to the right, and it is not predicted. Its positions begin anew
    too, so that it is a text of its own.
    """
    padding = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(row[name]) for row in rows], batch_first=True, padding_value=value
        )
        for name, value in padding.items()
    }
    lens = torch.tensor([len(row["input_ids"]) for row in rows])
    columns = torch.arange(batch["input_ids"].shape[1])
    batch["position_ids"] = torch.where(columns >= lens[:, None], columns - lens[:, None], batch["position_ids"])
    return batch


@torch.no_grad()
def check_packing(model: PreTrainedModel, sequences: list[list[int]], num_start: int) -> None:
    """Make sure that texts in one row do not see each other.

    Args:
        model: Causal language model that keeps no cache (`config.use_cache`).
        sequences: Some texts, at least two.
        num_start: See [`PackedTexts`].

    Raises:
        ValueError: If they do.
    """
    was_training = model.training
    model.eval()
    total = sum(map(len, sequences))
    packed = PackedTexts(sequences, num_start, total)
    alone = PackedTexts(sequences, num_start, total, packing=False)

    def logits(rows: list[dict[str, np.ndarray]]) -> torch.Tensor:
        inputs = {name: values.to(model.device) for name, values in collate(rows).items() if name != "labels"}
        return model(**inputs).logits.float()

    together = logits([packed[0], packed[0]])[0]
    apart = torch.cat([logits([alone[text]])[0] for text in packed.rows[0]])
    model.train(was_training)
    if float((together - apart).abs().max()) > _MAX_DIFFERENCE * float(apart.abs().max()):
        raise ValueError(
            f"data.packing: texts in one row see each other in {type(model).__name__} with attention "
            f"{model.config._attn_implementation!r}; set it to false, or choose another attn_implementation."
        )
