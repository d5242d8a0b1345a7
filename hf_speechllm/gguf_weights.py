"""Turn a llama-architecture GGUF file into transformers' config, state dict and tokenizer.

transformers can load GGUF itself, but its tokenizer conversion drops the digit splitting of SmolLM2 (so numbers get
other ids than those the model was trained on), and the model that it returns cannot be saved again.
"""

from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL_TOKEN_TYPE = 3  # of `tokenizer.ggml.token_type`


def gguf_value(reader: GGUFReader, key: str) -> Any:
    """Return one metadata value; raises ValueError when the file does not have it."""
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"GGUF metadata: expected the key {key!r}, got none; this is not a llama-architecture file")
    return field.contents()


def llama_config(reader: GGUFReader) -> LlamaConfig:
    """Return the LlamaConfig (tied embeddings) that the file's metadata describes."""
    architecture = gguf_value(reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture: expected 'llama', got {architecture!r}; this converter knows no other")
    return LlamaConfig(
        vocab_size=gguf_value(reader, "llama.vocab_size"),
        hidden_size=gguf_value(reader, "llama.embedding_length"),
        intermediate_size=gguf_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=gguf_value(reader, "llama.block_count"),
        num_attention_heads=gguf_value(reader, "llama.attention.head_count"),
        num_key_value_heads=gguf_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=gguf_value(reader, "llama.context_length"),
        # GGUF keeps float32: 1e-5 comes back as 9.99999974e-06.
        rms_norm_eps=round(gguf_value(reader, "llama.attention.layer_norm_rms_epsilon"), 12),
        rope_parameters={"rope_type": "default", "rope_theta": gguf_value(reader, "llama.rope.freq_base")},
        bos_token_id=gguf_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=gguf_value(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )


def _undo_rope_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[heads * dim, in]: from GGUF's pairs of neighbouring rotary channels to transformers' two halves."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def llama_state_dict(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return the float32 state dict of `LlamaForCausalLM`; raises ValueError on a tensor it cannot name."""
    weights = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        block, _, layer_tensor = stem.partition(".")[2].partition(".")
        if kind == "weight" and stem in MODEL_TENSORS:
            name = MODEL_TENSORS[stem]
        elif kind == "weight" and stem.startswith("blk.") and layer_tensor in LAYER_TENSORS:
            name = f"model.layers.{block}.{LAYER_TENSORS[layer_tensor]}"
        else:
            raise ValueError(f"GGUF tensor {tensor.name!r}: expected a tensor of a tied llama model without biases")
        # A copy: float tensors come back as read-only views of the file.
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if layer_tensor == "attn_q":
            weight = _undo_rope_permutation(weight, config.num_attention_heads)
        elif layer_tensor == "attn_k":
            weight = _undo_rope_permutation(weight, config.num_key_value_heads)
        weights[f"{name}.weight"] = weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def smollm_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Return SmolLM's byte-level BPE tokenizer (single digits) with its special tokens and chat template."""
    pre_tokenizer = gguf_value(reader, "tokenizer.ggml.pre")
    if pre_tokenizer != "smollm":
        raise ValueError(f"tokenizer.ggml.pre: expected 'smollm', got {pre_tokenizer!r}")
    tokens = gguf_value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf_value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = gguf_value(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN_TYPE]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[gguf_value(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[gguf_value(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[gguf_value(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[gguf_value(reader, "tokenizer.ggml.padding_token_id")],
        model_max_length=gguf_value(reader, "llama.context_length"),
        chat_template=gguf_value(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
