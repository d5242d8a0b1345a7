"""Read the weights of an ONNX Runtime `.ort` file without onnxruntime, and name them as transformers' Moonshine does.

An `.ort` file is a flatbuffer (file identifier "ORTM"). Only the few tables that hold weights are read here; the slot
numbers are those of onnxruntime's public schema `onnxruntime/core/flatbuffers/schema/ort.fbs`.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ORT_FILE_IDENTIFIER = b"ORTM"

# Slots of the schema's tables, in declaration order; slot n sits at byte 4 + 2n of a table's vtable.
SESSION_MODEL = 1
MODEL_GRAPH = 7
GRAPH_INITIALIZERS, GRAPH_NODES = 0, 2
NODE_NAME, NODE_OP_TYPE, NODE_INPUTS, NODE_ATTRIBUTES = 0, 5, 8, 10
ATTRIBUTE_NAME, ATTRIBUTE_GRAPH = 0, 7
TENSOR_NAME, TENSOR_DIMS, TENSOR_DATA_TYPE, TENSOR_RAW_DATA = 0, 2, 3, 4

# `TensorDataType` of the schema: the types that a graph of weights uses.
TENSOR_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
}

QUANTIZED_MATMUL_OPS = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
QUANTIZED_SUFFIX = "_quantized"


@dataclass(frozen=True)
class OrtNode:
    """One operator: `inputs` name initializers or other nodes' outputs; `subgraphs` are the bodies of an If or Loop."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    subgraphs: dict[str, "OrtGraph"]


@dataclass(frozen=True)
class OrtGraph:
    """A graph's constant tensors by name, and its nodes."""

    initializers: dict[str, np.ndarray]
    nodes: tuple[OrtNode, ...]


class _Table:
    """A flatbuffer table: a position whose first int32 points back to a vtable of field offsets."""

    def __init__(self, buffer: bytes, position: int) -> None:
        self.buffer = buffer
        self.position = position
        self.vtable = position - self._read("<i", position)
        self.vtable_size = self._read("<H", self.vtable)

    def _read(self, layout: str, position: int) -> Any:
        # struct counts a negative offset from the end of the buffer, which would turn a broken file into nonsense.
        if position < 0:
            raise struct.error(f"offset {position} lies before the start of the file")
        return struct.unpack_from(layout, self.buffer, position)[0]

    def _field(self, slot: int) -> int | None:
        entry = 4 + 2 * slot
        if entry >= self.vtable_size:
            return None
        offset = self._read("<H", self.vtable + entry)
        return self.position + offset if offset else None

    def _follow(self, position: int) -> int:
        return position + self._read("<I", position)

    def scalar(self, slot: int, layout: str, default: int) -> int:
        position = self._field(slot)
        return default if position is None else self._read(layout, position)

    def _text_at(self, position: int) -> str:
        start = self._follow(position)
        size = self._read("<I", start)
        if start + 4 + size > len(self.buffer):  # a slice would come back shorter without a word
            raise struct.error(f"a string of {size} bytes at byte {start} runs over the end of the file")
        return self.buffer[start + 4 : start + 4 + size].decode("utf-8")

    def text(self, slot: int) -> str:
        position = self._field(slot)
        return "" if position is None else self._text_at(position)

    def table(self, slot: int) -> "_Table | None":
        position = self._field(slot)
        return None if position is None else _Table(self.buffer, self._follow(position))

    def _elements(self, slot: int) -> Iterator[int]:
        position = self._field(slot)
        if position is not None:
            start = self._follow(position)
            yield from range(start + 4, start + 4 + 4 * self._read("<I", start), 4)

    def tables(self, slot: int) -> Iterator["_Table"]:
        return (_Table(self.buffer, self._follow(position)) for position in self._elements(slot))

    def texts(self, slot: int) -> tuple[str, ...]:
        return tuple(self._text_at(position) for position in self._elements(slot))

    def array(self, slot: int, dtype: np.dtype) -> np.ndarray | None:
        position = self._field(slot)
        if position is None:
            return None
        start = self._follow(position)
        return np.frombuffer(self.buffer, dtype, count=self._read("<I", start), offset=start + 4)


def _read_tensor(table: _Table) -> np.ndarray:
    name = table.text(TENSOR_NAME)
    dims = table.array(TENSOR_DIMS, np.dtype("<i8"))
    shape = () if dims is None else tuple(int(size) for size in dims)
    type_id = table.scalar(TENSOR_DATA_TYPE, "<i", 0)
    if type_id not in TENSOR_DTYPES:
        raise ValueError(f"tensor {name!r}: expected a data type in {sorted(TENSOR_DTYPES)}, got {type_id}")
    data = table.array(TENSOR_RAW_DATA, np.dtype("u1"))
    if data is None:
        raise ValueError(f"tensor {name!r}: expected its data inside the file, got none (external data is not read)")
    return data.view(TENSOR_DTYPES[type_id]).reshape(shape)


def _read_node(table: _Table) -> OrtNode:
    subgraphs = {}
    for attribute in table.tables(NODE_ATTRIBUTES):
        graph = attribute.table(ATTRIBUTE_GRAPH)
        if graph is not None:
            subgraphs[attribute.text(ATTRIBUTE_NAME)] = _read_graph(graph)
    return OrtNode(table.text(NODE_NAME), table.text(NODE_OP_TYPE), table.texts(NODE_INPUTS), subgraphs)


