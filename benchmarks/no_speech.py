"""What recognisers make up: inputs without speech, and real prompts that break off in the middle of a word.

    OMP_NUM_THREADS=1 python -m benchmarks.no_speech data/real/asterisk_2s.jsonl

Silence, white noise, hum, chords and chirps are synthetic (seeded). Prompts are cut in the middle of a word, as near as
can be to 25, 50 and 75 % of their length; where words lie comes from the CTC alignment of the reference with the
model's own CTC head. The reference of a cut prompt ends with the word that was cut: whatever is made of half a word
counts as that word, all that follows is beyond what was said. Systems are those of `benchmarks.systems`, each decodes
in a process of its own through `training.evaluate_asr`; a run that was interrupted goes on where it stopped.

*words*: that the references have. *beyond*: inserted words; on inputs without speech these are all words.
*clips*: with any such word. *in a row*: inserted words in runs of three or more. *loops*: clips in which up to 8 words
are said three times in a row or more, and more often than they were.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm
from transformers import AutomaticSpeechRecognitionPipeline

from benchmarks.systems import SYSTEMS, Settings, choose, decode
from hf_speechllm.audio import SAMPLING_RATE
from hf_speechllm.ctc_alignment import AlignedWord, align, word_times
from hf_speechllm.processing_speechllm import IGNORE_INDEX
from training.command_line import errors_in_one_line
from training.evaluation_data import UsageError, Utterance, read_manifest
from training.html_report import SystemReport
from training.recognisers import is_speech_llm, load_pipeline

SHARES = (0.25, 0.5, 0.75)
DURATIONS_S = (2.0, 5.0, 10.0, 20.0)
MIN_WORDS = 8  # of a prompt to be cut: at 25 % there should be some left
MAX_PROMPT_S = 15.0
LEVEL = 0.05  # standard deviation of sounds, full scale 1: about as loud as speech
NUM_HARMONICS = 8
NOTE_S = 0.5
MANIFEST = "inputs.jsonl"
HEADER = """\
| input | clips | system | words | beyond | clips with any | in a row | loops |
|:--|--:|:--|--:|--:|--:|--:|--:|"""


@dataclass(frozen=True)
class Row:
    """What a system made of the inputs of a kind; see the head of this file."""

    kind: str
    system: str
    clips: int
    reference_words: int
    inserted_words: int
    clips_with_insertions: int
    inserted_run_words: int
    loops: int


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    with errors_in_one_line("no_speech"):
        rows = measure(arguments)
    path = arguments.output / "no_speech.jsonl"
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    print(table(rows))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="JSONL manifest of the prompts to cut")
    add(
        "--system",
        action="append",
        choices=SYSTEMS,
        metavar="SYSTEM",
        help=f"{', '.join(SYSTEMS)}; repeatable (default: llm and joint)",
    )
    add("--prompts", type=int, default=40, help="how many are cut, each three times (default: 40)")
    add("--clips", type=int, default=8, help="of each kind without speech (default: 8)")
    add("--seed", type=int, default=0, help="of the sounds without speech (default: 0)")
    add("--model", help="folder, Hub id or base:NAME (default: the model of this package)")
    add("--batch-size", type=int, default=8, help="clips of similar length per batch (default: 8)")
    add("--output", type=Path, default=Path("build/no_speech"), help="folder of clips and texts (default: %(default)s)")
    return parser


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Make the inputs, decode them with every system, count."""
    for name in ("prompts", "clips"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    systems = choose(arguments.system or ["llm", "joint"], [])
    pipe = load_pipeline(arguments.model, "cpu")
    if not is_speech_llm(pipe) or pipe.model.config.ctc_token_ids is None:
        raise UsageError("--model: expected a speech LLM whose CTC labels are tokens; they tell where words lie")
    prompts = [
        utterance
        for utterance in read_manifest(arguments.data)
        if utterance.entry["duration"] <= MAX_PROMPT_S and len(utterance.entry["text"].split()) >= MIN_WORDS
    ]
    entries = write_clips(arguments.output, arguments.clips, arguments.seed)
    for utterance in tqdm(prompts[: arguments.prompts], desc="alignments", unit="utt", disable=None):
        entries += cut_entries(utterance, find_words(pipe, utterance))
    manifest = arguments.output / MANIFEST
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    settings = Settings(manifest, arguments.output, arguments.model, batch_size=arguments.batch_size)
    reports = decode(systems, settings)
    kinds = [entry["kind"] for entry in entries]
    return [count(kind, report, kinds) for kind in dict.fromkeys(kinds) for report in reports]


def silence(generator: np.random.Generator, num_samples: int) -> np.ndarray:
    """Digital silence [samples]."""
    return np.zeros(num_samples)


def white_noise(generator: np.random.Generator, num_samples: int) -> np.ndarray:
    """White noise [samples]."""
    return generator.normal(size=num_samples)


def hum(generator: np.random.Generator, num_samples: int) -> np.ndarray:
    """The mains: 50 or 60 Hz with harmonics that fall off [samples]."""
    time_s = np.arange(num_samples) / SAMPLING_RATE
    frequency_hz = generator.choice([50.0, 60.0])
    phases = generator.uniform(0, 2 * np.pi, NUM_HARMONICS)
    harmonics = enumerate(phases, start=1)
    return sum(np.sin(2 * np.pi * frequency_hz * n * time_s + phase) / n for n, phase in harmonics)


def chords(generator: np.random.Generator, num_samples: int) -> np.ndarray:
    """Chords of three tones of a scale, struck twice a second, which fade [samples]."""
    note = round(NOTE_S * SAMPLING_RATE)
    time_s = np.arange(note) / SAMPLING_RATE
    scale_hz = 220.0 * 2 ** (np.array([0, 2, 4, 5, 7, 9, 11, 12, 14, 16, 17, 19]) / 12)
    parts = []
    for _ in range(-(-num_samples // note)):
        tones_hz = generator.choice(scale_hz, 3, replace=False)
        harmonics = [(tone_hz * n, 1 / n) for tone_hz in tones_hz for n in (1, 2, 3)]
        parts.append(
            np.exp(-4 * time_s)
            * sum(level * np.sin(2 * np.pi * frequency_hz * time_s) for frequency_hz, level in harmonics)
        )
    return np.concatenate(parts)[:num_samples]


def chirps(generator: np.random.Generator, num_samples: int) -> np.ndarray:
    """Tones that glide for half a second each from one frequency to another [samples]."""
    note = round(NOTE_S * SAMPLING_RATE)
    ends_hz = generator.uniform(200, 4000, size=1 + -(-num_samples // note))
    frequency_hz = np.concatenate([np.linspace(*pair, note) for pair in zip(ends_hz, ends_hz[1:], strict=False)])
    return np.sin(2 * np.pi * np.cumsum(frequency_hz[:num_samples]) / SAMPLING_RATE)


SOUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "silence": silence,
    "white noise": white_noise,
    "hum": hum,
    "chords": chords,
    "chirps": chirps,
}


def write_clips(folder: Path, clips: int, seed: int) -> list[dict[str, str | float]]:
    """Clips without speech as FLAC in `folder`, and their entries of the manifest; durations take turns."""
    entries = []
    for kind, sound in SOUNDS.items():
        generator = np.random.default_rng([seed, *kind.encode()])
        for number in range(clips):
            waveform = sound(generator, round(DURATIONS_S[number % len(DURATIONS_S)] * SAMPLING_RATE))
            waveform = LEVEL * waveform / max(waveform.std(), 1e-9)
            path = folder / f"{kind.replace(' ', '_')}_{number}.flac"
            sf.write(path, np.clip(waveform, -1, 1), SAMPLING_RATE, "PCM_16")
            entries.append({"audio_filepath": path.name, "text": "", "kind": kind})
    return entries


@torch.no_grad()
def find_words(pipe: AutomaticSpeechRecognitionPipeline, utterance: Utterance) -> list[AlignedWord]:
    """Where the words of the reference lie, by the CTC head of a speech LLM.

    Raises:
        UsageError: the CTC head cannot write the reference in the time that there is.
    """
    config, tokenizer = pipe.model.config, pipe.tokenizer
    waveform = utterance.waveform(pipe.processor.sampling_rate)
    inputs = pipe.processor(waveform, utterance.entry["text"], sampling_rate=pipe.processor.sampling_rate)
    audio = pipe.model.encode(inputs["input_features"], inputs["input_features_mask"])
    try:
        targets = pipe.model.ctc_targets(inputs["labels"])
        labels = [targets[targets != IGNORE_INDEX].tolist()]
        (aligned,) = align(audio.ctc_log_probs, audio.encoder_out_lens, labels, config.blank_id)
    except ValueError as error:
        raise UsageError(f"{utterance.entry['audio_filepath']}: {utterance.entry['text']!r}: {error}") from error

    def spell(labels: tuple[int, ...]) -> str:
        return tokenizer.decode([config.ctc_token_ids[label] for label in labels], clean_up_tokenization_spaces=False)

    seconds_per_frame = utterance.entry["duration"] / int(audio.encoder_out_lens[0])
    return word_times(aligned, spell, seconds_per_frame=seconds_per_frame)


def cut_entries(utterance: Utterance, words: Sequence[AlignedWord]) -> list[dict[str, str | float]]:
    """Entries of the manifest for a prompt that breaks off, one for each of SHARES.

    Args:
        utterance: the whole prompt.
        words: where its words lie, in their order.
    """
    middles_s = np.array([(word.start_s + word.end_s) / 2 for word in words])
    entries = []
    for share in SHARES:
        last = int(np.abs(middles_s - share * utterance.entry["duration"]).argmin())
        entries.append(
            {
                **utterance.entry,
                "audio_filepath": str(Path(utterance.entry["audio_filepath"]).resolve()),
                "offset": utterance.entry.get("offset", 0.0),
                "duration": float(middles_s[last]),
                "text": " ".join(word.word for word in words[: last + 1]),
                "kind": f"cut at {share:.0%}",
            }
        )
    return entries


def count(kind: str, report: SystemReport, kinds: Sequence[str]) -> Row:
    """What a system made of the inputs of one kind; `kinds` says of which each utterance is."""
    chosen = [number for number, other in enumerate(kinds) if other == kind]
    scores = [report.score.whisper[number] for number in chosen]
    signs = [report.score.hallucinations[number] for number in chosen]
    return Row(
        kind,
        report.name,
        clips=len(chosen),
        reference_words=sum(score.reference_words for score in scores),
        inserted_words=sum(score.insertions for score in scores),
        clips_with_insertions=sum(score.insertions > 0 for score in scores),
        inserted_run_words=sum(sign.inserted_run_words for sign in signs),
        loops=sum(sign.loop_repeats > 0 for sign in signs),
    )


def table(rows: Sequence[Row]) -> str:
    """The counts in Markdown."""
    lines = [
        f"| {row.kind} | {row.clips} | {row.system} | {row.reference_words} | {row.inserted_words} | "
        f"{row.clips_with_insertions} | {row.inserted_run_words} | {row.loops} |"
        for row in rows
    ]
    return "\n".join([HEADER, *lines])


if __name__ == "__main__":
    main()
