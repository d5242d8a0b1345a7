"""Compare transcripts with references: what `speechllm transcribe --references` prints."""

import csv
from collections.abc import Sequence
from pathlib import Path

from .metrics import WordErrors, normalize_english, word_errors
from .transcription import Transcript


class ReferencesError(ValueError):
    """References that cannot be read or do not cover the recordings; the message is one line."""


def read_references(path: Path) -> dict[Path, str]:
    """Read a tab-separated file with a header that names at least the columns `file` and `text`.

    Returns:
        resolved path of the recording -> its text. File names are relative to the folder of `path`.

    Raises:
        ReferencesError: the file cannot be read, or a column or field is missing, or a recording is listed twice.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReferencesError(f"{path}: cannot be read as tab-separated UTF-8 text ({error})") from None
    references: dict[Path, str] = {}
    for line, row in enumerate(rows, start=2):
        if row.get("file") is None or row.get("text") is None:
            raise ReferencesError(f"{path}, line {line}: expected the columns 'file' and 'text', got {list(row)}")
        recording = (path.parent / row["file"]).resolve()
        if recording in references:
            raise ReferencesError(f"{path}, line {line}: {row['file']} is listed twice")
        references[recording] = row["text"]
    return references


class ReferenceReport:
    """Collects transcripts and renders one block of text for each and one for all.

    Raises:
        ReferencesError: a recording has no reference.
        ImportError: the packages of the extra "eval" are missing.
    """

    def __init__(self, references: dict[Path, str], recordings: Sequence[Path | None]) -> None:
        for recording in recordings:
            if recording is None:
                raise ReferencesError("standard input has no file name to find a reference by; pass a file")
            if recording.resolve() not in references:
                raise ReferencesError(f"no reference for {recording}; add a line for it to the references file")
        word_errors([""], [""], normalize_english)  # a missing package shows before the work, not after it
        self._references = references
        self._texts: list[str] = []
        self._hypotheses: list[str] = []
        self._duration_s = 0.0
        self._processing_s = 0.0

    def add(self, transcript: Transcript, recording: Path, *, with_speed: bool) -> str:
        """Count `transcript` and return its block; `with_speed` is for batches of one, where its own time is known."""
        reference = self._references[recording.resolve()]
        self._texts.append(reference)
        self._hypotheses.append(transcript.text)
        self._duration_s += transcript.duration_s
        self._processing_s += transcript.processing_s
        score = f"  WER  {_format_errors(word_errors([reference], [transcript.text], normalize_english))}"
        if with_speed:
            score += f"   RTFx {_format_speed(transcript.duration_s, transcript.processing_s)}"
        return f"{transcript.name}\n  REF  {reference}\n  HYP  {transcript.text}\n{score}\n\n"

    def summary(self, load_s: float, batch_size: int, device: str, num_failed: int) -> str:
        """The block for all recordings together; says what was counted and what was timed."""
        if not self._texts:
            return "No recording was transcribed: no WER.\n"
        errors = word_errors(self._texts, self._hypotheses, normalize_english)
        missing = f" ({num_failed} failed and not counted)" if num_failed else ""
        return (
            f"All {len(self._texts)} recordings{missing}\n"
            f"  WER  {_format_errors(errors)}   CER {errors.cer:.1%}\n"
            f"  RTFx {_format_speed(self._duration_s, self._processing_s)} on {device}, batch size {batch_size}\n"
            "  WER and CER after Whisper's English text normaliser (whisper-normalizer) on both sides.\n"
            "  RTFx = seconds of audio per second of reading and recognising it; loading the model "
            f"({load_s:.1f} s) and one warm-up are not in it.\n"
        )


def _format_errors(errors: WordErrors) -> str:
    return (
        f"{errors.wer:.1%} ({errors.substitutions} sub, {errors.deletions} del, {errors.insertions} ins "
        f"in {errors.reference_words} words)"
    )


def _format_speed(duration_s: float, processing_s: float) -> str:
    return f"{duration_s / max(processing_s, 1e-9):.1f} ({duration_s:.1f} s of audio in {processing_s:.2f} s)"
