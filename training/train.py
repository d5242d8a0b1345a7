"""Train a speech LLM: `python -m training.train training/configs/tiny_en.yaml --data-dir DIR --output-dir DIR`.

Stages run one after the other. A run that was interrupted goes on from its last checkpoint when the same command is
given again; a finished stage is not repeated. Every checkpoint holds the weights that were trained and `training.yaml`,
the config of its stage with everything resolved. training/recipe.py makes the data too, and measures the result.
"""

import argparse
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, set_seed

from hf_speechllm.audio_encoders import encoder_layers
from hf_speechllm.configuration_speechllm import check_loss_weights
from hf_speechllm.data_collator import SpeechLLMDataCollator
from hf_speechllm.metrics import word_errors
from hf_speechllm.processing_speechllm import IGNORE_INDEX, SpeechLLMProcessor
from training.arguments import Stage, TuningArguments, defaults_of, load_stages, parse_options, read_yaml
from training.augment import AugmentOptions
from training.checkpoints import CONFIG_NAME, last_checkpoint, load_trained
from training.command_line import errors_in_one_line
from training.ctc_fit import CTCFit
from training.data import RowLoader, load_evaluation_data, load_training_data
from training.data_report import DataReport
from training.data_sources import is_duration, read_manifests
from training.interpolate import SHARES_FIELD, check_number, interpolate, share_of, write_state
from training.lora import FROZEN_DTYPES, add_lora, cast_frozen, set_lora_trainable
from training.model_building import already_trained, build_model, recipe
from training.row_reader import RowReader
from training.spec_augment import SpecAugmentOptions
from training.trained_parts import read_recipe, read_trained_weights, weight_shapes
from training.trainer import SpeechLLMTrainer, check_report_to, check_sharding, final_norm

logger = logging.getLogger(__name__)


def set_trainable(model: PreTrainedModel, tuning: TuningArguments) -> None:
    """Freeze, inject LoRA or leave free each part, as `tuning` says.

    Raises:
        ValueError: For an unknown strategy, no loss, more encoder layers than there are, or a LoRA unlike that of an
            earlier stage or without any layer to adapt.
    """
    for part in ("encoder", "projector", "llm", "cross_attention", "ctc_head", "llm_embeddings"):
        known = ("freeze", "lora", "full") if part in ("encoder", "projector", "llm") else ("freeze", "full")
        if getattr(tuning, part) not in known:
            raise ValueError(f"tuning.{part} must be one of {known}, got {getattr(tuning, part)!r}.")
    if tuning.llm_frozen_dtype not in FROZEN_DTYPES:
        raise ValueError(f"tuning.llm_frozen_dtype must be one of {FROZEN_DTYPES}, got {tuning.llm_frozen_dtype!r}.")
    check_loss_weights(tuning.ce_loss_weight, tuning.ctc_loss_weight, has_ctc_head=model.ctc_head is not None)
    has_ce = tuning.ce_loss_weight > 0
    _tune_encoder(model.audio_tower, tuning)
    _tune_part(model.multi_modal_projector, tuning, tuning.projector, r"(.*\.)?", "projector_lora_targets", has_ce)
    _tune_part(model.language_model, tuning, tuning.llm, r".*\.", "lora_targets")
    if tuning.llm_embeddings == "full":
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.requires_grad_(True)
    if model.cross_attention is not None:
        model.cross_attention.requires_grad_(tuning.cross_attention == "full" and has_ce)
    if model.ctc_head is not None:
        model.ctc_head.requires_grad_(tuning.ctc_head == "full" and tuning.ctc_loss_weight > 0)
    model.config.ce_loss_weight = tuning.ce_loss_weight
    model.config.ctc_loss_weight = tuning.ctc_loss_weight


def _tune_encoder(audio_tower: PreTrainedModel, tuning: TuningArguments) -> None:
    if tuning.encoder == "freeze" or tuning.encoder_layers is None:
        _tune_part(audio_tower, tuning, tuning.encoder, r"(.*\.)?", "encoder_lora_targets")
        return
    layers = encoder_layers(audio_tower)
    if not 0 <= tuning.encoder_layers <= len(layers):
        raise ValueError(f"tuning.encoder_layers must be 0 to {len(layers)}, got {tuning.encoder_layers}.")
    top = range(len(layers) - tuning.encoder_layers, len(layers))
    if tuning.encoder == "lora":
        prefix = rf"(.*\.)?layers\.({'|'.join(map(str, top))})\.(.*\.)?"
        _tune_part(audio_tower, tuning, "lora", prefix, "encoder_lora_targets")
        return
    audio_tower.requires_grad_(False)
    for module in (*(layers[index] for index in top), final_norm(audio_tower)):
        if module is not None:
            module.requires_grad_(True)
    set_lora_trainable(audio_tower, False)


