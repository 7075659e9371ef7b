"""The context of a call, for an operation that is carried out later: modes of torch, and versions of its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..losses.gradient import is_plain


@dataclass(frozen=True)
class CallContext:
    """Modes of torch: gradients, inference, and autocast.

    Attributes:
        device: type of the device of autocast.
        grad: whether gradients are recorded.
        inference: whether inference mode is on.
        autocast: whether autocast is enabled.
        dtype: dtype of autocast.
    """

    device: str
    grad: bool
    inference: bool
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> CallContext:
        """The context at this moment."""
        return cls(
            device,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )

    @contextmanager
    def restored(self, grad: bool = True) -> Iterator[None]:
        """Context manager that restores the modes.

        Args:
            grad: `False` leaves the modes of autograd as they are now. Default `True`.
        """
        now = CallContext.now(self.device)
        with ExitStack() as stack:
            if grad and self.inference != now.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            if grad and self.grad != torch.is_grad_enabled():
                stack.enter_context(torch.set_grad_enabled(self.grad))
            if (self.autocast, self.dtype) != (now.autocast, now.dtype):
                stack.enter_context(torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast))
            yield


class Operands:
    """Tensors that are read later, and the number of writes to each so far, as autograd counts them.

    Args:
        values: the tensors; anything else among them is left out.
    """

    def __init__(self, values: tuple) -> None:
        self._seen = [(value, _version(value)) for value in values if isinstance(value, torch.Tensor)]

    def include(self, tensors: list[torch.Tensor]) -> bool:
        """Whether one of `tensors` is an operand, or shares memory with one."""
        memory = {tensor.untyped_storage()._cdata for tensor, _ in self._seen if is_plain(tensor)}
        return any(is_plain(tensor) and tensor.untyped_storage()._cdata in memory for tensor in tensors)

    def changed(self) -> list[torch.Tensor]:
        """The operands that were written to since."""
        return [tensor for tensor, before in self._seen if _version(tensor) != before]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_IN_PLACE = {
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
}
# These give out the memory itself, which may then be written to.
_GIVES_MEMORY = {"numpy", "__array__", "__dlpack__", "data_ptr"}
_SET_DATA = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


def written_to(function: Callable[..., Any], args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that a call of a torch function changes in place, as far as its name and arguments tell."""
    name = getattr(function, "__name__", "")
    written = [kwargs.get("out")]
    by_name = name.endswith("_") and not name.endswith("__") or name in _IN_PLACE or name in _GIVES_MEMORY
    if by_name or kwargs.get("inplace") or function == _SET_DATA:
        written += [*args[:1], kwargs.get("input")]
    flat = [part for each in written for part in (each if isinstance(each, tuple | list) else (each,))]
    return [tensor for tensor in flat if isinstance(tensor, torch.Tensor)]
