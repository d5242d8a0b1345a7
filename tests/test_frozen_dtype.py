"""Weights of the language model that do not learn, in half precision beside others in float32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import RATE, tone, write_config, write_manifest
from tiny_models import loud_model, tiny_model, tiny_processor

from training.arguments import TuningArguments, load_stages
from training.lora import cast_frozen
from training.train import run, set_trainable

TEXTS = ["the thing", "an inn", "a ring", "the king"]
DURATIONS_S = [1.0, 0.6, 0.8, 0.9]
STEPS = 8


def train(folder: Path, stages: list[dict], bf16: bool = False, interface: str = "prefix"):
    """The model after these stages; the losses of each, and the types of the LLM's weights, LoRA aside, in each."""
    write_manifest(folder / "train.jsonl", TEXTS, DURATIONS_S)
    config = write_config(
        folder / "run.yaml",
        data={"train_manifests": ["train.jsonl"], "augment": False},
        training={
            "bf16": bf16, "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.02, "lr_scheduler_type": "constant",
        },
        stages=stages,
    )  # fmt: skip
    model = loud_model(interface=interface)
    losses: dict[str, list[float]] = {}
    dtypes: dict[str, set[torch.dtype]] = {}

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            name = Path(self.args.output_dir).name
            losses.setdefault(name, []).append(logs["loss"])
            dtypes[name] = linear_dtypes(model.language_model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.train.build_model", lambda _arguments: (model, tiny_processor()))
        patch.setattr("training.trainer.SpeechLLMTrainer.log", log)
        run(load_stages(config, folder), folder)
    return model, losses, dtypes


def linear_dtypes(language_model) -> set[torch.dtype]:
    """Types of the linear layers, LoRA and output layer aside; all else has to be in float32."""
    inside = {
        name: parameter.dtype
        for name, module in language_model.get_decoder().named_modules()
        for _, parameter in module.named_parameters(recurse=False)
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }
    rest = [n for n, _ in language_model.named_parameters() if "proj" not in n or "lora_" in n]
    others = {n: language_model.get_parameter(n).dtype for n in rest if not n.startswith("lm_head")}
    assert inside and set(others.values()) == {torch.float32}
    return set(inside.values())


def lora_stage(**tuning) -> dict:
    return {"name": "lora", "tuning": {"llm": "lora", "lora_r": 4, **tuning}}


@pytest.mark.parametrize("interface", ["prefix", "cross_attention"])
def test_a_lora_learns_on_frozen_weights_in_half_precision(tmp_path, interface):
    (tmp_path / "exact").mkdir()
    (tmp_path / "half").mkdir()
    _, exact, _ = train(tmp_path / "exact", [lora_stage()], interface=interface)
    _, half, dtypes = train(tmp_path / "half", [lora_stage(llm_frozen_dtype="bfloat16")], interface=interface)
    assert dtypes["lora"] == {torch.bfloat16}
    exact, half = torch.tensor(exact["lora"]), torch.tensor(half["lora"])
    assert not torch.equal(exact, half) and half[-1] < 0.9 * half[0]
    torch.testing.assert_close(half[0], exact[0], rtol=0.02, atol=0.0)
    torch.testing.assert_close(half, exact, rtol=0.15, atol=0.0)
    state = load_file(tmp_path / "half/lora/final/trained.safetensors")
    assert any("lora_" in name for name in state)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_they_compute_what_mixed_precision_of_the_whole_model_computes(tmp_path):
    half = {"llm_frozen_dtype": "bfloat16", "llm": "freeze", "projector": "full"}
    losses = {}
    for name, tuning in (("mixed", {"llm": "freeze", "projector": "full"}), ("half", half)):
        (tmp_path / name).mkdir()
        _, losses[name], dtypes = train(tmp_path / name, [lora_stage(**tuning)], bf16=True)
    assert dtypes["lora"] == {torch.bfloat16}
    assert losses["half"]["lora"] == losses["mixed"]["lora"]


def test_what_learns_in_a_stage_or_has_learnt_stays_in_float32(tmp_path):
    half = {"llm_frozen_dtype": "bfloat16", "projector": "freeze", "ctc_head": "freeze"}
    stages = [
        {"name": "frozen", "tuning": {"llm": "freeze", "llm_frozen_dtype": "bfloat16"}},
        {"name": "full", "tuning": {"llm": "full", "llm_frozen_dtype": "bfloat16"}},
        {"name": "later", "tuning": {"llm": "lora", "lora_r": 4, **half}},
    ]
    model, _, dtypes = train(tmp_path, stages)
    assert dtypes == {"frozen": {torch.bfloat16}, "full": {torch.float32}, "later": {torch.float32}}
    learnt = load_file(tmp_path / "full/final/trained.safetensors")
    kept = load_file(tmp_path / "later/final/trained.safetensors")
    names = {name for name in learnt if name.startswith("language_model.")}
    assert names
    for name in names:
        found = kept.get(name)
        if found is None:
            found = kept[".base_layer.".join(name.rpartition(".")[::2])]
        assert torch.equal(found, learnt[name]), name


def test_an_output_layer_that_is_the_embeddings_is_not_rounded():
    language_model = tiny_model(text="gemma").language_model.requires_grad_(False)
    assert language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight
    before = language_model.get_input_embeddings().weight.clone()
    cast_frozen(language_model, "bfloat16", "cpu")
    assert linear_dtypes(language_model) == {torch.bfloat16}
    assert torch.equal(language_model.get_output_embeddings().weight, before)


def test_a_dtype_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"tuning\.llm_frozen_dtype must be one of .*bfloat16.*got 'int8'"):
        set_trainable(loud_model(), TuningArguments(llm_frozen_dtype="int8"))


@pytest.mark.parametrize("interface", ["prefix", "bidirectional_prefix", "cross_attention"])
@pytest.mark.parametrize(
    "options",
    [
        {"ctc_weight": 0.0},
        {"ctc_weight": 0.3, "num_beams": 3},
        {"mode": "ctc_greedy"},
        {"mode": "rescoring", "lm_weight": 0.3},
        {"mode": "delayed_fusion", "lm_weight": 0.3},
    ],
    ids=json.dumps,
)
def test_generation_with_both_types_agrees_roughly(interface, options):
    """Most first tokens: near ties may fall the other way."""
    waveforms = [tone(0.4 + 0.1 * index, 150 * (index + 1)) for index in range(8)]
    batch = tiny_processor()(waveforms, sampling_rate=RATE)
    model = loud_model(interface=interface)
    model.requires_grad_(False)
    options = {**options, "tokenizer": tiny_processor().tokenizer}
    exact = model.generate(**batch, **options)
    cast_frozen(model.language_model, "bfloat16", "cpu")
    assert linear_dtypes(model.language_model) == {torch.bfloat16}
    rounded = model.generate(**batch, **options)
    cast_frozen(model.language_model, "float32", "cpu")
    assert "forward" not in vars(model.language_model)
    assert (exact[:, 0] == rounded[:, 0]).float().mean() >= 0.75
