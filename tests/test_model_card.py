"""The card of a model is written from measured figures."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny_models import tiny_config

from training import model_card
from training.model_card import subject_of_parts, write_card


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


USAGE = "transcriber = pipeline(model='folder')"


def test_the_card_holds_each_figure_beside_its_data_set_and_decoding(parts):
    rows = [row("Clips A", "joint", 12.345), row("Clips B", "llm", 67.891, ctc_weight=0.0, num_beams=1)]
    text = write_card(subject_of_parts("tiny", USAGE, parts), rows)
    card = ModelCard(text)
    card.data.model_name = "tiny"
    results = {(result.dataset_name, result.metric_value) for result in card.data.eval_results}
    assert results == {("Clips A", round(12.345, 2)), ("Clips B", 67.89)}
    assert "| **12.3" in text and "speech LLM alone (num_beams=1) | **67.89**" in text
    assert card.data.base_model == ["UsefulSensors/moonshine-tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert card.data.license == "apache-2.0"
    assert "UsefulSensors/moonshine-tiny (mit) and HuggingFaceTB/SmolLM2-135M-Instruct (apache-2.0)" in text
    assert "0.1 million parameters" in text and "LoRA 0.00 M, ctc_head 0.10 M" in text
    assert USAGE in text and '"ctc_weight": 0.4' in text


def test_what_nobody_said_is_not_in_the_card(parts):
    text = write_card(subject_of_parts("tiny", USAGE, parts), [row("A", "new_mode", 1.0)])
    assert "new_mode" in text
    assert not any(word in text for word in ("interpolate", "training/configs", "Synthetic", "pip install", "in total"))
    recipe = json.loads((parts / "recipe.json").read_text())
    (parts / "recipe.json").write_text(json.dumps({**recipe, "interpolation_shares": [0.0, 0.5]}))
    subject = subject_of_parts("tiny", USAGE, parts, "Synthetic speech only.", "tiny.yaml", total_parameters=5_000_000)
    text = write_card(subject, [])
    assert "training/interpolate.py`, shares [0.0, 0.5]" in text and "training/configs/tiny.yaml" in text
    assert "Synthetic speech only." in text and "5.0 million parameters in total" in text
    assert "## Results" not in text and "model-index" not in text


def test_weights_from_packages_are_told_to_be_quantised(parts):
    subject = subject_of_parts("tiny", USAGE, parts)
    assert "hold them quantised" in write_card(subject, [])
    hub = dataclasses.replace(subject, audio_model="a/b", language_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    text = write_card(hub, [])
    assert "quantised" not in text and "a/b (see there) and" in text


def test_an_unknown_licence_has_to_be_given(parts):
    subject = dataclasses.replace(subject_of_parts("tiny", USAGE, parts), language_model="somebody/llm", language="de")
    with pytest.raises(ValueError, match="license: that of somebody/llm is not known here"):
        write_card(subject, [])
    card = ModelCard(write_card(dataclasses.replace(subject, license="mit"), []))
    assert (card.data.license, card.data.language) == ("mit", "de")


def test_command_line(parts, tmp_path, monkeypatch):
    (parts / "results.jsonl").write_text(json.dumps(row("A", "joint", 1.0)) + "\n")
    arguments = ["--parts", parts, "--results", parts / "results.jsonl", "--output", tmp_path / "cards" / "tiny.md"]
    monkeypatch.setattr(sys, "argv", ["model_card", "tiny", *map(str, arguments)])
    model_card.main()
    assert "model=hf_speechllm.default_model())" in (tmp_path / "cards" / "tiny.md").read_text()
