"""`hf-tying inspect`: what is tied in a saved model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .._extras import require


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_PATH", help="Folder of a saved model, or its id on the Hub.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write a picture to this file.")] = None,
):
    """Show what is tied in a model, what is declared, and what the file holds. Reads no weights."""
    from ..report.dispatch import tying_report

    if plot:
        require("matplotlib.figure", "--plot", "plots")
    report = tying_report(model)
    if as_json:
        typer.echo(report.to_json())
    else:
        console = Console()
        # A pipe has no width: there, names stay on one line, so that they can be searched for.
        typer.echo(report.to_table(width=console.width if console.is_terminal else 200))
    if plot:
        report.plot(plot)
