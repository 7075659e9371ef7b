"""The forward pass of a model under `use_tied_loss`: `TiedLossMixin`, which is put in front of the model's class."""

import inspect
from functools import cache

import torch
from transformers.utils import ModelOutput, logging

from ..losses.gradient import is_plain
from ..ties.slots import find_parameter
from .deferred_logits import DeferredLogits
from .step_loss import LossSettings, needs_deferred
from .tied_softmax import TiedSoftmax

logger = logging.get_logger(__name__)


class TiedLossMixin:
    """Runs a training step of the model inside `TiedSoftmax`. Any other forward pass is the model's own."""

    _tied_loss: LossSettings | None
    _softmax_name: str
    _embedding_name: str  # only with an objective
    _also_in_evaluation = False

    def forward(self, *args, **kwargs):
        forward, settings = super().forward, self._tied_loss
        vars(self).pop("loss_parts", None)  # those of the last step
        objective = None if settings is None else settings.objective
        in_step = settings is not None and (
            self.training and torch.is_grad_enabled() or objective is not None and self._also_in_evaluation
        )
        if not in_step:
            return forward(*args, **kwargs)
        if not _has_labels(type(self), args, kwargs):
            if objective is not None:
                raise needs_deferred(
                    "it has no labels; Trainer's label_smoothing_factor and compute_loss_func take them away", settings
                )
            return forward(*args, **kwargs)
        matrix = embedding = find_parameter(self, self._softmax_name)
        if objective is not None:
            embedding = find_parameter(self, self._embedding_name)
        if not is_plain(matrix) or not is_plain(embedding):
            if objective is not None:
                raise needs_deferred("the softmax matrix or the embedding is sharded, or quantised", settings)
            logger.warning_once(
                f"The softmax matrix of {type(self).__name__} is a {type(matrix).__name__} (sharded over processes, "
                "or quantised): its loss is computed by the usual path."
            )
            return forward(*args, **kwargs)
        softmax = TiedSoftmax(matrix, settings, kwargs.get("num_items_in_batch"), embedding)
        with softmax:
            outputs = forward(*args, **kwargs)
        if objective is not None:
            if not softmax.loss.parts:
                raise needs_deferred(
                    f"{type(self).__name__} asks for no cross entropy of its products with {self._softmax_name!r}",
                    settings,
                )
            others = {k: v for k, v in vars(self).get("loss_parts", {}).items() if k != "cross_entropy"}
            self.loss_parts = {**softmax.loss.parts, **others}  # `others`: penalties that the model has added itself
        elif not softmax.deferred and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{type(self).__name__} does not multiply by {self._softmax_name!r} itself (it makes another matrix "
                "of it, or an adapter stands in for it): its loss is computed by the usual path."
            )
        return _without_logits(outputs)


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


def _without_logits(outputs):
    """`outputs` with `None` in place of deferred logits."""
    if isinstance(outputs, ModelOutput):
        return type(outputs)(**{k: None if isinstance(v, DeferredLogits) else v for k, v in outputs.items()})
    if isinstance(outputs, tuple):
        return tuple(None if isinstance(value, DeferredLogits) else value for value in outputs)
    return outputs
