"""CTCPrefixScorer against enumeration of all alignments, the textbook recursion and F.ctc_loss."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from ctc_reference import exact_prob, label_sequence_probs, prefix_prob, textbook_prefix_log_prob
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speechllm import ctc_emissions, ctc_prefix_score
from hf_speechllm.ctc_prefix_score import KEEP_LABEL, CTCPrefixScorer, CTCPrefixState


def random_log_probs(*shape: int, seed: int = 0, peak: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * peak).log_softmax(-1)


def state_of(scorer: CTCPrefixScorer, prefixes: list[tuple[int, ...]]) -> CTCPrefixState:
    """State of one prefix per row, rows grouped by utterance; shorter prefixes are kept while longer ones grow."""
    state = scorer.init(len(prefixes) // scorer.num_utterances)
    rows = torch.arange(len(prefixes))
    for position in range(max(map(len, prefixes), default=0)):
        labels = [prefix[position] if position < len(prefix) else KEEP_LABEL for prefix in prefixes]
        state = scorer.advance(state, rows, torch.tensor(labels))
    return state


def scores_of(log_probs: torch.Tensor, blank_id: int, prefix: tuple[int, ...], **options) -> tuple:
    """(score, eos, psi) of one prefix of one utterance [T, A]."""
    scorer = CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([log_probs.shape[0]]), blank_id, **options)
    state = state_of(scorer, [prefix])
    return scorer.score(state)[0], scorer.eos(state)[0], state.prefix_log_prob[0]


def all_prefixes(num_labels: int, blank_id: int, max_length: int) -> list[tuple[int, ...]]:
    labels = [label for label in range(num_labels) if label != blank_id]
    return [p for length in range(max_length + 1) for p in itertools.product(labels, repeat=length)]


@pytest.mark.parametrize(("num_frames", "num_labels", "blank_id"), [(1, 3, 2), (4, 3, 0), (5, 4, 1), (6, 3, 2)])
def test_all_prefixes_equal_enumeration(num_frames: int, num_labels: int, blank_id: int) -> None:
    log_probs = random_log_probs(num_frames, num_labels, seed=num_frames)
    prefixes = all_prefixes(num_labels, blank_id, 3)
    scorer = CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([num_frames]), blank_id)
    state = state_of(scorer, prefixes)
    scores, eos = scorer.score(state), scorer.eos(state)
    for row, prefix in enumerate(prefixes):
        assert state.prefix_log_prob[row].exp() == pytest.approx(prefix_prob(log_probs, blank_id, prefix), abs=1e-9)
        assert eos[row].exp() == pytest.approx(exact_prob(log_probs, blank_id, prefix), abs=1e-9)
        for label in range(num_labels):
            expected = 0.0 if label == blank_id else prefix_prob(log_probs, blank_id, (*prefix, label))
            assert scores[row, label].exp() == pytest.approx(expected, abs=1e-9)


def test_prefix_mass_splits_into_continuations_and_end() -> None:
    log_probs = random_log_probs(6, 4)
    for prefix in [(), (1,), (1, 1), (0, 2, 1)]:
        score, eos, psi = scores_of(log_probs, 3, prefix)
        assert torch.logaddexp(score.logsumexp(0), eos) == pytest.approx(float(psi), abs=1e-12)


def test_long_audio_equals_textbook_recursion() -> None:
    log_probs = random_log_probs(300, 8, peak=5.0)
    prefix = tuple(int(label) for label in torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(1)))
    score, eos, psi = scores_of(log_probs, 7, prefix)
    expected_psi, expected_eos = textbook_prefix_log_prob(log_probs, 7, prefix)
    assert float(psi) == pytest.approx(expected_psi, abs=1e-9)
    assert float(eos) == pytest.approx(expected_eos, abs=1e-9)
    for label in range(7):
        expected, _ = textbook_prefix_log_prob(log_probs, 7, (*prefix, label))
        assert float(score[label]) == pytest.approx(expected, abs=1e-9)


def test_eos_equals_ctc_loss() -> None:
    log_probs = random_log_probs(4, 50, 12, seed=3)
    lengths = torch.tensor([50, 31, 12, 40])
    targets = torch.tensor([[1, 1, 2, 3, 3, 3, 11, 5]] * 4)
    scorer = CTCPrefixScorer.from_log_probs(log_probs, lengths, 0)
    eos = scorer.eos(state_of(scorer, [tuple(row) for row in targets.tolist()]))
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), targets, lengths, torch.full((4,), targets.shape[1]), blank=0, reduction="none"
    )
    torch.testing.assert_close(eos, -loss, atol=1e-6, rtol=0)


def test_repeated_label_needs_a_blank_between() -> None:
    # Two frames cannot hold "aa": it would take a, blank, a.
    score, _, _ = scores_of(random_log_probs(2, 3), 2, (0,))
    assert score[0] == -math.inf
    assert score[1] > -math.inf
    # Three frames can in exactly one way.
    log_probs = random_log_probs(3, 3)
    score, _, _ = scores_of(log_probs, 2, (0,))
    assert float(score[0]) == pytest.approx(float(log_probs[0, 0] + log_probs[1, 2] + log_probs[2, 0]), abs=1e-12)


def test_first_step_may_start_at_any_frame() -> None:
    log_probs = random_log_probs(2, 2)
    score, eos, psi = scores_of(log_probs, 1, ())
    probs = log_probs.exp()
    assert float(score[0].exp()) == pytest.approx(float(probs[0, 0] + probs[0, 1] * probs[1, 0]), abs=1e-12)
    assert float(eos.exp()) == pytest.approx(float(probs[0, 1] * probs[1, 1]), abs=1e-12)
    assert psi == 0.0


def test_batch_equals_single_and_padding_changes_nothing() -> None:
    lengths = [9, 4, 1, 0]
    batch = torch.full((4, 12, 5), math.nan, dtype=torch.float64)  # padding must not even be read
    singles = [random_log_probs(length, 5, seed=length) for length in lengths]
    for row, single in enumerate(singles):
        batch[row, : len(single)] = single
    prefixes = [(), (1,), (2, 2, 0)]
    for options in ({}, {"top_k": 3}):
        scorer = CTCPrefixScorer.from_log_probs(batch, torch.tensor(lengths), 4, **options)
        state = state_of(scorer, prefixes * 4)
        score, eos = scorer.score(state), scorer.eos(state)
        candidates = torch.tensor([[0, 1, 2]]).expand(12, -1)
        for utterance, single in enumerate(singles):
            alone = CTCPrefixScorer.from_log_probs(single[None], torch.tensor([len(single)]), 4, **options)
            alone_state = state_of(alone, prefixes)
            rows = slice(3 * utterance, 3 * utterance + 3)
            torch.testing.assert_close(eos[rows], alone.eos(alone_state), rtol=0, atol=1e-12)
            torch.testing.assert_close(score[rows], alone.score(alone_state), rtol=0, atol=1e-12)
            torch.testing.assert_close(
                scorer.score_candidates(state, candidates)[rows],
                alone.score_candidates(alone_state, candidates[rows]),
                rtol=0,
                atol=1e-12,
            )


def test_caller_tensor_is_not_modified() -> None:
    log_probs = random_log_probs(2, 6, 4)
    log_probs[0, 2, 1] = -math.inf
    before = log_probs.clone()
    scorer = CTCPrefixScorer.from_log_probs(log_probs, torch.tensor([6, 3]), 0)
    scorer.score(state_of(scorer, [(1, 2), (3,)]))
    assert torch.equal(log_probs, before)


def test_advance_selects_permutes_and_repeats_parents() -> None:
    scorer = CTCPrefixScorer.from_log_probs(random_log_probs(2, 8, 5), torch.tensor([8, 6]), 0)
    state = state_of(scorer, [(1,), (2,), (3,), (1, 2), (4,), (2, 2)])  # 3 beams each
    # From 3 to 4 beams: permuted, one parent twice, one dropped, one kept.
    parent, label = torch.tensor([2, 0, 0, 2, 5, 3, 3, 4]), torch.tensor([1, 1, 2, KEEP_LABEL, 2, 4, 1, 3])
    got = scorer.advance(state, parent, label)
    want = state_of(scorer, [(3, 1), (1, 1), (1, 2), (3,), (2, 2, 2), (1, 2, 4), (1, 2, 1), (4, 3)])
    for name in ("log_prob", "prefix_log_prob", "repeat_log_prob", "last_label"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-12)
    torch.testing.assert_close(scorer.score(got), scorer.score(want), rtol=0, atol=1e-12)


def test_keep_label_copies_the_state_exactly() -> None:
    scorer = CTCPrefixScorer.from_log_probs(random_log_probs(1, 8, 5), torch.tensor([8]), 0)
    state = state_of(scorer, [(1, 2)])
    kept = scorer.advance(state, torch.tensor([0]), torch.tensor([KEEP_LABEL]))
    assert torch.equal(kept.log_prob, state.log_prob)
    assert torch.equal(kept.prefix_log_prob, state.prefix_log_prob)
    assert torch.equal(kept.repeat_log_prob, state.repeat_log_prob)
    assert kept.last_label.tolist() == [2]


def test_state_is_frozen() -> None:
    scorer = CTCPrefixScorer.from_log_probs(random_log_probs(1, 4, 3), torch.tensor([4]), 0)
    with pytest.raises(FrozenInstanceError):
        scorer.init(1).last_label = torch.tensor([1])


@pytest.mark.parametrize("num_candidates", [0, 1, 3, 40])  # by columns, and by the full product
def test_candidates_equal_full_scores(num_candidates: int) -> None:
    scorer = CTCPrefixScorer.from_log_probs(random_log_probs(2, 10, 30), torch.tensor([10, 7]), 29)
    state = state_of(scorer, [(1,), (), (4, 4), (28,)])
    labels = torch.randint(0, 29, (4, num_candidates), generator=torch.Generator().manual_seed(0))
    if num_candidates:
        labels[0, 0], labels[2, 0] = 1, 4  # repeats
    want = scorer.score(state).gather(1, labels)
    torch.testing.assert_close(scorer.score_candidates(state, labels), want, rtol=0, atol=1e-12)
    labels[:, -1:] = torch.tensor([[29], [-1], [29], [-1]])
    assert (scorer.score_candidates(state, labels)[:, -1:] == -math.inf).all()


@pytest.mark.parametrize("all_per_label", [0, 9, 99])  # as asked for; copied for candidates; at once
def test_fetched_labels_equal_full_scores(all_per_label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctc_emissions, "_ALL_PER_LABEL", all_per_label)
    log_probs, lengths = random_log_probs(3, 9, 60, seed=8), torch.tensor([9, 9, 5])
    log_probs[0, :, 11] = -math.inf
    log_probs[2, 5:] = math.nan
    log_probs = log_probs[:, :, :50]  # not contiguous
    scorer = CTCPrefixScorer.from_log_probs(log_probs, lengths, 7)
    other = CTCPrefixScorer.from_log_probs(log_probs, lengths, 7)
    state = scorer.advance(scorer.init(2), torch.arange(6), torch.tensor([49, 8, 8, 9, 0, 1]))
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        candidates = torch.randint(-1, 50, (6, 3), generator=generator)
        candidates[:, 0] = state.last_label
        candidates[1, 1] = 7  # the blank
        with torch.inference_mode(step % 2 == 0):  # rows copied in one mode serve the other
            got = scorer.score_candidates(state, candidates)
        want = other.score(state).gather(1, candidates.clamp(min=0)).masked_fill(candidates < 0, -math.inf)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        label = torch.randint(8, 50, (6,), generator=generator)
        label[3] = max(int(state.last_label[3]), 8)  # a repeated label
        state = scorer.advance(state, torch.arange(6), label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_far_from_the_search_are_left_out_without_effect(dtype: torch.dtype, monkeypatch) -> None:
    log_probs = random_log_probs(2, 90, 12, seed=3, peak=1.0)
    log_probs[:, :, 0] += 6.0  # mostly blank
    for frame, label in zip(range(4, 90, 9), itertools.cycle((1, 2, 3)), strict=False):
        log_probs[:, frame, label] += 40.0
    log_probs = log_probs.log_softmax(-1).to(dtype)
    lengths = torch.tensor([90, 70])
    whole = CTCPrefixScorer.from_log_probs(log_probs, lengths, 0)
    state = state_of(whole, [(1, 2, 3, 1, 2), (1, 2, 3), (1, 2, 3, 1), (1,) * 70])  # the last one is impossible
    candidates = torch.arange(4, 6).expand(4, -1)
    want, want_few = whole.score(state), whole.score_candidates(state, candidates)
    monkeypatch.setattr(ctc_prefix_score, "_LONG_FRAMES", 0)
    for top_k in (None, 11):
        scorer = CTCPrefixScorer.from_log_probs(log_probs, lengths, 0, top_k=top_k)
        used = scorer._time_weights(state)[1]
        assert dtype == torch.float64 or used.stop - used.start < 80
        got = scorer.score(state)
        torch.testing.assert_close(got, want[:, -got.shape[1] :], rtol=0, atol=1e-5)
        torch.testing.assert_close(scorer.score_candidates(state, candidates), want_few, rtol=0, atol=1e-5)
    monkeypatch.undo()
    short = CTCPrefixScorer.from_log_probs(random_log_probs(1, 6, 4).to(dtype), torch.tensor([6]), 0)
    states = [state_of(short, [prefix]) for prefix in [(), (1,), (1, 2, 3)]]
    want = [short.score(state) for state in states]
    monkeypatch.setattr(ctc_prefix_score, "_LONG_FRAMES", 0)
    for state, scores in zip(states, want, strict=True):  # the first and the last frame matter
        torch.testing.assert_close(short.score(state), scores, rtol=0, atol=1e-6)
    impossible = whole.init(1)
    for _ in range(91):
        impossible = whole.advance(impossible, torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert (whole.score(impossible) == -math.inf).all()  # no frame matters


def test_all_labels_are_copied_once_and_only_if_many_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = CTCPrefixScorer.from_log_probs(random_log_probs(2, 9, 500), torch.tensor([9, 9]), 0)
    emissions = scorer._emissions
    few, many = torch.tensor([[5, 5, 6], [5, 8, -1]]), torch.arange(400).expand(2, -1)
    monkeypatch.setattr(ctc_emissions, "_ALL_PER_LABEL", 40)
    fetched = emissions.log_probs(few)
    assert emissions._rows is None
    emissions.log_probs(many)
    rows = emissions._rows
    torch.testing.assert_close(emissions.log_probs(few), fetched, rtol=0, atol=0)
    assert emissions._rows is rows


@pytest.mark.parametrize("num_candidates", [1, 12])
def test_top_k_scores_equal_full_scores(num_candidates: int) -> None:
    log_probs, lengths = random_log_probs(2, 10, 12, seed=5), torch.tensor([10, 6])
    log_probs[:, 1, 0] = 0.0  # label 0 is in the subset, so "no label" must not be read as 0
    full = CTCPrefixScorer.from_log_probs(log_probs, lengths, 3)
    subset = CTCPrefixScorer.from_log_probs(log_probs, lengths, 3, top_k=5)
    assert full.labels is None
    assert subset.labels.shape == (2, 5)
    first, second = subset.labels[0].tolist(), subset.labels[1].tolist()
    prefixes = [(), (first[0],), (first[1], first[1]), (), (second[4],), (second[2], second[0])]
    full_state, subset_state = state_of(full, prefixes), state_of(subset, prefixes)
    rows = subset.labels.repeat_interleave(3, 0)
    want = full.score(full_state)
    torch.testing.assert_close(subset.score(subset_state), want.gather(1, rows), rtol=0, atol=1e-12)
    torch.testing.assert_close(subset.eos(subset_state), full.eos(full_state), rtol=0, atol=1e-12)
    # Candidates keep their meaning as labels; those outside the subset are impossible.
    candidates = torch.arange(12)[None].expand(6, -1)[:, :num_candidates]
    inside = (candidates[:, :, None] == rows[:, None]).any(2)
    got = subset.score_candidates(subset_state, candidates)
    torch.testing.assert_close(got, want[:, :num_candidates].masked_fill(~inside, -math.inf), rtol=0, atol=1e-12)
    assert (subset.score_candidates(subset_state, torch.full((6, num_candidates), -1)) == -math.inf).all()


def test_top_k_takes_the_maximum_over_valid_frames() -> None:
    # Label 0 is said once and clearly, 1 and 2 hum throughout, 3 is loud in padding only; the blank 4 is loudest.
    probs = torch.tensor([[[0.001, 0.08, 0.1, 0.0001, 0.8]] * 20])
    probs[0, 3] = torch.tensor([0.9, 0.02, 0.02, 0.0001, 0.05])
    probs[0, 15:] = torch.tensor([0.001, 0.001, 0.001, 0.99, 0.001])
    scorer = CTCPrefixScorer.from_log_probs(probs.log(), torch.tensor([15]), 4, top_k=2)
    assert scorer.labels.tolist() == [[0, 2]]
    everything = CTCPrefixScorer.from_log_probs(probs.log(), torch.tensor([15]), 4, top_k=99)
    assert everything.labels.tolist() == [[0, 1, 2, 3]]


def test_label_outside_the_subset_costs_the_floor_and_stays_finite() -> None:
    log_probs = random_log_probs(6, 5)
    scorer = CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([6]), 4, top_k=1)
    inside = int(scorer.labels[0, 0])
    outside = (inside + 1) % 4
    state = state_of(scorer, [(outside,)])
    assert float(state.prefix_log_prob) == pytest.approx(-1e4, abs=20)
    assert not scorer.score(state).isnan().any()
    assert (scorer.score_candidates(state, torch.tensor([[outside]])) == -math.inf).all()  # not even as a repetition
    state = scorer.advance(state, torch.tensor([0]), torch.tensor([inside]))
    assert scorer.eos(state).isfinite().all()


def test_impossible_emissions_do_not_poison_the_state() -> None:
    log_probs = random_log_probs(6, 4)
    log_probs[2:5, 0] = -math.inf
    log_probs[:, 1] = -math.inf
    log_probs[3, 3] = -math.inf  # the blank
    log_probs = log_probs.log_softmax(-1)
    for prefix in [(), (0,), (2, 0), (2, 2)]:
        score, eos, psi = scores_of(log_probs, 3, prefix)
        assert float(psi.exp()) == pytest.approx(prefix_prob(log_probs, 3, prefix), abs=1e-9)
        assert float(eos.exp()) == pytest.approx(exact_prob(log_probs, 3, prefix), abs=1e-9)
        assert score[1] == -math.inf
        assert float(score[2].exp()) == pytest.approx(prefix_prob(log_probs, 3, (*prefix, 2)), abs=1e-9)
    score, eos, psi = scores_of(log_probs, 3, (1, 0))
    assert torch.isfinite(torch.stack((eos, psi))).all()
    assert not score.isnan().any()


def test_prefix_longer_than_the_audio_is_impossible() -> None:
    score, eos, psi = scores_of(random_log_probs(2, 4), 3, (0, 1, 2))
    assert psi == eos == -math.inf
    assert (score == -math.inf).all()


@pytest.mark.parametrize("num_frames", [0, 3])  # no frames at all, or padding only
@pytest.mark.parametrize("top_k", [None, 2])
def test_no_audio_allows_only_the_empty_hypothesis(num_frames: int, top_k: int | None) -> None:
    scorer = CTCPrefixScorer.from_log_probs(torch.zeros(1, num_frames, 4), torch.tensor([0]), 3, top_k=top_k)
    state = scorer.init(2)
    assert scorer.eos(state).tolist() == [0.0, 0.0]
    assert (scorer.score(state) == -math.inf).all()
    state = scorer.advance(state, torch.tensor([0, 1]), torch.tensor([1, KEEP_LABEL]))
    assert scorer.eos(state).tolist() == [-math.inf, 0.0]
    assert (scorer.score(state) == -math.inf).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05 * 30)])
def test_half_and_single_precision_input(dtype: torch.dtype, tolerance: float) -> None:
    log_probs = random_log_probs(30, 6, peak=4.0)
    prefix = (1, 2, 2, 4, 0)
    score, eos, psi = scores_of(log_probs.to(dtype), 5, prefix)
    assert score.dtype == eos.dtype == psi.dtype == torch.float64
    expected_psi, expected_eos = textbook_prefix_log_prob(log_probs, 5, prefix)
    assert float(psi) == pytest.approx(expected_psi, abs=tolerance)
    assert float(eos) == pytest.approx(expected_eos, abs=tolerance)
    # Against the same rounded input the result is exact: the state, not the input, must be double precision.
    rounded_psi, rounded_eos = textbook_prefix_log_prob(log_probs.to(dtype), 5, prefix)
    assert float(psi) == pytest.approx(rounded_psi, abs=1e-9)
    assert float(eos) == pytest.approx(rounded_eos, abs=1e-9)


@pytest.mark.parametrize("num_candidates", [2, 40])
def test_products_of_single_precision_input_are_within_1e_5(num_candidates: int) -> None:
    log_probs = random_log_probs(1, 1500, 40, seed=4, peak=3.0).float()
    lengths, labels = torch.tensor([1500]), torch.randint(1, 40, (30,), generator=torch.Generator().manual_seed(1))
    single = CTCPrefixScorer.from_log_probs(log_probs, lengths, 0)
    double = CTCPrefixScorer.from_log_probs(log_probs.double(), lengths, 0)
    candidates = torch.arange(40)[None, -num_candidates:]
    state = single.init(1)
    for label in labels:
        state = single.advance(state, torch.tensor([0]), label[None])
        want = double.score(state)
        assert not (single.score(state) - want)[:, 1:].abs().max() > 1e-5
        assert not (single.score_candidates(state, candidates) - want[:, candidates[0]])[:, 1:].abs().max() > 1e-5


@pytest.mark.parametrize(("dtype", "depth"), [(torch.float32, 80.0), (torch.float64, 690.0)])
def test_improbable_labels_keep_a_score_down_to_the_documented_depth(dtype: torch.dtype, depth: float) -> None:
    log_probs = torch.full((1, 3, 4), -depth - 100.0, dtype=dtype)
    log_probs[0, :, 0] = 0.0
    log_probs[0, 1, 1] = 1.0 - depth
    scorer = CTCPrefixScorer.from_log_probs(log_probs, torch.tensor([3]), 0)
    score = scorer.score(scorer.init(1))[0]
    assert float(score[1]) == pytest.approx(1.0 - depth, abs=1e-4)
    assert score[2] == -math.inf
    assert scorer.score_candidates(scorer.init(1), torch.tensor([[1]]))[0, 0] == pytest.approx(float(score[1]))


@pytest.mark.parametrize("num_frames", [120, 300])
def test_weights_whose_products_would_be_subnormal_are_left_out(num_frames: int) -> None:
    log_probs = random_log_probs(1, num_frames, 6, seed=2, peak=3.0)
    log_probs[:, :, 0] += 3.0
    log_probs = log_probs.log_softmax(-1)
    lengths = torch.tensor([num_frames])
    single, double = (CTCPrefixScorer.from_log_probs(each, lengths, 0) for each in (log_probs.float(), log_probs))
    state = state_of(double, [(1, 2, 3, 1, 2, 4, 5)])
    weights, _, log_scale = single._time_weights(state)
    exact = (state.log_prob[:, :-1] - log_scale).exp()
    assert ((exact > 0.0) & (exact < 2.0**-100)).any(), "nothing to leave out"
    assert weights[weights > 0.0].min() >= 2.0**-100
    want = double.score(state)[:, 1:]
    assert (want > float(log_scale) - 50.0).all()
    torch.testing.assert_close(single.score(state)[:, 1:], want, rtol=0, atol=1e-5)


def test_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctc_prefix_score, "_state_dtype", lambda device: torch.float32)
    log_probs = random_log_probs(250, 8, peak=5.0).float()
    prefix = tuple(range(7)) * 4
    score, eos, psi = scores_of(log_probs, 7, prefix)
    assert score.dtype == eos.dtype == torch.float32
    expected_psi, expected_eos = textbook_prefix_log_prob(log_probs, 7, prefix)
    assert float(psi) == pytest.approx(expected_psi, abs=1e-3)
    assert float(eos) == pytest.approx(expected_eos, abs=1e-3)


@pytest.mark.parametrize("num_frames", [1, 2, 7, 64, 100])
def test_both_scans_equal_a_loop(num_frames: int) -> None:
    arrival, emission = random_log_probs(1, 3, num_frames, seed=1), random_log_probs(1, 3, num_frames, seed=2)
    arrival[0, 0] = -math.inf
    level = torch.full((1, 3), -math.inf, dtype=torch.float64)
    want = []
    for t in range(num_frames):
        level = torch.logaddexp(level + emission[:, :, t], arrival[:, :, t])
        want.append(level)
    want = torch.stack(want, 2)
    got = ctc_prefix_score._scan(arrival, emission, emission.cumsum(2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    single = ctc_prefix_score._scan(arrival.float(), emission.float(), emission.float().cumsum(2))
    torch.testing.assert_close(single, want.float(), rtol=1e-5, atol=1e-4)


def test_float64_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ctc_prefix_score._state_dtype(torch.device("cpu")) == torch.float64

    def refuse(*args, **kwargs) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert ctc_prefix_score._state_dtype(torch.device("cpu")) == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    num_frames=st.integers(1, 5),
    num_labels=st.integers(2, 4),
    blank=st.integers(0, 3),
    seed=st.integers(0, 10_000),
    peak=st.sampled_from([0.0, 1.0, 6.0, 40.0]),
    padding=st.integers(0, 3),
    prefix=st.lists(st.integers(0, 3), max_size=7),  # may be longer than the audio
)
def test_any_posteriors_equal_enumeration(num_frames, num_labels, blank, seed, peak, padding, prefix) -> None:
    blank_id = blank % num_labels
    labels = [label for label in range(num_labels) if label != blank_id]
    prefix = tuple(labels[label % len(labels)] for label in prefix)
    log_probs = random_log_probs(num_frames, num_labels, seed=seed, peak=peak)
    padded = F.pad(log_probs, (0, 0, 0, padding), value=math.inf)[None]
    scorer = CTCPrefixScorer.from_log_probs(padded, torch.tensor([num_frames]), blank_id)
    state = state_of(scorer, [prefix])
    assert float(state.prefix_log_prob.exp()) == pytest.approx(prefix_prob(log_probs, blank_id, prefix), abs=1e-9)
    assert float(scorer.eos(state).exp()) == pytest.approx(exact_prob(log_probs, blank_id, prefix), abs=1e-9)
    score = scorer.score(state)[0]
    assert not score.isnan().any()
    for label in labels:
        assert float(score[label].exp()) == pytest.approx(prefix_prob(log_probs, blank_id, (*prefix, label)), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(num_frames=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_prefix_probability_never_grows(num_frames: int, seed: int) -> None:
    log_probs = random_log_probs(1, num_frames, 6, seed=seed)
    scorer = CTCPrefixScorer.from_log_probs(log_probs, torch.tensor([num_frames]), 0)
    state = scorer.init(4)
    labels = torch.randint(1, 6, (8, 4), generator=torch.Generator().manual_seed(seed))
    for label in labels:
        scores = scorer.score(state)
        assert (scores <= state.prefix_log_prob[:, None] + 1e-9).all()
        assert (scorer.eos(state) <= state.prefix_log_prob + 1e-9).all()
        predicted = scores.gather(1, label[:, None]).squeeze(1)
        state = scorer.advance(state, torch.arange(4), label)
        torch.testing.assert_close(state.prefix_log_prob, predicted, rtol=0, atol=1e-9)


def test_all_blank_audio_is_the_empty_transcript() -> None:
    log_probs = torch.full((8, 3), -math.inf, dtype=torch.float64)
    log_probs[:, 1] = 0.0
    score, eos, _ = scores_of(log_probs, 1, ())
    assert eos == 0.0
    assert (score == -math.inf).all()
    assert label_sequence_probs(log_probs, 1)[()] == 1.0


def log_probs_and_lengths() -> tuple[torch.Tensor, torch.Tensor]:
    return random_log_probs(2, 5, 4), torch.tensor([5, 3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, n: (x.long(), n, 0), TypeError, r"log_probs: expected a floating-point tensor, got torch.int64"),
        (lambda x, n: (x[0], n, 0), ValueError, r"log_probs: expected shape \(B, T, U\+1\).*got \(5, 4\)"),
        (lambda x, n: (x[:0], n[:0], 0), ValueError, r"log_probs: expected shape.*got \(0, 5, 4\)"),
        (lambda x, n: (x[:, :, :1], n, 0), ValueError, r"log_probs: expected shape.*got \(2, 5, 1\)"),
        (lambda x, n: (x, n.float(), 0), TypeError, r"lengths: expected an integer tensor.*got torch.float32"),
        (lambda x, n: (x, n > 3, 0), TypeError, r"lengths: expected an integer tensor.*got torch.bool"),
        (lambda x, n: (x, n[:1], 0), ValueError, r"lengths: expected shape \(2,\).*got \(1,\)"),
        (lambda x, n: (x, n[:, None], 0), ValueError, r"lengths: expected shape \(B,\).*got \(2, 1\)"),
        (lambda x, n: (x, n + 1, 0), ValueError, r"lengths: expected 0 to 5 frames.*got 4 to 6"),
        (lambda x, n: (x, n - 4, 0), ValueError, r"lengths: expected at least 0 frames, got -1 to 1"),
        (lambda x, n: (x, n, 4), ValueError, r"blank_id: expected 0 to 3.*got 4"),
        (lambda x, n: (x, n, -1), ValueError, r"blank_id: expected 0 to 3.*got -1"),
        (lambda x, n: (x, n, 0, 0), ValueError, r"top_k: expected at least 1, or None.*got 0"),
    ],
)
def test_input_errors(change, error: type[Exception], message: str) -> None:
    log_probs, lengths, blank_id, *top_k = change(*log_probs_and_lengths())
    with pytest.raises(error, match=message):
        CTCPrefixScorer.from_log_probs(log_probs, lengths, blank_id, top_k=top_k[0] if top_k else None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_are_located(value: float) -> None:
    log_probs, lengths = log_probs_and_lengths()
    log_probs[1, 2, 3] = value
    with pytest.raises(
        ValueError, match=rf"log_probs: expected log-probabilities, got {value} in utterance 1, frame 2"
    ):
        CTCPrefixScorer.from_log_probs(log_probs, lengths, 0)
    CTCPrefixScorer.from_log_probs(log_probs, torch.tensor([5, 2]), 0)  # the same frame as padding is fine


@pytest.mark.parametrize(
    ("parent", "label", "message"),
    [
        ([0, 1, 2], [1, 1, 1], r"parent, label: expected two 1-D tensors of one length.*got \(3,\) and \(3,\)"),
        ([0, 1, 2, 3], [1, 1], r"parent, label: .*got \(4,\) and \(2,\)"),
        ([[0, 1], [2, 3]], [[1, 1], [1, 1]], r"parent, label: .*got \(2, 2\) and \(2, 2\)"),
        ([0, 1, 0, 3], [1, 1, 1, 1], r"parent: expected rows 2 to 3 at position 2 \(same utterance\), got 0"),
        ([0, -1, 2, 3], [1, 1, 1, 1], r"parent: expected rows 0 to 1 at position 1.*got -1"),
        ([0, 1, 2, 4], [1, 1, 1, 1], r"parent: expected rows 2 to 3 at position 3.*got 4"),
        (
            [0, 1, 2, 3],
            [1, 0, 1, 1],
            r"label: expected -1 \(keep\) or a label from 0 to 3 other than the blank 0 .*got 0",
        ),
        ([0, 1, 2, 3], [1, 1, 4, 1], r"label: expected .* at position 2, got 4"),
        ([0, 1, 2, 3], [1, 1, 1, -2], r"label: expected .* at position 3, got -2"),
    ],
)
def test_advance_errors(parent: list, label: list, message: str) -> None:
    scorer = CTCPrefixScorer.from_log_probs(*log_probs_and_lengths(), 0)
    with pytest.raises(ValueError, match=message):
        scorer.advance(scorer.init(2), torch.tensor(parent), torch.tensor(label))


def test_other_errors() -> None:
    scorer = CTCPrefixScorer.from_log_probs(*log_probs_and_lengths(), 0)
    with pytest.raises(ValueError, match=r"num_beams: expected at least 1, got 0"):
        scorer.init(0)
    state = scorer.init(2)
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, C\).*got \(2, 1\)"):
        scorer.score_candidates(state, torch.tensor([[1], [1]]))
    with pytest.raises(ValueError, match=r"labels: expected values from -1 to 3.*got 1 to 4"):
        scorer.score_candidates(state, torch.tensor([[1], [1], [4], [1]]))
    shorter = CTCPrefixScorer.from_log_probs(random_log_probs(2, 3, 4), torch.tensor([3, 3]), 0)
    odd = CTCPrefixScorer.from_log_probs(random_log_probs(3, 5, 4), torch.tensor([5, 5, 5]), 0)
    for method in (shorter.score, shorter.eos, odd.score, odd.eos):
        with pytest.raises(ValueError, match=r"state: expected a multiple of .* use states made by this scorer"):
            method(state)
