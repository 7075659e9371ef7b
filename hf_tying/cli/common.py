"""What the commands share: their arguments, their exit codes, and how an error is shown."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._extras import MissingLibraryError, require
from ..config import TyingError

if TYPE_CHECKING:
    from ..report.records import Finding

#: Exit codes, beside 0: something was found; wrong usage; cannot be read; a choice is missing.
FOUND, USAGE, UNREADABLE, UNDECIDED = 1, 2, 3, 4

_SOURCE = "A folder, a file (.safetensors, .bin, .gguf), or owner/name\\[@revision]\\[/subfolder] on the Hub."
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE)]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The new folder. It must not exist, or be empty.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
Subfolder = Annotated[str | None, typer.Option("--subfolder", help="Folder inside of SOURCE.")]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="HF_TOKEN", show_envvar=False, help="Token of the Hub. Default: that of `hf auth`."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", dir_okay=False, writable=True, help="Also write a picture to this file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]


@contextmanager
def readable(command: str, source: str, as_json: bool) -> Iterator[None]:
    """End with one message, and with the exit code of the error, or with 3: the source cannot be read.

    Args:
        command: name of the command, for JSON.
        source: what the user called it.
        as_json: whether JSON is printed, too.
    """
    try:
        yield
    except (TyingError, OSError, RecursionError, MemoryError) as error:
        message = str(error) or f"{source!r:.300} is too deep or too large to be read."
        code = getattr(error, "exit_code", UNREADABLE)
        if as_json:
            name = {FOUND: "unfit", UNDECIDED: "undecided"}.get(code, "unreadable")
            finding = {"code": name, "severity": "error", "message": message, "mend": None, "group": None}
            print_json(command, source, {"findings": [finding]})
        print_error(message)
        raise typer.Exit(code) from None


def refuse_unwritable_plot(plot: Path) -> None:
    """Refuse a picture that cannot be written, before anything is read."""
    try:
        known = require("matplotlib.figure", "--plot", "plots").Figure().canvas.get_supported_filetypes()
    except MissingLibraryError as error:
        print_error(str(error))
        raise typer.Exit(USAGE) from None
    if plot.suffix[1:].lower() not in known:
        raise typer.BadParameter(f"{plot} ends in {plot.suffix!r}: expected one of {', '.join(sorted(known))}.")
    refuse_without_folder(plot)


def refuse_without_folder(path: Path) -> None:
    """Refuse a file whose folder does not exist."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is no folder: expected one that exists.")


def print_error(message: str) -> None:
    """Print a message to standard error, without control characters."""
    from ..report.names import printable_text

    # Not through rich: names and paths may have brackets, which it would take for markup.
    typer.secho("error ", fg="red", bold=True, err=True, nl=False)
    typer.echo(printable_text(message), err=True)


def print_json(command: str, source: str, content: dict[str, Any]) -> None:
    """Print the one object of `--json`."""
    typer.echo(json.dumps({"schema": 1, "command": command, "source": source} | content, indent=2))


def as_annotations(findings: "Iterable[Finding]", file: str) -> Iterator[str]:
    """Findings in the form in which GitHub Actions shows them beside a file."""
    kinds = {"error": "error", "warning": "warning", "info": "notice"}
    for finding in findings:
        text = _escaped(" ".join(part for part in (finding.message, finding.mend) if part))
        place = _escaped(file).replace(":", "%3A").replace(",", "%2C")
        yield f"::{kinds[finding.severity]} file={place},title={finding.code}::{text}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
