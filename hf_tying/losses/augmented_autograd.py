"""The augmented loss for autograd: gradients are made in the forward pass, and returned once in the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch

from .arithmetic import compute_dtypes
from .augmented_walk import AugmentedSoftmax, augmented_sums
from .chunks import default_budget
from .gradient import accumulate_or_claim, refuse_double_backward, second_backward
from .options import AugmentedSettings, CrossEntropyOptions
from .pending_gradients import Gradients, PendingGradients, counted_positions, finish_gradients


def augmented_path(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    settings: AugmentedSettings,
    options: CrossEntropyOptions,
    memory_budget: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The augmented loss and its cross entropy by this package's own walk; the arguments have been checked."""
    budget = default_budget(*weight.shape, itemsize=weight.element_size()) if memory_budget is None else memory_budget
    return _TiedAugmentedLoss.apply(
        hidden, weight, bias, embedding, labels, settings, options, budget, torch.is_grad_enabled()
    )


class _TiedAugmentedLoss(torch.autograd.Function):
    """Autograd function of (total, cross entropy), the second without a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        embedding: torch.Tensor | None,
        labels: torch.Tensor,
        settings: AugmentedSettings,
        options: CrossEntropyOptions,
        budget: int,
        differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[:4] if differentiable else (False,) * 4
        total, cross_entropy, pending = _compute(
            hidden, weight, bias, embedding, labels, settings, options, budget, wanted
        )
        ctx.weight, ctx.embedding, ctx.pending = weight, embedding, pending if any(wanted) else None
        ctx.mark_non_differentiable(cross_entropy)
        return total, cross_entropy

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("augmented_loss", "hf_tying.losses.augmented.reference_augmented_loss", upstream)
        pending, ctx.pending = ctx.pending, None
        if pending is None:
            raise second_backward("augmented_loss")
        hidden, weight, bias, embedding = finish_gradients(pending, upstream)
        if weight is not None:
            weight = accumulate_or_claim(ctx.weight, weight)
        if embedding is not None:
            embedding = accumulate_or_claim(ctx.embedding, embedding)
        return hidden, weight, bias, embedding, None, None, None, None, None


def _compute(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    labels: torch.Tensor,
    settings: AugmentedSettings,
    options: CrossEntropyOptions,
    budget: int,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, PendingGradients]:
    """The total, the cross entropy, and gradients of the total if `wanted` (of hidden, weight, bias, embedding)."""
    labels = labels.reshape(-1)
    positions = counted_positions(labels, options.ignore_index)
    flat = hidden.reshape(-1, hidden.shape[-1]).detach()
    if positions is not None:
        flat, labels = flat[positions], labels[positions]
    products, exact = compute_dtypes(hidden, weight)
    share = 1.0 / _items(options, labels, exact)
    # Gradients are made with the share of a position, except in float16, where such small numbers would vanish.
    unit = max(len(labels), 1) ** -0.5 if products == torch.float16 else share
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = _allocate(flat, weight, bias, embedding, wanted, exact)
        losses = torch.zeros(2, dtype=exact, device=hidden.device)
        if len(labels):
            problem = AugmentedSoftmax(
                hidden=flat,
                weight=weight.detach(),
                bias=None if bias is None else bias.detach(),
                embedding=None if embedding is None else embedding.detach(),
                labels=labels,
                settings=settings,
                scale=1.0 if options.logit_scale is None else float(options.logit_scale),
                products=products,
                exact=exact,
            )
            losses = torch.stack(augmented_sums(problem, gradients, unit, budget))
        cross_entropy = losses[0] * share
        total = float(settings.cross_entropy_weight) * cross_entropy
        if alpha := settings.divergence_weight:
            total = total + alpha * share * losses[1]
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias, embedding))
    return total, cross_entropy, PendingGradients(gradients, positions, share / unit, hidden.shape, dtypes)


def _items(options: CrossEntropyOptions, labels: torch.Tensor, exact: torch.dtype) -> float | torch.Tensor:
    """Divisor of the sum over `labels`, all of which count. It is not 0."""
    count = 1 if options.reduction == "sum" else options.num_items_in_batch
    if isinstance(count, torch.Tensor):
        count = count.to(labels.device, exact)
        return count.masked_fill(count == 0, 1)
    return (len(labels) if count is None else count) or 1


def _allocate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    embedding: torch.Tensor | None,
    wanted: Sequence[bool],
    exact: torch.dtype,
) -> Gradients:
    """Zeros for the gradients that are `wanted`; not in float16, whose range is too small before they are finished."""

    def zeros(tensor: torch.Tensor | None, wanted: bool, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        if tensor is None or not wanted:
            return None
        dtype = dtype or (exact if tensor.dtype == torch.float16 else tensor.dtype)
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

    return Gradients(
        zeros(hidden, wanted[0], exact),
        zeros(weight, wanted[1]),
        zeros(bias, wanted[2], exact),
        zeros(embedding, wanted[3]),
    )
