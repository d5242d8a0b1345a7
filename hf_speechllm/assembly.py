"""A full checkpoint from pre-trained models and the few weights that were trained on top of them.

Training changes a small part of a speech LLM: LoRA, projector, CTC head, some encoder layers. A folder of trained
parts holds just these:

    trained.safetensors      weights by their name in the model; LoRA as `...lora_A.default.weight`, `...lora_B...`
    recipe.json              {"audio_model": ..., "language_model": ..., "lora_scaling": ...}
    config.json, generation_config.json
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from .base_models import base_model
from .bpe_subset import restrict_merges
from .configuration_speechllm import SpeechLLMConfig
from .modeling_speechllm import SpeechLLMForConditionalGeneration
from .processing_speechllm import SpeechLLMProcessor

TRAINED_WEIGHTS_NAME = "trained.safetensors"
RECIPE_NAME = "recipe.json"
_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def resolve_model(name: str) -> str:
    """A Hub id or folder as it is; `base:NAME` becomes the folder of [`base_model`] NAME."""
    return base_model(name.removeprefix("base:")) if name.startswith("base:") else name


def merge_lora(
    state: dict[str, torch.Tensor],
    trained: dict[str, torch.Tensor],
    scaling: float,
    transposed: Collection[str] = (),
) -> None:
    """Replace, in `state`, what was trained: `W + scaling * B A` for LoRA, the weight itself otherwise.

    Args:
        state: Weights of the model by name, `[out, in]`.
        trained: Trained weights by name; those below a LoRA may be called `...base_layer.weight`.
        scaling: Of the LoRA.
        transposed: Weights that are `[in, out]` (GPT-2's).

    Raises:
        ValueError: If a trained weight has no place in `state` or another shape, or LoRA has one of its two matrices
            only.
    """
    # A weight comes before the LoRA that is added to it.
    for name in sorted(trained, key=lambda name: (name.endswith((_LORA_A, _LORA_B)), name)):
        layer = name.removesuffix(_LORA_A).removesuffix(_LORA_B)
        target = (name if layer == name else f"{layer}.weight").replace(".base_layer.", ".")
        if target not in state:
            raise ValueError(
                f"{TRAINED_WEIGHTS_NAME}: {name!r} has no place in this model; is the recipe of another one?"
            )
        value = trained[name].float()
        if layer != name:
            partner = layer + (_LORA_B if name.endswith(_LORA_A) else _LORA_A)
            if partner not in trained:
                raise ValueError(f"{TRAINED_WEIGHTS_NAME}: {partner!r} is missing beside {name!r}.")
            if name.endswith(_LORA_B):
                continue
            value = scaling * (trained[partner].float() @ value)
            value = value.T if target in transposed else value
        if value.shape != state[target].shape:
            raise ValueError(
                f"{TRAINED_WEIGHTS_NAME}: {name!r} is for a weight of shape {tuple(value.shape)}, the model's has "
                f"{tuple(state[target].shape)}."
            )
        value = value if layer == name else state[target].float() + value
        state[target] = value.to(state[target].dtype)


def load_trained_parts(folder: str | Path) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """The speech LLM of a folder of trained parts, in float32, and its processor."""
    folder = Path(folder)
    recipe = json.loads((folder / RECIPE_NAME).read_text())
    config = SpeechLLMConfig.from_pretrained(folder)
    audio_model, language_model = resolve_model(recipe["audio_model"]), resolve_model(recipe["language_model"])
    overrides = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name in SpeechLLMConfig.__annotations__ and name not in ("audio_config", "text_config")
    }
    model = SpeechLLMForConditionalGeneration.from_encoder_llm_pretrained(audio_model, language_model, **overrides)
    state = model.state_dict()
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    merge_lora(state, load_file(folder / TRAINED_WEIGHTS_NAME), recipe["lora_scaling"], transposed)
    model.load_state_dict(state)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    if recipe["restricted_tokenizer"]:
        tokenizer = restrict_merges(tokenizer, config.ctc_token_ids)
    processor = SpeechLLMProcessor(
        AutoFeatureExtractor.from_pretrained(audio_model),
        tokenizer,
        prompt_before=config.prompt_before,
        prompt_after=config.prompt_after,
    )
    return model.eval(), processor


def assemble(trained_folder: str | Path, output_folder: str | Path) -> None:
    """Write a checkpoint for `from_pretrained` and `pipeline`; `output_folder` appears when it is complete."""
    output_folder = Path(output_folder)
    unfinished = output_folder.with_name(f".{output_folder.name}.building")
    shutil.rmtree(unfinished, ignore_errors=True)
    model, processor = load_trained_parts(trained_folder)
    # float32: most CPUs compute bfloat16 many times slower, and transformers loads what is stored.
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    shutil.rmtree(output_folder, ignore_errors=True)
    os.replace(unfinished, output_folder)
