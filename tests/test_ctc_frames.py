"""merge_blank_frames against enumeration of all alignments and the scores of the unmerged frames."""

from __future__ import annotations

import math

import pytest
import torch
from ctc_reference import exact_prob, label_sequence_probs, prefix_prob, textbook_prefix_log_prob
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speechllm.ctc_frames import merge_blank_frames

BLANK = 2


def frames(*probs: list[float]) -> torch.Tensor:
    """One utterance [1, T, A] from probabilities."""
    return torch.tensor([probs], dtype=torch.float64).log()


def peaky_log_probs(seed: int) -> tuple[torch.Tensor, list[int]]:
    """[96, 10] posteriors with a label every 8 frames, blank 0 between them, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(96, 10, generator=generator, dtype=torch.float64)
    logits[:, 0] += 9.0
    labels = torch.randint(1, 10, (12,), generator=generator)
    logits[torch.arange(12) * 8 + 3, labels] += 13.0
    logits[torch.arange(12) * 8 + 4, labels] += 9.0
    return logits.log_softmax(-1), labels.tolist()


LABEL = [0.5, 0.3, 0.2]
SILENCE = [[0.004, 0.001, 0.995], [0.001, 0.002, 0.997], [0.002, 0.003, 0.995], [0.001, 0.003, 0.996]]


def test_merged_frame_is_the_formula() -> None:
    log_probs = frames(LABEL, *SILENCE, LABEL)
    merged, lengths, frame_map = merge_blank_frames(log_probs, torch.tensor([6]), BLANK)
    assert lengths.tolist() == [5]
    assert frame_map.tolist() == [[0, 1, 2, 2, 3, 4]]  # the edges of the run stay
    kept = [0, 1, 4, 5]
    assert torch.equal(merged[0, [0, 1, 3, 4]], log_probs[0, kept])
    silent = 0.997 * 0.995
    want = [silent * (0.001 / 0.997 + 0.002 / 0.995), silent * (0.002 / 0.997 + 0.003 / 0.995), silent]
    torch.testing.assert_close(merged[0, 2].exp(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_silence_at_the_ends_of_the_audio_merges_entirely() -> None:
    log_probs = frames(*SILENCE[:3], LABEL, *SILENCE[:3])
    _, lengths, frame_map = merge_blank_frames(log_probs, torch.tensor([7]), BLANK)
    assert lengths.tolist() == [5]
    assert frame_map.tolist() == [[0, 0, 1, 2, 3, 4, 4]]
    merged, lengths, frame_map = merge_blank_frames(frames(*SILENCE), torch.tensor([4]), BLANK)
    assert lengths.tolist() == [1]
    assert frame_map.tolist() == [[0, 0, 0, 0]]
    assert float(merged[0, 0, BLANK]) == pytest.approx(math.log(0.995 * 0.997 * 0.995 * 0.996), abs=1e-12)


@pytest.mark.parametrize("run", [1, 2, 3])
def test_short_runs_are_unchanged(run: int) -> None:
    log_probs = frames(LABEL, *SILENCE[:run], LABEL)
    merged, lengths, frame_map = merge_blank_frames(log_probs, torch.tensor([run + 2]), BLANK)
    assert torch.equal(merged, log_probs)
    assert lengths.tolist() == [run + 2]
    assert frame_map.tolist() == [list(range(run + 2))]


def test_threshold_above_one_changes_nothing() -> None:
    certain = torch.full((1, 5, 3), -math.inf)
    certain[:, :, BLANK] = 0.0
    merged, lengths, _ = merge_blank_frames(certain, torch.tensor([5]), BLANK, threshold=1.001)
    assert torch.equal(merged, certain)
    assert lengths.tolist() == [5]
    merged, lengths, _ = merge_blank_frames(certain, torch.tensor([5]), BLANK, threshold=1.0)
    assert lengths.tolist() == [1]
    assert merged[0, 0].tolist() == [-math.inf, -math.inf, 0.0]  # no NaN


def test_only_alignments_with_two_labels_in_a_run_are_lost() -> None:
    log_probs = frames(LABEL, *SILENCE, LABEL)[0]
    merged, _, _ = merge_blank_frames(log_probs[None], torch.tensor([6]), BLANK)
    sequences = label_sequence_probs(merged[0], BLANK)
    total = math.fsum(sequences.values())
    assert 1.0 - 2 * 0.005**2 < total < 1.0
    for labels, prob in label_sequence_probs(log_probs, BLANK).items():
        if len(labels) <= 3:
            assert sequences.get(labels, 0.0) == pytest.approx(prob, abs=2 * 0.005**2)
    # Labels said once, and a repeat with one half in the run: their first-order terms are all there.
    for labels in [(0,), (1, 0), (0, 0), (1, 1, 0), (0, 1)]:
        assert exact_prob(merged[0], BLANK, labels) == pytest.approx(exact_prob(log_probs, BLANK, labels), rel=4e-3)
        assert prefix_prob(merged[0], BLANK, labels) == pytest.approx(prefix_prob(log_probs, BLANK, labels), rel=4e-3)


@pytest.mark.parametrize(("threshold", "tolerance", "most_frames"), [(0.99, 0.003, 90), (0.95, 0.02, 62)])
def test_margins_between_hypotheses_stay(threshold: float, tolerance: float, most_frames: int) -> None:
    for seed in range(3):
        log_probs, labels = peaky_log_probs(seed)
        merged, lengths, _ = merge_blank_frames(log_probs[None], torch.tensor([96]), 0, threshold)
        assert lengths.tolist() == [merged.shape[1]]
        assert merged.shape[1] <= most_frames
        other = labels[5] % 9 + 1
        hypotheses = [
            labels,
            [*labels[:5], other, *labels[6:]],  # substitution
            labels[:5] + labels[6:],  # deletion
            [*labels[:5], other, *labels[5:]],  # insertion
            [*labels[:5], labels[4], *labels[5:]],  # repeat
            labels[:7],
        ]
        want = torch.tensor([textbook_prefix_log_prob(log_probs, 0, tuple(labels)) for labels in hypotheses])
        got = torch.tensor([textbook_prefix_log_prob(merged[0], 0, tuple(labels)) for labels in hypotheses])
        assert ((got - got[0]) - (want - want[0])).abs().max() <= tolerance


def test_batch_equals_single_and_padding_changes_nothing() -> None:
    lengths = [96, 50, 3, 0]
    batch = torch.full((4, 100, 10), math.nan, dtype=torch.float64)
    singles = [peaky_log_probs(seed)[0][:length] for seed, length in enumerate(lengths)]
    for row, single in enumerate(singles):
        batch[row, : len(single)] = single
    before = batch.clone()
    merged, new_lengths, frame_map = merge_blank_frames(batch, torch.tensor(lengths), 0, 0.95)
    assert torch.equal(batch.nan_to_num(7.0), before.nan_to_num(7.0))
    assert merged.shape == (4, int(new_lengths.max()), 10)
    for row, single in enumerate(singles):
        alone, alone_length, alone_map = merge_blank_frames(single[None], torch.tensor([len(single)]), 0, 0.95)
        assert new_lengths[row] == alone_length[0]
        assert torch.equal(merged[row, : new_lengths[row]], alone[0, : alone_length[0]])
        assert torch.equal(frame_map[row, : len(single)], alone_map[0])
        assert (frame_map[row, len(single) :] == -1).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_precision_of_long_runs(dtype: torch.dtype, tolerance: float) -> None:
    probs = torch.tensor([0.002, 0.002, 0.996], dtype=torch.float64).expand(1, 2000, -1)
    log_probs = probs.log().to(dtype)
    merged, _, _ = merge_blank_frames(log_probs, torch.tensor([2000]), BLANK)
    want, _, _ = merge_blank_frames(log_probs.double(), torch.tensor([2000]), BLANK)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), want, rtol=tolerance, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    num_frames=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    peak=st.sampled_from([1.0, 6.0, 200.0]),
    threshold=st.sampled_from([0.3, 0.9, 0.99, 1.0]),
)
def test_frames_map_in_order_and_keep_their_blank(num_frames: int, seed: int, peak: float, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = (torch.randn(1, num_frames, 3, generator=generator, dtype=torch.float64) * peak).log_softmax(-1)
    merged, lengths, frame_map = merge_blank_frames(log_probs, torch.tensor([num_frames]), BLANK, threshold)
    assert not merged.isnan().any()
    assert frame_map[0, 0] == 0
    assert frame_map[0, -1] == lengths[0] - 1 == merged.shape[1] - 1
    assert set(frame_map[0].diff().tolist()) <= {0, 1}
    silent = torch.zeros(merged.shape[1], dtype=torch.float64).index_add(0, frame_map[0], log_probs[0, :, BLANK])
    torch.testing.assert_close(merged[0, :, BLANK], silent, rtol=1e-12, atol=1e-12)
    assert (merged.logsumexp(2) <= 1e-9).all()  # never more mass than before
    shared = frame_map[0].bincount()[frame_map[0]] > 1
    assert (log_probs[0, shared, BLANK] >= math.log(threshold)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, n: (x.long(), n, 0), TypeError, r"log_probs: expected a floating-point tensor"),
        (lambda x, n: (x, n + 1, 0), ValueError, r"lengths: expected 0 to 5 frames"),
        (lambda x, n: (x, n, 3), ValueError, r"blank_id: expected 0 to 2.*got 3"),
        (lambda x, n: (x, n, 0, 0.0), ValueError, r"threshold: expected a blank probability above 0 .*got 0.0"),
        (lambda x, n: (x, n, 0, math.nan), ValueError, r"threshold: expected a blank probability above 0 .*got nan"),
    ],
)
def test_input_errors(change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge_blank_frames(*change(torch.zeros(2, 5, 3), torch.tensor([5, 3])))
