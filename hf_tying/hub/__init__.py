"""Publishing on the Hub: cards made from files, and uploads that everybody can load."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "diagnose": ".doctor",
    "inspect": ".doctor",
    "make_card": "cards",
    "publish": "publishing",
}

__all__ = [
    "diagnose",
    "inspect",
    "make_card",
    "publish",
]

if TYPE_CHECKING:
    from ..doctor import diagnose, inspect
    from .cards import make_card
    from .publishing import publish
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
