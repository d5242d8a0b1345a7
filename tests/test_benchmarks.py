"""Benchmarks on real speech, with tiny random models: their tables say what was measured."""

import contextlib
import functools
import importlib
import io
import json
import time
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import loud_model, noise, tiny_model, tiny_processor

from benchmarks import joint_weights, long_audio, no_speech, systems
from hf_speechllm.ctc_alignment import AlignedWord
from hf_speechllm.metrics import PairedDifference, normalize_english
from hf_speechllm.segmentation import split_at_pauses
from training import evaluate_asr, recognisers
from training.evaluation_data import UsageError, Utterance, read_manifest
from training.html_report import SystemReport
from training.leaderboard import leaderboard_normalizer
from training.recognisers import Recogniser
from training.scoring import score_system

RATE = 16_000
DURATIONS_S = (0.9, 0.5, 0.7)
TEXTS = ("the thing in the tin", "an ant", "sing the thing in an inn at ten")

load_pipeline = functools.cache(recognisers.load_pipeline)
RUN_MODULE = systems.run_module


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Models are loaded once, and what would be a process of its own runs here."""

    def run_module(module, arguments):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if module == "training.evaluate_asr":
                evaluate_asr.evaluate(evaluate_asr.build_parser().parse_args(arguments))
            else:
                importlib.import_module(module).main(arguments)
        return output.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate_asr, long_audio, no_speech):
            patch.setattr(module, "load_pipeline", load_pipeline)
        for module in (systems, long_audio):
            patch.setattr(module, "run_module", run_module)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in `model`, and a manifest `data.jsonl`."""
    folder = tmp_path_factory.mktemp("benchmarks")
    model = loud_model()
    model.generation_config.ctc_weight = 0.3
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    lines = []
    for number, (waveform, text) in enumerate(zip(noise(*DURATIONS_S), TEXTS, strict=True)):
        sf.write(folder / f"{number}.wav", waveform, RATE)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": text, "duration": DURATIONS_S[number]}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def run(benchmark, folder: Path, output: Path, *arguments: str) -> None:
    common = [str(folder / "data.jsonl"), "--model", str(folder / "model"), "--output", str(output)]
    benchmark.main([*common, *arguments])


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# Systems


def test_the_table_of_systems_says_what_was_measured(folder, tmp_path, capsys, monkeypatch):
    arguments = ["--system", "joint", "--system", "ctc_greedy", "--batch-size", "2"]
    run(systems, folder, tmp_path, *arguments)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "data: 3 utterances, 0.0 min, 15 words; batches of 2, one CPU thread each"
    rates = []
    for line, prefix in zip(printed[-2:], ("joint.joint", "ctc_greedy.ctc_greedy"), strict=True):
        rows = read_rows(tmp_path / f"{prefix}.jsonl")
        run_file = json.loads((tmp_path / f"{prefix}.run.json").read_text())
        texts = [[normalize_english(row[name]) for row in rows] for name in ("text", "pred_text")]
        errors = jiwer.process_words(*texts)
        words = errors.hits + errors.substitutions + errors.deletions
        rates.append(100 * errors.wer)
        shown = cells(line)
        assert shown[1].startswith(f"{100 * errors.wer:.1f} (")
        parts = (errors.substitutions, errors.deletions, errors.insertions)
        total = sum(float(cell) for cell in shown[3:6])
        assert total == pytest.approx(100 * sum(parts) / words, abs=0.2)
        assert shown[8] == f"{sum(DURATIONS_S) / run_file['cpu_s']:.1f}"
        assert shown[9] == f"{run_file['peak_memory_mib']:.0f}"
    assert cells(printed[-2])[2] == "" and cells(printed[-1])[2].startswith(f"{rates[1] - rates[0]:+.1f} (")
    written = read_rows(tmp_path / "systems.jsonl")
    assert [row["system"] for row in written] == ["joint", "ctc_greedy"]
    assert [row["wer"] for row in written] == pytest.approx(rates)
    assert written[1]["wer_beyond_first"] == pytest.approx(rates[1] - rates[0]) and written[0]["p_value"] is None
    monkeypatch.delattr(Recogniser, "transcribe")  # nothing is decoded again
    run(systems, folder, tmp_path, *arguments)
    assert capsys.readouterr().out.splitlines()[-3:] == printed[-3:]


