"""`tied_embedding`: rows of a matrix whose gradient goes into the one buffer that the softmax has made."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .arithmetic import add_rows
from .gradient import claim, claimed_gradient, expected_refcounts, is_plain, refuse_double_backward


def tied_embedding(input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """Look up rows of `weight`, as `torch.nn.functional.embedding` does, beside `tied_cross_entropy`.

    Values and gradients are the same. In a backward pass in which the softmax has already given its gradient of the
    same `weight`, the rows are added into that one: no second V x D matrix, and no third for the sum. Otherwise the
    gradient is its own, as in torch. In half precision, rows of one word are summed in float32 and rounded once.

    Args:
        input_ids: ids of words, of any shape and integer dtype, from 0 to V - 1.
        weight: matrix, (V, D), floating point.
        padding_idx: id of a word whose row gets no gradient from here (from the softmax it does). Default `None`.
            Negative values count from the end, as in torch.

    Returns:
        `(*input_ids.shape, D)`, in the dtype of `weight`.

    Raises:
        IndexError: for an id outside the vocabulary, as in torch.
        RuntimeError: for ids that are not integers; in the backward pass, when asked for a gradient of the gradient
            (`create_graph=True`).

    Source: Press & Wolf 2016, section 3: the gradient of a tied matrix is the sum over its uses.

    Example (the reference):
        >>> torch.nn.functional.embedding(input_ids, weight, padding_idx)
    """
    trained = weight.requires_grad and torch.is_grad_enabled()
    if not trained or torch.compiler.is_compiling() or not is_plain(weight):
        return F.embedding(input_ids, weight, padding_idx)
    return _TiedEmbedding.apply(input_ids, weight, padding_idx)


class TiedEmbedding(nn.Embedding):
    """`torch.nn.Embedding` whose gradient goes into the one buffer of `tied_cross_entropy` (see `tied_embedding`).

    Args: as for `torch.nn.Embedding`. Its `max_norm`, `scale_grad_by_freq` and `sparse` are not taken.

    Raises:
        ValueError: for one of these three.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(self, option):
                raise ValueError(f"TiedEmbedding does not know {option}: a tied matrix has one dense gradient.")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows (..., D) of the ids `input` (...)."""
        return tied_embedding(input, self.weight, self.padding_idx)


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        expected_refcounts()  # measured here, so that no backward pass has to run another for it
        ctx.save_for_backward(input_ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(input_ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        refuse_double_backward("tied_embedding", "torch.nn.functional.embedding", upstream)
        (input_ids,), weight = ctx.saved_tensors, ctx.weight
        ids, rows = input_ids.reshape(-1).long(), upstream.reshape(-1, weight.shape[1])
        if ctx.padding_idx is not None:
            used = ids != ctx.padding_idx % len(weight)
            ids, rows = ids[used], rows[used]
        claimed = claimed_gradient(weight)
        if claimed is not None:
            add_rows(claimed, ids, rows)
            return None, None, None
        gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        add_rows(gradient, ids, rows)
        claim(weight, gradient)
        return None, gradient, None
