"""Synthetic shards, made by a fake engine: resumable, atomic, deterministic, with exact offsets."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from training import shards, synthesize
from training.shards import take_utterances, write_shard
from training.synthesize import make_utterance, num_shards, shard_rng, synthesize_shard, utterances
from training.texts import Sentence, SentenceSampler
from training.voices import SAMPLING_RATE, Voice, random_voice, speak, trim

SENTENCES = [Sentence(f"Number {word}.", f"number {word}", "brown") for word in ("one", "two", "three", "four", "five")]


class ToneEngine:
    """Says a tone of 0.1 s a word, scaled by the speed, between silences."""

    name = "tone"
    voices = ("high", "low")

    def __init__(self) -> None:
        self.calls = 0

    def synthesize(self, spoken: str, voice: Voice) -> tuple[np.ndarray, int]:
        self.calls += 1
        samples = int(len(spoken.split()) * 2205 / voice.engine_speed)
        hertz = 880 if voice.base == "high" else 220
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / 22050)
        return np.pad(tone, (4410, 2205)).astype(np.float32), 22050


@pytest.fixture
def sampler() -> SentenceSampler:
    return SentenceSampler(SENTENCES, "train")


@pytest.fixture
def tone_job(monkeypatch, tmp_path, sampler):
    """`synthesize_shard` with the fake engine; returns (make one shard, its engine, its folder)."""
    engine = ToneEngine()
    monkeypatch.setattr(synthesize, "_engine", lambda name, cache: engine)
    monkeypatch.setattr(synthesize, "_sampler", lambda cache, split: sampler)

    def make(shard: int, out: Path = tmp_path) -> float:
        return synthesize_shard(shard, engine="tone", seed=7, split="train", cache=tmp_path, out=out, shard_s=20.0)

    return make, engine, tmp_path


def read(out: Path, name: str) -> tuple[list[dict], np.ndarray]:
    waveform, rate = soundfile.read(out / f"{name}.flac", dtype="float32")
    assert rate == SAMPLING_RATE
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()], waveform


def test_manifest_offsets_are_exact(tone_job):
    make, _, out = tone_job
    seconds = make(0)
    records, waveform = read(out, "tone-7-00000")
    position = 0
    for record in records:
        assert record["audio_filepath"] == "tone-7-00000.flac"
        assert record["offset"] * SAMPLING_RATE == pytest.approx(position, abs=1e-3)
        length = record["duration"] * SAMPLING_RATE
        assert length == pytest.approx(round(length), abs=1e-3)
        position += round(length)
        part = waveform[position - round(length) : position]
        if record["text"]:
            assert record["engine"] == "tone"
            assert np.abs(part).max() > 0.3
            assert np.abs(part[:700]).max() == np.abs(part[-700:]).max() == 0.0  # silence at both ends
    assert position == len(waveform) == round(seconds * SAMPLING_RATE)
    assert seconds >= 20.0


def test_finished_shard_is_not_made_again(tone_job):
    make, engine, out = tone_job
    assert make(0) > 0
    calls, before = engine.calls, (out / "tone-7-00000.flac").stat().st_mtime_ns
    assert make(0) == 0.0
    assert engine.calls == calls
    assert (out / "tone-7-00000.flac").stat().st_mtime_ns == before


def test_same_seed_same_shard_and_shards_differ(tone_job, tmp_path):
    make, _, out = tone_job
    other = tmp_path / "other"
    other.mkdir()
    make(0)
    make(0, other)
    make(1)
    for suffix in ("flac", "jsonl"):
        assert (out / f"tone-7-00000.{suffix}").read_bytes() == (other / f"tone-7-00000.{suffix}").read_bytes()
        assert (out / f"tone-7-00000.{suffix}").read_bytes() != (out / f"tone-7-00001.{suffix}").read_bytes()


def test_interrupted_shard_leaves_no_manifest(tone_job):
    make, engine, out = tone_job
    whole = engine.synthesize

    def fail(spoken: str, voice: Voice) -> tuple[np.ndarray, int]:
        if engine.calls > 3:
            raise RuntimeError("out of breath")
        return whole(spoken, voice)

    engine.synthesize = fail
    with pytest.raises(RuntimeError, match="out of breath"):
        make(0)
    assert not list(out.glob("tone*"))
    engine.synthesize = whole
    make(0)
    assert len(list(out.glob("tone*"))) == 2


def test_audio_is_renamed_before_the_manifest(tone_job, monkeypatch):
    """Whoever sees a manifest finds its audio."""
    make, _, out = tone_job
    renamed = []
    replace = shards.os.replace
    monkeypatch.setattr(shards.os, "replace", lambda a, b: (renamed.append(Path(b).suffix), replace(a, b)))
    make(0)
    assert renamed == [".flac", ".jsonl"]
    assert sorted(path.suffix for path in out.iterdir()) == [".flac", ".jsonl"]


def test_durations_and_kinds(sampler):
    rng, texts = np.random.default_rng(0), []
    for _ in range(400):
        utterance = make_utterance(ToneEngine(), sampler, rng)
        assert 0.5 <= len(utterance.waveform) / SAMPLING_RATE <= 28.0
        assert np.abs(utterance.waveform).max() <= 1.0
        texts.append(utterance.text)
    assert 1 <= texts.count("") <= 15
    assert sum(1 <= len(text.split()) <= 4 for text in texts) > 100
    assert any(len(text.split()) > 8 for text in texts)


def test_silent_engine_gives_no_utterance(sampler):
    engine = ToneEngine()
    engine.synthesize = lambda spoken, voice: (np.zeros(1000, np.float32), 22050)
    made = [make_utterance(engine, sampler, np.random.default_rng(seed)) for seed in range(20)]
    assert all(utterance is None or utterance.text == "" for utterance in made)


def test_tempo_is_kept_by_the_pitch_shift():
    engine, plain = ToneEngine(), Voice("low", 1.0, 1.0, 1.0, 1.0, 0)
    spoken = "one two three four five six seven eight nine ten"
    usual = len(speak(engine, spoken, plain))
    shifted = speak(engine, spoken, Voice("low", 1.0, 1.2, 1.0, 1.0, 0))
    faster = speak(engine, spoken, Voice("low", 1.25, 1.0, 1.0, 1.0, 0))
    assert len(shifted) == pytest.approx(usual, rel=0.03)
    assert len(faster) == pytest.approx(usual / 1.25, rel=0.05)
    spectrum = np.abs(np.fft.rfft(shifted))
    assert np.argmax(spectrum) * SAMPLING_RATE / len(shifted) == pytest.approx(220 * 1.2, rel=0.02)


def test_trim():
    assert len(trim(np.zeros(16000, np.float32))) == 0
    assert len(trim(np.zeros(10, np.float32))) == 0
    waveform = np.zeros(16000, np.float32)
    waveform[4000:8000] = 0.5
    assert len(trim(waveform, margin_s=0.0)) == pytest.approx(4000, abs=320)


def test_random_voices_are_deterministic_and_within_range():
    voices = [random_voice(ToneEngine(), np.random.default_rng(seed)) for seed in range(200)]
    assert voices == [random_voice(ToneEngine(), np.random.default_rng(seed)) for seed in range(200)]
    assert all(0.8 <= voice.tempo <= 1.25 and 0.82 <= voice.shift <= 1.22 for voice in voices)
    assert {voice.base for voice in voices} == {"high", "low"}


def test_shard_rng_depends_on_all_arguments():
    states = {
        shard_rng(*arguments).integers(2**60)
        for arguments in (("a", 1, "train", 0), ("b", 1, "train", 0), ("a", 2, "train", 0), ("a", 1, "dev", 0))
    }
    assert len(states) == 4


def test_write_shard_returns_its_seconds(sampler, tmp_path):
    stream = utterances(ToneEngine(), sampler, np.random.default_rng(0))
    seconds = write_shard(take_utterances(stream, 5.0), tmp_path, "x")
    assert soundfile.info(tmp_path / "x.flac").duration == pytest.approx(seconds)


def test_hours_are_at_least_one_shard():
    assert [num_shards(hours) for hours in (0.001, 0.1, 0.24, 0.26, 12)] == [1, 1, 1, 2, 72]
    assert num_shards(0.001, shard_s=1.8) == 2
