"""Publishing on the Hub: cards made from files, and uploads that everybody can load."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "make_card": "cards",
    "publish": "publishing",
}

__all__ = [
    "make_card",
    "publish",
]

if TYPE_CHECKING:
    from .cards import make_card
    from .publishing import publish
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
