"""Utterances to evaluate on: local JSONL manifests, and `datasets` (streamed) with the leaderboard's conventions."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from hf_speechllm.audio import SAMPLING_RATE, AudioError, load_audio, prepare_waveform
from hf_speechllm.transcription import parse_json_object

# Columns that hold the reference, in the order of the leaderboard's own script.
TEXT_COLUMNS = ("text", "sentence", "normalized_text", "transcript", "transcription")

# What fields of manifests and results hold, wherever they are read.
TEXT_FIELDS = ("audio_filepath", "text", "pred_text")
NUMBER_FIELDS = ("duration", "offset", "time")


class UsageError(ValueError):
    """Something the user has to change; the message is one line."""


@dataclass(frozen=True)
class Utterance:
    """A recording with its reference.

    `entry` has `audio_filepath`, `text`, `duration` (seconds) and whatever else the source says; a manifest may cut
    utterances out of longer files with `offset` (seconds). `audio` is a path or the bytes of a file.
    """

    index: int
    entry: dict[str, Any]
    audio: Path | bytes

    def waveform(self, sampling_rate: int) -> np.ndarray:
        """float32 [samples] at `sampling_rate`; UsageError if the audio cannot be read."""
        try:
            if isinstance(self.audio, bytes):
                return load_audio(self.audio, sampling_rate)
            if "offset" not in self.entry:
                return load_audio(self.audio, sampling_rate)
            with sf.SoundFile(self.audio) as file:
                file.seek(round(self.entry["offset"] * file.samplerate))
                samples = file.read(round(self.entry["duration"] * file.samplerate), dtype="float32", always_2d=True)
                return prepare_waveform(samples.mean(axis=1), file.samplerate, sampling_rate)
        except (AudioError, sf.LibsndfileError) as error:
            raise _unreadable(self.entry["audio_filepath"], error) from error


def read_json_lines(path: Path, required: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file, empty lines left out.

    Raises:
        UsageError: the file is missing or no UTF-8, or a line is no JSON object, lacks a required field, or has a text
            or a number of TEXT_FIELDS and NUMBER_FIELDS that is none.
    """
    _check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_object(line, f"{path}:{number}", required)


def read_json_object(path: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        UsageError: As of [`read_json_lines`].
    """
    _check_file(path)
    return _parse_object(path.read_bytes(), str(path), required)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path}: expected a file, got a folder")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")


def _parse_object(content: bytes, where: str, required: Sequence[str]) -> dict[str, Any]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: expected UTF-8 ({error})") from None
    try:
        entry = parse_json_object(text)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    for name in required:
        if name not in entry:
            raise UsageError(f"{where}: field {name!r} is missing; there are {sorted(entry)}")
    for name in TEXT_FIELDS:
        if name in entry and not isinstance(entry[name], str):
            raise UsageError(f"{where}: {name}: expected a string, got {entry[name]!r}")
    for name in NUMBER_FIELDS:
        if name in entry and not is_number(entry[name]):
            raise UsageError(f"{where}: {name}: expected a number, got {entry[name]!r}")
    return entry


def is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_manifest(
    path: Path, limit: int | None = None, on_failure: Callable[[str], None] | None = None
) -> list[Utterance]:
    """Utterances of a manifest with `audio_filepath` (relative to it), `text` and, unless it is to be read from the
    audio, `duration`.

    Args:
        path: the manifest.
        limit: how many lines to read at most.
        on_failure: called with a line about each audio file that is missing or, where its duration is wanted,
            unreadable, and the utterance is left out; None: such a file raises.

    Raises:
        UsageError: as [`read_json_lines`]; no utterance that can be read; an audio file as above.
    """
    utterances: list[Utterance] = []
    failure = None
    for index, entry in enumerate(islice(read_json_lines(path, ("audio_filepath", "text")), limit)):
        audio = path.parent / entry["audio_filepath"]
        try:
            if audio.is_dir():
                raise UsageError(f"{path}: utterance {index + 1}: {audio} is a directory, expected an audio file")
            if not audio.is_file():
                raise UsageError(f"{path}: utterance {index + 1}: no such audio file: {audio}")
            if "duration" not in entry:
                entry["duration"] = _duration_s(audio, str(audio)) - entry.get("offset", 0.0)
        except UsageError as error:
            if on_failure is None:
                raise
            failure = error
            on_failure(str(error))
            continue
        utterances.append(Utterance(len(utterances), {**entry, "audio_filepath": str(audio)}, audio))
    if failure is not None and not utterances:
        raise UsageError(f"{path}: none of its recordings can be read; the last: {failure}")
    if not utterances:
        raise UsageError(f"{path}: expected at least one utterance, got none")
    return utterances


def stream_dataset(
    path: str,
    configuration: str | None,
    split: str,
    is_scored: Callable[[str], bool],
    limit: int | None = None,
) -> Iterator[Utterance]:
    """Utterances of a data set of the Hub or of a local folder, read as they are needed.

    Args:
        path, configuration, split: as for `datasets.load_dataset`.
        is_scored: whether to keep an utterance with this reference.
        limit: how many to keep at most.

    Raises:
        UsageError: there is no such data set, or it has no audio or no transcript column.
    """
    import datasets  # takes seconds

    try:
        rows = datasets.load_dataset(path, configuration, split=split, streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
        # Without decoding: `datasets` would want torchcodec.
        rows = rows.cast_column("audio", datasets.Audio(decode=False)) if "audio" in columns else None
    except Exception as error:
        raise UsageError(
            f"{path}: configuration {configuration!r}, split {split!r} cannot be read ({type(error).__name__}: {error})"
        ) from error
    text_column = next((name for name in TEXT_COLUMNS if name in columns), None)
    if rows is None or text_column is None:
        raise UsageError(
            f"{path}: expected the columns 'audio' and one of {', '.join(TEXT_COLUMNS)}; there are {sorted(columns)}"
        )
    kept = (row for row in rows if is_scored(row[text_column]))
    for index, row in enumerate(islice(kept, limit)):
        name = row["audio"]["path"] or f"sample_{index}"
        audio = row["audio"]["bytes"] or Path(row["audio"]["path"])
        entry = {"audio_filepath": name, "text": row[text_column], "duration": _duration_s(audio, name)}
        yield Utterance(index, entry, audio)


def batches(utterances: Iterator[Utterance], batch_size: int, window: int | None) -> Iterator[list[Utterance]]:
    """Batches of similar duration, longest first, sorted within `window` utterances at a time (None: all)."""
    while members := sorted(islice(utterances, window), key=lambda utterance: -utterance.entry["duration"]):
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def _duration_s(audio: Path | bytes, name: str) -> float:
    try:
        return sf.info(io.BytesIO(audio) if isinstance(audio, bytes) else audio).duration
    except sf.LibsndfileError:  # another format, of which ffmpeg tells only what it decodes
        try:
            return len(load_audio(audio, SAMPLING_RATE)) / SAMPLING_RATE
        except AudioError as error:
            raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UsageError:
    reason = str(error).removeprefix(f"{name}: ")
    return UsageError(f"{name}: cannot be read ({reason})")
