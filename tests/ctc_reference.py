"""Float64 references for CTC, written from the definitions and sharing no code with the library.

`log_probs` is one utterance, [T, A] natural logs with the blank at `blank_id`; prefixes are tuples of label indices.
Enumeration lists all A**T alignments: keep A**T below about 1e5.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

from torch import Tensor

Prefix = tuple[int, ...]


def collapse(alignment: tuple[int, ...], blank_id: int) -> Prefix:
    """Labels of a frame-wise alignment: merge runs, then drop blanks."""
    return tuple(label for label, _ in itertools.groupby(alignment) if label != blank_id)


def label_sequence_probs(log_probs: Tensor, blank_id: int) -> dict[Prefix, float]:
    """Probability of every label sequence that T frames can emit, by enumeration."""
    return _enumerate(tuple(map(tuple, log_probs.double().exp().tolist())), log_probs.shape[1], blank_id)


@lru_cache(maxsize=64)
def _enumerate(probs: tuple[tuple[float, ...], ...], num_labels: int, blank_id: int) -> dict[Prefix, float]:
    sums: dict[Prefix, list[float]] = {}
    for alignment in itertools.product(range(num_labels), repeat=len(probs)):
        prob = math.prod(frame[label] for frame, label in zip(probs, alignment, strict=True))
        sums.setdefault(collapse(alignment, blank_id), []).append(prob)
    return {labels: math.fsum(parts) for labels, parts in sums.items()}


def exact_prob(log_probs: Tensor, blank_id: int, prefix: Prefix) -> float:
    """P(the audio is exactly `prefix`), by enumeration."""
    return label_sequence_probs(log_probs, blank_id).get(prefix, 0.0)


def prefix_prob(log_probs: Tensor, blank_id: int, prefix: Prefix) -> float:
    """P(the label sequence starts with `prefix`), by enumeration."""
    sequences = label_sequence_probs(log_probs, blank_id)
    return math.fsum(prob for labels, prob in sequences.items() if labels[: len(prefix)] == prefix)


def textbook_prefix_log_prob(log_probs: Tensor, blank_id: int, prefix: Prefix) -> tuple[float, float]:
    """(log P(starts with `prefix`), log P(is exactly `prefix`)) by the frame-by-frame recursion, for any T.

    Watanabe et al. (2017), "Hybrid CTC/attention architecture", algorithm 2, one scalar at a time.
    """
    frames = log_probs.double().tolist()
    # gamma_n[t], gamma_b[t]: the first t frames emit exactly the prefix so far, the last being a label / blank.
    gamma_n = [-math.inf] * (len(frames) + 1)
    gamma_b = [0.0]
    for frame in frames:
        gamma_b.append(gamma_b[-1] + frame[blank_id])
    psi, last = 0.0, None
    for label in prefix:
        new_n, new_b, psi = [-math.inf], [-math.inf], -math.inf
        for t, frame in enumerate(frames):
            phi = gamma_b[t] if label == last else _log_add(gamma_n[t], gamma_b[t])
            psi = _log_add(psi, phi + frame[label])
            new_b.append(_log_add(new_b[t], new_n[t]) + frame[blank_id])
            new_n.append(_log_add(new_n[t], phi) + frame[label])
        gamma_n, gamma_b, last = new_n, new_b, label
    return psi, _log_add(gamma_n[-1], gamma_b[-1])


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
