"""Ties that hold, for Hugging Face models: `tie`, `untie`, `assert_tied`, `tying_report`, and classes that keep them.

Importing this package loads no torch and no model code. It arranges for one thing: once transformers' own modules are
imported, stock classes honour a `tying` entry of their config (see `hf_tying.hook`).
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from . import hook
from .config import TyingConfig, TyingConfigMixin, TyingError

try:
    __version__ = version("hf-tying")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "TiedModelMixin": "modeling",
    "tie": "tying",
    "untie": "tying",
    "assert_tied": "verify",
    "tying_report": "report",
    "TyingCallback": "training.callbacks",
}

__all__ = ["TyingConfig", "TyingConfigMixin", "TyingError", *_HOME]


def __getattr__(name: str):
    if name in _HOME:
        value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])


hook.install()
