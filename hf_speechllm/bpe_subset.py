"""CTC labels that are tokens of the language model: a small, closed subset of a byte-level BPE.

The vocabulary of an LLM (50k to 250k tokens) is too large and too sparse for a CTC head trained on little speech. Its
first merges are not: restricted to lower-case letters, about a thousand of them spell every English word, and each is
a token that the language model knows. Removing all other merges from the tokeniser makes text come out in just these
tokens, with unchanged ids.
"""

import json
import re

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .label_chains import LabelChains, build_chains

# "Ġ" is how byte-level BPE writes a space.
_SPELLING = re.compile(r"^Ġ?[a-z']*$")
_WORD = re.compile(r"\w")
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
