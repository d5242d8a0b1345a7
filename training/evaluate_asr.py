"""Error rates and speed of speech recognisers on a data set, in one or several decoding modes.

    python -m training.evaluate_asr DATA --model MODEL --mode ctc_greedy --mode llm --mode joint
    accelerate launch --multi_gpu -m training.evaluate_asr DATA ... --output hypotheses/run
    torchrun --nproc-per-node 4 -m training.evaluate_asr DATA ... --output hypotheses/run

DATA is a JSONL manifest (audio_filepath relative to it, text, optionally duration and offset in seconds; empty texts
for silence and noise), the name of a set of the Open ASR Leaderboard (see below), or PATH:CONFIGURATION:SPLIT for any
other data set of the Hub or a local folder (PATH::SPLIT without a configuration); these are streamed.

MODEL is a Hub id, a folder, a folder of trained parts (a checkpoint of training/train.py), `base:NAME` (for example
base:whisper-tiny.en, base:moonshine-tiny), or nothing for the default model. Models of others have no modes, and are
decoded greedily.

With --output or --leaderboard-dir a run that was interrupted goes on where it stopped when the command is given again,
and a finished one is not repeated. Several modes, and the systems of --compare, are compared with the first mode on the
same utterances (paired bootstrap).

Exit status: 0 all recordings counted; 1 some could not be read and are left out (one line each on standard error);
2 wrong usage, or none could be read.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_speechllm
from hf_speechllm.assembly import resolve_model
from hf_speechllm.metrics import Normalizer, paired_bootstrap
from hf_speechllm.transcription import DECODING_MODES, DTYPES, describe_modes
from training.command_line import (
    add_device,
    check_at_least_one,
    check_folder,
    errors_in_one_line,
    json_object,
    make_parent,
)
from training.decoding_run import (
    JOURNAL_FORMAT,
    Cost,
    Process,
    decode,
    discard,
    failures,
    finished,
    manifest_path,
    merge,
    start_process,
)
from training.evaluation_data import UsageError, Utterance, batches, read_json_lines, read_manifest, stream_dataset
from training.html_report import SystemReport, html_report
from training.leaderboard import DATASETS, is_scored, leaderboard_normalizer, manifest_name
from training.recognisers import Recogniser, default_mode, load_pipeline, merge_adapter, mode_options
from training.scoring import counts, score_system

_EPILOG = f"""\
modes of speech LLMs:
{describe_modes()}

columns, in percent of the reference words where nothing else is said:
  WER             substitutions, deletions and insertions, after Whisper's English text normaliser
  95 % interval   of the WER, by bootstrap over utterances
  lb WER          by the rules of the Open ASR Leaderboard
  CER             as WER, of characters
  sub, del, ins   the errors of the WER by kind: words replaced, left out, added
  halluc          utterances with invented words: three in a row that nobody said, a loop, any where nothing was said
  MiB             peak memory of the process, on a GPU that of its tensors
  RTFx            seconds of audio per second on the clock, without loading and warm-up

