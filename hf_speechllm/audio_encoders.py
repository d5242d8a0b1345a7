"""One calling convention for the acoustic encoders of transformers, in which padding changes nothing.

Several encoders normalise over time (the group norm behind the first convolution of Moonshine, Wav2Vec2-base, HuBERT),
or insist on 30 s of input (Whisper). Run as they stand, the output of an utterance depends on what it is batched with.
Here each family has a front end that computes what the encoder computes on the utterance alone.

Shapes: B utterances, S input steps (samples or feature frames), T encoder frames, D encoder width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask


@dataclass(frozen=True)
class AudioEncoding:
    """Output of the acoustic encoder.

    Attributes:
        layers: Layer index (non-negative, `num_layers - 1` is the final, normalised output) -> `[B, T, D]`.
        encoder_out: The final output, `[B, T, D]`. Frames past `encoder_out_lens` hold no information.
        encoder_out_lens: Number of valid frames of each utterance, `[B]`, at least 1.
    """

    layers: dict[int, torch.Tensor]
    encoder_out: torch.Tensor
    encoder_out_lens: torch.Tensor


def build_audio_tower(audio_config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder described by `audio_config`, with fresh weights; of an encoder-decoder model, its encoder."""
    return extract_audio_tower(AutoModel.from_config(getattr(audio_config, "encoder_config", audio_config)))


def extract_audio_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The acoustic encoder of `model`: its encoder if it also has a decoder or a head, else `model` itself.

    Raises:
        ValueError: If the encoder ends in a length adapter, which lets padding leak in.
    """
    if getattr(model.config, "add_adapter", False):
        raise ValueError(
            "audio_config: add_adapter must be False, got True; the projector takes the place of the length adapter "
            "(load the encoder with add_adapter=False)."
        )
    model = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    if model.config.is_encoder_decoder or hasattr(model.config, "encoder_config"):
        return model.get_encoder()
    return model


def encoder_width(audio_config: PreTrainedConfig) -> int:
    """Width D of the encoder's frames."""
    return getattr(audio_config, "encoder_config", audio_config).hidden_size


def encode_audio(
    audio_tower: PreTrainedModel,
    input_features: torch.Tensor,
    input_features_mask: torch.Tensor | None = None,
    layers: tuple[int, ...] = (),
) -> AudioEncoding:
    """Run the acoustic encoder once over a batch.

    Args:
        audio_tower: Encoder from [`build_audio_tower`].
        input_features: What the encoder's feature extractor makes: waveforms `[B, S]`, or frames `[B, S, F]`
            (Whisper: `[B, F, S]`).
        input_features_mask: `[B, S]`, 1 on valid input steps; right padding. `None`: no padding.
        layers: Indices of the layers to return beside the final output, negative ones count from the end.

    Raises:
        ValueError: If a layer does not exist or may be dropped, the audio is longer than the encoder's positions, or
            the shapes of features and mask disagree.
    """
    time_axis = 2 if audio_tower.config.model_type == "whisper" else 1
    expected = (input_features.shape[0], input_features.shape[time_axis])
    if input_features_mask is None:
        input_features_mask = input_features.new_ones(expected, dtype=torch.long)
    if input_features_mask.shape != expected:
        raise ValueError(
            f"input_features_mask must have shape [batch, time] = {expected}, got {tuple(input_features_mask.shape)}; "
            "take both from the same call of the processor."
        )
    layer_modules = encoder_layers(audio_tower)
    wanted = {layer_index(layer, len(layer_modules)) for layer in layers}
    final = len(layer_modules) - 1
    layerdrop = getattr(audio_tower.config, "layerdrop", 0.0)
    if audio_tower.training and layerdrop > 0.0 and wanted - {final}:
        raise ValueError(
            f"ctc_layers: layers below the last need an encoder that skips none in training, got layerdrop={layerdrop}"
            "; build or load the encoder with layerdrop=0."
        )
    family = _FAMILIES.get(audio_tower.config.model_type, _encode_generic)
    with _captured(layer_modules, wanted - {final}) as captured:
        encoder_out, lens = family(audio_tower, input_features, input_features_mask.to(input_features.device))
    if final in wanted:
        captured[final] = encoder_out
    return AudioEncoding(captured, encoder_out, lens.clamp(min=1, max=encoder_out.shape[1]))


