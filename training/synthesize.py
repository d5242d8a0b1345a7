"""Synthetic speech for training: shards of about ten minutes, a FLAC file and a JSONL manifest each.

    python -m training.synthesize --cache CACHE --out DIR --hours 10 --seed 1 --engine hibari --workers 2 [--split dev]

A shard depends on the engine, seed, split, shard number and length only (piper alone draws unseeded noise).
A finished shard is never made again, so that the command can be stopped and repeated, or repeated with more hours.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from training.command_line import check_at_least_one, check_folder, errors_in_one_line
from training.engines import ENGINES, engine_fault, load_engine
from training.evaluation_data import UsageError
from training.shards import SHARD_S, Utterance, take_utterances, write_shard
from training.texts import SentenceSampler, collect_sentences, load_sentences, save_sentences
from training.voices import SAMPLING_RATE, Engine, random_voice, speak

MIN_UTTERANCE_S, MAX_UTTERANCE_S = 0.5, 28.0
EDGE_SILENCE_S = (0.05, 0.6)
PAUSE_S = (0.15, 0.9)
EMPTY_SHARE, SHORT_SHARE, SENTENCE_SHARE = 0.01, 0.24, 0.42  # the rest: 2 to 5 sentences in a row


def make_utterance(engine: Engine, sampler: SentenceSampler, rng: np.random.Generator) -> Utterance | None:
    """One random utterance of 0.5 to 28 s, or None where the engine stayed silent or the text came out too long."""
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return Utterance(_background(rng), "", {"voice": "none", "engine": engine.name})
    if kind < EMPTY_SHARE + SHORT_SHARE:
        sentences = [sampler.short(rng)]
    elif kind < EMPTY_SHARE + SHORT_SHARE + SENTENCE_SHARE:
        sentences = [sampler.sentence(rng)]
    else:
        sentences = [sampler.sentence(rng) for _ in range(int(rng.integers(2, 6)))]
    voice = random_voice(engine, rng)
    parts, texts, samples = [_silence(rng, EDGE_SILENCE_S)], [], 0
    tail = _silence(rng, EDGE_SILENCE_S)
    for sentence in sentences:
        speech = speak(engine, sentence.spoken, voice)
        if len(speech) == 0:
            continue
        pause = _silence(rng, PAUSE_S) if texts else speech[:0]
        added = len(pause) + len(speech)
        if (samples + added + len(parts[0]) + len(tail)) / SAMPLING_RATE > MAX_UTTERANCE_S:
            break
        parts += [pause, speech]
        texts.append(sentence.text)
        samples += added
    if not texts:
        return None
    waveform = np.concatenate([*parts, tail])
    missing = int(MIN_UTTERANCE_S * SAMPLING_RATE) - len(waveform)
    if missing > 0:
        waveform = np.pad(waveform, (missing // 2, missing - missing // 2))
    peak = rng.uniform(0.4, 0.9)
    origin = {"voice": str(voice), "engine": engine.name}
    return Utterance(waveform * (peak / np.abs(waveform).max()), " ".join(texts), origin)


def utterances(engine: Engine, sampler: SentenceSampler, rng: np.random.Generator) -> Iterator[Utterance]:
    """Random utterances without end."""
    while True:
        utterance = make_utterance(engine, sampler, rng)
        if utterance is not None:
            yield utterance


def shard_rng(engine: str, seed: int, split: str, shard: int) -> np.random.Generator:
    """The generator that alone determines a shard."""
    return np.random.default_rng([zlib.crc32(f"{engine}/{split}".encode()), seed, shard])


def num_shards(hours: float, shard_s: float = SHARD_S) -> int:
    """How many shards these hours are, at least one."""
    return max(1, round(hours * 3600 / shard_s))


def shard_name(engine: str, seed: int, shard: int) -> str:
    """What the files of a shard are called, without the suffix."""
    return f"{engine}-{seed}-{shard:05d}"


def synthesize_shard(
    shard: int, *, engine: str, seed: int, split: str, cache: Path, out: Path, shard_s: float = SHARD_S
) -> float:
    """Makes one shard unless its manifest is there; returns the seconds of audio made now."""
    name = shard_name(engine, seed, shard)
    if (out / f"{name}.jsonl").exists():
        return 0.0
    rng = shard_rng(engine, seed, split, shard)
    made = take_utterances(utterances(_engine(engine, cache), _sampler(cache, split), rng), shard_s)
    return write_shard(made, out, name)


def prepare_sentences(cache: Path) -> Path:
    """Collects the sentences once; later runs read the file."""
    path = cache / "sentences.jsonl"
    if not path.exists():
        sentences = collect_sentences(cache)
        scratch = path.with_suffix(f".{os.getpid()}")
        save_sentences(sentences, scratch)
        os.replace(scratch, path)
    return path


_loaded: dict[tuple[str, str], object] = {}  # per worker process: engines and texts are slow to load


def _engine(name: str, cache: Path) -> Engine:
    if ("engine", name) not in _loaded:
        _loaded["engine", name] = load_engine(name, cache)
    return _loaded["engine", name]


def _sampler(cache: Path, split: str) -> SentenceSampler:
    if ("sampler", split) not in _loaded:
        _loaded["sampler", split] = SentenceSampler(load_sentences(prepare_sentences(cache)), split)
    return _loaded["sampler", split]


def _silence(rng: np.random.Generator, range_s: tuple[float, float]) -> np.ndarray:
    return np.zeros(int(rng.uniform(*range_s) * SAMPLING_RATE), np.float32)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Silence or coloured noise of 0.5 to 8 s."""
    noise = rng.standard_normal(int(rng.uniform(0.5, 8.0) * SAMPLING_RATE))
    spectrum = np.fft.rfft(noise)
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** rng.uniform(0.0, 1.0)
    noise = np.fft.irfft(spectrum, len(noise))
    level = 0.0 if rng.random() < 0.3 else 10 ** rng.uniform(-3.5, -0.7)
    return (noise * (level / np.abs(noise).max())).astype(np.float32)


