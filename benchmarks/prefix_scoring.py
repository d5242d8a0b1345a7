"""CTC prefix scoring in label-synchronous search: CTCPrefixScorer against ESPnet and SpeechBrain, on one CPU thread.

Every system scores the same hypotheses on the same synthetic posteriors, in one process: it is built from the log-probs
and then, at each of about T / 8 steps, scores the candidates of every hypothesis and its end, and moves to the given
selection. Times are CPU time of the process, per utterance: the median of several runs, in which the systems take
turns. Memory is the peak of the resident set over that before the run, so beyond the posteriors. The error is the
largest difference of the selected labels' prefix scores from a float64 recursion over frames, written out here;
hypotheses with a label outside the top_k are left out. Prints a Markdown table.

Legend: B utterances, K beams, N = B*K hypotheses, T frames, V labels (blank 0), C candidates per hypothesis, S steps.

    python -m pip install --no-deps --target PEERS espnet==202511 speechbrain==1.1.2
    python -m benchmarks.prefix_scoring --peers PEERS [--quick]

Without --peers, ESPnet and SpeechBrain are taken from the environment. SpeechBrain's `decoders/ctc.py` is loaded by
itself, because the package needs torchaudio. Linux only: peak memory comes from /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import logging
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hf_speechllm.ctc_prefix_score import LOG_PROB_FLOOR, CTCPrefixScorer
from training.command_line import check_at_least_one, errors_in_one_line
from training.evaluation_data import UsageError

NUM_BEAMS = 8
NUM_CANDIDATES = 32
TOP_K = 512
FRAMES_PER_LABEL = 8
BLANK, EOS = 0, 1
ROUNDS, SLICES = 5, 50  # in each round every system runs once, and again within this part of the time of one run


class OverLimit(Exception):
    """A system exceeds the time or memory granted to a cell of the grid."""


@dataclass(frozen=True)
class Search:
    """A search as recorded: the same for every system.

    Attributes:
        log_probs: [B, T, V] float32.
        lengths: [B] int64, all T.
        candidates: [S, N, C] labels to score.
        parent: [S, N] flat row that each selected hypothesis continues.
        label: [S, N] label appended, one of the parent's candidates.
    """

    log_probs: Tensor
    lengths: Tensor
    candidates: Tensor
    parent: Tensor
    label: Tensor


def make_search(num_utterances: int, num_frames: int, num_labels: int, seed: int = 0) -> Search:
    """Peaky posteriors with a label every 8 frames, and a beam search that mostly follows these labels.

    Candidates are what a language model would propose: the right label, the others drawn by Zipf's law.
    """
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.empty(num_utterances, num_frames, num_labels)
    num_steps = num_frames // FRAMES_PER_LABEL
    reference = torch.randint(2, num_labels, (num_utterances, num_steps), generator=generator)
    peaks = torch.arange(num_steps) * FRAMES_PER_LABEL + FRAMES_PER_LABEL // 2
    background = math.log(num_labels)
    for frames, labels in zip(log_probs, reference, strict=True):  # one at a time: the largest is gigabytes
        frames.normal_(generator=generator)
        frames[:, BLANK] += background + 6.0
        frames[peaks, labels] += background + 10.0
        frames.sub_(frames.logsumexp(1, keepdim=True))

    num_rows = num_utterances * NUM_BEAMS
    shape = (num_steps, num_rows)
    zipf = 1.0 / torch.arange(1.0, num_labels - 1.0)  # labels 2 and up, in a random order
    order = torch.randperm(num_labels - 2, generator=generator) + 2
    ranks = torch.multinomial(zipf.expand(num_steps * num_rows, -1), NUM_CANDIDATES, generator=generator)
    candidates = order[ranks].view(*shape, NUM_CANDIDATES)
    right = reference.t().repeat_interleave(NUM_BEAMS, 1)  # S, N
    is_missing = ~(candidates == right[:, :, None]).any(2)
    candidates[:, :, 0] = torch.where(is_missing, right, candidates[:, :, 0])

    beam = torch.arange(num_rows) % NUM_BEAMS
    is_right = (beam == 0) | (torch.rand(shape, generator=generator) < 0.9)  # the first beam makes no mistake
    parent_beam = torch.randint(0, NUM_BEAMS, shape, generator=generator).masked_fill_(beam == 0, 0)
    parent = torch.arange(num_rows) - beam + parent_beam
    choice = torch.randint(0, NUM_CANDIDATES, shape, generator=generator)
    other = candidates[torch.arange(num_steps)[:, None], parent, choice]
    label = torch.where(is_right, right, other)
    return Search(log_probs, torch.full((num_utterances,), num_frames), candidates, parent, label)


def reference_scores(search: Search) -> Tensor:
    """[S, N] psi of the selected hypotheses by the recursion over frames, float64.

    Watanabe et al. (2017), "Hybrid CTC/attention architecture", algorithm 2.
    """
    num_steps, num_rows = search.label.shape
    utterance = torch.arange(num_rows) // NUM_BEAMS
    blank = search.log_probs[utterance, :, BLANK].double().t()  # T, N
    nonblank_state = torch.full((len(blank) + 1, num_rows), -math.inf, dtype=torch.float64)  # T+1, N
    blank_state = torch.cat((blank.new_zeros(1, num_rows), blank.cumsum(0)))
    last = torch.full((num_rows,), -1)
    scores = []
    for parent, label in zip(search.parent, search.label, strict=True):
        emission = search.log_probs[utterance, :, label].double().t()  # T, N
        nonblank_state, blank_state, last = nonblank_state[:, parent], blank_state[:, parent], last[parent]
        phi = torch.where(label == last, blank_state, torch.logaddexp(nonblank_state, blank_state))
        psi = new_nonblank = new_blank = torch.full((num_rows,), -math.inf, dtype=torch.float64)
        nonblank, blanks = [new_nonblank], [new_blank]
        for t in range(len(blank)):
            psi = torch.logaddexp(psi, phi[t] + emission[t])
            new_blank = torch.logaddexp(new_blank, new_nonblank) + blank[t]
            new_nonblank = torch.logaddexp(new_nonblank, phi[t]) + emission[t]
            nonblank.append(new_nonblank)
            blanks.append(new_blank)
        nonblank_state, blank_state, last = torch.stack(nonblank), torch.stack(blanks), label
        scores.append(psi)
    return torch.stack(scores)


Scores = tuple[Tensor, Tensor | None]  # psi [N, U'], and the labels of its columns, [N or B, U'] (None: 0 to U'-1)


@dataclass(frozen=True)
class System:
    """Something to measure.

    Attributes:
        name: row of the table.
        run: takes a search whose `log_probs` it may modify, yields what it scored at each step.
        modifies: whether it does modify them.
        gib: takes a search and returns the memory it is known to need beyond the posteriors.
    """

    name: str
    run: Callable[[Search], Iterator[Scores]]
    modifies: bool
    gib: Callable[[Search], float]


def our_system(name: str, build: Callable[[Search], CTCPrefixScorer], *, all_labels: bool) -> System:
    """`all_labels`: score every label of the scorer, as needed when there are no candidates; else the candidates."""

    def run(search: Search) -> Iterator[Scores]:
        scorer = build(search)
        state = scorer.init(NUM_BEAMS)
        for candidates, parent, label in zip(search.candidates, search.parent, search.label, strict=True):
            if all_labels:
                psi, labels = scorer.score(state), scorer.labels
            else:
                psi, labels = scorer.score_candidates(state, candidates), candidates
            scorer.eos(state)
            state = scorer.advance(state, parent, label)
            yield psi, labels

    return System(name, run, False, lambda search: search.log_probs.nbytes / 2**30 if all_labels else 0.0)


def our_systems() -> list[System]:
    """CTCPrefixScorer in every way to use it."""

    def full(search: Search) -> CTCPrefixScorer:
        return CTCPrefixScorer.from_log_probs(search.log_probs, search.lengths, BLANK)

    def pruned(search: Search) -> CTCPrefixScorer:
        return CTCPrefixScorer.from_log_probs(search.log_probs, search.lengths, BLANK, top_k=TOP_K)

    def chunked(search: Search) -> CTCPrefixScorer:
        return CTCPrefixScorer.from_head(
            lambda start, end: search.log_probs[:, start:end], search.lengths, BLANK, top_k=TOP_K
        )

    return [
        our_system("ours, candidates", full, all_labels=False),
        our_system("ours, all labels", full, all_labels=True),
        our_system(f"ours, top_k={TOP_K}", pruned, all_labels=True),
        our_system(f"ours, from_head, top_k={TOP_K}", chunked, all_labels=True),
    ]


def espnet_systems() -> list[System]:
    """ESPnet's CTCPrefixScoreTH; no system if it is not installed."""
    if importlib.util.find_spec("espnet") is None:
        return []
    from espnet.nets.ctc_prefix_score import CTCPrefixScoreTH

    def run(search: Search, *, all_labels: bool) -> Iterator[Scores]:
        num_utterances, _, num_labels = search.log_probs.shape
        scorer = CTCPrefixScoreTH(search.log_probs, search.lengths, BLANK, EOS)
        prefixes, state = [[EOS] for _ in range(num_utterances * NUM_BEAMS)], None
        for candidates, parent, label in zip(search.candidates, search.parent, search.label, strict=True):
            _, state = scorer(prefixes, state, None if all_labels else candidates)
            psi = state[1]
            best = (parent % NUM_BEAMS * num_labels + label).view(num_utterances, NUM_BEAMS)
            state = scorer.index_select_state(state, best)
            prefixes = [[*prefixes[p], c] for p, c in zip(parent.tolist(), label.tolist(), strict=True)]
            yield psi, None

    return [
        System("ESPnet, candidates", lambda search: run(search, all_labels=False), True, _looped_gib(NUM_CANDIDATES)),
        System("ESPnet, all labels", lambda search: run(search, all_labels=True), True, _looped_gib(None)),
    ]


