"""Perplexity of a causal language model on texts, per token and per word."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_speechllm.lm_score import CausalLMScorer


@dataclass(frozen=True)
class Perplexity:
    """What a language model makes of texts.

    Attributes:
        log_prob: Sum of log P(text, end of sequence), in nats.
        num_tokens: Tokens, ends of sequence included.
        num_words: Words, and one end for each text, as SRILM counts.
    """

    log_prob: float
    num_tokens: int
    num_words: int

    @property
    def per_token(self) -> float:
        """Not comparable between vocabularies."""
        return _perplexity(self.log_prob, self.num_tokens)

    @property
    def per_word(self) -> float:
        """Comparable between vocabularies that spell the same texts."""
        return _perplexity(self.log_prob, self.num_words)


def measure_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_batch_size: int = 32
) -> Perplexity:
    """The perplexity of `texts`, each begun as a search over hypotheses begins it.

    Args:
        model: Causal language model, in either mode; it is evaluated without dropout.
        tokenizer: Its tokeniser.
        texts: Texts.
        max_batch_size: Texts per call of the model.

    Raises:
        ValueError: If the vocabulary does not spell a text.
    """
    was_training = model.training
    model.eval()
    try:
        scorer = CausalLMScorer(model, tokenizer, max_batch_size=max_batch_size)
        sequences = [tokenize(scorer, text) for text in texts]
        log_prob = float(scorer.score(sequences).sum())
    finally:
        model.train(was_training)
    return Perplexity(log_prob, sum(len(ids) + 1 for ids in sequences), sum(len(text.split()) + 1 for text in texts))


def tokenize(scorer: CausalLMScorer, text: str) -> list[int]:
    """Tokens of `text`, without beginning and end.

    Raises:
        ValueError: If the vocabulary does not spell it.
    """
    ids = scorer.tokenize(text)
    if scorer.tokenizer.unk_token_id in ids:
        raise ValueError(
            f"texts: the vocabulary does not spell {text!r}; normalise the texts (text_normalization), or train the "
            "vocabulary on such texts too."
        )
    return ids


def _perplexity(log_prob: float, count: int) -> float:
    exponent = -log_prob / count
    return math.exp(exponent) if exponent < 700.0 else math.inf
