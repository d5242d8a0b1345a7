"""Modes of `generate` that combine the CTC head with the plain language model, all from one checkpoint."""

import math

import pytest
import torch
from peft import LoraConfig
from tiny_models import loud_model, noise, tiny_model, tiny_processor, tiny_sentencepiece, tiny_tokenizer
from transformers import GenerationConfig

from hf_speechllm import SpeechLLMForConditionalGeneration, combination
from hf_speechllm.combination import MODES
from hf_speechllm.ctc_beam_search import ctc_beam_search
from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.rescoring import rescore_nbest

SCALES = {"lm_weight": 0.4, "prior_weight": 0.2, "length_reward": 0.3}
COMBINED = ("rescoring", "label_fusion", "delayed_fusion")
SEARCHES = ("ctc_beam", *COMBINED)


@pytest.fixture(scope="module")
def model() -> SpeechLLMForConditionalGeneration:
    model = loud_model()
    torch.manual_seed(3)
    model.ctc_head.log_prior[:-1] = torch.randn(model.config.blank_id).log_softmax(0)
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return dict(tiny_processor()(noise(0.9, 0.31, 0.05)))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def search(model, inputs, mode, tokenizer, **options):
    return model.generate(
        **inputs, mode=mode, tokenizer=tokenizer, return_dict_in_generate=True, ctc_beam_size=4, **options
    )


@pytest.mark.parametrize("mode", SEARCHES)
def test_a_batch_gives_what_each_utterance_gives_alone(model, inputs, tokenizer, mode):
    scales = SCALES if mode in COMBINED else {}
    together = search(model, inputs, mode, tokenizer, num_return_sequences=2, **scales)
    assert together.sequences.shape[0] == together.sequences_scores.shape[0] == 6
    for row in range(3):
        length = int(inputs["input_features_mask"][row].sum())
        single = {name: value[row : row + 1, :length] for name, value in inputs.items()}
        alone = search(model, single, mode, tokenizer, num_return_sequences=2, **scales)
        for mine, other in zip(together.hypotheses[row], alone.hypotheses[0], strict=True):
            assert mine.labels == other.labels
            assert mine.log_score == pytest.approx(other.log_score, abs=1e-3)


def test_rescoring_is_the_ctc_beam_rescored_by_the_plain_language_model(model, inputs, tokenizer):
    got = search(model, inputs, "rescoring", tokenizer, num_return_sequences=4, **SCALES).hypotheses
    audio = model.encode(**inputs)
    token_ids = model.config.ctc_token_ids
    nbests = ctc_beam_search(
        audio.ctc_log_probs,
        audio.encoder_out_lens,
        blank_id=model.config.blank_id,
        beam_size=4,
        n_best=4,
        labels_to_text=lambda labels: tokenizer.decode([token_ids[label] for label in labels]),
    )
    lm = CausalLMScorer(model.language_model, tokenizer)
    expected = rescore_nbest(nbests, lm, prior=model.ctc_head.log_prior.double(), **SCALES)
    for mine, other in zip(got, expected, strict=True):
        assert [hypothesis.labels for hypothesis in mine] == [hypothesis.labels for hypothesis in other]
        assert [hypothesis.lm_log_prob for hypothesis in mine] == pytest.approx(
            [hypothesis.lm_log_prob for hypothesis in other], abs=1e-3
        )
        assert [hypothesis.log_score for hypothesis in mine] == pytest.approx(
            [hypothesis.log_score for hypothesis in other], abs=1e-3
        )
    assert any(hypothesis.lm_log_prob < -1.0 for utterance in got for hypothesis in utterance)


@pytest.mark.parametrize("mode", COMBINED)
def test_without_weights_a_combination_finds_what_the_ctc_beam_finds(model, inputs, tokenizer, mode):
    plain = search(model, inputs, "ctc_beam", tokenizer).hypotheses
    combined = search(model, inputs, mode, tokenizer).hypotheses
    assert [rows[0].labels for rows in combined] == [rows[0].labels for rows in plain]


