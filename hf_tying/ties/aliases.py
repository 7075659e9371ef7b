"""The further names of a tied matrix: `TiedAlias` in a state dict, `TiedName` in `named_parameters`."""

import codecs
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

from ..config import TyingError

# Methods with the underscore of an update in place that leave the elements as they are.
_HARMLESS = {"requires_grad_", "share_memory_", "detach_", "pin_memory_"}
_ASSIGNING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__"}


class TiedAlias(torch.Tensor):
    """An entry of `state_dict()` under a name of a tie group that is not the root.

    It shares the root's memory as in torch, can be read, copied, saved and loaded from, and refuses an update in
    place: code that averages a state dict entry by entry would move the one matrix once for each of its names. Writing
    the values that it has is no update. What is computed from it, its deep copy and what a file holds are plain
    tensors.
    """

    tied: tuple[str, str] = ("a tied name", "its root")

    @staticmethod
    def of(tensor: torch.Tensor, name: str, root: str) -> torch.Tensor:
        """`tensor` as the entry `name` beside `root`; other than plain tensors (a DTensor) stay what they are."""
        if type(tensor) is not torch.Tensor:
            return tensor
        alias = tensor.as_subclass(TiedAlias)
        alias.tied = (name, root)
        return alias

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            for alias in written:
                if not _writes_what_is_there(func, args):
                    name, root = alias.tied
                    raise TyingError(
                        f"{name!r} in this state dict is the same memory as {root!r}, and {func.__name__} would "
                        "update it once more. Update the root only, or go by model.named_parameters(), which lists "
                        "each parameter once. To average a model: torch.optim.swa_utils.AveragedModel."
                    )
            result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        if func == torch.Tensor.data.__get__:
            return TiedAlias.of(result, *args[0].tied)  # the usual detour of an update in place
        return result

    def __deepcopy__(self, memo):
        return plain(self).clone()

    def __reduce_ex__(self, protocol):
        return plain(self).__reduce_ex__(protocol)


def plain(value: Any) -> Any:
    """A `TiedAlias` as the plain tensor over the same memory; anything else as it is."""
    if not isinstance(value, TiedAlias):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(torch.Tensor)


def _written(func, args: tuple, kwargs: dict) -> list[TiedAlias]:
    """The aliases whose elements `func` would write."""
    name = getattr(func, "__name__", "")
    in_place = name in _ASSIGNING or name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    targets = [kwargs.get("out"), args[0] if in_place and args else None]
    return [value for value in tree_iter(targets) if isinstance(value, TiedAlias)]


def _writes_what_is_there(func, args: tuple) -> bool:
    if getattr(func, "__name__", "") != "copy_" or len(args) < 2 or not isinstance(args[1], torch.Tensor):
        return False
    here, given = plain(args[0]), plain(args[1])
    return here.shape == given.shape and torch.equal(here, given.to(here))


class TiedName(str):
    """The name of a tied parameter in `model.named_parameters()`: the root's, answering to each name of its group.

    Recipes choose parameters by name (`"lm_head" in name`, `name.endswith(...)`). A tied parameter is listed once,
    under its root; asked for by any other of its names it would silently be nowhere. Two recipes that claim the one
    parameter under two of its names then meet in torch's own error on a parameter in two groups.
    """

    names: tuple[str, ...]

    def __new__(cls, root: str, names: Iterable[str]):
        self = super().__new__(cls, root)
        self.names = tuple(names)
        return self

    def __reduce_ex__(self, protocol):
        # In a file it is a plain string, for readers without this package too. Of the functions that torch.load admits
        # with weights_only, this is the one that returns a string; rot13 undoes itself.
        return codecs.encode, (codecs.encode(str(self), "rot13"), "rot13")

    def __contains__(self, part: str) -> bool:
        return any(part in str(name) for name in self.names)

    def startswith(self, *args) -> bool:
        return any(name.startswith(*args) for name in self.names)

    def endswith(self, *args) -> bool:
        return any(name.endswith(*args) for name in self.names)
