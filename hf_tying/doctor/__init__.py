"""What is wrong with a checkpoint's ties, what each loader will do with it, and the folder that is right.

`diagnose` finds the diseases, `inspect` the ties, `forecast` tells what loaders do; `rewriting` and `layers` write new
folders.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "Finding": ".report.records",
    "Forecast": "loaders",
    "diagnose": "diagnosis",
    "export_layers": "layers",
    "forecast": "loaders",
    "inspect": "diagnosis",
    "rewrite": "rewriting",
}

__all__ = [
    "Finding",
    "Forecast",
    "diagnose",
    "export_layers",
    "forecast",
    "inspect",
    "rewrite",
]

if TYPE_CHECKING:
    from ..report.records import Finding
    from .diagnosis import diagnose, inspect
    from .layers import export_layers
    from .loaders import Forecast, forecast
    from .rewriting import rewrite
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
