"""N-best lists scored by a language model after the search, from any acoustic model.

Shape legend: B utterances, K hypotheses per utterance, T tokens of the decoder.

Source: Chorowski and Jaitly (2017), "Towards better decoding and language model integration in sequence to sequence
models", for the log-linear score; McDermott et al. (2019), "A density ratio approach to language model fusion", for the
prior.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
)

from .hypothesis import Hypothesis
from .lm_score import CausalLMScorer

_IMPOSSIBLE = -1.0e8  # beams that transformers fills a list with when there are not enough tokens score -1e9


class _SharedAudioCache(EncoderDecoderCache):
    """Beams change places within an utterance only, and all of its beams hear the same: what is kept of the audio stays
    where it is. transformers copies it at every step, which takes longer than the step where Whisper is small."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


def rescore_nbest(
    hypotheses: Sequence[Sequence[Hypothesis]],
    lm: CausalLMScorer | None,
    *,
    lm_weight: float,
    prior: CausalLMScorer | Tensor | None = None,
    prior_weight: float = 0.0,
    length_reward: float = 0.0,
    length_penalty: float = 0.0,
) -> list[list[Hypothesis]]:
    """Scores N-best lists with a language model and sorts them, best first.

    The score is `(am + lm_weight * lm - prior_weight * prior + length_reward * num_tokens) / length ** length_penalty`
    with `length = num_tokens + 1`, the end of sequence included. Each distinct text of the whole set is scored once.

    Args:
        hypotheses: per utterance a list, which may be empty.
        lm: sets `lm_log_prob` (EOS included) and `num_tokens` from the text; None keeps those of the hypotheses.
        lm_weight: scale of the language model.
        prior: sets `prior_log_prob`: a language model over the text (EOS included), or log-probs [A] per label of the
            acoustic model, summed over `labels`; None keeps that of the hypotheses.
        prior_weight: scale of the prior, which is subtracted.
        length_reward: nats added per token of the language model.
        length_penalty: exponent of the length, 0 or more; 0 does not normalise.

    Returns:
        The same hypotheses with their new scores; of equal ones the earlier stays first.

    Raises:
        ValueError: a hypothesis has no text for a language model or a label outside `prior`, `length_penalty` is
            negative, or a text is longer than the language model's positions.
    """
    rows = [hypothesis for utterance in hypotheses for hypothesis in utterance]
    if lm is not None:
        tokens = [lm.tokenize(text) for text in texts_of(rows, "hypotheses")]
        lm_log_probs = lm.score(tokens).tolist()
        rows = [
            replace(row, lm_log_prob=log_prob, num_tokens=len(ids))
            for row, log_prob, ids in zip(rows, lm_log_probs, tokens, strict=True)
        ]
    if prior is not None:
        prior_log_probs = _prior_log_probs(rows, prior)
        rows = [replace(row, prior_log_prob=value) for row, value in zip(rows, prior_log_probs, strict=True)]
    scored = iter(
        replace(row, log_score=row.combined(lm_weight, prior_weight, length_reward, length_penalty)) for row in rows
    )
    return [
        sorted(itertools.islice(scored, len(utterance)), key=lambda row: row.log_score, reverse=True)
        for utterance in hypotheses
    ]


