"""Tiny random encoders, language models and tokenisers: the architectures are real, the weights are not."""

import string

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from hf_speechllm import SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor

_WAVEFORM_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (5, 8, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
AUDIO_CONFIGS = {
    "moonshine": {
        "model_type": "moonshine",
        "hidden_size": 16,
        "intermediate_size": 24,
        "encoder_num_hidden_layers": 3,
        "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "vocab_size": 32,
    },
    "whisper": {
        "model_type": "whisper",
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": [],
    },
    "wav2vec2": {"model_type": "wav2vec2", **_WAVEFORM_ENCODER},
    "wav2vec2-layer-norm": {
        "model_type": "wav2vec2",
        **_WAVEFORM_ENCODER,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
    "hubert": {"model_type": "hubert", **_WAVEFORM_ENCODER},
    "wavlm": {"model_type": "wavlm", **_WAVEFORM_ENCODER},
    "wav2vec2-bert": {
        "model_type": "wav2vec2-bert",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "feature_projection_input_dim": 160,
        "conv_depthwise_kernel_size": 5,
        "left_max_position_embeddings": 8,
        "right_max_position_embeddings": 4,
        "apply_spec_augment": False,
        "layerdrop": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "conformer_conv_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
    },
    "parakeet": {
        "model_type": "parakeet_encoder",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "subsampling_conv_channels": 8,
        "num_mel_bins": 80,
        "conv_kernel_size": 5,
        "dropout": 0.0,
        "dropout_positions": 0.0,
        "layerdrop": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}
_DECODER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
TEXT_CONFIGS = {
    "llama": {"model_type": "llama", **_DECODER},
    "qwen2": {"model_type": "qwen2", **_DECODER},
    "qwen3": {"model_type": "qwen3", **_DECODER, "head_dim": 12},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gemma": {"model_type": "gemma", **_DECODER, "head_dim": 12},
    "smollm3": {"model_type": "smollm3", **_DECODER},
}
LETTERS = [*string.ascii_lowercase, "'"]
PROMPT = {"prompt_before": "<s>", "prompt_after": "</s><s>"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over letters with a few merges; ids: three specials, the letters, apostrophe, space, merges."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "n"), ("B", "c"), ("i", "n"), ("in", "g"), ("Ġ", "a")]
    tokens = ["<pad>", "<s>", "</s>", *LETTERS, "Ġ", "B", *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_sentencepiece() -> PreTrainedTokenizerFast:
    """The same letters as Llama 2 writes them: whatever the text begins with, a space is put before it."""
    tokens = ["<pad>", "<s>", "</s>", *LETTERS, "▁", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def feature_extractor(audio: str):
    """The feature extractor that belongs to an entry of AUDIO_CONFIGS."""
    if audio == "whisper":
        return WhisperFeatureExtractor(feature_size=80)
    if audio == "wav2vec2-bert":
        return SeamlessM4TFeatureExtractor()
    if audio == "parakeet":
        return ParakeetFeatureExtractor()
    return Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)


def noise(*durations_s: float, seed: int = 0) -> list[np.ndarray]:
    """Loudness-modulated noise of these durations at 16 kHz, float32: no two parts of it sound alike."""
    rng = np.random.default_rng(seed)
    waveforms = []
    for duration_s in durations_s:
        time_s = np.arange(round(duration_s * 16000)) / 16000
        waveforms.append((rng.normal(size=len(time_s)) * (0.1 + 0.08 * np.sin(9.0 * time_s))).astype(np.float32))
    return waveforms


def tiny_processor(audio: str = "moonshine") -> SpeechLLMProcessor:
    """Processor of a tiny model."""
    return SpeechLLMProcessor(feature_extractor(audio), tiny_tokenizer(), **PROMPT)


def ctc_token_ids() -> list[int]:
    """CTC labels of the tiny models: letters, apostrophe, space and some merges."""
    vocab = tiny_tokenizer().get_vocab()  # a hash map: in another order each time
    return sorted(i for token, i in vocab.items() if not token.startswith("<") and "B" not in token)


def tiny_config(audio: str = "moonshine", text: str = "llama", **overrides) -> SpeechLLMConfig:
    """Config of a tiny model; `overrides` are values of `SpeechLLMConfig`."""
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer) + 3}
    text_values = {**TEXT_CONFIGS[text], **special}
    audio_values = dict(AUDIO_CONFIGS[audio])
    audio_type = audio_values.pop("model_type")
    audio_config = (
        ParakeetEncoderConfig(**audio_values)
        if audio_type == "parakeet_encoder"
        else AutoConfig.for_model(audio_type, **audio_values)
    )
    values = {"ctc_token_ids": ctc_token_ids(), "prompt_before_ids": [1], "prompt_after_ids": [2, 1], **PROMPT}
    values["audio_token_id"] = tiny_processor().audio_token_id
    text_config = AutoConfig.for_model(text_values.pop("model_type"), **text_values)
    return SpeechLLMConfig(audio_config=audio_config, text_config=text_config, **{**values, **overrides})


def tiny_model(audio: str = "moonshine", text: str = "llama", seed: int = 0, **overrides):
    """A tiny model with fixed random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = SpeechLLMForConditionalGeneration(tiny_config(audio, text, **overrides))
    model.generation_config.max_new_tokens = 8
    return model.eval()


def lively(model, factor: float = 4.0):
    """`model` with larger weights: fresh ones are so small that the output hardly depends on the input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def loud_model(audio: str = "moonshine", text: str = "llama", seed: int = 0, **overrides):
    """A tiny model whose matrices are larger than the usual initialisation, so that outputs differ clearly."""
    model = tiny_model(audio, text, seed, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.mul_(3.0)
    return model
