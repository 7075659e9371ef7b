"""The tie groups of a `depth` entry, by names alone: for a model and for the header of a file."""

from collections.abc import Iterable
from typing import Any

from ..config import TyingConfig, TyingError

#: A difference of a relaxed place is a child of its module, named like the parameter with this at its end.
SUFFIX = "_relaxation"
#: The factor of a layer that starts as the identity, a parameter of the layer.
FACTOR = "visit_factor"
#: The `variant` of a file that stock loaders would misread: its name is none that they look for.
VARIANT = "shared"


def depth_groups(slots: Iterable[str], stack: dict[str, Any]) -> dict[str, list[str]]:
    """The groups of one stack by their names: those of the first visits. The first visit is the root.

    Args:
        slots: the names of the model's parameters, tied ones under each of their names.
        stack: one element of `TyingConfig.depth`, with the path that it has in this model.

    Raises:
        TyingError: the model has another number of layers there, or layers of one block with other parameters.
    """
    if stack.get("unrolled"):
        return {}
    path, order = stack["path"], stack["order"]
    layers: dict[int, list[str]] = {}
    for name in slots:
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and number.isdecimal():
            layers.setdefault(int(number), []).append(rest)
    if sorted(layers) != list(range(len(order))):
        raise TyingError(
            f"The config shares the {len(order)} layers of {path!r}, and the model has {len(layers)} there. Make the "
            "model with the number of layers that was saved."
        )
    private = {*stack.get("private", ()), FACTOR}
    present: set[str] = set(slots)
    groups: dict[str, list[str]] = {}
    for block in dict.fromkeys(order):
        visits = [i for i, each in enumerate(order) if each == block]
        for rest in dict.fromkeys(rest for i in visits for rest in layers[i]):
            if rest in private or f"{SUFFIX}." in rest:
                continue
            # A parameter that only some visits have stays apart, such as the position bias of T5's first layer.
            names = [name for i in visits if (name := f"{path}.{i}.{rest}") in present]
            if len(names) > 1:
                groups[names[0]] = names
    return groups


def with_all_visits(names: Iterable[str], stack: dict[str, Any]) -> list[str]:
    """Names in a file, and those of visits whose block the file has under another visit alone."""
    path, order, known = stack["path"], stack["order"], dict.fromkeys(names)
    for name in list(known):
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and number.isdecimal() and int(number) < len(order):
            visits = (i for i, block in enumerate(order) if block == order[int(number)])
            known |= dict.fromkeys(f"{path}.{i}.{rest}" for i in visits)
    return list(known)


def needs_this_package(config: TyingConfig) -> bool:
    """Whether stock loaders would read another function from a file: layers are missing in it, or have a factor."""
    shared = [stack for stack in config.depth if not stack.get("unrolled")]
    return any(stack.get("damped") for stack in shared) or bool(shared) and config.save_format == "dedup"