@torch.no_grad()
def nbest_from_seq2seq(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    input_features: Tensor,
    *,
    num_beams: int,
    num_return_sequences: int,
    attention_mask: Tensor | None = None,
    language: str | None = None,
    task: str = "transcribe",
    max_new_tokens: int | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
) -> list[list[Hypothesis]]:
    """N-best lists of an encoder-decoder ASR model of transformers (Whisper, Moonshine) by beam search.

    `am_log_prob` is log P(tokens, EOS | audio and decoder prompt) of the model as it is, without length normalisation;
    tokens that the generation config suppresses are not searched. transformers keeps the scores of every step until
    the end: B * num_beams * steps * vocabulary floats, so use batches that leave room for them.

    Whisper's own `generate` cannot do this: asked for several sequences it searches several times and returns the best
    one each time. The plain beam search runs here instead, on one window of audio (30 s) without timestamps.

    Args:
        model: the encoder-decoder model.
        processor: its processor, for the text.
        input_features: [B, ...] what the model's encoder takes: log-mel features (Whisper) or samples (Moonshine).
        num_beams: width of the search, at least 2.
        num_return_sequences: K, at most `num_beams`.
        attention_mask: [B, ...] of `input_features`, for models that take one.
        language: code such as "en"; required for multilingual Whisper, which is not asked to guess it, and only there.
        task: "transcribe" or "translate", for multilingual Whisper.
        max_new_tokens: most tokens after the decoder's prompt, EOS included; None: as the generation config says.
        logits_processor: further processors, such as [`CTCPrefixLogitsProcessor`]; `am_log_prob` is then the sum of
            the scores that they leave.

    Returns:
        Per utterance up to K hypotheses, best first, `labels` and `text` without prompt, EOS and padding.

    Raises:
        ValueError: the model is not an encoder-decoder, or an argument is out of range or does not fit the model.
    """
    if not model.config.is_encoder_decoder:
        raise ValueError(f"model: expected an encoder-decoder, got {type(model).__name__}.")
    if num_beams < 2 or not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_beams, num_return_sequences: expected at least 2 beams and 1 to num_beams sequences, got {num_beams} "
            f"and {num_return_sequences}."
        )
    prompt = torch.tensor(_decoder_prompt(model, language, task), device=input_features.device)
    options = {} if attention_mask is None else {"attention_mask": attention_mask}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    output = GenerationMixin.generate(
        model,
        input_features,
        decoder_input_ids=prompt.expand(len(input_features), -1),
        decoder_start_token_id=int(prompt[0]),  # or another one would be put in front
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=0.0,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=LogitsProcessorList(logits_processor),
        past_key_values=_SharedAudioCache(DynamicCache(), DynamicCache()),
        **options,
    )
    eos_token_ids = torch.as_tensor(model.generation_config.eos_token_id, device=prompt.device).reshape(-1)
    generated = output.sequences[:, len(prompt) :]  # B*K, T
    num_labels = (torch.isin(generated, eos_token_ids).cumsum(1) == 0).sum(1)  # B*K
    rows = []
    for ids, length, log_prob in zip(
        generated.tolist(), num_labels.tolist(), output.sequences_scores.tolist(), strict=True
    ):
        labels = tuple(ids[:length])
        text = processor.tokenizer.decode(labels, skip_special_tokens=True).strip()
        rows.append(Hypothesis(labels, text, am_log_prob=log_prob, log_score=log_prob))
    return [
        [row for row in rows[first : first + num_return_sequences] if row.am_log_prob > _IMPOSSIBLE]
        for first in range(0, len(rows), num_return_sequences)
    ]


def texts_of(rows: Sequence[Hypothesis], parameter: str) -> list[str]:
    """Texts of hypotheses that must all have one; `parameter` is named in the error."""
    texts = [row.text for row in rows]
    if None in texts:
        raise ValueError(
            f"{parameter}: expected text in all of them, got None for labels {rows[texts.index(None)].labels}; decode "
            "the labels first."
        )
    return texts


def _prior_log_probs(rows: Sequence[Hypothesis], prior: CausalLMScorer | Tensor) -> list[float]:
    if isinstance(prior, CausalLMScorer):
        return prior.score([prior.tokenize(text) for text in texts_of(rows, "hypotheses")]).tolist()
    if prior.dim() != 1:
        raise ValueError(f"prior: expected log-probs [A], one per label, got shape {tuple(prior.shape)}.")
    highest = max((label for row in rows for label in row.labels), default=-1)
    if highest >= len(prior):
        raise ValueError(f"prior: expected a log-prob for every label up to {highest}, got {len(prior)}.")
    log_probs = prior.double().cpu()
    return [float(log_probs[list(row.labels)].sum()) for row in rows]


def _decoder_prompt(model: PreTrainedModel, language: str | None, task: str) -> list[int]:
    """What the decoder starts with. Only Whisper has more than one token: language, task, "no timestamps"."""
    config = model.generation_config
    start = config.decoder_start_token_id
    if start is None:
        start = model.config.decoder_start_token_id
    languages = getattr(config, "lang_to_id", None) if getattr(config, "is_multilingual", False) else None
    if languages is None and language is not None:
        raise ValueError(f"language: expected None for {type(model).__name__}, which knows one, got {language!r}.")
    prompt = [start]
    if languages is not None:
        if f"<|{language}|>" not in languages:
            raise ValueError(
                f"language: expected one of {[key[2:-2] for key in languages]}, got {language!r}; a pipeline takes it "
                'as generate_kwargs={"language": "en"}.'
            )
        if task not in config.task_to_id:
            raise ValueError(f"task: expected one of {list(config.task_to_id)}, got {task!r}.")
        prompt += [languages[f"<|{language}|>"], config.task_to_id[task]]
    no_timestamps = getattr(config, "no_timestamps_token_id", None)
    return prompt if no_timestamps is None else [*prompt, no_timestamps]
