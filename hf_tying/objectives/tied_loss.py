"""`use_tied_loss`: a model's training steps through the tied softmax, by its own forward and its own loss."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..config import TyingConfig, TyingError
from ..losses.backends import BACKENDS
from ..losses.gradient import is_plain
from ..ties.groups import roles
from ..ties.modeling import in_front, put_in_front, taken_off
from ..ties.slots import find_parameter, why_no_parameter
from ..ties.verify import unwrapped
from .deferred_logits import DeferredLogits, LossSettings, TiedSoftmax, needs_deferred
from .objective import Objective, freeze, refuse_unfit_objective, thaw, unused_parameters

logger = logging.get_logger(__name__)


def use_tied_loss(
    model: nn.Module,
    enabled: bool = True,
    *,
    objective: Objective | None = None,
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Let `model` train through `tied_cross_entropy`, in place: same loss, same gradients, no logits.

    A training step is a forward pass of a model in training mode, with gradients and with `labels`. There the product
    with the softmax matrix is deferred until the model's own loss function asks for the cross entropy of it, and that
    is computed by blocks; a scale or a soft cap of the logits, as the config has it, is computed in them. Where the
    softmax matrix is an embedding too, its gradient is one buffer (`hf_tying.losses.gradient`).

    **In a training step `outputs.logits` is `None`**: they were never there. Everything else is as before: evaluation,
    generation, a forward pass without labels, what is saved, and the step itself where the logits are needed whole
    after all (an adapter on the head, a loss of another kind), of which the log tells once.

    Nothing is recorded in the config; `TyingConfig(loss="tied")` is the same as a declaration, kept in the file. The
    model may be tied or not.

    Gradients of such a step can be taken once: a second backward pass through it (`retain_graph=True`) is an error.

    `Trainer(label_smoothing_factor=...)` takes the labels from the model and needs its logits: that works as before,
    whole. To smooth by blocks, say so here instead.

    With an `objective` a training step has that loss in the place of its cross entropy, computed from the hidden
    states that the model would multiply with its softmax matrix, and `model.loss_parts` has the numbers of the last
    step, detached: `"cross_entropy"` and `"augmented"` (AL), or `"contrastive"` (CWT). A step that cannot have it
    (logits needed whole, no labels) raises: a model is never trained by cross entropy in its stead. Evaluation is by
    cross entropy as before.

    A contrastive objective leaves the biases of the head without a gradient, and where the model is untied the softmax
    matrix too: they are frozen until the objective is taken off again (DistributedDataParallel would wait for their
    gradients, and weight decay would shrink them). `hf_tying.training.headless` trains by it and recovers the head.

    Args:
        model: a `PreTrainedModel` with a softmax matrix and a `labels` argument, also one that PEFT has adapted or
            that is wrapped (DistributedDataParallel, torch.compile).
        enabled: `False` undoes it.
        objective: `AugmentedObjective(...)` or `ContrastiveObjective(...)` of `hf_tying.objectives`; their matrix is
            the input embedding. Default: cross entropy.
        label_smoothing: of training steps, in [0, 1). Default 0.
        memory_budget: bytes, see `tied_cross_entropy`.
        backend: see `tied_cross_entropy`.

    Returns:
        The same model.

    Raises:
        TyingError: for a model that has no softmax matrix, a quantised one, or no `labels`, and for one that
            Accelerate has prepared already. For an objective beside label smoothing or another backend, one that the
            model's embedding does not fit, and a contrastive one on a model that DistributedDataParallel wraps already
            and that has something to freeze.
        ValueError: for an unknown backend, or a label smoothing outside [0, 1).

    Example:
        >>> model = use_tied_loss(AutoModelForCausalLM.from_pretrained("gpt2"))
        >>> Trainer(model=model, args=args, train_dataset=data).train()
    """
    inner = unwrapped(model)
    if not enabled:
        thaw(inner)
        if TiedLossMixin in put_in_front(type(inner)):
            inner.__class__ = taken_off(TiedLossMixin, type(inner))
            del inner._tied_loss, inner._softmax_name
            vars(inner).pop("_embedding_name", None)
        elif isinstance(inner, TiedLossMixin):  # under a class of somebody else's: FSDP2
            inner._tied_loss = None
        if (getattr(inner.config, "tying", None) or {}).get("loss") == "tied":
            inner.config.tying = TyingConfig.from_dict(inner.config.tying).replace(loss="stock").to_dict()
        return model
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: expected one of {BACKENDS}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: expected a number in [0, 1).")
    refuse_without_softmax(inner)
    unused = []
    if objective is not None:
        refuse_unfit_objective(inner, objective, label_smoothing, backend)
        unused = unused_parameters(inner, objective)
        if unused and isinstance(model, DistributedDataParallel):
            raise TyingError(
                f"{type(objective).__name__} leaves {', '.join(unused)} without a gradient, for which this "
                "DistributedDataParallel would wait. Call use_tied_loss before the model is wrapped."
            )
    thaw(inner)
    if not isinstance(inner, TiedLossMixin):
        inner.__class__ = in_front(TiedLossMixin, type(inner))
    inner._tied_loss = LossSettings(label_smoothing, memory_budget, backend, objective)
    inner._softmax_name = roles(inner)["output"][-1]
    freeze(inner, unused)
    if objective is not None:
        inner._embedding_name = roles(inner)["target"][-1]
        logger.info(f"{type(inner).__name__}: training steps have the loss of {objective}; their logits are None.")
        return model
    logger.info(f"{type(inner).__name__}: training steps compute their loss by blocks; their logits are None.")
    return model


