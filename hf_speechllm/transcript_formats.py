"""Transcripts as plain text, JSON lines, SubRip (srt) and WebVTT."""

import html
import json
from collections.abc import Callable

from .transcription import TimedText, Transcript


def to_text(transcript: Transcript) -> str:
    """The text on one line."""
    return transcript.text + "\n"


def to_json(transcript: Transcript) -> str:
    """One JSON object on one line: file, duration (seconds), text, segments with start, end (seconds) and text."""
    segments = [
        {"start": round(segment.start_s, 3), "end": round(segment.end_s, 3), "text": segment.text}
        for segment in transcript.segments
    ]
    fields = {
        "file": transcript.name,
        "duration": round(transcript.duration_s, 3),
        "text": transcript.text,
        "segments": segments,
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


def to_srt(transcript: Transcript) -> str:
    """Numbered SubRip cues, one per segment with text."""
    return "".join(
        f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{cue.text}\n\n"
        for number, cue in enumerate(_cues(transcript), start=1)
    )


def to_vtt(transcript: Transcript) -> str:
    """WebVTT with one cue per segment with text; &, < and > are escaped as the format demands."""
    cues = (
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{html.escape(cue.text, quote=False)}\n\n"
        for cue in _cues(transcript)
    )
    return "WEBVTT\n\n" + "".join(cues)


FORMATS: dict[str, Callable[[Transcript], str]] = {"text": to_text, "json": to_json, "srt": to_srt, "vtt": to_vtt}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def _cues(transcript: Transcript) -> list[TimedText]:
    return [segment for segment in transcript.segments if segment.text]


def _clock(seconds: float, decimal_mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{decimal_mark}{milliseconds:03d}"
