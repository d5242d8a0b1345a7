"""A full checkpoint from pre-trained models and the few weights that were trained on top of them.

Training changes a small part of a speech LLM: LoRA, projector, CTC head, some encoder layers. A folder of trained
parts holds just these:

    trained.safetensors      weights by their name in the model; LoRA as `...lora_A.default.weight`, `...lora_B...`
    recipe.json              {"audio_model": ..., "language_model": ..., "vocabulary": ..., "llm_init": ...,
                              "lora_scaling": {"language_model": ...}, ...}
    config.json, generation_config.json
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from .adapters import lora_target_pattern, merge_adapters
from .base_models import base_model, give_rights_of
from .bpe_subset import restrict_merges, subset_chains
from .configuration_speechllm import SpeechLLMConfig
from .modeling_speechllm import SpeechLLMForConditionalGeneration
from .processing_speechllm import SpeechLLMProcessor
from .vocabulary import build_language_model

TRAINED_WEIGHTS_NAME = "trained.safetensors"
RECIPE_NAME = "recipe.json"
CHECKPOINT_FORMAT = 2  # of what `assemble` writes by default; 1 had the LoRA merged into the weights
LORA_PARTS = ("audio_tower", "multi_modal_projector", "language_model")
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def resolve_model(name: str) -> str:
    """A Hub id or folder as it is; `base:NAME` becomes the folder of [`base_model`] NAME."""
    return base_model(name.removeprefix("base:")) if name.startswith("base:") else name


def load_trained_weights(
    model: SpeechLLMForConditionalGeneration,
    trained: dict[str, torch.Tensor],
    lora_scaling: float | dict[str, float],
) -> None:
    """Put into `model` what was trained: LoRA as an adapter, other weights in the place of the model's.

    The language model may be wanted without its LoRA, so that stays an adapter; that of other parts is added to their
    weights.

    Args:
        model: A model without adapters.
        trained: Trained weights by name; those below a LoRA are called `...base_layer.weight`.
        lora_scaling: `alpha / r` of the LoRA, or that of each of LORA_PARTS; without effect if there is none.

    Raises:
        ValueError: If a trained weight has no place in `model` or another shape, or LoRA has one of its two matrices
            only, or several ranks in one part.
    """
    lora_a = {name.removesuffix(_LORA_A): value for name, value in trained.items() if name.endswith(_LORA_A)}
    lora_b = {name.removesuffix(_LORA_B) for name in trained if name.endswith(_LORA_B)}
    for layer in sorted(lora_a.keys() ^ lora_b):
        found, missing = (_LORA_A, _LORA_B) if layer in lora_a else (_LORA_B, _LORA_A)
        raise ValueError(f"{TRAINED_WEIGHTS_NAME}: {layer + missing!r} is missing beside {layer + found!r}.")
    modules = dict(model.named_modules())
    # Layers that the model lacks are told below.
    layers_of = {
        part: [layer for layer in lora_a if layer in modules and layer.startswith(f"{part}.")] for part in LORA_PARTS
    }
    for part, layers in layers_of.items():
        if not layers:
            continue
        ranks = sorted({len(lora_a[layer]) for layer in layers})
        if len(ranks) > 1:
            raise ValueError(f"{TRAINED_WEIGHTS_NAME}: the LoRA of all layers must have one rank, got {ranks}.")
        scaling = lora_scaling[part] if isinstance(lora_scaling, dict) else lora_scaling
        is_merged = part != "language_model"
        owner = model.get_submodule(part) if is_merged else model
        names = [layer.removeprefix(f"{part}.") for layer in layers] if is_merged else layers
        config = LoraConfig(
            r=ranks[0],
            lora_alpha=scaling * ranks[0],
            target_modules=lora_target_pattern(owner, names),
            fan_in_fan_out=isinstance(modules[layers[0]], Conv1D),
        )
        if is_merged:
            inject_adapter_in_model(config, owner)
        else:
            model.add_adapter(config)
    state = model.state_dict()
    for name, value in trained.items():
        if name not in state:
            raise ValueError(
                f"{TRAINED_WEIGHTS_NAME}: {name!r} has no place in this model; is the recipe of another one?"
            )
        if value.shape != state[name].shape:
            raise ValueError(
                f"{TRAINED_WEIGHTS_NAME}: {name!r} has the shape {tuple(value.shape)}, in the model it is "
                f"{tuple(state[name].shape)}."
            )
    model.load_state_dict(trained, strict=False)
    for part, layers in layers_of.items():
        if layers and part != "language_model":
            merge_adapters(model.get_submodule(part))


def load_trained_parts(folder: str | Path) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The speech LLM of a folder of trained parts, in float32, and its processor.

    A LoRA is an active adapter of the model: without it ([`~SpeechLLMForConditionalGeneration.plain_language_model`])
    the language model is the pre-trained one.
    """
    recipe, trained = read_trained_parts(folder)
    model, processor = build_untrained(folder, recipe)
    untrained = {f"language_model.{name}" for name, _ in model.language_model.named_parameters()} - set(trained)
    if recipe.get("llm_init", "pretrained") == "random" and untrained:
        raise ValueError(
            f"{RECIPE_NAME}: the language model started from random weights (llm_init), and {min(untrained)!r} was not "
            "trained; it needs a stage with tuning.llm: full."
        )
    load_trained_weights(model, trained, recipe["lora_scaling"])
    return model.eval(), processor


