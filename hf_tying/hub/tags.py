"""The tags of a model's ties on the Hub."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..config import SCHEMES, TyingConfig, TyingError, entry_of
from ..report.stock_table import roles_in

#: How the tags begin that this module makes.
OURS = ("weight-tying", "tying:")
_OF_ROLES = {frozenset(roles): scheme for scheme, roles in SCHEMES.items()}


def tags_of(config: Any, role_of: Mapping[str, str] | None = None) -> list[str]:
    """The tags for a model's ties, by its config. None for a config without a `tying` entry.

    Args:
        config: the config, live or as a dict.
        role_of: role of each name that has one. Default: those of the class that the config names.
    """
    if config is None or entry_of(config) is None:
        return []
    try:
        entry = TyingConfig.in_config(config)
    except TyingError:
        return []
    if role_of is None:
        named = config.get("architectures") if isinstance(config, Mapping) else getattr(config, "architectures", None)
        role_of = roles_in(str(named[0])) if named else {}
    roles = {name: [role_of[each] for each in names if each in role_of] for name, names in entry.groups.items()}
    scheme = entry.scheme if entry.scheme not in (None, "none") else scheme_of(roles.values())
    one = not any(roles[name] for name in entry.relax)  # a relaxed tie is one matrix and a difference
    tags = [f"tying:{scheme}"] if scheme and one else []
    if entry.depth or any(is_of_layers(name, names, roles[name]) for name, names in entry.groups.items()):
        tags.append("tying:groups")
    if entry.relax or any("relax" in stack for stack in entry.depth):
        tags.append("tying:relaxed")
    if entry.loss == "tied":
        tags.append("tying:loss=tied")
    if entry.projection is not None:
        tags.append("tying:projection")
    return ["weight-tying", *tags] if tags else []


def scheme_of(groups: Iterable[Iterable[str]]) -> str | None:
    """The scheme that groups amount to, by the roles of each: of the one that has two or more, if it is one."""
    found = [roles for roles in map(frozenset, groups) if len(roles) > 1]
    return _OF_ROLES.get(found[0]) if len(found) == 1 else None


def is_of_layers(name: str, names: Iterable[str], roles: Collection[str]) -> bool:
    """Whether a group is one of matrices in the layers of a model, and not of its embeddings and their biases."""
    made = name in ("embeddings", *SCHEMES["three_way"])  # by a scheme, of a class whose roles are not known here
    return not (roles or made or all(each.endswith(".bias") for each in names))