def _tune_part(
    part: nn.Module, tuning: TuningArguments, strategy: str, prefix: str, targets: str, has_loss: bool = True
) -> None:
    """Apply `strategy` to a part; `prefix` is what stands before the names of its option `targets`."""
    if strategy == "lora":
        lora = LoraConfig(
            r=tuning.lora_r,
            lora_alpha=tuning.lora_alpha,
            lora_dropout=tuning.lora_dropout,
            use_rslora=tuning.lora_rslora,
            target_modules=rf"{prefix}({getattr(tuning, targets)})",
        )
        add_lora(part, lora, f"tuning.{targets}")
    part.requires_grad_(strategy == "full" and has_loss)
    set_lora_trainable(part, strategy == "lora" and has_loss)


def named_now(model: PreTrainedModel, names: set[str]) -> set[str]:
    """Names of weights in `model`; those that LoRA was put around since have moved into its `base_layer`."""
    state = model.state_dict()
    moved = {name: ".base_layer.".join(name.rpartition(".")[::2]) for name in names}
    return {name if name in state else moved[name] for name in names}


def error_rates(processor: SpeechLLMProcessor, prediction: EvalPrediction) -> dict[str, float]:
    """Word and character error rate of generated tokens against the labels, in percent."""
    pad = processor.pad_token_id
    texts = [
        processor.batch_decode(np.where(ids == IGNORE_INDEX, pad, ids))
        for ids in (prediction.label_ids, prediction.predictions)
    ]
    errors = word_errors(*texts)
    return {"wer": 100 * errors.wer, "cer": 100 * errors.cer}


def warn_of_changes(stage: Stage, final: Path) -> None:
    """Say which options of a finished stage were others when it was trained: they have no effect on its weights."""
    trained_with = read_yaml((final / CONFIG_NAME).read_text())
    changes = []
    for section in ("model", "tuning", "data", "training"):
        given, given_then = stage.effective[section], trained_with.get(section, {})
        defaults = defaults_of(section)  # an option that did not exist then, too
        for key in sorted({*given, *given_then}):
            then, now = given_then.get(key, defaults.get(key)), given.get(key, defaults.get(key))
            if then != now:
                changes.append(f"{section}.{key} was {then!r}, is {now!r}")
    shares = read_recipe(final, ()).get(SHARES_FIELD)
    expected = None if stage.interpolate is None else list(stage.interpolate.shares)
    if shares != expected:
        changes.append(f"interpolate.shares was {shares}, is {expected}")
    if changes:
        logger.warning(
            "stage %s was trained with other options: %s; remove %s to train it again",
            stage.name,
            "; ".join(changes),
            final,
        )


def row_reader(stage: Stage, model: PreTrainedModel, processor: SpeechLLMProcessor) -> RowReader:
    """What reads the data of a stage."""
    is_spelled = model.config.ctc_token_ids is not None or model.config.ctc_chain_length is not None
    has_ctc = model.ctc_head is not None and is_spelled and stage.tuning.ctc_loss_weight > 0
    return RowReader(
        processor.sampling_rate,
        text_normalization=stage.data.text_normalization,
        convert_audio=stage.data.convert_audio,
        empty_text=stage.data.empty_text,
        ctc_fit=CTCFit.of_model(model, processor) if has_ctc else None,
    )


def check_manifests(
    stages: Sequence[Stage], model: PreTrainedModel, processor: SpeechLLMProcessor, data_dir: Path
) -> None:
    """Look through the manifests of all stages now, not when their turn comes hours later; audio is not decoded.

    Raises:
        ValueError: If a manifest is not there or cannot be read.
        DataError: For a row that cannot be learnt from, where these are refused.
    """
    checked = set()
    for stage in stages:
        rows, data = read_manifests(stage.data.train_manifests, data_dir), stage.data
        if data.bad_data != "refuse":
            continue
        reader = row_reader(stage, model, processor)
        options = (data.text_normalization, data.empty_text, reader.ctc_fit is not None)
        for row in rows:
            is_left_out = is_duration(row.duration_s) and not (
                data.min_duration_s <= row.duration_s <= data.max_duration_s
            )
            key = (row.source, row.row, options)
            if key in checked or is_left_out:
                continue
            checked.add(key)
            fault = reader.fault(row)
            if fault is not None:
                DataReport(refuse=True).add_bad(fault)


