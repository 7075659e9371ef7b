"""The forward pass of a model under `use_tied_loss`: `TiedLossMixin`, which is put in front of the model's class."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers.utils import ModelOutput, logging

from ..ties.classes import MixinBase
from ..ties.participation import Participation
from ..ties.sharding import gather_for
from ..ties.slots import matrix_at_work
from .deferred_logits import DeferredLogits
from .deferring import deferring, refuse_narrow_head, untraced_where_sharded, why_not_seen, why_whole
from .step_loss import LossSettings, needs_deferred

logger = logging.get_logger(__name__)

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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
            return self._outside_a_step(forward, settings, args, kwargs)
        if not _has_labels(type(self), args, kwargs):
            if objective is not None:
                raise needs_deferred(
                    "it has no labels; Trainer's label_smoothing_factor and compute_loss_func take them away", settings
                )
            return self._outside_a_step(forward, settings, args, kwargs)
        names = self._matrices()
        whole = why_whole(self, *names, split=objective is None)
        if whole is not None and objective is not None:
            raise needs_deferred(whole, settings)
        forward = untraced_where_sharded(self, forward)
        with deferring(self, settings, *names, whole is None, kwargs.get("num_items_in_batch")) as softmax:
            outputs = forward(*args, **kwargs)
        refuse_narrow_head(self, names[0], softmax)
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
            whole = whole or why_not_seen(self, names[0])
            logger.warning_once(f"The loss of {type(self).__name__} is computed by the usual path: {whole}.")
        return _without_logits(outputs)

    def _outside_a_step(
        self, forward: Callable[..., Any], settings: LossSettings | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A forward pass that is no training step: as of the class, but for the dtype of the head."""
        if settings is None or settings.head_dtype is None:
            return forward(*args, **kwargs)
        name = self._softmax_name
        with deferring(self, settings.without_training(), name, name, defers=False) as softmax:
            outputs = untraced_where_sharded(self, forward)(*args, **kwargs)
        refuse_narrow_head(self, name, softmax)
        return outputs

    def _matrices(self) -> tuple[str, str]:
        """The names of the softmax matrix and of the embedding that the loss reads."""
        return self._softmax_name, self._embedding_name if self._has_objective() else self._softmax_name

    def _has_objective(self) -> bool:
        return self._tied_loss is not None and self._tied_loss.objective is not None

    def hold_matrices(self) -> None:
        """Let ZeRO-3 gather the matrices of the loss for the whole of a step, not only while they are used."""
        gather_for(self, (matrix_at_work(self, name) for name in dict.fromkeys(self._matrices())))


@cache
def forward_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class's `forward` by name, `self` first; behind them those of one that it passes on to."""
    found: dict[str, inspect.Parameter] = {}
    for forward in (vars(owner)["forward"] for owner in cls.__mro__ if "forward" in vars(owner)):
        parameters = inspect.signature(forward).parameters
        found |= {name: p for name, p in parameters.items() if name not in found and p.kind not in _REST}
        if all(p.kind not in _REST for p in parameters.values()):
            break
    return found


def _has_labels(cls: type, args: tuple, kwargs: dict) -> bool:
    if kwargs.get("shift_labels") is not None:  # shifted already
        return True
    if "labels" in kwargs or not args:
        return kwargs.get("labels") is not None
    names = list(forward_parameters(cls))[1:]
    return dict(zip(names, args, strict=False)).get("labels") is not None


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
