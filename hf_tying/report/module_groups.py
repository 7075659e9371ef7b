"""Tie groups that belong together: parameters of modules that are shared whole, and groups alike by layer."""

from dataclasses import dataclass, field
from re import sub
from typing import TYPE_CHECKING

from .layer_order import is_index
from .names import patterns

if TYPE_CHECKING:
    from .records import GroupReport


@dataclass(frozen=True)
class ModuleGroup:
    """A row of the table: tie groups that share the same modules, or that are alike from layer to layer.

    Twelve layers that are one are a tie group for each of their parameters, and one row. Six pairs of layers are six
    times as many tie groups, and one row too.

    Args:
        name: the name that the modules were tied under, or the name of the only tie group.
        blocks: tie groups of the row. Those in one list share the same modules, a list for each set of modules.
    """

    name: str
    blocks: list[list["GroupReport"]] = field(default_factory=list)

    @property
    def groups(self) -> "list[GroupReport]":
        """The tie groups of the row."""
        return [group for block in self.blocks for group in block]

    @property
    def title(self) -> str:
        """The name, with dots behind it if it stands for those of several alike."""
        return self.name if len(self.blocks) == 1 else f"{self.name} ..."

    @property
    def status(self) -> str:
        """The status of the tie groups, which is the same for all of them."""
        return self.blocks[0][0].status

    @property
    def count(self) -> str:
        """How many names are tied: `12`; `9 x 12` for 9 parameters of 12 modules; `6 x 9 x 2` for 6 sets of those."""
        first = self.blocks[0]
        counts = [len(self.blocks), len(first), len(first[0].names)]
        return " x ".join(str(count) for i, count in enumerate(counts) if count > 1 or i == 2)

    def places(self, block: "list[GroupReport]") -> list[str]:
        """The names that a block ties, as patterns: of the modules if they share several parameters."""
        if len(block) == 1:
            return patterns(block[0].names)
        return patterns(modules_of(block[0]))


def modules_of(group: "GroupReport") -> list[str]:
    """The names of a group without the ending of its own name: the modules that share this parameter.

    `layers.mlp.weight` is the group of `h.0.mlp.weight` and `h.1.mlp.weight` if `h.0` and `h.1` were tied as `layers`.
    """
    ending = f".{_common_ending([group.name, *group.names])}"
    return [name.removesuffix(ending) for name in group.names]


def module_groups(groups: "list[GroupReport]") -> list[ModuleGroup]:
    """Put tie groups together that a reader takes for one.

    Groups become one row only if they have the same status, roles and places in the file: what is broken stands alone.
    """
    blocks: dict[tuple, list[GroupReport]] = {}
    for group in groups:
        ending = _common_ending([group.name, *group.names])
        key = group.name.removesuffix(f".{ending}"), tuple(modules_of(group)), bool(ending), _state(group)
        blocks.setdefault(key, []).append(group)
    rows: dict[tuple, ModuleGroup] = {}
    for (name, modules, _, state), block in blocks.items():
        alike = (
            sub("[0-9]+", "#", name), _relative(modules), state,
            tuple((_common_ending([g.name, *g.names]), tuple(g.shape), g.dtype, g.part) for g in block),
        )  # fmt: skip
        rows.setdefault(alike, ModuleGroup(name)).blocks.append(block)
    return list(rows.values())


def _common_ending(names: list[str]) -> str:
    """The last parts, between dots, that all names have in common; at least one part is left of each name."""
    parts = [name.split(".")[::-1] for name in names]
    common = [column[0] for column in zip(*(p[:-1] for p in parts), strict=False)]
    count = next((i for i in range(len(common)) if any(p[i] != common[i] for p in parts)), len(common))
    return ".".join(common[:count][::-1])


def _state(group: "GroupReport") -> tuple:
    held = None if group.in_file is None else tuple(name in set(group.in_file) for name in group.names)
    apart = tuple(name in set(group.apart) for name in group.names)
    return group.status, group.declared, held, apart, tuple(group.roles.get(name) for name in group.names)


def _relative(names: tuple[str, ...]) -> tuple[tuple, ...]:
    """Names with each number as its distance from the number in the same place of the first name."""
    first = names[0].split(".")
    rows = []
    for name in names:
        parts: list = name.split(".")
        for i, part in enumerate(parts):
            if is_index(part):
                base = first[i] if i < len(first) else ""
                parts[i] = int(part) - (int(base) if is_index(base) else 0)
        rows.append(tuple(parts))
    return tuple(rows)
