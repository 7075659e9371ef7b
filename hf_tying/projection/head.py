"""The head of a model with a projection (PR): a square matrix before the softmax matrix.

`logits = W (P h + b_P) + b` (Press & Wolf 2016, section 3.2). In a tied model the hidden states then need not be
word vectors. It costs H x H parameters. The projection is a part of the head's module, so that the
softmax matrix keeps its name and its ties; the `tying` entry of the config declares it, and a file is read with it.
"""

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import ProjectionConfig, TyingError
from ..ties.anatomy import roles
from ..ties.participation import Participation
from ..ties.relaxation import make_exact, relax, stock_class
from ..ties.sharding import is_dtensor
from ..ties.slots import replace_module


class ProjectedLinear(nn.Linear):
    """A linear head after a projection. Its `weight` and `bias` are those of the head that it replaces."""

    projection: nn.Linear
    participation: Participation | None = None

    @classmethod
    def around(
        cls, head: nn.Linear, projection: nn.Linear, participation: Participation | None = None
    ) -> "ProjectedLinear":
        """Make a head with the parameters of `head` and the projection before it."""
        # Not by its constructor: DeepSpeed's zero.Init would split every module that is made on the meta device.
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = head.in_features, head.out_features
        new.weight, new.bias = head.weight, head.bias
        new.projection, new.participation = projection, participation
        return new.train(head.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., H)."""
        if self.participation is not None:
            self.participation.took_part()
        if is_dtensor(hidden) and not is_dtensor(self.projection.weight):
            # Tensor parallelism splits the softmax alone; its processes have the same hidden states.
            projected = self.projection(hidden.to_local())
            projected = type(hidden).from_local(projected, hidden.device_mesh, hidden.placements, run_check=False)
        else:
            projected = self.projection(hidden)
        return nn.functional.linear(projected, self.weight, self.bias)


def project(model: PreTrainedModel, settings: ProjectionConfig) -> None:
    """Put a projection before the softmax of `model`, unless it has one or has no head.

    It starts as the identity, so that a trained model computes the same as before. A model that is just being made
    initialises it afterwards like its other matrices.

    Raises:
        TyingError: for a head that is not an `nn.Linear`.
    """
    head = model.get_output_embeddings()
    if head is None or isinstance(head, ProjectedLinear):
        return
    head = linear_head(model)
    projection = nn.Linear(
        head.in_features, head.in_features, bias=settings.bias, dtype=head.weight.dtype, device=head.weight.device
    )
    with torch.no_grad():
        nn.init.eye_(projection.weight)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    name = roles(model)["output"].name
    relaxation = make_exact(model, name)
    replace_module(model, head, ProjectedLinear.around(head, projection))
    if relaxation is not None:
        relax(model, name, relaxation)


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The module of the softmax matrix.

    Raises:
        TyingError: for a model that has none, or another kind.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    # A subclass computes something else (that of Idefics adds words), unless it is that of a relaxed place.
    if not isinstance(head, nn.Linear) or stock_class(type(head))[0] not in (nn.Linear, ProjectedLinear):
        found = "has none" if head is None else f"has a {type(head).__name__}"
        raise TyingError(
            f"A projection (PR) goes before the softmax matrix: expected a model with an nn.Linear as its output "
            f"embedding, and {type(model).__name__} {found}."
        )
    return head
