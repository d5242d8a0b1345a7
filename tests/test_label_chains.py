"""Tokens as chains of CTC labels: how text is spelled, and scores of chains against references."""

from __future__ import annotations

import math
import string

import pytest
import torch
from ctc_reference import prefix_prob, textbook_prefix_log_prob
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_speechllm.bpe_subset import (
    heard_text,
    restrict_merges,
    select_lowercase_tokens,
    subset_chains,
    writer_chains,
)
from hf_speechllm.ctc_prefix_score import CTCPrefixScorer, CTCPrefixState
from hf_speechllm.label_chains import (
    SILENT,
    UNSPELLABLE,
    LabelChains,
    build_chains,
    character_chains,
    extend_by_chains,
    score_chains,
    score_labels,
)

WAV2VEC2 = ["<pad>", "<s>", "</s>", "<unk>", "|", *string.ascii_uppercase, "'"]


def tokenizer_of(texts: list[str], added: tuple[AddedToken, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokeniser whose token i + 2 is `texts[i]`; bytes that are no UTF-8 are written as "\\xNN"."""
    alphabet = dict(zip(range(256), _byte_alphabet(), strict=True))
    spelled = ["".join(alphabet[byte] for byte in text.encode("utf-8", "surrogateescape")) for text in texts]
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *spelled])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _byte_alphabet() -> list[str]:
    """The letter by which byte-level BPE writes each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def spelling(chains: LabelChains, token: int, last_label: int | None = None, axis: list[str] = WAV2VEC2) -> str | None:
    """The chain of a token as text; None if it cannot be spelled."""
    last = None if last_label is None else torch.tensor(last_label)
    labels = chains.spell(torch.tensor(token), last).tolist()
    return None if labels[0] == UNSPELLABLE else "".join(axis[label] for label in labels if label != SILENT)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" the", "|THE"),
        ("The", "THE"),
        (" THE", "|THE"),
        ("'s", "'S"),
        ("\u2019s", "'S"),  # typographic apostrophe
        (" don't.", "|DON'T"),
        (",", ""),
        ("...", ""),
        ("\n", ""),
        (" -", ""),  # parts no words: the next word brings its space
        (" ?", ""),
        (' "', "|"),  # the next word comes without one
        (" (", "|"),
        (" ", "|"),
        ("  the", "|THE"),
        ("|", ""),  # the sign that stands for a space, as text
        ("3", None),
        (" caf\u00e9", None),
        (" 5%", None),
        ("%", None),
        ("\u0301", None),  # combining accent
        ("\udce2\udc80", None),  # first two bytes of a dash
        ("\u201c", ""),
        ("<s>x", None),
        (" longer than that", None),  # than max_length
    ],
)
def test_characters(text: str, want: str | None) -> None:
    texts = [text] if text != "<s>x" else []
    chains = character_chains(tokenizer_of(texts), WAV2VEC2, blank_id=0, max_length=12)
    assert spelling(chains, 2 if texts else 0) == want
    assert chains.num_labels == len(WAV2VEC2)
    assert chains.delimiter == 4


def test_added_tokens_cannot_be_spelled_unless_told_to_be_silent() -> None:
    tokenizer = tokenizer_of(["a"], (AddedToken("<|a|>", special=False), AddedToken("ab", special=True)))
    chains = character_chains(tokenizer, WAV2VEC2, blank_id=0)
    assert [spelling(chains, token) for token in range(5)] == [None, None, "A", None, None]
    chains = character_chains(tokenizer, WAV2VEC2, blank_id=0, silent_ids=[3])
    assert [spelling(chains, token) for token in range(5)] == [None, None, "A", "", None]


def test_delimiter_is_dropped_where_no_word_precedes() -> None:
    chains = character_chains(tokenizer_of([" a", "a", " ", ","]), WAV2VEC2, blank_id=0)
    for last, want in ((-1, "A"), (4, "A"), (5, "|A"), (None, "|A")):
        assert spelling(chains, 2, last) == want
    assert [spelling(chains, token, -1) for token in (3, 4, 5)] == ["A", "", ""]


