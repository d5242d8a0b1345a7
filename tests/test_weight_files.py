"""The parsers of `.ort`, CTranslate2 and GGUF files, on files that these tests write from tiny random models."""

import json
import re
import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_speechllm import ort_weights as ort
from hf_speechllm.base_model_folders import _whisper_tokenizer
from hf_speechllm.ctranslate2_weights import read_ctranslate2, whisper_config, whisper_state_dict
from hf_speechllm.gguf_weights import llama_config, llama_state_dict, smollm_tokenizer

# --- .ort ------------------------------------------------------------------------------------------------------------


class FlatbufferWriter:
    """Tables as {slot: value}; children come behind their parents, as offsets are unsigned."""

    def __init__(self):
        self.buffer = bytearray(8)

    def finish(self, root: dict, identifier: bytes = b"ORTM") -> bytes:
        self.buffer[4:8] = identifier
        self._point(0, self._write(root))
        return bytes(self.buffer)

    def _point(self, field: int, target: int) -> None:
        struct.pack_into("<I", self.buffer, field, target - field)

    def _write(self, value) -> int:
        self.buffer += bytes(-len(self.buffer) % 4)
        if isinstance(value, dict):
            return self._write_table(value)
        start = len(self.buffer)
        if isinstance(value, str):
            self.buffer += struct.pack("<I", len(value.encode())) + value.encode() + b"\0"
        elif isinstance(value, np.ndarray):
            self.buffer += struct.pack("<I", value.size) + value.tobytes()
        else:
            self.buffer += struct.pack("<I", len(value)) + bytes(4 * len(value))
            for i, child in enumerate(value):
                self._point(start + 4 + 4 * i, self._write(child))
        return start

    def _write_table(self, fields: dict) -> int:
        num_slots = max(fields) + 1
        offsets = {slot: 4 + 4 * i for i, slot in enumerate(fields)}
        vtable = len(self.buffer)
        self.buffer += struct.pack("<HH", 4 + 2 * num_slots, 4 + 4 * len(fields))
        self.buffer += b"".join(struct.pack("<H", offsets.get(slot, 0)) for slot in range(num_slots))
        self.buffer += bytes(-len(self.buffer) % 4)
        start = len(self.buffer)
        self.buffer += struct.pack("<i", start - vtable) + bytes(4 * len(fields))
        for slot, value in fields.items():
            if isinstance(value, int):
                struct.pack_into("<i", self.buffer, start + offsets[slot], value)
            else:
                self._point(start + offsets[slot], self._write(value))
        return start


def tensor(name: str, array: np.ndarray) -> dict:
    type_id = {dtype: i for i, dtype in ort.TENSOR_DTYPES.items()}[array.dtype]
    data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    shape = np.array(array.shape, np.int64)
    return {ort.TENSOR_NAME: name, ort.TENSOR_DIMS: shape, ort.TENSOR_DATA_TYPE: type_id, ort.TENSOR_RAW_DATA: data}


def node(name: str, op_type: str, inputs: list[str], subgraphs: dict[str, dict] | None = None) -> dict:
    attributes = [{ort.ATTRIBUTE_NAME: key, ort.ATTRIBUTE_GRAPH: graph} for key, graph in (subgraphs or {}).items()]
    return {
        ort.NODE_NAME: name,
        ort.NODE_OP_TYPE: op_type,
        ort.NODE_INPUTS: inputs,
        ort.NODE_ATTRIBUTES: attributes,
    }


def graph(tensors: dict[str, np.ndarray], nodes: list[dict]) -> dict:
    return {
        ort.GRAPH_INITIALIZERS: [tensor(name, array) for name, array in tensors.items()],
        ort.GRAPH_NODES: nodes,
    }


def ort_file(main: dict) -> bytes:
    return FlatbufferWriter().finish({0: "1.23.2", ort.SESSION_MODEL: {ort.MODEL_GRAPH: main}})


@pytest.fixture
def small_ort_file() -> bytes:
    body = graph({"inner": np.arange(6, dtype=np.int64).reshape(2, 3)}, [node("/inner", "Add", ["inner", "x"])])
    weights = {
        "w_quantized": np.array([[0, 128, 255]], np.uint8),
        "w_scale": np.array(0.5, np.float32),
        "w_zero_point": np.array(128, np.uint8),
    }
    return ort_file(graph(weights, [node("/if", "If", ["cond"], {"else_branch": body})]))