def _read_graph(table: _Table) -> OrtGraph:
    initializers = {tensor.text(TENSOR_NAME): _read_tensor(tensor) for tensor in table.tables(GRAPH_INITIALIZERS)}
    return OrtGraph(initializers, tuple(_read_node(node) for node in table.tables(GRAPH_NODES)))


def read_ort_graph(path: str | Path) -> OrtGraph:
    """Return the main graph of an `.ort` file, with the bodies of its control-flow nodes.

    The arrays are read-only views of the file's bytes. Raises ValueError when the file is not an `.ort` file, is
    truncated, or keeps its weights in another file.
    """
    buffer = Path(path).read_bytes()
    identifier = buffer[4:8]
    if identifier != ORT_FILE_IDENTIFIER:
        raise ValueError(f"{path}: expected an .ort file (identifier {ORT_FILE_IDENTIFIER!r}), got {identifier!r}")
    try:
        session = _Table(buffer, struct.unpack_from("<I", buffer)[0])
        model = session.table(SESSION_MODEL)
        graph = None if model is None else model.table(MODEL_GRAPH)
        if graph is None:
            raise ValueError("expected a model with a graph, got none")
        return _read_graph(graph)
    except (struct.error, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: this .ort file cannot be read ({error}); it is damaged: fetch it again") from error


def dequantize(initializers: dict[str, np.ndarray], stem: str) -> np.ndarray:
    """Return `(q - zero_point) * scale` in float32 for the uint8 or int8 tensor `<stem>_quantized` (any shape)."""
    quantized = initializers[stem + QUANTIZED_SUFFIX].astype(np.float32)
    zero_point = initializers[stem + "_zero_point"].astype(np.float32)
    return (quantized - zero_point) * initializers[stem + "_scale"]


def _matmul_weights(graph: OrtGraph) -> dict[str, np.ndarray]:
    """Weights [out, in] of the quantized matrix products, by the module path that each node's name carries."""
    weights = {}
    for node in graph.nodes:
        if node.op_type not in QUANTIZED_MATMUL_OPS:
            continue
        names = [name for name in node.inputs if name.endswith(QUANTIZED_SUFFIX) and name in graph.initializers]
        if len(names) != 1:
            raise ValueError(f"node {node.name!r}: expected one quantized weight among its inputs, got {names}")
        module = node.name.removeprefix("/").removesuffix("/MatMul_quant").replace("/", ".")
        # ONNX multiplies x [.., in] by W [in, out]; nn.Linear keeps W [out, in].
        weights[f"{module}.weight"] = dequantize(graph.initializers, names[0].removesuffix(QUANTIZED_SUFFIX)).T
    return weights


def _named_weights(graph: OrtGraph) -> dict[str, np.ndarray]:
    """Float parameters that kept their PyTorch name, without the suffixes that the ONNX tools appended."""
    weights = {}
    for name, array in graph.initializers.items():
        stem = re.sub(r"(_merged_\d+|_add_tensor)$", "", name)
        if array.dtype == np.float32 and re.search(r"\.(weight|bias)$", stem):
            weights[stem] = array
    return weights


def _node(graph: OrtGraph, name: str) -> OrtNode:
    for node in graph.nodes:
        if node.name == name:
            return node
    raise ValueError(f"graph: expected a node named {name!r}, got none among {len(graph.nodes)} nodes")


def moonshine_state_dict(encoder_path: str | Path, decoder_path: str | Path) -> dict[str, torch.Tensor]:
    """Return the float32 state dict of `MoonshineForConditionalGeneration` from Moonshine's two `.ort` files.

    encoder_path: `encoder_model.ort`. decoder_path: `decoder_model_merged.ort`, an If node on "is there a cache yet?"
    whose else branch (no cache) computes every projection, cross-attention keys and values included.
    Raises ValueError when a file does not have Moonshine's structure.
    """
    encoder = read_ort_graph(encoder_path)
    weights = {f"model.encoder.{name}": array for name, array in _named_weights(encoder).items()}
    weights |= {f"model.encoder.{name}": array for name, array in _matmul_weights(encoder).items()}
    # GroupNorm was exported as InstanceNormalization, Mul, Add; its parameters lost their names and are [C, 1].
    for operator, parameter in (("Mul", "weight"), ("Add", "bias")):
        array = encoder.initializers[_node(encoder, f"/groupnorm/{operator}").inputs[1]]
        weights[f"model.encoder.groupnorm.{parameter}"] = array[:, 0]

    main = read_ort_graph(decoder_path)
    branches = [node.subgraphs["else_branch"] for node in main.nodes if "else_branch" in node.subgraphs]
    if len(branches) != 1:
        raise ValueError(f"{decoder_path}: expected one If node with an else branch, got {len(branches)}")
    decoder = OrtGraph(main.initializers | branches[0].initializers, branches[0].nodes)
    weights |= _named_weights(decoder)
    weights |= _matmul_weights(decoder)
    names = [n for n in decoder.initializers if re.match(r"model\.decoder\.embed_tokens\..*_quantized$", n)]
    if len(names) != 1:
        raise ValueError(f"{decoder_path}: expected one quantized token embedding, got {names}")
    weights["model.decoder.embed_tokens.weight"] = dequantize(
        decoder.initializers, names[0].removesuffix(QUANTIZED_SUFFIX)
    )
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]  # tied
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in weights.items()}
