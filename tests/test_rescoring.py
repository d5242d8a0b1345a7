"""N-best rescoring, N-best lists of Whisper and Moonshine, and the tuning of scales."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXT_CONFIGS, lively, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_speechllm.hypothesis import Hypothesis
from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.metrics import word_errors
from hf_speechllm.rescoring import nbest_from_seq2seq, rescore_nbest
from hf_speechllm.scale_tuning import ScaleChoice, tune_scales

TOKENIZER = tiny_tokenizer()
VOCAB_SIZE = len(TOKENIZER) + 3
EOS = 2


def tiny_lm(seed: int) -> CausalLMScorer:
    torch.manual_seed(seed)
    values = {**TEXT_CONFIGS["llama"], "vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": EOS}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    return CausalLMScorer(lively(model.eval()), TOKENIZER)


@pytest.fixture(scope="module")
def lm() -> CausalLMScorer:
    return tiny_lm(0)


@torch.no_grad()
def text_log_prob(scorer: CausalLMScorer, text: str) -> tuple[float, int]:
    """log P(text, EOS) from one forward pass without cache, and the number of tokens."""
    ids = TOKENIZER(f" {text}" if text else "", add_special_tokens=False)["input_ids"]
    log_probs = torch.log_softmax(scorer.model(torch.tensor([[1, *ids]]), use_cache=False).logits[0].double(), -1)
    return sum(float(log_probs[i, token]) for i, token in enumerate([*ids, EOS])), len(ids)


NBESTS = [
    [
        Hypothesis((3, 4), "the thing", -1.0),
        Hypothesis((3,), "a thing", -1.5),
        Hypothesis((), "", -2.5),
        Hypothesis((4, 4, 3), "the thing", -3.0),
    ],
    [],
    [Hypothesis((3, 3), "he is in", -0.5), Hypothesis((4,), "the thing", -0.7)],
]
PRIOR = torch.tensor([0.0, 0.0, 0.0, -1.0, -2.0])


@pytest.mark.parametrize("length_penalty", [0.0, 0.8])
@pytest.mark.parametrize("prior", ["none", "labels", "lm"])
def test_scores_equal_the_formula(lm, prior: str, length_penalty: float) -> None:
    prior_lm = tiny_lm(1)
    term = {"none": None, "labels": PRIOR, "lm": prior_lm}[prior]
    rescored = rescore_nbest(
        NBESTS, lm, lm_weight=0.4, prior=term, prior_weight=0.3, length_reward=0.25, length_penalty=length_penalty
    )
    for before, after in zip(NBESTS, rescored, strict=True):
        expected = []
        for row in before:
            lm_log_prob, num_tokens = text_log_prob(lm, row.text)
            prior_log_prob = {
                "none": 0.0,
                "labels": sum(float(PRIOR[label]) for label in row.labels),
                "lm": text_log_prob(prior_lm, row.text)[0],
            }[prior]
            score = row.am_log_prob + 0.4 * lm_log_prob - 0.3 * prior_log_prob + 0.25 * num_tokens
            expected.append((score / (num_tokens + 1) ** length_penalty, row, lm_log_prob, prior_log_prob, num_tokens))
        expected.sort(key=lambda entry: -entry[0])
        assert [row.labels for row in after] == [row.labels for _, row, *_ in expected]
        for row, (score, source, lm_log_prob, prior_log_prob, num_tokens) in zip(after, expected, strict=True):
            assert (row.text, row.am_log_prob) == (source.text, source.am_log_prob)
            assert row.num_tokens == num_tokens
            assert row.log_score == pytest.approx(score, abs=1e-4)
            assert row.lm_log_prob == pytest.approx(lm_log_prob, abs=1e-4)
            assert row.prior_log_prob == pytest.approx(prior_log_prob, abs=1e-4)


def test_the_language_model_changes_the_order(lm) -> None:
    by_lm = sorted(["the thing", "a thing", "he is in"], key=lambda text: text_log_prob(lm, text)[0])
    nbest = [[Hypothesis((i,), text, -float(i)) for i, text in enumerate(by_lm)]]  # the acoustic model disagrees
    assert [row.text for row in rescore_nbest(nbest, lm, lm_weight=0.0)[0]] == by_lm
    assert [row.text for row in rescore_nbest(nbest, lm, lm_weight=1e4)[0]] == by_lm[::-1]


def test_each_distinct_text_is_scored_once(lm) -> None:
    rows = []
    handle = lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rescore_nbest(NBESTS, lm, lm_weight=1.0)
    handle.remove()
    assert rows == [1, 4]  # the start, then "the thing" (three times), "a thing", "" and "he is in"


def test_known_scores_are_kept_without_models(lm) -> None:
    once = rescore_nbest(NBESTS, lm, lm_weight=0.4, prior=PRIOR, prior_weight=0.3)
    again = rescore_nbest(once, None, lm_weight=0.4, prior_weight=0.3)
    assert again == once
    other = rescore_nbest(once, None, lm_weight=2.0)
    assert other == rescore_nbest(rescore_nbest(NBESTS, lm, lm_weight=2.0), None, lm_weight=2.0, prior=PRIOR)
    same = [[Hypothesis((i,), None, -1.0) for i in range(5)]]  # equal ones keep their order
    assert [row.labels for row in rescore_nbest(same, None, lm_weight=1.0)[0]] == [(i,) for i in range(5)]


def test_a_weight_of_zero_switches_an_impossible_text_back_on() -> None:
    row = Hypothesis((1,), "a", -1.0, lm_log_prob=-math.inf, prior_log_prob=-math.inf)
    assert row.combined() == -1.0
    assert row.combined(lm_weight=0.1) == -math.inf
    with pytest.raises(ValueError, match="length_penalty: expected 0 or more"):
        row.combined(length_penalty=-1.0)


def test_bad_hypotheses_are_named(lm) -> None:
    with pytest.raises(ValueError, match=r"hypotheses: expected text in all of them, got None for labels \(7,\)"):
        rescore_nbest([[Hypothesis((3,), "a", 0.0), Hypothesis((7,), None, 0.0)]], lm, lm_weight=1.0)
    with pytest.raises(ValueError, match="prior: expected a log-prob for every label up to 4, got 4"):
        rescore_nbest(NBESTS, None, lm_weight=0.0, prior=PRIOR[:4], prior_weight=1.0)
    with pytest.raises(ValueError, match=r"prior: expected log-probs \[A\]"):
        rescore_nbest(NBESTS, None, lm_weight=0.0, prior=PRIOR[None], prior_weight=1.0)
    with pytest.raises(ValueError, match="length_penalty"):
        rescore_nbest(NBESTS, None, lm_weight=0.0, length_penalty=-0.1)


# N-best lists of encoder-decoder models

SOT, NO_TIMESTAMPS, ENGLISH, GERMAN, TRANSCRIBE, TRANSLATE = range(VOCAB_SIZE, VOCAB_SIZE + 6)


class TinyProcessor:
    tokenizer = TOKENIZER


def whisper(multilingual: bool = False) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=VOCAB_SIZE + 6, num_mel_bins=4, max_source_positions=8,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=EOS, decoder_start_token_id=SOT,
        init_std=0.5, suppress_tokens=None, begin_suppress_tokens=None,
    )).eval()  # fmt: skip
    config = model.generation_config
    config.suppress_tokens = [0, 1, *range(8, SOT + 6)]  # few labels, so that EOS is likely
    config.begin_suppress_tokens = [EOS]
    config.no_timestamps_token_id = NO_TIMESTAMPS
    config.is_multilingual = multilingual
    if multilingual:
        config.lang_to_id = {"<|en|>": ENGLISH, "<|de|>": GERMAN}
        config.task_to_id = {"transcribe": TRANSCRIBE, "translate": TRANSLATE}
    return model


def moonshine() -> MoonshineForConditionalGeneration:
    torch.manual_seed(0)
    model = MoonshineForConditionalGeneration(MoonshineConfig(
        hidden_size=16, intermediate_size=16, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, vocab_size=VOCAB_SIZE, pad_token_id=0,
        bos_token_id=1, eos_token_id=EOS, decoder_start_token_id=1, initializer_range=0.5,
    )).eval()  # fmt: skip
    model.generation_config.suppress_tokens = [0, 1]
    return model


def audio_of(model) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4, 16) if model.main_input_name == "input_features" else torch.randn(2, 4000)


@torch.no_grad()
def forced_log_prob(model, audio: torch.Tensor, prompt: list[int], labels: list[int]) -> float:
    """log P(labels | audio, prompt) from one forward pass."""
    ids = torch.tensor([prompt + labels])
    logits = model(**{model.main_input_name: audio[None]}, decoder_input_ids=ids, use_cache=False).logits[0]
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return sum(float(log_probs[len(prompt) + i - 1, label]) for i, label in enumerate(labels))


@pytest.mark.parametrize("name", ["whisper", "whisper-multilingual", "moonshine"])
def test_nbest_log_probs_equal_teacher_forcing(name: str) -> None:
    model = moonshine() if name == "moonshine" else whisper("multilingual" in name)
    prompt = {
        "whisper": [SOT, NO_TIMESTAMPS],
        "whisper-multilingual": [SOT, GERMAN, TRANSLATE, NO_TIMESTAMPS],
        "moonshine": [1],
    }[name]
    options = {"language": "de", "task": "translate"} if "multilingual" in name else {}
    audio = audio_of(model)
    max_new_tokens = 6
    nbests = nbest_from_seq2seq(
        model, TinyProcessor, audio, num_beams=8, num_return_sequences=6, max_new_tokens=max_new_tokens, **options
    )
    assert [len(nbest) for nbest in nbests] == [6, 6]
    rows = [row for nbest in nbests for row in nbest]
    num_ended = sum(len(row.labels) < max_new_tokens for row in rows)
    assert 0 < num_ended < len(rows)  # with and without EOS
    for waveform, nbest in zip(audio, nbests, strict=True):
        assert len({row.labels for row in nbest}) == 6
        assert [row.am_log_prob for row in nbest] == sorted((row.am_log_prob for row in nbest), reverse=True)
        for row in nbest:
            ids = list(row.labels) + [EOS] * (len(row.labels) < max_new_tokens)
            assert row.am_log_prob == pytest.approx(forced_log_prob(model, waveform, prompt, ids), abs=1e-4)
            assert row.log_score == row.am_log_prob
            assert EOS not in row.labels and 0 not in row.labels
            assert row.text == TOKENIZER.decode(row.labels).strip()


def test_a_wide_search_finds_the_best_of_all() -> None:
    model = moonshine()
    audio = audio_of(model)[:1]
    allowed = [5, 6, 7]
    model.generation_config.suppress_tokens = [i for i in range(VOCAB_SIZE) if i not in (*allowed, EOS)]
    found = nbest_from_seq2seq(model, TinyProcessor, audio, num_beams=27, num_return_sequences=5, max_new_tokens=3)[0]
    bodies = [list(body) for length in range(4) for body in itertools.product(allowed, repeat=length)]
    expected = [(forced_log_prob(model, audio[0], [1], body + [EOS] * (len(body) < 3)), tuple(body)) for body in bodies]
    expected.sort(reverse=True)
    assert [row.labels for row in found] == [labels for _, labels in expected[:5]]
    # With fewer sequences than were asked for, the beams that fill the list are left out.
    model.generation_config.suppress_tokens = [i for i in range(VOCAB_SIZE) if i not in (5, EOS)]
    few = nbest_from_seq2seq(model, TinyProcessor, audio, num_beams=8, num_return_sequences=8, max_new_tokens=2)[0]
    assert sorted(row.labels for row in few) == [(), (5,), (5, 5)]


def test_the_search_goes_on_while_a_longer_text_may_be_better() -> None:
    model = moonshine()
    model.generation_config.suppress_tokens = [i for i in range(VOCAB_SIZE) if i not in (5, EOS)]
    torch.manual_seed(1)
    audio = torch.randn(2, 4000)[1:]
    found = nbest_from_seq2seq(model, TinyProcessor, audio, num_beams=2, num_return_sequences=2, max_new_tokens=10)[0]
    texts = [[5] * length + [EOS] * (length < 10) for length in range(11)]
    expected = sorted(((forced_log_prob(model, audio[0], [1], ids), ids) for ids in texts), reverse=True)[:2]
    assert [list(row.labels) for row in found] == [[i for i in ids if i != EOS] for _, ids in expected]
    assert len(found[0].labels) == 10 and found[1].labels == ()  # the short one is found first


def test_padding_is_no_label_and_special_tokens_are_no_text() -> None:
    model = moonshine()
    audio = audio_of(model)
    model.generation_config.suppress_tokens = [i for i in range(VOCAB_SIZE) if i not in (1, 5, 6, EOS)]
    options = {"num_beams": 6, "num_return_sequences": 6, "max_new_tokens": 4}
    want = nbest_from_seq2seq(model, TinyProcessor, audio, **options)
    model.generation_config.pad_token_id = 6
    assert nbest_from_seq2seq(model, TinyProcessor, audio, **options) == want
    rows = [row for nbest in want for row in nbest]
    assert any(1 in row.labels for row in rows) and any(len(row.labels) < 4 for row in rows)
    for row in rows:
        assert row.text == TOKENIZER.decode([label for label in row.labels if label != 1]).strip()


def test_the_decoder_starts_as_the_model_config_says_where_its_generation_config_does_not() -> None:
    model = moonshine()
    audio = audio_of(model)
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 4}
    model.config.decoder_start_token_id = 7
    model.generation_config.decoder_start_token_id = None
    for waveform, nbest in zip(audio, nbest_from_seq2seq(model, TinyProcessor, audio, **options), strict=True):
        for row in nbest:
            ids = list(row.labels) + [EOS] * (len(row.labels) < 4)
            assert row.am_log_prob == pytest.approx(forced_log_prob(model, waveform, [7], ids), abs=1e-4)


def test_a_batch_gives_the_lists_of_its_utterances() -> None:
    model = moonshine()
    audio = audio_of(model)
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 2000:] = 0
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 5}
    batch = nbest_from_seq2seq(model, TinyProcessor, audio, attention_mask=mask, **options)
    for i, nbest in enumerate(batch):
        single = nbest_from_seq2seq(model, TinyProcessor, audio[i, None], attention_mask=mask[i, None], **options)[0]
        assert [row.labels for row in nbest] == [row.labels for row in single]
        assert [row.am_log_prob for row in nbest] == pytest.approx([row.am_log_prob for row in single], abs=1e-4)
    unmasked = nbest_from_seq2seq(model, TinyProcessor, audio, **options)
    assert abs(unmasked[0][0].am_log_prob - batch[0][0].am_log_prob) < 1e-4
    assert abs(unmasked[1][0].am_log_prob - batch[1][0].am_log_prob) > 1e-3


def test_the_lists_can_be_rescored(lm) -> None:
    nbests = nbest_from_seq2seq(
        whisper(), TinyProcessor, audio_of(whisper()), num_beams=4, num_return_sequences=4, max_new_tokens=5
    )
    rescored = rescore_nbest(nbests, lm, lm_weight=0.5)
    for row in rescored[0]:
        assert row.log_score == pytest.approx(row.am_log_prob + 0.5 * text_log_prob(lm, row.text)[0], abs=1e-4)


def test_bad_search_arguments_are_named(lm) -> None:
    model = whisper(multilingual=True)
    audio = audio_of(model)
    good = {"num_beams": 2, "num_return_sequences": 2, "language": "en"}
    for changed, message in (
        ({"num_beams": 1, "num_return_sequences": 1}, "expected at least 2 beams"),
        ({"num_return_sequences": 3}, "1 to num_beams sequences, got 2 and 3"),
        ({"num_return_sequences": 0}, "1 to num_beams sequences"),
        (
            {"language": None},
            "language: expected one of .'en', 'de'., got None; a pipeline takes it as generate_kwargs",
        ),
        ({"language": "fr"}, "language: expected one of .*got 'fr'"),
        ({"task": "sing"}, "task: expected one of .'transcribe', 'translate'., got 'sing'"),
    ):
        with pytest.raises(ValueError, match=message):
            nbest_from_seq2seq(model, TinyProcessor, audio, **{**good, **changed})
    with pytest.raises(ValueError, match="language: expected None for Moonshine.* got 'en'"):
        nbest_from_seq2seq(moonshine(), TinyProcessor, audio_of(moonshine()), **good)
    with pytest.raises(ValueError, match="model: expected an encoder-decoder, got Llama"):
        nbest_from_seq2seq(lm.model, TinyProcessor, audio, **good)


# Scales

SCORES = st.floats(-20.0, 0.0, width=32)
ROWS = st.builds(
    Hypothesis,
    labels=st.just(()),
    text=st.sampled_from(["a b c", "a b", "a x c", "b", "", "a b c d"]),
    am_log_prob=SCORES,
    lm_log_prob=SCORES,
    prior_log_prob=SCORES,
    num_tokens=st.integers(0, 6),
)
GRIDS = {"lm_weights": [0.0, 0.5, 1.0], "prior_weights": [0.4, 0.0], "length_rewards": [-1.0, 0.0, 2.0]}


def wer_of(nbests, references, scales) -> float:
    lm_weight, prior_weight, length_reward = scales
    best = rescore_nbest(nbests, None, lm_weight=lm_weight, prior_weight=prior_weight, length_reward=length_reward)
    return word_errors(references, [nbest[0].text for nbest in best]).wer


@settings(max_examples=25, deadline=None)
@given(nbests=st.lists(st.lists(ROWS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_tuning_equals_rescoring_with_every_combination(nbests) -> None:
    references = ["a b c", "a", "b c", "a b c"][: len(nbests)]
    choice = tune_scales(nbests, references, **GRIDS)

    def best_of(points):
        return min(points, key=lambda point: (wer_of(nbests, references, point), *map(abs, point)))

    coarse = best_of(itertools.product(*GRIDS.values()))
    finer = []
    for grid, value in zip(GRIDS.values(), coarse, strict=True):
        grid = sorted(grid)
        place = grid.index(value)
        points = [value]
        if place > 0:
            points.append((grid[place - 1] + value) / 2)
        if place + 1 < len(grid):
            points.append((grid[place + 1] + value) / 2)
        finer.append(points)
    expected = best_of(itertools.product(*finer))
    assert (choice.lm_weight, choice.prior_weight, choice.length_reward) == expected
    assert choice.wer == pytest.approx(wer_of(nbests, references, expected))


def test_tuning_finds_what_the_grid_misses() -> None:
    """Right only between 0.6 and 0.9, so neither 0 nor 1 of the grid will do, but 0.75 is not on it either."""
    nbest = [
        Hypothesis((), "b", -0.0, lm_log_prob=-10.0),
        Hypothesis((), "a", -1.2, lm_log_prob=-8.0),
        Hypothesis((), "c", -3.0, lm_log_prob=-6.0),
    ]
    assert [wer_of([nbest], ["a"], (weight, 0.0, 0.0)) for weight in (0.5, 0.75, 1.0)] == [1.0, 0.0, 1.0]
    grids = {"prior_weights": [0.0], "length_rewards": [0.0]}
    choice = tune_scales([nbest], ["a"], lm_weights=[0.5, 1.0], **grids)
    assert choice == ScaleChoice(lm_weight=0.75, prior_weight=0.0, length_reward=0.0, wer=0.0)
    assert tune_scales([nbest], ["b"], lm_weights=[0.0, 1.0], **grids).lm_weight == 0.0  # of equal ones the smaller


def test_texts_are_normalised_and_aligned_once() -> None:
    normalised = []

    def normalize(text: str) -> str:
        normalised.append(text)
        return text.lower().strip(".")

    nbests = [[Hypothesis((), "A b.", -1.0), Hypothesis((), "a b", -2.0), Hypothesis((), "A b.", -3.0)]] * 3
    choice = tune_scales(
        nbests, ["a B"] * 3, lm_weights=[0.0, 1.0], prior_weights=[0.0], length_rewards=[0.0], normalize=normalize
    )
    assert choice.wer == 0.0
    assert sorted(normalised) == ["A b.", "a B", "a b"]


def test_bad_tuning_arguments_are_named() -> None:
    row = Hypothesis((), "a", -1.0)
    grids = {"lm_weights": [0.0], "prior_weights": [0.0], "length_rewards": [0.0]}
    for nbests, references, changed, message in (
        ([[row]], ["a"], {"lm_weights": []}, "lm_weights: expected at least one finite value"),
        ([[row]], ["a"], {"prior_weights": [math.inf]}, "prior_weights: expected at least one finite"),
        ([[row]], ["a"], {"length_rewards": [math.nan]}, "length_rewards: expected at least one finite"),
        ([[row]], ["a", "b"], {}, r"references: expected one per N-best list \(1\), got 2"),
        ([[row], []], ["a", "b"], {}, "nbests: expected at least one hypothesis per utterance, got none for utt.* 1"),
        ([[replace(row, text=None)]], ["a"], {}, "nbests: expected text in all of them"),
        ([[row]], [""], {}, "references: expected at least one word"),
        (
            [[replace(row, lm_log_prob=-math.inf)]],
            ["a"],
            {},
            "nbests: expected finite lm_log_prob, got .-inf. in utt.* 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tune_scales(nbests, references, **{**grids, **changed})
