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

from .lora_models import make_models
from .report import Session, findings, joined, show, to_dict
from .sdist import SdistError, fetch_tests

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".upstream"
# By package, the pairs of files with what its tests are run on.
FILES = {
    "transformers": [{"tied": "tied.py", "stock": "stock.py"}],
    "peft": [
        {"tied": "tied_lora.py", "stock": "stock_lora.py"},
        {"tied": "tied_tuners.py", "stock": "stock_tuners.py"},
    ],
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_CACHE": str(CACHE / "hub"),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The same tests run on every machine, one with a GPU included.
    "TRANSFORMERS_TEST_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
LONGEST = 2400  # seconds; a session takes up to five minutes on two cores

console = Console()


def main(
    control: Annotated[bool, typer.Option("--control", help="Run the stock classes alone.")] = False,
    packages: Annotated[
        list[str] | None, typer.Option("--package", help="transformers or peft; both by default.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report to this file too.")] = None,
) -> None:
    """Run transformers' common model tests on classes with TiedModelMixin, and PEFT's tests of LoRA on Tied-LoRA.

    The same tests run on the stock classes, and on LoRA, beside them. The exit code is 1 when a tied one fails, or
    skips, a test that its stock one passes, 2 when the tests could not be run, else 0; with --control 1 when a stock
    one fails.
    """
    started = time.monotonic()
    packages = packages or list(FILES)
    if unknown := sorted(set(packages) - set(FILES)):
        raise typer.BadParameter(f"{unknown[0]!r}: expected {' or '.join(FILES)}.", param_hint="--package")
    try:
        with console.status(f"fetching the tests of {' and '.join(packages)}"):
            upstream = {package: fetch_tests(version(package), CACHE, package) for package in packages}
    except SdistError as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    if "peft" in packages:
        with console.status("making the models of PEFT's tests"):
            make_models(CACHE / "hub")
    kinds = ["stock"] if control else ["tied", "stock"]
    parts = [_run(package, kinds, files, upstream[package]) for package in packages for files in FILES[package]]
    sessions = {kind: joined([part[kind] for part in parts]) for kind in kinds}
    found = findings(sessions.get("tied"), sessions.get("stock"))
    versions = {name: version(name) for name in ("transformers", "peft", "torch", "pytest")}
    report = to_dict(sessions, found, versions, time.monotonic() - started)
    show(report, console)
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"{report['seconds']:.0f} s; tracebacks in {CACHE.relative_to(HERE.parents[1])}/*.log")
    raise typer.Exit(any(finding.counts for finding in found))


def _run(package: str, kinds: list[str], names: dict[str, str], upstream: Path) -> dict[str, Session]:
    """Run one session of each kind at the same time, one core each."""
    files = {kind: HERE / names[kind] for kind in kinds}
    sessions = {kind: Session(CACHE / f"{file.stem}.jsonl") for kind, file in files.items()}
    logs = {kind: CACHE / f"{file.stem}.log" for kind, file in files.items()}
    started, processes = time.monotonic(), {}
    try:
        for kind, session in sessions.items():
            session.path.unlink(missing_ok=True)
            command = [sys.executable, str(HERE / "session.py"), str(files[kind]), upstream, session.path]
            with logs[kind].open("w") as log:
                processes[kind] = subprocess.Popen(
                    command, cwd=CACHE, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
                )
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bars = {kind: progress.add_task(f"{package}: {kind}", total=None) for kind in kinds}
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
            tail = logs[kind].read_text(errors="replace").strip()[-2000:]
            console.print(
                f"The {kind} session of {package} did not finish: {done}, exit code "
                f"{processes[kind].returncode}.\n{tail}",
                style="red",
                highlight=False,
                markup=False,
            )
            raise typer.Exit(2)
    return sessions


if __name__ == "__main__":
    typer.run(main)
