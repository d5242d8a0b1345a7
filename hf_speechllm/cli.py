"""The command line: `speechllm transcribe recording.wav`."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm
from transformers import pipeline
from transformers.utils import logging

from .audio import AUDIO_SUFFIXES, one_line
from .default_model import default_model
from .reference_report import ReferenceReport, ReferencesError, read_references
from .transcript_formats import FORMATS, SUFFIXES
from .transcription import (
    DECODING_MODES,
    DEFAULT_MAX_DURATION_S,
    DTYPES,
    FailedRecording,
    Recognizer,
    Recording,
    Transcript,
    check_device,
    check_model_name,
    describe_load_error,
    describe_modes,
    mode_options,
    parse_json_object,
    transcribe,
)

EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
STDIN_NAME = "stdin"

_DESCRIPTION = """\
Transcribe recordings. wav, flac, ogg and mp3 are read natively, other formats through ffmpeg. Recordings longer than
the model's training length are cut at pauses; a segment without any sound gets an empty text."""
_EPILOG = f"""\
modes of a speech LLM:
{describe_modes()}
Further options of generate go with them, such as --mode rescoring --generate '{{"lm_weight": 0.4}}'.

exit status: 0 all recordings transcribed, 1 some failed (one line each on standard error), 2 wrong usage or model.
With several recordings, text output has one line per recording: its name, a tab, its text."""


class UsageError(Exception):
    """Something the user has to change before anything can be transcribed; the message is one line."""


