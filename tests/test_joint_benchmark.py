"""The table of joint decoding, with tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from test_fusion_pipeline import lm_folder, seq2seq_parts  # noqa: F401  (a fixture)
from test_pipeline import RATE, tone
from tiny_models import loud_model, tiny_processor

from benchmarks import whisper_joint
from hf_speechllm.fusion_pipeline import Seq2SeqRescoringPipeline
from hf_speechllm.hypothesis import Hypothesis

TEXTS = ("the thing", "an ant", "sing in tin", "a gin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models in `whisper` and `ctc`, manifests `test.jsonl` and `dev.jsonl`."""
    folder = tmp_path_factory.mktemp("joint")
    for part in seq2seq_parts("whisper").values():
        part.save_pretrained(folder / "whisper")
    for part in (loud_model(), tiny_processor()):
        part.save_pretrained(folder / "ctc")
    for name, pitches_hz in (("test", (200, 900, 3000, 440)), ("dev", (300, 700, 2000, 500))):
        lines = []
        for pitch_hz, text, duration_s in zip(pitches_hz, TEXTS, (1.0, 0.7, 1.2, 3.5), strict=True):
            soundfile.write(folder / f"{name}{pitch_hz}.wav", tone(duration_s, pitch_hz), RATE)
            lines.append(json.dumps({"audio_filepath": f"{name}{pitch_hz}.wav", "text": text, "duration": duration_s}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, lm: str, *options: str) -> None:
    models = {"--model": folder / "whisper", "--ctc-model": folder / "ctc", "--lm": lm, "--output": folder / "lists"}
    given = [str(part) for option in models.items() for part in option]
    whisper_joint.main(
        [
            str(folder / "test.jsonl"),
            "--dev",
            str(folder / "dev.jsonl"),
            *given,
            *("--max-new-tokens", "5", "--num-beams", "3", "--dev-seconds", "0.5", "3", "--ctc-weight", "0.3,0.6"),
            *options,
        ]
    )


def test_the_table_is_made_once_and_goes_on_where_it_stopped(folder, lm_folder, capsys, monkeypatch):  # noqa: F811
    searches, nbests = [], Seq2SeqRescoringPipeline.nbests
    monkeypatch.setattr(
        Seq2SeqRescoringPipeline,
        "nbests",
        lambda self, waveforms, size, **weight: (
            searches.append((len(waveforms), size, weight["ctc_weight"])) or nbests(self, waveforms, size, **weight)
        ),
    )
    run(folder, lm_folder)
    table = capsys.readouterr().out
    assert searches[:3] == [(3, 3, 0.0), (3, 3, 0.3), (3, 3, 0.6)]  # one of the development data is too long
    assert searches[3] == (4, 3, 0.0) and searches[4] in ((4, 3, 0.3), (4, 3, 0.6)) and len(searches) == 5
    assert "test: 4 utterances, 0.1 min, 3 beams" in table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    best = searches[4][2]
    assert [row.split("|")[1].split(" (")[0].strip() for row in rows[1:]] == [
        "alone",
        "alone, rescored by the language model",
        "jointly with CTC",
        "jointly with CTC",
    ]
    assert f"jointly with CTC ({best:g}), rescored" in rows[4]
    (path,) = (folder / "lists").glob(f"test-ctc{best:g}-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    run(folder, lm_folder)
    assert searches[5:] == [(1, 3, best)]
    assert capsys.readouterr().out.splitlines()[:-6] == table.splitlines()[:-6]
    assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == [0, 1, 2, 3]


def test_scales_are_those_of_the_fewest_errors() -> None:
    def lists(*rows: tuple[str, float]) -> whisper_joint.Lists:
        return whisper_joint.Lists(["a cat sat"], [[Hypothesis((), text, score) for text, score in rows]], 1.0)

    by_weight = {0.0: lists(("a cat sat", 0.0)), 0.1: lists(("a hat sat", 0.0)), 0.2: lists(("a cat sat", 0.0))}
    assert whisper_joint.best_ctc_weight(by_weight) == 0.2
    scored = whisper_joint.Lists(
        ["a cat sat"], [[Hypothesis((), "a hat sat", -1.0, -9.0), Hypothesis((), "a cat sat", -2.0, -1.0)]], 1.0
    )
    assert scored.best(0.0) == ["a hat sat"]
    assert scored.best(whisper_joint.best_lm_weight(scored, [0.0, 0.5])) == ["a cat sat"]


def test_the_table_compares_with_the_first_system() -> None:
    systems = [("one", ["a cat sat", "it"], 1.0), ("two", ["a hat sat", "it is"], 2.5)]
    lines = whisper_joint.table(systems, ["a cat sat", "it is"]).splitlines()
    assert lines[2].startswith("| one | 20.00 (") and "| 0.00 | 20.00 | 0.00 |  | 1.00 |" in lines[2]
    assert "| two | 20.00 (" in lines[3] and "| 20.00 | 0.00 | 0.00 | +0.00 (" in lines[3] and "2.50 |" in lines[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ctc-weight", "0,0.5"), "--ctc-weight: expected shares above 0 and up to 1, got [0.0, 0.5]"),
        (("--dev-seconds", "7", "9"), "--dev: expected utterances of 7 to 9 s, got none"),
        (("--dev", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ],
)
def test_wrong_usage(folder, options, message, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(folder, "lm", *options)
    assert message in capsys.readouterr().err
