"""`pipeline(..., lm=...)`: models of others, combined with a language model."""

import json
import math

import numpy as np
import pytest
import torch
from test_pipeline import RATE, TASK, tiny_moonshine, tiny_whisper, tone
from tiny_models import (
    AUDIO_CONFIGS,
    TEXT_CONFIGS,
    feature_extractor,
    lively,
    noise,
    tiny_tokenizer,
)
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertForCTC,
    ParakeetCTCConfig,
    ParakeetForCTC,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperTokenizer,
    pipeline,
)

from hf_speechllm import fusion_pipeline
from hf_speechllm.ctc_beam_search import ctc_beam_search
from hf_speechllm.ctc_text import labels_to_text_of
from hf_speechllm.fusion_pipeline import CTCFusionPipeline, Seq2SeqRescoringPipeline, has_upper_case_only
from hf_speechllm.lm_score import CausalLMScorer
from hf_speechllm.rescoring import nbest_from_seq2seq

CLIPS = noise(0.45, 0.8, 0.3)
TOKENS = ["<pad>", "|", *"ABCDEFGH"]
OPTIONS = {"lm_weight": 0.8, "length_reward": 0.4, "ctc_beam_size": 4}
GENERATE = {"num_beams": 3, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory) -> str:
    torch.manual_seed(2)
    config = {**TEXT_CONFIGS["gpt2"], "vocab_size": len(tiny_tokenizer()), "bos_token_id": 1, "eos_token_id": 2}
    config.pop("model_type")
    model = lively(GPT2LMHeadModel(GPT2Config(**config)).eval(), 8.0)
    path = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def scorer(lm_folder) -> CausalLMScorer:
    return CausalLMScorer(GPT2LMHeadModel.from_pretrained(lm_folder).eval(), tiny_tokenizer())


def ctc_tokenizer(folder, tokens=tuple(TOKENS)) -> Wav2Vec2CTCTokenizer:
    path = folder / "vocab.json"
    path.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return Wav2Vec2CTCTokenizer(str(path), unk_token=None, bos_token=None, eos_token=None)


def config_of(name: str) -> dict:
    config = {**AUDIO_CONFIGS[name], "vocab_size": len(TOKENS), "pad_token_id": 0}
    config.pop("model_type")
    return config


def ctc_model(name: str):
    """A CTC model and the entry of AUDIO_CONFIGS whose feature extractor it has."""
    layer_norm = config_of("wav2vec2-layer-norm")
    return {
        "wav2vec2-base": lambda: (Wav2Vec2ForCTC(Wav2Vec2Config(**config_of("wav2vec2"))), "no mask"),
        "wav2vec2-base-masked": lambda: (Wav2Vec2ForCTC(Wav2Vec2Config(**config_of("wav2vec2"))), "wav2vec2"),
        "wav2vec2-large": lambda: (Wav2Vec2ForCTC(Wav2Vec2Config(**layer_norm)), "wav2vec2"),
        "wav2vec2-adapter": lambda: (Wav2Vec2ForCTC(Wav2Vec2Config(**layer_norm, add_adapter=True)), "wav2vec2"),
        "hubert-large": lambda: (HubertForCTC(HubertConfig(**layer_norm)), "hubert"),
        "wav2vec2-conformer": lambda: (
            Wav2Vec2ConformerForCTC(
                Wav2Vec2ConformerConfig(**{**layer_norm, "conv_depthwise_kernel_size": 5, "conformer_conv_dropout": 0})
            ),
            "wav2vec2",
        ),
        "wav2vec2-bert": lambda: (Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**config_of("wav2vec2-bert"))), name),
        "wav2vec2-bert-adapter": lambda: (
            Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**config_of("wav2vec2-bert"), add_adapter=True)),
            "wav2vec2-bert",
        ),
        "parakeet": lambda: (
            ParakeetForCTC(
                ParakeetCTCConfig(
                    vocab_size=len(TOKENS),
                    pad_token_id=0,
                    encoder_config={**AUDIO_CONFIGS["parakeet"], "model_type": "parakeet_encoder"},
                )
            ),
            "parakeet",
        ),
    }[name]()


