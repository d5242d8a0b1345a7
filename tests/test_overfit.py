"""Every way to build and to train a speech LLM learns two utterances by heart in some 20 steps.

Whole runs of `training.train`, from a manifest to `generate`, on tiny models with random weights.
"""

import json
from pathlib import Path

import pytest
import torch
from test_training import RATE, tone, write_config, write_manifest
from tiny_models import lively, tiny_model, tiny_processor

import training.train
from hf_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.configuration_speechllm import INTERFACES, PROJECTORS
from training.arguments import load_stages
from training.train import run

TEXTS, DURATIONS_S = ["the ring", "a hat"], [0.4, 0.3]
STEPS = 24
FULL = {"llm": "full"}
LORA = {
    "llm": "lora",
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_targets": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj",
}
BOTH = {"ce_loss_weight": 1.0, "ctc_loss_weight": 0.3}
LLM_ONLY = {"ce_loss_weight": 1.0, "ctc_loss_weight": 0.0}
CTC_ONLY = {"ce_loss_weight": 0.0, "ctc_loss_weight": 1.0, "llm": "freeze"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_manifest(folder / "train.jsonl", TEXTS, DURATIONS_S)
    return folder


def model_of(**values) -> SpeechLLMForConditionalGeneration:
    """A tiny model that can learn quickly.

    With embeddings as small as a fresh model's, no hidden state gives a token a probability near one; and a fresh
    encoder makes nearly the same of any sound.
    """
    model = tiny_model(**{"downsampling": 2, **values})
    lively(model.audio_tower)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)
        model.get_output_embeddings().weight.mul_(15)
    return model


@pytest.fixture
def overfit(monkeypatch, tmp_path, data_dir):
    """Trains a model on the two utterances and checks the losses: `overfit(model, tuning)`."""

    def train(model: SpeechLLMForConditionalGeneration, tuning: dict) -> None:
        monkeypatch.setattr(training.train, "build_model", lambda _arguments: (model, tiny_processor()))
        is_lora = tuning["llm"] == "lora"
        rates = {"encoder_learning_rate": 0.01, "llm_learning_rate": 0.02 if is_lora else 0.01}
        path = write_config(
            tmp_path / "run.yaml",
            data={"train_manifests": ["train.jsonl"], "min_duration_s": 0.0, "augment": False},
            tuning={"encoder": "full", **rates, **tuning},
            training={
                "max_steps": STEPS,
                "learning_rate": 0.04,
                "lr_scheduler_type": "linear" if is_lora else "constant",
                "adam_beta2": 0.95,
                "logging_steps": 1,
                "save_steps": STEPS,
                "report_to": "none",
                "disable_tqdm": True,
            },
        )
        run(load_stages(path, tmp_path / "out"), data_dir)
        state = json.loads((tmp_path / f"out/main/checkpoint-{STEPS}/trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert len(losses) == STEPS and losses[0] > 3.0 and losses[-1] < 0.3 * losses[0]

    return train


def transcribe(model: SpeechLLMForConditionalGeneration, **options) -> list[str]:
    processor = tiny_processor()
    waveforms = [tone(duration_s, 150 * (index + 1)) for index, duration_s in enumerate(DURATIONS_S)]
    return processor.batch_decode(model.eval().generate(**processor(waveforms, sampling_rate=RATE), **options))


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_every_interface_is_learned_by_heart_with_both_losses(overfit, interface, tuning):
    model = model_of(interface=interface)
    overfit(model, {**tuning, **BOTH})
    assert transcribe(model) == TEXTS
    assert transcribe(model, num_beams=3, ctc_weight=0.2) == TEXTS


@pytest.mark.parametrize("projector", [projector for projector in PROJECTORS if projector != "stack"])
def test_every_projector_is_learned_by_heart_with_both_losses(overfit, projector):
    model = model_of(projector=projector)
    overfit(model, {**FULL, **BOTH})
    assert transcribe(model) == TEXTS


@pytest.mark.parametrize(("interface", "tuning"), [("prefix", FULL), ("cross_attention", LORA)], ids=["full", "lora"])
def test_cross_entropy_alone_is_enough(overfit, interface, tuning):
    model = model_of(interface=interface)
    overfit(model, {**tuning, **LLM_ONLY})
    assert transcribe(model) == TEXTS


def test_ctc_alone_learns_by_heart(overfit):
    model = model_of()
    before = {name: value.clone() for name, value in model.language_model.state_dict().items()}
    overfit(model, CTC_ONLY)
    assert transcribe(model, mode="ctc_greedy") == TEXTS
    assert all(torch.equal(value, before[name]) for name, value in model.language_model.state_dict().items())
