"""Forced alignment against the enumeration of all paths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ctc_reference import collapse
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speechllm.ctc_alignment import AlignedLabel, align, word_times


def random_log_probs(*shape: int, seed: int = 0) -> torch.Tensor:
    return (2.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def best_path(log_probs: torch.Tensor, labels: tuple[int, ...], blank_id: int) -> tuple[float, tuple[int, ...] | None]:
    """The most probable alignment of one utterance [T, A], by enumeration."""
    frames = log_probs.double().tolist()
    paths = itertools.product(range(log_probs.shape[1]), repeat=len(frames))
    scored = (
        (sum(frame[label] for frame, label in zip(frames, path, strict=True)), path)
        for path in paths
        if collapse(path, blank_id) == labels
    )
    return max(scored, default=(-math.inf, None))


def segments(path: tuple[int, ...], log_probs: torch.Tensor, blank_id: int) -> list[AlignedLabel]:
    result, start = [], 0
    for label, run in itertools.groupby(path):
        end = start + len(list(run))
        if label != blank_id:
            probs = [math.exp(float(log_probs[t, label])) for t in range(start, end)]
            result.append(AlignedLabel(label, start, end, sum(probs) / len(probs)))
        start = end
    return result


def assert_same(actual: list[AlignedLabel], expected: list[AlignedLabel]) -> None:
    assert [(x.label, x.start_frame, x.end_frame) for x in actual] == [
        (x.label, x.start_frame, x.end_frame) for x in expected
    ]
    assert [x.confidence for x in actual] == pytest.approx([x.confidence for x in expected], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_frames=st.integers(0, 6),
    blank_id=st.integers(0, 2),
    labels=st.lists(st.integers(0, 2), max_size=4),
)
def test_equals_the_best_of_all_paths(seed: int, num_frames: int, blank_id: int, labels: list[int]) -> None:
    labels = tuple(label for label in labels if label != blank_id)
    log_probs = random_log_probs(1, num_frames, 3, seed=seed)
    _, path = best_path(log_probs[0], labels, blank_id)
    lengths = torch.tensor([num_frames])
    if path is None:
        with pytest.raises(ValueError, match="expected ones that fit"):
            align(log_probs, lengths, [labels], blank_id)
    else:
        (aligned,) = align(log_probs, lengths, [labels], blank_id)
        assert_same(aligned, segments(path, log_probs[0], blank_id))


@pytest.mark.parametrize("seed", range(8))
def test_a_repeated_label_has_a_blank_before_it(seed: int) -> None:
    log_probs = random_log_probs(1, 5, 3, seed=seed)
    log_probs[..., 0] -= 3.0  # a blank is the last choice
    for labels in ((1, 1), (2, 1, 1), (1, 1, 1)):
        (aligned,) = align(log_probs, torch.tensor([5]), [labels], 0)
        assert_same(aligned, segments(best_path(log_probs[0], labels, 0)[1], log_probs[0], 0))
        assert all(
            one.end_frame < other.start_frame for one, other in itertools.pairwise(aligned) if one.label == other.label
        )


def test_batch_equals_single_and_padding_changes_nothing() -> None:
    log_probs, lengths = random_log_probs(3, 9, 4), torch.tensor([9, 4, 0])
    labels = [(1, 1, 2, 3, 1), (2,), ()]
    for b, length in enumerate(lengths.tolist()):
        log_probs[b, length:] = math.nan
    before = log_probs.clone()
    batch = align(log_probs, lengths, labels, 0)
    torch.testing.assert_close(log_probs, before, equal_nan=True, atol=0, rtol=0)
    for b, length in enumerate(lengths.tolist()):
        (single,) = align(log_probs[b : b + 1, :length], lengths[b : b + 1], labels[b : b + 1], 0)
        assert_same(batch[b], single)
    assert batch[2] == [] and len(batch[0]) == 5


def test_padding_after_an_improbable_last_label() -> None:
    """The transcript ends in a label, and without it the audio would be more probable."""
    probs = torch.tensor([0.7, 0.0, 0.3]).repeat(2, 6, 1)
    probs[:, 2] = torch.tensor([0.8, 0.2, 0.0])
    aligned = align(probs.log(), torch.tensor([3, 6]), [[1], [1]], 0)
    assert [(x.start_frame, x.end_frame) for (x,) in aligned] == [(2, 3), (2, 3)]


def test_long_audio_is_exact_in_float32_input() -> None:
    """3000 frames: the labels stand where the posteriors say."""
    where = list(range(10, 3000, 50))
    logits = torch.zeros(1, 3000, 3)
    logits[..., 0] = 8.0
    for i, t in enumerate(where):
        logits[0, t, 1 + i % 2], logits[0, t, 0] = 8.0, 0.0
    (aligned,) = align(logits.log_softmax(-1), torch.tensor([3000]), [[1 + i % 2 for i in range(len(where))]], 0)
    assert [(x.start_frame, x.end_frame) for x in aligned] == [(t, t + 1) for t in where]
    assert all(0.99 < x.confidence <= 1.0 for x in aligned)


def test_excluded_labels_are_avoided_or_refused() -> None:
    log_probs = random_log_probs(1, 3, 3)
    log_probs[0, :2, 1] = -math.inf
    (aligned,) = align(log_probs, torch.tensor([3]), [[1]], 0)
    assert (aligned[0].start_frame, aligned[0].end_frame) == (2, 3)
    log_probs[0, 2, 1] = -math.inf
    with pytest.raises(ValueError, match="probability of 0 for those of utterance 0"):
        align(log_probs, torch.tensor([3]), [[1]], 0)


def test_bad_arguments_are_named() -> None:
    log_probs, lengths = random_log_probs(2, 3, 3), torch.tensor([3, 2])
    for labels, message in (
        ([[1]], "expected one sequence per utterance .2., got 1"),
        ([[1], [3]], "expected 0 to 2 other than the blank 0, got 3 in utterance 1"),
        ([[0], [1]], "other than the blank 0, got 0 in utterance 0"),
        ([[1], [2, 2]], "fit the 2 frames of utterance 1, got 2 labels that need 3"),
    ):
        with pytest.raises(ValueError, match=message):
            align(log_probs, lengths, labels, 0)
    log_probs[1, 1] = math.nan
    with pytest.raises(ValueError, match="got NaN in a valid frame"):
        align(log_probs, lengths, [[1], [2]], 0)
    with pytest.raises(TypeError, match="lengths: expected an integer"):
        align(log_probs, lengths.float(), [[1], [2]], 0)


CHARACTERS = "_ab|"  # blank, letters, delimiter
SUBWORDS = ["_", "▁ab", "c", "▁d", "x▁y", ","]


def spell_characters(labels: tuple[int, ...]) -> str:
    return "".join(CHARACTERS[label] for label in labels).replace("|", " ")


def spell_subwords(labels: tuple[int, ...]) -> str:
    return "".join(SUBWORDS[label] for label in labels).replace("▁", " ").strip()


def labels_at(*spans: tuple[int, int, int, float]) -> list[AlignedLabel]:
    return [AlignedLabel(*span) for span in spans]


def test_words_of_characters() -> None:
    aligned = labels_at((3, 0, 1, 0.5), (1, 2, 4, 0.9), (2, 4, 5, 0.6), (3, 5, 9, 0.1), (1, 9, 10, 0.7))
    first, second = word_times(aligned, spell_characters, seconds_per_frame=0.02)
    assert (first.word, second.word) == ("ab", "a")
    assert (first.start_s, first.end_s, second.start_s, second.end_s) == pytest.approx((0.04, 0.1, 0.18, 0.2))
    assert (first.confidence, second.confidence) == pytest.approx(((2 * 0.9 + 0.6) / 3, 0.7))


def test_words_of_subwords() -> None:
    aligned = labels_at((1, 1, 2, 1.0), (2, 3, 4, 0.5), (3, 6, 7, 1.0), (5, 8, 9, 0.8))
    words = word_times(aligned, spell_subwords, seconds_per_frame=1.0)
    assert [(x.word, x.start_s, x.end_s) for x in words] == [("abc", 1.0, 4.0), ("d,", 6.0, 9.0)]
    assert [x.confidence for x in words] == pytest.approx([0.75, 0.9])


def test_a_label_that_ends_one_word_and_begins_another_belongs_to_both() -> None:
    words = word_times(labels_at((1, 1, 2, 1.0), (4, 3, 5, 0.4)), spell_subwords, seconds_per_frame=1.0)
    assert [(x.word, x.start_s, x.end_s) for x in words] == [("abx", 1.0, 5.0), ("y", 3.0, 5.0)]


def test_no_words() -> None:
    assert word_times([], spell_characters, seconds_per_frame=1.0) == []
    assert word_times(labels_at((3, 0, 1, 1.0)), spell_characters, seconds_per_frame=1.0) == []


def test_bad_arguments_of_word_times_are_named() -> None:
    with pytest.raises(ValueError, match="seconds_per_frame: expected more than 0, got 0.0"):
        word_times([], spell_characters, seconds_per_frame=0.0)
    with pytest.raises(ValueError, match="labels_to_text: expected at least the words 'a'"):
        word_times(labels_at((1, 0, 1, 1.0), (2, 1, 2, 1.0)), lambda ids: "a" * (2 - len(ids)), seconds_per_frame=1.0)
