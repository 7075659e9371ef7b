"""Shared layers: the stacks of a `depth` entry in a model, and the factor of a layer that starts as the identity.

A stack of layers keeps its length: each layer is a visit of a block, a module of its own over parameters that all
visits of the block have. The entry says which block each visit has, in place of some hundred names.
"""

import functools
import inspect
from typing import Any, SupportsIndex

import torch
from torch import nn

from ..config import TyingConfig, TyingError, nearest
from .anatomy import Anatomy, locate
from .depth_groups import FACTOR


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
            layer = dict.fromkeys(
                n.removeprefix(f"{path}.").partition(".")[2] for n in anatomy.slots if n.startswith(f"{path}.")
            )
            if strict and (unknown := [name for name in stack.get("private", ()) if name not in layer]):
                raise TyingError(
                    f"The config has {unknown[0]!r} as a private part of the layers of {path!r}, which no layer has"
                    f"{nearest(unknown[0], layer)}."
                )
        elif strict:
            model = type(anatomy.model).__name__
            raise TyingError(f"The config shares the layers of {stack['path']!r}, which {model} does not have.")
    return found


# --- a layer that starts as the identity -----------------------------------------------------------------------------


def damp_declared(model: nn.Module, config: TyingConfig) -> None:
    """Give the layers that `config` declares damped their factor; those that have one keep it."""
    for stack in located_stacks(Anatomy(model), config, strict=False) if config.depth else ():
        for i in stack.get("damped", ()):
            damp(model.get_submodule(f"{stack['path']}.{i}"))


def refuse_streams(path: str, layer: nn.Module) -> None:
    """Refuse layers that map two states, such as XLNet's and Reformer's: a factor would reach one of them alone.

    Raises:
        TyingError: naming both.
    """
    names = list(inspect.signature(layer.forward).parameters)
    if names[:2] in (["output_h", "output_g"], ["prev_attn_output", "hidden_states"]):
        raise TyingError(
            f"Layers of {path!r} cannot have a factor of what they add ({FACTOR!r}): each maps two states, {names[0]} "
            f"and {names[1]}. Share them without grow= and residual_factor=."
        )


def damp(layer: nn.Module, factor: float = 0.0) -> None:
    """Let `layer` add only a share of what it does: `x + factor * (layer(x) - x)`. The factor is a parameter."""
    if FACTOR in layer._parameters:
        return
    like = next(layer.parameters())
    # Of one element, not a scalar: FSDP2 shards no scalars.
    layer._parameters[FACTOR] = nn.Parameter(torch.full((1,), factor, dtype=like.dtype, device=like.device))
    layer.__class__ = _damped(type(layer))


@functools.cache
def _damped(cls: type[nn.Module]) -> type[nn.Module]:
    first_name = list(inspect.signature(cls.forward).parameters)[1]  # after self: hidden_states, in most layers

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs[first_name]
        outputs = cls.forward(self, *args, **kwargs)
        several = isinstance(outputs, tuple | list)
        first = outputs[0] if several else outputs
        first = hidden_states + self._parameters[FACTOR] * (first - hidden_states)
        return type(outputs)((first, *outputs[1:])) if several else first

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
