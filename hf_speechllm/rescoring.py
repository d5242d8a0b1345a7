"""N-best lists scored by a language model after the search, from any acoustic model, and the scales for it.

Shape legend: B utterances, K hypotheses per utterance, T tokens of the decoder.

Source: Chorowski and Jaitly (2017), "Towards better decoding and language model integration in sequence to sequence
models", for the log-linear score; McDermott et al. (2019), "A density ratio approach to language model fusion", for the
prior.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, ProcessorMixin

from .hypothesis import Hypothesis
from .lm_score import CausalLMScorer
from .metrics import word_errors

_IMPOSSIBLE = -1.0e8  # beams that transformers fills a list with when there are not enough tokens score -1e9


@dataclass(frozen=True)
class ScaleChoice:
    """What `tune_scales` found; the scales are the arguments of `rescore_nbest` of the same names.

    Attributes:
        lm_weight: scale of the language model.
        prior_weight: scale of the prior.
        length_reward: nats per token.
        wer: word error rate with these scales on the lists they were tuned on, as a fraction.
    """

    lm_weight: float
    prior_weight: float
    length_reward: float
    wer: float


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
        tokens = [lm.tokenize(text) for text in _texts(rows, "hypotheses")]
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
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=0.0,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
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


def tune_scales(
    nbests: Sequence[Sequence[Hypothesis]],
    references: Sequence[str],
    *,
    lm_weights: Sequence[float],
    prior_weights: Sequence[float],
    length_rewards: Sequence[float],
    normalize: Callable[[str], str] | None = None,
) -> ScaleChoice:
    """Finds the scales with the fewest word errors on fixed N-best lists, without any model.

    All combinations are tried, then once more around the best one, half-way to its neighbours in each grid. Of equal
    ones the smaller language-model weight wins, then the smaller prior weight, then the smaller reward (absolute). Use
    lists of development data: the WER found is optimistic.

    Args:
        nbests: per utterance a list of at least one hypothesis with text and all its scores, as from `rescore_nbest`.
        references: what was said, one per utterance.
        lm_weights: values to try, at least one.
        prior_weights: values to try, at least one; [0.0] without prior.
        length_rewards: values to try, at least one; [0.0] for none.
        normalize: applied to both sides before words are compared, such as `metrics.normalize_english`.

    Raises:
        ValueError: lengths differ, a list or grid is empty, a hypothesis has no text or a score that is not finite, or
            the references have no word.
    """
    grids = []
    for name, grid in (
        ("lm_weights", lm_weights),
        ("prior_weights", prior_weights),
        ("length_rewards", length_rewards),
    ):
        if not grid or not all(math.isfinite(value) for value in grid):
            raise ValueError(f"{name}: expected at least one finite value to try, got {list(grid)}.")
        grids.append(sorted(set(grid)))
    errors, num_words = _error_table(nbests, references, normalize)
    scores = _ScoreTable.from_nbests(nbests)

    def best_of(points: Iterator[tuple[float, float, float]]) -> tuple[int, tuple[float, float, float]]:
        counted = ((int(errors.gather(1, scores.best(point)).sum()), point) for point in points)
        return min(counted, key=lambda entry: (entry[0], *(abs(value) for value in entry[1])))

    _, coarse = best_of(itertools.product(*grids))
    finer = [_around(grid, value) for grid, value in zip(grids, coarse, strict=True)]
    num_errors, (lm_weight, prior_weight, length_reward) = best_of(itertools.product(*finer))
    return ScaleChoice(lm_weight, prior_weight, length_reward, num_errors / num_words)


@dataclass(frozen=True, eq=False)
class _ScoreTable:
    """The separate scores of N-best lists, [B, K] float64 each; -inf in `am` where a list is shorter."""

    am: Tensor
    lm: Tensor
    prior: Tensor
    num_tokens: Tensor

    @classmethod
    def from_nbests(cls, nbests: Sequence[Sequence[Hypothesis]]) -> _ScoreTable:
        def column(name: str, padding: float) -> Tensor:
            rows = [torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64) for rows in nbests]
            for index, row in enumerate(rows):
                if not bool(row.isfinite().all()):
                    raise ValueError(f"nbests: expected finite {name}, got {row.tolist()} in utterance {index}.")
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

        return cls(
            am=column("am_log_prob", -math.inf),
            lm=column("lm_log_prob", 0.0),
            prior=column("prior_log_prob", 0.0),
            num_tokens=column("num_tokens", 0.0),
        )

    def best(self, scales: tuple[float, float, float]) -> Tensor:
        """[B, 1] the hypothesis of each utterance that `rescore_nbest` would put first."""
        lm_weight, prior_weight, length_reward = scales
        score = self.am + length_reward * self.num_tokens + lm_weight * self.lm - prior_weight * self.prior
        return score.argmax(1, keepdim=True)


def _error_table(
    nbests: Sequence[Sequence[Hypothesis]], references: Sequence[str], normalize: Callable[[str], str] | None
) -> tuple[Tensor, int]:
    """Word errors [B, K] of every hypothesis, each distinct one aligned once, and the number of reference words."""
    if len(nbests) != len(references):
        raise ValueError(f"references: expected one per N-best list ({len(nbests)}), got {len(references)}.")
    normalized: dict[str, str] = {}

    def normal(text: str) -> str:
        if text not in normalized:
            normalized[text] = text if normalize is None else normalize(text)
        return normalized[text]

    table, num_words = [], 0
    for index, (rows, reference) in enumerate(zip(nbests, references, strict=True)):
        if not rows:
            raise ValueError(f"nbests: expected at least one hypothesis per utterance, got none for utterance {index}.")
        texts = [normal(text) for text in _texts(rows, "nbests")]
        counts = {text: word_errors([normal(reference)], [text]) for text in set(texts)}
        num_words += counts[texts[0]].reference_words
        errors = {text: count.substitutions + count.deletions + count.insertions for text, count in counts.items()}
        table.append(torch.tensor([errors[text] for text in texts]))
    if num_words == 0:
        raise ValueError("references: expected at least one word in all references together, got none.")
    return torch.nn.utils.rnn.pad_sequence(table, batch_first=True), num_words


def _around(grid: list[float], value: float) -> list[float]:
    """`value` and the points half-way to its neighbours in the sorted `grid`."""
    place = grid.index(value)
    neighbours = grid[max(0, place - 1) : place + 2]
    return sorted({value, *((value + neighbour) / 2 for neighbour in neighbours)})


def _texts(rows: Sequence[Hypothesis], parameter: str) -> list[str]:
    texts = [row.text for row in rows]
    if None in texts:
        raise ValueError(
            f"{parameter}: expected text in all of them, got None for labels {rows[texts.index(None)].labels}; decode "
            "the labels first."
        )
    return texts


def _prior_log_probs(rows: Sequence[Hypothesis], prior: CausalLMScorer | Tensor) -> list[float]:
    if isinstance(prior, CausalLMScorer):
        return prior.score([prior.tokenize(text) for text in _texts(rows, "hypotheses")]).tolist()
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
            raise ValueError(f"language: expected one of {[key[2:-2] for key in languages]}, got {language!r}.")
        if task not in config.task_to_id:
            raise ValueError(f"task: expected one of {list(config.task_to_id)}, got {task!r}.")
        prompt += [languages[f"<|{language}|>"], config.task_to_id[task]]
    no_timestamps = getattr(config, "no_timestamps_token_id", None)
    return prompt if no_timestamps is None else [*prompt, no_timestamps]
