"""Recognisers in one table: the default model in each of its modes beside models of others, on the same recordings.

    OMP_NUM_THREADS=1 python -m benchmarks.systems data/real/asterisk_2s.jsonl --output build/systems

Each system decodes in a process of its own with one CPU thread, through `training.evaluate_asr`, so that its peak
memory is its own. A run that was interrupted goes on where it stopped when the command is given again, and a system
that is done is not decoded again. Prints a Markdown table and writes OUTPUT/systems.jsonl, one line per system.

WER, substitutions, deletions and insertions are in percent of the reference words after Whisper's English normaliser;
intervals are those of a bootstrap over utterances, differences to the first system are paired. *RTFx*: seconds of audio
per second of CPU time, which other programs disturb less than the clock; loading the model is not in it. *peak MiB*:
largest resident set of the process, model and interpreter included. *loops*: utterances in which up to 8 words are
said three times in a row or more, and more often than they were. *hallucinated*: utterances with a loop, or with at
least three inserted words in a row, or with words where nothing was said.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_speechllm.metrics import PairedDifference, paired_bootstrap
from training.command_line import errors_in_one_line
from training.decoding_run import Cost, manifest_path, run_path
from training.evaluate_asr import score
from training.evaluation_data import UsageError, read_json_lines
from training.html_report import SystemReport
from training.leaderboard import leaderboard_normalizer
from training.scoring import counts

HEADER = """\
| system | WER % (95 % interval) | beyond {baseline} | sub | del | ins | loops | hallucinated | RTFx | peak MiB |
|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""


@dataclass(frozen=True)
class System:
    """A recogniser and how it decodes.

    Attributes:
        name: In files and on the command line.
        title: In the table.
        mode: As `evaluate_asr --mode`; "default" for models of others, which have no modes.
        options: Of `generate`.
        model: As `evaluate_asr --model`; None: the default model, or that of the command line.
    """

    name: str
    title: str
    mode: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None


# Without CTC the speech LLM may go on for ever: 80 tokens are more than half a minute of speech.
SYSTEMS = {
    system.name: system
    for system in (
        System("joint", "speech LLM and CTC jointly", "joint"),
        System("llm", "speech LLM alone, greedy", "llm", {"num_beams": 1, "max_new_tokens": 80}),
        System("ctc_greedy", "CTC head alone, greedy", "ctc_greedy"),
        System("ctc_beam", "CTC head alone, beam search", "ctc_beam"),
        System("rescoring", "CTC N-best list, rescored by the plain LLM", "rescoring"),
        System("label_fusion", "CTC with the plain LLM, label by label", "label_fusion"),
        System("delayed_fusion", "CTC with the plain LLM, delayed fusion", "delayed_fusion"),
        System("whisper-tiny.en", "Whisper tiny.en, greedy", model="base:whisper-tiny.en"),
        System("moonshine-tiny", "Moonshine tiny, greedy", model="base:moonshine-tiny"),
    )
}


@dataclass(frozen=True)
class Settings:
    """What all systems of a run have in common.

    Attributes:
        data: Manifest.
        output: Folder of hypotheses and results.
        model: Of the systems that name none; None: the default model.
        limit: Use only the first utterances.
        batch_size: Utterances per forward pass.
        jobs: Systems that decode at the same time.
    """

    data: Path
    output: Path
    model: str | None = None
    limit: int | None = None
    batch_size: int = 8
    jobs: int = 1


@dataclass(frozen=True)
class Result:
    """Figures of a system, and how they differ from those of the first one (None: it is the first)."""

    system: System
    report: SystemReport
    difference: PairedDifference | None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    with errors_in_one_line("systems"):
        systems = choose(arguments.system or list(SYSTEMS), arguments.generate)
        settings = Settings(
            arguments.data, arguments.output, arguments.model, arguments.limit, arguments.batch_size, arguments.jobs
        )
        results = compare(systems, decode(systems, settings))
    write_results(results, settings)
    print(table(results, settings))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="JSONL manifest with audio_filepath and text")
    add("--output", type=Path, default=Path("build/systems"), help="folder of the hypotheses (default: build/systems)")
    add(
        "--system",
        action="append",
        choices=SYSTEMS,
        metavar="SYSTEM",
        help=f"{', '.join(SYSTEMS)}; repeatable, the others are compared with the first one (default: all)",
    )
    add(
        "--generate",
        action="append",
        default=[],
        metavar="SYSTEM=JSON",
        help="further options of generate for a system, repeatable: 'rescoring={\"lm_weight\": 0.4}'",
    )
    add("--model", help="of the modes: folder, Hub id or base:NAME (default: the model of this package)")
    add("--limit", type=int, metavar="N", help="use only the first utterances (default: all)")
    add("--batch-size", type=int, default=8, help="utterances of similar length per batch (default: 8)")
    add("--jobs", type=int, default=1, help="systems that decode at the same time, which costs speed (default: 1)")
    return parser


