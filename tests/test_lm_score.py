"""CausalLMScorer against one uncached forward pass per row, for many kinds of language models and tokenizers."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TEXT_CONFIGS, lively, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_speechllm.lm_score import CausalLMScorer, LMState

TOKENIZER = tiny_tokenizer()
VOCAB_SIZE = len(TOKENIZER) + 3  # padded, as published models are
BOS, EOS = 1, 2
_LLAMA = {key: value for key, value in TEXT_CONFIGS["llama"].items() if key != "model_type"}
LM_CONFIGS = {
    **TEXT_CONFIGS,
    "mistral-sliding": {"model_type": "mistral", **_LLAMA, "sliding_window": 4},
    "gemma2-sliding": {"model_type": "gemma2", **_LLAMA, "head_dim": 12, "sliding_window": 4},
    "gemma3-sliding": {
        "model_type": "gemma3_text",
        **_LLAMA,
        "head_dim": 12,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo-local": {
        "model_type": "gpt_neo",
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
        "max_position_embeddings": 64,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 24,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 24,
        "max_position_embeddings": 64,
    },
    "bloom-alibi": {"model_type": "bloom", "hidden_size": 24, "n_layer": 2, "n_head": 2},
    "mpt-alibi": {"model_type": "mpt", "d_model": 24, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
}


def tiny_lm(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    special = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    values = {**LM_CONFIGS[name], **special, **overrides}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return lively(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_lm("llama")


@torch.no_grad()
def uncached_log_probs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[len(ids), V] log P of what follows each prefix, one row without padding and without cache."""
    return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].float(), dim=-1)


def sum_log_probs(log_probs: torch.Tensor, num_history: int, new: list[int]) -> float:
    """log P of `new` after the first `num_history` tokens, from the rows of `uncached_log_probs`."""
    return sum(float(log_probs[num_history + i - 1, token]) for i, token in enumerate(new))


def ragged(rows: list[list[int]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [N', M] padded with an id that no model has, and their numbers."""
    num_tokens = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), width if width is not None else int(num_tokens.max())), -7)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens, num_tokens


def extend(scorer: CausalLMScorer, state: LMState, parent: list[int], rows: list[list[int]]) -> LMState:
    return scorer.advance(state, torch.tensor(parent), *ragged(rows))