def build_trainer(
    stage: Stage, model: PreTrainedModel, processor: SpeechLLMProcessor, data_dir: Path, trained_names: set[str]
) -> SpeechLLMTrainer:
    """The trainer of one stage."""
    learnt = {name.removeprefix("language_model.") for name in trained_names}
    cast_frozen(model.language_model, stage.tuning.llm_frozen_dtype, stage.training.device.type, learnt)
    data, training = stage.data, stage.training
    report = DataReport(refuse=data.bad_data == "refuse")
    # What is found when the data is opened is the same in all processes: the first one counts it.
    found = report if training.process_index == 0 else DataReport(report.refuse)
    reader = row_reader(stage, model, processor)
    augmentation = parse_options(AugmentOptions, data.augment_options, "data.augment_options")
    masks = parse_options(SpecAugmentOptions, data.spec_augment_options, "data.spec_augment_options")
    with training.main_process_first(desc="opening the data"):  # whose durations `datasets` caches for the others
        dataset, batch_sampler = load_training_data(
            data,
            RowLoader(reader, augmentation if data.augment else None),
            data_dir,
            found,
            seed=training.seed if training.data_seed is None else training.data_seed,
            process_index=training.process_index,
            num_processes=training.world_size,
        )
        evaluation = load_evaluation_data(data, reader, data_dir, found)
    if batch_sampler is not None:
        logger.info("%d training utterances, %.1f h", len(dataset), batch_sampler.total_s / 3600)
    return SpeechLLMTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        eval_dataset=evaluation or None,
        data_collator=SpeechLLMDataCollator(processor),
        processing_class=processor,
        compute_metrics=lambda prediction: error_rates(processor, prediction),
        tuning=stage.tuning,
        batch_sampler=batch_sampler,
        trained_names=trained_names,
        effective=stage.effective,
        generation=stage.generation,
        recipe=recipe(stage, model),
        spec_augment=masks if data.spec_augment else None,
        report=report,
    )


def check_shares_of(stages: Sequence[Stage], model: PreTrainedModel) -> None:
    """Refuse shares that are not those of the encoder's layers; raises ValueError."""
    for stage in stages:
        if stage.interpolate is not None and len(stage.interpolate.shares) > 1:
            try:
                check_number(stage.interpolate.shares, len(encoder_layers(model.audio_tower)))
            except ValueError as error:
                raise ValueError(f"stage {stage.name!r}, interpolate.{error}") from None


def check_interpolation(stage: Stage, start: Path, trained: Collection[str], initial: Collection[str]) -> None:
    """Refuse before a stage is trained what could not be interpolated afterwards.

    Args:
        stage: The stage.
        start: Folder of the earlier one.
        trained: Names of the weights that the stage will leave.
        initial: Names of those that the run began with.

    Raises:
        ValueError: If a weight to start from is missing.
    """
    known = {*weight_shapes(start), *initial}
    for name in sorted(trained):
        if share_of(name, stage.interpolate.shares) < 1.0 and name not in known:
            raise ValueError(
                f"stage {stage.name!r}, interpolate.start: {stage.interpolate.start!r} has no weight {name!r}; "
                "expected a stage with the same LoRA, or shares for encoder layers, norm and CTC head only."
            )


def interpolate_stage(stage: Stage, start: Path, folder: Path, seed: int) -> None:
    """Move the weights in `folder`, which the stage left, towards those in `start`; `seed` is that of the model."""
    start_weights, end_weights = read_trained_weights(start), read_trained_weights(folder)
    if not end_weights.keys() <= start_weights.keys():
        set_seed(seed)
        start_weights = {**build_model(stage.model)[0].state_dict(), **start_weights}
    state = interpolate(start_weights, end_weights, stage.interpolate.shares)
    write_state(state, folder, read_recipe(folder), stage.interpolate.shares)


