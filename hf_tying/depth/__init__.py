"""Ties over depth: layers that are visits of shared blocks, and one block applied until nothing changes."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "FixedPoint": "fixed_point",
    "NoFixedPointError": "fixed_point",
    "share_layers": "sharing",
    "unroll": "sharing",
    "fold": "sharing",
}

__all__ = ["FixedPoint", "NoFixedPointError", "share_layers", "unroll", "fold"]

if TYPE_CHECKING:
    from .fixed_point import FixedPoint, NoFixedPointError
    from .sharing import fold, share_layers, unroll
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
