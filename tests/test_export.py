"""A finished run becomes a small folder of trained parts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import GenerationConfig

from training.export import export


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    tiny_config().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"]["_name_or_path"] = config["text_config"]["_name_or_path"] = "/home/somebody/models"
    (folder / "config.json").write_text(json.dumps(config))
    GenerationConfig(eos_token_id=2).save_pretrained(folder)
    (folder / "recipe.json").write_text('{"lora_scaling": 2.0}')
    save_file({"ctc_head.linear.bias": torch.tensor([0.5, -1.25])}, folder / "trained.safetensors")
    return folder


def test_weights_are_halved_options_are_set_and_no_path_of_the_machine_is_left(run, tmp_path):
    export(run, tmp_path / "parts", {"ctc_weight": 0.4, "num_beams": 4})
    weight = load_file(tmp_path / "parts" / "trained.safetensors")["ctc_head.linear.bias"]
    assert weight.dtype == torch.float16 and weight.tolist() == [0.5, -1.25]
    generation = GenerationConfig.from_pretrained(tmp_path / "parts")
    assert (generation.ctc_weight, generation.num_beams, generation.eos_token_id) == (0.4, 4, 2)
    assert (tmp_path / "parts" / "recipe.json").read_text() == '{"lora_scaling": 2.0}'
    assert "somebody" not in (tmp_path / "parts" / "config.json").read_text()


def test_a_weight_beyond_float16_is_refused(run, tmp_path):
    save_file({"ctc_head.linear.bias": torch.tensor([1e6])}, run / "trained.safetensors")
    with pytest.raises(ValueError, match="ctc_head.linear.bias.*beyond float16"):
        export(run, tmp_path / "parts", {})
