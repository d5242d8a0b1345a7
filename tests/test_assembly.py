"""From a few trained weights and two base models to a checkpoint; the default model in the cache."""

import importlib
import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXT_CONFIGS, feature_extractor, lively, tiny_model, tiny_processor, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    MoonshineConfig,
    MoonshineModel,
)
from transformers.pytorch_utils import Conv1D

import hf_speechllm
from hf_speechllm.assembly import assemble, load_trained_parts, load_trained_weights, resolve_model
from hf_speechllm.bpe_subset import restrict_merges
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from training.arguments import DataArguments, ModelArguments, Stage, TuningArguments
from training.checkpoints import save_trained
from training.model_building import build_model, recipe
from training.train import named_now, set_trainable

# As an attribute of the package, this name is the function.
default_model_module = importlib.import_module("hf_speechllm.default_model")
PROMPT = {"prompt_before": "<s>", "prompt_after": "</s><s>"}


def randomise(model, scale: float = 0.1, seed: int = 1) -> None:
    """Other values for everything that would be trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("audio_model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {f"{side}_num_attention_heads": 2 for side in ("encoder", "decoder")}
    config = MoonshineConfig(**sizes, **heads, encoder_num_hidden_layers=3, decoder_num_hidden_layers=1)
    lively(MoonshineModel(config)).save_pretrained(folder)
    feature_extractor("moonshine").save_pretrained(folder)
    return str(folder)


def language_model_folder(folder: Path, text: str = "llama", **overrides) -> str:
    torch.manual_seed(0)
    values = {**TEXT_CONFIGS[text], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64}
    config = AutoConfig.for_model(values.pop("model_type"), **{**values, **overrides})
    lively(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_parts(folder: Path, model, names: set[str], arguments: ModelArguments, tuning: TuningArguments) -> None:
    """Writes what `training.train.run` leaves."""
    folder.mkdir()
    save_trained(model, names, folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    stage = Stage("main", arguments, tuning, DataArguments(), None, {}, None, {})
    (folder / "recipe.json").write_text(json.dumps(recipe(stage, model)))


def trained_folder(
    folder: Path, audio_model: str, language_model: str, tunings: list[TuningArguments], llm_units: str = "ctc"
):
    """Trains (with random numbers) as `tunings` say, one after the other; the model, its processor and the parts."""
    config = {"downsampling": 2, **PROMPT}
    arguments = ModelArguments(audio_model, language_model, ctc_subset_size=30, llm_units=llm_units, config=config)
    model, processor = build_model(arguments)
    names = set()
    for seed, tuning in enumerate(tunings):
        set_trainable(model, tuning)
        randomise(model, seed=seed)
        names = named_now(model, names)
        names |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.generation_config.ctc_weight = 0.25
    save_parts(folder, model, names, arguments, tunings[-1])
    return model.eval(), processor


@pytest.fixture(scope="module")
def trained(audio_folder, tmp_path_factory):
    """Folder of trained parts, the model it came from, its processor."""
    root = tmp_path_factory.mktemp("trained")
    tuning = TuningArguments(encoder="full", encoder_layers=1, llm="lora", lora_r=3, lora_alpha=5)
    language_model = language_model_folder(root / "language_model")
    model, processor = trained_folder(root / "parts", audio_folder, language_model, [tuning])
    return root / "parts", model, processor


def outputs(model, processor) -> tuple[torch.Tensor, torch.Tensor]:
    waveform = torch.sin(torch.arange(16_000) * 0.2).numpy()
    inputs = processor([waveform], text=["the thing"], sampling_rate=16_000)
    with torch.no_grad():
        output = model(**inputs)
    return output.logits, output.audio.ctc_log_probs


# load_trained_weights.


def layer_names(model, leaves: str) -> list[str]:
    return [name for name, _ in model.language_model.named_modules(prefix="language_model") if re.search(leaves, name)]


def random_lora(model, layers: list[str], rank: int = 3) -> dict[str, torch.Tensor]:
    """LoRA weights of these layers by the names that training gives them, in float16 as they are shared."""
    trained = {}
    for layer in layers:
        weight = model.get_submodule(layer).weight
        outputs, inputs = weight.T.shape if isinstance(model.get_submodule(layer), Conv1D) else weight.shape
        trained[f"{layer}.lora_A.default.weight"] = 0.5 * torch.randn(rank, inputs).half()
        trained[f"{layer}.lora_B.default.weight"] = 0.5 * torch.randn(outputs, rank).half()
    return trained


@pytest.mark.parametrize(
    ("text", "leaves"),
    [
        ("llama", r"\.(q_proj|v_proj|down_proj)$"),
        ("llama", r"1\.self_attn\.q_proj$"),
        ("qwen2", r"\.(q_proj|lm_head)$"),
        ("gpt2", r"\.(c_attn|c_fc)$"),
        ("gpt2", r"\.attn\.c_proj$"),
    ],
)
def test_loaded_lora_acts_as_the_formula_says_and_can_be_switched_off(text, leaves):
    model, expected = lively(tiny_model(text=text)), lively(tiny_model(text=text))
    processor = tiny_processor()
    plain_logits, _ = outputs(model, processor)
    trained = random_lora(model, layers := layer_names(model, leaves))
    load_trained_weights(model, trained, lora_scaling=0.5)
    with torch.no_grad():
        for layer in layers:
            a, b = (trained[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
            module = expected.get_submodule(layer)
            module.weight += 0.5 * (b @ a).T if isinstance(module, Conv1D) else 0.5 * b @ a
    logits, _ = outputs(model, processor)
    torch.testing.assert_close(logits, outputs(expected, processor)[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, plain_logits, atol=0.05)
    with model.plain_language_model():
        assert torch.equal(outputs(model, processor)[0], plain_logits)
    assert model.active_adapters() == ["default"]


def test_weights_below_a_lora_are_loaded_if_they_were_trained_too():
    model, expected = lively(tiny_model()), lively(tiny_model())
    layer = "language_model.model.layers.0.self_attn.q_proj"
    trained = random_lora(model, [layer])
    trained[f"{layer}.base_layer.weight"] = torch.randn_like(model.get_submodule(layer).weight)
    load_trained_weights(model, trained, lora_scaling=2.0)
    expected.get_submodule(layer).weight.data = trained[f"{layer}.base_layer.weight"]
    with model.plain_language_model():
        assert torch.equal(outputs(model, tiny_processor())[0], outputs(expected, tiny_processor())[0])


def test_without_lora_there_is_no_adapter_and_the_types_stay():
    model = tiny_model().to(torch.bfloat16)
    bias = torch.ones_like(model.ctc_head.linear.bias, dtype=torch.float32)
    load_trained_weights(model, {"ctc_head.linear.bias": bias}, lora_scaling=1.0)
    assert model.ctc_head.linear.bias.dtype == torch.bfloat16 and bool((model.ctc_head.linear.bias == 1).all())
    assert not model._hf_peft_config_loaded and not hasattr(model, "peft_config")


Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"  # 24 -> 24
V_PROJ = "language_model.model.layers.0.self_attn.v_proj"  # 24 -> 12


def lora_of_shapes(layer: str, a: tuple[int, int] | None, b: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    shapes = {f"{layer}.lora_A.default.weight": a, f"{layer}.lora_B.default.weight": b}
    return {name: torch.ones(shape) for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (lora_of_shapes(Q_PROJ, (2, 24), None), r"'.*q_proj.lora_B.default.weight' is missing beside '.*lora_A"),
        (lora_of_shapes(Q_PROJ, None, (24, 2)), r"'.*q_proj.lora_A.default.weight' is missing beside '.*lora_B"),
        ({"y.weight": torch.ones(4, 6)}, "'y.weight' has no place in this model; is the recipe of another one"),
        (lora_of_shapes("y", (2, 24), (24, 2)), "'y.lora_A.default.weight' has no place in this model"),
        (
            {f"{Q_PROJ}.weight": torch.ones(6, 4)},
            r"q_proj.weight' has the shape \(6, 4\), in the model it is \(24, 24\)",
        ),
        (
            lora_of_shapes(Q_PROJ, (2, 25), (24, 2)),
            r"q_proj.lora_A.default.weight' has the shape \(2, 25\), in the model it is \(2, 24\)",
        ),
        (
            lora_of_shapes(Q_PROJ, (2, 24), (24, 2)) | lora_of_shapes(V_PROJ, (3, 24), (12, 3)),
            r"the LoRA of all layers must have one rank, got \[2, 3\]",
        ),
    ],
    ids=["no B", "no A", "unknown", "unknown LoRA", "shape", "LoRA shape", "ranks"],
)
def test_weights_that_do_not_fit_are_named(trained, message):
    with pytest.raises(ValueError, match=message):
        load_trained_weights(tiny_model(), trained, lora_scaling=1.0)


# Trained parts -> model -> checkpoint.


def test_trained_parts_give_the_logits_of_the_trained_model(trained):
    folder, model, processor = trained
    assembled, assembled_processor = load_trained_parts(folder)
    for found, expected in zip(outputs(assembled, assembled_processor), outputs(model, processor), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # Had the training changed nothing, this would show nothing.
    untrained = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        *(json.loads((folder / "recipe.json").read_text())[name] for name in ("audio_model", "language_model")),
        **{name: getattr(model.config, name) for name in ("ctc_token_ids", "downsampling", "audio_token_id", *PROMPT)},
    )
    missing = untrained.load_state_dict(load_file(folder / "trained.safetensors"), strict=False).unexpected_keys
    assert missing and all("lora_" in name for name in missing)
    untrained_logits, _ = outputs(untrained.eval(), processor)
    assert not torch.allclose(untrained_logits, outputs(model, processor)[0], atol=1e-3)


def test_trained_parts_hold_only_what_was_trained(trained):
    folder, model, _ = trained
    names = set(load_file(folder / "trained.safetensors"))
    assert {name.split(".")[0] for name in names} == {
        "audio_tower",
        "language_model",
        "multi_modal_projector",
        "ctc_head",
    }
    assert all("lora_" in name for name in names if name.startswith("language_model."))
    assert all(".layers.2." in name or "layer_norm" in name for name in names if name.startswith("audio_tower."))


def test_assembled_checkpoint_gives_the_outputs_of_the_assembled_model_exactly(trained, tmp_path):
    folder, _, _ = trained
    assemble(folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == modes["adapter_model.safetensors"] == modes["config.json"], "a shared cache"
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    for found, expected in zip(outputs(model, processor), outputs(*load_trained_parts(folder)), strict=True):
        assert torch.equal(found, expected)
    assert model.generation_config.ctc_weight == 0.25
    assert model.config.prompt_before_ids == [1] and model.config.prompt_after_ids == [2, 1]
    assert (processor.prompt_before, processor.prompt_after) == ("<s>", "</s><s>")
    assert processor.audio_token_id == model.config.audio_token_id


def test_assembled_checkpoint_keeps_the_plain_language_model(trained, tmp_path):
    folder, _, processor = trained
    assemble(folder, tmp_path / "model")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    language_model = json.loads((folder / "recipe.json").read_text())["language_model"]
    plain = AutoModelForCausalLM.from_pretrained(language_model)
    ids = processor.tokenizer("being the thing", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, adapted = plain(ids).logits, model.language_model(ids).logits
        with model.plain_language_model():
            assert torch.equal(model.language_model(ids).logits, expected)
    assert not torch.allclose(adapted, expected, atol=1e-3)


def test_merged_checkpoint_has_the_outputs_and_no_adapter(trained, tmp_path):
    folder, _, _ = trained
    assemble(folder, tmp_path / "model", merge_lora=True)
    assert not list((tmp_path / "model").glob("adapter_*"))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    assert not any("lora_" in name or "base_layer" in name for name in model.state_dict())
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    for found, expected in zip(outputs(model, processor), outputs(*load_trained_parts(folder)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_assembled_tokenizer_spells_text_in_ctc_labels(trained):
    folder, model, _ = trained
    _, processor = load_trained_parts(folder)
    expected = restrict_merges(tiny_tokenizer(), model.config.ctc_token_ids)(" being thing").input_ids
    assert processor.encode_transcript("being thing")[:-1] == expected
    assert set(expected) <= set(model.config.ctc_token_ids)


STAGES = {
    "language model in full": [TuningArguments(llm="full")],
    "LoRA of an earlier stage": [TuningArguments(llm="lora", lora_r=3, lora_alpha=5), TuningArguments(llm="freeze")],
    "LoRA in two stages": [TuningArguments(llm="lora", lora_r=3, lora_alpha=5, lora_rslora=True)] * 2,
    "LoRA, then in full": [TuningArguments(llm="lora", lora_r=3, lora_alpha=5), TuningArguments(llm="full")],
}


@pytest.mark.parametrize("tunings", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_every_way_of_tuning_the_language_model_can_be_assembled(tunings, text, audio_folder, tmp_path):
    targets = {"llama": "q_proj|v_proj", "gpt2": "c_attn|c_proj"}[text]
    tunings = [TuningArguments(**{**vars(tuning), "lora_targets": targets}) for tuning in tunings]
    tied = {"tie_word_embeddings": True}
    language_model = language_model_folder(tmp_path / "language_model", text, **tied)
    model, processor = trained_folder(tmp_path / "parts", audio_folder, language_model, tunings)
    found = outputs(*load_trained_parts(tmp_path / "parts"))
    for value, expected in zip(found, outputs(model, processor), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


def test_labels_that_spell_the_units_of_the_language_model_are_assembled_too(audio_folder, tmp_path):
    language_model = language_model_folder(tmp_path / "language_model")
    tunings = [TuningArguments(llm="lora", lora_r=3)]
    model, processor = trained_folder(tmp_path / "parts", audio_folder, language_model, tunings, llm_units="native")
    assembled, assembled_processor = load_trained_parts(tmp_path / "parts")
    assert torch.equal(assembled.ctc_chains, model.ctc_chains)
    assert assembled_processor.encode_transcript("being thing") == processor.encode_transcript("being thing")
    for value, expected in zip(outputs(assembled, assembled_processor), outputs(model, processor), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_placeholder_of_the_built_model_is_that_of_its_tokenizer(trained):
    # The language model has 64 embeddings, the tokeniser fewer tokens.
    _, model, processor = trained
    assert processor.audio_token_id == model.config.audio_token_id != model.config.text_config.vocab_size


def test_base_models_are_resolved_by_their_prefix(monkeypatch):
    monkeypatch.setattr("hf_speechllm.assembly.base_model", lambda name: f"/cache/{name}")
    assert resolve_model("base:moonshine-tiny") == "/cache/moonshine-tiny"
    assert resolve_model("UsefulSensors/moonshine-tiny") == "UsefulSensors/moonshine-tiny"


# The default model.


@pytest.fixture
def parts(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the trained parts in the place of the package's."""
    folder = tmp_path / "parts"
    shutil.copytree(trained[0], folder)
    monkeypatch.setattr(default_model_module, "TRAINED_PARTS", folder)
    return folder


