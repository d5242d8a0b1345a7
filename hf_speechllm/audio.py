"""Read recordings into mono float32 waveforms.

wav, flac, ogg (vorbis, opus) and mp3 are decoded by libsndfile through soundfile; everything else goes through an
`ffmpeg` executable when one is on PATH. Every failure is an `AudioError` with a message of one line that names the
source.
"""

import io
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000
NATIVE_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"})
FFMPEG_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".mp4", ".aac", ".ac3", ".amr", ".3gp", ".wma", ".webm", ".weba", ".mka", ".mkv", ".mov", ".avi"}
)
AUDIO_SUFFIXES = NATIVE_SUFFIXES | FFMPEG_SUFFIXES

# A damaged header may claim any rate; resampling from 1 Hz would ask for 16,000 times the memory of the file.
_MIN_SAMPLING_RATE = 1_000
_MAX_SAMPLING_RATE = 768_000
_MAX_CHANNELS = 64
_READ_BLOCK_FRAMES = 1 << 18


class AudioError(ValueError):
    """Audio that cannot be used: missing, empty, unreadable or with samples that are not numbers."""


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; for an OSError the reason alone, without the file name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def load_audio(source: str | os.PathLike[str] | bytes, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Decode a recording to one channel at `sampling_rate`.

    Args:
        source: path of a file (or of a named pipe), or the bytes of a file.
        sampling_rate: rate of the result in Hz.

    Returns:
        float32 waveform of shape [samples]; full scale is 1.0 and channels are averaged.

    Raises:
        AudioError: the source is missing, a directory, empty, not audio, damaged, without samples or with NaN or
            infinite samples, or needs ffmpeg and there is none.
        TypeError: `source` is neither a path nor bytes.
    """
    return _join(stream_audio(source, sampling_rate))


def stream_audio(source: str | os.PathLike[str] | bytes, sampling_rate: int = SAMPLING_RATE) -> Iterator[np.ndarray]:
    """Decode a recording block by block, for one that need not fit into memory.

    Args:
        source: as for [`load_audio`].
        sampling_rate: as for [`load_audio`].

    Returns:
        Blocks of the waveform that [`load_audio`] returns, at least one, some seconds each.

    Raises:
        AudioError, TypeError: as [`load_audio`]; damage is found only where it lies, after the blocks before it.
    """
    _check_sampling_rate("sampling_rate", sampling_rate)
    if isinstance(source, bytes | bytearray | memoryview):
        return _stream_bytes(bytes(source), sampling_rate, "audio bytes")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source: expected a path or the bytes of an audio file, got {type(source).__name__}; "
            "for a waveform use prepare_waveform"
        )
    path = Path(source)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise AudioError(f"{path}: cannot be opened ({one_line(error)})") from None
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(f"{path}: is a directory, expected an audio file")
    if stat.S_ISFIFO(status.st_mode):  # decoders seek, pipes cannot
        return _stream_bytes(path.read_bytes(), sampling_rate, str(path))
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{path}: is not a regular file, expected an audio file")
    if status.st_size == 0:
        raise AudioError(f"{path}: empty file (0 bytes)")
    return _stream_file(path, sampling_rate, str(path))


def prepare_waveform(
    audio: Any, sampling_rate: int | None = None, target_sampling_rate: int = SAMPLING_RATE
) -> np.ndarray:
    """Bring a waveform that is already in memory to the form `load_audio` returns.

    Args:
        audio: array-like [samples], [channels, samples] or [samples, channels] (the shorter axis counts as channels),
            float with full scale 1.0 or signed integers (scaled by their type's range); or a mapping with "raw" or
            "array" and "sampling_rate".
        sampling_rate: rate of `audio` in Hz; may be left out for a mapping, which carries its own.
        target_sampling_rate: rate of the result in Hz.

    Returns:
        float32 waveform of shape [samples] at `target_sampling_rate`.

    Raises:
        AudioError: a missing key or rate, contradicting rates, an unusable shape or type, no samples, NaN or infinity.
    """
    _check_sampling_rate("target_sampling_rate", target_sampling_rate)
    if isinstance(audio, Mapping):
        audio, sampling_rate = _unpack_mapping(audio, sampling_rate)
    if sampling_rate is None:
        raise AudioError("sampling_rate: expected the rate of the waveform in Hz, got None; an array carries no rate")
    _check_sampling_rate("sampling_rate", sampling_rate)
    try:
        array = np.asarray(audio)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors on a GPU or with a gradient
        raise AudioError(
            f"audio: expected an array of samples, got {type(audio).__name__} ({one_line(error)})"
        ) from None
    waveform = _mix_to_mono(_to_float32(array))
    return _join(_finish([waveform], int(sampling_rate), target_sampling_rate, "audio"))


def _unpack_mapping(audio: Mapping[str, Any], sampling_rate: int | None) -> tuple[Any, int | None]:
    """Take samples and rate out of {"raw" | "array": samples, "sampling_rate": Hz}."""
    key = next((name for name in ("raw", "array") if audio.get(name) is not None), None)
    if key is None or audio.get("sampling_rate") is None:
        raise AudioError(
            "audio: expected a mapping with 'raw' or 'array' and 'sampling_rate', "
            f"got the keys {sorted(map(str, audio))}"
        )
    own_rate = audio["sampling_rate"]
    if sampling_rate is not None and sampling_rate != own_rate:
        raise AudioError(
            f"sampling_rate: the mapping says {own_rate} Hz, the argument {sampling_rate} Hz; pass only one of them"
        )
    return audio[key], own_rate


def _to_float32(array: np.ndarray) -> np.ndarray:
    """Scale signed integers to [-1, 1); pass floats through."""
    if array.dtype.kind == "i":
        return array.astype(np.float32) / np.float32(2.0 ** (8 * array.dtype.itemsize - 1))
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which _finish reports
            return array.astype(np.float32, copy=False)
    raise AudioError(f"audio: expected float or signed integer samples, got dtype {array.dtype}")


def _mix_to_mono(array: np.ndarray) -> np.ndarray:
    """[samples] unchanged; the mean over the shorter axis of a 2-D array."""
    if array.ndim == 1:
        return array
    if array.ndim != 2 or min(array.shape) > _MAX_CHANNELS:
        raise AudioError(
            f"audio: expected [samples] or [channels, samples] with at most {_MAX_CHANNELS} channels, "
            f"got shape {list(array.shape)}; pass one recording at a time"
        )
    if array.size == 0:
        return array.reshape(-1)
    return array.mean(axis=0 if array.shape[0] <= array.shape[1] else 1, dtype=np.float32)


def _join(blocks: Iterator[np.ndarray]) -> np.ndarray:
    parts = list(blocks)
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


def _stream_bytes(data: bytes, sampling_rate: int, name: str) -> Iterator[np.ndarray]:
    if not data:
        raise AudioError(f"{name}: empty (0 bytes)")
    try:
        reader = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        # ffmpeg has to seek in some containers (mp4 with its index at the end), hence a file and not a pipe.
        with tempfile.TemporaryDirectory(prefix="hf_speechllm_") as folder:
            path = Path(folder) / "audio"
            path.write_bytes(data)
            yield from _stream_with_ffmpeg(path, sampling_rate, name, error)
        return
    with reader:
        yield from _finish(_decoded_blocks(reader, name), reader.samplerate, sampling_rate, name)


def _stream_file(path: Path, sampling_rate: int, name: str) -> Iterator[np.ndarray]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise AudioError(f"{name}: cannot be opened ({one_line(error)})") from None
    with file:
        try:
            # soundfile reads the suffix of a name and wants a rate for ".raw"; by descriptor it looks at the content.
            reader = soundfile.SoundFile(file.fileno(), closefd=False)
        except soundfile.LibsndfileError as error:
            cause = error
        else:
            with reader:
                yield from _finish(_decoded_blocks(reader, name), reader.samplerate, sampling_rate, name)
            return
    yield from _stream_with_ffmpeg(path, sampling_rate, name, cause)


def _decoded_blocks(reader: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    """Blocks of one channel; AudioError if the content is damaged."""
    samples = 0
    try:
        while len(block := reader.read(_READ_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            samples += len(block)
            yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: damaged {reader.format} file ({_reason(error)})") from None
    # The length of mp3 and ogg is an estimate; a flac header states it exactly.
    if reader.format == "FLAC" and samples < reader.frames:
        raise AudioError(f"{name}: damaged FLAC file (only {samples} of {reader.frames} samples can be decoded)")


def _stream_with_ffmpeg(
    path: Path, sampling_rate: int, name: str, cause: soundfile.LibsndfileError
) -> Iterator[np.ndarray]:
    """Decode what libsndfile refused; ffmpeg mixes the channels and resamples."""
    executable = shutil.which("ffmpeg")
    if executable is None:
        raise AudioError(
            f"{name}: not readable as wav, flac, ogg or mp3 ({_reason(cause)}); "
            "other formats need the ffmpeg executable on PATH: install ffmpeg or convert the file to wav"
        )
    # "file:" and the whitelist keep a name such as "http://..." or a playlist in the file from reaching the network.
    command = [executable, "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-i", f"file:{path}", "-vn"]
    command += ["-f", "f32le", "-ac", "1", "-ar", str(sampling_rate), "-"]
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages)
        except OSError as error:
            raise AudioError(f"{name}: ffmpeg could not be started ({one_line(error)})") from None
        try:
            yield from _finish(_raw_blocks(process, path, name, messages), sampling_rate, sampling_rate, name)
        finally:
            process.kill()  # without effect on one that has ended
            process.stdout.close()
            process.wait()


def _raw_blocks(process: subprocess.Popen[bytes], path: Path, name: str, messages: IO[bytes]) -> Iterator[np.ndarray]:
    """What ffmpeg writes, little-endian float32; AudioError if it gives up."""
    while data := process.stdout.read(4 * _READ_BLOCK_FRAMES):
        yield np.frombuffer(data, dtype="<f4").astype(np.float32)
    if process.wait() != 0:
        messages.seek(0)
        lines = messages.read().decode("utf-8", "replace").replace(f"file:{path}: ", "").strip().splitlines()
        reason = lines[-1].strip() if lines else f"exit status {process.returncode}"
        raise AudioError(f"{name}: neither libsndfile nor ffmpeg can read it as audio (ffmpeg: {reason})")


def _finish(blocks: Iterable[np.ndarray], source_rate: int, sampling_rate: int, name: str) -> Iterator[np.ndarray]:
    """Check the samples and resample: blocks at `source_rate` to blocks at `sampling_rate`, at least one."""
    resampler = None
    source_samples = samples = 0
    for block in blocks:
        source_samples += len(block)
        if not np.isfinite(block).all():
            raise AudioError(f"{name}: contains NaN or infinite samples, expected finite numbers")
        if source_rate != sampling_rate:
            if resampler is None:
                _check_source_rate(source_rate, name)
                resampler = soxr.ResampleStream(source_rate, sampling_rate, 1, dtype=np.float32)
            block = resampler.resample_chunk(np.ascontiguousarray(block))
        samples += len(block)
        if len(block):
            yield block
    if source_samples == 0:
        raise AudioError(f"{name}: contains no audio samples")
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        if samples + len(rest) == 0:
            raise AudioError(f"{name}: {source_samples} samples at {source_rate} Hz are too few to resample")
        if len(rest):
            yield rest


def _check_source_rate(source_rate: int, name: str) -> None:
    if not _MIN_SAMPLING_RATE <= source_rate <= _MAX_SAMPLING_RATE:
        raise AudioError(
            f"{name}: sampling rate {source_rate} Hz, "
            f"expected {_MIN_SAMPLING_RATE} to {_MAX_SAMPLING_RATE} Hz; the header is probably damaged"
        )


def _check_sampling_rate(parameter: str, value: int) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or not _MIN_SAMPLING_RATE <= value <= _MAX_SAMPLING_RATE
    ):
        raise AudioError(
            f"{parameter}: expected an integer from {_MIN_SAMPLING_RATE} to {_MAX_SAMPLING_RATE} Hz, got {value!r}"
        )


def _reason(error: soundfile.LibsndfileError) -> str:
    return error.error_string.removeprefix("Error : ").rstrip(".")
