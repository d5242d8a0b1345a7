"""Training with two processes (gloo, CPU): the losses, weights and checkpoints of one process."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import write_config, write_manifest
from test_training_run import DURATIONS_S, TEXTS, assert_equal_weights

from training.checkpoints import last_checkpoint
from training.data_report import DataReport

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
BASE = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "optim": "sgd",  # whose steps are the gradients, in their true size
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_MIXED_PRECISION": "no"}
DEEPSPEED |= {f"ACCELERATE_{name}": "auto" for name in ("GRADIENT_ACCUMULATION_STEPS", "DEEPSPEED_GRADIENT_CLIPPING")}
SHARDING = {
    "": {},
    "FSDP2": {"FSDP2_ON_CPU": "1"},
    "ZeRO-2": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
CTC = {"encoder": "full", "ce_loss_weight": 0.0, "ctc_loss_weight": 1.0}
STAGES = [
    {"name": "ctc", "tuning": CTC},
    {"name": "mean", "tuning": CTC, "interpolate": {"start": "ctc", "shares": [0.5]}},
    {"name": "llm", "tuning": {"encoder": "full", "llm": "lora", "lora_r": 2}},
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_manifest(folder / "train.jsonl", TEXTS, DURATIONS_S)
    return folder


def train(output_dir: Path, data_dir: Path, processes: int = 1, kill: str = "", sharding: str = "", **sections) -> int:
    """Exit status of a run of this many processes; `sharding` is FSDP2, ZeRO-2 or, with DDP, nothing."""
    data = {"train_manifests": ["train.jsonl"], "augment": False, **sections.pop("data", {})}
    options = {**BASE, **sections.pop("training", {})}
    output_dir.mkdir(exist_ok=True)
    config = write_config(output_dir / "run.yaml", data=data, training=options, **sections)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launch, str(TESTS / "training_worker.py"), str(config), str(data_dir), str(output_dir)]
    environment = {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    environment |= SHARDING[sharding]
    if "ZeRO" in sharding:
        pytest.importorskip("deepspeed", reason="pip install deepspeed (DS_BUILD_OPS=0 without a GPU)")
    result = subprocess.run(
        [*command, *([kill] if kill else [])], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if result.returncode and not kill:
        pytest.fail(result.stderr[-4000:])
    return result.returncode


def losses(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "ce_loss", "ctc_loss", "grad_norm")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory) -> Path:
    """One process, all eight utterances in a batch, two steps in each stage."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, data_dir, data={"batch_duration_s": 9.0}, training={"max_steps": 2, "save_steps": 2}, stages=STAGES)
    return folder


@pytest.mark.parametrize(
    ("processes", "batch_duration_s", "accumulation", "sharding"),
    [
        pytest.param(1, 4.0, 2, "", id="accumulated"),
        pytest.param(2, 9.0, 1, "", id="two processes"),
        pytest.param(2, 2.0, 2, "", id="two processes, accumulated"),
        pytest.param(2, 9.0, 1, "FSDP2", id="FSDP2"),
        pytest.param(2, 9.0, 1, "ZeRO-2", id="ZeRO-2"),
    ],
)
def test_losses_and_weights_do_not_depend_on_how_a_step_is_divided(
    alone, data_dir, tmp_path, processes, batch_duration_s, accumulation, sharding
):
    options = {"max_steps": 2, "save_steps": 2, "gradient_accumulation_steps": accumulation}
    data = {"batch_duration_s": batch_duration_s}
    train(tmp_path, data_dir, processes, sharding=sharding, data=data, training=options, stages=STAGES)
    for stage in ("ctc", "mean", "llm"):
        expected, found = losses(alone / stage / "checkpoint-2"), losses(tmp_path / stage / "checkpoint-2")
        assert len(expected) == 2 and "ctc_loss" in expected[0]
        for each, other in zip(expected, found, strict=True):
            assert other == pytest.approx(each, rel=1e-4)
        weights = [load_file(folder / stage / "final/trained.safetensors") for folder in (alone, tmp_path)]
        assert set(weights[0]) == set(weights[1])
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
        reports = [DataReport.load(folder / stage / "final") for folder in (alone, tmp_path)]
        assert reports[0].utterances == reports[1].utterances == 16
        assert reports[0].audio_s == pytest.approx(reports[1].audio_s)


@pytest.mark.parametrize("sharding", ["", "FSDP2", "ZeRO-2"], ids=["DDP", "FSDP2", "ZeRO-2"])
def test_frozen_weights_may_be_in_half_precision(data_dir, tmp_path, sharding):
    tuning = {"encoder": "full", "llm": "lora", "lora_r": 2, "llm_frozen_dtype": "bfloat16"}
    sections = {"training": {"max_steps": 2, "save_steps": 2}, "stages": [{"name": "llm", "tuning": tuning}]}
    train(tmp_path / "alone", data_dir, data={"batch_duration_s": 9.0}, **copy.deepcopy(sections))
    train(tmp_path / "two", data_dir, 2, sharding=sharding, data={"batch_duration_s": 9.0}, **copy.deepcopy(sections))
    for each, other in zip(*(losses(tmp_path / name / "llm/checkpoint-2") for name in ("alone", "two")), strict=True):
        assert other == pytest.approx(each, rel=0.01)


@pytest.mark.parametrize("sharding", ["", "FSDP2", "ZeRO-2"], ids=["DDP", "FSDP2", "ZeRO-2"])
def test_two_processes_that_were_killed_go_on_to_the_same_weights(data_dir, tmp_path, sharding):
    options = {"max_steps": 5, "save_steps": 2, "save_total_limit": 1, "optim": "adamw_torch"}
    sections = {"data": {"batch_duration_s": 2.0, "augment": True}, "training": options, "stages": STAGES[2:]}
    train(tmp_path / "whole", data_dir, 2, sharding=sharding, **sections)
    assert train(tmp_path / "pieces", data_dir, 2, kill="step:3", sharding=sharding, **sections) != 0
    assert last_checkpoint(tmp_path / "pieces/llm") == str(tmp_path / "pieces/llm/checkpoint-2")
    train(tmp_path / "pieces", data_dir, 2, sharding=sharding, **sections)
    assert_equal_weights(tmp_path / "whole/llm/final", tmp_path / "pieces/llm/final")


def test_a_stream_is_divided_over_the_processes(data_dir, tmp_path):
    options = {"max_steps": 4, "save_steps": 4}
    source = {"path": "saved", "streaming": True, "duration_column": "duration"}
    write_saved(data_dir)
    data = {"train_manifests": [], "train_sources": [source], "batch_duration_s": 1.0, "max_duration_s": 1.0}
    train(tmp_path, data_dir, 2, data=data, training=options, stages=STAGES[:1])
    report = DataReport.load(tmp_path / "ctc/final")
    assert report.utterances >= 8 and report.bad == {}


def write_saved(folder: Path) -> None:
    """The utterances as a data set saved on disk."""
    import datasets

    columns = {
        "audio": [str(folder / f"train-{index}.wav") for index in range(len(TEXTS))],
        "text": TEXTS,
        "duration": DURATIONS_S,
    }
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
