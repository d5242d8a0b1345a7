"""Where utterances come from: JSONL manifests, audio folders, and `datasets`: Hub, parquet, saved to disk, streamed.

A table knows its length and durations and gives any row; a stream gives rows in its own order, each to one process.
Audio stays a path or the bytes of a file here: it is decoded by the project's own reader, without torchcodec.
"""

from __future__ import annotations

import csv
import glob
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from hf_speechllm.transcription import parse_json_object
from training.data_report import DataError
from training.evaluation_data import TEXT_COLUMNS

AUDIO_COLUMNS = ("audio", "wav")
ID_COLUMNS = ("id", "ID")
DURATION_COLUMN = "duration"
AUDIO_FOLDER = "audiofolder"
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Row:
    """A transcribed recording.

    Attributes:
        source: What the user called its source.
        row: Its line or row there, from 1; of a stream its id, if it has one.
        audio: Path or bytes of a file; `None` if the row has none.
        text: Transcript, as the source has it.
        duration_s: As the source says, if it does. offset_s: Start in the file; `None`: the whole file is meant.
    """

    source: str
    row: int | str
    audio: Path | bytes | None
    text: Any
    duration_s: float | None = None
    offset_s: float | None = None


@dataclass(frozen=True)
class SourceOptions:
    """One entry of `data.train_sources`.

    Attributes:
        path: Hub id or folder of a data set, folder written by `save_to_disk`, `parquet`, `audiofolder`, a folder of
            recordings with `metadata.jsonl` or `metadata.csv`, or a pattern of manifests that ends in `.jsonl`. Paths
            are looked for in `--data-dir` first.
        name: Configuration of the data set. split: Its split. revision: Branch or commit on the Hub.
        data_files: Files of `parquet`. data_dir: Folder of `audiofolder`, with `metadata.jsonl` or `metadata.csv`.
        audio_column, text_column, duration_column: Columns; by default the usual names, durations in seconds.
        streaming: Read while training, without a local copy.
        weight: Share of the utterances that come from here; all sources have one, or none.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    data_dir: str | None = None
    audio_column: str | None = None
    text_column: str | None = None
    duration_column: str | None = None
    streaming: bool = False
    weight: float | None = None

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> SourceOptions:
        """From YAML.

        Raises:
            ValueError: For an unknown key, a missing path or a weight that is not positive.
        """
        known = [each.name for each in fields(cls)]
        if not isinstance(values, dict) or not isinstance(values.get("path"), str):
            raise ValueError(f"{where}: expected a mapping with 'path', got {values!r}; other keys are {known[1:]}.")
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {known}.")
        options = cls(**values)
        if options.weight is not None and not options.weight > 0:
            raise ValueError(f"{where}: weight must be positive, got {options.weight}.")
        return options

    def __str__(self) -> str:
        parts = (self.path, self.name, self.data_dir, self.split)
        return ":".join(part for part in parts if part is not None)


class Table:
    """Rows of manifests and folders, all in memory but for the audio."""

    def __init__(self, name: str, rows: list[Row], weight: float | None = None):
        self.name = name
        self.weight = weight
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def durations_s(self) -> np.ndarray:
        """`[rows]`, NaN where it is not known and cannot be read from the audio."""
        durations_s = [header_duration_s(row.audio) if row.duration_s is None else row.duration_s for row in self._rows]
        return np.array([each if is_duration(each) else math.nan for each in durations_s])


class ArrowTable:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, name: str, dataset: Any, columns: Columns, weight: float | None = None):
        self.name = name
        self.weight = weight
        self._dataset = dataset
        self._columns = columns

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        return self._columns.row(self.name, index + 1, self._dataset[int(index)])

    def durations_s(self) -> np.ndarray:
        """`[rows]`, from the column or else the header of the audio (`datasets` caches the result on disk)."""
        columns = self._columns
        if columns.duration is not None:
            return np.array(self._dataset.with_format("numpy")[columns.duration][:], float)
        durations = self._dataset.map(
            _header_duration_of, fn_kwargs={"column": columns.audio}, remove_columns=self._dataset.column_names
        )
        return np.array(durations.with_format("numpy")["header_duration_s"][:], float)


class Stream:
    """Rows of a `datasets.IterableDataset`, in an order of files that is drawn anew in every pass."""

    def __init__(self, name: str, dataset: Any, columns: Columns, weight: float | None = None):
        self.name = name
        self.weight = weight
        self._dataset = dataset
        self._columns = columns

    def rows(self, number: int, seed: int, process_index: int, num_processes: int) -> Iterator[Row]:
        """Pass `number` over the rows of one process; in a worker of a data loader, over those of the worker.

        Raises:
            DataError: If there are fewer files than workers.
        """
        from datasets.distributed import split_dataset_by_node
        from torch.utils.data import get_worker_info

        # With a buffer of one, only the files are shuffled: the rows are, later, in the buffer of the batches.
        dataset = self._dataset.shuffle(seed=seed, buffer_size=1)
        if num_processes > 1:
            dataset = split_dataset_by_node(dataset, rank=process_index, world_size=num_processes)
        workers = get_worker_info()
        if workers is not None and dataset.num_shards < workers.num_workers:
            raise DataError(
                f"training.dataloader_num_workers must be at most the number of files of {self.name} for each process, "
                f"{dataset.num_shards}, got {workers.num_workers}."
            )
        dataset.set_epoch(number)
        for position, example in enumerate(dataset, 1):
            yield self._columns.row(self.name, position, example)

    def first(self, count: int) -> list[Row]:
        """The first rows, in the order of the files."""
        return [
            self._columns.row(self.name, position, example)
            for position, example in enumerate(self._dataset.take(count), 1)
        ]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a data set."""

    audio: str
    text: str
    duration: str | None
    id: str | None

    @classmethod
    def find(cls, options: SourceOptions, names: list[str]) -> Columns:
        """Those of `options`, else the usual ones.

        Raises:
            ValueError: If there is no such column.
        """

        def choose(wanted: str | None, usual: tuple[str, ...], key: str) -> str:
            for name in (wanted,) if wanted is not None else usual:
                if name in names:
                    return name
            expected = repr(wanted) if wanted is not None else f"one of {usual}"
            raise ValueError(f"{options}: {key} must be a column ({expected} is expected); there are {sorted(names)}.")

        duration = options.duration_column or (DURATION_COLUMN if DURATION_COLUMN in names else None)
        if duration is not None:
            choose(duration, (), "duration_column")
        return cls(
            choose(options.audio_column, AUDIO_COLUMNS, "audio_column"),
            choose(options.text_column, TEXT_COLUMNS, "text_column"),
            duration,
            next((name for name in ID_COLUMNS if name in names), None),
        )

    def row(self, source: str, position: int, example: dict[str, Any]) -> Row:
        """The row of an example whose audio is not decoded."""
        audio = example[self.audio] or {}
        content = audio.get("bytes")
        if content is None and audio.get("path") is not None:
            content = Path(audio["path"])
        duration_s = None if self.duration is None else example[self.duration]
        row = position if self.id is None else f"{position} ({example[self.id]})"
        return Row(source, row, content, example[self.text], duration_s)


