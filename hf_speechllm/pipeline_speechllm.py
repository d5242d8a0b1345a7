"""`pipeline("automatic-speech-recognition")` for speech LLMs: audio of any kind, rate and length to text."""

from typing import Any

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, PreTrainedModel

from .combination import GIVEN_TO_ALL
from .fusion_pipeline import pipeline_for_lm, refuse_fusion_options
from .processing_speechllm import SpeechLLMProcessor
from .segmented_pipeline import LanguageModel, SegmentedPipeline, load_language_model


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
            if ctc_model is not None:
                raise ValueError("ctc_model: is for other models; a speech LLM has its own CTC head, see ctc_weight.")
            return super().__new__(cls)
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
            self.tokenizer = self.processor.tokenizer  # which has the padding side of the feature extractor

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

    def _prepare_generate_kwargs(self, generate_kwargs: dict[str, Any], **overrides: Any) -> dict[str, Any]:
        prepared = super()._prepare_generate_kwargs(generate_kwargs, **overrides)
        if (prepared.get("mode") or getattr(self.model.generation_config, "mode", None)) in (None, "llm"):
            return prepared
        # Nobody gave what transformers adds for its own search, so nobody should be warned that it has no part here.
        given = self._generate_kwargs.keys() | generate_kwargs.keys()
        return {name: value for name, value in prepared.items() if name in given or name not in GIVEN_TO_ALL}

    def transcript(self, model_output: dict[str, Any]) -> str:
        """The text of the token ids."""
        return self.processor.decode(model_output["tokens"].squeeze(0))


__all__ = ["SpeechLLMPipeline"]
