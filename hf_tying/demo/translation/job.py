"""The demo with a translation model, from sentence pairs to the checks, in order."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from ..._extras import require
from ...training.callbacks import TyingCallback
from ..measuring import one_thread
from ..proof import still_tied
from ..report import check_lines, measurement_table, measurements, plot_curves, report, save_models, write_report
from ..settings import REPORT, TranslationSettings
from .corpus import Corpora, prepared_corpora
from .fresh_process import answer
from .models import SCHEMES, build_models, small_config
from .proof import bleu_check, outcome_checks, question_for, reload_checks, start_check, success_check
from .training import TranslationRun, train

_SAMPLES = 8


@one_thread()
def run_translation_demo(settings: TranslationSettings, console: Console | None = None) -> bool:
    """Train three models, compare and save them, load them again, and check the claims.

    `settings.output_dir` gets `untied/`, `two_way/`, `three_way/`, `report.json` and `curves.png`, also if a claim
    does not hold.

    Args:
        settings (`TranslationSettings`): settings of the demo.
        console (`rich.console.Console`, *optional*): console for the table and the claims. Default: standard output.

    Returns:
        `bool`: whether all claims hold.

    Raises:
        TyingError: the languages, the pairs or the model cannot be used. Nothing is written then.
    """
    require("matplotlib.figure", "The picture of the demo", "demo")
    require("sacrebleu", "BLEU", "demo")
    console = console or Console()
    corpora = prepared_corpora(settings)  # warns if sentences are cut, so it runs before warnings are turned off
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # for loading and saving; the trainer's bar stays
    config = small_config(settings.model_type, corpora.tokenizer, settings.max_length)
    models = build_models(config, settings.max_length, settings.seed)
    checks = [start_check(models)]
    described = corpora.describe()
    _announce(console, settings, described)

    runs = {}
    for name, model in models.items():
        callbacks = [TyingCallback(log_roles=True)] if name != "untied" else None
        runs[name] = train(model, name, settings, corpora, callbacks)

    question = question_for(corpora, settings.num_beams, settings.max_length)
    in_memory = {name: answer(model, question) for name, model in models.items()}
    folders = save_models(settings, corpora.tokenizer, models)
    results = {name: measurements(run, folders[name]) | _scores(run) for name, run in runs.items()}
    tied = {name: model for name, model in models.items() if name != "untied"}
    saved_once = {name for name, model in tied.items() if model.config.tying["save_format"] == "dedup"}
    checks += [
        *outcome_checks(runs, results, saved_once),
        *([bleu_check(results)] if settings.is_default_pair else []),
        *([] if settings.train_file else [success_check(runs["three_way"])]),
        still_tied("both are tied after training (assert_tied)", *tied.values()),
        *reload_checks(folders, in_memory, question),
    ]

    plot_curves(runs, lambda run: f"BLEU {run.bleu['score']:.1f}", settings.output_dir / "curves.png")
    samples = _samples(corpora, runs["three_way"])
    content = results | {"checks": [asdict(check) for check in checks], "samples": samples}
    write_report(report(settings, described, runs, content), settings.output_dir)
    _conclude(console, settings, results, samples, checks)
    return all(check.holds for check in checks)


def _scores(run: TranslationRun) -> dict:
    return {
        "exact_match": run.exact_match,
        "bleu": run.bleu["score"],
        "chrf": run.chrf["score"],
        "signatures": {"bleu": run.bleu["signature"], "chrf": run.chrf["signature"]},
    }


def _samples(corpora: Corpora, run: TranslationRun) -> list[dict[str, str]]:
    """Validation sentences from all parts of the corpus, with their references and translations."""
    places = range(0, len(corpora.validation), max(1, len(corpora.validation) // _SAMPLES))
    return [
        {
            "source": corpora.validation.source[i],
            "reference": corpora.validation.target[i],
            "translation": run.translations[i],
        }
        for i in list(places)[:_SAMPLES]
    ]


def _announce(console: Console, settings: TranslationSettings, corpus: dict) -> None:
    console.print(
        f"[bold]Pairs[/]  {escape(corpus['name'])}, {corpus['source_language']} to {corpus['target_language']}: "
        f"{corpus['training_pairs']:,} to train on, {corpus['validation_pairs']:,} held out; no line of either side "
        "in both\n"
        f"[bold]Models[/] three of type {settings.model_type}: {', '.join(SCHEMES)}; {settings.steps:,} steps of "
        f"{settings.batch_size} pairs each, seed {settings.seed}, joint vocabulary {corpus['vocabulary']:,} "
        "(byte-level BPE)",
        highlight=False,
        soft_wrap=True,
    )


def _conclude(
    console: Console, settings: TranslationSettings, results: dict, samples: list[dict], checks: list
) -> None:
    scores = [
        ("exact match", "exact_match", "{:.3f}".format),
        ("BLEU", "bleu", "{:.2f}".format),
    ]
    console.print(
        measurement_table(results, scores, "The same model, data, seed and steps; held-out lines translated greedily")
    )
    for line in _sample_lines(samples):
        console.print(line, highlight=False, soft_wrap=True)
    for line in check_lines(checks):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"[bold]Written[/] {escape(str(settings.output_dir))}: {', '.join(SCHEMES)}, curves.png, {REPORT}\n"
        "[bold]Other languages[/] hf-tying demo --task translation --source_lang fr --target_lang pl "
        f"--output_dir {escape(str(Path('runs', 'fr-pl')))}",
        highlight=False,
        soft_wrap=True,
    )


def _sample_lines(samples: list[dict[str, str]]) -> Iterable[str]:
    for sample in samples:
        right = sample["translation"] == sample["reference"]
        mark = "[green]right[/]" if right else "[red]wrong[/]"
        line = f"{mark}  {escape(sample['source'])} [bold]>[/] {escape(sample['translation'])}"
        yield line if right else f"{line} [dim](expected: {escape(sample['reference'])})[/]"
