"""Read a CTranslate2 model file and name its weights as transformers' Whisper does; ctranslate2 is not needed.

Layout (little endian; a string is a uint16 length, then its bytes, the last of which is 0):
    uint32 version, string specification, uint32 revision,
    uint32 count of variables, then for each: string name, uint8 rank, uint32 sizes[rank], uint8 dtype, uint32 bytes,
        data
    uint32 count of aliases, then for each: string alias, string name of the variable that it stands for
"""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperConfig

FORMAT_VERSION = 6
# CTranslate2's `DataType`; bfloat16 (5) has no numpy type and none of our files uses it.
DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
WEIGHT_NAMES = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


class _Reader:
    """A cursor over the file's bytes; struct.error at the end of the file."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer = buffer
        self.position = 0

    def number(self, layout: str) -> int:
        value = struct.unpack_from(layout, self.buffer, self.position)[0]
        self.position += struct.calcsize(layout)
        return value

    def take(self, size: int) -> bytes:
        data = self.buffer[self.position : self.position + size]
        if len(data) != size:
            raise struct.error(f"{size} bytes are needed at byte {self.position}, {len(data)} are left")
        self.position += size
        return data

    def text(self) -> str:
        return self.take(self.number("<H")).rstrip(b"\0").decode("utf-8")

    def variable(self) -> tuple[str, np.ndarray]:
        name = self.text()
        shape = tuple(self.number("<I") for _ in range(self.number("<B")))
        dtype_id = self.number("<B")
        data = self.take(self.number("<I"))
        if dtype_id not in DTYPES:
            raise ValueError(f"variable {name!r}: expected a data type in {sorted(DTYPES)}, got {dtype_id}")
        return name, np.frombuffer(data, DTYPES[dtype_id]).reshape(shape)


def read_ctranslate2(path: str | Path) -> tuple[str, dict[str, np.ndarray]]:
    """Return the specification's name (such as "WhisperSpec") and all variables by name, aliases included.

    The arrays are read-only. Raises ValueError when the file has another format version or is damaged.
    """
    reader = _Reader(Path(path).read_bytes())
    try:
        version = reader.number("<I")
        if version != FORMAT_VERSION:
            raise ValueError(f"expected a CTranslate2 file of format version {FORMAT_VERSION}, got {version}")
        specification = reader.text()
        reader.number("<I")  # revision of the specification: new revisions only add variables
        variables = dict(reader.variable() for _ in range(reader.number("<I")))
        for _ in range(reader.number("<I")):
            alias = reader.text()
            variables[alias] = variables[reader.text()]
    except (struct.error, ValueError, KeyError) as error:
        raise ValueError(f"{path}: this CTranslate2 file cannot be read: {error}") from error
    if reader.position != len(reader.buffer):
        raise ValueError(f"{path}: expected the file to end at byte {reader.position}, got {len(reader.buffer)} bytes")
    return specification, variables


def _count_layers(variables: dict[str, np.ndarray], side: str) -> int:
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and name.count("/") > 2})


def whisper_config(variables: dict[str, np.ndarray], **token_ids: Any) -> WhisperConfig:
    """Return the WhisperConfig that the variables' shapes describe; token_ids: its fields that hold ids of tokens."""
    vocab_size, width = variables["decoder/embeddings/weight"].shape
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=_count_layers(variables, "encoder"),
        decoder_layers=_count_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        architectures=["WhisperForConditionalGeneration"],
        **token_ids,
    )


def _layer_weights(variable: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Name one variable of a layer, such as "self_attention/linear_0/weight", splitting fused projections."""
    block, part, kind = variable.split("/")
    kind = WEIGHT_NAMES[kind]
    if block == "ffn":
        names = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}
        return {f"{names[part]}.{kind}": array}
    # In the decoder `attention` is the cross-attention: its queries come from another place, so linear_0 is not fused.
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}[block]
    if part == "layer_norm":
        return {f"{attention}_layer_norm.{kind}": array}
    fused = {
        ("self_attention", "linear_0"): ("q_proj", "k_proj", "v_proj"),
        ("self_attention", "linear_1"): ("out_proj",),
        ("attention", "linear_0"): ("q_proj",),
        ("attention", "linear_1"): ("k_proj", "v_proj"),
        ("attention", "linear_2"): ("out_proj",),
    }[block, part]
    pieces = dict(zip(fused, np.split(array, len(fused)), strict=True))
    if kind == "bias" and "k_proj" in pieces:
        keys_bias = pieces.pop("k_proj")  # Whisper's keys have no bias; CTranslate2 fills the gap
        if np.any(keys_bias):
            raise ValueError(f"{variable}: expected zeros as the bias of the keys, got values up to {keys_bias.max()}")
    return {f"{attention}.{projection}.{kind}": piece for projection, piece in pieces.items()}


def whisper_state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the float32 state dict of `WhisperForConditionalGeneration` from the variables of a WhisperSpec.

    Raises ValueError on a variable that Whisper does not have, or when weights are quantized to integers.
    """
    weights = {}
    for name, array in variables.items():
        side, _, rest = name.partition("/")
        block, _, variable = rest.partition("/")
        if array.ndim == 0 or name.endswith(("alignment_heads", "alignment_layer")):
            continue  # settings, which the config holds
        if array.dtype.kind != "f":
            raise ValueError(f"{name}: expected floats, got {array.dtype}; quantized weights are not supported")
        try:
            if re.fullmatch(r"layer_\d+", block):
                prefix = f"model.{side}.layers.{int(block.removeprefix('layer_'))}."
                named = {prefix + key: value for key, value in _layer_weights(variable, array).items()}
            elif name == "decoder/projection/weight":
                named = {"proj_out.weight": array}
            else:
                named = {f"model.{side}.{_outer_name(block)}.{WEIGHT_NAMES.get(variable, 'weight')}": array}
        except KeyError as error:
            raise ValueError(f"{name}: expected a variable of Whisper, got the unknown part {error}") from error
        weights |= named
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in weights.items()}


def _outer_name(block: str) -> str:
    return {
        "conv1": "conv1",
        "conv2": "conv2",
        "layer_norm": "layer_norm",
        "embeddings": "embed_tokens",
        "position_encodings": "embed_positions",
    }[block]
