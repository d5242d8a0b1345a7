"""A CTC model that listens along with another recogniser: its log-probabilities, and how it spells that one's tokens.

Shape legend: B pieces of audio, S input steps (samples or feature frames), T frames, A label axis of the CTC output.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from .bpe_subset import writer_chains
from .label_chains import LabelChains, character_chains

# CTC models whose frames are the same alone and in a padded batch with its mask. In others padding reaches valid frames
# through convolutions or norms over time: each piece is run alone, and only the search takes the whole batch.
_EXACT_IN_BATCHES = ("wav2vec2", "hubert", "wavlm", "wav2vec2-bert", "parakeet_ctc")


class CTCListener(ABC):
    """What joint decoding asks of a CTC model.

    Attributes:
        sampling_rate: of the waveforms, in Hz.
        blank_id: position of the blank on the label axis.
    """

    sampling_rate: int
    blank_id: int

    @abstractmethod
    def log_probs(self, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Log-softmax `[B, T, A]` of each waveform `[samples]` as if it were alone, float32, and `[B]` valid frames."""

    @abstractmethod
    def chains(self, writer: PreTrainedTokenizerBase, silent_ids: Iterable[int] = ()) -> LabelChains:
        """The labels that spell each token of another model's tokeniser.

        Args:
            writer: That tokeniser.
            silent_ids: Special tokens that may occur in a transcript, such as time stamps.
        """