@pytest.mark.parametrize("mode", COMBINED)
def test_the_adapter_plays_no_part_in_a_combination_and_is_on_again_afterwards(inputs, tokenizer, mode):
    model = loud_model()
    before = search(model, inputs, mode, tokenizer, **SCALES).sequences_scores
    heard = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, max_new_tokens=1).logits[0]
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=r"language_model\..*\.(q_proj|down_proj)"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    torch.testing.assert_close(search(model, inputs, mode, tokenizer, **SCALES).sequences_scores, before)
    again = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, max_new_tokens=1).logits[0]
    assert (again - heard).abs().max() > 1e-2


def test_another_language_model_takes_the_place_of_the_own(model, inputs, tokenizer):
    other = CausalLMScorer(loud_model(seed=5).language_model, tokenizer)
    own = search(model, inputs, "rescoring", tokenizer, **SCALES).hypotheses
    got = search(model, inputs, "rescoring", tokenizer, lm=other, num_return_sequences=4, **SCALES).hypotheses
    best = got[0][0]
    assert best.lm_log_prob == pytest.approx(float(other.score([other.tokenize(best.text)])[0]), abs=1e-3)
    assert best.lm_log_prob != pytest.approx(own[0][0].lm_log_prob, abs=1e-3)


def test_shallow_fusion_of_another_language_model_in_joint_decoding(model, inputs, tokenizer):
    other = CausalLMScorer(loud_model(seed=5).language_model, tokenizer)
    options = {"ctc_weight": 0.3, "num_beams": 3, "length_penalty": 0.0, "early_stopping": "never", "max_new_tokens": 8}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**inputs, **options)
    nearly_plain = model.generate(**inputs, lm=other, lm_weight=1e-9, **options)
    assert torch.equal(nearly_plain.sequences, plain.sequences)
    torch.testing.assert_close(nearly_plain.sequences_scores, plain.sequences_scores)
    plain, fused = plain.sequences, model.generate(**inputs, lm=other, lm_weight=3.0, **options).sequences
    assert fused.shape != plain.shape or not torch.equal(fused, plain)


def test_options_are_saved_with_the_model_and_overridden_by_a_call(tmp_path, inputs, tokenizer):
    model = loud_model()
    model.generation_config.update(mode="rescoring", ctc_beam_size=3, lm_weight=0.7, allow_custom_entries=True)
    model.save_pretrained(tmp_path)
    reloaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    output = reloaded.generate(**inputs, tokenizer=tokenizer, return_dict_in_generate=True, num_return_sequences=3)
    best = output.hypotheses[0][0]
    assert best.log_score == pytest.approx(best.am_log_prob + 0.7 * best.lm_log_prob, abs=1e-6)
    output = reloaded.generate(**inputs, tokenizer=tokenizer, return_dict_in_generate=True, lm_weight=0.1)
    best = output.hypotheses[0][0]
    assert best.log_score == pytest.approx(best.am_log_prob + 0.1 * best.lm_log_prob, abs=1e-6)


def test_the_tokens_of_a_search_are_those_of_its_labels(model, inputs, tokenizer):
    output = search(model, inputs, "ctc_beam", None, num_return_sequences=2)
    token_ids = model.config.ctc_token_ids
    for row, hypothesis in enumerate(hypothesis for rows in output.hypotheses for hypothesis in rows):
        expected = [token_ids[label] for label in hypothesis.labels]
        assert output.sequences[row, : len(expected)].tolist() == expected
        assert bool((output.sequences[row, len(expected) :] == model.generation_config.pad_token_id).all())
    assert torch.equal(model.generate(**inputs, mode="ctc_beam", ctc_beam_size=4), output.sequences[::2])


def test_prompts_stand_before_what_a_search_finds(model, inputs, tokenizer):
    prompt = model.prompt_ids.expand(3, -1)
    plain = model.generate(**inputs, mode="ctc_beam")
    got = model.generate(**inputs, mode="ctc_beam", input_ids=prompt, attention_mask=torch.ones_like(prompt))
    assert torch.equal(got, torch.cat([prompt, plain], 1))


@pytest.mark.parametrize("mode", COMBINED)
def test_the_tokenizer_is_asked_for(model, inputs, mode):
    with pytest.raises(ValueError, match=f"tokenizer is required for mode '{mode}'"):
        model.generate(**inputs, mode=mode)


