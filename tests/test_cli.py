"""The command line with a fake pipeline: what is printed, where it goes, exit codes and every error message."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import transformers

from hf_speechllm import cli
from hf_speechllm.transcript_formats import to_srt, to_vtt
from hf_speechllm.transcription import TimedText, Transcript, _return_free_memory

RATE = 16_000
POISON = 0.75  # the fake model raises for recordings with this sample value


class FakePipeline:
    """Called like the real one: takes a generator, reads a whole batch ahead, yields {"text": ...}.

    The text names the whole seconds of audio, as in "about 3 seconds".
    """

    def __init__(
        self,
        kind: str = "seq2seq",
        sampling_rate: int = RATE,
        max_duration_s: float | None = None,
        model_type: str = "speechllm",
    ):
        self.type = kind
        self.device = "cpu"
        self.feature_extractor = SimpleNamespace(sampling_rate=sampling_rate)
        config = SimpleNamespace(model_type=model_type)
        if max_duration_s is not None:
            config.max_audio_duration_s = max_duration_s
        self.model = SimpleNamespace(
            can_generate=lambda: kind == "seq2seq",
            config=config,
            generation_config=SimpleNamespace(),
            merge_adapter=self.merge_adapter,
        )
        self.is_merged = False
        self.loaded: tuple = ()
        self.calls: list[dict] = []
        self.num_heard = 0

    def merge_adapter(self):
        self.is_merged = True

    def __call__(self, items, batch_size=1, generate_kwargs=None):
        self.calls.append({"batch_size": batch_size, "generate_kwargs": generate_kwargs})
        if "unknown" in str(generate_kwargs):
            raise ValueError("these arguments\nare not used")
        batch = []
        for item in items:
            assert item["raw"].dtype == np.float32
            assert item["sampling_rate"] == self.feature_extractor.sampling_rate
            batch.append(item["raw"])
            if len(batch) == batch_size:
                yield from self.forward(batch)
                batch = []
        yield from self.forward(batch)

    def forward(self, batch):
        if any((abs(waveform - POISON) < 1e-3).any() for waveform in batch):
            raise RuntimeError("index out of\nrange")
        self.num_heard += len(batch)
        return [{"text": f"  about {round(len(w) / self.feature_extractor.sampling_rate)}\nseconds "} for w in batch]


@pytest.fixture
def pipe(monkeypatch):
    return install(monkeypatch, FakePipeline())


def install(monkeypatch, fake: FakePipeline) -> FakePipeline:
    def pipeline(task, model, **options):
        fake.loaded = (task, model, options)
        return fake

    monkeypatch.setattr(cli, "pipeline", pipeline)
    return fake


def write(path: Path, duration_s: float, value: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    waveform = np.random.default_rng(0).normal(0, 0.02, round(duration_s * RATE))
    waveform[0] = value
    soundfile.write(path, waveform, RATE)
    return path


def run(*arguments: object) -> int:
    return cli.main(["transcribe", "--model", "some/model", *map(str, arguments)])


def test_one_file_prints_its_text_alone(pipe, tmp_path, capsys):
    assert run(write(tmp_path / "a.wav", 2)) == 0
    captured = capsys.readouterr()
    assert captured.out == "about 2 seconds\n"
    assert captured.err == ""
    assert pipe.loaded == ("automatic-speech-recognition", "some/model", {"dtype": "auto"})
    warm_up, call = pipe.calls
    assert warm_up["generate_kwargs"] == {"max_new_tokens": 4}
    assert call == {"batch_size": 1, "generate_kwargs": None}


def test_several_files_print_their_names(pipe, tmp_path, capsys):
    first, second = write(tmp_path / "a.wav", 2), write(tmp_path / "b.flac", 3)
    assert run(second, first) == 0
    assert capsys.readouterr().out == f"{second}\tabout 3 seconds\n{first}\tabout 2 seconds\n"


def test_options_reach_the_model(pipe, tmp_path):
    options = ["--ctc-weight", "0.3", "--num-beams", "4", "--batch-size", "8", "--device", "cpu", "--dtype", "bfloat16"]
    assert run(write(tmp_path / "a.wav", 2), *options) == 0
    assert pipe.loaded[2] == {"device": "cpu", "dtype": "bfloat16"}
    assert pipe.calls[0]["generate_kwargs"] == {"ctc_weight": 0.3, "num_beams": 4, "max_new_tokens": 4}
    assert pipe.calls[1] == {"batch_size": 8, "generate_kwargs": {"ctc_weight": 0.3, "num_beams": 4}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mode", "ctc_greedy"], {"mode": "ctc_greedy"}),
        (["--mode", "llm"], {"mode": "llm", "ctc_weight": 0.0}),
        (
            ["--mode", "joint", "--ctc-weight", "0.3", "--num-beams", "4"],
            {"mode": "llm", "ctc_weight": 0.3, "num_beams": 4},
        ),
        (["--mode", "rescoring", "--generate", '{"lm_weight": 0.4}'], {"mode": "rescoring", "lm_weight": 0.4}),
        (["--generate", '{"max_new_tokens": 9}', "--num-beams", "2"], {"max_new_tokens": 9, "num_beams": 2}),
    ],
)
def test_mode_and_further_options_reach_the_model(pipe, tmp_path, options, expected):
    assert run(write(tmp_path / "a.wav", 2), *options) == 0
    warm_up = {"max_new_tokens": 4} if expected.get("mode", "llm") == "llm" else {}  # it bounds no search of labels
    assert pipe.calls[0]["generate_kwargs"] == {**warm_up, **expected}
    assert pipe.calls[1]["generate_kwargs"] == expected


def test_the_modes_are_those_of_the_model(loud_model_folder, tmp_path, capsys):
    """The texts are those of the pipeline in these modes, which differ."""
    recording = write(tmp_path / "a.wav", 1)
    transcriber = transformers.pipeline("automatic-speech-recognition", model=str(loud_model_folder))
    texts = []
    for mode, options in (("llm", {"num_beams": 2}), ("ctc_greedy", {}), ("rescoring", {"lm_weight": 2.0})):
        arguments = ["--mode", mode, "--generate", json.dumps(options)]
        assert cli.main(["transcribe", "--model", str(loud_model_folder), str(recording), *arguments]) == 0
        texts.append(capsys.readouterr().out.strip())
        weight = {"ctc_weight": 0.0} if mode == "llm" else {}
        assert texts[-1] == transcriber(str(recording), mode=mode, **options, **weight)["text"]
    assert len(set(texts)) == 3
    unknown = ["--model", str(loud_model_folder), "--generate", '{"lm_wait": 1}']
    assert cli.main(["transcribe", str(recording), *unknown]) == 2
    message = capsys.readouterr().err
    assert "does not work with these options (ValueError: " in message and "['lm_wait']" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "llm", "--ctc-weight", "0.3"], "ctc_weight: goes with --mode joint, got --mode llm; drop it"),
        (
            ["--mode", "ctc_beam", "--generate", '{"num_beams": 2}'],
            "num_beams: goes with --mode joint or llm, got --mode ctc",
        ),
        (["--mode", "llm", "--generate", '{"mode": "llm"}'], "--generate: mode is given by --mode too; give it once"),
        (["--num-beams", "2", "--generate", '{"num_beams": 2}'], "--generate: num_beams is given by --num-beams too"),
    ],
)
def test_options_that_do_not_go_together(pipe, tmp_path, capsys, options, message):
    assert message in usage_error(capsys, write(tmp_path / "a.wav", 2), *options)


def test_models_of_others_have_no_modes(monkeypatch, tmp_path, capsys):
    recording = write(tmp_path / "a.wav", 2)
    fake = install(monkeypatch, FakePipeline(model_type="whisper"))
    assert usage_error(capsys, recording, "--mode", "llm") == (
        "--mode: is for speech LLMs of this package, some/model is a whisper model; drop it"
    )
    assert run(recording, "--generate", '{"language": "en"}') == 0
    assert fake.calls[-1]["generate_kwargs"] == {"language": "en"}
    capsys.readouterr()
    install(monkeypatch, FakePipeline("ctc", model_type="wav2vec2"))
    for options in (["--mode", "ctc_greedy"], ["--generate", '{"lm_weight": 1}']):
        assert "some/model is a pure CTC model, which takes none of --mode," in usage_error(capsys, recording, *options)


def test_folder_is_searched_recursively(pipe, tmp_path, capsys):
    for name in ("b/c.WAV", "a.flac", ".hidden/x.wav", ".x.wav"):
        write(tmp_path / name, 2)
    (tmp_path / "notes.txt").write_text("not audio")
    assert run(tmp_path) == 0
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [str(tmp_path / "a.flac"), str(tmp_path / "b/c.WAV")]


def test_standard_input(pipe, tmp_path, capsys, monkeypatch):
    content = write(tmp_path / "a.wav", 2).read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(content)))
    assert run("-", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["file"] == "stdin"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"")))
    assert run("-") == 1
    assert capsys.readouterr().err == "speechllm: error: stdin: audio bytes: empty (0 bytes)\n"


@pytest.mark.parametrize(("max_duration_s", "longest"), [(None, 30.0), (8.0, 8.0)])
def test_long_recordings_are_segmented(monkeypatch, tmp_path, capsys, max_duration_s, longest):
    install(monkeypatch, FakePipeline(max_duration_s=max_duration_s))
    assert run(write(tmp_path / "a.wav", 70), "--format", "json") == 0
    transcript = json.loads(capsys.readouterr().out)
    assert transcript["duration"] == 70.0
    segments = transcript["segments"]
    assert segments[0]["start"] == 0
    assert segments[-1]["end"] == 70.0
    assert all(a["end"] == b["start"] for a, b in zip(segments, segments[1:], strict=False))
    assert longest / 2 <= max(segment["end"] - segment["start"] for segment in segments) <= longest
    assert transcript["text"] == " ".join(segment["text"] for segment in segments)
    assert set(transcript) == {"file", "duration", "text", "segments"}


def test_silence_is_not_sent_to_the_model(pipe, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    assert run(tmp_path / "a.wav", write(tmp_path / "b.wav", 2)) == 0
    assert pipe.num_heard == 2  # the warm-up and b
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path / 'a.wav'}\t"
    assert run(tmp_path / "a.wav", "--format", "srt") == 0
    assert capsys.readouterr().out == ""


def test_the_models_sampling_rate_is_used(monkeypatch, tmp_path, capsys):
    install(monkeypatch, FakePipeline(sampling_rate=8_000))
    assert run(write(tmp_path / "a.wav", 2)) == 0
    assert capsys.readouterr().out == "about 2 seconds\n"


def test_bad_files_are_named_and_the_rest_goes_on(pipe, tmp_path, capsys):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder").mkdir()
    good = write(tmp_path / "good.wav", 2)
    status = run(tmp_path / "none.wav", good, tmp_path / "empty.wav", tmp_path / "folder", good)
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == f"{good}\tabout 2 seconds\n" * 2
    assert captured.err.splitlines() == [
        f"speechllm: error: {tmp_path / 'none.wav'}: no such file",
        f"speechllm: error: {tmp_path / 'empty.wav'}: empty file (0 bytes)",
        f"speechllm: error: {tmp_path / 'folder'}: no audio files in this folder",
    ]


def test_unexpected_failure_of_reading(pipe, tmp_path, capsys, monkeypatch):
    def refuse(source, sampling_rate):
        raise MemoryError("too\nlong")

    monkeypatch.setattr("hf_speechllm.transcription.stream_audio", refuse)
    assert run(tmp_path / "a.wav") == 1
    assert (
        capsys.readouterr().err == f"speechllm: error: {tmp_path / 'a.wav'}: cannot be read (MemoryError: too long)\n"
    )


def test_only_empty_folders_do_not_load_the_model(pipe, tmp_path, capsys):
    assert run(tmp_path) == 1
    assert capsys.readouterr().err == f"speechllm: error: {tmp_path}: no audio files in this folder\n"
    assert pipe.loaded == ()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_failure_of_the_model_hits_one_recording(pipe, tmp_path, capsys, batch_size):
    names = [write(tmp_path / f"{n}.wav", n + 1, POISON if n == 2 else 0.1) for n in range(5)]
    assert run(tmp_path, "--batch-size", batch_size) == 1
    captured = capsys.readouterr()
    expected = [f"{name}\tabout {n + 1} seconds" for n, name in enumerate(names) if n != 2]
    assert captured.out.splitlines() == expected
    message = f"speechllm: error: {names[2]}: recognition failed (RuntimeError: index out of range)\n"
    assert captured.err == message


def test_output_folder(pipe, tmp_path, capsys):
    write(tmp_path / "in/b/c.wav", 2)
    single = write(tmp_path / "d.flac", 3)
    assert run(tmp_path / "in", single, "--output-dir", tmp_path / "out", "--format", "srt") == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out/b/c.srt").read_text() == "1\n00:00:00,000 --> 00:00:02,000\nabout 2 seconds\n\n"
    assert (tmp_path / "out/d.srt").exists()
    assert run(single, "--output-dir", tmp_path / "out") == 0
    assert (tmp_path / "out/d.txt").read_text() == "about 3 seconds\n"


def test_output_folder_cannot_be_written(pipe, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    recording = write(tmp_path / "a.wav", 2)
    assert run(recording, "--output-dir", tmp_path / "out") == 1
    target = tmp_path / "out" / "a.txt"
    assert capsys.readouterr().err == f"speechllm: error: {recording}: cannot write {target} (File exists)\n"


def test_subtitle_formats():
    segments = (TimedText(0, 1.5, "A <b> & c"), TimedText(1.5, 2, ""), TimedText(3599.9996, 360_000, "end"))
    transcript = Transcript("a.wav", 360_000, segments, 1.0)
    assert transcript.text == "A <b> & c end"
    assert to_srt(transcript) == (
        "1\n00:00:00,000 --> 00:00:01,500\nA <b> & c\n\n2\n01:00:00,000 --> 100:00:00,000\nend\n\n"
    )
    assert to_vtt(transcript) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nA &lt;b&gt; &amp; c\n\n01:00:00.000 --> 100:00:00.000\nend\n\n"
    )


def test_progress_bar_only_on_request_or_on_a_terminal(pipe, tmp_path, capsys, monkeypatch):
    recording = write(tmp_path / "a.wav", 90)
    run(recording)
    assert capsys.readouterr().err == ""
    run(recording, "--progress")
    err = capsys.readouterr().err
    assert "1/1" in err and "1.5 min of audio" in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(recording)
    assert "1/1" in capsys.readouterr().err
    run(recording, "--no-progress")
    assert capsys.readouterr().err == ""


@pytest.fixture
def references(tmp_path):
    write(tmp_path / "a.wav", 2)
    write(tmp_path / "b/b.wav", 3)
    path = tmp_path / "texts.tsv"
    path.write_text('file\ttext\na.wav\tAbout two seconds.\nb/b.wav\tabout four "seconds\n')
    return path


def test_references_report(pipe, references, capsys):
    folder = references.parent
    assert run(folder, "--references", references) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert len(blocks) == 3
    first = blocks[0].splitlines()
    assert first[:3] == [str(folder / "a.wav"), "  REF  About two seconds.", "  HYP  about 2 seconds"]
    assert first[3].startswith("  WER  0.0% (0 sub, 0 del, 0 ins in 3 words)   RTFx ")
    assert "  WER  33.3% (1 sub, 0 del, 0 ins in 3 words)" in blocks[1]
    assert blocks[2].startswith("All 2 recordings\n  WER  16.7% (1 sub, 0 del, 0 ins in 6 words)   CER ")
    assert "(5.0 s of audio in " in blocks[2]
    assert "on cpu, batch size 1" in blocks[2]
    assert "Whisper's English text normaliser" in blocks[2]
    assert "one warm-up are not in it" in blocks[2]


def test_references_report_with_batches_failures_and_files(pipe, references, capsys):
    folder = references.parent
    (folder / "c.wav").write_bytes(b"")
    references.write_text(references.read_text() + "c.wav\tgone\n")
    options = ["--references", references, "--batch-size", 2, "--output-dir", folder / "out", "--format", "json"]
    assert run(folder, *options) == 1
    blocks = capsys.readouterr().out.split("\n\n")
    assert "RTFx" not in blocks[0]  # the time of one recording in a batch is not known
    assert blocks[-1].startswith("All 2 recordings (1 failed and not counted)\n")
    assert json.loads((folder / "out/a.json").read_text())["text"] == "about 2 seconds"
    assert run(folder / "c.wav", "--references", references) == 1
    assert capsys.readouterr().out == "No recording was transcribed: no WER.\n"


def usage_error(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("speechllm: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("speechllm: error: ").rstrip("\n")


def test_wrong_references(pipe, references, capsys, tmp_path, monkeypatch):
    def error_with(content: bytes | str, *inputs: object) -> str:
        references.write_bytes(content.encode() if isinstance(content, str) else content)
        return usage_error(capsys, *(inputs or [tmp_path / "a.wav"]), "--references", references)

    listed = "file\ttext\na.wav\tx\n"
    assert error_with("a.wav\tx\nb.wav\ty\n") == (
        f"--references: {references}, line 2: expected the columns 'file' and 'text', got ['a.wav', 'x']"
    )
    assert "line 2: expected the columns 'file' and 'text'" in error_with("file\ttext\na.wav\n")
    assert error_with(listed + "./a.wav\ty\n") == f"--references: {references}, line 3: ./a.wav is listed twice"
    assert "cannot be read as tab-separated UTF-8 text (" in error_with(b"file\ttext\na.wav\t\xff\n")
    other = tmp_path / "b/b.wav"
    assert error_with(listed, other) == (
        f"--references: no reference for {other}; add a line for it to the references file"
    )
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"x")))
    assert (
        error_with(listed, "-") == "--references: standard input has no file name to find a reference by; pass a file"
    )
    message = usage_error(capsys, tmp_path / "a.wav", "--references", references, "--format", "srt")
    assert message == "--references prints a report; --format srt beside it needs --output-dir"
    missing = tmp_path / "none.tsv"
    assert "cannot be read as tab-separated" in usage_error(capsys, tmp_path / "a.wav", "--references", missing)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    assert 'pip install "hf-speechllm[eval]"' in error_with(listed)


def test_wrong_outputs(pipe, tmp_path, capsys):
    first, second = write(tmp_path / "a.wav", 2), write(tmp_path / "a.flac", 2)
    assert usage_error(capsys, first, second, "--format", "vtt") == (
        "--format vtt: 2 recordings need --output-dir, one file for each"
    )
    assert usage_error(capsys, first, second, "--output-dir", tmp_path) == (
        f"--output-dir: {first} and {second} would both be written to {tmp_path / 'a.txt'}"
    )


def test_wrong_standard_input(pipe, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, buffer=io.BytesIO(b"")))
    assert "-: standard input is a terminal, expected the bytes of a recording" in usage_error(capsys, "-")
    assert usage_error(capsys, "-", "-") == "-: standard input can be given only once"


def test_wrong_models(pipe, tmp_path, capsys, monkeypatch):
    recording = write(tmp_path / "a.wav", 2)
    assert usage_error(capsys, recording, "--device", "gpu") == (
        "--device: expected cpu, cuda, cuda:0, mps or the like, got 'gpu'"
    )
    assert usage_error(capsys, recording, "--device", "cuda:99").startswith("--device: cuda:99 cannot be used (")
    for name in ("./none", "run/llm/final"):
        assert usage_error(capsys, recording, "--model", name) == f"--model: no such folder: {name}"
    assert usage_error(capsys, recording, "--model", recording) == (
        f"--model: expected the folder of a model or a Hub id, got the file {recording}"
    )

    def refuse(*arguments, **options):
        raise OSError("no such\nmodel")

    install(monkeypatch, FakePipeline("ctc"))
    message = "is a pure CTC model, which takes none of --mode, --ctc-weight, --num-beams and --generate; drop them"
    assert usage_error(capsys, recording, "--num-beams", 2) == f"some/model {message}"
    assert run(recording) == 0
    capsys.readouterr()
    broken = install(monkeypatch, FakePipeline())
    monkeypatch.setattr(broken, "forward", refuse)
    message = "some/model does not work with these options (OSError: no such model)"
    assert usage_error(capsys, recording) == message
    monkeypatch.setattr(cli, "pipeline", refuse)
    assert usage_error(capsys, recording) == (
        "--model: no such folder: some/model; as a Hub id it cannot be loaded either (OSError: no such model)"
    )
    assert usage_error(capsys, recording, "--model", tmp_path) == (
        f"--model: {tmp_path} cannot be loaded (OSError: no such model)"
    )


@pytest.mark.parametrize(
    ("options", "model_type", "expected"),
    [
        ([], "speechllm", True),
        (["--mode", "joint"], "speechllm", True),
        (["--mode", "rescoring"], "speechllm", False),
        (["--generate", '{"mode": "ctc_beam"}'], "speechllm", False),
        ([], "whisper", False),
    ],
)
def test_an_adapter_is_merged_where_nothing_needs_the_plain_language_model(
    options, model_type, expected, tmp_path, monkeypatch
):
    fake = install(monkeypatch, FakePipeline(model_type=model_type))
    assert run(write(tmp_path / "a.wav", 2), *options) == 0
    assert fake.is_merged == expected


def test_default_model(pipe, tmp_path, capsys, monkeypatch):
    recording = write(tmp_path / "a.wav", 2)
    monkeypatch.setattr(cli, "default_model", lambda: "assembled/folder")
    assert cli.main(["transcribe", str(recording)]) == 0
    assert pipe.loaded[1] == "assembled/folder"
    capsys.readouterr()

    def refuse():
        raise RuntimeError("no wheel")

    monkeypatch.setattr(cli, "default_model", refuse)
    assert cli.main(["transcribe", str(recording)]) == 2
    expected = "speechllm: error: the default model cannot be assembled (RuntimeError: no wheel)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: FILE|DIR|-"),
        (["a", "--num-beams", "0"], "argument --num-beams: expected a whole number of at least 1, got '0'"),
        (["a", "--batch-size", "1.5"], "argument --batch-size: expected a whole number of at least 1, got '1.5'"),
        (["a", "--ctc-weight", "-0.1"], "argument --ctc-weight: expected a number of at least 0, got '-0.1'"),
        (["a", "--ctc-weight", "nan"], "argument --ctc-weight: expected a number of at least 0, got 'nan'"),
        (["a", "--ctc-weight", "much"], "argument --ctc-weight: expected a number of at least 0, got 'much'"),
        (["a", "--format", "doc"], "argument --format: invalid choice: 'doc'"),
        (["a", "--mod", "ctc_greedy"], "unrecognized arguments: --mod"),
        (
            ["a", "--mode", "greedy"],
            "argument --mode: invalid choice: 'greedy' (choose from 'joint', 'llm', 'ctc_greedy'",
        ),
        (["a", "--generate", "{"], "argument --generate: expected a JSON object, got '{'"),
        (["a", "--generate", "[]"], "argument --generate: expected a JSON object, got '[]'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["transcribe", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_interrupt(pipe, tmp_path, capsys, monkeypatch):
    def interrupt(batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "forward", interrupt)
    assert run(write(tmp_path / "a.wav", 2)) == 130
    assert capsys.readouterr().err == "speechllm: interrupted\n"


def test_interrupt_says_what_is_kept(pipe, tmp_path, capsys, monkeypatch):
    def interrupt_long_ones(batch):
        if any(len(waveform) > 2.5 * RATE for waveform in batch):
            raise KeyboardInterrupt
        return [{"text": "short"} for _ in batch]

    monkeypatch.setattr(pipe, "forward", interrupt_long_ones)
    first, second = write(tmp_path / "a.wav", 2), write(tmp_path / "b.wav", 3)
    assert run(first, second, "--format", "json", "--output-dir", tmp_path / "out") == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.json"]
    assert "interrupted; the transcripts of 1 of 2 recordings are complete" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["ctc_greedy", "rescoring"])
def test_the_warm_up_of_a_model_that_searches_labels_bounds_no_tokens(pipe, tmp_path, mode):
    """They would be passed over with a warning about an option that nobody gave."""
    pipe.model.generation_config.mode = mode
    assert run(write(tmp_path / "a.wav", 2)) == 0
    assert pipe.calls[0]["generate_kwargs"] is None


def test_closed_output(capsys, monkeypatch):
    def print_into_closed_pipe(arguments):
        raise BrokenPipeError

    redirected = []
    monkeypatch.setattr(cli, "run_transcribe", print_into_closed_pipe)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(fileno=lambda: 1))
    monkeypatch.setattr(os, "dup2", lambda source, target: redirected.append(target))
    assert cli.main(["transcribe", "a.wav"]) == 1
    assert redirected == [1]
    assert capsys.readouterr().err == ""


def test_as_a_process():
    command = [sys.executable, "-m", "hf_speechllm.cli", "transcribe", "x.wav", "--format", "doc"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "speechllm transcribe: error: argument --format: invalid choice: 'doc'" in result.stderr


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="holes in the heap are a matter of glibc")
def test_holes_between_what_is_kept_go_back_to_the_system():
    kept = [np.ones(100_000, np.uint8) for _ in range(1000)]  # too small for pages of their own
    before = resident_mib()
    del kept[:-1]  # the last one holds the heap up
    _return_free_memory()
    assert resident_mib() < before - 50
