"""From a row of a data source to a waveform and a transcript, or the reason why not."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from hf_speechllm.audio import AudioError, load_audio, prepare_waveform
from hf_speechllm.metrics import normalize_english
from training.ctc_fit import CTCFit
from training.data_report import BadRow
from training.data_sources import Row, is_duration
from training.texts import normalise, spell_out

# Durations are rounded in manifests; an utterance may be so much shorter than its row says.
_DURATION_TOLERANCE_S = 0.1


def lower_no_punctuation(text: str) -> str:
    """Lower case without punctuation, whatever the language; apostrophes within words and digits stay."""
    words = re.sub(r"[^\w']|_", " ", text.replace("\u2019", "'").lower()).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


def spoken_english(text: str) -> str:
    """Lower case, numbers and abbreviations as words, only a-z and apostrophes within words."""
    return normalise(spell_out(text))


NORMALIZATIONS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": str.lower,
    "lower_no_punctuation": lower_no_punctuation,
    "spoken_english": spoken_english,
    "whisper_english": normalize_english,
}


@dataclass(frozen=True)
class Recording:
    """float32 `waveform` `[samples]` at the reader's rate, transcript, and what was done to the audio."""

    waveform: np.ndarray
    text: str
    conversions: tuple[str, ...]


@dataclass(frozen=True)
class RowReader:
    """Reads rows.

    Attributes:
        sampling_rate: Of the waveforms, in Hz.
        text_normalization: Key of NORMALIZATIONS.
        convert_audio: Resample other rates and average channels; else such audio is bad.
        empty_text: `bad`, or `keep` where it means that nothing is said.
        ctc_fit: Refuses transcripts that CTC cannot align; `None`: any length.
    """

    sampling_rate: int
    text_normalization: str = "none"
    convert_audio: bool = True
    empty_text: str = "bad"
    ctc_fit: CTCFit | None = None

    def __post_init__(self) -> None:
        if self.text_normalization not in NORMALIZATIONS:
            raise ValueError(
                f"data.text_normalization must be one of {list(NORMALIZATIONS)}, got {self.text_normalization!r}."
            )
        if self.empty_text not in ("bad", "keep"):
            raise ValueError(f"data.empty_text must be 'bad' or 'keep', got {self.empty_text!r}.")

    def read(self, row: Row) -> Recording | BadRow:
        """The recording of a row, or why there is none."""
        text = self._text(row)
        if isinstance(text, BadRow):
            return text
        recording = self._recording(row, text)
        if isinstance(recording, BadRow):
            return recording
        misfit = self.misfit(row, text, len(recording.waveform) / self.sampling_rate)
        return recording if misfit is None else misfit

    def fault(self, row: Row) -> BadRow | None:
        """What is wrong with a row, as far as that shows without its audio."""
        text = self._text(row)
        if isinstance(text, BadRow):
            return text
        if row.duration_s is None:
            return self._missing(row)
        if not is_duration(row.duration_s):
            return _bad(row, "duration", repr(row.duration_s))
        # The audio may be a little longer than the row says.
        return self._missing(row) or self.misfit(row, text, row.duration_s + _DURATION_TOLERANCE_S)

    def misfit(self, row: Row, text: str, duration_s: float) -> BadRow | None:
        """Why CTC cannot align `text` with so much audio, if so."""
        if self.ctc_fit is None:
            return None
        needed = self.ctc_fit.frames_needed(text)
        if needed is None:
            return _bad(row, "unspellable", repr(text[:80]))
        frames = self.ctc_fit.num_frames(duration_s)
        if needed > frames:
            return _bad(row, "too_many_labels", f"{needed} frames needed, {frames} in {duration_s:.2f} s")
        return None

    def duration_s(self, row: Row) -> float | BadRow:
        """Duration of a row whose source does not say it and whose header cannot be read either."""
        if row.duration_s is not None:
            return _bad(row, "duration", repr(row.duration_s))
        recording = self._recording(row, "")
        return recording if isinstance(recording, BadRow) else len(recording.waveform) / self.sampling_rate

    def _text(self, row: Row) -> str | BadRow:
        if not isinstance(row.text, str):
            return _bad(row, "no_text", repr(row.text))
        text = NORMALIZATIONS[self.text_normalization](row.text)
        if not text.strip() and self.empty_text == "bad":
            return _bad(row, "empty_text", f"{row.text!r} after normalization {self.text_normalization!r}")
        return text

    def _recording(self, row: Row, text: str) -> Recording | BadRow:
        missing = self._missing(row)
        if missing is not None:
            return missing
        try:
            return self._decode(row, row.audio, text)
        except (AudioError, sf.LibsndfileError, OSError) as error:
            return _bad(row, "unreadable", " ".join(str(error).split()))

    @staticmethod
    def _missing(row: Row) -> BadRow | None:
        if row.audio is None:
            return _bad(row, "missing_file", "the row has no audio")
        if isinstance(row.audio, Path) and not row.audio.is_file():
            return _bad(row, "missing_file", str(row.audio))
        return None

    def _decode(self, row: Row, audio: Path | bytes, text: str) -> Recording | BadRow:
        """Raises what the decoders raise."""
        try:
            with sf.SoundFile(io.BytesIO(audio) if isinstance(audio, bytes) else audio) as file:
                rate, channels = file.samplerate, file.channels
                length = -1
                if row.offset_s is not None:
                    file.seek(min(round(row.offset_s * rate), file.frames))
                    length = round(row.duration_s * rate)
                waveform = file.read(length, dtype="float32", always_2d=True).mean(1)
        except sf.LibsndfileError:
            # A format for ffmpeg, which averages the channels and resamples by itself.
            if row.offset_s is not None:
                raise
            rate, channels, waveform = self.sampling_rate, 1, load_audio(audio, self.sampling_rate)
        bad = self._bad_samples(row, waveform, rate, channels, length=max(length, 0))
        if bad is not None:
            return bad
        conversions = []
        if channels != 1:
            conversions.append("channels_averaged")
        if rate != self.sampling_rate:
            conversions.append("resampled")
            waveform = prepare_waveform(waveform, rate, self.sampling_rate)
        return Recording(waveform, text, tuple(conversions))

    def _bad_samples(self, row: Row, waveform: np.ndarray, rate: int, channels: int, length: int) -> BadRow | None:
        if len(waveform) == 0:
            return _bad(row, "empty_audio", "0 samples")
        if length - len(waveform) > _DURATION_TOLERANCE_S * rate:
            return _bad(row, "truncated", f"{len(waveform) / rate:.2f} s of {length / rate:.2f} s are there")
        if not np.isfinite(waveform).all():
            return _bad(row, "not_finite", f"{int((~np.isfinite(waveform)).sum())} of {len(waveform)} samples")
        if self.convert_audio:
            return None
        if rate != self.sampling_rate:
            return _bad(row, "sampling_rate", f"{self.sampling_rate} Hz is expected, got {rate} Hz")
        if channels != 1:
            return _bad(row, "channels", f"1 is expected, got {channels}")
        return None


def _bad(row: Row, kind: str, detail: str) -> BadRow:
    return BadRow(row.source, row.row, kind, detail)