def test_case_matters_where_labels_have_it() -> None:
    axis = ["_", " ", "a", "A", "b"]
    chains = character_chains(tokenizer_of([" aAbB"]), axis, blank_id=0, delimiter=" ")
    assert spelling(chains, 2, axis=axis) == " aAbb"
    chains = character_chains(tokenizer_of(["aA", "B"]), axis, blank_id=0, delimiter=None, ignore_case=False)
    assert [spelling(chains, token, axis=axis) for token in (2, 3)] == ["aA", None]


def test_without_delimiter_spaces_are_silent() -> None:
    axis = ["a", "b", "_"]
    chains = character_chains(tokenizer_of([" a b", " "]), axis, blank_id=2, delimiter=None)
    assert [spelling(chains, token, axis=axis) for token in (2, 3)] == ["ab", ""]


def test_unknown_delimiter() -> None:
    with pytest.raises(ValueError, match=r"delimiter: expected one of the characters .*, got ' '"):
        character_chains(tokenizer_of(["a"]), WAV2VEC2, blank_id=0, delimiter=" ")


def test_sentencepiece_tokens_keep_their_space() -> None:
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "▁the": 1, "the": 2, "<0x41>": 3, "<0xE2>": 4}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    chains = character_chains(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"), WAV2VEC2, blank_id=0)
    assert [spelling(chains, token) for token in range(5)] == [None, "|THE", "THE", "A", None]


def trained_tokenizer(vocab_size: int = 480, texts: tuple[str, ...] | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " the other brother's mother didn't bother then, nor did another; there they gathered thirteen feathers."
    backend.train_from_iterator([words, words, words.upper()] if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


TOKENIZER = trained_tokenizer()
words = st.text(alphabet="thernodid'", min_size=1, max_size=9) | st.sampled_from(
    ["the", "brother", "didn't", "another"]
)


@given(st.lists(words, min_size=1, max_size=6), st.sampled_from([28, 40, 60]))
@settings(max_examples=40, deadline=None)
def test_canonical_tokens_are_unions_of_restricted_ones(sentence: list[str], size: int) -> None:
    """The merges of the restricted tokeniser come first in the whole one and are never undone."""
    label_ids = select_lowercase_tokens(TOKENIZER, size)
    chains, restricted = CHAINS_OF_SIZE[size], restrict_merges(TOKENIZER, label_ids)
    text = "".join(f" {word}" for word in sentence)
    labels = chains.spell(torch.tensor(TOKENIZER(text).input_ids)).flatten()
    assert [label_ids[label] for label in labels.tolist() if label != SILENT] == restricted(text).input_ids


CHAINS_OF_SIZE = {size: subset_chains(TOKENIZER, select_lowercase_tokens(TOKENIZER, size)) for size in (28, 40, 60)}


def test_subset_chains_ignore_case_and_punctuation() -> None:
    label_ids, chains = select_lowercase_tokens(TOKENIZER, 40), CHAINS_OF_SIZE[40]
    for text in (" the other", " THE OTHER,", ' The "other"'):
        ids = TOKENIZER(text).input_ids
        labels = [label for label in chains.spell(torch.tensor(ids)).flatten().tolist() if label != SILENT]
        assert TOKENIZER.decode([label_ids[label] for label in labels]) == " the other"
    assert len(labels) > len(TOKENIZER(" the other").input_ids)


# Another tokeniser writes.

WRITER = trained_tokenizer(
    420, (" The others' brother, the mother: her other brother's. (There) 'they' gathered - thirteen - feathers!",) * 3
)
WRITER_CHAINS = {size: writer_chains(WRITER, TOKENIZER, select_lowercase_tokens(TOKENIZER, size)) for size in (28, 60)}


def labels_of_text(chains: LabelChains, ids: list[int]) -> list[int]:
    """The labels of a text, token by token as in a search."""
    labels: list[int] = []
    for position, token in enumerate(ids):
        last_label, last_token = (labels or [-1])[-1], ids[position - 1] if position else -1
        chain = chains.spell(torch.tensor(token), torch.tensor(last_label), torch.tensor(last_token)).tolist()
        assert chain[0] != UNSPELLABLE
        labels += [label for label in chain if label != SILENT]
    return labels


def heard(size: int, text: str) -> str:
    """How a text of WRITER is spelled."""
    label_ids = select_lowercase_tokens(TOKENIZER, size)
    return TOKENIZER.decode([label_ids[label] for label in labels_of_text(WRITER_CHAINS[size], WRITER(text).input_ids)])


marks = st.sampled_from([" ", ", ", ' "', '" ', " (", "-", " - ", "... ", "?! ", "\n", '," '])


@given(st.lists(st.tuples(words, marks), min_size=1, max_size=5), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_letters_spell_whatever_another_tokeniser_writes(parts: list, is_upper: bool, has_space: bool) -> None:
    """Every border between tokens is one between labels, so that spelling is exact: words and single spaces."""
    parts = [(word.strip("'") or "the", mark) for word, mark in parts]
    text = " " * has_space + "".join(word + mark for word, mark in parts)
    want = "".join(f" {word}" for word, _ in parts)
    assert heard(28, text.upper() if is_upper else text) == want


def test_words_of_one_token_are_spelled_as_ctc_was_taught() -> None:
    label_ids = select_lowercase_tokens(TOKENIZER, 60)
    restricted = restrict_merges(TOKENIZER, label_ids)
    tokens = {WRITER.decode([index]) for index in range(len(WRITER))}
    found = {token for token in tokens if token.startswith(" ") and token[1:].islower() and token[1:].isalpha()}
    assert {" the", " brother"} <= found and len(found) > 10
    for word in found:
        spelled = [label_ids[label] for label in labels_of_text(WRITER_CHAINS[60], WRITER(word).input_ids)]
        assert spelled == restricted(word).input_ids


def test_a_word_begins_with_its_space_wherever_it_stands() -> None:
    """At the start, behind marks of their own tokens, and within a token; but not behind the beginning of a word."""
    assert heard(60, "the") == heard(60, " the") == heard(60, '"the') == heard(60, " -the") == " the"
    chains, the = WRITER_CHAINS[60], WRITER.convert_tokens_to_ids("the")
    before = {token: WRITER.convert_tokens_to_ids(token) for token in ("Ġ(", "-", "o", "'", "Ġ")}
    some_label = torch.tensor(3)
    spelled = {
        token: chains.spell(torch.tensor(the), some_label, torch.tensor(index)).tolist()
        for token, index in before.items()
    }
    assert spelled["Ġ("] == spelled["-"] == spelled["Ġ"] != spelled["o"] == spelled["'"]
    assert spelled["o"] == chains.chains[the].tolist()
    assert chains.spell(torch.tensor(the), some_label, None).tolist() == spelled["o"]
    assert chains.spell(torch.tensor(the), some_label, torch.tensor(len(WRITER) + 5)).tolist() == spelled["o"]


@pytest.mark.parametrize(
    ("text", "in_word", "between_words"),
    [
        (" The", " the", " the"),
        ("THE", "the", " the"),
        ("-known", " known", " known"),
        ("e-mail", "e mail", " e mail"),
        ("'s", "'s", " s"),
        ("\u2019s", "'s", " s"),
        ("'", "'", ""),
        (" '", "", ""),
        (" 'cause", " cause", " cause"),
        ('."', "", ""),
        (" ", "", ""),
        ("", "", ""),
        ("snake_case", "snake case", " snake case"),
        (" caf\u00e9", " caf\u00e9", " caf\u00e9"),
        ("7", None, None),
        (" 5%", None, None),
        ("$", None, None),
        ("\u0301", None, None),
    ],
)
def test_heard_text(text: str, in_word: str | None, between_words: str | None) -> None:
    assert (heard_text(text, False), heard_text(text, True)) == (in_word, between_words)


def test_what_a_writer_cannot_spell_and_what_is_silent() -> None:
    texts = ["a", "7", "\u00e9", " $", ".", "the" * 20]
    writer = tokenizer_of(texts, (AddedToken("<|0.00|>"), AddedToken("<|x|>", special=True)))
    label_ids = select_lowercase_tokens(TOKENIZER, 28)
    chains = writer_chains(writer, TOKENIZER, label_ids, silent_ids=[len(texts) + 2])
    first = chains.chains[:, 0].tolist()
    assert [label == UNSPELLABLE for label in first] == [True] * 2 + [False, True, True, True, False, True, False, True]
    assert [label == SILENT for label in first] == [False] * 6 + [True, False, True, False]
    assert chains.ends_word.tolist() == [False] * 5 + [True, True, False, True, False]
    assert (chains.blank_id, chains.num_labels, chains.vocab_size) == (28, 29, len(writer))


def test_labels_of_a_writer_need_a_byte_level_bpe() -> None:
    backend = Tokenizer(models.WordPiece(vocab={"a": 0, "<s>": 1}, unk_token="<s>"))
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="tokenizer: a byte-level BPE .* is expected, got a model of type WordPiece"):
        writer_chains(WRITER, wordpiece, [0])


def test_first_labels_between_words() -> None:
    word_chains = torch.tensor([[3, 1], [4, -1], [-1, -1], [-2, -2]])
    ends_word = torch.tensor([False, False, True, True])
    chains = LabelChains(
        0, 5, torch.tensor([[1, -1], [2, 3], [-1, -1], [-2, -2]]), word_chains=word_chains, ends_word=ends_word
    ).to(torch.device("cpu"))
    last_label, last_token = torch.tensor([-1, 2, 2, 2]), torch.tensor([-1, 0, 2, 9])
    spelled = chains.spell(torch.arange(4).expand(4, -1), last_label[:, None], last_token[:, None])[:, :, 0]
    positions = spelled.masked_fill(spelled == SILENT, 6).masked_fill(spelled == UNSPELLABLE, 5)
    assert torch.equal(chains.first_labels(last_label, last_token), positions)
    assert positions[:, 0].tolist() == [3, 1, 3, 1]
    assert chains.silent_ids.tolist() == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"word_chains": torch.tensor([[1, 2]])},
            r"expected both of them, .* got word_chains=\(1, 2\), ends_word=None",
        ),
        ({"ends_word": torch.tensor([True])}, r"word_chains=None, ends_word=\(1,\), delimiter=None"),
        (
            {"word_chains": torch.tensor([[1, 2]]), "ends_word": torch.tensor([True]), "delimiter": 1},
            "without a delimiter, or neither, .* delimiter=1",
        ),
        (
            {"word_chains": torch.tensor([[1]]), "ends_word": torch.tensor([True])},
            r"expected shape \(1, 2\) like chains",
        ),
        ({"word_chains": torch.tensor([[1, 2]]), "ends_word": torch.tensor([1])}, r"bool \(1,\), got .* torch.int64"),
        ({"word_chains": torch.tensor([[1, 2]]), "ends_word": torch.tensor([True] * 2)}, r"got \(1, 2\) and .* \(2,\)"),
        (
            {"word_chains": torch.tensor([[1, 5]]), "ends_word": torch.tensor([True])},
            "word_chains: expected labels from",
        ),
    ],
)
def test_word_chains_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelChains(0, 5, torch.tensor([[1, 2]]), **options)


