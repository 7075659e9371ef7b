"""The torch function mode of a training step: it replaces the product with the softmax matrix by deferred logits."""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..losses.embedding import tied_embedding
from ..losses.gradient import is_plain
from ..losses.wide_linear import wide_linear
from .call_context import written_to
from .deferred_logits import DeferredLogits
from .step_loss import LossSettings, StepLoss, needs_deferred


class TiedSoftmax(TorchFunctionMode):
    """Torch function mode that defers products with `matrix`, and looks up its rows by `tied_embedding`.

    Args:
        matrix: softmax matrix, (V, D); in a tied model also an embedding.
        settings: settings of the loss.
        num_items_in_batch: number by which the model will divide a sum of losses. Default `None`: the model has none.
        embedding: the input embedding, which an objective needs. Default `None`: `matrix`.
        defers: `False` leaves the products as they are. Default `True`.
        now: gives the parameters that stand for `matrix` and `embedding` at this moment: FSDP2 puts whole ones in
            their place when it gathers a unit. Default `None`: they stay.
        product: computes the logits of hidden states, where `matrix` is split over processes. Default `None`: it is
            whole.

    Attributes:
        loss: the loss of the step.
        deferred: whether a product was deferred.
        multiplied: whether there was a product at all.
    """

    def __init__(
        self,
        matrix: nn.Parameter,
        settings: LossSettings,
        num_items_in_batch: float | torch.Tensor | None = None,
        embedding: torch.Tensor | None = None,
        defers: bool = True,
        now: Callable[[], tuple[nn.Parameter, nn.Parameter]] | None = None,
        product: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.embedding = matrix if embedding is None else embedding
        self.loss = StepLoss(settings, num_items_in_batch, None if self.embedding is matrix else embedding)
        self._now, self._product = now, product
        self.defers, self.deferred, self.multiplied = defers, False, False
        self.grad, self._products = torch.is_grad_enabled(), WeakSet()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._products and (written := written_to(function, args, kwargs)):
            for product in list(self._products):
                product.before_write(written)
        if self._now is not None and function in (F.linear, F.embedding, F.cross_entropy):
            self.matrix, self.embedding = self._now()
            if self.loss.embedding is not None:
                self.loss.embedding = self.embedding
        if function is F.linear and self._is_matrix(_argument(args, kwargs, 1, "weight")):
            self.multiplied, head_dtype = True, self.loss.settings.head_dtype
            if self._is_of_step(args):
                self.deferred = True
                self._products.add(product := DeferredLogits.of(self.loss, *args, **kwargs, product=self._product))
                return product
            if head_dtype is not None:
                return _wide_linear(*args, **kwargs, dtype=head_dtype)
        if function is F.embedding and self._is_plain_embedding(_argument(args, kwargs, 1, "weight")):
            return _embedding(*args, **kwargs)
        if function is F.cross_entropy and torch.is_grad_enabled() == self.grad and self._are_logits(args[0]):
            settings = self.loss.settings
            if settings.objective is not None:
                raise needs_deferred("an adapter on the head adds to them, or they are of another matrix", settings)
            self.loss.was_asked = True
            if not kwargs.get("label_smoothing"):
                kwargs = {**kwargs, "label_smoothing": settings.label_smoothing}
        return function(*args, **kwargs)

    def _is_of_step(self, args: tuple) -> bool:
        """Whether a product is to be deferred: its operand is plain, and gradients are as in the step.

        A teacher's logits under `no_grad` are made at once.
        """
        return self.defers and torch.is_grad_enabled() == self.grad and (not args or is_plain(args[0]))

    def _are_logits(self, input: object) -> bool:
        """Whether the input of a cross entropy is logits that could not be deferred: an adapter has added to them."""
        return isinstance(input, torch.Tensor) and input.ndim > 1 and input.shape[1] == len(self.matrix)

    def _is_matrix(self, weight: object) -> bool:
        """Whether `weight` is the parameter itself, or the view of it that a `RoleMeter` puts in its place."""
        return weight is self.matrix or getattr(weight, "_base", None) is self.matrix

    def _is_plain_embedding(self, weight: torch.Tensor) -> bool:
        return is_plain(weight) and (weight is self.embedding or self._is_matrix(weight))


def _argument(args: tuple, kwargs: dict, position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _wide_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype
) -> torch.Tensor:
    return wide_linear(input, weight, bias, dtype)


def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return tied_embedding(input, weight, padding_idx)
