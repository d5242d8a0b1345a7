"""LoRA on a part of a model, once for all stages of a run, and the type of the weights below it."""

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

FROZEN_DTYPES = ("float32", "bfloat16")


def add_lora(module: nn.Module, lora: LoraConfig, option: str) -> None:
    """Add fresh LoRA weights to `module`; those that are there already, of an earlier stage, go on learning.

    Args:
        module: Encoder, projector or language model.
        lora: What to add; `target_modules` is a regular expression of names in `module`.
        option: What the targets are called in the options, for messages.

    Raises:
        ValueError: If no layer is a target, or the LoRA that is there has another rank, scale or other layers.
    """
    adapted = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    if not adapted:
        try:
            inject_adapter_in_model(lora, module)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
        return
    inside = tuple(f"{name}." for name in adapted)
    names = (name for name, _ in module.named_modules() if not name.startswith(inside))
    targets = {name for name in names if re.fullmatch(lora.target_modules, name)}
    scale = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    some = next(iter(adapted.values()))
    for what, before, now in (
        ("rank (lora_r)", some.r["default"], lora.r),
        ("scale (lora_alpha / lora_r, or / sqrt(lora_r))", some.scaling["default"], scale),
        (f"layers ({option})", sorted(adapted), sorted(targets)),
    ):
        is_same = math.isclose(before, now) if isinstance(before, float) else before == now
        if not is_same:
            raise ValueError(
                f"tuning: LoRA must be the same in all stages, and as in the trained parts: got the {what} "
                f"{_shortened(before)} before and {_shortened(now)} now."
            )
    for layer in adapted.values():
        layer.lora_dropout["default"] = nn.Dropout(lora.lora_dropout) if lora.lora_dropout else nn.Identity()


def _shortened(value: Any) -> str:
    """A list of names by how many there are and what they end in."""
    if not isinstance(value, list):
        return f"{value:g}"
    return f"{len(value)} x {'|'.join(sorted({name.rpartition('.')[2] for name in value}))}"


def set_lora_trainable(module: nn.Module, trainable: bool) -> None:
    """Whether the LoRA weights in `module` learn; others are left as they are."""
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trainable)


def cast_frozen(model: PreTrainedModel, dtype: str, device_type: str, learnt: Collection[str] = ()) -> None:
    """Hold linear layers that do not learn in one of `FROZEN_DTYPES`, and all other weights in float32.

    With half precision `model` computes in mixed precision wherever it is called, since its weights no longer agree.
    What is added up or normalised stays in float32, as in mixed precision of all of it.

    Args:
        model: With `requires_grad` as it is to be in training.
        dtype: Its name. What was rounded before stays so.
        device_type: Where the model is going to compute.
        learnt: Names of parameters of `model` that an earlier stage has trained; they are not rounded.
    """
    model.__dict__.pop("forward", None)
    embeddings = model.get_input_embeddings().weight  # may be the output layer's too
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            is_frozen = isinstance(module, nn.Linear) and not parameter.requires_grad and key not in learnt
            is_half = is_frozen and parameter is not embeddings
            parameter.data = parameter.data.to(getattr(torch, dtype) if is_half else torch.float32)
    if dtype != "float32":
        model.forward = torch.autocast(device_type, getattr(torch, dtype))(model.forward)


def lora_scaling(module: nn.Module) -> float | None:
    """`alpha / r`, or `alpha / sqrt(r)`, of the LoRA in `module`; `None` if there is none."""
    scalings = {layer.scaling["default"] for layer in module.modules() if isinstance(layer, LoraLayer)}
    return scalings.pop() if scalings else None
