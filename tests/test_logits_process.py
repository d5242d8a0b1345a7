"""CTCPrefixLogitsProcessor inside transformers' generate, against searches written out in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from ctc_reference import textbook_prefix_log_prob
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_speechllm.ctc_prefix_score import CTCPrefixScorer
from hf_speechllm.label_chains import LabelChains
from hf_speechllm.label_units import LabelUnits
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor

VOCAB_SIZE = 14
NUM_LABELS = 10  # tokens 0 to 8 and the blank 9; tokens 9 to 13 have no label
BLANK = 9
EOS = 12
PAD = 3  # a label on purpose: padding after EOS must not count as speech
SUBSET = torch.tensor([11, 2, 7, 0, 5, 13, 4, 8, 1])  # a LabelUnits subset with the blank first
BEAM = {"do_sample": False, "length_penalty": 0.0, "early_stopping": "never"}


class HookedGPT2(GPT2LMHeadModel):
    """A model that tells the processor which beams survived."""

    ctc_processor: CTCPrefixLogitsProcessor | None = None
    num_reorders = 0

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.reorder_cache(beam_idx)
        self.ctc_processor.reorder(beam_idx)
        self.num_reorders += 1
        return past_key_values


def tiny_gpt2(cls: type[PreTrainedModel] = GPT2LMHeadModel) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.4, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return cls(config).eval()


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def random_log_probs(*shape: int, seed: int = 0, peak: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * peak).log_softmax(-1)


@dataclass
class Joint:
    """The joint score of one utterance, from its definition: a new LLM pass and a new CTC recursion per hypothesis."""

    llm_logits: Callable[[tuple[int, ...]], torch.Tensor]  # generated tokens -> [V]
    log_probs: torch.Tensor  # [T, A]
    weight: float
    blank_id: int = BLANK
    labels: tuple[int, ...] | None = None  # token of each position of the label axis; None: the same ids
    eos: tuple[int, ...] = (EOS,)

    def step_scores(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """[V] scores of the tokens that may follow `tokens`."""
        axis = self.labels or tuple(range(self.log_probs.shape[1]))
        label_of = {token: label for label, token in enumerate(axis) if label != self.blank_id}
        llm = self.llm_logits(tokens).double().log_softmax(-1)
        prefix = tuple(label_of[token] for token in tokens)
        psi, exact = textbook_prefix_log_prob(self.log_probs, self.blank_id, prefix)
        scores = torch.full_like(llm, -math.inf)
        for token, label in label_of.items():
            gain = textbook_prefix_log_prob(self.log_probs, self.blank_id, (*prefix, label))[0] - psi
            scores[token] = (1 - self.weight) * llm[token] + self.weight * gain
        for token in self.eos:
            scores[token] = (1 - self.weight) * llm[token] + self.weight * (exact - psi)
        return scores

    def greedy(self, max_new_tokens: int) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        while len(tokens) < max_new_tokens and not set(tokens) & set(self.eos):
            tokens += (int(self.step_scores(tokens).argmax()),)
        return tokens

    def beam_search(self, num_beams: int, max_new_tokens: int) -> list[tuple[float, tuple[int, ...]]]:
        """The num_beams best (score, tokens), by transformers' rules without length penalty and early stopping."""
        running, finished = [(0.0, ())], []
        for length in range(1, max_new_tokens + 1):
            candidates = []
            for score, tokens in running:
                step = self.step_scores(tokens)
                candidates += [(score + float(step[c]), (*tokens, c)) for c in range(len(step)) if step[c] > -math.inf]
            candidates = sorted(candidates, reverse=True)[: (1 + len(self.eos)) * num_beams]
            has_ended = [tokens[-1] in self.eos or length == max_new_tokens for _, tokens in candidates]
            finished += [c for c, ended in zip(candidates[:num_beams], has_ended, strict=False) if ended]
            running = [c for c, ended in zip(candidates, has_ended, strict=True) if not ended][:num_beams]
        return sorted(finished, reverse=True)[:num_beams]


