"""New vocabularies for language models and CTC heads: sub-words that were trained on transcripts.

A language model gets embeddings and output layer for the new sub-words, or keeps its own tokens beside a CTC head that
has the sub-words as labels.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .bpe_subset import letters_of
from .label_chains import LabelChains, build_chains, token_text

LLM_INITS = ("pretrained", "random")
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_language_model(
    name: str, vocabulary: str | None = None, init: str = "pretrained"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32, and its tokeniser.

    Args:
        name: Hub id or folder.
        vocabulary: Hub id or folder of a tokeniser that takes the place of the model's; see [`replace_vocabulary`].
        init: `"pretrained"`, or `"random"`: fresh weights, drawn from torch's generator, in the same architecture.

    Raises:
        ValueError: For another `init`.
    """
    if init not in LLM_INITS:
        raise ValueError(f"llm_init must be one of {LLM_INITS}, got {init!r}.")
    own_tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer = own_tokenizer if vocabulary is None else AutoTokenizer.from_pretrained(vocabulary)
    if init == "random":
        config = AutoConfig.from_pretrained(name)
        if vocabulary is not None:
            config.get_text_config().update({"vocab_size": len(tokenizer), **_special_ids(tokenizer)})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if vocabulary is not None:
        replace_vocabulary(model, own_tokenizer, tokenizer)
    return model, tokenizer


@torch.no_grad()
def replace_vocabulary(
    language_model: PreTrainedModel, own_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Gives `language_model` embeddings and an output layer for the tokens of `tokenizer`, in place.

    Each is the mean of those of the tokens that had the same text: "▁transcript" starts between "▁trans" and "cript".
    Begin, end and padding keep theirs; tokens without text get the mean of all. Tied weights stay tied.

    Args:
        language_model: Causal language model.
        own_tokenizer: Its tokeniser so far.
        tokenizer: The new one, with an end-of-sequence token.

    Raises:
        ValueError: If the new tokeniser has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("vocabulary: the tokenizer must have an end-of-sequence token (eos_token), got none.")
    pieces = _own_pieces(own_tokenizer, tokenizer)
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    is_tied = head.weight is embeddings.weight
    means = _mean_rows(embeddings.weight, pieces)
    head_means = None if is_tied else _mean_rows(head.weight, pieces)
    head_bias = None if getattr(head, "bias", None) is None else _mean_rows(head.bias[:, None], pieces)[:, 0]
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    embeddings.weight.copy_(means)
    if head_means is not None:
        head.weight.copy_(head_means)
    if head_bias is not None:
        head.bias.copy_(head_bias)
    ids = _special_ids(tokenizer)
    language_model.config.get_text_config().update(ids)
    language_model.generation_config.update(**ids)


def subword_labels(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of the CTC labels that are the tokens of `tokenizer`, in order, special tokens left out."""
    return [token_text(tokenizer, index) for index in _subword_ids(tokenizer)]


def subword_chains(tokenizer: PreTrainedTokenizerBase, subword_tokenizer: PreTrainedTokenizerBase) -> LabelChains:
    """The sub-words that spell each token of a language model, one after the other.

    A token that the sub-words cannot spell as it is written is spelled without case and punctuation.

    Args:
        tokenizer: That of the language model.
        subword_tokenizer: Its tokens are the CTC labels, in the order of [`subword_labels`]; the blank is the last
            label, U.
    """
    labels = {index: label for label, index in enumerate(_subword_ids(subword_tokenizer))}

    def encode(text: str) -> list[int] | None:
        ids = subword_tokenizer(text, add_special_tokens=False)["input_ids"]
        return [labels[index] for index in ids] if all(index in labels for index in ids) else None

    def spell(text: str) -> list[int] | None:
        written = encode(text)
        if written is not None:
            return written
        letters = letters_of(text)
        return [] if letters is None else encode(letters)

    return build_chains(tokenizer, spell, num_labels=len(labels) + 1, blank_id=len(labels))


def _subword_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [index for index in range(len(tokenizer)) if index not in special]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Begin (or else end), end and padding (or else end) of sequence."""
    ids = {name: getattr(tokenizer, name) for name in _ROLES}
    return {name: ids["eos_token_id"] if index is None else index for name, index in ids.items()}


def _own_pieces(own_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The own tokens that each new one is made of; an empty list where none are."""
    own_ids = {name: getattr(own_tokenizer, name) for name in _ROLES}
    same_role = {getattr(tokenizer, name): own for name, own in own_ids.items() if own is not None}
    special = set(tokenizer.all_special_ids)
    pieces = []
    for index in range(len(tokenizer)):
        if index in special:
            pieces.append([same_role[index]] if index in same_role else [])
        else:
            pieces.append(own_tokenizer(token_text(tokenizer, index), add_special_tokens=False)["input_ids"])
    return pieces


def _mean_rows(weight: Tensor | nn.Parameter, pieces: list[list[int]]) -> Tensor:
    """[V, H] rows to [V', H] means of the rows `pieces`."""
    mean = weight.float().mean(0)
    rows = [weight[ids].float().mean(0) if ids else mean for ids in pieces]
    return torch.stack(rows).to(weight.dtype)
