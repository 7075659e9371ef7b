"""`hf-tying demo`: train small models that differ in their ties alone."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .._extras import require
from ..demo.settings import REPORT, DemoSettings, TranslationSettings
from .common import FOUND, AsJson, print_json, readable


class Task(StrEnum):
    """What `hf-tying demo` trains."""

    language_model = "language_model"
    translation = "translation"


def _default(name: str) -> str:
    """The default of each task, for the help."""
    values = (getattr(settings, name) for settings in (DemoSettings, TranslationSettings))
    return "Default: {}, for translation {}.".format(*values)


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
        int, typer.Option("--seed", help="Seed of the weights, the order of the data and the sample.")
    ] = DemoSettings.seed,
    steps: Annotated[
        int | None,
        typer.Option("--max_steps", "--steps", help=f"Optimizer steps of each model. {_default('steps')}"),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab_size", help=f"Entries of the byte-level BPE, at most. {_default('vocab_size')}"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train small models that differ in their ties alone, on real text; compare, save, reload and prove.

    A language model, untied and tied; or a translation model, untied, two_way and three_way. Ends with 0 only if
    everything that it claims holds. With --json the table goes to standard error. Exit codes: 0 it holds, 1 it does
    not, 2 wrong usage, 3 the text cannot be read, or the model cannot be trained.

    Example: hf-tying demo --train_file train.txt --output_dir runs/mine
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
    else:
        _refuse(given, ("source_language", "target_language"), "a language model has one. Add --task translation")
    folder = output_dir or (TranslationSettings if task is Task.translation else DemoSettings).output_dir
    with readable("demo", str(folder), as_json), redirect_stdout(sys.stderr) if as_json else nullcontext():
        holds = _run(task, given)
    if as_json:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        failed = [check for check in report["checks"] if not check["holds"]]
        print_json("demo", str(folder), {"findings": [_finding(check) for check in failed], "report": report})
    if not holds:
        raise typer.Exit(FOUND)


def _run(task: Task, given: dict) -> bool:
    for library in ("accelerate", "datasets"):  # absent only after `pip install --no-deps`
        require(library, "The demo", "demo")
    if task is Task.translation:
        from ..demo.translation.job import run_translation_demo

        return run_translation_demo(TranslationSettings(**given))
    from ..demo.job import run_demo

    return run_demo(DemoSettings(**given))


def _finding(check: dict) -> dict:
    message = f"{check['claim']}: it does not hold ({check['evidence']})"
    return {"code": "claim", "severity": "error", "message": message, "mend": None, "group": None}


def _refuse(given: dict, names: tuple[str, ...], reason: str) -> None:
    """A flag of the other task is an error: to pass over it would be to do something else than was asked."""
    for name in names:
        if name in given:
            flag = name.replace("language", "lang")
            raise typer.BadParameter(f"--{flag} {given[name]} does not go with this task: {reason}.")
