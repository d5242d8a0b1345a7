"""`Seq2SeqTrainer` for speech LLMs: batches by duration, learning rates by part, checkpoints of what was trained."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer

from hf_speechllm.assembly import RECIPE_NAME, TRAINED_WEIGHTS_NAME
from hf_speechllm.audio_encoders import encoder_layers
from training.arguments import TuningArguments
from training.data import DurationBatchSampler


class SpeechLLMTrainer(Seq2SeqTrainer):
    """Trains the parameters that require gradients, and saves those that any stage has trained.

    Args:
        tuning: Which parts learn, and how fast.
        batch_sampler: Batches of the training data.
        trained_names: Parameters that an earlier stage has trained; they are saved too.
        generation: Options of `generate` in evaluations.
        recipe: Saved beside the trained parts, for `hf_speechllm.assembly`.
        args, kwargs: As for `Seq2SeqTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        tuning: TuningArguments,
        batch_sampler: DurationBatchSampler,
        trained_names: set[str],
        generation: dict[str, Any],
        recipe: dict[str, Any],
        **kwargs: Any,
    ):
        self.tuning = tuning
        self.batch_sampler = batch_sampler
        self.generation = generation
        self.recipe = recipe
        super().__init__(*args, **kwargs)
        own = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.trained_names = trained_names | own
        self._loss_sums: dict[str, float] = {}
        self._loss_count = 0

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.tuning, self.args.learning_rate, self.args.weight_decay)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return_outputs = kwargs.pop("return_outputs", False)
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        if model.training:
            for name in ("ce_loss", "ctc_loss"):
                if outputs.get(name) is not None:
                    self._loss_sums[name] = self._loss_sums.get(name, 0.0) + float(outputs[name].detach())
            self._loss_count += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._loss_count:
            steps = self._loss_count / self.args.gradient_accumulation_steps
            logs = {**logs, **{name: value / steps for name, value in self._loss_sums.items()}}
            self._loss_sums, self._loss_count = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(*args, **{**self.generation, **kwargs})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        save_trained(model, self.trained_names, folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        (folder / RECIPE_NAME).write_text(json.dumps(self.recipe, indent=2) + "\n")
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        load_trained(self.model if model is None else model, Path(resume_from_checkpoint))


def save_trained(model: PreTrainedModel, names: set[str], folder: Path) -> None:
    """Write the named parameters of `model` into `folder`."""
    state = model.state_dict()
    save_file({name: state[name].contiguous() for name in sorted(names)}, folder / TRAINED_WEIGHTS_NAME)


def load_trained(model: PreTrainedModel, folder: Path) -> set[str]:
    """Read what [`save_trained`] wrote into `model`; returns the names.

    Raises:
        ValueError: If the model lacks a parameter, e.g. since LoRA is set up otherwise.
    """
    state = load_file(folder / TRAINED_WEIGHTS_NAME)
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{folder}: weight {unexpected[0]!r} has no place in this model; is `tuning` the same?")
    return set(state)


def parameter_groups(
    model: PreTrainedModel, tuning: TuningArguments, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimiser groups of the parameters that require gradients: learning rates by part, no decay on vectors."""
    layers_above = _layers_above(model.audio_tower)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = learning_rate
        if name.startswith("audio_tower."):
            rate = learning_rate if tuning.encoder_learning_rate is None else tuning.encoder_learning_rate
            rate *= tuning.encoder_layer_decay ** layers_above[parameter]
        elif name.startswith("language_model."):
            rate = learning_rate if tuning.llm_learning_rate is None else tuning.llm_learning_rate
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _layers_above(audio_tower: PreTrainedModel) -> dict[torch.nn.Parameter, int]:
    """How many encoder layers lie above each parameter; all of them for the front end, none for the final norm."""
    layers = encoder_layers(audio_tower)
    above = dict.fromkeys(audio_tower.parameters(), len(layers))
    for index, layer in enumerate(layers):
        above.update(dict.fromkeys(layer.parameters(), len(layers) - 1 - index))
    norm = final_norm(audio_tower)
    above.update(dict.fromkeys(norm.parameters() if norm is not None else (), 0))
    return above


def final_norm(audio_tower: PreTrainedModel) -> torch.nn.Module | None:
    """The normalisation behind the encoder's last layer, where there is one."""
    if not getattr(audio_tower.config, "do_stable_layer_norm", True):
        return None  # Wav2Vec2-base and its kin normalise before the first layer
    layers = encoder_layers(audio_tower)
    owner = next(module for module in audio_tower.modules() if getattr(module, "layers", None) is layers)
    return getattr(owner, "layer_norm", None)
