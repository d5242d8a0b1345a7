"""The whole evaluation with tiny random models: resumed, with several processes, on every kind of data and model."""

import functools
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from datasets import Dataset, Features, Value
from tiny_models import AUDIO_CONFIGS, loud_model, noise, tiny_processor, tiny_tokenizer
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from hf_speechllm.combination import MODES
from training import decoding_run, evaluate_asr, recognisers
from training.decoding_run import Process, part_path, start_process
from training.evaluation_data import UsageError, batches, read_manifest
from training.leaderboard import is_scored
from training.model_card import results_table
from training.recognisers import Recogniser, default_mode, mode_options

DURATIONS_S = [0.3, 0.9, 0.5, 0.7, 0.4, 0.6, 0.8, 0.2, 0.35, 0.45]
TEXTS = ["the thing", "an ant", "", "sing", "a", "tan", "hint, hint!", "Thing", "in", "gin"]


load_pipeline = functools.cache(recognisers.load_pipeline)


@pytest.fixture(scope="module", autouse=True)
def models_are_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_asr, "load_pipeline", load_pipeline)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in `model` and a manifest `data.jsonl` with audio of two rates and an offset."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = loud_model()
    model.generation_config.ctc_weight = 0.3
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    (folder / "audio").mkdir()
    lines = []
    for number, (waveform, text) in enumerate(zip(noise(*DURATIONS_S, seed=1), TEXTS, strict=True)):
        rate = 8000 if number == 3 else 16000
        sf.write(folder / "audio" / f"{number}.wav", waveform, rate)
        lines.append({"audio_filepath": f"audio/{number}.wav", "text": text, "speaker": number % 2})
    lines[1] |= {"offset": 0.2, "duration": 0.5}
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def parse(folder: Path, *arguments: str):
    return evaluate_asr.build_parser().parse_args(
        [
            str(folder / "data.jsonl"),
            "--model",
            str(folder / "model"),
            "--batch-size",
            "3",
            "--device",
            "cpu",
            *arguments,
        ]
    )


def run(folder: Path, *arguments: str) -> None:
    evaluate_asr.evaluate(parse(folder, *arguments))


def rows(path: Path) -> list[dict]:
    """Lines of a manifest but for the time, which differs from run to run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert line.pop("time") > 0
    return lines


@pytest.fixture(scope="module")
def reference(folder) -> list[dict]:
    """What an undisturbed run writes."""
    run(folder, "--output", str(folder / "reference"))
    return rows(folder / "reference.joint.jsonl")


def in_process(target, *arguments) -> multiprocessing.Process:
    """Start a function in a process of its own that has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def slowly(folder: Path, *arguments: str) -> None:
    original = Recogniser.transcribe

    def transcribe(self, waveforms, longest_s):
        time.sleep(0.2)
        return original(self, waveforms, longest_s)

    Recogniser.transcribe = transcribe
    run(folder, *arguments)


