"""The order in which the modules of a model are listed."""

from collections.abc import Iterable


def in_layer_order(modules: Iterable[str]) -> list[str]:
    """Names of modules in the order of their layers: layer 9 before layer 10."""
    return sorted(modules, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")])
