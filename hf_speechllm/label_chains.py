"""LLM tokens that are spelled by chains of CTC labels: CTC over characters or sub-words of its own.

The language model keeps its own tokens, each worth a word or so, while the CTC head has few, well-trained labels. A
token c stands for a chain c_1 ... c_m of labels, and extends the CTC prefix g by all of them: psi(g.c_1...c_m).

Shape legend: B utterances, K hypotheses per utterance, N = B*K rows, C candidate tokens per row, A = U + 1 label axis
of the CTC output (U labels and the blank), V vocabulary of the LLM, M longest chain, P pairs of a state row and a
label.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .ctc_prefix_score import KEEP_LABEL, CTCPrefixScorer, CTCPrefixState
from .label_units import LabelUnits

SILENT = -1  # behind the last label of a chain, and all along the chain of a token that is not heard
UNSPELLABLE = -2  # all along the chain of a token that CTC labels cannot spell
MAX_CHAIN_LENGTH = 16

_NO_LABEL = -1  # `last_label` of a state before the first label
# Signs that are read aloud; all others (full stops, quotation marks, dashes, ...) are silent.
_SPOKEN_SIGNS = frozenset("$£€¥¢%‰&@#+=×÷±°§")
_OPENING_MARKS = frozenset("\"'([{<“‘„«¿¡")  # the space before them parts two words even if they stand in a token alone


@dataclass(frozen=True, eq=False)
class LabelChains:
    """The CTC labels that spell each token.

    Attributes:
        blank_id: position of the blank on the label axis.
        num_labels: A, blank included.
        chains: [V, M] integer labels of each token, -1 behind the last one. A row of -1 is a silent token, such as
            punctuation; a row of -2 a token that cannot be spelled, such as a special token.
        delimiter: label between words, for CTC over characters. A token that begins with it is spelled without it where
            no word precedes: at the start of the utterance and after another delimiter. None if every word, the first
            too, is trained with its space.
        word_chains: [V, M] labels of tokens between words, where each of them begins a word, with or without a space
            of its own: at the start of the utterance and after a token that `ends_word`. For sub-word labels of which
            the first of a word stands for its space too. None if tokens are spelled alike everywhere.
        ends_word: [V] bool, with `word_chains`: the tokens that end in a space or a mark.

    Raises:
        ValueError: chains have another shape or type, or a row that is no chain; a label is the blank or off the axis;
            `word_chains` and `ends_word` are not given together, or with a delimiter.
    """

    blank_id: int
    num_labels: int
    chains: Tensor
    delimiter: int | None = None
    word_chains: Tensor | None = None
    ends_word: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_table("chains", self.chains)
        self._check_words()
        if self.delimiter is not None and not self._is_label(self.delimiter):
            raise ValueError(
                f"delimiter: expected None or a label from 0 to {self.num_labels - 1} other than the blank "
                f"{self.blank_id}, got {self.delimiter}."
            )

    def _check_words(self) -> None:
        words, ends = self.word_chains, self.ends_word
        if (words is None) != (ends is None) or (words is not None and self.delimiter is not None):
            raise ValueError(
                "word_chains, ends_word: expected both of them, without a delimiter, or neither, got "
                f"word_chains={None if words is None else tuple(words.shape)}, "
                f"ends_word={None if ends is None else tuple(ends.shape)}, delimiter={self.delimiter}."
            )
        if words is None:
            return
        self._check_table("word_chains", words)
        if words.shape != self.chains.shape or ends.shape != words.shape[:1] or ends.dtype != torch.bool:
            raise ValueError(
                f"word_chains, ends_word: expected shape {tuple(self.chains.shape)} like chains and bool "
                f"({self.vocab_size},), got {tuple(words.shape)} and {ends.dtype} {tuple(ends.shape)}."
            )

    def _check_table(self, name: str, chains: Tensor) -> None:
        if chains.dim() != 2 or chains.shape[1] < 1 or chains.is_floating_point() or chains.dtype == torch.bool:
            raise ValueError(f"{name}: expected integers of shape (V, M), got {chains.dtype} {tuple(chains.shape)}.")
        is_wrong = (chains >= self.num_labels) | (chains < UNSPELLABLE) | (chains == self.blank_id)
        # Once a chain has ended it stays so, and unspellable is a token as a whole.
        is_wrong[:, 1:] |= torch.where(
            chains[:, :-1] < 0, chains[:, 1:] != chains[:, :-1], chains[:, 1:] == UNSPELLABLE
        )
        if bool(is_wrong.any()):
            token = int(is_wrong.any(1).int().argmax())
            raise ValueError(
                f"{name}: expected labels from 0 to {self.num_labels - 1} other than the blank {self.blank_id}, filled "
                f"up with {SILENT}, or {UNSPELLABLE} throughout, got {chains[token].tolist()} for token {token}."
            )

    def _is_label(self, label: int) -> bool:
        return 0 <= label < self.num_labels and label != self.blank_id

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.chains.shape[0]

    def to(self, device: torch.device) -> LabelChains:
        """Returns the same chains on `device`."""
        if self.chains.device == device:
            return self
        tensors = {
            name: None if table is None else table.to(device)
            for name, table in vars(self).items()
            if name in ("chains", "word_chains", "ends_word")
        }
        return replace(self, **tensors)

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raises ValueError if a token that can be spelled does not fit a vocabulary of this size."""
        if vocab_size < self.vocab_size and bool((self.chains[vocab_size:, 0] != UNSPELLABLE).any()):
            raise ValueError(
                f"vocab_size: expected {self.vocab_size} tokens as in chains, got {vocab_size}; build the chains with "
                "the tokenizer of this LLM."
            )

    def check_head(self, num_labels: int, blank_id: int) -> None:
        """Raises ValueError unless a speech LLM whose CTC head has these outputs can keep the chains."""
        if (self.num_labels, self.blank_id) != (num_labels, blank_id):
            raise ValueError(
                f"label_chains: expected {num_labels} labels with the blank at {blank_id} like the CTC head, got "
                f"{self.num_labels} with the blank at {self.blank_id}."
            )
        if self.word_chains is not None:
            raise ValueError(
                "label_chains: expected chains alone, with or without a delimiter, since a speech LLM keeps no "
                "word_chains; build them with subset_chains, character_chains or build_chains."
            )

    def spell(self, ids: Tensor, last_label: Tensor | None = None, last_token: Tensor | None = None) -> Tensor:
        """Labels of tokens: [...] to [..., M], filled up with -1; -2 where a token cannot be spelled.

        Args:
            ids: Tokens; negative ones are silent, those beyond the vocabulary cannot be spelled.
            last_label: [...] label that precedes each token, -1 at the start of an utterance; None: in mid-sentence.
            last_token: [...] token that precedes each token, -1 at the start; None: none that `ends_word`.
        """
        chains = self._look_up(self.chains, ids)
        if last_label is None or (self.delimiter is None and self.word_chains is None):
            return chains
        is_between = self._is_between_words(last_label, last_token)[..., None]
        if self.word_chains is not None:
            return torch.where(is_between, self._look_up(self.word_chains, ids), chains)
        is_dropped = is_between & (chains[..., :1] == self.delimiter)
        without = torch.nn.functional.pad(chains[..., 1:], (0, 1), value=SILENT)
        return torch.where(is_dropped, without, chains)

    def _look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        chains = table[ids.clamp(0, self.vocab_size - 1)].long()
        chains = chains.masked_fill((ids < 0)[..., None], SILENT)
        return chains.masked_fill((ids >= self.vocab_size)[..., None], UNSPELLABLE)

    def first_labels(self, last_label: Tensor, last_token: Tensor | None = None) -> Tensor:
        """[N, V] first label of every token after `last_label`, `last_token` [N]; A for unspellable and A + 1 for
        silent tokens."""
        in_sentence, between_words = self._first_labels
        if self.delimiter is None and self.word_chains is None:
            return in_sentence.expand(len(last_label), -1)
        return torch.where(self._is_between_words(last_label, last_token)[:, None], between_words, in_sentence)

    @cached_property
    def silent_ids(self) -> Tensor:
        """[S] tokens that are silent, always or between words."""
        return (self._first_labels[1] == self.num_labels + 1).nonzero().squeeze(1)

    @cached_property
    def _first_labels(self) -> tuple[Tensor, Tensor]:
        """[V] first label of each token in mid-sentence and between words; A and A + 1 as in `first_labels`."""
        ids = torch.arange(self.vocab_size, device=self.chains.device)
        in_sentence, between_words = self.spell(ids)[:, 0], self.spell(ids, torch.full_like(ids, _NO_LABEL))[:, 0]
        return in_sentence % (self.num_labels + 2), between_words % (self.num_labels + 2)

    def _is_between_words(self, last_label: Tensor, last_token: Tensor | None) -> Tensor:
        is_start = last_label == _NO_LABEL
        if self.delimiter is not None:
            return is_start | (last_label == self.delimiter)
        if last_token is None:
            return is_start
        is_token = (last_token >= 0) & (last_token < self.vocab_size)
        return is_start | (self.ends_word[last_token.clamp(0, self.vocab_size - 1)] & is_token)


