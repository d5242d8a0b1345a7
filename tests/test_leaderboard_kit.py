"""Files for a checkout of the Open ASR Leaderboard: they run beside its package, and write what its scorer reads."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import parse_eval_result_entries
from tiny_models import noise
from transformers import pipeline

from training import leaderboard
from training.evaluation_data import UsageError
from training.leaderboard import DATASETS, eval_results, manifest_name, merge_pieces, score_manifest

KIT = Path(leaderboard.__file__).parent / "leaderboard_kit"
TEXTS = ["The thing.", "An ant!", "sing", "a tan"]
PIECED = "somebody/recordings-in-pieces"


def stand_in(calls: list) -> types.ModuleType:
    """The functions of the leaderboard's `normalizer.data_utils` that its scripts call, by their signatures."""
    module = types.ModuleType("normalizer.data_utils")
    module.CHUNK_METADATA_KEYS = ["parent_id", "chunk_index"]
    module.is_chunked_dataset = lambda dataset_path: dataset_path == PIECED

    def load_data(args) -> Dataset:
        calls.append((args.dataset_path, args.dataset, args.split, args.streaming))
        audio = [{"array": w.tolist(), "sampling_rate": 16000} for w in noise(0.4, 0.7, 0.3, 0.5, seed=4)]
        columns = {"audio": audio, "text": TEXTS, "id": [f"folder/{n}.wav" for n in range(4)]}
        pieces = {"parent_id": ["b", "b", "a", "b"], "chunk_index": [1, 0, 0, 2]}
        return Dataset.from_dict(columns | (pieces if args.dataset_path == PIECED else {}))

    def prepare_data(dataset: Dataset, sampling_rate: int = 16000) -> Dataset:
        assert sampling_rate == 16000
        return dataset.map(lambda row: {"original_text": row["text"], "norm_text": row["text"].lower()})

    def extract_audio_filepaths_from_batch(batch, batch_size=None):
        return [name.split("/")[-1] for name in batch["id"]]

    def write_manifest(
        references,
        transcriptions,
        model_id,
        dataset_path,
        dataset_name,
        split,
        audio_length=None,
        transcription_time=None,
        audio_filepaths=None,
        extra_fields=None,
    ):
        Path("results").mkdir(exist_ok=True)
        path = Path("results") / manifest_name(model_id, dataset_path, dataset_name, split)
        columns = [audio_filepaths, audio_length, transcription_time, references, transcriptions]
        names = ["audio_filepath", "duration", "time", "text", "pred_text", *(extra_fields or {})]
        values = zip(*columns, *(extra_fields or {}).values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in values))
        return str(path)

    for function in (load_data, prepare_data, extract_audio_filepaths_from_batch, write_manifest):
        setattr(module, function.__name__, function)
    return module


