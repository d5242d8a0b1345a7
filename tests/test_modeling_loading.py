"""Building, saving and loading speech LLMs: no weight is lost, whichever way they come."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_models import (
    AUDIO_CONFIGS,
    TEXT_CONFIGS,
    feature_extractor,
    loud_model,
    noise,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    ParakeetCTCConfig,
    ParakeetForCTC,
    PreTrainedModel,
)

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.processing_speechllm import AUDIO_TOKEN


def outputs(model: SpeechLLMForConditionalGeneration, audio: str = "moonshine") -> list[torch.Tensor]:
    """Everything that a model computes of two clips, and what it generates."""
    inputs = tiny_processor(audio)(noise(0.3, 0.5))
    with torch.no_grad():
        output = model(**inputs, labels=torch.tensor([[5, 6, 2], [7, 2, -100]]))
    sequences = model.generate(**inputs, ctc_weight=0.3)
    return [output.loss, output.logits, output.audio.ctc_log_probs, output.audio.audio_embeds, sequences]


def assert_same_outputs(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def assert_same_state(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = got.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("auto_class", [AutoModelForSpeechSeq2Seq, AutoModelForMultimodalLM, None])
def test_a_saved_model_is_loaded_with_the_same_outputs(tmp_path, auto_class):
    model = loud_model(ctc_layers=[0, -1], projector="ctc_posterior")
    torch.nn.init.normal_(model.ctc_head.layer_weights)
    torch.nn.init.normal_(model.multi_modal_projector.blank_embedding)
    model.save_pretrained(tmp_path)
    again = (auto_class or SpeechLLMForConditionalGeneration).from_pretrained(tmp_path)
    assert type(again) is SpeechLLMForConditionalGeneration and not again.training
    assert_same_state(again, model)
    assert_same_outputs(outputs(again), outputs(model))


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_every_encoder_survives_saving(tmp_path, audio):
    model = loud_model(audio)
    model.save_pretrained(tmp_path)
    again, info = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_outputs(outputs(again, audio), outputs(model, audio))


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_every_language_model_survives_saving(tmp_path, text):
    model = loud_model(text=text)
    model.save_pretrained(tmp_path)
    assert_same_outputs(outputs(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)), outputs(model))


def test_a_model_survives_saving_in_shards(tmp_path):
    model = loud_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_outputs(outputs(SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)), outputs(model))


@pytest.mark.parametrize("text", ["gpt2", "gemma"])
def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path, text):
    model = loud_model(text=text)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "language_model.lm_head.weight" not in file.keys()  # noqa: SIM118
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    for tied in (model, again):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_embeddings_that_are_not_tied_stay_apart(tmp_path):
    model = loud_model()
    model.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert not torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight)


def test_a_model_in_bfloat16_saves_loads_and_runs(tmp_path):
    model = tiny_model(ctc_layers=[0, -1])
    model.save_pretrained(tmp_path)
    half = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    inputs = tiny_processor()(noise(0.2))
    output = half(**inputs, labels=torch.tensor([[5, 2]]))
    expected = model(**inputs, labels=torch.tensor([[5, 2]]))
    assert output.audio.ctc_log_probs.dtype == torch.float32 and output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, expected.loss, atol=0.05, rtol=0.02, check_dtype=False)
    assert half.generate(**inputs, ctc_weight=0.3, max_new_tokens=2).shape[0] == 1
    half.save_pretrained(tmp_path / "half")
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    assert_same_state(again, half)


def test_a_model_is_placed_by_device_map(tmp_path):
    model = loud_model()
    model.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu")
    assert_same_outputs(outputs(again), outputs(model))


def test_sdpa_and_eager_attention_agree(tmp_path):
    model = loud_model()
    model.save_pretrained(tmp_path)
    for implementation in ("sdpa", "eager"):
        again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
        assert again.language_model.config._attn_implementation == implementation
        assert again.audio_tower.config._attn_implementation == implementation
        for ours, theirs in zip(outputs(again), outputs(model), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_of_the_parts_is_not_lost(implementation):
    """A composite config resets the implementation of its parts, unless it is told."""
    config = tiny_config()
    audio_model = AutoModel.from_config(config.audio_config, attn_implementation=implementation)
    language_model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=implementation)
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(audio_model, language_model)
    for part in (model.config.audio_config, model.config.text_config, model.audio_tower.config, language_model.config):
        assert part._attn_implementation == implementation


def test_the_parts_of_a_fresh_model_have_an_attention_implementation():
    model = tiny_model()
    assert model.audio_tower.config._attn_implementation == "sdpa"
    assert model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_embeddings_are_resized_saved_and_loaded(tmp_path, text):
    model = loud_model(text=text)
    before, size = model.get_input_embeddings().weight.clone(), model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 5)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size + 5
    assert torch.equal(model.get_input_embeddings().weight[:size], before)
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == size + 5
    model.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_outputs(outputs(again), outputs(model))
    again.resize_token_embeddings(size + 9)
    assert again.config.text_config.vocab_size == again.language_model.config.vocab_size == size + 9
    assert again(**tiny_processor()(noise(0.2))).logits.shape[-1] == size + 9


@pytest.mark.parametrize("more", [5, -3])
def test_chains_are_resized_with_the_embeddings(tmp_path, more):
    model = loud_model(ctc_token_ids=None, ctc_labels=["a", "b"], ctc_chain_length=2)
    model.ctc_chains[3:5] = torch.tensor([[0, 1], [1, -1]])
    before, size = model.label_units.chains.clone(), model.config.text_config.vocab_size
    model.resize_token_embeddings(size + more)
    assert torch.equal(model.label_units.chains[:size], before[: size + more])
    assert (model.label_units.chains[size:] == -2).all()  # no token that is new can be spelled
    model.save_pretrained(tmp_path)
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.label_units.chains, model.label_units.chains)
    inputs = tiny_processor()(noise(0.3, 0.5))
    assert torch.equal(again.generate(**inputs, ctc_weight=0.3), model.generate(**inputs, ctc_weight=0.3))


def test_tokens_that_are_ctc_labels_cannot_be_cut_off():
    model = tiny_model()
    size, last = model.config.text_config.vocab_size, max(model.config.ctc_token_ids)
    with pytest.raises(ValueError, match=f"new_num_tokens: expected more than {last}, which is a CTC label"):
        model.resize_token_embeddings(last)
    assert model.config.text_config.vocab_size == len(model.get_input_embeddings().weight) == size
    model.resize_token_embeddings(last + 1)
    assert model.config.text_config.vocab_size == last + 1


def test_initialisation_is_as_the_config_says():
    model = tiny_model(ctc_layers=[0, -1], projector="ctc_posterior", initializer_range=0.5)
    assert abs(float(model.multi_modal_projector.linear_1.weight.std()) - 0.5) < 0.05
    assert not model.multi_modal_projector.linear_2.weight.any()
    assert not model.multi_modal_projector.blank_embedding.any() and not model.ctc_head.layer_weights.any()


def parts_of(audio: str, text: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """An encoder, or the larger model that has one, and a language model."""
    config = tiny_config(audio, text)
    torch.manual_seed(5)
    if audio in ("whisper", "moonshine"):
        audio_model = AutoModelForSpeechSeq2Seq.from_config(config.audio_config)
    elif audio == "parakeet":
        audio_config = ParakeetCTCConfig(vocab_size=9, pad_token_id=0, encoder_config=config.audio_config.to_dict())
        audio_model = ParakeetForCTC(audio_config)
    else:
        config.audio_config.vocab_size = 9
        audio_model = AutoModelForCTC.from_config(config.audio_config)
    language_model = AutoModelForCausalLM.from_config(config.text_config)
    language_model.generation_config = GenerationConfig(
        eos_token_id=[2, 4], bos_token_id=1, pad_token_id=0, do_sample=True, temperature=0.6, top_k=3
    )
    return audio_model.eval(), language_model.eval()


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_two_models_keep_their_weights(audio):
    audio_model, language_model = parts_of(audio)
    encoder_before = {name: value.clone() for name, value in audio_model.get_encoder().state_dict().items()}
    before = {name: value.clone() for name, value in language_model.state_dict().items()}
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        audio_model, language_model, ctc_token_ids=[3, 4, 5], ctc_layers=[0, -1]
    )
    assert model.language_model is language_model
    assert all(torch.equal(value, before[name]) for name, value in language_model.state_dict().items())
    # What AutoModelForCTC calls its encoder is the Transformer behind the convolutions, a part of ours.
    state = model.audio_tower.state_dict()
    for name, value in encoder_before.items():
        assert torch.equal(state.get(name, state.get(f"encoder.{name}")), value)
    assert model.ctc_head is not None and model.config.ctc_layers == [0, -1]
    assert model.generate(**tiny_processor(audio)(noise(0.3)), max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize(("audio", "text"), [("moonshine", "llama"), ("whisper", "gpt2"), ("parakeet", "qwen2")])
def test_two_folders_give_the_model_of_the_two_models_in_them(tmp_path, audio, text):
    audio_model, language_model = parts_of(audio, text)
    audio_model.save_pretrained(tmp_path / "audio")
    language_model.save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        str(tmp_path / "audio"), str(tmp_path / "text"), downsampling=2
    )
    of_models = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        audio_model, language_model, downsampling=2
    )
    assert_same_state(model.audio_tower, of_models.audio_tower)
    assert_same_state(model.language_model, of_models.language_model)
    assert model.config.downsampling == 2
    model.save_pretrained(tmp_path / "both")
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path / "both")
    inputs = tiny_processor(audio)(noise(0.3))
    model.eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_prompts_are_tokenised_by_the_tokenizer_of_the_folder(tmp_path):
    audio_model, language_model = parts_of("moonshine")
    language_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        audio_model, str(tmp_path), prompt_before="<s>", prompt_after=" the ant"
    )
    assert model.config.prompt_before_ids == [1]
    assert model.config.prompt_after_ids == tiny_tokenizer()(" the ant").input_ids
    assert (model.config.prompt_before, model.config.prompt_after) == ("<s>", " the ant")


def test_prompts_are_tokenised_by_a_given_tokenizer_unless_their_ids_are_given():
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        *parts_of("moonshine"),
        tokenizer=tiny_tokenizer(),
        prompt_before="<s>",
        prompt_after="an",
        prompt_after_ids=[7, 8],
    )
    assert model.config.prompt_before_ids == [1] and model.config.prompt_after_ids == [7, 8]


def test_ids_of_a_prompt_need_no_tokenizer():
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        *parts_of("moonshine"), prompt_after="an", prompt_after_ids=[7, 8]
    )
    assert model.config.prompt_after_ids == [7, 8] and model.config.prompt_before_ids == []


def test_a_prompt_as_text_without_tokenizer_is_an_error():
    with pytest.raises(
        ValueError, match="tokenizer: prompt_after is a text .* pass tokenizer=, or .* prompt_after_ids="
    ):
        SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(*parts_of("moonshine"), prompt_after="an")


def test_the_placeholder_of_the_model_is_that_of_its_processor(tmp_path):
    """The embeddings of the tiny language models are three more than the tokens, as those of Qwen are more."""
    audio_model, language_model = parts_of("moonshine")
    language_model.save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    feature_extractor("moonshine").save_pretrained(tmp_path / "audio")
    processor = SpeechLLMProcessor.from_encoder_llm_pretrained(str(tmp_path / "audio"), str(tmp_path / "text"))
    build = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained
    models = [build(audio_model, str(tmp_path / "text"))]
    models.append(build(audio_model, language_model, tokenizer=processor.tokenizer))
    models.append(build(audio_model, language_model, tokenizer=tiny_tokenizer()))
    for model in models:
        assert model.config.audio_token_id == processor.tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        request = processor.apply_transcription_request(noise(0.2))
        assert model.generate(**request, max_new_tokens=1).shape == (1, 2)


def test_the_ends_of_sequence_are_kept_and_sampling_defaults_of_a_chat_model_are_not():
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(*parts_of("moonshine"))
    generation_config = model.generation_config
    assert (generation_config.eos_token_id, generation_config.pad_token_id) == ([2, 4], 0)
    assert not generation_config.do_sample and generation_config.temperature is None
    assert generation_config.max_new_tokens == 256
    inputs = tiny_processor()(noise(0.3))
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), model.generate(**inputs, max_new_tokens=6))


def test_the_type_of_the_weights_is_chosen_or_that_of_the_language_model(tmp_path):
    audio_model, language_model = parts_of("moonshine")
    audio_model.save_pretrained(tmp_path / "audio")
    language_model.to(torch.bfloat16).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    folders = str(tmp_path / "audio"), str(tmp_path / "text")
    build = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), ("auto", torch.bfloat16)):
        assert {parameter.dtype for parameter in build(*folders, dtype=dtype).parameters()} == {expected}


def test_generation_options_of_ours_survive_saving(tmp_path):
    model = tiny_model()
    model.generation_config.ctc_weight = 0.4
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["ctc_weight"] == 0.4
    again = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert (again.generation_config.ctc_weight, again.generation_config.num_beams) == (0.4, 3)
