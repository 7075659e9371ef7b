"""`python -m tests.upstream`: fetch upstream's tests, run them on tied and on stock classes, report."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from .report import Session, findings, show, to_dict
from .sdist import SdistError, fetch_tests

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".upstream"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The same tests run on every machine, one with a GPU included.
    "TRANSFORMERS_TEST_DEVICE": "cpu",
}
LONGEST = 1500  # seconds; a session takes one to two minutes on two cores

console = Console()


def main(
    control: Annotated[bool, typer.Option("--control", help="Run the stock classes alone.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report to this file too.")] = None,
) -> None:
    """Run transformers' own common model tests on classes built with TiedModelMixin.

    The same tests run on the stock classes beside them. The exit code is 1 when a tied class fails, or skips, a test
    that its stock class passes, 2 when the tests could not be run, else 0; with --control 1 when a stock class fails.
    """
    started = time.monotonic()
    try:
        with console.status("fetching the tests of transformers"):
            upstream = fetch_tests(version("transformers"), CACHE)
    except SdistError as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    sessions = _run(["stock"] if control else ["tied", "stock"], upstream)
    found = findings(sessions.get("tied"), sessions.get("stock"))
    versions = {name: version(name) for name in ("transformers", "torch", "pytest")}
    report = to_dict(sessions, found, versions, time.monotonic() - started)
    show(report, console)
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"{report['seconds']:.0f} s; tracebacks in {CACHE.relative_to(HERE.parents[1])}/*.log")
    raise typer.Exit(any(finding.counts for finding in found))


def _run(kinds: list[str], upstream: Path) -> dict[str, Session]:
    """Run one session of each kind at the same time, one core each."""
    sessions = {kind: Session(CACHE / f"{kind}.jsonl") for kind in kinds}
    started, processes = time.monotonic(), {}
    try:
        for kind, session in sessions.items():
            session.path.unlink(missing_ok=True)
            command = [sys.executable, str(HERE / "session.py"), str(HERE / f"{kind}.py"), upstream, session.path]
            with (CACHE / f"{kind}.log").open("w") as log:
                processes[kind] = subprocess.Popen(
                    command, cwd=CACHE, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
                )
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bars = {kind: progress.add_task(f"{kind} classes", total=None) for kind in kinds}
            running = True
            while running and time.monotonic() - started < LONGEST:
                running = any(process.poll() is None for process in processes.values())
                for kind, session in sessions.items():
                    session.read()
                    progress.update(bars[kind], total=session.collected or None, completed=len(session.results))
                time.sleep(0.5)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for kind, session in sessions.items():
        if not session.complete:
            done = f"{len(session.results)} of {session.collected or 'an unknown number of'} tests"
            tail = (CACHE / f"{kind}.log").read_text(errors="replace").strip()[-2000:]
            console.print(
                f"The {kind} session did not finish: {done}, exit code {processes[kind].returncode}.\n{tail}",
                style="red",
                highlight=False,
                markup=False,
            )
            raise typer.Exit(2)
    return sessions


if __name__ == "__main__":
    typer.run(main)
