"""The tensors of a time-synchronous CTC beam search: one frame further at a time, all hypotheses at once.

Shape legend: B utterances, K hypotheses (beams) per utterance, T frames, A = U + 1 label axis of the CTC output (U
labels and the blank), C labels considered per frame, W room for the labels of a hypothesis. All scores are natural-log
probabilities.

A hypothesis is a label sequence. Two alignments of the same sequence must end in the same hypothesis (prefix merging),
so each frame has to know which hypotheses of the beam are others plus one label. There are no hashes for that and no
table that grows with time: the beam carries the length of the common prefix of each pair, which grows by at most one
per frame, and looks at one label of each to see whether it does. That is exact.

Source: Graves (2006), "Connectionist temporal classification"; Hannun et al. (2014), "First-pass large vocabulary
continuous speech recognition using bi-directional recurrent DNNs", algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .ctc_emissions import check_log_probs

NO_LABEL = -1

# Adds up alignments of one label sequence: torch.logaddexp for their sum, torch.maximum for the best of them.
Recombination = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Frame:
    """The CTC output of one frame.

    Attributes:
        log_probs: [B, A] as given; anything in padding.
        is_padding: [B, 1] bool, None if there is no padding.
        blank: [B, 1] log P(blank); 0 in padding, where nothing but blank follows.
        choices: [B, C+1] labels that a hypothesis may start, and `NO_LABEL` for one that starts none.
        label_log_probs: [B, C] log-probs of the labels, -inf in padding.
    """

    log_probs: Tensor
    is_padding: Tensor | None
    blank: Tensor
    choices: Tensor
    label_log_probs: Tensor

    @property
    def labels(self) -> Tensor:
        """[B, C]"""
        return self.choices[:, :-1]

    def log_prob_of(self, labels: Tensor) -> Tensor:
        """[B, K] of any labels [B, K], -inf in padding; of `NO_LABEL` any log-prob, which nothing may depend on."""
        log_probs = self.log_probs.gather(1, labels.clamp(min=0)).to(self.blank.dtype)
        return log_probs if self.is_padding is None else log_probs.masked_fill_(self.is_padding, -math.inf)


@dataclass(frozen=True, eq=False)
class Emissions:
    """The CTC output of B utterances; made by `from_log_probs`."""

    num_frames: int  # T, the frames of the longest utterance
    _log_probs: Tensor  # [B, T, A] as given
    _is_padding: Tensor  # [B, T]
    _has_padding: list[bool]  # per frame
    _blank: Tensor  # [B, T] in the dtype of all scores
    _choices: Tensor  # [B, T, C+1]
    _label_log_probs: Tensor  # [B, T, C] in the dtype of all scores

    @classmethod
    def from_log_probs(cls, log_probs: Tensor, lengths: Tensor, blank_id: int, top_k: int | None) -> Emissions:
        """Chooses the `top_k` labels of each frame; arguments as of `ctc_beam_search`.

        Raises:
            TypeError: `log_probs` is not floating point or `lengths` not integer.
            ValueError: a shape or range is wrong, or a valid frame is not a distribution.
        """
        check_log_probs(log_probs, lengths, blank_id)
        if top_k is not None and top_k < 1:
            raise ValueError(f"label_top_k: expected at least 1, or None for all labels, got {top_k}.")
        num_frames = int(lengths.max())
        log_probs, lengths = log_probs.detach()[:, :num_frames], lengths.to(log_probs.device)
        is_padding = torch.arange(num_frames, device=log_probs.device) >= lengths[:, None]  # B, T
        _check_distributions(log_probs, is_padding)
        blank = log_probs[:, :, blank_id].to(score_dtype(log_probs.device)).masked_fill(is_padding, 0.0)
        num_labels = log_probs.shape[2]
        if top_k is None or top_k >= num_labels - 1:
            labels = torch.arange(num_labels, device=log_probs.device)
            labels = labels[labels != blank_id].expand(len(lengths), num_frames, -1)
            label_log_probs = log_probs.gather(2, labels)
        else:
            label_log_probs, labels = log_probs.topk(top_k + 1, dim=2)
            # The blank is no label. Where it is among the first `top_k` + 1, which it mostly is, it leaves its place to
            # the last one.
            is_blank = labels == blank_id
            label_log_probs = torch.where(is_blank, label_log_probs[:, :, -1:], label_log_probs)[:, :, :-1]
            labels = torch.where(is_blank, labels[:, :, -1:], labels)[:, :, :-1]
        choices = torch.nn.functional.pad(labels, (0, 1), value=NO_LABEL)
        label_log_probs = label_log_probs.to(blank.dtype).masked_fill_(is_padding[:, :, None], -math.inf)
        has_padding = is_padding.any(0).tolist()
        return cls(num_frames, log_probs, is_padding, has_padding, blank, choices, label_log_probs)

    @property
    def device(self) -> torch.device:
        return self._blank.device

    def frame(self, t: int) -> Frame:
        """Frame `t` of all utterances."""
        return Frame(
            self._log_probs[:, t],
            self._is_padding[:, t : t + 1] if self._has_padding[t] else None,
            self._blank[:, t : t + 1],
            self._choices[:, t],
            self._label_log_probs[:, t],
        )


@dataclass(frozen=True, eq=False)
class Beam:
    """K hypotheses per utterance after some frames, never modified. Those without probability fill up the beam.

    Attributes:
        log_prob_blank: [B, K] log P(the frames so far emit the hypothesis, the last one blank), of the alignments that
            stayed in the beam.
        log_prob_label: [B, K] the same with a label in the last frame.
        log_prob: [B, K] both together.
        labels: [B, K, W] followed by `NO_LABEL`.
        num_labels: [B, K].
        last_label: [B, K] `NO_LABEL` if empty.
        prefix: [B, K] the hypothesis of this beam that has all labels but the last, -1 if there is none.
        parent: [B, K] the hypothesis of the previous beam that each one continues.
        new_label: [B, K] the label that it gained in the last frame, or `NO_LABEL`.
    """

    log_prob_blank: Tensor
    log_prob_label: Tensor
    log_prob: Tensor
    labels: Tensor
    num_labels: Tensor
    last_label: Tensor
    prefix: Tensor
    parent: Tensor
    new_label: Tensor
    _common_length: Tensor  # [B, K, K] labels that two hypotheses share at the start

    @classmethod
    def start(cls, num_utterances: int, num_beams: int, device: torch.device) -> Beam:
        """The beam before the first frame: the empty hypothesis."""
        shape = (num_utterances, num_beams)
        impossible = torch.full(shape, -math.inf, dtype=score_dtype(device), device=device)
        log_prob = impossible.clone()
        log_prob[:, 0] = 0.0
        zeros = torch.zeros(shape, dtype=torch.long, device=device)
        none = torch.full_like(zeros, NO_LABEL)
        return cls(
            log_prob_blank=log_prob,
            log_prob_label=impossible,
            log_prob=log_prob,
            labels=none[:, :, None],
            num_labels=zeros,
            last_label=none,
            prefix=none,
            parent=zeros,
            new_label=none,
            _common_length=zeros[:, :, None].expand(-1, -1, num_beams),
        )

    @property
    def is_alive(self) -> Tensor:
        """[B, K] bool: whether any alignment emits the hypothesis."""
        return self.log_prob > -math.inf

    def with_room(self, num_frames: int) -> Beam:
        """Returns the same beam, wide enough for that many further frames."""
        missing = int(self.num_labels.max()) + num_frames + 1 - self.labels.shape[2]
        if missing <= 0:
            return self
        return replace(self, labels=torch.nn.functional.pad(self.labels, (0, missing), value=NO_LABEL))

    # Many small operations, here and in `Step`: autograd's book-keeping would take a fifth of the time. Not around the
    # whole search, since what a language model keeps of its calls must stay usable in training.
    @torch.inference_mode()
    def step(self, frame: Frame, recombine: Recombination, bonus: Tensor | None = None) -> Step:
        """Returns all that may come of the beam in the next frame.

        Args:
            frame: the CTC output.
            recombine: how alignments of a hypothesis add up.
            bonus: [B, K] nats that a hypothesis has beyond its CTC score, for the ranking.
        """
        prefix, has_no_prefix = self.prefix.clamp(min=0), self.prefix < 0
        kept_blank, kept_label = self._stay(frame, recombine, prefix, has_no_prefix)
        log_prob_label = self._start_label(frame, prefix, has_no_prefix)
        log_prob_label[:, :, -1] = kept_label
        score = log_prob_label.clone()
        score[:, :, -1] = recombine(kept_blank, kept_label)
        if bonus is not None:
            score += bonus[:, :, None]
        return Step(self, frame, recombine, score, kept_blank, log_prob_label)

    def _stay(
        self, frame: Frame, recombine: Recombination, prefix: Tensor, has_no_prefix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, K] twice: log-probs of the same hypotheses one frame later, ending in blank and in a label."""
        # A hypothesis also goes on from its own prefix, if that is in the beam, by starting its last label.
        needs_blank = self.last_label.gather(1, prefix) == self.last_label
        from_prefix = torch.where(needs_blank, self.log_prob_blank.gather(1, prefix), self.log_prob.gather(1, prefix))
        from_prefix = from_prefix.masked_fill_(has_no_prefix, -math.inf)
        # The empty hypothesis has neither a last label nor a prefix: both log-probs are -inf.
        kept_label = recombine(self.log_prob_label, from_prefix).add_(frame.log_prob_of(self.last_label))
        return self.log_prob + frame.blank, kept_label

    def _start_label(self, frame: Frame, prefix: Tensor, has_no_prefix: Tensor) -> Tensor:
        """[B, K, C+1] log-probs of new hypotheses; -inf for those that are in the beam, which `_stay` covers.

        The last column is for the caller to fill.
        """
        is_last = frame.choices[:, None] == self.last_label[:, :, None]  # B, K, C+1
        # The same label twice needs a blank in between.
        log_prob = torch.where(is_last, self.log_prob_blank[:, :, None], self.log_prob[:, :, None])
        log_prob[:, :, :-1] += frame.label_log_probs[:, None]
        is_last.masked_fill_(has_no_prefix[:, :, None], False)
        in_beam = torch.zeros_like(is_last).scatter_reduce_(1, prefix[:, :, None].expand_as(is_last), is_last, "amax")
        return log_prob.masked_fill_(in_beam, -math.inf)


