"""Combination of a CTC head with a language model by shallow fusion: modes of `generate` that search CTC labels.

ctc_beam        the CTC head alone
rescoring       its N-best list, rescored by the language model
label_fusion    one pass, the language model scores each CTC label, which must be a token of it
delayed_fusion  one pass, the language model scores each word when it is complete, in its own tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ctc_beam_search import ctc_beam_search
from .ctc_text import LabelsToText
from .hypothesis import Hypothesis
from .label_units import LabelUnits
from .lm_score import CausalLMScorer

FUSION_OF_MODE = {"ctc_beam": "none", "rescoring": "delayed", "label_fusion": "label", "delayed_fusion": "delayed"}


@dataclass(frozen=True)
class SearchOptions:
    """How CTC and language model are combined; all are options of `generate`.

    Attributes:
        mode: One of `FUSION_OF_MODE`.
        ctc_beam_size: Hypotheses kept per utterance.
        lm_weight: Scale of the language model.
        prior_weight: Scale of the label prior, which is subtracted.
        length_reward: Nats per token of the language model.
        fusion_interval: Frames between two words' scorings of `delayed_fusion`; 1: each word when it is complete.
        n_best: Hypotheses to return per utterance.
    """

    mode: str
    ctc_beam_size: int
    lm_weight: float
    prior_weight: float
    length_reward: float
    fusion_interval: int
    n_best: int

    @property
    def fusion(self) -> str:
        return FUSION_OF_MODE[self.mode]

    @property
    def interval(self) -> int | None:
        """What `ctc_beam_search` takes: no conversion before the end is rescoring."""
        if self.mode == "rescoring":
            return None
        return self.fusion_interval if self.mode == "delayed_fusion" else 1


def search_ctc(
    ctc_log_probs: Tensor,
    lens: Tensor,
    blank_id: int,
    log_prior: Tensor,
    lm: CausalLMScorer | None,
    options: SearchOptions,
    label_units: LabelUnits | None,
    labels_to_text: LabelsToText | None,
) -> list[list[Hypothesis]]:
    """N-best lists of a batch.

    Args:
        ctc_log_probs: `[B, T, U+1]`.
        lens: `[B]` valid frames.
        blank_id: Position of the blank.
        log_prior: `[U+1]` log-probabilities of the labels.
        lm: The language model; for `ctc_beam` it is not used.
        options: Mode and scales.
        label_units: Token of each label, for `label_fusion`.
        labels_to_text: Spells labels; for `rescoring` and `delayed_fusion` required.
    """
    uses_lm = options.mode != "ctc_beam"
    return ctc_beam_search(
        ctc_log_probs,
        lens,
        blank_id=blank_id,
        beam_size=options.ctc_beam_size,
        lm=lm if uses_lm else None,
        lm_weight=options.lm_weight if uses_lm else 0.0,
        fusion=options.fusion,
        interval=options.interval,
        label_units=label_units if options.mode == "label_fusion" else None,
        labels_to_text=labels_to_text,
        prior=log_prior,
        prior_weight=options.prior_weight if uses_lm else 0.0,
        length_reward=options.length_reward if uses_lm else 0.0,
        n_best=options.n_best,
    )


def pad_hypotheses(
    nbests: list[list[Hypothesis]], label_to_token: Tensor, n_best: int, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Tokens `[B * n_best, N]` and scores `[B * n_best]`; a list that is shorter is filled up with empty hypotheses.

    Args:
        nbests: Per utterance, best first.
        label_to_token: `[U+1]` token of each label.
        n_best: Hypotheses per utterance.
        pad_token_id: Fills up the tokens on the right.
    """
    rows, scores = [], []
    for utterance in nbests:
        for index in range(n_best):
            labels = utterance[index].labels if index < len(utterance) else ()
            rows.append(label_to_token[torch.tensor(labels, dtype=torch.long, device=label_to_token.device)])
            scores.append(utterance[index].log_score if index < len(utterance) else -torch.inf)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return tokens, torch.tensor(scores, device=tokens.device)
