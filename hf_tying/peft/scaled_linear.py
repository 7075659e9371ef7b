"""The second half of the update, `low diag(u) B^T diag(v)`. It saves only its factors for the backward pass."""

from typing import Any

import torch
from torch.nn import functional as F


def scaled_linear(
    low: torch.Tensor, b: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None, scaling: float = 1.0
) -> torch.Tensor:
    """Compute `low W^T` with `W = scaling * diag(v) B diag(u)`.

    u and v are multiplied into B, `(out_features, r)`, which is smaller than a tensor with a row for each token.
    Autograd would save the product W of every module for the backward pass. This function computes it again instead.
    Like `F.linear`, it can be differentiated twice, in forward mode, and under `torch.func`.

    Args:
        low: `x A^T`, `(..., r)`, floating point.
        b: B, `(out_features, r)`.
        u: vector of length r, or `None` for 1.
        v: vector of length out_features, or `None` for 1.
        scaling: `alpha / r`. Default 1.

    Returns:
        `(..., out_features)`, in the dtype of `low`, or in that of autocast.
    """
    if u is None and v is None and scaling == 1:
        return F.linear(low, b)
    # A compiler decides by itself what to save, and a trace cannot contain a Python function.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.linear(low, _weight(b, u, v, scaling))
    return _ScaledLinear.apply(low, b, u, v, scaling)


def _weight(b: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None, scaling: float) -> torch.Tensor:
    columns = u * scaling if u is not None and scaling != 1 else scaling if u is None else u
    weight = b if u is None and scaling == 1 else b * columns
    return weight if v is None else weight * v.unsqueeze(-1)


class _ScaledLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        low: torch.Tensor, b: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        return F.linear(low, _weight(b, u, v, scaling))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        *factors, ctx.scaling = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Only operations of autograd on the inputs themselves, so that this pass can be differentiated too.
        low, b, u, v = ctx.saved_tensors
        of_low = of_b = of_u = of_v = None
        if ctx.needs_input_grad[0]:
            of_low = (grad @ _weight(b, u, v, ctx.scaling).to(grad.dtype)).to(low.dtype)
        if any(ctx.needs_input_grad[1:4]):
            # The gradients of the factors follow from that of W. No tensor here is larger than B. The sum over the
            # tokens is in the dtype of grad, as for the weight of a linear layer.
            rows = grad.reshape(-1, grad.shape[-1])
            of_weight = rows.t() @ low.reshape(-1, low.shape[-1]).to(grad.dtype)
            of_weight = of_weight.to(b.dtype) * ctx.scaling
            if ctx.needs_input_grad[1]:
                of_b = _weight(of_weight, u, v, 1.0)
            if ctx.needs_input_grad[2]:
                of_u = (of_weight * b if v is None else of_weight * b * v.unsqueeze(-1)).sum(0)
            if ctx.needs_input_grad[3]:
                of_v = (of_weight * b if u is None else of_weight * b * u).sum(1)
        return of_low, of_b, of_u, of_v, None

    @staticmethod
    def jvp(
        ctx: Any,
        low_t: torch.Tensor | None,
        b_t: torch.Tensor | None,
        u_t: torch.Tensor | None,
        v_t: torch.Tensor | None,
        _: None,
    ) -> torch.Tensor:
        low, b, u, v = ctx.saved_tensors
        # The output is linear in each factor, so its derivative is a sum with one factor replaced by its tangent.
        terms = [] if low_t is None else [(low_t, b, u, v)]
        terms += [] if b_t is None else [(low, b_t, u, v)]
        terms += [] if u_t is None else [(low, b, u_t, v)]
        terms += [] if v_t is None else [(low, b, u, v_t)]
        return sum(F.linear(x.to(ctx.dtype), _weight(*w, ctx.scaling).to(ctx.dtype)) for x, *w in terms)
