"""The card of a model is written from measured figures."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny_models import tiny_config

from training.model_card import write_card


@pytest.fixture
def parts(tmp_path) -> Path:
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"ctc_weight": 0.4}')
    (tmp_path / "recipe.json").write_text(
        json.dumps({"audio_model": "base:moonshine-tiny", "language_model": "base:smollm2-135m-instruct"})
    )
    weights = {
        "ctc_head.linear.weight": torch.zeros(100, 1000),
        "language_model.q.lora_A.default.weight": torch.zeros(5),
    }
    save_file(weights, tmp_path / "trained.safetensors")
    return tmp_path


def row(dataset: str, mode: str, wer: float, **options) -> dict:
    rates = dict.fromkeys(("wer_low", "wer_high", "cer", "substitutions", "deletions", "insertions", "rtfx"), 1.0)
    return {
        **rates,
        "dataset": dataset,
        "mode": mode,
        "options": options,
        "wer": wer,
        "utterances": 3,
        "duration_min": 1,
    }


def test_the_card_holds_each_figure_beside_its_data_set_and_decoding(parts):
    rows = [row("Clips A", "joint", 12.345), row("Clips B", "llm", 67.891, ctc_weight=0.0, num_beams=1)]
    text = write_card("tiny", parts, rows, "tiny.yaml", "'folder'")
    card = ModelCard(text)
    card.data.model_name = "tiny"
    results = {(result.dataset_name, result.metric_value) for result in card.data.eval_results}
    assert results == {("Clips A", 12.35), ("Clips B", 67.89)} or results == {("Clips A", 12.34), ("Clips B", 67.89)}
    assert "| **12.3" in text and "speech LLM alone (num_beams=1) | **67.89**" in text
    assert card.data.base_model == ["UsefulSensors/moonshine-tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "0.1 million parameters" in text and "LoRA 0.00 M, ctc_head 0.10 M" in text


def test_an_interpolated_encoder_and_a_mode_without_a_name_are_told(parts):
    assert "interpolate" not in write_card("tiny", parts, [row("A", "joint", 1.0)], "tiny.yaml", "'folder'")
    recipe = json.loads((parts / "recipe.json").read_text())
    (parts / "recipe.json").write_text(json.dumps({**recipe, "encoder_shares": [0.0, 0.5]}))
    text = write_card("tiny", parts, [row("A", "new_mode", 1.0)], "tiny.yaml", "'folder'")
    assert "training/interpolate.py`, shares [0.0, 0.5]" in text and "new_mode" in text
