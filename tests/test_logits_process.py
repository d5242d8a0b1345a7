"""CTCPrefixLogitsProcessor inside transformers' generate, against searches written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joint_search_reference import (
    BEAM,
    BLANK,
    EOS,
    MODELS,
    NUM_LABELS,
    PAD,
    SUBSET,
    VOCAB_SIZE,
    HookedGPT2,
    Joint,
    cut,
    llm_of,
    prompt_inputs,
    random_log_probs,
    references,
    run,
    tiny_gpt2,
    tiny_llama,
    two_utterance_processor,
    two_utterances,
)
from transformers import LogitsProcessorList, T5Config, T5ForConditionalGeneration

from hf_speechllm.ctc_prefix_score import CTCPrefixScorer
from hf_speechllm.label_chains import LabelChains
from hf_speechllm.label_units import LabelUnits
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor


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
    hooked.processor = two_utterance_processor()
    if num_beams > 1:
        monkeypatch.setattr(CTCPrefixLogitsProcessor, "_match", None)  # the hook alone must do
    hook = run(hooked, hooked.processor, inputs, **options)
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


def test_finished_rows_stay_so_after_a_step_back() -> None:
    tokens = torch.tensor([[2, EOS, PAD, PAD, PAD], [2, 4, 6, 1, 0]])
    scores = torch.zeros(2, VOCAB_SIZE)
    straight, stepping = two_utterance_processor(), two_utterance_processor()
    want = [straight(tokens[:, :width], scores) for width in range(6)]
    for width in (0, 1, 2, 3, 4, 3, 4, 5):
        got = stepping(tokens[:, :width], scores)
        torch.testing.assert_close(got, want[width], rtol=0, atol=1e-12)


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


def test_what_a_hypothesis_loses_to_other_processors_stays_lost() -> None:
    log_probs = torch.log_softmax(3.0 * torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)), 1)
    log_probs[0, log_probs[0].argmax()] = -math.inf  # row 0 wants what is forbidden, row 1 may have it
    out = two_utterance_processor(1e-6)(torch.empty(2, 0, dtype=torch.long), log_probs)
    is_possible = out > -math.inf
    assert is_possible.sum(1).min() > 5
    torch.testing.assert_close(out[is_possible], log_probs[is_possible], atol=1e-4, rtol=0)


def test_a_beam_that_may_not_go_on_is_dead_and_the_others_stay() -> None:
    def forbid_all_after_zero(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(input_ids[:, -1:] == 0, -math.inf) if input_ids.shape[1] else scores

    model = tiny_gpt2()
    log_probs = torch.tensor([[[0.6, 0.3, 0.1]] * 2], dtype=torch.float64).log()
    scorer = CTCPrefixScorer.from_log_probs(log_probs, torch.tensor([2]), 2)
    processors = LogitsProcessorList([forbid_all_after_zero, CTCPrefixLogitsProcessor(scorer, 1.0, EOS)])
    inputs = prompt_inputs(model, "inputs_embeds", 1)
    options = {"max_new_tokens": 4, "num_beams": 2, "pad_token_id": PAD, **BEAM}
    out = model.generate(
        **inputs, logits_processor=processors, return_dict_in_generate=True, output_scores=True, **options
    )
    assert cut(out.sequences[0].tolist()) == (1, EOS)  # 1 is what is heard next to 0
    assert torch.isfinite(out.sequences_scores).all() and not any(step.isnan().any() for step in out.scores)


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
    model.processor = two_utterance_processor()
    run(model, model.processor, inputs, num_beams=3, **BEAM)  # its last reorder is never asked for
    assert run(model, model.processor, inputs).new_tokens == run(model, two_utterance_processor(), inputs).new_tokens
