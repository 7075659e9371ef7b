"""What a report says: `TyingReport`, a `GroupReport` for each tie group, a `Finding` for each fault."""

import json
from collections.abc import Container
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING, Any

from .tables import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

#: Version of the form of `TyingReport.to_dict`.
SCHEMA = 1
# AdamW keeps two moments for every trained element, in the dtype of the parameter.
_ADAMW_STATES = 2


@dataclass(frozen=True)
class Finding:
    """A fault that a report has found.

    Args:
        code: what kind of fault it is. T001: the names of a group have different values or are different parameters.
            T003: the file has no name of a group. T004: what the config declares is not what the model holds. T005: a
            module's sizes are not those of its matrix.
        severity: `"error"`: the model is not what it declares to be. `"warning"` and `"info"` are for what is less.
        message: one or more sentences: expected, found.
        mend: the way out; `None` where the message has it.
        group: name of the tie group; `None` if it is about no group, or about several.
    """

    code: str
    severity: str
    message: str
    mend: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class GroupReport:
    """One tie group: as it is declared, as it is in the model, and as the file has it.

    Args:
        name: the group's name.
        names: its parameter names, the root first. For a factor of Tied-LoRA: the modules that share it.
        roles: role of each name that has one.
        shape: shape of the one matrix.
        dtype: dtype of its elements, as torch spells it (`"float32"`).
        declared: whether the config, or the class under its flags, ties these names.
        actual: whether they are one `nn.Parameter` in the live model; `None` for a report on files.
        in_file: the names that the file holds; `None` for a report on a live model.
        parameters_saved: number of elements that the tie saves.
        bytes_saved: bytes of weights that it saves in memory.
        optimizer_bytes_saved: bytes of AdamW's two moments that it saves, kept in the weights' dtype.
        parameters_held: number of elements that are left with the tie.
        file_bytes_saved: bytes that it saves in the file, beside one that holds every name; 0 for a portable file.
            `None` for a live model.
        status: `"tied"`; `"broken"`: declared, and not so; `"by hand"`: tied, and not declared, so that a file loses
            it; `"apart"`: the values in the file differ, and its config says to keep them (`keep_untied`).
        apart: the names that are not what the root is; empty for a tie that holds.
        compared: how the values of several names in the file were compared: `"whole"`, or `"samples"` of matrices too
            large to be read whole. `None` where nothing was compared.
        part: which factor of an adapter it is, such as `"A"`; `None` for parameters of a model.
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
    parameters_held: int
    file_bytes_saved: int | None = None
    status: str = "tied"
    apart: list[str] = field(default_factory=list)
    compared: str | None = None
    part: str | None = None

    @property
    def root(self) -> str:
        """The name kept on disk."""
        return self.names[0]

    @property
    def broken(self) -> bool:
        """Whether the tie is declared, and is not so."""
        return self.status == "broken"


@dataclass(frozen=True)
class TyingReport(Report):
    """Made by `tying_report`.

    The table has a row for each tie group. Modules that are tied whole have one row, with the count of their
    parameters. The picture shows the tied modules layer by layer, in a colour for each shared parameter, and below
    what each group holds and saves.

    Args:
        source: the model's class, or the path that was read.
        architecture: the model's class.
        scheme: the scheme that the ties amount to, or that the file declares; `None` where it declares none.
        parameters: number of elements of all parameters, each counted once.
        groups: a `GroupReport` for each tie group.
        findings: a `Finding` for each fault; empty if every tie is as declared.
    """

    source: str
    architecture: str
    scheme: str | None
    parameters: int
    groups: list[GroupReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every tie that is declared holds."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain types all through, ready for `json.dumps`: the fields, and the sums of what is saved."""
        files = [group.file_bytes_saved for group in self.groups if group.file_bytes_saved is not None]
        return {"schema": SCHEMA} | asdict(self) | {
            "parameters_saved": sum(group.parameters_saved for group in self.groups),
            "bytes_saved": sum(group.bytes_saved for group in self.groups),
            "optimizer_bytes_saved": sum(group.optimizer_bytes_saved for group in self.groups),
            "file_bytes_saved": sum(files) if files else None,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TyingReport":
        """Make a report again from what `to_dict` gave."""
        known = {each.name: content[each.name] for each in fields(cls)}
        known["groups"] = [GroupReport(**group) for group in content["groups"]]
        known["findings"] = [Finding(**finding) for finding in content["findings"]]
        return cls(**known)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def _table(self, width: int) -> "RenderableType":
        from .text import report_text

        return report_text(self, width)

    def _draw(self, figure: "Figure") -> None:
        from .picture import draw_report

        draw_report(self, figure)


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
    status: str = "tied",
    apart: list[str] | None = None,
    compared: str | None = None,
    part: str | None = None,
) -> GroupReport:
    """Make a `GroupReport`, and count what the tie saves: a matrix for each name but the copies that are kept.

    A carrier (BART's `shared`) is not counted: untied, it goes with the source embedding and is no matrix of its own.

    Args:
        name: the group's name.
        names: its parameter names.
        role_of: role of each name; it may have other names too.
        shape: shape of the one matrix.
        dtype: dtype of its elements.
        size: bytes of one element.
        declared: see `GroupReport`. Default `True`, as in a report on files.
        actual: see `GroupReport`. Default `None`, as in a report on files.
        in_file: see `GroupReport`. Default `None`, as in a report on a live model.
        copies: how many different parameters the names beside the carriers are. Default 1, as in a tie that holds.
        carriers: names that hold a role's matrix without using it; it may have others too. Default none.
        status: see `GroupReport`. Default `"tied"`.
        apart: see `GroupReport`. Default none.
        compared: see `GroupReport`. Default `None`: nothing was compared.
        part: see `GroupReport`. Default `None`, as for parameters of a model.
    """
    counted = [name for name in names if name not in carriers] or names
    elements = prod(shape) if shape else 0
    saved = max(len(counted) - copies, 0) * elements
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
        parameters_held=len(counted) * elements - saved,
        file_bytes_saved=None if in_file is None else (len(names) - len(in_file)) * elements * size,
        status=status,
        apart=apart or [],
        compared=compared,
        part=part,
    )


def missing_in_file(group: GroupReport, file: str) -> Finding:
    """The finding on a group of which the file holds no name."""
    return Finding(
        "T003",
        "error",
        f"group {group.name!r}: expected {group.root!r} or another of its {len(group.names)} names in {file}, found "
        "none: a loader makes it of random numbers.",
        "Save the model again, or take the group out of the config.",
        group.name,
    )
