"""Waveform augmentation for the data loader: tempo and pitch, rooms, noise, band limits, codecs, clipping, gain.

Everything is numpy (soxr for the resampling) and runs several hundred times faster than real time on one core. Linear
distortions are collected as frequency responses and applied in one Fourier transform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr

SAMPLING_RATE = 16000
SILENCE_RMS = 1e-5


@dataclass(frozen=True)
class AugmentOptions:
    """Probabilities (`*_prob`) and uniform or log-uniform ranges of the distortions; all probabilities 0: unchanged."""

    speed_prob: float = 0.5
    speed_range: tuple[float, float] = (0.88, 1.14)
    speed_factors: tuple[float, ...] = ()  # one of these in place of the range, e.g. (0.9, 1.0, 1.1)
    max_duration_s: float = 30.0  # speed never stretches beyond this
    room_prob: float = 0.3
    room_decay_s: tuple[float, float] = (0.08, 0.5)  # until the reverberation has fallen by 60 dB
    room_level_db: tuple[float, float] = (-18.0, -2.0)  # energy of the reverberation relative to the direct sound
    tilt_prob: float = 0.4
    tilt_db_per_octave: tuple[float, float] = (-3.0, 3.0)
    noise_prob: float = 0.5
    noise_snr_db: tuple[float, float] = (5.0, 40.0)
    telephone_prob: float = 0.12
    low_pass_prob: float = 0.12
    low_pass_hz: tuple[float, float] = (2500.0, 7500.0)
    codec_prob: float = 0.2
    clip_prob: float = 0.05
    clip_level: tuple[float, float] = (0.3, 0.9)  # relative to the peak
    gain_prob: float = 0.8
    gain_peak_db: tuple[float, float] = (-30.0, 0.0)  # peak relative to full scale

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_prob") and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: expected a probability between 0 and 1, got {value}.")
            if name == "speed_factors":
                if not all(factor > 0 for factor in value):
                    raise ValueError(f"{name}: expected positive factors, got {value}.")
            elif isinstance(value, tuple) and (len(value) != 2 or not value[0] <= value[1]):
                raise ValueError(f"{name}: expected (low, high) with low <= high, got {value}.")


def augment(
    waveform: np.ndarray,
    rng: np.random.Generator,
    options: AugmentOptions,
    babble: np.ndarray | None = None,
) -> np.ndarray:
    """Distorted copy of `waveform` (float32 [T] at 16 kHz); only a changed speed changes T.

    `babble` is any other speech for background voices; without it they are made of the waveform itself, backwards.
    The same generator state gives the same result. Silence gets noise like anything else, but no gain.
    """
    waveform = np.array(waveform, np.float32)
    if len(waveform) == 0:
        return waveform
    if rng.random() < options.speed_prob:
        factors = options.speed_factors
        speed = float(rng.choice(factors)) if factors else _log_uniform(rng, options.speed_range)
        waveform = change_speed(waveform, speed, options.max_duration_s)
    waveform = _shape(waveform, rng, options)
    if rng.random() < options.noise_prob:
        speech = waveform if babble is None or len(babble) == 0 else np.asarray(babble, np.float32)
        waveform = add_noise(waveform, _noise(len(waveform), speech, rng), rng.uniform(*options.noise_snr_db))
    waveform = _limit_band(waveform, rng, options)
    peak = float(np.abs(waveform).max())
    if peak == 0.0:
        return waveform
    if rng.random() < options.clip_prob:
        level = peak * rng.uniform(*options.clip_level)
        waveform = np.clip(waveform, -level, level)
    if rng.random() < options.codec_prob:
        waveform = mu_law(waveform) if rng.random() < 0.5 else sub_band_codec(waveform)
    if rng.random() < options.gain_prob:
        gained = 10 ** (rng.uniform(*options.gain_peak_db) / 20)
        waveform = waveform * np.float32(gained / max(float(np.abs(waveform).max()), 1e-3))
    return np.clip(waveform, -1.0, 1.0)


def change_speed(waveform: np.ndarray, speed: float, max_duration_s: float = np.inf) -> np.ndarray:
    """Plays `waveform` `speed` times as fast, pitch and formants along; [T] -> about [T / speed]."""
    speed = max(speed, min(1.0, len(waveform) / (max_duration_s * SAMPLING_RATE)))
    return soxr.resample(waveform, SAMPLING_RATE * speed, SAMPLING_RATE, quality="LQ").astype(np.float32)


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """`waveform` + `noise` (both [T]) at this ratio to the speech; over silence the noise is `snr_db` below 0.1."""
    signal_rms, noise_rms = _rms(waveform), _rms(noise)
    if noise_rms < SILENCE_RMS:
        return waveform
    if signal_rms < SILENCE_RMS:
        signal_rms = 0.1
    return waveform + noise * np.float32(signal_rms / noise_rms * 10 ** (-snr_db / 20))


def mu_law(waveform: np.ndarray) -> np.ndarray:
    """8 bit logarithmic quantisation (G.711 mu-law), relative to full scale."""
    compressed = np.sign(waveform) * np.log1p(255.0 * np.minimum(np.abs(waveform), 1.0)) / np.log(256.0)
    quantised = np.round(compressed * 127.0) / 127.0
    return (np.sign(quantised) * np.expm1(np.abs(quantised) * np.log(256.0)) / 255.0).astype(np.float32)


def sub_band_codec(waveform: np.ndarray, low_bits: int = 5, high_bits: int = 2) -> np.ndarray:
    """Two bands split at 4 kHz, each quantised with a step that adapts every 8 ms: the noise of G.722 and its kin."""
    size = _fast_length(len(waveform))
    spectrum = np.fft.rfft(waveform, size)
    split = len(spectrum) // 2
    low = spectrum.copy()
    low[split:] = 0.0
    low_band = np.fft.irfft(low, size)[: len(waveform)].astype(np.float32)
    return _quantise_blocks(low_band, low_bits) + _quantise_blocks(waveform - low_band, high_bits)


def room_response(decay_s: float, level_db: float, rng: np.random.Generator) -> np.ndarray:
    """Direct sound and, after up to 10 ms, exponentially decaying noise of `level_db` energy; float32 [taps]."""
    taps = max(2, int(decay_s * SAMPLING_RATE))
    delay = int(rng.uniform(0.002, 0.01) * SAMPLING_RATE)
    time_s = np.arange(taps) / SAMPLING_RATE
    tail = rng.standard_normal(taps) * np.exp(-6.9 * time_s / decay_s)
    tail *= 10 ** (level_db / 20) / np.sqrt(np.square(tail).sum())
    return np.concatenate([[1.0], np.zeros(delay), tail]).astype(np.float32)


def _shape(waveform: np.ndarray, rng: np.random.Generator, options: AugmentOptions) -> np.ndarray:
    """Room and spectral tilt."""
    room = tilt = None
    if rng.random() < options.room_prob:
        room = room_response(rng.uniform(*options.room_decay_s), rng.uniform(*options.room_level_db), rng)
    if rng.random() < options.tilt_prob:
        tilt = rng.uniform(*options.tilt_db_per_octave)
    if room is None and tilt is None:
        return waveform
    size = _fast_length(len(waveform) + (0 if room is None else len(room)))
    spectrum = np.fft.rfft(waveform, size)
    if room is not None:
        spectrum *= np.fft.rfft(room, size)
    if tilt is not None:
        octaves = np.log2(np.maximum(_frequencies_hz(size), 100.0) / 1000.0)
        spectrum *= 10 ** (tilt * octaves / 20)
    return np.fft.irfft(spectrum, size)[: len(waveform)].astype(np.float32)


def _limit_band(waveform: np.ndarray, rng: np.random.Generator, options: AugmentOptions) -> np.ndarray:
    """Telephone band or a low-pass, with edges a few hundred Hz wide."""
    kind = rng.random()
    if kind < options.telephone_prob:
        low_hz, high_hz = rng.uniform(200.0, 350.0), rng.uniform(3200.0, 3700.0)
    elif kind < options.telephone_prob + options.low_pass_prob:
        low_hz, high_hz = 0.0, _log_uniform(rng, options.low_pass_hz)
    else:
        return waveform
    size = _fast_length(len(waveform))
    frequencies = _frequencies_hz(size)
    response = 1.0 / (1.0 + (frequencies / high_hz) ** 24)
    if low_hz > 0.0:
        response *= 1.0 - 1.0 / (1.0 + (frequencies / low_hz) ** 8)
    return np.fft.irfft(np.fft.rfft(waveform, size) * response, size)[: len(waveform)].astype(np.float32)


def _noise(length: int, speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White to brown noise, mains hum with some noise, or babble; float32 [length]."""
    kind = rng.random()
    if kind < 0.25:
        return _babble(length, speech, rng)
    size = _fast_length(length)
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    fall = rng.uniform(0.0, 1.0)  # 0: white, 0.5: pink, 1: brown
    spectrum *= np.maximum(_frequencies_hz(size), 50.0) ** -fall
    noise = np.fft.irfft(spectrum, size)[:length].astype(np.float32)
    if kind < 0.4:
        hum = np.zeros(length, np.float32)
        base = 2 * np.pi / SAMPLING_RATE * rng.choice([50.0, 60.0])
        for harmonic in range(1, 6):
            level = np.float32(rng.uniform(0.0, 1.0 / harmonic))
            hum += level * np.sin(base * harmonic * np.arange(length))
        noise = noise + hum * np.float32(2.0 * _rms(noise) / max(_rms(hum), SILENCE_RMS))
    return noise


