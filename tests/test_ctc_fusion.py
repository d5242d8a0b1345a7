"""Label-wise and delayed fusion in CTC beam search, against enumeration and a search with dictionaries."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable

import pytest
import torch
from ctc_reference import label_sequence_probs
from ctc_search_reference import HistoryLM, Labels, Reference, spell
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ctc_beam_search import WIDE, assert_same, random_log_probs, search
from tiny_models import AUDIO_CONFIGS, TEXT_CONFIGS, lively, noise, tiny_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForCTC,
    ParakeetTokenizer,
    Wav2Vec2CTCTokenizer,
)

from hf_speechllm.ctc_beam_search import ctc_beam_search
from hf_speechllm.ctc_text import complete_words, labels_to_text_of
from hf_speechllm.hypothesis import Hypothesis
from hf_speechllm.label_units import LabelUnits
from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.rescoring import rescore_nbest

UNITS = LabelUnits.from_token_ids(torch.tensor([4, 6, 1]), HistoryLM.vocab_size, 0)
TOKEN_OF = {1: 4, 2: 6, 3: 1}
WEIGHTS = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-1, 2))


class WordLM(HistoryLM):
    """Each label is a word, each word a token: of "one", "two", "three" those that UNITS gives to labels 1 to 3."""

    words = ("one", "two", "three")

    def tokenize(self, text: str) -> list[int]:
        return [TOKEN_OF[1 + self.words.index(word)] for word in text.split()]


def spell_words(labels: Labels) -> str:
    return "".join(WordLM.words[label - 1] + " " for label in labels)


def enumerated(
    log_probs: torch.Tensor,
    tokens_of: Callable[[Labels], tuple[int, ...]],
    text_of: Callable[[Labels], str] | None,
    prior: torch.Tensor,
    weights: tuple[float, float, float],
) -> list[Hypothesis]:
    """All label sequences of one utterance [T, A] with their scores, best first."""
    lm, rows = HistoryLM(), []
    for labels, prob in label_sequence_probs(log_probs, 0).items():
        tokens = tokens_of(labels)
        scores = math.log(prob), lm.log_prob(tokens, eos=True), sum(float(prior[label]) for label in labels)
        total = scores[0] + weights[0] * scores[1] - weights[1] * scores[2] + weights[2] * len(tokens)
        text = " ".join(text_of(labels).split()) if text_of is not None else None
        rows.append(Hypothesis(labels, text, *scores, len(tokens), total))
    return sorted(rows, key=lambda x: -x.log_score)


def options_of(weights: tuple[float, float, float], prior: torch.Tensor) -> dict:
    return {"lm_weight": weights[0], "prior_weight": weights[1], "length_reward": weights[2], "prior": prior}


# Label-wise


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), num_frames=st.integers(0, 5), weights=WEIGHTS)
def test_label_fusion_with_a_wide_beam_equals_enumeration(seed, num_frames, weights) -> None:
    log_probs, prior = random_log_probs(1, num_frames, 4, seed=seed), random_log_probs(4, seed=seed + 1)
    expected = enumerated(log_probs[0], lambda ids: tuple(TOKEN_OF[x] for x in ids), None, prior, weights)
    options = {"fusion": "label", "lm": HistoryLM(), "label_units": UNITS, **options_of(weights, prior)}
    (actual,) = search(log_probs, beam_size=WIDE, **options)
    assert_same(actual, expected, 1e-5)  # the language model returns float32


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_frames=st.integers(1, 9),
    beam_size=st.sampled_from([1, 2, 5, 12]),
    top_k=st.integers(1, 3),
    weights=WEIGHTS,
)
def test_pruned_label_fusion_equals_dictionaries(seed, num_frames, beam_size, top_k, weights) -> None:
    log_probs, prior = random_log_probs(1, num_frames, 4, seed=seed), random_log_probs(4, seed=seed + 1)
    lm = HistoryLM()

    def start_bonus(labels: Labels, label: int) -> float:
        lm_log_prob = lm.log_probs(tuple(TOKEN_OF[x] for x in labels))[TOKEN_OF[label]]
        return weights[0] * lm_log_prob - weights[1] * float(prior[label]) + weights[2]

    expected = Reference(beam_size, top_k, start_bonus=start_bonus)(log_probs[0])
    options = {"fusion": "label", "lm": lm, "label_units": UNITS, **options_of(weights, prior)}
    (actual,) = search(log_probs, beam_size=beam_size, label_top_k=top_k, **options)
    assert {x.labels: pytest.approx(x.am_log_prob, abs=1e-9) for x in actual} == expected
    for x in actual:
        tokens = tuple(TOKEN_OF[label] for label in x.labels)
        assert x.lm_log_prob == pytest.approx(lm.log_prob(tokens, eos=True), abs=1e-5)


def test_label_fusion_calls_the_language_model_where_a_continuation_may_survive() -> None:
    probs = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(2, 8, 1)  # certain blanks cost no call
    probs[:, 1] = torch.tensor([0.5, 0.3, 0.15, 0.05])  # the empty hypothesis stays, two of three labels survive
    probs[0, 3] = torch.tensor([0.999, 0.0, 0.0, 0.001])  # a label that none of the three would survive with
    # () becomes (1), which is in the beam; (1) and (2) gain the label, and keep it for another frame.
    probs[0, 4:6] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    lm = HistoryLM()
    search(probs.log(), beam_size=3, fusion="label", lm=lm, label_units=UNITS, lm_weight=0.01)
    read = 2 * 2  # both utterances, when the first one needs it
    assert lm.calls == [read, 2]  # in the end, the two hypotheses of the first utterance that are new since then


def test_the_language_model_turns_the_answer_within_the_beam() -> None:
    """With one hypothesis only the frame itself can turn it: afterwards the other is lost."""
    lm = HistoryLM()
    scores = lm.log_probs(())
    better, worse = sorted((1, 2), key=lambda label: -scores[TOKEN_OF[label]])
    frame = torch.full((1, 1, 4), 1e-3)
    frame[0, 0, worse], frame[0, 0, better] = 0.5, 0.4
    options = {"beam_size": 1, "lm": lm, "lm_weight": 1.0}
    assert search(frame.log(), beam_size=1)[0][0].labels == (worse,)
    assert search(frame.log(), fusion="label", label_units=UNITS, **options)[0][0].labels == (better,)
    late = search(frame.log(), fusion="delayed", labels_to_text=spell, **options)
    assert late[0][0].labels == (worse,)


def test_an_excluded_token_excludes_its_hypotheses() -> None:
    class Without4(HistoryLM):
        def log_probs(self, history: Labels) -> list[float]:
            return [-math.inf if token == 4 else x for token, x in enumerate(super().log_probs(history))]

    log_probs, lm = random_log_probs(1, 4, 4), Without4()
    (rows,) = search(log_probs, fusion="label", lm=lm, label_units=UNITS, lm_weight=0.5)
    assert rows and all(1 not in x.labels and math.isfinite(x.log_score) for x in rows)
    (rows,) = search(log_probs, beam_size=40, fusion="label", lm=lm, label_units=UNITS, lm_weight=0.0)
    assert any(1 in x.labels and x.lm_log_prob == -math.inf and math.isfinite(x.log_score) for x in rows)


# Delayed


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_frames=st.integers(0, 5),
    weights=WEIGHTS,
    interval=st.sampled_from([1, 2, 3, 50, None]),
    keeps_space=st.booleans(),
)
def test_delayed_fusion_with_a_wide_beam_equals_enumeration(seed, num_frames, weights, interval, keeps_space) -> None:
    log_probs, prior = random_log_probs(1, num_frames, 4, seed=seed), random_log_probs(4, seed=seed + 1)
    lm = HistoryLM()
    expected = enumerated(log_probs[0], lambda ids: tuple(lm.tokenize(spell(ids))), spell, prior, weights)
    options = {"fusion": "delayed", "lm": lm, "interval": interval, **options_of(weights, prior)}
    to_text = spell if keeps_space else lambda labels: spell(labels).strip()
    (actual,) = search(log_probs, beam_size=WIDE, labels_to_text=to_text, **options)
    assert_same(actual, expected, 1e-5)


def converted_labels(labels: Labels, keeps_space: bool) -> Labels:
    """The labels of complete words.

    They end with the first delimiter behind a word or, where the text does not tell of it, before the next word.
    """
    if keeps_space:
        end = max((i + 1 for i in range(1, len(labels)) if labels[i] == 3 and labels[i - 1] != 3), default=0)
    else:
        end = max((i for i in range(1, len(labels)) if labels[i] != 3 and labels[i - 1] == 3), default=0)
    return labels[:end] if spell(labels[:end]).strip() else ()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_frames=st.integers(1, 12),
    beam_size=st.sampled_from([1, 2, 5, 12]),
    interval=st.sampled_from([1, 2, 3, 5]),
    weights=WEIGHTS,
    keeps_space=st.booleans(),
)
def test_pruned_delayed_fusion_equals_dictionaries(seed, num_frames, beam_size, interval, weights, keeps_space) -> None:
    log_probs, prior = random_log_probs(1, num_frames, 4, seed=seed), random_log_probs(4, seed=seed + 1)
    log_probs = (log_probs + torch.tensor([0.0, 0.0, 0.0, 1.5])).log_softmax(-1)  # short words
    lm = HistoryLM()

    def bonus_of(labels: Labels) -> float:
        complete = converted_labels(labels, keeps_space)
        tokens = lm.tokenize(spell(complete))
        prior_log_prob = sum(float(prior[label]) for label in complete)
        return (
            weights[0] * lm.log_prob(tuple(tokens), eos=False) - weights[1] * prior_log_prob + weights[2] * len(tokens)
        )

    expected = Reference(beam_size, 20, bonus_of=bonus_of, is_due=lambda frame: frame % interval == 0)(log_probs[0])
    options = {"fusion": "delayed", "lm": lm, "interval": interval, **options_of(weights, prior)}
    to_text = spell if keeps_space else lambda labels: spell(labels).strip()
    (actual,) = search(log_probs, beam_size=beam_size, labels_to_text=to_text, **options)
    assert {x.labels: pytest.approx(x.am_log_prob, abs=1e-9) for x in actual} == expected
    for x in actual:
        assert x.lm_log_prob == pytest.approx(lm.log_prob(tuple(lm.tokenize(spell(x.labels))), eos=True), abs=1e-5)
        assert x.prior_log_prob == pytest.approx(sum(float(prior[label]) for label in x.labels), abs=1e-9)


@pytest.mark.parametrize("with_prior", [False, True])
def test_infinite_interval_equals_rescoring(with_prior: bool) -> None:
    """Also of one that is longer than the audio, which goes another way."""
    log_probs, lm, prior = random_log_probs(3, 12, 4), HistoryLM(), random_log_probs(4, seed=1)
    scales = {"lm_weight": 0.6, "length_reward": 0.3}
    if with_prior:
        scales |= {"prior": prior, "prior_weight": 0.4}
    lists = search(log_probs, [12, 7, 0], labels_to_text=spell)
    expected = rescore_nbest(lists, lm, **scales)
    for interval in (None, 13):
        delayed = {"fusion": "delayed", "interval": interval, "lm": lm, "labels_to_text": spell}
        actual = search(log_probs, [12, 7, 0], **delayed, **scales)
        for x, y in zip(actual, expected, strict=True):
            assert_same(x, y, 1e-5)
        best = search(log_probs, [12, 7, 0], n_best=1, **delayed, **scales)
        assert [[x.labels for x in rows] for rows in best] == [[y[0].labels] for y in expected]


@pytest.mark.parametrize("interval", [1, 2, None])
def test_words_as_labels_equal_label_fusion_if_nothing_is_pruned(interval: int | None) -> None:
    log_probs, prior, lm = random_log_probs(1, 5, 4), random_log_probs(4, seed=1), WordLM()
    options = {"beam_size": WIDE, "lm": lm, "labels_to_text": spell_words, **options_of((0.7, 0.3, 0.5), prior)}
    (labelwise,) = search(log_probs, fusion="label", label_units=UNITS, **options)
    (delayed,) = search(log_probs, fusion="delayed", interval=interval, **options)
    assert_same(delayed, labelwise, 1e-5)


def test_the_interval_decides_who_survives() -> None:
    """The language model knows better after the first word, but at interval 4 the beam has closed by then."""
    lm = HistoryLM()
    scores = [lm.log_probs(())[token] for token in (1, 3)]  # a, b at the start of a word
    better, worse = sorted((1, 2), key=lambda label: -scores[label - 1])
    probs = torch.full((1, 4, 4), 1e-6)
    probs[0, 0, worse], probs[0, 0, better] = 0.51, 0.49
    probs[0, 1, 3] = 1.0
    probs[0, 2, worse], probs[0, 2, better] = 0.5, 0.499  # four hypotheses, of which two stay
    probs[0, 3, 3] = 1.0
    log_probs = probs.log().clamp(max=0.0)
    options = {"beam_size": 2, "fusion": "delayed", "lm": lm, "labels_to_text": spell, "lm_weight": 3.0}
    assert {x.labels[0] for x in search(log_probs, interval=1, **options)[0]} == {better}
    assert worse in {x.labels[0] for x in search(log_probs, interval=4, **options)[0]}


@pytest.mark.parametrize("interval", [1, 3, 50, None])
def test_batch_equals_single_and_padding_changes_nothing(interval: int | None) -> None:
    log_probs, lengths = random_log_probs(4, 9, 4), [9, 1, 0, 5]
    for b, length in enumerate(lengths):
        log_probs[b, length:] = math.nan
    prior = random_log_probs(4, seed=1)
    options = {"beam_size": 5, "lm": HistoryLM(), **options_of((0.6, 0.4, 0.2), prior)}
    delayed = {"fusion": "delayed", "interval": interval, "labels_to_text": spell, **options}
    for fusion in (delayed, {"fusion": "label", "label_units": UNITS, **options}):
        batch = search(log_probs, lengths, **fusion)
        for b, length in enumerate(lengths):
            (single,) = search(log_probs[b : b + 1, :length], **fusion)
            assert_same(batch[b], single, 1e-9)


def test_hypotheses_with_the_same_words_share_a_row() -> None:
    """Two delimiters or one: the same words. All calls together have a row per distinct word sequence."""
    log_probs, lm = random_log_probs(1, 6, 4), HistoryLM()
    (rows,) = search(log_probs, beam_size=WIDE, fusion="delayed", interval=50, lm=lm, labels_to_text=spell)
    texts = {x.text for x in rows}
    assert lm.calls == [len(texts - {""})] and len(texts) < len(rows)
    by_text: dict[str, set[float]] = {}
    for x in rows:
        by_text.setdefault(x.text, set()).add(x.lm_log_prob)
    assert all(len(scores) == 1 for scores in by_text.values())


def test_no_complete_word_no_call() -> None:
    log_probs, lm = random_log_probs(2, 6, 4), HistoryLM()
    log_probs[:, :, 3] = -math.inf
    search(log_probs.log_softmax(-1), fusion="delayed", lm=lm, labels_to_text=spell)
    assert len(lm.calls) == 1  # in the end


def test_text_that_takes_words_back_is_refused() -> None:
    log_probs = random_log_probs(1, 6, 4)
    options = {"fusion": "delayed", "lm": HistoryLM(), "lm_weight": 0.1}
    with pytest.raises(ValueError, match="labels_to_text: expected the complete words 'a' to stay"):
        search(log_probs, labels_to_text=lambda ids: "a b" if len(ids) == 1 else "b b", **options)
    with pytest.raises(TypeError, match="labels_to_text: expected it to return str, got list"):
        search(log_probs, labels_to_text=list, **options)


def test_complete_words() -> None:
    assert complete_words("") == complete_words("the") == complete_words(" th") == complete_words(" ") == ()
    assert complete_words("the ") == complete_words("the c") == complete_words(" the\tc") == ("the",)
    assert complete_words("the cat\n") == ("the", "cat")


# Models of transformers


def character_tokenizer(folder) -> Wav2Vec2CTCTokenizer:
    """As of facebook/wav2vec2-base-960h."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *string.ascii_uppercase, "'"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return Wav2Vec2CTCTokenizer(folder / "vocab.json")


