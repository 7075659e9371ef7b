"""Projection regularisation (PR) on any model with a softmax: a square matrix before it, kept small by a penalty.

`logits = W (P h + b_P) + b` (Press & Wolf 2016, section 3.2). In a tied model it lets the hidden states be something
else than word vectors, at the price of H x H parameters. The projection is a part of the head's module, so that the
softmax matrix keeps its name and its ties; the `tying` entry of the config declares it, and a file is read with it.
"""

import inspect

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from ..config import ProjectionConfig, TyingConfig, TyingError
from ..ties.slots import replace_module
from .penalty import projection_penalty


class ProjectedLinear(nn.Linear):
    """A head whose input goes through `projection` first; its `weight` and `bias` are those of the one it replaces."""

    projection: nn.Linear

    @classmethod
    def around(cls, head: nn.Linear, projection: nn.Linear) -> "ProjectedLinear":
        new = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        new.weight, new.bias = head.weight, head.bias
        new.projection = projection
        return new.train(head.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """From (..., H) to (..., V)."""
        return nn.functional.linear(self.projection(hidden), self.weight, self.bias)


def project(model: PreTrainedModel, settings: ProjectionConfig) -> None:
    """Put a projection, not initialised, before the softmax of `model`; one that is there stays.

    Raises:
        TyingError: for a head that is no `nn.Linear`. A model without any head (the base model of a file) has none to
            project, and is left alone.
    """
    head = model.get_output_embeddings()
    if head is None or isinstance(head, ProjectedLinear):
        return
    head = linear_head(model)
    width, like = head.in_features, {"dtype": head.weight.dtype, "device": head.weight.device}
    replace_module(model, head, ProjectedLinear.around(head, nn.Linear(width, width, bias=settings.bias, **like)))


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The module of the softmax matrix.

    Raises:
        TyingError: for a model that has none, or another kind.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(head, nn.Linear):
        found = "has none" if head is None else f"has a {type(head).__name__}"
        raise TyingError(
            f"A projection (PR) goes before the softmax matrix: expected a model with an nn.Linear as its output "
            f"embedding, and {type(model).__name__} {found}."
        )
    return head


def with_penalty(model: PreTrainedModel, outputs, args: tuple, kwargs: dict):
    """`outputs` of a training step, with the penalty in their loss, once for each forward pass.

    It is divided by what the sum of the losses is divided by, and by the number of processes: their gradients are
    averaged after `Trainer` has multiplied each one's share of the loss by that number.
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
    divisor = given.get("num_items_in_batch")
    if divisor is None:
        shifted = given.get("shift_labels") is None and _shifts_labels(model)
        divisor = ((labels[..., 1:] if shifted else labels) != -100).sum().clamp(min=1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        divisor = divisor * torch.distributed.get_world_size()
    settings = TyingConfig.from_dict(model.config.tying).projection
    penalty = projection_penalty(
        head.projection.weight, norm=settings.norm, strength=settings.strength, divisor=divisor
    ).to(loss.device)
    parts = vars(model).get("loss_parts") or {"cross_entropy": loss.detach()}
    model.loss_parts = {**parts, "projection": penalty.detach()}
    total = loss + penalty
    if not isinstance(outputs, ModelOutput):
        return (total, *outputs[1:])
    outputs["loss"] = total
    return outputs


def _shifts_labels(model: PreTrainedModel) -> bool:
    """Whether the loss leaves out the first word of each text, which nothing comes before; as in transformers, the
    default of a class whose name says nothing."""
    shifts = (None, "ForCausalLM", "ForConditionalGeneration")  # the last with an encoder, or as in LLaVA without one
    return not getattr(model.config, "is_encoder_decoder", False) and getattr(model, "loss_type", None) in shifts
