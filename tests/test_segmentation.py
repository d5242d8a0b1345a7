"""Cutting at pauses, on synthetic signals whose pauses are known."""

import tracemalloc

import numpy as np
import pytest

from hf_speechllm.segmentation import SILENCE_DBFS, Segment, split_at_pauses, split_blocks

RATE = 16_000


def noise(duration_s: float, dbfs: float, seed: int = 0) -> np.ndarray:
    level = 10 ** (dbfs / 20)
    return np.random.default_rng(seed).normal(0, level, round(duration_s * RATE)).astype(np.float32)


def speech_with_pauses(duration_s: float, pauses: list[tuple[float, float]], floor_dbfs: float = -60.0) -> np.ndarray:
    """Noise at -20 dBFS with syllable-like 4 Hz modulation; `pauses` (start, end in seconds) hold only the floor."""
    waveform = noise(duration_s, -20)
    waveform *= (0.7 + 0.3 * np.sin(2 * np.pi * 4 * np.arange(len(waveform)) / RATE)).astype(np.float32)
    for start, end in pauses:
        waveform[round(start * RATE) : round(end * RATE)] = 0
    return waveform + noise(duration_s, floor_dbfs, seed=1)


def assert_covers(segments: list[Segment], waveform: np.ndarray, max_duration_s: float, rate: int = RATE) -> None:
    pieces = [segment.slice(waveform, rate) for segment in segments]
    np.testing.assert_array_equal(np.concatenate(pieces), waveform)
    assert segments[0].start_s == 0
    assert segments[-1].end_s == len(waveform) / rate
    assert all(a.end_s == b.start_s for a, b in zip(segments, segments[1:], strict=False))
    assert max(segment.duration_s for segment in segments) <= max_duration_s + 1e-9
    assert max(map(len, pieces)) <= max_duration_s * rate


def test_short_recording_is_one_segment():
    waveform = noise(10.0, -20)
    assert split_at_pauses(waveform, RATE, 10.0) == [Segment(0.0, 10.0)]
    assert split_at_pauses(waveform[:1], RATE, 10.0) == [Segment(0.0, 1 / RATE, True)]
    assert split_at_pauses(waveform[:0], RATE, 10.0) == []


def test_cuts_in_the_middle_of_the_longest_pause():
    waveform = speech_with_pauses(15.0, [(5.5, 5.8), (7.0, 7.6), (8.5, 8.8)])
    segments = split_at_pauses(waveform, RATE, 10.0)
    assert len(segments) == 2
    assert segments[0].end_s == pytest.approx(7.3, abs=0.05)
    assert_covers(segments, waveform, 10.0)


def test_of_equal_pauses_the_quieter_one():
    waveform = speech_with_pauses(15.0, [(6.0, 6.4), (8.0, 8.4)], floor_dbfs=-75)
    waveform[round(6.0 * RATE) : round(6.4 * RATE)] += noise(0.4, -55)
    assert split_at_pauses(waveform, RATE, 10.0)[0].end_s == pytest.approx(8.2, abs=0.05)


@pytest.mark.parametrize("floor_dbfs", [-90.0, -60.0, -40.0, -32.0])
def test_adapts_to_the_noise_floor(floor_dbfs):
    waveform = speech_with_pauses(15.0, [(7.0, 7.6)], floor_dbfs)
    assert split_at_pauses(waveform, RATE, 10.0)[0].end_s == pytest.approx(7.3, abs=0.06)


def test_adapts_to_a_changing_noise_floor():
    pauses = [(start + 7.0, start + 7.5) for start in range(0, 60, 10)]
    waveform = speech_with_pauses(58.0, pauses, floor_dbfs=-70)
    waveform[30 * RATE :] += noise(28.0, -35, seed=3)
    segments = split_at_pauses(waveform, RATE, 12.0, 5.0)
    assert_covers(segments, waveform, 12.0)
    assert len(segments) == 6
    for segment in segments[:-1]:
        assert any(start < segment.end_s < end for start, end in pauses)


def test_constant_offset_does_not_hide_pauses():
    waveform = speech_with_pauses(15.0, [(7.0, 7.6)]) + np.float32(0.3)
    assert split_at_pauses(waveform, RATE, 10.0)[0].end_s == pytest.approx(7.3, abs=0.05)


def test_short_dips_are_no_pauses_but_beat_loud_speech():
    waveform = speech_with_pauses(15.0, [(6.0, 6.09), (8.0, 8.4)])
    assert split_at_pauses(waveform, RATE, 10.0)[0].end_s == pytest.approx(8.2, abs=0.05)
    waveform = speech_with_pauses(15.0, [(6.0, 6.09)])
    assert split_at_pauses(waveform, RATE, 10.0)[0].end_s == pytest.approx(6.045, abs=0.05)


def test_without_pause_at_the_quietest_point():
    waveform = noise(15.0, -20)
    waveform[round(6.6 * RATE) : round(6.8 * RATE)] *= 0.7  # 3 dB: no pause
    segments = split_at_pauses(waveform, RATE, 10.0)
    assert segments[0].end_s == pytest.approx(6.7, abs=0.1)
    assert_covers(segments, waveform, 10.0)


