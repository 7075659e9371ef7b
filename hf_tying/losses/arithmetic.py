"""Arithmetic that the losses share: the dtypes of products and sums; sums, products and exponentials in place."""

from contextlib import AbstractContextManager, nullcontext
from math import log

import torch

#: On a CPU torch's exp2 is two to twenty times as fast as its exp (2.13, AVX2), of the same accuracy.
LOG2_E = 1 / log(2)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on this type of device; `None` where it is off, or unknown there (`"meta"`)."""
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if known else None


def without_autocast(device: str) -> AbstractContextManager:
    """Context manager in which autocast is off on this type of device."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def compute_dtypes(
    hidden: torch.Tensor, weight: torch.Tensor, head_dtype: torch.dtype | None = None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the matrix products, and that of losses and sums.

    Products are in `head_dtype`, where it is given; else in the dtype of `hidden`, or that of autocast, and in float32
    on a CPU that is slow in half precision. Losses and sums are in float32, or in float64 where the products are.
    """
    if head_dtype is not None:
        return head_dtype, torch.promote_types(torch.float32, head_dtype)
    products, device = hidden.dtype, hidden.device.type
    if torch.float64 not in (hidden.dtype, weight.dtype):
        products = autocast_dtype(device) or products
    if products == torch.float64:
        return products, products
    if products != torch.float32 and device == "cpu" and not has_fast_half(products):
        products = torch.float32
    return products, torch.float32


def has_fast_half(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype`, a half precision, faster than float32 ones.

    Measured on a CPU without (AVX2, torch 2.13): bfloat16 5 to 20 GFLOP/s, float32 90 to 180. Converted block by block
    the products are ten times as fast there, and exact.
    """
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and bool(supported())


def exp_of_difference(block: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`exp(block - base)`, in place."""
    return block.sub_(base).mul_(LOG2_E).exp2_()


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`out += left @ right`, in place. The product is in the dtype of `left` and `right`."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def put_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, first: bool) -> None:
    """`out = left @ right` if `first`, else `out += left @ right`, in place.

    `first` means that `out` is memory that holds no value yet.
    """
    if not first:
        add_product(out, left, right)
    elif left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def add_rows(matrix: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """`matrix[ids[i]] += rows[i]` for each i, in place; `ids` may repeat.

    In half precision the rows of one id are summed in float32 and rounded once.
    """
    if matrix.dtype in (torch.float32, torch.float64):
        matrix.index_add_(0, ids, rows.to(matrix.dtype))
        return
    # In half precision a frequent word would be rounded at each of its occurrences.
    words, place = ids.unique(return_inverse=True)
    sums = matrix[words].float().index_add_(0, place, rows.float())
    matrix.index_copy_(0, words, sums.to(matrix.dtype))
