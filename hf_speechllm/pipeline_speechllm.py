"""`pipeline("automatic-speech-recognition")` for speech LLMs: audio of any kind, rate and length to text."""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from .audio import prepare_waveform, stream_audio
from .lm_score import CausalLMScorer
from .processing_speechllm import SpeechLLMProcessor
from .segmentation import split_blocks

MIN_CHUNK_LENGTH_S = 0.2  # what `split_blocks` can do
LanguageModel = str | os.PathLike[str] | CausalLMScorer


class SegmentedPipeline(AutomaticSpeechRecognitionPipeline):
    """
    What our pipelines have in common: audio of any kind, cut at pauses, recognised piece by piece.

    Files and bytes in wav, flac, ogg and mp3 are decoded without ffmpeg; other rates are resampled, channels are
    averaged. A subclass says how long a piece may be, what the model takes, and what its output reads.
    """

    timestamps: tuple[bool | str, ...] = (True, False)
    _own_outputs = ("tokens", "is_last", "segment_s")

    @property
    def max_piece_s(self) -> float:
        """Longest piece in seconds."""
        raise NotImplementedError

    def extract_features(self, waveform: np.ndarray) -> dict[str, torch.Tensor]:
        """What the model takes for a waveform `[samples]`, as a batch of one."""
        raise NotImplementedError

    def transcript(self, model_output: dict[str, Any]) -> str:
        """The text of one piece, a batch of one."""
        raise NotImplementedError

    def piece_parameters(
        self,
        chunk_length_s: float | None = None,
        return_timestamps: bool | str | None = None,
        stride_length_s: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters of `preprocess` and `postprocess`.

        Raises:
            ValueError: One of them cannot be meant.
        """
        if return_timestamps is not None and return_timestamps not in self.timestamps:
            others = "".join(f", {kind!r}" for kind in self.timestamps if isinstance(kind, str))
            raise ValueError(
                f"return_timestamps must be True (times of the pieces){others} or False, got {return_timestamps!r}."
            )
        if chunk_length_s is not None and not chunk_length_s >= MIN_CHUNK_LENGTH_S:
            raise ValueError(f"chunk_length_s must be at least {MIN_CHUNK_LENGTH_S} seconds, got {chunk_length_s}.")
        if stride_length_s is not None:
            raise ValueError("stride_length_s is not used: pieces are cut at pauses and do not overlap; leave it out.")
        preprocess = {} if chunk_length_s is None else {"chunk_length_s": chunk_length_s}
        return preprocess, {} if return_timestamps is None else {"return_timestamps": return_timestamps}

    def preprocess(
        self, inputs: str | bytes | np.ndarray | torch.Tensor | dict, chunk_length_s: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Audio to features, one item for each piece."""
        rate = self.feature_extractor.sampling_rate
        extra: dict[str, Any] = {}
        if isinstance(inputs, (str, bytes)):
            blocks = stream_audio(self._fetch(inputs), rate)
        else:
            if isinstance(inputs, dict):
                known = {"raw", "array", "sampling_rate", "path"}
                extra = {name: value for name, value in inputs.items() if name not in known}
            blocks = [prepare_waveform(inputs, None if isinstance(inputs, dict) else rate, rate)]
        limit_s = self.max_piece_s if chunk_length_s is None else min(self.max_piece_s, chunk_length_s)
        dtype = self.dtype if self.dtype is not None else torch.float32
        pieces = split_blocks(blocks, rate, limit_s)
        following = next(pieces, None)
        while following is not None:
            (segment, waveform), following = following, next(pieces, None)
            features = self.extract_features(waveform)
            yield {
                "is_last": following is None,
                **{name: value.to(dtype) if value.is_floating_point() else value for name, value in features.items()},
                "segment_s": torch.tensor([[segment.start_s, segment.end_s]], dtype=torch.float64),
                **extra,
            }

    @staticmethod
    def _fetch(source: str | bytes) -> str | bytes:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            with urlopen(source) as response:
                return response.read()
        return source

    def postprocess(
        self, model_outputs: list[dict[str, Any]], return_timestamps: bool | str | None = None
    ) -> dict[str, Any]:
        """Outputs of the pieces to one text."""
        texts = [self.transcript(output) for output in model_outputs]
        result: dict[str, Any] = {"text": " ".join(text for text in texts if text)}
        if return_timestamps:
            result["chunks"] = [
                chunk
                for text, output in zip(texts, model_outputs, strict=True)
                for chunk in self.timed_chunks(text, output, return_timestamps)
            ]
        extra = defaultdict(list)
        for output in model_outputs:
            for name, value in output.items():
                if name not in self._own_outputs:
                    extra[name].append(value)
        # An entry of the input called "text" (the reference, in data sets) must not replace what was recognised.
        return {**extra, **result}

    def timed_chunks(self, text: str, model_output: dict[str, Any], kind: bool | str) -> list[dict[str, Any]]:
        """What was said in one piece, with times in seconds from the start of the recording."""
        return [{"text": text, "timestamp": tuple(model_output["segment_s"].flatten().tolist())}] if text else []


class SpeechLLMPipeline(SegmentedPipeline):
    """
    Automatic speech recognition with a [`SpeechLLMForConditionalGeneration`].

    Files and bytes in wav, flac, ogg and mp3 are decoded without ffmpeg; other rates are resampled, channels are
    averaged. Audio longer than the model was trained on is cut at pauses and transcribed piece by piece.

    Registered for the task in place of transformers' own pipeline. Other models get that one, unchanged, or with `lm`
    or `ctc_model` one that combines them with a language model or a CTC model: [`CTCFusionPipeline`],
    [`Seq2SeqRescoringPipeline`].

    Args:
        model, tokenizer, feature_extractor, kwargs: As for `AutomaticSpeechRecognitionPipeline`. Options of `generate`
            may be given here or in a call: those of transformers such as `num_beams`, and those at the head of
            `generation_speechllm.py` such as `mode` and `ctc_weight`.
        lm: A language model to combine with: Hub id, folder or [`CausalLMScorer`]. In a call, give the latter: what is
            named is loaded each time.

    Call with `return_timestamps=True` for the pieces of long audio and their times in seconds, under `"chunks"`, and
    with `chunk_length_s` for pieces of another length.
    """

    def __new__(
        cls,
        model: PreTrainedModel,
        *args: Any,
        lm: LanguageModel | None = None,
        ctc_model: Any = None,
        **kwargs: Any,
    ) -> AutomaticSpeechRecognitionPipeline:
        if model.config.model_type == "speechllm":
            return super().__new__(cls)
        from .fusion_pipeline import pipeline_for_lm, refuse_fusion_options  # which builds on this module

        if ctc_model is not None:
            return pipeline_for_lm(model, has_ctc_model=True)(model, *args, lm=lm, ctc_model=ctc_model, **kwargs)
        if lm is not None:
            return pipeline_for_lm(model)(model, *args, lm=lm, **kwargs)
        refuse_fusion_options(kwargs)
        return AutomaticSpeechRecognitionPipeline(model, *args, **kwargs)

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        # transformers derives the type from a table of its own models.
        self.type = "seq2seq"
        if self.processor is None:
            self.processor = SpeechLLMProcessor(
                self.feature_extractor,
                self.tokenizer,
                prompt_before=model.config.prompt_before,
                prompt_after=model.config.prompt_after,
            )

    @property
    def max_piece_s(self) -> float:
        """What the model was trained on."""
        return self.model.config.max_audio_duration_s

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        return_timestamps: bool | None = None,
        stride_length_s: float | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess, postprocess = self.piece_parameters(chunk_length_s, return_timestamps, stride_length_s)
        others, forward, other_outputs = super()._sanitize_parameters(**kwargs)
        if forward.get("lm") is not None:
            forward["lm"] = load_language_model(forward["lm"], self.device)
        return {**others, **preprocess}, forward, {**other_outputs, **postprocess}

    def extract_features(self, waveform: np.ndarray) -> dict[str, torch.Tensor]:
        """Features and their mask."""
        features = self.processor(waveform, sampling_rate=self.processor.sampling_rate, padding="max_length")
        # transformers' `_forward` passes the mask of the audio on under this name.
        return {"input_features": features["input_features"], "attention_mask": features["input_features_mask"]}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        return super()._forward(model_inputs, **{"tokenizer": self.tokenizer, **generate_kwargs})

    def transcript(self, model_output: dict[str, Any]) -> str:
        """The text of the token ids."""
        return self.processor.decode(model_output["tokens"].squeeze(0))


def load_language_model(lm: LanguageModel, device: torch.device) -> CausalLMScorer:
    """The scorer of a causal language model.

    Args:
        lm: Hub id, folder, or a scorer, which is returned as it is.
        device: For a model that is loaded here.

    Raises:
        TypeError: `lm` is something else.
    """
    if isinstance(lm, CausalLMScorer):
        return lm
    if not isinstance(lm, (str, os.PathLike)):
        raise TypeError(
            f"lm: expected a Hub id, a folder or a CausalLMScorer, got {type(lm).__name__}; wrap a loaded model: "
            "CausalLMScorer(model, tokenizer)."
        )
    model = AutoModelForCausalLM.from_pretrained(lm).to(device).eval()
    return CausalLMScorer(model, AutoTokenizer.from_pretrained(lm))


__all__ = ["SegmentedPipeline", "SpeechLLMPipeline", "load_language_model"]
