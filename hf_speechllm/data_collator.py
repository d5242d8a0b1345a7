"""Batches of (waveform, transcript) pairs for training and evaluation."""

from dataclasses import dataclass
from typing import Any

import torch

from .processing_speechllm import SpeechLLMProcessor


@dataclass(frozen=True)
class SpeechLLMDataCollator:
    """Pads a list of examples into what [`SpeechLLMForConditionalGeneration`] takes.

    Each example is a dict with `waveform` (mono float array `[samples]` at the processor's rate) and `text`.
    """

    processor: SpeechLLMProcessor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_features`, `input_features_mask` and `labels` `[B, N]` of the examples."""
        return dict(
            self.processor(
                audio=[example["waveform"] for example in examples], text=[example["text"] for example in examples]
            )
        )
