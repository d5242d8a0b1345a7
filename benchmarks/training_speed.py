"""Speed and memory of training the default model, and what each option of its recipe does to them.

    OMP_NUM_THREADS=1 python -m benchmarks.training_speed --manifests 'data/train/flite-*.jsonl' [--row NAME]

A few steps of the last CTC stage and of the last stage with the language model of `training/configs/tiny_en.yaml`, as
the Trainer does them, from the weights of the default model (what blanks leave depends on them); then the same with one
option changed, and with all of those at once that make it slower or larger. Each row is a process of its own. The first
step is not counted. Speed is per CPU time, data loading included (on a GPU: per time), memory the largest resident set
(on a GPU: of tensors) in the counted steps. Prints a Markdown table. Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_speechllm import modeling_speechllm
from hf_speechllm.assembly import TRAINED_WEIGHTS_NAME
from hf_speechllm.default_model import TRAINED_PARTS
from training.arguments import Stage, read_run, stages_of
from training.command_line import errors_in_one_line
from training.evaluation_data import UsageError
from training.model_building import build_model
from training.train import build_trainer, set_trainable
from training.trainer import SpeechLLMTrainer

CONFIG = Path(__file__).parent.parent / "training" / "configs" / "tiny_en.yaml"
STATUS, PEAK = Path("/proc/self/status"), "VmHWM:"


@dataclass(frozen=True)
class Row:
    """A measurement: which `stage` ("ctc" or "llm"), `changes` to its config by dotted names, and what no config says:
    batches in `random_order`, the `usual_ctc_loss`."""

    stage: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    random_order: bool = False
    usual_ctc_loss: bool = False


NO_DROPPING = {"model.config.ctc_blank_threshold": None}
ALL_OF_LLM = {"tuning.llm": "full"}
CHECKPOINTING = {"training.gradient_checkpointing": True}
BF16 = {"training.bf16": True}
ROWS = {
    "ctc": Row("ctc", "CTC stage as in the recipe"),
    "ctc_random": Row("ctc", "batches in random order, not of similar length", random_order=True),
    "ctc_usual": Row("ctc", "CTC loss from all log-probabilities at once", usual_ctc_loss=True),
    "ctc_before": Row("ctc", "both", random_order=True, usual_ctc_loss=True),
    "ctc_top": Row("ctc", "only the three upper encoder layers learn", {"tuning.encoder_layers": 3}),
    "ctc_frozen": Row("ctc", "the encoder does not learn", {"tuning.encoder": "freeze"}),
    "ctc_checkpointing": Row("ctc", "gradient checkpointing", CHECKPOINTING),
    "ctc_bf16": Row("ctc", "bf16", BF16),
    "llm": Row("llm", "LLM stage as in the recipe"),
    "llm_random": Row("llm", "batches in random order, not of similar length", random_order=True),
    "llm_blanks": Row("llm", "positions of blanks are not dropped", NO_DROPPING),
    "llm_full": Row("llm", "all weights of the LLM learn, not a LoRA", ALL_OF_LLM),
    "llm_before": Row("llm", "all three", {**NO_DROPPING, **ALL_OF_LLM}, random_order=True),
    "llm_encoder": Row("llm", "the encoder learns too", {"tuning.encoder": "full"}),
    "llm_checkpointing": Row("llm", "gradient checkpointing", CHECKPOINTING),
    "llm_bf16": Row("llm", "bf16", BF16),
    "llm_frozen_bf16": Row(
        "llm", "bf16, frozen layers of the LLM held in it", {**BF16, "tuning.llm_frozen_dtype": "bfloat16"}
    ),
}


class Meter(TrainerCallback):
    """Seconds, seconds of audio and peak memory of the steps after the first."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.trainer: SpeechLLMTrainer | None = None
        self.start: tuple[float, float] | None = None
        self.figures: dict[str, float] = {}

    def _now(self) -> tuple[float, float]:
        """Seconds of this process and seconds of audio so far."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if self.on_gpu else time.process_time(), self.trainer.report.audio_s

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin after the first step, take the figures after every later one."""
        now = self._now()
        if self.start is None:
            self.start = now
            reset_peak(self.on_gpu)
            return
        seconds, audio_s = now[0] - self.start[0], now[1] - self.start[1]
        self.figures = {
            "audio_hours_per_hour": audio_s / seconds,
            "steps_per_s": (state.global_step - 1) / seconds,
            "peak_mib": peak_mib(self.on_gpu),
        }


def reset_peak(on_gpu: bool) -> None:
    """Begin to look for the largest memory now: loading the models needs more for a moment."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(on_gpu: bool) -> float:
    """Largest memory since then."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(PEAK))
    return int(line.split()[1]) / 2**10


