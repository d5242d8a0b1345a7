"""Acted speech of freely licensed adventure games in Debian: some 11,000 lines of about fifty voices, without texts.

Formats: the readers of ScummVM (engines/sky/disk.cpp and sound.cpp, engines/queen/resource.cpp, engines/drascula).
What is not speech (a few sound effects) is dropped by the agreement of recognisers, `training/pseudo_labels.py`.
"""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from training.packages import Package, fetch
from training.voices import SAMPLING_RATE

STEEL_SKY = Package("debian", "beneath-a-steel-sky", "", "Beneath-a-Steel-Sky-License (free, DFSG)")
AMAZON_QUEEN = Package("debian", "flight-of-the-amazon-queen", "", "Flight-of-the-Amazon-Queen-License (free, DFSG)")
DRASCULA = Package("debian", "drascula", "", "Drascula-License (free, DFSG)")

GAME_RATE = 11025  # Hz, unsigned 8 bit
STEEL_SKY_SPEECH = range(50000, 60000)
STEEL_SKY_HEADER = 22
STEEL_SKY_PACKED = b"RNC\x01"
DIRECTORY_ENTRY = 21  # file name [12], in bundle [1], offset [4], size [4]
DIRECTORY_START = 15


@dataclass(frozen=True)
class Clip:
    """One spoken line: `waveform` float32 [T] at 16 kHz; lines in the order of their names follow one another."""

    name: str
    waveform: np.ndarray


def steel_sky_clips(cache: Path) -> Iterator[Clip]:
    """Lines of "Beneath a Steel Sky"; `ancient` (Debian) unpacks them.

    Raises:
        RuntimeError: `ancient` is not installed, or a line cannot be unpacked.
    """
    if shutil.which("ancient") is None:
        raise RuntimeError("the lines of beneath-a-steel-sky are packed: expected the program `ancient`, install it.")
    folder = fetch(STEEL_SKY, cache) / "usr/share/scummvm/beneath-a-steel-sky"
    disk = (folder / "sky.dsk").read_bytes()
    directory = (folder / "sky.dnr").read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        packed, unpacked = Path(scratch) / "packed", Path(scratch) / "unpacked"
        for entry in struct.iter_unpack("<H3s3s", directory[4:]):
            number, offset, size = entry[0], *(int.from_bytes(field, "little") for field in entry[1:])
            if number not in STEEL_SKY_SPEECH:
                continue
            start = (offset & 0x7FFFFF) << 4 if offset >> 23 else offset & 0x7FFFFF  # the top bit: units of 16 bytes
            samples = disk[start + STEEL_SKY_HEADER : start + (size & 0x3FFFFF)]
            if samples.startswith(STEEL_SKY_PACKED):
                packed.write_bytes(samples)
                subprocess.run(["ancient", "decompress", packed, unpacked], check=True, capture_output=True)
                samples = unpacked.read_bytes()
            yield Clip(f"{number:05d}", _from_bytes(samples))


def amazon_queen_clips(cache: Path) -> Iterator[Clip]:
    """Lines of "Flight of the Amazon Queen", MP3 within one file."""
    folder = fetch(AMAZON_QUEEN, cache) / "usr/share/scummvm/flight-of-the-amazon-queen"
    bundle = (folder / "queen.1c").read_bytes()
    (entries,) = struct.unpack_from(">H", bundle, DIRECTORY_START - 2)
    end = DIRECTORY_START + entries * DIRECTORY_ENTRY
    for name, _, offset, size in struct.iter_unpack(">12sBII", bundle[DIRECTORY_START:end]):
        stem, _, suffix = name.rstrip(b"\0").decode("ascii").partition(".")
        if suffix == "SB":
            waveform, rate = soundfile.read(io.BytesIO(bundle[offset : offset + size]), dtype="float32")
            yield Clip(stem, soxr.resample(waveform, rate, SAMPLING_RATE))


def drascula_clips(cache: Path) -> Iterator[Clip]:
    """Lines of "Drascula: The Vampire Strikes Back", in English by speakers of other languages."""
    folder = fetch(DRASCULA, cache) / "usr/share/scummvm/drascula/en"
    for path in sorted(folder.glob("*.ALS")):
        yield Clip(path.stem, _from_bytes(path.read_bytes()))


def _from_bytes(samples: bytes) -> np.ndarray:
    """float32 [T] at SAMPLING_RATE of unsigned 8 bit at GAME_RATE."""
    waveform = (np.frombuffer(samples, np.uint8).astype(np.float32) - 128) / 128
    return soxr.resample(waveform, GAME_RATE, SAMPLING_RATE)


GAMES: dict[str, tuple[Package, Callable[[Path], Iterator[Clip]]]] = {
    "steelsky": (STEEL_SKY, steel_sky_clips),
    "queen": (AMAZON_QUEEN, amazon_queen_clips),
    "drascula": (DRASCULA, drascula_clips),
}
