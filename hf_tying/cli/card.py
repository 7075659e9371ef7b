"""`hf-tying card`: the card of a saved model or adapter, made from its files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import FOUND, AsJson, print_json, readable

Folder = Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a saved model or Tied-LoRA adapter.")]
BaseModel = Annotated[str | None, typer.Option("--base-model", help="Id of the model that it was trained from.")]
License = Annotated[str | None, typer.Option("--license", help="Licence, by its word on the Hub.")]
Language = Annotated[list[str] | None, typer.Option("--language", help="Code of a language; may be given again.")]
Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="Id of a data set; may be given again.")]
Result = Annotated[
    list[str] | None,
    typer.Option("--result", help="A measured value; may be given again.", metavar="METRIC=VALUE[@DATASET]"),
]


def card(
    source: Folder,
    base_model: BaseModel = None,
    license: License = None,
    language: Language = None,
    dataset: Datasets = None,
    result: Result = None,
    repo_id: Annotated[
        str | None, typer.Option("--repo-id", help="Repository that the card names. Default: the folder's name.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Print the card to standard output with -o -.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; end with 1 if the card would change.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write or renew the card of a saved model or Tied-LoRA adapter. Loads no weights.

    What was written by hand outside of the sections of hf_tying stays.
    Exit codes: 0 fine, 1 the Hub would refuse the card, or --check: it would change, 2 wrong usage, 3 cannot be read.

    Example: hf-tying card tied-llama --license apache-2.0 --language en
    """
    facts = facts_from(base_model, license, language, dataset, result)
    if output not in (None, "-"):
        raise typer.BadParameter(f"{output!r}: expected -, which is standard output.", param_hint="--output")
    path, dry = Path(source) / "README.md", check or output == "-"
    with readable("card", source, as_json):
        from ..hub import make_card
        from ..hub.cards import refuse_strange
        from ..hub.facts import facts_of

        folder = refuse_strange(source)
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        made = make_card(folder, repo_id=repo_id, save=not dry, **facts)
        missing = [name for name in facts_of(folder, **facts).missing if not getattr(made.data, name, None)]
    changed = before is None or before.strip() != made.content.strip()
    findings = untold(missing)
    if as_json:
        content = {"findings": findings, "path": str(path), "changed": changed, "metadata": made.data.to_dict()}
        print_json("card", source, content)
    elif output == "-":
        typer.echo(made.content)
    else:
        typer.echo(f"{path}: {'would change' if check and changed else 'as it was' if not changed else 'written'}")
        for finding in findings:
            typer.echo(f"  {finding['message']}: {finding['mend']}")
    if check and changed:
        raise typer.Exit(FOUND)


def facts_from(
    base_model: str | None, license: str | None, language: list[str] | None, dataset: list[str] | None,
    result: list[str] | None,
) -> dict:  # fmt: skip
    """The facts for `make_card` from the flags. Facts that were not given are left out."""
    facts: dict = {"base_model": base_model, "license": license, "language": language, "datasets": dataset}
    for each in result or ():
        assigned, _, measured_on = each.partition("@")
        metric, _, value = assigned.partition("=")
        try:
            facts.setdefault("results", {})[metric.strip()] = float(value)
        except ValueError:
            raise typer.BadParameter(f"{each!r}: expected METRIC=VALUE[@DATASET].", param_hint="--result") from None
        if measured_on:
            facts["dataset"] = measured_on
            facts |= {"dataset_id": measured_on} if "/" in measured_on else {}
    return {name: value for name, value in facts.items() if value}


def untold(facts: list[str]) -> list[dict[str, Any]]:
    """A finding for each fact that a reader of the card would ask for, with the flag that tells it."""
    return [
        {
            "code": "card",
            "severity": "info",
            "message": f"nothing tells the {name}",
            "mend": f"--{name.rstrip('s')} ...",
            "group": None,
        }
        for name in facts
    ]
