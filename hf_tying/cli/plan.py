"""`hf-tying plan`: where tied matrices lie on many processes, and what keeps them one."""

from typing import Annotated

import typer
from rich.console import Console

from .common import AsJson, Plot, Source, print_json, readable, refuse_unwritable_plot


def plan(
    source: Source,
    mesh: Annotated[
        str,
        typer.Option("--mesh", help="Sizes by axis: pp, dp, fsdp, tp. Example: dp=8,tp=2.", metavar="AXIS=SIZE,..."),
    ],
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Show where tied matrices lie on many processes, and what a step sends for them. Reads the config alone.

    Exit codes: 0 fine, 2 wrong usage, 3 cannot be read.

    Example: hf-tying plan ./my-model --mesh dp=8,tp=2
    """
    sizes = _sizes(mesh)
    if plot:
        refuse_unwritable_plot(plot)
    with readable("plan", source, as_json):
        from ..config import TyingError
        from ..parallel.plan import checked_mesh, parallel_plan

        try:
            checked_mesh(sizes)
        except TyingError as error:
            raise typer.BadParameter(str(error), param_hint="--mesh") from error
        found = parallel_plan(source, sizes)
    if as_json:
        print_json("plan", source, {"findings": []} | found.to_dict())
    else:
        console = Console()
        typer.echo(found.to_table(width=console.width if console.is_terminal else 200))
    if plot:
        found.plot(plot)


def _sizes(mesh: str) -> dict[str, int]:
    """`{"dp": 8, "tp": 2}` for `dp=8,tp=2`."""
    sizes = {}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        if not size.strip().isdecimal() or axis.strip() in sizes:
            raise typer.BadParameter(f"{part!r}: expected AXIS=SIZE, each axis once.", param_hint="--mesh")
        sizes[axis.strip()] = int(size)
    return sizes