@pytest.fixture
def run_eval(tmp_path, monkeypatch):
    """The kit's script beside a stand-in for the leaderboard's package; the calls of `load_data`."""
    calls: list = []
    package = types.ModuleType("normalizer")
    package.data_utils = stand_in(calls)
    monkeypatch.setitem(sys.modules, "normalizer", package)
    monkeypatch.setitem(sys.modules, "normalizer.data_utils", package.data_utils)
    monkeypatch.syspath_prepend(str(KIT / "speechllm"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "run_eval", raising=False)
    module = importlib.import_module("run_eval")
    yield module, calls
    sys.modules.pop("run_eval")


def run(module, model: Path, *arguments: str) -> list[dict]:
    command = ["--model_id", str(model), "--batch_size", "2", "--warmup_steps", "1", *arguments]
    module.main(module.build_parser().parse_args(command))
    (path,) = Path("results").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_manifest_field_by_field(run_eval, loud_model_folder, capsys):
    module, calls = run_eval
    rows = run(module, loud_model_folder, "--dataset", "ami_cleaned")
    transcriber = pipeline("automatic-speech-recognition", model=str(loud_model_folder))
    for row, text, waveform, name in zip(rows, TEXTS, noise(0.4, 0.7, 0.3, 0.5, seed=4), "0123", strict=True):
        assert list(row) == ["audio_filepath", "duration", "time", "text", "pred_text"]
        assert row["audio_filepath"] == f"{name}.wav"
        assert row["duration"] == pytest.approx(len(waveform) / 16000)
        assert row["time"] > 0
        assert row["text"] == text, "references are written as they are"
        assert row["pred_text"] == transcriber({"raw": waveform, "sampling_rate": 16000})["text"]
    assert len({row["pred_text"] for row in rows}) > 1
    assert calls == [("hf-audio/open-asr-leaderboard", "ami_cleaned", "test", False)] * 2
    (path,) = Path("results").glob("*.jsonl")
    tail = "DATASET_hf-audio-open-asr-leaderboard_ami_cleaned_test.jsonl"
    assert path.name == f"MODEL_{str(loud_model_folder).replace('/', '-')}_{tail}"
    output = capsys.readouterr().out
    assert "Model size: 0.00B parameters" in output and "RTFx: " in output


def test_pieces_keep_what_puts_them_together(run_eval, loud_model_folder):
    rows = run(run_eval[0], loud_model_folder, "--dataset_path", PIECED, "--dataset", "")
    assert [(row["parent_id"], row["chunk_index"]) for row in rows] == [("b", 1), ("b", 0), ("a", 0), ("b", 2)]
    (path,) = Path("results").glob("*.jsonl")
    assert path.name.endswith("_DATASET_somebody-recordings-in-pieces__test.jsonl")
    merged = {row["text"]: row for row in merge_pieces(rows)}
    assert merged.keys() == {TEXTS[1], TEXTS[2]}
    pieces = (rows[1], rows[0], rows[3])
    assert merged[TEXTS[1]]["pred_text"] == " ".join(row["pred_text"] for row in pieces)
    assert merged[TEXTS[1]]["duration"] == pytest.approx(sum(row["duration"] for row in pieces))


def test_a_trial_takes_the_first_samples(run_eval, loud_model_folder):
    assert len(run(run_eval[0], loud_model_folder, "--dataset", "ami_cleaned", "--max_eval_samples", "3")) == 3


def test_shell_scripts_know_the_data_sets_and_refuse_to_guess(tmp_path):
    listed = (KIT / "speechllm" / "datasets.sh").read_text()
    for path, configuration, split in DATASETS.values():
        assert f'"{path} {configuration or "-"} {split} ' in listed
    assert listed.count('    "') == len(DATASETS)
    for script, missing in (("run_speechllm.sh", "MODEL_ID"), ("submit_jobs_speechllm.sh", "HF_TOKEN")):
        command = ["bash", str(KIT / "speechllm" / script)]
        result = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False)
        assert result.returncode != 0 and f"{missing}: set {missing} to " in result.stderr


