"""What a plan says of each tie group on a mesh: as a record, a table, JSON and a picture."""

import json
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING

from rich.table import Table

from ..report.tables import Report
from .collectives import Collective

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class GroupPlan:
    """One tie group on a mesh; or, with an empty name, all parameters that are tied to nothing.

    Attributes:
        name: of the group.
        names: of the parameters; none for what is not tied.
        roles: those that the names have.
        shape: of the matrix; none for what is not tied.
        parameters, bytes: of the whole, once.
        stages: the pipeline stages that hold a copy.
        ranks: the processes that hold a copy or a part of one.
        copies: how many whole copies all of them hold together.
        shards: how many parts a copy is split into.
        unit: the FSDP2 unit that it lies in; `None` without that axis.
        styles: of tensor parallelism, by name; empty without that axis.
        collectives: those of one step that gather it, and keep its copies one.
    """

    name: str
    names: tuple[str, ...]
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    copies: int
    shards: int
    unit: str | None
    styles: dict[str, str] = field(default_factory=dict)
    collectives: tuple[Collective, ...] = ()

    @property
    def sent(self) -> int:
        """Bytes that a rank sends for it in a step."""
        return sum(collective.sent for collective in self.collectives)


@dataclass(frozen=True)
class ParallelPlan(Report):
    """What `parallel_plan` gives.

    Attributes:
        architecture: the model's class.
        mesh: from each axis to its size, the outermost first.
        groups: the tie groups, then what is tied to nothing.
        sent: bytes that a rank sends in a step for its parameters and their gradients, of the stage that sends most.
        sent_untied: the same if each name had a matrix of its own.
        notes: sentences on what does not go together.
    """

    architecture: str
    mesh: dict[str, int]
    groups: list[GroupPlan]
    sent: int
    sent_untied: int
    notes: list[str]

    def to_dict(self) -> dict:
        """All of it, in plain types."""
        return asdict(self) | {"world_size": prod(self.mesh.values())}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _table(self, width: int) -> Table:
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "one process"
        notes = "".join(f"\n{note}" for note in self.notes)
        table = Table(
            title=f"{self.architecture} on {prod(self.mesh.values())} processes ({mesh})",
            caption=f"A rank sends {_size(self.sent)} in a step; untied {_size(self.sent_untied)}.{notes}",
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("group", "names", "MiB", "copies", "ranks", "unit, style", "in a step"):
            table.add_column(heading, overflow="fold")
        for group in self.groups:
            styles = sorted(set(group.styles.values()))
            table.add_row(
                group.name or "not tied",
                "\n".join(group.names[:4]) + (f"\nand {len(group.names) - 4} more" if len(group.names) > 4 else ""),
                f"{group.bytes / 2**20:,.2f}",
                f"{group.copies}" + (f" in {group.shards} parts" if group.shards > 1 else ""),
                _ranges(group.ranks),
                ", ".join([*filter(None, [group.unit]), *styles]) or "-",
                "\n".join(f"{c.kind} over {c.axis}={c.ranks}: {_size(c.sent)} ({c.what})" for c in group.collectives)
                or "-",
            )
        return table

    def _draw(self, figure: "Figure") -> None:
        """A bar for each group: the bytes that a rank sends for it in a step, by collective."""
        figure.set_size_inches(8, 1.5 + 0.6 * len(self.groups))
        axes = figure.subplots()
        colours = {"all_reduce": "tab:blue", "all_gather": "tab:green", "reduce_scatter": "tab:orange"}
        for row, group in enumerate(self.groups):
            left = 0.0
            for collective in group.collectives:
                width = collective.sent / 2**20
                axes.barh(row, width, left=left, color=colours[collective.kind], edgecolor="white")
                left += width
        axes.set_yticks(range(len(self.groups)), [group.name or "not tied" for group in self.groups])
        axes.invert_yaxis()
        axes.set_xlabel("MiB that a rank sends in a step")
        axes.set_title(f"{self.architecture}, {', '.join(f'{axis}={size}' for axis, size in self.mesh.items())}")
        kinds = [kind for kind in colours if any(c.kind == kind for group in self.groups for c in group.collectives)]
        axes.legend(handles=[axes.barh(0, 0, color=colours[kind], label=kind) for kind in kinds])


def _ranges(ranks: tuple[int, ...]) -> str:
    """`0-3, 8` for the numbers 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][-1:] = [rank] if len(parts[-1]) > 1 else [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
