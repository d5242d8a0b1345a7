"""`pipeline(..., ctc_model=...)`: encoder-decoders of others, decoded jointly with a CTC model."""

# ruff: noqa: F811 (fixtures of another file are arguments)

import numpy as np
import pytest
import torch
from test_fusion_pipeline import (  # noqa: F401 (fixtures)
    CLIPS,
    GENERATE,
    TOKENS,
    ctc_parts,
    ctc_tokenizer,
    lm_folder,
    parts,
    scorer,
    seq2seq_parts,
)
from test_pipeline import RATE, TASK, tone
from tiny_models import loud_model, tiny_processor, tiny_tokenizer
from transformers import pipeline

from hf_speechllm.bpe_subset import writer_chains
from hf_speechllm.ctc_listener import CharacterListener, SpeechLLMListener
from hf_speechllm.ctc_prefix_score import CTCPrefixScorer
from hf_speechllm.fusion_pipeline import Seq2SeqRescoringPipeline
from hf_speechllm.label_chains import character_chains
from hf_speechllm.logits_process import CTCPrefixLogitsProcessor
from hf_speechllm.pipeline_speechllm import SpeechLLMPipeline
from hf_speechllm.rescoring import nbest_from_seq2seq

JOINT = {"ctc_weight": 0.4, **GENERATE}
TONES = [tone(1.0, 200), tone(1.7, 900), tone(0.7, 3000)]


def joint_parts(name: str) -> dict:
    """Without tokens that are silent to CTC, which a random model would write all the time."""
    parts = seq2seq_parts(name)
    vocab = parts["tokenizer"].get_vocab()
    parts["model"].generation_config.suppress_tokens = [vocab[token] for token in ("Ġ", "'") if token in vocab]
    return parts


def subword_listener() -> SpeechLLMListener:
    return SpeechLLMListener(loud_model(), tiny_processor())


def character_listener(folder, name: str = "wav2vec2-large") -> CharacterListener:
    parts = ctc_parts(name, folder)
    tokenizer = ctc_tokenizer(folder, ["<pad>", "|", *"ABCDEFGHINTO"[: len(TOKENS) - 2]])
    return CharacterListener(parts["model"], parts["feature_extractor"], tokenizer)


@pytest.fixture(params=["sub-words", "characters"])
def listener(request, tmp_path):
    return subword_listener() if request.param == "sub-words" else character_listener(tmp_path)


def processor_of(listener, parts, clip, weight) -> CTCPrefixLogitsProcessor:
    """Joint decoding of one clip, put together by hand."""
    with torch.no_grad():
        if isinstance(listener, SpeechLLMListener):
            audio = listener.model.encode(**tiny_processor()(clip, sampling_rate=RATE))
            log_probs, blank_id = audio.ctc_log_probs, listener.model.config.blank_id
            chains = writer_chains(parts["tokenizer"], tiny_tokenizer(), listener.model.config.ctc_token_ids)
        else:
            inputs = listener.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
            log_probs, blank_id = listener.model(**inputs).logits.log_softmax(-1), 0
            characters = listener.tokenizer.convert_ids_to_tokens(range(len(listener.tokenizer)))
            chains = character_chains(parts["tokenizer"], characters, blank_id=0)
    scorer = CTCPrefixScorer.from_log_probs(log_probs, torch.tensor([log_probs.shape[1]]), blank_id)
    return CTCPrefixLogitsProcessor(scorer, weight, parts["model"].generation_config.eos_token_id, chains)


@pytest.mark.parametrize("name", ["whisper", "moonshine"])
def test_a_joint_search_is_that_of_its_parts_alone_and_in_a_batch(name, listener, scorer):
    parts = joint_parts(name)
    pipe = pipeline(TASK, **parts, ctc_model=listener, **JOINT)
    assert type(pipe) is Seq2SeqRescoringPipeline
    lists = []
    for clip in TONES:
        features = parts["feature_extractor"](clip, sampling_rate=RATE, return_tensors="pt")
        lists += nbest_from_seq2seq(
            parts["model"],
            pipe,
            features[parts["model"].main_input_name],
            num_return_sequences=3,
            logits_processor=[processor_of(listener, parts, clip, 0.4)],
            **GENERATE,
        )
    expected = [rows[0].text for rows in lists]
    assert [pipe(clip)["text"] for clip in TONES] == expected
    assert [output["text"] for output in pipe(TONES, batch_size=3)] == expected
    for rows, found, alone in zip(lists, pipe.nbests(TONES, 3), map(pipe.nbest, TONES, [3] * 3), strict=True):
        assert [row.labels for row in found] == [row.labels for row in alone] == [row.labels for row in rows]
        assert [row.am_log_prob for row in found] == pytest.approx([row.am_log_prob for row in rows], abs=1e-3)
    plain = pipeline(TASK, **parts, lm=scorer, lm_weight=0.0, **GENERATE)
    assert [plain(clip)["text"] for clip in TONES] != expected, "CTC must change something"
    assert [pipe(clip, ctc_weight=0.0)["text"] for clip in TONES] == [plain(clip)["text"] for clip in TONES]
    assert pipe.nbests(TONES, 3, ctc_weight=0.0) == plain.nbests(TONES, 3)


def test_the_list_of_a_joint_search_is_rescored(scorer):
    parts, listener = joint_parts("whisper"), subword_listener()
    joint = pipeline(TASK, **parts, ctc_model=listener, **JOINT)
    both = pipeline(TASK, **parts, ctc_model=listener, lm=scorer, lm_weight=4.0, length_reward=0.3, **JOINT)
    expected = []
    for clip in TONES:
        scores = {
            row.text: row.am_log_prob + 4.0 * float(scorer.score([tokens])[0]) + 0.3 * len(tokens)
            for row, tokens in ((row, scorer.tokenize(row.text)) for row in joint.nbest(clip, 3))
        }
        expected.append(max(scores, key=scores.get))
    assert [output["text"] for output in both(TONES, batch_size=3)] == expected
    assert [joint(clip)["text"] for clip in TONES] != expected, "the language model must change something"


