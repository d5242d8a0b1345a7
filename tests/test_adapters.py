"""A LoRA that stays an adapter: saved beside the weights, loaded with them, switched off for the plain LLM."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from tiny_models import lively, noise, tiny_config, tiny_model, tiny_processor
from transformers import AutoModelForSpeechSeq2Seq, pipeline
from transformers.pytorch_utils import Conv1D

from hf_speechllm import CausalLMScorer
from hf_speechllm.adapters import adapters_disabled, has_adapters, lora_target_pattern, merge_adapters
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from training.arguments import TuningArguments
from training.train import set_trainable

TASK = "automatic-speech-recognition"
LM_TARGETS = r"language_model\..*\.(q_proj|down_proj)"
REPO_ID = "someone/speech-llm"
CLIP = noise(1.2)[0]


def randomise_lora(model, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)


def lora_model(text: str = "llama", targets: str = LM_TARGETS, **config):
    """A tiny model with random LoRA in its language model."""
    model = lively(tiny_model(text=text))
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets, **config))
    randomise_lora(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_processor()([CLIP, CLIP[:9000]], sampling_rate=16_000)).logits


def reload(folder):
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


# Saving and loading.


def test_checkpoint_holds_plain_weights_and_the_adapter_beside_them(tmp_path):
    lora_model().save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_model().state_dict())
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 2
    assert all(name.startswith("base_model.model.language_model.model.layers.") for name in adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert config["base_model_name_or_path"] is None and config["inference_mode"] is True
    assert config["target_modules"] == r"(language_model)\..*\.(down_proj|q_proj)"


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_reloaded_model_is_the_saved_one_with_its_adapter_and_without(tmp_path, text, max_shard_size):
    model = lora_model(text, LM_TARGETS if text == "llama" else r"language_model\..*\.attn\.c_proj")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "50GB")
    loaded = reload(tmp_path)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))
    plain = lively(tiny_model(text=text))
    assert not torch.allclose(logits(loaded), logits(plain), atol=0.05)
    with loaded.plain_language_model():
        assert torch.equal(logits(loaded), logits(plain))


def test_saving_again_writes_the_same_files(tmp_path):
    model = lora_model()
    model.save_pretrained(tmp_path / "model")
    first = contents(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model") == first
    reload(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again").keys() == first.keys()
    for name in ("model.safetensors", "adapter_model.safetensors"):
        weights, expected = (load_file(tmp_path / folder / name) for folder in ("again", "model"))
        assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text()) == json.loads(first["adapter_config.json"])


def add_to_model(model):
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=LM_TARGETS))


def add_as_training_does(model):
    tuning = TuningArguments(llm="lora", lora_r=2, lora_alpha=6, lora_targets="q_proj|down_proj")
    set_trainable(model, tuning)


def add_to_language_model(model):
    model.language_model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules={"q_proj", "down_proj"}))


def add_to_one_layer_of_the_language_model(model):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"])
    inject_adapter_in_model(lora, model.language_model)


@pytest.mark.parametrize(
    "add", [add_to_model, add_as_training_does, add_to_language_model, add_to_one_layer_of_the_language_model]
)
def test_adapter_is_saved_with_the_model_wherever_it_was_added(add, tmp_path):
    # The encoder has a `q_proj` too.
    model = lively(tiny_model())
    add(model)
    randomise_lora(model)
    model.eval().save_pretrained(tmp_path)
    loaded = reload(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded), logits(model))
    with loaded.plain_language_model(), model.plain_language_model():
        assert torch.equal(logits(loaded), logits(model))


def test_tied_embeddings_are_saved_once_and_tied_again(tmp_path):
    config = tiny_config()
    config.text_config.tie_word_embeddings = True
    tied = lively(SpeechLLMForConditionalGeneration(config))
    assert tied.language_model.lm_head.weight is tied.get_input_embeddings().weight
    tied.add_adapter(LoraConfig(r=2, target_modules=r"language_model\..*\.q_proj"))
    randomise_lora(tied)
    tied.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert "language_model.lm_head.weight" not in saved and "language_model.model.embed_tokens.weight" in saved
    loaded = reload(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(tied.eval()))


def test_adapter_of_an_earlier_save_is_removed(tmp_path):
    lora_model().save_pretrained(tmp_path)
    plain = lively(tiny_model(seed=3))
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_*"))
    assert torch.equal(logits(reload(tmp_path)), logits(plain))


def test_model_without_adapter_is_saved_as_transformers_does(tmp_path):
    lively(tiny_model()).save_pretrained(tmp_path, max_shard_size="20KB", variant="half")
    assert not list(tmp_path.glob("adapter_*")) and (tmp_path / "model.safetensors.index.half.json").exists()


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("remove", [lambda model: model.delete_adapter("default"), merge_adapters])
def test_model_is_saved_without_an_adapter_that_was_removed(remove, is_loaded, tmp_path):
    model = lora_model()
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = reload(tmp_path)
    remove(model)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_*"))
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_model().state_dict())
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_state_dict_argument_is_what_is_saved(tmp_path):
    model = lora_model()
    state = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = reload(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_only_the_main_process_writes_the_adapter(tmp_path):
    lora_model().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_active_one_of_two_adapters_is_saved(tmp_path):
    model = lora_model()
    model.add_adapter(LoraConfig(r=2, target_modules=r"language_model\..*\.v_proj"), "other")
    randomise_lora(model, seed=2)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    loaded = reload(tmp_path)
    assert not any("v_proj.lora_" in name for name in loaded.state_dict())
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_saving_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = lora_model()
    before, expected = dict(vars(model.peft_config["default"])), logits(model)
    with model.plain_language_model():
        model.save_pretrained(tmp_path / "a")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "b")
    assert vars(model.peft_config["default"]) == before and model._hf_peft_config_loaded
    assert torch.equal(logits(model), expected) and torch.equal(logits(reload(tmp_path / "a")), expected)


def test_saving_and_loading_ask_nothing_of_the_hub_and_warn_of_nothing(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("looked up on the Hub")

    model = lora_model()
    model.peft_config["default"].base_model_name_or_path = REPO_ID
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        reload(tmp_path)


def merged(model):
    next(layer for layer in model.modules() if isinstance(layer, LoraLayer)).merge()


def both_active(model):
    model.add_adapter(LoraConfig(r=2, target_modules=LM_TARGETS), "other")
    model.set_adapter(["default", "other"])


def offloaded(model):
    model.ctc_head.to("meta")


def two_places(model):
    model.audio_tower.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (merged, r"adapter of language_model\.model\.layers\.0\.self_attn\.q_proj is merged .*unmerge it"),
        (both_active, r"One adapter can be saved with a model, got \['default', 'other'\]; choose it with set_adapter"),
        (offloaded, r"ctc_head\..* is offloaded; load the model without offloading"),
        (two_places, r"One part of a model can have adapters, got \['the model', 'audio_tower'\]"),
    ],
)
def test_adapters_that_do_not_fit_into_a_checkpoint_are_refused(change, message, tmp_path):
    model = lora_model()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=r"language_model\..*\.k_proj", feedforward_modules=[]), "got IA3Config"),
        (LoraConfig(target_modules=LM_TARGETS, modules_to_save=["ctc_head"]), "got LoraConfig with modules_to_save"),
    ],
    ids=["IA3", "modules_to_save"],
)
def test_adapter_must_be_lora_on_linear_layers(config, message, tmp_path):
    model = tiny_model()
    model.add_adapter(config)
    with pytest.raises(ValueError, match=f"must be LoRA on linear layers, {message}"):
        model.save_pretrained(tmp_path)


# To the Hub.


@pytest.fixture
def uploads(monkeypatch) -> list[dict[str, bytes]]:
    """The files of each commit to a Hub that accepts everything."""
    commits = []

    def create_commit(operations, repo_id, **_):
        assert repo_id == REPO_ID
        commits.append({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=f"someone/{repo_id}"), create_commit=create_commit
    )
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: api)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: card)
    return commits


@pytest.mark.parametrize("push", ["save_pretrained", "push_to_hub"])
def test_adapter_on_the_hub_names_its_own_repository(push, uploads, tmp_path):
    model = lora_model()
    for _ in range(2):
        if push == "save_pretrained":
            model.save_pretrained(tmp_path, push_to_hub=True, repo_id="speech-llm")
        else:
            model.push_to_hub("speech-llm")
    for files in uploads:
        assert {"config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == REPO_ID
    assert len(uploads) == 2


def test_model_without_adapter_is_uploaded_without_one(uploads):
    tiny_model().push_to_hub("speech-llm")
    assert "model.safetensors" in uploads[0] and not any(name.startswith("adapter_") for name in uploads[0])


# A process that has neither this package nor more than the folder, or a repository in its cache.
SCRIPT = """
import json, sys
import numpy as np
import torch

