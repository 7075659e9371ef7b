"""The forward pass of a model under `use_tied_loss`: `TiedLossMixin`, which is put in front of the model's class."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.utils import ModelOutput, logging

from ..losses.gradient import is_plain, is_transformed
from ..ties.classes import MixinBase
from ..ties.participation import Participation
from ..ties.sharding import (
    gather_for,
    is_dtensor,
    is_partitioned,
    is_row_split,
    keep_whole,
    linear_replaced_by,
    unit_of,
)
from ..ties.slots import parameter_of, slot_of
from .deferred_logits import DeferredLogits
from .step_loss import LossSettings, needs_deferred
from .tied_softmax import TiedSoftmax

logger = logging.get_logger(__name__)
_HOOKS = ("forward", "backward", "backward_pre")


class TiedLossMixin(MixinBase):
    """Mixin that runs a training step of the model inside `TiedSoftmax`. Other forward passes are unchanged."""

    _tied_loss: LossSettings | None
    _softmax_name: str
    _embedding_name: str  # only with an objective
    _also_in_evaluation = False
    _participation: Participation | None = None  # where a step without this class would have another loss

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of the model, in a training step with deferred logits."""
        forward, settings = super().forward, self._tied_loss
        vars(self).pop("loss_parts", None)  # of the previous step
        objective = None if settings is None else settings.objective
        in_step = settings is not None and (
            self.training and torch.is_grad_enabled() or objective is not None and self._also_in_evaluation
        )
        if settings is None or not in_step:
            return forward(*args, **kwargs)
        if not _has_labels(type(self), args, kwargs):
            if objective is not None:
                raise needs_deferred(
                    "it has no labels; Trainer's label_smoothing_factor and compute_loss_func take them away", settings
                )
            return forward(*args, **kwargs)
        whole = self._why_whole()
        if whole is not None and objective is not None:
            raise needs_deferred(whole, settings)
        if "torch._dynamo" in sys.modules and hasattr(self, "set_reshard_after_forward"):
            # FSDP2's hooks break the graph of a whole model, and dynamo would go on inside the mode below, which it
            # traces wrongly there. Layers that are compiled by themselves stay so.
            forward = torch.compiler.disable(forward)
        matrix, embedding = self._parameters_now()
        now = self._parameters_now if any(map(is_dtensor, (matrix, embedding))) else None
        items = kwargs.get("num_items_in_batch")
        with self._head_without_gathering(whole is None and is_row_split(matrix)) as product:
            softmax = TiedSoftmax(matrix, settings, items, embedding, whole is None, now, product)
            with softmax:
                outputs = forward(*args, **kwargs)
        if self._participation is not None and softmax.loss.was_asked:
            self._participation.took_part()
        if objective is not None:
            if not softmax.loss.parts:
                raise needs_deferred(
                    f"{type(self).__name__} asks for no cross entropy of its products with {self._softmax_name!r}",
                    settings,
                )
            others = {k: v for k, v in vars(self).get("loss_parts", {}).items() if k != "cross_entropy"}
            self.loss_parts = {**softmax.loss.parts, **others}  # `others`: penalties that the model itself adds
        elif not softmax.deferred and not torch.compiler.is_compiling():
            whole = whole or (
                f"its forward does not multiply by {self._softmax_name!r} itself: it makes another matrix of it, or "
                "an adapter stands in for it"
            )
            logger.warning_once(f"The loss of {type(self).__name__} is computed by the usual path: {whole}.")
        return _without_logits(outputs)

    def _matrices(self) -> tuple[str, str]:
        """The names of the softmax matrix and of the embedding that the loss reads."""
        return self._softmax_name, self._embedding_name if self._has_objective() else self._softmax_name

    def _has_objective(self) -> bool:
        return self._tied_loss is not None and self._tied_loss.objective is not None

    def _parameters_now(self) -> tuple[nn.Parameter, nn.Parameter]:
        matrix, embedding = self._matrices()
        return parameter_of(self, matrix), parameter_of(self, embedding)

    @contextmanager
    def _head_without_gathering(self, split: bool) -> Iterator[Callable[[torch.Tensor], torch.Tensor] | None]:
        """Let the head compute what its class does, and yield the forward that tensor parallelism has given it.

        That one gathers the logits.
        """
        head = vars(slot_of(self, self._softmax_name)[0])
        gathering = head.pop("forward", None) if split else None
        try:
            yield gathering
        finally:
            if gathering is not None:
                head["forward"] = gathering

    def hold_matrices(self) -> None:
        """Let ZeRO-3 gather the matrices of the loss for the whole of a step, not only while they are used."""
        gather_for(self, (parameter_of(self, name) for name in dict.fromkeys(self._matrices())))

    def _why_whole(self) -> str | None:
        """Reason why the logits of this step cannot be deferred; `None` if they can."""
        if (replaced := linear_replaced_by()) is not None:
            return replaced
        for name in dict.fromkeys(self._matrices()):
            parameter = parameter_of(self, name)
            if is_partitioned(parameter):
                return f"DeepSpeed ZeRO-3 has partitioned {name!r}: call use_tied_loss after deepspeed.initialize"
            if is_plain(parameter):
                continue
            if is_transformed():
                return "the step is transformed (by torch.func, forward-mode AD or a trace)"
            unit = unit_of(self, name) if is_dtensor(parameter) else None
            if unit is None and is_row_split(parameter) and not self._has_objective():
                continue
            if unit is None:
                kind = type(parameter).__name__
                return f"the softmax matrix or the embedding is a {kind} (sharded over processes, or quantised)"
            keep_whole(unit)
        hooked = _hooked(self, self._softmax_name)
        return None if hooked is None else f"a hook reads the output of {hooked!r}"


