"""Recordings of half an hour against the same prompts one by one: errors, memory and segments by length.

    OMP_NUM_THREADS=1 python -m benchmarks.long_audio data/real/asterisk_2s.jsonl --minutes 2 10 30

A file is made of the prompts of the manifest in their order, again from the first where they do not suffice, with
silence between them and exactly as long as asked. It goes the way of a user's file (`speechllm transcribe`): decoded
block by block, cut at pauses, recognised piece by piece; each file in a process of its own with one CPU thread. The
prompts alone are decoded by `training.evaluate_asr`, with the settings of benchmarks/systems.py, whose --output serves
here too; a run that was interrupted goes on there.

*WER*: of all words of the file in one alignment, percent, after Whisper's English normaliser; of the prompts likewise,
their texts put together in the order of the file. *cuts in prompts*: pieces that begin within a prompt. *RTFx*: seconds
of audio per second of CPU time. *peak MiB*: largest resident set of the process.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from benchmarks.systems import SYSTEMS, Settings, command, run_module
from hf_speechllm.audio import SAMPLING_RATE
from hf_speechllm.metrics import normalize_english, word_errors
from hf_speechllm.transcription import FailedRecording, Recognizer, Recording, transcribe
from training.command_line import errors_in_one_line
from training.decoding_run import manifest_path, peak_memory_mib
from training.evaluation_data import UsageError, Utterance, read_json_lines, read_manifest
from training.recognisers import load_pipeline, mode_options

HEADER = """\
| minutes | prompts | pieces | cuts in prompts | WER % | WER % prompt by prompt | difference | peak MiB | RTFx |
|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""
MODES = tuple(name for name, system in SYSTEMS.items() if system.model is None)


@dataclass(frozen=True)
class Placed:
    """A prompt in a file: its number in the manifest, and the samples that it takes, `end` excluded."""

    index: int
    start: int
    end: int


@dataclass(frozen=True)
class Transcribed:
    """What became of a file: seconds at which its pieces begin, the text of each, and what that took."""

    starts_s: tuple[float, ...]
    texts: tuple[str, ...]
    cpu_s: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Row:
    """Figures of a file of so many minutes; error rates in percent."""

    minutes: float
    prompts: int
    pieces: int
    cuts_in_prompts: int
    wer: float
    wer_of_prompts: float
    peak_memory_mib: float
    rtfx: float


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    with errors_in_one_line("long_audio"):
        if arguments.transcribe is not None:
            print(json.dumps(asdict(transcribe_file(arguments.transcribe, arguments))))
            return
        measure(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="JSONL manifest with audio_filepath and text")
    add("--minutes", type=float, nargs="+", default=[2, 10, 30], help="lengths of the files (default: 2 10 30)")
    add("--pause-s", type=float, default=1.0, help="seconds of silence between prompts (default: 1)")
    add("--mode", choices=MODES, default="joint", help="how to decode (default: joint); ctc_greedy is the fastest")
    add("--piece-s", type=float, help="longest piece in seconds (default: what the model says)")
    add("--model", help="folder, Hub id or base:NAME (default: the model of this package)")
    add("--output", type=Path, default=Path("build/long_audio"), help="folder of texts (default: build/long_audio)")
    add("--transcribe", type=Path, metavar="FILE", help="transcribe this file here and print JSON")
    return parser


