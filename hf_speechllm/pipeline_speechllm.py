"""`pipeline("automatic-speech-recognition")` for speech LLMs: audio of any kind, rate and length to text."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, PreTrainedModel

from .audio import load_audio, prepare_waveform
from .processing_speechllm import SpeechLLMProcessor
from .segmentation import split_at_pauses

MIN_CHUNK_LENGTH_S = 0.2  # what `split_at_pauses` can do


class SpeechLLMPipeline(AutomaticSpeechRecognitionPipeline):
    """
    Automatic speech recognition with a [`SpeechLLMForConditionalGeneration`].

    Files and bytes in wav, flac, ogg and mp3 are decoded without ffmpeg; other rates are resampled, channels are
    averaged. Audio longer than the model was trained on is cut at pauses and transcribed piece by piece.

    Registered for the task in place of transformers' own pipeline; other models get that one, unchanged.

    Args:
        model, tokenizer, feature_extractor, kwargs: As for `AutomaticSpeechRecognitionPipeline`; options of `generate`
            such as `num_beams` and `ctc_weight` may be given here or in a call.

    Call with `return_timestamps=True` for the pieces of long audio and their times in seconds, under `"chunks"`, and
    with `chunk_length_s` for pieces of another length.
    """

    def __new__(cls, model: PreTrainedModel, *args: Any, **kwargs: Any) -> AutomaticSpeechRecognitionPipeline:
        if model.config.model_type != "speechllm":
            return AutomaticSpeechRecognitionPipeline(model, *args, **kwargs)
        return super().__new__(cls)

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

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        return_timestamps: bool | None = None,
        ctc_weight: float | None = None,
        mode: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        if return_timestamps not in (None, True, False):
            raise ValueError(
                f"return_timestamps must be True (times of the pieces) or False, got {return_timestamps!r}."
            )
        if chunk_length_s is not None and not chunk_length_s >= MIN_CHUNK_LENGTH_S:
            raise ValueError(f"chunk_length_s must be at least {MIN_CHUNK_LENGTH_S} seconds, got {chunk_length_s}.")
        if kwargs.pop("stride_length_s", None) is not None:
            raise ValueError("stride_length_s is not used: pieces are cut at pauses and do not overlap; leave it out.")
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        own = {"ctc_weight": ctc_weight, "mode": mode}
        forward = {**{name: value for name, value in own.items() if value is not None}, **forward}
        if chunk_length_s is not None:
            preprocess["chunk_length_s"] = chunk_length_s
        if return_timestamps is not None:
            postprocess["return_timestamps"] = return_timestamps
        return preprocess, forward, postprocess

    def preprocess(
        self, inputs: str | bytes | np.ndarray | torch.Tensor | dict, chunk_length_s: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Audio to features, one item for each piece."""
        rate = self.processor.sampling_rate
        extra: dict[str, Any] = {}
        if isinstance(inputs, (str, bytes)):
            waveform = load_audio(self._fetch(inputs), rate)
        else:
            if isinstance(inputs, dict):
                known = {"raw", "array", "sampling_rate", "path"}
                extra = {name: value for name, value in inputs.items() if name not in known}
            waveform = prepare_waveform(inputs, None if isinstance(inputs, dict) else rate, rate)
        limit = self.model.config.max_audio_duration_s
        limit = limit if chunk_length_s is None else min(limit, chunk_length_s)
        segments = split_at_pauses(waveform, rate, limit)
        for index, segment in enumerate(segments):
            features = self.processor(segment.slice(waveform, rate), sampling_rate=rate, padding="max_length")
            dtype = self.dtype if self.dtype is not None else torch.float32
            yield {
                "is_last": index == len(segments) - 1,
                "input_features": features["input_features"].to(dtype),
                "attention_mask": features["input_features_mask"],
                "segment_s": torch.tensor([[segment.start_s, segment.end_s]], dtype=torch.float64),
                **extra,
            }

    @staticmethod
    def _fetch(source: str | bytes) -> str | bytes:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            with urlopen(source) as response:
                return response.read()
        return source

    def postprocess(self, model_outputs: list[dict[str, Any]], return_timestamps: bool | None = None) -> dict[str, Any]:
        """Token ids of the pieces to one text."""
        texts = [self.processor.decode(output["tokens"].squeeze(0)) for output in model_outputs]
        result: dict[str, Any] = {"text": " ".join(text for text in texts if text)}
        if return_timestamps:
            result["chunks"] = [
                {"text": text, "timestamp": tuple(output["segment_s"].flatten().tolist())}
                for text, output in zip(texts, model_outputs, strict=True)
                if text
            ]
        extra = defaultdict(list)
        for output in model_outputs:
            for name, value in output.items():
                if name not in ("tokens", "is_last", "segment_s"):
                    extra[name].append(value)
        # An entry of the input called "text" (the reference, in data sets) must not replace what was recognised.
        return {**extra, **result}


__all__ = ["SpeechLLMPipeline"]