def subword_tokenizer() -> ParakeetTokenizer:
    """As of nvidia/parakeet-ctc: SentencePiece pieces, the blank last."""
    pieces = ["<unk>", "▁the", "▁", "c", "a", "t", "at", "▁s", "<pad>"]
    backend = Tokenizer(tokenizer_models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def test_text_of_characters(tmp_path) -> None:
    tokenizer = character_tokenizer(tmp_path)
    to_text = labels_to_text_of(tokenizer)
    ids = tokenizer.get_vocab()
    hello = tuple(ids[c] for c in "HELLO|I'M|")
    assert to_text(hello) == "HELLO I'M "
    assert to_text((ids["<s>"], *hello[:3], ids["<unk>"], ids["|"])) == "HEL "
    assert to_text(()) == ""
    assert to_text(hello[:-1]) == tokenizer.decode(hello[:-1], group_tokens=False)


def test_text_of_subwords() -> None:
    to_text = labels_to_text_of(subword_tokenizer())
    assert to_text((1, 2, 3, 6)) == "the cat"
    assert to_text((2, 3, 4, 5, 5)) == "catt"  # labels are collapsed already
    assert complete_words(to_text((1, 7))) == ("the",) and to_text(()) == ""


@pytest.fixture(scope="module")
def lm() -> CausalLMScorer:
    values = dict(TEXT_CONFIGS["llama"])
    special = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values, **special)
    return CausalLMScorer(lively(AutoModelForCausalLM.from_config(config).eval()), tiny_tokenizer())


