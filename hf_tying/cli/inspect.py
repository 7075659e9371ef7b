"""`hf-tying inspect`: what is tied in a saved model, and whether it is so."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import (
    FOUND,
    AsJson,
    Plot,
    Revision,
    Source,
    Subfolder,
    Token,
    print_json,
    readable,
    refuse_unwritable_plot,
    refuse_without_folder,
)


def inspect(
    source: Source,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    as_json: AsJson = False,
    plot: Plot = None,
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
        refuse_unwritable_plot(plot)
    if html:
        refuse_without_folder(html)
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
