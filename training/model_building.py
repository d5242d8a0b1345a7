"""The model that a run starts from, put together of two pre-trained models or of trained parts."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedModel

from hf_speechllm.adapters import lora_target_pattern
from hf_speechllm.assembly import LORA_PARTS, build_untrained, read_trained_parts, resolve_model
from hf_speechllm.bpe_subset import NUM_CHARACTERS, restrict_merges, select_lowercase_tokens, subset_chains
from hf_speechllm.label_chains import LabelChains
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.processing_speechllm import SpeechLLMProcessor
from hf_speechllm.vocabulary import build_language_model, subword_chains, subword_labels
from training.arguments import ModelArguments, Stage
from training.checkpoints import load_state
from training.interpolate import SHARES_FIELD
from training.lora import add_lora, lora_scaling
from training.trained_parts import lora_layers, parts_folder, read_recipe, scaling_of, weight_shapes

CTC_UNITS = ("subset", "characters", "llm", "subwords", "none")


def build_processor(arguments: ModelArguments) -> tuple[SpeechLLMProcessor, LabelChains | None, dict[str, Any]]:
    """The processor, the chains of CTC labels that spell its tokens, if any, and config values of the tokeniser."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(arguments.vocabulary or arguments.language_model))
    for name in ("prompt_before", "prompt_after") if arguments.vocabulary is not None else ():
        prompt = arguments.config.get(name, "")
        if tokenizer.unk_token_id in tokenizer(prompt, add_special_tokens=False).input_ids:
            raise ValueError(
                f"{name}: the new vocabulary does not spell {prompt!r}; write it in words of the transcripts."
            )
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
    elif arguments.ctc_units == "subwords":
        if arguments.ctc_vocabulary is None:
            raise ValueError(
                "ctc_vocabulary is required with ctc_units: subwords; training/train_vocabulary.py makes one."
            )
        if arguments.llm_units == "ctc":
            raise ValueError("llm_units: ctc needs CTC labels that are tokens; set vocabulary, and ctc_units to llm.")
        subword_tokenizer = AutoTokenizer.from_pretrained(resolve_model(arguments.ctc_vocabulary))
        units["ctc_labels"] = subword_labels(subword_tokenizer)
        chains = subword_chains(tokenizer, subword_tokenizer)
    elif arguments.ctc_units != "none":
        raise ValueError(f"ctc_units must be one of {CTC_UNITS}, got {arguments.ctc_units!r}.")
    processor = SpeechLLMProcessor(
        AutoFeatureExtractor.from_pretrained(resolve_model(arguments.audio_model)),
        tokenizer,
        prompt_before=arguments.config.get("prompt_before", ""),
        prompt_after=arguments.config.get("prompt_after", ""),
    )
    units["audio_token_id"] = processor.audio_token_id
    return processor, chains, units


def build_model(arguments: ModelArguments) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The speech LLM of two pre-trained models or of trained parts, and its processor.

    Raises:
        ValueError: If a model is not named, or an option makes no sense.
    """
    model, processor = (_build_from_pretrained if arguments.trained_parts is None else _build_from_parts)(arguments)
    if arguments.attn_implementation is not None:
        _choose_attention(model, arguments.attn_implementation)
    return model, processor


def _choose_attention(model: SpeechLLMForConditionalGeneration, implementation: str | dict[str, str]) -> None:
    parts = ("audio_config", "text_config")
    if isinstance(implementation, dict) and not set(implementation) <= set(parts):
        raise ValueError(
            f"model.attn_implementation: expected a name or a mapping with keys among {parts}, got {implementation}."
        )
    model.set_attn_implementation(implementation)


def _build_from_pretrained(
    arguments: ModelArguments,
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    for name in ("audio_model", "language_model"):
        if not getattr(arguments, name):
            raise ValueError(
                f"model.{name} is required: a Hub id, a folder, or base:NAME for one of hf_speechllm.base_model; "
                "model.trained_parts names a model to go on from instead."
            )
    processor, chains, units = build_processor(arguments)
    vocabulary = None if arguments.vocabulary is None else resolve_model(arguments.vocabulary)
    language_model, _ = build_language_model(resolve_model(arguments.language_model), vocabulary, arguments.llm_init)
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        resolve_model(arguments.audio_model),
        language_model,
        tokenizer=processor.tokenizer,
        label_chains=chains,
        **{**units, **arguments.config},
    )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def _build_from_parts(arguments: ModelArguments) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The model of trained parts as training has it: with the LoRA of each part as an adapter that can learn."""
    folder = parts_folder(arguments.trained_parts)
    recipe, trained = read_trained_parts(folder)
    model, processor = build_untrained(folder, recipe)
    for part, layers in lora_layers(folder).items():
        rank = max(layers.values())
        module = model.get_submodule(part)
        lora = LoraConfig(
            r=rank,
            lora_alpha=rank * scaling_of(recipe["lora_scaling"], part),
            target_modules=lora_target_pattern(module, layers),
        )
        add_lora(module, lora, f"LoRA of {part} in {folder}")
    load_state(model, trained, folder)
    return model, processor


def already_trained(arguments: ModelArguments, model: PreTrainedModel) -> set[str]:
    """Names of the weights of a fresh model that its pre-trained models do not have, so that checkpoints need them."""
    if arguments.trained_parts is not None:
        return set(weight_shapes(parts_folder(arguments.trained_parts)))
    # The chains of labels of their own are computed from a tokeniser that is not kept.
    has_own_labels = model.config.ctc_chain_length is not None and model.config.ctc_token_ids is None
    return {"ctc_chains"} if has_own_labels else set()


def base_models(arguments: ModelArguments) -> tuple[str, ...]:
    """Names of the pre-trained models that a model is built of."""
    if arguments.trained_parts is None:
        return arguments.audio_model, arguments.language_model
    recipe = read_recipe(parts_folder(arguments.trained_parts))
    return recipe["audio_model"], recipe["language_model"]


def recipe(stage: Stage, model: PreTrainedModel) -> dict[str, Any]:
    """What `hf_speechllm.assembly` needs to put the trained parts together with the pre-trained models."""
    # Of the model, not of `tuning`: the LoRA may be an earlier stage's.
    scalings = {part: lora_scaling(model.get_submodule(part)) for part in LORA_PARTS}
    adapters = {part: scaling for part, scaling in scalings.items() if scaling is not None}
    if stage.model.trained_parts is not None:
        inherited = read_recipe(parts_folder(stage.model.trained_parts))
        inherited.pop(SHARES_FIELD, None)  # that of weights which have learnt since
        return {**inherited, "lora_scaling": adapters}
    return {
        "audio_model": stage.model.audio_model,
        "language_model": stage.model.language_model,
        "vocabulary": stage.model.vocabulary,
        "llm_init": stage.model.llm_init,
        "restricted_tokenizer": stage.model.llm_units == "ctc" and stage.model.ctc_units in ("subset", "characters"),
        "lora_scaling": adapters,
    }
