"""`use_projection` adds PR to a live model, and `merge_projection` folds it into the softmax matrix.

PR is an extension of the core (`hf_tying.ties.extensions`): a model whose config declares a `projection` gets one when
it is made, and its class gets `ProjectedModelMixin` in front.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from ..config import ProjectionConfig, TyingConfig, TyingError
from ..ties.anatomy import roles
from ..ties.classes import MixinBase, mixins_of, with_mixin, without_mixin
from ..ties.participation import Participation
from ..ties.sharding import data_parallel_size, gathered, refuse_in_parts
from ..ties.slots import replace_module
from ..ties.tying import refuse_unfit, tie, untie
from .head import ProjectedLinear, linear_head, project
from .penalty import norm_of, share_of_update, strength_of

Model = TypeVar("Model", bound=PreTrainedModel)


def use_projection(
    model: Model, *, bias: bool = True, norm: str = "fro_squared_half", strength: float | None = None
) -> Model:
    """Give the head of a live model a projection, in place, and record it in the `tying` entry of the config.

    It starts as the identity, so that the model computes the same as before. For a model that is not trained yet,
    `TyingConfig(projection=ProjectionConfig())` in its config is better: the projection is then initialised like the
    other matrices, as in the paper. The loss of training steps includes the penalty, and `model.loss_parts` has its
    value; the loss in evaluation does not.

    An optimizer made before does not have the new parameters. **Only this package reads a file with a projection**:
    other loaders leave the projection out, and compute other logits. `merge_projection` makes a file for any loader.

    Args:
        model: model with a head that is an `nn.Linear`, tied or not.
        bias: whether the projection has a bias, as in the released code. Default `True`.
        norm: norm of the penalty, see `hf_tying.losses.projection_penalty`.
        strength: factor of the penalty, see `hf_tying.losses.projection_penalty`.

    Returns:
        The same model.

    Raises:
        TyingError: for a model without such a head, one that has a projection already, or wrong options.
    """
    settings = ProjectionConfig(bias=bias, norm=norm, strength=strength)
    refuse_unfit(model, "project")
    refuse_in_parts(model, "project", gathers=True)
    if isinstance(linear_head(model), ProjectedLinear):
        raise TyingError(f"{type(model).__name__} has a projection already: merge_projection(model) takes it away.")
    return tie(model, TyingConfig(projection=settings))


def merge_projection(model: Model) -> Model:
    """Fold the projection into the softmax matrix, in place: `W P` and `W b_P + b`. The logits stay the same.

    A tied model is untied first, since the product is not an embedding; the config records that. Any loader reads the
    resulting file correctly.

    Raises:
        TyingError: for a model without a projection, and for a projection with a bias before a softmax without one.
    """
    if not isinstance(model, PreTrainedModel):
        refuse_unfit(model, "merge the projection of")
    head = model.get_output_embeddings()
    if not isinstance(head, ProjectedLinear):
        raise TyingError(f"{type(model).__name__} has no projection: there is nothing to merge.")
    refuse_in_parts(model, "merge the projection of", gathers=True)
    inner = head.projection
    with gathered((inner.bias,)):
        without_place = inner.bias is not None and head.bias is None and bool(inner.bias.detach().any())
    if without_place:
        raise TyingError(
            f"The projection of {type(model).__name__} has a bias and its softmax has none to add it to: expected "
            "output_bias=True, or a projection without bias."
        )
    matrix = head._parameters["weight"]  # its attribute is another tensor in a relaxed place, which untie makes whole
    tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is matrix]
    if len(tied) > 1:
        untie(model, list(roles(model)["output"].names))
    with torch.no_grad(), gathered((head.weight, head.bias, inner.weight, inner.bias), write=True):
        exact = torch.float64 if head.weight.device.type == "cpu" else torch.float32
        weight = head.weight.to(exact)
        if inner.bias is not None and head.bias is not None:
            head.bias.add_((weight @ inner.bias.to(exact)).to(head.bias.dtype))
        merged = (weight @ inner.weight.to(exact)).to(head.weight.dtype)
    plain = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(merged, requires_grad=head.weight.requires_grad), head.bias
    replace_module(model, head, plain.train(head.training))
    if head.participation is not None:
        head.participation.unwatch(model)
    if ProjectedModelMixin in mixins_of(type(model)):
        model.__class__ = without_mixin(ProjectedModelMixin, type(model))  # pyright: ignore[reportAttributeAccessIssue]
    vars(model).pop("loss_parts", None)
    model.config.tying = TyingConfig.in_config(model.config).replace(projection=None).to_dict()
    return model


# --- the extension ---------------------------------------------------------------------------------------------------


class ProjectedModelMixin(MixinBase):
    """Mixin of a model with a projection: it adds the penalty in training steps, and keeps the projection."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass. In training, add the penalty to the loss."""
        vars(self).pop("loss_parts", None)  # of the previous step
        if not self.training:
            return super().__call__(*args, **kwargs)
        with _measured(self) as norms:
            outputs = super().__call__(*args, **kwargs)
        return _with_penalty(self, outputs, norms, args, kwargs)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output embedding; the projection stays before it."""
        old = self.get_output_embeddings()
        if isinstance(old, ProjectedLinear) and type(new_embeddings) is nn.Linear:
            new_embeddings = ProjectedLinear.around(new_embeddings, old.projection, old.participation)
        super().set_output_embeddings(new_embeddings)


def refuse_misfit(model: PreTrainedModel, value: Any) -> None:
    """Refuse a model that cannot have the projection that `value`, an entry of its config, declares.

    Raises:
        TyingError: for a model without an `nn.Linear` as its head, or one whose projection is of the other kind.
    """
    settings, head = ProjectionConfig.of(value), linear_head(model)
    if isinstance(head, ProjectedLinear) and settings.bias != (head.projection.bias is not None):
        raise TyingError(
            f"{type(model).__name__} has a projection already, {'without' if settings.bias else 'with'} a bias: "
            "merge_projection(model) takes it away."
        )


def honour(model: PreTrainedModel, value: Any, strict: bool = True) -> None:
    """Give `model` the projection that `value`, an entry of its config, declares.

    A model without a head is left alone, `strict` or not: the base model of a file has none to project.

    Raises:
        TyingError: for a head that is not an `nn.Linear`.
    """
    if (settings := ProjectionConfig.of(value)) is None:
        return
    project(model, settings)
    head = model.get_output_embeddings()
    if not isinstance(head, ProjectedLinear):
        return
    if not isinstance(model, ProjectedModelMixin):
        model.__class__ = with_mixin(ProjectedModelMixin, type(model))
    if head.participation is None:
        head.participation = Participation(
            "The projection (PR) before the softmax matrix",
            "Train with transformers' Trainer, which runs the model's own forward; or without one: "
            "merge_projection(model).",
        )
        head.participation.watch(model)


@contextmanager
def _measured(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The norms of the projection, one for each time that it is used inside this context.

    They are taken while it is used: FSDP2 and ZeRO-3 take the matrix away after that.
    """
    head, norms = model.get_output_embeddings(), []
    if not isinstance(head, ProjectedLinear) or torch.compiler.is_compiling():
        yield norms
        return
    norm = TyingConfig.in_config(model.config).projection.norm

    def measure(projection: nn.Module, args: tuple, output: Any) -> None:
        norms.append(norm_of(head.projection.weight, norm))

    handle = head.projection.register_forward_hook(measure, prepend=True)
    try:
        yield norms
    finally:
        handle.remove()


