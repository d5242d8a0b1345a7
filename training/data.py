"""Speech data for training: JSONL manifests, batches of bounded duration, augmentation on the fly."""

import glob
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from torch.utils.data import Dataset, Sampler

from training.augment import AugmentOptions, augment


def read_manifests(patterns: list[str], data_dir: str | Path) -> list[dict[str, Any]]:
    """Entries of all manifests that match; `audio_filepath` becomes a full path (relative to its manifest).

    Raises:
        ValueError: If a pattern matches no file, or a line lacks a field.
    """
    entries = []
    for pattern in patterns:
        paths = sorted(glob.glob(str(Path(data_dir) / pattern)))
        if not paths:
            raise ValueError(f"manifest {pattern!r} matches no file in {data_dir}; training/synthesize.py writes them.")
        for path in paths:
            for number, line in enumerate(Path(path).read_text().splitlines(), 1):
                entry = json.loads(line)
                missing = {"audio_filepath", "text", "duration"} - set(entry)
                if missing:
                    raise ValueError(f"{path}:{number}: field {sorted(missing)[0]!r} is missing.")
                entry["audio_filepath"] = str(Path(path).parent / entry["audio_filepath"])
                entries.append(entry)
    return entries


class ManifestDataset(Dataset):
    """Examples `{"waveform": float32 [samples], "text": str}` of manifest entries.

    Args:
        entries: From [`read_manifests`].
        sampling_rate: In Hz; files of another rate are refused.
        augmentation: Distortions, drawn anew for every epoch; `None` for none.
        seed: Of the distortions.
    """

    def __init__(
        self,
        entries: list[dict[str, Any]],
        sampling_rate: int,
        augmentation: AugmentOptions | None = None,
        seed: int = 0,
    ):
        self.entries = entries
        self.sampling_rate = sampling_rate
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.entries)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        with sf.SoundFile(entry["audio_filepath"]) as file:
            if file.samplerate != self.sampling_rate:
                raise ValueError(
                    f"{entry['audio_filepath']}: {self.sampling_rate} Hz is expected, got {file.samplerate} Hz; "
                    "resample it."
                )
            file.seek(round(entry.get("offset", 0.0) * file.samplerate))
            waveform = file.read(round(entry["duration"] * file.samplerate), dtype="float32", always_2d=True).mean(1)
        if self.augmentation is not None:
            rng = np.random.default_rng([self.seed, self.epoch, index])
            waveform = augment(waveform, rng, self.augmentation)
        return {"waveform": waveform, "text": entry["text"]}


class DurationBatchSampler(Sampler[list[int]]):
    """Batches of utterances of similar duration, bounded in seconds after padding; shuffled anew every epoch.

    Args:
        durations_s: Of each utterance.
        batch_duration_s: Bound on (number of utterances) * (longest of them).
        dataset: Told the epoch too, for its augmentation.
        seed: Of the shuffling.
    """

    def __init__(self, durations_s: list[float], batch_duration_s: float, dataset: ManifestDataset, seed: int = 0):
        if max(durations_s) > batch_duration_s:
            raise ValueError(
                f"batch_duration_s must hold the longest utterance ({max(durations_s):.1f} s), got {batch_duration_s}."
            )
        self.batch_duration_s = batch_duration_s
        self.dataset = dataset
        self.seed = seed
        # Classes of durations that differ by a tenth at most, shortest first.
        classes: dict[int, list[int]] = {}
        for index, duration_s in enumerate(durations_s):
            classes.setdefault(math.floor(math.log(duration_s, 1.1)), []).append(index)
        self._classes = [
            (np.array(classes[key]), int(batch_duration_s // max(durations_s[index] for index in classes[key])))
            for key in sorted(classes)
        ]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle; the number of batches is that of any epoch, which the Trainer relies on to resume a run."""
        self.dataset.set_epoch(epoch)
        rng = np.random.default_rng([self.seed, epoch])
        batches: list[list[int]] = []
        rest: list[int] = []
        for members, size in self._classes:
            # What does not fill a batch joins the next longer class.
            rest += rng.permutation(members).tolist()
            while len(rest) >= size:
                batches.append(rest[:size])
                rest = rest[size:]
        if rest:
            batches.append(rest)
        self.batches = [batches[i] for i in rng.permutation(len(batches))]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
