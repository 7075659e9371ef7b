"""One reading of a model: its slots, its modules, what is tied in it, what its classes declare, and its roles."""

from functools import cached_property
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .declared import declared_pairs, join_chains
from .roles import Role, find_roles
from .slots import find_slot, named_slots, places_of, shared_names


class Anatomy:
    """The facts about a model that `tie`, `untie`, a resize and the report need. Each is read once.

    It does not follow later changes of the model: make a new one after a change.

    Args:
        model: any `PreTrainedModel`, also on the meta device or under adapters; or a plain `nn.Module`, which declares
            nothing. Nothing here changes it.

    Example:
        >>> anatomy = Anatomy(BartForConditionalGeneration(config))
        >>> anatomy.roles["source"]
        Role(name='model.encoder.embed_tokens.weight', carriers=('model.shared.weight',))
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @cached_property
    def places(self) -> list[tuple[str, nn.Module]]:
        """Every module with its path; one that stands at several paths, at each of them."""
        return places_of(self.model)

    @cached_property
    def slots(self) -> dict[str, nn.Parameter]:
        """Every name of every parameter, tied ones under each of their names."""
        return named_slots(self.model, self.places)

    @cached_property
    def own_slots(self) -> list[str]:
        """The names of `slots` without what adapters have added."""
        return [name for name in self.slots if find_slot(self.model, name) is not None]

    @cached_property
    def modules(self) -> set[str]:
        """The paths of all modules that hold a parameter somewhere below."""
        modules: set[str] = set()
        for name in self.slots:
            while (name := name.rpartition(".")[0]) and name not in modules:
                modules.add(name)
        return modules

    @cached_property
    def tied(self) -> list[list[str]]:
        """The names that are one parameter in the model at present."""
        return shared_names(self.slots)

    @cached_property
    def declared(self) -> list[list[str]]:
        """The names that the stock loader would tie by itself, given the flags in the config as they are."""
        return join_chains(self.declared_pairs())

    @cached_property
    def declarable(self) -> list[list[str]]:
        """The names that the classes can tie, under any config."""
        return join_chains(self.declared_pairs(gated=False))

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The roles that the model has, in the order `source`, `target`, `output`."""
        return find_roles(self.model, self.declarable, self.places)

    @cached_property
    def role_of(self) -> dict[str, str]:
        """The role of each name that has one, or that carries the matrix of a role."""
        return {name: role for role, found in self.roles.items() for name in found.names}

    @cached_property
    def one_slot(self) -> list[tuple[str, str]]:
        """The pairs of roles that one module has: a class without a head of its own when it is tied (MPT)."""
        names = {role: found.name for role, found in self.roles.items()}
        return [(a, b) for a in names for b in names if a < b and names[a] == names[b]]

    @cached_property
    def carriers(self) -> set[str]:
        """The names that hold a role's matrix without using it."""
        return {name for role in self.roles.values() for name in role.carriers}

    def declared_pairs(self, gated: bool = True, checked: bool = False) -> list[tuple[str, str]]:
        """The pairs that the classes declare as tied, read at each call (see `declared.declared_pairs`)."""
        return declared_pairs(self.places, self.slots, gated, checked)

    def root_declared(self, names: list[str]) -> list[str]:
        """The name that stock files keep of `names`, in a list; an empty one where the classes tie other names."""
        if not any(set(chain) == set(names) for chain in self.declarable):
            return []
        pairs = self.declared_pairs(gated=False)
        sources, aliases = {source for source, _ in pairs}, {alias for _, alias in pairs}
        return [name for name in names if name in sources and name not in aliases]

    def without_roles(self, chains: list[list[str]]) -> list[list[str]]:
        """Select the chains without a name that has a role."""
        return [chain for chain in chains if not any(name in self.role_of for name in chain)]

    def beside_roles(self, chains: list[list[str]]) -> list[list[str]]:
        """Select the chains with an embedding: one name that has a role, then the names without a role.

        A further use of a matrix (a second decoder, a head of another kind) stays with it under any scheme.
        """
        with_role = [(next((name for name in chain if name in self.role_of), None), chain) for chain in chains]
        return [[first, *(name for name in chain if name not in self.role_of)] for first, chain in with_role if first]


def roles(model: PreTrainedModel) -> dict[str, Role]:
    """The roles that `model` has: `Anatomy(model).roles`."""
    return Anatomy(model).roles


def locate(anatomy: Anatomy, name: str) -> str | None:
    """`name` as this class spells it. A base model has no prefix where a model with a head has one."""
    base = getattr(anatomy.model, "base_model_prefix", "")  # a plain module has none
    prefix = f"{base}." if base else ""
    for candidate in [name, name.removeprefix(prefix), prefix + name]:
        if candidate in anatomy.slots or candidate in anatomy.modules:
            return candidate
    return None
