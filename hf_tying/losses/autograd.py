"""The tied softmax for autograd: gradients are made in the forward pass, and returned once in the backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .arithmetic import compute_dtypes
from .chunks import default_budget, plan_chunks
from .gradient import accumulate_or_claim, refuse_double_backward, second_backward
from .options import CrossEntropyOptions
from .pending_gradients import Gradients, PendingGradients, counted_positions, finish_gradients
from .softmax import Softmax
from .walk import cross_entropy


def tied_path(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
    memory_budget: int | None = None,
) -> torch.Tensor:
    """The loss by this package's own walk over the vocabulary; the arguments have been checked (`check_operands`)."""
    budget = default_budget(*weight.shape, itemsize=weight.element_size()) if memory_budget is None else memory_budget
    call = _Call(options, budget, labels, torch.is_grad_enabled())
    return _TiedCrossEntropy.apply(hidden, weight, bias, call)


@dataclass
class _Call:
    options: CrossEntropyOptions
    budget: int
    labels: torch.Tensor
    differentiable: bool

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors of the call that others may write to: labels, class weights, and a number of items."""
        items = self.options.num_items_in_batch
        return self.labels, self.options.class_weight, items if isinstance(items, torch.Tensor) else None

    def with_tensors(
        self, labels: torch.Tensor, class_weight: torch.Tensor | None, items: torch.Tensor | None
    ) -> "_Call":
        """Copy the call with other tensors."""
        count = self.options.num_items_in_batch if items is None else items
        options = replace(self.options, class_weight=class_weight, num_items_in_batch=count)
        return replace(self, labels=labels, options=options)


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: _Call
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:3] if call.differentiable else (False, False, False)
        ctx.call, ctx.wanted, ctx.weight, ctx.pending = call, wanted, weight, None
        # A float16 gradient cannot be multiplied afterwards by the upstream gradient (a loss scale): before that it
        # would overflow, or be 0.
        ctx.in_backward = call.options.reduction == "none" or wanted[1] and weight.dtype == torch.float16
        if ctx.in_backward:
            ctx.save_for_backward(hidden, weight, bias, *call.tensors())
            wanted = (False, False, False)
        loss, pending = _compute(hidden, weight, bias, call, wanted)
        if any(wanted):
            ctx.pending = pending
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("tied_cross_entropy", "hf_tying.losses.reference_cross_entropy", upstream)
        tolerance = 2 * torch.finfo(upstream.dtype).eps
        factor: torch.Tensor | None = upstream
        if ctx.in_backward:
            hidden, weight, bias, *read = ctx.saved_tensors
            _, pending = _compute(hidden, weight, bias, ctx.call.with_tensors(*read), ctx.wanted, upstream=upstream)
            factor = None
        else:
            pending, ctx.pending = ctx.pending, None
        if pending is None:
            raise second_backward(
                "tied_cross_entropy", ", or use reduction='none', which makes them in the backward pass"
            )
        hidden, weight, bias, _ = finish_gradients(pending, factor, tolerance)
        if weight is not None:
            weight = accumulate_or_claim(ctx.weight, weight)
        return hidden, weight, bias, None


def _compute(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    call: _Call,
    wanted: Sequence[bool],
    upstream: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PendingGradients]:
    """The loss, and its gradients if `wanted` (of hidden, weight, bias).

    The gradients are multiplied by `upstream`, where they are made in the backward pass, which gives it.
    """
    options, labels = call.options, call.labels.reshape(-1)
    positions = counted_positions(labels, options.ignore_index)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if positions is not None:
        labels, flat = labels[positions], flat[positions]
    products, exact = compute_dtypes(hidden, weight, options.head_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        softmax, share = _softmax(flat.to(products), weight, bias, labels, options, exact)
        rest = 1.0
        if upstream is not None:
            upstream = upstream.reshape(-1).to(exact)
            if len(upstream) > 1 and positions is not None:
                upstream = upstream[positions]
            softmax.factor = softmax.factor * upstream * (share / options.upstream)
        elif products == torch.float16:
            # Numbers as small as 1 / number of tokens vanish in float16, and a sum over them overflows: take the root.
            half_way = max(len(labels), 1) ** 0.5
            rest = half_way * share
            softmax.factor = softmax.factor / half_way
        else:
            softmax.factor = softmax.factor * share
        gradients = _allocate(softmax, wanted)
        plan = plan_chunks(
            *softmax.hidden.shape,
            vocabulary=len(weight),
            itemsize=weight.element_size(),
            exact_itemsize=exact.itemsize,
            budget=call.budget,
            gradients=bool(gradients),
            matrix_gradient=gradients.weight is not None,
            accumulates=weight.dtype == exact,
            device=weight.device.type,
        )
        losses = cross_entropy(softmax, plan, gradients)
    if options.reduction == "none":
        loss = losses if positions is None else losses.new_zeros(call.labels.numel())
        if positions is not None:
            loss[positions] = losses
        loss = loss.view(call.labels.shape)
    else:
        loss = losses.sum() * (share / options.upstream)
    dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype, None)
    return loss, PendingGradients(gradients, positions, rest / options.upstream, hidden.shape, dtypes)


def _softmax(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    options: CrossEntropyOptions,
    exact: torch.dtype,
) -> tuple[Softmax, float | torch.Tensor]:
    """The problem in the exact dtype, and what each token's loss is multiplied by for its gradient."""
    ones = torch.ones(len(labels), dtype=exact, device=hidden.device)
    kept, classes = 1 - options.label_smoothing, options.class_weight
    weights = ones if classes is None else classes.to(exact)[labels]
    smoothing = None
    if options.label_smoothing:
        smoothing = torch.ones(len(weight), dtype=exact, device=hidden.device) if classes is None else classes
        smoothing = smoothing.to(exact) * (options.label_smoothing / len(weight))
    share = options.upstream
    if options.reduction == "mean":
        count = options.num_items_in_batch
        if count is None:
            count = len(labels) if classes is None else weights.sum()
        count = count.to(ones.device, exact) if isinstance(count, torch.Tensor) else float(count)
        share = share / (torch.where(count == 0, 1.0, count) if torch.is_tensor(count) else count or 1.0)
    softmax = Softmax(
        hidden=hidden,
        weight=weight.detach(),
        bias=None if bias is None else bias.detach().to(exact),
        labels=labels,
        true_share=weights * kept,
        factor=ones,
        smoothing=smoothing,
        scale=1.0 if options.logit_scale is None else float(options.logit_scale),
        softcap=None if options.logit_softcap is None else float(options.logit_softcap),
        exact=exact,
    )
    return softmax, share


def _allocate(softmax: Softmax, wanted: Sequence[bool]) -> Gradients:
    hidden, weight, exact = softmax.hidden, softmax.weight, softmax.exact
    make = torch.empty if len(hidden) else torch.zeros
    return Gradients(
        torch.empty_like(hidden, dtype=exact) if wanted[0] else None,
        make(weight.shape, dtype=weight.dtype, device=weight.device) if wanted[1] else None,
        torch.zeros(len(weight), dtype=exact, device=weight.device) if wanted[2] else None,
    )
