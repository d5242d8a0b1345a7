"""The CTC output as the prefix scorer reads it: checked, pruned to some labels, and label by label.

Shape legend: B utterances, T frames, t of these frames, A = U + 1 label axis of the CTC output (U labels and the
blank), U' labels kept of each utterance, M labels asked for per utterance. All scores are natural-log probabilities.
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

_ALL_PER_LABEL = 40  # in a search, copying this many labels takes about as long as fetching one at every step


class LabelEmissions:
    """A CTC output label by label, for the labels and frames that are asked for.

    A CTC output is laid out frame by frame: the values of a label lie far apart in memory, and fetching them takes
    longer than computing with them. So kept labels are copied, the frames of each in a row; and all labels are, once
    many are asked for at a time. Log-probs and probabilities are at least float32.

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
        self._source = log_probs if labels is None else None
        self._labels = labels
        self._is_padding = is_padding if bool(is_padding.any()) else None
        self._blank_id = blank_id
        self._num_labels = num_labels
        self._rows: Tensor | None = None  # [1 + B*U', T] or [1 + B*A, T]; the first one is what no frame emits
        self._row_of_label: Tensor | None = None  # [B, A + 1]; the last one is that of -1
        if labels is not None:
            self._copy(log_probs, labels)

    def are_kept(self, labels: Tensor) -> Tensor:
        """[B, M] labels from -1 to A - 1 -> [B, M] bool: neither the blank, nor -1, nor left out."""
        if self._labels is None:
            return (labels >= 0) & (labels != self._blank_id)
        return self._row_of_label.gather(1, labels.remainder(self._num_labels + 1)) > 0

    def log_probs(self, labels: Tensor, frames: slice = slice(None)) -> Tensor:
        """[B, M] labels from -1 to A - 1 -> [B, M, t] log-probs in these frames, floored.

        The floor in padding, and for the blank, the label -1, and labels that are not kept.
        """
        if self._rows is None:
            if self._num_labels > _ALL_PER_LABEL * labels.shape[1]:
                return self._fetch(labels, frames)
            every = torch.arange(self._num_labels, device=labels.device)
            self._copy(self._source, every.expand(len(labels), -1))
        rows = self._row_of_label.gather(1, labels.remainder(self._num_labels + 1))
        table = self._rows[:, frames]
        return table.index_select(0, rows.flatten()).clamp_(min=LOG_PROB_FLOOR).view(*rows.shape, table.shape[1])

    @cached_property
    def all_probs(self) -> Tensor:
        """[B, T, A] probabilities of all labels, or [B, T, U'] of those kept; 0 for the blank and in padding."""
        if self._labels is not None:
            # B*U', T -> B, T, U', in this order, in which products with it are fastest.
            return self._rows[1:].view(*self._labels.shape, -1).transpose(1, 2).contiguous().exp()
        probs = self._source.to(self.dtype).exp()
        probs[:, :, self._blank_id] = 0.0
        # Assigned, never multiplied: padding may hold NaN.
        return probs if self._is_padding is None else probs.masked_fill_(self._is_padding[:, :, None], 0.0)

    def _fetch(self, labels: Tensor, frames: slice) -> Tensor:
        """As `log_probs`, from the CTC output as given."""
        source = self._source[:, frames]
        values = source.gather(2, labels.clamp(min=0)[:, None].expand(-1, source.shape[1], -1))  # B, t, M
        values = values.to(self.dtype).transpose(1, 2).contiguous().clamp_(min=LOG_PROB_FLOOR)
        if self._is_padding is not None:
            values.masked_fill_(self._is_padding[:, None, frames], LOG_PROB_FLOOR)
        return values.masked_fill_(~self.are_kept(labels)[..., None], LOG_PROB_FLOOR)

    # What a search under inference_mode copied must stay usable for one without.
    @torch.inference_mode()
    def _copy(self, log_probs: Tensor, labels: Tensor) -> None:
        """Copies log-probs [B, T, M] of the labels [B, M] to rows."""
        num_utterances, num_frames, _ = log_probs.shape
        self._rows = torch.empty(1 + labels.numel(), num_frames, dtype=self.dtype, device=log_probs.device)
        self._rows[0] = LOG_PROB_FLOOR
        for index, rows in enumerate(self._rows[1:].view(num_utterances, -1, num_frames)):
            rows.copy_(log_probs[index].t())  # far faster than a batch of matrices
            if self._is_padding is not None:
                rows.masked_fill_(self._is_padding[index], LOG_PROB_FLOOR)
        numbers = torch.arange(1, len(self._rows), device=labels.device).view_as(labels)
        self._row_of_label = labels.new_zeros(num_utterances, self._num_labels + 1).scatter_(1, labels, numbers)
        self._row_of_label[:, [self._blank_id, -1]] = 0


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
