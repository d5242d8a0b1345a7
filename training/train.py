"""Train a speech LLM: `python -m training.train training/configs/tiny_en.yaml --data-dir DIR --output-dir DIR`.

Stages run one after the other. A run that was interrupted goes on from its last checkpoint when the same command is
given again; a finished stage is not repeated.
"""

import argparse
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import AutoFeatureExtractor, AutoTokenizer, EvalPrediction, PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_speechllm.assembly import resolve_model
from hf_speechllm.audio_encoders import encoder_layers
from hf_speechllm.bpe_subset import NUM_CHARACTERS, restrict_merges, select_lowercase_tokens, subset_chains
from hf_speechllm.data_collator import SpeechLLMDataCollator
from hf_speechllm.label_chains import LabelChains
from hf_speechllm.metrics import word_errors
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.processing_speechllm import IGNORE_INDEX, SpeechLLMProcessor
from training.arguments import ModelArguments, Stage, TuningArguments, load_stages
from training.augment import AugmentOptions
from training.data import DurationBatchSampler, ManifestDataset, read_manifests
from training.trainer import SpeechLLMTrainer, final_norm, load_trained

logger = logging.getLogger(__name__)


def build_processor(arguments: ModelArguments) -> tuple[SpeechLLMProcessor, LabelChains | None, dict[str, Any]]:
    """The processor, the chains of CTC labels that spell its tokens, if any, and config values of the tokeniser."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(arguments.language_model))
    if arguments.llm_units not in ("native", "ctc"):
        raise ValueError(f"llm_units must be 'native' or 'ctc', got {arguments.llm_units!r}.")
    units: dict[str, Any] = {}
    chains = None
    if arguments.ctc_units in ("subset", "characters"):
        size = arguments.ctc_subset_size if arguments.ctc_units == "subset" else NUM_CHARACTERS
        units["ctc_token_ids"] = select_lowercase_tokens(tokenizer, size)
        if arguments.llm_units == "ctc":
            tokenizer = restrict_merges(tokenizer, units["ctc_token_ids"])
        else:
            chains = subset_chains(tokenizer, units["ctc_token_ids"])
    elif arguments.ctc_units == "llm":
        special = set(tokenizer.all_special_ids)  # the end of sequence, for one, is never heard
        units["ctc_token_ids"] = [index for index in range(len(tokenizer)) if index not in special]
    elif arguments.ctc_units != "none":
        raise ValueError(f"ctc_units must be 'subset', 'characters', 'llm' or 'none', got {arguments.ctc_units!r}.")
    processor = SpeechLLMProcessor(
        AutoFeatureExtractor.from_pretrained(resolve_model(arguments.audio_model)),
        tokenizer,
        prompt_before=arguments.config.get("prompt_before", ""),
        prompt_after=arguments.config.get("prompt_after", ""),
    )
    units["audio_token_id"] = processor.audio_token_id
    return processor, chains, units


def build_model(arguments: ModelArguments) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The untrained speech LLM of two pre-trained models, and its processor."""
    processor, chains, units = build_processor(arguments)
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        resolve_model(arguments.audio_model),
        resolve_model(arguments.language_model),
        tokenizer=processor.tokenizer,
        label_chains=chains,
        **{**units, **arguments.config},
    )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def set_trainable(model: PreTrainedModel, tuning: TuningArguments) -> None:
    """Freeze, inject LoRA or leave free each part, as `tuning` says.

    Raises:
        ValueError: For an unknown strategy, more encoder layers than there are, or a LoRA unlike that of an earlier
            stage.
    """
    for part in ("encoder", "projector", "ctc_head", "llm"):
        known = ("freeze", "lora", "full") if part == "llm" else ("freeze", "full")
        if getattr(tuning, part) not in known:
            raise ValueError(f"tuning.{part} must be one of {known}, got {getattr(tuning, part)!r}.")
    if tuning.llm == "lora":
        lora = LoraConfig(
            r=tuning.lora_r,
            lora_alpha=tuning.lora_alpha,
            lora_dropout=tuning.lora_dropout,
            use_rslora=tuning.lora_rslora,
            target_modules=rf".*\.({tuning.lora_targets})",
        )
        _inject_once(lora, model.language_model)
    model.language_model.requires_grad_(tuning.llm == "full")
    for name, parameter in model.language_model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(tuning.llm == "lora")
    model.audio_tower.requires_grad_(tuning.encoder == "full" and tuning.encoder_layers is None)
    if tuning.encoder == "full" and tuning.encoder_layers is not None:
        layers = encoder_layers(model.audio_tower)
        if not 0 <= tuning.encoder_layers <= len(layers):
            raise ValueError(f"tuning.encoder_layers must be 0 to {len(layers)}, got {tuning.encoder_layers}.")
        for module in (*layers[len(layers) - tuning.encoder_layers :], final_norm(model.audio_tower)):
            if module is not None:
                module.requires_grad_(True)
    model.multi_modal_projector.requires_grad_(tuning.projector == "full" and tuning.ce_loss_weight > 0)
    if model.ctc_head is not None:
        model.ctc_head.requires_grad_(tuning.ctc_head == "full" and tuning.ctc_loss_weight > 0)
    model.config.ce_loss_weight = tuning.ce_loss_weight
    model.config.ctc_loss_weight = tuning.ctc_loss_weight