def read_trained_parts(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The recipe and the weights of a folder of trained parts."""
    recipe = json.loads((Path(folder) / RECIPE_NAME).read_text())
    return recipe, load_file(Path(folder) / TRAINED_WEIGHTS_NAME)


def build_untrained(
    folder: str | Path, recipe: dict[str, Any]
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The model that the weights of a folder of trained parts belong into, without them, and its processor."""
    config = SpeechLLMConfig.from_pretrained(folder)
    audio_model = resolve_model(recipe["audio_model"])
    # Folders of earlier versions have the pre-trained language model with its own vocabulary.
    vocabulary, init = recipe.get("vocabulary"), recipe.get("llm_init", "pretrained")
    language_model, tokenizer = build_language_model(
        resolve_model(recipe["language_model"]), None if vocabulary is None else resolve_model(vocabulary), init
    )
    overrides = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name in SpeechLLMConfig.__annotations__ and name not in ("audio_config", "text_config")
    }
    # Those of labels that are no tokens are among the trained weights.
    has_subset = config.ctc_chain_length is not None and config.ctc_token_ids is not None
    chains = subset_chains(tokenizer, config.ctc_token_ids) if has_subset else None
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(
        audio_model, language_model, tokenizer, chains, **overrides
    )
    model.generation_config = GenerationConfig.from_pretrained(folder)
    if recipe["restricted_tokenizer"]:
        tokenizer = restrict_merges(tokenizer, config.ctc_token_ids)
    processor = SpeechLLMProcessor(
        AutoFeatureExtractor.from_pretrained(audio_model),
        tokenizer,
        prompt_before=config.prompt_before,
        prompt_after=config.prompt_after,
    )
    return model, processor


def assemble(trained_folder: str | Path, output_folder: str | Path, *, merge_lora: bool = False) -> None:
    """Write a checkpoint for `from_pretrained` and `pipeline`; `output_folder` appears when it is complete.

    Args:
        trained_folder: Folder of trained parts.
        output_folder: Folder of the checkpoint; replaced if there is one.
        merge_lora: Add the LoRA to the weights. The language model takes less time per token then, but it cannot be
            used without its LoRA any more, as some ways of decoding do.
    """
    output_folder = Path(output_folder)
    unfinished = output_folder.with_name(f".{output_folder.name}.building")
    shutil.rmtree(unfinished, ignore_errors=True)
    model, processor = load_trained_parts(trained_folder)
    if merge_lora:
        merge_adapters(model)
    # float32: most CPUs compute bfloat16 many times slower, and transformers loads what is stored.
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    give_rights_of(unfinished / CONFIG_NAME)
    shutil.rmtree(output_folder, ignore_errors=True)
    os.replace(unfinished, output_folder)
