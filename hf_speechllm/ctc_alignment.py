"""When each label and each word was said: the best CTC alignment of a given transcript (forced alignment).

Shape legend: B utterances, T frames, A label axis of the CTC output (blank included), U labels of the longest
transcript, S = 2U + 1 states: blank, first label, blank, second label, ..., blank.

Source: Graves et al. (2006), "Connectionist temporal classification", section 4.1, with maxima instead of sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ctc_beam import score_dtype
from .ctc_emissions import check_log_probs
from .ctc_text import LabelsToText


@dataclass(frozen=True)
class AlignedLabel:
    """One label of a transcript.

    Attributes:
        label: index into the label axis.
        start_frame: first frame that emits it.
        end_frame: the frame after the last one that emits it.
        confidence: mean posterior of the label over its frames, 0 to 1.
    """

    label: int
    start_frame: int
    end_frame: int
    confidence: float


@dataclass(frozen=True)
class AlignedWord:
    """One word of a transcript.

    Attributes:
        word: its text.
        start_s: start of the first frame of its labels, in seconds.
        end_s: end of the last frame of its labels, in seconds.
        confidence: mean posterior of its labels over the frames that emit them, 0 to 1.
    """

    word: str
    start_s: float
    end_s: float
    confidence: float


@torch.no_grad()
def align(
    log_probs: Tensor, lengths: Tensor, labels: Sequence[Sequence[int]], blank_id: int
) -> list[list[AlignedLabel]]:
    """Finds the most probable alignment of each transcript (exact Viterbi, in float64 where the device has it).

    Of equally probable alignments any may be returned.

    Args:
        log_probs: [B, T, A] log-softmax of the CTC output, any float dtype; -inf is allowed, padding may hold anything.
        lengths: [B] integer number of valid frames, 0 to T.
        labels: per utterance the labels, without blanks; may be empty.
        blank_id: position of the blank on the label axis.

    Raises:
        TypeError: `log_probs` is not floating point or `lengths` not integer.
        ValueError: a shape or range is wrong, a valid frame holds NaN, or no alignment of an utterance is possible:
            there are fewer frames than its labels (plus one for each label that repeats the one before) need, or the
            CTC output excludes them.
    """
    check_log_probs(log_probs, lengths, blank_id)
    _check_labels(labels, lengths.tolist(), log_probs.shape[2], blank_id)
    device, dtype = log_probs.device, score_dtype(log_probs.device)
    num_labels = torch.tensor([len(row) for row in labels], device=device)
    targets = torch.full((len(labels), 2 * int(num_labels.max()) + 1), blank_id, device=device)  # B, S
    for row, ids in zip(targets, labels, strict=True):
        row[1 : 2 * len(ids) : 2] = torch.tensor(ids, device=device)
    lengths = lengths.to(device)
    num_frames = int(lengths.max())
    is_padding = torch.arange(num_frames, device=device) >= lengths[:, None]  # B, T
    index = targets[:, None].expand(-1, num_frames, -1)
    emissions = log_probs[:, :num_frames].gather(2, index).to(dtype)  # B, T, S
    if bool((emissions.isnan() & ~is_padding[:, :, None]).any()):
        raise ValueError("log_probs: expected log-probabilities, got NaN in a valid frame; check the CTC head.")

    steps, score = _viterbi(emissions, targets, is_padding, blank_id)
    last = torch.stack((2 * num_labels, (2 * num_labels - 1).clamp(min=0)), 1)  # B, 2: blank or label at the end
    best = score.gather(1, last)
    if bool((best.amax(1) == -math.inf).any()):
        utterance = int((best.amax(1) == -math.inf).int().argmax())
        raise ValueError(
            f"labels: expected ones that the CTC output allows, got a probability of 0 for those of utterance "
            f"{utterance}."
        )
    states = _trace_back(steps, last.gather(1, best.argmax(1, keepdim=True)))  # B, T
    posteriors = emissions.gather(2, states[:, :, None])[:, :, 0].exp()
    return [
        _segments(path[:length], posterior[:length], ids)
        for path, posterior, length, ids in zip(
            states.tolist(), posteriors.tolist(), lengths.tolist(), labels, strict=True
        )
    ]


def word_times(
    aligned: Sequence[AlignedLabel], labels_to_text: LabelsToText, *, seconds_per_frame: float
) -> list[AlignedWord]:
    """Groups the labels of one utterance into words.

    A label belongs to the words whose text it begins or changes; word delimiters belong to none.

    Args:
        aligned: all labels of the utterance, from `align`.
        labels_to_text: spells a label tuple, such as `ctc_text.labels_to_text_of(tokenizer)`.
        seconds_per_frame: duration of a frame of `log_probs`.

    Raises:
        ValueError: `seconds_per_frame` is not positive, or `labels_to_text` gives fewer words for more labels.
    """
    if not seconds_per_frame > 0.0:
        raise ValueError(f"seconds_per_frame: expected more than 0, got {seconds_per_frame}.")
    labels = tuple(label.label for label in aligned)
    members: list[list[AlignedLabel]] = []
    words: list[str] = []
    for count, label in enumerate(aligned, start=1):
        longer = labels_to_text(labels[:count]).split()
        if len(longer) < len(words):
            raise ValueError(
                f"labels_to_text: expected at least the words {' '.join(words)!r} when another label follows, got "
                f"{' '.join(longer)!r}."
            )
        members += [[] for _ in longer[len(words) :]]
        first = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words, longer, strict=False)))
        for parts in members[first:]:
            parts.append(label)
        words = longer
    return [_word(word, parts, seconds_per_frame) for word, parts in zip(words, members, strict=True)]


def frames_needed(labels: Sequence[int]) -> int:
    """The fewest frames in which labels can be said: one each, and a blank before one that repeats the last."""
    return len(labels) + sum(one == other for one, other in zip(labels, labels[1:], strict=False))


def bounds_of_words(
    aligned: Sequence[AlignedLabel], word_of_label: Sequence[int | None], num_words: int, num_frames: int
) -> list[tuple[int, int]]:
    """First frame of each word of one utterance and the frame after its last one.

    A word without labels, which CTC labels do not spell, gets the frames between the words beside it.

    Args:
        aligned: all labels of the utterance, from `align`.
        word_of_label: number of the word that each label belongs to, ascending; None for delimiters.
        num_words: W.
        num_frames: T of this utterance.
    """
    labels_of: list[list[AlignedLabel]] = [[] for _ in range(num_words)]
    for label, word in zip(aligned, word_of_label, strict=True):
        if word is not None:
            labels_of[word].append(label)
    starts = [labels[0].start_frame if labels else None for labels in labels_of]
    bounds, last_end = [], 0
    for word, labels in enumerate(labels_of):
        if labels:
            last_end = labels[-1].end_frame
            bounds.append((labels[0].start_frame, last_end))
        else:
            next_start = next((start for start in starts[word:] if start is not None), num_frames)
            bounds.append((last_end, next_start))
    return bounds


def _viterbi(emissions: Tensor, targets: Tensor, is_padding: Tensor, blank_id: int) -> tuple[Tensor, Tensor]:
    """Scores of the best paths.

    Args:
        emissions: [B, T, S] log-probs of each state.
        targets: [B, S] label of each state.
        is_padding: [B, T].

    Returns:
        [B, T, S] how many states (0, 1, 2) back the best path to each state was one frame earlier, and [B, S] its
        log-prob in the last valid frame.
    """
    # From a label straight to the next one, unless it is the same one: then there is a blank in between.
    may_skip = torch.zeros_like(targets, dtype=torch.bool)
    may_skip[:, 2:] = (targets[:, 2:] != blank_id) & (targets[:, 2:] != targets[:, :-2])
    score = torch.full_like(targets, -math.inf, dtype=emissions.dtype)
    score[:, 0] = 0.0  # before the first frame: as if a blank had ended
    steps = torch.zeros(emissions.shape, dtype=torch.uint8, device=emissions.device)
    for t in range(emissions.shape[1]):
        padded = torch.nn.functional.pad(score, (2, 0), value=-math.inf)
        one_back, two_back = padded[:, 1:-1], padded[:, :-2].masked_fill(~may_skip, -math.inf)
        best, step = torch.stack((score, one_back, two_back)).max(0)
        ended = is_padding[:, t, None]
        score = torch.where(ended, score, best + emissions[:, t])
        steps[:, t] = step.masked_fill(ended, 0)
    return steps, score


def _trace_back(steps: Tensor, state: Tensor) -> Tensor:
    """[B, T] states of the best path that ends in `state` [B, 1]."""
    path = []
    for t in range(steps.shape[1] - 1, -1, -1):
        path.append(state)
        state = state - steps[:, t].gather(1, state)
    return torch.cat(path[::-1], 1) if path else state[:, :0]


def _segments(states: list[int], posteriors: list[float], labels: Sequence[int]) -> list[AlignedLabel]:
    """The labels of one utterance from the state and the posterior of each frame."""
    frames: list[list[int]] = [[] for _ in labels]
    for t, state in enumerate(states):
        if state % 2 == 1:
            frames[state // 2].append(t)
    return [
        AlignedLabel(label, where[0], where[-1] + 1, math.fsum(posteriors[t] for t in where) / len(where))
        for label, where in zip(labels, frames, strict=True)
    ]


def _word(word: str, labels: Sequence[AlignedLabel], seconds_per_frame: float) -> AlignedWord:
    num_frames = [label.end_frame - label.start_frame for label in labels]
    mass = math.fsum(label.confidence * count for label, count in zip(labels, num_frames, strict=True))
    return AlignedWord(
        word,
        labels[0].start_frame * seconds_per_frame,
        labels[-1].end_frame * seconds_per_frame,
        mass / sum(num_frames),
    )


def _check_labels(labels: Sequence[Sequence[int]], lengths: list[int], num_outputs: int, blank_id: int) -> None:
    if len(labels) != len(lengths):
        raise ValueError(f"labels: expected one sequence per utterance ({len(lengths)}), got {len(labels)}.")
    for utterance, (ids, length) in enumerate(zip(labels, lengths, strict=True)):
        wrong = [label for label in ids if not 0 <= label < num_outputs or label == blank_id]
        if wrong:
            raise ValueError(
                f"labels: expected 0 to {num_outputs - 1} other than the blank {blank_id}, got {wrong[0]} in "
                f"utterance {utterance}."
            )
        needed = frames_needed(ids)
        if needed > length:
            raise ValueError(
                f"labels: expected ones that fit the {length} frames of utterance {utterance}, got {len(ids)} labels "
                f"that need {needed} (a repeated label needs a blank before it)."
            )