def test_minimum_duration_holds_for_every_segment():
    waveform = speech_with_pauses(31.0, [(start + 0.5, start + 1.0) for start in range(31)])
    segments = split_at_pauses(waveform, RATE, 10.0, 4.0)
    assert_covers(segments, waveform, 10.0)
    assert min(segment.duration_s for segment in segments) >= 4.0


def test_silence_is_marked():
    assert split_at_pauses(np.zeros(3 * RATE, np.float32), RATE, 10.0) == [Segment(0.0, 3.0, True)]
    waveform = np.concatenate([noise(20.0, -20), np.zeros(25 * RATE, np.float32), noise(0.05, -20), noise(1.0, -90)])
    segments = split_at_pauses(waveform, RATE, 10.0)
    assert_covers(segments, waveform, 10.0)
    marks = [segment.is_silence for segment in segments]
    assert marks[0] is False
    assert any(marks)
    assert marks[-1] is False  # 50 ms of sound are enough
    for segment in segments:
        assert segment.is_silence == (segment.slice(waveform, RATE).std() < 1e-3 and segment.end_s < 45)


def test_quiet_speech_is_not_silence():
    waveform = noise(5.0, SILENCE_DBFS + 3)
    assert not split_at_pauses(waveform, RATE, 10.0)[0].is_silence


@pytest.mark.parametrize("seed", range(20))
def test_random_signals_are_covered(seed):
    generator = np.random.default_rng(seed)
    rate = int(generator.choice([8_000, 11_025, 16_000, 44_100]))
    waveform = random_signal(generator)
    max_duration_s = float(generator.uniform(0.2, 5))
    min_duration_s = float(generator.uniform(0, 0.45 * max_duration_s))
    segments = split_at_pauses(waveform, rate, max_duration_s, min_duration_s)
    assert_covers(segments, waveform, max_duration_s, rate)
    shortest = min((segment.end_s - segment.start_s for segment in segments), default=0.0)
    assert len(segments) == 1 or shortest >= min_duration_s - 1e-9


def random_signal(generator: np.random.Generator) -> np.ndarray:
    envelope = np.repeat(10 ** generator.uniform(-5, 0, 400), 997)[: generator.integers(1, 400 * 997)]
    return (generator.normal(0, 0.3, len(envelope)) * envelope).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_any_length_give_the_same_segments(seed):
    generator = np.random.default_rng(seed)
    waveform = random_signal(generator)
    max_duration_s = float(generator.uniform(0.2, 5))
    min_duration_s = [None, 0.0, max_duration_s / 4][seed % 3]
    bounds = np.sort(generator.integers(0, len(waveform) + 1, generator.integers(0, 30)))
    pieces = list(split_blocks(np.split(waveform, bounds), RATE, max_duration_s, min_duration_s))
    assert [segment for segment, _ in pieces] == split_at_pauses(waveform, RATE, max_duration_s, min_duration_s)
    for segment, samples in pieces:
        np.testing.assert_array_equal(samples, segment.slice(waveform, RATE))


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_later_moves_no_cut(seed):
    """Only the last segments of the shorter recording may differ: its end was in reach of their cuts."""
    generator = np.random.default_rng(seed)
    waveform, more = random_signal(generator), random_signal(generator)
    segments = split_at_pauses(waveform, RATE, 1.0)
    longer = split_at_pauses(np.concatenate((waveform, more)), RATE, 1.0)
    settled = [segment for segment in segments if segment.start_s + 1.6 < len(waveform) / RATE]
    assert longer[: len(settled)] == settled


def test_silence_without_a_shortest_duration_comes_to_an_end():
    assert_covers(split_at_pauses(np.zeros(5 * RATE, np.float32), RATE, 1.0, 0.0), np.zeros(5 * RATE), 1.0)


def test_long_recordings_take_little_memory():
    minute = speech_with_pauses(60.0, [(7.0, 7.5), (33.0, 33.3)])
    tracemalloc.start()
    duration_s = sum(segment.duration_s for segment, _ in split_blocks((minute for _ in range(30)), RATE))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert duration_s == pytest.approx(1800)
    assert peak_bytes < 30e6 < 30 * minute.nbytes  # of which 17e6 are float64 copies of the part in reach of a cut


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 9)), RATE), r"waveform: expected one channel \[samples\], got shape \[2, 9\]"),
        ((np.zeros(9), 0), "sampling_rate: expected a positive number of Hz, got 0"),
        ((np.zeros(9), RATE, 0.1), "max_duration_s: expected at least 0.2 seconds, got 0.1"),
        ((np.zeros(9), RATE, float("nan")), "max_duration_s: expected at least 0.2 seconds, got nan"),
        ((np.zeros(9), RATE, 10.0, 5.1), r"min_duration_s: expected 0 to half of max_duration_s \(5 s\), got 5.1"),
        ((np.zeros(9), RATE, 10.0, -1.0), "min_duration_s: expected 0 to half"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_at_pauses(*arguments)
