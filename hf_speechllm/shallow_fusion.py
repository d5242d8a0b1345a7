"""Shallow fusion in transformers' `generate`: an external language model scores every step of any model with the same
vocabulary, and the model's own idea of language may be taken off.

Shape legend: N rows (utterances times beams), W width of `input_ids`, M generated tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from .lm_score import CausalLMScorer, LMState
from .row_tracking import RowTrackingProcessor


class ShallowFusionLogitsProcessor(RowTrackingProcessor[tuple[LMState, ...]]):
    """Adds language-model log-probs to the next-token scores of any `generate` (greedy, sampling, beam search).

    Token c after hypothesis g scores

        log p(c) + weight * log p_LM(c | g) - prior_weight * log p_prior(c | g)

    where p is the model that generates. An EOS of `generate` is scored by the EOS of the language model, which may be
    another token (a base model beside a chat model).

    Takes log-probs, as beam search hands them, and adds to them; logits, as greedy search and sampling do, where a
    constant per row changes nothing; or the log-scores of another processor. What that one set to -inf stays -inf.
    Nothing is normalised: joint scores that sum to less than 1 say how far LLM and CTC disagree about a hypothesis, and
    the search must see that. With both weights 0 the scores pass untouched.

    Beam safety: transformers does not tell processors which beams survived. Either the model's `_reorder_cache` calls
    `reorder(beam_idx)`, or parents are found by comparing `input_ids` with the previous call's rows; both are exact,
    since the state of a language model depends on the tokens only. `input_ids` may start with a prompt or empty
    (`inputs_embeds`): the width at the first call is the prompt of the model that generates, which the language model
    never sees (it has its own, `CausalLMScorer(prompt=...)`). Its hypothesis is what follows up to EOS, and padding
    after EOS is ignored.

    Reuse: when `input_ids` are no wider than the prompt was, the hypotheses start afresh; in all other cases call
    `reset()` before another `generate`.

    Args:
        lm: the external language model; its ids mean the same tokens. Vocabularies are often padded: its own may be
            longer.
        weight: scale of the language model, 0 or more.
        prior: what is subtracted: log-probs per token [V], or a language model that estimates the internal one (such
            as the decoder of the model without its audio). None: nothing.
        prior_weight: scale of `prior`, 0 or more.
        eos_token_id: the id or ids that end a hypothesis, as in `generate`.
        parents: "auto" as described; "recompute" rebuilds every state from its tokens at each call, which is slow and
            serves as the reference.

    Raises:
        ValueError: an argument is out of range, `prior` is missing or not finite.

    Source: Gulcehre et al. (2015), "On using monolingual corpora in neural machine translation", equation 5; McDermott
    et al. (2019), "A density ratio approach to language model fusion", for the prior.
    """

    def __init__(
        self,
        lm: CausalLMScorer,
        weight: float,
        *,
        prior: Tensor | CausalLMScorer | None = None,
        prior_weight: float = 0.0,
        eos_token_id: int | list[int] | Tensor,
        parents: Literal["auto", "recompute"] = "auto",
    ) -> None:
        for name, value in (("weight", weight), ("prior_weight", prior_weight)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}.")
        if prior is None and prior_weight != 0.0:
            raise ValueError(f"prior: expected log-probs or a scorer for prior_weight {prior_weight}, got None.")
        if isinstance(prior, Tensor) and not (prior.dim() == 1 and bool(prior.isfinite().all())):
            raise ValueError(
                f"prior: expected finite log-probs [V], got shape {tuple(prior.shape)} with "
                f"{int((~prior.isfinite()).sum())} values that are not finite; smooth the counts it was made of."
            )
        super().__init__(eos_token_id, parents)
        self.lm = lm
        self.weight = weight
        self.prior = prior
        self.prior_weight = prior_weight
        terms: list[tuple[CausalLMScorer, float]] = [(lm, weight)]
        if isinstance(prior, CausalLMScorer):
            terms.append((prior, -prior_weight))
        # A model whose weight is 0 does not run.
        self._scorers = tuple((scorer, scale) for scorer, scale in terms if scale != 0.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the fused scores [N, V].

        Args:
            input_ids: [N, W] prompt and generated tokens.
            scores: [N, V] logits, log-probs or log-scores of the model that generates.

        Raises:
            ValueError: the vocabularies do not fit, or the rows do not continue those of the previous call.
        """
        if self.weight == 0.0 and self.prior_weight == 0.0:
            return scores
        self._check_vocabulary(scores.shape[1])
        return self._fuse(self._track(input_ids), scores)

    def _start(self, num_rows: int) -> tuple[LMState, ...]:
        return tuple(scorer.start(num_rows) for scorer, _ in self._scorers)

    def _extend(
        self, state: tuple[LMState, ...], parent: Tensor, tokens: Tensor, num_tokens: Tensor
    ) -> tuple[LMState, ...]:
        return tuple(
            scorer.advance(one, parent, tokens, num_tokens)
            for (scorer, _), one in zip(self._scorers, state, strict=True)
        )

    def _fuse(self, states: tuple[LMState, ...], scores: Tensor) -> Tensor:
        fused = scores.float()
        eos_token_ids = self.eos_token_ids.to(scores.device)
        for (scorer, scale), state in zip(self._scorers, states, strict=True):
            log_probs = state.next_log_probs.to(scores.device)
            eos_log_prob = log_probs[:, scorer.eos_token_id, None].expand(-1, len(eos_token_ids))
            log_probs = log_probs[:, : scores.shape[1]].index_copy(1, eos_token_ids, eos_log_prob)
            fused = fused + scale * log_probs
        if isinstance(self.prior, Tensor) and self.prior_weight != 0.0:
            fused = fused - self.prior_weight * self.prior.to(fused)
        # Forbidden tokens stay so, whatever a language model that excludes them too would make of it.
        return fused.masked_fill(scores == -math.inf, -math.inf).to(scores.dtype)

    def _check_vocabulary(self, vocab_size: int) -> None:
        self._check_eos(vocab_size)
        for name, scorer in (("lm", self.lm), ("prior", self.prior)):
            if isinstance(scorer, CausalLMScorer) and scorer.vocab_size < vocab_size:
                raise ValueError(
                    f"{name}: expected a vocabulary of at least the {vocab_size} tokens that are generated, got "
                    f"{scorer.vocab_size}; if only padding is missing, call its model.resize_token_embeddings."
                )
        if isinstance(self.prior, Tensor) and len(self.prior) != vocab_size:
            raise ValueError(f"prior: expected {vocab_size} log-probs, one per token, got {len(self.prior)}.")
