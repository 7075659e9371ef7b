"""What is tied, in a live model or in a checkpoint: as a table, as JSON, as a picture."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "GroupReport": "records",
    "TyingReport": "records",
    "tying_report": "dispatch",
}

__all__ = [
    "GroupReport",
    "TyingReport",
    "tying_report",
]

if TYPE_CHECKING:
    from .dispatch import tying_report
    from .records import GroupReport, TyingReport
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
