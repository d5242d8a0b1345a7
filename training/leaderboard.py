"""What the Open ASR Leaderboard fixes: data sets, names of manifests, text normaliser. State of August 2026.

    python -m training.leaderboard results/*.jsonl [--repository CLONE]

prints the WER of manifests (of `training.evaluate_asr --leaderboard-dir`, or anyone's) by the leaderboard's rules, and
per system the mean over its data sets and RTFx = seconds of audio / seconds of recognition.

The leaderboard's normaliser is Whisper's with changes that grow from month to month. Figures for publication need its
own code: `--repository` names a clone of github.com/huggingface/open_asr_leaderboard. Without one,
[`leaderboard_normalizer`] has the changes known here, except the table of spellings of names and times of the clock.
"""

import argparse
import importlib
import json
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from hf_speechllm.metrics import Normalizer, english_normalizer
from training.evaluation_data import UsageError, read_json_lines
from training.scoring import counts, score_utterance

DATASET_PATH = "hf-audio/open-asr-leaderboard"
# Name -> (path, configuration, split) for `datasets.load_dataset`; the mean is over these, each of the same weight.
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "ami": (DATASET_PATH, "ami_cleaned", "test"),
    "earnings22": ("hf-audio/Earnings22-Cleaned-AA-chunked", None, "test"),
    "gigaspeech": (DATASET_PATH, "gigaspeech_cleaned", "test"),
    "librispeech-clean": (DATASET_PATH, "librispeech", "test.clean"),
    "librispeech-other": (DATASET_PATH, "librispeech", "test.other"),
    "spgispeech": (DATASET_PATH, "spgispeech", "test"),
    "voxpopuli": (DATASET_PATH, "voxpopuli_cleaned_aa", "test"),
}

# Contractions that whisper-normalizer expands and the leaderboard does not.
_NOT_EXPANDED = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")
_IS = r"\b(it|s?he|what|that|who|t?here|how|when|where|why|this)'s\b"  # after other words 's is a possessive
_SPELLINGS = {"ok": "okay", "kay": "okay", "etcetera": "etc"}
_FILLERS = (
    r"\b(?:ah-ha|a+h+(?:m*|a+)|e+(?:h+m*|m+|r+m*)|h+(?:a+|e+|u+)h+|h+m+|m{2,}|m+h+m*|t+s+k+"
    r"|u+(?:g+h+|h+m*|h+u+[hm]*|m+h*)|ahem|ehehe?|ehr|hmmph|hunh|hum|mhum|mmkay)\b"
)
# Words that are written in several ways; the symbols between them are gone by then.
_COMPOUNDS = {
    r"\bet cetera\b": "etc",
    r"\ball? right\b": "alright",
    r"\bhow ever\b": "however",
    r"\b(wi|hi|lo|sci) fi\b": r"\1fi",
    r"\be (mail|book|commerce)\b": r"e\1",
    r"\bx ray\b": "xray",
    r"\bt shirt\b": "tshirt",
    r"\b(a|p) m\b": r"\1m",
    r"\bo k\b": "okay",
    r"\b(?:o+h+|ooo+)\b": "oh",
}