def test_the_table_of_weights_has_a_line_for_each_variant(folder, capsys, monkeypatch):
    monkeypatch.setattr(joint_weights, "SAMPLES", folder)
    sf.write(folder / "sample.flac", noise(0.5)[0], 16000)
    arguments = ["--model", str(folder / "model"), "--num-beams", "2", "--new-tokens", "3", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["joint_weights", *arguments])
    joint_weights.main()
    lines = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0].partition(",")[0] for line in lines[1:]] == ["float32", "float32", "bfloat16", "bfloat16"]
    assert all(float(line[1]) >= 0 and float(line[2]) > 0 for line in lines[1:]) and float(lines[1][2]) == 1.0


def test_a_line_of_the_table_of_systems():
    figures = {"wer": 25.84, "wer_low": 23.3, "wer_high": 28.06, "substitutions": 18.0, "deletions": 4.44}
    figures |= {"insertions": 3.4, "loops": 1, "hallucinations": 7, "rtfx": 9.0, "rtfx_cpu": 2.26}
    figures |= {"peak_memory_mib": 1234.5}
    report = SystemReport("joint", None, figures)
    result = systems.Result(systems.SYSTEMS["joint"], report, PairedDifference(-0.1234, -0.15, 0.001, 0.5))
    assert systems.row(result) == (
        "| speech LLM and CTC jointly | 25.8 (23.3 to 28.1) | -12.3 (-15.0 to +0.1) | 18.0 | 4.4 | 3.4 | 1 | 7 | 2.3 | "
        "1234 |"
    )
    assert cells(systems.row(replace(result, difference=None)))[2] == ""


def test_every_system_has_a_command_that_evaluate_asr_takes(tmp_path):
    asked = systems.Settings(tmp_path / "data.jsonl", tmp_path, "mine", limit=5, batch_size=3)
    for name, system in systems.SYSTEMS.items():
        parsed = evaluate_asr.build_parser().parse_args(systems.command(system, asked))
        assert (parsed.batch_size, parsed.limit, parsed.device) == (3, 5, "cpu")
        assert parsed.model == (f"base:{name}" if "-" in name else "mine")
        assert parsed.mode == [system.mode] and parsed.output == tmp_path / name
    assert json.loads(parsed.generate) == {}


def test_further_options_go_to_their_system():
    chosen = systems.choose(["llm", "joint"], ['llm={"num_beams": 2}', "llm={}"])
    assert [system.name for system in chosen] == ["llm", "joint"]
    assert chosen[0].options == {"num_beams": 2, "max_new_tokens": 80} and chosen[1].options == {}


@pytest.mark.parametrize("text", ["joint={}", "llm", "llm=3", "llm={"])
def test_options_of_another_form_are_refused(text):
    with pytest.raises(UsageError, match="--generate: expected SYSTEM=JSON object, SYSTEM of llm, got"):
        systems.choose(["llm"], [text])


