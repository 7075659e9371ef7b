"""`hf-tying tie`, `untie` and `convert`: a new folder with other ties, made from the files."""

from enum import StrEnum
from typing import Annotated

import typer

from .common import AsJson, DryRun, Out, Revision, Source, Subfolder, Token, print_json, readable

InitFrom = Annotated[
    str | None,
    typer.Option(
        "--init-from", help="Where names differ: the role (source, target, output) or the parameter to keep."
    ),
]


class Scheme(StrEnum):
    """What `hf-tying tie` can tie."""

    two_way = "two_way"
    source_target = "source_target"
    three_way = "three_way"


class Form(StrEnum):
    """What `hf-tying convert` can write."""

    portable = "portable"
    dedup = "dedup"
    merged = "merged"
    none = "none"
    two_way = "two_way"
    source_target = "source_target"
    three_way = "three_way"


def tie(
    source: Source,
    scheme: Annotated[Scheme, typer.Argument(metavar="SCHEME", help="two_way, source_target or three_way.")],
    out: Out,
    init_from: InitFrom = None,
    dry_run: DryRun = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with tied embeddings, shard by shard; SOURCE is left as it is.

    Exit codes: 0 written, 2 wrong usage, 3 cannot be read or written, 4 --init-from is missing.

    Example: hf-tying tie ./my-model two_way ./tied --init-from target
    """
    _run("tie", source, out, scheme.value, as_json, init_from=init_from, dry_run=dry_run, revision=revision,
         subfolder=subfolder, token=token)  # fmt: skip


def untie(
    source: Source,
    out: Out,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Names to untie. Default: all.")
    ] = None,
    dry_run: DryRun = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Write a model in which each name has a matrix of its own; where values differ, each keeps its own.

    Exit codes: 0 written, 2 wrong usage, 3 cannot be read or written.

    Example: hf-tying untie ./my-model ./untied
    """
    _run("untie", source, out, "none", as_json, untied=names or None, dry_run=dry_run, revision=revision,
         subfolder=subfolder, token=token)  # fmt: skip


def convert(
    source: Source,
    out: Out,
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="portable: every name; dedup: each matrix once; merged: a projection folded into the "
            "softmax; or a scheme.",
        ),
    ],
    init_from: InitFrom = None,
    dry_run: DryRun = False,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Write a model in another form of file, or with another scheme.

    Exit codes: 0 written, 2 wrong usage, 3 cannot be read or written, 4 --init-from is missing.

    Example: hf-tying convert ./my-model ./portable --to portable
    """  # fmt: skip
    _run("convert", source, out, to.value, as_json, init_from=init_from, dry_run=dry_run, revision=revision,
         subfolder=subfolder, token=token)  # fmt: skip


def _run(command: str, source: str, out: str, to: str, as_json: bool, **options: object) -> None:
    with readable(command, source, as_json):
        from ..doctor.rewriting import rewrite

        done = rewrite(source, out, to, **options)  # type: ignore[arg-type]
    if as_json:
        print_json(command, source, {"findings": [], "dry_run": bool(options["dry_run"])} | done.to_dict())
        return
    from ..report.names import printable
    from ..report.text import size

    verb = "would write" if options["dry_run"] else "wrote"
    typer.echo(f"{verb} {printable(out)}")
    for name, values in done.ties.items():
        typer.echo(f"  tied {printable(name)}: {', '.join(map(printable, values))}")
    for name, old, new in done.changes:
        typer.echo(f"  config: {printable(name)} {printable(str(old))} -> {printable(str(new))}")
    typer.echo(f"  parameters: {done.parameters[0]:,} -> {done.parameters[1]:,}")
    if done.bytes[0]:
        typer.echo(f"  weights: {size(done.bytes[0])} -> {size(done.bytes[1])} in {len(done.files)} file(s)")
    typer.echo(f"  other files: {len(done.copied)}")
    if done.left_out:
        typer.echo(f"  left out: {', '.join(map(printable, done.left_out))}")
