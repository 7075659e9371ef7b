"""`use_tied_loss`: train a model through the tied softmax, with its own forward and its own loss function."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingConfig, TyingError
from ..losses.backends import BACKENDS
from ..ties.anatomy import roles
from ..ties.classes import mixins_of, with_mixin, without_mixin
from ..ties.participation import Participation, module_of
from ..ties.slots import find_parameter, parameter_of, why_no_parameter
from ..ties.verify import unwrapped
from .objective import Objective, freeze_unused, refuse_unfit_objective, unfreeze_unused, unused_parameters
from .own_loss import set_accepts_loss_kwargs
from .step_loss import LossSettings
from .tied_loss_mixin import TiedLossMixin, forward_parameters

logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def use_tied_loss(
    model: Model,
    enabled: bool = True,
    *,
    objective: Objective | None = None,
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    backend: str = "auto",
    head_dtype: str | torch.dtype | None = None,
) -> Model:
    """Let `model` train through `tied_cross_entropy`, in place: same loss, same gradients, no logits.

    A training step is a forward pass in training mode, with gradients and with `labels`. In it, the product with the
    softmax matrix is deferred until the model's own loss function asks for its cross entropy, which is then computed
    by blocks. A scale or a soft cap of the logits is computed within the blocks. If the softmax matrix is also an
    embedding, both uses write their gradient into one buffer (`hf_tying.losses.gradient`).

    **In a training step `outputs.logits` is `None`**, since they are not computed. Everything else is as before:
    evaluation, generation, a forward pass without labels, and saved files. A step that needs all its logits (an
    adapter on the head, a hook on it, a loss of another kind, hidden states written to before the loss) computes them
    as before; the log says so once. Logits that the model makes under `no_grad` in its step are its own too.

    A model that gives the mean of its losses is marked so for `Trainer` (`set_accepts_loss_kwargs`). The mark stays
    when this is undone.

    Nothing is recorded in the config. `TyingConfig(loss="tied")` declares the same, and is kept in the file. The model
    may be tied or not.

    The backward pass of such a step runs once: a second one through it (`retain_graph=True`) is an error.

    `Trainer(label_smoothing_factor=...)` takes the labels away from the model and uses its logits, as before. To
    compute a smoothed loss by blocks, give `label_smoothing` here instead.

    With an `objective`, a training step has that loss in place of its cross entropy, computed from the hidden states
    before the softmax matrix. `model.loss_parts` holds the parts of the last step's loss, detached: `"cross_entropy"`
    and `"augmented"` (AL), or `"contrastive"` (CWT). A step that cannot have the objective (it needs all its logits,
    or has no labels) raises; it is never trained by cross entropy instead. Evaluation is by cross entropy as before.

    A training step in which the objective, or a label smoothing, took no part raises too, and says who computed the
    loss around the model (TRL's trainers, Liger's kernels).

    A contrastive objective gives no gradient to the biases of the head and, in an untied model, to the softmax matrix.
    They are frozen until the objective is removed: DistributedDataParallel would wait for their gradients, and weight
    decay would shrink them. `hf_tying.training.headless` trains with it and recovers the head.

    Args:
        model: a `PreTrainedModel` with a softmax matrix and a `labels` argument. PEFT may have adapted it, and
            DistributedDataParallel or torch.compile may wrap it.
        enabled: `False` undoes it. Default `True`.
        objective: `AugmentedObjective(...)` or `ContrastiveObjective(...)` of `hf_tying.objectives`, computed with the
            input embedding. Default `None`: cross entropy.
        label_smoothing: label smoothing of training steps, in [0, 1). Default 0.
        memory_budget: memory for blocks in bytes, see `tied_cross_entropy`. Default `None`.
        backend: implementation of the loss, see `tied_cross_entropy`. Default `"auto"`.
        head_dtype: dtype of the head, `"float32"` or `"float64"`: logits, losses and gradients are computed in it from
            the matrix as it is, which is converted block by block. It holds in evaluation and generation too, whose
            logits are in it. In half precision the head is where reinforcement learning loses most to rounding
            (Khatri et al. 2025, ScaleRL, section 3). Default `None`: that of the model.

    Returns:
        The same model.

    Raises:
        TyingError: for a model without a softmax matrix or `labels`, with a quantised softmax matrix, or prepared by
            Accelerate already. For an objective together with label smoothing or another backend, and one that does
            not fit the model's embedding. For a `head_dtype` together with an objective or another backend, and in a
            forward pass whose model does not multiply by the matrix itself. For a contrastive objective with something
            to freeze in a model that DistributedDataParallel wraps already.
        ValueError: for an unknown backend or `head_dtype`, or a label smoothing outside [0, 1).

    Example:
        >>> model = use_tied_loss(AutoModelForCausalLM.from_pretrained("gpt2"))
        >>> Trainer(model=model, args=args, train_dataset=data).train()
    """
    inner = unwrapped(model)
    if not enabled:
        unfreeze_unused(inner)
        _stop_watching(inner)
        if TiedLossMixin in mixins_of(type(inner)):
            inner.__class__ = without_mixin(TiedLossMixin, type(inner))
            del inner._tied_loss, inner._softmax_name
            vars(inner).pop("_embedding_name", None)
        elif isinstance(inner, TiedLossMixin):  # FSDP2 has put its own class in front
            inner._tied_loss = None
        if (getattr(inner.config, "tying", None) or {}).get("loss") == "tied":
            inner.config.tying = TyingConfig.from_dict(inner.config.tying).replace(loss="stock").to_dict()
        return model
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: expected one of {BACKENDS}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: expected a number in [0, 1).")
    wide = _head_dtype(head_dtype, objective, backend)
    refuse_misfit(inner, "tied")
    if wide is not None:
        _refuse_other_head(inner)
    unused = []
    if objective is not None:
        refuse_unfit_objective(inner, objective, label_smoothing, backend)
        unused = unused_parameters(inner, objective)
        if unused and isinstance(model, DistributedDataParallel):
            raise TyingError(
                f"{type(objective).__name__} leaves {', '.join(unused)} without a gradient, for which this "
                "DistributedDataParallel would wait. Call use_tied_loss before the model is wrapped."
            )
    unfreeze_unused(inner)
    _stop_watching(inner)
    if objective is not None or label_smoothing:
        what = type(objective).__name__ if objective is not None else f"label_smoothing={label_smoothing}"
        participation = Participation(
            f"{what} of use_tied_loss",
            "Train with transformers' Trainer, which runs the model's own forward; or by plain cross entropy: "
            "use_tied_loss(model).",
        )
        participation.watch(inner)
        vars(inner)["_participation"] = participation
    set_accepts_loss_kwargs(inner)
    if not isinstance(inner, TiedLossMixin):
        inner.__class__ = with_mixin(TiedLossMixin, type(inner))
    assert isinstance(inner, TiedLossMixin)  # for type checkers
    inner._tied_loss = LossSettings(label_smoothing, memory_budget, backend, objective, wide)
    found = roles(inner)
    inner._softmax_name = found["output"].name
    freeze_unused(inner, unused)
    if objective is not None:
        inner._embedding_name = found["target"].name
    inner.hold_matrices()
    if objective is not None:
        logger.info(f"{type(inner).__name__}: training steps have the loss of {objective}; their logits are None.")
        return model
    logger.info(f"{type(inner).__name__}: training steps compute their loss by blocks; their logits are None.")
    return model


def _head_dtype(given: str | torch.dtype | None, objective: Objective | None, backend: str) -> torch.dtype | None:
    if given is None:
        return None
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if found not in (torch.float32, torch.float64):
        raise ValueError(f"head_dtype={given!r}: expected 'float32', 'float64' or None, the dtype of the model.")
    if objective is not None or backend not in ("auto", "torch"):
        what = f"backend={backend!r}" if objective is None else type(objective).__name__
        raise TyingError(
            f"{what} is computed in the dtype of the model: expected no head_dtype beside it, got {given!r}."
        )
    return found


def _refuse_other_head(model: PreTrainedModel) -> None:
    """Refuse a `head_dtype` where `get_output_embeddings()` is not the softmax (DeBERTa's newer head)."""
    found = roles(model)
    output, target = found["output"], found.get("target")
    rows = len(parameter_of(model, output.name))
    if target is not None and rows != (words := len(parameter_of(model, target.name))):
        raise TyingError(
            f"The head of {type(model).__name__} cannot have a dtype of its own: get_output_embeddings() gives "
            f"{output.name!r}, of {rows} rows, and the vocabulary has {words} words. Leave it in the dtype of the "
            "model: use_tied_loss(model) without head_dtype."
        )


def _stop_watching(model: PreTrainedModel) -> None:
    if (participation := vars(model).pop("_participation", None)) is not None:
        participation.unwatch(model)


def objective_of(model: nn.Module) -> Objective | None:
    """The objective that `use_tied_loss` has set for `model`; `None` if it trains by cross entropy."""
    settings = getattr(unwrapped(model), "_tied_loss", None)
    return None if settings is None else settings.objective


@contextmanager
def evaluated_by_objective(model: nn.Module) -> Iterator[None]:
    """Context manager in which `model` computes the loss of its objective in evaluation too, and has no logits."""
    inner = unwrapped(model)
    vars(inner)["_also_in_evaluation"] = True
    try:
        yield
    finally:
        vars(inner).pop("_also_in_evaluation", None)


@contextmanager
def tied_loss_aside(model: nn.Module) -> Iterator[None]:
    """Context manager in which forward passes of `model`, a model without wrappers, are those of its class."""
    held = {name: value for name, value in vars(model).items() if name == "_tied_loss"}
    vars(model).update(dict.fromkeys(held))
    try:
        yield
    finally:
        vars(model).update(held)


def has_tied_loss(model: nn.Module) -> bool:
    """Whether `use_tied_loss` is in force for `model`."""
    return getattr(unwrapped(model), "_tied_loss", None) is not None


# --- the extension `loss` of a config (see `hf_tying.ties.extensions`) -----------------------------------------------


def refuse_misfit(model: PreTrainedModel, value: str) -> None:
    """Refuse a model that cannot train through the tied softmax.

    Raises:
        TyingError: with the reason.
    """
    name = type(model).__name__
    if "forward" in vars(model) and not isinstance(model, TiedLossMixin):
        raise TyingError(
            f"The forward of this {name} is wrapped already (by {module_of(vars(model)['forward'])}): a mixin in "
            "front of its class would not be run. Call use_tied_loss(model) before."
        )
    if "labels" not in forward_parameters(type(model)):
        raise TyingError(
            f"{name} computes no loss itself: its forward takes no `labels`. Expected a model with a head."
        )
    found = roles(model)
    if "output" not in found:
        raise TyingError(
            f"{name} has no softmax matrix (get_output_embeddings() has none): its loss is over no vocabulary, and "
            "there is nothing to compute by blocks."
        )
    output = found["output"].name
    matrix = find_parameter(model, output)
    if matrix is None or not matrix.is_floating_point():
        state = f"is of dtype {matrix.dtype}" if matrix is not None else why_no_parameter(model, output)
        raise TyingError(f"The softmax matrix of {name}, {output!r}, {state}: expected a floating-point parameter.")


def honour(model: PreTrainedModel, value: str, strict: bool = True) -> None:
    """Let `model` train through the tied softmax, unless it does already.

    Args:
        model: model to change in place.
        value: value of the entry, `"tied"`.
        strict: `False` is for another head over the same file, which keeps its own loss. Default `True`.

    Raises:
        TyingError: see `use_tied_loss`.
    """
    if strict and not has_tied_loss(model):
        use_tied_loss(model)
