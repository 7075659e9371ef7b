"""One gradient buffer for a matrix that is used several times: each use adds into what autograd already holds for it.

In a backward pass autograd waits until every use of a matrix has given its gradient, and holds the sum until then. The
softmax comes first and gives a whole matrix; each embedding then adds a few rows. Left to itself, autograd makes a
matrix for each of them, and one more for their sum. Here the first use claims the gradient that it returns: a weak
reference is kept, and later uses write their rows into it. It stays a gradient like any other. The first use returns
it to autograd, and does not depend on the others: a frozen branch, an embedding used twice or not at all, and a
recomputation change nothing.

A claimed gradient is written to under two conditions, which are checked each time: the backward pass is the same, and
only autograd holds the tensor. Otherwise autograd may hold a sum that was made elsewhere, or a hook may have kept the
gradient, and the present use returns a gradient of its own. One case cannot be detected: a hook of the loss's node
makes this gradient the `grad` of another tensor, in a step with one more dense use of the matrix. Such a hook must
copy it.
"""

import sys
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

# Private names of torch (2.6 to 2.13, at least). Without these three each use has its own gradient, as in torch.
_PASS = getattr(torch._C, "_current_graph_task_id", None)
_HOLDERS = getattr(torch.Tensor, "_use_count", None)
_STORAGE_HOLDERS = getattr(torch._C, "_storage_Use_Count", None)
_FAKE = torch._C._TorchDispatchModeKey.FAKE


@dataclass
class _Claim:
    gradient: weakref.ref
    backward_pass: int
    stream: object


_claims: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is of torch's own kind and has values: not sharded, quantised, traced or transformed."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and not is_transformed(tensor)


def is_transformed(tensor: torch.Tensor | None = None) -> bool:
    """Whether a transform is active for which the functions of this package have no rule, or `tensor` has no values.

    These are `vmap`, `grad`, `jvp` and the others of `torch.func`, forward-mode AD, `torch.jit.trace`, `torch.export`
    and `FakeTensorMode`. Plain torch operations have rules for all of them.
    """
    functional = torch._C._are_functorch_transforms_active()
    traced = torch.jit.is_tracing()
    if not torch.compiler.is_dynamo_compiling():  # it has a fake mode of its own at work
        traced = traced or torch._C._get_dispatch_mode(_FAKE) is not None
    return functional or forward_ad._current_level >= 0 or traced or tensor is not None and tensor.is_meta


def claim(weight: torch.Tensor, gradient: torch.Tensor) -> None:
    """Let later uses of `weight` in this backward pass add to `gradient`.

    The caller returns it to autograd for `weight`, and keeps no reference.
    """
    if None not in (_PASS, _HOLDERS, _STORAGE_HOLDERS) and _PASS() >= 0:
        _claims[weight] = _Claim(weakref.ref(gradient), _PASS(), _stream(weight))


def claimed_gradient(weight: torch.Tensor) -> torch.Tensor | None:
    """The gradient of `weight` in this backward pass that may be added to in place, or `None` if there is none."""
    entry = _claims.get(weight)
    if entry is None or entry.backward_pass != _PASS() or entry.stream != _stream(weight):
        return None
    gradient = entry.gradient()
    return gradient if gradient is not None and _refcounts(gradient) == expected_refcounts() else None


def accumulate_or_claim(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """Add `gradient`, a whole matrix, to the claimed gradient of `weight`, or claim it.

    Returns:
        What a backward function returns for `weight`: `gradient`, or `None` where it was added.
    """
    claimed = claimed_gradient(weight)
    if claimed is None:
        claim(weight, gradient)
        return gradient
    claimed.add_(gradient)
    return None


@cache
def expected_refcounts() -> tuple[int, int, int] | None:
    """The reference counts of a gradient that autograd alone holds, measured once on one of a single number.

    `None` without the private names of torch.
    """
    if None in (_PASS, _HOLDERS, _STORAGE_HOLDERS):
        return None
    seen: list[tuple[int, int, int]] = []
    with torch.enable_grad(), torch.device("cpu"):
        weight = torch.zeros(1, requires_grad=True)
        _Probe.apply(_Probe.apply(weight, weight, seen), weight, seen).sum().backward()
    return seen[0]


class _Probe(torch.autograd.Function):
    """Use of a matrix. The first in a backward pass claims its gradient, the second counts the references to it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, seen: list[tuple[int, int, int]]
    ) -> torch.Tensor:
        ctx.weight, ctx.seen = weight, seen
        return hidden + weight

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        entry = _claims.get(ctx.weight)
        if entry is None:
            gradient = torch.ones_like(ctx.weight)
            claim(ctx.weight, gradient)
            return upstream, gradient, None
        gradient = entry.gradient()
        ctx.seen.append(_refcounts(gradient))
        return None, None, None


def _refcounts(gradient: torch.Tensor) -> tuple[int, int, int]:
    """Numbers of references to the tensor, to its memory, and to its Python object."""
    return _HOLDERS(gradient), _STORAGE_HOLDERS(gradient.untyped_storage()._cdata), sys.getrefcount(gradient)


def _stream(weight: torch.Tensor) -> object:
    """The stream on which `weight` is used. Work on another one would not wait for writes on this one."""
    return torch.cuda.current_stream(weight.device) if weight.is_cuda else None


def refuse_double_backward(name: str, instead: str, upstream: torch.Tensor) -> None:
    """Refuse to differentiate the backward function of `name`, and to run it for many upstreams at once.

    Raises:
        RuntimeError: for `create_graph=True`, and for `is_grads_batched=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no gradient of its gradient (create_graph=True): use {instead} for that.")
    if "Batched" in repr(torch._C._dispatch_keys(upstream)):
        raise RuntimeError(
            f"{name} makes its gradients for one upstream at a time, and got a batch (is_grads_batched=True): use "
            f"{instead} for that, which takes one."
        )


def second_backward(name: str, otherwise: str = "") -> RuntimeError:
    """The error of a second backward pass through `name`, whose gradients the first has taken."""
    return RuntimeError(
        f"Trying to go backward through {name} a second time: its gradients were made in the forward pass, and given "
        f"out. Compute the loss again{otherwise}."
    )
