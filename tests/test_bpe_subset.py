"""CTC labels out of a byte-level BPE: same ids, closed under spelling, lower case only."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LETTERS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_speechllm import restrict_merges, select_lowercase_tokens

ALPHABET_SIZE = 28
CORPUS = """the quick brown fox didn't jump over the lazy dog while Big Ben struck nine and all the others were there
then THEY said that nothing in the world would make them think again of winter, spring; 1905 or the other things"""


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as of GPT-2, with merges of capitals, digits and punctuation among those of letters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        min_frequency=1,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f" {CORPUS}", CORPUS.upper(), CORPUS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=123
    )


TOKENIZER = trained_tokenizer()
TOKEN_IDS = select_lowercase_tokens(TOKENIZER, 60)
RESTRICTED = restrict_merges(TOKENIZER, TOKEN_IDS)
lower_case = st.text(alphabet="abcdefghijklmnopqrstuvwxyz' ", max_size=60)


def test_the_first_tokens_are_the_alphabet_and_the_rest_merges_in_order():
    tokens = TOKENIZER.convert_ids_to_tokens(TOKEN_IDS)
    assert sorted(tokens[:ALPHABET_SIZE]) == sorted([*LETTERS, "Ġ"])
    assert all(re.fullmatch("Ġ?[a-z']+", token) for token in tokens[ALPHABET_SIZE:])
    assert sorted(TOKEN_IDS[ALPHABET_SIZE:]) == TOKEN_IDS[ALPHABET_SIZE:], "ids of a BPE follow its merges"
    assert len(set(TOKEN_IDS)) == 60


def test_a_smaller_subset_is_the_beginning_of_a_larger_one():
    assert select_lowercase_tokens(TOKENIZER, 40) == TOKEN_IDS[:40]
    assert len(select_lowercase_tokens(TOKENIZER, ALPHABET_SIZE)) == ALPHABET_SIZE


@given(lower_case)
@settings(max_examples=150, deadline=None)
def test_lower_case_text_is_spelled_in_the_subset_alone_and_comes_back(text):
    ids = RESTRICTED(text).input_ids
    assert set(ids) <= set(TOKEN_IDS)
    assert RESTRICTED.decode(ids) == TOKENIZER.decode(ids) == text


@given(lower_case)
@settings(max_examples=100, deadline=None)
def test_the_full_subset_spells_as_the_original_tokenizer(text):
    """With every lower-case merge allowed nothing is left to restrict."""
    everything = select_lowercase_tokens(TOKENIZER, num_lowercase_tokens())
    assert restrict_merges(TOKENIZER, everything)(text).input_ids == TOKENIZER(text).input_ids


def num_lowercase_tokens() -> int:
    return len({token for token in TOKENIZER.get_vocab() if re.fullmatch("Ġ?[a-z']*", token) and token})


def test_merges_are_used_where_they_are_allowed():
    assert len(RESTRICTED(" the other").input_ids) < len(" the other")


def test_the_vocabulary_stays_as_it_is():
    assert RESTRICTED.get_vocab() == TOKENIZER.get_vocab() and len(RESTRICTED) == len(TOKENIZER)
    assert RESTRICTED.eos_token_id == TOKENIZER.eos_token_id and RESTRICTED.pad_token_id == TOKENIZER.pad_token_id
    assert RESTRICTED.bos_token == "<s>" and RESTRICTED.model_max_length == 123


def test_other_text_still_comes_back():
    text = "Big Ben, 1905: naïve!"
    assert RESTRICTED.decode(RESTRICTED(text).input_ids) == text


def test_extra_special_tokens_and_chat_template_are_kept():
    tokenizer = trained_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{{ messages }}"
    restricted = restrict_merges(tokenizer, TOKEN_IDS)
    assert restricted.chat_template == "{{ messages }}"
    assert restricted.extra_special_tokens == ["<|turn|>"]
    ids = restricted("<|turn|> the").input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|turn|>")
    assert restricted.decode(ids, skip_special_tokens=True) == " the"


def test_the_restricted_tokenizer_survives_saving(tmp_path):
    RESTRICTED.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = " the quick fox didn't"
    assert again(text).input_ids == RESTRICTED(text).input_ids != TOKENIZER(text).input_ids


def test_a_size_below_the_alphabet_is_an_error():
    with pytest.raises(ValueError, match=r"size must be at least 28 \(the alphabet\), got 27"):
        select_lowercase_tokens(TOKENIZER, 27)


def test_a_size_beyond_the_lower_case_tokens_is_an_error():
    expected = f"size: this tokenizer has only {num_lowercase_tokens()} lower-case tokens, got size=5000"
    with pytest.raises(ValueError, match=expected):
        select_lowercase_tokens(TOKENIZER, 5000)


@pytest.mark.parametrize("function", [select_lowercase_tokens, lambda t, _: restrict_merges(t, [0])])
def test_another_kind_of_tokenizer_is_an_error(function):
    word_level = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match="tokenizer: a byte-level BPE .* is expected, got a model of type WordLevel"):
        function(word_level, 30)
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    backend["model"]["vocab"] = {"a": 0}
    backend["model"]["merges"] = []
    sentence_piece = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    with pytest.raises(ValueError, match="use CTC labels of their own"):
        function(sentence_piece, 30)
