"""CTC prefix scores for label-synchronous search (greedy, beam or sampling), exact and without a loop over time.

Shape legend: B utterances, K hypotheses (beams) per utterance, N = B*K rows grouped by utterance (row n belongs to
utterance n // K), T frames, A = U + 1 label axis of the CTC output (U labels and the blank), U' scored labels,
C candidates. All scores are natural-log probabilities.

For a hypothesis g let r_n[t], r_b[t] be the log-probability that the first t frames emitted exactly g and ended in
a label / in blank. Index 0 means "before the first frame", so arrays have T + 1 entries and the first frame needs
no special case. With phi = logaddexp(r_n, r_b), or r_b alone when c repeats the last label of g, the log-probability
that the label sequence starts with g.c is

    psi(g.c) = logsumexp_t(phi[t - 1] + x[t, c])

Three exact ideas make this cheap: psi of every label is one matrix product over time (no recursion per candidate);
the recursion for r_n, r_b runs only for the (parent, label) pairs that survive the selection; and it is a cumulative
sum plus a cumulative log-sum-exp instead of a loop over frames.

Source: Graves (2008), "Supervised sequence labelling with recurrent neural networks", section 7.5 (prefix search);
Watanabe et al. (2017), "Hybrid CTC/attention architecture", algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Emissions are floored here: -inf - (-inf) would turn the cumulative differences into NaN. A label the acoustic model
# excludes thus costs a hypothesis 1e4 nats, once per occurrence, and the hypothesis stays comparable with others.
LOG_PROB_FLOOR = -1.0e4

# `advance` copies the parent's state for this label: the hypothesis has ended, or its token is not acoustic.
KEEP_LABEL = -1

_NO_LABEL = -1  # last label of the empty prefix, and "not among the scored labels" in the column map


@dataclass(frozen=True, eq=False)
class CTCPrefixState:
    """CTC state of N hypotheses; depends on their label sequences only. Made by `CTCPrefixScorer`, never modified.

    Attributes:
        log_prob_nonblank: [N, T+1] log P(first t frames emit exactly g, the last of them a label).
        log_prob_blank: [N, T+1] log P(first t frames emit exactly g, the last of them blank); index 0 of the empty
            prefix is 0.
        prefix_log_prob: [N] psi(g), the log-probability that the label sequence starts with g. -inf when g is longer
            than the audio allows.
        last_label: [N] int64, last label of g, -1 for the empty prefix.
    """

    log_prob_nonblank: Tensor
    log_prob_blank: Tensor
    prefix_log_prob: Tensor
    last_label: Tensor

    def __len__(self) -> int:
        return self.prefix_log_prob.shape[0]


@dataclass(frozen=True, eq=False)
class CTCPrefixScorer:
    """Scores label prefixes against the CTC output of B utterances. Build it with `from_log_probs`.

    Labels are indices into the label axis of `log_probs`, which includes the blank at `blank_id`. States and scores
    are float64 whatever the input dtype (float32 on devices without float64, e.g. mps: about 3e-4 nats), because
    float32 cumulative sums lose 1e-2 nats on long audio.

    Attributes:
        blank_id: position of the blank on the label axis.
        num_labels: A, the length of the label axis, blank included.
        labels: [B, U'] int64, the labels scored per utterance (ascending, never the blank), or None when all A
            columns are scored in order.
    """

    blank_id: int
    num_labels: int
    labels: Tensor | None
    _emissions: Tensor  # [B, T, U'] log-probs as given: the caller's tensor (read only) or the top_k columns of it
    _blank_emissions: Tensor  # [B, T] floored; 0 in padding, so the end state of short audio sits at index T
    _label_probs: Tensor  # [B, U', T] probabilities; 0 for the blank and in padding
    _frame_is_valid: Tensor  # [B, T] bool
    _label_to_column: Tensor | None  # [B, A] int64 column of each label in `labels`, -1 if not scored

    @classmethod
    def from_log_probs(
        cls, log_probs: Tensor, lengths: Tensor, blank_id: int, *, top_k: int | None = None
    ) -> CTCPrefixScorer:
        """Prepares the scorer: once per batch of utterances, before the search.

        Args:
            log_probs: [B, T, A] log-softmax of the CTC output, any float dtype (bf16 rounds each frame by up to
                3e-2 nats: prefer float32). Kept by reference, not modified; -inf is allowed. Padding frames may
                hold anything, NaN included.
            lengths: [B] integer number of valid frames, 0 to T. With 0 only the empty hypothesis is possible.
            blank_id: position of the blank on the label axis.
            top_k: score only this many labels per utterance, the ones with the highest probability in any valid frame.
                The maximum, not the mean, over time: a word said once in a long recording has a tiny mean. All other
                labels count as impossible. None scores all.

        Raises:
            TypeError: `log_probs` is not floating point or `lengths` not integer.
            ValueError: a shape or range is wrong, or a valid frame holds NaN or +inf.
        """
        _check_inputs(log_probs, lengths, blank_id, top_k)
        log_probs, lengths = log_probs.detach(), lengths.to(log_probs.device)
        log_probs = log_probs[:, : int(lengths.max())]  # frames that are padding everywhere cost time for nothing
        if log_probs.shape[1] == 0:  # no audio at all: one padding frame keeps every reduction over T defined
            log_probs = log_probs.new_zeros(log_probs.shape[0], 1, log_probs.shape[2])
        num_utterances, num_frames, num_labels = log_probs.shape
        frame_is_valid = torch.arange(num_frames, device=log_probs.device) < lengths[:, None]  # B, T
        _check_values(log_probs, frame_is_valid)

        dtype = _state_dtype(log_probs.device)
        blank = log_probs[:, :, blank_id].to(dtype).clamp(min=LOG_PROB_FLOOR).masked_fill(~frame_is_valid, 0.0)
        labels, label_to_column, emissions = None, None, log_probs
        if top_k is not None:
            labels = _top_labels(log_probs, lengths, blank_id, top_k)
            label_to_column = torch.full((num_utterances, num_labels), _NO_LABEL, device=labels.device)
            columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
            label_to_column.scatter_(1, labels, columns)
            emissions = log_probs.gather(2, labels[:, None, :].expand(-1, num_frames, -1))  # B, T, A -> B, T, U'
        label_probs = emissions.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).exp()  # B, U', T
        # Assigned, not multiplied: padding may hold NaN.
        label_probs.masked_fill_(~frame_is_valid[:, None, :], 0.0)
        if labels is None:
            label_probs[:, blank_id] = 0.0
        return cls(blank_id, num_labels, labels, emissions, blank, label_probs, frame_is_valid, label_to_column)

    @property
    def num_utterances(self) -> int:
        return self._label_probs.shape[0]

    @property
    def device(self) -> torch.device:
        return self._label_probs.device

    def init(self, num_beams: int) -> CTCPrefixState:
        """Returns the state of B*num_beams empty prefixes.

        Raises:
            ValueError: `num_beams` is below 1.
        """
        if num_beams < 1:
            raise ValueError(f"num_beams: expected at least 1, got {num_beams}; pass the beams per utterance.")
        silent = _prepend(self._blank_emissions.cumsum(1), 0.0)  # B, T -> B, T+1: all frames so far blank
        log_prob_blank = silent.repeat_interleave(num_beams, 0)
        num_rows = log_prob_blank.shape[0]
        return CTCPrefixState(
            log_prob_nonblank=torch.full_like(log_prob_blank, -math.inf),
            log_prob_blank=log_prob_blank,
            prefix_log_prob=log_prob_blank.new_zeros(num_rows),
            last_label=torch.full((num_rows,), _NO_LABEL, device=self.device),
        )

    def score(self, state: CTCPrefixState) -> Tensor:
        """Returns psi(g.c) of every hypothesis and scored label: [N, U'], or [N, A] when `labels` is None.

        Column j of row n is label `labels[n // K, j]`, or label j. The blank and labels that cannot follow g are -inf,
        as are labels below exp(-700) times psi(g) (exp(-87) without float64).
        """
        num_beams = self._beams_of(state)
        weights, log_scale = self._time_weights(torch.logaddexp(state.log_prob_nonblank, state.log_prob_blank))
        # N, T -> B, K, T; times B, T, U' -> B, K, U' -> N, U'
        weights = weights.view(self.num_utterances, num_beams, -1)
        psi = torch.bmm(weights, self._label_probs.transpose(1, 2)).flatten(0, 1).log_().add_(log_scale[:, None])

        column = self._columns(self._utterances(num_beams), state.last_label)
        is_scored, column = column >= 0, column.clamp(min=0)
        # Rank-1 correction: after its last label a hypothesis needs a blank first.
        column = column[:, None]
        repeated = torch.where(is_scored[:, None], self._score_repeated(state, column), psi.gather(1, column))
        return psi.scatter_(1, column, repeated)

    def score_candidates(self, state: CTCPrefixState, labels: Tensor) -> Tensor:
        """Returns psi(g.c) for the given labels only: [N, C].

        Args:
            state: N hypotheses.
            labels: [N, C] int64, indices into the label axis; the blank, -1, and labels outside a `top_k` subset
                score -inf.

        Raises:
            ValueError: the first dimension of `labels` is not N, or a label is outside [-1, A).
        """
        num_beams = self._beams_of(state)
        if labels.dim() != 2 or labels.shape[0] != len(state):
            raise ValueError(
                f"labels: expected shape ({len(state)}, C), one row per hypothesis of the state, got "
                f"{tuple(labels.shape)}."
            )
        if bool(((labels < -1) | (labels >= self.num_labels)).any()):
            raise ValueError(
                f"labels: expected values from -1 to {self.num_labels - 1} (indices into the label axis of log_probs), "
                f"got {int(labels.min())} to {int(labels.max())}."
            )
        columns = self._columns(self._utterances(num_beams)[:, None], labels)  # N, C
        is_scored = (columns >= 0) & (labels != self.blank_id)
        columns = columns.clamp(min=0)
        if num_beams * labels.shape[1] >= self._label_probs.shape[1]:  # the product for all labels reads less memory
            psi = self.score(state).gather(1, columns)
        else:
            log_phi = torch.logaddexp(state.log_prob_nonblank, state.log_prob_blank)
            weights, log_scale = self._time_weights(log_phi)
            probs = self._label_probs[self._utterances(num_beams)[:, None], columns]  # N, C, T
            psi = torch.bmm(probs, weights[:, :, None]).squeeze(2).log() + log_scale[:, None]
            last_column = self._columns(self._utterances(num_beams), state.last_label).clamp(min=0)
            repeated = self._score_repeated(state, last_column[:, None])
            psi = torch.where(labels == state.last_label[:, None], repeated, psi)
        return psi.masked_fill(~is_scored, -math.inf)

    def eos(self, state: CTCPrefixState) -> Tensor:
        """Returns [N] log P(the whole audio is exactly g). The CTC output of an end-of-sentence label plays no part."""
        self._beams_of(state)
        return torch.logaddexp(state.log_prob_nonblank[:, -1], state.log_prob_blank[:, -1])

    def advance(self, state: CTCPrefixState, parent: Tensor, label: Tensor) -> CTCPrefixState:
        """Returns the state of the hypotheses `parent[i] . label[i]`, for the selected pairs only.

        Args:
            state: N hypotheses, K per utterance.
            parent: [N'] integer rows of `state`. N' is a multiple of B and grouped by utterance like N; rows may
                repeat or be missing, and a parent must belong to the same utterance as its child.
            label: [N'] integer labels, or -1 (`KEEP_LABEL`) to copy the parent unchanged (finished hypothesis). A label
                outside a `top_k` subset is allowed and treated as one the audio excludes: every frame at -1e4.

        Raises:
            ValueError: a shape is wrong, a parent is out of range or of another utterance, or a label is out of range
                or the blank.
        """
        self._check_selection(state, parent, label)
        parent, label = parent.long(), label.long()
        utterances = self._utterances(parent.shape[0] // self.num_utterances)
        parent_nonblank, parent_blank = state.log_prob_nonblank[parent], state.log_prob_blank[parent]
        parent_last, parent_psi = state.last_label[parent], state.prefix_log_prob[parent]

        emission = self._emission_of(utterances, label.clamp(min=0))  # N', T
        log_phi = torch.logaddexp(parent_nonblank, parent_blank)
        # A repeated label needs a blank in between, or it would merge with the previous one.
        log_phi = torch.where((label == parent_last)[:, None], parent_blank, log_phi)[:, :-1]
        log_phi = log_phi.masked_fill(~self._frame_is_valid[utterances], -math.inf)  # no label starts in padding
        nonblank = _prepend(_scan(log_phi, emission), -math.inf)
        blank = _prepend(_scan(nonblank[:, :-1], self._blank_emissions[utterances]), -math.inf)
        psi = torch.logsumexp(log_phi + emission, dim=1)

        keep = label == KEEP_LABEL
        return CTCPrefixState(
            log_prob_nonblank=torch.where(keep[:, None], parent_nonblank, nonblank),
            log_prob_blank=torch.where(keep[:, None], parent_blank, blank),
            prefix_log_prob=torch.where(keep, parent_psi, psi),
            last_label=torch.where(keep, parent_last, label),
        )

    def _beams_of(self, state: CTCPrefixState) -> int:
        num_rows, width = state.log_prob_blank.shape
        if num_rows % self.num_utterances or width != self._label_probs.shape[2] + 1:
            raise ValueError(
                f"state: expected a multiple of {self.num_utterances} rows with {self._label_probs.shape[2]} frames, "
                f"got {num_rows} rows with {width - 1}; use states made by this scorer's init or advance."
            )
        return num_rows // self.num_utterances

    def _utterances(self, num_beams: int) -> Tensor:
        """[N] utterance of each row."""
        rows = torch.arange(self.num_utterances * num_beams, device=self.device)
        return torch.div(rows, num_beams, rounding_mode="floor")

    def _columns(self, utterances: Tensor, labels: Tensor) -> Tensor:
        """Columns of `_label_probs` holding the labels, -1 where a label is -1 or not scored; broadcasts."""
        if self._label_to_column is None:
            return labels
        columns = self._label_to_column[utterances, labels.clamp(min=0)]
        return columns.masked_fill(labels < 0, _NO_LABEL)

    def _time_weights(self, log_phi: Tensor) -> tuple[Tensor, Tensor]:
        """[N, T+1] log-probs -> weights [N, T] in [0, 1] of the frame that follows, and their log scale [N]."""
        log_phi = log_phi[:, :-1].unflatten(0, (self.num_utterances, -1))  # N, T -> B, K, T
        log_phi = log_phi.masked_fill(~self._frame_is_valid[:, None], -math.inf).flatten(0, 1)
        log_scale = log_phi.amax(1)
        log_scale.masked_fill_(log_scale == -math.inf, 0.0)  # impossible hypothesis: avoid -inf - -inf
        return log_phi.sub_(log_scale[:, None]).exp_(), log_scale

    def _score_repeated(self, state: CTCPrefixState, column: Tensor) -> Tensor:
        """[N, 1] psi(g.c) for c = last label of g, which `column` [N, 1] holds and which must come after a blank."""
        weights, log_scale = self._time_weights(state.log_prob_blank)
        utterances = self._utterances(len(state) // self.num_utterances)
        probs = self._label_probs[utterances, column.squeeze(1)]  # N, T
        return ((weights * probs).sum(1).log_() + log_scale)[:, None]

    def _emission_of(self, utterances: Tensor, labels: Tensor) -> Tensor:
        """[N', T] floored log-probs of one label per row, in the state dtype; the floor in padding."""
        columns = self._columns(utterances, labels)
        emission = self._emissions[utterances, :, columns.clamp(min=0)].to(self._label_probs.dtype)
        is_emitted = self._frame_is_valid[utterances] & (columns >= 0)[:, None]
        return torch.where(is_emitted, emission, LOG_PROB_FLOOR).clamp(min=LOG_PROB_FLOOR)

    def _check_selection(self, state: CTCPrefixState, parent: Tensor, label: Tensor) -> None:
        num_beams = self._beams_of(state)
        if parent.dim() != 1 or parent.shape != label.shape or parent.shape[0] % self.num_utterances:
            raise ValueError(
                f"parent, label: expected two 1-D tensors of one length, a multiple of the {self.num_utterances} "
                f"utterances, got {tuple(parent.shape)} and {tuple(label.shape)}."
            )
        utterances = self._utterances(parent.shape[0] // self.num_utterances)
        bad_parent = torch.div(parent, num_beams, rounding_mode="floor") != utterances
        bad_label = (label < KEEP_LABEL) | (label >= self.num_labels) | (label == self.blank_id)
        if not bool((bad_parent | bad_label).any()):  # one device synchronisation for both
            return
        row = int((bad_parent | bad_label).long().argmax())
        if bool(bad_parent[row]):
            low = int(utterances[row]) * num_beams
            raise ValueError(
                f"parent: expected rows {low} to {low + num_beams - 1} at position {row} (same utterance), got "
                f"{int(parent[row])}; pass flat row indices of the state, not beam numbers within the utterance."
            )
        raise ValueError(
            f"label: expected {KEEP_LABEL} (keep) or a label from 0 to {self.num_labels - 1} other than the blank "
            f"{self.blank_id} at position {row}, got {int(label[row])}."
        )


def _state_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device computes in it, else float32."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).exp()
    except (TypeError, RuntimeError):  # mps: TypeError at creation
        return torch.float32
    return torch.float64


def _prepend(values: Tensor, start: float) -> Tensor:
    """[N, T] -> [N, T+1] with `start` before the first frame."""
    return torch.nn.functional.pad(values, (1, 0), value=start)


def _scan(inflow: Tensor, emission: Tensor) -> Tensor:
    """Solves h[t] = logaddexp(h[t-1], inflow[t]) + emission[t], h[-1] = -inf, for all t at once: [N, T] -> [N, T].

    `emission` must be finite. float64 uses cumulative sums P: h = P + logcumsumexp(inflow - shift(P)). In float32 these
    differences cancel, so there an associative scan (log2 T rounds) combines neighbours instead.
    """
    if inflow.dtype == torch.float64:
        total = emission.cumsum(1)
        return total + torch.logcumsumexp(inflow - (total - emission), dim=1)
    decay, level = emission, inflow + emission
    step = 1
    while step < inflow.shape[1]:
        # Element t covers `step` frames ending at t; join it with the element that ends `step` frames earlier.
        joined = torch.logaddexp(level[:, :-step] + decay[:, step:], level[:, step:])
        level = torch.cat((level[:, :step], joined), dim=1)
        decay = torch.cat((decay[:, :step], decay[:, :-step] + decay[:, step:]), dim=1)
        step *= 2
    return level


def _top_labels(log_probs: Tensor, lengths: Tensor, blank_id: int, top_k: int) -> Tensor:
    """[B, min(top_k, U)] labels with the highest log-prob in any valid frame, ascending, without the blank."""
    # Slices instead of a masked copy, which would double the largest tensor around. Without frames any labels will do.
    valid = [frames[: max(length, 1)] for frames, length in zip(log_probs, lengths.tolist(), strict=True)]
    peaks = torch.stack([frames.amax(0) for frames in valid])  # B, A
    label_ids = torch.arange(log_probs.shape[2], device=log_probs.device)
    label_ids = label_ids[label_ids != blank_id]  # the blank leaves the ranking, whatever its peak
    best = peaks[:, label_ids].topk(min(top_k, label_ids.shape[0]), dim=1).indices
    return label_ids[best].sort(1).values


def _check_inputs(log_probs: Tensor, lengths: Tensor, blank_id: int, top_k: int | None) -> None:
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs: expected a floating-point tensor, got {log_probs.dtype}; pass log_softmax output.")
    if log_probs.dim() != 3 or log_probs.shape[0] < 1 or log_probs.shape[2] < 2:
        raise ValueError(
            "log_probs: expected shape (B, T, U+1) with at least one utterance, one label and the blank, got "
            f"{tuple(log_probs.shape)}."
        )
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(
            f"lengths: expected an integer tensor of frame counts, got {lengths.dtype}; sum the mask over T."
        )
    num_utterances, num_frames, num_labels = log_probs.shape
    if lengths.shape != (num_utterances,):
        raise ValueError(f"lengths: expected shape ({num_utterances},), one per utterance, got {tuple(lengths.shape)}.")
    if int(lengths.min()) < 0 or int(lengths.max()) > num_frames:
        raise ValueError(
            f"lengths: expected 0 to {num_frames} frames (T of log_probs), got {int(lengths.min())} to "
            f"{int(lengths.max())}; use the encoder's output lengths, not those of its input."
        )
    if not 0 <= blank_id < num_labels:
        raise ValueError(f"blank_id: expected 0 to {num_labels - 1} (label axis of log_probs), got {blank_id}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, or None to score every label, got {top_k}.")


def _check_values(log_probs: Tensor, frame_is_valid: Tensor) -> None:
    # The maximum over labels is NaN or +inf exactly if one of them is, and small enough to inspect.
    peaks = log_probs.amax(2)
    is_bad = (peaks.isnan() | (peaks == math.inf)) & frame_is_valid
    if bool(is_bad.any()):
        utterance, frame = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"log_probs: expected log-probabilities, got {peaks[utterance, frame].item()} in utterance {utterance}, "
            f"frame {frame}; check the CTC head (overflow in half precision?) and pass log_softmax output."
        )
