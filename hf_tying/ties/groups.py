"""Tie groups: the concrete names that a `TyingConfig` ties in a model, with their root and every check.

Nothing in this file changes a model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from ..config import SCHEMES, TyingConfig, TyingError
from ..entries import free_name
from .anatomy import Anatomy, locate
from .declared import join_chains
from .depth_groups import SUFFIX, depth_groups
from .sharding import shape_of
from .shared_layers import located_stacks
from .slots import find_slot, is_quantised, why_no_parameter


@dataclass(frozen=True)
class TieGroup:
    """Names of one model that are one `nn.Parameter`. The first is the root, the name kept on disk."""

    name: str
    names: tuple[str, ...]

    @property
    def root(self) -> str:
        """The name kept on disk."""
        return self.names[0]

    @property
    def aliases(self) -> tuple[str, ...]:
        """The names other than the root."""
        return self.names[1:]


def groups_held(model: nn.Module) -> list[TieGroup]:
    """The groups on record: of a model under `TiedModelMixin`, or of a plain module that was tied."""
    return getattr(model, "tie_groups", [])


def names_held(model: nn.Module) -> dict[str, list[str]]:
    """The names of `groups_held`, by the group: names and roots stay as the user chose them."""
    return {group.name: list(group.names) for group in groups_held(model)}


def declaration_of(model: nn.Module) -> TyingConfig:
    """The declaration on record: in the config of a `PreTrainedModel`, on a plain module itself."""
    if (entry := vars(model).get("_tying")) is not None:
        return TyingConfig.from_dict(entry)
    return TyingConfig.in_config(getattr(model, "config", None))


def scheme_of(anatomy: Anatomy, groups: Iterable[TieGroup]) -> str:
    """The scheme that ties the roles of a model exactly as `groups` do. `"none"` if there is no such scheme."""
    group_of = {name: group for group in groups for name in group.names}
    held = {role: group_of.get(found.name, found.name) for role, found in anatomy.roles.items()}
    tied = {frozenset((a, b)) for a in held for b in held if a < b and held[a] == held[b]}
    for scheme, members in SCHEMES.items():
        if tied == {frozenset((a, b)) for a in members for b in members if a < b}:
            return scheme
    return "none"


# --- from a declaration to groups ------------------------------------------------------------------------------------


def resolve(
    anatomy: Anatomy, config: TyingConfig, strict: bool = True, also: Iterable[list[str]] = ()
) -> list[TieGroup]:
    """The concrete groups of a model under `config`: flat, disjoint, checked, each with its root first.

    Args:
        anatomy: reading of the model.
        config: the declaration. Its groups and its scheme are joined; names that meet in two of them make one group.
        strict: refuse names and schemes that the model cannot have. `False` is for another head over the same file
            (`AutoModel` from the file of a language model): names that this class lacks are left out.
        also: chains of names to join, after those that are declared.

    Raises:
        TyingError: for what `TyingConfig` refuses, different shapes, buffers, unknown names, and a scheme whose
            roles the model lacks.
    """
    explicit = explicit_groups(anatomy, config, strict)
    chains = [names for names in explicit.values() if len(names) > 1]
    if config.scheme is None:
        chains += [list(pair) for pair in anatomy.declared_pairs(checked=True)]
    else:
        scheme = scheme_chains(anatomy, config.scheme, strict)
        held = {name for chain in chains for name in chain}
        tied = [anatomy.roles[role].name for role in SCHEMES[config.scheme] if role in anatomy.roles]
        # A bare scheme is not the record of a model. Other ties of the architecture (BERT's output bias) stay, and a
        # carrier is tied with its role. A record names all of these itself.
        bare = config.save_format is None or len(tied) > 1 and not held.issuperset(tied)
        if bare and config.scheme != "none":
            chains += anatomy.without_roles(anatomy.declared)
        if bare or not strict:  # also for a class with more names than the one that wrote the record (an encoder)
            chains += anatomy.beside_roles(anatomy.declared) if config.scheme != "none" else []
            chains += scheme
    return make_groups(anatomy, [*chains, *also], explicit)


def declared_groups(anatomy: Anatomy) -> list[TieGroup]:
    """The groups that the classes of a stock model declare under its config."""
    return make_groups(anatomy, anatomy.declared, {})


def scheme_chains(anatomy: Anatomy, scheme: str, strict: bool = True) -> list[list[str]]:
    """The names that `scheme` makes one, and each role's carriers with it, for the roles that the model has."""
    found = anatomy.roles
    missing = [role for role in SCHEMES[scheme] if role not in found]
    if missing and strict:
        have = ", ".join(f"{role} ({place.name})" for role, place in found.items()) or "none"
        fits = [s for s, members in SCHEMES.items() if all(role in found for role in members)]
        raise TyingError(
            f"{type(anatomy.model).__name__} cannot be tied {scheme}: it has no {' and no '.join(missing)} embedding. "
            f"Roles found: {have}. Schemes it can have: {', '.join(fits)}.{_without_accessors(anatomy.model)}"
        )
    for a, b in anatomy.one_slot:
        if strict and not {a, b} <= set(SCHEMES[scheme]):
            raise TyingError(
                f"{type(anatomy.model).__name__} cannot be tied {scheme}: its {a} and its {b} embedding are one "
                f"module, {found[a].name!r}, and there is no second one to give a matrix of its own. Make the model "
                "with two, which most classes of this kind do under tie_word_embeddings=False."
            )
    joined = [name for role in SCHEMES[scheme] if role in found for name in found[role].names]
    alone = [list(place.names) for role, place in found.items() if role not in SCHEMES[scheme]]
    return [chain for chain in [joined, *alone] if len(chain) > 1]


