"""Public names that are imported at their first use, so that `import hf_tying` stays light.

Type checkers and editors read the imports under `TYPE_CHECKING` in each `__init__.py`, which name the same modules.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(names: dict, home: dict[str, str]) -> tuple[Callable, Callable]:
    """Make `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        names: the package's `globals()`, where names are kept after their first use.
        home: module of each public name, below the package. One that starts with a dot is beside the package.
    """

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {names['__name__']!r} has no attribute {name!r}")
        value = names[name] = getattr(import_module(f".{home[name]}", names["__name__"]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*names, *home})

    return __getattr__, __dir__
