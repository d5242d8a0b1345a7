"""Texts for language models and vocabularies: transcripts of manifests, plain text, or a column of a data set."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hf_speechllm.audio import one_line
from hf_speechllm.transcription import parse_json_object
from training.row_reader import NORMALIZATIONS


@dataclass(frozen=True)
class TextDataset:
    """A column of texts of a data set of `datasets`, read as it is streamed.

    Attributes:
        path: Hub id or folder. name: Configuration. split: Split. revision: Branch or commit on the Hub.
        column: Of the texts.
        limit: Texts that are used, from the start; all by default.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"
    limit: int | None = None

    def __iter__(self) -> Iterator[str]:
        import datasets  # takes seconds

        rows = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
        if self.column not in columns:
            raise ValueError(f"{self.path}: column must be one of {sorted(columns)}, got {self.column!r}.")
        # Audio columns are not even decoded.
        yield from (row[self.column] for row in islice(rows.select_columns([self.column]), self.limit))


def read_texts(sources: list[str | dict[str, Any]], data_dir: str | Path, normalization: str = "none") -> list[str]:
    """All texts of `sources`, in order, without surrounding space; empty ones are left out.

    Args:
        sources: File names or patterns relative to `data_dir`: JSONL (`*.jsonl`, field `text`), else one text a line
            (gzipped if `*.gz`); or mappings, see [`TextDataset`].
        data_dir: Folder of the files.
        normalization: Key of `training.row_reader.NORMALIZATIONS`.

    Raises:
        ValueError: If a pattern matches no file, a file cannot be read, a line has no text, there is no text at all, or
            an option is unknown.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"text_normalization must be one of {list(NORMALIZATIONS)}, got {normalization!r}.")
    normalize = NORMALIZATIONS[normalization]
    texts = [normalize(text).strip() for source in sources for text in _open(source, Path(data_dir))]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"texts: there are none in {sources}.")
    return texts


def _open(source: str | dict[str, Any], data_dir: Path) -> Iterator[str]:
    if isinstance(source, dict):
        try:
            yield from TextDataset(**source)
        except TypeError as error:
            raise ValueError(f"texts, {source}: {error}") from error
        return
    paths = sorted(glob.glob(str(data_dir / source)))
    if not paths:
        raise ValueError(f"texts: {source!r} matches no file in {data_dir}.")
    for path in paths:
        yield from _read_file(Path(path))


def _read_file(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if ".jsonl" not in path.suffixes:
                    yield line
                elif line.strip():
                    yield _text_of(line, f"{path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"texts: {path} cannot be read as UTF-8 text ({one_line(error)}).") from error


def _text_of(line: str, where: str) -> str:
    try:
        text = parse_json_object(line).get("text")
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from None
    if not isinstance(text, str):
        raise ValueError(f"{where}: field 'text' must be a string, got {text!r}.")
    return text
