"""The picture of a `TyingReport`: what is tied, layer by layer, and what each group holds and saves.

A shared parameter has one colour in all parts of the picture, and a number, since a model may have more shared
parameters than an eye has colours.
"""

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from .drawing import BROKEN, OTHER, distinct_colors, plain
from .layer_order import is_index
from .module_groups import ModuleGroup, module_groups
from .names import printable, ranges, scheme_words, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

    from .records import GroupReport, TyingReport

_WIDTH, _ROW, _FONT = 10.0, 0.24, 8  # inches, inches, points
_LABEL = 44  # characters of a label beside the axes
# A picture has so many rows at most in each part, and so many layers. What is left out is counted in a label.
_MOST_ROWS, _MOST_LAYERS, _MOST_PANELS = 40, 200, 6


class Cell(NamedTuple):
    """A tied name's place in the picture: its stack of layers, its row and layer there, and its group."""

    stack: str
    row: str
    layer: int
    group: int
    apart: bool


def draw_report(report: "TyingReport", figure: "Figure") -> None:
    """Draw a report in an empty figure, which takes the size that is needed.

    Args:
        report: what is drawn.
        figure: one that places its axes by `layout="constrained"`.
    """
    colors = distinct_colors(len(report.groups))
    by_part = sorted(enumerate(report.groups), key=lambda numbered: numbered[1].part or "")
    cells = [cell for i, group in by_part for cell in cells_of(group, i)]
    stacks = sorted(dict.fromkeys(cell.stack for cell in cells), key=bool)[:_MOST_PANELS]  # names without layers first
    rows_of = {stack: list(dict.fromkeys(cell.row for cell in cells if cell.stack == stack)) for stack in stacks}
    bars = module_groups(report.groups)
    heights = [min(len(rows), _MOST_ROWS) * _ROW + 0.75 for rows in rows_of.values()]
    heights.append((min(len(bars), _MOST_ROWS) + 1) * _ROW * 1.35 + 1.0)
    figure.set_size_inches(_WIDTH, sum(heights) + 0.5)
    scheme = scheme_words(report.scheme, len(report.groups))
    title = f"{shortened(printable(report.architecture), 60)}: {report.parameters:,} parameters{scheme}"
    figure.suptitle(plain(title), fontsize=11)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for stack, panel in zip(stacks, axes, strict=False):
        own = [cell for cell in cells if cell.stack == stack]
        _draw_grid(panel, stack, rows_of[stack], own, colors)
    if more := len({cell.stack for cell in cells}) - len(stacks):
        axes[len(stacks) - 1].set_xlabel(f"and {more:,} more stacks of layers", fontsize=_FONT, loc="left")
    if stacks:
        axes[0].set_title("tied names: what has the same number and colour is one parameter", fontsize=9, loc="left")
    _draw_bars(axes[-1], report, bars, colors)


def cells_of(group: "GroupReport", index: int) -> list[Cell]:
    """The cells of one group. A name without the number of a layer has a row of its own, in the stack `""`."""
    cells = []
    for name in group.names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if is_index(part)), None)
        if place is None or int(parts[place]) >= _MOST_LAYERS:
            role = f" ({group.roles[name]})" if name in group.roles else ""
            cells.append(Cell("", f"{name}{role}", 0, index, name in group.apart))
            continue
        row = ".".join(parts[place + 1 :]) or "(the layer)"
        cells.append(
            Cell(
                ".".join(parts[:place]),
                f"{row}, {group.part}" if group.part else row,
                int(parts[place]),
                index,
                name in group.apart,
            )
        )
    return cells


def _draw_grid(axes: "Axes", stack: str, rows: list[str], cells: list[Cell], colors: list[str]) -> None:
    """One stack of layers: a column for each layer, a row for each module, a cell for each tied name."""
    shown = {row: i for i, row in enumerate(rows[:_MOST_ROWS])}
    columns = max(cell.layer for cell in cells) + 1 if stack or any(cell.layer for cell in cells) else 1
    numbers = columns <= 40
    for cell in cells:
        if cell.row in shown:
            _draw_cell(axes, cell.layer, shown[cell.row], cell.apart, colors[cell.group])
            if numbers:
                _write_number(axes, cell, shown[cell.row], colors[cell.group], columns)
    labels = [_label(row) for row in shown]
    if len(rows) > len(shown):
        labels[-1] = f"{labels[-1]} and {len(rows) - len(shown):,} more rows"
    axes.set_yticks(range(len(shown)), labels, fontsize=_FONT)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(-0.5, max(columns, 8) - 0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if stack:
        axes.set_xlabel(plain(f"layer of {shortened(printable(stack), 60)}"), fontsize=_FONT, loc="left")
        step = 1 if columns <= 24 else 5 if columns <= 100 else 20
        axes.set_xticks(range(0, columns, step), [str(i) for i in range(0, columns, step)], fontsize=_FONT)
    else:
        axes.set_xticks([])


def _draw_cell(axes: "Axes", x: int, y: int, broken: bool, color: str) -> None:
    from matplotlib.patches import Rectangle

    edge = {"edgecolor": BROKEN, "linewidth": 2, "hatch": "xxx"} if broken else {"edgecolor": "white", "linewidth": 1}
    axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, facecolor="white" if broken else color, **edge))