@dataclass(frozen=True)
class Task:
    """A recording, or the reason why there is none, and where its transcript goes (None: standard output)."""

    recording: Recording | FailedRecording
    output_path: Path | None = None
    audio_path: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status (see `--help`)."""
    arguments = build_parser().parse_args(argv)
    try:
        return run_transcribe(arguments)
    except UsageError as error:
        print(f"speechllm: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt as interrupt:
        print(f"speechllm: interrupted{interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SOME_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="speechllm", description="Speech recognition with speech LLMs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "transcribe",
        allow_abbrev=False,  # --mod would be taken for --model
        help="transcribe files, folders or standard input",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("inputs", nargs="+", metavar="FILE|DIR|-", help="recording, folder (searched recursively) or - for stdin")
    add("--model", help="folder or Hub id of any Hugging Face ASR model (default: the model of this package)")
    add("--format", choices=sorted(FORMATS), default="text", help="output format (default: text)")
    add("--output-dir", type=Path, metavar="DIR", help="write one file per recording there, not to standard output")
    add(
        "--mode",
        choices=list(DECODING_MODES),
        metavar="MODE",
        help=f"how a speech LLM decodes: {', '.join(DECODING_MODES)} (default: what the model is set to; see below)",
    )
    add("--ctc-weight", type=_weight, metavar="F", help="weight of the CTC score in decoding (default: the model's)")
    add("--num-beams", type=_positive, metavar="N", help="beams of the search (default: the model's)")
    add(
        "--generate",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further options of generate, such as '{\"max_new_tokens\": 80}' (default: none)",
    )
    add("--batch-size", type=_positive, default=1, metavar="N", help="segments per batch (default: 1)")
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of the weights; bfloat16 is faster on GPUs and on CPUs that compute in it (default: auto, what the "
        "model was saved in)",
    )
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: an accelerator when there is one)")
    add(
        "--references",
        type=Path,
        metavar="TSV",
        help="tab-separated file with the columns file (relative to the TSV) and text; prints reference, hypothesis, "
        "WER and speed instead of the text",
    )
    add("--progress", action=argparse.BooleanOptionalAction, help="progress bar (default: when stderr is a terminal)")
    return parser


def run_transcribe(arguments: argparse.Namespace) -> int:
    """Run `speechllm transcribe` and return the exit status."""
    tasks = _with_outputs(list(_find_recordings(arguments.inputs)), arguments)
    report = None
    if arguments.references is not None:
        audio_paths = [task.audio_path for task in tasks if isinstance(task.recording, Recording)]
        try:
            report = ReferenceReport(read_references(arguments.references), audio_paths)
        except (ReferencesError, ImportError) as error:
            raise UsageError(f"--references: {error}") from error
    if all(isinstance(task.recording, FailedRecording) for task in tasks):
        for task in tasks:
            _report_failure(task.recording)
        return EXIT_SOME_FAILED
    recognizer, load_s = load_recognizer(arguments)
    several = len(tasks) > 1
    failures = 0
    progress = sys.stderr.isatty() if arguments.progress is None else arguments.progress
    with tqdm(total=len(tasks), unit="file", disable=not progress, file=sys.stderr) as bar:
        for task, result in _results(recognizer, tasks, _show_audio_s(bar)):
            if isinstance(result, Transcript) and task.output_path is not None:
                result = _write_file(task.output_path, FORMATS[arguments.format](result), result)
            if isinstance(result, FailedRecording):
                failures += 1
                _report_failure(result)
            elif report is not None:
                _write(sys.stdout, report.add(result, task.audio_path, with_speed=arguments.batch_size == 1))
            elif task.output_path is None:
                name = f"{result.name}\t" if several and arguments.format == "text" else ""
                _write(sys.stdout, name + FORMATS[arguments.format](result))
            bar.update()
    if report is not None:
        _write(sys.stdout, report.summary(load_s, arguments.batch_size, str(recognizer.pipe.device), failures))
    return EXIT_SOME_FAILED if failures else EXIT_OK


def load_recognizer(arguments: argparse.Namespace) -> tuple[Recognizer, float]:
    """Load the pipeline and run it once on a second of silence.

    The run warms caches up and shows whether the model takes the options, before any recording is read.

    Returns:
        the recognizer and the seconds that loading took, without the warm-up.

    Raises:
        UsageError: the model cannot be loaded, is no ASR model, or does not take the options.
    """
    started = time.perf_counter()
    pipe = _load_pipeline(arguments.model, arguments.device, arguments.dtype)
    load_s = time.perf_counter() - started
    model = arguments.model or "the default model"
    generate_kwargs = decoding_options(arguments, pipe, model)
    is_token_by_token = _writes_token_by_token(pipe.model, generate_kwargs)
    if is_token_by_token and getattr(pipe.model.config, "model_type", None) == "speechllm":
        pipe.model.merge_adapter()  # nothing here needs the language model without it
    sampling_rate = pipe.feature_extractor.sampling_rate
    short = {"max_new_tokens": 4} if is_token_by_token else {}
    warm_up = Recognizer(pipe, sampling_rate, generate_kwargs={**short, **generate_kwargs})
    try:
        list(warm_up.stream(iter([np.zeros(sampling_rate, dtype=np.float32)])))
    except Exception as error:
        raise UsageError(
            f"{model} does not work with these options ({type(error).__name__}: {one_line(error)})"
        ) from error
    recognizer = Recognizer(
        pipe,
        sampling_rate,
        max_duration_s=getattr(pipe.model.config, "max_audio_duration_s", None) or DEFAULT_MAX_DURATION_S,
        batch_size=arguments.batch_size,
        generate_kwargs=generate_kwargs,
    )
    return recognizer, load_s


def decoding_options(arguments: argparse.Namespace, pipe: Any, model: str) -> dict[str, Any]:
    """Options of `generate` that were given; what `generate` says of their values is left to the warm-up.

    Raises:
        UsageError: one is given twice, does not go with the mode, or is not for this kind of model.
    """
    options = {"ctc_weight": arguments.ctc_weight, "num_beams": arguments.num_beams}
    given = {name: value for name, value in options.items() if value is not None}
    mode = {} if arguments.mode is None else mode_options(arguments.mode)
    if (given or mode or arguments.generate) and pipe.type in ("ctc", "ctc_with_lm"):
        raise UsageError(
            f"{model} is a pure CTC model, which takes none of --mode, --ctc-weight, --num-beams and --generate; "
            "drop them"
        )
    for name in arguments.generate.keys() & {*given, *(["mode"] if mode else [])}:
        raise UsageError(f"--generate: {name} is given by --{name.replace('_', '-')} too; give it once")
    options = {**given, **arguments.generate}
    if not mode:
        return options
    kind = getattr(pipe.model.config, "model_type", None)
    if kind != "speechllm":
        raise UsageError(f"--mode: is for speech LLMs of this package, {model} is a {kind} model; drop it")
    if "ctc_weight" in options and arguments.mode != "joint":
        raise UsageError(f"ctc_weight: goes with --mode joint, got --mode {arguments.mode}; drop it")
    if "num_beams" in options and arguments.mode not in ("joint", "llm"):
        raise UsageError(
            f"num_beams: goes with --mode joint or llm, got --mode {arguments.mode}; drop it, a search over CTC labels "
            "has its width from ctc_beam_size (--generate)"
        )
    return {**options, **mode}


def _writes_token_by_token(model: Any, options: dict[str, Any]) -> bool:
    """Whether the number of tokens bounds the work: not in the modes of a speech LLM that search CTC labels."""
    mode = options.get("mode", getattr(model.generation_config, "mode", None))
    return model.can_generate() and mode in (None, "llm")


def _load_pipeline(model: str | None, device: str | None, dtype: str) -> Any:
    try:
        if device is not None:
            check_device(device)
        if model is not None:
            check_model_name("--model", model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if model is None:
        model = _assemble_default_model()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {} if device is None else {"device": device}
    try:
        return pipeline("automatic-speech-recognition", model=model, dtype=dtype, **options)
    except Exception as error:
        raise UsageError(describe_load_error("--model", model, error)) from error


def _assemble_default_model() -> str:
    try:
        return default_model()
    except Exception as error:
        raise UsageError(
            f"the default model cannot be assembled ({type(error).__name__}: {one_line(error)})"
        ) from error


def _find_recordings(inputs: Sequence[str]) -> Iterator[tuple[Recording | FailedRecording, Path]]:
    """Recordings in the order of the arguments, each with the relative path that its transcript is named after."""
    if inputs.count("-") > 1:
        raise UsageError("-: standard input can be given only once")
    for name in inputs:
        path = Path(name)
        if name == "-":
            if sys.stdin.isatty():
                raise UsageError("-: standard input is a terminal, expected the bytes of a recording: ... - < FILE")
            yield Recording(STDIN_NAME, sys.stdin.buffer.read()), Path(STDIN_NAME)
        elif path.is_dir():
            found = sorted(_walk(path))
            if not found:
                yield FailedRecording(name, f"{name}: no audio files in this folder"), Path(path.name)
            for file in found:
                yield Recording(str(file), file), file.relative_to(path)
        else:
            yield Recording(name, path), Path(path.name)


def _walk(folder: Path) -> Iterator[Path]:
    """Audio files below `folder` by suffix, without hidden files and folders; links to folders are not followed."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and not name.startswith("."):
                yield Path(parent) / name


