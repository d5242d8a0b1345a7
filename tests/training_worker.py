"""Trains a tiny model as `python -m training.train` does; a script, for runs of several processes and runs that die.

python tests/training_worker.py CONFIG DATA_DIR OUTPUT_DIR [KILL]: KILL is `step:N`, to die in training step N, or
`save:N`, to die half-way through checkpoint N. With FSDP2_ON_CPU in the environment, in place of DDP.
"""

import os
import signal
import sys
from pathlib import Path

from accelerate.state import DistributedType, PartialState
from tiny_models import tiny_model, tiny_processor

import training.train
from training.arguments import load_stages
from training.trainer import SpeechLLMTrainer


def die() -> None:
    """As by a power cut: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(when: str) -> None:
    """Die at `step:N` or `save:N`."""
    kind, _, number = when.partition(":")
    name = {"step": "training_step", "save": "_save_optimizer_and_scheduler"}[kind]
    original = getattr(SpeechLLMTrainer, name)

    def method(self, *args, **kwargs):
        if self.state.global_step == int(number):
            if kind == "save":
                Path(args[0], "optimizer.pt").write_bytes(b"half of it")
            die()
        return original(self, *args, **kwargs)

    setattr(SpeechLLMTrainer, name, method)


def divide_on_cpu() -> None:
    """Let accelerate use FSDP2 on the CPU, by a white lie about the device: it offers it for accelerators alone."""
    options = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "RESHARD_AFTER_FORWARD": "true"}
    options |= {"STATE_DICT_TYPE": "FULL_STATE_DICT", "CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ.update({f"FSDP_{name}": value for name, value in options.items()}, ACCELERATE_USE_FSDP="true")
    original = PartialState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def main() -> None:
    """Command line."""
    config, data_dir, output_dir, *kill = sys.argv[1:]
    training.train.build_model = lambda _arguments: (tiny_model(), tiny_processor())
    if "FSDP2_ON_CPU" in os.environ:
        divide_on_cpu()
    if kill:
        arrange_death(kill[0])
    training.train.run(load_stages(config, output_dir), Path(data_dir))


if __name__ == "__main__":
    main()