def _without_accessors(model: nn.Module) -> str:
    """The way out for a class that has no accessors by which its roles could be found."""
    if all(hasattr(model, f"get_{side}_embeddings") for side in ("input", "output")):
        return ""
    tables = {f"{place}.weight": m.weight for place, m in model.named_modules() if isinstance(m, nn.Embedding)}
    linear = {f"{place}.weight": m.weight for place, m in model.named_modules() if isinstance(m, nn.Linear)}
    fitting = ([table, head] for table, a in tables.items() for head, b in linear.items() if a.shape == b.shape)
    return (
        f" Name the parameters instead: tie(model, {next(fitting, ['embedding.weight', 'head.weight'])}); or give the "
        "class get_input_embeddings() and get_output_embeddings()."
    )


def make_groups(anatomy: Anatomy, chains: list[list[str]], named: dict[str, list[str]]) -> list[TieGroup]:
    """Join chains that share a name, name the resulting groups, and check each.

    Args:
        anatomy: reading of the model.
        chains: lists of parameter names; each list is to be one parameter.
        named: group names that the user gave, with their names, the root first.
    """
    with_role = list(anatomy.role_of)
    groups: list[TieGroup] = []
    taken = set()
    for names in join_chains(chains):
        held = [role for role, place in anatomy.roles.items() if set(place.names) & set(names)]
        given = next((group for group, members in named.items() if set(members) & set(names)), None)
        # The root is the one that the user or the architecture names, else the first of carriers and roles.
        first = [n for n in (named[given] if given else [*anatomy.root_declared(names), *with_role]) if n in names]
        ordered = list(dict.fromkeys([*first, *names]))
        base = given or ("embeddings" if len(held) > 1 else held[0] if held else ordered[0].rsplit(".", 1)[-1])
        name = free_name(base, taken)
        taken.add(name)
        group = TieGroup(name, tuple(ordered))
        check_group(anatomy, group)
        groups.append(group)
    return groups


def check_group(anatomy: Anatomy, group: TieGroup) -> None:
    """Refuse a group unless all its names are floating-point parameters of one shape and one dtype.

    Raises:
        TyingError: with the name that does not fit.
    """
    model, slots = anatomy.model, anatomy.slots
    for name in group.names:
        if name not in slots:
            raise TyingError(f"Cannot tie group {group.name!r}: {name!r} {why_no_parameter(model, name, slots)}.")
    root = slots[group.root]
    stock = {name for chain in anatomy.declared for name in chain if group.root in chain}
    made = vars(model).get("_ties_made", True)
    for name in group.names:
        parameter = slots[name]
        module = find_slot(model, name)[0]
        if is_quantised(module, parameter):
            raise TyingError(
                f"Cannot tie group {group.name!r}: {name!r} is quantised or not floating point ({parameter.dtype}, "
                f"{type(module).__name__}). Tie before quantising, or leave the name out."
            )
        if is_lazy(parameter):
            raise TyingError(
                f"Cannot tie group {group.name!r}: {name!r} has no shape yet ({type(module).__name__}). Call the "
                "module once on a batch first."
            )
        # Names that the architecture declares as tied may differ in dtype, and in a model that is being made in rows:
        # the stock class makes them one.
        unified = name in stock and group.root in stock
        rows = 1 if unified and not made else 0
        if shape_of(parameter)[rows:] != shape_of(root)[rows:] or parameter.dtype != root.dtype and not unified:
            raise TyingError(
                f"Cannot tie group {group.name!r}: expected every name to have the root's shape and dtype, "
                f"{group.root!r} is {tuple(shape_of(root))} {root.dtype}, {name!r} is {tuple(shape_of(parameter))} "
                f"{parameter.dtype}. Resize or convert one side first, or leave the name out."
            )


def explicit_groups(anatomy: Anatomy, config: TyingConfig, strict: bool = True) -> dict[str, list[str]]:
    """Translate `config.groups` to parameter names of this model: modules expanded, base model prefixes corrected.

    A group of another head may have a single name here. It is the root of the group that it is tied to.
    """
    slots = anatomy.slots
    groups: dict[str, list[str]] = {}
    for stack in located_stacks(anatomy, config, strict):
        groups |= depth_groups(anatomy.own_slots, stack)
    for group, names in config.groups.items():
        located = []
        for name in names:
            located.append(locate(anatomy, name))
            if located[-1] is None and strict:
                raise TyingError(
                    f"Cannot tie group {group!r}: {name!r} {why_no_parameter(anatomy.model, name, slots)}."
                )
        present = [place for place in located if place is not None]
        if len(set(present)) < len(present):
            raise TyingError(f"Cannot tie group {group!r}: two of its names {names} mean the same parameter.")
        if not present:
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


def _parameters_below(name: str, slots: Iterable[str]) -> list[str]:
    """The parameters of module `name`, relative to it; `[""]` when `name` is itself a parameter.

    Those of differences (`relaxation`) are not parameters to tie.
    """
    if name in slots:
        return [""]
    return [n[len(name) + 1 :] for n in slots if n.startswith(f"{name}.") and f"{SUFFIX}." not in n]


def subgroups(groups: Iterable[TieGroup], prefix: str) -> Iterator[TieGroup]:
    """Restrict groups to the model inside at `prefix`: those with at least two names below it."""
    for group in groups:
        inner = tuple(n.removeprefix(f"{prefix}.") for n in group.names if n.startswith(f"{prefix}."))
        if len(inner) > 1:
            yield TieGroup(group.name, inner)
