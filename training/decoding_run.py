"""Decode a data set once: resumable after any crash, over any number of processes.

Every process appends what it has recognised to a journal of its own, `PREFIX.part0.jsonl`, `PREFIX.part1.jsonl`, ...:
first a line that describes the run, then one line per utterance, forced to disk after every batch. Batches are dealt
out in turn, so the batches of a run do not depend on the number of processes. When all is done the journals are merged,
in the order of the data set, into `PREFIX.jsonl`, the manifest; beside it `PREFIX.run.json` describes the run and says
what it cost. Recordings that cannot be read are left out of the manifest; the description says which.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm
from transformers import AutomaticSpeechRecognitionPipeline

from hf_speechllm.audio import one_line
from training.evaluation_data import UsageError, Utterance, read_json_object
from training.recognisers import Recogniser

JOURNAL_FORMAT = 2  # 1 did not say what an utterance took


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is; `largest` waits for all of them and returns the largest of their values."""

    rank: int = 0
    count: int = 1
    largest: Callable[[float], float] = lambda value: value


@dataclass(frozen=True)
class Cost:
    """What recognition took, also where it was interrupted: every line of a journal says what its utterance cost.

    Attributes:
        peak_memory_mib: largest memory of any one of the processes: of tensors on the GPU, or resident in all.
        cpu_s: CPU time of recognition alone, all threads and processes together; other programs hardly change it.
    """

    peak_memory_mib: float
    cpu_s: float


def start_process() -> Process:
    """This process among those of `accelerate launch` or `torchrun`, or the only one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Process()
    # Only waiting goes over the network, so gloo serves GPUs too; the slowest process may take its time.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))

    def largest(value: float) -> float:
        values: list[Any] = [None] * count
        distributed.all_gather_object(values, value)
        return max(values)

    return Process(distributed.get_rank(), count, largest)


def part_path(prefix: Path, rank: int) -> Path:
    """Journal of a process."""
    return prefix.with_name(f"{prefix.name}.part{rank}.jsonl")


def manifest_path(prefix: Path) -> Path:
    """Manifest of a finished run."""
    return prefix.with_name(f"{prefix.name}.jsonl")


def run_path(prefix: Path) -> Path:
    """Description of a finished run."""
    return prefix.with_name(f"{prefix.name}.run.json")


def finished(prefix: Path, description: dict[str, Any]) -> Cost | None:
    """What the run that `description` describes took, if its manifest is there; otherwise None.

    Raises:
        UsageError: If the description of the run that is there is damaged.
    """
    if not (manifest_path(prefix).is_file() and run_path(prefix).is_file()):
        return None
    run = read_json_object(run_path(prefix), ("run", "peak_memory_mib", "cpu_s"))
    return Cost(run["peak_memory_mib"], run["cpu_s"]) if run["run"] == description else None


def failures(prefix: Path) -> list[str]:
    """A line about each recording that a finished run could not read."""
    return json.loads(run_path(prefix).read_text()).get("failures", [])


def discard(prefix: Path) -> None:
    """Forget an earlier run: remove its journals and description. Its manifest stays until another replaces it."""
    for path in [*_parts(prefix), run_path(prefix)]:
        path.unlink(missing_ok=True)


def decode(
    recogniser: Recogniser,
    batches: Iterator[list[Utterance]],
    prefix: Path,
    description: dict[str, Any],
    process: Process,
    total: int | None,
) -> None:
    """Recognise this process's share of what no journal has yet.

    Args:
        recogniser: The model.
        batches: All batches of the data set, the same in every process.
        prefix: Where journals go.
        description: Of the run, JSON; a journal of another run is refused.
        process: This one.
        total: Number of utterances for the progress bar of the first process, if known. There is a bar on terminals
            only, and none is left when this returns.

    Raises:
        UsageError: If a journal is of another run or damaged, or the model does not take its options.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    done = {row["index"] for path in _parts(prefix) for row in _read_part(path, description)}
    is_warm = False
    audio_s = time_s = 0.0
    with (
        _open_part(part_path(prefix, process.rank), description) as journal,
        tqdm(desc=prefix.name, unit="utt", total=total, leave=False, disable=True if process.rank > 0 else None) as bar,
    ):
        for number, batch in enumerate(batches):
            if number % process.count != process.rank:
                continue
            bar.update(sum(utterance.index in done for utterance in batch))
            longest_s = batch[0].entry["duration"]
            batch = [utterance for utterance in batch if utterance.index not in done]
            if not batch:
                continue
            batch, waveforms = _read_audio(batch, recogniser.sampling_rate, journal)
            if not batch:
                continue
            if not is_warm:  # kernels are chosen, caches filled: outside the measured time
                _warm_up(recogniser, waveforms[-1], longest_s)
                is_warm = True
            start, cpu_start = time.perf_counter(), time.process_time()
            texts = recogniser.transcribe(waveforms, longest_s)
            batch_s, batch_cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
            cost = {"cpu_s": batch_cpu_s / len(batch), "peak_memory_mib": peak_memory_mib(recogniser.pipe)}
            rows = [
                {
                    "index": utterance.index,
                    "row": utterance.entry | {"time": batch_s / len(batch), "pred_text": text},
                    **cost,
                }
                for utterance, text in zip(batch, texts, strict=True)
            ]
            _append(journal, rows)
            audio_s += sum(utterance.entry["duration"] for utterance in batch)
            time_s += batch_s
            bar.update(len(rows))
            bar.set_postfix(RTFx=f"{audio_s / time_s:.1f}")


