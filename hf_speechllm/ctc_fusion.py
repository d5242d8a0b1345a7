"""Language model, prior and length reward within a time-synchronous CTC beam search: label by label, or delayed.

Shape legend: B utterances, K hypotheses per utterance, C labels considered per frame, A label axis of the CTC output
(blank included), V vocabulary of the language model, R rows of the language model's state, M new tokens per row.

A fusion is an object with settings, and a state per beam: `start`, then `before_pruning` and `advance` in each frame,
and `finish`. The search adds `state.bonus` to the CTC score of each hypothesis, and where one gains a label what
`before_pruning` returns.

Source: Hannun et al. (2014), "First-pass large vocabulary continuous speech recognition using bi-directional recurrent
DNNs", for the label-wise score; Schmitt et al. (2026), "LLMs and Speech: Integration vs. Combination", for delayed
fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .ctc_beam import NO_LABEL, Beam, Step, score_dtype
from .ctc_text import LabelsToText, complete_words
from .label_units import LabelUnits
from .lm_score import CausalLMScorer, LMState

_Words = tuple[str, ...]

_CACHED_TEXTS = 1 << 14  # hypotheses leave the beam and come back


@dataclass(frozen=True)
class Scales:
    """Weights of the log-linear score, as of `Hypothesis.combined`."""

    lm_weight: float
    prior_weight: float
    length_reward: float

    def combine(self, scores: FusionScores) -> Tensor:
        """[B, K] what a hypothesis has beyond its CTC score."""
        bonus = self.length_reward * scores.num_tokens.to(scores.lm_log_prob.dtype)
        # A weight of 0 switches its model off: 0 * -inf is NaN.
        if self.lm_weight != 0.0:
            bonus = bonus + self.lm_weight * scores.lm_log_prob
        if self.prior_weight != 0.0:
            bonus = bonus - self.prior_weight * scores.prior_log_prob
        return bonus


class FusionScores(NamedTuple):
    """Scores per hypothesis, [B, K] each.

    Attributes:
        lm_log_prob: log-prob of the language model; 0 without one.
        prior_log_prob: log-prob of the prior; 0 without one.
        num_tokens: int64 tokens of the language model; without one the number of labels.
    """

    lm_log_prob: Tensor
    prior_log_prob: Tensor
    num_tokens: Tensor


# Label-wise


@dataclass(frozen=True, eq=False)
class LabelFusionState:
    """What `LabelFusion` knows of the hypotheses of a beam; never modified.

    Attributes:
        bonus: [B, K] beyond the CTC score, None if nothing is fused.
        scores: of all labels so far.
    """

    bonus: Tensor | None
    scores: FusionScores
    _lm_state: LMState | None
    _lm_row: Tensor  # [B, K] row of `_lm_state`
    _unread: Tensor  # [B, K] the last token, if the row does not hold it, or `NO_LABEL`


class LabelFusion:
    """Adds the scores of each label in the frame that starts it, before the beam is pruned.

    Without a language model only prior and length reward count. The language model is called when a label started by a
    hypothesis that it has not read may be among the best: until then log P <= 0 bounds what that label brings.

    Args:
        scales: weights.
        prior: [A] log-prob of each label.
        lm: a language model whose tokens correspond to labels.
        label_units: this correspondence.
    """

    def __init__(
        self, scales: Scales, prior: Tensor | None, lm: CausalLMScorer | None, label_units: LabelUnits | None
    ) -> None:
        self.scales = scales
        self.prior = prior
        self.lm = lm
        self.label_units = label_units
        self._is_idle = lm is None and scales.length_reward == 0.0 and scales.prior_weight == 0.0

    def start(self, beam: Beam) -> LabelFusionState:
        """The state of the beam before the first frame."""
        zeros, no_row = torch.zeros_like(beam.log_prob), torch.zeros_like(beam.num_labels)
        lm_state = self.lm.start(1) if self.lm is not None else None
        scores = FusionScores(zeros, zeros, beam.num_labels)
        return LabelFusionState(None if self._is_idle else zeros, scores, lm_state, no_row, no_row + NO_LABEL)

    def before_pruning(self, state: LabelFusionState, step: Step) -> tuple[LabelFusionState, Tensor | None]:
        """The state with what the step needs of the language model, and [B, K or 1, C] nats for starting a label."""
        if self._is_idle:
            return state, None
        labels = step.frame.labels
        start_bonus = self._start_bonus(state, labels)
        is_unread = (state._unread != NO_LABEL) & step.beam.is_alive
        if not bool(is_unread.any()):
            return state, start_bonus
        # With a negative weight nothing bounds the score of the language model.
        is_bounded = self.scales.lm_weight >= 0
        if not is_bounded or bool((is_unread & step.may_start(start_bonus, ~is_unread)).any()):
            # All of them: another call later would cost more than their rows in this one.
            state = self._read(state, is_unread, step.beam.is_alive)
            start_bonus = self._start_bonus(state, labels)
        return state, start_bonus

    def _start_bonus(self, state: LabelFusionState, labels: Tensor) -> Tensor:
        """[B, K or 1, C] nats for starting each of `labels` [B, C].

        Of hypotheses whose last token the language model has not read, its log P counts 0: with `lm_weight >= 0` that
        is an upper bound.
        """
        none = torch.zeros(labels.shape, dtype=score_dtype(labels.device), device=labels.device)[:, None]
        scores = FusionScores(none, none, torch.ones_like(none, dtype=torch.long))
        if self.prior is not None:
            scores = scores._replace(prior_log_prob=self.prior[labels][:, None])
        if state._lm_state is not None:
            token = self.label_units.labels_to_tokens(labels)[:, None]  # B, 1, C
            lm_log_prob = state._lm_state.next_log_probs[state._lm_row[:, :, None], token].to(none)
            is_unread = (state._unread != NO_LABEL)[:, :, None]
            scores = scores._replace(lm_log_prob=lm_log_prob.masked_fill(is_unread, 0.0))
        return self.scales.combine(scores)

    def advance(self, state: LabelFusionState, beam: Beam) -> LabelFusionState:
        """The state after the frame that led to `beam`."""
        if self._is_idle and self.prior is None:
            return replace(state, scores=state.scores._replace(num_tokens=beam.num_labels))
        is_new, label = beam.new_label != NO_LABEL, beam.new_label.clamp(min=0)
        prior_log_prob = state.scores.prior_log_prob.gather(1, beam.parent)
        if self.prior is not None:
            prior_log_prob = prior_log_prob + self.prior[label].masked_fill(~is_new, 0.0)
        lm_log_prob = state.scores.lm_log_prob.gather(1, beam.parent)
        row, unread = state._lm_row.gather(1, beam.parent), state._unread.gather(1, beam.parent)
        if state._lm_state is not None:
            # Only hypotheses that were read have surviving continuations.
            token = self.label_units.labels_to_tokens(label)
            gained = state._lm_state.next_log_probs[row, token].to(lm_log_prob)
            lm_log_prob = lm_log_prob + gained.masked_fill(~is_new, 0.0)
            unread = torch.where(is_new, token, unread)
        scores = FusionScores(lm_log_prob, prior_log_prob, beam.num_labels)
        bonus = None if self._is_idle else self.scales.combine(scores)
        return LabelFusionState(bonus, scores, state._lm_state, row, unread)

    def _read(self, state: LabelFusionState, is_read: Tensor, is_alive: Tensor) -> LabelFusionState:
        """Lets the language model read the last token where `is_read` [B, K], and drops rows that nobody needs."""
        is_kept = is_alive & ~is_read
        kept, place = state._lm_row[is_kept].unique(return_inverse=True)
        parent = torch.cat((kept, state._lm_row[is_read]))
        tokens = torch.cat((torch.zeros_like(kept), state._unread[is_read]))
        num_tokens = (torch.arange(len(parent), device=parent.device) >= len(kept)).long()
        lm_state = self.lm.advance(state._lm_state, parent, tokens[:, None], num_tokens)
        row = torch.zeros_like(state._lm_row)
        row[is_kept] = place
        row[is_read] = torch.arange(len(kept), len(parent), device=parent.device)
        unread = state._unread.masked_fill(is_read, NO_LABEL)
        return replace(state, _lm_state=lm_state, _lm_row=row, _unread=unread)

    def finish(self, state: LabelFusionState, beam: Beam) -> FusionScores:
        """Scores of the final hypotheses, the language model's end of sequence included."""
        if state._lm_state is None:
            return state.scores
        is_unread = (state._unread != NO_LABEL) & beam.is_alive
        if bool(is_unread.any()):
            state = self._read(state, is_unread, beam.is_alive)
        eos = state._lm_state.next_log_probs[state._lm_row, self.lm.eos_token_id]
        return state.scores._replace(lm_log_prob=state.scores.lm_log_prob + eos.to(state.scores.lm_log_prob))