def speechbrain_systems() -> list[System]:
    """SpeechBrain's CTCPrefixScore; no system if it is not installed."""
    package = importlib.util.find_spec("speechbrain")
    if package is None:
        return []
    scorer_class = _speechbrain_ctc(Path(package.origin).parent).CTCPrefixScore

    def run(search: Search) -> Iterator[Scores]:
        num_utterances, _, num_labels = search.log_probs.shape
        scorer = scorer_class(search.log_probs, search.lengths, BLANK, EOS)
        last, state = torch.full((num_utterances * NUM_BEAMS,), EOS), None
        for candidates, parent, label in zip(search.candidates, search.parent, search.label, strict=True):
            _, state = scorer.forward_step(last, state, candidates)
            psi = state[1]
            best = (parent % NUM_BEAMS * num_labels + label).view(num_utterances, NUM_BEAMS)
            state = scorer.permute_mem(state, best)
            last = label
            yield psi, None

    return [System("SpeechBrain, candidates", run, True, _looped_gib(NUM_CANDIDATES))]


def _looped_gib(num_scored: int | None) -> Callable[[Search], float]:
    """Memory of scorers that keep [2, T, B, V] log-probs and, per step, about seven tensors [T, N, scored labels]."""

    def gib(search: Search) -> float:
        num_utterances, num_frames, num_labels = search.log_probs.shape
        per_step = 7 * num_frames * num_utterances * NUM_BEAMS * (num_scored or num_labels)
        return (3 * search.log_probs.numel() + per_step) * 4 / 2**30  # 3: the stack, and the copy to modify

    return gib


