"""Folders of trained parts (see `hf_speechllm.assembly`), read with errors that name the file that is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_speechllm.assembly import LORA_PARTS, RECIPE_NAME, TRAINED_WEIGHTS_NAME
from hf_speechllm.audio import one_line
from hf_speechllm.default_model import TRAINED_PARTS
from training.evaluation_data import UsageError, read_json_object

DEFAULT = "default"
BASE_FIELDS = ("audio_model", "language_model")
LOADED_FIELDS = (*BASE_FIELDS, "lora_scaling", "restricted_tokenizer")
_LORA_A = ".lora_A.default.weight"
_TARGET_OPTIONS = dict(zip(LORA_PARTS, ("encoder_lora_targets", "projector_lora_targets", "lora_targets"), strict=True))


def read_recipe(folder: Path, required: Sequence[str] = BASE_FIELDS) -> dict[str, Any]:
    """The recipe.

    Args:
        folder: Folder of trained parts.
        required: Fields that it has to have.

    Raises:
        UsageError: There is no such folder, or no such recipe in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected one of trained parts")
    if not (folder / RECIPE_NAME).is_file():
        raise UsageError(f"{folder}: has no {RECIPE_NAME}; expected a folder of trained parts, as training writes it")
    return read_json_object(folder / RECIPE_NAME, required)


def read_trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights by name.

    Raises:
        UsageError: They are not there or cannot be read.
    """
    weight_shapes(folder)
    return load_file(folder / TRAINED_WEIGHTS_NAME)


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of the trained weights by name.

    Raises:
        UsageError: They are not there or cannot be read.
    """
    path = folder / TRAINED_WEIGHTS_NAME
    if not path.is_file():
        raise UsageError(f"{folder}: has no {TRAINED_WEIGHTS_NAME}; expected a folder of trained parts")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UsageError(f"{path}: expected weights in the format of safetensors ({one_line(error)})") from error


def check_trained_parts(folder: Path) -> None:
    """Refuse a folder that cannot be loaded.

    Raises:
        UsageError: A file is not there or is no such file.
    """
    read_recipe(folder, LOADED_FIELDS)
    weight_shapes(folder)
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        read_json_object(folder / name)


def parts_folder(name: str) -> Path:
    """The folder of trained parts called `name`, or that of the default model.

    Raises:
        ValueError: If it is no such folder.
    """
    folder = TRAINED_PARTS if name == DEFAULT else Path(name)
    try:
        check_trained_parts(folder)
    except UsageError as error:
        raise ValueError(
            f"model.trained_parts: expected {DEFAULT!r} or a folder of trained parts (a stage's `final`, or what "
            f"training.export writes), got {name!r}: {error}"
        ) from None
    return folder


def lora_layers(folder: Path) -> dict[str, dict[str, int]]:
    """Of each part of the model that has a LoRA there: the rank of each layer, by its name in that part."""
    layers: dict[str, dict[str, int]] = {}
    for name, shape in weight_shapes(folder).items():
        if name.endswith(_LORA_A):
            part, _, layer = name.removesuffix(_LORA_A).partition(".")
            layers.setdefault(part, {})[layer] = shape[0]
    return layers


def lora_options(folder: Path) -> dict[str, Any]:
    """Options of `TuningArguments` with which the LoRA of these parts goes on learning; none if there is no LoRA."""
    scalings = read_recipe(folder, LOADED_FIELDS)["lora_scaling"]
    options: dict[str, Any] = {}
    for part, layers in lora_layers(folder).items():
        rank = max(layers.values())
        options[_TARGET_OPTIONS[part]] = "|".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        options |= {"lora_r": rank, "lora_alpha": rank * scaling_of(scalings, part)}
    return options


def scaling_of(scalings: float | dict[str, float], part: str) -> float:
    """`alpha / r` of the LoRA of a part; early recipes have one number for all."""
    return float(scalings[part] if isinstance(scalings, dict) else scalings)