def spell_transcripts(units: LabelUnits | LabelChains, tokens: Tensor) -> Tensor:
    """CTC labels of whole transcripts: [B, N] tokens, negative where there is none, to [B, N, M] labels.

    As of [`LabelChains.spell`], -1 fills up and -2 stands for a token that is not spelled.
    """
    is_text = tokens >= 0
    if isinstance(units, LabelChains):
        # No label precedes the first token; before the others stands a word, whichever.
        return units.spell(tokens, torch.where(is_text.cumsum(1) == 1, _NO_LABEL, units.blank_id))
    labels = units.tokens_to_labels(tokens)
    return labels.masked_fill(is_text & (labels < 0), UNSPELLABLE)[..., None]


def build_chains(
    tokenizer: PreTrainedTokenizerBase,
    spell: Callable[[str], list[int] | None],
    *,
    num_labels: int,
    blank_id: int,
    max_length: int = MAX_CHAIN_LENGTH,
    delimiter: int | None = None,
    silent_ids: Iterable[int] = (),
) -> LabelChains:
    """The chains of all tokens of a tokeniser.

    Args:
        tokenizer: That of the language model.
        spell: From the text of a token, leading space included, to its labels; an empty list if it is not heard, None
            if it cannot be spelled.
        num_labels: A, blank included.
        blank_id: Position of the blank on the label axis.
        max_length: Tokens with longer chains (rows of dashes, long identifiers) count as unspellable.
        delimiter: See [`LabelChains`].
        silent_ids: Special tokens that may occur in a transcript, such as Whisper's time stamps.

    Returns:
        Chains of V = len(tokenizer) tokens. Special and added tokens are unspellable, and so are pieces of characters
        (byte-level tokens that are no valid UTF-8 by themselves): their sound is known only once the last piece is.
        Text that the tokeniser spells in such pieces is thus out of reach; CTC labels in ASCII never need them.
    """
    silent = set(silent_ids)
    rows = [
        [] if index in silent else None if text is None else spell(text)
        for index, text in enumerate(token_texts(tokenizer))
    ]
    return LabelChains(blank_id, num_labels, chain_table(rows, max_length), delimiter)


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Text of every token; None for special and added tokens and for pieces of characters."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = [None if index in special else token_text(tokenizer, index) for index in range(len(tokenizer))]
    return [None if text is None or "\ufffd" in text else text for text in texts]