def test_what_cannot_be_meant_is_refused(folder, tmp_path, capsys):
    for benchmark, arguments, message in (
        (systems, ["--jobs", "0"], "systems: error: --jobs: expected at least 1, got 0"),
        (systems, ["--batch-size", "0"], "error: --batch-size: expected at least 1, got 0"),
        (long_audio, ["--minutes", "0"], "long_audio: error: --minutes: expected more than 0, got 0.0"),
        (long_audio, ["--pause-s", "nan"], "--pause-s: expected 0 or more, got nan"),
        (long_audio, ["--minutes", "0.001"], "--minutes: expected room for the first prompt, got 0.001"),
        (long_audio, ["--transcribe", "absent.flac"], "absent.flac: no such file"),
        (no_speech, ["--clips", "0"], "no_speech: error: --clips: expected at least 1, got 0"),
        (no_speech, ["--prompts", "0"], "--prompts: expected at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(benchmark, folder, tmp_path, *arguments)
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_after_a_failure_no_further_system_begins(tmp_path, monkeypatch):
    begun = []

    def run_module(module, arguments):
        begun.append(arguments)
        time.sleep(0.05)  # the failure is seen before the queue is empty
        raise UsageError("failed")

    monkeypatch.setattr(systems, "run_module", run_module)
    with pytest.raises(UsageError, match="failed"):
        systems.decode(list(systems.SYSTEMS.values()), systems.Settings(tmp_path / "data.jsonl", tmp_path))
    assert len(begun) < len(systems.SYSTEMS)


def test_processes_get_one_thread_and_their_failures_are_reported():
    statement = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert RUN_MODULE("timeit", ["-n", "1", "-r", "1", statement]).splitlines()[0] == "1"
    with pytest.raises(UsageError, match="python -m timeit --absent: failed with status 2"):
        RUN_MODULE("timeit", ["--absent"])


# Long recordings


@settings(deadline=None)
@given(
    durations_s=st.lists(st.floats(0.05, 3.0), min_size=1, max_size=5),
    minutes=st.floats(0.15, 1.0),
    pause_s=st.floats(0.0, 2.0),
)
def test_prompts_follow_each_other_as_long_as_they_fit(durations_s, minutes, pause_s):
    utterances = [Utterance(index, {"duration": duration_s}, b"") for index, duration_s in enumerate(durations_s)]
    plan = long_audio.place(utterances, minutes, pause_s)
    assert [placed.index for placed in plan] == [number % len(durations_s) for number in range(len(plan))]
    ends = [0, *(placed.end for placed in plan)]
    assert [placed.start - end for placed, end in zip(plan, ends, strict=False)] == [round(pause_s * RATE)] * len(plan)
    assert all(placed.end - placed.start == round(durations_s[placed.index] * RATE) for placed in plan)
    room_s = 60 * minutes - plan[-1].end / RATE
    following_s = durations_s[len(plan) % len(durations_s)]
    assert pause_s - 1e-3 <= room_s < following_s + 2 * pause_s + 1e-3


def test_the_file_is_as_long_as_asked_with_silence_between_the_prompts(folder, tmp_path):
    utterances = read_manifest(folder / "data.jsonl")
    plan = long_audio.place(utterances, 0.1, 0.25)
    assert [placed.index for placed in plan] == [0, 1, 2, 0, 1, 2]
    long_audio.write_flac(tmp_path / "long.flac", utterances, plan, 0.1)
    waveform, rate = sf.read(tmp_path / "long.flac", dtype="float32")
    assert rate == RATE and len(waveform) == 6 * RATE
    rest = np.ones(len(waveform), bool)
    for placed in plan:
        whole = utterances[placed.index].waveform(RATE)
        np.testing.assert_allclose(waveform[placed.start : placed.end], whole, atol=2**-15)
        rest[placed.start : placed.end] = False
    assert rest.sum() == round((6 - 2 * sum(DURATIONS_S)) * RATE) and not waveform[rest].any()


def test_figures_of_a_long_file():
    places_s = ((0, 0, 2), (1, 3, 5), (0, 6, 8))
    plan = [long_audio.Placed(index, start_s * RATE, end_s * RATE) for index, start_s, end_s in places_s]
    whole = long_audio.Transcribed((0.0, 2.5, 4.0, 6.0), ("the cat", "", "sat on the", "cat"), 2.0, 900.0)
    row = long_audio.score(0.25, plan, ["the cat", "sat on"], ["the dog", "sat"], whole)
    # the cat sat on the cat: the file has all of it; prompt by prompt "dog" is wrong twice, and "on" is missing
    assert row == long_audio.Row(0.25, 3, 4, 1, 0.0, 50.0, 900.0, 7.5)


@pytest.mark.parametrize("piece_s", [None, "1.5"])
def test_a_long_file_goes_the_way_of_a_users_file(folder, tmp_path, capsys, piece_s):
    options = [] if piece_s is None else ["--piece-s", piece_s]
    arguments = ["--minutes", "0.1", "0.05", "--pause-s", "0.25", "--mode", "ctc_greedy", *options]
    run(long_audio, folder, tmp_path, *arguments)
    printed = capsys.readouterr().out.splitlines()
    written = read_rows(tmp_path / "long_audio.jsonl")
    pipe = load_pipeline(str(folder / "model"), "cpu")
    utterances = read_manifest(folder / "data.jsonl")

    def recognise(waveform: np.ndarray) -> str:
        return " ".join(pipe(waveform, generate_kwargs={"mode": "ctc_greedy"})["text"].split())

    alone = [recognise(utterance.waveform(RATE)) for utterance in utterances]
    for line, row, count in zip(printed[-2:], written, (6, 2), strict=True):
        plan = long_audio.place(utterances, row["minutes"], 0.25)
        long_audio.write_flac(tmp_path / "long.flac", utterances, plan, row["minutes"])
        waveform, _ = sf.read(tmp_path / "long.flac", dtype="float32")
        segments = split_at_pauses(waveform, RATE, 30.0 if piece_s is None else float(piece_s))
        pieces = [(segment.slice(waveform, RATE), segment.is_silence) for segment in segments]
        texts = ["" if is_silence else recognise(piece) for piece, is_silence in pieces]
        assert row["texts"] == texts and row["starts_s"] == [segment.start_s for segment in segments]
        reference = normalize_english(" ".join(TEXTS[placed.index] for placed in plan))
        rates = [
            100 * jiwer.wer(reference, normalize_english(" ".join(hypotheses)))
            for hypotheses in (texts, [alone[placed.index] for placed in plan])
        ]
        expected = [f"{row['minutes']:g}", f"{count}", f"{len(pieces)}", f"{row['cuts_in_prompts']}"]
        expected += [f"{rate:.2f}" for rate in rates] + [f"{rates[0] - rates[1]:+.2f}"]
        expected += [f"{row['peak_memory_mib']:.0f}", f"{60 * row['minutes'] / row['cpu_s']:.1f}"]
        assert cells(line) == expected


# No speech


@pytest.mark.parametrize("kind", no_speech.SOUNDS)
def test_sounds_are_the_same_for_a_seed_and_as_loud_as_speech(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(no_speech, "DURATIONS_S", (0.5, 1.0))
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        folder.mkdir()
        entries = no_speech.write_clips(folder, 5, seed)
    assert {entry["text"] for entry in entries} == {""}
    names = [entry["audio_filepath"] for entry in entries if entry["kind"] == kind]
    assert len(set(names)) == 5
    first, again, other = ([sf.read(folder / name)[0] for name in names] for folder in folders)
    assert [len(waveform) / RATE for waveform in first] == [0.5, 1.0, 0.5, 1.0, 0.5]
    for one, two, three in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.std() == pytest.approx(0.0 if kind == "silence" else 0.05, rel=0.01)
        assert (one == three).all() == (kind == "silence") and np.abs(one).max() < 1.0


def spectrum(kind: str) -> np.ndarray:
    """Share of the power at each hertz, of two seconds."""
    power = np.abs(np.fft.rfft(no_speech.SOUNDS[kind](np.random.default_rng(0), 2 * RATE))) ** 2
    return power[:RATE].reshape(-1, 2).sum(1) / power.sum()


def test_sounds_are_what_they_are_called():
    assert not no_speech.silence(np.random.default_rng(0), 9).any()
    assert spectrum("white noise").max() < 0.01
    hum = spectrum("hum")
    assert hum[[50, 100, 150]].sum() > 0.8 or hum[[60, 120, 180]].sum() > 0.8
    assert spectrum("chords")[200:4000].sum() > 0.99 and np.sort(spectrum("chords"))[-40:].sum() > 0.5
    chirps = spectrum("chirps")
    assert chirps[200:4000].sum() > 0.98 and np.sort(chirps)[-40:].sum() < 0.5


def test_prompts_are_cut_in_the_middle_of_the_nearest_word():
    words = [AlignedWord(word, start_s, start_s + 0.4, 1.0) for word, start_s in zip("abcdefgh", range(8), strict=True)]
    utterance = Utterance(0, {"audio_filepath": "/x/y.wav", "duration": 8.0, "offset": 3.0, "text": "a b"}, b"")
    entries = no_speech.cut_entries(utterance, words)
    assert [entry["text"] for entry in entries] == ["a b c", "a b c d e", "a b c d e f g"]
    assert [entry["duration"] for entry in entries] == pytest.approx([2.2, 4.2, 6.2])
    assert {(entry["audio_filepath"], entry["offset"]) for entry in entries} == {("/x/y.wav", 3.0)}
    assert [entry["kind"] for entry in entries] == ["cut at 25%", "cut at 50%", "cut at 75%"]


def test_words_are_found_in_their_order_and_their_time(folder):
    pipe = load_pipeline(str(folder / "model"), "cpu")
    for utterance in read_manifest(folder / "data.jsonl"):
        words = no_speech.find_words(pipe, utterance)
        assert [word.word for word in words] == utterance.entry["text"].split()
        times = [time_s for word in words for time_s in (word.start_s, word.end_s)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= utterance.entry["duration"] + 1e-9
    long_text = replace(utterance, entry={**utterance.entry, "text": "a " * 99})
    with pytest.raises(UsageError, match="2.wav: 'a a .*expected ones that fit the"):
        no_speech.find_words(pipe, long_text)


def test_inserted_words_and_loops_are_counted_by_kind():
    references = ["", "", "a b", "a b c"]
    hypotheses = ["yes", "", "a b x y z", "a b c d d d"]
    score = score_system(references, hypotheses, leaderboard_normalizer(None))
    report = SystemReport("joint", score, score.figures)
    kinds = ["hum", "hum", "cut", "cut"]
    rows = [no_speech.count(kind, report, kinds) for kind in ("hum", "cut")]
    assert rows == [no_speech.Row("hum", "joint", 2, 0, 1, 1, 0, 0), no_speech.Row("cut", "joint", 2, 5, 6, 2, 6, 1)]
    assert no_speech.table(rows).splitlines()[-1] == "| cut | 2 | joint | 5 | 6 | 2 | 6 | 1 |"


def test_the_table_of_inputs_without_speech_says_what_was_measured(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(no_speech, "DURATIONS_S", (0.3, 0.4))
    monkeypatch.setattr(no_speech, "MIN_WORDS", 3)
    run(no_speech, folder, tmp_path, "--clips", "2", "--prompts", "5")
    printed = [cells(line) for line in capsys.readouterr().out.splitlines()[2:]]
    kinds = [*no_speech.SOUNDS, "cut at 25%", "cut at 50%", "cut at 75%"]
    assert [(line[0], line[1], line[2]) for line in printed] == [
        (kind, "2", system) for kind in kinds for system in ("llm", "joint")
    ]
    for line in printed:
        rows = [row for row in read_rows(tmp_path / f"{line[2]}.{line[2]}.jsonl") if row["kind"] == line[0]]
        pairs = [(normalize_english(row["text"]), normalize_english(row["pred_text"])) for row in rows]
        insertions = [jiwer.process_words(*pair).insertions if pair[0] else len(pair[1].split()) for pair in pairs]
        assert line[3] == str(sum(len(reference.split()) for reference, _ in pairs))
        # Alignments with the same number of errors may differ in their insertions.
        assert abs(int(line[4]) - sum(insertions)) <= len(rows)
    assert any(int(line[4]) for line in printed[:10]), "the model should write something"


def test_cutting_prompts_needs_labels_that_are_tokens(folder, tmp_path, capsys, monkeypatch):
    pipe = load_pipeline(str(folder / "model"), "cpu")
    monkeypatch.setattr(pipe, "model", tiny_model(ctc_token_ids=None))
    with pytest.raises(SystemExit):
        run(no_speech, folder, tmp_path)
    assert "--model: expected a speech LLM whose CTC labels are tokens" in capsys.readouterr().err
