"""What a report says: `TyingReport`, a `GroupReport` for each tie group, and the count of what a tie saves."""

import json
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from math import prod

from rich.table import Table

from .tables import Report

# AdamW keeps two moments for every trained element, in the dtype of the parameter.
_ADAMW_STATES = 2
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GroupReport:
    """One tie group: as it is declared, as it is in the model, and as the file has it.

    Args:
        name: the group's name.
        names: its parameter names, the root first.
        roles: from a name to its role, for the names that have one.
        shape: shape of the one matrix.
        dtype: dtype of its elements, as torch spells it (`"float32"`).
        declared: whether the config, or the class under its flags, ties these names.
        actual: whether they are one `nn.Parameter` in the live model; `None` for a report on files.
        in_file: the names that the file holds; `None` for a report on a live model.
        parameters_saved: number of elements that the tie saves.
        bytes_saved: bytes of weights that it saves in memory.
        optimizer_bytes_saved: bytes of AdamW's two moments that it saves, kept in the weights' dtype.
    """

    name: str
    names: list[str]
    roles: dict[str, str]
    shape: list[int]
    dtype: str
    declared: bool
    actual: bool | None
    in_file: list[str] | None
    parameters_saved: int
    bytes_saved: int
    optimizer_bytes_saved: int

    @property
    def root(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class TyingReport(Report):
    """Made by `tying_report`.

    The table has a block of rows for each group. The picture has a bar for each group, labelled with the names that
    share its matrix: the matrix as the model holds it, and beside it what an untied model would hold in addition.

    Args:
        source: the model's class, or the path that was read.
        architecture: the model's class.
        scheme: the scheme that the ties amount to, or that the file declares; `None` where it declares none.
        parameters: number of elements of all parameters, each counted once.
        groups: a `GroupReport` for each tie group.
    """

    source: str
    architecture: str
    scheme: str | None
    parameters: int
    groups: list[GroupReport] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain types all through, ready for `json.dumps`."""
        return asdict(self) | {
            "parameters_saved": sum(group.parameters_saved for group in self.groups),
            "bytes_saved": sum(group.bytes_saved for group in self.groups),
            "optimizer_bytes_saved": sum(group.optimizer_bytes_saved for group in self.groups),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def _table(self) -> Table:
        scheme = f", scheme {self.scheme}" if self.scheme else ""
        table = Table(title=f"{self.architecture} ({self.source}): {self.parameters:,} parameters{scheme}")
        for column in ("group", "name (root first)", "role", "shape", "declared", "one", "in file", "saved"):
            table.add_column(column, overflow="fold", no_wrap=column.startswith("name"))
        table.caption = "one: a single parameter in the model; saved: parameters, and bytes with AdamW's two moments"
        for group in self.groups:
            for i, name in enumerate(group.names):
                first = i == 0
                table.add_row(
                    group.name if first else "",
                    name,
                    group.roles.get(name, ""),
                    " x ".join(map(str, group.shape)) + f" {group.dtype}" if first else "",
                    _mark(group.declared) if first else "",
                    _mark(group.actual) if first else "",
                    _mark(None if group.in_file is None else name in group.in_file),
                    f"{group.parameters_saved:,} ({_size(group.bytes_saved + group.optimizer_bytes_saved)})" * first,
                    end_section=i == len(group.names) - 1,
                )
        if not self.groups:
            table.add_row("nothing is tied", *[""] * 7)
        return table

    def _draw(self, figure) -> None:
        held = sum(prod(group.shape) for group in self.groups)
        bars = [("all other parameters", max(self.parameters - held, 0), 0)]
        bars += [(_label(group), prod(group.shape), group.parameters_saved) for group in self.groups]
        heights = [1.0 + 0.35 * label.count("\n") for label, _, _ in bars]
        figure.set_size_inches(9, 1.2 + 0.55 * sum(heights))
        axes = figure.subplots()
        at = 0.0
        ticks = []
        for (_, held, saved), height in zip(bars, heights, strict=True):
            axes.barh(at + height / 2, held, height * 0.7, color="tab:blue", label="held" if at == 0 else None)
            if saved:
                axes.barh(
                    at + height / 2, saved, height * 0.7, left=held, color="none", edgecolor="tab:orange", hatch="///",
                    label="saved by the tie" if not any(s for _, _, s in bars[: len(ticks)]) else None,
                )  # fmt: skip
            ticks.append(at + height / 2)
            at += height
        axes.set_yticks(ticks, [label for label, _, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("parameters")
        axes.set_title(f"{self.architecture}: {self.parameters:,} parameters, scheme {self.scheme or 'none'}")
        axes.legend(loc="best", fontsize=8)


def group_report(
    name: str,
    names: list[str],
    role_of: dict[str, str],
    shape: list[int],
    dtype: str,
    size: int,
    declared: bool = True,
    actual: bool | None = None,
    in_file: list[str] | None = None,
    copies: int = 1,
    carriers: Container[str] = (),
) -> GroupReport:
    """A `GroupReport`, with what the tie saves counted: a matrix for each name but the copies that are kept.

    A carrier (BART's `shared`) is not counted: untied, it goes with the source embedding and is no matrix of its own.

    Args:
        role_of: from names to roles; it may have other names too.
        size: bytes of one element.
        copies: how many different parameters the names beside the carriers are. Default 1, as in a tie that holds.
        carriers: names that hold a role's matrix without using it; it may have others too.

    The other arguments are those of `GroupReport`. The defaults are those of a report on files.
    """
    counted = [name for name in names if name not in carriers] or names
    saved = max(len(counted) - copies, 0) * prod(shape) if shape else 0
    return GroupReport(
        name=name,
        names=names,
        roles={n: role_of[n] for n in names if n in role_of},
        shape=shape,
        dtype=dtype,
        declared=declared,
        actual=actual,
        in_file=in_file,
        parameters_saved=saved,
        bytes_saved=saved * size,
        optimizer_bytes_saved=saved * size * _ADAMW_STATES,
    )


def bytes_of(dtype: str) -> int:
    """Bytes of one element, by the dtype's name in a safetensors header; 0 for an unknown name."""
    return _BYTES.get(dtype, 0)


def torch_dtype(dtype: str) -> str:
    """A dtype's name in torch, from its name in a safetensors header."""
    return _TORCH_NAMES.get(dtype, dtype.lower())


def _label(group: GroupReport) -> str:
    lines = [f"{name} ({group.roles[name]})" if name in group.roles else name for name in group.names[:6]]
    more = len(group.names) - len(lines)
    return "\n".join([f"{group.name}:", *lines, *([f"and {more} more"] if more else [])])


def _mark(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