def test_wrong_options_are_named(model, inputs, tokenizer):
    with pytest.raises(ValueError, match=r"mode must be one of .*'delayed_fusion'.*, got 'beam'"):
        model.generate(**inputs, mode="beam")
    for number in (0, 5, 1.5):
        with pytest.raises(ValueError, match=rf"num_return_sequences must be 1 to 4 \(ctc_beam_size.*, got {number};"):
            search(model, inputs, "ctc_beam", tokenizer, num_return_sequences=number)
    for name in ("ctc_top_k", "ctc_beam_size", "fusion_interval"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            model.generate(**inputs, mode="ctc_beam", **{name: 0})
    lm = CausalLMScorer(model.language_model, tokenizer)
    with pytest.raises(ValueError, match="lm: mode 'ctc_beam' uses no language model"):
        model.generate(**inputs, mode="ctc_beam", lm=lm)
    with pytest.raises(ValueError, match="lm: in mode 'llm' it has no part with lm_weight=0; give a weight"):
        model.generate(**inputs, lm=CausalLMScorer(loud_model().language_model, tokenizer), ctc_weight=0.3)
    for name in ("lm_weight", "prior_weight", "length_reward"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number, got nan"):
            model.generate(**inputs, mode="ctc_beam", **{name: math.nan})
    for mode in ("ctc_greedy", "ctc_beam"):
        with pytest.raises(ValueError, match=f"fusion: mode '{mode}' knows no such argument; leave it out"):
            model.generate(**inputs, mode=mode, fusion="delayed")
    without_labels = tiny_model(ctc_token_ids=None)
    for mode in (*SEARCHES, "ctc_greedy"):
        with pytest.raises(ValueError, match=f"mode='{mode}' needs? a CTC head"):
            without_labels.generate(**inputs, mode=mode, tokenizer=tokenizer)


GIVEN = ("max_new_tokens=2", "num_beams=5")
ANYTHING = object()
WITHOUT_PART = [
    (
        "llm",
        {"lm_weight": 0.3},
        "lm_weight: in mode 'llm' it is the weight of another language model, and there is no",
    ),
    *(
        (mode, {name: value}, rf"{name}: it has no part in mode '{mode}'; leave it out, or choose a mode of \({modes}")
        for mode, name, value, modes in [
            ("llm", "prior_weight", 0.1, "'rescoring', 'label_fusion', 'delayed_fusion'"),
            ("llm", "length_reward", 0.1, "'rescoring'"),
            ("llm", "ctc_beam_size", 4, "'ctc_beam', 'rescoring'"),
            ("llm", "fusion_interval", 2, "'delayed_fusion'"),
            ("rescoring", "fusion_interval", 2, "'delayed_fusion'"),
            ("rescoring", "ctc_weight", 0.5, "'llm'"),
            ("ctc_beam", "ctc_top_k", 5, "'llm', 'ctc_greedy'"),
            ("ctc_beam", "lm_weight", 0.5, "'llm', 'rescoring'"),
            ("ctc_beam", "do_sample", True, "'llm'"),
            ("delayed_fusion", "stop_strings", ["a"], "'llm'"),
            ("ctc_greedy", "lm_weight", 0.5, "'llm'"),
            ("ctc_greedy", "num_return_sequences", 2, "'llm', 'ctc_beam'"),
            ("ctc_greedy", "logits_processor", [ANYTHING], "'llm'"),
            ("ctc_greedy", "bad_words_ids", [[4]], "'llm'"),
        ]
    ),
]


@pytest.mark.parametrize(("mode", "options", "message"), WITHOUT_PART)
def test_an_option_without_part_in_the_mode_is_refused_in_a_call_and_passed_over_in_a_config(
    model, inputs, tokenizer, mode, options, message
):
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, mode=mode, tokenizer=tokenizer, **options)
    if not options.keys() & {"logits_processor", "num_return_sequences"}:
        stored = GenerationConfig(max_new_tokens=2)
        stored.update(**options, allow_custom_entries=True)
        model.generate(**inputs, mode=mode, tokenizer=tokenizer, generation_config=stored)


@pytest.mark.parametrize("mode", MODES)
def test_options_that_ask_for_nothing_pass_in_every_mode(model, inputs, tokenizer, mode):
    options = dict.fromkeys(("lm_weight", "prior_weight", "length_reward", "ctc_weight"), 0)
    options |= {"do_sample": False, "use_cache": True, "num_beams": 1, "num_return_sequences": 1, "streamer": None}
    options |= {"synced_gpus": False, "ctc_top_k": None, "temperature": None, "logits_processor": None}
    got = model.generate(**inputs, mode=mode, tokenizer=tokenizer, **options)
    assert torch.equal(got, model.generate(**inputs, mode=mode, tokenizer=tokenizer))


def test_what_trainer_and_pipelines_always_give_is_passed_over_with_a_warning(model, inputs, tokenizer, monkeypatch):
    warnings = []
    monkeypatch.setattr(combination.logger, "warning_once", warnings.append)
    expected = model.generate(**inputs, mode="ctc_greedy")
    got = model.generate(**inputs, mode="ctc_greedy", num_beams=5, max_new_tokens=2, max_length=None)
    assert torch.equal(got, expected)
    assert sorted(warnings) == [f"{given} has no part in mode 'ctc_greedy' and is passed over." for given in GIVEN]


def with_own_labels(model: SpeechLLMForConditionalGeneration, tokenizer) -> SpeechLLMForConditionalGeneration:
    """The same model, whose CTC labels have the texts of the tokens that they were."""
    texts = [tokenizer.decode([token]) for token in model.config.ctc_token_ids]
    other = tiny_model(ctc_token_ids=None, ctc_labels=texts)
    assert other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("mode", ["ctc_greedy", "ctc_beam", "rescoring", "delayed_fusion"])
def test_labels_of_their_own_give_the_text_that_the_same_labels_give_as_tokens(model, inputs, tokenizer, mode):
    options = {"mode": mode, "tokenizer": tokenizer, **(SCALES if mode in COMBINED else {})}
    own = with_own_labels(model, tokenizer).generate(**inputs, **options)
    texts = [" ".join(text.split()) for text in tokenizer.batch_decode(own, skip_special_tokens=True)]
    expected = tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)
    assert texts == [" ".join(text.split()) for text in expected]
    assert len(set(texts)) > 1
    again = tokenizer([f" {text}" if text else "" for text in texts], add_special_tokens=False).input_ids
    assert [[token for token in row if token != tokenizer.pad_token_id] for row in own.tolist()] == again


