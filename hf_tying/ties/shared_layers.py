"""Shared layers: the tie groups of a `depth` entry, and the factor of a layer that starts as the identity.

A stack of layers keeps its length: each layer is a visit of a block, a module of its own over parameters that all
visits of the block have. The entry says which block each visit has, in place of some hundred names.
"""

import functools
from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import nn

from ..config import TyingConfig, TyingError
from .anatomy import Anatomy, locate
from .relaxation import SUFFIX

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
    present, groups = set(slots), {}
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


def located_stacks(anatomy: Anatomy, config: TyingConfig, strict: bool = True) -> list[dict[str, Any]]:
    """The stacks of `config.depth` with the paths that they have in this model.

    Args:
        anatomy: reading of the model.
        config: the declaration.
        strict: refuse a stack that the model does not have. `False` is for another head over the same file, which may
            lack one (an encoder, a decoder): it is left out.

    Raises:
        TyingError: there is no such stack.
    """
    found = []
    for stack in config.depth:
        if (path := locate(anatomy, stack["path"])) is not None:
            found.append({**stack, "path": path})
        elif strict:
            model = type(anatomy.model).__name__
            raise TyingError(f"The config shares the layers of {stack['path']!r}, which {model} does not have.")
    return found


def needs_this_package(config: TyingConfig) -> bool:
    """Whether stock loaders would read another function from a file: layers are missing in it, or have a factor."""
    shared = [stack for stack in config.depth if not stack.get("unrolled")]
    return any(stack.get("damped") for stack in shared) or bool(shared) and config.save_format == "dedup"


# --- a layer that starts as the identity -----------------------------------------------------------------------------


def damp_declared(model: nn.Module, config: TyingConfig) -> None:
    """Give the layers that `config` declares damped their factor; those that have one keep it."""
    for stack in located_stacks(Anatomy(model), config, strict=False) if config.depth else ():
        for i in stack.get("damped", ()):
            damp(model.get_submodule(f"{stack['path']}.{i}"))


def damp(layer: nn.Module, factor: float = 0.0) -> None:
    """Let `layer` add only a share of what it does: `x + factor * (layer(x) - x)`. The factor is a parameter."""
    if FACTOR in layer._parameters:
        return
    like = next(layer.parameters())
    layer._parameters[FACTOR] = nn.Parameter(torch.full((), factor, dtype=like.dtype, device=like.device))
    layer.__class__ = _damped(type(layer))


@functools.cache
def _damped(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = cls.forward(self, hidden_states, *args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first = hidden_states + self._parameters[FACTOR] * (first - hidden_states)
        return (first, *outputs[1:]) if isinstance(outputs, tuple) else first

    def reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Pickle finds classes by name, and under this name it would find the stock class.
        return _revive, (cls,), object.__reduce_ex__(self, protocol)[2]

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
        "forward": functools.update_wrapper(forward, cls.forward),
    }
    return type(cls.__name__, (cls,), body)


def _revive(cls: type[nn.Module]) -> nn.Module:
    """Make the object of a pickle. Pickles find this function by its name in this module, so it must stay here."""
    return _damped(cls).__new__(_damped(cls))