def _babble(length: int, speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three to six voices: `speech` backwards, from random positions and at random levels."""
    backwards = speech[::-1]
    voices = np.zeros(length, np.float32)
    for _ in range(int(rng.integers(3, 7))):
        start = int(rng.integers(len(backwards)))
        voices += np.resize(np.roll(backwards, -start), length) * np.float32(rng.uniform(0.3, 1.0))
    return voices


def _quantise_blocks(band: np.ndarray, bits: int, block: int = 128) -> np.ndarray:
    padded = np.pad(band, (0, -len(band) % block)).reshape(-1, block)
    step = np.maximum(np.abs(padded).max(axis=1, keepdims=True), 1e-6) / (2 ** (bits - 1) - 0.5)
    return (np.round(padded / step) * step).reshape(-1)[: len(band)]


def _frequencies_hz(size: int) -> np.ndarray:
    return np.linspace(0.0, SAMPLING_RATE / 2, size // 2 + 1, dtype=np.float32)


def _fast_length(length: int) -> int:
    """Next length that is a power of two times 1, 1.25 or 1.5: quick to transform, and even."""
    power = 1 << max(4, (length - 1).bit_length() - 1)
    return next(size for size in (power, power * 5 // 4, power * 3 // 2, power * 2) if size >= length)


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(bounds))))


def _rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
