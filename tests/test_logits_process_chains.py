"""CTCPrefixLogitsProcessor where tokens are chains of CTC labels, in transformers' generate, against plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from ctc_reference import textbook_prefix_log_prob
from joint_search_reference import (
    BEAM,
    BLANK,
    EOS,
    NUM_LABELS,
    SUBSET,
    VOCAB_SIZE,
    HookedGPT2,
    Joint,
    llm_of,
    prompt_inputs,
    random_log_probs,
    run,
    tiny_gpt2,
    two_utterances,
)
from transformers import PreTrainedModel

from hf_speechllm.ctc_prefix_score import CTCPrefixScorer
from hf_speechllm.label_chains import LabelChains
from hf_speechllm.label_units import LabelUnits
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor

# Labels 0 to 2 are letters, 3 is the delimiter and 4 the blank.
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
    hooked.processor = chain_processor(**pruned)
    hook = run(hooked, hooked.processor, inputs, **options)
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