def chain_table(rows: Sequence[Sequence[int] | None], max_length: int) -> Tensor:
    """[V, M] int32, filled up as in `LabelChains`; None, and what is longer than `max_length`, is unspellable."""
    rows = [None if labels is None or len(labels) > max_length else labels for labels in rows]
    longest = max(1, *(len(labels or ()) for labels in rows))
    padded = [
        [UNSPELLABLE] * longest if labels is None else [*labels, *[SILENT] * (longest - len(labels))] for labels in rows
    ]
    return torch.tensor(padded, dtype=torch.int32)


def character_chains(
    tokenizer: PreTrainedTokenizerBase,
    characters: list[str],
    *,
    blank_id: int,
    delimiter: str | None = "|",
    ignore_case: bool = True,
    max_length: int = 24,
    silent_ids: Iterable[int] = (),
) -> LabelChains:
    """Chains for CTC over characters, such as Wav2Vec2's.

    Spaces become the delimiter. Punctuation that is not among the characters is silent. A token with another letter,
    digit or sign that is read aloud ("%", "$") cannot be spelled.

    Args:
        tokenizer: That of the language model.
        characters: Text of each label, A of them; longer entries ("<pad>", "<s>") stand for nothing that is heard.
        blank_id: Position of the blank among them.
        delimiter: The entry that stands between words, a space or another sign; None if there is none.
        ignore_case: Upper and lower case are spelled alike, unless `characters` have both.
        max_length: See [`build_chains`].
        silent_ids: See [`build_chains`].

    Raises:
        ValueError: `delimiter` is not among the characters.
    """
    if delimiter is not None and delimiter not in characters:
        raise ValueError(f"delimiter: expected one of the characters {characters}, or None, got {delimiter!r}.")
    space = None if delimiter is None else characters.index(delimiter)
    labels = {text: label for label, text in enumerate(characters) if len(text) == 1 and label not in (blank_id, space)}

    def label_of(character: str) -> int | None:
        cases = (character, character.lower(), character.upper()) if ignore_case else (character,)
        return next((labels[case] for case in cases if case in labels), None)

    def spell(text: str) -> list[int] | None:
        found: list[int] = []
        for character in text.replace("\u2019", "'"):
            label = space if character == " " else label_of(character)
            if label is not None:
                # One delimiter between words, however many spaces.
                found += [label] if label != space or found[-1:] != [space] else []
            elif character != " " and is_spoken(character):
                return None
        # The space of " -" or " ?" parts no words: the next word brings its own. That of ' "' or " (" does.
        is_mark = found == [space] and text.strip(" ") and text[-1] not in _OPENING_MARKS
        return [] if is_mark else found

    return build_chains(
        tokenizer,
        spell,
        num_labels=len(characters),
        blank_id=blank_id,
        max_length=max_length,
        delimiter=space,
        silent_ids=silent_ids,
    )


