"""Ties that hold, for Hugging Face models: `tie`, `untie`, `assert_tied`, `tying_report`, and classes that keep them.

Importing this package loads no torch and no model code. It arranges for one thing: once transformers' own modules are
imported, stock classes honour a `tying` entry of their config (see `hf_tying.hook`).
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from . import _moved, hook
from ._lazy import lazy_names
from .config import TyingConfig, TyingConfigMixin, TyingError

try:
    __version__ = version("hf-tying")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "TiedModelMixin": "ties.modeling",
    "names_of": "ties.slots",
    "tie": "ties.tying",
    "untie": "ties.tying",
    "assert_tied": "ties.verify",
    "tying_report": "report.dispatch",
    "save_tied": "ties.module_files",
    "load_tied": "ties.module_files",
    "gap": "ties.relaxed",
    "harden": "ties.relaxed",
    "relaxation_penalty": "ties.relaxed",
    "use_tied_loss": "objectives.tied_loss",
    "use_projection": "projection.model",
    "merge_projection": "projection.model",
    "TyingCallback": "training.callbacks",
}

__all__ = [
    "TyingConfig",
    "TyingConfigMixin",
    "TyingError",
    "TiedModelMixin",
    "names_of",
    "tie",
    "untie",
    "assert_tied",
    "tying_report",
    "save_tied",
    "load_tied",
    "gap",
    "harden",
    "relaxation_penalty",
    "use_tied_loss",
    "use_projection",
    "merge_projection",
    "TyingCallback",
]

if TYPE_CHECKING:
    from .objectives.tied_loss import use_tied_loss
    from .projection.model import merge_projection, use_projection
    from .report.dispatch import tying_report
    from .ties.modeling import TiedModelMixin
    from .ties.module_files import load_tied, save_tied
    from .ties.relaxed import gap, harden, relaxation_penalty
    from .ties.slots import names_of
    from .ties.tying import tie, untie
    from .ties.verify import assert_tied
    from .training.callbacks import TyingCallback
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)


hook.install()
_moved.install()
