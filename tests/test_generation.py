"""`generate` of a speech LLM: against the language model alone, in batches, jointly with CTC, with every option."""

import itertools

import pytest
import torch
from tiny_models import ctc_token_ids, loud_model, noise, tiny_model, tiny_processor, tiny_tokenizer
from transformers import GenerationConfig, LogitsProcessorList

from hf_speechllm import SpeechLLMForConditionalGeneration, generation_speechllm
from hf_speechllm.modeling_speechllm import SpeechLLMAudioOutput

EOS, PAD = 2, 0
DURATIONS_S = (0.9, 0.31, 0.05, 1.4, 0.62, 0.77, 1.13, 0.2)
SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "joint": {"ctc_weight": 0.3},
    "joint beam": {"ctc_weight": 0.4, "num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    "ctc_greedy": {"mode": "ctc_greedy"},
}


@pytest.fixture
def model() -> SpeechLLMForConditionalGeneration:
    return loud_model()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return dict(tiny_processor()(noise(*DURATIONS_S[:3])))


def tokens_of(sequence: torch.Tensor) -> list[int]:
    """Generated tokens up to the end of sequence, without padding."""
    return list(itertools.takewhile(lambda token: token not in (EOS, PAD), sequence.tolist()))


def with_ctc_posterior(monkeypatch, model, sequences: list[list[int]], confidence: float = 0.999) -> None:
    """Makes the CTC head sure of these label sequences: two frames each label, a blank behind it."""
    original = model.encode

    def encode(*args, **kwargs) -> SpeechLLMAudioOutput:
        audio = original(*args, **(kwargs | {"ctc_log_probs": True}))
        probs = torch.full_like(audio.ctc_log_probs, (1 - confidence) / (audio.ctc_log_probs.shape[-1] - 1))
        for row, labels in enumerate(sequences):
            path = [label for label in labels for label in (label, label, model.config.blank_id)]
            assert len(path) <= audio.encoder_out_lens[row]
            path += [model.config.blank_id] * (probs.shape[1] - len(path))
            probs[row, torch.arange(len(path)), torch.tensor(path)] = confidence
        audio.ctc_log_probs = probs.log()
        return audio

    monkeypatch.setattr(model, "encode", encode)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_without_ctc_it_is_the_language_model_on_the_same_embeddings(model, inputs, options):
    audio = model.get_audio_features(**inputs)
    prompt = model.merge_inputs(audio, None)
    options = {**options, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 7}
    expected = model.language_model.generate(
        inputs_embeds=prompt.inputs_embeds,
        attention_mask=prompt.mask,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **options,
    )
    got = model.generate(**inputs, **options, ctc_weight=0.0)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("text", ["llama", "gpt2", "gemma"])
def test_greedy_search_is_the_argmax_of_the_forward_pass_again_and_again(text):
    model = loud_model(text=text, ctc_loss_weight=0.0)
    inputs = tiny_processor()(noise(0.5))
    tokens: list[int] = []
    while len(tokens) < 6 and EOS not in tokens:
        labels = torch.tensor([[*tokens, 5]])  # the last logits predict what stands in the place of the 5
        tokens.append(int(model(**inputs, labels=labels).logits[0, -1].argmax()))
    assert model.generate(**inputs, max_new_tokens=6)[0].tolist() == tokens


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("audio", ["moonshine", "whisper", "wav2vec2", "parakeet"])
def test_a_batch_of_eight_lengths_is_decoded_as_one_by_one(audio, search):
    model, processor, clips = loud_model(audio, seed=3), tiny_processor(audio), noise(*DURATIONS_S)
    together = model.generate(**processor(clips), **SEARCHES[search])
    alone = [model.generate(**processor(clip), **SEARCHES[search])[0] for clip in clips]
    assert [tokens_of(row) for row in together] == [tokens_of(row) for row in alone]
    assert processor.batch_decode(together) == processor.batch_decode(alone)
    assert len({tuple(tokens_of(row)) for row in together}) > 2, "the test needs clips that sound different"


