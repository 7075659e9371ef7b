"""The `hf-tying` command. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

import json
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..config import TyingError
from ..demo.settings import DemoSettings, TranslationSettings

app = typer.Typer(
    name="hf-tying",
    help="Weight tying for transformers: see what is tied, and make every tie explicit.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _commands():
    """Keeps `hf-tying COMMAND` as the form, however many commands there are."""


class Task(StrEnum):
    """What `hf-tying demo` trains."""

    language_model = "language_model"
    translation = "translation"


def _default(name: str) -> str:
    """The default of each task, for the help."""
    values = (getattr(settings, name) for settings in (DemoSettings, TranslationSettings))
    return "Default: {}, for translation {}.".format(*values)


@app.command()
def demo(
    task: Annotated[Task, typer.Option("--task", help="What to train.")] = Task.language_model,
    train_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--train_file",
            help="UTF-8 text file to train on; for translation, JSON lines such as "
            '{"translation": {"en": "...", "de": "..."}}. May be given several times. Default: the language reference '
            "and the docstrings that come with Python; for translation, pairs that Babel makes from CLDR.",
        ),
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            "--model_type",
            help="Any causal language model of transformers (llama, gpt2, qwen3, ...), for translation any "
            f"encoder-decoder (marian, bart, t5, ...). {_default('model_type')}",
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help=f"What to tie in the second language model. Default: {DemoSettings.scheme}. For translation there "
            "are three models: untied, two_way and three_way.",
        ),
    ] = None,
    source_lang: Annotated[
        str | None,
        typer.Option(
            "--source_lang", help=f"Language to translate from. Default: {TranslationSettings.source_language}."
        ),
    ] = None,
    target_lang: Annotated[
        str | None,
        typer.Option(
            "--target_lang", help=f"Language to translate to. Default: {TranslationSettings.target_language}."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir", help=f"Folder for the models, the report and the picture. {_default('output_dir')}"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the weights, the order of the data and the sample.")
    ] = DemoSettings.seed,
    steps: Annotated[
        int | None,
        typer.Option("--max_steps", "--steps", help=f"Optimizer steps of each model. {_default('steps')}"),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab_size", help=f"Entries of the byte-level BPE, at most. {_default('vocab_size')}"),
    ] = None,
):
    """Train small models that differ in their ties alone, on real text; compare, save, reload and prove.

    A language model, untied and tied; or a translation model, untied, two_way and three_way. Ends with 0 only if
    everything that it claims holds.
    """
    given = {
        "train_file": tuple(train_file or ()),
        "model_type": model_type,
        "scheme": scheme,
        "source_language": source_lang,
        "target_language": target_lang,
        "output_dir": output_dir,
        "seed": seed,
        "steps": steps,
        "vocab_size": vocab_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if task is Task.translation:
        _refuse(given, ("scheme",), "the translation demo trains untied, two_way and three_way")
        from ..demo.translation.job import run_translation_demo

        holds = run_translation_demo(TranslationSettings(**given))
    else:
        _refuse(given, ("source_language", "target_language"), "a language model has one. Add --task translation")
        from ..demo.job import run_demo

        holds = run_demo(DemoSettings(**given))
    if not holds:
        raise typer.Exit(1)


def _refuse(given: dict, names: tuple[str, ...], reason: str):
    """A flag of the other task is an error: to pass over it would be to do something else than was asked."""
    for name in names:
        if name in given:
            flag = name.replace("language", "lang")
            raise TyingError(f"--{flag} {given[name]} does not go with this task: {reason}.")


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_PATH", help="Folder of a saved model, or its id on the Hub.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also write a picture to this file.")] = None,
):
    """Show what is tied in a model, what is declared, and what the file holds. Reads no weights."""
    from ..report.dispatch import tying_report

    report = tying_report(model)
    if as_json:
        typer.echo(report.to_json())
    else:
        console = Console()
        # A pipe has no width: there, names stay on one line, so that they can be searched for.
        typer.echo(report.to_table(width=console.width if console.is_terminal else 200))
    if plot:
        report.plot(plot)


class Format(StrEnum):
    """What `hf-tying export` writes."""

    lora = "lora"


@app.command()
def export(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder of a saved Tied-LoRA adapter, or its id on the Hub.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to; it is made if need be.")],
    format: Annotated[
        Format, typer.Option("--format", help="lora: an ordinary LoRA adapter with exactly the same update.")
    ] = Format.lora,
    subfolder: Annotated[str | None, typer.Option("--subfolder", help="Where in ADAPTER the adapter is.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of the table.")] = False,
):
    """Write a Tied-LoRA adapter in a form that is read without this package. The base model is not loaded."""
    from ..peft import export_to_lora
    from ..ties.headers import read_header, read_json

    try:
        export_to_lora(adapter, out, subfolder=subfolder, **({"revision": revision} if revision else {}))
    except (ValueError, RuntimeError, OSError) as error:
        raise TyingError(str(error)) from error
    config, weights = read_json(out / "adapter_config.json"), out / "adapter_model.safetensors"
    shapes = [shape for name, (shape, _) in read_header(weights).items() if ".lora_" in name]
    report = {
        "format": format.value,
        "folder": str(out),
        "base_model": config["base_model_name_or_path"],
        "r": config["r"],
        "modules": len(config["target_modules"]),
        "parameters": sum(map(prod, shapes)),
        "bytes": weights.stat().st_size,
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        shown = f"{value:,}" if isinstance(value, int) else value or "-"
        typer.echo(f"{name.replace('_', ' '):<10}  {shown}")


def main():
    """Run the command line; a `TyingError` is a message and exit status 1, never a traceback."""
    try:
        app()
    except TyingError as error:
        # Not through rich: parameter names and paths may have brackets, which it would take for markup.
        typer.secho("error ", fg="red", bold=True, err=True, nl=False)
        typer.echo(error, err=True)
        raise SystemExit(1) from None
