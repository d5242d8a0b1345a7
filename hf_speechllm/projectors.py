"""Projectors: encoder frames to input embeddings of the language model, and the CTC head beside them.

Shapes: B utterances, T encoder frames, D encoder width, S = downsampling, L = ceil(T/S) positions of the language
model, H language model width, U CTC labels (without the blank).
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .audio_encoders import AudioEncoding, encoder_width
from .configuration_speechllm import SpeechLLMConfig


def stack_frames(x: torch.Tensor, downsampling: int) -> torch.Tensor:
    """`[B, T, D]` to `[B, ceil(T/S), S, D]`; missing frames of the last group are zero."""
    batch, length, width = x.shape
    x = nn.functional.pad(x, (0, 0, 0, -length % downsampling))
    return x.view(batch, -1, downsampling, width)


class StackProjector(nn.Module):
    """Stacks S frames and applies one linear layer with bias: the adapter of arXiv 2603.15045."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        self.downsampling = config.downsampling
        width = encoder_width(config.audio_config) * config.downsampling
        self.linear = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, encoder_out: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]`, zero on padded frames, to `[B, L, H]`."""
        return self.linear(stack_frames(encoder_out, self.downsampling).flatten(2))  # B, T, D -> B, L, S*D -> B, L, H


class MLPProjector(nn.Module):
    """Stacks S frames and applies a two-layer perceptron."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        self.downsampling = config.downsampling
        hidden_size = config.projector_hidden_size or config.text_config.hidden_size
        self.linear_1 = nn.Linear(encoder_width(config.audio_config) * config.downsampling, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, config.text_config.hidden_size)

    def forward(self, encoder_out: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]`, zero on padded frames, to `[B, L, H]`."""
        x = stack_frames(encoder_out, self.downsampling).flatten(2)  # B, T, D -> B, L, S*D
        return self.linear_2(self.act(self.linear_1(x)))


class ConvProjector(nn.Module):
    """A convolution over neighbouring frames, one with stride S, and a linear layer."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        self.downsampling = config.downsampling
        width = encoder_width(config.audio_config)
        hidden_size = config.projector_hidden_size or config.text_config.hidden_size
        self.conv_1 = nn.Conv1d(width, hidden_size, kernel_size=3, padding=1)
        self.conv_2 = nn.Conv1d(hidden_size, hidden_size, kernel_size=config.downsampling, stride=config.downsampling)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear = nn.Linear(hidden_size, config.text_config.hidden_size)

    def forward(self, encoder_out: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]`, zero on padded frames, and `[B, T]` to `[B, L, H]`."""
        x = self.act(self.conv_1(encoder_out.transpose(1, 2)))  # B, T, D -> B, H', T
        # The first convolution leaks into the padding; an utterance alone has zeros there.
        x = (x * frame_mask[:, None]).transpose(1, 2)
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.downsampling)).transpose(1, 2)
        return self.linear(self.act(self.conv_2(x)).transpose(1, 2))  # B, H', T -> B, L, H


class PoolProjector(nn.Module):
    """The mean of S frames, and one linear layer with bias."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        self.downsampling = config.downsampling
        self.linear = nn.Linear(encoder_width(config.audio_config), config.text_config.hidden_size)

    def forward(self, encoder_out: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]`, zero on padded frames, and `[B, T]` to `[B, L, H]`; the last mean is of the valid frames."""
        sums = stack_frames(encoder_out, self.downsampling).sum(2)  # B, T, D -> B, L, D
        counts = stack_frames(frame_mask[..., None].to(sums.dtype), self.downsampling).sum(2)  # B, T, 1 -> B, L, 1
        return self.linear(sums / counts.clamp(min=1.0))


class CTCPosteriorProjector(nn.Module):
    """Expected label embedding under the CTC posterior, plus a correction computed from the frames.

    The language model starts from what the CTC head already recognises, in embeddings that it knows (as in LegoSLM,
    arXiv 2505.11352); the correction starts at zero.
    """

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        self.downsampling = config.downsampling
        hidden_size = config.projector_hidden_size or config.text_config.hidden_size
        self.blank_embedding = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.linear_1 = nn.Linear(encoder_width(config.audio_config) * config.downsampling, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, config.text_config.hidden_size)

    def forward(
        self,
        encoder_out: torch.Tensor,
        ctc_log_probs: torch.Tensor,
        frame_mask: torch.Tensor,
        label_embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """Frames `[B, T, D]`, `[B, T, U+1]` (blank last), `[B, T]` and label embeddings `[U, H]` to `[B, L, H]`."""
        probs = ctc_log_probs[..., :-1].exp() * frame_mask[..., None]
        counts = stack_frames(probs, self.downsampling).sum(2)  # B, T, U -> B, L, U: expected occurrences
        mass = counts.sum(-1, keepdim=True)
        # A label that spikes over several frames still counts once.
        expected = (counts / mass.clamp(min=1.0)).to(label_embeddings.dtype) @ label_embeddings
        expected = expected + (1.0 - mass.clamp(max=1.0)).to(expected.dtype) * self.blank_embedding
        x = stack_frames(encoder_out, self.downsampling).flatten(2)
        return expected + self.linear_2(self.act(self.linear_1(x)))


PROJECTOR_CLASSES = {
    "stack": StackProjector,
    "mlp": MLPProjector,
    "conv": ConvProjector,
    "pool": PoolProjector,
    "ctc_posterior": CTCPosteriorProjector,
}


class CTCHead(nn.Module):
    """CTC outputs from one encoder layer, or from a learned softmax mix of several."""

    def __init__(self, config: SpeechLLMConfig):
        super().__init__()
        width = encoder_width(config.audio_config)
        self.layers = tuple(config.ctc_layers)
        self.layer_weights = nn.Parameter(torch.zeros(len(self.layers))) if len(self.layers) > 1 else None
        # Layers below the last are not normalised by the encoder itself.
        self.layer_norm = nn.LayerNorm(width) if self.layers != (-1,) else None
        self.linear = nn.Linear(width, config.ctc_vocab_size + 1)
        # Log-probabilities of the labels regardless of audio, for fusion with a language model; zero: none estimated.
        self.register_buffer("log_prior", torch.zeros(config.ctc_vocab_size + 1))

    def forward(self, encoding: AudioEncoding, num_layers: int) -> torch.Tensor:
        """The encoder's layers to log-probabilities `[B, T, U+1]` in float32, blank last."""
        return self.log_probs(self.features(encoding, num_layers))

    def log_probs(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[B, T, D]` to log-probabilities `[B, T, U+1]` in float32, blank last."""
        return self.linear(features).float().log_softmax(-1)

    def features(self, encoding: AudioEncoding, num_layers: int) -> torch.Tensor:
        """The encoder's layers to what the linear layer reads, `[B, T, D]`."""
        layers = [encoding.layers[layer % num_layers] for layer in self.layers]
        if self.layer_weights is None:
            x = layers[0]
        else:
            x = torch.einsum("k,kbtd->btd", self.layer_weights.softmax(0), torch.stack(layers))
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return x


def drop_blank_positions(
    audio_embeds: torch.Tensor,
    ctc_log_probs: torch.Tensor,
    frame_mask: torch.Tensor,
    downsampling: int,
    threshold: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove the positions all of whose frames are blank with a probability above `threshold`.

    Args:
        audio_embeds: `[B, L, H]`; ctc_log_probs: `[B, T, U+1]`; frame_mask: `[B, T]`.

    Returns:
        The kept embeddings, moved to the front, `[B, L', H]`, and their number `[B]`, at least 1.
    """
    has_label = (ctc_log_probs[..., -1].exp() <= threshold) & frame_mask
    keep = stack_frames(has_label[..., None].float(), downsampling).amax((2, 3)) > 0  # B, T -> B, L
    keep[:, 0] |= ~keep.any(1)  # the language model still needs to be told that there was audio
    lens = keep.sum(1)
    order = torch.argsort(~keep, dim=1, stable=True)[:, : int(lens.max())]
    return audio_embeds.gather(1, order[..., None].expand(-1, -1, audio_embeds.shape[-1])), lens
