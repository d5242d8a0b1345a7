"""Whether a transcript has enough encoder frames: CTC emits a label a frame at most, a blank between equal ones."""

from dataclasses import dataclass

import numpy as np
import torch

from hf_speechllm.label_chains import UNSPELLABLE, LabelChains
from hf_speechllm.label_units import LabelUnits
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from hf_speechllm.processing_speechllm import SpeechLLMProcessor

_PROBES_S = (1.0, 9.0)


@dataclass(frozen=True)
class CTCFit:
    """Counts the frames that a transcript needs and those that its audio has. Lives on the CPU, in any process.

    Attributes:
        processor: Encodes transcripts.
        units: How the CTC labels spell the tokens.
        frames_at_probe: Encoder frames of the first probe. frames_per_s: Their rate.
    """

    processor: SpeechLLMProcessor
    units: LabelUnits | LabelChains
    frames_at_probe: int
    frames_per_s: float

    @classmethod
    @torch.no_grad()
    def of_model(cls, model: SpeechLLMForConditionalGeneration, processor: SpeechLLMProcessor) -> "CTCFit":
        """Measure the frame rate of the encoder of `model` on silence."""
        was_training = model.training
        model.eval()
        frames = []
        for duration_s in _PROBES_S:
            inputs = processor(np.zeros(round(duration_s * processor.sampling_rate), np.float32))
            frames.append(int(model.encode(inputs["input_features"], inputs["input_features_mask"]).encoder_out_lens))
        model.train(was_training)
        rate = (frames[1] - frames[0]) / (_PROBES_S[1] - _PROBES_S[0])
        return cls(processor, model.label_units.to("cpu"), frames[0], rate)

    def num_frames(self, duration_s: float) -> int:
        """Encoder frames that audio of this duration has at least; roundings of the encoder may add two."""
        return max(1, int(self.frames_at_probe + self.frames_per_s * (duration_s - _PROBES_S[0])) - 1)

    def frames_needed(self, text: str) -> int | None:
        """Frames of the shortest alignment of `text`; `None` if the CTC labels cannot spell it."""
        ids = torch.tensor([self.processor.encode_transcript(text)[:-1]], dtype=torch.long)  # without end of sequence
        if isinstance(self.units, LabelChains):
            last_label = torch.full_like(ids, self.units.blank_id)
            last_label[:, :1] = -1  # no label precedes the first token; before the others stands a word, whichever
            labels = self.units.spell(ids, last_label)
            is_unknown = labels[..., 0] == UNSPELLABLE
        else:
            labels = self.units.tokens_to_labels(ids)[..., None]
            is_unknown = labels[..., 0] < 0
        if is_unknown.any():
            return None
        labels = labels[labels >= 0]
        return len(labels) + int((labels[1:] == labels[:-1]).sum())
