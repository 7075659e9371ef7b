"""Logits that are not computed yet, which a model's forward gets from its softmax matrix in a training step.

On the way to the loss a forward does little with its logits: casts, a bias, a scale, a soft cap, a shift, a reshape.
`DeferredLogits` records these operations, and its `cross_entropy` is computed from the hidden states by blocks. So the
forward of no architecture has to be rewritten. For any other operation it materializes: the logits are computed, and
the operation is applied to them. The result is the same, but it is not computed by blocks, which is logged once.

Deferred logits equal the logits that the model would have made at the same moment. So they are computed in the modes
of that moment (`CallContext`) and from the values of that moment. Before hidden states or matrix are written to, they
materialize (`before_write`). A write that could not be seen in advance is an error.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils import logging

from ..config import TyingError
from ..losses.options import CrossEntropyOptions
from ..losses.wide_linear import wide_linear
from ..ties.sharding import is_dtensor
from .call_context import CallContext, Operands
from .lazy_tensor import LazyTensor, Siblings, materialized
from .step_loss import LossSettings, StepLoss, needs_deferred

logger = logging.get_logger(__name__)


class SoftmaxOperands(NamedTuple):
    """What logits `softcap(scale * (hidden @ weight.T + bias))` are made of, in the modes of `context`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None
    context: CallContext


