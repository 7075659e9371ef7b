"""The text of a `TyingReport`: a row for each module group, the sums, the faults, and the names that are tied."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .module_groups import ModuleGroup, module_groups
from .names import printable, printable_text, scheme_words, wrapped

if TYPE_CHECKING:
    from .records import TyingReport

# Of a file that declares thousands of groups, a terminal shows the first; JSON has them all.
_MOST_ROWS = 60
_MOST_LINES = 12
_STATUS = {"tied": "yes", "broken": "BROKEN"}
_BROKEN = "bold red"


def report_text(report: "TyingReport", width: int) -> RenderableType:
    """Everything that is printed of a report, in lines of at most `width` columns.

    Names from a file are printed as they are, without markup and control characters.
    """
    rows = module_groups(report.groups)
    scheme = scheme_words(report.scheme, len(report.groups))
    lines = [
        Text(line)
        for line in wrapped(f"{printable(report.architecture)}: {report.parameters:,} parameters{scheme}", width, 2)
    ]
    if report.source != report.architecture:
        lines += [Text(line, style="dim") for line in wrapped(printable(report.source), width, 2)]
    if not rows:
        return Group(*lines, Text("nothing is tied"), *_findings(report, width))
    parts: list[RenderableType] = [*lines, _table(rows[:_MOST_ROWS], width)]
    if len(rows) > _MOST_ROWS:
        parts.append(Text(f"and {len(rows) - _MOST_ROWS:,} more groups: to_dict() and --json have them all"))
    parts += [Text(), *(Text(line) for line in wrapped(_sums(report), width, 2))]
    parts += _findings(report, width)
    for row in rows[:_MOST_ROWS]:
        parts += _names(row, width)
    return Group(*parts)


def size(count: int) -> str:
    """A number of bytes with its unit: `1.5 MiB`."""
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def _table(rows: list[ModuleGroup], width: int) -> Table:
    from_file = any(group.in_file is not None for row in rows for group in row.groups)
    cells = [
        [row.count, _shape(row), _status(row), *([_in_file(row)] if from_file else []), _saved(row)] for row in rows
    ]
    heads = ["names", "shape", "tied", *(["in file"] if from_file else []), "saved"]
    used = sum(max(len(line) for cell in (head, *column) for line in cell.split("\n"))
               for head, column in zip(heads, zip(*cells, strict=True), strict=True))  # fmt: skip
    first = max(width - used - 2 * len(heads), 8)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, show_edge=False)
    for head in ("group", *heads):
        table.add_column(head, justify="right" if head in ("names", "saved") else "left", no_wrap=True)
    for row, row_cells in zip(rows, cells, strict=True):
        name = "\n".join(wrapped(printable(row.title), first))
        style = _BROKEN if row.status == "broken" else None
        table.add_row(*(Text(cell) for cell in (name, *row_cells)), style=style)
    return table


def _shape(row: ModuleGroup) -> str:
    shapes = list(dict.fromkeys(tuple(group.shape) for group in row.groups))
    dtypes = list(dict.fromkeys(group.dtype for group in row.groups if group.dtype))
    shape = " x ".join(f"{n:,}" for n in shapes[0]) if len(shapes) == 1 else f"{len(shapes)} shapes"
    return f"{shape}\n{printable(', '.join(dtypes))}".strip()


def _status(row: ModuleGroup) -> str:
    return _STATUS.get(row.status, row.status)


def _in_file(row: ModuleGroup) -> str:
    group = row.groups[0]
    if group.in_file is None:
        return "-"
    if group.in_file == [group.root]:
        held = "root only"
    elif len(group.in_file) == len(group.names):
        held = "all"
    else:
        held = f"{len(group.in_file)} of {len(group.names)}" if group.in_file else "none"
    differ = group.in_file and row.status in ("broken", "apart")
    return f"{held}\ndiffer" if differ else f"{held}\n(samples)" if group.compared == "samples" else held


def _saved(row: ModuleGroup) -> str:
    parameters = sum(group.parameters_saved for group in row.groups)
    return f"{parameters:,}\n{size(sum(group.bytes_saved for group in row.groups))}"


def _sums(report: "TyingReport") -> str:
    sums = report.to_dict()
    file = [f"{size(sums['file_bytes_saved'])} in the file"] if sums["file_bytes_saved"] is not None else []
    saved = [
        f"{size(sums['bytes_saved'])} in memory",
        *file,
        f"{size(sums['optimizer_bytes_saved'])} of AdamW's moments",
    ]
    return f"saved in all: {sums['parameters_saved']:,} parameters ({', '.join(saved)})"


def _findings(report: "TyingReport", width: int) -> list[Text]:
    lines = []
    for finding in report.findings[:_MOST_LINES]:
        text = f"{finding.code} {finding.message}" + (f" {finding.mend}" if finding.mend else "")
        style = _BROKEN if finding.severity == "error" else "yellow"
        lines += [Text(), *(Text(line, style=style) for line in wrapped(printable_text(text), width, 2))]
    if len(report.findings) > _MOST_LINES:
        lines += [Text(f"and {len(report.findings) - _MOST_LINES:,} more findings", style=_BROKEN)]
    return lines


def _names(row: ModuleGroup, width: int) -> list[Text]:
    style = _BROKEN if row.status == "broken" else ""
    lines = [Text(), *(Text(line, style=f"bold {style}".strip()) for line in wrapped(_heading(row), width, 2))]
    roles = row.groups[0].roles if len(row.groups) == 1 else {}
    if roles or row.groups[0].apart:
        listed: list[str | None] = [*row.groups[0].names]
    else:
        listed = [place for block in row.blocks for place in row.places(block)]
    margin = max((len(role) for role in roles.values()), default=0) + (4 if roles else 2)
    shown = listed if len(listed) <= _MOST_LINES else [*listed[: _MOST_LINES - 2], None, listed[-1]]
    for name in shown:
        if name is None:
            lines.append(Text(f"{'':{margin}}... {len(listed) - _MOST_LINES + 1:,} more"))
            continue
        role = f"  {roles.get(name, '')}" if roles else ""
        apart = name in row.groups[0].apart
        text = wrapped(printable(name) + "  (apart)" * apart, width - margin, 2)
        style = _BROKEN if apart and row.status == "broken" else ""
        lines += [Text(f"{role if i == 0 else '':<{margin}}{line}", style=style) for i, line in enumerate(text)]
    return lines


def _heading(row: ModuleGroup) -> str:
    name = printable(row.title)
    are = "should be one" if row.status == "broken" else "are one"
    if (count := len(row.blocks[0])) > 1:
        modules = "the modules in a line" if len(row.blocks) > 1 else "these modules"
        return f"{name}: {count} parameters of each of {modules} {are}"
    if len(row.blocks) > 1:
        return f"{name}: the names in a line {are}"
    return f"{name}: these {'modules share it' if row.groups[0].part else f'names {are}, the root first'}"
