"""Error rates against counts made by hand."""

import math
import sys

import pytest

from hf_speechllm import metrics
from hf_speechllm.metrics import WordErrors, bootstrap_wer_interval, normalize_english, word_errors


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