@torch.no_grad()
def ctc_output(name: str, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    values = dict(AUDIO_CONFIGS[name])
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), vocab_size=vocab_size, pad_token_id=0, **values)
    model = lively(AutoModelForCTC.from_config(config).eval())
    waveforms = [torch.from_numpy(x) for x in noise(0.7, 0.4)]
    samples = torch.tensor([len(x) for x in waveforms])
    audio = torch.nn.utils.rnn.pad_sequence(waveforms, True)
    mask = (torch.arange(audio.shape[1]) < samples[:, None]).long()
    logits = model(audio, attention_mask=mask).logits
    return logits.log_softmax(-1), model._get_feat_extract_output_lengths(samples), config.pad_token_id


@pytest.mark.parametrize("name", ["wav2vec2", "hubert"])
@pytest.mark.parametrize("interval", [1, 4, None])
def test_models_of_transformers(name: str, interval: int | None, lm, tmp_path) -> None:
    """Every score of the N-best list, recomputed from the texts."""
    tokenizer = character_tokenizer(tmp_path)
    log_probs, lengths, blank_id = ctc_output(name, len(tokenizer))
    log_probs[:, 2::4, tokenizer.word_delimiter_token_id] += 6.0  # random weights know no words
    log_probs = log_probs.log_softmax(-1)
    spell_upper = labels_to_text_of(tokenizer)
    lists = ctc_beam_search(
        log_probs,
        lengths,
        blank_id=blank_id,
        beam_size=6,
        fusion="delayed",
        interval=interval,
        lm=lm,
        lm_weight=0.5,
        length_reward=0.2,
        labels_to_text=lambda labels: spell_upper(labels).lower(),
        n_best=6,
    )
    assert all(len(rows) == 6 for rows in lists)
    for rows in lists:
        assert any(" " in x.text for x in rows)
        scores = lm.score([lm.tokenize(x.text) for x in rows])
        for x, score in zip(rows, scores.tolist(), strict=True):
            assert x.text == " ".join(spell_upper(x.labels).lower().split())
            assert x.lm_log_prob == pytest.approx(score, abs=1e-4)
            assert x.num_tokens == len(lm.tokenize(x.text))
            assert x.log_score == pytest.approx(x.combined(lm_weight=0.5, length_reward=0.2), abs=1e-12)


def test_label_fusion_with_a_model_of_transformers(lm) -> None:
    log_probs = random_log_probs(2, 9, lm.vocab_size + 1, spread=3.0)
    units = LabelUnits.identical(lm.vocab_size + 1, lm.vocab_size, blank_id=lm.vocab_size)
    options = {"fusion": "label", "lm": lm, "label_units": units, "lm_weight": 0.5, "blank_id": lm.vocab_size}
    for rows in search(log_probs, [9, 4], beam_size=8, **options):
        scores = lm.score([x.labels for x in rows])
        assert [x.lm_log_prob for x in rows] == pytest.approx(scores.tolist(), abs=1e-4)
        assert all(x.num_tokens == len(x.labels) for x in rows)
