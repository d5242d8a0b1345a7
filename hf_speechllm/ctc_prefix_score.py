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
sum plus a cumulative log-sum-exp instead of a loop over frames. What depends on the number of labels is done only when
asked for: candidates read the emissions of their own labels, and probabilities of all labels exist once `score` ran.

Source: Graves (2008), "Supervised sequence labelling with recurrent neural networks", section 7.5 (prefix search);
Watanabe et al. (2017), "Hybrid CTC/attention architecture", algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ctc_emissions import (
    LOG_PROB_FLOOR,
    HeadChunks,
    LabelEmissions,
    check_blank,
    check_lengths,
    check_log_probs,
    check_top_k,
    check_values,
    peaks_of,
    top_labels,
)

# `advance` copies the parent's state for this label: the hypothesis has ended, or its token is not acoustic.
KEEP_LABEL = -1

_NO_LABEL = -1  # last label of the empty prefix
_LONG_FRAMES = 128  # from here on it pays to look for the frames that matter
# Smaller weights, relative to the smallest normal number, count as 0: their products with probabilities would be
# subnormal, for which many CPUs need a hundred times longer.
_BEYOND_TINY = 2.0**26


@dataclass(frozen=True, eq=False)
class CTCPrefixState:
    """CTC state of N hypotheses; depends on their label sequences only. Made by `CTCPrefixScorer`, never modified.

    Attributes:
        log_prob: [N, T+1] log P(first t frames emit exactly g); index 0 of the empty prefix is 0. The part of it that
            ends in blank needs no room: it is that of one frame earlier times the blank.
        prefix_log_prob: [N] psi(g), the log-probability that the label sequence starts with g. -inf when g is longer
            than the audio allows.
        repeat_log_prob: [N] psi(g.c) for c = last label of g, with a blank in between; -inf for the empty prefix.
        last_label: [N] int64, last label of g, -1 for the empty prefix.
    """

    log_prob: Tensor
    prefix_log_prob: Tensor
    repeat_log_prob: Tensor
    last_label: Tensor

    def __len__(self) -> int:
        return self.prefix_log_prob.shape[0]


