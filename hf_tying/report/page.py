"""A `TyingReport` as one HTML page that needs nothing else: ties as a grid of layers and modules, bytes as bars."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .names import printable, printable_text
from .stock_table import generalised
from .text import size

if TYPE_CHECKING:
    from .records import GroupReport, TyingReport

_MOST_GROUPS, _MOST_NAMES = 60, 200
# Colours that are told apart by people who do not see red or green, after Okabe and Ito.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#777777")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bad: #c62828; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li { overflow-wrap: anywhere; } .dim { opacity: .7; } .bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } .grid { width: auto; }
td.n, th.n { text-align: right; white-space: nowrap; } code { font-size: .9em; overflow-wrap: anywhere; }
.bar { display: flex; height: 1.1rem; border-radius: 3px; overflow: hidden; background: var(--soft); }
.cell { display: inline-block; width: 1.1rem; height: 1.1rem; margin: 1px; border-radius: 2px; }
@media (max-width: 30rem) { body { font-size: 15px; } th, td { padding-right: .4rem; font-size: .85rem; }
  td:first-child { min-width: 5.5rem; } td:nth-child(3) { overflow-wrap: normal; } }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; } body { background: #16181d; color: #e8e8e8; } }
"""


def write_page(report: "TyingReport", path: Path) -> Path:
    """Write a report as one HTML file, without scripts and without anything from elsewhere.

    Args:
        report: the report.
        path: the file to write.

    Returns:
        `path`.
    """
    path.write_text(page(report), encoding="utf-8")
    return path


def page(report: "TyingReport") -> str:
    """The HTML of a report."""
    groups = report.groups[:_MOST_GROUPS]
    parts = [
        f"<h1>{_text(report.architecture)}</h1><p class=dim>{_text(report.source)}</p>",
        f"<p>{_verdict(report)}</p>",
        _bars(report),
        *_findings(report),
    ]
    if groups:
        parts += ["<h2>What is tied</h2>", _table(groups), "<h2>Where</h2>", _grid(groups)]
    if len(report.groups) > _MOST_GROUPS:
        parts.append(f"<p class=dim>and {len(report.groups) - _MOST_GROUPS:,} more groups</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report.architecture)}: ties</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _text(value: str) -> str:
    return escape(printable(value))


def _verdict(report: "TyingReport") -> str:
    scheme = f", scheme <b>{_text(report.scheme)}</b>" if report.scheme else ""
    groups = f"{len(report.groups)} tied group{'' if len(report.groups) == 1 else 's'}" if report.groups else "no ties"
    state = "" if report.ok else " <span class=bad>A tie is not as declared.</span>"
    return f"{report.parameters:,} parameters, {groups}{scheme}.{state}"


def _bars(report: "TyingReport") -> str:
    saved = sum(group.parameters_saved for group in report.groups)
    if not saved:
        return ""
    held = sum(group.parameters_held for group in report.groups)
    whole = report.parameters + saved
    rows = (("other", report.parameters - held, "#8886"), ("tied", held, _COLOURS[0]), ("saved", saved, "#8882"))
    bars = "".join(
        f'<span style="width:{100 * max(n, 0) / whole:.2f}%;background:{c}" title="{name}: {n:,}"></span>'
        for name, n, c in rows
    )
    text = ", ".join(f"{name} {n:,} ({n / whole:.0%})" for name, n, _ in rows)
    memory = sum(group.bytes_saved for group in report.groups)
    return (
        f'<h2>Parameters</h2><div class=bar role=img aria-label="{text}">{bars}</div><p class=dim>{text}; ties save '
        f"{size(memory)} of weights and {size(2 * memory)} of AdamW's moments</p>"
    )


def _findings(report: "TyingReport") -> list[str]:
    if not report.findings:
        return []
    rows = []
    for finding in report.findings[:_MOST_GROUPS]:
        style = " class=bad" if finding.severity == "error" else ""
        mend = f"<br><code>{escape(printable_text(finding.mend))}</code>" if finding.mend else ""
        rows.append(f"<li><b{style}>{finding.code}</b> {escape(printable_text(finding.message))}{mend}</li>")
    return ["<h2>Found</h2>", f"<ul>{''.join(rows)}</ul>"]


def _table(groups: "list[GroupReport]") -> str:
    rows = []
    for i, group in enumerate(groups):
        mark = f'<span class=cell style="background:{_COLOURS[i % len(_COLOURS)]}"></span>'
        shape = " x ".join(f"{n:,}" for n in group.shape)
        held = "-" if group.in_file is None else f"{len(group.in_file)} of {len(group.names)}"
        state = "yes" if group.status == "tied" else f"<span class=bad>{_text(group.status)}</span>"
        cells = (
            f"<td>{mark} {_text(group.name)}</td><td class=n>{len(group.names)}</td>",
            f"<td>{shape} {_text(group.dtype)}</td><td>{state}</td>",
            f"<td>{held}</td><td class=n>{group.parameters_saved:,}</td>",
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = ("group", "names", "shape", "tied", "in file", "saved")
    head = "".join(f"<th{' class=n' if name in ('names', 'saved') else ''}>{name}</th>" for name in heads)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _grid(groups: "list[GroupReport]") -> str:
    """A row for each place of a layer, a cell for each layer that has it, in the colour of its group."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for i, group in enumerate(groups):
        for name in group.names[:_MOST_NAMES]:
            rows.setdefault(generalised(name), []).append((name, _COLOURS[i % len(_COLOURS)]))
    lines = []
    for place, cells in rows.items():
        drawn = "".join(f'<span class=cell style="background:{c}" title="{_text(n)}"></span>' for n, c in cells)
        lines.append(f"<tr><td><code>{_text(place)}</code></td><td>{drawn}</td></tr>")
    return f"<div class=wide><table class=grid>{''.join(lines)}</table></div>"
