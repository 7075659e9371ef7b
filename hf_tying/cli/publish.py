"""`hf-tying publish`: a saved model or adapter on the Hub, after everything that could be wrong was looked at."""

from typing import Annotated

import typer

from .card import BaseModel, Datasets, Folder, Language, License, Result, facts_from, untold
from .common import AsJson, Token, print_json, readable


def publish(
    source: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub: owner/name, or a name.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to publish to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    base_model: BaseModel = None,
    license: License = None,
    language: Language = None,
    dataset: Datasets = None,
    result: Result = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Run the code blocks of the card.")] = True,
    yes: Annotated[
        bool, typer.Option("--yes", help="Publish also what computes something else without hf_tying.")
    ] = False,
    token: Token = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but the upload.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a saved model or Tied-LoRA adapter, with a card that says what is tied.

    An adapter goes up in both forms. The code blocks of the card run first, each in a fresh process.
    Exit codes: 0 fine, 1 the ties or the card are not fit to be published, 2 wrong usage, 3 cannot be read or
    reached, 4 a choice is missing (--base-model, --yes).

    Example: hf-tying publish tied-llama me/tied-llama --dry-run
    """
    facts = facts_from(base_model, license, language, dataset, result)
    with readable("publish", source, as_json):
        from ..hub import publishing

        done = publishing.publish(
            source, repo_id, private=private, revision=revision, create_pr=create_pr, token=token, yes=yes, run=run,
            dry_run=dry_run, **facts,
        )  # fmt: skip
    findings = untold(done.questions)
    if as_json:
        print_json("publish", source, {"findings": findings} | done.to_dict())
        return
    width = max(map(len, done.files))
    for path, size in done.files.items():
        typer.echo(f"{path:<{width}}  {size:>14,}")
    for path in done.left_out:
        typer.echo(f"{path:<{width}}  {'left out':>14}")
    typer.echo(f"{done.blocks} code blocks of the card ran.")
    for finding in findings:
        typer.echo(f"{finding['message']}: {finding['mend']}")
    typer.echo(f"Nothing is uploaded: --dry-run for {done.repo_id}." if dry_run else done.url)
