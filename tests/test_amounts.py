"""The parser of amounts: tables of what people write, and formats that are read back."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.measures.amounts import parse_amount

ENGLISH = {
    "65,000 a year": 65_000,
    "$1.5 million, at most": 1.5e6,
    "about 70k": 70_000,
    "2.5 billion": 2.5e9,
    "$5 mil": 5e6,
    ".5 points": 0.5,
    "3 1/2": 3.5,
    "3-1/2 percent": 3.5,
    "3½": 3.5,
    "$2 1/4 million": 2.25e6,
    "½ million": 5e5,
    "1/2 million": 5e5,
    "1/2": 0.5,
    "2 and a half million": 2.5e6,
    "2 million and a half": 2.5e6,
    "2½k": 2_500,
    "1/2 k": 500,
    "3 1/2 to 4 1/2": 4,
    "1,000 1/2": 1_000.5,
    "3 1/20": 3,
    "1,234,567.25": 1_234_567.25,
    "12 months": 12,
    "3 kittens": 3,
    "7,5": 7.5,
    "0,250": 0.25,
    "1.234": 1.234,
    "1,234": 1_234,
    "1.234,56": 1_234.56,
    "1234,567": 1_234.567,
    "65 000": 65_000,
    "65\u202f000,50 €": 65_000.5,
    "65'000 CHF": 65_000,
    "65\u2019000": 65_000,
    "USD65,000": 65_000,
    "US$ 65,000.": 65_000,
    "€ 12.50": 12.5,
    "£9": 9,
    "12 percent": 12,
    "5% a year": 5,
    "A4 paper, 20 sheets": 20,
    "On the 23rd of May, 50 dollars": 50,
    "Version 1.2.3 costs 7": 7,
    "- 5 dollars": 5,
}
ENGLISH_RANGES = {
    "between 40 and 50": 45,
    "$50,000 - $60,000": 55_000,
    "50,000\u201360,000 dollars": 55_000,
    "from 5 to 7 weeks": 6,
    "50-60k": 55_000,
    "5 to 10 thousand": 7_500,
    "50,000 to 1 million": 525_000,
    "5% to 7%": 6,
    "50 dollars to 60 dollars": 55,
    "10 to 5": 10,
    "between the two, 8": 2,
    "between five and seven": 6,
    "between one and five": 3,
    "between one hundred and two hundred": 150,
    "twenty-five - thirty": 27.5,
    "between twenty and thirty thousand": 25_000,
    "fifty to sixty thousand": 55_000,
    "two to three million": 2.5e6,
    "two hundred to three hundred thousand": 250_000,
    "between two and three hundred thousand": 250_000,
    "between fifty and one hundred": 75,
    "twenty to two thousand five hundred": 1_260,
    "$40-50,000": 45_000,
    "between 2 and 3,000": 2_500,
    "$2-3,000,000": 2.5e6,
    "500 to 1,000": 750,
    "5 to 7,5": 6.25,
    "two-three days": 2.5,
    "five-ten days": 7.5,
    "twenty-thirty thousand": 25_000,
    "one-two": 1.5,
}
ENGLISH_WORDS = {
    "twenty-five thousand": 25_000,
    "A dozen": 12,
    "two dozen eggs": 24,
    "a hundred dollars": 100,
    "two hundred and fifty": 250,
    "One hundred twenty thousand": 120_000,
    "one million two hundred thousand": 1.2e6,
    "half a million": 5e5,
    "half million": 5e5,
    "a half-million": 5e5,
    "one-half million": 5e5,
    "half a dozen": 6,
    "two and a half million": 2.5e6,
    "one and a half million": 1.5e6,
    "a million and a half": 1.5e6,
    "two and a half": 2.5,
    "two and one half": 2.5,
    "two and half": 2.5,
    "two, and half the price": 2,
    "two and half of that": 2,
    "two-and-a-half million": 2.5e6,
    "twenty-five and a half thousand": 25_500,
    "one and a half": 1.5,
    "two and a quarter million": 2.25e6,
    "one hundred and two and three quarters": 102.75,
    "one and a half to two million": 1.75e6,
    "two to two and a half million": 2.25e6,
    "two to three million and a half": 2.75e6,
    "between two and a half and three": 2.75,
    "between two and two and a half": 2.25,
    "between half a million and one million": 7.5e5,
    "50-thousand": 50_000,
    "five-hundred-thousand": 500_000,
    "one of the best: 30": 30,
    "one $20 bill": 20,
    "one dollar": 1,
}
SPANISH = {
    "65.000 €": 65_000,
    "1.234,56 euros": 1_234.56,
    "1,5": 1.5,
    "1.5": 1.5,
    "1,500": 1.5,
    "1 200,50": 1_200.5,
    "65 mil": 65_000,
    "2 mil millones de euros": 2e9,
    "1,5 millones": 1.5e6,
    "el 3.º, con 20 euros": 3,
    "de 5 a 7 semanas": 6,
    "entre 20.000 y 30.000 euros": 25_000,
    "50€-60€": 55,
    "entre treinta y cuarenta": 35,
    "entre treinta y cinco y cuarenta": 37.5,
    "treinta y cinco mil euros": 35_000,
    "dos mil quinientos millones": 2.5e9,
    "doscientas noventa": 290,
    "mil euros": 1_000,
    "una docena": 12,
    "medio millón": 5e5,
    "media docena": 6,
    "dos y medio": 2.5,
    "dos y medio millones": 2.5e6,
    "dos millones y medio": 2.5e6,
    "un millón y medio de euros": 1.5e6,
    "millón y medio": 1.5e6,
    "2 millones y medio": 2.5e6,
    "2,5 millones": 2.5e6,
    "3 1/2": 3.5,
    "treinta y cinco y media": 35.5,
    "entre dos y medio y tres": 2.75,
    "entre uno y medio millón": 250_000.5,
    "de dos a tres millones y medio": 2.75e6,
    "un sueldo de 20.000": 20_000,
    "Veintidós mil": 22_000,
    "veintiun mil": 21_000,
    "entre cuarenta y cincuenta mil": 45_000,
    "de veinte a treinta mil": 25_000,
    "entre 40 y 50.000 euros": 45_000,
    "entre uno y dos mil millones": 1.5e9,
}
MONTH = 365.25 / 12
TIMES = [  # text, unit that is asked for, amount
    ("24 hours", "days", 1),
    ("2 weeks", "days", 14),
    ("2 weeks", "days until the appointment", 14),
    ("5 years", "months", 60),
    ("90 mins", "hours", 1.5),
    ("24h", "days", 1),
    ("a 3-month wait", "days", 3 * MONTH),
    ("12", "months", 12),
    ("one week", "weeks", 1),
    ("one week", "days", 7),
    ("18 months to 2 years", "months", 21),
    ("18 months to 2 years", "", 21),
    ("18 months to 2 years", "years", 1.75),
    ("between 3 months and 6 months", "months", 4.5),
    ("3 months to 6 months", "", 4.5),
    ("between 3 and 6 weeks", "days", 31.5),
    ("3 - 6 weeks", "days", 31.5),
    ("two-three weeks", "days", 17.5),
    ("3 days a week", "hours a week", 3),
    ("3 days", "USD", 3),
    ("3 percent", "months", 3),
    ("two and a half years", "months", 30),
    ("a two-and-a-half-year wait", "months", 30),
    ("one and a half weeks", "days", 10.5),
    ("2 years and a half", "months", 30),
    ("one year and a half", "years", 1.5),
    ("2 years and a half to 3 years", "years", 2.75),
    ("3 1/2 weeks", "days", 24.5),
    ("3 weeks and a half-day session", "weeks", 3),
]
SPANISH_TIMES = [
    ("tres semanas", "days", 21),
    ("tres semanas", "días", 21),
    ("un año", "months", 12),
    ("un año y medio", "months", 18),
    ("dos semanas y media", "days", 17.5),
    ("entre un año y medio y dos años", "months", 21),
    ("entre 2 meses y 1 año", "months", 7),
    ("de 6 a 8 semanas", "days", 49),
]
NOTHING = [
    "",
    "none at all",
    "0",
    "zero",
    "$0.00",
    "-5",
    "-$5",
    "$-5",
    "\u22125 dollars",
    "-½",
    "one",
    "COVID-19",
    "1.2.3",
]


@pytest.mark.parametrize(("text", "amount"), [*ENGLISH.items(), *ENGLISH_RANGES.items(), *ENGLISH_WORDS.items()])
def test_english(text: str, amount: float) -> None:
    assert parse_amount(text) == pytest.approx(amount)
    assert parse_amount(f"I would say {text}") == pytest.approx(amount)


@pytest.mark.parametrize(("text", "amount"), SPANISH.items())
def test_spanish(text: str, amount: float) -> None:
    assert parse_amount(text, "es") == pytest.approx(amount)
    assert parse_amount(f"Propongo {text}, nada más.", "es-ES") == pytest.approx(amount)


@pytest.mark.parametrize(("text", "unit", "amount"), TIMES)
def test_lengths_of_time_are_converted_to_the_unit_that_is_asked_for(text: str, unit: str, amount: float) -> None:
    assert parse_amount(text, "en", unit) == pytest.approx(amount)
    assert parse_amount(f"I would say {text}, no more.", "en", unit) == pytest.approx(amount)


@pytest.mark.parametrize(("text", "unit", "amount"), SPANISH_TIMES)
def test_lengths_of_time_in_spanish(text: str, unit: str, amount: float) -> None:
    assert parse_amount(text, "es", unit) == pytest.approx(amount)


@pytest.mark.parametrize("text", NOTHING)
@pytest.mark.parametrize("language", ["en", "es"])
def test_no_amount(text: str, language: str) -> None:
    assert parse_amount(text, language) is None


@pytest.mark.parametrize(("text", "amount"), [("1.234", 1_234), ("1,234", 1.234), ("twenty", 20)])
def test_other_languages_have_their_decimal_mark_and_english_words(text: str, amount: float) -> None:
    assert parse_amount(text, "de") == amount


def with_marks(amount: int, cents: int, thousands: str, decimal: str) -> str:
    whole = f"{amount:,}".replace(",", thousands)
    return f"{whole}{decimal}{cents:02}" if cents else whole


BEFORE = st.sampled_from(["", "$", "€ ", "USD ", "EUR", "about ", "I offer £", "(", "It costs: "])
AFTER = st.sampled_from(["", " dollars", " €", "%", ", I think", ".", ".\n", ") a year", " EUR"])
THOUSANDS = st.sampled_from([",", " ", "\u00a0", "\u202f", "'", "\u2019"])
AMOUNTS = st.integers(1, 10**12)
CENTS = st.integers(0, 99)


@given(AMOUNTS, CENTS, THOUSANDS, BEFORE, AFTER)
def test_english_amounts_are_read_back(amount: int, cents: int, thousands: str, before: str, after: str) -> None:
    text = f"{before}{with_marks(amount, cents, thousands, '.')}{after}"
    assert parse_amount(text) == pytest.approx(amount + cents / 100, rel=1e-15)
    assert parse_amount(f"{before}{amount}{after}") == amount


@given(AMOUNTS, CENTS, st.sampled_from([".", " ", "\u00a0", "\u202f"]), BEFORE, AFTER)
def test_spanish_amounts_are_read_back(amount: int, cents: int, thousands: str, before: str, after: str) -> None:
    text = f"{before}{with_marks(amount, cents, thousands, ',')}{after}"
    assert parse_amount(text, "es") == pytest.approx(amount + cents / 100, rel=1e-15)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(["-", " - ", " to ", " \u2013 ", "\u2014"]))
def test_ranges_give_their_midpoint(one: int, width: int, join: str) -> None:
    assume(one >= 1000 or (one + width < 1000 * one and one + width < 10**6))  # "2-3,000": both are thousands
    middle = one + width / 2
    assert parse_amount(f"{one:,}{join}{one + width:,}") == middle
    assert parse_amount(f"${one:,}{join}${one + width:,} a year") == middle
    assert parse_amount(f"between {one:,} and {one + width:,}") == middle


SCALES = {"k": 1e3, " thousand": 1e3, " million": 1e6, "M": 1e6, " billion": 1e9, "bn": 1e9}


@given(st.integers(1, 9999), st.sampled_from(sorted(SCALES)))
def test_scales_multiply(amount: int, scale: str) -> None:
    assert parse_amount(f"${amount / 10}{scale} or so") == pytest.approx(amount / 10 * SCALES[scale])


UNITS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
SMALL = f"{UNITS} eighteen nineteen".split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int, joint: str) -> str:
    """English number words, written out apart from the parser."""
    if number < 20:
        return SMALL[number - 1]
    if number < 100:
        tens, units = divmod(number, 10)
        return TENS[tens - 2] + (f"-{SMALL[units - 1]}" if units else "")
    for name, size in (("million", 10**6), ("thousand", 10**3), ("hundred", 100)):
        if number >= size:
            many, rest = divmod(number, size)
            return f"{in_words(many, joint)} {name}" + (f"{joint}{in_words(rest, joint)}" if rest else "")
    raise AssertionError


@given(st.integers(2, 10**9 - 1), st.sampled_from([" ", " and "]))
def test_number_words_are_read_back(number: int, joint: str) -> None:
    assert parse_amount(f"I would pay {in_words(number, joint)} dollars") == number


@given(st.integers(1, 999), st.sampled_from(["", " thousand", " million"]), BEFORE)
def test_halves_are_read_back(number: int, scale: str, before: str) -> None:
    assume(number % 100)  # "a hundred and a half" is 150
    size = {"": 1, " thousand": 1e3, " million": 1e6}[scale]
    assert parse_amount(f"about {in_words(number, ' ')} and a half{scale}, more or less") == (number + 0.5) * size
    for written in (f"{number} and a half", f"{number} 1/2", f"{number}½"):
        assert parse_amount(f"{before}{written}{scale}") == (number + 0.5) * size


@given(st.text(), st.sampled_from(["en", "es", "de", ""]))
def test_any_text_can_be_parsed(text: str, language: str) -> None:
    amount = parse_amount(text, language)
    assert amount is None or 0 < amount < float("inf")


PIECES = [
    "1",
    "23",
    "456",
    ",",
    ".",
    " ",
    "-",
    "k",
    "mil",
    "and",
    "y",
    "a",
    "to",
    "one",
    "two",
    "hundred",
    "$",
    "%",
    "st",
    "m\u0131l",
    "½",
    "1/2",
    "and a half",
    "y medio",
    "days",
    "h",
]


@given(st.lists(st.sampled_from([*PIECES, "between", "entre", "half a", "medio", "USD", "'", "\u017fix"])))
def test_any_pieces_of_amounts_can_be_parsed(pieces: list[str]) -> None:
    for text in ("".join(pieces), " ".join(pieces)):
        for language in ("en", "es"):
            amount = parse_amount(text, language, "days")
            assert amount is None or 0 < amount < float("inf")
