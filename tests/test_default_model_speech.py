"""The default model on real speech: slow, since its base models are fetched and converted on first use."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

import hf_speechllm
from hf_speechllm.audio import load_audio
from hf_speechllm.metrics import normalize_english, word_errors

pytestmark = pytest.mark.slow

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture(scope="module")
def model_folder() -> str:
    return hf_speechllm.default_model()


@pytest.fixture(scope="module")
def transcriber(model_folder):
    return pipeline("automatic-speech-recognition", model=model_folder)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """Eight clips of different lengths: the samples, and pieces of them."""
    waveforms = [load_audio(path) for path in sorted(SAMPLES.glob("*.flac"))]
    pieces = [waveforms[0][: 16000 * seconds] for seconds in (1, 2, 4)]
    return [*waveforms, *pieces]


def test_batch_of_eight_lengths_gives_the_texts_of_one_by_one(transcriber, clips):
    alone = [transcriber(clip)["text"] for clip in clips]
    together = [output["text"] for output in transcriber(clips, batch_size=8)]
    assert together == alone
    assert any(alone)


def test_log_probs_in_a_batch_are_those_of_the_clip_alone(transcriber, clips):
    model, processor = transcriber.model, transcriber.processor
    labels = [processor.encode_transcript("and mister john dashwood")] * len(clips)
    with torch.no_grad():
        batch = model(**processor(clips, sampling_rate=16000), labels=torch.tensor(labels))
        for row, clip in enumerate(clips):
            single = model(**processor(clip, sampling_rate=16000), labels=torch.tensor(labels[:1]))
            frames = int(single.audio.encoder_out_lens)
            torch.testing.assert_close(
                batch.audio.ctc_log_probs[row, :frames], single.audio.ctc_log_probs[0], atol=1e-4, rtol=0
            )
            torch.testing.assert_close(
                batch.logits[row].log_softmax(-1), single.logits[0].log_softmax(-1), atol=1e-4, rtol=0
            )


def test_default_decoding_is_joint_and_better_than_the_language_model_alone(transcriber):
    assert transcriber.model.generation_config.ctc_weight > 0
    with open(SAMPLES / "transcripts.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    references = [normalize_english(row["text"]) for row in rows]

    def wer(**options) -> float:
        texts = [transcriber(str(SAMPLES / row["file"]), **options)["text"] for row in rows]
        return word_errors(references, [normalize_english(text) for text in texts]).wer

    assert wer() < wer(ctc_weight=0.0)
    assert wer() < 0.5


@pytest.mark.parametrize("seconds", [0.05, 3.0, 60.0])
def test_silence_of_any_length_gives_nothing(transcriber, seconds):
    assert transcriber(np.zeros(int(16000 * seconds), dtype=np.float32))["text"] == ""


def test_a_minute_of_speech_is_transcribed_to_its_end(transcriber):
    minute = np.concatenate(
        [np.concatenate([load_audio(path), np.zeros(8000, np.float32)]) for path in sorted(SAMPLES.glob("*.flac"))] * 2
    )
    output = transcriber(minute[: 16000 * 60], return_timestamps=True)
    assert output["chunks"][-1]["timestamp"][1] > 0.9 * min(60.0, len(minute) / 16000)
    assert len(output["text"].split()) > 80
