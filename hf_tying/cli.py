"""The `hf-tying` command. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .config import TyingError
from .demo.settings import DemoSettings

app = typer.Typer(
    name="hf-tying",
    help="Weight tying for transformers: see what is tied, and make every tie explicit.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _commands():
    """Keeps `hf-tying COMMAND` as the form, however many commands there are."""


@app.command()
def demo(
    train_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--train_file",
            help="UTF-8 text file to train on; may be given several times. Default: the language reference and the "
            "docstrings that come with Python.",
        ),
    ] = None,
    model_type: Annotated[
        str, typer.Option("--model_type", help="Any causal language model of transformers: llama, gpt2, qwen3, ...")
    ] = DemoSettings.model_type,
    scheme: Annotated[str, typer.Option("--scheme", help="What to tie in the second model.")] = DemoSettings.scheme,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for both models, the report and the picture.")
    ] = DemoSettings.output_dir,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the weights, the order of the data and the sample.")
    ] = DemoSettings.seed,
    steps: Annotated[
        int, typer.Option("--max_steps", "--steps", help="Optimizer steps of each model.")
    ] = DemoSettings.steps,
    vocab_size: Annotated[
        int, typer.Option("--vocab_size", help="Entries of the byte-level BPE, at most.")
    ] = DemoSettings.vocab_size,
):
    """Train a small language model twice, untied and tied, on real text; compare, save, reload and prove.

    Ends with 0 only if everything that it claims holds.
    """
    from .demo.job import run_demo

    settings = DemoSettings(
        train_file=tuple(train_file or ()),
        model_type=model_type,
        scheme=scheme,
        output_dir=output_dir,
        seed=seed,
        steps=steps,
        vocab_size=vocab_size,
    )
    if not run_demo(settings):
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_PATH", help="Folder of a saved model, or its id on the Hub.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write a picture to this file.")] = None,
):
    """Show what is tied in a model, what is declared, and what the file holds. Reads no weights."""
    from .report import tying_report

    report = tying_report(model)
    if as_json:
        typer.echo(report.to_json())
    else:
        console = Console()
        # A pipe has no width: there, names stay on one line, so that they can be searched for.
        typer.echo(report.to_table(width=console.width if console.is_terminal else 200))
    if plot:
        report.plot(plot)


def main():
    """Run the command line; a `TyingError` is a message and exit status 1, never a traceback."""
    try:
        app()
    except TyingError as error:
        # Not through rich: parameter names and paths may have brackets, which it would take for markup.
        typer.secho("error ", fg="red", bold=True, err=True, nl=False)
        typer.echo(error, err=True)
        raise SystemExit(1) from None
