"""What became of the data: bad rows by source and row, rows outside the duration limits, conversions, hours used.

Nothing is dropped without a line here. The report is printed at the end of a run and saved beside its checkpoints.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

REPORT_NAME = "data_report.json"
# Why a row cannot be learnt from.
BAD_KINDS = {
    "missing_file": "the audio file does not exist",
    "unreadable": "the audio cannot be decoded",
    "empty_audio": "the audio has no samples",
    "not_finite": "the audio has NaN or infinite samples",
    "truncated": "the audio ends before its duration says",
    "duration": "the duration is no positive number",
    "sampling_rate": "the audio has another sampling rate",
    "channels": "the audio has several channels",
    "no_text": "the transcript is no string",
    "empty_text": "the transcript is empty",
    "unspellable": "the CTC labels cannot spell the transcript",
    "too_many_labels": "CTC needs more frames for the transcript than the audio has",
}
# Why a row is left out by the configuration, and what was done to rows that are used.
LIMIT_KINDS = ("too_short", "too_long")
CONVERSION_KINDS = ("resampled", "channels_averaged", "undistorted")

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be learnt from: a bad row while these are refused, or nothing that is left."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be learnt from: `kind` is a key of BAD_KINDS, `detail` says what was found."""

    source: str
    row: int | str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}: {self.kind} ({BAD_KINDS[self.kind]}): {self.detail}"


@dataclass
class DataReport:
    """Counts of one process, or of all when merged.

    Attributes:
        refuse: Whether a bad row is an error instead of a warning.
        bad: Bad rows by source and row, with how often each was met (once an epoch).
        outside_limits: Rows left out by the duration limits, by source and kind.
        conversions: Utterances that were converted, by source and kind.
        utterances: Utterances that were learnt from, counted again in every epoch. audio_s: Their seconds.
    """

    refuse: bool = False
    bad: dict[tuple[str, int | str], tuple[BadRow, int]] = field(default_factory=dict)
    outside_limits: Counter[tuple[str, str]] = field(default_factory=Counter)
    conversions: Counter[tuple[str, str]] = field(default_factory=Counter)
    utterances: int = 0
    audio_s: float = 0.0

    def add_bad(self, row: BadRow) -> None:
        """Count a bad row, with a warning when it is new.

        Raises:
            DataError: If bad data is refused.
        """
        if self.refuse:
            raise DataError(f"{row}; correct it, or leave such rows out with data.bad_data=skip.")
        key = (row.source, row.row)
        times = self.bad[key][1] if key in self.bad else 0
        if not times:
            logger.warning("skipped: %s", row)
        self.bad[key] = (row, times + 1)

    def add_conversion(self, source: str, row: int | str, kind: str) -> None:
        """Count an utterance that was converted, with a message for the first of its source."""
        if not self.conversions[source, kind]:
            logger.warning("%s, row %s: %s; so will be others like it, only counted from here on", source, row, kind)
        self.conversions[source, kind] += 1

    def update(self, other: DataReport) -> None:
        """Add the counts of another process, or of the part of the run before a restart."""
        for key, (row, times) in other.bad.items():
            self.bad[key] = (row, times + (self.bad[key][1] if key in self.bad else 0))
        self.outside_limits.update(other.outside_limits)
        self.conversions.update(other.conversions)
        self.utterances += other.utterances
        self.audio_s += other.audio_s

    def bad_counts(self) -> dict[str, int]:
        """Number of different bad rows by kind, in the order of BAD_KINDS."""
        counts = Counter(row.kind for row, _ in self.bad.values())
        return {kind: counts[kind] for kind in BAD_KINDS if counts[kind]}

    def summary(self) -> str:
        """A line for what was used and one for each kind of what was not, or was converted."""
        lines = [f"{self.utterances} utterances, {self.audio_s / 3600:.2f} h of audio were learnt from"]
        lines += [f"{count} bad rows: {kind} ({BAD_KINDS[kind]})" for kind, count in self.bad_counts().items()]
        if not self.bad:
            lines.append("no bad rows")
        for verb, counter in (("left out", self.outside_limits), ("converted", self.conversions)):
            lines += [f"{count} {verb}: {kind}, {source}" for (source, kind), count in sorted(counter.items())]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write the report into `folder`, with every bad row."""
        content = {
            "utterances": self.utterances,
            "audio_hours": self.audio_s / 3600,
            "bad_counts": self.bad_counts(),
            "bad_rows": [{**vars(row), "times": times} for row, times in self.bad.values()],
            "outside_limits": _to_lists(self.outside_limits),
            "conversions": _to_lists(self.conversions),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT_NAME).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, refuse: bool = False) -> DataReport:
        """Read what [`save`] wrote."""
        content = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        report = cls(
            refuse,
            outside_limits=_from_lists(content["outside_limits"]),
            conversions=_from_lists(content["conversions"]),
            utterances=content["utterances"],
            audio_s=3600 * content["audio_hours"],
        )
        for entry in content["bad_rows"]:
            times = entry.pop("times")
            row = BadRow(**entry)
            report.bad[row.source, row.row] = (row, times)
        return report


def merge(reports: Iterable[DataReport]) -> DataReport:
    """The counts of several processes in one report."""
    merged = DataReport()
    for report in reports:
        merged.update(report)
    return merged


def _to_lists(counter: Counter[tuple[str, str]]) -> list[list[str | int]]:
    return [[source, kind, count] for (source, kind), count in sorted(counter.items())]


def _from_lists(lists: list[list[str | int]]) -> Counter[tuple[str, str]]:
    return Counter({(source, kind): count for source, kind, count in lists})