def measure(arguments: argparse.Namespace) -> None:
    """Make the files, decode them and the prompts, print the table and write OUTPUT/long_audio.MODE.jsonl."""
    if not min(arguments.minutes) > 0:
        raise UsageError(f"--minutes: expected more than 0, got {min(arguments.minutes)}")
    if not 0 <= arguments.pause_s < math.inf:
        raise UsageError(f"--pause-s: expected 0 or more, got {arguments.pause_s}")
    utterances = read_manifest(arguments.data)
    plans = [place(utterances, minutes, arguments.pause_s) for minutes in arguments.minutes]
    needed = 1 + max(placed.index for plan in plans for placed in plan)
    texts = prompt_texts(arguments, None if needed == len(utterances) else needed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for minutes, plan in zip(arguments.minutes, plans, strict=True):
            path = Path(folder) / f"{minutes:g}min.flac"
            write_flac(path, utterances, plan, minutes)
            options = [part for name in ("mode", "piece_s", "model") for part in option(arguments, name)]
            output = run_module("benchmarks.long_audio", [str(arguments.data), "--transcribe", str(path), *options])
            transcribed = Transcribed(**json.loads(output))
            rows.append(score(minutes, plan, [utterance.entry["text"] for utterance in utterances], texts, transcribed))
            keep(arguments, minutes, rows[-1], transcribed)
    print(table(arguments, rows))


def option(arguments: argparse.Namespace, name: str) -> list[str]:
    """An option of this command line as arguments; none if it was not given."""
    value = getattr(arguments, name)
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def place(utterances: Sequence[Utterance], minutes: float, pause_s: float) -> list[Placed]:
    """Where the prompts go: one after the other behind a pause each, as long as a whole one and a pause fit.

    Raises:
        UsageError: not one fits.
    """
    total, pause = num_samples(60 * minutes), num_samples(pause_s)
    plan: list[Placed] = []
    end = 0
    while True:
        index = len(plan) % len(utterances)
        start = end + pause
        end = start + num_samples(utterances[index].entry["duration"])
        if end + pause > total:
            break
        plan.append(Placed(index, start, end))
    if not plan:
        raise UsageError(f"--minutes: expected room for the first prompt, got {minutes}")
    return plan


def num_samples(seconds: float) -> int:
    """How many samples are so long."""
    return round(seconds * SAMPLING_RATE)


def write_flac(path: Path, utterances: Sequence[Utterance], plan: Sequence[Placed], minutes: float) -> None:
    """A file of 16 bit with the prompts at their places and silence everywhere else."""
    position = 0
    with sf.SoundFile(path, "w", SAMPLING_RATE, 1, "PCM_16") as file:
        for placed in plan:
            waveform = np.zeros(placed.end - position, np.float32)  # the silence before it, and the prompt
            samples = utterances[placed.index].waveform(SAMPLING_RATE)[: placed.end - placed.start]
            waveform[placed.start - position :][: len(samples)] = samples
            file.write(waveform)
            position = placed.end
        file.write(np.zeros(num_samples(60 * minutes) - position, np.float32))


def prompt_texts(arguments: argparse.Namespace, count: int | None) -> list[str]:
    """What is recognised in the first prompts, each a recording of its own; None: in all of them."""
    system = SYSTEMS[arguments.mode]
    # Of a part of the prompts in a folder of its own: it would replace the texts of all of them.
    output = arguments.output if count is None else arguments.output / f"first-{count}"
    settings = Settings(arguments.data, output, arguments.model, limit=count)
    output.mkdir(parents=True, exist_ok=True)
    run_module("training.evaluate_asr", command(system, settings))
    prefix = output / f"{system.name}.{system.mode}"
    return [row["pred_text"] for row in read_json_lines(manifest_path(prefix), ("pred_text",))]


def transcribe_file(path: Path, arguments: argparse.Namespace) -> Transcribed:
    """Transcribe a file in this process, as `speechllm transcribe` does.

    Raises:
        UsageError: it cannot be transcribed.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    system = SYSTEMS[arguments.mode]
    pipe = load_pipeline(arguments.model, "cpu")
    recognizer = Recognizer(
        pipe,
        pipe.feature_extractor.sampling_rate,
        max_duration_s=pipe.model.config.max_audio_duration_s if arguments.piece_s is None else arguments.piece_s,
        generate_kwargs=mode_options(pipe, system.mode, dict(system.options)),
    )
    start_s = time.process_time()
    with tqdm(total=round(sf.info(path).duration), unit="s of audio", desc=path.stem, disable=None) as bar:
        (result,) = transcribe(recognizer, [Recording(path.name, path)], lambda seconds: bar.update(round(seconds)))
    if isinstance(result, FailedRecording):
        raise UsageError(result.message)
    return Transcribed(
        tuple(segment.start_s for segment in result.segments),
        tuple(segment.text for segment in result.segments),
        time.process_time() - start_s,
        peak_memory_mib(pipe),
    )


def score(
    minutes: float, plan: Sequence[Placed], references: Sequence[str], prompts: Sequence[str], whole: Transcribed
) -> Row:
    """Figures of a file.

    Args:
        minutes: Length of the file.
        plan: What is in it.
        references: Text of each prompt.
        prompts: What was recognised in each alone.
        whole: What was recognised in the file.
    """
    reference = " ".join(references[placed.index] for placed in plan)
    one_by_one = " ".join(prompts[placed.index] for placed in plan)
    cuts = [num_samples(start_s) for start_s in whole.starts_s]
    return Row(
        minutes,
        prompts=len(plan),
        pieces=len(whole.texts),
        cuts_in_prompts=sum(any(placed.start < cut < placed.end for placed in plan) for cut in cuts),
        wer=wer_percent(reference, " ".join(whole.texts)),
        wer_of_prompts=wer_percent(reference, one_by_one),
        peak_memory_mib=whole.peak_memory_mib,
        rtfx=60 * minutes / max(whole.cpu_s, 1e-9),
    )


def wer_percent(reference: str, hypothesis: str) -> float:
    """Word error rate of a whole text."""
    return 100 * word_errors([reference], [hypothesis], normalize_english).wer


def keep(arguments: argparse.Namespace, minutes: float, row: Row, transcribed: Transcribed) -> None:
    """Append to OUTPUT/long_audio.jsonl: figures, and the pieces with their texts."""
    entry = {
        "dataset": arguments.data.stem,
        "mode": arguments.mode,
        "model": arguments.model,
        "pause_s": arguments.pause_s,
        "piece_s": arguments.piece_s,
        **asdict(row),
        **asdict(transcribed),
    }
    with (arguments.output / "long_audio.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def table(arguments: argparse.Namespace, rows: Sequence[Row]) -> str:
    """The figures in Markdown."""
    lines = [f"{arguments.data.stem}, {arguments.mode}, pauses of {arguments.pause_s:g} s, one CPU thread\n", HEADER]
    lines += [
        f"| {row.minutes:g} | {row.prompts} | {row.pieces} | {row.cuts_in_prompts} | {row.wer:.2f} | "
        f"{row.wer_of_prompts:.2f} | {row.wer - row.wer_of_prompts:+.2f} | {row.peak_memory_mib:.0f} | {row.rtfx:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