sets of the leaderboard:
  {", ".join(DATASETS)}"""
STREAM_WINDOW_BATCHES = 64  # of a streamed data set, sorted by length together
SCORED_FIELDS = ("text", "pred_text", "duration", "time")

COLUMNS = (
    f"{'mode':<12} {'WER':>6}  {'95 % interval':>14} {'lb WER':>6} {'CER':>6} {'sub':>6} {'del':>6} {'ins':>6} "
    f"{'halluc':>6} {'MiB':>6} {'RTFx':>7}"
)


@dataclass(frozen=True)
class Data:
    """A data set: `identity` tells runs on it from runs on others; `utterances` is None for a stream.

    `failures` has a line about each recording of a manifest that cannot be read.
    """

    name: str
    identity: str
    source: tuple[str, str | None, str]
    utterances: list[Utterance] | None
    failures: tuple[str, ...] = ()


def main() -> None:
    """Command line."""
    arguments = build_parser().parse_args()
    transformers.logging.set_verbosity_error()  # Whisper and Moonshine would be commented on in every batch
    transformers.logging.disable_progress_bar()
    with errors_in_one_line("evaluate_asr"):
        failed = evaluate(arguments)
    if failed:
        sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="JSONL manifest, set of the leaderboard, or PATH:CONFIGURATION:SPLIT")
    add("--model", help="see above (default: the model of this package)")
    add(
        "--mode",
        action="append",
        metavar="MODE",
        help=f"how a speech LLM decodes, repeatable: {', '.join(DECODING_MODES)} (default: joint, or llm where the "
        "model has no ctc_weight; see below)",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="utterances of similar length per batch (default: 8)")
    add_device(parser)
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="type of the weights (default: %(default)s, what the model was saved in)",
    )
    add(
        "--merge-adapter",
        action="store_true",
        help="add the LoRA of a speech LLM to its weights, which is faster; for joint and llm (default: beside them)",
    )
    add("--limit", type=int, metavar="N", help="use only the first utterances (default: all)")
    add(
        "--generate",
        default="{}",
        metavar="JSON",
        help="further options of generate, such as '{\"num_beams\": 4}' (default: {})",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--output", type=Path, help="write hypotheses as JSONL, one file per mode: OUTPUT.MODE.jsonl (default: nowhere)"
    )
    place.add_argument(
        "--leaderboard-dir", type=Path, metavar="FOLDER", help="write them there under the leaderboard's file name"
    )
    add("--overwrite", action="store_true", help="forget what an earlier run wrote there, and decode again")
    add("--results", type=Path, metavar="JSONL", help="append the figures to this file, for training.model_card")
    add("--name", help="of the data set in --results (default: that of the manifest)")
    add("--system", help="name of the model in --leaderboard-dir, --results and --report (default: that of --model)")
    add(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="JSONL",
        help="manifest with pred_text of another system, repeatable",
    )
    add("--report", type=Path, metavar="HTML", help="write a page about the errors")
    add("--report-utterances", type=int, default=200, metavar="N", help="on that page, worst first (default: 200)")
    add("--embed-audio", action="store_true", help="put the audio into the page instead of referring to the files")
    add(
        "--leaderboard-repository",
        type=Path,
        metavar="CLONE",
        help="of the leaderboard's code, to use its own text normaliser (default: the rules known here)",
    )
    return parser


def evaluate(arguments: argparse.Namespace) -> int:
    """Decode and report. UsageError for what the user has to change.

    Returns:
        The number of recordings that could not be read; in the first process.
    """
    check(arguments)
    extra = json_object("--generate", arguments.generate)
    process = start_process()
    normalize = leaderboard_normalizer(arguments.leaderboard_repository)
    data = open_data(arguments, normalize)
    device = arguments.device
    if device == "cuda" and process.count > 1:
        device = f"cuda:{process.rank % torch.cuda.device_count()}"
    pipe = load_pipeline(arguments.model, device, dtype=arguments.dtype)
    modes = list(dict.fromkeys(arguments.mode or [default_mode(pipe, extra)]))
    options = {mode: mode_options(pipe, mode, extra) for mode in modes}  # all are checked before the first is decoded
    if arguments.merge_adapter:
        merge_adapter(pipe, modes)
    if arguments.leaderboard_dir is not None and len(modes) > 1:
        raise UsageError(f"--leaderboard-dir: takes one --mode, got {', '.join(modes)}")
    system = arguments.system or (arguments.model or "hf_speechllm/default").removeprefix("base:")
    reports: list[SystemReport] = []
    rows: list[dict[str, Any]] = []
    failed = dict.fromkeys(data.failures)
    with tempfile.TemporaryDirectory() as scratch:
        for mode in modes:
            prefix = output_prefix(arguments, mode, data, system) or Path(scratch) / mode
            recogniser = Recogniser(pipe, options[mode])
            rows, cost = recognise(arguments, recogniser, data, mode, prefix, process)
            if process.rank == 0:
                failed |= dict.fromkeys(failures(prefix))
                if not rows:
                    raise UsageError(f"{data.name}: none of its recordings can be read; the last: {[*failed][-1]}")
                report = score(f"{system} {mode}", rows, normalize, cost)
                show(arguments, data, system, mode, options[mode], report, is_first=not reports)
                reports.append(report)
    if process.rank == 0:
        reports += [score_other(path, rows, normalize) for path in arguments.compare]
        notes = [note for other in reports[1:] if (note := comparison(reports[0], other))]
        print("\n".join(notes), end="\n" if notes else "")
        if arguments.report is not None:
            write_report(arguments, data, rows, reports, notes)
        for failure in failed:
            print(f"evaluate_asr: error: {failure}", file=sys.stderr)
    return len(failed)


def check(arguments: argparse.Namespace) -> None:
    """Refuse before anything is loaded what is out of range, cannot be read or cannot be written."""
    check_at_least_one(arguments, "batch_size", "limit", "report_utterances")
    for path in arguments.compare:
        try:
            list(read_json_lines(path, SCORED_FIELDS))
        except UsageError as error:
            raise UsageError(f"--compare: {error}") from None
    for name in ("results", "report"):
        if getattr(arguments, name) is not None:
            make_parent(f"--{name}", getattr(arguments, name))
    if arguments.output is not None:
        check_folder("--output", arguments.output.parent)
    if arguments.leaderboard_dir is not None:
        check_folder("--leaderboard-dir", arguments.leaderboard_dir)


def open_data(arguments: argparse.Namespace, normalize: Normalizer) -> Data:
    """The data set of the command line; a stream is opened later."""
    name, path = arguments.data, Path(arguments.data)
    if name not in DATASETS and (path.suffix in (".jsonl", ".json") or path.exists() or name.count(":") != 2):
        if not path.is_file():
            is_what = "a folder" if path.is_dir() else "no such file"
            raise UsageError(
                f"{name}: {is_what}; expected a JSONL manifest, PATH:CONFIGURATION:SPLIT or one of "
                f"{', '.join(DATASETS)}"
            )
        failed: list[str] = []
        utterances = read_manifest(path, arguments.limit, failed.append)
        digest = hashlib.sha256(json.dumps([utterance.entry for utterance in utterances]).encode()).hexdigest()
        return Data(arguments.name or path.stem, digest, (path.stem, None, "test"), utterances, tuple(failed))
    if arguments.embed_audio:
        raise UsageError("--embed-audio: needs a manifest; a streamed data set is not kept")
    source: tuple[str, str | None, str]
    if name in DATASETS:
        source = DATASETS[name]
    else:
        folder, configuration, split = name.split(":")
        source = (folder, configuration or None, split)
    return Data(arguments.name or name, f"{source} limit {arguments.limit}", source, None)


def output_prefix(arguments: argparse.Namespace, mode: str, data: Data, system: str) -> Path | None:
    """Path of the hypotheses without `.jsonl`; None if they are not to be kept."""
    if arguments.leaderboard_dir is not None:
        return arguments.leaderboard_dir / manifest_name(system, *data.source).removesuffix(".jsonl")
    if arguments.output is not None:
        return arguments.output.with_name(f"{arguments.output.name}.{mode}")
    return None


def recognise(
    arguments: argparse.Namespace, recogniser: Recogniser, data: Data, mode: str, prefix: Path, process: Process
) -> tuple[list[dict[str, Any]], Cost | None]:
    """Rows of the manifest and what they took, in the first process; decodes only what is not there yet."""
    if process.count > 1 and arguments.output is None and arguments.leaderboard_dir is None:
        raise UsageError("--output or --leaderboard-dir is needed with several processes: they meet in these files")
    description = {
        "model": arguments.model,
        "weights": weights_stamp(arguments.model),
        "mode": mode,
        "options": recogniser.options,
        "data": data.identity,
        "batch_size": arguments.batch_size,
        "device": torch.device(arguments.device).type,
        "dtype": arguments.dtype,
        "merge_adapter": arguments.merge_adapter,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "format": JOURNAL_FORMAT,
    }
    if arguments.overwrite and process.rank == 0:
        discard(prefix)
    process.largest(0.0)
    cost = finished(prefix, description)
    total = None if data.utterances is None else len(data.utterances)
    if cost is not None:
        rows = list(read_json_lines(manifest_path(prefix), SCORED_FIELDS))
        if process.rank == 0:
            print(f"{manifest_path(prefix)}: of this very run, not decoded again (--overwrite does)", file=sys.stderr)
        return rows, cost
    window = None if data.utterances is not None else STREAM_WINDOW_BATCHES * arguments.batch_size
    stream = batches(iter_utterances(arguments, data), arguments.batch_size, window)
    decode(recogniser, stream, prefix, description, process, total)
    process.largest(0.0)  # all journals are complete
    rows, cost = merge(prefix, description, total) if process.rank == 0 else ([], None)
    process.largest(0.0)
    return rows, cost


def iter_utterances(arguments: argparse.Namespace, data: Data) -> Iterator[Utterance]:
    """Utterances of a manifest or a stream; of a stream those that the leaderboard scores."""
    if data.utterances is not None:
        return iter(data.utterances)
    normalize = leaderboard_normalizer(arguments.leaderboard_repository)
    return stream_dataset(*data.source, lambda text: is_scored(normalize(text)), arguments.limit)


def weights_stamp(model: str | None) -> str | None:
    """Changes when the files of a local model do, so that results of other weights are not taken for its own."""
    folder = Path(hf_speechllm.default_model() if model is None else resolve_model(model))
    if not folder.is_dir():
        return None
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def score(name: str, rows: list[dict[str, Any]], normalize: Normalizer, cost: Cost | None) -> SystemReport:
    """Figures of one system from the rows of its manifest.

    Beyond those of `score_system`: `duration_min`; `rtfx`, seconds of audio per second on the clock; `rtfx_cpu`, per
    second of CPU time; `peak_memory_mib`. The last two are None where nobody knows what the run took.
    """
    system_score = score_system([row["text"] for row in rows], [row["pred_text"] for row in rows], normalize)
    duration_s = sum(row["duration"] for row in rows)
    figures = {
        **system_score.figures,
        "rtfx": duration_s / max(sum(row["time"] for row in rows), 1e-9),
        "rtfx_cpu": None if cost is None else duration_s / max(cost.cpu_s, 1e-9),
        "duration_min": duration_s / 60,
        "peak_memory_mib": None if cost is None else cost.peak_memory_mib,
    }
    return SystemReport(name, system_score, figures)


def score_other(path: Path, rows: list[dict[str, Any]], normalize: Normalizer) -> SystemReport:
    """Figures of a manifest of --compare, which must have the same references in the same order."""
    others = list(read_json_lines(path, SCORED_FIELDS))
    if [row["text"] for row in others] != [row["text"] for row in rows]:
        raise UsageError(
            f"--compare: {path}: expected the same {len(rows)} references in the same order, got {len(others)} "
            "utterances, or other texts; decode the same DATA with the same --limit"
        )
    return score(path.stem, others, normalize, None)


def show(
    arguments: argparse.Namespace,
    data: Data,
    system: str,
    mode: str,
    options: dict[str, Any],
    report: SystemReport,
    is_first: bool,
) -> None:
    """Print the figures of a mode and append them to --results."""
    figures = report.figures
    if is_first:
        print(
            f"{data.name}: {figures['utterances']} utterances, {figures['duration_min']:.1f} min; percent, Whisper "
            "normaliser; lb: by the leaderboard's rules"
        )
        print(COLUMNS)
    cells = {name: "-" if value is None else f"{value:.2f}" for name, value in figures.items()}
    interval = f"[{cells['wer_low']:>5}, {cells['wer_high']:>5}]"
    print(
        f"{mode:<12} {cells['wer']:>6}  {interval:>14} {cells['leaderboard_wer']:>6} {cells['cer']:>6} "
        f"{cells['substitutions']:>6} {cells['deletions']:>6} {cells['insertions']:>6} {figures['hallucinations']:>6} "
        f"{figures['peak_memory_mib']:>6.0f} {figures['rtfx']:>7.1f}",
        flush=True,
    )
    if arguments.results is not None:
        row = {"dataset": data.name, "system": system, "mode": mode, "options": options, **figures}
        with open(arguments.results, "a") as file:
            file.write(json.dumps(row) + "\n")


def comparison(first: SystemReport, other: SystemReport) -> str | None:
    """One line: how the WER of another system differs from the first's; None without reference words."""
    first_errors, words = counts(first.score.whisper)
    if not words.sum():
        return None
    result = paired_bootstrap(first_errors, counts(other.score.whisper)[0], words)
    return (
        f"{other.name} against {first.name}: WER {100 * result.difference:+.2f} points, 95 % interval "
        f"[{100 * result.low:+.2f}, {100 * result.high:+.2f}], p = {result.p_value:.3f} (paired bootstrap)"
    )


def write_report(
    arguments: argparse.Namespace,
    data: Data,
    rows: list[dict[str, Any]],
    reports: list[SystemReport],
    notes: list[str],
) -> None:
    """Write the page of --report."""
    utterances = [Utterance(index, row, b"") for index, row in enumerate(rows)]
    if data.utterances is not None:
        read = {(row["audio_filepath"], row.get("offset")) for row in rows}
        entries = ((utterance, utterance.entry) for utterance in data.utterances)
        utterances = [each for each, entry in entries if (entry["audio_filepath"], entry.get("offset")) in read]
    page = html_report(
        f"Speech recognition of {data.name}",
        utterances,
        reports,
        arguments.report.parent,
        notes,
        arguments.report_utterances,
        arguments.embed_audio,
    )
    arguments.report.write_text(page, encoding="utf-8")
    print(f"{arguments.report}: written")


if __name__ == "__main__":
    main()
