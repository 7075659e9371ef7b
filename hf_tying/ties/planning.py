"""The plan of a `tie` or an `untie`, from a reading of the model: its groups, their values, and what is refused.

Nothing in this file changes a model.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import SCHEMES, TyingConfig, TyingError, nearest
from .anatomy import Anatomy
from .groups import TieGroup, make_groups, names_held, scheme_chains
from .slots import difference, same_values, why_incomparable
from .vocabulary import vocabularies_of

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def at_stake(anatomy: Anatomy, explicit: Iterable[list[str]] = ()) -> list[nn.Parameter]:
    """The parameters whose values a tie or an untie may read."""
    names = {name for chain in (*explicit, *anatomy.declarable, *anatomy.tied) for name in chain}
    return [anatomy.slots[name] for name in names | anatomy.role_of.keys() if name in anatomy.slots]


def plan_tie(anatomy: Anatomy, config: TyingConfig, explicit: dict[str, list[str]]) -> list[TieGroup]:
    """The groups after `tie`: the present ones, with roles regrouped by the scheme, and the explicit groups added."""
    chains = list(explicit.values())
    chosen = {group: names for group, names in explicit.items() if group != names[0]}  # a list has no name of its own
    named = {**chosen, **names_held(anatomy.model), **explicit}
    if config.scheme is None:
        chains += anatomy.tied
    else:
        # The names that a user gave to groups survive. Those that were made for embeddings follow the new scheme.
        named = {group: names for group, names in named.items() if group in explicit or not _is_made(group)}
        chains += scheme_chains(anatomy, config.scheme)
        if config.scheme == "none":
            chains += [[name for name in chain if name not in anatomy.role_of] for chain in anatomy.tied]
        else:
            chains += [*anatomy.without_roles(anatomy.tied), *anatomy.beside_roles(anatomy.tied)]
            # Other ties of the architecture, if that overwrites nothing.
            others = anatomy.without_roles(anatomy.declarable)
            chains += [chain for chain in others if _equal([anatomy.slots[name] for name in chain])]
    return make_groups(anatomy, [chain for chain in chains if len(chain) > 1], named)


def without_ties(anatomy: Anatomy) -> list[list[str]]:
    """The chains that `untie` without names keeps: carriers, and ties of the architecture besides its embeddings."""
    kept = [*scheme_chains(anatomy, "none"), *anatomy.without_roles(anatomy.declarable)]
    return [[name for name in part if name in chain] for chain in anatomy.tied for part in kept]


def without_names(anatomy: Anatomy, names: str | Iterable[str]) -> list[list[str]]:
    """The chains that are tied now, without `names` (of parameters, of modules, or of groups)."""
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, list | tuple | set) or not all(isinstance(name, str) for name in given):
        raise TyingError(f"Cannot untie {names!r}: expected a parameter name, a list of names, or nothing for all.")
    groups = names_held(anatomy.model)
    # Names on record may not be tied in fact, and are accepted too.
    tied = {name for chain in anatomy.tied for name in chain} | {name for names in groups.values() for name in names}
    leaving: set[str] = set()
    for name in given:
        below = {other for other in tied if other == name or other.startswith(f"{name}.")} or {*groups.get(name, ())}
        if not below:
            state = "does not exist"
            if name in anatomy.slots or name in anatomy.modules:
                state = "is not tied" if name in anatomy.slots else "holds nothing that is tied"
            raise TyingError(f"Cannot untie {name!r}: it {state}{nearest(name, [*tied, *groups])}.")
        leaving |= below
    return [[name for name in chain if name not in leaving] for chain in anatomy.tied]


def _is_made(group: str) -> bool:
    """Whether `group` is a name that `make_groups` gives to groups of embeddings."""
    made = {"embeddings", *SCHEMES["three_way"]}
    return group in made or group.rpartition("_")[0] in made


def _equal(tensors: Sequence[torch.Tensor]) -> bool:
    return all(same_values(tensor, tensors[0]) for tensor in tensors)


def values_to_take(anatomy: Anatomy, groups: list[TieGroup], init_from: str | None) -> dict[str, torch.Tensor]:
    """The new values of groups, by the names of their roots. A group whose root has them already is left out.

    Raises:
        TyingError: values differ and `init_from` does not choose, or cannot be compared.
    """
    slots = anatomy.slots
    chosen = _chosen_names(anatomy, groups, init_from)
    values = {}
    for group in groups:
        # The values of a carrier were never trained.
        used = [name for name in group.names if name not in anatomy.carriers] or group.names
        held = list({id(slots[name]): slots[name] for name in used}.values())
        if len(held) > 1:
            _refuse_absent_values(anatomy, used)
        if _equal(held):
            if not same_values(slots[group.root], held[0]):
                values[group.root] = held[0].detach().clone()
        elif init_from == "mean":
            values[group.root] = torch.stack([p.detach().float() for p in held]).mean(0).to(held[0].dtype)
        elif (name := next((name for name in group.names if name in chosen), None)) is not None:
            values[group.root] = slots[name].detach().clone()
        else:
            apart = difference(held[0], held[1])
            raise TyingError(
                f"The names of group {group.name!r} hold different values ({', '.join(group.names)}; {apart}), and "
                "tying keeps one. Say which: init_from='source' | 'target' | 'output' | 'mean' | a parameter name."
            )
    return values


def _chosen_names(anatomy: Anatomy, groups: list[TieGroup], init_from: str | None) -> set[str]:
    """The parameters that `init_from` names. None for `"mean"`, and without a choice."""
    if not isinstance(init_from, str | None):
        raise TyingError(f"init_from={init_from!r}: expected a role, 'mean', or a name in the tie groups.")
    if init_from is None or init_from == "mean":
        return set()
    if init_from in anatomy.roles:
        return {anatomy.roles[init_from].name}
    if init_from in SCHEMES["three_way"]:
        raise TyingError(
            f"init_from={init_from!r}: {type(anatomy.model).__name__} has no such embedding, only "
            f"{list(anatomy.roles)}."
        )
    names = [name for group in groups for name in group.names]
    chosen = {name for name in names if name == init_from or name.startswith(f"{init_from}.")}
    if not chosen:
        hint = nearest(init_from, [*anatomy.roles, "mean", *names])
        raise TyingError(f"init_from={init_from!r}: expected a role, 'mean', or a name in the tie groups{hint}.")
    return chosen


def _refuse_absent_values(anatomy: Anatomy, names: Iterable[str]) -> None:
    """Refuse names whose values this process cannot compare or copy."""
    for name in names:
        if (why := why_incomparable(anatomy.slots[name])) is not None:
            raise TyingError(f"Cannot tie {name!r}: it {why}.")


def refuse_meta(anatomy: Anatomy, groups: list[TieGroup]) -> None:
    """Refuse groups with a parameter that has no value.

    Raises:
        TyingError: with the way out.
    """
    for name in (name for group in groups for name in group.names):
        if anatomy.slots[name].is_meta:
            declare = "declare the tie in the config: config.tying = {'version': 1, 'scheme': ...}"
            if not isinstance(anatomy.model, PreTrainedModel):
                declare = "let load_tied(module, folder) fill and tie it"
            raise TyingError(
                f"Cannot tie {name!r}: it is on the meta device and has no value. Load the weights first, or "
                f"{declare}."
            )


def compare_vocabularies(
    anatomy: Anatomy,
    groups: list[TieGroup],
    tokenizer: "PreTrainedTokenizerBase | None",
    target_tokenizer: "PreTrainedTokenizerBase | None",
) -> None:
    """Refuse to tie source and target where their tokenizers have other words, or other ids.

    Raises:
        TyingError: with an example.
    """
    given = [each for each in (tokenizer, target_tokenizer) if each is not None]
    if not given:
        return
    if not {"source", "target"} <= anatomy.roles.keys():
        return
    pair = {anatomy.roles[role].name for role in ("source", "target")}
    if not any(pair <= set(group.names) for group in groups):
        return
    # A single tokenizer is compared with itself: MarianTokenizer and FSMTTokenizer can hold two vocabularies.
    source, target = vocabularies_of(given[0])[0], vocabularies_of(given[-1])[1]
    unlike = [word for word in source.keys() | target.keys() if source.get(word) != target.get(word)]
    if unlike:
        example = min(unlike)
        raise TyingError(
            f"Cannot tie source and target: the tokenizers have different vocabularies ({len(source)} and "
            f"{len(target)} words, {len(unlike)} of them with another id or on one side only, as {example!r}: "
            f"{source.get(example)} and {target.get(example)}). One row would stand for two words: train a joint "
            "vocabulary, or join these by hf_tying.data.join_vocabularies."
        )
