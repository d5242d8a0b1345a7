"""CTC labels that are tokens of the language model: a small, closed subset of a byte-level BPE.

The vocabulary of an LLM (50k to 250k tokens) is too large and too sparse for a CTC head trained on little speech. Its
first merges are not: restricted to lower-case letters, about a thousand of them spell every English word, and each is
a token that the language model knows. Removing all other merges from the tokeniser makes text come out in just these
tokens, with unchanged ids.
"""

import json
import re
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .label_chains import MAX_CHAIN_LENGTH, LabelChains, build_chains, chain_table, is_spoken, token_texts

# "Ġ" is how byte-level BPE writes a space.
_SPELLING = re.compile(r"^Ġ?[a-z']*$")
_WORD = re.compile(r"\w")
_ENDS_IN_WORD = re.compile(r"[^\W_]'?$|^['\u2019]$")  # a lone apostrophe may be within a word
_ALPHABET = [*"abcdefghijklmnopqrstuvwxyz'", "Ġ"]
NUM_CHARACTERS = len(_ALPHABET)


def _bpe(tokenizer: PreTrainedTokenizerBase) -> dict:
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    if backend["model"]["type"] != "BPE" or "Ġ" not in backend["model"]["vocab"]:
        raise ValueError(
            "tokenizer: a byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) is expected, got a model of type "
            f"{backend['model']['type']}; use CTC labels of their own (ctc_labels) with this tokenizer."
        )
    return backend


def select_lowercase_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> list[int]:
    """Ids of the letters, apostrophe, space and the first merges made of them only, `size` tokens in all.

    Args:
        tokenizer: A byte-level BPE tokeniser.
        size: Number of tokens, at least 28 (the alphabet).

    Raises:
        ValueError: If the tokeniser is no byte-level BPE, or has fewer such tokens than `size`.
    """
    model = _bpe(tokenizer)["model"]
    if size < len(_ALPHABET):
        raise ValueError(f"size must be at least {len(_ALPHABET)} (the alphabet), got {size}.")
    tokens = dict.fromkeys(_ALPHABET)
    for merge in model["merges"]:
        if len(tokens) == size:
            break
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if _SPELLING.match(token):
            tokens[token] = None
    if len(tokens) < size:
        raise ValueError(f"size: this tokenizer has only {len(tokens)} lower-case tokens, got size={size}.")
    return [model["vocab"][token] for token in tokens]