def table(rows: list[list[int]], delimiter: int | None = None) -> LabelChains:
    return LabelChains(0, 5, torch.tensor(rows, dtype=torch.int32), delimiter)


def test_ids_off_the_table() -> None:
    assert table([[1, 2], [3, -1]]).spell(torch.tensor([[-100, 1], [2, 0]])).tolist() == [
        [[-1, -1], [3, -1]],
        [[-2, -2], [1, 2]],
    ]


@pytest.mark.parametrize("delimiter", [None, 1])
def test_first_labels_are_those_of_the_spelling(delimiter: int | None) -> None:
    chains = table([[1, 2], [1, -1], [3, 4], [-1, -1], [-2, -2]], delimiter).to(torch.device("cpu"))
    last = torch.tensor([-1, 1, 3])
    spelled = chains.spell(torch.arange(5).expand(3, -1), last[:, None])[:, :, 0]
    positions = spelled.masked_fill(spelled == SILENT, 6).masked_fill(spelled == UNSPELLABLE, 5)
    assert torch.equal(chains.first_labels(last), positions)
    assert chains.silent_ids.tolist() == ([3] if delimiter is None else [1, 3])


@pytest.mark.parametrize(
    ("rows", "token"),
    [([[1, 5]], 0), ([[1, 2], [0, -1]], 1), ([[1], [-3]], 1), ([[-1, 2]], 0), ([[1, -2]], 0), ([[-2, -1]], 0)],
)
def test_rows_that_are_no_chains(rows: list[list[int]], token: int) -> None:
    with pytest.raises(ValueError, match=rf"chains: expected labels from 0 to 4 .* for token {token}\."):
        table(rows)


