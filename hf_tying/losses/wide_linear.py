"""Whole logits in a wider dtype than that of the softmax matrix, which is converted block by block."""

from typing import Any

import torch
from torch.nn import functional as F

from .arithmetic import add_product, without_autocast
from .chunks import MIB, even_slices
from .compilation import untraced
from .gradient import accumulate_or_claim, is_plain, refuse_double_backward

# Bytes of the rows of the matrix that are converted at a time.
_CONVERTED = 16 * MIB


@untraced
def wide_linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`hidden @ weight.T + bias` in `dtype`, without a copy of the whole `weight` in it.

    Args:
        hidden: (..., D), floating point.
        weight: (V, D), floating point. Its gradient is summed in `dtype`, and rounded once.
        bias: (V,), or `None`.
        dtype: dtype of the products, of the result, and of the gradients on the way.

    Returns:
        (..., V) in `dtype`.
    """
    with without_autocast(hidden.device.type):
        wide, added = hidden.to(dtype), None if bias is None else bias.to(dtype)
        if not (is_plain(wide) and is_plain(weight)):
            return F.linear(wide, weight.to(dtype), added)
        logits = _WideLinear.apply(wide.reshape(-1, wide.shape[-1]), weight)
        return (logits if added is None else logits.add_(added)).view(*hidden.shape[:-1], len(weight))


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.weight = weight
        logits = hidden.new_empty(len(hidden), len(weight))
        for words in _blocks(weight, hidden.dtype):
            torch.mm(hidden, weight[words].to(hidden.dtype).t(), out=logits[:, words])
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        refuse_double_backward("A head with a head_dtype", "use_tied_loss(model)", upstream)
        hidden, weight = ctx.saved_tensors
        into_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        into_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for words in _blocks(weight, hidden.dtype):
            if into_hidden is not None:
                add_product(into_hidden, upstream[:, words], weight[words].to(hidden.dtype))
            if into_weight is not None:
                into_weight[words] = (upstream[:, words].t() @ hidden).to(weight.dtype)
        return into_hidden, None if into_weight is None else accumulate_or_claim(ctx.weight, into_weight)


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> tuple[slice, ...]:
    return even_slices(0, len(weight), max(_CONVERTED // (weight.shape[1] * dtype.itemsize), 1))
