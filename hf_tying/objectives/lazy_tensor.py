"""A tensor that is computed only if an operation needs its values, together with all that derive from the same one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, SupportsIndex
from weakref import WeakSet

import torch


class Siblings:
    """All lazy tensors derived from one. Materializing one materializes all, before anybody can write to it in place.

    Attributes:
        materialized: whether they are materialized.
        stale: whether an operand has changed before that.
        members: the lazy tensors.
    """

    def __init__(self) -> None:
        self.materialized = self.stale = False
        self.members: WeakSet[LazyTensor] = WeakSet()


class LazyTensor:
    """Placeholder for the result of `compute`. An attribute or operator that a subclass lacks materializes it.

    Args:
        compute: function that makes the tensor; called at most once.
        siblings: siblings of the lazy tensor from which this one is derived. Default `None`: it is derived from none.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], siblings: Siblings | None = None) -> None:
        self._compute, self._siblings = compute, siblings or Siblings()
        self._computed: torch.Tensor | None = None
        self._siblings.members.add(self)

    def materialize(self, why: str) -> torch.Tensor:
        """The tensor, always the same object, which may be written to in place.

        Args:
            why: the operation that needs it.
        """
        if not self._siblings.materialized:
            self._siblings.materialized = True
            for member in list(self._siblings.members):
                member._tensor()  # computed before a write to one of them, so that copies keep their values
        return self._tensor()

    def _tensor(self) -> torch.Tensor:
        if self._computed is None:
            self._computed = self._compute()
        return self._computed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad", "requires_grad"):
            setattr(self.materialize(name), name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:  # copies and files have the tensor
        return self.materialize("a copy").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.materialize("a copy"), memo)


def _operator(name: str) -> Callable:
    return lambda self, *args: getattr(self.materialize(name), name)(*args)


# Python looks these up on the class, and not by `__getattr__`.
for _name in (
    *("sub", "rsub", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul"),
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "neg", "pos", "abs", "invert"),
    *("and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "float", "contains", "setitem"),
    *("array", "dlpack", "dlpack_device", "complex", "index", "reversed"),
):
    setattr(LazyTensor, f"__{_name}__", _operator(f"__{_name}__"))


def materialized(value: Any, why: str) -> Any:
    """`value` with all lazy tensors materialized, also inside lists, tuples and dicts."""
    if isinstance(value, LazyTensor):
        return value.materialize(why)
    if isinstance(value, tuple | list):
        return type(value)(materialized(part, why) for part in value)
    if isinstance(value, dict):
        return {key: materialized(part, why) for key, part in value.items()}
    return value
