"""`hf-tying inspect`: what is tied in a saved model, and whether it is so."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .._extras import MissingLibraryError, require
from .common import FOUND, USAGE, AsJson, Revision, Source, Subfolder, Token, print_error, print_json, readable


def inspect(
    source: Source,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", dir_okay=False, writable=True, help="Also write a picture to this file.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", dir_okay=False, writable=True, help="Also write a page of its own to this file."),
    ] = None,
) -> None:
    """Show what is tied in a model, what is declared, and what the file holds.

    Loads no weights: the config and the headers are read, on the Hub by ranges of bytes. Exit codes: 0 fine, 1 a tie
    is broken, 2 wrong usage, 3 cannot be read.

    Example: hf-tying inspect ./my-model --json
    """
    if plot:
        _refuse_unwritable(plot)
    for path in (plot, html):
        if path and not path.parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is no folder: expected one that exists.")
    with readable("inspect", source, as_json):
        from ..doctor.diagnosis import inspect_source
        from ..report.opening import open_source

        opened = open_source(source, revision, subfolder, token)
        report = inspect_source(opened)
    if plot:
        report.plot(plot)
    if html:
        from ..report.page import write_page

        write_page(report, html)
    if as_json:
        print_json("inspect", source, report.to_dict() | {"commit": opened.commit})
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
        print_error(str(error))
        raise typer.Exit(USAGE) from None
    if plot.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"{plot} ends in {plot.suffix!r}: expected one of {', '.join(sorted(known))}.")
