"""Write `from_pretrained` folders from the model files that registry wheels carry (see `base_models`)."""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import (
    AddedToken,
    GenerationConfig,
    LlamaForCausalLM,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from .ctranslate2_weights import read_ctranslate2, whisper_config, whisper_state_dict
from .gguf_weights import llama_config, llama_state_dict, smollm_tokenizer
from .ort_weights import moonshine_state_dict

SAMPLE_RATE = 16_000
MOONSHINE_MAX_TOKENS = 194  # the positions that moonshine-tiny's decoder was trained on
WHISPER_MAX_TOKENS = 448
WHISPER_NUM_TIMESTAMPS = 1501
WHISPER_MULTILINGUAL_VOCAB_SIZE = 51_865  # openai/whisper tells the two kinds apart by this, too


def _load_exactly(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> None:
    # assign: the model was made on the meta device, without memory of its own.
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.tie_weights()


def write_moonshine(members: Path, folder: Path) -> None:
    """Write MoonshineForConditionalGeneration (float32) with its processor; `AutoModel` loads the same folder.

    members: holds encoder_model.ort, decoder_model_merged.ort, tokenizer.json.
    """
    config = MoonshineConfig(
        max_position_embeddings=MOONSHINE_MAX_TOKENS,
        pad_head_dim_to_multiple_of=8,  # heads of 36 channels are padded to 40 for fast attention kernels
        pad_token_id=2,
        architectures=["MoonshineForConditionalGeneration"],
    )
    with torch.device("meta"):
        model = MoonshineForConditionalGeneration(config)
    _load_exactly(model, moonshine_state_dict(members / "encoder_model.ort", members / "decoder_model_merged.ort"))
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        decoder_start_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        max_length=MOONSHINE_MAX_TOKENS,
    )
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(members / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=MOONSHINE_MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    # Moonshine reads the raw waveform: no spectrum, no normalisation, zeros behind the end.
    feature_extractor = Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        padding_side="right",
        do_normalize=False,
        return_attention_mask=True,
    )
    Wav2Vec2Processor(feature_extractor, tokenizer).save_pretrained(folder)
    # A processor saves its feature extractor inside processor_config.json only; the ASR pipeline looks for this file.
    feature_extractor.save_pretrained(folder)


def write_smollm(members: Path, folder: Path) -> None:
    """Write LlamaForCausalLM (bfloat16, as on the Hub) with tokenizer and chat template.

    members: holds SmolLM2-135M-Instruct.Q4_1.gguf.
    """
    reader = GGUFReader(members / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config = llama_config(reader)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = llama_state_dict(reader, config)
    _load_exactly(model, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    smollm_tokenizer(reader).save_pretrained(folder)


def _whisper_tokenizer(path: Path, vocab_size: int) -> WhisperTokenizer:
    """Return the tokenizer of a `tokenizer.json`, with the timestamp tokens that fill the vocabulary."""
    content = json.loads(path.read_text(encoding="utf-8"))
    expected = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = content["model"]["vocab"]
    tokenizer = WhisperTokenizer(
        vocab=vocab,
        merges=[tuple(merge.split(" ")) for merge in content["model"]["merges"]],
        pad_token="<|endoftext|>",
        # In order of id: WhisperTokenizer finds the first timestamp behind the last of them.
        additional_special_tokens=sorted(expected, key=expected.__getitem__),
    )
    num_timestamps = vocab_size - len(tokenizer)  # 0.00 s to 30.00 s in steps of 20 ms
    tokenizer.add_tokens(
        [AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False, special=False) for i in range(num_timestamps)]
    )
    got = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if got != expected or num_timestamps != WHISPER_NUM_TIMESTAMPS:
        wrong = {token: (expected[token], got[token]) for token in expected if got[token] != expected[token]}
        raise ValueError(
            f"{path}: expected {WHISPER_NUM_TIMESTAMPS} timestamps and the file's own ids of special tokens, got "
            f"{num_timestamps} timestamps and other ids (expected, got) for {wrong}"
        )
    return tokenizer


def _whisper_generation_config(
    tokenizer: WhisperTokenizer, token_ids: dict[str, int], settings: dict[str, Any], multilingual: bool
) -> GenerationConfig:
    """settings: CTranslate2's config.json, which keeps lists of the original generation_config under other names."""
    config = GenerationConfig(
        **token_ids,
        max_length=WHISPER_MAX_TOKENS,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        return_timestamps=False,
        is_multilingual=multilingual,
        alignment_heads=settings["alignment_heads"],
        max_initial_timestamp_index=50,  # the first timestamp is at most 1 s
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
    )
    if multilingual:
        config.lang_to_id = {tokenizer.convert_ids_to_tokens(i): i for i in settings["lang_ids"]}
        config.task_to_id = {
            task: tokenizer.convert_tokens_to_ids(f"<|{task}|>") for task in ("transcribe", "translate")
        }
        # When a call names no language, transformers detects it, but then it adds no task token by itself, and a prompt
        # without one makes the model repeat itself.
        config.task = "transcribe"
    return config


def write_whisper(members: Path, folder: Path) -> None:
    """Write WhisperForConditionalGeneration (float32), English-only or multilingual, with its processor.

    members: holds CTranslate2's config.json, the tokenizer.json beside it, and model.bin, whole or in pieces
    model.bin.part1, model.bin.part2, ...
    """
    whole = members / "model.bin"
    if not whole.exists():
        parts = sorted(members.glob("model.bin.part*"), key=lambda path: int(path.suffix.removeprefix(".part")))
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
    specification, variables = read_ctranslate2(whole)
    if specification != "WhisperSpec":
        raise ValueError(f"{whole}: expected the specification 'WhisperSpec', got {specification!r}")
    vocab_size = variables["decoder/embeddings/weight"].shape[0]
    tokenizer = _whisper_tokenizer(members / "tokenizer.json", vocab_size)
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "decoder_start_token_id": tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = json.loads((members / "config.json").read_text(encoding="utf-8"))
    config = whisper_config(variables, **token_ids, begin_suppress_tokens=settings["suppress_ids_begin"])
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    _load_exactly(model, whisper_state_dict(variables))
    multilingual = vocab_size >= WHISPER_MULTILINGUAL_VOCAB_SIZE
    model.generation_config = _whisper_generation_config(tokenizer, token_ids, settings, multilingual)
    model.save_pretrained(folder)
    feature_extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(feature_extractor, tokenizer).save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