@dataclass(frozen=True, eq=False)
class Step:
    """All that may come of a beam in one frame; made by `Beam.step`.

    Attributes:
        beam: K hypotheses before the frame.
        frame: the CTC output of the frame.
        recombine: how alignments of a hypothesis add up.
        score: [B, K, C+1] of each hypothesis with each label of the frame started and, last, with none: CTC and bonus,
            without what starting a label brings. -inf where another one covers the same sequence.
    """

    beam: Beam
    frame: Frame
    recombine: Recombination
    score: Tensor
    _kept_blank: Tensor  # [B, K] log-prob of the same hypothesis, ending in blank
    _log_prob_label: Tensor  # [B, K, C+1] log-probs that end in a label

    @torch.inference_mode()
    def may_start(self, start_bonus: Tensor, is_exact: Tensor) -> Tensor:
        """[B, K] bool: whether a label that the hypothesis starts may be among the best K.

        Args:
            start_bonus: [B, K, C] nats for starting each label of the frame; an upper bound where it is not exact.
            is_exact: [B, K] bool, of which hypotheses the bonus is.
        """
        started = self.score[:, :, :-1] + start_bonus  # B, K, C
        certain = torch.cat((started.masked_fill(~is_exact[:, :, None], -math.inf), self.score[:, :, -1:]), dim=2)
        worst_of_best = certain.flatten(1).topk(certain.shape[1], dim=1).values[:, -1]  # B
        best_started = started.amax(2)
        return (best_started >= worst_of_best[:, None]) & (best_started > -math.inf)

    @torch.inference_mode()
    def best(self, start_bonus: Tensor | None = None) -> Beam:
        """The best K hypotheses after the frame.

        Args:
            start_bonus: [B, K or 1, C] nats for starting each label of the frame.
        """
        score = self.score
        if start_bonus is not None:
            score = score.clone()
            score[:, :, :-1] += start_bonus
        num_hypotheses, num_choices = score.shape[1:]
        chosen = score.flatten(1).topk(num_hypotheses, dim=1).indices  # B, K
        parent = chosen.div(num_choices, rounding_mode="floor")
        gained = self.frame.choices.gather(1, chosen.remainder(num_choices))
        is_new = gained != NO_LABEL
        log_prob_blank = self._kept_blank.gather(1, parent).masked_fill_(is_new, -math.inf)
        log_prob_label = self._log_prob_label.flatten(1).gather(1, chosen)
        return self._select(parent, gained, is_new, log_prob_blank, log_prob_label)

    def _select(
        self,
        parent: Tensor,
        gained: Tensor,
        is_new: Tensor,
        log_prob_blank: Tensor,
        log_prob_label: Tensor,
    ) -> Beam:
        """The beam of the hypotheses `parent` plus the label `gained` where `is_new`, with their log-probs, [B, K]."""
        beam = self.beam
        num_labels = beam.num_labels.gather(1, parent)
        labels = beam.labels.gather(1, parent[:, :, None].expand_as(beam.labels))
        labels.scatter_(2, num_labels[:, :, None], gained[:, :, None])
        num_labels = num_labels + is_new

        pair = parent[:, :, None] * parent.shape[1] + parent[:, None]  # B, K, K
        common = beam._common_length.flatten(1).gather(1, pair.flatten(1)).view_as(pair)
        next_label = labels.gather(2, common)  # of the first of each pair; the transpose has that of the second
        common += (next_label == next_label.transpose(1, 2)) & (next_label != NO_LABEL)

        log_prob = self.recombine(log_prob_blank, log_prob_label)
        # Rows without probability may repeat others.
        length = num_labels.masked_fill(log_prob == -math.inf, -2)
        is_prefix = (common == length[:, :, None]) & (length[:, None] == length[:, :, None] + 1)  # of second in pair
        position = torch.arange(1, 1 + parent.shape[1], device=parent.device)
        prefix = (is_prefix * position[:, None]).amax(1) - 1
        last_label = torch.where(is_new, gained, beam.last_label.gather(1, parent))
        return Beam(
            log_prob_blank, log_prob_label, log_prob, labels, num_labels, last_label, prefix, parent, gained, common
        )


def score_dtype(device: torch.device) -> torch.dtype:
    """Scores of long audio are summed in float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_distributions(log_probs: Tensor, is_padding: Tensor) -> None:
    # The largest log-prob of a distribution lies between -log(A) and 0, but that of merged frames may be lower.
    peaks = log_probs.amax(2)  # B, T
    is_bad = ~(peaks.isfinite() & (peaks <= 0.01)) & ~is_padding
    if bool(is_bad.any()):
        utterance, frame = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"log_probs: expected log-probabilities, got a maximum of {peaks[utterance, frame].item()} in utterance "
            f"{utterance}, frame {frame}; check the CTC head (half precision overflows?) and pass log_softmax output."
        )
