"""Texts for synthesis: what is read and what is written agree, and the dev split is stable."""

import json
import re

import numpy as np
import pytest

from training import texts
from training.numbers_to_words import number_words, ordinal_words, spell_numbers, year_words
from training.phrases import generate_phrase, read_lists
from training.texts import Sentence, SentenceSampler, is_dev, load_sentences, make_sentence, normalise, save_sentences


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (205, "two hundred five"), (7_000_021, "seven million twenty one")],
)
def test_number_words(number: int, words: str):
    assert number_words(number) == words


def test_number_out_of_range():
    with pytest.raises(ValueError, match="expected 0 <= number"):
        number_words(-1)


@pytest.mark.parametrize(
    ("number", "words"),
    [(1, "first"), (12, "twelfth"), (20, "twentieth"), (33, "thirty third"), (100, "one hundredth")],
)
def test_ordinal_words(number: int, words: str):
    assert ordinal_words(number) == words


@pytest.mark.parametrize(
    ("year", "words"),
    [(1905, "nineteen oh five"), (1900, "nineteen hundred"), (2004, "two thousand four"), (2024, "twenty twenty four")],
)
def test_year_words(year: int, words: str):
    assert year_words(year) == words


@pytest.mark.parametrize(
    ("raw", "spoken"),
    [
        ("no digits at all", "no digits at all"),
        ("It cost $3.50.", "It cost three dollars and fifty cents."),
        ("$1 and $2 million", "one dollar and two million dollars"),
        ("on May 3, 1991", "on May third, nineteen ninety one"),
        ("in the 1960s", "in the nineteen sixties"),
        ("about 2.5%", "about two point five percent"),
        ("1,250 people", "one thousand two hundred fifty people"),
        ("the 21st of June", "the twenty first of June"),
    ],
)
def test_spell_numbers(raw: str, spoken: str):
    assert spell_numbers(raw) == spoken


@pytest.mark.parametrize(
    ("raw", "spoken", "text"),
    [
        ("He doesn\u2019t know", "He doesn't know.", "he doesn't know"),
        ("mr. Smith\u2014a well-known man", "Mister Smith, a well known man.", "mister smith a well known man"),
        ('"Come in," she said.', "Come in, she said.", "come in she said"),
        ("the dogs' bones and 'quoted' words", "The dogs bones and quoted words.", "the dogs bones and quoted words"),
        ("Oh no. Is it 5?", "Oh no. Is it five?", "oh no is it five"),
    ],
)
def test_make_sentence(raw: str, spoken: str, text: str):
    assert make_sentence(raw, "x") == Sentence(spoken, text, "x")


@pytest.mark.parametrize("raw", ["", "Word", "a = b", "the NATO treaty", "the U.S. army", "naïve idea", "word " * 60])
def test_sentences_that_are_dropped(raw: str):
    assert make_sentence(raw, "x") is None


def test_target_alphabet_of_generated_phrases():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        spoken, text = generate_phrase(rng)
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", text), text
        assert re.fullmatch(r"[A-Za-z',.?! ]+[.?!]", spoken), spoken
        assert "{" not in spoken


def test_phrases_depend_on_the_generator_only():
    first, second = (
        [generate_phrase(rng) for _ in range(50)] for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    assert first == second


def test_read_lists(tmp_path):
    path = tmp_path / "lists.txt"
    path.write_text("# comment\n[one]\na|b\nc d\n\n[two]\ne\n")
    assert read_lists(path) == {"one": ("a", "b", "c d"), "two": ("e",)}


def test_dev_share_and_stability():
    held_out = [is_dev(f"sentence number {number}") for number in range(20000)]
    assert 0.017 < np.mean(held_out) < 0.023
    assert [number for number in range(300) if held_out[number]] == [112, 133, 180, 267]


def test_splits_do_not_meet():
    sentences = [Sentence(f"Text {i}.", f"text {number_words(i)} of many more words", "brown") for i in range(2000)]
    drawn = {}
    for split in ("train", "dev"):
        sampler, rng = SentenceSampler(sentences, split), np.random.default_rng(0)
        drawn[split] = {sampler.sentence(rng).text for _ in range(500)}
        assert all(is_dev(text) == (split == "dev") for text in drawn[split])
    assert not drawn["train"] & drawn["dev"]


def test_short_phrases_are_short():
    sampler = SentenceSampler([Sentence("Yes, it is a long story.", "yes it is a long story", "brown")], "train")
    rng = np.random.default_rng(0)
    assert all(1 <= len(sampler.short(rng).text.split()) <= 4 for _ in range(200))


def test_unknown_split_and_source(tmp_path):
    with pytest.raises(ValueError, match="split"):
        SentenceSampler([], "test")
    with pytest.raises(ValueError, match="sources"):
        texts.collect_sentences(tmp_path, ["nowhere"])


def test_collect_reads_every_format(tmp_path, monkeypatch):
    """Packages with a handful of sentences in the layouts of the real ones."""
    files = {
        "wordnet": {
            f"usr/share/wordnet/data.{name}": f'0 | glow; "the {name} lamp glows"'
            for name in ("adj", "adv", "noun", "verb")
        },
        "brown": {"package/ca01": "\tThe/at lamp/nn glows/vbz now/rb ./.\n"},
        "sotu": {"package/data/1.json": json.dumps({"text": "The lamp glows. Mr. Lamp glows."})},
        "dialogues": {"chatterbot_corpus/data/english/ai.yml": "- - Does the lamp glow?\n  - The lamp glows today\n"},
        "jokes": {"package/jokes.json": json.dumps([{"body": "The lamp glows twice."}])},
        "idioms": {"package/idioms.txt": "the lamp glows on\n"},
    }
    for source, contents in files.items():
        for name, content in contents.items():
            path = tmp_path / texts.SOURCES[source].folder_name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    monkeypatch.setattr(texts, "MIN_WORD_COUNT", 1)
    collected = texts.collect_sentences(tmp_path, list(files))
    assert {(sentence.source, sentence.text) for sentence in collected} == {
        *(("wordnet", f"the {name} lamp glows") for name in ("adj", "adv", "noun", "verb")),
        ("brown", "the lamp glows now"),
        ("sotu", "the lamp glows"),
        ("sotu", "mister lamp glows"),
        ("dialogues", "does the lamp glow"),
        ("dialogues", "the lamp glows today"),
        ("jokes", "the lamp glows twice"),
        ("idioms", "the lamp glows on"),
    }
    save_sentences(collected, tmp_path / "all.jsonl")
    assert load_sentences(tmp_path / "all.jsonl") == collected


def test_normalise():
    assert normalise("It's -- 'fine', isn't it?") == "it's fine isn't it"
