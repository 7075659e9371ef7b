"""The ties of a plain `nn.Module`: a record on the module, and hooks by which `load_state_dict` keeps them.

A plain module has no config. So the record is two attributes of the module: `tie_groups`, as under `TiedModelMixin`,
and `_tying`, the entry that `config.json` would have. Copies and pickles carry both. The class stays as it is.
"""

from typing import Any

from torch import nn

from ..config import TyingConfig, TyingError
from .checkpoint import check_loaded_state, tie_assigned
from .groups import TieGroup, declaration_of, groups_held, subgroups
from .relaxation import relax_entries
from .resizing import fit_tied
from .slots import canonical, parameter_of, share_parameter, state_key


def hold(module: nn.Module, groups: list[TieGroup], **changes: Any) -> None:
    """Make each group one parameter (that of its root), and record the groups on `module`.

    Modules inside with a record of their own get the part of it that lies within them.

    Args:
        module: module to change in place.
        groups: all groups that are to hold.
        **changes: new values of fields of the entry (see `record.write_config`).
    """
    for group in groups:
        share_parameter(module, group.names, parameter_of(module, group.root))
    _record(module, groups, **changes)
    for place, inner in module.named_modules():
        if place and "_tying" in vars(inner):
            _record(inner, list(subgroups(groups, canonical(place))))
    fit_tied(module)


def refuse_extensions(module: nn.Module, config: TyingConfig) -> None:
    """Refuse entries beside the ties, which act in the steps of a `PreTrainedModel`.

    Raises:
        TyingError: naming the entries.
    """
    if further := [*config.declared_extensions()]:
        raise TyingError(
            f"{type(module).__name__} cannot have {', '.join(map(repr, further))}: expected a transformers "
            "PreTrainedModel, found a plain nn.Module. Leave the entry out, and call hf_tying.losses in its training."
        )


def _record(module: nn.Module, groups: list[TieGroup], **changes: Any) -> None:
    entry = declaration_of(module) if "_tying" in vars(module) else TyingConfig()
    vars(module)["tie_groups"] = groups
    names = {group.name: list(group.names) for group in groups}
    entry = entry.replace(**changes, scheme=None, groups=names, relax=relax_entries(module))
    entry = entry.replace(save_format=entry.save_format or "portable")
    vars(module)["_tying"] = entry.to_dict()
    if not any(getattr(hook, "hook", None) is _check_and_fill for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_check_and_fill)
    if tie_assigned not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(tie_assigned)


def _check_and_fill(module: nn.Module, state: dict, prefix: str, metadata: dict, *_: Any) -> None:
    """Refuse conflicting values, and fill in missing names, before torch loads `module`, alone or inside another.

    `state` is torch's own copy of what was given to `load_state_dict`.
    """
    brought = check_loaded_state(module, state, prefix)
    for group in groups_held(module):
        if group.root in brought:
            value = state[prefix + state_key(module, brought[group.root])]
            for name in group.names:
                state.setdefault(prefix + state_key(module, name), value)
    if metadata.get("assign_to_params_buffers", False):
        vars(module)["_assigned_names"] = brought  # made one again by `tie_assigned`, once all modules are loaded
