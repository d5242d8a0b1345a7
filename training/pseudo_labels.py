"""Training shards from recorded speech without texts: a recogniser transcribes, the lines it is sure of are kept.

    python -m training.pseudo_labels --cache CACHE --out DIR --dev-out DEV [--game queen] [--threads 2]

The speech is that of `training/game_speech.py`, the recogniser Moonshine tiny; sure means a high mean log-probability
of its tokens. Shards are those of `training/synthesize.py`: a FLAC file and a JSONL manifest. Following lines are
joined at random, so that there are utterances of one to several of them. The last shard of a game goes to DEV, for
choosing weights and options. What is done is not done again; the same
command makes the same shards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

import hf_speechllm
from training.command_line import check_at_least_one, check_folder, errors_in_one_line
from training.evaluation_data import UsageError
from training.game_speech import GAMES, Clip
from training.recognisers import MOONSHINE_MIN_TOKENS, MOONSHINE_TOKENS_PER_S
from training.shards import SHARD_S, Utterance, take_utterances, write_shard
from training.texts import normalise, spell_out
from training.voices import SAMPLING_RATE

BATCH_SIZE = 32
MIN_LINE_S, MAX_LINE_S = 0.5, 16.0
MAX_JOINED_S = 14.0
JOIN_PROBABILITY = 0.55
PAUSE_S = (0.1, 0.7)
MIN_LINES = 20  # of a game, also where a small share of it is asked for
MIN_MEAN_LOG_PROB = -0.25
_SOUND = re.compile(r"(.)\1\1\1")  # a scream is no word, and can have more letters than the audio has frames for CTC


@dataclass(frozen=True)
class Transcription:
    """What the recogniser heard: raw `text`, mean natural log-probability of its tokens, EOS included."""

    text: str
    mean_log_prob: float


@torch.inference_mode()
def transcribe(
    model: PreTrainedModel, processor: ProcessorMixin, waveforms: Sequence[np.ndarray]
) -> list[Transcription]:
    """Greedy transcriptions of waveforms float32 [T] at 16 kHz by an encoder-decoder model."""
    longest_s = max(map(len, waveforms)) / SAMPLING_RATE
    inputs = processor(list(waveforms), sampling_rate=SAMPLING_RATE, return_tensors="pt", padding=True)
    output = model.generate(
        **inputs,
        max_length=1 + MOONSHINE_MIN_TOKENS + math.ceil(MOONSHINE_TOKENS_PER_S * longest_s),
        num_beams=1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    log_probs = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)  # B, L
    tokens = output.sequences[:, 1:]
    ended = tokens == model.generation_config.eos_token_id
    valid = (ended.cumsum(1) - ended.long()) == 0  # EOS is the last valid token
    means = log_probs.where(valid, 0).sum(1) / valid.sum(1)
    texts = processor.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    return [Transcription(text.strip(), mean) for text, mean in zip(texts, means.tolist(), strict=True)]


def transcribe_clips(clips: Sequence[Clip], path: Path) -> dict[str, Transcription]:
    """Transcriptions by clip name; written to `path` batch by batch, and read from there what was done before."""
    done: dict[str, Transcription] = {}
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("]")]
        path.write_text("".join(line + "\n" for line in lines))  # without the last one, if it was cut off
        done = {name: Transcription(*fields) for name, *fields in map(json.loads, lines)}
    todo = sorted((clip for clip in clips if clip.name not in done), key=lambda clip: len(clip.waveform))
    if not todo:
        return done
    folder = hf_speechllm.base_model("moonshine-tiny")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    progress = logging.tqdm(total=len(clips), initial=len(done), desc=path.stem, unit="clip")
    with path.open("a") as file:
        for first in range(0, len(todo), BATCH_SIZE):
            batch = todo[first : first + BATCH_SIZE]
            heard = transcribe(model, processor, [clip.waveform for clip in batch])
            for clip, transcription in zip(batch, heard, strict=True):
                done[clip.name] = transcription
                file.write(json.dumps([clip.name, transcription.text, transcription.mean_log_prob]) + "\n")
            file.flush()
            progress.update(len(batch))
    progress.close()
    return done


def label(transcription: Transcription) -> str | None:
    """Words in the form of the training targets, or None where the recogniser was not sure or heard none."""
    words = normalise(spell_out(transcription.text))
    is_sound = _SOUND.search(words) is not None
    return words if words and not is_sound and transcription.mean_log_prob >= MIN_MEAN_LOG_PROB else None


def joined_lines(
    clips: Sequence[Clip], texts: dict[str, str], rng: np.random.Generator, origin: dict[str, str]
) -> Iterator[Utterance]:
    """Utterances of one or several following lines, pauses between them; only lines with a text."""
    parts: list[np.ndarray] = []
    words: list[str] = []
    for clip in clips:
        joined_s = sum(map(len, [*parts, clip.waveform])) / SAMPLING_RATE
        agreed = clip.name in texts
        if parts and (not agreed or joined_s > MAX_JOINED_S or rng.random() > JOIN_PROBABILITY):
            yield Utterance(np.concatenate(parts), " ".join(words), origin)
            parts, words = [], []
        if agreed:
            pause = [np.zeros(int(rng.uniform(*PAUSE_S) * SAMPLING_RATE), np.float32)] if parts else []
            parts += [*pause, clip.waveform]
            words.append(texts[clip.name])
    if parts:
        yield Utterance(np.concatenate(parts), " ".join(words), origin)


def write_shards(utterances: Iterator[Utterance], out: Path, name: str, shard_s: float = SHARD_S) -> list[str]:
    """Writes `name`-00000.flac and .jsonl and so on below `out`; returns their names without the suffix."""
    names: list[str] = []
    while taken := take_utterances(utterances, shard_s):
        names.append(f"{name}-{len(names):05d}")
        write_shard(taken, out, names[-1])
    return names


def is_made(game: str, dev_out: Path) -> bool:
    """Whether all shards of a game are there: the one for development is moved to its place at the end."""
    return any(dev_out.glob(f"{game}-*.jsonl"))


def make_game(game: str, cache: Path, out: Path, dev_out: Path, share: float = 1.0) -> None:
    """Transcribes the lines of a game and writes its shards, the last one below `dev_out`, another folder.

    Args:
        game: Its name in `training.game_speech`.
        cache: Folder for packages and transcriptions.
        out, dev_out: Folders for the shards, on the same disk.
        share: Of the lines, from the first; shards are as much shorter.

    Raises:
        RuntimeError: If the recogniser is sure of too few lines for a shard in each folder.
    """
    for folder in (out, dev_out):
        folder.mkdir(parents=True, exist_ok=True)
    package, read = GAMES[game]
    clips = [clip for clip in read(cache) if MIN_LINE_S <= len(clip.waveform) / SAMPLING_RATE <= MAX_LINE_S]
    clips.sort(key=lambda clip: clip.name)
    clips = clips[: max(MIN_LINES, round(share * len(clips)))]
    heard = transcribe_clips(clips, cache / f"{game}.jsonl")
    labels = {clip.name: label(heard[clip.name]) for clip in clips}
    texts = {name: text for name, text in labels.items() if text is not None}
    rng = np.random.default_rng(zlib.crc32(game.encode()))
    origin = {"engine": game, "licence": package.licence}
    names = write_shards(joined_lines(clips, texts, rng, origin), out, game, share * SHARD_S)
    if len(names) < 2:
        raise RuntimeError(f"{game}: {len(texts)} of {len(clips)} lines are sure, too few for two shards; take more.")
    for suffix in ("flac", "jsonl"):
        os.replace(out / f"{names[-1]}.{suffix}", dev_out / f"{names[-1]}.{suffix}")
    kept_s = sum(len(clip.waveform) for clip in clips if clip.name in texts) / SAMPLING_RATE
    print(f"{game}: {len(texts)} of {len(clips)} lines, {kept_s / 3600:.2f} h, {len(names)} shards")


def main() -> None:
    """Makes the shards of the games that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--cache",
        type=Path,
        default=Path("cache"),
        help="folder for packages and transcriptions (default: %(default)s)",
    )
    add("--out", type=Path, required=True, help="folder for the shards to train on")
    add("--dev-out", type=Path, required=True, help="folder for the last shard of each game, on the same disk")
    add("--game", action="append", choices=sorted(GAMES), help="whose lines to take, repeatable (default: all)")
    add("--threads", type=int, metavar="N", help="of the recogniser (default: what PyTorch takes)")
    arguments = parser.parse_args()
    with errors_in_one_line("pseudo_labels", RuntimeError, subprocess.SubprocessError):
        check_at_least_one(arguments, "threads")
        for option, folder in (
            ("--out", arguments.out),
            ("--dev-out", arguments.dev_out),
            ("--cache", arguments.cache),
        ):
            check_folder(option, folder)
        if arguments.out.resolve() == arguments.dev_out.resolve():
            raise UsageError(f"--dev-out: expected another folder than --out, got {arguments.dev_out}")
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        for game in arguments.game or sorted(GAMES):
            if is_made(game, arguments.dev_out):
                print(f"{game}: there already")
            else:
                make_game(game, arguments.cache, arguments.out, arguments.dev_out)


if __name__ == "__main__":
    main()