class CountedCalls:
    """The rows and widths of each call of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.handle = model.register_forward_pre_hook(
            lambda _, args, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )

    def __enter__(self) -> CountedCalls:
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()


@pytest.mark.parametrize("name", LM_CONFIGS)
@pytest.mark.parametrize("prompt", ["", "the thing"])
def test_random_search_equals_uncached_recomputation(name: str, prompt: str) -> None:
    model = tiny_lm(name)
    scorer = CausalLMScorer(model, TOKENIZER, prompt=prompt)
    start = [BOS, *TOKENIZER(prompt, add_special_tokens=False)["input_ids"]]
    rng = random.Random(0)
    state, histories = scorer.start(2), [[], []]
    for _ in range(7):  # parents repeat and disappear, rows gain 0 to 3 tokens
        parent = [rng.randrange(len(histories)) for _ in range(rng.randint(1, 4))]
        rows = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice((0, 1, 1, 3)))] for _ in parent]
        state = extend(scorer, state, parent, rows)
        for i, (p, row) in enumerate(zip(parent, rows, strict=True)):
            expected = uncached_log_probs(model, start + histories[p] + row)
            torch.testing.assert_close(state.next_log_probs[i], expected[-1], atol=1e-4, rtol=0)
            expected_sum = sum_log_probs(expected, len(start + histories[p]), row)
            assert float(state.token_log_prob[i]) == pytest.approx(expected_sum, abs=1e-4)
        histories = [histories[p] + row for p, row in zip(parent, rows, strict=True)]
    assert max(len(history) for history in histories) > 6  # longer than the sliding windows
    assert state.next_log_probs.dtype == torch.float32 and state.token_log_prob.dtype == torch.float64


def test_the_models_tell_histories_apart(llama) -> None:
    """Otherwise nothing above would show that a cache was mixed up."""
    one, other = (uncached_log_probs(llama, [BOS, first, 5, 6])[-1] for first in (7, 8))
    assert float((one - other).abs().max()) > 0.1


def test_idle_rows_between_others_keep_their_places(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    state = extend(scorer, scorer.start(1), [0, 0, 0], [[5], [6, 7], [8]])
    state = extend(scorer, state, [0, 1, 2], [[], [9], [10, 11]])  # the cache holds the rows that ran first
    state = extend(scorer, state, [0, 1, 2], [[12], [12], [12]])
    for i, history in enumerate(([5, 12], [6, 7, 9, 12], [8, 10, 11, 12])):
        expected = uncached_log_probs(llama, [BOS, *history])[-1]
        torch.testing.assert_close(state.next_log_probs[i], expected, atol=1e-4, rtol=0)


def test_states_stay_valid_and_are_not_modified(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    start = scorer.start(1)
    first = extend(scorer, start, [0, 0], [[5], [6, 7]])
    before = (start.next_log_probs.clone(), first.next_log_probs.clone())
    one = extend(scorer, first, [1, 0], [[8], []])
    extend(scorer, first, [1, 1], [[9, 10], [11]])
    again = extend(scorer, first, [1, 0], [[8], []])
    torch.testing.assert_close(again.next_log_probs, one.next_log_probs, atol=1e-6, rtol=0)
    assert torch.equal(start.next_log_probs, before[0]) and torch.equal(first.next_log_probs, before[1])
    assert len(start) == 1 and len(first) == 2


def test_only_rows_with_tokens_run_in_a_single_call(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    state = scorer.start(3)
    with CountedCalls(llama) as calls:
        idle = scorer.advance(state, torch.tensor([2, 0]), torch.zeros(2, 4, dtype=torch.long), torch.tensor([0, 0]))
        assert calls.shapes == []
        scorer.advance(idle, torch.tensor([0]), torch.zeros(1, 0, dtype=torch.long), torch.tensor([0]))
        assert calls.shapes == []
        scorer.advance(idle, torch.tensor([1, 1, 0]), *ragged([[5, 6], [], [7]], width=4))
        assert calls.shapes == [(2, 2)]
        scorer.start(100)
        assert calls.shapes == [(2, 2), (1, 1)]
    assert torch.equal(idle.token_log_prob, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(idle.next_log_probs, state.next_log_probs[:2])


def test_memory_does_not_grow_with_what_was_dropped(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    state = scorer.start(1)
    for _ in range(2000):  # one row gets three tokens and is dropped each time, the other gets none
        state = extend(scorer, state, [0, 0], [[], [6, 7, 8]])
        state = extend(scorer, state, [0], [[]])
    assert state._places.shape == (1, 1) and state._pool.capacity < 1000


def test_int32_and_larger_batch_give_the_same_rows(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    state = extend(scorer, scorer.start(2), [0, 1, 1], [[5], [6, 7], []])
    tokens, num_tokens = ragged([[8, 9], [10], [4, 5, 6]])
    parent = torch.tensor([2, 0, 1])
    batch = scorer.advance(state, parent.int(), tokens.int(), num_tokens.int())
    for i in range(3):
        single = scorer.advance(state, parent[i : i + 1], tokens[i : i + 1], num_tokens[i : i + 1])
        torch.testing.assert_close(batch.next_log_probs[i], single.next_log_probs[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.token_log_prob[i], single.token_log_prob[0], atol=1e-5, rtol=0)


def test_bfloat16_models_give_float32_log_probs() -> None:
    scorer = CausalLMScorer(tiny_lm("llama").bfloat16(), TOKENIZER)
    state = extend(scorer, scorer.start(1), [0], [[5, 6]])
    assert state.next_log_probs.dtype == torch.float32
    torch.testing.assert_close(state.next_log_probs.exp().sum(1), torch.ones(1), atol=1e-5, rtol=0)
    assert scorer.score([[5, 6]]).dtype == torch.float64


@pytest.mark.parametrize("num_tokens", [1, 90])  # more than there is room for at the start
def test_states_of_inference_mode_go_on_outside_of_it_and_the_other_way_round(llama, num_tokens: int) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    history = [5 + i % 7 for i in range(num_tokens)]
    state, ids = scorer.start(1), [BOS]
    for is_inference in (True, False, True, False, False):
        with torch.inference_mode(is_inference):
            if len(ids) == 1:
                state = scorer.start(1)
            state = extend(scorer, state, [0], [history])
        ids += history
    expected = uncached_log_probs(llama, ids)[-1]
    torch.testing.assert_close(state.next_log_probs[0], expected, atol=1e-4, rtol=0)


def test_gradients_are_not_kept(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    assert not extend(scorer, scorer.start(1), [0], [[5]]).next_log_probs.requires_grad
    assert not scorer.score([[5]]).requires_grad


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-sliding", "bloom-alibi"])
@pytest.mark.parametrize("include_eos", [True, False])
@pytest.mark.parametrize("prompt", ["", "the"])
def test_score_equals_uncached_recomputation(name: str, include_eos: bool, prompt: str) -> None:
    model = tiny_lm(name)
    scorer = CausalLMScorer(model, TOKENIZER, prompt=prompt, max_batch_size=2)
    start = [BOS, *TOKENIZER(prompt, add_special_tokens=False)["input_ids"]]
    sequences = [[5, 6, 7, 8, 9, 10, 11], [], [12], [5, 6], [12], [20, 4, 4]]
    scores = scorer.score(sequences, include_eos=include_eos)
    expected = [
        sum_log_probs(uncached_log_probs(model, start + ids), len(start), ids + [EOS] * include_eos)
        for ids in sequences
    ]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("logits_per_chunk", [2 * 4 * VOCAB_SIZE, 1])  # two rows, then one; and one row at a time
def test_score_in_chunks_is_the_same(llama, monkeypatch, logits_per_chunk: int) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    sequences = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    whole = scorer.score(sequences)
    monkeypatch.setattr("hf_speechllm.lm_score._LOGITS_PER_CHUNK", logits_per_chunk)
    torch.testing.assert_close(scorer.score(sequences), whole, atol=1e-6, rtol=0)


def test_score_runs_distinct_sequences_in_batches_of_similar_length(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER, max_batch_size=2)
    with CountedCalls(llama) as calls:
        scorer.score([[5] * 9, [6], [5] * 9, [7], [6] * 8, [6]])
    assert calls.shapes == [(1, 1), (2, 1), (2, 9)]
    assert scorer.score([]).shape == (0,)


def test_score_of_all_sequences_of_a_length_sums_to_one(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER, max_batch_size=1000)
    pairs = [[a, b] for a in range(VOCAB_SIZE) for b in range(VOCAB_SIZE)]
    assert float(scorer.score(pairs, include_eos=False).exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_disabled_adapter_scores_as_the_plain_model() -> None:
    from peft import LoraConfig, get_peft_model

    plain = tiny_lm("llama")
    expected = CausalLMScorer(plain, TOKENIZER).score([[5, 6, 7]])
    adapted = get_peft_model(tiny_lm("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    scorer = CausalLMScorer(adapted.get_base_model(), TOKENIZER)
    assert abs(float(scorer.score([[5, 6, 7]]) - expected)) > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(scorer.score([[5, 6, 7]]), expected, atol=1e-6, rtol=0)
    with pytest.raises(TypeError, match="get_base_model"):
        CausalLMScorer(adapted, TOKENIZER)


def test_start_token_is_bos_else_that_of_the_config_else_eos(llama) -> None:
    assert CausalLMScorer(llama, TOKENIZER).start_token_ids == [BOS]
    without_bos = tiny_tokenizer()
    without_bos.bos_token = None
    assert CausalLMScorer(tiny_lm("llama", bos_token_id=4), without_bos).start_token_ids == [4]
    assert CausalLMScorer(tiny_lm("gpt2", bos_token_id=None), without_bos).start_token_ids == [EOS]
    without_eos = tiny_tokenizer()
    without_eos.eos_token = None
    assert CausalLMScorer(tiny_lm("llama", eos_token_id=[9, 8]), without_eos).eos_token_id == 9
    with pytest.raises(ValueError, match="expected an EOS token"):
        CausalLMScorer(tiny_lm("llama", eos_token_id=None), without_eos)


def test_the_end_is_the_tokenizers_else_that_of_the_config(llama) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    assert CausalLMScorer(llama, tokenizer).eos_token_id == 5
    tokenizer.eos_token = None
    assert CausalLMScorer(llama, tokenizer).eos_token_id == EOS


def test_unsuitable_models_are_refused(llama) -> None:
    with pytest.raises(TypeError, match="expected a PreTrainedModel, got Linear"):
        CausalLMScorer(torch.nn.Linear(2, 2), TOKENIZER)
    t5 = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="expected a causal language model .* got T5"):
        CausalLMScorer(T5ForConditionalGeneration(t5).eval(), TOKENIZER)
    with pytest.raises(ValueError, match="with its output layer, got LlamaModel"):
        CausalLMScorer(llama.model, TOKENIZER)
    mamba = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    qwen = {**_LLAMA, "model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}
    for values in (mamba, qwen):
        config = AutoConfig.for_model(values.pop("model_type"), vocab_size=VOCAB_SIZE, **values)
        with pytest.raises(ValueError, match="expected plain attention in every layer"):
            CausalLMScorer(AutoModelForCausalLM.from_config(config).eval(), TOKENIZER)
    bart = AutoConfig.for_model(
        "bart", vocab_size=VOCAB_SIZE, d_model=8, decoder_layers=1, decoder_attention_heads=2, is_encoder_decoder=False
    )
    with pytest.raises(ValueError, match="expected one whose forward takes position_ids, got Bart"):
        CausalLMScorer(AutoModelForCausalLM.from_config(bart).eval(), TOKENIZER)
    with pytest.raises(ValueError, match="training mode"):
        CausalLMScorer(tiny_lm("llama").train(), TOKENIZER)


def test_bad_arguments_are_named(llama) -> None:
    with pytest.raises(ValueError, match="max_batch_size: expected at least 1"):
        CausalLMScorer(llama, TOKENIZER, max_batch_size=0)
    scorer = CausalLMScorer(llama, TOKENIZER)
    with pytest.raises(ValueError, match="num_rows: expected at least 1"):
        scorer.start(0)
    state = scorer.start(2)
    row, token, one = torch.tensor([0]), torch.tensor([[5]]), torch.tensor([1])
    for parent, tokens, num_tokens, message in (
        (row[None], token, one, "expected shapes"),
        (row, token[0], one, "expected shapes"),
        (row, token, torch.tensor([1, 1]), "expected shapes"),
        (row, token.repeat(2, 1), one, "expected shapes"),
        (row, token.float(), one, "tokens: expected int64 or int32, got torch.float32"),
        (row + 2, token, one, "parent: expected rows 0 to 1 of the state, got .2."),
        (row - 1, token, one, "parent: expected rows 0 to 1"),
        (row, token, one + 1, "num_tokens: expected 0 to 1, got .2."),
        (row, token, one - 2, "num_tokens: expected 0 to 1"),
        (row, torch.full_like(token, VOCAB_SIZE), one, f"tokens: expected ids 0 to {VOCAB_SIZE - 1}"),
        (row, token + VOCAB_SIZE, one, f"tokens: expected ids 0 to {VOCAB_SIZE - 1} .* got .{VOCAB_SIZE + 5}."),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.advance(state, parent, tokens, num_tokens)
    with pytest.raises(ValueError, match="tokens: expected ids"):
        scorer.score([[5], [-1]])


def test_histories_beyond_the_positions_are_refused() -> None:
    scorer = CausalLMScorer(tiny_lm("gpt2", n_positions=6), TOKENIZER)
    state = extend(scorer, scorer.start(2), [0, 1], [[5] * 5, [6]])  # padding does not count
    with pytest.raises(ValueError, match="at most 6 tokens .* got 7"):
        extend(scorer, state, [0], [[5]])
    assert len(extend(scorer, state, [1], [[5] * 4])) == 1
    with pytest.raises(ValueError, match="at most 6 tokens"):
        scorer.score([[5] * 6])


def test_padding_needs_no_positions_of_its_own() -> None:
    model = tiny_lm("gpt2", n_positions=6)
    scorer = CausalLMScorer(model, TOKENIZER)
    state = extend(scorer, scorer.start(2), [0, 1], [[5] * 4, [6]])
    state = extend(
        scorer, state, [0, 1], [[7], [8] * 3]
    )  # the first row has room for one token, but is padded to three
    for i, ids in enumerate(([5] * 4 + [7], [6] + [8] * 3)):
        expected = uncached_log_probs(model, [BOS, *ids])[-1]
        torch.testing.assert_close(state.next_log_probs[i], expected, atol=1e-5, rtol=0)


def test_memory_is_not_shared_between_rows_of_the_start(llama) -> None:
    scorer = CausalLMScorer(llama, TOKENIZER)
    state = scorer.start(3)
    assert len(state) == 3 and state.next_log_probs.shape == (3, VOCAB_SIZE)
    mixed = extend(scorer, state, [0, 1, 2], [[5], [6], []])
    for i, ids in enumerate(([5], [6], [])):
        expected = uncached_log_probs(llama, [BOS, *ids])[-1]
        torch.testing.assert_close(mixed.next_log_probs[i], expected, atol=1e-5, rtol=0)


# Tokenizers

CORPUS = ["the cat sat on the mat", "they're singing about 1234 things", "Über naïve café, isn't it?"] * 3
WORDS = st.lists(st.text(alphabet="abehinst'rÜé,12", min_size=1, max_size=6), max_size=6)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre_tokenizer, normalizer=None, algorithm: str = "bpe") -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>"]
    if algorithm == "bpe":
        backend = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if normalizer is None else []
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    else:
        backend = Tokenizer(tokenizer_models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(**options) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Llama 2: a normalizer puts one more space in front, and no pre-tokenizer splits at words."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned = trained(pre_tokenizers.Metaspace(), normalizers.NFC())  # merges that stay within words
    learned.backend_tokenizer.normalizer = normalizer
    learned.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    return learned


TOKENIZERS = {
    "gpt2": lambda: trained(byte_level()),
    "gpt2-prefix-space": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: trained(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), byte_level(use_regex=False)])
    ),
    "smollm2": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
    "metaspace-unigram": lambda: trained(pre_tokenizers.Metaspace(), algorithm="unigram"),
    "metaspace-first": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="first"), algorithm="unigram"),
    "metaspace-never": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="never"), algorithm="unigram"),
    "llama2": sentencepiece_bpe,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def scorer_of_tokenizer(request) -> CausalLMScorer:
    return CausalLMScorer(tiny_lm("llama", vocab_size=400), TOKENIZERS[request.param]())


@settings(max_examples=25, deadline=None)
@given(words=WORDS)
def test_words_are_tokenised_as_within_the_text(scorer_of_tokenizer, words: list[str]) -> None:
    scorer = scorer_of_tokenizer
    pieces = [scorer.tokenize(word) for word in words]
    assert scorer.tokenize(" ".join(words)) == [token for piece in pieces for token in piece]
    assert scorer.splits_at_words(" ".join(words))


def test_the_first_word_has_its_space_and_white_space_counts_once(scorer_of_tokenizer) -> None:
    scorer = scorer_of_tokenizer
    ids = scorer.tokenize("the cat the")
    tokens = scorer.tokenizer.convert_ids_to_tokens(ids)
    word = scorer.tokenize("the")
    assert ids[: len(word)] == ids[-len(word) :] == word
    assert "".join(tokens).replace("Ġ", "▁") == "▁the▁cat▁the"
    assert scorer.tokenize("  the \n cat\tthe ") == ids
    assert scorer.tokenize("") == scorer.tokenize(" \n") == []


def test_tokenizers_that_join_words_are_refused() -> None:
    backend = Tokenizer(
        tokenizer_models.BPE(
            vocab={"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4, "</s>": 5}, merges=[("a", " "), ("a ", "b")]
        )
    )
    backend.decoder = decoders.Fuse()
    scorer = CausalLMScorer(tiny_lm("llama"), PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    with pytest.raises(ValueError, match="independently of their neighbours"):
        scorer.tokenize("a b")


def test_a_tokenizer_that_splits_most_texts_only_is_found_out() -> None:
    """Letters a and b are split, but one merge goes from c to the next word."""
    letters = {"a": 0, "b": 1, "c": 2, " ": 3, "c ": 4, "</s>": 5}
    backend = Tokenizer(tokenizer_models.BPE(vocab=letters, merges=[("c", " ")]))
    scorer = CausalLMScorer(tiny_lm("llama"), PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert scorer.splits_at_words("ab ca b") and not scorer.splits_at_words("c a")


def test_tokens_outside_the_model_are_refused() -> None:
    scorer = CausalLMScorer(tiny_lm("llama", vocab_size=20), TOKENIZER)
    with pytest.raises(ValueError, match="tokens: expected ids 0 to 19"):
        scorer.tokenize("the")