@dataclass(frozen=True, eq=False)
class CTCPrefixScorer:
    """Scores label prefixes against the CTC output of B utterances. Build it with `from_log_probs` or `from_head`.

    Labels are indices into the label axis of `log_probs`, which includes the blank at `blank_id`.

    Precision: states, and scores as returned, are float64 whatever the input dtype (float32 on devices without float64,
    e.g. mps: about 3e-4 nats), because float32 cumulative sums lose 1e-2 nats on long audio. Probabilities, and their
    products with the states in `score` and `score_candidates`, have the precision of the input but at least float32:
    from float32 log-probs psi is within 1e-5 nats of float64, which is less than the rounding of such log-probs.

    Attributes:
        blank_id: position of the blank on the label axis.
        num_labels: A, the length of the label axis, blank included.
        labels: [B, U'] int64, the labels scored per utterance (ascending, never the blank), or None when all A
            columns are scored in order.
    """

    blank_id: int
    num_labels: int
    labels: Tensor | None
    _emissions: LabelEmissions
    _blank: Tensor  # [B, 1, T] floored log-probs; 0 in padding, so the end state of short audio sits at index T
    _silence: Tensor  # [B, 1, T+1] log-prob that all frames so far are blank: the cumulative sum of `_blank`, from 0
    _is_padding: Tensor | None  # [B, 1, T] bool, None without any

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
        check_log_probs(log_probs, lengths, blank_id)
        check_top_k(top_k)
        log_probs, lengths = log_probs.detach(), lengths.to(log_probs.device)
        log_probs = log_probs[:, : int(lengths.max())]  # frames that are padding everywhere cost time for nothing
        blank, num_labels = log_probs[:, :, blank_id], log_probs.shape[2]
        if top_k is None:
            check_values(log_probs, lengths)
            return cls._assemble(log_probs, None, blank, lengths, blank_id, num_labels)
        labels = top_labels(peaks_of(log_probs, lengths), blank_id, top_k)
        kept = log_probs.gather(2, labels[:, None].expand(-1, log_probs.shape[1], -1))  # B, T, U'
        return cls._assemble(kept, labels, blank, lengths, blank_id, num_labels)

    @classmethod
    @torch.no_grad()
    def from_head(
        cls,
        log_prob_fn: Callable[[int, int], Tensor],
        lengths: Tensor,
        blank_id: int,
        *,
        top_k: int,
        chunk_frames: int = 32,
    ) -> CTCPrefixScorer:
        """Prepares the scorer without a tensor of all frames and labels: for labels as many as an LLM's vocabulary.

        The result is that of `from_log_probs(log_probs, lengths, blank_id, top_k=top_k)`. The CTC head runs twice over
        the audio, a few frames at a time: once for the peak of each label over time, which decides the `top_k`, and
        once for the columns of these. Beyond one chunk, [B, chunk_frames, A], memory is [B, T, top_k].

        Args:
            log_prob_fn: takes (start, end) with 0 <= start <= end <= max(lengths) and returns the log-probs of these
                frames, [B, end - start, A]; `lambda start, end: head(hidden[:, start:end]).log_softmax(-1)`. Called
                without gradients. Must return the same values in both passes (no dropout). When no utterance has any
                frame it is called with (0, 0), to tell A.
            lengths: [B] integer number of valid frames.
            blank_id: position of the blank on the label axis.
            top_k: score only this many labels per utterance, as in `from_log_probs`.
            chunk_frames: frames per call.

        Raises:
            TypeError: `lengths` is not integer, or a chunk is not floating point.
            ValueError: a shape or range is wrong, or a valid frame holds NaN or +inf.
        """
        if chunk_frames < 1:
            raise ValueError(f"chunk_frames: expected at least 1, got {chunk_frames}; 16 to 64 is a good choice.")
        check_top_k(top_k)
        check_lengths(lengths)
        chunks = HeadChunks(log_prob_fn, lengths, chunk_frames)
        peaks = None
        for start, chunk in chunks:
            if peaks is None:
                check_blank(blank_id, chunk.shape[2])
                peaks = chunk.new_full((chunk.shape[0], chunk.shape[2]), -math.inf)
            lengths = lengths.to(chunk.device)
            peaks = torch.maximum(peaks, peaks_of(chunk, lengths - start, start))
        labels = top_labels(peaks, blank_id, top_k)
        columns = torch.nn.functional.pad(labels, (0, 1), value=blank_id)[:, None]  # B, 1, U'+1
        kept = torch.cat([chunk.gather(2, columns.expand(-1, chunk.shape[1], -1)) for _, chunk in chunks], 1)
        return cls._assemble(kept[:, :, :-1], labels, kept[:, :, -1], lengths, blank_id, peaks.shape[1])

    @classmethod
    def _assemble(
        cls,
        log_probs: Tensor,
        labels: Tensor | None,
        blank: Tensor,
        lengths: Tensor,
        blank_id: int,
        num_labels: int,
    ) -> CTCPrefixScorer:
        """From log-probs [B, T, A], or those of `labels` [B, U'] only, and of the blank [B, T]; T = max(lengths)."""
        if blank.shape[1] == 0:  # no audio at all: one padding frame keeps every reduction over T defined
            log_probs = log_probs.new_zeros(len(lengths), 1, log_probs.shape[2])
            blank = blank.new_zeros(len(lengths), 1)
        is_padding = torch.arange(blank.shape[1], device=blank.device) >= lengths[:, None]  # B, T
        blank = blank.to(_state_dtype(blank.device)).clamp(min=LOG_PROB_FLOOR).masked_fill(is_padding, 0.0)[:, None]
        return cls(
            blank_id=blank_id,
            num_labels=num_labels,
            labels=labels,
            _emissions=LabelEmissions(log_probs, labels, is_padding, blank_id, num_labels),
            _blank=blank,
            _silence=torch.nn.functional.pad(blank.cumsum(2), (1, 0)),
            _is_padding=is_padding[:, None] if bool(is_padding.any()) else None,
        )

    @property
    def num_utterances(self) -> int:
        return self._blank.shape[0]

    @property
    def device(self) -> torch.device:
        return self._blank.device

    def init(self, num_beams: int) -> CTCPrefixState:
        """Returns the state of B*num_beams empty prefixes.

        Raises:
            ValueError: `num_beams` is below 1.
        """
        if num_beams < 1:
            raise ValueError(f"num_beams: expected at least 1, got {num_beams}; pass the beams per utterance.")
        log_prob = self._silence.squeeze(1).repeat_interleave(num_beams, 0)  # N, T+1
        num_rows = len(log_prob)
        return CTCPrefixState(
            log_prob=log_prob,
            prefix_log_prob=log_prob.new_zeros(num_rows),
            repeat_log_prob=log_prob.new_full((num_rows,), -math.inf),
            last_label=torch.full((num_rows,), _NO_LABEL, device=self.device),
        )

    def score(self, state: CTCPrefixState) -> Tensor:
        """Returns psi(g.c) of every hypothesis and scored label: [N, U'], or [N, A] when `labels` is None.

        Column j of row n is label `labels[n // K, j]`, or label j. The blank and labels that cannot follow g are -inf.
        Frames that add less than exp(-69) of psi(g) are left out, so labels less likely than exp(-50) after g may come
        out too low, down to -inf (exp(-690) and exp(-670) from float64 log-probs).
        """
        self._beams_of(state)
        weights, frames, log_scale = self._time_weights(state)
        # N, t -> B, K, t; times B, t, U' -> B, K, U' -> N, U'
        psi = torch.bmm(self._per_utterance(weights), self._emissions.all_probs[:, frames]).flatten(0, 1)
        psi = psi.to(log_scale.dtype).log_().add_(log_scale)
        # After its last label a hypothesis needs a blank first.
        last, repeat = state.last_label[:, None], state.repeat_log_prob[:, None]
        if self.labels is None:
            # The empty prefix has no last label: it sets the blank to -inf, what it is already.
            return psi.scatter_(1, last.masked_fill(last == _NO_LABEL, self.blank_id), repeat)
        is_last = self.labels[:, None] == self._per_utterance(last)  # B, K, U'
        return torch.where(is_last.flatten(0, 1), repeat, psi)

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
        lowest, highest = (int(bound) for bound in labels.aminmax()) if labels.numel() else (0, 0)
        if lowest < -1 or highest >= self.num_labels:
            raise ValueError(
                f"labels: expected values from -1 to {self.num_labels - 1} (indices into the label axis of log_probs), "
                f"got {lowest} to {highest}."
            )
        # A dense product is faster per label than fetched rows, but has to score all of them.
        if self.labels is None and 2 * num_beams * labels.shape[1] >= self.num_labels:
            psi = self.score(state).gather(1, labels.clamp(min=0))
            return psi.masked_fill_(labels == _NO_LABEL, -math.inf)
        weights, frames, log_scale = self._time_weights(state)
        grouped = labels.reshape(self.num_utterances, num_beams * labels.shape[1])  # N, C -> B, K*C
        probs = self._emissions.log_probs(grouped, frames).exp_()
        probs = probs.view(*labels.shape, probs.shape[2]).mul_(weights[:, None])  # N, C, t
        psi = probs.sum(2).to(log_scale.dtype).log_().add_(log_scale)
        is_repeat = (labels == state.last_label[:, None]) & self._emissions.are_kept(grouped).view_as(labels)
        return torch.where(is_repeat, state.repeat_log_prob[:, None], psi)

    def eos(self, state: CTCPrefixState) -> Tensor:
        """Returns [N] log P(the whole audio is exactly g). The CTC output of an end-of-sentence label plays no part."""
        self._beams_of(state)
        return state.log_prob[:, -1]

    @torch.inference_mode()  # many small operations: autograd's book-keeping would take a tenth of the time
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
        has_repeat, has_kept = self._check_selection(state, parent, label)
        parent, label = parent.long(), label.long()
        log_phi = self._per_utterance(state.log_prob.index_select(0, parent))[..., :-1]  # N', T+1 -> B, K', T
        if has_repeat:
            # It needs a blank in between, or it would merge with the previous label.
            is_repeat = self._per_utterance(label == state.last_label[parent])[..., None]
            ends_in_blank = log_phi[..., :-1] + self._blank[..., :-1]
            log_phi = torch.where(is_repeat, torch.nn.functional.pad(ends_in_blank, (1, 0), value=-math.inf), log_phi)

        emission = self._emissions.log_probs(self._per_utterance(label)).to(log_phi.dtype)  # B, K', T
        # [2, B, K', T] The label starts in this frame; and it starts again, after itself and a blank.
        arrivals = emission.new_full((2, *emission.shape), -math.inf)
        arrival = self._fill_padding(torch.add(log_phi, emission, out=arrivals[0]))
        nonblank = _scan(arrival, emission, emission.cumsum(2))  # and is spoken until this frame
        log_prob = _scan(nonblank, self._blank, self._silence[..., 1:])  # and is followed by blank
        torch.add(log_prob[..., :-2] + self._blank[..., 1:-1], emission[..., 2:], out=arrivals[1, ..., 2:])
        self._fill_padding(arrivals[1])
        prefix_log_prob, repeat_log_prob = arrivals.logsumexp(3).flatten(1).unbind()
        new = CTCPrefixState(
            log_prob=torch.nn.functional.pad(log_prob, (1, 0), value=-math.inf).flatten(0, 1),
            prefix_log_prob=prefix_log_prob,
            repeat_log_prob=repeat_log_prob,
            last_label=label,
        )
        return self._keep(state, parent, new) if has_kept else new

    def _keep(self, state: CTCPrefixState, parent: Tensor, new: CTCPrefixState) -> CTCPrefixState:
        """`new`, but the rows `parent` [N'] of `state` where the label is `KEEP_LABEL`."""
        keep = new.last_label == KEEP_LABEL
        return CTCPrefixState(
            log_prob=torch.where(keep[:, None], state.log_prob[parent], new.log_prob),
            prefix_log_prob=torch.where(keep, state.prefix_log_prob[parent], new.prefix_log_prob),
            repeat_log_prob=torch.where(keep, state.repeat_log_prob[parent], new.repeat_log_prob),
            last_label=torch.where(keep, state.last_label[parent], new.last_label),
        )

    def _beams_of(self, state: CTCPrefixState) -> int:
        num_rows, width = state.log_prob.shape
        num_frames = self._blank.shape[2]
        if num_rows % self.num_utterances or width != num_frames + 1:
            raise ValueError(
                f"state: expected a multiple of {self.num_utterances} rows with {num_frames} frames, "
                f"got {num_rows} rows with {width - 1}; use states made by this scorer's init or advance."
            )
        return num_rows // self.num_utterances

    def _per_utterance(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [B, K, ...]"""
        return rows.view(self.num_utterances, -1, *rows.shape[1:])

    def _fill_padding(self, values: Tensor) -> Tensor:
        """[B, K, T or the last frames of it] with -inf in padding: no label starts there."""
        if self._is_padding is None:
            return values
        is_padding = self._is_padding[..., self._is_padding.shape[2] - values.shape[2] :]
        return values.masked_fill_(is_padding, -math.inf)

    def _time_weights(self, state: CTCPrefixState) -> tuple[Tensor, slice, Tensor]:
        """[N, t] probability of g before each frame, over psi(g); these frames; and log psi(g), [N, 1].

        psi(g) is the natural scale: the largest weight lies between 1 / (T + 1) and 1. Of long audio only the frames
        are returned around the place that the search has come to, outside of which all weights count as 0.
        """
        # Impossible hypotheses: their weights are exp(-inf - finite) = 0, not NaN.
        log_scale = state.prefix_log_prob.clamp(min=torch.finfo(state.prefix_log_prob.dtype).min)[:, None]
        log_weights = state.log_prob[:, :-1] - log_scale
        lowest = math.log(_BEYOND_TINY * torch.finfo(self._emissions.dtype).tiny)
        weights = torch.nn.functional.threshold_(log_weights, lowest, -math.inf).exp_().to(self._emissions.dtype)
        if weights.shape[1] < _LONG_FRAMES:
            return weights, slice(None), log_scale
        used = weights.amax(0).nonzero().flatten().tolist()
        frames = slice(used[0], used[-1] + 1) if used else slice(1)
        return weights[:, frames], frames, log_scale

    def _check_selection(self, state: CTCPrefixState, parent: Tensor, label: Tensor) -> tuple[bool, bool]:
        """Whether a row repeats its parent's last label, and whether one keeps its label."""
        num_beams = self._beams_of(state)
        if parent.dim() != 1 or parent.shape != label.shape or parent.shape[0] % self.num_utterances:
            raise ValueError(
                f"parent, label: expected two 1-D tensors of one length, a multiple of the {self.num_utterances} "
                f"utterances, got {tuple(parent.shape)} and {tuple(label.shape)}."
            )
        num_rows = len(parent)
        rows_per_utterance = num_rows // self.num_utterances
        # One device synchronisation, then plain integers.
        values = torch.cat((parent, label, state.last_label)).tolist()
        parents, labels, last_labels = values[:num_rows], values[num_rows : 2 * num_rows], values[2 * num_rows :]
        for row, (p, c) in enumerate(zip(parents, labels, strict=True)):
            low = row // rows_per_utterance * num_beams
            if not low <= p < low + num_beams:
                raise ValueError(
                    f"parent: expected rows {low} to {low + num_beams - 1} at position {row} (same utterance), got "
                    f"{p}; pass flat row indices of the state, not beam numbers within the utterance."
                )
            if not KEEP_LABEL <= c < self.num_labels or c == self.blank_id:
                raise ValueError(
                    f"label: expected {KEEP_LABEL} (keep) or a label from 0 to {self.num_labels - 1} other than the "
                    f"blank {self.blank_id} at position {row}, got {c}."
                )
        return any(last_labels[p] == c for p, c in zip(parents, labels, strict=True)), KEEP_LABEL in labels


def _state_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device computes in it, else float32."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).exp()
    except (TypeError, RuntimeError):  # mps: TypeError at creation
        return torch.float32
    return torch.float64


def _scan(arrival: Tensor, emission: Tensor, total: Tensor) -> Tensor:
    """Solves h[t] = logaddexp(h[t - 1] + emission[t], arrival[t]), h[-1] = -inf, for all t at once.

    `arrival` is [B, K, T]; `emission`, finite, and `total`, its cumulative sum P up to a constant, broadcast to that.
    Returns [B, K, T]. In float64 h = P + logcumsumexp(arrival - P). In float32 these differences cancel, so there an
    associative scan (log2 T rounds) combines neighbours instead.
    """
    if arrival.dtype == torch.float64:
        return torch.logcumsumexp(arrival - total, dim=2).add_(total)
    decay, level = emission.expand_as(arrival), arrival
    step = 1
    while step < arrival.shape[2]:
        # Element t covers `step` frames ending at t; join it with the element that ends `step` frames earlier.
        joined = torch.logaddexp(level[..., :-step] + decay[..., step:], level[..., step:])
        level = torch.cat((level[..., :step], joined), dim=2)
        decay = torch.cat((decay[..., :step], decay[..., :-step] + decay[..., step:]), dim=2)
        step *= 2
    return level
