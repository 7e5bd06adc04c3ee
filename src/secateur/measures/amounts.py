"""Read the first amount of a text, as a person would: "about $65,000 a year", "65.000 €", "between five and seven".

What is read
------------
- Digits with separators. Groups of three are parted by a comma, a full stop, an apostrophe or a space (also the
  narrow and no-break ones). Of two different marks the last is the decimal mark. One mark that could be either,
  as in "1.234", is read by the language: a full stop is the decimal mark of English, a comma that of Spanish and
  the others in ``DECIMAL_COMMA``. A mark that cannot part thousands, as in "1,5" or "0,250", is a decimal mark in
  every language.
- Scales after digits: "70k", "$1.5 million", "65 mil", "2 mil millones"; several multiply.
- Number words in English and Spanish ("twenty-five thousand", "a dozen", "treinta y cinco mil"). A single "one"
  (or "un", "una", "uno") is an article or pronoun more often than an amount, and does not count.
- Ranges give their midpoint: "50,000 - 60,000", "between 5 and 7", "from five to seven", "50-60k" (a scale at the
  end holds for both).
- Signs and codes of currencies and percent signs before or after are passed over; nothing is converted.

What is not
-----------
Zero and negative amounts have no logarithm: where the first amount is one, there is none. Ordinals ("3rd") and
digits inside words ("A4", "COVID-19") are passed over, and so are runs of marks that are no number ("1.2.3").
Years and the numbers of a list ("1.", "2024") cannot be told from amounts and are read as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

SPACES = " \u00a0\u2009\u202f"
APOSTROPHES = "'\u2019"
MINUSES = "-\u2212"
DASHES = "-\u2013\u2014"
SIGNS = r"[$€£¥₹]"
CODES = "USD|EUR|GBP|CAD|AUD|CHF|JPY|INR|MXN|COP|ARS|CLP|PEN"
DECIMAL_COMMA = ("es", "fr", "de", "it", "pt", "nl", "pl", "ru", "tr", "sv", "da", "nb", "fi", "cs")

NUMBER = (  # atomic: "23rd" does not become 2
    rf"(?>\d{{1,3}}(?:[{SPACES}]\d{{3}})+(?!\d)(?:[.,]\d+)?"  # 65 000
    rf"|\d{{1,3}}(?:[{APOSTROPHES}]\d{{3}})+(?!\d)(?:[.,]\d+)?"  # 65'000
    r"|\d+(?:[.,]\d+)*|\.\d+)"
)
# Not inside a word or a longer number, unless a currency's code stands right before.
START = rf"(?:(?<![\w.,])(?<!\w[{MINUSES}])|(?<=\b(?:{CODES})))"
MINUS = rf"(?P<minus>(?<!\w)[{MINUSES}](?={SIGNS}?[\d.]))?"


@dataclass(frozen=True)
class Wording:
    """How a language writes numbers in words.

    Attributes
    ----------
    values: words that add up ("twenty", "five"). scales: words that multiply what stands before ("thousand").
    short: scales that only follow digits ("k"). halves: words for one half before a scale ("half a").
    ones: words that are no amount alone.
    linked: a regular expression of the pairs that a conjunction joins, "" for none. conjunction: that one may stand
        after a scale, "" for none.
    between, to: the words of ranges: "between ... and ...", "... to ...".
    ordinal: endings that make an ordinal of digits. units: words that stand between an amount and the end of a range.
    """

    values: Mapping[str, float]
    scales: Mapping[str, float]
    short: Mapping[str, float]
    halves: tuple[str, ...]
    ones: tuple[str, ...]
    between: tuple[str, str]
    to: str
    ordinal: str
    units: str
    conjunction: str = ""
    linked: str = ""


def _counted(words: str, first: int = 1, step: int = 1) -> dict[str, float]:
    return {word: float(first + step * number) for number, word in enumerate(words.split())}


ENGLISH = Wording(
    values={
        **_counted("one two three four five six seven eight nine ten eleven twelve"),
        **_counted("thirteen fourteen fifteen sixteen seventeen eighteen nineteen", 13),
        **_counted("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10),
    },
    scales={"dozen": 12, "hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12},
    short={"k": 1e3, "m": 1e6, "mm": 1e6, "mn": 1e6, "mil": 1e6, "bn": 1e9, "b": 1e9},
    halves=("half a",),
    ones=("one",),
    between=("between", "and"),
    to="to",
    ordinal="st|nd|rd|th",
    units="percent|per cent|dollars?|euros?|pounds?",
    conjunction="and",
)
SPANISH = Wording(
    values={
        **dict.fromkeys(("un", "una", "uno"), 1.0),
        **_counted("dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince", 2),
        **_counted("dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro", 16),
        **_counted("veinticinco veintiséis veintisiete veintiocho veintinueve", 25),
        **_counted("treinta cuarenta cincuenta sesenta setenta ochenta noventa cien", 30, 10),
        **_counted("ciento doscientos trescientos cuatrocientos quinientos seiscientos", 100, 100),
        **_counted("setecientos ochocientos novecientos", 700, 100),
        **_counted("doscientas trescientas cuatrocientas quinientas seiscientas", 200, 100),
        **_counted("setecientas ochocientas novecientas", 700, 100),
        **_counted("veintiún veintidos veintitres", 21),
        **{"veintiuna": 21.0, "dieciseis": 16.0, "veintiseis": 26.0},
    },
    scales={
        **dict.fromkeys(("docena", "docenas"), 12.0),
        "mil": 1e3,
        **dict.fromkeys(("millón", "millon", "millones"), 1e6),
        **dict.fromkeys(("billón", "billon", "billones"), 1e12),
    },
    short={"k": 1e3, "m": 1e6},
    halves=("medio", "media"),
    ones=("un", "una", "uno"),
    between=("entre", "y"),
    to="a",
    ordinal="º|ª|er",
    units="por ciento|dólares|dolares|dólar|euros?|pesos?|libras?",
    linked=r"(?:treinta|cuarenta|cincuenta|sesenta|setenta|ochenta|noventa)\s+y\s+"
    r"(?:una?|uno|dos|tres|cuatro|cinco|seis|siete|ocho|nueve)\b",
)
WORDINGS = {"en": ENGLISH, "es": SPANISH}


def parse_amount(text: str, language: str = "en") -> float | None:
    """The first amount in a text, above 0; None without one. See the rules at the head of this module.

    Parameters
    ----------
    language: of the text, such as "en" or "es". Number words are known in these two; others get the English ones.
    """
    language = language[:2].casefold()
    known = language if language in WORDINGS else "en"
    reader = _Reader(WORDINGS[known], "," if language in DECIMAL_COMMA else ".")
    for found in _pattern(known).finditer(text):
        if found["minus"] is not None:
            return None
        low_text = found["low"] or found["between_low"]
        high_text = found["high"] or found["between_high"]
        low = reader.amount(low_text)
        if low is None or (high_text is None and low_text.casefold() in reader.wording.ones):
            continue
        amount = low if high_text is None else reader.midpoint(low_text, low, high_text)
        return amount if 0 < amount < float("inf") else None
    return None


@dataclass(frozen=True)
class _Reader:
    """Turns the text of one amount into its value."""

    wording: Wording
    decimal: str

    def midpoint(self, low_text: str, low: float, high_text: str) -> float:
        """The middle of a range; its beginning where the end is no number or not above it."""
        bare, scale = self._digits(high_text)
        if bare is not None and low < bare and self._digits(low_text)[1] == 1:
            low *= scale  # "50-60k"
        high = self.amount(high_text)
        return (low + high) / 2 if high is not None and low < high else low

    def amount(self, text: str) -> float | None:
        """The value of digits with their scales, or of number words; None for what is no number."""
        if re.match(NUMBER, text) is None:
            return self._words(text)
        bare, scale = self._digits(text)
        return None if bare is None else bare * scale

    def _digits(self, text: str) -> tuple[float | None, float]:
        """The number that a text begins with, and the product of the scales after it."""
        found = re.match(NUMBER, text)
        if found is None:
            return None, 1.0
        known = {**self.wording.scales, **self.wording.short}
        return number(found[0], self.decimal), prod(known[word] for word in text[found.end() :].casefold().split())

    def _words(self, text: str) -> float:
        """The value of number words: what adds up is gathered until a scale multiplies it."""
        words = text.casefold()
        stack: list[float] = []
        for half in self.wording.halves:
            if words.startswith(f"{half} "):
                words, stack = words.removeprefix(half), [0.5]
        for word in re.split(r"[\s-]+", words.strip()):
            if word in self.wording.scales:
                scale, before = self.wording.scales[word], 0.0
                while stack and stack[-1] < scale:
                    before += stack.pop()
                stack.append((before or 1.0) * scale)
            else:
                stack.append(self.wording.values.get(word, 0.0))  # a conjunction adds nothing
        return sum(stack)


def number(digits: str, decimal: str) -> float | None:
    """The value of digits with separators; None where the marks make no number.

    Parameters
    ----------
    decimal: the mark, "." or ",", that stands before decimals where one mark could be either.
    """
    plain = re.sub(rf"[{SPACES}{APOSTROPHES}]", "", digits)
    marks = [mark for mark in plain if mark in ".,"]
    if plain != digits or not marks:  # thousands are parted otherwise, so that a mark is the decimal one
        return float(plain.replace(",", "."))
    whole, fraction = plain.rsplit(marks[-1], 1)
    if len(set(marks)) == 2:
        return float(f"{whole.replace(marks[0], '')}.{fraction}") if _grouped(whole, marks[0]) else None
    if _grouped(plain, marks[0]) and (len(marks) > 1 or marks[0] != decimal):
        return float(plain.replace(marks[0], ""))
    return float(f"{whole}.{fraction}") if len(marks) == 1 else None


def _grouped(digits: str, mark: str) -> bool:
    """Whether a mark parts digits into thousands."""
    return re.fullmatch(rf"[1-9]\d{{0,2}}(?:\{mark}\d{{3}})+", digits) is not None


@cache
def _pattern(language: str) -> re.Pattern[str]:
    """An amount, or a range of two, in a language."""
    wording = WORDINGS[language]
    scales, values = _either(wording.scales), _either(wording.values)
    short = _either({**wording.scales, **wording.short})
    digits = rf"{NUMBER}(?:\s?(?:{short})\b)*(?!\s?(?:{wording.ordinal})\b)"
    half = rf"(?:(?:{'|'.join(wording.halves)}) (?=(?:{scales})\b))?"
    word = rf"(?:{wording.linked + '|' if wording.linked else ''}(?:{scales}|{values})\b)"
    inside = rf"\b{half}{word}(?:(?:\s+|-){word})*"  # within "between ... and ...", where "and" joins nothing else
    words = inside
    if wording.conjunction:
        after_scale = "|".join(rf"(?<=\b{scale})" for scale in wording.scales)
        words = rf"\b{half}{word}(?:(?:\s+|-|(?:{after_scale})\s+{wording.conjunction}\s+){word})*"
    sign = rf"(?:(?:{CODES})?\s?{SIGNS}?\s?)"
    unit = rf"(?:\s?(?:%|{SIGNS}|(?:{CODES}|{wording.units})\b))?"
    first, second = wording.between
    between = (
        rf"\b{first}\s+{sign}(?P<between_low>{digits}|{inside}){unit}\s+{second}\s+"
        rf"{sign}(?P<between_high>{digits}|{inside})"
    )
    plain = (
        rf"{MINUS}{SIGNS}?{START}(?P<low>{digits}|{words})"
        rf"(?:{unit}\s*(?:[{DASHES}]|\b{wording.to}\b)\s*{sign}(?P<high>{digits}|{words}))?"
    )
    return re.compile(rf"{between}|{plain}", re.IGNORECASE)


def _either(words: Mapping[str, float]) -> str:
    """Any of the words, the longest first."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))
