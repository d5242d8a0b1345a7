"""Alignment and counts against recursive definitions and jiwer; hallucinations and the leaderboard's rules by hand."""

import functools
import json
import sys

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import leaderboard
from training.evaluation_data import UsageError
from training.leaderboard import is_scored, leaderboard_normalizer, manifest_name, score_manifest
from training.scoring import align, find_hallucination, loop_repeats, score_system, score_utterance

WORDS = st.lists(st.sampled_from(["a", "aa", "aaa", "ç"]), max_size=6)


def fewest_errors(reference: tuple[str, ...], hypothesis: tuple[str, ...], merge_compounds: bool) -> int:
    """By definition: every way to split off the first words."""

    @functools.cache
    def best(r: int, h: int) -> int:
        if r == len(reference) or h == len(hypothesis):
            return len(reference) - r + len(hypothesis) - h
        costs = [1 + best(r + 1, h), 1 + best(r, h + 1), (reference[r] != hypothesis[h]) + best(r + 1, h + 1)]
        if merge_compounds:
            costs += [
                best(end, h + 1)
                for end in range(r + 2, len(reference) + 1)
                if "".join(reference[r:end]) == hypothesis[h]
            ]
            costs += [
                best(r + 1, end)
                for end in range(h + 2, len(hypothesis) + 1)
                if "".join(hypothesis[h:end]) == reference[r]
            ]
        return min(costs)

    return best(0, 0)


@given(WORDS, WORDS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_fewest_errors_and_consistent_counts(reference, hypothesis, merge_compounds):
    score = score_utterance(" ".join(reference), " ".join(hypothesis), merge_compounds)
    assert score.errors == fewest_errors(tuple(reference), tuple(hypothesis), merge_compounds)
    assert score.reference_words == len(reference)
    # The edits spell out both sides, in order.
    assert " ".join(edit.reference for edit in score.edits if edit.reference).split() == reference
    assert " ".join(edit.hypothesis for edit in score.edits if edit.hypothesis).split() == hypothesis
    for edit in score.edits:
        same = edit.reference.replace(" ", "") == edit.hypothesis.replace(" ", "")
        assert same == (edit.kind == "equal")
        assert (edit.kind == "insert") == (not edit.reference) and (edit.kind == "delete") == (not edit.hypothesis)


@given(WORDS.filter(bool), WORDS)
@settings(max_examples=100, deadline=None)
def test_same_rate_as_jiwer(reference, hypothesis):
    score = score_utterance(" ".join(reference), " ".join(hypothesis))
    assert score.errors / score.reference_words == pytest.approx(jiwer.wer(" ".join(reference), " ".join(hypothesis)))


def test_among_alignments_with_as_few_errors_the_one_with_most_correct_words():
    assert [edit.kind for edit in align(["a", "b"], ["b", "c"])] == ["delete", "equal", "insert"]


def test_compounds_keep_the_number_of_reference_words():
    score = score_utterance("the white paper", "the whitepaper", merge_compounds=True)
    assert (score.errors, score.reference_words) == (0, 3)
    assert score.edits[1].reference == "white paper" and score.edits[1].kind == "equal"
    assert score_utterance("the white paper", "the whitepaper").errors == 2
    assert score_utterance("u s a", "usa", True).errors == score_utterance("usa", "u s a", True).errors == 0
    assert score_utterance("ab c", "a bc", merge_compounds=True).errors == 2  # neither side is one word


@pytest.mark.parametrize(
    ("text", "repeats"),
    [("", 0), ("a", 1), ("a b c", 1), ("no no", 2), ("no no no", 3), ("x a b a b a b y", 3), ("a b a b a", 2)],
)
def test_loop_repeats(text, repeats):
    assert loop_repeats(text.split()) == repeats


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("good day", "good day", (0, 0, 0)),
        ("good day", "good old day", (0, 0, 0)),
        ("good day", "good and very long day", (3, 0, 0)),
        ("no no no", "no no no", (0, 0, 0)),
        ("no no no", "no no no no", (0, 4, 0)),
        ("", "thank you", (0, 0, 2)),
        ("", "thank you so much", (4, 0, 4)),
        ("", "", (0, 0, 0)),
        ("said", "", (0, 0, 0)),
    ],
)
def test_hallucinations(reference, hypothesis, expected):
    signs = find_hallucination(score_utterance(reference, hypothesis))
    assert (signs.inserted_run_words, signs.loop_repeats, signs.words_on_silence) == expected
    assert bool(signs) == any(expected)