@pytest.mark.parametrize("options", [{}, {"ctc_weight": 0.3}, {"repetition_penalty": 3.0}])
def test_log_probs_of_a_batch_are_those_of_one_by_one(model, options):
    processor, clips = tiny_processor(), noise(*DURATIONS_S)
    options = {**options, "return_dict_in_generate": True, "output_scores": True, "min_new_tokens": 3}
    together = model.generate(**processor(clips), **options)
    for row, clip in enumerate(clips):
        alone = model.generate(**processor(clip), **options)
        for step in range(3):
            ours, theirs = together.scores[step][row], alone.scores[step][0]
            torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_several_sequences_are_returned_best_first(model, inputs):
    options = {"num_beams": 4, "return_dict_in_generate": True, "output_scores": True, "ctc_weight": 0.3}
    best = model.generate(**inputs, **options)
    several = model.generate(**inputs, **options, num_return_sequences=3)
    assert several.sequences.shape[0] == 9
    assert [tokens_of(row) for row in several.sequences[::3]] == [tokens_of(row) for row in best.sequences]
    by_utterance = several.sequences_scores.view(3, 3)
    assert (by_utterance[:, :-1] >= by_utterance[:, 1:]).all() and by_utterance.isfinite().all()


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_sampling_depends_on_the_seed(model, inputs, ctc_weight):
    def sample(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(**inputs, do_sample=True, num_return_sequences=2, ctc_weight=ctc_weight)

    assert torch.equal(sample(0), sample(0))
    assert sample(0).shape[0] == 6 and not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_given_prompt_stands_before_what_is_generated(model, inputs, search):
    request = tiny_processor().apply_transcription_request(noise(*DURATIONS_S[:3]))
    new = model.generate(**inputs, **SEARCHES[search])
    whole = model.generate(**request, **SEARCHES[search])
    width = request["input_ids"].shape[1]
    assert torch.equal(whole[:, :width], request["input_ids"])
    assert torch.equal(whole[:, width:], new), "the prompt is the one of the config"


def test_a_given_prompt_stands_before_each_of_several_sequences(model):
    request = tiny_processor().apply_transcription_request(noise(0.3, 0.6), prompt=["", "the ant"])
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    output = model.generate(**request, **options)
    expected = request["input_ids"].repeat_interleave(2, 0)
    assert torch.equal(output.sequences[:, : expected.shape[1]], expected)


def test_another_prompt_gives_another_text_and_its_padding_does_not(model):
    processor, clips, prompts = tiny_processor(), noise(0.5, 0.6), ["", "the ant in the"]
    together = processor.apply_transcription_request(clips, prompt=prompts)
    width = together["input_ids"].shape[1]
    rows = model.generate(**together)[:, width:]
    for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        alone = processor.apply_transcription_request([clip], prompt=prompt)
        generated = model.generate(**alone)[0, alone["input_ids"].shape[1] :]
        assert tokens_of(rows[row]) == tokens_of(generated)
        assert tokens_of(model.generate(**processor(clip))[0]) != tokens_of(rows[row])


def test_the_pipeline_of_transformers_passes_the_audio_mask_as_attention_mask(model, inputs):
    expected = model.generate(**inputs)
    features, mask = inputs["input_features"], inputs["input_features_mask"]
    assert torch.equal(model.generate(input_features=features, attention_mask=mask), expected)
    both = model.generate(input_features=features, attention_mask=mask, input_features_mask=mask)
    assert torch.equal(both, expected)
    for other in (torch.ones_like(mask), torch.ones(3, 4)):
        with pytest.raises(ValueError, match="attention_mask: without input_ids it is the mask of the audio"):
            model.generate(input_features=features, attention_mask=other, input_features_mask=mask)
    assert not torch.equal(model.generate(input_features=features), expected), "here the padding is audio"


def test_labels_and_ctc_targets_are_ignored(model, inputs):
    labels = torch.tensor([[5, 6, 2]] * 3)
    got = model.generate(**inputs, labels=labels, ctc_targets=labels, ctc_weight=0.3)
    assert torch.equal(got, model.generate(**inputs, ctc_weight=0.3))


@pytest.mark.parametrize("options", [{}, {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"}])
def test_ctc_alone_decodes_what_ctc_is_sure_of_whatever_the_language_model_says(monkeypatch, model, inputs, options):
    sequences = [[0, 1, 2, 2, 5, 30, 5], [29, 4], []]
    with_ctc_posterior(monkeypatch, model, sequences)
    ids = ctc_token_ids()
    expected = [[ids[label] for label in labels] for labels in sequences]
    got = model.generate(**inputs, ctc_weight=1.0, max_new_tokens=20, **options)
    assert [tokens_of(row) for row in got] == expected
    assert [row[len(tokens)] for row, tokens in zip(got, expected, strict=True)] == [EOS] * 3
    language_model_alone = model.generate(**inputs, max_new_tokens=20, **options)
    assert [tokens_of(row) for row in language_model_alone] != expected


def test_ctc_weight_shifts_the_result_from_the_language_model_to_ctc(monkeypatch, model, inputs):
    with_ctc_posterior(monkeypatch, model, [[0, 1, 2, 2, 5, 30, 5], [29, 4], []])
    results = [model.generate(**inputs, ctc_weight=weight).tolist() for weight in (0.0, 1e-6, 0.5, 1.0)]
    assert results[0] != results[2] == results[3]


@pytest.mark.parametrize("sharp", [1.0, 40.0])
def test_ctc_greedy_is_the_best_path_without_repeats_and_blanks(inputs, sharp):
    model = loud_model()
    with torch.no_grad():
        model.ctc_head.linear.weight.mul_(sharp)
    audio = model.encode(**inputs)
    got = model.generate(**inputs, mode="ctc_greedy")
    for row in range(3):
        path = audio.ctc_log_probs[row, : audio.encoder_out_lens[row]].argmax(-1).tolist()
        labels = [label for label, _ in itertools.groupby(path) if label != model.config.blank_id]
        expected = [model.config.ctc_token_ids[label] for label in labels]
        assert got[row].tolist() == expected + [PAD] * (got.shape[1] - len(expected))
    assert sharp == 1.0 or got.shape[1] > 1


@pytest.mark.parametrize("ctc_top_k", [None, 3])
def test_ctc_greedy_tells_labels_and_log_prob_of_its_path(model, inputs, ctc_top_k):
    options = {"mode": "ctc_greedy", "ctc_top_k": ctc_top_k}
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    audio = model.encode(**inputs)
    assert torch.equal(output.sequences, model.generate(**inputs, **options))
    for row in range(3):
        best = audio.ctc_log_probs[row, : audio.encoder_out_lens[row]].max(-1)
        labels = [label for label, _ in itertools.groupby(best.indices.tolist()) if label != model.config.blank_id]
        [hypothesis] = output.hypotheses[row]
        assert hypothesis.labels == tuple(labels)
        assert hypothesis.am_log_prob == hypothesis.log_score == pytest.approx(float(best.values.sum()), rel=1e-6)
        assert float(output.sequences_scores[row]) == pytest.approx(hypothesis.log_score, rel=1e-6)
    prompt = model.prompt_ids.expand(3, -1)
    behind = model.generate(
        **inputs, **options, return_dict_in_generate=True, input_ids=prompt, attention_mask=torch.ones_like(prompt)
    )
    assert torch.equal(behind.sequences, torch.cat([prompt, output.sequences], 1))


def test_ctc_greedy_does_not_run_the_language_model(monkeypatch, model, inputs):
    with_ctc_posterior(monkeypatch, model, [[0, 0, 1], [3], []])
    monkeypatch.setattr(model.language_model, "forward", lambda *_, **__: pytest.fail("it was run"))
    ids = ctc_token_ids()
    got = model.generate(**inputs, mode="ctc_greedy")
    assert got.tolist() == [[ids[0], ids[0], ids[1]], [ids[3], PAD, PAD], [PAD] * 3]


@pytest.mark.parametrize(("search", "options"), SEARCHES.items())
def test_the_audio_is_encoded_once_and_not_for_each_beam(model, inputs, search, options):
    batch_sizes = []
    model.audio_tower.conv1.register_forward_hook(lambda *call: batch_sizes.append(call[2].shape[0]))
    model.generate(**inputs, **options)
    assert batch_sizes == [3]


@pytest.fixture
def head_frames(monkeypatch, model) -> list[int]:
    """Frames of each call of the CTC head, at most 3 of which may be asked for at once."""
    monkeypatch.setattr(generation_speechllm, "_FRAMES_PER_CHUNK", 3)
    calls, log_probs = [], model.ctc_head.log_probs
    monkeypatch.setattr(model.ctc_head, "log_probs", lambda x: calls.append(x.shape[1]) or log_probs(x))
    return calls


@pytest.mark.parametrize("options", [{"ctc_weight": 0.4}, SEARCHES["joint beam"], {"mode": "ctc_greedy"}])
@pytest.mark.parametrize("ctc_top_k", [len(ctc_token_ids()), 10**6])
def test_as_many_labels_as_there_are_decode_as_all_of_them(model, inputs, head_frames, options, ctc_top_k):
    options = {**options, "return_dict_in_generate": True, "output_scores": True}
    if "mode" in options:
        options = {"mode": "ctc_greedy"}
    want = model.generate(**inputs, **options)
    assert max(head_frames) > 3
    head_frames.clear()
    got = model.generate(**inputs, **options, ctc_top_k=ctc_top_k)
    assert max(head_frames) == 3  # [B, T, U+1] never exists
    if "mode" in options:
        assert torch.equal(got, want)
        return
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=1e-4)


def test_few_labels_are_those_with_the_highest_peaks(model, inputs):
    log_probs = model.encode(**inputs).ctc_log_probs
    lens = model.encode(**inputs).encoder_out_lens
    peaks = [row[:n, :-1].amax(0) for row, n in zip(log_probs, lens, strict=True)]
    allowed = [{model.config.ctc_token_ids[label] for label in peak.topk(4).indices} for peak in peaks]
    options = {"ctc_weight": 0.4, "max_new_tokens": 8, "suppress_tokens": [EOS]}
    got = model.generate(**inputs, ctc_top_k=4, **options)[:2]  # the third utterance has no room for eight tokens
    free = model.generate(**inputs, **options)[:2]
    for row, tokens in enumerate(allowed[:2]):
        assert len(tokens_of(got[row])) == 8
        assert set(tokens_of(got[row])) <= tokens
    assert not all(set(tokens_of(free[row])) <= allowed[row] for row in range(2))


def test_without_ctc_its_head_does_not_run(model, inputs, head_frames):
    model.generate(**inputs)
    assert head_frames == []


class Weights(list):
    """Records the weights of the CTC processors that are built."""

    def __call__(self, scorer, weight, eos_token_id, units):
        self.append(weight)
        return lambda _ids, scores: scores


@pytest.fixture
def weights(monkeypatch) -> Weights:
    recorded = Weights()
    monkeypatch.setattr(generation_speechllm, "CTCPrefixLogitsProcessor", recorded)
    return recorded


def test_options_of_the_call_go_before_the_given_config_and_that_before_the_models(model, inputs, weights):
    given = GenerationConfig(max_new_tokens=2)
    given.ctc_weight = 0.6
    model.generation_config.ctc_weight = 0.3
    model.generate(**inputs, generation_config=given, ctc_weight=0.9)
    model.generate(**inputs, generation_config=given)
    model.generate(**inputs)
    model.generate(**inputs, ctc_weight=None)
    model.generate(**inputs, ctc_weight=0.0)
    assert weights == [0.9, 0.6, 0.3, 0.3], "and a weight of zero builds none"


def test_a_given_config_leaves_the_rest_to_the_models(model, inputs):
    """End of sequence and padding are of the model, unless they are given."""
    model.generation_config.ctc_weight = 0.3
    model.generation_config.num_beams = 2
    got = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=5))
    assert torch.equal(got, model.generate(**inputs, max_new_tokens=5))
    model.generation_config.num_beams, model.generation_config.ctc_weight = 1, 0.0
    first = int(model.generate(**inputs)[0, 0])
    other_end = model.generate(**inputs, generation_config=GenerationConfig(eos_token_id=[EOS, first]))
    assert first != EOS and other_end[0].tolist() == [first] + [PAD] * (other_end.shape[1] - 1)


def test_generate_changes_no_config(model, inputs):
    given = GenerationConfig(num_beams=2)
    before = model.generation_config.to_dict(), given.to_dict(), model.language_model.generation_config.to_dict()
    model.generate(**inputs, generation_config=given, ctc_weight=0.5, max_new_tokens=3)
    assert before == (
        model.generation_config.to_dict(),
        given.to_dict(),
        model.language_model.generation_config.to_dict(),
    )


def test_saved_options_decode_after_loading(tmp_path, model, inputs, weights):
    model.generation_config.ctc_weight = 0.7
    model.generation_config.max_new_tokens = 4
    model.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generate(**inputs, min_new_tokens=4).shape == (3, 4)
    assert weights == [0.7]
    other = GenerationConfig(max_new_tokens=3, eos_token_id=EOS, ctc_weight=0.2, mode="llm")
    other.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generate(**inputs, min_new_tokens=3).shape == (3, 3)
    assert weights == [0.7, 0.2]


def test_further_logits_processors_see_the_joint_scores(model, inputs):
    seen = []

    def only_token_5(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5]), 0.0)

    processors = LogitsProcessorList([only_token_5])
    got = model.generate(**inputs, ctc_weight=0.3, logits_processor=processors, max_new_tokens=2)
    assert got.tolist() == [[5, 5]] * 3
    unknown_to_ctc = [i for i in range(model.config.text_config.vocab_size) if i not in {*ctc_token_ids(), EOS}]
    assert (seen[0][:, unknown_to_ctc] == -torch.inf).all()


