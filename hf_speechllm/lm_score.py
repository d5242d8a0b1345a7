"""Log-probabilities of any causal language model for a search: batched, incremental, with its KV cache reordered.

Shape legend: N rows (hypotheses), N' rows of the next state, A rows that got new tokens, M new tokens per row (ragged,
padded on the right), W cached positions, L tokens of a whole sequence, V vocabulary, G key/value heads, D head width.
All scores are natural-log probabilities.

Rows of one batch have histories of different lengths, and each call adds a different number of tokens to each row. The
cache is therefore kept aligned at its *right* edge: padding stands on the left only, and new tokens follow directly

    past . . a b c | x y z        three new tokens
    past . d e f g | x . .        one new token; what stands right of it is padding, gone when the row is moved back

so that the distance between two columns is the distance between their tokens. Sliding windows, chunked attention and
relative positions are exact as they are in `generate`, which pads on the left too, and there are no holes to clean up.
Between the calls keys and values lie in a pool (kv_pool.py), and a state knows the places of its rows' tokens in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .kv_pool import KeysValues, KVPool
from .word_tokens import encode_words, word_prefix

_ATTENTION_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)

# Their attention knows distances only, so they need no position ids; all others must take them.
_MODELS_WITHOUT_POSITIONS = ("bloom", "mpt")

_LOGITS_PER_CHUNK = 1 << 25  # logits in float32 at a time: 128 MiB


@dataclass(frozen=True, eq=False)
class LMState:
    """Language-model state of N hypotheses. Made by `CausalLMScorer`, never modified.

    Attributes:
        next_log_probs: [N, V] float32 log P(token | history).
        token_log_prob: [N] float64 (float32 on mps) log P of the tokens that the last `advance` added, each given what
            stands before it; 0 for rows without new tokens.
    """

    next_log_probs: Tensor
    token_log_prob: Tensor
    _lengths: Tensor  # [N] on the host: cached tokens per row, those of the start included
    _pool: KVPool
    _places: Tensor  # [N, W] on the host, of each token in the pool; row n: the first _lengths[n], then its first again

    def __len__(self) -> int:
        return self.next_log_probs.shape[0]


class CausalLMScorer:
    """Scores token sequences with a causal language model of transformers, for a search or a whole N-best list.

    Every history starts with the model's BOS (EOS where there is none, as transformers does for GPT-2), then `prompt`.
    The model runs as it is at each call: plain if its adapters are switched off. Computation is in the model's dtype,
    log-probs are float32. Keys and values are kept of all positions, also of those beyond a sliding window, and once
    for all rows that share a history: memory grows with the number of distinct tokens.

    Args:
        model: a causal language model in evaluation mode. It must attend to all its tokens: models that carry a
            recurrent state (Mamba, linear attention) cannot drop padding again.
        tokenizer: the tokenizer of `model`.
        prompt: text that every hypothesis continues, without a space at its end since words carry their own.
        max_batch_size: most sequences per call in `score`. `advance` always makes one call.

    Raises:
        TypeError: `model` is not a PreTrainedModel.
        ValueError: the model is not of that kind or is in training mode, or there is no EOS.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: str = "",
        max_batch_size: int = 32,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected at least 1 sequence per call, got {max_batch_size}.")
        _check_model(model)
        config = model.config.get_text_config(decoder=True)
        eos_token_id = _first_id(tokenizer.eos_token_id, config.eos_token_id)
        if eos_token_id is None:
            raise ValueError("tokenizer: expected an EOS token, but neither it nor the model's config has one.")
        bos_token_id = _first_id(tokenizer.bos_token_id, config.bos_token_id, eos_token_id)
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.vocab_size: int = config.vocab_size
        self.eos_token_id: int = eos_token_id
        self.start_token_ids: list[int] = [bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        self._check_token_ids(self.start_token_ids)
        self._max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._takes_position_ids = _takes_position_ids(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def start(self, num_rows: int) -> LMState:
        """Returns the state of `num_rows` empty hypotheses: after BOS and the prompt. The model sees a single row.

        Raises:
            ValueError: `num_rows` is below 1.
        """
        if num_rows < 1:
            raise ValueError(f"num_rows: expected at least 1, got {num_rows}.")
        ids = torch.tensor([self.start_token_ids])  # 1, W
        length = torch.tensor([ids.shape[1]])
        logits, new_states = self._forward((), torch.zeros_like(length), ids, length)
        next_log_probs = torch.log_softmax(logits[:, -1].float(), dim=-1)
        no_tokens = torch.zeros(num_rows, dtype=_sum_dtype(self.device), device=self.device)
        pool = KVPool()
        places = pool.append(new_states, torch.ones_like(ids, dtype=torch.bool))
        return LMState(
            next_log_probs.expand(num_rows, -1),
            no_tokens,
            length.expand(num_rows),
            pool,
            places.expand(num_rows, -1),
        )

    @torch.no_grad()
    def advance(self, state: LMState, parent: Tensor, tokens: Tensor, num_tokens: Tensor) -> LMState:
        """Continues N' hypotheses by 0 to M tokens each, in one call of the model for those with at least one.

        Args:
            state: N hypotheses, from `start` or `advance`; stays valid.
            parent: [N'] integer, the row of `state` that each new row continues. Rows may repeat and be left out.
            tokens: [N', M] integer, the first `num_tokens[i]` of row i are appended; the others may hold anything.
            num_tokens: [N'] integer, 0 to M.

        Returns:
            The state of the N' continued hypotheses.

        Raises:
            ValueError: shapes do not agree, a row, count or token is out of range, or a history is longer than the
                model's positions.
        """
        # Planned on the host: shapes depend on the counts, and one transfer is cheaper than many small kernels.
        parent, tokens, num_tokens = parent.cpu(), tokens.cpu(), num_tokens.cpu()
        self._check_advance(state, parent, tokens, num_tokens)
        parent, tokens, num_tokens = parent.long(), tokens.long(), num_tokens.long()
        past_lengths = state._lengths[parent]
        lengths = past_lengths + num_tokens  # N'
        width = int(lengths.max()) if len(lengths) else 0
        row = parent.to(self.device)
        next_log_probs = state.next_log_probs[row]  # N', V
        token_log_prob = torch.zeros(len(parent), dtype=state.token_log_prob.dtype, device=self.device)
        active = num_tokens.nonzero().flatten()  # A
        places = state._places[parent]  # N', W
        if len(active) == 0:
            return LMState(next_log_probs, token_log_prob, lengths, state._pool, places[:, :width])

        # A, M without what only idle rows would need; padding is token 0, which every model can embed.
        num_new = num_tokens[active]
        new_tokens = tokens[active, : int(num_new.max())]
        is_new = torch.arange(new_tokens.shape[1]) < num_new[:, None]
        new_tokens = new_tokens.masked_fill(~is_new, 0)
        past = state._pool.gather(_align_right(places[active], past_lengths[active]))
        logits, new_states = self._forward(past, past_lengths[active], new_tokens, num_new)

        target = active.to(self.device)
        token_log_prob[target] = self._sum_log_probs(next_log_probs[target], logits[:, :-1], new_tokens, num_new)
        last_logits = logits[torch.arange(len(active)), num_new - 1]  # A, V
        next_log_probs[target] = torch.log_softmax(last_logits.float(), dim=-1)

        pool, places = state._pool.with_room(int(num_new.sum()), places)
        first = places[:, :1]
        places = torch.nn.functional.pad(places, (0, max(0, width - places.shape[1])))[:, :width]
        new_row, column = is_new.nonzero(as_tuple=True)
        new_row = active[new_row]
        places[new_row, past_lengths[new_row] + column] = pool.append(new_states, is_new)
        places = torch.where(torch.arange(width) < lengths[:, None], places, first)
        return LMState(next_log_probs, token_log_prob, lengths, pool, places)

    @torch.no_grad()
    def score(self, token_ids: Sequence[Sequence[int]], *, include_eos: bool = True) -> Tensor:
        """Scores whole sequences; equal ones once, in batches of similar length.

        Args:
            token_ids: N sequences of tokens, without BOS, prompt and EOS; may be empty.
            include_eos: add log P(EOS | sequence).

        Returns:
            [N] float64 on the host, log P(sequence | start and prompt).

        Raises:
            ValueError: a token is out of range or a sequence is longer than the model's positions.
        """
        sequences = [tuple(ids) for ids in token_ids]
        start = self.start(1)
        end = (self.eos_token_id,) if include_eos else ()
        distinct = sorted(set(sequences), key=lambda ids: (len(ids), ids))
        scores: dict[tuple[int, ...], float] = {}
        for first in range(0, len(distinct), self.max_batch_size):
            batch = distinct[first : first + self.max_batch_size]
            batch_scores = self._score_batch(start, [ids + end for ids in batch])
            scores.update(zip(batch, batch_scores.tolist(), strict=True))
        return torch.tensor([scores[ids] for ids in sequences], dtype=torch.float64)

    def tokenize(self, text: str) -> list[int]:
        """Tokens of `text`, whose words all carry a leading space, the first one too; no special tokens.

        Words may thus be tokenised one by one as they are found: the tokens of a text are those of its words in a row
        (`splits_at_words` verifies it). White space counts as one space, and none is kept at the end.

        Raises:
            ValueError: the tokenizer gives a word other tokens when it stands alone, or a token that is not in the
                model's vocabulary.
        """
        if word_prefix(self.tokenizer) is None:
            raise ValueError(
                f"tokenizer: expected one that tokenises words independently of their neighbours, got "
                f"{type(self.tokenizer).__name__} that does not, with or without a leading space."
            )
        ids = encode_words(self.tokenizer, " ".join(text.split()))
        self._check_token_ids(ids)
        return ids

    def splits_at_words(self, text: str) -> bool:
        """Whether `tokenize` gives the same tokens for the whole text as for its words one after the other."""
        return self.tokenize(text) == [token for word in text.split() for token in self.tokenize(word)]

    def _score_batch(self, start: LMState, sequences: list[tuple[int, ...]]) -> Tensor:
        """[A] log P of sequences that end in EOS or not."""
        for ids in sequences:
            self._check_token_ids(ids)
        num_tokens = torch.tensor([len(ids) for ids in sequences])
        if int(num_tokens.max()) == 0:
            return torch.zeros(len(sequences), dtype=torch.float64)
        targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in sequences], True)
        logits = start.next_log_probs.new_empty(len(sequences), 0, self.vocab_size)
        if targets.shape[1] > 1:  # the last token of each sequence is predicted, never read
            past = start._pool.gather(start._places.expand(len(sequences), -1))
            lengths = start._lengths.expand(len(sequences))
            logits, _ = self._forward(past, lengths, targets[:, :-1], (num_tokens - 1).clamp(min=1))
        return self._sum_log_probs(start.next_log_probs.expand(len(sequences), -1), logits, targets, num_tokens)

    def _forward(
        self, past: KeysValues, past_lengths: Tensor, tokens: Tensor, num_tokens: Tensor
    ) -> tuple[Tensor, KeysValues]:
        """Runs the model on A rows of 1 to M tokens after their past.

        Args:
            past: right-aligned, W columns; empty at the start.
            past_lengths: [A] on the host.
            tokens: [A, M] on the host, padded on the right.
            num_tokens: [A] on the host, 1 to M.

        Returns:
            logits [A, M, V], and the keys and values of the M columns.
        """
        max_new = tokens.shape[1]
        total = int((past_lengths + num_tokens).max())
        if self._max_positions is not None and total > self._max_positions:
            raise ValueError(
                f"tokens: expected histories of at most {self._max_positions} tokens (start and prompt included) for "
                f"this model, got {total}; split the audio into shorter segments."
            )
        past_width = int(past_lengths.max())
        is_past = torch.arange(past_width) >= past_width - past_lengths[:, None]  # A, W
        is_new = torch.arange(max_new) < num_tokens[:, None]  # A, M
        inputs = {
            "input_ids": tokens.to(self.device),
            "attention_mask": torch.cat([is_past, is_new], dim=1).long().to(self.device),  # A, W+M
            # Without a config all layers keep all positions: a sliding layer would count the padding among its window.
            "past_key_values": DynamicCache(past) if past else DynamicCache(),
        }
        if self._takes_position_ids:
            # Padding repeats the last position, which exists in any table of learned positions.
            offset = torch.minimum(torch.arange(max_new), num_tokens[:, None] - 1)
            inputs["position_ids"] = (past_lengths[:, None] + offset).to(self.device)
        output = self.model(**inputs, use_cache=True)
        new_states = [(layer[0][:, :, -max_new:], layer[1][:, :, -max_new:]) for layer in output.past_key_values]
        return output.logits, new_states

    def _sum_log_probs(self, first: Tensor, logits: Tensor, targets: Tensor, num_tokens: Tensor) -> Tensor:
        """[A] log P of the first `num_tokens` of `targets`.

        Args:
            first: [A, V] log-probs of the first token.
            logits: [A, M-1, V] of the tokens after it.
            targets: [A, M] on the host.
            num_tokens: [A] on the host, 0 to M.
        """
        dtype = _sum_dtype(self.device)
        is_target = (torch.arange(targets.shape[1]) < num_tokens[:, None]).to(self.device)  # A, M
        targets = targets.to(self.device)
        log_probs = [first.gather(1, targets[:, :1]).to(dtype)]  # A, 1
        if logits.shape[1] > 0:
            rows_per_chunk = max(1, _LOGITS_PER_CHUNK // logits[0].numel())
            later = []
            for chunk, chunk_targets in zip(
                logits.split(rows_per_chunk), targets[:, 1:].split(rows_per_chunk), strict=True
            ):
                chosen = chunk.gather(2, chunk_targets[:, :, None])[:, :, 0].to(dtype)
                later.append(chosen - torch.logsumexp(chunk.float(), dim=2).to(dtype))
            log_probs.append(torch.cat(later))  # A, M-1
        return torch.cat(log_probs, dim=1).masked_fill(~is_target, 0.0).sum(1)

    def _check_advance(self, state: LMState, parent: Tensor, tokens: Tensor, num_tokens: Tensor) -> None:
        if parent.dim() != 1 or tokens.dim() != 2 or num_tokens.shape != parent.shape or len(tokens) != len(parent):
            raise ValueError(
                f"parent, tokens, num_tokens: expected shapes [N'], [N', M], [N'], got {tuple(parent.shape)}, "
                f"{tuple(tokens.shape)}, {tuple(num_tokens.shape)}."
            )
        for name, values in (("parent", parent), ("tokens", tokens), ("num_tokens", num_tokens)):
            if values.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"{name}: expected int64 or int32, got {values.dtype}.")
        if bool(((parent < 0) | (parent >= len(state))).any()):
            raise ValueError(f"parent: expected rows 0 to {len(state) - 1} of the state, got {parent.tolist()}.")
        if bool(((num_tokens < 0) | (num_tokens > tokens.shape[1])).any()):
            raise ValueError(f"num_tokens: expected 0 to {tokens.shape[1]}, got {num_tokens.tolist()}.")
        self._check_token_ids(tokens[torch.arange(tokens.shape[1]) < num_tokens[:, None]].tolist())

    def _check_token_ids(self, ids: Sequence[int]) -> None:
        if any(not 0 <= token < self.vocab_size for token in ids):
            outside = sorted({token for token in ids if not 0 <= token < self.vocab_size})
            raise ValueError(f"tokens: expected ids 0 to {self.vocab_size - 1} (the model's), got {outside}.")


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a PreTrainedModel, got {type(model).__name__}; of a PEFT model pass get_base_model()."
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(f"model: expected a causal language model with its output layer, got {name}.")
    # Right padding can be dropped from an attention cache again, but not from a recurrent state.
    layers = DynamicCache(config=model.config).layers
    if model._is_stateful or not all(type(layer) in _ATTENTION_LAYERS for layer in layers):
        raise ValueError(f"model: expected plain attention in every layer, got {name}, which carries other state.")
    if model.training:
        raise ValueError(f"model: expected evaluation mode, got {name} in training mode; call model.eval() first.")


def _takes_position_ids(model: PreTrainedModel) -> bool:
    if "position_ids" in inspect.signature(model.forward).parameters:
        return True
    if model.config.model_type in _MODELS_WITHOUT_POSITIONS:
        return False
    raise ValueError(
        f"model: expected one whose forward takes position_ids, got {type(model).__name__}: rows with histories of "
        "different lengths could not be told apart."
    )


def _first_id(*candidates: int | list[int] | None) -> int | None:
    """The first token id there is; of several EOS ids the first."""
    for candidate in candidates:
        if candidate is not None:
            return candidate[0] if isinstance(candidate, list) else candidate
    return None


def _align_right(places: Tensor, lengths: Tensor) -> Tensor:
    """The first `lengths` [N] of `places` [N, W] at the right edge, [N, longest]; any place stands left of them."""
    width = int(lengths.max())
    return places.gather(1, (torch.arange(width) - width + lengths[:, None]).clamp(min=0))


def _sum_dtype(device: torch.device) -> torch.dtype:
    """Log-probs of long texts are summed in float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