def test_figures_of_a_system():
    references = ["The white paper costs twenty-one dollars.", "Colour, naïve!", "", "gone"]
    hypotheses = ["the whitepaper costs $21", "color naive", "thank you", ""]
    figures = score_system(references, hypotheses, leaderboard_normalizer()).figures
    assert figures["reference_words"] == 5 + 2 + 0 + 1  # the white paper costs $21
    assert figures["wer"] == pytest.approx(100 * (2 + 0 + 2 + 1) / 8)
    assert figures["leaderboard_wer"] == pytest.approx(100 * (2 + 1) / 8)
    assert [figures[name] for name in ("substitutions", "deletions", "insertions")] == [12.5, 25.0, 25.0]
    # Characters of the normalised texts: a space, two words on silence, a word that is gone.
    assert figures["cer"] == pytest.approx(100 * (1 + 9 + 4) / (len("the white paper costs $21") + 11 + 0 + 4))
    assert (figures["silence_utterances"], figures["silence_outputs"], figures["hallucinations"]) == (1, 1, 1)
    assert figures["wer_low"] <= figures["wer"] <= figures["wer_high"]


def test_no_reference_word_at_all_has_no_rate():
    figures = score_system(["", "?!"], ["you you you", ""], leaderboard_normalizer()).figures
    assert figures["wer"] is figures["leaderboard_wer"] is figures["cer"] is figures["wer_low"] is None
    assert (figures["silence_utterances"], figures["silence_outputs"], figures["loops"]) == (2, 1, 1)


def test_as_many_hypotheses_as_references():
    with pytest.raises(ValueError, match=r"hypotheses: expected one per reference \(2\), got 1"):
        score_system(["a", "b"], ["a"], leaderboard_normalizer())


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Ok, et cetera...", "okay etc"),
        ("The U.S.A. and the U.N. on the b b c", "the usa and the un on the bbc"),
        ("a big cat; i a", "a big cat i a"),
        ("e-mail at 5 p.m. wi-fi", "email at 5 pm wifi"),
        ("All right, kinda", "alright kinda"),
        ("ooh dear, ohhh dear, oh dear", "0 dear 0 dear 0 dear"),
        ("Ah-ha, mhmm, uhhh, erm, huh, hum, yes", "yes"),
        ("It's John's", "it is john s"),
        ("% of 5% in $", "of 5% in"),
        ("won't [noise] um twenty one", "will not 21"),
    ],
)
def test_leaderboard_normalizer(text, normalized):
    assert leaderboard_normalizer()(text).strip() == normalized


def test_the_leaderboards_changes_stay_out_of_whispers_normaliser():
    leaderboard_normalizer()
    assert score_system(["ok"], ["okay"], str.lower).figures["wer"] == 100.0


def test_a_clone_brings_its_own_normaliser(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "normalizer", raising=False)
    with pytest.raises(UsageError, match="repository: expected a clone .* with normalizer/__init__.py, got"):
        leaderboard_normalizer(tmp_path)
    (tmp_path / "normalizer").mkdir()
    module = tmp_path / "normalizer" / "__init__.py"
    module.write_text("import no_such_package")
    with pytest.raises(UsageError, match="the normaliser of .* cannot be imported .*no_such_package"):
        leaderboard_normalizer(tmp_path)
    module.write_text("class EnglishTextNormalizer:\n    def __call__(self, text): return text[::-1]\n")
    assert leaderboard_normalizer(tmp_path)("abc") == "cba"
    monkeypatch.delitem(sys.modules, "normalizer")


def test_manifests_of_the_leaderboard(tmp_path, monkeypatch, capsys):
    name = manifest_name("org/model", *leaderboard.DATASETS["librispeech-clean"])
    assert name == "MODEL_org-model_DATASET_hf-audio-open-asr-leaderboard_librispeech_test.clean.jsonl"
    assert manifest_name("o/m", "a/b", None, "test") == "MODEL_o-m_DATASET_a-b__test.jsonl"
    rows = [{"text": "the white paper.", "pred_text": "The whitepaper", "duration": 2.0, "time": 0.5}]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tmp_path / manifest_name("org/model", "p", None, "test")
    other.write_text(json.dumps({"text": "a b", "pred_text": "a", "duration": 1.0, "time": 0.5}) + "\n")
    row = score_manifest(tmp_path / name, leaderboard_normalizer())
    assert row["wer"] == 0.0 and row["system"] == "org-model"
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(tmp_path / name), str(other)])
    leaderboard.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"system": "org-model", "mean_wer": "25.00", "data_sets": 2, "rtfx": 3.0}
    assert not is_scored(" ") and not is_scored("ignore time segment in scoring") and is_scored("a")
