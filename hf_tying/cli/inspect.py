"""`hf-tying inspect`: what is tied in a saved model, and whether it is so."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .._extras import MissingLibraryError, require
from ..config import TyingError

#: Exit codes, beside 0 for a model that is tied as it declares.
FOUND, USAGE, UNREADABLE = 1, 2, 3


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_PATH", help="Folder of a saved model, or its id on the Hub.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write a picture to this file.")] = None,
) -> None:
    """Show what is tied in a model, what is declared, and what the file holds.

    Loads no weights. Exit codes: 0 fine, 1 a tie is broken, 2 wrong usage, 3 cannot be read.
    """
    if plot:
        _refuse_unwritable(plot)
    try:
        from ..report.dispatch import tying_report

        report = tying_report(model)
    except TyingError as error:
        _print_unreadable(model, str(error), as_json)
        raise typer.Exit(UNREADABLE) from None
    if plot:
        report.plot(plot)
    if as_json:
        typer.echo(json.dumps({"schema": 1, "command": "inspect"} | report.to_dict(), indent=2))
    else:
        console = Console()
        typer.echo(report.to_table(width=console.width, color=console.is_terminal and not console.no_color))
    if not report.ok:
        raise typer.Exit(FOUND)


def _refuse_unwritable(plot: Path) -> None:
    """Refuse a picture that cannot be written, before anything is read."""
    try:
        known = require("matplotlib.figure", "--plot", "plots").Figure().canvas.get_supported_filetypes()
    except MissingLibraryError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USAGE) from None
    if plot.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"{plot} ends in {plot.suffix!r}: expected one of {', '.join(sorted(known))}.")
    if not plot.parent.is_dir():
        raise typer.BadParameter(f"{plot.parent} is no folder: expected one that exists.")


def _print_unreadable(model: str, message: str, as_json: bool) -> None:
    from ..report.names import printable_text

    if as_json:
        finding = {"code": "unreadable", "severity": "error", "message": message, "mend": None, "group": None}
        typer.echo(json.dumps({"schema": 1, "command": "inspect", "source": model, "findings": [finding]}, indent=2))
    # Not through rich: names and paths may have brackets, which it would take for markup.
    typer.secho("error ", fg="red", bold=True, err=True, nl=False)
    typer.echo(printable_text(message), err=True)
