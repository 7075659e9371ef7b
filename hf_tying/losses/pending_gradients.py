"""Gradients that are made in the forward pass, and multiplied by the upstream gradient in the backward pass."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Gradients:
    """The requested gradients, in the shapes of their tensors. The others are `None`.

    The caller allocates them. `hidden` and `bias` are in the exact dtype, `weight` and `embedding` (of the augmented
    loss alone) in their own.
    """

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    embedding: torch.Tensor | None = None

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return iter((self.hidden, self.weight, self.bias, self.embedding))

    def __bool__(self) -> bool:
        return any(gradient is not None for gradient in self)


def counted_positions(labels: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Indices of `labels`, (N,), that differ from `ignore_index`, in rising order, or `None` if all do."""
    positions = torch.nonzero(labels != ignore_index).view(-1)
    return None if len(positions) == len(labels) else positions


@dataclass
class PendingGradients:
    """Gradients that `finish_gradients` completes in the backward pass.

    Attributes:
        gradients: gradients of the hidden states of labels that count, and of the other tensors whole.
        positions: positions of labels that count (`counted_positions`).
        rest: factor that they lack besides the upstream gradient.
        shape: shape of the hidden states.
        dtypes: dtypes of hidden states, matrix, bias and embedding; `None` for one that is not given.
    """

    gradients: Gradients
    positions: torch.Tensor | None
    rest: float | torch.Tensor
    shape: torch.Size
    dtypes: tuple[torch.dtype | None, ...]


def finish_gradients(
    pending: PendingGradients, upstream: torch.Tensor | None, tolerance: float = 0.0
) -> list[torch.Tensor | None]:
    """The gradients of hidden, weight, bias and embedding for autograd. `pending` no longer holds them afterwards.

    Args:
        pending: gradients made in the forward pass.
        upstream: upstream gradient; `None` if it is already multiplied in.
        tolerance: distance from 1 up to which a factor is not multiplied in. On a CPU it costs nothing to read it.
    """
    gradients, pending.gradients = list(pending.gradients), Gradients()
    if upstream is not None:
        factor = upstream * pending.rest
        if factor.device.type != "cpu" or not abs(float(factor) - 1) <= tolerance:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
    shape, dtype = pending.shape, pending.dtypes[0]
    if gradients[0] is not None and pending.positions is not None:
        counted, gradients[0] = gradients[0], gradients[0].new_zeros(shape[:-1].numel(), shape[-1], dtype=dtype)
        gradients[0][pending.positions] = counted.to(dtype)
    if gradients[0] is not None:
        gradients[0] = gradients[0].view(shape)
    pairs = zip(gradients, pending.dtypes, strict=True)
    return [None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs]
