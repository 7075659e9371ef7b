"""Phrases that Babel can write in every language of CLDR: dates, amounts, names, and combinations of these.

A phrase is a meaning. It is rendered in two languages, and the two renderings are translations of each other.
This is the only file that imports Babel, an optional dependency. `cldr.py` imports this file when it is needed.
"""

import random
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import NamedTuple

from babel import Locale
from babel.dates import format_date, format_datetime, format_interval, format_skeleton, format_timedelta
from babel.lists import format_list
from babel.numbers import (
    format_compact_decimal,
    format_currency,
    format_decimal,
    format_percent,
    get_territory_currencies,
)
from babel.units import format_unit

# The locale with the most codes. If a language has no name for a code, the phrases with this code are left out.
_INVENTORY = Locale("en")
_FIRST_DAY, _DAYS = date(1980, 1, 1), 60 * 365  # few enough years that a model can learn each
_TODAY = date(2025, 1, 1)  # day on which currencies are in use; the actual date would give other pairs in other years
_UNITS_OF_TIME = {"year": 365, "month": 30, "week": 7, "day": 1, "hour": 1 / 24, "minute": 1 / 1440}


class Phrase(NamedTuple):
    """A meaning that can be written in every language.

    Args:
        group (`str`, *optional*): combination that the phrase belongs to. The split keeps the phrases of one group
            together. `None` is for a bare name, whose translation no other phrase shows.
        render (`Callable`): function from `locale=`, a `babel.Locale`, to the phrase in its language. It raises
            `LookupError` or `ValueError` if CLDR does not have the phrase.
    """

    group: str | None
    render: Callable[..., str]


def phrases(seed: int) -> Iterator[Phrase]:
    """Generate all phrases: names first, then the combinations of each kind.

    Args:
        seed (`int`): seed of the combinations. They are the same in every process and for every language.
    """
    yield from _names()
    for kind in (_days, _moments, _spans, _periods, _relative_times, _amounts, _sums, _regional_languages, _lists):
        yield from kind(random.Random(f"{kind.__name__} {seed}"))
    yield from _numbers(random.Random(f"numbers {seed}"))


def named_codes(locale: Locale) -> set[tuple[str, str]]:
    """The territories, languages and currencies that have a name in a locale, as pairs of kind and code."""
    kinds = ("territories", "languages", "currencies")
    return {(kind, code) for kind in kinds for code in _codes(kind) if getattr(locale, kind).get(code, code) != code}


def _codes(kind: str) -> list[str]:
    """Codes of territories and languages of two letters, without that of an unknown territory; currencies in use."""
    territories = sorted(code for code in _INVENTORY.territories if len(code) == 2 and code != "ZZ")
    if kind == "territories":
        return territories
    if kind == "languages":
        return sorted(code for code in _INVENTORY.languages if len(code) == 2)
    return sorted({code for territory in territories for code in get_territory_currencies(territory, _TODAY)})


def _names() -> Iterator[Phrase]:
    for kind in ("territories", "languages", "currencies"):
        for code in _codes(kind):
            yield Phrase(None, partial(_name, kind, code))


def _name(kind: str, code: str, locale: Locale) -> str:
    return getattr(locale, kind)[code]


def _days(draw: random.Random) -> Iterator[Phrase]:
    """Days, such as Wednesday, March 5, 1997 and March 5, 1997.

    The medium form is left out. In May it is the long form in English, and a different one in German.
    """
    for _ in range(1700):
        day = _day(draw)
        for form in ("full", "long"):
            yield Phrase(f"day {day}", partial(format_date, day, form))


def _moments(draw: random.Random) -> Iterator[Phrase]:
    """Moments, such as March 5, 1997, 3:04:05 PM UTC. Many languages count 24 hours, or write the date in figures."""
    for _ in range(1200):
        moment = datetime.combine(_day(draw), datetime.min.time()) + timedelta(seconds=draw.randrange(86400))
        yield Phrase(f"day {moment.date()}", partial(format_datetime, moment, draw.choice(("long", "medium"))))


def _spans(draw: random.Random) -> Iterator[Phrase]:
    """Spans of days, such as Mar 5 \u2013 9, 1997."""
    for _ in range(1000):
        first, last = sorted((_day(draw), _day(draw)))
        last = min(last, first + timedelta(draw.randrange(1, 90)))
        yield Phrase(f"span {first} {last}", partial(format_interval, first, last, "yMMMd"))


