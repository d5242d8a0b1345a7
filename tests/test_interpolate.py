"""Weights between two runs, layer by layer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import interpolate as command
from training.interpolate import interpolate

LAYER = "audio_tower.layers.{}.mlp.weight"
START = {LAYER.format(1): torch.zeros(2), "audio_tower.layer_norm.weight": torch.zeros(2)}
END = {
    LAYER.format(0): torch.ones(2),
    LAYER.format(1): torch.ones(2),
    "audio_tower.layer_norm.weight": torch.ones(2),
    "language_model.x.lora_A.default.weight": torch.full((2,), 3.0),
}


def test_each_layer_goes_its_share_and_an_untrained_one_is_left_out():
    state = interpolate(START, END, [0.0, 0.25, 0.5])
    assert {name: float(value[0]) for name, value in state.items()} == {
        LAYER.format(1): 0.25,
        "audio_tower.layer_norm.weight": 0.5,
        "language_model.x.lora_A.default.weight": 3.0,
    }
    assert float(interpolate(START, END, [1.0, 1.0, 1.0])[LAYER.format(0)][0]) == 1.0


def test_wrong_shares_are_named():
    with pytest.raises(ValueError, match=r"shares: expected numbers from 0 \(start\) to 1 \(end\), got"):
        interpolate(START, END, [0.0, 1.5, 0.5])
    with pytest.raises(ValueError, match="shares: expected one for layer 1 and one for norm and head, got 2"):
        interpolate(START, END, [0.0, 0.5])
    with pytest.raises(ValueError, match="start: .*layers.0.* was not trained there, so its share must be 0 or 1"):
        interpolate(START, END, [0.5, 0.5, 0.5])


def test_the_command_writes_parts_and_notes_the_shares(tmp_path, monkeypatch):
    for name, state in (("start", START), ("end", END)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "trained.safetensors")
        (tmp_path / name / "recipe.json").write_text(json.dumps({"lora_scaling": 2.0}))
    folders = [str(tmp_path / name) for name in ("start", "end", "out")]
    monkeypatch.setattr("sys.argv", ["interpolate", *folders, "--shares", "0", "0.25", "0.5"])
    command.main()
    assert float(load_file(tmp_path / "out" / "trained.safetensors")[LAYER.format(1)][0]) == 0.25
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe == {"lora_scaling": 2.0, "encoder_shares": [0.0, 0.25, 0.5]}
