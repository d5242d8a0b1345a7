"""One entry of an N-best list, with the scores it was made of kept apart so that scales can be changed afterwards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hypothesis:
    """A transcript of one utterance. All scores are natural logs; those that were not computed are 0.

    Attributes:
        labels: output ids of the acoustic model, without blanks, prompt and end of sequence.
        text: the transcript, or None where the search knew labels only.
        am_log_prob: log-probability of the acoustic model, which may be CTC or an attention decoder such as Whisper
            (its end of sequence included).
        lm_log_prob: log-probability of the language model, its end of sequence included.
        prior_log_prob: log-probability of the prior, the acoustic model's own idea of language.
        num_tokens: tokens of the language model, end of sequence excluded.
        log_score: what the list is sorted by; `combined` says how it follows from the others.
    """

    labels: tuple[int, ...]
    text: str | None
    am_log_prob: float
    lm_log_prob: float = 0.0
    prior_log_prob: float = 0.0
    num_tokens: int = 0
    log_score: float = 0.0

    def combined(
        self,
        lm_weight: float = 0.0,
        prior_weight: float = 0.0,
        length_reward: float = 0.0,
        length_penalty: float = 0.0,
    ) -> float:
        """The log-linear score `am + lm_weight * lm - prior_weight * prior + length_reward * num_tokens`.

        Args:
            lm_weight: scale of `lm_log_prob`.
            prior_weight: scale of `prior_log_prob`, which is subtracted.
            length_reward: nats added per token.
            length_penalty: if not 0, the score is divided by `(num_tokens + 1) ** length_penalty`; the end of sequence
                counts here, so an empty hypothesis has length 1.

        Raises:
            ValueError: `length_penalty` is negative.
        """
        if length_penalty < 0.0:
            raise ValueError(f"length_penalty: expected 0 or more (0: no normalisation), got {length_penalty}.")
        score = self.am_log_prob + length_reward * self.num_tokens
        # A weight of 0 switches its model off, also where that model finds the text impossible: 0 * -inf is NaN.
        if lm_weight != 0.0:
            score += lm_weight * self.lm_log_prob
        if prior_weight != 0.0:
            score -= prior_weight * self.prior_log_prob
        return score / (self.num_tokens + 1) ** length_penalty
