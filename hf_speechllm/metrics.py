"""Word and character error rates with their parts and a confidence interval, computed without any download.

Needs jiwer, and whisper-normalizer for `normalize_english`: `pip install "hf-speechllm[eval]"`.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Normalizer = Callable[[str], str]


@dataclass(frozen=True)
class WordErrors:
    """Errors summed over a set of utterances.

    `wer` and `cer` are fractions of the reference words and characters (spaces count as characters). They are 0.0
    when there is neither reference nor error and infinite when words were inserted into an empty reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    reference_words: int
    wer: float
    cer: float


def word_errors(
    references: Sequence[str], predictions: Sequence[str], normalize: Normalizer | None = None
) -> WordErrors:
    """Align predictions with references and count the errors.

    Args:
        references: what was said, one string per utterance; may be empty strings.
        predictions: what was recognised, in the same order.
        normalize: applied to both sides first, for example `normalize_english`; None compares the strings as they are.

    Raises:
        ValueError: different numbers of references and predictions.
        ImportError: jiwer is not installed.
    """
    references, predictions = _normalized_pairs(references, predictions, normalize)
    jiwer = _import_extra("jiwer", "word error rates")
    words = jiwer.process_words(list(references), list(predictions))
    characters = jiwer.process_characters(list(references), list(predictions))
    return WordErrors(
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        reference_words=words.hits + words.substitutions + words.deletions,
        wer=_rate(words),
        cer=_rate(characters),
    )


def bootstrap_wer_interval(
    references: Sequence[str],
    predictions: Sequence[str],
    n: int = 1000,
    seed: int = 0,
    normalize: Normalizer | None = None,
) -> tuple[float, float]:
    """95 % percentile interval of the WER, by drawing whole utterances with replacement.

    Args:
        references: what was said, one string per utterance, at least one word in all.
        predictions: what was recognised, in the same order.
        n: number of draws.
        seed: the same seed gives the same interval.
        normalize: as for `word_errors`.

    Returns:
        (low, high) as fractions. It covers the choice of utterances, not the choice of speakers or of training runs.

    Raises:
        ValueError: different numbers of references and predictions, no reference word, or n < 1.
        ImportError: jiwer is not installed.
    """
    references, predictions = _normalized_pairs(references, predictions, normalize)
    if n < 1:
        raise ValueError(f"n: expected at least 1 draw, got {n}")
    jiwer = _import_extra("jiwer", "word error rates")
    counts = np.zeros((len(references), 2), dtype=np.int64)  # utterance -> errors, reference words
    for row, reference, prediction in zip(counts, references, predictions, strict=True):
        output = jiwer.process_words(reference, prediction)
        row[:] = output.substitutions + output.deletions + output.insertions, len(reference.split())
    if counts[:, 1].sum() == 0:
        raise ValueError("references: expected at least one word in all references together, got none")
    generator = np.random.default_rng(seed)
    rates = []
    while len(rates) < n:
        errors, words = counts[generator.integers(0, len(counts), len(counts))].sum(axis=0)
        if words:  # a draw of empty references only has no rate
            rates.append(errors / words)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def normalize_english(text: str) -> str:
    """Whisper's English text normaliser: case, punctuation, fillers, contractions, numbers, spelling.

    Raises:
        ImportError: whisper-normalizer is not installed.
    """
    return _english_normalizer()(text)


@functools.cache
def _english_normalizer() -> Normalizer:
    return _import_extra("whisper_normalizer.english", "Whisper-normalised texts").EnglishTextNormalizer()


def _rate(output: Any) -> float:
    """Errors per reference unit; jiwer itself returns a count, not a rate, for an empty reference."""
    errors = output.substitutions + output.deletions + output.insertions
    units = output.hits + output.substitutions + output.deletions
    if units == 0:
        return math.inf if errors else 0.0
    return errors / units


def _normalized_pairs(
    references: Sequence[str], predictions: Sequence[str], normalize: Normalizer | None
) -> tuple[list[str], list[str]]:
    for parameter, texts in (("references", references), ("predictions", predictions)):
        if isinstance(texts, str):  # would be compared letter by letter
            raise ValueError(f"{parameter}: expected a list of strings, got one string; wrap it in a list")
    if len(references) != len(predictions):
        raise ValueError(
            f"predictions: expected one per reference ({len(references)}), got {len(predictions)}; "
            "use an empty string for an utterance without output"
        )
    if normalize is None:
        return list(references), list(predictions)
    return [normalize(text) for text in references], [normalize(text) for text in predictions]


def _import_extra(module: str, purpose: str) -> Any:
    """Import an optional dependency of the extra "eval" on first use."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ImportError(f'{purpose} need {package}: pip install "hf-speechllm[eval]" ({error})') from error
