"""Trained parts that a run starts from: a stage's folder `final`, an export, or the default model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_speechllm.assembly import LORA_PARTS, RECIPE_NAME, TRAINED_WEIGHTS_NAME
from hf_speechllm.default_model import TRAINED_PARTS

DEFAULT = "default"
_LORA_A = ".lora_A.default.weight"
_TARGET_OPTIONS = dict(zip(LORA_PARTS, ("encoder_lora_targets", "projector_lora_targets", "lora_targets"), strict=True))


def parts_folder(name: str) -> Path:
    """The folder of trained parts called `name`, or that of the default model.

    Raises:
        ValueError: If it is no such folder.
    """
    folder = TRAINED_PARTS if name == DEFAULT else Path(name)
    missing = [each for each in (RECIPE_NAME, TRAINED_WEIGHTS_NAME) if not (folder / each).is_file()]
    if missing:
        raise ValueError(
            f"model.trained_parts: expected {DEFAULT!r} or a folder of trained parts (a stage's `final`, or what "
            f"training.export writes), got {name!r}, in which there is no {missing[0]}."
        )
    return folder


def lora_layers(folder: Path) -> dict[str, dict[str, int]]:
    """Of each part of the model that has a LoRA there: the rank of each layer, by its name in that part."""
    layers: dict[str, dict[str, int]] = {}
    with safe_open(folder / TRAINED_WEIGHTS_NAME, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118, it is no mapping
            if name.endswith(_LORA_A):
                part, _, layer = name.removesuffix(_LORA_A).partition(".")
                layers.setdefault(part, {})[layer] = weights.get_slice(name).get_shape()[0]
    return layers


def lora_options(folder: Path) -> dict[str, Any]:
    """Options of `TuningArguments` with which the LoRA of these parts goes on learning; none if there is no LoRA."""
    scalings = json.loads((folder / RECIPE_NAME).read_text())["lora_scaling"]
    options: dict[str, Any] = {}
    for part, layers in lora_layers(folder).items():
        rank = max(layers.values())
        options[_TARGET_OPTIONS[part]] = "|".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        options |= {"lora_r": rank, "lora_alpha": rank * scaling_of(scalings, part)}
    return options


def scaling_of(scalings: float | dict[str, float], part: str) -> float:
    """`alpha / r` of the LoRA of a part; early recipes have one number for all."""
    return float(scalings[part] if isinstance(scalings, dict) else scalings)


def trained_names(folder: Path) -> set[str]:
    """Names of the trained weights."""
    with safe_open(folder / TRAINED_WEIGHTS_NAME, "pt") as weights:
        return set(weights.keys())
