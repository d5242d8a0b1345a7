"""Cut long recordings at pauses, so that no piece is longer than what a model was trained on.

The method is energy alone: 10 ms levels, a noise floor estimated inside each search window, two thresholds with
hysteresis. It needs one pass over the samples and keeps about 100 numbers per second of audio.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_LEVELS_PER_SECOND = 100  # 10 ms per level
_BLOCK_LEVELS = 6_000  # one minute per block of samples
_MIN_PAUSE_LEVELS = 13  # 0.13 s: closures of plosives are shorter
_MIN_RANGE_DB = 10.0  # below it the levels only show the syllables of uninterrupted speech, or mere noise
_QUIET_POINT_LEVELS = 9  # without a pause: the quietest 0.09 s
_LOWEST_DBFS = -100.0  # digital silence has no level
# Nothing audible is below this in a 16-bit recording: one quantisation step has a level of about -95 dBFS, the
# self-noise of a modest microphone about -60 dBFS. A segment is only called silent when a model has nothing to find.
SILENCE_DBFS = -65.0


@dataclass(frozen=True)
class Segment:
    """A piece of a recording: `start_s` (inclusive) to `end_s` (exclusive) in seconds.

    `is_silence` is True when no 30 ms of it reach SILENCE_DBFS.
    """

    start_s: float
    end_s: float
    is_silence: bool = False

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.end_s - self.start_s

    def slice(self, waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
        """The samples of this segment, a view into `waveform` [samples]; consecutive segments share no sample."""
        return waveform[round(self.start_s * sampling_rate) : round(self.end_s * sampling_rate)]


def split_at_pauses(
    waveform: np.ndarray, sampling_rate: int, max_duration_s: float = 30.0, min_duration_s: float | None = None
) -> list[Segment]:
    """Split a waveform into consecutive segments that cover it without gap or overlap.

    Each cut lies in the middle of the longest pause (the quieter one of two equally long) that keeps both sides
    within the limits; where nobody pauses, at the quietest point.

    Args:
        waveform: float [samples], full scale 1.0.
        sampling_rate: in Hz.
        max_duration_s: no segment is longer.
        min_duration_s: no segment is shorter, unless the recording is; at most half of `max_duration_s`, which is the
            default.

    Returns:
        The segments in order; an empty waveform gives an empty list.

    Raises:
        ValueError: a waveform that is not one-dimensional, or limits that cannot be met.
    """
    pieces = split_blocks([waveform], sampling_rate, max_duration_s, min_duration_s)
    return [segment for segment, _ in pieces]


def split_blocks(
    blocks: Iterable[np.ndarray],
    sampling_rate: int,
    max_duration_s: float = 30.0,
    min_duration_s: float | None = None,
) -> Iterator[tuple[Segment, np.ndarray]]:
    """The segments of [`split_at_pauses`], for a recording that arrives block by block and need not fit into memory.

    A segment comes out as soon as nothing later can move its end; one and a half of the longest segments and a block
    are kept.

    Args:
        blocks: float [samples] of any lengths, which together are the recording.
        sampling_rate, max_duration_s, min_duration_s: as for [`split_at_pauses`].

    Returns:
        Each segment with its samples, in order.

    Raises:
        ValueError: a block that is not one-dimensional, or limits that cannot be met.
    """
    if min_duration_s is None:
        min_duration_s = max_duration_s / 2
    _check_limits(sampling_rate, max_duration_s, min_duration_s)
    hop = max(1, sampling_rate // _LEVELS_PER_SECOND)
    # Cuts fall on multiples of the hop: rounding down keeps the longest segment within max_duration_s.
    longest = int(max_duration_s * sampling_rate) // hop
    shortest = max(1, min(-int(-min_duration_s * sampling_rate // hop), longest // 2))  # a cut gets ahead
    # What follows this many samples has no say in the next cut: the last levels are for the segment after it and for
    # the smoothing.
    lookahead = (longest + shortest + 2) * hop
    arriving = iter(blocks)
    samples, start, before = np.zeros(0, np.float32), 0, np.zeros(0, np.float32)
    while True:
        while len(samples) < lookahead and (block := next(arriving, None)) is not None:
            _check_block(block)
            samples = np.concatenate((samples, block)) if len(samples) else block
        if len(samples) == 0:
            return
        raw = _levels_dbfs(samples[:lookahead], hop)
        levels = _smooth(np.concatenate((before, raw)), 3)[len(before) :]
        cut = remaining = -(-len(samples) // hop)
        if len(samples) > longest * hop:
            cut = _best_cut(levels, shortest, min(longest, remaining - shortest))
        end = min(cut * hop, len(samples))
        yield (
            Segment(start / sampling_rate, (start + end) / sampling_rate, bool(levels[:cut].max() < SILENCE_DBFS)),
            samples[:end],
        )
        samples, start, before = samples[end:], start + end, raw[cut - 1 : cut]


def _best_cut(levels: np.ndarray, earliest: int, latest: int) -> int:
    """Index of the best cut in [earliest, latest] for a segment that begins at 0, all counted in levels."""
    # The floor is the quietest stretch as long as a pause; like the loud level it comes from all that the segment may
    # hold, so both follow a changing background.
    reach = levels[: latest + 1]
    floor, loud = _smooth(reach, _MIN_PAUSE_LEVELS).min(), np.percentile(reach, 95)
    speech_begins = floor + max(6.0, 0.4 * (loud - floor))
    speech_ends = floor + max(3.0, 0.25 * (loud - floor))
    window = levels[earliest : latest + 1]
    is_speech = _hysteresis(window, speech_begins, speech_ends)
    edges = np.flatnonzero(np.diff(np.concatenate(([True], is_speech, [True]))))
    pauses = [
        (end - begin, -window[begin:end].mean(), (begin + end) // 2)
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
        if end - begin >= _MIN_PAUSE_LEVELS
    ]
    if pauses and loud - floor >= _MIN_RANGE_DB:
        return earliest + int(max(pauses)[2])
    return earliest + int(np.argmin(_smooth(window, _QUIET_POINT_LEVELS)))


def _hysteresis(levels: np.ndarray, begins: float, ends: float) -> np.ndarray:
    """Bool [levels]: switches to True above `begins`, back to False below `ends`, otherwise keeps its state."""
    decided = (levels > begins) | (levels < ends)
    # Position of the last decided level at or before each level; before the first one the state is speech, which
    # can only hide a pause and never invents one.
    last = np.maximum.accumulate(np.where(decided, np.arange(len(levels)), -1))
    return np.where(last >= 0, levels[last] > begins, True)


def _levels_dbfs(waveform: np.ndarray, hop: int) -> np.ndarray:
    """Standard deviation of each `hop` samples in dB below full scale, float32 [ceil(samples / hop)]."""
    levels = np.empty(-(-len(waveform) // hop), dtype=np.float32)
    for first in range(0, len(levels), _BLOCK_LEVELS):
        block = waveform[first * hop : (first + _BLOCK_LEVELS) * hop].astype(np.float64)
        whole = len(block) // hop
        # The variance ignores a constant offset, which cheap sound cards add to silence and speech alike.
        variances = block[: whole * hop].reshape(whole, hop).var(axis=1)
        if len(block) > whole * hop:
            variances = np.append(variances, block[whole * hop :].var())
        floor = 10.0 ** (_LOWEST_DBFS / 10)
        levels[first : first + len(variances)] = 10.0 * np.log10(np.maximum(variances, floor))
    return levels


def _smooth(levels: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average over `width` (odd) levels; the ends are extended by their own value."""
    padded = np.pad(levels, width // 2, mode="edge")
    sums = np.cumsum(np.concatenate(([0.0], padded)), dtype=np.float64)
    return (sums[width:] - sums[:-width]) / width


def _check_block(block: np.ndarray) -> None:
    if block.ndim != 1:
        raise ValueError(f"waveform: expected one channel [samples], got shape {list(block.shape)}; mix to mono first")


def _check_limits(sampling_rate: int, max_duration_s: float, min_duration_s: float) -> None:
    if sampling_rate < 1:
        raise ValueError(f"sampling_rate: expected a positive number of Hz, got {sampling_rate}")
    if not max_duration_s >= 0.2:
        raise ValueError(f"max_duration_s: expected at least 0.2 seconds, got {max_duration_s}")
    if not 0 <= min_duration_s <= max_duration_s / 2:
        raise ValueError(
            f"min_duration_s: expected 0 to half of max_duration_s ({max_duration_s / 2:g} s), got {min_duration_s}"
        )
