"""What is looked at before each forward pass of a training: the ties of the model, and what of them is frozen."""

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingConfig, TyingError
from .groups import TieGroup, groups_held
from .sharding import is_dtensor, row_parts, torn_units
from .slots import find_parameter, find_slot, named_slots
from .verify import is_split, refuse_untied

logger = logging.get_logger(__name__)


def refuse_untrainable(model: PreTrainedModel) -> None:
    """Refuse to train a broken tie, or a matrix whose copies would drift apart; warn of frozen ones.

    Args:
        model: model with `tie_groups`.

    Raises:
        TyingError: with the way out.
    """
    if is_split(model, groups_held(model)):
        refuse_untied(model, "train")
    _tell_frozen(model)
    if hasattr(model, "_pp_stage"):
        _refuse_stages(model)
    _refuse_padded_shards(model)


def _refuse_stages(model: PreTrainedModel) -> None:
    """Refuse to train copies of a matrix on several stages: nothing sums their gradients."""
    for group, names in TyingConfig.in_config(model.config).groups.items():
        raise TyingError(
            f"Cannot train {type(model).__name__} in pipeline stages: group {group!r} ({', '.join(names)}) has a copy "
            "on each stage that uses it, and transformers' pipeline runs no backward pass that would keep them one. "
            "Train it by DDP, FSDP2, ZeRO or tensor parallelism, or evaluate it: model.eval()."
        )


def _refuse_padded_shards(model: PreTrainedModel) -> None:
    """Refuse a tied matrix of several FSDP2 units, as transformers makes them, that has no equal parts.

    Where a part is padded, torch copies it for each of the units, and the optimizer steps one copy alone (torch 2.13,
    transformers 5.23).
    """
    for group in groups_held(model):
        root = find_parameter(model, group.root) if torn_units(model, group.names) else None
        if not is_dtensor(root) or root.shape[0] % (parts := row_parts(root)) == 0:
            continue
        raise TyingError(
            f"Cannot train {type(model).__name__} sharded by transformers: the {root.shape[0]} rows of group "
            f"{group.name!r} do not divide by {parts} processes, and units with a padded part of a tied matrix do not "
            "see its steps. Train it by Accelerate's FSDP2, or pad a vocabulary in one process and save it: "
            f"model.resize_token_embeddings(pad_to_multiple_of={parts})."
        )


def _tell_frozen(model: PreTrainedModel) -> None:
    """Warn once that a matrix frozen under one name is frozen under all, if most of the model is trained.

    Where most of the model is frozen (under adapters, or except for its last layers), it is intended.
    """
    frozen = _frozen_groups(model)
    if frozen == vars(model).get("_told_frozen", []):
        return
    for sub in model.modules():  # the models inside need not warn again
        if "tie_groups" in vars(sub) and isinstance(sub, PreTrainedModel):
            vars(sub)["_told_frozen"] = _frozen_groups(sub)
    tied = {id(find_parameter(model, group.root)) for group in groups_held(model)}
    own = {id(p): p for name, p in named_slots(model).items() if find_slot(model, name)}  # without adapters
    others = [p.requires_grad for key, p in own.items() if key not in tied]
    if frozen and 2 * sum(others) > len(others):
        more = f" (and {len(frozen) - 1} more groups)" if len(frozen) > 1 else ""
        logger.warning(
            f"Frozen under each of its names, in a model that is trained: {', '.join(frozen[0].names)}{more}. To "
            f"freeze one name alone: untie(model, [{frozen[0].root!r}]) first."
        )


def _frozen_groups(model: PreTrainedModel) -> list[TieGroup]:
    roots = ((group, find_parameter(model, group.root)) for group in groups_held(model))
    return [group for group, root in roots if root is not None and not root.requires_grad]
