"""Train a vocabulary of sub-words on transcripts: a tokeniser folder for `model.vocabulary` or `model.ctc_vocabulary`.

    python -m training.train_vocabulary FOLDER --data-dir DIR --texts 'train/*.jsonl' --size 10000

With `--language-model NAME` the folder holds that language model too, with embeddings and output layer for the new
sub-words, as `model.vocabulary` makes it in a run.
"""

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_speechllm.assembly import resolve_model
from hf_speechllm.transcription import check_model_name
from hf_speechllm.vocabulary import build_language_model
from training.command_line import check_folder, errors_in_one_line, loading
from training.row_reader import NORMALIZATIONS
from training.text_sources import read_texts

KINDS = ("bpe", "unigram")
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_SPACE = "▁"
_MAX_PIECE_LENGTH = 16


def train_vocabulary(texts: list[str], size: int, kind: str = "unigram") -> PreTrainedTokenizerFast:
    """A tokeniser of `size` sub-words, and the special tokens `<pad>`, `<s>`, `</s>`, `<unk>`.

    Words carry the space before them ("▁the"), as the processor writes it before the first one too; no sub-word spans
    two words. Characters that the texts lack become `<unk>`.

    Args:
        texts: Transcripts as they are to be written.
        size: Number of sub-words, at least that of the characters of the texts.
        kind: `"bpe"` (merges of frequent pairs) or `"unigram"` (as SentencePiece by default).

    Raises:
        ValueError: If `kind` is unknown, or the texts do not give just `size` sub-words.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
    special = list(SPECIAL_TOKENS.values())
    characters = sorted({character for text in texts for character in text if not character.isspace()} | {_SPACE})
    if size < len(characters):
        raise ValueError(f"size must be at least {len(characters)}, the characters of the texts, got {size}.")
    options = {
        "vocab_size": size + len(special),
        "special_tokens": special,
        "initial_alphabet": characters,
        "show_progress": False,
    }
    if kind == "bpe":
        backend = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
        trainer = trainers.BpeTrainer(max_token_length=_MAX_PIECE_LENGTH, **options)
    else:
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            unk_token=SPECIAL_TOKENS["unk_token"], max_piece_length=_MAX_PIECE_LENGTH, **options
        )
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never")
    backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="never")
    backend.train_from_iterator((f" {text}" for text in texts), trainer, length=len(texts))
    found = backend.get_vocab_size() - len(special)
    if found != size:
        raise ValueError(
            f"size: {len(texts)} texts give {found} sub-words of kind {kind!r}, not {size}; choose another size, or "
            "take more texts."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="right", **SPECIAL_TOKENS
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder to write")
    add(
        "--texts",
        nargs="+",
        required=True,
        metavar="PATTERN",
        help="JSONL manifests (field text) or plain text, a text a line (gzipped: *.gz)",
    )
    add("--data-dir", type=Path, default=Path(), help="folder that the patterns are relative to (default: this one)")
    add(
        "--text-normalization",
        choices=list(NORMALIZATIONS),
        default="none",
        help="of the texts, as data.text_normalization of a training (default: %(default)s)",
    )
    add("--size", type=int, required=True, metavar="N", help="number of sub-words")
    add(
        "--kind",
        choices=KINDS,
        default="unigram",
        help="merges of frequent pairs, or as SentencePiece (default: %(default)s)",
    )
    add(
        "--language-model",
        metavar="NAME",
        help="write this model too, for the new vocabulary: Hub id, folder, base:NAME",
    )
    arguments = parser.parse_args()
    with errors_in_one_line("train_vocabulary"):
        check_folder("FOLDER", arguments.folder)
        if arguments.language_model is not None:
            check_model_name("--language-model", arguments.language_model)
        texts = read_texts(arguments.texts, arguments.data_dir, arguments.text_normalization)
        tokenizer = train_vocabulary(texts, arguments.size, arguments.kind)
        tokenizer.save_pretrained(arguments.folder)
        if arguments.language_model is not None:
            with loading("--language-model", arguments.language_model):
                model, _ = build_language_model(resolve_model(arguments.language_model), str(arguments.folder))
            model.save_pretrained(arguments.folder)
    words = sum(len(text.split()) for text in texts)
    tokens = sum(map(len, tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]))
    print(f"{arguments.folder}: {arguments.size} sub-words, {tokens / words:.2f} per word of {len(texts)} texts")


if __name__ == "__main__":
    main()
