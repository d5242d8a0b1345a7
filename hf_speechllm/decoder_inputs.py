"""What the language model reads: the prompt with the audio in it and, in training, the transcript behind them.

Rows are padded on the left, so that the next token of each is predicted at the last position.

Shapes: B utterances, P' tokens of the prompt, L audio positions, N labels, P positions of the whole, H width of the
language model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .audio_encoders import lens_to_mask


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """Input of the language model.

    Attributes:
        inputs_embeds: `[B, P, H]`.
        mask: `[B, P]`, 1 on valid positions.
        is_audio: Boolean `[B, P]`, true on the positions of the audio.
    """

    inputs_embeds: torch.Tensor
    mask: torch.Tensor
    is_audio: torch.Tensor


def place_audio(
    embeds: torch.Tensor,
    placeholder: torch.Tensor,
    attention_mask: torch.Tensor,
    audio_embeds: torch.Tensor,
    audio_embeds_lens: torch.Tensor,
) -> DecoderInputs:
    """Prompts with the audio in place of their one placeholder.

    Args:
        embeds: Embeddings of the prompts, `[B, P', H]`.
        placeholder: Boolean `[B, P']`, true once in each row.
        attention_mask: `[B, P']`, 0 on padding.
        audio_embeds: `[B, L, H]`.
        audio_embeds_lens: `[B]`, 0 to L.
    """
    audio_embeds = audio_embeds.to(embeds.device, embeds.dtype)
    rows, rows_is_audio = [], []
    for row in range(embeds.shape[0]):
        position = int(placeholder[row].nonzero())
        valid = attention_mask[row].bool()
        before = embeds[row, :position][valid[:position]]
        after = embeds[row, position + 1 :][valid[position + 1 :]]
        audio = audio_embeds[row, : int(audio_embeds_lens[row])]
        rows.append(torch.cat([before, audio, after]))
        index = torch.arange(len(rows[-1]), device=embeds.device)
        rows_is_audio.append((index >= len(before)) & (index < len(before) + len(audio)))
    return _pad_left(rows, rows_is_audio)


def append_labels(
    inputs: DecoderInputs, labels: torch.Tensor, ignore_index: int, embed: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[DecoderInputs, torch.Tensor]:
    """Inputs with their labels behind them, and the labels `[B, N]`, their padding moved to the left too.

    Args:
        inputs: From [`place_audio`].
        labels: `[B, N]`, padded with `ignore_index` anywhere.
        ignore_index: Not a token.
        embed: Tokens to embeddings.
    """
    valid = labels != ignore_index
    label_embeds = embed(labels.masked_fill(~valid, 0))
    rows, rows_is_audio, row_labels = [], [], []
    for row in range(labels.shape[0]):
        prompt = inputs.mask[row].bool()
        row_labels.append(labels[row][valid[row]])
        rows.append(torch.cat([inputs.inputs_embeds[row][prompt], label_embeds[row][valid[row]]]))
        rows_is_audio.append(
            torch.cat([inputs.is_audio[row][prompt], torch.zeros_like(row_labels[-1], dtype=torch.bool)])
        )
    labels = nn.utils.rnn.pad_sequence(row_labels, batch_first=True, padding_value=ignore_index, padding_side="left")
    return _pad_left(rows, rows_is_audio), labels


def _pad_left(rows: list[torch.Tensor], rows_is_audio: list[torch.Tensor]) -> DecoderInputs:
    lens = torch.tensor([len(row) for row in rows], device=rows[0].device)
    inputs_embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    is_audio = nn.utils.rnn.pad_sequence(rows_is_audio, batch_first=True, padding_side="left")
    return DecoderInputs(inputs_embeds, lens_to_mask(lens, inputs_embeds.shape[1]).flip(1).long(), is_audio)


@contextmanager
def bidirectional_audio(language_model: PreTrainedModel, inputs: DecoderInputs) -> Iterator[None]:
    """Inside, audio positions attend to all of their utterance's, later ones too; text stays causal.

    The masks are those that transformers builds for its own models that see images (`block_sequence_ids`). With a
    cache, only the first call needs them: what follows it is text.

    Args:
        language_model: A causal language model whose attention takes masks: any but flash attention.
        inputs: What it is going to read first. Tokens may follow, and an utterance may have several rows (beams), side
            by side.

    Raises:
        ValueError: In the call of the language model, if its attention takes no such masks, or the audio is read in
            pieces.
    """
    decoder = language_model.get_decoder()

    def set_mask(_decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            return None
        return args, {**kwargs, "attention_mask": _bidirectional_masks(decoder, inputs, kwargs["inputs_embeds"], cache)}

    handle = decoder.register_forward_pre_hook(set_mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _bidirectional_masks(
    decoder: PreTrainedModel, inputs: DecoderInputs, inputs_embeds: torch.Tensor, cache: Cache | None
) -> Any:
    """The masks of the first Q positions, `[N, Q, H]`: one, or one for each type of layer, as `decoder` takes them.

    Raises:
        ValueError: If these are not all of the audio, or the attention of `decoder` takes no such masks.
    """
    rows, length, _ = inputs_embeds.shape
    if inputs.is_audio[:, length:].any():
        raise ValueError(
            f"interface='bidirectional_prefix' needs all of the audio in one call of the language model, got {length} "
            f"of {inputs.mask.shape[1]} positions; leave prefill_chunk_size out."
        )
    if decoder.config.model_type == "bloom" or getattr(decoder.config, "alibi", False):
        raise ValueError(
            f"interface='bidirectional_prefix' needs a language model that takes masks of its own attention, got a "
            f"{type(decoder).__name__} with ALiBi, which counts the tokens of a plain one; choose interface='prefix'."
        )
    repeats = rows // len(inputs.mask)
    block_ids = torch.where(inputs.is_audio[:, :length], 0, -1)  # the audio is one block, text is in none
    masks = create_masks_for_generate(
        config=decoder.config,
        inputs_embeds=inputs_embeds,
        attention_mask=inputs.mask[:, :length].repeat_interleave(repeats, 0),
        past_key_values=cache,
        block_sequence_ids=block_ids.repeat_interleave(repeats, 0),
    )
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        if mask is None or len(mask.shape) != 4:
            raise ValueError(
                "interface='bidirectional_prefix' needs a language model all of whose layers are attention that takes "
                f"masks, got a {type(decoder).__name__} with attn_implementation="
                f"{decoder.config._attn_implementation!r}; load it with attn_implementation='sdpa' or 'eager', or "
                "choose interface='prefix'."
            )
    return masks
