"""Ties over depth: one block applied until nothing changes."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {"FixedPoint": "fixed_point", "NoFixedPointError": "fixed_point"}

__all__ = ["FixedPoint", "NoFixedPointError"]

if TYPE_CHECKING:
    from .fixed_point import FixedPoint, NoFixedPointError
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
