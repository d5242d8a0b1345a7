"""A saved model works in a process that has never seen this package (`trust_remote_code=True`), and with both."""

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import lively, tiny_model, tiny_processor
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

import hf_speechllm

PACKAGE = Path(hf_speechllm.__file__).parent
HUB_MODULES = ("modeling_speechllm", "processing_speechllm", "configuration_speechllm", "pipeline_speechllm")
TASK = "automatic-speech-recognition"
CLIP = (0.3 * np.sin(np.arange(24_000) * 0.2)).astype(np.float32)

# sys.argv = [mode, folder of the model, folder for a second save].
SCRIPT = """
import json, sys
import numpy as np
import torch

mode, folder, second_folder = sys.argv[1:]
if mode == "trust":
    sys.modules["hf_speechllm"] = None  # importing it raises
else:
    import hf_speechllm
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

clip = (0.3 * np.sin(np.arange(24_000) * 0.2)).astype(np.float32)
trust = {"trust_remote_code": True}
result = {}
if mode == "trust":
    try:
        import hf_speechllm
    except ImportError:
        result["imported"] = False
    try:
        pipeline("automatic-speech-recognition", model=folder, trust_remote_code=False)
    except ValueError as error:
        result["without_trust"] = str(error)
pipe = pipeline("automatic-speech-recognition", model=folder, **trust)
result["pipeline"] = [type(pipe).__module__, type(pipe).__name__, pipe.type]
result["texts"] = [output["text"] for output in pipe([clip, clip[:16_000]], batch_size=2)]
result["chunks"] = pipe(clip, return_timestamps=True, ctc_weight=0.9, chunk_length_s=0.6)["chunks"]

config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, **trust)
result["classes"] = {type(each).__name__: type(each).__module__ for each in (config, processor, model)}
result["prompt"] = [processor.prompt_before, processor.prompt_after, config.prompt_before_ids]
inputs = processor(clip, sampling_rate=16_000)
result["generate"] = processor.batch_decode(model.generate(**inputs))
with torch.no_grad():
    result["logits"] = model(**inputs).logits.double().sum().item()

model.save_pretrained(second_folder)
processor.save_pretrained(second_folder)
again = pipeline("automatic-speech-recognition", model=second_folder, **trust)
result["texts_again"] = [output["text"] for output in again([clip, clip[:16_000]], batch_size=2)]
print("RESULT " + json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "speechllm-tiny"
    model = lively(tiny_model())
    model.generation_config.ctc_weight = 0.5
    model.generation_config.num_beams = 1
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> dict[str, dict]:
    """What SCRIPT found: in a process that cannot import the package, and in this one, which has."""
    work = tmp_path_factory.mktemp("elsewhere")
    script = work / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_MODULES_CACHE=str(work / "modules"), HF_HUB_OFFLINE="1")
    command = [sys.executable, str(script), "trust", str(folder), str(work / "second-trust")]
    process = subprocess.Popen(
        command, cwd=work, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    outputs = {"both": io.StringIO()}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(outputs["both"]):
        patch.setattr(sys, "argv", ["script.py", "both", str(folder), str(work / "second-both")])
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(work / "modules-both"))
        exec(compile(SCRIPT, "script.py", "exec"), {"__name__": "__main__"})
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    found = {
        mode: json.loads(text.split("RESULT ", 1)[1])
        for mode, text in (("trust", stdout), ("both", outputs["both"].getvalue()))
    }
    for mode, result in found.items():
        result["second_folder"] = work / f"second-{mode}"
    return found


@pytest.fixture(scope="module")
def expected(folder) -> dict:
    """The same, in this process, where the package is imported and no remote code is trusted."""
    pipe = pipeline(TASK, model=str(folder))
    assert type(pipe) is hf_speechllm.SpeechLLMPipeline
    inputs = tiny_processor()(CLIP, sampling_rate=16_000)
    with torch.no_grad():
        logits = pipe.model(**inputs).logits.double().sum().item()
    return {
        "texts": [output["text"] for output in pipe([CLIP, CLIP[:16_000]], batch_size=2)],
        "chunks": pipe(CLIP, return_timestamps=True, ctc_weight=0.9, chunk_length_s=0.6)["chunks"],
        "generate": tiny_processor().batch_decode(pipe.model.generate(**inputs)),
        "logits": logits,
    }


def test_auto_classes_give_our_classes_once_the_package_is_imported(folder):
    assert type(AutoConfig.from_pretrained(folder)) is hf_speechllm.SpeechLLMConfig
    assert type(AutoProcessor.from_pretrained(folder)) is hf_speechllm.SpeechLLMProcessor
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    assert type(model) is hf_speechllm.SpeechLLMForConditionalGeneration
    assert model.generation_config.ctc_weight == 0.5, "decoding options of ours were lost"


def test_process_without_the_package_is_asked_for_trust(results):
    assert results["trust"]["imported"] is False
    assert "trust_remote_code=True" in results["trust"]["without_trust"]


def test_remote_code_is_used_where_the_package_cannot_be_imported(results):
    module, name, kind = results["trust"]["pipeline"]
    assert module.startswith("transformers_modules.") and (name, kind) == ("SpeechLLMPipeline", "seq2seq")
    assert set(results["trust"]["classes"]) == {
        "SpeechLLMConfig",
        "SpeechLLMProcessor",
        "SpeechLLMForConditionalGeneration",
    }
    assert all(module.startswith("transformers_modules.") for module in results["trust"]["classes"].values())


def test_the_package_is_used_where_it_is_imported_even_if_remote_code_is_trusted(results):
    assert results["both"]["pipeline"] == ["hf_speechllm.pipeline_speechllm", "SpeechLLMPipeline", "seq2seq"]
    assert all(module.startswith("hf_speechllm.") for module in results["both"]["classes"].values())


@pytest.mark.parametrize("mode", ["trust", "both"])
def test_text_times_and_logits_are_the_same_with_remote_code_and_with_the_package(results, expected, mode):
    assert all(expected["texts"]) and len(expected["chunks"]) > 1
    for name in ("texts", "generate"):
        assert results[mode][name] == expected[name]
    assert results[mode]["chunks"] == json.loads(json.dumps(expected["chunks"]))
    assert results[mode]["logits"] == expected["logits"]
    assert results[mode]["prompt"] == ["<s>", "</s><s>", [1]]


@pytest.mark.parametrize("mode", ["trust", "both"])
def test_a_loaded_model_can_be_saved_again_with_its_code(results, expected, folder, mode):
    second_folder = results[mode]["second_folder"]
    assert results[mode]["texts_again"] == expected["texts"]
    assert code_files(second_folder) == code_files(folder)
    for name in ("config.json", "processor_config.json", "generation_config.json"):
        first, second = (json.loads((each / name).read_text()) for each in (folder, second_folder))
        assert second.get("auto_map") == first.get("auto_map")
        assert second.get("custom_pipelines") == first.get("custom_pipelines")


def code_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def relative_imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


def import_closure() -> set[str]:
    """The modules that the Hub modules need, themselves included."""
    closure, unseen = set(), set(HUB_MODULES)
    while unseen:
        module = unseen.pop()
        closure.add(module)
        unseen |= relative_imports(module) - closure
    return closure


def test_saved_code_is_the_import_closure_of_the_hub_modules(folder):
    saved = code_files(folder)
    assert set(saved) == {f"{module}.py" for module in import_closure()}
    assert all((PACKAGE / name).read_text() == text for name, text in saved.items())


@pytest.mark.parametrize("module", sorted(import_closure()))
def test_hub_modules_import_each_other_by_relative_name_only(module):
    # transformers' loader understands `from .file import Name`, at the top level of a flat folder.
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "hf_speechllm" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "hf_speechllm", "absolute import of the package"
            assert node.level <= 1 and node.module is not None, "`from . import x` or a parent package"
            assert node.level == 0 or "." not in node.module, "sub-package"


def test_hub_modules_load_neither_base_weights_nor_the_command_line():
    assert not import_closure() & {"base_models", "assembly", "default_model", "cli", "metrics", "data_collator"}


def test_config_json_names_the_remote_classes_and_the_pipeline(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_speechllm.SpeechLLMConfig",
        "AutoModelForSpeechSeq2Seq": "modeling_speechllm.SpeechLLMForConditionalGeneration",
    }
    assert config["custom_pipelines"][TASK]["impl"] == "pipeline_speechllm.SpeechLLMPipeline"
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_speechllm.SpeechLLMProcessor"}
