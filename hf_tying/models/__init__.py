"""Model families that transformers lacks, each in a folder of its own.

A family registers itself with the Auto classes when it is imported, and `hf_tying.hook` imports all of them.
"""

from importlib import import_module

_HOME = {
    "TiedEncoderDecoderConfig": "encoder_decoder",
    "TiedEncoderDecoderModel": "encoder_decoder",
}

__all__ = [*_HOME]
FAMILIES = tuple(dict.fromkeys(_HOME.values()))


def __getattr__(name: str):
    if name in _HOME:
        value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