def open_source(options: SourceOptions, data_dir: Path) -> Table | ArrowTable | Stream:
    """The rows of one source.

    Args:
        options: What to open.
        data_dir: Folder that local paths are relative to.

    Raises:
        ValueError: If it cannot be opened or lacks a column.
    """
    if options.path.endswith(".jsonl"):
        return Table(str(options), read_manifests([options.path], data_dir), options.weight)
    folder = data_dir / (options.data_dir or "") if options.path == AUDIO_FOLDER else data_dir / options.path
    if options.path == AUDIO_FOLDER or _metadata_of(folder, options.split) is not None:
        return Table(str(options), _read_audio_folder(options, folder), options.weight)
    import datasets  # takes seconds

    dataset = _load_dataset(options, data_dir)
    columns = Columns.find(options, dataset.column_names or list(next(iter(dataset))))
    # Without decoding: `datasets` would want torchcodec.
    dataset = dataset.cast_column(columns.audio, datasets.Audio(decode=False))
    wanted = (columns.audio, columns.text, columns.duration, columns.id)
    dataset = dataset.select_columns([name for name in wanted if name is not None])
    kind = Stream if options.streaming else ArrowTable
    return kind(str(options), dataset, columns, options.weight)


def read_manifests(patterns: list[str], data_dir: str | Path) -> list[Row]:
    """Rows of all manifests that match; `audio_filepath` is relative to its manifest.

    Raises:
        ValueError: If a pattern matches no file, a file is no UTF-8, or a line is no JSON object or lacks a field.
    """
    rows = []
    for pattern in patterns:
        paths = sorted(glob.glob(str(Path(data_dir) / pattern)))
        if not paths:
            raise ValueError(
                f"manifest {pattern!r} matches no file in {data_dir}; a manifest has a JSON object in each line, with "
                "audio_filepath, text and duration."
            )
        for path in paths:
            try:
                lines = Path(path).read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: expected UTF-8 ({error}).") from None
            for number, line in enumerate(lines, 1):
                entry = _json_object(line, f"{path}:{number}")
                missing = {"audio_filepath", "text", "duration"} - set(entry)
                if missing:
                    raise ValueError(f"{path}:{number}: field {sorted(missing)[0]!r} is missing.")
                name = entry["audio_filepath"]
                audio = Path(path).parent / name if isinstance(name, str) else None
                rows.append(Row(path, number, audio, entry["text"], entry["duration"], entry.get("offset", 0.0)))
    return rows