@pytest.mark.parametrize("mode", ["ctc_greedy", "ctc_beam"])
def test_labels_of_their_own_become_tokens_without_a_space_too_many(model, inputs, tokenizer, mode):
    own, sentencepiece = with_own_labels(model, tokenizer), tiny_sentencepiece()
    texts = tokenizer.batch_decode(own.generate(**inputs, mode=mode, tokenizer=tokenizer), skip_special_tokens=True)
    tokens = own.generate(**inputs, mode=mode, tokenizer=sentencepiece)
    assert [text.split() for text in sentencepiece.batch_decode(tokens, skip_special_tokens=True)] == [
        text.split() for text in texts
    ]
    for row, text in zip(tokens, texts, strict=True):
        expected = "".join(f"▁{word}" for word in text.split())
        assert "".join(sentencepiece.convert_ids_to_tokens(row[row != sentencepiece.pad_token_id])) == expected


def test_labels_of_their_own_need_the_tokenizer_and_are_no_tokens(model, inputs, tokenizer):
    own = with_own_labels(model, tokenizer)
    for mode in ("ctc_greedy", "ctc_beam"):
        with pytest.raises(ValueError, match="tokenizer is required to write what CTC heard"):
            own.generate(**inputs, mode=mode)
    with pytest.raises(ValueError, match="need a CTC head whose labels are tokens of the language model"):
        own.generate(**inputs, mode="label_fusion", tokenizer=tokenizer)


def test_every_mode_is_covered_here_or_in_test_generation():
    assert set(MODES) == {"llm", "ctc_greedy", *SEARCHES}
    assert isinstance(loud_model().generation_config, GenerationConfig)
