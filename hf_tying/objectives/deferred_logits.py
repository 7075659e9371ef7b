"""Logits that are not computed yet: what a model's forward pass gets from its softmax matrix in a training step.

A forward pass does little with its logits on the way to the loss: casts, a bias, a scale, a soft cap, a shift, another
shape. `DeferredLogits` notes these down, and `cross_entropy` of it is `tied_cross_entropy` of the hidden states. So no
architecture's forward has to be written again. Asked for anything else, it becomes the logits, whole, and what follows
is computed as it always was: right, but not by blocks, and the log says so once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from ..config import TyingError
from ..losses.cross_entropy import cross_entropy
from ..losses.embedding import tied_embedding
from ..losses.options import Options
from .objective import Objective

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LossSettings:
    """How a model's loss is computed (see `use_tied_loss`)."""

    label_smoothing: float = 0.0
    memory_budget: int | None = None
    backend: str = "auto"
    objective: Objective | None = None


class TiedSoftmax(TorchFunctionMode):
    """While it is entered: products with `matrix` are deferred, and rows of it are looked up by `tied_embedding`.

    Args:
        matrix: the softmax matrix, which is also an embedding where the model is tied.
        settings: of the loss.
        num_items_in_batch: what the model will divide a sum of losses by, if it is told.
        embedding: the input embedding, for an objective. Default: `matrix`.

    Attributes:
        deferred: whether there has been such a product.
        parts: of the loss by the objective, detached, as the model will divide them; empty until it is asked for.
    """

    def __init__(self, matrix: nn.Parameter, settings: LossSettings, num_items_in_batch=None, embedding=None):
        super().__init__()
        self.matrix, self.settings, self.num_items_in_batch = matrix, settings, num_items_in_batch
        self.embedding = matrix if embedding is None else embedding
        self.deferred = False
        self.parts: dict[str, torch.Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear and self._is_matrix(_argument(args, kwargs, 1, "weight")):
            self.deferred = True
            return DeferredLogits.of(self, *args, **kwargs)
        if function is F.embedding and self._is_embedding(_argument(args, kwargs, 1, "weight")):
            return _embedding(*args, **kwargs)
        if function is F.cross_entropy and self._is_over_words(args[0]):
            if self.settings.objective is not None:
                raise needs_deferred(
                    "an adapter on the head adds to them, or they are of another matrix", self.settings
                )
            if not kwargs.get("label_smoothing"):
                kwargs = {**kwargs, "label_smoothing": self.settings.label_smoothing}
        return function(*args, **kwargs)

    def _is_over_words(self, logits) -> bool:
        """Logits that could not be deferred: an adapter on the head has added to them."""
        return isinstance(logits, torch.Tensor) and logits.ndim > 1 and logits.shape[1] == len(self.matrix)

    def _is_matrix(self, weight) -> bool:
        """The parameter itself, or the view of it that a `RoleMeter` puts in its place."""
        return weight is self.matrix or getattr(weight, "_base", None) is self.matrix

    def _is_embedding(self, weight) -> bool:
        return weight is self.embedding or self._is_matrix(weight)


def needs_deferred(why: str, settings: LossSettings) -> TyingError:
    """An objective takes the place of the cross entropy, which is not computed in its stead unasked."""
    return TyingError(
        f"This training step needs its logits whole ({why}), and {type(settings.objective).__name__} is computed from "
        "the hidden states before them: expected a model that multiplies them by its softmax matrix itself and asks "
        "for the cross entropy of that with its labels. Train it by cross entropy: use_tied_loss(model)."
    )


def _argument(args: tuple, kwargs: dict, place: int, name: str):
    return args[place] if len(args) > place else kwargs.get(name)


def _embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return tied_embedding(input, weight, padding_idx)


class _Family:
    """All that was made of one product: once one of them is whole, and may be written into, all are."""

    def __init__(self):
        self.whole = False
        self.members: WeakSet[DeferredLogits] = WeakSet()


class DeferredLogits:
    """`steps` applied to `hidden @ weight.T + bias`, shaped like `hidden` with V in the place of D.

    Attributes:
        hidden: (..., D).
        weight: (V, D).
        bias: (V,) or `None`.
        dtype: that the logits would have.
        steps: factors, in their order, and `None` for a tanh.
    """

    def __init__(self, by: TiedSoftmax, hidden, weight, bias, dtype, make: Callable, steps=(), family=None):
        self._by, self.hidden, self.weight, self.bias, self.dtype = by, hidden, weight, bias, dtype
        self.steps: tuple[float | None, ...] = steps
        self._make, self._made, self._family = make, None, family or _Family()
        self._family.members.add(self)

    @classmethod
    def of(cls, by: TiedSoftmax, input, weight, bias=None) -> DeferredLogits:
        """In the place of `torch.nn.functional.linear(input, weight, bias)`."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype

        def product():
            products = input @ weight.t()  # not F.linear, which would be deferred again
            return products if bias is None else products + bias

        return cls(by, input, weight, bias, dtype, product)

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

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad or self.weight.requires_grad

    def dim(self) -> int:
        return self.hidden.ndim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        # transformers' ModelOutput tries this on its first field, where FSMT's decoder puts logits.
        raise TypeError(
            "Logits that are deferred (use_tied_loss) are not iterable. For a model that iterates over its logits in "
            "a training step: use_tied_loss(model, False)."
        )

    # --- what is noted down ------------------------------------------------------------------------------------------

    def _noted(self, operation: Callable[[torch.Tensor], torch.Tensor], **changes) -> DeferredLogits | torch.Tensor:
        """What `operation` makes of these logits: themselves with `changes`, as long as all are deferred."""
        if self._family.whole:
            return operation(self._logits())
        state = {name: getattr(self, name) for name in ("hidden", "weight", "bias", "dtype", "steps")}
        make = lambda: operation(self._logits())  # noqa: E731
        return DeferredLogits(self._by, **state | changes, make=make, family=self._family)

    def float(self):
        return self._noted(lambda logits: logits.float(), dtype=torch.float32)

    def to(self, *args, **kwargs):
        dtype, device = torch._C._nn._parse_to(*_without_tensor(args), **kwargs)[1::-1]
        if device is not None and torch.empty(0, device=device).device != self.device:
            return self.whole("to another device").to(*args, **kwargs)
        return self._noted(lambda logits: logits.to(*args, **kwargs), dtype=dtype or self.dtype)

    def contiguous(self, *args, **kwargs):
        return self._noted(lambda logits: logits.contiguous(*args, **kwargs))

    def view(self, *shape, **kwargs):
        return self._reshaped("view", shape, kwargs)

    def reshape(self, *shape, **kwargs):
        return self._reshaped("reshape", shape, kwargs)

    def _reshaped(self, name: str, args: tuple, kwargs: dict):
        shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args
        words, lead = len(self.weight), self.hidden.shape[:-1].numel()
        known = [size for size in shape[:-1] if size != -1]
        keeps_words = bool(shape) and not kwargs and all(isinstance(size, int) for size in shape)
        if keeps_words and shape[-1] == -1:  # the words, where the sizes before it say so
            keeps_words = len(known) == len(shape) - 1 and torch.Size(known).numel() == lead
        elif keeps_words:
            keeps_words = shape[-1] == words
        if not keeps_words:
            return getattr(self.whole(name), name)(*args, **kwargs)
        hidden = self.hidden.reshape(*shape[:-1], self.hidden.shape[-1])
        return self._noted(lambda logits: getattr(logits, name)(*args), hidden=hidden)

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if not self._leaves_words(parts):
            return self.whole("an index into the words")[index]
        return self._noted(lambda logits: logits[index], hidden=self.hidden[index])

    def _leaves_words(self, parts: tuple) -> bool:
        """Whether an index chooses among the tokens only, so that it is one of the hidden states too."""
        if not parts or not all(isinstance(part, int | slice | torch.Tensor) or part is Ellipsis for part in parts):
            return False
        if isinstance(parts[-1], slice) and parts[-1] == slice(None):
            return True
        masks = [part.ndim for part in parts if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
        return all(part is not Ellipsis for part in parts) and len(parts) - len(masks) + sum(masks) < self.ndim

    def __add__(self, other):
        words = (len(self.weight),)
        is_bias = isinstance(other, torch.Tensor) and other.ndim <= self.ndim and other.shape[-1:] == words
        if not is_bias or other.numel() != words[0] or self.steps:
            return self.whole("a sum") + other
        bias = other.reshape(-1) if self.bias is None else self.bias + other.reshape(-1)
        return self._noted(
            lambda logits: logits + other, bias=bias, dtype=torch.promote_types(self.dtype, other.dtype)
        )

    __radd__ = __add__

    def __mul__(self, factor):
        if (number := _number(factor)) is None:
            return self.whole("a product") * factor
        return self._noted(lambda logits: logits * factor, steps=(*self.steps, number))

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor):
        if not (number := _number(divisor)):
            return self.whole("a quotient") / divisor
        return self._noted(lambda logits: logits / divisor, steps=(*self.steps, 1 / number))

    def div(self, divisor, **kwargs):
        return self.whole("a quotient").div(divisor, **kwargs) if kwargs else self / divisor

    def tanh(self):
        if None in self.steps:
            return self.whole("a second tanh").tanh()
        return self._noted(torch.tanh, steps=(*self.steps, None))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def cross_entropy(
        self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
        label_smoothing=0.0,
    ) -> torch.Tensor:  # fmt: skip
        """`torch.nn.functional.cross_entropy` of these logits, with its arguments."""
        settings = self._by.settings
        label_smoothing = label_smoothing or settings.label_smoothing
        scale, cap = self._scale_and_cap()
        by_word = target.ndim == self.ndim - 1 and self.ndim <= 2 and target.dtype == torch.int64
        if not by_word or size_average is not None or reduce is not None or scale is None or self._family.whole:
            return F.cross_entropy(
                self.whole("this kind of loss"), target, weight, size_average, ignore_index, reduce, reduction,
                label_smoothing,
            )  # fmt: skip
        options = Options(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            logit_scale=scale,
            logit_softcap=cap,
            class_weight=weight,
            upstream=self._upstream(reduction),
        )
        if settings.objective is not None:
            return self._by_objective(target, options)
        return cross_entropy(
            self.hidden, self.weight, target, self.bias, options, settings.memory_budget, settings.backend
        )

    def _by_objective(self, target, options: Options) -> torch.Tensor:
        by, objective = self._by, self._by.settings.objective
        if not objective.needs_softmax and self.steps:
            logger.warning_once(
                f"{type(objective).__name__} takes no notice of what this model does to its logits (a scale or a soft "
                "cap): it has none."
            )
        # Tied, it is the use by the head; a `RoleMeter` has put a view of its own in its place.
        embedding = self.weight if by.embedding is by.matrix else by.embedding
        loss, parts = objective.loss(
            self.hidden, self.weight, target, self.bias, options, embedding, by.settings.memory_budget
        )
        for name, part in parts.items():
            by.parts[name] = by.parts.get(name, 0.0) + part * options.upstream
        return loss

    def _scale_and_cap(self) -> tuple[float | None, float | None]:
        """`cap * tanh(a * products)` is a soft cap of `a * cap * products`; a scale of `None`: neither form fits."""
        at = self.steps.index(None) if None in self.steps else len(self.steps)
        before, after = prod(self.steps[:at]), prod(self.steps[at + 1 :])
        if at == len(self.steps):
            return before, None
        return (before * after, after) if after > 0 else (None, None)

    def _upstream(self, reduction: str) -> float | torch.Tensor:
        """What a sum will be divided by: not asked of a GPU, which would have to be waited for."""
        items = self._by.num_items_in_batch
        if reduction != "sum" or items is None or isinstance(items, torch.Tensor) and items.numel() != 1:
            return 1.0
        if isinstance(items, torch.Tensor) and items.device.type != "cpu":
            return 1.0 / items.reshape(()).to(self.device, torch.float32)
        return 1.0 / float(items) if float(items) > 0 else 1.0

    # --- anything else -----------------------------------------------------------------------------------------------

    def whole(self, why: str) -> torch.Tensor:
        """The logits themselves, as the model's own forward makes them: one tensor, which may be written into.

        Raises:
            TyingError: where an objective is set.
        """
        if self._by.settings.objective is not None:
            raise needs_deferred(why, self._by.settings)
        logger.warning_once(
            f"The logits are needed whole ({why}), so this loss is not computed by blocks; it is right all the same."
        )
        if not self._family.whole:
            self._family.whole = True
            for member in list(self._family.members):
                member._logits()  # before anything is written: a copy stays what it was
        return self._logits()

    def _logits(self) -> torch.Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made

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
        return function(*_whole(args, name), **_whole(kwargs, name))


def _by_whole(name: str) -> Callable:
    return lambda self, *args: getattr(self.whole(name), name)(*args)


# Python looks these up on the class, not by `__getattr__`.
for _name in (
    *("sub", "rsub", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul"),
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "neg", "pos", "abs", "invert"),
    *("and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "float", "contains", "setitem"),
):
    setattr(DeferredLogits, f"__{_name}__", _by_whole(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__


def _whole(value, why: str):
    """`value` with logits for deferred ones, in lists and dicts too."""
    if isinstance(value, DeferredLogits):
        return value.whole(why)
    if isinstance(value, tuple | list):
        return type(value)(_whole(part, why) for part in value)
    if isinstance(value, dict):
        return {key: _whole(part, why) for key, part in value.items()}
    return value


def _number(value) -> float | None:
    """`value` as a number, where it is one that nothing is to be learnt of."""
    if isinstance(value, torch.Tensor):
        return None if value.requires_grad or value.numel() != 1 else float(value)
    return float(value) if isinstance(value, int | float) else None


def _without_tensor(args: tuple) -> tuple:
    """`logits.to(other)` as `logits.to(other.device, other.dtype)`."""
    return (args[0].device, args[0].dtype, *args[1:]) if args and isinstance(args[0], torch.Tensor) else args