def test_options_of_transformers_are_passed_on(model, inputs):
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (3, 3)
    banned = [[i] for i in range(3, 30)]
    assert not torch.isin(model.generate(**inputs, bad_words_ids=banned), torch.tensor(banned)).any()
    calls = []
    model.generate(**inputs, max_new_tokens=2, prefix_allowed_tokens_fn=lambda row, _: calls.append(row) or [5])
    assert sorted(set(calls)) == [0, 1, 2]


@pytest.mark.parametrize("search", ["greedy", "beam", "joint", "joint beam"])
def test_generation_stops_at_a_text(model, inputs, search):
    options = {**SEARCHES[search], "max_new_tokens": 12}
    tokenizer, words = tiny_tokenizer(), ["d", "j", "w"]
    texts = tokenizer.batch_decode(model.generate(**inputs, **options))
    assert any(word in text[:-1] for text in texts for word in words)
    stopped = tokenizer.batch_decode(
        model.generate(**inputs, **options, stop_strings=words, tokenizer=tokenizer), skip_special_tokens=True
    )
    ends = 0
    for text in stopped:
        found = [word for word in words if word in text]
        ends += len(found)
        assert all(text.index(word) == len(text) - 1 for word in found)
    assert ends


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_early_exit": 1},
        {"num_beams": 2, "assistant_model": True},
        {"prefill_chunk_size": 4},
    ],
)
def test_what_is_for_models_that_read_tokens_is_refused(model, inputs, options):
    if "assistant_model" in options:
        options = {**options, "assistant_model": model.language_model}
    with pytest.raises(ValueError, match=f"{[*options][-1]}: .* are for models that read tokens"):
        model.generate(**inputs, **options)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("audio", ["moonshine", "wav2vec2", "parakeet"])