def _with_outputs(found: list[tuple[Recording | FailedRecording, Path]], arguments: argparse.Namespace) -> list[Task]:
    """Decide where each transcript goes and refuse what would be ambiguous or overwrite itself."""
    folder = arguments.output_dir
    if arguments.references is not None and arguments.format != "text" and folder is None:
        raise UsageError(f"--references prints a report; --format {arguments.format} beside it needs --output-dir")
    if folder is None and arguments.format in ("srt", "vtt") and len(found) > 1:
        raise UsageError(f"--format {arguments.format}: {len(found)} recordings need --output-dir, one file for each")
    owners: dict[Path, str] = {}
    tasks = []
    for recording, relative in found:
        audio_path = recording.source if isinstance(recording, Recording) else None
        output_path = None if folder is None else folder / relative.with_suffix(SUFFIXES[arguments.format])
        if output_path is not None and isinstance(recording, Recording):
            other = owners.setdefault(output_path, recording.name)
            if other is not recording.name:
                raise UsageError(f"--output-dir: {other} and {recording.name} would both be written to {output_path}")
        tasks.append(Task(recording, output_path, audio_path if isinstance(audio_path, Path) else None))
    return tasks


def _show_audio_s(bar: tqdm) -> Callable[[float], None]:
    """What tells the progress bar how much audio is done: a single long file is one step of it."""
    done_s = 0.0

    def on_piece(duration_s: float) -> None:
        nonlocal done_s
        done_s += duration_s
        bar.set_postfix_str(f"{done_s / 60:.1f} min of audio")

    return on_piece


def _results(
    recognizer: Recognizer, tasks: list[Task], on_piece: Callable[[float], None]
) -> Iterator[tuple[Task, Transcript | FailedRecording]]:
    """One result per task, in order; an interruption says how many there were."""
    recordings = (task.recording for task in tasks if isinstance(task.recording, Recording))
    transcripts = transcribe(recognizer, recordings, on_piece)
    for number, task in enumerate(tasks):
        try:
            result = next(transcripts) if isinstance(task.recording, Recording) else task.recording
        except KeyboardInterrupt:
            kept = f"; the transcripts of {number} of {len(tasks)} recordings are complete, the next one has none"
            raise KeyboardInterrupt(kept) from None
        yield task, result


def _write_file(path: Path, content: str, transcript: Transcript) -> Transcript | FailedRecording:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        return FailedRecording(transcript.name, f"{transcript.name}: cannot write {path} ({one_line(error)})")
    return transcript


def _report_failure(failure: FailedRecording) -> None:
    _write(sys.stderr, f"speechllm: error: {failure.message}\n")


def _write(stream: TextIO, content: str) -> None:
    # tqdm lifts a progress bar out of the way.
    tqdm.write(content, file=stream, end="")
    stream.flush()


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        return parse_json_object(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
