"""Checkpoints of what was trained, which a kill cannot spoil: one counts once all of its files are there.

A checkpoint holds the trained parameters, the config that trained them and `training_args.bin`, beside what the Trainer
needs to go on.
"""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

from hf_speechllm.assembly import TRAINED_WEIGHTS_NAME
from training.data_report import DataError

COMPLETE_NAME = "complete"  # in a checkpoint: all of its files are there
CONFIG_NAME = "training.yaml"  # the config with everything resolved; the same command takes it again


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in `folder` that was written to its end, if there is one."""
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE_NAME}")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def save_trained(
    model: PreTrainedModel, names: set[str], folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the named parameters of `model`, or of its gathered `state_dict`, into `folder`."""
    state = model.state_dict() if state_dict is None else state_dict
    save_file({name: state[name].contiguous() for name in sorted(names)}, folder / TRAINED_WEIGHTS_NAME)


def load_trained(model: PreTrainedModel, folder: Path) -> set[str]:
    """Read what [`save_trained`] wrote into `model`; returns the names.

    Raises:
        ValueError: If the model lacks a parameter, e.g. since LoRA is set up otherwise.
    """
    state = load_file(folder / TRAINED_WEIGHTS_NAME)
    load_state(model, state, folder)
    return set(state)


def load_state(model: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Put weights that were read from `folder` into `model`; raises ValueError if it lacks one of them."""
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{folder}: weight {unexpected[0]!r} has no place in this model; is `tuning` the same?")


class CompleteCheckpoints(Trainer):
    """Saves what was trained, and marks finished checkpoints; to be mixed into a trainer.

    The one before is kept until then, and what a kill left half-written is removed: `save_total_limit` would count it,
    as the newest if its number is the highest, and delete the good one.

    Args:
        trained_names: Parameters that an earlier stage has trained; they are saved beside those that learn now.
        effective: The config with everything resolved, saved with them.
        args, kwargs: As for `Trainer`.
    """

    def __init__(self, *args: Any, effective: dict[str, Any], trained_names: Collection[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.effective = effective
        own = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.trained_names = {*trained_names, *own}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As that of `Trainer`.

        Raises:
            DataError: For data that cannot be learnt from.
            RuntimeError: For other failures: a ValueError would be told like a user's mistake, without its traceback.
        """
        try:
            return super().train(*args, **kwargs)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{self.args.output_dir}: failed at step {self.state.global_step}.") from error

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            (folder / f"checkpoint-{self.state.global_step}" / COMPLETE_NAME).touch()
            for checkpoint in folder.glob("checkpoint-*"):
                if not (checkpoint / COMPLETE_NAME).exists():
                    shutil.rmtree(checkpoint)
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        save_trained(model, self.trained_names, folder, state_dict)
        (folder / CONFIG_NAME).write_text(yaml.safe_dump(self.effective, sort_keys=False))
        torch.save(self.args, folder / "training_args.bin")
        self._save_beside(model, folder)

    def _save_beside(self, model: PreTrainedModel, folder: Path) -> None:
        """What a kind of model needs beside its weights; called by the process that saves."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        if self.is_fsdp_enabled:  # whose shards the Trainer has saved beside ours
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model if model is None else model, Path(resume_from_checkpoint))
