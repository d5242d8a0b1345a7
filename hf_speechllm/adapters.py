"""Low-rank adapters (LoRA) of PEFT beside the weights that they adapt, so that one checkpoint is two language models.

A checkpoint with an adapter is a checkpoint without one (`config.json`, `model.safetensors`) plus two files,
`adapter_config.json` and `adapter_model.safetensors`, which `from_pretrained` loads by itself. What transformers
saves of such a model is the adapter alone; the functions here write both.

Source: Hu et al. (2022), "LoRA: Low-Rank Adaptation of Large Language Models": `h = W x + alpha / r * B A x`.
"""

import copy
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

ADAPTER_FILE_NAMES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
_BASE_LAYER = "base_layer."  # where PEFT puts the layer that it wraps
# Settings by which a LoRA trains more than its matrices beside linear layers.
_UNSUPPORTED = ("modules_to_save", "target_parameters", "trainable_token_indices")


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Inside, `module` computes as if it had no adapters; afterwards as before."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters]
    # Not `enable_adapters`: that takes adapters that are switched on for ones to be trained, and is slow.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def adapter_unnoticed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `save_pretrained` of transformers writes all weights that it is given, not the adapter alone."""
    # By these, it would choose those of the adapter, and name them as it does for PEFT.
    marks = {"_hf_peft_config_loaded": False, "_weight_conversions": None}
    before = {name: getattr(model, name, None) for name in marks}
    vars(model).update(marks)
    try:
        yield
    finally:
        vars(model).update(before)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the active adapters to the weights, `W + alpha / r * B A`, and forget them."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    for _, owner in list(_adapter_owners(model)):
        del owner.peft_config
        # What transformers set when it loaded an adapter; the other is how it would name the weights in a save.
        owner._hf_peft_config_loaded, owner._weight_conversions = False, None


def lora_target_pattern(model: nn.Module, layers: Collection[str]) -> str:
    """A `target_modules` for PEFT that selects these layers of `model` and no others.

    Args:
        model: The model that the names are of.
        layers: Names of linear layers.
    """
    roots = sorted({layer.partition(".")[0] for layer in layers})
    leaves = sorted({layer.rpartition(".")[2] for layer in layers})
    pattern = rf"({'|'.join(roots)})\..*\.({'|'.join(leaves)})"
    selected = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    return pattern if selected == set(layers) else "|".join(re.escape(layer) for layer in sorted(layers))


def plain_state_dict(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of `model` without its adapters, by the names that they have without them.

    Raises:
        ValueError: If an adapter is merged into the weights, or weights are offloaded to disk.
    """
    offloaded = [name for name, value in state_dict.items() if value.is_meta]
    if offloaded:
        raise ValueError(f"{offloaded[0]} is offloaded; load the model without offloading to save it with its adapter.")
    plain = dict(state_dict)
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.merged:
            raise ValueError(f"The adapter of {name} is merged into its weights; unmerge it before the model is saved.")
        for key in layer.state_dict(prefix=f"{name}."):
            value = plain.pop(key)
            inner = key.removeprefix(f"{name}.")
            if inner.startswith(_BASE_LAYER):
                plain[f"{name}.{inner.removeprefix(_BASE_LAYER)}"] = value
    return plain


def save_adapter(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], folder: str | os.PathLike) -> None:
    """Write the active adapter of `model` into `folder`, in the format of PEFT; if all have been deleted, none.

    Args:
        model: A model with adapters, added to itself or to a part of it, such as its language model.
        state_dict: The weights of `model`.
        folder: Receives `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: If there is more than one adapter to write, or one that is more than LoRA on linear layers.
    """
    owners = list(_adapter_owners(model))
    if not owners:
        remove_adapter(folder)
        return
    if len(owners) > 1:
        raise ValueError(f"One part of a model can have adapters, got {[name or 'the model' for name, _ in owners]}.")
    [(owner_name, owner)] = owners
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    active = {adapter for layer in layers.values() for adapter in layer.active_adapters}
    if len(active) != 1:
        raise ValueError(f"One adapter can be saved with a model, got {sorted(active)}; choose it with set_adapter.")
    [adapter] = active
    config = owner.peft_config[adapter]
    extra = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if not isinstance(config, LoraConfig) or extra:
        raise ValueError(
            f"The adapter that is saved with a model must be LoRA on linear layers, got {type(config).__name__}"
            f"{' with ' + extra[0] if extra else ''}."
        )
    config = copy.copy(config)
    adapted = [name for name, layer in layers.items() if isinstance(layer, LoraLayer) and adapter in layer.r]
    # `owner` may be a part of the model, whereas the layers are looked up from the model when it is loaded.
    config.target_modules = lora_target_pattern(model, adapted)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.inference_mode = True
    config.base_model_name_or_path = None  # the weights beside it
    prefix = f"{owner_name}." if owner_name else ""
    weights = get_peft_model_state_dict(
        owner,
        {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)},
        adapter,
        save_embedding_layers=False,  # they are beside it too; to find that out, PEFT asks the Hub
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    weights = {f"base_model.model.{prefix}{key}": value.contiguous() for key, value in weights.items()}
    save_file(weights, Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def remove_adapter(folder: str | os.PathLike) -> None:
    """Delete the adapter in `folder`, if there is one: `from_pretrained` would load it into any model there."""
    for name in ADAPTER_FILE_NAMES:
        Path(folder, name).unlink(missing_ok=True)


def set_base_model(folder: str | os.PathLike, repo_id: str) -> None:
    """Name the repository of the weights that the adapter in `folder` belongs to."""
    path = Path(folder) / ADAPTER_CONFIG_NAME
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = repo_id
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of `model` has adapters."""
    return any(isinstance(layer, BaseTunerLayer) for layer in model.modules())


def _adapter_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each part of `model` that adapters were added to; the name of `model` itself is empty."""
    for name, module in model.named_modules():
        if getattr(module, "peft_config", None):
            yield name, module