def _with_penalty(model: PreTrainedModel, outputs: Any, norms: list[torch.Tensor], args: tuple, kwargs: dict) -> Any:
    """Add the penalty to the loss in `outputs` of a training step, once for each update (`share_of_update`).

    The penalty is divided like the sum of the losses. Where each process has the mean of its own words, it is also
    divided by the number of processes, since their gradients are averaged.
    """
    head = model.get_output_embeddings()
    loss = outputs.get("loss") if isinstance(outputs, ModelOutput) else outputs[0] if outputs else None
    if not isinstance(head, ProjectedLinear) or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return outputs
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
    given = {**given, **given.get("kwargs", {})}
    labels = given.get("shift_labels")
    if labels is None and (labels := given.get("labels")) is None:
        return outputs
    if given.get("shift_labels") is None and _shifts_labels(model):
        labels = labels[..., 1:]
    divisor = given.get("num_items_in_batch")
    if divisor is None:
        divisor = (labels != -100).sum().clamp(min=1)
        divisor = divisor * data_parallel_size(model)
    settings = TyingConfig.in_config(model.config).projection
    norm = norms[0] if norms else norm_of(head.projection.weight, settings.norm)
    penalty = strength_of(settings.norm, settings.strength) * norm / divisor
    penalty = (penalty * share_of_update(labels, given)).to(loss.device)
    parts = vars(model).get("loss_parts") or {"cross_entropy": loss.detach()}
    vars(model)["loss_parts"] = {**parts, "projection": penalty.detach()}
    total = loss + penalty
    if not isinstance(outputs, ModelOutput):
        return (total, *outputs[1:])
    outputs["loss"] = total
    return outputs


def _shifts_labels(model: PreTrainedModel) -> bool:
    """Whether the loss leaves out the first word of each text, which has no context.

    As in transformers, it does for a class without a loss type.
    """
    shifts = (None, "ForCausalLM", "ForConditionalGeneration")  # the last one with or without an encoder (LLaVA)
    return not getattr(model.config, "is_encoder_decoder", False) and getattr(model, "loss_type", None) in shifts
