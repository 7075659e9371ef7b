"""Phrases that CLDR can write in every language, by way of Babel: dates, amounts, names and what they combine to.

A phrase is what it says, not how: it is rendered once in each language, and the two renderings translate each other.
Unlike the rest of the package this file imports Babel, an optional dependency; `cldr.py` imports it when it is needed.
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

# Which codes there are is read from the fullest locale; a language that has no name for one leaves its phrases out.
_INVENTORY = Locale("en")
_FIRST_DAY, _DAYS = date(1980, 1, 1), 60 * 365  # each year often enough to be learnt
_TODAY = date(2025, 1, 1)  # whose currencies are in use: the clock would give other pairs in other years
_UNITS_OF_TIME = {"year": 365, "month": 30, "week": 7, "day": 1, "hour": 1 / 24, "minute": 1 / 1440}


class Phrase(NamedTuple):
    """What a phrase says.

    Args:
        group (`str`, *optional*): the combination that it stands for; phrases of one group belong together. `None` is
            for a bare name: nothing else tells how it is translated.
        render (`Callable`): called with `locale=`, a `babel.Locale`, gives the phrase in its language; raises
            `LookupError` or `ValueError` where CLDR has it not.
    """

    group: str | None
    render: Callable[..., str]


def phrases(seed: int) -> Iterator[Phrase]:
    """All phrases, in an order that shows nothing: names first, then the combinations of each kind.

    Args:
        seed (`int`): of the combinations that are drawn; the same ones in every process and for every language.
    """
    yield from _names()
    for kind in (_days, _moments, _spans, _periods, _relative_times, _amounts, _sums, _regional_languages, _lists):
        yield from kind(random.Random(f"{kind.__name__} {seed}"))
    yield from _numbers(random.Random(f"numbers {seed}"))


def named_codes(locale: Locale) -> set[tuple[str, str]]:
    """The territories, languages and currencies that a locale has a name for, as pairs of a kind and a code."""
    kinds = ("territories", "languages", "currencies")
    return {(kind, code) for kind in kinds for code in _codes(kind) if getattr(locale, kind).get(code, code) != code}


def _codes(kind: str) -> list[str]:
    """Territories and languages of two letters, the code for an unknown one left out; currencies in use."""
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
    """Wednesday, March 5, 1997; March 5, 1997. Not the medium form: in May it is the long one, and German differs."""
    for _ in range(1700):
        day = _day(draw)
        for form in ("full", "long"):
            yield Phrase(f"day {day}", partial(format_date, day, form))


def _moments(draw: random.Random) -> Iterator[Phrase]:
    """March 5, 1997, 3:04:05 PM UTC: many languages count 24 hours, and the date may be in figures."""
    for _ in range(1200):
        moment = datetime.combine(_day(draw), datetime.min.time()) + timedelta(seconds=draw.randrange(86400))
        yield Phrase(f"day {moment.date()}", partial(format_datetime, moment, draw.choice(("long", "medium"))))


def _spans(draw: random.Random) -> Iterator[Phrase]:
    """Mar 5 \u2013 9, 1997."""
    for _ in range(1000):
        first, last = sorted((_day(draw), _day(draw)))
        last = min(last, first + timedelta(draw.randrange(1, 90)))
        yield Phrase(f"span {first} {last}", partial(format_interval, first, last, "yMMMd"))


def _periods(draw: random.Random) -> Iterator[Phrase]:
    """March 1997; 1st quarter 1997; week 10 of 1997."""
    for skeleton in ("yMMMM", "yQQQQ", "yw"):
        for _ in range(250):
            day = _day(draw)
            period = (day.year, (day.month + 2) // 3 if skeleton == "yQQQQ" else f"{day.month} {day.day}")
            yield Phrase(f"{skeleton} {period}", partial(format_skeleton, skeleton, day))


def _relative_times(draw: random.Random) -> Iterator[Phrase]:
    """in 5 days; 5 days ago."""
    for unit, days in _UNITS_OF_TIME.items():
        for number in sorted(draw.sample(range(1, 200), 70)):
            for sign in (1, -1):
                distance = timedelta(days=sign * number * days)
                options = {"granularity": unit, "threshold": float("inf"), "add_direction": True}
                yield Phrase(_with_number(f"relative {unit}", number), partial(format_timedelta, distance, **options))


def _amounts(draw: random.Random) -> Iterator[Phrase]:
    """7 kilometers per hour."""
    for unit in sorted(_INVENTORY._data["unit_patterns"]):
        for number in _some_numbers(draw, 13):
            yield Phrase(_with_number(unit, number), partial(_amount, number, unit))


def _amount(number: Decimal, unit: str, locale: Locale) -> str:
    amount = format_unit(number, unit, "long", locale=locale)
    if unit in amount:
        raise LookupError(f"{locale} has no name for {unit}: Babel writes the code")
    return amount


def _sums(draw: random.Random) -> Iterator[Phrase]:
    """7.00 Swiss francs."""
    for code in _codes("currencies"):
        for number in _some_numbers(draw, 11):
            yield Phrase(_with_number(code, number), partial(_sum, number, code))


def _sum(number: Decimal, code: str, locale: Locale) -> str:
    _name("currencies", code, locale)  # where there is none, Babel would write the code
    return format_currency(number, code, format_type="name", locale=locale)


def _regional_languages(draw: random.Random) -> Iterator[Phrase]:
    """German (Switzerland)."""
    for _ in range(3000):
        language, territory = draw.choice(_codes("languages")), draw.choice(_codes("territories"))
        yield Phrase(f"{language} {territory}", partial(_regional_language, language, territory))


def _regional_language(language: str, territory: str, locale: Locale) -> str:
    return f"{locale.languages[language]} ({locale.territories[territory]})"


def _lists(draw: random.Random) -> Iterator[Phrase]:
    """Norway, Sweden, and Denmark."""
    for _ in range(2000):
        kind = draw.choice(("territories", "languages"))
        codes = draw.sample(_codes(kind), draw.choice((2, 3)))
        yield Phrase(f"list {sorted(codes)}", partial(_list, kind, codes))


def _list(kind: str, codes: list[str], locale: Locale) -> str:
    return format_list([_name(kind, code, locale) for code in codes], locale=locale)


def _numbers(draw: random.Random) -> Iterator[Phrase]:
    """12,345.67; 7.5%; 12 thousand."""
    for number in _some_numbers(draw, 900):
        yield Phrase(f"number {number}", partial(format_decimal, number * draw.choice((1, 1000))))
        yield Phrase(f"number {number}", partial(format_percent, number / 100))
    for number in _some_numbers(draw, 300):
        large = number * draw.choice((1000, 10**6, 10**9))
        yield Phrase(_with_number("number", number), partial(format_compact_decimal, large, format_type="long"))


def _with_number(what: str, number: int | Decimal) -> str | None:
    """The group of a number with something; one and two are bare names: only they tell a singular and a dual."""
    return f"{what} {number}" if number not in (1, 2) else None


def _day(draw: random.Random) -> date:
    return _FIRST_DAY + timedelta(draw.randrange(_DAYS))


def _some_numbers(draw: random.Random, count: int) -> list[Decimal]:
    """One and two, small integers, larger ones, some with decimals: what plurals and separators depend on."""
    drawn = [Decimal(draw.randrange(2, 10 ** draw.choice((2, 2, 3, 3, 4)))) for _ in range(count - 2)]
    return [Decimal(1), Decimal(2), *(n / draw.choice((1, 1, 1, 10, 100)) for n in drawn)]
