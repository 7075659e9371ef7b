"""Every class with an embedding and a head through its life, held and untouched: `python -m tests.upstream.sweep`."""

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from .. import zoo
from ..processes import TooSlow, at_most
from .examine import Examination, Finding, examine
from .stock_worker import StockWorker

LONGEST = 300  # seconds for one class; most take two to ten

console = Console()


def main(
    only: Annotated[list[str] | None, typer.Option("--only", help="A class; all of them by default.")] = None,
    every: Annotated[int, typer.Option("--every", help="Each n-th class alone.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write what is found to this file too.")] = None,
) -> None:
    """Hold each transformers class that has an embedding and a head, and compare its life with an untouched model's.

    The exit code is 1 when something is found, else 0. What is rightly refused is shown, and is no finding.
    """
    quiet()
    started, done = time.monotonic(), []
    names = list(only or zoo.classes()[::every])
    for examination in sweep(names):
        done.append(examination)
        if not examination.left_out:
            told = "; ".join(f"{finding.scheme}, {finding.step}" for finding in examination.findings)
            print(f"{len(done):5d} {examination.seconds:6.1f} s  {examination.name}  {told}", flush=True)
        if json_path:
            json_path.write_text(json.dumps([asdict(one) for one in done], indent=1) + "\n", encoding="utf-8")
    show(done, time.monotonic() - started)
    raise typer.Exit(any(one.findings for one in done))


def quiet() -> None:
    """One thread, and none of what the libraries say of each of a thousand files."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for name in ("transformers", "accelerate", "hf_tying"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def sweep(names: list[str]) -> Iterator[Examination]:
    """Examine classes, one after another; one that fails, or hangs, ends only itself."""
    worker = StockWorker()
    try:
        for name in names:
            try:
                with at_most(LONGEST):
                    examination = examine(name, worker)
            except (Exception, TooSlow) as error:
                worker.close()  # it may be in the middle of an answer
                worker = StockWorker()
                examination = Examination(name, findings=[Finding(name, "-", "the sweep itself", repr(error)[:400])])
            yield examination
    finally:
        worker.close()


def causes(findings: list[Finding]) -> dict[tuple[str, str], list[Finding]]:
    """Findings by what they have in common: the step, and the words without the names of one class."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        words = re.sub(r"\b[\w.]*\.(weight|bias)\b|'[^']*'", "_", finding.what)
        words = re.sub(rf"\b{finding.name}\b|\d[\d.e+-]*", "_", words)
        found.setdefault((finding.step.removeprefix("from untied: "), words[:110]), []).append(finding)
    return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))


def show(done: list[Examination], seconds: float) -> None:
    """Print the tables: what was found, by its cause; what is refused; what was left out."""
    examined = [one for one in done if not one.left_out]
    for title, kind, style in (("found", "findings", "red"), ("refused", "refusals", "yellow")):
        table = Table("times", "step", "what", "first of them", title=title, style=style)
        for (step, _), alike in causes([finding for one in examined for finding in getattr(one, kind)]).items():
            first = alike[0]
            table.add_row(str(len(alike)), step, first.what[:200], f"{first.name}, {first.scheme}")
        if table.rows:
            console.print(table)
    for reason, times in Counter(re.sub(r"^\w+: |\d[\d,]*", "", one.left_out) for one in done if one.left_out).items():
        console.print(f"{times:4d} x left out: {reason[:150]}", style="dim", highlight=False, markup=False)
    schemes = Counter(scheme for one in examined for scheme in one.steps)
    steps = sum(len(steps) for one in examined for steps in one.steps.values())
    found = sum(bool(one.findings) for one in examined)
    console.print(
        f"{len(examined)} classes held ({', '.join(f'{n} {scheme}' for scheme, n in schemes.items())}), {steps} steps "
        f"compared with an untouched model, {found} classes with findings; {seconds:.0f} s"
    )


if __name__ == "__main__":
    typer.run(main)
