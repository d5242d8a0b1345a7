"""What a speech LLM returns: of its audio, of `forward` and of `generate`.

Shapes: B utterances, T encoder frames, D encoder width, L audio positions of the language model, P positions of its
whole input, H its width, V its vocabulary, U CTC labels, N tokens of a result.
"""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.utils import ModelOutput

from .hypothesis import Hypothesis


@dataclass
class SpeechLLMAudioOutput(ModelOutput):
    """Everything computed from the audio, once per utterance.

    Args:
        encoder_out (`torch.Tensor` of shape `[B, T, D]`): Output of the acoustic encoder.
        encoder_out_lens (`torch.Tensor` of shape `[B]`): Number of valid frames.
        ctc_features (`torch.Tensor` of shape `[B, T, D]`, *optional*): What the CTC head's linear layer reads.
        ctc_log_probs (`torch.Tensor` of shape `[B, T, U+1]`, *optional*): CTC log-probabilities, blank last. Not of a
            training step, unless the projector reads them: over the vocabulary of a language model they are large.
        audio_embeds (`torch.Tensor` of shape `[B, L, H]`, *optional*): Input embeddings of the language model.
        audio_embeds_lens (`torch.Tensor` of shape `[B]`, *optional*): Number of valid audio positions.
    """

    encoder_out: torch.Tensor | None = None
    encoder_out_lens: torch.Tensor | None = None
    ctc_features: torch.Tensor | None = None
    ctc_log_probs: torch.Tensor | None = None
    audio_embeds: torch.Tensor | None = None
    audio_embeds_lens: torch.Tensor | None = None


@dataclass
class SpeechLLMOutput(ModelOutput):
    """Output of [`SpeechLLMForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `[]`, *optional*): Weighted sum of the losses below.
        ce_loss (`torch.Tensor` of shape `[]`, *optional*): Cross-entropy per token, in nats.
        ctc_loss (`torch.Tensor` of shape `[]`, *optional*): CTC loss per token of the transcripts, in nats.
        logits (`torch.Tensor` of shape `[B, P, V]`, *optional*): Outputs of the language model; with `labels` and no
            `input_ids` only those that predict the labels, `[B, labels, V]`.
        past_key_values (`Cache`, *optional*): Cache of the language model.
        hidden_states (`tuple[torch.Tensor]`, *optional*): With `output_hidden_states=True`, those of the language
            model, `[B, P, H]` each: its input embeddings and the outputs of its layers.
        attentions (`tuple[torch.Tensor]`, *optional*): With `output_attentions=True`, those of the language model, one
            `[B, heads, P, P]` per layer.
        audio (`SpeechLLMAudioOutput`, *optional*): What was computed from the audio.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    audio: SpeechLLMAudioOutput | None = None


@dataclass
class SpeechLLMSearchOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)` in the modes that decode CTC labels, all but `"llm"`.

    Args:
        sequences (`torch.Tensor` of shape `[B * num_return_sequences, N]`): Token ids, padded on the right.
        sequences_scores (`torch.Tensor` of shape `[B * num_return_sequences]`): Combined scores, in nats.
        hypotheses (`list[list[Hypothesis]]`): Per utterance, best first, with the separate scores of CTC, language
            model and prior.
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    hypotheses: list[list[Hypothesis]] | None = None
