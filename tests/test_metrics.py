"""Error rates against counts made by hand."""

import math
import sys

import pytest

from hf_speechllm import metrics
from hf_speechllm.metrics import (
    CharacterErrors,
    PairedDifference,
    WordErrors,
    bootstrap_rate_interval,
    bootstrap_wer_interval,
    character_errors,
    normalize_english,
    paired_bootstrap,
    word_errors,
)


def test_counts():
    errors = word_errors(["the cat sat on the mat", "good day"], ["the hat sat on mat", "good old day"])
    assert (errors.substitutions, errors.deletions, errors.insertions, errors.reference_words) == (1, 1, 1, 8)
    assert errors.wer == 3 / 8
    assert errors.cer == (1 + 4 + 4) / (22 + 8)


def test_empty_references_and_predictions():
    assert word_errors(["a b", "", "x"], ["a", "c d", ""]) == WordErrors(0, 2, 2, 3, 4 / 3, (2 + 3 + 1) / 4)
    assert word_errors(["", " "], ["", ""]) == WordErrors(0, 0, 0, 0, 0.0, 0.0)
    assert word_errors([], []) == WordErrors(0, 0, 0, 0, 0.0, 0.0)
    assert word_errors([""], ["a b"]) == WordErrors(0, 0, 2, 0, math.inf, math.inf)
    assert word_errors(["a b"], [""]) == WordErrors(0, 2, 0, 2, 1.0, 1.0)


def test_normalizer_is_applied_to_both_sides():
    assert word_errors(["Colour, twenty-one!"], ["color 21"]).wer == 1.0
    assert word_errors(["Colour, twenty-one!"], ["color 21"], normalize_english).wer == 0.0
    assert normalize_english("Mr. Smith won't pay $20 million, um, OK?") == "mister smith will not pay $20000000 ok"


def test_bootstrap_interval():
    references = ["a b c d"] * 100
    predictions = ["a b c d"] * 80 + ["a b c"] * 20
    low, high = bootstrap_wer_interval(references, predictions)
    assert 0.02 < low < 0.05 < high < 0.08
    # Binomial: standard error sqrt(0.2 * 0.8 / 100) / 4 = 0.01
    assert high - low == pytest.approx(2 * 1.96 * 0.01, rel=0.15)
    assert bootstrap_wer_interval(references, predictions) == (low, high)
    assert bootstrap_wer_interval(references, predictions, seed=1) != (low, high)
    assert bootstrap_wer_interval(references, references) == (0.0, 0.0)
    assert bootstrap_wer_interval(["A b."], ["a B"], normalize=normalize_english) == (0.0, 0.0)


def test_bootstrap_weighs_words_and_survives_empty_references():
    low, high = bootstrap_wer_interval(["a", "", ""], ["b", "", ""], n=50)
    assert (low, high) == (1.0, 1.0)


@pytest.mark.parametrize("function", [word_errors, bootstrap_wer_interval])
def test_wrong_arguments(function):
    with pytest.raises(ValueError, match=r"predictions: expected one per reference \(2\), got 1; use an empty string"):
        function(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="references: expected a list of strings, got one string"):
        function("a", ["a"])
    with pytest.raises(ValueError, match="predictions: expected a list of strings, got one string"):
        function(["a"], "a")


def test_bootstrap_wrong_arguments():
    with pytest.raises(ValueError, match="n: expected at least 1 draw, got 0"):
        bootstrap_wer_interval(["a"], ["a"], n=0)
    with pytest.raises(ValueError, match="references: expected at least one word in all references together, got none"):
        bootstrap_wer_interval([""], ["a"])


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match=r'word error rates need jiwer: pip install "hf-speechllm\[eval\]"'):
        word_errors(["a"], ["a"])
    with pytest.raises(ImportError, match="word error rates need jiwer"):
        bootstrap_wer_interval(["a"], ["a"])
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    metrics._english_normalizer.cache_clear()
    with pytest.raises(ImportError, match=r"Whisper-normalised texts need whisper-normalizer: pip install .*\[eval\]"):
        normalize_english("a")


def test_evaluate_metrics_need_no_network(tmp_path):
    pytest.importorskip("evaluate")
    from hf_speechllm.evaluate_metrics import CER, WER

    texts = {"predictions": ["the hat sat", ""], "references": ["the cat sat", "down"]}
    counts = {"substitutions": 1, "deletions": 1, "insertions": 0, "reference_words": 4}
    assert WER(cache_dir=str(tmp_path)).compute(**texts) == {"wer": 0.5, **counts}
    metric = CER(cache_dir=str(tmp_path))
    metric.add_batch(predictions=["ab"], references=["ac"])
    assert metric.compute() == {"cer": 0.5}


def test_interval_of_counts_is_that_of_the_texts():
    references, predictions = ["a b c d"] * 9 + [""], ["a b c"] * 4 + ["a b c d"] * 5 + ["x"]
    errors = [1] * 4 + [0] * 5 + [1]
    expected = bootstrap_wer_interval(references, predictions)
    assert bootstrap_rate_interval(errors, [4] * 9 + [0]) == expected


def test_paired_bootstrap_needs_fewer_utterances_than_two_intervals():
    # Hard utterances are hard for both; the second system is a little better on every fourth.
    first = [4, 0] * 100
    second = [3, 0, 4, 0] * 50
    words = [10] * 200
    result = paired_bootstrap(first, second, words)
    assert result.difference == (sum(second) - sum(first)) / 2000
    # Binomial: standard error sqrt(0.25 * 0.75 / 200) / 10
    assert result.high - result.low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 200) ** 0.5 / 10, rel=0.15)
    assert result.high < 0 and result.p_value == pytest.approx(2 / 1001)
    low, high = bootstrap_rate_interval(first, words)
    assert low < sum(second) / 2000 < high
    swapped = paired_bootstrap(second, first, words)
    assert (swapped.low, swapped.high) == (-result.high, -result.low) and swapped.p_value == result.p_value


def test_paired_bootstrap_of_equal_systems():
    assert paired_bootstrap([1, 0], [1, 0], [2, 2]) == PairedDifference(0.0, 0.0, 0.0, 1.0)


def test_paired_bootstrap_wrong_arguments():
    with pytest.raises(ValueError, match=r"errors, words: expected one of each per utterance, got \[2, 1, 2\]"):
        paired_bootstrap([1, 2], [1], [3, 3])
    with pytest.raises(ValueError, match="n: expected at least 1 draw, got 0"):
        paired_bootstrap([1], [1], [1], n=0)
    with pytest.raises(ValueError, match="expected at least one word in all references together, got none"):
        paired_bootstrap([1], [1], [0])


def test_character_errors():
    assert character_errors(["ab c", ""], ["abc", "x"]) == CharacterErrors(errors=2, reference_characters=4)