@pytest.fixture
def assemblies(monkeypatch) -> list[Path]:
    """The folders that were assembled, in order."""
    folders = []

    def spy(trained_parts, output_folder):
        folders.append(Path(output_folder))
        assemble(trained_parts, output_folder)

    monkeypatch.setattr(default_model_module, "assemble", spy)
    return folders


def test_default_model_without_trained_parts_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(default_model_module, "TRAINED_PARTS", tmp_path / "missing")
    message = r"missing/trained.safetensors: expected as part of the installed package.*install hf-speechllm again"
    with pytest.raises(FileNotFoundError, match=message):
        hf_speechllm.default_model(cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_default_model_is_assembled_on_the_first_call_only(parts, assemblies, tmp_path):
    folder = hf_speechllm.default_model(cache_dir=tmp_path / "cache")
    assert hf_speechllm.default_model(cache_dir=tmp_path / "cache") == folder
    assert [str(path) for path in assemblies] == [folder]
    assert Path(folder).parent == tmp_path / "cache" / "models"
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    expected, processor = load_trained_parts(parts)
    assert torch.equal(outputs(model, processor)[0], outputs(expected, processor)[0])


def test_default_model_follows_the_environment_for_its_cache(parts, assemblies, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SPEECHLLM_CACHE", str(tmp_path / "elsewhere"))
    assert Path(hf_speechllm.default_model()).parent == tmp_path / "elsewhere" / "models"


@pytest.mark.parametrize("name", ["trained.safetensors", "recipe.json", "config.json", "generation_config.json"])
def test_another_version_of_any_part_gets_another_folder(parts, monkeypatch, tmp_path, name):
    monkeypatch.setattr(default_model_module, "assemble", lambda trained_parts, output_folder: output_folder.mkdir())
    first = hf_speechllm.default_model(cache_dir=tmp_path / "cache")
    if name == "trained.safetensors":
        state = load_file(parts / name)
        save_file({key: value + 1 for key, value in state.items()}, parts / name)
    else:
        (parts / name).write_text((parts / name).read_text() + "\n")
    second = hf_speechllm.default_model(cache_dir=tmp_path / "cache")
    assert second != first and Path(first).is_dir() and Path(second).is_dir()


def test_another_format_of_the_checkpoint_gets_another_folder(parts, monkeypatch, tmp_path):
    monkeypatch.setattr(default_model_module, "assemble", lambda trained_parts, output_folder: output_folder.mkdir())
    first = hf_speechllm.default_model(cache_dir=tmp_path / "cache")
    monkeypatch.setattr(default_model_module, "CHECKPOINT_FORMAT", default_model_module.CHECKPOINT_FORMAT + 1)
    assert hf_speechllm.default_model(cache_dir=tmp_path / "cache") != first


def test_an_interrupted_assembly_is_done_again(parts, assemblies, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    save_pretrained = SpeechLLMForConditionalGeneration.save_pretrained

    def interrupted(self, folder, **kwargs):
        save_pretrained(self, folder, **kwargs)
        (Path(folder) / "half-written").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SpeechLLMForConditionalGeneration, "save_pretrained", interrupted)
        hf_speechllm.default_model(cache_dir=cache)
    assert [path.name for path in (cache / "models").glob(".*.building")], "the test no longer interrupts"
    folder = hf_speechllm.default_model(cache_dir=cache)
    assert len(assemblies) == 2
    assert not list((cache / "models").glob(".*.building"))
    assert not (Path(folder) / "half-written").exists()
    assert AutoModelForSpeechSeq2Seq.from_pretrained(folder).generation_config.ctc_weight == 0.25


def _default_model_in_a_process(trained_parts: Path, cache: Path, log: Path, barrier) -> None:
    def slow_assemble(_parts: Path, output_folder: Path) -> None:
        with log.open("a") as file:
            file.write("assembled\n")
        time.sleep(0.3)
        output_folder.mkdir()

    default_model_module.TRAINED_PARTS, default_model_module.assemble = trained_parts, slow_assemble
    barrier.wait(timeout=30)
    hf_speechllm.default_model(cache_dir=str(cache))


def test_processes_that_start_together_assemble_once(parts, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (parts, tmp_path / "cache", tmp_path / "log", barrier)
    processes = [context.Process(target=_default_model_in_a_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "assembled\n"