def train_stage(stage: Stage, trainer: SpeechLLMTrainer, final: Path, start: Path | None, seed: int) -> None:
    """Train, and write the folder `final`, which is there only once it is complete; see [`interpolate_stage`]."""
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    logger.info("stage %s: %.2f M of the parameters learn", stage.name, trained / 1e6)
    trainer.train(resume_from_checkpoint=last_checkpoint(stage.training.output_dir))
    unfinished = final.with_name("final.unfinished")
    trainer.save_model(str(unfinished))
    if trainer.args.should_save:
        if start is not None:
            interpolate_stage(stage, start, unfinished, seed)
        unfinished.rename(final)
        logger.info("stage %s: %s", stage.name, DataReport.load(final).summary())
    trainer.accelerator.wait_for_everyone()


def run(stages: list[Stage], data_dir: Path, only: Collection[str] | None = None) -> None:
    """Train stage after stage; what is already there is not done again.

    Args:
        stages: From [`load_stages`].
        data_dir: Folder that the manifests are relative to.
        only: Names of the stages to train; the others are skipped, their weights read if they are finished.

    Raises:
        ValueError: If options or data do not fit, or a stage of `only` needs the weights of one that is not finished.
        RuntimeError: If a stage fails after it has begun to learn.
    """
    check_report_to([name for stage in stages for name in stage.training.report_to])
    check_sharding(stages[0].training)
    set_seed(stages[0].training.seed)
    model, processor = build_model(stages[0].model)
    trained_names, initial_names = already_trained(stages[0].model, model), set(model.state_dict())
    finals = {stage.name: Path(stage.training.output_dir) / "final" for stage in stages}
    is_wanted = {stage.name: only is None or stage.name in only for stage in stages}
    todo = [stage for stage in stages if is_wanted[stage.name] and not finals[stage.name].exists()]
    check_shares_of(todo, model)
    check_manifests(todo, model, processor, data_dir)
    for stage in stages:
        final = finals[stage.name]
        if stage.tuning.projector == "lora" and not any(n.startswith("multi_modal_projector.") for n in trained_names):
            raise ValueError(
                f"stage {stage.name!r}, tuning.projector: lora adapts a projector that has learnt, and this one starts "
                "from random weights; it needs an earlier stage with full."
            )
        set_seed(stage.training.seed)  # fresh LoRA weights are the same whether the stage before has just run or not
        set_trainable(model, stage.tuning)
        trained_names = named_now(model, trained_names)
        if final.exists():
            logger.info("stage %s is finished, its weights are read from %s", stage.name, final)
            warn_of_changes(stage, final)
            trained_names |= load_trained(model, final)
            continue
        if not is_wanted[stage.name]:
            later = [each.name for each in stages[stages.index(stage) + 1 :] if is_wanted[each.name]]
            if later:
                raise ValueError(
                    f"stage {later[0]!r} starts from the weights of {stage.name!r}, which is not finished."
                )
            return
        trainer = build_trainer(stage, model, processor, data_dir, trained_names)
        start = None if stage.interpolate is None else finals[stage.interpolate.start]
        if start is not None:
            check_interpolation(stage, start, trainer.trained_names, initial_names)
        train_stage(stage, trainer, final, start, stages[0].training.seed)
        trained_names = trainer.trained_names
        is_divided = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if start is not None and not is_divided:
            load_trained(model, final)
        if stage is not stages[-1] and is_divided:
            # The parameters stay divided or cast: the next stage starts from a fresh model and the weights on disk.
            if trainer.is_deepspeed_enabled:
                AcceleratorState._reset_state()  # which holds the stage's plugin, and would refuse the next one's
            run(stages, data_dir, only)
            return


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file, e.g. training/configs/tiny_en.yaml")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="win over the file, in every stage")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that the manifests are relative to")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--stage",
        action="append",
        metavar="NAME",
        help="train only this stage (repeatable), from the finished ones before it; all by default",
    )
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with errors_in_one_line("train"):
        stages = load_stages(arguments.config, arguments.output_dir, arguments.overrides)
        unknown = set(arguments.stage or ()) - {stage.name for stage in stages}
        if unknown:
            parser.error(f"--stage: no stage {sorted(unknown)[0]!r}; there are {[stage.name for stage in stages]}")
        torch.set_float32_matmul_precision("high")
        run(stages, arguments.data_dir, arguments.stage)


if __name__ == "__main__":
    main()
