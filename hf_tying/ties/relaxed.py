"""Relaxed tie groups of a model: `gap`, `harden`, `relaxation_penalty`.

A relaxed group is declared like any other, with `relax` beside its names:

    tie(model, {"embeddings": {"names": ["model.embed_tokens", "lm_head"], "relax": {"kind": "lora", "rank": 8}}})

Its root is tied exactly. Each other member is the root's parameter with a small difference of its own
(`relaxation.KINDS`). Files have the whole value of each member, so that any loader computes the same, and the numbers
of the differences beside them, so that this package reads the tie.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingConfig, TyingError
from .anatomy import Anatomy
from .groups import make_groups, names_held
from .modeling import set_groups
from .plain_modules import hold
from .record import write_config
from .relaxation import make_exact, relaxation_at, relaxed_names
from .sharding import gathered, is_partitioned
from .slots import parameter_of
from .verify import tied_part

Model = TypeVar("Model", bound=nn.Module)


def gap(model: nn.Module) -> dict[str, dict[str, float]]:
    """The distance of each relaxed member from its root.

    Args:
        model: any tied model or module, also wrapped.

    Returns:
        For each relaxed group, by the names of its members, the norm of the difference as a share of the root's norm
        (Frobenius): 0 where a member equals its root.
    """
    part = tied_part(model)
    distances: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for group, root, name in relaxed_names(part):
            matrix, found = parameter_of(part, root), relaxation_at(part, name)
            assert found is not None
            with gathered((matrix, *found._parameters.values())):
                norm = torch.linalg.vector_norm(found.forward(matrix).float())
                of_root = torch.linalg.vector_norm(matrix.float()).clamp(min=1e-30)
            distances.setdefault(group, {})[name] = float(norm / of_root)
    return distances


def relaxation_penalty(model: nn.Module) -> torch.Tensor:
    """A term for the loss that draws relaxed members to their roots: the sum of the squared distances of `gap`.

    The root's norm counts as a constant, so that the term does not make the root larger.

    Args:
        model: any tied model or module, also wrapped.

    Returns:
        A scalar in float32, zero for a model without a relaxed group.

    Raises:
        TyingError: if a gradient is asked for where DeepSpeed ZeRO-3 has partitioned the model.

    Example:
        >>> loss = model(**batch).loss + 0.1 * relaxation_penalty(model)
    """
    part = tied_part(model)
    terms = []
    for _, root, name in relaxed_names(part):
        matrix, found = parameter_of(part, root), relaxation_at(part, name)
        assert found is not None
        held = (matrix, *found._parameters.values())
        if torch.is_grad_enabled() and any(map(is_partitioned, held)):
            raise TyingError(
                f"relaxation_penalty has no gradient where DeepSpeed ZeRO-3 has partitioned {root!r}. Train with "
                'ZeRO-2, or limit the differences by "bound" in `relax`; within torch.no_grad() its value is given.'
            )
        with gathered(held):
            scale = matrix.detach().float().square().sum().clamp(min=1e-30)
            terms.append(found.forward(matrix).float().square().sum() / scale)
    return torch.stack(terms).sum() if terms else torch.zeros(())


def harden(model: Model) -> Model:
    """Tie relaxed groups exactly again, in place: each member is its root, and the differences are dropped.

    The model computes something else afterwards, as far as `gap` was above zero. To keep the differences as plain
    matrices, `untie` the members instead.

    Returns:
        The same model.
    """
    part = tied_part(model)
    if names := [name for _, _, name in relaxed_names(part)]:
        for name in names:
            make_exact(part, name)
        if isinstance(part, PreTrainedModel):  # a stack of shared layers is relaxed no longer, when next it is read
            write_config(part, depth=[_exact(stack) for stack in TyingConfig.in_config(part.config).depth])
        record_relaxed(part)
    return model


def _exact(stack: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stack.items() if key != "relax" or stack.get("unrolled")}


def record_relaxed(model: nn.Module, save_format: str | None = None) -> None:
    """Record the relaxed groups of a live model, and what their differences share.

    Args:
        model: a model with `tie_groups`.
        save_format: form of its file. Default `None`: the default for the groups as they are now.
    """
    anatomy = Anatomy(model)
    groups = make_groups(anatomy, anatomy.tied, names_held(model))
    if isinstance(model, PreTrainedModel):
        set_groups(model, groups)
        write_config(model, save_format=save_format)
    else:
        hold(model, groups, save_format=save_format)
