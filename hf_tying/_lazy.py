"""Names of a package that are imported when they are first asked for, so that `import hf_tying` stays light."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(names: dict, home: dict[str, str]) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        names: the package's `globals()`; what was asked for once is kept there.
        home: from each public name to the module below the package that has it; one that starts with a dot is
            beside the package.
    """

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {names['__name__']!r} has no attribute {name!r}")
        value = names[name] = getattr(import_module(f".{home[name]}", names["__name__"]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*names, *home})

    return __getattr__, __dir__
