"""Speech synthesis engines behind one small interface, each with many pseudo-voices.

An engine turns text into a waveform at its own sampling rate and speed. `speak` adds what all engines share: a tempo
and a pitch/formant factor, made by synthesising slower or faster and reading the samples at another rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import soxr

SAMPLING_RATE = 16000
TEMPO_RANGE = (0.8, 1.25)
SHIFT_RANGE = (0.82, 1.22)


class Engine(Protocol):
    """What `speak` needs: `name`, `voices`, and `synthesize` -> (waveform float32 [T], sampling rate in Hz)."""

    name: str
    voices: tuple[str, ...]

    def synthesize(self, spoken: str, voice: Voice) -> tuple[np.ndarray, int]: ...


@dataclass(frozen=True)
class Voice:
    """One pseudo-voice: `tempo` is the final speed; `shift` scales pitch and formants together; `intonation` scales the
    pitch alone and `expression` its range, where the engine can; `seed` fixes the engine's own randomness."""

    base: str
    tempo: float
    shift: float
    intonation: float
    expression: float
    seed: int

    @property
    def engine_speed(self) -> float:
        """Speed for the engine, so that the tempo is right after the shift."""
        return self.tempo / self.shift

    def __str__(self) -> str:
        return f"{self.base}/t{self.tempo:.2f}/s{self.shift:.2f}/i{self.intonation:.2f}/e{self.expression:.2f}"


def random_voice(engine: Engine, rng: np.random.Generator) -> Voice:
    """A pseudo-voice; a sixth keep the engine's own pitch and a sixth its own tempo."""
    base = engine.voices[int(rng.integers(len(engine.voices)))]
    tempo = np.exp(rng.uniform(*np.log(TEMPO_RANGE)))
    shift = np.exp(rng.uniform(*np.log(SHIFT_RANGE)))
    plain_tempo, plain_shift = rng.random(2) < 1 / 6
    return Voice(
        base=base,
        tempo=1.0 if plain_tempo else round(float(tempo), 3),
        shift=1.0 if plain_shift else round(float(shift), 3),
        intonation=round(float(np.exp(np.clip(rng.normal(0.0, 0.12), -0.3, 0.3))), 3),
        expression=round(float(rng.uniform(0.6, 1.4)), 3),
        seed=int(rng.integers(2**31)),
    )


def speak(engine: Engine, spoken: str, voice: Voice) -> np.ndarray:
    """Waveform float32 [T] at SAMPLING_RATE without leading and trailing silence; empty if nothing was said."""
    waveform, sampling_rate = engine.synthesize(spoken, voice)
    if len(waveform) == 0:
        return np.zeros(0, np.float32)
    shifted = soxr.resample(waveform.astype(np.float32), sampling_rate * voice.shift, SAMPLING_RATE, quality="HQ")
    return trim(shifted)


def trim(waveform: np.ndarray, threshold_db: float = -42.0, margin_s: float = 0.03) -> np.ndarray:
    """Cuts the ends that stay below `threshold_db` relative to the loudest 10 ms, keeping `margin_s`."""
    frame = SAMPLING_RATE // 100
    count = len(waveform) // frame
    if count == 0:
        return waveform[:0]
    energy = np.square(waveform[: count * frame]).reshape(count, frame).mean(axis=1)
    loud = np.flatnonzero(energy > energy.max() * 10 ** (threshold_db / 10))
    if len(loud) == 0 or energy.max() < 1e-8:
        return waveform[:0]
    margin = int(margin_s * SAMPLING_RATE)
    return waveform[max(0, loud[0] * frame - margin) : (loud[-1] + 1) * frame + margin]
