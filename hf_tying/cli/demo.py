"""`hf-tying demo`: train small models that differ in their ties alone."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .._extras import require
from ..config import TyingError
from ..demo.settings import DemoSettings, TranslationSettings


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
) -> None:
    """Train small models that differ in their ties alone, on real text; compare, save, reload and prove.

    A language model, untied and tied; or a translation model, untied, two_way and three_way. Ends with 0 only if
    everything that it claims holds. Exit codes: 0 it holds, 1 it does not, 2 wrong usage.

    Example: hf-tying demo --task translation --max_steps 20
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
    for library in ("accelerate", "datasets"):  # absent only after `pip install --no-deps`
        require(library, "The demo", "demo")
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


def _refuse(given: dict, names: tuple[str, ...], reason: str) -> None:
    """A flag of the other task is an error: to pass over it would be to do something else than was asked."""
    for name in names:
        if name in given:
            flag = name.replace("language", "lang")
            raise TyingError(f"--{flag} {given[name]} does not go with this task: {reason}.")
