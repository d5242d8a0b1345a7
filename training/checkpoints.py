"""Checkpoints that a kill cannot spoil: one counts once all of its files are there."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

COMPLETE_NAME = "complete"  # in a checkpoint: all of its files are there


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in `folder` that was written to its end, if there is one."""
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{COMPLETE_NAME}")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


class CompleteCheckpoints(Trainer):
    """Marks finished checkpoints; to be mixed into a trainer.

    The one before is kept until then, and what a kill left half-written is removed: `save_total_limit` would count it,
    as the newest if its number is the highest, and delete the good one.
    """

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
