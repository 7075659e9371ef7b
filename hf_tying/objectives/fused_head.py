"""TRL's trainers ask a model for the log-probability of each token, not for its loss: a model of this package answers.

TRL (1.15 on) gives a model a forward that takes `fused_lm_head=True`: it multiplies the hidden states of the base
model by the softmax matrix itself, around everything that the model does between the two. Here the same keyword is
answered by the model's own forward, with its products deferred: its projection, scale, soft cap and bias are what they
are in the model. The name that TRL calls is wrapped by `hf_tying.hook`; other models get TRL's own forward.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from types import MethodType
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging

from ..config import TyingConfig, TyingError
from ..projection.head import ProjectedLinear
from ..projection.penalty import strength_of
from ..ties.anatomy import roles
from .deferred_logits import DeferredLogits
from .deferring import deferring, refuse_narrow_head, why_not_seen, why_whole
from .step_loss import LossSettings
from .tied_loss import has_tied_loss, tied_loss_aside
from .token_log_probs import token_log_probs

logger = logging.get_logger(__name__)

#: The arguments of TRL's `add_fused_lm_head` (1.15, 1.16).
_ARGUMENTS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")
#: What TRL calls an output, and the field of `TokenLogProbs` for it.
_OUTPUTS = {
    "log_probs": "log_probs",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "top1",
}
_FIELDS = {*_OUTPUTS, "loss", "label_mask", "aux_loss"}


class _Asked(NamedTuple):
    """What a trainer asks for, and the class of its answer."""

    outputs: tuple[str, ...]
    temperature: float
    head_dtype: torch.dtype | None
    answer: type[ModelOutput]


def add_fused_head(wrapped: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """TRL's `add_fused_lm_head`, for a model whose values only its own forward has; TRL's own for any other.

    Args:
        wrapped: TRL's function.
        args: its arguments.
        kwargs: its keywords.

    Raises:
        TyingError: for a model whose loss is no function of the tokens' log-probabilities, and for a TRL that asks for
            something else than the versions that are known here.
    """
    model = kwargs.get("model", args[0] if args else None)
    if not isinstance(model, PreTrainedModel) or not _answers_itself(model):
        return wrapped(*args, **kwargs)
    _refuse_other_loss(model)
    asked = _asked(wrapped, args, kwargs)
    before = vars(model).get("forward")

    # `generate` and `Trainer` read the signature of the model's own forward, which `wraps` shows.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: float | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        own = before or MethodType(type(self).forward, self)
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return own(*args, **{key: value for key, value in given.items() if value is not None}, **kwargs)
        return _answer(self, functools.partial(own, *args, **kwargs), asked, **given)

    model.forward = MethodType(forward, model)


def _answers_itself(model: PreTrainedModel) -> bool:
    return has_tied_loss(model) or isinstance(model.get_output_embeddings(), ProjectedLinear)


def _refuse_other_loss(model: PreTrainedModel) -> None:
    """Refuse a model that `use_tied_loss` trains by something else than the log-probabilities of its labels."""
    settings = getattr(model, "_tied_loss", None)
    if settings is None or settings.objective is None and not settings.label_smoothing:
        return
    what = f"label_smoothing={settings.label_smoothing}" if settings.objective is None else settings.objective
    raise TyingError(
        f"{type(model).__name__} has {what} by use_tied_loss, and TRL's trainers make their loss of the "
        "log-probability of each token, which would take its place: expected a model that trains by cross entropy. "
        "Train it with transformers' Trainer, or with TRL after use_tied_loss(model)."
    )


def _asked(wrapped: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Asked:
    """What TRL asks for, if it is a TRL that asks for what is known here."""
    found, answer = tuple(inspect.signature(wrapped).parameters), sys.modules[wrapped.__module__].FusedCausalLMOutput
    unknown = set(found) ^ set(_ARGUMENTS) or _FIELDS - {field.name for field in fields(answer)}
    if not unknown:
        given = inspect.signature(wrapped).bind(*args, **kwargs)
        given.apply_defaults()
        outputs = ("log_probs", *(name for name in given.arguments["outputs"] if name != "log_probs"))
        unknown = set(outputs) - set(_OUTPUTS)
        if not unknown:
            head_dtype = torch.float32 if given.arguments["cast_lm_head_to_fp32"] else None
            return _Asked(outputs, given.arguments["temperature"], head_dtype, answer)
    raise TyingError(
        f"TRL {version('trl')} asks a model for its log-probabilities in another way than TRL 1.15 and 1.16 "
        f"({', '.join(sorted(unknown))}), and would go around the head of this model: expected add_fused_lm_head("
        f"{', '.join(_ARGUMENTS)}). Install another version (pip install trl==1.16.0), or let TRL multiply by the "
        "matrix itself: use_tied_loss(model, False), merge_projection(model)."
    )


def _answer(
    model: PreTrainedModel,
    forward: Callable[..., ModelOutput],
    asked: _Asked,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: float | torch.Tensor | None,
) -> ModelOutput:
    """The log-probabilities of the labels, and the rest that was asked for, by the model's own `forward`."""
    if model.training and torch.is_grad_enabled():
        _refuse_other_loss(model)
        _tell_of_penalty(model)
    settings = (getattr(model, "_tied_loss", None) or LossSettings()).without_training()
    settings = replace(settings, head_dtype=asked.head_dtype or settings.head_dtype)
    name = roles(model)["output"].name
    whole = why_whole(model, name, name)
    with tied_loss_aside(model), deferring(model, settings, name, name, whole is None) as softmax:
        outputs = forward(use_cache=False)
        logits = outputs["logits"]
        if shift_labels is None and labels is not None:
            logits, labels = logits[:, :-1], labels[:, 1:]
        else:
            labels = shift_labels
        labels = labels.to(logits.device)
        if not isinstance(logits, DeferredLogits):
            why = whole or why_not_seen(model, name)
            logger.warning_once(f"TRL's log-probabilities are computed from whole logits: {why}.")
        tokens = token_log_probs(
            logits, labels, [_OUTPUTS[name] for name in asked.outputs], asked.temperature, settings.head_dtype
        )
    refuse_narrow_head(model, name, softmax)
    found = {name: getattr(tokens, _OUTPUTS[name]) for name in asked.outputs}
    if "mean_logits" in found:
        found["mean_logits"] = found["mean_logits"].detach()  # a metric, as TRL's own
    mask = labels != -100
    loss = -found["log_probs"].sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    aux_loss = outputs.get("aux_loss")
    if aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return asked.answer(loss=loss, label_mask=mask, aux_loss=aux_loss, **found)


def _tell_of_penalty(model: PreTrainedModel) -> None:
    if isinstance(model.get_output_embeddings(), ProjectedLinear):
        settings = TyingConfig.in_config(model.config).projection
        if settings is not None and strength_of(settings.norm, settings.strength):
            logger.warning_once(
                "TRL's trainers make their loss of the log-probabilities of the tokens, which the penalty of a "
                "projection is no part of: the projection is trained, and its penalty is not."
            )
