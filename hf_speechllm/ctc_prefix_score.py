"""CTC prefix scores for label-synchronous search (greedy, beam or sampling), exact and without a loop over time.

Shape legend: B utterances, K hypotheses (beams) per utterance, N = B*K rows grouped by utterance (row n belongs to
utterance n // K), T frames, A = U + 1 label axis of the CTC output (U labels and the blank), U' scored labels,
A' these and the blank, C candidates. All scores are natural-log probabilities.

For a hypothesis g let r_n[t], r_b[t] be the log-probability that the first t frames emitted exactly g and ended in
a label / in blank. Index 0 means "before the first frame", so arrays have T + 1 entries and the first frame needs
no special case. With phi = logaddexp(r_n, r_b), or r_b alone when c repeats the last label of g, the log-probability
that the label sequence starts with g.c is

    psi(g.c) = logsumexp_t(phi[t - 1] + x[t, c])

Three exact ideas make this cheap: psi of every label is one matrix product over time (no recursion per candidate);
the recursion for r_n, r_b runs only for the (parent, label) pairs that survive the selection; and it is a cumulative
sum plus a cumulative log-sum-exp instead of a loop over frames. What depends on the number of labels is done only when
asked for: candidates read their own columns of the emissions, and probabilities of all labels exist once `score` ran.

Source: Graves (2008), "Supervised sequence labelling with recurrent neural networks", section 7.5 (prefix search);
Watanabe et al. (2017), "Hybrid CTC/attention architecture", algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Emissions are floored here: -inf - (-inf) would turn the cumulative differences into NaN. A label the acoustic model
# excludes thus costs a hypothesis 1e4 nats, once per occurrence, and the hypothesis stays comparable with others.
LOG_PROB_FLOOR = -1.0e4

# `advance` copies the parent's state for this label: the hypothesis has ended, or its token is not acoustic.
KEEP_LABEL = -1

_NO_LABEL = -1  # last label of the empty prefix


@dataclass(frozen=True, eq=False)
class CTCPrefixState:
    """CTC state of N hypotheses; depends on their label sequences only. Made by `CTCPrefixScorer`, never modified.

    Attributes:
        log_prob_nonblank: [N, T+1] log P(first t frames emit exactly g, the last of them a label).
        log_prob_blank: [N, T+1] log P(first t frames emit exactly g, the last of them blank); index 0 of the empty
            prefix is 0.
        prefix_log_prob: [N] psi(g), the log-probability that the label sequence starts with g. -inf when g is longer
            than the audio allows.
        repeat_log_prob: [N] psi(g.c) for c = last label of g, with a blank in between; -inf for the empty prefix.
        last_label: [N] int64, last label of g, -1 for the empty prefix.
    """

    log_prob_nonblank: Tensor
    log_prob_blank: Tensor
    prefix_log_prob: Tensor
    repeat_log_prob: Tensor
    last_label: Tensor

    def __len__(self) -> int:
        return self.prefix_log_prob.shape[0]

    @cached_property
    def log_prob(self) -> Tensor:
        """[N, T+1] log P(first t frames emit exactly g)."""
        return torch.logaddexp(self.log_prob_nonblank, self.log_prob_blank)


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
    _emissions: Tensor  # [B, T, A'] log-probs as given: the caller's tensor (read only), or its `labels`, then blank
    _blank_emissions: Tensor  # [B, T] floored; 0 in padding, so the end state of short audio sits at index T
    _log_prob_silence: Tensor  # [B, T+1] all frames so far blank: the cumulative sum of `_blank_emissions`, from 0
    _blank_column: int  # of `_emissions`; whatever is not scored maps to it
    _label_to_column: Tensor  # [B, 1 + A] int64 column of the labels -1 and up
    _is_padding: Tensor  # [B, T] bool
    _has_padding: bool

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
        _check_top_k(top_k)
        log_probs, lengths = log_probs.detach(), lengths.to(log_probs.device)
        log_probs = log_probs[:, : int(lengths.max())]  # frames that are padding everywhere cost time for nothing
        if top_k is None:
            _check_values(log_probs, lengths)
            return cls._assemble(log_probs, None, lengths, blank_id, log_probs.shape[2])
        labels = _top_labels(_peaks(log_probs, lengths), blank_id, top_k)
        return cls._assemble(_select(log_probs, labels, blank_id), labels, lengths, blank_id, log_probs.shape[2])

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
        _check_top_k(top_k)
        _check_lengths(lengths)
        chunks = _Chunks(log_prob_fn, lengths, chunk_frames)
        peaks = None
        for start, chunk in chunks:
            if peaks is None:
                _check_blank(blank_id, chunk.shape[2])
                peaks = chunk.new_full((chunk.shape[0], chunk.shape[2]), -math.inf)
            lengths = lengths.to(chunk.device)
            peaks = torch.maximum(peaks, _peaks(chunk, lengths - start, start))
        labels = _top_labels(peaks, blank_id, top_k)
        emissions = torch.cat([_select(chunk, labels, blank_id) for _, chunk in chunks], 1)
        return cls._assemble(emissions, labels, lengths, blank_id, peaks.shape[1])

    @classmethod
    def _assemble(
        cls, emissions: Tensor, labels: Tensor | None, lengths: Tensor, blank_id: int, num_labels: int
    ) -> CTCPrefixScorer:
        """From emissions [B, T, U'+1] of `labels` [B, U'] and the blank, or of all labels; T = max(lengths)."""
        if emissions.shape[1] == 0:  # no audio at all: one padding frame keeps every reduction over T defined
            emissions = emissions.new_zeros(emissions.shape[0], 1, emissions.shape[2])
        device = emissions.device
        is_padding = torch.arange(emissions.shape[1], device=device) >= lengths[:, None]  # B, T
        if labels is None:
            blank_column, label_to_column = blank_id, torch.arange(-1, num_labels, device=device)
            label_to_column[0] = blank_column
            label_to_column = label_to_column.expand(len(lengths), -1)
        else:
            blank_column = labels.shape[1]
            label_to_column = torch.full((len(lengths), 1 + num_labels), blank_column, device=device)
            label_to_column.scatter_(1, 1 + labels, torch.arange(blank_column, device=device).expand_as(labels))
        blank = emissions[:, :, blank_column].to(_state_dtype(device)).clamp(min=LOG_PROB_FLOOR)
        blank = blank.masked_fill(is_padding, 0.0)
        return cls(
            blank_id=blank_id,
            num_labels=num_labels,
            labels=labels,
            _emissions=emissions,
            _blank_emissions=blank,
            _log_prob_silence=torch.nn.functional.pad(blank.cumsum(1), (1, 0)),
            _blank_column=blank_column,
            _label_to_column=label_to_column,
            _is_padding=is_padding,
            _has_padding=bool(is_padding.any()),
        )

    @property
    def num_utterances(self) -> int:
        return self._blank_emissions.shape[0]

    @property
    def device(self) -> torch.device:
        return self._blank_emissions.device

    @cached_property
    def _label_probs(self) -> Tensor:
        """[B, T, A'] probabilities, 0 for the blank and in padding; made by the first use."""
        probs = self._emissions.to(self._prob_dtype).exp()
        self._fill_padding_(probs, 0.0, frame_dim=1)
        probs[:, :, self._blank_column] = 0.0
        return probs

    @property
    def _prob_dtype(self) -> torch.dtype:
        return torch.promote_types(self._emissions.dtype, torch.float32)

    def init(self, num_beams: int) -> CTCPrefixState:
        """Returns the state of B*num_beams empty prefixes.

        Raises:
            ValueError: `num_beams` is below 1.
        """
        if num_beams < 1:
            raise ValueError(f"num_beams: expected at least 1, got {num_beams}; pass the beams per utterance.")
        log_prob_blank = self._log_prob_silence.repeat_interleave(num_beams, 0)
        num_rows = log_prob_blank.shape[0]
        return CTCPrefixState(
            log_prob_nonblank=torch.full_like(log_prob_blank, -math.inf),
            log_prob_blank=log_prob_blank,
            prefix_log_prob=log_prob_blank.new_zeros(num_rows),
            repeat_log_prob=log_prob_blank.new_full((num_rows,), -math.inf),
            last_label=torch.full((num_rows,), _NO_LABEL, device=self.device),
        )

    def score(self, state: CTCPrefixState) -> Tensor:
        """Returns psi(g.c) of every hypothesis and scored label: [N, U'], or [N, A] when `labels` is None.

        Column j of row n is label `labels[n // K, j]`, or label j. The blank and labels that cannot follow g are -inf,
        as are labels below exp(-87) times psi(g) (exp(-700) from float64 log-probs).
        """
        psi = self._score_columns(state)
        return psi if self.labels is None else psi[:, : self._blank_column]

    def _score_columns(self, state: CTCPrefixState) -> Tensor:
        """[N, A'] psi(g.c) of every column of `_emissions`; that of the blank holds nothing of use in a subset."""
        self._beams_of(state)
        weights, log_scale = self._time_weights(state)
        # N, T -> B, K, T; times B, T, A' -> B, K, A' -> N, A'
        psi = torch.bmm(self._per_utterance(weights), self._label_probs).flatten(0, 1)
        psi = psi.to(log_scale.dtype).log_().add_(log_scale)
        # After its last label a hypothesis needs a blank first. The empty prefix has none and keeps -inf for the blank;
        # in a subset, a last label that is not scored maps to the blank as well.
        return psi.scatter_(1, self._columns(state.last_label[:, None]), state.repeat_log_prob[:, None])

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
        columns = self._columns(labels)  # N, C
        # Gathering a label costs about as much time as multiplying four that lie side by side.
        if 4 * num_beams * labels.shape[1] >= self._emissions.shape[2]:
            psi = self._score_columns(state).gather(1, columns)
        else:
            weights, log_scale = self._time_weights(state)
            psi = torch.bmm(weights[:, None], self._probs_at(columns)).squeeze(1)  # N, 1, T; N, T, C -> N, C
            psi = psi.to(log_scale.dtype).log_().add_(log_scale)
            psi = torch.where(labels == state.last_label[:, None], state.repeat_log_prob[:, None], psi)
        return psi.masked_fill_(columns == self._blank_column, -math.inf)

    def eos(self, state: CTCPrefixState) -> Tensor:
        """Returns [N] log P(the whole audio is exactly g). The CTC output of an end-of-sentence label plays no part."""
        self._beams_of(state)
        return state.log_prob[:, -1]

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
        num_kept = self._check_selection(state, parent, label)
        parent, label = parent.long(), label.long()
        parent_blank = state.log_prob_blank.index_select(0, parent)
        # A repeated label needs a blank in between, or it would merge with the previous one.
        is_repeat = label == state.last_label.index_select(0, parent)
        log_phi = torch.where(is_repeat[:, None], parent_blank, state.log_prob.index_select(0, parent))
        log_phi = self._per_utterance(log_phi)[..., :-1]  # N', T+1 -> B, K', T: before each frame
        self._fill_padding_(log_phi, -math.inf, frame_dim=2)  # no label starts in padding

        emission = self._emission_of(label)  # B, K', T
        nonblank = _scan(log_phi, emission, emission.cumsum(2))  # B, K', T+1
        blank = _scan(nonblank[..., :-1], self._blank_emissions[:, None], self._log_prob_silence[:, None, 1:])
        self._fill_padding_(emission, -math.inf, frame_dim=2)  # the scans needed finite values
        # Sums over the frame in which the next label starts; log_phi is for this label, blank for its repetition.
        psi, repeat = torch.logsumexp(torch.stack((log_phi, blank[..., :-1])) + emission, dim=3).flatten(1)  # 2, N'
        new = CTCPrefixState(
            log_prob_nonblank=nonblank.flatten(0, 1),
            log_prob_blank=blank.flatten(0, 1),
            prefix_log_prob=psi,
            repeat_log_prob=repeat,
            last_label=label,
        )
        if num_kept == 0:
            return new
        keep = label == KEEP_LABEL
        return CTCPrefixState(
            log_prob_nonblank=torch.where(keep[:, None], state.log_prob_nonblank[parent], new.log_prob_nonblank),
            log_prob_blank=torch.where(keep[:, None], parent_blank, new.log_prob_blank),
            prefix_log_prob=torch.where(keep, state.prefix_log_prob[parent], new.prefix_log_prob),
            repeat_log_prob=torch.where(keep, state.repeat_log_prob[parent], new.repeat_log_prob),
            last_label=torch.where(keep, state.last_label[parent], label),
        )

    def _beams_of(self, state: CTCPrefixState) -> int:
        num_rows, width = state.log_prob_blank.shape
        num_frames = self._blank_emissions.shape[1]
        if num_rows % self.num_utterances or width != num_frames + 1:
            raise ValueError(
                f"state: expected a multiple of {self.num_utterances} rows with {num_frames} frames, "
                f"got {num_rows} rows with {width - 1}; use states made by this scorer's init or advance."
            )
        return num_rows // self.num_utterances

    def _per_utterance(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [B, K, ...]"""
        return rows.view(self.num_utterances, -1, *rows.shape[1:])

    def _fill_padding_(self, values: Tensor, fill: float, *, frame_dim: int) -> None:
        """In place, in [B, T, ...] or [B, ..., T]. Assigned, never multiplied or added: padding may hold NaN."""
        if self._has_padding:
            values.masked_fill_(self._is_padding.unsqueeze(3 - frame_dim), fill)

    def _columns(self, labels: Tensor) -> Tensor:
        """Columns of `_emissions` holding the labels [N, C], that of the blank where a label is -1 or not scored."""
        per_utterance = labels.reshape(self.num_utterances, -1)  # N, C -> B, K*C
        return self._label_to_column.gather(1, 1 + per_utterance).view_as(labels)

    def _emissions_at(self, columns: Tensor) -> Tensor:
        """[B, T, K*C] log-probs as given of the columns [N, C]. Frame by frame: fast at any number of labels."""
        columns = columns.reshape(self.num_utterances, 1, -1)  # N, C -> B, 1, K*C
        return self._emissions.gather(2, columns.expand(-1, self._emissions.shape[1], -1))

    def _probs_at(self, columns: Tensor) -> Tensor:
        """[N, T, C] probabilities of the columns [N, C]; 0 in padding."""
        probs = self._emissions_at(columns).to(self._prob_dtype)  # B, T, K*C
        self._fill_padding_(probs, -math.inf, frame_dim=1)
        num_beams = columns.shape[0] // self.num_utterances
        # B, T, K*C -> B, T, K, C -> B, K, T, C -> N, T, C
        return probs.exp_().view(*probs.shape[:2], num_beams, columns.shape[1]).transpose(1, 2).flatten(0, 1)

    def _time_weights(self, state: CTCPrefixState) -> tuple[Tensor, Tensor]:
        """[N, T] probability of g before each frame, over psi(g); and log psi(g), [N, 1].

        psi(g) is the natural scale: the largest weight lies between 1 / (T + 1) and 1.
        """
        # Impossible hypotheses: their weights are exp(-inf - finite) = 0, not NaN.
        log_scale = state.prefix_log_prob.clamp(min=torch.finfo(state.prefix_log_prob.dtype).min)[:, None]
        return (state.log_prob[:, :-1] - log_scale).exp_().to(self._prob_dtype), log_scale

    def _emission_of(self, labels: Tensor) -> Tensor:
        """[B, K', T] floored log-probs of one label per row [N'], in the state dtype; the floor in padding."""
        columns = self._columns(labels[:, None])
        emission = self._emissions_at(columns).transpose(1, 2)  # B, T, K' -> B, K', T
        emission = emission.to(self._blank_emissions.dtype, memory_format=torch.contiguous_format, copy=True)
        emission.masked_fill_(self._per_utterance(columns == self._blank_column), LOG_PROB_FLOOR)
        self._fill_padding_(emission, LOG_PROB_FLOOR, frame_dim=2)
        return emission.clamp_(min=LOG_PROB_FLOOR)

    def _check_selection(self, state: CTCPrefixState, parent: Tensor, label: Tensor) -> int:
        """Number of rows that keep their label."""
        num_beams = self._beams_of(state)
        if parent.dim() != 1 or parent.shape != label.shape or parent.shape[0] % self.num_utterances:
            raise ValueError(
                f"parent, label: expected two 1-D tensors of one length, a multiple of the {self.num_utterances} "
                f"utterances, got {tuple(parent.shape)} and {tuple(label.shape)}."
            )
        rows_per_utterance = parent.shape[0] // self.num_utterances
        parents, labels = torch.stack((parent, label)).tolist()  # one device synchronisation, then plain integers
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
        return labels.count(KEEP_LABEL)


@dataclass(frozen=True, eq=False)
class _Chunks:
    """The output of a CTC head, `chunk_frames` at a time; can be gone through several times."""

    log_prob_fn: Callable[[int, int], Tensor]
    lengths: Tensor
    chunk_frames: int

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first frame, log-probs [B, t, A])."""
        num_frames, num_labels = int(self.lengths.max()), None
        for start in range(0, max(num_frames, 1), self.chunk_frames):
            end = min(start + self.chunk_frames, num_frames)
            chunk = self.log_prob_fn(start, end)
            _check_chunk(chunk, (len(self.lengths), end - start, num_labels), start, end)
            num_labels = chunk.shape[2]
            yield start, chunk


def _state_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device computes in it, else float32."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).exp()
    except (TypeError, RuntimeError):  # mps: TypeError at creation
        return torch.float32
    return torch.float64


def _scan(inflow: Tensor, emission: Tensor, total: Tensor) -> Tensor:
    """Solves h[t + 1] = logaddexp(h[t], inflow[t]) + emission[t], h[0] = -inf, for all t at once.

    `inflow` is [B, K, T]; `emission`, finite, and `total`, its cumulative sum P, broadcast to that. Returns
    [B, K, T+1]. In float64 h = P + logcumsumexp(inflow - shift(P)). In float32 these differences cancel, so there an
    associative scan (log2 T rounds) combines neighbours instead.
    """
    levels = inflow.new_empty(*inflow.shape[:2], inflow.shape[2] + 1)  # B, K, T+1
    levels[..., 0] = -math.inf
    if inflow.dtype == torch.float64:
        torch.add(torch.logcumsumexp(inflow - (total - emission), dim=2), total, out=levels[..., 1:])
        return levels
    decay, level = emission.expand_as(inflow), inflow + emission
    step = 1
    while step < inflow.shape[2]:
        # Element t covers `step` frames ending at t; join it with the element that ends `step` frames earlier.
        joined = torch.logaddexp(level[..., :-step] + decay[..., step:], level[..., step:])
        level = torch.cat((level[..., :step], joined), dim=2)
        decay = torch.cat((decay[..., :step], decay[..., :-step] + decay[..., step:]), dim=2)
        step *= 2
    levels[..., 1:] = level
    return levels


def _peaks(log_probs: Tensor, lengths: Tensor, first_frame: int = 0) -> Tensor:
    """[B, A] maximum over the valid frames, the first `lengths` [B] (of any sign) of [B, T, A]; -inf without any.

    Raises:
        ValueError: a valid frame holds NaN or +inf; the message counts frames from `first_frame`.
    """
    peaks = log_probs.new_full((log_probs.shape[0], log_probs.shape[2]), -math.inf)
    # Slices instead of a masked copy, which would double the largest tensor around.
    for peak, frames, length in zip(peaks, log_probs, lengths.tolist(), strict=True):
        if length > 0:
            torch.amax(frames[:length], 0, out=peak)
    if not bool((peaks < math.inf).all()):
        _check_values(log_probs, lengths, first_frame)
    return peaks


def _top_labels(peaks: Tensor, blank_id: int, top_k: int) -> Tensor:
    """[B, min(top_k, U)] labels with the highest peaks [B, A], ascending, without the blank."""
    peaks = torch.cat((peaks[:, :blank_id], peaks[:, blank_id + 1 :]), dim=1)  # no blank, whatever its peak
    best = peaks.topk(min(top_k, peaks.shape[1]), dim=1).indices.sort(1).values
    return best + (best >= blank_id)


def _select(log_probs: Tensor, labels: Tensor, blank_id: int) -> Tensor:
    """[B, T, A] at labels [B, U'] and the blank -> [B, T, U'+1]."""
    columns = torch.nn.functional.pad(labels, (0, 1), value=blank_id)
    return log_probs.gather(2, columns[:, None].expand(-1, log_probs.shape[1], -1))


def check_log_probs(log_probs: Tensor, lengths: Tensor, blank_id: int) -> None:
    """Raises TypeError or ValueError unless these are CTC log-probs [B, T, A], frame counts [B] and a blank in A."""
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs: expected a floating-point tensor, got {log_probs.dtype}; pass log_softmax output.")
    if log_probs.dim() != 3 or log_probs.shape[0] < 1 or log_probs.shape[2] < 2:
        raise ValueError(
            "log_probs: expected shape (B, T, U+1) with at least one utterance, one label and the blank, got "
            f"{tuple(log_probs.shape)}."
        )
    _check_lengths(lengths)
    num_utterances, num_frames, num_labels = log_probs.shape
    if lengths.shape != (num_utterances,):
        raise ValueError(f"lengths: expected shape ({num_utterances},), one per utterance, got {tuple(lengths.shape)}.")
    if int(lengths.max()) > num_frames:
        raise ValueError(
            f"lengths: expected 0 to {num_frames} frames (T of log_probs), got {int(lengths.min())} to "
            f"{int(lengths.max())}; use the encoder's output lengths, not those of its input."
        )
    _check_blank(blank_id, num_labels)


def _check_lengths(lengths: Tensor) -> None:
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(
            f"lengths: expected an integer tensor of frame counts, got {lengths.dtype}; sum the mask over T."
        )
    if lengths.dim() != 1 or lengths.shape[0] < 1:
        raise ValueError(f"lengths: expected shape (B,), one per utterance, got {tuple(lengths.shape)}.")
    if int(lengths.min()) < 0:
        raise ValueError(
            f"lengths: expected at least 0 frames, got {int(lengths.min())} to {int(lengths.max())}; use the encoder's "
            "output lengths."
        )


def _check_blank(blank_id: int, num_labels: int) -> None:
    if not 0 <= blank_id < num_labels:
        raise ValueError(f"blank_id: expected 0 to {num_labels - 1} (label axis of log_probs), got {blank_id}.")


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, or None to score every label, got {top_k}.")


def _check_chunk(chunk: Tensor, expected: tuple[int, int, int | None], start: int, end: int) -> None:
    """`expected` is (B, t, A), A None in the first chunk."""
    if not chunk.is_floating_point():
        raise TypeError(
            f"log_prob_fn: expected floating-point log-probs for frames {start} to {end}, got {chunk.dtype}; return "
            "log_softmax output."
        )
    num_utterances, num_frames, num_labels = expected
    fits = chunk.dim() == 3 and tuple(chunk.shape[:2]) == (num_utterances, num_frames) and chunk.shape[2] >= 2
    if not fits or num_labels not in (None, chunk.shape[2]):
        raise ValueError(
            f"log_prob_fn: expected shape ({num_utterances}, {num_frames}, {num_labels or 'U+1'}) for frames {start} "
            f"to {end}, got {tuple(chunk.shape)}; return only these frames, of all utterances."
        )


def _check_values(log_probs: Tensor, lengths: Tensor, first_frame: int = 0) -> None:
    """`lengths` [B] counts the valid ones of these frames, the first of which is `first_frame` of the audio."""
    is_valid = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]  # B, T
    # The maximum over labels is NaN or +inf exactly if one of them is, and small enough to inspect.
    peaks = log_probs.amax(2)
    is_bad = (peaks.isnan() | (peaks == math.inf)) & is_valid
    if bool(is_bad.any()):
        utterance, frame = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"log_probs: expected log-probabilities, got {peaks[utterance, frame].item()} in utterance {utterance}, "
            f"frame {first_frame + frame}; check the CTC head (half precision overflows?) and pass log_softmax output."
        )
