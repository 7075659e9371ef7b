"""The values of relaxed members in a file or a state dict: whole ones, beside the numbers of their differences."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers.utils import logging

from ..config import TyingConfig, TyingError
from .depth_groups import SUFFIX
from .groups import TieGroup
from .relaxation import relaxation_at
from .sharding import is_dtensor
from .slots import find_parameter, same_values, state_key

logger = logging.get_logger(__name__)


def relaxed_value(model: nn.Module, name: str, root: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value of the relaxed place `name` in a state dict that has the value `root`: with the differences of it.

    The live ones may be another average of the weights, or the shards of one process.
    """
    relaxation, prefix = relaxation_at(model, name), f"{state_key(model, name)}{SUFFIX}."
    assert relaxation is not None, name
    held = {key: state[prefix + key] for key in relaxation._parameters if prefix + key in state}
    saved = copy.copy(relaxation)
    vars(saved)["_parameters"] = {**relaxation._parameters, **held}
    return root + saved.forward(root)  # without the hooks of DeepSpeed, which gathers live parameters


def agrees(
    model: nn.Module, name: str, root: torch.Tensor, value: torch.Tensor, state: Mapping[str, torch.Tensor]
) -> bool:
    """Whether `value` is what the relaxed place `name` makes of `root`: with its difference, or `root` itself.

    A file has whole values, and a live state dict the root under each name. Whole values may be rounded as the file
    is; where there is no difference, nothing is. Values that are not here count as right.
    """
    if value.is_meta or root.is_meta or is_dtensor(value) or is_dtensor(root) or same_values(value, root):
        return True
    with torch.no_grad():
        change = relaxed_value(model, name, root, state) - root
        apart = (value - root - change).nan_to_num(posinf=0, neginf=0)  # one broken matrix is so in both
        size = sum(torch.linalg.vector_norm(each.nan_to_num().double()) for each in (root, change))
        rounding = max(_rounding(root), _rounding(value)) if change.count_nonzero() else 0.0
        return bool(torch.linalg.vector_norm(apart.double()) <= 4 * rounding * size)


def _rounding(tensor: torch.Tensor) -> float:
    """Relative step of the coarsest usual dtype that holds each element: the one in which it was stored."""
    whole = tensor.nan_to_num()
    stored = (
        dtype
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        if torch.equal(whole.to(dtype).to(whole), whole)
    )
    return torch.finfo(next(stored, tensor.dtype)).eps


def chosen_for(config: TyingConfig, group: TieGroup, apart: list[str], exact: list[str]) -> str:
    """The `on_conflict` for relaxed names that have another value than their root and their difference make.

    Raises:
        TyingError: when nothing was chosen.
    """
    if config.on_conflict == "keep_untied":
        logger.warning(f"Group {group.name!r}: {', '.join(apart)} kept untied, the config is corrected.")
    elif config.on_conflict.removeprefix("use:") not in exact:
        raise TyingError(
            f"The file has a value of {apart[0]!r} that is not what its difference makes of {exact[0]!r} (relaxed "
            f"group {group.name!r}): another program has trained it, perhaps. No weights are dropped unasked. Choose "
            "by the `tying` entry of config.json, or from_pretrained(..., tying={**entry, 'on_conflict': ...}): "
            f"'use:{exact[0]}' takes the root and the differences that the file has, 'keep_untied' keeps the value as "
            "a matrix of its own and corrects the config."
        )
    return config.on_conflict


def refuse_other_value(
    model: nn.Module,
    config: TyingConfig,
    group: TieGroup,
    name: str,
    state: Mapping[str, torch.Tensor],
    root: str,
    prefix: str,
) -> None:
    """Refuse a state dict that has neither the root's value nor the whole one for the relaxed `name`.

    Args:
        model: the model, with the difference of `name`.
        config: its declaration.
        group: the group of `name`.
        name: the relaxed name.
        state: the state dict; it may lack `name`.
        root: key of the root's value in it.
        prefix: prefix of the model's names in it.

    Raises:
        TyingError: unless `on_conflict` chooses the root.
    """
    value = state.get(prefix + state_key(model, name))
    live = find_parameter(model, group.root)
    if value is None or config.on_conflict.startswith("use:") or is_memory_of(live, value):
        return
    own = {key.removeprefix(prefix): each for key, each in state.items() if f"{SUFFIX}." in key}
    if not agrees(model, name, state[root], value, own):
        raise TyingError(
            f"Cannot load this state dict: it has a value of {name!r} that is not what its difference makes of "
            f"{group.root!r} (relaxed group {group.name!r}). Remove it from the state dict, or untie(model) first to "
            "keep both."
        )


def refuse_rootless(model: nn.Module, group: TieGroup, present: Iterable[str]) -> set[str]:
    """The relaxed names of `group`.

    Raises:
        TyingError: `present`, the names that a file or a state dict has, are relaxed ones alone: the value of the
            root cannot be known from them.
    """
    relaxed = {name for name in group.names if relaxation_at(model, name) is not None}
    present = list(present)
    if present and relaxed.issuperset(present):
        raise TyingError(
            f"Cannot load group {group.name!r}: {present[0]!r} is relaxed, and its root {group.root!r} is not there. "
            "Load weights that have the root."
        )
    return relaxed


def is_memory_of(parameter: nn.Parameter | None, value: object) -> bool:
    """Whether `value` lies in the memory of a plain parameter."""
    if parameter is None or not isinstance(value, torch.Tensor) or parameter.is_meta or value.is_meta:
        return False
    try:
        return value.data_ptr() == parameter.data_ptr() != 0 and value.shape == parameter.shape
    except RuntimeError:  # a wrapper around other tensors has no memory of its own
        return False
