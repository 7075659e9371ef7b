"""The tags of a model's ties on the Hub."""

from typing import Any

from ..config import SCHEMES, TyingConfig, TyingError, entry_of

#: How the tags begin that this module makes.
OURS = ("weight-tying", "tying:")
#: Names of groups that a scheme makes; a tag of its own is for others.
_OF_A_SCHEME = {"embeddings", *SCHEMES["three_way"]}


def tags_of(config: Any) -> list[str]:
    """The tags for a model's ties, by its config, live or as a dict. None for a config without a `tying` entry."""
    if config is None or entry_of(config) is None:
        return []
    try:
        entry = TyingConfig.in_config(config)
    except TyingError:
        return []
    tags = [f"tying:{entry.scheme}"] if entry.scheme not in (None, "none") else []
    if any(is_of_layers(name, names) for name, names in entry.groups.items()):
        tags.append("tying:groups")
    if entry.loss == "tied":
        tags.append("tying:loss=tied")
    if entry.projection is not None:
        tags.append("tying:projection")
    return ["weight-tying", *tags] if tags else []


def is_of_layers(name: str, names: list[str]) -> bool:
    """Whether a group is one of matrices in the layers of a model, and not of its embeddings and their biases."""
    return name not in _OF_A_SCHEME and not all(each.endswith(".bias") for each in names)