def as_rank(rank: int, count: int, port: int, folder: Path, *arguments: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    run(folder, *arguments)


def test_manifest_has_the_leaderboards_fields_and_the_order_of_the_data(folder, reference):
    assert [row["text"] for row in reference] == TEXTS
    assert [row["speaker"] for row in reference] == [number % 2 for number in range(10)]
    assert all({"audio_filepath", "duration", "text", "pred_text"} <= set(row) for row in reference)
    assert [row["duration"] for row in reference] == pytest.approx(
        [0.3, 0.5, 0.5, 1.4, 0.4, 0.6, 0.8, 0.2, 0.35, 0.45], abs=1e-3
    )
    assert len({row["pred_text"] for row in reference}) > 3, "the model should hear differences"


def test_texts_are_those_of_the_pipeline_alone(folder, reference):
    pipe = load_pipeline(str(folder / "model"), "cpu")
    for utterance, row in zip(read_manifest(folder / "data.jsonl"), reference, strict=True):
        inputs = {"raw": utterance.waveform(16000), "sampling_rate": 16000}
        assert pipe(inputs, generate_kwargs={"ctc_weight": 0.3})["text"].strip() == row["pred_text"]


def test_the_type_of_the_weights_can_be_chosen(folder):
    assert load_pipeline(str(folder / "model"), "cpu").model.dtype == torch.float32
    assert load_pipeline(str(folder / "model"), "cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    arguments = evaluate_asr.build_parser().parse_args([str(folder / "data.jsonl"), "--dtype", "bfloat16"])
    assert arguments.dtype == "bfloat16"


def test_an_adapter_is_merged_on_demand(folder, monkeypatch, capsys):
    merged = []
    monkeypatch.setattr(
        "hf_speechllm.SpeechLLMForConditionalGeneration.merge_adapter", lambda model: merged.append(model)
    )
    command = [str(folder / "data.jsonl"), "--model", str(folder / "model"), "--limit", "1", "--device", "cpu"]
    parse = evaluate_asr.build_parser().parse_args
    evaluate_asr.evaluate(parse([*command, "--mode", "llm"]))
    assert merged == []
    evaluate_asr.evaluate(parse([*command, "--mode", "llm", "--merge-adapter"]))
    assert len(merged) == 1
    with pytest.raises(UsageError, match="--merge-adapter: --mode rescoring needs the language model without"):
        evaluate_asr.evaluate(parse([*command, "--mode", "llm", "--mode", "rescoring", "--merge-adapter"]))


def test_offset_and_rate_of_the_audio(folder):
    utterances = read_manifest(folder / "data.jsonl")
    whole, _ = sf.read(folder / "audio" / "1.wav", dtype="float32")
    np.testing.assert_allclose(utterances[1].waveform(16000), whole[3200:11200], atol=1e-6)
    assert len(utterances[3].waveform(16000)) == pytest.approx(1.4 * 16000, abs=2)


def test_killed_and_resumed(folder, reference, tmp_path, monkeypatch):
    arguments = ["--output", str(tmp_path / "run")]
    process = in_process(slowly, folder, *arguments)
    part = part_path(tmp_path / "run.joint", 0)
    while process.is_alive() and (not part.exists() or part.read_bytes().count(b"\n") < 1 + 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = part.read_bytes().splitlines(keepends=True)
    assert not (tmp_path / "run.joint.jsonl").exists() and 4 <= len(kept) < 11
    # The kill may also fall into the writing of a line.
    part.write_bytes(b"".join(kept[:3]) + kept[3][:-20])
    recognised, longest = [], []
    original = Recogniser.transcribe

    def transcribe(self, waveforms, longest_s):
        recognised.append(len(waveforms))
        longest.append(longest_s)
        return original(self, waveforms, longest_s)

    monkeypatch.setattr(Recogniser, "transcribe", transcribe)
    run(folder, *arguments)
    assert rows(tmp_path / "run.joint.jsonl") == reference
    assert recognised[0] == 1 and sum(recognised[1:]) == 8  # warm-up; the third of the first batch, and the rest
    assert longest[:2] == pytest.approx([1.4, 1.4], abs=1e-3)  # of the whole batch, recognised before or not
    assert not part.exists()
    recognised.clear()
    run(folder, *arguments)
    assert recognised == []  # finished
    run(folder, *arguments, "--overwrite")
    assert sum(recognised[1:]) == 10


def test_two_processes_write_what_one_writes(folder, reference, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    arguments = [folder, "--output", str(tmp_path / "run")]
    processes = [in_process(as_rank, rank, 2, port, *arguments) for rank in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert rows(tmp_path / "run.joint.jsonl") == reference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.joint.jsonl", "run.joint.run.json"]


def test_each_process_decodes_its_own_share_once(folder, reference, tmp_path):
    """Also when the number of processes changes on the way."""
    utterances = read_manifest(folder / "data.jsonl")
    recogniser = Recogniser(load_pipeline(str(folder / "model"), "cpu"), {"mode": "llm"})
    prefix, description = tmp_path / "run", {"model": "tiny"}
    for process in (Process(1, 3), Process(0, 2), Process(1, 2)):
        decoding_run.decode(recogniser, batches(iter(utterances), 3, None), prefix, description, process, 10)
    assert part_path(prefix, 1).read_text().count("\n") > 1
    merged, _ = decoding_run.merge(prefix, description, 10)
    assert [row["pred_text"] for row in merged] == [row["pred_text"] for row in reference]


def test_a_missing_share_is_noticed(folder, tmp_path):
    utterances = read_manifest(folder / "data.jsonl")
    recogniser = Recogniser(load_pipeline(str(folder / "model"), "cpu"), {})
    decoding_run.decode(recogniser, batches(iter(utterances), 3, None), tmp_path / "run", {}, Process(0, 2), 10)
    with pytest.raises(UsageError, match="expected each of 10 utterances once in the journals, got 6 lines"):
        decoding_run.merge(tmp_path / "run", {}, 10)


def test_what_a_run_took_is_that_of_all_its_processes_also_of_those_that_died(folder, tmp_path, monkeypatch):
    """The first process, whose memory was the largest, recognises a batch of 3 and dies; two more do the rest."""
    utterances = read_manifest(folder / "data.jsonl")
    recogniser = Recogniser(load_pipeline(str(folder / "model"), "cpu"), {})
    prefix = tmp_path / "run"
    clock_s = iter(range(99))
    monkeypatch.setattr(decoding_run.time, "process_time", lambda: float(next(clock_s)))  # a second for each batch
    for peak_mib, process in ((900.0, Process(0, 3)), (700.0, Process(0, 2)), (800.0, Process(1, 2))):
        monkeypatch.setattr(decoding_run, "peak_memory_mib", lambda pipe, peak_mib=peak_mib: peak_mib)
        dealt = batches(iter(utterances[:3] if peak_mib == 900.0 else utterances), 3, None)
        decoding_run.decode(recogniser, dealt, prefix, {"model": "tiny"}, process, 10)
    rows, cost = decoding_run.merge(prefix, {"model": "tiny"}, 10)
    assert len(rows) == 10 and not {"cpu_s", "peak_memory_mib"} & set(rows[0])
    # Of the 4 batches of all utterances none is of the first 3 alone, so each has something left to recognise.
    assert cost.peak_memory_mib == 900.0 and cost.cpu_s == pytest.approx(5.0)
    assert decoding_run.finished(prefix, {"model": "tiny"}) == cost
    assert decoding_run.finished(prefix, {"model": "other"}) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux knows")
def test_peak_memory_is_that_of_this_process_alone(folder):
    pipe = load_pipeline(str(folder / "model"), "cpu")
    resident_mib = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    peak_mib = decoding_run.peak_memory_mib(pipe)
    assert resident_mib * 0.95 < peak_mib < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 + 1
    more = np.ones(round(peak_mib * 2**20 / 8) + 2**23)  # 64 MiB beyond anything so far
    assert decoding_run.peak_memory_mib(pipe) > peak_mib + 32 and more.all()


def test_memory_and_time_are_in_the_results(folder, tmp_path):
    run(folder, "--output", str(tmp_path / "run"), "--results", str(tmp_path / "results.jsonl"))
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    described = json.loads((tmp_path / "run.joint.run.json").read_text())
    manifest = [json.loads(line) for line in (tmp_path / "run.joint.jsonl").read_text().splitlines()]
    duration_s = sum(line["duration"] for line in manifest)
    assert 50 < row["peak_memory_mib"] == described["peak_memory_mib"] < 100_000
    assert row["rtfx"] == pytest.approx(duration_s / sum(line["time"] for line in manifest))
    assert row["rtfx_cpu"] == pytest.approx(duration_s / described["cpu_s"])


def test_journals_of_another_run_are_refused(folder, tmp_path):
    part_path(tmp_path / "run.joint", 5).write_text('{"run": {"model": "other"}}\n')
    with pytest.raises(UsageError, match="part5.jsonl: left by an unfinished run with another .*model.*--overwrite"):
        run(folder, "--output", str(tmp_path / "run"), "--limit", "1")
    part_path(tmp_path / "run.joint", 5).write_text('{"run": \n{}\n')
    with pytest.raises(UsageError, match=r"part5.jsonl: damaged \(.*give --overwrite"):
        run(folder, "--output", str(tmp_path / "run"), "--limit", "1")
    run(folder, "--output", str(tmp_path / "run"), "--limit", "1", "--overwrite")
    assert len(rows(tmp_path / "run.joint.jsonl")) == 1


def test_batches_are_of_similar_length_and_do_not_depend_on_the_window_alone(folder):
    utterances = read_manifest(folder / "data.jsonl")
    lengths = [[utterance.entry["duration"] for utterance in batch] for batch in batches(iter(utterances), 4, None)]
    assert sum(lengths, []) == sorted((u.entry["duration"] for u in utterances), reverse=True)
    windows = [[utterance.index for utterance in batch] for batch in batches(iter(utterances), 2, 4)]
    assert [sorted(sum(windows[i : i + 2], [])) for i in (0, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_modes_results_comparison_and_report(folder, reference, tmp_path, capsys):
    results, report = tmp_path / "results.jsonl", tmp_path / "report" / "page.html"
    arguments = [
        "--mode",
        "joint",
        "--mode",
        "llm",
        "--mode",
        "ctc_greedy",
        "--results",
        str(results),
        "--name",
        "Clips",
    ]
    arguments += ["--generate", '{"num_beams": 2}', "--compare", str(folder / "reference.joint.jsonl")]
    run(folder, *arguments, "--report", str(report), "--embed-audio")
    output, errors = capsys.readouterr()
    assert "utt/s" not in errors, "no progress bars between the rows where they would stay"
    written = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["mode"] for row in written] == ["joint", "llm", "ctc_greedy"]
    assert written[0]["options"] == {"num_beams": 2, "mode": "llm"}
    assert written[1]["options"]["ctc_weight"] == 0.0 and written[2]["options"]["mode"] == "ctc_greedy"
    assert written[0]["dataset"] == "Clips" and written[0]["utterances"] == 10
    assert "| Clips (10 utterances, 0.1 min)" in results_table(written)  # as the model card reads them
    assert output.count("paired bootstrap") == 3 and "reference.joint against" in output
    assert "data:audio/wav" in report.read_text() and report.read_text().count("<article>") == 10


def test_every_mode_of_generate_can_be_given(folder, monkeypatch):
    pipe = load_pipeline(str(folder / "model"), "cpu")
    for mode in MODES:
        assert mode_options(pipe, mode, {})["mode"] == mode
    assert mode_options(pipe, "joint", {"num_beams": 1}) == {"num_beams": 1, "mode": "llm"}
    assert default_mode(pipe, {}) == "joint" and default_mode(pipe, {"ctc_weight": 0.0}) == "llm"
    with pytest.raises(UsageError, match="--mode: joint needs the weight of CTC, .* give --generate .* or --mode llm"):
        mode_options(pipe, "joint", {"ctc_weight": 0.0})
    # As after a training: nobody has chosen one.
    monkeypatch.setattr(pipe.model.generation_config, "ctc_weight", None)
    assert default_mode(pipe, {}) == "llm" and default_mode(pipe, {"ctc_weight": 0.2}) == "joint"
    assert mode_options(pipe, "joint", {"ctc_weight": 0.2}) == {"ctc_weight": 0.2, "mode": "llm"}
    with pytest.raises(UsageError, match="--generate: lm_weight: it has no part in mode 'ctc_beam'"):
        mode_options(pipe, "ctc_beam", {"lm_weight": 0.4})
    with pytest.raises(UsageError, match="--mode: expected one of joint, llm, ctc_greedy, .*, got 'greedy'"):
        mode_options(pipe, "greedy", {})


@pytest.fixture(scope="module")
def moonshine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moonshine")
    values = {name: value for name, value in AUDIO_CONFIGS["moonshine"].items() if name != "model_type"}
    config = MoonshineConfig(**values | {"vocab_size": 48}, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    MoonshineForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wav2vec2")
    values = {name: value for name, value in AUDIO_CONFIGS["wav2vec2"].items() if name != "model_type"}
    Wav2Vec2ForCTC(Wav2Vec2Config(**values, vocab_size=8)).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


def test_models_of_others(folder, moonshine, wav2vec2, tmp_path):
    for model in (moonshine, wav2vec2):
        run(folder, "--model", str(model), "--output", str(tmp_path / model.name), "--limit", "4")
        assert len(rows(tmp_path / f"{model.name}.default.jsonl")) == 4


def test_moonshine_without_end_of_sequence_stops(moonshine):
    pipe = load_pipeline(str(moonshine), "cpu")
    lengths = []
    hook = pipe.model.register_forward_hook(lambda module, inputs, output: lengths.append(1))
    Recogniser(pipe, mode_options(pipe, "default", {})).transcribe(noise(0.4), 0.4)
    hook.remove()
    assert len(lengths) == 16 + 3
    assert mode_options(pipe, "default", {"num_beams": 3}) == {"num_beams": 3}


def test_modes_and_options_that_models_of_others_lack(moonshine, wav2vec2):
    with pytest.raises(UsageError, match="--mode: 'joint' is for speech LLMs of this package, this is a moonshine"):
        mode_options(load_pipeline(str(moonshine), "cpu"), "joint", {})
    with pytest.raises(UsageError, match="--generate: a wav2vec2 CTC model does not generate; leave out num_beams"):
        mode_options(load_pipeline(str(wav2vec2), "cpu"), "default", {"num_beams": 2})


@pytest.fixture
def dataset_folder(folder, tmp_path) -> Path:
    """A local data set as the Hub has them: parquet with the bytes of files."""
    records = []
    for number in (0, 2, 4, 7):  # the second has no text, and the leaderboard leaves it out
        audio = {"bytes": (folder / "audio" / f"{number}.wav").read_bytes(), "path": f"{number}.wav"}
        records.append({"audio": audio, "sentence": TEXTS[number]})
    audio_type = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"audio": audio_type, "sentence": Value("string")})
    (tmp_path / "set").mkdir()
    Dataset.from_list(records, features=features).to_parquet(tmp_path / "set" / "test.parquet")
    return tmp_path / "set"


def test_streamed_data_set(folder, reference, dataset_folder, tmp_path):
    arguments = parse(folder, "--leaderboard-dir", str(tmp_path / "results"), "--system", "org/tiny")
    arguments.data = f"{dataset_folder}::test"
    arguments.report = tmp_path / "page.html"
    evaluate_asr.evaluate(arguments)
    (path,) = (tmp_path / "results").glob("*.jsonl")
    assert path.name.startswith("MODEL_org-tiny_DATASET_") and path.name.endswith("__test.jsonl")
    expected = [reference[number] for number in (0, 4, 7)]
    assert [(row["text"], row["pred_text"]) for row in rows(path)] == [(r["text"], r["pred_text"]) for r in expected]
    assert rows(path)[1]["audio_filepath"] == "4.wav"
    assert "audio not in a file" in arguments.report.read_text()
    arguments.embed_audio = True
    with pytest.raises(UsageError, match="--embed-audio: needs a manifest"):
        evaluate_asr.evaluate(arguments)


def test_data_sets_that_cannot_be_used(folder, dataset_folder, tmp_path):
    from training.evaluation_data import stream_dataset

    with pytest.raises(UsageError, match="configuration None, split 'dev' cannot be read"):
        next(stream_dataset(str(dataset_folder), None, "dev", is_scored))
    (tmp_path / "no_text").mkdir()
    Dataset.from_list([{"audio": "a.wav", "words": "a"}]).to_parquet(tmp_path / "no_text" / "test.parquet")
    with pytest.raises(UsageError, match="expected the columns 'audio' and one of text, .*; there are .*'words'"):
        next(stream_dataset(str(tmp_path / "no_text"), None, "test", is_scored))


MESSAGES = {
    "no such file; expected a JSONL manifest, PATH:CONFIGURATION:SPLIT or one of ami": ["absent.jsonl"],
    r"data.jsonl:2: expected a JSON object, got 'nonsense'": ["data.jsonl", "{GOOD}\nnonsense\n"],
    r"data.jsonl:1: expected a JSON object, got '\[1\]'": ["data.jsonl", "[1]\n"],
    r"data.jsonl:1: field 'text' is missing; there are \['audio_filepath', 'txt'\]": [
        "data.jsonl",
        '{"audio_filepath": "a.wav", "txt": "a"}\n',
    ],
    "data.jsonl:1: text: expected a string, got 3": ["data.jsonl", '{"audio_filepath": "a.wav", "text": 3}\n'],
    "utterance 1: no such audio file: .*b.wav": ["data.jsonl", '{"audio_filepath": "b.wav", "text": ""}\n'],
    "broken.wav: cannot be read": ["data.jsonl", '{"audio_filepath": "broken.wav", "text": ""}\n'],
    "expected at least one utterance, got none": ["data.jsonl", "\n"],
}


@pytest.mark.parametrize("message", MESSAGES)
def test_manifests_that_cannot_be_used(tmp_path, message):
    name, *content = MESSAGES[message]
    sf.write(tmp_path / "a.wav", np.zeros(100), 16000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    if content:
        good = '{"audio_filepath": "a.wav", "text": "a"}'
        (tmp_path / name).write_text(content[0].replace("{GOOD}", good))
    with pytest.raises(UsageError, match=message):
        evaluate_asr.evaluate(evaluate_asr.build_parser().parse_args([str(tmp_path / name)]))


def test_audio_that_breaks_off(folder, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "data.jsonl").write_text('{"audio_filepath": "a.wav", "text": "a", "duration": 1.0}\n')
    (utterance,) = read_manifest(tmp_path / "data.jsonl")
    with pytest.raises(UsageError, match="a.wav: cannot be read"):
        utterance.waveform(16000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--limit", "-1"], "--limit: expected at least 1, got -1"),
        (["--report-utterances", "0"], "--report-utterances: expected at least 1, got 0"),
        (["--compare", "absent.jsonl"], "--compare: absent.jsonl: no such file"),
        (["--generate", "{"], "--generate: expected a JSON object, got '{'"),
        (["--generate", "[]"], r"--generate: expected a JSON object, got '\[\]'"),
        (["--model", "./absent"], "--model: no such folder: ./absent"),
        (["--model", "base:absent"], "--model: base:absent cannot be loaded .*expected one of .*whisper-tiny.en"),
        (["--mode", "beam"], "--mode: expected one of"),
        (
            ["--leaderboard-dir", "d", "--mode", "llm", "--mode", "joint"],
            "--leaderboard-dir: takes one --mode, got llm",
        ),
        (["--leaderboard-repository", "absent"], "repository: expected a clone .*, got absent"),
    ],
)
def test_wrong_arguments(folder, arguments, message):
    with pytest.raises(UsageError, match=message):
        run(folder, *arguments)


def test_comparison_with_other_references(folder, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "x", "pred_text": "x", "duration": 1, "time": 1}\n')
    with pytest.raises(UsageError, match="other.jsonl: expected the same 2 references in the same order, got 1"):
        run(folder, "--limit", "2", "--compare", str(tmp_path / "other.jsonl"))


def test_several_processes_need_a_place_to_meet(folder):
    with pytest.raises(UsageError, match="--output or --leaderboard-dir is needed with several processes"):
        evaluate_asr.recognise(parse(folder), None, None, "joint", Path("x"), Process(0, 2))


def test_one_process_needs_no_network(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    process = start_process()
    assert (process.rank, process.count, process.largest(3.0)) == (0, 1, 3.0)


@pytest.mark.slow
def test_command_line_with_torchrun(folder, reference, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [
        "training.evaluate_asr",
        str(folder / "data.jsonl"),
        "--model",
        str(folder / "model"),
        "--batch-size",
        "3",
    ]
    command += ["--device", "cpu", "--output", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    assert rows(tmp_path / "run.joint.jsonl") == reference
    wrong = [sys.executable, "-m", "training.evaluate_asr", "absent.jsonl"]
    result = subprocess.run(wrong, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 2 and result.stderr.startswith("evaluate_asr: error: absent.jsonl: no such file")