@pytest.mark.parametrize(
    "chains", [torch.zeros(2, 0).long(), torch.zeros(3).long(), torch.ones(2, 2), torch.ones(2, 2) > 0]
)
def test_tables_of_another_kind(chains: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"chains: expected integers of shape \(V, M\), got torch"):
        LabelChains(0, 5, chains)


@pytest.mark.parametrize("delimiter", [0, 5, -1])
def test_delimiter_that_is_no_label(delimiter: int) -> None:
    with pytest.raises(ValueError, match=rf"delimiter: expected None or a label from 0 to 4 .*, got {delimiter}"):
        table([[1]], delimiter)


def test_vocabulary_too_small() -> None:
    chains = table([[1], [-1], [-2]])
    chains.check_vocab_size(2)
    with pytest.raises(ValueError, match=r"vocab_size: expected 3 tokens as in chains, got 1"):
        chains.check_vocab_size(1)


def test_build_chains_pads_with_the_longest() -> None:
    lengths = {"a": [1], "b": [1, 2, 3], "c": [4, 4, 4, 4], "d": [], "e": None}
    chains = build_chains(tokenizer_of([*lengths]), lengths.__getitem__, num_labels=5, blank_id=0, max_length=3)
    assert chains.chains.tolist() == [[-2] * 3, [-2] * 3, [1, -1, -1], [1, 2, 3], [-2] * 3, [-1] * 3, [-2] * 3]


