"""Tied-LoRA: low-rank adapters whose matrices all layers share, through PEFT; and adapters over tied weights."""

from typing import TYPE_CHECKING

# First, and whole: what is here builds on it, and is registered with it as soon as it has been imported.
import peft  # noqa: F401

from .._lazy import lazy_names

_HOME = {
    "TiedLoraConfig": "config",
    "TiedLoraModel": "model",
    "export_to_lora": "export",
    "fit_from_lora": "fitting.fit",
}

__all__ = [
    "TiedLoraConfig",
    "TiedLoraModel",
    "export_to_lora",
    "fit_from_lora",
]

if TYPE_CHECKING:
    from .config import TiedLoraConfig
    from .export import export_to_lora
    from .fitting.fit import fit_from_lora
    from .model import TiedLoraModel
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
