"""Decoding options beyond those of transformers, and the modes that combine a CTC head with a language model.

llm             the language model hears, jointly with CTC where `ctc_weight` > 0
ctc_greedy      the best CTC path
ctc_beam        a beam search over CTC labels
rescoring       its N-best list, rescored by the language model
label_fusion    one pass, the language model scores each CTC label, which must be a token of it
delayed_fusion  one pass, the language model scores each word when it is complete, in its own tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .ctc_beam_search import ctc_beam_search
from .ctc_text import LabelsToText
from .hypothesis import Hypothesis
from .label_units import LabelUnits
from .lm_score import CausalLMScorer

FUSION_OF_MODE = {"ctc_beam": "none", "rescoring": "delayed", "label_fusion": "label", "delayed_fusion": "delayed"}
LabelsToTokens = Callable[[Sequence[int]], list[int]]
MODES = ("llm", "ctc_greedy", *FUSION_OF_MODE)
COMBINATIONS = ("rescoring", "label_fusion", "delayed_fusion")
# The modes that an option of `generate` has a part in; those that are not named here are for "llm".
_MODES_OF_OPTION = {
    "ctc_top_k": ("llm", "ctc_greedy"),
    "lm_weight": ("llm", *COMBINATIONS),
    "prior_weight": COMBINATIONS,
    "length_reward": COMBINATIONS,
    "ctc_beam_size": tuple(FUSION_OF_MODE),
    "fusion_interval": ("delayed_fusion",),
    "num_return_sequences": ("llm", *FUSION_OF_MODE),
    **dict.fromkeys(("mode", "return_dict_in_generate", "bos_token_id", "eos_token_id", "pad_token_id"), MODES),
}
# Trainer and pipelines of transformers give these to every model, whatever its mode.
_GIVEN_TO_ALL = ("max_length", "max_new_tokens", "num_beams")
# Values that ask for nothing, beside None, False and 0.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DecodingOptions:
    """How CTC and language model are combined.

    Attributes:
        mode: One of `MODES`.
        ctc_weight: Of mode `"llm"`: weight w of the CTC prefix score, 0 to 1: `(1-w) log p_LLM + w log p_CTC`.
        ctc_top_k: Of modes `"llm"` and `"ctc_greedy"`: CTC log-probabilities are computed a few frames at a time, and
            `"llm"` scores only so many labels per utterance, those with the highest peaks over time. For CTC over the
            whole vocabulary of a language model; `None`: all labels.
        lm_weight: Scale of the language model.
        prior_weight: Scale of the label prior, which is subtracted.
        length_reward: Nats per token of the language model.
        ctc_beam_size: Hypotheses kept per utterance.
        fusion_interval: Frames between two words' scorings of `"delayed_fusion"`; 1: each word when it is complete.

    Raises:
        ValueError: If an option is out of range.
    """

    mode: str = "llm"
    ctc_weight: float = 0.0
    ctc_top_k: int | None = None
    lm_weight: float = 0.0
    prior_weight: float = 0.0
    length_reward: float = 0.0
    ctc_beam_size: int = 16
    fusion_interval: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}.")
        for name in ("ctc_weight", "lm_weight", "prior_weight", "length_reward"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {value!r}.")
        if not 0.0 <= self.ctc_weight <= 1.0:
            raise ValueError(
                f"ctc_weight must lie between 0 (language model only) and 1 (CTC only), got {self.ctc_weight}."
            )
        for name in ("lm_weight", "prior_weight", "length_reward"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}.")
        for name in ("ctc_top_k", "ctc_beam_size", "fusion_interval"):
            value = getattr(self, name)
            if value is None and name == "ctc_top_k":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @property
    def searches_labels(self) -> bool:
        """Whether the mode is a beam search over CTC labels."""
        return self.mode in FUSION_OF_MODE

    @property
    def needs_text(self) -> bool:
        """Whether the language model reads the text of the labels, in its own tokens."""
        return FUSION_OF_MODE.get(self.mode) == "delayed"

    def search(
        self,
        ctc_log_probs: Tensor,
        lens: Tensor,
        blank_id: int,
        *,
        lm: CausalLMScorer | None = None,
        log_prior: Tensor | None = None,
        label_units: LabelUnits | None = None,
        labels_to_text: LabelsToText | None = None,
        n_best: int = 1,
    ) -> list[list[Hypothesis]]:
        """N-best lists of a batch by the beam search of the mode, which ignores what it has no use for.

        Args:
            ctc_log_probs: `[B, T, U+1]`.
            lens: `[B]` valid frames.
            blank_id: Position of the blank.
            lm: The language model; not for `"ctc_beam"`.
            log_prior: `[U+1]` log-probabilities of the labels.
            label_units: Token of each label, for `"label_fusion"`.
            labels_to_text: Spells labels; required for `"rescoring"` and `"delayed_fusion"`.
            n_best: Hypotheses wanted per utterance.
        """
        if self.mode == "ctc_beam":
            combined = {}
        else:
            combined = {
                "lm": lm,
                "lm_weight": self.lm_weight,
                "prior": log_prior,
                "prior_weight": self.prior_weight,
                "length_reward": self.length_reward,
            }
        if self.mode == "label_fusion":
            combined["label_units"] = label_units
        if self.needs_text:
            # No conversion before the end is rescoring.
            combined["interval"] = self.fusion_interval if self.mode == "delayed_fusion" else None
        return ctc_beam_search(
            ctc_log_probs,
            lens,
            blank_id=blank_id,
            beam_size=self.ctc_beam_size,
            fusion=FUSION_OF_MODE[self.mode],
            labels_to_text=labels_to_text,
            n_best=n_best,
            **combined,
        )


def has_part(option: str, mode: str) -> bool:
    """Whether an option of `generate`, of transformers or in [`DecodingOptions`], has a part in a mode."""
    return mode in _MODES_OF_OPTION.get(option, ("llm",))


def check_given_options(mode: str, given: Mapping[str, Any], has_lm: bool = False) -> None:
    """Refuses options that have no part in a mode. What Trainer and pipelines give to every model only gets a warning.

    Args:
        mode: One of `MODES`.
        given: Options of a call, those of transformers too; values that ask for nothing (`None`, `num_beams=1`) pass.
        has_lm: Whether there is another language model than the model's own.

    Raises:
        ValueError: If there is such an option; the message says which, and which modes take it.
    """
    for name, value in given.items():
        if value is None or (isinstance(value, Real) and value in (0, _NEUTRAL.get(name))):
            continue
        if mode == "llm" and name == "lm_weight" and not has_lm:
            raise ValueError(
                "lm_weight: in mode 'llm' it is the weight of another language model, and there is none; give lm=, "
                f"leave lm_weight out, or choose a mode of {COMBINATIONS}."
            )
        if has_part(name, mode):
            continue
        if name in _GIVEN_TO_ALL:
            logger.warning_once(f"{name}={value} has no part in mode {mode!r} and is passed over.")
            continue
        modes = tuple(other for other in MODES if has_part(name, other))
        raise ValueError(f"{name}: it has no part in mode {mode!r}; leave it out, or choose a mode of {modes}.")


def pad_hypotheses(
    nbests: list[list[Hypothesis]], labels_to_tokens: LabelsToTokens, n_best: int, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Tokens `[B * n_best, N]` and scores `[B * n_best]`; a list that is shorter is filled up with empty hypotheses.

    Args:
        nbests: Per utterance, best first.
        labels_to_tokens: Tokens of the language model for the labels of a hypothesis.
        n_best: Hypotheses per utterance.
        pad_token_id: Fills up the tokens on the right.
    """
    rows, scores = [], []
    for utterance in nbests:
        for index in range(n_best):
            rows.append(labels_to_tokens(utterance[index].labels) if index < len(utterance) else [])
            scores.append(utterance[index].log_score if index < len(utterance) else -torch.inf)
    return pad_tokens(rows, pad_token_id), torch.tensor(scores)


def pad_tokens(rows: Sequence[Sequence[int]], pad_token_id: int) -> Tensor:
    """`[len(rows), N]`, filled up with `pad_token_id` on the right."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad_token_id)