def _inject_once(lora: LoraConfig, language_model: PreTrainedModel) -> None:
    """Add fresh LoRA weights; those of an earlier stage go on learning."""
    earlier = getattr(language_model, "peft_config", {}).get("default")
    if earlier is None:
        inject_adapter_in_model(lora, language_model)
        return
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"):
        if getattr(earlier, name) != getattr(lora, name):
            raise ValueError(
                f"tuning: LoRA must be the same in all stages, got {name} {getattr(earlier, name)!r} before and "
                f"{getattr(lora, name)!r} now."
            )


def recipe(stage: Stage, model: PreTrainedModel) -> dict[str, Any]:
    """What `hf_speechllm.assembly` needs to put the trained parts together with the pre-trained models."""
    # Of the model, not of `tuning`: the LoRA may be an earlier stage's.
    scalings = {layer.scaling["default"] for layer in model.language_model.modules() if isinstance(layer, LoraLayer)}
    return {
        "audio_model": stage.model.audio_model,
        "language_model": stage.model.language_model,
        "restricted_tokenizer": stage.model.llm_units == "ctc" and stage.model.ctc_units in ("subset", "characters"),
        "lora_scaling": scalings.pop() if scalings else 1.0,
    }


def error_rates(processor: SpeechLLMProcessor, prediction: EvalPrediction) -> dict[str, float]:
    """Word and character error rate of generated tokens against the labels, in percent."""
    pad = processor.pad_token_id
    texts = [
        processor.batch_decode(np.where(ids == IGNORE_INDEX, pad, ids))
        for ids in (prediction.label_ids, prediction.predictions)
    ]
    errors = word_errors(*texts)
    return {"wer": 100 * errors.wer, "cer": 100 * errors.cer}


def build_trainer(
    stage: Stage, model: PreTrainedModel, processor: SpeechLLMProcessor, data_dir: Path, trained_names: set[str]
) -> SpeechLLMTrainer:
    """The trainer of one stage."""
    data, rate = stage.data, processor.sampling_rate
    entries = [
        entry
        for entry in read_manifests(data.train_manifests, data_dir)
        if data.min_duration_s <= entry["duration"] <= data.max_duration_s
    ]
    if not entries:
        raise ValueError(
            f"data: no utterance of {data.train_manifests} lasts {data.min_duration_s} to {data.max_duration_s} s; "
            "change min_duration_s or max_duration_s."
        )
    durations = [entry["duration"] for entry in entries]
    logger.info("%d training utterances, %.1f h", len(entries), sum(durations) / 3600)
    seed = stage.training.seed if stage.training.data_seed is None else stage.training.data_seed
    dataset = ManifestDataset(entries, rate, AugmentOptions() if data.augment else None, seed=seed)
    evaluation = {
        name: ManifestDataset(read_manifests([path], data_dir)[: data.max_eval_examples], rate)
        for name, path in data.eval_manifests.items()
    }
    return SpeechLLMTrainer(
        model=model,
        args=stage.training,
        train_dataset=dataset,
        eval_dataset=evaluation or None,
        data_collator=SpeechLLMDataCollator(processor),
        processing_class=processor,
        compute_metrics=lambda prediction: error_rates(processor, prediction),
        tuning=stage.tuning,
        batch_sampler=DurationBatchSampler(durations, data.batch_duration_s, dataset, seed=dataset.seed),
        trained_names=trained_names,
        generation=stage.generation,
        recipe=recipe(stage, model),
    )


def run(stages: list[Stage], data_dir: Path, only: Collection[str] | None = None) -> None:
    """Train stage after stage; what is already there is not done again.

    Args:
        stages: From [`load_stages`].
        data_dir: Folder that the manifests are relative to.
        only: Names of the stages to train; the others are skipped, their weights read if they are finished.

    Raises:
        ValueError: If a stage of `only` needs the weights of one that is not finished.
    """
    set_seed(stages[0].training.seed)
    model, processor = build_model(stages[0].model)
    trained_names: set[str] = set()
    for stage in stages:
        final = Path(stage.training.output_dir) / "final"
        set_trainable(model, stage.tuning)
        if final.exists():
            logger.info("stage %s is finished, its weights are read from %s", stage.name, final)
            trained_names |= load_trained(model, final)
            continue
        if only is not None and stage.name not in only:
            later = [each.name for each in stages[stages.index(stage) + 1 :] if each.name in only]
            if later:
                raise ValueError(
                    f"stage {later[0]!r} starts from the weights of {stage.name!r}, which is not finished."
                )
            return
        trainer = build_trainer(stage, model, processor, data_dir, trained_names)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        logger.info("stage %s: %.2f M of the parameters learn", stage.name, trained / 1e6)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(stage.training.output_dir))
        trained_names = trainer.trained_names
        unfinished = final.with_name("final.unfinished")
        trainer.save_model(str(unfinished))
        unfinished.rename(final)


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
    stages = load_stages(arguments.config, arguments.output_dir, arguments.overrides)
    if arguments.stage is not None:
        unknown = set(arguments.stage) - {stage.name for stage in stages}
        if unknown:
            parser.error(f"--stage: no stage {sorted(unknown)[0]!r}; there are {[stage.name for stage in stages]}")
    torch.set_float32_matmul_precision("high")
    run(stages, arguments.data_dir, arguments.stage)


if __name__ == "__main__":
    main()
