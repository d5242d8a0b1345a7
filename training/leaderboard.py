"""What the Open ASR Leaderboard fixes: data sets, names of manifests, text normaliser. State of September 2026.

    python -m training.leaderboard results/*.jsonl [--repository CLONE [--eval-results open_asr_leaderboard.yaml]]

prints the WER of manifests (of `training/leaderboard_kit`, of `training.evaluate_asr --leaderboard-dir`, or anyone's)
by the leaderboard's rules, and per system the mean over its data sets and RTFx: seconds of audio / of recognition.
--eval-results writes these figures for the folder `.eval_results` of a model on the Hub (training/publish.py).

The leaderboard's normaliser is Whisper's with changes that grow from month to month. Figures for publication need its
own code: `--repository` names a clone of github.com/huggingface/open_asr_leaderboard. Without one,
[`leaderboard_normalizer`] has the changes known here, except the table of spellings of names and times of the clock.
"""

import argparse
import datetime
import importlib
import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_speechllm.metrics import Normalizer, english_normalizer
from training.command_line import errors_in_one_line, make_parent
from training.evaluation_data import UsageError, read_json_lines
from training.scoring import counts, score_utterance

DATASET_PATH = "hf-audio/open-asr-leaderboard"
# Name -> (path, configuration, split) for `datasets.load_dataset`; the mean is over these, each of the same weight.
DATASETS: dict[str, tuple[str, str | None, str]] = {
    "ami": (DATASET_PATH, "ami_cleaned", "test"),
    # In pieces, with one reference for all pieces of a recording: only training/leaderboard_kit can read it.
    "earnings22": ("ArtificialAnalysis/Earnings22-Cleaned-AA-chunked", None, "test"),
    "gigaspeech": (DATASET_PATH, "gigaspeech_cleaned", "test"),
    "librispeech-clean": (DATASET_PATH, "librispeech", "test.clean"),
    "librispeech-other": (DATASET_PATH, "librispeech", "test.other"),
    "monsoon-en-in": ("VoiceArena/Monsoon_en_IN_test", None, "test"),
    "spgispeech": (DATASET_PATH, "spgispeech", "test"),
    "voxpopuli": (DATASET_PATH, "voxpopuli_cleaned_aa", "test"),
}