def _write_number(axes: "Axes", cell: Cell, y: int, color: str, columns: int) -> None:
    size = _FONT if columns <= 24 else 5.5
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if cell.apart else None
    ink = BROKEN if cell.apart else _ink(color)
    axes.text(cell.layer, y, str(cell.group + 1), ha="center", va="center", fontsize=size, color=ink, bbox=box)


def _draw_bars(axes: "Axes", report: "TyingReport", rows: list[ModuleGroup], colors: list[str]) -> None:
    """A bar for each row of the table, in pieces of its parameters: held ones are solid, saved ones hatched."""
    index_of = {id(group): i for i, group in enumerate(report.groups)}
    shown = rows[:_MOST_ROWS]
    labels = []
    for y, row in enumerate(shown):
        at = 0
        pieces = [(group, colors[index_of[id(group)]]) for group in row.groups]
        for group, color in pieces:
            shared = min(prod(group.shape), group.parameters_held)
            axes.barh(y, shared, 0.7, left=at, color=color, linewidth=0)
            at += shared
            if apart := group.parameters_held - shared:
                axes.barh(y, apart, 0.7, left=at, color="white", edgecolor=BROKEN, hatch="xxx", linewidth=2)
                at += apart
        for group, color in pieces:
            if saved := group.parameters_saved:
                axes.barh(y, saved, 0.7, left=at, color="none", edgecolor=color, hatch="////", linewidth=0.6)
                at += saved
        labels.append(_row_label(row, [index_of[id(group)] + 1 for group in row.groups]))
    labels.append(
        ("all other parameters" if shown else "all parameters: nothing is tied")
        if len(rows) == len(shown)
        else f"others, and {len(rows) - len(shown)} more rows"
    )
    rest = max(report.parameters - sum(group.parameters_held for group in report.groups), 0)
    widest = max((sum(g.parameters_held + g.parameters_saved for g in row.groups) for row in shown), default=0)
    axes.barh(len(shown), rest, 0.7, color=OTHER)
    if rest > 8 * widest > 0:  # on one scale with a whole model, the factors of an adapter would not be seen
        axes.set_xlim(0, widest * 1.15)
        axes.text(widest * 0.02, len(shown), f"{rest:,}, beyond the axis", va="center", fontsize=_FONT)
    axes.set_yticks(range(len(labels)), labels, fontsize=_FONT)
    for label, row in zip(axes.get_yticklabels(), shown, strict=False):
        if row.status == "broken":
            label.set_color(BROKEN)
            label.set_fontweight("bold")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("number of parameters", fontsize=_FONT)
    axes.xaxis.set_major_formatter(_thousands())
    axes.tick_params(axis="x", labelsize=_FONT)
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        _legend(axes, report)


def _legend(axes: "Axes", report: "TyingReport") -> None:
    from matplotlib.patches import Patch

    keys = [Patch(facecolor="#666666", label="held once")]
    if any(group.parameters_saved for group in report.groups):
        keys.append(Patch(facecolor="none", edgecolor="#666666", hatch="////", label="saved by the tie"))
    if any(group.broken for group in report.groups):
        keys.append(Patch(facecolor="white", edgecolor=BROKEN, linewidth=2, hatch="xxx", label="broken tie"))
    axes.legend(
        handles=keys, fontsize=_FONT, ncols=len(keys), loc="lower right", bbox_to_anchor=(1, 1), frameon=False,
        borderaxespad=0.2,
    )  # fmt: skip


def _row_label(row: ModuleGroup, numbers: list[int]) -> str:
    listed = ranges(numbers)
    broken = "BROKEN " if row.status == "broken" else ""
    return f"{broken}{shortened(listed, 14)}  {_label(row.title)}"


def _label(name: str) -> str:
    return plain(shortened(printable(name), _LABEL))


def _ink(color: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _thousands() -> "Formatter":
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
