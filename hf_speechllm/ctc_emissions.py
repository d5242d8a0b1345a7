"""The CTC output as the prefix scorer reads it: checked, pruned to some labels, and label by label.

Shape legend: B utterances, T frames, t frames of a chunk, A = U + 1 label axis of the CTC output (U labels and the
blank), U' labels kept of each utterance, M labels asked for per utterance, R rows of the table. All scores are
natural-log probabilities.
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

NO_ROW = 0  # of `LabelEmissions`: what no frame emits
_NOT_FETCHED = -1
_ALL_PER_LABEL = 64  # copying this many labels in order takes about as long as fetching one


class LabelEmissions:
    """A CTC output label by label: a table with a row of T frames for each utterance and label that is asked for.

    A CTC output is laid out frame by frame: the T values of a label lie far apart in memory, and fetching them takes
    longer than computing with them. A search asks for the same labels again and again, so each is fetched when it is
    first asked for, and kept; or all at once, which takes far less time per label, if many are asked for.

    Row `NO_ROW` stands for what no frame emits: the blank, the label -1, and labels that are not kept. Log-probs and
    probabilities are at least float32.

    Args:
        log_probs: [B, T, A] as given: kept by reference, not modified. Or [B, T, U'] of `labels`. Padding may hold
            anything.
        labels: [B, U'] distinct labels without the blank, the only ones that are kept; None for all of them.
        is_padding: [B, T] bool.
        blank_id: position of the blank on the label axis.
        num_labels: A.
    """

    def __init__(
        self, log_probs: Tensor, labels: Tensor | None, is_padding: Tensor, blank_id: int, num_labels: int
    ) -> None:
        self.dtype = torch.promote_types(log_probs.dtype, torch.float32)
        self._labels = labels
        self._source = log_probs if labels is None else None
        self._is_padding = is_padding
        self._has_padding = bool(is_padding.any())
        self._blank_id = blank_id
        num_utterances, num_frames = is_padding.shape
        self._utterance = torch.arange(num_utterances, device=log_probs.device)[:, None]
        # [R, T] log-probs, floored; the floor in padding. There may be room for more rows.
        self._table = torch.full((1, num_frames), LOG_PROB_FLOOR, dtype=self.dtype, device=log_probs.device)
        self._num_rows = 1
        # [B, A + 1] row of each label; the last one is that of -1.
        missing = _NOT_FETCHED if labels is None else NO_ROW
        self._row_of_label = torch.full((num_utterances, num_labels + 1), missing, device=log_probs.device)
        self._row_of_label[:, [blank_id, -1]] = NO_ROW
        self._has_all = False
        if labels is not None:
            self._add_all(log_probs, labels)

    def rows(self, labels: Tensor) -> Tensor:
        """[B, M] labels from -1 to A - 1 -> [B, M] rows of the table."""
        rows = self._row_of_label[self._utterance, labels]
        if self._has_all:
            return rows
        is_missing = rows == _NOT_FETCHED
        if not bool(is_missing.any()):
            return rows
        self._fetch(labels, is_missing)
        return self._row_of_label[self._utterance, labels]

    def log_probs(self, rows: Tensor, frames: slice = slice(None)) -> Tensor:
        """[..., t] log-probs of rows [...] in these frames, floored; the floor in padding."""
        table = self._table[:, frames]
        return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])

    @cached_property
    def all_probs(self) -> Tensor:
        """[B, T, A] probabilities of all labels, or [B, T, U'] of those kept; 0 for the blank and in padding."""
        if self._source is None:
            return self._table[1:].exp().view(*self._labels.shape, -1).transpose(1, 2)  # B*U', T -> B, T, U'
        probs = self._source.to(self.dtype).exp()
        probs[:, :, self._blank_id] = 0.0
        # Assigned, never multiplied: padding may hold NaN.
        return probs.masked_fill_(self._is_padding[:, :, None], 0.0) if self._has_padding else probs

    # What a search under inference_mode fetched must stay usable for one without.
    @torch.inference_mode()
    def _fetch(self, labels: Tensor, is_missing: Tensor) -> None:
        """Adds the labels [B, M] where `is_missing`, each of them once; or all labels, if that takes no longer."""
        source, num_labels = self._source, self._source.shape[2]
        if num_labels <= _ALL_PER_LABEL * labels.shape[1]:
            self._add_all(source, torch.arange(num_labels, device=source.device).expand(len(labels), -1))
            return
        pairs = torch.unique((labels + self._utterance * num_labels)[is_missing])
        utterance, label = torch.div(pairs, num_labels, rounding_mode="floor"), pairs % num_labels
        # All labels of all utterances as rows: T values, one frame apart, from the offset of utterance and label on.
        offset = utterance * source.stride(0) + label * source.stride(2)
        last = (source.shape[0] - 1) * source.stride(0) + (num_labels - 1) * source.stride(2)
        by_offset = source.as_strided((last + 1, source.shape[1]), (1, source.stride(1)))
        self._make_room(len(pairs))
        self._add(by_offset.index_select(0, offset), utterance, label)

    def _add_all(self, log_probs: Tensor, labels: Tensor) -> None:
        """Adds log-probs [B, T, M] of the labels [B, M], after which none is missing."""
        self._make_room(labels.numel())
        # A single matrix is transposed several times faster than a batch of them.
        for utterance, frames, row_labels in zip(self._utterance, log_probs, labels, strict=True):
            self._add(frames.t(), utterance.expand_as(row_labels), row_labels)  # T, M -> M, T
        self._row_of_label[:, self._blank_id] = NO_ROW
        self._has_all = True

    def _make_room(self, num_rows: int) -> None:
        """Makes room for this many further rows."""
        end = self._num_rows + num_rows
        if end > len(self._table):
            room = max(end, 2 * len(self._table))  # doubled: rows are not copied again at every step
            table = self._table.new_empty(room, self._table.shape[1])
            table[: self._num_rows] = self._table[: self._num_rows]
            self._table = table

    def _add(self, log_probs: Tensor, utterance: Tensor, label: Tensor) -> None:
        """Adds log-probs [M, T] as given of utterances and labels, [M] each."""
        end = self._num_rows + len(label)
        rows = self._table[self._num_rows : end]
        rows.copy_(log_probs).clamp_(min=LOG_PROB_FLOOR)
        if self._has_padding:
            rows.masked_fill_(self._is_padding[utterance], LOG_PROB_FLOOR)
        self._row_of_label[utterance, label] = torch.arange(self._num_rows, end, device=label.device)
        self._num_rows = end


@dataclass(frozen=True, eq=False)
class HeadChunks:
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


def peaks_of(log_probs: Tensor, lengths: Tensor, first_frame: int = 0) -> Tensor:
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
        check_values(log_probs, lengths, first_frame)
    return peaks


def top_labels(peaks: Tensor, blank_id: int, top_k: int) -> Tensor:
    """[B, min(top_k, U)] labels with the highest peaks [B, A], ascending, without the blank."""
    peaks = torch.cat((peaks[:, :blank_id], peaks[:, blank_id + 1 :]), dim=1)  # no blank, whatever its peak
    best = peaks.topk(min(top_k, peaks.shape[1]), dim=1).indices.sort(1).values
    return best + (best >= blank_id)


def check_log_probs(log_probs: Tensor, lengths: Tensor, blank_id: int) -> None:
    """Raises TypeError or ValueError unless these are CTC log-probs [B, T, A], frame counts [B] and a blank in A."""
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs: expected a floating-point tensor, got {log_probs.dtype}; pass log_softmax output.")
    if log_probs.dim() != 3 or log_probs.shape[0] < 1 or log_probs.shape[2] < 2:
        raise ValueError(
            "log_probs: expected shape (B, T, U+1) with at least one utterance, one label and the blank, got "
            f"{tuple(log_probs.shape)}."
        )
    check_lengths(lengths)
    num_utterances, num_frames, num_labels = log_probs.shape
    if lengths.shape != (num_utterances,):
        raise ValueError(f"lengths: expected shape ({num_utterances},), one per utterance, got {tuple(lengths.shape)}.")
    if int(lengths.max()) > num_frames:
        raise ValueError(
            f"lengths: expected 0 to {num_frames} frames (T of log_probs), got {int(lengths.min())} to "
            f"{int(lengths.max())}; use the encoder's output lengths, not those of its input."
        )
    check_blank(blank_id, num_labels)


def check_lengths(lengths: Tensor) -> None:
    """Raises TypeError or ValueError unless these are frame counts [B]."""
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


def check_blank(blank_id: int, num_labels: int) -> None:
    """Raises ValueError unless the blank lies on the label axis."""
    if not 0 <= blank_id < num_labels:
        raise ValueError(f"blank_id: expected 0 to {num_labels - 1} (label axis of log_probs), got {blank_id}.")


def check_top_k(top_k: int | None) -> None:
    """Raises ValueError unless at least one label is kept."""
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


def check_values(log_probs: Tensor, lengths: Tensor, first_frame: int = 0) -> None:
    """Raises ValueError if a valid frame of [B, T, A] holds NaN or +inf.

    `lengths` [B] counts the valid ones of these frames, the first of which is `first_frame` of the audio.
    """
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
