"""Time-synchronous CTC beam search, alone or fused with a language model: label by label, or delayed.

Shape legend: B utterances, K hypotheses (beams) per utterance, T frames, A = U + 1 label axis of the CTC output (U
labels and the blank). All scores are natural-log probabilities.

    none      prefix beam search; N-best lists for rescoring.
    label     a label is a token of the language model: log P(token | history) counts when the label starts, before the
              beam is pruned. The language model is called when a continuation that it has to score may survive.
    delayed   labels and tokens differ: every `interval` frames, and in the end, complete words become tokens and count
              from then on. Nothing is added for the beginning of a word.

The score of a hypothesis is in all cases that of `Hypothesis.combined`, end of sequence included; the fusions differ in
what the pruning knows. With a beam that never drops anything they agree.

Source: Hannun et al. (2014), "First-pass large vocabulary continuous speech recognition using bi-directional recurrent
DNNs"; Schmitt et al. (2026), "LLMs and Speech: Integration vs. Combination", for delayed fusion.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .ctc_beam import Beam, Emissions, score_dtype
from .ctc_fusion import DelayedFusion, FusionScores, LabelFusion, Scales
from .ctc_text import LabelsToText
from .hypothesis import Hypothesis
from .label_units import LabelUnits
from .lm_score import CausalLMScorer
from .rescoring import rescore_nbest

Fusion = Literal["none", "label", "delayed"]
Recombination = Literal["max", "sum"]

_RECOMBINE = {"max": torch.maximum, "sum": torch.logaddexp}
_FRAMES_PER_CHECK = 16  # how often the longest hypothesis is asked for, which waits for the device


@torch.no_grad()
def ctc_beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    *,
    blank_id: int,
    beam_size: int = 16,
    lm: CausalLMScorer | None = None,
    lm_weight: float = 0.0,
    fusion: Fusion = "none",
    interval: int | None = 1,
    label_units: LabelUnits | None = None,
    labels_to_text: LabelsToText | None = None,
    prior: Tensor | None = None,
    prior_weight: float = 0.0,
    length_reward: float = 0.0,
    recombination: Recombination = "sum",
    label_top_k: int | None = 20,
    n_best: int = 1,
) -> list[list[Hypothesis]]:
    """Finds the best label sequences of CTC outputs.

    `am_log_prob` is the log-probability of all alignments of a hypothesis that stayed in the beam (`"sum"`), which is
    the full CTC probability if none was dropped and a lower bound otherwise, or that of the best of them (`"max"`). It
    is never computed anew after the search, so that it is the same whatever is fused, if the beam is.

    For fewer frames, pass the result of `ctc_frames.merge_blank_frames`.

    Args:
        log_probs: [B, T, A] log-softmax of the CTC output of any model, any float dtype. Not modified; -inf is allowed.
            Padding may hold anything, NaN included.
        lengths: [B] integer number of valid frames, 0 to T. With 0 only the empty hypothesis is possible.
        blank_id: position of the blank on the label axis (`pad_token_id` of an `AutoModelForCTC`).
        beam_size: K.
        lm: the language model, for all fusions but "none"; on the device of `log_probs`, if that is not the CPU.
        lm_weight: its scale.
        fusion: "none", "label" or "delayed"; see above.
        interval: frames between two conversions of delayed fusion; 1: each word when it is complete; None: in the end
            only, which is N-best rescoring with all K hypotheses (`rescore_nbest`).
        label_units: which token each label is, for fusion "label".
        labels_to_text: spells a label tuple, such as `ctc_text.labels_to_text_of(tokenizer)`; required for fusion
            "delayed", where the text that white space follows must not change when labels are added. Sets
            `Hypothesis.text` in any case.
        prior: [A] log-prob of each label; the blank's may be anything.
        prior_weight: scale of the prior, which is subtracted: per label as it starts or, delayed, with its word.
        length_reward: nats per token of the language model; per label without one.
        recombination: whether alignments of one label sequence are added up or the best one stands for all.
        label_top_k: only so many labels, the most probable ones of each frame without the blank, may start a hypothesis
            that is not in the beam; None: all of them.
        n_best: most hypotheses to return, 1 to K.

    Returns:
        Per utterance the hypotheses, best first, with their separate scores. Impossible ones are left out: there may be
        fewer than `n_best`, but without a language model that excludes everything there is one at least.

    Raises:
        TypeError: `log_probs` is not floating point, `lengths` not integer, or `labels_to_text` returns no text.
        ValueError: a shape or range is wrong, an argument is missing or has no use for this fusion, a valid frame holds
            NaN or is not a distribution, `labels_to_text` takes complete words back, or a hypothesis is longer than the
            language model's positions.
    """
    emissions = Emissions.from_log_probs(log_probs, lengths, blank_id, label_top_k)
    _check_search(beam_size, n_best, recombination)
    _check_fusion(fusion, interval, lm, lm_weight, label_units, labels_to_text)
    scales = Scales(lm_weight, prior_weight, length_reward)
    prior = _checked_prior(prior, scales, log_probs, blank_id)
    if fusion == "label":
        label_units = _checked_units(label_units, lm, log_probs, blank_id)
    rescores = fusion == "delayed" and interval is None
    if rescores:
        method = LabelFusion(Scales(0.0, 0.0, 0.0), None, None, None)
    elif fusion == "delayed":
        method = DelayedFusion(scales, prior, lm, labels_to_text, interval)
    else:
        method = LabelFusion(scales, prior, lm, label_units)
    beam, scores = _search(emissions, method, len(lengths), beam_size, recombination)
    hypotheses = _hypotheses(beam, scores, method.scales, labels_to_text, beam_size if rescores else n_best)
    if not rescores:
        return hypotheses
    rescored = rescore_nbest(hypotheses, lm, prior=prior, **vars(scales))
    return [[row for row in rows if row.log_score > -math.inf][:n_best] for rows in rescored]


def _search(
    emissions: Emissions, fusion: LabelFusion | DelayedFusion, num_utterances: int, beam_size: int, recombination: str
) -> tuple[Beam, FusionScores]:
    """The beam after the last frame and its scores."""
    beam = Beam.start(num_utterances, beam_size, emissions.device)
    state = fusion.start(beam)
    for t in range(emissions.num_frames):
        if t % _FRAMES_PER_CHECK == 0:
            beam = beam.with_room(_FRAMES_PER_CHECK)
        step = beam.step(emissions.frame(t), _RECOMBINE[recombination], state.bonus)
        state, start_bonus = fusion.before_pruning(state, step)
        beam = step.best(start_bonus)
        state = fusion.advance(state, beam)
    return beam, fusion.finish(state, beam)


def _hypotheses(
    beam: Beam, scores: FusionScores, scales: Scales, labels_to_text: LabelsToText | None, n_best: int
) -> list[list[Hypothesis]]:
    """The best hypotheses of each utterance, best first."""
    columns = (beam.log_prob, *scores, beam.labels, beam.num_labels)
    result = []
    for rows in zip(*(column.tolist() for column in columns), strict=True):
        utterance = []
        for am, lm, prior, num_tokens, labels, num_labels in zip(*rows, strict=True):
            hypothesis = Hypothesis(tuple(labels[:num_labels]), None, am, lm, prior, num_tokens)
            log_score = hypothesis.combined(scales.lm_weight, scales.prior_weight, scales.length_reward)
            if log_score > -math.inf:
                utterance.append(replace(hypothesis, log_score=log_score))
        utterance.sort(key=lambda hypothesis: hypothesis.log_score, reverse=True)
        result.append([_with_text(hypothesis, labels_to_text) for hypothesis in utterance[:n_best]])
    return result


def _with_text(hypothesis: Hypothesis, labels_to_text: LabelsToText | None) -> Hypothesis:
    if labels_to_text is None:
        return hypothesis
    return replace(hypothesis, text=" ".join(labels_to_text(hypothesis.labels).split()))


def _check_search(beam_size: int, n_best: int, recombination: str) -> None:
    if beam_size < 1:
        raise ValueError(f"beam_size: expected at least 1, got {beam_size}.")
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best: expected 1 to {beam_size} (beam_size), got {n_best}.")
    if recombination not in _RECOMBINE:
        raise ValueError(f"recombination: expected one of {list(_RECOMBINE)}, got {recombination!r}.")


def _check_fusion(
    fusion: str,
    interval: int | None,
    lm: CausalLMScorer | None,
    lm_weight: float,
    label_units: LabelUnits | None,
    labels_to_text: LabelsToText | None,
) -> None:
    if fusion not in ("none", "label", "delayed"):
        raise ValueError(f'fusion: expected "none", "label" or "delayed", got {fusion!r}.')
    if fusion == "none" and (lm is not None or lm_weight != 0.0):
        raise ValueError('lm, lm_weight: expected none for fusion "none"; choose "label" or "delayed".')
    if fusion != "none" and lm is None:
        raise ValueError(f'lm: expected a language model for fusion "{fusion}", got None.')
    if (fusion == "label") != (label_units is not None):
        raise ValueError(
            f'label_units: expected them for fusion "label" and only there, got {label_units} for "{fusion}".'
        )
    if fusion == "delayed" and labels_to_text is None:
        raise ValueError('labels_to_text: expected a callable for fusion "delayed", got None.')
    if interval is not None and interval < 1:
        raise ValueError(f"interval: expected at least 1 frame, or None for the end of the search, got {interval}.")
    if fusion != "delayed" and interval != 1:
        raise ValueError(f'interval: expected it for fusion "delayed" only, got {interval} for "{fusion}".')


def _checked_prior(prior: Tensor | None, scales: Scales, log_probs: Tensor, blank_id: int) -> Tensor | None:
    """The prior in the dtype and on the device of the scores, 0 for the blank."""
    for name, value in vars(scales).items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}.")
    if prior is None:
        if scales.prior_weight != 0.0:
            raise ValueError(f"prior: expected log-probs [A] for a prior_weight of {scales.prior_weight}, got None.")
        return None
    if prior.shape != log_probs.shape[2:]:
        raise ValueError(f"prior: expected shape ({log_probs.shape[2]},), one per label, got {tuple(prior.shape)}.")
    prior = prior.to(log_probs.device, score_dtype(log_probs.device)).clone()
    prior[blank_id] = 0.0
    if not bool(prior.isfinite().all()):
        raise ValueError(
            f"prior: expected finite log-probs, got {prior[~prior.isfinite()][0].item()} for label "
            f"{int((~prior.isfinite()).int().argmax())}; smooth it."
        )
    return prior


def _checked_units(label_units: LabelUnits, lm: CausalLMScorer, log_probs: Tensor, blank_id: int) -> LabelUnits:
    """The label units on the device of the scores."""
    if label_units.num_labels != log_probs.shape[2] or label_units.blank_id != blank_id:
        raise ValueError(
            f"label_units: expected {log_probs.shape[2]} labels with the blank at {blank_id} as in log_probs, got "
            f"{label_units.num_labels} with the blank at {label_units.blank_id}."
        )
    label_units.check_vocab_size(lm.vocab_size)
    return label_units.to(log_probs.device)