def restrict_merges(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> PreTrainedTokenizerFast:
    """A tokeniser with the same vocabulary that forms, of all merges, only those that give one of `token_ids`.

    Lower-case text is then spelled in `token_ids` alone, if they are closed as those of [`select_lowercase_tokens`].
    """
    backend = _bpe(tokenizer)
    id_to_token = {index: token for token, index in backend["model"]["vocab"].items()}
    allowed = {id_to_token[index] for index in token_ids}
    backend["model"]["merges"] = [
        merge
        for merge in backend["model"]["merges"]
        if "".join(merge.split(" ") if isinstance(merge, str) else merge) in allowed
    ]
    restricted = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        model_max_length=tokenizer.model_max_length,
        extra_special_tokens=tokenizer.extra_special_tokens,
        **{name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
    )
    restricted.chat_template = tokenizer.chat_template
    return restricted


def letters_of(text: str) -> str | None:
    """The text of a token as it sounds: lower case, without punctuation; `None` if there is nothing to be heard."""
    text = text.lower().replace("\u2019", "'")
    letters = re.sub(r" +", " ", re.sub(r"[^\w' ]|_", "", text))
    # Punctuation, but not the apostrophe or the space alone: these are labels.
    return None if letters != text and not _WORD.search(letters) else letters


def subset_chains(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> LabelChains:
    """The CTC labels `token_ids` that spell each token of the whole tokeniser, case and punctuation aside.

    BPE merges in a fixed order. If `token_ids` are the first merges, as from [`select_lowercase_tokens`], every token
    is a union of them, so that the chains of a text's tokens are the text in the restricted tokeniser.

    Args:
        tokenizer: A byte-level BPE tokeniser.
        token_ids: Token of each label; the blank is the last label, U.
    """
    restricted = restrict_merges(tokenizer, token_ids).backend_tokenizer
    labels = {token: label for label, token in enumerate(token_ids)}

    def spell(text: str) -> list[int] | None:
        letters = letters_of(text)
        if letters is None:
            return []
        ids = restricted.encode(letters, add_special_tokens=False).ids
        return [labels[index] for index in ids] if all(index in labels for index in ids) else None

    return build_chains(tokenizer, spell, num_labels=len(token_ids) + 1, blank_id=len(token_ids))


def writer_chains(
    writer: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    *,
    silent_ids: Iterable[int] = (),
) -> LabelChains:
    """The CTC labels `token_ids` of one tokeniser that spell each token of another: Whisper, heard by our CTC head.

    A word is spelled as CTC was taught to write it, its space included, wherever it begins: behind a space, a hyphen, a
    quotation mark or at the start of the text. Case is ignored, marks are silent; a token with a digit, a sign that is
    read aloud, or a letter beyond a to z cannot be spelled, so that numbers come out in words.

    Each token is spelled by itself. A word of one token, or of several that meet where labels meet too, is thus spelled
    exactly. Where a label of the whole word would reach across the border of two tokens ("scaven" + "ging", but
    "s c av eng ing"), the labels on both sides are others than CTC was taught, and the word scores too low: 0.2 % of
    the running words with Whisper's tokeniser and the 1000 labels of the default model.

    Args:
        writer: The tokeniser of the model that writes, of any kind.
        tokenizer: The byte-level BPE tokeniser of the labels.
        token_ids: Token of each label; the blank is the last label, U.
        silent_ids: Special tokens that may occur in a transcript, such as Whisper's time stamps.

    Returns:
        Chains of V = len(writer) tokens, with `word_chains`.
    """
    silent = set(silent_ids)
    texts = ["" if index in silent else text for index, text in enumerate(token_texts(writer))]
    heard = [
        None if text is None else heard_text(text, is_between_words)
        for is_between_words in (False, True)
        for text in texts
    ]
    # Most words are a token with a space and one without: each is spelled once.
    distinct = sorted({text for text in heard if text is not None})
    spelling = dict(zip(distinct, _spell_all(tokenizer, token_ids, distinct), strict=True))
    in_word, between_words = chain_table([spelling.get(text) for text in heard], MAX_CHAIN_LENGTH).chunk(2)
    ends_word = torch.tensor([text is not None and not _ENDS_IN_WORD.search(text) for text in texts])
    return LabelChains(len(token_ids), len(token_ids) + 1, in_word, word_chains=between_words, ends_word=ends_word)


def heard_text(text: str, is_between_words: bool) -> str | None:
    """The text of a token as it sounds: lower case, without marks, each word that begins in it behind one space.

    Args:
        text: As it is written, its leading space included.
        is_between_words: Whether its first letter begins a word in any case.

    Returns:
        An empty text if nothing is heard; None if it holds a sign that is read aloud.
    """
    text = text.lower().replace("\u2019", "'")
    if any(is_spoken(character) and not character.isalpha() for character in text):
        return None
    begun, *words = re.sub(r"[^\w']|_", " ", text).split(" ")
    if is_between_words:
        begun, words = "", [begun, *words]
    # An apostrophe before a word is a quotation mark; within one it may be all of a token ("o" + "'" + "clock").
    return begun + "".join(f" {word}" for word in (word.lstrip("'") for word in words) if word)


def _spell_all(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], texts: list[str]) -> list[list[int] | None]:
    """The labels of each text, None where they cannot spell it."""
    restricted = restrict_merges(tokenizer, token_ids).backend_tokenizer
    labels = {token: label for label, token in enumerate(token_ids)}
    encodings = restricted.encode_batch_fast(texts, add_special_tokens=False)
    found = [[labels.get(index) for index in encoding.ids] for encoding in encodings]
    return [None if None in chain else chain for chain in found]
