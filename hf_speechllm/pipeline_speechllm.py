"""`pipeline("automatic-speech-recognition")` for speech LLMs: audio of any kind, rate and length to text."""

import math
from typing import Any

import numpy as np
import torch
from transformers import AutomaticSpeechRecognitionPipeline, PreTrainedModel
from transformers.utils import logging

from .combination import has_part
from .ctc_alignment import align, bounds_of_words, frames_needed
from .fusion_pipeline import pipeline_for_lm, refuse_fusion_options
from .generation_speechllm import OPTION_DEFAULTS
from .label_chains import spell_transcripts
from .processing_speechllm import SpeechLLMProcessor
from .segmented_pipeline import LanguageModel, SegmentedPipeline, load_language_model

logger = logging.get_logger(__name__)


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

    Call with `return_timestamps=True` for the pieces of long audio and their times in seconds, under `"chunks"`, with
    `return_timestamps="word"` for each word and its times by CTC alignment, and with `chunk_length_s` for pieces of
    another length. Where a text has more CTC labels than the audio has frames, as that of a language model that went on
    by itself may have, the times of its words are `None`.
    """

    timestamps = (True, "word", False)

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
        return_timestamps: bool | str | None = None,
        stride_length_s: float | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess, postprocess = self.piece_parameters(chunk_length_s, return_timestamps, stride_length_s)
        others, forward, other_outputs = super()._sanitize_parameters(**kwargs)
        if return_timestamps == "word":
            if self.model.ctc_head is None:
                raise ValueError('return_timestamps="word": needs a CTC head; this model has none, use True.')
            forward["word_times"] = True
        if "mode" in forward:
            # What the pipeline was built with is for the modes that it has a part in, like the options of a config.
            built = [name for name in getattr(self, "_forward_params", {}) if self._is_option(name)]
            forward = {**{name: None for name in built if not has_part(name, forward["mode"])}, **forward}
        if forward.get("lm") is not None:
            forward["lm"] = load_language_model(forward["lm"], self.device)
        return {**others, **preprocess}, forward, {**other_outputs, **postprocess}

    def _is_option(self, name: str) -> bool:
        """Whether it is one of `generate` that a config may have, and no argument such as `lm`."""
        return name in OPTION_DEFAULTS or hasattr(self.model.generation_config, name)

    def extract_features(self, waveform: np.ndarray) -> dict[str, torch.Tensor]:
        """Features and their mask."""
        features = self.processor(waveform, sampling_rate=self.processor.sampling_rate, padding="max_length")
        # transformers' `_forward` passes the mask of the audio on under this name.
        return {"input_features": features["input_features"], "attention_mask": features["input_features_mask"]}

    def _forward(
        self, model_inputs: dict[str, Any], word_times: bool = False, **generate_kwargs: Any
    ) -> dict[str, Any]:
        audio = model_inputs["input_features"], model_inputs["attention_mask"]
        output = super()._forward(model_inputs, **{"tokenizer": self.tokenizer, **generate_kwargs})
        if word_times:
            output["word_s"] = self._word_times(*audio, output["segment_s"], output["tokens"])
        return output

    def _word_times(
        self, features: torch.Tensor, mask: torch.Tensor, segment_s: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """`[B, W, 2]` start and end of each word in seconds from the start of its piece; see `timed_chunks`.

        Args:
            features, mask: Of the audio, `[B, S, ...]` and `[B, S]`.
            segment_s: `[B, 2]` start and end of the pieces.
            tokens: `[B, N]` of the transcripts.
        """
        audio = self.model.encode(features, mask)
        times = []
        for log_probs, num_frames, (start_s, end_s), ids in zip(
            audio.ctc_log_probs, audio.encoder_out_lens.tolist(), segment_s.tolist(), tokens.tolist(), strict=True
        ):
            bounds = self._word_frames(log_probs[:num_frames], ids)
            times.append(torch.tensor(bounds, dtype=torch.float64).reshape(-1, 2) * (end_s - start_s) / num_frames)
        return torch.nn.utils.rnn.pad_sequence(times, batch_first=True, padding_value=math.nan)

    def _word_frames(self, log_probs: torch.Tensor, tokens: list[int]) -> list[tuple[float, float]]:
        """First frame of each word of a transcript, and the one after its last, by the CTC output `[T, A]`."""
        special = set(self.tokenizer.all_special_ids)
        ids = [token for token in tokens if token not in special]
        num_words, num_frames = len(self.processor.decode(ids).split()), len(log_probs)
        if num_words == 0:
            return []
        units = self.model.label_units.to(torch.device("cpu"))
        labels_of = spell_transcripts(units, torch.tensor([ids]))[0].tolist()
        labels, word_of_label = [], []
        text = ""
        for position, chain in enumerate(labels_of, 1):
            longer = self.processor.decode(ids[:position])
            word = None if longer == text else len(longer.split()) - 1  # a token of space alone belongs to no word
            text = longer
            spelled = [label for label in chain if label >= 0]
            labels += spelled
            word_of_label += [None if label == self.model.config.ctc_delimiter else word for label in spelled]
        if frames_needed(labels) > num_frames:
            logger.warning_once("A text has more CTC labels than its audio has frames: its words have no times.")
            return [(math.nan, math.nan)] * num_words
        (aligned,) = align(log_probs[None], torch.tensor([num_frames]), [labels], self.model.config.blank_id)
        return bounds_of_words(aligned, word_of_label, num_words, num_frames)

    def transcript(self, model_output: dict[str, Any]) -> str:
        """The text of the token ids."""
        return self.processor.decode(model_output["tokens"].squeeze(0))


__all__ = ["SpeechLLMPipeline"]
