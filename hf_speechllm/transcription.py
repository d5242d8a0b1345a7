"""Transcribe many recordings of any length with a speech recognition pipeline, as command lines ask for it.

Recordings longer than the model's training length are cut at pauses; pieces of all recordings share the batches. A
recording that fails, fails alone.
"""

import ctypes
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .audio import AudioError, one_line, stream_audio
from .segmentation import Segment, split_blocks

DEFAULT_MAX_DURATION_S = 30.0
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights, as transformers calls them
# transformers lists some five hundred of them behind this.
_KNOWN_KINDS = " Model type should be one of "
# How a speech LLM can decode, as command lines name it. All but "joint" are modes of `generate`.
DECODING_MODES = {
    "joint": "speech LLM and CTC jointly",
    "llm": "speech LLM alone",
    "ctc_greedy": "CTC head alone, greedy",
    "ctc_beam": "CTC head alone, beam search",
    "rescoring": "CTC N-best list rescored by the plain LLM",
    "delayed_fusion": "CTC with the plain LLM, delayed fusion",
    "label_fusion": "CTC with the plain LLM, label by label",
}


def mode_options(mode: str) -> dict[str, Any]:
    """Options of `generate` for one of DECODING_MODES.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in DECODING_MODES:
        raise ValueError(f"--mode: expected one of {', '.join(DECODING_MODES)}, got {mode!r}")
    if mode == "joint":  # with the weight that the model has
        return {"mode": "llm"}
    return {"mode": "llm", "ctc_weight": 0.0} if mode == "llm" else {"mode": mode}


def describe_modes() -> str:
    """A line about each of DECODING_MODES, for the help of a command."""
    return "\n".join(f"  {mode:<16}{description}" for mode, description in DECODING_MODES.items())


def check_model_name(option: str, name: str) -> bool:
    """Refuse what is neither a folder nor `base:NAME` nor could be a Hub id.

    Args:
        option: What the model is called on the command line.
        name: The model.

    Returns:
        Whether it can be a Hub id only.

    Raises:
        ValueError: There is no such folder, or it is a file.
    """
    if name.startswith("base:") or Path(name).is_dir():
        return False
    if Path(name).exists():
        raise ValueError(f"{option}: expected the folder of a model or a Hub id, got the file {name}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{option}: no such folder: {name}") from None
    return True


def describe_load_error(option: str, name: str, error: Exception) -> str:
    """A line about a model that cannot be loaded; above all that there is no such folder, if there is none.

    Args:
        option, name: As of [`check_model_name`], which the name has passed.
        error: What was raised.
    """
    reason = f"({type(error).__name__}: {one_line(error).partition(_KNOWN_KINDS)[0]})"
    if check_model_name(option, name):
        return f"{option}: no such folder: {name}; as a Hub id it cannot be loaded either {reason}"
    return f"{option}: {name} cannot be loaded {reason}"


def parse_json_object(text: str) -> dict[str, Any]:
    """The JSON object that `text`, an option or a line of a file, spells.

    Raises:
        ValueError: It spells something else, or nothing; the message quotes its beginning.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {text.strip()[:60]!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text.strip()[:60]!r}")
    return value


def check_device(device: str) -> None:
    """Refuse a device that PyTorch does not know or cannot use.

    Raises:
        ValueError: It is such a one.
    """
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda, cuda:0, mps or the like, got {device!r}") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # it differs from device to device
        raise ValueError(f"--device: {device} cannot be used ({one_line(error)})") from error


