"""Cross-attention to the speech inside any causal language model: gated layers between those of the model.

The layers stand beside the language model, not in it: its weights keep their names, and without the context of
[`SpeechCrossAttention.inserted`] it is the plain language model. Keys and values of the speech are computed once per
utterance; the rows of its beams attend to them together, so that there is nothing to copy or to reorder.

Source: Alayrac et al. (2022), "Flamingo: a Visual Language Model for Few-Shot Learning", arXiv 2204.14198, figure 4:
`y' = y + tanh(a) attention(y, speech)`, `y'' = y' + tanh(b) feed_forward(y')`, with `a = b = 0` at the start.

Shapes: B utterances, K rows of each (beams, samples), N = B*K rows, Q text positions, L audio positions, H width of the
language model, A heads, E width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .audio_encoders import lens_to_mask
from .configuration_speechllm import SpeechLLMConfig


@dataclass(frozen=True, eq=False)
class SpeechKeysValues:
    """What one cross-attention layer attends to.

    Attributes:
        keys: `[B, A, L, E]`.
        values: `[B, A, L, E]`.
        mask: Boolean `[B, 1, 1, L]`, true on valid positions. `None`: all are.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None


class GatedCrossAttentionLayer(GradientCheckpointingLayer):
    """Attention to the speech and a feed-forward block, each behind a gate that is closed at the start."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        text_config = config.get_text_config()
        width = text_config.hidden_size
        self.num_heads = text_config.num_attention_heads
        self.head_dim = getattr(text_config, "head_dim", None) or width // self.num_heads
        hidden_size = config.cross_attention_intermediate_size or 4 * width
        inner_width = self.num_heads * self.head_dim
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner_width, bias=False)
        self.key = nn.Linear(width, inner_width, bias=False)
        self.value = nn.Linear(width, inner_width, bias=False)
        self.output = nn.Linear(inner_width, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, hidden_size, bias=False)
        self.act = ACT2FN["gelu"]
        self.feed_forward_out = nn.Linear(hidden_size, width, bias=False)
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, speech: torch.Tensor, mask: torch.Tensor | None) -> SpeechKeysValues:
        """Of the normalised speech `[B, L, H]` and its mask `[B, 1, 1, L]`."""
        keys, values = (
            projection(speech).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # B, L, A*E -> B, A, L, E
            for projection in (self.key, self.value)
        )
        return SpeechKeysValues(keys, values, mask)

    def forward(
        self, hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`[N, Q, H]` to `[N, Q, H]`. Rows of one utterance are neighbours, as `generate` keeps them.

        Tensors are positional: of named ones, checkpointing (`use_reentrant=True`) would lose the gradients.
        """
        rows, length, _ = hidden_states.shape
        # No row attends to another, and none is masked from a part of its utterance: all of them are one query.
        query = self.query(self.attention_norm(hidden_states)).view(len(keys), -1, self.num_heads, self.head_dim)
        query = query.transpose(1, 2)  # N, Q, A*E -> B, K*Q, A, E -> B, A, K*Q, E
        heard = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        heard = heard.transpose(1, 2).reshape(rows, length, -1)  # B, A, K*Q, E -> N, Q, A*E
        hidden_states = hidden_states + self.attention_gate.tanh() * self.output(heard)
        x = self.feed_forward_out(self.act(self.feed_forward_in(self.feed_forward_norm(hidden_states))))
        return hidden_states + self.feed_forward_gate.tanh() * x


class SpeechCrossAttention(nn.Module):
    """One gated layer before every `config.cross_attention_interval`-th layer of the language model.

    Attention is torch's `scaled_dot_product_attention`, whatever the language model uses for its own.
    """

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        interval = config.cross_attention_interval
        num_layers = config.get_text_config().num_hidden_layers
        self.positions = range(interval - 1, num_layers, interval)
        self.speech_norm = nn.LayerNorm(config.get_text_config().hidden_size)
        self.layers = nn.ModuleList(GatedCrossAttentionLayer(config) for _ in self.positions)

    @contextmanager
    def inserted(
        self, language_model: PreTrainedModel, audio_embeds: torch.Tensor, audio_embeds_lens: torch.Tensor
    ) -> Iterator[None]:
        """Inside, `language_model` hears: `with cross_attention.inserted(language_model, embeds, lens): ...`.

        It may be given any number of rows for each utterance, those of an utterance side by side.

        Args:
            language_model: Any causal language model with a list of layers.
            audio_embeds: `[B, L, H]`.
            audio_embeds_lens: `[B]`, at least 1.

        Raises:
            ValueError: If the layers of the language model are not found, or, from within, take something else than
                hidden states `[B, P, H]`.
        """
        layers = decoder_layers(language_model)
        parameter = self.speech_norm.weight
        speech = self.speech_norm(audio_embeds.to(parameter.device, parameter.dtype))
        mask = lens_to_mask(audio_embeds_lens.to(parameter.device), speech.shape[1])
        # Without a mask, attention has faster kernels.
        mask = None if bool(mask.all()) else mask[:, None, None]
        plain = list(layers)
        for position, layer in zip(self.positions, self.layers, strict=True):
            layers[position] = _HearingLayer(plain[position], layer, layer.keys_values(speech, mask))
        try:
            yield
        finally:
            for position in self.positions:
                layers[position] = plain[position]


class _HearingLayer(nn.Module):
    """In the place of a layer of the language model: cross-attention, then that layer.

    Not a hook on the layer: hooks run anew when a checkpointed layer is computed again for the gradients, and by then
    the speech would be gone.
    """

    def __init__(self, layer: nn.Module, cross_attention: GatedCrossAttentionLayer, speech: SpeechKeysValues):
        super().__init__()
        self.layer = layer
        self.cross_attention = cross_attention
        self.speech = speech

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() != 3:  # Gemma 3n has several streams
            raise ValueError(
                f"interface='cross_attention' needs layers that take hidden states [B, P, H], and a "
                f"{type(self.layer).__name__} takes {list(hidden_states.shape)}; choose interface='prefix'."
            )
        hidden_states = self.cross_attention(hidden_states, self.speech.keys, self.speech.values, self.speech.mask)
        return self.layer(hidden_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # What the language model asks its layers, such as `layer_type`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal language model, first to last: its list of as many modules as the config tells.

    Raises:
        ValueError: If there is none.
    """
    num_layers = language_model.config.get_text_config().num_hidden_layers
    for module in language_model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"interface='cross_attention' needs a language model with a list of num_hidden_layers = {num_layers} layers, "
        f"and a {type(language_model).__name__} has none; choose interface='prefix'."
    )
