"""SpeechLLMProcessor and the data collator: what goes in, what comes out, on which side it is padded."""

import numpy as np
import pytest
import torch
from tiny_models import (
    AUDIO_CONFIGS,
    feature_extractor,
    noise,
    tiny_config,
    tiny_processor,
    tiny_sentencepiece,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

from hf_speechllm import SpeechLLMDataCollator, SpeechLLMProcessor
from hf_speechllm.processing_speechllm import AUDIO_TOKEN

PAD, BOS, EOS = 0, 1, 2


def ids_of(*tokens: str) -> list[int]:
    return tiny_tokenizer().convert_tokens_to_ids(list(tokens))


def test_labels_are_the_tokens_of_the_text_after_a_space_and_the_end_of_sequence():
    labels = tiny_processor()(text="the cat")["labels"]
    assert labels.tolist() == [[*ids_of("Ġthe", "Ġ", "c", "a", "t"), EOS]]


def test_every_word_has_the_same_tokens_at_the_beginning_and_later():
    first, later = (tiny_processor().encode_transcript(text) for text in ("the", "is the"))
    assert later[-len(first) :] == first


def test_a_tokenizer_that_puts_a_space_before_the_text_gets_none_of_ours():
    tokenizer = tiny_sentencepiece()
    processor = SpeechLLMProcessor(feature_extractor("moonshine"), tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(processor.encode_transcript(text)) for text in ("the", " is the ", "")]
    assert tokens == [["▁the", "</s>"], ["▁", "i", "s", "▁the", "</s>"], ["</s>"]]


def test_a_tokenizer_that_joins_words_gets_a_space():
    backend = Tokenizer(
        models.BPE(vocab={"a": 0, " ": 1, "a ": 2, "a a": 3, "</s>": 4}, merges=[("a", " "), ("a ", "a")])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert SpeechLLMProcessor(feature_extractor("moonshine"), tokenizer).encode_transcript("a a")[:-1] == [1, 3]


def test_surrounding_space_changes_nothing():
    processor = tiny_processor()
    assert processor.encode_transcript("  the cat \n") == processor.encode_transcript("the cat")


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_the_end_of_sequence(text):
    assert tiny_processor()(text=text)["labels"].tolist() == [[EOS]]


def test_labels_are_padded_on_the_right_with_what_losses_ignore():
    labels = tiny_processor()(text=["the", "", "an ant"])["labels"]
    lens = [2, 1, len(tiny_processor().encode_transcript("an ant"))]
    assert labels.shape == (3, max(lens))
    for row, length in zip(labels, lens, strict=True):
        assert (row[length:] == -100).all() and (row[:length] >= 0).all() and row[length - 1] == EOS


def test_labels_decode_to_the_text():
    processor = tiny_processor()
    ids = processor.encode_transcript("the king's ant")
    assert processor.decode(ids) == "the king's ant"
    assert processor.batch_decode([ids, [EOS, PAD]]) == ["the king's ant", ""]
    assert processor.decode(ids, skip_special_tokens=False).endswith("</s>")


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
def test_features_of_a_clip_are_the_same_alone_and_in_a_padded_batch(audio):
    processor, clips = tiny_processor(audio), noise(0.4, 1.1, 0.05)
    together = processor(clips)
    assert together["input_features_mask"].dtype == torch.long
    for row, clip in enumerate(clips):
        alone = processor(clip)
        steps = int(alone["input_features_mask"].sum())
        assert steps == together["input_features_mask"][row].sum()
        assert together["input_features_mask"][row, :steps].all(), "padding is on the right"
        ours, theirs = together["input_features"][row], alone["input_features"][0]
        if audio == "whisper":
            ours, theirs = ours.T, theirs.T
        torch.testing.assert_close(ours[:steps], theirs[:steps], atol=1e-5, rtol=1e-5)


def test_features_of_whisper_are_the_same_padded_to_30_s():
    processor, (clip,) = tiny_processor("whisper"), noise(0.4)
    short, padded = processor(clip), processor(clip, padding="max_length")
    assert padded["input_features"].shape[-1] == padded["input_features_mask"].shape[-1] == 3000
    assert short["input_features_mask"].sum() == padded["input_features_mask"].sum() == 40
    torch.testing.assert_close(
        padded["input_features"][..., :40], short["input_features"][..., :40], atol=1e-5, rtol=1e-5
    )


def test_features_of_whisper_beyond_30_s_are_not_cut():
    assert tiny_processor("whisper")(noise(31.0)[0])["input_features_mask"].sum() == 3100


def test_a_waveform_is_passed_on_as_it_is():
    (clip,) = noise(0.4)
    inputs = tiny_processor("moonshine")(clip, sampling_rate=16000)
    assert torch.equal(inputs["input_features"], torch.from_numpy(clip)[None])
    assert inputs["input_features_mask"].tolist() == [[1] * 6400]


def test_normalisation_of_a_waveform_does_not_see_the_padding():
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    short, _ = SpeechLLMProcessor(extractor, tiny_tokenizer())(noise(0.3, 0.9))["input_features"]
    assert abs(float(short[:4800].mean())) < 1e-3 and abs(float(short[:4800].std()) - 1.0) < 1e-3
    assert not short[4800:].any()


def test_audio_shorter_than_0_05_s_is_followed_by_silence():
    (clip,) = noise(0.01)
    features = tiny_processor()(clip)["input_features"]
    assert features.shape == (1, 800) and not features[0, 160:].any() and features[0, :160].any()


@pytest.mark.parametrize("as_type", [np.asarray, list, torch.tensor, np.float64])
def test_audio_is_taken_as_one_waveform_or_as_a_list(as_type):
    (clip,) = noise(0.1)
    one = tiny_processor()([as_type(clip)])["input_features"]
    assert torch.equal(one, torch.from_numpy(clip)[None])
    if as_type is not list:
        assert torch.equal(tiny_processor()(as_type(clip))["input_features"], one)
    two = tiny_processor()(np.stack([clip, clip]))["input_features"]
    assert torch.equal(two, one.expand(2, -1))


def test_audio_and_text_together_make_a_training_batch():
    batch = tiny_processor()(noise(0.2, 0.3), text=["an", "the ant"])
    assert set(batch) == {"input_features", "input_features_mask", "labels"}
    assert set(batch) | {"input_ids", "attention_mask"} == {*tiny_processor().model_input_names, "labels"}


def test_the_collator_makes_the_same_batch_of_examples():
    clips, texts = noise(0.2, 0.3), ["an", "the ant"]
    collator = SpeechLLMDataCollator(tiny_processor())
    batch = collator([{"waveform": c, "text": t, "id": 7} for c, t in zip(clips, texts, strict=True)])
    expected = tiny_processor()(clips, text=texts)
    assert type(batch) is dict and set(batch) == set(expected)
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_transcription_request_has_the_prompt_of_the_model_around_the_audio():
    processor = tiny_processor()
    request = processor.apply_transcription_request(noise(0.2, 0.3))
    assert request["input_ids"].tolist() == [[BOS, processor.audio_token_id, EOS, BOS]] * 2
    assert request["attention_mask"].tolist() == [[1] * 4] * 2
    assert request["input_features"].shape == (2, 4800) and "labels" not in request


def test_one_prompt_goes_to_every_audio():
    processor = tiny_processor()
    request = processor.apply_transcription_request(noise(0.2, 0.3), prompt=" an ant")
    assert processor.tokenizer.batch_decode(request["input_ids"]) == [f"<s>{AUDIO_TOKEN} an ant"] * 2


def test_many_prompts_go_one_to_each_audio_and_are_padded_on_the_left():
    processor = tiny_processor()
    request = processor.apply_transcription_request(noise(0.2, 0.3), prompt=["", "the ant"])
    assert request["input_ids"][0].tolist()[-2:] == [BOS, processor.audio_token_id]
    assert processor.tokenizer.decode(request["input_ids"][1]) == f"<s>{AUDIO_TOKEN}the ant"
    padding = request["input_ids"].shape[1] - 2
    assert request["input_ids"][0, :padding].tolist() == [PAD] * padding
    assert request["attention_mask"].tolist() == [[0] * padding + [1, 1], [1] * (padding + 2)]


@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"], []])
def test_a_wrong_number_of_prompts_is_an_error(prompts):
    message = f"prompt: one text or one for each of the 2 audios is expected, got {len(prompts)}"
    with pytest.raises(ValueError, match=message):
        tiny_processor().apply_transcription_request(noise(0.2, 0.3), prompt=prompts)


def test_the_audio_placeholder_is_one_special_token_past_the_vocabulary():
    tokenizer = tiny_tokenizer()
    processor = tiny_processor()
    assert processor.audio_token_id == len(tokenizer) == tiny_config().audio_token_id
    assert processor.decode([processor.audio_token_id, *ids_of("a")]) == "a"


def test_special_tokens_of_the_language_model_stay_special():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    processor = SpeechLLMProcessor(feature_extractor("moonshine"), tokenizer)
    assert processor.tokenizer.extra_special_tokens == ["<|turn|>", AUDIO_TOKEN]
    assert processor.decode(tokenizer("<|turn|>a").input_ids) == "a"


def test_a_tokenizer_without_pad_token_pads_with_the_end_of_sequence():
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", padding_side="left")
    processor = SpeechLLMProcessor(feature_extractor("moonshine"), tokenizer)
    assert processor.pad_token_id == EOS
    assert processor.tokenizer.padding_side == processor.feature_extractor.padding_side == "right"


def test_the_tokenizer_that_is_given_stays_as_it_is_and_one_that_is_ready_is_not_copied():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token, size = "left", None, len(tokenizer)
    processor = SpeechLLMProcessor(feature_extractor("moonshine"), tokenizer)
    assert (tokenizer.padding_side, tokenizer.pad_token, len(tokenizer)) == ("left", None, size)
    assert AUDIO_TOKEN not in tokenizer.get_vocab() and tokenizer.extra_special_tokens == []
    assert SpeechLLMProcessor(feature_extractor("moonshine"), processor.tokenizer).tokenizer is processor.tokenizer


@pytest.mark.parametrize("audio", ["moonshine", "whisper", "wav2vec2-bert", "parakeet"])
@pytest.mark.parametrize("loader", [AutoProcessor, SpeechLLMProcessor])
def test_the_processor_survives_saving(tmp_path, audio, loader):
    processor, clips = tiny_processor(audio), noise(0.2, 0.5)
    processor.save_pretrained(tmp_path)
    tiny_config(audio).save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    assert type(again) is SpeechLLMProcessor
    assert (again.prompt_before, again.prompt_after) == ("<s>", "</s><s>")
    assert again.sampling_rate == 16000 and again.pad_token_id == PAD
    assert again.audio_token_id == processor.audio_token_id
    expected, got = (p(clips, text=["the ant", ""]) | p.apply_transcription_request(clips) for p in (processor, again))
    assert set(got) == set(expected) and all(torch.equal(got[name], expected[name]) for name in got)


def test_a_processor_is_made_of_two_folders(tmp_path):
    feature_extractor("whisper").save_pretrained(tmp_path / "audio")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    processor = SpeechLLMProcessor.from_encoder_llm_pretrained(
        str(tmp_path / "audio"), str(tmp_path / "text"), prompt_before="<s>", prompt_after="the"
    )
    assert type(processor.feature_extractor) is type(feature_extractor("whisper"))
    request = processor.apply_transcription_request(noise(0.2))
    assert processor.tokenizer.decode(request["input_ids"][0]) == f"<s>{AUDIO_TOKEN}the"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "audio, text: at least one of them is required, got neither"),
        ({"text": "a", "return_tensors": "np"}, "return_tensors must be 'pt', got 'np'"),
        (
            {"audio": np.zeros(800, np.float32), "sampling_rate": 8000},
            "sampling_rate must be 16000 Hz for this model, got 8000; resample the audio",
        ),
        (
            {"audio": [np.zeros(800, np.float32), np.zeros(0, np.float32)]},
            r"audio: each must be a non-empty mono waveform \[samples\], got shape \(0,\) at index 1",
        ),
        ({"audio": np.zeros(0, np.float32)}, r"got shape \(0,\) at index 0"),
        ({"audio": [np.zeros((2, 800), np.float32)]}, r"got shape \(2, 800\) at index 0"),
        ({"audio": np.zeros((1, 2, 800), np.float32)}, r"got shape \(2, 800\) at index 0"),
        ({"audio": np.zeros((800, 2), np.float32)}, r"batch \[B, samples\], got shape \(800, 2\), which looks like"),
        ({"audio": torch.zeros(800, 2)}, r"looks like \[samples, channels\]; take the mean over the channels"),
    ],
)
def test_a_wrong_input_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(**arguments)
