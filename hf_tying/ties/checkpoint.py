"""Reconcile tie groups with a checkpoint or state dict: fill in missing names, refuse conflicting values."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import TyingConfig, TyingError
from .anatomy import Anatomy
from .depth_groups import SUFFIX
from .groups import TieGroup, declaration_of, groups_held, locate, make_groups, names_held
from .relaxation import Relaxation, make_exact, relaxation_at
from .relaxed_values import agrees, chosen_for, is_memory_of, refuse_other_value, refuse_rootless
from .sharding import gathered
from .slots import (
    difference,
    find_parameter,
    find_slot,
    parameter_of,
    same_values,
    set_parameter,
    share_parameter,
    slot_of,
    state_key,
)

logger = logging.get_logger(__name__)


def tie_loaded(model: PreTrainedModel, missing: set[str]) -> list[TieGroup]:
    """Tie `model` right after `from_pretrained` has filled its parameters; names dealt with leave `missing`.

    Args:
        model: model whose parameters hold the values of the file. Those in `missing` hold new values.
        missing: parameter names that the file did not have (changed in place).

    Returns:
        The groups that hold now: all, unless `on_conflict="keep_untied"` gave some up.

    Raises:
        TyingError: when names of one group have different values and `on_conflict` does not choose.
    """
    config = TyingConfig.in_config(model.config)
    anatomy = Anatomy(model)
    _refuse_out_of_reach(anatomy, config, missing)
    names = {name for chain in (*(group.names for group in groups_held(model)), *anatomy.declarable) for name in chain}
    of_differences = (p for part in model.modules() if isinstance(part, Relaxation) for p in part._parameters.values())
    with gathered((*(find_parameter(model, name) for name in names), *of_differences), write=True):
        return _tie_filled(anatomy, config, missing)


def _tie_filled(anatomy: Anatomy, config: TyingConfig, missing: set[str]) -> list[TieGroup]:
    model = anatomy.model
    kept: list[TieGroup] = []
    freed: list[str] = []
    for name in sorted(missing):  # all processes in one order, since ZeRO-3 gathers here
        if isinstance(module := slot_of(model, name)[0], Relaxation):
            module.start()  # the file has no difference: the member starts at its root
    for group in _with_new_ones(anatomy, missing):
        # Names of another shape in the file (ignore_mismatched_sizes) are still on the meta device, alone.
        blank = [name for name in group.names if parameter_of(model, name).is_meta]
        unfilled = missing | set(blank if len(blank) < len(group.names) else [])
        # The file has the whole values of relaxed names, and their differences from the root beside them.
        relaxed = refuse_rootless(model, group, [name for name in group.names if name not in unfilled])
        whole, unfilled = relaxed - unfilled, unfilled | relaxed
        present = [name for name in group.names if name not in unfilled]
        if not present:
            logger.warning(
                f"The file has no name of group {group.name!r} ({', '.join(group.names)}): newly initialised."
            )
            parts, filled = [list(group.names)], []
        else:
            parts = parts_by_value(present, lambda name: parameter_of(model, name))
            if len(parts) > 1:
                parts = settle(config, group, parts, lambda name: parameter_of(model, name))
            root = parameter_of(model, parts[0][0])
            given = {name: parameter_of(model, name) for name in group.names if name in whole}
            apart = [name for name, value in given.items() if not agrees(model, name, root, value, {})]
            if apart and chosen_for(config, group, apart, present) == "keep_untied":
                freed += apart
                parts += [[name] for name in apart]
            filled = [name for name in group.names if name in unfilled and [name] not in parts]
        for i, part in enumerate(parts):
            names = [name for name in group.names if name in part or i == 0 and name in filled]
            source = parameter_of(model, part[0])
            for name in names:
                set_parameter(model, name, source)
            if len(names) > 1:
                kept.append(TieGroup(group.name if i == 0 else f"{group.name}_{i + 1}", tuple(names)))
        missing.difference_update(filled)
    for name in freed:
        make_exact(model, name)
        missing.difference_update([each for each in missing if each.startswith(f"{name}{SUFFIX}.")])
    kept = [TieGroup(group.name, tuple(n for n in group.names if find_slot(model, n))) for group in kept]
    _fill_untied(anatomy, missing)
    return [group for group in kept if len(group.names) > 1]


def initial_parameter(model: PreTrainedModel, group: TieGroup) -> nn.Parameter:
    """The parameter that a new model keeps of `group`: one that a file has filled before any that is just initialised.

    A new model can be put together from loaded ones (`EncoderDecoderModel(encoder=..., decoder=...)`).

    Raises:
        TyingError: when two of them were loaded and differ; a config cannot say whose values to take.
    """
    held = [(name, parameter_of(model, name)) for name in group.names]
    loaded = [(name, p) for name, p in held if getattr(p, "_is_hf_initialized", False) and not p.is_meta]
    for name, parameter in loaded[1:]:
        with gathered((parameter, loaded[0][1])):
            if not same_values(parameter, loaded[0][1]):
                raise TyingError(
                    f"The config ties {loaded[0][0]!r} and {name!r} (group {group.name!r}), but both were loaded with "
                    f"values of their own ({difference(loaded[0][1], parameter)}), and tying keeps one. Put the model "
                    "together without the `tying` entry, then tie(model, ..., init_from=...)."
                )
    return loaded[0][1] if loaded else parameter_of(model, group.root)


def check_loaded_state(model: nn.Module, state: dict, prefix: str, action: str = "load") -> dict[str, str]:
    """Refuse a state dict with different values for the names of one group, unless `on_conflict` chooses one.

    An entry that lies in the model's own memory brings no value: loaders put the live state dict below what they read.

    Args:
        model: model with `tie_groups`.
        state: tensors by the names of the model, each after `prefix`. Changed in place where `on_conflict` chooses.
        prefix: prefix of the model's names in `state`.
        action: verb of the message, `"load"` or `"save"`.

    Returns:
        For each group that `state` brings a value for, from its root to the name of that value.

    Raises:
        TyingError: when values differ and nothing was chosen, or cannot be compared; nothing is changed then.
    """
    config = declaration_of(model)
    brought = {}
    for group in groups_held(model):
        keys = {name: key for name in group.names if (key := prefix + state_key(model, name)) in state}
        if action == "load":
            relaxed = refuse_rootless(model, group, keys)
            exact = [key for name, key in keys.items() if name not in relaxed]
            for name in relaxed & keys.keys():
                refuse_other_value(model, config, group, name, state, exact[0], prefix)
                state[keys[name]] = state[exact[0]]  # it has the whole value there, and the root's in the model
            live = find_parameter(model, group.root)
            keys = {name: key for name, key in keys.items() if not is_memory_of(live, state[key])} or keys
        parts = parts_by_value(list(keys), lambda name: state[keys[name]])  # noqa: B023
        if len(parts) > 1:
            if action == "load" and config.on_conflict.startswith("use:"):
                chosen = settle(config, group, parts, lambda name: state[keys[name]])[0][0]  # noqa: B023
                for key in keys.values():
                    state[key] = state[keys[chosen]]
                brought[group.root] = chosen
                continue
            apart = difference(state[keys[parts[0][0]]], state[keys[parts[1][0]]])
            raise TyingError(
                f"Cannot {action} this state dict: {parts[0][0]!r} and {parts[1][0]!r} are one parameter (group "
                f"{group.name!r}), but it has different values for them ({apart}). Remove the wrong one from the "
                "state dict, or untie(model) first to keep both."
            )
        if keys:
            brought[group.root] = next(iter(keys))
    return brought


def with_all_names(model: PreTrainedModel, state: Mapping) -> dict:
    """Copy `state`, and add the missing names of each group that it has a name of."""
    filled = OrderedDict(state)
    if (metadata := getattr(state, "_metadata", None)) is not None:
        vars(filled)["_metadata"] = metadata
    for group in groups_held(model):
        keys = [state_key(model, name) for name in group.names]
        exact = [state_key(model, name) for name in group.names if relaxation_at(model, name) is None]
        present = next((key for key in exact if key in state), None)
        for key in keys if present is not None else ():
            filled.setdefault(key, state[present])
    return filled


def tie_assigned(model: nn.Module, incompatible_keys: object) -> None:
    """Make groups one parameter again after `load_state_dict(assign=True)` has replaced their parameters."""
    names = vars(model).pop("_assigned_names", {})
    for group in getattr(model, "tie_groups", ()):  # a model inside that was untied still has the hook
        if group.root in names:
            share_parameter(model, group.names, parameter_of(model, names[group.root]))


def parts_by_value(names: list[str], value_of: Callable[[str], torch.Tensor]) -> list[list[str]]:
    """Partition `names` by value. Two tensors on the meta device are both offloaded to disk, and count as equal."""
    parts: list[list[str]] = []
    for name in names:
        value = value_of(name)
        for part in parts:
            other = value_of(part[0])
            if value is other or value.is_meta and other.is_meta or same_values(value, other):
                part.append(name)
                break
        else:
            parts.append([name])
    return parts


def settle(
    config: TyingConfig,
    group: TieGroup,
    parts: list[list[str]],
    value_of: Callable[[str], torch.Tensor],
    choose: str = "the `tying` entry of config.json, or from_pretrained(..., tying={**entry, 'on_conflict': ...})",
) -> list[list[str]]:
    """The parts to keep apart, as `on_conflict` says.

    Args:
        config: the declaration, with `on_conflict`.
        group: group whose names differ.
        parts: its names, by value (see `parts_by_value`).
        value_of: value of a name.
        choose: where a choice is written, for the message. Default: the config of a `PreTrainedModel`.

    Raises:
        TyingError: when nothing was chosen, or a name that is not in conflict.
    """
    names = [name for part in parts for name in part]
    if config.on_conflict == "keep_untied":
        logger.warning(f"Group {group.name!r} has different values in the file: kept untied, the config is corrected.")
        return parts
    if config.on_conflict.startswith("use:"):
        chosen = config.on_conflict.removeprefix("use:")
        if chosen in names:
            return [[chosen, *(name for name in names if name != chosen)]]
        raise TyingError(
            f"on_conflict is {config.on_conflict!r}, but the conflict is between {', '.join(map(repr, names))} "
            f"(group {group.name!r}): expected 'use:' and one of these names."
        )
    apart = difference(value_of(parts[0][0]), value_of(parts[1][0]))
    raise TyingError(
        f"The file has different values for names that the config ties (group {group.name!r}): {parts[0][0]!r} and "
        f"{parts[1][0]!r}, {apart}. No weights are dropped unasked. Choose by {choose}: 'use:{parts[0][0]}' or "
        f"'use:{parts[1][0]}' takes one for all, 'keep_untied' keeps both and corrects the config."
    )


def _with_new_ones(anatomy: Anatomy, missing: set[str]) -> list[TieGroup]:
    """The groups of the model, and those that a wider class than the file's declares for its additional names."""
    model = anatomy.model
    new = [chain for chain in anatomy.declared if missing.issuperset(chain)]
    if not new or getattr(model, "_is_declared_class", lambda: True)():
        return groups_held(model)
    named = names_held(model)
    held = {name for names in named.values() for name in names}
    new = [chain for chain in new if not held & set(chain)]
    return make_groups(anatomy, [*named.values(), *new], named)


