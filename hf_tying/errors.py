"""`TyingError`, and what its messages are made of."""

import difflib
from collections.abc import Iterable
from typing import Any


class TyingError(ValueError):
    """A tie is wrongly declared, cannot be made, or no longer holds. Messages say what, expected, found, way out."""


def nearest(name: str, candidates: Iterable[str], most: int = 3) -> str:
    """`"; the nearest names are 'a', 'b'"`, or nothing when none resembles `name`: the tail of many messages."""
    tail = name.rsplit(".", 2)[-2:]  # of ten thousand names, only those with a similar end are compared
    pool = [c for c in candidates if any(part in c for part in tail)] or list(candidates)
    matches = difflib.get_close_matches(name, pool[:2000], n=most, cutoff=0.4)
    return f"; the nearest names are {', '.join(repr(m) for m in matches)}" if matches else ""


def short(value: Any) -> str:
    """`repr` for messages. It never walks a hostile value deeper or longer than a message can show."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, int | float | bool | None):
        return repr(value)
    return f"of type {type(value).__name__}"