def _warm_up(recogniser: Recogniser, waveform: np.ndarray, longest_s: float) -> None:
    try:
        recogniser.transcribe([waveform], longest_s)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the model does not work with the options {recogniser.options} ({type(error).__name__}: {one_line(error)})"
        ) from error


def _read_audio(
    batch: list[Utterance], sampling_rate: int, journal: TextIO
) -> tuple[list[Utterance], list[np.ndarray]]:
    """The utterances of a batch that can be read, and their waveforms; the journal gets the others."""
    readable, waveforms = [], []
    for utterance in batch:
        try:
            waveforms.append(utterance.waveform(sampling_rate))
        except UsageError as error:
            _append(journal, [{"index": utterance.index, "failure": str(error)}])
        else:
            readable.append(utterance)
    return readable, waveforms


def peak_memory_mib(pipe: AutomaticSpeechRecognitionPipeline) -> float:
    """Largest memory of this process so far: of tensors on the GPU, or resident in all."""
    if pipe.device.type == "cuda":
        return torch.cuda.max_memory_allocated(pipe.device) / 2**20
    if sys.platform == "linux":  # where `ru_maxrss` of a process begins with what the one that started it had
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def merge(prefix: Path, description: dict[str, Any], total: int | None) -> tuple[list[dict[str, Any]], Cost]:
    """Journals to the manifest and the description of the run; rows in the order of the data set, and their cost.

    Args:
        prefix: As in [`decode`].
        description: Likewise.
        total: Number of utterances, if known; otherwise the largest index tells.

    Raises:
        UsageError: If an utterance is missing or was recognised twice.
    """
    journal = [line for path in _parts(prefix) for line in _read_part(path, description)]
    journal.sort(key=lambda line: line["index"])
    if [line["index"] for line in journal] != list(range(len(journal) if total is None else total)):
        raise UsageError(
            f"{prefix}: expected each of {total or 'all'} utterances once in the journals, got {len(journal)} lines; "
            "is another run writing there? Give --overwrite to decode again"
        )
    rows = [line["row"] for line in journal if "row" in line]
    failed = [line["failure"] for line in journal if "failure" in line]
    _replace(manifest_path(prefix), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    cost = Cost(
        peak_memory_mib=max((line["peak_memory_mib"] for line in journal if "row" in line), default=0.0),
        cpu_s=sum(line["cpu_s"] for line in journal if "row" in line),
    )
    run = {"run": description, **asdict(cost), "failures": failed}
    _replace(run_path(prefix), json.dumps(run, indent=2) + "\n")
    for path in _parts(prefix):
        path.unlink()
    return rows, cost


def _parts(prefix: Path) -> list[Path]:
    start = f"{prefix.name}.part"
    names = [path.name for path in prefix.parent.iterdir()] if prefix.parent.is_dir() else []
    ranks = [name.removeprefix(start).removesuffix(".jsonl") for name in names if name.startswith(start)]
    return [part_path(prefix, rank) for rank in sorted(int(rank) for rank in ranks if rank.isdigit())]


def _read_part(path: Path, description: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a journal; a last line without its end was being written when the process died."""
    complete, _, _ = path.read_bytes().rpartition(b"\n")
    lines = complete.decode("utf-8").split("\n") if complete else []
    try:
        rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: damaged ({error}); give --overwrite to decode again") from error
    if rows and rows[0] != {"run": description}:
        own = rows[0].get("run", {})
        names = sorted(name for name in {*own, *description} if own.get(name) != description.get(name))
        raise UsageError(
            f"{path}: left by an unfinished run with another {', '.join(names)}; give the command of that run to "
            "finish it, another --output, or --overwrite"
        )
    return rows[1:]


def _open_part(path: Path, description: dict[str, Any]) -> TextIO:
    """Open a journal to append to, behind its last complete line."""
    if path.exists():
        with path.open("rb+") as file:
            complete, end, _ = file.read().rpartition(b"\n")
            file.truncate(len(complete + end))
    journal = path.open("a", encoding="utf-8")
    if journal.tell() == 0:
        _append(journal, [{"run": description}])
    return journal


def _append(journal: TextIO, rows: list[dict[str, Any]]) -> None:
    journal.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    journal.flush()
    os.fsync(journal.fileno())


def _replace(path: Path, content: str) -> None:
    unfinished = path.with_name(f".{path.name}.writing")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