def ctc_parts(name: str, folder) -> dict:
    torch.manual_seed(4)
    model, extractor = ctc_model(name)
    extractor = (
        Wav2Vec2FeatureExtractor(return_attention_mask=False)
        if extractor == "no mask"
        else feature_extractor(extractor)
    )
    return {"model": lively(model.eval()), "feature_extractor": extractor, "tokenizer": ctc_tokenizer(folder)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    return ctc_parts("wav2vec2-large", tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def pipe(parts, scorer) -> CTCFusionPipeline:
    return pipeline(TASK, **parts, lm=scorer, **OPTIONS)


def searched_alone(parts, scorer, clip, interval=1, lm_weight=0.8, length_reward=0.4) -> str:
    """The text of a clip by the model and the search themselves, without a pipeline and without padding."""
    inputs = parts["feature_extractor"](clip, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        log_probs = parts["model"](**inputs).logits.float().log_softmax(-1)
    length = log_probs.shape[1]
    if isinstance(parts["model"], ParakeetForCTC):
        length = int(parts["model"]._get_subsampling_output_length(inputs["attention_mask"].sum(1)))
    spell = labels_to_text_of(parts["tokenizer"])
    (best, *_), *_ = ctc_beam_search(
        log_probs,
        torch.tensor([length]),
        blank_id=0,
        beam_size=4,
        lm=scorer,
        lm_weight=lm_weight,
        fusion="delayed",
        interval=interval,
        labels_to_text=lambda labels: spell(labels).lower(),
        length_reward=length_reward,
    )
    return " ".join(spell(best.labels).split())


# CTC models.

NAMES = (
    "wav2vec2-base",
    "wav2vec2-base-masked",
    "wav2vec2-large",
    "hubert-large",
    "wav2vec2-conformer",
    "wav2vec2-bert",
    "wav2vec2-bert-adapter",
    "parakeet",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_the_text_of_the_search_over_each_clip_alone(name, tmp_path, scorer):
    parts = ctc_parts(name, tmp_path)
    pipe = pipeline(TASK, **parts, lm=scorer, **OPTIONS)
    assert type(pipe) is CTCFusionPipeline and isinstance(pipe, AutomaticSpeechRecognitionPipeline)
    expected = [searched_alone(parts, scorer, clip) for clip in CLIPS]
    assert len(set(expected)) == len(CLIPS) and max(map(len, expected)) > 3
    assert [pipe(clip)["text"] for clip in CLIPS] == expected
    assert [output["text"] for output in pipe(CLIPS[::-1], batch_size=3)] == expected[::-1]


def test_rescoring_and_the_interval_of_delayed_fusion_are_those_of_the_search(pipe, parts, scorer):
    for interval, options in ((None, {"fusion": "rescoring"}), (7, {"fusion_interval": 7})):
        expected = [searched_alone(parts, scorer, clip, interval) for clip in CLIPS]
        assert [output["text"] for output in pipe(CLIPS, batch_size=3, **options)] == expected


def test_options_mean_the_same_at_construction_and_in_a_call_which_they_do_not_outlive(pipe, parts, scorer):
    before = pipe(CLIPS[1])
    options = {"lm_weight": 4.0, "length_reward": -1.0, "fusion": "rescoring", "ctc_beam_size": 4}
    called = pipe(CLIPS[1], **options)
    assert called["text"] == searched_alone(parts, scorer, CLIPS[1], None, 4.0, -1.0) != before["text"]
    assert pipeline(TASK, **parts, lm=scorer, **options)(CLIPS[1]) == called
    assert pipe(CLIPS[1]) == before


def test_a_language_model_is_loaded_from_a_folder_once(pipe, parts, lm_folder, monkeypatch):
    named = pipeline(TASK, **parts, lm=lm_folder, **OPTIONS)
    monkeypatch.setattr("hf_speechllm.segmented_pipeline.AutoModelForCausalLM", None)
    assert [output["text"] for output in named(CLIPS, batch_size=3)] == [pipe(clip)["text"] for clip in CLIPS]


def test_a_saved_model_is_combined_by_its_folder(pipe, parts, lm_folder, tmp_path):
    for part in parts.values():
        part.save_pretrained(tmp_path)
    assert pipeline(TASK, model=str(tmp_path), lm=lm_folder, **OPTIONS)(CLIPS[1]) == pipe(CLIPS[1])


@pytest.mark.parametrize(("lm_lowercase", "is_lower"), [(None, True), (True, True), (False, False)])
def test_the_language_model_reads_upper_case_labels_in_lower_case_and_the_text_stays_as_it_is(
    pipe, scorer, monkeypatch, lm_lowercase, is_lower
):
    seen = []
    tokenize = scorer.tokenize
    monkeypatch.setattr(scorer, "tokenize", lambda text: seen.append(text) or tokenize(text))
    text = pipe(CLIPS[1], lm_lowercase=lm_lowercase, fusion="rescoring")["text"]
    assert text.isupper()
    assert "".join(seen).islower() == is_lower and "".join(seen).isupper() == (not is_lower)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(TOKENS, True), (["<pad>", "|", "a", "b"], False), (["<pad>", "|", "A", "b"], False), (["<pad>", "|"], False)],
    ids=str,
)
def test_a_vocabulary_is_in_upper_case_if_it_has_such_letters_only(tmp_path, tokens, expected):
    assert has_upper_case_only(ctc_tokenizer(tmp_path, tokens)) is expected


def test_the_case_of_a_lower_case_vocabulary_is_kept(parts, scorer, tmp_path, monkeypatch):
    tokenizer = ctc_tokenizer(tmp_path, ["<pad>", "|", *"abcdefG", "H"])
    seen = []
    tokenize = scorer.tokenize
    monkeypatch.setattr(scorer, "tokenize", lambda text: seen.append(text) or tokenize(text))
    pipeline(TASK, **{**parts, "tokenizer": tokenizer}, lm=scorer, **OPTIONS)(CLIPS[1])
    assert {"G", "H"} & set("".join(seen))


def test_nbest_lists_are_those_of_the_acoustic_model(pipe, parts):
    rows = pipe.nbest(CLIPS[0], 3)
    assert len(rows) == 3 and [row.lm_log_prob for row in rows] == [0.0] * 3
    inputs = parts["feature_extractor"](CLIPS[0], sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        log_probs = parts["model"](**inputs).logits.log_softmax(-1).double().transpose(0, 1)
    for row in rows:
        loss = torch.nn.functional.ctc_loss(
            log_probs, torch.tensor([row.labels]), [len(log_probs)], [len(row.labels)], reduction="sum"
        )
        # What fell out of the narrow beam is missing.
        assert -10.0 < row.am_log_prob + float(loss) < 1e-4
        assert row.text == " ".join(labels_to_text_of(parts["tokenizer"])(row.labels).split())


# Long audio, times and other entries.


def test_long_audio_is_cut_at_a_pause_and_its_pieces_are_recognised(pipe):
    audio = np.concatenate([CLIPS[0], np.zeros(RATE // 2, np.float32), CLIPS[1]])
    output = pipe(audio, return_timestamps=True, chunk_length_s=1.5)
    (start, cut), (also_cut, end) = [chunk["timestamp"] for chunk in output["chunks"]]
    assert (start, end) == (0.0, len(audio) / RATE) and cut == also_cut and 0.45 < cut < 0.95
    pieces = [pipe(piece)["text"] for piece in (audio[: round(cut * RATE)], audio[round(cut * RATE) :])]
    assert [chunk["text"] for chunk in output["chunks"]] == pieces
    assert output["text"] == " ".join(pieces)
    assert pipe([audio, CLIPS[2]], chunk_length_s=1.5, batch_size=3) == [{"text": output["text"]}, pipe(CLIPS[2])]


def test_the_times_of_words_are_those_of_their_frames(pipe, monkeypatch):
    frames = ["<pad>", "A", "A", "B", "<pad>", "|", "|", "<pad>", "C", "<pad>"]  # A B from 1 to 3, C is 8

    def one_path(model, features, mask, num_steps):
        log_probs = torch.full((len(features), len(frames), len(TOKENS)), -50.0)
        for frame, token in enumerate(frames):
            log_probs[:, frame, TOKENS.index(token)] = 0.0
        return log_probs, torch.full((len(features),), len(frames))

    monkeypatch.setattr(fusion_pipeline, "ctc_log_probs", one_path)
    audio = np.concatenate([CLIPS[0], np.zeros(RATE // 2, np.float32), CLIPS[1]])
    output = pipe(audio, return_timestamps="word", chunk_length_s=1.5, batch_size=2, lm_weight=0.0)
    cut = pipe(audio, return_timestamps=True, chunk_length_s=1.5, lm_weight=0.0)["chunks"][0]["timestamp"][1]
    assert output["text"] == "AB C AB C" and [chunk["text"] for chunk in output["chunks"]] == output["text"].split()
    expected = [(0.02, 0.08), (0.16, 0.18), (cut + 0.02, cut + 0.08), (cut + 0.16, cut + 0.18)]
    times = [chunk["timestamp"] for chunk in output["chunks"]]
    assert np.array(times) == pytest.approx(np.array(expected))
    assert json.dumps(output)  # plain numbers


@pytest.mark.parametrize("name", ["wav2vec2-base", "wav2vec2-adapter", "wav2vec2-bert-adapter", "parakeet"])
def test_words_of_a_batch_have_the_times_of_each_clip_alone_and_lie_in_it(name, tmp_path, scorer):
    pipe = pipeline(TASK, **ctc_parts(name, tmp_path), lm=scorer, **OPTIONS)
    outputs = pipe(CLIPS, batch_size=3, return_timestamps="word")
    assert outputs == [pipe(clip, return_timestamps="word") for clip in CLIPS]
    for clip, output in zip(CLIPS, outputs, strict=True):
        times = [time for chunk in output["chunks"] for time in chunk["timestamp"]]
        assert times == sorted(times) and times[0] >= 0.0 and times[-1] <= len(clip) / RATE + 0.08
        # With half the true frame rate all would lie in the first half.
        assert times[-1] > 0.5 * len(clip) / RATE


def test_other_entries_of_a_dict_are_returned_but_never_in_place_of_the_text(pipe):
    row = {"array": CLIPS[1], "sampling_rate": RATE, "id": "a1", "text": "the reference"}
    assert pipe(row) == {"text": pipe(CLIPS[1])["text"], "id": ["a1"]}


def test_very_short_audio_is_recognised_alone_and_in_a_batch(pipe):
    click = np.full(10, 0.1, np.float32)
    assert pipe([click, CLIPS[0]], batch_size=2) == [pipe(click), pipe(CLIPS[0])]


def test_bfloat16_is_accepted(parts, scorer, tmp_path):
    for part in parts.values():
        part.save_pretrained(tmp_path)
    pipe = pipeline(TASK, model=str(tmp_path), lm=scorer, dtype="bfloat16", **OPTIONS)
    assert pipe.model.dtype == torch.bfloat16 and pipe(CLIPS[:2], batch_size=2)[1]["text"]


# Encoder-decoders.


def seq2seq_parts(name: str) -> dict:
    torch.manual_seed(1)
    parts = {"whisper": tiny_whisper, "moonshine": tiny_moonshine}[name]()
    parts["model"].generation_config.update(eos_token_id=parts["tokenizer"].eos_token_id)
    parts["tokenizer"].pad_token = parts["tokenizer"].eos_token
    lively(parts["model"].eval(), 8.0)
    return parts


@pytest.mark.parametrize("name", ["whisper", "moonshine"])
def test_the_list_of_an_encoder_decoder_is_rescored(name, scorer):
    parts = seq2seq_parts(name)
    pipe = pipeline(TASK, **parts, lm=scorer, lm_weight=4.0, length_reward=0.3, **GENERATE)
    assert type(pipe) is Seq2SeqRescoringPipeline
    clips = [tone(1.0, 200), tone(1.7, 900), tone(0.7, 3000)]
    expected, first = [], []
    for clip in clips:
        inputs = parts["feature_extractor"](clip, sampling_rate=RATE, return_tensors="pt")
        features = inputs[parts["model"].main_input_name]
        (rows,) = nbest_from_seq2seq(parts["model"], pipe, features, num_return_sequences=3, **GENERATE)
        scores = [
            row.am_log_prob + 4.0 * float(scorer.score([tokens])[0]) + 0.3 * len(tokens)
            for row, tokens in ((row, scorer.tokenize(row.text)) for row in rows)
        ]
        expected.append(rows[int(np.argmax(scores))].text)
        first.append(rows[0].text)
        assert [row.text for row in pipe.nbest(clip, 3)] == [row.text for row in rows]
    assert expected != first, "the language model must change something"
    assert [pipe(clip)["text"] for clip in clips] == expected
    assert [output["text"] for output in pipe(clips, batch_size=3)] == expected
    assert [output["text"] for output in pipe(clips, batch_size=2, lm_weight=0.0, length_reward=0.0)] == first


@pytest.mark.parametrize("name", ["whisper", "moonshine"])
def test_very_short_audio_of_an_encoder_decoder_is_recognised_alone_and_in_a_batch(name, scorer):
    pipe = pipeline(TASK, **seq2seq_parts(name), lm=scorer, **GENERATE)
    click = np.full(10, 0.1, np.float32)
    assert pipe([click, CLIPS[0]], batch_size=2) == [pipe(click), pipe(CLIPS[0])]


def test_options_of_the_beam_search_mean_the_same_at_construction_and_in_a_call(scorer):
    parts = seq2seq_parts("moonshine")
    clip = tone(1.0, 200)
    expected = pipeline(TASK, **parts, lm=scorer, **GENERATE)(clip)
    assert pipeline(TASK, **parts, lm=scorer, generate_kwargs=GENERATE)(clip) == expected
    plain = pipeline(TASK, **parts, lm=scorer, max_new_tokens=2)
    assert plain(clip, **GENERATE) == plain(clip, generate_kwargs=GENERATE) == expected
    assert len(plain(clip)["text"]) < len(expected["text"])


def test_long_audio_of_an_encoder_decoder_is_cut_too(scorer):
    pipe = pipeline(TASK, **seq2seq_parts("moonshine"), lm=scorer, **GENERATE)
    output = pipe(tone(2.0, 440), chunk_length_s=0.9, return_timestamps=True, batch_size=2)
    assert len(output["chunks"]) >= 3 and output["chunks"][-1]["timestamp"][1] == 2.0
    assert output["text"] == " ".join(chunk["text"] for chunk in output["chunks"])


# What is refused, and what stays as it was.


def test_without_a_language_model_others_get_transformers_own_pipeline(parts):
    for options in ({}, {"lm": None}):
        pipe = pipeline(TASK, **parts, **options)
        assert type(pipe) is AutomaticSpeechRecognitionPipeline and pipe.type == "ctc"


@pytest.mark.parametrize("option", fusion_pipeline.FUSION_OPTIONS)
def test_an_option_of_fusion_without_a_language_model_is_refused(parts, option):
    with pytest.raises(ValueError, match=f"{option}: expected with a language model only; give lm too"):
        pipeline(TASK, **parts, **{option: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "shallow"}, 'fusion must be "delayed" or "rescoring", got \'shallow\''),
        ({"ctc_beam_size": 0}, "ctc_beam_size must be at least 1, got 0"),
        ({"fusion_interval": 0}, "fusion_interval must be at least 1, got 0"),
        ({"lm_weight": math.nan}, "lm_weight must be a finite number, got nan"),
        ({"length_reward": math.inf}, "length_reward must be a finite number, got inf"),
        ({"stride_length_s": 1.0}, "stride_length_s is not used"),
        ({"chunk_length_s": 0.1}, "chunk_length_s must be at least 0.2 seconds"),
        ({"return_timestamps": "char"}, r"return_timestamps must be True \(times of the pieces\), 'word' or False"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant_is_refused(pipe, parts, scorer, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(CLIPS[2], **options)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **parts, lm=scorer, **options)


def test_options_of_generate_are_refused_for_a_ctc_model(pipe):
    with pytest.raises(TypeError, match="num_beams"):
        pipe(CLIPS[2], num_beams=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 1}, "num_beams must be at least 2, for a list to rescore, got 1"),
        ({"generate_kwargs": {"top_k": 4}}, "top_k: expected num_beams, max_new_tokens, language, task only"),
        ({"lm_weight": math.nan}, "lm_weight must be a finite number"),
        ({"return_timestamps": "word"}, r"return_timestamps must be True \(times of the pieces\) or False"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant_for_an_encoder_decoder_is_refused(scorer, options, message):
    parts = seq2seq_parts("moonshine")
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **parts, lm=scorer, **options)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **parts, lm=scorer)(CLIPS[0], **options)


def test_what_is_no_language_model_and_what_cannot_be_combined_is_refused(parts, scorer, tmp_path):
    with pytest.raises(TypeError, match="lm: expected a Hub id, a folder or a CausalLMScorer, got GPT2LMHeadModel"):
        pipeline(TASK, **parts, lm=scorer.model)
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**config_of("wav2vec2")))
    with pytest.raises(ValueError, match="lm: expected a CTC model .* or an encoder-decoder .*ForSequenceClassificat"):
        pipeline(TASK, **{**parts, "model": model}, lm=scorer)
    with pytest.raises(ValueError, match="tokenizer: expected one that spells all 10 outputs .*, got one of 3 tokens"):
        pipeline(TASK, **{**parts, "tokenizer": ctc_tokenizer(tmp_path, ["<pad>", "|", "A"])}, lm=scorer)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**{**config_of("wav2vec2"), "pad_token_id": None}))
    with pytest.raises(ValueError, match="pad_token_id: expected the CTC blank, 0 to 9, got None"):
        pipeline(TASK, **{**parts, "model": model}, lm=scorer)


def test_word_times_need_the_frame_rate(parts):
    class Unknown:
        config = object()

    with pytest.raises(ValueError, match='return_timestamps="word": expected a model whose config tells its frame'):
        fusion_pipeline.samples_per_frame(Unknown(), parts["feature_extractor"])


def test_whisper_tokenizer_is_in_mixed_case():
    vocab = {token: i for i, token in enumerate(["a", "B", "Ġ"])}
    assert has_upper_case_only(WhisperTokenizer(vocab=vocab, merges=[])) is False