def test_ort_graph_with_branch(tmp_path, small_ort_file):
    path = tmp_path / "model.ort"
    path.write_bytes(small_ort_file)
    main = ort.read_ort_graph(path)
    assert main.initializers["w_quantized"].tolist() == [[0, 128, 255]]
    assert main.initializers["w_scale"].shape == ()
    assert ort.dequantize(main.initializers, "w").tolist() == [[-64.0, 0.0, 63.5]]
    branch = main.nodes[0].subgraphs["else_branch"]
    assert branch.initializers["inner"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert branch.nodes[0] == ort.OrtNode("/inner", "Add", ("inner", "x"), {})


def test_ort_file_with_other_identifier(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07\x12\x04onnx and more bytes")
    with pytest.raises(ValueError, match=r"model.onnx: expected an .ort file \(identifier b'ORTM'\), got"):
        ort.read_ort_graph(path)


def test_truncated_ort_file_is_refused_wherever_it_ends(tmp_path, small_ort_file):
    path = tmp_path / "model.ort"
    used = len(small_ort_file.rstrip(b"\0"))  # a cut in the padding loses nothing
    for size in range(8, used):
        path.write_bytes(small_ort_file[:size])
        with pytest.raises(ValueError, match="it is damaged"):
            ort.read_ort_graph(path)


def test_ort_weights_outside_the_file(tmp_path):
    path = tmp_path / "model.ort"
    external = {ort.TENSOR_NAME: "w", ort.TENSOR_DATA_TYPE: 1}
    path.write_bytes(ort_file({ort.GRAPH_INITIALIZERS: [external]}))
    with pytest.raises(ValueError, match="tensor 'w': expected its data inside the file"):
        ort.read_ort_graph(path)


def quantize(module: str, weight: torch.Tensor, tensors: dict, nodes: list, stem: str) -> torch.Tensor:
    """Store `weight` as an exporter does; return the value that the file holds."""
    scale = np.float32(weight.abs().max().item() / 127)
    quantized = np.clip(np.round(weight.numpy() / scale) + 128, 0, 255).astype(np.uint8)
    tensors |= {
        f"{stem}_quantized": quantized.T,
        f"{stem}_scale": np.array(scale),
        f"{stem}_zero_point": np.array(128, np.uint8),
    }
    inputs = ["activations", f"{stem}_quantized", f"{stem}_scale", f"{stem}_zero_point"]
    nodes.append(node(f"/{module.replace('.', '/')}/MatMul_quant", "DynamicQuantizeMatMul", inputs))
    return torch.from_numpy((quantized.astype(np.float32) - 128) * scale)


def exported_moonshine(model: MoonshineForConditionalGeneration) -> tuple[bytes, bytes, dict[str, torch.Tensor]]:
    """Return encoder_model.ort, decoder_model_merged.ort and the state dict that they hold."""
    sides = {"encoder": ({}, []), "decoder": ({}, [])}
    held = {}
    for number, (name, weight) in enumerate(model.state_dict().items()):
        side = "encoder" if ".encoder." in name else "decoder"
        tensors, nodes = sides[side]
        # The encoder was exported alone, so its names start inside it; the decoder's are the whole paths.
        short = name.removeprefix("model.encoder.") if side == "encoder" else name
        suffix = "" if side == "encoder" else "_merged_0"
        held[name] = weight
        if "embed_tokens" in name:
            held[name] = quantize("unused", weight, tensors, [], f"{name}{suffix}")
            tensors[f"{name}{suffix}_quantized"] = tensors[f"{name}{suffix}_quantized"].T
        elif "groupnorm" in name:
            tensors[f"onnx::{number}"] = weight.numpy()[:, None]
            operator = "Mul" if name.endswith("weight") else "Add"
            nodes.append(node(f"/groupnorm/{operator}", operator, ["x", f"onnx::{number}"]))
        elif weight.ndim == 2 and name != "proj_out.weight":
            held[name] = quantize(
                short.removesuffix(".weight"), weight, tensors, nodes, f"onnx::MatMul_{number}{suffix}"
            )
        elif name != "proj_out.weight":
            tensors[short + ("_add_tensor" if "conv" in name else suffix)] = weight.numpy()
    held["proj_out.weight"] = held["model.decoder.embed_tokens.weight"]
    branch = graph(*sides["decoder"])
    main = graph({}, [node("/if", "If", ["use_cache"], {"then_branch": graph({}, []), "else_branch": branch})])
    return ort_file(graph(*sides["encoder"])), ort_file(main), held


def test_moonshine_state_dict_is_what_the_files_hold(tmp_path):
    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
    )
    model = MoonshineForConditionalGeneration(config)
    encoder, decoder, held = exported_moonshine(model)
    (tmp_path / "encoder.ort").write_bytes(encoder)
    (tmp_path / "decoder.ort").write_bytes(decoder)
    got = ort.moonshine_state_dict(tmp_path / "encoder.ort", tmp_path / "decoder.ort")
    assert got.keys() == held.keys() == model.state_dict().keys()
    for name in held:
        torch.testing.assert_close(got[name], held[name], rtol=0, atol=1e-6)


def test_moonshine_decoder_without_branches(tmp_path, small_ort_file):
    encoder, _, _ = exported_moonshine(MoonshineForConditionalGeneration(MoonshineConfig(encoder_num_hidden_layers=1)))
    (tmp_path / "encoder.ort").write_bytes(encoder)
    with pytest.raises(ValueError, match="expected one If node with an else branch, got 0"):
        ort.moonshine_state_dict(tmp_path / "encoder.ort", tmp_path / "encoder.ort")


# --- CTranslate2 -----------------------------------------------------------------------------------------------------


def ct2_string(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def ct2_file(variables: dict[str, np.ndarray], aliases: dict[str, str] | None = None, version: int = 6) -> bytes:
    ids = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + ct2_string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        sizes = b"".join(struct.pack("<I", size) for size in array.shape)
        out += ct2_string(name) + struct.pack("<B", array.ndim) + sizes
        out += struct.pack("<BI", ids[array.dtype.name], array.nbytes) + array.tobytes()
    out += struct.pack("<I", len(aliases or {}))
    return out + b"".join(ct2_string(alias) + ct2_string(name) for alias, name in (aliases or {}).items())


def as_ct2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """Fuse and rename Whisper's weights the way CTranslate2's converter does, in float16."""
    state = {name: weight.half().numpy() for name, weight in model.state_dict().items()}
    width = model.config.d_model
    variables = {}
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        variables[f"{side}/num_heads"] = np.array(model.config.encoder_attention_heads, np.int16)
        outer = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm"} if side == "encoder" else {}
        for block in outer or {"layer_norm": "layer_norm"}:
            norm = block == "layer_norm"
            for kind, ct2_kind in (("weight", "gamma" if norm else "weight"), ("bias", "beta" if norm else "bias")):
                variables[f"{side}/{block}/{ct2_kind}"] = state[f"model.{side}.{block}.{kind}"]
        variables[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        for i in range(model.config.encoder_layers):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            for part, name in (("layer_norm", "final_layer_norm"), ("linear_0", "fc1"), ("linear_1", "fc2")):
                for kind, norm_kind in (("weight", "gamma"), ("bias", "beta")):
                    ct2_kind = norm_kind if part == "layer_norm" else kind
                    variables[f"{theirs}/ffn/{part}/{ct2_kind}"] = state[f"{ours}.{name}.{kind}"]
            for attention in attentions:
                block = "self_attention" if attention == "self_attn" else "attention"
                groups = ["qkv", "o"] if block == "self_attention" else ["q", "kv", "o"]
                for kind, norm_kind in (("weight", "gamma"), ("bias", "beta")):
                    state[f"{ours}.{attention}.k_proj.bias"] = np.zeros(width, np.float16)
                    names = {c: f"{ours}.{attention}.{'out' if c == 'o' else c}_proj.{kind}" for c in "qkvo"}
                    for number, group in enumerate(groups):
                        fused = np.concatenate([state[names[letter]] for letter in group])
                        variables[f"{theirs}/{block}/linear_{number}/{kind}"] = fused
                    norm = state[f"{ours}.{attention}_layer_norm.{kind}"]
                    variables[f"{theirs}/{block}/layer_norm/{norm_kind}"] = norm
    variables["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return variables


@pytest.fixture
def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    limits = {"max_source_positions": 20, "max_target_positions": 12, "num_mel_bins": 8}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(vocab_size=40, d_model=16, **sizes, **heads, **limits, **tokens)
    return WhisperForConditionalGeneration(config)


def test_whisper_round_trip_through_ctranslate2(tmp_path, tiny_whisper):
    path = tmp_path / "model.bin"
    path.write_bytes(ct2_file(as_ct2(tiny_whisper), {"decoder/projection/weight": "decoder/embeddings/weight"}))
    specification, variables = read_ctranslate2(path)
    assert specification == "WhisperSpec"
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 2}
    config = whisper_config(variables, **tokens)
    for field in ("vocab_size", "d_model", "encoder_layers", "decoder_ffn_dim", "num_mel_bins", "max_target_positions"):
        assert getattr(config, field) == getattr(tiny_whisper.config, field)
    got, expected = whisper_state_dict(variables), tiny_whisper.state_dict()
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name].half().float()), name


def test_ctranslate2_file_of_another_version(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(ct2_file({}, version=4))
    with pytest.raises(ValueError, match=r"cannot be read: expected .* version 6, got 4"):
        read_ctranslate2(path)


def test_truncated_or_longer_ctranslate2_file(tmp_path):
    path = tmp_path / "model.bin"
    whole = ct2_file({"a/b": np.arange(3, dtype=np.float32)}, {"alias": "a/b"})
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cannot be read"):
            read_ctranslate2(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"expected the file to end at byte {len(whole)}"):
        read_ctranslate2(path)


def test_ctranslate2_alias_of_nothing(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(ct2_file({}, {"alias": "missing"}))
    with pytest.raises(ValueError, match="missing"):
        read_ctranslate2(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("encoder/conv1/weight", np.ones((2, 2), np.int8), "expected floats, got int8; quantized weights"),
        ("encoder/pooler/weight", np.ones((2, 2), np.float16), "expected a variable of Whisper, got .* 'pooler'"),
        ("encoder/layer_0/ffn/linear_7/weight", np.ones((2, 2), np.float16), "got the unknown part 'linear_7'"),
        (
            "encoder/layer_0/self_attention/linear_0/bias",
            np.ones(6, np.float16),
            "expected zeros as the bias of the keys",
        ),
    ],
)
def test_variables_that_are_not_whispers(name, array, message):
    with pytest.raises(ValueError, match=message):
        whisper_state_dict({name: array})


def test_whisper_tokenizer_fills_the_vocabulary_with_timestamps(tmp_path):
    letters = sorted({chr(c) for c in range(33, 127)} | {"Ġ"})
    vocab = {token: i for i, token in enumerate([*letters, "he", "<|endoftext|>"])}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    added = [{"id": vocab["<|endoftext|>"] + i, "content": token, "special": True} for i, token in enumerate(special)]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": added, "model": {"vocab": vocab, "merges": ["h e"]}}))
    size = len(vocab) + 2 + 1501
    tokenizer = _whisper_tokenizer(path, size)
    assert len(tokenizer) == size
    assert tokenizer.convert_ids_to_tokens([size - 1501, size - 1]) == ["<|0.00|>", "<|30.00|>"]
    assert tokenizer.all_special_ids[-1] == size - 1502
    assert tokenizer.tokenize("he h") == ["he", "Ġ", "h"]
    with pytest.raises(ValueError, match="expected 1501 timestamps .* got 1500"):
        _whisper_tokenizer(path, size - 1)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(path, model: LlamaForCausalLM, *, pre_tokenizer: str = "smollm", extra: str | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789", "h", "i", "Ġ", "hi", "Ġhi"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h i", "Ġ hi"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer_names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, weight in model.state_dict().items():
        found = re.match(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        module = name.split(".")[-2]
        if module in heads:  # llama.cpp's converter, which ours has to undo
            split = weight.reshape(heads[module], 2, weight.shape[0] // heads[module] // 2, weight.shape[1])
            weight = split.transpose(1, 2).reshape(weight.shape)
        if found:
            writer.add_tensor(f"blk.{found[1]}.{layer_names[found[2]]}.weight", weight.contiguous().numpy())
        elif name != "lm_head.weight":
            writer.add_tensor({"norm": "output_norm", "embed_tokens": "token_embd"}[module] + ".weight", weight.numpy())
    if extra is not None:
        writer.add_tensor(extra, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=18, **sizes, **heads, rope_parameters=rope, tie_word_embeddings=True)
    )


def test_llama_round_trip_through_gguf(tmp_path, tiny_llama):
    write_gguf(tmp_path / "model.gguf", tiny_llama)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    config = llama_config(reader)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.rms_norm_eps == tiny_llama.config.rms_norm_eps
    copy = LlamaForCausalLM(config)
    copy.load_state_dict(llama_state_dict(reader, config), strict=True)
    input_ids = torch.tensor([[1, 5, 16, 9, 2]])
    with torch.no_grad():
        assert torch.equal(copy(input_ids).logits, tiny_llama(input_ids).logits)


def test_smollm_tokenizer_splits_numbers_into_digits(tmp_path, tiny_llama):
    write_gguf(tmp_path / "model.gguf", tiny_llama)
    tokenizer = smollm_tokenizer(gguf.GGUFReader(tmp_path / "model.gguf"))
    assert tokenizer.tokenize("hi hi 2024<|im_end|>") == ["hi", "Ġhi", "Ġ", "2", "0", "2", "4", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("hi hi 2024").input_ids) == "hi hi 2024"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert again("hi 2024").input_ids == tokenizer("hi 2024").input_ids


def test_gguf_that_is_not_a_smollm(tmp_path, tiny_llama):
    write_gguf(tmp_path / "other.gguf", tiny_llama, pre_tokenizer="qwen2", extra="blk.0.attn_q.bias")
    reader = gguf.GGUFReader(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="tokenizer.ggml.pre: expected 'smollm', got 'qwen2'"):
        smollm_tokenizer(reader)
    with pytest.raises(ValueError, match="GGUF tensor 'blk.0.attn_q.bias': expected a tensor of a tied llama"):
        llama_state_dict(reader, llama_config(reader))
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture: expected 'llama', got 'gemma'"):
        llama_config(gguf.GGUFReader(tmp_path / "gemma.gguf"))
