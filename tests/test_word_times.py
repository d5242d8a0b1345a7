"""`return_timestamps="word"` of speech LLMs: words and their times by CTC alignment."""

import json

import numpy as np
import pytest
import torch
from test_pipeline import CLIPS, RATE, TASK, long_audio
from tiny_models import lively, loud_model, tiny_model, tiny_processor, tiny_tokenizer
from transformers import pipeline

from hf_speechllm.ctc_alignment import AlignedLabel, bounds_of_words
from hf_speechllm.label_chains import character_chains


def pipe_of(model, **options):
    processor = tiny_processor()
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    return pipeline(TASK, model=model, **parts, **options)


@pytest.fixture(scope="module")
def pipe():
    model = loud_model(max_audio_duration_s=2.0)
    model.generation_config.update(num_beams=1, max_new_tokens=12)
    return pipe_of(model)


def label(start_frame: int, end_frame: int) -> AlignedLabel:
    return AlignedLabel(1, start_frame, end_frame, 1.0)


def test_words_reach_from_their_first_label_to_their_last():
    aligned = [label(2, 3), label(4, 6), label(6, 7), label(8, 9)]
    assert bounds_of_words(aligned, [0, 0, None, 1], 2, 20) == [(2, 6), (8, 9)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([1, 2], [(0, 2), (2, 3), (8, 9)]),
        ([0, 2], [(2, 3), (3, 8), (8, 9)]),
        ([0, 1], [(2, 3), (8, 9), (9, 20)]),
        ([0, 3], [(2, 3), (3, 8), (3, 8), (8, 9)]),
    ],
    ids=["first", "second", "last", "two"],
)
def test_a_word_without_labels_lies_between_its_neighbours(words, expected):
    assert bounds_of_words([label(2, 3), label(8, 9)], words, len(expected), 20) == expected


def test_without_any_label_words_last_as_long_as_the_audio():
    assert bounds_of_words([], [], 2, 20) == [(0, 20), (0, 20)]


def words_of_best_path(pipe, clip: np.ndarray) -> list[list[int]]:
    """First frame of each word of the best CTC path, and the one after its last label."""
    inputs = pipe.processor([clip], sampling_rate=RATE)
    with torch.no_grad():
        audio = pipe.model.encode(inputs["input_features"], inputs["input_features_mask"])
    token_ids, blank_id = pipe.model.config.ctc_token_ids, pipe.model.config.blank_id
    words, text, last = [], [], blank_id
    path = audio.ctc_log_probs[0].argmax(-1).tolist()
    for frame, each in enumerate(path):
        if each != blank_id and each != last:
            text.append(token_ids[each])
            if len(pipe.processor.decode(text).split()) > len(words):
                words.append([frame, frame + 1])
        is_heard = each != blank_id and pipe.tokenizer.decode([token_ids[each]]).strip()
        if is_heard and words:
            words[-1][1] = frame + 1
        last = each
    return np.array(words, float).reshape(-1, 2) * len(clip) / RATE / len(path)


def test_the_times_are_those_of_the_frames_that_say_the_words(pipe):
    """The greedy text is that of the best path: its words are where that path says them."""
    found = 0
    for clip in CLIPS:
        output = pipe(clip, mode="ctc_greedy", return_timestamps="word")
        assert [chunk["text"] for chunk in output["chunks"]] == output["text"].split()
        times = np.array([chunk["timestamp"] for chunk in output["chunks"]], float).reshape(-1, 2)
        assert times == pytest.approx(words_of_best_path(pipe, clip))
        assert json.dumps(output)  # plain numbers
        found += len(times)
    assert found > 5


@pytest.mark.parametrize("options", [{"ctc_weight": 0.5, "num_beams": 2}, {"mode": "ctc_beam"}], ids=str)
def test_words_of_a_batch_have_the_times_of_each_clip_alone_and_lie_in_it(pipe, options):
    outputs = pipe(CLIPS, batch_size=3, return_timestamps="word", **options)
    assert outputs == [pipe(clip, return_timestamps="word", **options) for clip in CLIPS]
    for clip, output in zip(CLIPS, outputs, strict=True):
        assert [chunk["text"] for chunk in output["chunks"]] == output["text"].split()
        times = [time for chunk in output["chunks"] for time in chunk["timestamp"]]
        assert times == sorted(times) and times[0] >= 0.0 and times[-1] <= len(clip) / RATE + 1e-9


def test_the_words_of_the_pieces_of_long_audio_come_one_after_the_other(pipe):
    audio = long_audio()
    output = pipe(audio, mode="ctc_greedy", return_timestamps="word")
    pieces = pipe(audio, mode="ctc_greedy", return_timestamps=True)["chunks"]
    assert len(pieces) == 2 and output["text"] == " ".join(piece["text"] for piece in pieces)
    words = iter(output["chunks"])
    for piece in pieces:
        for word in piece["text"].split():
            chunk = next(words)
            assert chunk["text"] == word
            assert piece["timestamp"][0] <= chunk["timestamp"][0] < chunk["timestamp"][1] <= piece["timestamp"][1]


def test_characters_that_spell_the_tokens_tell_the_times_too():
    characters = ["|", *"abcdefghijklmnopqrstuvwxyz"]
    chains = character_chains(tiny_tokenizer(), [*characters, "<pad>"], blank_id=len(characters))
    options = {"ctc_chain_length": chains.chains.shape[1], "ctc_delimiter": chains.delimiter}
    model = lively(tiny_model(ctc_token_ids=None, ctc_labels=characters, **options))
    model.ctc_chains[: len(chains.chains)] = chains.chains
    output = pipe_of(model)(CLIPS[3], ctc_weight=0.9, num_beams=2, max_new_tokens=8, return_timestamps="word")
    assert output["text"] and [chunk["text"] for chunk in output["chunks"]] == output["text"].split()
    times = [time for chunk in output["chunks"] for time in chunk["timestamp"]]
    assert times == sorted(times)


def test_a_text_that_does_not_fit_has_words_without_times(pipe):
    options = {"ctc_weight": 0.0, "min_new_tokens": 60, "max_new_tokens": 60}
    output = pipe(CLIPS[2], return_timestamps="word", **options)
    assert len(output["chunks"]) == len(output["text"].split()) > 0
    assert {chunk["timestamp"] for chunk in output["chunks"]} == {(None, None)}


def test_without_a_ctc_head_there_are_no_times():
    pipe = pipe_of(tiny_model(ctc_vocab_size=None, ctc_token_ids=None))
    with pytest.raises(ValueError, match='return_timestamps="word": needs a CTC head'):
        pipe(CLIPS[0], return_timestamps="word")