def leaderboard_normalizer(repository: Path | None = None) -> Normalizer:
    """The leaderboard's English text normaliser.

    Args:
        repository: a clone of the leaderboard's code, whose normaliser is used; None for the rules above.

    Raises:
        UsageError: `repository` is no such clone, or what it needs is not installed.
        ImportError: whisper-normalizer is not installed.
    """
    if repository is not None:
        if not (repository / "normalizer" / "__init__.py").is_file():
            raise UsageError(f"--leaderboard-repository: expected a clone with normalizer/__init__.py in {repository}")
        sys.path.insert(0, str(repository))
        try:
            return importlib.import_module("normalizer").EnglishTextNormalizer()
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--leaderboard-repository: its normaliser cannot be imported ({error})") from error
        finally:
            sys.path.remove(str(repository))
    normalizer = english_normalizer()
    normalizer.ignore_patterns = _FILLERS
    normalizer.replacers = {
        _IS if pattern == r"'s\b" else pattern: r"\1 is" if pattern == r"'s\b" else text
        for pattern, text in normalizer.replacers.items()
        if pattern not in _NOT_EXPANDED
    } | {r"\.(?![0-9])": " "}
    numbers, spellings = normalizer.standardize_numbers, normalizer.standardize_spellings
    spellings.mapping = {**spellings.mapping, **_SPELLINGS}

    def compounds_and_numbers(text: str) -> str:
        text = " ".join(text.split())
        for pattern, replacement in _COMPOUNDS.items():
            text = re.sub(pattern, replacement, text)
        return numbers(text)

    normalizer.standardize_numbers = compounds_and_numbers
    normalizer.standardize_spellings = lambda text: join_acronyms(spellings(text))
    # Whisper's leaves symbols without a number alone at the ends of a text.
    return lambda text: re.sub(r"[.$¢€£](?![0-9])|(?<![0-9])%", " ", normalizer(text))


def join_acronyms(text: str) -> str:
    """Letters and digits that stand alone in a row become one word: "b b c" -> "bbc", "u s a" -> "usa".

    "a" and "i" are words of their own, so a row with one of these needs three.
    """
    words: list[str] = []
    for is_single, group in groupby(text.split(), lambda word: len(word) == 1 and word.isalnum()):
        row = list(group)
        is_acronym = is_single and len(row) >= (3 if {"a", "i"} & set(row) else 2)
        words += ["".join(row)] if is_acronym else row
    return " ".join(words)


def is_scored(normalized: str) -> bool:
    """Whether the leaderboard keeps an utterance with this normalised reference."""
    return normalized.strip() not in ("", "ignore time segment in scoring")


def manifest_name(system: str, path: str, configuration: str | None, split: str) -> str:
    """The leaderboard's file name: `MODEL_{org-name}_DATASET_{path}_{configuration}_{split}.jsonl`."""
    model, path, configuration = (part.replace("/", "-") for part in (system, path, configuration or ""))
    return f"MODEL_{model}_DATASET_{path}_{configuration}_{split}.jsonl"


def score_manifest(path: Path, normalize: Normalizer) -> dict[str, Any]:
    """`system`, `dataset`, `wer` (percent, None without reference words), `duration_s` and `time_s` of a manifest.

    Raises:
        UsageError: the file is missing, or a line is no JSON object or lacks a field.
    """
    rows = list(read_json_lines(path, ("text", "pred_text", "duration", "time")))
    scores = [score_utterance(normalize(row["text"]), normalize(row["pred_text"]), True) for row in rows]
    errors, words = counts(scores)
    system, _, dataset = path.stem.removeprefix("MODEL_").partition("_DATASET_")
    return {
        "system": system,
        "dataset": dataset or path.stem,
        "wer": 100 * float(errors.sum() / words.sum()) if words.sum() else None,
        "duration_s": sum(row["duration"] for row in rows),
        "time_s": sum(row["time"] for row in rows),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path)
    parser.add_argument("--repository", type=Path, help="clone of the leaderboard's code, for its own normaliser")
    arguments = parser.parse_args()
    try:
        normalize = leaderboard_normalizer(arguments.repository)
        rows = [score_manifest(path, normalize) for path in arguments.manifests]
    except UsageError as error:
        parser.error(str(error))
    systems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        systems.setdefault(row["system"], []).append(row)
    for system, sets in systems.items():
        for row in sets:
            print(f"{system}\t{row['dataset']}\t{'-' if row['wer'] is None else format(row['wer'], '.2f')}")
        rates = [row["wer"] for row in sets if row["wer"] is not None]
        mean = format(sum(rates) / len(rates), ".2f") if rates else "-"
        rtfx = sum(row["duration_s"] for row in sets) / sum(row["time_s"] for row in sets)
        print(json.dumps({"system": system, "mean_wer": mean, "data_sets": len(rates), "rtfx": round(rtfx, 2)}))


if __name__ == "__main__":
    main()
