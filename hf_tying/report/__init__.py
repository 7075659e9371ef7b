"""What is tied, in a live model or in a checkpoint: as a table, as JSON, as a picture."""

from .._lazy import lazy_names

_HOME = {
    "GroupReport": "records",
    "TyingReport": "records",
    "tying_report": "dispatch",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