@dataclass(frozen=True)
class TimedText:
    """What was said from `start_s` to `end_s` (seconds from the start of the recording)."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """The text of one recording.

    `processing_s` is the wall time of reading and recognising it; with batches larger than one it is only meaningful
    summed over all recordings.
    """

    name: str
    duration_s: float
    segments: tuple[TimedText, ...]
    processing_s: float

    @property
    def text(self) -> str:
        """The texts of all segments, joined by single spaces."""
        return " ".join(segment.text for segment in self.segments if segment.text)


@dataclass(frozen=True)
class FailedRecording:
    """A recording without transcript; `message` is one line that names it."""

    name: str
    message: str


@dataclass(frozen=True)
class Recording:
    """A recording to transcribe: the name to show for it and where it comes from."""

    name: str
    source: Path | bytes


@dataclass(frozen=True)
class Recognizer:
    """An automatic-speech-recognition pipeline with the options to call it with.

    Attributes:
        pipe: `transformers.pipeline("automatic-speech-recognition", ...)` or an object that is called in the same way.
        sampling_rate: in Hz, what the model expects.
        max_duration_s: longer recordings are segmented.
        batch_size: pieces per forward pass.
        generate_kwargs: passed on to `generate`; only what the user asked for, the rest is the model's own choice.
    """

    pipe: Callable[..., Any]
    sampling_rate: int
    max_duration_s: float = DEFAULT_MAX_DURATION_S
    batch_size: int = 1
    generate_kwargs: dict[str, Any] = field(default_factory=dict)

    def stream(self, waveforms: Iterator[np.ndarray]) -> Iterator[str]:
        """Texts in the order of `waveforms`, which is consumed lazily, about one batch ahead."""
        items = ({"raw": waveform, "sampling_rate": self.sampling_rate} for waveform in waveforms)
        options = {"generate_kwargs": dict(self.generate_kwargs)} if self.generate_kwargs else {}
        for output in self.pipe(items, batch_size=self.batch_size, **options):
            yield " ".join(output["text"].split())


@dataclass
class _Job:
    """A recording on its way: `texts` holds one entry per segment so far, None until it is recognised."""

    name: str
    is_read: bool = False
    segments: list[Segment] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    processing_s: float = 0.0
    failure: str | None = None

    @property
    def is_done(self) -> bool:
        return self.failure is not None or (self.is_read and None not in self.texts)

    def result(self) -> Transcript | FailedRecording:
        if self.failure is not None:
            return FailedRecording(self.name, self.failure)
        timed = tuple(
            TimedText(segment.start_s, segment.end_s, text)
            for segment, text in zip(self.segments, self.texts, strict=True)
        )
        return Transcript(self.name, self.segments[-1].end_s, timed, self.processing_s)


@dataclass(frozen=True)
class _Piece:
    job: _Job
    index: int
    waveform: np.ndarray


def transcribe(
    recognizer: Recognizer, recordings: Iterable[Recording], on_piece: Callable[[float], None] | None = None
) -> Iterator[Transcript | FailedRecording]:
    """Transcribe recordings in their order, each reported as soon as it is finished.

    `on_piece` is told the seconds of every piece that is done, for a progress bar.

    Recordings are read while the iteration proceeds, block by block: memory holds about one batch of pieces, however
    long the recordings are. Segments without any sound (see `Segment.is_silence`) get an empty text without asking the
    model, which might invent one.
    """
    jobs: deque[_Job] = deque()
    resumed = time.perf_counter()
    for piece, outcome in _recognize(recognizer, _pieces(recognizer, recordings, jobs)):
        _return_free_memory()
        piece.job.processing_s += time.perf_counter() - resumed
        if on_piece is not None:
            on_piece(len(piece.waveform) / recognizer.sampling_rate)
        if isinstance(outcome, str):
            piece.job.texts[piece.index] = outcome
        elif piece.job.failure is None:
            piece.job.failure = f"{piece.job.name}: recognition failed ({type(outcome).__name__}: {one_line(outcome)})"
        while jobs and jobs[0].is_done:
            yield jobs.popleft().result()
        resumed = time.perf_counter()
    # Recordings at the end that had nothing to recognise.
    while jobs:
        yield jobs.popleft().result()


def _return_free_memory() -> None:
    """Give what is freed back to the system: pieces all have other lengths, and glibc keeps the holes that they leave,
    more of them the longer a recording is."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _pieces(recognizer: Recognizer, recordings: Iterable[Recording], jobs: deque[_Job]) -> Iterator[_Piece]:
    """Append a job for each recording to `jobs`, read it and yield the pieces that the model has to hear."""
    for recording in recordings:
        job = _Job(recording.name)
        jobs.append(job)
        last: _Piece | None = None  # held back until it is known whether it ends the recording
        try:
            blocks = stream_audio(recording.source, recognizer.sampling_rate)
            for segment, waveform in split_blocks(blocks, recognizer.sampling_rate, recognizer.max_duration_s):
                job.segments.append(segment)
                job.texts.append("" if segment.is_silence else None)
                if segment.is_silence:
                    continue
                if last is not None:
                    yield last
                last = _Piece(job, len(job.segments) - 1, waveform)
        except AudioError as error:
            message = str(error)
            job.failure = message if recording.name in message else f"{recording.name}: {message}"
        except Exception as error:  # one recording that cannot be read must not end a long run
            job.failure = f"{recording.name}: cannot be read ({type(error).__name__}: {one_line(error)})"
        job.is_read = True
        if last is not None and job.failure is None:
            yield last


def _recognize(recognizer: Recognizer, pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, str | Exception]]:
    """Recognise pieces in batches; when a batch raises, its pieces are tried one by one and the stream goes on."""
    pending: deque[_Piece] = deque()

    def waveforms() -> Iterator[np.ndarray]:
        for piece in pieces:
            pending.append(piece)
            yield piece.waveform

    while True:
        try:
            for text in recognizer.stream(waveforms()):
                yield pending.popleft(), text
            return
        except Exception:
            if not pending:  # not the fault of any piece
                raise
        while pending:
            piece = pending.popleft()
            try:
                (text,) = recognizer.stream(iter([piece.waveform]))
            except Exception as error:  # reported as the failure of this recording
                yield piece, error
            else:
                yield piece, text
