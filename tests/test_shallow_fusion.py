"""ShallowFusionLogitsProcessor inside transformers' generate, against searches written out in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from joint_search_reference import HookedGPT2
from tiny_models import tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedModel

from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.shallow_fusion import ShallowFusionLogitsProcessor

VOCAB_SIZE = 5
EOS, BOS, PAD = 4, 3, 1  # padding is an ordinary token on purpose
STEPS = 3
BEAM = {"do_sample": False, "length_penalty": 0.0, "early_stopping": "never"}
PROMPT = torch.tensor([[2, 0]])


def llama(seed: int, vocab_size: int = VOCAB_SIZE, scale: float = 0.9) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=scale, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(cls: type[GPT2LMHeadModel] = GPT2LMHeadModel) -> GPT2LMHeadModel:
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4, bos_token_id=BOS,
        eos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return cls(config).eval()


def scorer(model: PreTrainedModel) -> CausalLMScorer:
    """A scorer of token ids; its tokenizer only says which of them are BOS and EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(EOS)
    return CausalLMScorer(model, tokenizer)


@pytest.fixture(scope="module")
def main() -> PreTrainedModel:
    return llama(0)


@pytest.fixture(scope="module")
def external() -> CausalLMScorer:
    return scorer(llama(1))


@pytest.fixture(scope="module")
def internal() -> CausalLMScorer:
    return scorer(llama(2))


@torch.no_grad()
def next_log_probs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, -1].float(), dim=-1).tolist()


def fused_log_probs(main, prompt: list[int], history: list[int], terms) -> list[float]:
    """One step of the fusion, without caches: `terms` are (model or log-probs per token, scale)."""
    total = next_log_probs(main, prompt + history)
    for term, scale in terms:
        if isinstance(term, CausalLMScorer):
            log_probs = next_log_probs(term.model, [*term.start_token_ids, *history])
        else:
            log_probs = term.tolist()
        total = [a + scale * b for a, b in zip(total, log_probs, strict=True)]
    return total


def best_of_all(main, prompt: list[int], terms, num_best: int) -> list[tuple[list[int], float]]:
    """The best of all sequences that end in EOS within STEPS tokens or are cut there."""
    scored = []
    for length in range(STEPS + 1):
        for body in itertools.product([token for token in range(VOCAB_SIZE) if token != EOS], repeat=length):
            tokens = [*body, EOS] if length < STEPS else list(body)
            steps = (fused_log_probs(main, prompt, tokens[:i], terms)[token] for i, token in enumerate(tokens))
            scored.append((tokens, sum(steps)))
    return sorted(scored, key=lambda entry: -entry[1])[:num_best]


def generated(sequence: torch.Tensor, prompt_width: int) -> list[int]:
    tokens = sequence[prompt_width:].tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


UNIGRAM = torch.log_softmax(torch.tensor([0.5, -1.0, 2.0, 0.0, -0.5]), dim=0)


@pytest.mark.parametrize("prior", ["none", "unigram", "model"])
def test_a_beam_as_wide_as_everything_finds_the_best_sequences(main, external, internal, prior: str) -> None:
    term = {"none": None, "unigram": UNIGRAM, "model": internal}[prior]
    processor = ShallowFusionLogitsProcessor(
        external, 0.7, prior=term, prior_weight=0.4 if term is not None else 0.0, eos_token_id=EOS
    )
    num_beams = 4**STEPS
    output = main.generate(
        PROMPT, max_new_tokens=STEPS, num_beams=num_beams, num_return_sequences=6, logits_processor=[processor],
        return_dict_in_generate=True, output_scores=True, **BEAM,
    )  # fmt: skip
    terms = [(external, 0.7)] + ([] if term is None else [(term, -0.4)])
    expected = best_of_all(main, PROMPT[0].tolist(), terms, 6)
    found = [generated(sequence, 2) for sequence in output.sequences]
    assert found == [tokens for tokens, _ in expected]
    assert output.sequences_scores.tolist() == pytest.approx([score for _, score in expected], abs=1e-4)
    plain = [tokens for tokens, _ in best_of_all(main, PROMPT[0].tolist(), [], 6)]
    assert found != plain  # the language model had a say