# Delayed


@dataclass(frozen=True)
class _Progress:
    """What became of the labels of one hypothesis.

    Attributes:
        num_labels: labels that the last conversion saw.
        num_converted: of these, the labels of complete words.
        words: the complete words.
        prior_log_prob: of the converted labels.
    """

    num_labels: int
    num_converted: int
    words: _Words
    prior_log_prob: float


class _ScoredWords(NamedTuple):
    """Row of the language model's state, log-prob and number of tokens of a word sequence."""

    row: int
    lm_log_prob: float
    num_tokens: int


@dataclass(frozen=True, eq=False)
class DelayedFusionState:
    """What `DelayedFusion` knows of the hypotheses of a beam; never modified.

    Attributes:
        bonus: [B, K] beyond the CTC score.
        scores: of the complete words that were converted.
    """

    bonus: Tensor
    scores: FusionScores
    _num_frames: int
    _ancestor: Tensor  # [B, K] hypothesis at the last conversion that each one continues
    _progress: Sequence[Sequence[_Progress]]  # B, K at the last conversion
    _num_seen: Tensor  # [B, K] its num_labels
    _lm_state: LMState
    _scored: dict[_Words, _ScoredWords]  # all utterances share it


class DelayedFusion:
    """Adds scores of complete words every `interval` frames, after the beam was pruned, and of the rest in the end.

    Labels become text, its complete words tokens of the language model, and these are scored in one call for all
    utterances. Hypotheses with the same words share a row of the language model. Prior and length reward move in step:
    a label counts when its word does.

    Args:
        scales: weights.
        prior: [A] log-prob of each label.
        lm: any language model.
        labels_to_text: spells labels.
        interval: frames between conversions.
    """

    def __init__(
        self, scales: Scales, prior: Tensor | None, lm: CausalLMScorer, labels_to_text: LabelsToText, interval: int
    ) -> None:
        self.scales = scales
        self.lm = lm
        self.interval = interval
        self._prior = prior.tolist() if prior is not None else None
        self._to_text = lru_cache(_CACHED_TEXTS)(labels_to_text)
        self._tokenize = lru_cache(_CACHED_TEXTS)(lm.tokenize)

    def start(self, beam: Beam) -> DelayedFusionState:
        """The state of the beam before the first frame."""
        zeros = torch.zeros_like(beam.log_prob)
        no_progress = _Progress(0, 0, (), 0.0)
        return DelayedFusionState(
            bonus=zeros,
            scores=FusionScores(zeros, zeros, beam.num_labels),
            _num_frames=0,
            _ancestor=torch.arange(zeros.shape[1], device=zeros.device).expand_as(zeros),
            _progress=[[no_progress] * zeros.shape[1] for _ in zeros],
            _num_seen=beam.num_labels,
            _lm_state=self.lm.start(1),
            _scored={(): _ScoredWords(0, 0.0, 0)},
        )

    def before_pruning(self, state: DelayedFusionState, step: Step) -> tuple[DelayedFusionState, None]:
        """Nothing: what a label is worth is known when its word is complete."""
        return state, None

    def advance(self, state: DelayedFusionState, beam: Beam) -> DelayedFusionState:
        """The state after the frame that led to `beam`."""
        moved = replace(
            state,
            bonus=state.bonus.gather(1, beam.parent),
            scores=FusionScores(*(score.gather(1, beam.parent) for score in state.scores)),
            _num_frames=state._num_frames + 1,
            _ancestor=state._ancestor.gather(1, beam.parent),
            _num_seen=state._num_seen.gather(1, beam.parent),
        )
        return self._convert(moved, beam, is_end=False) if moved._num_frames % self.interval == 0 else moved

    def finish(self, state: DelayedFusionState, beam: Beam) -> FusionScores:
        """Scores of the final hypotheses: unfinished words and the end of sequence included."""
        state = self._convert(state, beam, is_end=True)
        eos = state._lm_state.next_log_probs[:, self.lm.eos_token_id].tolist()
        eos_log_prob = [
            [eos[scored.row] if scored is not None else 0.0 for scored in self._scored_words(state, row)]
            for row in state._progress
        ]
        lm_log_prob = state.scores.lm_log_prob
        return state.scores._replace(lm_log_prob=lm_log_prob + lm_log_prob.new_tensor(eos_log_prob))

    def _convert(self, state: DelayedFusionState, beam: Beam, *, is_end: bool) -> DelayedFusionState:
        """Reads the labels that hypotheses gained since the last conversion, and scores the words they completed."""
        is_pending = beam.is_alive & (is_end | (beam.num_labels > state._num_seen))
        pending = is_pending.nonzero().tolist()
        if not pending:
            return state
        progress = [[old[k] for k in row] for old, row in zip(state._progress, state._ancestor.tolist(), strict=True)]
        # Each word sequence that a living hypothesis has, and one of which the language model knows the state.
        known = {
            row[k].words: row[k].words
            for row, alive in zip(progress, beam.is_alive.tolist(), strict=True)
            for k in range(len(row))
            if alive[k]
        }
        labels, num_labels = beam.labels[is_pending].tolist(), beam.num_labels[is_pending].tolist()
        for (b, k), row, length in zip(pending, labels, num_labels, strict=True):
            old = progress[b][k]
            progress[b][k] = new = self._read(old, tuple(row[:length]), is_end)
            known.setdefault(new.words, old.words)
        lm_state, scored = self._score(state, known)
        return self._with_scores(replace(state, _lm_state=lm_state, _scored=scored), beam, progress)

    def _with_scores(
        self, state: DelayedFusionState, beam: Beam, progress: Sequence[Sequence[_Progress]]
    ) -> DelayedFusionState:
        """The state whose scores are those of `progress`."""
        state = replace(state, _progress=progress)
        columns = [
            [
                (s.lm_log_prob, p.prior_log_prob, s.num_tokens) if s is not None else (0.0, 0.0, 0)
                for s, p in zip(self._scored_words(state, row), row, strict=True)
            ]
            for row in progress
        ]
        lm, prior, num_tokens = state.bonus.new_tensor(columns).unbind(2)
        scores = FusionScores(lm, prior, num_tokens.long())
        return replace(
            state,
            bonus=self.scales.combine(scores),
            scores=scores,
            _ancestor=torch.arange(beam.parent.shape[1], device=beam.parent.device).expand_as(beam.parent),
            _num_seen=beam.num_labels,
        )

    def _scored_words(self, state: DelayedFusionState, row: Sequence[_Progress]) -> list[_ScoredWords | None]:
        """Scores of the hypotheses of one utterance; None where one is dead and its words were not scored."""
        return [state._scored.get(progress.words) for progress in row]

    def _read(self, old: _Progress, labels: tuple[int, ...], is_end: bool) -> _Progress:
        """The progress of `labels`, of which `old` saw the first."""
        text = self._text(labels)
        words = tuple(text.split()) if is_end else complete_words(text)
        if words[: len(old.words)] != old.words:
            raise ValueError(
                f"labels_to_text: expected the complete words {' '.join(old.words)!r} to stay when further labels "
                f"follow, got {text!r}; it must not rewrite text across words (no clean-up of spaces, no formatting)."
            )
        if len(words) == len(old.words) and not is_end:
            return replace(old, num_labels=len(labels))
        if self._prior is None:
            return _Progress(len(labels), 0, words, 0.0)
        num_converted = len(labels) if is_end else self._count_converted(labels, old.num_labels, words)
        gained = sum(self._prior[label] for label in labels[old.num_converted : num_converted])
        return _Progress(len(labels), num_converted, words, old.prior_log_prob + gained)

    def _count_converted(self, labels: tuple[int, ...], num_seen: int, words: _Words) -> int:
        """How many labels belong to the complete `words`, the last of which came after `num_seen` labels."""
        counts = range(num_seen + 1, len(labels) + 1)
        count = next(count for count in counts if complete_words(self._text(labels[:count])) == words)
        # The label that completed them is a delimiter, or it starts the next word.
        return count if self._text(labels[:count])[-1].isspace() else count - 1

    def _text(self, labels: tuple[int, ...]) -> str:
        text = self._to_text(labels)
        if not isinstance(text, str):
            raise TypeError(f"labels_to_text: expected it to return str, got {type(text).__name__}.")
        return text

    def _score(
        self, state: DelayedFusionState, known: dict[_Words, _Words]
    ) -> tuple[LMState, dict[_Words, _ScoredWords]]:
        """Brings the language model to all word sequences of `known`, each from the shorter one it is mapped to."""
        old = [words for words in known if words in state._scored]
        new = [words for words in known if words not in state._scored]
        if not new:
            return state._lm_state, state._scored
        starts = [state._scored[words] for words in old] + [state._scored[known[words]] for words in new]
        tokens = [[] for _ in old] + [self._tokenize(" ".join(words[len(known[words]) :])) for words in new]
        num_tokens = torch.tensor([len(ids) for ids in tokens])
        padded = torch.zeros(len(tokens), int(num_tokens.max()), dtype=torch.long)
        padded[torch.arange(padded.shape[1]) < num_tokens[:, None]] = torch.tensor(
            [token for ids in tokens for token in ids], dtype=torch.long
        )
        lm_state = self.lm.advance(state._lm_state, torch.tensor([s.row for s in starts]), padded, num_tokens)
        gained = lm_state.token_log_prob.tolist()
        scored = {
            words: _ScoredWords(row, start.lm_log_prob + gained[row], start.num_tokens + len(tokens[row]))
            for row, (words, start) in enumerate(zip(old + new, starts, strict=True))
        }
        return lm_state, scored
