"""Correspondence of CTC labels and LLM tokens."""

from __future__ import annotations

import pytest
import torch

from hf_speechllm.label_units import LabelUnits


@pytest.mark.parametrize(("blank_id", "label_to_token"), [(3, [7, 2, 5, -1]), (0, [-1, 7, 2, 5]), (1, [7, -1, 2, 5])])
def test_subset_skips_the_blank(blank_id: int, label_to_token: list[int]) -> None:
    units = LabelUnits.from_token_ids(torch.tensor([7, 2, 5]), vocab_size=9, blank_id=blank_id)
    assert units.num_labels == 4
    assert units.labels_to_tokens(torch.arange(4)).tolist() == label_to_token
    labels = units.tokens_to_labels(torch.arange(9))
    assert [int(label) for label in labels[[7, 2, 5]]] == [i for i in range(4) if i != blank_id]
    assert (labels[[0, 1, 3, 4, 6, 8]] == -1).all()


def test_tokens_to_labels_takes_any_shape_and_foreign_ids() -> None:
    units = LabelUnits.from_token_ids(torch.tensor([0, 2]), vocab_size=3, blank_id=2)
    assert units.tokens_to_labels(torch.tensor([[0, 1], [2, 3], [-1, 100]])).tolist() == [[0, -1], [1, -1], [-1, -1]]


@pytest.mark.parametrize("blank_id", [0, 2, 4])
def test_identical_ids(blank_id: int) -> None:
    units = LabelUnits.identical(num_labels=5, vocab_size=6, blank_id=blank_id)
    labels = [label for label in range(5) if label != blank_id]
    assert units.labels_to_tokens(torch.tensor(labels)).tolist() == labels
    assert units.tokens_to_labels(torch.tensor(labels)).tolist() == labels
    assert units.tokens_to_labels(torch.tensor([blank_id, 5])).tolist() == [-1, -1]


def test_to_keeps_the_correspondence() -> None:
    units = LabelUnits.from_token_ids(torch.tensor([5, 4, 1]), vocab_size=6, blank_id=0).to(torch.device("cpu"))
    assert units.labels_to_tokens(torch.tensor([1, 2, 3])).tolist() == [5, 4, 1]
    assert units.blank_id == 0


@pytest.mark.parametrize(
    ("token_ids", "blank_id", "error", "message"),
    [
        (torch.tensor([0.0]), 0, TypeError, r"token_ids: expected an integer tensor, got torch.float32"),
        (torch.tensor([[1]]), 0, ValueError, r"token_ids: expected shape \(U,\).*got \(1, 1\)"),
        (torch.tensor([], dtype=torch.long), 0, ValueError, r"token_ids: expected shape \(U,\).*got \(0,\)"),
        (torch.tensor([1, 9]), 0, ValueError, r"token_ids: expected ids from 0 to 8 .*got 1 to 9"),
        (torch.tensor([-1, 2]), 0, ValueError, r"token_ids: expected ids from 0 to 8 .*got -1 to 2"),
        (torch.tensor([1, 2, 1]), 0, ValueError, r"token_ids: expected distinct ids, got 1 more than once"),
        (torch.tensor([1, 2]), 3, ValueError, r"blank_id: expected 0 to 2 \(the 2 labels .*got 3"),
        (torch.tensor([1, 2]), -1, ValueError, r"blank_id: expected 0 to 2 .*got -1"),
    ],
)
def test_subset_errors(token_ids: torch.Tensor, blank_id: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LabelUnits.from_token_ids(token_ids, vocab_size=9, blank_id=blank_id)


def test_identical_errors() -> None:
    with pytest.raises(ValueError, match=r"num_labels: expected at least 2.*got 1"):
        LabelUnits.identical(num_labels=1, vocab_size=6, blank_id=0)
    with pytest.raises(ValueError, match=r"blank_id: expected 0 to 4 \(label axis\), got 5"):
        LabelUnits.identical(num_labels=5, vocab_size=6, blank_id=5)
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 4 .*got 3; .*from_token_ids"):
        LabelUnits.identical(num_labels=5, vocab_size=3, blank_id=4)


def test_vocabulary_too_small() -> None:
    units = LabelUnits.from_token_ids(torch.tensor([5, 1]), vocab_size=6, blank_id=0)
    units.check_vocab_size(6)
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 6, .*token 5, got 5"):
        units.check_vocab_size(5)
