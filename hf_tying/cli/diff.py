"""`hf-tying diff`: what differs between two checkpoints."""

from typing import Annotated

import typer

from .common import FOUND, AsJson, Token, print_json, readable

_HELP = "As SOURCE of `hf-tying inspect`."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help=_HELP)],
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compare ties, flags, names, shapes and values of two checkpoints.

    Exit codes: 0 the same, 1 they differ, 2 wrong usage, 3 cannot be read.

    Example: hf-tying diff ./my-model ./untied
    """
    with readable("diff", a, as_json):
        from ..doctor.comparing import compare

        found = compare(a, b, token=token)
    if as_json:
        print_json("diff", a, {"other": b, "findings": [], "differences": found})
    else:
        from ..report.names import printable_text

        typer.echo(f"{len(found)} differences" if found else "no difference")
        for each in found:
            rest = ", ".join(f"{key} {value}" for key, value in each.items() if key not in ("what", "name"))
            typer.echo(printable_text(f"{each['what']} {each['name']}: {rest}"))
    if found:
        raise typer.Exit(FOUND)
