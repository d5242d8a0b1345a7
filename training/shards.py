"""Shards of training speech: a FLAC file of about ten minutes and a JSONL manifest of the utterances in it."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from training.voices import SAMPLING_RATE

SHARD_S = 600.0


@dataclass(frozen=True)
class Utterance:
    """`waveform` float32 [T] at SAMPLING_RATE, its target `text` (may be empty), and what else the manifest tells."""

    waveform: np.ndarray
    text: str
    origin: dict[str, str] = field(default_factory=dict)


def take_utterances(utterances: Iterator[Utterance], shard_s: float) -> list[Utterance]:
    """The next utterances until they last `shard_s` seconds, as many as there are; none at the end."""
    taken: list[Utterance] = []
    samples = 0
    for utterance in utterances:
        taken.append(utterance)
        samples += len(utterance.waveform)
        if samples >= shard_s * SAMPLING_RATE:
            break
    return taken


def write_shard(utterances: Sequence[Utterance], out: Path, name: str) -> float:
    """Writes `name`.flac and then `name`.jsonl below `out`, each by an atomic rename; returns the seconds of audio."""
    lines, samples = [], 0
    for utterance in utterances:
        entry = {
            "audio_filepath": f"{name}.flac",
            "offset": round(samples / SAMPLING_RATE, 7),
            "duration": round(len(utterance.waveform) / SAMPLING_RATE, 7),
            "text": utterance.text,
            **utterance.origin,
        }
        lines.append(json.dumps(entry) + "\n")
        samples += len(utterance.waveform)
    scratch = out / f".{name}.{os.getpid()}"
    audio = np.concatenate([utterance.waveform for utterance in utterances])
    soundfile.write(scratch, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    os.replace(scratch, out / f"{name}.flac")
    scratch.write_text("".join(lines))
    os.replace(scratch, out / f"{name}.jsonl")
    return samples / SAMPLING_RATE
