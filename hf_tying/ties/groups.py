"""From a model and its `TyingConfig` to concrete tie groups: roles, names, union-find, roots, and the checks on them.

Nothing in this file changes a model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from re import search

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..config import SCHEMES, TyingConfig, TyingError
from .slots import canonical, find_slot, named_slots, unwrap, why_no_parameter

# Where the architecture does not answer by `get_encoder()`, `get_input_embeddings()` and `get_output_embeddings()`:
# FSMT's encoder and decoder have no accessor, and its output accessor returns the decoder's input embedding.
_ROLES_BY_TABLE = {
    "fsmt": {
        "source": "encoder.embed_tokens",
        "target": "decoder.embed_tokens",
        "output": "decoder.output_projection",
    },
}


@dataclass(frozen=True)
class TieGroup:
    """Names of one model that are one `nn.Parameter`. The first is the root, the name kept on disk."""

    name: str
    names: tuple[str, ...]

    @property
    def root(self) -> str:
        return self.names[0]

    @property
    def targets(self) -> tuple[str, ...]:
        return self.names[1:]


# --- roles -----------------------------------------------------------------------------------------------------------


def roles(model: PreTrainedModel) -> dict[str, list[str]]:
    """The parameter names of each role that `model` has: `source`, `target`, `output`.

    A role can have two names where an architecture keeps a carrier beside it: BART, T5 and Marian hold a `shared`
    matrix that is no layer's own. It goes with the source embedding, whatever the scheme, so that it is never left
    as a second, dead matrix that receives no gradient.
    """
    modules = _role_modules(model)
    name_of = {id(module): name for name, module in reversed(list(model.named_modules()))}
    names: dict[str, list[str]] = {}
    for role, module in modules.items():
        module = unwrap(module)
        prefix = canonical(name_of.get(id(module), ""))
        if prefix and _has_matrix(module):
            names[role] = [f"{prefix}.weight"]
    if names:
        holder = "source" if "source" in names else "target" if "target" in names else "output"
        known = {name for members in names.values() for name in members}
        for members in _union(_declared_pairs(model, gated=False)):
            if known & set(members):
                names[holder] = [n for n in members if n not in known] + names[holder]
    return {role: names[role] for role in ("source", "target", "output") if role in names}


def carriers(model: PreTrainedModel) -> set[str]:
    """The names that hold a role's matrix without using it (see `roles`)."""
    return {name for names in roles(model).values() for name in names[:-1]}


def _role_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    if table := _ROLES_BY_TABLE.get(getattr(model.config, "model_type", None)):
        base = model.base_model
        found = {}
        for role, path in table.items():
            try:
                found[role] = base.get_submodule(path)
            except AttributeError:
                continue  # a base model without the head
        return found
    modules = {"output": _ask(model, "get_output_embeddings")}
    if getattr(model.config, "is_encoder_decoder", False):
        modules["source"] = _ask(_ask(model, "get_encoder"), "get_input_embeddings")
        modules["target"] = _ask(_ask(model, "get_decoder"), "get_input_embeddings")
    if modules.get("target") is None:
        modules["target"] = _ask(model, "get_input_embeddings")
    return {role: module for role, module in modules.items() if isinstance(module, nn.Module)}


