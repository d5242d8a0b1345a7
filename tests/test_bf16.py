"""Training and generation in bfloat16 on a CPU, beside float32."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import RATE, tone, write_config, write_manifest
from tiny_models import loud_model, tiny_processor

from training.arguments import load_stages
from training.train import run

TEXTS = ["the thing", "an inn", "a ring", "the king"]
DURATIONS_S = [1.0, 0.6, 0.8, 0.9]
STEPS = 12
STAGES = [
    {"name": "ctc", "tuning": {"encoder": "full", "ce_loss_weight": 0.0, "ctc_loss_weight": 1.0}},
    {"name": "llm", "tuning": {"encoder": "freeze", "llm": "lora", "lora_r": 4}},
]


def train(folder: Path, data_dir: Path, bf16: bool) -> dict[str, list[float]]:
    """Losses of each stage; the runs differ in nothing but the type."""
    config = write_config(
        folder.with_suffix(".yaml"),
        data={"train_manifests": ["train.jsonl"], "augment": False},
        training={
            "bf16": bf16, "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.02, "lr_scheduler_type": "constant",
        },
        stages=STAGES,
    )  # fmt: skip
    losses: dict[str, list[float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.train.build_model", lambda _arguments: (loud_model(), tiny_processor()))
        patch.setattr("training.trainer.SpeechLLMTrainer.log", note_losses(losses))
        run(load_stages(config, folder), data_dir)
    return losses


def note_losses(losses: dict[str, list[float]]):
    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            losses.setdefault(Path(self.args.output_dir).name, []).append(logs["loss"])

    return log


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[bool, dict[str, list[float]]]]:
    """Folder of the runs, and their losses by whether they are in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    write_manifest(folder / "train.jsonl", TEXTS, DURATIONS_S)
    return folder, {bf16: train(folder / str(bf16), folder, bf16) for bf16 in (False, True)}


@pytest.mark.parametrize("stage", ["ctc", "llm"])
def test_it_learns_in_bfloat16_as_in_float32(runs, stage):
    _, losses = runs
    exact, rounded = (torch.tensor(losses[bf16][stage]) for bf16 in (False, True))
    assert len(rounded) == STEPS and rounded[-1] < 0.9 * rounded[0]
    assert not torch.equal(rounded, exact), "it did not compute in bfloat16"
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.02, atol=0.0)
    torch.testing.assert_close(rounded, exact, rtol=0.15, atol=0.0)


def test_the_weights_stay_in_float32(runs):
    folder, _ = runs
    for stage in ("ctc", "llm"):
        state = load_file(folder / f"True/{stage}/final/trained.safetensors")
        assert state and {value.dtype for value in state.values()} == {torch.float32}


@pytest.fixture
def models():
    """The same model in float32 and in bfloat16."""
    exact = loud_model()
    return exact, copy.deepcopy(exact).to(torch.bfloat16)


def test_the_losses_of_a_bfloat16_model_are_nearly_those_of_a_float32_one(models):
    waveforms = [tone(duration_s, 150 * (index + 1)) for index, duration_s in enumerate(DURATIONS_S)]
    batch = tiny_processor()(waveforms, sampling_rate=RATE, text=TEXTS)
    with torch.no_grad():
        exact, rounded = (model(**batch) for model in models)
    assert rounded.logits.dtype == torch.bfloat16
    for name in ("loss", "ce_loss", "ctc_loss"):
        assert float(rounded[name]) == pytest.approx(float(exact[name]), rel=0.03)
        assert float(rounded[name]) != float(exact[name])


@pytest.mark.parametrize(
    "options",
    [{"ctc_weight": 0.0}, {"ctc_weight": 0.3, "num_beams": 3}, {"mode": "ctc_greedy"}, {"mode": "ctc_beam"}],
    ids=json.dumps,
)
def test_generation_in_bfloat16_agrees_roughly(models, options):
    """Most first tokens: near ties may fall the other way, and what follows depends on them."""
    waveforms = [tone(0.4 + 0.1 * index, 150 * (index + 1)) for index in range(8)]
    batch = tiny_processor()(waveforms, sampling_rate=RATE)
    with torch.no_grad():
        exact, rounded = (model.generate(**batch, **options) for model in models)
    agree = (exact[:, 0] == rounded[:, 0]).float().mean()
    assert agree >= 0.75
