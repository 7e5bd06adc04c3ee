"""Read the first amount of a text, as a person would: "about $65,000 a year", "65.000 €", "between five and seven".

What is read
------------
- Digits with separators. Groups of three are parted by a comma, a full stop, an apostrophe or a space (also the
  narrow and no-break ones). Of two different marks the last is the decimal mark. One mark that could be either,
  as in "1.234", is read by the language: a full stop is the decimal mark of English, a comma that of Spanish and
  the others in ``DECIMAL_COMMA``. A mark that cannot part thousands, as in "1,5" or "0,250", is a decimal mark in
  every language.
- Scales after digits: "70k", "$1.5 million", "65 mil", "2 mil millones"; several multiply.
- Fractions after a whole number: "3 1/2", "3½", "two and a half million", "dos millones y medio". After a scale a
  part is one of that scale, and after a unit one of the unit: "two years and a half".
- Number words in English and Spanish ("twenty-five thousand", "a dozen", "treinta y cinco mil"). A single "one"
  (or "un", "una", "uno") is an article or pronoun more often than an amount, and counts only before a unit's word
  ("one week").
- Ranges give their midpoint: "50,000 - 60,000", "between 5 and 7", "from five to seven", "two-three". Scales at the
  end hold for both where that leaves the end above the beginning: "50-60k", "twenty to thirty thousand". So does a
  mark that parts thousands: "40-50,000".
- A hyphen joins words within a ten ("twenty-five") and before a scale ("50-thousand"); elsewhere it makes a range.
- Signs and codes of currencies and percent signs before or after are passed over; nothing is converted.
- Lengths of time are converted to the unit that is asked for: "2 weeks" are 14 where days are meant. A month counts
  as a twelfth of 365.25 days. A range may name a unit at either end or two of them: "18 months to 2 years".

What is not
-----------
Zero and negative amounts have no logarithm: where the first amount is one, there is none. Ordinals ("3rd") and
digits inside words ("A4", "COVID-19") are passed over, and so are runs of marks that are no number ("1.2.3").
Years and the numbers of a list ("1.", "2024") cannot be told from amounts and are read as such. Of two units only
the first counts ("2 years and 6 months"), and only right after the number ("2 whole weeks" are 2).
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
DAYS = {"minute": 1 / 1440, "hour": 1 / 24, "day": 1.0, "week": 7.0, "month": 365.25 / 12, "year": 365.25}
FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
PARTS = {sign: int(text[0]) / int(text[2]) for sign, text in FRACTIONS.items()}
CODES = "USD|EUR|GBP|CAD|AUD|CHF|JPY|INR|MXN|COP|ARS|CLP|PEN"
DECIMAL_COMMA = ("es", "fr", "de", "it", "pt", "nl", "pl", "ru", "tr", "sv", "da", "nb", "fi", "cs")

NUMBER = (  # atomic: "23rd" does not become 2
    rf"(?>\d{{1,3}}(?:[{SPACES}]\d{{3}})+(?!\d)(?:[.,]\d+)?"  # 65 000
    rf"|\d{{1,3}}(?:[{APOSTROPHES}]\d{{3}})+(?!\d)(?:[.,]\d+)?"  # 65'000
    r"|\d+(?:[.,]\d+)*|\.\d+)"
)
FRACTION = rf"(?:[{''.join(FRACTIONS)}]|(?<![\d/.,])(?:{'|'.join(FRACTIONS.values())})(?![\d/]))"
# Not inside a word or a longer number, unless a currency's code stands right before.
START = rf"(?:(?<![\w.,])(?<!\w[{MINUSES}])|(?<=\b(?:{CODES})))"
MINUS = rf"(?P<minus>(?<!\w)[{MINUSES}](?={SIGNS}?[\d.{''.join(FRACTIONS)}]))?"


@dataclass(frozen=True)
class Wording:
    """How a language writes numbers in words.

    Attributes
    ----------
    values: words that add up ("twenty", "five"). scales: words that multiply what stands before ("thousand").
    short: scales that only follow digits ("k"). ones: words that are no amount alone.
    half: a regular expression of one half before a scale ("half a"). parts: those of what is added to a number ("and a
        half"), by the sign that they stand for.
    linked: a regular expression of the pairs that a conjunction joins, "" for none. conjunction: that one may stand
        after a scale, "" for none.
    between, to: the words of ranges: "between ... and ...", "... to ...".
    ordinal: endings that make an ordinal of digits. units: words of currencies and shares after an amount.
    times: words of lengths of time, in days.
    """

    values: Mapping[str, float]
    scales: Mapping[str, float]
    short: Mapping[str, float]
    half: str
    parts: Mapping[str, str]
    ones: tuple[str, ...]
    between: tuple[str, str]
    to: str
    ordinal: str
    units: str
    times: Mapping[str, float]
    conjunction: str = ""
    linked: str = ""


def _counted(words: str, first: int = 1, step: int = 1) -> dict[str, float]:
    return {word: float(first + step * number) for number, word in enumerate(words.split())}


def _times(**words: str) -> dict[str, float]:
    """Days by word, from the words of every length of time."""
    return {word: DAYS[length] for length, known in words.items() for word in known.split()}


ENGLISH = Wording(
    values={
        **_counted("one two three four five six seven eight nine ten eleven twelve"),
        **_counted("thirteen fourteen fifteen sixteen seventeen eighteen nineteen", 13),
        **_counted("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10),
    },
    scales={"dozen": 12, "hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12},
    short={"k": 1e3, "m": 1e6, "mm": 1e6, "mn": 1e6, "mil": 1e6, "bn": 1e9, "b": 1e9},
    half=r"(?:one[\s-])?half(?:\s+a)?",
    parts={
        "½": r"and[\s-](?:(?:a|one)[\s-]half|half(?!\s+(?:of|the|an?)\b))",
        "¼": r"and[\s-](?:a|one)[\s-]quarter",
        "¾": r"and[\s-]three[\s-]quarters",
    },
    ones=("one",),
    between=("between", "and"),
    to="to",
    ordinal="st|nd|rd|th",
    units="percent|per cent|dollars?|euros?|pounds?",
    times=_times(
        minute="minutes minute mins min",
        hour="hours hour hrs hr h",
        day="days day",
        week="weeks week wks wk",
        month="months month mos mo",
        year="years year yrs yr",
    ),
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
        **{"veintiun": 21.0, "veintiuna": 21.0, "dieciseis": 16.0, "veintiseis": 26.0},
    },
    scales={
        **dict.fromkeys(("docena", "docenas"), 12.0),
        "mil": 1e3,
        **dict.fromkeys(("millón", "millon", "millones"), 1e6),
        **dict.fromkeys(("billón", "billon", "billones"), 1e12),
    },
    short={"k": 1e3, "m": 1e6},
    half="medi[oa]",
    parts={"½": r"y\s+medi[oa]", "¼": r"y\s+(?:un\s+)?cuarto", "¾": r"y\s+tres\s+cuartos"},
    ones=("un", "una", "uno"),
    between=("entre", "y"),
    to="a",
    ordinal="º|ª|er",
    units="por ciento|dólares|dolares|dólar|euros?|pesos?|libras?",
    times=_times(
        minute="minutos minuto min",
        hour="horas hora h",
        day="días dias día dia",
        week="semanas semana",
        month="meses mes",
        year="años año",
    ),
    linked=r"(?:treinta|cuarenta|cincuenta|sesenta|setenta|ochenta|noventa)\s+y\s+"
    r"(?:una?|uno|dos|tres|cuatro|cinco|seis|siete|ocho|nueve)\b",
)
WORDINGS = {"en": ENGLISH, "es": SPANISH}


def parse_amount(text: str, language: str = "en", unit: str = "") -> float | None:
    """The first amount in a text, above 0; None without one. See the rules at the head of this module.

    Parameters
    ----------
    language: of the text, such as "en" or "es". Number words are known in these two; others get the English ones.
    unit: of the amount. A length of time, such as "days" or "weeks of waiting", has other lengths converted to it.
    """
    language = language[:2].casefold()
    known = language if language in WORDINGS else "en"
    reader = _Reader(WORDINGS[known], "," if language in DECIMAL_COMMA else ".")
    for found in _pattern(known).finditer(text):
        if found["minus"] is not None:
            return None
        form = "" if found["low"] else "between_"
        low, high = (
            _End.of(found[f"{form}{end}"], found[f"{form}{end}_unit"], found[f"{form}{end}_part"])
            for end in ("low", "high")
        )
        amount = reader.read(low, high, _days_of(unit))
        if amount is not None:
            return amount if 0 < amount < float("inf") else None
    return None


def _days_of(unit: str) -> float | None:
    """The days of a unit that begins with a length of time; None for any other, and for rates ("hours a week")."""
    known = {word: days for wording in WORDINGS.values() for word, days in wording.times.items()}
    words = re.findall(r"\w+", unit.casefold())
    lengths = [known[word] for word in words if word in known]
    return lengths[0] if len(lengths) == 1 and words[0] in known else None


@dataclass(frozen=True)
class _End:
    """One end of a range, or a single amount.

    Attributes
    ----------
    text: of the amount; None for the second end where there is no range. unit: what stands after it, None for nothing.
    """

    text: str | None
    unit: str | None

    @classmethod
    def of(cls, text: str | None, unit: str | None, part: str | None) -> _End:
        """What was written, with the part that follows the unit ("two years and a half") moved to its number."""
        return cls(text if part is None else f"{text}{part}", unit)

    @property
    def has_word(self) -> bool:
        """Whether a unit's word follows, and no mere sign."""
        return self.unit is not None and self.unit[-1].isalpha()


@dataclass(frozen=True)
class _Reader:
    """Turns the text of one amount into its value."""

    wording: Wording
    decimal: str

    def read(self, low: _End, high: _End, days: float | None) -> float | None:
        """An amount, or the middle of a range; its beginning where the end is no number or not above it.

        Parameters
        ----------
        days: of the unit that lengths of time are converted to; None for that of the range's beginning.
        """
        assert low.text is not None
        first = self.amount(low.text)
        if first is None or (high.text is None and low.text.casefold() in self.wording.ones and not low.has_word):
            return None
        units = self._days(low), self._days(high)
        start, end = units[0] or units[1], units[1] or units[0]
        second = None if high.text is None else self.amount(high.text)
        if high.text is not None and second is not None:
            first *= self._shared_scale(low.text, first, high.text, second)
        if start is not None and end is not None:
            first *= start / (days or start)
            second = None if second is None else second * end / (days or start)
        return (first + second) / 2 if second is not None and first < second else first

    def _days(self, end: _End) -> float | None:
        """The length of time that an end names, in days."""
        return None if end.unit is None else self.wording.times.get(end.unit.strip(f"{SPACES}-").casefold())

    @property
    def _sizes(self) -> dict[str, float]:
        return {**self.wording.short, **self.wording.scales}

    def _shared_scale(self, low_text: str, low: float, high_text: str, high: float) -> float:
        """What the end of a range says for its beginning, too; 1 for nothing.

        Of several scales at the end, the most that leave it above the beginning: "two to three hundred thousand", but
        "two hundred to three hundred thousand".
        """
        own = max(self._scales(low_text), default=0.0)
        sizes = self._scales(high_text)
        shared = [
            prod(sizes[start:])
            for start in range(len(sizes))
            if all(sizes[start:]) and sizes[start] >= max(sizes[:start], default=0.0)
        ]
        grouped = 1000.0 ** _groups(high_text)
        if not sizes and grouped <= high:  # a mark of English may be the decimal one elsewhere
            shared.append(grouped)
        return next((scale for scale in shared if own < scale and low < high / scale), 1.0)

    def _scales(self, text: str) -> list[float]:
        """The scale of every word after a number, or of every number word; 0 for words that are none."""
        return [self._sizes.get(word, 0.0) for word in self._split(text)[1] if word not in PARTS]

    def amount(self, text: str) -> float | None:
        """The value of digits with their scales, or of number words; None for what is no number."""
        digits, words = self._split(text)
        if not digits:
            return self._words(words)
        value = number(digits, self.decimal)
        return None if value is None else self._scaled(value, words)

    def _scaled(self, value: float, words: list[str]) -> float:
        """The value of digits with what follows: scales, and parts of one or of the scale before."""
        size = 1.0
        for word in words:
            if word in PARTS:
                value += PARTS[word] * size
            else:
                size = self._sizes.get(word, 0.0)
                value *= size
        return value

    def _split(self, text: str) -> tuple[str, list[str]]:
        """The digits that a number begins with, "" for none, and its words; a fraction is the word of its sign."""
        text = re.sub(rf"^(?:{self.wording.half})[\s-]+", "½ ", text, flags=re.IGNORECASE)
        for sign, written in self.wording.parts.items():
            text = re.sub(rf"[\s-]{written}\b", f" {sign} ", text, flags=re.IGNORECASE)
        for sign, written in FRACTIONS.items():
            text = re.sub(rf"{sign}|(?<![\d/.,]){written}(?![\d/])", f" {sign} ", text)
        found = re.match(NUMBER, text)
        digits = found[0] if found else ""
        return digits, [word for word in re.split(r"[\s-]+", text[len(digits) :].casefold()) if word]

    def _words(self, words: list[str]) -> float:
        """The value of number words: what adds up is gathered until a scale multiplies it."""
        stack: list[float] = []
        size = 1.0
        for word in words:
            if word in PARTS:
                stack.append(PARTS[word] * size)
                continue
            size = self._sizes.get(word, 1.0)
            if word in self._sizes:
                before = 0.0
                while stack and stack[-1] < size:
                    before += stack.pop()
                stack.append((before or 1.0) * size)
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


def _groups(text: str) -> int:
    """How many groups of three digits follow the first digits of a text after equal marks."""
    mark = rf"[{SPACES}{APOSTROPHES}.,]"
    found = re.match(rf"\d{{1,3}}(?P<groups>(?P<mark>{mark})\d{{3}}(?:(?P=mark)\d{{3}})*)(?!\d)", text)
    return 0 if found is None else len(found["groups"]) // 4


def _grouped(digits: str, mark: str) -> bool:
    """Whether a mark parts digits into thousands."""
    return re.fullmatch(rf"[1-9]\d{{0,2}}(?:\{mark}\d{{3}})+", digits) is not None


@cache
def _pattern(language: str) -> re.Pattern[str]:
    """An amount, or a range of two, in a language."""
    wording = WORDINGS[language]
    scales, values = _either(wording.scales), _either(wording.values)
    short = _either({**wording.scales, **wording.short})
    tens = _either({word: value for word, value in wording.values.items() if value in range(20, 100, 10)})
    ones = _either({word: value for word, value in wording.values.items() if value < 10})
    part = rf"[\s-](?:{'|'.join(wording.parts.values())})\b"
    digits = (
        rf"(?:{FRACTION}|{NUMBER}(?:[\s-]?{FRACTION})?)(?:{part})?"
        rf"(?:(?:\s?(?:{short})|-(?:{scales}))\b)*(?:{part})?(?!\s?(?:{wording.ordinal})\b)"
    )
    half = rf"(?:(?:{wording.half})[\s-](?=(?:{scales})\b))?"
    linked = wording.linked + "|" if wording.linked else ""
    word = rf"(?:{linked}(?:{tens})-(?:{ones})\b|(?:{scales}|{values})\b)"
    joint = rf"\s+|-(?=(?:{scales})\b)"
    # Within "between ... and ...", where "and" joins nothing else.
    inside = rf"\b{half}{word}(?:{part}|(?:{joint}){word})*"
    words = inside
    if wording.conjunction:
        after_scale = "|".join(rf"(?<=\b{scale})" for scale in wording.scales)
        words = rf"\b{half}{word}(?:{part}|(?:{joint}|(?:{after_scale})\s+{wording.conjunction}\s+){word})*"
    sign = rf"(?:(?:{CODES})?\s?{SIGNS}?\s?)"
    unit = rf"\s?(?:%|{SIGNS}|(?:{CODES}|{wording.units})\b)|[\s-]?(?:{_either(wording.times)})\b"
    # "three weeks and a half-day" adds no half of a week.
    later = rf"{part}(?![\s-]+(?:{_either(wording.times)})\b)"
    first, second = wording.between

    def end(name: str, number: str) -> str:
        return rf"(?P<{name}>{number})(?:(?P<{name}_unit>{unit})(?P<{name}_part>{later})?)?"

    between = (
        rf"\b{first}\s+{sign}{end('between_low', f'{digits}|{inside}')}\s+{second}\s+"
        rf"{sign}{end('between_high', f'{digits}|{inside}')}"
    )
    plain = (
        rf"{MINUS}{SIGNS}?{START}{end('low', f'{digits}|{words}')}"
        rf"(?:\s*(?:[{DASHES}]|\b{wording.to}\b)\s*{sign}{end('high', f'{digits}|{words}')})?"
    )
    return re.compile(rf"{between}|{plain}", re.IGNORECASE)


def _either(words: Mapping[str, float]) -> str:
    """Any of the words, the longest first."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))