class DeferredLogits(LazyTensor):
    """Logits (..., V) that stand for `pending_ops` applied to `hidden @ weight.T + bias`.

    Attributes:
        hidden: hidden states, (..., D).
        weight: softmax matrix, (V, D).
        bias: bias, (V,), or `None`.
        dtype: dtype that the logits would have.
        pending_ops: operations that are not applied yet, in their order: a float is a factor, `None` is a tanh.
    """

    def __init__(
        self,
        loss: StepLoss,
        context: CallContext,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        compute: Callable,
        operands: tuple,
        pending_ops: tuple[builtins.float | None, ...] = (),
        siblings: Siblings | None = None,
    ) -> None:
        super().__init__(compute, siblings)
        self._loss, self._context = loss, context
        self.hidden, self.weight, self.bias, self.dtype = hidden, weight, bias, dtype
        self.pending_ops = pending_ops
        self._operands = Operands(operands)  # what is read only when the logits are computed

    @classmethod
    def of(
        cls,
        loss: StepLoss,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> DeferredLogits:
        """Defer `torch.nn.functional.linear(input, weight, bias)`, for the loss of this step.

        Args:
            loss: the loss of the step.
            input: (..., D), hidden states.
            weight: (V, D).
            bias: (V,), or `None`, the default.
            product: computes it from `input`, where that function cannot: a matrix that is split over processes.
                Default `None`: that function.
        """
        context = CallContext.now(input.device.type)
        dtype = context.dtype if context.autocast and input.dtype != torch.float64 else input.dtype
        wide = loss.settings.head_dtype

        def compute() -> torch.Tensor:
            if product is not None:
                return product(input)
            if wide is not None:
                return wide_linear(input, weight, bias, wide)
            return torch.ops.aten.linear.default(input, weight, bias)  # F.linear, which would be deferred again

        return cls(loss, context, input, weight, bias, wide or dtype, compute, (input, weight, bias))

    # --- properties of a tensor --------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Like `torch.Tensor.shape`."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    @property
    def device(self) -> torch.device:
        """Like `torch.Tensor.device`."""
        return self.hidden.device

    @property
    def ndim(self) -> int:
        """Like `torch.Tensor.ndim`."""
        return self.hidden.ndim

    @property
    def requires_grad(self) -> bool:
        """Like `torch.Tensor.requires_grad`."""
        tensors = (self.hidden, self.weight, self.bias)
        return self._context.grad and any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def dim(self) -> int:
        """Like `torch.Tensor.dim`."""
        return self.hidden.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Like `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        # transformers' ModelOutput tries this on its first field, where FSMT's decoder puts logits.
        raise TypeError(
            "Logits that are deferred (use_tied_loss) are not iterable. For a model that iterates over its logits in "
            "a training step: use_tied_loss(model, False)."
        )

    # --- operations that are recorded --------------------------------------------------------------------------------

    def _derive(
        self, operation: Callable[[torch.Tensor], torch.Tensor], operands: tuple = (), **changes: Any
    ) -> DeferredLogits | torch.Tensor:
        """The result of `operation`: deferred logits with `changes`; a tensor once these logits are materialized.

        Args:
            operation: function of the logits.
            operands: other values that it reads.
            **changes: new values of attributes.
        """
        if torch.is_grad_enabled() != self._context.grad:  # a copy made under no_grad has no gradient
            return operation(self.materialize("an operation with gradients switched off, or on again"))
        if self._siblings.materialized:
            return operation(self._tensor())
        self._check_operands()
        state = {name: getattr(self, name) for name in ("hidden", "weight", "bias", "dtype", "pending_ops")}
        compute = lambda: operation(self._tensor())  # noqa: E731
        return DeferredLogits(
            self._loss, self._context, **state | changes, compute=compute, operands=operands, siblings=self._siblings
        )

    def float(self) -> DeferredLogits | torch.Tensor:
        """Like `torch.Tensor.float`."""
        return self._derive(lambda logits: logits.float(), dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits | torch.Tensor:
        """Like `torch.Tensor.to`."""
        dtype, device = torch._C._nn._parse_to(*_without_tensor(args), **kwargs)[1::-1]  # pyright: ignore[reportAttributeAccessIssue]
        if device is not None and torch.empty(0, device=device).device != self.device:
            return self.materialize("to another device").to(*args, **kwargs)
        return self._derive(lambda logits: logits.to(*args, **kwargs), dtype=dtype or self.dtype)

    def contiguous(self, *args: Any, **kwargs: Any) -> DeferredLogits | torch.Tensor:
        """Like `torch.Tensor.contiguous`."""
        return self._derive(lambda logits: logits.contiguous(*args, **kwargs))

    def view(self, *shape: Any, **kwargs: Any) -> DeferredLogits | torch.Tensor:
        """Like `torch.Tensor.view`."""
        return self._reshaped("view", shape, kwargs)

    def reshape(self, *shape: Any, **kwargs: Any) -> DeferredLogits | torch.Tensor:
        """Like `torch.Tensor.reshape`."""
        return self._reshaped("reshape", shape, kwargs)

    def _reshaped(self, name: str, args: tuple, kwargs: dict) -> DeferredLogits | torch.Tensor:
        shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args
        known = [size for size in shape[:-1] if size != -1]
        keeps_words = bool(shape) and not kwargs and all(isinstance(size, int) for size in shape)
        if keeps_words and shape[-1] == -1:  # it is V if the sizes before it are as many positions as there are
            keeps_words = len(known) == len(shape) - 1 and prod(known) == self.hidden.shape[:-1].numel()
        elif keeps_words:
            keeps_words = shape[-1] == len(self.weight)
        if not keeps_words:
            return getattr(self.materialize(name), name)(*args, **kwargs)
        hidden = self.hidden.reshape(*shape[:-1], self.hidden.shape[-1])
        return self._derive(lambda logits: getattr(logits, name)(*args), hidden=hidden)

    def __getitem__(self, index: Any) -> DeferredLogits | torch.Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        if not self._keeps_words(parts):
            return self.materialize("an index into the words")[index]
        return self._derive(lambda logits: logits[index], parts, hidden=self.hidden[index])

    def _keeps_words(self, parts: tuple) -> bool:
        """Whether an index selects positions only, so that it can be applied to the hidden states instead."""
        if not parts or not all(isinstance(part, int | slice | torch.Tensor) or part is Ellipsis for part in parts):
            return False
        if isinstance(parts[-1], slice) and parts[-1] == slice(None):
            return True
        masks = [part.ndim for part in parts if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
        return all(part is not Ellipsis for part in parts) and len(parts) - len(masks) + sum(masks) < self.ndim

    def __add__(self, other: Any) -> DeferredLogits | torch.Tensor:
        words = (len(self.weight),)
        is_bias = isinstance(other, torch.Tensor) and other.ndim <= self.ndim and other.shape[-1:] == words
        if not is_bias or other.numel() != words[0] or self.pending_ops:
            return self.materialize("a sum") + other
        bias = other.reshape(-1) if self.bias is None else self.bias + other.reshape(-1)
        dtype = torch.promote_types(self.dtype, other.dtype)
        return self._derive(lambda logits: logits + other, (other,), bias=bias, dtype=dtype)

    __radd__ = __add__

    def __mul__(self, factor: Any) -> DeferredLogits | torch.Tensor:
        if (number := _as_number(factor)) is None:
            return self.materialize("a product") * factor
        return self._derive(lambda logits: logits * factor, (factor,), pending_ops=(*self.pending_ops, number))

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits | torch.Tensor:
        if not (number := _as_number(divisor)):
            return self.materialize("a quotient") / divisor
        return self._derive(lambda logits: logits / divisor, (divisor,), pending_ops=(*self.pending_ops, 1 / number))

    def div(self, divisor: Any, **kwargs: Any) -> DeferredLogits | torch.Tensor:
        """Like `torch.Tensor.div`."""
        return self.materialize("a quotient").div(divisor, **kwargs) if kwargs else self / divisor

    def tanh(self) -> DeferredLogits | torch.Tensor:
        """Like `torch.Tensor.tanh`."""
        if None in self.pending_ops:
            return self.materialize("a second tanh").tanh()
        return self._derive(torch.tanh, pending_ops=(*self.pending_ops, None))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def cross_entropy(
        self,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: builtins.float = 0.0,
    ) -> torch.Tensor:
        """Compute `torch.nn.functional.cross_entropy` of these logits, or the objective in its place.

        With gradients switched off it is a metric of the model's own, and no loss of the step.
        """
        step = self._loss if torch.is_grad_enabled() == self._context.grad else self._loss.of_a_metric()
        label_smoothing = label_smoothing or step.settings.label_smoothing
        scale, cap = self._scale_and_cap()
        by_word = target.ndim == self.ndim - 1 and self.ndim <= 2 and target.dtype == torch.int64
        fits = by_word and size_average is None and reduce is None and scale is not None
        fits = fits and not (weight is not None and is_dtensor(self.weight))  # class weights, of a split vocabulary
        if not fits or self._siblings.materialized:
            step.was_asked = True
            return F.cross_entropy(
                self.materialize("this kind of loss"), target, weight, size_average, ignore_index, reduce, reduction,
                label_smoothing,
            )  # fmt: skip
        options = CrossEntropyOptions(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            logit_scale=scale,
            logit_softcap=cap,
            class_weight=weight,
            upstream=step.expected_upstream(reduction, self.device),
            head_dtype=step.settings.head_dtype,
        )
        self._check_operands()
        with self._context.restored(grad=False):
            return step.compute(self.hidden, self.weight, target, self.bias, options, is_scaled=bool(self.pending_ops))

    @property
    def settings(self) -> LossSettings:
        """Settings of the step's loss."""
        return self._loss.settings

    def operands(self) -> SoftmaxOperands | None:
        """What the logits are made of; `None` if they are materialized, or pending operations are of another kind.

        Raises:
            TyingError: when one of them was written to since.
        """
        scale, softcap = self._scale_and_cap()
        if scale is None or self._siblings.materialized:
            return None
        self._check_operands()
        return SoftmaxOperands(self.hidden, self.weight, self.bias, scale, softcap, self._context)

    def _scale_and_cap(self) -> tuple[builtins.float | None, builtins.float | None]:
        """The pending operations as a scale and a soft cap, where `cap * tanh(a * x)` is a soft cap of `a * cap * x`.

        A scale of `None` means that they cannot be expressed so.
        """
        ops = self.pending_ops
        at = ops.index(None) if None in ops else len(ops)
        before, after = (prod(op for op in part if op is not None) for part in (ops[:at], ops[at + 1 :]))
        if at == len(ops):
            return before, None
        return (before * after, after) if after > 0 else (None, None)

    # --- any other operation -----------------------------------------------------------------------------------------

    def materialize(self, why: str) -> torch.Tensor:
        """Compute the logits (..., V) by the model's own operations, as one tensor that may be written to in place.

        Args:
            why: the operation that needs them, for the log.

        Raises:
            TyingError: for a model with an objective, and where an operand of the logits was written to since.
        """
        if self._siblings.materialized:
            return super().materialize(why)
        if self._loss.settings.objective is not None:
            raise needs_deferred(why, self._loss.settings)
        logger.warning_once(
            f"The logits are needed whole ({why}), so this loss is not computed by blocks; it is right all the same."
        )
        self._check_operands()
        with self._context.restored():
            return super().materialize(why)

    def before_write(self, tensors: list[torch.Tensor]) -> None:
        """Materialize the logits that depend on one of `tensors`, which are about to be written to.

        With an objective nothing is computed; a later use is an error.
        """
        siblings = self._siblings
        if siblings.materialized or not any(member._operands.include(tensors) for member in siblings.members):
            return
        if self._loss.settings.objective is None:
            self.materialize("hidden states or matrix are written to")
        siblings.stale = not siblings.materialized

    def _check_operands(self) -> None:
        """Refuse to compute from values that have changed.

        Raises:
            TyingError: when an operand was written to.
        """
        changed = [operand for member in list(self._siblings.members) for operand in member._operands.changed()]
        if changed or self._siblings.stale:
            what = f"a tensor of shape {tuple(changed[0].shape)}" if changed else "a tensor"
            raise TyingError(
                f"The logits of this training step are not computed yet, and {what} of which they are made was "
                "written to since the model made them: expected no write between the head and the loss. Write after "
                "the loss, or to a copy, or train with logits: use_tied_loss(model, False)."
            )

    @classmethod
    def __torch_function__(
        cls,
        function: Callable,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy and isinstance(args[0], cls):
            return args[0].cross_entropy(*args[1:], **kwargs)
        if function in (torch.tanh, torch.Tensor.tanh) and not kwargs:
            return args[0].tanh()
        if function in (torch.add, torch.Tensor.add, torch.Tensor.__add__) and len(args) == 2 and not kwargs:
            ours, other = args if isinstance(args[0], cls) else args[::-1]
            return ours + other
        name = getattr(function, "__name__", str(function))
        return function(*materialized(args, name), **materialized(kwargs, name))


def _as_number(value: object) -> float | None:
    """`value` as a float if it is a number or a one-element tensor without gradient; otherwise None."""
    if isinstance(value, torch.Tensor):
        return None if value.requires_grad or value.numel() != 1 else float(value)
    return float(value) if isinstance(value, int | float) else None


def _without_tensor(args: tuple) -> tuple:
    """Arguments of `to`, with `other.device, other.dtype` in place of a tensor `other`."""
    return (args[0].device, args[0].dtype, *args[1:]) if args and isinstance(args[0], torch.Tensor) else args
