"""Common parts of the optional kernel libraries: their import, operands, and use of the loss."""

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from .gradient import refuse_double_backward, second_backward
from .options import CrossEntropyOptions


@dataclass(frozen=True)
class KernelLibrary:
    """An optional package that computes the loss.

    Attributes:
        backend: name of the backend in `tied_cross_entropy`.
        package: name on PyPI.
        install: argument of `pip install`.
        module: module of the function.
        function: name of the function that is called.
        least: oldest version that computes the same.
        why_not_older: reason against older versions, for the message.
        refusals: function of (hidden, weight, bias, options) that gives what it does not compute, in words.
        compute: function of (hidden, weight, labels, bias, options, memory_budget) that gives the loss.
    """

    backend: str
    package: str
    install: str
    module: str
    function: str
    least: str
    why_not_older: str
    refusals: Callable[..., Iterator[str]]
    compute: Callable[..., torch.Tensor]


@cache
def library_function(library: KernelLibrary) -> Callable:
    """Import the function of a library. It is imported late, since that takes seconds and further packages.

    Raises:
        ImportError: when the library is too old.
    """
    try:
        version = importlib.metadata.version(library.package)
    except importlib.metadata.PackageNotFoundError:  # from a checkout, or under another name, as a nightly is
        version = library.least
    from packaging.version import Version

    if Version(version) < Version(library.least):
        raise ImportError(
            f"backend={library.backend!r} needs {library.package} {library.least} or newer, and {version} is "
            f"installed: {library.why_not_older}. pip install {library.install}, or use backend='torch'."
        )
    return getattr(importlib.import_module(library.module), library.function)


def float64_refusal(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[str]:
    """The refusal of float64 tensors, if one of the two is one."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        yield "float64 tensors (its losses are in float32)"


def any_label_counts(labels: torch.Tensor, options: CrossEntropyOptions) -> bool:
    """Whether any label counts. If none does, the own path gives the zeros, since a kernel has no work."""
    return bool((labels != options.ignore_index).any())


def kernel_operands(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: CrossEntropyOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The operands, (N, D), (V, D) and (V,), in the dtype of the products, times the scale of the logits."""
    device, products = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        products = torch.get_autocast_dtype(device)
    hidden, scale = hidden.reshape(-1, hidden.shape[-1]), options.logit_scale
    if scale is not None:  # before the conversion, so that what is converted is rounded once
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    bias = None if bias is None else bias.to(products)
    return hidden.to(products).contiguous(), weight.to(products).contiguous(), bias


def with_backward_guard(loss: torch.Tensor, backend: str, once: bool) -> torch.Tensor:
    """Make the backward pass of `loss` raise where the library would silently give wrong gradients.

    Args:
        loss: the loss of the library.
        backend: name of the backend, for the message.
        once: whether a second backward pass raises too.
    """
    name, passes = f"tied_cross_entropy with backend={backend!r}", []

    def check(upstream: torch.Tensor) -> None:
        refuse_double_backward(name, "hf_tying.losses.reference_cross_entropy", upstream)
        if once and passes:
            raise second_backward(name)
        passes.append(True)

    if loss.requires_grad:
        loss.register_hook(check)
    return loss


def mean_of_sum(total: torch.Tensor, labels: torch.Tensor, options: CrossEntropyOptions) -> torch.Tensor:
    """The mean over labels that count, from `total`, their sum."""
    count = options.num_items_in_batch
    if count is None:
        counted = labels != options.ignore_index
        count = counted.sum() if options.class_weight is None else options.class_weight.float()[labels[counted]].sum()
    count = torch.as_tensor(count, device=total.device)
    return total / count.masked_fill(count == 0, 1)