def choose(names: Sequence[str], options: Sequence[str]) -> list[System]:
    """The systems of these names, with further options of the form `NAME=JSON`.

    Raises:
        UsageError: options of another form, or of a system that is not among them.
    """
    chosen = {name: SYSTEMS[name] for name in names}
    for text in options:
        name, _, content = text.partition("=")
        try:
            further = json.loads(content)
        except json.JSONDecodeError:
            further = None
        if name not in chosen or not isinstance(further, dict):
            raise UsageError(f"--generate: expected SYSTEM=JSON object, SYSTEM of {', '.join(chosen)}, got {text!r}")
        system = chosen[name]
        chosen[name] = System(name, system.title, system.mode, {**system.options, **further}, system.model)
    return list(chosen.values())


def decode(systems: Sequence[System], settings: Settings) -> list[SystemReport]:
    """Decode with every system, each in a process of its own, and score what they wrote.

    Raises:
        UsageError: a process failed; what it said about it is on standard error.
    """
    if settings.jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, got {settings.jobs}")
    settings.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(settings.jobs) as pool:
        waiting = [pool.submit(run_module, "training.evaluate_asr", command(each, settings)) for each in systems]
        try:
            for future in as_completed(waiting):
                future.result()
        except BaseException:  # an interruption too: what has not begun is not to begin
            pool.shutdown(cancel_futures=True)
            raise
    return [read_report(system, settings.output) for system in systems]


def command(system: System, settings: Settings) -> list[str]:
    """Arguments of `training.evaluate_asr` for a system."""
    model = system.model or settings.model
    parts = [str(settings.data), "--mode", system.mode, "--device", "cpu", "--batch-size", str(settings.batch_size)]
    parts += ["--output", str(settings.output / system.name), "--generate", json.dumps(dict(system.options))]
    parts += [] if model is None else ["--model", model]
    parts += [] if settings.limit is None else ["--limit", str(settings.limit)]
    return parts


def run_module(module: str, arguments: Sequence[str]) -> str:
    """Standard output of `python -m module`, with one CPU thread; its standard error is ours.

    Raises:
        UsageError: it failed.
    """
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=one_thread, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UsageError(f"python -m {module} {' '.join(arguments)}: failed with status {done.returncode}")
    return done.stdout


def read_report(system: System, output: Path) -> SystemReport:
    """Figures of what a process left in the folder `output`."""
    prefix = output / f"{system.name}.{system.mode}"
    rows = list(read_json_lines(manifest_path(prefix), ("text", "pred_text", "duration", "time")))
    run = json.loads(run_path(prefix).read_text())
    cost = Cost(run["peak_memory_mib"], run["cpu_s"])
    return score(system.name, rows, leaderboard_normalizer(None), cost)


def compare(systems: Sequence[System], reports: Sequence[SystemReport]) -> list[Result]:
    """Every system beside the first one, on the same utterances."""
    first_errors, words = counts(reports[0].score.whisper)
    if not words.sum():
        raise UsageError("DATA: expected at least one reference with words")
    differences = [
        paired_bootstrap(first_errors, counts(report.score.whisper)[0], words) if report is not reports[0] else None
        for report in reports
    ]
    return [Result(*parts) for parts in zip(systems, reports, differences, strict=True)]


def table(results: Sequence[Result], settings: Settings) -> str:
    """The figures in Markdown."""
    figures = results[0].report.figures
    beside = f", {settings.jobs} systems at a time" if settings.jobs > 1 else ""
    about = (
        f"{settings.data.stem}: {figures['utterances']} utterances, {figures['duration_min']:.1f} min, "
        f"{figures['reference_words']} words; batches of {settings.batch_size}, one CPU thread each{beside}\n"
    )
    return "\n".join([about, HEADER.format(baseline=results[0].system.name), *map(row, results)])


def row(result: Result) -> str:
    """A line of the table."""
    figures, difference = result.report.figures, result.difference
    beyond = ""
    if difference is not None:
        percent = (100 * difference.difference, 100 * difference.low, 100 * difference.high)
        beyond = "{:+.1f} ({:+.1f} to {:+.1f})".format(*percent)
    cells = [
        result.system.title,
        f"{figures['wer']:.1f} ({figures['wer_low']:.1f} to {figures['wer_high']:.1f})",
        beyond,
        *(f"{figures[name]:.1f}" for name in ("substitutions", "deletions", "insertions")),
        f"{figures['loops']}",
        f"{figures['hallucinations']}",
        f"{figures['rtfx_cpu']:.1f}",
        f"{figures['peak_memory_mib']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_results(results: Sequence[Result], settings: Settings) -> None:
    """OUTPUT/systems.jsonl: the fields of `evaluate_asr --results`, and the differences."""
    lines = []
    for result in results:
        system, difference = result.system, result.difference
        entry = {
            "dataset": settings.data.stem,
            "system": system.name,
            "model": system.model or settings.model,
            "mode": system.mode,
            "options": dict(system.options),
            **result.report.figures,
            "batch_size": settings.batch_size,
            "jobs": settings.jobs,
            "wer_beyond_first": None if difference is None else 100 * difference.difference,
            "wer_beyond_first_low": None if difference is None else 100 * difference.low,
            "wer_beyond_first_high": None if difference is None else 100 * difference.high,
            "p_value": None if difference is None else difference.p_value,
        }
        lines.append(json.dumps(entry) + "\n")
    (settings.output / "systems.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
