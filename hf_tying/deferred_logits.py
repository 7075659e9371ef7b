"""Logits that are not computed yet: what a model's forward pass gets from its softmax matrix in a training step.

A forward pass does little with its logits on the way to the loss: casts, a bias, a scale, a soft cap, a shift, another
shape. `DeferredLogits` notes these down, and `cross_entropy` of it is `tied_cross_entropy` of the hidden states. So no
architecture's forward has to be written again. Asked for anything else, it becomes the logits, whole, and what follows
is computed as it always was: right, but not by blocks, and the log says so once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from .losses.cross_entropy import cross_entropy
from .losses.embedding import tied_embedding
from .losses.options import Options

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LossSettings:
    """How a model's loss is computed (see `use_tied_loss`)."""

    label_smoothing: float = 0.0
    memory_budget: int | None = None
    backend: str = "auto"


class TiedSoftmax(TorchFunctionMode):
    """While it is entered: products with `matrix` are deferred, and rows of it are looked up by `tied_embedding`.

    Args:
        matrix: the softmax matrix, which is also an embedding where the model is tied.
        settings: of the loss.
        num_items_in_batch: what the model will divide a sum of losses by, if it is told.
    """

    def __init__(self, matrix: nn.Parameter, settings: LossSettings, num_items_in_batch=None):
        super().__init__()
        self.matrix, self.settings, self.num_items_in_batch = matrix, settings, num_items_in_batch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear and self._is_matrix(_argument(args, kwargs, 1, "weight")):
            return DeferredLogits.of(self, *args, **kwargs)
        if function is F.embedding and self._is_matrix(_argument(args, kwargs, 1, "weight")):
            return _embedding(*args, **kwargs)
        return function(*args, **kwargs)

    def _is_matrix(self, weight) -> bool:
        """The parameter itself, or the view of it that a `RoleMeter` puts in its place."""
        return weight is self.matrix or getattr(weight, "_base", None) is self.matrix


def _argument(args: tuple, kwargs: dict, place: int, name: str):
    return args[place] if len(args) > place else kwargs.get(name)


def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return tied_embedding(input, weight, padding_idx)


