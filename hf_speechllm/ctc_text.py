"""What CTC labels spell, and which words of it are complete."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

LabelsToText = Callable[[tuple[int, ...]], str]


def labels_to_text_of(tokenizer: PreTrainedTokenizerBase) -> LabelsToText:
    """The text of CTC labels (repeats and blanks already removed) by the tokenizer of an `AutoModelForCTC`.

    Characters with a word delimiter (Wav2Vec2, HuBERT, WavLM, MMS): a delimiter at the end becomes a space, so that the
    word before it is known to be complete; special tokens are left out, `<unk>` too. Other tokenizers (Parakeet) decode
    sub-words as they do, without merging repeats a second time.

    For a language model that is used to another case, write `lambda labels: to_text(labels).lower()`.
    """
    delimiter = getattr(tokenizer, "word_delimiter_token", None)
    if delimiter is None:
        return lambda labels: tokenizer.decode(
            list(labels), skip_special_tokens=True, clean_up_tokenization_spaces=False, group_tokens=False
        )
    special = set(tokenizer.all_special_tokens) - {delimiter}
    pieces = [
        "" if token in special else " " if token == delimiter else token
        for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ]
    if getattr(tokenizer, "do_lower_case", False):
        pieces = [piece.lower() for piece in pieces]
    return lambda labels: "".join([pieces[label] for label in labels])


def complete_words(text: str) -> tuple[str, ...]:
    """The words of a text that may go on: all but the last, and that too if white space follows it."""
    words = text.split()
    return tuple(words if not words or text[-1].isspace() else words[:-1])
