"""Adapter of the CTC prefix scorer to transformers' `generate`: joint LLM and CTC decoding for any model.

Shape legend: B utterances, K beams (or samples) per utterance, N = B*K rows, W width of `input_ids`, V vocabulary,
U' labels scored by CTC, C candidate tokens per row, M labels of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .ctc_prefix_score import KEEP_LABEL, LOG_PROB_FLOOR, CTCPrefixScorer, CTCPrefixState
from .label_chains import SILENT, LabelChains, extend_by_chains, score_chains, score_labels
from .label_units import LabelUnits
from .row_tracking import RowTrackingProcessor

# Where tokens are chains of labels: candidates per hypothesis, and how far they may lag behind the best one.
NUM_CANDIDATES = 32
MARGIN_NATS = 10.0

_NO_TOKEN = -1  # last token of the empty hypothesis


@dataclass(frozen=True, eq=False)
class HeardRows:
    """What was heard of N hypotheses.

    Attributes:
        ctc: their state.
        last_token: [N] last token of each, -1 before the first: labels alone do not tell of marks between words.
    """

    ctc: CTCPrefixState
    last_token: Tensor


class CTCPrefixLogitsProcessor(RowTrackingProcessor[HeardRows]):
    """Mixes the CTC prefix score into the next-token scores of any `generate` (greedy, sampling, beam search).

    Token c after hypothesis g scores `(1 - weight) * log p_LLM(c) + weight * (psi(g.c) - psi(g))`, where psi is the CTC
    prefix log-probability; an EOS token has `log P_CTC(the audio is exactly g)` in place of psi(g.c). Tokens CTC cannot
    produce get -inf. EOS always stays possible, except where another processor forbade it; if that leaves a row
    without any token (`min_new_tokens` beyond what the audio can hold, a forced token CTC does not know), the row keeps
    its LLM log-probs; if other processors forbade everything, all are -inf and the hypothesis is dead. A token without
    a label that is chosen nevertheless leaves the CTC state as it is.

    If tokens are chains of labels (`LabelChains`), psi(g.c) is that of the whole chain. It is computed for the
    `num_candidates` tokens of each row that promise most, all others get -inf. What a token promises is its score with
    psi of its first label: since psi only falls along a chain, that bounds its score, and is it where the chain is one
    label. LLM and audio thus both propose candidates. About silent tokens, such as punctuation, CTC says nothing: they
    score log p_LLM, not the share of it that words get. They are as dear as without CTC and cannot flood the beams,
    which a factor of 1 in CTC's place would invite (at weight 1 it would be the best choice for ever).

    Takes logits, which are normalised inside, or log-probs; what another processor set to -inf stays -inf. Log-probs
    that sum to less than 1 after other processors are left so: a hypothesis that wants what is forbidden, such as to
    repeat itself, pays for that, as it does without CTC. Returns log-scores [N, V] that are not normalised (the sum
    over V is below 1). With `weight` 0 the scores pass untouched.
    Beam search should use `length_penalty=0.0, early_stopping="never"`, since the CTC score already settles the
    length.

    Beam safety: transformers does not tell processors which beams survived. Either the model's `_reorder_cache` calls
    `reorder(beam_idx)`, or parents are found by comparing `input_ids` with the previous call's rows of the same
    utterance; both are exact. `input_ids` may start with a prompt or empty (`inputs_embeds`): the width at the first
    call is the prompt, the CTC hypothesis is what follows it up to EOS, and padding after EOS is ignored.

    Reuse: one processor belongs to one batch of audio. Another `generate` on the same audio may use it again (with any
    number of beams): when `input_ids` are no wider than the prompt was, the hypotheses start afresh. In all other cases
    call `reset()` in between. For other audio, build another processor.

    Args:
        scorer: made from the CTC log-probs of the B utterances, on the device of the model's logits.
        weight: share of CTC, 0 to 1.
        eos_token_id: the id or ids that end a hypothesis, as in `generate`.
        label_units: which token each CTC label is, or the chain of labels that spells each token; None if label ids are
            token ids. V may exceed the labels.
        num_candidates: with chains, tokens per row that are scored. A beam search picks from the best 2 K of a row.
        margin: with chains, tokens that must end this many nats below the most promising one of their row get -inf as
            soon as that is known, which spares most of the work. `math.inf` follows all chains to their end.
        parents: "auto" as described; "recompute" rebuilds every state from its tokens at each call, which is slow and
            serves as the reference.

    Raises:
        ValueError: an argument is out of range, or `label_units` do not fit the scorer.

    Source: Hori et al. (2017), "Joint CTC/attention decoding for end-to-end speech recognition", equation 14.
    """

    def __init__(
        self,
        scorer: CTCPrefixScorer,
        weight: float,
        eos_token_id: int | list[int] | Tensor,
        label_units: LabelUnits | LabelChains | None = None,
        *,
        num_candidates: int = NUM_CANDIDATES,
        margin: float = MARGIN_NATS,
        parents: Literal["auto", "recompute"] = "auto",
    ) -> None:
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight: expected 0 to 1 (share of the CTC score), got {weight}.")
        if num_candidates < 1:
            raise ValueError(f"num_candidates: expected at least 1 token per row, got {num_candidates}.")
        if not margin >= 0.0:
            raise ValueError(f"margin: expected 0 or more nats below the best token of a row, got {margin}.")
        if label_units is None:
            label_units = LabelUnits.identical(scorer.num_labels, scorer.num_labels, scorer.blank_id)
        if (label_units.num_labels, label_units.blank_id) != (scorer.num_labels, scorer.blank_id):
            raise ValueError(
                f"label_units: expected {scorer.num_labels} labels with blank {scorer.blank_id} like the scorer, got "
                f"{label_units.num_labels} with blank {label_units.blank_id}."
            )
        super().__init__(eos_token_id, parents, scorer.num_utterances, scorer.device)
        self.scorer = scorer
        self.weight = weight
        self.label_units = label_units.to(scorer.device)
        axis = torch.arange(scorer.num_labels, device=scorer.device)
        self._labels = axis[axis != scorer.blank_id]  # [U]
        self.num_candidates = num_candidates
        self.margin = margin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the joint scores [N, V].

        Args:
            input_ids: [N, W] prompt and generated tokens, rows grouped by utterance.
            scores: [N, V] logits or log-probs of the LLM.

        Raises:
            ValueError: N is not a multiple of the scorer's utterances, or the rows do not continue those of the
                previous call.
        """
        if self.weight == 0.0:
            return scores
        self._check_call(input_ids, scores)
        return self._mix(self._track(input_ids), scores)

    def _start(self, num_rows: int) -> HeardRows:
        state = self.scorer.init(num_rows // self.scorer.num_utterances)
        return HeardRows(state, torch.full_like(state.last_label, _NO_TOKEN))

    def _extend(self, rows: HeardRows, parent: Tensor, tokens: Tensor, num_tokens: Tensor) -> HeardRows:
        state, last_token = rows.ctc, rows.last_token[parent]
        for position, token in enumerate(tokens.unbind(1)):
            if isinstance(self.label_units, LabelUnits):
                labels = self.label_units.tokens_to_labels(token)[:, None]
            else:
                labels = self.label_units.spell(token, state.last_label[parent], last_token)  # N, M
            is_over = position >= num_tokens
            labels = labels.masked_fill(is_over[:, None], KEEP_LABEL)
            state = extend_by_chains(self.scorer, state, parent, labels)
            last_token = torch.where(is_over, last_token, token)
            parent = torch.arange(len(last_token), device=parent.device)
        return HeardRows(state, last_token)

    def _mix(self, rows: HeardRows, scores: Tensor) -> Tensor:
        state = rows.ctc
        psi = state.prefix_log_prob
        psi = psi.masked_fill(psi == -math.inf, 0.0)[:, None]  # impossible hypothesis: its continuations are -inf
        normaliser = torch.logsumexp(scores, dim=1, keepdim=True)
        if isinstance(self.label_units, LabelUnits):
            tokens, gain = self._label_gains(self.label_units, state, psi)
        else:
            tokens, gain = self._chain_gains(self.label_units, rows, psi, scores, normaliser)
        # An impossible hypothesis may still end.
        eos_gain = (self.scorer.eos(state)[:, None] - psi).clamp(min=LOG_PROB_FLOOR)

        # Divided by what is left of them, log-probs would hide from a beam search what the hypothesis has lost.
        offset = normaliser.clamp(min=0.0)
        token_scores = self._joint(scores.gather(1, tokens) - offset, gain)
        eos_scores = self._joint(scores[:, self.eos_token_ids] - offset, eos_gain)
        joint = torch.full_like(scores, -math.inf).scatter_(1, tokens, token_scores.to(scores.dtype))
        joint[:, self.eos_token_ids] = eos_scores.to(scores.dtype)

        is_stuck = ~(token_scores.isfinite().any(1) | eos_scores.isfinite().any(1))
        if bool(is_stuck.any()):
            joint[is_stuck] = (scores - offset)[is_stuck]
        return joint

    def _label_gains(self, units: LabelUnits, state: CTCPrefixState, psi: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of all scored labels and what CTC adds for them, psi(g.c) - psi(g): [N, U'] each."""
        gain, labels = self.scorer.score(state) - psi, self.scorer.labels
        if labels is not None:
            labels = labels.repeat_interleave(len(state) // labels.shape[0], 0)  # B, U' -> N, U'
            return units.labels_to_tokens(labels), gain
        tokens = units.labels_to_tokens(self._labels).expand(len(state), -1)
        return tokens, gain.index_select(1, self._labels)

    def _chain_gains(
        self, chains: LabelChains, rows: HeardRows, psi: Tensor, scores: Tensor, normaliser: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The candidate tokens of each row and what CTC adds for them: [N, C] each."""
        state = rows.ctc
        label_scores = score_labels(self.scorer, state)  # N, A
        promise = self._promise(chains, rows, label_scores - psi, scores, normaliser)  # N, V
        tokens = promise.topk(min(self.num_candidates, promise.shape[1]), dim=1, sorted=False).indices  # N, C

        labels = chains.spell(tokens, state.last_label[:, None], rows.last_token[:, None])  # N, C, M
        is_silent = labels[:, :, 0] == SILENT
        llm = scores.gather(1, tokens) - normaliser
        # The joint score is weight * (priority + gain).
        priority = torch.where(is_silent, llm, (1.0 - self.weight) * llm).masked_fill(llm == -math.inf, -math.inf)
        priority = priority / self.weight
        gain = score_chains(
            self.scorer, state, label_scores, labels, priority=priority, margin=self.margin / self.weight
        )
        return tokens, torch.where(is_silent, llm, gain - psi)

    def _promise(
        self, chains: LabelChains, rows: HeardRows, gain: Tensor, scores: Tensor, normaliser: Tensor
    ) -> Tensor:
        """[N, V] joint scores by the first label only, `gain` [N, A] in nats, up to a constant per row."""
        scores = scores[:, : chains.vocab_size]  # what is beyond cannot be spelled
        first = chains.first_labels(rows.ctc.last_label, rows.last_token)[:, : scores.shape[1]]  # N, V
        gain = torch.nn.functional.pad(self.weight * gain.to(scores.dtype), (0, 2), value=-math.inf)  # N, A+2
        promise = gain.gather(1, first).add_(scores, alpha=1.0 - self.weight)
        # A few hundred tokens may be silent. As elsewhere they get (1 - weight) * normaliser too much.
        silent = chains.silent_ids
        silent_scores = scores[:, silent] - self.weight * normaliser
        promise[:, silent] = torch.where(first[:, silent] == chains.num_labels + 1, silent_scores, promise[:, silent])
        return promise.masked_fill_(scores == -math.inf, -math.inf)  # NaN at weight 1

    def _joint(self, llm: Tensor, ctc_gain: Tensor) -> Tensor:
        joint = (1.0 - self.weight) * llm + self.weight * ctc_gain
        return joint.masked_fill(llm == -math.inf, -math.inf)  # weight 1 would make NaN of a forbidden token

    def _check_call(self, input_ids: Tensor, scores: Tensor) -> None:
        if input_ids.device != self.scorer.device or scores.device != self.scorer.device:
            raise ValueError(
                f"scorer: expected on the device of input_ids ({input_ids.device}) and scores ({scores.device}), got "
                f"{self.scorer.device}; move log_probs there before CTCPrefixScorer.from_log_probs."
            )
        num_rows, num_utterances = input_ids.shape[0], self.scorer.num_utterances
        if num_rows % num_utterances or scores.shape[0] != num_rows:
            raise ValueError(
                f"input_ids: expected beams * {num_utterances} rows for the scorer's {num_utterances} utterances, got "
                f"{num_rows} rows (scores: {scores.shape[0]}); build the scorer from the batch that generate gets."
            )
        vocab_size = scores.shape[1]
        self.label_units.check_vocab_size(vocab_size)
        self._check_eos(vocab_size)
