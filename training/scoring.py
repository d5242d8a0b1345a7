"""Word alignment, error counts and signs of hallucination, per utterance and for a whole system.

U reference words, V hypothesis words. Two ways of counting, by name:

- `whisper`: texts after Whisper's English normaliser, plain edit distance (the usual WER);
- `leaderboard`: texts after the Open ASR Leaderboard's normaliser (`training/leaderboard.py`), and words that differ
  only by being written together or apart ("white paper", "whitepaper") are correct, as in `kaldialign` with
  `merge_compounds=True`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from hf_speechllm.metrics import Normalizer, bootstrap_rate_interval, character_errors, normalize_english

MIN_INSERTION_RUN = 3  # words in a row that nobody said; one or two are usually a split word or a filler
MIN_LOOP_REPEATS = 3
MAX_LOOP_NGRAM = 8


@dataclass(frozen=True)
class Edit:
    """One step of an alignment: `kind` is "equal", "substitute", "delete" or "insert"; the absent side is empty.

    A compound has several words on one side, joined by spaces.
    """

    kind: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class UtteranceScore:
    """Alignment of an utterance with its counts of words."""

    edits: tuple[Edit, ...]
    reference_words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class Hallucination:
    """What a recogniser made up: words in runs of insertions, repeats of a loop, words where nothing was said."""

    inserted_run_words: int
    loop_repeats: int
    words_on_silence: int

    def __bool__(self) -> bool:
        return bool(self.inserted_run_words or self.loop_repeats or self.words_on_silence)


@dataclass(frozen=True)
class SystemScore:
    """A system on a data set: per utterance, in the order of the data set, and `figures` for all of it.

    `whisper` and `leaderboard` hold one score per utterance, `hallucinations` one entry per utterance.
    """

    whisper: tuple[UtteranceScore, ...]
    leaderboard: tuple[UtteranceScore, ...]
    hallucinations: tuple[Hallucination, ...]
    figures: dict[str, float | int | None]


def align(reference: Sequence[str], hypothesis: Sequence[str], merge_compounds: bool = False) -> tuple[Edit, ...]:
    """The alignment with the fewest errors; among these, one with the most correct words.

    Args:
        reference: U words.
        hypothesis: V words.
        merge_compounds: adjacent words of one side whose concatenation is one word of the other are correct.

    Returns:
        Edits from the first word to the last; their numbers of words add up to U and V.
    """
    scale = len(reference) + 1  # an error outweighs any number of correct words
    # cost[u][v]: errors * scale - correct words, of the first u and v words; step[u][v]: words consumed last.
    cost = [[v * scale for v in range(len(hypothesis) + 1)]]
    step = [[(0, 1)] * (len(hypothesis) + 1)]
    for u in range(1, len(reference) + 1):
        cost.append([u * scale])
        step.append([(1, 0)])
        for v in range(1, len(hypothesis) + 1):
            equal = reference[u - 1] == hypothesis[v - 1]
            candidates = [
                (cost[u - 1][v - 1] + (-1 if equal else scale), (1, 1)),
                (cost[u - 1][v] + scale, (1, 0)),
                (cost[u][v - 1] + scale, (0, 1)),
            ]
            if merge_compounds and not equal:
                joined = _words_that_join(reference, u, hypothesis[v - 1])
                if joined:
                    candidates.append((cost[u - joined][v - 1] - joined, (joined, 1)))
                joined = _words_that_join(hypothesis, v, reference[u - 1])
                if joined:
                    candidates.append((cost[u - 1][v - joined] - 1, (1, joined)))
            best, words = min(candidates, key=lambda candidate: candidate[0])
            cost[u].append(best)
            step[u].append(words)
    edits = []
    u, v = len(reference), len(hypothesis)
    while u or v:
        from_reference, from_hypothesis = step[u][v]
        edits.append(_edit(reference[u - from_reference : u], hypothesis[v - from_hypothesis : v]))
        u, v = u - from_reference, v - from_hypothesis
    return tuple(reversed(edits))


def _words_that_join(words: Sequence[str], end: int, compound: str) -> int:
    """How many words before `end` make up `compound`, at least two; 0 for none."""
    rest = compound
    for count in range(1, end + 1):
        word = words[end - count]
        if not rest.endswith(word):
            return 0
        rest = rest[: len(rest) - len(word)]
        if not rest:
            return count if count > 1 else 0
    return 0


def _edit(reference: Sequence[str], hypothesis: Sequence[str]) -> Edit:
    kind = "equal" if "".join(reference) == "".join(hypothesis) else "substitute"
    kind = "insert" if not reference else "delete" if not hypothesis else kind
    return Edit(kind, " ".join(reference), " ".join(hypothesis))


def score_utterance(reference: str, hypothesis: str, merge_compounds: bool = False) -> UtteranceScore:
    """Alignment and counts of normalised texts; see [`align`]."""
    words = reference.split()
    edits = align(words, hypothesis.split(), merge_compounds)
    kinds = [edit.kind for edit in edits]
    return UtteranceScore(edits, len(words), kinds.count("substitute"), kinds.count("delete"), kinds.count("insert"))


def loop_repeats(words: Sequence[str]) -> int:
    """The largest number of times that up to 8 words in a row are said in a row; 1 without repetition, 0 for none."""
    longest = 1 if words else 0
    for size in range(1, min(MAX_LOOP_NGRAM, len(words) // 2) + 1):
        matches = 0  # words in a row that equal the one `size` before
        for position in range(size, len(words)):
            matches = matches + 1 if words[position] == words[position - size] else 0
            longest = max(longest, 1 + matches // size)
    return longest


def find_hallucination(score: UtteranceScore) -> Hallucination:
    """Runs of at least 3 inserted words, loops (3 repeats or more, and more than were said), words on silence."""
    runs = [len(list(run)) for kind, run in groupby(edit.kind for edit in score.edits) if kind == "insert"]
    hypothesis = " ".join(edit.hypothesis for edit in score.edits).split()
    reference = " ".join(edit.reference for edit in score.edits).split()
    repeats = loop_repeats(hypothesis)
    is_loop = repeats >= MIN_LOOP_REPEATS and repeats > loop_repeats(reference)
    return Hallucination(
        inserted_run_words=sum(run for run in runs if run >= MIN_INSERTION_RUN),
        loop_repeats=repeats if is_loop else 0,
        words_on_silence=0 if reference else len(hypothesis),
    )


def score_system(
    references: Sequence[str], hypotheses: Sequence[str], leaderboard_normalizer: Normalizer
) -> SystemScore:
    """Score raw texts by both ways of counting.

    `figures`: `wer`, `wer_low`, `wer_high`, `cer`, `substitutions`, `deletions`, `insertions` (Whisper's normaliser),
    `leaderboard_wer`, `leaderboard_wer_low`, `leaderboard_wer_high`, all in percent of the reference words or
    characters and None where there is not one reference word; `reference_words`, `utterances`; `hallucinations`
    (utterances with any of the three signs), `inserted_run_words`, `loops` (utterances), `silence_outputs`
    (utterances without a reference that got a text) and `silence_utterances`.

    Raises:
        ValueError: different numbers of references and hypotheses.
        ImportError: jiwer or whisper-normalizer is not installed.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"hypotheses: expected one per reference ({len(references)}), got {len(hypotheses)}")
    plain = [[normalize_english(text).strip() for text in texts] for texts in (references, hypotheses)]
    ruled = [[leaderboard_normalizer(text).strip() for text in texts] for texts in (references, hypotheses)]
    whisper = tuple(map(score_utterance, *plain))
    leaderboard = tuple(score_utterance(*pair, merge_compounds=True) for pair in zip(*ruled, strict=True))
    hallucinations = tuple(map(find_hallucination, whisper))
    words = sum(score.reference_words for score in whisper)
    characters = character_errors(*plain)
    figures: dict[str, float | int | None] = {
        **_rates("", whisper),
        "cer": 100 * characters.errors / characters.reference_characters if words else None,
    }
    for name in ("substitutions", "deletions", "insertions"):
        figures[name] = 100 * sum(getattr(score, name) for score in whisper) / words if words else None
    figures |= _rates("leaderboard_", leaderboard)
    figures |= {
        "reference_words": words,
        "utterances": len(whisper),
        "hallucinations": sum(map(bool, hallucinations)),
        "inserted_run_words": sum(sign.inserted_run_words for sign in hallucinations),
        "loops": sum(sign.loop_repeats > 0 for sign in hallucinations),
        "silence_outputs": sum(sign.words_on_silence > 0 for sign in hallucinations),
        "silence_utterances": sum(score.reference_words == 0 for score in whisper),
    }
    return SystemScore(whisper, leaderboard, hallucinations, figures)


def counts(scores: Sequence[UtteranceScore]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and reference words, two int64 arrays with one entry per utterance."""
    pairs = np.array([(score.errors, score.reference_words) for score in scores], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _rates(prefix: str, scores: Sequence[UtteranceScore]) -> dict[str, float | int | None]:
    errors, words = counts(scores)
    if not words.sum():
        return {f"{prefix}wer": None, f"{prefix}wer_low": None, f"{prefix}wer_high": None}
    low, high = bootstrap_rate_interval(errors, words)
    rate = float(errors.sum() / words.sum())
    return {f"{prefix}wer": 100 * rate, f"{prefix}wer_low": 100 * low, f"{prefix}wer_high": 100 * high}