def synthesize(
    engine: str,
    hours: float,
    seed: int,
    out: Path,
    cache: Path,
    *,
    split: str = "train",
    shard_s: float = SHARD_S,
    workers: int = 1,
) -> float:
    """Makes the shards that are missing; returns the seconds of audio made now.

    Args:
        engine: Its name in `training.engines`.
        hours: In total for this engine, seed and split.
        seed: Of texts, voices and noise.
        out: Folder for the shards.
        cache: Folder for fetched packages and sentences.
        split: Texts of `train` or `dev`.
        shard_s: Seconds of audio in a shard.
        workers: Processes.
    """
    out.mkdir(parents=True, exist_ok=True)
    prepare_sentences(cache)
    job = partial(synthesize_shard, engine=engine, seed=seed, split=split, cache=cache, out=out, shard_s=shard_s)
    with ProcessPoolExecutor(workers) as pool:
        return sum(pool.map(job, range(num_shards(hours, shard_s))))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--cache",
        type=Path,
        default=Path("cache"),
        help="folder for fetched packages and sentences (default: %(default)s)",
    )
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--hours", type=float, required=True, help="hours in total for this engine, seed and split")
    add("--seed", type=int, required=True, help="of texts, voices and noise: another one gives other shards, 0 or more")
    add("--engine", choices=sorted(ENGINES), required=True, help="what speaks; see training/engines.py for its licence")
    add(
        "--split",
        choices=("train", "dev"),
        default="train",
        help="texts to read: for training, or those held out from it (default: %(default)s)",
    )
    add(
        "--shard-s", type=float, default=SHARD_S, metavar="S", help="seconds of audio in a shard (default: %(default)g)"
    )
    add("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be done, before anything is fetched.

    Raises:
        UsageError: A number is out of range, a folder cannot be written, or the engine does not work.
    """
    for name in ("hours", "shard_s"):
        if not 0.0 < getattr(arguments, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')}: expected more than 0, got {getattr(arguments, name)}")
    if arguments.seed < 0:
        raise UsageError(f"--seed: expected 0 or more, got {arguments.seed}")
    check_at_least_one(arguments, "workers")
    check_folder("--out", arguments.out)
    check_folder("--cache", arguments.cache)
    shards = range(num_shards(arguments.hours, arguments.shard_s))
    names = [shard_name(arguments.engine, arguments.seed, shard) for shard in shards]
    if all((arguments.out / f"{name}.jsonl").exists() for name in names):
        return
    with ProcessPoolExecutor(1) as pool:  # engines leave threads behind, which forked workers cannot use
        fault = pool.submit(engine_fault, arguments.engine, arguments.cache).result()
    if fault is not None:
        raise UsageError(f"--engine: {fault}")


def main() -> None:
    """Makes the shards that are missing."""
    arguments = build_parser().parse_args()
    started = time.monotonic()
    with errors_in_one_line("synthesize", RuntimeError):
        check(arguments)
        made_s = synthesize(**vars(arguments))
    elapsed_s = time.monotonic() - started
    shards = num_shards(arguments.hours, arguments.shard_s)
    speed = f"{made_s / elapsed_s:.0f} x real time"
    print(f"{arguments.engine}: {shards} shards, {made_s / 3600:.2f} h made now, {speed}")


if __name__ == "__main__":
    main()
