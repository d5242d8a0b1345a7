"""CTCPrefixScorer.from_head: the scorer of a CTC head that runs a few frames at a time."""

from __future__ import annotations

import math

import pytest
import torch
from test_ctc_prefix_score import log_probs_and_lengths, random_log_probs

from hf_speechllm.ctc_prefix_score import CTCPrefixScorer


class RecordingHead:
    """A CTC head that keeps the sizes of what it returned."""

    def __init__(self, log_probs: torch.Tensor) -> None:
        self.log_probs = log_probs
        self.calls: list[tuple[int, int]] = []

    def __call__(self, start: int, end: int) -> torch.Tensor:
        self.calls.append((start, end))
        return self.log_probs[:, start:end].clone()


def contents_of(scorer: CTCPrefixScorer) -> dict:
    """All that a scorer and its emissions hold."""
    contents = {**vars(scorer), **vars(scorer._emissions)}
    del contents["_emissions"]
    return contents


@pytest.mark.parametrize("chunk_frames", [1, 4, 7, 50])
@pytest.mark.parametrize("lengths", [[10, 6], [3, 10], [0, 9], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_head_in_chunks_makes_the_same_scorer(chunk_frames: int, lengths: list[int], dtype: torch.dtype) -> None:
    log_probs = random_log_probs(2, 12, 30, seed=6).to(dtype)
    for row, length in enumerate(lengths):
        log_probs[row, length:] = math.nan
    head = RecordingHead(log_probs)
    got = CTCPrefixScorer.from_head(head, torch.tensor(lengths), 3, top_k=5, chunk_frames=chunk_frames)
    want = CTCPrefixScorer.from_log_probs(log_probs, torch.tensor(lengths), 3, top_k=5)
    for name, value in contents_of(want).items():
        other = contents_of(got)[name]
        if isinstance(value, torch.Tensor):
            assert other.dtype == value.dtype, name
            torch.testing.assert_close(other, value, rtol=0, atol=0, equal_nan=True)
        else:
            assert other == value, name
    assert max(end for _, end in head.calls) == max(lengths)  # padding of all utterances is not even computed


def test_head_in_chunks_never_sees_all_frames_and_labels() -> None:
    num_labels = 2000
    log_probs = random_log_probs(2, 64, num_labels, seed=1).float()
    head = RecordingHead(log_probs)
    scorer = CTCPrefixScorer.from_head(head, torch.tensor([64, 50]), 0, top_k=16, chunk_frames=8)
    assert head.calls == [(start, start + 8) for start in range(0, 64, 8)] * 2  # two passes
    state = scorer.advance(scorer.init(2), torch.arange(4), scorer.labels[:, :2].flatten())
    scorer.score(state)
    # The storages: a view of a chunk would keep it alive.
    storages = [v.untyped_storage() for v in contents_of(scorer).values() if isinstance(v, torch.Tensor)]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}.values()
    # Rows of labels [B, A + 1], log-probs and probabilities [B, T, 16] and [T], blanks, their sums, padding, labels
    # [B, 16].
    num_values = 2 * 64 * 16
    assert sum(kept) == 2 * 2001 * 8 + 2 * 4 * num_values + 4 * 64 + 2 * (64 * (8 + 1) + 65 * 8) + 2 * 16 * 8
    assert sum(kept) < log_probs.nbytes / 15


def test_head_runs_without_gradients() -> None:
    weight = torch.randn(3, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    scorer = CTCPrefixScorer.from_head(
        lambda start, end: (hidden[:, start:end] @ weight).log_softmax(-1), torch.tensor([6]), 0, top_k=2
    )
    assert not scorer.score(scorer.init(1)).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_k": 0}, ValueError, r"top_k: expected at least 1.*got 0"),
        ({"chunk_frames": 0}, ValueError, r"chunk_frames: expected at least 1, got 0"),
        ({"blank_id": 4}, ValueError, r"blank_id: expected 0 to 3.*got 4"),
        ({"lengths": torch.tensor([5.0, 3.0])}, TypeError, r"lengths: expected an integer tensor"),
        ({"lengths": torch.tensor([5, -3])}, ValueError, r"lengths: expected at least 0 frames, got -3 to 5"),
        ({"lengths": torch.tensor(5)}, ValueError, r"lengths: expected shape \(B,\)"),
        ({"lengths": torch.tensor([9, 5])}, ValueError, r"log_prob_fn: expected shape \(2, 3, 4\) for frames 3 to 6"),
        ({"lengths": torch.tensor([5])}, ValueError, r"log_prob_fn: expected shape \(1, 3, U\+1\) .*got \(2, 3, 4\)"),
        ({"log_prob_fn": lambda s, e: torch.zeros(2, e - s, 1)}, ValueError, r"log_prob_fn: .*got \(2, 3, 1\)"),
        ({"log_prob_fn": lambda s, e: torch.zeros(2, e - s, 4 + s)}, ValueError, r"\(2, 2, 4\).*got \(2, 2, 7\)"),
        ({"log_prob_fn": lambda s, e: torch.zeros(2, e - s, 4).long()}, TypeError, r"log_prob_fn: .*got torch.int64"),
    ],
)
def test_head_errors(changes: dict, error: type[Exception], message: str) -> None:
    log_probs, lengths = log_probs_and_lengths()
    arguments = {"log_prob_fn": RecordingHead(log_probs), "lengths": lengths, "blank_id": 0, "top_k": 2}
    with pytest.raises(error, match=message):
        CTCPrefixScorer.from_head(**(arguments | {"chunk_frames": 3} | changes))


def test_bad_values_of_a_head_are_located() -> None:
    log_probs, lengths = log_probs_and_lengths()
    log_probs[0, 4, 1] = math.nan
    with pytest.raises(ValueError, match=r"got nan in utterance 0, frame 4"):
        CTCPrefixScorer.from_head(RecordingHead(log_probs), lengths, 0, top_k=2, chunk_frames=2)
