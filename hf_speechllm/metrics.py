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
    _check_draws(n)
    jiwer = _import_extra("jiwer", "word error rates")
    errors = []
    for reference, prediction in zip(references, predictions, strict=True):
        output = jiwer.process_words(reference, prediction)
        errors.append(output.substitutions + output.deletions + output.insertions)
    return bootstrap_rate_interval(errors, [len(reference.split()) for reference in references], n, seed)


def bootstrap_rate_interval(
    errors: Sequence[int], words: Sequence[int], n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of errors per word, by drawing whole utterances with replacement.

    Args:
        errors: of each utterance.
        words: reference words of each utterance, at least one in all.
        n: number of draws.
        seed: the same seed gives the same interval.

    Returns:
        (low, high) as fractions. It covers the choice of utterances, not the choice of speakers or of training runs.

    Raises:
        ValueError: different numbers of errors and words, no reference word, or n < 1.
    """
    rates = [drawn[0] / drawn[1] for drawn in _draws([errors, words], n, seed)]
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class PairedDifference:
    """How much more errors per reference word the second of two systems makes: `difference`, with a 95 % interval.

    `p_value` is two-sided: how often a difference of the other sign, or none, is drawn.
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    first_errors: Sequence[int], second_errors: Sequence[int], words: Sequence[int], n: int = 1000, seed: int = 0
) -> PairedDifference:
    """Compare two systems on the same utterances (Bisani and Ney, ICASSP 2004, section 4).

    Both are scored on each draw of utterances, so what makes an utterance hard for both cancels.

    Args:
        first_errors: of each utterance, by the first system.
        second_errors: likewise, by the second.
        words: reference words of each utterance, at least one in all.
        n: number of draws.
        seed: the same seed gives the same result.

    Raises:
        ValueError: different numbers of errors and words, no reference word, or n < 1.
    """
    draws = _draws([first_errors, second_errors, words], n, seed)
    differences = np.array([(second - first) / words for first, second, words in draws])
    low, high = np.percentile(differences, [2.5, 97.5])
    # The observed data count as one more draw: no finite number of draws shows that p is zero.
    tails = [(1 + np.count_nonzero(sign * differences <= 0)) / (1 + n) for sign in (1, -1)]
    observed = (sum(second_errors) - sum(first_errors)) / sum(words)
    return PairedDifference(float(observed), float(low), float(high), min(1.0, 2 * float(min(tails))))


def _draws(columns: Sequence[Sequence[int]], n: int, seed: int) -> list[np.ndarray]:
    """Sums of each column (one entry per utterance, the last one words) over `n` draws of as many utterances."""
    _check_draws(n)
    if len({len(column) for column in columns}) != 1:
        raise ValueError(
            f"errors, words: expected one of each per utterance, got {[len(column) for column in columns]}"
        )
    counts = np.array(columns, dtype=np.int64).T
    if counts[:, -1].sum() == 0:
        raise ValueError("references: expected at least one word in all references together, got none")
    generator = np.random.default_rng(seed)
    draws: list[np.ndarray] = []
    while len(draws) < n:
        drawn = counts[generator.integers(0, len(counts), len(counts))].sum(axis=0)
        if drawn[-1]:  # a draw of empty references only has no rate
            draws.append(drawn)
    return draws


def _check_draws(n: int) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least 1 draw, got {n}")


@dataclass(frozen=True)
class CharacterErrors:
    """Character edits and reference characters, spaces included, summed over a set of utterances."""

    errors: int
    reference_characters: int


def character_errors(references: Sequence[str], predictions: Sequence[str]) -> CharacterErrors:
    """Align predictions with references by characters and count the errors.

    Raises:
        ValueError: different numbers of references and predictions.
        ImportError: jiwer is not installed.
    """
    references, predictions = _normalized_pairs(references, predictions, None)
    output = _import_extra("jiwer", "character error rates").process_characters(references, predictions)
    return CharacterErrors(*_edits_and_units(output))


def normalize_english(text: str) -> str:
    """Whisper's English text normaliser: case, punctuation, fillers, contractions, numbers, spelling.

    Raises:
        ImportError: whisper-normalizer is not installed.
    """
    return _english_normalizer()(text)


def english_normalizer() -> Any:
    """A new `EnglishTextNormalizer` of whisper-normalizer, to be changed at will.

    Raises:
        ImportError: whisper-normalizer is not installed.
    """
    return _import_extra("whisper_normalizer.english", "Whisper-normalised texts").EnglishTextNormalizer()


_english_normalizer = functools.cache(english_normalizer)


def _rate(output: Any) -> float:
    """Errors per reference unit; jiwer itself returns a count, not a rate, for an empty reference."""
    errors, units = _edits_and_units(output)
    if units == 0:
        return math.inf if errors else 0.0
    return errors / units


def _edits_and_units(output: Any) -> tuple[int, int]:
    """Edits and reference units of jiwer's output."""
    hits, substitutions, deletions = output.hits, output.substitutions, output.deletions
    return substitutions + deletions + output.insertions, hits + substitutions + deletions


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