def test_silence_a_moment_and_a_minute_of_audio_are_decoded(audio, search):
    model, processor = loud_model(audio), tiny_processor(audio)
    clips = [0.0 * noise(1.0)[0], noise(0.05)[0], noise(60.0)[0]]
    for clip in clips:
        options = {} if search == "ctc_greedy" else {"max_new_tokens": 4, "output_scores": True}
        output = model.generate(**processor(clip), **SEARCHES[search], **options, return_dict_in_generate=True)
        assert output.sequences.shape[0] == 1
        if search != "ctc_greedy":
            assert all(not scores.isnan().any() and scores.max() > -torch.inf for scores in output.scores)
    encoding = model.encode(**processor(clips[-1]))
    assert encoding.ctc_log_probs.isfinite().all()


def test_whisper_refuses_a_minute_and_decodes_half_a_minute():
    model, processor, (clip,) = loud_model("whisper"), tiny_processor("whisper"), noise(60.0)
    with pytest.raises(ValueError, match="positions for 3000 mel frames .* got 6000; segment the audio first"):
        model.generate(**processor(clip))
    assert model.generate(**processor(clip[: 30 * 16000]), max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "telepathy"}, r"mode must be one of \('llm', 'ctc_greedy', .*\), got 'telepathy'"),
        ({"ctc_weight": 1.5}, r"ctc_weight must lie between 0 \(language model only\) and 1 \(CTC only\), got 1.5"),
        ({"ctc_weight": -0.1}, "ctc_weight must lie between .* got -0.1"),
        ({"ctc_weight": "x"}, "ctc_weight must be a number, got 'x'"),
        ({"lm_weight": True}, "lm_weight must be a number, got True"),
        ({"ctc_top_k": 2.5}, "ctc_top_k must be a whole number, got 2.5"),
        ({"mode": "ctc_beam", "ctc_beam_size": 2.5}, "ctc_beam_size must be a whole number, got 2.5"),
        ({"ctc_weigth": 0.3}, "ctc_weigth"),
        ({"input_features": None}, "input_features is required: pass the output of the processor"),
        ({"input_ids": torch.tensor([[1, 2]] * 3)}, "one row per utterance .* one audio placeholder"),
    ],
)
def test_a_wrong_argument_is_an_error(model, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{**inputs, **options})


