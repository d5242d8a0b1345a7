"""Waveform augmentation: deterministic, finite, the length changes by speed only, silence stays harmless."""

import numpy as np
import pytest

from training.augment import AugmentOptions, add_noise, augment, change_speed, mu_law, sub_band_codec

OFF = AugmentOptions(**{name: 0.0 for name in vars(AugmentOptions()) if name.endswith("_prob")})
ALL = AugmentOptions(**{name: 1.0 for name in vars(AugmentOptions()) if name.endswith("_prob")})


def tone(seconds: float = 1.3) -> np.ndarray:
    time_s = np.arange(int(seconds * 16000)) / 16000
    return (0.3 * np.sin(2 * np.pi * 440 * time_s) * np.sin(2 * np.pi * 3 * time_s)).astype(np.float32)


def rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(waveform.astype(np.float64) ** 2)))


def test_same_generator_same_result():
    for seed in range(20):
        first = augment(tone(), np.random.default_rng(seed), AugmentOptions())
        second = augment(tone(), np.random.default_rng(seed), AugmentOptions())
        np.testing.assert_array_equal(first, second)


def test_seeds_differ():
    assert not np.array_equal(
        augment(tone(), np.random.default_rng(0), ALL)[:1000], augment(tone(), np.random.default_rng(1), ALL)[:1000]
    )


def test_all_off_changes_nothing_and_input_is_kept():
    waveform = tone()
    before = waveform.copy()
    np.testing.assert_array_equal(augment(waveform, np.random.default_rng(0), OFF), before)
    augment(waveform, np.random.default_rng(0), ALL)
    np.testing.assert_array_equal(waveform, before)


@pytest.mark.parametrize("options", [AugmentOptions(), ALL])
@pytest.mark.parametrize("length", [1, 2, 17, 400, 16000, 50001])
def test_finite_float32_within_full_scale(options: AugmentOptions, length: int):
    for seed in range(10):
        out = augment(tone(4.0)[:length], np.random.default_rng(seed), options)
        assert out.dtype == np.float32
        assert np.isfinite(out).all()
        assert np.abs(out).max(initial=0.0) <= 1.0


def test_only_speed_changes_the_length():
    no_speed = AugmentOptions(**{**vars(ALL), "speed_prob": 0.0})
    speed = AugmentOptions(**{**vars(OFF), "speed_prob": 1.0})
    for seed in range(10):
        assert len(augment(tone(), np.random.default_rng(seed), no_speed)) == len(tone())
        out = augment(tone(), np.random.default_rng(seed), speed)
        low, high = speed.speed_range
        assert len(tone()) / high - 2 <= len(out) <= len(tone()) / low + 2


def test_speed_may_be_one_of_a_few_factors():
    factors = AugmentOptions(**{**vars(OFF), "speed_prob": 1.0, "speed_factors": (0.9, 1.0, 1.1)})
    lengths = {len(augment(tone(1.0), np.random.default_rng(seed), factors)) for seed in range(30)}
    assert [round(16000 / length, 2) for length in sorted(lengths)] == [1.1, 1.0, 0.9]


def test_speed_respects_the_longest_duration():
    assert len(change_speed(tone(2.0), 0.5, max_duration_s=2.5)) == pytest.approx(2.5 * 16000, abs=2)
    assert len(change_speed(tone(2.0), 0.5, max_duration_s=1.0)) == 32000


def test_silence_stays_silent_without_noise():
    silence = np.zeros(8000, np.float32)
    quiet = AugmentOptions(**{**vars(ALL), "noise_prob": 0.0})
    assert np.abs(augment(silence, np.random.default_rng(0), quiet)).max() == 0.0
    for seed in range(20):
        assert np.isfinite(augment(silence, np.random.default_rng(seed), ALL)).all()


def test_empty_stays_empty():
    assert len(augment(np.zeros(0, np.float32), np.random.default_rng(0), ALL)) == 0


def test_noise_has_the_asked_ratio():
    waveform, noise = tone(), np.random.default_rng(0).standard_normal(len(tone())).astype(np.float32)
    added = add_noise(waveform, noise, 12.0) - waveform
    assert 20 * np.log10(rms(waveform) / rms(added)) == pytest.approx(12.0, abs=0.01)


@pytest.mark.parametrize("codec", [mu_law, sub_band_codec])
def test_codecs_are_coarse_but_close(codec):
    waveform = tone()
    error = codec(waveform) - waveform
    assert 0 < rms(error) < 0.15 * rms(waveform)


def test_telephone_removes_high_frequencies():
    options = AugmentOptions(**{**vars(OFF), "telephone_prob": 1.0})
    high = np.sin(2 * np.pi * 6000 * np.arange(16000) / 16000).astype(np.float32)
    assert rms(augment(high, np.random.default_rng(0), options)) < 0.02


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_prob", 1.5),
        ("noise_snr_db", (3.0, 1.0)),
        ("speed_factors", (1.0, -1.0)),
        ("low_pass_hz", (1.0, 2.0, 3.0)),
    ],
)
def test_options_are_verified(field: str, value: object):
    with pytest.raises(ValueError, match=field):
        AugmentOptions(**{field: value})
