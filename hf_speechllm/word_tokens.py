"""Tokens of words, the same at the beginning of a text and later: every word, the first too, carries its space.

Byte-level BPE needs a space before the first word; SentencePiece tokenizers that add one of their own would double it.
"""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_PROBE_WORDS = ("a", "b")


@lru_cache(maxsize=16)
def word_prefix(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to put before a text so that its first word is tokenised like the others: a space or nothing.

    None: neither makes the tokens of a word independent of its neighbours.
    """
    for prefix in (" ", ""):
        apart = [token for word in _PROBE_WORDS for token in _encode(tokenizer, prefix + word)]
        if _encode(tokenizer, prefix + " ".join(_PROBE_WORDS)) == apart:
            return prefix
    return None


def encode_words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text without space around it, no special tokens.

    With a tokenizer that joins words it is not known how it treats the first one; it gets a space.
    """
    prefix = word_prefix(tokenizer)
    return _encode(tokenizer, (" " if prefix is None else prefix) + text) if text else []


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
