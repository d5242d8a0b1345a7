"""`pipeline("automatic-speech-recognition")`: every kind of input, long audio, options, other people's models."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import feature_extractor, lively, tiny_model, tiny_processor, tiny_tokenizer
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)

from hf_speechllm import SpeechLLMPipeline
from hf_speechllm.audio import AudioError
from hf_speechllm.generation_speechllm import OPTION_DEFAULTS
from hf_speechllm.lm_score import CausalLMScorer

RATE = 16_000
TASK = "automatic-speech-recognition"


def tone(duration_s: float, frequency_hz: float, rate: int = RATE) -> np.ndarray:
    """A sine with a little noise; each frequency gives another text."""
    time_s = np.arange(round(duration_s * rate)) / rate
    noise = np.random.default_rng(int(frequency_hz)).standard_normal(len(time_s))
    return (0.3 * np.sin(2 * np.pi * frequency_hz * time_s) + 0.01 * noise).astype(np.float32)


def wav(waveform: np.ndarray, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


CLIPS = [tone(1.0, 200), tone(1.7, 900), tone(0.7, 3000), tone(2.0, 440)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("speechllm")
    model = lively(tiny_model(max_audio_duration_s=2.0))
    model.generation_config.ctc_weight = 0.5
    model.generation_config.update(num_beams=1, max_new_tokens=12)
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(TASK, model=folder)


@pytest.fixture(scope="module")
def texts(pipe):
    """What the model itself says about each of CLIPS, alone, without a pipeline."""
    processor = tiny_processor()
    texts = []
    for clip in CLIPS:
        texts.append(processor.batch_decode(pipe.model.generate(**processor(clip, sampling_rate=RATE)))[0])
    assert len(set(texts)) == len(CLIPS) and all(texts)
    return texts


def test_pipeline_of_a_saved_model_is_ours(pipe):
    assert type(pipe) is SpeechLLMPipeline
    assert pipe.type == "seq2seq"


def test_pipeline_gives_the_text_of_generate_for_an_array(pipe, texts):
    assert [pipe(clip) for clip in CLIPS] == [{"text": text} for text in texts]


def test_pipeline_reads_a_file_path(pipe, texts, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(wav(CLIPS[1]))
    assert pipe(str(path))["text"] == texts[1]


def test_pipeline_reads_the_bytes_of_a_file(pipe, texts):
    assert pipe(wav(CLIPS[1]))["text"] == texts[1]


@pytest.mark.parametrize("key", ["raw", "array"])
def test_pipeline_reads_a_dict_with_samples_and_rate(pipe, texts, key):
    assert pipe({key: CLIPS[1], "sampling_rate": RATE, "path": None})["text"] == texts[1]


def test_pipeline_reads_a_tensor(pipe, texts):
    assert pipe(torch.from_numpy(CLIPS[1]))["text"] == texts[1]


def test_pipeline_averages_the_channels_of_a_stereo_dict(pipe, texts):
    stereo = np.stack([2 * CLIPS[1], np.zeros_like(CLIPS[1])])
    assert pipe({"raw": stereo, "sampling_rate": RATE})["text"] == texts[1]


def test_pipeline_resamples_a_dict_and_a_file_of_another_rate_alike(pipe, monkeypatch):
    from hf_speechllm import audio

    resampled = audio.prepare_waveform({"raw": tone(1.7, 900, 44_100), "sampling_rate": 44_100})
    expected = pipe(resampled)["text"]
    assert pipe({"raw": tone(1.7, 900, 44_100), "sampling_rate": 44_100})["text"] == expected
    assert pipe(wav(tone(1.7, 900, 44_100), 44_100))["text"] == expected
    assert pipe(tone(1.7, 900, 44_100)[: 2 * RATE])["text"] != expected  # the rate of an array is the model's


def test_pipeline_fetches_a_web_address(pipe, texts, monkeypatch):
    monkeypatch.setattr("hf_speechllm.segmented_pipeline.urlopen", lambda address: io.BytesIO(wav(CLIPS[1])))
    assert pipe("https://example.org/clip.wav")["text"] == texts[1]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_pipeline_batch_of_different_lengths_equals_single(pipe, texts, batch_size):
    assert [output["text"] for output in pipe(CLIPS, batch_size=batch_size)] == texts


def test_pipeline_streams_a_generator(pipe, texts):
    seen = []

    def clips():
        for index, clip in enumerate(CLIPS):
            seen.append(index)
            yield clip

    outputs = pipe(clips())
    assert next(iter(outputs))["text"] == texts[0]
    assert len(seen) < len(CLIPS), "all audio was read before the first text came out"
    assert [output["text"] for output in pipe(clips(), batch_size=2)] == texts


def test_pipeline_returns_the_other_entries_of_a_dict_but_never_in_place_of_the_text(pipe, texts):
    row = {"array": CLIPS[1], "sampling_rate": RATE, "id": "a1", "text": "the reference"}
    assert pipe(row) == {"text": texts[1], "id": ["a1"]}


def test_pipeline_of_a_whisper_encoder_batches_the_longest_clip_with_short_ones(tmp_path):
    model, processor = lively(tiny_model("whisper")), tiny_processor("whisper")
    model.generation_config.ctc_weight = 0.5
    model.generation_config.num_beams = 1
    pipe = pipeline(TASK, model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor)
    clips = [CLIPS[0], tone(30.0, 700)]
    singles = [pipe(clip) for clip in clips]
    # Without the 30 s of padding that the pipeline's batches need:
    tokens = model.generate(**processor(clips[0], sampling_rate=RATE))
    assert singles[0]["text"] == processor.batch_decode(tokens)[0]
    assert pipe(clips, batch_size=2) == singles
    assert pipe(clips[::-1], batch_size=2) == singles[::-1]


# Long audio: max_audio_duration_s is 2 s.


def long_audio() -> np.ndarray:
    """Two clips with a pause between that is cut in its middle."""
    return np.concatenate([CLIPS[0], np.zeros(round(0.5 * RATE), np.float32), CLIPS[1]])


def test_audio_longer_than_the_training_is_cut_at_a_pause_and_all_pieces_are_transcribed(pipe):
    audio = long_audio()
    output = pipe(audio, return_timestamps=True)
    (start, cut), (also_cut, end) = [chunk["timestamp"] for chunk in output["chunks"]]
    assert (start, end) == (0.0, len(audio) / RATE) and cut == also_cut
    assert 1.0 < cut < 1.5
    pieces = [pipe(piece)["text"] for piece in (audio[: round(cut * RATE)], audio[round(cut * RATE) :])]
    assert [chunk["text"] for chunk in output["chunks"]] == pieces
    assert output["text"] == " ".join(pieces)
    assert pipe(audio) == {"text": output["text"]}


def test_batches_of_pieces_of_several_long_recordings_are_put_together_again(pipe):
    recordings = [long_audio(), CLIPS[2], long_audio()[::-1].copy()]
    singles = [pipe(recording, return_timestamps=True) for recording in recordings]
    assert [len(single["chunks"]) for single in singles] == [2, 1, 2]
    assert pipe(recordings, batch_size=3, return_timestamps=True) == singles


def test_chunk_length_s_shortens_the_pieces(pipe, folder):
    output = pipe(CLIPS[3], chunk_length_s=0.6, return_timestamps=True)
    durations_s = [end - start for start, end in (chunk["timestamp"] for chunk in output["chunks"])]
    assert len(durations_s) >= 4 and max(durations_s) <= 0.6 + 1e-6
    assert output["text"] != pipe(CLIPS[3])["text"]
    assert pipeline(TASK, model=folder, chunk_length_s=0.6)(CLIPS[3])["text"] == output["text"]


def test_chunk_length_s_never_exceeds_what_the_model_was_trained_on(pipe):
    assert pipe(long_audio(), chunk_length_s=60.0) == pipe(long_audio())


def test_return_timestamps_of_short_audio_spans_it(pipe, texts):
    output = pipe(CLIPS[1], return_timestamps=True)
    assert output == {"text": texts[1], "chunks": [{"text": texts[1], "timestamp": (0.0, 1.7)}]}
    assert json.dumps(output)  # plain numbers
    assert "chunks" not in pipe(CLIPS[1], return_timestamps=False)


# Decoding options.


def options_of_generate(pipe, monkeypatch) -> list[dict]:
    """Collects the options that reach `generate`."""
    calls = []
    generate = type(pipe.model).generate

    def spy(self, *args, **kwargs):
        calls.append(kwargs)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.model), "generate", spy)
    return calls


def test_the_plain_tokenizer_of_the_language_model_will_do(pipe, texts):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    other = pipeline(TASK, model=pipe.model, tokenizer=tokenizer, feature_extractor=feature_extractor("moonshine"))
    assert [output["text"] for output in other(CLIPS, batch_size=4)] == texts
    assert tokenizer.padding_side == "left"
    assert other.tokenizer is other.processor.tokenizer


OPTIONS = [{"ctc_weight": 0.9}, {"num_beams": 3}, {"mode": "ctc_greedy"}, {"ctc_weight": 0.9, "max_new_tokens": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoding_options_mean_the_same_at_construction_in_a_call_and_in_generate_kwargs(
    pipe, texts, folder, monkeypatch, options
):
    processor = tiny_processor()
    inputs = processor(CLIPS[3], sampling_rate=RATE)
    expected = processor.batch_decode(pipe.model.generate(**inputs, **options))[0]
    calls = options_of_generate(pipe, monkeypatch)
    assert pipe(CLIPS[3], **options)["text"] == expected
    assert pipe(CLIPS[3], generate_kwargs=options)["text"] == expected
    assert pipeline(TASK, model=folder, **options)(CLIPS[3])["text"] == expected
    assert pipeline(TASK, model=folder, generate_kwargs=options)(CLIPS[3])["text"] == expected
    assert all(call[name] == value for call in calls for name, value in options.items())
    assert pipe(CLIPS[3])["text"] == texts[3], "options of a call must not outlive it"


def test_ctc_weight_and_mode_change_the_text(pipe, texts):
    others = [pipe(CLIPS[3], ctc_weight=0.0), pipe(CLIPS[3], ctc_weight=0.9), pipe(CLIPS[3], mode="ctc_greedy")]
    assert len({texts[3], *(output["text"] for output in others)}) == 4


def test_options_of_a_call_win_over_those_of_the_construction(pipe, folder):
    other = pipeline(TASK, model=folder, ctc_weight=0.0, num_beams=4)
    assert other(CLIPS[3], ctc_weight=0.9, num_beams=1) == pipe(CLIPS[3], ctc_weight=0.9)


ALL_OPTIONS = (
    {"mode": "llm", "ctc_weight": 0.25, "ctc_top_k": 5},
    {
        "mode": "delayed_fusion",
        "lm_weight": 0.7,
        "prior_weight": 0.1,
        "length_reward": 0.6,
        "ctc_beam_size": 3,
        "fusion_interval": 2,
    },
)


def test_a_call_may_choose_another_mode_than_the_options_of_the_construction_are_for(pipe, folder):
    joint = pipeline(TASK, model=folder, ctc_weight=0.5, num_beams=3, length_penalty=0.0)
    greedy = pipe(CLIPS[3], mode="ctc_greedy")
    assert joint(CLIPS[3], mode="ctc_greedy") == greedy
    assert (
        joint(CLIPS[3], mode="llm")
        == joint(CLIPS[3])
        == pipe(CLIPS[3], ctc_weight=0.5, num_beams=3, length_penalty=0.0)
    )
    searched = pipeline(TASK, model=folder, mode="ctc_beam", ctc_beam_size=2)
    assert searched(CLIPS[3], mode="ctc_greedy") == greedy
    with pytest.raises(ValueError, match="ctc_beam_size: it has no part in mode 'ctc_greedy'"):
        joint(CLIPS[3], mode="ctc_greedy", ctc_beam_size=2)


def test_every_option_of_ours_is_given():
    given = ALL_OPTIONS[0] | ALL_OPTIONS[1]
    assert set(given) == set(OPTION_DEFAULTS)
    assert all(value != OPTION_DEFAULTS[name] for name, value in given.items())


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=["llm", "delayed_fusion"])
def test_every_option_of_ours_and_the_tokenizer_reach_generate(pipe, folder, monkeypatch, options):
    expected = tiny_processor().batch_decode(
        pipe.model.generate(
            **tiny_processor()(CLIPS[1], sampling_rate=RATE), **options, tokenizer=tiny_processor().tokenizer
        )
    )[0]
    calls = options_of_generate(pipe, monkeypatch)
    assert pipe(CLIPS[1], **options)["text"] == expected
    assert pipe(CLIPS[1], generate_kwargs=options)["text"] == expected
    constructed = pipeline(TASK, model=folder, **options)
    assert constructed(CLIPS[1])["text"] == expected
    assert len(calls) == 3
    for call, owner in zip(calls, (pipe, pipe, constructed), strict=True):
        assert {name: call[name] for name in options} == options
        assert call["tokenizer"] is owner.tokenizer


@pytest.mark.parametrize("mode", ["ctc_beam", "rescoring", "label_fusion", "delayed_fusion"])
def test_modes_that_search_ctc_labels_give_in_a_batch_what_they_give_alone(pipe, mode):
    options = {"mode": mode, "ctc_beam_size": 4}
    options |= {} if mode == "ctc_beam" else {"lm_weight": 0.7, "length_reward": 0.5}
    singles = [pipe(clip, **options) for clip in CLIPS]
    assert pipe(CLIPS, batch_size=4, **options) == singles
    assert len({single["text"] for single in singles}) > 1


def test_a_language_model_is_given_by_folder_or_as_a_scorer_and_loaded_once(pipe, folder, tmp_path, monkeypatch):
    other = lively(tiny_model(seed=7)).language_model
    other.save_pretrained(tmp_path)
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    scorer = CausalLMScorer(other, tiny_processor().tokenizer)
    options = {"mode": "rescoring", "lm_weight": 2.0, "ctc_beam_size": 4}
    inputs = tiny_processor()(CLIPS[1], sampling_rate=RATE)
    tokens = pipe.model.generate(**inputs, lm=scorer, tokenizer=scorer.tokenizer, **options)
    expected = tiny_processor().batch_decode(tokens)[0]
    assert expected != pipe(CLIPS[1], **options)["text"]
    assert (
        pipe(CLIPS[1], lm=scorer, **options)["text"] == pipe(CLIPS[1], lm=str(tmp_path), **options)["text"] == expected
    )
    constructed = pipeline(TASK, model=folder, lm=tmp_path, **options)
    calls = options_of_generate(pipe, monkeypatch)
    assert [constructed(clip)["text"] for clip in CLIPS[:2]][1] == expected
    assert calls[0]["lm"] is calls[1]["lm"]
    assert pipe(CLIPS[1], **options)["text"] != expected, "the language model of a call must not outlive it"
    with pytest.raises(TypeError, match="lm: expected a Hub id, a folder or a CausalLMScorer, got LlamaForCausalLM"):
        pipe(CLIPS[1], lm=other)


def test_bfloat16_is_accepted(folder):
    pipe = pipeline(TASK, model=folder, dtype="bfloat16")
    assert pipe.model.dtype == torch.bfloat16
    assert pipe(CLIPS[:2], batch_size=2)[1]["text"]


# transformers' own pipeline class with our model.


def test_transformers_own_pipeline_class_takes_our_model_for_a_sequence_to_sequence_model(pipe, texts):
    processor = tiny_processor()
    stock = AutomaticSpeechRecognitionPipeline(
        model=pipe.model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )
    assert type(stock) is AutomaticSpeechRecognitionPipeline and stock.type == "seq2seq"
    assert [output["text"].strip() for output in stock(CLIPS, batch_size=2)] == texts
    assert stock(CLIPS[3], ctc_weight=0.9)["text"].strip() == pipe(CLIPS[3], ctc_weight=0.9)["text"]


# Other models.


def tiny_whisper() -> dict:
    vocab = {token: i for i, token in enumerate([*"abcdefghijklmnopqrstuvwxyz", "Ġ"])}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    return {"model": model, "tokenizer": tokenizer, "feature_extractor": feature_extractor("whisper")}


def tiny_moonshine() -> dict:
    config = MoonshineConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        pad_token_id=0,
    )
    model = MoonshineForConditionalGeneration(config)
    return {"model": model, "tokenizer": tiny_tokenizer(), "feature_extractor": feature_extractor("moonshine")}


def tiny_wav2vec2_ctc(tmp_path) -> dict:
    vocab_path = tmp_path / "vocab.json"
    vocab_path.write_text(json.dumps({token: i for i, token in enumerate(["<pad>", "|", *"abcdefgh"])}))
    tokenizer = Wav2Vec2CTCTokenizer(str(vocab_path), unk_token=None, bos_token=None, eos_token=None)
    config = Wav2Vec2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(20, 16),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return {"model": Wav2Vec2ForCTC(config), "tokenizer": tokenizer, "feature_extractor": feature_extractor("wav2vec2")}


@pytest.mark.parametrize("name", ["whisper", "moonshine", "wav2vec2_ctc"])
def test_other_models_get_transformers_own_pipeline_and_the_same_text(name, tmp_path):
    torch.manual_seed(5)
    parts = {"whisper": tiny_whisper, "moonshine": tiny_moonshine}.get(name, lambda: tiny_wav2vec2_ctc(tmp_path))()
    lively(parts["model"].eval())
    stock = AutomaticSpeechRecognitionPipeline(**parts)
    handed_through = pipeline(TASK, **parts)
    assert type(handed_through) is AutomaticSpeechRecognitionPipeline
    kind = {"whisper": "seq2seq_whisper", "moonshine": "seq2seq", "wav2vec2_ctc": "ctc"}[name]
    assert handed_through.type == stock.type == kind
    options = {"generate_kwargs": {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 1}} if kind != "ctc" else {}
    expected = [stock(clip.copy(), **options) for clip in CLIPS[:2]]
    assert expected[0]["text"]
    assert [handed_through(clip.copy(), **options) for clip in CLIPS[:2]] == expected


def test_timestamps_and_strides_of_other_models_still_work(tmp_path):
    parts = tiny_wav2vec2_ctc(tmp_path)
    output = pipeline(TASK, **parts)(CLIPS[3].copy(), return_timestamps="char", chunk_length_s=1.0, stride_length_s=0.1)
    assert set(output) == {"text", "chunks"}


def test_a_model_of_another_type_with_our_pipeline_class_is_handed_through_by_position_too():
    parts = tiny_moonshine()
    handed_through = SpeechLLMPipeline(parts["model"], parts["feature_extractor"], parts["tokenizer"])
    assert type(handed_through) is AutomaticSpeechRecognitionPipeline
    assert handed_through.tokenizer is parts["tokenizer"]


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride_length_s": 1.0}, r"stride_length_s is not used: pieces are cut at pauses .* leave it out"),
        ({"return_timestamps": "char"}, r"return_timestamps must be True \(times of the pieces\), 'word' or False"),
        ({"chunk_length_s": 0.0}, r"chunk_length_s must be at least 0.2 seconds, got 0.0"),
        ({"chunk_length_s": -1}, r"chunk_length_s must be at least 0.2 seconds, got -1"),
        ({"chunk_length_s": 0.1}, r"chunk_length_s must be at least 0.2 seconds, got 0.1"),
        ({"ctc_weight": 2.0}, r"ctc_weight must lie between 0 .* and 1 .*, got 2.0"),
        ({"mode": "greedy"}, r"mode must be one of .*, got 'greedy'"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant_is_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(CLIPS[2], **options)


@pytest.mark.parametrize("options", [{"stride_length_s": 1.0}, {"return_timestamps": "char"}, {"chunk_length_s": 0}])
def test_an_option_that_cannot_be_meant_is_refused_at_construction(folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        pipeline(TASK, model=folder, **options)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ("/no/such/file.wav", r"/no/such/file.wav: no such file"),
        (b"", r"audio bytes: empty"),
        (b"no audio at all", r"audio bytes: (not readable as wav|neither libsndfile nor ffmpeg)"),
        (np.zeros(0, np.float32), r"audio: contains no audio samples"),
        (np.full(RATE, np.nan, np.float32), r"audio: contains NaN or infinite samples"),
        (np.zeros((3, 4, 5), np.float32), r"audio: expected \[samples\] or \[channels, samples\]"),
        ({"raw": np.zeros(RATE, np.float32)}, r"expected a mapping with 'raw' or 'array' and 'sampling_rate'"),
        ({"raw": np.zeros(RATE, np.float32), "sampling_rate": 0}, r"sampling_rate: expected an integer from"),
    ],
    ids=["no file", "no bytes", "noise", "no samples", "nan", "3-d", "no rate", "bad rate"],
)
def test_bad_audio_is_named(pipe, audio, message):
    with pytest.raises(AudioError, match=message):
        pipe(audio)
