"""The demo's results for people and for programs: the table, `curves.png` and `report.json`."""

import dataclasses
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from .proof import Check
from .settings import REPORT, DemoSettings
from .training import Run

_VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate")


def measurements(run: Run, folder: Path) -> dict[str, int | float]:
    """The five numbers that the two models are compared by.

    Args:
        run (`Run`): a trained model.
        folder (`Path`): where it was saved.

    Returns:
        `dict`: `parameters` (each counted once), `checkpoint_bytes` (the safetensors files), `optimizer_bytes`,
        `tokens_per_second`, `perplexity`.
    """
    return {
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "optimizer_bytes": run.optimizer_bytes,
        "tokens_per_second": round(run.tokens_per_second, 1),
        "perplexity": run.perplexity,
    }


def comparison_table(untied: dict[str, float], tied: dict[str, float], scheme: str) -> Table:
    """The measurements side by side, and the tied model's as a part of the untied one's."""
    table = Table(title="The same model, data, seed and number of tokens")
    table.add_column("")
    for heading in ("untied", scheme, f"{scheme} / untied"):
        table.add_column(heading, justify="right")
    for label, key, form in (
        ("parameters", "parameters", "{:,}".format),
        ("checkpoint", "checkpoint_bytes", _megabytes),
        ("AdamW states", "optimizer_bytes", _megabytes),
        ("tokens per second", "tokens_per_second", "{:,.0f}".format),
        ("validation perplexity", "perplexity", "{:,.2f}".format),
    ):
        table.add_row(label, form(untied[key]), form(tied[key]), f"{tied[key] / untied[key]:.3f}")
    return table


def plot_curves(untied: Run, tied: Run, scheme: str, path: Path):
    """A picture of three: training loss, validation loss, and what each role gives to the tied matrix's gradient."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(13, 4), layout="constrained")
    training, validation, gradient = figure.subplots(1, 3)
    # The untied line is wide and pale so that it is seen under the other where they meet.
    for run, name, style in (
        (untied, "untied", {"color": "tab:orange", "linewidth": 4, "alpha": 0.5}),
        (tied, scheme, {"color": "tab:blue", "linewidth": 1.5}),
    ):
        millions = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
        training.plot(*_series(run, "loss"), label=f"{name}, {millions:.2f} M parameters", **style)
        label = f"{name}, perplexity {run.perplexity:.1f}"
        validation.plot(*_series(run, "eval_loss"), marker="o", label=label, **style)
    for key in sorted({key for log in tied.history for key in log if key.startswith("grad_share/")}):
        gradient.plot(*_series(tied, key), label=key.rpartition("/")[2])

    # Both losses on one scale, on which the first steps, where they fall fast, run out of the frame.
    losses = [loss for run in (untied, tied) for key in ("loss", "eval_loss") for loss in _series(run, key)[1]]
    top = max(loss for run in (untied, tied) for loss in _series(run, "eval_loss")[1])
    for axes in (training, validation):
        axes.set_ylim(min(losses) - 0.1, top + 0.4)
    training.set(title="training", ylabel="loss in nats per token")
    validation.set(title="validation")
    gradient.set(title="gradient of the tied matrix", ylabel="share that comes through each role", ylim=(0, 1))
    for axes in (training, validation, gradient):
        axes.set_xlabel("tokens seen, in thousands")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def report(settings: DemoSettings, corpus: dict[str, Any], runs: dict[str, Run], results: dict) -> dict[str, Any]:
    """All that was asked, measured and checked, as plain JSON values.

    Args:
        settings (`DemoSettings`): what was asked.
        corpus (`dict`): what the text is.
        runs (`dict[str, Run]`): `untied` and `tied`.
        results (`dict`): the measurements of `untied` and `tied`, the checks, the sample.

    Returns:
        `dict`: the content of `report.json`.
    """
    return {
        "complete": True,
        "settings": {**dataclasses.asdict(settings), "train_file": [str(path) for path in settings.train_file]},
        "seed": settings.seed,
        "tokens": runs["tied"].tokens,
        "corpus": corpus,
        **results,
        "history": {name: run.history for name, run in runs.items()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def write_report(content: dict[str, Any], folder: Path):
    """Write `report.json` into `folder`, by way of a temporary name: a reader never finds half a report."""
    scratch = folder / f".{REPORT}.tmp"
    scratch.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    scratch.replace(folder / REPORT)


def check_lines(checks: Iterable[Check]) -> Iterable[str]:
    """One line of rich markup for each claim."""
    for check in checks:
        mark = "[green]holds[/]" if check.holds else "[bold red]FAILS[/]"
        yield f"{mark}  {escape(check.claim)} [dim]({escape(check.evidence)})[/]"


def _series(run: Run, key: str) -> tuple[list[float], list[float]]:
    steps = max(log["step"] for log in run.history)
    logs = [log for log in run.history if key in log]
    return [log["step"] * run.tokens / steps / 1000 for log in logs], [log[key] for log in logs]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"
