"""One gradient buffer for a matrix that is used several times: each use adds into what autograd already holds for it.

In a backward pass autograd waits until every use of a matrix has given its gradient, and holds the sum until then. The
softmax comes first and gives a whole matrix; each embedding then adds a few rows. Left to itself, autograd makes a
matrix for each of them, and one more for their sum. Here the first one is remembered, weakly, and the later ones write
their rows into it. It is a gradient like any other all the same: whoever comes first returns it to autograd, and
nothing depends on the others: a frozen branch, an embedding used twice or not at all, a recomputation change nothing.

Two facts have to hold for a remembered gradient to be written to, and are asked of torch each time: it is the same
backward pass, and autograd holds the tensor, alone. It may be a sum by now that was made elsewhere, or a hook has kept
it. Then the gradient at hand is one of its own. (What cannot be seen: a hook of the loss's node that makes this
gradient the `grad` of another tensor, in a step with one more dense use of the matrix. Such a hook must copy it.)
"""

import sys
import weakref
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

# Private names of torch (2.6 to 2.13, at least), the only ones used here. Without them each use has its own gradient,
# as in torch.
_PASS = getattr(torch._C, "_current_graph_task_id", None)
_HOLDERS = getattr(torch.Tensor, "_use_count", None)
_STORAGE_HOLDERS = getattr(torch._C, "_storage_Use_Count", None)


@dataclass
class _Remembered:
    gradient: weakref.ref
    backward_pass: int
    stream: object


_remembered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is torch's own kind, not sharded over processes, quantised or traced."""
    return type(tensor) in (torch.Tensor, nn.Parameter)


def held_gradient(weight: torch.Tensor) -> torch.Tensor | None:
    """In a backward pass: the gradient of `weight` that autograd holds already, to be added to in place; or `None`."""
    entry = _remembered.get(weight)
    if entry is None or entry.backward_pass != _PASS() or entry.stream != _stream(weight):
        return None
    gradient = entry.gradient()
    return gradient if gradient is not None and _holders(gradient) == prepare() else None


def remember(weight: torch.Tensor, gradient: torch.Tensor) -> None:
    """In a backward pass: `gradient` is about to be returned to autograd for `weight`, and nobody else keeps it."""
    if None not in (_PASS, _HOLDERS, _STORAGE_HOLDERS) and _PASS() >= 0:
        _remembered[weight] = _Remembered(weakref.ref(gradient), _PASS(), _stream(weight))


def deliver(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """Add a whole matrix to what is held, or be the first: what a backward returns for `weight`."""
    held = held_gradient(weight)
    if held is None:
        remember(weight, gradient)
        return gradient
    held.add_(gradient)
    return None


@cache
def prepare() -> tuple[int, int, int] | None:
    """The holders of a gradient that autograd alone holds: seen once, on one of a single number."""
    if None in (_PASS, _HOLDERS, _STORAGE_HOLDERS):
        return None
    seen: list[tuple[int, int, int]] = []
    with torch.enable_grad(), torch.device("cpu"):
        weight = torch.zeros(1, requires_grad=True)
        _Probe.apply(_Probe.apply(weight, weight, seen), weight, seen).sum().backward()
    return seen[0]


class _Probe(torch.autograd.Function):
    """A use of a matrix: the first in a backward pass is remembered, the second looks at it."""

    @staticmethod
    def forward(ctx, hidden, weight, seen):
        ctx.weight, ctx.seen = weight, seen
        return hidden + weight

    @staticmethod
    def backward(ctx, upstream):
        entry = _remembered.get(ctx.weight)
        if entry is None:
            gradient = torch.ones_like(ctx.weight)
            remember(ctx.weight, gradient)
            return upstream, gradient, None
        gradient = entry.gradient()
        ctx.seen.append(_holders(gradient))
        return None, None, None


def _holders(gradient: torch.Tensor) -> tuple[int, int, int]:
    """How many hold the tensor, its memory, and its Python object."""
    return _HOLDERS(gradient), _STORAGE_HOLDERS(gradient.untyped_storage()._cdata), sys.getrefcount(gradient)


def _stream(weight: torch.Tensor) -> object:
    """Work on another stream would not wait for what was written on this one."""
    return torch.cuda.current_stream(weight.device) if weight.is_cuda else None