def _ask(owner, accessor: str):
    """What an accessor answers; `None` where an architecture has none, which is no error here: it lacks the role, and
    a scheme that needs the role is refused by name.

    AttributeError: no such method, or no such owner (a model without an encoder). NotImplementedError: transformers'
    own `get_input_embeddings` where it finds nothing. TypeError: an accessor of custom code that wants an argument.
    """
    try:
        return getattr(owner, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _has_matrix(module: nn.Module) -> bool:
    """Whether `module` has a `weight`, also where pruning or quantisation put something else in its place."""
    return hasattr(module, "weight")


# --- what is declared, what is so ------------------------------------------------------------------------------------


def _declared_pairs(model: nn.Module, gated: bool = True, checked: bool = False) -> list[tuple[str, str]]:
    """(source, target) names from `_tied_weights_keys` of `model` and every model inside it.

    Unlike transformers' own expansion this also goes into `nn.ModuleList` and plain modules, and with `checked` a name
    that does not exist is refused. `gated` leaves out models whose config says `tie_word_embeddings=False`.
    """
    pairs = []
    for prefix, sub in model.named_modules(remove_duplicate=False):
        if not isinstance(sub, PreTrainedModel) or gated and not getattr(sub.config, "tie_word_embeddings", False):
            continue
        declared = stock_keys(sub)
        if not declared:
            continue
        if not isinstance(declared, dict):
            raise TyingError(
                f"{type(sub).__name__}._tied_weights_keys is a {type(declared).__name__}: expected a dict from each "
                "tied name to the name it is tied to (transformers >= 5), as in "
                "{'lm_head.weight': 'model.embed_tokens.weight'}."
            )
        names = [*named_slots(sub), *(name for name, _ in sub.named_buffers(remove_duplicate=False))]
        for target, source in declared.items():
            for pair in _expand(source, target, names, sub, checked):
                pairs.append(tuple(f"{prefix}.{name}" if prefix else name for name in pair))
    return pairs


def stock_keys(model: PreTrainedModel):
    """`_tied_weights_keys` as the architecture declares it, before this package put its own on the instance."""
    return vars(model).get("_stock_tied_weights_keys", model._tied_weights_keys)


def _expand(source: str, target: str, names: list[str], model: nn.Module, checked: bool) -> list[tuple[str, str]]:
    """One entry of `_tied_weights_keys`, spelled out in parameter names."""
    sources, targets = (_named_by(part, names) for part in (source, target))
    if not sources or not targets or len(targets) % len(sources):
        if checked:
            name = source if not sources else target
            why = why_no_parameter(model, name, names)
            raise TyingError(
                f"{type(model).__name__}._tied_weights_keys ties {target!r} to {source!r}, but {name!r} {why}. "
                "Expected names of parameters of this model: correct the declaration."
            )
        return []
    return [(s, t) for t, s in zip(targets, cycle(sources), strict=False) if s != t]


def _named_by(part: str, names: list[str]) -> list[str]:
    """What one side of an entry means: a parameter, a module, or one of transformers' patterns from a name's start."""
    if set(part) & set("^$*+?{}[]|()\\"):
        return [name for name in sorted(names) if search(f"^{part}", name)]
    return [name for name in sorted(names) if name == part or name.startswith(f"{part}.")]


def scheme_of(model: PreTrainedModel, groups: Iterable[TieGroup]) -> str:
    """The scheme that `groups` amount to for the roles of `model`; `"none"` where no scheme says exactly that."""
    role_names = roles(model)
    group_of = {name: group for group in groups for name in group.names}
    tied = {
        frozenset((a, b))
        for a in role_names
        for b in role_names
        if a < b and (g := group_of.get(role_names[a][-1])) is not None and g is group_of.get(role_names[b][-1])
    }
    for scheme, members in SCHEMES.items():
        if tied == {frozenset((a, b)) for a in members for b in members if a < b}:
            return scheme
    return "none"


# --- from a declaration to groups ------------------------------------------------------------------------------------


def resolve(
    model: PreTrainedModel, config: TyingConfig, strict: bool = True, also: Iterable[list[str]] = ()
) -> list[TieGroup]:
    """The concrete groups of `model` under `config`: flat, disjoint, checked, each with its root first.

    Args:
        model: any `PreTrainedModel`, also on the meta device.
        config: the declaration. Its groups and its scheme are joined; names that meet in two of them make one group.
        strict: refuse names and schemes that the model cannot have. `False` is for another head over the same file
            (`AutoModel` from the file of a language model): what this class has is tied, the rest is left out.
        also: chains of names to join, after those that are declared.

    Raises:
        TyingError: see `TyingConfig`; also for shapes that differ, buffers, unknown names, a scheme without its roles.
    """
    slots = named_slots(model)
    explicit = explicit_groups(model, config, slots, strict)
    chains = list(explicit.values())
    if config.scheme is None:
        chains += [list(pair) for pair in _declared_pairs(model, checked=True)]
    else:
        scheme = scheme_chains(model, config.scheme, strict)
        held = {name for chain in chains for name in chain}
        tied = [name for role in SCHEMES[config.scheme] for name in roles(model).get(role, [])[-1:]]
        if config.save_format is None or not held.issuperset(tied):
            # A bare scheme, not the record of a model: what the architecture ties besides its embeddings (BERT's
            # output bias) stays tied, and a carrier goes with its role. A record says all of that itself.
            if config.scheme != "none":
                chains += other_chains(model, (list(pair) for pair in _declared_pairs(model)))
            chains += scheme
    return make_groups(model, [*chains, *also], explicit, slots)


def scheme_chains(model: PreTrainedModel, scheme: str, strict: bool = True) -> list[list[str]]:
    """The names that `scheme` makes one, and each role's carrier with it, for the roles that `model` has."""
    role_names = roles(model)
    missing = [role for role in SCHEMES[scheme] if role not in role_names]
    if missing and strict:
        have = ", ".join(f"{role} ({names[-1]})" for role, names in role_names.items()) or "none"
        fits = [s for s, members in SCHEMES.items() if all(role in role_names for role in members)]
        raise TyingError(
            f"{type(model).__name__} cannot be tied {scheme}: it has no {' and no '.join(missing)} embedding. Roles "
            f"found: {have}. Schemes it can have: {', '.join(fits)}."
        )
    joined = [name for role in SCHEMES[scheme] if role in role_names for name in role_names[role]]
    alone = [names for role, names in role_names.items() if role not in SCHEMES[scheme]]
    return [chain for chain in [joined, *alone] if len(chain) > 1]


def other_chains(model: PreTrainedModel, chains: Iterable[list[str]]) -> list[list[str]]:
    """Those of `chains` that have nothing to do with the embeddings."""
    role_names = {name for names in roles(model).values() for name in names}
    return [chain for chain in chains if not role_names & set(chain)]


def make_groups(
    model: PreTrainedModel, chains: list[list[str]], named: dict[str, list[str]], slots: dict[str, nn.Parameter]
) -> list[TieGroup]:
    """Join chains of names that meet, name the results, check every one."""
    role_names = roles(model)
    groups: list[TieGroup] = []
    taken = set()
    for names in _union(chains):
        held = [role for role, members in role_names.items() if set(members) & set(names)]
        given = next((group for group, members in named.items() if set(members) & set(names)), None)
        # Carrier and roles in their order, source first, unless the user named another root.
        first = (
            [n for n in named[given] if n in names]
            if given
            else [n for m in role_names.values() for n in m if n in names]
        )
        ordered = [*first, *(n for n in names if n not in first)]
        base = given or ("embeddings" if len(held) > 1 else held[0] if held else ordered[0].rsplit(".", 1)[-1])
        name = next(n for n in [base, *(f"{base}_{i}" for i in range(2, 10_000))] if n not in taken)
        taken.add(name)
        group = TieGroup(name, tuple(ordered))
        check_group(model, group, slots)
        groups.append(group)
    return groups


def check_group(model: nn.Module, group: TieGroup, slots: dict[str, nn.Parameter]) -> None:
    """Every name is a floating-point parameter, and all have one shape and one dtype."""
    for name in group.names:
        if name not in slots:
            raise TyingError(f"Cannot tie group {group.name!r}: {name!r} {why_no_parameter(model, name, slots)}.")
    root = slots[group.root]
    for name in group.names:
        parameter = slots[name]
        if not parameter.is_floating_point() or "quant" in type(find_slot(model, name)[0]).__module__:
            raise TyingError(
                f"Cannot tie group {group.name!r}: {name!r} is quantised or not floating point ({parameter.dtype}, "
                f"{type(find_slot(model, name)[0]).__name__}). Tie before quantising, or leave the name out."
            )
        if parameter.shape != root.shape or parameter.dtype != root.dtype:
            raise TyingError(
                f"Cannot tie group {group.name!r}: expected every name to have the root's shape and dtype, "
                f"{group.root!r} is {tuple(root.shape)} {root.dtype}, {name!r} is {tuple(parameter.shape)} "
                f"{parameter.dtype}. Resize or convert one side first, or leave the name out."
            )


def explicit_groups(model, config: TyingConfig, slots: dict, strict: bool = True) -> dict[str, list[str]]:
    """`config.groups` in the names of this model: module names spelled out, prefixes of the base model put right."""
    groups: dict[str, list[str]] = {}
    modules = modules_of(slots)
    for group, names in config.groups.items():
        located = []
        for name in names:
            located.append(locate(model, name, slots, modules))
            if located[-1] is None and strict:
                raise TyingError(f"Cannot tie group {group!r}: {name!r} {why_no_parameter(model, name, slots)}.")
        present = [place for place in located if place is not None]
        if len(set(present)) < len(present):
            raise TyingError(f"Cannot tie group {group!r}: two of its names {names} mean the same parameter.")
        if len(present) < 2:
            continue
        if all(place in slots for place in present):
            groups[group] = present
            continue
        inside = [_parameters_below(place, slots) for place in present]
        if any(set(members) != set(inside[0]) for members in inside):
            odd = next(i for i, members in enumerate(inside) if set(members) != set(inside[0]))
            differs = sorted(set(inside[0]) ^ set(inside[odd]))[:3]
            raise TyingError(
                f"Cannot tie group {group!r}: {present[0]!r} and {present[odd]!r} do not have the same parameters "
                f"(differing: {differs}). Name parameters one by one instead of modules."
            )
        for relative in inside[0]:
            key = f"{group}.{relative}" if relative else group
            groups[key] = [f"{place}.{relative}" if relative else place for place in present]
    return groups


def locate(model: PreTrainedModel, name: str, slots: dict[str, nn.Parameter], modules: set[str]) -> str | None:
    """`name` as this class spells it: a base model drops the prefix under which a head model holds it."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for candidate in [name, name.removeprefix(prefix), prefix + name]:
        if candidate in slots or candidate in modules:
            return candidate
    return None


def modules_of(slots: dict[str, nn.Parameter]) -> set[str]:
    """The paths of all modules that hold a parameter somewhere below."""
    modules: set[str] = set()
    for name in slots:
        while (name := name.rpartition(".")[0]) and name not in modules:
            modules.add(name)
    return modules


def _parameters_below(name: str, slots: dict[str, nn.Parameter]) -> list[str]:
    """The parameters of module `name`, relative to it; `[""]` when `name` is itself a parameter."""
    if name in slots:
        return [""]
    return [n[len(name) + 1 :] for n in slots if n.startswith(f"{name}.")]


def _union(chains: Iterable[Iterable[str]]) -> list[list[str]]:
    """Join chains that share a name (undirected, so that chains and cycles need no care); order of first mention."""
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


def subgroups(groups: Iterable[TieGroup], prefix: str) -> Iterator[TieGroup]:
    """The groups as the model inside under `prefix` sees them: names below the prefix, at least two of them."""
    for group in groups:
        inner = tuple(n.removeprefix(f"{prefix}.") for n in group.names if n.startswith(f"{prefix}."))
        if len(inner) > 1:
            yield TieGroup(group.name, inner)


def declared_groups(model: PreTrainedModel) -> list[TieGroup]:
    """The groups that the classes of a stock model declare under its config."""
    return make_groups(model, [list(pair) for pair in _declared_pairs(model)], {}, named_slots(model))


def declared_partition(model: PreTrainedModel) -> set[frozenset[str]]:
    """What the stock loader would tie by itself, given the flags in the config as they are."""
    return {frozenset(chain) for chain in _union(_declared_pairs(model))}


def split_declared(model: PreTrainedModel) -> list[list[str]]:
    """The groups that the classes could tie, whatever the config says."""
    return _union(_declared_pairs(model, gated=False))