def _periods(draw: random.Random) -> Iterator[Phrase]:
    """Periods, such as March 1997, 1st quarter 1997, and week 10 of 1997."""
    for skeleton in ("yMMMM", "yQQQQ", "yw"):
        for _ in range(250):
            day = _day(draw)
            period = (day.year, (day.month + 2) // 3 if skeleton == "yQQQQ" else f"{day.month} {day.day}")
            yield Phrase(f"{skeleton} {period}", partial(format_skeleton, skeleton, day))


def _relative_times(draw: random.Random) -> Iterator[Phrase]:
    """Relative times, such as in 5 days, and 5 days ago."""
    for unit, days in _UNITS_OF_TIME.items():
        for number in sorted(draw.sample(range(1, 200), 70)):
            for sign in (1, -1):
                distance = timedelta(days=sign * number * days)
                options = {"granularity": unit, "threshold": float("inf"), "add_direction": True}
                yield Phrase(_with_number(f"relative {unit}", number), partial(format_timedelta, distance, **options))


def _amounts(draw: random.Random) -> Iterator[Phrase]:
    """Amounts, such as 7 kilometers per hour."""
    for unit in sorted(_INVENTORY._data["unit_patterns"]):
        for number in _some_numbers(draw, 13):
            yield Phrase(_with_number(unit, number), partial(_amount, number, unit))


def _amount(number: Decimal, unit: str, locale: Locale) -> str:
    amount = format_unit(number, unit, "long", locale=locale)
    if unit in amount:
        raise LookupError(f"{locale} has no name for {unit}: Babel writes the code")
    return amount


def _sums(draw: random.Random) -> Iterator[Phrase]:
    """Sums of money, such as 7.00 Swiss francs."""
    for code in _codes("currencies"):
        for number in _some_numbers(draw, 11):
            yield Phrase(_with_number(code, number), partial(_sum, number, code))


def _sum(number: Decimal, code: str, locale: Locale) -> str:
    _name(
        "currencies", code, locale
    )  # raises LookupError for a currency without a name, for which Babel would write the code
    return format_currency(number, code, format_type="name", locale=locale)


def _regional_languages(draw: random.Random) -> Iterator[Phrase]:
    """Languages of territories, such as German (Switzerland)."""
    for _ in range(3000):
        language, territory = draw.choice(_codes("languages")), draw.choice(_codes("territories"))
        yield Phrase(f"{language} {territory}", partial(_regional_language, language, territory))


def _regional_language(language: str, territory: str, locale: Locale) -> str:
    return f"{locale.languages[language]} ({locale.territories[territory]})"


def _lists(draw: random.Random) -> Iterator[Phrase]:
    """Lists, such as Norway, Sweden, and Denmark."""
    for _ in range(2000):
        kind = draw.choice(("territories", "languages"))
        codes = draw.sample(_codes(kind), draw.choice((2, 3)))
        yield Phrase(f"list {sorted(codes)}", partial(_list, kind, codes))


def _list(kind: str, codes: list[str], locale: Locale) -> str:
    return format_list([_name(kind, code, locale) for code in codes], locale=locale)


def _numbers(draw: random.Random) -> Iterator[Phrase]:
    """Numbers, such as 12,345.67, 7.5% and 12 thousand."""
    for number in _some_numbers(draw, 900):
        yield Phrase(f"number {number}", partial(format_decimal, number * draw.choice((1, 1000))))
        yield Phrase(f"number {number}", partial(format_percent, number / 100))
    for number in _some_numbers(draw, 300):
        large = number * draw.choice((1000, 10**6, 10**9))
        yield Phrase(_with_number("number", number), partial(format_compact_decimal, large, format_type="long"))


def _with_number(what: str, number: int | Decimal) -> str | None:
    """The group of a number with a unit; none for one and two, because no other phrase shows a singular or a dual."""
    return f"{what} {number}" if number not in (1, 2) else None


def _day(draw: random.Random) -> date:
    return _FIRST_DAY + timedelta(draw.randrange(_DAYS))


def _some_numbers(draw: random.Random, count: int) -> list[Decimal]:
    """One and two, small and large integers, and decimals, because plurals and separators depend on these."""
    drawn = [Decimal(draw.randrange(2, 10 ** draw.choice((2, 2, 3, 3, 4)))) for _ in range(count - 2)]
    return [Decimal(1), Decimal(2), *(n / draw.choice((1, 1, 1, 10, 100)) for n in drawn)]
