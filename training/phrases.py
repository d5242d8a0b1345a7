"""Everyday phrases from templates: digits, phone numbers, times, dates, amounts, spelled letters, names, requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from training.numbers_to_words import digit_words, number_words, ordinal_words, year_words

Phrase = tuple[str, str]  # what to read aloud, what to write

QUESTION_WORDS = {"can", "what", "how", "where", "do", "could", "is", "who", "when", "what's"}


def read_lists(path: Path) -> dict[str, tuple[str, ...]]:
    """Sections `[name]` of items that are separated by | or line ends; lines that start with # are comments."""
    lists: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("[") and line.endswith("]"):
            section = lists.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            section += line.split("|")
    return {name: tuple(items) for name, items in lists.items()}


LISTS = read_lists(Path(__file__).with_suffix(".txt"))
# How to read each letter so that every synthesiser says its name.
LETTER_NAMES = dict(zip("abcdefghijklmnopqrstuvwxyz", LISTS["letters"], strict=True))


def generate_phrase(rng: np.random.Generator) -> Phrase:
    """A random phrase as (spoken with punctuation, target text)."""
    kinds = tuple(_KINDS)
    weights = np.array([_KINDS[kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    return kind(rng)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _plain(spoken: str) -> Phrase:
    words = "".join(c if c.isalpha() or c in "' " else " " for c in spoken.lower()).split()
    return spoken[0].upper() + spoken[1:], " ".join(words)


def _digits(rng: np.random.Generator) -> str:
    zero = "oh" if rng.random() < 0.3 else "zero"
    words = digit_words("".join(map(str, rng.integers(0, 10, int(rng.integers(1, 11))))), zero).split()
    group = int(rng.integers(2, 5))
    return ", ".join(" ".join(words[i : i + group]) for i in range(0, len(words), group))


def _phone(rng: np.random.Generator) -> str:
    number = "".join(map(str, rng.integers(0, 10, 10)))
    parts = (number[:3], number[3:6], number[6:]) if rng.random() < 0.7 else (number[:3], number[3:7])
    return ", ".join(digit_words(part, "oh" if rng.random() < 0.3 else "zero") for part in parts)


def _number(rng: np.random.Generator) -> str:
    return number_words(int(rng.integers(0, 10 ** int(rng.integers(1, 7)))))


def _decimal(rng: np.random.Generator) -> str:
    tail = "".join(map(str, rng.integers(0, 10, int(rng.integers(1, 4)))))
    unit = _pick(rng, ("percent", "degrees", "miles", "kilometers", "pounds", "inches", "seconds", "liters", ""))
    return f"{number_words(int(rng.integers(0, 200)))} point {digit_words(tail)} {unit}".strip()


def _time(rng: np.random.Generator) -> str:
    hour, minute = int(rng.integers(1, 13)), int(rng.integers(60))
    half_day = _pick(rng, ("", " in the morning", " in the evening", " in the afternoon", " at night"))
    kind = rng.random()
    if kind < 0.2:
        return f"{number_words(hour)} o'clock{half_day}"
    if kind < 0.4:
        words = _pick(rng, ("half past", "quarter past", "quarter to", "ten to", "five past", "twenty past"))
        return f"{words} {number_words(hour)}{half_day}"
    minutes = f"oh {number_words(minute)}" if 0 < minute < 10 else number_words(minute) if minute else ""
    return f"{number_words(hour)} {minutes}".strip() + half_day


def _date(rng: np.random.Generator) -> str:
    month, day = _pick(rng, LISTS["months"]), ordinal_words(int(rng.integers(1, 32)))
    date = f"{month} {day}" if rng.random() < 0.6 else f"the {day} of {month}"
    return f"{date}, {_year(rng)}" if rng.random() < 0.4 else date


def _year(rng: np.random.Generator) -> str:
    return year_words(int(rng.integers(1850, 2031)))


def _amount(rng: np.random.Generator) -> str:
    whole = int(rng.integers(1, 10 ** int(rng.integers(1, 6))))
    currency = _pick(rng, ("dollar", "euro", "pound"))
    amount = f"{number_words(whole)} {currency}{'' if whole == 1 else 's'}"
    return f"{amount} and {number_words(int(rng.integers(2, 100)))} cents" if rng.random() < 0.4 else amount


def _name(rng: np.random.Generator) -> str:
    first, last = _pick(rng, LISTS["first_names"]), _pick(rng, LISTS["last_names"])
    return _pick(rng, (first, f"{first} {last}", f"{_pick(rng, ('Mister', 'Miss', 'Doctor'))} {last}"))


def _fill(rng: np.random.Generator, template: str) -> str:
    fillers: dict[str, Callable[[], str]] = {
        "{on_off}": lambda: _pick(rng, ("on", "off")),
        "{thing}": lambda: _pick(rng, LISTS["things"]),
        "{adjective}": lambda: _pick(rng, LISTS["adjectives"]),
        "{verb}": lambda: _pick(rng, LISTS["verbs"]),
        "{name}": lambda: _name(rng),
        "{place}": lambda: _pick(rng, LISTS["places"]),
        "{day}": lambda: _pick(rng, LISTS["days"]),
        "{number}": lambda: number_words(int(rng.integers(2, 100))),
        "{digits}": lambda: _digits(rng),
        "{time}": lambda: _time(rng),
        "{date}": lambda: _date(rng),
        "{year}": lambda: _year(rng),
        "{amount}": lambda: _amount(rng),
    }
    for slot, fill in fillers.items():
        while slot in template:
            template = template.replace(slot, fill(), 1)
    return template


def _one_of(*makers: Callable[[np.random.Generator], str]) -> Callable[[np.random.Generator], Phrase]:
    def make(rng: np.random.Generator) -> Phrase:
        return _plain(makers[int(rng.integers(len(makers)))](rng) + ".")

    return make


def _request(rng: np.random.Generator) -> Phrase:
    template = _pick(rng, LISTS["requests"])
    question = template.split()[0].lower() in QUESTION_WORDS
    return _plain(_fill(rng, template) + ("?" if question else "."))


def _statement(rng: np.random.Generator) -> Phrase:
    return _plain(_fill(rng, _pick(rng, LISTS["statements"])) + ".")


def _reply(rng: np.random.Generator) -> Phrase:
    return _plain(_pick(rng, LISTS["short_replies"]) + _pick(rng, (".", ".", "!")))


def _spelling(rng: np.random.Generator) -> Phrase:
    letters = (
        _pick(rng, LISTS["last_names"]).lower()
        if rng.random() < 0.4
        else "".join(chr(97 + i) for i in rng.integers(0, 26, int(rng.integers(1, 7))))
    )
    digits = "".join(map(str, rng.integers(0, 10, int(rng.integers(0, 4))))) if rng.random() < 0.3 else ""
    spoken = ", ".join(LETTER_NAMES[letter] for letter in letters)
    text = " ".join(letters)
    if digits:
        spoken, text = f"{spoken}, {digit_words(digits)}", f"{text} {digit_words(digits)}"
    return spoken.replace("doubleyou", "double you") + ".", text


def _words(rng: np.random.Generator) -> Phrase:
    pools = (LISTS["things"], LISTS["adjectives"], LISTS["verbs"], LISTS["places"], LISTS["first_names"])
    kind = rng.random()
    if kind < 0.4:
        return _plain(f"the {_pick(rng, LISTS['adjectives'])} {_pick(rng, LISTS['things'])}.")
    count = int(rng.integers(1, 5))
    return _plain(", ".join(_pick(rng, pools[int(rng.integers(len(pools)))]) for _ in range(count)) + ".")


def _address(rng: np.random.Generator) -> str:
    street = f"{_pick(rng, LISTS['last_names'])} {_pick(rng, ('Street', 'Road', 'Avenue', 'Lane', 'Drive'))}"
    return f"{number_words(int(rng.integers(1, 1000)))} {street}, {_pick(rng, LISTS['places'])}"


# Kind of phrase -> how often it is drawn.
_KINDS: dict[Callable[[np.random.Generator], Phrase], float] = {
    _one_of(_digits, _phone): 10,
    _one_of(_number, _decimal, _amount): 10,
    _one_of(_time, _date): 8,
    _one_of(_name, _address): 8,
    _spelling: 6,
    _words: 12,
    _reply: 8,
    _request: 20,
    _statement: 18,
}
