"""LoRA on a part of a model, once for all stages of a run."""

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")


def add_lora(module: nn.Module, lora: LoraConfig, option: str) -> None:
    """Add fresh LoRA weights to `module`; those of an earlier stage go on learning.

    Args:
        module: Encoder, projector or language model.
        lora: What to add; `target_modules` is a regular expression of names in `module`.
        option: What the targets are called in the options, for messages.

    Raises:
        ValueError: If no layer is a target, or an earlier stage had another LoRA.
    """
    earlier = getattr(module, "peft_config", {}).get("default")
    if earlier is None:
        try:
            inject_adapter_in_model(lora, module)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
        return
    for name in _SETTINGS:
        if getattr(earlier, name) != getattr(lora, name):
            raise ValueError(
                f"tuning: LoRA must be the same in all stages, got {name} {getattr(earlier, name)!r} before and "
                f"{getattr(lora, name)!r} now."
            )


def set_lora_trainable(module: nn.Module, trainable: bool) -> None:
    """Whether the LoRA weights in `module` learn; others are left as they are."""
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trainable)


def lora_scaling(module: nn.Module) -> float | None:
    """`alpha / r`, or `alpha / sqrt(r)`, of the LoRA in `module`; `None` if there is none."""
    scalings = {layer.scaling["default"] for layer in module.modules() if isinstance(layer, LoraLayer)}
    return scalings.pop() if scalings else None
