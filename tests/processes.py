"""The programs that tests start: each in a session of its own, ended whole at its time limit, its output in the error.

`run_python` runs one program. `run_script` runs a file of tests/scripts, in one process or in several of one group,
and reads the results that `run_cases`, at the end of the script, has printed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "scripts"
#: Seconds for one program: several times what any needs, and less than pytest's timeout in setup.cfg.
LIMIT = 150.0


def run_python(
    *arguments, timeout: float = LIMIT, cwd: Path = ROOT, check: bool = True, environment: dict | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python arguments...` and wait for its end.

    Args:
        timeout: seconds after which the program and all that it has started are killed.
        cwd: the folder to run in; the root of the repository, so that `tests` can be imported.
        check: whether an exit status other than 0 is an error.
        environment: variables to set; with the value `None`, to leave out.

    Raises:
        AssertionError: the time is over, or the program failed. The message ends with its output.
    """
    [done] = _run([[sys.executable, *arguments]], [_environment(environment or {})], timeout, cwd)
    if check and done.returncode:
        raise AssertionError(f"{_named(done)} ended with {done.returncode}{_output(done)}")
    return done


def run_script(
    script: str, *arguments, processes: int = 1, timeout: float = 240.0, variables: dict[str, str | None] | None = None
) -> dict:
    """Run a file of tests/scripts and return the results that its process 0 has printed.

    Several processes meet in a file of their own, not at a port that another run could take. If one fails, the others
    are killed: they would wait for it for good.

    Args:
        arguments: what the script takes; for `run_cases`, the names of the cases to run, all of them by default.
        processes: how many of one process group, with one thread each. A single one has no group.
        variables: of the environment, as for `run_python`.
        timeout: seconds after which all of them are killed.

    Raises:
        AssertionError: as for `run_python`, or no results were printed.
    """
    command = [sys.executable, SCRIPTS / script, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        environments = []
        for rank in range(processes):
            environment = {"ACCELERATE_USE_CPU": "true", **(variables or {})}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                environment |= {"RENDEZVOUS": f"file://{folder}/rendezvous"}
            environments.append(_environment(environment))
        done = _run([command] * processes, environments, timeout, ROOT)
    for rank, one in enumerate(done):
        if one.returncode:
            raise AssertionError(f"{_named(one)}, process {rank}, ended with {one.returncode}{_output(one)}")
    lines = [line for line in done[0].stdout.splitlines() if line.startswith("RESULTS ")]
    if not lines:
        raise AssertionError(f"{_named(done[0])} printed no line of results{_output(done[0])}")
    return json.loads(lines[-1].removeprefix("RESULTS "))


def run_cases(cases: dict[str, Callable[[], dict]]) -> NoReturn:
    """End a script of `run_script`: join the process group, run the cases, print the results of process 0 as JSON.

    The process ends here without destroying the group: while a `DistributedDataParallel` is alive, that can wait for
    good, as can an interpreter that takes both down in its own order.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    status = 1
    try:
        if grouped := "RENDEZVOUS" in os.environ:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=size)
        results = {name: cases[name]() for name in sys.argv[1:] or cases}
        if grouped:
            dist.barrier()
        print("RESULTS " + json.dumps(results))
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


class TooSlow(BaseException):
    """The time of `at_most` is over. No `Exception`, so that nothing on the way takes it for its own."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """End what runs inside, in the main thread of this process, after `seconds` by `TooSlow`."""

    def stop(*_):
        raise TooSlow(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _environment(changes: dict) -> dict[str, str]:
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    changed = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | changes
    return {name: value for name, value in changed.items() if value is not None}


def _run(commands, environments, timeout: float, cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run all commands at once until all have ended, one has failed or the time is over; nothing of them is left.

    The exit status of a process that was killed because another one failed is `None`.
    """
    running, late = [], False
    with ExitStack() as stack:
        try:
            for command, environment in zip(commands, environments, strict=True):
                # Files, not pipes: a pipe stays open as long as a process that the program has started.
                out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
                process = subprocess.Popen(
                    [*map(str, command)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=environment,
                    start_new_session=True,
                )  # fmt: skip
                running.append((process, out, err))
            end = time.monotonic() + timeout
            while None in (states := [process.poll() for process, *_ in running]) and not any(states) and not late:
                late = time.monotonic() > end
                time.sleep(0.02)
        finally:
            for process, *_ in running:
                with suppress(ProcessLookupError):  # nothing is left
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        done = []
        for (process, *files), state in zip(running, states, strict=True):
            for file in files:
                file.seek(0)
            output = (file.read().decode("utf-8", "replace") for file in files)
            done.append(subprocess.CompletedProcess(process.args, state, *output))
    if late and None in states:
        raise AssertionError(f"{_named(done[0])} was killed after {timeout:g} s{''.join(map(_output, done))}")
    return done


def _named(done: subprocess.CompletedProcess) -> str:
    return " ".join(done.args)[:300]


def _output(done: subprocess.CompletedProcess) -> str:
    return f"\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
