"""Any Hugging Face speech recogniser behind one call: speech LLMs of this package, Whisper, Moonshine, Wav2Vec2, ...

Decoding modes of speech LLMs are `hf_speechllm.transcription.DECODING_MODES`. Other models have one mode, "default".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, pipeline

import hf_speechllm
from hf_speechllm.assembly import RECIPE_NAME, load_trained_parts, resolve_model
from hf_speechllm.combination import COMBINATIONS, check_given_options
from hf_speechllm.transcription import DECODING_MODES, check_device
from hf_speechllm.transcription import mode_options as speech_llm_options
from training.command_line import loading
from training.evaluation_data import UsageError
from training.trained_parts import check_trained_parts

DEFAULT_MODE = "default"
# Moonshine goes on for ever where it does not find the end; its authors allow this many tokens for a second of speech.
MOONSHINE_TOKENS_PER_S = 6.5
MOONSHINE_MIN_TOKENS = 16


@dataclass(frozen=True)
class Recogniser:
    """A pipeline and the options of `generate` to call it with."""

    pipe: AutomaticSpeechRecognitionPipeline
    options: dict[str, Any]

    @property
    def sampling_rate(self) -> int:
        """What the model expects, in Hz."""
        return self.pipe.feature_extractor.sampling_rate

    def transcribe(self, waveforms: Sequence[np.ndarray], longest_s: float) -> list[str]:
        """Raw texts of float32 waveforms [samples], decoded in one batch.

        Args:
            waveforms: at `sampling_rate`.
            longest_s: longest recording of the batch these belong to, in seconds; bounds the output where a model
                needs a bound.
        """
        options = dict(self.options)
        if self.pipe.model.config.model_type.startswith("moonshine"):
            options.setdefault("max_new_tokens", MOONSHINE_MIN_TOKENS + math.ceil(MOONSHINE_TOKENS_PER_S * longest_s))
        call: dict[str, Any] = {"batch_size": len(waveforms)}
        if options:
            call["generate_kwargs"] = options
        if self.pipe.type == "seq2seq_whisper" and longest_s > self.pipe.feature_extractor.chunk_length:
            # Beyond its window Whisper decodes piece by piece, with timestamps, one recording at a time.
            call |= {"batch_size": 1, "return_timestamps": True}
        # The pipeline takes its inputs out of the dictionaries.
        inputs = [{"raw": waveform, "sampling_rate": self.sampling_rate} for waveform in waveforms]
        return [output["text"].strip() for output in self.pipe(inputs, **call)]


def load_pipeline(
    model: str | None, device: str, option: str = "--model", dtype: str = "auto"
) -> AutomaticSpeechRecognitionPipeline:
    """The pipeline of a Hub id, a folder, a folder of trained parts, `base:NAME`, or None for the default model.

    Args:
        model: see above.
        device: where it runs.
        option: what `model` is called on the command line.
        dtype: type of the weights; "auto": what the model was saved in.

    Raises:
        UsageError: there is no such model, or it recognises no speech.
        ValueError: there is no such device.
    """
    check_device(device)
    with loading(option, model):
        model = hf_speechllm.default_model() if model is None else resolve_model(model)
        if (Path(model) / RECIPE_NAME).is_file():
            check_trained_parts(Path(model))
            speech_llm, processor = load_trained_parts(model)
            if dtype != "auto":
                speech_llm = speech_llm.to(getattr(torch, dtype))
            return pipeline(
                "automatic-speech-recognition",
                model=speech_llm,
                tokenizer=processor.tokenizer,
                feature_extractor=processor.feature_extractor,
                device=device,
            )
        return pipeline("automatic-speech-recognition", model=model, device=device, dtype=dtype)


def merge_adapter(pipe: AutomaticSpeechRecognitionPipeline, modes: Sequence[str]) -> None:
    """Add the LoRA of a speech LLM to its weights.

    Args:
        pipe: its pipeline.
        modes: how it is going to decode.

    Raises:
        UsageError: it is no speech LLM, or one of the modes needs the language model without the LoRA.
    """
    if not is_speech_llm(pipe):
        raise UsageError("--merge-adapter: is for speech LLMs of this package; drop it")
    others = [mode for mode in modes if mode in COMBINATIONS]
    if others:
        raise UsageError(f"--merge-adapter: --mode {others[0]} needs the language model without its adapter; drop one")
    pipe.model.merge_adapter()


def is_speech_llm(pipe: AutomaticSpeechRecognitionPipeline) -> bool:
    """Whether the model is one of this package's, with decoding modes."""
    return pipe.model.config.model_type == "speechllm"


def ctc_weight(pipe: AutomaticSpeechRecognitionPipeline, extra: dict[str, Any]) -> float:
    """The weight of CTC with which a speech LLM decodes: of `extra`, options of `generate`, or the model's own."""
    given = extra.get("ctc_weight")
    return (getattr(pipe.model.generation_config, "ctc_weight", None) if given is None else given) or 0.0


def default_mode(pipe: AutomaticSpeechRecognitionPipeline, extra: dict[str, Any]) -> str:
    """The mode of a model where none is asked for: that in which it decodes with `extra`, options of `generate`."""
    if not is_speech_llm(pipe):
        return DEFAULT_MODE
    return "joint" if ctc_weight(pipe, extra) else "llm"


def mode_options(pipe: AutomaticSpeechRecognitionPipeline, mode: str, extra: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` for a mode; `extra` goes before what other models get by default, after the mode's.

    Raises:
        UsageError: no such mode, a mode for a model without modes, joint decoding without a weight of CTC, an option
            without part in the mode, or options for a model without `generate`.
    """
    if is_speech_llm(pipe):
        if mode not in DECODING_MODES:
            raise UsageError(f"--mode: expected one of {', '.join(DECODING_MODES)}, got {mode!r}")
        if mode == "joint" and not ctc_weight(pipe, extra):
            raise UsageError(
                "--mode: joint needs the weight of CTC, and this model has none stored; give --generate "
                "'{\"ctc_weight\": 0.3}', or --mode llm"
            )
        options = {**extra, **speech_llm_options(mode)}
        try:
            check_given_options(options["mode"], options)
        except ValueError as error:
            raise UsageError(f"--generate: {error}") from None
        return options
    kind = pipe.model.config.model_type
    if mode != DEFAULT_MODE:
        raise UsageError(
            f"--mode: {mode!r} is for speech LLMs of this package, this is a {kind} model; leave --mode out"
        )
    if pipe.type in ("ctc", "ctc_with_lm"):
        if extra:
            raise UsageError(f"--generate: a {kind} CTC model does not generate; leave out {', '.join(sorted(extra))}")
        return {}
    # Greedy, as the leaderboard runs them; the pipeline's own default is 5 beams.
    options: dict[str, Any] = {"num_beams": 1}
    if getattr(pipe.model.generation_config, "is_multilingual", False):
        options |= {"language": "en", "task": "transcribe"}
    return {**options, **extra}
