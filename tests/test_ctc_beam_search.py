"""CTC beam search without a language model, against enumeration, F.ctc_loss and a search with dictionaries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ctc_reference import collapse, label_sequence_probs
from ctc_search_reference import HistoryLM, Reference, spell
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_speechllm.ctc_beam_search import ctc_beam_search
from hf_speechllm.hypothesis import Hypothesis
from hf_speechllm.label_units import LabelUnits

WIDE = 320  # more than there are label sequences in the tiny problems


def random_log_probs(*shape: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def search(log_probs: torch.Tensor, lengths: list[int] | None = None, **options) -> list[list[Hypothesis]]:
    """Blank 0, all hypotheses of the beam."""
    if lengths is None:
        lengths = [log_probs.shape[1]] * log_probs.shape[0]
    values = {"blank_id": 0, "beam_size": 16, **options}
    return ctc_beam_search(log_probs, torch.tensor(lengths), **{"n_best": values["beam_size"], **values})


def assert_same(actual: list[Hypothesis], expected: list[Hypothesis], tolerance: float = 1e-9) -> None:
    """Near-ties may change places."""
    assert [x.log_score for x in actual] == pytest.approx([x.log_score for x in expected], abs=tolerance)
    by_labels = {x.labels: x for x in actual}
    assert by_labels.keys() == {x.labels for x in expected}
    for x in expected:
        y = by_labels[x.labels]
        assert (y.text, y.num_tokens) == (x.text, x.num_tokens)
        assert (y.am_log_prob, y.lm_log_prob, y.prior_log_prob, y.log_score) == pytest.approx(
            (x.am_log_prob, x.lm_log_prob, x.prior_log_prob, x.log_score), abs=tolerance
        )


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_frames=st.integers(0, 5),
    blank_id=st.integers(0, 3),
    weights=st.tuples(st.floats(0, 1), st.floats(-2, 2)),
)
def test_wide_beam_equals_enumeration(seed: int, num_frames: int, blank_id: int, weights: tuple[float, float]) -> None:
    prior_weight, length_reward = weights
    log_probs, prior = random_log_probs(1, num_frames, 4, seed=seed), random_log_probs(4, seed=seed + 1)
    expected = []
    for labels, prob in label_sequence_probs(log_probs[0], blank_id).items():
        prior_log_prob = sum(float(prior[label]) for label in labels)
        score = math.log(prob) - prior_weight * prior_log_prob + length_reward * len(labels)
        expected.append(Hypothesis(labels, None, math.log(prob), 0.0, prior_log_prob, len(labels), score))
    expected.sort(key=lambda x: -x.log_score)
    prior[blank_id] = math.nan
    (actual,) = search(
        log_probs,
        blank_id=blank_id,
        beam_size=WIDE,
        prior=prior,
        prior_weight=prior_weight,
        length_reward=length_reward,
    )
    assert_same(actual, expected)


def test_max_recombination_gives_the_best_alignment() -> None:
    log_probs = random_log_probs(1, 5, 4)
    best: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(4), repeat=5):
        labels = collapse(path, 0)
        score = sum(float(log_probs[0, t, label]) for t, label in enumerate(path))
        best[labels] = max(best.get(labels, -math.inf), score)
    (actual,) = search(log_probs, beam_size=WIDE, recombination="max")
    assert {x.labels for x in actual} == best.keys()
    assert all(x.am_log_prob == pytest.approx(best[x.labels], abs=1e-5) for x in actual)
    assert [x.log_score for x in actual] == pytest.approx(sorted(best.values(), reverse=True), abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_frames=st.integers(1, 12),
    beam_size=st.sampled_from([1, 2, 3, 7, 20]),
    top_k=st.integers(1, 4),
    sums=st.booleans(),
    rewards=st.tuples(st.floats(-1, 2), st.floats(0, 1)),
)
def test_pruned_search_equals_dictionaries(seed, num_frames, beam_size, top_k, sums, rewards) -> None:
    length_reward, prior_weight = rewards
    log_probs, prior = random_log_probs(1, num_frames, 5, seed=seed), random_log_probs(5, seed=seed + 1)
    reference = Reference(
        beam_size,
        top_k,
        sums,
        start_bonus=lambda labels, label: length_reward - prior_weight * float(prior[label]),
    )
    expected = reference(log_probs[0])
    (actual,) = search(
        log_probs,
        beam_size=beam_size,
        label_top_k=top_k,
        recombination="sum" if sums else "max",
        prior=prior,
        prior_weight=prior_weight,
        length_reward=length_reward,
    )
    assert {x.labels: pytest.approx(x.am_log_prob, abs=1e-9) for x in actual} == expected


def test_long_audio_equals_dictionaries() -> None:
    """Hypotheses leave the beam, and the same label sequences come back while their children are still in it."""
    log_probs = random_log_probs(1, 120, 4, spread=1.0)
    (actual,) = search(log_probs, beam_size=24)
    expected = Reference(24, 20)(log_probs[0])
    assert {x.labels: pytest.approx(x.am_log_prob, abs=1e-9) for x in actual} == expected


def test_scores_equal_ctc_loss() -> None:
    """40 frames of which three are uncertain: what the beam drops is too improbable to count."""
    log_probs = random_log_probs(1, 40, 6, spread=1.0).double()
    log_probs[0, torch.arange(40), torch.arange(40) * 7 % 11 % 6] += 60.0 * (torch.arange(40) % 13 != 7)
    log_probs = log_probs.log_softmax(-1)
    (hypotheses,) = search(log_probs, beam_size=250, label_top_k=None)
    plausible = [x for x in hypotheses if x.am_log_prob > -12.0]
    assert len(plausible) > 20
    for x in plausible:
        loss = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([x.labels]),
            torch.tensor([40]),
            torch.tensor([len(x.labels)]),
            reduction="sum",
        )
        assert len(x.labels) > 10
        assert x.am_log_prob == pytest.approx(-float(loss), abs=1e-6)


def test_batch_equals_single_and_padding_changes_nothing() -> None:
    log_probs, lengths = random_log_probs(4, 11, 5), [11, 1, 0, 6]
    for b, length in enumerate(lengths):
        log_probs[b, length:] = math.nan
    before = log_probs.clone()
    for recombination, top_k in itertools.product(("sum", "max"), (None, 2)):
        options = {"beam_size": 6, "recombination": recombination, "label_top_k": top_k}
        batch = search(log_probs, lengths, **options)
        for b, length in enumerate(lengths):
            (single,) = search(log_probs[b : b + 1, :length], **options)
            assert_same(batch[b], single)
            assert [x.labels for x in batch[b]] == [x.labels for x in single]
    torch.testing.assert_close(log_probs, before, equal_nan=True, atol=0, rtol=0)


def test_no_frames_give_the_empty_hypothesis() -> None:
    assert search(random_log_probs(2, 3, 4), [0, 0]) == [[Hypothesis((), None, 0.0)]] * 2
    assert search(torch.zeros(1, 0, 4)) == [[Hypothesis((), None, 0.0)]]


def test_labels_that_are_excluded_and_certain_frames() -> None:
    log_probs = torch.full((1, 5, 4), -math.inf)
    for t, label in enumerate((1, 1, 0, 1, 2)):
        log_probs[0, t, label] = 0.0
    assert search(log_probs) == [[Hypothesis((1, 1, 2), None, 0.0, num_tokens=3)]]
    blank = torch.full((1, 5, 4), -math.inf)
    blank[..., 0] = 0.0
    assert search(blank) == [[Hypothesis((), None, 0.0)]]


def test_a_repeated_label_needs_a_blank() -> None:
    log_probs = torch.tensor([[[0.0, 1.0]] * 3]).log()
    assert [x.labels for x in search(log_probs)[0]] == [(1,)]
    log_probs = torch.tensor([[[0.0, 1.0], [0.5, 0.5], [0.0, 1.0]]]).log()
    probs = {x.labels: math.exp(x.am_log_prob) for x in search(log_probs)[0]}
    assert probs == {(1,): pytest.approx(0.5), (1, 1): pytest.approx(0.5)}


def test_sum_and_max_choose_differently() -> None:
    """Nothing at all is the best alignment, but those of one label are more probable together."""
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert search(log_probs, recombination="max")[0][0].labels == ()
    assert search(log_probs, recombination="sum")[0][0].labels == (1,)


def test_prior_and_length_reward_turn_the_answer() -> None:
    log_probs = torch.tensor([[[0.1, 0.5, 0.4]]]).log()
    prior = torch.tensor([1.0, 0.8, 0.2]).log()
    assert search(log_probs)[0][0].labels == (1,)
    assert search(log_probs, prior=prior)[0][0].labels == (1,)
    assert search(log_probs, prior=prior, prior_weight=1.0)[0][0].labels == (2,)
    assert search(log_probs, length_reward=-3.0)[0][0].labels == ()


def test_label_top_k_limits_new_labels_only() -> None:
    """Label 2 goes on in the second frame, and starts there within the beam, though only label 1 may start anew."""
    log_probs = torch.tensor([[[0.1, 0.1, 0.8], [0.05, 0.9, 0.05]]]).log()
    probs = {x.labels: math.exp(x.am_log_prob) for x in search(log_probs, label_top_k=1)[0]}
    assert probs == {
        (): pytest.approx(0.005),
        (1,): pytest.approx(0.09),
        (2,): pytest.approx(0.8 * 0.1 + 0.1 * 0.05),
        (2, 1): pytest.approx(0.72),
    }


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 9])
def test_label_top_k_does_not_count_the_blank(top_k: int) -> None:
    """The same whether the blank is the most or the least probable label."""
    for blank in (5.0, -5.0):
        logits = torch.tensor([[[blank, 1.0, 2.0, 3.0, 4.0]]])
        labels = {x.labels for x in search(logits.log_softmax(-1), label_top_k=top_k)[0]}
        assert labels == {(), *[(label,) for label in (4, 3, 2, 1)[:top_k]]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    log_probs = random_log_probs(2, 8, 5).to(dtype)
    assert search(log_probs) == search(log_probs.double())


def test_text_and_n_best() -> None:
    log_probs = random_log_probs(1, 4, 4)
    (full,) = search(log_probs, labels_to_text=spell)
    assert all(x.text == " ".join(spell(x.labels).split()) for x in full)
    assert search(log_probs, labels_to_text=spell, n_best=3) == [full[:3]]
    assert ctc_beam_search(log_probs, torch.tensor([4]), blank_id=0)[0][0].labels == full[0].labels


def test_bad_arguments_are_named() -> None:
    log_probs = random_log_probs(2, 3, 4)
    lm, units = HistoryLM(), LabelUnits.from_token_ids(torch.tensor([1, 2, 3]), 7, 0)
    label = {"fusion": "label", "lm": lm, "label_units": units}
    delayed = {"fusion": "delayed", "lm": lm, "labels_to_text": spell}
    prior = torch.zeros(4)
    for options, message in (
        ({"beam_size": 0, "n_best": 1}, "beam_size: expected at least 1, got 0"),
        ({"n_best": 17}, "n_best: expected 1 to 16 .beam_size., got 17"),
        ({"n_best": 0}, "n_best: expected 1 to 16"),
        ({"label_top_k": 0}, "label_top_k: expected at least 1, or None for all labels, got 0"),
        ({"recombination": "mean"}, "recombination: expected one of .'max', 'sum'., got 'mean'"),
        ({"fusion": "deep"}, "fusion: expected .* got 'deep'"),
        ({"lm": lm}, 'lm, lm_weight: expected none for fusion "none"'),
        ({"lm_weight": 0.5}, 'lm, lm_weight: expected none for fusion "none"'),
        ({**label, "lm": None}, 'lm: expected a language model for fusion "label", got None'),
        ({**label, "label_units": None}, "label_units: expected them"),
        ({**delayed, "label_units": units}, "label_units: expected them"),
        ({**delayed, "labels_to_text": None}, "labels_to_text: expected a callable"),
        ({**delayed, "interval": 0}, "interval: expected at least 1 frame"),
        ({**label, "interval": None}, 'interval: expected it for fusion "delayed" only'),
        ({"blank_id": 1, **label}, "label_units: expected 4 labels with the blank at 1"),
        ({**label, "label_units": LabelUnits.from_token_ids(torch.tensor([1, 2]), 7, 0)}, "got 3 with the blank at 0"),
        ({**label, "label_units": LabelUnits.from_token_ids(torch.tensor([1, 2, 9]), 10, 0)}, "vocab_size: expected"),
        ({"prior_weight": 0.5}, "prior: expected log-probs .A. for a prior_weight of 0.5, got None"),
        ({"prior": torch.zeros(5)}, "prior: expected shape .4,."),
        ({"prior": torch.tensor([0.0, 0.0, -math.inf, 0.0])}, "prior: expected finite log-probs, got -inf for label 2"),
        ({"prior": prior, "prior_weight": math.nan}, "prior_weight: expected a finite number, got nan"),
        ({"length_reward": math.inf}, "length_reward: expected a finite number, got inf"),
        ({**label, "lm_weight": math.inf}, "lm_weight: expected a finite number, got inf"),
        ({"blank_id": 4}, "blank_id: expected 0 to 3"),
        ({"lengths": [3, 4]}, "lengths: expected 0 to 3 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            search(log_probs, **options)
    with pytest.raises(TypeError, match="lengths: expected an integer tensor"):
        ctc_beam_search(log_probs, torch.tensor([3.0, 3.0]), blank_id=0)
    with pytest.raises(TypeError, match="log_probs: expected a floating-point tensor"):
        ctc_beam_search(log_probs.long(), torch.tensor([3, 3]), blank_id=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0])
def test_frames_that_are_no_distribution_are_refused(value: float) -> None:
    log_probs = random_log_probs(2, 3, 4)
    log_probs[1, 2, 3] = value
    with pytest.raises(ValueError, match=f"got a maximum of {value} in utterance 1, frame 2"):
        search(log_probs)
    search(log_probs, [3, 2])
    log_probs[1, 2] = -math.inf
    with pytest.raises(ValueError, match="got a maximum of -inf in utterance 1, frame 2"):
        search(log_probs)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    share=st.floats(0, 0.8),
)
def test_lists_are_sorted_distinct_and_possible(seed: int, lengths: list[int], share: float) -> None:
    """Frames with many excluded labels: nothing impossible, nothing twice, never an empty list."""
    log_probs = random_log_probs(len(lengths), 8, 4, seed=seed)
    drop = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(seed)) < share
    drop.scatter_(2, log_probs.argmax(2, keepdim=True), False)
    log_probs = log_probs.masked_fill(drop, -math.inf).log_softmax(-1)
    for rows, utterance, length in zip(search(log_probs, lengths, beam_size=9), log_probs, lengths, strict=True):
        assert rows and len({x.labels for x in rows}) == len(rows)
        assert all(a.log_score >= b.log_score for a, b in itertools.pairwise(rows))
        for x in rows:
            repeats = sum(a == b for a, b in itertools.pairwise(x.labels))
            assert len(x.labels) + repeats <= length and 0 not in x.labels
            loss = (
                F.ctc_loss(
                    utterance[:length, None].double(),
                    torch.tensor([x.labels], dtype=torch.long),
                    torch.tensor([length]),
                    torch.tensor([len(x.labels)]),
                    reduction="sum",
                )
                if length
                else torch.tensor(0.0)
            )
            assert -math.inf < x.am_log_prob <= -float(loss) + 1e-6
