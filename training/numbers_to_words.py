"""Numbers as English words, the way people read them aloud."""

from __future__ import annotations

import re

# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)
# fmt: on
_SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"))
_IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}

_DATE = re.compile(r"\b(" + "|".join(_MONTHS) + r") (\d{1,2})\b(?!,?\d)")
_MONEY = re.compile(r"\$(\d[\d,]*)(?:\.(\d\d))?(?! ?(?:million|billion|trillion|thousand|hundred))\b")
_BIG_MONEY = re.compile(r"\$(\d[\d,]*(?:\.\d+)?) ?(million|billion|trillion|thousand|hundred)")
_PERCENT = re.compile(r"(\d)\s?%")
_ORDINAL = re.compile(r"\b(\d[\d,]*)(?:st|nd|rd|th)\b")
_DECADE = re.compile(r"\b(1[1-9]|20)(\d)0's?\b|\b(1[1-9]|20)(\d)0s\b")
_DECIMAL = re.compile(r"\b(\d[\d,]*)\.(\d+)\b")
_YEAR = re.compile(r"\b(1[1-9]\d\d|20[0-3]\d)\b(?!,\d)")
_NUMBER = re.compile(r"\b\d{1,3}(?:,\d{3})+\b|\b\d+\b")


def number_words(number: int) -> str:
    """Cardinal: 1205 -> "one thousand two hundred five" (American, without "and"); 0 <= number < 10**12."""
    if not 0 <= number < 10**12:
        raise ValueError(f"number: expected 0 <= number < 10**12, got {number}.")
    for scale, name in _SCALES:
        if number >= scale:
            head, tail = divmod(number, scale)
            return f"{number_words(head)} {name}" + (f" {number_words(tail)}" if tail else "")
    if number >= 100:
        head, tail = divmod(number, 100)
        return f"{_ONES[head]} hundred" + (f" {number_words(tail)}" if tail else "")
    if number >= 20:
        head, tail = divmod(number, 10)
        return _TENS[head] + (f" {_ONES[tail]}" if tail else "")
    return _ONES[number]


def ordinal_words(number: int) -> str:
    """Ordinal: 21 -> "twenty first"."""
    head, _, last = number_words(number).rpartition(" ")
    if last in _IRREGULAR_ORDINALS:
        last = _IRREGULAR_ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return f"{head} {last}".strip()


def year_words(year: int) -> str:
    """Year 1100 to 2099: 1905 -> "nineteen oh five", 2004 -> "two thousand four", 2024 -> "twenty twenty four"."""
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010:
        return number_words(year)
    if rest == 0:
        return f"{number_words(century)} hundred"
    return f"{number_words(century)} {'oh ' if rest < 10 else ''}{number_words(rest)}"


def digit_words(digits: str, zero: str = "zero") -> str:
    """Digit by digit: "407" -> "four zero seven"; `zero` may be "oh"."""
    return " ".join(zero if digit == "0" else _ONES[int(digit)] for digit in digits)


def spell_numbers(text: str) -> str:
    """`text` with amounts, dates, ordinals, years, decimals and cardinals as words; 10**12 and above stay."""
    if not any(character.isdigit() for character in text):
        return text
    text = _BIG_MONEY.sub(lambda m: f"{m.group(1)} {m.group(2)} dollars", text)
    text = _MONEY.sub(_money, text)
    text = _PERCENT.sub(r"\1 percent", text)
    text = _DATE.sub(lambda m: f"{m.group(1)} {ordinal_words(int(m.group(2)))}", text)
    text = _ORDINAL.sub(lambda m: ordinal_words(_to_int(m.group(1))), text)
    text = _DECADE.sub(_decade, text)
    text = _DECIMAL.sub(lambda m: f"{number_words(_to_int(m.group(1)))} point {digit_words(m.group(2))}", text)
    text = _YEAR.sub(lambda m: year_words(int(m.group(1))), text)
    return _NUMBER.sub(lambda m: number_words(_to_int(m.group())) if _to_int(m.group()) < 10**12 else m.group(), text)


def _to_int(digits: str) -> int:
    return int(digits.replace(",", ""))


def _money(match: re.Match[str]) -> str:
    whole, cents = _to_int(match.group(1)), int(match.group(2) or 0)
    words = f"{number_words(whole)} dollar{'' if whole == 1 else 's'}"
    return words + (f" and {number_words(cents)} cent{'' if cents == 1 else 's'}" if cents else "")


def _decade(match: re.Match[str]) -> str:
    century, tens = (match.group(1), match.group(2)) if match.group(1) else (match.group(3), match.group(4))
    if tens == "0":
        return f"{number_words(int(century))} hundreds" if century != "20" else "two thousands"
    if tens == "1":
        return f"{number_words(int(century))} tens"
    return f"{number_words(int(century))} {_TENS[int(tens)][:-1]}ies"
