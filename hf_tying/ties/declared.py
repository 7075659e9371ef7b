"""The ties that an architecture declares: `_tied_weights_keys` of a model and of the models inside it, expanded."""

from collections.abc import Iterable
from itertools import cycle
from re import search
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import TyingError
from .slots import why_no_parameter


def stock_keys(model: PreTrainedModel) -> Any:
    """`_tied_weights_keys` as the architecture declares it, before this package put its own on the instance."""
    return vars(model).get("_stock_tied_weights_keys", model._tied_weights_keys)


def declared_pairs(
    places: list[tuple[str, nn.Module]], slots: dict[str, nn.Parameter], gated: bool = True, checked: bool = False
) -> list[tuple[str, str]]:
    """Pairs (source, tied name) for each name that a model, or a model inside it, declares as tied.

    As in transformers, a later entry of `_tied_weights_keys` overrides an earlier one for the names that both match
    (RT-DETRv2, D-FINE). Unlike transformers' own expansion this also goes into `nn.ModuleList` and plain modules.

    Args:
        places: modules of the model, see `slots.places_of`.
        slots: parameters of the model, see `slots.named_slots`.
        gated: leave out models whose config says `tie_word_embeddings=False`. Default `True`, as transformers does.
        checked: refuse a declared name that does not exist. Default `False`: it is left out.

    Raises:
        TyingError: for a declaration in the form of transformers 4 (a list), and with `checked` for an unknown name.
    """
    declaring = [
        (prefix, sub, keys)
        for prefix, sub in places
        if isinstance(sub, PreTrainedModel)
        and (not gated or getattr(sub.config, "tie_word_embeddings", False))
        and (keys := stock_keys(sub))
    ]
    if not declaring:
        return []
    buffers = (f"{place}.{name}" if place else name for place, module in places for name in module._buffers)
    all_names = sorted({*slots, *buffers})
    pairs = []
    for prefix, sub, keys in declaring:
        if not isinstance(keys, dict):
            raise TyingError(
                f"{type(sub).__name__}._tied_weights_keys is a {type(keys).__name__}: expected a dict from each "
                "tied name to the name it is tied to (transformers >= 5), as in "
                "{'lm_head.weight': 'model.embed_tokens.weight'}."
            )
        dot = f"{prefix}." if prefix else ""
        names = [name.removeprefix(dot) for name in all_names if name.startswith(dot)]
        source_of: dict[str, str] = {}
        for tied, source in keys.items():
            for root, name in _expand(source, tied, names, sub, checked):
                source_of[name] = source_of.get(root, root)
        pairs += [(dot + source, dot + name) for name, source in source_of.items() if source != name]
    return pairs


def join_chains(chains: Iterable[Iterable[str]]) -> list[list[str]]:
    """Join chains that share a name, in order of first mention. Links have no direction, so cycles do not matter."""
    member_of: dict[str, list[str]] = {}
    for chain in chains:
        merged: list[str] = []
        for name in chain:
            for known in member_of.get(name, [name]):
                if known not in merged:
                    merged.append(known)
        for name in merged:
            member_of[name] = merged
    seen: dict[int, list[str]] = {id(group): group for group in member_of.values()}
    return [group for group in seen.values() if len(group) > 1]


def _expand(source: str, tied: str, names: list[str], model: nn.Module, checked: bool) -> list[tuple[str, str]]:
    """Expand one entry of `_tied_weights_keys` to pairs of parameter names."""
    sources, aliases = (_named_by(part, names) for part in (source, tied))
    if not sources or not aliases or len(aliases) % len(sources):
        if checked:
            name = source if not sources else tied
            why = why_no_parameter(model, name, names)
            raise TyingError(
                f"{type(model).__name__}._tied_weights_keys ties {tied!r} to {source!r}, but {name!r} {why}. "
                "Expected names of parameters of this model: correct the declaration."
            )
        return []
    return list(zip(cycle(sources), aliases, strict=False))


def _named_by(part: str, names: list[str]) -> list[str]:
    """The names that one side of an entry means: a parameter, a module, or a pattern from the start of a name."""
    if set(part) & set("^$*+?{}[]|()\\"):
        return [name for name in names if search(f"^{part}", name)]
    return [name for name in names if name == part or name.startswith(f"{part}.")]