sys.modules["hf_speechllm"] = None  # importing it raises
from transformers import pipeline

clip = np.load(sys.argv[1])
result = {}
for model in sys.argv[2:]:
    pipe = pipeline("automatic-speech-recognition", model=model, trust_remote_code=True)
    inputs = pipe.processor(clip, sampling_rate=16_000)
    with torch.no_grad():
        logits = [pipe.model(**inputs).logits.double().sum().item()]
        with pipe.model.plain_language_model():
            logits.append(pipe.model(**inputs).logits.double().sum().item())
    result[model] = [type(pipe.model).__module__.split(".")[0], pipe(clip)["text"], logits]
print("RESULT " + json.dumps(result))
"""


def test_remote_code_loads_the_adapter_from_a_folder_and_from_a_repository(tmp_path, uploads):
    model = lora_model()
    model.generation_config.ctc_weight = 0.5
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    pipe = pipeline(TASK, model=str(folder))
    inputs = tiny_processor()(CLIP, sampling_rate=16_000)
    with torch.no_grad():
        expected = [pipe.model(**inputs).logits.double().sum().item()]
        with pipe.model.plain_language_model():
            expected.append(pipe.model(**inputs).logits.double().sum().item())
    assert expected[0] != expected[1]
    # The cache of a download from the Hub.
    repository = tmp_path / "hub" / f"models--{REPO_ID.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    model.push_to_hub("speech-llm")
    for name, data in uploads[0].items():
        (repository / "snapshots" / commit / name).write_bytes(data)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    np.save(tmp_path / "clip.npy", CLIP)
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["HF_HUB_CACHE"] = str(tmp_path / "hub")
    command = [sys.executable, "script.py", "clip.npy", str(folder), REPO_ID]
    process = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.split("RESULT ", 1)[1])
    for source in (str(folder), REPO_ID):
        assert result[source] == ["transformers_modules", pipe(CLIP)["text"], expected]


# The plain language model.


def test_plain_language_model_is_that_without_adapter():
    model, plain = lora_model(), lively(tiny_model())
    with_adapter = logits(model)
    ids = torch.arange(6)[None]
    with torch.no_grad(), model.plain_language_model():
        assert torch.equal(model.language_model(ids).logits, plain.language_model(ids).logits)
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), with_adapter)


def test_plain_language_model_nests_and_ends_with_an_exception():
    model = lora_model()
    with_adapter = logits(model)
    with pytest.raises(KeyError), model.plain_language_model():
        plain = logits(model)
        with model.plain_language_model():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain) and not torch.allclose(plain, with_adapter, atol=0.05)
        raise KeyError
    assert torch.equal(logits(model), with_adapter)


def test_plain_language_model_leaves_adapters_that_were_off_switched_off():
    model = lora_model()
    model.disable_adapters()
    plain = logits(model)
    with model.plain_language_model():
        pass
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("trainable", [False, True])
def test_plain_language_model_does_not_change_what_is_trained(trainable):
    model = lora_model()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and "lora_A" in name)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with model.plain_language_model():
        pass
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_adapter_of_the_encoder_stays_on():
    model = lora_model(targets=r".*\.q_proj")
    audio_tower_on = logits(model)
    merge_adapters(model.language_model)
    assert any("lora_" in name for name in model.audio_tower.state_dict())
    torch.testing.assert_close(logits(model), audio_tower_on, atol=1e-4, rtol=1e-4)
    with model.plain_language_model():
        torch.testing.assert_close(logits(model), audio_tower_on, atol=1e-4, rtol=1e-4)


def test_plain_language_model_of_a_model_without_adapters_is_itself():
    model = lively(tiny_model())
    with model.plain_language_model():
        plain = logits(model)
    assert torch.equal(logits(model), plain)


# Merging, layer patterns.


def test_merged_for_good_it_decodes_the_same_and_no_longer_combines_with_itself():
    model = lora_model()
    processor = tiny_processor()
    inputs = processor([CLIP, CLIP[:9000]], sampling_rate=16_000)
    options = {"tokenizer": processor.tokenizer, "lm_weight": 0.3}
    joint = {"ctc_weight": 0.4, "num_beams": 3, "max_new_tokens": 8}
    before, combined = model.generate(**inputs, **joint), model.generate(**inputs, mode="rescoring", **options)
    other = CausalLMScorer(lora_model().language_model, processor.tokenizer)
    with adapters_disabled(other.model):
        by_other = model.generate(**inputs, mode="rescoring", lm=other, **options)
    assert torch.equal(by_other, combined)
    model.merge_adapter()
    model.merge_adapter()  # nothing is left to do, and what is lost stays lost
    assert not has_adapters(model)
    assert torch.equal(model.generate(**inputs, **joint), before)
    for mode in ("rescoring", "label_fusion", "delayed_fusion"):
        with pytest.raises(ValueError, match=f"mode='{mode}' needs the language model without its adapter.*give lm="):
            model.generate(**inputs, mode=mode, **options)
    with adapters_disabled(other.model):
        assert torch.equal(model.generate(**inputs, mode="rescoring", lm=other, **options), combined)
    plain = lively(tiny_model())
    expected = plain.generate(**inputs, mode="rescoring", **options)
    plain.merge_adapter()  # there is none
    assert torch.equal(plain.generate(**inputs, mode="rescoring", **options), expected)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_merged_weights_are_the_formula_of_the_paper(text, rslora, tmp_path):
    targets = r"language_model\..*\.(c_attn|c_fc)" if text == "gpt2" else LM_TARGETS
    model = lora_model(text, targets, use_rslora=rslora, fan_in_fan_out=text == "gpt2")
    lora = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    expected = dict(lively(tiny_model(text=text)).state_dict())
    layers = sorted({name.partition(".lora_")[0] for name in lora})
    scaling = 5 / 3**0.5 if rslora else 5 / 3
    for layer in layers:
        update = scaling * lora[f"{layer}.lora_B.default.weight"] @ lora[f"{layer}.lora_A.default.weight"]
        is_transposed = isinstance(model.get_submodule(layer).get_base_layer(), Conv1D)
        assert is_transposed == (text == "gpt2")
        expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + (update.T if is_transposed else update)
    with_adapter = logits(model)
    merge_adapters(model)
    assert model.state_dict().keys() == expected.keys() and not model._hf_peft_config_loaded
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model), with_adapter, atol=1e-3, rtol=1e-3)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_*"))
    assert torch.equal(logits(reload(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("llama", r"language_model\..*\.(q_proj|v_proj|gate_proj)"),
        ("llama", r"language_model\..*\.layers\.1\.self_attn\.(q_proj|v_proj)"),
        ("llama", r"(language_model\.lm_head|.*\.q_proj)"),
        ("llama", r".*\.q_proj"),
        ("gpt2", r"language_model\..*\.attn\.c_proj"),
    ],
)
def test_pattern_selects_the_layers_and_no_others(text, expression):
    model = tiny_model(text=text)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    layers = [name for name in names if re.fullmatch(expression, name)]
    assert 0 < len(layers) < len(names)
    model.add_adapter(LoraConfig(target_modules=lora_target_pattern(model, layers), fan_in_fan_out=text == "gpt2"))
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(layers)


# Types and devices.


def floating_types(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("arguments", [{}, {"device_map": "cpu"}], ids=str)
def test_adapter_has_the_type_that_the_model_is_loaded_in(arguments, tmp_path):
    lora_model().save_pretrained(tmp_path)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=torch.bfloat16, **arguments)
    assert any("lora_" in name for name, _ in model.named_parameters())
    assert floating_types(model) == {torch.bfloat16}
    inputs = tiny_processor()(CLIP, sampling_rate=16_000)
    assert model.generate(**inputs, num_beams=2, max_new_tokens=3).shape[1] > 0
    with model.plain_language_model():
        assert model.generate(**inputs, max_new_tokens=3).shape[1] > 0


def test_adapter_of_another_type_than_the_weights_can_be_used_and_saved(tmp_path):
    model = lora_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert floating_types(model) == {torch.bfloat16, torch.float32}
    inputs = tiny_processor()(CLIP, sampling_rate=16_000)
    assert model.generate(**inputs, num_beams=2, max_new_tokens=3).shape[1] > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=torch.float32)
    assert floating_types(loaded) == {torch.float32}