@pytest.mark.parametrize("own_labels", [None, ["a", "b"]])
def test_joint_decoding_without_labels_that_are_tokens_is_an_error(inputs, own_labels):
    model = tiny_model(ctc_token_ids=None, ctc_labels=own_labels)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 3
    with pytest.raises(ValueError, match=r"need a CTC head whose labels are tokens .* Use ctc_weight=0 and mode='llm'"):
        model.generate(**inputs, ctc_weight=0.3)


def test_joint_decoding_without_end_of_sequence_is_an_error(model, inputs):
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id is required for joint decoding; set it in generation_config"):
        model.generate(**inputs, ctc_weight=0.3)


def test_ctc_greedy_pads_with_the_end_of_sequence_or_says_what_is_missing(monkeypatch, model, inputs):
    with_ctc_posterior(monkeypatch, model, [[0, 1], [3], []])
    for eos in (EOS, [EOS, 4]):
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = None, eos
        assert model.generate(**inputs, mode="ctc_greedy")[2].tolist() == [EOS, EOS]
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="pad_token_id or eos_token_id is required to pad the results; set it in"):
        model.generate(**inputs, mode="ctc_greedy")


def test_the_tiny_tokenizer_and_the_tiny_model_agree_on_special_tokens():
    assert (tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id) == (EOS, PAD)
    assert tiny_model().generation_config.eos_token_id == EOS