def is_spoken(character: str) -> bool:
    """Whether a character is read aloud: letters, vowel signs, digits, "$", "%" and the like; not punctuation."""
    return unicodedata.category(character)[0] in "LMN" or character in _SPOKEN_SIGNS


def score_labels(scorer: CTCPrefixScorer, state: CTCPrefixState) -> Tensor:
    """psi(g.c) of all labels: [N, A], whatever labels the scorer keeps; -inf for the blank and labels not kept."""
    psi = scorer.score(state)
    if scorer.labels is None:
        return psi
    labels = scorer.labels.repeat_interleave(len(state) // len(scorer.labels), 0)  # B, U' -> N, U'
    return psi.new_full((len(state), scorer.num_labels), -math.inf).scatter_(1, labels, psi)


def score_chains(
    scorer: CTCPrefixScorer,
    state: CTCPrefixState,
    label_scores: Tensor,
    chains: Tensor,
    *,
    priority: Tensor | float = 0.0,
    margin: float = math.inf,
) -> Tensor:
    """psi(g.c_1...c_m) of chains of labels: [N, C]; psi(g) where a chain is empty, -inf where it is -2 (unspellable).

    The chains of a row are a trie. Level by level, and in all rows at once, each of its inner nodes is one extension
    by `advance`, shared by all chains through it; the next labels are scored by a product over time, without extension.
    psi only falls along a chain, so chains that cannot come within a margin of the best one may be given up early.

    Args:
        scorer: Of B utterances.
        state: N hypotheses g.
        label_scores: [N, A] of this state, from `score_labels`.
        chains: [N, C, M] labels, filled up with -1.
        priority: [N, C] nats added to psi to compare the chains of a row.
        margin: Chains that fall this many nats below the best of their row, as far as it is known, get -inf.
    """
    lengths = (chains >= 0).sum(2)  # N, C
    first = chains[:, :, 0]
    psi = label_scores.gather(1, first.clamp(min=0))
    psi = torch.where(first == SILENT, state.prefix_log_prob[:, None], psi).masked_fill_(
        first == UNSPELLABLE, -math.inf
    )
    node = torch.arange(len(state), device=chains.device)[:, None].repeat(1, chains.shape[1])  # row of `state`
    for level in range(1, chains.shape[2]):
        # At this point psi is that of the first `level` labels.
        bound = psi + priority
        is_promising = (bound >= bound.amax(1, keepdim=True) - margin) & (psi > -math.inf)
        is_longer = lengths > level
        psi.masked_fill_(is_longer & ~is_promising, -math.inf)
        row, candidate = (is_longer & is_promising).nonzero().unbind(1)  # P
        if len(row) == 0:
            break
        labels = chains[row, candidate]  # P, M
        state, new_node = _extend(scorer, state, node[row, candidate], labels[:, level - 1])
        node[row, candidate] = new_node
        psi[row, candidate] = _score_pairs(scorer, state, new_node, labels[:, level])
    return psi


def extend_by_chains(scorer: CTCPrefixScorer, state: CTCPrefixState, parent: Tensor, chains: Tensor) -> CTCPrefixState:
    """The state of the hypotheses `parent[i] . chains[i]`: `CTCPrefixScorer.advance` by any number of labels.

    Args:
        scorer: Of B utterances.
        state: N hypotheses.
        parent: [N'] rows of `state`, as for `advance`.
        chains: [N', M] labels, filled up with negative numbers.
    """
    labels = chains.clamp(min=KEEP_LABEL)
    for level in range(max(1, int((labels >= 0).sum(1).max()))):  # without any label, parents are still to be picked
        state = scorer.advance(state, parent, labels[:, level])
        parent = torch.arange(len(state), device=parent.device)
    return state


def _extend(
    scorer: CTCPrefixScorer, state: CTCPrefixState, parent: Tensor, label: Tensor
) -> tuple[CTCPrefixState, Tensor]:
    """Extends rows `parent` [P] by `label` [P], equal pairs once; returns the state and the row of each pair."""
    num_utterances, num_beams = scorer.num_utterances, len(state) // scorer.num_utterances
    # Sorted by parent and therefore by utterance.
    pairs, pair_of = torch.unique(parent * scorer.num_labels + label, return_inverse=True)
    parents = torch.div(pairs, scorer.num_labels, rounding_mode="floor")
    utterance = torch.div(parents, num_beams, rounding_mode="floor")
    counts = torch.bincount(utterance, minlength=num_utterances)
    width = int(counts.max())
    rank = torch.arange(len(pairs), device=pairs.device) - (counts.cumsum(0) - counts)[utterance]
    row = utterance * width + rank
    # `advance` takes equally many rows of each utterance: copies of its first hypothesis fill up.
    padded_parent = torch.arange(num_utterances, device=pairs.device).mul_(num_beams).repeat_interleave(width)
    padded_label = torch.full_like(padded_parent, KEEP_LABEL)
    padded_parent[row], padded_label[row] = parents, pairs % scorer.num_labels
    return scorer.advance(state, padded_parent, padded_label), row[pair_of]


def _score_pairs(scorer: CTCPrefixScorer, state: CTCPrefixState, row: Tensor, label: Tensor) -> Tensor:
    """[P] psi of rows `row` [P] of `state` followed by `label` [P]."""
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=len(state))
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    table = row.new_full((len(state), int(counts.max())), _NO_LABEL)
    table[row, column] = label
    return scorer.score_candidates(state, table)[row, column]


def token_text(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """Text of one token with its leading space, which the decoders of sentencepiece tokenisers strip."""
    token = tokenizer.convert_ids_to_tokens(index)
    if token.startswith("▁"):
        return token.replace("▁", " ")
    return tokenizer.decode([index], clean_up_tokenization_spaces=False)
