"""`tie` and `untie`, which change the ties of a live model. It is read once; a plan is made, checked, and applied."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..config import SCHEMES, TyingConfig, TyingError, nearest
from .anatomy import Anatomy
from .classes import with_mixin
from .extensions import honour_extensions, refuse_misfits
from .groups import TieGroup, explicit_groups, make_groups, scheme_chains
from .modeling import TiedModelMixin, set_groups
from .plain_modules import hold, refuse_extensions
from .record import refuse_foreign_entry, write_config
from .relaxation import SUFFIX, make_exact, relaxed_names, value_at
from .relaxed import record_relaxed
from .relaxing import fit_before, refuse_unrelaxable, relax_declared, values_before
from .resizing import fit_tied
from .sharding import gathered
from .shared_configs import own_config
from .slots import difference, parameter_of, same_values, set_parameter, untie_others, why_incomparable
from .verify import tied_part, why_unsupported
from .vocabulary import vocabularies_of

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=nn.Module)


def tie(
    model: Model,
    scheme_or_groups: str | list[str] | tuple[str, ...] | dict[str, Any] | TyingConfig,
    init_from: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    target_tokenizer: "PreTrainedTokenizerBase | None" = None,
    on_conflict: str | None = None,
) -> Model:
    """Tie parameters of a live model, in place. From then on `TiedModelMixin` keeps the tie.

    A plain `nn.Module` keeps its class. Its record is on the module (deepcopy and pickle carry it), hooks on
    `load_state_dict` keep the tie, `assert_tied` checks it, and `save_tied` writes it.

    A scheme declares all embeddings: roles that it does not name get their own matrix. Explicit
    groups are added to the ties that the model has. Nothing is changed if anything is wrong.

    Only parameters are tied. Each module keeps its own bias, embedding scale and padding index. So a padding row
    gets no gradient as an input, as before; as a row of the softmax it learns like that of any other word.

    An optimizer made before holds matrices that the model no longer has: make it again.

    Args:
        model: any `PreTrainedModel`; its class gets `TiedModelMixin` in front, under the same name. Or a plain
            `nn.Module`; a scheme needs its `get_input_embeddings` and `get_output_embeddings`.
        scheme_or_groups: declaration of the ties: `"none"`, `"two_way"`, `"source_target"`, `"three_way"`; or a
            list of parameter names (one group, the first is its root); or a dict of named groups; or a dict from each
            tied name to its source, as in transformers' `_tied_weights_keys`; or a `TyingConfig`. The name of a module
            stands for all its parameters.
        init_from: source of the values when those of a group differ: a role (`"source"`, `"target"`,
            `"output"`), `"mean"`, or the name of a parameter or of a module that holds one of each such group. There
            is no default, since one of two trained matrices would be dropped.
        tokenizer: tokenizer of the source side. When source and target are tied, its vocabulary is compared with that
            of `target_tokenizer`: equal sizes are not equal vocabularies. A single tokenizer may hold
            two vocabularies (Marian, FSMT); these are compared.
        target_tokenizer: tokenizer of the target side. Default `None`: `tokenizer`.
        on_conflict: choice recorded for later loads, see `TyingConfig`. Default: that of the `TyingConfig`, or
            `"error"`.

    Returns:
        The same model.

    Raises:
        TyingError: for an unknown scheme or name, a scheme that the model cannot have, differing shapes, differing
            values without `init_from`, quantised sides, tensors on the meta device, an adapted (PEFT) model, different
            vocabularies.
    """
    refuse_unfit(model, "tie", plain=True)
    config = TyingConfig.of(scheme_or_groups)
    if on_conflict is not None:
        config = config.replace(on_conflict=on_conflict)
    if isinstance(model, PreTrainedModel):
        refuse_foreign_entry(model.config)
        refuse_misfits(model, config)
    else:
        refuse_extensions(model, config)
    refuse_unrelaxable(model, config)
    anatomy = Anatomy(model)
    explicit = explicit_groups(anatomy, config)
    with gathered(_at_stake(anatomy, explicit.values()), write=True):
        groups = _plan_tie(anatomy, config, explicit)
        _refuse_meta(anatomy, groups)
        _compare_vocabularies(anatomy, groups, tokenizer, target_tokenizer)
        values = _values_to_take(anatomy, groups, init_from)
        before = values_before(model, config)
        further = config.declared_extensions()  # extensions that are not named stay
        _apply(anatomy, groups, values, on_conflict=config.on_conflict, save_format=config.save_format, **further)
    if config.relax:
        relax_declared(model, config)
        fit_before(model, before)
        record_relaxed(model, config.save_format)
    if isinstance(model, PreTrainedModel):
        honour_extensions(model, config)
    return model


def untie(model: Model, names: list[str] | str | None = None) -> Model:
    """Give names a parameter of their own, in place, and record it in the config, so that nothing ties them again.

    Values are unchanged. The first name keeps the old `nn.Parameter`, the others get a copy: an optimizer made before
    does not know the copies; make it again, or add them by `optimizer.add_param_group`.

    Without `names`, two kinds of ties stay. One is the ties of an architecture besides its embeddings (BERT's output
    bias). The other is a matrix that only carries an embedding (`shared` in BART and T5): alone it would be a dead
    parameter without gradient. Name it to untie it all the same.

    Args:
        model: any `PreTrainedModel` or plain `nn.Module`, tied by this package, by its own class, or by hand.
        names: names to take out of their groups: parameters, modules (for all tied parameters below them) and whole
            groups. Default `None`: all.

    Returns:
        The same model.

    Raises:
        TyingError: for a name that is not tied, or an adapted (PEFT) model.
    """
    refuse_unfit(model, "untie", plain=True)
    if isinstance(model, PreTrainedModel):
        refuse_foreign_entry(model.config)
    anatomy = Anatomy(model)
    remaining = _without_ties(anatomy) if names is None else _without_names(anatomy, names)
    groups = make_groups(anatomy, [chain for chain in remaining if len(chain) > 1], _group_names(model))
    with gathered(_at_stake(anatomy)):
        _apply(anatomy, groups, {}, save_format=None)
    return model


def refuse_unfit(model: nn.Module, action: str, plain: bool = False) -> None:
    """Refuse a model whose ties cannot be changed. `plain` says whether a plain `nn.Module` will do.

    Raises:
        TyingError: for a model that carries adapters, for wrappers, and for what holds a `PreTrainedModel` or is no
            module.
    """
    modules = [*model.modules()] if isinstance(model, nn.Module) else []
    if any("base_layer" in module._modules or "original_module" in module._modules for module in modules):
        raise TyingError(
            f"Cannot {action} a model that carries adapters ({type(model).__name__}): its layers are wrapped by "
            f"PEFT. {action} the base model before get_peft_model, or take the adapters off first by "
            "`model.unload()`."
        )
    if isinstance(model, PreTrainedModel):
        return
    holds_a_model = any(isinstance(module, PreTrainedModel) for module in modules)
    if not plain or not isinstance(model, nn.Module) or holds_a_model:
        raise TyingError(f"Cannot {action} {why_unsupported(model)}")
    if (part := tied_part(model)) is not model:
        raise TyingError(
            f"Cannot {action} a {type(model).__name__}: it is a wrapper. {action} the {type(part).__name__} inside "
            "it, before it is wrapped."
        )


# --- the plan: groups and values, from a reading of the model --------------------------------------------------------


def _at_stake(anatomy: Anatomy, explicit: Iterable[list[str]] = ()) -> list[nn.Parameter]:
    """The parameters whose values a tie or an untie may read."""
    names = {name for chain in (*explicit, *anatomy.declarable, *anatomy.tied) for name in chain}
    return [anatomy.slots[name] for name in names | anatomy.role_of.keys() if name in anatomy.slots]


def _plan_tie(anatomy: Anatomy, config: TyingConfig, explicit: dict[str, list[str]]) -> list[TieGroup]:
    """The groups after `tie`: the present ones, with roles regrouped by the scheme, and the explicit groups added."""
    chains = list(explicit.values())
    named = {**_group_names(anatomy.model), **explicit}
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


def _without_ties(anatomy: Anatomy) -> list[list[str]]:
    """The chains that `untie` without names keeps: carriers, and ties of the architecture besides its embeddings."""
    kept = [*scheme_chains(anatomy, "none"), *anatomy.without_roles(anatomy.declarable)]
    return [[name for name in part if name in chain] for chain in anatomy.tied for part in kept]


def _without_names(anatomy: Anatomy, names: str | Iterable[str]) -> list[list[str]]:
    """The chains that are tied now, without `names` (of parameters, of modules, or of groups)."""
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, list | tuple | set) or not all(isinstance(name, str) for name in given):
        raise TyingError(f"Cannot untie {names!r}: expected a parameter name, a list of names, or nothing for all.")
    groups = _group_names(anatomy.model)
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


def _group_names(model: nn.Module) -> dict[str, list[str]]:
    """The groups that the model has by name, so that names and roots stay as the user chose them."""
    return {group.name: list(group.names) for group in getattr(model, "tie_groups", None) or []}


def _equal(tensors: Sequence[torch.Tensor]) -> bool:
    return all(same_values(tensor, tensors[0]) for tensor in tensors)


def _values_to_take(anatomy: Anatomy, groups: list[TieGroup], init_from: str | None) -> dict[str, torch.Tensor]:
    """The new values of groups, by the names of their roots. A group whose root has them already is left out."""
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


# --- the checks ------------------------------------------------------------------------------------------------------


def _refuse_absent_values(anatomy: Anatomy, names: Iterable[str]) -> None:
    """Refuse names whose values this process cannot compare or copy."""
    for name in names:
        if (why := why_incomparable(anatomy.slots[name])) is not None:
            raise TyingError(f"Cannot tie {name!r}: it {why}.")


def _refuse_meta(anatomy: Anatomy, groups: list[TieGroup]) -> None:
    for name in (name for group in groups for name in group.names):
        if anatomy.slots[name].is_meta:
            declare = "declare the tie in the config: config.tying = {'version': 1, 'scheme': ...}"
            if not isinstance(anatomy.model, PreTrainedModel):
                declare = "let load_tied(module, folder) fill and tie it"
            raise TyingError(
                f"Cannot tie {name!r}: it is on the meta device and has no value. Load the weights first, or "
                f"{declare}."
            )


def _compare_vocabularies(
    anatomy: Anatomy,
    groups: list[TieGroup],
    tokenizer: "PreTrainedTokenizerBase | None",
    target_tokenizer: "PreTrainedTokenizerBase | None",
) -> None:
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


# --- the one writer --------------------------------------------------------------------------------------------------


def _apply(anatomy: Anatomy, groups: list[TieGroup], values: dict[str, torch.Tensor], **changes: Any) -> None:
    """Tie a model by `groups`, and write its config.

    Args:
        anatomy: reading of the model before the change.
        groups: all groups that are to hold.
        values: new values, by the names of roots.
        **changes: further changes of the config's entry (see `record.write_config`).
    """
    model = anatomy.model
    freed = _values_of_freed(model, groups)
    groups = _without_differences(groups, freed)
    if isinstance(model, PreTrainedModel):
        own_config(model)
    untie_others(model, groups)
    for name, value in freed.items():
        make_exact(model, name)
        set_parameter(model, name, nn.Parameter(value, requires_grad=parameter_of(model, name).requires_grad))
    with torch.no_grad():
        for root, value in values.items():
            parameter_of(model, root).copy_(value)  # the root keeps its identity
    if isinstance(model, PreTrainedModel):
        if not isinstance(model, TiedModelMixin):
            model.__class__ = with_mixin(TiedModelMixin, type(model))
        assert isinstance(model, TiedModelMixin)  # for type checkers
        model._ties_made = True
        set_groups(model, groups)
        fit_tied(model)
        write_config(model, anatomy, **changes)
    else:
        hold(model, groups, **changes)
    # A warning, since transformers shows nothing below that level by default.
    logger.warning(f"{type(model).__name__}: {_described(groups)}.")


def _values_of_freed(model: nn.Module, groups: list[TieGroup]) -> dict[str, torch.Tensor]:
    """The whole values of relaxed names that are in no group of `groups`: they become matrices of their own.

    Raises:
        TyingError: where a relaxed name would be a root, which is tied exactly.
    """
    relaxed = {name: group for group, _, name in relaxed_names(model)}
    for group in groups:
        if group.root in relaxed:
            raise TyingError(
                f"{group.root!r} is relaxed (group {relaxed[group.root]!r}), and cannot be the root of other names: "
                "untie the relaxed names, or harden(model) first."
            )
    tied = {name for group in groups for name in group.aliases}
    return {name: value_at(model, name).detach().clone() for name in relaxed if name not in tied}


def _without_differences(groups: list[TieGroup], freed: Iterable[str]) -> list[TieGroup]:
    """Groups without the parameters of differences that are about to go."""
    below = tuple(f"{name}{SUFFIX}." for name in freed)
    kept = [TieGroup(group.name, tuple(n for n in group.names if not n.startswith(below))) for group in groups]
    return [group for group in kept if len(group.names) > 1]


def _described(groups: list[TieGroup], most: int = 3) -> str:
    """Describe groups in one line."""
    parts = []
    for group in groups[:most]:
        more = f" and {len(group.names) - 4} more" if len(group.names) > 5 else ""
        names = group.names[:4] if more else group.names
        parts.append(f"{', '.join(names)}{more} are one parameter (group {group.name!r})")
    if len(groups) > most:
        parts.append(f"and {len(groups) - most} more groups")
    return "; ".join(parts) or "nothing is tied"
