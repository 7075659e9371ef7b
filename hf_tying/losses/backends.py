"""Who computes the loss: this package's own walk, or an installed kernel library that computes the same."""

from collections.abc import Callable

import torch

from .autograd import tied_path
from .options import Options

BACKENDS = ("auto", "torch", "liger", "cce")


def choose(backend: str, hidden: torch.Tensor, weight: torch.Tensor, bias, options: Options) -> Callable:
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: expected one of {BACKENDS}.")
    return tied_path