def objective_of(model: nn.Module) -> Objective | None:
    """The objective that `use_tied_loss` has set for `model`; `None` where it trains by cross entropy."""
    settings = getattr(unwrapped(model), "_tied_loss", None)
    return None if settings is None else settings.objective


@contextmanager
def evaluated_by_objective(model: nn.Module) -> Iterator[None]:
    """While this is open, `model` has the loss of its objective outside training too, and no logits."""
    inner = unwrapped(model)
    inner._also_in_evaluation = True
    try:
        yield
    finally:
        vars(inner).pop("_also_in_evaluation", None)


def has_tied_loss(model: nn.Module) -> bool:
    """Whether `use_tied_loss` is in force for `model`."""
    return getattr(unwrapped(model), "_tied_loss", None) is not None


class TiedLossMixin:
    """What `use_tied_loss` puts in front of a model's class."""

    _tied_loss: LossSettings | None
    _softmax_name: str
    _embedding_name: str  # where there is an objective
    _also_in_evaluation = False

    def forward(self, *args, **kwargs):
        forward, settings = super().forward, self._tied_loss
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
            vars(self).pop("loss_parts", None)  # of the step before
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
            if not softmax.parts:
                raise needs_deferred(
                    f"{type(self).__name__} asks for no cross entropy of its products with {self._softmax_name!r}",
                    settings,
                )
            others = {k: v for k, v in vars(self).get("loss_parts", {}).items() if k != "cross_entropy"}
            self.loss_parts = {**softmax.parts, **others}  # those that the model has set itself: penalties
        elif not softmax.deferred and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{type(self).__name__} does not multiply by {self._softmax_name!r} itself (it makes another matrix "
                "of it, or an adapter stands in for it): its loss is computed by the usual path."
            )
        return _without_logits(outputs)


def refuse_without_softmax(model: PreTrainedModel) -> None:
    """Whether `use_tied_loss` can have `model`.

    Raises:
        TyingError: with the reason.
    """
    name = type(model).__name__
    if "forward" in vars(model) and not isinstance(model, TiedLossMixin):
        raise TyingError(
            f"The forward of this {name} is wrapped already (by Accelerate's prepare or dispatch_model): what is put "
            "in front of its class would not be run. Call use_tied_loss(model) before."
        )
    if "labels" not in _parameters(type(model)):
        raise TyingError(
            f"{name} computes no loss itself: its forward takes no `labels`. Expected a model with a head."
        )
    if "output" not in roles(model):
        raise TyingError(
            f"{name} has no softmax matrix (get_output_embeddings() has none): its loss is over no vocabulary, and "
            "there is nothing to compute by blocks."
        )
    output = roles(model)["output"][-1]
    matrix = find_parameter(model, output)
    if matrix is None or not matrix.is_floating_point():
        state = f"is of dtype {matrix.dtype}" if matrix is not None else why_no_parameter(model, output)
        raise TyingError(f"The softmax matrix of {name}, {output!r}, {state}: expected a floating-point parameter.")


@cache
def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls.forward).parameters)


def _has_labels(cls: type, args: tuple, kwargs: dict) -> bool:
    if kwargs.get("shift_labels") is not None:  # shifted already
        return True
    if "labels" in kwargs or not args:
        return kwargs.get("labels") is not None
    names = list(_parameters(cls))[1:]
    return dict(zip(names, args, strict=False)).get("labels") is not None


def _without_logits(outputs):
    """`outputs`, with `None` for logits that were never computed."""
    if isinstance(outputs, ModelOutput):
        return type(outputs)(**{k: None if isinstance(v, DeferredLogits) else v for k, v in outputs.items()})
    if isinstance(outputs, tuple):
        return tuple(None if isinstance(value, DeferredLogits) else value for value in outputs)
    return outputs