def encoder_layers(audio_tower: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers, first to last."""
    for owner in (audio_tower, getattr(audio_tower, "encoder", None)):
        layers = getattr(owner, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(
        f"audio_config: no list of layers found in a {type(audio_tower).__name__}; supported are the encoders of "
        f"{sorted(_FAMILIES)} and encoders with a `layers` module list."
    )


def first_weight(audio_tower: PreTrainedModel) -> torch.Tensor:
    """The first weight of the encoder: input goes to its device and type.

    Not the first of `parameters()`: the replicas of `torch.nn.DataParallel` have none, their weights are attributes.
    """
    weights = (getattr(module, "weight", None) for module in audio_tower.modules())
    return next(weight for weight in weights if weight is not None and weight.is_floating_point())


def layer_index(layer: int, num_layers: int) -> int:
    """A layer of `ctc_layers` counted from the first one; ValueError if there is no such layer."""
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"ctc_layers: layer {layer} does not exist in an encoder of {num_layers} layers.")
    return layer % num_layers


@contextmanager
def _captured(layer_modules: nn.ModuleList, wanted: set[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the outputs of the wanted layers. Hooks, since not every encoder returns all hidden states."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: torch.Tensor | tuple) -> None:
            outputs[index] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    handles = [layer_modules[index].register_forward_hook(keep(index)) for index in wanted]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def lens_to_mask(lens: torch.Tensor, length: int) -> torch.Tensor:
    """`[B]` lengths to a boolean mask `[B, length]`, true on the valid positions."""
    return torch.arange(length, device=lens.device)[None] < lens[:, None]


def masked_group_norm(norm: nn.GroupNorm, x: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Group norm of `x` `[B, C, T]` with the statistics of the first `lens` `[B]` steps of each row only."""
    batch, channels, length = x.shape
    mask = lens_to_mask(lens, length)[:, None, None]
    grouped = x.float().view(batch, norm.num_groups, channels // norm.num_groups, length)
    count = (lens * (channels // norm.num_groups)).clamp(min=1)[:, None, None, None]
    mean = (grouped * mask).sum((2, 3), keepdim=True) / count
    centred = (grouped - mean) * mask
    variance = centred.square().sum((2, 3), keepdim=True) / count
    normalised = (centred * torch.rsqrt(variance + norm.eps)).view(batch, channels, length)
    return (normalised * norm.weight[:, None] + norm.bias[:, None]).to(x.dtype)


def _conv_lens(lens: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    return torch.div(lens - kernel, stride, rounding_mode="floor") + 1


def _min_samples(convolutions: list[nn.Conv1d]) -> int:
    """The shortest input of a stack of convolutions that gives one frame."""
    samples = 1
    for conv in reversed(convolutions):
        samples = (samples - 1) * conv.stride[0] + conv.kernel_size[0]
    return samples


def _encode_moonshine(
    encoder: PreTrainedModel, waveform: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    min_samples = _min_samples([encoder.conv1, encoder.conv2, encoder.conv3])
    lens = mask.sum(-1).clamp(min=min_samples)
    waveform = waveform * mask.to(waveform.dtype)
    waveform = nn.functional.pad(waveform, (0, max(0, min_samples - waveform.shape[1])))
    x = torch.tanh(encoder.conv1(waveform[:, None]))  # B, 1, S -> B, D, S//64
    lens = _conv_lens(lens, 127, 64)
    x = masked_group_norm(encoder.groupnorm, x, lens)
    x = nn.functional.gelu(encoder.conv2(x))
    x = nn.functional.gelu(encoder.conv3(x)).transpose(1, 2)  # B, D, S//64 -> B, T = S//384, D
    lens = _conv_lens(_conv_lens(lens, 7, 3), 3, 2)
    position_ids = torch.arange(x.shape[1], device=x.device)[None]
    position_embeddings = encoder.rotary_emb(x, position_ids=position_ids)
    attention_mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=x, attention_mask=lens_to_mask(lens, x.shape[1])
    )
    for layer in encoder.layers:
        x = layer(x, attention_mask=attention_mask, position_ids=position_ids, position_embeddings=position_embeddings)
    return encoder.layer_norm(x), lens


def _encode_whisper(
    encoder: PreTrainedModel, mel: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whisper's encoder on the clip only: its positions are cut to the longest clip, padding is not attended to."""
    lens = mask.sum(-1)
    longest = int(lens.max())
    limit = encoder.config.max_source_positions * encoder.conv2.stride[0]
    if longest > limit:
        raise ValueError(
            f"input_features: Whisper's encoder has positions for {limit} mel frames ({limit // 100} s), got {longest}"
            "; segment the audio first."
        )
    mel = mel[:, :, :longest]
    mel = mel * mask[:, None, :longest].to(mel.dtype)
    x = nn.functional.gelu(encoder.conv1(mel))  # B, F, S -> B, D, S
    x = x * mask[:, None, :longest].to(x.dtype)
    x = nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)  # B, D, S -> B, T = ceil(S/2), D
    lens = torch.div(lens + 1, 2, rounding_mode="floor")
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    x = nn.functional.dropout(x, p=encoder.dropout, training=encoder.training)
    attention_mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=x, attention_mask=lens_to_mask(lens, x.shape[1])
    )
    for layer in encoder.layers:
        x = layer(x, attention_mask)
    return encoder.layer_norm(x), lens


def _encode_wav2vec2(
    model: PreTrainedModel, waveform: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wav2Vec2, HuBERT, WavLM: as their `forward`, with a group norm that does not see the padding."""
    min_samples = _min_samples([layer.conv for layer in model.feature_extractor.conv_layers])
    lens = mask.sum(-1).clamp(min=min_samples)
    waveform = waveform * mask.to(waveform.dtype)
    x = nn.functional.pad(waveform, (0, max(0, min_samples - waveform.shape[1])))[:, None]
    for layer in model.feature_extractor.conv_layers:
        norm = getattr(layer, "layer_norm", None)
        x = layer.conv(x)
        lens = _conv_lens(lens, layer.conv.kernel_size[0], layer.conv.stride[0])
        if isinstance(norm, nn.GroupNorm):
            x = masked_group_norm(norm, x, lens)
        elif norm is not None:
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        x = layer.activation(x)
    x = model.feature_projection(x.transpose(1, 2))  # B, C, T -> B, T, D
    x = x[0] if isinstance(x, tuple) else x
    frame_mask = lens_to_mask(lens, x.shape[1])
    x = model._mask_hidden_states(x, attention_mask=frame_mask)
    return model.encoder(x, attention_mask=frame_mask).last_hidden_state, lens


def _encode_generic(
    model: PreTrainedModel, input_features: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoders that honour their attention mask: Wav2Vec2-BERT, Parakeet/FastConformer, and others of that kind."""
    # Not every encoder masks its input: some count on zeros in the padding.
    valid = mask.view(mask.shape + (1,) * (input_features.dim() - 2)).to(input_features.dtype)
    encoder_out = model(**{model.main_input_name: input_features * valid}, attention_mask=mask).last_hidden_state
    lens = mask.sum(-1)
    if hasattr(model, "_get_subsampling_output_length"):
        lens = model._get_subsampling_output_length(lens)
    elif hasattr(model, "_get_feat_extract_output_lengths"):
        lens = model._get_feat_extract_output_lengths(lens)
    elif encoder_out.shape[1] != input_features.shape[1]:
        raise ValueError(
            f"audio_config: a {type(model).__name__} changes the number of frames and does not tell how; supported are "
            f"the encoders of {sorted(_FAMILIES)} and encoders that keep the number of frames."
        )
    return encoder_out, lens.long()


_FAMILIES: dict[str, Callable[[PreTrainedModel, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "moonshine": _encode_moonshine,
    "whisper": _encode_whisper,
    "wav2vec2": _encode_wav2vec2,
    "hubert": _encode_wav2vec2,
    "wavlm": _encode_wav2vec2,
    "wav2vec2-bert": _encode_generic,
    "parakeet_encoder": _encode_generic,
}