def _refuse_out_of_reach(anatomy: Anatomy, config: TyingConfig, missing: set[str]) -> None:
    """Refuse a base model whose shared matrix the file keeps under a name of the head only."""
    model = anatomy.model
    if missing.issuperset(anatomy.slots):
        return  # nothing in the file is for this class, as transformers reports
    for group, names in config.groups.items():
        places = {name: locate(anatomy, name) for name in names}
        inside = [place for place in places.values() if place in anatomy.slots]
        outside = [name for name, place in places.items() if place is None]
        if inside and outside and all(place in missing for place in inside):
            named = model.config.architectures
            architecture = named[0] if isinstance(named, list) and named else "the class that wrote it"
            raise TyingError(
                f"The file has no {inside[0]!r}: it is tied (group {group!r}) and kept under {outside[0]!r}, which "
                f"{type(model).__name__} does not have. Load it as {architecture} and take `.base_model`."
            )


def _fill_untied(anatomy: Anatomy, missing: set[str]) -> None:
    """Give each name its own copy, as `untie` does, where a file that was written tied is opened untied.

    They remain missing in the report of the load, for the file did not have them.
    """
    model = anatomy.model
    held = {name: group for group in groups_held(model) for name in group.names}
    for names in anatomy.declarable:
        present = [name for name in names if name not in missing]
        for name in names:
            if name in missing and name not in held and present:
                value = parameter_of(model, present[0])
                set_parameter(model, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
                logger.warning(
                    f"The file has no {name!r}, untied in the config: it starts as a copy of {present[0]!r}."
                )