# Scores

NUM_LABELS, BLANK = 4, 1


def random_scorer(seed: int, num_frames: int, lengths: list[int], **options) -> tuple[torch.Tensor, CTCPrefixScorer]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), num_frames, NUM_LABELS)
    log_probs = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 2).log_softmax(-1)
    return log_probs, CTCPrefixScorer.from_log_probs(log_probs, torch.tensor(lengths), BLANK, **options)


def state_of(scorer: CTCPrefixScorer, prefixes: list[list[int]]) -> CTCPrefixState:
    """The state of hypotheses of equal length."""
    state = scorer.init(len(prefixes) // scorer.num_utterances)
    for labels in zip(*prefixes, strict=True):
        state = scorer.advance(state, torch.arange(len(prefixes)), torch.tensor(labels))
    return state


def scores_of(scorer: CTCPrefixScorer, state: CTCPrefixState, chains: torch.Tensor, **options) -> torch.Tensor:
    return score_chains(scorer, state, score_labels(scorer, state), chains, **options)


def padded(chains: list[list[list[int]]]) -> torch.Tensor:
    longest = max(len(chain) for row in chains for chain in row)
    return torch.tensor([[[*chain, *[SILENT] * (longest - len(chain))] for chain in row] for row in chains])


def test_chain_scores_equal_enumeration() -> None:
    log_probs, scorer = random_scorer(0, 5, [5])
    chains = [[], [0], [2, 3], [2, 2], [2, 3, 0], [2, 3, 3], [0, 0], [0, 0, 0]]  # the last needs 6 frames
    prefixes = [[3], [0], [2]]
    got = scores_of(scorer, state_of(scorer, prefixes), padded([chains] * 3)).exp()
    want = [[prefix_prob(log_probs[0], BLANK, (*prefix, *chain)) for chain in chains] for prefix in prefixes]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-15)
    assert want[0][-1] == 0.0 < want[0][-2]


