"""Cross entropy over a vocabulary that is split over processes: each has some words of the matrix, and all the tokens.

Tensor parallelism gives each process a block of rows of the softmax matrix, and gathers the logits for the loss. Here
each computes the logits of its own words, chunk by chunk of the tokens, and they exchange four numbers a token: the
largest logit, the sum of exponentials against it, the target's logit, and the sum of logits for label smoothing
(Megatron-LM, Shoeybi et al. 2019, section 3, which exchanges three). The gradient of the hidden states is summed once
for each chunk; that of the matrix is each process's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .arithmetic import compute_dtypes
from .chunks import FEWEST_ROWS, MIB
from .options import CrossEntropyOptions

_BUDGET = 64 * MIB


def split_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
    group: dist.ProcessGroup,
    start: int,
    words: int,
    memory_budget: int | None = None,
) -> torch.Tensor:
    """`tied_cross_entropy` of which each process of `group` has a part of the matrix. All must call it together.

    Args:
        hidden: (..., D), floating point, the same on all processes, as is its gradient.
        weight: (v, D), the rows of this process: words `start` to `start + v - 1`. It may have none.
        labels: (...), int64, words from 0 to `words - 1`, or `options.ignore_index`; the same on all processes.
        bias: (v,), of those words.
        options: of the cross entropy; no class weights, and a scale that is a number.
        group: of the processes that have the vocabulary.
        start: the first word of this process.
        words: V, of all processes.
        memory_budget: bytes of logits at a time. Default `None`: 64 MiB.

    Returns:
        As `tied_cross_entropy`, the same on all processes.
    """
    flat, kept = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1) != options.ignore_index
    losses = _TokenLosses.apply(
        flat[kept], weight, bias, labels.reshape(-1)[kept], options, group, start, words, memory_budget or _BUDGET
    )
    if options.reduction == "none":
        return losses.new_zeros(len(kept)).masked_scatter(kept, losses).reshape(labels.shape)
    if options.reduction == "sum":
        return losses.sum()
    items = options.num_items_in_batch
    return losses.sum() / (len(losses) if items is None else items) if len(losses) else losses.sum()


class _TokenLosses(torch.autograd.Function):
    """The loss of each token, (N,), from hidden states (N, D), this process's rows (v, D) and targets (N,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: CrossEntropyOptions,
        group: dist.ProcessGroup,
        start: int,
        words: int,
        budget: int,
    ) -> torch.Tensor:
        ctx.options, ctx.group, ctx.start, ctx.words = options, group, start, words
        products, exact = compute_dtypes(hidden, weight, options.head_dtype)
        ctx.dtypes = products, exact
        rows = max(budget // (max(len(weight), 1) * exact.itemsize), FEWEST_ROWS)
        ctx.chunks = [slice(i, i + rows) for i in range(0, len(hidden), rows)]
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        log_sums = torch.empty_like(losses)
        for chunk in ctx.chunks:
            logits = _logits(ctx, hidden[chunk], weight, bias)
            log_sums[chunk], target, total = _exchanged(ctx, logits, labels[chunk])
            share = options.label_smoothing
            losses[chunk] = log_sums[chunk] - (1 - share) * target - share / words * total
        ctx.save_for_backward(hidden, weight, bias, labels, log_sums)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, log_sums = ctx.saved_tensors
        products, exact = ctx.dtypes
        options = ctx.options
        of_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device)
        of_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device)
        of_bias = None if bias is None else torch.zeros(bias.shape, dtype=exact, device=bias.device)
        for chunk in ctx.chunks:
            logits = _logits(ctx, hidden[chunk], weight, bias)
            slope = 1 if options.logit_softcap is None else 1 - (logits / options.logit_softcap).square()
            gradient = (logits - log_sums[chunk, None]).exp() - options.label_smoothing / ctx.words
            tokens, places = _own_targets(ctx, labels[chunk], len(weight))
            gradient[tokens, places] -= 1 - options.label_smoothing
            gradient = gradient * upstream[chunk, None].to(exact) * slope * (options.logit_scale or 1.0)
            if of_bias is not None:
                of_bias += gradient.sum(0)
            gradient = gradient.to(products)
            of_hidden[chunk] = (gradient @ weight.to(products)).to(exact)
            of_weight += (gradient.T @ hidden[chunk].to(products)).to(exact)
        if len(hidden):
            dist.all_reduce(of_hidden, group=ctx.group)
        of_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), of_bias, *[None] * 6


def _logits(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Those of this process's words, (n, v)."""
    products, exact = ctx.dtypes
    logits = (hidden.to(products) @ weight.to(products).T).to(exact)
    if bias is not None:
        logits = logits + bias.to(exact)
    logits = logits * (ctx.options.logit_scale or 1.0)
    cap = ctx.options.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _own_targets(ctx: Any, labels: torch.Tensor, words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens whose target is a word of this process, and that word's place in it."""
    places = labels - ctx.start
    tokens = ((places >= 0) & (places < words)).nonzero()[:, 0]
    return tokens, places[tokens]


def _exchanged(
    ctx: Any, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each token over all words: the log of the sum of exponentials, the target's logit, the sum of logits."""
    own = logits.new_zeros(4, len(logits))
    own[0] = logits.amax(1) if logits.shape[1] else float("-inf")
    own[1] = (logits - own[0, :, None]).exp().sum(1)
    tokens, places = _own_targets(ctx, labels, logits.shape[1])
    own[2, tokens] = logits[tokens, places]
    own[3] = logits.sum(1)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(ctx.group))]
    dist.all_gather(every, own, group=ctx.group)
    largest, sums, target, total = torch.stack(every).unbind(1)
    highest = largest.amax(0)
    log_sum = highest + (sums * (largest - highest).exp()).sum(0).log()
    return log_sum, target.sum(0), total.sum(0)
