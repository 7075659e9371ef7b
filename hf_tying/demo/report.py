"""The results of the demo for people and for programs: the table, `curves.png` and `report.json`."""

import dataclasses
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..report.drawing import ROLES, RUNS, color_of_role, points_of
from ..training.results_file import write_json
from .proof import Check
from .settings import REPORT, DemoSettings, TranslationSettings

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")


def save_models(
    settings: DemoSettings | TranslationSettings, tokenizer: PreTrainedTokenizerBase, models: dict[str, Any]
) -> dict[str, Path]:
    """Write each model with the tokenizer to the folder of its name, and replace the files of an earlier demo.

    Args:
        settings: settings of the demo, with the output folder.
        tokenizer: tokenizer, which is saved beside every model.
        models (`dict[str, PreTrainedModel]`): models by the names of their folders.

    Returns:
        `dict[str, Path]`: the folders by name.
    """
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    write_report({"complete": False}, settings.output_dir)
    folders = {name: settings.output_dir / name for name in models}
    for name, model in models.items():
        shutil.rmtree(folders[name], ignore_errors=True)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def measurements(run: Any, folder: Path) -> dict[str, int | float]:
    """Collect the numbers for the comparison of the models.

    Args:
        run (`Run` or `TranslationRun`): trained model.
        folder (`Path`): folder of the saved model.

    Returns:
        `dict`: `parameters` (each counted once), `checkpoint_bytes` (size of the safetensors files),
        `optimizer_bytes`, and `tokens_per_second`.
    """
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "optimizer_bytes": run.optimizer_bytes,
        "tokens_per_second": round(run.tokens_per_second, 1),
    }


def comparison_table(untied: dict[str, float], tied: dict[str, float], scheme: str) -> Table:
    """Make the table of the two language models, with the ratio of the tied to the untied one.

    Args:
        untied: measurements of the untied model, with `perplexity`.
        tied: measurements of the tied model, with `perplexity`.
        scheme: scheme of the tied model, its name in the table.
    """
    rows = [("validation perplexity", "perplexity", "{:,.2f}".format)]
    return measurement_table({"untied": untied, scheme: tied}, rows, "The same model, data, seed and number of tokens")


def measurement_table(
    results: dict[str, dict[str, float]], scores: list[tuple[str, str, Callable[[float], str]]], title: str
) -> Table:
    """Make a table with a column for each model, and the ratio of the last to the first.

    Args:
        results (`dict[str, dict]`): measurements and scores of each model by its name.
        scores (`list[tuple]`): rows below the measurements: label, key, and a function that formats the number.
        title (`str`): title of the table.
    """
    first, last = list(results)[0], list(results)[-1]
    table = Table(title=title)
    table.add_column("")
    for heading in (*results, f"{last} / {first}"):
        table.add_column(heading, justify="right")
    for label, key, form in (
        ("parameters", "parameters", "{:,}".format),
        ("checkpoint", "checkpoint_bytes", _megabytes),
        ("AdamW states", "optimizer_bytes", _megabytes),
        ("tokens per second", "tokens_per_second", "{:,.0f}".format),
        *scores,
    ):
        numbers = [result[key] for result in results.values()]
        ratio = f"{numbers[-1] / numbers[0]:.3f}" if numbers[0] else "-"
        table.add_row(label, *map(form, numbers), ratio)
    return table


def plot_curves(runs: dict[str, Any], score: Callable[[Any], str], path: Path) -> None:
    """Draw training loss, validation loss, and the share of each role in the gradient of the tied matrix.

    Args:
        runs (`dict[str, Run]`): trained models by name, the untied one first. The gradient is that of the last one.
        score (`Callable`): function from a run to its score in words, for the legend.
        path (`Path`): file of the picture.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(13, 4), layout="constrained")
    training, validation, gradient = figure.subplots(1, 3)
    *others, last = runs
    # The untied line is wide and pale, so that it is visible under the others.
    styles = [{"color": RUNS[0], "linewidth": 4, "alpha": 0.5}, {"color": RUNS[1], "linewidth": 2.5}]
    styles = dict(zip(others, styles, strict=False)) | {last: {"color": RUNS[2], "linewidth": 1.5}}
    for name, run in runs.items():
        millions = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
        label = f"{name}, {millions:.2f} M parameters"
        training.plot(*(curve := _series(run, "loss")), label=label, **styles[name], **points_of(len(curve[0])))
        validation.plot(*_series(run, "eval_loss"), marker="o", label=f"{name}, {score(run)}", **styles[name])
    shares = {key: key.rpartition("/")[2] for log in runs[last].history for key in log if "grad_share/" in key}
    for key, role in sorted(shares.items(), key=lambda share: list(ROLES).index(share[1])):
        curve = _series(runs[last], key)
        gradient.plot(*curve, label=role, color=color_of_role(role), **points_of(len(curve[0])))

    # Both losses have one scale. The first steps, with a much higher loss, are outside the frame.
    losses = [loss for run in runs.values() for key in ("loss", "eval_loss") for loss in _series(run, key)[1]]
    top = max(loss for run in runs.values() for key in ("loss", "eval_loss") for loss in _series(run, key)[1][-1:])
    top = max(top, *(loss for run in runs.values() for loss in _series(run, "eval_loss")[1]))
    for axes in (training, validation):
        axes.set_ylim(min(losses) - 0.1, top + 0.4)
    gradient.set(title="gradient of the tied matrix", ylabel="share that comes through each role", ylim=(0, 1))
    training.set(title="training")
    validation.set(title="validation")
    for axes in (training, validation):
        axes.set_ylabel("loss in nats per token")
    for axes in (training, validation, gradient):
        axes.set_xlabel("tokens seen, in thousands")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=150)


def report(
    settings: DemoSettings | TranslationSettings, corpus: dict[str, Any], runs: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """Collect settings, measurements and checks as plain JSON values.

    Args:
        settings: settings of the demo.
        corpus (`dict`): description of the text.
        runs (`dict[str, Run]`): trained models by name.
        results (`dict`): measurements of each model, checks and samples.

    Returns:
        `dict`: content of `report.json`.
    """
    return {
        "complete": True,
        "settings": {**dataclasses.asdict(settings), "train_file": [str(path) for path in settings.train_file]},
        "seed": settings.seed,
        "tokens": next(iter(runs.values())).tokens,
        "corpus": corpus,
        **results,
        "history": {name: run.history for name, run in runs.items()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def write_report(content: dict[str, Any], folder: Path) -> None:
    """Write `report.json`, whole or not at all.

    Args:
        content: plain JSON values.
        folder: folder of the report.
    """
    write_json(content, folder / REPORT)


def check_lines(checks: Iterable[Check]) -> Iterable[str]:
    """Make a line of rich markup for each claim.

    Args:
        checks: the claims.
    """
    for check in checks:
        mark = "[green]holds[/]" if check.holds else "[bold red]FAILS[/]"
        yield f"{mark}  {escape(check.claim)} [dim]({escape(check.evidence)})[/]"


def _series(run: Any, key: str) -> tuple[list[float], list[float]]:
    steps = max(log["step"] for log in run.history)
    logs = [log for log in run.history if key in log]
    return [log["step"] * run.tokens / steps / 1000 for log in logs], [log[key] for log in logs]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"