# Fields of a manifest whose rows are pieces of recordings: the recording, and the place of the piece in it.
PARENT_FIELD, PIECE_FIELD = "parent_id", "chunk_index"
# Tasks of the benchmark on the Hub, by data set; it has none for the others yet.
TASK_IDS = {
    "ami": "ami_wer",
    "earnings22": "earnings22_wer",
    "gigaspeech": "gigaspeech_wer",
    "librispeech-clean": "librispeech_clean_wer",
    "librispeech-other": "librispeech_other_wer",
    "spgispeech": "spgispeech_wer",
    "voxpopuli": "voxpopuli_wer",
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
            raise UsageError(
                f"repository: expected a clone of the leaderboard's code, with normalizer/__init__.py, got {repository}"
            )
        sys.path.insert(0, str(repository))
        try:
            return importlib.import_module("normalizer").EnglishTextNormalizer()
        except (ImportError, AttributeError) as error:
            raise UsageError(f"repository: the normaliser of {repository} cannot be imported ({error})") from error
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


def merge_pieces(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of pieces (with `parent_id` and `chunk_index`) to one row per recording; other rows as they are.

    Each piece carries the reference of the whole recording: their texts are joined, durations and times added up.
    """
    if not any(PARENT_FIELD in row for row in rows):
        return rows
    recordings: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        recordings.setdefault(row[PARENT_FIELD], []).append(row)
    merged = []
    for pieces in recordings.values():
        pieces.sort(key=lambda row: row[PIECE_FIELD])
        merged.append(
            {
                "text": pieces[0]["text"],
                "pred_text": " ".join(text for row in pieces if (text := row["pred_text"].strip())),
                "duration": sum(row["duration"] for row in pieces),
                "time": sum(row["time"] for row in pieces),
            }
        )
    return merged


def score_manifest(path: Path, normalize: Normalizer) -> dict[str, Any]:
    """`system`, `dataset`, `wer` (percent, None without reference words), `duration_s` and `time_s` of a manifest.

    Raises:
        UsageError: the file is missing or has no line, or a line is no JSON object or lacks a field.
    """
    rows = merge_pieces(list(read_json_lines(path, ("text", "pred_text", "duration", "time"))))
    if not rows:
        raise UsageError(f"{path}: expected at least one utterance, got none")
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


def rtfx(rows: Iterable[dict[str, Any]]) -> float | None:
    """Seconds of audio per second of recognition, of rows of [`score_manifest`]; None where nobody measured that."""
    rows = list(rows)
    time_s = sum(row["time_s"] for row in rows)
    return round(sum(row["duration_s"] for row in rows) / time_s, 2) if time_s > 0 else None


def data_set_names() -> dict[str, str]:
    """Names of data sets by what the manifests are called after `_DATASET_`."""
    return {
        manifest_name("", *source).removesuffix(".jsonl").partition("_DATASET_")[2]: name
        for name, source in DATASETS.items()
    }


def eval_results(rows: list[dict[str, Any]], source_url: str | None = None) -> list[EvalResultEntry]:
    """Figures of one system for the Hub: each data set's WER, RTFx, and the mean if all data sets are there.

    Args:
        rows: of [`score_manifest`], with the leaderboard's own normaliser.
        source_url: where the manifests can be seen.

    Raises:
        UsageError: the rows are of several systems, or of none of the leaderboard's data sets.
    """
    systems = sorted({row["system"] for row in rows})
    if len(systems) != 1:
        raise UsageError(f"--eval-results: expected manifests of one system, got {', '.join(systems)}")
    names = data_set_names()
    scored = {names[row["dataset"]]: row for row in rows if row["dataset"] in names and row["wer"] is not None}
    if not scored:
        raise UsageError("--eval-results: expected manifests of the leaderboard's data sets, got none")
    values = {TASK_IDS[name]: scored[name]["wer"] for name in scored if name in TASK_IDS}
    if (speed := rtfx(scored.values())) is not None:
        values["rtfx"] = speed
    if scored.keys() == DATASETS.keys():
        values["mean_wer"] = sum(row["wer"] for row in scored.values()) / len(scored)
    date = datetime.date.today().isoformat()
    return [
        EvalResultEntry(DATASET_PATH, task_id, round(value, 2), date=date, source_url=source_url)
        for task_id, value in sorted(values.items())
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "manifests",
        nargs="+",
        type=Path,
        metavar="MANIFEST.jsonl",
        help="with text, pred_text, duration and time (seconds of recognition); its name tells system and data set",
    )
    add("--repository", type=Path, metavar="CLONE", help="of the leaderboard's code, for its own normaliser")
    add("--eval-results", type=Path, metavar="YAML", help="write the figures there, for `.eval_results` on the Hub")
    add("--source", metavar="URL", help="where the manifests can be seen, for --eval-results")
    arguments = parser.parse_args()
    with errors_in_one_line("leaderboard"):
        if arguments.eval_results is not None and arguments.repository is None:
            raise UsageError("--eval-results: needs --repository, since figures to publish need its own normaliser")
        normalize = leaderboard_normalizer(arguments.repository)
        rows = [score_manifest(path, normalize) for path in arguments.manifests]
        if arguments.eval_results is not None:
            make_parent("--eval-results", arguments.eval_results)
            entries = eval_result_entries_to_yaml(eval_results(rows, arguments.source))
            arguments.eval_results.write_text(yaml.safe_dump(entries, sort_keys=False))
    systems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        systems.setdefault(row["system"], []).append(row)
    for system, sets in systems.items():
        for row in sets:
            print(f"{system}\t{row['dataset']}\t{'-' if row['wer'] is None else format(row['wer'], '.2f')}")
        rates = [row["wer"] for row in sets if row["wer"] is not None]
        mean = format(sum(rates) / len(rates), ".2f") if rates else "-"
        print(json.dumps({"system": system, "mean_wer": mean, "data_sets": len(rates), "rtfx": rtfx(sets)}))


if __name__ == "__main__":
    main()
