"""Relax the members of groups as a declaration says."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import RELAXATIONS, TyingConfig, TyingError
from .anatomy import Anatomy, locate
from .depth_groups import depth_groups
from .groups import explicit_groups
from .relaxation import KINDS, LowRank, Relaxation, relax, relaxation_at, relaxed_names
from .sharding import gathered, refuse_in_parts, shape_of
from .shared_layers import located_stacks
from .slots import parameter_of


def refuse_unrelaxable(model: nn.Module, config: TyingConfig) -> None:
    """Refuse relaxed groups that `model` cannot have. Nothing is changed.

    Raises:
        TyingError: for a low rank of parameters that are no matrices, and for a root that is relaxed itself.
    """
    for group, chain, settings in _chains(model, config):
        root = parameter_of(model, chain[0])
        if any(relaxation_at(model, name) is None for name in chain[1:]):
            refuse_in_parts(model, "relax ties of", gathers=True)
        if relaxation_at(model, chain[0]) is not None:
            raise TyingError(
                f"Group {group!r} has the root {chain[0]!r}, which is relaxed in another group: expected a root that "
                "is tied exactly. Name the root of that group first, or harden(model)."
            )
        shape = tuple(shape_of(root))
        if settings["kind"] == "lora" and len(shape) < 2 and chain[0] in config.groups.get(group, ()):
            raise TyingError(
                f"Group {group!r} cannot be relaxed by 'lora': {chain[0]!r} has the shape {shape}, and "
                "a low rank needs a matrix. Use the kind 'scale'."
            )
        for name in chain[1:]:
            found = relaxation_at(model, name)
            if found is not None and found.settings != _settings(settings):
                raise TyingError(
                    f"{name!r} is relaxed already, by {found.settings}: expected to find it tied exactly or untied. "
                    "Call harden(model) or untie(model, names) first."
                )


def relax_declared(model: nn.Module, config: TyingConfig, strict: bool = True, active: bool = True) -> None:
    """Relax the members of the groups that `config` declares so; those that are relaxed already stay.

    Args:
        model: model to change in place.
        config: the declaration.
        strict: refuse names that `model` does not have. `False` is for another head over the same file.
        active: whether the differences act at once: not while a file is read.
    """
    for _, (root, *members), settings in _chains(model, config, strict):
        parameter = parameter_of(model, root)
        first = next((found for name in members if (found := relaxation_at(model, name)) is not None), None)
        for name in members:
            if relaxation_at(model, name) is not None or settings["kind"] == "lora" and len(shape_of(parameter)) < 2:
                continue
            options = _settings(settings)
            relaxation = KINDS[options.pop("kind")](parameter, **options)
            relaxation.active = active
            first = first or relaxation
            for key in relaxation.shared:
                relaxation._parameters[key] = first._parameters[key]
            relax(model, name, relaxation)


def refuse_split(model: PreTrainedModel) -> None:
    """Refuse relaxed ties in a model that is made for tensor parallelism, which would split the shared matrix alone.

    Raises:
        TyingError: before anything is loaded. With the way out.
    """
    parts = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
    if parts > 1 and any(isinstance(module, Relaxation) for module in model.modules()):
        raise TyingError(
            f"Cannot split {type(model).__name__} by tensor parallelism: its ties are relaxed, and the differences "
            "would stay whole beside a matrix in parts. Load it in one process and save it after harden(model) or "
            "untie(model), or train it by DDP or FSDP2."
        )


def offload_roots(model: nn.Module, index: dict[str, Any]) -> None:
    """Let a disk offload of relaxed places read their root: a portable file has whole values under their names."""
    for _, root, name in relaxed_names(model):
        if root in index and name in index:
            index[name] = index[root]


def values_before(model: nn.Module, config: TyingConfig) -> dict[str, torch.Tensor]:
    """The values of members that start from their own (`init="svd"`), before they are tied."""
    return {
        name: parameter_of(model, name).detach().clone()
        for _, chain, settings in _chains(model, config)
        if settings.get("init") == "svd"
        for name in chain[1:]
    }


def fit_before(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Let low-rank differences approximate the values that their members had before they were tied."""
    for name, value in before.items():
        if isinstance(found := relaxation_at(model, name), LowRank):
            root = parameter_of(model, name)
            with gathered((root,)):
                found.fit(value - root.detach())


def _chains(model: nn.Module, config: TyingConfig, strict: bool = True) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Group, names in this model with the root first, and settings; modules are expanded to their parameters."""
    stacks = [stack for stack in config.depth if "relax" in stack]
    if not config.relax and not stacks:
        return []
    anatomy = Anatomy(model)
    chains = []
    for stack in located_stacks(anatomy, TyingConfig(depth=stacks), strict):
        chains += [(stack["path"], chain, stack["relax"]) for chain in depth_groups(anatomy.own_slots, stack).values()]
    declared = TyingConfig(groups={group: config.groups[group] for group in config.relax})
    found = explicit_groups(anatomy, declared, strict)
    for key, chain in found.items():
        group = next(g for g in config.relax if key == g or key.startswith(f"{g}."))
        exact = {locate(anatomy, name) for name in config.relax[group].get("exact", ())}
        if len(relaxed := [name for name in chain if name == chain[0] or name not in exact]) > 1:
            chains.append((group, relaxed, config.relax[group]))
    return chains


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as `Relaxation.settings` gives them: with defaults, without what counts only at the start."""
    given = RELAXATIONS[settings["kind"]] | settings
    return {key: value for key, value in given.items() if key not in ("init", "exact") and value is not None}