def test_the_local_script_runs_every_set(tmp_path):
    """With a `python` that writes down how it is called."""
    checkout = tmp_path / "checkout" / "speechllm"
    checkout.mkdir(parents=True)
    for name in ("run_speechllm.sh", "datasets.sh"):
        (checkout / name).write_text((KIT / "speechllm" / name).read_text())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(
        f'#!/bin/sh\nprintf "%s|" "$@" >> {tmp_path}/calls\necho >> {tmp_path}/calls\n'
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "MODEL_ID": "org/tiny",
        "REVISION": "abc",
        "BATCH_SIZE": "4",
    }
    subprocess.run(["bash", str(checkout / "run_speechllm.sh")], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(DATASETS) + 1
    assert calls[1] == (
        "run_eval.py|--model_id|org/tiny|--revision|abc|--dataset_path|ArtificialAnalysis/Earnings22-Cleaned-AA-chunked|"
        "--dataset||--split|test|--batch_size|4|--device|0|--max_eval_samples|-1|"
    )
    assert "score_results('results', 'org/tiny', families=['public'])" in calls[-1]


def write_manifest(folder: Path, name: str, rows: list[dict], system: str = "org/tiny") -> Path:
    path = folder / manifest_name(system, *DATASETS[name])
    path.write_text("".join(json.dumps({"duration": 4.0, "time": 0.5, **row}) + "\n" for row in rows))
    return path


def test_pieces_are_scored_as_one_recording(tmp_path):
    pieces = [
        {"text": "one two three", "pred_text": text, "parent_id": "r", "chunk_index": index}
        for index, text in ((1, " three"), (0, "one too"), (2, " "))
    ]
    score = score_manifest(write_manifest(tmp_path, "earnings22", pieces), str.lower)
    assert score["wer"] == pytest.approx(100 / 3)
    assert (score["duration_s"], score["time_s"]) == (12.0, 1.5)


def clone(tmp_path: Path) -> Path:
    (tmp_path / "clone" / "normalizer").mkdir(parents=True)
    source = "class EnglishTextNormalizer:\n    def __call__(self, text):\n        return text.lower()\n"
    (tmp_path / "clone" / "normalizer" / "__init__.py").write_text(source)
    return tmp_path / "clone"


def test_figures_for_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "normalizer", raising=False)
    rows = [{"text": "One two three", "pred_text": "one two"}]
    paths = [write_manifest(tmp_path, name, rows) for name in DATASETS]
    arguments = ["--repository", clone(tmp_path), "--eval-results", tmp_path / "out.yaml", "--source", "https://a.b"]
    monkeypatch.setattr(sys, "argv", ["leaderboard", *map(str, [*paths, *arguments])])
    leaderboard.main()
    sys.modules.pop("normalizer")
    entries = parse_eval_result_entries(yaml.safe_load((tmp_path / "out.yaml").read_text()))
    values = {entry.task_id: entry.value for entry in entries}
    rates = dict.fromkeys(("ami", "earnings22", "gigaspeech", "spgispeech", "voxpopuli"), 33.33)
    rates |= {"librispeech_clean": 33.33, "librispeech_other": 33.33, "mean": 33.33}
    assert values == {**{f"{name}_wer": value for name, value in rates.items()}, "rtfx": 8.0}
    assert {entry.dataset_id for entry in entries} == {"hf-audio/open-asr-leaderboard"}
    assert entries[0].source_url == "https://a.b" and len(entries[0].date) == 10
    assert '"mean_wer": "33.33"' in capsys.readouterr().out


def test_no_mean_over_some_of_the_sets_and_no_figures_of_several_systems(tmp_path):
    rows = [{"text": "one two", "pred_text": "one"}]
    some = [score_manifest(write_manifest(tmp_path, name, rows), str.lower) for name in ("ami", "monsoon-en-in")]
    assert {entry.task_id for entry in eval_results(some)} == {"ami_wer", "rtfx"}
    other = score_manifest(write_manifest(tmp_path, "voxpopuli", rows, "org/other"), str.lower)
    with pytest.raises(UsageError, match="expected manifests of one system, got org-other, org-tiny"):
        eval_results([*some, other])
    with pytest.raises(UsageError, match="expected manifests of the leaderboard's data sets, got none"):
        eval_results([{**some[0], "dataset": "other"}])


def test_figures_for_the_hub_need_the_leaderboards_own_normaliser(tmp_path, monkeypatch, capsys):
    path = write_manifest(tmp_path, "ami", [{"text": "one", "pred_text": "one"}])
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(path), "--eval-results", str(tmp_path / "out.yaml")])
    with pytest.raises(SystemExit):
        leaderboard.main()
    assert "--eval-results: needs --repository" in capsys.readouterr().err
    assert not (tmp_path / "out.yaml").exists()
