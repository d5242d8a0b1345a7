"""Weights between two runs or two stages, layer by layer or as a whole."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training_run import assert_equal_weights, data_dir, stages_of, weights  # noqa: F401 - data_dir is a fixture
from tiny_models import tiny_model, tiny_processor

import training.train
from training import interpolate as command
from training.interpolate import interpolate, share_of
from training.train import run

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


def test_convolutions_before_the_layers_are_none_of_them():
    shares = [0.0, 0.25, 0.5]
    assert share_of("audio_tower.encoder.layers.1.final_layer_norm.weight", shares) == 0.25
    assert share_of("audio_tower.feature_extractor.conv_layers.1.conv.weight", shares) == 0.5


def test_a_single_share_is_that_of_all_weights():
    end = {"language_model.x": torch.full((2,), 4.0), "ctc_chains": torch.tensor([[3, -1]])}
    state = interpolate({"language_model.x": torch.ones(2), "ctc_chains": torch.tensor([[5, -1]])}, end, [0.25])
    assert state["language_model.x"].tolist() == [1.75, 1.75]
    assert state["ctc_chains"].tolist() == [[3, -1]]  # no weights


def test_wrong_shares_are_named():
    with pytest.raises(ValueError, match=r"shares: expected a list of numbers from 0 \(start\) to 1 \(end\), got"):
        interpolate(START, END, [0.0, 1.5, 0.5])
    for shares in ([0.0, 0.5], [0.0, 0.5, 1.0, 1.0]):
        with pytest.raises(ValueError, match=f"shares: expected 1 of all weights or 3, of 2 enc.* got {len(shares)}"):
            interpolate(START, END, shares)
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
    assert recipe == {"lora_scaling": 2.0, "interpolation_shares": [0.0, 0.25, 0.5]}


CTC = {"encoder": "full", "ce_loss_weight": 0.0, "ctc_loss_weight": 1.0}
TOP = {"name": "top", "tuning": {**CTC, "encoder_layers": 1}, "training": {"max_steps": 2, "learning_rate": 0.01}}
ALL = {"name": "all", "tuning": CTC, "training": {"max_steps": 2, "learning_rate": 0.01}}
LLM = {
    "name": "llm",
    "tuning": {"llm": "lora", "lora_r": 2, "ctc_head": "freeze"},
    "training": {"max_steps": 1, "learning_rate": 0.01},
}
BETWEEN = [0.0, 0.25, 0.5, 0.75]  # the tiny encoder has three layers


@pytest.fixture
def fresh(monkeypatch):
    """The tiny model wherever a run builds one."""
    monkeypatch.setattr(training.train, "build_model", lambda _: (tiny_model(), tiny_processor()))


def with_interpolation(stage: dict, start: str, shares: object) -> dict:
    return {**stage, "interpolate": {"start": start, "shares": shares}}


@pytest.mark.parametrize("shares", [BETWEEN, [0.5]])
def test_a_stage_leaves_weights_between_an_earlier_one_and_itself(fresh, data_dir, tmp_path, shares):  # noqa: F811
    run(stages_of(tmp_path, "plain", [TOP, ALL]), data_dir)
    run(stages_of(tmp_path, "out", [TOP, with_interpolation(ALL, "top", shares), LLM]), data_dir)
    assert_equal_weights(tmp_path / "plain/top/final", tmp_path / "out/top/final")
    # What the first stage has not trained is as it was at the begin.
    start = {**tiny_model().state_dict(), **weights(tmp_path / "plain/top/final")}
    end, left = weights(tmp_path / "plain/all/final"), weights(tmp_path / "out/all/final")
    assert left.keys() == end.keys() and not end.keys() <= weights(tmp_path / "plain/top/final").keys()
    for name, value in left.items():
        torch.testing.assert_close(value, torch.lerp(start[name], end[name], share_of(name, shares)))
    assert json.loads((tmp_path / "out/all/final/recipe.json").read_text())["interpolation_shares"] == shares
    # The stage after it starts from them, in the same call and in another.
    assert all(torch.equal(weights(tmp_path / "out/llm/final")[name], value) for name, value in left.items())
    shutil.copytree(tmp_path / "out/llm/final", tmp_path / "first")
    shutil.rmtree(tmp_path / "out/llm")
    run(stages_of(tmp_path, "out", [TOP, with_interpolation(ALL, "top", shares), LLM]), data_dir)
    assert_equal_weights(tmp_path / "first", tmp_path / "out/llm/final")


def test_what_cannot_be_interpolated_is_refused_before_it_is_trained(fresh, data_dir, tmp_path):  # noqa: F811
    for shares in ([0.0, 0.5], [*BETWEEN, 1.0]):  # known before the first stage
        message = f"stage 'all', interpolate.shares: expected 1 of all weights or 4, of 3 enc.* got {len(shares)}"
        with pytest.raises(ValueError, match=message):
            run(stages_of(tmp_path, "out", [TOP, with_interpolation(ALL, "top", shares)]), data_dir)
        assert not (tmp_path / "out").exists()
    message = "stage 'llm', interpolate.start: 'top' has no weight 'language_model.*lora_A.*'; expected a stage"
    with pytest.raises(ValueError, match=message):
        run(stages_of(tmp_path, "out", [TOP, with_interpolation(LLM, "top", [0.5])]), data_dir)
    assert (tmp_path / "out/top/final").exists() and not list((tmp_path / "out").glob("llm/*"))


def test_other_shares_of_a_finished_stage_are_told(fresh, data_dir, tmp_path, caplog):  # noqa: F811
    stages = [TOP, with_interpolation(ALL, "top", BETWEEN)]
    run(stages_of(tmp_path, "out", stages), data_dir)
    with caplog.at_level(logging.WARNING, "training.train"):
        run(stages_of(tmp_path, "out", stages), data_dir)
        assert not caplog.records
        run(stages_of(tmp_path, "out", [TOP, with_interpolation(ALL, "top", [0.5])]), data_dir)
    (record,) = caplog.records
    assert f"other options: interpolate.shares was {BETWEEN}, is [0.5]; remove " in record.getMessage()


@pytest.mark.parametrize(
    ("interpolation", "message"),
    [
        (
            {"start": "all", "shares": [0.5]},
            r"interpolate.start: expected one of the earlier stages, \['top'\], got 'all'",
        ),
        ({"start": "top"}, r"interpolate: expected {start: STAGE, shares: \[NUMBER, ...\]}, got {'start': 'top'}"),
        ("top", "interpolate: expected {start: STAGE"),
        ({"start": "top", "shares": 0.5}, r"interpolate: shares: expected a list of numbers .*, got 0.5"),
        ({"start": "top", "shares": [0.5, "x"]}, "interpolate: shares: expected a list of numbers"),
        ({"start": "top", "shares": [1.5]}, "interpolate: shares: expected a list of numbers"),
        ({"start": "top", "shares": []}, "interpolate: shares: expected a list of numbers"),
    ],
)
def test_an_interpolation_that_makes_no_sense_is_refused(tmp_path, interpolation, message):
    with pytest.raises(ValueError, match=f"stage 'all' of .*run.yaml, {message}"):
        stages_of(tmp_path, "out", [TOP, {**ALL, "interpolate": interpolation}])