def header_duration_s(audio: Path | bytes | None) -> float:
    """What the header of an audio file says, NaN if it cannot be read."""
    try:
        return sf.info(io.BytesIO(audio) if isinstance(audio, bytes) else audio).duration
    except (sf.LibsndfileError, TypeError):
        return math.nan


def is_duration(value: Any) -> bool:
    """Whether this is a positive, finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _header_duration_of(example: dict[str, Any], column: str) -> dict[str, float]:
    audio = example[column] or {}
    content = audio.get("bytes") or (None if audio.get("path") is None else Path(audio["path"]))
    return {"header_duration_s": header_duration_s(content)}


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        return parse_json_object(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None


def _metadata_of(folder: Path, split: str) -> Path | None:
    """The file of transcripts in the folder of recordings, or in its split's."""
    for place in (folder / split, folder):
        for name in METADATA_NAMES:
            if (place / name).is_file():
                return place / name
    return None


def _read_audio_folder(options: SourceOptions, folder: Path) -> list[Row]:
    """Rows of the metadata, with `file_name` and a transcript.

    `datasets` has a builder for this format, which needs torchcodec and copies the audio.
    """
    metadata = _metadata_of(folder, options.split)
    if metadata is None:
        raise ValueError(f"{options}: no {' or '.join(METADATA_NAMES)} in {folder}; data_dir names the folder.")
    if options.streaming:
        raise ValueError(f"{options}: a folder with {metadata.name} is not streamed; leave streaming out.")
    with metadata.open(encoding="utf-8", newline="") as file:
        if metadata.suffix == ".csv":
            entries = list(csv.DictReader(file))
        else:
            entries = [_json_object(line, f"{metadata}:{number}") for number, line in enumerate(file, 1)]
    names = list(entries[0]) if entries else []
    text = options.text_column or next((name for name in TEXT_COLUMNS if name in names), None)
    for number, entry in enumerate(entries, 1):
        if text not in entry or "file_name" not in entry:
            raise ValueError(
                f"{metadata}, row {number}: expected 'file_name' and {text or f'one of {TEXT_COLUMNS}'!s}, got the "
                f"columns {sorted(map(str, entry))}."
            )
    return [
        Row(str(options), number, metadata.parent / entry["file_name"], entry[text])
        for number, entry in enumerate(entries, 1)
    ]


def _load_dataset(options: SourceOptions, data_dir: Path) -> Any:
    """`datasets.Dataset` or, streamed, `datasets.IterableDataset`."""
    import datasets

    local = data_dir / options.path
    is_saved = (local / "state.json").is_file() or (local / "dataset_dict.json").is_file()
    try:
        if is_saved:
            saved = datasets.load_from_disk(str(local))
            dataset = saved[options.split] if isinstance(saved, datasets.DatasetDict) else saved
            return dataset.to_iterable_dataset(num_shards=min(64, len(dataset))) if options.streaming else dataset
        files = options.data_files
        if files is not None:
            files = [str(data_dir / name) for name in ([files] if isinstance(files, str) else files)]
        folder = options.data_dir
        return datasets.load_dataset(
            str(local) if local.is_dir() else options.path,
            options.name,
            split=options.split,
            revision=options.revision,
            data_files=files,
            data_dir=str(data_dir / folder) if folder is not None and (data_dir / folder).is_dir() else folder,
            streaming=options.streaming,
        )
    except Exception as error:  # whatever the builder, the network and the files may raise
        hint = ""
        if "torchcodec" in f"{error} {error.__cause__} {getattr(error.__cause__, '__cause__', None)}":
            hint = "; this format needs torchcodec: install it, or download the folder and use path: audiofolder"
        raise ValueError(f"data source {options}: cannot be opened ({type(error).__name__}: {error}){hint}.") from error
