"""Reading audio: formats, rates, channels, and one clear line for everything that can be wrong with a file."""

import os
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from hf_speechllm.audio import AudioError, load_audio, prepare_waveform, stream_audio

RATE = 16_000
SECOND = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def tone(rate: int, duration_s: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * duration_s)) / rate)).astype(np.float32)


def assert_is_tone(waveform: np.ndarray, tolerance: float) -> None:
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert abs(len(waveform) - RATE) <= 1
    inner = slice(1000, RATE - 1000)  # codecs and resampling filters fade at the ends
    np.testing.assert_allclose(waveform[inner], SECOND[inner], atol=tolerance)


@pytest.fixture
def no_ffmpeg(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))


@pytest.fixture
def fake_ffmpeg(monkeypatch, tmp_path):
    """An `ffmpeg` that understands only files that begin with TONE; it keeps its arguments in `arguments`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ffmpeg"
    script.write_text(
        f"#!{sys.executable}\n"
        "import array, sys\n"
        f"open({str(folder / 'arguments')!r}, 'w').write('\\n'.join(sys.argv[1:]))\n"
        "path = sys.argv[sys.argv.index('-i') + 1]\n"
        "if not open(path.removeprefix('file:'), 'rb').read().startswith(b'TONE'):\n"
        "    sys.exit(f'decoder wrote this\\n{path}: Invalid data found')\n"
        "sys.stdout.buffer.write(array.array('f', [0.25] * 8000).tobytes())\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.wav", {}, 1e-4),
        ("a.flac", {}, 1e-4),
        ("a.ogg", {}, 0.05),
        ("a.mp3", {}, 0.05),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}, 0.05),
    ],
)
def test_native_formats_as_path_string_and_bytes(tmp_path, no_ffmpeg, name, options, tolerance):
    path = tmp_path / name
    soundfile.write(path, SECOND, RATE, **options)
    assert_is_tone(load_audio(path), tolerance)
    assert_is_tone(load_audio(str(path)), tolerance)
    assert_is_tone(load_audio(path.read_bytes()), tolerance)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(rate), rate)
    assert_is_tone(load_audio(tmp_path / "a.wav"), 0.01)


def test_target_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", SECOND, RATE)
    assert len(load_audio(tmp_path / "a.wav", sampling_rate=8_000)) == 8_000


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([2 * SECOND, 0 * SECOND, SECOND], axis=1), RATE, subtype="FLOAT")
    assert_is_tone(load_audio(tmp_path / "a.wav"), 1e-6)


def test_content_counts_and_not_the_suffix(tmp_path, no_ffmpeg):
    soundfile.write(tmp_path / "a.flac", SECOND, RATE)
    for name in ("a.wav", "a.raw", "a"):
        (tmp_path / "a.flac").rename(tmp_path / name)
        assert_is_tone(load_audio(tmp_path / name), 1e-4)
        (tmp_path / name).rename(tmp_path / "a.flac")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a POSIX thing")
def test_named_pipe(tmp_path):
    soundfile.write(tmp_path / "a.wav", SECOND, RATE)
    os.mkfifo(tmp_path / "pipe")
    content = (tmp_path / "a.wav").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    assert_is_tone(load_audio(tmp_path / "pipe"), 1e-4)
    writer.join()


def message_of(source, **options) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(source, **options)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    return message


def test_missing_file(tmp_path):
    assert message_of(tmp_path / "a.wav") == f"{tmp_path / 'a.wav'}: no such file"
    assert "cannot be opened (embedded null byte)" in message_of("a\0.wav")


def test_directory(tmp_path):
    assert message_of(tmp_path) == f"{tmp_path}: is a directory, expected an audio file"


@pytest.mark.skipif(not Path(os.devnull).is_char_device(), reason="needs a POSIX device file")
def test_device():
    assert message_of(os.devnull) == f"{os.devnull}: is not a regular file, expected an audio file"


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.wav").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    assert message_of(tmp_path / "a.wav") == f"{tmp_path / 'a.wav'}: cannot be opened (Permission denied)"


def test_empty_file_and_bytes(tmp_path):
    (tmp_path / "a.wav").touch()
    assert message_of(tmp_path / "a.wav") == f"{tmp_path / 'a.wav'}: empty file (0 bytes)"
    assert message_of(b"") == "audio bytes: empty (0 bytes)"


def test_text_named_wav_without_ffmpeg(tmp_path, no_ffmpeg):
    (tmp_path / "a.wav").write_text("Dear diary, " * 50)
    assert message_of(tmp_path / "a.wav") == (
        f"{tmp_path / 'a.wav'}: not readable as wav, flac, ogg or mp3 (Format not recognised); "
        "other formats need the ffmpeg executable on PATH: install ffmpeg or convert the file to wav"
    )
    assert message_of(b"Dear diary").startswith("audio bytes: not readable as wav, flac, ogg or mp3")


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    assert message_of(tmp_path / "a.wav") == f"{tmp_path / 'a.wav'}: contains no audio samples"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_numbers(tmp_path, bad):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, bad]), RATE, subtype="FLOAT")
    message = f"{tmp_path / 'a.wav'}: contains NaN or infinite samples, expected finite numbers"
    assert message_of(tmp_path / "a.wav") == message


def test_damaged_flac(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    content = (tmp_path / "a.flac").read_bytes()
    assert message_of(content[: len(content) // 2]).startswith("audio bytes: damaged FLAC file (")


def test_damaged_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", SECOND, RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = (1).to_bytes(4, "little")
    assert "sampling rate 1 Hz, expected 1000 to 768000 Hz" in message_of(bytes(content))


def test_too_few_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", SECOND[:1], 48_000)
    assert "1 samples at 48000 Hz are too few to resample" in message_of(tmp_path / "a.wav")


def test_wrong_arguments(tmp_path):
    assert "sampling_rate: expected an integer from 1000 to 768000 Hz, got 0" in message_of("a.wav", sampling_rate=0)
    assert "got 16000.0" in message_of("a.wav", sampling_rate=16000.0)
    with pytest.raises(TypeError, match="source: expected a path or the bytes of an audio file, got ndarray"):
        load_audio(SECOND)


def test_ffmpeg_reads_what_soundfile_cannot(tmp_path, fake_ffmpeg):
    (tmp_path / "a.m4a").write_bytes(b"TONE and more")
    for source in (tmp_path / "a.m4a", b"TONE and more"):
        waveform = load_audio(source)
        assert waveform.dtype == np.float32
        assert waveform.tolist() == [0.25] * 8000
        waveform[0] = 1.0  # the caller owns it
    arguments = (fake_ffmpeg / "arguments").read_text().splitlines()
    assert arguments[arguments.index("-protocol_whitelist") + 1] == "file"
    assert arguments[arguments.index("-ar") + 1] == "16000"


def test_ffmpeg_fails(tmp_path, fake_ffmpeg):
    (tmp_path / "a.wav").write_text("Dear diary")
    expected = "neither libsndfile nor ffmpeg can read it as audio (ffmpeg: Invalid data found)"
    assert message_of(tmp_path / "a.wav") == f"{tmp_path / 'a.wav'}: {expected}"
    assert message_of(b"Dear diary") == f"audio bytes: {expected}"


def test_ffmpeg_cannot_start(tmp_path, fake_ffmpeg):
    (fake_ffmpeg / "ffmpeg").write_text("#!/no/such/interpreter\n")
    assert "audio bytes: ffmpeg could not be started (" in message_of(b"Dear diary")


def test_prepare_accepts_arrays_lists_and_mappings():
    expected = prepare_waveform(SECOND, RATE)
    np.testing.assert_array_equal(expected, SECOND)
    for audio in (SECOND.tolist(), SECOND[None], np.stack([SECOND, SECOND]), np.stack([SECOND, SECOND], axis=1)):
        np.testing.assert_array_equal(prepare_waveform(audio, RATE), SECOND)
    for mapping in ({"raw": SECOND, "sampling_rate": RATE}, {"array": SECOND, "sampling_rate": RATE, "path": None}):
        np.testing.assert_array_equal(prepare_waveform(mapping), SECOND)
        np.testing.assert_array_equal(prepare_waveform(mapping, RATE), SECOND)


def test_prepare_scales_integers_and_resamples():
    np.testing.assert_array_equal(prepare_waveform(np.array([-(2**15), 2**14], np.int16), RATE), [-1.0, 0.5])
    assert_is_tone(prepare_waveform(tone(44_100), 44_100), 0.01)
    assert len(prepare_waveform(SECOND, RATE, 8_000)) == 8_000


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (SECOND, None, "sampling_rate: expected the rate of the waveform in Hz, got None"),
        (SECOND, "16k", "sampling_rate: expected an integer from 1000 to 768000 Hz, got '16k'"),
        ({"raw": SECOND}, None, r"got the keys \['raw'\]"),
        ({"sampling_rate": RATE}, RATE, r"got the keys \['sampling_rate'\]"),
        ({"raw": SECOND, "sampling_rate": RATE}, 8_000, "the mapping says 16000 Hz, the argument 8000 Hz"),
        ([[0.0], [0.0, 1.0]], RATE, "audio: expected an array of samples, got list"),
        (["a"], RATE, "expected float or signed integer samples, got dtype <U1"),
        (np.zeros(4, np.uint8), RATE, "expected float or signed integer samples, got dtype uint8"),
        (np.zeros((2, 2, 2)), RATE, r"got shape \[2, 2, 2\]"),
        (np.zeros((100, 200)), RATE, r"at most 64 channels, got shape \[100, 200\]"),
        (np.float32(1.0), RATE, r"got shape \[\]"),
        ([], RATE, "audio: contains no audio samples"),
        (np.zeros((2, 0)), RATE, "audio: contains no audio samples"),
        ([0.0, float("nan")], RATE, "audio: contains NaN or infinite samples"),
        ([0.0, 1e300], RATE, "audio: contains NaN or infinite samples"),
    ],
)
def test_prepare_refuses(audio, rate, message):
    with pytest.raises(AudioError, match=message):
        prepare_waveform(audio, rate)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_blocks_are_the_whole_waveform(tmp_path, rate):
    """Resampled as in one piece, and never held as a whole."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 100 * rate).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    expected = noise if rate == 16_000 else soxr.resample(noise, rate, 16_000)
    blocks = list(stream_audio(tmp_path / "a.wav"))
    assert len(blocks) > 3 and max(map(len, blocks)) < 20 * 16_000
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav"), expected)


def test_damage_is_found_after_the_blocks_before_it(tmp_path):
    samples = np.zeros(60 * 16_000, np.float32)
    samples[-1] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    blocks = stream_audio(tmp_path / "a.wav")
    assert len(next(blocks)) > 0
    with pytest.raises(AudioError, match="contains NaN"):
        list(blocks)