def test_greedy_search_equals_a_loop_without_cache(main, external, internal) -> None:
    processor = ShallowFusionLogitsProcessor(external, 0.9, prior=internal, prior_weight=0.5, eos_token_id=EOS)
    output = main.generate(
        PROMPT, max_new_tokens=8, do_sample=False, logits_processor=[processor],
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    history: list[int] = []
    for step_scores in output.scores:
        expected = fused_log_probs(main, PROMPT[0].tolist(), history, [(external, 0.9), (internal, -0.5)])
        difference = step_scores[0] - torch.tensor(expected)  # the same for all tokens: logits are not normalised
        assert difference.tolist() == pytest.approx([float(difference[0])] * VOCAB_SIZE, abs=1e-4)
        history.append(max(range(VOCAB_SIZE), key=expected.__getitem__))
    assert generated(output.sequences[0], 2) == history


class Recorder(LogitsProcessor):
    """Keeps what each call gives and checks it against the same rows without any cache."""

    def __init__(self, processor: ShallowFusionLogitsProcessor, prompt_width: int) -> None:
        self.processor = processor
        self.prompt_width = prompt_width
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        fused = self.processor(input_ids, scores)
        for row in range(len(input_ids)):
            history = input_ids[row, self.prompt_width :].tolist()
            if EOS not in history:
                lm = torch.tensor(next_log_probs(self.processor.lm.model, [BOS, *history]))
                torch.testing.assert_close(fused[row], scores[row] + self.processor.weight * lm, atol=1e-4, rtol=0)
        self.num_calls += 1
        return fused


@pytest.mark.parametrize("parents", ["auto", "recompute"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
        {"num_beams": 3, **BEAM},
        {"num_beams": 4, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "beam", "beam-sampling"],
)
def test_every_row_of_every_search_has_its_own_history(main, external, parents: str, options: dict) -> None:
    torch.manual_seed(0)
    processor = ShallowFusionLogitsProcessor(external, 0.8, eos_token_id=EOS, parents=parents)
    recorder = Recorder(processor, 3)
    prompts = torch.tensor([[PAD, 2, 0], [0, 2, 2]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    main.generate(prompts, attention_mask=mask, max_new_tokens=9, logits_processor=[recorder], **options)
    assert recorder.num_calls > 3


def test_hook_and_matching_give_the_same(external) -> None:
    outputs = {}
    for cls in (GPT2LMHeadModel, HookedGPT2):
        model = gpt2(cls)
        processor = ShallowFusionLogitsProcessor(external, 0.8, eos_token_id=EOS)
        if cls is HookedGPT2:
            model.processor = processor
        outputs[cls] = model.generate(
            PROMPT, max_new_tokens=9, num_beams=4, num_return_sequences=4, logits_processor=[Recorder(processor, 2)],
            **BEAM,
        )  # fmt: skip
    assert model.num_reorders > 0
    assert torch.equal(outputs[GPT2LMHeadModel], outputs[HookedGPT2])


def test_a_false_announcement_is_noticed(external) -> None:
    processor = ShallowFusionLogitsProcessor(external, 0.8, eos_token_id=EOS)
    scores = torch.zeros(2, VOCAB_SIZE)
    processor(torch.tensor([[2], [2]]), scores)
    processor(torch.tensor([[2, 0], [2, 1]]), scores)
    processor.reorder(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="expected rows that continue"):
        processor(torch.tensor([[2, 0, 2], [2, 1, 2]]), scores)


def test_weights_of_zero_touch_nothing_and_run_no_model(main, external, internal) -> None:
    calls = []
    handles = [lm.model.register_forward_pre_hook(lambda *_: calls.append(1)) for lm in (external, internal)]
    scores = torch.randn(1, VOCAB_SIZE)
    off = ShallowFusionLogitsProcessor(external, 0.0, prior=internal, eos_token_id=EOS)
    assert off(PROMPT, scores) is scores and not calls
    only_prior = ShallowFusionLogitsProcessor(external, 0.0, prior=internal, prior_weight=0.5, eos_token_id=EOS)
    fused = only_prior(PROMPT, scores)
    assert len(calls) == 1
    expected = scores[0] - 0.5 * torch.tensor(next_log_probs(internal.model, [BOS]))
    torch.testing.assert_close(fused[0], expected, atol=1e-5, rtol=0)
    for handle in handles:
        handle.remove()
    fused_with_itself = ShallowFusionLogitsProcessor(scorer(main), 0.0, eos_token_id=EOS)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3, **BEAM}
    assert torch.equal(
        main.generate(PROMPT, **options), main.generate(PROMPT, logits_processor=[fused_with_itself], **options)
    )


def test_fusion_minus_the_same_model_as_prior_cancels(external) -> None:
    processor = ShallowFusionLogitsProcessor(external, 0.6, prior=external, prior_weight=0.6, eos_token_id=EOS)
    scores = torch.randn(3, VOCAB_SIZE)
    for width in (1, 2, 3):
        ids = torch.tensor([[0, 1, 2], [0, 2, 2], [0, 2, 1]])[:, :width]
        torch.testing.assert_close(processor(ids, scores), scores, atol=1e-5, rtol=0)


def test_scores_are_added_to_as_they_are(external) -> None:
    logits = 3.0 * torch.randn(2, VOCAB_SIZE)
    ids = torch.zeros(2, 1, dtype=torch.long)
    lm_log_probs = torch.tensor(next_log_probs(external.model, [BOS]))
    log_probs = torch.log_softmax(logits, 1)
    # The last are like joint scores, of which a row may sum to little: that is what its hypothesis costs.
    for scores in (logits, log_probs, logits.double(), log_probs - torch.tensor([[1.0], [9.0]])):
        fused = ShallowFusionLogitsProcessor(external, 0.6, eos_token_id=EOS)(ids, scores)
        assert fused.dtype == scores.dtype
        torch.testing.assert_close(fused.float(), scores.float() + 0.6 * lm_log_probs, atol=1e-5, rtol=0)


def test_forbidden_tokens_stay_forbidden(external, internal) -> None:
    scores = torch.randn(1, VOCAB_SIZE)
    scores[0, 2] = -math.inf
    processor = ShallowFusionLogitsProcessor(external, 0.6, prior=internal, prior_weight=0.1, eos_token_id=EOS)
    handle = internal.model.lm_head.register_forward_hook(
        lambda _, args, logits: logits.masked_fill(torch.arange(VOCAB_SIZE) == 2, -math.inf)
    )
    fused = processor(torch.zeros(1, 1, dtype=torch.long), scores)
    handle.remove()
    assert fused[0, 2] == -math.inf and bool(fused[0, [0, 1, 3, 4]].isfinite().all())


def test_padding_after_eos_is_no_history(external) -> None:
    calls = []
    processor = ShallowFusionLogitsProcessor(external, 1.0, eos_token_id=[EOS, 0])
    scores = torch.zeros(2, VOCAB_SIZE)
    handle = external.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for width in range(1, 5):  # row 0 ends at width 2, row 1 with the other EOS at width 3
        processor(torch.tensor([[2, EOS, PAD, PAD], [2, 1, 0, PAD]])[:, :width], scores)
    handle.remove()
    assert calls == [1, 1]  # the start, then row 1 once


def test_eos_is_scored_by_the_eos_of_the_language_model() -> None:
    lm = scorer(llama(3, vocab_size=9))  # longer, as padded vocabularies are
    scores = torch.zeros(1, VOCAB_SIZE)
    fused = ShallowFusionLogitsProcessor(lm, 1.0, eos_token_id=[2, 1])(torch.zeros(1, 1, dtype=torch.long), scores)
    lm_log_probs = next_log_probs(lm.model, [BOS])
    expected = [lm_log_probs[0], lm_log_probs[EOS], lm_log_probs[EOS], lm_log_probs[3], lm_log_probs[EOS]]
    assert fused[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_steps_back_of_speculative_decoding(main, external) -> None:
    draft = llama(7)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    plain = main.generate(
        PROMPT, max_new_tokens=12, do_sample=False,
        logits_processor=[ShallowFusionLogitsProcessor(external, 0.5, eos_token_id=EOS)],
    )  # fmt: skip
    processor = ShallowFusionLogitsProcessor(external, 0.5, eos_token_id=EOS)
    replays = []
    replay = processor._replay
    processor._replay = lambda *args: replays.append(1) or replay(*args)
    drafted = main.generate(
        PROMPT, max_new_tokens=12, do_sample=False, assistant_model=draft, logits_processor=[Recorder(processor, 2)]
    )
    assert torch.equal(plain, drafted)
    assert len(replays) > 1  # the draft was rejected at least once


def test_reuse_in_another_generate(main, external) -> None:
    processor = ShallowFusionLogitsProcessor(external, 0.8, eos_token_id=EOS)
    options = {"max_new_tokens": 6, "num_beams": 3, "logits_processor": [processor], **BEAM}
    first = main.generate(PROMPT, **options)
    assert torch.equal(main.generate(PROMPT, **options), first)  # not wider than the prompt was: starts afresh
    longer = torch.tensor([[2, 0, 1, 1]])
    with pytest.raises(ValueError, match="call reset\\(\\) before a new generate"):
        main.generate(longer, **options)
    processor.reset()
    expected = main.generate(
        longer,
        **{**options, "logits_processor": [ShallowFusionLogitsProcessor(external, 0.8, eos_token_id=EOS)]},
    )
    assert torch.equal(main.generate(longer, **options), expected)


def test_inputs_embeds_start_with_an_empty_width(main, external) -> None:
    embeds = main.get_input_embeddings()(PROMPT)
    recorder = Recorder(ShallowFusionLogitsProcessor(external, 0.8, eos_token_id=EOS), 0)
    found = main.generate(inputs_embeds=embeds, max_new_tokens=6, num_beams=3, logits_processor=[recorder], **BEAM)
    processor = ShallowFusionLogitsProcessor(external, 0.8, eos_token_id=EOS)
    expected = main.generate(PROMPT, max_new_tokens=6, num_beams=3, logits_processor=[processor], **BEAM)
    assert torch.equal(found, expected[:, 2:]) and recorder.num_calls > 1


def test_bad_arguments_are_named(external) -> None:
    def build(lm=external, weight=0.5, eos_token_id=EOS, **options):
        return ShallowFusionLogitsProcessor(lm, weight, eos_token_id=eos_token_id, **options)

    for options, message in (
        ({"weight": -0.1}, "weight: expected a finite number of at least 0, got -0.1"),
        ({"weight": math.nan}, "weight: expected a finite"),
        ({"weight": math.inf}, "weight: expected a finite number of at least 0, got inf"),
        ({"prior": UNIGRAM, "prior_weight": -1.0}, "prior_weight: expected a finite"),
        ({"prior_weight": 0.5}, "prior: expected log-probs or a scorer for prior_weight 0.5, got None"),
        ({"prior": UNIGRAM[None]}, r"prior: expected finite log-probs \[V\], got shape \(1, 5\)"),
        ({"prior": torch.tensor([0.0, -math.inf])}, "with 1 values that are not finite"),
        ({"parents": "guess"}, "parents: expected"),
        ({"eos_token_id": []}, "eos_token_id: expected one or more token ids"),
        ({"eos_token_id": -1}, "eos_token_id: expected one or more token ids, got -1"),
        ({"eos_token_id": 1.5}, "eos_token_id: expected one or more token ids, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    ids = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="eos_token_id: expected ids below the vocabulary size 5, got .7."):
        build(eos_token_id=7)(ids, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="lm: expected a vocabulary of at least the 6 tokens .* got 5"):
        build()(ids, torch.zeros(1, 6))
    with pytest.raises(ValueError, match="prior: expected a vocabulary of at least the 7"):
        build(lm=scorer(llama(0, vocab_size=7)), prior=external, prior_weight=0.1)(ids, torch.zeros(1, 7))
    with pytest.raises(ValueError, match="prior: expected 5 log-probs, one per token, got 4"):
        build(prior=UNIGRAM[:4], prior_weight=0.1)(ids, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="prior: expected 5 log-probs, one per token, got 6"):
        build(prior=torch.zeros(6), prior_weight=0.1)(ids, torch.zeros(1, 5))