def llm_of(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """LLM logits after a prompt of token ids [W] or embeddings [W, H]."""

    @torch.no_grad()
    def logits(tokens: tuple[int, ...]) -> torch.Tensor:
        embed = model.get_input_embeddings()
        before = prompt if prompt.is_floating_point() else embed(prompt)
        rows = torch.cat((before, embed(torch.tensor(tokens, dtype=torch.long))))
        return model(inputs_embeds=rows[None]).logits[0, -1]

    return logits


def prompt_inputs(model: PreTrainedModel, kind: str, num_utterances: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if kind == "input_ids":
        ids = torch.randint(0, VOCAB_SIZE - 2, (num_utterances, 4), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    embeds = torch.randn(num_utterances, 4, 16, generator=generator)
    return {"inputs_embeds": embeds, "attention_mask": torch.ones(num_utterances, 4, dtype=torch.long)}


def run(model: PreTrainedModel, processor: CTCPrefixLogitsProcessor | None, inputs: dict, **options):
    """generate with scores; `.new_tokens` are the rows without prompt, cut after EOS."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD} | options
    processors = LogitsProcessorList([] if processor is None else [processor])
    out = model.generate(
        **inputs, logits_processor=processors, return_dict_in_generate=True, output_scores=True, **options
    )
    prompt_width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    out.new_tokens = [cut(row) for row in out.sequences[:, prompt_width:].tolist()]
    return out


def cut(row: list[int], eos: tuple[int, ...] = (EOS,)) -> tuple[int, ...]:
    ends = [position for position, token in enumerate(row) if token in eos]
    return tuple(row[: ends[0] + 1] if ends else row)


LENGTHS = torch.tensor([6, 4])


def two_utterances(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return random_log_probs(2, 6, NUM_LABELS, seed=11).to(dtype), LENGTHS


def two_utterance_processor(weight: float = 0.4, **options) -> CTCPrefixLogitsProcessor:
    return CTCPrefixLogitsProcessor(CTCPrefixScorer.from_log_probs(*two_utterances(), BLANK), weight, EOS, **options)


def references(model: PreTrainedModel, inputs: dict, weight: float = 0.4) -> list[Joint]:
    log_probs, lengths = two_utterances()
    prompts = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    rows = zip(prompts, log_probs, lengths, strict=True)
    return [Joint(llm_of(model, prompt), frames[:length], weight) for prompt, frames, length in rows]


@pytest.mark.parametrize("kind", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_reference(name: str, kind: str) -> None:
    model = MODELS[name]()
    inputs = prompt_inputs(model, kind, 2)
    out = run(model, two_utterance_processor(), inputs)
    want = [joint.greedy(6) for joint in references(model, inputs)]
    assert out.new_tokens == want
    assert want != [joint.greedy(6) for joint in references(model, inputs, 0.0001)]  # CTC does decide something


@pytest.mark.parametrize("kind", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("name", MODELS)
def test_beam_search_equals_reference(name: str, kind: str) -> None:
    model = MODELS[name]()
    inputs = prompt_inputs(model, kind, 2)
    out = run(model, two_utterance_processor(), inputs, num_beams=3, num_return_sequences=3, max_new_tokens=4, **BEAM)
    want = [hypothesis for joint in references(model, inputs) for hypothesis in joint.beam_search(3, 4)]
    assert out.new_tokens == [tokens for _, tokens in want]
    assert out.sequences_scores.tolist() == pytest.approx([score for score, _ in want], abs=1e-4)


def test_wide_beam_finds_the_best_of_all_sequences() -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "inputs_embeds", 1)
    log_probs = random_log_probs(3, 4, seed=2)  # 3 labels
    joint = Joint(llm_of(model, inputs["inputs_embeds"][0]), log_probs, 0.5, blank_id=3)
    complete: list[tuple[float, tuple[int, ...]]] = []

    def grow(score: float, tokens: tuple[int, ...]) -> None:
        step = joint.step_scores(tokens)
        complete.append((score + float(step[EOS]), (*tokens, EOS)))
        for token in range(3):
            if len(tokens) < 3 and step[token] > -math.inf:
                grow(score + float(step[token]), (*tokens, token))

    grow(0.0, ())
    processor = CTCPrefixLogitsProcessor(
        CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([3]), 3), 0.5, EOS
    )
    out = run(model, processor, inputs, num_beams=40, **BEAM)
    assert out.new_tokens == [max(complete)[1]]
    assert float(out.sequences_scores[0]) == pytest.approx(max(complete)[0], abs=1e-4)


def test_sampling_scores_equal_reference() -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "input_ids", 2)
    torch.manual_seed(0)
    out = run(model, two_utterance_processor(), inputs, do_sample=True, top_k=0, num_return_sequences=3)
    joints = references(model, inputs)
    assert len(set(out.new_tokens)) > 2
    for row, tokens in enumerate(out.new_tokens):
        for step in range(len(tokens)):
            want = joints[row // 3].step_scores(tokens[:step])
            torch.testing.assert_close(out.scores[step][row].double(), want, rtol=0, atol=1e-4)


def test_beam_sampling_runs_on_reachable_tokens() -> None:
    model = tiny_gpt2()
    torch.manual_seed(0)
    options = {"do_sample": True, "num_beams": 3, "length_penalty": 0.0, "top_k": 0}
    out = run(model, two_utterance_processor(), prompt_inputs(model, "input_ids", 2), **options)
    assert all(set(tokens) <= {*range(BLANK), EOS} for tokens in out.new_tokens)


@pytest.mark.parametrize("kind", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_hook_matching_and_recomputing_agree(kind: str, num_beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hooked = tiny_gpt2(), tiny_gpt2(HookedGPT2)
    inputs = prompt_inputs(model, kind, 2)
    options = {"num_beams": num_beams, "num_return_sequences": num_beams} | (BEAM if num_beams > 1 else {})
    matching = run(model, two_utterance_processor(), inputs, **options)
    recompute = run(model, two_utterance_processor(parents="recompute"), inputs, **options)
    hooked.ctc_processor = two_utterance_processor()
    if num_beams > 1:
        monkeypatch.setattr(CTCPrefixLogitsProcessor, "_match", None)  # the hook alone must do
    hook = run(hooked, hooked.ctc_processor, inputs, **options)
    assert (hooked.num_reorders > 0) == (num_beams > 1)
    for other in (recompute, hook):
        assert torch.equal(other.sequences, matching.sequences)
        for got, want in zip(other.scores, matching.scores, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_beams_may_be_permuted_and_doubled_between_calls() -> None:
    processor, oracle = two_utterance_processor(), two_utterance_processor(parents="recompute")
    rows = torch.tensor([[1], [2], [3], [4], [5], [6]])  # 2 utterances, 3 beams
    steps = [rows[:, :0], rows, torch.tensor([[3, 1], [1, 1], [3, 7], [6, 6], [4, 5], [4, 4]])]
    steps += [torch.cat((steps[-1][[2, 2, 0, 5, 3, 4]], torch.tensor([[2], [7], [EOS], [1], [1], [5]])), 1)]
    scores = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    buffer = torch.empty(6, 8, dtype=torch.long)  # a search may overwrite its rows in place
    for input_ids in steps:
        view = buffer[:, : input_ids.shape[1]].copy_(input_ids)
        torch.testing.assert_close(processor(view, scores), oracle(input_ids, scores), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2, **BEAM}])
def test_weight_zero_is_plain_generate(options: dict) -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "input_ids", 2)
    plain, joint = run(model, None, inputs, **options), run(model, two_utterance_processor(0.0), inputs, **options)
    assert torch.equal(plain.sequences, joint.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, joint.scores, strict=True))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, **BEAM}])
def test_batch_equals_single(options: dict) -> None:
    model = tiny_llama()
    inputs = prompt_inputs(model, "inputs_embeds", 2)
    together = run(model, two_utterance_processor(), inputs, **options)
    log_probs, lengths = two_utterances()
    for row in range(2):
        scorer = CTCPrefixScorer.from_log_probs(log_probs[row : row + 1], lengths[row : row + 1], BLANK)
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = run(model, CTCPrefixLogitsProcessor(scorer, 0.4, EOS), one, **options)
        assert alone.new_tokens == [together.new_tokens[row]]


def test_finished_rows_ignore_what_follows_eos() -> None:
    processor = two_utterance_processor()
    scores = torch.zeros(2, VOCAB_SIZE)
    input_ids = torch.empty(2, 0, dtype=torch.long)
    for token in ([1, EOS], [2, PAD], [4, 1]):
        out = processor(input_ids, scores)
        if token == [2, PAD]:
            at_end = out[1]
        input_ids = torch.cat((input_ids, torch.tensor([token]).T), 1)
    out = processor(input_ids, scores)
    assert torch.equal(out[1], at_end)
    assert not out.isnan().any()


def test_ambiguous_llm_is_decided_by_ctc() -> None:
    """An LLM that slightly prefers the wrong homophone, and audio that says the right one."""
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.lm_head.weight)  # uniform; ties the embedding, which no longer matters
    biases = {"sequence_bias": {(5,): 4.1, (6,): 4.0, (EOS,): 3.0}}
    inputs = prompt_inputs(model, "inputs_embeds", 1)
    probs = torch.full((1, 5, NUM_LABELS), 0.01)
    probs[0, :, BLANK] = 0.9
    probs[0, 2, 6], probs[0, 2, 5], probs[0, 2, BLANK] = 0.8, 0.1, 0.02
    scorer = CTCPrefixScorer.from_log_probs(probs.log(), torch.tensor([5]), BLANK)
    for options in ({}, {"num_beams": 2, **BEAM}):
        alone = run(model, CTCPrefixLogitsProcessor(scorer, 0.0, EOS), inputs, **biases, **options)
        joint = run(model, CTCPrefixLogitsProcessor(scorer, 0.4, EOS), inputs, **biases, **options)
        assert alone.new_tokens[0][0] == 5
        assert joint.new_tokens == [(6, EOS)]  # and the hallucinated repetition is gone


def test_subset_units_two_eos_ids_and_wide_vocabulary() -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "inputs_embeds", 1)
    log_probs = random_log_probs(6, NUM_LABELS, seed=4)
    units = LabelUnits.from_token_ids(SUBSET, VOCAB_SIZE, blank_id=0)
    labels, eos = (-1, *SUBSET.tolist()), (9, EOS)
    joint = Joint(llm_of(model, inputs["inputs_embeds"][0]), log_probs, 0.3, 0, labels, eos)
    scorer = CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([6]), 0)
    for eos_token_id in (list(eos), torch.tensor(eos)):
        processor = CTCPrefixLogitsProcessor(scorer, 0.3, eos_token_id, units)
        greedy = run(model, processor, inputs, eos_token_id=list(eos))
        assert [cut(row, eos) for row in greedy.sequences.tolist()] == [joint.greedy(6)]
    out = run(model, processor, inputs, eos_token_id=list(eos), num_beams=2, num_return_sequences=2, **BEAM)
    want = joint.beam_search(2, 6)
    assert [cut(row, eos) for row in out.sequences.tolist()] == [tokens for _, tokens in want]
    assert out.sequences_scores.tolist() == pytest.approx([score for score, _ in want], abs=1e-4)


def test_top_k_scores_equal_full_scores_inside_the_subset() -> None:
    log_probs, lengths = two_utterances()
    units = LabelUnits.from_token_ids(SUBSET, VOCAB_SIZE, blank_id=BLANK)
    full = CTCPrefixLogitsProcessor(CTCPrefixScorer.from_log_probs(log_probs, lengths, BLANK), 0.4, EOS, units)
    scorer = CTCPrefixScorer.from_log_probs(log_probs, lengths, BLANK, top_k=4)
    pruned = CTCPrefixLogitsProcessor(scorer, 0.4, EOS, units)
    scores = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(4, VOCAB_SIZE, dtype=torch.bool)
    inside.scatter_(1, SUBSET[scorer.labels].repeat_interleave(2, 0), True)
    inside[:, EOS] = True
    first = SUBSET[scorer.labels[:, :2]].reshape(4, 1)
    for input_ids in (first[:, :0], first, torch.cat((first, first), 1)):
        want = full(input_ids, scores).masked_fill(~inside, -math.inf)
        torch.testing.assert_close(pruned(input_ids, scores), want, rtol=0, atol=1e-6)


def test_encoder_decoder_model() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2,
        dropout_rate=0.0, eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=PAD, initializer_factor=5.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    source = torch.tensor([[1, 2, 5]])

    @torch.no_grad()
    def logits(tokens: tuple[int, ...]) -> torch.Tensor:
        return model(input_ids=source, decoder_input_ids=torch.tensor([[PAD, *tokens]])).logits[0, -1]

    log_probs = random_log_probs(5, NUM_LABELS, seed=8)
    scorer = CTCPrefixScorer.from_log_probs(log_probs[None], torch.tensor([5]), BLANK)
    processor = CTCPrefixLogitsProcessor(scorer, 0.4, EOS)
    out = model.generate(
        source, logits_processor=LogitsProcessorList([processor]), max_new_tokens=4, num_beams=3, **BEAM
    )
    assert cut(out[0, 1:].tolist()) == Joint(logits, log_probs, 0.4).beam_search(3, 4)[0][1]


def test_prompt_lookup_steps_back_and_equals_greedy() -> None:
    model = tiny_llama()
    inputs = {"input_ids": torch.tensor([[1, 2, 5, 1, 2, 5, 1, 2]]), "attention_mask": torch.ones(1, 8).long()}
    log_probs = random_log_probs(1, 20, NUM_LABELS, seed=3)
    scorer = CTCPrefixScorer.from_log_probs(log_probs, torch.tensor([20]), BLANK)
    options = {"max_new_tokens": 12, "eos_token_id": EOS}
    greedy = run(model, CTCPrefixLogitsProcessor(scorer, 0.4, EOS), inputs, **options)
    replayed = []
    processor = CTCPrefixLogitsProcessor(scorer, 0.4, EOS)
    replay = processor._replay
    processor._replay = lambda *args: replayed.append(args) or replay(*args)
    drafted = run(model, processor, inputs, prompt_lookup_num_tokens=3, **options)
    assert drafted.new_tokens == greedy.new_tokens
    assert replayed


def test_logits_and_log_probs_give_the_same() -> None:
    processor = two_utterance_processor()
    logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 5 + 3
    input_ids = torch.empty(2, 0, dtype=torch.long)
    torch.testing.assert_close(
        processor(input_ids, logits), processor(input_ids, logits.log_softmax(-1)), rtol=0, atol=1e-5
    )


def test_scores_keep_their_dtype_and_are_not_modified() -> None:
    scores = torch.randn(2, VOCAB_SIZE, dtype=torch.bfloat16)
    before = scores.clone()
    out = two_utterance_processor()(torch.empty(2, 0, dtype=torch.long), scores)
    assert out.dtype == torch.bfloat16
    assert torch.equal(scores, before)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_forbidden_tokens_stay_forbidden(weight: float) -> None:
    scores = torch.zeros(2, VOCAB_SIZE)
    scores[0, [1, EOS]] = -math.inf
    out = two_utterance_processor(weight)(torch.empty(2, 0, dtype=torch.long), scores)
    assert (out[0, [1, EOS]] == -math.inf).all()
    assert out[1, [1, EOS]].isfinite().all()
    assert not out.isnan().any()


def test_forced_token_without_label_leaves_the_state() -> None:
    processor = two_utterance_processor()
    empty, scores = torch.empty(2, 0, dtype=torch.long), torch.zeros(2, VOCAB_SIZE)
    before = processor(empty, scores)
    forced = torch.full((2, VOCAB_SIZE), -math.inf)
    forced[:, 13] = 0.0
    assert processor(empty, forced).argmax(1).tolist() == [13, 13]
    assert torch.equal(processor(torch.tensor([[13], [13]]), scores), before)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, **BEAM}, {"do_sample": True}, {"num_beams": 3}])
def test_empty_audio_gives_an_empty_transcript(options: dict) -> None:
    model = tiny_gpt2()
    scorer = CTCPrefixScorer.from_log_probs(torch.zeros(1, 0, NUM_LABELS), torch.tensor([0]), BLANK)
    out = run(model, CTCPrefixLogitsProcessor(scorer, 0.3, EOS), prompt_inputs(model, "inputs_embeds", 1), **options)
    assert out.new_tokens == [(EOS,)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, **BEAM}, {"do_sample": True}])
def test_more_tokens_demanded_than_the_audio_holds(options: dict) -> None:
    model = tiny_gpt2()
    scorer = CTCPrefixScorer.from_log_probs(random_log_probs(1, 1, NUM_LABELS), torch.tensor([1]), BLANK)
    processor = CTCPrefixLogitsProcessor(scorer, 0.3, EOS)
    inputs = prompt_inputs(model, "inputs_embeds", 1)
    out = run(model, processor, inputs, min_new_tokens=3, max_new_tokens=5, **options)
    assert len(out.new_tokens[0]) >= 3
    assert not any(step.isnan().any() for step in out.scores)


def test_impossible_hypothesis_can_only_end() -> None:
    processor = two_utterance_processor()
    tokens, scores = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 0, 1, 0]]), torch.zeros(2, VOCAB_SIZE)
    for width in range(6):  # the second utterance has 4 frames
        out = processor(tokens[:, :width], scores)
    assert out[0, 1] > -math.inf
    assert out[1].isfinite().nonzero().tolist() == [[EOS]]


def test_reuse_on_the_same_audio() -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "input_ids", 2)
    processor = two_utterance_processor()
    first = run(model, processor, inputs, num_beams=3, **BEAM)
    assert run(model, processor, inputs).new_tokens == run(model, two_utterance_processor(), inputs).new_tokens
    assert torch.equal(run(model, processor, inputs, num_beams=3, **BEAM).sequences, first.sequences)
    longer = {name: torch.cat((value, value, value), 1) for name, value in inputs.items()}
    with pytest.raises(ValueError, match=r"input_ids: expected rows that continue the previous call's"):
        run(model, processor, longer)
    processor.reset()
    assert run(model, processor, longer).new_tokens == run(model, two_utterance_processor(), longer).new_tokens


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_beams=st.integers(1, 3), weight=st.sampled_from([0.1, 0.5, 1.0]))
def test_any_beam_history_equals_recomputing(seed: int, num_beams: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = random_log_probs(2, 7, NUM_LABELS, seed=seed)
    lengths = torch.randint(0, 8, (2,), generator=generator)
    scorer = CTCPrefixScorer.from_log_probs(log_probs, lengths, BLANK)
    processor = CTCPrefixLogitsProcessor(scorer, weight, EOS)
    oracle = CTCPrefixLogitsProcessor(scorer, weight, EOS, parents="recompute")
    input_ids = torch.randint(0, 5, (1, 3), generator=generator).expand(2 * num_beams, -1)
    for _ in range(5):
        scores = torch.randn(2 * num_beams, VOCAB_SIZE, generator=generator)
        out = processor(input_ids, scores)
        assert not out.isnan().any()
        assert out.isfinite().any(1).all()
        torch.testing.assert_close(out, oracle(input_ids, scores), rtol=0, atol=1e-5)
        parent = torch.randint(0, num_beams, (2, num_beams), generator=generator) + torch.tensor([[0], [num_beams]])
        token = torch.randint(0, VOCAB_SIZE, (2 * num_beams, 1), generator=generator)  # EOS and label-free ones too
        input_ids = torch.cat((input_ids[parent.flatten()], token), 1)


# Tokens that are chains of labels. Labels 0 to 2 are letters, 3 is the delimiter and 4 the blank.

SPELLING = {
    0: (0,), 1: (3, 0), 2: (3, 0, 1), 3: (1, 2), 4: (3, 0, 1), 5: (), 6: (2, 2), 7: (3,), 8: (3, 1, 2, 0), 9: (2,),
    11: (),
}  # fmt: skip


def chain_units() -> LabelChains:
    table = torch.full((VOCAB_SIZE, 4), -2, dtype=torch.int32)
    for token, labels in SPELLING.items():
        table[token] = torch.tensor([*labels, *[-1] * (4 - len(labels))])
    return LabelChains(4, 5, table, delimiter=3)


def chain_log_probs() -> torch.Tensor:
    return random_log_probs(2, 9, 5, seed=21)


def chain_processor(weight: float = 0.4, **options) -> CTCPrefixLogitsProcessor:
    scorer = CTCPrefixScorer.from_log_probs(chain_log_probs(), torch.tensor([9, 7]), 4)
    options = {"num_candidates": VOCAB_SIZE, "margin": math.inf} | options
    return CTCPrefixLogitsProcessor(scorer, weight, EOS, chain_units(), **options)


@dataclass
class JointOfChains(Joint):
    """The joint score where tokens are spelled by `SPELLING`."""

    def labels_of(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        labels: tuple[int, ...] = ()
        for token in tokens:
            chain = SPELLING[token]
            # No delimiter at the start, nor after another.
            labels += chain[1:] if chain[:1] == (3,) and labels[-1:] in ((), (3,)) else chain
        return labels

    def step_scores(self, tokens: tuple[int, ...]) -> torch.Tensor:
        llm = self.llm_logits(tokens).double().log_softmax(-1)
        prefix = self.labels_of(tokens)
        psi, exact = textbook_prefix_log_prob(self.log_probs, self.blank_id, prefix)
        scores = torch.full_like(llm, -math.inf)
        for token in SPELLING:
            labels = self.labels_of((*tokens, token))
            if labels == prefix:
                scores[token] = llm[token]
            else:
                gain = textbook_prefix_log_prob(self.log_probs, self.blank_id, labels)[0] - psi
                scores[token] = (1 - self.weight) * llm[token] + self.weight * gain
        scores[EOS] = (1 - self.weight) * llm[EOS] + self.weight * (exact - psi)
        return scores


def chain_references(model: PreTrainedModel, inputs: dict, weight: float = 0.4) -> list[JointOfChains]:
    rows = zip(inputs["input_ids"], chain_log_probs(), (9, 7), strict=True)
    return [JointOfChains(llm_of(model, prompt), frames[:n], weight, blank_id=4) for prompt, frames, n in rows]


def test_chains_greedy_and_beam_search_equal_reference() -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "input_ids", 2)
    joints = chain_references(model, inputs)
    assert run(model, chain_processor(), inputs).new_tokens == [joint.greedy(6) for joint in joints]
    out = run(model, chain_processor(), inputs, num_beams=3, num_return_sequences=3, max_new_tokens=4, **BEAM)
    want = [hypothesis for joint in joints for hypothesis in joint.beam_search(3, 4)]
    assert out.new_tokens == [tokens for _, tokens in want]
    assert out.sequences_scores.tolist() == pytest.approx([score for score, _ in want], abs=1e-4)
    assert {len(SPELLING[token]) for tokens in out.new_tokens for token in tokens if token != EOS} > {1, 2}


def test_chains_sampling_scores_equal_reference() -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "input_ids", 2)
    torch.manual_seed(0)
    out = run(model, chain_processor(0.1), inputs, do_sample=True, top_k=0, num_return_sequences=4)
    joints = chain_references(model, inputs, 0.1)
    assert any({5, 11} & {*tokens} for tokens in out.new_tokens)  # silent tokens
    for row, tokens in enumerate(out.new_tokens):
        for step in range(len(tokens)):
            want = joints[row // 4].step_scores(tokens[:step])
            torch.testing.assert_close(out.scores[step][row].double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_chains_hook_matching_recomputing_and_single_agree(num_beams: int) -> None:
    model, hooked = tiny_gpt2(), tiny_gpt2(HookedGPT2)
    inputs = prompt_inputs(model, "input_ids", 2)
    options = {"num_beams": num_beams, "num_return_sequences": num_beams} | (BEAM if num_beams > 1 else {})
    pruned = {"num_candidates": 4, "margin": 5.0}
    matching = run(model, chain_processor(**pruned), inputs, **options)
    recompute = run(model, chain_processor(**pruned, parents="recompute"), inputs, **options)
    hooked.ctc_processor = chain_processor(**pruned)
    hook = run(hooked, hooked.ctc_processor, inputs, **options)
    assert recompute.new_tokens == hook.new_tokens == matching.new_tokens
    for row in range(2):
        scorer = CTCPrefixScorer.from_log_probs(chain_log_probs()[row : row + 1], torch.tensor([9 - 2 * row]), 4)
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = run(model, CTCPrefixLogitsProcessor(scorer, 0.4, EOS, chain_units(), **pruned), one, **options)
        assert alone.new_tokens == matching.new_tokens[row * num_beams :][:num_beams]


@pytest.mark.parametrize("weight", [0.4, 1.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_chains_of_one_label_equal_label_units(weight: float, top_k: int | None) -> None:
    log_probs, lengths = two_utterances()
    units = LabelUnits.from_token_ids(SUBSET, VOCAB_SIZE, blank_id=BLANK)
    table = units.token_to_label[:, None].masked_fill(units.token_to_label[:, None] < 0, -2)
    chains = LabelChains(BLANK, NUM_LABELS, table)
    scorer = CTCPrefixScorer.from_log_probs(log_probs, lengths, BLANK, top_k=top_k)
    single = CTCPrefixLogitsProcessor(scorer, weight, EOS, units)
    joint = CTCPrefixLogitsProcessor(scorer, weight, EOS, chains, num_candidates=3)
    generator = torch.Generator().manual_seed(0)
    for input_ids in (torch.empty(4, 0).long(), SUBSET[:4, None], torch.stack((SUBSET[:4], SUBSET[2:6]), 1)):
        scores = torch.randn(4, VOCAB_SIZE, generator=generator)
        scores[0, SUBSET[1]] = -math.inf
        want, got = single(input_ids, scores), joint(input_ids, scores)
        best = (
            want.index_fill(1, torch.tensor(EOS), -math.inf).topk(3).indices
        )  # chains of one label: no bound but exact
        is_best = (
            torch.zeros_like(want, dtype=torch.bool).scatter_(1, best, True).index_fill_(1, torch.tensor(EOS), True)
        )
        torch.testing.assert_close(got, want.masked_fill(~is_best, -math.inf), rtol=0, atol=1e-5)


def test_chains_weight_zero_is_plain_generate() -> None:
    model = tiny_gpt2()
    inputs = prompt_inputs(model, "input_ids", 2)
    joint = run(model, chain_processor(0.0), inputs, num_beams=3, **BEAM)
    assert torch.equal(run(model, None, inputs, num_beams=3, **BEAM).sequences, joint.sequences)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_candidates_and_margin_leave_the_best(weight: float) -> None:
    scores = torch.randn(2, VOCAB_SIZE + 3, generator=torch.Generator().manual_seed(1)) * 3  # padded LLM output
    scores[0, 9] = -math.inf
    empty = torch.empty(2, 0, dtype=torch.long)
    exact, few = (
        chain_processor(weight)(empty, scores),
        chain_processor(weight, num_candidates=6, margin=2.0)(empty, scores),
    )
    is_kept = few > -math.inf
    assert torch.equal(few[is_kept], exact[is_kept])
    assert torch.equal(few.argmax(1), exact.argmax(1))
    assert is_kept.sum() < (exact > -math.inf).sum()
    assert is_kept[:, EOS].all()
    assert not exact.isnan().any()
    spellable = torch.zeros(VOCAB_SIZE + 3, dtype=torch.bool).index_fill_(0, torch.tensor([*SPELLING, EOS]), True)
    assert torch.equal(exact[1] > -math.inf, spellable)


def test_silent_tokens_are_as_dear_as_without_ctc() -> None:
    """At weight 1 too, where a gain of 0 would be the best there is."""
    scores = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    out = chain_processor(1.0)(torch.empty(2, 0, dtype=torch.long), scores)
    torch.testing.assert_close(out[:, [5, 11, 7]], scores.log_softmax(1)[:, [5, 11, 7]])  # 7: a delimiter at the start


@pytest.mark.parametrize("weight", [0.1, 0.9])
def test_silent_candidates_are_ranked_by_their_score(weight: float) -> None:
    """Neither by that of the words' share, which flatters them, nor with the logits' offset."""
    log_probs, lengths = two_utterances()
    table = torch.tensor([[0], [-1], [2], [-1], [4], [5], [-1], [7], [-1], [-1], [-1], [-1], [-2], [-2]])
    scorer, units = CTCPrefixScorer.from_log_probs(log_probs, lengths, BLANK), LabelChains(BLANK, NUM_LABELS, table)
    scores = 30.0 + torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    exact = CTCPrefixLogitsProcessor(scorer, weight, EOS, units)(torch.empty(2, 0, dtype=torch.long), scores)
    few = CTCPrefixLogitsProcessor(scorer, weight, EOS, units, num_candidates=4)
    few = few(torch.empty(2, 0, dtype=torch.long), scores)
    best = exact.index_fill(1, torch.tensor(EOS), -math.inf).topk(4)
    torch.testing.assert_close(few.gather(1, best.indices), best.values)
    silent = (table[best.indices] == -1).float().mean()
    assert 0.0 < silent < 1.0


def test_forced_token_that_cannot_be_spelled_leaves_the_state() -> None:
    processor = chain_processor()
    scores = torch.zeros(2, VOCAB_SIZE)
    before = processor(torch.empty(2, 0, dtype=torch.long), scores)
    forced = torch.full((2, VOCAB_SIZE), -math.inf)
    forced[:, 13] = 0.0
    assert processor(torch.empty(2, 0, dtype=torch.long), forced).argmax(1).tolist() == [13, 13]
    assert torch.equal(processor(torch.tensor([[13], [13]]), scores), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"weight: expected 0 to 1 .*got -0.1"),
        ({"weight": 1.5}, r"weight: expected 0 to 1 .*got 1.5"),
        ({"weight": math.nan}, r"weight: expected 0 to 1 .*got nan"),
        ({"eos_token_id": []}, r"eos_token_id: expected one or more token ids, got \[\]"),
        ({"eos_token_id": -1}, r"eos_token_id: expected one or more token ids, got -1"),
        ({"num_candidates": 0}, r"num_candidates: expected at least 1 token per row, got 0"),
        ({"margin": -1.0}, r"margin: expected 0 or more nats .*got -1.0"),
        ({"margin": math.nan}, r"margin: expected 0 or more nats .*got nan"),
        (
            {"label_units": LabelChains(9, 11, torch.zeros(2, 2).int())},
            r"label_units: expected 10 labels with blank 9 like the scorer, got 11 with blank 9",
        ),
        ({"parents": "guess"}, r"parents: expected \"auto\" or \"recompute\", got 'guess'"),
        (
            {"label_units": LabelUnits.identical(8, VOCAB_SIZE, 7)},
            r"label_units: expected 10 labels with blank 9 like the scorer, got 8 with blank 7",
        ),
        (
            {"label_units": LabelUnits.identical(10, VOCAB_SIZE, 0)},
            r"label_units: expected 10 labels with blank 9 like the scorer, got 10 with blank 0",
        ),
    ],
)
def test_argument_errors(options: dict, message: str) -> None:
    scorer = CTCPrefixScorer.from_log_probs(*two_utterances(), BLANK)
    with pytest.raises(ValueError, match=message):
        CTCPrefixLogitsProcessor(scorer, **({"weight": 0.3, "eos_token_id": EOS} | options))


@pytest.mark.parametrize(
    ("rows", "vocab_size", "message"),
    [
        (3, VOCAB_SIZE, r"input_ids: expected beams \* 2 rows for the scorer's 2 utterances, got 3 rows \(scores: 3\)"),
        (2, 12, r"eos_token_id: expected ids below the vocabulary size 12, got \[12\]"),
        (2, 6, r"vocab_size: expected at least 9, .*token 8, got 6"),
    ],
)
def test_call_errors(rows: int, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_utterance_processor()(torch.empty(rows, 0, dtype=torch.long), torch.zeros(rows, vocab_size))


def test_device_error() -> None:
    empty, scores = torch.empty(2, 0, dtype=torch.long, device="meta"), torch.zeros(2, VOCAB_SIZE, device="meta")
    with pytest.raises(ValueError, match=r"scorer: expected on the device of input_ids \(meta\).*got cpu"):
        two_utterance_processor()(empty, scores)


@pytest.mark.parametrize(
    "second",
    [
        torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),  # jumps
        torch.tensor([[9, 2, 3], [5, 6, 7]]),  # another history
        torch.tensor([[5, 6, 3], [1, 2, 7]]),  # a parent from the other utterance
        torch.tensor([[9, 4], [5, 4]]),  # steps back to another history
        torch.tensor([[1, 2, 3]] * 2 + [[5, 6, 7]] * 2),  # other number of beams
    ],
)
def test_rows_that_do_not_continue_are_refused(second: torch.Tensor) -> None:
    processor = two_utterance_processor()
    first = torch.tensor([[1, 2], [5, 6]])
    for input_ids in (first[:, :1], first):
        processor(input_ids, torch.zeros(2, VOCAB_SIZE))
    with pytest.raises(ValueError, match=r"input_ids: expected rows that continue the previous call's \(2, 2\)"):
        processor(second, torch.zeros(len(second), VOCAB_SIZE))


def test_wrong_hook_is_refused() -> None:
    processor = two_utterance_processor()
    scores = torch.zeros(2, VOCAB_SIZE)
    processor(torch.tensor([[1], [5]]), scores)
    processor.reorder(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"input_ids: expected rows that continue the previous call's \(2, 1\)"):
        processor(torch.tensor([[1, 2], [5, 6]]), scores)


def test_hook_speaks_of_the_next_call_only() -> None:
    model = tiny_gpt2(HookedGPT2)
    inputs = prompt_inputs(model, "inputs_embeds", 2)
    model.ctc_processor = two_utterance_processor()
    run(model, model.ctc_processor, inputs, num_beams=3, **BEAM)  # its last reorder is never asked for
    assert (
        run(model, model.ctc_processor, inputs).new_tokens == run(model, two_utterance_processor(), inputs).new_tokens
    )