def _speechbrain_ctc(folder: Path) -> types.ModuleType:
    """speechbrain/decoders/ctc.py with stand-ins for the two functions it imports from the rest of the package."""

    def length_to_mask(length: Tensor) -> Tensor:
        return (torch.arange(int(length.max()))[None] < length[:, None]).to(length.dtype)

    stand_ins = {
        "speechbrain.dataio.dataio": {"length_to_mask": length_to_mask},
        "speechbrain.utils.logger": {"get_logger": logging.getLogger},
    }
    for name, functions in stand_ins.items():
        for parent in (*itertools.accumulate(name.split(".")[:-1], "{}.{}".format), name):
            sys.modules.setdefault(parent, types.ModuleType(parent))
        vars(sys.modules[name]).update(functions)
    spec = importlib.util.spec_from_file_location("speechbrain_decoders_ctc", folder / "decoders" / "ctc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def selected_scores(psi: Tensor, labels: Tensor | None, parent: Tensor, label: Tensor) -> Tensor:
    """[N] psi of hypothesis `parent` followed by `label`, both [N]; -inf if that label was not scored."""
    if labels is None:
        return psi[parent, label].double()
    labels = labels.repeat_interleave(len(psi) // len(labels), 0)[parent]  # N, U'
    return psi[parent].double().masked_fill(labels != label[:, None], -math.inf).amax(1)


@dataclass(frozen=True)
class Measurement:
    """One system on one search."""

    seconds: float
    peak_mib: float
    max_error: float


@dataclass(frozen=True)
class Limits:
    """What one run of a system may take."""

    max_seconds: float
    max_gib: float


def measure_all(
    systems: Sequence[System], search: Search, want: Tensor, limits: Limits
) -> dict[str, Measurement | OverLimit]:
    """By name of the system: how its median run is, or what limit it is over.

    The first run of each shows memory and errors. Then all take turns, each for as long in a round, since a processor
    is faster in one second than in the next.
    """
    results: dict[str, Measurement | OverLimit] = {}
    for system in systems:
        try:
            results[system.name] = first_run(system, search, want, limits)
        except OverLimit as reason:
            results[system.name] = reason
    runs = {system: [] for system in systems if isinstance(results[system.name], Measurement)}
    for _, (system, seconds) in itertools.product(range(ROUNDS), runs.items()):
        end = sum(seconds) + limits.max_seconds / SLICES
        while sum(seconds) < end:
            seconds.append(sum(taken for taken, _ in steps_of(system, search, limits)))
    medians = {system.name: statistics.median(seconds) for system, seconds in runs.items()}
    return {
        name: replace(result, seconds=medians[name]) if name in medians else result for name, result in results.items()
    }


@torch.no_grad()
def first_run(system: System, search: Search, want: Tensor, limits: Limits) -> Measurement:
    """Time, memory and errors of a run that starts with as little memory as possible.

    Raises:
        OverLimit: it takes longer or needs more memory than granted.
    """
    if system.gib(search) > limits.max_gib:
        raise OverLimit(f"needs about {system.gib(search):.0f} GiB")
    before = _reset_peak_memory()
    seconds, max_error = 0.0, 0.0
    for step, (taken, (psi, labels)) in enumerate(steps_of(system, search, limits)):
        seconds += taken
        got = selected_scores(psi, labels, search.parent[step], search.label[step])
        max_error = max(max_error, float((got - want[step])[got > LOG_PROB_FLOOR / 2].abs().max()))
    return Measurement(seconds, _memory_mib("VmHWM") - before, max_error)


@torch.no_grad()
def steps_of(system: System, search: Search, limits: Limits) -> Iterator[tuple[float, Scores]]:
    """CPU seconds and scores of each step of a run; the first one with what is done before.

    Raises:
        OverLimit: it takes longer than granted.
    """
    log_probs = search.log_probs.clone() if system.modifies else search.log_probs
    steps, elapsed = system.run(replace(search, log_probs=log_probs)), 0.0
    for step in range(len(search.label)):
        start = time.process_time()
        scores = next(steps)
        taken = time.process_time() - start
        elapsed += taken
        if elapsed > limits.max_seconds:
            raise OverLimit(f"over {limits.max_seconds:.0f} s at step {step + 1} of {len(search.label)}")
        yield taken, scores


def _memory_mib(key: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(key + ":")[1].split()[0]) / 1024


def _reset_peak_memory() -> float:
    """Returns the resident set in MiB, from which VmHWM starts anew."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that stays resident would hide what is allocated next
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_mib("VmRSS")


def main() -> None:
    """Measures the grid and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", type=Path, help="folder of pip install --target with espnet and speechbrain")
    parser.add_argument("--quick", action="store_true", help="only one utterance of 250 frames, 1k and 10k labels")
    number = {"type": int, "nargs": "+"}
    sizes = [1_000, 10_000, 151_000]
    parser.add_argument("--utterances", **number, default=[1, 8], metavar="B", help="of a batch (default: 1 8)")
    parser.add_argument("--frames", **number, default=[250, 750], metavar="T", help="of each (default: 250 750)")
    parser.add_argument(
        "--labels", **number, default=sizes, metavar="V", help="CTC labels (default: 1000 10000 151000)"
    )
    parser.add_argument("--max-seconds", type=float, default=20.0, help="per run of one system (default: %(default)s)")
    parser.add_argument("--max-gib", type=float, default=6.0, help="memory per system (default: %(default)s)")
    args = parser.parse_args()
    with errors_in_one_line("prefix_scoring"):
        check_at_least_one(args, "utterances")
        for name, smallest in (("frames", FRAMES_PER_LABEL), ("labels", NUM_CANDIDATES + 2)):
            if min(getattr(args, name)) < smallest:
                raise UsageError(f"--{name}: expected at least {smallest}, got {min(getattr(args, name))}")
        if args.peers is not None and not args.peers.is_dir():
            raise UsageError(f"--peers: no such folder: {args.peers}")
    if args.quick:
        args.utterances, args.frames, args.labels = [1], [250], [1_000, 10_000]
    if args.peers is not None:
        sys.path.append(str(args.peers))
    torch.set_num_threads(1)

    systems = espnet_systems() + speechbrain_systems() + our_systems()
    print("| B | T | V | system | ms per utterance | speed | peak MiB | max error |")
    print("|--:|--:|--:|:--|--:|--:|--:|--:|")
    for num_utterances, num_frames, num_labels in itertools.product(args.utterances, args.frames, args.labels):
        cell = f"| {num_utterances} | {num_frames} | {num_labels} |"
        search = make_search(num_utterances, num_frames, num_labels)
        want = reference_scores(search)
        results = measure_all(systems, search, want, Limits(args.max_seconds, args.max_gib))
        slowest = None  # seconds of the first system that ran: ESPnet with candidates
        for name, result in results.items():
            if isinstance(result, OverLimit):
                print(f"{cell} {name} | skipped: {result} | | | |", flush=True)
                continue
            slowest = slowest or result.seconds
            print(
                f"{cell} {name} | {result.seconds * 1e3 / num_utterances:.1f} | "
                f"{slowest / result.seconds:.1f} | {result.peak_mib:.0f} | {result.max_error:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
