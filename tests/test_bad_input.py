"""Bad recordings on every way in: one clear line each, the others are transcribed, and the exit status tells."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from tiny_models import noise
from transformers import pipeline

from hf_speechllm import cli
from hf_speechllm.audio import AudioError
from training import evaluate_asr, recognisers

RATE = 16_000


@dataclass(frozen=True)
class Case:
    """A recording under `name`; `message` is a pattern of what is wrong with it, None for one to be transcribed."""

    name: str
    message: str | None = None


CASES = [
    Case("corrupt.wav", "neither libsndfile nor ffmpeg can read it as audio|not readable as wav, flac, ogg or mp3"),
    Case("corrupt.flac", r"damaged FLAC file \("),
    Case("empty.wav", r"empty file \(0 bytes\)"),
    Case("no_samples.wav", "contains no audio samples"),
    Case("not_a_number.wav", "contains NaN or infinite samples"),
    Case("text.wav", "neither libsndfile nor ffmpeg can read it as audio|not readable as wav, flac, ogg or mp3"),
    Case("film.m4a", "not readable as wav, flac, ogg or mp3 .*; other formats need the ffmpeg executable on PATH"),
    Case("folder.wav", "is a directory, expected an audio file|no audio files in this folder"),
    Case("absent.wav", "no such (audio )?file"),
    Case("8_khz.wav"),
    Case("stereo.wav"),
    Case("96_khz_float.wav"),
    Case("short.wav"),
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """A folder with the recordings of CASES and a good one."""
    folder = tmp_path_factory.mktemp("recordings")
    (good,) = noise(0.5, seed=5)
    sf.write(folder / "good.wav", good, RATE)
    (folder / "corrupt.wav").write_bytes((folder / "good.wav").read_bytes()[:20] + b"\xff" * 2000)
    sf.write(folder / "corrupt.flac", good, RATE)
    (folder / "corrupt.flac").write_bytes((folder / "corrupt.flac").read_bytes()[:6000])
    (folder / "empty.wav").touch()
    sf.write(folder / "no_samples.wav", np.zeros(0), RATE)
    sf.write(folder / "not_a_number.wav", np.array([0.0, np.nan] * 4000), RATE, subtype="FLOAT")
    (folder / "text.wav").write_text("Dear diary, today nobody spoke.\n" * 20)
    (folder / "film.m4a").write_bytes(b"\x00\x00\x00\x20ftypM4A " + bytes(500))
    (folder / "folder.wav").mkdir()
    sf.write(folder / "8_khz.wav", good[::2], RATE // 2)
    sf.write(folder / "stereo.wav", np.stack([good, 0.5 * good], axis=1), RATE)
    sf.write(folder / "96_khz_float.wav", np.repeat(good, 6), 6 * RATE, subtype="FLOAT")
    sf.write(folder / "short.wav", good[: RATE // 20], RATE)
    return folder


@pytest.fixture(scope="module")
def transcriber(loud_model_folder):
    return pipeline("automatic-speech-recognition", model=str(loud_model_folder), device="cpu")


@pytest.fixture(autouse=True)
def models_are_loaded_once(transcriber, monkeypatch):
    monkeypatch.setattr(cli, "pipeline", lambda *arguments, **options: transcriber)
    monkeypatch.setattr(recognisers, "pipeline", lambda *arguments, **options: transcriber)


@pytest.fixture
def without_ffmpeg(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_in(case, recordings, loud_model_folder, transcriber, without_ffmpeg, tmp_path, capsys):
    path, good = recordings / case.name, recordings / "good.wav"
    expected = transcriber(str(good))["text"]

    # The pipeline: an error of one line that names the file, or a text.
    if case.message is None:
        assert isinstance(transcriber(str(path))["text"], str)
    else:
        with pytest.raises(
            AudioError, match=case.message.replace("no audio files in this folder", "nothing")
        ) as caught:
            transcriber(str(path))
        assert "\n" not in str(caught.value) and case.name in str(caught.value)

    # The command line: the good recordings before and after it are transcribed.
    status = cli.main(["transcribe", "--model", str(loud_model_folder), *map(str, (good, path, good))])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line for line in lines if line.startswith(str(good))] == [f"{good}\t{expected}"] * 2
    check_report(case, status, captured.err, "speechllm: error: ")
    assert len(lines) == (3 if case.message is None else 2)

    # The evaluation: likewise, and what was not read is not scored.
    for name, fields in (("told", {"duration": 0.5}), ("measured", {})):
        entries = [{"audio_filepath": str(each), "text": "the thing", **fields} for each in (good, path, good)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        command = [str(tmp_path / f"{name}.jsonl"), "--model", str(loud_model_folder), "--device", "cpu"]
        command += ["--output", str(tmp_path / "out" / name), "--report", str(tmp_path / "report.html")]
        for attempt in ("decoded", "found finished"):
            status = evaluate(command)
            captured = capsys.readouterr()
            errors = "".join(line for line in captured.err.splitlines(True) if "evaluate_asr: error" in line)
            check_report(case, status, errors, "evaluate_asr: error: ")
            rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.llm.jsonl").read_text().splitlines()]
            assert len(rows) == (3 if case.message is None else 2), attempt
            assert [row["pred_text"] for row in rows if row["audio_filepath"] == str(good)] == [expected] * 2
        assert (tmp_path / "report.html").read_text().count("<article>") == len(rows)


def evaluate(command: list[str]) -> int:
    """The exit status of the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate_asr", *command])
        try:
            evaluate_asr.main()
        except SystemExit as error:
            return error.code
    return 0


def check_report(case: Case, status: int, errors: str, prefix: str) -> None:
    """One line about a recording that cannot be used, none about others."""
    if case.message is None:
        assert (status, errors) == (0, "")
        return
    assert status == 1
    assert errors.startswith(prefix) and errors.count("\n") == 1
    assert case.name in errors and re.search(case.message, errors)


def test_nothing_but_bad_recordings(recordings, loud_model_folder, tmp_path, capsys, without_ffmpeg):
    for name, fields in (("told", {"duration": 0.5}), ("measured", {})):
        entries = [
            {"audio_filepath": str(recordings / each), "text": "", **fields} for each in ("text.wav", "empty.wav")
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        assert evaluate([str(tmp_path / f"{name}.jsonl"), "--model", str(loud_model_folder), "--device", "cpu"]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"error: .*: none of its recordings can be read; the last: .*empty.wav: .*empty file", message)


@pytest.mark.parametrize("name", ["text.wav", "corrupt.wav"])
def test_with_ffmpeg_the_line_has_its_reason(name, recordings, transcriber):
    try:
        subprocess.run(["ffmpeg", "-version"], capture_output=True, check=True)
    except OSError:
        pytest.skip("there is no ffmpeg")
    with pytest.raises(AudioError, match="neither libsndfile nor ffmpeg can read it as audio \\(ffmpeg: .+\\)"):
        transcriber(str(recordings / name))
