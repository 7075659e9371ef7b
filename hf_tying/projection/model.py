"""`use_projection` and `merge_projection`: PR given to a live model, and folded into its softmax matrix."""

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import ProjectionConfig, TyingConfig, TyingError
from ..ties.groups import roles
from ..ties.slots import replace_module
from ..ties.tying import tie, untie
from .head import ProjectedLinear, linear_head, project


def use_projection(
    model: PreTrainedModel, *, bias: bool = True, norm: str = "fro_squared_half", strength: float | None = None
) -> PreTrainedModel:
    """Give a live model's head a projection, in place; the config's `tying` entry says so.

    It starts as the identity, so that the model computes what it did. A model that is not trained yet is better made
    with it, by `TyingConfig(projection=ProjectionConfig())` in its config: then the projection starts as the model's
    other matrices do, as in the paper. Training steps then have the penalty in their loss, and `model.loss_parts`
    says how much of it that is; evaluation is without.

    An optimizer made before does not know the new parameters. **A file with a projection is for this package only**:
    other loaders leave it out, and compute something else; `merge_projection` makes one for everybody.

    Args:
        model: with a head that is an `nn.Linear`, tied or not.
        bias: the projection has one, as in the released code.
        norm, strength: see `hf_tying.losses.projection_penalty`.

    Returns:
        The same model.

    Raises:
        TyingError: for a model without such a head, one that has a projection already, or wrong options.
    """
    settings = ProjectionConfig(bias=bias, norm=norm, strength=strength)
    head = linear_head(model)
    if isinstance(head, ProjectedLinear):
        raise TyingError(f"{type(model).__name__} has a projection already: merge_projection(model) takes it away.")
    entry = TyingConfig.from_dict(getattr(model.config, "tying", None))
    project(model, settings)
    with torch.no_grad():
        projection = model.get_output_embeddings().projection
        nn.init.eye_(projection.weight)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    model.config.tying = entry.replace(projection=settings).to_dict()
    # What is tied stays so; the model comes under the mixin, and the entry is completed.
    return tie(model, TyingConfig())


def merge_projection(model: PreTrainedModel) -> PreTrainedModel:
    """Fold the projection into the softmax matrix, in place: `W P` and `W b_P + b`. The logits stay the same.

    A tied model is untied by that, since the product is no embedding any more; the config says so, and any loader
    then reads the file right.

    Raises:
        TyingError: for a model without a projection, and where `W b_P` has no bias to go to.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, ProjectedLinear):
        raise TyingError(f"{type(model).__name__} has no projection: there is nothing to merge.")
    inner = head.projection
    if inner.bias is not None and head.bias is None and bool(inner.bias.detach().any()):
        raise TyingError(
            f"The projection of {type(model).__name__} has a bias and its softmax has none to add it to: expected "
            "output_bias=True, or a projection without bias."
        )
    tied = [name for name, p in model.named_parameters(remove_duplicate=False) if p is head.weight]
    if len(tied) > 1:
        untie(model, roles(model)["output"])
    with torch.no_grad():
        exact = torch.float64 if head.weight.device.type == "cpu" else torch.float32
        weight = head.weight.to(exact)
        if inner.bias is not None and head.bias is not None:
            head.bias.add_((weight @ inner.bias.to(exact)).to(head.bias.dtype))
        merged = (weight @ inner.weight.to(exact)).to(head.weight.dtype)
    plain = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(merged, requires_grad=head.weight.requires_grad), head.bias
    replace_module(model, head, plain.train(head.training))
    model.config.tying = TyingConfig.from_dict(model.config.tying).replace(projection=None).to_dict()
    return model
