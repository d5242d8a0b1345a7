"""Speech data for training: rows of all sources in batches of bounded duration, augmented on the fly.

Tables (manifests, folders, data sets on disk) are shuffled as a whole in every epoch. As soon as one source is
streamed, all are: each process and worker reads its own share, shuffles and batches it within a buffer, pass after
pass. Everything depends on the seed alone, and a resumed run goes on with the batch behind the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_speechllm.data_collator import SpeechLLMDataCollator
from hf_speechllm.processing_speechllm import IGNORE_INDEX
from training.arguments import DataArguments
from training.augment import AugmentOptions, augment
from training.batching import DurationBatchSampler, duration_classes, plan_batches
from training.data_report import BadRow, DataError, DataReport
from training.data_sources import (
    ArrowTable,
    Row,
    SourceOptions,
    Stream,
    Table,
    header_duration_s,
    is_duration,
    open_source,
    read_manifests,
)
from training.row_reader import RowReader

_PLACEHOLDER_S = 0.1


@dataclass(frozen=True)
class LeftOut:
    """A row outside the duration limits; `kind` is one of LIMIT_KINDS."""

    source: str
    kind: str


class Example(TypedDict):
    """An utterance to learn from: float32 `waveform` `[samples]`, transcript, origin and what was done to it."""

    waveform: np.ndarray
    text: str
    source: str
    row: int | str
    conversions: tuple[str, ...]


@dataclass(frozen=True)
class RowLoader:
    """Reads a row and distorts it; a distortion so fast that CTC could not align it is not used.

    Attributes:
        reader: Reads it.
        augmentation: Distortions; `None` for none.
    """

    reader: RowReader
    augmentation: AugmentOptions | None = None

    def load(self, row: Row, seeds: list[int]) -> Example | BadRow:
        """The utterance; `seeds` are those of the distortion."""
        recording = self.reader.read(row)
        if isinstance(recording, BadRow):
            return recording
        waveform, conversions = recording.waveform, recording.conversions
        if self.augmentation is not None:
            waveform = augment(waveform, np.random.default_rng(seeds), self.augmentation)
            if self.reader.misfit(row, recording.text, len(waveform) / self.reader.sampling_rate) is not None:
                waveform, conversions = recording.waveform, (*conversions, "undistorted")
        return Example(waveform=waveform, text=recording.text, source=row.source, row=row.row, conversions=conversions)


class SpeechDataset(Dataset):
    """Utterances of rows that can be looked up.

    Args:
        rows: The rows.
        loader: Reads them.
        seed: Of the distortions, which are drawn anew for every epoch.
        return_bad: Give a bad row as a [`BadRow`], not as an error.
    """

    def __init__(self, rows: Sequence[Row], loader: RowLoader, seed: int = 0, return_bad: bool = False):
        self.rows = rows
        self.loader = loader
        self.seed = seed
        self.return_bad = return_bad
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Draw other distortions."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Example | BadRow:
        example = self.loader.load(self.rows[index], [self.seed, self.epoch, index])
        if isinstance(example, BadRow) and not self.return_bad:
            raise DataError(str(example))
        return example


@dataclass(frozen=True)
class Selection:
    """Some rows of several tables: row `indices[i]` of table `tables[which[i]]`."""

    tables: list[Table | ArrowTable]
    which: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Row:
        return self.tables[self.which[position]][self.indices[position]]


class StreamingBatches(IterableDataset):
    """Endless batches of one process, as lists of utterances and of what was left out beside them.

    A pass takes each row once, source after source; with weights, sources are drawn and each starts again by itself.
    Rows are shuffled and batched within a buffer. To resume, the rows of the batches so far are read again, but not
    decoded.

    Args:
        sources: Tables and streams.
        loader: Reads their rows.
        options: Limits, duration of a batch, and size of the buffer.
        seed: Of everything.
        process_index, num_processes: Which share is meant.
    """

    def __init__(
        self,
        sources: list[Table | ArrowTable | Stream],
        loader: RowLoader,
        options: DataArguments,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if options.max_duration_s > options.batch_duration_s:
            raise ValueError(
                f"data.batch_duration_s must hold the longest utterance (max_duration_s = {options.max_duration_s}), "
                f"got {options.batch_duration_s}."
            )
        self.sources = sources
        self.loader = loader
        self.options = options
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.skip_batches = 0

    def __iter__(self) -> Iterator[list[Example | BadRow | LeftOut]]:
        workers = get_worker_info()
        num_workers = 1 if workers is None else workers.num_workers
        share = self.process_index * num_workers + (0 if workers is None else workers.id)
        plan = self._plan(share, self.num_processes * num_workers)
        # The data loader takes the batches of its workers in turn.
        for rows, others in islice(plan, self.skip_batches // num_workers, None):
            yield [self.loader.load(row, [self.seed, share, position]) for position, row in rows] + others

    def _plan(self, share: int, num_shares: int) -> Iterator[tuple[list[tuple[int, Row]], list[BadRow | LeftOut]]]:
        """Batches of numbered rows, not decoded, and what was found bad or outside the limits on the way."""
        options = self.options
        position = count()
        window_number = count()
        others: list[BadRow | LeftOut] = []
        for rows in self._passes(share, num_shares):
            is_empty = True
            while window := list(islice(rows, options.shuffle_buffer)):
                fitting, durations_s, outside = self._within_limits(window)
                others += outside
                numbered = list(zip(position, fitting, strict=False))
                rng = np.random.default_rng([self.seed, share, next(window_number)])
                classes = duration_classes(np.array(durations_s), options.batch_duration_s)
                for batch in plan_batches(classes, rng):
                    is_empty = False
                    yield [numbered[index] for index in batch], others
                    others = []
            if is_empty:
                raise DataError(
                    f"data: share {share + 1} of {num_shares} (one for each process and worker) has no utterance of "
                    f"{options.min_duration_s} to {options.max_duration_s} s; use fewer workers, or other limits."
                )

    def _within_limits(self, window: list[Row]) -> tuple[list[Row], list[float], list[BadRow | LeftOut]]:
        fitting, durations_s, others = [], [], []
        for row in window:
            duration_s = header_duration_s(row.audio) if row.duration_s is None else row.duration_s
            if not is_duration(duration_s):
                duration_s = self.loader.reader.duration_s(row)
            if isinstance(duration_s, BadRow):
                others.append(duration_s)
            elif duration_s < self.options.min_duration_s:
                others.append(LeftOut(row.source, "too_short"))
            elif duration_s > self.options.max_duration_s:
                others.append(LeftOut(row.source, "too_long"))
            else:
                fitting.append(row)
                durations_s.append(duration_s)
        return fitting, durations_s, others

    def _passes(self, share: int, num_shares: int) -> Iterator[Iterator[Row]]:
        if self.sources[0].weight is not None:
            endless = self._weighted_rows(share, num_shares)
            while True:
                yield islice(endless, self.options.shuffle_buffer)
        for number in count():
            yield chain.from_iterable(self._rows(source, number, share, num_shares) for source in self.sources)

    def _weighted_rows(self, share: int, num_shares: int) -> Iterator[Row]:
        weights = np.array([source.weight for source in self.sources])
        rng = np.random.default_rng([self.seed, share])
        iterators = [self._endless_rows(source, share, num_shares) for source in self.sources]
        while True:
            yield next(iterators[rng.choice(len(iterators), p=weights / weights.sum())])

    def _endless_rows(self, source: Table | ArrowTable | Stream, share: int, num_shares: int) -> Iterator[Row]:
        for number in count():
            row = None
            for row in self._rows(source, number, share, num_shares):
                yield row
            if row is None:
                raise DataError(f"data: {source.name} has no row for share {share + 1} of {num_shares}.")

    def _rows(self, source: Table | ArrowTable | Stream, number: int, share: int, num_shares: int) -> Iterator[Row]:
        if isinstance(source, Stream):
            return source.rows(number, self.seed, self.process_index, self.num_processes)
        order = np.random.default_rng([self.seed, number]).permutation(len(source))
        return (source[index] for index in order[share::num_shares])


@dataclass(frozen=True)
class BatchInfo:
    """What a batch is made of: number of utterances, their seconds, what was left out, what was converted."""

    utterances: int
    audio_s: float
    left_out: list[BadRow | LeftOut]
    conversions: list[tuple[str, int | str, str]]

    def add_to(self, report: DataReport) -> None:
        """Count it; ValueError for a bad row where these are refused."""
        for row in self.left_out:
            if isinstance(row, BadRow):
                report.add_bad(row)
            else:
                report.outside_limits[row.source, row.kind] += 1
        for conversion in self.conversions:
            report.add_conversion(*conversion)
        report.utterances += self.utterances
        report.audio_s += self.audio_s


@dataclass(frozen=True)
class TrainingCollator:
    """Pads the utterances of a batch; `data_info` tells what became of the others.

    A batch of which nothing is left becomes a moment of silence whose labels are all -100, for the Trainer to give it
    no weight: every process needs a batch at every step.
    """

    collator: SpeechLLMDataCollator

    def __call__(self, examples: list[Example | BadRow | LeftOut]) -> dict[str, Any]:
        """Model inputs, and `data_info`, a [`BatchInfo`]."""
        good = [example for example in examples if isinstance(example, dict)]
        rate = self.collator.processor.sampling_rate
        info = BatchInfo(
            utterances=len(good),
            audio_s=sum(len(example["waveform"]) for example in good) / rate,
            left_out=[example for example in examples if not isinstance(example, dict)],
            conversions=[(each["source"], each["row"], kind) for each in good for kind in each["conversions"]],
        )
        silence = {"waveform": np.zeros(round(_PLACEHOLDER_S * rate), np.float32), "text": ""}
        batch = self.collator(good or [silence])
        if not good:
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return {**batch, "data_info": info}


def load_training_data(
    options: DataArguments,
    loader: RowLoader,
    data_dir: Path,
    report: DataReport,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> tuple[SpeechDataset | StreamingBatches, DurationBatchSampler | None]:
    """The training data, with the batches of each epoch unless it is streamed.

    Args:
        options: Sources, limits, batches.
        loader: Reads rows.
        data_dir: Folder that local paths are relative to.
        report: Gets the rows that are bad or outside the limits.
        seed: Of the order and the distortions.
        process_index, num_processes: Of this process; tables are divided by accelerate, streams here.

    Raises:
        ValueError: If there is no utterance, or only some sources have a weight.
    """
    sources = open_sources(options, data_dir)
    if any(isinstance(source, Stream) for source in sources):
        return StreamingBatches(sources, loader, options, seed, process_index, num_processes), None
    which, indices, durations_s = [], [], []
    for number, table in enumerate(sources):
        kept = _select(table, options, loader.reader, report)
        which.append(np.full(len(kept[0]), number))
        indices.append(kept[0])
        durations_s.append(kept[1])
    rows = Selection(sources, np.concatenate(which), np.concatenate(indices))
    if len(rows) == 0:
        raise ValueError(
            f"data: no utterance of {', '.join(source.name for source in sources)} lasts {options.min_duration_s} to "
            f"{options.max_duration_s} s; change min_duration_s or max_duration_s."
        )
    repeats = None
    if sources[0].weight is not None:
        weights = np.array([source.weight for source in sources])
        sizes = np.bincount(rows.which, minlength=len(sources))
        repeats = (weights / weights.sum() * len(rows) / np.maximum(sizes, 1))[rows.which]
    dataset = SpeechDataset(rows, loader, seed, return_bad=True)
    durations_s = np.concatenate(durations_s)
    return dataset, DurationBatchSampler(durations_s, options.batch_duration_s, dataset, seed, repeats, num_processes)


def load_evaluation_data(
    options: DataArguments, reader: RowReader, data_dir: Path, report: DataReport
) -> dict[str, SpeechDataset]:
    """The first readable utterances of each evaluation source, by name."""
    sources = {name: SourceOptions(path) for name, path in options.eval_manifests.items()}
    for name, values in options.eval_sources.items():
        if name in sources:
            raise ValueError(f"data: {name!r} is in eval_manifests and in eval_sources; choose another name.")
        sources[name] = SourceOptions.parse(values, f"eval_sources, {name}")
    datasets = {}
    for name, source_options in sources.items():
        source = open_source(source_options, data_dir)
        if isinstance(source, Stream):
            rows = source.first(options.max_eval_examples)
        else:
            rows = [source[index] for index in range(min(len(source), options.max_eval_examples))]
        readable = []
        for row in rows:
            recording = reader.read(row)
            if isinstance(recording, BadRow):
                report.add_bad(recording)
            else:
                readable.append(row)
        datasets[name] = SpeechDataset(readable, RowLoader(reader))
    return datasets


def open_sources(options: DataArguments, data_dir: Path) -> list[Table | ArrowTable | Stream]:
    """All training sources: manifests first.

    Raises:
        ValueError: If there is none, or only some have a weight.
    """
    sources: list[Table | ArrowTable | Stream] = []
    if options.train_manifests:
        sources.append(Table(", ".join(options.train_manifests), read_manifests(options.train_manifests, data_dir)))
    for number, values in enumerate(options.train_sources, 1):
        sources.append(open_source(SourceOptions.parse(values, f"train_sources, entry {number}"), data_dir))
    if not sources:
        raise ValueError("data: train_manifests or train_sources must name something to learn from.")
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("data: all training sources must have a weight, or none; train_manifests have none.")
    return sources


def _select(
    table: Table | ArrowTable, options: DataArguments, reader: RowReader, report: DataReport
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and durations in seconds of the rows within the limits; the others are counted."""
    durations_s = table.durations_s()
    for index in np.flatnonzero(~(durations_s > 0) | ~np.isfinite(durations_s)):
        duration_s = reader.duration_s(table[index])
        if isinstance(duration_s, BadRow):
            report.add_bad(duration_s)
        durations_s[index] = math.nan if isinstance(duration_s, BadRow) else duration_s
    for kind, is_outside in (
        ("too_short", durations_s < options.min_duration_s),
        ("too_long", durations_s > options.max_duration_s),
    ):
        if is_outside.any():
            report.outside_limits[table.name, kind] = int(is_outside.sum())
    kept = np.flatnonzero((durations_s >= options.min_duration_s) & (durations_s <= options.max_duration_s))
    return kept, durations_s[kept]
