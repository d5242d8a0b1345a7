"""`Seq2SeqTrainer` for speech LLMs: batches by duration, learning rates by part, checkpoints of what was trained."""

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_speechllm.assembly import RECIPE_NAME
from hf_speechllm.audio_encoders import encoder_layers
from hf_speechllm.processing_speechllm import IGNORE_INDEX
from training.arguments import TuningArguments
from training.batching import DurationBatchSampler
from training.checkpoints import CompleteCheckpoints
from training.data import StreamingBatches, TrainingCollator
from training.data_report import REPORT_NAME, DataReport, merge
from training.spec_augment import SpecAugmentOptions, spec_augment

_LOSSES = ("ce_loss", "ctc_loss")
_PARTS = {"audio_tower": "encoder", "multi_modal_projector": "projector", "language_model": "llm"}


class SpeechLLMTrainer(CompleteCheckpoints, Seq2SeqTrainer):
    """Trains the parameters that require gradients, and saves those that any stage has trained.

    Args:
        tuning: Which parts learn, and how fast.
        batch_sampler: Batches of the training data; `None` if it is a stream, which makes its own.
        generation: Options of `generate` in evaluations.
        recipe: Saved beside the trained parts, for `hf_speechllm.assembly`.
        spec_augment: Masks on the features; `None` for none.
        report: Counts the data; those of all processes are saved beside each checkpoint.
        args, kwargs: As for `CompleteCheckpoints` and `Seq2SeqTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        tuning: TuningArguments,
        batch_sampler: DurationBatchSampler | None,
        generation: dict[str, Any],
        recipe: dict[str, Any],
        spec_augment: SpecAugmentOptions | None = None,
        report: DataReport | None = None,
        **kwargs: Any,
    ):
        self.tuning = tuning
        self.batch_sampler = batch_sampler
        self.generation = generation
        self.recipe = recipe
        self.spec_augment = spec_augment
        self.report = DataReport() if report is None else report
        super().__init__(*args, **kwargs)
        if batch_sampler is None:
            self.args.ignore_data_skip = True  # the stream skips by itself, without decoding
        if self.is_fsdp_enabled:
            # The layers to divide; transformers names those of decoders too that we left out (Whisper, Moonshine).
            present = {type(module).__name__ for module in self.model.modules()}
            self.model._no_split_modules = sorted(present & set(self.model._no_split_modules))
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._learning_rates: dict[str, float] = {}
        self._audio_s = 0.0
        self._logged_step = 0
        self._logged_time = time.perf_counter()
        self._batch_of_step = (0, 0)  # training step, batches of it so far
        self._steps_per_s: float | None = None

    # Data.

    def get_train_dataloader(self) -> Any:
        """Batches of this process; of a stream, from behind those that a resumed run has seen."""
        options = {
            "collate_fn": TrainingCollator(self.data_collator),
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
        }
        if self.batch_sampler is not None:
            return self.accelerator.prepare(DataLoader(self.train_dataset, batch_sampler=self.batch_sampler, **options))
        loader = DataLoader(self.train_dataset, batch_size=None, **options)
        return StreamLoader(loader, lambda: self.state.global_step * self.args.gradient_accumulation_steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of a step and their number of tokens; what became of the data is counted."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._learning_rates = {}  # now, since the scheduler is a step ahead when they are logged
        for group in self.optimizer.param_groups:
            key = f"learning_rate/{group['name']}"
            self._learning_rates[key] = max(self._learning_rates.get(key, 0.0), group["lr"])
        for batch in batches:
            info = batch.pop("data_info")
            info.add_to(self.report)
            self._audio_s += info.audio_s
            batch["is_placeholder"] = info.utterances == 0
        # Only if none of the utterances of this step can be used is the number zero.
        return batches, num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else num_items

    # Loss.

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        """The optimiser, with learning rates by part."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.tuning, self.args.learning_rate, self.args.weight_decay)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the base class; in training the features are masked and the parts of the loss summed up for the log."""
        return_outputs = kwargs.pop("return_outputs", False)
        inputs = dict(inputs)
        is_placeholder = inputs.pop("is_placeholder", False)
        if is_placeholder:
            inputs["labels"] = torch.full_like(inputs["labels"], self.processing_class.tokenizer.eos_token_id)
        if model.training and self.spec_augment is not None:
            inputs["input_features"] = self._mask(inputs)
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        if is_placeholder:
            loss = loss * 0.0
        elif model.training:
            for name in _LOSSES:
                if outputs.get(name) is not None:
                    self._loss_sums[name] = self._loss_sums.get(name, 0.0) + outputs[name].detach().float()
        return (loss, outputs) if return_outputs else loss

    def _mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        """SpecAugment, by a generator of this process, step and batch: the same after a restart."""
        step, batch = self._batch_of_step
        batch = batch + 1 if step == self.state.global_step else 0
        self._batch_of_step = (self.state.global_step, batch)
        numbers = (self.args.seed, self.state.global_step, batch, self.args.process_index)
        seed = 0
        for number in numbers:
            seed = (seed * 1_000_003 + number) % 2**63
        if self._steps_per_s is None:
            silence = torch.zeros(4 * self.processing_class.sampling_rate).numpy()
            self._steps_per_s = float(self.processing_class(silence)["input_features_mask"].sum()) / 4
        audio_tower = self.accelerator.unwrap_model(self.model).audio_tower
        return spec_augment(
            inputs["input_features"],
            inputs["input_features_mask"].sum(1).tolist(),
            self._steps_per_s,
            self.state.global_step,
            self.spec_augment,
            torch.Generator().manual_seed(seed),
            time_axis=2 if audio_tower.config.model_type == "whisper" else 1,
        )

    # Metrics.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to the loss its parts, the perplexity, the learning rates by part and the throughput."""
        if "loss" in logs:
            logs = {**logs, **self._training_metrics()}
        super().log(logs, *args, **kwargs)

    def _training_metrics(self) -> dict[str, float]:
        """Since the last log, over all processes."""
        steps = self.state.global_step - self._logged_step
        now = time.perf_counter()
        names = sorted(self._loss_sums)
        values = [float(self._loss_sums[name]) for name in names]
        sums = torch.tensor([*values, self._audio_s], device=self.args.device)
        # A process's losses are sums over its tokens, divided by the number of tokens of all processes.
        *losses, audio_s = self.accelerator.reduce(sums, reduction="sum").tolist()
        processes = 1 if self.args.average_tokens_across_devices else self.args.world_size
        metrics = {name: loss / steps / processes for name, loss in zip(names, losses, strict=True)}
        if "ce_loss" in metrics:
            metrics["perplexity"] = _perplexity(metrics["ce_loss"])
        metrics.update(self._learning_rates)
        metrics["audio_hours_per_hour"] = audio_s / max(now - self._logged_time, 1e-9)
        self._loss_sums, self._audio_s = {}, 0.0
        self._logged_step, self._logged_time = self.state.global_step, now
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class, with the run's options of `generate`; its time does not count for the throughput."""
        start, logged_time = time.perf_counter(), self._logged_time
        generation = {"tokenizer": self.processing_class.tokenizer, **self.generation}
        metrics = super().evaluate(*args, **{**generation, **kwargs})
        # Of several data sets, the base class calls this method again for each: their times are within this one.
        self._logged_time = logged_time + time.perf_counter() - start
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the base class; adds the parts of the loss and the perplexity, per token."""
        sums = torch.zeros(len(_LOSSES) + 1, dtype=torch.float64)  # of the losses, and the tokens

        def collect(_module: Any, _args: tuple, inputs: dict[str, Any], outputs: Any) -> None:
            if inputs.get("labels") is not None:
                tokens = int((inputs["labels"] != IGNORE_INDEX).sum())
                sums[-1] += tokens
                for index, name in enumerate(_LOSSES):
                    sums[index] += tokens * float(outputs.get(name) if outputs.get(name) is not None else 0.0)

        hook = self.accelerator.unwrap_model(self.model).register_forward_hook(collect, with_kwargs=True)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            hook.remove()
        *losses, tokens = self.accelerator.reduce(sums.float().to(self.args.device), reduction="sum").tolist()
        for name, loss in zip(_LOSSES, losses, strict=True):
            if loss > 0.0:
                output.metrics[f"{metric_key_prefix}_{name}"] = loss / tokens
        if losses[0] > 0.0:
            output.metrics[f"{metric_key_prefix}_perplexity"] = _perplexity(losses[0] / tokens)
        return output

    # Checkpoints.

    def train(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As the base class; the counts of the data go on from those of the checkpoint."""
        if resume_from_checkpoint is not None:
            self._logged_step = int(Path(resume_from_checkpoint).name.rpartition("-")[2])
            if self.is_world_process_zero() and (Path(resume_from_checkpoint) / REPORT_NAME).is_file():
                earlier = DataReport.load(Path(resume_from_checkpoint))
                # What is found when the data is opened is found again.
                self.report.outside_limits |= earlier.outside_limits
                earlier.outside_limits.clear()
                self.report.update(earlier)
        self._logged_time = time.perf_counter()
        return super().train(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def merged_report(self) -> DataReport:
        """The counts of all processes; all of them have to call this."""
        return merge(gather_object([self.report]))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What was trained, and the report on the data; all processes have to call this."""
        super().save_model(output_dir, _internal_call)
        report = self.merged_report()
        if self.args.should_save:
            report.save(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _save_beside(self, model: PreTrainedModel, folder: Path) -> None:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        (folder / RECIPE_NAME).write_text(json.dumps(self.recipe, indent=2) + "\n")


class StreamLoader:
    """Batches of a [`StreamingBatches`] from behind those that the run has seen.

    Args:
        loader: Data loader of it.
        batches_seen: How many these are, asked when the iteration begins.
    """

    def __init__(self, loader: DataLoader, batches_seen: Callable[[], int]):
        self.loader = loader
        self.dataset: StreamingBatches = loader.dataset
        self.batches_seen = batches_seen

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen = self.batches_seen()
        self.dataset.skip_batches = seen
        # Each worker skips whole rounds; the rest of a round is skipped here.
        return islice(iter(self.loader), seen % max(1, self.loader.num_workers), None)


def check_report_to(names: list[str]) -> None:
    """Refuse a logger that is not installed, before the models are loaded.

    Raises:
        ValueError: Naming it.
    """
    for name in names:
        packages = {"tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,))
        if name in ("tensorboard", "trackio", "wandb") and not any(map(importlib.util.find_spec, packages)):
            raise ValueError(f"training.report_to: {name} is not installed; pip install {name}, or set it to none.")


def check_sharding(arguments: TrainingArguments) -> None:
    """Refuse DeepSpeed ZeRO-3, which divides the weights while the model is built: it is used before it is trained.

    Raises:
        ValueError: If that is what the launcher asks for.
    """
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 divides the weights before training has seen the whole model; choose FSDP2, which does "
            "it later (training/configs/accelerate/fsdp2.yaml), or ZeRO-2."
        )


def parameter_groups(
    model: PreTrainedModel, tuning: TuningArguments, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimiser groups of the parameters that require gradients: learning rates by part, no decay on vectors."""
    layers_above = _layers_above(model.audio_tower)
    groups: dict[tuple[str, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = name.partition(".")[0]
        part = _PARTS.get(module, module)
        rate = learning_rate
        if part == "encoder":
            rate = learning_rate if tuning.encoder_learning_rate is None else tuning.encoder_learning_rate
            rate *= tuning.encoder_layer_decay ** layers_above[parameter]
        elif part == "llm":
            rate = learning_rate if tuning.llm_learning_rate is None else tuning.llm_learning_rate
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((part, rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": decay, "name": part}
        for (part, rate, decay), params in groups.items()
    ]


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


def _perplexity(ce_loss: float) -> float:
    """Per token."""
    return math.exp(ce_loss) if ce_loss < 700.0 else math.inf