def random_batches(durations_s: list[float], batch_duration_s: float, seed: int) -> list[list[int]]:
    """All utterances once, as they come: as many in a batch as fit, the longest times their number."""
    batches: list[list[int]] = [[]]
    longest_s = 0.0
    for index in np.random.default_rng(seed).permutation(len(durations_s)).tolist():
        longest_s = max(longest_s, durations_s[index])
        if batches[-1] and longest_s * (len(batches[-1]) + 1) > batch_duration_s:
            batches.append([])
            longest_s = durations_s[index]
        batches[-1].append(index)
    return batches


def load_stage(row: Row, manifests: list[str], steps: int, output_dir: str) -> Stage:
    """The last stage of the recipe of this kind, with the changes of the row."""
    values = read_run(CONFIG)
    overrides = [f"training.max_steps={steps}", "training.save_strategy='no'", "training.eval_strategy='no'"]
    overrides += ["training.report_to=none", "training.disable_tqdm=true", "data.eval_manifests={}"]
    overrides += [f"data.train_manifests={json.dumps([str(Path(path).absolute()) for path in manifests])}"]
    for name, value in row.changes.items():
        if name.startswith("model.config."):
            values["model"]["config"][name.removeprefix("model.config.")] = value
        else:
            overrides.append(f"{name}={json.dumps(value)}")
    stages = stages_of(values, str(CONFIG), output_dir, overrides)
    return [stage for stage in stages if (stage.tuning.ce_loss_weight > 0) == (row.stage == "llm")][-1]


def measure(row: Row, manifests: list[str], steps: int) -> dict[str, float]:
    """The figures of a row, in this process."""
    with tempfile.TemporaryDirectory() as output_dir:
        stage = load_stage(row, manifests, steps, output_dir)
        torch.manual_seed(0)
        model, processor = build_model(stage.model)
        set_trainable(model, stage.tuning)
        trained = load_file(TRAINED_PARTS / TRAINED_WEIGHTS_NAME)
        known = model.state_dict().keys()
        model.load_state_dict({name: value for name, value in trained.items() if name in known}, strict=False)
        if row.usual_ctc_loss:
            modeling_speechllm.linear_ctc_loss = padded_usual_loss
        trainer = build_trainer(stage, model, processor, Path(), set())
        if row.random_order:
            rows = trainer.train_dataset.rows
            durations_s = [rows[index].duration_s for index in range(len(rows))]
            trainer.batch_sampler = random_batches(durations_s, stage.data.batch_duration_s, seed=0)
        meter = Meter(on_gpu=trainer.args.device.type == "cuda")
        meter.trainer = trainer
        trainer.add_callback(meter)
        trainer.train()
    return meter.figures


def padded_usual_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    feature_lens: torch.Tensor,
    *,
    blank_id: int,
) -> torch.Tensor:
    """As `linear_ctc_loss`, from the log-probabilities [B, T, A]; entries of `targets` below 0 are skipped."""
    order = (targets < 0).int().argsort(dim=1, stable=True)
    log_probs = torch.nn.functional.linear(features, weight, bias).float().log_softmax(-1)
    return torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        targets.gather(1, order).clamp(min=0),
        feature_lens,
        (targets >= 0).sum(1),
        blank=blank_id,
        reduction="sum",
        zero_infinity=True,
    )


def print_table(arguments: argparse.Namespace) -> None:
    """The figures of all rows, each measured in a process of its own."""
    print("| | audio hours per hour | steps per minute | peak MiB |\n|:--|--:|--:|--:|", flush=True)
    options = ["--manifests", *arguments.manifests, "--steps", str(arguments.steps), "--json"]
    for name in arguments.row or ROWS:
        command = [sys.executable, "-m", "benchmarks.training_speed", *options, "--row", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        print(
            f"| {ROWS[name].title} | {figures['audio_hours_per_hour']:.1f} | {60 * figures['steps_per_s']:.1f} "
            f"| {figures['peak_mib']:.0f} |",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--manifests", nargs="+", required=True, metavar="JSONL", help="of speech with texts, names or patterns")
    add(
        "--steps",
        type=int,
        default=4,
        metavar="N",
        help="training steps, the first of which is not counted (default: %(default)s)",
    )
    add(
        "--row",
        action="append",
        choices=ROWS,
        metavar="ROW",
        help=f"measure only this one, repeatable: {', '.join(ROWS)} (default: all)",
    )
    add("--json", action="store_true", help="measure the one --row here and print JSON")
    arguments = parser.parse_args()
    with errors_in_one_line("training_speed", subprocess.SubprocessError):
        if arguments.steps < 2:
            raise UsageError(f"--steps: expected at least 2, since the first is not counted, got {arguments.steps}")
        if arguments.json:
            print(json.dumps(measure(ROWS[arguments.row[0]], arguments.manifests, arguments.steps)))
        else:
            print_table(arguments)


if __name__ == "__main__":
    main()