@cache
def forward_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class's `forward` by name, `self` first."""
    return dict(inspect.signature(cls.forward).parameters)


def _has_labels(cls: type, args: tuple, kwargs: dict) -> bool:
    if kwargs.get("shift_labels") is not None:  # shifted already
        return True
    if "labels" in kwargs or not args:
        return kwargs.get("labels") is not None
    names = list(forward_parameters(cls))[1:]
    return dict(zip(names, args, strict=False)).get("labels") is not None


def _hooked(model: nn.Module, name: str) -> str | None:
    """The module with a hook that is given logits, or their gradient: the head, or one around it in the model.

    A hook asks whether its output is a tensor, or changes it, and a backward hook is called for tensors alone. One
    that looks at no output says so by an attribute `reads_no_output`.

    Args:
        model: the model.
        name: name of the softmax matrix.

    Returns:
        The name of the module. `None` without such a hook, and for the matrix of an embedding, whose hooks see no
        logits.
    """
    path = name.split(".")[:-1]
    names = [".".join(path[: depth + 1]) for depth in range(len(path))]
    if not names or isinstance(model.get_submodule(names[-1]), nn.Embedding):
        return None
    everywhere = [hook for kind in _HOOKS for hook in getattr(module_hooks, f"_global_{kind}_hooks", {}).values()]
    if any(map(_reads_output, everywhere)):
        return names[-1]
    for each in names:
        module = model.get_submodule(each)
        if any(_reads_output(hook) for kind in _HOOKS for hook in getattr(module, f"_{kind}_hooks", {}).values()):
            return each
    return None


# Their own hooks pass on whatever is no tensor: torch's tracker (of `FlopCounterMode`), FSDP2, ZeRO-3.
_ENGINES = ("torch.utils.module_tracker", "torch.distributed.fsdp", "deepspeed.")


def _reads_output(hook: Callable[..., Any]) -> bool:
    """Whether a hook may look at its module's output."""
    engine = (getattr(hook, "__module__", None) or "").startswith(_ENGINES)
    return not engine and not getattr(hook, "reads_no_output", False)


def _without_logits(value: Any) -> Any:
    """`value` with `None` in place of deferred logits, also in the outputs of a part of the model."""
    if isinstance(value, DeferredLogits):
        return None
    if isinstance(value, ModelOutput):
        return type(value)(**{name: _without_logits(part) for name, part in value.items()})
    if type(value) is dict:
        return {name: _without_logits(part) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_without_logits, value))
    return type(value)(map(_without_logits, value)) if type(value) in (tuple, list) else value