chain = st.lists(st.sampled_from([0, 2, 3]), max_size=4)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(0, 1000))
def test_chain_scores_equal_the_recursion(data: st.DataObject, seed: int) -> None:
    """Two utterances of different length and number of distinct chains."""
    lengths = [9, data.draw(st.integers(0, 9))]
    log_probs, scorer = random_scorer(seed, 9, lengths)
    prefixes = [data.draw(st.lists(st.sampled_from([0, 2, 3]), min_size=2, max_size=2)) for _ in range(4)]
    chains = [data.draw(st.lists(chain, min_size=5, max_size=5)) for _ in range(4)]
    chains[0][0] = [2, 3, 0]
    got = scores_of(scorer, state_of(scorer, prefixes), padded(chains))
    for row in range(4):
        frames = log_probs[row // 2][: lengths[row // 2]]
        want = [textbook_prefix_log_prob(frames, BLANK, (*prefixes[row], *c))[0] for c in chains[row]]
        torch.testing.assert_close(got[row], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-8)


def test_unspellable_chains_and_labels_that_are_not_scored() -> None:
    _, scorer = random_scorer(1, 8, [8], top_k=2)
    kept = scorer.labels[0].tolist()
    (other,) = {0, 2, 3} - {*kept}
    chains = padded([[[kept[0], kept[1]], [kept[0], other], [other, kept[0]], [other], [-2, -2], [-1, -1]]])
    got = scores_of(scorer, scorer.init(1), chains)
    assert got[0].isfinite().tolist() == [True, False, False, False, False, True]
    assert got[0, 5] == 0.0


def test_shared_beginnings_are_extended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, scorer = random_scorer(2, 8, [8, 8])
    rows = []
    advance = CTCPrefixScorer.advance
    monkeypatch.setattr(CTCPrefixScorer, "advance", lambda *a: rows.append(len(a[2])) or advance(*a))
    chains = padded([[[2, 3, 0], [2, 3, 2], [2, 0], [2]], [[0, 2], [3, 2], [3, 0], [2]]])
    scores_of(scorer, scorer.init(1), chains)
    assert rows == [4, 2]  # per utterance: level 1 {2} and {0, 3}, level 2 {2.3} and none


def test_margin_gives_up_those_that_fall_behind() -> None:
    log_probs, scorer = random_scorer(3, 10, [10])
    state = scorer.init(1)
    chains = padded([[[a, b, c] for a in (0, 2, 3) for b in (0, 2, 3) for c in (0, 2, 3)]])
    exact = scores_of(scorer, state, chains)
    priority = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)) * 3
    pruned = scores_of(scorer, state, chains, priority=priority, margin=4.0)
    is_kept = pruned > -math.inf
    assert torch.equal(pruned[is_kept], exact[is_kept])
    total = exact + priority
    assert bool(is_kept[total >= total.max() - 0.5].all())
    assert bool((total[~is_kept] < total[is_kept].max()).all())
    assert 0 < is_kept.sum() < 14
    assert torch.equal(scores_of(scorer, state, chains, priority=priority, margin=math.inf), exact)


def test_extension_by_chains_equals_the_recursion() -> None:
    log_probs, scorer = random_scorer(4, 7, [7, 6])
    prefixes = [[0], [2], [3], [2]]
    parent, chains = torch.tensor([1, 0, 2, 2]), [[2, 3], [], [0, 0, 2], [2]]
    state = extend_by_chains(scorer, state_of(scorer, prefixes), parent, padded([chains])[0])
    silent = extend_by_chains(scorer, state, torch.tensor([1, 1, 3, 2]), torch.full((4, 2), UNSPELLABLE))
    for row in range(4):
        frames = log_probs[row // 2][: [7, 6][row // 2]]
        psi, exact = textbook_prefix_log_prob(frames, BLANK, (*prefixes[parent[row]], *chains[row]))
        assert float(state.prefix_log_prob[row]) == pytest.approx(psi, abs=1e-9)
        assert float(scorer.eos(state)[row]) == pytest.approx(exact, abs=1e-9)
    assert torch.equal(silent.prefix_log_prob, state.prefix_log_prob[[1, 1, 3, 2]])