def test_long_audio_is_decoded_jointly_piece_by_piece():
    pipe = pipeline(TASK, **joint_parts("moonshine"), ctc_model=subword_listener(), **JOINT)
    audio = tone(2.0, 440)
    output = pipe(audio, chunk_length_s=0.9, return_timestamps=True, batch_size=2)
    times = [chunk["timestamp"] for chunk in output["chunks"]]
    pieces = [audio[round(start * RATE) : round(end * RATE)] for start, end in times]
    assert len(pieces) >= 3 and [chunk["text"] for chunk in output["chunks"]] == [
        pipe(piece)["text"] for piece in pieces
    ]


def test_very_short_audio_is_decoded_jointly():
    pipe = pipeline(TASK, **joint_parts("whisper"), ctc_model=subword_listener(), **JOINT)
    click = np.full(10, 0.1, np.float32)
    assert pipe([click, TONES[0]], batch_size=2) == [pipe(click), pipe(TONES[0])]


def test_a_ctc_model_is_loaded_from_its_folder(listener, tmp_path):
    if isinstance(listener, SpeechLLMListener):
        saved = (listener.model, listener.processor)
    else:
        saved = (listener.model, listener.feature_extractor, listener.tokenizer)
    for part in saved:
        part.save_pretrained(tmp_path / "ctc")
    parts = joint_parts("moonshine")
    named = pipeline(TASK, **parts, ctc_model=str(tmp_path / "ctc"), **JOINT)
    assert type(named.ctc_listener) is type(listener)
    assert named(TONES[0]) == pipeline(TASK, **parts, ctc_model=listener, **JOINT)(TONES[0])


@pytest.mark.parametrize("kind", ["sub-words", "wav2vec2-large", "wav2vec2-base"])
def test_what_a_listener_hears_does_not_depend_on_the_batch(kind, tmp_path):
    listener = subword_listener() if kind == "sub-words" else character_listener(tmp_path, kind)
    log_probs, lengths = listener.log_probs(CLIPS)
    assert log_probs.shape[:2] == (3, int(lengths.max())) and len(set(lengths.tolist())) == 3
    for row, clip in enumerate(CLIPS):
        alone, (length,) = listener.log_probs([clip])
        assert length == lengths[row]
        torch.testing.assert_close(log_probs[row, :length], alone[0, :length], rtol=0, atol=1e-4)
        assert torch.allclose(alone[0].exp().sum(-1), torch.ones(int(length)))


def test_what_cannot_listen_is_refused(parts, scorer, tmp_path):
    moonshine = seq2seq_parts("moonshine")
    with pytest.raises(TypeError, match="ctc_model: expected a Hub id, a folder or a CTCListener, got Wav2Vec2ForCTC"):
        pipeline(TASK, **moonshine, ctc_model=parts["model"])
    with pytest.raises(
        ValueError, match="ctc_model: expected an encoder-decoder to decode jointly with, got Wav2Vec2F"
    ):
        pipeline(TASK, **parts, ctc_model=subword_listener())
    with pytest.raises(
        ValueError, match="ctc_model: expected a speech LLM whose CTC labels are tokens of its language"
    ):
        SpeechLLMListener(loud_model(ctc_token_ids=None), tiny_processor())
    with pytest.raises(ValueError, match="ctc_model: expected CTC over characters with a word delimiter .* None"):
        CharacterListener(parts["model"], parts["feature_extractor"], tiny_tokenizer())
    with pytest.raises(ValueError, match=r"blank \(pad_token_id\) from 0 to 9, got Wav2Vec2CTCTokenizer with 3 tokens"):
        few = ctc_tokenizer(tmp_path, ["<pad>", "|", "A"])
        CharacterListener(parts["model"], parts["feature_extractor"], few)
    listener = subword_listener()
    listener.sampling_rate = 8000
    with pytest.raises(ValueError, match="ctc_model: expected one for audio of 16000 Hz like the model, got 8000 Hz"):
        pipeline(TASK, **moonshine, ctc_model=listener)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctc_weight": 1.5}, "ctc_weight must lie between 0 .* and 1 .*, got 1.5"),
        ({"lm_weight": 0.5}, "lm_weight: expected with a language model only; give lm too"),
        ({"length_reward": 0.5}, "length_reward: expected with a language model only"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant_for_a_joint_search_is_refused(options, message):
    parts, listener = joint_parts("moonshine"), subword_listener()
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **parts, ctc_model=listener, **options)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **parts, ctc_model=listener)(CLIPS[0], **options)


def test_a_share_of_ctc_without_a_ctc_model_is_refused(parts, scorer):
    message = "ctc_weight: expected with a CTC model only; give ctc_model too, or leave it out"
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **parts, ctc_weight=0.3)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **seq2seq_parts("moonshine"), lm=scorer, ctc_weight=0.3)
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, **seq2seq_parts("moonshine"), lm=scorer)(CLIPS[0], ctc_weight=0.3)


def test_a_speech_llm_listens_by_itself(tmp_path):
    model, processor = loud_model(), tiny_processor()
    with pytest.raises(ValueError, match="ctc_model: is for other models; a speech LLM has its own CTC head"):
        SpeechLLMPipeline(
            model, processor.tokenizer, feature_extractor=processor.feature_extractor, ctc_model=str(tmp_path)
        )
