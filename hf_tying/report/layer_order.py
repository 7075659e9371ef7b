"""The order in which the modules of a model are listed."""

from collections.abc import Iterable


def in_layer_order(modules: Iterable[str]) -> list[str]:
    """Sort names of modules by their layers: layer 9 before layer 10."""
    return sorted(modules, key=lambda name: [(int(p), "") if is_index(p) else (-1, p) for p in name.split(".")])


def is_index(part: str) -> bool:
    """Whether a part of a name is the number of a layer."""
    return part.isascii() and part.isdigit() and len(part) < 10
