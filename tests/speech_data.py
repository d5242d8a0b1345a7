"""Small data sets of synthetic speech in the formats of the real ones."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

RATE = 16_000


def sweep(duration_s: float, frequency_hz: float) -> np.ndarray:
    """float32 [samples], a rising tone."""
    time_s = np.arange(round(duration_s * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * frequency_hz * time_s * (1 + time_s))).astype(np.float32)


def encoded(waveform: np.ndarray, rate: int = RATE, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    """The bytes of an audio file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def write_parquet(path: Path, columns: dict[str, list], audio_column: str) -> None:
    """A parquet file as the Hub has them: audio as {bytes, path}, and the features of `datasets` in the metadata."""
    kinds = {"str": "string", "float": "float32", "int": "int64"}
    features = {
        name: {"_type": "Audio"}
        if name == audio_column
        else {"dtype": kinds[type(values[0]).__name__], "_type": "Value"}
        for name, values in columns.items()
    }
    audio = [{"bytes": content, "path": f"{index}.flac"} for index, content in enumerate(columns[audio_column])]
    table = pa.table({name: audio if name == audio_column else values for name, values in columns.items()})
    if "duration" in columns:
        place = table.column_names.index("duration")
        table = table.set_column(place, "duration", table["duration"].cast(pa.float32()))
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)


def write_hub_folder(folder: Path, splits: dict[tuple[str, str], list[dict[str, list]]], audio_column: str) -> Path:
    """A data set repository: (configuration, split) -> columns of each of its files."""
    configurations: dict[str, list[str]] = {}
    for (name, split), files in splits.items():
        for number, columns in enumerate(files):
            write_parquet(folder / name / split / f"{number:04d}.parquet", columns, audio_column)
        entry = f"  - split: {split}\n    path: {name}/{split}/*.parquet\n"
        configurations.setdefault(name, []).append(entry)
    lines = [f"- config_name: {name}\n  data_files:\n{''.join(entries)}" for name, entries in configurations.items()]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    return folder


def loquacious_columns(texts: list[str], durations_s: list[float], start: int = 0) -> dict[str, list]:
    """Columns of speechbrain/LoquaciousSet."""
    return {
        "ID": [f"utterance-{start + index}" for index in range(len(texts))],
        "duration": list(durations_s),
        "wav": [encoded(sweep(each, 150 * (index + 1))) for index, each in enumerate(durations_s)],
        "spk_id": ["speaker"] * len(texts),
        "sex": ["female"] * len(texts),
        "text": list(texts),
    }


def librispeech_columns(texts: list[str], durations_s: list[float], start: int = 0) -> dict[str, list]:
    """Columns of openslr/librispeech_asr."""
    return {
        "file": [f"{start + index}.flac" for index in range(len(texts))],
        "audio": [encoded(sweep(each, 150 * (index + 1))) for index, each in enumerate(durations_s)],
        "text": [text.upper() for text in texts],
        "speaker_id": [19] * len(texts),
        "chapter_id": [198] * len(texts),
        "id": [f"19-198-{start + index:04d}" for index in range(len(texts))],
    }
