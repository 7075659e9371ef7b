"""Tied-LoRA: low-rank adapters whose matrices all layers share, through PEFT; and adapters over tied weights."""

# First, and whole: what is here builds on it, and is registered with it as soon as it has been imported.
import peft  # noqa: F401

from .._lazy import lazy_names

_HOME = {
    "TiedLoraConfig": "config",
    "TiedLoraModel": "model",
    "export_to_lora": "export",
    "fit_from_lora": "fitting.fit",
}

__all__ = [*_HOME]

__getattr__, __dir__ = lazy_names(globals(), _HOME)
