"""The `hf-tying` command: a file for each of its commands, registered here.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import typer

from ..config import TyingError
from .card import card
from .common import print_error
from .demo import demo
from .diff import diff
from .doctor import doctor
from .export import export
from .inspect import inspect
from .plan import plan
from .publish import publish
from .tie import convert, tie, untie

app = typer.Typer(
    name="hf-tying",
    help="Weight tying for transformers: see what is tied, and make every tie explicit.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (demo, inspect, doctor, diff, tie, untie, convert, plan, export, card, publish):
    app.command()(command)


def main() -> None:
    """Run the command line; a `TyingError` is a message and exit status 1, never a traceback."""
    try:
        app()
    except TyingError as error:
        print_error(str(error))
        raise SystemExit(1) from None