@dataclass(frozen=True)
class DeferredLogits:
    """`steps` applied to `hidden @ weight.T + bias`, shaped like `hidden` with V in the place of D."""

    softmax: TiedSoftmax
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    #: Factors, and `None` for a tanh.
    steps: tuple[float | None, ...] = ()

    # Python's fallback, asking for items until there is none, would compute them.
    __iter__ = None

    @classmethod
    def of(cls, softmax: TiedSoftmax, hidden, weight, bias=None) -> DeferredLogits:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return cls(softmax, hidden, weight, bias, dtype)

    # --- what a tensor is asked --------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    def dim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    # --- what is noted down ------------------------------------------------------------------------------------------

    def float(self) -> DeferredLogits:
        return replace(self, dtype=torch.float32)

    def to(self, *args, **kwargs):
        dtype, device = torch._C._nn._parse_to(*_without_tensor(args), **kwargs)[1::-1]
        if device is not None and torch.empty(0, device=device).device != self.device:
            return self.whole("to another device").to(*args, **kwargs)
        return self if dtype is None else replace(self, dtype=dtype)

    def contiguous(self, *args, **kwargs) -> DeferredLogits:
        return self

    def view(self, *shape):
        return self._reshaped(shape, "view")

    def reshape(self, *shape):
        return self._reshaped(shape, "reshape")

    def _reshaped(self, shape: tuple, name: str):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        words = len(self.weight)
        lead = self.hidden.shape[:-1].numel()
        known = [size for size in shape[:-1] if size != -1]
        # -1 at the end means the words only where the sizes before it say so.
        last_is_words = bool(shape) and (
            shape[-1] == words
            or shape[-1] == -1
            and len(known) == len(shape) - 1
            and torch.Size(known).numel() == lead
        )
        if not last_is_words:
            return getattr(self.whole(name), name)(*shape)
        return replace(self, hidden=self.hidden.reshape(*shape[:-1], self.hidden.shape[-1]))

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        simple = all(isinstance(part, int | slice | torch.Tensor) or part is Ellipsis for part in parts)
        if simple:
            taken = sum(
                part.ndim if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1
                for part in parts
                if part is not Ellipsis
            )
            whole_rows = isinstance(parts[-1], slice) and parts[-1] == slice(None)
            if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
                leaves_words = whole_rows
            else:
                leaves_words = taken < self.ndim or whole_rows
            if leaves_words:
                return replace(self, hidden=self.hidden[index])
        return self.whole("an index into the words")[index]

    def __add__(self, other):
        words = len(self.weight)
        if not self.steps and isinstance(other, torch.Tensor) and other.shape in ((words,), (1, words), (1, 1, words)):
            return replace(self, bias=other.reshape(-1) if self.bias is None else self.bias + other.reshape(-1))
        return self.whole("a sum") + other

    __radd__ = __add__

    def __mul__(self, factor):
        return self._step(_number(factor)) if _number(factor) is not None else self.whole("a product") * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        return self * (1 / _number(divisor)) if _number(divisor) else self.whole("a quotient") / divisor

    mul, div = __mul__, __truediv__

    def tanh(self):
        return self.whole("a second tanh").tanh() if None in self.steps else self._step(None)

    def _step(self, step: float | None) -> DeferredLogits:
        return replace(self, steps=(*self.steps, step))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
        label_smoothing=0.0,
    ) -> torch.Tensor:  # fmt: skip
        """`torch.nn.functional.cross_entropy` of these logits, with its arguments."""
        settings = self.softmax.settings
        smoothing = label_smoothing or settings.label_smoothing
        by_class = target.ndim == self.ndim - 1 and self.ndim <= 2 and target.dtype == torch.int64
        scale, cap = self._scale_and_cap()
        if not by_class or size_average is not None or reduce is not None or scale is None:
            return F.cross_entropy(
                self.whole("this kind of loss"),
                target,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                smoothing,
            )
        options = Options(
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
            logit_scale=scale,
            logit_softcap=cap,
            class_weight=weight,
            upstream=self._upstream(reduction),
        )
        hidden, autocast = self.hidden, torch.is_autocast_enabled(self.device.type)
        if not autocast and hidden.dtype != self.weight.dtype:
            hidden = hidden.to(self.weight.dtype)
        return cross_entropy(hidden, self.weight, target, self.bias, options, settings.memory_budget, settings.backend)

    def _scale_and_cap(self) -> tuple[float | None, float | None]:
        """`cap * tanh(a * products)` is a soft cap of `a * cap * products`; a scale of `None`: neither form fits."""
        at = self.steps.index(None) if None in self.steps else len(self.steps)
        before, after = _product(self.steps[:at]), _product(self.steps[at + 1 :])
        if at == len(self.steps):
            return before, None
        return (before * after, after) if after > 0 else (None, None)

    def _upstream(self, reduction: str) -> float | torch.Tensor:
        """What a sum will be divided by: not asked of a GPU, which would have to be waited for."""
        items = self.softmax.num_items_in_batch
        if reduction != "sum" or items is None or isinstance(items, torch.Tensor) and items.numel() != 1:
            return 1.0
        if isinstance(items, torch.Tensor) and items.device.type != "cpu":
            return 1.0 / items.reshape(()).to(self.device, torch.float32)
        return 1.0 / float(items) if float(items) > 0 else 1.0

    # --- anything else -----------------------------------------------------------------------------------------------

    def whole(self, why: str) -> torch.Tensor:
        """The logits themselves, as the model's own forward makes them."""
        logger.warning_once(
            f"The logits are needed whole ({why}), so this loss is not computed by blocks; it is right all the same."
        )
        logits = self.hidden @ self.weight.t()  # not F.linear, which would be deferred again
        if self.bias is not None:
            logits = logits + self.bias
        for step in self.steps:
            logits = torch.tanh(logits) if step is None else logits * step
        return logits.to(self.dtype)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(name), name)

    @classmethod
    def __torch_function__(cls, function: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.cross_entropy and isinstance(args[0], cls):
            return args[0].cross_entropy(*args[1:], **kwargs)
        if function in (torch.tanh, torch.Tensor.tanh) and not kwargs:
            return args[0].tanh()
        if function in (torch.add, torch.Tensor.add, torch.Tensor.__add__) and len(args) == 2 and not kwargs:
            ours, other = args if isinstance(args[0], cls) else args[::-1]
            return ours + other
        name = getattr(function, "__name__", str(function))

        def known(value):
            return value.whole(name) if isinstance(value, cls) else value

        return function(*map(known, args), **{key: known(value) for key, value in kwargs.items()})


def _number(value) -> float | None:
    """`value` as a number, where it is one that nothing is to be learnt of."""
    if isinstance(value, torch.Tensor):
        return None if value.requires_grad or value.numel() != 1 else float(value)
    return float(value) if isinstance(value, int | float) else None


def _product(factors: tuple) -> float:
    result = 1.0
    for factor in factors:
        result *= factor
    return result


def _without_tensor(args: tuple) -> tuple:
    """`logits.to(other)` as `logits.to(other.device, other.dtype)`."""
    return (args[0].device, args[0].dtype, *args[1:]) if args and isinstance(args[0], torch.Tensor) else args
