"""`hf-tying doctor`: what is wrong with a checkpoint's ties, and what loaders will do with it."""

from enum import StrEnum
from typing import Annotated

import typer

from ..config import TyingError
from .common import FOUND, AsJson, Revision, Source, Subfolder, Token, as_annotations, print_json, readable


class Format(StrEnum):
    """How `hf-tying doctor` prints what it has found."""

    text = "text"
    github = "github"


def doctor(
    source: Source,
    loaders: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="LOADERS",
            help="Also say what these do with the file: transformers, vllm, "
            "sglang, llama.cpp, mlx, onnx, with commas between; or all.",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model of an adapter, as SOURCE.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Look for these codes alone: T001,T005.")] = None,
    ignore: Annotated[str | None, typer.Option("--ignore", help="Leave out these codes.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings end with 1, too.")] = False,
    format: Annotated[Format, typer.Option("--format", help="github: annotations for GitHub Actions.")] = Format.text,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Find every disease of a checkpoint's ties, with the evidence, the consequence and the command that mends it.

    Exit codes: 0 fine, 1 a disease was found, 2 wrong usage, 3 cannot be read.

    Example: hf-tying doctor ./my-model --for transformers,vllm
    """  # fmt: skip
    from ..doctor.diagnosis import CODES
    from ..doctor.loaders import LOADERS

    wanted, left_out = (_chosen(value, CODES, flag) for value, flag in ((only, "--only"), (ignore, "--ignore")))
    named = list(LOADERS) if loaders == "all" else _chosen(loaders, LOADERS, "--for")
    with readable("doctor", source, as_json):
        from ..doctor.diagnosis import diagnose_source
        from ..report.dispatch import is_adapter
        from ..report.opening import open_source

        opened = open_source(source, revision, subfolder, token)
        findings = diagnose_source(opened, base, token)
        forecasts = []
        if named:
            from ..doctor.loaders import forecast
            from ..report.checkpoint import read_checkpoint

            if is_adapter(opened):
                raise TyingError(
                    f"{source} is an adapter: --for says what loaders do with a model. Name its base model."
                )
            try:
                forecasts = forecast(read_checkpoint(opened), named)
            except TyingError:  # of a config that makes no class, which is among the findings
                if not findings:
                    raise
    findings = [f for f in findings if (not wanted or f.code in wanted) and f.code not in left_out]
    bad = ("error", "warning") if strict else ("error",)
    if as_json:
        print_json("doctor", source, {
            "commit": opened.commit,
            "findings": [{"code": f.code, "severity": f.severity, "message": f.message, "mend": f.mend,
                          "group": f.group} for f in findings],
            "forecast": [each.to_dict() for each in forecasts],
        })  # fmt: skip
    elif format is Format.github:
        for line in as_annotations(findings, source):
            typer.echo(line)
    else:
        _print(source, findings, forecasts)
    if any(finding.severity in bad for finding in findings):
        raise typer.Exit(FOUND)


def _chosen(value: str | None, known: dict, flag: str) -> list[str]:
    chosen = [part.strip() for part in (value or "").split(",") if part.strip()]
    if unknown := [part for part in chosen if part not in known]:
        raise typer.BadParameter(f"{unknown[0]!r}: expected some of {', '.join(known)}.", param_hint=flag)
    return chosen


def _print(source: str, findings: list, forecasts: list) -> None:
    from rich.console import Console

    from ..report.names import printable, printable_text, wrapped

    width = max(Console().width, 72)
    verdict = f"{len(findings)} found" if findings else "nothing found"
    typer.echo(f"{printable(source)}: {verdict}")
    for finding in findings:
        typer.echo("")
        for line in wrapped(printable_text(f"{finding.code} {finding.severity}: {finding.message}"), width, 2):
            typer.echo(line)
        if finding.mend:
            for line in wrapped(printable_text(f"  mend: {finding.mend}"), width, 4):
                typer.echo(line)
    if forecasts:
        typer.echo("\nthe softmax matrix, by loader")
    for each in forecasts:
        typer.echo(f"  {each.loader:<13} {each.outcome:<13} ({each.checked} {each.version})")
        for line in wrapped(f"    {each.rule}", width, 4):
            typer.echo(line)