class SpeechLLMListener(CTCListener):
    """The CTC head of a speech LLM, whose language model takes no part.

    Args:
        model: A [`SpeechLLMForConditionalGeneration`] whose CTC labels are tokens of its language model.
        processor: Its processor.

    Raises:
        ValueError: If the labels are others, or there is no CTC head.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        if model.config.ctc_token_ids is None:
            raise ValueError(
                "ctc_model: expected a speech LLM whose CTC labels are tokens of its language model "
                "(config.ctc_token_ids), got one with none or other labels."
            )
        self.model = model.eval()
        self.processor = processor
        self.sampling_rate = processor.feature_extractor.sampling_rate
        self.blank_id = model.config.blank_id

    @torch.no_grad()
    def log_probs(self, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """See [`CTCListener.log_probs`]."""
        inputs = self.processor(list(waveforms), sampling_rate=self.sampling_rate).to(self.model.device)
        audio = self.model.encode(inputs["input_features"], inputs["input_features_mask"])
        return audio.ctc_log_probs.float(), audio.encoder_out_lens

    def chains(self, writer: PreTrainedTokenizerBase, silent_ids: Iterable[int] = ()) -> LabelChains:
        """See [`CTCListener.chains`] and [`writer_chains`]."""
        token_ids = self.model.config.ctc_token_ids
        return writer_chains(writer, self.processor.tokenizer, token_ids, silent_ids=silent_ids)


class CharacterListener(CTCListener):
    """Any `AutoModelForCTC` over characters with a word delimiter: Wav2Vec2, HuBERT, WavLM, MMS.

    Args:
        model, feature_extractor, tokenizer: Of one checkpoint.

    Raises:
        ValueError: If the tokeniser has no word delimiter, or the blank is unknown.
    """

    def __init__(
        self, model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor, tokenizer: PreTrainedTokenizerBase
    ):
        self._delimiter = getattr(tokenizer, "word_delimiter_token", None)
        blank_id, num_labels = model.config.pad_token_id, model.config.vocab_size
        if self._delimiter is None or blank_id is None or not 0 <= blank_id < num_labels <= len(tokenizer):
            raise ValueError(
                f"ctc_model: expected CTC over characters with a word delimiter and a blank (pad_token_id) from 0 to "
                f"{num_labels - 1}, got {type(tokenizer).__name__} with {len(tokenizer)} tokens, delimiter "
                f"{self._delimiter!r} and blank {blank_id}."
            )
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.sampling_rate = feature_extractor.sampling_rate
        self.blank_id = blank_id

    @torch.no_grad()
    def log_probs(self, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """See [`CTCListener.log_probs`]."""
        features = [
            self.feature_extractor(waveform, sampling_rate=self.sampling_rate, return_tensors="pt").to(
                self.model.device, self.model.dtype
            )
            for waveform in waveforms
        ]
        steps = [inputs[self.model.main_input_name][0] for inputs in features]
        masks = [inputs["attention_mask"][0] for inputs in features if "attention_mask" in inputs]
        return ctc_log_probs(
            self.model,
            torch.nn.utils.rnn.pad_sequence(steps, batch_first=True),
            torch.nn.utils.rnn.pad_sequence(masks, batch_first=True) if masks else None,
            torch.tensor([len(row) for row in steps]),
        )

    def chains(self, writer: PreTrainedTokenizerBase, silent_ids: Iterable[int] = ()) -> LabelChains:
        """See [`CTCListener.chains`] and [`character_chains`]."""
        characters = self.tokenizer.convert_ids_to_tokens(list(range(self.model.config.vocab_size)))
        return character_chains(
            writer, characters, blank_id=self.blank_id, delimiter=self._delimiter, silent_ids=silent_ids
        )


def load_ctc_listener(ctc_model: str | os.PathLike[str] | CTCListener, device: torch.device) -> CTCListener:
    """The listener of a checkpoint.

    Args:
        ctc_model: Hub id or folder of a speech LLM or an `AutoModelForCTC`; or a listener, which is returned as it is.
        device: For a model that is loaded here.

    Raises:
        TypeError: `ctc_model` is something else.
        ValueError: Its labels cannot spell the text of others.
    """
    if isinstance(ctc_model, CTCListener):
        return ctc_model
    if not isinstance(ctc_model, (str, os.PathLike)):
        raise TypeError(
            f"ctc_model: expected a Hub id, a folder or a CTCListener, got {type(ctc_model).__name__}; wrap a loaded "
            "model: SpeechLLMListener(model, processor) or CharacterListener(model, feature_extractor, tokenizer)."
        )
    if AutoConfig.from_pretrained(ctc_model).model_type == "speechllm":
        model = AutoModelForSpeechSeq2Seq.from_pretrained(ctc_model)
        return SpeechLLMListener(model.to(device), AutoProcessor.from_pretrained(ctc_model))
    return CharacterListener(
        AutoModelForCTC.from_pretrained(ctc_model).to(device),
        AutoFeatureExtractor.from_pretrained(ctc_model),
        AutoTokenizer.from_pretrained(ctc_model),
    )


@torch.no_grad()
def ctc_log_probs(
    model: PreTrainedModel, features: Tensor, mask: Tensor | None, num_steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-softmax of a CTC model, of each piece as if it were alone.

    Args:
        model: Any `AutoModelForCTC`.
        features: `[B, S]` samples or `[B, S, F]` frames, padded on the right.
        mask: `[B, S]` of them, if the feature extractor makes one.
        num_steps: `[B]` steps of each piece before the batch was padded.

    Returns:
        `[B, T, A]` float32, and `[B]` valid frames.
    """
    config = model.config
    frame_lengths = getattr(model, "_get_subsampling_output_length", None) or getattr(
        model, "_get_feat_extract_output_lengths", None
    )
    is_exact_in_batches = (
        config.model_type in _EXACT_IN_BATCHES
        and mask is not None
        and getattr(config, "feat_extract_norm", None) != "group"
        and not getattr(config, "add_adapter", False)
    )
    if is_exact_in_batches:
        logits = model(features, attention_mask=mask).logits
        lengths = frame_lengths(mask.sum(1))
    else:
        alone = []
        for row, steps in enumerate(num_steps.tolist()):
            row_mask = {} if mask is None else {"attention_mask": mask[row : row + 1, :steps]}
            alone.append(model(features[row : row + 1, :steps], **row_mask).logits[0])
        logits = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
        lengths = torch.tensor([len(row) for row in alone], device=logits.device)
        if mask is not None and frame_lengths is not None:  # extractors may pad by themselves
            lengths = torch.minimum(lengths, frame_lengths(mask.sum(1)))
    return logits.float().log_softmax(-1), lengths.long().clamp(max=logits.shape[1])
